// A team of threads as ggml has: every thread runs the whole graph, and calls every operator with its number and the count.
#include "work.hpp"

#include <stdexcept>
#include <thread>

template <class Member> static void on_threads(std::size_t nth, Member member) {
    std::vector<std::thread> threads;
    for (std::size_t ith = 0; ith < nth; ith++) {
        threads.emplace_back([=] { member(ith); });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
}

static std::atomic<int> failures{0};

static void expect(bool condition, const char *what) {
    if (!condition) {
        failures++;
        std::fprintf(stderr, "team.cpp: not so: %s\n", what);
    }
}

int main() {
    kvlane::team team(8);
    for (std::size_t nth : {1, 3, 8}) {
        layer served;
        std::vector<std::size_t> seen(nth);
        on_threads(nth, [&](std::size_t ith) {
            for (const layer::part &added : layer::parts) {
                const kvl_status status = team.enter(ith, nth, [&](const kvl_parallel_runner *runner) { served.step(added, runner); });
                // Every member sees what the operator wrote, without a barrier of its own.
                seen[ith] += status == KVL_STATUS_OK ? served.outputs.size() : 0;
                // Members do not run ahead: the next operator would change what is being read.
                team.enter(ith, nth, [](const kvl_parallel_runner *) {});
            }
        });
        expect(served.as_alone(), "the bits of one thread");
        for (std::size_t sizes : seen) {
            expect(sizes == seen[0] && sizes > 0, "all members see the same outputs");
        }
    }

    // An error of the library is every member's, and so is what the function returns.
    on_threads(3, [&](std::size_t ith) {
        expect(team.enter(ith, 3, [](const kvl_parallel_runner *) -> kvl_status { return KVL_STATUS_CAPACITY; }) == KVL_STATUS_CAPACITY,
               "a status");
        try {
            const kvl_status status =
                team.enter(ith, 3, [](const kvl_parallel_runner *) { throw std::runtime_error("of member 0"); });
            expect(ith != 0 && status == KVL_STATUS_INTERNAL, "the others return");
        } catch (const std::runtime_error &) {
            expect(ith == 0, "an exception of member 0");
        }
        expect(team.enter(ith, 9, [](const kvl_parallel_runner *) {}) == KVL_STATUS_INVALID_VALUE, "nine of eight");
        expect(team.enter(ith + 3, 3, [](const kvl_parallel_runner *) {}) == KVL_STATUS_INVALID_VALUE, "ith is not below nth");
    });
    // A member that comes when all tasks are done has held up none of them.
    std::atomic<bool> done{false};
    std::atomic<int> tasks{0};
    on_threads(3, [&](std::size_t ith) {
        while (ith == 2 && !done) {
            std::this_thread::yield();
        }
        team.enter(ith, 3, [&](const kvl_parallel_runner *runner) {
            runner->run(runner->ctx, 3, [](void *to, std::size_t) { ++*static_cast<std::atomic<int> *>(to); }, &tasks);
            done = true;
        });
    });
    expect(tasks == 3, "three tasks of two members");
    // Thousands of small calls, in which members arrive in any order.
    std::size_t sum = 0;
    on_threads(3, [&](std::size_t ith) {
        for (int i = 0; i < 5000; i++) {
            team.enter(ith, 3, [&](const kvl_parallel_runner *runner) {
                std::array<std::size_t, 3> parts{};
                runner->run(runner->ctx, 3, [](void *to, std::size_t j) { static_cast<std::size_t *>(to)[j] += j; }, parts.data());
                sum += parts[0] + parts[1] + parts[2];
            });
        }
    });
    expect(sum == 15000, "every task once");
    if (failures == 0) {
        std::printf("team: the bits of one thread\n");
    }
    return failures > 0;
}
