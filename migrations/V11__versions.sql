-- Tables whose rows change: each version of a row is archived, and publication `..._versions` sends updates and deletes, too.
alter table highwater.watermark add column keeps_versions boolean not null default false;

comment on column highwater.watermark.keeps_versions is
    'Rows of the table are updated and deleted, too, and each version is archived.';

-- Deletes those of some rows (of a table that is not dropped as a whole) that are past retention and archived; how many, or
-- null and why not. They are added up in the log's entry `entry`, which is made at first.
create or replace function highwater.purge_rows(
    root oid, unit oid, cutoff timestamptz, places tid[], inout entry bigint, out deleted bigint, out reason text)
language plpgsql set search_path = pg_catalog, pg_temp set row_security = off as $$
declare
    key record := highwater.purge_key(root, cutoff);
begin
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'highwater.purge_rows needs isolation level read committed, not %', current_setting('transaction_isolation');
    end if;
    reason := key.blocked_by;
    if reason is not null then
        return;
    end if;
    begin
        perform set_config('lock_timeout', '200ms', true);
        -- What is purged was not deleted: it stays in the archive as it is.
        if (select w.keeps_versions from highwater.watermark w where w.source_table = key.source_table) then
            perform pg_logical_emit_message(true, 'highwater', 'purge ' || r.key) from highwater.request_key r;
        end if;
        -- A row that was changed since the statement began is judged as it is now: allow for the ids given out meanwhile.
        execute format(
            'delete from only %s where ctid = any ($1) and %I < %s
               and highwater.widened(xmin, (select highwater.newest_xid() + 1048576)) < $2
               and exists (select from highwater.covered_partition p join pg_class c on c.oid = p.partition_oid
                           where p.source_table = $3 and p.partition_oid = $4 and p.detached_at is null and p.lacks_since is null and c.relpersistence = ''p''
                             and highwater.is_part($4, $5) and p.attachment = highwater.attachment($4))',
            unit::regclass, highwater.time_column(root), key.cutoff_literal)
            using places, key.horizon, key.source_table, unit, root;
        get diagnostics deleted = row_count;
    exception
        when lock_not_available then
            reason := format('others keep some of %s locked', highwater.rows(cardinality(places)));
            return;
        when others then
            reason := format('%s (SQLSTATE %s)', sqlerrm, sqlstate);
            return;
    end;
    if deleted = 0 then
        reason := 'nothing was deleted: a trigger may keep the rows, or they were changed meanwhile';
        return;
    end if;
    if entry is null then
        insert into highwater.purge_log (source_table, partition_name, action, row_count, cutoff, horizon)
        values (key.source_table, unit::regclass::text, 'deleted', deleted, cutoff, key.horizon::text::xid8)
        returning id into entry;
    else
        update highwater.purge_log set row_count = row_count + deleted, last_at = clock_timestamp(), horizon = key.horizon::text::xid8
        where id = entry;
    end if;
end
$$;
