// Attention of kvlane as a custom operator of ggml, on ggml's threads and over its tensors: K and V in f16, the mask in f16 that
// ggml adds to logits. Compared with ggml_flash_attn_ext and with f64, and timed in turns with the former.
//
//     kvlane_ggml          compares
//     kvlane_ggml time     times, on as many threads as the machine has CPUs
#include "kvlane.hpp"

#include "ggml-cpu.h"
#include "ggml.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

namespace {

/// What outlives the graph: one for all layers, since ggml computes one node at a time.
struct attention_op {
    kvlane::context context;
    kvlane::workspace workspace;
    kvlane::team team{64};
    // Parameters that are no tensors.
    float scale = 0, softcap = 0;
    // A custom operator cannot fail: the caller looks here after ggml_graph_compute.
    kvl_status status = KVL_STATUS_OK;
    std::string error;
    int calls = 0, most_threads = 0;
};

kvl_dtype dtype(const ggml_tensor *t) {
    return t->type == GGML_TYPE_F32    ? KVL_DTYPE_F32
           : t->type == GGML_TYPE_F16  ? KVL_DTYPE_F16
           : t->type == GGML_TYPE_BF16 ? KVL_DTYPE_BF16
                                       : -1;
}

/// ggml's axes are dim first; `seq` and `heads` say which of its axes these are.
kvlane::mutable_view view(const ggml_tensor *t, int seq, int heads) {
    kvlane::mutable_view result;
    result.data = t->data;
    result.dtype = dtype(t);
    const int axes[] = {3, seq, heads, 0};
    for (int i = 0; i < 4; i++) {
        result.shape[i] = t->ne[axes[i]];
        result.strides[i] = static_cast<std::int64_t>(t->nb[axes[i]] / ggml_type_size(t->type));
    }
    return result;
}

/// The operator: q, k, v, then the mask and sinks where there are any, as ggml_flash_attn_ext takes them.
void attention(ggml_tensor *dst, int ith, int nth, void *userdata) {
    auto &op = *static_cast<attention_op *>(userdata);
    const kvl_status status =
        op.team.enter(static_cast<std::size_t>(ith), static_cast<std::size_t>(nth), [&](const kvl_parallel_runner *runner) {
            op.calls++;
            op.most_threads = std::max(op.most_threads, nth);
            kvl_attention_params params = KVL_ATTENTION_PARAMS_INIT;
            params.q = view(dst->src[0], 1, 2);
            params.k = view(dst->src[1], 1, 2);
            params.v = view(dst->src[2], 1, 2);
            params.out = view(dst, 2, 1);
            params.scale = op.scale;
            params.softcap = op.softcap;
            if (const ggml_tensor *mask = dst->src[3]) {
                // [keys, at least as many queries, heads or 1, sequences or 1]: the bias [batch, seq, heads, keys], of which -inf masks.
                params.bias = view(mask, 1, 2);
                params.bias.shape[1] = std::min(params.bias.shape[1], params.q.shape[1]);
            }
            if (const ggml_tensor *sinks = dst->src[4]) {
                params.sink_logits = static_cast<const float *>(sinks->data);
            }
            try {
                kvlane::attention(op.context, op.workspace, params, runner);
                return KVL_STATUS_OK;
            } catch (const kvlane::error &error) {
                op.error = error.what();
                return error.status();
            }
        });
    if (ith == 0) {
        op.status = status;
    }
}

struct setting {
    const char *name;
    std::int64_t sequences, tokens, keys, heads, kv_heads, dim;
    ggml_type type;
    float softcap;
    bool sinks;
};

/// Both operators over the same tensors, each in a graph of its own.
class both {
public:
    explicit both(const setting &s, int threads) : s_(s) {
        ggml_init_params params = {};
        params.mem_size = std::size_t(1) << 30;
        ggml_ = ggml_init(params);
        q_ = ggml_new_tensor_4d(ggml_, GGML_TYPE_F32, s.dim, s.tokens, s.heads, s.sequences);
        // As llama.cpp has it: a token's heads side by side, axes permuted by a view.
        const auto cache = [&] {
            return ggml_permute(ggml_, fill(ggml_new_tensor_4d(ggml_, s.type, s.dim, s.kv_heads, s.keys, s.sequences)), 0, 2, 1,
                                3);
        };
        fill(q_);
        k_ = cache();
        v_ = cache();
        // Causal, and every sequence with other unused slots at the end of the cache.
        mask_ = ggml_new_tensor_4d(ggml_, GGML_TYPE_F16, s.keys, s.tokens, 1, s.sequences);
        for (std::int64_t b = 0; b < s.sequences; b++) {
            for (std::int64_t t = 0; t < s.tokens; t++) {
                for (std::int64_t j = 0; j < s.keys; j++) {
                    static_cast<ggml_fp16_t *>(mask_->data)[(b * s.tokens + t) * s.keys + j] =
                        ggml_fp32_to_fp16(visible(b, t, j) ? 0.0f : -INFINITY);
                }
            }
        }
        sinks_ = s.sinks ? fill(ggml_new_tensor_1d(ggml_, GGML_TYPE_F32, s.heads)) : nullptr;
        const float scale = 1 / std::sqrt(static_cast<float>(s.dim));
        op.scale = scale;
        op.softcap = s.softcap;
        ggml_tensor *arguments[] = {q_, k_, v_, mask_, sinks_};
        ours_ = ggml_custom_4d(ggml_, GGML_TYPE_F32, s.dim, s.heads, s.tokens, s.sequences, arguments, s.sinks ? 5 : 4, attention,
                               GGML_N_TASKS_MAX, &op);
        theirs_ = ggml_flash_attn_ext(ggml_, q_, k_, v_, mask_, scale, 0, s.softcap);
        if (s.sinks) {
            ggml_flash_attn_ext_add_sinks(theirs_, sinks_);
        }
        ggml_threadpool_params pool = ggml_threadpool_params_default(threads);
        pool_ = ggml_threadpool_new(&pool);
        for (std::size_t i = 0; i < 2; i++) {
            graphs_[i] = ggml_new_graph(ggml_);
            ggml_build_forward_expand(graphs_[i], i == 0 ? ours_ : theirs_);
            plans_[i] = ggml_graph_plan(graphs_[i], threads, pool_);
            work_[i].resize(plans_[i].work_size);
            plans_[i].work_data = work_[i].data();
        }
    }
    both(const both &) = delete;
    both &operator=(const both &) = delete;
    ~both() {
        ggml_threadpool_free(pool_);
        ggml_free(ggml_);
    }

    /// 0 is kvlane, 1 is ggml.
    bool compute(std::size_t which) { return ggml_graph_compute(graphs_[which], &plans_[which]) == GGML_STATUS_SUCCESS; }

    const float *result(std::size_t which) const { return static_cast<const float *>((which == 0 ? ours_ : theirs_)->data); }

    std::int64_t size() const { return ggml_nelements(ours_); }

    /// In f64, in the order of the results.
    std::vector<double> exact() const {
        std::vector<double> out;
        for (std::int64_t b = 0; b < s_.sequences; b++) {
            for (std::int64_t t = 0; t < s_.tokens; t++) {
                for (std::int64_t h = 0; h < s_.heads; h++) {
                    const std::int64_t kv_head = h / (s_.heads / s_.kv_heads);
                    std::vector<double> weights, mean(static_cast<std::size_t>(s_.dim));
                    double largest = sinks_ == nullptr ? -INFINITY : number(sinks_, h, 0, 0, 0);
                    for (std::int64_t j = 0; j < s_.keys; j++) {
                        double dot = 0;
                        for (std::int64_t d = 0; d < s_.dim; d++) {
                            dot += number(q_, d, t, h, b) * number(k_, d, j, kv_head, b);
                        }
                        dot *= static_cast<double>(op.scale);
                        dot = s_.softcap > 0 ? s_.softcap * std::tanh(dot / s_.softcap) : dot;
                        weights.push_back(visible(b, t, j) ? dot : -INFINITY);
                        largest = std::max(largest, weights.back());
                    }
                    double sum = sinks_ == nullptr ? 0 : std::exp(number(sinks_, h, 0, 0, 0) - largest);
                    for (std::int64_t j = 0; j < s_.keys; j++) {
                        const double weight = std::exp(weights[static_cast<std::size_t>(j)] - largest);
                        sum += weight;
                        for (std::int64_t d = 0; d < s_.dim; d++) {
                            mean[static_cast<std::size_t>(d)] += weight * number(v_, d, j, kv_head, b);
                        }
                    }
                    for (const double x : mean) {
                        out.push_back(x / sum);
                    }
                }
            }
        }
        return out;
    }

    ggml_tensor *q() { return q_; }

    attention_op op;

private:
    bool visible(std::int64_t b, std::int64_t t, std::int64_t j) const { return j <= s_.keys - 3 * (b + 1) - s_.tokens + t; }

    static double number(const ggml_tensor *t, std::int64_t i, std::int64_t j, std::int64_t k, std::int64_t l) {
        const char *at = static_cast<const char *>(t->data) + static_cast<std::size_t>(i) * t->nb[0] +
                         static_cast<std::size_t>(j) * t->nb[1] + static_cast<std::size_t>(k) * t->nb[2] +
                         static_cast<std::size_t>(l) * t->nb[3];
        const auto *half = reinterpret_cast<const ggml_fp16_t *>(at);
        return static_cast<double>(t->type == GGML_TYPE_F32   ? *reinterpret_cast<const float *>(at)
                                   : t->type == GGML_TYPE_F16 ? ggml_fp16_to_fp32(*half)
                                                              : ggml_bf16_to_fp32(ggml_bf16_t{*half}));
    }

    ggml_tensor *fill(ggml_tensor *t) {
        std::normal_distribution<float> normal;
        for (std::int64_t i = 0; i < ggml_nelements(t); i++) {
            const float x = normal(random_);
            if (t->type == GGML_TYPE_F32) {
                static_cast<float *>(t->data)[i] = x;
            } else if (t->type == GGML_TYPE_F16) {
                static_cast<ggml_fp16_t *>(t->data)[i] = ggml_fp32_to_fp16(x);
            } else {
                static_cast<ggml_bf16_t *>(t->data)[i] = ggml_fp32_to_bf16(x);
            }
        }
        return t;
    }

    setting s_;
    std::mt19937 random_{1};
    ggml_context *ggml_;
    ggml_tensor *q_, *k_, *v_, *mask_, *sinks_, *ours_, *theirs_;
    ggml_threadpool *pool_;
    ggml_cgraph *graphs_[2];
    ggml_cplan plans_[2];
    std::vector<std::uint8_t> work_[2];
};

int compare(const setting &s) {
    std::vector<float> first;
    for (const int threads : {1, 3}) {
        both both(s, threads);
        if (!both.compute(0) || both.op.status != KVL_STATUS_OK || !both.compute(1)) {
            std::printf("%s: %s\n", s.name, both.op.error.c_str());
            return 1;
        }
        const std::vector<double> exact = both.exact();
        double ours = 0, theirs = 0;
        for (std::int64_t i = 0; i < both.size(); i++) {
            const double wanted = exact[static_cast<std::size_t>(i)];
            // NaN is no small error.
            const auto worst = [&](double &error, float x) {
                error = std::fabs(x - wanted) <= error ? error : std::fabs(x - wanted);
            };
            worst(ours, both.result(0)[i]);
            worst(theirs, both.result(1)[i]);
        }
        const std::vector<float> result(both.result(0), both.result(0) + both.size());
        const bool same = first.empty() || std::memcmp(first.data(), result.data(), result.size() * sizeof(float)) == 0;
        first = result;
        const bool good = ours < (s.type == GGML_TYPE_BF16 ? 2e-3 : 2e-6) && theirs < 2e-2 && same && both.op.calls == 1 &&
                          both.op.most_threads == threads;
        std::printf("%-34s %d threads: kvlane %.1e and ggml %.1e from f64%s\n", s.name, threads, ours, theirs,
                    good   ? ""
                    : same ? ": too far, or not called"
                           : ": other bits than on one thread");
        if (!good) {
            return 1;
        }
    }
    return 0;
}

/// A wrong shape reaches the caller, and the threads of ggml come back.
int refuse() {
    both both({"", 1, 1, 64, 4, 2, 32, GGML_TYPE_F16, 0, false}, 3);
    both.q()->ne[0] = 16;
    const bool computed = both.compute(0),
               refused = both.op.status == KVL_STATUS_SHAPE && both.op.error.find("16") != std::string::npos;
    std::printf("a wrong shape: %s\n", refused ? both.op.error.c_str() : "no error");
    return !(computed && refused);
}

/// The best of the rounds of each, which take turns.
int measure(const setting &s) {
    both both(s, static_cast<int>(std::max(1u, std::thread::hardware_concurrency())));
    double best[2] = {INFINITY, INFINITY};
    const auto start = std::chrono::steady_clock::now();
    const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(); };
    for (int round = 0; round < 5 || seconds() < 1.5; round++) {
        for (std::size_t which = 0; which < 2; which++) {
            const double before = seconds();
            if (!both.compute(which)) {
                return 1;
            }
            best[which] = std::min(best[which], seconds() - before);
        }
    }
    std::printf("%-34s kvlane %8.3f ms, ggml %8.3f ms: ratio %.2f\n", s.name, best[0] * 1e3, best[1] * 1e3, best[1] / best[0]);
    return both.op.status != KVL_STATUS_OK;
}

} // namespace

int main(int argc, char **argv) {
    ggml_cpu_init();
    int failures = 0;
    if (argc > 1 && std::strcmp(argv[1], "time") == 0) {
        for (const setting &s : {
                 setting{"decode, 4096 keys", 1, 1, 4096, 32, 8, 128, GGML_TYPE_F16, 0, false},
                 setting{"decode, 16384 keys", 1, 1, 16384, 32, 8, 128, GGML_TYPE_F16, 0, false},
                 setting{"decode, 4 sequences of 4096 keys", 4, 1, 4096, 32, 8, 128, GGML_TYPE_F16, 0, false},
                 setting{"512 tokens, 4096 keys", 1, 512, 4096, 32, 8, 128, GGML_TYPE_F16, 0, false},
             }) {
            failures += measure(s);
        }
        return failures;
    }
    for (const setting &s : {
             setting{"decode, f16", 1, 1, 700, 8, 2, 64, GGML_TYPE_F16, 0, false},
             setting{"decode, f16, softcap and sinks", 1, 1, 700, 8, 2, 64, GGML_TYPE_F16, 30, true},
             setting{"decode, f16, 3 sequences", 3, 1, 700, 8, 2, 64, GGML_TYPE_F16, 0, false},
             setting{"decode, f32", 1, 1, 700, 8, 2, 64, GGML_TYPE_F32, 0, false},
             setting{"decode, bf16", 1, 1, 700, 8, 2, 64, GGML_TYPE_BF16, 0, false},
             setting{"70 tokens, f16, 2 sequences", 2, 70, 300, 8, 2, 64, GGML_TYPE_F16, 0, false},
             setting{"70 tokens, f16, softcap and sinks", 1, 70, 300, 8, 2, 64, GGML_TYPE_F16, 30, true},
         }) {
        failures += compare(s);
    }
    return failures + refuse();
}
