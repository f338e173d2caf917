-- Rows that were moved in Postgres came to the archive twice; what is too much of them is removed there.

alter table highwater.watermark add column doubles_removed bigint not null default 0 check (doubles_removed >= 0);

comment on column highwater.watermark.doubles_removed is
    'How many surplus copies of rows were ever removed from the archive: rows that it had more often than Postgres, which had them too.';
