//! What a session relies on, said by itself right after the login.
//!
//! A role, a database or the server may bring any of these settings (`alter role ... set`), and none of them may change
//! what is archived. They are set by statements and not in the start-up message, because poolers refuse most of that.

use super::quote::quote_literal;

/// The encoding in which the server sends text, asked for in the start-up message of every session.
pub(super) const CLIENT_ENCODING: &str = "UTF8";

/// What every session needs. A setting that the server doesn't know (`transaction_timeout` before 17) is left out. None
/// needs a superuser.
const EVERY: [(&str, &str); 21] = [
    // Nothing may be cut short behind our back; what must be bounded is bounded here.
    ("statement_timeout", "0"),
    ("lock_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
    ("transaction_timeout", "0"),
    // Watermarks are written, and transactions that must see more than one snapshot say so.
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_read_only", "off"),
    ("default_transaction_deferrable", "off"),
    // What we acknowledge rests on what we wrote, so that must be flushed; but not on every standby, which may be down.
    ("synchronous_commit", "local"),
    // A row that a policy hides must not be taken for absent: that is an error.
    ("row_security", "off"),
    // Every other name has its schema.
    ("search_path", "pg_catalog"),
    // Text is the same from every server.
    ("timezone", "UTC"),
    ("datestyle", "ISO, MDY"),
    ("intervalstyle", "postgres"),
    ("bytea_output", "hex"),
    ("extra_float_digits", "1"),
    ("quote_all_identifiers", "off"),
    // And what we write is read as it is meant.
    ("standard_conforming_strings", "on"),
    ("transform_null_equals", "off"),
    ("default_table_access_method", "heap"),
    ("client_min_messages", "warning"),
];

/// A session that touches a few rows at a time. A lock that somebody holds on our tables must not stop the archive for
/// longer; nor may a transaction of ours that hangs stop others.
pub(super) const BRIEF: &str = "set lock_timeout = '10s'; set idle_in_transaction_session_timeout = '60s'";

/// A session that reads partitions. Who writes to them must not wait behind a lock that we wait for. Its server process ends
/// soon after us, with its locks, also while it has nothing to send (where the server's system can tell).
pub(crate) const READING: &str = "
    set lock_timeout = '10s';
    do $$ begin
        set client_connection_check_interval = '10s';
    exception when others then null;
    end $$";

/// The statements that begin a session; the last one answers whether the server is in recovery.
///
/// A role that `alter role ... set role` brings is set back, because it has rights of its own, and none to replicate. One
/// that the connection string names in its `options` stays: whoever runs us wants it.
pub(super) fn statements(keeps_role: bool) -> String {
    let role = (!keeps_role).then_some(("role", "none"));
    let pairs: Vec<String> = EVERY
        .into_iter()
        .chain(role)
        .map(|(name, value)| format!("({}, {})", quote_literal(name), quote_literal(value)))
        .collect();
    // The first two are in force for the third, which has a snapshot and takes time.
    format!(
        "set transaction_isolation = 'read committed'; set statement_timeout = 0;
         select pg_catalog.set_config(wanted.name, wanted.value, false) from (values {}) as wanted (name, value)
          where pg_catalog.current_setting(wanted.name, true) is not null;
         select pg_catalog.pg_is_in_recovery()",
        pairs.join(", ")
    )
}
