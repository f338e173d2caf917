-- Deletion that cannot lose data. `call highwater.purge_all()` drops partitions and deletes rows that are past their
-- retention, as far as the archive provably holds them, and logs what it did and what stood in the way. It decides in the
-- transaction that deletes, and relies on nothing that was looked at before.
--
-- A row is archived if its transaction is below `highwater.watermark.archived_before`. A partition is dropped only if its
-- rows were also read back from the archive (`highwater.verified_partition`), and are all below that horizon, too.

create table highwater.retention (
    source_table text primary key references highwater.watermark on delete cascade,
    retention    interval not null check (retention >= interval '0'),
    purged_at    timestamptz
);

comment on table highwater.retention is
    'How long Postgres keeps the rows of a table, for highwater.purge_all(). Made by `highwater setup` from DATA_RETENTION_PERIOD; change it here.';
comment on column highwater.retention.purged_at is 'When a purge of the table last ran to its end.';

create table highwater.purge_log (
    id             bigint generated always as identity primary key,
    at             timestamptz not null default clock_timestamp(),
    last_at        timestamptz not null default clock_timestamp(),
    times          bigint not null default 1,
    source_table   text not null,
    partition_name text,
    action         text not null check (action in ('dropped', 'deleted', 'blocked')),
    row_count      bigint,
    byte_count     bigint,
    cutoff         timestamptz not null,
    horizon        xid8,
    reason         text,
    role_name      text not null default current_user
);
create index on highwater.purge_log (source_table, partition_name, id);

comment on table highwater.purge_log is
    'What the purge dropped and deleted, and what stood in its way. Written in the transaction that deletes.';
comment on column highwater.purge_log.partition_name is 'Null if all of the table is blocked.';
comment on column highwater.purge_log.times is
    'How many purges in a row were blocked like this; last_at is the last one. reason is that of the last.';
comment on column highwater.purge_log.cutoff is 'Rows with an earlier created_at are past their retention.';
comment on column highwater.purge_log.horizon is 'Every row that was deleted is of an earlier transaction.';

-- How a table is a part of the drift table now: the file that it is in, and the transactions that attached it and what it
-- is in (xmin of pg_inherits), up to the root; null if the table is gone. Rows that came while this was another did not
-- pass the stream. A detach that is pending (`concurrently`) has done its work as far as the stream is concerned.
create function highwater.attachment(partition oid) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
    with recursive up as (
        select i.inhparent, i.xmin::text || case when i.inhdetachpending then '-' else '' end as path from pg_inherits i join pg_class c on c.oid = i.inhrelid
        where i.inhrelid = partition and c.relispartition
        union all
        select i.inhparent, up.path || '/' || i.xmin::text || case when i.inhdetachpending then '-' else '' end
        from up join pg_inherits i on i.inhrelid = up.inhparent join pg_class c on c.oid = i.inhrelid where c.relispartition)
    select c.relpersistence::text || c.relfilenode::text || ':' || coalesce((select path from up order by length(path) desc limit 1), '')
    from pg_class c where c.oid = partition
$$;

-- Views, and functions, that keep a table from being dropped, for people; null if there are none.
create function highwater.dependents(relation oid) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
    select string_agg(distinct pg_describe_object(d.classid, d.objid, 0), ', ')
    from pg_depend d left join pg_rewrite r on d.classid = 'pg_rewrite'::regclass and r.oid = d.objid
    where d.refclassid = 'pg_class'::regclass and d.refobjid = relation and d.deptype = 'n'
      and (r.ev_class <> relation or d.classid = 'pg_proc'::regclass)
$$;

-- Whether a table is the drift table itself, or a partition of it at any depth.
create function highwater.is_part(partition oid, root oid) returns boolean
language sql stable set search_path = pg_catalog, pg_temp as $$
    with recursive up as (
        select partition as oid
        union all
        select i.inhparent from up join pg_inherits i on i.inhrelid = up.oid join pg_class c on c.oid = up.oid
        where c.relispartition and not i.inhdetachpending)
    select exists (select from up where up.oid = root)
$$;

-- Whether the table was a part of it all the time since its rows were looked at.
alter table highwater.covered_partition add column attachment text, add column detached_at timestamptz, add column lacks_since timestamptz;

update highwater.covered_partition p set attachment = highwater.attachment(p.partition_oid);

comment on column highwater.covered_partition.attachment is
    'highwater.attachment() when its rows were looked at. Another one means that rows may have come that did not pass the stream.';
comment on column highwater.covered_partition.detached_at is
    'When it was found to be detached. What is written to it since then is not archived.';
comment on column highwater.covered_partition.lacks_since is
    'When `highwater verify` found rows of it that the archive lacks. None of its rows is deleted until all of them were found.';

-- The greatest id that a row may have whose xmin, of 32 bits, is this one, if no id past `newest` was given out. A row keeps
-- its xmin when it is frozen, so one that has been there for more than 2^32 transactions seems younger than it is, and
-- nothing seems older.
create function highwater.widened(row_xmin xid, newest bigint) returns bigint
language sql immutable parallel safe as $$
    select case when (newest - row_xmin::text::bigint) & 4294967295 > newest then newest
                else newest - ((newest - row_xmin::text::bigint) & 4294967295) end
$$;

-- Rows before this time are past their retention; never in the future, and never out of range.
create function highwater.cutoff(retention interval) returns timestamptz
language plpgsql stable set search_path = pg_catalog, pg_temp as $$
begin
    return least(now() - retention, now());
exception when datetime_field_overflow then
    return '-infinity';
end
$$;

-- An id that no row passes that the calling statement can see.
create function highwater.newest_xid() returns bigint
language sql stable as $$
    select pg_snapshot_xmax(pg_current_snapshot())::text::bigint - 1
$$;

-- What a table takes on disk; null if it is gone, or others keep it locked.
create function highwater.disk_size(relation oid) returns bigint
language plpgsql set search_path = pg_catalog, pg_temp set lock_timeout = '200ms' as $$
begin
    return pg_total_relation_size(relation);
exception when lock_not_available then
    return null;
end
$$;

create function highwater.ago(at timestamptz) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
    select case when seconds < 120 then greatest(seconds, 0) || ' s'
                when seconds < 7200 then seconds / 60 || ' min'
                when seconds < 172800 then seconds / 3600 || ' h'
                else seconds / 86400 || ' days' end || ' ago'
    from (select extract(epoch from clock_timestamp() - at)::bigint as seconds) as passed
$$;

create function highwater.rows(count bigint) returns text
language sql immutable as $$
    select count || case when count = 1 then ' row' else ' rows' end
$$;

-- Whether rows of a table (oid of the partitioned table, or of a plain one) may be deleted at all: the transaction below which
-- they are archived, or why not. `cutoff` as a literal of the type of its created_at, which without a time zone is UTC.
create function highwater.purge_key(
    root oid, cutoff timestamptz,
    out source_table text, out horizon bigint, out reported_at timestamptz, out cutoff_literal text, out blocked_by text)
language plpgsql set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' as $$
declare
    watermark highwater.watermark;
    system text := (select s.system_identifier from pg_control_system() s);
    newest bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
    time_type regtype := (select a.atttypid from pg_attribute a
                           where a.attrelid = root and a.attname = 'created_at' and not a.attisdropped);
begin
    source_table := coalesce(root::regclass::text, root::text);
    select * into watermark from highwater.watermark w where w.table_oid = root;
    if not found then
        blocked_by := format('%s is not archived: it has no row in highwater.watermark (`highwater setup` makes it for drift tables)', source_table);
        return;
    end if;
    source_table := watermark.source_table;
    if not exists (select from pg_class c where c.oid = root) then
        blocked_by := 'the table is gone, or another one has its name now: `highwater setup` has that archived';
        return;
    end if;
    horizon := watermark.archived_before::text::bigint;
    reported_at := watermark.updated_at;
    cutoff_literal := case time_type when 'timestamptz'::regtype then quote_literal(cutoff) || '::timestamptz'
                                     when 'timestamp'::regtype then quote_literal(cutoff at time zone 'UTC') || '::timestamp' end;
    blocked_by := case
        when watermark.system_identifier <> system then format(
            'it was archived from system %s, and this server is system %s: restored, upgraded or copied (`highwater run --accept-new-system` once)',
            watermark.system_identifier, system)
        when watermark.state = 'gap' then format(
            'its state is gap: the archive may lack rows until the sidecar, which last reported %s, has compared them',
            highwater.ago(reported_at))
        when watermark.state <> 'streaming' then format(
            'its state is %s: its older rows are not archived yet; the sidecar last reported %s',
            watermark.state, highwater.ago(reported_at))
        when horizon is null then format(
            'archived_before is not known yet; the sidecar last reported %s', highwater.ago(reported_at))
        when horizon > newest then format(
            'archived_before is %s, and the server has given out transactions up to %s only: its ids were reset (`highwater resync`)',
            horizon, newest)
        when cutoff_literal is null then
            format('created_at is of type %s; timestamptz or timestamp is needed', coalesce(time_type::text, 'no known type'))
    end;
end
$$;

-- What the rows of a table are in: partitions that are dropped as a whole (a range of created_at that ends, and those that
-- were detached and kept), and tables whose rows are deleted (a plain one, a default partition, and everything else).
create function highwater.purge_units(root oid)
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
$$;

-- What there is to delete of one of these tables, and what stands in the way. `depth`: 'quick' counts nothing, 'proof' counts if
-- nothing else stands in the way, 'full' always. Under a lock that keeps writers out, `is_proven` says that all of it may go.
create function highwater.purge_finding(
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
        when is_whole and not pg_has_role(class.relowner, 'usage') then format(
            'role %s does not own it and so can''t drop it; its owner is %s', current_user, pg_get_userbyid(class.relowner))
        when is_whole and class.relispartition and not (select pg_has_role(c.relowner, 'usage') from pg_class c where c.oid = root) then format(
            'role %s does not own %s and so can''t detach it', current_user, root::regclass)
        when not (has_schema_privilege(class.relnamespace, 'usage') and has_table_privilege(unit, 'select')
                  and (is_whole or has_table_privilege(unit, 'delete'))) then format(
            'role %s may not read it, or delete from it: grant usage on schema %s to %1$I; grant select, delete on %3$s to %1$I',
            current_user, class.relnamespace::regnamespace, unit::regclass)
        when row_security_active(unit) then format(
            'a row-level security policy may hide rows of it from role %s: purge as a role that no policy is for (its owner, or one with bypassrls)',
            current_user)
        when class.relpersistence <> 'p' then format(
            'it is unlogged, so its rows are in no log and not archived: alter table %s set logged', unit::regclass)
        when covered.partition_oid is null
            or (highwater.is_part(unit, root)
                and (covered.detached_at is not null or covered.attachment is distinct from highwater.attachment(unit))) then format(
            'it was attached with rows in it, rewritten, or away for a while, and the sidecar, which last reported %s, has not compared it yet',
            highwater.ago(key.reported_at))
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
    if key.cutoff_literal is null or not has_table_privilege(unit, 'select') or row_security_active(unit) then
        return;
    end if;
    if depth = 'quick' and is_whole then
        row_count := greatest(class.reltuples, 0)::bigint;
    elsif depth = 'quick' then
        scan := format('select from only %s where created_at < %s', unit::regclass, key.cutoff_literal);
        execute format('select exists (%s)', scan) into has_any;
        execute 'explain (format json) ' || scan into plan;
        row_count := case when has_any then (plan -> 0 -> 'Plan' ->> 'Plan Rows')::bigint else 0 end;
    end if;
    if depth = 'quick' or (depth = 'proof' and blocked_by is not null) then
        deletable := case when blocked_by is null then row_count else 0 end;
        return;
    end if;

    -- One statement, and so one snapshot, for the rows and for the ids that they may have.
    scan := format(' from only %s, (select highwater.newest_xid() as newest offset 0) as ids', unit::regclass);
    if not is_whole then
        scan := scan || format(' where created_at < %s', key.cutoff_literal);
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
            blocked_by := format('%s came after its rows were read back from the archive (transaction %s or later; verified up to %s): it is verified again',
                highwater.rows(young), first_young, verified);
        else
            blocked_by := format('%s of transaction %s or later are not archived yet; archived_before is %s; the sidecar last reported %s',
                highwater.rows(young), first_young, key.horizon, highwater.ago(key.reported_at));
        end if;
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

-- What is past retention, what of it can be deleted now, and what blocks the rest; a row for each partition that has any.
-- Without a table: all; without a retention: that of highwater.retention. Without `count_rows` quickly, by estimates.
create function highwater.explain_purge(
    source_table regclass default null, retention interval default null, count_rows boolean default true)
returns table (table_name text, partition_name text, action text, row_count bigint, deletable bigint, byte_count bigint, blocked_by text)
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    goal record;
    unit record;
    key record;
    finding record;
    kept interval;
begin
    for goal in
        select w.source_table, w.table_oid, r.retention from highwater.watermark w left join highwater.retention r using (source_table)
        where explain_purge.source_table is null or w.table_oid = explain_purge.source_table
        union all
        select t.source_table::text, t.source_table, null from (select explain_purge.source_table) t
        where t.source_table is not null and not exists (select from highwater.watermark w where w.table_oid = t.source_table)
        order by 1
    loop
        table_name := goal.source_table;
        kept := coalesce(explain_purge.retention, goal.retention);
        key := highwater.purge_key(goal.table_oid, highwater.cutoff(kept));
        if kept is null then
            key.blocked_by := coalesce(key.blocked_by, 'no retention is set in highwater.retention');
        end if;
        if key.blocked_by is not null and (kept is null or key.cutoff_literal is null) then
            select null, null, null, 0, null, key.blocked_by
            into partition_name, action, row_count, deletable, byte_count, blocked_by;
            return next;
            continue;
        end if;
        for unit in
            select * from highwater.purge_units(goal.table_oid) u
            where not u.is_whole or not u.is_attached or u.range_end <= highwater.cutoff(kept)
            order by u.is_whole desc, u.range_end nulls last, u.partition_name
        loop
            finding := highwater.purge_finding(
                goal.table_oid, unit.partition_oid, unit.is_whole, highwater.cutoff(kept), case when count_rows then 'full' else 'quick' end);
            continue when not unit.is_whole and finding.row_count = 0;
            select unit.partition_name, case when unit.is_whole then 'drop' else 'delete' end, finding.row_count,
                   finding.deletable, case when unit.is_whole then highwater.disk_size(unit.partition_oid) end, finding.blocked_by
            into partition_name, action, row_count, deletable, byte_count, blocked_by;
            return next;
        end loop;
        for unit in
            select c.oid, c.oid::regclass::text as name, greatest(c.reltuples, 0)::bigint as row_count
            from pg_class c join pg_class t on t.oid = goal.table_oid
            where c.relkind = 'r' and not c.relispartition and c.oid <> t.oid
              and not exists (
                select a.attname from pg_attribute a where a.attrelid = t.oid and a.attnum > 0 and not a.attisdropped
                except select a.attname from pg_attribute a where a.attrelid = c.oid and not a.attisdropped)
              and starts_with(c.relname, t.relname || '_p') and substr(c.relname, length(t.relname) + 3) ~ '^\d[\d_]*(w\d+)?$'
              and not exists (select from highwater.covered_partition p where p.partition_oid = c.oid)
              and not exists (select from highwater.watermark w where w.table_oid = c.oid)
        loop
            select unit.name, null, unit.row_count, 0, highwater.disk_size(unit.oid)
            into partition_name, action, row_count, deletable, byte_count;
            blocked_by := format(
                'it seems to be a partition that was detached and kept before the sidecar knew it, so its rows are not archived: attach it again (alter table %s attach partition %s ...), or drop it by hand',
                goal.table_oid::regclass, unit.name);
            return next;
        end loop;
    end loop;
end
$$;

-- Logs what stands in the way: once, as long as it is the last that is known of a partition.
create function highwater.log_blocked(
    table_name text, partition text, cutoff timestamptz, horizon bigint, row_count bigint, reason text) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    update highwater.purge_log l
    set last_at = clock_timestamp(), times = l.times + 1, cutoff = log_blocked.cutoff, horizon = log_blocked.horizon::text::xid8,
        row_count = log_blocked.row_count, reason = log_blocked.reason, role_name = current_user
    where l.id = (select max(n.id) from highwater.purge_log n
                  where n.source_table = table_name and n.partition_name is not distinct from partition and n.action = 'blocked')
      -- Not one that a drop, or a purge without it, has ended.
      and l.last_at >= coalesce((select max(n.at) from highwater.purge_log n
                                 where n.source_table = table_name and n.partition_name = partition and n.action = 'dropped'), l.last_at)
      and l.last_at > clock_timestamp() - interval '1 day';
    if not found then
        insert into highwater.purge_log (source_table, partition_name, action, row_count, cutoff, horizon, reason)
        values (table_name, partition, 'blocked', row_count, cutoff, horizon::text::xid8, reason);
    end if;
end
$$;

-- Logs what stands in the way of a partition's drop; a verification that rows have come after is void.
create function highwater.partition_blocked(
    table_name text, unit oid, name text, cutoff timestamptz, finding record, reason text) returns text
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    if finding.is_due_again then
        delete from highwater.verified_partition v where v.partition_oid = unit;
    end if;
    perform highwater.log_blocked(table_name, name, cutoff, finding.horizon, finding.row_count, coalesce(reason, finding.blocked_by));
    return 'blocked';
end
$$;

-- Who keeps others from locking these tables, for people.
create function highwater.lockers(tables oid[]) returns text
language sql set search_path = pg_catalog, pg_temp as $$
    select coalesce(string_agg(distinct coalesce('session ' || l.pid, 'a prepared transaction (see pg_prepared_xacts)'), ', '), 'nobody any more')
    from pg_locks l
    where l.locktype = 'relation' and l.relation = any (tables) and l.granted and l.pid is distinct from pg_backend_pid()
      and l.database = (select d.oid from pg_database d where d.datname = current_database())
$$;

-- The first step of a drop: detaches a partition, if all of it is past retention, archived and verified as far as can be seen
-- without a lock. 'detached', 'blocked', 'locked', or 'held' if it is the partitioned table that is locked. Late rows go to the default partition from then on.
--
-- The partitioned table is locked for this moment, and we hold nothing while we wait for that, so that nobody waits for us in a
-- circle. Whoever waits for a lock keeps others waiting behind it: we give up soon, and wait for nothing else (a detach locks
-- the default partition, too).
create function highwater.purge_detach(root oid, unit oid, cutoff timestamptz) returns text
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    source_table text := (select w.source_table from highwater.watermark w where w.table_oid = root);
    name text := unit::regclass::text;
    other oid;
    finding record;
    detail text;
begin
    finding := highwater.purge_finding(root, unit, true, cutoff, 'proof');
    if not finding.is_proven then
        return highwater.partition_blocked(source_table, unit, name, cutoff, finding, finding.blocked_by);
    end if;
    begin
        perform set_config('lock_timeout', '200ms', true);
        execute format('lock table only %s in access exclusive mode', root::regclass);
    exception when lock_not_available then
        return 'held';
    end;
    begin
        -- Who has these, and is not in our way above, does not use them through the partitioned table.
        foreach other in array array[unit] || (
            select array_agg(p.partdefid) from pg_partitioned_table p
            where p.partrelid = root and p.partdefid <> 0 and has_table_privilege(p.partdefid, 'update, delete, truncate')) loop
            execute format('lock table only %s in access exclusive mode nowait', other::regclass);
        end loop;
        if to_regclass(name) is distinct from unit::regclass
            or not exists (select from highwater.purge_units(root) u where u.partition_oid = unit and u.is_whole and u.range_end <= cutoff) then
            raise exception 'it is no longer a partition that is past retention';
        end if;
        execute format('alter table %s detach partition %s', root::regclass, name);
        return 'detached';
    exception
        when lock_not_available then
            return 'locked';
        when others then
            get stacked diagnostics detail = pg_exception_detail;
            return highwater.partition_blocked(source_table, unit, name, cutoff, finding,
                format('%s (SQLSTATE %s)', concat_ws('; ', sqlerrm, nullif(detail, '')), sqlstate));
    end;
end
$$;

-- Drops a detached partition, if everything in it is past retention, archived, and verified. 'dropped', 'blocked', or 'locked'.
create function highwater.purge_drop(root oid, unit oid, cutoff timestamptz) returns text
language plpgsql set search_path = pg_catalog, pg_temp as $$
declare
    source_table text := (select w.source_table from highwater.watermark w where w.table_oid = root);
    name text := unit::regclass::text;
    byte_count bigint;
    finding record;
    detail text;
begin
    -- With an older snapshot, rows that were committed before our lock would not be seen.
    if current_setting('transaction_isolation') <> 'read committed' then
        raise exception 'highwater.purge_drop needs isolation level read committed, not %', current_setting('transaction_isolation');
    end if;
    begin
        perform set_config('lock_timeout', '200ms', true);
        execute format('lock table only %s in access exclusive mode', name);
        if to_regclass(name) is distinct from unit::regclass
            or not exists (select from highwater.purge_units(root) u where u.partition_oid = unit and u.is_whole and not u.is_attached) then
            raise exception 'it was renamed, or attached, meanwhile';
        end if;
        finding := highwater.purge_finding(root, unit, true, cutoff, 'proof');
        if finding.is_proven then
            byte_count := pg_total_relation_size(unit);
            execute format('drop table %s', name);
            if exists (select from pg_class c where c.oid = unit) then
                raise exception 'another table was dropped in its place, which is undone';
            end if;
            delete from highwater.verified_partition v where v.partition_oid = unit;
            delete from highwater.covered_partition p where p.partition_oid = unit;
            insert into highwater.purge_log (source_table, partition_name, action, row_count, byte_count, cutoff, horizon)
            values (source_table, name, 'dropped', finding.row_count, byte_count, cutoff, finding.horizon::text::xid8);
            return 'dropped';
        end if;
    exception
        when lock_not_available then
            return 'locked';
        when others then
            get stacked diagnostics detail = pg_exception_detail;
            finding := highwater.purge_finding(root, unit, true, cutoff, 'quick');
            return highwater.partition_blocked(source_table, unit, name, cutoff, finding,
                format('%s (SQLSTATE %s)', concat_ws('; ', sqlerrm, nullif(detail, '')), sqlstate));
    end;
    return highwater.partition_blocked(source_table, unit, name, cutoff, finding, finding.blocked_by);
end
$$;

-- Deletes those of some rows (of a table that is not dropped as a whole) that are past retention and archived; how many, or
-- null and why not. They are added up in the log's entry `entry`, which is made at first.
create function highwater.purge_rows(
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
        -- A row that was changed since the statement began is judged as it is now: allow for the ids given out meanwhile.
        execute format(
            'delete from only %s where ctid = any ($1) and created_at < %s
               and highwater.widened(xmin, (select highwater.newest_xid() + 1048576)) < $2
               and exists (select from highwater.covered_partition p join pg_class c on c.oid = p.partition_oid
                           where p.source_table = $3 and p.partition_oid = $4 and p.detached_at is null and p.lacks_since is null and c.relpersistence = ''p''
                             and highwater.is_part($4, $5) and p.attachment = highwater.attachment($4))',
            unit::regclass, key.cutoff_literal)
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

-- The places of rows that a purge may delete, as a query.
create function highwater.purge_places(root oid, unit oid, cutoff timestamptz, horizon bigint) returns text
language sql set search_path = pg_catalog, pg_temp as $$
    select format('select ctid from only %s, (select highwater.newest_xid() as newest offset 0) as ids
                   where created_at < %s and highwater.widened(xmin, newest) < %s', unit::regclass, k.cutoff_literal, horizon)
    from highwater.purge_key(root, cutoff) k
$$;

-- Drops and deletes what is past `retention` of a table, and archived. Commits between partitions and batches, so it can't be
-- called inside of a transaction, nor have a search_path of its own: it calls nothing without its schema.
create procedure highwater.purge(source_table regclass, retention interval)
language plpgsql as $$
declare
    root constant oid := source_table;
    lock_key constant bigint := 7523094288207667311 # root::bigint;
    cutoff timestamptz;
    key record;
    unit record;
    finding record;
    outcome text;
    tries_max integer := 5;
    places tid[];
    place tid;
    entry bigint;
    deleted bigint;
    reason text;
    kept_by text;
begin
    if source_table is null or retention is null or retention < interval '0' then
        raise exception 'highwater.purge needs a table and a retention that is not negative, not % and %', source_table, retention
            using errcode = 'invalid_parameter_value';
    end if;
    commit;
    set transaction isolation level read committed;
    if not pg_catalog.pg_try_advisory_lock(lock_key) then
        perform highwater.log_blocked(coalesce((select w.source_table from highwater.watermark w where w.table_oid = root), root::regclass::text),
            null, highwater.cutoff(retention), null, null, 'another purge of it is running');
        return;
    end if;
    cutoff := highwater.cutoff(retention);
    key := highwater.purge_key(root, cutoff);
    if key.blocked_by is not null then
        perform highwater.log_blocked(key.source_table, null, cutoff, key.horizon, null, key.blocked_by);
    else
        for unit in
            select u.partition_oid, u.partition_name, u.is_whole, u.is_attached from highwater.purge_units(root) u
            where not u.is_whole or not u.is_attached or u.range_end <= cutoff
            order by u.is_whole desc, u.range_end nulls last, u.partition_name
        loop
            -- Whoever holds the partitioned table keeps all of them, and each try makes others wait behind us.
            continue when unit.is_attached and unit.is_whole and outcome = 'held';
            if unit.is_whole then
                outcome := 'locked';
                for try in 1..tries_max loop
                    if unit.is_attached then
                        outcome := highwater.purge_detach(root, unit.partition_oid, cutoff);
                        unit.is_attached := outcome <> 'detached';
                        commit and chain;
                    end if;
                    if not unit.is_attached then
                        outcome := highwater.purge_drop(root, unit.partition_oid, cutoff);
                        commit and chain;
                    end if;
                    exit when outcome not in ('locked', 'held');
                    if try < tries_max then
                        perform pg_catalog.pg_sleep(0.5);
                    end if;
                end loop;
                if outcome in ('locked', 'held') then
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
            if finding.deletable > 0 then
                for place in execute highwater.purge_places(root, unit.partition_oid, cutoff, finding.horizon) loop
                    places := pg_catalog.array_append(places, place);
                    if pg_catalog.cardinality(places) >= 5000 then
                        select r.entry, r.deleted, r.reason into entry, deleted, reason
                        from highwater.purge_rows(root, unit.partition_oid, cutoff, places, entry) r;
                        kept_by := coalesce(kept_by, reason);
                        places := '{}';
                        commit and chain;
                    end if;
                end loop;
                if pg_catalog.cardinality(places) > 0 then
                    select r.entry, r.deleted, r.reason into entry, deleted, reason
                    from highwater.purge_rows(root, unit.partition_oid, cutoff, places, entry) r;
                    kept_by := coalesce(kept_by, reason);
                    commit and chain;
                end if;
            end if;
            if kept_by is not null then
                perform highwater.log_blocked(key.source_table, unit.partition_name, cutoff, finding.horizon,
                    finding.row_count - finding.deletable, kept_by);
                commit and chain;
            end if;
        end loop;
    end if;
    update highwater.retention r set purged_at = pg_catalog.clock_timestamp() where r.source_table = key.source_table;
    perform pg_catalog.pg_advisory_unlock(lock_key);
end
$$;

-- Purges every table of highwater.retention. This is what pg_cron calls.
create procedure highwater.purge_all()
language plpgsql as $$
declare
    goal record;
begin
    commit;
    set transaction isolation level read committed;
    for goal in
        select r.source_table, c.oid::regclass as relation, r.retention
        from highwater.retention r join highwater.watermark w using (source_table) left join pg_catalog.pg_class c on c.oid = w.table_oid
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

comment on procedure highwater.purge(regclass, interval) is
    'Drops partitions and deletes rows that are older than the retention, as far as the archive provably holds them. See highwater.purge_log.';
comment on procedure highwater.purge_all() is
    'highwater.purge of every table in highwater.retention. To be called by pg_cron, or `highwater purge`.';
comment on function highwater.explain_purge(regclass, interval, boolean) is
    'What is past retention, what of it the purge can delete now, and what blocks the rest. Changes nothing.';
