//! The files that the operations of a ring name, and their places in the kernel's table of registered
//! descriptors.

use std::io;
use std::sync::Arc;

use io_uring::Submitter;

use crate::storage::FileId;
use crate::storage::file::HostFile;

/// Descriptors that a ring registers: two for each of the first files.
const REGISTERED_MAX: u32 = 128;

/// The files of a ring, by their ids.
pub(super) struct FileTable {
    files: Vec<RingFile>,
    /// Length of the table of registered descriptors; 0 if the kernel refused to have one.
    registered: u32,
}

/// One of them.
pub(super) struct RingFile {
    /// Keeps the descriptors open while SQEs name them.
    pub(super) file: Arc<HostFile>,
    /// Index of the main descriptor in the registered table; the buffered one comes next.
    pub(super) fixed: Option<u32>,
}

impl FileTable {
    /// An empty table. Without one in the kernel (descriptor limit, memory) operations name plain
    /// descriptors.
    pub(super) fn new(submitter: &Submitter<'_>) -> FileTable {
        let registered = match submitter.register_files_sparse(REGISTERED_MAX) {
            Ok(()) => REGISTERED_MAX,
            Err(_) => 0,
        };
        FileTable {
            files: Vec::new(),
            registered,
        }
    }

    /// The file with this id.
    #[inline]
    pub(super) fn get(&self, id: FileId) -> Option<&RingFile> {
        self.files.get(usize::from(id.0))
    }

    /// Adds a host file.
    pub(super) fn add(
        &mut self,
        submitter: &Submitter<'_>,
        file: Arc<HostFile>,
    ) -> io::Result<FileId> {
        let id = u16::try_from(self.files.len()).map_err(io::Error::other)?;
        let index = u32::from(id) * 2;
        let mut fixed = None;
        if index + 1 < self.registered {
            let fds = [file.fd(), file.buffered_fd().unwrap_or(file.fd())];
            // Without an entry in the table the plain descriptors do as well.
            fixed = submitter
                .register_files_update(index, &fds)
                .ok()
                .map(|_| index);
        }
        self.files.push(RingFile { file, fixed });
        Ok(FileId(id))
    }

    /// Forgets all files. Nothing is queued or in flight.
    pub(super) fn forget(&mut self, submitter: &Submitter<'_>) {
        let fixed = self.files.iter().filter(|entry| entry.fixed.is_some());
        let none = vec![-1; fixed.count() * 2];
        // A place that stays in use keeps its file open until another takes it; nothing names it.
        let _ = submitter.register_files_update(0, &none);
        self.files.clear();
    }

    /// Lets go of the files at the end of the ring. The kernel tears a ring down after the close
    /// returned; a lock on a file that was left in the table would stay until then. Failing that, it
    /// is only later.
    pub(super) fn unregister(&self, submitter: &Submitter<'_>) {
        if self.registered != 0 {
            let _ = submitter.unregister_files();
        }
    }
}
