-- Tables whose rows are of another column's time than created_at.

alter table highwater.watermark add column time_column name not null default 'created_at';

comment on column highwater.watermark.time_column is
    'The column of the table that says when a row is of: its files are ranged by it, and the purge goes by it.';

-- The column that the rows of a table (oid of the partitioned table, or of a plain one) are ranged by.
create function highwater.time_column(root oid) returns name
language sql stable set search_path = pg_catalog, pg_temp as $$
    select coalesce((select w.time_column from highwater.watermark w where w.table_oid = root), 'created_at')
$$;

-- The columns of an archived table that keep its rows out of the archive, so that only the quarantine holds them: a type is told by
-- its binary form, which a domain has from its base.
create or replace function highwater.unfit_columns(root oid) returns table (column_name text, problem text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
    with found as (
        select a.attname::text as name, format_type(a.atttypid, a.atttypmod) as type, s.prosrc as form, a.attgenerated <> '' as is_generated
        from pg_attribute a join pg_type t on t.oid = a.atttypid
        left join pg_proc s on s.oid = t.typsend and s.prolang = (select l.oid from pg_language l where l.lanname = 'internal')
        where a.attrelid = root and a.attnum > 0 and not a.attisdropped),
    shape as (
        select w.kind, w.time_column::text as time_column, w.kind in ('custom', 'psi', 'spc') as is_drift,
               not array['space', 'name', 'version'] <@ array_agg(f.name) and 'entity_id' = any (array_agg(f.name)) as is_by_id
        from highwater.watermark w, found f where w.table_oid = root group by w.kind, w.time_column),
    needed as (
        select n.name, n.fit_type from shape,
             (values ('custom', 'metric', 'text'), ('custom', 'value', 'double precision'),
                     ('psi', 'feature', 'text'), ('psi', 'bin_id', 'integer'), ('psi', 'bin_count', 'integer'),
                     ('spc', 'feature', 'text'), ('spc', 'value', 'double precision')) as n (kind, name, fit_type)
        where n.kind = shape.kind
        union all select time_column, 'timestamptz' from shape
        union all select 'entity_id', 'integer' from shape where is_by_id and is_drift
        union all select n.name, 'text' from shape, (values ('space'), ('name'), ('version')) as n (name) where is_drift and not is_by_id),
    fitting (fit_type, forms) as (
        values ('timestamptz', array['timestamptz_send', 'timestamp_send']),
               ('text', array['textsend', 'varcharsend', 'bpcharsend', 'namesend', 'enum_send']),
               ('integer', array['int2send', 'int4send', 'int8send']),
               ('double precision', array['float4send', 'float8send']))
    select n.name, case when f.name is null then 'is missing' when f.is_generated then 'is a generated column, which is not in the log'
                        else 'is of type ' || f.type end,
           format(case when f.name is null then 'alter table %s add column %I %s'
                       when f.is_generated then 'alter table %s alter column %I drop expression'
                       else 'alter table %s alter column %I type %s' end, root::regclass, n.name, n.fit_type)
    from needed n join fitting t using (fit_type) left join found f on f.name = n.name
    where f.name is null or f.is_generated or not coalesce(f.form = any (t.forms), false)
    order by n.name
$$;

-- Whether rows of a table (oid of the partitioned table, or of a plain one) may be deleted at all: the transaction below which
-- they are archived, or why not. `cutoff` as a literal of the type of its time column, which without a time zone is UTC.
create or replace function highwater.purge_key(
    root oid, cutoff timestamptz,
    out source_table text, out horizon bigint, out reported_at timestamptz, out cutoff_literal text, out blocked_by text)
language plpgsql set search_path = pg_catalog, pg_temp set timezone = 'UTC' set datestyle = 'ISO' as $$
declare
    watermark highwater.watermark;
    system text := (select s.system_identifier from pg_control_system() s);
    newest bigint := pg_snapshot_xmax(pg_current_snapshot())::text::bigint;
    unseen text := highwater.unseen(root);
    reporter text;
    unfit record;
    time_type regtype := (select a.atttypid from pg_attribute a
                           where a.attrelid = root and a.attname = highwater.time_column(root) and not a.attisdropped);
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
    reporter := case
        when exists (select from highwater.archive_log l where l.kind = watermark.kind)
            then format('the sidecar last reported %s', highwater.ago(reported_at))
        else 'no sidecar has archived it yet: start `highwater run`' end;
    select u.* into unfit from highwater.unfit_columns(root) u
    where not exists (select from highwater.retention r where r.source_table = watermark.source_table and r.accepts_quarantine)
    limit 1;
    blocked_by := case
        when watermark.system_identifier <> system then format(
            'it was archived from system %s, and this server is system %s: restored, upgraded or copied (`highwater run --accept-new-system` once)',
            watermark.system_identifier, system)
        when watermark.state = 'gap' then format(
            'its state is gap: the archive may lack rows until the sidecar has compared them; %s', reporter)
        when watermark.state <> 'streaming' then format(
            'its state is %s: its older rows are not archived yet; %s', watermark.state, reporter)
        when horizon is null then format('archived_before is not known yet; %s', reporter)
        when horizon > newest then format(
            'archived_before is %s, and the server has given out transactions up to %s only: its ids were reset (`highwater resync`)',
            horizon, newest)
        when unseen is not null then unseen
        when cutoff_literal is null then
            format('%I is of type %s; timestamptz or timestamp is needed', highwater.time_column(root), coalesce(time_type::text, 'no known type'))
        when unfit.column_name is not null then format(
            'column %s %s, so only the quarantine holds its rows: %s has them archived, or update highwater.retention set accepts_quarantine = true where source_table = %L lets them be deleted',
            unfit.column_name, unfit.problem, unfit.remedy, source_table)
    end;
end
$$;

-- What the rows of a table are in: partitions that are dropped as a whole (a range of the time column that ends, and those that
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
            where p.partrelid = i.inhparent and p.partstrat = 'r' and a.attname = highwater.time_column(root)
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
    time_column name := highwater.time_column(root);
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
        scan := format('select from %s where tableoid = %s and %I < %s', place, unit, time_column, key.cutoff_literal);
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
        scan := scan || format(' and t.%I < %s', time_column, key.cutoff_literal);
    end if;
    execute format('select count(*), count(*) - count(t.%1$I), max(t.%1$I), max(highwater.widened(xmin, newest))', time_column) || scan
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

-- The places of rows that a purge may delete, as a query.
create or replace function highwater.purge_places(root oid, unit oid, cutoff timestamptz, horizon bigint) returns text
language sql set search_path = pg_catalog, pg_temp as $$
    select format('select ctid from only %s, (select highwater.newest_xid() as newest offset 0) as ids
                   where %I < %s and highwater.widened(xmin, newest) < %s', unit::regclass, highwater.time_column(root), k.cutoff_literal, horizon)
    from highwater.purge_key(root, cutoff) k
$$;
