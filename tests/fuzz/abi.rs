//! `include/kvlane.h`, declared a second time, as a program in another language would do. Two tests compare it with
//! the header.
#![allow(non_camel_case_types)]

use std::ffi::{c_char, c_void};

/// A struct of integers, floats, nullable pointers and arrays of them.
///
/// # Safety
/// The struct is `repr(C)`, and all bytes 0 are a valid value.
pub unsafe trait Plain: Copy {}

/// All fields 0, except the size in sized structs.
pub fn zeroed<T: Plain>() -> T {
    // SAFETY: all bytes 0 are a valid value, by the trait's contract.
    unsafe { std::mem::zeroed() }
}

macro_rules! structs {
    ($($name:ident { $($field:ident: $type:ty),* $(,)? })*) => {
        $(
            #[derive(Clone, Copy)]
            #[repr(C)]
            pub struct $name { $(pub $field: $type),* }
            // SAFETY: see the fields below.
            unsafe impl Plain for $name {}
        )*
        /// Every struct with its fields.
        pub const STRUCTS: &[(&str, &[&str])] = &[$((stringify!($name), &[$(stringify!($field)),*])),*];
    };
}

structs! {
    kvl_view { data: *mut u8, dtype: i32, reserved: i32, shape: [i64; 4], strides: [i64; 4], bytes: usize }
    // A const view has the same fields; `const` in C makes no difference here.
    kvl_const_view { data: *mut u8, dtype: i32, reserved: i32, shape: [i64; 4], strides: [i64; 4], bytes: usize }
    kvl_mask { data: *const u8, shape: [i64; 4], strides: [i64; 4], bytes: usize }
    kvl_parallel_runner {
        struct_size: usize,
        ctx: *mut c_void,
        num_threads: usize,
        run: Option<unsafe extern "C" fn(*mut c_void, usize, kvl_task, *mut c_void) -> i32>,
    }
    kvl_context_params { struct_size: usize, max_isa: i32, flags: u32 }
    kvl_tuning {
        struct_size: usize, block: i32, block_order: i32, run: i32, run_one_row: i32, run_distance: usize,
        run_long_heads: i32, score_tiles: i32,
    }
    kvl_kernel_info {
        struct_size: usize, name: *const c_char, op: i32, src: i32, dst: i32, isa: i32, available: i32, max_error: f32,
    }
    kvl_rope_frequencies_params {
        struct_size: usize, rotary_dim: i64, base: f64, scaling: i32, keep_ramp: i32, factor: f64,
        original_max_position: f64, low_freq_factor: f64, high_freq_factor: f64, beta_fast: f64, beta_slow: f64,
        attention_factor: f64, factors: *const f64,
    }
    kvl_rope_params {
        struct_size: usize, pairing: i32, reserved: i32, rotary_dim: i64, inv_freq: *const f64, magnitude: f64,
        cos: *const f32, sin: *const f32, table_rows: i64, offsets: *const i32, positions: *const i32,
        k_hadamard: i64,
    }
    kvl_kv_write_params {
        struct_size: usize, k: kvl_const_view, v: kvl_const_view, k_cache: kvl_view, v_cache: kvl_view,
        positions: *const i32, counts: *const i32, sequences: *const i32, slots: *const i32, rope: *const kvl_rope_params,
        layout: *const kvl_layout, k_norm: *const kvl_rms_norm_params, v_packing: i32, reserved: i32,
        scales: *const kvl_cache_scales, k_hadamard: i64, v_hadamard: i64,
    }
    kvl_kv_read_params {
        struct_size: usize, k_cache: kvl_const_view, v_cache: kvl_const_view, k: kvl_view, v: kvl_view,
        positions: *const i32, counts: *const i32, sequences: *const i32, layout: *const kvl_layout,
        scales: *const kvl_cache_scales, v_packing: i32, reserved: i32, k_hadamard: i64, v_hadamard: i64,
    }
    kvl_layout {
        struct_size: usize, kind: i32, sink_tokens: i32, num_sequences: i64, pages_per_sequence: i64, table: *const i32,
    }
    kvl_rms_norm_params { struct_size: usize, weight: *const f32, eps: f32, reserved: i32 }
    kvl_bit_mask {
        struct_size: usize, data: *const u8, bytes: usize, offset: i64, shape: [i64; 4], strides: [i64; 3],
        first_keys: *const i32, bit_offsets: *const i64, query_strides: *const i64,
    }
    kvl_cache_scales {
        struct_size: usize, k: kvl_view, v: kvl_view, k_zeros: kvl_view, v_zeros: kvl_view, k_affine: u32, v_affine: u32,
    }
    kvl_kv_layer { k: kvl_view, v: kvl_view, scales: *const kvl_cache_scales }
    kvl_cache {
        struct_size: usize, layers: *const kvl_kv_layer, num_layers: usize, layout: *const kvl_layout, lengths: *mut i32,
    }
    kvl_shard {
        struct_size: usize, data: i64, num_data: i64, model: i64, num_model: i64, sequence: i64, num_sequence: i64,
    }
    kvl_attention_params {
        struct_size: usize, q: kvl_const_view, k: kvl_const_view, v: kvl_const_view, out: kvl_view, lse: *mut f32,
        scale: f32, softcap: f32, flags: u32, reserved: i32, window_left: i64, window_right: i64, lengths: *const i32,
        kv_starts: *const i32, offsets: *const i32, mask: kvl_mask, bias: kvl_const_view, alibi_slopes: *const f32,
        sink_logits: *const f32, precision: i32, reserved2: i32, layout: *const kvl_layout, cu_seqlens_q: *const i32,
        num_sequences: i64, prefix_lengths: *const i32, bit_mask: *const kvl_bit_mask, plan: *const kvl_plan, v_packing: i32,
        reserved3: i32, query_positions: *const i32, scales: *const kvl_cache_scales, k_hadamard: i64, v_hadamard: i64,
    }
    kvl_attention_state { out: kvl_const_view, lse: *const f32 }
    kvl_chunk_states { states: *const f32, len: i64 }
    kvl_merge_chunks_params {
        struct_size: usize, segments: *const kvl_chunk_states, num_segments: usize, kv_heads: i64, k_format: i32, v_format: i32, precision: i32, reserved: i32,
        sink_logits: *const f32, out: kvl_view, lse: *mut f32, v_hadamard: i64,
    }
}

pub type kvl_task = unsafe extern "C" fn(*mut c_void, usize);

/// Used behind a pointer only.
#[repr(C)]
pub struct kvl_context([u8; 0]);
/// Used behind a pointer only.
#[repr(C)]
pub struct kvl_plan([u8; 0]);
/// Used behind a pointer only.
#[repr(C)]
pub struct kvl_thread_pool([u8; 0]);

type Context = *const kvl_context;
type Runner = *const kvl_parallel_runner;
type Text = *const c_char;

unsafe extern "C" {
    pub safe fn kvl_abi_version() -> u32;
    pub safe fn kvl_version_string() -> Text;
    pub safe fn kvl_status_string(status: i32) -> Text;
    pub fn kvl_last_error(buffer: *mut u8, size: usize) -> usize;
    pub safe fn kvl_isa_name(isa: i32) -> Text;
    pub safe fn kvl_isa_available(isa: i32) -> i32;
    pub safe fn kvl_kernel_count() -> usize;
    pub fn kvl_kernel_info_at(index: usize, info: *mut kvl_kernel_info) -> i32;
    pub fn kvl_context_create(params: *const kvl_context_params, context: *mut *mut kvl_context) -> i32;
    pub fn kvl_context_destroy(context: *mut kvl_context);
    pub fn kvl_context_isa(context: Context, isa: *mut i32) -> i32;
    pub fn kvl_context_kernel_name(context: Context, op: i32, src: i32, dst: i32, name: *mut Text) -> i32;
    pub fn kvl_context_attention_kernel_names(
        context: Context,
        k_format: i32,
        v_format: i32,
        precision: i32,
        k_name: *mut Text,
        v_name: *mut Text,
    ) -> i32;
    pub fn kvl_thread_pool_create(num_threads: usize, pool: *mut *mut kvl_thread_pool) -> i32;
    pub fn kvl_thread_pool_destroy(pool: *mut kvl_thread_pool);
    pub fn kvl_advise_huge_pages(data: *mut c_void, bytes: usize, advised: *mut i32) -> i32;
    pub fn kvl_thread_pool_runner(pool: *const kvl_thread_pool, runner: *mut kvl_parallel_runner) -> i32;
    pub fn kvl_rope_frequencies(
        params: *const kvl_rope_frequencies_params,
        inv_freq: *mut f64,
        pairs: i64,
        magnitude: *mut f64,
    ) -> i32;
    pub fn kvl_rope_table(
        context: Context,
        inv_freq: *const f64,
        rotary_dim: i64,
        magnitude: f64,
        first_position: i64,
        rows: i64,
        cos: *mut f32,
        sin: *mut f32,
    ) -> i32;
    pub fn kvl_rope(
        context: Context,
        runner: Runner,
        src: *const kvl_const_view,
        dst: *const kvl_view,
        params: *const kvl_rope_params,
    ) -> i32;
    pub fn kvl_kv_read(context: Context, runner: Runner, params: *const kvl_kv_read_params) -> i32;
    pub fn kvl_kv_write(context: Context, runner: Runner, params: *const kvl_kv_write_params) -> i32;
    pub fn kvl_repeat_kv(context: Context, runner: Runner, src: *const kvl_const_view, dst: *const kvl_view) -> i32;
    pub fn kvl_attention_workspace_size(params: *const kvl_attention_params, runner: Runner, bytes: *mut usize) -> i32;
    pub fn kvl_attention(
        context: Context,
        runner: Runner,
        workspace: *mut u8,
        workspace_bytes: usize,
        params: *const kvl_attention_params,
    ) -> i32;
    pub fn kvl_merge_states(
        context: Context,
        runner: Runner,
        states: *const kvl_attention_state,
        num_states: usize,
        out: *const kvl_view,
        lse: *mut f32,
    ) -> i32;
    pub fn kvl_alibi_slopes(slopes: *mut f32, heads: i64) -> i32;
    pub fn kvl_attention_with_prefix_workspace_size(
        prefix_k: *const kvl_const_view,
        params: *const kvl_attention_params,
        runner: Runner,
        bytes: *mut usize,
    ) -> i32;
    pub fn kvl_attention_with_prefix(
        context: Context,
        runner: Runner,
        workspace: *mut u8,
        workspace_bytes: usize,
        prefix_k: *const kvl_const_view,
        prefix_v: *const kvl_const_view,
        prefix_scales: *const kvl_cache_scales,
        params: *const kvl_attention_params,
    ) -> i32;
    pub fn kvl_attention_chunks_states_len(params: *const kvl_attention_params, len: *mut i64) -> i32;
    pub fn kvl_attention_chunks_workspace_size(
        params: *const kvl_attention_params,
        runner: Runner,
        bytes: *mut usize,
    ) -> i32;
    pub fn kvl_attention_chunks(
        context: Context,
        runner: Runner,
        workspace: *mut u8,
        workspace_bytes: usize,
        params: *const kvl_attention_params,
        states: *mut f32,
        states_len: i64,
    ) -> i32;
    pub fn kvl_merge_chunks_workspace_size(
        params: *const kvl_merge_chunks_params,
        runner: Runner,
        bytes: *mut usize,
    ) -> i32;
    pub fn kvl_merge_chunks(
        context: Context,
        runner: Runner,
        workspace: *mut u8,
        workspace_bytes: usize,
        params: *const kvl_merge_chunks_params,
    ) -> i32;
    pub fn kvl_plan_create(params: *const kvl_attention_params, plan: *mut *mut kvl_plan) -> i32;
    pub fn kvl_plan_update(plan: *mut kvl_plan, params: *const kvl_attention_params) -> i32;
    pub fn kvl_plan_advance(plan: *mut kvl_plan, counts: *const i32, num_sequences: i64) -> i32;
    pub fn kvl_plan_set_table(plan: *mut kvl_plan, row: i64, first: i64, entries: *const i32, count: i64) -> i32;
    pub fn kvl_plan_destroy(plan: *mut kvl_plan);
    pub fn kvl_context_tuning(context: Context, tuning: *mut kvl_tuning) -> i32;
    pub fn kvl_context_set_tuning(context: *mut kvl_context, tuning: *const kvl_tuning) -> i32;
    pub fn kvl_context_v_packing(context: Context, dtype: i32, packing: *mut i32) -> i32;
    pub fn kvl_rms_norm(
        context: Context,
        runner: Runner,
        src: *const kvl_const_view,
        dst: *const kvl_view,
        params: *const kvl_rms_norm_params,
    ) -> i32;
    pub fn kvl_rms_norm_rope(
        context: Context,
        runner: Runner,
        src: *const kvl_const_view,
        dst: *const kvl_view,
        norm: *const kvl_rms_norm_params,
        rope: *const kvl_rope_params,
    ) -> i32;
    pub fn kvl_hadamard(
        context: Context,
        runner: Runner,
        src: *const kvl_const_view,
        dst: *const kvl_view,
        block: i64,
    ) -> i32;
    pub fn kvl_hadamard_block(dim: i64, block: *mut i64) -> i32;
    pub fn kvl_pack_row_pairs(
        context: Context,
        runner: Runner,
        src: *const kvl_const_view,
        dst: *const kvl_view,
    ) -> i32;
    pub fn kvl_unpack_row_pairs(
        context: Context,
        runner: Runner,
        src: *const kvl_const_view,
        dst: *const kvl_view,
    ) -> i32;
    pub fn kvl_cache_set_lengths(
        cache: *const kvl_cache,
        sequences: *const i32,
        values: *const i32,
        num_sequences: usize,
    ) -> i32;
    pub fn kvl_cache_advance(cache: *const kvl_cache, counts: *const i32) -> i32;
    pub fn kvl_cache_truncate(cache: *const kvl_cache, lengths: *const i32, flags: u32, window_left: i64) -> i32;
    pub fn kvl_cache_reset(
        runner: Runner,
        cache: *const kvl_cache,
        rows: *const i32,
        num_sequences: usize,
        zero: i32,
    ) -> i32;
    pub fn kvl_cache_insert_sequence(
        context: Context,
        runner: Runner,
        to: *const kvl_cache,
        row: i64,
        from: *const kvl_cache,
        from_row: i64,
        length: i64,
    ) -> i32;
    pub fn kvl_cache_copy_prefix(
        context: Context,
        runner: Runner,
        cache: *const kvl_cache,
        from: i64,
        to: *const i32,
        num_to: usize,
        tokens: i64,
    ) -> i32;
    pub fn kvl_cache_reorder_workspace_size(cache: *const kvl_cache, runner: Runner, bytes: *mut usize) -> i32;
    pub fn kvl_cache_reorder(
        context: Context,
        runner: Runner,
        workspace: *mut u8,
        workspace_bytes: usize,
        cache: *const kvl_cache,
        parents: *const i32,
    ) -> i32;
    pub fn kvl_cache_reorder_table_workspace_size(rows: i64, capacity: i64, bytes: *mut usize) -> i32;
    pub fn kvl_cache_reorder_table(
        workspace: *mut u8,
        workspace_bytes: usize,
        table: *mut i32,
        rows: i64,
        capacity: i64,
        lengths: *mut i32,
        parents: *const i32,
    ) -> i32;
    pub fn kvl_cache_set_table_tokens(
        table: *mut i32,
        rows: i64,
        capacity: i64,
        positions: *const i32,
        tokens: i64,
    ) -> i32;
    pub fn kvl_cache_evict(
        context: Context,
        runner: Runner,
        cache: *const kvl_cache,
        row: i64,
        first: i64,
        end: i64,
        ropes: *const *const kvl_rope_params,
        num_ropes: usize,
    ) -> i32;
    pub fn kvl_cache_evict_running(
        context: Context,
        runner: Runner,
        cache: *const kvl_cache,
        row: i64,
        first: i64,
        end: i64,
        dropped: i64,
        keys: *const kvl_const_view,
        ropes: *const *const kvl_rope_params,
        num_ropes: usize,
    ) -> i32;
    pub fn kvl_cache_copy_pages(
        context: Context,
        runner: Runner,
        layers: *const kvl_kv_layer,
        num_layers: usize,
        moves: *const i32,
        num_moves: usize,
    ) -> i32;
    pub fn kvl_cache_defragment(
        context: Context,
        runner: Runner,
        layers: *const kvl_kv_layer,
        num_layers: usize,
        table: *mut i32,
        rows: i64,
        pages_per_sequence: i64,
        lengths: *const i32,
        map: *mut i32,
        used: *mut i64,
    ) -> i32;
    pub fn kvl_shard_from_rank(rank: i64, shard: *mut kvl_shard) -> i32;
    pub fn kvl_shard_sequences(shard: *const kvl_shard, batch: i64, first: *mut i64, count: *mut i64) -> i32;
    pub fn kvl_shard_heads(
        shard: *const kvl_shard,
        heads: i64,
        kv_heads: i64,
        first_head: *mut i64,
        num_heads: *mut i64,
        first_kv_head: *mut i64,
        num_kv_heads: *mut i64,
    ) -> i32;
    pub fn kvl_shard_keys(shard: *const kvl_shard, capacity: i64, first: *mut i64, count: *mut i64) -> i32;
    pub fn kvl_shard_lengths(
        first: i64,
        count: i64,
        batch: i64,
        seq: i64,
        lengths: *const i32,
        kv_starts: *const i32,
        offsets: *const i32,
        local_lengths: *mut i32,
        local_kv_starts: *mut i32,
        local_offsets: *mut i32,
    ) -> i32;
    pub fn kvl_shard_slots(first: i64, count: i64, batch: i64, seq: i64, positions: *const i32, slots: *mut i32)
    -> i32;
    pub fn kvl_shard_view(view: *const kvl_view, axis: i32, first: i64, count: i64, part: *mut kvl_view) -> i32;
}

/// The name and fields of every struct in the header.
pub fn header_structs(header: &str) -> Vec<(String, Vec<String>)> {
    let mut structs = Vec::new();
    for text in header.split("typedef struct ").skip(1) {
        let Some((name, rest)) = text.split_once(" {\n") else { continue };
        let Some((body, _)) = rest.split_once(&format!("}} {name};")) else { continue };
        let lines = body.lines().map(str::trim).filter(|line| !line.starts_with('*') && line.ends_with(';'));
        let fields = lines.map(|line| {
            // A function pointer has its name in the middle; elsewhere the name is last and may be an array.
            let declared = match line.split_once("(*") {
                Some((_, function)) => function.split(')').next(),
                None => line.trim_end_matches(';').split('[').next(),
            };
            let words = declared.unwrap_or_default().rsplit(|c: char| c == '*' || c.is_whitespace());
            words.into_iter().next().unwrap_or_default().to_owned()
        });
        structs.push((name.to_owned(), fields.collect()));
    }
    structs
}
