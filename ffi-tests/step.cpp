#include <cstdio>

#include "kvlane.hpp"

int main() {
    std::vector<kvlane::bf16> keys(64 * 2 * 32), values(64 * 2 * 32);
    std::vector<float> q(6 * 32), k(2 * 32), v(2 * 32, 3), out(6 * 32);
    std::int32_t position = 0, length = 1;
    kvlane::context context;
    kvlane::workspace workspace;
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    write.k = kvlane::view(k, {1, 1, 2, 32});
    write.v = kvlane::view(v, {1, 1, 2, 32});
    write.k_cache = kvlane::view(keys, {1, 64, 2, 32});
    write.v_cache = kvlane::view(values, {1, 64, 2, 32});
    write.positions = &position;
    kvlane::kv_write(context, write); // throws kvlane::error
    kvl_attention_params attention = KVL_ATTENTION_PARAMS_INIT;
    attention.q = kvlane::view(q, {1, 1, 6, 32});
    attention.k = kvlane::as_const(write.k_cache);
    attention.v = kvlane::as_const(write.v_cache);
    attention.out = kvlane::view(out, {1, 1, 6, 32});
    attention.lengths = &length;
    kvlane::attention(context, workspace, attention);
    std::printf("%g\n", out[0]);
}
