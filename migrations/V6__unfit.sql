-- What can't be archived as it is: columns of other types than the archive has, and texts that can't be written in UTF-8.

-- What bytes in the database's encoding are in UTF-8; null if they can't be written in it.
create function highwater.utf8(raw bytea) returns bytea
language plpgsql immutable strict as $$
begin
    return pg_catalog.convert(raw, pg_catalog.getdatabaseencoding(), 'UTF8');
exception when character_not_in_repertoire or untranslatable_character then
    return null;
end
$$;

-- The columns of a drift table that keep its rows out of the archive, so that only the quarantine holds them: a type is told by
-- its binary form, which a domain has from its base.
create function highwater.unfit_columns(root oid) returns table (column_name text, problem text, remedy text)
language sql stable set search_path = pg_catalog, pg_temp as $$
    with found as (
        select a.attname::text as name, format_type(a.atttypid, a.atttypmod) as type, s.prosrc as form, a.attgenerated <> '' as is_generated
        from pg_attribute a join pg_type t on t.oid = a.atttypid
        left join pg_proc s on s.oid = t.typsend and s.prolang = (select l.oid from pg_language l where l.lanname = 'internal')
        where a.attrelid = root and a.attnum > 0 and not a.attisdropped),
    shape as (
        select w.kind, not array['space', 'name', 'version'] <@ array_agg(f.name) and 'entity_id' = any (array_agg(f.name)) as is_by_id
        from highwater.watermark w, found f where w.table_oid = root group by w.kind),
    needed as (
        select n.name, n.fit_type from shape,
             (values ('custom', 'metric', 'text'), ('custom', 'value', 'double precision'),
                     ('psi', 'feature', 'text'), ('psi', 'bin_id', 'integer'), ('psi', 'bin_count', 'integer'),
                     ('spc', 'feature', 'text'), ('spc', 'value', 'double precision')) as n (kind, name, fit_type)
        where n.kind = shape.kind
        union all select 'created_at', 'timestamptz' from shape
        union all select 'entity_id', 'integer' from shape where is_by_id
        union all select n.name, 'text' from shape, (values ('space'), ('name'), ('version')) as n (name) where not is_by_id),
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

alter table highwater.retention add column accepts_quarantine boolean not null default false;

comment on column highwater.retention.accepts_quarantine is
    'Whether the purge may delete rows that only the quarantine holds, because a column of the table can''t be archived (highwater.unfit_columns).';
