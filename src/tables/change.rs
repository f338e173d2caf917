//! What a table's rows say of themselves where each version of a row is archived.

/// What made a version of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Change {
    /// The row was inserted.
    Insert,
    /// It was updated.
    Update,
    /// It was deleted: the version has what the log says of it, its key at least.
    Delete,
    /// Nobody saw how it came about: it was found when the table was copied, or a gap was healed.
    Copy,
}

impl Change {
    /// As the column [`CHANGE`] has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::Copy => "copy",
        }
    }
}

/// The column that says what made a version: [`Change::name`].
pub const CHANGE: &str = "_change";

/// ... where its transaction's commit record begins, in bytes from the beginning of the log; of a copy the position before that at which
/// it was taken. Versions of a row are in the order of this column, and of [`SEQUENCE`].
pub const LSN: &str = "_lsn";

/// ... the number of the change in its transaction.
pub const SEQUENCE: &str = "_seq";

/// ... when its transaction was committed; null in a copy.
pub const COMMITTED_AT: &str = "_committed_at";

/// ... the columns, with commas between them, of which the server has not sent the value: it is that of the version before (manual
/// section 55.9, "TupleData", 'u'). Null if there are none.
pub const UNCHANGED: &str = "_unchanged";

/// The columns that versions have beside those of their source.
pub const CHANGE_COLUMNS: [&str; 5] = [CHANGE, LSN, SEQUENCE, COMMITTED_AT, UNCHANGED];
