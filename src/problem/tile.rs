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
    /// KV heads `kv_head..kv_head + kv_heads`; several only if there are few rows of each.
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
    pub fn tokens_and_heads(&self, p: &Problem) -> TokensAndHeads {
        let Self { kv_head, kv_heads, first_row, head_rows, .. } = *self;
        let group = p.group;
        // Most tiles begin at a KV head's first row.
        let first = if first_row == 0 { (0, 0) } else { (first_row / group, first_row % group) };
        let heads = if head_rows == 0 { 0 } else { kv_heads };
        TokensAndHeads { heads, head_rows, group, first, left: 0, token: 0, number: 0, next_head: kv_head * group }
    }
}

/// Iterator of [`Tile::tokens_and_heads`]: by KV head, and in each by query row.
#[derive(Clone)]
pub(crate) struct TokensAndHeads {
    /// KV heads that have not begun, and the query rows of each.
    heads: usize,
    head_rows: usize,
    group: usize,
    /// Token and number in the group of the first query row of a KV head.
    first: (usize, usize),
    /// Query rows left of the KV head that has begun.
    left: usize,
    token: usize,
    number: usize,
    /// The first query head of the KV head after it.
    next_head: usize,
}

impl Iterator for TokensAndHeads {
    type Item = (usize, usize);

    #[inline(always)]
    fn next(&mut self) -> Option<(usize, usize)> {
        if self.left == 0 {
            if self.heads == 0 {
                return None;
            }
            (self.heads, self.left) = (self.heads - 1, self.head_rows);
            (self.token, self.number) = self.first;
            self.next_head += self.group;
        }
        let row = (self.token, self.next_head - self.group + self.number);
        self.left -= 1;
        self.number += 1;
        if self.number == self.group {
            (self.token, self.number) = (self.token + 1, 0);
        }
        Some(row)
    }
}
