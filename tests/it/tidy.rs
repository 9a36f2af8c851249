//! The house rules that no compiler checks, as tests over the sources.
//!
//! Each rule is a plain text search: it may be fooled on purpose, but not by accident. What a lint
//! can say is in `Cargo.toml` and `clippy.toml`, not here.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Which layers each part of `src` may use, by the arrows of the architecture. A module that is not
/// listed may not exist.
const LAYERS: &[(&str, &[&str])] = &[
    ("units", &[]),
    ("format", &["units"]),
    ("storage", &["units"]),
    ("engine", &["units", "format", "storage"]),
    ("device", &["units", "storage", "engine"]),
    ("control", &["units", "engine"]),
    ("args", &["units"]),
    ("config", &["units", "args"]),
    (
        "tools",
        &["units", "format", "storage", "engine", "args", "config"],
    ),
    (
        "daemon",
        &[
            "units", "format", "storage", "engine", "device", "control", "args", "config",
        ],
    ),
    ("lib", &[]),
    ("main", &["args", "config", "daemon", "tools"]),
];

/// The only files that may contain unsafe code.
const UNSAFE_FILES: &[&str] = &[
    "examples/blkclient/kit/disk.rs",
    "src/device/bitmap.rs",
    "src/device/front_door.rs",
    "src/device/guest_buf.rs",
    "src/device/lost_memory.rs",
    "src/device/vring.rs",
    "src/storage/buffer.rs",
    "src/storage/file.rs",
    "src/storage/lock.rs",
    "src/storage/ring.rs",
    "src/storage/ring/core.rs",
];

/// One line of one source file that breaks a rule.
fn violation(file: &str, number: usize, line: &str) -> String {
    format!("{file}:{}: {}", number + 1, line.trim())
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files below `folder` with this extension: (path from the root, content).
fn files(folder: &str, extension: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else {
            continue;
        };
        for entry in entries {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("target") {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                let name = path
                    .strip_prefix(root())
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned();
                found.push((
                    name,
                    String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned(),
                ));
            }
        }
    }
    found.sort();
    found
}

/// Every Rust source of the project.
fn sources() -> Vec<(String, String)> {
    let folders = ["src", "tests", "examples", "benches", "fuzz"];
    let found: Vec<_> = folders
        .iter()
        .flat_map(|folder| files(folder, "rs"))
        .collect();
    assert!(
        found.iter().any(|(file, _)| file == "src/lib.rs"),
        "no sources found"
    );
    found
}

/// A line without its comment. A `//` inside a string cuts the line short too, which hides code from
/// the rules only where a URL is followed by code on one line.
fn code(line: &str) -> &str {
    line.split_once("//").map_or(line, |(code, _)| code)
}

/// All lines of `sources` whose code contains one of `words`.
fn lines_with(sources: &[(String, String)], words: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for (file, text) in sources {
        for (number, line) in text.lines().enumerate() {
            if words.iter().any(|word| code(line).contains(word)) {
                found.push(violation(file, number, line));
            }
        }
    }
    found
}

fn assert_none(found: &[String], rule: &str) {
    assert!(found.is_empty(), "{rule}:\n{}", found.join("\n"));
}

/// The sources of one folder of `src`.
fn layer(name: &str) -> Vec<(String, String)> {
    let prefix = format!("src/{name}/");
    let found = sources()
        .into_iter()
        .filter(|(file, _)| file.starts_with(&prefix));
    found.collect()
}

/// The layer of a file of `src`: its folder, or its own name.
fn layer_of(file: &str) -> Option<&str> {
    let inside = file.strip_prefix("src/")?;
    let first = inside.split('/').next()?;
    Some(first.strip_suffix(".rs").unwrap_or(first))
}

/// The top-level modules that a text names behind `root` ("crate::"): `crate::x`, and the members of
/// `use crate::{x, y::z}`.
fn modules_named(text: &str, root: &str) -> BTreeSet<String> {
    let text: String = text.lines().flat_map(|line| [code(line), "\n"]).collect();
    let mut named = BTreeSet::new();
    for (at, _) in text.match_indices(root) {
        let inside_word = text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        if !inside_word {
            collect_heads(&text[at + root.len()..], &mut named);
        }
    }
    named
}

/// The first path segment, or with a brace the first segment of each member of the group.
fn collect_heads(path: &str, named: &mut BTreeSet<String>) {
    let Some(group) = path.strip_prefix('{') else {
        let end = path
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(path.len());
        named.insert(path[..end].to_owned());
        return;
    };
    let mut depth = 0_usize;
    let mut at_head = true;
    for (at, character) in group.char_indices() {
        match character {
            '{' => depth += 1,
            '}' if depth == 0 => return,
            '}' => depth -= 1,
            ',' if depth == 0 => at_head = true,
            _ if at_head && !character.is_whitespace() => {
                collect_heads(&group[at..], named);
                at_head = false;
            }
            _ => {}
        }
    }
}

#[test]
fn the_parser_of_module_paths_sees_groups_and_skips_comments() {
    let text =
        "use crate::{a::{x, y}, b, c::d};\nuse crate::e::f; // crate::g\nlet x = crate::h();";
    let named: Vec<_> = modules_named(text, "crate::").into_iter().collect();
    assert_eq!(named, ["a", "b", "c", "e", "h"]);
}

#[test]
fn layers_reach_only_downwards() {
    let mut found = Vec::new();
    for (file, text) in sources() {
        let Some(layer) = layer_of(&file) else {
            continue;
        };
        let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == layer) else {
            found.push(format!("{file}: no layer has this name"));
            continue;
        };
        let is_module = |name: &String| LAYERS.iter().any(|(known, _)| known == name);
        // The binary is a crate of its own.
        let root = if layer == "main" {
            "qblkd::"
        } else {
            "crate::"
        };
        for named in modules_named(&text, root).into_iter().filter(is_module) {
            if named != layer && !allowed.contains(&named.as_str()) {
                found.push(format!("{file}: `{layer}` may not use `{named}`"));
            }
        }
    }
    assert_none(&found, "a layer reaches the wrong way");
}

#[test]
fn unsafe_code_is_only_where_it_is_listed() {
    let mut found = lines_with(&sources(), &["unsafe "]);
    found.retain(|line| !UNSAFE_FILES.iter().any(|file| line.starts_with(file)));
    // The words of the rule itself, and of lints.
    found.retain(|line| !line.starts_with("tests/it/tidy.rs"));
    assert_none(&found, "unsafe outside of the listed files");
}

#[test]
fn files_with_unsafe_code_say_why() {
    let mut found = Vec::new();
    for (file, text) in sources() {
        // However it is broken into lines.
        let words: String = text.split_whitespace().collect();
        if UNSAFE_FILES.contains(&file.as_str()) && !words.contains("expect(unsafe_code,reason") {
            found.push(file);
        }
    }
    found.retain(|file| !lines_with(&files_named(file), &["unsafe "]).is_empty());
    assert_none(
        &found,
        "unsafe code without `#![expect(unsafe_code, reason = ...)]`",
    );
}

fn files_named(name: &str) -> Vec<(String, String)> {
    sources()
        .into_iter()
        .filter(|(file, _)| file == name)
        .collect()
}

#[test]
fn every_source_opens_with_its_purpose() {
    let mut found = sources();
    found.retain(|(_, text)| !text.starts_with("//!"));
    let found: Vec<_> = found.into_iter().map(|(file, _)| file).collect();
    assert_none(&found, "files that do not open with `//!`");
}

#[test]
fn sources_are_ascii() {
    let mut found = Vec::new();
    for (file, text) in sources() {
        let lines = text
            .lines()
            .enumerate()
            .filter(|(_, line)| !line.is_ascii());
        found.extend(lines.map(|(number, line)| violation(&file, number, line)));
    }
    assert_none(&found, "characters beyond ASCII");
}

#[test]
fn nothing_is_left_to_do() {
    // Spelled in halves, so that this file does not contain them.
    let words = [
        concat!("TO", "DO"),
        concat!("FIX", "ME"),
        concat!("XX", "X"),
    ];
    let mut found = Vec::new();
    for (file, text) in sources().into_iter().chain(scripts_and_pages()) {
        for (number, line) in text.lines().enumerate() {
            let mut line_words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            if line_words.any(|word| words.contains(&word)) {
                found.push(violation(&file, number, line));
            }
        }
    }
    assert_none(&found, "notes of unfinished work");
}

#[test]
fn lints_are_expected_not_allowed() {
    let words = [concat!("#[al", "low("), concat!("#![al", "low(")];
    assert_none(
        &lines_with(&sources(), &words),
        "use `#[expect(lint, reason = ...)]`",
    );
}

#[test]
fn errors_keep_their_cause() {
    let words = [concat!("map_err(", "|_|"), concat!("map_err(", "|_: ")];
    assert_none(
        &lines_with(&sources(), &words),
        "the cause of an error is dropped",
    );
}

#[test]
fn the_engine_reads_no_clock() {
    let words = ["Instant::now", "SystemTime", "UNIX_EPOCH"];
    assert_none(
        &lines_with(&layer("engine"), &words),
        "a clock in the engine",
    );
}

#[test]
fn the_format_is_pure() {
    let words = [
        "log::",
        "std::fs",
        "std::io",
        "Mutex",
        "Atomic",
        "Instant",
        "std::thread",
    ];
    assert_none(
        &lines_with(&layer("format"), &words),
        "a side effect in the format layer",
    );
}

#[test]
fn the_engine_knows_no_virtio_and_no_json() {
    let words = ["virtio", "vhost", "serde_json", "UnixStream", "io_uring"];
    let mut sources = layer("engine");
    // Its tests read what `qemu-img` prints.
    sources.retain(|(file, _)| !file.ends_with("/tests.rs") && !file.contains("/tests/"));
    assert_none(&lines_with(&sources, &words), "the engine knows too much");
}

// --- Pages ---

/// Markdown pages and scripts.
fn scripts_and_pages() -> Vec<(String, String)> {
    let mut found = pages();
    for extension in ["sh", "py", "toml", "yml"] {
        found.extend(files("contrib", extension));
    }
    found
}

/// The pages at the root and below `docs`.
fn pages() -> Vec<(String, String)> {
    let mut found = files("docs", "md");
    for name in ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] {
        if let Ok(text) = fs::read_to_string(root().join(name)) {
            found.push((name.to_owned(), text));
        }
    }
    found
}

/// What stands between single backticks, fenced blocks left out.
fn quoted(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            found.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    found
}

/// Whether a quoted word is meant as a path of this project.
fn is_project_path(word: &str) -> bool {
    const FOLDERS: &[&str] = &[
        "src/",
        "docs/",
        "contrib/",
        "tests/",
        "examples/",
        "benches/",
        "fuzz/",
        ".ci/",
    ];
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-".contains(c);
    FOLDERS.iter().any(|folder| word.starts_with(folder)) && word.chars().all(plain)
}

#[test]
fn paths_named_in_pages_exist() {
    let mut found = Vec::new();
    for (page, text) in pages() {
        for path in quoted(&text)
            .into_iter()
            .filter(|word| is_project_path(word))
        {
            if !root().join(&path).exists() && !is_made_by_a_script(&path) {
                found.push(format!("{page}: `{path}` does not exist"));
            }
        }
    }
    assert_none(&found, "a page names what is not there");
}

/// What git ignores is made by a script, and need not be there.
fn is_made_by_a_script(path: &str) -> bool {
    let ignored = fs::read_to_string(root().join(".gitignore")).unwrap_or_default();
    let mut folders = ignored.lines().filter_map(|line| line.strip_prefix('/'));
    folders
        .any(|folder| format!("{path}/").starts_with(&format!("{}/", folder.trim_end_matches('/'))))
}

#[test]
fn items_named_in_pages_exist() {
    let sources: String = sources().into_iter().map(|(_, text)| text).collect();
    let mut found = Vec::new();
    for (page, text) in pages() {
        for word in quoted(&text) {
            let Some(path) = word.strip_prefix("crate::") else {
                continue;
            };
            let item = path
                .rsplit("::")
                .next()
                .unwrap_or(path)
                .trim_end_matches("()");
            if !sources.contains(item) {
                found.push(format!("{page}: `{word}` does not exist"));
            }
        }
    }
    assert_none(&found, "a page names what is not there");
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut found = Vec::new();
    for (page, text) in pages() {
        let folder = root().join(&page).parent().unwrap().to_owned();
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let target = link.split('#').next().unwrap_or(link);
            let local = !target.is_empty() && !target.contains("://") && !target.contains(' ');
            if local && !target.starts_with("mailto:") && !folder.join(target).exists() {
                found.push(format!("{page}: {link}"));
            }
        }
    }
    assert_none(&found, "a link leads nowhere");
}
