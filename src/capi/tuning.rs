//! The tuning of a context.

use super::arguments::enumeration;
use super::context::{borrow, kvl_context};
use super::guard::guard;
use super::sized::{assert_layout, read_sized, sized, write_sized};
use super::status::kvl_status;
use crate::error::Result;
use crate::tuning::{KeyOrder, Prefetch, ScoreTiles, Tuning};

/// Into which cache of the CPU lines are prefetched.
pub type kvl_prefetch = i32;
/// As the library does it on this CPU.
pub const KVL_PREFETCH_DEFAULT: i32 = 0;
/// Nothing is prefetched.
pub const KVL_PREFETCH_OFF: i32 = 1;
/// Into the first-level cache.
pub const KVL_PREFETCH_FIRST_LEVEL: i32 = 2;
/// Into the second-level cache.
pub const KVL_PREFETCH_SECOND_LEVEL: i32 = 3;
/// Into the second-level cache, and those 512 bytes ahead into the first-level cache.
pub const KVL_PREFETCH_BOTH_LEVELS: i32 = 4;
/// As `KVL_PREFETCH_BOTH_LEVELS`, with one prefetch for two lines into the second-level cache.
pub const KVL_PREFETCH_BOTH_LEVELS_IN_PAIRS: i32 = 5;
/// Into the first-level cache, what the same KV head has a few keys later.
pub const KVL_PREFETCH_NEXT_KEYS: i32 = 6;

/// The order in which a loop reads the keys of a block.
pub type kvl_key_order = i32;
/// As the library does it on this CPU.
pub const KVL_KEY_ORDER_DEFAULT: i32 = 0;
/// Keys that are multiplied side by side are neighbours.
pub const KVL_KEY_ORDER_SEQUENTIAL: i32 = 1;
/// Keys that are multiplied side by side are as far apart as the block allows.
pub const KVL_KEY_ORDER_SPREAD: i32 = 2;

/// The tiles of registers in which six query rows are multiplied by keys.
pub type kvl_score_tiles = i32;
/// As the library does it on this CPU.
pub const KVL_SCORE_TILES_DEFAULT: i32 = 0;
/// One vector of keys, and four lanes of the scores side by side.
pub const KVL_SCORE_TILES_NARROW: i32 = 1;
/// Four vectors of keys, and copies of the queries.
pub const KVL_SCORE_TILES_WIDE: i32 = 2;

/// How attention of few query rows prefetches keys and values, in which order it reads keys, and in which registers prompts compute
/// scores. It changes the time of a call, and no bit of its result. `kvlane tune` measures which is best. Start from `KVL_TUNING_INIT`;
/// zero means the library's choice for this CPU. The levels of matrix products prefetch in ways of their own.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct kvl_tuning {
    /// `sizeof(kvl_tuning)`.
    pub struct_size: usize,
    /// Prefetches where the keys of one KV head are read, a block of 64 at a time: the next block is prefetched. Prompts prefetch
    /// two lines at a time if this is `KVL_PREFETCH_BOTH_LEVELS_IN_PAIRS`.
    pub block: kvl_prefetch,
    /// The order in which the keys of such a block are read.
    pub block_order: kvl_key_order,
    /// Prefetches where the heads of a token are read together, in the order of memory.
    pub run: kvl_prefetch,
    /// The same where every KV head has one query row. Keys and values of at most 64 bytes, and blocks, go by `run` nevertheless.
    pub run_one_row: kvl_prefetch,
    /// Bytes from what is read to what `run`, `run_one_row` and `run_long_heads` prefetch, at most a block of 64 keys.
    pub run_distance: usize,
    /// As `run` where a KV head has several query rows and a key or value 512 bytes or more.
    pub run_long_heads: kvl_prefetch,
    /// The tiles of registers in which prompts compute scores at the level AVX-512. Other levels have one kind.
    pub score_tiles: kvl_score_tiles,
}

sized!(kvl_tuning[run_long_heads]);
assert_layout!(
    kvl_tuning, 40,
    struct_size: 0, block: 8, block_order: 12, run: 16, run_one_row: 20, run_distance: 24, run_long_heads: 32, score_tiles: 36,
);

/// Writes the tuning of a context to `*tuning`: that of this CPU, or what `kvl_context_set_tuning` has set. No field is zero.
///
/// Thread safety: may be called from any number of threads at once.
/// Bad input: null and an unknown `tuning->struct_size` are errors, and `*tuning` is not changed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_tuning(context: *const kvl_context, tuning: *mut kvl_tuning) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let own = unsafe { borrow(context) }?.tuning();
        // SAFETY: the caller's promise.
        let size = unsafe { read_sized(tuning.cast_const()) }?.struct_size;
        let filled = kvl_tuning {
            struct_size: size,
            block: own.block as i32 + 1,
            block_order: own.block_order as i32 + 1,
            run: own.run as i32 + 1,
            run_one_row: own.run_one_row as i32 + 1,
            run_distance: own.run_distance,
            run_long_heads: own.run_long_heads as i32 + 1,
            score_tiles: own.score_tiles as i32 + 1,
        };
        // SAFETY: the caller's promise.
        unsafe { write_sized(tuning, filled) };
        Ok(())
    })
}

/// Sets the tuning of a context, for the calls that begin afterwards.
///
/// Thread safety: no other call may use the context at the same time.
/// Bad input: null, an unknown `tuning->struct_size` and a number that is no value of its enumeration are errors, and the context is not
/// changed. Any distance is valid.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvl_context_set_tuning(context: *mut kvl_context, tuning: *const kvl_tuning) -> kvl_status {
    guard(|| {
        // SAFETY: the caller's promise.
        let own = unsafe { borrow(context) }?;
        // SAFETY: the caller's promise.
        let wanted = unsafe { read_sized(tuning) }?;
        let mut tuning = Tuning::of_this_cpu(own.isa());
        let prefetch = |name: &str, value, usual| choice("kvl_prefetch", name, value, &Prefetch::ALL, usual);
        tuning.block = prefetch("block", wanted.block, tuning.block)?;
        tuning.run = prefetch("run", wanted.run, tuning.run)?;
        tuning.run_one_row = prefetch("run_one_row", wanted.run_one_row, tuning.run_one_row)?;
        tuning.run_long_heads = prefetch("run_long_heads", wanted.run_long_heads, tuning.run_long_heads)?;
        tuning.block_order =
            choice("kvl_key_order", "block_order", wanted.block_order, &KeyOrder::ALL, tuning.block_order)?;
        tuning.score_tiles =
            choice("kvl_score_tiles", "score_tiles", wanted.score_tiles, &ScoreTiles::ALL, tuning.score_tiles)?;
        if wanted.run_distance != 0 {
            tuning.run_distance = wanted.run_distance;
        }
        let tuned = own.clone().tuned(tuning);
        // SAFETY: a context, which no other call uses by the caller's promise; the borrow above has ended.
        unsafe { (*context).context = tuned };
        Ok(())
    })
}

/// Entry `value - 1` of a list, or `usual` for 0.
fn choice<T: Copy>(of: &str, name: &str, value: i32, all: &[T], usual: T) -> Result<T> {
    enumeration(of, name, value, |value| match value {
        0 => Some(usual),
        value => all.get(value as usize - 1).copied(),
    })
}

// The values are pinned twice, here and in the enumerations; they cannot drift apart.
const _: () = {
    // What `choice` takes for the library's own.
    assert!(KVL_PREFETCH_DEFAULT == 0 && KVL_KEY_ORDER_DEFAULT == 0 && KVL_SCORE_TILES_DEFAULT == 0);
    assert!(KVL_PREFETCH_OFF == Prefetch::Off as i32 + 1);
    assert!(KVL_PREFETCH_FIRST_LEVEL == Prefetch::FirstLevel as i32 + 1);
    assert!(KVL_PREFETCH_SECOND_LEVEL == Prefetch::SecondLevel as i32 + 1);
    assert!(KVL_PREFETCH_BOTH_LEVELS == Prefetch::BothLevels as i32 + 1);
    assert!(KVL_PREFETCH_BOTH_LEVELS_IN_PAIRS == Prefetch::BothLevelsInPairs as i32 + 1);
    assert!(KVL_PREFETCH_NEXT_KEYS == Prefetch::NextKeys as i32 + 1 && Prefetch::ALL.len() == 6);
    assert!(KVL_KEY_ORDER_SEQUENTIAL == KeyOrder::Sequential as i32 + 1);
    assert!(KVL_KEY_ORDER_SPREAD == KeyOrder::Spread as i32 + 1 && KeyOrder::ALL.len() == 2);
    assert!(KVL_SCORE_TILES_NARROW == ScoreTiles::Narrow as i32 + 1);
    assert!(KVL_SCORE_TILES_WIDE == ScoreTiles::Wide as i32 + 1 && ScoreTiles::ALL.len() == 2);
};
