// The threads of oneTBB. Linked with -ltbb.
#include "work.hpp"

#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

int main() {
    oneapi::tbb::task_arena arena(3);
    return compare("oneTBB", 3, [&](std::size_t n, auto task) {
        arena.execute([&] {
            oneapi::tbb::parallel_for(std::size_t{0}, n, [&](std::size_t i) { task(i); }, oneapi::tbb::simple_partitioner{});
        });
    });
}
