//! How far the archive reaches, and what there is to say of it: what `--watermarks`, the HTTP server and the page show.
//!
//! [`Look`] is what one look at Postgres has found, [`Document`] its JSON form. An [`Observer`] looks again and again for as long
//! as an archiver runs, so that whoever asks has an answer at once, also when nobody else answers.

mod coverage;
mod document;
mod look;
mod metrics;
mod observer;
mod probe;

pub(crate) use coverage::PartitionCover;
pub(crate) use document::Document;
pub(crate) use look::Look;
pub(crate) use observer::{Check, Observer, Sample, register_process};
