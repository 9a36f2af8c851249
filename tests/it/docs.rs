//! The pages say what the program does: their examples run, their options and paths exist.
//!
//! Every fenced block of README.md, CONTRIBUTING.md and `docs/` names its kind:
//! - `console`: commands after `$ `, run in an empty directory with qblkd in the PATH. The other lines
//!   must come out of them, in this order; `...` stands for lines that are not shown.
//! - `qmp`: a conversation with the control socket of a qblkd that serves a new image; of what is
//!   received (`<-`), a part may be shown.
//! - `sh`: for people. The scripts and the options of qblkd in it must exist.
//! - `text`, `json`: not checked.

use crate::support::command::{LIMIT, run, run_command};
use crate::support::server::Server;
use crate::support::{Failure, QBLKD, ensure, for_each_case};
use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

/// A fenced block.
struct Block {
    page: String,
    kind: String,
    text: String,
}

fn page(block: &Block) -> &str {
    &block.page
}

/// All blocks of this kind; `for_each_case` takes none for a failure.
fn blocks(kind: &str) -> Vec<Block> {
    let mut all = every_block();
    all.retain(|block| block.kind == kind);
    all
}

fn every_block() -> Vec<Block> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages = vec![root.join("README.md"), root.join("CONTRIBUTING.md")];
    for folder in ["docs", "docs/decisions"] {
        let entries = fs::read_dir(root.join(folder)).unwrap();
        pages.extend(entries.map(|entry| entry.unwrap().path()));
    }
    pages.retain(|page| page.extension().is_some_and(|found| found == "md"));
    let mut blocks = Vec::new();
    for page in pages {
        let text = fs::read_to_string(&page).unwrap();
        for block in text.split("\n```").skip(1).step_by(2) {
            let (kind, text) = block.split_once('\n').unwrap();
            let page = page.display().to_string();
            let (kind, text) = (kind.to_owned(), text.to_owned());
            blocks.push(Block { page, kind, text });
        }
    }
    blocks
}

#[test]
fn every_block_has_a_known_kind() {
    for_each_case(&every_block(), page, |block| {
        let known = ["console", "qmp", "sh", "text", "json"].contains(&&*block.kind);
        ensure(known, || format!("kind '{}'", block.kind))
    });
}

#[test]
fn console_blocks_run_and_print_what_they_show() {
    for_each_case(&blocks("console"), page, |block| {
        let (commands, shown): (Vec<_>, Vec<_>) =
            block.text.lines().partition(|line| line.starts_with("$ "));
        let script: Vec<_> = commands.iter().map(|line| &line[2..]).collect();
        let dir = TempDir::new()?;
        let folder = Path::new(QBLKD).parent().ok_or("no folder")?;
        let path = format!("{}:{}", folder.display(), std::env::var("PATH")?);
        let mut shell = Command::new("sh");
        shell
            .args(["-e", "-c", &script.join("\n")])
            .current_dir(dir.path())
            .env("PATH", path);
        let printed = run_command(&mut shell, LIMIT)?.success()?.stdout;
        let mut printed = printed.lines();
        for line in shown.into_iter().filter(|line| *line != "...") {
            ensure(printed.any(|found| found == line), || {
                format!("'{line}' is not printed")
            })?;
        }
        Ok(())
    });
}

#[test]
fn sh_blocks_name_options_and_scripts_that_exist() {
    for_each_case(&blocks("sh"), page, |block| {
        for line in block.text.replace("\\\n", " ").lines() {
            let words: Vec<_> = line
                .split_whitespace()
                .take_while(|word| *word != "#")
                .collect();
            for word in words.iter().filter(|word| word.starts_with("contrib/")) {
                let there = Path::new(env!("CARGO_MANIFEST_DIR")).join(word).exists();
                ensure(there, || format!("{word} does not exist"))?;
            }
            let at = words
                .iter()
                .position(|word| *word == "qblkd" || word.ends_with("/qblkd"));
            if let Some(at) = at {
                check_options(&words[at + 1..])?;
            }
        }
        Ok(())
    });
}

/// Each `--option` among the arguments is in the help of the subcommand that they begin with.
fn check_options(arguments: &[&str]) -> Result<(), Failure> {
    let first = arguments.first().copied().unwrap_or("");
    let tool = match first {
        "create" | "info" | "check" => &arguments[..1],
        "snapshot" => &arguments[..arguments.len().min(2)],
        _ => &[],
    };
    let help = run(QBLKD, tool.iter().copied().chain(["--help"]))?
        .success()?
        .stdout;
    for word in arguments.iter().filter(|word| word.starts_with("--")) {
        let option = word.split('=').next().unwrap_or(word);
        let there = help
            .split_whitespace()
            .any(|known| known.trim_end_matches(',') == option);
        ensure(there, || {
            format!("{option} is not an option of qblkd {first}")
        })?;
    }
    Ok(())
}

#[test]
fn qmp_blocks_are_conversations_that_happen() {
    for_each_case(&blocks("qmp"), page, |block| {
        let dir = TempDir::new()?;
        let image = dir.path().join("disk.qcow2");
        let control = dir.path().join("control.sock");
        run(QBLKD, [Path::new("create"), &image, Path::new("1G")])?.success()?;
        let (file, socket) = (Path::new("--blk-file"), Path::new("--control"));
        let _server = Server::start([file, &image, socket, &control])?;
        let mut stream = UnixStream::connect(&control)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let mut received = BufReader::new(stream.try_clone()?).lines();
        for line in block.text.lines() {
            if let Some(sent) = line.strip_prefix("-> ") {
                writeln!(stream, "{sent}")?;
            } else {
                let shown = line
                    .strip_prefix("<- ")
                    .ok_or("a line is neither -> nor <-")?;
                let shown: Value = serde_json::from_str(shown)?;
                let found = received.next().ok_or("the server hung up")??;
                let whole = serde_json::from_str(&found)?;
                ensure(is_part(&shown, &whole), || {
                    format!("{line}\nis not in {found}")
                })?;
            }
        }
        Ok(())
    });
}

/// Objects may have more members than are shown; all else is equal.
fn is_part(shown: &Value, whole: &Value) -> bool {
    match (shown, whole) {
        (Value::Object(shown), Value::Object(whole)) => shown
            .iter()
            .all(|(name, shown)| whole.get(name).is_some_and(|whole| is_part(shown, whole))),
        (Value::Array(shown), Value::Array(whole)) => {
            shown.len() == whole.len() && shown.iter().zip(whole).all(|(s, w)| is_part(s, w))
        }
        _ => shown == whole,
    }
}
