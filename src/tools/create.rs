//! `qblkd create`.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Exit, complain, fail, lock, progress_bar};
use crate::config::{self, CreateConfig, Format};
use crate::engine::chain::protocol;
use crate::engine::create::{Backing, CreateOptions, Preallocation, create as create_image};
use crate::engine::info::info;
use crate::engine::{Error, ErrorKind};
use crate::storage::lock::LockKind;
use crate::storage::{BlockingStorage, FileId, HostFile, HostFileKind, OpenMode, block_on};

/// Makes an image. A file that was made for it is removed again if that fails.
#[must_use]
pub fn create(config: &CreateConfig) -> Exit {
    match run(config) {
        Ok(()) => Exit::Success,
        Err(error) => fail(&config.path, &error),
    }
}

/// Looks at the backing file, opens and locks the new one, and writes it.
fn run(config: &CreateConfig) -> Result<(), Error> {
    let backing = config.backing.as_ref().map(|(name, format)| {
        open_backing(&config.path, name, *format).map_err(|error| {
            error.context(format!("cannot use the backing file {}", name.display()))
        })
    });
    let backing = backing.transpose()?;
    if let Some(folder) = backing
        .as_ref()
        .and_then(|backing| backing.elsewhere(&config.path))
    {
        complain(&format!(
            "qblkd: warning: the backing file is outside the image's own folder: serving the image \
             will need --backing-dir {}",
            folder.display()
        ));
    }
    let virtual_size = match (config.virtual_size_bytes, &backing) {
        (Some(size), _) => size,
        (None, Some(backing)) => backing.virtual_size,
        (None, None) => return Err(Error::new(ErrorKind::Invalid, "no size given")),
    };
    let options = CreateOptions {
        virtual_size,
        cluster_bits: config.cluster_bits,
        refcount_order: config.refcount_order,
        version: config.version,
        lazy_refcounts: config.lazy_refcounts,
        preallocation: match config.preallocation {
            config::Preallocation::Off => Preallocation::Off,
            config::Preallocation::Metadata => Preallocation::Metadata,
            config::Preallocation::Falloc => Preallocation::Falloc,
            config::Preallocation::Full => Preallocation::Full,
        },
        backing: config.backing.as_ref().map(|(name, format)| Backing {
            name: name.as_os_str().as_bytes().to_owned(),
            format: (*format).into(),
        }),
    };
    let is_new = !config.path.exists();
    let result = write(&config.path, &options, backing.as_ref());
    if result.is_err() && is_new && config.path.is_file() {
        drop(fs::remove_file(&config.path));
    }
    result
}

/// Writes the image into the file at `path`, which may exist unless somebody uses it.
fn write(path: &Path, options: &CreateOptions, backing: Option<&BackingFile>) -> Result<(), Error> {
    let cannot_open = |error: io::Error| Error::io("cannot open the file to write to", error);
    // Not truncated: that has to wait for the lock.
    if let Err(error) = OpenOptions::new().write(true).create_new(true).open(path)
        && error.kind() != io::ErrorKind::AlreadyExists
    {
        return Err(cannot_open(error));
    }
    let file = HostFile::open(
        path,
        OpenMode {
            write: true,
            direct: false,
        },
    )
    .map(Arc::new)
    .map_err(cannot_open)?;
    let same = |backing: &BackingFile| {
        file.identity()
            .is_ok_and(|identity| backing.identity == identity)
    };
    if backing.is_some_and(same) {
        return Err(Error::new(
            ErrorKind::Invalid,
            "the image would be its own backing file",
        ));
    }
    let _lock = lock(&file, LockKind::Writer)?;
    let storage = BlockingStorage::new(vec![file]);
    let bar = progress_bar();
    bar.set_message("preallocating");
    let result = block_on(create_image(
        &storage,
        FileId(0),
        options,
        &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        },
    ));
    bar.finish_and_clear();
    result
}

/// What has to be known of a backing file.
struct BackingFile {
    /// Where it really is, links followed.
    real_path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    /// Of the disk in it, in whole sectors.
    virtual_size: u64,
}

impl BackingFile {
    /// Its folder, if the server will not take it from there for this image unless it is told to:
    /// the policy of `engine::chain`.
    fn elsewhere(&self, image: &Path) -> Option<&Path> {
        // Where the name stands, and where it leads if it is there already.
        let stands = fs::canonicalize(folder_of(image));
        let leads = fs::canonicalize(image).map(|real| folder_of(&real).to_owned());
        let is_inside = [stands, leads]
            .iter()
            .flatten()
            .any(|folder| self.real_path.starts_with(folder));
        (!is_inside).then(|| folder_of(&self.real_path))
    }
}

/// The folder that a path names something in.
fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Opens the backing file as it will be found from the new image.
fn open_backing(image: &Path, name: &Path, format: Format) -> Result<BackingFile, Error> {
    if protocol(name.as_os_str().as_bytes()).is_some() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "a name with a colon before the first slash means a protocol, which is not supported: \
             write ./ in front of a file name",
        ));
    }
    let path: PathBuf = image.parent().unwrap_or(Path::new("")).join(name);
    let file = HostFile::open(
        &path,
        OpenMode {
            write: false,
            direct: false,
        },
    )
    .map(Arc::new)
    .map_err(|error| Error::io(format!("cannot open {}", path.display()), error))?;
    let cannot_look = |error| Error::io(format!("cannot look at {}", path.display()), error);
    let identity = file.identity().map_err(cannot_look)?;
    let virtual_size = match format {
        Format::Raw => file.len().map_err(cannot_look)?,
        Format::Qcow2 => {
            let storage = BlockingStorage::new(vec![Arc::clone(&file)]);
            block_on(info(&storage, FileId(0)))?.header.size
        }
    };
    debug_assert!(matches!(
        file.kind(),
        HostFileKind::Regular | HostFileKind::BlockDevice
    ));
    Ok(BackingFile {
        real_path: fs::canonicalize(&path).map_err(cannot_look)?,
        identity,
        virtual_size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(path: PathBuf) -> CreateConfig {
        CreateConfig {
            path,
            virtual_size_bytes: Some(1 << 20),
            cluster_bits: 16,
            refcount_order: 4,
            lazy_refcounts: false,
            preallocation: config::Preallocation::Off,
            backing: None,
            version: 3,
        }
    }

    #[test]
    fn size_comes_from_the_backing_file_if_none_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let base = config(dir.path().join("base"));
        assert_eq!(create(&base), Exit::Success);
        let overlay = CreateConfig {
            virtual_size_bytes: None,
            backing: Some(("base".into(), Format::Qcow2)),
            ..config(dir.path().join("overlay"))
        };
        assert_eq!(create(&overlay), Exit::Success);
        let found = open_backing(&overlay.path, Path::new("overlay"), Format::Qcow2).unwrap();
        assert_eq!(found.virtual_size, 1 << 20);
    }

    #[test]
    fn a_missing_backing_file_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let overlay = CreateConfig {
            backing: Some(("missing".into(), Format::Raw)),
            ..config(dir.path().join("overlay"))
        };
        assert_eq!(create(&overlay), Exit::Failure);
        assert!(!overlay.path.exists());
    }

    #[test]
    fn an_image_does_not_become_its_own_backing_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        assert_eq!(create(&config(path.clone())), Exit::Success);
        let before = fs::read(&path).unwrap();
        let own = CreateConfig {
            backing: Some(("image".into(), Format::Qcow2)),
            ..config(path.clone())
        };
        assert_eq!(create(&own), Exit::Failure);
        assert_eq!(fs::read(&path).unwrap(), before);
    }

    #[test]
    fn a_file_in_use_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        assert_eq!(create(&config(path.clone())), Exit::Success);
        let before = fs::read(&path).unwrap();
        let user = HostFile::open(
            &path,
            OpenMode {
                write: true,
                direct: false,
            },
        )
        .unwrap();
        let held = lock(&Arc::new(user), LockKind::Writer).unwrap();
        assert_eq!(create(&config(path.clone())), Exit::Failure);
        assert_eq!(fs::read(&path).unwrap(), before);
        drop(held);
    }

    #[test]
    fn options_that_do_not_fit_leave_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let config = CreateConfig {
            version: 2,
            lazy_refcounts: true,
            ..config(dir.path().join("image"))
        };
        assert_eq!(create(&config), Exit::Failure);
        assert!(!config.path.exists());
    }
}
