/* A prompt and a decode loop through the caches of all layers of a model. */
#include "book.h"

/* [model] */
enum { LAYERS = 2, HEADS = 4, KV_HEADS = 2, DIM = 16, CAPACITY = 64, PROMPT = 5, STEPS = 20 };

typedef struct layer {
    kvl_view k_cache, v_cache; /* [1, CAPACITY, KV_HEADS, DIM] */
} layer;

typedef struct model {
    kvl_context *context;
    workspace space;
    double inv_freq[DIM / 2], magnitude;
    layer layers[LAYERS];
} model;
/* [model] */

/* [setup] */
static void setup(model *m, uint16_t *memory) {
    check(kvl_context_create(NULL, &m->context));

    kvl_rope_frequencies_params frequencies = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    frequencies.rotary_dim = DIM;
    frequencies.base = 10000.0;
    check(kvl_rope_frequencies(&frequencies, m->inv_freq, DIM / 2, &m->magnitude));

    const size_t one = CAPACITY * KV_HEADS * DIM; /* elements of the keys, or the values, of a layer */
    for (int i = 0; i < LAYERS; i++) {
        m->layers[i].k_cache = kvl_make_view(memory + 2 * i * one, KVL_DTYPE_F16, 1, CAPACITY, KV_HEADS, DIM);
        m->layers[i].v_cache = kvl_make_view(memory + (2 * i + 1) * one, KVL_DTYPE_F16, 1, CAPACITY, KV_HEADS, DIM);
    }
}
/* [setup] */

/* [step] */
/* One layer over `seq` new tokens, of which the first has the position `length`: q, k and v are the outputs of its projections. */
static void run_layer(model *m, layer *of, float *q, const float *k, const float *v, float *out, int32_t length, int64_t seq) {
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    rope.pairing = KVL_PAIRING_HALF_SPLIT;
    rope.rotary_dim = DIM;
    rope.inv_freq = m->inv_freq;
    rope.magnitude = m->magnitude;
    rope.offsets = &length;

    /* Queries are rotated in place. */
    kvl_view queries = kvl_make_view(q, KVL_DTYPE_F32, 1, seq, HEADS, DIM);
    kvl_const_view same = kvl_as_const(queries);
    check(kvl_rope(m->context, NULL, &same, &queries, &rope));

    /* Keys are rotated on their way into the cache. */
    kvl_kv_write_params write = kvl_make_kv_write(of->k_cache, of->v_cache, k, v, KVL_DTYPE_F32, 1, seq, &length);
    write.rope = &rope;
    check(kvl_kv_write(m->context, NULL, &write));

    /* The views are those of the whole cache; the length says how much of it holds tokens. */
    const int32_t valid = length + (int32_t)seq;
    kvl_attention_params attention =
        kvl_make_causal_attention(of->k_cache, of->v_cache, q, out, KVL_DTYPE_F32, 1, seq, HEADS, &valid);
    attend(m->context, NULL, &m->space, &attention);
}
/* [step] */

static float q[CAPACITY * HEADS * DIM], k[CAPACITY * KV_HEADS * DIM], v[CAPACITY * KV_HEADS * DIM];
static float out[CAPACITY * HEADS * DIM];

/* All layers over `seq` tokens from position `length` on. Every token has its own numbers. */
static void run(model *m, int32_t length, int64_t seq) {
    for (int i = 0; i < LAYERS; i++) {
        for (int64_t t = 0; t < seq; t++) {
            const uint32_t seed = (uint32_t)(i * CAPACITY + length + t);
            project(q + t * HEADS * DIM, HEADS * DIM, 3 * seed);
            project(k + t * KV_HEADS * DIM, KV_HEADS * DIM, 3 * seed + 1);
            project(v + t * KV_HEADS * DIM, KV_HEADS * DIM, 3 * seed + 2);
        }
        run_layer(m, &m->layers[i], q, k, v, out, length, seq);
    }
}

int main(void) {
    static uint16_t memory[2 * LAYERS * CAPACITY * KV_HEADS * DIM], other[2 * LAYERS * CAPACITY * KV_HEADS * DIM];
    float last[HEADS * DIM];
    model m = {0}, whole = {0};
    setup(&m, memory);

    /* [loop] */
    int32_t length = 0; /* tokens in the caches: the only state beside them */
    run(&m, length, PROMPT);
    length += PROMPT;
    for (int step = 0; step < STEPS; step++) {
        run(&m, length, 1);
        length += 1;
    }
    /* [loop] */
    memcpy(last, out, sizeof last);

    /* The same tokens as one prompt. */
    setup(&whole, other);
    run(&whole, 0, PROMPT + STEPS);
    EXPECT(memcmp(last, out + (PROMPT + STEPS - 1) * HEADS * DIM, sizeof last) == 0);
    EXPECT(memcmp(memory, other, sizeof memory) == 0);
    EXPECT(fabsf(last[0]) > 0 && fabsf(last[0]) < 1);

    free(m.space.memory);
    free(whole.space.memory);
    kvl_context_destroy(m.context);
    kvl_context_destroy(whole.context);
    return 0;
}
