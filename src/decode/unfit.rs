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

/// Whether a quarantined row is there because of what its column was (its type, or that there was none), and not because of its
/// value.
pub(crate) fn is_about_column(reason: &str) -> bool {
    reason.ends_with(" is missing from the table") || reason.ends_with(" that is not supported")
}

/// Whether a quarantined row is a version that the archive can't have by what the log says of it, and can by a copy.
pub(crate) fn is_about_version(reason: &str) -> bool {
    reason.ends_with(" was not sent, since the update has not changed it")
        || reason.contains(" may have changed: the update came without the row as it was")
}

/// The sorts of reasons for which rows are quarantined.
pub(crate) const SORTS_OF_REASONS: [&str; 7] =
    ["length", "column", "version", "entity", "null", "text", "value"];

/// The sort of a quarantined row's reason.
pub(crate) fn sort_of_reason(reason: &str) -> &'static str {
    let is_it: [fn(&str) -> bool; 6] = [
        is_about_length,
        is_about_column,
        is_about_version,
        |reason| reason.contains(" names no entity in ") || reason.contains(" names an entity in "),
        |reason| reason.ends_with(" is null"),
        |reason| reason.ends_with(" bytes that are not UTF-8, and can't be converted to it"),
    ];
    let sorts = SORTS_OF_REASONS.into_iter().zip(is_it);
    sorts.into_iter().find(|(_, is_it)| is_it(reason)).map_or("value", |(name, _)| name)
}

/// Whether a quarantined row is there without its long values, which nobody archived.
pub(crate) fn is_about_length(reason: &str) -> bool {
    reason.ends_with(" bytes, which makes the row longer than the memory setting allows")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_of_a_sort() {
        for (reason, sort) in [
            (Unfit::Missing.to_string(), "column"),
            (Unfit::Type(600).to_string(), "column"),
            (Unfit::Null.to_string(), "null"),
            (Unfit::NotSent.to_string(), "version"),
            (Unfit::NoRowBefore.to_string(), "version"),
            (Unfit::Infinity.to_string(), "value"),
            (Unfit::TooManyDigits.to_string(), "value"),
            (Unfit::NotUtf8.to_string(), "text"),
            (Unfit::Long(7).to_string(), "length"),
            (format!("{} in scouter.drift_entities", Unfit::UnknownEntity), "entity"),
            ("names an entity in t whose space is null".to_owned(), "entity"),
        ] {
            assert_eq!(sort_of_reason(&format!("column {reason}")), sort, "{reason}");
        }
    }
}
