//! [`SourceType`]: the type of a column, as Postgres numbers it.

/// The types (`pg_type.oid`, fixed in `pg_type.dat`) that a column of a drift table may have, and those whose form is the same:
/// a domain has that of its base, an enum that of a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SourceType {
    Text,
    TimestampTz,
    Timestamp,
    Int2,
    Int4,
    Int8,
    Float4,
    Float8,
    Bool,
    Other(u32),
}

impl SourceType {
    pub(super) const fn of(oid: u32) -> Self {
        match oid {
            // text, varchar, bpchar and name have the same text and binary form.
            25 | 1043 | 1042 | 19 => Self::Text,
            1184 => Self::TimestampTz,
            1114 => Self::Timestamp,
            21 => Self::Int2,
            23 => Self::Int4,
            20 => Self::Int8,
            700 => Self::Float4,
            701 => Self::Float8,
            16 => Self::Bool,
            other => Self::Other(other),
        }
    }

    /// Whether the binary form of the type is known.
    pub(super) const fn is_known(oid: u32) -> bool {
        !matches!(Self::of(oid), Self::Other(_))
    }
}
