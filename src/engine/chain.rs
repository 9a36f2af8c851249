//! Opens an image and the backing chain that it names: the policy for names that an image holds.
//!
//! An image may come from anywhere, so what it names is not trusted:
//! - The format of a backing file comes from the header extension, never from looking at the file: a
//!   guest that writes a qcow2 header into a raw disk must not get to name files.
//! - A name is a path, relative to the folder of the image that holds it. What looks like a protocol
//!   (`nbd:`, `json:`) is refused.
//! - Whatever the path leads to, symbolic links followed, must be a regular file or a block device in
//!   the folder of the image that names it, or in one of the folders that the user gave. This is
//!   checked before the file is opened and again on what was really opened.
//! - A file may appear once in a chain, and a chain has at most [`CHAIN_LAYERS_MAX`] files.
//!
//! Reads headers, writes nothing. Taking image locks is left to the caller, who is told of each file
//! before anything in it is read.

#![forbid(unsafe_code)]

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::LayerFormat;
use super::error::{Error, ErrorKind};
use super::source::Source;
use crate::format::{FormatError, Header};
use crate::storage::{BlockingStorage, FileId, HostFile, OpenMode, block_on};

/// Most files in a chain, the image itself included.
pub const CHAIN_LAYERS_MAX: usize = 200;

/// How to open a chain.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ChainOptions {
    /// Never write to the image either; backing files are never written.
    pub read_only: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// Folders, besides an image's own, that backing files may be in.
    pub backing_dirs: Vec<PathBuf>,
}

/// One open file of a chain.
#[derive(Debug)]
pub struct OpenLayer {
    /// The file.
    pub file: Arc<HostFile>,
    /// The name that it was opened by.
    pub path: PathBuf,
    /// What it holds.
    pub format: LayerFormat,
    /// Whether it was opened for reading only.
    pub read_only: bool,
    /// Its header; none in a raw file.
    pub header: Option<Header>,
}

/// Is told of each file that was opened, and whether for reading only, before anything is read from
/// it: the place to take image locks.
pub type Opened<'a> = dyn FnMut(&Arc<HostFile>, bool) -> Result<(), Error> + 'a;

/// Opens the image at `path` and its backing files, active layer first.
///
/// # Errors
///
/// Each refusal names the file and the reason, and what to do about it where there is something.
pub fn open_chain(
    path: &Path,
    format: LayerFormat,
    options: &ChainOptions,
    opened: &mut Opened<'_>,
) -> Result<Vec<OpenLayer>, Error> {
    let granted = granted_folders(&options.backing_dirs)?;
    let mode = OpenMode {
        write: !options.read_only,
        direct: options.direct,
    };
    let file = open(path, mode)
        .map_err(|error| Error::io(format!("cannot open {}", path.display()), error))?;
    let mut seen = HashSet::from([identity(&file, path)?]);
    let top = layer(file, path.to_owned(), format, options.read_only, opened);
    let mut layers = vec![top.map_err(|error| {
        // Only here: were an overlay served as raw, its metadata would be the guest's disk.
        if Error::is_caused_by(&error, |cause| matches!(cause, FormatError::Magic { .. })) {
            error.context("not usable as qcow2 (to serve a raw image, give --format raw)")
        } else {
            error
        }
    })?];
    // The user named the image: its files are where that name leads, or where it stands.
    let mut folders = vec![
        folder_of(&real_path(path, &layers[0].file)?),
        given_folder(path)?,
    ];
    while let Some(name) = layers
        .last()
        .and_then(|last| Backing::of(&last.path, last.header.as_ref()))
    {
        let next = next_layer(&name, layers.len(), &granted, &folders, options.direct)?;
        if !seen.insert(identity(&next.file, &next.path)?) {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "{} is its own backing file: the chain is a loop",
                    next.path.display()
                ),
            )
            .context(name.context()));
        }
        folders = vec![folder_of(&real_path(&next.path, &next.file)?)];
        let next = layer(next.file, next.path, next.format, true, opened)
            .map_err(|error| error.context(name.context()))?;
        layers.push(next);
    }
    Ok(layers)
}

/// A backing file as an image names it.
struct Backing {
    /// The image that names it.
    overlay: PathBuf,
    /// The name as stored.
    name: Vec<u8>,
    /// The format as stored.
    format: Option<Vec<u8>>,
}

/// A backing file that was opened under the policy.
struct NextFile {
    file: Arc<HostFile>,
    path: PathBuf,
    format: LayerFormat,
}

impl Backing {
    /// What the image at `overlay` names, if anything.
    fn of(overlay: &Path, header: Option<&Header>) -> Option<Self> {
        let header = header?;
        Some(Self {
            overlay: overlay.to_owned(),
            name: header.backing_name.clone()?,
            format: header.backing_format().map(<[u8]>::to_vec),
        })
    }

    /// The first half of every message about it.
    fn context(&self) -> String {
        format!(
            "cannot use the backing file '{}' of {}",
            self.name.escape_ascii(),
            self.overlay.display()
        )
    }

    /// The format, which must be there.
    fn format(&self) -> Result<LayerFormat, Error> {
        match self.format.as_deref() {
            Some(b"qcow2") => Ok(LayerFormat::Qcow2),
            Some(b"raw") => Ok(LayerFormat::Raw),
            Some(other) => Err(Error::new(
                ErrorKind::Unsupported,
                format!("its format '{}' is not supported", other.escape_ascii()),
            )),
            None => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "the image does not say the backing format, which is never guessed: set it with \
                     'qemu-img rebase -u -b NAME -F FORMAT {}'",
                    self.overlay.display()
                ),
            )),
        }
    }

    /// The path, relative to where the overlay's name stands.
    fn path(&self) -> Result<PathBuf, Error> {
        if let Some(protocol) = protocol(&self.name) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "the protocol '{}:' is not supported",
                    protocol.escape_ascii()
                ),
            ));
        }
        if self.name.contains(&0) {
            return Err(Error::new(
                ErrorKind::Invalid,
                "the name contains a zero byte",
            ));
        }
        let name = Path::new(OsStr::from_bytes(&self.name));
        Ok(self.overlay.parent().unwrap_or(Path::new("")).join(name))
    }

    /// What to add when the file is not there, and a reader may look for it elsewhere.
    fn link_hint(&self, error: &std::io::Error) -> Option<String> {
        let relative = self.name.first() != Some(&b'/');
        let missing = error.kind() == std::io::ErrorKind::NotFound;
        (relative && missing && self.overlay.is_symlink()).then(|| {
            format!(
                " (the name is relative to the folder of the link {}, not of what it leads to)",
                self.overlay.display()
            )
        })
    }
}

/// The protocol that a name starts with, by QEMU's rule: a colon before the first slash.
#[must_use]
pub fn protocol(name: &[u8]) -> Option<&[u8]> {
    let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    (name[end] == b':').then_some(&name[..end])
}

/// Opens a backing file, if the policy allows.
fn next_layer(
    name: &Backing,
    depth: usize,
    granted: &[PathBuf],
    folders: &[PathBuf],
    direct: bool,
) -> Result<NextFile, Error> {
    let inside = |real: &Path| {
        let allowed = granted
            .iter()
            .chain(folders)
            .any(|folder| real.starts_with(folder));
        if allowed {
            return Ok(());
        }
        let folder = folder_of(real);
        Err(Error::new(
            ErrorKind::Invalid,
            format!(
                "it is {}, outside the image's own folder: allow it with --backing-dir {}",
                real.display(),
                folder.display()
            ),
        ))
    };
    let open_next = || {
        if depth == CHAIN_LAYERS_MAX {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("a backing chain has at most {CHAIN_LAYERS_MAX} files"),
            ));
        }
        let (path, format) = (name.path()?, name.format()?);
        let missing = |error| {
            let hint = name.link_hint(&error).unwrap_or_default();
            Error::io(format!("cannot open {}{hint}", path.display()), error)
        };
        // Only looks the name up: nothing happens to a file that the policy then refuses.
        let probe = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&path)
            .map_err(missing)?;
        inside(&fd_path(&probe, &path)?)?;
        let file = open(
            &path,
            OpenMode {
                write: false,
                direct,
            },
        )
        .map_err(missing)?;
        inside(&real_path(&path, &file)?)?;
        Ok(NextFile {
            file,
            path: path.clone(),
            format,
        })
    };
    open_next().map_err(|error: Error| error.context(name.context()))
}

/// Opens a regular file or block device.
fn open(path: &Path, mode: OpenMode) -> std::io::Result<Arc<HostFile>> {
    HostFile::open(path, mode).map(Arc::new)
}

/// How an overlay in the (real) folder `overlay_folder` names the image at `image` as its backing
/// file: by its bare name if that is in the same folder, so that the folder can be moved; else by
/// its whole path. Symbolic links stay: the image's own backing file is found from where its name
/// stands.
///
/// # Errors
/// The image's folder cannot be looked at.
pub fn backing_name(image: &Path, overlay_folder: &Path) -> Result<Vec<u8>, Error> {
    let folder = given_folder(image)?;
    let name = image.file_name().unwrap_or_default();
    let mut bytes = Vec::new();
    if folder == overlay_folder {
        // "a:b" would be read as a protocol.
        if protocol(name.as_bytes()).is_some() {
            bytes.extend(b"./");
        }
        bytes.extend(name.as_bytes());
    } else {
        bytes.extend(folder.join(name).as_os_str().as_bytes());
    }
    Ok(bytes)
}

/// Tells the caller of a file and reads its header.
fn layer(
    file: Arc<HostFile>,
    path: PathBuf,
    format: LayerFormat,
    read_only: bool,
    opened: &mut Opened<'_>,
) -> Result<OpenLayer, Error> {
    opened(&file, read_only)?;
    let header = match format {
        LayerFormat::Raw => None,
        LayerFormat::Qcow2 => {
            let storage = BlockingStorage::new(vec![Arc::clone(&file)]);
            let source = Source::new(&storage, FileId(0))?;
            let header = block_on(source.header())
                .map_err(|error| error.context(format!("cannot open {}", path.display())))?;
            Some(header)
        }
    };
    Ok(OpenLayer {
        file,
        path,
        format,
        read_only,
        header,
    })
}

/// The real paths of the folders that the user gave.
fn granted_folders(backing_dirs: &[PathBuf]) -> Result<Vec<PathBuf>, Error> {
    backing_dirs
        .iter()
        .map(|folder| {
            fs::canonicalize(folder).map_err(|error| {
                Error::io(
                    format!("cannot use --backing-dir {}", folder.display()),
                    error,
                )
            })
        })
        .collect()
}

/// The real folder of a path that the user gave, its last part not followed.
///
/// # Errors
/// The folder does not exist, or cannot be looked at.
pub fn given_folder(path: &Path) -> Result<PathBuf, Error> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    fs::canonicalize(folder).map_err(|error| {
        Error::io(
            format!("cannot use the folder of {}", path.display()),
            error,
        )
    })
}

/// The folder that a real path stands in.
fn folder_of(real: &Path) -> PathBuf {
    real.parent().unwrap_or(Path::new("/")).to_owned()
}

/// Where an open file really is.
fn real_path(path: &Path, file: &HostFile) -> Result<PathBuf, Error> {
    fd_path(file.as_file(), path)
}

/// Where an open descriptor really is: unlike resolving the name, this cannot be raced.
///
/// # Errors
/// The host does not tell.
pub fn fd_path(file: &fs::File, path: &Path) -> Result<PathBuf, Error> {
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(|error| {
        Error::io(
            format!("cannot find out where {} really is", path.display()),
            error,
        )
    })
}

/// Which file it is, under whatever name.
fn identity(file: &HostFile, path: &Path) -> Result<(u64, u64), Error> {
    file.identity()
        .map_err(|error| Error::io(format!("cannot look at {}", path.display()), error))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::engine::create::{self, CreateOptions, Preallocation, create};

    /// Makes a small image at `path`, with a backing file if one is named.
    fn make(path: &Path, backing: Option<(&[u8], LayerFormat)>) {
        fs::write(path, b"").unwrap();
        let storage = BlockingStorage::new(vec![
            open(
                path,
                OpenMode {
                    write: true,
                    direct: false,
                },
            )
            .unwrap(),
        ]);
        let options = CreateOptions {
            virtual_size: 1 << 20,
            cluster_bits: 16,
            refcount_order: 4,
            version: 3,
            lazy_refcounts: false,
            preallocation: Preallocation::Off,
            backing: backing.map(|(name, format)| create::Backing {
                name: name.to_owned(),
                format,
            }),
        };
        block_on(create(&storage, FileId(0), &options, &mut |_, _| ())).unwrap();
    }

    fn chain(path: &Path, backing_dirs: &[&Path]) -> Result<Vec<OpenLayer>, Error> {
        let backing_dirs = backing_dirs
            .iter()
            .map(|folder| (*folder).to_owned())
            .collect();
        let options = ChainOptions {
            backing_dirs,
            ..ChainOptions::default()
        };
        open_chain(path, LayerFormat::Qcow2, &options, &mut |_, _| Ok(()))
    }

    /// The whole message of a refusal.
    fn refusal(path: &Path) -> String {
        chain(path, &[]).unwrap_err().chain()
    }

    #[test]
    fn layers_come_active_first_and_only_that_one_is_writable() {
        let dir = tempfile::tempdir().unwrap();
        let (top, middle, base) = (
            dir.path().join("top"),
            dir.path().join("middle"),
            dir.path().join("base"),
        );
        fs::write(&base, [1; 4096]).unwrap();
        make(&middle, Some((b"base", LayerFormat::Raw)));
        make(
            &top,
            Some((middle.as_os_str().as_bytes(), LayerFormat::Qcow2)),
        );
        let mut told = Vec::new();
        let layers = open_chain(
            &top,
            LayerFormat::Qcow2,
            &ChainOptions::default(),
            &mut |file, read_only| {
                told.push((file.path().to_owned(), read_only));
                Ok(())
            },
        )
        .unwrap();
        let paths: Vec<_> = layers.iter().map(|layer| layer.path.clone()).collect();
        assert_eq!(paths, [top.clone(), middle.clone(), base.clone()]);
        assert_eq!(told, [(top, false), (middle, true), (base, true)]);
        assert_eq!(
            layers
                .iter()
                .filter(|layer| layer.file.mode().write)
                .count(),
            1
        );
        assert!(layers[2].header.is_none() && layers[2].format == LayerFormat::Raw);
    }

    #[test]
    fn a_raw_image_has_no_chain_whatever_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("top");
        make(&path, Some((b"missing", LayerFormat::Raw)));
        let options = ChainOptions {
            read_only: true,
            ..ChainOptions::default()
        };
        let layers = open_chain(&path, LayerFormat::Raw, &options, &mut |_, _| Ok(())).unwrap();
        assert_eq!(layers.len(), 1);
        assert!(!layers[0].file.mode().write);
    }

    #[test]
    fn only_the_image_that_the_user_named_is_said_to_be_served_raw() {
        let dir = tempfile::tempdir().unwrap();
        let (top, base) = (dir.path().join("top"), dir.path().join("base"));
        fs::write(&base, [1; 4096]).unwrap();
        make(&top, Some((b"base", LayerFormat::Qcow2)));
        let (named, below) = (refusal(&base), refusal(&top));
        assert!(named.contains("--format raw"), "{named}");
        // With that option the overlay's metadata would become the guest's disk.
        assert!(below.contains("not a qcow2 image"), "{below}");
        assert!(!below.contains("--format raw"), "{below}");
        // An image that is damaged is none that should be served raw.
        fs::write(&top, b"QFI\xfb").unwrap();
        let damaged = refusal(&top);
        assert!(!damaged.contains("--format raw"), "{damaged}");
    }

    #[test]
    fn a_name_that_is_not_text_works() {
        let dir = tempfile::tempdir().unwrap();
        let name = b"base-\xff\xfe";
        fs::write(dir.path().join(OsStr::from_bytes(name)), b"data").unwrap();
        let path = dir.path().join("top");
        make(&path, Some((name, LayerFormat::Raw)));
        assert_eq!(chain(&path, &[]).unwrap().len(), 2);
    }

    #[test]
    fn a_name_beside_what_a_link_leads_to_is_explained() {
        let dir = tempfile::tempdir().unwrap();
        let (links, images) = (dir.path().join("links"), dir.path().join("images"));
        fs::create_dir(&links).unwrap();
        fs::create_dir(&images).unwrap();
        fs::write(images.join("base"), [1; 4096]).unwrap();
        make(&images.join("top"), Some((b"base", LayerFormat::Raw)));
        symlink(images.join("top"), links.join("top")).unwrap();
        let said = refusal(&links.join("top"));
        assert!(
            said.contains("relative to the folder of the link"),
            "{said}"
        );
    }

    #[test]
    fn a_backing_file_elsewhere_needs_the_option() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (path, base) = (dir.path().join("top"), other.path().join("base"));
        fs::write(&base, b"data").unwrap();
        make(&path, Some((base.as_os_str().as_bytes(), LayerFormat::Raw)));
        let text = refusal(&path);
        let option = format!(
            "--backing-dir {}",
            other.path().canonicalize().unwrap().display()
        );
        assert!(text.contains(&option), "{text}");
        assert_eq!(chain(&path, &[other.path()]).unwrap().len(), 2);
    }

    #[test]
    fn a_symbolic_link_does_not_lead_out_of_the_folder() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = dir.path().join("top");
        fs::write(other.path().join("secret"), b"data").unwrap();
        symlink(other.path().join("secret"), dir.path().join("base")).unwrap();
        make(&path, Some((b"base", LayerFormat::Raw)));
        assert!(refusal(&path).contains("outside the image's own folder"));
        make(&path, Some((b"sub/../../etc/passwd", LayerFormat::Raw)));
        assert!(chain(&path, &[]).is_err());
    }

    #[test]
    fn a_folder_whose_name_only_begins_alike_is_another_folder() {
        let dir = tempfile::tempdir().unwrap();
        let (own, other) = (dir.path().join("own"), dir.path().join("own2"));
        fs::create_dir(&own).unwrap();
        fs::create_dir(&other).unwrap();
        fs::write(other.join("base"), b"data").unwrap();
        make(&own.join("top"), Some((b"../own2/base", LayerFormat::Raw)));
        assert!(refusal(&own.join("top")).contains("--backing-dir"));
    }

    #[test]
    fn an_image_behind_a_link_finds_its_backing_file_beside_the_link() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        make(&other.path().join("top"), Some((b"base", LayerFormat::Raw)));
        fs::write(dir.path().join("base"), b"data").unwrap();
        symlink(other.path().join("top"), dir.path().join("link")).unwrap();
        assert_eq!(chain(&dir.path().join("link"), &[]).unwrap().len(), 2);
    }

    #[test]
    fn protocols_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("top");
        for name in [
            "nbd:localhost:1",
            "json:{\"driver\":\"file\"}",
            "file:base",
            "a:b",
        ] {
            make(&path, Some((name.as_bytes(), LayerFormat::Raw)));
            assert!(
                refusal(&path).contains("protocol"),
                "{name}: {}",
                refusal(&path)
            );
        }
        assert_eq!(protocol(b"./a:b"), None);
        assert_eq!(protocol(b"ab"), None);
        assert_eq!(protocol(b":x"), Some(&b""[..]));
    }

    #[test]
    fn an_overlay_names_its_image_so_that_it_is_found() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for name in ["base", "a:b", "with space"] {
            let base = dir.path().join(name);
            fs::write(&base, [1; 4096]).unwrap();
            for folder in [dir.path(), other.path()] {
                let folder = folder.canonicalize().unwrap();
                let overlay = folder.join("overlay");
                let stored = backing_name(&base, &folder).unwrap();
                assert_eq!(
                    stored[0] == b'/',
                    folder != dir.path().canonicalize().unwrap()
                );
                make(&overlay, Some((&stored, LayerFormat::Raw)));
                assert_eq!(chain(&overlay, &[dir.path()]).unwrap().len(), 2, "{name}");
            }
        }
    }

    #[test]
    fn a_missing_format_is_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let (path, base) = (dir.path().join("top"), dir.path().join("base"));
        fs::write(&base, b"data").unwrap();
        let backing = Backing {
            overlay: path,
            name: b"base".to_vec(),
            format: None,
        };
        let error = backing.format().unwrap_err();
        assert!(error.to_string().contains("qemu-img rebase -u"), "{error}");
        let unknown = Backing {
            format: Some(b"vmdk".to_vec()),
            ..backing
        };
        assert!(unknown.format().unwrap_err().to_string().contains("vmdk"));
    }

    #[test]
    fn loops_are_refused_under_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        make(&one, Some((b"two", LayerFormat::Qcow2)));
        make(&two, Some((b"link", LayerFormat::Qcow2)));
        symlink(&one, dir.path().join("link")).unwrap();
        assert!(refusal(&one).contains("loop"), "{}", refusal(&one));
        make(&one, Some((b"one", LayerFormat::Qcow2)));
        assert!(refusal(&one).contains("loop"));
    }

    #[test]
    fn the_longest_chain_opens_and_a_longer_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = |index: usize| dir.path().join(index.to_string());
        fs::write(file(0), b"data").unwrap();
        make(&file(1), Some((b"0", LayerFormat::Raw)));
        for index in 2..=CHAIN_LAYERS_MAX {
            let below = (index - 1).to_string();
            make(&file(index), Some((below.as_bytes(), LayerFormat::Qcow2)));
        }
        assert_eq!(
            chain(&file(CHAIN_LAYERS_MAX - 1), &[]).unwrap().len(),
            CHAIN_LAYERS_MAX
        );
        assert!(refusal(&file(CHAIN_LAYERS_MAX)).contains("at most 200"));
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("top");
        fs::create_dir(dir.path().join("base")).unwrap();
        make(&path, Some((b"base", LayerFormat::Raw)));
        assert!(chain(&path, &[]).is_err());
        make(&path, Some((b"/dev/zero", LayerFormat::Raw)));
        assert!(chain(&path, &[Path::new("/dev")]).is_err());
        make(&path, Some((b"missing", LayerFormat::Raw)));
        assert!(
            refusal(&path).contains("No such file"),
            "{}",
            refusal(&path)
        );
    }
}
