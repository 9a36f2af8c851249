//! One file of the simulated disk, by sectors: what reads see, and what a power cut leaves.
//!
//! Knows operations by their number only. Invariants: `unflushed` lists, in the order of landing,
//! every version of a sector since its durable one; the last is the current one, unless a failed sync
//! forgot them. All maps are ordered, so that iterating them depends on the seed alone.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use fastrand::Rng;

use crate::storage::SgList;

/// Bytes that land, and survive a cut, as a whole.
pub(super) const SECTOR: u64 = 512;

/// A sector's bytes; `None` reads as zeroes and takes no space.
pub(super) type Content = Option<Arc<[u8; 512]>>;

/// How a file of the disk behaves.
#[derive(Clone, Copy, Debug)]
pub struct SimFileOptions {
    /// A regular file; `false`: a block device, whose length is fixed.
    pub can_grow: bool,
    /// Growing beyond this length is ENOSPC.
    pub len_max: u64,
    /// `punch_hole` works.
    pub can_punch: bool,
}

impl Default for SimFileOptions {
    fn default() -> Self {
        SimFileOptions {
            can_grow: true,
            len_max: u64::MAX,
            can_punch: true,
        }
    }
}

#[derive(Clone)]
pub(super) struct SimFile {
    pub(super) options: SimFileOptions,
    /// What reads see.
    current: BTreeMap<u64, Arc<[u8; 512]>>,
    /// What a cut leaves in any case.
    durable: BTreeMap<u64, Arc<[u8; 512]>>,
    /// Versions that are not durable: the operation and its content.
    unflushed: BTreeMap<u64, Vec<(u64, Content)>>,
    len: u64,
    durable_len: u64,
    /// As `unflushed`, of the length.
    unflushed_lens: Vec<(u64, u64)>,
}

impl SimFile {
    /// A file with this content, all of it durable.
    pub(super) fn new(bytes: &[u8], options: SimFileOptions) -> SimFile {
        let mut durable = BTreeMap::new();
        for (sector, piece) in (0..).zip(bytes.chunks(512)) {
            if piece.iter().any(|&byte| byte != 0) {
                let mut content = [0; 512];
                content[..piece.len()].copy_from_slice(piece);
                durable.insert(sector, Arc::new(content));
            }
        }
        SimFile::of_sectors(durable, bytes.len() as u64, options)
    }

    fn of_sectors(
        durable: BTreeMap<u64, Arc<[u8; 512]>>,
        len: u64,
        options: SimFileOptions,
    ) -> SimFile {
        SimFile {
            options,
            current: durable.clone(),
            durable,
            unflushed: BTreeMap::new(),
            len,
            durable_len: len,
            unflushed_lens: Vec::new(),
        }
    }

    /// The length that everybody sees.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// A sector as reads see it; `None` is all zeroes.
    pub(super) fn sector(&self, sector: u64) -> Option<&[u8; 512]> {
        self.current.get(&sector).map(|bytes| &**bytes)
    }

    /// The sectors that take space, of those in `range`.
    pub(super) fn sectors_in(&self, range: Range<u64>) -> impl Iterator<Item = u64> {
        self.current.range(range).map(|(&sector, _)| sector)
    }

    /// Bytes that the file takes.
    pub(super) fn allocated(&self) -> u64 {
        self.current.len() as u64 * SECTOR
    }

    /// The operations that a cut may undo.
    pub(super) fn unflushed_ops(&self) -> impl Iterator<Item = u64> {
        let sectors = self.unflushed.values().flatten().map(|&(op, _)| op);
        sectors.chain(self.unflushed_lens.iter().map(|&(op, _)| op))
    }

    /// Writes what reads see to a real file, with holes.
    pub(super) fn export(&self, path: &Path) -> io::Result<()> {
        let out = std::fs::File::create(path)?;
        out.set_len(self.len)?;
        for (&sector, bytes) in &self.current {
            let (from, to) = overlap(sector, 0, self.len);
            if from < to {
                out.write_all_at(&bytes[in_sector(sector, from, to)], from)?;
            }
        }
        Ok(())
    }

    /// Changes bytes durably, as no operation does.
    pub(super) fn poke(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        for sector in offset / SECTOR..end.div_ceil(SECTOR) {
            let (from, to) = overlap(sector, offset, end);
            let (at, len) = (
                usize::try_from(from - offset).unwrap(),
                in_sector(sector, from, to),
            );
            for map in [&mut self.current, &mut self.durable] {
                let mut content = map.get(&sector).map_or([0; 512], |old| **old);
                content[len.clone()].copy_from_slice(&bytes[at..at + len.len()]);
                map.insert(sector, Arc::new(content));
            }
            self.unflushed.remove(&sector);
        }
        self.len = self.len.max(end);
        self.durable_len = self.durable_len.max(end);
    }

    pub(super) fn set_sector(&mut self, op: u64, sector: u64, content: Content) {
        match &content {
            Some(bytes) => self.current.insert(sector, Arc::clone(bytes)),
            None => self.current.remove(&sector),
        };
        self.unflushed
            .entry(sector)
            .or_default()
            .push((op, content));
    }

    pub(super) fn set_len(&mut self, op: u64, len: u64) {
        if len < self.len {
            let first = len / SECTOR;
            let keep = usize::try_from(len % SECTOR).unwrap();
            let beyond: Vec<u64> = self
                .current
                .range(first..)
                .map(|(&sector, _)| sector)
                .collect();
            for sector in beyond {
                let mut bytes = None;
                if sector == first && keep != 0 {
                    let mut old = *self.current[&sector];
                    old[keep..].fill(0);
                    bytes = Some(Arc::new(old));
                }
                self.set_sector(op, sector, bytes);
            }
        }
        if len != self.len {
            self.len = len;
            self.unflushed_lens.push((op, len));
        }
    }

    pub(super) fn read(&self, offset: u64, sg: &SgList) {
        sg.fill_zero(0, sg.len());
        let end = (offset + sg.len()).min(self.len);
        let first = offset / SECTOR;
        for (&sector, bytes) in self.current.range(first..end.div_ceil(SECTOR).max(first)) {
            let (from, to) = overlap(sector, offset, end);
            if from < to {
                sg.copy_from(from - offset, &bytes[in_sector(sector, from, to)]);
            }
        }
    }

    /// Everything up to the last version that `covered` takes becomes durable.
    pub(super) fn flush(&mut self, covered: impl Fn(u64) -> bool) {
        let durable = &mut self.durable;
        self.unflushed.retain(|&sector, versions| {
            if let Some(at) = versions.iter().rposition(|&(op, _)| covered(op)) {
                store(durable, sector, &versions[at].1);
                versions.drain(..=at);
            }
            !versions.is_empty()
        });
        if let Some(at) = self.unflushed_lens.iter().rposition(|&(op, _)| covered(op)) {
            self.durable_len = self.unflushed_lens[at].1;
            self.unflushed_lens.drain(..=at);
        }
    }

    /// A failed sync: some of it becomes durable, the rest is never written by a later one.
    pub(super) fn lose(&mut self, rng: &mut Rng) {
        for (sector, versions) in std::mem::take(&mut self.unflushed) {
            if rng.bool() {
                store(
                    &mut self.durable,
                    sector,
                    &versions[rng.usize(..versions.len())].1,
                );
            }
        }
        if rng.bool()
            && let Some(&(_, len)) = self.unflushed_lens.last()
        {
            self.durable_len = len;
        }
        self.unflushed_lens.clear();
    }

    /// What is left after a cut: for each sector the version that `choose` picks, if any.
    pub(super) fn after_cut(&self, mut choose: impl FnMut(&[u64]) -> Option<usize>) -> SimFile {
        let mut durable = self.durable.clone();
        for (&sector, versions) in &self.unflushed {
            let ops: Vec<u64> = versions.iter().map(|&(op, _)| op).collect();
            if let Some(at) = choose(&ops) {
                store(&mut durable, sector, &versions[at].1);
            }
        }
        let ops: Vec<u64> = self.unflushed_lens.iter().map(|&(op, _)| op).collect();
        let len = choose(&ops).map_or(self.durable_len, |at| self.unflushed_lens[at].1);
        durable.retain(|&sector, _| sector * SECTOR < len);
        if let Some(last) = durable.get_mut(&(len / SECTOR)) {
            let mut bytes = **last;
            bytes[usize::try_from(len % SECTOR).unwrap()..].fill(0);
            *last = Arc::new(bytes);
        }
        SimFile::of_sectors(durable, len, self.options)
    }
}

fn store(map: &mut BTreeMap<u64, Arc<[u8; 512]>>, sector: u64, content: &Content) {
    match content {
        Some(bytes) => map.insert(sector, Arc::clone(bytes)),
        None => map.remove(&sector),
    };
}

/// The part of `offset..end` inside of a sector.
pub(super) fn overlap(sector: u64, offset: u64, end: u64) -> (u64, u64) {
    (offset.max(sector * SECTOR), end.min((sector + 1) * SECTOR))
}

pub(super) fn in_sector(sector: u64, from: u64, to: u64) -> Range<usize> {
    let at = |offset: u64| usize::try_from(offset - sector * SECTOR).unwrap();
    at(from)..at(to)
}
