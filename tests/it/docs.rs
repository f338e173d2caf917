//! The documentation: its commands run, its links lead somewhere, and its pages are short.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::support::http::Site;
use crate::support::load::{Load, create_entities};
use crate::support::schema::Shape;
use crate::support::sidecar::binary;
use crate::support::stage::Stage;
use crate::support::wait::until;

const DEADLINE: Duration = Duration::from_secs(60);

/// Lines that a page may have.
const README_LINES_MAX: usize = 150;
const PAGE_LINES_MAX: usize = 400;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// The README and the pages of `docs/`, with their texts.
fn pages() -> Vec<(PathBuf, String)> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|page| page.unwrap().path());
    let pages = docs.filter(|page| page.extension().is_some_and(|extension| extension == "md"));
    let mut all: Vec<PathBuf> = pages.chain([root().join("README.md")]).collect();
    all.sort();
    all.into_iter().map(|page| (page.clone(), fs::read_to_string(page).unwrap())).collect()
}

/// The blocks of commands of a text, each with the line before it.
fn blocks(text: &str) -> Vec<(&str, String)> {
    let lines: Vec<&str> = text.lines().collect();
    let starts = lines.iter().enumerate().filter(|(_, line)| **line == "```sh");
    let block = |(start, _): (usize, &&str)| {
        let body: Vec<&str> = lines[start + 1..].iter().take_while(|line| **line != "```").copied().collect();
        (if start == 0 { "" } else { lines[start - 1] }, body.join("\n"))
    };
    starts.map(block).collect()
}

#[test]
fn every_block_of_commands_says_whether_it_is_run() {
    let mut wrong = Vec::new();
    for (page, text) in pages() {
        for (mark, body) in blocks(&text) {
            let is_told =
                mark == "<!-- run -->" || (mark.starts_with("<!-- not run: ") && mark.ends_with(" -->"));
            if !is_told {
                wrong.push(format!("{}: {mark:?} before\n{body}", page.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_run_as_they_are_shown() {
    let stage = Stage::shared(Shape::Entity).await;
    let client = stage.connect().await;
    create_entities(&client).await;
    let sidecar = stage.start().await;
    let site = Site::of(&sidecar).await;
    let load = Load::start(&stage.cluster().uri_unix(&stage.name), Shape::Entity);
    load.goes_on(2_000, DEADLINE).await;
    load.stop().await;
    client
        .batch_execute(
            "insert into scouter.custom_drift (created_at, entity_id, metric, value) select now() - interval '1 hour', 1, 'accuracy', 0.9;
             insert into scouter.psi_drift (created_at, entity_id, feature, bin_id, bin_count) select now() - interval '1 hour', 1, 'age', 1, 10;
             insert into scouter.spc_drift (created_at, entity_id, feature, value) select now() - interval '1 hour', 1, 'feature_1', 0.5",
        )
        .await
        .unwrap();
    stage.assert_archived(DEADLINE).await;
    until("it is ready", DEADLINE, async || (site.get("/readyz").await.status == 200).then_some(())).await;
    let path = format!("{}:{}", binary().parent().unwrap().display(), std::env::var("PATH").unwrap());
    let settings = stage.launch();
    let mut failed = Vec::new();
    for (page, text) in pages() {
        for (_, body) in blocks(&text).into_iter().filter(|(mark, _)| *mark == "<!-- run -->") {
            let folder = tempfile::tempdir().unwrap();
            let mut command = Command::new("sh");
            command.args(["-ec", &body]).current_dir(folder.path()).envs(settings.settings());
            command.env("PATH", &path).env("HIGHWATER_URL", &site.url);
            let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
            if !output.status.success()
                || output.stdout.is_empty() && !body.contains('>') && !body.contains("--plot")
            {
                let said = String::from_utf8_lossy(&output.stderr).into_owned();
                failed.push(format!("{}:\n{body}\n{}\n{said}", page.display(), output.status));
            }
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

/// The anchors of a page, as GitHub makes them of its headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut is_code = false;
    let headings = text.lines().filter_map(|line| {
        is_code ^= line.starts_with("```");
        let heading = line.trim_start_matches('#');
        (!is_code && heading.len() < line.len() && heading.starts_with(' ')).then_some(heading.trim())
    });
    let slug = |heading: &str| {
        let kept = heading
            .to_lowercase()
            .chars()
            .filter(|letter| letter.is_alphanumeric() || " -_".contains(*letter))
            .collect::<String>();
        kept.replace(' ', "-")
    };
    headings.map(slug).collect()
}

/// What the links of a text lead to.
fn links(text: &str) -> Vec<String> {
    let after = text.split("](").skip(1);
    after.filter_map(|rest| rest.split_once(')').map(|(link, _)| link.to_owned())).collect()
}

#[test]
fn links_lead_somewhere_and_pages_are_short() {
    let mut wrong = Vec::new();
    let more =
        ["ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md", "benches/README.md"].map(|name| root().join(name));
    let more = more.into_iter().map(|page| (page.clone(), fs::read_to_string(page).unwrap()));
    for (page, text) in pages().into_iter().chain(more) {
        let lines = text.lines().count();
        let most = if page == root().join("README.md") { README_LINES_MAX } else { PAGE_LINES_MAX };
        if page.starts_with(root().join("docs")) || page == root().join("README.md") {
            assert!(lines <= most, "{}: {lines} lines", page.display());
        }
        for link in
            links(&text).into_iter().filter(|link| !link.contains("://") && !link.starts_with("mailto:"))
        {
            let (file, anchor) =
                link.split_once('#').map_or((link.as_str(), None), |(file, anchor)| (file, Some(anchor)));
            let target = if file.is_empty() {
                page.clone()
            } else {
                page.parent().unwrap_or(Path::new("")).join(file)
            };
            let has_anchor =
                |anchor: &str| anchors(&fs::read_to_string(&target).unwrap_or_default()).contains(anchor);
            if !target.exists() || anchor.is_some_and(|anchor| !has_anchor(anchor)) {
                wrong.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
