//! The cache write for every layout: each token in the slot that the layout defines, and no other slot written.

use crate::common::{Layout, Place, Rng, Tensor, scaled};
use crate::harness::{Level, tests};
use crate::write::{Write, random_tensor};
use kvlane::{DType, Destination, Layout as Slots, Packing};

tests! {
    levels: random_writes, ring_turns, pages_are_shared, far_positions, numbers_that_look_alike, token_by_token;
    once:;
}

/// The numbers `0..n` in any order.
fn shuffled(rng: &mut Rng, n: usize) -> Vec<i32> {
    let mut list: Vec<i32> = (0..n as i32).collect();
    (1..n).rev().for_each(|i| list.swap(i, rng.below(i + 1)));
    list
}

/// A destination that owns its lists.
struct Plan {
    positions: Vec<i32>,
    counts: Vec<i32>,
    rows: Option<Vec<i32>>,
    slots: Option<Vec<i32>>,
    /// Page table, or first slots.
    table: Vec<i32>,
    pages_per_row: usize,
    sink_tokens: usize,
    kind: Kind,
    /// First two axes of the views.
    axes: [usize; 2],
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Contiguous,
    Ring,
    Paged,
    Ragged,
}

const KINDS: [Kind; 4] = [Kind::Contiguous, Kind::Ring, Kind::Paged, Kind::Ragged];

impl Plan {
    fn random(rng: &mut Rng, kind: Kind, packing: Packing, batch: usize, seq: usize) -> Self {
        let even = |n: usize| if packing == Packing::RowPairs { n.next_multiple_of(2) } else { n };
        let mut counts: Vec<i32> = (0..batch).map(|_| rng.between(0, seq) as i32).collect();
        let rows_there = batch + rng.below(3);
        let targets = shuffled(rng, rows_there);
        let rows = rng.chance(0.5).then(|| targets[..batch].to_vec());
        let target = |b: usize| rows.as_ref().map_or(b, |rows| rows[b] as usize);
        let mut plan = Self {
            positions: vec![0; batch],
            counts: Vec::new(),
            rows: None,
            slots: None,
            table: Vec::new(),
            pages_per_row: 0,
            sink_tokens: 0,
            kind,
            axes: [rows_there, 0],
        };
        match kind {
            Kind::Contiguous => {
                let capacity = even(seq + rng.between(0, 10));
                plan.axes[1] = capacity;
                for (position, &count) in plan.positions.iter_mut().zip(&counts) {
                    *position = rng.between(0, capacity - count as usize) as i32;
                }
            }
            Kind::Ring => {
                let capacity = even(rng.between(1, 20));
                plan.axes[1] = capacity;
                plan.sink_tokens = even(rng.below(capacity)).min(capacity - even(1));
                for (b, count) in counts.iter_mut().enumerate() {
                    let position = rng.below(3 * capacity);
                    let most = plan.sink_tokens.saturating_sub(position) + capacity - plan.sink_tokens;
                    plan.positions[b] = position as i32;
                    *count = (*count).min(most as i32);
                }
            }
            Kind::Paged => {
                let size = even(rng.between(1, 9));
                plan.pages_per_row = (seq + rng.between(0, 10)).div_ceil(size).max(1);
                let pool = rows_there * plan.pages_per_row + rng.below(4);
                plan.axes = [pool, size];
                let pages = shuffled(rng, pool);
                // Entries of slots that are not written are ignored.
                plan.table =
                    (0..rows_there * plan.pages_per_row).map(|_| rng.pick(&[-1, i32::MIN, i32::MAX])).collect();
                for (b, count) in counts.iter().map(|&count| count as usize).enumerate() {
                    let position = rng.between(0, plan.pages_per_row * size - count);
                    plan.positions[b] = position as i32;
                    let first = target(b) * plan.pages_per_row;
                    let needed = first + position / size..first + (position + count).div_ceil(size);
                    plan.table[needed.clone()].copy_from_slice(&pages[needed]);
                }
            }
            Kind::Ragged => {
                let mut start = even(rng.below(5)) as i32;
                for row in 0..rows_there {
                    plan.table.push(start);
                    let length = seq + rng.below(4);
                    if let Some(b) = (0..batch).find(|&b| target(b) == row) {
                        plan.positions[b] = rng.between(0, length - counts[b] as usize) as i32;
                    }
                    start += even(length) as i32;
                }
                plan.table.push(start);
                plan.axes = [1, even(start as usize + rng.below(3))];
            }
        }
        plan.rows = rows;
        plan.counts = counts;
        plan
    }

    /// The same views, written by slot.
    fn by_slots(mut self, rng: &mut Rng, seq: usize) -> Self {
        let [rows, slots] = self.axes;
        let batch = self.counts.len();
        let pool = matches!(self.kind, Kind::Paged | Kind::Ragged);
        let mut list = Vec::new();
        let mut left = shuffled(rng, rows * slots);
        if rng.chance(0.3) {
            left.sort_by(|a, b| b.cmp(a));
        }
        for b in 0..batch {
            if !pool {
                left = shuffled(rng, slots);
            }
            for t in 0..seq {
                let pad = t >= self.counts[b] as usize || rng.chance(0.2);
                list.push(match left.pop() {
                    // Anything beyond a sequence's count.
                    _ if t >= self.counts[b] as usize => i32::MIN,
                    Some(slot) if !pad => slot,
                    _ => -1,
                });
            }
        }
        self.slots = Some(list);
        if pool {
            // The table is not needed, and ignored.
            (self.rows, self.table, self.pages_per_row) = (None, vec![-9], 0);
        }
        self
    }

    fn destination(&self) -> Destination<'_> {
        let mut to = Destination::positions(&self.positions).counts(&self.counts);
        (to.sequences, to.slots) = (self.rows.as_deref(), self.slots.as_deref());
        to.layout(match self.kind {
            Kind::Contiguous => Slots::Contiguous,
            Kind::Ring => Slots::ring(self.sink_tokens),
            Kind::Paged => Slots::paged(&self.table, self.pages_per_row),
            Kind::Ragged => Slots::ragged(&self.table),
        })
    }
}

/// Random tokens and caches for a plan.
fn tensors(rng: &mut Rng, plan: &Plan, seq: usize, packing: Packing) -> Write {
    let (batch, [rows, slots]) = (plan.counts.len(), plan.axes);
    let (heads, dim, v_dim) = (rng.between(1, 3), rng.between(1, 40), rng.between(1, 40));
    let place = rng.pick(&[Place::Heap, Place::GuardAfter, Place::GuardBefore]);
    // Pages in either order of axes, and other strides.
    let layouts = [(); 4].map(|()| match rng.below(3) {
        0 => Layout::BSHD,
        1 => Layout::BHSD,
        _ => Layout::random(rng),
    });
    let types = [(); 4].map(|()| rng.pick(&DType::ALL));
    let values = match packing {
        Packing::RowPairs => [rows, slots / 2, heads, 2 * v_dim],
        _ => [rows, slots, heads, v_dim],
    };
    Write {
        k: random_tensor(rng, types[0], [batch, seq, heads, dim], layouts[0], place),
        v: random_tensor(rng, types[1], [batch, seq, heads, v_dim], layouts[1], place),
        k_cache: Tensor::output(types[2], [rows, slots, heads, dim], layouts[2], place),
        v_cache: Tensor::output(types[3], values, layouts[3], place),
        v_packing: packing,
    }
}

fn random_writes(level: &Level) {
    let mut rng = Rng::new(90);
    for _ in 0..scaled(60) {
        for kind in KINDS {
            for packing in Packing::ALL {
                let (batch, seq) = (rng.between(1, 4), rng.between(0, 25));
                let mut plan = Plan::random(&mut rng, kind, packing, batch, seq);
                if rng.chance(0.3) {
                    plan = plan.by_slots(&mut rng, seq);
                }
                tensors(&mut rng, &plan, seq, packing).check(level, plan.destination());
            }
        }
    }
}

fn small(rng: &mut Rng, seq: usize, axes: [usize; 2], batch: usize) -> Write {
    let [rows, slots] = axes;
    Write {
        k: random_tensor(rng, DType::F32, [batch, seq, 2, 3], Layout::BSHD, Place::Heap),
        v: random_tensor(rng, DType::F32, [batch, seq, 2, 5], Layout::BSHD, Place::Heap),
        k_cache: Tensor::output(DType::F16, [rows, slots, 2, 3], Layout::BHSD, Place::Heap),
        v_cache: Tensor::output(DType::Bf16, [rows, slots, 2, 5], Layout::BSHD, Place::Heap),
        v_packing: Packing::Rows,
    }
}

/// Exactly as many tokens as a ring takes, from every start position.
fn ring_turns(level: &Level) {
    let rng = &mut Rng::new(91);
    for sinks in 0..5 {
        for position in 0..17 {
            let (one, two) = ([position], [position, 1000]);
            let layout = Slots::ring(sinks);
            let most = sinks.saturating_sub(position as usize) + 5 - sinks;
            let counts = [most as i32, 5 - sinks as i32];
            small(rng, most, [2, 5], 2).check(level, Destination::positions(&two).counts(&counts).layout(layout));
            // One more is an error.
            let status = small(rng, most + 1, [1, 5], 1).run(
                level,
                &kvlane::Serial,
                Destination::positions(&one).layout(layout),
            );
            assert_eq!(status.unwrap_err().status(), kvlane::Status::DuplicateSlot, "{sinks} {position}");
        }
    }
}

/// Sequences can share a page if they do not write to the same slot of it.
fn pages_are_shared(level: &Level) {
    let rng = &mut Rng::new(92);
    // A common prefix of two pages; then each sequence has its own.
    let pages = [4, 1, 0, 4, 1, 2, 4, 1, 3];
    let layout = Slots::paged(&pages, 3);
    small(rng, 3, [5, 4], 3).check(level, Destination::positions(&[8, 9, 8]).layout(layout));
    // Different slots of one page.
    small(rng, 1, [5, 4], 3).check(level, Destination::positions(&[4, 7, 5]).layout(layout));
    // One row of the table twice, and one page twice in a row.
    let layout = Slots::paged(&[3, 3, 0], 3);
    let mut to = Destination::positions(&[1, 6]).counts(&[2, 2]).sequences(&[0, 0]).layout(layout);
    small(rng, 2, [5, 4], 2).run(level, &kvlane::Serial, to).expect_err("slot 2 of page 3 twice");
    to.positions = &[0, 6];
    small(rng, 2, [5, 4], 2).check(level, to);
}

/// A ring continues to count up to the largest position.
fn far_positions(level: &Level) {
    let rng = &mut Rng::new(93);
    let mut write = small(rng, 2, [1, 7], 1);
    let layout = Slots::ring(2);
    let last = i32::MAX - 2;
    write.run(level, &kvlane::Serial, Destination::positions(&[last]).layout(layout)).unwrap();
    // 2147483645 - 2 is 3 more than a multiple of 5.
    for (t, slot) in [(0, 5), (1, 6)] {
        for h in 0..2 {
            for d in 0..3 {
                crate::write::assert_element(&write.k, [0, t, h, d], &write.k_cache, [0, slot, h, d]);
            }
        }
    }
}

/// Numbers of slots and pages beyond the bits of the duplicate check, which takes them modulo its size.
fn numbers_that_look_alike(level: &Level) {
    let rng = &mut Rng::new(94);
    const FAR: i32 = 1 << 16;
    let mut big = |seq: usize, axes: [usize; 2], batch: usize| Write {
        k: random_tensor(rng, DType::F32, [batch, seq, 1, 1], Layout::BSHD, Place::Heap),
        v: random_tensor(rng, DType::F32, [batch, seq, 1, 0], Layout::BSHD, Place::Heap),
        k_cache: Tensor::output(DType::F16, [axes[0], axes[1], 1, 1], Layout::BSHD, Place::Heap),
        v_cache: Tensor::output(DType::F16, [axes[0], axes[1], 1, 0], Layout::BSHD, Place::Heap),
        v_packing: Packing::Rows,
    };
    let axes = [FAR as usize + 9, 2];
    let layout = Slots::paged(&[FAR + 3, 3, 4, FAR + 4], 2);
    big(4, axes, 2).check(level, Destination::positions(&[0, 0]).layout(layout));
    let slots = [FAR + 7, 7, 2 * FAR + 7, 6, FAR + 6, 8];
    big(3, axes, 2).check(level, Destination::slots(&slots).layout(layout));
    let slots = [FAR + 7, 7, 2 * FAR + 7, 6, FAR + 6, 7];
    let error = big(3, axes, 2).run(level, &kvlane::Serial, Destination::slots(&slots).layout(layout)).unwrap_err();
    assert!(error.message().contains("tokens [0, 1] and [1, 2] both go to slot 7 of the pool"), "{error}");
}

/// A prompt at once, in pieces, and token by token gives the same cache; a ring holds the last tokens.
fn token_by_token(level: &Level) {
    let mut rng = Rng::new(95);
    let total = 40;
    for kind in KINDS {
        for packing in Packing::ALL {
            let sinks = 4;
            let (axes, table): ([usize; 2], Vec<i32>) = match kind {
                Kind::Contiguous => ([2, total], vec![]),
                Kind::Ring => ([2, 16], vec![]),
                Kind::Paged => ([13, 8], vec![7, 2, 9, 0, 12, 1, 3, 5, 11, 4]),
                Kind::Ragged => ([1, 2 * total + 2], vec![2, 42, 82]),
            };
            let layout = match kind {
                Kind::Contiguous => Slots::Contiguous,
                Kind::Ring => Slots::ring(sinks),
                Kind::Paged => Slots::paged(&table, 5),
                Kind::Ragged => Slots::ragged(&table),
            };
            let k = Tensor::random(&mut rng, DType::F32, [2, total, 2, 6], Layout::BSHD, Place::Heap);
            let v = Tensor::random(&mut rng, DType::F32, [2, total, 2, 9], Layout::BSHD, Place::Heap);
            let values = match packing {
                Packing::RowPairs => [axes[0], axes[1] / 2, 2, 18],
                _ => [axes[0], axes[1], 2, 9],
            };
            let mut caches = Vec::new();
            // A ring takes at most as many tokens as it has slots.
            for step in [1, 3, 12] {
                let mut k_cache = Tensor::output(DType::Bf16, [axes[0], axes[1], 2, 6], Layout::BSHD, Place::Heap);
                let mut v_cache = Tensor::output(DType::Bf16, values, Layout::BHSD, Place::Heap);
                let mut done = 0;
                while done < total {
                    let tokens = step.min(total - done);
                    let mut write = Write {
                        k: k.cut(0..2, done..done + tokens, Layout::BSHD),
                        v: v.cut(0..2, done..done + tokens, Layout::BHSD),
                        k_cache,
                        v_cache,
                        v_packing: packing,
                    };
                    let positions = [done as i32; 2];
                    let to = Destination::positions(&positions).layout(layout);
                    write.run(level, &kvlane::Serial, to).expect("a valid write");
                    (k_cache, v_cache) = (write.k_cache, write.v_cache);
                    done += tokens;
                }
                for (b, p) in [(0, total - 1), (1, total - 1), (1, 0), (0, total - 12), (1, total - 5)] {
                    let at = crate::write::place(layout, axes[1], b, p);
                    crate::write::assert_element(&k, [b, p, 1, 5], &k_cache, [at.0, at.1, 1, 5]);
                    let pair = match packing {
                        Packing::RowPairs => [at.0, at.1 / 2, 1, 2 * 7 + at.1 % 2],
                        _ => [at.0, at.1, 1, 7],
                    };
                    crate::write::assert_element(&v, [b, p, 1, 7], &v_cache, pair);
                }
                caches.push((k_cache.all_bits(), v_cache.all_bits()));
            }
            assert!(caches.windows(2).all(|pair| pair[0] == pair[1]), "{kind:?} {packing:?}");
        }
    }
}
