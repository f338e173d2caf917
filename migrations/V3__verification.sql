-- What was compared with the archive as a whole, and what is to be.

-- Partitions whose rows were read back from the archive and found equal to those in Postgres, by `highwater verify`.

create table highwater.verified_partition (
    source_table   text not null references highwater.watermark on delete cascade,
    partition_oid  oid not null,
    partition_name text not null,
    row_count      bigint not null check (row_count >= 0),
    checksum       text not null,
    horizon        xid8 not null,
    verified_at    timestamptz not null default clock_timestamp(),
    primary key (source_table, partition_oid)
);

comment on table highwater.verified_partition is
    'Partitions (a plain table counts as its own) whose rows were compared with the archive and are equal. It holds for rows below the horizon only.';
comment on column highwater.verified_partition.row_count is
    'Rows in Postgres, those in the quarantine with them.';
comment on column highwater.verified_partition.checksum is
    'Sum, modulo 2^64, of the first 64 bits of the MD5 of each archived row; 16 hexadecimal digits.';
comment on column highwater.verified_partition.horizon is
    'Every row whose transaction has a smaller id was compared.';

-- A mark in a Delta log says that a partition's rows below a transaction are archived. A resync does not believe it.
alter table highwater.watermark add column marks_void_upto xid8;

comment on column highwater.watermark.marks_void_upto is
    'Marks of copies up to this transaction are void: the operator wants every row compared again.';
