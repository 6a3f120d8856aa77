// Attention over a cache, the cache write and RoPE as custom calls of XLA, on XLA's threads: compiled by `kvlane_jax.py`.
//
// Tensors are [..., seq, heads, dim] and lists [...]: the leading axes, however many vmap has added, are the batch.
#include "kvlane.hpp"
#include "xla/ffi/api/ffi.h"

#include <algorithm>

namespace ffi = xla::ffi;
using dims = ffi::AnyBuffer::Dimensions;

namespace {

struct bad_argument : std::runtime_error {
    using std::runtime_error::runtime_error;
};

const kvlane::context &context() {
    static const kvlane::context made;
    return made;
}

kvl_dtype dtype(ffi::DataType type) {
    switch (type) {
    case ffi::DataType::F32:
        return KVL_DTYPE_F32;
    case ffi::DataType::F16:
        return KVL_DTYPE_F16;
    case ffi::DataType::BF16:
        return KVL_DTYPE_BF16;
    default:
        throw bad_argument("tensors have the types f32, f16 or bf16");
    }
}

/// A tensor with its leading axes as one.
kvlane::mutable_view view(const ffi::AnyBuffer &buffer) {
    const dims d = buffer.dimensions();
    if (d.size() < 3) {
        throw bad_argument("tensors have the axes [..., seq, heads, dim]");
    }
    kvlane::axes shape{1, d[d.size() - 3], d[d.size() - 2], d[d.size() - 1]};
    for (std::size_t i = 0; i + 3 < d.size(); i++) {
        shape[0] *= d[i];
    }
    kvlane::mutable_view result = kvlane::view(static_cast<float *>(buffer.untyped_data()), shape);
    result.dtype = dtype(buffer.element_type());
    return result;
}

const std::int32_t *list(const char *name, const ffi::Buffer<ffi::S32> &buffer, std::int64_t batch) {
    if (buffer.element_count() != static_cast<std::size_t>(batch)) {
        throw bad_argument(std::string(name) + " has " + std::to_string(buffer.element_count()) + " entries for a batch of " +
                           std::to_string(batch));
    }
    return buffer.typed_data();
}

/// Entry i is the number of the entry of an operand that has 1 where vmap has not mapped it.
std::vector<std::int64_t> broadcast(const char *name, dims whole, dims part) {
    if (part.size() != whole.size()) {
        throw bad_argument(std::string(name) + " has " + std::to_string(part.size()) + " leading axes, the queries " +
                           std::to_string(whole.size()));
    }
    std::vector<std::int64_t> indices{0};
    for (std::size_t axis = 0; axis < whole.size(); axis++) {
        if (part[axis] != whole[axis] && part[axis] != 1) {
            throw bad_argument(std::string(name) + " has " + std::to_string(part[axis]) + " entries along an axis of " +
                               std::to_string(whole[axis]));
        }
        std::vector<std::int64_t> next;
        for (const std::int64_t index : indices) {
            for (std::int64_t i = 0; i < whole[axis]; i++) {
                next.push_back(index * part[axis] + (part[axis] == 1 ? 0 : i));
            }
        }
        indices.swap(next);
    }
    return indices;
}

/// Calls `run(runner)` with XLA's threads, and makes errors those of XLA.
template <class Run> ffi::Error with_runner(ffi::ThreadPool &pool, Run run) {
    auto schedule = [&](auto job) { pool.Schedule(std::move(job)); };
    const kvlane::job_queue<decltype(schedule)> queue(static_cast<std::size_t>(pool.num_threads()), schedule);
    try {
        run(queue.runner());
    } catch (const std::exception &error) {
        return ffi::Error::InvalidArgument(error.what());
    }
    return ffi::Error::Success();
}

ffi::Error attention(ffi::ThreadPool pool, bool causal, float scale, float softcap, std::int64_t window_left, ffi::AnyBuffer q,
                     ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::Buffer<ffi::S32> lengths, ffi::Buffer<ffi::S32> starts,
                     ffi::Result<ffi::AnyBuffer> out) {
    return with_runner(pool, [&](const kvl_parallel_runner *runner) {
        thread_local kvlane::workspace workspace;
        kvl_attention_params params = KVL_ATTENTION_PARAMS_INIT;
        const kvlane::mutable_view q_view = view(q), k_view = view(k), v_view = view(v), out_view = view(*out);
        params.scale = scale;
        params.softcap = softcap;
        params.flags = causal ? KVL_ATTENTION_FLAG_CAUSAL : 0;
        if (window_left >= 0) {
            params.flags |= KVL_ATTENTION_FLAG_WINDOW_LEFT;
            params.window_left = window_left;
        }
        const auto leading = [](const ffi::AnyBuffer &buffer) {
            return buffer.dimensions().first(buffer.dimensions().size() - 3);
        };
        const auto batch = static_cast<std::size_t>(q_view.shape[0]);
        const auto keys = broadcast("k", leading(q), leading(k)), values = broadcast("v", leading(q), leading(v));
        const auto entries = [&](const char *name, const ffi::Buffer<ffi::S32> &buffer) {
            std::vector<std::int32_t> all;
            for (const std::int64_t i : broadcast(name, leading(q), buffer.dimensions())) {
                all.push_back(buffer.typed_data()[i]);
            }
            return all;
        };
        const auto all_lengths = entries("lengths", lengths), all_starts = entries("starts", starts);
        // One call for as many sequences as have their caches at a constant distance, which may be 0.
        for (std::size_t first = 0, end; first < batch; first = end) {
            const auto step = [](const auto &indices, std::size_t i) { return indices[i] - indices[i - 1]; };
            end = first + 1;
            while (end < batch && step(keys, end) >= 0 && step(values, end) >= 0 && step(keys, end) == step(keys, first + 1) &&
                   step(values, end) == step(values, first + 1)) {
                end++;
            }
            const auto part = [&](const kvlane::mutable_view &whole, std::int64_t start, std::int64_t distance) {
                kvlane::mutable_view result = whole;
                const std::int64_t bytes = whole.dtype == KVL_DTYPE_F32 ? 4 : 2;
                result.data = static_cast<char *>(whole.data) + bytes * start * whole.strides[0];
                result.shape[0] = static_cast<std::int64_t>(end - first);
                result.strides[0] = distance * whole.strides[0];
                return result;
            };
            const auto start = static_cast<std::int64_t>(first);
            params.q = part(q_view, start, 1);
            params.k = part(k_view, keys[first], end - first > 1 ? step(keys, first + 1) : 1);
            params.v = part(v_view, values[first], end - first > 1 ? step(values, first + 1) : 1);
            params.out = part(out_view, start, 1);
            params.lengths = all_lengths.data() + first;
            params.kv_starts = all_starts.data() + first;
            kvlane::attention(context(), workspace, params, runner);
        }
    });
}

/// The result is the argument's own memory: XLA has copied it there if somebody else still needs the argument.
void in_place(const ffi::AnyBuffer &argument, const ffi::AnyBuffer &result) {
    if (argument.untyped_data() != result.untyped_data()) {
        throw bad_argument("the cache and the result have different memory: input_output_aliases is missing");
    }
}

ffi::Error update(ffi::ThreadPool pool, ffi::AnyBuffer cache, ffi::AnyBuffer tokens, ffi::Buffer<ffi::S32> positions,
                  ffi::Result<ffi::AnyBuffer> result) {
    return with_runner(pool, [&](const kvl_parallel_runner *runner) {
        in_place(cache, *result);
        kvl_kv_write_params params = KVL_KV_WRITE_PARAMS_INIT;
        params.k = view(tokens);
        params.k_cache = view(cache);
        params.positions = list("positions", positions, params.k.shape[0]);
        kvlane::kv_write(context(), params, runner);
    });
}

ffi::Error write(ffi::ThreadPool pool, ffi::AnyBuffer k_cache, ffi::AnyBuffer v_cache, ffi::AnyBuffer k, ffi::AnyBuffer v,
                 ffi::Buffer<ffi::S32> positions, ffi::Result<ffi::AnyBuffer> k_result, ffi::Result<ffi::AnyBuffer> v_result) {
    return with_runner(pool, [&](const kvl_parallel_runner *runner) {
        in_place(k_cache, *k_result);
        in_place(v_cache, *v_result);
        kvl_kv_write_params params = KVL_KV_WRITE_PARAMS_INIT;
        params.k = view(k);
        params.v = view(v);
        params.k_cache = view(k_cache);
        params.v_cache = view(v_cache);
        params.positions = list("positions", positions, params.k.shape[0]);
        kvlane::kv_write(context(), params, runner);
    });
}

ffi::Error rope(ffi::ThreadPool pool, double base, bool interleaved, std::int64_t rotary_dim, ffi::AnyBuffer x,
                ffi::Buffer<ffi::S32> offsets, ffi::Result<ffi::AnyBuffer> result) {
    return with_runner(pool, [&](const kvl_parallel_runner *runner) {
        kvl_rope_frequencies_params wanted = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
        wanted.rotary_dim = rotary_dim;
        wanted.base = base;
        const kvlane::frequencies frequencies = kvlane::rope_frequencies(wanted);
        kvl_rope_params params = KVL_ROPE_PARAMS_INIT;
        params.pairing = interleaved ? KVL_PAIRING_INTERLEAVED : KVL_PAIRING_HALF_SPLIT;
        params.rotary_dim = rotary_dim;
        params.inv_freq = frequencies.inv_freq.data();
        const kvlane::mutable_view source = view(x);
        params.offsets = list("offsets", offsets, source.shape[0]);
        kvlane::rope(context(), source, view(*result), params, runner);
    });
}

} // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvlane_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("causal")
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<std::int64_t>("window_left")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvlane_update, update,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvlane_write, write,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvlane_rope, rope,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<double>("base")
                                  .Attr<bool>("interleaved")
                                  .Attr<std::int64_t>("rotary_dim")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>());
