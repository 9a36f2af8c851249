//! `qblkd info`: the image to describe.

use std::path::PathBuf;

use crate::args::InfoArgs;

/// What `info` shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InfoConfig {
    /// The file.
    pub path: PathBuf,
    /// JSON instead of text.
    pub json: bool,
    /// With the backing files.
    pub backing_chain: bool,
    /// Directories besides the image's own that backing files may be in.
    pub backing_dirs: Vec<PathBuf>,
}

pub(super) fn info(args: InfoArgs) -> InfoConfig {
    InfoConfig {
        path: args.file,
        json: args.json,
        backing_chain: args.backing_chain,
        backing_dirs: args.backing_dir,
    }
}
