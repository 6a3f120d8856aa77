/* A cache in parts: by heads, and by keys. The parts of this program stand for machines; what would be sent is a copy. */
#include "book.h"

enum { HEADS = 8, KV_HEADS = 4, DIM = 16, CAPACITY = 4096, LENGTH = 3000, PARTS = 2 };

static kvl_context *context;
static workspace space;
static float keys[CAPACITY * KV_HEADS * DIM], values[CAPACITY * KV_HEADS * DIM];
static float q[HEADS * DIM], out[HEADS * DIM], wanted[HEADS * DIM];

static void by_heads(void) {
    const int32_t length = LENGTH;
    kvl_view all_keys = kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
    kvl_view all_values = kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
    kvl_view all_queries = kvl_make_view(q, KVL_DTYPE_F32, 1, 1, HEADS, DIM);
    kvl_view all_outputs = kvl_make_view(out, KVL_DTYPE_F32, 1, 1, HEADS, DIM);
    /* [heads] */
    for (int64_t rank = 0; rank < PARTS; rank++) { /* each on a machine of its own */
        kvl_shard shard = KVL_SHARD_INIT;
        shard.num_model = PARTS;
        check(kvl_shard_from_rank(rank, &shard));
        int64_t first_head, num_heads, first_kv_head, num_kv_heads;
        check(kvl_shard_heads(&shard, HEADS, KV_HEADS, &first_head, &num_heads, &first_kv_head, &num_kv_heads));

        kvl_view k, v, queries, outputs; /* parts of the same memory: axis 2 is that of the heads */
        check(kvl_shard_view(&all_keys, 2, first_kv_head, num_kv_heads, &k));
        check(kvl_shard_view(&all_values, 2, first_kv_head, num_kv_heads, &v));
        check(kvl_shard_view(&all_queries, 2, first_head, num_heads, &queries));
        check(kvl_shard_view(&all_outputs, 2, first_head, num_heads, &outputs));
        kvl_attention_params attention = KVL_ATTENTION_PARAMS_INIT;
        attention.q = kvl_as_const(queries);
        attention.k = kvl_as_const(k);
        attention.v = kvl_as_const(v);
        attention.out = outputs;
        attention.flags = KVL_ATTENTION_FLAG_CAUSAL;
        attention.lengths = &length;
        attend(context, NULL, &space, &attention);
    }
    /* [heads] */
    EXPECT(memcmp(out, wanted, sizeof out) == 0);
}

/* [part] */
/* What a machine holds of one sequence: the keys `first` to `first + count - 1`. */
typedef struct part {
    int64_t first, count;
    kvl_view k, v;   /* [1, count, KV_HEADS, DIM] */
    float *states;   /* what it sends: the states of its chunks */
    int64_t len;
} part;
/* [part] */

static void fill_part(part *p, int64_t rank) {
    /* [keys] */
    kvl_shard shard = KVL_SHARD_INIT;
    shard.num_sequence = PARTS;
    check(kvl_shard_from_rank(rank, &shard));
    check(kvl_shard_keys(&shard, CAPACITY, &p->first, &p->count));
    /* [keys] */
    const size_t bytes = (size_t)p->count * KV_HEADS * DIM * sizeof(float);
    p->k = kvl_make_view(calloc(1, bytes), KVL_DTYPE_F32, 1, p->count, KV_HEADS, DIM);
    p->v = kvl_make_view(calloc(1, bytes), KVL_DTYPE_F32, 1, p->count, KV_HEADS, DIM);
    EXPECT(p->k.data != NULL && p->v.data != NULL);
    /* [write] */
    /* Every machine is given all new tokens, from `position` on, and writes those that are its own. */
    const int32_t position = 0;
    static int32_t slots[LENGTH];
    check(kvl_shard_slots(p->first, p->count, 1, LENGTH, &position, slots));
    kvl_kv_write_params write = kvl_make_kv_write(p->k, p->v, keys, values, KVL_DTYPE_F32, 1, LENGTH, NULL);
    write.slots = slots;
    check(kvl_kv_write(context, NULL, &write));
    /* [write] */
}

static void attend_part(part *p, const float *queries) {
    /* [chunks] */
    const int32_t length = LENGTH;
    int32_t local_length, local_start, local_offset;
    check(kvl_shard_lengths(p->first, p->count, 1, 1, &length, NULL, NULL, &local_length, &local_start, &local_offset));
    kvl_attention_params attention =
        kvl_make_causal_attention(p->k, p->v, queries, NULL, KVL_DTYPE_F32, 1, 1, HEADS, &local_length);
    attention.out = (kvl_view){0}; /* the merge has it */
    attention.kv_starts = &local_start;
    attention.offsets = &local_offset;

    size_t bytes;
    check(kvl_attention_chunks_states_len(&attention, &p->len));
    p->states = malloc((size_t)p->len * sizeof(float));
    EXPECT(p->states != NULL);
    check(kvl_attention_chunks_workspace_size(&attention, NULL, &bytes));
    reserve(&space, bytes);
    check(kvl_attention_chunks(context, NULL, space.data, space.bytes, &attention, p->states, p->len));
    /* [chunks] */
}

static void merge_parts(const part *parts) {
    /* [merge] */
    kvl_chunk_states segments[PARTS];
    for (int i = 0; i < PARTS; i++) {
        segments[i].states = parts[i].states;
        segments[i].len = parts[i].len;
    }
    kvl_merge_chunks_params merge = KVL_MERGE_CHUNKS_PARAMS_INIT;
    merge.segments = segments;
    merge.num_segments = PARTS;
    merge.kv_heads = KV_HEADS;
    merge.k_format = KVL_FORMAT_F32;
    merge.v_format = KVL_FORMAT_F32;
    merge.out = kvl_make_view(out, KVL_DTYPE_F32, 1, 1, HEADS, DIM);
    size_t bytes;
    check(kvl_merge_chunks_workspace_size(&merge, NULL, &bytes));
    reserve(&space, bytes);
    check(kvl_merge_chunks(context, NULL, space.data, space.bytes, &merge));
    /* [merge] */
    EXPECT(memcmp(out, wanted, sizeof out) == 0); /* the bits of one machine */
}

static void merge_states(const part *parts) {
    /* [states] */
    static float outs[PARTS][HEADS * DIM], lses[PARTS][HEADS];
    kvl_attention_state states[PARTS];
    for (int i = 0; i < PARTS; i++) {
        const int32_t length = LENGTH;
        int32_t local_length, local_start, local_offset;
        check(kvl_shard_lengths(parts[i].first, parts[i].count, 1, 1, &length, NULL, NULL, &local_length, &local_start,
                                &local_offset));
        kvl_attention_params attention =
            kvl_make_causal_attention(parts[i].k, parts[i].v, q, outs[i], KVL_DTYPE_F32, 1, 1, HEADS, &local_length);
        attention.kv_starts = &local_start;
        attention.offsets = &local_offset;
        attention.lse = lses[i];
        attend(context, NULL, &space, &attention);
        states[i].out = kvl_as_const(attention.out);
        states[i].lse = lses[i];
    }
    const kvl_view merged = kvl_make_view(out, KVL_DTYPE_F32, 1, 1, HEADS, DIM);
    check(kvl_merge_states(context, NULL, states, PARTS, &merged, NULL));
    /* [states] */
    for (int i = 0; i < HEADS * DIM; i++) {
        EXPECT(fabsf(out[i] - wanted[i]) < 1e-5f);
    }
}

int main(void) {
    const int32_t length = LENGTH;
    part parts[PARTS];
    check(kvl_context_create(NULL, &context));
    project(keys, (size_t)LENGTH * KV_HEADS * DIM, 1);
    project(values, (size_t)LENGTH * KV_HEADS * DIM, 2);
    project(q, HEADS * DIM, 3);
    kvl_attention_params whole = kvl_make_causal_attention(
        kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM), kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM),
        q, wanted, KVL_DTYPE_F32, 1, 1, HEADS, &length);
    attend(context, NULL, &space, &whole);
    by_heads();
    for (int64_t rank = 0; rank < PARTS; rank++) {
        fill_part(&parts[rank], rank);
        attend_part(&parts[rank], q);
    }
    EXPECT(parts[1].first == 2 * KVL_SPLIT_GRID && parts[1].count == 2 * KVL_SPLIT_GRID);
    merge_parts(parts);
    merge_states(parts);
    for (int i = 0; i < PARTS; i++) {
        free(parts[i].k.data);
        free(parts[i].v.data);
        free(parts[i].states);
    }
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
