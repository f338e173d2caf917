//! How the rows of the tables look, and what that asks of the session.

use super::Builder;
use crate::decode::NewColumn;
use crate::error::{Error, Result};
use crate::lsn::Lsn;
use crate::pgoutput::Relation;
use crate::source::growth;
use crate::watermark;

impl Builder {
    /// Learns how a table's rows look from here on.
    pub(super) async fn relation(&mut self, relation: &Relation<'_>) -> Result<()> {
        // It may be part of a drift table by now.
        self.foreign.remove(&relation.oid);
        for notice in self.lookup.relation(&mut self.decoder, relation, self.texts.encoding).await? {
            tracing::warn!("{notice}");
        }
        self.check_columns(relation.oid)
    }

    /// A row of a table that has no drift table's name. A partition that is published as itself, or a drift table that
    /// was renamed, is known by its oid: its rows are archived. Returns whether it is one.
    #[cold]
    pub(super) async fn adopt(&mut self, relation: u32) -> Result<bool> {
        if self.foreign.contains(&relation) {
            return Ok(false);
        }
        let root =
            self.lookup.sql().run(async |client| watermark::archived_root(client, relation).await).await?;
        let publication = &self.publication;
        let table = self.decoder.table_name(relation).unwrap_or_default();
        let kind =
            root.as_ref().and_then(|(_, kind)| self.kinds.iter().find(|known| known.name() == kind).copied());
        let (Some((root, _)), Some(kind)) = (&root, kind) else {
            tracing::warn!(
                "table {table} is in publication {publication}, but is not archived: it only costs WAL there"
            );
            self.foreign.insert(relation);
            return Ok(false);
        };
        tracing::warn!(
            "rows of {table} are archived as those of {root}; `highwater check` says what is not as it should be"
        );
        self.decoder.adopt(relation, kind, root);
        self.check_columns(relation)?;
        Ok(true)
    }

    /// A row that an update has moved has values that the log has nowhere: its table is a gap, in which they are found. Before anything
    /// of it is archived, so that the horizon stays below it.
    #[cold]
    pub(super) async fn mark_lost(&mut self, relation: u32) -> Result<()> {
        let Some(table) = self.decoder.table_name(relation).map(str::to_owned) else { return Ok(()) };
        let marked =
            self.lookup.sql().run(async |client| watermark::mark_one_gap(client, &table).await).await?;
        if marked {
            tracing::warn!(
                table,
                "gap: an update has changed the key or the time of a row and left long values alone, which are not in the log; the \
                 row is copied. `alter table ... replica identity full`, on each partition, has them in the log"
            );
        }
        Ok(())
    }

    /// A session ends whose archive lacks a column of a table's rows, or which can't read one: the next one has it, or reads it.
    ///
    /// A column of a type that nobody here can read goes to the quarantine, where a person is to read it: so the server must write
    /// it as text. It does that for all values or for none, and text is slower.
    pub(super) fn check_columns(&self, relation: u32) -> Result<()> {
        self.check_new(self.decoder.new_columns(relation))?;
        if self.texts.is_all || !self.decoder.has_unreadable(relation) {
            return Ok(());
        }
        self.texts.wants.texts();
        let table = self.decoder.table_name(relation).unwrap_or_default();
        Err(Error::Anew {
            detail: format!(
                "{table} has a column of a type that only its text tells; the stream begins anew, with all values as text"
            ),
        })
    }

    /// Columns of which no row has come yet: who asks for a checkpoint is to find them in the archive, too.
    pub(super) async fn check_catalog(&mut self) -> Result<()> {
        let (schema, kinds) = (&self.schema, &self.kinds);
        let found = self.lookup.sql().run(async |client| growth::find_new(client, schema, kinds).await).await;
        match found {
            Ok(new) => self.check_new(new),
            Err(error) => {
                tracing::debug!(error = error.chain(), "the tables' columns were not looked at");
                Ok(())
            }
        }
    }

    fn check_new(&self, new: Vec<NewColumn>) -> Result<()> {
        // Of a table that is not to be had the stream brings nothing.
        let is_had =
            |column: &NewColumn| self.table_lsn.get(column.kind).is_some_and(|lsn| *lsn != Lsn(u64::MAX));
        let new: Vec<NewColumn> = new.into_iter().filter(is_had).collect();
        let names: Vec<String> =
            new.iter().map(|column| format!("{} of {}", column.name, column.kind.name())).collect();
        if !self.texts.wants.columns(new) {
            return Ok(());
        }
        let names = names.join(", ");
        Err(Error::Anew {
            detail: format!("new columns ({names}) are added to the archive; then the stream begins anew"),
        })
    }
}
