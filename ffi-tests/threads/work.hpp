// What the examples of this directory compute: two steps of a layer, with the runner of a runtime and without, compared to the bit.
#ifndef WORK_HPP
#define WORK_HPP

#include "kvlane.hpp"

#include <cstdio>
#include <cstring>

struct layer {
    static constexpr std::int64_t batch = 2, capacity = 1100, heads = 8, kv_heads = 2, dim = 64;

    /// New tokens, and how many of them attend.
    struct part {
        std::int64_t tokens, queries;
    };
    /// A prompt, more tokens of which the last attend, and three steps of decode.
    static constexpr part parts[] = {{150, 150}, {850, 20}, {1, 1}, {1, 1}, {1, 1}};

    kvlane::context context;
    kvlane::workspace workspace;
    std::vector<float> k_cache, v_cache, outputs;
    std::vector<std::int32_t> lengths = {0, 0};

    layer() : k_cache(batch * capacity * kv_heads * dim), v_cache(k_cache.size()) {}

    /// Adds tokens to every sequence, and the last of them attend.
    void step(part added, const kvl_parallel_runner *runner) {
        const auto [tokens, queries] = added;
        const std::vector<float> q = noise(batch * queries * heads * dim, 1), k = noise(batch * tokens * kv_heads * dim, 2);
        std::vector<float> out(q.size());
        kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
        write.k = write.v = kvlane::view(k.data(), {batch, tokens, kv_heads, dim});
        write.k_cache = kvlane::view(k_cache, {batch, capacity, kv_heads, dim});
        write.v_cache = kvlane::view(v_cache, {batch, capacity, kv_heads, dim});
        write.positions = lengths.data();
        kvlane::kv_write(context, write, runner);
        for (std::int32_t &length : lengths) {
            length += static_cast<std::int32_t>(tokens);
        }
        kvl_attention_params attention = KVL_ATTENTION_PARAMS_INIT;
        attention.q = kvlane::view(q.data(), {batch, queries, heads, dim});
        attention.k = kvlane::as_const(write.k_cache);
        attention.v = kvlane::as_const(write.v_cache);
        attention.out = kvlane::view(out, {batch, queries, heads, dim});
        attention.flags = KVL_ATTENTION_FLAG_CAUSAL;
        attention.lengths = lengths.data();
        kvlane::attention(context, workspace, attention, runner);
        outputs.insert(outputs.end(), out.begin(), out.end());
    }

    void run(const kvl_parallel_runner *runner) {
        for (const part &added : parts) {
            step(added, runner);
        }
    }

    /// Whether the calling thread alone computes the same bits.
    bool as_alone() const {
        layer alone;
        alone.run(nullptr);
        return equal(outputs, alone.outputs) && equal(k_cache, alone.k_cache) && equal(v_cache, alone.v_cache);
    }

private:
    static std::vector<float> noise(std::int64_t n, std::uint32_t state) {
        std::vector<float> values(static_cast<std::size_t>(n));
        for (float &x : values) {
            state = state * 1664525u + 1013904223u;
            x = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
        }
        return values;
    }

    static bool equal(const std::vector<float> &a, const std::vector<float> &b) {
        return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    }
};

/// For a runtime whose loop runs a function for every i < n, on its threads: `run(n, task)`.
template <class Run> int compare(const char *name, std::size_t threads, Run run) {
    std::size_t calls = 0; // Operations are called from one thread.
    auto counted = [&](std::size_t n, auto task) {
        calls++;
        run(n, task);
    };
    const kvlane::parallel_for<decltype(counted)> loop(threads, counted);
    layer layer;
    layer.run(loop.runner());
    const bool same = layer.as_alone();
    std::printf("%s: %s\n", name, same && calls >= 5 ? "the bits of one thread" : same ? "never called" : "other bits");
    return !(same && calls >= 5);
}

#endif
