//! Binned queries answer what Postgres answers over the same rows.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeZone as _, Utc};
use highwater::Archive;
use highwater::config::ObjectStorageSettings;
use highwater::reader::{BinWidth, BinnedQuery};
use highwater::tables::{Entity, Kind};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio_postgres::Client;

use crate::support::schema::{Shape, Source};
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// The middle of the dense rows: noon of a day, microseconds.
const NOON: i64 = 1_795_435_200_000_000;
const MINUTE: i64 = 60_000_000;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

const ENTITIES: [(&str, &str, &str); 3] =
    [("shop", "ranking", "1.0.0"), ("shop", "ranking", "1.1.0"), ("bank", "it's \"credit\"", "größe")];

async fn open(stage: &Stage) -> Archive {
    let settings = ObjectStorageSettings::new(stage.storage().to_str().unwrap(), "").unwrap();
    Archive::open(&settings).await.unwrap()
}

/// A time on the grid of common bins more often than chance would have it: most within three days, some over decades.
fn random_time(rng: &mut StdRng) -> i64 {
    let near = NOON + rng.random_range(-36 * HOUR..36 * HOUR);
    match rng.random_range(0..200) {
        0 => rng.random_range(-40 * 365 * DAY..NOON),
        1..40 => near - near.rem_euclid(7 * MINUTE),
        40..60 => near - near.rem_euclid(HOUR) - i64::from(rng.random_bool(0.5)),
        _ => near,
    }
}

fn random_value(rng: &mut StdRng) -> Option<f64> {
    match rng.random_range(0..2_000) {
        0 => Some(f64::NAN),
        1 => Some(f64::INFINITY),
        2 => Some(f64::NEG_INFINITY),
        3..200 => None,
        _ => Some(rng.random_range(1.0..1_000.0)),
    }
}

/// Inserts so many rows, all in one transaction; those that hit a unique constraint are left out.
async fn insert(client: &Client, kind: Source, rng: &mut StdRng, count: usize) {
    let (mut times, mut entities, mut series) = (Vec::new(), Vec::new(), Vec::new());
    let (mut values, mut ids, mut counts) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..count {
        times.push(random_time(rng));
        entities.push(i32::try_from(rng.random_range(1..=ENTITIES.len())).unwrap());
        series.push(["age", "income", "ünï'code"][rng.random_range(0..3)].to_owned());
        values.push(random_value(rng));
        ids.push(rng.random_range(0..5_i32));
        counts.push(if rng.random_bool(0.2) { 0 } else { rng.random_range(0..10_000_i32) });
    }
    let (columns, chosen) = match kind {
        Source::Custom => ("metric, value", "s, v"),
        Source::Psi => ("feature, bin_id, bin_count", "s, i, c"),
        Source::Spc => ("feature, value", "nullif(s, 'age'), v"),
    };
    let sql = format!(
        "insert into scouter.{} (created_at, space, name, version, {columns})
         select 'epoch'::timestamptz + t * interval '1 microsecond', spaces[e], names[e], versions[e], {chosen}
         from unnest($1::bigint[], $2::int[], $3::text[], $4::float8[], $5::int[], $6::int[]) as r(t, e, s, v, i, c),
              (select $7::text[] as spaces, $8::text[] as names, $9::text[] as versions) as entity
         on conflict do nothing",
        kind.table()
    );
    let names = |of: fn(&(&str, &str, &str)) -> String| ENTITIES.iter().map(of).collect::<Vec<_>>();
    let (spaces, versions) = (names(|entity| entity.0.to_owned()), names(|entity| entity.2.to_owned()));
    let named = names(|entity| entity.1.to_owned());
    client
        .execute(&sql, &[&times, &entities, &series, &values, &ids, &counts, &spaces, &named, &versions])
        .await
        .unwrap();
}

fn entity((space, name, version): (&str, &str, &str)) -> Entity {
    Entity { space: space.to_owned(), name: name.to_owned(), version: version.to_owned() }
}

fn time(micros: i64) -> DateTime<Utc> {
    Utc.timestamp_micros(micros).unwrap()
}

/// The grouping of the rows that a query asks for, in SQL: `$1` to `$6` are its parameters.
fn grouped(kind: Source, series: &str, values: &str, keys: &str) -> String {
    format!(
        "select {series} as series,
                (floor(extract(epoch from created_at) * 1000000 / $6::bigint) * $6::bigint)::bigint as bin, {values}
           from scouter.{} where space = $1 and name = $2 and version = $3
            and created_at >= 'epoch'::timestamptz + $4::bigint * interval '1 microsecond'
            and created_at <  'epoch'::timestamptz + $5::bigint * interval '1 microsecond'
          group by 1, 2 {keys}",
        kind.table()
    )
}

async fn ask(client: &Client, sql: &str, query: &BinnedQuery) -> Vec<tokio_postgres::Row> {
    let Entity { space, name, version } = query.entity();
    let (start, end) = query.range();
    client.query(sql, &[space, name, version, &start, &end, &query.width().micros()]).await.unwrap()
}

type Series<T> = BTreeMap<String, Vec<(i64, T)>>;

async fn custom_of_postgres(client: &Client, query: &BinnedQuery) -> Series<[f64; 3]> {
    let sql = grouped(
        Source::Custom,
        "metric",
        "avg(value), avg(value) - coalesce(stddev_samp(value), 0), avg(value) + coalesce(stddev_samp(value), 0)",
        "having count(value) > 0 order by 1, 2",
    );
    let mut found = Series::new();
    for row in ask(client, &sql, query).await {
        found.entry(row.get(0)).or_default().push((row.get(1), [row.get(2), row.get(3), row.get(4)]));
    }
    found
}

async fn spc_of_postgres(client: &Client, query: &BinnedQuery) -> Series<[f64; 1]> {
    let sql =
        grouped(Source::Spc, "coalesce(feature, '')", "avg(value)", "having count(value) > 0 order by 1, 2");
    let mut found = Series::new();
    for row in ask(client, &sql, query).await {
        found.entry(row.get(0)).or_default().push((row.get(1), [row.get(2)]));
    }
    found
}

type Proportions = BTreeMap<i32, f64>;

/// By feature: the proportions of each bin of time, and the overall ones.
async fn psi_of_postgres(
    client: &Client,
    query: &BinnedQuery,
) -> BTreeMap<String, (Vec<(i64, Proportions)>, Proportions)> {
    let counts = grouped(Source::Psi, "feature", "bin_id, sum(bin_count) as n", ", bin_id");
    let sql = format!(
        "with counts as ({counts}),
              parts as (select *, sum(n) over (partition by series, bin) as total from counts),
              overall as (select series, bin_id, sum(n)::float8 as n, sum(sum(n)) over (partition by series) as total
                            from counts group by 1, 2)
         select series, bin, bin_id, n::float8 / total::float8 from parts where total <> 0
         union all
         select series, null, bin_id, n / total::float8 from overall where total <> 0
         order by 1, 2, 3"
    );
    let mut found: BTreeMap<String, (Vec<(i64, Proportions)>, Proportions)> = BTreeMap::new();
    for row in ask(client, &sql, query).await {
        let (bins, overall) = found.entry(row.get(0)).or_default();
        let (id, part) = (row.get(2), row.get(3));
        match row.get::<_, Option<i64>>(1) {
            None => _ = overall.insert(id, part),
            Some(bin) => {
                if bins.last().is_none_or(|(last, _)| *last != bin) {
                    bins.push((bin, Proportions::new()));
                }
                bins.last_mut().unwrap().1.insert(id, part);
            }
        }
    }
    found
}

/// Equal but for rounding: to 1e-12 of the largest of the numbers.
fn assert_close<const N: usize>(found: &Series<[f64; N]>, wanted: &Series<[f64; N]>, query: &BinnedQuery) {
    assert_eq!(found.keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>(), "{query:?}");
    for (name, wanted) in wanted {
        let found = &found[name];
        let bins = |series: &[(i64, [f64; N])]| series.iter().map(|(bin, _)| *bin).collect::<Vec<_>>();
        assert_eq!(bins(found), bins(wanted), "{name:?} of {query:?}");
        for ((bin, found), (_, wanted)) in found.iter().zip(wanted) {
            let scale = wanted.iter().fold(0.0_f64, |most, value| most.max(value.abs()));
            let is_same =
                |(a, b): (&f64, &f64)| a == b || (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-12 * scale;
            assert!(
                found.iter().zip(wanted).all(is_same),
                "{found:?} {wanted:?}: {name:?} {bin} of {query:?}"
            );
        }
    }
}

async fn compare(archive: &Archive, client: &Client, query: &BinnedQuery) -> usize {
    let micros = |times: &[DateTime<Utc>]| times.iter().map(DateTime::timestamp_micros).collect::<Vec<_>>();
    let custom = archive.binned_custom(query).await.unwrap();
    let found = custom.metrics.into_iter().map(|(name, metric)| {
        assert_eq!(name, metric.metric);
        let stats = metric.stats.iter().map(|stats| [stats.avg, stats.lower_bound, stats.upper_bound]);
        (name, micros(&metric.created_at).into_iter().zip(stats).collect())
    });
    let wanted = custom_of_postgres(client, query).await;
    assert_close(&found.collect(), &wanted, query);

    let spc = archive.binned_spc(query).await.unwrap();
    let found = spc.features.into_iter().map(|(name, feature)| {
        let values = feature.values.iter().map(|value| [*value]);
        (name, micros(&feature.created_at).into_iter().zip(values).collect())
    });
    assert_close(&found.collect(), &spc_of_postgres(client, query).await, query);

    let psi = archive.binned_psi(query).await.unwrap();
    let found: BTreeMap<_, _> = psi
        .into_iter()
        .map(|feature| {
            let bins = micros(&feature.created_at).into_iter().zip(feature.bin_proportions).collect();
            (feature.feature, (bins, feature.overall_proportions))
        })
        .collect();
    assert_eq!(found, psi_of_postgres(client, query).await, "{query:?}");
    wanted.values().map(Vec::len).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_those_of_postgres() {
    let seed =
        std::env::var("QUERY_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(rand::random);
    eprintln!("query: QUERY_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let stage = Stage::shared(Shape::Named).await;
    let mut sidecar = stage.start().await;
    let client = stage.connect().await;
    let mut archive = None;
    for round in 0..2 {
        for kind in [Source::Custom, Source::Psi, Source::Spc] {
            insert(&client, kind, &mut rng, 4_000).await;
        }
        // Late rows come in the second round: the archive moves on to them.
        stage.assert_archived(DEADLINE).await;
        let archive: &Archive = match &archive {
            None => archive.insert(open(&stage).await),
            Some(archive) => {
                assert!(archive.refresh().await.unwrap());
                // Merges may still bring newer versions.
                until("nothing is newer", DEADLINE, async || {
                    (!archive.refresh().await.unwrap()).then_some(())
                })
                .await;
                archive
            }
        };
        let (day, years) = ((NOON - DAY, NOON), (NOON - 50 * 365 * DAY, NOON + 2 * DAY));
        let edge = (NOON - NOON.rem_euclid(7 * MINUTE), NOON - NOON.rem_euclid(7 * MINUTE) + 21 * MINUTE);
        let between = (NOON - 5 * HOUR + 1, NOON + 3 * HOUR + 12_345);
        let mut bins = 0;
        for (range, width) in [
            (day, HOUR),
            (day, 7 * MINUTE),
            (edge, 7 * MINUTE),
            (between, 3 * MINUTE + 1),
            (between, 5 * HOUR),
            (years, DAY),
            (years, 400 * DAY),
            ((NOON, NOON + 1), MINUTE),
        ] {
            let width = BinWidth::new(Duration::from_micros(u64::try_from(width).unwrap())).unwrap();
            for name in ENTITIES {
                let query = BinnedQuery::new(entity(name), time(range.0), time(range.1), width).unwrap();
                bins += compare(archive, &client, &query).await;
            }
        }
        assert!(bins > 1_000, "round {round}: {bins} bins are no test");
    }
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_t_be_answered_is_told() {
    let stage = Stage::shared(Shape::Entity).await;
    let settings = ObjectStorageSettings::new(stage.storage().to_str().unwrap(), "").unwrap();
    let nothing = Archive::open(&settings).await.unwrap_err();
    assert!(nothing.to_string().contains("nothing was archived there"), "{nothing}");
    assert!(!stage.storage().exists(), "a reader made the folder");

    let mut sidecar = stage.start().await;
    let client = stage.connect().await;
    stage.insert_one(&client, "accuracy", Some(0.5)).await;
    stage.assert_archived(DEADLINE).await;
    let archive = open(&stage).await;
    let known = entity(("tests", "model", "1.0.0"));
    let query =
        BinnedQuery::with_points(known.clone(), time(0), Utc::now() + Duration::from_secs(60), 10).unwrap();
    let found = archive.binned_custom(&query).await.unwrap();
    assert_eq!(found.metrics["accuracy"].stats.len(), 1);
    // "last" has only a null.
    assert_eq!(found.metrics.len(), 1);
    assert!(
        archive
            .binned_custom(&query.clone().of_series(["other".to_owned()]))
            .await
            .unwrap()
            .metrics
            .is_empty()
    );
    assert_eq!(
        archive.binned_custom(&query.clone().of_series(["accuracy".to_owned()])).await.unwrap(),
        found
    );
    let before = BinnedQuery::with_points(known.clone(), time(0), time(HOUR), 10).unwrap();
    assert!(archive.binned_custom(&before).await.unwrap().metrics.is_empty());
    archive.check_entity(Kind::custom(), &known).await.unwrap();
    let unknown =
        archive.check_entity(Kind::custom(), &entity(("tests", "mdel", "1.0.0"))).await.unwrap_err();
    assert_eq!(
        unknown.to_string(),
        "the archive has no custom records of \"tests\", \"mdel\", \"1.0.0\" (space, name, version); \
         did you mean \"tests\", \"model\", \"1.0.0\"?"
    );
    let unknown = archive.check_entity(Kind::psi(), &known).await.unwrap_err().to_string();
    assert!(unknown.contains("no psi records") && !unknown.contains("did you mean"), "{unknown}");

    let entities = archive.entities(Kind::custom()).await.unwrap();
    assert_eq!(
        entities.iter().map(|found| (found.name.as_str(), found.rows)).collect::<Vec<_>>(),
        [("model", 2)]
    );
    let rows = archive.sql("select metric from custom where name = 'model' order by 1").await.unwrap();
    assert_eq!(rows.count().await.unwrap(), 2);
    for refused in [
        "select nothing from custom",
        "select * from other",
        "selec",
        "create table x as select 1",
        "drop table custom",
        "insert into custom select * from custom",
        "copy custom to '/tmp/highwater-must-not-write.csv'",
        "set datafusion.execution.batch_size = 1",
        "select * from '/etc/passwd'",
    ] {
        let error = archive.sql(refused).await.err().unwrap_or_else(|| panic!("{refused}"));
        assert!(matches!(error, highwater::Error::Query { .. }), "{refused}: {error:?}");
    }
    assert!(sidecar.terminate(DEADLINE).await.success(), "{}", sidecar.log());
}
