//! The sources keep to the layers of ARCHITECTURE.md: a module uses only modules above it in the list.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Not in the list: test machinery that any module may use, and the roots, which see everything.
const ANYWHERE: [&str; 1] = ["failpoint"];
const ROOTS: [&str; 2] = ["lib.rs", "main.rs"];

/// The modules in order, from the first column of the table in the section "Layers".
fn layers(page: &str) -> Vec<String> {
    let section = page.split("## Layers").nth(1).expect("a section \"Layers\"");
    let cells = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    cells.map(|(module, _)| module.trim_end_matches('/').to_owned()).collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("src").flatten() {
        let path = entry.path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The top-level modules that a source names as `crate::module`, in `use` (with braces or without) and in
/// paths. Names that begin with a capital are re-exports of the root and belong to no module.
fn used(source: &str) -> Vec<String> {
    let code: String = source.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let mut modules = Vec::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(group) => modules.extend(group_heads(group)),
            None => modules.push(identifier(rest)),
        }
    }
    modules.retain(|module| module.chars().next().is_some_and(char::is_lowercase));
    modules
}

fn identifier(text: &str) -> String {
    text.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// The first identifiers of the items of a brace group, nested groups left out.
fn group_heads(group: &str) -> Vec<String> {
    let (mut heads, mut depth, mut item) = (Vec::new(), 0_u32, String::new());
    for character in group.chars() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(identifier(&std::mem::take(&mut item))),
            _ if depth == 0 => item.push(character),
            _ => {}
        }
    }
    heads.push(identifier(&item));
    heads
}

#[test]
fn no_module_uses_one_below_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let order = layers(&fs::read_to_string(root.join("ARCHITECTURE.md")).expect("ARCHITECTURE.md"));
    assert!(order.len() > 10, "the table of layers was not understood: {order:?}");
    let place = |module: &str| order.iter().position(|known| known == module);

    let mut files = Vec::new();
    sources(&root.join("src"), &mut files);
    let mut wrong = Vec::new();
    for path in files {
        let within = path.strip_prefix(root.join("src")).expect("a path under src");
        let module = within.components().next().map(|part| part.as_os_str().to_string_lossy().into_owned());
        let module = module.unwrap_or_default();
        if ROOTS.contains(&module.as_str())
            || ANYWHERE.iter().any(|free| module.trim_end_matches(".rs") == *free)
        {
            continue;
        }
        let module = module.trim_end_matches(".rs");
        let Some(own) = place(module) else {
            wrong.push(format!("{}: {module} is not in the list of layers", path.display()));
            continue;
        };
        let source = fs::read_to_string(&path).expect("a source");
        for used in used(&source).iter().filter(|used| !ANYWHERE.contains(&used.as_str())) {
            match place(used) {
                Some(theirs) if theirs <= own => {}
                Some(_) => wrong.push(format!("{}: {module} uses {used}, which is below it", path.display())),
                // A macro or function of the root: none is meant to exist.
                None => wrong.push(format!("{}: crate::{used} is not in the list of layers", path.display())),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The paths that a source names from the root (`crate::`) or from the folder above it (`super::`), each in parts. `own` are the
/// parts of the module itself.
fn paths(source: &str, own: &[String]) -> Vec<Vec<String>> {
    let code: String = source.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    // What a test of a file uses is not how the file is built.
    let code = code.split("#[cfg(test)]mod tests {").next().unwrap_or_default();
    let mut found = Vec::new();
    for (start, base) in
        [("crate::", &[][..]), ("super::", own.split_last().map_or(&[][..], |(_, above)| above))]
    {
        for (at, _) in code.match_indices(start) {
            if !code[..at].ends_with("super::") {
                expand(&code[at + start.len()..], base, &mut found);
            }
        }
    }
    found
}

/// The paths that begin here, with those of a group in braces each for itself.
fn expand(text: &str, base: &[String], found: &mut Vec<Vec<String>>) {
    let mut parts = base.to_vec();
    let mut rest = text.trim_start();
    loop {
        if let Some(group) = rest.strip_prefix('{') {
            return group_items(group).iter().for_each(|item| expand(item, &parts, found));
        }
        let part = identifier(rest);
        if part == "super" {
            parts.pop();
        } else {
            parts.push(part.clone());
        }
        match rest.trim_start()[part.len()..].strip_prefix("::") {
            Some(next) => rest = next.trim_start(),
            None => return found.push(parts),
        }
    }
}

/// The items of a brace group.
fn group_items(group: &str) -> Vec<String> {
    let (mut items, mut depth, mut item) = (Vec::new(), 0_u32, String::new());
    for character in group.chars() {
        match character {
            '}' if depth == 0 => break,
            ',' if depth == 0 => items.push(std::mem::take(&mut item)),
            _ => {
                depth = match character {
                    '{' => depth + 1,
                    '}' => depth - 1,
                    _ => depth,
                };
                item.push(character);
            }
        }
    }
    items.push(item);
    items.retain(|item| !item.trim().is_empty());
    items
}

/// A way along uses from a file back to it.
fn circle<'a>(
    uses: &'a BTreeMap<String, Vec<String>>,
    way: &mut Vec<&'a str>,
    seen: &mut Vec<&'a str>,
) -> bool {
    let Some(last) = way.last().and_then(|last| uses.get(*last)) else { return false };
    for next in last {
        if way[0] == next {
            return true;
        }
        if !seen.contains(&next.as_str()) {
            seen.push(next);
            way.push(next);
            if circle(uses, way, seen) {
                return true;
            }
            way.pop();
        }
    }
    false
}

/// Each file, as the parts of its module joined by `/`, with the files that it uses. What a `mod.rs` re-exports is not followed: a
/// folder that is used as a whole is a room of its own, whose order the layers have.
fn files_used() -> BTreeMap<String, Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    let module = |path: &PathBuf| -> Vec<String> {
        let within = path.strip_prefix(&root).expect("a path under src").with_extension("");
        let parts = within.iter().map(|part| part.to_string_lossy().into_owned());
        parts.filter(|part| part != "mod").collect()
    };
    let is_file = |path: &&PathBuf| {
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        !["mod", "lib", "main", "tests"].contains(&name.as_str()) && !path.iter().any(|part| part == "tests")
    };
    let known: Vec<String> = files.iter().filter(is_file).map(|path| module(path).join("/")).collect();
    let used = |path: &PathBuf| {
        let own = module(path);
        let source = fs::read_to_string(path).expect("a source");
        let paths = paths(&source, &own).into_iter();
        let ends = paths.filter_map(|parts| {
            let ends = (1..=parts.len()).rev().map(|length| parts[..length].join("/"));
            ends.into_iter().find(|end| known.contains(end))
        });
        let mut ends: Vec<String> = ends.filter(|end| *end != own.join("/")).collect();
        ends.sort_unstable();
        ends.dedup();
        ends
    };
    files.iter().filter(is_file).map(|path| (module(path).join("/"), used(path))).collect()
}

#[test]
fn no_files_use_each_other() {
    let uses = files_used();
    assert!(uses["archive/log/table"].contains(&"archive/log/entry".to_owned()), "no use was understood");
    assert!(
        uses["archive/log/entry"].contains(&"archive/files/table_file".to_owned()),
        "no path was understood"
    );
    let mut circles = Vec::new();
    for name in uses.keys() {
        let mut way = vec![name.as_str()];
        if circle(&uses, &mut way, &mut Vec::new()) {
            circles.push(way.join(" -> "));
        }
    }
    assert!(circles.is_empty(), "{}", circles.join("\n"));
}

/// The parts of the archive, in the order of their layers.
const ARCHIVE: [&str; 4] = ["store", "files", "log", "upkeep"];

#[test]
fn the_parts_of_the_archive_are_layers() {
    let place = |module: &str| {
        let part = module.strip_prefix("archive/")?.split('/').next()?;
        ARCHIVE.iter().position(|known| *known == part)
    };
    let mut wrong = Vec::new();
    for (name, uses) in &files_used() {
        wrong.extend(
            uses.iter()
                .filter(|used| place(used) > place(name) && place(name).is_some())
                .map(|used| format!("{name} uses {used}")),
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Sources that one can read in one go.
const LINES_MAX: usize = 500;

#[test]
fn no_source_is_longer_than_one_can_read() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    let lines = |path: &PathBuf| fs::read_to_string(path).expect("a source").lines().count();
    let long: Vec<String> = files
        .iter()
        .filter(|path| lines(path) > LINES_MAX)
        .map(|path| format!("{}: {} lines", path.display(), lines(path)))
        .collect();
    assert!(long.is_empty(), "{}", long.join("\n"));
}

#[test]
fn uses_are_found_in_every_form() {
    let source = "use crate::lsn::Lsn;\nuse crate::{error::{Error, Result}, record::Kind,\n batch};\n\
                  // crate::comment::x\nfn f() -> crate::Result<()> { crate::stream::go() }";
    assert_eq!(used(source), ["lsn", "error", "record", "batch", "stream"]);
}
