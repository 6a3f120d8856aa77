/* Prompts: cut into chunks, padded to one length, and packed one after another. */
#include "book.h"

enum { HEADS = 4, KV_HEADS = 2, DIM = 16, CAPACITY = 128, PROMPT = 100, CHUNK = 32, SEQUENCES = 2, MOST = 7 };

static kvl_context *context;
static workspace space;
static float q[PROMPT * HEADS * DIM], k[PROMPT * KV_HEADS * DIM], v[PROMPT * KV_HEADS * DIM];
static float whole[PROMPT * HEADS * DIM], pieces[PROMPT * HEADS * DIM];
static float keys[SEQUENCES * CAPACITY * KV_HEADS * DIM], values[SEQUENCES * CAPACITY * KV_HEADS * DIM];

/* [chunks] */
/* Writes tokens `from` to `to - 1` of a prompt and computes their outputs; earlier tokens are in the cache. */
static void chunk(kvl_view k_cache, kvl_view v_cache, float *out, int32_t from, int32_t to) {
    const int64_t seq = to - from;
    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k + from * KV_HEADS * DIM, v + from * KV_HEADS * DIM,
                                                  KVL_DTYPE_F32, 1, seq, &from);
    check(kvl_kv_write(context, NULL, &write));
    kvl_attention_params attention = kvl_make_causal_attention(k_cache, v_cache, q + from * HEADS * DIM,
                                                               out + from * HEADS * DIM, KVL_DTYPE_F32, 1, seq, HEADS, &to);
    attend(context, NULL, &space, &attention);
}
/* [chunks] */

static void in_chunks(void) {
    kvl_view k_cache = kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
    kvl_view v_cache = kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
    chunk(k_cache, v_cache, whole, 0, PROMPT);
    memset(keys, 0, sizeof keys);
    /* [cut] */
    for (int32_t from = 0; from < PROMPT; from += CHUNK) {
        const int32_t to = from + CHUNK < PROMPT ? from + CHUNK : PROMPT;
        chunk(k_cache, v_cache, pieces, from, to);
    }
    EXPECT(memcmp(pieces, whole, sizeof whole) == 0); /* every bit of every token */
    /* [cut] */
}

static void padded(float *out) {
    /* [padded] */
    /* Prompts of 7 and 3 tokens in tensors [2, 7, heads, dim]; what lies behind the third token of the second is not read. */
    const int32_t starts[SEQUENCES] = {0, 0}, lengths[SEQUENCES] = {7, 3};
    kvl_view k_cache = kvl_make_view(keys, KVL_DTYPE_F32, SEQUENCES, CAPACITY, KV_HEADS, DIM);
    kvl_view v_cache = kvl_make_view(values, KVL_DTYPE_F32, SEQUENCES, CAPACITY, KV_HEADS, DIM);
    kvl_kv_write_params write =
        kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, SEQUENCES, MOST, starts);
    write.counts = lengths;
    check(kvl_kv_write(context, NULL, &write));

    kvl_attention_params attention =
        kvl_make_causal_attention(k_cache, v_cache, q, out, KVL_DTYPE_F32, SEQUENCES, MOST, HEADS, lengths);
    attention.offsets = starts; /* the first query is the first token, and not the last query the last one */
    attend(context, NULL, &space, &attention);
    /* [padded] */
}

static void packed(const float *queries, const float *new_k, const float *new_v, float *out) {
    /* [packed] */
    /* The same prompts in tensors [1, 10, heads, dim]: tokens 0 to 6 and 7 to 9. */
    const int32_t cu_seqlens[SEQUENCES + 1] = {0, 7, 10}, lengths[SEQUENCES] = {7, 3};
    int32_t slots[10];
    for (int b = 0; b < SEQUENCES; b++) {
        for (int32_t t = cu_seqlens[b]; t < cu_seqlens[b + 1]; t++) {
            slots[t] = b * CAPACITY + t - cu_seqlens[b];
        }
    }
    /* To the write, the rows of the caches are one long row, and every token has a slot of its own in it. */
    kvl_kv_write_params write =
        kvl_make_kv_write(kvl_make_view(keys, KVL_DTYPE_F32, 1, SEQUENCES * CAPACITY, KV_HEADS, DIM),
                          kvl_make_view(values, KVL_DTYPE_F32, 1, SEQUENCES * CAPACITY, KV_HEADS, DIM), new_k, new_v,
                          KVL_DTYPE_F32, 1, 10, NULL);
    write.slots = slots;
    check(kvl_kv_write(context, NULL, &write));

    kvl_attention_params attention = kvl_make_causal_attention(
        kvl_make_view(keys, KVL_DTYPE_F32, SEQUENCES, CAPACITY, KV_HEADS, DIM),
        kvl_make_view(values, KVL_DTYPE_F32, SEQUENCES, CAPACITY, KV_HEADS, DIM), queries, out, KVL_DTYPE_F32, 1, 10, HEADS, lengths);
    attention.cu_seqlens_q = cu_seqlens;
    attention.num_sequences = SEQUENCES;
    attend(context, NULL, &space, &attention);
    /* [packed] */
}

int main(void) {
    static float padded_out[SEQUENCES * MOST * HEADS * DIM], packed_out[10 * HEADS * DIM];
    check(kvl_context_create(NULL, &context));
    project(q, sizeof q / sizeof *q, 1);
    project(k, sizeof k / sizeof *k, 2);
    project(v, sizeof v / sizeof *v, 3);
    in_chunks();
    padded(padded_out);
    memset(keys, 0, sizeof keys);
    /* The padding lies behind the second prompt, so that the first ten rows of the padded tensors are the packed ones. */
    packed(q, k, v, packed_out);
    EXPECT(memcmp(padded_out, packed_out, sizeof packed_out) == 0);
    /* A first query sees its own token alone, whose value is its output. */
    EXPECT(memcmp(packed_out + 7 * HEADS * DIM, v + 7 * KV_HEADS * DIM, DIM * sizeof(float)) == 0);
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
