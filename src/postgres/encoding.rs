use tokio_postgres::Client;

use crate::error::{Error, Result};

/// How a database keeps its texts (manual 24.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Encoding {
    /// What the server sends is UTF-8.
    Utf8,
    /// `SQL_ASCII`: bytes that nobody has looked at, mostly UTF-8.
    Unknown,
    /// Another one. Some of its characters may not be in UTF-8.
    Other,
}

impl Encoding {
    /// By the name that `getdatabaseencoding()` gives.
    pub(crate) fn of_name(name: &str) -> Self {
        match name {
            "UTF8" => Self::Utf8,
            "SQL_ASCII" => Self::Unknown,
            _ => Self::Other,
        }
    }

    /// The encoding of the session's database.
    ///
    /// # Errors
    ///
    /// The query failed.
    pub(crate) async fn of_database(client: &Client) -> Result<Self> {
        let context = "reading the database's encoding";
        let row = client.query_one("select getdatabaseencoding()::text", &[]).await;
        let name: String = row.and_then(|row| row.try_get(0)).map_err(Error::sql(context))?;
        Ok(Self::of_name(&name))
    }

    /// How a stream is to send texts from such a database: what the session of the stream must be told first, and how its texts
    /// then are.
    ///
    /// A text that the server can't convert would end the stream, at every start. So texts come as the database has them; but not
    /// where the publication's name, which is sent to the server in the same encoding, would be misread.
    pub(crate) fn streamed(self, publication: &str) -> (Option<&'static str>, Self) {
        match self {
            Self::Other if !publication.is_ascii() => (None, Self::Utf8),
            Self::Utf8 => (None, self),
            Self::Unknown | Self::Other => (Some("set client_encoding = 'SQL_ASCII'"), self),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_that_may_not_be_convertible_come_as_they_are() {
        let streamed = |name: &str, publication: &str| {
            let (statement, texts) = Encoding::of_name(name).streamed(publication);
            (statement.is_some(), texts)
        };
        assert_eq!(streamed("UTF8", "p"), (false, Encoding::Utf8));
        assert_eq!(streamed("SQL_ASCII", "größe"), (true, Encoding::Unknown));
        assert_eq!(streamed("WIN1252", "p"), (true, Encoding::Other));
        assert_eq!(streamed("WIN1252", "größe"), (false, Encoding::Utf8));
    }
}
