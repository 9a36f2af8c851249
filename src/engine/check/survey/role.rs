//! What a metadata cluster is for.

/// What a metadata cluster is used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// The header.
    Header,
    /// The active L1 table.
    ActiveL1,
    /// The L1 table of an internal snapshot.
    SnapshotL1,
    /// The snapshot table.
    SnapshotTable,
    /// The refcount table or a refcount block.
    Refcounts,
    /// The bitmap directory, a bitmap table or a bitmap's data.
    Bitmaps,
}

impl Role {
    /// What to call it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::ActiveL1 => "active L1 table",
            Self::SnapshotL1 => "snapshot's L1 table",
            Self::SnapshotTable => "snapshot table",
            Self::Refcounts => "refcount structure",
            Self::Bitmaps => "bitmap",
        }
    }
}
