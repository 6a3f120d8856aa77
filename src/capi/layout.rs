//! In which slots of a cache tokens lie.

use super::arguments::{enumeration, required_list, size};
use super::sized::{assert_layout, read_sized, sized};
use crate::error::{Result, ensure, fail};
use crate::layout::{Layout, Packing};

/// In which slots of a cache the tokens of a sequence lie.
pub type kvl_layout_kind = i32;
/// Caches are [sequences, capacity, kv_heads, dim]. Position p of sequence b lies in row b, slot p.
pub const KVL_LAYOUT_KIND_CONTIGUOUS: i32 = 0;
/// As `KVL_LAYOUT_KIND_CONTIGUOUS`, but a sequence keeps its first `sink_tokens` tokens and its newest ones only:
/// position p lies in slot p while p < sink_tokens, and from there on in slot `sink_tokens + (p - sink_tokens) %
/// (capacity - sink_tokens)`. Lengths count every token that a sequence was given. A call of n queries with a left
/// window of w needs w + n slots besides those of the sink tokens.
pub const KVL_LAYOUT_KIND_RING: i32 = 1;
/// Caches are pools [pages, page_size, kv_heads, dim]. Position p of sequence b lies in page `table[b *
/// pages_per_sequence + p / page_size]`, slot p % page_size. Sequences may share pages that none of them writes. NHD
/// and HND differ in their strides only.
pub const KVL_LAYOUT_KIND_PAGED: i32 = 2;
/// Beam search without copies: caches are [sequences, capacity, kv_heads, dim]. Position p of sequence b lies in row
/// `table[b * capacity + p]`, slot p.
pub const KVL_LAYOUT_KIND_INDIRECT: i32 = 3;
/// Sequences of different lengths lie one after another: caches are [1, tokens, kv_heads, dim]. Position p of sequence
/// b lies in slot `table[b] + p`, and sequence b ends at `table[b + 1]`.
pub const KVL_LAYOUT_KIND_RAGGED: i32 = 4;

/// In which slots of a cache the tokens of its sequences lie. Start from `KVL_LAYOUT_INIT`, which is contiguous.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_layout {
    /// `sizeof(kvl_layout)`.
    pub struct_size: usize,
    /// The kind of layout.
    pub kind: kvl_layout_kind,
    /// `KVL_LAYOUT_KIND_RING`: how many of the first tokens of a sequence are never overwritten, less than the
    /// capacity. Else 0.
    pub sink_tokens: i32,
    /// The number of sequences in the table. Without a table it is not read.
    pub num_sequences: i64,
    /// `KVL_LAYOUT_KIND_PAGED`: entries of the table per sequence. Else 0.
    pub pages_per_sequence: i64,
    /// `KVL_LAYOUT_KIND_PAGED`: the page table [num_sequences, pages_per_sequence], whose entries beyond the length of
    /// a sequence are not read. `KVL_LAYOUT_KIND_INDIRECT`: the beam table [num_sequences, capacity].
    /// `KVL_LAYOUT_KIND_RAGGED`: cumulative lengths (`cu_seqlens`) [num_sequences + 1], ascending. Else null.
    pub table: *const i32,
}

sized!(kvl_layout);
assert_layout!(
    kvl_layout, 40,
    struct_size: 0, kind: 8, sink_tokens: 12, num_sequences: 16, pages_per_sequence: 24, table: 32,
);

/// How the values of neighbouring slots lie in a cache.
pub type kvl_packing = i32;
/// Every slot by itself: [batch, slots, kv_heads, v_dim].
pub const KVL_PACKING_ROWS: i32 = 0;
/// Two slots interleaved, as instructions that multiply tiles of 16-bit numbers read them: [batch, slots / 2, kv_heads,
/// 2 * v_dim], in which element 2d + i of pair s is element d of slot 2s + i. The slots of a sequence (or of a page),
/// the sink tokens of a ring and the first slots of ragged sequences are even. Only for plain elements: values in `KVL_FORMAT_INT8` are
/// never packed, and `kvl_context_v_packing` says so; a call that asks for it is `KVL_STATUS_UNSUPPORTED`.
pub const KVL_PACKING_ROW_PAIRS: i32 = 1;

/// The layout at `from`, of caches with so many slots; contiguous if it is null.
///
/// # Safety
/// `from` is null or points to what the header describes, whose table nobody writes while the layout is in use.
pub(super) unsafe fn read_layout<'a>(from: *const kvl_layout, slots: usize) -> Result<Layout<'a>> {
    if from.is_null() {
        return Ok(Layout::Contiguous);
    }
    // SAFETY: the caller's, here and below.
    let layout = unsafe { read_sized(from) }?;
    let table = |entries: Option<usize>| {
        let entries = entries.unwrap_or(usize::MAX);
        // SAFETY: as above.
        unsafe { required_list("the layout's table", layout.table, entries) }
    };
    let sequences = || size("the layout's num_sequences", layout.num_sequences);
    let kind = layout.kind;
    ensure!(
        kind == KVL_LAYOUT_KIND_RING || layout.sink_tokens == 0,
        InvalidValue,
        "sink_tokens is {}, but the layout is no ring",
        layout.sink_tokens
    );
    ensure!(
        kind == KVL_LAYOUT_KIND_PAGED || layout.pages_per_sequence == 0,
        InvalidValue,
        "pages_per_sequence is {}, but the layout is not paged",
        layout.pages_per_sequence
    );
    ensure!(
        !(kind == KVL_LAYOUT_KIND_CONTIGUOUS || kind == KVL_LAYOUT_KIND_RING) || layout.table.is_null(),
        InvalidValue,
        "the layout has a table, but kind {kind} takes none"
    );
    Ok(match kind {
        KVL_LAYOUT_KIND_CONTIGUOUS => Layout::Contiguous,
        KVL_LAYOUT_KIND_RING => Layout::Ring { sink_tokens: size("sink_tokens", layout.sink_tokens.into())? },
        KVL_LAYOUT_KIND_PAGED => {
            let pages_per_sequence = size("pages_per_sequence", layout.pages_per_sequence)?;
            Layout::Paged { page_table: table(sequences()?.checked_mul(pages_per_sequence))?, pages_per_sequence }
        }
        KVL_LAYOUT_KIND_INDIRECT => Layout::Indirect { beam_table: table(sequences()?.checked_mul(slots))? },
        KVL_LAYOUT_KIND_RAGGED => Layout::Ragged { cu_seqlens: table(sequences()?.checked_add(1))? },
        _ => fail!(InvalidEnum, "the layout's kind is {kind}, which is no kvl_layout_kind"),
    })
}

/// The number of sequences that the layout at `from` says a paged cache has.
///
/// # Safety
/// `from` points to what the header describes.
pub(super) unsafe fn read_sequences(from: *const kvl_layout) -> Result<usize> {
    // SAFETY: the caller's.
    size("the layout's num_sequences", unsafe { read_sized(from) }?.num_sequences)
}

pub(super) fn parse_packing(name: &str, value: kvl_packing) -> Result<Packing> {
    enumeration("kvl_packing", name, value, Packing::from_u32)
}

// The values are pinned twice, here and in the enumerations; they cannot drift apart.
const _: () = {
    assert!(KVL_PACKING_ROWS == Packing::Rows as i32 && KVL_PACKING_ROW_PAIRS == Packing::RowPairs as i32);
    assert!(Packing::ALL.len() == 2);
};
