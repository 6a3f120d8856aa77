/* Memory of a cache on huge pages, and the tuning of a context. */
#include "book.h"

enum { HEADS = 8, KV_HEADS = 2, DIM = 128, CAPACITY = 4096 };

static kvl_context *context;
static workspace space;
static float q[HEADS * DIM], out[HEADS * DIM], wanted[HEADS * DIM];

/* [huge] */
/* Zeroed memory for `bytes` bytes, on huge pages where the system has some. The caller frees *allocated. */
static void *cache_memory(size_t bytes, void **allocated) {
    const size_t huge = (size_t)2 << 20;
    *allocated = calloc(1, bytes + huge); /* fresh pages are zero without being touched */
    if (*allocated == NULL) {
        exit(1);
    }
    char *start = (char *)*allocated + (-(uintptr_t)*allocated & (huge - 1));
    int32_t advised;
    check(kvl_advise_huge_pages(start, bytes, &advised)); /* before the first write */
    return start;
}
/* [huge] */

int main(void) {
    const size_t elements = (size_t)CAPACITY * KV_HEADS * DIM;
    void *allocated[2];
    check(kvl_context_create(NULL, &context));
    float *keys = cache_memory(elements * sizeof(float), &allocated[0]);
    float *values = cache_memory(elements * sizeof(float), &allocated[1]);
    EXPECT(((uintptr_t)keys & (((size_t)2 << 20) - 1)) == 0 && keys[elements - 1] == 0);
    project(keys, elements, 1);
    project(values, elements, 2);
    project(q, HEADS * DIM, 3);
    const int32_t length = CAPACITY;
    kvl_attention_params attention = kvl_make_causal_attention(
        kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM), kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM),
        q, wanted, KVL_DTYPE_F32, 1, 1, HEADS, &length);
    attend(context, NULL, &space, &attention);

    /* [tuning] */
    kvl_tuning tuning = KVL_TUNING_INIT;
    check(kvl_context_tuning(context, &tuning)); /* what the library chose for this CPU */
    tuning.block = KVL_PREFETCH_SECOND_LEVEL;
    tuning.run_distance = 32 * 1024;
    check(kvl_context_set_tuning(context, &tuning));
    /* [tuning] */
    attention.out.data = out;
    attend(context, NULL, &space, &attention);
    EXPECT(memcmp(out, wanted, sizeof out) == 0); /* no bit of a result depends on it */
    kvl_tuning now = KVL_TUNING_INIT;
    check(kvl_context_tuning(context, &now));
    EXPECT(now.block == KVL_PREFETCH_SECOND_LEVEL && now.run_distance == 32 * 1024);

    free(allocated[0]);
    free(allocated[1]);
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
