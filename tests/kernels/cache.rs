//! Operations on whole caches compared with simple models: every bit that must change, and no other byte of any layer.

use crate::common::runners::{Backwards, Threads};
use crate::common::tensor::{Array, indices};
use crate::common::{Layout as Strides, Place, Rng, Tensor, oracle, scaled};
use crate::harness::{Level, tests};
use crate::quantised::Store;
use crate::write::assert_element;
use kvlane::*;

tests! {
    levels: emptied_rows, inserted_rows, copied_prefixes, reordered_rows, evicted_tokens, turned_keys, turned_keys_again,
        running_positions, drift,
        moved_pages, threads_share_the_work;
    once: claimed_lengths, truncated_rings, tables_instead_of_copies, a_slot_in_use_is_not_given_up, mistakes, insert_mistakes,
        table_mistakes, bad_layers_change_nothing;
}

/// A layout with owned lists.
#[derive(Clone, Debug)]
pub enum Kind {
    Contiguous,
    Ring(usize),
    Paged { pages: Vec<i32>, per_row: usize },
    Indirect(Vec<i32>),
    Ragged(Vec<i32>),
}

impl Kind {
    pub fn borrow(&self) -> Layout<'_> {
        match self {
            Self::Contiguous => Layout::Contiguous,
            Self::Ring(sinks) => Layout::ring(*sinks),
            Self::Paged { pages, per_row } => Layout::paged(pages, *per_row),
            Self::Indirect(rows) => Layout::indirect(rows),
            Self::Ragged(starts) => Layout::ragged(starts),
        }
    }

    /// The slot of a position, from the definition and not from the library.
    pub fn place(&self, slots: usize, row: usize, position: usize) -> (usize, usize) {
        match self {
            Self::Contiguous => (row, position),
            Self::Ring(sinks) if position < *sinks => (row, position),
            Self::Ring(sinks) => (row, sinks + (position - sinks) % (slots - sinks)),
            Self::Paged { pages, per_row } => (pages[row * per_row + position / slots] as usize, position % slots),
            Self::Indirect(rows) => (rows[row * slots + position] as usize, position),
            Self::Ragged(starts) => (0, starts[row] as usize + position),
        }
    }

    /// The positions that a sequence of a given length holds.
    pub fn held(&self, slots: usize, length: usize) -> Vec<usize> {
        let lost = |p: &usize| match self {
            Self::Ring(sinks) => *p >= *sinks && p + (slots - sinks) < length,
            _ => false,
        };
        (0..length).filter(|p| !lost(p)).collect()
    }
}

/// A cache with its own memory: `layers[i]` are keys and values.
struct Stack {
    layers: Vec<(Tensor, Option<Tensor>)>,
    kind: Kind,
    lengths: Vec<i32>,
}

/// The elements of all tensors, in the order of the axes.
type Snapshot = Vec<Vec<u32>>;

impl Stack {
    /// Layers of any types, heads and strides over the same `[rows, slots]`, with noise and poison in all slots.
    fn random(rng: &mut Rng, first: [usize; 2], kind: Kind, lengths: Vec<i32>) -> Self {
        let n = rng.between(1, 3);
        let layers = (0..n)
            .map(|_| {
                let heads = rng.between(1, 3);
                let tensor = |rng: &mut Rng| {
                    let shape = [first[0], first[1], heads, rng.between(1, 20)];
                    let place = rng.pick(&[Place::Heap, Place::GuardAfter, Place::GuardBefore]);
                    let (dtype, strides) = (rng.pick(&DType::ALL), Strides::random(rng));
                    let mut tensor = Tensor::input(dtype, shape, strides, place);
                    for at in indices(shape) {
                        if rng.chance(0.9) {
                            tensor.set(at, rng.f32());
                        }
                    }
                    tensor
                };
                let k = tensor(rng);
                (k, rng.chance(0.8).then(|| tensor(rng)))
            })
            .collect();
        Self { layers, kind, lengths }
    }

    /// A random layout of `rows` sequences, with lengths within the capacity.
    fn of_kind(rng: &mut Rng, which: usize, rows: usize) -> Self {
        let slots = rng.between(1, 24);
        match which {
            0 => {
                let lengths = (0..rows).map(|_| rng.between(0, slots) as i32).collect();
                Self::random(rng, [rows, slots], Kind::Contiguous, lengths)
            }
            1 => {
                let sinks = rng.below(slots);
                let lengths = (0..rows).map(|_| rng.between(0, 3 * slots) as i32).collect();
                Self::random(rng, [rows, slots], Kind::Ring(sinks), lengths)
            }
            2 => {
                let (size, per_row) = (rng.between(1, 6), rng.between(1, 5));
                let pool = rows * per_row + rng.between(0, 3);
                let mut order: Vec<i32> = (0..pool as i32).collect();
                (1..pool).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
                let lengths: Vec<i32> = (0..rows).map(|_| rng.between(0, per_row * size) as i32).collect();
                let pages = order[..rows * per_row].to_vec();
                Self::random(rng, [pool, size], Kind::Paged { pages, per_row }, lengths)
            }
            _ => {
                let mut starts = vec![rng.between(0, 3) as i32];
                (0..rows).for_each(|_| starts.push(starts[starts.len() - 1] + rng.between(0, slots) as i32));
                let lengths = starts.windows(2).map(|w| rng.between(0, (w[1] - w[0]) as usize) as i32).collect();
                let total = starts[rows] as usize + rng.between(0, 2);
                Self::random(rng, [1, total], Kind::Ragged(starts), lengths)
            }
        }
    }

    fn slots(&self) -> usize {
        self.layers[0].0.shape[1]
    }

    fn capacity(&self, row: usize) -> usize {
        match &self.kind {
            Kind::Paged { per_row, .. } => per_row * self.slots(),
            Kind::Ragged(starts) => (starts[row + 1] - starts[row]) as usize,
            Kind::Ring(_) => 3 * self.slots(),
            _ => self.slots(),
        }
    }

    fn place(&self, row: usize, position: usize) -> (usize, usize) {
        self.kind.place(self.slots(), row, position)
    }

    fn held(&self, row: usize) -> Vec<usize> {
        self.kind.held(self.slots(), self.lengths[row] as usize)
    }

    fn call<T>(&mut self, call: impl FnOnce(&mut KvCache) -> Result<T>) -> Result<T> {
        let mut layers: Vec<KvLayer> = self
            .layers
            .iter_mut()
            .map(|(k, v)| match v.as_mut() {
                Some(v) => KvLayer::new(k.view_mut(), v.view_mut()),
                None => KvLayer::keys(k.view_mut()),
            })
            .collect();
        call(&mut KvCache::new(&mut layers, self.kind.borrow(), &mut self.lengths))
    }

    fn planes(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|(k, v)| std::iter::once(k).chain(v))
    }

    fn snapshot(&self) -> Snapshot {
        self.planes().map(Tensor::all_bits).collect()
    }

    fn bytes(&self) -> Vec<Vec<u8>> {
        self.planes().map(|t| t.bytes().to_vec()).collect()
    }

    /// Copies the bits of one token to another place, in every plane of a snapshot.
    fn copy_token(&self, after: &mut Snapshot, before: &Snapshot, from: (usize, usize), to: (usize, usize)) {
        for (i, tensor) in self.planes().enumerate() {
            let [_, slots, heads, dim] = tensor.shape;
            let (n, at) = (heads * dim, |(row, slot): (usize, usize)| (row * slots + slot) * heads * dim);
            after[i][at(to)..at(to) + n].copy_from_slice(&before[i][at(from)..at(from) + n]);
        }
    }

    fn clear_token(&self, after: &mut Snapshot, (row, slot): (usize, usize)) {
        for (i, tensor) in self.planes().enumerate() {
            let [_, slots, heads, dim] = tensor.shape;
            after[i][(row * slots + slot) * heads * dim..][..heads * dim].fill(0);
        }
    }

    #[track_caller]
    fn assert_is(&self, want: &Snapshot, lengths: &[i32], what: &str) {
        for (i, (tensor, want)) in self.planes().zip(want).enumerate() {
            for (at, want) in indices(tensor.shape).zip(want) {
                assert_eq!(tensor.bits(at), *want, "{what}: plane {i}, {at:?} of {:?}, {:?}", tensor.shape, self.kind);
            }
            tensor.assert_gaps();
        }
        assert_eq!(self.lengths, lengths, "{what}");
    }

    /// Counts the copies of a call.
    fn count(&self, level: &Level) {
        for tensor in self.planes() {
            level.checked(Op::KvWrite, tensor.dtype, tensor.dtype);
        }
    }

    /// A call that must fail and change nothing.
    #[track_caller]
    fn refuses<T>(&mut self, status: Status, pieces: &[&str], call: impl FnOnce(&mut KvCache) -> Result<T>) {
        let (bytes, lengths) = (self.bytes(), self.lengths.clone());
        let Err(error) = self.call(call) else { panic!("no error, but should be {status:?} {pieces:?}") };
        assert_eq!(error.status(), status, "{error}");
        for piece in pieces {
            assert!(error.message().contains(piece), "{error}: does not say {piece:?}");
        }
        assert!(self.bytes() == bytes && self.lengths == lengths, "{error}, but something was written");
    }
}

pub fn runner(rng: &mut Rng) -> &'static dyn Runner {
    rng.pick::<&dyn Runner>(&[&Serial, &Threads(3), &Backwards(5)])
}

pub fn permutation(rng: &mut Rng, n: usize) -> Vec<i32> {
    let mut order: Vec<i32> = (0..n as i32).collect();
    (1..n).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
    order
}

fn claimed_lengths() {
    let rng = &mut Rng::new(100);
    for round in 0..scaled(200) {
        let rows = rng.between(1, 4);
        let mut stack = Stack::of_kind(rng, round % 4, rows);
        let before = stack.snapshot();
        let mut lengths = stack.lengths.clone();
        let which = permutation(rng, rows);
        let which = &which[..rng.between(0, rows)];
        let values: Vec<i32> = which.iter().map(|&r| rng.between(0, stack.capacity(r as usize)) as i32).collect();
        stack.call(|cache| cache.set_lengths(which, &values)).unwrap();
        which.iter().zip(&values).for_each(|(&row, &value)| lengths[row as usize] = value);
        stack.assert_is(&before, &lengths, "set");

        let counts: Vec<i32> =
            (0..rows).map(|r| rng.between(0, stack.capacity(r).saturating_sub(lengths[r] as usize)) as i32).collect();
        stack.call(|cache| cache.advance(&counts)).unwrap();
        lengths.iter_mut().zip(&counts).for_each(|(length, count)| *length += count);
        stack.assert_is(&before, &lengths, "advanced");
        if round % 4 != 1 {
            let mut more = vec![0; rows];
            more[rows - 1] = (stack.capacity(rows - 1) as i32 - lengths[rows - 1]) + 1;
            let piece = format!("it holds {}", stack.capacity(rows - 1));
            stack.refuses(Status::Capacity, &[&piece], |cache| cache.advance(&more));

            lengths.iter_mut().for_each(|length| *length = rng.between(0, *length as usize) as i32);
            stack.call(|cache| cache.truncate(&lengths, None)).unwrap();
            stack.assert_is(&before, &lengths, "truncated");
        }
    }
}

/// A ring can be truncated if and only if it still holds every token that will be visible.
fn truncated_rings() {
    let mut accepted = [0; 2];
    for slots in 1..6 {
        for sinks in 0..slots {
            let window_of_ring = slots - sinks;
            for length in 0..3 * slots + 2 {
                let kind = Kind::Ring(sinks);
                // The position in each slot after tokens 0 .. length were written.
                let mut holds = vec![None; slots];
                (0..length).for_each(|p| holds[kind.place(slots, 0, p).1] = Some(p));
                for new in 0..=length {
                    for window in (0..slots + 2).map(Some).chain([None]) {
                        let first = new - window.unwrap_or(new).min(new);
                        let seen = kind.held(slots, new).into_iter().filter(|&p| p < sinks || p >= first);
                        let whole = seen.clone().all(|p| holds[kind.place(slots, 0, p).1] == Some(p));
                        // A ring that keeps its length is unchanged.
                        let right = whole || new == length;
                        assert!(new < length || whole);
                        let mut stack = Stack {
                            layers: vec![(
                                Tensor::input(DType::F16, [1, slots, 1, 2], Strides::BSHD, Place::Heap),
                                None,
                            )],
                            kind: kind.clone(),
                            lengths: vec![length as i32],
                        };
                        let done = stack.call(|cache| cache.truncate(&[new as i32], window.map(|w| w as u32)));
                        let what = format!("{sinks} of {slots}, {length} to {new}, window {window:?}: {done:?}");
                        assert_eq!(done.is_ok(), right, "{what}");
                        assert_eq!(stack.lengths[0] as usize, if right { new } else { length }, "{what}");
                        accepted[usize::from(right)] += 1;
                        if let Some(w) = window
                            && window_of_ring >= w
                            && length - new <= window_of_ring - w
                        {
                            assert!(right, "{what}: the documented allowance");
                        }
                    }
                }
            }
        }
    }
    assert!(accepted[0] > 500 && accepted[1] > 500, "{accepted:?}");
}

fn emptied_rows(level: &Level) {
    let _ = level;
    let rng = &mut Rng::new(101);
    for round in 0..scaled(120) {
        let rows = rng.between(1, 4);
        let mut stack = Stack::of_kind(rng, round % 4, rows);
        let (mut want, mut lengths) = (stack.snapshot(), stack.lengths.clone());
        let which = permutation(rng, rows);
        let which = &which[..rng.between(0, rows)];
        let zero = rng.chance(0.7);
        for &row in which {
            let row = row as usize;
            let length = std::mem::take(&mut lengths[row]) as usize;
            let slots = stack.slots();
            let tokens = match &stack.kind {
                Kind::Paged { .. } => length.div_ceil(slots) * slots,
                Kind::Ragged(starts) => (starts[row + 1] - starts[row]) as usize,
                _ => slots,
            };
            for position in (0..tokens).filter(|_| zero) {
                stack.clear_token(&mut want, stack.place(row, position));
            }
        }
        let runner = runner(rng);
        stack.call(|cache| cache.reset(runner, which, zero)).unwrap();
        stack.assert_is(&want, &lengths, "reset");
    }
}

fn inserted_rows(level: &Level) {
    let rng = &mut Rng::new(102);
    for round in 0..scaled(300) {
        let rows = rng.between(1, 3);
        let mut to = Stack::of_kind(rng, round % 4, rows);
        let from_rows = rng.between(1, 3);
        let mut from = Stack::of_kind(rng, round / 4 % 4, from_rows);
        // Layers like those of the target, with other types and strides.
        let [first, slots, ..] = from.layers[0].0.shape;
        let like = |rng: &mut Rng, t: &Tensor| {
            let shape = [first, slots, t.shape[2], t.shape[3]];
            let (dtype, strides) = (rng.pick(&DType::ALL), Strides::random(rng));
            let mut tensor = Tensor::input(dtype, shape, strides, Place::GuardAfter);
            tensor.fill(|_| if rng.chance(0.02) { f32::NAN } else { 3.0 * rng.f32() });
            tensor
        };
        from.layers = to.layers.iter().map(|(k, v)| (like(rng, k), v.as_ref().map(|v| like(rng, v)))).collect();
        let (row, from_row) = (rng.below(rows), rng.below(from_rows));
        let length = rng.between(0, to.capacity(row).min(from.lengths[from_row] as usize));
        let held = to.kind.held(to.slots(), length);
        let (before, mut lengths) = (to.bytes(), to.lengths.clone());
        let mut want = to.snapshot();
        let missing = held.iter().find(|p| !from.held(from_row).contains(p));
        let runner = runner(rng);
        let source = from.bytes();
        let done =
            to.call(|to| from.call(|from| to.insert_sequence(&level.context, runner, row, from, from_row, length)));
        assert!(from.bytes() == source, "the source was written");
        if let Some(position) = missing {
            let error = done.expect_err("the source has lost a position");
            assert_eq!(error.status(), Status::OutOfRange);
            assert!(error.message().contains(&format!("position {position} of sequence {from_row}")), "{error}");
            assert!(to.bytes() == before && to.lengths == lengths);
            continue;
        }
        done.unwrap();
        lengths[row] = length as i32;
        for &position in &held {
            let (src, dst) = (from.place(from_row, position), to.place(row, position));
            for (i, (a, b)) in from.planes().zip(to.planes()).enumerate() {
                level.checked(Op::KvWrite, a.dtype, b.dtype);
                let [_, slots, heads, dim] = b.shape;
                for (h, d) in (0..heads).flat_map(|h| (0..dim).map(move |d| (h, d))) {
                    assert_element(a, [src.0, src.1, h, d], b, [dst.0, dst.1, h, d]);
                    // Already compared; the rest of the snapshot must be unchanged.
                    want[i][((dst.0 * slots + dst.1) * heads + h) * dim + d] = b.bits([dst.0, dst.1, h, d]);
                }
            }
        }
        to.assert_is(&want, &lengths, "inserted");
    }
}

fn copied_prefixes(level: &Level) {
    let rng = &mut Rng::new(103);
    let mut copied = 0;
    for round in 0..scaled(300) {
        let rows = rng.between(2, 5);
        let mut stack = Stack::of_kind(rng, round % 4, rows);
        let order = permutation(rng, rows);
        let (from, to) = (order[0] as usize, &order[1..rng.between(1, rows)]);
        let room = to.iter().map(|&row| stack.capacity(row as usize)).min().unwrap_or(usize::MAX);
        let tokens = rng.between(0, room.min(stack.lengths[from] as usize));
        let (before, mut lengths) = (stack.snapshot(), stack.lengths.clone());
        let mut want = before.clone();
        let held = stack.kind.held(stack.slots(), tokens);
        let runner = runner(rng);
        let whole = held.iter().all(|p| stack.held(from).contains(p));
        if !whole {
            stack.refuses(Status::OutOfRange, &["would be visible"], |cache| {
                cache.copy_prefix(&level.context, runner, from, to, tokens)
            });
            continue;
        }
        stack.call(|cache| cache.copy_prefix(&level.context, runner, from, to, tokens)).unwrap();
        for &row in to {
            for &position in &held {
                let (src, dst) = (stack.place(from, position), stack.place(row as usize, position));
                stack.copy_token(&mut want, &before, src, dst);
                copied += 1;
            }
            lengths[row as usize] = tokens as i32;
        }
        stack.count(level);
        stack.assert_is(&want, &lengths, "copied");
    }
    assert!(copied > 100 || scaled(100) < 100);
}

fn reordered_rows(level: &Level) {
    let rng = &mut Rng::new(104);
    let mut workspace = Workspace::new();
    for round in 0..scaled(60) {
        let rows = rng.between(1, 7);
        let mut stack = Stack::of_kind(rng, round % 2, rows);
        for _ in 0..4 {
            let parents: Vec<i32> = match rng.below(3) {
                0 => permutation(rng, rows),
                _ => (0..rows).map(|_| rng.below(rows) as i32).collect(),
            };
            let (before, old) = (stack.snapshot(), stack.lengths.clone());
            let (mut want, mut lengths) = (before.clone(), old.clone());
            for (row, &parent) in parents.iter().enumerate() {
                for slot in 0..(old[parent as usize] as usize).min(stack.slots()) {
                    stack.copy_token(&mut want, &before, (parent as usize, slot), (row, slot));
                }
                lengths[row] = old[parent as usize];
            }
            let runner = runner(rng);
            stack.call(|cache| cache.reorder(&level.context, runner, &mut workspace, &parents)).unwrap();
            stack.count(level);
            stack.assert_is(&want, &lengths, &format!("{parents:?}"));
        }
    }
}

/// Over many steps, attention by the table equals attention over copied rows.
fn tables_instead_of_copies() {
    let rng = &mut Rng::new(105);
    let mut workspace = Workspace::new();
    for _ in 0..scaled(40) {
        let (groups, beams, capacity) = (rng.between(1, 3), rng.between(1, 5), rng.between(4, 40));
        let rows = groups * beams;
        // Every token has a unique number.
        let mut cache = vec![-1i64; rows * capacity];
        let mut copies: Vec<Vec<i64>> = vec![Vec::new(); rows];
        let mut table = vec![i32::MIN; rows * capacity];
        // Prompts differ in length between groups and are equal within the beams of a group.
        let prompts: Vec<usize> = (0..groups).map(|_| rng.between(0, capacity / 2)).collect();
        let mut lengths = vec![0; rows];
        let mut next = 0;
        let mut step =
            |tokens: &dyn Fn(usize) -> usize, lengths: &mut [i32], copies: &mut [Vec<i64>], cache: &mut [i64]| {
                for row in 0..rows {
                    for t in 0..tokens(row) {
                        next += 1;
                        copies[row].push(next);
                        cache[row * capacity + lengths[row] as usize + t] = next;
                    }
                }
            };
        step(&|row| prompts[row / beams], &mut lengths, &mut copies, &mut cache);
        for row in 0..rows {
            let n = prompts[row / beams];
            // One row at a time, because lengths differ between groups.
            let mut positions = vec![0; rows];
            positions[row] = 0;
            let mut part = table.clone();
            set_table_tokens(&mut part, capacity, &positions, n).unwrap();
            table[row * capacity..(row + 1) * capacity].copy_from_slice(&part[row * capacity..(row + 1) * capacity]);
            lengths[row] = n as i32;
        }
        let longest = prompts.iter().max().unwrap();
        for _ in 0..capacity - longest {
            step(&|_| 1, &mut lengths, &mut copies, &mut cache);
            set_table_tokens(&mut table, capacity, &lengths, 1).unwrap();
            lengths.iter_mut().for_each(|n| *n += 1);
            let parents: Vec<i32> = (0..rows).map(|row| (row / beams * beams + rng.below(beams)) as i32).collect();
            copies = parents.iter().map(|&parent| copies[parent as usize].clone()).collect();
            reorder_table(&mut workspace, &mut table, capacity, &mut lengths, &parents).unwrap();
            for row in 0..rows {
                let gathered: Vec<i64> = (0..lengths[row] as usize)
                    .map(|p| cache[table[row * capacity + p] as usize * capacity + p])
                    .collect();
                assert_eq!(gathered, copies[row], "sequence {row} after {parents:?}");
            }
        }
    }
}

/// Rows of different lengths: an accepted reorder never overwrites a token in use, and some are refused.
fn a_slot_in_use_is_not_given_up() {
    let rng = &mut Rng::new(106);
    let (mut accepted, mut refused) = (0, 0);
    for _ in 0..scaled(60) {
        let (rows, capacity) = (rng.between(2, 5), 30);
        let mut cache = vec![-1i64; rows * capacity];
        let mut copies: Vec<Vec<i64>> = vec![Vec::new(); rows];
        let (mut table, mut lengths, mut next) = (vec![0; rows * capacity], vec![0i32; rows], 0);
        while lengths.iter().all(|&n| n < capacity as i32) {
            for row in 0..rows {
                next += 1;
                copies[row].push(next);
                cache[row * capacity + lengths[row] as usize] = next;
            }
            set_table_tokens(&mut table, capacity, &lengths, 1).unwrap();
            lengths.iter_mut().for_each(|n| *n += 1);
            let (before, old) = (table.clone(), lengths.clone());
            let done = if rng.chance(0.4) {
                let shorter: Vec<i32> = lengths.iter().map(|&n| n - rng.below(3).min(n as usize) as i32).collect();
                let mut stack = Stack {
                    layers: vec![(Tensor::input(DType::F32, [rows, capacity, 1, 1], Strides::BSHD, Place::Heap), None)],
                    kind: Kind::Indirect(table.clone()),
                    lengths: lengths.clone(),
                };
                let done = stack.call(|cache| cache.truncate(&shorter, None));
                lengths = stack.lengths;
                if done.is_ok() {
                    copies.iter_mut().zip(&shorter).for_each(|(copy, &n)| copy.truncate(n as usize));
                }
                done
            } else {
                let parents: Vec<i32> = (0..rows).map(|_| rng.below(rows) as i32).collect();
                let done = reorder_table(&mut Workspace::new(), &mut table, capacity, &mut lengths, &parents);
                if done.is_ok() {
                    copies = parents.iter().map(|&parent| copies[parent as usize].clone()).collect();
                }
                done
            };
            match done {
                Ok(()) => accepted += 1,
                Err(error) => {
                    refused += 1;
                    assert_eq!(error.status(), Status::Overlap, "{error}");
                    assert!(table == before && lengths == old);
                }
            }
            for row in 0..rows {
                let gathered: Vec<i64> = (0..lengths[row] as usize)
                    .map(|p| cache[table[row * capacity + p] as usize * capacity + p])
                    .collect();
                assert_eq!(gathered, copies[row], "sequence {row}");
            }
        }
    }
    assert!(accepted > 0 && refused > 0, "{accepted} and {refused}");
}

fn evicted_tokens(level: &Level) {
    let rng = &mut Rng::new(107);
    for round in 0..scaled(200) {
        let rows = rng.between(1, 4);
        let mut stack = Stack::of_kind(rng, [0, 2, 3][round % 3], rows);
        let row = rng.below(rows);
        let length = stack.lengths[row] as usize;
        let (a, b) = (rng.between(0, length), rng.between(0, length));
        let drop = a.min(b)..a.max(b);
        let (before, mut lengths) = (stack.snapshot(), stack.lengths.clone());
        let mut want = before.clone();
        for position in drop.end..length {
            let (src, dst) = (stack.place(row, position), stack.place(row, position - drop.len()));
            stack.copy_token(&mut want, &before, src, dst);
        }
        lengths[row] -= drop.len() as i32;
        let runner = runner(rng);
        let none = vec![None; stack.layers.len()];
        let rotations = rng.pick(&[&[][..], &none, &none[..1]]);
        if rng.chance(0.5) {
            stack.call(|cache| cache.evict(&level.context, runner, row, drop.clone(), rotations)).unwrap();
        } else {
            let none = vec![None; rotations.len()];
            stack.call(|cache| cache.evict_running(&level.context, runner, row, drop.clone(), 9, &none)).unwrap();
        }
        stack.count(level);
        stack.assert_is(&want, &lengths, &format!("{drop:?} of {length}"));
    }
}

/// Half a unit in the last place, of f32 too.
fn half_ulp(dtype: DType, x: f64) -> f64 {
    if dtype == DType::F32 { x.abs() * 2f64.powi(-24) } else { crate::common::half_ulp(dtype, x) }
}

fn scalings(rotary_dim: usize) -> Vec<RopeFrequencies> {
    let yarn = YarnScaling::new(16.0, 2048.0).into();
    let divisors = (0..rotary_dim / 2).map(|i| 1.0 + i as f64).collect();
    let longrope = LongRopeScaling::new(divisors, 8.0, 4096.0).into();
    let llama = Llama3Scaling::new(8.0, 8192.0).into();
    [RopeScaling::None, yarn, longrope, llama]
        .iter()
        .map(|scaling| RopeFrequencies::new(rotary_dim, 10_000.0, scaling).unwrap())
        .collect()
}

/// A contiguous cache of one sequence whose keys are exact keys rotated to `first + p`; returns the exact keys.
fn turned(
    rng: &mut Rng,
    dtype: DType,
    shape: [usize; 4],
    how: (Pairing, &RopeFrequencies),
    first: i64,
) -> (Tensor, Array) {
    let exact = Tensor::random(rng, DType::F32, shape, Strides::BSHD, Place::Heap).array();
    let k = oracle::rope(&exact, how.0, how.1.inv_freq(), how.1.magnitude(), |_, t| first + t as i64);
    let strides = Strides::random(rng);
    let mut cache = Tensor::input(dtype, shape, strides, Place::GuardAfter);
    for at in indices(shape) {
        cache.set(at, k.row(at[0], at[1], at[2])[at[3]] as f32);
    }
    (cache, exact)
}

/// Keys after a gap equal keys of their new positions, within the roundings of their rotations.
#[track_caller]
fn assert_turned(
    cache: &Tensor,
    exact: &Array,
    kept: &[usize],
    how: (Pairing, &RopeFrequencies),
    first: i64,
    roundings: f64,
) {
    let rotary_dim = how.1.rotary_dim();
    let position = |t: usize| kept.iter().position(|&k| k == t).unwrap_or(0);
    let want = oracle::rope(exact, how.0, how.1.inv_freq(), how.1.magnitude(), |_, t| first + position(t) as i64);
    for (p, &t) in kept.iter().enumerate() {
        for h in 0..exact.shape[2] {
            for d in 0..exact.shape[3] {
                let (got, want_element) = (f64::from(cache.get([0, p, h, d])), want.row(0, t, h)[d]);
                let allowed = if d < rotary_dim {
                    let half = rotary_dim / 2;
                    let (i, j) = match how.0 {
                        Pairing::Interleaved => (d, d ^ 1),
                        Pairing::HalfSplit => (d, if d < half { d + half } else { d - half }),
                    };
                    let x = want.row(0, t, h);
                    let size = x[i].hypot(x[j]);
                    // The first rounding to f32 and to the type, and one more per rotation, on both elements of a
                    // pair. The error of a pair is rotated with it.
                    let once = half_ulp(cache.dtype, size * 1.001) + 6e-7 * size;
                    2f64.sqrt() * once * roundings
                } else {
                    half_ulp(cache.dtype, want_element) + 1e-7 * want_element.abs()
                };
                let error = (got - want_element).abs();
                assert!(
                    error <= allowed,
                    "token {t} at {p}, [{h}, {d}]: {got} for {want_element}: {error:e} > {allowed:e}"
                );
            }
        }
    }
}

fn turned_keys(level: &Level) {
    let rng = &mut Rng::new(108);
    for dtype in DType::ALL {
        for pairing in [Pairing::Interleaved, Pairing::HalfSplit] {
            for which in 0..4 {
                for _ in 0..scaled(4) {
                    let dim = 2 * rng.between(2, 70);
                    let rotary_dim = if rng.chance(0.5) { dim } else { 2 * rng.between(2, dim / 2) };
                    let frequencies = &scalings(rotary_dim)[which];
                    let shape = [1, rng.between(2, 60), rng.between(1, 3), dim];
                    let first = rng.pick(&[0, 5, 100_000]);
                    let (cache, exact) = turned(rng, dtype, shape, (pairing, frequencies), first);
                    let length = rng.between(2, shape[1]);
                    let start = rng.below(length);
                    let drop = start..rng.between(start, length);
                    let mut stack =
                        Stack { layers: vec![(cache, None)], kind: Kind::Contiguous, lengths: vec![length as i32] };
                    let before = stack.snapshot();
                    let runner = runner(rng);
                    let rotation = [Some(KeyRotation::new(pairing, frequencies))];
                    stack.call(|cache| cache.evict(&level.context, runner, 0, drop.clone(), &rotation)).unwrap();
                    level.checked(Op::Rope, dtype, dtype);
                    let kept: Vec<usize> = (0..length).filter(|t| !drop.contains(t)).collect();
                    let cache = &stack.layers[0].0;
                    assert_turned(cache, &exact, &kept, (pairing, frequencies), first, 2.0);
                    // Keys before the gap and slots after the end are unchanged.
                    for (at, bits) in indices(shape).zip(&before[0]) {
                        if at[1] < drop.start || at[1] >= length - drop.len() {
                            assert_eq!(cache.bits(at), *bits, "{at:?}");
                        }
                    }
                    cache.assert_gaps();
                    assert_eq!(stack.lengths, [kept.len() as i32]);
                }
            }
        }
    }
}

/// Repeated eviction: one more rounding each time, and the magnitude of the frequencies is never applied again.
fn turned_keys_again(level: &Level) {
    let rng = &mut Rng::new(109);
    for dtype in DType::ALL {
        let frequencies = &scalings(32)[1];
        assert!(frequencies.magnitude() > 1.2);
        let shape = [1, 80, 2, 40];
        let (cache, exact) = turned(rng, dtype, shape, (Pairing::HalfSplit, frequencies), 0);
        let mut stack = Stack { layers: vec![(cache, None)], kind: Kind::Contiguous, lengths: vec![80] };
        let mut kept: Vec<usize> = (0..80).collect();
        let rotation = [Some(KeyRotation::new(Pairing::HalfSplit, frequencies))];
        for turn in 1..=8 {
            // Two sink tokens stay.
            let start = rng.between(2, kept.len() - 9);
            let drop = start..start + rng.between(1, 8);
            kept.drain(drop.clone());
            stack.call(|cache| cache.evict(&level.context, &Serial, 0, drop, &rotation)).unwrap();
            level.checked(Op::Rope, dtype, dtype);
            let how = (Pairing::HalfSplit, frequencies);
            assert_turned(&stack.layers[0].0, &exact, &kept, how, 0, 1.0 + f64::from(turn));
        }
    }
}

/// Positions that run on: what moves keeps its bits, and keys before the gap are rounded once, however often they are written.
fn running_positions(level: &Level) {
    let rng = &mut Rng::new(114);
    for (dtype, source) in DType::ALL.into_iter().flat_map(|a| DType::ALL.map(|b| (a, b))) {
        let pairing = rng.pick(&[Pairing::Interleaved, Pairing::HalfSplit]);
        let (frequencies, sinks) = (&scalings(32)[rng.below(4)], rng.between(1, 5));
        let (shape, n) = ([1, 80, 2, 40], 80);
        // The copies may have been rounded; that is not this call's.
        let (copies, strides) = ([1, sinks + rng.below(3), 2, 40], Strides::random(rng));
        let noise = Tensor::random(rng, source, copies, strides, Place::GuardAfter);
        let (turned, mut exact) = turned(rng, dtype, shape, (pairing, frequencies), 0);
        for t in 0..sinks {
            for h in 0..2 {
                exact.row_mut(0, t, h).copy_from_slice(noise.array().row(0, t, h));
            }
        }
        // The same tokens on pages in any order.
        let paged = rng.chance(0.5);
        let kind = if paged { Kind::Paged { pages: permutation(rng, 12), per_row: 12 } } else { Kind::Contiguous };
        let mut cache = turned;
        if paged {
            let mut pool = Tensor::input(dtype, [12, 7, 2, 40], Strides::random(rng), Place::Heap);
            for at in indices(shape) {
                let (page, slot) = kind.place(7, 0, at[1]);
                pool.set([page, slot, at[2], at[3]], cache.get(at));
            }
            cache = pool;
        }
        let mut stack = Stack { layers: vec![(cache, None)], kind, lengths: vec![n as i32] };
        let bits = |stack: &Stack, p: usize| -> Vec<u32> {
            let (row, slot) = stack.place(0, p);
            (0..80).map(|i| stack.layers[0].0.bits([row, slot, i / 40, i % 40])).collect()
        };
        let before: Vec<Vec<u32>> = (0..n).map(|p| bits(&stack, p)).collect();
        let (mut kept, mut dropped): (Vec<usize>, usize) = ((0..n).collect(), 0);
        while kept.len() > sinks + 2 {
            let drop = sinks..sinks + rng.between(1, (kept.len() - sinks).min(9));
            kept.drain(drop.clone());
            let unrotated = UnrotatedKeys::new(noise.view(), KeyRotation::new(pairing, frequencies));
            let runner = runner(rng);
            stack
                .call(|cache| cache.evict_running(&level.context, runner, 0, drop.clone(), dropped, &[Some(unrotated)]))
                .unwrap();
            level.checked(Op::Rope, source, dtype);
            dropped += drop.len();
            assert_eq!(stack.lengths, [kept.len() as i32]);
            for (p, &t) in kept.iter().enumerate().skip(sinks) {
                assert_eq!(bits(&stack, p), before[t], "token {t} at {p}");
            }
            let mut first = Tensor::input(dtype, [1, sinks, 2, 40], Strides::BSHD, Place::Heap);
            for at in indices(first.shape) {
                let (row, slot) = stack.place(0, at[1]);
                first.set(at, stack.layers[0].0.get([row, slot, at[2], at[3]]));
            }
            let all: Vec<usize> = (0..sinks).collect();
            assert_turned(&first, &exact, &all, (pairing, frequencies), dropped as i64, 1.0);
            stack.layers[0].0.assert_gaps();
        }
    }
}

/// Many small evictions: turned keys drift away from their positions, positions that run on do not.
fn drift(level: &Level) {
    let rng = &mut Rng::new(115);
    let (n, sinks, heads, dim) = (1300, 4, 8, 64);
    let times = scaled(1000).clamp(30, 1000);
    let left = n - times;
    let frequencies = &RopeFrequencies::new(dim, 10_000.0, &RopeScaling::None).unwrap();
    let rotation = KeyRotation::new(Pairing::HalfSplit, frequencies);
    let array = |t: &Tensor, at: &dyn Fn(usize) -> i64| {
        oracle::rope(&t.array(), rotation.pairing, frequencies.inv_freq(), 1.0, |_, s| at(s))
    };
    // One format of blocks: with few bits, keys that are rounded a thousand times are noise.
    for format in CacheFormat::ALL.into_iter().filter(|f| !f.is_affine() && !f.is_blocks() || *f == CacheFormat::Q8_0) {
        let mut random = |shape| Tensor::random(rng, DType::F32, shape, Strides::BSHD, Place::Heap);
        let (mut q, exact, mut v) = (random([1, 1, heads, dim]), random([1, n, 1, dim]), random([1, n, 1, dim]));
        indices(q.shape).for_each(|at| q.set(at, 3.0 * q.get(at)));
        indices(v.shape).for_each(|at| v.set(at, v.get(at) / 2.0));
        let held = Store::of(&v, format);
        // What attention over the tokens that are left is: in f64, each at its new position.
        let place = |p: usize| if p < sinks { p } else { p + times };
        let (mut k, mut values) = (Tensor::input(DType::F32, [1, left, 1, dim], Strides::BSHD, Place::Heap), vec![]);
        for at in indices(k.shape) {
            k.set(at, exact.get([0, place(at[1]), 0, at[3]]));
            values.push(held.get([0, place(at[1]), 0, at[3]]));
        }
        let (query, keys) = (array(&q, &|_| left as i64 - 1), array(&k, &|s| s as i64));
        let values = Array { shape: k.shape, data: values };
        let want = oracle::Attention::default().run(&query, &keys, &values).out;

        let errors = ["small steps", "one step", "running"].map(|way| {
            let mut rotated = Tensor::input(DType::F32, exact.shape, Strides::BSHD, Place::Heap);
            let written = array(&exact, &|s| s as i64);
            rotated.fill(|at| written.row(0, at[1], 0)[at[3]] as f32);
            let (mut keys, mut values) = (Store::of(&rotated, format), Store::of(&v, format));
            let (mut lengths, mut position) = ([n as i32], left as i64 - 1);
            let (context, turn) = (&level.context, [Some(rotation)]);
            {
                let mut layers = [KvLayer::new(keys.view_mut(), values.view_mut())];
                let mut cache = KvCache::new(&mut layers, Layout::Contiguous, &mut lengths);
                match way {
                    "small steps" => {
                        (0..times).for_each(|_| cache.evict(context, &Serial, 0, sinks..sinks + 1, &turn).unwrap());
                    }
                    "one step" => cache.evict(context, &Serial, 0, sinks..sinks + times, &turn).unwrap(),
                    _ => {
                        for dropped in 0..times {
                            let unrotated = [Some(UnrotatedKeys::new(exact.view(), rotation))];
                            cache.evict_running(context, &Serial, 0, sinks..sinks + 1, dropped, &unrotated).unwrap();
                        }
                        position += times as i64;
                    }
                }
            }
            let mut query = q.to(Strides::BSHD, Place::Heap);
            let positions = [position as i32];
            let angles = RopeAngles::Frequencies(frequencies);
            let rope = Rope::new(rotation.pairing, dim, angles, Positions::Offsets(&positions));
            rope_in_place(context, &Serial, query.view_mut(), &rope).unwrap();
            let mut out = Tensor::output(DType::F32, q.shape, Strides::BSHD, Place::Heap);
            let tensors = AttentionTensors::new(query.view(), keys.view(), values.view(), out.view_mut());
            let options = AttentionOptions::new().lengths(&lengths).precision(Precision::High);
            attention(context, &Serial, &mut Workspace::new(), tensors, &options).unwrap();
            indices(out.shape)
                .map(|at| (f64::from(out.get(at)) - want.row(0, 0, at[2])[at[3]]).abs())
                .fold(0.0, f64::max)
        });
        let [small, once, running] = errors;
        println!("{format}, {times} evictions: {small:.1e}, at once {once:.1e}, running {running:.1e}");
        // Keys of few bits are rounded in few places, so that chance weighs more.
        let most = if format.has_static_scales() { 1.6 } else { 1.2 };
        assert!(running <= most * once + 1e-6, "{format}: {running:e}, but one step has {once:e}");
        if times == 1000 {
            assert!(
                small > 5.0 * once,
                "{format}: {small:e}, and one step has {once:e}: the documentation says otherwise"
            );
        }
    }
}

fn moved_pages(level: &Level) {
    let rng = &mut Rng::new(110);
    for _ in 0..scaled(150) {
        let rows = rng.between(1, 5);
        let mut stack = Stack::of_kind(rng, 2, rows);
        let [pool, size, ..] = stack.layers[0].0.shape;
        // Other sequences share some pages of the first.
        let lengths = stack.lengths.clone();
        let Kind::Paged { pages, per_row } = &mut stack.kind else { unreachable!() };
        let per_row = *per_row;
        for row in 1..rows {
            for i in 0..lengths[0] as usize / size {
                if rng.chance(0.4) {
                    pages[row * per_row + i] = pages[i];
                }
            }
        }
        // Entries beyond a length may be anything.
        for row in 0..rows {
            for i in (lengths[row] as usize).div_ceil(size)..per_row {
                pages[row * per_row + i] = rng.pick(&[-1, i32::MAX, 0, -5]);
            }
        }
        let (old, mut new, mut map) = (pages.clone(), pages.clone(), vec![7; pool]);
        let (before, held) = (stack.snapshot(), |row: usize| (lengths[row] as usize).div_ceil(size));
        let mut used: Vec<i32> = (0..rows).flat_map(|row| old[row * per_row..][..held(row)].to_vec()).collect();
        used.sort_unstable();
        used.dedup();
        let runner = runner(rng);
        let n = stack
            .call(|cache| defragment_pages(&level.context, runner, cache.layers, &mut new, per_row, &lengths, &mut map))
            .unwrap();
        stack.count(level);
        assert_eq!(n, used.len());
        // Pages below the end stay; the others move to free pages in order.
        let free = (0..n as i32).filter(|page| !used.contains(page));
        let moves: Vec<(i32, i32)> = used.iter().copied().filter(|&page| page >= n as i32).zip(free).collect();
        let mut want = before.clone();
        for &(from, to) in &moves {
            (0..size).for_each(|s| stack.copy_token(&mut want, &before, (from as usize, s), (to as usize, s)));
        }
        let target = |page: i32| moves.iter().find(|m| m.0 == page).map_or(page, |m| m.1);
        for page in 0..pool as i32 {
            assert_eq!(map[page as usize], if used.contains(&page) { target(page) } else { -1 });
        }
        for (i, &page) in new.iter().enumerate() {
            let live = i % per_row < held(i / per_row);
            assert_eq!(page, if live { target(old[i]) } else { -1 });
        }
        stack.assert_is(&want, &lengths, "defragmented");

        // Copies of single pages: from the last pages to the first, each at most once.
        let order = permutation(rng, pool);
        let (to, from) = order.split_at(pool / 2);
        let moves: Vec<[i32; 2]> = to.iter().map(|&to| [rng.pick(from), to]).collect();
        let before = want.clone();
        for &[from, to] in &moves {
            (0..size).for_each(|s| stack.copy_token(&mut want, &before, (from as usize, s), (to as usize, s)));
        }
        stack.call(|cache| copy_pages(&level.context, runner, cache.layers, &moves)).unwrap();
        stack.assert_is(&want, &lengths, "copied pages");
    }
}

/// With enough work for several threads, every operation that moves tokens has the bits of one thread.
fn threads_share_the_work(level: &Level) {
    let build = || {
        let rng = &mut Rng::new(111);
        let mut tensor = |dtype, dim| {
            let strides = if dim == 32 { Strides::BSHD } else { Strides::BHSD };
            Tensor::random(rng, dtype, [4, 300, 5, dim], strides, Place::GuardAfter)
        };
        let layers = vec![(tensor(DType::F16, 32), Some(tensor(DType::F32, 24))), (tensor(DType::Bf16, 32), None)];
        Stack { layers, kind: Kind::Contiguous, lengths: vec![300, 290, 256, 299] }
    };
    let frequencies = RopeFrequencies::new(32, 10_000.0, &RopeScaling::None).unwrap();
    let run = |runner: &dyn Runner| {
        let (mut stack, mut other) = (build(), build());
        let mut workspace = Workspace::new();
        let rotation = [Some(KeyRotation::new(Pairing::Interleaved, &frequencies))];
        let context = &level.context;
        stack.call(|cache| cache.reorder(context, runner, &mut workspace, &[1, 2, 0, 0])).unwrap();
        let mut states = vec![stack.bytes()];
        stack.call(|cache| cache.evict(context, runner, 2, 3..50, &rotation)).unwrap();
        states.push(stack.bytes());
        stack.call(|cache| cache.copy_prefix(context, runner, 0, &[1, 3], 288)).unwrap();
        states.push(stack.bytes());
        stack.call(|to| other.call(|from| to.insert_sequence(context, runner, 2, from, 0, 300))).unwrap();
        states.push(stack.bytes());
        stack.call(|cache| copy_pages(context, runner, cache.layers, &[[0, 3], [1, 2]])).unwrap();
        states.push(stack.bytes());
        stack.call(|cache| cache.reset(runner, &[0, 2, 1], true)).unwrap();
        states.push(stack.bytes());
        states
    };
    let one = run(&Serial);
    assert!(one.windows(2).all(|w| w[0] != w[1]), "a step changed nothing");
    for runner in [&Threads(2) as &dyn Runner, &Threads(7), &Backwards(32)] {
        let many = run(runner);
        assert!(one == many, "{} threads", runner.num_threads());
    }
    for dtype in [DType::F16, DType::Bf16] {
        level.checked(Op::Rope, dtype, dtype);
    }
}

fn contiguous(lengths: [i32; 3]) -> Stack {
    Stack::random(&mut Rng::new(112), [3, 8], Kind::Contiguous, lengths.to_vec())
}

fn paged(pages: [i32; 6], lengths: [i32; 3]) -> Stack {
    Stack::random(&mut Rng::new(113), [6, 4], Kind::Paged { pages: pages.to_vec(), per_row: 2 }, lengths.to_vec())
}

fn mistakes() {
    use Status::{Capacity, DuplicateSlot, InvalidValue, OutOfRange, Overlap, Shape};
    let context = &Context::new().unwrap();
    let mut c = contiguous([5, 8, 0]);
    c.refuses(OutOfRange, &["sequences[1] is 3", "3 sequences"], |c| c.reset(&Serial, &[0, 3], true));
    c.refuses(OutOfRange, &["sequences[0] is -1"], |c| c.reset(&Serial, &[-1], false));
    c.refuses(DuplicateSlot, &["sequences[0] and sequences[2] are both 1"], |c| c.reset(&Serial, &[1, 0, 1], true));
    c.refuses(Shape, &["sequences has 1", "values has 2"], |c| c.set_lengths(&[1], &[2, 3]));
    c.refuses(OutOfRange, &["values[1] is -2"], |c| c.set_lengths(&[1, 0], &[2, -2]));
    c.refuses(Capacity, &["values[1] is 9", "sequence 0 holds 8"], |c| c.set_lengths(&[1, 0], &[2, 9]));
    c.refuses(Shape, &["counts has 2", "3 sequences"], |c| c.advance(&[0, 0]));
    c.refuses(OutOfRange, &["counts[2] is -1"], |c| c.advance(&[1, 0, -1]));
    c.refuses(Capacity, &["sequence 1 has 8", "1 more", "holds 8"], |c| c.advance(&[1, 1, 1]));
    c.refuses(OutOfRange, &["sequence 2", "to 1", "has 0"], |c| c.truncate(&[1, 1, 1], None));
    c.refuses(OutOfRange, &["sequence 0", "to -1"], |c| c.truncate(&[-1, 1, 0], None));
    c.refuses(Shape, &["have 1", "3 sequences"], |c| c.truncate(&[1], None));

    c.refuses(OutOfRange, &["from is 3", "3 sequences"], |c| c.copy_prefix(context, &Serial, 3, &[0], 1));
    c.refuses(OutOfRange, &["tokens is 6", "sequence 0 has 5"], |c| c.copy_prefix(context, &Serial, 0, &[1], 6));
    c.refuses(DuplicateSlot, &["to[1] is 0"], |c| c.copy_prefix(context, &Serial, 0, &[1, 0], 2));
    c.refuses(DuplicateSlot, &["to[0] and to[1] are both 1"], |c| c.copy_prefix(context, &Serial, 0, &[1, 1], 2));

    let mut w = Workspace::new();
    c.refuses(Shape, &["parents has 2", "3 sequences"], |c| c.reorder(context, &Serial, &mut w, &[0, 1]));
    c.refuses(OutOfRange, &["parents[2] is 3"], |c| c.reorder(context, &Serial, &mut w, &[0, 1, 3]));
    c.refuses(OutOfRange, &["parents[0] is -1"], |c| c.reorder(context, &Serial, &mut w, &[-1, 1, 2]));

    c.refuses(OutOfRange, &["2 to 6", "sequence 0 has 5"], |c| c.evict(context, &Serial, 0, 2..6, &[]));
    #[allow(clippy::reversed_empty_ranges)]
    c.refuses(OutOfRange, &["3 to 2"], |c| c.evict(context, &Serial, 0, 3..2, &[]));
    c.refuses(OutOfRange, &["sequence is 9"], |c| c.evict(context, &Serial, 9, 0..0, &[]));
    let many = RopeFrequencies::new(64, 10_000.0, &RopeScaling::None).unwrap();
    let rotation = Some(KeyRotation::new(Pairing::HalfSplit, &many));
    let layers = c.layers.len();
    c.refuses(Shape, &["rotary_dim 64", "layer 0"], |c| c.evict(context, &Serial, 0, 0..1, &[rotation]));
    c.refuses(Shape, &["7 rotations", &format!("{layers} layers")], |c| {
        c.evict(context, &Serial, 0, 0..1, &[rotation; 7])
    });

    let few = Tensor::random(&mut Rng::new(116), DType::F32, [1, 1, 3, 5], Strides::BSHD, Place::Heap);
    let two = RopeFrequencies::new(2, 10_000.0, &RopeScaling::None).unwrap();
    let unrotated = |frequencies| {
        let rotation = KeyRotation::new(Pairing::HalfSplit, frequencies);
        Some(UnrotatedKeys::new(few.view(), rotation))
    };
    let running = |c: &mut KvCache, drop, dropped, keys: &[Option<UnrotatedKeys>]| {
        c.evict_running(context, &Serial, 0, drop, dropped, keys)
    };
    c.refuses(OutOfRange, &["2 to 6", "sequence 0 has 5"], |c| running(c, 2..6, 0, &[]));
    c.refuses(Shape, &["7 unrotated keys", &format!("{layers} layers")], |c| {
        running(c, 0..1, 0, &[unrotated(&two); 7])
    });
    c.refuses(Shape, &["layer 0"], |c| running(c, 1..2, 0, &[unrotated(&many)]));
    c.refuses(Shape, &["of 1 tokens, but 2 are kept"], |c| running(c, 2..3, 0, &[unrotated(&two)]));
    c.refuses(Capacity, &["holds 5 tokens", "lost 2147483643", "2147483647"], |c| {
        running(c, 1..2, i32::MAX as usize - 4, &[])
    });

    // A ring.
    let mut ring = Stack::random(&mut Rng::new(114), [2, 8], Kind::Ring(2), vec![11, 6]);
    ring.refuses(InvalidValue, &["a ring drops"], |c| c.evict(context, &Serial, 1, 2..3, &[]));
    ring.refuses(InvalidValue, &["a ring drops"], |c| c.evict_running(context, &Serial, 1, 2..3, 0, &[]));
    ring.refuses(OutOfRange, &["position 4 of sequence 0", "11 tokens", "positions 2 to 4"], |c| {
        c.truncate(&[10, 6], None)
    });
    ring.refuses(OutOfRange, &["position 3 of sequence 0", "11 tokens"], |c| {
        c.copy_prefix(context, &Serial, 0, &[1], 9)
    });
    ring.kind = Kind::Ring(8);
    ring.refuses(Capacity, &["8 sink tokens", "8 slots"], |c| c.reset(&Serial, &[0], false));

    // Pages: one shared by two sequences, one twice in a sequence, one that does not exist.
    let mut p = paged([0, 1, 0, 2, 4, 3], [8, 8, 5]);
    p.refuses(Overlap, &["page 0", "sequence 0", "sequence 1"], |c| c.reset(&Serial, &[0], true));
    p.refuses(Overlap, &["page 0", "sequence 1"], |c| c.evict(context, &Serial, 1, 0..1, &[]));
    p.refuses(Overlap, &["page 0", "sequence 1", "sequence 0"], |c| c.copy_prefix(context, &Serial, 0, &[1], 6));
    p.refuses(InvalidValue, &["pages are reordered by their table"], |c| {
        c.reorder(context, &Serial, &mut w, &[0, 0, 0])
    });
    p.call(|c| c.reset(&Serial, &[0, 1], true)).unwrap();
    let mut p = paged([0, 1, 0, 2, 4, 3], [8, 8, 5]);
    // A sequence may write after the shared page.
    p.call(|c| c.evict(context, &Serial, 1, 4..5, &[])).unwrap();
    let mut p = paged([5, 5, 0, 2, 4, 9], [8, 8, 3]);
    p.refuses(Overlap, &["page 5", "sequence 0"], |c| c.evict(context, &Serial, 0, 1..2, &[]));
    p.refuses(OutOfRange, &["page_table[2, 1] is 9", "6"], |c| c.advance(&[0, 0, 2]));
    p.refuses(OutOfRange, &["page_table[2, 1] is 9", "6"], |c| c.set_lengths(&[2], &[5]));
    p.refuses(Capacity, &["sequence 1 has 8", "holds 8"], |c| c.advance(&[0, 1, 0]));
    p.refuses(OutOfRange, &["lengths[0] is 9", "8"], |c| {
        let mut lengths = [9, 0, 0];
        KvCache::new(c.layers, c.layout, &mut lengths).advance(&[0; 3])
    });
    p.refuses(Shape, &["lengths has 2", "3 sequences"], |c| {
        KvCache::new(c.layers, c.layout, &mut [0; 2]).advance(&[0; 3])
    });

    // Pools.
    p.refuses(OutOfRange, &["move 1 is to page 6", "6 pages"], |c| {
        copy_pages(context, &Serial, c.layers, &[[0, 1], [2, 6]])
    });
    p.refuses(OutOfRange, &["move 0 is from page -1"], |c| copy_pages(context, &Serial, c.layers, &[[-1, 1]]));
    p.refuses(DuplicateSlot, &["page 1", "written by move 1"], |c| {
        copy_pages(context, &Serial, c.layers, &[[0, 1], [2, 1]])
    });
    p.refuses(DuplicateSlot, &["page 2", "read by move 0"], |c| {
        copy_pages(context, &Serial, c.layers, &[[2, 1], [0, 2]])
    });
    p.refuses(DuplicateSlot, &["page 2", "read by move 0"], |c| copy_pages(context, &Serial, c.layers, &[[2, 2]]));
    let defragment = |c: &mut KvCache, pages: &mut [i32], per_row, lengths: &[i32], map: usize| {
        let before = pages.to_vec();
        let done = defragment_pages(context, &Serial, c.layers, pages, per_row, lengths, &mut vec![0; map]);
        assert!(done.is_ok() || pages == before);
        done
    };
    p.refuses(Shape, &["map has 5", "6 pages"], |c| defragment(c, &mut [0, 1], 1, &[1, 1], 5));
    p.refuses(Shape, &["page_table has 3", "pages_per_sequence = 2"], |c| defragment(c, &mut [0, 1, 2], 2, &[1], 6));
    p.refuses(Shape, &["lengths has 1", "2 sequences"], |c| defragment(c, &mut [0, 1], 1, &[1], 6));
    p.refuses(OutOfRange, &["lengths[1] is 5", "4"], |c| defragment(c, &mut [0, 1], 1, &[1, 5], 6));
    p.refuses(OutOfRange, &["page_table[1, 0] is -1"], |c| defragment(c, &mut [5, -1], 1, &[1, 1], 6));

    // Indirect and ragged rows.
    let mut i = Stack::random(&mut Rng::new(115), [3, 4], Kind::Indirect(vec![0; 12]), vec![4, 2, 1]);
    i.refuses(InvalidValue, &["indirect"], |c| c.reset(&Serial, &[0], true));
    i.refuses(InvalidValue, &["indirect"], |c| c.evict(context, &Serial, 0, 0..1, &[]));
    i.refuses(InvalidValue, &["indirect"], |c| c.copy_prefix(context, &Serial, 0, &[1], 1));
    i.refuses(InvalidValue, &["indirect"], |c| c.reorder(context, &Serial, &mut w, &[0, 0, 0]));
    i.refuses(Overlap, &["sequence 0", "from 4 tokens to 1", "sequence 1"], |c| c.truncate(&[1, 2, 1], None));
    i.call(|c| c.truncate(&[2, 2, 1], None)).unwrap();
    let mut r = Stack::random(&mut Rng::new(116), [1, 9], Kind::Ragged(vec![0, 4, 9]), vec![3, 5]);
    r.refuses(InvalidValue, &["ragged"], |c| c.reorder(context, &Serial, &mut w, &[0, 0]));
    r.refuses(Capacity, &["tokens is 5", "sequence 0 holds 4"], |c| c.copy_prefix(context, &Serial, 1, &[0], 5));
    r.refuses(Capacity, &["sequence 0 has 3", "2 more", "holds 4"], |c| c.advance(&[2, 0]));
    r.kind = Kind::Ragged(vec![0, 4, 10]);
    r.refuses(OutOfRange, &["cu_seqlens ends at 10", "9"], |c| c.reset(&Serial, &[0], false));
}

fn insert_mistakes() {
    use Status::{Capacity, InvalidValue, OutOfRange, Overlap, Shape};
    let context = &Context::new().unwrap();
    let layers = |n: usize, heads: usize, v_dim: usize, first: [usize; 2]| -> Vec<(Tensor, Option<Tensor>)> {
        let tensor = |dim| {
            let shape = [first[0], first[1], heads, dim];
            Tensor::random(&mut Rng::new(117), DType::F32, shape, Strides::BSHD, Place::Heap)
        };
        (0..n).map(|_| (tensor(4), (v_dim > 0).then(|| tensor(v_dim)))).collect()
    };
    let stack = |layers, kind, lengths: &[i32]| Stack { layers, kind, lengths: lengths.to_vec() };
    let mut to = stack(layers(2, 2, 3, [2, 6]), Kind::Contiguous, &[1, 2]);
    let mut refuses = |from: &mut Stack, row, from_row, length, status, pieces: &[&str]| {
        to.refuses(status, pieces, |to| {
            from.call(|from| to.insert_sequence(context, &Serial, row, from, from_row, length))
        });
    };
    let mut good = stack(layers(2, 2, 3, [1, 9]), Kind::Contiguous, &[8]);
    refuses(&mut good, 2, 0, 1, OutOfRange, &["sequence is 2", "2 sequences"]);
    refuses(&mut good, 0, 1, 1, OutOfRange, &["from_sequence is 1", "1 sequences"]);
    refuses(&mut good, 0, 0, 9, OutOfRange, &["length is 9", "sequence 0", "has 8"]);
    refuses(&mut good, 0, 0, 7, Capacity, &["length is 7", "sequence 0 holds 6"]);
    refuses(&mut good, 0, 0, usize::MAX, OutOfRange, &["length is", "has 8"]);
    refuses(&mut stack(layers(3, 2, 3, [1, 9]), Kind::Contiguous, &[8]), 0, 0, 1, Shape, &["2 layers", "has 3"]);
    refuses(
        &mut stack(layers(2, 1, 3, [1, 9]), Kind::Contiguous, &[8]),
        0,
        0,
        1,
        Shape,
        &["k of layer 0 has heads = 2", "has 1"],
    );
    refuses(
        &mut stack(layers(2, 2, 5, [1, 9]), Kind::Contiguous, &[8]),
        0,
        0,
        1,
        Shape,
        &["v of layer 0 has dim = 3", "has 5"],
    );
    refuses(&mut stack(layers(2, 2, 0, [1, 9]), Kind::Contiguous, &[8]), 0, 0, 1, Shape, &["only one", "layer 0"]);
    refuses(
        &mut stack(layers(2, 2, 3, [2, 9]), Kind::Contiguous, &[8]),
        0,
        0,
        1,
        Shape,
        &["lengths has 1", "2 sequences"],
    );
    let bad_page = Kind::Paged { pages: vec![0, 7], per_row: 2 };
    refuses(&mut stack(layers(2, 2, 3, [3, 4]), bad_page, &[8]), 0, 0, 5, OutOfRange, &["page_table[0, 1] is 7"]);
    let shared = Kind::Paged { pages: vec![0, 1, 2, 1], per_row: 2 };
    let mut to = stack(layers(2, 2, 3, [3, 4]), shared, &[5, 3]);
    to.refuses(Overlap, &["page 1", "sequence 1", "sequence 0"], |to| {
        good.call(|from| to.insert_sequence(context, &Serial, 1, from, 0, 5))
    });
    let mut to = stack(layers(2, 2, 3, [1, 4]), Kind::Indirect(vec![0; 4]), &[0]);
    to.refuses(InvalidValue, &["indirect"], |to| good.call(|from| to.insert_sequence(context, &Serial, 0, from, 0, 4)));
    let mut none = Stack { layers: Vec::new(), kind: Kind::Contiguous, lengths: Vec::new() };
    none.refuses(Shape, &["no layers"], |c| c.advance(&[]));
}

fn table_mistakes() {
    use Status::{Capacity, OutOfRange, Overlap, Shape};
    #[track_caller]
    fn refused(status: Status, pieces: &[&str], call: impl FnOnce(&mut [i32], &mut [i32]) -> Result<()>) {
        // Two rows of three; row 1 uses the token of row 0 at position 1.
        let (mut table, mut lengths) = ([0, 0, 0, 1, 0, 1], [3, 2]);
        let error = call(&mut table, &mut lengths).expect_err("should be refused");
        assert_eq!(error.status(), status, "{error}");
        for piece in pieces {
            assert!(error.message().contains(piece), "{error}: does not say {piece:?}");
        }
        assert_eq!((table, lengths), ([0, 0, 0, 1, 0, 1], [3, 2]));
    }
    let w = &mut Workspace::new();
    refused(Shape, &["6 entries", "3 sequences of 3 are 9"], |t, l| reorder_table(w, t, 3, l, &[0, 1, 1]));
    refused(Shape, &["6 entries", "2 sequences of 2 are 4"], |t, l| reorder_table(w, t, 2, l, &[0, 1]));
    refused(Shape, &["lengths has 1", "2 sequences"], |t, l| reorder_table(w, t, 3, &mut l[..1], &[0, 1]));
    refused(OutOfRange, &["parents[1] is 2"], |t, l| reorder_table(w, t, 3, l, &[0, 2]));
    refused(OutOfRange, &["lengths[0] is 4", "3"], |t, _| reorder_table(w, t, 3, &mut [4, 0], &[0, 1]));
    // Row 0 can be truncated to two tokens, but not to one, because row 1 needs its token at position 1.
    refused(Overlap, &["sequence 0", "from 3 tokens to 1", "position 1", "sequence 1"], |t, _| {
        let mut lengths = [3, 2, 1];
        let mut table = [t, &mut [2, 2, 2]].concat();
        reorder_table(w, &mut table, 3, &mut lengths, &[2, 1, 2])
    });
    refused(OutOfRange, &["positions[1] is -1"], |t, _| set_table_tokens(t, 3, &[0, -1], 1));
    refused(Capacity, &["sequence 1 has 2 tokens from position 2", "3"], |t, _| set_table_tokens(t, 3, &[0, 2], 2));
    refused(Capacity, &["from position 0"], |t, _| set_table_tokens(t, 3, &[0, 2], usize::MAX));
    refused(Shape, &["6 entries", "1 sequences of 3"], |t, _| set_table_tokens(t, 3, &[0], 1));
}

/// An error in the last layer leaves the first unchanged.
fn bad_layers_change_nothing() {
    let context = &Context::new().unwrap();
    let frequencies = &RopeFrequencies::new(8, 10_000.0, &RopeScaling::None).unwrap();
    let tensor = |shape| Tensor::random(&mut Rng::new(118), DType::F16, shape, Strides::BSHD, Place::Heap);
    let good = || (tensor([3, 8, 2, 8]), Some(tensor([3, 8, 2, 6])));
    let bad: [(_, _, &str); 5] = [
        (tensor([3, 7, 2, 8]), None, "layer 1: k has seq = 7, but k of layer 0 has 8"),
        (tensor([2, 8, 2, 8]), None, "layer 1: k has batch = 2, but k of layer 0 has 3"),
        (tensor([3, 8, 2, 8]), Some(tensor([3, 9, 2, 6])), "layer 1: v has seq = 9, but k has 8"),
        (tensor([3, 8, 2, 8]), Some(tensor([4, 8, 2, 6])), "layer 1: v has batch = 4, but k has 3"),
        (tensor([3, 8, 2, 8]), Some(tensor([3, 8, 1, 6])), "layer 1: v has heads = 1, but k has 2"),
    ];
    for (k, v, sentence) in bad {
        let mut stack = Stack { layers: vec![good(), (k, v)], kind: Kind::Contiguous, lengths: vec![5, 3, 1] };
        let mut other = Stack { layers: vec![good(), good()], kind: Kind::Contiguous, lengths: vec![5, 3, 1] };
        let (shape, s) = (Status::Shape, &[sentence]);
        let w = &mut Workspace::new();
        stack.refuses(shape, s, |c| c.reset(&Serial, &[0], true));
        stack.refuses(shape, s, |c| c.advance(&[1, 0, 0]));
        stack.refuses(shape, s, |c| c.truncate(&[1, 0, 0], None));
        stack.refuses(shape, s, |c| c.set_lengths(&[1], &[0]));
        stack.refuses(shape, s, |c| c.copy_prefix(context, &Serial, 0, &[1], 2));
        stack.refuses(shape, s, |c| c.reorder(context, &Serial, w, &[1, 0, 0]));
        stack.refuses(shape, s, |c| c.evict(context, &Serial, 0, 0..1, &[]));
        stack.refuses(shape, s, |c| copy_pages(context, &Serial, c.layers, &[[0, 1]]));
        stack.refuses(shape, s, |c| defragment_pages(context, &Serial, c.layers, &mut [2], 1, &[4], &mut [0; 3]));
        stack.refuses(shape, s, |to| other.call(|from| to.insert_sequence(context, &Serial, 0, from, 0, 1)));
        other.refuses(shape, s, |to| stack.call(|from| to.insert_sequence(context, &Serial, 0, from, 0, 1)));
    }
    // A rotation that suits the first layer only.
    let mut stack =
        Stack { layers: vec![good(), (tensor([3, 8, 2, 4]), None)], kind: Kind::Contiguous, lengths: vec![5, 3, 1] };
    let rotation = Some(KeyRotation::new(Pairing::HalfSplit, frequencies));
    for rotations in [&[rotation][..], &[None, rotation]] {
        stack.refuses(Status::Shape, &["layer 1: rotary_dim 8 is above the head size 4"], |c| {
            c.evict(context, &Serial, 0, 0..2, rotations)
        });
    }
    stack.call(|c| c.evict(context, &Serial, 0, 0..2, &[rotation, None])).unwrap();
}
