// The threads of OpenMP. Compiled with -fopenmp.
#include "work.hpp"

int main() {
    return compare("OpenMP", 3, [](std::size_t n, auto task) {
        // One task per thread, since tasks are as many as threads at most.
#pragma omp parallel for num_threads(3) schedule(static, 1)
        for (std::size_t i = 0; i < n; i++) {
            task(i);
        }
    });
}
