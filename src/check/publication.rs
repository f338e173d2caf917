//! The publication: what it publishes, and of which tables.

use tokio_postgres::{Client, Row};

use super::tables::Table;
use super::{Report, identifier, qualified};
use crate::config::{Changes, Config};
use crate::error::{Error, Result};
use crate::tables::{DRIFT_TABLES, ENTITY_TABLE, Kind};

const PUBLICATION: &str = "
    select oid, puballtables, pubinsert, pubupdate or pubdelete, pubtruncate, pubviaroot,
           pg_has_role(pubowner, 'usage')
      from pg_publication
     where pubname = $1::text";

// A null `prattrs` (no column list) gives an empty array.
const MEMBER: &str = "
    select r.oid is not null
           or exists (select from pg_publication_namespace s
                       where s.pnpubid = $1 and s.pnnspid = c.relnamespace),
           pg_get_expr(r.prqual, r.prrelid),
           array(select attname::text from pg_attribute a
                  where a.attrelid = c.oid and a.attnum = any (r.prattrs::int2[]))
      from pg_class c
      join pg_namespace n on n.oid = c.relnamespace
      left join pg_publication_rel r on r.prrelid = c.oid and r.prpubid = $1
     where n.nspname = $2::text and c.relname = $3::text";

// With the root published, the view names roots; what is not ours there is sent for nothing.
const OTHERS: &str = "
    select t.schemaname::text, t.tablename::text,
           exists (select from pg_publication_rel r
                    where r.prpubid = $1 and r.prrelid = format('%I.%I', t.schemaname, t.tablename)::regclass)
      from pg_publication_tables t join pg_publication p on p.pubname = t.pubname
     where p.oid = $1 and t.schemaname || '.' || t.tablename <> all ($2::text[])
     order by 1, 2";

const CONTEXT: &str = "reading the publication";

struct Publication {
    oid: u32,
    has_all_tables: bool,
    inserts: bool,
    changes: bool,
    truncates: bool,
    via_root: bool,
    is_owner: bool,
}

pub(super) async fn check(
    client: &Client,
    config: &Config,
    tables: &[Table],
    report: &mut Report,
) -> Result<()> {
    if config.tables.iter().any(|table| table.changes == Changes::Versions) {
        check_versions(client, &config.versions_publication(), report).await?;
    }
    let name = config.publication.as_str();
    let Some(row) = client.query_opt(PUBLICATION, &[&name]).await.map_err(Error::sql(CONTEXT))? else {
        report_missing(config, tables, report);
        return Ok(());
    };
    let publication = read(&row).map_err(Error::sql(CONTEXT))?;
    let mut is_good = report_options(&publication, name, report);
    for table in tables {
        is_good &= check_member(client, config, &publication, table, report).await?;
    }
    is_good &= report_others(client, config, &publication, tables, report).await?;
    if is_good {
        report.ok("publication", name, format!("publishes the inserts of {} tables", tables.len()));
    }
    Ok(())
}

/// The publication of the tables of which each version of a row is archived.
async fn check_versions(client: &Client, name: &str, report: &mut Report) -> Result<()> {
    let query =
        "select pubinsert and pubupdate and pubdelete, pubviaroot from pg_publication where pubname = $1";
    let Some(row) = client.query_opt(query, &[&name]).await.map_err(Error::sql(CONTEXT))? else {
        report.error("publication", name, "does not exist", "run `highwater setup`");
        return Ok(());
    };
    let quoted = identifier(name);
    if !row.try_get(0).map_err(Error::sql(CONTEXT))? {
        let message = "does not publish all inserts, updates and deletes: versions of rows are missed";
        let remedy = format!("alter publication {quoted} set (publish = 'insert, update, delete');");
        report.error("publication-options", name, message, remedy);
    } else if !row.try_get(1).map_err(Error::sql(CONTEXT))? {
        let message = "does not publish via the partition root: rows of new or dropped partitions are missed";
        let remedy = format!("alter publication {quoted} set (publish_via_partition_root = true);");
        report.error("publication-options", name, message, remedy);
    } else {
        report.ok("publication", name, "publishes inserts, updates and deletes");
    }
    Ok(())
}

fn read(row: &Row) -> Result<Publication, tokio_postgres::Error> {
    Ok(Publication {
        oid: row.try_get(0)?,
        has_all_tables: row.try_get(1)?,
        inserts: row.try_get(2)?,
        changes: row.try_get(3)?,
        truncates: row.try_get(4)?,
        via_root: row.try_get(5)?,
        is_owner: row.try_get(6)?,
    })
}

fn report_missing(config: &Config, tables: &[Table], report: &mut Report) {
    let names: Vec<_> = tables.iter().map(|table| qualified(&config.schema, &table.name)).collect();
    let create = format!(
        "create publication {} for table {} with (publish = 'insert', publish_via_partition_root = true);",
        identifier(&config.publication),
        names.join(", ")
    );
    let remedy = match (names.is_empty(), tables.iter().all(|table| table.is_owner)) {
        (true, _) => "create the drift tables first".to_owned(),
        (false, true) => format!("run `highwater setup`, or: {create}"),
        (false, false) => {
            format!(
                "{create} -- as the owner of the tables, which the role is not; then run `highwater setup`"
            )
        }
    };
    report.error("publication", &config.publication, "does not exist", remedy);
}

fn report_options(publication: &Publication, name: &str, report: &mut Report) -> bool {
    let quoted = identifier(name);
    let inserts_only = format!("alter publication {quoted} set (publish = 'insert');");
    let mut is_good = true;
    if !publication.inserts {
        report.error("publication-options", name, "does not publish inserts", inserts_only);
        is_good = false;
    } else if publication.changes {
        let message = "publishes updates or deletes, which then fail on tables without a replica identity";
        report.error("publication-options", name, message, inserts_only);
        is_good = false;
    } else if publication.truncates {
        let message = "publishes truncates, which the archive does not follow";
        report.warning("publication-options", name, message, inserts_only);
        is_good = false;
    }
    if !publication.via_root {
        let message = "does not publish via the partition root: rows of new or dropped partitions are missed";
        let remedy = format!("alter publication {quoted} set (publish_via_partition_root = true);");
        report.error("publication-options", name, message, remedy);
        is_good = false;
    }
    if publication.has_all_tables {
        let message = "is for all tables: the server decodes and sends rows that nobody archives";
        let remedy = format!("drop publication {quoted}; -- then run `highwater setup`");
        report.warning("publication-options", name, message, remedy);
        is_good = false;
    }
    is_good
}

/// Tables that are published and not archived. Where everything is published, or partitions are published one by
/// one, or there is nothing to archive at all, another finding says so.
async fn report_others(
    client: &Client,
    config: &Config,
    publication: &Publication,
    tables: &[Table],
    report: &mut Report,
) -> Result<bool> {
    if tables.is_empty() || publication.has_all_tables || !publication.via_root {
        return Ok(true);
    }
    let ours = ours(client, config).await?;
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&publication.oid, &ours];
    let rows = client.query(OTHERS, &parameters).await.map_err(Error::sql(CONTEXT))?;
    let name = identifier(&config.publication);
    for row in &rows {
        let schema: String = row.try_get(0).map_err(Error::sql(CONTEXT))?;
        let table: String = row.try_get(1).map_err(Error::sql(CONTEXT))?;
        let by_name: bool = row.try_get(2).map_err(Error::sql(CONTEXT))?;
        let object = qualified(&schema, &table);
        let remedy = match by_name {
            true => format!("alter publication {name} drop table {object};"),
            false => format!(
                "alter publication {name} drop tables in schema {}; -- then run `highwater setup`",
                identifier(&schema)
            ),
        };
        let message =
            "is in the publication, but is not archived: the server decodes and sends its rows for nothing";
        report.warning("publication-extra", object, message, remedy);
    }
    Ok(rows.is_empty())
}

/// The tables that may be in the publication, with their schemas: those of the settings, and what is archived in any case.
async fn ours(client: &Client, config: &Config) -> Result<Vec<String>> {
    let drift = DRIFT_TABLES.into_iter().chain([ENTITY_TABLE]);
    let mut names: Vec<String> = drift.map(|table| format!("{}.{table}", config.schema)).collect();
    for table in &config.tables {
        names.push(table.qualified(&config.schema));
        let lookup = table.entity.as_ref().and_then(|entity| entity.lookup.as_ref());
        names.extend(lookup.map(|lookup| lookup.qualified(&config.schema)));
    }
    let may_read = "select coalesce(has_schema_privilege(to_regnamespace('highwater'), 'usage')
                                    and has_table_privilege(to_regclass('highwater.watermark'), 'select'), false)";
    let may_read = client.query_one(may_read, &[]).await.and_then(|row| row.try_get(0));
    if may_read.map_err(Error::sql(CONTEXT))? {
        // Also by the names that they have by now.
        let query = "select source_table from highwater.watermark
                     union select n.nspname || '.' || c.relname from highwater.watermark w
                           join pg_class c on c.oid = w.table_oid join pg_namespace n on n.oid = c.relnamespace";
        let archived = client.query(query, &[]).await;
        for row in archived.map_err(Error::sql(CONTEXT))? {
            names.push(row.try_get(0).map_err(Error::sql(CONTEXT))?);
        }
    }
    Ok(names)
}

async fn check_member(
    client: &Client,
    config: &Config,
    publication: &Publication,
    table: &Table,
    report: &mut Report,
) -> Result<bool> {
    let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 3] =
        [&publication.oid, &config.schema, &table.name];
    let row = client.query_one(MEMBER, &parameters).await.map_err(Error::sql(CONTEXT))?;
    let is_member: bool = row.try_get(0).map_err(Error::sql(CONTEXT))?;
    let filter: Option<String> = row.try_get(1).map_err(Error::sql(CONTEXT))?;
    let columns: Vec<String> = row.try_get(2).map_err(Error::sql(CONTEXT))?;
    let object = qualified(&config.schema, &table.name);
    let name = identifier(&config.publication);
    if !is_member && !publication.has_all_tables {
        let who = match publication.is_owner && table.is_owner {
            true => "",
            false => " -- as the owner of both, which the role is not",
        };
        let remedy = format!("alter publication {name} add table {object};{who}");
        report.error("publication-table", object, "is not in the publication: its rows are missed", remedy);
        return Ok(false);
    }
    let again =
        format!("alter publication {name} drop table {object}; alter publication {name} add table {object};");
    let mut is_good = true;
    if let Some(filter) = filter {
        let message = format!("has a row filter, which hides rows: {filter}");
        report.error("publication-filter", &object, message, &again);
        is_good = false;
    }
    // A list that only leaves out what is not archived saves traffic and loses nothing.
    let full = format!("{}.{}", config.schema, table.name);
    let kind =
        Kind::drift().into_iter().find(|kind| kind.source_table(&config.schema).as_ref() == Some(&full));
    let is_archived = |name: &&str| kind.is_some_and(|kind| !kind.leaves_out(name));
    let all = table.columns.iter().filter(|column| !column.is_generated).map(|column| column.name.as_str());
    let wanted = table.needed.iter().copied().chain(all.filter(is_archived));
    let absent: Vec<&str> = wanted.filter(|need| !columns.iter().any(|name| name == need)).collect();
    if let ([first, ..], false) = (absent.as_slice(), columns.is_empty()) {
        report.error(
            "publication-columns",
            &object,
            format!("is published without its column {first}"),
            again,
        );
        is_good = false;
    }
    Ok(is_good)
}
