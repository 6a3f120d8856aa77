// A library of custom operators for ONNX Runtime: Attention, RotaryEmbedding and TensorScatter of ONNX (opset 23 to 25) and
// GroupQueryAttention of com.microsoft, in the domain `kvlane`, with the inputs, outputs and attributes of the originals, for float,
// float16 and bfloat16, on the threads of the session; the last with caches of integers of eight and four bits too.
//
// The session option `kvlane.threads` says how many tasks an operator may have at once, because a kernel cannot ask for the number of
// threads; by default as many as the machine has CPUs.
#include "kvlane.hpp"

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace {

using dims = std::vector<std::int64_t>;

struct bad_model : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string text(const dims &shape) {
    std::string result = "[";
    for (const std::int64_t n : shape) {
        result += (result.size() > 1 ? ", " : "") + std::to_string(n);
    }
    return result + "]";
}

std::int64_t product(const dims &shape, std::size_t first, std::size_t end) {
    std::int64_t result = 1;
    for (std::size_t i = first; i < end; i++) {
        result *= shape[i];
    }
    return result;
}

kvl_dtype dtype(ONNXTensorElementDataType type) {
    switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
        return KVL_DTYPE_F32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
        return KVL_DTYPE_F16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
        return KVL_DTYPE_BF16;
    default:
        throw bad_model("tensors are float, float16 or bfloat16");
    }
}

std::size_t width(kvl_dtype type) {
    return type == KVL_DTYPE_F32 ? 4 : type == KVL_FORMAT_AFFINE8 || type == KVL_FORMAT_AFFINE4 ? 1 : 2;
}

/// An input or an output.
struct tensor {
    void *data;
    ONNXTensorElementDataType type;
    dims shape;

    std::size_t bytes() const { return static_cast<std::size_t>(product(shape, 0, shape.size())) * width(dtype(type)); }

    template <class T> const T *as() const { return static_cast<const T *>(data); }
};

/// A tensor of the given axes, at an element of another.
kvlane::mutable_view view(void *data, kvl_dtype type, const kvlane::axes &shape, const kvlane::axes &strides,
                          std::int64_t element = 0) {
    kvlane::mutable_view result;
    result.data = static_cast<char *>(data) + element * static_cast<std::int64_t>(width(type));
    result.dtype = type;
    std::copy(shape.begin(), shape.end(), result.shape);
    std::copy(strides.begin(), strides.end(), result.strides);
    return result;
}

/// [batch, heads, seq, dim] or [batch, seq, heads * dim].
kvlane::mutable_view by_heads(const char *name, const tensor &t, std::int64_t heads) {
    const dims &n = t.shape;
    if (n.size() == 4) {
        return view(t.data, dtype(t.type), {n[0], n[2], n[1], n[3]}, {n[1] * n[2] * n[3], n[3], n[2] * n[3], 1});
    }
    if (n.size() != 3 || heads < 1 || n[2] % heads != 0) {
        throw bad_model(std::string(name) + " of shape " + text(n) + " is not [batch, seq, heads * dim] of " +
                        std::to_string(heads) + " heads");
    }
    const std::int64_t dim = n[2] / heads;
    return view(t.data, dtype(t.type), {n[0], n[1], heads, dim}, {n[1] * n[2], n[2], dim, 1});
}

float number(const tensor &t, std::int64_t i) {
    switch (dtype(t.type)) {
    case KVL_DTYPE_F32:
        return t.as<float>()[i];
    case KVL_DTYPE_F16:
        return t.as<Ort::Float16_t>()[i].ToFloat();
    default:
        return t.as<Ort::BFloat16_t>()[i].ToFloat();
    }
}

/// Positions and lengths of ONNX are int64.
std::int32_t int32(std::int64_t x) {
    if (x < INT32_MIN || x > INT32_MAX) {
        throw bad_model("a position or length of " + std::to_string(x));
    }
    return static_cast<std::int32_t>(x);
}

/// What an operator of this library is given: a call, and the threads.
class call {
public:
    call(OrtKernelContext *context, std::size_t threads) : context_(context), run_{&context_}, runner_(threads, run_) {}

    /// The number in an input of one entry.
    std::int64_t integer(const char *name, const tensor &t) const {
        if (product(t.shape, 0, t.shape.size()) != 1) {
            throw bad_model(std::string(name) + " has the shape " + text(t.shape) + ", not one entry");
        }
        return t.as<std::int32_t>()[0];
    }

    /// Null if it is absent.
    std::optional<tensor> input(std::size_t i) const {
        if (i >= context_.GetInputCount()) {
            return {};
        }
        const Ort::ConstValue value = context_.GetInput(i);
        if (value == nullptr) {
            return {};
        }
        const auto info = value.GetTensorTypeAndShapeInfo();
        return tensor{const_cast<void *>(value.GetTensorRawData()), info.GetElementType(), info.GetShape()};
    }

    std::optional<tensor> output(std::size_t i, const dims &shape) const {
        if (i >= context_.GetOutputCount()) {
            return {};
        }
        Ort::UnownedValue value = context_.GetOutput(i, shape);
        if (value == nullptr) {
            return {};
        }
        return tensor{value.GetTensorMutableRawData(), value.GetTensorTypeAndShapeInfo().GetElementType(), shape};
    }

    const kvl_parallel_runner *runner() const { return runner_.runner(); }

private:
    struct loop {
        const Ort::KernelContext *context;

        void operator()(std::size_t n, kvlane::task task) const {
            // One batch per task, since tasks are as many as threads at most.
            context->ParallelFor([](void *data, std::size_t i) { (*static_cast<kvlane::task *>(data))(i); }, n, n, &task);
        }
    };

    Ort::KernelContext context_;
    loop run_;
    kvlane::parallel_for<loop> runner_;
};

/// Of a node, with the defaults of the operator.
class attributes {
public:
    explicit attributes(const OrtKernelInfo *info) : info_(info) {}

    std::int64_t integer(const char *name, std::int64_t absent) const {
        std::int64_t value = absent;
        return given(Ort::GetApi().KernelInfoGetAttribute_int64(info_, name, &value)) ? value : absent;
    }

    float real(const char *name, float absent) const {
        float value = absent;
        return given(Ort::GetApi().KernelInfoGetAttribute_float(info_, name, &value)) ? value : absent;
    }

    std::string word(const char *name, const char *absent) const {
        char value[32] = "";
        std::size_t size = sizeof value;
        return given(Ort::GetApi().KernelInfoGetAttribute_string(info_, name, value, &size)) ? value : absent;
    }

    std::size_t outputs() const { return Ort::ConstKernelInfo(info_).GetOutputCount(); }

private:
    static bool given(OrtStatus *status) { return Ort::Status(status).IsOK(); }

    const OrtKernelInfo *info_;
};

/// Memory of a thread that calls operators.
struct scratch {
    kvlane::workspace workspace;
    std::vector<char> bytes[3];

    static scratch &here() {
        thread_local scratch own;
        return own;
    }

    void *get(std::size_t which, std::size_t size) {
        // Aligned to more than an element already.
        bytes[which].resize(std::max(bytes[which].size(), size));
        return bytes[which].data();
    }
};

const kvlane::context &context() {
    static const kvlane::context made;
    return made;
}

/// A rotation by the rows of cosines and sines that a call needs.
struct rotation {
    std::vector<float> cos, sin;
    std::vector<std::int32_t> positions;
    kvl_rope_params params = KVL_ROPE_PARAMS_INIT;

    /// `rows` are those of the tables for every token.
    rotation(const tensor &cosines, const tensor &sines, const std::vector<std::int64_t> &rows, bool interleaved) {
        if (cosines.shape.empty()) {
            throw bad_model("cosines have no axis");
        }
        const std::int64_t half = cosines.shape.back(), tables = product(cosines.shape, 0, cosines.shape.size() - 1);
        if (sines.shape != cosines.shape) {
            throw bad_model("cosines have the shape " + text(cosines.shape) + ", sines " + text(sines.shape));
        }
        for (const std::int64_t row : rows) {
            if (row < 0 || row >= tables) {
                throw bad_model("position " + std::to_string(row) + " of tables with " + std::to_string(tables) + " rows");
            }
            for (std::int64_t i = 0; i < half; i++) {
                cos.push_back(number(cosines, row * half + i));
                sin.push_back(number(sines, row * half + i));
            }
            positions.push_back(static_cast<std::int32_t>(positions.size()));
        }
        params.pairing = interleaved ? KVL_PAIRING_INTERLEAVED : KVL_PAIRING_HALF_SPLIT;
        params.rotary_dim = 2 * half;
        params.cos = cos.data();
        params.sin = sin.data();
        params.table_rows = static_cast<std::int64_t>(rows.size());
        params.positions = positions.data();
    }
};

/// Keys, and values.
struct pair {
    kvlane::mutable_view k, v;
};

/// Writes tokens into caches, from the position of each sequence on.
void write(const call &call, const pair &tokens, const pair &caches, const std::vector<std::int32_t> &positions,
           const std::vector<std::int32_t> *counts = nullptr, const kvl_rope_params *rope = nullptr,
           const kvl_cache_scales *scales = nullptr) {
    if (tokens.k.shape[1] == 0) {
        return;
    }
    kvl_kv_write_params params = KVL_KV_WRITE_PARAMS_INIT;
    params.k = tokens.k;
    params.v = tokens.v;
    params.k_cache = caches.k;
    params.v_cache = caches.v;
    params.positions = positions.data();
    params.counts = counts == nullptr ? nullptr : counts->data();
    params.rope = rope;
    params.scales = scales;
    kvlane::kv_write(context(), params, call.runner());
}

/// A mask or bias, [batch, heads, seq, keys] or the last axes of that, as kvlane's axes. Axes of one entry broadcast.
void aligned(const dims &shape, std::int64_t (&axes)[4], std::int64_t (&strides)[4]) {
    if (shape.size() > 4) {
        throw bad_model("a mask of shape " + text(shape));
    }
    dims n(4, 1);
    std::copy(shape.begin(), shape.end(), n.end() - static_cast<std::ptrdiff_t>(shape.size()));
    const std::int64_t s[] = {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1};
    for (const auto &[to, from] : {std::pair{0, 0}, {1, 2}, {2, 1}, {3, 3}}) {
        axes[to] = n[static_cast<std::size_t>(from)];
        strides[to] = s[from];
    }
}

void set_mask(kvl_attention_params &params, const tensor &mask) {
    if (mask.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL) {
        params.mask.data = mask.as<std::uint8_t>();
        aligned(mask.shape, params.mask.shape, params.mask.strides);
    } else {
        params.bias.data = mask.data;
        params.bias.dtype = dtype(mask.type);
        aligned(mask.shape, params.bias.shape, params.bias.strides);
    }
}

/// ONNX: Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen; Y, present_key, present_value.
struct attention {
    static constexpr const char *name = "Attention";
    static constexpr std::size_t inputs = 7, required = 3, outputs = 3, required_outputs = 1;
    static constexpr bool quantizes = false;

    explicit attention(const attributes &a)
        : q_heads(a.integer("q_num_heads", 0)), kv_heads(a.integer("kv_num_heads", 0)), scale(a.real("scale", 0)),
          softcap(a.real("softcap", 0)), causal(a.integer("is_causal", 0) != 0), left(a.integer("left_window_size", -1)),
          right(a.integer("right_window_size", -1)) {}

    static ONNXTensorElementDataType input_type(std::size_t i, ONNXTensorElementDataType type) {
        return i == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED : i == 6 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : type;
    }

    void compute(const call &call) const {
        const tensor q_tensor = *call.input(0), k_tensor = *call.input(1), v_tensor = *call.input(2);
        const auto mask = call.input(3), past_k = call.input(4), past_v = call.input(5), nonpad = call.input(6);
        const auto q = by_heads("Q", q_tensor, q_heads);
        pair keys{by_heads("K", k_tensor, kv_heads), by_heads("V", v_tensor, kv_heads)};
        const std::int64_t batch = q.shape[0], seq = q.shape[1], new_keys = keys.k.shape[1];
        if (past_k.has_value() != past_v.has_value()) {
            throw bad_model("past_key and past_value come together");
        }
        const std::int64_t past = past_k ? past_k->shape.at(2) : 0;
        const auto shape = [&](const kvlane::mutable_view &x) { return dims{batch, x.shape[2], past + new_keys, x.shape[3]}; };
        auto present_k = call.output(1, shape(keys.k)), present_v = call.output(2, shape(keys.v));
        if (past_k || present_k || present_v) {
            // Where the model does not want one of them, attention still reads it.
            const auto make = [&](std::optional<tensor> &present, const kvlane::mutable_view &x, std::size_t which) {
                if (!present) {
                    present = tensor{nullptr, which == 0 ? k_tensor.type : v_tensor.type, shape(x)};
                    present->data = scratch::here().get(which, present->bytes());
                }
            };
            make(present_k, keys.k, 0);
            make(present_v, keys.v, 1);
            const pair caches{by_heads("present_key", *present_k, 0), by_heads("present_value", *present_v, 0)};
            const std::vector<std::int32_t> start(static_cast<std::size_t>(batch)),
                end(static_cast<std::size_t>(batch), int32(past));
            if (past_k) {
                write(call, {by_heads("past_key", *past_k, 0), by_heads("past_value", *past_v, 0)}, caches, start);
            }
            write(call, keys, caches, end);
            keys = caches;
        }

        kvl_attention_params params = KVL_ATTENTION_PARAMS_INIT;
        params.q = q;
        params.k = keys.k;
        params.v = keys.v;
        params.scale = scale;
        params.softcap = softcap;
        params.flags = causal ? KVL_ATTENTION_FLAG_CAUSAL : 0;
        if (left >= 0) {
            params.flags |= KVL_ATTENTION_FLAG_WINDOW_LEFT;
            params.window_left = left;
        }
        if (right >= 0) {
            params.flags |= KVL_ATTENTION_FLAG_WINDOW_RIGHT;
            params.window_right = right;
        }
        // Queries stand behind the past, or at the end of the keys that are not padding. Keys beyond a shorter mask are masked.
        std::vector<std::int32_t> lengths(static_cast<std::size_t>(batch), int32(past + new_keys)),
            offsets(lengths.size(), int32(past));
        if (nonpad && nonpad->shape != dims{batch}) {
            throw bad_model("nonpad_kv_seqlen has the shape " + text(nonpad->shape) + " for a batch of " + std::to_string(batch));
        }
        for (std::size_t b = 0; b < lengths.size(); b++) {
            if (nonpad) {
                lengths[b] = int32(nonpad->as<std::int64_t>()[b]);
                offsets[b] = int32(lengths[b] - seq);
            }
            if (mask && !mask->shape.empty()) {
                lengths[b] = int32(std::min<std::int64_t>(lengths[b], mask->shape.back() == 1 ? lengths[b] : mask->shape.back()));
            }
        }
        params.lengths = lengths.data();
        params.offsets = offsets.data();
        if (mask) {
            set_mask(params, *mask);
        }
        const std::int64_t v_dim = keys.v.shape[3];
        const bool flat = q_tensor.shape.size() == 3;
        const tensor y = *call.output(0, flat ? dims{batch, seq, q.shape[2] * v_dim} : dims{batch, q.shape[2], seq, v_dim});
        params.out = by_heads("Y", y, q.shape[2]);
        kvlane::attention(context(), scratch::here().workspace, params, call.runner());
    }

    static constexpr std::array<std::array<int, 2>, 0> in_place{};
    std::int64_t q_heads, kv_heads;
    float scale, softcap;
    bool causal;
    std::int64_t left, right;
};

/// ONNX: X, cos_cache, sin_cache, position_ids; Y.
struct rotary_embedding {
    static constexpr const char *name = "RotaryEmbedding";
    static constexpr std::size_t inputs = 4, required = 3, outputs = 1, required_outputs = 1;
    static constexpr bool quantizes = false;

    explicit rotary_embedding(const attributes &a)
        : heads(a.integer("num_heads", 0)), rotary_dim(a.integer("rotary_embedding_dim", 0)),
          interleaved(a.integer("interleaved", 0) != 0) {}

    static ONNXTensorElementDataType input_type(std::size_t i, ONNXTensorElementDataType type) {
        return i == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : type;
    }

    void compute(const call &call) const {
        const tensor x = *call.input(0), cos = *call.input(1), sin = *call.input(2);
        const auto ids = call.input(3);
        const auto source = by_heads("X", x, heads);
        // Without positions, the tables have a row for every token.
        std::vector<std::int64_t> rows(static_cast<std::size_t>(source.shape[0] * source.shape[1]));
        if (ids && ids->shape != dims{source.shape[0], source.shape[1]}) {
            throw bad_model("position_ids has the shape " + text(ids->shape) + " for X of " + text(x.shape));
        }
        for (std::size_t i = 0; i < rows.size(); i++) {
            rows[i] = ids ? ids->as<std::int64_t>()[i] : static_cast<std::int64_t>(i);
        }
        const rotation rotation(cos, sin, rows, interleaved);
        if (rotary_dim != 0 && rotary_dim != rotation.params.rotary_dim) {
            throw bad_model("rotary_embedding_dim is " + std::to_string(rotary_dim) + ", but the tables are for " +
                            std::to_string(rotation.params.rotary_dim));
        }
        const tensor y = *call.output(0, x.shape);
        kvlane::rope(context(), source, by_heads("Y", y, heads), rotation.params, call.runner());
    }

    static constexpr std::array<std::array<int, 2>, 1> in_place{{{0, 0}}};
    std::int64_t heads, rotary_dim;
    bool interleaved;
};

/// ONNX: past_cache, update, write_indices; present_cache.
struct tensor_scatter {
    static constexpr const char *name = "TensorScatter";
    static constexpr std::size_t inputs = 3, required = 2, outputs = 1, required_outputs = 1;
    static constexpr bool quantizes = false;

    explicit tensor_scatter(const attributes &a)
        : axis(a.integer("axis", -2)), circular(a.word("mode", "linear") == "circular") {}

    static ONNXTensorElementDataType input_type(std::size_t i, ONNXTensorElementDataType type) {
        return i == 2 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 : type;
    }

    /// The axes before `axis` but for the batch are heads, and those after it a head's elements.
    static kvlane::mutable_view by_axis(const tensor &t, std::size_t at) {
        const std::int64_t seq = t.shape[at], last = product(t.shape, at + 1, t.shape.size()), outer = product(t.shape, 1, at);
        if (outer == 1 && at + 2 < t.shape.size()) {
            const std::int64_t dim = t.shape.back();
            return view(t.data, dtype(t.type), {t.shape[0], seq, last / dim, dim}, {seq * last, last, dim, 1});
        }
        return view(t.data, dtype(t.type), {t.shape[0], seq, outer, last}, {outer * seq * last, last, seq * last, 1});
    }

    void compute(const call &call) const {
        const tensor past = *call.input(0), update = *call.input(1);
        const auto indices = call.input(2);
        const auto rank = static_cast<std::int64_t>(past.shape.size()), from_front = axis < 0 ? axis + rank : axis;
        if (from_front < 1 || from_front >= rank || update.shape.size() != past.shape.size()) {
            throw bad_model("axis " + std::to_string(axis) + " of past_cache " + text(past.shape) + " and update " +
                            text(update.shape));
        }
        const auto at = static_cast<std::size_t>(from_front);
        const tensor present = *call.output(0, past.shape);
        if (present.data != past.data) {
            std::memcpy(present.data, past.data, past.bytes());
        }
        kvl_kv_write_params params = KVL_KV_WRITE_PARAMS_INIT;
        params.k = by_axis(update, at);
        params.k_cache = by_axis(present, at);
        const std::int64_t batch = past.shape[0], seq = update.shape[at], capacity = past.shape[at];
        if (indices && indices->shape != dims{batch}) {
            throw bad_model("write_indices has the shape " + text(indices->shape) + " for a batch of " + std::to_string(batch));
        }
        std::vector<std::int32_t> positions, slots;
        for (std::int64_t b = 0; b < batch; b++) {
            positions.push_back(indices ? int32(indices->as<std::int64_t>()[b]) : 0);
            for (std::int64_t s = 0; circular && s < seq; s++) {
                slots.push_back(int32((positions.back() + s) % capacity));
            }
        }
        (circular ? params.slots : params.positions) = circular ? slots.data() : positions.data();
        kvlane::kv_write(context(), params, call.runner());
    }

    static constexpr std::array<std::array<int, 2>, 1> in_place{{{0, 0}}};
    std::int64_t axis;
    bool circular;
};

/// com.microsoft: query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache, position_ids,
/// attention_bias, head_sink, k_scale, v_scale; output, present_key, present_value. Without key and value, query has all three.
struct group_query_attention {
    static constexpr const char *name = "GroupQueryAttention";
    static constexpr std::size_t inputs = 14, required = 1, outputs = 3, required_outputs = 3;
    static constexpr bool quantizes = true;

    explicit group_query_attention(const attributes &a)
        : heads(a.integer("num_heads", 0)), kv_heads(a.integer("kv_num_heads", 0)), window(a.integer("local_window_size", -1)),
          scale(a.real("scale", 0)), softcap(a.real("softcap", 0)), rotary(a.integer("do_rotary", 0) != 0),
          interleaved(a.integer("rotary_interleaved", 0) != 0), smooth(a.integer("smooth_softmax", 0) == 1),
          bits(a.integer("kv_cache_bit_width", 0)), quant{a.word("k_quant_type", "NONE"), a.word("v_quant_type", "NONE")} {
        if (heads < 1 || kv_heads < 1) {
            throw bad_model("num_heads and kv_num_heads are at least 1");
        }
        if (a.integer("qk_output", 0) != 0 || a.integer("sliding_window_cache", 0) != 0) {
            throw bad_model("GroupQueryAttention of kvlane has whole caches, and no output of scores");
        }
        for (const std::string &of : quant) {
            if (bits == 0 ? of != "NONE" : (bits != 8 && bits != 4) || (of != "PER_TENSOR" && of != "PER_CHANNEL")) {
                throw bad_model("k_quant_type and v_quant_type are PER_TENSOR or PER_CHANNEL, with a kv_cache_bit_width of 8 or 4, "
                                "or NONE without one; here " + of + " and " + std::to_string(bits));
            }
        }
    }

    static ONNXTensorElementDataType input_type(std::size_t i, ONNXTensorElementDataType type) {
        return i == 5 || i == 6 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
               : i == 9         ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
               : i >= 12        ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                                : type;
    }

    /// A cache, whose integers of four bits lie two in a byte.
    kvlane::mutable_view cache(const char *name_of, const tensor &t, std::int64_t dim) const {
        const auto wanted = bits == 8   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8
                            : bits == 4 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                                        : ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
        const bool integers = t.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 || t.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
        if (integers ? t.type != wanted : bits != 0) {
            throw bad_model(std::string(name_of) + " is not of the type that kv_cache_bit_width = " + std::to_string(bits) + " has");
        }
        if (!integers) {
            return by_heads(name_of, t, 0);
        }
        const dims &n = t.shape;
        if (n.size() != 4 || n[3] * 8 != dim * bits) {
            throw bad_model(std::string(name_of) + " of shape " + text(n) + " has not " + std::to_string(bits) +
                            " bits for each of " + std::to_string(dim) + " elements");
        }
        return view(t.data, bits == 8 ? KVL_FORMAT_AFFINE8 : KVL_FORMAT_AFFINE4, {n[0], n[2], n[1], dim},
                    {n[1] * n[2] * n[3], n[3], n[2] * n[3], 1});
    }

    /// One scale, or one for each channel of each head.
    kvl_view scales_of(const char *name_of, const std::optional<tensor> &t, const std::string &of, std::int64_t dim) const {
        const std::int64_t n = of == "PER_CHANNEL" ? kv_heads * dim : 1;
        if (!t || product(t->shape, 0, t->shape.size()) != n) {
            throw bad_model(std::string(name_of) + (t ? " of shape " + text(t->shape) : " is absent and") + " has not " +
                            std::to_string(n) + " scales, as " + of + " asks");
        }
        return view(t->data, KVL_DTYPE_F32, {1, 1, n == 1 ? 1 : kv_heads, n == 1 ? 1 : dim}, {n, n, n == 1 ? 1 : dim, 1});
    }

    void compute(const call &call) const {
        const tensor query = *call.input(0);
        const auto key = call.input(1), value = call.input(2), past_k = call.input(3), past_v = call.input(4),
                   seqlens = call.input(5), total = call.input(6), cos = call.input(7), sin = call.input(8), ids = call.input(9),
                   bias = call.input(10), sink = call.input(11), k_scale = call.input(12), v_scale = call.input(13);
        if (query.shape.size() != 3 || !seqlens || !total || key.has_value() != value.has_value() ||
            past_k.has_value() != past_v.has_value()) {
            throw bad_model(
                "query has three axes; seqlens_k and total_sequence_length are there; key and value, and past_key and "
                "past_value, come together");
        }
        const std::int64_t batch = query.shape[0], seq = query.shape[1];
        kvlane::mutable_view q;
        pair tokens;
        if (key) {
            q = by_heads("query", query, heads);
            tokens = {by_heads("key", *key, kv_heads), by_heads("value", *value, kv_heads)};
        } else {
            const auto packed = by_heads("query", query, heads + 2 * kv_heads);
            const auto part = [&](std::int64_t first, std::int64_t count) {
                const std::int64_t dim = packed.shape[3];
                return view(query.data, dtype(query.type), {batch, seq, count, dim},
                            {seq * query.shape[2], query.shape[2], dim, 1}, first * dim);
            };
            q = part(0, heads);
            tokens = {part(heads, kv_heads), part(heads + kv_heads, kv_heads)};
        }
        const std::int64_t dim = q.shape[3], all = call.integer("total_sequence_length", *total),
                           held = past_k ? past_k->shape.at(2) : 0;
        if (product(seqlens->shape, 0, seqlens->shape.size()) != batch || all < seq) {
            throw bad_model("seqlens_k has the shape " + text(seqlens->shape) + " for a batch of " + std::to_string(batch) +
                            ", and of " + std::to_string(all) + " tokens " + std::to_string(seq) + " are new");
        }
        if (ids && ids->shape != dims{batch, seq}) {
            throw bad_model("position_ids has the shape " + text(ids->shape) + " for a query of " + text(query.shape));
        }
        if (sink && product(sink->shape, 0, sink->shape.size()) != heads) {
            throw bad_model("head_sink has the shape " + text(sink->shape) + " for " + std::to_string(heads) + " heads");
        }
        // A first prompt may be padded on the right; its queries stand at the start all the same.
        std::vector<std::int32_t> start(static_cast<std::size_t>(batch)), before(start.size()), lengths(start.size());
        std::vector<std::int64_t> rows;
        for (std::size_t b = 0; b < before.size(); b++) {
            before[b] = all == seq ? 0 : int32(seqlens->as<std::int32_t>()[b] + std::int64_t{1} - seq);
            lengths[b] = int32(before[b] + seq);
            if (before[b] < 0 || lengths[b] > std::max(held, all)) {
                throw bad_model("sequence " + std::to_string(b) + " has " + std::to_string(lengths[b]) + " tokens, of which " +
                                std::to_string(seq) + " are new, but the cache holds " + std::to_string(std::max(held, all)));
            }
            for (std::int64_t s = 0; s < seq; s++) {
                rows.push_back(ids ? ids->as<std::int64_t>()[static_cast<std::int64_t>(b) * seq + s] : before[b] + s);
            }
        }

        const dims shape = {batch, kv_heads, std::max(held, all), bits == 0 ? dim : dim * bits / 8};
        const tensor present_k = *call.output(1, shape), present_v = *call.output(2, shape);
        const pair caches{cache("present_key", present_k, dim), cache("present_value", present_v, dim)};
        kvl_cache_scales scales = KVL_CACHE_SCALES_INIT;
        if (bits != 0) {
            scales.k = scales_of("k_scale", k_scale, quant[0], dim);
            scales.v = scales_of("v_scale", v_scale, quant[1], dim);
            scales.k_affine = scales.v_affine = KVL_AFFINE_FIXED + (bits == 8 ? KVL_AFFINE_SIGNED : KVL_AFFINE_OFFSET);
        }
        const bool shared = past_k && past_k->data == present_k.data && past_v->data == present_v.data;
        if (!shared) {
            const auto row = static_cast<std::size_t>(shape[3]) * width(caches.k.dtype);
            if (past_k && bits == 0) {
                write(call, {by_heads("past_key", *past_k, 0), by_heads("past_value", *past_v, 0)}, caches, start, &before);
            } else if (past_k) {
                const auto copy = [&](const char *name_of, const tensor &past, const tensor &present) {
                    cache(name_of, past, dim);
                    if (past.shape[0] != batch || past.shape[1] != kv_heads) {
                        throw bad_model(std::string(name_of) + " has the shape " + text(past.shape) + " for present ones of " +
                                        text(shape));
                    }
                    for (std::int64_t i = 0; i < batch * kv_heads; i++) {
                        const std::int64_t tokens = std::min<std::int64_t>(before[static_cast<std::size_t>(i / kv_heads)], past.shape[2]);
                        std::memcpy(static_cast<char *>(present.data) + static_cast<std::size_t>(i * shape[2]) * row,
                                    static_cast<const char *>(past.data) + static_cast<std::size_t>(i * past.shape[2]) * row,
                                    static_cast<std::size_t>(tokens) * row);
                    }
                };
                copy("past_key", *past_k, present_k);
                copy("past_value", *past_v, present_v);
            }
            for (const tensor *present : {&present_k, &present_v}) {
                for (std::int64_t i = 0; i < batch * kv_heads; i++) {
                    const std::int64_t length = lengths[static_cast<std::size_t>(i / kv_heads)], capacity = shape[2];
                    std::memset(static_cast<char *>(present->data) + static_cast<std::size_t>(i * capacity + length) * row, 0,
                                static_cast<std::size_t>(capacity - length) * row);
                }
            }
        }
        std::optional<rotation> rotate;
        if (rotary) {
            if (!cos || !sin) {
                throw bad_model("do_rotary takes cos_cache and sin_cache");
            }
            rotate.emplace(*cos, *sin, rows, interleaved);
            void *rotated = scratch::here().get(2, static_cast<std::size_t>(batch * seq * heads * dim) * width(q.dtype));
            const auto to = view(rotated, q.dtype, {batch, seq, heads, dim}, {seq * heads * dim, heads * dim, dim, 1});
            kvlane::rope(context(), q, to, rotate->params, call.runner());
            q = to;
        }
        write(call, tokens, caches, before, nullptr, rotate ? &rotate->params : nullptr, bits == 0 ? nullptr : &scales);

        kvl_attention_params params = KVL_ATTENTION_PARAMS_INIT;
        params.q = q;
        params.k = caches.k;
        params.v = caches.v;
        params.scales = bits == 0 ? nullptr : &scales;
        params.scale = scale;
        params.softcap = softcap;
        params.flags = KVL_ATTENTION_FLAG_CAUSAL;
        if (window >= 1) {
            // Of ONNX Runtime's window, the query's own key is one.
            params.flags |= KVL_ATTENTION_FLAG_WINDOW_LEFT;
            params.window_left = window - 1;
        }
        params.lengths = lengths.data();
        if (bias) {
            set_mask(params, *bias);
        }
        std::vector<float> sinks;
        for (std::int64_t h = 0; (smooth || sink) && h < heads; h++) {
            sinks.push_back(sink ? number(*sink, h) : 0);
        }
        params.sink_logits = sinks.empty() ? nullptr : sinks.data();
        const tensor out = *call.output(0, {batch, seq, heads * dim});
        params.out = by_heads("output", out, heads);
        kvlane::attention(context(), scratch::here().workspace, params, call.runner());
    }

    static constexpr std::array<std::array<int, 2>, 2> in_place{{{3, 1}, {4, 2}}};
    std::int64_t heads, kv_heads, window;
    float scale, softcap;
    bool rotary, interleaved, smooth;
    std::int64_t bits;
    std::string quant[2];
};

OrtStatusPtr failed(const std::exception &error) { return Ort::GetApi().CreateStatus(ORT_INVALID_ARGUMENT, error.what()); }

template <class Operator> struct kernel {
    OrtStatusPtr ComputeV2(OrtKernelContext *context) {
        try {
            of.compute(call(context, threads));
            return nullptr;
        } catch (const std::exception &error) {
            return failed(error);
        }
    }

    Operator of;
    std::size_t threads;
};

/// An operator for one type, and one of caches if it quantises them.
template <class Operator> struct custom_op : Ort::CustomOpBase<custom_op<Operator>, kernel<Operator>, true> {
    custom_op(ONNXTensorElementDataType type_of_tensors, ONNXTensorElementDataType type_of_caches, std::size_t number_of_threads)
        : type(type_of_tensors), cache(type_of_caches), threads(number_of_threads) {
        // Where ONNX Runtime may give an output the memory of an input.
        if constexpr (!Operator::in_place.empty()) {
            OrtCustomOp::GetMayInplace = [](int **from, int **to) {
                *from = new int[Operator::in_place.size()];
                *to = new int[Operator::in_place.size()];
                for (std::size_t i = 0; i < Operator::in_place.size(); i++) {
                    (*from)[i] = Operator::in_place[i][0];
                    (*to)[i] = Operator::in_place[i][1];
                }
                return Operator::in_place.size();
            };
            OrtCustomOp::ReleaseMayInplace = [](int *from, int *to) {
                delete[] from;
                delete[] to;
            };
        }
    }

    OrtStatusPtr CreateKernelV2(const OrtApi &, const OrtKernelInfo *info, void **made) const {
        try {
            const attributes a(info);
            *made = new kernel<Operator>{Operator(a), threads};
            return nullptr;
        } catch (const std::exception &error) {
            return failed(error);
        }
    }

    const char *GetName() const { return Operator::name; }
    std::size_t GetInputTypeCount() const { return Operator::inputs; }
    ONNXTensorElementDataType GetInputType(std::size_t i) const {
        return Operator::quantizes && is(i, 0) ? cache : Operator::input_type(i, type);
    }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(std::size_t i) const {
        return i < Operator::required ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }
    std::size_t GetOutputTypeCount() const { return Operator::outputs; }
    ONNXTensorElementDataType GetOutputType(std::size_t i) const { return Operator::quantizes && is(i, 1) ? cache : type; }
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(std::size_t i) const {
        return i < Operator::required_outputs ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    }

    /// Whether an input (0) or output (1) is a cache that may be updated in place.
    static bool is(std::size_t i, std::size_t which) {
        const auto &pairs = Operator::in_place;
        return std::any_of(pairs.begin(), pairs.end(), [&](const auto &of) { return of[which] == static_cast<int>(i); });
    }

    ONNXTensorElementDataType type, cache;
    std::size_t threads;
};

template <class Operator> struct types {
    explicit types(std::size_t threads) {
        for (const auto type : {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
                                ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16}) {
            for (const auto cache : {type, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8}) {
                if (cache == type || Operator::quantizes) {
                    of.push_back(std::make_unique<custom_op<Operator>>(type, cache, threads));
                }
            }
        }
    }

    void add(Ort::CustomOpDomain &domain) const {
        for (const auto &op : of) {
            domain.Add(op.get());
        }
    }

    std::vector<std::unique_ptr<custom_op<Operator>>> of;
};

/// What lives as long as the library, for each number of threads.
struct operators {
    explicit operators(std::size_t number) : threads(number), a(number), r(number), t(number), g(number) {
        a.add(domain);
        r.add(domain);
        t.add(domain);
        g.add(domain);
    }

    std::size_t threads;
    Ort::CustomOpDomain domain{"kvlane"};
    types<attention> a;
    types<rotary_embedding> r;
    types<tensor_scatter> t;
    types<group_query_attention> g;
};

} // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus *RegisterCustomOps(OrtSessionOptions *options,
                                                                               const OrtApiBase *base) {
    Ort::InitApi(base->GetApi(ORT_API_VERSION));
    try {
        static std::mutex mutex;
        static std::vector<std::unique_ptr<operators>> all;
        const std::string given = Ort::UnownedSessionOptions(options).GetConfigEntryOrDefault("kvlane.threads", "0");
        const std::size_t asked = static_cast<std::size_t>(std::stoul(given));
        const std::size_t threads = asked == 0 ? std::max(1u, std::thread::hardware_concurrency()) : asked;
        const std::lock_guard<std::mutex> lock(mutex);
        auto found = std::find_if(all.begin(), all.end(), [&](const auto &of) { return of->threads == threads; });
        if (found == all.end()) {
            found = all.insert(all.end(), std::make_unique<operators>(threads));
        }
        return Ort::GetApi().AddCustomOpDomain(options, (*found)->domain);
    } catch (const std::exception &error) {
        return failed(error);
    }
}
