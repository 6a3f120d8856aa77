//! The tiles of an attention call as units of work for a runner: whole, chunk by chunk, or reduced from the states of chunks.

use crate::error::Result;
use crate::kernels::api::AttentionKernel;
use crate::parallel::{Runner, for_each_tile};
use crate::problem::attention::Problem;
use crate::problem::tile::Tile;

/// Memory that is cut by worker and tile.
#[derive(Clone, Copy)]
pub(super) struct SharedMemory(pub *mut u8);

impl SharedMemory {
    pub fn at(self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }
}

// SAFETY: workers and tiles take disjoint parts.
unsafe impl Sync for SharedMemory {}

/// The tiles of a validated call.
pub(super) struct Jobs<'a> {
    pub runner: &'a dyn Runner,
    pub kernel: &'a AttentionKernel,
    pub problem: &'a Problem<'a>,
    pub workers: usize,
    pub tiles: usize,
    /// The memory of the workers, `worker_bytes` bytes each: at least the scratch memory of the kernel.
    pub memory: SharedMemory,
    pub worker_bytes: usize,
}

impl Jobs<'_> {
    /// Writes the output of every tile.
    ///
    /// # Safety
    /// The problem is valid, the tiles are inside it and disjoint, and the memory is this call's alone.
    pub unsafe fn run_tiles(&self, tile: impl Fn(usize) -> Tile + Sync) -> Result<()> {
        for_each_tile(self.runner, self.workers, self.tiles, &|worker, index| {
            let tile = tile(index);
            if tile.rows() > 0 {
                // SAFETY: the caller's; the scratch is this worker's.
                unsafe { self.kernel.tile(self.problem, &tile, self.scratch(worker)) };
            }
        })
    }

    /// Writes the states of every tile, with each of its `chunks` chunks as a unit. `state` returns the address of the state of a
    /// chunk, from the number of the tile, the tile and the chunk.
    ///
    /// # Safety
    /// As [`Self::run_tiles`]; the states are disjoint and this call's alone.
    pub unsafe fn run_chunks(
        &self,
        chunks: usize,
        tile: impl Fn(usize) -> Tile + Sync,
        state: impl Fn(usize, &Tile, usize) -> *mut f32 + Sync,
    ) -> Result<()> {
        for_each_tile(self.runner, self.workers, self.tiles * chunks, &|worker, unit| {
            let (index, chunk) = (unit / chunks, unit % chunks);
            let tile = tile(index);
            if tile.rows() > 0 {
                let partials = state(index, &tile, chunk);
                let tile = Tile { first_chunk: chunk, end_chunk: chunk + 1, partials, ..tile };
                // SAFETY: the caller's; the scratch is this worker's, the state this unit's.
                unsafe { self.kernel.tile(self.problem, &tile, self.scratch(worker)) };
            }
        })
    }

    /// Writes the output of every tile from the states of its chunks, to which `tile` points. `tile` receives the memory of the
    /// worker, and may put the states there, behind the scratch memory of the kernel.
    ///
    /// # Safety
    /// As [`Self::run_tiles`]; the states of all chunks of a tile have been written.
    pub unsafe fn reduce(&self, tile: impl Fn(usize, *mut u8) -> Tile + Sync) -> Result<()> {
        for_each_tile(self.runner, self.workers, self.tiles, &|worker, index| {
            let tile = tile(index, self.scratch(worker));
            if tile.rows() > 0 {
                // SAFETY: the caller's; the scratch is this worker's.
                unsafe { self.kernel.reduce(self.problem, &tile, self.scratch(worker)) };
            }
        })
    }

    fn scratch(&self, worker: usize) -> *mut u8 {
        self.memory.at(worker * self.worker_bytes)
    }
}
