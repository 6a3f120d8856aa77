//! Pages of a paged cache: copied, and gathered at the start of their pool.

use super::{
    KvLayer, Layers, SafeLayers, Step, check_requantized, for_each_piece, move_tokens, validate_layers, validate_rows,
};
use crate::context::Context;
use crate::error::{Result, ensure};
use crate::layout::Layout;
use crate::parallel::Runner;
use crate::view::{BATCH, SEQ};

/// Copies whole pages of a pool, from `moves[i][0]` to `moves[i][1]`, in all layers: for a sequence that is about to write to a
/// page that it shares. The views of the layers are `[pages, page_size, kv_heads, dim]`. Fixed scales of pages or slots stay, and units
/// are [quantised by them](crate::docs::caches#described-integers) where they differ.
///
/// Thread safety: may be called from any number of threads at once on disjoint pools.
///
/// # Errors
/// [`Status::OutOfRange`](crate::Status::OutOfRange): a page does not exist.
/// [`Status::DuplicateSlot`](crate::Status::DuplicateSlot): a page is written twice, or both written and read. On an error,
/// nothing has been written.
pub fn copy_pages(context: &Context, runner: &dyn Runner, layers: &mut [KvLayer], moves: &[[i32; 2]]) -> Result<()> {
    // SAFETY: the views borrow what they reach.
    unsafe { copy_pages_raw(context, runner, &SafeLayers(layers), moves) }
}

/// Gathers the pages in use at the start of the pool, in all layers, and returns their number; all later pages are then free.
/// The views of the layers are `[pages, page_size, kv_heads, dim]`.
///
/// The pages in use hold the first `lengths[b]` tokens of each sequence b, and shared pages stay shared. To keep pages that are
/// reserved, count them in `lengths`. Only pages beyond the new end move, in ascending order to the lowest free places: no call
/// could move fewer, and equal tables give equal moves.
///
/// `page_table`, `[batch, pages_per_sequence]`, is updated; its entries beyond the length of a sequence become -1, since
/// another sequence may have their pages. `map`, `[pages]`, receives the new number of each page, and -1 for pages that were
/// not in use.
///
/// Thread safety: may be called from any number of threads at once on disjoint pools.
///
/// # Errors
/// [`Status::Shape`](crate::Status::Shape): a list has the wrong length. [`Status::OutOfRange`](crate::Status::OutOfRange): a
/// length exceeds the entries of a sequence, or an entry is no page. On an error, nothing but `map` has been written.
///
/// ```
/// use kvlane::*;
/// let mut pool = [0.0f32, 1.0, 2.0, 3.0, 4.0, 5.0]; // six pages of one slot, of one head of one element
/// let mut layers = [KvLayer::keys(ViewMut::new(&mut pool, [6, 1, 1, 1])?)];
/// let (mut page_table, mut map) = ([5, 1, -1, 5, 3, 0], [0; 6]);
/// // Sequence 0 has two tokens; sequence 1 has two and shares the first.
/// let used = defragment_pages(&Context::new()?, &Serial, &mut layers, &mut page_table, 3, &[2, 2], &mut map)?;
/// assert_eq!((used, page_table), (3, [2, 1, -1, 2, 0, -1]));
/// assert_eq!(map, [-1, 1, -1, 0, -1, 2]);
/// drop(layers);
/// assert_eq!(pool[..3], [3.0, 1.0, 5.0]);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn defragment_pages(
    context: &Context,
    runner: &dyn Runner,
    layers: &mut [KvLayer],
    page_table: &mut [i32],
    pages_per_sequence: usize,
    lengths: &[i32],
    map: &mut [i32],
) -> Result<usize> {
    // SAFETY: the views borrow what they reach.
    unsafe { defragment_pages_raw(context, runner, &SafeLayers(layers), page_table, pages_per_sequence, lengths, map) }
}

/// # Safety
/// The memory that valid views reach is readable and writable by this call alone.
pub(crate) unsafe fn copy_pages_raw(
    context: &Context,
    runner: &dyn Runner,
    layers: &dyn Layers,
    moves: &[[i32; 2]],
) -> Result<()> {
    let [pages, size, ..] = validate_layers(layers)?.shape;
    check_requantized(layers, false)?;
    for (i, &[from, to]) in moves.iter().enumerate() {
        for (name, page) in [("from", from), ("to", to)] {
            ensure!(
                page >= 0 && (page as usize) < pages,
                OutOfRange,
                "move {i} is {name} page {page}, but the pool has {pages} pages"
            );
        }
        for (j, other) in moves.iter().enumerate() {
            ensure!(
                other[0] != to && (i == j || other[1] != to),
                DuplicateSlot,
                "page {to} is written by move {i} and {} by move {j}",
                if other[0] == to { "read" } else { "written" }
            );
        }
    }
    let work = moves.len().saturating_mul(size);
    for_each_piece(runner, layers, work, &|_, piece| {
        let step = Step::copy(context, &piece.cache);
        for &[from, to] in moves {
            let (from, to) = ((from as usize, 0), (to as usize, 0));
            // SAFETY: the pages exist and are not the same, and this piece's heads are no other's.
            unsafe { move_tokens(&step, &piece.cache, from, &piece.cache, to, size) };
        }
    })
}

/// # Safety
/// The memory that valid views reach is readable and writable by this call alone.
pub(crate) unsafe fn defragment_pages_raw(
    context: &Context,
    runner: &dyn Runner,
    layers: &dyn Layers,
    page_table: &mut [i32],
    pages_per_sequence: usize,
    lengths: &[i32],
    map: &mut [i32],
) -> Result<usize> {
    let first = validate_layers(layers)?;
    check_requantized(layers, false)?;
    let (count, size) = (first.shape[BATCH], first.shape[SEQ]);
    let n = map.len();
    ensure!(n == count, Shape, "map has {n} entries, but the pool has {count} pages");
    let layout = Layout::Paged { page_table, pages_per_sequence };
    validate_rows(&layout, &first, lengths)?;
    for (row, &length) in lengths.iter().enumerate() {
        layout.validate_row("the cache", &first, row, 0, length as usize)?;
    }
    if page_table.is_empty() {
        map.fill(-1);
        return Ok(0);
    }
    let in_use = |row: usize| (lengths[row] as usize).div_ceil(size);

    map.fill(-1);
    let mut used = 0;
    for (row, entries) in page_table.chunks_exact(pages_per_sequence).enumerate() {
        for &page in &entries[..in_use(row)] {
            let target = &mut map[page as usize];
            if *target < 0 {
                (*target, used) = (page, used + 1);
            }
        }
    }
    // As many pages are in use beyond the new end as are free before it.
    let mut free = 0;
    for page in used..count {
        if map[page] < 0 {
            continue;
        }
        while map[free] >= 0 {
            free += 1;
        }
        map[page] = free as i32;
        free += 1;
    }

    let moves = (used..count).filter(|&page| map[page] >= 0);
    let work = moves.clone().count().saturating_mul(size);
    for_each_piece(runner, layers, work, &|_, piece| {
        let step = Step::copy(context, &piece.cache);
        for page in moves.clone() {
            let (from, to) = ((page, 0), (map[page] as usize, 0));
            // SAFETY: the pages exist, one is used and the other is not, and this piece's heads are no other's.
            unsafe { move_tokens(&step, &piece.cache, from, &piece.cache, to, size) };
        }
    })?;
    for (row, entries) in page_table.chunks_exact_mut(pages_per_sequence).enumerate() {
        let (live, rest) = entries.split_at_mut(in_use(row));
        live.iter_mut().for_each(|page| *page = map[*page as usize]);
        rest.fill(-1);
    }
    Ok(used)
}
