// SPDX-License-Identifier: MIT OR Apache-2.0
//
// A thin C++17 layer over kvlane.h: owners for what has to be released, an exception for what can fail, views from
// containers. Header only; nothing here is part of the ABI. What the operations mean is said in kvlane.h.
//
//     kvlane::context context;
//     kvlane::workspace workspace;
//     kvl_attention_params params = KVL_ATTENTION_PARAMS_INIT;
//     params.q = kvlane::view(std::as_const(q), {1, 1, 4, 8});
//     ...
//     kvlane::attention(context, workspace, params);
#ifndef KVLANE_HPP
#define KVLANE_HPP

#include "kvlane.h"

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvlane {

/// A status other than KVL_OK; what() is the sentence.
class error : public std::runtime_error {
public:
    error(kvl_status status, const std::string &sentence) : std::runtime_error(sentence), status_(status) {}

    kvl_status status() const noexcept { return status_; }

private:
    kvl_status status_;
};

/// The calling thread's last sentence.
inline std::string last_error() {
    std::string text(kvl_last_error(nullptr, 0), '\0');
    kvl_last_error(&text[0], text.size());
    text.pop_back();
    return text;
}

/// Throws unless `status` is KVL_OK.
inline void check(kvl_status status) {
    if (status != KVL_OK) {
        throw error(status, last_error());
    }
}

/// 16 bits of an IEEE 754 binary16, for those who have no type for it.
struct f16 {
    std::uint16_t bits;
};

/// The upper half of a float, for those who have no type for it.
struct bf16 {
    std::uint16_t bits;
};

/// The element type of a C++ type; specialise it for a half type of your own.
template <class T> struct dtype_of;
template <> struct dtype_of<float> : std::integral_constant<kvl_dtype, KVL_F32> {};
template <> struct dtype_of<f16> : std::integral_constant<kvl_dtype, KVL_F16> {};
template <> struct dtype_of<bf16> : std::integral_constant<kvl_dtype, KVL_BF16> {};

/// batch, seq, heads, dim.
using axes = std::array<std::int64_t, 4>;

/// A tensor that lies in memory in the order of its axes.
template <class T> kvl_view view(T *data, const axes &shape) {
    return kvl_make_view(data, dtype_of<T>::value, shape[0], shape[1], shape[2], shape[3]);
}

/// The same, only read.
template <class T> kvl_const_view view(const T *data, const axes &shape) {
    return kvl_make_const_view(data, dtype_of<T>::value, shape[0], shape[1], shape[2], shape[3]);
}

/// A tensor with strides, in elements.
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

/// The kernels chosen for this machine; may be shared between threads.
class context {
public:
    explicit context(kvl_isa max_isa = KVL_ISA_BEST) {
        kvl_context_params params = KVL_CONTEXT_PARAMS_INIT;
        params.max_isa = max_isa;
        kvl_context *made = nullptr;
        check(kvl_context_create(&params, &made));
        handle_.reset(made);
    }

    const kvl_context *get() const noexcept { return handle_.get(); }

    kvl_isa isa() const {
        kvl_isa level = KVL_ISA_BEST;
        check(kvl_context_isa(get(), &level));
        return level;
    }

    const char *kernel_name(kvl_op op, kvl_dtype src, kvl_dtype dst) const {
        const char *name = nullptr;
        check(kvl_context_kernel_name(get(), op, src, dst, &name));
        return name;
    }

    const char *attention_kernel_name(kvl_dtype kv, kvl_precision precision) const {
        const char *name = nullptr;
        check(kvl_context_attention_kernel_name(get(), kv, precision, &name));
        return name;
    }

    /// How values of a type are best packed for attention.
    kvl_packing v_packing(kvl_dtype dtype) const {
        kvl_packing packing = KVL_PACK_ROWS;
        check(kvl_context_v_packing(get(), dtype, &packing));
        return packing;
    }

private:
    struct release {
        void operator()(kvl_context *context) const noexcept { kvl_context_destroy(context); }
    };
    std::unique_ptr<kvl_context, release> handle_;
};

/// Threads of the library's.
class thread_pool {
public:
    /// 0 threads are as many as the machine runs at once.
    explicit thread_pool(std::size_t num_threads = 0) {
        kvl_thread_pool *made = nullptr;
        check(kvl_thread_pool_create(num_threads, &made));
        handle_.reset(made);
        check(kvl_thread_pool_runner(made, &runner_));
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

/// A runner from `run(n, task)`, which calls task(i) for every i < n, on any threads, and returns when all have returned.
/// An exception from it becomes KVL_ERR_PARALLEL.
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
        try {
            static_cast<parallel_for *>(self)->run_(n, task(function, context));
            return 0;
        } catch (...) {
            return 1;
        }
    }

    Run run_;
    kvl_parallel_runner runner_ = KVL_PARALLEL_RUNNER_INIT;
};

/// Scratch memory for attention: grows when a call needs more, and never shrinks. For one call at a time.
class workspace {
public:
    void reserve(std::size_t bytes) {
        if (bytes > bytes_) {
            data_.reset();
            bytes_ = 0;
            data_.reset(::operator new(bytes, alignment));
            bytes_ = bytes;
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

inline frequencies rope_frequencies(const kvl_rope_frequencies_params &params) {
    frequencies result;
    result.inv_freq.resize(params.rotary_dim > 0 ? static_cast<std::size_t>(params.rotary_dim / 2) : 0);
    // An empty vector has no pointer, and a sentence about rotary_dim is worth more than one about null.
    double nothing = 0;
    double *data = result.inv_freq.empty() ? &nothing : result.inv_freq.data();
    const auto pairs = static_cast<std::int64_t>(result.inv_freq.size());
    check(kvl_rope_frequencies(&params, data, pairs, &result.magnitude));
    return result;
}

inline void rope(const context &context, const kvl_const_view &src, const kvl_view &dst, const kvl_rope_params &params,
                 const kvl_parallel_runner *runner = nullptr) {
    check(kvl_rope(context.get(), runner, &src, &dst, &params));
}

inline void rope_in_place(const context &context, const kvl_view &x, const kvl_rope_params &params,
                          const kvl_parallel_runner *runner = nullptr) {
    rope(context, kvl_as_const(x), x, params, runner);
}

inline void rms_norm(const context &context, const kvl_const_view &src, const kvl_view &dst,
                     const kvl_rms_norm_params &params, const kvl_parallel_runner *runner = nullptr) {
    check(kvl_rms_norm(context.get(), runner, &src, &dst, &params));
}

inline void rms_norm_in_place(const context &context, const kvl_view &x, const kvl_rms_norm_params &params,
                              const kvl_parallel_runner *runner = nullptr) {
    rms_norm(context, kvl_as_const(x), x, params, runner);
}

inline void rms_norm_rope(const context &context, const kvl_const_view &src, const kvl_view &dst,
                          const kvl_rms_norm_params &norm, const kvl_rope_params &rope,
                          const kvl_parallel_runner *runner = nullptr) {
    check(kvl_rms_norm_rope(context.get(), runner, &src, &dst, &norm, &rope));
}

inline void rms_norm_rope_in_place(const context &context, const kvl_view &x, const kvl_rms_norm_params &norm,
                                   const kvl_rope_params &rope, const kvl_parallel_runner *runner = nullptr) {
    rms_norm_rope(context, kvl_as_const(x), x, norm, rope, runner);
}

inline void kv_write(const context &context, const kvl_kv_write_params &params,
                     const kvl_parallel_runner *runner = nullptr) {
    check(kvl_kv_write(context.get(), runner, &params));
}

inline void pack_row_pairs(const context &context, const kvl_const_view &src, const kvl_view &dst,
                           const kvl_parallel_runner *runner = nullptr) {
    check(kvl_pack_row_pairs(context.get(), runner, &src, &dst));
}

inline void unpack_row_pairs(const context &context, const kvl_const_view &src, const kvl_view &dst,
                             const kvl_parallel_runner *runner = nullptr) {
    check(kvl_unpack_row_pairs(context.get(), runner, &src, &dst));
}

inline void repeat_kv(const context &context, const kvl_const_view &src, const kvl_view &dst,
                      const kvl_parallel_runner *runner = nullptr) {
    check(kvl_repeat_kv(context.get(), runner, &src, &dst));
}

inline void attention(const context &context, workspace &workspace, const kvl_attention_params &params,
                      const kvl_parallel_runner *runner = nullptr) {
    std::size_t bytes = 0;
    check(kvl_attention_workspace_size(&params, runner, &bytes));
    workspace.reserve(bytes);
    check(kvl_attention(context.get(), runner, workspace.data(), workspace.size(), &params));
}

inline void merge_states(const context &context, const std::vector<kvl_attention_state> &states, const kvl_view &out,
                         float *lse = nullptr, const kvl_parallel_runner *runner = nullptr) {
    check(kvl_merge_states(context.get(), runner, states.data(), states.size(), &out, lse));
}

inline std::vector<float> alibi_slopes(std::size_t heads) {
    std::vector<float> slopes(heads);
    check(kvl_alibi_slopes(slopes.data(), static_cast<std::int64_t>(heads)));
    return slopes;
}

} // namespace kvlane

#endif // KVLANE_HPP
