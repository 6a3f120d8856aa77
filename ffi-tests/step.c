#include <stdio.h>
#include <stdlib.h>
#include "kvlane.h"

int main(void) {
    static uint16_t keys[64 * 2 * 32], values[64 * 2 * 32]; /* a cache of 64 tokens: 2 KV heads of 32, bf16 */
    float q[6 * 32] = {1}, k[2 * 32] = {1}, v[2 * 32] = {1, 2, 3}, out[6 * 32] = {0}; /* 6 query heads */
    int32_t position = 0, length = 1; /* of the new token; of the cache after its write */
    kvl_view k_cache = kvl_make_view(keys, KVL_DTYPE_BF16, 1, 64, 2, 32); /* batch, seq, heads, dim */
    kvl_view v_cache = kvl_make_view(values, KVL_DTYPE_BF16, 1, 64, 2, 32);
    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, 1, 1, &position);
    kvl_attention_params attention =
        kvl_make_causal_attention(k_cache, v_cache, q, out, KVL_DTYPE_F32, 1, 1, 6, &length);
    kvl_context *context = NULL; /* once: picks the kernels for this CPU */
    size_t bytes = 0;
    char *memory = NULL, sentence[1024] = ""; /* a workspace, aligned to 64 bytes; the error, if any */
    int failed = kvl_context_create(NULL, &context) || kvl_kv_write(context, NULL, &write) ||
                 kvl_attention_workspace_size(&attention, NULL, &bytes) || !(memory = malloc(bytes + 63)) ||
                 kvl_attention(context, NULL, memory + (-(uintptr_t)memory & 63), bytes, &attention);
    kvl_last_error(sentence, sizeof sentence);
    printf("%g %g %g %s\n", out[0], out[1], out[2], sentence);
    free(memory);
    kvl_context_destroy(context);
    return failed;
}
