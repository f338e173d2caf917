//! Rows from a fixed seed, and the frames in which a walsender sends them.

use bytes::{BufMut as _, Bytes, BytesMut};
use highwater::pgoutput::POSTGRES_EPOCH_MICROS;
use highwater::postgres::Chunk;
use highwater::tables::Entity;
use rand::rngs::StdRng;
use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};

/// 2026-11-22T13:30:00Z, the end of the rows' times. Fixed, so that no run crosses a window's end that another does not.
pub(crate) const NOW: i64 = 1_795_354_200_000_000;

const SEED: u64 = 20_261_122;
const MINUTE: i64 = 60_000_000;
const ENTITY_COUNT: usize = 5;
const SERIES_COUNT: usize = 20;
const BIN_COUNT: i32 = 10;
const MINUTE_COUNT: i64 = 200;

/// Rows of an input; some three hours of five models with 20 features of 10 bins.
pub(crate) const ROW_COUNT: usize = 200_000;

/// Rows of a transaction.
const TRANSACTION_ROWS: usize = 1_000;

const RELATION_OID: u32 = 0x4001;

/// `pg_type.oid`
const TIMESTAMPTZ: u32 = 1184;
const TEXT: u32 = 25;
const INT4: u32 = 23;
const FLOAT8: u32 = 701;
const BOOL: u32 = 16;

/// One row, of whatever kind.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    /// Position in [`Input::entities`].
    pub(crate) entity: usize,
    pub(crate) created_at: i64,
    /// Position in [`Input::series`].
    pub(crate) series: usize,
    pub(crate) bin_id: i32,
    pub(crate) bin_count: i32,
    pub(crate) value: f64,
}

#[derive(Debug)]
pub(crate) struct Input {
    pub(crate) entities: Vec<Entity>,
    pub(crate) series: Vec<String>,
    pub(crate) rows: Vec<Row>,
    rng: StdRng,
}

/// A drift table in one of its shapes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Table {
    PsiById,
    PsiNamed,
    CustomById,
}

impl Table {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::PsiById => "psi by entity_id",
            Self::PsiNamed => "psi by names",
            Self::CustomById => "custom by entity_id",
        }
    }

    fn table_name(self) -> &'static str {
        if self == Self::CustomById { "custom_drift" } else { "psi_drift" }
    }

    fn columns(self) -> Vec<(&'static str, u32)> {
        let mut columns = vec![("created_at", TIMESTAMPTZ)];
        columns.extend_from_slice(match self {
            Self::PsiNamed => &[("name", TEXT), ("space", TEXT), ("version", TEXT)],
            Self::PsiById | Self::CustomById => &[("entity_id", INT4)],
        });
        columns.extend_from_slice(match self {
            Self::CustomById => &[("metric", TEXT), ("value", FLOAT8)],
            _ => &[("feature", TEXT), ("bin_id", INT4), ("bin_count", INT4)],
        });
        columns.extend([("updated_at", TIMESTAMPTZ), ("archived", BOOL)]);
        columns
    }
}

impl Input {
    /// Rows in the order in which one writer inserts them: by minute, entity, feature, bin.
    pub(crate) fn new() -> Self {
        let mut rng = StdRng::seed_from_u64(SEED);
        let entities: Vec<Entity> = (0..ENTITY_COUNT)
            .map(|number| Entity {
                space: ["shop", "bank"][number % 2].to_owned(),
                name: format!("model {number}"),
                version: "1.0.0".to_owned(),
            })
            .collect();
        let series = (0..SERIES_COUNT).map(|number| format!("feature_{number}")).collect();
        let mut rows = Vec::with_capacity(ROW_COUNT);
        for minute in 1 - MINUTE_COUNT..=0 {
            for entity in 0..ENTITY_COUNT {
                for series in 0..SERIES_COUNT {
                    rows.extend((0..BIN_COUNT).map(|bin_id| Row {
                        entity,
                        created_at: NOW + minute * MINUTE,
                        series,
                        bin_id,
                        bin_count: rng.random_range(0..1_000),
                        value: rng.random_range(-3.0..3.0),
                    }));
                }
            }
        }
        assert_eq!(rows.len(), ROW_COUNT);
        Self { entities, series, rows, rng }
    }

    /// The worst order: no row follows one of its own entity or time, but by chance.
    pub(crate) fn shuffled(mut self) -> Self {
        self.rows.shuffle(&mut self.rng);
        self
    }

    /// The rows as a walsender sends them: frames of pgoutput's binary form, in transactions.
    pub(crate) fn stream(&self, table: Table) -> Chunk {
        let mut out = BytesMut::new();
        frame(&mut out, |out| relation(out, table));
        for (number, rows) in (1_u64..).zip(self.rows.chunks(TRANSACTION_ROWS)) {
            let lsn = number << 20;
            frame(&mut out, |out| {
                out.put_u8(b'B');
                out.put_u64(lsn);
                out.put_i64(NOW - POSTGRES_EPOCH_MICROS);
                out.put_u32(u32::try_from(number).expect("a transaction id"));
            });
            for row in rows {
                frame(&mut out, |out| self.insert(out, table, row));
            }
            frame(&mut out, |out| {
                out.put_slice(b"C\0");
                out.put_u64(lsn);
                out.put_u64(lsn + 48);
                out.put_i64(NOW - POSTGRES_EPOCH_MICROS);
            });
        }
        Chunk::new(Bytes::from(out))
    }

    fn insert(&self, out: &mut BytesMut, table: Table, row: &Row) {
        out.put_u8(b'I');
        out.put_u32(RELATION_OID);
        out.put_u8(b'N');
        out.put_u16(u16::try_from(table.columns().len()).expect("few columns"));
        let time = (row.created_at - POSTGRES_EPOCH_MICROS).to_be_bytes();
        value(out, &time);
        if table == Table::PsiNamed {
            let Entity { space, name, version } = &self.entities[row.entity];
            for text in [name, space, version] {
                value(out, text.as_bytes());
            }
        } else {
            value(out, &(i32::try_from(row.entity).expect("few entities") + 1).to_be_bytes());
        }
        value(out, self.series[row.series].as_bytes());
        if table == Table::CustomById {
            value(out, &row.value.to_be_bytes());
        } else {
            value(out, &row.bin_id.to_be_bytes());
            value(out, &row.bin_count.to_be_bytes());
        }
        value(out, &time);
        value(out, &[0]);
    }
}

fn value(out: &mut BytesMut, bytes: &[u8]) {
    out.put_u8(b'b');
    out.put_u32(u32::try_from(bytes.len()).expect("a short value"));
    out.put_slice(bytes);
}

fn relation(out: &mut BytesMut, table: Table) {
    out.put_u8(b'R');
    out.put_u32(RELATION_OID);
    for text in ["scouter", table.table_name()] {
        out.put_slice(text.as_bytes());
        out.put_u8(0);
    }
    out.put_u8(b'd');
    let columns = table.columns();
    out.put_u16(u16::try_from(columns.len()).expect("few columns"));
    for (name, oid) in columns {
        out.put_u8(0);
        out.put_slice(name.as_bytes());
        out.put_u8(0);
        out.put_u32(oid);
        out.put_i32(-1);
    }
}

/// A message in its `XLogData` in its `CopyData`.
fn frame(out: &mut BytesMut, write: impl FnOnce(&mut BytesMut)) {
    let start = out.len();
    out.put_slice(b"d\0\0\0\0w");
    out.put_slice(&[0; 24]);
    write(out);
    let length = u32::try_from(out.len() - start - 1).expect("a short frame");
    out[start + 1..start + 5].copy_from_slice(&length.to_be_bytes());
}
