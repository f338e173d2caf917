//! What a query prints: its rows as aligned columns, CSV, JSON or an Arrow stream.

use std::fmt::Write as _;
use std::io::{self, BufWriter, Stdout, Write};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow::array::RecordBatch;
use arrow::csv;
use arrow::datatypes::SchemaRef;
use arrow::error::ArrowError;
use arrow::ipc::writer::StreamWriter;
use arrow::json::WriterBuilder;
use arrow::json::writer::JsonArray;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::error::DataFusionError;
use futures::{Stream, TryStreamExt};

use super::OutputFormat;
use crate::error::{Error, Result};

/// Stdout. A reader that has gone away (`| head`) is not an error, and ends the printing.
#[derive(Clone, Default)]
struct Gone(Arc<AtomicBool>);

struct Output {
    out: BufWriter<Stdout>,
    gone: Gone,
}

impl Output {
    fn note(&self, written: io::Result<usize>, length: usize) -> io::Result<usize> {
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                self.gone.0.store(true, Ordering::Relaxed);
                Ok(length)
            }
            written => written,
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes);
        self.note(written, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.out.flush().map(|()| 0);
        self.note(flushed, 0).map(drop)
    }
}

enum Writer {
    Table { rows: Vec<Vec<String>>, out: Output },
    Csv(Box<csv::Writer<Output>>),
    Json(Box<arrow::json::Writer<Output, JsonArray>>),
    Arrow(Box<StreamWriter<Output>>),
}

impl Writer {
    fn new(schema: &SchemaRef, format: OutputFormat, out: Output) -> Result<Self, ArrowError> {
        Ok(match format {
            OutputFormat::Table => {
                let heads = schema.fields().iter().map(|field| shown(&field.name().to_uppercase()));
                Self::Table { rows: vec![heads.collect()], out }
            }
            OutputFormat::Csv => {
                let mut writer = csv::WriterBuilder::new().with_header(true).build(out);
                // The heads, also of a result without rows.
                writer.write(&RecordBatch::new_empty(Arc::clone(schema)))?;
                Self::Csv(Box::new(writer))
            }
            OutputFormat::Json => Self::Json(Box::new(
                WriterBuilder::new().with_explicit_nulls(true).build::<_, JsonArray>(out),
            )),
            OutputFormat::Arrow => Self::Arrow(Box::new(StreamWriter::try_new(out, schema)?)),
        })
    }

    fn write(&mut self, batch: &RecordBatch) -> Result<(), ArrowError> {
        match self {
            Self::Table { rows, .. } => {
                let options = FormatOptions::default().with_null("-");
                let columns = batch.columns().iter();
                let columns: Vec<_> = columns
                    .map(|column| ArrayFormatter::try_new(column, &options))
                    .collect::<Result<_, _>>()?;
                let row = |row| columns.iter().map(|column| shown(&column.value(row).to_string())).collect();
                rows.extend((0..batch.num_rows()).map(row));
                Ok(())
            }
            Self::Csv(writer) => writer.write(batch),
            Self::Json(writer) => writer.write(batch),
            Self::Arrow(writer) => writer.write(batch),
        }
    }

    fn finish(self) -> Result<(), ArrowError> {
        match self {
            Self::Table { rows, mut out } => {
                out.write_all(aligned(&rows).as_bytes())?;
                Ok(out.flush()?)
            }
            Self::Csv(writer) => Ok(writer.into_inner().flush()?),
            Self::Json(mut writer) => {
                writer.finish()?;
                let mut out = writer.into_inner();
                out.write_all(b"\n")?;
                Ok(out.flush()?)
            }
            Self::Arrow(mut writer) => {
                writer.finish()?;
                Ok(writer.into_inner()?.flush()?)
            }
        }
    }
}

/// Prints batches as they come; aligned columns once all are there.
pub(super) async fn print_rows(
    schema: &SchemaRef,
    batches: impl Stream<Item = Result<RecordBatch, DataFusionError>>,
    format: OutputFormat,
) -> Result<()> {
    let failed =
        |error: ArrowError| Error::Encode { context: "printing".to_owned(), source: Box::new(error) };
    let gone = Gone::default();
    let out = Output { out: BufWriter::new(io::stdout()), gone: gone.clone() };
    let mut writer = Writer::new(schema, format, out).map_err(failed)?;
    let mut batches = pin!(batches);
    while let Some(batch) = batches.try_next().await.map_err(Error::query("running the query"))? {
        writer.write(&batch).map_err(failed)?;
        if gone.0.load(Ordering::Relaxed) {
            return Ok(());
        }
    }
    writer.finish().map_err(failed)
}

/// A value for a terminal: without control characters.
fn shown(value: &str) -> String {
    if value.contains(char::is_control) { value.escape_debug().to_string() } else { value.to_owned() }
}

/// Rows in columns as wide as their widest cell.
fn aligned(rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        // Writing to a String can't fail.
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows =
            [["METRIC", "AVG"], ["größe", "1"], ["a", "0.5"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(aligned(&rows), "METRIC  AVG\ngröße   1\na       0.5\n");
        assert_eq!(shown("a\u{1b}[2J"), "a\\u{1b}[2J");
    }
}
