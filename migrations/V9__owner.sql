-- The schema belongs to the owner of the drift tables, and so does what the purge runs. The role that archives writes the state that
-- it is granted, and nothing that it writes there may become code, or reach other tables than those that the owner has published.

-- What requests for a checkpoint carry, so that only who may read this can make one: the log's messages are anybody's.
create table highwater.request_key (
    key text not null
);
insert into highwater.request_key values (gen_random_uuid()::text);

comment on table highwater.request_key is
    'Requests for a checkpoint (pg_logical_emit_message with prefix highwater) carry it. For the roles that archive and verify.';

-- What a purge may delete from. The owner alone writes it: `highwater setup --as-owner` puts the drift tables here, and that and each
-- purge the partitions that they have, so that one that is detached later is known to have been one.
create table highwater.purgeable (
    table_oid oid primary key,
    root      oid not null
);

comment on table highwater.purgeable is
    'The drift tables that a purge may delete from, and tables that were seen as partitions of them. Written by the owner only.';

alter table highwater.archive_log add column removed_rows bigint, add column damage_note text;

comment on column highwater.archive_log.removal_note is
    'What others have taken out of the table, and how to go back; null when it was brought back.';
comment on column highwater.archive_log.removed_rows is
    'How many rows the entries of removal_note took in all; null if that is not known.';
comment on column highwater.archive_log.damage_note is
    'Files that the log names and the storage has not, or not as they were written; null if all are there.';

-- Why what the watermarks say of a table can't be relied on; null if it can. Nobody has looked at the archive's logs for too long:
-- that of the table, and that of the quarantine, which may have rows of it. Or its owner has not said that it may be purged, whatever
-- the sidecar's role has written.
create or replace function highwater.unseen(root oid) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
    select coalesce((
        select format('its owner has not given %s to the purge: `highwater setup --as-owner` does', root::regclass)
        where exists (select from pg_class c where c.oid = root)
          and not exists (select from highwater.purgeable p where p.table_oid = unseen.root and p.root = unseen.root)), (
    select case
        when l.kind is null then format(
            'the log of the archive''s table %s was not looked at yet, so somebody may have taken rows out of it: `highwater run` looks', k.kind)
        else format(
            'the log of the archive''s table %s was last looked at %s, so somebody may have taken rows out of it since: `highwater run` looks (HIGHWATER_PURGE_TRUST is %s)',
            k.kind, highwater.ago(l.looked_at), l.purge_trust) end
    from highwater.watermark w, unnest(array[w.kind, 'quarantine']) with ordinality as k (kind, place)
    left join highwater.archive_log l on l.kind = k.kind
    where w.table_oid = root and (l.kind is null or l.looked_at < clock_timestamp() - l.purge_trust)
    order by k.place limit 1))
$$;

-- What the rows of a table are in: partitions that are dropped as a whole (a range of created_at that ends, and those that
-- were detached and kept, and were seen as partitions before), and tables whose rows are deleted (a plain one, a default partition, and
-- everything else).
create or replace function highwater.purge_units(root oid)
returns table (partition_oid oid, partition_name text, is_whole boolean, range_end timestamptz, is_attached boolean)
language sql set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' set standard_conforming_strings = on as $$
    with recursive tree as (
        select root as oid, 0 as depth, null::text collate "C" as high
        union all
        select i.inhrelid, t.depth + 1, (
            -- With the table's oid it would wait for who has locked that.
            select (regexp_match(pg_get_expr(c.relpartbound, 0), '^FOR VALUES FROM \(.*\) TO \(''(\d[^'']*)'''))[1]
            from pg_partitioned_table p join pg_attribute a on a.attrelid = p.partrelid and a.attnum = p.partattrs[0]
            where p.partrelid = i.inhparent and p.partstrat = 'r' and a.attname = 'created_at'
              and a.atttypid in ('timestamptz'::regtype, 'timestamp'::regtype))
        from tree t join pg_inherits i on i.inhparent = t.oid join pg_class c on c.oid = i.inhrelid
        where c.relispartition and not i.inhdetachpending)
    -- Of a partition that is partitioned itself the rows are deleted: without its parts it would take no late rows.
    select t.oid, t.oid::regclass::text, t.depth = 1 and t.high is not null,
           case when t.depth = 1 then t.high::timestamptz end, true
    from tree t join pg_class c using (oid) where c.relkind = 'r'
    union all
    select c.oid, c.oid::regclass::text, true, null, false
    from highwater.watermark w join highwater.covered_partition p using (source_table) join pg_class c on c.oid = p.partition_oid
    where w.table_oid = root and c.relkind = 'r' and not c.relispartition and c.oid <> root
      and exists (select from highwater.purgeable s where s.table_oid = c.oid and s.root = purge_units.root)
$$;

-- What there is to delete of one of these tables, and what stands in the way. `depth`: 'quick' counts nothing, 'proof' counts if
-- nothing else stands in the way, 'full' always. Rights are judged of who purges: the caller, or,
-- of one who only has it explained and has not the owner's rights, the table's owner. Under a lock that keeps writers out, `is_proven` says that all of it may go.
create or replace function highwater.purge_finding(
    root oid, unit oid, is_whole boolean, cutoff timestamptz, depth text,
    out row_count bigint, out deletable bigint, out horizon bigint, out is_proven boolean, out is_due_again boolean, out blocked_by text)
language plpgsql set search_path = pg_catalog, pg_temp set row_security = off set timezone = 'UTC' set datestyle = 'ISO'
set lock_timeout = '1s' as $$
declare
    key record;
    class pg_class;
    covered highwater.covered_partition;
    verified bigint;
    youngest bigint;
    latest timestamptz;
    undated bigint;
    young bigint;
    first_young bigint;
    scan text;
    plan json;
    has_any boolean;
    detail text;
    purger name := (select case when depth = 'proof' or pg_has_role(c.relowner, 'usage') then current_user else pg_get_userbyid(c.relowner) end
                    from pg_class c where c.oid = root);
    -- Where its rows are read: who may read only the partitioned table sees them through that.
    place text := case when has_table_privilege(unit, 'select') and not row_security_active(unit) then 'only ' || unit::regclass
                       when has_table_privilege(root, 'select') and not row_security_active(root) then root::regclass::text end;
begin
    is_due_again := false;
    is_proven := false;
    deletable := 0;
    key := highwater.purge_key(root, cutoff);
    horizon := key.horizon;
    blocked_by := key.blocked_by;
    select * into class from pg_class c where c.oid = unit;
    select * into covered from highwater.covered_partition p where p.source_table = key.source_table and p.partition_oid = unit;
    if class.oid is null then
        blocked_by := coalesce(blocked_by, 'it is gone');
        return;
    end if;
    blocked_by := coalesce(blocked_by, case
        when is_whole and not pg_has_role(purger, class.relowner, 'usage') then format(
            'role %s does not own it and so can''t drop it; its owner is %s', purger, pg_get_userbyid(class.relowner))
        when is_whole and class.relispartition and not (select pg_has_role(purger, c.relowner, 'usage') from pg_class c where c.oid = root) then format(
            'role %s does not own %s and so can''t detach it', purger, root::regclass)
        when not (has_schema_privilege(purger, class.relnamespace, 'usage') and has_table_privilege(purger, unit, 'select')
                  and (is_whole or has_table_privilege(purger, unit, 'delete'))) then format(
            'role %s may not read it, or delete from it: grant usage on schema %s to %1$I; grant select, delete on %3$s to %1$I',
            purger, class.relnamespace::regnamespace, unit::regclass)
        when purger = current_user and row_security_active(unit) then format(
            'a row-level security policy may hide rows of it from role %s: purge as a role that no policy is for (its owner, or one with bypassrls)',
            current_user)
        when class.relpersistence <> 'p' then format(
            'it is unlogged, so its rows are in no log and not archived: alter table %s set logged', unit::regclass)
        when class.relkind = 'r' and class.relam <> (select a.oid from pg_am a where a.amname = 'heap') then format(
            'it has the access method %s, so its rows are in no log and not archived: alter table %s set access method heap',
            (select a.amname from pg_am a where a.oid = class.relam), unit::regclass)
        when covered.partition_oid is null
            or (highwater.is_part(unit, root)
                and (covered.detached_at is not null or covered.attachment is distinct from highwater.attachment(unit))) then format(
            'it was attached with rows in it, rewritten, or away for a while, and the sidecar, which last reported %s, has not compared it yet',
            highwater.ago(key.reported_at))
        when covered.lacks_since is not null and covered.lacks_reason is not null then format('%s (noticed %s)', covered.lacks_reason, highwater.ago(covered.lacks_since))
        when covered.lacks_since is not null then format(
            '`highwater verify` found %s that the archive lacks rows of it: `highwater verify --repair` adds them (--repair-changed where rows were updated)', highwater.ago(covered.lacks_since))
        when is_whole and highwater.dependents(unit) is not null then format(
            '%s depends on it, and would have to be dropped first', highwater.dependents(unit))
        when is_whole and not exists (
            select from highwater.verified_partition v where v.source_table = key.source_table and v.partition_oid = unit) then
            'its rows were not read back from the archive yet, or something differed: the sidecar verifies what is past retention by itself, `highwater verify` does it now'
    end);
    if is_whole then
        select v.horizon::text::bigint into verified from highwater.verified_partition v
        where v.source_table = key.source_table and v.partition_oid = unit;
    end if;
    if depth = 'quick' and is_whole then
        row_count := greatest(class.reltuples, 0)::bigint;
    elsif key.cutoff_literal is null or place is null then
        blocked_by := coalesce(blocked_by, format('what it holds can''t be seen by role %s', current_user));
        return;
    elsif depth = 'quick' then
        scan := format('select from %s where tableoid = %s and created_at < %s', place, unit, key.cutoff_literal);
        execute format('select exists (%s)', scan) into has_any;
        execute 'explain (format json) ' || scan into plan;
        row_count := case when has_any then (plan -> 0 -> 'Plan' ->> 'Plan Rows')::bigint else 0 end;
    end if;
    if depth = 'quick' or (depth = 'proof' and blocked_by is not null) then
        deletable := case when blocked_by is null then row_count else 0 end;
        return;
    end if;

    -- One statement, and so one snapshot, for the rows and for the ids that they may have.
    scan := format(' from %s as t, (select highwater.newest_xid() as newest offset 0) as ids where t.tableoid = %s', place, unit);
    if not is_whole then
        scan := scan || format(' and created_at < %s', key.cutoff_literal);
    end if;
    execute 'select count(*), count(*) - count(created_at), max(created_at), max(highwater.widened(xmin, newest))' || scan
        into strict row_count, undated, latest, youngest;
    -- Below both horizons; either may be the lower one.
    horizon := least(horizon, verified);
    if blocked_by is not null then
        return;
    end if;
    if is_whole and (undated > 0 or latest >= cutoff) then
        blocked_by := format('it has rows up to %s, which are not past retention', coalesce(latest::text, 'no time'));
    elsif youngest >= horizon then
        execute 'select count(*), min(young) from (select highwater.widened(xmin, newest) as young' || scan || ') as rows where young >= $1'
            into young, first_young using horizon;
        if first_young < key.horizon then
            is_due_again := true;
            blocked_by := format('%s came after its rows were read back from the archive, or was written anew (transaction %s or later; verified up to %s): a purge has it verified again, and `highwater verify` does that now',
                highwater.rows(young), first_young, verified);
        else
            blocked_by := format('%s of transaction %s or later are not archived yet; archived_before is %s; the sidecar last reported %s',
                highwater.rows(young), first_young, key.horizon, highwater.ago(key.reported_at));
        end if;
    end if;
    if blocked_by is null and is_whole then
        blocked_by := highwater.referrers(unit);
    end if;
    deletable := case when blocked_by is null then row_count when is_whole then 0 else greatest(row_count - young, 0) end;
    -- Only what was counted to the end, and only a comparison that held: null is no proof.
    is_proven := (blocked_by is null and row_count is not null and horizon is not null
                  and (row_count = 0 or youngest < horizon)) is true;
exception
    when lock_not_available then
        deletable := 0;
        is_proven := false;
        blocked_by := 'others keep it locked';
    when others then
        get stacked diagnostics detail = pg_exception_detail;
        deletable := 0;
        is_proven := false;
        blocked_by := format('it can''t be looked at: %s (SQLSTATE %s)', concat_ws('; ', sqlerrm, nullif(detail, '')), sqlstate);
end
$$;

-- Takes note of the partitions that a purgeable table has now.
create function highwater.note_partitions(root oid) returns void
language sql set search_path = pg_catalog, pg_temp as $$
    insert into highwater.purgeable (table_oid, root)
    select u.partition_oid, note_partitions.root from highwater.purge_units(note_partitions.root) u
    where u.is_attached and u.partition_oid <> note_partitions.root
      and has_table_privilege('highwater.purgeable', 'insert')
      and exists (select from highwater.purgeable p where p.table_oid = note_partitions.root and p.root = note_partitions.root)
    on conflict do nothing
$$;

-- Who runs a purge of a table already, for people; null if nobody. Anybody can take an advisory lock, so one that is held by a role that
-- could not purge the table means nothing.
create function highwater.purge_holder(root oid, lock_key bigint) returns text
language sql set search_path = pg_catalog, pg_temp as $$
    select string_agg(format('session %s of role %s', l.pid, a.usename), ', ')
    from pg_locks l join pg_stat_activity a on a.pid = l.pid join pg_class c on c.oid = root
    where l.locktype = 'advisory' and l.granted and l.objsubid = 1 and l.pid <> pg_backend_pid()
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
      and l.classid::bigint = (lock_key >> 32) & 4294967295 and l.objid::bigint = lock_key & 4294967295
      and pg_has_role(a.usesysid, c.relowner, 'usage')
$$;

-- Drops and deletes what is past `retention` of a table, and archived. Commits between partitions and batches, so it can't be
-- called inside of a transaction, nor have a search_path of its own: every type, function and operator in it has its schema.
create or replace procedure highwater.purge(source_table regclass, retention interval)
language plpgsql as $$
declare
    root constant pg_catalog.oid := source_table;
    lock_key constant bigint := 7523094288207667311 operator(pg_catalog.#) root::bigint;
    cutoff pg_catalog.timestamptz;
    key record;
    unit record;
    finding record;
    outcome pg_catalog.text;
    tries_max integer := 5;
    places pg_catalog.tid[];
    place pg_catalog.tid;
    entry bigint;
    deleted bigint;
    reason pg_catalog.text;
    kept_by pg_catalog.text;
    is_ours boolean;
begin
    if source_table is null or retention is null or retention operator(pg_catalog.<) pg_catalog.make_interval() then
        raise exception 'highwater.purge needs a table and a retention that is not negative, not % and %', source_table, retention
            using errcode = 'invalid_parameter_value';
    end if;
    commit;
    set transaction isolation level read committed;
    is_ours := pg_catalog.pg_try_advisory_lock(lock_key);
    if not is_ours and highwater.purge_holder(root, lock_key) is not null then
        perform highwater.log_blocked(coalesce((select w.source_table from highwater.watermark w where w.table_oid operator(pg_catalog.=) root),
                root::pg_catalog.regclass::pg_catalog.text),
            null, highwater.cutoff(retention), null, null,
            'another purge of it is running: ' operator(pg_catalog.||) highwater.purge_holder(root, lock_key));
        return;
    end if;
    perform highwater.note_partitions(root);
    cutoff := highwater.cutoff(retention);
    key := highwater.purge_key(root, cutoff);
    if key.blocked_by is not null then
        perform highwater.log_blocked(key.source_table, null, cutoff, key.horizon, null, key.blocked_by);
    else
        for unit in
            select u.partition_oid, u.partition_name, u.is_whole, u.is_attached from highwater.purge_units(root) u
            where not u.is_whole or not u.is_attached or u.range_end operator(pg_catalog.<=) cutoff
            order by u.is_whole desc, u.range_end nulls last, u.partition_name
        loop
            -- Whoever holds the partitioned table keeps all of them, and each try makes others wait behind us.
            continue when unit.is_attached and unit.is_whole and outcome operator(pg_catalog.=) 'held';
            if unit.is_whole then
                outcome := 'locked';
                for try in 1..tries_max loop
                    if unit.is_attached then
                        outcome := highwater.purge_detach(root, unit.partition_oid, cutoff);
                        unit.is_attached := outcome operator(pg_catalog.<>) 'detached';
                        commit and chain;
                    end if;
                    if not unit.is_attached then
                        outcome := highwater.purge_drop(root, unit.partition_oid, cutoff);
                        commit and chain;
                    end if;
                    exit when outcome operator(pg_catalog.<>) all (array['locked', 'held']);
                    if try operator(pg_catalog.<) tries_max then
                        perform pg_catalog.pg_sleep(0.5);
                    end if;
                end loop;
                if outcome operator(pg_catalog.=) any (array['locked', 'held']) then
                    perform highwater.log_blocked(key.source_table, unit.partition_name, cutoff, key.horizon, null,
                        'kept locked by ' operator(pg_catalog.||) highwater.lockers(array[root, unit.partition_oid,
                            (select p.partdefid from pg_catalog.pg_partitioned_table p where p.partrelid operator(pg_catalog.=) root)])
                        operator(pg_catalog.||) '; a transaction that has used the table holds its lock to its end');
                    tries_max := 1;
                    commit and chain;
                end if;
                continue;
            end if;

            finding := highwater.purge_finding(root, unit.partition_oid, false, cutoff, 'proof');
            kept_by := finding.blocked_by;
            entry := null;
            places := '{}';
            if finding.deletable operator(pg_catalog.>) 0 then
                for place in execute highwater.purge_places(root, unit.partition_oid, cutoff, finding.horizon) loop
                    places := pg_catalog.array_append(places, place);
                    if pg_catalog.cardinality(places) operator(pg_catalog.>=) 5000 then
                        select r.entry, r.deleted, r.reason into entry, deleted, reason
                        from highwater.purge_rows(root, unit.partition_oid, cutoff, places, entry) r;
                        kept_by := coalesce(kept_by, reason);
                        places := '{}';
                        commit and chain;
                    end if;
                end loop;
                if pg_catalog.cardinality(places) operator(pg_catalog.>) 0 then
                    select r.entry, r.deleted, r.reason into entry, deleted, reason
                    from highwater.purge_rows(root, unit.partition_oid, cutoff, places, entry) r;
                    kept_by := coalesce(kept_by, reason);
                    commit and chain;
                end if;
            end if;
            if kept_by is not null then
                perform highwater.log_blocked(key.source_table, unit.partition_name, cutoff, finding.horizon,
                    finding.row_count operator(pg_catalog.-) finding.deletable, kept_by);
                commit and chain;
            end if;
        end loop;
    end if;
    update highwater.retention r set purged_at = pg_catalog.clock_timestamp() where r.source_table operator(pg_catalog.=) key.source_table;
    if is_ours then
        perform pg_catalog.pg_advisory_unlock(lock_key);
    end if;
end
$$;

-- Purges every table of highwater.retention. This is what pg_cron calls.
create or replace procedure highwater.purge_all()
language plpgsql as $$
declare
    goal record;
begin
    commit;
    set transaction isolation level read committed;
    for goal in
        select r.source_table, c.oid::pg_catalog.regclass as relation, r.retention
        from highwater.retention r join highwater.watermark w on w.source_table operator(pg_catalog.=) r.source_table
        left join pg_catalog.pg_class c on c.oid operator(pg_catalog.=) w.table_oid
        order by r.source_table
    loop
        if goal.relation is null then
            perform highwater.log_blocked(goal.source_table, null, highwater.cutoff(goal.retention), null, null,
                'the table is gone, or another one has its name now: `highwater setup` has that archived');
            commit and chain;
        else
            call highwater.purge(goal.relation, goal.retention);
        end if;
    end loop;
end
$$;
