use super::reader::{DecodeError, Reader};

/// The tag of [`Value::Long`], which no server writes: the value's length follows, and no value.
pub(crate) const LONG_TAG: u8 = b'L';
/// What the length of a null is in a binary copy (-1).
pub(crate) const NULL_COPIED: u32 = u32::MAX;
/// What stands in place of the length of a [`Value::Long`] of a binary copy (-2); its length follows, and no value.
pub(crate) const LONG_COPIED: u32 = u32::MAX - 1;

/// The values of one row, still encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple<'a> {
    column_count: u16,
    bytes: &'a [u8],
    copied: Option<&'a [bool]>,
}

/// One value of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// SQL null.
    Null,
    /// An out-of-line value that an update did not touch, and the log does not have; never in an insert.
    Unchanged,
    /// The output of the type's text function.
    Text(&'a [u8]),
    /// The output of the type's send function.
    Binary(&'a [u8]),
    /// One that was left out when its row arrived, because the row is longer than the memory allows: its length in bytes.
    Long(u32),
}

impl<'a> Tuple<'a> {
    #[inline]
    pub(super) fn parse(mut reader: Reader<'a>) -> Result<Self, DecodeError> {
        let column_count = reader.u16("the column count")?;
        Ok(Self { column_count, bytes: reader.rest(), copied: None })
    }

    /// Reads a row that another one follows: its values are passed over.
    pub(super) fn parse_first(reader: &mut Reader<'a>) -> Result<Self, DecodeError> {
        let column_count = reader.u16("the column count")?;
        let all = reader.rest();
        let mut values = Values { remaining: column_count, reader: *reader, copied: None, done: false };
        for _ in 0..column_count {
            values.read()?;
        }
        let length = all.len() - values.reader.rest().len();
        Ok(Self { column_count, bytes: reader.take(length, "a row's values")?, copied: None })
    }

    /// A row of a binary copy (manual, `COPY`, "Binary Format"), whose values come without a tag: it says of each column
    /// whether its value is to be taken for the output of the text function.
    pub(crate) const fn copied(column_count: u16, bytes: &'a [u8], is_text: &'a [bool]) -> Self {
        Self { column_count, bytes, copied: Some(is_text) }
    }

    /// How many values the row says it has.
    #[must_use]
    pub const fn column_count(self) -> u16 {
        self.column_count
    }

    /// The values in column order. Ends after the first error; left-over bytes are one.
    #[must_use]
    #[inline]
    pub const fn values(self) -> Values<'a> {
        let reader = Reader::new(self.bytes);
        Values { remaining: self.column_count, reader, copied: self.copied, done: false }
    }
}

/// Iterator over the values of a [`Tuple`].
#[derive(Clone, Debug)]
pub struct Values<'a> {
    remaining: u16,
    reader: Reader<'a>,
    /// Of a binary copy, what is left of its columns.
    copied: Option<&'a [bool]>,
    done: bool,
}

impl<'a> Values<'a> {
    #[inline]
    fn read(&mut self) -> Result<Value<'a>, DecodeError> {
        if let Some(columns) = self.copied {
            let (is_text, rest) = columns.split_first().unwrap_or((&false, &[]));
            self.copied = Some(rest);
            let length = self.reader.u32("a value's length")?;
            match length {
                NULL_COPIED => return Ok(Value::Null),
                LONG_COPIED => return self.reader.u32("a value's length").map(Value::Long),
                _ => {}
            }
            let bytes = self.reader.take(length as usize, "a value")?;
            return Ok(if *is_text { Value::Text(bytes) } else { Value::Binary(bytes) });
        }
        let tag = self.reader.u8("a value's tag")?;
        match tag {
            b'n' => Ok(Value::Null),
            b'u' => Ok(Value::Unchanged),
            LONG_TAG => self.reader.u32("a value's length").map(Value::Long),
            b't' | b'b' => {
                let length = self.reader.u32("a value's length")?;
                // On every supported platform a usize holds 32 bits.
                let bytes = self.reader.take(length as usize, "a value")?;
                Ok(if tag == b'b' { Value::Binary(bytes) } else { Value::Text(bytes) })
            }
            tag => Err(DecodeError::UnknownTag { field: "value", tag }),
        }
    }
}

impl<'a> Iterator for Values<'a> {
    type Item = Result<Value<'a>, DecodeError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let Some(remaining) = self.remaining.checked_sub(1) else {
            self.done = true;
            return self.reader.finish().err().map(Err);
        };
        self.remaining = remaining;
        let value = self.read();
        self.done = value.is_err();
        Some(value)
    }
}
