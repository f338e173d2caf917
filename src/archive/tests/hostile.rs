//! Archives that somebody else may write into, who means no good.

use object_store::ObjectStoreExt as _;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;
use crate::archive::log::entry::{Entry, entry_path};

/// Mutants of a file and of a log entry; some seconds in all.
const ROUNDS: u32 = 1_000;

/// Memory that a process may have that reads mutants: the most that a column of a row group may unpack to, and a little.
#[cfg(target_os = "linux")]
const MEMORY_MAX: u64 = (1 << 30) + (512 << 20);

/// Whether this is the process that may have no more memory; if not, it has run the test in one, to its good end.
#[cfg(target_os = "linux")]
fn is_limited(test: &str) -> bool {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const MARK: &str = "HOSTILE_ARCHIVE_LIMITED";
    if std::env::var_os(MARK).is_some() {
        let Rlimit { maximum, .. } = getrlimit(Resource::Data);
        setrlimit(Resource::Data, Rlimit { current: Some(MEMORY_MAX), maximum }).unwrap();
        return true;
    }
    let test = format!("archive::tests::hostile::{test}");
    let mut process = std::process::Command::new(std::env::current_exe().unwrap());
    let output = process.args(["--exact", &test, "--nocapture"]).env(MARK, "1").output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{output:?}");
    false
}

#[cfg(not(target_os = "linux"))]
fn is_limited(_: &str) -> bool {
    true
}

/// Puts a file that the log names, as somebody else would.
async fn put(place: &Place, table: &mut Table, path: &str, bytes: Vec<u8>) {
    let store = place.storage.table_store(Kind::psi());
    let entry = add(path, bytes.len() as u64, 5);
    store.put(&Path::from(path), bytes.into()).await.unwrap();
    store.put(&entry_path(table.version() + 1), entry.into()).await.unwrap();
    table.look().await.unwrap();
}

fn add(path: &str, size: u64, rows: u64) -> String {
    let stats = format!(r#"{{\"numRecords\":{rows}}}"#);
    format!(
        r#"{{"add":{{"path":"{path}","partitionValues":{{}},"size":{size},"modificationTime":1,"dataChange":true,"stats":"{stats}"}}}}"#
    )
}

/// Reads a file in each of the ways that there are; the errors.
async fn read_all(place: &Place, path: &str) -> Vec<Error> {
    let view = View::read(&place.storage, Kind::psi()).await.unwrap();
    let files: Vec<&TableFile> = view.files().filter(|file| file.path == path).collect();
    let paths = [path.to_owned()];
    let mut present = Multiset::new(Kind::psi());
    let read = [
        read_through(&place.storage, Kind::psi(), path).await,
        entity_stats(&place.storage, Kind::psi(), &paths).await.map(drop),
        present.read(&place.storage, &files, &[(i64::MIN, i64::MAX)]).await,
        minute_counts(&place.storage, Kind::psi(), &files, &[(i64::MIN, i64::MAX)]).await.map(drop),
        hour_sums(&place.storage, Kind::psi(), &files, (0, i64::MAX / 2), Lsn::ZERO).await.map(drop),
    ];
    read.into_iter().filter_map(Result::err).collect()
}

fn whole() -> Vec<u8> {
    encode(Kind::psi(), [rows(5)]).unwrap().unwrap().bytes.to_vec()
}

/// A file with these last bytes in place of its own.
fn ending(length: u32, magic: &[u8; 4]) -> Vec<u8> {
    let mut bytes = whole();
    bytes.truncate(bytes.len() - 8);
    bytes.extend(length.to_le_bytes());
    bytes.extend(magic);
    bytes
}

/// A file whose footer is this.
fn with_footer(footer: &[u8]) -> Vec<u8> {
    let length = u32::try_from(footer.len()).unwrap();
    [b"PAR1", footer, &length.to_le_bytes(), b"PAR1"].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_are_none_are_named_and_take_no_memory() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let hostile = [
        ending(0x7fff_ffff, b"PAR1"),
        ending(0xffff_ffff, b"PAR1"),
        ending(100, b"PARE"),
        ending(100, b"XXXX"),
        ending(7, b"PAR1"),
        b"PAR1".to_vec(),
        Vec::new(),
        // Two thousand million row groups, by the name of the list.
        with_footer(b"\x15\x02\x19\x1c\x48\x01x\x15\x00\x00\x16\x02\x19\xfc\xff\xff\xff\xff\x07\x00"),
        with_footer(&b"\x1c".repeat(100_000)),
        with_footer(b"\x48\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
    ];
    for (number, bytes) in hostile.into_iter().enumerate() {
        let path = format!("hostile-{number}.parquet");
        put(&place, &mut table, &path, bytes).await;
        let errors = read_all(&place, &path).await;
        assert_eq!(errors.len(), 5, "{path}: {errors:?}");
        for error in errors {
            assert!(error.chain().contains(&path), "{path} is not named: {}", error.chain());
        }
    }
    // One of which the log says that it is larger than anything.
    let store = place.storage.table_store(Kind::psi());
    for size in [i64::MAX as u64, 1 << 40, 0] {
        let path = format!("size-{size}.parquet");
        store.put(&Path::from(path.as_str()), whole().into()).await.unwrap();
        let entry = add(&path, size, 1 << 50);
        store.put(&entry_path(table.version() + 1), entry.into()).await.unwrap();
        table.look().await.unwrap();
        read_all(&place, &path).await;
    }
    let file = place.file(rows(3), 200).await;
    table.commit(&[file], Lsn(200), &note()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_change_of_a_file_makes_its_reader_panic() {
    if !is_limited("no_change_of_a_file_makes_its_reader_panic") {
        return;
    }
    let place = Place::new();
    let mut table = place.claim("one").await;
    let (seed, files) = (rand::random::<u64>(), [whole(), foreign()]);
    put(&place, &mut table, "mutant.parquet", whole()).await;
    let mut random = StdRng::seed_from_u64(seed);
    let store = place.storage.table_store(Kind::psi());
    let (mut refused, path) = (0, "mutant.parquet");
    for round in 0..ROUNDS {
        let mut bytes = files[round as usize % 2].clone();
        // Mostly in the footer, whose length is left alone.
        let start = if round % 4 == 0 { 0 } else { bytes.len() - 8 - footer_length(&bytes) };
        for _ in 0..random.random_range(1..4) {
            let place = random.random_range(start..bytes.len() - 8);
            bytes[place] = if random.random() {
                random.random()
            } else {
                bytes[place] ^ (1 << random.random_range(0..8))
            };
        }
        store.put(&Path::from(path), bytes.into()).await.unwrap();
        let read = read_through(&place.storage, Kind::psi(), path).await;
        let entities = entity_stats(&place.storage, Kind::psi(), &[path.to_owned()]).await;
        for error in [read.err(), entities.err()].into_iter().flatten() {
            assert!(error.chain().contains(path), "seed {seed}: {}", error.chain());
            refused += 1;
        }
    }
    assert!(refused > ROUNDS / 4, "only {refused} of {ROUNDS} were refused: are they mutants?");
}

fn footer_length(file: &[u8]) -> usize {
    let tail: [u8; 4] = file[file.len() - 8..file.len() - 4].try_into().unwrap();
    u32::from_le_bytes(tail) as usize
}

/// A file as others write it: plain texts, no compression, and small pages.
fn foreign() -> Vec<u8> {
    let batch = object_reader::as_ours(rows(50)).unwrap();
    let properties =
        WriterProperties::builder().set_data_page_row_count_limit(10).set_write_batch_size(10).build();
    let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), Some(properties)).unwrap();
    writer.write(&batch).unwrap();
    writer.into_inner().unwrap()
}

#[test]
fn pages_that_unpack_to_too_much_are_refused_before_they_are() {
    let varint = |mut number: u64| {
        let mut bytes = Vec::new();
        while number > 0x7f {
            bytes.push(0x80 | (number & 0x7f) as u8);
            number >>= 7;
        }
        bytes.push(number as u8);
        bytes
    };
    // Type, lengths without and with compression, and a struct that is not read.
    let page = |unpacked: u64| {
        let head = [&b"\x15\x00\x15"[..], &varint(2 * unpacked), b"\x15\x14\x2c\x15\x02\x00\x00"].concat();
        [head.as_slice(), &[0; 10]].concat()
    };
    footer::check_pages(&page(1 << 20).repeat(100)).unwrap();
    for bytes in [page(1_500_000_000), page(600 << 20).repeat(2), page(1 << 62)] {
        let error = footer::check_pages(&bytes).unwrap_err().to_string();
        assert!(error.contains("when unpacked"), "{error}");
    }
    for bytes in [&b""[..], b"x", &[0xff; 100], &[0; 100], &[0x1c; 100]] {
        footer::check_pages(bytes).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_that_lead_out_of_the_table_lead_nowhere() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let store = place.storage.table_store(Kind::psi());
    let secret = place.folder.path().join("secret.parquet");
    std::fs::write(&secret, whole()).unwrap();
    std::fs::write(place.folder.path().join("custom.parquet"), whole()).unwrap();
    let absolute = secret.display().to_string();
    let paths = [
        "../secret.parquet".to_owned(),
        "a/../../secret.parquet".to_owned(),
        "%2e%2e/secret.parquet".to_owned(),
        "%2e%2e%2fsecret.parquet".to_owned(),
        "./../secret.parquet".to_owned(),
        absolute.clone(),
        format!("file://{absolute}"),
        format!("/{absolute}"),
    ];
    for path in paths {
        let entry = add(&path, whole().len() as u64, 5);
        store.put(&entry_path(table.version() + 1), entry.into()).await.unwrap();
        // An entry that can't be read is refused with its table; it is taken back.
        let view = View::read(&place.storage, Kind::psi()).await;
        if let Ok(view) = view {
            for file in view.files() {
                let errors = read_all(&place, &file.path).await;
                assert_eq!(errors.len(), 5, "{path}, as {}: {errors:?}", file.path);
            }
        }
        if table.look().await.is_err() {
            store.delete(&entry_path(table.version() + 1)).await.unwrap();
        }
    }
    assert!(secret.exists());
}

#[test]
fn no_change_of_a_log_entry_makes_its_reader_panic() {
    if !is_limited("no_change_of_a_log_entry_makes_its_reader_panic") {
        return;
    }
    let seed = rand::random::<u64>();
    let mut random = StdRng::seed_from_u64(seed);
    let entry = [
        entry::to_bytes(&entry::creation(Kind::psi(), 1)).to_vec(),
        add("2026/11/22-x.parquet", 10, 5).into_bytes(),
        br#"{"remove":{"path":"a%20b","dataChange":true,"deletionTimestamp":1}}"#.to_vec(),
        br#"{"txn":{"appId":"highwater/7/slot","version":7,"lastUpdated":1}}"#.to_vec(),
    ]
    .join(&b'\n');
    assert!(Entry::parse(Kind::psi(), APP, &entry).is_ok());
    let odd: [&[u8]; 9] = [
        b"null",
        b"-1",
        b"18446744073709551616",
        b"1e999",
        b"[]",
        b"{}",
        b"\"\"",
        b"\"\\ud800\"",
        b"\"9999999999-01-01T00:00:00Z\"",
    ];
    for _ in 0..ROUNDS {
        let mut bytes = entry.clone();
        for _ in 0..random.random_range(1..4) {
            let place = random.random_range(0..bytes.len());
            if random.random() {
                bytes[place] = random.random();
            } else {
                let end = (place + random.random_range(0..20)).min(bytes.len());
                bytes.splice(place..end, odd[random.random_range(0..odd.len())].iter().copied());
            }
        }
        // What it says is for others to judge; here it is enough that somebody can.
        if let Ok(entry) = Entry::parse(Kind::psi(), APP, &bytes) {
            let rows = entry.adds.iter().map(|file| file.row_count.unwrap_or_default() + file.size);
            assert!(rows.sum::<u64>() < 1 << 50, "seed {seed}");
        }
    }
    let deep = format!(r#"{{"add":{}"#, "[".repeat(1_000_000));
    assert!(Entry::parse(Kind::psi(), APP, deep.as_bytes()).is_err());
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread")]
async fn vacuum_follows_no_link() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    let elsewhere = tempfile::tempdir().unwrap();
    // A folder, and a file, by names of ours.
    let orphan = place.file_with(&Namer::new(), rows(1), 200).await.path;
    let (day, name) = orphan.rsplit_once('/').unwrap();
    let kept = elsewhere.path().join(name);
    std::fs::write(&kept, "x").unwrap();
    let psi = place.folder.path().join("psi");
    let (year, month) = day.split_once('/').unwrap();
    let other_month = if month == "01" { "02" } else { "01" };
    let other_name = orphan.replacen(&format!("{year}/{month}"), &format!("{year}/{other_month}"), 1);
    let linked = elsewhere.path().join(other_name.rsplit_once('/').unwrap().1);
    std::fs::write(&linked, "x").unwrap();
    std::os::unix::fs::symlink(elsewhere.path(), psi.join(year).join(other_month)).unwrap();
    place.age(Duration::from_hours(48));
    assert_eq!(table.vacuum(&place.namer, Duration::from_hours(24)).await.unwrap(), 1, "the orphan");
    assert!(!psi.join(&orphan).exists() && kept.exists() && linked.exists());
}
