//! The documents and the code say the same: imports follow the table, numbers that the code cites are explained,
//! links lead somewhere, and the house rules that a program can check are kept.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text(name: &str) -> String {
    std::fs::read_to_string(root().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// All Rust files below a folder, with their text.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    let mut files = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for row in std::fs::read_dir(folder).unwrap() {
            let path = row.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&path).unwrap();
                files.push((path.strip_prefix(root()).unwrap().to_owned(), text));
            }
        }
    }
    assert!(!files.is_empty());
    files.sort();
    files
}

/// What follows each occurrence of `word`, as long as it is part of a name.
fn names_after<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
    let end = |rest: &str| rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
    text.split(word).skip(1).map(|rest| &rest[..end(rest)]).collect()
}

/// The words in back quotes of a piece of Markdown.
fn quoted(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2).flat_map(str::split_whitespace)
}

/// The import table of ARCHITECTURE.md: module, and what it may import.
fn import_table() -> BTreeMap<String, BTreeSet<String>> {
    let page = text("docs/ARCHITECTURE.md");
    let mut table = BTreeMap::new();
    for line in page.lines().skip_while(|l| *l != "## Imports").skip(1).take_while(|l| !l.starts_with("## ")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
        let [modules, imports] = cells.as_slice() else { continue };
        for module in quoted(modules) {
            table.insert(module.to_owned(), quoted(imports).map(str::to_owned).collect());
        }
    }
    table
}

/// The module at the top that a file belongs to.
fn module_of(path: &Path) -> Option<String> {
    let first = path.components().nth(1)?.as_os_str().to_str()?;
    let module = first.strip_suffix(".rs").unwrap_or(first);
    (!matches!(module, "main" | "lib")).then(|| module.to_owned())
}

#[test]
fn imports_follow_the_table() {
    let table = import_table();
    let always: BTreeSet<String> = ["error", "units", "limits"].map(str::to_owned).into();
    let mut modules = BTreeSet::new();
    let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (path, source) in sources("src") {
        let Some(module) = module_of(&path) else { continue };
        modules.insert(module.clone());
        // Tests may look at anything.
        if path.ends_with("tests.rs") || path.ends_with("testing.rs") {
            continue;
        }
        let code = source.split("\n#[cfg(test)]\nmod tests").next().unwrap();
        for import in names_after(code, "crate::").into_iter().filter(|name| **name != module) {
            let allowed = table.get(&module).unwrap_or_else(|| panic!("{module} is not in the table"));
            assert!(
                allowed.contains(import) || always.contains(import),
                "{}: `{module}` imports `{import}`, which docs/ARCHITECTURE.md does not allow",
                path.display()
            );
            used.entry(module.clone()).or_default().insert(import.to_owned());
        }
    }
    assert_eq!(modules, table.keys().cloned().collect(), "the modules and the rows of the table");
    for (module, allowed) in &table {
        let unused: Vec<_> =
            allowed.iter().filter(|name| !used.get(module).is_some_and(|u| u.contains(*name))).collect();
        assert!(unused.is_empty(), "the table lets `{module}` import {unused:?}, which it does not");
    }
}

#[test]
fn imports_point_down_the_map() {
    let lib = text("src/lib.rs");
    let order: Vec<&str> = lib.lines().filter_map(|l| l.strip_prefix("pub mod ")?.strip_suffix(';')).collect();
    let place = |name: &str| order.iter().position(|m| *m == name).unwrap_or_else(|| panic!("{name}: not in lib.rs"));
    // Checked against the table, which is checked against the code. What points up is named in ARCHITECTURE.md.
    let page = text("docs/ARCHITECTURE.md");
    for (module, imports) in import_table() {
        for import in imports.iter().filter(|import| place(import) < place(&module)) {
            let told = page.contains(&format!("`{module}` → `{import}`"));
            assert!(told, "`{module}` imports `{import}`, which stands above it in lib.rs");
        }
    }
}

#[test]
fn imports_name_one_module_each() {
    for (path, source) in sources("src") {
        for (number, line) in source.lines().enumerate() {
            let line = line.trim_start();
            let star = line.starts_with("use crate::") && line.contains("::*");
            assert!(!star && !line.starts_with("use crate::{"), "{}:{}: {line}", path.display(), number + 1);
        }
    }
}

/// Numbers such as W3, R1-R5 or I6 in a text, ranges spelled out.
fn numbers(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let bytes = text.as_bytes();
    let is_word = |at: usize| bytes.get(at).is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_');
    let number_at = |at: usize| {
        let letter = bytes.get(at).filter(|b| b"WRGI".contains(b))?;
        let digit = bytes.get(at + 1).filter(|b| (b'1'..=b'9').contains(b))?;
        (!is_word(at + 2) && (at == 0 || !is_word(at - 1))).then_some((char::from(*letter), digit - b'0'))
    };
    for at in 0..bytes.len() {
        let Some((letter, first)) = number_at(at) else { continue };
        let is_range = bytes.get(at + 2) == Some(&b'-');
        let last = number_at(at + 3).filter(|(other, _)| is_range && *other == letter).map_or(first, |(_, n)| n);
        found.extend((first..=last).map(|n| format!("{letter}{n}")));
    }
    found
}

#[test]
fn every_number_that_code_cites_is_explained() {
    let page = text("docs/DESIGN.md") + &text("docs/ARCHITECTURE.md");
    let explained: BTreeSet<String> = page
        .lines()
        .filter_map(|line| line.trim_start_matches(['|', '*', ' ', '#']).split(|c: char| !c.is_alphanumeric()).next())
        .flat_map(numbers)
        .collect();
    let expected = (1..=9).flat_map(|n| [format!("W{n}"), format!("I{n}")]);
    let expected = expected.chain((1..=5).flat_map(|n| [format!("R{n}"), format!("G{n}")]));
    for number in expected {
        assert!(explained.contains(&number), "{number}: no line of DESIGN.md or ARCHITECTURE.md begins with it");
    }
    for (path, source) in sources("src").into_iter().chain(sources("tests")) {
        for number in numbers(&source) {
            assert!(explained.contains(&number), "{}: cites {number}, which is explained nowhere", path.display());
        }
    }
}

#[test]
fn nothing_is_left_to_do_without_a_number() {
    let [fix, to_do] = [["FIX", "ME"].concat(), ["TO", "DO"].concat()];
    for (path, source) in sources("src").into_iter().chain(sources("tests")) {
        for (number, line) in source.lines().enumerate() {
            let place = format!("{}:{}", path.display(), number + 1);
            assert!(!line.contains(&fix), "{place}: {line}");
            let numbered = line.split(&to_do).skip(1).all(|rest| rest.starts_with("(#"));
            assert!(numbered, "{place}: without the number of an issue: {line}");
        }
    }
}

/// The targets of links in Markdown, without their anchors.
fn links(page: &str) -> Vec<(&str, Option<&str>)> {
    let targets = page.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets
        .filter(|to| !to.contains("://"))
        .map(|to| to.split_once('#').map_or((to, None), |(file, anchor)| (file, Some(anchor))))
        .collect()
}

/// The anchor that a heading gets.
fn anchor(heading: &str) -> String {
    let plain = heading.trim_start_matches('#').trim().to_lowercase();
    plain
        .chars()
        .filter(|c| c.is_alphanumeric() || " -_".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[test]
fn links_lead_somewhere() {
    let mut pages: Vec<String> =
        ["README.md", "CHANGELOG.md", "mount-helpers/README.md", "xen-scripts/README.md"].map(str::to_owned).into();
    for row in std::fs::read_dir(root().join("docs")).unwrap() {
        let name = row.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".md") {
            pages.push(format!("docs/{name}"));
        }
    }
    for name in pages {
        let page = text(&name);
        let folder = root().join(&name).parent().unwrap().to_owned();
        for (file, wanted) in links(&page) {
            let path = if file.is_empty() { root().join(&name) } else { folder.join(file) };
            assert!(path.exists(), "{name}: the link to {file} leads nowhere");
            if let Some(wanted) = wanted {
                let target = std::fs::read_to_string(&path).unwrap();
                let found = target.lines().filter(|l| l.starts_with('#')).any(|l| anchor(l) == wanted);
                assert!(found, "{name}: {file} has no heading for #{wanted}");
            }
        }
    }
}

#[test]
fn the_readme_lists_every_command_and_every_exit_code() {
    let page = text("README.md");
    for command in snapfs::cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = command.get_name();
        assert!(page.contains(&format!("| `{name} ")) || page.contains(&format!("| `{name}`")), "{name}");
    }
    for code in [
        "| 0 | done",
        "| 1 | failed",
        "| 2 | usage",
        "| 3 | not found",
        "| 4 | damaged",
        "| 5 | busy",
        "| 6 | no space",
    ] {
        assert!(page.contains(code), "{code}");
    }
}
