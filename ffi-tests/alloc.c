/* Calls that compute do not allocate: this program counts calls of malloc, which the library shares. For glibc. */
#include "check.h"

/* Sanitizers replace malloc. */
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#include <errno.h>

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);

static int allocations;

void *malloc(size_t size) {
    allocations++;
    return __libc_malloc(size);
}

void *calloc(size_t n, size_t size) {
    allocations++;
    return __libc_calloc(n, size);
}

void *realloc(void *old, size_t size) {
    allocations++;
    return __libc_realloc(old, size);
}

int posix_memalign(void **to, size_t alignment, size_t size) {
    allocations++;
    *to = __libc_memalign(alignment, size);
    return *to == NULL ? ENOMEM : 0;
}

enum { BATCH = 2, SEQ = 3, HEADS = 4, KV = 2, KEYS = 40, D = 16 };

static _Alignas(64) unsigned char workspace[1 << 20];
static float q[BATCH * SEQ * HEADS * D], k[BATCH * SEQ * KV * D], out[BATCH * SEQ * HEADS * D], lse[BATCH * SEQ * HEADS];
static float repeated[BATCH * SEQ * HEADS * D], cosines[8 * D / 2], sines[8 * D / 2], slopes[HEADS];
static uint16_t k_cache[BATCH * KEYS * KV * D], v_cache[BATCH * KEYS * KV * D];
static unsigned char mask[KEYS];
static float span[BATCH * SEQ * HEADS * (16 + D)];

static float layers_data[4][4 * 8 * KV * D];
static int32_t rows_of[4 * 8], pool_map[4];

/* A runner that starts no thread. */
static int32_t in_order(void *ctx, size_t n, void (*task)(void *, size_t), void *task_ctx) {
    size_t i;
    (void)ctx;
    for (i = 0; i < n; i++) task(task_ctx, i);
    return 0;
}

/* Ten pages of eight slots, or two rows of forty, in the same memory. */
static kvl_attention_params pool(const kvl_layout *layout) {
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    static const int32_t lengths[BATCH] = {10, 28};
    p.q = kvl_make_const_view(q, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    p.k = kvl_make_const_view(k_cache, KVL_DTYPE_BF16, 10, 8, KV, D);
    p.v = kvl_make_const_view(v_cache, KVL_DTYPE_BF16, 10, 8, KV, D);
    p.lengths = lengths;
    p.flags = KVL_ATTENTION_FLAG_CAUSAL;
    p.layout = layout;
    return p;
}

static kvl_layout pool_layout(void) {
    static const int32_t pages[] = {9, 0, 3, 4, 1, 7, 6, 2};
    kvl_layout layout = KVL_LAYOUT_INIT;
    layout.kind = KVL_LAYOUT_KIND_PAGED;
    layout.table = pages;
    layout.num_sequences = BATCH;
    layout.pages_per_sequence = 4;
    return layout;
}

static void attend(const kvl_context *context, const kvl_parallel_runner *runner, kvl_attention_params p) {
    size_t bytes;
    p.out = kvl_make_view(out, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    p.lse = lse;
    OK(kvl_attention_workspace_size(&p, runner, &bytes));
    CHECK(bytes <= sizeof workspace, "%d bytes", (int)bytes);
    OK(kvl_attention(context, runner, workspace, sizeof workspace, &p));
}

static void attend_to_spans(const kvl_context *context, const kvl_parallel_runner *runner, kvl_attention_params p) {
    kvl_chunk_states spans[2];
    kvl_merge_chunks_params merge = KVL_MERGE_CHUNKS_PARAMS_INIT;
    size_t bytes;
    merge.out = p.out;
    merge.lse = p.lse;
    memset(&p.out, 0, sizeof p.out);
    p.lse = NULL;
    OK(kvl_attention_chunks_states_len(&p, &spans[0].len));
    CHECK(spans[0].len == (int64_t)(sizeof span / sizeof *span), "%d floats", (int)spans[0].len);
    spans[0].states = span;
    spans[1] = spans[0];
    OK(kvl_attention_chunks_workspace_size(&p, runner, &bytes));
    CHECK(bytes <= sizeof workspace, "%d bytes", (int)bytes);
    OK(kvl_attention_chunks(context, runner, workspace, sizeof workspace, &p, span, spans[0].len));
    merge.segments = spans;
    merge.num_segments = 2;
    merge.kv_heads = KV;
    merge.k_format = merge.v_format = KVL_FORMAT_BF16;
    OK(kvl_merge_chunks_workspace_size(&merge, runner, &bytes));
    CHECK(bytes <= sizeof workspace, "%d bytes", (int)bytes);
    OK(kvl_merge_chunks(context, runner, workspace, sizeof workspace, &merge));
}

static void attend_by_layout(const kvl_context *context, const kvl_parallel_runner *runner, kvl_attention_params plain,
                             kvl_plan *plan) {
    static const int32_t counts[BATCH] = {1, 1}, prefixes[BATCH] = {2, 0}, page[1] = {5}, long_gone[BATCH] = {50, 61};
    static const int32_t starts[BATCH + 1] = {0, 35, 80}, query_starts[BATCH + 1] = {0, 1, SEQ};
    static int32_t beams[BATCH * KEYS];
    static const unsigned char tree[BATCH * SEQ] = {1, 3, 7, 1, 3, 5};
    static const int32_t first_keys[BATCH] = {7, 25};
    kvl_bit_mask mask = KVL_BIT_MASK_INIT;
    kvl_const_view prefix = kvl_make_const_view(k, KVL_DTYPE_F32, 1, SEQ, KV, D);
    kvl_layout layout = pool_layout();
    kvl_attention_params p = pool(&layout);
    size_t bytes;
    mask.data = tree;
    mask.shape[0] = BATCH, mask.shape[1] = mask.shape[3] = SEQ, mask.shape[2] = HEADS;
    mask.strides[0] = 8 * SEQ, mask.strides[1] = 8;
    mask.first_keys = first_keys;
    p.bit_mask = &mask;
    p.prefix_lengths = prefixes;
    attend(context, runner, p);
    /* An existing plan, advanced. */
    p = pool(NULL);
    p.lengths = NULL;
    p.flags = 0;
    p.plan = plan;
    attend(context, runner, p);
    OK(kvl_plan_set_table(plan, 0, 2, page, 1));
    OK(kvl_plan_advance(plan, counts, BATCH));
    attend(context, runner, p);
    p = pool(&layout);
    OK(kvl_plan_update(plan, &p));

    plain.alibi_slopes = NULL;
    memset(&plain.mask, 0, sizeof plain.mask);
    p = plain;
    p.layout = &layout;
    layout = (kvl_layout)KVL_LAYOUT_INIT;
    layout.kind = KVL_LAYOUT_KIND_RING;
    layout.sink_tokens = 2;
    p.lengths = long_gone;
    p.flags |= KVL_ATTENTION_FLAG_WINDOW_LEFT;
    p.window_left = 9;
    attend(context, runner, p);
    p = plain;
    p.layout = &layout;
    layout = (kvl_layout)KVL_LAYOUT_INIT;
    layout.kind = KVL_LAYOUT_KIND_INDIRECT;
    layout.num_sequences = BATCH;
    layout.table = beams;
    attend(context, runner, p);
    layout.kind = KVL_LAYOUT_KIND_RAGGED;
    layout.table = starts;
    p.k = kvl_make_const_view(k_cache, KVL_DTYPE_BF16, 1, BATCH * KEYS, KV, D);
    p.v = kvl_make_const_view(v_cache, KVL_DTYPE_BF16, 1, BATCH * KEYS, KV, D);
    attend(context, runner, p);
    p.q = kvl_make_const_view(q, KVL_DTYPE_F32, 1, SEQ, HEADS, D);
    p.cu_seqlens_q = query_starts;
    p.num_sequences = BATCH;
    p.out = kvl_make_view(out, KVL_DTYPE_F32, 1, SEQ, HEADS, D);
    OK(kvl_attention(context, runner, workspace, sizeof workspace, &p));
    OK(kvl_attention_with_prefix_workspace_size(&prefix, &plain, runner, &bytes));
    CHECK(bytes <= sizeof workspace, "%d bytes", (int)bytes);
    OK(kvl_attention_with_prefix(context, runner, workspace, sizeof workspace, &prefix, &prefix, NULL, &plain));
}

static void everything(const kvl_context *context, const kvl_parallel_runner *runner, kvl_plan *plan) {
    static const double inv_freq[D / 2] = {1.0, 0.5};
    static const int32_t positions[BATCH] = {7, 30}, lengths[BATCH] = {10, 33}, starts[BATCH] = {7, 20};
    kvl_rope_params turn = KVL_ROPE_PARAMS_INIT;
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    kvl_attention_state states[2];
    kvl_view queries = kvl_make_view(q, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D), to;
    kvl_const_view source = kvl_as_const(queries);
    static const int32_t pages[] = {9, 0, 3, 4, 1, 7, 6, 2};
    kvl_rms_norm_params norm = KVL_RMS_NORM_PARAMS_INIT;
    kvl_layout layout = KVL_LAYOUT_INIT;
    const char *name;
    size_t bytes;
    turn.rotary_dim = D;
    turn.inv_freq = inv_freq;
    turn.offsets = positions;
    OK(kvl_rope_table(context, inv_freq, D, 1, 0, 8, cosines, sines));
    OK(kvl_alibi_slopes(slopes, HEADS));
    OK(kvl_rope(context, runner, &source, &queries, &turn));
    write.k = write.v = kvl_make_const_view(k, KVL_DTYPE_F32, BATCH, SEQ, KV, D);
    write.k_cache = kvl_make_view(k_cache, KVL_DTYPE_BF16, BATCH, KEYS, KV, D);
    write.v_cache = kvl_make_view(v_cache, KVL_DTYPE_BF16, BATCH, KEYS, KV, D);
    write.positions = positions;
    write.rope = &turn;
    OK(kvl_kv_write(context, runner, &write));
    OK(kvl_rms_norm(context, runner, &source, &queries, &norm));
    OK(kvl_rms_norm_rope(context, runner, &source, &queries, &norm, &turn));
    {
        kvl_kv_write_params other = write;
        other.k_norm = &norm;
        other.k_cache = kvl_make_view(k_cache, KVL_DTYPE_BF16, 10, 8, KV, D);
        other.v_cache = kvl_make_view(v_cache, KVL_DTYPE_BF16, 10, 4, KV, 2 * D);
        other.v_packing = KVL_PACKING_ROW_PAIRS;
        other.layout = &layout;
        layout.kind = KVL_LAYOUT_KIND_PAGED;
        layout.table = pages;
        layout.num_sequences = BATCH;
        layout.pages_per_sequence = 4;
        other.positions = starts;
        OK(kvl_kv_write(context, runner, &other));
        source = kvl_make_const_view(k, KVL_DTYPE_F32, 1, 1, KV, 2 * D);
        to = kvl_make_view(repeated, KVL_DTYPE_F32, 1, 2, KV, D);
        OK(kvl_unpack_row_pairs(context, runner, &source, &to));
        source = kvl_as_const(to);
        to = kvl_make_view(out, KVL_DTYPE_F32, 1, 1, KV, 2 * D);
        OK(kvl_pack_row_pairs(context, runner, &source, &to));
    }
    source = write.k;
    to = kvl_make_view(repeated, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    OK(kvl_repeat_kv(context, runner, &source, &to));
    p.q = kvl_as_const(queries);
    p.k = kvl_as_const(write.k_cache);
    p.v = kvl_as_const(write.v_cache);
    p.out = kvl_make_view(out, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    p.lse = lse;
    p.lengths = lengths;
    p.flags = KVL_ATTENTION_FLAG_CAUSAL;
    p.alibi_slopes = slopes;
    p.mask.data = mask;
    p.mask.shape[0] = BATCH, p.mask.shape[1] = SEQ, p.mask.shape[2] = HEADS, p.mask.shape[3] = KEYS;
    p.mask.strides[3] = 1;
    OK(kvl_attention_workspace_size(&p, runner, &bytes));
    CHECK(bytes <= sizeof workspace, "%d bytes", (int)bytes);
    OK(kvl_attention(context, runner, workspace, sizeof workspace, &p));
    attend_to_spans(context, runner, p);
    attend_by_layout(context, runner, p, plan);
    states[0].out = states[1].out = kvl_as_const(p.out);
    states[0].lse = states[1].lse = lse;
    OK(kvl_merge_states(context, runner, states, 2, &to, NULL));
    OK(kvl_context_kernel_name(context, KVL_OP_ATTENTION, KVL_DTYPE_F16, KVL_DTYPE_F16, &name));
}

static void whole_caches(const kvl_context *context, const kvl_parallel_runner *runner) {
    static const double inv_freq[D / 2] = {1.0, 0.5};
    static const int32_t parents[4] = {1, 0, 3, 3}, counts[4] = {1, 1, 1, 1}, shorter[4] = {5, 5, 5, 5}, two[2] = {2, 3};
    static const int32_t moves[2] = {0, 2};
    int32_t lengths[4] = {6, 5, 5, 5}, other_lengths[4] = {7, 0, 0, 0}, local[3][4], slots[8], pages[4] = {3, 1, 0, -1};
    int64_t first, count, heads[4], used;
    static kvl_kv_layer layers[2], others[2];
    kvl_cache cache = KVL_CACHE_INIT, other = KVL_CACHE_INIT;
    kvl_rope_params turn = KVL_ROPE_PARAMS_INIT;
    const kvl_rope_params *ropes[2] = {NULL, NULL};
    float first_key[KV * D] = {1};
    kvl_const_view unrotated[2];
    kvl_shard shard = KVL_SHARD_INIT;
    kvl_view part;
    size_t bytes;
    layers[0].k = kvl_make_view(layers_data[0], KVL_DTYPE_F32, 4, 8, KV, D);
    layers[0].v = kvl_make_view(layers_data[1], KVL_DTYPE_BF16, 4, 8, KV, D);
    layers[1].k = kvl_make_view(layers_data[2], KVL_DTYPE_F32, 4, 8, KV, D);
    memset(&layers[1].v, 0, sizeof layers[1].v);
    others[0].k = others[0].v = others[1].k = kvl_make_view(layers_data[3], KVL_DTYPE_F16, 1, 8, KV, D);
    others[0].v.data = (char *)layers_data[3] + 1024, others[1].k.data = (char *)layers_data[3] + 2048;
    others[1].v = layers[1].v;
    cache.layers = layers, cache.num_layers = 2, cache.lengths = lengths;
    other.layers = others, other.num_layers = 2, other.lengths = other_lengths;
    turn.rotary_dim = D, turn.inv_freq = inv_freq;
    ropes[0] = &turn;
    unrotated[0] = unrotated[1] = kvl_make_const_view(first_key, KVL_DTYPE_F32, 1, 1, KV, D);
    OK(kvl_cache_advance(&cache, counts));
    OK(kvl_cache_truncate(&cache, shorter, 0, 0));
    OK(kvl_cache_set_lengths(&cache, two, shorter, 2));
    OK(kvl_cache_insert_sequence(context, runner, &cache, 3, &other, 0, 7));
    OK(kvl_cache_copy_prefix(context, runner, &cache, 3, two, 1, 4));
    OK(kvl_cache_reorder_workspace_size(&cache, runner, &bytes));
    CHECK(bytes <= sizeof workspace, "%d bytes", (int)bytes);
    OK(kvl_cache_reorder(context, runner, workspace, sizeof workspace, &cache, parents));
    OK(kvl_cache_evict(context, runner, &cache, 3, 1, 2, ropes, 2));
    OK(kvl_cache_evict_running(context, runner, &cache, 3, 1, 2, 1, unrotated, ropes, 2));
    OK(kvl_cache_copy_pages(context, runner, layers, 2, moves, 1));
    OK(kvl_cache_reset(runner, &cache, two, 2, 1));
    other_lengths[0] = 16, other_lengths[1] = 8;
    OK(kvl_cache_defragment(context, runner, layers, 2, pages, 2, 2, other_lengths, pool_map, &used));
    OK(kvl_cache_set_table_tokens(rows_of, 4, 8, counts, 2));
    OK(kvl_cache_reorder_table_workspace_size(4, 8, &bytes));
    OK(kvl_cache_reorder_table(workspace, sizeof workspace, rows_of, 4, 8, lengths, parents));
    OK(kvl_shard_from_rank(0, &shard));
    OK(kvl_shard_sequences(&shard, 4, &first, &count));
    OK(kvl_shard_heads(&shard, 4, 2, heads, heads + 1, heads + 2, heads + 3));
    OK(kvl_shard_keys(&shard, 8, &first, &count));
    OK(kvl_shard_lengths(first, count, 4, 1, shorter, NULL, NULL, local[0], local[1], local[2]));
    OK(kvl_shard_slots(first, count, 4, 2, counts, slots));
    OK(kvl_shard_view(&layers[0].k, 1, first, count, &part));
}

int main(void) {
    kvl_context *context = NULL;
    kvl_parallel_runner runner = KVL_PARALLEL_RUNNER_INIT;
    kvl_layout layout = pool_layout();
    kvl_attention_params planned = pool(&layout);
    kvl_plan *plan = NULL;
    runner.num_threads = 4;
    runner.run = in_order;
    memset(mask, 1, sizeof mask);
    OK(kvl_context_create(NULL, &context));
    OK(kvl_plan_create(&planned, &plan));
    CHECK(allocations > 0, "the library's malloc is another, so nothing is counted");
    allocations = 0;
    everything(context, NULL, plan);
    everything(context, &runner, plan);
    whole_caches(context, NULL);
    whole_caches(context, &runner);
    CHECK(allocations == 0, "%d allocations", allocations);
    kvl_plan_destroy(plan);
    kvl_context_destroy(context);
    return finish("alloc");
}
#else
int main(void) { return finish("alloc"); }
#endif
