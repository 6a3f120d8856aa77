/* Sizes and offsets on 64-bit machines, and every value, as numbers. src/capi asserts the same numbers, so that a change of
 * either side is detected. Compiles as C11 and as C++17. */
#include <assert.h>

#include "kvlane.h"

#define SIZE(type, size) static_assert(sizeof(type) == (size), #type " has changed its size")
#define AT(type, field, offset) static_assert(offsetof(type, field) == (offset), #type "." #field " has moved")
#define VALUE(name, value) static_assert((name) == (value), #name " has changed its value")

#if UINTPTR_MAX == 0xffffffffffffffff
SIZE(kvl_view, 88);
AT(kvl_view, data, 0);
AT(kvl_view, dtype, 8);
AT(kvl_view, reserved, 12);
AT(kvl_view, shape, 16);
AT(kvl_view, strides, 48);
AT(kvl_view, bytes, 80);

SIZE(kvl_const_view, 88);
AT(kvl_const_view, data, 0);
AT(kvl_const_view, dtype, 8);
AT(kvl_const_view, reserved, 12);
AT(kvl_const_view, shape, 16);
AT(kvl_const_view, strides, 48);
AT(kvl_const_view, bytes, 80);

SIZE(kvl_mask, 80);
AT(kvl_mask, data, 0);
AT(kvl_mask, shape, 8);
AT(kvl_mask, strides, 40);
AT(kvl_mask, bytes, 72);

SIZE(kvl_parallel_runner, 32);
AT(kvl_parallel_runner, struct_size, 0);
AT(kvl_parallel_runner, ctx, 8);
AT(kvl_parallel_runner, num_threads, 16);
AT(kvl_parallel_runner, run, 24);

SIZE(kvl_context_params, 16);
AT(kvl_context_params, struct_size, 0);
AT(kvl_context_params, max_isa, 8);
AT(kvl_context_params, flags, 12);

SIZE(kvl_tuning, 40);
AT(kvl_tuning, struct_size, 0);
AT(kvl_tuning, block, 8);
AT(kvl_tuning, block_order, 12);
AT(kvl_tuning, run, 16);
AT(kvl_tuning, run_one_row, 20);
AT(kvl_tuning, run_distance, 24);
AT(kvl_tuning, run_long_heads, 32);
AT(kvl_tuning, score_tiles, 36);
SIZE(kvl_kernel_info, 40);
AT(kvl_kernel_info, struct_size, 0);
AT(kvl_kernel_info, name, 8);
AT(kvl_kernel_info, op, 16);
AT(kvl_kernel_info, src, 20);
AT(kvl_kernel_info, dst, 24);
AT(kvl_kernel_info, isa, 28);
AT(kvl_kernel_info, available, 32);
AT(kvl_kernel_info, max_error, 36);

SIZE(kvl_rope_frequencies_params, 96);
AT(kvl_rope_frequencies_params, struct_size, 0);
AT(kvl_rope_frequencies_params, rotary_dim, 8);
AT(kvl_rope_frequencies_params, base, 16);
AT(kvl_rope_frequencies_params, scaling, 24);
AT(kvl_rope_frequencies_params, keep_ramp, 28);
AT(kvl_rope_frequencies_params, factor, 32);
AT(kvl_rope_frequencies_params, original_max_position, 40);
AT(kvl_rope_frequencies_params, low_freq_factor, 48);
AT(kvl_rope_frequencies_params, high_freq_factor, 56);
AT(kvl_rope_frequencies_params, beta_fast, 64);
AT(kvl_rope_frequencies_params, beta_slow, 72);
AT(kvl_rope_frequencies_params, attention_factor, 80);
AT(kvl_rope_frequencies_params, factors, 88);

SIZE(kvl_rope_params, 88);
AT(kvl_rope_params, struct_size, 0);
AT(kvl_rope_params, pairing, 8);
AT(kvl_rope_params, reserved, 12);
AT(kvl_rope_params, rotary_dim, 16);
AT(kvl_rope_params, inv_freq, 24);
AT(kvl_rope_params, magnitude, 32);
AT(kvl_rope_params, cos, 40);
AT(kvl_rope_params, sin, 48);
AT(kvl_rope_params, table_rows, 56);
AT(kvl_rope_params, offsets, 64);
AT(kvl_rope_params, positions, 72);
AT(kvl_rope_params, k_hadamard, 80);

SIZE(kvl_rms_norm_params, 24);
AT(kvl_rms_norm_params, struct_size, 0);
AT(kvl_rms_norm_params, weight, 8);
AT(kvl_rms_norm_params, eps, 16);
AT(kvl_rms_norm_params, reserved, 20);

SIZE(kvl_kv_write_params, 448);
AT(kvl_kv_write_params, struct_size, 0);
AT(kvl_kv_write_params, k, 8);
AT(kvl_kv_write_params, v, 96);
AT(kvl_kv_write_params, k_cache, 184);
AT(kvl_kv_write_params, v_cache, 272);
AT(kvl_kv_write_params, positions, 360);
AT(kvl_kv_write_params, counts, 368);
AT(kvl_kv_write_params, sequences, 376);
AT(kvl_kv_write_params, slots, 384);
AT(kvl_kv_write_params, rope, 392);
AT(kvl_kv_write_params, layout, 400);
AT(kvl_kv_write_params, k_norm, 408);
AT(kvl_kv_write_params, v_packing, 416);
AT(kvl_kv_write_params, reserved, 420);
AT(kvl_kv_write_params, scales, 424);
AT(kvl_kv_write_params, k_hadamard, 432);
AT(kvl_kv_write_params, v_hadamard, 440);

SIZE(kvl_kv_read_params, 424);
AT(kvl_kv_read_params, struct_size, 0);
AT(kvl_kv_read_params, k_cache, 8);
AT(kvl_kv_read_params, v_cache, 96);
AT(kvl_kv_read_params, k, 184);
AT(kvl_kv_read_params, v, 272);
AT(kvl_kv_read_params, positions, 360);
AT(kvl_kv_read_params, counts, 368);
AT(kvl_kv_read_params, sequences, 376);
AT(kvl_kv_read_params, layout, 384);
AT(kvl_kv_read_params, scales, 392);
AT(kvl_kv_read_params, v_packing, 400);
AT(kvl_kv_read_params, reserved, 404);
AT(kvl_kv_read_params, k_hadamard, 408);
AT(kvl_kv_read_params, v_hadamard, 416);

SIZE(kvl_kv_layer, 184);
AT(kvl_kv_layer, k, 0);
AT(kvl_kv_layer, v, 88);
AT(kvl_kv_layer, scales, 176);

SIZE(kvl_cache_scales, 368);
AT(kvl_cache_scales, struct_size, 0);
AT(kvl_cache_scales, k, 8);
AT(kvl_cache_scales, v, 96);
AT(kvl_cache_scales, k_zeros, 184);
AT(kvl_cache_scales, v_zeros, 272);
AT(kvl_cache_scales, k_affine, 360);
AT(kvl_cache_scales, v_affine, 364);

SIZE(kvl_cache, 40);
AT(kvl_cache, struct_size, 0);
AT(kvl_cache, layers, 8);
AT(kvl_cache, num_layers, 16);
AT(kvl_cache, layout, 24);
AT(kvl_cache, lengths, 32);

SIZE(kvl_shard, 56);
AT(kvl_shard, struct_size, 0);
AT(kvl_shard, data, 8);
AT(kvl_shard, num_data, 16);
AT(kvl_shard, model, 24);
AT(kvl_shard, num_model, 32);
AT(kvl_shard, sequence, 40);
AT(kvl_shard, num_sequence, 48);

SIZE(kvl_attention_state, 96);
AT(kvl_attention_state, out, 0);
AT(kvl_attention_state, lse, 88);

SIZE(kvl_layout, 40);
AT(kvl_layout, struct_size, 0);
AT(kvl_layout, kind, 8);
AT(kvl_layout, sink_tokens, 12);
AT(kvl_layout, num_sequences, 16);
AT(kvl_layout, pages_per_sequence, 24);
AT(kvl_layout, table, 32);

SIZE(kvl_bit_mask, 112);
AT(kvl_bit_mask, struct_size, 0);
AT(kvl_bit_mask, data, 8);
AT(kvl_bit_mask, bytes, 16);
AT(kvl_bit_mask, offset, 24);
AT(kvl_bit_mask, shape, 32);
AT(kvl_bit_mask, strides, 64);
AT(kvl_bit_mask, first_keys, 88);
AT(kvl_bit_mask, bit_offsets, 96);
AT(kvl_bit_mask, query_strides, 104);

SIZE(kvl_attention_params, 704);
AT(kvl_attention_params, struct_size, 0);
AT(kvl_attention_params, q, 8);
AT(kvl_attention_params, k, 96);
AT(kvl_attention_params, v, 184);
AT(kvl_attention_params, out, 272);
AT(kvl_attention_params, lse, 360);
AT(kvl_attention_params, scale, 368);
AT(kvl_attention_params, softcap, 372);
AT(kvl_attention_params, flags, 376);
AT(kvl_attention_params, reserved, 380);
AT(kvl_attention_params, window_left, 384);
AT(kvl_attention_params, window_right, 392);
AT(kvl_attention_params, lengths, 400);
AT(kvl_attention_params, kv_starts, 408);
AT(kvl_attention_params, offsets, 416);
AT(kvl_attention_params, mask, 424);
AT(kvl_attention_params, bias, 504);
AT(kvl_attention_params, alibi_slopes, 592);
AT(kvl_attention_params, sink_logits, 600);
AT(kvl_attention_params, precision, 608);
AT(kvl_attention_params, reserved2, 612);
AT(kvl_attention_params, layout, 616);
AT(kvl_attention_params, cu_seqlens_q, 624);
AT(kvl_attention_params, num_sequences, 632);
AT(kvl_attention_params, prefix_lengths, 640);
AT(kvl_attention_params, bit_mask, 648);
AT(kvl_attention_params, plan, 656);
AT(kvl_attention_params, v_packing, 664);
AT(kvl_attention_params, reserved3, 668);
AT(kvl_attention_params, query_positions, 672);
AT(kvl_attention_params, scales, 680);
AT(kvl_attention_params, k_hadamard, 688);
AT(kvl_attention_params, v_hadamard, 696);

SIZE(kvl_chunk_states, 16);
AT(kvl_chunk_states, states, 0);
AT(kvl_chunk_states, len, 8);

SIZE(kvl_merge_chunks_params, 160);
AT(kvl_merge_chunks_params, struct_size, 0);
AT(kvl_merge_chunks_params, segments, 8);
AT(kvl_merge_chunks_params, num_segments, 16);
AT(kvl_merge_chunks_params, kv_heads, 24);
AT(kvl_merge_chunks_params, k_format, 32);
AT(kvl_merge_chunks_params, v_format, 36);
AT(kvl_merge_chunks_params, precision, 40);
AT(kvl_merge_chunks_params, reserved, 44);
AT(kvl_merge_chunks_params, sink_logits, 48);
AT(kvl_merge_chunks_params, out, 56);
AT(kvl_merge_chunks_params, lse, 144);
AT(kvl_merge_chunks_params, v_hadamard, 152);
#endif

VALUE(KVL_CONTEXT_FLAG_SATURATE_F16, 1);
VALUE(KVL_STATUS_OK, 0);
VALUE(KVL_STATUS_NULL_POINTER, 1);
VALUE(KVL_STATUS_STRUCT_SIZE, 2);
VALUE(KVL_STATUS_INVALID_ENUM, 3);
VALUE(KVL_STATUS_INVALID_VALUE, 4);
VALUE(KVL_STATUS_SHAPE, 5);
VALUE(KVL_STATUS_STRIDE, 6);
VALUE(KVL_STATUS_BOUNDS, 7);
VALUE(KVL_STATUS_CAPACITY, 8);
VALUE(KVL_STATUS_OUT_OF_RANGE, 9);
VALUE(KVL_STATUS_OVERLAP, 10);
VALUE(KVL_STATUS_DUPLICATE_SLOT, 11);
VALUE(KVL_STATUS_DTYPE, 12);
VALUE(KVL_STATUS_WORKSPACE, 13);
VALUE(KVL_STATUS_UNSUPPORTED, 14);
VALUE(KVL_STATUS_PARALLEL, 15);
VALUE(KVL_STATUS_INTERNAL, 16);
VALUE(KVL_DTYPE_F32, 0);
VALUE(KVL_DTYPE_F16, 1);
VALUE(KVL_DTYPE_BF16, 2);
VALUE(KVL_FORMAT_F32, 0);
VALUE(KVL_FORMAT_F16, 1);
VALUE(KVL_FORMAT_BF16, 2);
VALUE(KVL_FORMAT_INT8, 3);
VALUE(KVL_FORMAT_FP8_E4M3, 4);
VALUE(KVL_FORMAT_FP8_E5M2, 5);
VALUE(KVL_FORMAT_Q8_0, 6);
VALUE(KVL_FORMAT_Q4_0, 7);
VALUE(KVL_FORMAT_Q4_1, 8);
VALUE(KVL_FORMAT_Q5_0, 9);
VALUE(KVL_FORMAT_Q5_1, 10);
VALUE(KVL_FORMAT_IQ4_NL, 11);
VALUE(KVL_FORMAT_AFFINE8, 12);
VALUE(KVL_FORMAT_AFFINE4, 13);
VALUE(KVL_AFFINE_SIGNED, 1);
VALUE(KVL_AFFINE_OFFSET, 2);
VALUE(KVL_AFFINE_HIGH_FIRST, 4);
VALUE(KVL_AFFINE_MINIMUM, 8);
VALUE(KVL_AFFINE_SHIFT, 16);
VALUE(KVL_AFFINE_FIXED, 32);
VALUE(KVL_DTYPE_U8, 16);
VALUE(KVL_DTYPE_I8, 17);
VALUE(KVL_ISA_BEST, 0);
VALUE(KVL_ISA_SCALAR, 1);
VALUE(KVL_ISA_AVX2, 2);
VALUE(KVL_ISA_AVX512, 3);
VALUE(KVL_ISA_NEON, 4);
VALUE(KVL_ISA_AMX, 5);
VALUE(KVL_ISA_NEON_BF16, 6);
VALUE(KVL_ISA_AVX512_BF16, 7);
VALUE(KVL_ISA_AVX512_VNNI, 8);
VALUE(KVL_ISA_AVX_VNNI, 9);
VALUE(KVL_ISA_NEON_DOTPROD, 10);
VALUE(KVL_ISA_NEON_I8MM, 11);
VALUE(KVL_OP_ROPE_ANGLES, 0);
VALUE(KVL_OP_ROPE, 1);
VALUE(KVL_OP_KV_WRITE, 2);
VALUE(KVL_OP_REPEAT_KV, 3);
VALUE(KVL_OP_ATTENTION, 4);
VALUE(KVL_OP_MERGE_STATES, 5);
VALUE(KVL_OP_RMS_NORM, 6);
VALUE(KVL_OP_KV_READ, 7);
VALUE(KVL_OP_HADAMARD, 8);
VALUE(KVL_PRECISION_DEFAULT, 0);
VALUE(KVL_PRECISION_HIGH, 1);
VALUE(KVL_PRECISION_INTEGER, 2);
VALUE(KVL_LAYOUT_KIND_CONTIGUOUS, 0);
VALUE(KVL_LAYOUT_KIND_RING, 1);
VALUE(KVL_LAYOUT_KIND_PAGED, 2);
VALUE(KVL_LAYOUT_KIND_INDIRECT, 3);
VALUE(KVL_LAYOUT_KIND_RAGGED, 4);
VALUE(KVL_PACKING_ROWS, 0);
VALUE(KVL_PACKING_ROW_PAIRS, 1);
VALUE(KVL_PAIRING_INTERLEAVED, 0);
VALUE(KVL_PAIRING_HALF_SPLIT, 1);
VALUE(KVL_SPLIT_GRID, 1024);
VALUE(KVL_ROPE_SCALING_NONE, 0);
VALUE(KVL_ROPE_SCALING_LINEAR, 1);
VALUE(KVL_ROPE_SCALING_NTK, 2);
VALUE(KVL_ROPE_SCALING_LLAMA3, 3);
VALUE(KVL_ROPE_SCALING_YARN, 4);
VALUE(KVL_ROPE_SCALING_LONGROPE, 5);
VALUE(KVL_ATTENTION_FLAG_CAUSAL, 1);
VALUE(KVL_ATTENTION_FLAG_WINDOW_LEFT, 2);
VALUE(KVL_ATTENTION_FLAG_WINDOW_RIGHT, 4);

int main(void) { return 0; }
