//! The main thread's view of the settler: orders to it, answers from it, and the jobs that clients
//! see.
//!
//! A job is a piece of background work, known by its kind and number (`settle-1`). It appears when
//! the settler tells of it and is forgotten when it is done; a job that was given up stays until a
//! client dismisses it. Progress comes from the image itself. The events are QEMU's, in QEMU's
//! order.

use std::collections::HashMap;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};

use serde_json::{Value, json};

use super::chain::Chain;
use super::pace::Load;
use super::settler::{Answer, Failure, News, Service, Settler, Task};
use super::{DaemonError, system};
use crate::control::info::InternalSnapshotInfo;
use crate::control::job::{IoStatus, JobInfo, JobKind, JobStatus};
use crate::control::{
    CommandError, Event, IoErrorAction, IoOperation, Order, SnapshotAction, Ticket, no_snapshot,
    snapshot_exists,
};
use crate::device::Server;
use crate::engine::{self, BackgroundKind, BackgroundStatus, ErrorKind, Selector, SnapshotInfo};

/// A command's reply that has become known.
pub(super) type Reply = (Ticket, Result<Value, CommandError>);

/// A piece of background work as clients see it.
struct Job {
    /// As it was told last; the progress may be older than the image's.
    work: BackgroundStatus,
    /// Numbers given before the image of this work was served: each image counts from 1.
    base: u64,
    status: JobStatus,
    io_status: IoStatus,
    speed: u64,
    error: Option<String>,
}

impl Job {
    fn new(work: BackgroundStatus, base: u64) -> Self {
        Self {
            work,
            base,
            status: JobStatus::Created,
            io_status: IoStatus::Ok,
            speed: 0,
            error: None,
        }
    }

    fn id(&self) -> String {
        let kind = match self.work.kind {
            BackgroundKind::Settle => "settle",
            BackgroundKind::Delete => "delete",
            BackgroundKind::Reown => "reown",
            BackgroundKind::Rebuild => "rebuild",
        };
        format!("{kind}-{}", self.base + self.work.number)
    }

    fn info(&self) -> JobInfo {
        let about_one = !self.work.id.is_empty() || !self.work.name.is_empty();
        JobInfo {
            id: self.id(),
            kind: self.work.kind.into(),
            status: self.status,
            io_status: self.io_status,
            done: self.work.done,
            total: self.work.total,
            speed: self.speed,
            error: self.error.clone(),
            snapshot: about_one.then(|| (self.work.id.clone(), self.work.name.clone())),
        }
    }

    /// Changes the state, and returns the event of it.
    fn become_status(&mut self, status: JobStatus) -> Event {
        self.status = status;
        Event::JobStatusChange {
            id: self.id(),
            status,
        }
    }

    fn completed(&self) -> Event {
        Event::BlockJobCompleted {
            kind: JobKind::from(self.work.kind),
            device: self.id(),
            len: self.work.total,
            offset: self.work.done,
            speed: self.speed,
            error: self.error.clone(),
        }
    }
}

/// The settler of an image that is served, and its jobs.
pub(super) struct Background {
    device: String,
    /// What is served now.
    chain: Arc<Chain>,
    /// `None` for an image that is only read: nothing can be done to it.
    settler: Option<Settler>,
    news: mpsc::Receiver<News>,
    wake: UnixStream,
    /// The other end of `wake`.
    _bell: Arc<UnixStream>,
    table: JobTable,
    finishing: bool,
    ended: bool,
}

impl Background {
    /// Starts the settler of an image, if anything can be done to the image.
    ///
    /// # Errors
    /// The host has no thread, socket or ring for it.
    pub(super) fn start(
        device: &str,
        service: Service,
        server: &Server,
    ) -> Result<Self, DaemonError> {
        let chain = Arc::clone(&service.chain);
        let (wake, writer) = UnixStream::pair().map_err(system("make a socket pair"))?;
        for end in [&wake, &writer] {
            end.set_nonblocking(true)
                .map_err(system("set up the settler's socket"))?;
        }
        // One end stays here: without a settler, or after its end, the other must not become readable.
        let bell = Arc::new(writer);
        let rung = Arc::clone(&bell);
        let (sender, news) = mpsc::channel();
        let settler = if chain.image.is_read_only() {
            None
        } else {
            let stats = server.stats_reader();
            let meter = move || {
                let mut load = Load::default();
                let operations = stats().into_iter().flat_map(|worker| worker.operations);
                for operation in operations {
                    load.requests = load.requests.wrapping_add(operation.completed);
                    load.total_ns = load.total_ns.wrapping_add(operation.total_ns);
                }
                load
            };
            let tell = move |news| {
                // Whoever does not listen any more is on the way out.
                let _ = sender.send(news);
                // A full socket wakes as well.
                let _ = io::Write::write(&mut &*rung, &[0]);
            };
            Some(Settler::start(service, Box::new(meter), Box::new(tell))?)
        };
        Ok(Self {
            device: device.to_owned(),
            chain,
            ended: settler.is_none(),
            settler,
            news,
            wake,
            _bell: bell,
            table: JobTable::default(),
            finishing: false,
        })
    }

    /// Readable when there are news; `None` where there never are any.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        self.settler.as_ref().map(|_| self.wake.as_raw_fd())
    }

    /// Takes what the settler has told: replies to send first, then events.
    pub(super) fn take_news(&mut self) -> (Vec<Reply>, Vec<Event>) {
        let mut bytes = [0; 64];
        // Only a wake-up; the news are in the queue.
        let _ = self.wake.read(&mut bytes);
        let mut replies = Vec::new();
        while let Ok(news) = self.news.try_recv() {
            match news {
                News::Answered(ticket, result) => replies.push((ticket, self.reply(result))),
                News::Serving(chain) => {
                    self.chain = chain;
                    self.table.go_over();
                }
                News::Ended => self.ended = true,
                other => self.table.take(other),
            }
        }
        (replies, self.take_events())
    }

    /// Events that are due.
    pub(super) fn take_events(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.table.events)
    }

    /// What is served now.
    pub(super) fn chain(&self) -> &Arc<Chain> {
        &self.chain
    }

    fn reply(&self, result: Result<Answer, (Order, engine::Error)>) -> Result<Value, CommandError> {
        match result {
            Ok(Answer::Created) => Ok(json!({})),
            Ok(Answer::Deleted(snapshot) | Answer::Reverted(snapshot)) => {
                let mut info = InternalSnapshotInfo::from(&snapshot);
                info.more = None;
                Ok(json!(info))
            }
            Err((Order::Snapshot(actions), error)) => Err(self.snapshot_error(&actions, &error)),
            Err((Order::DeleteSnapshot(selector), error)) => {
                Err(self.selector_error("delete", &selector, &error))
            }
            Err((Order::RevertSnapshot(selector), error)) => {
                Err(self.selector_error("revert to", &selector, &error))
            }
        }
    }

    fn snapshot_error(&self, actions: &[SnapshotAction], error: &engine::Error) -> CommandError {
        let device = &self.device;
        let names = || {
            actions.iter().filter_map(|action| match action {
                SnapshotAction::Internal { name } => Some(name),
                SnapshotAction::External(_) => None,
            })
        };
        if names().next().is_none() {
            return CommandError::generic(format!(
                "Failed to take an external snapshot of device '{device}': {}",
                error.chain()
            ));
        }
        let taken = self.chain.image.snapshots();
        let is_taken = |name: &&String| taken.iter().any(|snapshot| snapshot.name == **name);
        let culprit = names().find(is_taken).or_else(|| names().next());
        let name = culprit.map_or("", String::as_str);
        if error.kind() == ErrorKind::Exists {
            return snapshot_exists(device, name);
        }
        let message = error.chain();
        CommandError::generic(format!(
            "Failed to create snapshot '{name}' on device '{device}': {message}"
        ))
    }

    fn selector_error(
        &self,
        what: &str,
        selector: &Selector,
        error: &engine::Error,
    ) -> CommandError {
        let device = &self.device;
        if error.kind() == ErrorKind::NotFound {
            return no_snapshot(device, selector);
        }
        let message = error.chain();
        CommandError::generic(format!(
            "Failed to {what} snapshot on device '{device}': {message}"
        ))
    }

    /// The internal snapshots as they are now.
    pub(super) fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.chain.image.snapshots()
    }

    /// The jobs, in the order in which they are done.
    pub(super) fn jobs(&mut self) -> Vec<JobInfo> {
        self.table.infos(&self.chain.image.background())
    }

    /// Limits a job.
    pub(super) fn set_speed(&mut self, id: &str, speed: u64) {
        let number = self
            .table
            .set_speed(id, speed, &self.chain.image.background());
        if let (Some(settler), Some(number)) = (&self.settler, number) {
            settler.send(Task::Speed(number, speed));
        }
    }

    /// Forgets a job.
    pub(super) fn dismiss(&mut self, id: &str) {
        self.table.dismiss(id);
    }

    /// Hands an order over.
    ///
    /// # Errors
    /// There is nobody to carry it out.
    pub(super) fn order(&self, ticket: Ticket, order: Order) -> Result<(), CommandError> {
        match &self.settler {
            _ if self.finishing => Err(CommandError::generic("qblkd is stopping")),
            Some(settler) if !self.ended => {
                settler.send(Task::Order(ticket, order));
                Ok(())
            }
            _ => Err(CommandError::generic(
                "nothing can be done to an image that is only read",
            )),
        }
    }

    /// Lets the settler do what is left at full speed, and end.
    pub(super) fn finish(&mut self) {
        if !std::mem::replace(&mut self.finishing, true)
            && let Some(settler) = &self.settler
        {
            settler.send(Task::Finish);
        }
    }

    /// Whether the settler was told to end.
    pub(super) fn is_finishing(&self) -> bool {
        self.finishing
    }

    /// Whether the settler has ended, or there is none.
    pub(super) fn has_ended(&self) -> bool {
        self.ended
    }

    /// Waits for a settler that was told to finish.
    ///
    /// # Errors
    /// The error that has left work undone.
    pub(super) fn join(mut self) -> Result<(), engine::Error> {
        self.finish();
        self.settler.take().map_or(Ok(()), Settler::join)
    }
}

/// The jobs and their events: what becomes of news, without threads.
#[derive(Default)]
struct JobTable {
    jobs: Vec<Job>,
    /// Number of the work that was told last.
    added_last: u64,
    /// Limits of work that was not told yet, by number.
    early_speeds: HashMap<u64, u64>,
    /// Numbers given before the present image was served.
    base: u64,
    /// Not sent yet.
    events: Vec<Event>,
}

impl JobTable {
    fn take(&mut self, news: News) {
        match news {
            News::Queued(work) => self.add(work),
            News::Running(number) => self.change(number, |job, events| {
                job.io_status = IoStatus::Ok;
                job.error = None;
                events.push(job.become_status(JobStatus::Running));
            }),
            News::Stopped(number, failure) => self.change(number, |job, events| {
                job.note(&failure);
                events.push(Event::BlockJobError {
                    device: job.id(),
                    operation: IoOperation::Write,
                    action: IoErrorAction::Stop,
                });
                events.push(job.become_status(JobStatus::Paused));
            }),
            News::Done(work) => {
                self.change(work.number, |job, events| {
                    job.work = work.clone();
                    // What was done is all there was.
                    job.work.total = job.work.total.max(job.work.done);
                    job.work.done = job.work.total;
                    events.push(job.become_status(JobStatus::Waiting));
                    events.push(job.become_status(JobStatus::Pending));
                    events.push(job.completed());
                    events.push(job.become_status(JobStatus::Concluded));
                    events.push(job.become_status(JobStatus::Null));
                });
                self.jobs.retain(|job| job.status != JobStatus::Null);
            }
            News::GivenUp(failure) => {
                for job in &mut self.jobs {
                    if job.status == JobStatus::Concluded {
                        continue;
                    }
                    job.note(&failure);
                    self.events.push(job.become_status(JobStatus::Aborting));
                    self.events.push(job.completed());
                    self.events.push(job.become_status(JobStatus::Concluded));
                }
            }
            News::Answered(..) | News::Serving(_) | News::Ended => {}
        }
    }

    fn add(&mut self, work: BackgroundStatus) {
        let mut job = self.untold(work);
        self.added_last = job.work.number;
        self.early_speeds
            .retain(|number, _| *number > self.added_last);
        self.events.push(job.become_status(JobStatus::Created));
        self.jobs.push(job);
    }

    /// What is told from now on is work of another image.
    fn go_over(&mut self) {
        self.base += std::mem::take(&mut self.added_last);
        self.early_speeds.clear();
    }

    fn change(&mut self, number: u64, change: impl FnOnce(&mut Job, &mut Vec<Event>)) {
        if let Some(job) = self.jobs.iter_mut().find(|job| job.work.number == number) {
            change(job, &mut self.events);
        }
    }

    /// The jobs with the progress of the work that is not done yet. Work that was not told yet is
    /// there too: who has just been told of a new snapshot looks for its job.
    fn infos(&mut self, works: &[BackgroundStatus]) -> Vec<JobInfo> {
        for work in works {
            self.change(work.number, |job, _| job.work = work.clone());
        }
        let untold = works.iter().filter(|work| work.number > self.added_last);
        let untold = untold.map(|work| self.untold(work.clone()));
        let told = self.jobs.iter().map(Job::info);
        told.chain(untold.map(|job| job.info())).collect()
    }

    /// A job as it is before it is told.
    fn untold(&self, work: BackgroundStatus) -> Job {
        let mut job = Job::new(work, self.base);
        job.speed = self
            .early_speeds
            .get(&job.work.number)
            .copied()
            .unwrap_or(0);
        job
    }

    /// Limits a job, told or not; returns its number.
    fn set_speed(&mut self, id: &str, speed: u64, works: &[BackgroundStatus]) -> Option<u64> {
        if let Some(job) = self.jobs.iter_mut().find(|job| job.id() == id) {
            job.speed = speed;
            return Some(job.work.number);
        }
        let is_it = |work: &&BackgroundStatus| {
            work.number > self.added_last && Job::new((*work).clone(), self.base).id() == id
        };
        let number = works.iter().find(is_it)?.number;
        self.early_speeds.insert(number, speed);
        Some(number)
    }

    fn dismiss(&mut self, id: &str) {
        let is_it = |job: &&mut Job| job.id() == id && job.status == JobStatus::Concluded;
        if let Some(job) = self.jobs.iter_mut().find(is_it) {
            self.events.push(job.become_status(JobStatus::Null));
        }
        self.jobs.retain(|job| job.status != JobStatus::Null);
    }
}

impl Job {
    fn note(&mut self, failure: &Failure) {
        self.error = Some(failure.message.clone());
        self.io_status = if failure.no_space {
            IoStatus::Nospace
        } else {
            IoStatus::Failed
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work(number: u64, done: u64) -> BackgroundStatus {
        BackgroundStatus {
            kind: BackgroundKind::Settle,
            number,
            id: "7".to_owned(),
            name: "first".to_owned(),
            done,
            total: 100,
        }
    }

    /// The events since the last call: (job, state), or the name of another event.
    fn told(table: &mut JobTable) -> Vec<String> {
        let events = std::mem::take(&mut table.events);
        events
            .into_iter()
            .map(|event| match event {
                Event::JobStatusChange { id, status } => format!("{id} {status:?}"),
                Event::BlockJobCompleted { offset, error, .. } => {
                    format!("completed {offset} {error:?}")
                }
                Event::BlockJobError { action, .. } => format!("error {action:?}"),
                other => format!("{other:?}"),
            })
            .collect()
    }

    fn failure() -> Failure {
        Failure {
            no_space: true,
            message: "full".to_owned(),
        }
    }

    #[test]
    fn a_job_goes_through_qemus_states_and_is_forgotten() {
        let mut table = JobTable::default();
        table.take(News::Queued(work(3, 0)));
        table.take(News::Running(3));
        assert_eq!(told(&mut table), ["settle-3 Created", "settle-3 Running"]);
        let infos = table.infos(&[work(3, 40), work(4, 0)]);
        let ids: Vec<_> = infos.iter().map(|info| &info.id).collect();
        assert_eq!(ids, ["settle-3", "settle-4"]);
        let info = &infos[0];
        assert_eq!((info.done, info.total), (40, 100));
        assert_eq!(info.snapshot, Some(("7".to_owned(), "first".to_owned())));
        table.take(News::Done(work(3, 100)));
        assert_eq!(
            told(&mut table),
            [
                "settle-3 Waiting",
                "settle-3 Pending",
                "completed 100 None",
                "settle-3 Concluded",
                "settle-3 Null",
            ]
        );
        assert!(table.jobs.is_empty());
    }

    /// A client that has its answer looks for the job and limits it, before the job was told.
    #[test]
    fn a_job_can_be_limited_before_it_is_told() {
        let mut table = JobTable::default();
        let works = [work(1, 0), work(2, 0)];
        table.take(News::Queued(work(1, 0)));
        assert_eq!(table.set_speed("settle-2", 5, &works), Some(2));
        assert_eq!(table.set_speed("settle-1", 7, &works), Some(1));
        assert_eq!(table.set_speed("delete-2", 9, &works), None);
        let speeds =
            |table: &mut JobTable| table.infos(&works).iter().map(|info| info.speed).collect();
        let before: Vec<u64> = speeds(&mut table);
        table.take(News::Queued(work(2, 0)));
        let after: Vec<u64> = speeds(&mut table);
        assert_eq!((before, after), (vec![7, 5], vec![7, 5]));
    }

    /// A revert or an external snapshot brings another image, which counts its work from 1: a client
    /// saw two jobs of one id.
    #[test]
    fn no_id_is_given_twice() {
        let mut table = JobTable::default();
        let mut ids = Vec::new();
        for _ in 0..3 {
            table.take(News::Queued(work(1, 0)));
            table.take(News::Queued(work(2, 0)));
            ids.extend(table.jobs.iter().map(Job::id));
            let untold = table.infos(&[work(1, 0), work(2, 0), work(3, 0)]);
            assert_eq!(untold[2].id, format!("settle-{}", ids.len() + 1));
            table.take(News::Done(work(1, 100)));
            table.take(News::Done(work(2, 100)));
            table.go_over();
        }
        let expected: Vec<_> = (1..=6).map(|number| format!("settle-{number}")).collect();
        assert_eq!(ids, expected);
    }

    #[test]
    fn an_error_pauses_a_job_until_it_runs_again() {
        let mut table = JobTable::default();
        table.take(News::Queued(work(1, 0)));
        table.take(News::Running(1));
        table.take(News::Stopped(1, failure()));
        let info = table.jobs[0].info();
        assert_eq!(info.status, JobStatus::Paused);
        assert_eq!(info.io_status, IoStatus::Nospace);
        assert_eq!(info.error.as_deref(), Some("full"));
        table.take(News::Running(1));
        let info = table.jobs[0].info();
        assert_eq!(
            (info.status, info.io_status),
            (JobStatus::Running, IoStatus::Ok)
        );
        assert_eq!(info.error, None);
        assert_eq!(
            told(&mut table),
            [
                "settle-1 Created",
                "settle-1 Running",
                "error Stop",
                "settle-1 Paused",
                "settle-1 Running",
            ]
        );
    }

    #[test]
    fn a_job_that_was_given_up_stays_until_it_is_dismissed() {
        let mut table = JobTable::default();
        table.take(News::Queued(work(1, 0)));
        table.take(News::Queued(work(2, 0)));
        told(&mut table);
        table.take(News::GivenUp(failure()));
        assert_eq!(
            told(&mut table),
            [
                "settle-1 Aborting",
                "completed 0 Some(\"full\")",
                "settle-1 Concluded",
                "settle-2 Aborting",
                "completed 0 Some(\"full\")",
                "settle-2 Concluded",
            ]
        );
        table.dismiss("settle-1");
        assert_eq!(told(&mut table), ["settle-1 Null"]);
        assert_eq!(table.jobs.len(), 1);
    }
}
