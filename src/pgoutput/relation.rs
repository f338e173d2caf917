use super::reader::{DecodeError, Reader};

/// How a table's rows look. Sent before the first row of a table in a connection, and again after its
/// definition has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    /// The table's oid; inserts name it. With `publish_via_partition_root` this is the root's.
    pub oid: u32,
    /// The schema; empty for `pg_catalog`. Names are in the encoding that the session has asked for.
    pub namespace: &'a [u8],
    /// The table's name.
    pub name: &'a [u8],
    /// The published columns, in the order of a row's values.
    pub columns: Vec<Column<'a>>,
}

/// One published column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Column<'a> {
    /// The column's name.
    pub name: &'a [u8],
    /// The oid of its type (`pg_type.oid`).
    pub type_oid: u32,
    /// The modifier of its type (`pg_attribute.atttypmod`), -1 if it has none.
    pub modifier: i32,
}

impl<'a> Relation<'a> {
    pub(super) fn parse(mut reader: Reader<'a>) -> Result<Self, DecodeError> {
        let oid = reader.u32("the relation's oid")?;
        let namespace = reader.zero_ended("the relation's schema")?;
        let name = reader.zero_ended("the relation's name")?;
        reader.u8("the replica identity")?;
        let column_count = reader.u16("the column count")?;
        // A u16 bounds what a hostile count can make us reserve.
        let mut columns = Vec::with_capacity(usize::from(column_count));
        for _ in 0..column_count {
            reader.u8("a column's flags")?;
            let name = reader.zero_ended("a column's name")?;
            let type_oid = reader.u32("a column's type")?;
            let modifier = reader.u32("a column's type modifier")?.cast_signed();
            columns.push(Column { name, type_oid, modifier });
        }
        reader.finish()?;
        Ok(Self { oid, namespace, name, columns })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pgoutput::Message;

    const RELATION: &[u8] = b"R\0\0\x40\x01scouter\0psi_drift\0d\0\x02\
        \0created_at\0\0\0\x04\xa0\xff\xff\xff\xff\x01bin_id\0\0\0\0\x17\xff\xff\xff\xff";

    #[test]
    fn reads_names_and_types() {
        let Ok(Message::Relation(relation)) = Message::parse(RELATION) else { panic!("a relation") };
        assert_eq!(
            (relation.oid, relation.namespace, relation.name),
            (0x4001, &b"scouter"[..], &b"psi_drift"[..])
        );
        let column = |name, type_oid| Column { name, type_oid, modifier: -1 };
        let columns = [column(b"created_at", 1184), column(b"bin_id", 23)];
        assert_eq!(relation.columns, columns);
    }

    #[test]
    fn every_truncation_is_an_error() {
        for end in 1..RELATION.len() {
            assert!(Message::parse(&RELATION[..end]).is_err(), "{end}");
        }
        assert!(Message::parse(&[RELATION, b"x"].concat()).is_err());
    }
}
