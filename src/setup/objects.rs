//! Whether schema `highwater` is what the migrations have made. The purge runs what is in it with the rights of the drift tables'
//! owner, so whoever could change anything there would have these rights.

use std::collections::BTreeMap;

use tokio_postgres::Client;

use crate::error::{Error, Result};
use crate::postgres::quote_literal;

/// The objects as the server has them: name, and a digest of the definition.
const QUERY: &str = include_str!("objects.sql");

/// What the migrations make. A line has the first and the last version of the schema that an object is in like that (`-`: it still
/// is), the digest, and its name. A test runs the migrations one by one, and says how this must read.
const MADE: &str = include_str!("objects.txt");

/// The parts of a query that say who has what of the schema: `object`, whose owners may change it, and `granted`, what others may do with
/// it. The schema comes first: who is given something in it must have the right to create there. Sequences of columns go with their tables.
pub(crate) const HOLDINGS: &str = "
    schema as (select * from pg_namespace where nspname = 'highwater'),
    relation as (select c.* from pg_class c join schema s on c.relnamespace = s.oid where c.relkind not in ('i', 'I', 'S')),
    object (rank, kind, name, owner) as (
        select 0, 'schema', nspname::text, nspowner from schema
        union all select 1, 'table', c.oid::regclass::text, c.relowner from relation c
        union all select 2, 'routine', p.oid::regprocedure::text, p.proowner from pg_proc p join schema s on p.pronamespace = s.oid),
    granted (kind, name, grantee, privileges) as (
        select 'table', c.oid::regclass::text, x.grantee, array_agg(distinct x.privilege_type)
        from relation c
        cross join lateral (select x.grantee, x.privilege_type from aclexplode(c.relacl) x
                            union all
                            select x.grantee, x.privilege_type from pg_attribute a, aclexplode(a.attacl) x where a.attrelid = c.oid) x
        where x.grantee <> c.relowner group by c.oid, x.grantee
        union all
        select 'schema', s.nspname::text, x.grantee, array['CREATE'] from schema s, aclexplode(s.nspacl) x
        where x.privilege_type = 'CREATE' and x.grantee <> s.nspowner)";

/// The objects that are not as the migrations up to `version` have made them, a sentence each.
///
/// # Errors
///
/// The query failed.
pub(crate) async fn differences(client: &Client, version: i64) -> Result<Vec<String>> {
    let failed = || Error::sql("comparing schema highwater with what the migrations make");
    let mut found = BTreeMap::new();
    for row in client.query(QUERY, &[]).await.map_err(failed())? {
        let (object, digest): (String, String) =
            (row.try_get(0).map_err(failed())?, row.try_get(1).map_err(failed())?);
        found.insert(object, digest);
    }
    Ok(compare(found, version))
}

fn compare(mut found: BTreeMap<String, String>, version: i64) -> Vec<String> {
    let mut differences = Vec::new();
    for (object, digest) in made(version) {
        match found.remove(object) {
            None => differences.push(format!("{object} is missing")),
            Some(other) if other != digest => differences.push(format!("{object} was changed")),
            Some(_) => {}
        }
    }
    differences.extend(found.into_keys().map(|object| format!("{object} is not of Highwater")));
    differences
}

/// Names and digests at a version.
fn made(version: i64) -> impl Iterator<Item = (&'static str, &'static str)> {
    MADE.lines().filter_map(move |line| {
        let mut words = line.splitn(4, ' ');
        let (first, last) = (words.next()?.parse::<i64>().ok()?, words.next()?);
        let (digest, object) = (words.next()?, words.next()?);
        let is_last = last.parse::<i64>().map_or(true, |last| version <= last);
        (first <= version && is_last).then_some((object, digest))
    })
}

/// A statement that fails, and names what differs, if the schema is not as the migrations up to `version` have made it: for scripts,
/// which run later than they are written.
pub(super) fn assertion(version: i64) -> String {
    let rows: Vec<String> = made(version)
        .map(|(object, digest)| format!("({}, {})", quote_literal(object), quote_literal(digest)))
        .collect();
    format!(
        "do $highwater$ declare wrong text; begin\nselect string_agg(coalesce(f.object, m.object), ', ') into wrong from (\n{QUERY}) as f \
         (object, digest)\nfull join (values {}) as m (object, digest) on m.object = f.object where m.digest is distinct from f.digest;\nif \
         wrong is not null then raise exception 'schema highwater is not as its migrations made it: %', wrong; end if;\nend \
         $highwater$;\n",
        rows.join(",\n")
    )
}

/// Names of the tables at a version, without the schema.
pub(super) fn tables(version: i64) -> impl Iterator<Item = &'static str> {
    made(version).filter_map(|(object, _)| object.strip_prefix("table highwater."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_difference_is_named() {
        let newest = 9;
        let all = || made(newest).map(|(object, digest)| (object.to_owned(), digest.to_owned())).collect();
        let mut found: BTreeMap<String, String> = all();
        assert!(found.len() > 40, "{}", found.len());
        assert_eq!(compare(found.clone(), newest), [] as [&str; 0]);
        found.remove("table highwater.retention").unwrap();
        found.insert("view highwater.retention".to_owned(), String::new());
        found.insert("routine highwater.cutoff(interval)".to_owned(), String::new());
        let expected = [
            "routine highwater.cutoff(interval) was changed",
            "table highwater.retention is missing",
            "view highwater.retention is not of Highwater",
        ];
        assert_eq!(compare(found, newest), expected);
        assert!(compare(all(), 1).len() > 10, "an earlier version had less");
    }
}
