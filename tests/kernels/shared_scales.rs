//! Moves of tokens whose scales are not theirs alone, compared with a model that keeps what can be kept and quantises the rest again.

use crate::cache::{Kind as Places, permutation, runner};
use crate::common::affine::{Described, Granularity, Kind, Stored};
use crate::common::tensor::indices;
use crate::common::{Layout as Strides, Place, Rng, Tensor, scaled};
use crate::harness::{Level, tests};
use crate::quantised::{Store, heads_of};
use kvlane::*;
use std::collections::BTreeSet;
use std::ops::Range;

tests! {
    levels: evicted, turned, running_positions, copied_prefixes, inserted, reordered, moved_pages;
    once: emptied, kept_bits, large_heads;
}

/// A slot: its index on the first two axes.
type Slot = [usize; 2];

/// What arrives in a slot.
enum Arrival {
    /// The token of another slot.
    Own(Slot),
    /// A token of an alike cache, and its block there.
    Alike(Stored, Slot),
    /// Elements, by heads.
    Elements(Vec<Vec<f32>>),
}

/// Keys and values with the same places.
struct Stack {
    caches: [Described; 2],
    places: Places,
    lengths: Vec<i32>,
}

const ROWS: usize = 3;

/// A kind whose tokens share scales in blocks of `shared` slots, or whose scales are fixed and belong to places, or any other.
fn kind(rng: &mut Rng, dim: usize, shared: usize) -> Kind {
    let formats = [CacheFormat::Affine8, CacheFormat::Affine4];
    let format = rng.pick(if dim.is_multiple_of(2) { &formats[..] } else { &formats[..1] });
    let mut kind = Kind::random(rng, format, dim, 0);
    let group = if dim.is_multiple_of(4) { rng.pick(&[0, 2, dim / 2]) } else { 0 };
    kind.granularity = match rng.below(8) {
        0..3 => Granularity::ChannelAndSlots(shared),
        3 | 4 => Granularity::GroupAndSlots(group, shared),
        5 => Granularity::Places(0),
        6 => Granularity::Places(shared),
        _ => kind.granularity,
    };
    kind
}

/// A layout of three sequences for blocks of `shared` slots, the first axes of the views, and lengths.
fn places(rng: &mut Rng, which: usize, shared: usize) -> (Places, [usize; 2], Vec<i32>) {
    let slots = shared * rng.between(1, 4);
    let mut lengths = |most: usize| (0..ROWS).map(|_| rng.between(0, most) as i32).collect::<Vec<_>>();
    match which {
        0 => (Places::Contiguous, [ROWS, slots], lengths(slots)),
        1 => {
            let lengths = lengths(3 * slots);
            (Places::Ring(rng.below(slots)), [ROWS, slots], lengths)
        }
        2 => {
            let lengths = lengths(3 * slots);
            let pages = permutation(rng, 3 * ROWS + 2);
            (Places::Paged { pages: pages[..3 * ROWS].to_vec(), per_row: 3 }, [3 * ROWS + 2, slots], lengths)
        }
        _ => {
            let mut starts = vec![rng.below(shared + 1) as i32];
            (0..ROWS).for_each(|_| starts.push(starts[starts.len() - 1] + rng.between(0, slots) as i32));
            let lengths = starts.windows(2).map(|w| rng.between(0, (w[1] - w[0]) as usize) as i32).collect();
            let total = (starts[ROWS] as usize).next_multiple_of(shared).max(shared);
            (Places::Ragged(starts), [1, total], lengths)
        }
    }
}

/// The scales of what sequences hold are those of their tokens, other scales are NaN, and units without tokens have not been written.
fn described(rng: &mut Rng, kind: Kind, shape: [usize; 4], live: &BTreeSet<Slot>) -> Described {
    let x = Tensor::random(rng, DType::F32, shape, Strides::BSHD, Place::Heap);
    let place = rng.pick(&[Place::Heap, Place::GuardAfter, Place::GuardBefore]);
    let mut cache = Described::output(kind, shape, Strides::random(rng), place);
    if kind.is_fixed() {
        cache.quantise(&|at| x.get(at), &|_| true, true);
        cache = {
            let mut fresh = Described::output(kind, shape, Strides::random(rng), place);
            fresh.set_fixed(&cache);
            fresh
        };
        cache.repeat_places(rng);
    }
    cache.quantise(&|at| 1.5 * x.get(at) + 0.25, &|at| live.contains(&at), false);
    cache.poison(&|at| live.contains(&at));
    cache
}

impl Stack {
    fn random(rng: &mut Rng, which: usize) -> Self {
        let shared = rng.pick(&[2, 4, 6, 8, 24]);
        let (places, [rows, slots], lengths) = places(rng, which, shared);
        let heads = rng.between(1, 3);
        Self::new(rng, (places, [rows, slots], lengths), heads, shared)
    }

    fn new(
        rng: &mut Rng,
        (places, [rows, slots], lengths): (Places, [usize; 2], Vec<i32>),
        heads: usize,
        shared: usize,
    ) -> Self {
        let live = live(&places, slots, &lengths);
        let caches = [shared, rng.pick(&[2, shared])].map(|shared| {
            let dim = rng.pick(&[1, 4, 7, 16, 32, 40, 64, 100]);
            let kind = kind(rng, dim, shared);
            described(rng, kind, [rows, slots, heads, dim], &live)
        });
        Self { caches, places, lengths }
    }

    fn slots(&self) -> usize {
        self.caches[0].shape[1]
    }

    fn at(&self, row: usize, position: usize) -> Slot {
        self.places.place(self.slots(), row, position).into()
    }

    /// Where the tokens behind a gap move to, and from where.
    fn closing(&self, row: usize, gap: &Range<usize>) -> Vec<(Slot, Slot)> {
        let behind = if gap.is_empty() { 0..0 } else { gap.end..self.lengths[row] as usize };
        behind.map(|p| (self.at(row, p - gap.len()), self.at(row, p))).collect()
    }

    fn call<T>(&mut self, call: impl FnOnce(&mut KvCache) -> Result<T>) -> T {
        let [k, v] = &mut self.caches;
        let mut layers = [KvLayer::new(k.view_mut(), v.view_mut())];
        call(&mut KvCache::new(&mut layers, self.places.borrow(), &mut self.lengths)).expect("a valid call")
    }

    fn copied(&self) -> [Described; 2] {
        [self.caches[0].copied(), self.caches[1].copied()]
    }

    #[track_caller]
    fn assert_is(&self, wanted: &[Described; 2], lengths: &[i32], what: &str) {
        assert_eq!(self.lengths, lengths);
        for (cache, wanted) in self.caches.iter().zip(wanted) {
            for [b, s, h, _] in heads_of(cache.shape) {
                let (found, wanted) = (cache.head(b, s, h), wanted.head(b, s, h));
                assert_eq!(
                    found, wanted,
                    "{what}: [{b}, {s}, {h}] of {:?}, {:?}, {:?}",
                    cache.shape, cache.kind, self.places
                );
            }
            cache.assert_gaps();
        }
    }
}

/// The slots that hold tokens.
fn live(places: &Places, slots: usize, lengths: &[i32]) -> BTreeSet<Slot> {
    let held = |(row, &length): (usize, &i32)| {
        places.held(slots, length as usize).into_iter().map(move |p| places.place(slots, row, p).into())
    };
    lengths.iter().enumerate().flat_map(held).collect()
}

/// Tokens of the same cache, where they go and where they were.
fn own(places: &[(Slot, Slot)]) -> Vec<(Slot, Arrival)> {
    places.iter().map(|&(to, from)| (to, Arrival::Own(from))).collect()
}

/// What a cache is after tokens have arrived, in ascending order of their positions; `live` are the slots with tokens afterwards.
fn arrive(cache: &mut Described, arrivals: &[(Slot, Arrival)], live: &BTreeSet<Slot>) {
    let [.., heads, _] = cache.shape;
    if cache.kind.is_fixed() {
        for (to, arrival) in arrivals {
            let own;
            let (stored, elements) = match arrival {
                Arrival::Own(from) => {
                    own = cache.token(*from);
                    (Some(&own), &own.elements)
                }
                Arrival::Alike(stored, _) => (Some(stored), &stored.elements),
                Arrival::Elements(elements) => (None, elements),
            };
            let bits =
                |numbers: &[(f32, f32)]| -> Vec<_> { numbers.iter().map(|x| (x.0.to_bits(), x.1.to_bits())).collect() };
            let there = cache.token(*to).parameters;
            cache.quantise(&|[_, _, h, d]| elements[h][d], &|at| at == *to, false);
            for (h, there) in there.iter().enumerate() {
                if let Some(stored) = stored.filter(|stored| bits(&stored.parameters[h]) == bits(there)) {
                    cache.put_numbers(*to, h, &stored.numbers[h]);
                }
            }
        }
        return;
    }
    let shared = cache.sharing();
    let block = |[row, slot]: Slot| [row, slot / shared];
    let mut seen = BTreeSet::new();
    for (first, _) in arrivals {
        let [row, index] = block(*first);
        if !seen.insert([row, index]) {
            continue;
        }
        // Of each token: its slot, whether it arrives, what it is, and the block whose scales it has.
        let mut tokens = Vec::new();
        for to in (index * shared..(index + 1) * shared).map(|slot| [row, slot]) {
            let arrival = arrivals.iter().find(|arrival| arrival.0 == to).map(|arrival| &arrival.1);
            let token = match arrival {
                None if !live.contains(&to) => continue,
                None => (cache.token(to), Some((0, block(to)))),
                Some(Arrival::Own(from)) => (cache.token(*from), Some((0, block(*from)))),
                Some(Arrival::Alike(stored, origin)) => {
                    let Stored { elements, numbers, parameters } = stored;
                    let stored =
                        Stored { elements: elements.clone(), numbers: numbers.clone(), parameters: parameters.clone() };
                    (stored, Some((1, *origin)))
                }
                Some(Arrival::Elements(elements)) => {
                    (Stored { elements: elements.clone(), numbers: Vec::new(), parameters: Vec::new() }, None)
                }
            };
            tokens.push((to, arrival.is_some(), token));
        }
        let origin = tokens[0].2.1;
        if origin.is_some() && tokens.iter().all(|token| token.2.1 == origin) {
            for (to, _, (stored, _)) in &tokens {
                (0..heads).for_each(|h| cache.put_numbers(*to, h, &stored.numbers[h]));
            }
            cache.put_parameters([row, index * shared], &tokens[0].2.0);
        } else {
            let of = |slot: usize| tokens.iter().find(|token| token.0 == [row, slot]);
            let x = |[_, s, h, d]: [usize; 4]| of(s).expect("a token").2.0.elements[h][d];
            cache.quantise(&x, &|[b, s]| b == row && of(s).is_some(), false);
        }
    }
}

/// Elements of tokens that are turned back by `gap` positions.
fn turned_back(
    level: &Level,
    KeyRotation { pairing, frequencies, hadamard: block, .. }: KeyRotation,
    gap: usize,
    tokens: Vec<Vec<Vec<f32>>>,
) -> Vec<Vec<Vec<f32>>> {
    let (n, heads) = (tokens.len(), tokens.first().map_or(0, Vec::len));
    let dim = tokens.first().map_or(0, |token| token[0].len());
    if n == 0 {
        return tokens;
    }
    let mut read = Tensor::output(DType::F32, [1, n, heads, dim], Strides::BSHD, Place::Heap);
    read.fill(|[_, t, h, d]| tokens[t][h][d]);
    if let Some(block) = block {
        hadamard_in_place(&level.context, &Serial, read.view_mut(), block).unwrap();
    }
    let mut want = Tensor::output(DType::F32, read.shape, Strides::BSHD, Place::Heap);
    let (cos, mut sin) = frequencies.table(&level.context, gap + 1);
    sin.iter_mut().for_each(|x| *x = -*x);
    let positions = vec![gap as i32; n];
    let angles = RopeAngles::table(&cos, &sin);
    let turn = Rope::new(pairing, frequencies.inv_freq().len() * 2, angles, Positions::Explicit(&positions));
    rope(&level.context, &Serial, read.view(), want.view_mut(), &turn).unwrap();
    if let Some(block) = block {
        hadamard_in_place(&level.context, &Serial, want.view_mut(), block).unwrap();
    }
    elements_of(&want)
}

/// Elements by tokens and heads, of the first sequence.
fn elements_of(tensor: &Tensor) -> Vec<Vec<Vec<f32>>> {
    let [_, n, heads, dim] = tensor.shape;
    let head = |t: usize, h: usize| (0..dim).map(|d| tensor.get([0, t, h, d])).collect();
    (0..n).map(|t| (0..heads).map(|h| head(t, h)).collect()).collect()
}

/// A range of the tokens of a sequence, and lengths without it.
fn dropped(rng: &mut Rng, stack: &Stack) -> (usize, Range<usize>, Vec<i32>) {
    let row = rng.below(ROWS);
    let length = stack.lengths[row] as usize;
    let (a, b) = (rng.between(0, length), rng.between(0, length));
    // Whole blocks are a case of its own.
    let step = if rng.chance(0.3) { stack.caches[0].sharing() } else { 1 };
    let drop = a.min(b) / step * step..a.max(b) / step * step;
    let mut lengths = stack.lengths.clone();
    lengths[row] -= drop.len() as i32;
    (row, drop, lengths)
}

/// A layout whose tokens can be dropped.
fn droppable(rng: &mut Rng) -> usize {
    rng.pick(&[0, 2, 3])
}

fn evicted(level: &Level) {
    let rng = &mut Rng::new(701);
    for round in 0..scaled(300).max(20) {
        let which = droppable(rng);
        let mut stack = Stack::random(rng, which);
        if round % 100 == 7 {
            // So much that threads share it.
            stack = Stack::new(rng, (Places::Contiguous, [1, 600], vec![590]), 8, 24);
            stack.lengths = vec![590];
        }
        let (row, drop, lengths) =
            if stack.lengths.len() == 1 { (0, 100..101, vec![589]) } else { dropped(rng, &stack) };
        let mut wanted = stack.copied();
        let after = live(&stack.places, stack.slots(), &lengths);
        let places = stack.closing(row, &drop);
        for cache in &mut wanted {
            arrive(cache, &own(&places), &after);
        }
        let runner = runner(rng);
        if rng.chance(0.5) {
            stack.call(|cache| cache.evict(&level.context, runner, row, drop.clone(), &[]));
        } else {
            stack.call(|cache| cache.evict_running(&level.context, runner, row, drop.clone(), 9, &[None]));
        }
        stack.assert_is(&wanted, &lengths, &format!("{drop:?}"));
    }
}

/// Keys behind the gap are turned, with those that stay in their blocks.
fn turned(level: &Level) {
    let rng = &mut Rng::new(702);
    for _ in 0..scaled(200).max(15) {
        let which = droppable(rng);
        let mut stack = Stack::random(rng, which);
        let rotary_dim = stack.caches[0].shape[3] / 2 * 2;
        if rotary_dim == 0 {
            continue;
        }
        let frequencies = &RopeFrequencies::new(rotary_dim, 10_000.0, &RopeScaling::None).unwrap();
        let pairing = rng.pick(&[Pairing::Interleaved, Pairing::HalfSplit]);
        let (row, drop, lengths) = dropped(rng, &stack);
        let mut wanted = stack.copied();
        let after = live(&stack.places, stack.slots(), &lengths);
        let places = stack.closing(row, &drop);
        let before = places.iter().map(|&(_, from)| stack.caches[0].token(from).elements).collect();
        let mut rotation = KeyRotation::new(pairing, frequencies);
        rotation.hadamard = hadamard_block(stack.caches[0].shape[3]).filter(|_| rng.chance(0.4));
        let turned = turned_back(level, rotation, drop.len(), before);
        let keys = places.iter().zip(turned).map(|(&(to, _), x)| (to, Arrival::Elements(x))).collect::<Vec<_>>();
        arrive(&mut wanted[0], &keys, &after);
        arrive(&mut wanted[1], &own(&places), &after);
        let runner = runner(rng);
        stack.call(|cache| cache.evict(&level.context, runner, row, drop.clone(), &[Some(rotation)]));
        stack.assert_is(&wanted, &lengths, &format!("{drop:?}"));
    }
}

/// Keys before the gap are made anew, in blocks that they share with those behind it.
fn running_positions(level: &Level) {
    let rng = &mut Rng::new(703);
    for _ in 0..scaled(200).max(15) {
        let which = droppable(rng);
        let mut stack = Stack::random(rng, which);
        let [.., heads, dim] = stack.caches[0].shape;
        if dim == 1 {
            continue;
        }
        let frequencies = &RopeFrequencies::new(dim / 2 * 2, 10_000.0, &RopeScaling::None).unwrap();
        let pairing = rng.pick(&[Pairing::Interleaved, Pairing::HalfSplit]);
        let (row, drop, lengths) = dropped(rng, &stack);
        let (lost, kept, dtype) = (rng.below(1000), drop.start, rng.pick(&DType::ALL));
        let (strides, copies) = (Strides::random(rng), kept + rng.below(2));
        let keys = Tensor::random(rng, dtype, [1, copies, heads, dim], strides, Place::GuardAfter);
        let mut made = Tensor::output(DType::F32, keys.shape, Strides::BSHD, Place::Heap);
        let positions: Vec<i32> = (0..keys.shape[1]).map(|t| (t + lost + drop.len()) as i32).collect();
        let turn = Rope::new(pairing, dim / 2 * 2, frequencies, Positions::Explicit(&positions));
        rope(&level.context, &Serial, keys.view(), made.view_mut(), &turn).unwrap();
        let mut rotation = KeyRotation::new(pairing, frequencies);
        rotation.hadamard = hadamard_block(dim).filter(|_| rng.chance(0.4));
        if let Some(block) = rotation.hadamard {
            hadamard_in_place(&level.context, &Serial, made.view_mut(), block).unwrap();
        }
        let made = elements_of(&made);
        let mut wanted = stack.copied();
        let after = live(&stack.places, stack.slots(), &lengths);
        for (i, cache) in wanted.iter_mut().enumerate().filter(|_| !drop.is_empty()) {
            let mut arrivals = Vec::new();
            let first = if i == 0 { 0 } else { kept };
            for p in (first..lengths[row] as usize).collect::<Vec<_>>() {
                let arrival = match p < kept {
                    true => Arrival::Elements(made[p].clone()),
                    false => Arrival::Own(stack.at(row, p + drop.len())),
                };
                arrivals.push((stack.at(row, p), arrival));
            }
            arrive(cache, &arrivals, &after);
        }
        let runner = runner(rng);
        let unrotated = UnrotatedKeys::new(keys.view(), rotation);
        stack.call(|cache| cache.evict_running(&level.context, runner, row, drop.clone(), lost, &[Some(unrotated)]));
        stack.assert_is(&wanted, &lengths, &format!("{drop:?}"));
    }
}

fn copied_prefixes(level: &Level) {
    let rng = &mut Rng::new(704);
    for round in 0..scaled(300).max(20) {
        let mut stack = Stack::random(rng, round % 4);
        let from = rng.below(ROWS);
        let mut to = permutation(rng, ROWS);
        to.retain(|&row| row as usize != from);
        to.truncate(rng.between(0, 2));
        let length = stack.lengths[from] as usize;
        let mut room = length;
        for &row in &to {
            if let Places::Ragged(starts) = &stack.places {
                room = room.min((starts[row as usize + 1] - starts[row as usize]) as usize);
            }
        }
        let whole = matches!(stack.places, Places::Ring(_)) && length > stack.slots();
        let tokens = if whole { length } else { rng.between(0, room) };
        let mut wanted = stack.copied();
        let mut lengths = stack.lengths.clone();
        to.iter().for_each(|&row| lengths[row as usize] = 0);
        for &row in &to {
            lengths[row as usize] = tokens as i32;
            let after = live(&stack.places, stack.slots(), &lengths);
            for cache in &mut wanted {
                let arrivals: Vec<_> = (stack.places.held(stack.slots(), tokens).into_iter())
                    .map(|p| (stack.at(row as usize, p), Arrival::Own(stack.at(from, p))))
                    .collect();
                arrive(cache, &arrivals, &after);
            }
        }
        let runner = runner(rng);
        stack.call(|cache| cache.copy_prefix(&level.context, runner, from, &to, tokens));
        stack.assert_is(&wanted, &lengths, &format!("{tokens} of {from} to {to:?}"));
    }
}

/// The source of an insertion.
enum Origin {
    Described(Box<Described>),
    Store(Box<Store>),
}

/// From caches of any format and layout.
fn inserted(level: &Level) {
    let rng = &mut Rng::new(705);
    for round in 0..scaled(400).max(30) {
        let mut stack = Stack::random(rng, round % 4);
        let shared = rng.pick(&[2, 4, 8]);
        let (from_places, [rows, slots], from_lengths) = match rng.below(5) {
            4 => {
                let slots = 2 * shared;
                let rows = (0..ROWS * slots).map(|_| rng.below(ROWS) as i32).collect();
                (Places::Indirect(rows), [ROWS, slots], vec![rng.between(1, slots) as i32; ROWS])
            }
            which => places(rng, which, shared),
        };
        let from_live = live(&from_places, slots, &from_lengths);
        let (row, from_row) = (rng.below(ROWS), rng.below(ROWS));
        let mut length = from_lengths[from_row] as usize;
        let room = match &stack.places {
            Places::Ragged(starts) => (starts[row + 1] - starts[row]) as usize,
            Places::Ring(_) => usize::MAX,
            Places::Paged { per_row, .. } => per_row * stack.slots(),
            _ => stack.slots(),
        };
        let turns = matches!(from_places, Places::Ring(_)) && length > slots;
        length = length.min(room);
        if !turns && rng.chance(0.5) {
            length = rng.between(0, length);
        }
        let held = |length: usize| stack.places.held(stack.slots(), length);
        let lost: BTreeSet<_> = (0..from_lengths[from_row] as usize)
            .filter(|p| !from_places.held(slots, from_lengths[from_row] as usize).contains(p))
            .collect();
        if held(length).iter().any(|p| lost.contains(p)) {
            continue;
        }
        let mut sources = stack.caches.each_ref().map(|to| {
            let shape = [rows, slots, to.shape[2], to.shape[3]];
            match rng.below(4) {
                // The same description, and the same but for the granularity.
                0 | 1 => {
                    let kind = Kind { ..to.kind };
                    let granularity = match kind.granularity {
                        Granularity::ChannelAndSlots(_) => Granularity::ChannelAndSlots(shared),
                        Granularity::GroupAndSlots(group, _) => Granularity::GroupAndSlots(group, shared),
                        Granularity::Places(n) => Granularity::Places(if n == 0 { 0 } else { shared }),
                        Granularity::Group(group) if rng.chance(0.5) => Granularity::GroupAndSlots(group, shared),
                        other => other,
                    };
                    let mut cache = described(rng, Kind { granularity, ..kind }, shape, &from_live);
                    if kind.is_fixed() && to.is_alike(&cache) && rng.chance(0.5) {
                        cache.put_parameters([0, 0], &to.token([0, 0]));
                    }
                    Origin::Described(Box::new(cache))
                }
                2 => {
                    let kind = kind(rng, shape[3], shared);
                    Origin::Described(Box::new(described(rng, kind, shape, &from_live)))
                }
                _ => {
                    let format = rng.pick(&[
                        CacheFormat::F32,
                        CacheFormat::F16,
                        CacheFormat::Bf16,
                        CacheFormat::Int8,
                        CacheFormat::Fp8E4m3,
                    ]);
                    let mut x = Tensor::random(rng, DType::F32, shape, Strides::BSHD, Place::Heap);
                    for [b, s, h, d] in indices(shape).filter(|at| !from_live.contains(&[at[0], at[1]])) {
                        x.set([b, s, h, d], f32::NAN);
                    }
                    Origin::Store(Box::new(Store::of(&x, format)))
                }
            }
        });
        let mut lengths = stack.lengths.clone();
        lengths[row] = length as i32;
        let after = live(&stack.places, stack.slots(), &lengths);
        let mut wanted = stack.copied();
        for (cache, source) in wanted.iter_mut().zip(&sources) {
            let [.., heads, dim] = cache.shape;
            let arrivals: Vec<_> = (held(length).into_iter())
                .map(|p| {
                    let from: Slot = from_places.place(slots, from_row, p).into();
                    let arrival = match source {
                        Origin::Described(source) if source.is_alike(cache) => {
                            Arrival::Alike(source.token(from), [from[0], from[1] / source.sharing()])
                        }
                        Origin::Described(source) => Arrival::Elements(source.token(from).elements),
                        Origin::Store(store) => {
                            let head = |h| (0..dim).map(|d| store.get([from[0], from[1], h, d]) as f32).collect();
                            Arrival::Elements((0..heads).map(head).collect())
                        }
                    };
                    (stack.at(row, p), arrival)
                })
                .collect();
            arrive(cache, &arrivals, &after);
        }
        let runner = runner(rng);
        let what = format!("{length} of {from_row} of {from_places:?} to {row}");
        let mut views = sources.each_mut().map(|source| match source {
            Origin::Described(cache) => Some(cache.view_mut()),
            Origin::Store(store) => Some(store.view_mut()),
        });
        let [k, v] = views.each_mut().map(|view| view.take().expect("a view"));
        let (mut layers, mut from_lengths) = ([KvLayer::new(k, v)], from_lengths);
        let mut from = KvCache::new(&mut layers, from_places.borrow(), &mut from_lengths);
        stack.call(|cache| cache.insert_sequence(&level.context, runner, row, &mut from, from_row, length));
        stack.assert_is(&wanted, &lengths, &what);
    }
}

fn reordered(level: &Level) {
    let rng = &mut Rng::new(706);
    for round in 0..scaled(200).max(20) {
        let mut stack = Stack::random(rng, round % 2);
        let parents =
            if rng.chance(0.5) { permutation(rng, ROWS) } else { (0..ROWS).map(|_| rng.below(ROWS) as i32).collect() };
        let lengths: Vec<i32> = parents.iter().map(|&parent| stack.lengths[parent as usize]).collect();
        let after = live(&stack.places, stack.slots(), &lengths);
        let mut wanted = stack.copied();
        for (cache, before) in wanted.iter_mut().zip(&stack.caches) {
            let mut arrivals = Vec::new();
            for (row, &parent) in parents.iter().enumerate().filter(|&(row, &parent)| row as i32 != parent) {
                let parent = parent as usize;
                for s in 0..(lengths[row] as usize).min(stack.slots()) {
                    let origin = [parent, s / before.sharing()];
                    arrivals.push(([row, s], Arrival::Alike(before.token([parent, s]), origin)));
                }
            }
            arrive(cache, &arrivals, &after);
        }
        let runner = runner(rng);
        stack.call(|cache| cache.reorder(&level.context, runner, &mut Workspace::new(), &parents));
        stack.assert_is(&wanted, &lengths, &format!("{parents:?}"));
    }
}

fn moved_pages(level: &Level) {
    let rng = &mut Rng::new(707);
    for round in 0..scaled(30).max(6) {
        let mut stack = Stack::random(rng, 2);
        let [pages, slots, ..] = stack.caches[0].shape;
        let mut wanted = stack.copied();
        let runner = runner(rng);
        let mut moves: Vec<[i32; 2]> = Vec::new();
        let Places::Paged { pages: table, per_row } = &stack.places else { unreachable!() };
        let (mut table, per_row) = (table.clone(), *per_row);
        let mut map = vec![0; pages];
        if round % 2 == 0 {
            let order = permutation(rng, pages);
            moves.extend([[order[0], order[1]], [order[0], order[2]], [order[3], order[4]]]);
        } else {
            let used: BTreeSet<i32> = (stack.lengths.iter().enumerate())
                .flat_map(|(row, &n)| table[row * per_row..].iter().take((n as usize).div_ceil(slots)).copied())
                .collect();
            let mut free = (0..used.len() as i32).filter(|page| !used.contains(page));
            moves.extend(
                used.iter().filter(|&&page| page as usize >= used.len()).map(|&page| [page, free.next().unwrap()]),
            );
        }
        let every: BTreeSet<Slot> = indices([pages, slots, 1, 1]).map(|[b, s, ..]| [b, s]).collect();
        for (cache, before) in wanted.iter_mut().zip(&stack.caches) {
            for &[from, to] in &moves {
                let token = |s: usize| {
                    let origin = [from as usize, s / before.sharing()];
                    ([to as usize, s], Arrival::Alike(before.token([from as usize, s]), origin))
                };
                arrive(cache, &(0..slots).map(token).collect::<Vec<_>>(), &every);
            }
        }
        let (lengths, context) = (stack.lengths.clone(), &level.context);
        let [k, v] = &mut stack.caches;
        let mut layers = [KvLayer::new(k.view_mut(), v.view_mut())];
        if round % 2 == 0 {
            copy_pages(context, runner, &mut layers, &moves).expect("a valid call");
        } else {
            defragment_pages(context, runner, &mut layers, &mut table, per_row, &lengths, &mut map)
                .expect("a valid call");
        }
        stack.assert_is(&wanted, &lengths, &format!("{moves:?}"));
    }
}

/// A sequence that is emptied takes no scales from a ragged neighbour.
fn emptied() {
    let rng = &mut Rng::new(708);
    for round in 0..scaled(100).max(8) {
        let mut stack = Stack::random(rng, round % 4);
        let (row, mut lengths) = (rng.below(ROWS), stack.lengths.clone());
        lengths[row] = 0;
        let others = live(&stack.places, stack.slots(), &lengths);
        let before = stack.copied();
        stack.call(|cache| cache.reset(&Serial, &[row as i32], true));
        assert_eq!(stack.lengths, lengths);
        for (cache, before) in stack.caches.iter().zip(&before) {
            for [b, s, h, _] in heads_of(cache.shape).filter(|&[b, s, ..]| others.contains(&[b, s])) {
                assert_eq!(cache.head(b, s, h), before.head(b, s, h), "{:?}", cache.kind);
            }
            if matches!(stack.places, Places::Contiguous | Places::Ring(_)) && !cache.kind.is_fixed() {
                for [_, s, h, _] in heads_of([1, cache.shape[1], cache.shape[2], 1]) {
                    assert!(
                        cache.head(row, s, h).iter().all(|&bits| bits == 0),
                        "{:?}, {:?}",
                        cache.kind,
                        stack.places
                    );
                }
            }
            cache.assert_gaps();
        }
    }
}

/// Whole blocks, their last in part, and tokens that close up in one keep the bits of all they stand for.
fn kept_bits() {
    let (rng, context) = (&mut Rng::new(709), Context::new().unwrap());
    for granularity in [Granularity::ChannelAndSlots(8), Granularity::GroupAndSlots(0, 8)] {
        let kind = Kind { granularity, ..Kind::random(rng, CacheFormat::Affine4, 32, 0) };
        let shape = [2, 32, 2, 32];
        let all: BTreeSet<Slot> = indices([2, 30, 1, 1]).map(|[b, s, ..]| [b, s]).collect();
        let mut cache = described(rng, kind, shape, &all);
        let values = |cache: &Described, row: usize, s: usize| cache.token([row, s]).elements;
        let before: Vec<_> = (0..30).map(|s| values(&cache, 0, s)).collect();
        let mut lengths = [30, 30];
        let mut layers = [KvLayer::keys(cache.view_mut())];
        let mut call = KvCache::new(&mut layers, Layout::Contiguous, &mut lengths);
        call.copy_prefix(&context, &Serial, 0, &[1], 29).unwrap();
        call.evict(&context, &Serial, 0, 8..16, &[]).unwrap();
        call.truncate(&[22, 7], None).unwrap();
        call.evict(&context, &Serial, 1, 1..3, &[]).unwrap();
        for s in 0..22 {
            assert_eq!(values(&cache, 0, s), before[if s < 8 { s } else { s + 8 }], "{s}");
        }
        for s in 0..5 {
            assert_eq!(values(&cache, 1, s), before[if s < 1 { s } else { s + 2 }], "{s}");
        }
    }
}

/// Heads that do not fit are refused before a byte is written.
fn large_heads() {
    let context = Context::new().unwrap();
    let (mut units, mut scales) = (vec![7u8; 4 * 1026], vec![1f32; 2 * 1026]);
    let of = Affine::new(Integers::Signed);
    for (shape, written) in [([1, 2, 1, 1026], true), ([2, 1, 1, 1026], true), ([2, 1, 1, 1026], false)] {
        let written = if written {
            AffineScales::written(ViewMut::new(&mut scales, shape).unwrap())
        } else {
            AffineScales::fixed(View::new(&scales, shape).unwrap())
        };
        let cache = if shape[0] == 1 { [1, 4, 1, 1026] } else { [2, 2, 1, 1026] };
        let k = CacheViewMut::affine(&mut units, CacheFormat::Affine8, cache, of, written).unwrap();
        let (mut layers, mut lengths) = ([KvLayer::keys(k)], vec![2; cache[0]]);
        let mut call = KvCache::new(&mut layers, Layout::Contiguous, &mut lengths);
        let done = call.evict(&context, &Serial, 0, 0..1, &[]);
        match done {
            Ok(()) => assert!(shape[0] == 2),
            Err(error) => {
                assert!(
                    error.status() == Status::Shape && error.message().contains("layer 0: k has dim = 1026"),
                    "{error}"
                );
                assert!(error.message().contains("1024") && error.message().contains("2 tokens"), "{error}");
            }
        }
    }
}
