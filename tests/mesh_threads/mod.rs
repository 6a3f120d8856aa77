//! A mesh whose processes are threads of the test: it shows that the parts make the whole, without MPI.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex};

use kvlane::Mesh;
use kvlane::driver::mesh::{Exchange, MeshAxis, MeshPart};
use kvlane::driver::{Decoder, Error, ModelFile, Result, Threads};

/// The parts that were given for an exchange: by axis, the ranks that take part, and its number.
type Rounds = BTreeMap<(bool, usize, usize), BTreeMap<usize, Vec<f32>>>;

#[derive(Debug, Default)]
struct Board {
    rounds: Mutex<(Rounds, Option<String>)>,
    changed: Condvar,
}

#[derive(Debug)]
struct Process {
    board: Arc<Board>,
    mesh: Mesh,
    rank: usize,
    /// The number of exchanges so far, by axis.
    done: Mutex<[usize; 2]>,
}

impl Exchange for Process {
    fn all_gather(&self, axis: MeshAxis, mine: &[f32], counts: &[usize], all: &mut [f32]) -> Result<()> {
        let shard = self.mesh.shard(self.rank).unwrap();
        let by_model = axis == MeshAxis::Model;
        let (own, group) = match axis {
            MeshAxis::Model => (shard.model(), shard.data() * self.mesh.sequence + shard.sequence()),
            MeshAxis::Sequence => (shard.sequence(), shard.data() * self.mesh.model + shard.model()),
        };
        assert_eq!(counts[own], mine.len(), "the part of rank {} along {axis:?}", self.rank);
        let number = {
            let done = &mut self.done.lock().unwrap()[axis as usize];
            *done += 1;
            *done
        };
        let key = (by_model, group, number);
        let mut rounds = self.board.rounds.lock().unwrap();
        rounds.0.entry(key).or_default().insert(own, mine.to_vec());
        self.board.changed.notify_all();
        while rounds.0[&key].len() < counts.len() && rounds.1.is_none() {
            rounds = self.board.changed.wait(rounds).unwrap();
        }
        if rounds.0[&key].len() < counts.len() {
            // Which error does not matter to those who wait.
            return Err(Error::from(kvlane::Mesh::new(0, 0, 0).shards().unwrap_err()));
        }
        let parts: Vec<f32> = rounds.0[&key].values().flatten().copied().collect();
        all.copy_from_slice(&parts);
        Ok(())
    }

    fn abort(&self, error: &Error) {
        self.board.rounds.lock().unwrap().1 = Some(error.to_string());
        self.board.changed.notify_all();
    }
}

/// The part of every process of a mesh.
pub fn parts(mesh: Mesh) -> Vec<MeshPart> {
    let board = Arc::new(Board::default());
    let part = |rank| {
        let process = Process { board: board.clone(), mesh, rank, done: Mutex::default() };
        MeshPart::new(mesh, rank, Arc::new(process)).unwrap()
    };
    (0..mesh.shards().unwrap()).map(part).collect()
}

/// What every process of a mesh returns, in the order of ranks.
pub fn run<T: Send>(file: &ModelFile, mesh: Mesh, process: impl Fn(&Decoder) -> T + Sync) -> Vec<T> {
    let process = &process;
    std::thread::scope(|scope| {
        let handles: Vec<_> = parts(mesh)
            .into_iter()
            .map(|part| {
                scope.spawn(move || {
                    let weights = file.weights_of_part(&part, &|_, _| ()).unwrap();
                    let threads = Threads::new(1).unwrap();
                    let decoder = Decoder::new(file.config().clone(), weights, 0, None, threads).unwrap();
                    process(&decoder.on_mesh(&part).unwrap())
                })
            })
            .collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    })
}
