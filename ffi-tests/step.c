#include <stdio.h>
#include <stdlib.h>

#include "kvlane.h"

int main(void) {
    static uint16_t keys[64 * 2 * 32], values[64 * 2 * 32]; /* a cache for 64 tokens: 2 KV heads of 32, in bf16 */
    float q[6 * 32] = {1}, k[2 * 32] = {1}, v[2 * 32] = {1, 2, 3}, out[6 * 32]; /* a new token: 6 query heads */
    int32_t position = 0, length = 1; /* its position; tokens in the cache after the write */
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    write.k = kvl_make_const_view(k, KVL_DTYPE_F32, 1, 1, 2, 32);
    write.v = kvl_make_const_view(v, KVL_DTYPE_F32, 1, 1, 2, 32);
    write.k_cache = kvl_make_view(keys, KVL_DTYPE_BF16, 1, 64, 2, 32);
    write.v_cache = kvl_make_view(values, KVL_DTYPE_BF16, 1, 64, 2, 32);
    write.positions = &position;
    kvl_attention_params attention = KVL_ATTENTION_PARAMS_INIT;
    attention.q = kvl_make_const_view(q, KVL_DTYPE_F32, 1, 1, 6, 32);
    attention.k = kvl_as_const(write.k_cache);
    attention.v = kvl_as_const(write.v_cache);
    attention.out = kvl_make_view(out, KVL_DTYPE_F32, 1, 1, 6, 32);
    attention.flags = KVL_ATTENTION_FLAG_CAUSAL;
    attention.lengths = &length;

    kvl_context *context = NULL; /* once: picks the kernels for this CPU */
    size_t bytes = 0;
    char *memory = NULL, sentence[1024] = ""; /* a workspace, aligned to 64 bytes; the error */
    if (kvl_context_create(NULL, &context) || kvl_kv_write(context, NULL, &write) ||
        kvl_attention_workspace_size(&attention, NULL, &bytes) || (memory = malloc(bytes + 63)) == NULL ||
        kvl_attention(context, NULL, memory + (-(uintptr_t)memory & 63), bytes, &attention)) {
        kvl_last_error(sentence, sizeof sentence);
    }
    printf("%g %g %g %s\n", out[0], out[1], out[2], sentence);
    free(memory);
    kvl_context_destroy(context);
    return sentence[0] != 0;
}
