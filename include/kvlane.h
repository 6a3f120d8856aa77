/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * kvlane: attention over a key/value cache for CPUs. Generated from src/capi of the sources; do not edit.
 *
 * A program makes one kvl_context, which chooses the kernels for the machine, and calls operations with it on its own memory:
 *
 *   kvl_rms_norm, kvl_rope, kvl_rms_norm_rope   normalise and rotate queries and keys
 *   kvl_kv_write                                writes new keys and values into a cache, with norm and rotation on the way
 *   kvl_kv_read                                 reads tokens of a cache back into plain tensors
 *   kvl_attention                               attention over a cache: prefill, chunks, decode
 *   kvl_plan_...                                the part of attention that is the same for all layers of a step
 *   kvl_attention_with_prefix                   attention over a prefix that all sequences share
 *   kvl_merge_states                            joins attention over disjoint keys
 *   kvl_cache_...                               lengths, sequences, tokens and pages of the caches of all layers
 *   kvl_shard_...                               parts of a cache that is spread over machines
 *   kvl_attention_chunks, kvl_merge_chunks      attention over such parts, with the bits of one machine
 *   kvl_pack_row_pairs, kvl_repeat_kv           copies for special needs
 *
 * The book of this API has a chapter and programs for every task: in the sources, sh include/book/build.sh writes it to
 * target/book/html/index.html.
 *
 * Conventions of all functions:
 * - Tensors are views: a pointer, an element type, and shape and strides over the axes batch, seq, heads, dim, in this
 *   order whatever their order in memory. Strides count elements. kvl_make_view and kvl_make_const_view fill in the strides
 *   of a tensor that lies in memory in the order of its axes; for any other order, the caller sets them.
 * - Structs that may grow begin with struct_size and are initialised by a macro KVL_..._INIT. All their other fields are
 *   then zero, which always stands for "the default" or "absent". Other structs never change.
 * - Numbers that are never negative are signed all the same: a negative one is an error, with a sentence.
 * - A function that can fail returns a kvl_status; kvl_last_error has the sentence. Everything is checked before the
 *   first byte is written. What cannot be checked is where pointers lead: a list has as many entries as its comment says,
 *   and lists, masks and biases do not change during a call.
 * - The library keeps no pointer after a call, allocates nothing in a call that computes, prints nothing and never exits. Its
 *   only state is contexts, plans, pools and the last error of each thread. It starts no thread unless it is asked for a pool.
 * - Operations run on the threads of a kvl_parallel_runner; a null one stands for the calling thread. No bit of a result
 *   depends on it.
 *
 * Versions: a program that was compiled with an older header runs with a newer library of the same major version. A program
 * that was compiled with a newer header runs with an older library as long as the fields that this library does not know are
 * zero; a field that is not is an error, KVL_STATUS_STRUCT_SIZE.
 *
 * Threads and processes:
 * - A thread that calls the library needs a stack of at least 96 KiB. Threads of a pool have 2 MiB.
 * - No function may be called from a signal handler. The threads of a pool block all signals, so that signals to the process
 *   arrive on the program's own threads.
 * - Threads do not survive fork. In the child, contexts, plans and caches work as before. Every function that is given a runner
 *   from a pool of the parent fails with KVL_STATUS_PARALLEL; such a pool may be destroyed, which releases only its handle; and
 *   the child may make a pool of its own. Data that another thread was writing when the process forked is undefined in the child.
 * - The library may be unloaded (dlclose) when all pools are destroyed and no call runs. Threads that have called it may live
 *   on, and the system may keep it loaded until they end.
 */
#ifndef KVLANE_H
#define KVLANE_H


#include <stddef.h>
#include <stdint.h>

/**
 * The version of the ABI that this header describes: `major * 65536 + minor`. A library of the same major version and
 * of this or a higher minor version serves it. The SONAME carries the major version.
 */
#define KVL_ABI_VERSION 4

/**
 * Success.
 */
#define KVL_STATUS_OK 0

/**
 * A pointer that must not be null is null.
 */
#define KVL_STATUS_NULL_POINTER 1

/**
 * A `struct_size` is unknown to the library, or a field that it does not know is not 0.
 */
#define KVL_STATUS_STRUCT_SIZE 2

/**
 * An integer is no value of its enumeration, or a reserved field is not 0.
 */
#define KVL_STATUS_INVALID_ENUM 3

/**
 * A number has no meaning for its argument (a scale of NaN, an odd `rotary_dim`), or arguments exclude each other.
 */
#define KVL_STATUS_INVALID_VALUE 4

/**
 * Shapes or list lengths do not fit each other, or an axis is negative.
 */
#define KVL_STATUS_SHAPE 5

/**
 * Strides let elements of an output share memory, or they overflow when multiplied by the shape.
 */
#define KVL_STATUS_STRIDE 6

/**
 * A view reaches outside its buffer, or a pointer is not aligned to its elements.
 */
#define KVL_STATUS_BOUNDS 7

/**
 * A cache has no room for the tokens.
 */
#define KVL_STATUS_CAPACITY 8

/**
 * A position, length, row, slot or page is outside its range.
 */
#define KVL_STATUS_OUT_OF_RANGE 9

/**
 * An output shares memory with an input or with another output.
 */
#define KVL_STATUS_OVERLAP 10

/**
 * Two tokens of one call have the same slot.
 */
#define KVL_STATUS_DUPLICATE_SLOT 11

/**
 * No kernel combines these element types.
 */
#define KVL_STATUS_DTYPE 12

/**
 * The workspace is too small or not aligned to 64 bytes.
 */
#define KVL_STATUS_WORKSPACE 13

/**
 * The machine or the build does not have it.
 */
#define KVL_STATUS_UNSUPPORTED 14

/**
 * The parallel runner did not run its tasks, or a thread pool was used after `fork`.
 */
#define KVL_STATUS_PARALLEL 15

/**
 * A bug in the library: it caught a panic.
 */
#define KVL_STATUS_INTERNAL 16

/**
 * IEEE 754 binary32.
 */
#define KVL_DTYPE_F32 0

/**
 * IEEE 754 binary16.
 */
#define KVL_DTYPE_F16 1

/**
 * bfloat16: the upper half of a binary32.
 */
#define KVL_DTYPE_BF16 2

/**
 * Unsigned bytes: zero points of affine caches alone.
 */
#define KVL_DTYPE_U8 16

/**
 * Signed bytes: the same.
 */
#define KVL_DTYPE_I8 17

/**
 * Elements of `KVL_DTYPE_F32`.
 */
#define KVL_FORMAT_F32 0

/**
 * Elements of `KVL_DTYPE_F16`.
 */
#define KVL_FORMAT_F16 1

/**
 * Elements of `KVL_DTYPE_BF16`.
 */
#define KVL_FORMAT_BF16 2

/**
 * Signed bytes from -127 to 127 with one scale per token and head: an element is its byte times that scale. The scales lie in a
 * tensor of their own; see `kvl_cache_scales`. Scales that a write computes are rounded to their type: to nearest, or up if they are
 * subnormal there, so that no element is clipped (f16 scales end at 65504). A head with NaN or infinity has the scale NaN.
 */
#define KVL_FORMAT_INT8 3

/**
 * A byte per element in the eight-bit float E4M3 without infinities (`e4m3fn`), times a static scale, f32 or f16, of its head or of
 * the tensor: see `kvl_cache_scales`. Writes divide by the scale and round to nearest, ties to even. Numbers above 448 in magnitude,
 * infinities included, become 448 with their sign, and NaN becomes 0x7f.
 */
#define KVL_FORMAT_FP8_E4M3 4

/**
 * The same in E5M2, the upper half of an f16, with numbers up to 57344. It has infinities, but writes make none: these become 57344
 * too.
 */
#define KVL_FORMAT_FP8_E5M2 5

/**
 * Units of 32 elements, the blocks of ggml's type of the same name, in 34 bytes: an f16 factor d, then 32 signed bytes q. Element i is
 * d q. Of this and the next five formats: a head has a multiple of 32 elements, whose units lie one after the other; `shape` counts
 * elements, `strides` count units, and that of dim is 1; data is aligned to 2 bytes. Products and sums are rounded to f32. Writes
 * give the bytes of ggml's reference quantiser; a unit with NaN or infinity reads as NaN.
 */
#define KVL_FORMAT_Q8_0 6

/**
 * 18 bytes: an f16 d, then 16 bytes whose low halves are q of elements 0 to 15, the high ones of 16 to 31. Element i is d (q - 8).
 */
#define KVL_FORMAT_Q4_0 7

/**
 * 20 bytes: f16 d, f16 m, 16 bytes as in `KVL_FORMAT_Q4_0`. Element i is d q + m.
 */
#define KVL_FORMAT_Q4_1 8

/**
 * 22 bytes: f16 d, 4 bytes of which bit i (from the lowest bit of the first byte on) is the fifth bit of q of element i, 16 bytes as in
 * `KVL_FORMAT_Q4_0`. Element i is d (q - 16).
 */
#define KVL_FORMAT_Q5_0 9

/**
 * 24 bytes: f16 d, f16 m, fifth bits and 16 bytes as in `KVL_FORMAT_Q5_0`. Element i is d q + m.
 */
#define KVL_FORMAT_Q5_1 10

/**
 * 18 bytes as in `KVL_FORMAT_Q4_0`. Element i is d times value q of the list -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38,
 * 53, 69, 89, 113.
 */
#define KVL_FORMAT_IQ4_NL 11

/**
 * A byte per element, an integer, of whose group `kvl_cache_scales` gives a scale and perhaps a zero point, and says how it lies. Of this
 * and the next format, units lie one after the other in a head: the stride of dim is 1.
 */
#define KVL_FORMAT_AFFINE8 12

/**
 * The same in four bits: a unit is a byte of two elements, of which a head has an even number. `shape` counts elements, `strides` count
 * bytes.
 */
#define KVL_FORMAT_AFFINE4 13

/**
 * The best level that the machine offers.
 */
#define KVL_ISA_BEST 0

/**
 * Portable code, available everywhere.
 */
#define KVL_ISA_SCALAR 1

/**
 * x86-64 with AVX2, FMA and F16C.
 */
#define KVL_ISA_AVX2 2

/**
 * x86-64 with AVX-512 F, BW, CD, DQ and VL.
 */
#define KVL_ISA_AVX512 3

/**
 * AArch64 with Advanced SIMD.
 */
#define KVL_ISA_NEON 4

/**
 * x86-64 with all features of `KVL_ISA_AVX512_BF16`, and AMX tiles with products of bf16 and int8. This level has kernels for attention
 * over bf16, and over int8 keys at `KVL_PRECISION_INTEGER`, alone and uses those of the levels below for everything else. It is
 * preferred to these.
 */
#define KVL_ISA_AMX 5

/**
 * AArch64 with all features of `KVL_ISA_NEON_I8MM`, and bf16 matrix products (FEAT_BF16). This level has kernels for
 * attention over bf16 alone and uses those of the levels below for everything else. It is preferred to these,
 * except on CPUs of Apple.
 */
#define KVL_ISA_NEON_BF16 6

/**
 * x86-64 with all features of `KVL_ISA_AVX512`, and BF16 products (AVX512-BF16). This level has kernels for attention over bf16
 * alone and uses those of `KVL_ISA_AVX512` for everything else. It is preferred to that level on CPUs of AMD; on others it serves
 * where it is asked for.
 */
#define KVL_ISA_AVX512_BF16 7

/**
 * x86-64 with the features of `KVL_ISA_AVX512`, and AVX512-VNNI. Attention over keys in int8 and in blocks at `KVL_PRECISION_INTEGER` only;
 * the other kernels are those of `KVL_ISA_AVX512`.
 */
#define KVL_ISA_AVX512_VNNI 8

/**
 * x86-64 with the features of `KVL_ISA_AVX2`, and AVX-VNNI. As `KVL_ISA_AVX512_VNNI`, above AVX2.
 */
#define KVL_ISA_AVX_VNNI 9

/**
 * AArch64 with the features of `KVL_ISA_NEON`, and FEAT_DotProd. As `KVL_ISA_AVX512_VNNI`, above NEON.
 */
#define KVL_ISA_NEON_DOTPROD 10

/**
 * AArch64 with the features of `KVL_ISA_NEON_DOTPROD`, and matrix products of bytes (FEAT_I8MM), which serve two query rows and more. As
 * `KVL_ISA_AVX512_VNNI`, above NEON.
 */
#define KVL_ISA_NEON_I8MM 11

/**
 * Cosines and sines of RoPE angles. Types: `KVL_FORMAT_F32` twice.
 */
#define KVL_OP_ROPE_ANGLES 0

/**
 * RoPE, alone or on the way into a cache. Types: source, target.
 */
#define KVL_OP_ROPE 1

/**
 * The cache write. Types: source, target.
 */
#define KVL_OP_KV_WRITE 2

/**
 * The explicit repeat of KV heads. Types: one type twice.
 */
#define KVL_OP_REPEAT_KV 3

/**
 * Attention over a cache. Types: the format of K or of V, twice. Queries and outputs may have any type.
 */
#define KVL_OP_ATTENTION 4

/**
 * The merge of attention states. Types: one type twice.
 */
#define KVL_OP_MERGE_STATES 5

/**
 * RMS norm of heads, alone or on the way to RoPE or into a cache. Types: source, target.
 */
#define KVL_OP_RMS_NORM 6

/**
 * The read of a quantised cache into plain tensors. Types: source format, target.
 */
#define KVL_OP_KV_READ 7

/**
 * The Hadamard rotation of heads, alone or on the way into a cache or out of it. Types: source, target.
 */
#define KVL_OP_HADAMARD 8

/**
 * The fastest kernel. Over a bf16 cache, softmax weights are rounded to bf16 at `KVL_ISA_AVX512_BF16`, `KVL_ISA_AMX` and
 * `KVL_ISA_NEON_BF16`: an error of at most 2^-8 of the largest visible value. `KVL_ISA_AVX512_BF16` and `KVL_ISA_NEON_BF16` also take
 * queries in f32 to 16 significant bits, so that a logit errs by at most 2^-16 of the sum of the magnitudes of its products.
 */
#define KVL_PRECISION_DEFAULT 0

/**
 * What f32 arithmetic gives: queries are taken whole, and weights have at least 16 significant bits.
 */
#define KVL_PRECISION_HIGH 1

/**
 * Over keys in int8 or in blocks, queries are rounded to int8, with a scale a row, and products are added up as integers, at the
 * levels that have kernels for it (`KVL_ISA_AVX_VNNI`, `KVL_ISA_AVX512_VNNI`, `KVL_ISA_NEON_DOTPROD`, those that include the last two,
 * and over blocks of four and five bits `KVL_ISA_AVX2`): of a logit's error, at most half of a row's scale times the sum of the
 * magnitudes of the key's elements is due to it. With four query heads per KV head and more, `KVL_ISA_AVX512_VNNI` also rounds the
 * weights of values in int8 and in blocks, to 65534ths of the largest among 64 keys (in blocks, of the largest weight times the
 * largest factor): an error of at most 2^-10 of the largest magnitude of their elements (2^-9 in q4_1 and q5_1). Where there is no
 * such kernel, this is `KVL_PRECISION_DEFAULT`.
 */
#define KVL_PRECISION_INTEGER 2

/**
 * Operations that convert to f16 saturate: a number beyond 65504, the largest finite f16, becomes 65504 with its sign.
 * Infinities do too, and NaN stays NaN. Without this flag such a number becomes an infinity, as IEEE 754 rounds it, and
 * the softmax of a row that meets it in the cache becomes NaN. The flag holds for `kvl_rope`, `kvl_rms_norm`,
 * `kvl_rms_norm_rope`, `kvl_kv_write` and the `kvl_cache_...` functions that convert or rotate keys and values. What is
 * f16 already is copied with all its bits. Outputs of attention and of `kvl_merge_states` are means of values, and are
 * rounded.
 */
#define KVL_CONTEXT_FLAG_SATURATE_F16 1

/**
 * As the library does it on this CPU.
 */
#define KVL_PREFETCH_DEFAULT 0

/**
 * Nothing is prefetched.
 */
#define KVL_PREFETCH_OFF 1

/**
 * Into the first-level cache.
 */
#define KVL_PREFETCH_FIRST_LEVEL 2

/**
 * Into the second-level cache.
 */
#define KVL_PREFETCH_SECOND_LEVEL 3

/**
 * Into the second-level cache, and those 512 bytes ahead into the first-level cache.
 */
#define KVL_PREFETCH_BOTH_LEVELS 4

/**
 * As `KVL_PREFETCH_BOTH_LEVELS`, with one prefetch for two lines into the second-level cache.
 */
#define KVL_PREFETCH_BOTH_LEVELS_IN_PAIRS 5

/**
 * Into the first-level cache, what the same KV head has a few keys later.
 */
#define KVL_PREFETCH_NEXT_KEYS 6

/**
 * As the library does it on this CPU.
 */
#define KVL_KEY_ORDER_DEFAULT 0

/**
 * Keys that are multiplied side by side are neighbours.
 */
#define KVL_KEY_ORDER_SEQUENTIAL 1

/**
 * Keys that are multiplied side by side are as far apart as the block allows.
 */
#define KVL_KEY_ORDER_SPREAD 2

/**
 * As the library does it on this CPU.
 */
#define KVL_SCORE_TILES_DEFAULT 0

/**
 * One vector of keys, and four lanes of the scores side by side.
 */
#define KVL_SCORE_TILES_NARROW 1

/**
 * Four vectors of keys, and copies of the queries.
 */
#define KVL_SCORE_TILES_WIDE 2

/**
 * Integers from -128 to 127, or from -8 to 7, in two's complement.
 */
#define KVL_AFFINE_SIGNED 1

/**
 * The same integers, each of which lies as the unsigned one that is 128, or 8, greater.
 */
#define KVL_AFFINE_OFFSET 2

/**
 * The even one of two elements lies in the high half of a byte.
 */
#define KVL_AFFINE_HIGH_FIRST 4

/**
 * Zero points are floats that are added to products: q * scale + zero.
 */
#define KVL_AFFINE_MINIMUM 8

/**
 * Zero points are floats that are subtracted from products: q * scale - zero.
 */
#define KVL_AFFINE_SHIFT 16

/**
 * Writes read scales and zero points instead of computing them.
 */
#define KVL_AFFINE_FIXED 32

/**
 * Elements 2i and 2i + 1: the original paper, Meta's Llama code, llama.cpp's Llama files.
 */
#define KVL_PAIRING_INTERLEAVED 0

/**
 * Elements i and i + rotary_dim / 2: GPT-NeoX, Grok-1, Hugging Face.
 */
#define KVL_PAIRING_HALF_SPLIT 1

/**
 * No scaling: `f_i = base^(-2i / rotary_dim)`.
 */
#define KVL_ROPE_SCALING_NONE 0

/**
 * `f_i / factor`. Reads `factor`.
 */
#define KVL_ROPE_SCALING_LINEAR 1

/**
 * The base becomes `base * factor^(rotary_dim / (rotary_dim - 2))`. Reads `factor`.
 */
#define KVL_ROPE_SCALING_NTK 2

/**
 * Llama 3.1: long wavelengths are divided by `factor`, short ones are kept, and those between are blended. Reads
 * `factor`, `low_freq_factor`, `high_freq_factor`, `original_max_position`.
 */
#define KVL_ROPE_SCALING_LLAMA3 3

/**
 * YaRN: a ramp between interpolation and extrapolation over the pairs. Reads `factor`, `original_max_position`,
 * `beta_fast`, `beta_slow`, `attention_factor`, `keep_ramp`.
 */
#define KVL_ROPE_SCALING_YARN 4

/**
 * LongRoPE: `f_i / factors[i]`. Reads `factors`, `attention_factor` and, if that is 0, `factor` and
 * `original_max_position`.
 */
#define KVL_ROPE_SCALING_LONGROPE 5

/**
 * Caches are [sequences, capacity, kv_heads, dim]. Position p of sequence b lies in row b, slot p.
 */
#define KVL_LAYOUT_KIND_CONTIGUOUS 0

/**
 * As `KVL_LAYOUT_KIND_CONTIGUOUS`, but a sequence keeps its first `sink_tokens` tokens and its newest ones only:
 * position p lies in slot p while p < sink_tokens, and from there on in slot `sink_tokens + (p - sink_tokens) %
 * (capacity - sink_tokens)`. Lengths count every token that a sequence was given. A call of n queries with a left
 * window of w needs w + n slots besides those of the sink tokens.
 */
#define KVL_LAYOUT_KIND_RING 1

/**
 * Caches are pools [pages, page_size, kv_heads, dim]. Position p of sequence b lies in page `table[b *
 * pages_per_sequence + p / page_size]`, slot p % page_size. Sequences may share pages that none of them writes. NHD
 * and HND differ in their strides only.
 */
#define KVL_LAYOUT_KIND_PAGED 2

/**
 * Beam search without copies: caches are [sequences, capacity, kv_heads, dim]. Position p of sequence b lies in row
 * `table[b * capacity + p]`, slot p.
 */
#define KVL_LAYOUT_KIND_INDIRECT 3

/**
 * Sequences of different lengths lie one after another: caches are [1, tokens, kv_heads, dim]. Position p of sequence
 * b lies in slot `table[b] + p`, and sequence b ends at `table[b + 1]`.
 */
#define KVL_LAYOUT_KIND_RAGGED 4

/**
 * Every slot by itself: [batch, slots, kv_heads, v_dim].
 */
#define KVL_PACKING_ROWS 0

/**
 * Two slots interleaved, as instructions that multiply tiles of 16-bit numbers read them: [batch, slots / 2, kv_heads,
 * 2 * v_dim], in which element 2d + i of pair s is element d of slot 2s + i. The slots of a sequence (or of a page),
 * the sink tokens of a ring and the first slots of ragged sequences are even. Only for plain elements: values in `KVL_FORMAT_INT8` are
 * never packed, and `kvl_context_v_packing` says so; a call that asks for it is `KVL_STATUS_UNSUPPORTED`.
 */
#define KVL_PACKING_ROW_PAIRS 1

/**
 * No key after the query's own position is visible.
 */
#define KVL_ATTENTION_FLAG_CAUSAL 1

/**
 * Keys more than `window_left` before the query's own position are masked.
 */
#define KVL_ATTENTION_FLAG_WINDOW_LEFT 2

/**
 * Keys more than `window_right` after the query's own position are masked.
 */
#define KVL_ATTENTION_FLAG_WINDOW_RIGHT 4

/**
 * The unit in which attention computes keys: segments of a sequence begin and end at multiples of it.
 */
#define KVL_SPLIT_GRID 1024

/**
 * The kernels that were chosen for the machine. Made by `kvl_context_create`, and immutable.
 */
typedef struct kvl_context kvl_context;

/**
 * The part of an attention call that is the same for all layers of a step: lengths, positions, windows, masks and
 * tables, checked and worked out once. Made by `kvl_plan_create`.
 */
typedef struct kvl_plan kvl_plan;

/**
 * A pool of threads. Made by `kvl_thread_pool_create`.
 */
typedef struct kvl_thread_pool kvl_thread_pool;

/**
 * The result of a call: 0, or one of `KVL_STATUS_*`. Values are never changed or reused. When it is not 0,
 * `kvl_last_error` has the sentence, and no output has been written, except with `KVL_STATUS_PARALLEL` and
 * `KVL_STATUS_INTERNAL`.
 */
typedef int32_t kvl_status;

/**
 * A level of instruction sets.
 */
typedef int32_t kvl_isa;

/**
 * An operation. Kernels are chosen by operation and element types.
 */
typedef int32_t kvl_op;

/**
 * What the keys or the values of a cache are stored as. The first three values are those of `kvl_dtype`.
 */
typedef int32_t kvl_format;

/**
 * A kernel of the library. Start from `KVL_KERNEL_INFO_INIT`.
 */
typedef struct kvl_kernel_info {
    /**
     * `sizeof(kvl_kernel_info)`.
     */
    size_t struct_size;
    /**
     * `<op>_<types>_<isa>`; a constant.
     */
    const char *name;
    /**
     * Its operation.
     */
    kvl_op op;
    /**
     * The first of its types; see `kvl_op`.
     */
    kvl_format src;
    /**
     * The second of its types.
     */
    kvl_format dst;
    /**
     * Its level.
     */
    kvl_isa isa;
    /**
     * 1 if this machine can run it, 0 if not.
     */
    int32_t available;
    /**
     * The largest error against exact arithmetic on the same inputs with f32 output, as a fraction of the largest
     * magnitude that enters the result (of V in attention). Rounding to a narrower output type adds to it. In
     * attention it grows in proportion with logits beyond 32 (ALiBi and bias included), since f32 rounds them to 2^-24
     * of their magnitude.
     */
    float max_error;
} kvl_kernel_info;

/**
 * Options of a context that are on or off.
 */
typedef uint32_t kvl_context_flag;

/**
 * Options of a context. Start from `KVL_CONTEXT_PARAMS_INIT`.
 */
typedef struct kvl_context_params {
    /**
     * `sizeof(kvl_context_params)`.
     */
    size_t struct_size;
    /**
     * The highest level to use, or 0 (`KVL_ISA_BEST`) for no limit. The environment variable `KVLANE_MAX_ISA`
     * (`scalar`, `avx2`, ...) can lower it further. Neither can raise the level.
     */
    kvl_isa max_isa;
    /**
     * A sum of `KVL_CONTEXT_FLAG_*`.
     */
    kvl_context_flag flags;
} kvl_context_params;

/**
 * The precision of attention, for levels that have kernels of more than one.
 */
typedef int32_t kvl_precision;

/**
 * How the values of neighbouring slots lie in a cache.
 */
typedef int32_t kvl_packing;

/**
 * Into which cache of the CPU lines are prefetched.
 */
typedef int32_t kvl_prefetch;

/**
 * The order in which a loop reads the keys of a block.
 */
typedef int32_t kvl_key_order;

/**
 * The tiles of registers in which six query rows are multiplied by keys.
 */
typedef int32_t kvl_score_tiles;

/**
 * How attention of few query rows prefetches keys and values, in which order it reads keys, and in which registers prompts compute
 * scores. It changes the time of a call, and no bit of its result. `kvlane tune` measures which is best. Start from `KVL_TUNING_INIT`;
 * zero means the library's choice for this CPU. The levels of matrix products prefetch in ways of their own.
 */
typedef struct kvl_tuning {
    /**
     * `sizeof(kvl_tuning)`.
     */
    size_t struct_size;
    /**
     * Prefetches where the keys of one KV head are read, a block of 64 at a time: the next block is prefetched. Prompts prefetch
     * two lines at a time if this is `KVL_PREFETCH_BOTH_LEVELS_IN_PAIRS`.
     */
    kvl_prefetch block;
    /**
     * The order in which the keys of such a block are read.
     */
    kvl_key_order block_order;
    /**
     * Prefetches where the heads of a token are read together, in the order of memory.
     */
    kvl_prefetch run;
    /**
     * The same where every KV head has one query row. Keys and values of at most 64 bytes, and blocks, go by `run` nevertheless.
     */
    kvl_prefetch run_one_row;
    /**
     * Bytes from what is read to what `run`, `run_one_row` and `run_long_heads` prefetch, at most a block of 64 keys.
     */
    size_t run_distance;
    /**
     * As `run` where a KV head has several query rows and a key or value 512 bytes or more.
     */
    kvl_prefetch run_long_heads;
    /**
     * The tiles of registers in which prompts compute scores at the level AVX-512. Other levels have one kind.
     */
    kvl_score_tiles score_tiles;
} kvl_tuning;

/**
 * Runs the tasks of an operation on threads of the caller's. Start from `KVL_PARALLEL_RUNNER_INIT`.
 *
 * `run` calls `task(task_ctx, i)` exactly once for every i in 0 .. n, on any threads and in any order, and returns 0 after all of
 * these calls have returned. It returns another number if it could not run them. It must not unwind (no C++ exception, no
 * longjmp). `n` is at most `num_threads`. No bit of a result depends on the runner.
 */
typedef struct kvl_parallel_runner {
    /**
     * `sizeof(kvl_parallel_runner)`.
     */
    size_t struct_size;
    /**
     * The first argument of `run`.
     */
    void *ctx;
    /**
     * How many tasks can run at the same time, at least 1.
     */
    size_t num_threads;
    /**
     * Runs `n` tasks.
     */
    int32_t (*run)(void *ctx, size_t n, void (*task)(void *task_ctx, size_t i), void *task_ctx);
} kvl_parallel_runner;

/**
 * How RoPE frequencies are scaled for contexts longer than in training.
 */
typedef int32_t kvl_rope_scaling;

/**
 * Parameters of RoPE frequencies. Start from `KVL_ROPE_FREQUENCIES_PARAMS_INIT`, set `rotary_dim`, `base` and the
 * fields that the `scaling` reads.
 */
typedef struct kvl_rope_frequencies_params {
    /**
     * `sizeof(kvl_rope_frequencies_params)`.
     */
    size_t struct_size;
    /**
     * The number of leading elements of a head that are rotated; even, 2 to 4096.
     */
    int64_t rotary_dim;
    /**
     * The base; 0 stands for 10000.
     */
    double base;
    /**
     * The kind of scaling.
     */
    kvl_rope_scaling scaling;
    /**
     * YaRN: 0 rounds the ends of the ramp outwards to whole pairs, as most sources do; 1 keeps them.
     */
    int32_t keep_ramp;
    /**
     * The ratio of the context length to that of training.
     */
    double factor;
    /**
     * The context length of training, in tokens.
     */
    double original_max_position;
    /**
     * Llama 3.1: wavelengths above `original_max_position / low_freq_factor` are divided by `factor`; 0 stands for 1.
     */
    double low_freq_factor;
    /**
     * Llama 3.1: wavelengths below `original_max_position / high_freq_factor` are kept; 0 stands for 4.
     */
    double high_freq_factor;
    /**
     * YaRN: pairs that rotate more often than this over the original length are kept; 0 stands for the paper's 32.
     */
    double beta_fast;
    /**
     * YaRN: pairs that rotate less often than this over the original length are divided by `factor`; 0 stands for the
     * paper's 1.
     */
    double beta_slow;
    /**
     * YaRN and LongRoPE: factor on cosines and sines. 0 stands for the paper's: `0.1 ln(factor) + 1`, and `sqrt(1 +
     * ln(factor) / ln(original_max_position))`. Sources disagree about that of YaRN, so give the model's own where it
     * states one.
     */
    double attention_factor;
    /**
     * LongRoPE: `rotary_dim / 2` divisors. Which of a model's two lists applies depends on the length of the text.
     */
    const double *factors;
} kvl_rope_frequencies_params;

/**
 * The type of the elements of a tensor.
 */
typedef int32_t kvl_dtype;

/**
 * A tensor in the caller's memory that is read. As `kvl_view`, but strides may be 0, and elements may share memory.
 */
typedef struct kvl_const_view {
    /**
     * Element [0, 0, 0, 0].
     */
    const void *data;
    /**
     * The type of the elements; of the keys and the values of a cache, its `kvl_format`.
     */
    kvl_dtype dtype;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * Elements along each axis; at most 2^31 - 1.
     */
    int64_t shape[4];
    /**
     * Distance between neighbours along each axis, in elements (of a cache, in units of its format).
     */
    int64_t strides[4];
    /**
     * Bytes from `data` to the end of the buffer; 0 if unknown.
     */
    size_t bytes;
} kvl_const_view;

/**
 * A tensor in the caller's memory that is written. The axes are always batch, seq, heads, dim; strides give their
 * order in memory. Element [b, s, h, d] is at `data + element_size * (b * strides[0] + s * strides[1] + h * strides[2]
 * + d * strides[3])`.
 *
 * In a cache of blocks (`KVL_FORMAT_Q8_0` and those after it), b, s, h and d lead to unit d of the head in the same way, by the bytes of
 * a unit; each holds 32 of the elements that `shape` counts.
 *
 * `data` is aligned to the size of an element, or to 2 bytes in a cache of blocks. Strides may be negative. No two elements of a written
 * view share memory, and nothing outside the elements is ever read or written. A view whose bytes are all 0 is absent.
 */
typedef struct kvl_view {
    /**
     * Element [0, 0, 0, 0].
     */
    void *data;
    /**
     * The type of the elements; of the keys and the values of a cache, its `kvl_format`.
     */
    kvl_dtype dtype;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * Elements along each axis; at most 2^31 - 1.
     */
    int64_t shape[4];
    /**
     * Distance between neighbours along each axis, in elements (of a cache, in units of its format).
     */
    int64_t strides[4];
    /**
     * Bytes from `data` to the end of the buffer, against which shape and strides are checked; 0 if unknown. If it is
     * given, strides must not reach before `data`.
     */
    size_t bytes;
} kvl_view;

/**
 * Which elements of a head form a pair that RoPE rotates.
 */
typedef int32_t kvl_pairing;

/**
 * A rotation. Start from `KVL_ROPE_PARAMS_INIT`, set `rotary_dim`, either `inv_freq` or both `cos` and `sin`, and
 * either `offsets` or `positions`.
 */
typedef struct kvl_rope_params {
    /**
     * `sizeof(kvl_rope_params)`.
     */
    size_t struct_size;
    /**
     * Which elements form a pair.
     */
    kvl_pairing pairing;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * The number of leading elements of a head that are rotated; the others are copied. Even, 2 to 4096, at most dim.
     */
    int64_t rotary_dim;
    /**
     * [rotary_dim / 2] in radians per position, from `kvl_rope_frequencies` or elsewhere. Angles are computed and
     * reduced in f64.
     */
    const double *inv_freq;
    /**
     * Factor on cosines and sines, with `inv_freq`; 0 stands for 1.
     */
    double magnitude;
    /**
     * [table_rows, rotary_dim / 2] cosines, instead of `inv_freq`. Row p is of position p.
     */
    const float *cos;
    /**
     * [table_rows, rotary_dim / 2] sines.
     */
    const float *sin;
    /**
     * The number of rows of `cos` and of `sin`.
     */
    int64_t table_rows;
    /**
     * [batch]: token t of sequence b is at position `offsets[b] + t`. With `inv_freq`, positions may be negative.
     */
    const int32_t *offsets;
    /**
     * [batch, seq]: the position of every token, instead of `offsets`.
     */
    const int32_t *positions;
    /**
     * In `kvl_cache_evict` and `kvl_cache_evict_running`, the block of the Hadamard rotation that followed when keys were written
     * (`kvl_kv_write_params.k_hadamard`); 0 for none. Elsewhere 0.
     */
    int64_t k_hadamard;
} kvl_rope_params;

/**
 * RMS norm: `y = x * weight / sqrt(mean(x^2) + eps)`, for each head of each token. Start from
 * `KVL_RMS_NORM_PARAMS_INIT`.
 */
typedef struct kvl_rms_norm_params {
    /**
     * `sizeof(kvl_rms_norm_params)`.
     */
    size_t struct_size;
    /**
     * [dim], the same for all heads; null for all 1. For models that add 1 to their weights (Gemma), the caller adds
     * it.
     */
    const float *weight;
    /**
     * The number that is added to the mean of the squares; 0 stands for 1e-6.
     */
    float eps;
    /**
     * 0.
     */
    int32_t reserved;
} kvl_rms_norm_params;

/**
 * In which slots of a cache the tokens of a sequence lie.
 */
typedef int32_t kvl_layout_kind;

/**
 * In which slots of a cache the tokens of its sequences lie. Start from `KVL_LAYOUT_INIT`, which is contiguous.
 */
typedef struct kvl_layout {
    /**
     * `sizeof(kvl_layout)`.
     */
    size_t struct_size;
    /**
     * The kind of layout.
     */
    kvl_layout_kind kind;
    /**
     * `KVL_LAYOUT_KIND_RING`: how many of the first tokens of a sequence are never overwritten, less than the
     * capacity. Else 0.
     */
    int32_t sink_tokens;
    /**
     * The number of sequences in the table. Without a table it is not read.
     */
    int64_t num_sequences;
    /**
     * `KVL_LAYOUT_KIND_PAGED`: entries of the table per sequence. Else 0.
     */
    int64_t pages_per_sequence;
    /**
     * `KVL_LAYOUT_KIND_PAGED`: the page table [num_sequences, pages_per_sequence], whose entries beyond the length of
     * a sequence are not read. `KVL_LAYOUT_KIND_INDIRECT`: the beam table [num_sequences, capacity].
     * `KVL_LAYOUT_KIND_RAGGED`: cumulative lengths (`cu_seqlens`) [num_sequences + 1], ascending. Else null.
     */
    const int32_t *table;
} kvl_layout;

/**
 * What `kvl_cache_scales.k_affine` and `v_affine` are sums of. 0 stands for unsigned integers, the even one of two elements in the low
 * half of a byte, and zero points that are subtracted from integers: an element is (q - zero) * scale, each operation rounded to f32.
 */
typedef uint32_t kvl_affine;

/**
 * Where the scales of a cache lie, for formats that have scales. Start from `KVL_CACHE_SCALES_INIT`.
 *
 * `KVL_FORMAT_INT8` has one scale per token and head, f32 or f16: a view [batch, seq, kv_heads, 1] whose first two axes are those
 * of the units (so that a layout applies to both), with strides of its own. Attention only reads scales; `kvl_kv_write` and the
 * functions that copy tokens write them too.
 *
 * `KVL_FORMAT_FP8_E4M3` and `KVL_FORMAT_FP8_E5M2` have static scales, which every function reads and none writes: a view of the same
 * shape whose strides are 0 along the first two axes, and along kv_heads too where one scale serves the tensor. Absent, they are 1.
 * Every call on the same units must be given the same scales. Views of a call may share them.
 * `KVL_FORMAT_AFFINE8` and `KVL_FORMAT_AFFINE4` have scales of f32, f16 or bf16, and perhaps zero points, whose shape says which elements
 * share them: each axis has 1 entry, or as many as the units, or along seq and dim a number that divides that of the units, so that
 * as many neighbours share each. A scale for each token and head is [batch, seq, kv_heads, 1], one for each channel
 * [1, 1, kv_heads, dim], one for each channel and 32 tokens [batch, seq / 32, kv_heads, dim]. Scales may lie between the units. Writes
 * compute scales and zero points, which then belong to one sequence or page and one head, and tokens that share them are written in
 * one call; with `KVL_AFFINE_FIXED` they read them. Moved one by one, tokens that come to share scales are quantised again, and those
 * that go to other fixed scales too.
 */
typedef struct kvl_cache_scales {
    /**
     * `sizeof(kvl_cache_scales)`.
     */
    size_t struct_size;
    /**
     * The scales of the keys; absent if their format has none, or static ones of 1.
     */
    struct kvl_view k;
    /**
     * The scales of the values; absent if their format has none, or static ones of 1.
     */
    struct kvl_view v;
    /**
     * The zero points of the keys, in the shape of their scales, for affine formats; absent for none. Its `dtype` is a `kvl_dtype`,
     * `KVL_DTYPE_U8` or `KVL_DTYPE_I8`.
     */
    struct kvl_view k_zeros;
    /**
     * The zero points of the values.
     */
    struct kvl_view v_zeros;
    /**
     * How the integers of the keys lie and what zero points are, for affine formats: a sum of `KVL_AFFINE_*`. Else 0.
     */
    kvl_affine k_affine;
    /**
     * The same for the values.
     */
    kvl_affine v_affine;
} kvl_cache_scales;

/**
 * New keys and values, their caches and their places. Start from `KVL_KV_WRITE_PARAMS_INIT`, set `k`, `k_cache`,
 * usually `v` and `v_cache`, and either `positions` or `slots`.
 */
typedef struct kvl_kv_write_params {
    /**
     * `sizeof(kvl_kv_write_params)`.
     */
    size_t struct_size;
    /**
     * New keys [batch, seq, kv_heads, dim].
     */
    struct kvl_const_view k;
    /**
     * New values [batch, seq, kv_heads, v_dim]. Absent together with `v_cache` to write keys alone.
     */
    struct kvl_const_view v;
    /**
     * The cache of keys: [sequences, capacity, kv_heads, dim], or what `layout` makes of the first two axes; of any
     * type.
     */
    struct kvl_view k_cache;
    /**
     * The cache of values: [sequences, capacity, kv_heads, v_dim], or what `layout` and `v_packing` make of it; of any
     * type.
     */
    struct kvl_view v_cache;
    /**
     * [batch]: token t of sequence b is written to position `positions[b] + t` of its row of the cache.
     */
    const int32_t *positions;
    /**
     * [batch]: only the first `counts[b]` tokens of sequence b are written (padded prompts); null for all.
     */
    const int32_t *counts;
    /**
     * [batch]: sequence b of the call is sequence `sequences[b]` of the cache; null for the same.
     */
    const int32_t *sequences;
    /**
     * [batch, seq]: the slot of each token in the row of its sequence, instead of `positions`; -1 skips a token. With
     * `KVL_LAYOUT_KIND_PAGED` and `KVL_LAYOUT_KIND_RAGGED`, slots count over the whole pool, page by page; the layout's
     * table is not read, and `sequences` must be null.
     */
    const int32_t *slots;
    /**
     * Rotates the keys before they are written; null for no rotation. The bits are those of `kvl_rope` into a view of
     * the cache's type.
     */
    const struct kvl_rope_params *rope;
    /**
     * The slots of positions; null for `KVL_LAYOUT_KIND_CONTIGUOUS`. One call gives a sequence of a ring at most as
     * many tokens as the ring has slots besides its sink tokens. `KVL_LAYOUT_KIND_INDIRECT` cannot be written: write
     * to the token's own row, and set the entry of the table.
     */
    const struct kvl_layout *layout;
    /**
     * Normalises the heads of the keys before they are rotated; null for no norm. The bits are those of `kvl_rms_norm`
     * into f32 first.
     */
    const struct kvl_rms_norm_params *k_norm;
    /**
     * How values lie in `v_cache`. `kvl_context_v_packing` states the best packing for attention.
     */
    kvl_packing v_packing;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * The scales of `k_cache` and `v_cache`, for formats that have scales, which are written too; null for none.
     */
    const struct kvl_cache_scales *scales;
    /**
     * The block of the Hadamard rotation of the keys, after `rope`; 0 for none. `kvl_hadamard_block` gives the largest block.
     * `kvl_attention_params.k_hadamard` has to agree.
     */
    int64_t k_hadamard;
    /**
     * The same for the values.
     */
    int64_t v_hadamard;
} kvl_kv_write_params;

/**
 * Caches, the tokens of them that are read, and the tensors that they go to. Start from `KVL_KV_READ_PARAMS_INIT`, set
 * `k_cache`, `k`, usually `v_cache` and `v`, and `positions`.
 */
typedef struct kvl_kv_read_params {
    /**
     * `sizeof(kvl_kv_read_params)`.
     */
    size_t struct_size;
    /**
     * The cache of keys: [sequences, capacity, kv_heads, dim], or what `layout` makes of the first two axes; in any format.
     */
    struct kvl_const_view k_cache;
    /**
     * The cache of values: [sequences, capacity, kv_heads, v_dim], or what `layout` and `v_packing` make of it; in any format. Absent
     * together with `v` to read keys alone.
     */
    struct kvl_const_view v_cache;
    /**
     * Keys [batch, seq, kv_heads, dim], of any type.
     */
    struct kvl_view k;
    /**
     * Values [batch, seq, kv_heads, v_dim], of any type.
     */
    struct kvl_view v;
    /**
     * [batch]: token t of sequence b is the one at position `positions[b] + t` of its sequence of the cache.
     */
    const int32_t *positions;
    /**
     * [batch]: only the first `counts[b]` tokens of sequence b are read, and later ones of the target are not written; null for all.
     */
    const int32_t *counts;
    /**
     * [batch]: sequence b of the call is sequence `sequences[b]` of the cache; null for the same. A sequence may be read several
     * times.
     */
    const int32_t *sequences;
    /**
     * The slots of positions; null for `KVL_LAYOUT_KIND_CONTIGUOUS`. One call reads at most as many tokens of a sequence of a ring as
     * the ring has slots; the caller knows which of them it still holds.
     */
    const struct kvl_layout *layout;
    /**
     * The scales of `k_cache` and `v_cache`, for formats that have scales; null for none.
     */
    const struct kvl_cache_scales *scales;
    /**
     * How values lie in `v_cache`.
     */
    kvl_packing v_packing;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * The block of the Hadamard rotation that the keys were written with, which is undone; 0 for none.
     */
    int64_t k_hadamard;
    /**
     * The same for the values.
     */
    int64_t v_hadamard;
} kvl_kv_read_params;

/**
 * What `kvl_attention_params.flags` is a sum of.
 */
typedef uint32_t kvl_attention_flag;

/**
 * A boolean mask [batch, seq, heads, keys] of bytes: 0 masks a key for a query, any other value leaves it visible.
 * Axes of one entry broadcast, and so do strides of 0. A mask whose bytes are all 0 is absent.
 */
typedef struct kvl_mask {
    /**
     * Entry [0, 0, 0, 0].
     */
    const uint8_t *data;
    /**
     * Entries along each axis.
     */
    int64_t shape[4];
    /**
     * Distance between neighbours along each axis, in bytes. Not used along axes of one entry.
     */
    int64_t strides[4];
    /**
     * Bytes from `data` to the end of the buffer; 0 if unknown.
     */
    size_t bytes;
} kvl_mask;

/**
 * A mask [batch, seq, heads, keys] with one bit per query and key: 0 masks a key for a query, 1 leaves it visible. The
 * lowest bit of a byte is the first, and the bits of neighbouring keys are neighbours. Axes of batch, seq and heads of
 * one entry broadcast, and so do strides of 0. Start from `KVL_BIT_MASK_INIT`.
 *
 * It may cover the last keys of a sequence alone: bit j is of key `first_keys[b] + j`, keys before that are visible,
 * and the last bit is of the last key of the sequence or of a later one. So the mask of a speculation tree is [batch,
 * n, 1, n] bits over the n tokens that were written last.
 *
 * Sequences may have bits of their own width at any place: with `bit_offsets` and `query_strides`, a sequence has bits
 * for its own queries and for its own keys, from its first key to its length, and no others are read. So the flattened
 * masks of several requests, each [queries, keys], are one mask. The first two axes do not broadcast then.
 */
typedef struct kvl_bit_mask {
    /**
     * `sizeof(kvl_bit_mask)`.
     */
    size_t struct_size;
    /**
     * The byte whose lowest bit is bit 0.
     */
    const uint8_t *data;
    /**
     * Bytes from `data` to the end of the buffer; 0 if unknown.
     */
    size_t bytes;
    /**
     * The index of the bit of entry [0, 0, 0, 0].
     */
    int64_t offset;
    /**
     * batch, seq (the most queries of a sequence), heads, keys (at least the most keys of a sequence after its first
     * key).
     */
    int64_t shape[4];
    /**
     * Of batch, seq and heads, in bits. Not used along axes of one entry.
     */
    int64_t strides[3];
    /**
     * [batch]: the key of the first bit of a sequence; null for 0.
     */
    const int32_t *first_keys;
    /**
     * [batch]: the bit of query 0, head 0 and the first key of a sequence, not negative. It replaces `offset` and the
     * stride of batch, which must then be 0; null to use those. Given together with `query_strides`.
     */
    const int64_t *bit_offsets;
    /**
     * [batch]: the distance in bits between the queries of a sequence, not negative; 0 broadcasts. It replaces the
     * stride of seq, which must then be 0; null to use that.
     */
    const int64_t *query_strides;
} kvl_bit_mask;

/**
 * What an attention call reads and writes, and which keys its queries see. Start from `KVL_ATTENTION_PARAMS_INIT`,
 * with which every query sees every key; set `q`, `k`, `v` and `out`. Query head h reads KV head `h / (heads /
 * kv_heads)`; nothing is repeated in memory.
 *
 * A logit is `softcap(q.k * scale) + alibi + bias`. Then masked keys are removed, and softmax follows in f32. Query i
 * of sequence b stands at position p = i + offset among the keys. It sees key j if `j < lengths[b]`, `j >=
 * kv_starts[b]`, the entries of the mask and of the bit mask are not 0, the bias is not -inf, a ring has not
 * overwritten the key, and either `j < prefix_lengths[b]` or all of these hold: `j <= p` (causal), `j >= p -
 * window_left` (left window), `j <= p + window_right` (right window).
 *
 * A query that sees no key has output 0 and LSE -inf (with a sink logit: that logit). NaN and infinities in keys and
 * values that no query sees never reach the output; those in visible ones do.
 */
typedef struct kvl_attention_params {
    /**
     * `sizeof(kvl_attention_params)`.
     */
    size_t struct_size;
    /**
     * Queries [batch, seq, heads, dim], of any type.
     */
    struct kvl_const_view q;
    /**
     * Keys [batch, keys, kv_heads, dim]: the whole cache, in any format.
     */
    struct kvl_const_view k;
    /**
     * Values [batch, keys, kv_heads, v_dim], in any format, which need not be that of the keys.
     */
    struct kvl_const_view v;
    /**
     * Output [batch, seq, heads, v_dim], of any type.
     */
    struct kvl_view out;
    /**
     * Output [batch, seq, heads], contiguous: the natural logarithm of the sum of the exponentials of the logits of
     * each query and head; null if not wanted.
     */
    float *lse;
    /**
     * Factor on q.k; 0 stands for 1 / sqrt(dim).
     */
    float scale;
    /**
     * `softcap * tanh(x / softcap)` is applied to scaled logits x; 0 for none.
     */
    float softcap;
    /**
     * A sum of `KVL_ATTENTION_FLAG_*`. A flag says whether there is a window, since a window of 0 keys has a meaning
     * too.
     */
    kvl_attention_flag flags;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * With `KVL_ATTENTION_FLAG_WINDOW_LEFT`: how many keys before the query's own position are visible. Else 0.
     */
    int64_t window_left;
    /**
     * With `KVL_ATTENTION_FLAG_WINDOW_RIGHT`: how many keys after the query's own position are visible. Else 0.
     */
    int64_t window_right;
    /**
     * [batch]: the number of valid keys; null for all.
     */
    const int32_t *lengths;
    /**
     * [batch]: the first visible key (left-padded batches); null for 0.
     */
    const int32_t *kv_starts;
    /**
     * [batch]: the position of query 0 among the keys; null for `length - seq`, with which the last query sees the
     * last key. With a negative offset, leading queries see no keys.
     */
    const int32_t *offsets;
    /**
     * A boolean mask [batch, seq, heads, keys], with at least as many keys as the longest sequence; absent for none.
     */
    struct kvl_mask mask;
    /**
     * Numbers [batch, seq, heads, keys] of any type that are added to logits; absent for none. Axes of one element
     * broadcast, and so do strides of 0.
     */
    struct kvl_const_view bias;
    /**
     * [heads]: `slope * (j - p)` is added to logits; null for none. See `kvl_alibi_slopes`.
     */
    const float *alibi_slopes;
    /**
     * [heads]: one more logit per head, which takes weight and has no value; null for none.
     */
    const float *sink_logits;
    /**
     * The precision; `kvl_context_attention_kernel_names` names the kernels of each.
     */
    kvl_precision precision;
    /**
     * 0.
     */
    int32_t reserved2;
    /**
     * In which slots of `k` and `v` the tokens of a sequence lie, which gives their first two axes a meaning; null for
     * contiguous sequences. A ring and pages need `lengths`. Positions count what a ring has overwritten: a window
     * must lie in what the ring retains, and without a window there can be only one query once the ring has
     * overwritten keys.
     */
    const struct kvl_layout *layout;
    /**
     * [num_sequences + 1]: ragged queries. `q` and `out` are [1, tokens, heads, dim], and the queries of sequence b
     * are tokens `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1] - 1`. Null for sequences of equal length, which are the
     * first axis of `q`.
     */
    const int32_t *cu_seqlens_q;
    /**
     * With `cu_seqlens_q`: the number of sequences, which is the length of every [batch] list. Else 0.
     */
    int64_t num_sequences;
    /**
     * [batch]: every query sees the keys before this one, whatever causality and windows say (prefix-LM, first tokens
     * that a window must keep); null for 0.
     */
    const int32_t *prefix_lengths;
    /**
     * A mask with one bit per query and key; null for none.
     */
    const struct kvl_bit_mask *bit_mask;
    /**
     * A plan that replaces `flags`, windows, `layout`, `cu_seqlens_q`, `num_sequences`, `lengths`, `kv_starts`,
     * `offsets`, `query_positions` and `prefix_lengths`, which must then be 0 or null. It replaces `mask` and `bit_mask` too if it was
     * made of either. Null for none.
     */
    const struct kvl_plan *plan;
    /**
     * How values lie in `v`. With `KVL_PACKING_ROW_PAIRS`, `v` is [batch, slots / 2, kv_heads, 2 * v_dim]. The bits of
     * the result do not depend on it.
     */
    kvl_packing v_packing;
    /**
     * 0.
     */
    int32_t reserved3;
    /**
     * [batch, seq], of ragged queries [tokens]: the position of every query, instead of i + offset, for causality, windows and
     * ALiBi. Key i + offset, which is the query's own token, then stands at the same position; other keys stand at their
     * numbers. In a tree of guesses, positions are depths. Null for none.
     */
    const int32_t *query_positions;
    /**
     * The scales of `k` and `v`, for formats that have scales; null for none.
     */
    const struct kvl_cache_scales *scales;
    /**
     * The block of the Hadamard rotation that the keys were written with; 0 for none. Queries are given unrotated: each is rotated
     * once, in f32, as it is loaded, and then counts as one in f32.
     */
    int64_t k_hadamard;
    /**
     * The same for the values. The rotation of an output row is undone once, in f32, before the row is rounded.
     */
    int64_t v_hadamard;
} kvl_attention_params;

/**
 * The state of attention over some keys: an output, and the natural logarithm of the sum of its exponentials.
 */
typedef struct kvl_attention_state {
    /**
     * [batch, seq, heads, dim].
     */
    struct kvl_const_view out;
    /**
     * [batch, seq, heads], contiguous.
     */
    const float *lse;
} kvl_attention_state;

/**
 * The cache of one layer.
 */
typedef struct kvl_kv_layer {
    /**
     * Keys [sequences, slots, kv_heads, dim]; the layout gives the first two axes their meaning.
     */
    struct kvl_view k;
    /**
     * Values [sequences, slots, kv_heads, v_dim]; absent where keys and values share memory.
     */
    struct kvl_view v;
    /**
     * The scales of both, for formats that have scales; null for none.
     */
    const struct kvl_cache_scales *scales;
} kvl_kv_layer;

/**
 * The caches of all layers of a model, or of those with one layout: they have one list of lengths. Start from
 * `KVL_CACHE_INIT`. Layers agree in the first two axes of their views. Heads, dims and types may differ, and no two
 * views share memory.
 */
typedef struct kvl_cache {
    /**
     * `sizeof(kvl_cache)`.
     */
    size_t struct_size;
    /**
     * [num_layers].
     */
    const struct kvl_kv_layer *layers;
    /**
     * The number of layers, at least 1.
     */
    size_t num_layers;
    /**
     * In which slots the tokens of a sequence lie, in every layer; null for contiguous.
     */
    const struct kvl_layout *layout;
    /**
     * [num_sequences of the layout]: the number of tokens that each sequence was given. Calls that change lengths
     * write these last.
     */
    int32_t *lengths;
} kvl_cache;

/**
 * The states of the chunks of a segment, as `kvl_attention_chunks` wrote them.
 */
typedef struct kvl_chunk_states {
    /**
     * [len].
     */
    const float *states;
    /**
     * The number of floats that `kvl_attention_chunks_states_len` gave for the segment.
     */
    int64_t len;
} kvl_chunk_states;

/**
 * What a merge of segments reads and writes. Start from `KVL_MERGE_CHUNKS_PARAMS_INIT`, set `segments`,
 * `num_segments`, `kv_heads`, `k_format`, `v_format`, `out`, and `precision` if that of the segments was not the default.
 */
typedef struct kvl_merge_chunks_params {
    /**
     * `sizeof(kvl_merge_chunks_params)`.
     */
    size_t struct_size;
    /**
     * [num_segments], in the order of the sequence.
     */
    const struct kvl_chunk_states *segments;
    /**
     * 1 to 256.
     */
    size_t num_segments;
    /**
     * The number of KV heads of the cache.
     */
    int64_t kv_heads;
    /**
     * The format of its keys.
     */
    kvl_format k_format;
    /**
     * The format of its values.
     */
    kvl_format v_format;
    /**
     * The precision of the segments' calls.
     */
    kvl_precision precision;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * [heads]: one more logit per head, which takes weight and has no value, once for all segments; null for none.
     */
    const float *sink_logits;
    /**
     * Output [batch, seq, heads, v_dim], of any type.
     */
    struct kvl_view out;
    /**
     * Output [batch, seq, heads], contiguous: the natural logarithm of the sum of the exponentials of the logits of
     * each query and head; null if not wanted.
     */
    float *lse;
    /**
     * `kvl_attention_params.v_hadamard` of the segments' calls; 0 for none. States are those of rotated values, and the output is
     * rotated back.
     */
    int64_t v_hadamard;
} kvl_merge_chunks_params;

/**
 * One of several shards of the caches of a model, by batch (data), heads (model) and keys (sequence). Start from
 * `KVL_SHARD_INIT`, which is the whole.
 */
typedef struct kvl_shard {
    /**
     * `sizeof(kvl_shard)`.
     */
    size_t struct_size;
    /**
     * Which part of the batch, less than `num_data`.
     */
    int64_t data;
    /**
     * The number of parts of the batch; 0 stands for 1.
     */
    int64_t num_data;
    /**
     * Which part of the heads, less than `num_model`.
     */
    int64_t model;
    /**
     * The number of parts of the heads; 0 stands for 1.
     */
    int64_t num_model;
    /**
     * Which part of the sequence, less than `num_sequence`.
     */
    int64_t sequence;
    /**
     * The number of parts of the sequence; 0 stands for 1.
     */
    int64_t num_sequence;
} kvl_shard;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the ABI of the library: `major * 65536 + minor`, to compare with `KVL_ABI_VERSION`.
 *
 * Thread safety: may be called from any thread at any time.
 * Bad input: there is none.
 */
uint32_t kvl_abi_version(void);

/**
 * The version of the library, such as "0.1.0"; a constant.
 *
 * Thread safety: may be called from any thread at any time.
 * Bad input: there is none.
 */
const char *kvl_version_string(void);

/**
 * A short description of a status; a constant.
 *
 * Thread safety: may be called from any thread at any time.
 * Bad input: a number that is no status gives "unknown status".
 */
const char *kvl_status_string(kvl_status status);

/**
 * The sentence of the last status other than `KVL_STATUS_OK` on the calling thread: it names the argument and the
 * numbers that disagree. It is empty if there was none. A successful call does not change it.
 *
 * At most `size` bytes are copied, the terminating zero included; a longer sentence is cut. The result is the number
 * of bytes that the whole sentence needs, at most 1024. `buffer` may be null to ask for that alone.
 *
 * Thread safety: may be called from any thread at any time. Every thread has its own sentence, and the thread that
 * made a call gets its sentence, also of errors on worker threads.
 * Bad input: there is none, as long as `buffer` has `size` bytes.
 */
size_t kvl_last_error(char *buffer,
                      size_t size);

/**
 * The name of a level, such as "avx2"; a constant. The name of `KVL_ISA_BEST` is "best".
 *
 * Thread safety: may be called from any thread at any time.
 * Bad input: a number that is no level gives "unknown".
 */
const char *kvl_isa_name(kvl_isa isa);

/**
 * 1 if this CPU and operating system can run kernels of a level, 0 if not. `KVL_ISA_BEST` is always available.
 *
 * Thread safety: may be called from any thread at any time.
 * Bad input: a number that is no level is not available.
 */
int32_t kvl_isa_available(kvl_isa isa);

/**
 * The number of kernels in the library, of all levels that it was built with.
 *
 * Thread safety: may be called from any thread at any time.
 * Bad input: there is none.
 */
size_t kvl_kernel_count(void);

/**
 * Describes kernel `index`, which is less than `kvl_kernel_count()`. The order may change between versions.
 *
 * Thread safety: may be called from any thread at any time.
 * Bad input: null, an unknown `info->struct_size` and an index past the end are errors, and `info` is not changed.
 */
kvl_status kvl_kernel_info_at(size_t index,
                              struct kvl_kernel_info *info);

/**
 * Makes a context: detects the CPU and chooses a kernel for each operation and type. It is released with
 * `kvl_context_destroy`.
 *
 * `params` may be null for the defaults: the best level of the machine, lowered by `KVLANE_MAX_ISA` if that is set.
 *
 * Thread safety: may be called from any thread. It reads the environment, which no other thread may change at the same
 * time.
 * Bad input: null, an unknown `struct_size`, an unknown flag, and a number or name (in `KVLANE_MAX_ISA`) that is no level
 * or one of another architecture are errors, and `*context` is not changed.
 */
kvl_status kvl_context_create(const struct kvl_context_params *params,
                              struct kvl_context **context);

/**
 * Releases a context; null is allowed.
 *
 * Thread safety: no other call may use the context at the same time or afterwards.
 * Bad input: a pointer that is not from `kvl_context_create`, or that was released before, is undefined behaviour.
 */
void kvl_context_destroy(struct kvl_context *context);

/**
 * The level of a context.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null is an error, and `*isa` is not changed.
 */
kvl_status kvl_context_isa(const struct kvl_context *context, kvl_isa *isa);

/**
 * The name of the kernel that serves an operation from one type to another, such as "rope_f32_bf16_avx512"; a constant.
 * `kvl_op` states which two types an operation has. The name is that for `KVL_PRECISION_DEFAULT`.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null, a number that is no operation or format, and types without a kernel are errors, and `*name` is not
 * changed.
 */
kvl_status kvl_context_kernel_name(const struct kvl_context *context,
                                   kvl_op op,
                                   kvl_format src,
                                   kvl_format dst,
                                   const char **name);

/**
 * The names of the kernels that serve attention over K of one format and V of another with a precision, such as
 * "attention_bf16_high_amx"; constants. `*k_name` is the kernel whose way with keys is used, `*v_name` the one whose way with
 * values is; they are the same where the formats are. Most kernels serve both precisions. `kvl_kernel_info` states the error
 * bound of a kernel.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null and a number that is no format or precision are errors, and neither name is changed.
 */
kvl_status kvl_context_attention_kernel_names(const struct kvl_context *context,
                                              kvl_format k_format,
                                              kvl_format v_format,
                                              kvl_precision precision,
                                              const char **k_name,
                                              const char **v_name);

/**
 * The packing of V that suits the attention kernels of a context best: `KVL_PACKING_ROW_PAIRS` where they multiply
 * tiles of bf16, else `KVL_PACKING_ROWS`. Both work with every kernel, but values of a format with scales are never packed.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null and a number that is no format are errors, and `*packing` is not changed.
 */
kvl_status kvl_context_v_packing(const struct kvl_context *context,
                                 kvl_format v_format,
                                 kvl_packing *packing);

/**
 * Writes the tuning of a context to `*tuning`: that of this CPU, or what `kvl_context_set_tuning` has set. No field is zero.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null and an unknown `tuning->struct_size` are errors, and `*tuning` is not changed.
 */
kvl_status kvl_context_tuning(const struct kvl_context *context,
                              struct kvl_tuning *tuning);

/**
 * Sets the tuning of a context, for the calls that begin afterwards.
 *
 * Thread safety: no other call may use the context at the same time.
 * Bad input: null, an unknown `tuning->struct_size` and a number that is no value of its enumeration are errors, and the context is not
 * changed. Any distance is valid.
 */
kvl_status kvl_context_set_tuning(struct kvl_context *context,
                                  const struct kvl_tuning *tuning);

/**
 * Starts a pool of threads, for programs that have none of their own. It is released with `kvl_thread_pool_destroy`.
 *
 * `num_threads` is 1 to 4096, or 0 for as many as the machine runs at once. Each thread has a stack of 2 MiB, whatever the
 * environment says, and blocks all signals. The threads do not survive `fork`: see the head of this file.
 *
 * Thread safety: may be called from any thread.
 * Bad input: null, more than 4096 threads or threads that the system does not start (`KVL_STATUS_PARALLEL`) are errors, and so
 * is a library that was built without the feature `rayon` (`KVL_STATUS_UNSUPPORTED`); `*pool` is not touched.
 */
kvl_status kvl_thread_pool_create(size_t num_threads,
                                  struct kvl_thread_pool **pool);

/**
 * Ends the threads of a pool, waits until they have ended, and releases it; null is allowed. In the child of a `fork`, the
 * pool of the parent has no threads, and only its handle is released. Must not be called from one of the pool's own threads.
 *
 * Thread safety: no call may use the pool, or a runner from it, meanwhile or afterwards.
 * Bad input: a pointer that is not from `kvl_thread_pool_create`, or one that was released already, is undefined behaviour.
 */
void kvl_thread_pool_destroy(struct kvl_thread_pool *pool);

/**
 * Fills in a runner that uses a pool. The runner is valid as long as the pool.
 *
 * In the child of a `fork`, every function that is given such a runner fails with `KVL_STATUS_PARALLEL`.
 *
 * Thread safety: may be called from any number of threads at once, and so may operations with the runner, which then share
 * the threads of the pool.
 * Bad input: null or an unknown `runner->struct_size` is an error, and `runner` is not touched.
 */
kvl_status kvl_thread_pool_runner(const struct kvl_thread_pool *pool,
                                  struct kvl_parallel_runner *runner);

/**
 * Asks the operating system to hold memory of the caller's in huge pages: `bytes` bytes at `data`. `*advised` becomes 1 if it
 * took the request, else 0.
 *
 * On Linux and Android, this is `madvise` with `MADV_HUGEPAGE` for the whole pages inside of the range. The kernel then uses a
 * huge page (2 MiB on x86-64) for every aligned stretch of that size, if it has one free when the memory is first written.
 * Call it before the first write, on memory that begins at a multiple of 2 MiB. Elsewhere the function does nothing, and
 * `*advised` becomes 0, as it does if the range holds no whole page or is not mapped, or if the kernel has no huge pages. 1 says
 * that the request was taken, and not that there were pages. The contents of the memory stay as they are.
 *
 * Thread safety: may be called from any number of threads at once, also while others use the memory.
 * Bad input: null (`data` may be null if `bytes` is 0) and a range beyond the end of the address space are errors, and
 * `*advised` is not changed.
 */
kvl_status kvl_advise_huge_pages(void *data,
                                 size_t bytes,
                                 int32_t *advised);

/**
 * Computes RoPE frequencies: `inv_freq` receives `pairs` = rotary_dim / 2 numbers in radians per position, and
 * `*magnitude` the factor on cosines and sines. It is meant for the time when a model is loaded, and it allocates.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null, an unknown `struct_size` or scaling, a `pairs` other than rotary_dim / 2, and a parameter that is
 * not finite or not positive are errors, and nothing is written.
 */
kvl_status kvl_rope_frequencies(const struct kvl_rope_frequencies_params *params,
                                double *inv_freq,
                                int64_t pairs,
                                double *magnitude);

/**
 * Computes cosines and sines, [rows, rotary_dim / 2] each, of the positions from `first_position` on: a table for
 * `kvl_rope_params`, whose positions then count from `first_position`. A `magnitude` of 0 stands for 1.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null, a `rotary_dim` that is odd or outside 2 to 4096, a number that is not finite, and outputs that
 * share memory with each other or with `inv_freq` are errors, and nothing is written.
 */
kvl_status kvl_rope_table(const struct kvl_context *context,
                          const double *inv_freq,
                          int64_t rotary_dim,
                          double magnitude,
                          int64_t first_position,
                          int64_t rows,
                          float *cos,
                          float *sin);

/**
 * Rotates queries or keys: `dst = RoPE(src)`, both [batch, seq, heads, dim], of any strides and types. Arithmetic is
 * f32, rounded once to the type of `dst`. To rotate in place, let both views be the same.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
 * calling thread.
 * Bad input: null, an unknown `struct_size` or enumeration value, shapes that differ, a `rotary_dim` that is odd or
 * above dim, positions outside a table, and views that share memory without being the same are errors, and nothing is
 * written.
 */
kvl_status kvl_rope(const struct kvl_context *context,
                    const struct kvl_parallel_runner *runner,
                    const struct kvl_const_view *src,
                    const struct kvl_view *dst,
                    const struct kvl_rope_params *params);

/**
 * Normalises heads: `dst = RMSNorm(src)`, both [batch, seq, heads, dim], of any strides and types. The mean is
 * computed in f64, the rest in f32, rounded once to the type of `dst`. To normalise in place, let both views be the
 * same.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
 * calling thread.
 * Bad input: null, an unknown `struct_size`, shapes that differ, an `eps` that is negative or not finite, and views
 * that share memory without being the same are errors, and nothing is written.
 */
kvl_status kvl_rms_norm(const struct kvl_context *context,
                        const struct kvl_parallel_runner *runner,
                        const struct kvl_const_view *src,
                        const struct kvl_view *dst,
                        const struct kvl_rms_norm_params *params);

/**
 * Normalises and then rotates queries or keys in one pass. The bits are those of `kvl_rms_norm` into a view of f32 and
 * `kvl_rope` from there, without a rounding between the two. Heads have at most 4096 elements.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
 * calling thread.
 * Bad input: the errors of `kvl_rms_norm` and `kvl_rope`; nothing is written then.
 */
kvl_status kvl_rms_norm_rope(const struct kvl_context *context,
                             const struct kvl_parallel_runner *runner,
                             const struct kvl_const_view *src,
                             const struct kvl_view *dst,
                             const struct kvl_rms_norm_params *norm,
                             const struct kvl_rope_params *rope);

/**
 * Rotates heads by a normalised Walsh-Hadamard matrix, block by block: `dst = H src`, both [batch, seq, heads, dim], of any
 * strides and types. Element i of a block becomes the sum over j of `x[j] * (-1)^popcount(i & j) / sqrt(block)`. The matrix
 * is its own inverse. Arithmetic is f32, rounded once to the type of `dst`, by the same bits at every level. `block` is a power of two
 * from 2 to 512 that divides dim; `kvl_hadamard_block` gives the largest. To rotate in place, let both views be the same.
 *
 * `kvl_kv_write`, `kvl_kv_read`, `kvl_attention` and `kvl_cache_evict` take blocks, and do this on the way.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
 * calling thread.
 * Bad input: null, shapes that differ, a `block` that is no power of two from 2 to 512 or does not divide dim, and views that share
 * memory without being the same are errors, and nothing is written.
 */
kvl_status kvl_hadamard(const struct kvl_context *context,
                        const struct kvl_parallel_runner *runner,
                        const struct kvl_const_view *src,
                        const struct kvl_view *dst,
                        int64_t block);

/**
 * The block of the Hadamard rotation of a head of `dim` elements: the largest power of two that divides `dim`, at most 512. If
 * `dim` is odd there is none, and `*block` is 0.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null and a negative `dim` are errors, and `*block` is not changed.
 */
kvl_status kvl_hadamard_block(int64_t dim,
                              int64_t *block);

/**
 * Writes new keys and values into their caches, of all sequences in one call, converted to the type of the cache (to
 * nearest, ties to even; what f16 cannot hold becomes an infinity, unless the context was made with
 * `KVL_CONTEXT_FLAG_SATURATE_F16`). Keys are normalised first if `params->k_norm` is given, and rotated if `params->rope` is. With
 * `params->k_hadamard` and `params->v_hadamard`, what is written is rotated by Hadamard matrices, in f32, before it is converted.
 * Lengths are the caller's to advance.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint caches or disjoint sequences of a
 * cache. A null `runner` runs on the calling thread.
 * Bad input: null, an unknown `struct_size` or enumeration value, shapes that do not fit, a slot past the capacity
 * (`KVL_STATUS_CAPACITY`), a negative position or slot, a sequence or page that does not exist, two tokens with one
 * slot (`KVL_STATUS_DUPLICATE_SLOT`), and a cache that shares memory with anything else are errors, and nothing is
 * written. Nothing is clamped.
 */
kvl_status kvl_kv_write(const struct kvl_context *context,
                        const struct kvl_parallel_runner *runner,
                        const struct kvl_kv_write_params *params);

/**
 * Reads tokens of a cache, of any format and layout, into plain tensors: the numbers that attention computes with, which are
 * units times their scale in a quantised format, rounded once to the type of the target (to nearest, ties to even). A slot
 * that no token was written to is read as it is.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs, while no call writes the tokens that
 * are read. A null `runner` runs on the calling thread.
 * Bad input: null, an unknown `struct_size` or enumeration value, shapes that do not fit, a position past the capacity
 * (`KVL_STATUS_CAPACITY`), a negative position, a sequence or page that does not exist, and a target that shares memory with
 * anything else are errors, and nothing is written.
 */
kvl_status kvl_kv_read(const struct kvl_context *context,
                       const struct kvl_parallel_runner *runner,
                       const struct kvl_kv_read_params *params);

/**
 * Packs values in pairs of slots (`KVL_PACKING_ROW_PAIRS`): [batch, n, heads, dim] becomes [batch, n / 2 rounded up,
 * heads, 2 * dim], of the same type, with every bit. Where n is odd, the other half of the last pair is not written.
 * `kvl_kv_write` writes packed caches directly.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
 * calling thread.
 * Bad input: null, shapes that do not fit, types that differ, and views that share memory are errors, and nothing is
 * written.
 */
kvl_status kvl_pack_row_pairs(const struct kvl_context *context,
                              const struct kvl_parallel_runner *runner,
                              const struct kvl_const_view *src,
                              const struct kvl_view *dst);

/**
 * The inverse of `kvl_pack_row_pairs`: `src` is [batch, n / 2 rounded up, heads, 2 * dim], `dst` is [batch, n, heads,
 * dim].
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
 * calling thread.
 * Bad input: null, shapes that do not fit, types that differ, and views that share memory are errors, and nothing is
 * written.
 */
kvl_status kvl_unpack_row_pairs(const struct kvl_context *context,
                                const struct kvl_parallel_runner *runner,
                                const struct kvl_const_view *src,
                                const struct kvl_view *dst);

/**
 * Repeats every head n times in a row: [batch, seq, kv_heads, dim] becomes [batch, seq, kv_heads * n, dim], of the
 * same type; n is the ratio of the head counts. Attention needs no such copy.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
 * calling thread.
 * Bad input: null, head counts that are no multiple of each other, other axes or types that differ, and views that
 * share memory are errors, and nothing is written.
 */
kvl_status kvl_repeat_kv(const struct kvl_context *context,
                         const struct kvl_parallel_runner *runner,
                         const struct kvl_const_view *src,
                         const struct kvl_view *dst);

/**
 * The bytes of workspace that `kvl_attention` needs at most for the shapes of `params->q`, `k` and `v`, whatever
 * lengths and masks are, and for the threads of `runner`. Only these shapes, `layout`, `cu_seqlens_q` and `plan` are
 * read; data may be null. Few queries can need more bytes than many, so that every shape has to be asked for.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null, an unknown `struct_size`, an axis that is negative or above 2^31 - 1, and a dim that is not 1 to
 * 1024 are errors, and `*bytes` is not changed.
 */
kvl_status kvl_attention_workspace_size(const struct kvl_attention_params *params,
                                        const struct kvl_parallel_runner *runner,
                                        size_t *bytes);

/**
 * Grouped-query attention over a cache, for prefill (with the keys of the queries already in the cache), chunked
 * prefill and decode (seq = 1). Every tensor keeps its type; arithmetic is f32, rounded once to the type of `out`.
 *
 * `workspace` has `workspace_bytes` bytes, at least as many as `kvl_attention_workspace_size` gives for the same
 * shapes and runner, and is aligned to 64 bytes. Its contents have no meaning before and after the call. The bits of
 * an output row depend on the inputs of that row and the level alone: not on the runner, the rest of the batch or the
 * strides.
 *
 * Thread safety: may be called from any number of threads at once, each with its own outputs and its own workspace;
 * two calls that share a workspace at the same time have undefined results. A null `runner` runs on the calling
 * thread.
 * Bad input: null, an unknown `struct_size`, flag or enumeration value, shapes that do not fit, lengths outside the
 * cache, an output that shares memory with an input, and a workspace that is too small or misaligned are errors, and
 * nothing is written.
 */
kvl_status kvl_attention(const struct kvl_context *context,
                         const struct kvl_parallel_runner *runner,
                         void *workspace,
                         size_t workspace_bytes,
                         const struct kvl_attention_params *params);

/**
 * Fills in the standard ALiBi slopes for any number of heads: for a power of two n, `2^(-8 (h + 1) / n)`; otherwise
 * those of the largest power of two below, followed by every other slope of twice that number.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null and a negative number of heads are errors, and nothing is written.
 */
kvl_status kvl_alibi_slopes(float *slopes,
                            int64_t heads);

/**
 * The bytes of workspace that `kvl_attention_with_prefix` needs at most, as `kvl_attention_workspace_size` gives them
 * for `kvl_attention`. Of `prefix_k`, only the shape is read.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: the errors of `kvl_attention_workspace_size`; `*bytes` is not changed then.
 */
kvl_status kvl_attention_with_prefix_workspace_size(const struct kvl_const_view *prefix_k,
                                                    const struct kvl_attention_params *params,
                                                    const struct kvl_parallel_runner *runner,
                                                    size_t *bytes);

/**
 * Attention over a prefix that all sequences share, [1, tokens, kv_heads, dim] and [1, tokens, kv_heads, v_dim],
 * followed by each sequence's own keys. `params` describes the latter, as in `kvl_attention`: position 0 of a sequence
 * is its first key after the prefix. Every query sees the whole prefix, which is read once for all of them. Sink
 * logits count once. The result is that of attention over both at once within the kernel's bound. It does not depend
 * on the runner, the batch or strides. `prefix_scales` has the scales of the prefix, for formats that have scales, and may be
 * null.
 *
 * `workspace` is as for `kvl_attention`, with the size that `kvl_attention_with_prefix_workspace_size` gives.
 *
 * Thread safety: as for `kvl_attention`.
 * Bad input: the errors of `kvl_attention`, for either part. ALiBi slopes and a left window are errors too, since they
 * would need the positions of the prefix. Nothing but the workspace is written then.
 */
kvl_status kvl_attention_with_prefix(const struct kvl_context *context,
                                     const struct kvl_parallel_runner *runner,
                                     void *workspace,
                                     size_t workspace_bytes,
                                     const struct kvl_const_view *prefix_k,
                                     const struct kvl_const_view *prefix_v,
                                     const struct kvl_cache_scales *prefix_scales,
                                     const struct kvl_attention_params *params);

/**
 * Merges states over disjoint sets of keys into the state over all of them: `out = sum_i w_i out_i` with `w_i =
 * exp(lse_i - lse)` and `lse = ln sum_i exp(lse_i)`. `lse`, [batch, seq, heads] and contiguous, may be null. All
 * outputs have one type. The sums are taken in the order of the states. A state with an LSE of -inf is empty, and its
 * output is not read. Empty states alone merge to output 0 and LSE -inf.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs. A null `runner` runs on the
 * calling thread.
 * Bad input: null, no state or more than 256, shapes or types that differ, and an output that shares memory with an
 * input are errors, and nothing is written.
 */
kvl_status kvl_merge_states(const struct kvl_context *context,
                            const struct kvl_parallel_runner *runner,
                            const struct kvl_attention_state *states,
                            size_t num_states,
                            const struct kvl_view *out,
                            float *lse);

/**
 * Makes a plan: copies and checks the `flags`, windows, `layout`, `cu_seqlens_q`, `num_sequences`, `lengths`,
 * `kv_starts`, `offsets`, `query_positions`, `prefix_lengths`, `mask` and `bit_mask` of `params`, the first two axes of `q` and `k` and,
 * with masks, the heads of `q`. Nothing else is read, and data of tensors may be null. `kvl_attention_params.plan`
 * then stands for all of these. The plan is released with `kvl_plan_destroy`.
 *
 * Masks are read here and once. The plan has bits of its own, for the queries of every sequence and the keys up to its
 * length. It has bits per head only if the masks differ by head; if they broadcast, the plan serves any number of
 * heads. It has none if the masks hide nothing that is visible otherwise. Calls with a plan that was made without
 * masks may have their own.
 *
 * A plan serves every layer whose caches have the same shape in their first two axes, any number of threads, and every
 * context. It holds no pointer of the caller's.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null, an unknown `struct_size`, and the errors of `kvl_attention` in these fields are errors, and `*plan`
 * is not changed.
 */
kvl_status kvl_plan_create(const struct kvl_attention_params *params,
                           struct kvl_plan **plan);

/**
 * Makes a plan anew for `params`, as `kvl_plan_create` does, in the memory that it has. That memory grows only if
 * lists, tables or masks do.
 *
 * Thread safety: no other call may use the plan at the same time.
 * Bad input: the errors of `kvl_plan_create`; the plan is not changed then.
 */
kvl_status kvl_plan_update(struct kvl_plan *plan,
                           const struct kvl_attention_params *params);

/**
 * Takes a plan to the next step: sequence b has been given `counts[b]` more tokens, and as many queries follow as
 * before. Lengths grow, and offsets if they were given. The table must have the entries of the new tokens. Nothing is
 * allocated, and only what is new is checked.
 *
 * Thread safety: no other call may use the plan at the same time.
 * Bad input: null, a list that has not one entry per sequence, a negative count, a sequence without room, table
 * entries outside the cache, queries that see what a ring has overwritten, and a plan that was made of masks
 * (`kvl_plan_update` takes the masks of new tokens) are errors, and the plan is not changed.
 */
kvl_status kvl_plan_advance(struct kvl_plan *plan,
                            const int32_t *counts,
                            int64_t num_sequences);

/**
 * Sets `count` entries, from `first` on, of a sequence in the table of a plan with a paged or indirect layout: before
 * `kvl_plan_advance` needs them, or when a page has moved.
 *
 * Thread safety: no other call may use the plan at the same time.
 * Bad input: null, a layout without a table, entries outside the sequence, and entries of existing tokens that lead
 * outside the cache are errors, and the plan is not changed.
 */
kvl_status kvl_plan_set_table(struct kvl_plan *plan,
                              int64_t sequence,
                              int64_t first,
                              const int32_t *entries,
                              int64_t count);

/**
 * Releases a plan; null is allowed.
 *
 * Thread safety: no other call may use the plan at the same time or afterwards.
 * Bad input: a pointer that is not from `kvl_plan_create`, or that was released before, is undefined behaviour.
 */
void kvl_plan_destroy(struct kvl_plan *plan);

/**
 * Sets the length of sequence `sequences[i]` to `values[i]`, whatever lies in its slots.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint caches.
 * Bad input: null, an unknown `struct_size`, views that do not fit each other, a sequence that does not exist or comes
 * twice, a value that is negative or above the sequence's capacity, and a table entry that leads outside the cache are
 * errors, and no length changes.
 */
kvl_status kvl_cache_set_lengths(const struct kvl_cache *cache,
                                 const int32_t *sequences,
                                 const int32_t *values,
                                 size_t num_sequences);

/**
 * Adds `counts[b]` to the length of every sequence b, after as many tokens have been written to it.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint caches.
 * Bad input: null, an unknown `struct_size`, views that do not fit each other, a negative count, a length above the
 * sequence's capacity (`KVL_STATUS_CAPACITY`), and a table entry that leads outside the cache are errors, and no
 * length changes.
 */
kvl_status kvl_cache_advance(const struct kvl_cache *cache,
                             const int32_t *counts);

/**
 * Removes the last tokens of sequences: sequence b then has `lengths[b]` tokens. No byte of the cache changes.
 *
 * `flags` and `window_left` are those of all attention over this cache; only a left window counts. They matter to a
 * ring: the tokens that are removed have overwritten older ones, so a ring that has gone round can be truncated only
 * if no query will look at those. A ring whose capacity exceeds `sink_tokens + window_left` by n tokens can give back
 * n. The cache knows its present lengths only: truncations without new tokens between them count together, and the
 * caller has to add them up. In an indirect cache, a slot that holds a token of another sequence is not given up.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint caches.
 * Bad input: null, an unknown `struct_size` or flag, views that do not fit each other, a length that is negative or
 * above the present one, a window that is negative or without its flag, and tokens that have been or would be
 * overwritten are errors, and no length changes.
 */
kvl_status kvl_cache_truncate(const struct kvl_cache *cache,
                              const int32_t *lengths,
                              kvl_attention_flag flags,
                              int64_t window_left);

/**
 * Empties sequences: their lengths become 0. With a `zero` of 1, their slots are filled with zeros too: all of them,
 * or in a paged cache the pages in use.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint caches. A null `runner` runs on the
 * calling thread.
 * Bad input: null, an unknown `struct_size`, views that do not fit each other, a sequence that does not exist or comes
 * twice, a `zero` that is neither 0 nor 1, and zeros for a page that another sequence uses or for an indirect cache
 * are errors, and nothing is written.
 */
kvl_status kvl_cache_reset(const struct kvl_parallel_runner *runner,
                           const struct kvl_cache *cache,
                           const int32_t *sequences,
                           size_t num_sequences,
                           int32_t zero);

/**
 * Copies the first `length` tokens of sequence `from_sequence` of the cache `from`, which is only read, into
 * `sequence` of the cache `to`, which then has that length: a prompt that was prefilled alone takes its place in a
 * batch. Both caches have the same number of layers, with the same heads and dims. Types (converted to nearest, ties
 * to even) and layouts may differ. A ring takes the tokens that it would hold after `length`. Where tokens share scales
 * that they did not share before, they are quantised again.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint caches. A null `runner` runs on the
 * calling thread.
 * Bad input: null, an unknown `struct_size`, caches that differ in more than types and layouts or share memory, a
 * sequence that does not exist, a length above that of the source or above the capacity, tokens that a ring has
 * overwritten, a page that another sequence uses, heads above 1024 elements for a cache in which several tokens share
 * scales, and an indirect target are errors, and nothing is written.
 */
kvl_status kvl_cache_insert_sequence(const struct kvl_context *context,
                                     const struct kvl_parallel_runner *runner,
                                     const struct kvl_cache *to,
                                     int64_t sequence,
                                     const struct kvl_cache *from,
                                     int64_t from_sequence,
                                     int64_t length);

/**
 * Copies the first `tokens` tokens of sequence `from` into the sequences `to`, [num_to], which then have that length:
 * one prompt, many continuations. With pages, sequences can share full pages instead, by their table.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint caches. A null `runner` runs on the
 * calling thread.
 * Bad input: null, an unknown `struct_size`, views that do not fit each other, a sequence that does not exist, comes
 * twice or is the source, more tokens than the source has or a sequence holds, tokens that a ring has overwritten, a
 * page that another sequence uses, heads above 1024 elements with scales that several tokens share, and an indirect
 * cache are errors, and nothing is written.
 */
kvl_status kvl_cache_copy_prefix(const struct kvl_context *context,
                                 const struct kvl_parallel_runner *runner,
                                 const struct kvl_cache *cache,
                                 int64_t from,
                                 const int32_t *to,
                                 size_t num_to,
                                 int64_t tokens);

/**
 * The bytes of workspace that `kvl_cache_reorder` needs for a cache and the threads of `runner`.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null and an unknown `struct_size` or enumeration value are errors, and `*bytes` is not changed.
 */
kvl_status kvl_cache_reorder_workspace_size(const struct kvl_cache *cache,
                                            const struct kvl_parallel_runner *runner,
                                            size_t *bytes);

/**
 * Every sequence b becomes a copy of what sequence `parents[b]` was, with its tokens and its length (beam search).
 * Only valid tokens move, and only those of sequences that are not their own parents. `workspace` has
 * `workspace_bytes` bytes, at least as many as `kvl_cache_reorder_workspace_size` gives, and is aligned to 64 bytes.
 *
 * Pages are reordered by their table, with `kvl_cache_copy_pages` for last pages of their own. For indirect caches
 * there is `kvl_cache_reorder_table`.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint caches and workspaces. A null `runner`
 * runs on the calling thread.
 * Bad input: null, an unknown `struct_size`, views that do not fit each other, a parent that does not exist, a layout
 * that is neither contiguous nor a ring, and a workspace that is too small or misaligned are errors, and nothing is
 * written.
 */
kvl_status kvl_cache_reorder(const struct kvl_context *context,
                             const struct kvl_parallel_runner *runner,
                             void *workspace,
                             size_t workspace_bytes,
                             const struct kvl_cache *cache,
                             const int32_t *parents);

/**
 * The bytes of workspace that `kvl_cache_reorder_table` needs for a beam table [num_sequences, capacity].
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null and a negative number are errors, and `*bytes` is not changed.
 */
kvl_status kvl_cache_reorder_table_workspace_size(int64_t num_sequences, int64_t capacity, size_t *bytes);

/**
 * Row b of the beam table of an indirect cache, [num_sequences, capacity], becomes a copy of what row `parents[b]`
 * was, and so does `lengths[b]`. No token moves.
 *
 * A step of beam search is: `kvl_kv_write` as into a contiguous cache, to sequence b at position `lengths[b]`;
 * `kvl_cache_set_table_tokens`, after which lengths grow by one; `kvl_attention` with `KVL_LAYOUT_KIND_INDIRECT`; the
 * choice of parents; this call. As long as sequences that have tokens of each other are equally long, no slot is
 * written that another sequence needs; otherwise the call is refused.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint tables and workspaces.
 * Bad input: null, a negative size, a parent that does not exist, a length that is negative or above the capacity, a
 * sequence that would overwrite slots in which another one has tokens (`KVL_STATUS_OVERLAP`), lists that share memory,
 * and a workspace that is too small or misaligned are errors, and nothing changes.
 */
kvl_status kvl_cache_reorder_table(void *workspace,
                                   size_t workspace_bytes,
                                   int32_t *table,
                                   int64_t num_sequences,
                                   int64_t capacity,
                                   int32_t *lengths,
                                   const int32_t *parents);

/**
 * Records in the beam table of an indirect cache, [num_sequences, capacity], that `tokens` tokens of every sequence b,
 * from position `positions[b]` on, lie in row b of the cache, to which they were just written.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint tables.
 * Bad input: null, a negative size or position, tokens past the capacity (`KVL_STATUS_CAPACITY`), and lists that share
 * memory are errors, and nothing changes.
 */
kvl_status kvl_cache_set_table_tokens(int32_t *table,
                                      int64_t num_sequences,
                                      int64_t capacity,
                                      const int32_t *positions,
                                      int64_t tokens);

/**
 * Removes the tokens `first` to `end - 1` of a sequence and closes the gap: later tokens move down by `end - first`
 * positions, and their keys are rotated to their new positions. To keep sink tokens, begin after them.
 *
 * `ropes` has an entry per layer, or one for all, or none (`num_ropes` 0) where keys carry no rotation, or already that
 * of the position to which they move, as those of a tree of guesses do. A null entry is a layer whose keys are not
 * rotated. The `pairing`, `rotary_dim` and `inv_freq` of each are those that the keys were written with. Other fields
 * are not read, but a table is an error, since it has no row for a difference of positions. Angles are computed in
 * f64, arithmetic is f32, rounded once to the type of the cache. Values keep every bit, unless several tokens share
 * scales and move by other numbers than multiples of these: then they are quantised again, those that stay with them
 * too.
 *
 * Each call adds one rounding to the keys that move. After many small evictions, 16-bit keys stay where they were,
 * because a rotation by less than half a unit in the last place rounds back. `kvl_cache_evict_running` has no such
 * drift.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint caches. A null `runner` runs on the
 * calling thread.
 * Bad input: null, an unknown `struct_size` or enumeration value, views that do not fit each other, a sequence that
 * does not exist, a range that is empty the wrong way or goes beyond the length, a number of ropes that fits nothing,
 * a `rotary_dim` above a layer's dim, heads above 1024 elements with scales that several tokens share, a page to be
 * written that another sequence uses, a ring (which drops its oldest tokens by itself), and an indirect cache are
 * errors, and nothing is written.
 */
kvl_status kvl_cache_evict(const struct kvl_context *context,
                           const struct kvl_parallel_runner *runner,
                           const struct kvl_cache *cache,
                           int64_t sequence,
                           int64_t first,
                           int64_t end,
                           const struct kvl_rope_params *const *ropes,
                           size_t num_ropes);

/**
 * Removes the tokens `first` to `end - 1` of a sequence and closes the gap, while RoPE positions run on: the keys of
 * later tokens move with every bit, as values do. The `first` keys before the gap are brought near to them instead, by
 * writing them again from unrotated copies. However often it is called, each key has been rounded once.
 *
 * `dropped` is the number of tokens that the sequence has lost before this call. After it, token t of the sequence has
 * RoPE position `t + dropped + (end - first)`, and the next query and key have position `length + dropped`, with the
 * new length and the new sum. Lengths, causality, windows and ALiBi still count from 0. Scales that several tokens
 * share are as with `kvl_cache_evict`.
 *
 * `ropes` and `keys` have an entry per layer, or one for all, or none (`num_ropes` 0) where keys carry no rotation or
 * no token is kept before the gap. A null rope is a layer whose keys before the gap stay as they are. The `pairing`,
 * `rotary_dim`, `inv_freq` and `magnitude` of a rope are those that the keys were written with. Other fields are not
 * read, but a table is an error. `keys[i]` is [1, tokens, kv_heads, dim], of any type, with at least `first` tokens:
 * the keys of the first tokens of the sequence, after their norm and before their rotation.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint caches. A null `runner` runs on the
 * calling thread.
 * Bad input: the errors of `kvl_cache_evict`; copies that do not fit the layer's keys, have too few tokens or share
 * memory with the cache, a negative `dropped`, and positions beyond 2^31 - 1 (`KVL_STATUS_CAPACITY`) are errors too,
 * and nothing is written.
 */
kvl_status kvl_cache_evict_running(const struct kvl_context *context,
                                   const struct kvl_parallel_runner *runner,
                                   const struct kvl_cache *cache,
                                   int64_t sequence,
                                   int64_t first,
                                   int64_t end,
                                   int64_t dropped,
                                   const struct kvl_const_view *keys,
                                   const struct kvl_rope_params *const *ropes,
                                   size_t num_ropes);

/**
 * Copies whole pages of a pool, `moves[2 * i]` to `moves[2 * i + 1]`, in all layers, whose views are [pages,
 * page_size, kv_heads, dim]: for example to give a sequence a last page of its own before it writes to a shared one.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint pools. A null `runner` runs on the
 * calling thread.
 * Bad input: null, views that do not fit each other, a page that does not exist, and a page that is written twice or
 * both written and read (`KVL_STATUS_DUPLICATE_SLOT`) are errors, and nothing is written.
 */
kvl_status kvl_cache_copy_pages(const struct kvl_context *context,
                                const struct kvl_parallel_runner *runner,
                                const struct kvl_kv_layer *layers,
                                size_t num_layers,
                                const int32_t *moves,
                                size_t num_moves);

/**
 * Moves the pages in use to the start of the pool, in all layers, and sets `*used` to their number: all pages from
 * there on are free. The views of the layers are [pages, page_size, kv_heads, dim].
 *
 * Pages in use hold the first `lengths[b]` tokens of a sequence b; shared pages stay shared. Only pages beyond the new
 * end move, in ascending order to the lowest free places. `table`, [num_sequences, pages_per_sequence], is updated,
 * and its entries beyond the length of a sequence become -1, since the pages that they named may be others'. `map` has
 * an entry per page, and afterwards the place of each page, -1 for those that were not in use.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint pools. A null `runner` runs on the
 * calling thread.
 * Bad input: null, a negative size, views that do not fit each other, a length above what a sequence's entries hold,
 * an entry that is no page, and lists that share memory are errors, and nothing but `map` is written.
 */
kvl_status kvl_cache_defragment(const struct kvl_context *context,
                                const struct kvl_parallel_runner *runner,
                                const struct kvl_kv_layer *layers,
                                size_t num_layers,
                                int32_t *table,
                                int64_t num_sequences,
                                int64_t pages_per_sequence,
                                const int32_t *lengths,
                                int32_t *map,
                                int64_t *used);

/**
 * The number of floats that `kvl_attention_chunks` writes for the shapes of `params->q`, `k` and `v`: for each query
 * and head, and for each `KVL_SPLIT_GRID` keys (or part of as many) that a sequence of the cache has room for, v_dim
 * rounded up to 16, and 16 more. Only these shapes, `layout`, `cu_seqlens_q` and `plan` are read; data may be null.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: the errors of `kvl_attention_workspace_size`; ragged queries, a ring, and more floats than an address
 * space holds are errors too, and `*len` is not changed.
 */
kvl_status kvl_attention_chunks_states_len(const struct kvl_attention_params *params,
                                           int64_t *len);

/**
 * The bytes of workspace that `kvl_attention_chunks` needs at most, as `kvl_attention_workspace_size` gives them for
 * `kvl_attention`.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: the errors of `kvl_attention_workspace_size`; ragged queries and a ring are errors too, and `*bytes` is
 * not changed.
 */
kvl_status kvl_attention_chunks_workspace_size(const struct kvl_attention_params *params,
                                               const struct kvl_parallel_runner *runner,
                                               size_t *bytes);

/**
 * Attention over a segment of a sequence, which writes the states of the segment's chunks for `kvl_merge_chunks`
 * instead of an output. Where keys are spread over machines, or come one segment after another, the merged bits are
 * those of one `kvl_attention` over all keys.
 *
 * `params` is as for `kvl_attention`, in the segment's own positions: `lengths`, `kv_starts`, `offsets` and so on
 * count from the first key of the segment, which is a multiple of `KVL_SPLIT_GRID` (`kvl_shard_keys` cuts segments so,
 * and `kvl_shard_lengths` computes the lists). `out`, `lse` and `sink_logits` must be absent: `kvl_merge_chunks` takes
 * them. `states` has `states_len` floats, exactly as many as `kvl_attention_chunks_states_len` gives. They have a
 * meaning to contexts of the same level, for keys and values of the same types and the same precision, and may be sent
 * there as they are. Floats that are not needed are not written.
 *
 * `workspace` is as for `kvl_attention`, with the size that `kvl_attention_chunks_workspace_size` gives.
 *
 * Thread safety: as for `kvl_attention`.
 * Bad input: the errors of `kvl_attention`; an `out`, an `lse`, `sink_logits`, ragged queries, a ring, and `states`
 * that are null, of another length, not aligned to 4 bytes or that share memory with a tensor or a list are errors
 * too, and nothing is written.
 */
kvl_status kvl_attention_chunks(const struct kvl_context *context,
                                const struct kvl_parallel_runner *runner,
                                void *workspace,
                                size_t workspace_bytes,
                                const struct kvl_attention_params *params,
                                float *states,
                                int64_t states_len);

/**
 * The bytes of workspace that `kvl_merge_chunks` needs at most for the shape of `params->out`, `kv_heads`, the lengths
 * of the segments' states, and the threads of `runner`. Only these are read; data and states may be null.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null, an unknown `struct_size`, no segment or more than 256, an axis that is negative or above 2^31 - 1,
 * a dim that is not 1 to 1024, heads that are no multiple of `kv_heads`, and lengths that are no number of chunks are
 * errors, and `*bytes` is not changed.
 */
kvl_status kvl_merge_chunks_workspace_size(const struct kvl_merge_chunks_params *params,
                                           const struct kvl_parallel_runner *runner,
                                           size_t *bytes);

/**
 * The output and LSE of attention whose keys lay in several segments, from the states that `kvl_attention_chunks`
 * wrote for each. The bits are those of one `kvl_attention` over all keys, if every segment but the last ended at a
 * multiple of `KVL_SPLIT_GRID`. `kvl_merge_states` needs less memory, and has the kernel's bound instead of its bits.
 *
 * `workspace` is as for `kvl_attention`, with the size that `kvl_merge_chunks_workspace_size` gives.
 *
 * Thread safety: as for `kvl_attention`.
 * Bad input: null, an unknown `struct_size` or enumeration value, the errors of `kvl_merge_chunks_workspace_size`, an
 * output that shares memory with states, sink logits or the other output, and a workspace that is too small or
 * misaligned are errors, and nothing is written.
 */
kvl_status kvl_merge_chunks(const struct kvl_context *context,
                            const struct kvl_parallel_runner *runner,
                            void *workspace,
                            size_t workspace_bytes,
                            const struct kvl_merge_chunks_params *params);

/**
 * Sets `shard->data`, `model` and `sequence` to those of shard `rank`, of as many shards as `shard->num_...` give.
 * Neighbouring ranks are parts of one sequence first, then of the heads.
 *
 * Thread safety: may be called from any number of threads at once, on disjoint shards.
 * Bad input: null, an unknown `struct_size`, a negative number, and a rank that does not exist are errors, and `shard`
 * is not changed.
 */
kvl_status kvl_shard_from_rank(int64_t rank,
                               struct kvl_shard *shard);

/**
 * The shard's sequences of a batch: `*count` of them, from `*first` on. The counts of two parts differ by at most one,
 * and may be 0.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null, an unknown `struct_size`, a negative number, and a part that does not exist are errors, and nothing
 * is written.
 */
kvl_status kvl_shard_sequences(const struct kvl_shard *shard,
                               int64_t batch,
                               int64_t *first,
                               int64_t *count);

/**
 * The shard's heads: `*num_kv_heads` KV heads from `*first_kv_head` on, and the `*num_heads` query heads from
 * `*first_head` on that read them. With more parts than KV heads, several shards have the same KV head and share the
 * query heads that read it.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null, an unknown `struct_size`, a negative number, a part that does not exist, `heads` that are no
 * multiple of `kv_heads`, and more parts than KV heads that are no multiple of them are errors, and nothing is
 * written.
 */
kvl_status kvl_shard_heads(const struct kvl_shard *shard,
                           int64_t heads,
                           int64_t kv_heads,
                           int64_t *first_head,
                           int64_t *num_heads,
                           int64_t *first_kv_head,
                           int64_t *num_kv_heads);

/**
 * The shard's segment of the slots of a sequence: `*count` of `capacity`, from `*first` on. Segments begin and end at
 * multiples of `KVL_SPLIT_GRID` or at the capacity, and may be empty.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null, an unknown `struct_size`, a negative number, and a part that does not exist are errors, and nothing
 * is written.
 */
kvl_status kvl_shard_keys(const struct kvl_shard *shard,
                          int64_t capacity,
                          int64_t *first,
                          int64_t *count);

/**
 * The lists that attention over `count` keys from key `first` on takes, where attention over all keys takes `lengths`,
 * `kv_starts` (null for 0) and `offsets` (null for `length - seq`), [batch] each, for `seq` queries per sequence. The
 * results, [batch] each, count from the start of the segment: `local_lengths` and `local_kv_starts` lie in it, and
 * `local_offsets` may be negative or beyond it. `kvl_merge_states` joins the outputs of all segments, of which one
 * takes the sink logits; `kvl_attention_chunks` and `kvl_merge_chunks` join them to the bit.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null, a negative number, more keys than an axis holds, an offset that leaves 32 bits, and lists that
 * share memory are errors, and nothing is written.
 */
kvl_status kvl_shard_lengths(int64_t first,
                             int64_t count,
                             int64_t batch,
                             int64_t seq,
                             const int32_t *lengths,
                             const int32_t *kv_starts,
                             const int32_t *offsets,
                             int32_t *local_lengths,
                             int32_t *local_kv_starts,
                             int32_t *local_offsets);

/**
 * The slots, in a cache that holds `count` keys from key `first` on, of tokens that a whole cache would have from
 * `positions[b]`, [batch], on: `slots`, [batch, seq], for `kvl_kv_write_params`, with -1 for tokens of other segments.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null, a negative number or position, more keys than an axis holds, and lists that share memory are
 * errors, and nothing is written.
 */
kvl_status kvl_shard_slots(int64_t first,
                           int64_t count,
                           int64_t batch,
                           int64_t seq,
                           const int32_t *positions,
                           int32_t *slots);

/**
 * The part of a tensor with the indices `first` to `first + count - 1` of an axis (0 batch, 1 seq, 2 heads, 3 dim), in
 * the same memory.
 *
 * Thread safety: may be called from any number of threads at once, with disjoint outputs.
 * Bad input: null, an invalid view, an axis that does not exist, and indices outside it are errors, and nothing is
 * written.
 */
kvl_status kvl_shard_view(const struct kvl_view *view,
                          int32_t axis,
                          int64_t first,
                          int64_t count,
                          struct kvl_view *part);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

/* Initialisers: everything is zero but the size. */
#ifdef __cplusplus
#define KVL_SIZED_INIT_(type) ([] { type value = {}; value.struct_size = sizeof(type); return value; }())
#else
#define KVL_SIZED_INIT_(type) { .struct_size = sizeof(type) }
#endif
#define KVL_CONTEXT_PARAMS_INIT KVL_SIZED_INIT_(kvl_context_params)
#define KVL_TUNING_INIT KVL_SIZED_INIT_(kvl_tuning)
#define KVL_PARALLEL_RUNNER_INIT KVL_SIZED_INIT_(kvl_parallel_runner)
#define KVL_KERNEL_INFO_INIT KVL_SIZED_INIT_(kvl_kernel_info)
#define KVL_ROPE_FREQUENCIES_PARAMS_INIT KVL_SIZED_INIT_(kvl_rope_frequencies_params)
#define KVL_ROPE_PARAMS_INIT KVL_SIZED_INIT_(kvl_rope_params)
#define KVL_LAYOUT_INIT KVL_SIZED_INIT_(kvl_layout)
#define KVL_CACHE_SCALES_INIT KVL_SIZED_INIT_(kvl_cache_scales)
#define KVL_CACHE_INIT KVL_SIZED_INIT_(kvl_cache)
#define KVL_SHARD_INIT KVL_SIZED_INIT_(kvl_shard)
#define KVL_RMS_NORM_PARAMS_INIT KVL_SIZED_INIT_(kvl_rms_norm_params)
#define KVL_KV_READ_PARAMS_INIT KVL_SIZED_INIT_(kvl_kv_read_params)
#define KVL_KV_WRITE_PARAMS_INIT KVL_SIZED_INIT_(kvl_kv_write_params)
#define KVL_BIT_MASK_INIT KVL_SIZED_INIT_(kvl_bit_mask)
#define KVL_ATTENTION_PARAMS_INIT KVL_SIZED_INIT_(kvl_attention_params)
#define KVL_MERGE_CHUNKS_PARAMS_INIT KVL_SIZED_INIT_(kvl_merge_chunks_params)

/* Helpers that only fill in structs and are no symbols of the library. Define KVL_NO_INLINE_HELPERS to leave them out, for
 * example for a generator of bindings. */
#ifndef KVL_NO_INLINE_HELPERS

/* A view of a tensor, or of a cache in any format, that lies in memory in the order of its axes. */
static inline kvl_view kvl_make_view(void *data, kvl_dtype dtype, int64_t batch, int64_t seq, int64_t heads,
                                     int64_t dim) {
    kvl_view view;
    view.data = data;
    view.dtype = dtype;
    view.reserved = 0;
    view.shape[0] = batch;
    view.shape[1] = seq;
    view.shape[2] = heads;
    view.shape[3] = dim;
    /* Unsigned, because numbers that are too large are the library's to refuse. */
    view.strides[3] = 1;
    view.strides[2] = dtype >= KVL_FORMAT_Q8_0 && dtype <= KVL_FORMAT_IQ4_NL ? dim / 32
                                                                         : dtype == KVL_FORMAT_AFFINE4 ? dim / 2 : dim;
    view.strides[1] = (int64_t)((uint64_t)heads * (uint64_t)view.strides[2]);
    view.strides[0] = (int64_t)((uint64_t)seq * (uint64_t)view.strides[1]);
    view.bytes = 0;
    return view;
}

/* A view to read of what a view can write. */
static inline kvl_const_view kvl_as_const(kvl_view view) {
    kvl_const_view result;
    int axis;
    result.data = view.data;
    result.dtype = view.dtype;
    result.reserved = view.reserved;
    for (axis = 0; axis < 4; axis++) {
        result.shape[axis] = view.shape[axis];
        result.strides[axis] = view.strides[axis];
    }
    result.bytes = view.bytes;
    return result;
}

/* A view of a tensor that is only read and lies in memory in the order of its axes. */
static inline kvl_const_view kvl_make_const_view(const void *data, kvl_dtype dtype, int64_t batch, int64_t seq,
                                                 int64_t heads, int64_t dim) {
    kvl_const_view view = kvl_as_const(kvl_make_view(NULL, dtype, batch, seq, heads, dim));
    view.data = data;
    return view;
}

/* The write of contiguous new keys and values of `seq` tokens of each of `batch` sequences, k [batch, seq, kv_heads, dim] and
 * v [batch, seq, kv_heads, v_dim], whose heads and dims are those of the caches. `positions`, [batch], has the position of the
 * first token of each sequence. Everything else has its default. */
static inline kvl_kv_write_params kvl_make_kv_write(kvl_view k_cache, kvl_view v_cache, const void *k, const void *v,
                                                    kvl_dtype dtype, int64_t batch, int64_t seq,
                                                    const int32_t *positions) {
    kvl_kv_write_params params = KVL_KV_WRITE_PARAMS_INIT;
    params.k = kvl_make_const_view(k, dtype, batch, seq, k_cache.shape[2], k_cache.shape[3]);
    params.v = kvl_make_const_view(v, dtype, batch, seq, v_cache.shape[2], v_cache.shape[3]);
    params.k_cache = k_cache;
    params.v_cache = v_cache;
    params.positions = positions;
    return params;
}

/* Causal attention of contiguous queries q [batch, seq, heads, dim] to a contiguous output [batch, seq, heads, v_dim] of the
 * same type, with the dims of the caches. `lengths`, [batch], counts the tokens in the caches, those of the queries included,
 * which are the last. A prompt and a step of decode differ in `seq` alone. Everything else has its default. */
static inline kvl_attention_params kvl_make_causal_attention(kvl_view k_cache, kvl_view v_cache, const void *q, void *out,
                                                             kvl_dtype dtype, int64_t batch, int64_t seq, int64_t heads,
                                                             const int32_t *lengths) {
    kvl_attention_params params = KVL_ATTENTION_PARAMS_INIT;
    params.q = kvl_make_const_view(q, dtype, batch, seq, heads, k_cache.shape[3]);
    params.k = kvl_as_const(k_cache);
    params.v = kvl_as_const(v_cache);
    params.out = kvl_make_view(out, dtype, batch, seq, heads, v_cache.shape[3]);
    params.flags = KVL_ATTENTION_FLAG_CAUSAL;
    params.lengths = lengths;
    return params;
}

#endif /* KVL_NO_INLINE_HELPERS */

#endif /* KVLANE_H */
