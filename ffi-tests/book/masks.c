/* Which keys a query sees. Queries of zeros weigh all visible keys the same, so that an output is the mean of their values. */
#include "book.h"

enum { HEADS = 2, DIM = 4, KEYS = 8 };

static kvl_context *context;
static workspace space;
static float keys[KEYS * DIM], values[KEYS * DIM], q[2 * HEADS * DIM], out[2 * HEADS * DIM], lse[2 * HEADS];

/* One query, or two, over eight keys whose values are 0 to 7. */
static kvl_attention_params over(int64_t seq) {
    static const int32_t length = KEYS;
    kvl_attention_params params =
        kvl_make_causal_attention(kvl_make_view(keys, KVL_DTYPE_F32, 1, KEYS, 1, DIM),
                                  kvl_make_view(values, KVL_DTYPE_F32, 1, KEYS, 1, DIM), q, out, KVL_DTYPE_F32, 1, seq, HEADS,
                                  &length);
    params.lse = lse;
    return params;
}

#define MEAN(query, mean) EXPECT(fabsf(out[(query)*HEADS * DIM] - (float)(mean)) < 1e-5f)

int main(void) {
    check(kvl_context_create(NULL, &context));
    for (int i = 0; i < KEYS * DIM; i++) {
        values[i] = (float)(i / DIM);
    }

    /* [causal] */
    kvl_attention_params params = over(2); /* queries at the positions 6 and 7 */
    attend(context, NULL, &space, &params);
    MEAN(0, 3.0); /* of 0 to 6 */
    MEAN(1, 3.5); /* of 0 to 7 */
    /* [causal] */
    EXPECT(fabsf(lse[0] - logf(7)) < 1e-6f && fabsf(lse[HEADS] - logf(8)) < 1e-6f);

    /* [window] */
    /* The own position and two before it; and key 0, which the window would hide. */
    const int32_t prefix = 1;
    params = over(1);
    params.flags |= KVL_ATTENTION_FLAG_WINDOW_LEFT;
    params.window_left = 2;
    params.prefix_lengths = &prefix;
    attend(context, NULL, &space, &params);
    MEAN(0, 4.5); /* of 0, 5, 6 and 7 */
    /* [window] */

    /* [start] */
    /* A sequence that is padded on the left begins at key 3. */
    const int32_t start = 3;
    params = over(1);
    params.kv_starts = &start;
    attend(context, NULL, &space, &params);
    MEAN(0, 5.0); /* of 3 to 7 */
    /* [start] */

    /* [mask] */
    /* A byte per key; the heads and the queries share it, since their axes have one entry. */
    const uint8_t visible[KEYS] = {1, 0, 0, 1, 0, 0, 0, 1};
    params = over(1);
    params.mask.data = visible;
    params.mask.shape[0] = params.mask.shape[1] = params.mask.shape[2] = 1;
    params.mask.shape[3] = KEYS;
    params.mask.strides[3] = 1;
    params.mask.bytes = sizeof visible;
    attend(context, NULL, &space, &params);
    MEAN(0, 10.0 / 3);
    /* [mask] */

    /* [bias] */
    /* Numbers that are added to logits: ln 3 triples a weight, -inf masks a key. */
    float bias[KEYS] = {0};
    bias[0] = -INFINITY;
    bias[7] = logf(3);
    params = over(1);
    params.bias = kvl_make_const_view(bias, KVL_DTYPE_F32, 1, 1, 1, KEYS);
    attend(context, NULL, &space, &params);
    MEAN(0, (1 + 2 + 3 + 4 + 5 + 6 + 3 * 7) / 9.0);
    /* [bias] */

    /* [sink] */
    /* A logit per head that takes weight and has no value: here as much as all keys together. */
    const float sinks[HEADS] = {logf(8), -INFINITY};
    params = over(1);
    params.sink_logits = sinks;
    attend(context, NULL, &space, &params);
    MEAN(0, 3.5 / 2);
    /* [sink] */
    EXPECT(fabsf(out[DIM] - 3.5f) < 1e-5f);

    /* [alibi] */
    float slopes[HEADS];
    check(kvl_alibi_slopes(slopes, HEADS));
    params = over(1);
    params.alibi_slopes = slopes;
    attend(context, NULL, &space, &params);
    /* [alibi] */
    EXPECT(slopes[0] == 0.0625f && slopes[1] == 0.00390625f);
    float sum = 0, weights = 0;
    for (int j = 0; j < KEYS; j++) {
        weights += expf(slopes[0] * (float)(j - 7));
        sum += expf(slopes[0] * (float)(j - 7)) * (float)j;
    }
    MEAN(0, sum / weights);

    /* [none] */
    /* A query that sees no key has the output 0. */
    const int32_t empty = 0;
    params = over(1);
    params.lengths = &empty;
    attend(context, NULL, &space, &params);
    EXPECT(out[0] == 0 && lse[0] == -INFINITY);
    /* [none] */
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
