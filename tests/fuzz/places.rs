//! The slots of tokens in a cache: valid layouts, and the arguments that a call makes of them.

use crate::abi::*;
use crate::call::{Call, product};
use std::collections::HashMap;

pub const CONTIGUOUS: i32 = 0;
pub const RING: i32 = 1;
pub const PAGED: i32 = 2;
pub const INDIRECT: i32 = 3;
pub const RAGGED: i32 = 4;

/// A set of slots, each by the first two indices of a view. A hostile call may state millions of them, so that a set has 64 to an
/// entry.
#[derive(Default)]
pub struct Slots(HashMap<(i64, i64), u64>);

impl Slots {
    pub fn contains(&self, &(row, slot): &(i64, i64)) -> bool {
        self.0.get(&(row, slot >> 6)).is_some_and(|bits| bits >> (slot & 63) & 1 == 1)
    }

    fn set(&mut self, entry: Option<((i64, i64), u64)>) {
        if let Some((at, bits)) = entry {
            *self.0.entry(at).or_default() |= bits;
        }
    }
}

impl Extend<(i64, i64)> for Slots {
    fn extend<I: IntoIterator<Item = (i64, i64)>>(&mut self, slots: I) {
        // Neighbours share an entry, which is looked up once.
        let mut entry = None;
        for (row, slot) in slots {
            let (at, bit) = ((row, slot >> 6), 1 << (slot & 63));
            entry = match entry {
                Some((same, bits)) if same == at => Some((at, bits | bit)),
                other => {
                    self.set(other);
                    Some((at, bit))
                }
            };
        }
        self.set(entry);
    }
}

impl FromIterator<(i64, i64)> for Slots {
    fn from_iter<I: IntoIterator<Item = (i64, i64)>>(slots: I) -> Self {
        let mut set = Self::default();
        set.extend(slots);
        set
    }
}

/// A valid layout.
pub struct Places {
    pub kind: i32,
    pub rows: i64,
    pub sinks: i64,
    pub pages_per_row: i64,
    pub table: Vec<i32>,
    /// The first two axes of the views.
    pub axes: [i64; 2],
}

/// The kind of access to tokens, which decides what may be shared.
#[derive(Clone, Copy, PartialEq)]
pub enum Use {
    Read,
    Write,
}

impl Places {
    /// Sequences with space for at least `room` tokens each; `step` is 2 for values in pairs of slots.
    pub fn new(c: &mut Call, kind: i32, rows: i64, room: i64, step: i64, what: Use) -> Self {
        let up = |n: i64| (n + step - 1) / step * step;
        let mut places = Self { kind, rows, sinks: 0, pages_per_row: 0, table: Vec::new(), axes: [rows, up(room)] };
        let n = rows as usize;
        match kind {
            RING => {
                places.sinks = up(c.rng.below(4) as i64);
                places.axes[1] = places.sinks + up(room.max(1));
            }
            PAGED => {
                let size = up(c.rng.between(1, 9) as i64);
                places.pages_per_row = (room + size - 1) / size + c.rng.below(2) as i64;
                let entries = n * places.pages_per_row as usize;
                let pages = match what {
                    Use::Read => c.rng.between(1, entries + 2),
                    Use::Write => entries + c.rng.below(3),
                };
                places.table = match what {
                    Use::Read => (0..entries).map(|_| c.rng.below(pages) as i32).collect(),
                    Use::Write => c.permutation(pages)[..entries].to_vec(),
                };
                places.axes = [pages as i64, size];
            }
            INDIRECT => {
                let slots = places.axes[1] as usize;
                let row = |c: &mut Call, i: usize| if what == Use::Read { c.rng.below(n) } else { i / slots };
                places.table = (0..n * slots).map(|i| row(c, i) as i32).collect();
            }
            RAGGED => {
                let mut at = up(c.rng.below(3) as i64);
                places.table.push(at as i32);
                for _ in 0..n {
                    at += up(room + c.rng.below(4) as i64);
                    places.table.push(at as i32);
                }
                places.axes = [1, at + up(c.rng.below(3) as i64)];
            }
            _ => (),
        }
        places
    }

    /// The number of tokens that a sequence can hold; in a ring it is unlimited.
    pub fn room(&self, row: usize) -> i64 {
        match self.kind {
            RING => 3 * self.axes[1],
            PAGED => self.pages_per_row * self.axes[1],
            // A hostile call may count more rows than there are; those have none.
            RAGGED => self.table.get(row..row + 2).map_or(0, |ends| (ends[1] - ends[0]).into()),
            _ => self.axes[1],
        }
    }

    /// Makes the arguments of the call, valid or not. `slots` is the number of slots in the call's views.
    pub fn give(&self, c: &mut Call, slots: i64) -> Given {
        let mut given = Given {
            at: std::ptr::null(),
            kind: CONTIGUOUS,
            sinks: 0,
            rows: 0,
            pages_per_row: 0,
            table: Vec::new(),
            slots,
        };
        if self.kind == CONTIGUOUS && c.maybe(0.7) {
            return given;
        }
        given.kind = c.code(self.kind);
        given.sinks = c.code(self.sinks as i32);
        given.rows = c.number(self.rows);
        given.pages_per_row = c.number(self.pages_per_row);
        let entries = match given.kind {
            PAGED => product(&[given.rows, given.pages_per_row]),
            INDIRECT => product(&[given.rows, slots]),
            RAGGED => product(&[given.rows]).and_then(|n| n.checked_add(1)),
            _ => None,
        };
        let [rows, seq] = self.axes.map(|n| n as i32);
        let wrong = [-1, i32::MIN, i32::MAX, rows, rows - 1, 0, seq, seq + 1];
        let table = c.list(entries, &wrong, |_, i| self.table.get(i).copied().unwrap_or(0));
        let at = if entries.is_none() && c.hit() { c.arena.copy(&[0i32], 0) } else { table.at };
        given.table = table.values;
        let layout = kvl_layout {
            kind: given.kind,
            sink_tokens: given.sinks,
            num_sequences: given.rows,
            pages_per_sequence: given.pages_per_row,
            table: at,
            ..zeroed()
        };
        given.at = c.sized(&layout, &[]);
        if given.at.is_null() {
            // Any value is valid.
            given =
                Given { at: given.at, kind: CONTIGUOUS, sinks: 0, rows: 0, pages_per_row: 0, table: Vec::new(), slots };
        }
        given
    }
}

/// The arguments of the call.
pub struct Given {
    pub at: *const kvl_layout,
    kind: i32,
    sinks: i32,
    pub rows: i64,
    pages_per_row: i64,
    pub table: Vec<i32>,
    slots: i64,
}

impl Given {
    /// The number of sequences of a cache whose views have `first` rows, as in the header.
    pub fn row_count(&self, first: i64) -> i64 {
        match self.kind {
            PAGED | RAGGED => self.rows,
            INDIRECT if self.slots > 0 => self.rows,
            _ => first,
        }
    }

    /// The tokens of a sequence without a list of lengths.
    pub fn capacity(&self, row: usize) -> i64 {
        match (self.kind, self.table.get(row..row + 2)) {
            (RAGGED, Some(ends)) => i64::from(ends[1]) - i64::from(ends[0]),
            (RAGGED, None) => 0,
            _ => self.slots,
        }
    }

    /// The first two indices of a token; `None` for an invalid layout.
    pub fn place(&self, row: i64, position: i64) -> Option<(i64, i64)> {
        let entry = |i: i64| usize::try_from(i).ok().and_then(|i| self.table.get(i)).map(|&x| i64::from(x));
        match self.kind {
            RING => {
                let sinks = i64::from(self.sinks);
                let turning = self.slots.checked_sub(sinks).filter(|&n| n > 0)?;
                Some((row, if position < sinks { position } else { sinks + (position - sinks) % turning }))
            }
            PAGED if self.slots > 0 => {
                let at = row.checked_mul(self.pages_per_row)?.checked_add(position / self.slots)?;
                Some((entry(at)?, position % self.slots))
            }
            PAGED => None,
            INDIRECT => Some((entry(row.checked_mul(self.slots)?.checked_add(position)?)?, position)),
            RAGGED => Some((0, entry(row)? + position)),
            _ => Some((row, position)),
        }
    }

    /// The slots of the tokens `positions` of a sequence, without those that a ring of `length` tokens has
    /// overwritten.
    pub fn places(
        &self,
        row: i64,
        positions: std::ops::Range<i64>,
        length: i64,
    ) -> impl Iterator<Item = (i64, i64)> + use<'_> {
        let sinks = i64::from(self.sinks);
        let kept = if self.kind == RING { length.saturating_sub(self.slots.saturating_sub(sinks)) } else { 0 };
        // No sequence has more, and a call that states more is refused.
        let end = positions.end.min(1 << 14);
        (positions.start.max(0)..end)
            .filter(move |&p| self.kind != RING || p < sinks || p >= kept)
            .filter_map(move |p| self.place(row, p))
    }

    pub fn kind(&self) -> i32 {
        self.kind
    }
}
