/// Why a value does not fit its archive column. Becomes the `reason` of a quarantined row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unfit {
    #[error("is missing from the table")]
    Missing,
    #[error("is null")]
    Null,
    #[error("was not sent, since the update has not changed it")]
    NotSent,
    #[error(
        "may have changed: the update came without the row as it was; alter the table and its partitions: replica identity full"
    )]
    NoRowBefore,
    #[error("is infinity")]
    Infinity,
    #[error("is -infinity")]
    NegativeInfinity,
    #[error("is outside the years 0001 to 9999")]
    OutsideCalendar,
    #[error("does not fit 32 bits")]
    TooWide,
    #[error("is NaN")]
    NotANumber,
    #[error("has more digits than its column in the archive")]
    TooManyDigits,
    #[error("has bytes that are not UTF-8, and can't be converted to it")]
    NotUtf8,
    #[error("has a type (oid {0}) that is not supported")]
    Type(u32),
    #[error("has bytes that are not of its type")]
    Malformed,
    #[error("names no entity")]
    UnknownEntity,
    #[error("has {0} bytes, which makes the row longer than the memory setting allows")]
    Long(u32),
}

/// Whether a quarantined row is there because of what its column was, and not because of its value.
pub(super) fn is_about_column(reason: &str) -> bool {
    reason.ends_with(" is missing from the table") || reason.ends_with(" that is not supported")
}

/// Whether a quarantined row is a version that could not be told from the row before, whatever its values are.
pub(super) fn is_about_version(reason: &str) -> bool {
    reason.ends_with(" was not sent, since the update has not changed it")
        || reason.contains(" may have changed: the update came without the row as it was")
}

/// Whether a quarantined row is there without its long values.
pub(super) fn is_about_length(reason: &str) -> bool {
    reason.ends_with(" bytes, which makes the row longer than the memory setting allows")
}
