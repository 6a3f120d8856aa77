/* A context: the level of the machine, the kernels that serve, and options. */
#include "book.h"

int main(void) {
    /* [create] */
    kvl_context_params options = KVL_CONTEXT_PARAMS_INIT;
    options.flags = KVL_CONTEXT_FLAG_SATURATE_F16; /* 65504 instead of infinity in f16 caches */
    kvl_context *context = NULL;
    check(kvl_context_create(&options, &context));
    /* [create] */

    /* [kernels] */
    kvl_isa level;
    check(kvl_context_isa(context, &level));
    const char *write, *k_name, *v_name;
    check(kvl_context_kernel_name(context, KVL_OP_KV_WRITE, KVL_FORMAT_F32, KVL_FORMAT_BF16, &write));
    check(kvl_context_attention_kernel_names(context, KVL_FORMAT_BF16, KVL_FORMAT_BF16, KVL_PRECISION_DEFAULT, &k_name, &v_name));
    printf("%s: %s, %s\n", kvl_isa_name(level), write, k_name);
    /* [kernels] */
    EXPECT(strncmp(write, "kv_write_f32_bf16", 17) == 0 && strcmp(k_name, v_name) == 0 && kvl_isa_available(level) == 1);

    /* [bounds] */
    /* The error bound of the kernel that serves. */
    float bound = -1;
    for (size_t i = 0; i < kvl_kernel_count(); i++) {
        kvl_kernel_info info = KVL_KERNEL_INFO_INIT;
        check(kvl_kernel_info_at(i, &info));
        if (strcmp(info.name, k_name) == 0) {
            bound = info.max_error;
        }
    }
    /* [bounds] */
    EXPECT(bound > 0 && bound < 0.01f);

    /* [packing] */
    kvl_packing packing;
    check(kvl_context_v_packing(context, KVL_FORMAT_BF16, &packing));
    /* [packing] */
    EXPECT(packing == KVL_PACKING_ROWS || packing == KVL_PACKING_ROW_PAIRS);

    static float big[8] = {1e6f, -1e6f}, v[8];
    static uint16_t keys[4 * 8], values[4 * 8];
    const int32_t position = 0;
    kvl_kv_write_params params = kvl_make_kv_write(kvl_make_view(keys, KVL_DTYPE_F16, 1, 4, 1, 8),
                                                   kvl_make_view(values, KVL_DTYPE_F16, 1, 4, 1, 8), big, v, KVL_DTYPE_F32, 1, 1,
                                                   &position);
    check(kvl_kv_write(context, NULL, &params));
    EXPECT(keys[0] == 0x7bff && keys[1] == 0xfbff); /* 65504 and -65504 */
    kvl_context_destroy(context);
    return 0;
}
