//! The disk as the engine holds it: [`Storage`], each call one operation that the driver completes.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::disk::SimDisk;
use super::operation::OpKind;
use super::task::yield_now;
use crate::storage::buffer::BufOwner;
use crate::storage::{AlignedBuf, FileId, SgList, Storage};

impl SimDisk {
    /// A handle that implements [`Storage`].
    pub fn storage(&self) -> SimStorage {
        SimStorage { disk: self.clone() }
    }

    fn submit(&self, kind: OpKind, file: FileId, range: (u64, u64), sg: SgList) -> SimOp {
        let id = self.state.borrow_mut().submit(kind, file, range, sg);
        SimOp {
            disk: self.clone(),
            id,
        }
    }
}

/// A submitted operation; completes when the driver completes it, never after a power cut.
struct SimOp {
    disk: SimDisk,
    /// 0: the power was off at submission.
    id: u64,
}

impl Future for SimOp {
    type Output = io::Result<bool>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = self.disk.state.borrow_mut();
        if state.off {
            if state.immediate {
                return Poll::Ready(Err(io::Error::from_raw_os_error(libc::ENODEV)));
            }
            return Poll::Pending;
        }
        let Some(op) = state.ops.get_mut(&self.id) else {
            panic!("polled after completion")
        };
        if op.result.is_none() {
            op.waker = Some(context.waker().clone());
            return Poll::Pending;
        }
        let op = state.ops.remove(&self.id);
        Poll::Ready(op.and_then(|op| op.result).unwrap_or(Ok(true)))
    }
}

impl Drop for SimOp {
    fn drop(&mut self) {
        let mut state = self.disk.state.borrow_mut();
        if let Some(op) = state.ops.get_mut(&self.id) {
            op.abandoned = true;
            op.waker = None;
            if op.result.is_some() {
                state.ops.remove(&self.id);
            }
        }
    }
}

/// [`Storage`] on a [`SimDisk`]. Clones are handles of the same disk, as each worker has one.
#[derive(Clone)]
pub struct SimStorage {
    disk: SimDisk,
}

impl SimStorage {
    /// The disk behind it.
    pub fn disk(&self) -> &SimDisk {
        &self.disk
    }
}

impl Storage for SimStorage {
    async fn pause(&self, _: std::time::Duration) {
        yield_now().await;
    }

    async fn read(&self, file: FileId, offset: u64, sg: SgList) -> io::Result<()> {
        assert!(sg.is_writable(), "read into the shared zero bytes");
        let range = (offset, sg.len());
        self.disk
            .submit(OpKind::Read, file, range, sg)
            .await
            .map(drop)
    }

    async fn read_buf(
        &self,
        file: FileId,
        offset: u64,
        buf: AlignedBuf,
    ) -> (io::Result<()>, AlignedBuf) {
        let len = buf.len();
        let owner = BufOwner::new(buf);
        let result = self.read(file, offset, owner.sg(len)).await;
        // Only after a power cut in immediate mode does the operation still hold the memory.
        let buf = owner.into_buf().unwrap_or_else(|| AlignedBuf::zeroed(len));
        (result, buf)
    }

    async fn write(&self, file: FileId, offset: u64, sg: SgList) -> io::Result<()> {
        let range = (offset, sg.len());
        self.disk
            .submit(OpKind::Write, file, range, sg)
            .await
            .map(drop)
    }

    async fn write_zeroes(
        &self,
        file: FileId,
        offset: u64,
        len: u64,
        _unmap: bool,
    ) -> io::Result<()> {
        self.disk
            .submit(OpKind::Zeroes, file, (offset, len), SgList::empty())
            .await
            .map(drop)
    }

    async fn punch_hole(&self, file: FileId, offset: u64, len: u64) -> io::Result<bool> {
        self.disk
            .submit(OpKind::Punch, file, (offset, len), SgList::empty())
            .await
    }

    async fn sync_data(&self, file: FileId) -> io::Result<()> {
        self.disk
            .submit(OpKind::Sync, file, (0, 0), SgList::empty())
            .await
            .map(drop)
    }

    async fn set_len(&self, file: FileId, len: u64) -> io::Result<()> {
        if !self.can_grow(file) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        self.disk
            .submit(OpKind::SetLen, file, (0, len), SgList::empty())
            .await
            .map(drop)
    }

    fn len(&self, file: FileId) -> io::Result<u64> {
        Ok(self.disk.state.borrow().files[usize::from(file.0)].len())
    }

    fn can_grow(&self, file: FileId) -> bool {
        self.disk.state.borrow().files[usize::from(file.0)]
            .options
            .can_grow
    }
}
