/* A system prompt that all requests share, read once for all of them. */
#include "book.h"

enum { REQUESTS = 3, HEADS = 4, KV_HEADS = 2, DIM = 16, PREFIX = 40, CAPACITY = 16 };

int main(void) {
    static float prefix_keys[PREFIX * KV_HEADS * DIM], prefix_values[PREFIX * KV_HEADS * DIM];
    static float keys[REQUESTS * CAPACITY * KV_HEADS * DIM], values[REQUESTS * CAPACITY * KV_HEADS * DIM];
    static float q[REQUESTS * HEADS * DIM], out[REQUESTS * HEADS * DIM];
    const int32_t lengths[REQUESTS] = {5, 16, 1}; /* after the prefix */
    workspace space = {0};
    kvl_context *context = NULL;
    check(kvl_context_create(NULL, &context));
    project(prefix_keys, PREFIX * KV_HEADS * DIM, 1);
    project(prefix_values, PREFIX * KV_HEADS * DIM, 2);
    project(keys, REQUESTS * CAPACITY * KV_HEADS * DIM, 3);
    project(values, REQUESTS * CAPACITY * KV_HEADS * DIM, 4);
    project(q, REQUESTS * HEADS * DIM, 5);

    /* [prefix] */
    kvl_const_view prefix_k = kvl_make_const_view(prefix_keys, KVL_DTYPE_F32, 1, PREFIX, KV_HEADS, DIM);
    kvl_const_view prefix_v = kvl_make_const_view(prefix_values, KVL_DTYPE_F32, 1, PREFIX, KV_HEADS, DIM);
    kvl_attention_params own = kvl_make_causal_attention(
        kvl_make_view(keys, KVL_DTYPE_F32, REQUESTS, CAPACITY, KV_HEADS, DIM),
        kvl_make_view(values, KVL_DTYPE_F32, REQUESTS, CAPACITY, KV_HEADS, DIM), q, out, KVL_DTYPE_F32, REQUESTS, 1, HEADS, lengths);
    size_t bytes;
    check(kvl_attention_with_prefix_workspace_size(&prefix_k, &own, NULL, &bytes));
    reserve(&space, bytes);
    check(kvl_attention_with_prefix(context, NULL, space.data, space.bytes, &prefix_k, &prefix_v, NULL, &own));
    /* [prefix] */

    /* The same with the prefix copied in front of the keys of every request. */
    for (int b = 0; b < REQUESTS; b++) {
        static float all_k[(PREFIX + CAPACITY) * KV_HEADS * DIM], all_v[(PREFIX + CAPACITY) * KV_HEADS * DIM];
        const size_t row = CAPACITY * KV_HEADS * DIM;
        float wanted[HEADS * DIM];
        const int32_t length = PREFIX + lengths[b];
        memcpy(all_k, prefix_keys, sizeof prefix_keys);
        memcpy(all_v, prefix_values, sizeof prefix_values);
        memcpy(all_k + PREFIX * KV_HEADS * DIM, keys + (size_t)b * row, row * sizeof(float));
        memcpy(all_v + PREFIX * KV_HEADS * DIM, values + (size_t)b * row, row * sizeof(float));
        kvl_attention_params whole = kvl_make_causal_attention(
            kvl_make_view(all_k, KVL_DTYPE_F32, 1, PREFIX + CAPACITY, KV_HEADS, DIM),
            kvl_make_view(all_v, KVL_DTYPE_F32, 1, PREFIX + CAPACITY, KV_HEADS, DIM), q + b * HEADS * DIM, wanted, KVL_DTYPE_F32,
            1, 1, HEADS, &length);
        attend(context, NULL, &space, &whole);
        for (int i = 0; i < HEADS * DIM; i++) {
            EXPECT(fabsf(wanted[i] - out[b * HEADS * DIM + i]) < 1e-5f);
        }
    }
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
