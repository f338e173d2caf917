-- What there is in schema highwater, and how it is defined: a row for each object, in an order that no locale changes.
with schema as (select oid from pg_namespace where nspname = 'highwater'),
relation as (
    select c.*, case c.relkind when 'r' then 'table' when 'v' then 'view' when 'S' then 'sequence' else 'relation of kind ' || c.relkind::text end
                || ' highwater.' || c.relname as object
    from pg_class c join schema s on c.relnamespace = s.oid where c.relkind not in ('i', 'I')),
found (object, definition) as (
    select object, concat_ws(' ', relpersistence, relrowsecurity, relforcerowsecurity, relispartition, relam <> 0, (
        select string_agg(concat_ws(' ', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, a.attidentity, a.attgenerated,
                                    pg_get_expr(d.adbin, d.adrelid)), ', ' order by a.attnum)
        from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where a.attrelid = relation.oid and a.attnum > 0 and not a.attisdropped and relation.relkind <> 'S'))
    from relation
    union all
    select 'index ' || i.indexrelid::regclass, pg_get_indexdef(i.indexrelid) from relation r join pg_index i on i.indrelid = r.oid
    union all
    -- Of type n are those of not null from version 18 on, which are a matter of the column before.
    select format('constraint %s of %s', n.conname, r.object), pg_get_constraintdef(n.oid)
    from relation r join pg_constraint n on n.conrelid = r.oid where n.contype not in ('n', 't')
    union all
    select format('foreign key %s to %s', n.conname, r.object), '' from relation r join pg_constraint n on n.confrelid = r.oid
    where not exists (select from relation o where o.oid = n.conrelid)
    union all
    select format('trigger %s of %s', t.tgname, r.object), '' from relation r join pg_trigger t on t.tgrelid = r.oid where not t.tgisinternal
    union all
    select format('rule %s of %s', w.rulename, r.object), '' from relation r join pg_rewrite w on w.ev_class = r.oid
    union all
    select format('policy %s of %s', p.polname, r.object), '' from relation r join pg_policy p on p.polrelid = r.oid
    union all
    select format('child %s of %s', i.inhrelid::regclass, r.object), '' from relation r join pg_inherits i on i.inhparent = r.oid
    union all
    select format('parent %s of %s', i.inhparent::regclass, r.object), '' from relation r join pg_inherits i on i.inhrelid = r.oid
    union all
    select format('statistics %s.%s of %s', t.stxnamespace::regnamespace, t.stxname, r.object), ''
    from relation r join pg_statistic_ext t on t.stxrelid = r.oid
    union all
    select 'routine ' || p.oid::regprocedure,
           concat_ws(' ', p.prokind, l.lanname, p.prosecdef, p.provolatile, p.proisstrict, p.proretset, p.prorettype::regtype,
                     pg_get_function_arguments(p.oid), p.proconfig, p.prosrc, p.probin)
    from pg_proc p join schema s on p.pronamespace = s.oid join pg_language l on l.oid = p.prolang
    union all
    -- Whatever else a schema can hold: types, operators, casts for them, ...
    select o.type || ' ' || o.identity, '' from schema s join pg_depend d on d.refclassid = 'pg_namespace'::regclass and d.refobjid = s.oid,
           pg_identify_object(d.classid, d.objid, d.objsubid) o
    where d.classid not in ('pg_class'::regclass, 'pg_proc'::regclass))
select object, md5(definition) from found order by object collate "C"
