//! Beam search: sequences are replaced by their parents, by moving tokens or by moving entries of a table.

use super::lengths::check_slots_free;
use super::{
    KvCache, Layers, RawCache, SafeLayers, Step, cache_at, check_requantized, copy_parameters, copy_tokens,
    for_each_piece, move_tokens,
};
use crate::context::Context;
use crate::error::{Result, ensure};
use crate::layout::Layout;
use crate::ops::workspace::{Workspace, check_workspace};
use crate::ops::write::tokens_sharing;
use crate::parallel::{MAX_WORKERS, Runner};
use crate::view::{DIM, HEADS, RawCacheView, RawView, SEQ, Units, contiguous};

impl KvCache<'_, '_> {
    /// Replaces every sequence b by what sequence `parents[b]` was, tokens and length (beam search). Only valid tokens move,
    /// and only those of sequences that are not their own parents. A sequence may be the parent of several sequences, or of
    /// none. Tokens keep all bits, with the scales that they share; fixed scales of sequences stay, and units are
    /// [quantised by them](crate::docs::caches#described-integers) where they differ.
    ///
    /// The sequences of a paged cache are reordered by the caller, who permutes the table and shares pages;
    /// [`copy_pages`](crate::copy_pages) gives a sequence a last page of its own. Ragged sequences have no room for each
    /// other's tokens.
    ///
    /// # Errors
    /// [`Status::Shape`](crate::Status::Shape): the list has not an entry per sequence.
    /// [`Status::OutOfRange`](crate::Status::OutOfRange): a parent does not exist.
    /// [`Status::InvalidValue`](crate::Status::InvalidValue): the layout is neither contiguous nor a ring. On an error, nothing
    /// has been written.
    pub fn reorder(
        &mut self,
        context: &Context,
        runner: &dyn Runner,
        workspace: &mut Workspace,
        parents: &[i32],
    ) -> Result<()> {
        self.with_raw(|cache| {
            let needed = reorder_workspace_size_raw(cache.layers, cache.lengths.len(), runner.num_threads())?;
            workspace.reserve(needed);
            // SAFETY: the views borrow what they reach, and the workspace is ours.
            unsafe { reorder_raw(context, runner, (workspace.as_mut_ptr(), workspace.len()), cache, parents) }
        })
    }
}

/// Bytes of workspace that [`KvCache::reorder`] needs for these layers, `sequences` sequences and `threads` threads.
pub fn reorder_workspace_size(layers: &[super::KvLayer], sequences: usize, threads: usize) -> usize {
    reorder_workspace_size_raw(&SafeLayers(layers), sequences, threads).unwrap_or(0)
}

/// Bytes of workspace that [`reorder_table`] needs for a table `[sequences, capacity]`.
pub fn reorder_table_workspace_size(sequences: usize, capacity: usize) -> usize {
    plan_bytes(sequences).saturating_add(capacity.saturating_mul(size_of::<i32>()))
}

/// Replaces every sequence b of the table of an [`Indirect`](Layout::Indirect) cache, `[batch, capacity]`, by what sequence
/// `parents[b]` was, and its length likewise. No token moves; see [the steps of a beam
/// search](crate::KvCache#beam-search-without-copies).
///
/// Entries beyond a length have no meaning, before and after.
///
/// Thread safety: may be called from any number of threads at once on disjoint tables and workspaces.
///
/// # Errors
/// [`Status::Shape`](crate::Status::Shape): lists have different lengths. [`Status::OutOfRange`](crate::Status::OutOfRange): a
/// parent does not exist, or a length is negative or above the capacity. [`Status::Overlap`](crate::Status::Overlap): a
/// sequence would write slots again in which another sequence has tokens. On an error, nothing has changed.
///
/// ```
/// use kvlane::*;
/// let (sequences, capacity) = (3, 4);
/// let (mut table, mut lengths) = (vec![0; sequences * capacity], [2; 3]);
/// set_table_tokens(&mut table, capacity, &[0; 3], 2)?; // every sequence has written two tokens
/// reorder_table(&mut Workspace::new(), &mut table, capacity, &mut lengths, &[2, 0, 2])?;
/// set_table_tokens(&mut table, capacity, &lengths, 1)?; // and one more
/// assert_eq!(table[..3], [2, 2, 0]);
/// assert_eq!(table[4..7], [0, 0, 1]);
/// # Ok::<(), kvlane::Error>(())
/// ```
pub fn reorder_table(
    workspace: &mut Workspace,
    table: &mut [i32],
    capacity: usize,
    lengths: &mut [i32],
    parents: &[i32],
) -> Result<()> {
    workspace.reserve(reorder_table_workspace_size(parents.len(), capacity));
    // SAFETY: the workspace is ours.
    unsafe { reorder_table_raw((workspace.as_mut_ptr(), workspace.len()), table, capacity, lengths, parents) }
}

/// Enters new tokens in the table of an [`Indirect`](Layout::Indirect) cache, `[batch, capacity]`: `tokens` tokens of every
/// sequence b, from position `positions[b]` on, lie in sequence b of the cache, where they have just been written.
///
/// # Errors
/// [`Status::Shape`](crate::Status::Shape): the table has not `capacity` entries per position.
/// [`Status::OutOfRange`](crate::Status::OutOfRange): a position is negative. [`Status::Capacity`](crate::Status::Capacity):
/// tokens lie beyond the capacity. On an error, nothing has changed.
pub fn set_table_tokens(table: &mut [i32], capacity: usize, positions: &[i32], tokens: usize) -> Result<()> {
    check_table(table, capacity, positions.len())?;
    for (row, &position) in positions.iter().enumerate() {
        ensure!(position >= 0, OutOfRange, "positions[{row}] is {position}, which is negative");
        ensure!(
            (position as usize).checked_add(tokens).is_some_and(|end| end <= capacity),
            Capacity,
            "sequence {row} has {tokens} tokens from position {position} on, but the capacity is {capacity}"
        );
    }
    for (row, &position) in positions.iter().enumerate() {
        let first = row * capacity + position as usize;
        table[first..first + tokens].fill(row as i32);
    }
    Ok(())
}

fn check_table(table: &[i32], capacity: usize, rows: usize) -> Result<()> {
    let (n, wanted) = (table.len(), rows.saturating_mul(capacity));
    ensure!(n == wanted, Shape, "the table has {n} entries, but {rows} sequences of {capacity} are {wanted}");
    ensure!(rows <= i32::MAX as usize, Shape, "the table has {rows} sequences, more than {}", i32::MAX);
    Ok(())
}

fn check_parents(parents: &[i32], rows: usize) -> Result<()> {
    let n = parents.len();
    ensure!(n == rows, Shape, "parents has {n} entries, but the cache has {rows} sequences");
    for (row, &parent) in parents.iter().enumerate() {
        ensure!(
            parent >= 0 && (parent as usize) < rows,
            OutOfRange,
            "parents[{row}] is {parent}, but the cache has {rows} sequences"
        );
    }
    Ok(())
}

/// The replacement of one sequence by another; `BUFFER` stands for the memory of a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Move {
    to: i32,
    from: i32,
}

const BUFFER: i32 = -1;

/// Bytes of a plan for `rows` sequences: each moves once, and one of every cycle moves into the buffer too.
fn plan_bytes(rows: usize) -> usize {
    let moves = rows.saturating_add(rows / 2);
    let bytes = rows.saturating_mul(size_of::<i32>()).saturating_add(moves.saturating_mul(size_of::<Move>()));
    bytes.checked_next_multiple_of(64).unwrap_or(usize::MAX)
}

/// The parts of a workspace that a plan takes: a number a sequence, and the moves.
///
/// # Safety
/// `workspace` holds [`plan_bytes`] bytes, aligned to 64, that nobody else uses.
unsafe fn plan_parts<'a>(workspace: *mut u8, rows: usize) -> (&'a mut [i32], &'a mut [Move]) {
    let moves = rows + rows / 2;
    // SAFETY: the caller's; zeros are valid in both lists.
    unsafe {
        workspace.write_bytes(0, plan_bytes(rows));
        let numbers = workspace.cast::<i32>();
        (std::slice::from_raw_parts_mut(numbers, rows), std::slice::from_raw_parts_mut(numbers.add(rows).cast(), moves))
    }
}

/// In which order sequences can be replaced by their parents one after the other: a sequence only when no other one still needs
/// it. What is left then are cycles, each of which is opened by moving one of its sequences into the buffer.
///
/// `uses` has an entry a sequence, and `moves` room for one and a half.
fn plan<'a>(parents: &[i32], uses: &mut [i32], moves: &'a mut [Move]) -> &'a [Move] {
    const DONE: i32 = -1;
    let mut n = 0;
    let mut push = |to: i32, from: i32| {
        moves[n] = Move { to, from };
        n += 1;
    };
    uses.fill(0);
    for (row, &parent) in parents.iter().enumerate() {
        if parent as usize != row {
            uses[parent as usize] += 1;
        } else {
            // A sequence that stays is never replaced, however often it is used.
            uses[row] += i32::MIN / 2;
        }
    }
    for first in 0..parents.len() {
        let mut row = first;
        while uses[row] == 0 {
            let parent = parents[row] as usize;
            push(row as i32, parent as i32);
            uses[row] = DONE;
            uses[parent] -= 1;
            // The parent may have been waiting for this.
            row = parent;
        }
    }
    for first in 0..parents.len() {
        if uses[first] <= 0 {
            continue;
        }
        push(BUFFER, first as i32);
        let mut row = first;
        loop {
            uses[row] = DONE;
            let parent = parents[row] as usize;
            if parent == first {
                push(row as i32, BUFFER);
                break;
            }
            push(row as i32, parent as i32);
            row = parent;
        }
    }
    &moves[..n]
}

/// # Safety
/// `workspace` holds the bytes that it says, which this call alone uses.
pub(crate) unsafe fn reorder_table_raw(
    workspace: (*mut u8, usize),
    table: &mut [i32],
    capacity: usize,
    lengths: &mut [i32],
    parents: &[i32],
) -> Result<()> {
    let rows = parents.len();
    check_table(table, capacity, rows)?;
    let n = lengths.len();
    ensure!(n == rows, Shape, "lengths has {n} entries, but the table has {rows} sequences");
    check_parents(parents, rows)?;
    for (row, &length) in lengths.iter().enumerate() {
        ensure!(
            length >= 0 && length as usize <= capacity,
            OutOfRange,
            "lengths[{row}] is {length}, but the capacity is {capacity}"
        );
    }
    let new_length = |row: usize| lengths[parents[row] as usize] as usize;
    let shorter = |row: usize| (new_length(row), lengths[row] as usize);
    check_slots_free(table, capacity, rows, &shorter, &|row| (parents[row] as usize, new_length(row)))?;
    check_workspace(workspace, reorder_table_workspace_size(rows, capacity))?;
    // SAFETY: the workspace is large enough, as has just been checked.
    let (uses, moves) = unsafe { plan_parts(workspace.0, rows) };
    // SAFETY: behind the plan there is room for a sequence of the table; zeros are numbers.
    let buffer = unsafe {
        let first = workspace.0.add(plan_bytes(rows)).cast::<i32>();
        first.write_bytes(0, capacity);
        std::slice::from_raw_parts_mut(first, capacity)
    };
    // What the buffer holds is the sequence that was moved there last, and so is its length.
    let mut buffered = 0;
    for step in plan(parents, uses, moves) {
        // The buffer is no sequence: it has no place in the table.
        let first = |row| row as usize * capacity;
        if step.to == BUFFER {
            let from = first(step.from);
            buffered = lengths[step.from as usize] as usize;
            buffer[..buffered].copy_from_slice(&table[from..from + buffered]);
        } else if step.from == BUFFER {
            let to = first(step.to);
            table[to..to + buffered].copy_from_slice(&buffer[..buffered]);
        } else {
            let (to, from) = (first(step.to), first(step.from));
            let length = lengths[step.from as usize] as usize;
            table.copy_within(from..from + length, to);
        }
    }
    permute(lengths, parents, uses);
    Ok(())
}

/// `list[b]` becomes what `list[parents[b]]` was.
fn permute(list: &mut [i32], parents: &[i32], old: &mut [i32]) {
    old.copy_from_slice(list);
    list.iter_mut().zip(parents).for_each(|(x, &parent)| *x = old[parent as usize]);
}

/// Tokens that go from sequence to sequence at a time: what the buffer holds.
const BLOCK: usize = 16;

/// As [`reorder_workspace_size`].
pub(crate) fn reorder_workspace_size_raw(layers: &dyn Layers, rows: usize, threads: usize) -> Result<usize> {
    let workers = threads.clamp(1, MAX_WORKERS);
    Ok(plan_bytes(rows).saturating_add(workers.saturating_mul(buffer_bytes(layers)?)))
}

/// Bytes of a worker's buffer.
fn buffer_bytes(layers: &dyn Layers) -> Result<usize> {
    let mut most = 0;
    for i in 0..2 * layers.count() {
        if let Some(cache) = cache_at(layers, i)? {
            let (units, scales) = block_bytes(&cache);
            most = most.max(units.saturating_add(scales));
        }
    }
    Ok(most)
}

/// Bytes of the units and of the scales of a block of tokens; multiples of 64.
fn block_bytes(cache: &RawCacheView) -> (usize, usize) {
    let bytes = |per_head: usize, entries| list_bytes(cache, per_head, entries);
    let scales = cache.written_scales().map_or(0, |scales| bytes(scales.dtype.size(), BLOCK));
    let scales = cache.affine.filter(|affine| !affine.fixed).map_or(scales, |affine| {
        let entries = BLOCK.div_ceil(affine.shared[SEQ]);
        let zeros = affine.zeros.map_or(0, |zeros| bytes(zeros.head_bytes(), entries));
        bytes(affine.scales.head_bytes(), entries).saturating_add(zeros)
    });
    (bytes(cache.head_bytes(), BLOCK), scales)
}

/// Bytes of so many entries of all heads; a multiple of 64.
fn list_bytes(cache: &RawCacheView, per_head: usize, entries: usize) -> usize {
    let token = cache.shape[HEADS].saturating_mul(per_head);
    token.saturating_mul(entries).saturating_add(63) / 64 * 64
}

/// A block of tokens of a cache, at `memory`. Scales that tokens share are those of as many as begin in a block.
fn block_at(memory: *mut u8, cache: &RawCacheView) -> RawCacheView {
    fn view<U: Units>(data: *mut u8, of: &RawView<U>, entries: usize) -> RawView<U> {
        let shape = [1, entries, of.shape[HEADS], of.shape[DIM]];
        let block = RawView { data, shape, bytes: None, ..*of };
        RawView { strides: contiguous(block.unit_shape()), ..block }
    }
    let scales = memory.wrapping_add(block_bytes(cache).0);
    let affine = cache.affine.map(|mut affine| {
        if !affine.fixed {
            let entries = BLOCK.div_ceil(affine.shared[SEQ]);
            let zeros = scales.wrapping_add(list_bytes(cache, affine.scales.head_bytes(), entries));
            affine.scales = view(scales, &affine.scales, entries);
            affine.zeros = affine.zeros.map(|of| view(zeros, &of, entries));
        }
        affine
    });
    RawCacheView {
        units: view(memory, &cache.units, BLOCK),
        scales: cache.written_scales().map(|of| view(scales, of, BLOCK)),
        affine,
    }
}

/// The workspace, of which every worker has a part.
#[derive(Clone, Copy)]
struct Buffers(*mut u8);

// SAFETY: workers use disjoint parts.
unsafe impl Sync for Buffers {}

impl Buffers {
    /// A method, so that closures capture the whole wrapper.
    fn at(self, offset: usize) -> *mut u8 {
        self.0.wrapping_add(offset)
    }
}

/// # Safety
/// The memory that valid views reach is readable and writable by this call alone; `workspace` holds the bytes that it says,
/// which this call alone uses.
pub(crate) unsafe fn reorder_raw(
    context: &Context,
    runner: &dyn Runner,
    workspace: (*mut u8, usize),
    cache: &mut RawCache,
    parents: &[i32],
) -> Result<()> {
    let first = cache.validate()?;
    check_requantized(cache.layers, false)?;
    let rows = cache.lengths.len();
    check_parents(parents, rows)?;
    let how = match cache.layout {
        Layout::Contiguous | Layout::Ring { .. } => None,
        Layout::Paged { .. } => Some("sequences of pages are reordered by their table"),
        Layout::Indirect { .. } => Some("sequences of an indirect cache are reordered by their table"),
        Layout::Ragged { .. } => Some("ragged sequences have no room for each other's tokens"),
    };
    ensure!(how.is_none(), InvalidValue, "{}", how.unwrap_or_default());
    check_workspace(workspace, reorder_workspace_size_raw(cache.layers, rows, runner.num_threads())?)?;
    // SAFETY: the workspace is large enough, as has just been checked.
    let (uses, moves) = unsafe { plan_parts(workspace.0, rows) };
    let moves = plan(parents, uses, moves);
    let (buffers, buffer_bytes) = (Buffers(workspace.0.wrapping_add(plan_bytes(rows))), buffer_bytes(cache.layers)?);

    // A ring that has gone round uses all its slots, any other sequence its first ones.
    let used = |row: i32| cache.length(row as usize).min(first.shape[SEQ]);
    let tokens = moves.iter().filter(|step| step.from != BUFFER).map(|step| used(step.from)).sum();
    let longest = moves.iter().filter(|step| step.from != BUFFER).map(|step| used(step.from)).max().unwrap_or(0);
    for_each_piece(runner, cache.layers, tokens, &|worker, piece| {
        let cache = &piece.cache;
        let step = Step::copy(context, cache);
        let buffer = block_at(buffers.at(worker * buffer_bytes), cache);
        let shared = tokens_sharing(cache);
        for block in (0..longest).step_by(BLOCK) {
            let (mut buffered, mut origin) = (0, 0);
            // The first token here whose scales no token before it shares.
            let first = block.next_multiple_of(shared) - block;
            for m in moves {
                let n = if m.from == BUFFER { buffered } else { used(m.from).saturating_sub(block).min(BLOCK) };
                let row = |r: i32| if r == BUFFER { (&buffer, (0, 0)) } else { (cache, (r as usize, block)) };
                let ((src, from), (dst, to)) = (row(m.from), row(m.to));
                if m.to == BUFFER {
                    (buffered, origin) = (n, m.from as usize);
                }
                // SAFETY: sequences and slots are inside the views, two sequences share nothing, and no other piece has these
                // heads.
                unsafe {
                    match (&step, &src.affine, &dst.affine) {
                        (Step::Copy { units, .. }, Some(of_src), Some(of_dst)) if shared > 1 => {
                            copy_tokens(*units, &src.units, from, &dst.units, to, n);
                            // The buffer begins with these scales.
                            let [from, to] = [(m.from, from), (m.to, to)]
                                .map(|(r, (row, slot))| (row, if r == BUFFER { 0 } else { slot + first }));
                            copy_parameters(of_src, from, of_dst, to, (cache.shape[HEADS], n.saturating_sub(first)));
                        }
                        (Step::Fixed(step), ..) if m.to == BUFFER => step.copy(src, from, dst, to, n),
                        (Step::Fixed(step), ..) => {
                            let place = if m.from == BUFFER { (origin, block) } else { from };
                            step.run((&src.units, from), (cache, place), (dst, to), n);
                        }
                        _ => move_tokens(&step, src, from, dst, to, n),
                    }
                }
            }
        }
    })?;
    permute(cache.lengths, parents, uses);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a plan on a list of numbers.
    fn replay(parents: &[i32]) -> (Vec<i32>, usize) {
        let rows = parents.len();
        let (mut uses, mut moves) = (vec![0; rows], vec![Move { to: 0, from: 0 }; rows + rows / 2]);
        let moves = plan(parents, &mut uses, &mut moves);
        let (mut list, mut buffer): (Vec<i32>, i32) = ((0..rows as i32).collect(), -7);
        for m in moves {
            let value = if m.from == BUFFER { buffer } else { list[m.from as usize] };
            if m.to == BUFFER { buffer = value } else { list[m.to as usize] = value }
        }
        (list, moves.len())
    }

    #[test]
    fn a_plan_replaces_every_row_by_its_parent() {
        for rows in 0..=5u32 {
            // Every list of parents there is.
            for code in 0..(rows as usize).pow(rows) {
                let parents: Vec<i32> =
                    (0..rows).map(|i| (code / (rows as usize).pow(i) % rows as usize) as i32).collect();
                let (list, moves) = replay(&parents);
                assert_eq!(list, parents);
                let moved = parents.iter().enumerate().filter(|&(row, &parent)| parent != row as i32).count();
                assert!((moved..=moved + moved / 2).contains(&moves), "{parents:?}: {moves} moves");
            }
        }
    }
}
