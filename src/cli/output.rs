//! What a query prints: its rows as aligned columns, CSV, JSON or an Arrow stream.

use std::borrow::Cow;
use std::io::{self, BufWriter, IsTerminal as _, Stdout, Write};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch, StringArray};
use arrow::compute::cast;
use arrow::csv;
use arrow::datatypes::{DataType, FieldRef, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::ipc::writer::StreamWriter;
use arrow::json::WriterBuilder;
use arrow::json::writer::JsonArray;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use datafusion::error::DataFusionError;
use futures::{Stream, TryStreamExt};

use super::OutputFormat;
use super::columns::{aligned, cell};
use crate::error::{Error, Result};
use crate::telemetry::plain;

/// Rows of aligned columns, which are held until all are there, and characters of their cells.
const TABLE_ROWS_MAX: usize = 10_000;
const CELL_MAX: usize = 1_000;

/// How rows are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Style {
    format: OutputFormat,
    /// Texts that a spreadsheet would take for a formula get an apostrophe.
    for_spreadsheet: bool,
}

impl Style {
    /// Refuses what doesn't go together.
    pub(super) fn new(format: OutputFormat, for_spreadsheet: bool) -> Result<Self> {
        let refuse = |setting: &str, value: &str, accepted: &str| {
            let [setting, value, accepted] = [setting, value, accepted].map(str::to_owned);
            Err(Error::Setting { setting, value, accepted })
        };
        if for_spreadsheet && format != OutputFormat::Csv {
            return refuse("--spreadsheet", "given", "only with --format csv");
        }
        if format == OutputFormat::Arrow && io::stdout().is_terminal() {
            return refuse("--format", "arrow", "a file or a program behind it: it is not for a terminal");
        }
        Ok(Self { format, for_spreadsheet })
    }

    pub(super) fn format(self) -> OutputFormat {
        self.format
    }
}

/// Stdout. A reader that has gone away (`| head`) is not an error, and ends the printing.
#[derive(Clone, Default)]
struct Gone(Arc<AtomicBool>);

struct Output {
    out: BufWriter<Stdout>,
    gone: Gone,
    /// What was written of a character, if this is a terminal, which is shown nothing that steers it.
    part: Option<Vec<u8>>,
}

impl Output {
    fn stdout(gone: Gone) -> Self {
        let stdout = io::stdout();
        let part = stdout.is_terminal().then(Vec::new);
        Self { out: BufWriter::new(stdout), gone, part }
    }

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
        let written = match &mut self.part {
            Some(part) => self.out.write_all(whole_characters(part, bytes).as_bytes()).map(|()| bytes.len()),
            None => self.out.write(bytes),
        };
        self.note(written, bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let flushed = self.out.flush().map(|()| 0);
        self.note(flushed, 0).map(drop)
    }
}

/// What a terminal may be shown of bytes, and of those of a character that had begun before; the next one stays in `part`.
fn whole_characters(part: &mut Vec<u8>, bytes: &[u8]) -> String {
    part.extend_from_slice(bytes);
    let begun = match std::str::from_utf8(part) {
        Err(error) if error.error_len().is_none() => part.split_off(error.valid_up_to()),
        _ => Vec::new(),
    };
    let whole = std::mem::replace(part, begun);
    plain(&String::from_utf8_lossy(&whole)).into_owned()
}

/// With an apostrophe before what a spreadsheet would run (OWASP, "CSV Injection").
fn without_formula(text: &str) -> Cow<'_, str> {
    if text.starts_with(['=', '+', '-', '@', '\t', '\r', '\n']) {
        Cow::Owned(format!("'{text}"))
    } else {
        Cow::Borrowed(text)
    }
}

fn heads_without_formulas(schema: &SchemaRef) -> SchemaRef {
    let renamed = |field: &FieldRef| field.as_ref().clone().with_name(without_formula(field.name()));
    Arc::new(Schema::new(schema.fields().iter().map(renamed).collect::<Vec<_>>()))
}

fn cells_without_formulas(batch: &RecordBatch) -> Result<RecordBatch, ArrowError> {
    let mended = |(field, column): (&FieldRef, &ArrayRef)| -> Result<(FieldRef, ArrayRef), ArrowError> {
        let text = match column.data_type() {
            DataType::Dictionary(_, values) => values.as_ref(),
            other => other,
        };
        if !matches!(text, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) {
            return Ok((Arc::clone(field), Arc::clone(column)));
        }
        let texts = cast(column, &DataType::Utf8)?;
        let texts: StringArray =
            texts.as_string::<i32>().iter().map(|text| text.map(without_formula)).collect();
        Ok((Arc::new(field.as_ref().clone().with_data_type(DataType::Utf8)), Arc::new(texts)))
    };
    let schema = heads_without_formulas(&batch.schema());
    let columns = schema.fields().iter().zip(batch.columns()).map(mended);
    let (fields, columns): (Vec<_>, Vec<_>) = columns.collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns)
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
                let heads = schema.fields().iter().map(|field| cell(&field.name().to_uppercase(), CELL_MAX));
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
                let row = |row| {
                    columns.iter().map(|column| cell(&column.value(row).to_string(), CELL_MAX)).collect()
                };
                rows.extend((0..batch.num_rows()).map(row));
                Ok(())
            }
            Self::Csv(writer) => writer.write(batch),
            Self::Json(writer) => writer.write(batch),
            Self::Arrow(writer) => writer.write(batch),
        }
    }

    /// Whether aligned columns have more rows than are shown.
    fn is_full(&self) -> bool {
        matches!(self, Self::Table { rows, .. } if rows.len() > TABLE_ROWS_MAX + 1)
    }

    fn finish(self) -> Result<(), ArrowError> {
        match self {
            Self::Table { mut rows, mut out } => {
                // And the heads.
                rows.truncate(TABLE_ROWS_MAX + 1);
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

/// Prints batches as they come; aligned columns once all are there, or as many as people look at.
pub(super) async fn print_rows(
    schema: &SchemaRef,
    batches: impl Stream<Item = Result<RecordBatch, DataFusionError>>,
    style: Style,
) -> Result<()> {
    let failed =
        |error: ArrowError| Error::Encode { context: "printing".to_owned(), source: Box::new(error) };
    let gone = Gone::default();
    let heads = if style.for_spreadsheet { heads_without_formulas(schema) } else { Arc::clone(schema) };
    let mut writer = Writer::new(&heads, style.format, Output::stdout(gone.clone())).map_err(failed)?;
    let mut batches = pin!(batches);
    while let Some(batch) = batches.try_next().await.map_err(Error::asked("running the query"))? {
        let batch =
            if style.for_spreadsheet { cells_without_formulas(&batch).map_err(failed)? } else { batch };
        writer.write(&batch).map_err(failed)?;
        if gone.0.load(Ordering::Relaxed) {
            return Ok(());
        }
        if writer.is_full() {
            break;
        }
    }
    let is_cut = writer.is_full();
    writer.finish().map_err(failed)?;
    if is_cut {
        let note = format!("highwater: these are the first {TABLE_ROWS_MAX} rows; --format csv prints all\n");
        // Nothing can be done when stderr is gone.
        let _ = io::stderr().lock().write_all(note.as_bytes());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use arrow::array::Int64Array;

    use super::*;

    #[test]
    fn a_character_in_two_parts_is_one() {
        let mut part = Vec::new();
        let bytes = "a\u{9b}größe\u{1b}[0m\u{202e}".as_bytes();
        let shown: String =
            bytes.iter().map(|byte| whole_characters(&mut part, std::slice::from_ref(byte))).collect();
        assert_eq!(shown, r"a\u009bgröße\u001b[0m\u202e");
        assert_eq!(whole_characters(&mut part, b"\xff."), "\u{fffd}.");
        assert!(part.is_empty());
    }

    #[test]
    fn a_spreadsheet_gets_no_formulas() {
        let texts = ["=1+1", "+1", "-1", "@x", "\t=1", "plain", ""];
        let batch = RecordBatch::try_from_iter([
            ("=HEAD", Arc::new(StringArray::from(texts.to_vec())) as ArrayRef),
            ("n", Arc::new(Int64Array::from(vec![-1; texts.len()])) as ArrayRef),
        ])
        .unwrap();
        let mended = cells_without_formulas(&batch).unwrap();
        assert_eq!(mended.schema().field(0).name(), "'=HEAD");
        let column: Vec<_> = mended.column(0).as_string::<i32>().iter().flatten().collect();
        assert_eq!(column, ["'=1+1", "'+1", "'-1", "'@x", "'\t=1", "plain", ""]);
        assert_eq!(mended.column(1), batch.column(1), "numbers are numbers");
    }
}
