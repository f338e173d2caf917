//! [`SourceType`]: the type of a column, as Postgres numbers it.

/// The types (`pg_type.oid`, fixed in `pg_type.dat`) whose binary form is known, and those whose form is the same: a domain has
/// that of its base, an enum that of a text.
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
    Date,
    Bytea,
    Numeric,
    Uuid,
    Json,
    Jsonb,
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
            1082 => Self::Date,
            17 => Self::Bytea,
            1700 => Self::Numeric,
            2950 => Self::Uuid,
            114 => Self::Json,
            3802 => Self::Jsonb,
            other => Self::Other(other),
        }
    }

    /// One oid of the type, to be named in an error.
    pub(super) const fn oid(self) -> u32 {
        match self {
            Self::Text => 25,
            Self::TimestampTz => 1184,
            Self::Timestamp => 1114,
            Self::Int2 => 21,
            Self::Int4 => 23,
            Self::Int8 => 20,
            Self::Float4 => 700,
            Self::Float8 => 701,
            Self::Bool => 16,
            Self::Date => 1082,
            Self::Bytea => 17,
            Self::Numeric => 1700,
            Self::Uuid => 2950,
            Self::Json => 114,
            Self::Jsonb => 3802,
            Self::Other(oid) => oid,
        }
    }

    /// Whether the binary form of the type is known.
    pub(super) const fn is_known(oid: u32) -> bool {
        !matches!(Self::of(oid), Self::Other(_))
    }
}
