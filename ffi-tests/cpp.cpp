// The C++ layer: owners, views, exceptions, threads of std::thread.
#include "kvlane.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <thread>

static int failures = 0;

static void expect(bool condition, const char *what) {
    if (!condition) {
        failures++;
        std::fprintf(stderr, "cpp.cpp: not so: %s\n", what);
    }
}

template <class F> static void refused(kvl_status status, const char *text, F call) {
    try {
        call();
        expect(false, text);
    } catch (const kvlane::error &e) {
        expect(e.status() == status, e.what());
        expect(std::strstr(e.what(), text) != nullptr, e.what());
    }
}

// Types of the compiler's own, where it has them.
#if defined(__FLT16_MANT_DIG__) && (defined(__clang__) || __GNUC__ >= 13 || defined(__x86_64__) || defined(__i386__))
static_assert(kvlane::dtype_of<_Float16>::value == KVL_DTYPE_F16);
#endif
#ifdef __BFLT16_MANT_DIG__
static_assert(kvlane::dtype_of<__bf16>::value == KVL_DTYPE_BF16);
#endif
#ifdef __STDCPP_FLOAT16_T__
static_assert(kvlane::dtype_of<std::float16_t>::value == KVL_DTYPE_F16);
#endif
#ifdef __STDCPP_BFLOAT16_T__
static_assert(kvlane::dtype_of<std::bfloat16_t>::value == KVL_DTYPE_BF16);
#endif

// A half type of a program's own.
struct own_half {
    std::uint16_t bits;
};
template <> struct kvlane::dtype_of<own_half> : std::integral_constant<kvl_dtype, KVL_DTYPE_F16> {};
static_assert(kvlane::dtype_of<own_half>::value == KVL_DTYPE_F16 && kvlane::dtype_of<kvlane::bf16>::value == KVL_DTYPE_BF16);

int main() {
    const kvlane::context scalar(KVL_ISA_SCALAR);
    kvlane::context context;
    expect(scalar.isa() == KVL_ISA_SCALAR, "scalar");
    expect(std::string(scalar.kernel_name(KVL_OP_ATTENTION, KVL_DTYPE_F16, KVL_DTYPE_F16)) == "attention_f16_scalar", "kernel name");
    expect(std::string(scalar.attention_kernel_names(KVL_FORMAT_F32, KVL_FORMAT_INT8, KVL_PRECISION_HIGH).second) == "attention_int8_scalar",
           "kernel names");
    refused(KVL_STATUS_INVALID_ENUM, "max_isa is 50", [] { kvlane::context none(50); });

    // RoPE, then a write, then attention over the two tokens; one head of four.
    kvl_rope_frequencies_params scaling = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    scaling.rotary_dim = 4;
    const kvlane::frequencies frequencies = kvlane::rope_frequencies(scaling);
    expect(frequencies.inv_freq.size() == 2 && frequencies.magnitude == 1, "frequencies");
    scaling.rotary_dim = 0;
    refused(KVL_STATUS_INVALID_VALUE, "rotary_dim", [&] { kvlane::rope_frequencies(scaling); });

    const std::int32_t position = 1;
    std::vector<float> q = {1, 2, 3, 4};
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    rope.rotary_dim = 4;
    rope.inv_freq = frequencies.inv_freq.data();
    rope.offsets = &position;
    kvlane::rope_in_place(context, kvlane::view(q, {1, 1, 1, 4}), rope);
    expect(std::fabs(q[0] - (std::cos(1.0f) - 2 * std::sin(1.0f))) < 1e-6f, "rotated");

    const std::vector<float> k = {1, 0, 0, 0, 0, 1, 0, 0}, v = {1, 2, 3, 4, 1, 2, 3, 4};
    std::vector<kvlane::bf16> k_cache(4 * 4), v_cache(4 * 4);
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    const std::int32_t start = 0, length = 2;
    write.k = kvlane::view(k, {1, 2, 1, 4});
    write.v = kvlane::view(v, {1, 2, 1, 4});
    write.k_cache = kvlane::view(k_cache, {1, 4, 1, 4});
    write.v_cache = kvlane::view(v_cache, {1, 4, 1, 4});
    write.positions = &start;
    write.rope = &rope;
    kvlane::kv_write(context, write);
    expect(v_cache[4].bits == 0x3f80, "1 in bfloat16");
    // The helpers of the C header, in C++.
    kvl_kv_write_params again =
        kvl_make_kv_write(kvlane::view(k_cache, {1, 4, 1, 4}), kvlane::view(v_cache, {1, 4, 1, 4}), k.data(), v.data(), KVL_DTYPE_F32, 1, 2, &start);
    again.rope = &rope;
    const std::vector<kvlane::bf16> before = k_cache;
    kvlane::kv_write(context, again);
    expect(std::memcmp(before.data(), k_cache.data(), before.size() * sizeof(kvlane::bf16)) == 0, "the same write");
    std::array<float, 4> causal{};
    kvlane::workspace scratch;
    kvlane::attention(context, scratch, kvl_make_causal_attention(again.k_cache, again.v_cache, q.data(), causal.data(), KVL_DTYPE_F32, 1, 1, 1, &length));
    expect(std::fabs(causal[0] - 1) < 1e-6f && std::fabs(causal[3] - 4) < 1e-5f, "a mean of equal values");
    write.positions = &length;
    kvlane::kv_write(context, write);
    refused(KVL_STATUS_CAPACITY, "position 3", [&] {
        const std::int32_t late = 3;
        write.positions = &late;
        kvlane::kv_write(context, write);
    });
    // The containers say how long they are.
    refused(KVL_STATUS_BOUNDS, "k_cache", [&] {
        write.k_cache = kvlane::view(k_cache, {1, 5, 1, 4});
        kvlane::kv_write(context, write);
    });

    // Eight-bit floats, with a static scale for the keys.
    std::vector<kvlane::fp8_e4m3> k_units(4 * 4);
    std::vector<kvlane::fp8_e5m2> v_units(4 * 4);
    std::array<float, 1> factor = {0.5f};
    kvl_cache_scales scales = kvlane::make_scales(kvlane::static_scales(factor, {1, 4, 1, 4}));
    kvl_kv_write_params narrow = KVL_KV_WRITE_PARAMS_INIT;
    narrow.k = narrow.v = kvlane::view(v, {1, 2, 1, 4});
    narrow.k_cache = kvlane::view(k_units, {1, 4, 1, 4});
    narrow.v_cache = kvlane::view(v_units, {1, 4, 1, 4});
    narrow.positions = &start;
    narrow.scales = &scales;
    kvlane::kv_write(context, narrow);
    expect(k_units[4].bits == 0x40 && v_units[4].bits == 0x3c, "1 as 2 halves, and as 1");

    // Blocks of 32 elements, whose views count blocks.
    std::vector<kvlane::q8_0> k_blocks(4);
    std::vector<kvlane::q4_0> v_blocks(4);
    std::vector<float> ones(2 * 32, -1.0f);
    kvl_kv_write_params blocks = KVL_KV_WRITE_PARAMS_INIT;
    blocks.k = blocks.v = kvlane::view(ones, {1, 2, 1, 32});
    blocks.k_cache = kvlane::view(k_blocks, {1, 4, 1, 32});
    blocks.v_cache = kvlane::view(v_blocks, {1, 4, 1, 32});
    blocks.positions = &start;
    kvlane::kv_write(context, blocks);
    expect(k_blocks[1].d == 0x2008 && k_blocks[1].q[31] == -127, "1 / 127 in f16, and -127 of it");
    expect(v_blocks[1].d == 0x3000 && v_blocks[1].q[15] == 0 && k_blocks[2].d == 0, "-8 times an eighth");
    refused(KVL_STATUS_BOUNDS, "k_cache", [&] {
        blocks.k_cache = kvlane::view(k_blocks, {1, 5, 1, 32});
        kvlane::kv_write(context, blocks);
    });

    std::array<float, 4> out{};
    float lse = 0;
    kvlane::workspace workspace;
    kvl_attention_params attention = KVL_ATTENTION_PARAMS_INIT;
    // What can be written can be read.
    attention.q = kvlane::view(q, {1, 1, 1, 4});
    attention.k = kvlane::view(k_cache, {1, 4, 1, 4});
    attention.v = kvlane::as_const(write.v_cache);
    attention.out = kvlane::view(out, {1, 1, 1, 4});
    attention.lse = &lse;
    attention.lengths = &length;
    kvlane::attention(context, workspace, attention);
    for (std::size_t i = 0; i < 4; ++i) {
        // All values are the same, so weights do not matter.
        expect(std::fabs(out[i] - static_cast<float>(i + 1)) < 1e-5f, "attention");
    }

    // Four pages of one token instead of a row of four, by a plan that gets its table bit by bit; then a ring, rows of beams and
    // ragged rows of the same memory; and the first token as a prefix of the second.
    {
        const std::array<float, 4> wanted = out;
        const auto close = [&](const char *what) {
            for (std::size_t i = 0; i < 4; ++i) {
                expect(std::fabs(out[i] - wanted[i]) < 1e-6f, what);
            }
            out.fill(0);
        };
        out.fill(0);
        const kvlane::list table = {0, -1}, one = {1};
        const kvl_layout paged = kvlane::paged_layout(table, 1);
        kvl_attention_params p = attention;
        p.k = kvlane::view(std::as_const(k_cache), {4, 1, 1, 4});
        p.v = kvlane::view(std::as_const(v_cache), {4, 1, 1, 4});
        p.layout = &paged;
        p.lengths = one.data();
        kvlane::plan plan(p);
        refused(KVL_STATUS_OUT_OF_RANGE, "page_table[0, 1] is -1", [&] { plan.advance({1}); });
        plan.set_table(0, 1, {1});
        plan.advance({1});
        refused(KVL_STATUS_SHAPE, "counts has 2 entries", [&] { plan.advance({1, 1}); });
        refused(KVL_STATUS_INVALID_VALUE, "both plan and layout", [&] {
            p.plan = plan.get();
            kvlane::attention(context, workspace, p);
        });
        p.layout = nullptr;
        p.lengths = nullptr;
        kvlane::plan taken = std::move(plan);
        expect(plan.get() == nullptr && taken.get() == p.plan, "a plan that is moved");
        static_assert(!std::is_copy_constructible_v<kvlane::plan>);
        kvlane::attention(context, workspace, p);
        close("planned pages");
        p = attention;
        taken.update(p);
        p.lengths = nullptr;
        p.plan = taken.get();
        kvlane::attention(context, workspace, p);
        close("a plan anew");
        p = attention;
        const kvlane::list beams(4), starts = {0, 2};
        for (const kvl_layout &layout : {kvlane::ring_layout(1), kvlane::indirect_layout(beams, 4), kvlane::ragged_layout(starts)}) {
            p.layout = &layout;
            kvlane::attention(context, workspace, p);
            close("another layout");
        }
        refused(KVL_STATUS_SHAPE, "3 and 2", [&] { kvlane::paged_layout({0, 1, 2}, 2); });
        p = attention;
        refused(KVL_STATUS_INVALID_VALUE, "out is given", [&] { kvlane::attention_chunks(context, workspace, p); });
        p.out = {};
        p.lse = nullptr;
        const std::vector<float> first = kvlane::attention_chunks(context, workspace, p);
        const kvl_chunk_states span = kvlane::chunk_states(first);
        kvl_merge_chunks_params merge = KVL_MERGE_CHUNKS_PARAMS_INIT;
        merge.segments = &span;
        merge.num_segments = 1;
        merge.kv_heads = p.k.shape[2];
        merge.k_format = p.k.dtype;
        merge.v_format = p.v.dtype;
        merge.out = attention.out;
        kvlane::merge_chunks(context, workspace, merge);
        close("the chunks of a span");
        merge.kv_heads = 0;
        refused(KVL_STATUS_SHAPE, "kv_heads = 0", [&] { kvlane::merge_chunks(context, workspace, merge); });
        p = attention;
        p.k = kvl_as_const(kvlane::view(k_cache.data() + 4, {1, 1, 1, 4}));
        p.v = kvl_as_const(kvlane::view(v_cache.data() + 4, {1, 1, 1, 4}));
        p.lengths = nullptr;
        kvlane::attention_with_prefix(context, workspace, kvlane::view(std::as_const(k_cache), {1, 1, 1, 4}),
                                      kvlane::view(std::as_const(v_cache), {1, 1, 1, 4}), p);
        close("a shared prefix");
    }

    // A norm, alone and with a rotation by nothing, and values in pairs.
    std::vector<float> heads = {3, 4, 0, 0}, normed(4), turned(4), pairs(4), apart(4);
    kvl_rms_norm_params norm = KVL_RMS_NORM_PARAMS_INIT;
    kvlane::rms_norm(context, kvlane::view(heads, {1, 1, 1, 4}), kvlane::view(normed, {1, 1, 1, 4}), norm);
    expect(std::fabs(normed[0] - 1.2f) < 1e-5f && normed[2] == 0, "norm");
    const std::int32_t origin = 0;
    rope.offsets = &origin;
    kvlane::rms_norm_rope(context, kvlane::view(std::as_const(heads), {1, 1, 1, 4}), kvlane::view(turned, {1, 1, 1, 4}), norm,
                          rope);
    expect(turned == normed, "norm and rope");
    turned = heads;
    kvlane::rms_norm_rope_in_place(context, kvlane::view(turned, {1, 1, 1, 4}), norm, rope);
    expect(turned == normed, "norm and rope in place");
    turned = heads;
    kvlane::rms_norm_in_place(context, kvlane::view(turned, {1, 1, 1, 4}), norm);
    expect(turned == normed, "norm in place");
    kvlane::hadamard(context, kvlane::view(std::as_const(heads), {1, 1, 1, 4}), kvlane::view(turned, {1, 1, 1, 4}), 2);
    expect(std::fabs(turned[0] - 4.9497475f) < 1e-5f && turned[2] == 0, "a Hadamard rotation");
    kvlane::hadamard_in_place(context, kvlane::view(turned, {1, 1, 1, 4}), 2);
    expect(std::fabs(turned[1] - 4) < 1e-5f, "a Hadamard rotation in place");
    kvlane::pack_row_pairs(context, kvlane::view(std::as_const(heads), {1, 2, 1, 2}), kvlane::view(pairs, {1, 1, 1, 4}));
    expect(pairs == std::vector<float>{3, 0, 4, 0}, "pack");
    kvlane::unpack_row_pairs(context, kvlane::view(std::as_const(pairs), {1, 1, 1, 4}), kvlane::view(apart, {1, 2, 1, 2}));
    expect(apart == heads, "unpack");
    expect(context.v_packing(KVL_FORMAT_F32) == KVL_PACKING_ROWS, "packing");

    // Every second element, and two states that are the same.
    std::vector<float> spread(8), merged(4), joint(1);
    const std::vector<kvl_attention_state> states(2, kvl_attention_state{kvlane::view(std::as_const(out), {1, 1, 1, 4}), &lse});
    kvlane::merge_states(context, states, kvlane::view(spread, {1, 1, 1, 4}, {8, 8, 8, 2}), joint.data());
    expect(spread[2] == out[1] && spread[1] == 0 && std::fabs(joint[0] - lse - std::log(2.0f)) < 1e-6f, "merge");
    kvlane::repeat_kv(context, kvlane::view(out.data(), {1, 1, 1, 4}, {4, 4, 4, 1}).data == out.data()
                                   ? kvlane::view(std::as_const(out), {1, 1, 1, 2})
                                   : kvl_const_view{},
                      kvlane::view(merged, {1, 1, 2, 2}));
    expect(merged[0] == out[0] && merged[2] == out[0] && merged[3] == out[1], "repeat");
    expect(kvlane::alibi_slopes(4)[0] == 0.25f, "slopes");

    // A cache of one layer, two rows of four tokens: evicted, reordered, inserted into; pages; a table; shards.
    std::vector<float> keys(2 * 4 * 2), others(2 * 4 * 2, 7.0f);
    for (std::size_t i = 0; i < keys.size(); ++i) {
        keys[i] = static_cast<float>(i);
    }
    const std::vector<kvl_kv_layer> layers = {{kvlane::view(keys, {2, 4, 1, 2}), kvl_view{}, nullptr}};
    const std::vector<kvl_kv_layer> sources = {{kvlane::view(others, {2, 4, 1, 2}), kvl_view{}, nullptr}};
    kvlane::list lengths = {3, 1}, other_lengths = {2, 2};
    const kvl_cache cache = kvlane::make_cache(layers, lengths), other = kvlane::make_cache(sources, other_lengths);
    kvlane::cache_advance(cache, {1, 0});
    kvlane::cache_evict(context, cache, 0, 1, 2);
    expect(lengths[0] == 3 && keys[2] == 4 && keys[5] == 7, "evicted");
    kvlane::cache_reorder(context, workspace, cache, {1, 0});
    expect(lengths == kvlane::list({1, 3}) && keys[0] == 8 && keys[8] == 0 && keys[13] == 7, "reordered");
    kvlane::cache_truncate(cache, {1, 2});
    kvlane::cache_copy_prefix(context, cache, 1, {0}, 2);
    expect(lengths == kvlane::list({2, 2}) && keys[0] == 0 && keys[2] == 4, "copied");
    kvlane::cache_insert_sequence(context, cache, 1, other, 0, 1);
    expect(lengths[1] == 1 && keys[8] == 7 && keys[10] == 4, "inserted");
    kvlane::cache_reset(cache, {1}, true);
    kvlane::cache_set_lengths(cache, {0, 1}, {4, 2});
    expect(lengths == kvlane::list({4, 2}) && keys[8] == 0 && keys[2] == 4, "reset");
    refused(KVL_STATUS_CAPACITY, "sequence 0 has 4", [&] { kvlane::cache_advance(cache, {1, 0}); });
    refused(KVL_STATUS_SHAPE, "1 and 2", [&] { kvlane::cache_set_lengths(cache, {0}, {4, 2}); });
    kvlane::cache_copy_pages(context, layers, {{0, 1}});
    expect(keys[10] == 4, "copied a page");
    kvlane::list table = {1, -1}, map(2);
    expect(kvlane::cache_defragment(context, layers, table, {3, 0}, map) == 1 && table[0] == 0 && map[1] == 0, "pages");
    kvlane::list beams(2 * 4), beam_lengths = {2, 2};
    kvlane::cache_set_table_tokens(beams, {0, 0}, 2);
    kvlane::cache_reorder_table(workspace, beams, beam_lengths, {1, 1});
    expect(beams == kvlane::list({1, 1, 0, 0, 1, 1, 0, 0}), "table");

    const kvl_shard shard = kvlane::make_shard(3, 1, 2, 2);
    expect(kvlane::shard_sequences(shard, 5).count == 5 && kvlane::shard_heads(shard, 8, 4).second.first == 2, "shard");
    const kvlane::span half = kvlane::shard_keys(shard, 2 * KVL_SPLIT_GRID);
    expect(half.first == KVL_SPLIT_GRID && half.count == KVL_SPLIT_GRID, "span");
    expect(kvlane::shard_lengths(half, 1, {1030}).lengths[0] == 6, "lengths of a span");
    expect(kvlane::shard_slots(half, 2, {1023}) == kvlane::list({-1, 0}), "slots of a span");
    expect(kvlane::shard_view(layers[0].k, 1, {1, 2}).data == keys.data() + 2, "part of a view");

    // Threads: enough work that they are used.
    const std::size_t n = 1u << 20;
    std::vector<float> many(n), one(2 * n), two(2 * n);
    for (std::size_t i = 0; i < n; ++i) {
        many[i] = static_cast<float>(i);
    }
    const auto src = kvlane::view(std::as_const(many), {1, static_cast<std::int64_t>(n / 64), 1, 64});
    const auto to = [&](std::vector<float> &data) { return kvlane::view(data, {1, static_cast<std::int64_t>(n / 64), 2, 64}); };
    kvlane::repeat_kv(context, src, to(one));
    int calls = 0;
    kvlane::parallel_for threads(2, [&](std::size_t tasks, kvlane::task task) {
        calls++;
        std::vector<std::thread> running;
        for (std::size_t i = 0; i < tasks; ++i) {
            running.emplace_back(task, i);
        }
        for (auto &thread : running) {
            thread.join();
        }
    });
    kvlane::repeat_kv(context, src, to(two), threads.runner());
    expect(calls == 1 && one == two, "threads");
    kvlane::parallel_for broken(2, [](std::size_t, kvlane::task) { throw std::runtime_error("no threads today"); });
    refused(KVL_STATUS_PARALLEL, "runner", [&] { kvlane::repeat_kv(context, src, to(two), broken.runner()); });
    try {
        kvlane::thread_pool pool(2);
        std::fill(two.begin(), two.end(), 0.0f);
        kvlane::repeat_kv(context, src, to(two), pool.runner());
        expect(one == two, "pool");
    } catch (const kvlane::error &e) {
        expect(e.status() == KVL_STATUS_UNSUPPORTED, e.what());
    }

    // A tuning that is set can be read.
    kvl_tuning tuning = context.tuning();
    tuning.run = KVL_PREFETCH_OFF;
    context.set_tuning(tuning);
    expect(context.tuning().run == KVL_PREFETCH_OFF && context.tuning().block == tuning.block, "tuning");
    tuning.run = 99;
    refused(KVL_STATUS_INVALID_ENUM, "run is 99", [&] { context.set_tuning(tuning); });

    // A buffer for a cache: zero, aligned, moved and not copied.
    kvlane::cache_buffer<float> buffer(1 << 20), few(5);
    expect(buffer.size() == 1 << 20 && reinterpret_cast<std::uintptr_t>(buffer.data()) % (2 << 20) == 0, "aligned to a huge page");
    expect(reinterpret_cast<std::uintptr_t>(few.data()) % 64 == 0 && !few.is_advised(), "aligned to a line");
    expect(std::all_of(buffer.begin(), buffer.end(), [](float x) { return x == 0.0f; }), "zero");
    buffer[buffer.size() - 1] = 7.0f;
    const kvl_view of_buffer = kvlane::view(buffer, {1, 1 << 10, 8, 128});
    expect(of_buffer.data == buffer.data() && kvlane::cache_buffer<float>(0).size() == 0, "views of buffers");
    few = std::move(buffer);
    expect(few.size() == 1 << 20 && few[few.size() - 1] == 7.0f && buffer.size() == 0, "moved buffers");
    try {
        kvlane::cache_buffer<float> huge(SIZE_MAX / 4);
        expect(false, "too much memory");
    } catch (const std::bad_alloc &) {
    }

    // A context can be moved and not copied.
    const kvlane::context moved = std::move(context);
    expect(moved.get() != nullptr && context.get() == nullptr, "moved");
    static_assert(!std::is_copy_constructible_v<kvlane::context>);
    return failures > 0;
}
