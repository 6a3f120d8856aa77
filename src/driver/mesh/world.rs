//! The processes that `mpirun` has started.
//!
//! A process that ends before its time must not leave the others waiting. There are three cases:
//! - It finds an error before the mesh runs. All processes [agree](World::agree) on errors before they go on, and end together.
//! - It dies, or cannot continue ([`Exchange::abort`]). `mpirun` notices that and ends the others by a signal, at which they
//!   report a sentence and exit.
//! - It stands still. A process that waits longer than its patience reports that and exits, which ends the others.

use std::fmt;
use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::datatype::PartitionMut;
use mpi::environment::Universe;
use mpi::topology::{Color, SimpleCommunicator};
use mpi::traits::{Communicator, CommunicatorCollectives, Destination, MatchedReceiveVec, Source};
use signal_hook::consts::SIGTERM;

use super::{Exchange, MeshAxis, MeshPart};
use crate::Mesh;
use crate::driver::error::{Error, ErrorKind, Result};

/// How often a process looks whether it has to end.
const WATCH: Duration = Duration::from_millis(50);
/// The tag of messages to process 0.
const MESSAGE: i32 = 1;
/// The most bytes of a sentence that another process is told.
const SENTENCE: usize = 4096;

/// An MPI object, which belongs to no thread. It is not freed: a communicator may outlive the end of MPI, and ending MPI waits
/// for other processes, which is not for a process that fails.
struct Serial<T>(ManuallyDrop<T>);

impl<T> Serial<T> {
    fn new(object: T) -> Self {
        Self(ManuallyDrop::new(object))
    }
}

// SAFETY: MPI is initialised for calls of any thread, one at a time, and what this holds is behind a mutex.
unsafe impl<T> Send for Serial<T> {}

/// All processes that `mpirun` has started, of which this is one.
pub struct World {
    universe: Serial<Universe>,
    shared: Arc<Shared>,
    rank: usize,
    size: usize,
}

struct Shared {
    world: Mutex<Serial<SimpleCommunicator>>,
    watch: Arc<Watch>,
    report: fn(&str),
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "World({} of {})", self.rank, self.size)
    }
}

/// What the thread looks at that ends this process.
struct Watch {
    start: Instant,
    patience: Duration,
    /// When a wait for other processes has begun, in milliseconds after the start and one; 0 if there is none.
    since: AtomicU64,
    /// What is waited for can take any time.
    patient: AtomicBool,
    /// This process has nothing more to say.
    finished: AtomicBool,
    terminated: Arc<AtomicBool>,
}

/// A wait for other processes.
struct Waiting<'a>(&'a Watch);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.since.store(0, Ordering::Relaxed);
    }
}

impl Watch {
    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64 + 1
    }

    fn waiting(&self) -> Waiting<'_> {
        self.since.store(self.now(), Ordering::Relaxed);
        Waiting(self)
    }

    /// Why this process has to end.
    fn verdict(&self) -> Option<String> {
        if self.finished.load(Ordering::SeqCst) {
            return None;
        }
        if self.terminated.load(Ordering::SeqCst) {
            return Some(
                "another process of the mesh has ended before its time, or the mesh was told to end".to_owned(),
            );
        }
        let since = self.since.load(Ordering::Relaxed);
        let waited = self.now().saturating_sub(since);
        let impatient =
            since > 0 && !self.patient.load(Ordering::Relaxed) && u128::from(waited) > self.patience.as_millis();
        impatient
            .then(|| format!("another process of the mesh has not answered for {} seconds", self.patience.as_secs()))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts and displacements as MPI has them.
fn layout(counts: &[usize]) -> Result<(Vec<i32>, Vec<i32>)> {
    let total: usize = counts.iter().sum();
    if i32::try_from(total).is_err() {
        return Err(Error::argument(format!("{total} elements in one exchange; MPI takes {}", i32::MAX)));
    }
    let starts = counts.iter().scan(0, |sum, &n| Some(std::mem::replace(sum, *sum + n as i32))).collect();
    Ok((counts.iter().map(|&n| n as i32).collect(), starts))
}

impl World {
    /// Joins the other processes. A process that waits for another one longer than `patience` ends. `report` writes a
    /// sentence for the user before a process ends by itself.
    pub fn start(patience: Duration, report: fn(&str)) -> Result<Self> {
        let terminated = Arc::default();
        signal_hook::flag::register(SIGTERM, Arc::clone(&terminated)).map_err(Error::signal)?;
        let Some((universe, level)) = mpi::initialize_with_threading(Threading::Serialized) else {
            return Err(Error::argument("MPI is initialised twice"));
        };
        if level < Threading::Serialized {
            return Err(Error::unsupported("this MPI library takes calls of one thread only"));
        }
        let world = universe.world();
        let (rank, size) = (world.rank() as usize, world.size() as usize);
        let watch = Arc::new(Watch {
            start: Instant::now(),
            patience,
            since: AtomicU64::new(0),
            patient: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            terminated,
        });
        let watched = watch.clone();
        std::thread::spawn(move || {
            loop {
                if let Some(sentence) = watched.verdict() {
                    report(&sentence);
                    // Others may wait for this process in whatever an orderly exit would call.
                    signal_hook::low_level::exit(1);
                }
                std::thread::sleep(WATCH);
            }
        });
        let shared = Arc::new(Shared { world: Mutex::new(Serial::new(world)), watch, report });
        Ok(Self { universe: Serial::new(universe), shared, rank, size })
    }

    /// The number of this process.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of processes.
    pub fn size(&self) -> usize {
        self.size
    }

    /// This process's part of a mesh, and its group: the processes with the same part of the data.
    pub fn part(&self, mesh: Mesh) -> Result<(MeshPart, Group)> {
        let needed = mesh.shards().map_err(|e| Error::argument(e.message()))?;
        if needed != self.size {
            return Err(Error::argument(format!(
                "the mesh data={},model={},sequence={} has {needed} processes, but {} started: mpirun -n {needed}",
                mesh.data,
                mesh.model,
                mesh.sequence,
                if self.size == 1 { "1 was".to_owned() } else { format!("{} were", self.size) }
            )));
        }
        let shard = mesh.shard(self.rank)?;
        let [data, model, sequence] = [shard.data(), shard.model(), shard.sequence()];
        let split = |color: usize, key: usize| {
            let _waiting = self.shared.watch.waiting();
            let world = lock(&self.shared.world);
            let part = world.0.split_by_color_with_key(Color::with_value(color as i32), key as i32);
            part.map(|part| Mutex::new(Serial::new(part))).ok_or_else(|| Error::argument("MPI made no communicator"))
        };
        let axes = [split(data * mesh.sequence + sequence, model)?, split(data * mesh.model + model, sequence)?];
        let group = Group { communicator: split(data, self.rank)?, shared: self.shared.clone() };
        let exchange = Arc::new(Mpi { axes, shared: self.shared.clone() });
        Ok((MeshPart::new(mesh, self.rank, exchange)?, group))
    }

    /// Makes an error of any process the end of all: of this one with its own sentence, or with that of the first that has one.
    pub fn agree<T>(&self, result: Result<T>) -> Result<T> {
        let mine = match &result {
            Ok(_) => Vec::new(),
            Err(e) => {
                let mut sentence = e.to_string();
                sentence.truncate(sentence.floor_char_boundary(SENTENCE));
                let wrong = u8::from(e.kind() == ErrorKind::Argument);
                [&[wrong], sentence.as_bytes()].concat()
            }
        };
        let all = self.gather(&mine)?;
        let value = result?;
        match all.iter().enumerate().find(|(_, sentence)| !sentence.is_empty()) {
            None => Ok(value),
            Some((rank, sentence)) => {
                let text = format!("process {rank}: {}", String::from_utf8_lossy(&sentence[1..]));
                Err(if sentence[0] == 1 { Error::argument(text) } else { Error::request(text) })
            }
        }
    }

    /// Checks that `value` is the same in all processes. `what` names it.
    pub fn same(&self, what: &str, value: &str) -> Result<()> {
        let all = self.gather(value.as_bytes())?;
        match all.iter().enumerate().find(|(_, other)| **other != all[0]) {
            None => Ok(()),
            Some((rank, other)) => Err(Error::argument(format!(
                "{what} is {} in process {rank}, but {} in process 0",
                String::from_utf8_lossy(other),
                String::from_utf8_lossy(&all[0])
            ))),
        }
    }

    /// The bytes of every process.
    pub fn gather(&self, mine: &[u8]) -> Result<Vec<Vec<u8>>> {
        let _waiting = self.shared.watch.waiting();
        let world = lock(&self.shared.world);
        let mut lengths = vec![0u64; self.size];
        world.0.all_gather_into(&(mine.len() as u64), &mut lengths[..]);
        let lengths: Vec<usize> = lengths.into_iter().map(|n| n as usize).collect();
        let (counts, starts) = layout(&lengths)?;
        let mut all = vec![0u8; lengths.iter().sum()];
        if !all.is_empty() {
            // The address of a slice of no bytes can be that by which MPI knows a gathering in place.
            let sent = [mine, &[0]].concat();
            world.0.all_gather_varcount_into(&sent[..mine.len()], &mut PartitionMut::new(&mut all[..], counts, starts));
        }
        let mut rest = &all[..];
        Ok(lengths.iter().map(|&n| rest.split_off(..n).unwrap_or_default().to_vec()).collect())
    }

    /// The bytes of process 0. Other processes give none.
    pub fn broadcast(&self, mine: &[u8]) -> Result<Vec<u8>> {
        Ok(self.gather(if self.rank == 0 { mine } else { &[] })?.swap_remove(0))
    }

    /// Sends a message to process 0, which must [receive](Self::receive).
    pub fn send(&self, message: &[u8]) {
        let _waiting = self.shared.watch.waiting();
        lock(&self.shared.world).0.process_at_rank(0).send_with_tag(message, MESSAGE);
    }

    /// A message that has come, and its sender.
    pub fn receive(&self) -> Option<(usize, Vec<u8>)> {
        let world = lock(&self.shared.world);
        let found = world.0.any_process().immediate_matched_probe_with_tag(MESSAGE)?;
        let sender = found.1.source_rank() as usize;
        Some((sender, found.matched_receive_vec::<u8>().0))
    }

    /// Ends all processes with a sentence of this one.
    pub fn abort(&self, error: &Error) {
        self.shared.abort(error);
    }

    /// From now on, waits as long as it takes.
    pub fn be_patient(&self) {
        self.shared.watch.patient.store(true, Ordering::Relaxed);
    }

    /// Waits for all processes, as long as it takes, and leaves. Without it, a process must end by [`Self::abort`], or with all
    /// others by an error that they [agree](Self::agree) on.
    pub fn finish(self) {
        // Another process may be gone before this one.
        self.shared.watch.finished.store(true, Ordering::SeqCst);
        drop(ManuallyDrop::into_inner(self.universe.0));
    }
}

impl Shared {
    fn abort(&self, error: &Error) {
        (self.report)(&error.to_string());
        // Not by a lock: another thread may hold it while it waits for a process that never answers.
        match self.world.try_lock() {
            Ok(world) => world.0.abort(1),
            Err(_) => signal_hook::low_level::exit(1),
        }
    }
}

/// The processes with the same part of the data.
pub struct Group {
    communicator: Mutex<Serial<SimpleCommunicator>>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Group")
    }
}

impl Group {
    /// Whether `flag` is set in any process of the group.
    pub fn any(&self, flag: bool) -> bool {
        let _waiting = self.shared.watch.waiting();
        let mut any = 0u8;
        lock(&self.communicator).0.all_reduce_into(&u8::from(flag), &mut any, SystemOperation::max());
        any > 0
    }
}

/// Exchanges of a mesh over MPI.
struct Mpi {
    /// Along the axes model and sequence.
    axes: [Mutex<Serial<SimpleCommunicator>>; 2],
    shared: Arc<Shared>,
}

impl fmt::Debug for Mpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mpi")
    }
}

impl Exchange for Mpi {
    fn all_gather(&self, axis: MeshAxis, mine: &[f32], counts: &[usize], all: &mut [f32]) -> Result<()> {
        let (counts, starts) = layout(counts)?;
        let _waiting = self.shared.watch.waiting();
        let axis = lock(&self.axes[axis as usize]);
        axis.0.all_gather_varcount_into(mine, &mut PartitionMut::new(all, counts, starts));
        Ok(())
    }

    fn abort(&self, error: &Error) {
        self.shared.abort(error);
    }
}
