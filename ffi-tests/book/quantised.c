/* Quantised caches: int8 with a scale per token and head, eight-bit floats with static scales, blocks, described ones, rotated ones. */
#include "book.h"

enum { HEADS = 4, KV_HEADS = 2, DIM = 64, CAPACITY = 64, TOKENS = 50 };

static kvl_context *context;
static workspace space;
static float q[HEADS * DIM], k[TOKENS * KV_HEADS * DIM], v[TOKENS * KV_HEADS * DIM], out[HEADS * DIM], wanted[HEADS * DIM];

/* The largest difference of two lists. */
static float distance(const float *a, const float *b, size_t n) {
    float most = 0;
    for (size_t i = 0; i < n; i++) {
        most = fmaxf(most, fabsf(a[i] - b[i]));
    }
    return most;
}

static void int8(void) {
    const int32_t position = 0, length = TOKENS;
    /* [int8] */
    static int8_t keys[CAPACITY * KV_HEADS * DIM], values[CAPACITY * KV_HEADS * DIM];
    static uint16_t k_scales[CAPACITY * KV_HEADS], v_scales[CAPACITY * KV_HEADS]; /* f16 here; f32 is possible too */
    kvl_view k_cache = kvl_make_view(keys, KVL_FORMAT_INT8, 1, CAPACITY, KV_HEADS, DIM);
    kvl_view v_cache = kvl_make_view(values, KVL_FORMAT_INT8, 1, CAPACITY, KV_HEADS, DIM);
    kvl_cache_scales scales = KVL_CACHE_SCALES_INIT;
    scales.k = kvl_make_view(k_scales, KVL_DTYPE_F16, 1, CAPACITY, KV_HEADS, 1);
    scales.v = kvl_make_view(v_scales, KVL_DTYPE_F16, 1, CAPACITY, KV_HEADS, 1);

    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, 1, TOKENS, &position);
    write.scales = &scales; /* the write chooses and stores them */
    check(kvl_kv_write(context, NULL, &write));

    kvl_attention_params attention =
        kvl_make_causal_attention(k_cache, v_cache, q, out, KVL_DTYPE_F32, 1, 1, HEADS, &length);
    attention.scales = &scales;
    attend(context, NULL, &space, &attention);
    /* [int8] */
    EXPECT(distance(out, wanted, HEADS * DIM) < 0.01f && distance(out, wanted, HEADS * DIM) > 0);

    /* [read] */
    /* The numbers that attention computes with, token by token. */
    static float read_k[TOKENS * KV_HEADS * DIM], read_v[TOKENS * KV_HEADS * DIM];
    kvl_kv_read_params read = KVL_KV_READ_PARAMS_INIT;
    read.k_cache = kvl_as_const(k_cache);
    read.v_cache = kvl_as_const(v_cache);
    read.k = kvl_make_view(read_k, KVL_DTYPE_F32, 1, TOKENS, KV_HEADS, DIM);
    read.v = kvl_make_view(read_v, KVL_DTYPE_F32, 1, TOKENS, KV_HEADS, DIM);
    read.positions = &position;
    read.scales = &scales;
    check(kvl_kv_read(context, NULL, &read));
    /* [read] */
    EXPECT(distance(read_k, k, TOKENS * KV_HEADS * DIM) <= 0.51f / 127); /* half a unit, where the largest is at most 1 */
    EXPECT(distance(read_v, v, TOKENS * KV_HEADS * DIM) <= 0.51f / 127);
}

static void fp8(void) {
    const int32_t position = 0, length = TOKENS;
    /* [fp8] */
    static uint8_t keys[CAPACITY * KV_HEADS * DIM], values[CAPACITY * KV_HEADS * DIM];
    float k_scale[KV_HEADS] = {1.0f / 448, 1.0f / 448}; /* one per head: the largest key of the head, divided by 448 */
    kvl_view k_cache = kvl_make_view(keys, KVL_FORMAT_FP8_E4M3, 1, CAPACITY, KV_HEADS, DIM);
    kvl_view v_cache = kvl_make_view(values, KVL_FORMAT_FP8_E5M2, 1, CAPACITY, KV_HEADS, DIM);
    kvl_cache_scales scales = KVL_CACHE_SCALES_INIT;
    scales.k = kvl_make_view(k_scale, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, 1);
    scales.k.strides[0] = 0; /* the same scales for all sequences */
    scales.k.strides[1] = 0; /* and for all tokens */
    /* scales.v stays absent: the values are multiplied by 1 */

    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, 1, TOKENS, &position);
    write.scales = &scales; /* read, and not written */
    check(kvl_kv_write(context, NULL, &write));

    kvl_attention_params attention =
        kvl_make_causal_attention(k_cache, v_cache, q, out, KVL_DTYPE_F32, 1, 1, HEADS, &length);
    attention.scales = &scales;
    attend(context, NULL, &space, &attention);
    /* [fp8] */
    EXPECT(distance(out, wanted, HEADS * DIM) < 0.1f && distance(out, wanted, HEADS * DIM) > 0);
    EXPECT(k_scale[0] == 1.0f / 448);
}

static void blocks(void) {
    const int32_t position = 0, length = TOKENS;
    /* [blocks] */
    enum { BLOCKS = DIM / 32 };
    static struct { uint16_t d; int8_t q[32]; } keys[CAPACITY * KV_HEADS * BLOCKS];
    static struct { uint16_t d; uint8_t q[16]; } values[CAPACITY * KV_HEADS * BLOCKS];
    kvl_view k_cache = kvl_make_view(keys, KVL_FORMAT_Q8_0, 1, CAPACITY, KV_HEADS, DIM); /* strides count blocks */
    kvl_view v_cache = kvl_make_view(values, KVL_FORMAT_Q4_0, 1, CAPACITY, KV_HEADS, DIM);

    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, 1, TOKENS, &position);
    check(kvl_kv_write(context, NULL, &write));

    kvl_attention_params attention =
        kvl_make_causal_attention(k_cache, v_cache, q, out, KVL_DTYPE_F32, 1, 1, HEADS, &length);
    attend(context, NULL, &space, &attention);
    /* [blocks] */
    EXPECT(distance(out, wanted, HEADS * DIM) < 0.1f && distance(out, wanted, HEADS * DIM) > 0);

    /* [hadamard] */
    int64_t block;
    check(kvl_hadamard_block(DIM, &block));
    write.k_hadamard = write.v_hadamard = block;
    check(kvl_kv_write(context, NULL, &write));
    attention.k_hadamard = attention.v_hadamard = block;
    attend(context, NULL, &space, &attention);
    /* [hadamard] */
    EXPECT(block == DIM);
    EXPECT(distance(out, wanted, HEADS * DIM) < 0.1f && distance(out, wanted, HEADS * DIM) > 0);
}

static void affine(void) {
    const int32_t position = 0, length = TOKENS;
    /* [affine] */
    typedef struct { float scale, zero; uint8_t q[DIM]; } record; /* of a token and head */
    static record keys[CAPACITY * KV_HEADS], values[CAPACITY * KV_HEADS];
    enum { BYTES = sizeof(record), FLOATS = sizeof(record) / sizeof(float) };
    kvl_view k_cache = kvl_make_view(keys[0].q, KVL_FORMAT_AFFINE8, 1, CAPACITY, KV_HEADS, DIM);
    kvl_cache_scales scales = KVL_CACHE_SCALES_INIT;
    k_cache.strides[2] = BYTES;
    k_cache.strides[1] = KV_HEADS * BYTES;
    scales.k = kvl_make_view(&keys[0].scale, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, 1);
    scales.k.strides[2] = FLOATS;
    scales.k.strides[1] = KV_HEADS * FLOATS;
    scales.k_zeros = scales.k;
    scales.k_zeros.data = &keys[0].zero;
    scales.k_affine = 0; /* unsigned integers, from which zero points are subtracted */

    kvl_view v_cache = k_cache; /* the values in the same way */
    v_cache.data = values[0].q;
    scales.v = scales.k;
    scales.v.data = &values[0].scale;
    scales.v_zeros = scales.k_zeros;
    scales.v_zeros.data = &values[0].zero;

    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, 1, TOKENS, &position);
    write.scales = &scales; /* the write computes and stores them */
    check(kvl_kv_write(context, NULL, &write));

    kvl_attention_params attention =
        kvl_make_causal_attention(k_cache, v_cache, q, out, KVL_DTYPE_F32, 1, 1, HEADS, &length);
    attention.scales = &scales;
    attend(context, NULL, &space, &attention);
    /* [affine] */
    EXPECT(distance(out, wanted, HEADS * DIM) < 0.02f && distance(out, wanted, HEADS * DIM) > 0);
    EXPECT(keys[0].scale > 0 && keys[TOKENS * KV_HEADS].scale == 0);
}

int main(void) {
    static float keys[CAPACITY * KV_HEADS * DIM], values[CAPACITY * KV_HEADS * DIM];
    const int32_t position = 0, length = TOKENS;
    check(kvl_context_create(NULL, &context));
    project(q, HEADS * DIM, 1);
    project(k, TOKENS * KV_HEADS * DIM, 2);
    project(v, TOKENS * KV_HEADS * DIM, 3);
    kvl_view k_cache = kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
    kvl_view v_cache = kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM);
    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, 1, TOKENS, &position);
    check(kvl_kv_write(context, NULL, &write));
    kvl_attention_params exact = kvl_make_causal_attention(k_cache, v_cache, q, wanted, KVL_DTYPE_F32, 1, 1, HEADS, &length);
    attend(context, NULL, &space, &exact);
    int8();
    fp8();
    blocks();
    affine();
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
