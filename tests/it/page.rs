//! The page in a real browser, over real archives. Pictures of it are kept in `target/screenshots`.

use std::time::Duration;

use crate::support::browser::Browser;
use crate::support::http::Site;
use crate::support::schema::Shape;
use crate::support::sidecar::Sidecar;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

const WIDE: (u32, u32) = (1280, 900);
const NARROW: (u32, u32) = (360, 740);

/// A name that would run, if the page let it.
const HOSTILE: &str = "<img src=x onerror=\"document.title='run'\">\u{202e}gpj";

/// Three weeks of three models, one of which has a hostile name.
const ROWS: &str = "
    insert into scouter.drift_entities (space, name, version)
        values ('shop', 'ranking', '1.0.0'), ('shop', 'ranking', '1.1.0'), ('bank', $$NAME$$, '7') on conflict do nothing;
    insert into scouter.custom_drift (created_at, entity_id, metric, value)
        select t, e.id, m, 0.9 + 0.05 * sin(extract(epoch from t) / 40000 + e.id)
        from generate_series(now() - interval '21 days', now() - interval '1 hour', interval '30 min') t,
             unnest(array['accuracy', 'latency']) m, scouter.drift_entities e;
    insert into scouter.psi_drift (created_at, entity_id, feature, bin_id, bin_count)
        select t, e.id, 'age', b, 50 + 10 * b
        from generate_series(now() - interval '21 days', now() - interval '1 hour', interval '2 hours') t,
             generate_series(0, 9) b, scouter.drift_entities e;
    insert into scouter.spc_drift (created_at, entity_id, feature, value)
        select t, e.id, 'age', sin(extract(epoch from t) / 90000)
        from generate_series(now() - interval '21 days', now() - interval '1 hour', interval '2 hours') t, scouter.drift_entities e";

/// An archive of these rows, and a sidecar that goes on.
async fn archived(stage: &Stage) -> (Sidecar, Site) {
    stage.connect().await.batch_execute(&ROWS.replace("NAME", HOSTILE)).await.unwrap();
    let sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    let site = Site::of(&sidecar).await;
    until("it is ready", DEADLINE, async || (site.get("/readyz").await.status == 200).then_some(())).await;
    (sidecar, site)
}

/// Makes sure that the page has complained about nothing, and has asked nobody else.
fn assert_quiet(browser: &Browser, site: &Site) {
    assert_eq!(browser.errors(), Vec::<String>::new());
    let others: Vec<String> = browser
        .requests()
        .into_iter()
        .filter(|url| !url.starts_with(&site.url) && !url.starts_with("blob:") && !url.starts_with("data:"))
        .collect();
    assert_eq!(others, Vec::<String>::new());
}

/// Finds a model by a part of its name, and chooses the first of so many.
async fn choose(browser: &mut Browser, part: &str, found: u32) {
    browser.click("[data-test=model-search]");
    browser.write(part);
    let options = format!("document.querySelectorAll('[data-test=model-option]').length === {found}");
    browser.until("it is narrowed down", &options).await;
    browser.press("Enter", 13);
    browser.until("it is chosen", "document.querySelector('[data-test=chip]')").await;
    browser.press("Escape", 27);
    browser.ready().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_state_is_shown_at_every_size_and_in_both_themes() {
    let stage = Stage::shared(Shape::Entity).await;
    let (_sidecar, site) = archived(&stage).await;
    let mut browser = Browser::start();
    for (size, width) in [(WIDE, "wide"), (NARROW, "narrow")] {
        for (is_dark, theme) in [(false, "light"), (true, "dark")] {
            browser.look(size, is_dark);
            browser.open(&format!("{}/", site.url));
            browser
                .until(
                    "the page is there",
                    "location.pathname === '/ui/' && document.querySelector('[data-test=headline]')",
                )
                .await;
            browser.ready().await;
            browser
                .until(
                    "all is well",
                    "document.querySelector('[data-test=headline]').dataset.level !== 'error'",
                )
                .await;
            browser.shoot(&format!("state-{width}-{theme}"));
            let overflow =
                browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth");
            assert_eq!(overflow, 0, "{width}");
        }
    }
    browser.look(WIDE, false);
    let tables = browser.run("document.querySelectorAll('[data-test=tables] tr[data-table]').length");
    assert_eq!(tables, 3);
    // Each day of the three weeks is archived, as one reads at a glance.
    let days = browser
        .run("document.querySelectorAll('[data-test=day][data-table=custom][data-kind=archived]').length");
    assert!(days.as_u64() >= Some(20), "{days}");
    browser.click("[data-test=day][data-table=custom][data-kind=archived]");
    browser.until("a click shows the history of the day", "location.hash.startsWith('#/history')").await;
    assert_quiet(&browser, &site);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_found_zoomed_into_and_compared() {
    let stage = Stage::shared(Shape::Entity).await;
    let (_sidecar, site) = archived(&stage).await;
    let mut browser = Browser::start();
    browser.look(WIDE, false);
    browser.open(&format!("{}/ui/#/history", site.url));
    browser.ready().await;
    choose(&mut browser, "rank", 2).await;
    browser.click("[data-test=range][data-range='30d']");
    browser.ready().await;
    browser
        .until(
            "a panel for each metric",
            "document.querySelectorAll('[data-test=panel] canvas').length === 2",
        )
        .await;
    // The other version over it.
    choose(&mut browser, "1.1.0", 1).await;
    browser.until("both are shown", "document.querySelectorAll('[data-test=chip]').length === 2").await;
    browser.ready().await;
    for (size, width) in [(WIDE, "wide"), (NARROW, "narrow")] {
        for (is_dark, theme) in [(false, "light"), (true, "dark")] {
            browser.look(size, is_dark);
            browser.until("it is drawn", "document.querySelector('[data-test=panel] canvas')").await;
            browser.shoot(&format!("history-{width}-{theme}"));
        }
    }
    browser.look(WIDE, false);
    // Dragging fetches finer bins, and goes into the address.
    let before = browser.run("document.querySelector('[data-test=facts]').textContent");
    browser.drag("[data-test=panel] .u-over", 0.8, 0.9);
    browser.until("the address has the range", "location.hash.includes('from=')").await;
    browser.ready().await;
    browser
        .until(
            "the bins are finer",
            &format!("document.querySelector('[data-test=facts]').textContent !== {before}"),
        )
        .await;
    browser.run("history.back()");
    browser.until("back zooms out", "!location.hash.includes('from=')").await;
    browser.ready().await;
    // The values as a table, as a link that another one opens.
    browser.click("[data-test=panel] [data-test=values] summary");
    browser
        .until("a table of values", "document.querySelectorAll('[data-test=values-table] tr').length > 10")
        .await;
    let csv = String::from_utf8(browser.download("[data-test=csv]").await).unwrap();
    let mut lines = csv.lines();
    let head = lines.next().unwrap();
    assert!(head.contains("metric") && head.contains("version"), "{head}");
    assert!(lines.clone().count() > 10 && lines.all(|line| line.contains("ranking")), "{csv}");
    let png = browser.download("[data-test=png]").await;
    assert!(png.starts_with(b"\x89PNG\r\n") && png.len() > 5_000, "{} bytes", png.len());
    for kind in ["psi", "spc"] {
        browser.click(&format!("[data-test=kind][data-kind={kind}]"));
        browser.until("its tab", &format!("location.hash.includes('{kind}')")).await;
        browser.ready().await;
        browser.until("it is drawn", "document.querySelector('[data-test=panel] canvas')").await;
        browser.shoot(&format!("history-{kind}"));
    }
    let link = browser.run("location.href");
    let mut other = Browser::start();
    other.look(WIDE, false);
    other.open(link.as_str().unwrap());
    other.ready().await;
    other.until("the same is shown", "document.querySelectorAll('[data-test=chip]').length === 2").await;
    assert_quiet(&other, &site);
    assert_quiet(&browser, &site);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_name_is_a_text() {
    let stage = Stage::shared(Shape::Entity).await;
    let (_sidecar, site) = archived(&stage).await;
    let mut browser = Browser::start();
    browser.look(WIDE, false);
    browser.open(&format!("{}/ui/#/history", site.url));
    browser.ready().await;
    choose(&mut browser, "onerror", 1).await;
    browser.until("it is drawn", "document.querySelector('[data-test=panel] canvas')").await;
    browser.ready().await;
    browser.shoot("hostile");
    let shown = browser.run("document.querySelector('[data-test=chip]').textContent");
    assert!(
        shown.as_str().unwrap().contains("<img src=x") && !shown.as_str().unwrap().contains('\u{202e}'),
        "{shown}"
    );
    assert_eq!(browser.run("document.querySelectorAll('img[src=x]').length"), 0);
    assert_ne!(browser.run("document.title"), "run");
    assert_quiet(&browser, &site);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_is_seen_and_seen_to_heal() {
    let stage = Stage::partitioned(Shape::Entity).await;
    let client = stage.connect().await;
    stage.insert_one(&client, "before", Some(1.0)).await;
    let mut sidecar = stage.start().await;
    stage.assert_archived(DEADLINE).await;
    assert!(sidecar.terminate(DEADLINE).await.success());
    client.execute("select pg_drop_replication_slot($1)", &[&stage.name]).await.unwrap();
    let sql = "insert into scouter.custom_drift (created_at, entity_id, metric, value)
               select clock_timestamp(), id, 'missed', n from scouter.drift_entities, generate_series(1, 300) n";
    client.batch_execute(sql).await.unwrap();
    // Slowly, so that one sees it.
    let sidecar = stage.launch().with("HIGHWATER_BACKFILL_ROWS_PER_SECOND", "20").start();
    let site = Site::of(&sidecar).await;
    let mut browser = Browser::start();
    browser.look(WIDE, true);
    browser.open(&format!("{}/ui/", site.url));
    browser
        .until(
            "the gap is red",
            "document.querySelector('[data-test=day][data-table=custom][data-kind=gap]')",
        )
        .await;
    browser
        .until(
            "the headline says so",
            "document.querySelector('[data-test=headline]').dataset.level === 'error'",
        )
        .await;
    browser.shoot("gap");
    stage.assert_archived(DEADLINE).await;
    until("it is ready", DEADLINE, async || (site.get("/readyz").await.status == 200).then_some(())).await;
    browser.open(&format!("{}/ui/#/state", site.url));
    browser.run("location.reload()");
    browser
        .until("the gap is green", "document.documentElement.dataset.ready === 'true' && !document.querySelector('[data-test=day][data-kind=gap]')")
        .await;
    browser
        .until("all is well", "document.querySelector('[data-test=headline]').dataset.level !== 'error'")
        .await;
    browser.shoot("healed");
    assert_quiet(&browser, &site);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_archive_and_a_process_that_only_reads_look_as_they_should() {
    let stage = Stage::shared(Shape::Entity).await;
    let empty = stage.folder().join("empty");
    std::fs::create_dir_all(&empty).unwrap();
    let launch = stage.launch().with("DATABASE_URI", "postgresql://nobody@127.0.0.1:1/nothing");
    let reader = launch.with("SCOUTER_STORAGE_URI", &empty.display().to_string()).start_command(&["serve"]);
    let site = Site::of(&reader).await;
    let mut browser = Browser::start();
    browser.look(WIDE, false);
    for view in ["state", "history"] {
        browser.open(&format!("{}/ui/#/{view}", site.url));
        browser.ready().await;
        browser.shoot(&format!("empty-{view}"));
        assert_eq!(browser.run("document.querySelectorAll('[data-test=error]').length"), 0, "{view}");
    }
    // That `/api/check` is not for readers is an answer, of which the browser makes a line in its log.
    let errors: Vec<String> =
        browser.errors().into_iter().filter(|error| !error.contains("/api/check")).collect();
    assert_eq!(errors, Vec::<String>::new());
}
