//! A store that counts, and takes its time.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};

/// A store as if it were away: each request waits before it is answered. Ranges are fetched as from object storage, one
/// request for each run of ranges that lie close together.
#[derive(Debug)]
pub(crate) struct Distant<S> {
    inner: S,
    delay: Duration,
    counted: Arc<Counted>,
}

/// Requests so far, and the bytes that were read.
#[derive(Debug, Default)]
pub(crate) struct Counted {
    requests: AtomicU64,
    bytes: AtomicU64,
}

impl Counted {
    pub(crate) fn now(&self) -> (u64, u64) {
        (self.requests.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

impl<S> Distant<S> {
    pub(crate) fn new(inner: S, delay: Duration, counted: Arc<Counted>) -> Self {
        Self { inner, delay, counted }
    }

    async fn request(&self) {
        self.counted.requests.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(self.delay).await;
    }
}

impl<S> fmt::Display for Distant<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("distant")
    }
}

#[async_trait]
impl<S: ObjectStore> ObjectStore for Distant<S> {
    async fn put_opts(&self, at: &Path, bytes: PutPayload, how: PutOptions) -> Result<PutResult> {
        self.request().await;
        self.inner.put_opts(at, bytes, how).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Path,
        how: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.request().await;
        self.inner.put_multipart_opts(at, how).await
    }

    async fn get_opts(&self, at: &Path, how: GetOptions) -> Result<GetResult> {
        self.request().await;
        let is_head = how.head;
        let result = self.inner.get_opts(at, how).await?;
        if !is_head {
            self.counted.bytes.fetch_add(result.range.end - result.range.start, Ordering::Relaxed);
        }
        Ok(result)
    }

    fn delete_stream(&self, paths: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(paths)
    }

    /// One request for all pages.
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.counted.requests.fetch_add(1, Ordering::Relaxed);
        let (delay, listed) = (self.delay, self.inner.list(prefix));
        stream::once(tokio::time::sleep(delay)).flat_map(move |()| stream::empty()).chain(listed).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.request().await;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, how: CopyOptions) -> Result<()> {
        self.request().await;
        self.inner.copy_opts(from, to, how).await
    }
}
