//! The query rows of one kernel call.

use super::attention::Problem;
use super::grid::Chunks;

/// Query rows of a register tile.
pub(crate) const TILE_ROWS: usize = 6;
/// The most query rows of a tile, a multiple of the rows of every register tile.
pub(crate) const MAX_TILE_ROWS: usize = 480;
/// The number of query rows of a KV head from which on the packed path pays.
pub(crate) const PACK_ROWS: usize = 12;

/// The query rows and chunks of one kernel call, and the destination of the result.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    pub batch: usize,
    /// KV heads `kv_head..kv_head + kv_heads`; several only if there are fewer than [`PACK_ROWS`] rows of each.
    pub kv_head: usize,
    pub kv_heads: usize,
    /// Query rows `first_row..first_row + head_rows` of every KV head. Query row r belongs to token `r / group` and to
    /// head `r % group` of the group.
    pub first_row: usize,
    pub head_rows: usize,
    /// The chunks `first_chunk..end_chunk` of the call, by index; see [`Chunks`].
    pub first_chunk: usize,
    pub end_chunk: usize,
    pub chunks: Chunks,
    /// If not null, `[chunks][rows]` states of [`partial_stride`] floats are written here instead of the output.
    pub partials: *mut f32,
}

impl Tile {
    pub fn rows(&self) -> usize {
        self.kv_heads * self.head_rows
    }

    /// Token and query head of every query row of the tile, in order.
    pub fn tokens_and_heads(&self, p: &Problem) -> impl Iterator<Item = (usize, usize)> + use<> {
        let Self { kv_head, kv_heads, first_row, head_rows, .. } = *self;
        let group = p.group;
        let first = (first_row / group, first_row % group);
        (kv_head..kv_head + kv_heads).flat_map(move |kv_head| {
            let (mut token, mut number) = first;
            (0..head_rows).map(move |_| {
                let row = (token, kv_head * group + number);
                number += 1;
                if number == group {
                    (token, number) = (token + 1, 0);
                }
                row
            })
        })
    }
}
