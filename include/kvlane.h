/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * kvlane: attention over a key/value cache for CPUs. Generated from src/capi of the sources; do not edit.
 *
 * A program makes one kvl_context, which chooses the kernels for the machine, and calls operations with it on memory of
 * its own: kvl_rope rotates queries and keys, kvl_kv_write puts new keys and values into a cache (and can rotate on the
 * way), kvl_attention attends to the cache. kvl_repeat_kv and kvl_merge_states are there for those who need them.
 *
 * Conventions, for every function:
 * - Tensors are views: a pointer, an element type, and shape and strides over the axes batch, seq, heads, dim, in this
 *   order whatever the order in memory. Strides count elements. kvl_make_view and kvl_make_const_view fill in those of
 *   a tensor that lies in memory in the order of its axes; for any other order, set strides yourself.
 * - Structs that may grow begin with struct_size and are initialised by a macro KVL_..._INIT; every other field of it is
 *   zero, and zero always means "the default" or "absent". Other structs never change.
 * - Numbers that are never negative are signed all the same: a negative one is an error, with a sentence.
 * - A function that can fail returns a kvl_status; kvl_last_error has the sentence. Everything is checked before the
 *   first byte is written. What cannot be checked is that pointers point to what they should: a list has as many entries
 *   as its comment says, and lists, masks and biases are not changed while a call runs.
 * - The library keeps no pointer after a call, allocates nothing in a call that computes, prints nothing, never exits,
 *   has no state but contexts, pools and the last error of each thread, and starts no thread unless it is asked for a pool.
 * - Operations run on the threads of a kvl_parallel_runner, or with null on the calling thread. No bit of a result
 *   depends on it.
 */
#ifndef KVLANE_H
#define KVLANE_H


#include <stddef.h>
#include <stdint.h>

/**
 * It worked.
 */
#define KVL_OK 0

/**
 * A pointer that must not be null is null.
 */
#define KVL_ERR_NULL_POINTER 1

/**
 * A `struct_size` is none that this version of the library knows.
 */
#define KVL_ERR_STRUCT_SIZE 2

/**
 * An integer stands for no value of its enumeration, or a reserved bit is set.
 */
#define KVL_ERR_INVALID_ENUM 3

/**
 * A number is outside what the argument can mean (NaN scale, odd `rotary_dim`, ...).
 */
#define KVL_ERR_INVALID_VALUE 4

/**
 * Shapes do not fit each other, or have a negative axis.
 */
#define KVL_ERR_SHAPE 5

/**
 * Strides let elements of an output share memory, or overflow when multiplied by the shape.
 */
#define KVL_ERR_STRIDE 6

/**
 * A view reaches outside its buffer, or a pointer is not aligned to its elements.
 */
#define KVL_ERR_BOUNDS 7

/**
 * A write would go past the capacity of the cache.
 */
#define KVL_ERR_CAPACITY 8

/**
 * A position, length, row or slot is outside its range.
 */
#define KVL_ERR_OUT_OF_RANGE 9

/**
 * An output shares memory with an input or with another output.
 */
#define KVL_ERR_OVERLAP 10

/**
 * Two tokens of one call would be written to the same slot.
 */
#define KVL_ERR_DUPLICATE_SLOT 11

/**
 * Element types that cannot be combined.
 */
#define KVL_ERR_DTYPE 12

/**
 * The workspace is too small or not aligned to 64 bytes.
 */
#define KVL_ERR_WORKSPACE 13

/**
 * What is asked for does not exist on this machine or in this build.
 */
#define KVL_ERR_UNSUPPORTED 14

/**
 * The parallel runner did not run its tasks.
 */
#define KVL_ERR_PARALLEL 15

/**
 * A bug in the library: a panic was caught.
 */
#define KVL_ERR_INTERNAL 16

/**
 * IEEE 754 binary32.
 */
#define KVL_F32 0

/**
 * IEEE 754 binary16.
 */
#define KVL_F16 1

/**
 * bfloat16: the upper half of a binary32.
 */
#define KVL_BF16 2

/**
 * No level, but the best there is.
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
 * x86-64 with what `KVL_ISA_AVX512` needs, AMX tiles and their bf16 products. Preferred to that level, though it has
 * kernels for attention over bf16 alone; the others are those of `KVL_ISA_AVX512`.
 */
#define KVL_ISA_AMX 5

/**
 * AArch64 with what `KVL_ISA_NEON` needs and bf16 matrix products (FEAT_BF16). Preferred to that level, though it has
 * kernels for attention over bf16 alone; the others are those of `KVL_ISA_NEON`.
 */
#define KVL_ISA_NEON_BF16 6

/**
 * Cosines and sines of RoPE angles; `KVL_F32` twice.
 */
#define KVL_OP_ROPE_ANGLES 0

/**
 * RoPE, and RoPE fused with a cache write: source type, target type.
 */
#define KVL_OP_ROPE 1

/**
 * The cache write: source type, target type.
 */
#define KVL_OP_KV_WRITE 2

/**
 * The explicit repeat of KV heads: one type twice.
 */
#define KVL_OP_REPEAT_KV 3

/**
 * Attention over a cache: the type of K and V twice; queries and output may be of any type.
 */
#define KVL_OP_ATTENTION 4

/**
 * The merge of attention states: one type twice.
 */
#define KVL_OP_MERGE_STATES 5

/**
 * The fastest kernel. Over a bf16 cache at `KVL_ISA_AMX` and `KVL_ISA_NEON_BF16`, softmax weights are rounded to bf16.
 */
#define KVL_PRECISION_DEFAULT 0

/**
 * What f32 arithmetic gives.
 */
#define KVL_PRECISION_HIGH 1

/**
 * Elements 2i and 2i + 1: the original paper, Meta's Llama code, llama.cpp's Llama files.
 */
#define KVL_INTERLEAVED 0

/**
 * Elements i and i + rotary_dim / 2: GPT-NeoX, Grok-1, Hugging Face.
 */
#define KVL_HALF_SPLIT 1

/**
 * Not at all: `f_i = base^(-2i / rotary_dim)`.
 */
#define KVL_ROPE_UNSCALED 0

/**
 * `f_i / factor`. Reads `factor`.
 */
#define KVL_ROPE_LINEAR 1

/**
 * The base becomes `base * factor^(rotary_dim / (rotary_dim - 2))`. Reads `factor`.
 */
#define KVL_ROPE_NTK 2

/**
 * Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended. Reads `factor`,
 * `low_freq_factor`, `high_freq_factor`, `original_max_position`.
 */
#define KVL_ROPE_LLAMA3 3

/**
 * YaRN: a ramp between interpolation and extrapolation over the pairs. Reads `factor`, `original_max_position`,
 * `beta_fast`, `beta_slow`, `attention_factor`, `keep_ramp`.
 */
#define KVL_ROPE_YARN 4

/**
 * LongRoPE: `f_i / factors[i]`. Reads `factors`, `attention_factor` and, if that is 0, `factor` and
 * `original_max_position`.
 */
#define KVL_ROPE_LONGROPE 5

/**
 * In `kvl_attention_params.flags`: no key after the query's own position is visible.
 */
#define KVL_CAUSAL 1

/**
 * In `kvl_attention_params.flags`: `window_left` counts.
 */
#define KVL_WINDOW_LEFT 2

/**
 * In `kvl_attention_params.flags`: `window_right` counts.
 */
#define KVL_WINDOW_RIGHT 4

/**
 * The version of the ABI that this header describes: `major * 65536 + minor`. A library of the same major and of this or
 * a higher minor version serves it. The SONAME carries the major version.
 */
#define KVL_ABI_VERSION 2

/**
 * The kernels chosen for a machine. Made by `kvl_context_create`, immutable from then on.
 */
typedef struct kvl_context kvl_context;

/**
 * A pool of threads. Made by `kvl_thread_pool_create`.
 */
typedef struct kvl_thread_pool kvl_thread_pool;

/**
 * What a call came to: 0, or one of `KVL_ERR_*`. Values are never changed or reused. When it is not 0,
 * `kvl_last_error` has the sentence, and no output has been touched unless it is `KVL_ERR_PARALLEL` or
 * `KVL_ERR_INTERNAL`.
 */
typedef int32_t kvl_status;

/**
 * A level of instruction sets.
 */
typedef int32_t kvl_isa;

/**
 * What a kernel does; kernels are chosen by operation and element types.
 */
typedef int32_t kvl_op;

/**
 * The type of elements.
 */
typedef int32_t kvl_dtype;

/**
 * What the registry says of a kernel. Start from `KVL_KERNEL_INFO_INIT`.
 */
typedef struct kvl_kernel_info {
    /**
     * `sizeof(kvl_kernel_info)`.
     */
    size_t struct_size;
    /**
     * `<op>_<types>_<isa>`; a constant of the library.
     */
    const char *name;
    /**
     * What it does.
     */
    kvl_op op;
    /**
     * The type it reads.
     */
    kvl_dtype src;
    /**
     * The type it writes.
     */
    kvl_dtype dst;
    /**
     * The level it is compiled for.
     */
    kvl_isa isa;
    /**
     * 1 if this machine can run it, 0 if not.
     */
    int32_t available;
    /**
     * The largest error against exact arithmetic on the same inputs with f32 output, as a fraction of the largest magnitude
     * that goes into the result (of V in attention); rounding to a narrower target comes on top.
     */
    float max_error;
} kvl_kernel_info;

/**
 * What a context is made from. Start from `KVL_CONTEXT_PARAMS_INIT`.
 */
typedef struct kvl_context_params {
    /**
     * `sizeof(kvl_context_params)`.
     */
    size_t struct_size;
    /**
     * The highest level to use; 0 (`KVL_ISA_BEST`) for no limit. The environment variable `KVLANE_MAX_ISA` (`scalar`,
     * `avx2`, ...) can lower it further, and neither can raise.
     */
    kvl_isa max_isa;
    /**
     * 0.
     */
    int32_t reserved;
} kvl_context_params;

/**
 * How exactly attention computes, where a level has kernels for more than one answer.
 */
typedef int32_t kvl_precision;

/**
 * Runs `n` independent tasks of an operation on the caller's threads. Start from `KVL_PARALLEL_RUNNER_INIT`.
 *
 * `run` calls `task(task_ctx, i)` exactly once for every i in 0 .. n, on any threads in any order, also all on one, and
 * returns 0 after the last of these calls has returned; anything but 0 says that it could not. It must not unwind (no
 * C++ exception, no longjmp). `n` is at most `num_threads`. No bit of a result depends on the runner.
 */
typedef struct kvl_parallel_runner {
    /**
     * `sizeof(kvl_parallel_runner)`.
     */
    size_t struct_size;
    /**
     * Handed to `run`.
     */
    void *ctx;
    /**
     * How many tasks can run at the same time; at least 1.
     */
    size_t num_threads;
    /**
     * Runs the tasks.
     */
    int32_t (*run)(void *ctx, size_t n, void (*task)(void *task_ctx, size_t i), void *task_ctx);
} kvl_parallel_runner;

/**
 * How RoPE frequencies are stretched beyond the length that a model was trained for.
 */
typedef int32_t kvl_rope_scaling;

/**
 * What RoPE frequencies are made from. Start from `KVL_ROPE_FREQUENCIES_PARAMS_INIT`, set `rotary_dim`, `base` and what the
 * `scaling` reads.
 */
typedef struct kvl_rope_frequencies_params {
    /**
     * `sizeof(kvl_rope_frequencies_params)`.
     */
    size_t struct_size;
    /**
     * How many leading elements of a head are turned; even, 2 to 4096.
     */
    int64_t rotary_dim;
    /**
     * The base; 0 is 10000.
     */
    double base;
    /**
     * How frequencies are stretched.
     */
    kvl_rope_scaling scaling;
    /**
     * YaRN: 0 rounds the ends of the ramp outwards to whole pairs, as most sources do; 1 leaves them.
     */
    int32_t keep_ramp;
    /**
     * How much longer than in training.
     */
    double factor;
    /**
     * The length, in tokens, that the model was trained for.
     */
    double original_max_position;
    /**
     * Llama 3.1: wavelengths above `original_max_position / low_freq_factor` are divided; 0 is 1.
     */
    double low_freq_factor;
    /**
     * Llama 3.1: wavelengths below `original_max_position / high_freq_factor` are kept; 0 is 4.
     */
    double high_freq_factor;
    /**
     * YaRN: pairs that turn more often over the original length are kept; 0 is the paper's 32.
     */
    double beta_fast;
    /**
     * YaRN: pairs that turn less often over the original length are divided by `factor`; 0 is the paper's 1.
     */
    double beta_slow;
    /**
     * YaRN and LongRoPE: factor on cosines and sines; 0 is the paper's (`0.1 ln(factor) + 1`, and
     * `sqrt(1 + ln(factor) / ln(original_max_position))`). Sources disagree about YaRN's: give it where the model says it.
     */
    double attention_factor;
    /**
     * LongRoPE: `rotary_dim / 2` divisors. Which of a model's two lists applies depends on the length of the text.
     */
    const double *factors;
} kvl_rope_frequencies_params;

/**
 * A tensor in the caller's memory that is read; otherwise as `kvl_view`. Strides may be 0, to broadcast.
 */
typedef struct kvl_const_view {
    /**
     * Element [0, 0, 0, 0].
     */
    const void *data;
    /**
     * The type of the elements.
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
     * Distance of neighbours along each axis, in elements.
     */
    int64_t strides[4];
    /**
     * Bytes from `data` to the end of the buffer; 0 if not known.
     */
    size_t bytes;
} kvl_const_view;

/**
 * A tensor in the caller's memory that is written. Axes are always in the order batch, seq, heads, dim, whatever their
 * order in memory: that is what strides are for. Element [b, s, h, d] is at
 * `data + element_size * (b * strides[0] + s * strides[1] + h * strides[2] + d * strides[3])`.
 *
 * `data` is aligned to its elements. Strides may be negative; no two elements of a written view share memory. Nothing
 * outside the elements is ever read or written. A view whose bytes are all 0 is an absent one.
 */
typedef struct kvl_view {
    /**
     * Element [0, 0, 0, 0].
     */
    void *data;
    /**
     * The type of the elements.
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
     * Distance of neighbours along each axis, in elements.
     */
    int64_t strides[4];
    /**
     * Bytes from `data` to the end of the buffer, to check shape and strides against; 0 if not known. When it is given,
     * strides must not reach before `data`.
     */
    size_t bytes;
} kvl_view;

/**
 * Which elements of a head form a pair that RoPE turns.
 */
typedef int32_t kvl_pairing;

/**
 * How to rotate. Start from `KVL_ROPE_PARAMS_INIT`, set `rotary_dim`, either `inv_freq` or both `cos` and `sin`, and either
 * `offsets` or `positions`.
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
     * How many leading elements of a head are rotated, the others are copied; even, 2 to 4096, at most dim.
     */
    int64_t rotary_dim;
    /**
     * [rotary_dim / 2] radians a position, from `kvl_rope_frequencies` or elsewhere. Angles are computed and reduced in f64.
     */
    const double *inv_freq;
    /**
     * Factor on cosines and sines, with `inv_freq`; 0 is 1.
     */
    double magnitude;
    /**
     * [table_rows, rotary_dim / 2] cosines, instead of `inv_freq`; a position is a row.
     */
    const float *cos;
    /**
     * [table_rows, rotary_dim / 2] sines.
     */
    const float *sin;
    /**
     * Rows of `cos` and of `sin`.
     */
    int64_t table_rows;
    /**
     * [batch]: token t of row b is at position `offsets[b] + t`. Positions may be negative with `inv_freq`.
     */
    const int32_t *offsets;
    /**
     * [batch, seq]: the position of every token, instead of `offsets`.
     */
    const int32_t *positions;
} kvl_rope_params;

/**
 * New keys and values, their caches, and where they go. Start from `KVL_KV_WRITE_PARAMS_INIT`, set `k`, `k_cache`, usually
 * `v` and `v_cache`, and either `positions` or `slots`.
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
     * New values [batch, seq, kv_heads, v_dim]; absent together with `v_cache` to write keys alone.
     */
    struct kvl_const_view v;
    /**
     * Where keys go: [rows, capacity, kv_heads, dim], of any type.
     */
    struct kvl_view k_cache;
    /**
     * Where values go: [rows, capacity, kv_heads, v_dim], of any type.
     */
    struct kvl_view v_cache;
    /**
     * [batch]: token t of row b goes to slot `positions[b] + t`.
     */
    const int32_t *positions;
    /**
     * [batch]: only the first `counts[b]` tokens of row b are written (padded prompts); null for all.
     */
    const int32_t *counts;
    /**
     * [batch]: source row b goes to row `rows[b]` of the cache; null for row b.
     */
    const int32_t *rows;
    /**
     * [batch, seq]: the slot of each token, instead of `positions`; -1 skips it.
     */
    const int32_t *slots;
    /**
     * Rotates keys on their way into the cache; null to write them as they are. The same bits as `kvl_rope` into a view
     * of the cache's type.
     */
    const struct kvl_rope_params *rope;
} kvl_kv_write_params;

/**
 * A boolean mask [batch, seq, heads, keys] of bytes: 0 hides a key from a query, anything else shows it. Strides may be
 * 0, to broadcast. A mask whose bytes are all 0 is an absent one.
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
     * Distance of neighbours along each axis, in bytes.
     */
    int64_t strides[4];
    /**
     * Bytes from `data` to the end of the buffer; 0 if not known.
     */
    size_t bytes;
} kvl_mask;

/**
 * What attention reads, writes and sees. Start from `KVL_ATTENTION_PARAMS_INIT`, which sees every key; set `q`, `k`, `v`
 * and `out`. Query head h reads KV head `h / (heads / kv_heads)`; nothing is repeated in memory.
 *
 * A logit is `softcap(q.k * scale) + alibi + bias`; then what is masked is taken out, then softmax in f32. Query i of a
 * row stands at position p = i + offset among the keys, and sees key j when all of these hold: `j < lengths[row]`,
 * `j >= starts[row]`, causal: `j <= p`, left window: `j >= p - window_left`, right window: `j <= p + window_right`, the
 * mask's entry is not 0, the bias is not -inf. A query that sees no key has output 0 and LSE -inf (with a sink: the
 * sink's logit). What is not seen cannot reach the output, NaN or not; what is seen does.
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
     * Keys [batch, keys, kv_heads, dim]: the cache, whole.
     */
    struct kvl_const_view k;
    /**
     * Values [batch, keys, kv_heads, v_dim], of the type of the keys.
     */
    struct kvl_const_view v;
    /**
     * Output [batch, seq, heads, v_dim], of any type.
     */
    struct kvl_view out;
    /**
     * Output [batch, seq, heads], contiguous: natural logarithm of the sum of the exponentials of a row's logits; null
     * if not wanted.
     */
    float *lse;
    /**
     * Factor on q.k; 0 is 1 / sqrt(dim).
     */
    float scale;
    /**
     * `softcap * tanh(x / softcap)` on scaled logits; 0 is none.
     */
    float softcap;
    /**
     * `KVL_CAUSAL | KVL_WINDOW_LEFT | KVL_WINDOW_RIGHT`. A window of 0 keys means something, so whether there is a window
     * is said here, not by its size.
     */
    uint32_t flags;
    /**
     * 0.
     */
    int32_t reserved;
    /**
     * With `KVL_WINDOW_LEFT`: keys visible before the query's own position, not counting it; -1 for all. Else 0.
     */
    int64_t window_left;
    /**
     * With `KVL_WINDOW_RIGHT`: keys visible after the query's own position, not counting it; -1 for all. Else 0.
     */
    int64_t window_right;
    /**
     * [batch]: valid keys; null for all.
     */
    const int32_t *lengths;
    /**
     * [batch]: the first visible key (left-padded batches); null for 0.
     */
    const int32_t *starts;
    /**
     * [batch]: the position of query 0 among the keys; null for `length - seq`, so that the last query sees the last key.
     * A negative one leaves leading queries without keys.
     */
    const int32_t *offsets;
    /**
     * Which keys each query sees, [batch, seq, heads, keys]; absent for all.
     */
    struct kvl_mask mask;
    /**
     * Added to logits, [batch, seq, heads, keys], of any type; absent for none.
     */
    struct kvl_const_view bias;
    /**
     * [heads]: `slope * (j - p)` is added to logits; null for none. See `kvl_alibi_slopes`.
     */
    const float *alibi_slopes;
    /**
     * [heads]: one more logit, which takes weight and has no value; null for none.
     */
    const float *sinks;
    /**
     * How exactly to compute; see `kvl_context_attention_kernel_name`. Since ABI version 2.
     */
    kvl_precision precision;
    /**
     * 0.
     */
    int32_t reserved2;
} kvl_attention_params;

/**
 * One attention state: an output, and the natural logarithm of the sum of its exponentials.
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

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The version of the ABI that the library has: `major * 65536 + minor`, to compare with `KVL_ABI_VERSION`.
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
 * Bad input: a number that is no status is "unknown status".
 */
const char *kvl_status_string(kvl_status status);

/**
 * The sentence that belongs to the last status other than `KVL_OK` on the calling thread: which argument, and the numbers
 * that disagree. Empty if there was none. A successful call leaves it alone.
 *
 * Copies at most `size` bytes, the terminating zero included, cutting what does not fit, and returns how many bytes the
 * whole sentence needs (at most 1024). `buffer` may be null to ask for that alone.
 *
 * Thread safety: may be called from any thread at any time; every thread has its own sentence, and the one that
 * made a call gets its sentence even if the mistake showed on a worker thread.
 * Bad input: there is none, as long as `buffer` has `size` bytes.
 */
size_t kvl_last_error(char *buffer,
                      size_t size);

/**
 * The name of a level, such as "avx2"; a constant.
 *
 * Thread safety: may be called from any thread at any time.
 * Bad input: a number that is no level is "unknown", and `KVL_ISA_BEST` is "best".
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
 * How many kernels the library has, of all levels that it was built with.
 *
 * Thread safety: may be called from any thread at any time.
 * Bad input: there is none.
 */
size_t kvl_kernel_count(void);

/**
 * Describes kernel `index`, 0 .. `kvl_kernel_count()`; the order may change from version to version.
 *
 * Thread safety: may be called from any thread at any time.
 * Bad input: null, an unknown `info->struct_size` or an index past the end is an error, and `info` is not touched.
 */
kvl_status kvl_kernel_info_at(size_t index,
                              struct kvl_kernel_info *info);

/**
 * Makes a context: looks at the CPU and chooses a kernel for each operation and type.
 *
 * `params` may be null for the defaults: the best level there is, lowered by `KVLANE_MAX_ISA` if that is set. The context
 * is released with `kvl_context_destroy`.
 *
 * Thread safety: may be called from any thread; it reads the environment, so nobody may change that meanwhile.
 * Bad input: null, an unknown `struct_size`, a level that is none (also in `KVLANE_MAX_ISA`) or one of another architecture is
 * an error, and `*context` is not touched.
 */
kvl_status kvl_context_create(const struct kvl_context_params *params,
                              struct kvl_context **context);

/**
 * Releases a context; null is allowed.
 *
 * Thread safety: no other call may use the context meanwhile or afterwards.
 * Bad input: a pointer that is not from `kvl_context_create`, or one that was released already, is undefined behaviour.
 */
void kvl_context_destroy(struct kvl_context *context);

/**
 * The level that a context uses.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null is an error, and `*isa` is not touched.
 */
kvl_status kvl_context_isa(const struct kvl_context *context, kvl_isa *isa);

/**
 * The name of the kernel that serves an operation, such as "attention_bf16_avx512"; a constant of the library. Which two
 * types an operation has is said at `kvl_op`.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null, numbers that are no operation or type, or types that no kernel has is an error, and `*name` is not touched.
 */
kvl_status kvl_context_kernel_name(const struct kvl_context *context,
                                   kvl_op op,
                                   kvl_dtype src,
                                   kvl_dtype dst,
                                   const char **name);

/**
 * The name of the kernel that serves attention over K and V of a type with a precision, such as
 * "attention_bf16_high_amx"; a constant of the library. `kvl_context_kernel_name` tells that of `KVL_PRECISION_DEFAULT`; most
 * kernels serve both. What precision a kernel has is `max_error` in `kvl_kernel_info`. Since ABI version 2.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null or numbers that are no type or precision is an error, and `*name` is not touched.
 */
kvl_status kvl_context_attention_kernel_name(const struct kvl_context *context,
                                             kvl_dtype kv,
                                             kvl_precision precision,
                                             const char **name);

/**
 * Makes a pool of threads, for callers that have none; 0 threads are as many as the machine runs at once. It is released
 * with `kvl_thread_pool_destroy`.
 *
 * Thread safety: may be called from any thread.
 * Bad input: null is an error, and so is a library built without the feature `rayon` (`KVL_ERR_UNSUPPORTED`); `*pool` is not
 * touched.
 */
kvl_status kvl_thread_pool_create(size_t num_threads,
                                  struct kvl_thread_pool **pool);

/**
 * Ends the threads of a pool and releases it; null is allowed. Not to be called from one of its own threads.
 *
 * Thread safety: no call may use the pool, or a runner from it, meanwhile or afterwards.
 * Bad input: a pointer that is not from `kvl_thread_pool_create`, or one that was released already, is undefined behaviour.
 */
void kvl_thread_pool_destroy(struct kvl_thread_pool *pool);

/**
 * Fills a runner that uses a pool, as long as the pool lives.
 *
 * Thread safety: may be called from any number of threads at once; and so may operations with the runner, which then share
 * the pool.
 * Bad input: null or an unknown `runner->struct_size` is an error, and `runner` is not touched.
 */
kvl_status kvl_thread_pool_runner(const struct kvl_thread_pool *pool,
                                  struct kvl_parallel_runner *runner);

/**
 * Computes RoPE frequencies: `inv_freq` receives `pairs` = rotary_dim / 2 numbers, in radians a position, and `*magnitude`
 * the factor on cosines and sines. Meant for when a model is loaded; unlike the operations it allocates.
 *
 * Thread safety: may be called from any number of threads at once on disjoint outputs.
 * Bad input: null, an unknown `struct_size` or scaling, a `pairs` that is not rotary_dim / 2, a parameter that is not finite or
 * not positive is an error, and nothing is written.
 */
kvl_status kvl_rope_frequencies(const struct kvl_rope_frequencies_params *params,
                                double *inv_freq,
                                int64_t pairs,
                                double *magnitude);

/**
 * Computes cosines and sines, [rows, rotary_dim / 2] each, for positions `first_position` .. `first_position + rows`: a
 * table for `kvl_rope_params`, whose rows are then counted from `first_position`. `magnitude` 0 is 1.
 *
 * Thread safety: may be called from any number of threads at once on disjoint outputs.
 * Bad input: null, an odd `rotary_dim` or one outside 2 to 4096, a number that is not finite, outputs that share memory with
 * each other or with `inv_freq` are errors, and nothing is written.
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
 * Rotates queries or keys: `dst = RoPE(src)`, both [batch, seq, heads, dim], of any strides and types; arithmetic is f32,
 * rounded once to the type of `dst`. To rotate in place, let both views be the same.
 *
 * Thread safety: may be called from any number of threads at once on disjoint outputs; `runner` null is the calling thread.
 * Bad input: null, an unknown `struct_size` or enumeration value, shapes that differ, a `rotary_dim` that is odd or above dim,
 * positions outside a table, views that share memory without being the same are errors, and nothing is written.
 */
kvl_status kvl_rope(const struct kvl_context *context,
                    const struct kvl_parallel_runner *runner,
                    const struct kvl_const_view *src,
                    const struct kvl_view *dst,
                    const struct kvl_rope_params *params);

/**
 * Writes new keys and values into their caches, all rows in one call, each at its own place, converted to the cache's type
 * (to nearest, ties to even); rotates the keys on the way if `params->rope` is given. Lengths are the caller's to advance.
 *
 * Thread safety: may be called from any number of threads at once on disjoint caches or disjoint rows; `runner` null is the
 * calling thread.
 * Bad input: null, an unknown `struct_size` or enumeration value, shapes that do not fit, a slot past the capacity
 * (`KVL_ERR_CAPACITY`), a negative position, slot or row, two tokens for one slot, a cache that shares memory with
 * anything else are errors, and nothing is written: nothing is clamped.
 */
kvl_status kvl_kv_write(const struct kvl_context *context,
                        const struct kvl_parallel_runner *runner,
                        const struct kvl_kv_write_params *params);

/**
 * Repeats every head n times in a row: [batch, seq, kv_heads, dim] becomes [batch, seq, kv_heads * n, dim], of the same
 * type; n is the ratio of the head counts. Attention needs no such copy.
 *
 * Thread safety: may be called from any number of threads at once on disjoint outputs; `runner` null is the calling thread.
 * Bad input: null, head counts that are no multiple, other axes or types that differ, views that share memory are errors, and
 * nothing is written.
 */
kvl_status kvl_repeat_kv(const struct kvl_context *context,
                         const struct kvl_parallel_runner *runner,
                         const struct kvl_const_view *src,
                         const struct kvl_view *dst);

/**
 * Bytes of workspace that `kvl_attention` needs at most for the shapes of `params->q`, `k` and `v`, whatever lengths and
 * masks are, and for the threads of `runner`. Only those shapes are looked at: data may be null.
 *
 * Thread safety: may be called from any number of threads at once.
 * Bad input: null, an unknown `struct_size`, a negative axis or one above 2^31 - 1, a dim that is not 1 to 512 are errors, and
 * `*bytes` is not touched.
 */
kvl_status kvl_attention_workspace_size(const struct kvl_attention_params *params,
                                        const struct kvl_parallel_runner *runner,
                                        size_t *bytes);

/**
 * Grouped-query attention over a cache: one entry for prefill (the queries' keys are in the cache already), chunked prefill
 * and decode (seq = 1). Everything keeps its type; arithmetic is f32, rounded once to the type of `out`.
 *
 * `workspace` has `workspace_bytes` bytes, at least what `kvl_attention_workspace_size` says for the same shapes and runner, and
 * is aligned to 64 bytes. Its contents are worth nothing before and after. The bits of a row of the output depend on that
 * row's inputs and the level alone: not on the runner, the batch around it or the strides.
 *
 * Thread safety: may be called from any number of threads at once, each with outputs and a workspace of its own: two calls at
 * the same time with the same workspace compute garbage. `runner` null is the calling thread.
 * Bad input: null, an unknown `struct_size`, flag or enumeration value, shapes that do not fit, K and V of different types,
 * lengths outside the cache, an output that shares memory with an input, a workspace that is too small or misaligned are
 * errors, and nothing is written.
 */
kvl_status kvl_attention(const struct kvl_context *context,
                         const struct kvl_parallel_runner *runner,
                         void *workspace,
                         size_t workspace_bytes,
                         const struct kvl_attention_params *params);

/**
 * Merges states over disjoint sets of keys into the state over all of them: `out = sum_i w_i out_i` with
 * `w_i = exp(lse_i - lse)` and `lse = ln sum_i exp(lse_i)`. `lse`, [batch, seq, heads] and contiguous, may be null. All
 * outputs are of one type; the order of the states is the order of the sums. A state with an LSE of -inf is empty: its
 * output is not read. Merging only empty states gives output 0 and LSE -inf.
 *
 * Thread safety: may be called from any number of threads at once on disjoint outputs; `runner` null is the calling thread.
 * Bad input: null, no state or more than 256, shapes or types that differ, an output that shares memory with an input are
 * errors, and nothing is written.
 */
kvl_status kvl_merge_states(const struct kvl_context *context,
                            const struct kvl_parallel_runner *runner,
                            const struct kvl_attention_state *states,
                            size_t num_states,
                            const struct kvl_view *out,
                            float *lse);

/**
 * Fills the standard ALiBi slopes for any number of heads: for a power of two n, `2^(-8 (h + 1) / n)`; otherwise those of
 * the largest power of two below, then every other one of twice that.
 *
 * Thread safety: may be called from any number of threads at once on disjoint outputs.
 * Bad input: null or a negative number of heads is an error, and nothing is written.
 */
kvl_status kvl_alibi_slopes(float *slopes,
                            int64_t heads);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

/* Initialisers: all zero but the size. */
#ifdef __cplusplus
#define KVL_SIZED_INIT_(type) ([] { type value = {}; value.struct_size = sizeof(type); return value; }())
#else
#define KVL_SIZED_INIT_(type) { .struct_size = sizeof(type) }
#endif
#define KVL_CONTEXT_PARAMS_INIT KVL_SIZED_INIT_(kvl_context_params)
#define KVL_PARALLEL_RUNNER_INIT KVL_SIZED_INIT_(kvl_parallel_runner)
#define KVL_KERNEL_INFO_INIT KVL_SIZED_INIT_(kvl_kernel_info)
#define KVL_ROPE_FREQUENCIES_PARAMS_INIT KVL_SIZED_INIT_(kvl_rope_frequencies_params)
#define KVL_ROPE_PARAMS_INIT KVL_SIZED_INIT_(kvl_rope_params)
#define KVL_KV_WRITE_PARAMS_INIT KVL_SIZED_INIT_(kvl_kv_write_params)
#define KVL_ATTENTION_PARAMS_INIT KVL_SIZED_INIT_(kvl_attention_params)

/* A view of a tensor that lies in memory in the order of its axes. */
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
    view.strides[2] = dim;
    view.strides[1] = (int64_t)((uint64_t)heads * (uint64_t)view.strides[2]);
    view.strides[0] = (int64_t)((uint64_t)seq * (uint64_t)view.strides[1]);
    view.bytes = 0;
    return view;
}

/* What can be written can be read. */
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

#endif /* KVLANE_H */
