//! A table gets columns: in one log entry, for which nothing older is changed.

use arrow::array::AsArray as _;
use arrow::datatypes::Int64Type;

use super::*;

use crate::archive::{Snapshot, View, described};
use crate::tables::{ColumnSpec, ColumnType};

/// Values of two columns.
type Pair = (Option<i64>, Option<i64>);

fn shade() -> ColumnSpec {
    ColumnSpec {
        source_type: Some("integer".to_owned()),
        attribute: Some("7.9".to_owned()),
        added: true,
        filled: Some(vec![0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 5]),
        ..ColumnSpec::nullable("shade", ColumnType::Long)
    }
}

async fn grown(place: &Place, session: &str) -> Table {
    Table::claim_with(&place.storage, Kind::psi(), APP, session, Lsn(100), &[shade()]).await.unwrap()
}

/// Rows with a shade each.
fn shaded(kind: Kind, rows: &[(i64, Option<i64>)]) -> RecordBatch {
    let narrow = psi(&rows.iter().map(|(time, _)| (*time, "model", 1)).collect::<Vec<_>>());
    let shades = arrow::array::Int64Array::from_iter(rows.iter().map(|row| row.1));
    let mut columns: Vec<ArrayRef> = narrow.columns().to_vec();
    columns.push(Arc::new(shades));
    let schema = kind.schema();
    let fields = schema.fields().iter().zip(&columns);
    let fields =
        fields.map(|(field, column)| field.as_ref().clone().with_data_type(column.data_type().clone()));
    let schema = arrow::datatypes::Schema::new(fields.collect::<Vec<_>>());
    RecordBatch::try_new(Arc::new(schema), columns).unwrap()
}

async fn upload_of(place: &Place, kind: Kind, batch: RecordBatch, lsn: u64) -> DataFile {
    let file = encode(kind, [batch]).unwrap().unwrap();
    let window = Window::of(file.stats.min_time, WindowWidth::DAY);
    upload(&place.storage, kind, place.namer.name(window, Lsn(lsn)), file).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_adds_columns_once_and_everyone_sees_them() {
    let place = Place::new();
    let mut old = place.claim("old").await;
    let view = View::read(&place.storage, Kind::psi()).await.unwrap();
    old.commit(&[place.file(rows(3), 200).await], Lsn(200), &note()).await.unwrap();
    let mut table = grown(&place, "new").await;
    let kind = table.kind();
    assert_eq!(kind.columns().last(), Some(&shade()));
    assert_eq!((table.totals().row_count, table.lsn()), (3, Lsn(200)));
    // Who had claimed it before is out.
    let late = old.commit(&[place.file(rows(1), 300).await], Lsn(300), &note()).await;
    assert!(matches!(late, Err(Error::Fenced { .. })), "{late:?}");
    let file = upload_of(&place, kind, shaded(kind, &[(NOON, Some(4)), (NOON + 1, None)]), 300).await;
    table.commit(&[file], Lsn(300), &note()).await.unwrap();
    // Again, by somebody who knows of them or not: they are there.
    let version = table.version();
    for session in ["same", "again"] {
        assert_eq!(grown(&place, session).await.kind(), kind);
    }
    assert_eq!(place.claim("plain").await.kind(), kind);
    let entries: Vec<String> = (version + 1..=version + 3)
        .map(|version| place.folder.path().join(format!("psi/_delta_log/{version:020}.json")))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    assert!(entries.iter().all(|entry| !entry.contains("metaData")), "{entries:?}");
    assert_eq!(view.newer().await.unwrap().kind(), kind, "a reader that was open");
    assert_eq!(Snapshot::read(&place.storage, Kind::psi(), APP).await.unwrap().kind, kind);
    assert_eq!(described(&place.storage, "psi").await.unwrap(), None, "it still comes with the program");
}

#[tokio::test(flavor = "multi_thread")]
async fn older_rows_have_nulls_also_after_a_merge_and_are_compared_as_what_they_are_in_the_source() {
    let place = Place::new();
    let mut table = place.claim("one").await;
    table.commit(&[place.file(rows(3), 200).await], Lsn(200), &note()).await.unwrap();
    let mut table = {
        drop(std::mem::replace(&mut table, grown(&place, "two").await));
        table
    };
    let kind = table.kind();
    let new = shaded(kind, &[(NOON + 3, Some(4)), (NOON + 4, None), (NOON + 5, Some(5))]);
    let file = upload_of(&place, kind, new.clone(), 300).await;
    table.commit(&[file], Lsn(300), &note()).await.unwrap();
    // In Postgres, the older rows have 5 in it.
    let source = shaded(kind, &[(NOON, Some(5)), (NOON + 1, Some(5)), (NOON + 2, None)]);
    for step in ["apart", "merged"] {
        let files: Vec<&TableFile> = table.files().collect();
        let mut found = Multiset::new(kind);
        found.read(&place.storage, &files, &[(i64::MIN, i64::MAX)]).await.unwrap();
        assert_eq!(found.missing(&source).unwrap().num_rows(), 0, "{step}");
        assert_eq!(found.missing(&new).unwrap().num_rows(), 0, "{step}");
        assert_eq!(found.row_count(), 0, "{step}");
        let sums = hour_sums(&place.storage, kind, &files, (0, i64::MAX / 2), Lsn::ZERO).await.unwrap();
        assert_eq!(sums.values().map(|sum| sum.rows).sum::<u64>(), 6, "{step}");
        if step == "apart" {
            let plans = table.merge_candidates(later(), Duration::ZERO, WindowWidth::DAY);
            let merged = merge(&place.storage, &place.namer, &plans[0]).await.unwrap();
            assert!(table.commit_merge(&merged).await.unwrap());
        }
    }
    let file = table.files().next().unwrap();
    let bytes = std::fs::read(place.folder.path().join("psi").join(&file.path)).unwrap();
    let batches = read(bytes.into());
    let shades: Vec<Option<i64>> = batches
        .iter()
        .flat_map(|batch| {
            batch.column_by_name("shade").unwrap().as_primitive::<Int64Type>().iter().collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(shades, [None, None, None, Some(4), None, Some(5)]);
}

/// A column that was renamed is one column in comparisons; one that is gone is none.
#[tokio::test(flavor = "multi_thread")]
async fn columns_that_are_gone_or_renamed_are_compared_by_what_is_left() {
    use crate::tables::Compared;
    let kind = Kind::psi();
    let all = |compared: [Compared; 2]| {
        let [old, new] = compared;
        let column = |name: &str, compared| ColumnSpec {
            source_type: Some("bigint".to_owned()),
            compared,
            ..ColumnSpec::nullable(name, ColumnType::Long)
        };
        let columns = kind.columns().iter().cloned();
        kind.with(columns.chain([column("old", old), column("new", new)]).collect(), Vec::new())
    };
    let batch = |kind: Kind, rows: &[Pair]| {
        let narrow = psi(&rows.iter().map(|_| (NOON, "model", 1)).collect::<Vec<_>>());
        let column = |of: fn(&Pair) -> Option<i64>| {
            Arc::new(arrow::array::Int64Array::from_iter(rows.iter().map(of))) as ArrayRef
        };
        let named = kind.columns().iter().map(|column| column.name.as_str());
        let columns = narrow.columns().iter().cloned().chain([column(|row| row.0), column(|row| row.1)]);
        RecordBatch::try_from_iter_with_nullable(
            named.zip(columns).map(|(name, column)| (name, column, true)),
        )
        .unwrap()
    };
    let renamed = all([Compared::Not, Compared::Or(vec!["old".to_owned()])]);
    let mut archive = Multiset::new(renamed);
    for (_, digest) in digests_of(renamed, &batch(renamed, &[(Some(1), None), (None, Some(2)), (None, None)]))
    {
        archive.add(digest);
    }
    let source = batch(renamed, &[(None, Some(1)), (None, Some(2)), (None, None)]);
    assert_eq!(archive.missing(&source).unwrap().num_rows(), 0);
    let gone = all([Compared::Not, Compared::Plainly]);
    assert_eq!(
        digests_of(gone, &batch(gone, &[(Some(1), Some(2))])),
        digests_of(gone, &batch(gone, &[(None, Some(2))]))
    );
    assert_ne!(
        digests_of(gone, &batch(gone, &[(Some(1), Some(2))])),
        digests_of(gone, &batch(gone, &[(Some(1), Some(3))]))
    );
}

fn digests_of(kind: Kind, batch: &RecordBatch) -> Vec<(i64, u128)> {
    let mut found = Vec::new();
    each_digest(kind, batch, |time, digest| found.push((time, digest))).unwrap();
    found
}
