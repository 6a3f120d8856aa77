// The C++ layer without exceptions: functions return their status, constructors keep it.
#include "kvlane.hpp"

#include <cmath>
#include <cstdio>
#include <cstring>

#if KVLANE_EXCEPTIONS
#error "this program is compiled with -fno-exceptions"
#endif

static int failures = 0;

static void expect(bool condition, const char *what) {
    if (!condition) {
        failures++;
        std::fprintf(stderr, "cpp_status.cpp: not so: %s: %s\n", what, kvlane::last_error().c_str());
    }
}

static void ok(kvl_status status, const char *what) { expect(status == KVL_STATUS_OK, what); }

static void refused(kvl_status wanted, const char *text, kvl_status status) {
    expect(status == wanted && std::strstr(kvlane::last_error().c_str(), text) != nullptr, text);
}

int main() {
    const kvlane::context none(50);
    expect(none.get() == nullptr, "no context");
    refused(KVL_STATUS_INVALID_ENUM, "max_isa is 50", none.status());
    const kvlane::context context;
    ok(context.status(), "context");
    kvl_isa isa = KVL_ISA_BEST;
    ok(context.isa(isa), "isa");
    expect(isa != KVL_ISA_BEST, "a level");
    const char *name = nullptr;
    std::pair<const char *, const char *> names;
    ok(context.attention_kernel_names(KVL_FORMAT_F16, KVL_FORMAT_INT8, KVL_PRECISION_HIGH, names), "kernel names");
    expect(std::strncmp(names.first, "attention_f16_", 14) == 0, names.first);
    expect(std::strncmp(names.second, "attention_int8_", 15) == 0, names.second);
    ok(context.kernel_name(KVL_OP_ROPE, KVL_FORMAT_F32, KVL_FORMAT_F16, name), "kernel name");
    refused(KVL_STATUS_INVALID_ENUM, "v_format is 99",
            context.attention_kernel_names(KVL_FORMAT_F16, 99, KVL_PRECISION_HIGH, names));

    kvl_rope_frequencies_params scaling = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    scaling.rotary_dim = 4;
    kvlane::frequencies frequencies;
    ok(kvlane::rope_frequencies(scaling, frequencies), "frequencies");
    const std::int32_t position = 1;
    std::vector<float> q = {1, 2, 3, 4};
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    rope.rotary_dim = 4;
    rope.inv_freq = frequencies.inv_freq.data();
    rope.offsets = &position;
    ok(kvlane::rope_in_place(context, kvlane::view(q, {1, 1, 1, 4}), rope), "rope");
    expect(std::fabs(q[0] - (std::cos(1.0f) - 2 * std::sin(1.0f))) < 1e-6f, "rotated");

    // One key: the output is its value.
    std::vector<float> k = {1, 0, 0, 0}, v = {1, 2, 3, 4};
    std::array<float, 4> out{};
    kvlane::workspace workspace;
    kvl_attention_params attention = KVL_ATTENTION_PARAMS_INIT;
    attention.q = kvlane::view(q, {1, 1, 1, 4});
    attention.k = kvlane::view(k, {1, 1, 1, 4});
    attention.v = kvlane::view(v, {1, 1, 1, 4});
    attention.out = kvlane::view(out, {1, 1, 1, 4});
    ok(kvlane::attention(context, workspace, attention), "attention");
    expect(out[2] == 3, "attention");
    attention.softcap = -1;
    refused(KVL_STATUS_INVALID_VALUE, "softcap", kvlane::attention(context, workspace, attention));
    attention.softcap = 0;
    kvlane::plan plan(attention);
    ok(plan.status(), "plan");
    ok(plan.update(attention), "update");
    refused(KVL_STATUS_SHAPE, "counts has 2 entries", plan.advance({1, 1}));

    // Lists that do not fit each other: the library never sees them, or refuses them.
    expect(kvlane::cache_set_lengths(KVL_CACHE_INIT, {0}, {1, 2}) == KVL_STATUS_SHAPE, "lists");
    const kvlane::list three = {0, 1, 2};
    const kvl_layout layout = kvlane::paged_layout(three, 2);
    attention.layout = &layout;
    refused(KVL_STATUS_SHAPE, "num_sequences is -1", kvlane::attention(context, workspace, attention));

    kvl_shard shard;
    ok(kvlane::make_shard(1, 1, 2, 1, shard), "shard");
    kvlane::span rows;
    ok(kvlane::shard_sequences(shard, 5, rows), "rows");
    expect(rows.count == 5, "rows");
    std::vector<float> slopes;
    ok(kvlane::alibi_slopes(4, slopes), "slopes");
    expect(slopes[0] == 0.25f, "slopes");

    const kvlane::thread_pool pool(2);
    if (pool.status() == KVL_STATUS_OK) {
        std::vector<float> twice(8);
        ok(kvlane::repeat_kv(context, kvlane::view(v, {1, 1, 1, 4}), kvlane::view(twice, {1, 1, 2, 4}), pool.runner()), "pool");
        expect(twice[7] == 4, "pool");
    } else {
        expect(pool.status() == KVL_STATUS_UNSUPPORTED, "pool");
    }
    return failures > 0;
}
