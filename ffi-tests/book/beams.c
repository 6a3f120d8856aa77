/* Beam search: beams that share their past by a table, and beams that are copied. */
#include "book.h"

enum { BEAMS = 3, HEADS = 4, KV_HEADS = 2, DIM = 16, CAPACITY = 16, STEPS = 12 };

static kvl_context *context;
static workspace space;
static float keys[BEAMS * CAPACITY * KV_HEADS * DIM], values[BEAMS * CAPACITY * KV_HEADS * DIM];
static float copied_keys[BEAMS * CAPACITY * KV_HEADS * DIM], copied_values[BEAMS * CAPACITY * KV_HEADS * DIM];
static float q[BEAMS * HEADS * DIM], k[BEAMS * KV_HEADS * DIM], v[BEAMS * KV_HEADS * DIM];
static float out[BEAMS * HEADS * DIM], wanted[BEAMS * HEADS * DIM];

/* A stand-in for the choice of the best continuations: which beam each new beam continues. */
static void choose_parents(int32_t *parents, int step) {
    for (int b = 0; b < BEAMS; b++) {
        parents[b] = (b * step + 1) % BEAMS;
    }
}

int main(void) {
    check(kvl_context_create(NULL, &context));
    kvl_kv_layer copied = {kvl_make_view(copied_keys, KVL_DTYPE_F32, BEAMS, CAPACITY, KV_HEADS, DIM),
                           kvl_make_view(copied_values, KVL_DTYPE_F32, BEAMS, CAPACITY, KV_HEADS, DIM), NULL};
    int32_t copied_lengths[BEAMS] = {0, 0, 0};
    kvl_cache copied_cache = KVL_CACHE_INIT;
    copied_cache.layers = &copied;
    copied_cache.num_layers = 1;
    copied_cache.lengths = copied_lengths;

    /* [table] */
    kvl_view k_cache = kvl_make_view(keys, KVL_DTYPE_F32, BEAMS, CAPACITY, KV_HEADS, DIM);
    kvl_view v_cache = kvl_make_view(values, KVL_DTYPE_F32, BEAMS, CAPACITY, KV_HEADS, DIM);
    int32_t table[BEAMS * CAPACITY] = {0}, lengths[BEAMS] = {0, 0, 0};
    kvl_layout layout = KVL_LAYOUT_INIT;
    layout.kind = KVL_LAYOUT_KIND_INDIRECT;
    layout.num_sequences = BEAMS;
    layout.table = table;
    /* [table] */

    for (int step = 0; step < STEPS; step++) {
        project(q, BEAMS * HEADS * DIM, 3 * (uint32_t)step);
        project(k, BEAMS * KV_HEADS * DIM, 3 * (uint32_t)step + 1);
        project(v, BEAMS * KV_HEADS * DIM, 3 * (uint32_t)step + 2);
        int32_t parents[BEAMS];
        choose_parents(parents, step);

        /* [step] */
        /* Every beam writes to its own row, as into a contiguous cache, and the table records it. */
        kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, BEAMS, 1, lengths);
        check(kvl_kv_write(context, NULL, &write));
        check(kvl_cache_set_table_tokens(table, BEAMS, CAPACITY, lengths, 1));
        for (int b = 0; b < BEAMS; b++) {
            lengths[b] += 1;
        }
        kvl_attention_params attention =
            kvl_make_causal_attention(k_cache, v_cache, q, out, KVL_DTYPE_F32, BEAMS, 1, HEADS, lengths);
        attention.layout = &layout;
        attend(context, NULL, &space, &attention);

        /* After the choice of parents, rows of the table are copied; no key moves. */
        size_t bytes;
        check(kvl_cache_reorder_table_workspace_size(BEAMS, CAPACITY, &bytes));
        reserve(&space, bytes);
        check(kvl_cache_reorder_table(space.data, space.bytes, table, BEAMS, CAPACITY, lengths, parents));
        /* [step] */

        kvl_kv_write_params copying = kvl_make_kv_write(copied.k, copied.v, k, v, KVL_DTYPE_F32, BEAMS, 1, copied_lengths);
        check(kvl_kv_write(context, NULL, &copying));
        const int32_t one[BEAMS] = {1, 1, 1};
        check(kvl_cache_advance(&copied_cache, one));
        kvl_attention_params plain =
            kvl_make_causal_attention(copied.k, copied.v, q, wanted, KVL_DTYPE_F32, BEAMS, 1, HEADS, copied_lengths);
        attend(context, NULL, &space, &plain);
        EXPECT(memcmp(out, wanted, sizeof out) == 0);
        /* [copies] */
        check(kvl_cache_reorder_workspace_size(&copied_cache, NULL, &bytes));
        reserve(&space, bytes);
        check(kvl_cache_reorder(context, NULL, space.data, space.bytes, &copied_cache, parents));
        /* [copies] */
    }
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
