// SPDX-License-Identifier: MIT OR Apache-2.0
//
// A thin C++17 layer over kvlane.h: owners for what has to be released, errors as exceptions, views of containers. Header
// only, and no part of the ABI. The operations are described in kvlane.h.
//
//     kvlane::context context;
//     kvlane::workspace workspace;
//     kvl_attention_params params = KVL_ATTENTION_PARAMS_INIT;
//     params.q = kvlane::view(q, {1, 1, 4, 8});
//     ...
//     kvlane::attention(context, workspace, params);
//
// Errors: a function that fails throws kvlane::error. Where exceptions are disabled (-fno-exceptions), or where
// KVLANE_EXCEPTIONS is defined as 0, functions return their kvl_status instead, results are written to a last argument, and
// constructors leave their status in status():
//
//     kvlane::context context;
//     if (context.status() != KVL_STATUS_OK) ...
//     if (kvlane::attention(context, workspace, params) != KVL_STATUS_OK) puts(kvlane::last_error().c_str());
#ifndef KVLANE_HPP
#define KVLANE_HPP

#include "kvlane.h"

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__has_include)
#if __has_include(<version>)
#include <version>
#endif
#if (defined(__STDCPP_FLOAT16_T__) || defined(__STDCPP_BFLOAT16_T__)) && __has_include(<stdfloat>)
#include <stdfloat>
#endif
#endif

#ifndef KVLANE_EXCEPTIONS
#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define KVLANE_EXCEPTIONS 1
#else
#define KVLANE_EXCEPTIONS 0
#endif
#endif

#if KVLANE_EXCEPTIONS
#include <stdexcept>
// What a function that can fail returns, how it calls another one, and how it ends.
#define KVLANE_RESULT_ inline void
#define KVLANE_TRY_(call) ::kvlane::check(call)
#define KVLANE_DONE_ return
#else
#define KVLANE_RESULT_ [[nodiscard]] inline kvl_status
#define KVLANE_TRY_(call)                                                                                              \
    do {                                                                                                               \
        const kvl_status status_of_call_ = (call);                                                                     \
        if (status_of_call_ != KVL_STATUS_OK) {                                                                        \
            return status_of_call_;                                                                                    \
        }                                                                                                              \
    } while (0)
#define KVLANE_DONE_ return KVL_STATUS_OK
#endif

namespace kvlane {

/// The calling thread's last sentence.
inline std::string last_error() {
    std::string text(kvl_last_error(nullptr, 0), '\0');
    kvl_last_error(&text[0], text.size());
    text.pop_back();
    return text;
}

// Programs may link files with exceptions and files without: the two layers have different names.
#if KVLANE_EXCEPTIONS
inline namespace throwing {

/// A status other than KVL_STATUS_OK; what() is the sentence.
class error : public std::runtime_error {
public:
    error(kvl_status status, const std::string &sentence) : std::runtime_error(sentence), status_(status) {}

    kvl_status status() const noexcept { return status_; }

private:
    kvl_status status_;
};

/// Throws unless `status` is KVL_STATUS_OK.
inline void check(kvl_status status) {
    if (status != KVL_STATUS_OK) {
        throw error(status, last_error());
    }
}
#else
inline namespace returning {
#endif

/// 16 bits of an IEEE 754 binary16, for those who have no type for it.
struct f16 {
    std::uint16_t bits;
};

/// The upper half of a float, for those who have no type for it.
struct bf16 {
    std::uint16_t bits;
};

/// A unit of `KVL_FORMAT_FP8_E4M3`.
struct fp8_e4m3 {
    std::uint8_t bits;
};

/// A unit of `KVL_FORMAT_FP8_E5M2`.
struct fp8_e5m2 {
    std::uint8_t bits;
};

/// 32 elements of `KVL_FORMAT_Q8_0`; `d` is an f16 here and below, and so is `m`.
struct q8_0 {
    std::uint16_t d;
    std::int8_t q[32];
};

/// 32 elements of `KVL_FORMAT_Q4_0`.
struct q4_0 {
    std::uint16_t d;
    std::uint8_t q[16];
};

/// 32 elements of `KVL_FORMAT_Q4_1`.
struct q4_1 {
    std::uint16_t d, m;
    std::uint8_t q[16];
};

/// 32 elements of `KVL_FORMAT_Q5_0`.
struct q5_0 {
    std::uint16_t d;
    std::uint8_t fifth[4], q[16];
};

/// 32 elements of `KVL_FORMAT_Q5_1`.
struct q5_1 {
    std::uint16_t d, m;
    std::uint8_t fifth[4], q[16];
};

/// 32 elements of `KVL_FORMAT_IQ4_NL`.
struct iq4_nl {
    std::uint16_t d;
    std::uint8_t q[16];
};

/// An element of `KVL_FORMAT_AFFINE8`.
struct affine8 {
    std::uint8_t bits;
};

/// Two elements of `KVL_FORMAT_AFFINE4`.
struct affine4 {
    std::uint8_t bits;
};

static_assert(sizeof(q8_0) == 34 && sizeof(q4_0) == 18 && sizeof(q4_1) == 20, "the blocks of ggml");
static_assert(sizeof(q5_0) == 22 && sizeof(q5_1) == 24 && sizeof(iq4_nl) == 18, "the blocks of ggml");

namespace detail {
/* The macro is defined for C; in C++, GCC has the type from version 13 on, and on x86 from 12. */
#if defined(__FLT16_MANT_DIG__) &&                                                                                      \
    (defined(__clang__) || __GNUC__ >= 13 || defined(__x86_64__) || defined(__i386__))
#define KVLANE_FLOAT16_ 1
__extension__ typedef _Float16 native_float16;
#endif
#if defined(__BFLT16_MANT_DIG__) ||                                                                                     \
    (defined(__clang__) && __clang_major__ >= 17 && (defined(__SSE2__) || defined(__aarch64__)))
#define KVLANE_BF16_ 1
__extension__ typedef __bf16 native_bf16;
#endif

/// The element type of a C++ type; negative if there is none. One function and no specialisations, because some of these
/// types are the same in some compilers.
template <class T> constexpr kvl_dtype known_dtype() {
    if (std::is_same<T, float>::value) {
        return KVL_DTYPE_F32;
    }
    if (std::is_same<T, std::int8_t>::value) {
        return KVL_FORMAT_INT8;
    }
    if (std::is_same<T, fp8_e4m3>::value) {
        return KVL_FORMAT_FP8_E4M3;
    }
    if (std::is_same<T, fp8_e5m2>::value) {
        return KVL_FORMAT_FP8_E5M2;
    }
    if (std::is_same<T, q8_0>::value) {
        return KVL_FORMAT_Q8_0;
    }
    if (std::is_same<T, q4_0>::value) {
        return KVL_FORMAT_Q4_0;
    }
    if (std::is_same<T, q4_1>::value) {
        return KVL_FORMAT_Q4_1;
    }
    if (std::is_same<T, q5_0>::value) {
        return KVL_FORMAT_Q5_0;
    }
    if (std::is_same<T, q5_1>::value) {
        return KVL_FORMAT_Q5_1;
    }
    if (std::is_same<T, iq4_nl>::value) {
        return KVL_FORMAT_IQ4_NL;
    }
    if (std::is_same<T, affine8>::value) {
        return KVL_FORMAT_AFFINE8;
    }
    if (std::is_same<T, affine4>::value) {
        return KVL_FORMAT_AFFINE4;
    }
    if (std::is_same<T, f16>::value) {
        return KVL_DTYPE_F16;
    }
    if (std::is_same<T, bf16>::value) {
        return KVL_DTYPE_BF16;
    }
#ifdef KVLANE_FLOAT16_
    if (std::is_same<T, native_float16>::value) {
        return KVL_DTYPE_F16;
    }
#endif
#ifdef KVLANE_BF16_
    if (std::is_same<T, native_bf16>::value) {
        return KVL_DTYPE_BF16;
    }
#endif
#ifdef __STDCPP_FLOAT16_T__
    if (std::is_same<T, std::float16_t>::value) {
        return KVL_DTYPE_F16;
    }
#endif
#ifdef __STDCPP_BFLOAT16_T__
    if (std::is_same<T, std::bfloat16_t>::value) {
        return KVL_DTYPE_BF16;
    }
#endif
    return -1;
}
} // namespace detail

/// The element type of a C++ type, or the format of its units: float, std::int8_t, the structs f16, bf16, fp8_e4m3, fp8_e5m2 and those of
/// blocks (q8_0 and so on) of this header, and `_Float16`, `__bf16`, `std::float16_t` and `std::bfloat16_t` where the compiler has them. Specialise it for a half type of your own.
template <class T> struct dtype_of : std::integral_constant<kvl_dtype, detail::known_dtype<T>()> {
    static_assert(detail::known_dtype<T>() >= 0, "no element type is known for this type: specialise kvlane::dtype_of");
};

/// batch, seq, heads, dim.
using axes = std::array<std::int64_t, 4>;

/// What can be written can be read.
inline kvl_const_view as_const(const kvl_view &view) {
    kvl_const_view result = {};
    result.data = view.data;
    result.dtype = view.dtype;
    result.reserved = view.reserved;
    for (std::size_t axis = 0; axis < 4; ++axis) {
        result.shape[axis] = view.shape[axis];
        result.strides[axis] = view.strides[axis];
    }
    result.bytes = view.bytes;
    return result;
}

/// A view that is written, and that may stand where one is only read.
struct mutable_view : kvl_view {
    mutable_view() : kvl_view{} {}
    mutable_view(const kvl_view &view) : kvl_view(view) {}
    operator kvl_const_view() const { return as_const(*this); }
};

/// A view that a function reads: of either kind.
class input {
public:
    input(const kvl_const_view &view) : view_(view) {}
    input(const kvl_view &view) : view_(as_const(view)) {}
    input(const mutable_view &view) : view_(as_const(view)) {}

    const kvl_const_view *get() const noexcept { return &view_; }

private:
    kvl_const_view view_;
};

/// A tensor, or a cache of any units, that lies in memory in the order of its axes. The shape counts elements.
template <class T> mutable_view view(T *data, const axes &shape) {
    mutable_view result;
    result.data = data;
    result.dtype = dtype_of<T>::value;
    const bool blocks = dtype_of<T>::value >= KVL_FORMAT_Q8_0 && dtype_of<T>::value <= KVL_FORMAT_IQ4_NL;
    const std::int64_t per_unit = blocks ? 32 : dtype_of<T>::value == KVL_FORMAT_AFFINE4 ? 2 : 1;
    std::uint64_t stride = 1; // Unsigned, because numbers that are too large are the library's to refuse.
    for (std::size_t axis = 4; axis-- > 0;) {
        result.shape[axis] = shape[axis];
        result.strides[axis] = static_cast<std::int64_t>(stride);
        stride *= static_cast<std::uint64_t>(axis == 3 ? shape[axis] / per_unit : shape[axis]);
    }
    return result;
}

/// The same, only read.
template <class T> kvl_const_view view(const T *data, const axes &shape) {
    kvl_const_view result = as_const(view(static_cast<T *>(nullptr), shape));
    result.data = data;
    return result;
}

/// A tensor with strides, in elements; of a cache, in units.
template <class T> auto view(T *data, const axes &shape, const axes &strides) {
    auto result = view(data, shape);
    for (std::size_t axis = 0; axis < 4; ++axis) {
        result.strides[axis] = strides[axis];
    }
    return result;
}

/// A tensor at the start of anything with data() and size() (vector, array, span): the library checks that it ends there.
template <class C, class = decltype(std::declval<C &>().data())> auto view(C &elements, const axes &shape) {
    auto result = view(elements.data(), shape);
    result.bytes = elements.size() * sizeof(*elements.data());
    return result;
}

/// The same, with strides.
template <class C, class = decltype(std::declval<C &>().data())>
auto view(C &elements, const axes &shape, const axes &strides) {
    auto result = view(elements.data(), shape, strides);
    result.bytes = elements.size() * sizeof(*elements.data());
    return result;
}

namespace detail {
/// The status of a constructor.
class constructed {
public:
    /// KVL_STATUS_OK, unless exceptions are disabled and the constructor failed.
    kvl_status status() const noexcept { return status_; }

protected:
    void keep(kvl_status status) {
#if KVLANE_EXCEPTIONS
        check(status);
#endif
        status_ = status;
    }

private:
    kvl_status status_ = KVL_STATUS_OK;
};
} // namespace detail

/// The kernels chosen for this machine; may be shared between threads.
class context : public detail::constructed {
public:
    /// `flags` is a sum of `KVL_CONTEXT_FLAG_*`.
    explicit context(kvl_isa max_isa = KVL_ISA_BEST, kvl_context_flag flags = 0) {
        kvl_context_params params = KVL_CONTEXT_PARAMS_INIT;
        params.max_isa = max_isa;
        params.flags = flags;
        kvl_context *made = nullptr;
        keep(kvl_context_create(&params, &made));
        handle_.reset(made);
    }

    const kvl_context *get() const noexcept { return handle_.get(); }

    KVLANE_RESULT_ isa(kvl_isa &to) const {
        KVLANE_TRY_(kvl_context_isa(get(), &to));
        KVLANE_DONE_;
    }

    KVLANE_RESULT_ kernel_name(kvl_op op, kvl_format src, kvl_format dst, const char *&to) const {
        KVLANE_TRY_(kvl_context_kernel_name(get(), op, src, dst, &to));
        KVLANE_DONE_;
    }

    /// {of keys, of values}.
    KVLANE_RESULT_ attention_kernel_names(kvl_format k_format, kvl_format v_format, kvl_precision precision,
                                          std::pair<const char *, const char *> &to) const {
        KVLANE_TRY_(kvl_context_attention_kernel_names(get(), k_format, v_format, precision, &to.first, &to.second));
        KVLANE_DONE_;
    }

    /// How values of a format are best packed for attention.
    KVLANE_RESULT_ v_packing(kvl_format v_format, kvl_packing &to) const {
        KVLANE_TRY_(kvl_context_v_packing(get(), v_format, &to));
        KVLANE_DONE_;
    }

    KVLANE_RESULT_ tuning(kvl_tuning &to) const {
        to = KVL_TUNING_INIT;
        KVLANE_TRY_(kvl_context_tuning(get(), &to));
        KVLANE_DONE_;
    }

    /// For the calls that begin afterwards; no other call may use the context at the same time.
    KVLANE_RESULT_ set_tuning(const kvl_tuning &tuning) {
        KVLANE_TRY_(kvl_context_set_tuning(handle_.get(), &tuning));
        KVLANE_DONE_;
    }

#if KVLANE_EXCEPTIONS
    kvl_tuning tuning() const {
        kvl_tuning own = KVL_TUNING_INIT;
        tuning(own);
        return own;
    }

    kvl_isa isa() const {
        kvl_isa level = KVL_ISA_BEST;
        isa(level);
        return level;
    }

    const char *kernel_name(kvl_op op, kvl_format src, kvl_format dst) const {
        const char *name = nullptr;
        kernel_name(op, src, dst, name);
        return name;
    }

    std::pair<const char *, const char *> attention_kernel_names(kvl_format k_format, kvl_format v_format,
                                                                 kvl_precision precision) const {
        std::pair<const char *, const char *> names;
        attention_kernel_names(k_format, v_format, precision, names);
        return names;
    }

    kvl_packing v_packing(kvl_format v_format) const {
        kvl_packing packing = KVL_PACKING_ROWS;
        v_packing(v_format, packing);
        return packing;
    }
#endif

private:
    struct release {
        void operator()(kvl_context *context) const noexcept { kvl_context_destroy(context); }
    };
    std::unique_ptr<kvl_context, release> handle_;
};

/// Threads of the library's.
class thread_pool : public detail::constructed {
public:
    /// 0 threads are as many as the machine runs at once.
    explicit thread_pool(std::size_t num_threads = 0) {
        kvl_thread_pool *made = nullptr;
        keep(kvl_thread_pool_create(num_threads, &made));
        handle_.reset(made);
        if (made != nullptr) {
            keep(kvl_thread_pool_runner(made, &runner_));
        }
    }

    /// Valid as long as the pool.
    const kvl_parallel_runner *runner() const noexcept { return &runner_; }

private:
    struct release {
        void operator()(kvl_thread_pool *pool) const noexcept { kvl_thread_pool_destroy(pool); }
    };
    std::unique_ptr<kvl_thread_pool, release> handle_;
    kvl_parallel_runner runner_ = KVL_PARALLEL_RUNNER_INIT;
};

/// One task of an operation: call it with its index.
class task {
public:
    task(void (*function)(void *, std::size_t), void *context) : function_(function), context_(context) {}

    void operator()(std::size_t i) const { function_(context_, i); }

private:
    void (*function_)(void *, std::size_t);
    void *context_;
};

namespace detail {
/// Until ready() is true: spins, and yields when it takes longer.
template <class Ready> void wait(Ready ready) {
    for (unsigned spins = 0; !ready(); ++spins) {
        if (spins >= 4096) {
            std::this_thread::yield();
        }
    }
}
} // namespace detail

/// A runner from `run(n, task)`, which calls task(i) for every i < n, on any threads, and returns when all have returned.
/// An exception from it becomes KVL_STATUS_PARALLEL.
template <class Run> class parallel_for {
public:
    parallel_for(std::size_t num_threads, Run run) : run_(std::move(run)) {
        runner_.ctx = this;
        runner_.num_threads = num_threads;
        runner_.run = &call;
    }
    // The runner points into this object.
    parallel_for(const parallel_for &) = delete;
    parallel_for &operator=(const parallel_for &) = delete;

    const kvl_parallel_runner *runner() const noexcept { return &runner_; }

private:
    static std::int32_t call(void *self, std::size_t n, void (*function)(void *, std::size_t), void *context) {
#if KVLANE_EXCEPTIONS
        try {
            static_cast<parallel_for *>(self)->run_(n, task(function, context));
            return 0;
        } catch (...) {
            return 1;
        }
#else
        static_cast<parallel_for *>(self)->run_(n, task(function, context));
        return 0;
#endif
    }

    Run run_;
    kvl_parallel_runner runner_ = KVL_PARALLEL_RUNNER_INIT;
};

/// Memory for keys or values, initially zero. Its address is a multiple of 64, and if it is large enough for huge pages, it
/// begins at a multiple of 2 MiB and asks for them; see `kvl_advise_huge_pages`. A view takes it as it takes a container.
/// Without exceptions, a buffer for which there is no memory is empty.
template <class T> class cache_buffer {
    static_assert(std::is_trivially_copyable_v<T>, "zero bytes must be a value");

public:
    explicit cache_buffer(std::size_t size) {
        const bool fits = size <= (SIZE_MAX - huge_page) / sizeof(T);
        const std::size_t bytes = fits ? size * sizeof(T) : 0;
        const std::size_t alignment = bytes < huge_page ? 64 : huge_page;
        // Not allocated with the alignment: fresh pages stay untouched until they are written, and zeros need not be.
        memory_.reset(fits ? std::calloc(bytes + alignment, 1) : nullptr);
        if (memory_ == nullptr) {
#if KVLANE_EXCEPTIONS
            throw std::bad_alloc();
#else
            return;
#endif
        }
        void *start = memory_.get();
        std::size_t space = bytes + alignment;
        data_ = static_cast<T *>(std::align(alignment, bytes, start, space));
        size_ = size;
        std::int32_t advised = 0;
        // The range is valid, so the call cannot fail.
        if (alignment == huge_page && kvl_advise_huge_pages(data_, bytes, &advised) == KVL_STATUS_OK) {
            advised_ = advised == 1;
        }
    }

    cache_buffer(cache_buffer &&other) noexcept { swap(other); }
    cache_buffer &operator=(cache_buffer &&other) noexcept {
        cache_buffer moved(std::move(other));
        swap(moved);
        return *this;
    }

    T *data() noexcept { return data_; }
    const T *data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }
    T &operator[](std::size_t i) noexcept { return data_[i]; }
    const T &operator[](std::size_t i) const noexcept { return data_[i]; }
    T *begin() noexcept { return data_; }
    T *end() noexcept { return data_ + size_; }
    const T *begin() const noexcept { return data_; }
    const T *end() const noexcept { return data_ + size_; }
    /// Whether the operating system took the request for huge pages.
    bool is_advised() const noexcept { return advised_; }

private:
    static constexpr std::size_t huge_page = std::size_t(2) << 20;
    struct release {
        void operator()(void *memory) const noexcept { std::free(memory); }
    };

    void swap(cache_buffer &other) noexcept {
        memory_.swap(other.memory_);
        std::swap(data_, other.data_);
        std::swap(size_, other.size_);
        std::swap(advised_, other.advised_);
    }

    std::unique_ptr<void, release> memory_;
    T *data_ = nullptr;
    std::size_t size_ = 0;
    bool advised_ = false;
};

/// A runner over a queue of jobs, as most pools are: `schedule(job)` has job(), which can be copied and returns nothing, called once,
/// at some time, on some thread. The calling thread takes part, and waits only for tasks that have begun, so that a call ends even if
/// the queue is not served, or is served by threads that wait themselves. A job that comes too late does nothing.
template <class Schedule> class job_queue {
public:
    job_queue(std::size_t num_threads, Schedule schedule) : schedule_(std::move(schedule)) {
        runner_.ctx = this;
        runner_.num_threads = num_threads;
        runner_.run = &call;
    }
    // The runner points into this object.
    job_queue(const job_queue &) = delete;
    job_queue &operator=(const job_queue &) = delete;

    const kvl_parallel_runner *runner() const noexcept { return &runner_; }

private:
    /// Shared by the calling thread and all jobs, because jobs may outlive the call.
    struct tasks {
        tasks(std::size_t count, void (*task)(void *, std::size_t), void *argument)
            : n(count), function(task), context(argument) {}

        void work() {
            for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
                function(context, i);
                done.fetch_add(1, std::memory_order_release);
            }
        }

        const std::size_t n;
        void (*const function)(void *, std::size_t);
        void *const context;
        std::atomic<std::size_t> next{0}, done{0};
    };

    static std::int32_t call(void *self, std::size_t n, void (*function)(void *, std::size_t), void *context) {
#if KVLANE_EXCEPTIONS
        std::shared_ptr<tasks> all;
        try {
            all = std::make_shared<tasks>(n, function, context);
            for (std::size_t i = 1; i < n; ++i) {
                static_cast<job_queue *>(self)->schedule_([all] { all->work(); });
            }
        } catch (...) {
            // The calling thread can do what could not be scheduled.
            if (all == nullptr) {
                return 1;
            }
        }
#else
        const auto all = std::make_shared<tasks>(n, function, context);
        for (std::size_t i = 1; i < n; ++i) {
            static_cast<job_queue *>(self)->schedule_([all] { all->work(); });
        }
#endif
        all->work();
        detail::wait([&] { return all->done.load(std::memory_order_acquire) == n; });
        return 0;
    }

    Schedule schedule_;
    kvl_parallel_runner runner_ = KVL_PARALLEL_RUNNER_INIT;
};

/// The threads of a runtime in which all of them make one call, each with its number, as ggml's operators are called with
/// `(ith, nth)`. Member 0 calls the library, and every member takes the next of its tasks when it is free:
///
///     kvlane::team team(8); // for at most eight threads
///     ...
///     team.enter(ith, nth, [&](const kvl_parallel_runner *runner) { // on every thread
///         kvlane::attention(context, workspace, params, runner);
///     });
///
/// `enter` returns on no member before all `nth` have entered and the function has returned on member 0; what it wrote is then
/// visible to all of them. In between, no member waits for one that is late, which on a loaded machine another program may hold up.
/// Waiting members spin, and yield when it takes longer. The members of one call have different `ith`
/// from 0 to nth - 1 and the same `nth`; one call at a time. A team may serve calls with different `nth`, one after the other.
class team {
public:
    explicit team(std::size_t most_members) : most_(most_members), slots_(new slot[most_members]) {}

    /// Returns, on every member, what the function returned on member 0: its kvl_status, or KVL_STATUS_OK if it returns nothing.
    /// An exception leaves on member 0, and the others return KVL_STATUS_INTERNAL. KVL_STATUS_INVALID_VALUE, without a call, if
    /// `nth` is larger than the team or `ith` is not below `nth`.
    template <class Function> kvl_status enter(std::size_t ith, std::size_t nth, Function &&function) {
        if (nth > most_ || ith >= nth) {
            return KVL_STATUS_INVALID_VALUE;
        }
        if (ith != 0) {
            return follow(ith);
        }
        leader led(*this, nth);
        kvl_parallel_runner runner = KVL_PARALLEL_RUNNER_INIT;
        runner.ctx = &led;
        runner.num_threads = nth;
        runner.run = &leader::run;
        if constexpr (std::is_void<decltype(function(&runner))>::value) {
            function(static_cast<const kvl_parallel_runner *>(&runner));
            led.status = KVL_STATUS_OK;
        } else {
            led.status = function(static_cast<const kvl_parallel_runner *>(&runner));
        }
        return led.status;
    }

private:
    /// Tasks for all members, or the end of a call if there is no function.
    struct job {
        void (*function)(void *, std::size_t);
        void *context;
        std::size_t n;
        kvl_status status;
        /// The next task that nobody has taken.
        mutable std::atomic<std::size_t> next{0};

        void work() const {
            for (std::size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
                function(context, i);
            }
        }
    };

    /// A member's mailbox: a job that is offered, `taken` while the member works, else null. A cache line each.
    struct alignas(64) slot {
        std::atomic<const job *> next{nullptr};
    };

    /// Member 0 during a call; its end releases the others, however the call ends.
    struct leader {
        leader(team &of, std::size_t nth) : team_(of), nth_(nth) {}
        leader(const leader &) = delete;
        leader &operator=(const leader &) = delete;
        ~leader() { give({nullptr, nullptr, nth_, status}); }

        static std::int32_t run(void *self, std::size_t n, void (*function)(void *, std::size_t), void *context) {
            static_cast<leader *>(self)->give({function, context, n, KVL_STATUS_OK});
            return 0;
        }

        kvl_status status = KVL_STATUS_INTERNAL;

    private:
        void give(const job &given) {
            const std::size_t members = given.n < nth_ ? given.n : nth_;
            for (std::size_t i = 1; i < members; ++i) {
                team_.slots_[i].next.store(&given, std::memory_order_release);
            }
            const bool ends = given.function == nullptr;
            if (!ends) {
                given.work();
            }
            for (std::size_t i = 1; i < members; ++i) {
                std::atomic<const job *> &next = team_.slots_[i].next;
                // All tasks are taken: a member that has not come yet has nothing to do. The end of a call is for every member.
                const job *offered = &given;
                if (!ends && next.compare_exchange_strong(offered, nullptr, std::memory_order_relaxed)) {
                    continue;
                }
                detail::wait([&] { return next.load(std::memory_order_acquire) == nullptr; });
            }
        }

        team &team_;
        std::size_t nth_;
    };

    kvl_status follow(std::size_t ith) {
        std::atomic<const job *> &next = slots_[ith].next;
        for (;;) {
            const job *given = nullptr;
            detail::wait([&] {
                given = next.load(std::memory_order_relaxed);
                // Member 0 may take back what it offered, and by now the address may be that of its next job: it is read once taken.
                return given != nullptr &&
                       next.compare_exchange_strong(given, &taken_, std::memory_order_acquire, std::memory_order_relaxed);
            });
            const kvl_status status = given->status;
            const bool ends = given->function == nullptr;
            if (!ends) {
                given->work();
            }
            next.store(nullptr, std::memory_order_release);
            if (ends) {
                return status;
            }
        }
    }

    std::size_t most_;
    std::unique_ptr<slot[]> slots_;
    /// Its address stands for any job that a member has taken.
    const job taken_{nullptr, nullptr, 0, KVL_STATUS_OK};
};

/// Scratch memory for attention: grows when a call needs more, and never shrinks. For one call at a time.
class workspace {
public:
    /// Without exceptions, a workspace for which there is no memory stays empty, and the call that needs it fails.
    void reserve(std::size_t bytes) {
        if (bytes > bytes_) {
            data_.reset();
            bytes_ = 0;
#if KVLANE_EXCEPTIONS
            data_.reset(::operator new(bytes, alignment));
#else
            data_.reset(::operator new(bytes, alignment, std::nothrow));
#endif
            bytes_ = data_ == nullptr ? 0 : bytes;
        }
    }

    void *data() const noexcept { return data_.get(); }
    std::size_t size() const noexcept { return bytes_; }

private:
    static constexpr std::align_val_t alignment{64};
    struct release {
        void operator()(void *data) const noexcept { ::operator delete(data, alignment); }
    };
    std::unique_ptr<void, release> data_;
    std::size_t bytes_ = 0;
};

/// Angular frequencies and the factor on cosines and sines.
struct frequencies {
    std::vector<double> inv_freq;
    double magnitude = 1;
};

KVLANE_RESULT_ rope_frequencies(const kvl_rope_frequencies_params &params, frequencies &to) {
    to.inv_freq.resize(params.rotary_dim > 0 ? static_cast<std::size_t>(params.rotary_dim / 2) : 0);
    // An empty vector has no pointer, and a sentence about rotary_dim is worth more than one about null.
    double nothing = 0;
    double *data = to.inv_freq.empty() ? &nothing : to.inv_freq.data();
    const auto pairs = static_cast<std::int64_t>(to.inv_freq.size());
    KVLANE_TRY_(kvl_rope_frequencies(&params, data, pairs, &to.magnitude));
    KVLANE_DONE_;
}

#if KVLANE_EXCEPTIONS
inline frequencies rope_frequencies(const kvl_rope_frequencies_params &params) {
    frequencies result;
    rope_frequencies(params, result);
    return result;
}
#endif

KVLANE_RESULT_ rope(const context &context, const input &src, const kvl_view &dst, const kvl_rope_params &params,
                    const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_rope(context.get(), runner, src.get(), &dst, &params));
    KVLANE_DONE_;
}

KVLANE_RESULT_ rope_in_place(const context &context, const kvl_view &x, const kvl_rope_params &params,
                             const kvl_parallel_runner *runner = nullptr) {
    return rope(context, x, x, params, runner);
}

KVLANE_RESULT_ hadamard(const context &context, const input &src, const kvl_view &dst, int64_t block,
                        const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_hadamard(context.get(), runner, src.get(), &dst, block));
    KVLANE_DONE_;
}

KVLANE_RESULT_ hadamard_in_place(const context &context, const kvl_view &x, int64_t block,
                                 const kvl_parallel_runner *runner = nullptr) {
    return hadamard(context, x, x, block, runner);
}

KVLANE_RESULT_ rms_norm(const context &context, const input &src, const kvl_view &dst,
                        const kvl_rms_norm_params &params, const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_rms_norm(context.get(), runner, src.get(), &dst, &params));
    KVLANE_DONE_;
}

KVLANE_RESULT_ rms_norm_in_place(const context &context, const kvl_view &x, const kvl_rms_norm_params &params,
                                 const kvl_parallel_runner *runner = nullptr) {
    return rms_norm(context, x, x, params, runner);
}

KVLANE_RESULT_ rms_norm_rope(const context &context, const input &src, const kvl_view &dst,
                             const kvl_rms_norm_params &norm, const kvl_rope_params &rope,
                             const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_rms_norm_rope(context.get(), runner, src.get(), &dst, &norm, &rope));
    KVLANE_DONE_;
}

KVLANE_RESULT_ rms_norm_rope_in_place(const context &context, const kvl_view &x, const kvl_rms_norm_params &norm,
                                      const kvl_rope_params &rope, const kvl_parallel_runner *runner = nullptr) {
    return rms_norm_rope(context, x, x, norm, rope, runner);
}

KVLANE_RESULT_ kv_write(const context &context, const kvl_kv_write_params &params,
                        const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_kv_write(context.get(), runner, &params));
    KVLANE_DONE_;
}

KVLANE_RESULT_ kv_read(const context &context, const kvl_kv_read_params &params,
                       const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_kv_read(context.get(), runner, &params));
    KVLANE_DONE_;
}

KVLANE_RESULT_ pack_row_pairs(const context &context, const input &src, const kvl_view &dst,
                              const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_pack_row_pairs(context.get(), runner, src.get(), &dst));
    KVLANE_DONE_;
}

KVLANE_RESULT_ unpack_row_pairs(const context &context, const input &src, const kvl_view &dst,
                                const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_unpack_row_pairs(context.get(), runner, src.get(), &dst));
    KVLANE_DONE_;
}

KVLANE_RESULT_ repeat_kv(const context &context, const input &src, const kvl_view &dst,
                         const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_repeat_kv(context.get(), runner, src.get(), &dst));
    KVLANE_DONE_;
}

KVLANE_RESULT_ attention(const context &context, workspace &workspace, const kvl_attention_params &params,
                         const kvl_parallel_runner *runner = nullptr) {
    std::size_t bytes = 0;
    KVLANE_TRY_(kvl_attention_workspace_size(&params, runner, &bytes));
    workspace.reserve(bytes);
    KVLANE_TRY_(kvl_attention(context.get(), runner, workspace.data(), workspace.size(), &params));
    KVLANE_DONE_;
}

/// Over a prefix that all sequences share, [1, tokens, kv_heads, ...], and then over each sequence's own keys.
KVLANE_RESULT_ attention_with_prefix(const context &context, workspace &workspace, const input &prefix_k,
                                     const input &prefix_v, const kvl_attention_params &params,
                                     const kvl_parallel_runner *runner = nullptr,
                                     const kvl_cache_scales *prefix_scales = nullptr) {
    std::size_t bytes = 0;
    KVLANE_TRY_(kvl_attention_with_prefix_workspace_size(prefix_k.get(), &params, runner, &bytes));
    workspace.reserve(bytes);
    KVLANE_TRY_(kvl_attention_with_prefix(context.get(), runner, workspace.data(), workspace.size(), prefix_k.get(),
                                          prefix_v.get(), prefix_scales, &params));
    KVLANE_DONE_;
}

KVLANE_RESULT_ merge_states(const context &context, const std::vector<kvl_attention_state> &states, const kvl_view &out,
                            float *lse = nullptr, const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_merge_states(context.get(), runner, states.data(), states.size(), &out, lse));
    KVLANE_DONE_;
}

/// The states of a span's chunks; `params` has no out, no lse and no sink logits.
KVLANE_RESULT_ attention_chunks(const context &context, workspace &workspace, const kvl_attention_params &params,
                                const kvl_parallel_runner *runner, std::vector<float> &to) {
    std::int64_t len = 0;
    KVLANE_TRY_(kvl_attention_chunks_states_len(&params, &len));
    to.resize(static_cast<std::size_t>(len));
    std::size_t bytes = 0;
    KVLANE_TRY_(kvl_attention_chunks_workspace_size(&params, runner, &bytes));
    workspace.reserve(bytes);
    KVLANE_TRY_(kvl_attention_chunks(context.get(), runner, workspace.data(), workspace.size(), &params, to.data(), len));
    KVLANE_DONE_;
}

#if KVLANE_EXCEPTIONS
inline std::vector<float> attention_chunks(const context &context, workspace &workspace,
                                           const kvl_attention_params &params,
                                           const kvl_parallel_runner *runner = nullptr) {
    std::vector<float> states;
    attention_chunks(context, workspace, params, runner, states);
    return states;
}
#endif

/// The states of a span as `kvl_merge_chunks_params` lists them; points into what it is given.
inline kvl_chunk_states chunk_states(const std::vector<float> &states) {
    return {states.data(), static_cast<std::int64_t>(states.size())};
}

KVLANE_RESULT_ merge_chunks(const context &context, workspace &workspace, const kvl_merge_chunks_params &params,
                            const kvl_parallel_runner *runner = nullptr) {
    std::size_t bytes = 0;
    KVLANE_TRY_(kvl_merge_chunks_workspace_size(&params, runner, &bytes));
    workspace.reserve(bytes);
    KVLANE_TRY_(kvl_merge_chunks(context.get(), runner, workspace.data(), workspace.size(), &params));
    KVLANE_DONE_;
}

KVLANE_RESULT_ alibi_slopes(std::size_t heads, std::vector<float> &to) {
    to.resize(heads);
    KVLANE_TRY_(kvl_alibi_slopes(to.data(), static_cast<std::int64_t>(heads)));
    KVLANE_DONE_;
}

#if KVLANE_EXCEPTIONS
inline std::vector<float> alibi_slopes(std::size_t heads) {
    std::vector<float> slopes;
    alibi_slopes(heads, slopes);
    return slopes;
}
#endif

/// Layers, lengths and layout as the operations below take them; points into what it is given.
inline kvl_cache make_cache(const std::vector<kvl_kv_layer> &layers, std::vector<std::int32_t> &lengths,
                            const kvl_layout *layout = nullptr) {
    kvl_cache cache = KVL_CACHE_INIT;
    cache.layers = layers.data();
    cache.num_layers = layers.size();
    cache.layout = layout;
    cache.lengths = lengths.data();
    return cache;
}

/// The scales of the keys and the values of a cache, where their formats have any.
inline kvl_cache_scales make_scales(const kvl_view &k, const kvl_view &v = {}) {
    kvl_cache_scales scales = KVL_CACHE_SCALES_INIT;
    scales.k = k;
    scales.v = v;
    return scales;
}

/// The same with the zero points of affine formats, and what describes their integers: sums of `KVL_AFFINE_*`.
inline kvl_cache_scales make_scales(const kvl_view &k, const kvl_view &k_zeros, kvl_affine k_affine, const kvl_view &v = {},
                                    const kvl_view &v_zeros = {}, kvl_affine v_affine = 0) {
    kvl_cache_scales scales = make_scales(k, v);
    scales.k_zeros = k_zeros;
    scales.v_zeros = v_zeros;
    scales.k_affine = k_affine;
    scales.v_affine = v_affine;
    return scales;
}

/// Static scales of a cache [batch, seq, kv_heads, dim] of eight-bit floats, in a container of one float (or f16), or of one per head.
template <class C> kvl_view static_scales(C &scales, const axes &cache) {
    return view(scales, axes{cache[0], cache[1], cache[2], 1}, axes{0, 0, scales.size() > 1 ? 1 : 0, 1});
}

/// A list of sequences, counts, lengths or parents.
using list = std::vector<std::int32_t>;

namespace detail {
/// The library cannot see how long a list is.
inline kvl_status same_size(std::size_t a, std::size_t b) {
#if KVLANE_EXCEPTIONS
    if (a != b) {
        throw error(KVL_STATUS_SHAPE, "lists of " + std::to_string(a) + " and " + std::to_string(b) + " entries");
    }
#endif
    return a == b ? KVL_STATUS_OK : KVL_STATUS_SHAPE;
}

/// How many sequences the library is to be told of, if a table has rows of the same length for them: else a number that it
/// refuses.
inline std::int64_t sequences(std::size_t entries, std::size_t sequences, std::size_t each) {
    return same_size(entries, sequences * each) == KVL_STATUS_OK ? static_cast<std::int64_t>(sequences) : -1;
}
} // namespace detail

/// Sequences that keep their newest tokens, and their first `sink_tokens` for ever.
inline kvl_layout ring_layout(std::int32_t sink_tokens = 0) {
    kvl_layout layout = KVL_LAYOUT_INIT;
    layout.kind = KVL_LAYOUT_KIND_RING;
    layout.sink_tokens = sink_tokens;
    return layout;
}

/// `table` is [num_sequences, pages_per_sequence]; points into it, as do the next two.
inline kvl_layout paged_layout(const list &table, std::int64_t num_sequences) {
    kvl_layout layout = KVL_LAYOUT_INIT;
    const std::size_t n = num_sequences > 0 ? static_cast<std::size_t>(num_sequences) : 1;
    const std::size_t pages_per_sequence = table.size() / n;
    const bool fits = detail::sequences(table.size(), n, pages_per_sequence) > 0;
    layout.kind = KVL_LAYOUT_KIND_PAGED;
    layout.num_sequences = fits ? num_sequences : -1;
    layout.pages_per_sequence = static_cast<std::int64_t>(pages_per_sequence);
    layout.table = table.data();
    return layout;
}

/// `table` is [num_sequences, capacity].
inline kvl_layout indirect_layout(const list &table, std::int64_t capacity) {
    kvl_layout layout = KVL_LAYOUT_INIT;
    const std::size_t n = capacity > 0 ? static_cast<std::size_t>(capacity) : 1;
    layout.kind = KVL_LAYOUT_KIND_INDIRECT;
    layout.num_sequences = detail::sequences(table.size(), table.size() / n, n);
    layout.table = table.data();
    return layout;
}

/// `cu_seqlens` is [num_sequences + 1].
inline kvl_layout ragged_layout(const list &cu_seqlens) {
    kvl_layout layout = KVL_LAYOUT_INIT;
    layout.kind = KVL_LAYOUT_KIND_RAGGED;
    layout.num_sequences = static_cast<std::int64_t>(cu_seqlens.size()) - 1;
    layout.table = cu_seqlens.data();
    return layout;
}

/// What the attention of all layers of a step has in common; may be shared between threads while none changes it.
class plan : public detail::constructed {
public:
    explicit plan(const kvl_attention_params &params) {
        kvl_plan *made = nullptr;
        keep(kvl_plan_create(&params, &made));
        handle_.reset(made);
    }

    /// For `kvl_attention_params::plan`.
    const kvl_plan *get() const noexcept { return handle_.get(); }

    /// Makes the plan anew, in the memory that it has.
    KVLANE_RESULT_ update(const kvl_attention_params &params) {
        KVLANE_TRY_(kvl_plan_update(handle_.get(), &params));
        KVLANE_DONE_;
    }

    /// `counts` has an entry for each sequence.
    KVLANE_RESULT_ advance(const list &counts) {
        KVLANE_TRY_(kvl_plan_advance(handle_.get(), counts.data(), static_cast<std::int64_t>(counts.size())));
        KVLANE_DONE_;
    }

    /// Sets entries of a sequence in the table of a paged or indirect layout, from `first` on.
    KVLANE_RESULT_ set_table(std::int64_t sequence, std::int64_t first, const list &entries) {
        const auto count = static_cast<std::int64_t>(entries.size());
        KVLANE_TRY_(kvl_plan_set_table(handle_.get(), sequence, first, entries.data(), count));
        KVLANE_DONE_;
    }

private:
    struct release {
        void operator()(kvl_plan *plan) const noexcept { kvl_plan_destroy(plan); }
    };
    std::unique_ptr<kvl_plan, release> handle_;
};

KVLANE_RESULT_ cache_set_lengths(const kvl_cache &cache, const list &sequences, const list &values) {
    KVLANE_TRY_(detail::same_size(sequences.size(), values.size()));
    KVLANE_TRY_(kvl_cache_set_lengths(&cache, sequences.data(), values.data(), sequences.size()));
    KVLANE_DONE_;
}

/// `counts` has an entry for each sequence.
KVLANE_RESULT_ cache_advance(const kvl_cache &cache, const list &counts) {
    KVLANE_TRY_(kvl_cache_advance(&cache, counts.data()));
    KVLANE_DONE_;
}

/// `lengths` has an entry for each sequence; `flags` and `window_left` are those of all attention over this cache.
KVLANE_RESULT_ cache_truncate(const kvl_cache &cache, const list &lengths, kvl_attention_flag flags = 0,
                              std::int64_t window_left = 0) {
    KVLANE_TRY_(kvl_cache_truncate(&cache, lengths.data(), flags, window_left));
    KVLANE_DONE_;
}

KVLANE_RESULT_ cache_reset(const kvl_cache &cache, const list &sequences, bool zero,
                           const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_cache_reset(runner, &cache, sequences.data(), sequences.size(), zero ? 1 : 0));
    KVLANE_DONE_;
}

KVLANE_RESULT_ cache_insert_sequence(const context &context, const kvl_cache &to, std::int64_t sequence, const kvl_cache &from,
                                std::int64_t from_sequence, std::int64_t length,
                                const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_cache_insert_sequence(context.get(), runner, &to, sequence, &from, from_sequence, length));
    KVLANE_DONE_;
}

KVLANE_RESULT_ cache_copy_prefix(const context &context, const kvl_cache &cache, std::int64_t from, const list &to,
                                 std::int64_t tokens, const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_cache_copy_prefix(context.get(), runner, &cache, from, to.data(), to.size(), tokens));
    KVLANE_DONE_;
}

/// `parents` has an entry for each sequence.
KVLANE_RESULT_ cache_reorder(const context &context, workspace &workspace, const kvl_cache &cache, const list &parents,
                             const kvl_parallel_runner *runner = nullptr) {
    std::size_t bytes = 0;
    KVLANE_TRY_(kvl_cache_reorder_workspace_size(&cache, runner, &bytes));
    workspace.reserve(bytes);
    KVLANE_TRY_(kvl_cache_reorder(context.get(), runner, workspace.data(), workspace.size(), &cache, parents.data()));
    KVLANE_DONE_;
}

/// `table` is [lengths.size(), capacity].
KVLANE_RESULT_ cache_reorder_table(workspace &workspace, list &table, list &lengths, const list &parents) {
    KVLANE_TRY_(detail::same_size(lengths.size(), parents.size()));
    const std::size_t rows = lengths.size(), capacity = rows == 0 ? 0 : table.size() / rows;
    KVLANE_TRY_(detail::same_size(table.size(), rows * capacity));
    std::size_t bytes = 0;
    const auto n = static_cast<std::int64_t>(rows), m = static_cast<std::int64_t>(capacity);
    KVLANE_TRY_(kvl_cache_reorder_table_workspace_size(n, m, &bytes));
    workspace.reserve(bytes);
    KVLANE_TRY_(kvl_cache_reorder_table(workspace.data(), workspace.size(), table.data(), n, m, lengths.data(),
                                  parents.data()));
    KVLANE_DONE_;
}

/// `table` is [positions.size(), capacity].
KVLANE_RESULT_ cache_set_table_tokens(list &table, const list &positions, std::int64_t tokens) {
    const std::size_t rows = positions.size(), capacity = rows == 0 ? 0 : table.size() / rows;
    KVLANE_TRY_(detail::same_size(table.size(), rows * capacity));
    KVLANE_TRY_(kvl_cache_set_table_tokens(table.data(), static_cast<std::int64_t>(rows),
                                     static_cast<std::int64_t>(capacity), positions.data(), tokens));
    KVLANE_DONE_;
}

/// `ropes` has an entry per layer, or one for all, or none.
KVLANE_RESULT_ cache_evict(const context &context, const kvl_cache &cache, std::int64_t sequence, std::int64_t first,
                           std::int64_t end, const std::vector<const kvl_rope_params *> &ropes = {},
                           const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(kvl_cache_evict(context.get(), runner, &cache, sequence, first, end, ropes.data(), ropes.size()));
    KVLANE_DONE_;
}

/// `keys` and `ropes` have an entry per layer, or one for all, or none.
KVLANE_RESULT_ cache_evict_running(const context &context, const kvl_cache &cache, std::int64_t sequence, std::int64_t first,
                                   std::int64_t end, std::int64_t dropped, const std::vector<kvl_const_view> &keys = {},
                                   const std::vector<const kvl_rope_params *> &ropes = {},
                                   const kvl_parallel_runner *runner = nullptr) {
    KVLANE_TRY_(detail::same_size(keys.size(), ropes.size()));
    KVLANE_TRY_(kvl_cache_evict_running(context.get(), runner, &cache, sequence, first, end, dropped, keys.data(), ropes.data(),
                                  ropes.size()));
    KVLANE_DONE_;
}

/// Pages {from, to}.
KVLANE_RESULT_ cache_copy_pages(const context &context, const std::vector<kvl_kv_layer> &layers,
                                const std::vector<std::array<std::int32_t, 2>> &moves,
                                const kvl_parallel_runner *runner = nullptr) {
    const std::int32_t *first = moves.empty() ? nullptr : moves.front().data();
    KVLANE_TRY_(kvl_cache_copy_pages(context.get(), runner, layers.data(), layers.size(), first, moves.size()));
    KVLANE_DONE_;
}

/// `table` is [lengths.size(), pages_per_sequence]; `used` becomes the number of pages in use.
KVLANE_RESULT_ cache_defragment(const context &context, const std::vector<kvl_kv_layer> &layers, list &table,
                                const list &lengths, list &map, const kvl_parallel_runner *runner, std::int64_t &used) {
    const std::size_t n = lengths.size(), pages_per_sequence = n == 0 ? 1 : table.size() / n;
    KVLANE_TRY_(detail::same_size(table.size(), n * pages_per_sequence));
    KVLANE_TRY_(detail::same_size(map.size(), layers.empty() ? 0 : static_cast<std::size_t>(layers.front().k.shape[0])));
    KVLANE_TRY_(kvl_cache_defragment(context.get(), runner, layers.data(), layers.size(), table.data(),
                                     static_cast<std::int64_t>(n), static_cast<std::int64_t>(pages_per_sequence),
                                     lengths.data(), map.data(), &used));
    KVLANE_DONE_;
}

#if KVLANE_EXCEPTIONS
/// The number of pages in use.
inline std::int64_t cache_defragment(const context &context, const std::vector<kvl_kv_layer> &layers, list &table,
                                     const list &lengths, list &map, const kvl_parallel_runner *runner = nullptr) {
    std::int64_t used = 0;
    cache_defragment(context, layers, table, lengths, map, runner, used);
    return used;
}
#endif

/// `count` indices from `first` on.
struct span {
    std::int64_t first = 0;
    std::int64_t count = 0;
};

/// Shard `rank` of this many parts of the batch, of the heads and of the sequence.
KVLANE_RESULT_ make_shard(std::int64_t rank, std::int64_t data, std::int64_t model, std::int64_t sequence, kvl_shard &to) {
    to = KVL_SHARD_INIT;
    to.num_data = data;
    to.num_model = model;
    to.num_sequence = sequence;
    KVLANE_TRY_(kvl_shard_from_rank(rank, &to));
    KVLANE_DONE_;
}

KVLANE_RESULT_ shard_sequences(const kvl_shard &shard, std::int64_t batch, span &to) {
    KVLANE_TRY_(kvl_shard_sequences(&shard, batch, &to.first, &to.count));
    KVLANE_DONE_;
}

/// {query heads, KV heads}.
KVLANE_RESULT_ shard_heads(const kvl_shard &shard, std::int64_t heads, std::int64_t kv_heads, std::pair<span, span> &to) {
    span &q = to.first, &kv = to.second;
    KVLANE_TRY_(kvl_shard_heads(&shard, heads, kv_heads, &q.first, &q.count, &kv.first, &kv.count));
    KVLANE_DONE_;
}

KVLANE_RESULT_ shard_keys(const kvl_shard &shard, std::int64_t capacity, span &to) {
    KVLANE_TRY_(kvl_shard_keys(&shard, capacity, &to.first, &to.count));
    KVLANE_DONE_;
}

/// What attention over a span of the keys takes.
struct span_lists {
    list lengths, kv_starts, offsets;
};

/// `kv_starts` and `offsets` may be empty, for their defaults.
KVLANE_RESULT_ shard_lengths(const span &keys, std::int64_t seq, const list &lengths, const list &kv_starts,
                             const list &offsets, span_lists &to) {
    const std::size_t batch = lengths.size();
    KVLANE_TRY_(detail::same_size(kv_starts.empty() ? batch : kv_starts.size(), batch));
    KVLANE_TRY_(detail::same_size(offsets.empty() ? batch : offsets.size(), batch));
    to = span_lists{list(batch), list(batch), list(batch)};
    KVLANE_TRY_(kvl_shard_lengths(keys.first, keys.count, static_cast<std::int64_t>(batch), seq, lengths.data(),
                                  kv_starts.empty() ? nullptr : kv_starts.data(),
                                  offsets.empty() ? nullptr : offsets.data(), to.lengths.data(), to.kv_starts.data(),
                                  to.offsets.data()));
    KVLANE_DONE_;
}

/// [positions.size(), seq].
KVLANE_RESULT_ shard_slots(const span &keys, std::int64_t seq, const list &positions, list &to) {
    to.assign(positions.size() * static_cast<std::size_t>(seq > 0 ? seq : 0), 0);
    KVLANE_TRY_(kvl_shard_slots(keys.first, keys.count, static_cast<std::int64_t>(positions.size()), seq,
                                positions.data(), to.data()));
    KVLANE_DONE_;
}

/// A part of a tensor along an axis: 0 batch, 1 seq, 2 heads, 3 dim.
KVLANE_RESULT_ shard_view(const kvl_view &view, std::int32_t axis, const span &part, kvl_view &to) {
    KVLANE_TRY_(kvl_shard_view(&view, axis, part.first, part.count, &to));
    KVLANE_DONE_;
}

#if KVLANE_EXCEPTIONS
inline kvl_shard make_shard(std::int64_t rank, std::int64_t data, std::int64_t model, std::int64_t sequence) {
    kvl_shard shard;
    make_shard(rank, data, model, sequence, shard);
    return shard;
}

inline span shard_sequences(const kvl_shard &shard, std::int64_t batch) {
    span sequences;
    shard_sequences(shard, batch, sequences);
    return sequences;
}

inline std::pair<span, span> shard_heads(const kvl_shard &shard, std::int64_t heads, std::int64_t kv_heads) {
    std::pair<span, span> both;
    shard_heads(shard, heads, kv_heads, both);
    return both;
}

inline span shard_keys(const kvl_shard &shard, std::int64_t capacity) {
    span keys;
    shard_keys(shard, capacity, keys);
    return keys;
}

inline span_lists shard_lengths(const span &keys, std::int64_t seq, const list &lengths, const list &kv_starts = {},
                                const list &offsets = {}) {
    span_lists local;
    shard_lengths(keys, seq, lengths, kv_starts, offsets, local);
    return local;
}

inline list shard_slots(const span &keys, std::int64_t seq, const list &positions) {
    list slots;
    shard_slots(keys, seq, positions, slots);
    return slots;
}

inline mutable_view shard_view(const kvl_view &view, std::int32_t axis, const span &part) {
    mutable_view result;
    shard_view(view, axis, part, result);
    return result;
}
#endif

#if KVLANE_EXCEPTIONS
} // namespace throwing
#else
} // namespace returning
#endif

} // namespace kvlane

#undef KVLANE_RESULT_
#undef KVLANE_TRY_
#undef KVLANE_DONE_
#undef KVLANE_FLOAT16_
#undef KVLANE_BF16_

#endif // KVLANE_HPP
