/* Endless text in bounded memory: rings, and evictions from other caches. */
#include "book.h"

enum { HEADS = 4, KV_HEADS = 2, DIM = 16, TEXT = 60, CAPACITY = 64, SINKS = 2, WINDOW = 13 };

static kvl_context *context;
static workspace space;
static double inv_freq[DIM / 2], magnitude;
static float q[HEADS * DIM], k[KV_HEADS * DIM], v[KV_HEADS * DIM], outputs[TEXT * HEADS * DIM], wanted[HEADS * DIM];
static float keys[CAPACITY * KV_HEADS * DIM], values[CAPACITY * KV_HEADS * DIM];

static kvl_rope_params rope_at(const int32_t *position) {
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    rope.pairing = KVL_PAIRING_HALF_SPLIT;
    rope.rotary_dim = DIM;
    rope.inv_freq = inv_freq;
    rope.magnitude = magnitude;
    rope.offsets = position;
    return rope;
}

/* Writes token `number` of the text at a position of a cache, rotated to another position. */
static void write_token(kvl_view k_cache, kvl_view v_cache, const kvl_layout *layout, uint32_t number, int32_t position,
                        int32_t rotation) {
    project(k, KV_HEADS * DIM, 2 * number);
    project(v, KV_HEADS * DIM, 2 * number + 1);
    kvl_rope_params rope = rope_at(&rotation);
    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, 1, 1, &position);
    write.rope = &rope;
    write.layout = layout;
    check(kvl_kv_write(context, NULL, &write));
}

static void rings(void) {
    /* [ring] */
    /* Two sink tokens, and the newest 14: a query sees its own token and WINDOW before it. */
    enum { SLOTS = SINKS + WINDOW + 1 };
    static float ring_keys[SLOTS * KV_HEADS * DIM], ring_values[SLOTS * KV_HEADS * DIM];
    kvl_view ring_k = kvl_make_view(ring_keys, KVL_DTYPE_F32, 1, SLOTS, KV_HEADS, DIM);
    kvl_view ring_v = kvl_make_view(ring_values, KVL_DTYPE_F32, 1, SLOTS, KV_HEADS, DIM);
    kvl_layout ring = KVL_LAYOUT_INIT;
    ring.kind = KVL_LAYOUT_KIND_RING;
    ring.sink_tokens = SINKS;
    const int32_t sinks = SINKS;

    for (int32_t length = 0; length < TEXT; length++) { /* of the text, and not of the ring */
        write_token(ring_k, ring_v, &ring, (uint32_t)length, length, length);
        project(q, HEADS * DIM, 1000 + (uint32_t)length);
        const int32_t valid = length + 1;
        kvl_attention_params attention = kvl_make_causal_attention(ring_k, ring_v, q, outputs + length * HEADS * DIM,
                                                                   KVL_DTYPE_F32, 1, 1, HEADS, &valid);
        attention.layout = &ring;
        attention.flags |= KVL_ATTENTION_FLAG_WINDOW_LEFT;
        attention.window_left = WINDOW;
        attention.prefix_lengths = &sinks; /* the window does not hide the sink tokens */
        attend(context, NULL, &space, &attention);
    }
    /* [ring] */

    /* The same in a cache of the whole text. */
    kvl_view k_cache = kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
    kvl_view v_cache = kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
    for (int32_t length = 0; length < TEXT; length++) {
        write_token(k_cache, v_cache, NULL, (uint32_t)length, length, length);
        project(q, HEADS * DIM, 1000 + (uint32_t)length);
        const int32_t valid = length + 1;
        kvl_attention_params attention = kvl_make_causal_attention(k_cache, v_cache, q, wanted, KVL_DTYPE_F32, 1, 1, HEADS, &valid);
        attention.flags |= KVL_ATTENTION_FLAG_WINDOW_LEFT;
        attention.window_left = WINDOW;
        attention.prefix_lengths = &sinks;
        attend(context, NULL, &space, &attention);
        EXPECT(memcmp(outputs + length * HEADS * DIM, wanted, sizeof wanted) == 0);
    }
}

static void evict(void) {
    int32_t length = TEXT;
    for (int32_t i = 0; i < TEXT; i++) {
        write_token(kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM),
                    kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM), NULL, (uint32_t)i, i, i);
    }
    /* [evict] */
    kvl_kv_layer layer = {kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM),
                          kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM), NULL};
    kvl_cache cache = KVL_CACHE_INIT;
    cache.layers = &layer;
    cache.num_layers = 1;
    cache.lengths = &length;

    /* Tokens 2 to 21 go; those behind them move down by 20, and their keys are rotated back by as much. */
    const kvl_rope_params rope = rope_at(NULL);
    const kvl_rope_params *ropes[1] = {&rope};
    check(kvl_cache_evict(context, NULL, &cache, 0, SINKS, SINKS + 20, ropes, 1));
    EXPECT(length == TEXT - 20);
    /* [evict] */

    /* Token 22 of the text is now token 2, as if it had been written there. */
    static float fresh_keys[CAPACITY * KV_HEADS * DIM], fresh_values[CAPACITY * KV_HEADS * DIM];
    write_token(kvl_make_view(fresh_keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM),
                kvl_make_view(fresh_values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM), NULL, 22, 2, 2);
    for (int i = 2 * KV_HEADS * DIM; i < 3 * KV_HEADS * DIM; i++) {
        EXPECT(fabsf(keys[i] - fresh_keys[i]) < 1e-5f);
        EXPECT(values[i] == fresh_values[i]);
    }
}

static void evict_running(void) {
    kvl_kv_layer layer = {kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM),
                          kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM), NULL};
    int32_t length = 0;
    kvl_cache cache = KVL_CACHE_INIT;
    cache.layers = &layer;
    cache.num_layers = 1;
    cache.lengths = &length;
    /* [running] */
    /* The keys of the sink tokens before their rotation. */
    static float sink_keys[SINKS * KV_HEADS * DIM];
    for (uint32_t i = 0; i < SINKS; i++) {
        project(sink_keys + i * KV_HEADS * DIM, KV_HEADS * DIM, 2 * i);
    }
    const kvl_const_view unrotated = kvl_make_const_view(sink_keys, KVL_DTYPE_F32, 1, SINKS, KV_HEADS, DIM);
    const kvl_rope_params rope = rope_at(NULL);
    const kvl_rope_params *ropes[1] = {&rope};

    int32_t dropped = 0; /* tokens that the sequence has lost */
    for (uint32_t number = 0; number < 200; number++) {
        if (length == CAPACITY) {
            check(kvl_cache_evict_running(context, NULL, &cache, 0, SINKS, SINKS + 16, dropped, &unrotated, ropes, 1));
            dropped += 16;
        }
        const int32_t rotation = length + dropped; /* of the next key and of its query */
        write_token(layer.k, layer.v, NULL, number, length, rotation);
        length += 1;
    }
    /* [running] */
    EXPECT(dropped == 144 && length == 56);
    /* The sinks are now at positions 144 and 145, and the last token of the text at 199, each rounded once. */
    static float fresh_keys[CAPACITY * KV_HEADS * DIM], fresh_values[CAPACITY * KV_HEADS * DIM];
    const kvl_view fresh_k = kvl_make_view(fresh_keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
    const kvl_view fresh_v = kvl_make_view(fresh_values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
    for (int32_t i = 0; i < length; i++) {
        const int32_t number = i < SINKS ? i : i + dropped;
        write_token(fresh_k, fresh_v, NULL, (uint32_t)number, i, i + dropped);
    }
    EXPECT(memcmp(keys, fresh_keys, (size_t)length * KV_HEADS * DIM * sizeof(float)) == 0);
    EXPECT(memcmp(values, fresh_values, (size_t)length * KV_HEADS * DIM * sizeof(float)) == 0);
}

int main(void) {
    check(kvl_context_create(NULL, &context));
    kvl_rope_frequencies_params frequencies = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    frequencies.rotary_dim = DIM;
    check(kvl_rope_frequencies(&frequencies, inv_freq, DIM / 2, &magnitude));
    rings();
    evict();
    evict_running();
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
