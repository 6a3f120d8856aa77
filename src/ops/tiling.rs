//! How the query rows of an attention call are cut into tiles.

use crate::cpu::cache;
use crate::kernels::api::AttentionFns;
use crate::parallel::MAX_WORKERS;
use crate::problem::grid::{BLOCK, Chunks, most_chunks, padded, partial_stride};
use crate::problem::tile::Tile;
use crate::view::{HEADS, SEQ};

/// The cut of query rows into tiles. It depends on shapes, lengths, threads and the CPU's cache only, and no bit of a result
/// depends on it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tiling {
    pub workers: usize,
    /// KV heads per tile.
    pub tile_heads: usize,
    /// Rows of each KV head.
    pub tile_rows: usize,
    pub tiles_per_head: usize,
    /// Tiles of all sequences and KV heads.
    pub tiles: usize,
    /// Chunks of keys in the longest sequence.
    pub chunks: usize,
    /// Whether every chunk of a tile is a unit of its own, which writes a partial state.
    pub split: bool,
    /// Bytes of one worker's scratch memory.
    pub scratch: usize,
    /// Bytes of the partial states of one tile.
    pub partials: usize,
}

/// The fewest rows to which tiles shrink if there are too few tiles for all workers.
const MIN_TILE_ROWS: usize = 24;

/// The most bytes of partial states; beyond them, rows are not split.
const MAX_PARTIALS: usize = 256 << 20;

/// Multiplications and additions below which another thread does not pay.
pub(super) const GRAIN: usize = 512 * 1024;

/// The most rows of a tile whose working set, a row of Q, of scores and of the accumulator each, fits five eighths of the
/// second-level cache. The larger a tile, the fewer times K and V are read; three eighths of the cache are left to them.
fn cached_rows(kernel: &AttentionFns, d: usize, dv: usize) -> usize {
    let row = (padded(d) + BLOCK + padded(dv)) * size_of::<f32>();
    let rows = cache::second_level() / 8 * 5 / row;
    (rows / kernel.row_step * kernel.row_step).clamp(MIN_TILE_ROWS, kernel.max_rows)
}

impl Tiling {
    /// `chunks` counts the chunks in which any row sees a key; `together` says that the heads of a token are neighbours in memory.
    /// The bytes grow with `chunks`.
    pub fn new(
        kernel: &AttentionFns,
        q: [usize; 4],
        k: [usize; 4],
        dv: usize,
        threads: usize,
        chunks: usize,
        together: bool,
    ) -> Self {
        let workers = threads.clamp(1, MAX_WORKERS);
        let [batch, seq, heads, d] = q;
        let (keys, kv_heads) = (k[SEQ], k[HEADS].max(1));
        let rows = seq.saturating_mul(heads / kv_heads).max(1);
        let jobs = 2 * workers;
        let (tile_heads, tile_rows) = if together && rows <= kernel.direct_rows {
            let groups = jobs.div_ceil(batch.saturating_mul(chunks).max(1));
            let heads = kv_heads.div_ceil(if workers > 1 { groups } else { 1 });
            (heads.min(kernel.max_rows / rows).min(kernel.max_heads), rows)
        } else if rows <= MIN_TILE_ROWS {
            (1, rows)
        } else {
            let wanted = jobs.div_ceil(batch.saturating_mul(kv_heads).max(1));
            let most = cached_rows(kernel, d, dv).min(rows.div_ceil(wanted).max(MIN_TILE_ROWS));
            let pieces = rows.div_ceil(most);
            (1, if pieces == 1 { rows } else { rows.div_ceil(pieces).next_multiple_of(kernel.row_step) })
        };
        let tiles_per_head = rows.div_ceil(tile_rows);
        let tiles = batch.saturating_mul(kv_heads.div_ceil(tile_heads)).saturating_mul(tiles_per_head);
        let state = partial_stride(dv) * size_of::<f32>();
        let all_partials = |chunks: usize| {
            batch.saturating_mul(kv_heads).saturating_mul(tile_rows * tiles_per_head).saturating_mul(chunks * state)
        };
        let split = workers > 1 && tiles < jobs && chunks > 1 && all_partials(most_chunks(keys)) <= MAX_PARTIALS;
        Self {
            workers,
            tile_heads,
            tile_rows,
            tiles_per_head,
            tiles,
            chunks,
            split,
            scratch: (kernel.scratch_bytes)(tile_heads * tile_rows, d, dv),
            partials: if split { chunks * tile_heads * tile_rows * state } else { 0 },
        }
    }

    pub fn bytes(&self) -> usize {
        self.workers.saturating_mul(self.scratch).saturating_add(self.tiles.saturating_mul(self.partials))
    }

    /// Tile `index`. The last rows come first: under causality they see the most keys, and the longest unit should not run last.
    ///
    /// `rows` gives the rows of a KV head in a sequence; some tiles of ragged queries have none.
    pub fn tile(&self, index: usize, rows: impl Fn(usize) -> usize, kv_heads: usize, chunks: Chunks) -> Tile {
        let (pair, piece) = (index / self.tiles_per_head, self.tiles_per_head - 1 - index % self.tiles_per_head);
        let groups = kv_heads.div_ceil(self.tile_heads);
        let (batch, kv_head) = (pair / groups, pair % groups * self.tile_heads);
        let rows = rows(batch);
        let first_row = (piece * self.tile_rows).min(rows);
        Tile {
            batch,
            kv_head,
            kv_heads: self.tile_heads.min(kv_heads - kv_head),
            first_row,
            head_rows: self.tile_rows.min(rows - first_row),
            first_chunk: 0,
            end_chunk: self.chunks,
            chunks,
            partials: std::ptr::null_mut(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::CacheFormat;
    use crate::kernels::api::Precision;
    use crate::ops::attention::attention_workspace_size;

    #[test]
    fn tiles_cover_every_row_once() {
        let kernel = crate::Context::new().unwrap().attention(CacheFormat::F32, CacheFormat::F32, Precision::Default);
        for (seq, group, batch, kv_heads, threads) in
            [(1, 4, 1, 8, 2), (200, 3, 2, 3, 5), (7, 71, 1, 1, 3), (1, 1, 1, 1, 64), (1, 1, 2, 300, 1), (3, 3, 1, 7, 2)]
        {
            for (together, chunks) in [(false, 5), (true, 5), (true, 1), (true, 0)] {
                let (q, k) = ([batch, seq, group * kv_heads, 64], [batch, 5000, kv_heads, 64]);
                let plan = Tiling::new(&kernel, q, k, 64, threads, chunks, together);
                assert!(plan.bytes() <= attention_workspace_size(q, k, 64, threads));
                let rows = seq * group;
                let mut seen = vec![0; batch * kv_heads * rows];
                for index in 0..plan.tiles {
                    let tile = plan.tile(index, |_| rows, kv_heads, Chunks::default());
                    for head in tile.kv_head..tile.kv_head + tile.kv_heads {
                        for row in tile.first_row..tile.first_row + tile.head_rows {
                            seen[(tile.batch * kv_heads + head) * rows + row] += 1;
                        }
                    }
                }
                assert!(seen.iter().all(|&n| n == 1), "{plan:?}");
            }
        }
    }
}
