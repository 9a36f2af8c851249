//! The corpus of test images: made once, read through its manifest, copied before use.
//!
//! The images themselves are shared by all tests and all test runs with the same scripts; no test
//! may open one for writing, or hold a lock on one. `contrib/corpus/make.py` describes the manifest.

use super::Failure;
use super::command;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;
use tempfile::TempDir;

/// Making the corpus takes some 10 s on an idle machine.
const MAKE_LIMIT: Duration = Duration::from_secs(300);

/// What making and judging the corpus needs.
pub(crate) const TOOLS: &[&str] = &["python3", "qemu-img", "qemu-io", "cp"];

/// What a manifest entry says the image is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    Good,
    Bad,
    BadAtRuntime,
    Inconsistent,
}

/// One internal snapshot and its content.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Snapshot {
    pub(crate) id: String,
    pub(crate) raw: PathBuf,
}

/// One request that meets damage.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Access {
    pub(crate) op: String,
    pub(crate) offset: u64,
    pub(crate) length: usize,
    pub(crate) outcomes: Vec<String>,
}

/// A manifest entry; `contrib/corpus/make.py` says what the fields mean.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Image {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
    pub(crate) format: String,
    pub(crate) kind: Kind,
    files: Vec<PathBuf>,
    pub(crate) size: Option<u64>,
    pub(crate) cluster_bits: Option<u32>,
    pub(crate) version: Option<u32>,
    pub(crate) refcount_bits: Option<u32>,
    options: Vec<String>,
    raw: Option<PathBuf>,
    #[serde(default)]
    pub(crate) snapshots: Vec<Snapshot>,
    #[serde(default)]
    pub(crate) read_only: bool,
    #[serde(default)]
    pub(crate) leaks_ok: bool,
    #[serde(default)]
    pub(crate) dirty: bool,
    #[serde(default)]
    pub(crate) expect: Vec<Vec<String>>,
    #[serde(default)]
    pub(crate) also_read_only: bool,
    #[serde(default)]
    pub(crate) access: Vec<Access>,
    #[serde(default)]
    pub(crate) sets_corrupt: bool,
    #[serde(default)]
    pub(crate) may_refuse: bool,
    pub(crate) check: Option<i32>,
}

impl Image {
    /// The companion with the content of the disk, in the shared corpus.
    pub(crate) fn raw(&self) -> Result<PathBuf, Failure> {
        let raw = self
            .raw
            .as_ref()
            .ok_or("the manifest names no raw companion")?;
        Ok(folder().join(raw))
    }

    /// Whether a message says what it must, in any of the permitted words.
    pub(crate) fn is_explained_by(&self, message: &str) -> bool {
        let message = message.to_lowercase();
        let said = |words: &Vec<String>| words.iter().any(|word| message.contains(word.as_str()));
        self.expect.iter().all(said)
    }
}

#[derive(Deserialize)]
struct Manifest {
    images: Vec<Image>,
}

/// A private copy of an image and of every file that it needs.
pub(crate) struct Copy {
    pub(crate) dir: TempDir,
    pub(crate) image: PathBuf,
    /// Arguments that opening it takes, format and image included.
    pub(crate) arguments: Vec<OsString>,
}

impl Copy {
    /// Copies with holes, links and special files kept.
    pub(crate) fn of(image: &Image) -> Result<Self, Failure> {
        let dir = TempDir::with_prefix("qblkd-")?;
        let mut copy = Command::new("cp");
        copy.args(["-a", "--sparse=always", "--parents", "-t"])
            .arg(dir.path());
        copy.args(&image.files).current_dir(folder());
        command::run_command(&mut copy, command::LIMIT)?.success()?;
        let file = dir.path().join(&image.file);
        let mut arguments: Vec<OsString> =
            vec!["--blk-file".into(), file.clone().into(), "--format".into()];
        arguments.push(image.format.clone().into());
        arguments.extend(
            image
                .options
                .iter()
                .map(|word| match word.strip_prefix("@/") {
                    Some(path) => dir.path().join(path).into(),
                    None => word.into(),
                }),
        );
        Ok(Self {
            dir,
            image: file,
            arguments,
        })
    }

    /// The bytes of every regular file of the copy, to see whether any was written to.
    pub(crate) fn content(&self) -> Result<BTreeMap<PathBuf, Vec<u8>>, Failure> {
        let mut content = BTreeMap::new();
        let mut folders = vec![self.dir.path().to_owned()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder)? {
                let entry = entry?;
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_file() {
                    content.insert(entry.path(), fs::read(entry.path())?);
                }
            }
        }
        Ok(content)
    }
}

/// All images of a kind.
pub(crate) fn images(kind: Kind) -> Vec<Image> {
    let manifest = fs::read(folder().join("manifest.json")).unwrap();
    let manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
    manifest
        .images
        .into_iter()
        .filter(|image| image.kind == kind)
        .collect()
}

/// The folder of the corpus, made on first use.
pub(crate) fn folder() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| make().unwrap())
}

/// Makes the corpus in a folder that is named after the scripts and tools that make it, unless it
/// is there. Another process may do the same: a rename decides whose is used.
fn make() -> Result<PathBuf, Failure> {
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib/corpus");
    let mut sources: Vec<_> = fs::read_dir(&scripts)?.collect::<Result<_, _>>()?;
    sources.retain(|source| {
        source
            .path()
            .extension()
            .is_some_and(|extension| extension == "py")
    });
    sources.sort_by_key(fs::DirEntry::path);
    let mut hasher = DefaultHasher::new();
    command::run("qemu-img", ["--version"])?
        .stdout
        .hash(&mut hasher);
    for source in sources {
        fs::read(source.path())?.hash(&mut hasher);
    }
    let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let folder = parent.join(format!("corpus-{:016x}", hasher.finish()));
    if folder.join("manifest.json").is_file() {
        return Ok(folder);
    }
    let fresh = TempDir::with_prefix_in("corpus-new-", parent)?;
    let mut maker = Command::new("python3");
    maker
        .arg("-B")
        .arg(scripts.join("make.py"))
        .arg(fresh.path());
    command::run_command(&mut maker, MAKE_LIMIT)?.success()?;
    if let Err(error) = fs::rename(fresh.path(), &folder)
        && !folder.join("manifest.json").is_file()
    {
        return Err(error.into());
    }
    Ok(folder)
}
