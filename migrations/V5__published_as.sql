-- A publication that lacks a table for a moment, and has it again when the sidecar looks, has let rows pass. So each
-- watermark remembers how its table was published.

-- How a publication has a table: the transactions that last changed the publication, and that added the table or its schema
-- to it; null if there is no such publication.
create function highwater.published_as(publication text, relation oid) returns text
language sql stable set search_path = pg_catalog, pg_temp as $$
    select p.oid || ':' || p.xmin
           || coalesce('/table ' || (select r.oid || ':' || r.xmin from pg_publication_rel r where r.prpubid = p.oid and r.prrelid = relation), '')
           || coalesce('/schema ' || (select n.oid || ':' || n.xmin from pg_publication_namespace n join pg_class c on c.relnamespace = n.pnnspid
                                      where n.pnpubid = p.oid and c.oid = relation), '')
    from pg_publication p where p.pubname = publication
$$;

alter table highwater.watermark add column published_as text;

comment on column highwater.watermark.published_as is
    'highwater.published_as() when the watermark last moved. Another one means that rows may have passed the stream.';
