//! What the stream and copies do not bring with their rows, asked of the catalog: entities by their ids, types, and texts that
//! only the server can bring to UTF-8.

use crate::decode::{Decoder, ENTITY_TEXT_BYTES_MAX, Inserted, Notice};
use crate::error::{Error, Result};
use crate::pgoutput::{Column, Relation};
use crate::postgres::{Encoding, Session, quote_identifier};
use crate::tables::EntityKey;

/// The built-in type (its oid) whose binary form is that of the type `t`, a row of `pg_type`, in SQL; null if there is none.
/// The send function tells it: a domain has that of its base.
pub(crate) const BINARY_FORM: &str = "(
    select f.type_oid from pg_proc s join (values
        ('textsend', 25::oid), ('varcharsend', 1043), ('bpcharsend', 1042), ('namesend', 19), ('enum_send', 25),
        ('timestamptz_send', 1184), ('timestamp_send', 1114), ('int2send', 21), ('int4send', 23), ('int8send', 20),
        ('float4send', 700), ('float8send', 701), ('boolsend', 16), ('date_send', 1082), ('byteasend', 17),
        ('numeric_send', 1700), ('uuid_send', 2950), ('json_send', 114), ('jsonb_send', 3802)) as f (name, type_oid) on f.name = s.prosrc
    where s.oid = t.typsend and s.prolang = (select l.oid from pg_language l where l.lanname = 'internal'))";

/// Most bytes of a name that a reason shows.
const SHOWN_BYTES_MAX: usize = 1_000;

/// A session that looks things up.
#[derive(Debug)]
pub(crate) struct Lookup {
    sql: Session,
    schema: String,
}

impl Lookup {
    /// Over this session; `schema` is that of the settings.
    pub(crate) fn new(sql: Session, schema: &str) -> Self {
        Self { sql, schema: schema.to_owned() }
    }

    /// The query for the names of an entity by its id.
    fn query(&self, key: &EntityKey) -> Option<String> {
        let table = key.lookup.as_ref()?;
        // As bytes, which come whatever they are. `format` gives what the type itself writes. Of one that is too long as much
        // comes as shows that it is.
        let raw = |column: &String| {
            let column = quote_identifier(column);
            format!(
                "case when {column} is not null then
                     convert_to(left(format('%s', {column}), {ENTITY_TEXT_BYTES_MAX} + 1), getdatabaseencoding()) end"
            )
        };
        let columns: Vec<String> = key.columns.iter().map(raw).collect();
        let name = table.qualified(&self.schema);
        let (schema, name) = name.split_once('.')?;
        Some(format!(
            "select {}, getdatabaseencoding()::text from {}.{} where {} = $1::bigint",
            columns.join(", "),
            quote_identifier(schema),
            quote_identifier(name),
            quote_identifier(&table.key)
        ))
    }

    /// The session, for other questions.
    pub(crate) const fn sql(&mut self) -> &mut Session {
        &mut self.sql
    }

    /// Answers what the decoder has asked instead of taking a row, which is to be handed in again then.
    ///
    /// # Errors
    ///
    /// A query failed.
    #[inline]
    pub(crate) async fn answer(&mut self, decoder: &mut Decoder, asked: Inserted) -> Result<()> {
        match asked {
            Inserted::Done | Inserted::Quarantined | Inserted::NotArchived => {}
            Inserted::UnknownEntity(id) => {
                let key = decoder.unknown_entity_key();
                let key = key.ok_or_else(|| Error::Internal("no entity table was asked for".to_owned()))?;
                match self.entity(key, id).await? {
                    Ok(names) => decoder.resolve_names(id, names),
                    Err(why) => decoder.resolve_unfit(id, why),
                }
            }
            Inserted::UnknownText => {
                let text = self.text(decoder.unknown_text()).await?;
                decoder.learn_text(text);
            }
        }
        Ok(())
    }

    /// Has the decoder learn how a table's rows look, with what must be asked for that; `encoding` is that of the names. Returns
    /// what its operator should know.
    ///
    /// # Errors
    ///
    /// A query failed.
    pub(crate) async fn relation(
        &mut self,
        decoder: &mut Decoder,
        relation: &Relation<'_>,
        encoding: Encoding,
    ) -> Result<Vec<Notice>> {
        for type_oid in decoder.unknown_types(relation) {
            let same_as = self.binary_form(type_oid).await?;
            decoder.learn_type(type_oid, same_as);
        }
        let mut names = vec![relation.namespace, relation.name];
        names.extend(relation.columns.iter().map(|column| column.name));
        if encoding != Encoding::Other || names.iter().all(|name| name.is_ascii()) {
            return Ok(decoder.relation(relation));
        }
        let mut texts = Vec::new();
        for name in names {
            let text = self.text(name).await?;
            texts.push(text.map_or_else(|| name.to_owned(), String::into_bytes));
        }
        let mut texts = texts.iter().map(Vec::as_slice);
        let (namespace, name) = (texts.next().unwrap_or_default(), texts.next().unwrap_or_default());
        let columns = relation.columns.iter().zip(texts);
        let columns = columns.map(|(column, name)| Column { name, ..*column }).collect();
        Ok(decoder.relation(&Relation { oid: relation.oid, namespace, name, columns }))
    }

    /// The built-in type whose binary form a type has.
    async fn binary_form(&mut self, type_oid: u32) -> Result<Option<u32>> {
        let query = format!("select {BINARY_FORM} from pg_type t where t.oid = $1");
        let context = || format!("looking up type {type_oid}");
        let row = self
            .sql
            .run(async |client| client.query_opt(&query, &[&type_oid]).await.map_err(Error::sql(context())))
            .await?;
        let form = row.map(|row| row.try_get::<_, Option<u32>>(0)).transpose();
        Ok(form.map_err(Error::sql(context()))?.flatten())
    }

    /// What bytes in the database's encoding are in UTF-8; `None` if they can't be written in it.
    async fn text(&mut self, bytes: &[u8]) -> Result<Option<String>> {
        let context = "bringing a text to UTF-8";
        let query = "select highwater.utf8($1)";
        let row = self
            .sql
            .run(async |client| client.query_one(query, &[&bytes]).await.map_err(Error::sql(context)))
            .await?;
        let text: Option<Vec<u8>> = row.try_get(0).map_err(Error::sql(context))?;
        Ok(text.and_then(|text| String::from_utf8(text).ok()))
    }

    /// The names of the entity of that id, if there is one, or why it can't be archived.
    async fn entity(&mut self, key: &EntityKey, id: i64) -> Result<Result<Option<Vec<String>>, String>> {
        let query = self.query(key).unwrap_or_default();
        let table = key.lookup.as_ref().map_or("", |lookup| &lookup.table);
        let context = || format!("looking up entity {id} in {table}");
        let row = self
            .sql
            .run(async |client| client.query_opt(&query, &[&id]).await.map_err(Error::sql(context())))
            .await?;
        let Some(row) = row else { return Ok(Ok(None)) };
        let encoding: String = row.try_get(key.columns.len()).map_err(Error::sql(context()))?;
        let is_other = Encoding::of_name(&encoding) == Encoding::Other;
        let mut texts = Vec::new();
        for (index, column) in key.columns.iter().enumerate() {
            let raw: Option<Vec<u8>> = row.try_get(index).map_err(Error::sql(context()))?;
            let Some(raw) = raw else {
                return Ok(Err(format!("names an entity in {table} whose {column} is null")));
            };
            let is_too_long = raw.len() > ENTITY_TEXT_BYTES_MAX;
            let text = if is_too_long {
                None
            } else if is_other && !raw.is_ascii() {
                self.text(&raw).await?
            } else {
                String::from_utf8(raw.clone()).ok()
            };
            match text {
                // Converted, it may be longer.
                Some(text) if text.len() <= ENTITY_TEXT_BYTES_MAX => texts.push(text),
                None if !is_too_long => {
                    return Ok(Err(format!(
                        "names an entity in {table} whose {column} has bytes that are not UTF-8: {}",
                        raw.get(..SHOWN_BYTES_MAX).unwrap_or(&raw).escape_ascii()
                    )));
                }
                _ => {
                    return Ok(Err(format!(
                        "names an entity in {table} whose {column} has more than {ENTITY_TEXT_BYTES_MAX} bytes"
                    )));
                }
            }
        }
        Ok(Ok(Some(texts)))
    }
}
