//! Exports that operate on whole caches.

use super::arguments::{apart, boolean, output_list, required_list, reserved, size};
use super::attention::{KVL_ATTENTION_FLAG_WINDOW_LEFT, check_flags, kvl_attention_flag};
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::hadamard::parse_block;
use super::layout::{kvl_layout, read_layout, read_sequences};
use super::plan::window;
use super::rope::{kvl_rope_params, parse_pairing};
use super::runner::{CallerRunner, kvl_parallel_runner};
use super::scales::{kvl_cache_scales, read_scales, with_scales};
use super::sized::{assert_layout, read_sized, sized};
use super::status::kvl_status;
use super::views::{kvl_const_view, kvl_view};
use crate::error::{Error, Result, ensure};
use crate::layout::Layout;
use crate::ops::cache::{
    Layers, RawCache, RawLayer, RawRotation, RawUnrotated, copy_pages_raw, copy_prefix_raw, defragment_pages_raw,
    evict_raw, evict_running_raw, insert_sequence_raw, reorder_raw, reorder_table_raw, reorder_table_workspace_size,
    reorder_workspace_size_raw, reset_raw, set_table_tokens,
};
use crate::ops::rope::check_rotary_dim;
use crate::view::{BATCH, RawView, SEQ};
use std::ffi::c_void;

/// The cache of one layer.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_kv_layer {
    /// Keys [sequences, slots, kv_heads, dim]; the layout gives the first two axes their meaning.
    pub k: kvl_view,
    /// Values [sequences, slots, kv_heads, v_dim]; absent where keys and values share memory.
    pub v: kvl_view,
    /// The scales of both, for formats that have scales; null for none.
    pub scales: *const kvl_cache_scales,
}

assert_layout!(kvl_kv_layer, 184, k: 0, v: 88, scales: 176);

/// The caches of all layers of a model, or of those with one layout: they have one list of lengths. Start from
/// `KVL_CACHE_INIT`. Layers agree in the first two axes of their views. Heads, dims and types may differ, and no two
/// views share memory.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_cache {
    /// `sizeof(kvl_cache)`.
    pub struct_size: usize,
    /// [num_layers].
    pub layers: *const kvl_kv_layer,
    /// The number of layers, at least 1.
    pub num_layers: usize,
    /// In which slots the tokens of a sequence lie, in every layer; null for contiguous.
    pub layout: *const kvl_layout,
    /// [num_sequences of the layout]: the number of tokens that each sequence was given. Calls that change lengths
    /// write these last.
    pub lengths: *mut i32,
}

sized!(kvl_cache);
assert_layout!(kvl_cache, 40, struct_size: 0, layers: 8, num_layers: 16, layout: 24, lengths: 32);

/// Sets the length of sequence `sequences[i]` to `values[i]`, whatever lies in its slots.
///
/// Thread safety: may be called from any number of threads at once, on disjoint caches.
/// Bad input: null, an unknown `struct_size`, views that do not fit each other, a sequence that does not exist or comes
/// twice, a value that is negative or above the sequence's capacity, and a table entry that leads outside the cache are
/// errors, and no length changes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_set_lengths(
    cache: *const kvl_cache,
    sequences: *const i32,
    values: *const i32,
    num_sequences: usize,
) -> kvl_status {
    guard(|| {
        let call = |cache: &mut RawCache| {
            // SAFETY: the caller's promise.
            let (sequences, values) = unsafe {
                (input(cache, "sequences", sequences, num_sequences)?, input(cache, "values", values, num_sequences)?)
            };
            cache.set_lengths(sequences, values)
        };
        // SAFETY: the caller's promise.
        unsafe { with_cache(cache, call) }
    })
}

/// Adds `counts[b]` to the length of every sequence b, after as many tokens have been written to it.
///
/// Thread safety: may be called from any number of threads at once, on disjoint caches.
/// Bad input: null, an unknown `struct_size`, views that do not fit each other, a negative count, a length above the
/// sequence's capacity (`KVL_STATUS_CAPACITY`), and a table entry that leads outside the cache are errors, and no
/// length changes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_advance(cache: *const kvl_cache, counts: *const i32) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            with_cache(cache, |cache| {
                let n = cache.lengths.len();
                cache.advance(input(cache, "counts", counts, n)?)
            })
        }
    })
}

/// Removes the last tokens of sequences: sequence b then has `lengths[b]` tokens. No byte of the cache changes.
///
/// `flags` and `window_left` are those of all attention over this cache; only a left window counts. They matter to a
/// ring: the tokens that are removed have overwritten older ones, so a ring that has gone round can be truncated only
/// if no query will look at those. A ring whose capacity exceeds `sink_tokens + window_left` by n tokens can give back
/// n. The cache knows its present lengths only: truncations without new tokens between them count together, and the
/// caller has to add them up. In an indirect cache, a slot that holds a token of another sequence is not given up.
///
/// Thread safety: may be called from any number of threads at once, on disjoint caches.
/// Bad input: null, an unknown `struct_size` or flag, views that do not fit each other, a length that is negative or
/// above the present one, a window that is negative or without its flag, and tokens that have been or would be
/// overwritten are errors, and no length changes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_truncate(
    cache: *const kvl_cache,
    lengths: *const i32,
    flags: kvl_attention_flag,
    window_left: i64,
) -> kvl_status {
    guard(|| {
        check_flags(flags)?;
        let window = window("window_left", window_left, flags & KVL_ATTENTION_FLAG_WINDOW_LEFT != 0)?;
        let window = window.map(|keys| size("window_left", keys)).transpose()?;
        // SAFETY: the caller's promise, here and below.
        unsafe {
            with_cache(cache, |cache| {
                let n = cache.lengths.len();
                let lengths = input(cache, "the new lengths", lengths, n)?;
                cache.truncate(lengths, window)
            })
        }
    })
}

/// Empties sequences: their lengths become 0. With a `zero` of 1, their slots are filled with zeros too: all of them,
/// or in a paged cache the pages in use.
///
/// Thread safety: may be called from any number of threads at once, on disjoint caches. A null `runner` runs on the
/// calling thread.
/// Bad input: null, an unknown `struct_size`, views that do not fit each other, a sequence that does not exist or comes
/// twice, a `zero` that is neither 0 nor 1, and zeros for a page that another sequence uses or for an indirect cache
/// are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_reset(
    runner: *const kvl_parallel_runner,
    cache: *const kvl_cache,
    sequences: *const i32,
    num_sequences: usize,
    zero: i32,
) -> kvl_status {
    guard(|| {
        let zero = boolean("zero", zero)?;
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let runner = CallerRunner::new(runner)?;
            with_cache(cache, |cache| {
                let sequences = input(cache, "sequences", sequences, num_sequences)?;
                reset_raw(runner.as_dyn(), cache, sequences, zero)
            })
        }
    })
}

/// Copies the first `length` tokens of sequence `from_sequence` of the cache `from`, which is only read, into
/// `sequence` of the cache `to`, which then has that length: a prompt that was prefilled alone takes its place in a
/// batch. Both caches have the same number of layers, with the same heads and dims. Types (converted to nearest, ties
/// to even) and layouts may differ. A ring takes the tokens that it would hold after `length`. Where tokens share scales
/// that they did not share before, they are quantised again.
///
/// Thread safety: may be called from any number of threads at once, on disjoint caches. A null `runner` runs on the
/// calling thread.
/// Bad input: null, an unknown `struct_size`, caches that differ in more than types and layouts or share memory, a
/// sequence that does not exist, a length above that of the source or above the capacity, tokens that a ring has
/// overwritten, a page that another sequence uses, heads above 1024 elements for a cache in which several tokens share
/// scales, and an indirect target are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_insert_sequence(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    to: *const kvl_cache,
    sequence: i64,
    from: *const kvl_cache,
    from_sequence: i64,
    length: i64,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let (context, runner) = (borrow(context)?, CallerRunner::new(runner)?);
            let length = size("length", length)?;
            with_cache(to, |to| {
                let lengths = to.lengths.as_ptr_range();
                with_cache(from, |from| {
                    let other = from.lengths.as_ptr_range();
                    ensure!(
                        other.end <= lengths.start || lengths.end <= other.start,
                        Overlap,
                        "both caches have the same list of lengths"
                    );
                    insert_sequence_raw(context, runner.as_dyn(), to, sequence, from, from_sequence, length)
                })
            })
        }
    })
}

/// Copies the first `tokens` tokens of sequence `from` into the sequences `to`, [num_to], which then have that length:
/// one prompt, many continuations. With pages, sequences can share full pages instead, by their table.
///
/// Thread safety: may be called from any number of threads at once, on disjoint caches. A null `runner` runs on the
/// calling thread.
/// Bad input: null, an unknown `struct_size`, views that do not fit each other, a sequence that does not exist, comes
/// twice or is the source, more tokens than the source has or a sequence holds, tokens that a ring has overwritten, a
/// page that another sequence uses, heads above 1024 elements with scales that several tokens share, and an indirect
/// cache are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_copy_prefix(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    cache: *const kvl_cache,
    from: i64,
    to: *const i32,
    num_to: usize,
    tokens: i64,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let (context, runner) = (borrow(context)?, CallerRunner::new(runner)?);
            let tokens = size("tokens", tokens)?;
            with_cache(cache, |cache| {
                let to = input(cache, "to", to, num_to)?;
                copy_prefix_raw(context, runner.as_dyn(), cache, from, to, tokens)
            })
        }
    })
}

/// The bytes of workspace that `kvl_cache_reorder` needs for a cache and the threads of `runner`.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null and an unknown `struct_size` or enumeration value are errors, and `*bytes` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_reorder_workspace_size(
    cache: *const kvl_cache,
    runner: *const kvl_parallel_runner,
    bytes: *mut usize,
) -> kvl_status {
    guard(|| {
        ensure!(!bytes.is_null(), NullPointer, "the pointer bytes is null");
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let runner = CallerRunner::new(runner)?;
            with_cache(cache, |cache| {
                let threads = runner.as_dyn().num_threads();
                bytes.write(reorder_workspace_size_raw(cache.layers, cache.lengths.len(), threads)?);
                Ok(())
            })
        }
    })
}

/// Every sequence b becomes a copy of what sequence `parents[b]` was, with its tokens and its length (beam search).
/// Only valid tokens move, and only those of sequences that are not their own parents. `workspace` has
/// `workspace_bytes` bytes, at least as many as `kvl_cache_reorder_workspace_size` gives, and is aligned to 64 bytes.
///
/// Pages are reordered by their table, with `kvl_cache_copy_pages` for last pages of their own. For indirect caches
/// there is `kvl_cache_reorder_table`.
///
/// Thread safety: may be called from any number of threads at once, on disjoint caches and workspaces. A null `runner`
/// runs on the calling thread.
/// Bad input: null, an unknown `struct_size`, views that do not fit each other, a parent that does not exist, a layout
/// that is neither contiguous nor a ring, and a workspace that is too small or misaligned are errors, and nothing is
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_reorder(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    workspace: *mut c_void,
    workspace_bytes: usize,
    cache: *const kvl_cache,
    parents: *const i32,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let (context, runner) = (borrow(context)?, CallerRunner::new(runner)?);
            with_cache(cache, |cache| {
                let parents = input(cache, "parents", parents, cache.lengths.len())?;
                reorder_raw(context, runner.as_dyn(), (workspace.cast(), workspace_bytes), cache, parents)
            })
        }
    })
}

/// The bytes of workspace that `kvl_cache_reorder_table` needs for a beam table [num_sequences, capacity].
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null and a negative number are errors, and `*bytes` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_reorder_table_workspace_size(
    num_sequences: i64,
    capacity: i64,
    bytes: *mut usize,
) -> kvl_status {
    guard(|| {
        ensure!(!bytes.is_null(), NullPointer, "the pointer bytes is null");
        let needed = reorder_table_workspace_size(size("num_sequences", num_sequences)?, size("capacity", capacity)?);
        // SAFETY: not null, and the caller's to write.
        unsafe { bytes.write(needed) };
        Ok(())
    })
}

/// Row b of the beam table of an indirect cache, [num_sequences, capacity], becomes a copy of what row `parents[b]`
/// was, and so does `lengths[b]`. No token moves.
///
/// A step of beam search is: `kvl_kv_write` as into a contiguous cache, to sequence b at position `lengths[b]`;
/// `kvl_cache_set_table_tokens`, after which lengths grow by one; `kvl_attention` with `KVL_LAYOUT_KIND_INDIRECT`; the
/// choice of parents; this call. As long as sequences that have tokens of each other are equally long, no slot is
/// written that another sequence needs; otherwise the call is refused.
///
/// Thread safety: may be called from any number of threads at once, on disjoint tables and workspaces.
/// Bad input: null, a negative size, a parent that does not exist, a length that is negative or above the capacity, a
/// sequence that would overwrite slots in which another one has tokens (`KVL_STATUS_OVERLAP`), lists that share memory,
/// and a workspace that is too small or misaligned are errors, and nothing changes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_reorder_table(
    workspace: *mut c_void,
    workspace_bytes: usize,
    table: *mut i32,
    num_sequences: i64,
    capacity: i64,
    lengths: *mut i32,
    parents: *const i32,
) -> kvl_status {
    guard(|| {
        let (num_sequences, capacity) = (size("num_sequences", num_sequences)?, size("capacity", capacity)?);
        let entries = num_sequences.saturating_mul(capacity);
        apart([
            ("table", table, entries),
            ("lengths", lengths, num_sequences),
            ("parents", parents.cast_mut(), num_sequences),
        ])?;
        // SAFETY: the caller's promise, and the lists share no memory.
        unsafe {
            let table = output_list("table", table, entries)?;
            let lengths = output_list("lengths", lengths, num_sequences)?;
            let parents = required_list("parents", parents, num_sequences)?;
            reorder_table_raw((workspace.cast(), workspace_bytes), table, capacity, lengths, parents)
        }
    })
}

/// Records in the beam table of an indirect cache, [num_sequences, capacity], that `tokens` tokens of every sequence b,
/// from position `positions[b]` on, lie in row b of the cache, to which they were just written.
///
/// Thread safety: may be called from any number of threads at once, on disjoint tables.
/// Bad input: null, a negative size or position, tokens past the capacity (`KVL_STATUS_CAPACITY`), and lists that share
/// memory are errors, and nothing changes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_set_table_tokens(
    table: *mut i32,
    num_sequences: i64,
    capacity: i64,
    positions: *const i32,
    tokens: i64,
) -> kvl_status {
    guard(|| {
        let (num_sequences, capacity, tokens) =
            (size("num_sequences", num_sequences)?, size("capacity", capacity)?, size("tokens", tokens)?);
        let entries = num_sequences.saturating_mul(capacity);
        apart([("table", table, entries), ("positions", positions.cast_mut(), num_sequences)])?;
        // SAFETY: the caller's promise, and the lists share no memory.
        unsafe {
            let table = output_list("table", table, entries)?;
            set_table_tokens(table, capacity, required_list("positions", positions, num_sequences)?, tokens)
        }
    })
}

/// Removes the tokens `first` to `end - 1` of a sequence and closes the gap: later tokens move down by `end - first`
/// positions, and their keys are rotated to their new positions. To keep sink tokens, begin after them.
///
/// `ropes` has an entry per layer, or one for all, or none (`num_ropes` 0) where keys carry no rotation, or already that
/// of the position to which they move, as those of a tree of guesses do. A null entry is a layer whose keys are not
/// rotated. The `pairing`, `rotary_dim` and `inv_freq` of each are those that the keys were written with. Other fields
/// are not read, but a table is an error, since it has no row for a difference of positions. Angles are computed in
/// f64, arithmetic is f32, rounded once to the type of the cache. Values keep every bit, unless several tokens share
/// scales and move by other numbers than multiples of these: then they are quantised again, those that stay with them
/// too.
///
/// Each call adds one rounding to the keys that move. After many small evictions, 16-bit keys stay where they were,
/// because a rotation by less than half a unit in the last place rounds back. `kvl_cache_evict_running` has no such
/// drift.
///
/// Thread safety: may be called from any number of threads at once, on disjoint caches. A null `runner` runs on the
/// calling thread.
/// Bad input: null, an unknown `struct_size` or enumeration value, views that do not fit each other, a sequence that
/// does not exist, a range that is empty the wrong way or goes beyond the length, a number of ropes that fits nothing,
/// a `rotary_dim` above a layer's dim, heads above 1024 elements with scales that several tokens share, a page to be
/// written that another sequence uses, a ring (which drops its oldest tokens by itself), and an indirect cache are
/// errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_evict(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    cache: *const kvl_cache,
    sequence: i64,
    first: i64,
    end: i64,
    ropes: *const *const kvl_rope_params,
    num_ropes: usize,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let (context, runner) = (borrow(context)?, CallerRunner::new(runner)?);
            let drop = size("first", first)?..size("end", end)?;
            let ropes = Ropes(required_list("ropes", ropes, num_ropes)?);
            with_cache(cache, |cache| {
                let rotation = |i| Ok(ropes.rotation(i)?.map(|(rotation, _)| rotation));
                evict_raw(context, runner.as_dyn(), cache, sequence, drop, num_ropes, &rotation)
            })
        }
    })
}

/// Removes the tokens `first` to `end - 1` of a sequence and closes the gap, while RoPE positions run on: the keys of
/// later tokens move with every bit, as values do. The `first` keys before the gap are brought near to them instead, by
/// writing them again from unrotated copies. However often it is called, each key has been rounded once.
///
/// `dropped` is the number of tokens that the sequence has lost before this call. After it, token t of the sequence has
/// RoPE position `t + dropped + (end - first)`, and the next query and key have position `length + dropped`, with the
/// new length and the new sum. Lengths, causality, windows and ALiBi still count from 0. Scales that several tokens
/// share are as with `kvl_cache_evict`.
///
/// `ropes` and `keys` have an entry per layer, or one for all, or none (`num_ropes` 0) where keys carry no rotation or
/// no token is kept before the gap. A null rope is a layer whose keys before the gap stay as they are. The `pairing`,
/// `rotary_dim`, `inv_freq` and `magnitude` of a rope are those that the keys were written with. Other fields are not
/// read, but a table is an error. `keys[i]` is [1, tokens, kv_heads, dim], of any type, with at least `first` tokens:
/// the keys of the first tokens of the sequence, after their norm and before their rotation.
///
/// Thread safety: may be called from any number of threads at once, on disjoint caches. A null `runner` runs on the
/// calling thread.
/// Bad input: the errors of `kvl_cache_evict`; copies that do not fit the layer's keys, have too few tokens or share
/// memory with the cache, a negative `dropped`, and positions beyond 2^31 - 1 (`KVL_STATUS_CAPACITY`) are errors too,
/// and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_evict_running(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    cache: *const kvl_cache,
    sequence: i64,
    first: i64,
    end: i64,
    dropped: i64,
    keys: *const kvl_const_view,
    ropes: *const *const kvl_rope_params,
    num_ropes: usize,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let (context, runner) = (borrow(context)?, CallerRunner::new(runner)?);
            let drop = size("first", first)?..size("end", end)?;
            let dropped = size("dropped", dropped)?;
            let ropes = Ropes(required_list("ropes", ropes, num_ropes)?);
            let keys = CallerViews(required_list("keys", keys, num_ropes)?);
            let unrotated = |i: usize| {
                let Some((rotation, magnitude)) = ropes.rotation(i)? else { return Ok(None) };
                Ok(Some(RawUnrotated { keys: keys.view(i)?, rotation, magnitude }))
            };
            with_cache(cache, |cache| {
                let unrotated = (num_ropes, &unrotated as _);
                evict_running_raw(context, runner.as_dyn(), cache, sequence, drop, dropped, unrotated)
            })
        }
    })
}

/// Copies whole pages of a pool, `moves[2 * i]` to `moves[2 * i + 1]`, in all layers, whose views are [pages,
/// page_size, kv_heads, dim]: for example to give a sequence a last page of its own before it writes to a shared one.
///
/// Thread safety: may be called from any number of threads at once, on disjoint pools. A null `runner` runs on the
/// calling thread.
/// Bad input: null, views that do not fit each other, a page that does not exist, and a page that is written twice or
/// both written and read (`KVL_STATUS_DUPLICATE_SLOT`) are errors, and nothing is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_copy_pages(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    layers: *const kvl_kv_layer,
    num_layers: usize,
    moves: *const i32,
    num_moves: usize,
) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let (context, runner) = (borrow(context)?, CallerRunner::new(runner)?);
            let layers = CallerLayers(required_list("layers", layers, num_layers)?);
            let moves = required_list("moves", moves.cast::<[i32; 2]>(), num_moves)?;
            copy_pages_raw(context, runner.as_dyn(), &layers, moves)
        }
    })
}

/// Moves the pages in use to the start of the pool, in all layers, and sets `*used` to their number: all pages from
/// there on are free. The views of the layers are [pages, page_size, kv_heads, dim].
///
/// Pages in use hold the first `lengths[b]` tokens of a sequence b; shared pages stay shared. Only pages beyond the new
/// end move, in ascending order to the lowest free places. `table`, [num_sequences, pages_per_sequence], is updated,
/// and its entries beyond the length of a sequence become -1, since the pages that they named may be others'. `map` has
/// an entry per page, and afterwards the place of each page, -1 for those that were not in use.
///
/// Thread safety: may be called from any number of threads at once, on disjoint pools. A null `runner` runs on the
/// calling thread.
/// Bad input: null, a negative size, views that do not fit each other, a length above what a sequence's entries hold,
/// an entry that is no page, and lists that share memory are errors, and nothing but `map` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_cache_defragment(
    context: *const kvl_context,
    runner: *const kvl_parallel_runner,
    layers: *const kvl_kv_layer,
    num_layers: usize,
    table: *mut i32,
    num_sequences: i64,
    pages_per_sequence: i64,
    lengths: *const i32,
    map: *mut i32,
    used: *mut i64,
) -> kvl_status {
    guard(|| {
        let (num_sequences, pages_per_sequence) =
            (size("num_sequences", num_sequences)?, size("pages_per_sequence", pages_per_sequence)?);
        ensure!(!used.is_null(), NullPointer, "the pointer used is null");
        // SAFETY: the caller's promise, here and below.
        unsafe {
            let (context, runner) = (borrow(context)?, CallerRunner::new(runner)?);
            let layers = CallerLayers(required_list("layers", layers, num_layers)?);
            let pages = layers.first()?.k.shape[BATCH];
            let entries = num_sequences.saturating_mul(pages_per_sequence);
            apart([("table", table, entries), ("lengths", lengths.cast_mut(), num_sequences), ("map", map, pages)])?;
            let table = output_list("table", table, entries)?;
            let lengths = required_list("lengths", lengths, num_sequences)?;
            let map = output_list("map", map, pages)?;
            let n = defragment_pages_raw(context, runner.as_dyn(), &layers, table, pages_per_sequence, lengths, map)?;
            // At most as many as an axis has.
            used.write(n as i64);
            Ok(())
        }
    })
}

/// The layers of a caller's struct.
struct CallerLayers<'a>(&'a [kvl_kv_layer]);

// SAFETY: what is shared is addresses and numbers.
unsafe impl Sync for CallerLayers<'_> {}

impl CallerLayers<'_> {
    fn first(&self) -> Result<RawLayer> {
        ensure!(!self.0.is_empty(), Shape, "the cache has no layers");
        self.layer(0).map_err(|e| Error::new(e.status(), format!("layer 0: {}", e.message())))
    }
}

impl Layers for CallerLayers<'_> {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn layer(&self, i: usize) -> Result<RawLayer> {
        let kvl_kv_layer { k, v, scales } = &self.0[i];
        // SAFETY: null, or what the header describes, as long as the layers are in use.
        let [k_scales, v_scales] = unsafe { read_scales(*scales) }?;
        ensure!(!v.is_absent() || v_scales.is_absent(), InvalidValue, "the scales of v are given, but v is absent");
        let v = match v.is_absent() {
            true => None,
            false => Some(with_scales(v.units("v")?, "the scales of v", &v_scales)?),
        };
        Ok(RawLayer { k: with_scales(k.units("k")?, "the scales of k", &k_scales)?, v })
    }
}

/// The unrotated keys of a caller's layers.
#[derive(Clone, Copy)]
struct CallerViews<'a>(&'a [kvl_const_view]);

// SAFETY: what is shared is addresses and numbers.
unsafe impl Sync for CallerViews<'_> {}

impl CallerViews<'_> {
    fn view(self, i: usize) -> Result<RawView> {
        self.0[i].raw("the unrotated keys")
    }
}

/// How the keys of each layer were turned.
#[derive(Clone, Copy)]
struct Ropes<'a>(&'a [*const kvl_rope_params]);

// SAFETY: what is behind the pointers is only read.
unsafe impl Sync for Ropes<'_> {}

impl<'a> Ropes<'a> {
    /// The rotation of a layer, and the factor on its cosines and sines.
    ///
    /// # Safety
    /// Every pointer is null or points to what the header describes.
    unsafe fn rotation(self, i: usize) -> Result<Option<(RawRotation<'a>, f64)>> {
        if self.0[i].is_null() {
            return Ok(None);
        }
        // SAFETY: the caller's.
        let params = unsafe { read_sized(self.0[i]) }?;
        reserved("kvl_rope_params", params.reserved)?;
        ensure!(
            params.cos.is_null() && params.sin.is_null(),
            InvalidValue,
            "keys are turned by frequencies: a table has no row for a difference of positions"
        );
        let pairing = parse_pairing("pairing", params.pairing)?;
        let rotary_dim = size("rotary_dim", params.rotary_dim)?;
        check_rotary_dim(rotary_dim)?;
        // SAFETY: the caller's.
        let inv_freq = unsafe { required_list("inv_freq", params.inv_freq, rotary_dim / 2) }?;
        let magnitude = if params.magnitude == 0.0 { 1.0 } else { params.magnitude };
        let hadamard = parse_block("k_hadamard", params.k_hadamard)?;
        Ok(Some((RawRotation { pairing, inv_freq, hadamard }, magnitude)))
    }
}

/// The cache at `from`, lent to `call`.
///
/// # Safety
/// `from` is null or points to what the header describes.
unsafe fn with_cache<T>(from: *const kvl_cache, call: impl FnOnce(&mut RawCache) -> Result<T>) -> Result<T> {
    // SAFETY: the caller's, here and below.
    let params = unsafe { read_sized(from) }?;
    // SAFETY: as above.
    let layers = CallerLayers(unsafe { required_list("layers", params.layers, params.num_layers) }?);
    let first = layers.first()?.k;
    // SAFETY: as above.
    let layout = unsafe { read_layout(params.layout, first.shape[SEQ]) }?;
    let rows = match layout.rows(&first) {
        Some(rows) => rows,
        // SAFETY: as above.
        None => unsafe { read_sequences(params.layout) }?,
    };
    let (table, entries) = match layout {
        Layout::Paged { page_table: table, .. }
        | Layout::Indirect { beam_table: table }
        | Layout::Ragged { cu_seqlens: table } => (table.as_ptr(), table.len()),
        _ => (std::ptr::null(), 0),
    };
    apart([("lengths", params.lengths, rows), ("the layout's table", table.cast_mut(), entries)])?;
    // SAFETY: as above, and nothing else that is borrowed lies there.
    let lengths = unsafe { output_list("lengths", params.lengths, rows) }?;
    call(&mut RawCache { layers: &layers, layout, lengths })
}

/// A list that an operation reads while it changes lengths.
///
/// # Safety
/// As for [`list`].
unsafe fn input<'a>(cache: &RawCache, name: &str, data: *const i32, n: usize) -> Result<&'a [i32]> {
    let lengths = cache.lengths.as_ptr().cast_mut();
    apart([("the cache's lengths", lengths, cache.lengths.len()), (name, data.cast_mut(), n)])?;
    // SAFETY: the caller's.
    unsafe { required_list(name, data, n) }
}
