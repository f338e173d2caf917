//! The stores of settings, and S3 in the place of the disk.

use super::*;
use crate::config::ObjectStorageSettings;

/// moto's server on a free port; ends with the value.
struct Moto {
    server: std::process::Child,
    port: u16,
}

impl Moto {
    async fn start() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // As the integration tests have it; `scripts/setup stores` installs it.
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/");
        let server = std::process::Command::new(format!("{root}target/stores/bin/python"))
            .arg(format!("{root}tests/support/serial_moto.py"))
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let moto = Self { server, port };
        for _ in 0..600 {
            let created = std::process::Command::new("curl")
                .args(["-sf", "-X", "PUT", &format!("http://127.0.0.1:{port}/bucket")])
                .output()
                .unwrap();
            if created.status.success() {
                return moto;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        panic!("moto's server did not start");
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_holds_on_s3() {
    let moto = Moto::start().await;
    let store = object_store::aws::AmazonS3Builder::new()
        .with_endpoint(format!("http://127.0.0.1:{}", moto.port))
        .with_allow_http(true)
        .with_bucket_name("bucket")
        .with_region("us-east-1")
        .with_access_key_id("test")
        .with_secret_access_key("test")
        .build()
        .unwrap();
    let storage = Storage::from_store(Arc::new(store), "s3://bucket/some/prefix/").unwrap();
    storage.probe().await.unwrap();
    let namer = Namer::new();
    let mut old = Table::claim(&storage, Kind::psi(), APP, "old", Lsn(1)).await.unwrap();
    for lsn in 2..=4 {
        let file = encode(Kind::psi(), [rows(1000)]).unwrap().unwrap();
        let path = namer.name(Window::of(NOON, WindowWidth::DAY), Lsn(lsn));
        let file = upload(&storage, Kind::psi(), path, file).await.unwrap();
        old.commit(&[file], Lsn(lsn), &note()).await.unwrap();
    }
    let mut new = Table::claim(&storage, Kind::psi(), APP, "new", Lsn(1)).await.unwrap();
    assert_eq!(
        (new.lsn(), new.totals()),
        (Lsn(4), Totals { max_created_at: Some(NOON + 1000), ..old.totals() })
    );
    assert!(matches!(old.commit(&[], Lsn(5), &note()).await, Err(Error::Fenced { .. })));
    let plans = new.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
    let merged = merge(&storage, &namer, &plans[0]).await.unwrap();
    assert!(new.commit_merge(&merged).await.unwrap());
    let paths: Vec<String> = new.files().map(|file| file.path.clone()).collect();
    assert_eq!(entity_stats(&storage, Kind::psi(), &paths).await.unwrap()[0].row_count, 3000);
}

#[test]
fn local_settings_open_a_storage() {
    let folder = tempfile::tempdir().unwrap();
    let settings = ObjectStorageSettings::new(&format!("file://{}/x", folder.path().display()), "").unwrap();
    let storage = Storage::open(&settings).unwrap();
    assert!(storage.table_url(Kind::psi()).as_str().ends_with("/x/psi/"));
}
