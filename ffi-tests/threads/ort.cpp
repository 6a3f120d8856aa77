// Attention as a custom operator of ONNX Runtime, on the threads of the session: compiled and run by `ort.py`.
#include "kvlane.hpp"

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

// Shapes are [batch, seq, heads, dim]. The attribute `threads` is how many tasks may run at once; with 1, the calling thread computes.
struct attention_kernel {
    explicit attention_kernel(const OrtKernelInfo *info)
        : threads(static_cast<std::size_t>(Ort::ConstKernelInfo(info).GetAttribute<std::int64_t>("threads"))) {}

    void Compute(OrtKernelContext *from) {
        const Ort::KernelContext call(from);
        kvl_attention_params params = KVL_ATTENTION_PARAMS_INIT;
        const auto shape = [](const Ort::ConstValue &value) {
            const std::vector<std::int64_t> dims = value.GetTensorTypeAndShapeInfo().GetShape();
            if (dims.size() != 4) {
                ORT_CXX_API_THROW("q, k and v have four axes", ORT_INVALID_ARGUMENT);
            }
            return kvlane::axes{dims[0], dims[1], dims[2], dims[3]};
        };
        const auto input = [&](std::size_t i) {
            const Ort::ConstValue value = call.GetInput(i);
            return kvlane::view(value.GetTensorData<float>(), shape(value));
        };
        params.q = input(0);
        params.k = input(1);
        params.v = input(2);
        const Ort::ConstValue lengths = call.GetInput(3);
        if (lengths.GetTensorTypeAndShapeInfo().GetElementCount() != static_cast<std::size_t>(params.q.shape[0])) {
            ORT_CXX_API_THROW("lengths has an entry per sequence", ORT_INVALID_ARGUMENT);
        }
        params.lengths = lengths.GetTensorData<std::int32_t>();
        params.flags = KVL_ATTENTION_FLAG_CAUSAL;
        const kvlane::axes out = {params.q.shape[0], params.q.shape[1], params.q.shape[2], params.v.shape[3]};
        params.out = kvlane::view(call.GetOutput(0, out.data(), out.size()).GetTensorMutableData<float>(), out);

        std::int32_t loops = 0;
        const auto run = [&](std::size_t n, auto task) {
            loops++;
            // One batch per task, since tasks are as many as threads at most.
            call.ParallelFor([](void *data, std::size_t i) { (*static_cast<decltype(task) *>(data))(i); }, n, n, &task);
        };
        const kvlane::parallel_for<decltype(run)> threads_of_session(threads, run);
        try {
            thread_local kvlane::workspace workspace;
            kvlane::attention(context, workspace, params, threads > 1 ? threads_of_session.runner() : nullptr);
        } catch (const kvlane::error &error) {
            ORT_CXX_API_THROW(error.what(), ORT_INVALID_ARGUMENT);
        }
        const std::int64_t one = 1;
        call.GetOutput(1, &one, 1).GetTensorMutableData<std::int32_t>()[0] = loops;
    }

    kvlane::context context;
    std::size_t threads;
};

struct attention_op : Ort::CustomOpBase<attention_op, attention_kernel> {
    void *CreateKernel(const OrtApi &, const OrtKernelInfo *info) const { return new attention_kernel(info); }
    const char *GetName() const { return "Attention"; }
    std::size_t GetInputTypeCount() const { return 4; }
    ONNXTensorElementDataType GetInputType(std::size_t i) const {
        return i < 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    }
    std::size_t GetOutputTypeCount() const { return 2; }
    ONNXTensorElementDataType GetOutputType(std::size_t i) const {
        return i == 0 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    }
};

extern "C" __attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    Ort::InitApi(base->GetApi(ORT_API_VERSION));
    static const attention_op op;
    static Ort::CustomOpDomain domain{"kvlane"};
    static const bool added = (domain.Add(&op), true);
    static_cast<void>(added);
    return Ort::GetApi().AddCustomOpDomain(options, domain);
}
