// A pool of std::thread with a queue, as many programs have one.
#include "pool.hpp"
#include "work.hpp"

int main() {
    pool pool(2);
    // The calling thread is the third.
    auto schedule = [&](auto job) { pool.submit(job); };
    const kvlane::job_queue<decltype(schedule)> queue(3, schedule);
    layer served;
    served.run(queue.runner());

    // A queue that nobody serves until the call is over, and one that serves at once.
    std::vector<std::function<void()>> late;
    auto postpone = [&](auto job) { late.push_back(job); };
    const kvlane::job_queue<decltype(postpone)> slow(3, postpone);
    layer alone;
    alone.run(slow.runner());
    for (const auto &job : late) {
        job();
    }
    auto refuse = [](auto) { throw std::bad_alloc(); };
    const kvlane::job_queue<decltype(refuse)> full(3, refuse);
    layer refused;
    refused.run(full.runner());

    const bool same = served.as_alone() && alone.as_alone() && refused.as_alone() && late.size() >= 5;
    std::printf("std::thread pool: %s\n", same ? "the bits of one thread" : "other bits");
    return !same;
}
