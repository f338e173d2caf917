-- Which partitions went through the archive from their first row on. Rows of a partition that was attached with rows in
-- it, or was loaded while it was detached, never pass the publication: it is not in this table until they were copied.

create table highwater.covered_partition (
    source_table   text not null references highwater.watermark on delete cascade,
    partition_oid  oid not null,
    partition_name text not null,
    covered_at     timestamptz not null default clock_timestamp(),
    primary key (source_table, partition_oid)
);

comment on table highwater.covered_partition is
    'Partitions (a plain table counts as its own) of which every row is archived or still to come. One that is attached and not here, and holds rows, is a gap.';

-- A gap that is found while an earlier one is being mended must not be forgotten with it.
alter table highwater.watermark add column gap_count bigint not null default 0;

comment on column highwater.watermark.gap_count is
    'How often a gap was found. A table is complete only if none was found since its rows were looked at.';
