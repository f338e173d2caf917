//! A store whose requests are counted.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

use super::{Counters, OfOperation};

/// The store, with its requests counted.
pub(crate) fn watched(store: Arc<dyn ObjectStore>, counters: &Counters) -> Arc<dyn ObjectStore> {
    Arc::new(Watched { store, counters: counters.clone() })
}

#[derive(Debug)]
struct Watched {
    store: Arc<dyn ObjectStore>,
    counters: Counters,
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.store.fmt(f)
    }
}

const PUT: &str = "put";
const GET: &str = "get";
const LIST: &str = "list";
const DELETE: &str = "delete";
const COPY: &str = "copy";

/// What a store may be asked to do.
pub(super) const OPERATIONS: [&str; 5] = [PUT, GET, LIST, DELETE, COPY];

/// Whether the store has answered, with whatever: that there is no such object, or that there is one already, are answers.
fn is_answer(error: &Error) -> bool {
    matches!(
        error,
        Error::NotFound { .. }
            | Error::AlreadyExists { .. }
            | Error::Precondition { .. }
            | Error::NotModified { .. }
            | Error::NotImplemented { .. }
    )
}

impl Counters {
    /// A request was answered, or was not.
    fn requested<T>(&self, operation: &'static str, begun: Instant, result: &Result<T>) {
        let of = OfOperation { operation };
        self.storage_requests.get_or_create(&of).inc();
        self.storage_seconds.get_or_create(&of).observe(begun.elapsed().as_secs_f64());
        match result {
            Err(error) if !is_answer(error) => {
                self.storage_errors.get_or_create(&of).inc();
                self.storage_failing.inc();
            }
            _ => {
                self.storage_failing.set(0);
            }
        }
    }
}

impl Watched {
    async fn request<T>(
        &self,
        operation: &'static str,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let begun = Instant::now();
        let result = request.await;
        self.counters.requested(operation, begun, &result);
        result
    }

    /// Counts a stream of answers as one request, when its first one comes, and every error in it.
    fn stream<T: Send + 'static>(
        &self,
        operation: &'static str,
        stream: BoxStream<'static, Result<T>>,
    ) -> BoxStream<'static, Result<T>> {
        let (counters, begun) = (self.counters.clone(), Instant::now());
        let mut is_first = true;
        stream
            .inspect(move |result| {
                if std::mem::take(&mut is_first) || result.is_err() {
                    counters.requested(operation, begun, result);
                }
            })
            .boxed()
    }
}

#[async_trait]
impl ObjectStore for Watched {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let bytes = payload.content_length() as u64;
        let result = self.request(PUT, self.store.put_opts(location, payload, options)).await;
        if result.is_ok() {
            self.counters.uploaded_bytes.inc_by(bytes);
        }
        result
    }

    async fn put_multipart_opts(
        &self,
        location: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.request(PUT, self.store.put_multipart_opts(location, options)).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.request(GET, self.store.get_opts(location, options)).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.request(GET, self.store.get_ranges(location, ranges)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.stream(DELETE, self.store.delete_stream(locations))
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.stream(LIST, self.store.list(prefix))
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        self.stream(LIST, self.store.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.request(LIST, self.store.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.request(COPY, self.store.copy_opts(from, to, options)).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.request(COPY, self.store.rename_opts(from, to, options)).await
    }
}
