// Runners of kvlane.hpp: a parallel loop, a queue of jobs, and a team of threads that all make the call.
#include "kvlane.hpp"
#include "pool.hpp"

#include <cstdio>
#include <cstring>

namespace {

constexpr std::size_t threads = 3;

constexpr std::int64_t heads = 16, kv_heads = 4, dim = 64, capacity = 2048;

} // namespace

int main() {
    const kvlane::context context;
    kvlane::workspace workspace;
    kvlane::cache_buffer<kvlane::bf16> keys(capacity * kv_heads * dim), values(capacity * kv_heads * dim);
    std::vector<float> q(heads * dim), alone(heads * dim), out(heads * dim);
    for (std::size_t i = 0; i < keys.size(); i++) {
        keys[i].bits = static_cast<std::uint16_t>(0x3c00 + i % 701); // small numbers
        values[i].bits = static_cast<std::uint16_t>(0x3f80 + i % 113);
    }
    for (std::size_t i = 0; i < q.size(); i++) {
        q[i] = static_cast<float>(i % 17) / 17;
    }
    const std::int32_t length = capacity;
    kvl_attention_params params = kvl_make_causal_attention(
        kvlane::view(keys, {1, capacity, kv_heads, dim}), kvlane::view(values, {1, capacity, kv_heads, dim}), q.data(),
        alone.data(), KVL_DTYPE_F32, 1, 1, heads, &length);
    kvlane::attention(context, workspace, params);
    params.out.data = out.data();
    bool same = true;
    const auto compare = [&] {
        same = same && std::memcmp(alone.data(), out.data(), out.size() * sizeof(float)) == 0 && alone[0] > 1;
        out.assign(out.size(), 0);
    };

    {
        // [loop]
        // The loop that the runtime has: OpenMP's, TBB's, or this one.
        auto loop = [](std::size_t n, kvlane::task task) {
            std::vector<std::thread> others;
            for (std::size_t i = 1; i < n; i++) {
                others.emplace_back([=] { task(i); });
            }
            task(0);
            for (std::thread &other : others) {
                other.join();
            }
        };
        kvlane::parallel_for<decltype(loop)> runner(threads, loop);
        kvlane::attention(context, workspace, params, runner.runner());
        // [loop]
        compare();
    }
    {
        // [queue]
        pool jobs(threads - 1); // of the program: submit(job) calls job() once, at some time, on some thread
        auto schedule = [&](std::function<void()> job) { jobs.submit(std::move(job)); };
        kvlane::job_queue<decltype(schedule)> runner(threads, schedule);
        kvlane::attention(context, workspace, params, runner.runner());
        // [queue]
        compare();
    }
    {
        kvlane::team team(threads);
        std::vector<std::thread> members;
        for (std::size_t i = 0; i < threads; i++) {
            members.emplace_back([&, ith = i, nth = threads] {
                // [team]
                // On every thread of the runtime, with its number ith of nth.
                const kvl_status status = team.enter(ith, nth, [&](const kvl_parallel_runner *runner) {
                    kvlane::attention(context, workspace, params, runner); // called on thread 0 alone
                });
                // [team]
                if (status != KVL_STATUS_OK) {
                    std::fprintf(stderr, "member %zu: %s\n", ith, kvl_status_string(status));
                    std::exit(1);
                }
            });
        }
        for (std::thread &member : members) {
            member.join();
        }
        compare();
    }
    if (!same) {
        std::fprintf(stderr, "pools.cpp: the bits differ from those of one thread\n");
    }
    return same ? 0 : 1;
}
