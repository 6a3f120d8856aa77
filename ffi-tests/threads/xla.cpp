// Attention as a custom call of XLA, on XLA's threads: compiled and run by `xla.py`.
#include "kvlane.hpp"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// Shapes are [batch, seq, heads, dim]. With `alone`, the calling thread computes.
static ffi::Error attention(ffi::ThreadPool pool, bool alone, ffi::Buffer<ffi::F32> q, ffi::Buffer<ffi::F32> k,
                            ffi::Buffer<ffi::F32> v, ffi::Buffer<ffi::S32> lengths, ffi::ResultBuffer<ffi::F32> out,
                            ffi::ResultBuffer<ffi::S32> scheduled) {
    static const kvlane::context context;
    thread_local kvlane::workspace workspace;
    const auto view = [](auto *data, const auto &dims) {
        kvlane::axes shape{};
        for (std::size_t i = 0; i < 4 && i < dims.size(); i++) {
            shape[i] = dims[i];
        }
        return kvlane::view(data, shape);
    };
    if (q.dimensions().size() != 4 || k.dimensions().size() != 4 || v.dimensions().size() != 4) {
        return ffi::Error::InvalidArgument("q, k and v have four axes");
    }
    if (lengths.element_count() != static_cast<std::size_t>(q.dimensions()[0])) {
        return ffi::Error::InvalidArgument("lengths has an entry per sequence");
    }
    kvl_attention_params params = KVL_ATTENTION_PARAMS_INIT;
    params.q = kvlane::as_const(view(q.typed_data(), q.dimensions()));
    params.k = kvlane::as_const(view(k.typed_data(), k.dimensions()));
    params.v = kvlane::as_const(view(v.typed_data(), v.dimensions()));
    params.out = view(out->typed_data(), out->dimensions());
    params.flags = KVL_ATTENTION_FLAG_CAUSAL;
    params.lengths = lengths.typed_data();
    std::int32_t jobs = 0;
    auto schedule = [&](auto job) {
        jobs++;
        pool.Schedule(std::move(job)); // It takes an rvalue.
    };
    const kvlane::job_queue<decltype(schedule)> queue(static_cast<std::size_t>(pool.num_threads()), schedule);
    try {
        kvlane::attention(context, workspace, params, alone ? nullptr : queue.runner());
    } catch (const kvlane::error &error) {
        return ffi::Error::InvalidArgument(error.what());
    }
    scheduled->typed_data()[0] = jobs;
    return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(kvlane_attention, attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<bool>("alone")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
