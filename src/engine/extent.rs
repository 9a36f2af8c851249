//! Extents: what a range of the virtual disk resolves to, in the caller's own storage.

use crate::storage::FileId;

/// A contiguous piece of a resolved request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Extent {
    /// Bytes of a host file.
    Data {
        /// The file that holds them.
        file: FileId,
        /// Where they start in it.
        host_offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Reads as zeroes.
    Zero {
        /// How many bytes.
        len: u64,
    },
}

/// Most extents that the fast path handles; a more scattered request takes the slow path.
pub const EXTENTS_MAX: usize = 16;

/// A list of extents without a heap.
#[derive(Debug)]
pub struct ExtentList {
    items: [Extent; EXTENTS_MAX],
    count: usize,
}

impl Default for ExtentList {
    fn default() -> Self {
        Self {
            items: [Extent::Zero { len: 0 }; EXTENTS_MAX],
            count: 0,
        }
    }
}

impl ExtentList {
    /// An empty list.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets all extents.
    #[inline]
    pub fn clear(&mut self) {
        self.count = 0;
    }

    /// The extents, in the order of the request.
    #[must_use]
    #[inline]
    pub fn as_slice(&self) -> &[Extent] {
        &self.items[..self.count]
    }

    /// Appends, merging with the last extent where they touch. `false`: the list is full.
    #[inline]
    #[must_use]
    pub(crate) fn push(&mut self, extent: Extent) -> bool {
        if let Some(last) = self
            .count
            .checked_sub(1)
            .and_then(|i| self.items.get_mut(i))
        {
            match (last, extent) {
                (
                    Extent::Data {
                        file,
                        host_offset,
                        len,
                    },
                    Extent::Data {
                        file: next_file,
                        host_offset: next,
                        len: more,
                    },
                ) if *file == next_file && *host_offset + *len == next => {
                    *len += more;
                    return true;
                }
                (Extent::Zero { len }, Extent::Zero { len: more }) => {
                    *len += more;
                    return true;
                }
                _ => {}
            }
        }
        match self.items.get_mut(self.count) {
            Some(slot) => {
                *slot = extent;
                self.count += 1;
                true
            }
            None => false,
        }
    }
}

/// The answer of the fast path.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Fast {
    /// Every byte is resolved; the extents are in the list.
    Ready,
    /// Something is missing, shared, compressed or scattered: use the `async` path.
    Slow,
}
