//! `qblkd info`.
//!
//! Takes no image lock: it reads the header and the snapshot table, also of an image that is being
//! served, whose answer may then be a moment old.

use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::{Exit, fail, human_size, print, printable};
use crate::config::InfoConfig;
use crate::engine::chain::{ChainOptions, open_chain};
use crate::engine::info::{ImageInfo, info as image_info};
use crate::engine::{Error, LayerFormat};
use crate::format::snapshot::SnapshotEntry;
use crate::storage::{BlockingStorage, FileId, HostFile, OpenMode, block_on};
use crate::units::SECTOR_SIZE;

/// Describes an image.
#[must_use]
pub fn info(config: &InfoConfig) -> Exit {
    match run(config) {
        Ok(files) => print(&show(&files, config), Exit::Success),
        Err(error) => fail(&config.path, &error),
    }
}

/// One file of the chain.
struct FileInfo {
    /// Name that it was opened by.
    path: PathBuf,
    /// Its length in whole sectors.
    len: u64,
    /// What it takes on the host.
    allocated: u64,
    /// None in a raw file.
    image: Option<ImageInfo>,
}

impl FileInfo {
    /// Looks at an open file.
    fn new(path: &Path, file: &Arc<HostFile>, format: LayerFormat) -> Result<Self, Error> {
        let cannot = |error| Error::io(format!("cannot look at {}", path.display()), error);
        let storage = BlockingStorage::new(vec![Arc::clone(file)]);
        let image = match format {
            LayerFormat::Qcow2 => Some(block_on(image_info(&storage, FileId(0)))?),
            LayerFormat::Raw => None,
        };
        Ok(Self {
            path: path.to_owned(),
            len: file.len().map_err(cannot)?.next_multiple_of(SECTOR_SIZE),
            // In sectors, whatever the file system's block is.
            allocated: file.as_file().metadata().map_err(cannot)?.blocks() * SECTOR_SIZE,
            image,
        })
    }

    /// Of the disk in it.
    fn virtual_size(&self) -> u64 {
        self.image
            .as_ref()
            .map_or(self.len, |image| image.header.size)
    }

    /// The backing file as the image names it, and where that leads.
    fn backing(&self) -> Option<(String, String)> {
        let name = self.image.as_ref()?.header.backing_name.as_ref()?;
        let full = self
            .path
            .parent()
            .unwrap_or(Path::new(""))
            .join(Path::new(std::ffi::OsStr::from_bytes(name)));
        Some((lossy(name), full.to_string_lossy().into_owned()))
    }

    /// The backing file's format as the image says it.
    fn backing_format(&self) -> Option<String> {
        self.image.as_ref()?.header.backing_format().map(lossy)
    }

    /// `0.10` or `1.1`, QEMU's names of versions 2 and 3.
    fn compat(image: &ImageInfo) -> &'static str {
        if image.header.version < 3 {
            "0.10"
        } else {
            "1.1"
        }
    }
}

/// The image alone, or with its chain.
fn run(config: &InfoConfig) -> Result<Vec<FileInfo>, Error> {
    if !config.backing_chain {
        let file = HostFile::open(
            &config.path,
            OpenMode {
                write: false,
                direct: false,
            },
        )
        .map(Arc::new)
        .map_err(|error| Error::io("cannot open the image", error))?;
        return Ok(vec![FileInfo::new(
            &config.path,
            &file,
            LayerFormat::Qcow2,
        )?]);
    }
    let options = ChainOptions {
        read_only: true,
        direct: false,
        backing_dirs: config.backing_dirs.clone(),
    };
    open_chain(&config.path, LayerFormat::Qcow2, &options, &mut |_, _| {
        Ok(())
    })?
    .iter()
    .map(|layer| FileInfo::new(&layer.path, &layer.file, layer.format))
    .collect()
}

/// As the user wants it.
fn show(files: &[FileInfo], config: &InfoConfig) -> String {
    if config.json {
        let mut objects: Vec<Value> = files.iter().map(to_json).collect();
        let value = match (config.backing_chain, objects.pop()) {
            (false, Some(object)) => object,
            (_, last) => {
                objects.extend(last);
                Value::Array(objects)
            }
        };
        return format!("{value:#}\n");
    }
    files.iter().map(to_text).collect::<Vec<_>>().join("\n")
}

/// The object that `qemu-img info --output=json` prints.
fn to_json(file: &FileInfo) -> Value {
    let name = file.path.to_string_lossy();
    let mut object = Map::new();
    let mut add = |key: &str, value: Value| object.insert(key.to_owned(), value);
    add(
        "children",
        json!([{
            "name": "file",
            "info": {
                "children": [],
                "virtual-size": file.len,
                "filename": name,
                "format": "file",
                "actual-size": file.allocated,
                "format-specific": { "type": "file", "data": {} },
                "dirty-flag": false,
            },
        }]),
    );
    add("virtual-size", file.virtual_size().into());
    add("filename", name.clone().into());
    add(
        "format",
        if file.image.is_some() { "qcow2" } else { "raw" }.into(),
    );
    add("actual-size", file.allocated.into());
    let Some(image) = &file.image else {
        add("dirty-flag", false.into());
        return Value::Object(object);
    };
    let header = &image.header;
    add("cluster-size", header.geometry().cluster_size().into());
    add("dirty-flag", header.is_dirty().into());
    let mut data = json!({
        "compat": FileInfo::compat(image),
        "compression-type": header.compression_type.name(),
        "refcount-bits": header.geometry().refcount_bits(),
    });
    if header.version >= 3 {
        data["lazy-refcounts"] = header.has_lazy_refcounts().into();
        data["corrupt"] = header.is_corrupt().into();
        data["extended-l2"] = false.into();
    }
    add("format-specific", json!({ "type": "qcow2", "data": data }));
    if let Some((backing, full)) = file.backing() {
        add("backing-filename", backing.into());
        add("full-backing-filename", full.into());
    }
    if let Some(format) = file.backing_format() {
        add("backing-filename-format", format.into());
    }
    if !image.snapshots.is_empty() {
        add(
            "snapshots",
            image.snapshots.iter().map(snapshot_json).collect(),
        );
    }
    Value::Object(object)
}

/// One element of `snapshots`.
fn snapshot_json(entry: &SnapshotEntry) -> Value {
    let mut object = json!({
        "id": lossy(&entry.id),
        "name": lossy(&entry.name),
        "vm-state-size": entry.vm_state_size(),
        "date-sec": entry.date_sec,
        "date-nsec": entry.date_nsec,
        "vm-clock-sec": entry.vm_clock_nsec / 1_000_000_000,
        "vm-clock-nsec": entry.vm_clock_nsec % 1_000_000_000,
    });
    if let Some(icount) = entry.icount() {
        object["icount"] = icount.into();
    }
    object
}

/// The description for people.
fn to_text(file: &FileInfo) -> String {
    let size = file.virtual_size();
    let mut text = format!(
        "image: {}\nfile format: {}\nvirtual size: {} ({size} bytes)\ndisk size: {}\n",
        file.path.display(),
        if file.image.is_some() { "qcow2" } else { "raw" },
        human_size(size),
        human_size(file.allocated),
    );
    let Some(image) = &file.image else {
        return text;
    };
    let header = &image.header;
    let mut line = |key: &str, value: &str| {
        text.push_str(key);
        text.push_str(": ");
        text.push_str(value);
        text.push('\n');
    };
    line(
        "cluster_size",
        &header.geometry().cluster_size().to_string(),
    );
    if header.is_dirty() {
        line(
            "dirty",
            "yes, it will be repaired when it is opened for writing",
        );
    }
    if let Some((name, full)) = file.backing() {
        if name == full {
            line("backing file", &printable(&name));
        } else {
            let text = format!("{name} (actual path: {full})");
            line("backing file", &printable(&text));
        }
    }
    if let Some(format) = file.backing_format() {
        line("backing file format", &printable(&format));
    }
    line("compat", FileInfo::compat(image));
    line("compression type", header.compression_type.name());
    line(
        "refcount bits",
        &header.geometry().refcount_bits().to_string(),
    );
    if header.version >= 3 {
        line("lazy refcounts", &header.has_lazy_refcounts().to_string());
        line("corrupt", &header.is_corrupt().to_string());
        line("extended l2", "false");
    }
    if !image.snapshots.is_empty() {
        text.push_str(&snapshots_text(&image.snapshots));
    }
    text
}

/// The table of internal snapshots.
fn snapshots_text(snapshots: &[SnapshotEntry]) -> String {
    let mut text = format!(
        "internal snapshots:\n{:<8} {:<20} {:>10} {:>19} {:>14}\n",
        "ID", "NAME", "VM STATE", "TAKEN (UTC)", "VM CLOCK"
    );
    for entry in snapshots {
        text.push_str(&format!(
            "{:<8} {:<20} {:>10} {:>19} {:>14}\n",
            printable(&lossy(&entry.id)),
            printable(&lossy(&entry.name)),
            human_size(entry.vm_state_size()),
            date(entry.date_sec),
            clock(entry.vm_clock_nsec),
        ));
    }
    text
}

/// Text of an image: any bytes; what is not text is shown as such.
fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Hours, minutes, seconds and milliseconds.
pub(super) fn clock(nanoseconds: u64) -> String {
    let milliseconds = nanoseconds / 1_000_000;
    let (seconds, milliseconds) = (milliseconds / 1000, milliseconds % 1000);
    let (minutes, seconds) = (seconds / 60, seconds % 60);
    format!(
        "{:04}:{:02}:{seconds:02}.{milliseconds:03}",
        minutes / 60,
        minutes % 60
    )
}

/// Date and time in UTC of a number of seconds since 1970.
pub(super) fn date(seconds: u32) -> String {
    let (days, second) = (seconds / 86400, seconds % 86400);
    // Civil calendar of 400-year cycles that begin in March, so that the leap day is a year's last.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u32::from(month <= 2);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!(
        "{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{:02}",
        second % 60
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::Command;

    use super::*;

    #[test]
    fn dates_at_the_edges_of_months_and_years() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00"),
            (951_782_400, "2000-02-29 00:00:00"),
            (951_868_799, "2000-02-29 23:59:59"),
            (951_868_800, "2000-03-01 00:00:00"),
            (1_735_689_599, "2024-12-31 23:59:59"),
            (1_795_372_315, "2026-11-22 18:31:55"),
            (u32::MAX, "2106-02-07 06:28:15"),
        ] {
            assert_eq!(date(seconds), text);
        }
    }

    #[test]
    fn a_clock_shows_every_unit() {
        assert_eq!(clock(0), "0000:00:00.000");
        assert_eq!(clock(3_723_004_999_999), "0001:02:03.004");
    }

    /// Everything that we print, QEMU prints with the same name and value.
    #[test]
    fn json_agrees_with_qemu() {
        let dir = tempfile::tempdir().unwrap();
        let script = format!(
            "cd {} && qemu-img create -q -f raw base 1M && for c in 0.10 1.1; do \
             qemu-img create -q -f qcow2 -o compat=$c -b base -F raw image.$c 3M && \
             qemu-img snapshot -c one image.$c; done",
            dir.path().display()
        );
        if Command::new("qemu-img").arg("--version").output().is_err() {
            writeln!(std::io::stderr(), "SKIPPED: qemu-img is not installed").unwrap();
            return;
        }
        assert!(
            Command::new("sh")
                .args(["-c", &script])
                .status()
                .unwrap()
                .success()
        );
        for compat in ["0.10", "1.1"] {
            let path = dir.path().join(format!("image.{compat}"));
            let config = InfoConfig {
                path: path.clone(),
                json: true,
                backing_chain: true,
                backing_dirs: Vec::new(),
            };
            let ours: Value = serde_json::from_str(&show(&run(&config).unwrap(), &config)).unwrap();
            let output = Command::new("qemu-img")
                .args(["info", "--backing-chain", "--output=json"])
                .arg(&path)
                .output()
                .unwrap();
            let theirs: Value = serde_json::from_slice(&output.stdout).unwrap();
            assert_eq!(ours, theirs);
        }
    }
}
