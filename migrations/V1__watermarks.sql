-- How far the archive reaches. Highwater's sidecar writes these rows; the purge and people read them. They mirror the
-- logs of the archived Delta tables, which are the truth, and never run ahead of them.

create table highwater.watermark (
    source_table      text primary key,
    kind              text not null,
    slot_name         text not null,
    system_identifier text not null,
    timeline_id       integer not null,
    table_oid         oid not null,
    state             text not null check (state in ('snapshot', 'streaming', 'gap')),
    flushed_lsn       pg_lsn not null,
    archived_before   xid8,
    max_created_at    timestamptz,
    row_count         bigint not null default 0 check (row_count >= 0),
    file_count        bigint not null default 0 check (file_count >= 0),
    byte_count        bigint not null default 0 check (byte_count >= 0),
    updated_at        timestamptz not null default clock_timestamp()
);

comment on table highwater.watermark is
    'One row per archived table: how far its archive reaches. Written by the highwater sidecar only.';
comment on column highwater.watermark.state is
    'snapshot: rows from before the slot are not archived yet; streaming: every row is archived or still to come; gap: rows may have been skipped. Only streaming allows a purge.';
comment on column highwater.watermark.timeline_id is
    'The timeline of the server that flushed_lsn belongs to: after a failover, positions past the switch are used again.';
comment on column highwater.watermark.table_oid is
    'Which table is archived, whatever it is called; another table of the same name is not it.';
comment on column highwater.watermark.flushed_lsn is
    'Every transaction whose commit record begins before this position is in the archive, but for what state says.';
comment on column highwater.watermark.archived_before is
    'Every transaction with a smaller id is wholly in the archive; null until that is known.';

create table highwater.entity_watermark (
    source_table   text not null references highwater.watermark on delete cascade,
    space          text not null,
    name           text not null,
    version        text not null,
    min_created_at timestamptz not null,
    max_created_at timestamptz not null,
    row_count      bigint not null check (row_count >= 0),
    updated_at     timestamptz not null default clock_timestamp()
);

-- A name may be longer than an index entry can be (a third of a page), so the key is made of hashes.
create unique index entity_watermark_key on highwater.entity_watermark
    (source_table, (md5(space) || md5(name) || md5(version)));

comment on table highwater.entity_watermark is
    'One row per archived table and entity: how many rows its archive holds, and of which times.';
