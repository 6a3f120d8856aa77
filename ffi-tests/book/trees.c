/* Speculative decoding: a tree of guesses, verified in one call. */
#include "book.h"

enum { HEADS = 4, KV_HEADS = 2, DIM = 16, CAPACITY = 32, TEXT = 9, GUESSES = 5 };

static kvl_context *context;
static workspace space;
static double inv_freq[DIM / 2], magnitude;
static float q[GUESSES * HEADS * DIM], k[GUESSES * KV_HEADS * DIM], v[GUESSES * KV_HEADS * DIM];
static float out[GUESSES * HEADS * DIM], wanted[HEADS * DIM];
static float keys[CAPACITY * KV_HEADS * DIM], values[CAPACITY * KV_HEADS * DIM];
static float plain_keys[CAPACITY * KV_HEADS * DIM], plain_values[CAPACITY * KV_HEADS * DIM];

/* What a model would give for token `number`. */
static void project_token(int row, uint32_t number) {
    project(q + row * HEADS * DIM, HEADS * DIM, 3 * number);
    project(k + row * KV_HEADS * DIM, KV_HEADS * DIM, 3 * number + 1);
    project(v + row * KV_HEADS * DIM, KV_HEADS * DIM, 3 * number + 2);
}

/* Rotated keys of `seq` tokens into slots from `slot` on. */
static void write_tokens(kvl_view k_cache, kvl_view v_cache, int64_t seq, int32_t slot, const int32_t *positions) {
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    rope.pairing = KVL_PAIRING_HALF_SPLIT;
    rope.rotary_dim = DIM;
    rope.inv_freq = inv_freq;
    rope.positions = positions;
    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, 1, seq, &slot);
    write.rope = &rope;
    check(kvl_kv_write(context, NULL, &write));
    kvl_view queries = kvl_make_view(q, KVL_DTYPE_F32, 1, seq, HEADS, DIM);
    kvl_const_view same = kvl_as_const(queries);
    check(kvl_rope(context, NULL, &same, &queries, &rope));
}

int main(void) {
    check(kvl_context_create(NULL, &context));
    kvl_rope_frequencies_params frequencies = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    frequencies.rotary_dim = DIM;
    check(kvl_rope_frequencies(&frequencies, inv_freq, DIM / 2, &magnitude));
    kvl_kv_layer layer = {kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM),
                          kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM), NULL};
    int32_t length = TEXT;
    kvl_cache cache = KVL_CACHE_INIT;
    cache.layers = &layer;
    cache.num_layers = 1;
    cache.lengths = &length;
    for (int32_t i = 0; i < TEXT; i++) {
        project_token(0, (uint32_t)i);
        write_tokens(layer.k, layer.v, 1, i, &i);
    }
    memcpy(plain_keys, keys, sizeof keys);
    memcpy(plain_values, values, sizeof values);

    /* [tree] */
    /* Guess 0 has the children 1 and 2, guess 2 the children 3 and 4. */
    const int parents[GUESSES] = {-1, 0, 0, 2, 2};
    uint8_t bits[GUESSES] = {0}; /* bit j of byte i: guess i is guess j, or descends from it */
    int32_t positions[GUESSES];  /* those of one depth have the same position */
    for (int i = 0; i < GUESSES; i++) {
        bits[i] = (uint8_t)(1 << i);
        positions[i] = length;
        if (parents[i] >= 0) {
            bits[i] |= bits[parents[i]];
            positions[i] = positions[parents[i]] + 1;
        }
    }
    /* [tree] */
    EXPECT(bits[4] == 0x15 && positions[4] == TEXT + 2);
    for (int i = 0; i < GUESSES; i++) {
        project_token(i, 100 + (uint32_t)i);
    }

    /* [verify] */
    write_tokens(layer.k, layer.v, GUESSES, length, positions); /* in slots length to length + 4 */
    const int32_t first_guess = length, valid = length + GUESSES;
    kvl_bit_mask mask = KVL_BIT_MASK_INIT;
    mask.data = bits;
    mask.bytes = sizeof bits;
    mask.shape[0] = 1;
    mask.shape[1] = GUESSES;
    mask.shape[2] = 1;
    mask.shape[3] = GUESSES;
    mask.strides[1] = 8;            /* bits from guess to guess */
    mask.first_keys = &first_guess; /* bit 0 is that of guess 0; the text before is visible to all */

    kvl_attention_params attention =
        kvl_make_causal_attention(layer.k, layer.v, q, out, KVL_DTYPE_F32, 1, GUESSES, HEADS, &valid);
    attention.bit_mask = &mask;
    attention.query_positions = positions;
    attend(context, NULL, &space, &attention);
    /* [verify] */
    static float last[HEADS * DIM];
    memcpy(last, out + 4 * HEADS * DIM, sizeof last);

    /* [accept] */
    /* The guesses 0, 2 and 4 are accepted, in the slots length, length + 2 and length + 4. The others are removed, the last
     * first. Keys keep their rotation: guess 2 was written for position length + 1, to which it moves. */
    check(kvl_cache_set_lengths(&cache, (const int32_t[]){0}, &valid, 1));
    const int32_t guesses = first_guess;
    check(kvl_cache_evict(context, NULL, &cache, 0, guesses + 3, guesses + 4, NULL, 0));
    check(kvl_cache_evict(context, NULL, &cache, 0, guesses + 1, guesses + 2, NULL, 0));
    EXPECT(length == guesses + 3);
    /* [accept] */

    /* The cache is that of a text to which these three were written one by one, and so is the output of the last. */
    const int accepted[3] = {0, 2, 4};
    for (int i = 0; i < 3; i++) {
        const int32_t position = TEXT + i, after = position + 1;
        project_token(0, 100 + (uint32_t)accepted[i]);
        const kvl_view plain_k = kvl_make_view(plain_keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
        const kvl_view plain_v = kvl_make_view(plain_values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
        write_tokens(plain_k, plain_v, 1, position, &position);
        kvl_attention_params one = kvl_make_causal_attention(plain_k, plain_v, q, wanted, KVL_DTYPE_F32, 1, 1, HEADS, &after);
        attend(context, NULL, &space, &one);
    }
    EXPECT(memcmp(keys, plain_keys, (size_t)length * KV_HEADS * DIM * sizeof(float)) == 0);
    EXPECT(memcmp(values, plain_values, (size_t)length * KV_HEADS * DIM * sizeof(float)) == 0);
    for (int i = 0; i < HEADS * DIM; i++) {
        EXPECT(fabsf(last[i] - wanted[i]) < 1e-6f);
    }

    /* [reject] */
    /* A line of guesses that are all rejected is dropped by its length. */
    const int32_t text = TEXT;
    check(kvl_cache_truncate(&cache, &text, 0, 0));
    /* [reject] */
    EXPECT(length == TEXT);
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
