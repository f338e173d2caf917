-- Anybody may write into a Delta table. Whoever takes rows out of the archive again, or its files, must be noticed before a
-- purge relies on them: the sidecar looks at the logs and the files all the time, and a purge wants such a look.

create table highwater.archive_log (
    kind            text primary key,
    version         bigint not null,
    looked_at       timestamptz not null,
    purge_trust     interval not null,
    removal_version bigint,
    removal_at      timestamptz,
    removal_note    text
);

comment on table highwater.archive_log is
    'One row per Delta table of the archive: how far its log was looked at for entries of others. Written by the highwater sidecar only.';
comment on column highwater.archive_log.version is
    'Every entry of the log up to this version was looked at; what others have taken away by them is on record.';
comment on column highwater.archive_log.looked_at is
    'When the log was last read to its end, and every file that it names was there.';
comment on column highwater.archive_log.purge_trust is
    'HIGHWATER_PURGE_TRUST: a purge relies on a look that is not older.';
comment on column highwater.archive_log.removal_note is
    'The last time that somebody has taken archived rows out of the table, and how to go back.';

alter table highwater.covered_partition add column lacks_reason text;

comment on column highwater.covered_partition.lacks_since is
    'When rows of it were found that the archive lacks, or may lack. None of its rows is deleted until all of them were found.';
comment on column highwater.covered_partition.lacks_reason is
    'What was noticed; null if `highwater verify` has compared them.';

-- Why the archive's logs can't be relied on without looking at them again; null if they can. Of a table, and of the
-- quarantine, which may have rows of it.
create function highwater.unseen(root oid) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
    select case
        when l.kind is null then format(
            'the log of the archive''s table %s was not looked at yet, so somebody may have taken rows out of it: `highwater run` looks', k.kind)
        else format(
            'the log of the archive''s table %s was last looked at %s, so somebody may have taken rows out of it since: `highwater run` looks (HIGHWATER_PURGE_TRUST is %s)',
            k.kind, highwater.ago(l.looked_at), l.purge_trust) end
    from highwater.watermark w, unnest(array[w.kind, 'quarantine']) with ordinality as k (kind, place)
    left join highwater.archive_log l on l.kind = k.kind
    where w.table_oid = root and (l.kind is null or l.looked_at < clock_timestamp() - l.purge_trust)
    order by k.place limit 1
$$;

-- Takes back what verifications have said of some partitions, and says why they may lack rows (if `reason` is not null). Each
-- statement sees what was recorded until the first one had its lock, for which the recording of a verification waits, or which
-- waits for that.
create function highwater.void_partitions(table_name text, partitions oid[], reason text, held bigint) returns void
language plpgsql set search_path = pg_catalog, pg_temp as $$
begin
    update highwater.watermark w set gap_count = w.gap_count + 1, row_count = least(w.row_count, coalesce(held, w.row_count))
    where w.source_table = table_name;
    update highwater.covered_partition p set lacks_since = coalesce(p.lacks_since, clock_timestamp()), lacks_reason = reason
    where p.source_table = table_name and p.partition_oid = any (partitions) and reason is not null;
    delete from highwater.verified_partition v where v.source_table = table_name and v.partition_oid = any (partitions);
end
$$;

-- Why a partition can't be dropped because of rows of other tables that refer to it by a foreign key; null if none do.
create function highwater.referrers(unit oid) returns text
language plpgsql stable set search_path = pg_catalog, pg_temp set row_security = off as $$
declare
    key record;
    is_referred boolean;
begin
    for key in
        select coalesce((select p.conname from pg_constraint p where p.oid = c.conparentid), c.conname) as conname, c.conrelid, c.conparentid,
               (select string_agg(format('f.%I = u.%I', f.attname, u.attname), ' and ')
                from unnest(c.conkey, c.confkey) as k (own, other)
                join pg_attribute f on f.attrelid = c.conrelid and f.attnum = k.own
                join pg_attribute u on u.attrelid = c.confrelid and u.attnum = k.other) as same
        from pg_constraint c join pg_class t on t.oid = c.conrelid
        where c.contype = 'f' and c.confrelid = unit and not t.relispartition
        order by 1
    loop
        -- One that names the partition itself, and not a table above it, would have to be dropped first, whatever the rows.
        if key.conparentid = 0 then
            return format('foreign key %I of table %s depends on it, and would have to be dropped first', key.conname, key.conrelid::regclass);
        end if;
        if not has_table_privilege(key.conrelid, 'select') then
            return format('rows of %s may refer to it (foreign key %I), and role %s may not read them', key.conrelid::regclass, key.conname, current_user);
        end if;
        execute format('select exists (select from %s f join only %s u on %s)', key.conrelid::regclass, unit::regclass, key.same)
        into is_referred;
        if is_referred then
            return format('rows of %s refer to it (foreign key %I): delete those first', key.conrelid::regclass, key.conname);
        end if;
    end loop;
    return null;
end
$$;

-- Whether rows of a table (oid of the partitioned table, or of a plain one) may be deleted at all: the transaction below which
-- they are archived, or why not. `cutoff` as a literal of the type of its created_at, which without a time zone is UTC.
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
            format('created_at is of type %s; timestamptz or timestamp is needed', coalesce(time_type::text, 'no known type'))
        when unfit.column_name is not null then format(
            'column %s %s, so only the quarantine holds its rows: %s has them archived, or update highwater.retention set accepts_quarantine = true where source_table = %L lets them be deleted',
            unfit.column_name, unfit.problem, unfit.remedy, source_table)
    end;
end
$$;

-- What there is to delete of one of these tables, and what stands in the way. `depth`: 'quick' counts nothing, 'proof' counts if
-- nothing else stands in the way, 'full' always. Under a lock that keeps writers out, `is_proven` says that all of it may go.
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

