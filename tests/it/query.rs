//! Binned queries answer what Postgres answers over the same rows.

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeZone as _, Utc};
use highwater::Archive;
use highwater::config::ObjectStorageSettings;
use highwater::reader::{BinnedQuery, Bins};
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

/// What is asked, and the start of a row's bin in SQL, as microseconds since the epoch.
struct Asked {
    query: BinnedQuery,
    bin: String,
}

/// Bins of a length, of which those of days count from a Monday, in SQL.
fn length_sql(micros: i64) -> String {
    let origin = if micros % DAY == 0 { 4 * DAY } else { 0 };
    format!(
        "(floor((extract(epoch from created_at) * 1000000 - {origin}) / {micros}) * {micros} + {origin})::bigint"
    )
}

/// Bins of the calendar, in SQL.
fn calendar_sql(unit: &str, zone: &str) -> String {
    format!("(extract(epoch from date_trunc('{unit}', created_at, '{zone}')) * 1000000)::bigint")
}

/// The grouping of the rows that a query asks for, in SQL: `$1` to `$5` are its parameters.
fn grouped(kind: Source, asked: &Asked, series: &str, values: &str, keys: &str) -> String {
    let bin = &asked.bin;
    format!(
        "select {series} as series, {bin} as bin, {values}
           from scouter.{} where space = $1 and name = $2 and version = $3
            and created_at >= 'epoch'::timestamptz + $4::bigint * interval '1 microsecond'
            and created_at <  'epoch'::timestamptz + $5::bigint * interval '1 microsecond'
          group by 1, 2 {keys}",
        kind.table()
    )
}

async fn ask(client: &Client, sql: &str, asked: &Asked) -> Vec<tokio_postgres::Row> {
    let Entity { space, name, version } = asked.query.entity();
    let (start, end) = asked.query.range();
    client.query(sql, &[space, name, version, &start, &end]).await.unwrap()
}

/// How many values there are, how many nulls, how many that are no numbers, and the bounds of the others.
const COUNTS: &str = "count(value)::float8, (count(*) - count(value))::float8, (count(*) filter (where value = 'NaN'))::float8,
    coalesce(min(value) filter (where value <> 'NaN'), 'NaN'), coalesce(max(value) filter (where value <> 'NaN'), 'NaN')";

type Series<T> = BTreeMap<String, Vec<(i64, T)>>;

async fn series_of_postgres<const N: usize>(client: &Client, sql: &str, asked: &Asked) -> Series<[f64; N]> {
    let mut found = Series::new();
    for row in ask(client, sql, asked).await {
        let values = std::array::from_fn(|place| row.get(2 + place));
        found.entry(row.get(0)).or_default().push((row.get(1), values));
    }
    found
}

async fn custom_of_postgres(client: &Client, asked: &Asked) -> Series<[f64; 8]> {
    let spread = "coalesce(stddev_samp(value), 0)";
    let values = format!("avg(value), avg(value) - {spread}, avg(value) + {spread}, {COUNTS}");
    let sql = grouped(Source::Custom, asked, "metric", &values, "having count(value) > 0 order by 1, 2");
    series_of_postgres(client, &sql, asked).await
}

async fn spc_of_postgres(client: &Client, asked: &Asked) -> Series<[f64; 6]> {
    let values = format!("avg(value), {COUNTS}");
    let sql = grouped(
        Source::Spc,
        asked,
        "coalesce(feature, '')",
        &values,
        "having count(value) > 0 order by 1, 2",
    );
    series_of_postgres(client, &sql, asked).await
}

type Proportions = BTreeMap<i32, f64>;

/// By feature: the proportions of each bin of time, and the overall ones.
async fn psi_of_postgres(
    client: &Client,
    asked: &Asked,
) -> BTreeMap<String, (Vec<(i64, Proportions)>, Proportions)> {
    let counts = grouped(Source::Psi, asked, "feature", "bin_id, sum(bin_count) as n", ", bin_id");
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
    for row in ask(client, &sql, asked).await {
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

async fn compare(archive: &Archive, client: &Client, asked: &Asked) -> usize {
    let query = &asked.query;
    let micros = |times: &[DateTime<Utc>]| times.iter().map(DateTime::timestamp_micros).collect::<Vec<_>>();
    let custom = archive.binned_custom(query).await.unwrap();
    let found = custom.metrics.into_iter().map(|(name, metric)| {
        assert_eq!(name, metric.metric);
        let stats = metric.stats.iter().map(|stats| {
            let counts = [stats.count, stats.nulls, stats.nans].map(|count| count as f64);
            let [count, nulls, nans] = counts;
            [stats.avg, stats.lower_bound, stats.upper_bound, count, nulls, nans, stats.min, stats.max]
        });
        (name, micros(&metric.created_at).into_iter().zip(stats).collect())
    });
    let wanted = custom_of_postgres(client, asked).await;
    assert_close(&found.collect(), &wanted, query);

    let spc = archive.binned_spc(query).await.unwrap();
    let found = spc.features.into_iter().map(|(name, feature)| {
        let values = (0..feature.values.len()).map(|at| {
            let [count, nulls, nans] =
                [&feature.counts, &feature.nulls, &feature.nans].map(|counts| counts[at] as f64);
            [feature.values[at], count, nulls, nans, feature.min[at], feature.max[at]]
        });
        let values: Vec<_> = values.collect();
        (name, micros(&feature.created_at).into_iter().zip(values).collect())
    });
    assert_close(&found.collect(), &spc_of_postgres(client, asked).await, query);

    let psi = archive.binned_psi(query).await.unwrap();
    let found: BTreeMap<_, _> = psi
        .into_iter()
        .map(|feature| {
            let bins = micros(&feature.created_at).into_iter().zip(feature.bin_proportions).collect();
            (feature.feature, (bins, feature.overall_proportions))
        })
        .collect();
    assert_eq!(found, psi_of_postgres(client, asked).await, "{query:?}");
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
        let of_length = |width: i64| {
            let bins = Bins::new(Duration::from_micros(u64::try_from(width).unwrap())).unwrap();
            (bins, length_sql(width))
        };
        let of_calendar = |unit: &str, bins: &str, zone: &str| {
            (bins.parse::<Bins>().unwrap().in_zone(zone).unwrap(), calendar_sql(unit, zone))
        };
        for (range, (width, bin)) in [
            (day, of_length(HOUR)),
            (day, of_length(7 * MINUTE)),
            (edge, of_length(7 * MINUTE)),
            (between, of_length(3 * MINUTE + 1)),
            (between, of_length(5 * HOUR)),
            (years, of_length(400 * DAY)),
            ((NOON, NOON + 1), of_length(MINUTE)),
            (years, of_calendar("day", "1d", "UTC")),
            (years, of_calendar("day", "1d", "Europe/Berlin")),
            (years, of_calendar("week", "1w", "America/New_York")),
            (years, of_calendar("week", "7d", "UTC")),
            (years, of_calendar("month", "1mo", "Asia/Kolkata")),
            (years, of_calendar("year", "1y", "America/Sao_Paulo")),
            (years, of_calendar("hour", "1h", "Asia/Kathmandu")),
        ] {
            for name in ENTITIES {
                let query = BinnedQuery::new(entity(name), time(range.0), time(range.1), width).unwrap();
                bins += compare(archive, &client, &Asked { query, bin: bin.clone() }).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn bins_of_the_calendar_are_those_of_postgres() {
    let stage = Stage::shared(Shape::Entity).await;
    let client = stage.connect().await;
    let seed = rand::random();
    eprintln!("query: seed {seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    // Twenty years, and the hours around changes of clocks.
    let mut times: Vec<i64> =
        (0..5_000).map(|_| rng.random_range(NOON - 10 * 365 * DAY..NOON + 10 * 365 * DAY)).collect();
    for change in
        [1_774_746_000_000_000_i64, 1_792_890_000_000_000, 1_772_953_200_000_000, 1_541_300_400_000_000]
    {
        times.extend((0..500).map(|_| change + rng.random_range(-2 * DAY..2 * DAY)));
    }
    for zone in [
        "UTC",
        "Europe/Berlin",
        "America/New_York",
        "Asia/Kolkata",
        "America/Sao_Paulo",
        "Africa/Cairo",
        "Pacific/Auckland",
    ] {
        for (unit, written) in [
            ("day", "1d"),
            ("week", "1w"),
            ("month", "1mo"),
            ("quarter", "3mo"),
            ("year", "1y"),
            ("hour", "1h"),
            ("minute", "1m"),
        ] {
            let sql = "select (extract(epoch from date_trunc($1, 'epoch'::timestamptz + t * interval '1 microsecond', $2)) * 1000000)::bigint
                       from unnest($3::bigint[]) with ordinality u(t, n) order by n";
            let wanted = client.query(sql, &[&unit, &zone, &times]).await.unwrap();
            let bins = written.parse::<Bins>().unwrap().in_zone(zone).unwrap();
            for (at, row) in times.iter().zip(wanted) {
                assert_eq!(
                    time(bins.start_of(*at)),
                    time(row.get(0)),
                    "{written} of {} in {zone}",
                    time(*at)
                );
            }
        }
    }
}
