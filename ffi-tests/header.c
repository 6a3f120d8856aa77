/* The header alone, as C99, C11 and C++17, without a warning. */
#include "kvlane.h"
#include "kvlane.h" /* Twice, to test its include guard. */

int main(void) {
    kvl_attention_params attention = KVL_ATTENTION_PARAMS_INIT;
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    kvl_rope_frequencies_params frequencies = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    kvl_parallel_runner runner = KVL_PARALLEL_RUNNER_INIT;
    kvl_context_params context = KVL_CONTEXT_PARAMS_INIT;
    kvl_tuning tuning = KVL_TUNING_INIT;
    kvl_kernel_info info = KVL_KERNEL_INFO_INIT;
    attention.out = kvl_make_view(NULL, KVL_DTYPE_F32, 1, 2, 3, 4);
    attention.q = kvl_as_const(attention.out);
    attention.k = kvl_make_const_view(NULL, KVL_DTYPE_BF16, 1, 2, 3, 4);
    write = kvl_make_kv_write(attention.out, attention.out, NULL, NULL, KVL_DTYPE_F32, 1, 1, NULL);
    attention = kvl_make_causal_attention(write.k_cache, write.v_cache, NULL, NULL, KVL_DTYPE_F32, 1, 1, 3, NULL);
    return attention.struct_size + write.struct_size + rope.struct_size + frequencies.struct_size + runner.struct_size +
                   context.struct_size + tuning.struct_size + info.struct_size ==
               0;
}
