//! Footers and pages of Parquet files, looked at before they are decoded. Whoever may write into the archive may have written
//! them, and the library reserves memory for whatever number it reads.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use parquet::arrow::arrow_reader::ArrowReaderOptions;
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::errors::{ParquetError, Result};
use parquet::file::FOOTER_SIZE;
use parquet::file::metadata::{
    ColumnChunkMetaData, FooterTail, PageIndexPolicy, ParquetMetaData, ParquetMetaDataReader,
};

/// Bytes of a file's end that hold the footer and the page index of most files: one request instead of two.
const TAIL_BYTES: u64 = 64 << 10;
/// Longest footer, and longest page index. Ours take some KB for each row group.
const FOOTER_BYTES_MAX: u64 = 64 << 20;
/// What a column of a row group may have when it is unpacked: more than any of ours, which come from checkpoints of half that.
const UNPACKED_BYTES_MAX: u64 = 1 << 30;

/// Reads the footer of a file of so many bytes, and its page index if that is wanted.
///
/// # Errors
///
/// Storage fails, or the file is none that can be read within bounds.
pub(in crate::archive) async fn load(
    reader: &mut (dyn AsyncFileReader + Send),
    size: u64,
    with_index: bool,
) -> Result<ParquetMetaData> {
    let too_short = || refused(format!("it has {size} bytes"));
    if size < FOOTER_SIZE as u64 {
        return Err(too_short());
    }
    let mut seen = Seen { reader, pieces: Vec::new() };
    let tail = seen.get(size.saturating_sub(TAIL_BYTES)..size).await?;
    let last = tail.last_chunk::<FOOTER_SIZE>().ok_or_else(too_short)?;
    let footer = FooterTail::try_new(last)?;
    let (length, rest) = (footer.metadata_length() as u64, size.saturating_sub(FOOTER_SIZE as u64));
    if footer.is_encrypted_footer() {
        return Err(refused("it is encrypted".to_owned()));
    }
    if length > rest.min(FOOTER_BYTES_MAX) {
        return Err(refused(format!("its footer claims {length} bytes, and the file has {size}")));
    }
    let bytes = seen.get(rest - length..rest).await?;
    Thrift::check(&bytes)?;
    let metadata = guarded(|| ParquetMetaDataReader::decode_metadata(&bytes))?;
    let chunks = metadata.row_groups().iter().flat_map(|group| group.columns());
    chunks.into_iter().try_for_each(|chunk| check_chunk(chunk, size))?;
    if with_index { seen.index(metadata, size).await } else { Ok(metadata) }
}

/// Refuses pages that would take too much memory when they are unpacked, whatever the footer has told. `bytes` begin with a page;
/// what is none is for the library to refuse.
pub(in crate::archive) fn check_pages(bytes: &[u8]) -> Result<()> {
    let (mut rest, mut unpacked) = (bytes, 0_u64);
    while !rest.is_empty() {
        let mut header = Thrift { rest, top: [None; 2] };
        let (Ok(()), [Some(unpacked_length), Some(length)]) = (header.value(Thrift::STRUCT, 0), header.top)
        else {
            break;
        };
        unpacked = unpacked.saturating_add(unpacked_length);
        let Some(next) = usize::try_from(length).ok().and_then(|length| header.rest.get(length..)) else {
            break;
        };
        rest = next;
    }
    within_bound("its pages", unpacked)
}

/// Runs the library's own code over bytes of others: it may still meet something that it has not thought of.
///
/// # Errors
///
/// Those of the code, and if it panics.
pub(in crate::archive) fn guarded<T>(decode: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|_| Err(refused("it can't be decoded".to_owned())))
}

/// As [`guarded`], for what waits.
///
/// # Errors
///
/// Those of the code, and if it panics.
pub(in crate::archive) async fn guarded_async<T>(decode: impl Future<Output = Result<T>>) -> Result<T> {
    AssertUnwindSafe(decode)
        .catch_unwind()
        .await
        .unwrap_or_else(|_| Err(refused("it can't be decoded".to_owned())))
}

fn refused(detail: String) -> ParquetError {
    ParquetError::General(format!("not a Parquet file that can be read: {detail}"))
}

fn within_bound(what: &str, bytes: u64) -> Result<()> {
    if bytes <= UNPACKED_BYTES_MAX {
        return Ok(());
    }
    Err(refused(format!("{what} have {bytes} bytes when unpacked, more than {UNPACKED_BYTES_MAX}")))
}

fn check_chunk(chunk: &ColumnChunkMetaData, size: u64) -> Result<()> {
    let is_within = |offset: i64, length: i64| {
        let end = u64::try_from(offset).ok().zip(u64::try_from(length).ok());
        end.and_then(|(offset, length)| offset.checked_add(length)).is_some_and(|end| end <= size)
    };
    let start = chunk.dictionary_page_offset().unwrap_or_else(|| chunk.data_page_offset());
    let indexes = [
        (chunk.column_index_offset(), chunk.column_index_length()),
        (chunk.offset_index_offset(), chunk.offset_index_length()),
        (chunk.bloom_filter_offset(), chunk.bloom_filter_length()),
    ];
    let is_whole = is_within(start, chunk.compressed_size())
        && is_within(chunk.data_page_offset(), 0)
        && indexes.into_iter().all(|(offset, length)| {
            is_within(offset.unwrap_or_default(), i64::from(length.unwrap_or_default()))
        })
        && chunk.num_values() >= 0;
    let path = chunk.column_path();
    if !is_whole {
        return Err(refused(format!("its column {path} is not within its {size} bytes")));
    }
    within_bound(
        &format!("pages of column {path}"),
        u64::try_from(chunk.uncompressed_size()).unwrap_or(u64::MAX),
    )
}

/// The ranges of a column's page indexes.
fn indexes(chunk: &ColumnChunkMetaData) -> impl Iterator<Item = Range<u64>> {
    let range = |offset: Option<i64>, length: Option<i32>| {
        let start = u64::try_from(offset?).ok()?;
        Some(start..start + u64::try_from(length?).ok()?)
    };
    let column = range(chunk.column_index_offset(), chunk.column_index_length());
    let offset = range(chunk.offset_index_offset(), chunk.offset_index_length());
    column.into_iter().chain(offset)
}

/// A file of which some pieces were read.
struct Seen<'a> {
    reader: &'a mut (dyn AsyncFileReader + Send),
    pieces: Vec<(u64, Bytes)>,
}

impl Seen<'_> {
    async fn get(&mut self, range: Range<u64>) -> Result<Bytes> {
        let known = self.pieces.iter().find_map(|(start, bytes)| {
            let from = usize::try_from(range.start.checked_sub(*start)?).ok()?;
            let upto = usize::try_from(range.end.checked_sub(*start)?).ok()?;
            (from <= upto && upto <= bytes.len()).then(|| bytes.slice(from..upto))
        });
        if let Some(bytes) = known {
            return Ok(bytes);
        }
        let length = range.end.saturating_sub(range.start);
        let bytes = self.reader.get_bytes(range.clone()).await?;
        if bytes.len() as u64 != length {
            return Err(refused(format!("it is shorter than {} bytes", range.end)));
        }
        self.pieces.push((range.start, bytes.clone()));
        Ok(bytes)
    }

    async fn index(&mut self, metadata: ParquetMetaData, size: u64) -> Result<ParquetMetaData> {
        let ranges: Vec<Range<u64>> =
            metadata.row_groups().iter().flat_map(|group| group.columns()).flat_map(indexes).collect();
        let start = ranges.iter().map(|range| range.start).min();
        let end = ranges.iter().map(|range| range.end).max();
        let Some((start, end)) = start.zip(end).filter(|(start, end)| start < end) else {
            return Ok(metadata);
        };
        if end - start > FOOTER_BYTES_MAX {
            return Err(refused(format!("its page index has {} of its {size} bytes", end - start)));
        }
        self.get(start..end).await?;
        for range in ranges.into_iter().filter(|range| !range.is_empty()) {
            Thrift::check(&self.get(range).await?)?;
        }
        let mut reader = ParquetMetaDataReader::new_with_metadata(metadata)
            .with_page_index_policy(PageIndexPolicy::Optional);
        guarded_async(reader.load_page_index(&mut *self)).await?;
        reader.finish()
    }
}

impl AsyncFileReader for Seen<'_> {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, Result<Bytes>> {
        self.get(range).boxed()
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, Result<std::sync::Arc<ParquetMetaData>>> {
        self.reader.get_metadata(options)
    }
}

/// Bytes in Thrift's compact protocol, in which footers and the heads of pages are written.
struct Thrift<'a> {
    rest: &'a [u8],
    /// Fields 2 and 3 of the outermost struct, if they are numbers: of a page's head, its lengths without and with compression.
    top: [Option<u64>; 2],
}

impl Thrift<'_> {
    const STRUCT: u8 = 12;
    const DEPTH_MAX: u8 = 24;
    /// More than there are row groups, columns or pages in any file.
    const LIST_MAX: u64 = 1 << 20;

    /// Makes sure that bytes are a struct, in which no list is longer than what is left of them.
    fn check(bytes: &[u8]) -> Result<()> {
        let mut thrift = Thrift { rest: bytes, top: [None; 2] };
        thrift.value(Self::STRUCT, 0).map_err(|detail| refused(detail.to_owned()))
    }

    fn skip(&mut self, length: u64) -> Result<(), &'static str> {
        let rest = usize::try_from(length).ok().and_then(|length| self.rest.get(length..));
        self.rest = rest.ok_or("its footer ends inside a value")?;
        Ok(())
    }

    fn byte(&mut self) -> Result<u8, &'static str> {
        let (byte, rest) = self.rest.split_first().ok_or("its footer ends inside a struct")?;
        self.rest = rest;
        Ok(*byte)
    }

    fn number(&mut self) -> Result<u64, &'static str> {
        let mut number = 0;
        for shift in (0..70).step_by(7) {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or_default();
            if byte & 0x80 == 0 {
                return Ok(number);
            }
        }
        Err("its footer has a number without end")
    }

    fn count(&mut self, count: u64) -> Result<u64, &'static str> {
        // Each element takes a byte at least.
        let is_possible = count <= Self::LIST_MAX && count <= self.rest.len() as u64;
        if is_possible { Ok(count) } else { Err("its footer has a list that is longer than itself") }
    }

    fn value(&mut self, kind: u8, depth: u8) -> Result<(), &'static str> {
        if depth > Self::DEPTH_MAX {
            return Err("its footer is too deep");
        }
        match kind {
            // The kind of a field is its value.
            1 | 2 => Ok(()),
            3 => self.skip(1),
            4..=6 => self.number().map(drop),
            7 => self.skip(8),
            8 => {
                let length = self.number()?;
                self.skip(length)
            }
            9 | 10 => self.list(depth),
            11 => self.map(depth),
            Self::STRUCT => self.fields(depth),
            13 => self.skip(16),
            _ => Err("its footer has a value of unknown type"),
        }
    }

    fn element(&mut self, kind: u8, depth: u8) -> Result<(), &'static str> {
        match kind {
            1 | 2 => self.skip(1),
            kind => self.value(kind, depth),
        }
    }

    fn list(&mut self, depth: u8) -> Result<(), &'static str> {
        let head = self.byte()?;
        let count = match head >> 4 {
            15 => self.number()?,
            short => u64::from(short),
        };
        (0..self.count(count)?).try_for_each(|_| self.element(head & 15, depth + 1))
    }

    fn map(&mut self, depth: u8) -> Result<(), &'static str> {
        let count = self.number()?;
        if count == 0 {
            return Ok(());
        }
        let kinds = self.byte()?;
        for _ in 0..self.count(count)? {
            self.element(kinds >> 4, depth + 1)?;
            self.element(kinds & 15, depth + 1)?;
        }
        Ok(())
    }

    fn fields(&mut self, depth: u8) -> Result<(), &'static str> {
        let mut id = 0;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Ok(());
            }
            id = match head >> 4 {
                0 => self.number()? / 2,
                step => id + u64::from(step),
            };
            let kind = head & 15;
            match (depth, kind, id) {
                (0, 5, 2 | 3) => {
                    let zigzag = self.number()?;
                    // A negative length is as good as one without end.
                    let number = if zigzag % 2 == 0 { zigzag / 2 } else { u64::MAX };
                    if let Some(place) = self.top.get_mut(usize::from(id == 3)) {
                        *place = Some(number);
                    }
                }
                _ => self.value(kind, depth + 1)?,
            }
        }
    }
}
