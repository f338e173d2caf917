//! [`Error`], and the one place that says which errors are worth a retry.

use std::error::Error as StdError;
use std::io;

use tokio_postgres::error::SqlState;

/// The crate's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Any failure of Highwater. Its text says what failed and with which object; the cause is the
/// [`source`](StdError::source), and whoever prints an error walks the chain ([`Error::chain`]).
/// No variant carries a secret.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting has a value that can't be used.
    #[error("{setting} is {value:?}, but must be {accepted}")]
    Setting {
        /// Name of the setting, as its user wrote it.
        setting: String,
        /// The offending value, with secrets removed.
        value: String,
        /// What is accepted instead.
        accepted: String,
    },
    /// The network or a local file failed.
    #[error("{context}")]
    Io {
        /// What was being done, and to what.
        context: String,
        /// The cause.
        source: io::Error,
    },
    /// PostgreSQL refused something.
    #[error("{context}: {message} (SQLSTATE {code})")]
    Server {
        /// What was being done.
        context: String,
        /// The server's primary message, with detail and hint.
        message: String,
        /// The five-character SQLSTATE (manual, appendix A).
        code: String,
    },
    /// A plain SQL session failed other than by the server's refusal.
    #[error("{context}")]
    Sql {
        /// What was being done.
        context: String,
        /// The cause.
        source: tokio_postgres::Error,
    },
    /// The server sent bytes that the protocol does not allow, or that a limit forbids.
    #[error("{context}: {detail}")]
    Protocol {
        /// Which part of the exchange.
        context: String,
        /// What was wrong.
        detail: String,
    },
    /// A session ends on purpose: the next one begins with what this one has found out.
    #[error("{detail}")]
    Anew {
        /// What that is.
        detail: String,
    },
    /// The replication slot or the publication can't be used as it is.
    #[error("replication slot {slot:?}: {detail}")]
    Slot {
        /// The slot's name.
        slot: String,
        /// What is wrong with it, and what to do.
        detail: String,
        /// Whether waiting may cure it (another process that holds it may end).
        transient: bool,
    },
    /// Object storage failed.
    #[error("storage: {context}")]
    Storage {
        /// What was being done, and to which object.
        context: String,
        /// The cause.
        source: object_store::Error,
    },
    /// A Delta table could not be read or written.
    #[error("archive table {table}: {context}")]
    Delta {
        /// The archived table.
        table: String,
        /// What was being done.
        context: String,
        /// The cause.
        source: Box<deltalake_core::DeltaTableError>,
    },
    /// Another process has committed to the table with our application id: it has taken over, and
    /// this one must end without writing anything more.
    #[error("archive table {table}: another writer has taken over ({detail}); this one ends")]
    Fenced {
        /// The archived table.
        table: String,
        /// What was seen.
        detail: String,
    },
    /// Rows that were found missing from a table may have been added by somebody else meanwhile: they must be compared again.
    #[error(
        "archive table {table}: a copy or a repair has added rows meanwhile ({detail}); nothing was added"
    )]
    Conflict {
        /// The archived table.
        table: String,
        /// What was seen.
        detail: String,
    },
    /// Files were uploaded, and were gone when the log was to name them: their rows are read from Postgres again.
    #[error(
        "archive table {table}: files were removed before its log named them ({detail}); does somebody vacuum without \
         retention? Their rows are read again"
    )]
    Vanished {
        /// The archived table.
        table: String,
        /// What was seen.
        detail: String,
    },
    /// Columns could not be encoded or decoded.
    #[error("{context}")]
    Encode {
        /// What was being done.
        context: String,
        /// The cause.
        source: Box<dyn StdError + Send + Sync>,
    },
    /// A question to the archive can't be answered as it was put.
    #[error("{detail}")]
    Query {
        /// What is wrong with it, and what is accepted.
        detail: String,
    },
    /// Something that must hold did not; always a defect of Highwater, never of its input.
    #[error("internal error: {0}")]
    Internal(String),
}

/// What to do about an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// The cause may pass by itself: try again, with backoff, for ever.
    Retry,
    /// Only a person (or another program) can change the cause: stop, and print the advice.
    Stop {
        /// What the operator can do.
        advice: &'static str,
    },
}

/// What went wrong with a store, from whoever knows more of it than the store's library tells. It is wrapped into
/// the library's errors, and [`Error::policy`] finds it there.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub(crate) struct Verdict {
    /// What is wrong, without secrets.
    pub(crate) detail: String,
    /// What to do about it.
    pub(crate) policy: Policy,
}

impl Error {
    /// What to do about the error.
    #[must_use]
    pub fn policy(&self) -> Policy {
        let stop = |advice| Policy::Stop { advice };
        match self {
            Self::Setting { .. } => stop("correct the setting"),
            Self::Query { .. } => stop("correct the query"),
            Self::Io { source, .. } => io_policy(source),
            Self::Server { code, .. } => server_policy(code),
            Self::Sql { source, .. } => match source.code() {
                Some(code) => server_policy(code.code()),
                None => Policy::Retry,
            },
            Self::Slot { transient: true, .. }
            | Self::Anew { .. }
            | Self::Conflict { .. }
            | Self::Vanished { .. } => Policy::Retry,
            Self::Slot { .. } => stop("run `highwater check`"),
            Self::Protocol { .. } => {
                stop("check that the server is PostgreSQL 15 or later; report this otherwise")
            }
            Self::Storage { source, .. } => storage_policy(source),
            Self::Delta { source, .. } => delta_policy(source),
            Self::Fenced { .. } => stop("nothing is lost; see which process archives now"),
            Self::Encode { .. } | Self::Internal(_) => {
                stop("report this; no row is acknowledged before it is archived")
            }
        }
    }

    /// The server knows no such column.
    pub(crate) fn is_undefined_column(&self) -> bool {
        matches!(self, Self::Server { code, .. } if code == SqlState::UNDEFINED_COLUMN.code())
    }

    /// The server doesn't take the password. Where it is being changed, in the server and in the file, it may soon.
    pub(crate) fn is_refused_password(&self) -> bool {
        let code = match self {
            Self::Server { code, .. } => Some(code.as_str()),
            Self::Sql { source, .. } => source.code().map(SqlState::code),
            _ => None,
        };
        code == Some(SqlState::INVALID_PASSWORD.code())
    }

    /// Whether the error may pass by itself.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        self.policy() == Policy::Retry
    }

    /// The error's text followed by the texts of its causes, separated by colons.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let next = error.to_string();
            // Some libraries repeat their cause in their own text.
            if !text.contains(&next) {
                text.push_str(": ");
                text.push_str(&next);
            }
            cause = error.source();
        }
        text
    }

    /// Wraps a failure of a plain SQL session, keeping the server's message where there is one.
    pub(crate) fn sql(context: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> Self {
        let context = context.into();
        move |source| match source.as_db_error() {
            Some(refusal) => Self::Server {
                context,
                message: [Some(refusal.message()), refusal.detail(), refusal.hint()]
                    .into_iter()
                    .flatten()
                    .collect::<Vec<_>>()
                    .join("; "),
                code: refusal.code().code().to_owned(),
            },
            None => Self::Sql { context, source },
        }
    }

    /// A server's refusal, with what had failed before it was asked in another way.
    pub(crate) fn server_also(error: Self, earlier: &Self) -> Self {
        match error {
            Self::Server { context, message, code } => {
                let message = format!("{message} (and otherwise: {})", earlier.chain());
                Self::Server { context, message, code }
            }
            other => other,
        }
    }

    /// Wraps an I/O failure.
    pub(crate) fn io(context: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let context = context.into();
        move |source| Self::Io { context, source }
    }

    /// Wraps a storage failure.
    pub(crate) fn storage(context: impl Into<String>) -> impl FnOnce(object_store::Error) -> Self {
        let context = context.into();
        move |source| Self::Storage { context, source }
    }
}

fn io_policy(source: &io::Error) -> Policy {
    match source.kind() {
        io::ErrorKind::PermissionDenied => {
            Policy::Stop { advice: "give the process access to the socket or file that the error names" }
        }
        // rustls reports certificates that it refuses this way. What goes wrong after the handshake has another
        // kind (`postgres::Socket`).
        io::ErrorKind::InvalidData => {
            Policy::Stop { advice: "check sslmode, sslrootcert and the server's certificate" }
        }
        _ => Policy::Retry,
    }
}

/// By SQLSTATE class (manual, appendix A): what a restart, a wait or a failover can cure is worth a
/// retry; what needs a grant, a password or another name is not.
fn server_policy(code: &str) -> Policy {
    let advice = match code {
        // Of its class, the others name something that is in use. This one is a setting (`wal_level`) or a slot
        // that was invalidated.
        _ if code == SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE.code() => "run `highwater check`",
        // What PostgreSQL never says of what we send; poolers do, of a session for replication, or of one whose statements
        // are spread over several of the server's.
        "08P01" | "26000" | "42P05" => {
            "DATABASE_URI leads to a pooler that can't be used for this: connect to the server itself, or through a pooler in \
             session mode that knows replication (PgBouncer 1.23)"
        }
        // Answers while a server starts, stops or is being promoted belong to 57P0x; those of a
        // standby that can't write yet, to 25006.
        _ if ["08", "40", "53", "55", "57", "58"].iter().any(|class| code.starts_with(class)) => {
            return Policy::Retry;
        }
        _ if code == SqlState::READ_ONLY_SQL_TRANSACTION.code() => return Policy::Retry,
        _ if code.starts_with("28") => "check the user, the password and pg_hba.conf",
        _ if code == SqlState::INVALID_CATALOG_NAME.code() => "check the database's name",
        _ if code == SqlState::INSUFFICIENT_PRIVILEGE.code() => {
            "run `highwater check`: it names the missing grants"
        }
        _ if ["42", "3F"].iter().any(|class| code.starts_with(class)) => {
            "run `highwater setup`, then `highwater check`"
        }
        _ => "see the server's message, and run `highwater check`",
    };
    Policy::Stop { advice }
}

fn storage_policy(source: &object_store::Error) -> Policy {
    use object_store::Error as Store;
    if let Some(verdict) = cause::<Verdict>(source) {
        return verdict.policy;
    }
    match source {
        Store::PermissionDenied { .. } | Store::Unauthenticated { .. } => Policy::Stop {
            advice: "check the storage credentials, and that they may read, write, list and delete objects below the \
                     storage URI",
        },
        Store::InvalidPath { .. }
        | Store::NotSupported { .. }
        | Store::NotImplemented { .. }
        | Store::UnknownConfigurationKey { .. } => Policy::Stop { advice: "check the storage settings" },
        _ => Policy::Retry,
    }
}

/// The first of an error and its causes that is a `T`.
fn cause<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    error.downcast_ref().or_else(|| cause(error.source()?))
}

fn delta_policy(source: &deltalake_core::DeltaTableError) -> Policy {
    use deltalake_core::DeltaTableError as Delta;
    if let Some(source) = cause(source) {
        return storage_policy(source);
    }
    match source {
        Delta::Kernel { .. } | Delta::KernelError(_) => Policy::Retry,
        _ => Policy::Stop {
            advice: "the table's log can't be used as it is; somebody may have changed the table: go back to a version before that",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(code: &str) -> Error {
        Error::Server { context: "test".into(), message: "no".into(), code: code.into() }
    }

    #[test]
    fn a_restarting_server_is_waited_for_and_a_wrong_password_is_not() {
        for code in ["57P01", "57P03", "53300", "55006", "55P03", "08006", "25006"] {
            assert_eq!(server(code).policy(), Policy::Retry, "{code}");
        }
        for code in ["28P01", "3D000", "42501", "42704", "22023", "55000", "08P01"] {
            assert!(matches!(server(code).policy(), Policy::Stop { .. }), "{code}");
        }
    }

    #[test]
    fn the_chain_names_every_cause_once() {
        let error = Error::io("reading \"x\"")(io::Error::other("disk on fire"));
        assert_eq!(error.to_string(), "reading \"x\"");
        assert_eq!(error.chain(), "reading \"x\": disk on fire");
    }
}
