//! What the owner of the drift tables does: schema `highwater`, which is his, the publication, and the rights of the role that archives.
//!
//! The purge runs with the owner's rights what is in the schema, so nobody else may own any of it. The role that archives gets no more
//! than the rights to read the drift tables and to write the state.

use tokio_postgres::Client;

use super::objects::HOLDINGS;
use super::{Report, SourceTable, drift_oids, migrations, objects, qualified};
use crate::error::{Error, Result};
use crate::postgres::{quote_identifier, quote_literal};
use crate::source::slot::MAY_REPLICATE;

/// What the role that archives may do with the tables of the schema; with all others it may read.
const WRITTEN: [(&str, &str); 6] = [
    ("archive_log", "select, insert, update, delete"),
    ("covered_partition", "select, insert, update, delete"),
    ("entity_watermark", "select, insert, update, delete"),
    ("verified_partition", "select, insert, update, delete"),
    // With a row its retention would go.
    ("watermark", "select, insert, update"),
    // Those of tables that are archived for the first time; to change them is the owner's business.
    ("retention", "select, insert (source_table, retention)"),
];

/// The tables that the role that archives writes as a whole, with each of its rights on them.
pub(crate) fn state_rights() -> impl Iterator<Item = (&'static str, &'static str)> {
    let whole = WRITTEN.iter().filter(|(_, rights)| !rights.contains('('));
    whole.flat_map(|(table, rights)| rights.split(", ").map(|right| (*table, right)))
}

/// Who owns what, and whether this session may do what its owner may.
#[derive(Debug)]
pub(super) struct Ownership {
    /// The session's role.
    pub(super) user: String,
    /// Whom the schema belongs to, or is to belong to: the owner of the drift tables.
    pub(super) owner: String,
    /// A drift table that the session's role has no owner's rights on, and its owner.
    lacking: Option<(String, String)>,
    /// Whose the schema is, if it is there.
    schema_owner: Option<String>,
    /// The newest migration.
    version: i64,
}

impl Ownership {
    pub(super) async fn read(client: &Client, tables: &[SourceTable]) -> Result<Self> {
        let failed = || Error::sql("reading who owns the drift tables and schema highwater");
        let query = "
            select current_user::text, pg_get_userbyid(c.relowner)::text, pg_has_role(c.relowner, 'usage'),
                   (select n.nspname from pg_namespace n where n.oid = c.relnamespace) || '.' || c.relname,
                   (select pg_get_userbyid(n.nspowner)::text from pg_namespace n where n.nspname = 'highwater'),
                   case when has_schema_privilege(to_regnamespace('highwater'), 'usage')
                        then coalesce(has_table_privilege(to_regclass('highwater.migration'), 'select'), false) else false end
            from pg_class c where c.oid = any ($1) order by c.relname";
        let rows = client.query(query, &[&drift_oids(tables)]).await.map_err(failed())?;
        let mut owners = Vec::new();
        let mut lacking = None;
        for row in &rows {
            let (owner, name): (String, String) =
                (row.try_get(1).map_err(failed())?, row.try_get(3).map_err(failed())?);
            if !row.try_get::<_, bool>(2).map_err(failed())? {
                lacking = Some((name, owner.clone()));
            }
            if !owners.contains(&owner) {
                owners.push(owner);
            }
        }
        let Some(first) = rows.first() else {
            return Err(Error::Internal("the drift tables are gone".to_owned()));
        };
        let user: String = first.try_get(0).map_err(failed())?;
        let version = if first.try_get(5).map_err(failed())? {
            let query = "select coalesce(max(version), 0)::bigint from highwater.migration";
            client.query_one(query, &[]).await.and_then(|row| row.try_get(0)).map_err(failed())?
        } else {
            0
        };
        Ok(Self {
            // Of several, one that may do what all of them may.
            owner: if let [owner] = owners.as_slice() { owner.clone() } else { user.clone() },
            schema_owner: first.try_get(4).map_err(failed())?,
            user,
            lacking,
            version,
        })
    }

    /// Whether the session's role may do what the owner may.
    pub(super) fn is_owner(&self) -> bool {
        self.lacking.is_none()
    }

    /// What somebody else has to do, because this session's role may not.
    pub(super) fn refusal(&self, what: &str) -> Error {
        let (table, owner) = self.lacking.clone().unwrap_or_default();
        Error::Setting {
            setting: "the role".to_owned(),
            value: self.user.clone(),
            accepted: format!(
                "the owner of {table} ({owner}) or a superuser, for {what}: as such a one run `highwater setup --as-owner \
                 --sidecar-role {}`, or what `highwater setup --print-sql` prints",
                self.user
            ),
        }
    }

    /// Refuses a schema that lacks something, where the session's role is not the owner.
    ///
    /// # Errors
    ///
    /// It is not there, or not as the newest release wants it.
    pub(super) fn must_be_made(&self) -> Result<()> {
        match &self.schema_owner {
            None => Err(self.refusal("making schema highwater")),
            Some(_) if self.version < newest() => Err(self.refusal("making or migrating schema highwater")),
            Some(_) => Ok(()),
        }
    }

    /// Says so if the schema is not the owner's.
    pub(super) fn warn_of_owner(&self, report: &mut Report) {
        if let Some(other) = self.schema_owner.as_ref().filter(|other| **other != self.owner) {
            report.todo.push(format!(
                "schema highwater belongs to {other}, so that {other} could do what {} may, who owns the drift tables and purges them: \
                 as {0} or a superuser run `highwater setup --as-owner --sidecar-role {}`",
                self.owner, self.user
            ));
        }
    }

    /// Refuses a schema that somebody has changed: what is in it must not be run with the owner's rights.
    async fn must_be_ours(&self, client: &Client) -> Result<()> {
        let differences = objects::differences(client, self.version).await?;
        if differences.is_empty() {
            return Ok(());
        }
        Err(Error::Setting {
            setting: "schema highwater".to_owned(),
            value: format!("of version {}, but {}", self.version, differences.join(", ")),
            accepted: "as its migrations have made it, because the purge runs what is in it with the rights of the drift tables' \
                       owner. See who has changed that, and put it right: move into another schema what is yours; where a routine or \
                       a table was changed, `drop schema highwater cascade`, then set up again (every row is compared with the archive)"
                .to_owned(),
        })
    }
}

/// The version that the newest migration makes.
pub(crate) fn newest() -> i64 {
    migrations::migrations::runner()
        .get_migrations()
        .iter()
        .map(|one| i64::from(one.version()))
        .max()
        .unwrap_or(0)
}

/// A step, and what is said of it.
#[derive(Debug)]
struct Step {
    did: String,
    statement: String,
}

/// The statements by which the schema becomes the owner's: it is made, or what others own of it is given to him, and what others may
/// write is taken back. They lock what they change, so that nobody changes it before the transaction ends.
async fn ownership_steps(client: &Client, ownership: &Ownership, sidecar: Option<&str>) -> Result<Vec<Step>> {
    let owner = quote_identifier(&ownership.owner);
    if ownership.schema_owner.is_none() {
        return Ok(vec![Step {
            did: format!("made schema highwater, which belongs to {}", ownership.owner),
            statement: format!("create schema highwater authorization {owner}"),
        }]);
    }
    let failed = || Error::sql("reading what is in schema highwater");
    let query = format!("with {HOLDINGS}, {OWNERSHIP}");
    let mut steps = Vec::new();
    for row in client.query(&query, &[&ownership.owner, &sidecar]).await.map_err(failed())? {
        steps.push(Step {
            did: row.try_get(1).map_err(failed())?,
            statement: row.try_get(2).map_err(failed())?,
        });
    }
    Ok(steps)
}

/// What of the schema is not the owner's (`$1`), and what others may do in it by which they could get his rights; if the role that archives is
/// known (`$2`), also what others than that one may write.
const OWNERSHIP: &str = "
    revoked as (
        select g.name, g.kind, coalesce(r.rolname::text, 'public') as role, coalesce(quote_ident(r.rolname), 'public') as quoted,
               (select string_agg(lower(w.one), ', ' order by w.one) from unnest(g.privileges) w (one)
                where w.one = any (array['CREATE', 'TRUNCATE', 'REFERENCES', 'TRIGGER'])
                   or ($2::text is not null and r.rolname is distinct from $2::text and w.one = any (array['INSERT', 'UPDATE', 'DELETE']))) as what
        from granted g left join pg_roles r on r.oid = g.grantee
        where r.rolname is distinct from $1::text)
    select rank, format('gave %s %s to %s, whose drift tables it is for; it was of %s', kind, name, $1::text, pg_get_userbyid(owner)),
           format('alter %s %s owner to %I', kind, name, $1::text)
    from object where pg_get_userbyid(owner) <> $1::text
    union all
    select 3, format('took back from %s: %s on %s', role, what, name), format('revoke %s on %s %s from %s cascade', what, kind, name, quoted)
    from revoked where what is not null
    order by 1, 2";

/// Makes the schema, or makes it the owner's, and brings it up to date. `sidecar` is the role that archives, if that is known.
///
/// # Errors
///
/// Something in it is not as the migrations made it; or the server refused a step.
pub(super) async fn make_schema(
    client: &mut Client,
    ownership: &Ownership,
    sidecar: Option<&str>,
    report: &mut Report,
) -> Result<()> {
    let steps = ownership_steps(client, ownership, sidecar).await?;
    let statements: Vec<&str> = steps.iter().map(|step| step.statement.as_str()).collect();
    let context = format!("making schema highwater, as the role {}", ownership.user);
    // Compared only when nobody else can change it any more. An error ends the session, and with it the transaction.
    client.batch_execute(&format!("begin; {}", statements.join("; "))).await.map_err(Error::sql(&context))?;
    if ownership.schema_owner.is_some() {
        ownership.must_be_ours(client).await?;
    }
    client.batch_execute("commit").await.map_err(Error::sql(&context))?;
    match (steps.len(), &ownership.schema_owner) {
        (4.., Some(_)) => report.done.push(format!(
            "gave schema highwater and what is in it to {}, who owns the drift tables, and took back what others might write in it \
             ({} steps)",
            ownership.owner,
            steps.len()
        )),
        _ => report.done.extend(steps.iter().map(|step| step.did.clone())),
    }
    let become_owner = format!("set role {}", quote_identifier(&ownership.owner));
    client.batch_execute(&become_owner).await.map_err(Error::sql(format!("becoming {}", ownership.owner)))?;
    let outcome = migrate(client, report).await;
    // Not `reset role`: a role may bring a `role` of its own by its settings.
    let go_back = format!("set role {}", quote_identifier(&ownership.user));
    client.batch_execute(&go_back).await.map_err(Error::sql("going back to the session's role"))?;
    outcome
}

/// Has the purge delete from the drift tables, and from what is a partition of them now.
fn purgeable(tables: &[SourceTable]) -> String {
    let oids: Vec<String> = drift_oids(tables).iter().map(u32::to_string).collect();
    let list = format!("pg_catalog.unnest(array[{}]::pg_catalog.oid[]) as drift (root)", oids.join(", "));
    format!(
        "insert into highwater.purgeable (table_oid, root) select root, root from {list} on conflict do nothing;\nselect \
         highwater.note_partitions(root) from {list}"
    )
}

/// Gives the drift tables to the purge.
///
/// # Errors
///
/// The server refused the statement.
pub(super) async fn give_to_purge(client: &Client, tables: &[SourceTable]) -> Result<()> {
    client.batch_execute(&purgeable(tables)).await.map_err(Error::sql("giving the drift tables to the purge"))
}

async fn migrate(client: &mut Client, report: &mut Report) -> Result<()> {
    let mut runner = migrations::migrations::runner();
    runner.set_migration_table_name("highwater.migration");
    let outcome = runner.run_async(client).await.map_err(|error| Error::Encode {
        context: "migrating schema highwater".to_owned(),
        source: Box::new(error),
    })?;
    match outcome.applied_migrations().as_slice() {
        [] => report.left.push("schema highwater is up to date".to_owned()),
        applied => {
            report.done.extend(applied.iter().map(|step| format!("migrated schema highwater: {step}")));
        }
    }
    Ok(())
}

/// The statements that give the role that archives what it needs, and take back what it does not.
async fn grants(client: &Client, tables: &[SourceTable], role: &str) -> Result<Vec<Step>> {
    let failed = || Error::sql(format!("reading the rights of role {role}"));
    let to = quote_identifier(role);
    let mut steps = Vec::new();
    let mut grant = |did: String, statement: String| steps.push(Step { did, statement });
    let oids: Vec<u32> = tables.iter().map(|table| table.oid).collect();
    let query = "
        select coalesce(has_schema_privilege($1::text::name, to_regnamespace('highwater'), 'usage'), false),
               array(select n.nspname::text from pg_namespace n where n.nspname = any ($2) and not has_schema_privilege($1::text::name, n.oid, 'usage') order by 1),
               array(select c.oid from pg_class c where c.oid = any ($3) and has_table_privilege($1::text::name, c.oid, 'select')),
               array(select concat_ws(', ', format('%s %s', c.relname,
                                                 lower(string_agg(x.privilege_type, ', ' order by array_position(array['SELECT', 'INSERT', 'UPDATE', 'DELETE'], x.privilege_type)))),
                                      (select string_agg(n.granted, ', ' order by n.granted) from (
                                           select format('%s (%s)', lower(n.privilege_type), string_agg(a.attname, ', ' order by a.attnum)) as granted
                                           from pg_attribute a, aclexplode(a.attacl) n where a.attrelid = c.oid and n.grantee = x.grantee
                                           group by n.privilege_type) n))
                     from pg_class c, aclexplode(c.relacl) x
                     where c.relnamespace = to_regnamespace('highwater') and c.relkind = 'r'
                       and x.grantee = (select r.oid from pg_roles r where r.rolname = $1) group by c.oid, c.relname, x.grantee)";
    let schemas: Vec<&str> = tables.iter().map(|table| table.schema.as_str()).collect();
    let row = client.query_one(query, &[&role, &schemas, &oids]).await.map_err(failed())?;
    for schema in row.try_get::<_, Vec<String>>(1).map_err(failed())? {
        let statement = format!("grant usage on schema {} to {to}", quote_identifier(&schema));
        grant(format!("let {role} use schema {schema}"), statement);
    }
    let readable: Vec<u32> = row.try_get(2).map_err(failed())?;
    for table in tables.iter().filter(|table| !readable.contains(&table.oid)) {
        let name = qualified(table);
        grant(format!("let {role} read {name}"), format!("grant select on {name} to {to}"));
    }
    let mut held: Vec<String> = row.try_get(3).map_err(failed())?;
    let rights =
        |table: &str| WRITTEN.iter().find(|(name, _)| *name == table).map_or("select", |(_, rights)| *rights);
    // As they are when all migrations have run, which a script has still to do.
    let state: Vec<&str> = objects::tables(newest()).collect();
    let mut wanted: Vec<String> = state.iter().map(|table| format!("{table} {}", rights(table))).collect();
    held.sort_unstable();
    wanted.sort_unstable();
    if held != wanted || !row.try_get::<_, bool>(0).map_err(failed())? {
        let mut statement = format!(
            "grant usage on schema highwater to {to}; revoke all on all tables in schema highwater from {to}"
        );
        for table in &state {
            statement.push_str(&format!("; grant {} on highwater.{table} to {to}", rights(table)));
        }
        grant(format!("let {role} write the state in schema highwater, and read the rest"), statement);
    }
    Ok(steps)
}

/// The same for pg_partman's configuration, which may drop partitions that are not archived; and whether the drift tables' owner may give
/// that right. `None` if there is nothing to give.
async fn partman_grant(client: &Client, owner: &str, role: &str) -> Result<Option<(Step, bool)>> {
    let failed = || Error::sql("reading the rights on pg_partman's configuration");
    let query = "
        select n.nspname::text, has_schema_privilege($1::text::name, n.oid, 'usage with grant option')
                   and bool_and(has_table_privilege($1::text::name, c.oid, 'select with grant option'))
        from pg_extension e join pg_namespace n on n.oid = e.extnamespace
        join pg_class c on c.relnamespace = n.oid and c.relname in ('part_config', 'part_config_sub')
        where e.extname = 'pg_partman'
        group by n.oid, n.nspname
        having not (has_schema_privilege($2::text::name, n.oid, 'usage')
                    and bool_and(has_table_privilege($2::text::name, c.oid, 'select')))";
    let Some(row) = client.query_opt(query, &[&owner, &role]).await.map_err(failed())? else {
        return Ok(None);
    };
    let schema: String = row.try_get(0).map_err(failed())?;
    let (quoted, to) = (quote_identifier(&schema), quote_identifier(role));
    let step = Step {
        did: format!("let {role} see pg_partman's retention"),
        statement: format!(
            "grant usage on schema {quoted} to {to}; grant select on {quoted}.part_config, {quoted}.part_config_sub to {to}"
        ),
    };
    Ok(Some((step, row.try_get(1).map_err(failed())?)))
}

/// Whether a role may do what the owner may.
async fn has_owners_rights(client: &Client, role: &str, owner: &str) -> Result<bool> {
    let query = "select pg_has_role(r.oid, $2::text::name, 'usage') from pg_roles r where r.rolname = $1";
    let row = client.query_opt(query, &[&role, &owner]).await;
    let found = row.and_then(|row| row.map(|row| row.try_get(0)).transpose());
    found.map(Option::unwrap_or_default).map_err(Error::sql(format!("looking for role {role}")))
}

/// Gives the role that archives what it needs.
///
/// # Errors
///
/// There is no such role; or the server refused a statement.
pub(super) async fn grant(
    client: &Client,
    tables: &[SourceTable],
    ownership: &Ownership,
    role: &str,
    report: &mut Report,
) -> Result<()> {
    let (user, owner) = (ownership.user.as_str(), ownership.owner.as_str());
    let failed = || Error::sql(format!("looking for role {role}"));
    let query = format!("select rolsuper, {MAY_REPLICATE} from pg_roles r where rolname = $1");
    let Some(found) = client.query_opt(&query, &[&role]).await.map_err(failed())? else {
        return Err(Error::Setting {
            setting: "--sidecar-role".to_owned(),
            value: role.to_owned(),
            accepted: format!(
                "the role that Highwater archives as; to make it: create role {} login replication password '...';",
                quote_identifier(role)
            ),
        });
    };
    if !found.try_get::<_, bool>(1).map_err(failed())? {
        report.todo.push(format!(
            "role {role} may not replicate; as a superuser: alter role {} replication;",
            quote_identifier(role)
        ));
    }
    // Who has the owner's rights has all of these.
    if has_owners_rights(client, role, owner).await? {
        report.left.push(format!("rights of role {role}, which are those of {owner}"));
        return Ok(());
    }
    let mut steps = grants(client, tables, role).await?;
    match partman_grant(client, user, role).await? {
        Some((step, true)) => steps.push(step),
        Some((step, false)) => {
            report.todo.push(format!(
                "so that {role} sees pg_partman's retention, as pg_partman's owner: {};",
                step.statement
            ));
        }
        None => {}
    }
    if steps.is_empty() || found.try_get(0).map_err(failed())? {
        report.left.push(format!("rights of role {role}"));
        return Ok(());
    }
    for step in steps {
        client.batch_execute(&step.statement).await.map_err(Error::sql(&step.statement))?;
        report.done.push(step.did);
    }
    Ok(())
}

/// A script for psql that does as the owner what [`super::setup_as_owner`] does.
///
/// # Errors
///
/// Somebody has changed the schema; or a query failed.
pub(super) async fn script(
    client: &Client,
    tables: &[SourceTable],
    ownership: &Ownership,
    role: &str,
    publication: &str,
) -> Result<String> {
    let mut script = format!(
        "-- For {}, who owns the drift tables, or a superuser; by psql. All of it, or nothing.\n\\set ON_ERROR_STOP on\nbegin;\nset \
         local search_path = pg_catalog;\nset local check_function_bodies = on;\n",
        ownership.owner
    );
    for step in ownership_steps(client, ownership, Some(role)).await? {
        script.push_str(&format!("{};\n", step.statement));
    }
    // Whoever else could change it could do so after this was printed.
    if ownership.schema_owner.is_some() {
        script.push_str(&objects::assertion(ownership.version));
    }
    let runner = migrations::migrations::runner();
    let mut missing: Vec<_> =
        runner.get_migrations().iter().filter(|one| i64::from(one.version()) > ownership.version).collect();
    // They come by their files' names, and V10 before V2.
    missing.sort_by_key(|one| one.version());
    if !missing.is_empty() {
        script.push_str(&format!(
            "\nset local role {};\ncreate table if not exists highwater.migration (version int4 primary key, name varchar(255), \
             applied_on varchar(255), checksum varchar(255));\n",
            quote_identifier(&ownership.owner)
        ));
    }
    for one in &missing {
        script.push_str(&format!(
            "\n{}\ninsert into highwater.migration values ({}, {}, to_char(now() at time zone 'UTC', \
             'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), '{}');\n",
            one.sql().unwrap_or_default().trim_end(),
            one.version(),
            quote_literal(one.name()),
            one.checksum()
        ));
    }
    if !missing.is_empty() {
        script.push_str("\nreset role;\n");
    }
    script.push_str(publication);
    script.push_str(&format!("{};\n", purgeable(tables)));
    if !has_owners_rights(client, role, &ownership.owner).await? {
        for step in grants(client, tables, role).await? {
            script.push_str(&format!("{};\n", step.statement));
        }
        if let Some((step, may_grant)) = partman_grant(client, &ownership.owner, role).await? {
            let comment = if may_grant { "" } else { "-- As the owner of pg_partman: " };
            script.push_str(&format!("{comment}{};\n", step.statement));
        }
    }
    script.push_str(
        "-- pg_partman's own retention drops partitions that are not archived: `highwater setup` says where it is set.\n",
    );
    script.push_str("commit;\n");
    Ok(script)
}
