//! Register tiles: how the query rows of a tile are grouped.

use super::TILE_PAIRS;
use crate::problem::grid::KeyRange;

/// The pairs of query rows of one register tile, and the keys of a block from the first to the last that is visible to
/// any of them.
#[derive(Clone, Copy)]
pub(super) struct Group {
    /// The first pair of rows, and their number.
    pub first: usize,
    pub pairs: usize,
    pub keys: KeyRange,
}

/// The pairs of rows of the next register tile when `left` remain: the tiles are few and nearly equal.
fn pairs_at_once(left: usize) -> usize {
    match left {
        7 | 8 => 4,
        _ => left.min(TILE_PAIRS),
    }
}

/// The first pair and the number of pairs of every register tile of `rows` rows.
pub(super) fn groups(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    let pairs = rows.div_ceil(2);
    let mut first = 0;
    std::iter::from_fn(move || {
        let group = (first, pairs_at_once(pairs - first));
        first += group.1;
        (group.1 > 0).then_some(group)
    })
}
