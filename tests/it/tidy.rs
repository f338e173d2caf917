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

/// The files and folders beside a source that it names as `super::module`.
fn beside(source: &str) -> Vec<String> {
    let code: String = source.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    // What a test of a file uses is not how the file is built.
    let code = code.split("#[cfg(test)]mod tests {").next().unwrap_or_default();
    let mut modules = Vec::new();
    for (at, _) in code.match_indices("super::") {
        let (before, rest) = (&code[..at], &code[at + "super::".len()..]);
        if before.ends_with("super::") || rest.starts_with("super::") {
            continue;
        }
        match rest.strip_prefix('{') {
            Some(group) => modules.extend(group_heads(group)),
            None => modules.push(identifier(rest)),
        }
    }
    modules
}

/// A way along uses from a file back to it.
fn circle<'a>(uses: &'a BTreeMap<String, Vec<String>>, way: &mut Vec<&'a str>) -> bool {
    let Some(last) = way.last().and_then(|last| uses.get(*last)) else { return false };
    for next in last {
        if way[0] == next {
            return true;
        }
        if !way.contains(&next.as_str()) {
            way.push(next);
            if circle(uses, way) {
                return true;
            }
            way.pop();
        }
    }
    false
}

#[test]
fn no_files_use_each_other() {
    let mut files = Vec::new();
    sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
    let mut folders: BTreeMap<PathBuf, BTreeMap<String, Vec<String>>> = BTreeMap::new();
    for path in &files {
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let folder = path.parent().expect("a folder").to_owned();
        if !["mod", "lib", "main", "tests"].contains(&name.as_str()) {
            let source = fs::read_to_string(path).expect("a source");
            folders.entry(folder).or_default().insert(name, beside(&source));
        }
    }
    let mut circles = Vec::new();
    for (folder, uses) in &folders {
        for name in uses.keys() {
            let mut way = vec![name.as_str()];
            if circle(uses, &mut way) {
                circles.push(format!("{}: {}", folder.display(), way.join(" -> ")));
            }
        }
    }
    assert!(circles.is_empty(), "{}", circles.join("\n"));
}

#[test]
fn uses_are_found_in_every_form() {
    let source = "use crate::lsn::Lsn;\nuse crate::{error::{Error, Result}, record::Kind,\n batch};\n\
                  // crate::comment::x\nfn f() -> crate::Result<()> { crate::stream::go() }";
    assert_eq!(used(source), ["lsn", "error", "record", "batch", "stream"]);
}
