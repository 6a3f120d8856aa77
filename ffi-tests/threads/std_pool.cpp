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
    return compare("std::thread pool", 3, [&](std::size_t n, auto task) {
        std::mutex mutex;
        std::condition_variable done;
        std::size_t left = n - 1;
        for (std::size_t i = 1; i < n; i++) {
            pool.submit([&, i] {
                task(i);
                // Notified under the lock: afterwards the variables may be gone.
                const std::lock_guard<std::mutex> lock(mutex);
                if (--left == 0) {
                    done.notify_one();
                }
            });
        }
        task(0);
        std::unique_lock<std::mutex> lock(mutex);
        done.wait(lock, [&] { return left == 0; });
    });
}
