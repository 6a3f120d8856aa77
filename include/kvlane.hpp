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

/// A status other than KVL_STATUS_OK; what() is the sentence.
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

/// Throws unless `status` is KVL_STATUS_OK.
inline void check(kvl_status status) {
    if (status != KVL_STATUS_OK) {
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
template <> struct dtype_of<float> : std::integral_constant<kvl_dtype, KVL_DTYPE_F32> {};
template <> struct dtype_of<f16> : std::integral_constant<kvl_dtype, KVL_DTYPE_F16> {};
template <> struct dtype_of<bf16> : std::integral_constant<kvl_dtype, KVL_DTYPE_BF16> {};

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

    const char *attention_kernel_name(kvl_dtype k, kvl_dtype v, kvl_precision precision) const {
        const char *name = nullptr;
        check(kvl_context_attention_kernel_name(get(), k, v, precision, &name));
        return name;
    }

    /// How values of a type are best packed for attention.
    kvl_packing v_packing(kvl_dtype dtype) const {
        kvl_packing packing = KVL_PACKING_ROWS;
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

/// Over a prefix that all rows share, [1, tokens, kv_heads, ...], and then over each row's own keys.
inline void attention_with_prefix(const context &context, workspace &workspace, const kvl_const_view &prefix_k,
                                  const kvl_const_view &prefix_v, const kvl_attention_params &params,
                                  const kvl_parallel_runner *runner = nullptr) {
    std::size_t bytes = 0;
    check(kvl_attention_with_prefix_workspace_size(&prefix_k, &params, runner, &bytes));
    workspace.reserve(bytes);
    check(kvl_attention_with_prefix(context.get(), runner, workspace.data(), workspace.size(), &prefix_k, &prefix_v,
                                    &params));
}

inline void merge_states(const context &context, const std::vector<kvl_attention_state> &states, const kvl_view &out,
                         float *lse = nullptr, const kvl_parallel_runner *runner = nullptr) {
    check(kvl_merge_states(context.get(), runner, states.data(), states.size(), &out, lse));
}

/// The states of a span's chunks; `params` has no out, no lse and no sink logits.
inline std::vector<float> attention_chunks(const context &context, workspace &workspace,
                                           const kvl_attention_params &params,
                                           const kvl_parallel_runner *runner = nullptr) {
    std::int64_t len = 0;
    check(kvl_attention_chunks_states_len(&params, &len));
    std::vector<float> states(static_cast<std::size_t>(len));
    std::size_t bytes = 0;
    check(kvl_attention_chunks_workspace_size(&params, runner, &bytes));
    workspace.reserve(bytes);
    check(kvl_attention_chunks(context.get(), runner, workspace.data(), workspace.size(), &params, states.data(), len));
    return states;
}

/// The states of a span as `kvl_merge_chunks_params` lists them; points into what it is given.
inline kvl_chunk_states chunk_states(const std::vector<float> &states) {
    return {states.data(), static_cast<std::int64_t>(states.size())};
}

inline void merge_chunks(const context &context, workspace &workspace, const kvl_merge_chunks_params &params,
                         const kvl_parallel_runner *runner = nullptr) {
    std::size_t bytes = 0;
    check(kvl_merge_chunks_workspace_size(&params, runner, &bytes));
    workspace.reserve(bytes);
    check(kvl_merge_chunks(context.get(), runner, workspace.data(), workspace.size(), &params));
}

inline std::vector<float> alibi_slopes(std::size_t heads) {
    std::vector<float> slopes(heads);
    check(kvl_alibi_slopes(slopes.data(), static_cast<std::int64_t>(heads)));
    return slopes;
}

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

/// A list of rows, counts, lengths or parents.
using list = std::vector<std::int32_t>;

namespace detail {
/// The library cannot see how long a list is.
inline void same_size(std::size_t a, std::size_t b) {
    if (a != b) {
        throw error(KVL_STATUS_SHAPE, "lists of " + std::to_string(a) + " and " + std::to_string(b) + " entries");
    }
}
} // namespace detail

/// Rows of which the newest tokens are kept, and for ever the first `sink_tokens`.
inline kvl_layout ring_layout(std::int32_t sink_tokens = 0) {
    kvl_layout layout = KVL_LAYOUT_INIT;
    layout.kind = KVL_LAYOUT_KIND_RING;
    layout.sink_tokens = sink_tokens;
    return layout;
}

/// `table` is [num_sequences, pages_per_sequence]; points into it, as do the next two.
inline kvl_layout paged_layout(const list &table, std::int64_t rows) {
    kvl_layout layout = KVL_LAYOUT_INIT;
    const std::size_t n = rows > 0 ? static_cast<std::size_t>(rows) : 1, pages_per_sequence = table.size() / n;
    detail::same_size(table.size(), n * pages_per_sequence);
    layout.kind = KVL_LAYOUT_KIND_PAGED;
    layout.num_sequences = rows;
    layout.pages_per_sequence = static_cast<std::int64_t>(pages_per_sequence);
    layout.table = table.data();
    return layout;
}

/// `table` is [rows, capacity].
inline kvl_layout indirect_layout(const list &table, std::int64_t capacity) {
    kvl_layout layout = KVL_LAYOUT_INIT;
    const std::size_t n = capacity > 0 ? static_cast<std::size_t>(capacity) : 1, rows = table.size() / n;
    detail::same_size(table.size(), n * rows);
    layout.kind = KVL_LAYOUT_KIND_INDIRECT;
    layout.num_sequences = static_cast<std::int64_t>(rows);
    layout.table = table.data();
    return layout;
}

/// `starts` is [rows + 1].
inline kvl_layout ragged_layout(const list &starts) {
    kvl_layout layout = KVL_LAYOUT_INIT;
    layout.kind = KVL_LAYOUT_KIND_RAGGED;
    layout.num_sequences = static_cast<std::int64_t>(starts.size()) - 1;
    layout.table = starts.data();
    return layout;
}

/// What the attention of all layers of a step has in common; may be shared between threads while none changes it.
class plan {
public:
    explicit plan(const kvl_attention_params &params) {
        kvl_plan *made = nullptr;
        check(kvl_plan_create(&params, &made));
        handle_.reset(made);
    }

    /// For `kvl_attention_params::plan`.
    const kvl_plan *get() const noexcept { return handle_.get(); }

    /// Anew, in the memory that it has.
    void update(const kvl_attention_params &params) { check(kvl_plan_update(handle_.get(), &params)); }

    /// `counts` has an entry a row.
    void advance(const list &counts) {
        check(kvl_plan_advance(handle_.get(), counts.data(), static_cast<std::int64_t>(counts.size())));
    }

    /// Entries from `first` on of a row in the table of pages or rows.
    void set_table(std::int64_t row, std::int64_t first, const list &entries) {
        const auto count = static_cast<std::int64_t>(entries.size());
        check(kvl_plan_set_table(handle_.get(), row, first, entries.data(), count));
    }

private:
    struct release {
        void operator()(kvl_plan *plan) const noexcept { kvl_plan_destroy(plan); }
    };
    std::unique_ptr<kvl_plan, release> handle_;
};

inline void cache_set_lengths(const kvl_cache &cache, const list &rows, const list &values) {
    detail::same_size(rows.size(), values.size());
    check(kvl_cache_set_lengths(&cache, rows.data(), values.data(), rows.size()));
}

/// `counts` has an entry a row.
inline void cache_advance(const kvl_cache &cache, const list &counts) {
    check(kvl_cache_advance(&cache, counts.data()));
}

/// `lengths` has an entry for each sequence; `flags` and `window_left` are those of all attention over this cache.
inline void cache_truncate(const kvl_cache &cache, const list &lengths, kvl_attention_flag flags = 0,
                           std::int64_t window_left = 0) {
    check(kvl_cache_truncate(&cache, lengths.data(), flags, window_left));
}

inline void cache_reset(const kvl_cache &cache, const list &rows, bool zero,
                        const kvl_parallel_runner *runner = nullptr) {
    check(kvl_cache_reset(runner, &cache, rows.data(), rows.size(), zero ? 1 : 0));
}

inline void cache_insert_row(const context &context, const kvl_cache &to, std::int64_t row, const kvl_cache &from,
                             std::int64_t from_row, std::int64_t length,
                             const kvl_parallel_runner *runner = nullptr) {
    check(kvl_cache_insert_row(context.get(), runner, &to, row, &from, from_row, length));
}

inline void cache_copy_prefix(const context &context, const kvl_cache &cache, std::int64_t from, const list &to,
                              std::int64_t tokens, const kvl_parallel_runner *runner = nullptr) {
    check(kvl_cache_copy_prefix(context.get(), runner, &cache, from, to.data(), to.size(), tokens));
}

/// `parents` has an entry a row.
inline void cache_reorder(const context &context, workspace &workspace, const kvl_cache &cache, const list &parents,
                          const kvl_parallel_runner *runner = nullptr) {
    std::size_t bytes = 0;
    check(kvl_cache_reorder_workspace_size(&cache, runner, &bytes));
    workspace.reserve(bytes);
    check(kvl_cache_reorder(context.get(), runner, workspace.data(), workspace.size(), &cache, parents.data()));
}

/// `table` is [lengths.size(), capacity].
inline void cache_reorder_table(workspace &workspace, list &table, list &lengths, const list &parents) {
    detail::same_size(lengths.size(), parents.size());
    const std::size_t rows = lengths.size(), capacity = rows == 0 ? 0 : table.size() / rows;
    detail::same_size(table.size(), rows * capacity);
    std::size_t bytes = 0;
    const auto n = static_cast<std::int64_t>(rows), m = static_cast<std::int64_t>(capacity);
    check(kvl_cache_reorder_table_workspace_size(n, m, &bytes));
    workspace.reserve(bytes);
    check(kvl_cache_reorder_table(workspace.data(), workspace.size(), table.data(), n, m, lengths.data(),
                                  parents.data()));
}

/// `table` is [positions.size(), capacity].
inline void cache_set_table_tokens(list &table, const list &positions, std::int64_t tokens) {
    const std::size_t rows = positions.size(), capacity = rows == 0 ? 0 : table.size() / rows;
    detail::same_size(table.size(), rows * capacity);
    check(kvl_cache_set_table_tokens(table.data(), static_cast<std::int64_t>(rows),
                                     static_cast<std::int64_t>(capacity), positions.data(), tokens));
}

/// `ropes` has an entry a layer, or one for all, or none.
inline void cache_evict(const context &context, const kvl_cache &cache, std::int64_t row, std::int64_t first,
                        std::int64_t end, const std::vector<const kvl_rope_params *> &ropes = {},
                        const kvl_parallel_runner *runner = nullptr) {
    check(kvl_cache_evict(context.get(), runner, &cache, row, first, end, ropes.data(), ropes.size()));
}

/// `keys` and `ropes` have an entry per layer, or one for all, or none.
inline void cache_evict_running(const context &context, const kvl_cache &cache, std::int64_t row, std::int64_t first,
                                std::int64_t end, std::int64_t dropped, const std::vector<kvl_const_view> &keys = {},
                                const std::vector<const kvl_rope_params *> &ropes = {},
                                const kvl_parallel_runner *runner = nullptr) {
    detail::same_size(keys.size(), ropes.size());
    check(kvl_cache_evict_running(context.get(), runner, &cache, row, first, end, dropped, keys.data(), ropes.data(),
                                  ropes.size()));
}

/// Pages {from, to}.
inline void cache_copy_pages(const context &context, const std::vector<kvl_kv_layer> &layers,
                             const std::vector<std::array<std::int32_t, 2>> &moves,
                             const kvl_parallel_runner *runner = nullptr) {
    const std::int32_t *first = moves.empty() ? nullptr : moves.front().data();
    check(kvl_cache_copy_pages(context.get(), runner, layers.data(), layers.size(), first, moves.size()));
}

/// `table` is [lengths.size(), pages_per_sequence]; returns how many pages are in use.
inline std::int64_t cache_defragment(const context &context, const std::vector<kvl_kv_layer> &layers, list &table,
                                     const list &lengths, list &map, const kvl_parallel_runner *runner = nullptr) {
    const std::size_t rows = lengths.size(), pages_per_sequence = rows == 0 ? 1 : table.size() / rows;
    detail::same_size(table.size(), rows * pages_per_sequence);
    detail::same_size(map.size(), layers.empty() ? 0 : static_cast<std::size_t>(layers.front().k.shape[0]));
    std::int64_t used = 0;
    check(kvl_cache_defragment(context.get(), runner, layers.data(), layers.size(), table.data(),
                               static_cast<std::int64_t>(rows), static_cast<std::int64_t>(pages_per_sequence),
                               lengths.data(), map.data(), &used));
    return used;
}

/// `count` indices from `first` on.
struct span {
    std::int64_t first = 0;
    std::int64_t count = 0;
};

/// Shard `rank` of so many parts of the batch, of the heads and of the sequence.
inline kvl_shard make_shard(std::int64_t rank, std::int64_t data, std::int64_t model, std::int64_t sequence) {
    kvl_shard shard = KVL_SHARD_INIT;
    shard.num_data = data;
    shard.num_model = model;
    shard.num_sequence = sequence;
    check(kvl_shard_from_rank(rank, &shard));
    return shard;
}

inline span shard_rows(const kvl_shard &shard, std::int64_t batch) {
    span rows;
    check(kvl_shard_rows(&shard, batch, &rows.first, &rows.count));
    return rows;
}

/// {query heads, KV heads}.
inline std::pair<span, span> shard_heads(const kvl_shard &shard, std::int64_t heads, std::int64_t kv_heads) {
    span q, kv;
    check(kvl_shard_heads(&shard, heads, kv_heads, &q.first, &q.count, &kv.first, &kv.count));
    return {q, kv};
}

inline span shard_keys(const kvl_shard &shard, std::int64_t capacity) {
    span keys;
    check(kvl_shard_keys(&shard, capacity, &keys.first, &keys.count));
    return keys;
}

/// What attention over a span of the keys takes.
struct span_lists {
    list lengths, kv_starts, offsets;
};

/// `kv_starts` and `offsets` may be empty, for their defaults.
inline span_lists shard_lengths(const span &keys, std::int64_t seq, const list &lengths, const list &kv_starts = {},
                                const list &offsets = {}) {
    const std::size_t batch = lengths.size();
    detail::same_size(kv_starts.empty() ? batch : kv_starts.size(), batch);
    detail::same_size(offsets.empty() ? batch : offsets.size(), batch);
    span_lists local{list(batch), list(batch), list(batch)};
    check(kvl_shard_lengths(keys.first, keys.count, static_cast<std::int64_t>(batch), seq, lengths.data(),
                            kv_starts.empty() ? nullptr : kv_starts.data(), offsets.empty() ? nullptr : offsets.data(),
                            local.lengths.data(), local.kv_starts.data(), local.offsets.data()));
    return local;
}

/// [positions.size(), seq].
inline list shard_slots(const span &keys, std::int64_t seq, const list &positions) {
    list slots(positions.size() * static_cast<std::size_t>(seq > 0 ? seq : 0));
    check(kvl_shard_slots(keys.first, keys.count, static_cast<std::int64_t>(positions.size()), seq, positions.data(),
                          slots.data()));
    return slots;
}

/// A part of a tensor along an axis: 0 batch, 1 seq, 2 heads, 3 dim.
inline kvl_view shard_view(const kvl_view &view, std::int32_t axis, const span &part) {
    kvl_view result;
    check(kvl_shard_view(&view, axis, part.first, part.count, &result));
    return result;
}

} // namespace kvlane

#endif // KVLANE_HPP
