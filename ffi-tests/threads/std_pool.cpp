// A pool of std::thread with a queue, as many programs have one.
#include "work.hpp"

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

class pool {
public:
    explicit pool(std::size_t threads) {
        for (std::size_t i = 0; i < threads; i++) {
            threads_.emplace_back([this] { work(); });
        }
    }

    ~pool() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ends_ = true;
        }
        wake_.notify_all();
        for (std::thread &thread : threads_) {
            thread.join();
        }
    }

    void submit(std::function<void()> job) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            jobs_.push_back(std::move(job));
        }
        wake_.notify_one();
    }

private:
    void work() {
        for (;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, [this] { return ends_ || !jobs_.empty(); });
            if (jobs_.empty()) {
                return;
            }
            const std::function<void()> job = std::move(jobs_.front());
            jobs_.pop_front();
            lock.unlock();
            job();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<std::function<void()>> jobs_;
    std::vector<std::thread> threads_;
    bool ends_ = false;
};

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
