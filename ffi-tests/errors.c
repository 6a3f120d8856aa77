/* Bad input: each error has a code and a sentence that names it, and no byte is written. */
#include "check.h"

/* The outputs of all calls in this file. Every check fills them before the call and compares them afterwards. */
static union {
    unsigned char bytes[8192];
    float floats[2048];
    double doubles[1024];
    void *pointer;
} output;

static void paint(void) { memset(output.bytes, 0xa5, sizeof output.bytes); }

static int stained(void) {
    size_t i;
    for (i = 0; i < sizeof output.bytes; i++) {
        if (output.bytes[i] != 0xa5) return 1;
    }
    return 0;
}

#define REFUSED(wanted, text, call)                                                                                    \
    do {                                                                                                               \
        kvl_status got_;                                                                                               \
        paint();                                                                                                       \
        got_ = (call);                                                                                                 \
        CHECK(got_ == (wanted), "%s", got_ == KVL_STATUS_OK ? "accepted" : sentence());                                       \
        CHECK(strstr(sentence(), (text)) != NULL, "no \"%s\" in: %s", (text), sentence());                             \
        CHECK(!stained(), "something was written");                                                                    \
    } while (0)

static const kvl_context *context;

static void last_error(void) {
    char small[8];
    size_t needed;
    kvl_context *none = NULL;
    CHECK(kvl_last_error(NULL, 0) == 1, "no error yet, but: %s", sentence());
    CHECK(kvl_context_create(NULL, NULL) == KVL_STATUS_NULL_POINTER, "-");
    needed = kvl_last_error(NULL, 0);
    CHECK(needed == strlen("the pointer context is null") + 1, "%d", (int)needed);
    memset(small, 'x', sizeof small);
    CHECK(kvl_last_error(small, 6) == needed, "-");
    CHECK(memcmp(small, "the p\0xx", 8) == 0, "%.8s", small);
    /* A successful call does not change the last error. */
    OK(kvl_context_create(NULL, &none));
    kvl_context_destroy(none);
    CHECK(strcmp(sentence(), "the pointer context is null") == 0, "%s", sentence());
}

/* A caller with a newer header than the library: its structs have fields that the library does not know, which must be
 * 0. */
static void newer_headers(void) {
    static const double inv_freq[2] = {1, 0.5};
    static const int32_t offsets[1] = {3};
    float x[4] = {1, 2, 3, 4}, y[4], z[4];
    kvl_const_view src = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 1, 1, 4);
    kvl_view dst = kvl_make_view(y, KVL_DTYPE_F32, 1, 1, 1, 4);
    kvl_context **made = (kvl_context **)&output.pointer;
    kvl_context *none = NULL;
    size_t i;
#define NEWER(type)                                                                                                    \
    struct {                                                                                                           \
        type known;                                                                                                    \
        int64_t later[2];                                                                                              \
    }
    NEWER(kvl_context_params) params;
    NEWER(kvl_kernel_info) info;
    NEWER(kvl_shard) shard;
    NEWER(kvl_rope_params) rope;
    kvl_kernel_info same = KVL_KERNEL_INFO_INIT;
    memset(&params, 0, sizeof params);
    params.known.struct_size = sizeof params;
    OK(kvl_context_create(&params.known, &none));
    kvl_context_destroy(none);
    for (i = 0; i < sizeof params.later; i++) {
        char byte[64];
        ((unsigned char *)params.later)[i] = 7;
        snprintf(byte, sizeof byte, "kvl_context_params.struct_size is 32, and byte %d is 7", (int)(16 + i));
        REFUSED(KVL_STATUS_STRUCT_SIZE, byte, kvl_context_create(&params.known, made));
        CHECK(strstr(sentence(), "this library knows 16 bytes") != NULL, "%s", sentence());
        ((unsigned char *)params.later)[i] = 0;
    }
    params.known.struct_size--; /* Any number of bytes, because all are 0. */
    OK(kvl_context_create(&params.known, &none));
    kvl_context_destroy(none);

    /* The library sets the fields that it knows, and no byte beyond. */
    memset(&info, 0, sizeof info);
    info.known.struct_size = sizeof info;
    OK(kvl_kernel_info_at(1, &info.known));
    OK(kvl_kernel_info_at(1, &same));
    CHECK(info.known.struct_size == sizeof info && info.later[0] == 0 && info.later[1] == 0, "-");
    same.struct_size = sizeof info;
    CHECK(memcmp(&info.known, &same, sizeof same) == 0, "%s", info.known.name);
    info.later[0] = -1;
    CHECK(kvl_kernel_info_at(1, &info.known) == KVL_STATUS_STRUCT_SIZE && info.later[0] == -1, "%s", sentence());
    memset(&shard, 0, sizeof shard);
    shard.known.struct_size = sizeof shard;
    shard.known.num_model = 3;
    OK(kvl_shard_from_rank(2, &shard.known));
    CHECK(shard.known.model == 2 && shard.known.struct_size == sizeof shard && shard.later[0] == 0, "-");

    memset(&rope, 0, sizeof rope);
    rope.known.struct_size = sizeof rope.known;
    rope.known.rotary_dim = 4;
    rope.known.inv_freq = inv_freq;
    rope.known.offsets = offsets;
    OK(kvl_rope(context, NULL, &src, &dst, &rope.known));
    dst.data = z;
    rope.known.struct_size = sizeof rope;
    OK(kvl_rope(context, NULL, &src, &dst, &rope.known));
    CHECK(memcmp(y, z, sizeof y) == 0, "-");
    dst.data = &output;
    rope.later[1] = 1;
    REFUSED(KVL_STATUS_STRUCT_SIZE, "kvl_rope_params.struct_size is 104, and byte 96", kvl_rope(context, NULL, &src, &dst, &rope.known));
#undef NEWER
}

static void contexts(void) {
    kvl_context **made = (kvl_context **)&output.pointer;
    kvl_context_params params = KVL_CONTEXT_PARAMS_INIT;
    params.struct_size = 0;
    REFUSED(KVL_STATUS_STRUCT_SIZE, "kvl_context_params.struct_size is 0", kvl_context_create(&params, made));
    params.struct_size = sizeof params - 1;
    REFUSED(KVL_STATUS_STRUCT_SIZE, "is 15", kvl_context_create(&params, made));
    params.struct_size = (size_t)-1;
    REFUSED(KVL_STATUS_STRUCT_SIZE, "knows [16] and takes up to 65536", kvl_context_create(&params, made));
    params.struct_size = sizeof params;
    params.max_isa = 99;
    REFUSED(KVL_STATUS_INVALID_ENUM, "max_isa is 99", kvl_context_create(&params, made));
    params.max_isa = -1;
    REFUSED(KVL_STATUS_INVALID_ENUM, "max_isa is -1", kvl_context_create(&params, made));
    /* One of the two belongs to another architecture. */
    params.max_isa = kvl_isa_available(KVL_ISA_NEON) ? KVL_ISA_AVX2 : KVL_ISA_NEON;
    REFUSED(KVL_STATUS_UNSUPPORTED, kvl_isa_name(params.max_isa), kvl_context_create(&params, made));
    params.max_isa = KVL_ISA_BEST;
    params.flags = 2;
    REFUSED(KVL_STATUS_INVALID_ENUM, "unknown bits 0x2", kvl_context_create(&params, made));

    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_context_isa(NULL, (kvl_isa *)output.bytes));
    REFUSED(KVL_STATUS_NULL_POINTER, "isa", kvl_context_isa(context, NULL));
    {
        const char **name = (const char **)&output.pointer;
        REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_context_kernel_name(NULL, KVL_OP_ROPE, KVL_DTYPE_F32, KVL_DTYPE_F32, name));
        REFUSED(KVL_STATUS_NULL_POINTER, "name", kvl_context_kernel_name(context, KVL_OP_ROPE, KVL_DTYPE_F32, KVL_DTYPE_F32, NULL));
        REFUSED(KVL_STATUS_INVALID_ENUM, "op is 9", kvl_context_kernel_name(context, 9, KVL_DTYPE_F32, KVL_DTYPE_F32, name));
        REFUSED(KVL_STATUS_INVALID_ENUM, "src is 14", kvl_context_kernel_name(context, KVL_OP_ROPE, 14, KVL_DTYPE_F32, name));
        REFUSED(KVL_STATUS_INVALID_ENUM, "dst is -2", kvl_context_kernel_name(context, KVL_OP_ROPE, KVL_DTYPE_F32, -2, name));
        REFUSED(KVL_STATUS_DTYPE, "attention from f32 to f16",
                kvl_context_kernel_name(context, KVL_OP_ATTENTION, KVL_DTYPE_F32, KVL_DTYPE_F16, name));
    }
    {
        const char **names = (const char **)&output.pointer;
        REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_context_attention_kernel_names(NULL, 0, 0, 0, names, names + 1));
        REFUSED(KVL_STATUS_NULL_POINTER, "k_name", kvl_context_attention_kernel_names(context, 0, 0, 0, NULL, names));
        REFUSED(KVL_STATUS_NULL_POINTER, "v_name", kvl_context_attention_kernel_names(context, 0, 0, 0, names, NULL));
        REFUSED(KVL_STATUS_INVALID_ENUM, "k_format is 14",
                kvl_context_attention_kernel_names(context, 14, 0, 0, names, names + 1));
        REFUSED(KVL_STATUS_INVALID_ENUM, "v_format is -1",
                kvl_context_attention_kernel_names(context, 0, -1, 0, names, names + 1));
        REFUSED(KVL_STATUS_INVALID_ENUM, "precision is 3",
                kvl_context_attention_kernel_names(context, 0, 0, 3, names, names + 1));
    }
    {
        kvl_tuning tuning = KVL_TUNING_INIT, before = KVL_TUNING_INIT, after = KVL_TUNING_INIT;
        OK(kvl_context_tuning(context, &before));
        REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_context_tuning(NULL, &tuning));
        REFUSED(KVL_STATUS_NULL_POINTER, "kvl_tuning", kvl_context_tuning(context, NULL));
        REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_context_set_tuning(NULL, &tuning));
        REFUSED(KVL_STATUS_NULL_POINTER, "kvl_tuning", kvl_context_set_tuning((kvl_context *)context, NULL));
        tuning.run_distance = 7;
        tuning.block = 7;
        REFUSED(KVL_STATUS_INVALID_ENUM, "block is 7", kvl_context_set_tuning((kvl_context *)context, &tuning));
        tuning.block = KVL_PREFETCH_DEFAULT;
        tuning.block_order = 3;
        REFUSED(KVL_STATUS_INVALID_ENUM, "block_order is 3", kvl_context_set_tuning((kvl_context *)context, &tuning));
        tuning.block_order = KVL_KEY_ORDER_DEFAULT;
        tuning.run = -1;
        REFUSED(KVL_STATUS_INVALID_ENUM, "run is -1", kvl_context_set_tuning((kvl_context *)context, &tuning));
        tuning.run = KVL_PREFETCH_DEFAULT;
        tuning.run_one_row = 7;
        REFUSED(KVL_STATUS_INVALID_ENUM, "run_one_row is 7", kvl_context_set_tuning((kvl_context *)context, &tuning));
        tuning.run_one_row = KVL_PREFETCH_DEFAULT;
        tuning.run_long_heads = 7;
        REFUSED(KVL_STATUS_INVALID_ENUM, "run_long_heads is 7", kvl_context_set_tuning((kvl_context *)context, &tuning));
        tuning.run_long_heads = KVL_PREFETCH_DEFAULT;
        tuning.score_tiles = 3;
        REFUSED(KVL_STATUS_INVALID_ENUM, "score_tiles is 3", kvl_context_set_tuning((kvl_context *)context, &tuning));
        tuning.score_tiles = KVL_SCORE_TILES_DEFAULT;
        tuning.struct_size = 31;
        REFUSED(KVL_STATUS_STRUCT_SIZE, "kvl_tuning.struct_size is 31", kvl_context_set_tuning((kvl_context *)context, &tuning));
        OK(kvl_context_tuning(context, &after));
        CHECK(memcmp(&before, &after, sizeof after) == 0, "-");
    }
    {
        int32_t *advised = (int32_t *)output.bytes;
        char byte;
        REFUSED(KVL_STATUS_NULL_POINTER, "the pointer data is null, but bytes is 5", kvl_advise_huge_pages(NULL, 5, advised));
        REFUSED(KVL_STATUS_NULL_POINTER, "advised", kvl_advise_huge_pages(&byte, 1, NULL));
        REFUSED(KVL_STATUS_OUT_OF_RANGE, "follow the address", kvl_advise_huge_pages(&byte, SIZE_MAX, advised));
    }
    {
        kvl_packing *packing = (kvl_packing *)output.bytes;
        REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_context_v_packing(NULL, KVL_DTYPE_BF16, packing));
        REFUSED(KVL_STATUS_NULL_POINTER, "packing", kvl_context_v_packing(context, KVL_DTYPE_BF16, NULL));
        REFUSED(KVL_STATUS_INVALID_ENUM, "v_format is 14", kvl_context_v_packing(context, 14, packing));
    }
    {
        kvl_kernel_info info = KVL_KERNEL_INFO_INIT;
        REFUSED(KVL_STATUS_NULL_POINTER, "kvl_kernel_info", kvl_kernel_info_at(0, NULL));
        /* A struct with the fill pattern as its size. */
        REFUSED(KVL_STATUS_STRUCT_SIZE, "kvl_kernel_info", kvl_kernel_info_at(0, (kvl_kernel_info *)output.bytes));
        info.name = NULL;
        REFUSED(KVL_STATUS_OUT_OF_RANGE, "no kernel 1000", kvl_kernel_info_at(1000, &info));
        CHECK(info.name == NULL, "written");
    }
}

static void runners(void) {
    kvl_parallel_runner runner = KVL_PARALLEL_RUNNER_INIT;
    kvl_const_view src = kvl_make_const_view(NULL, KVL_DTYPE_F32, 0, 1, 1, 1);
    kvl_view dst = kvl_make_view(NULL, KVL_DTYPE_F32, 0, 1, 1, 1);
    REFUSED(KVL_STATUS_NULL_POINTER, "run is null", kvl_repeat_kv(context, &runner, &src, &dst));
    runner.struct_size = 8;
    REFUSED(KVL_STATUS_STRUCT_SIZE, "kvl_parallel_runner", kvl_repeat_kv(context, &runner, &src, &dst));
    REFUSED(KVL_STATUS_NULL_POINTER, "pool", kvl_thread_pool_create(1, NULL));
    REFUSED(KVL_STATUS_INVALID_VALUE, "num_threads", kvl_thread_pool_create(1000000, (kvl_thread_pool **)&output.pointer));
    REFUSED(KVL_STATUS_NULL_POINTER, "pool", kvl_thread_pool_runner(NULL, (kvl_parallel_runner *)output.bytes));
    kvl_thread_pool_destroy(NULL);
}

static void views(void) {
    static float x[64];
    kvl_const_view good_src = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 2, 2, 4), src = good_src;
    kvl_view good_dst = kvl_make_view(output.floats, KVL_DTYPE_F32, 1, 2, 4, 4), dst = good_dst;
    kvl_parallel_runner *none = NULL;
#define TRY(status, text)                                                                                              \
    do {                                                                                                               \
        REFUSED(status, text, kvl_repeat_kv(context, none, &src, &dst));                                               \
        src = good_src;                                                                                                \
        dst = good_dst;                                                                                                \
    } while (0)
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_repeat_kv(NULL, none, &src, &dst));
    REFUSED(KVL_STATUS_NULL_POINTER, "src", kvl_repeat_kv(context, none, NULL, &dst));
    REFUSED(KVL_STATUS_NULL_POINTER, "dst", kvl_repeat_kv(context, none, &src, NULL));
    src.data = NULL;
    TRY(KVL_STATUS_NULL_POINTER, "src");
    dst.data = NULL;
    TRY(KVL_STATUS_NULL_POINTER, "dst");
    src.dtype = 3;
    TRY(KVL_STATUS_INVALID_ENUM, "src.dtype is 3");
    dst.dtype = -1;
    TRY(KVL_STATUS_INVALID_ENUM, "dst.dtype is -1");
    src.reserved = 5;
    TRY(KVL_STATUS_INVALID_ENUM, "src.reserved is 5");
    src.shape[1] = -2;
    TRY(KVL_STATUS_SHAPE, "src has seq = -2, which is negative");
    dst.shape[0] = INT64_MIN;
    TRY(KVL_STATUS_SHAPE, "dst has batch = -9223372036854775808");
    src.shape[0] = (int64_t)1 << 31;
    TRY(KVL_STATUS_SHAPE, "2147483648");
    src.shape[1] = 3;
    TRY(KVL_STATUS_SHAPE, "seq = 3");
    dst.shape[2] = 3;
    TRY(KVL_STATUS_SHAPE, "3 heads, which is no multiple of the 2");
    dst.dtype = KVL_DTYPE_F16;
    TRY(KVL_STATUS_DTYPE, "f16");
    src.data = (const char *)x + 2;
    TRY(KVL_STATUS_BOUNDS, "not aligned");
    /* A negative stride times a huge shape, and overflows. */
    src.shape[0] = INT32_MAX;
    src.strides[0] = INT64_MIN;
    TRY(KVL_STATUS_STRIDE, "src");
    dst.shape[0] = INT32_MAX;
    dst.strides[0] = -((int64_t)1 << 40);
    TRY(KVL_STATUS_STRIDE, "dst");
    dst.strides[1] = INT64_MAX;
    TRY(KVL_STATUS_STRIDE, "dst");
    /* Below the address space. */
    src.strides[1] = -((int64_t)1 << 60);
    TRY(KVL_STATUS_STRIDE, "address space");
    /* Buffers that are too short. */
    src.bytes = 63;
    TRY(KVL_STATUS_BOUNDS, "byte 64 of a buffer of 63");
    dst.bytes = 127;
    TRY(KVL_STATUS_BOUNDS, "byte 128 of a buffer of 127");
    src.bytes = 64;
    src.strides[1] = -8;
    TRY(KVL_STATUS_BOUNDS, "before the start");
    /* Elements of an output that share memory, and outputs that share memory with inputs. */
    dst.strides[2] = 0;
    TRY(KVL_STATUS_STRIDE, "share memory");
    dst.strides[1] = 15;
    TRY(KVL_STATUS_STRIDE, "share memory");
    src.data = output.floats + 31;
    TRY(KVL_STATUS_OVERLAP, "src and dst share memory");
#undef TRY
    paint();
    OK(kvl_repeat_kv(context, none, &src, &dst));
}

static void frequencies(void) {
    kvl_rope_frequencies_params good = KVL_ROPE_FREQUENCIES_PARAMS_INIT, p;
    double *inv_freq = output.doubles, *magnitude = output.doubles + 16;
    good.rotary_dim = 8;
    p = good;
#define TRY(status, text)                                                                                              \
    do {                                                                                                               \
        REFUSED(status, text, kvl_rope_frequencies(&p, inv_freq, 4, magnitude));                                       \
        p = good;                                                                                                      \
    } while (0)
    REFUSED(KVL_STATUS_NULL_POINTER, "params", kvl_rope_frequencies(NULL, inv_freq, 4, magnitude));
    REFUSED(KVL_STATUS_NULL_POINTER, "inv_freq", kvl_rope_frequencies(&p, NULL, 4, magnitude));
    REFUSED(KVL_STATUS_NULL_POINTER, "magnitude", kvl_rope_frequencies(&p, inv_freq, 4, NULL));
    REFUSED(KVL_STATUS_SHAPE, "pairs is 5", kvl_rope_frequencies(&p, inv_freq, 5, magnitude));
    REFUSED(KVL_STATUS_SHAPE, "pairs is -1", kvl_rope_frequencies(&p, inv_freq, -1, magnitude));
    p.struct_size--;
    TRY(KVL_STATUS_STRUCT_SIZE, "kvl_rope_frequencies_params");
    p.rotary_dim = 7;
    TRY(KVL_STATUS_INVALID_VALUE, "rotary_dim is 7");
    p.rotary_dim = -8;
    TRY(KVL_STATUS_SHAPE, "rotary_dim is -8");
    p.rotary_dim = INT64_MAX;
    TRY(KVL_STATUS_INVALID_VALUE, "rotary_dim");
    p.scaling = 6;
    TRY(KVL_STATUS_INVALID_ENUM, "scaling is 6");
    p.keep_ramp = 2;
    TRY(KVL_STATUS_INVALID_ENUM, "keep_ramp is 2");
    p.base = -1;
    TRY(KVL_STATUS_INVALID_VALUE, "base");
    p.base = NAN;
    TRY(KVL_STATUS_INVALID_VALUE, "base");
    p.scaling = KVL_ROPE_SCALING_LINEAR; /* Without a factor. */
    TRY(KVL_STATUS_INVALID_VALUE, "factor");
    p.scaling = KVL_ROPE_SCALING_LONGROPE;
    TRY(KVL_STATUS_NULL_POINTER, "factors");
#undef TRY
}

static void table(void) {
    static double inv_freq[] = {1, 2};
    float *c = output.floats, *s = output.floats + 64;
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_rope_table(NULL, inv_freq, 4, 1, 0, 2, c, s));
    REFUSED(KVL_STATUS_NULL_POINTER, "inv_freq", kvl_rope_table(context, NULL, 4, 1, 0, 2, c, s));
    REFUSED(KVL_STATUS_NULL_POINTER, "table", kvl_rope_table(context, inv_freq, 4, 1, 0, 2, NULL, s));
    REFUSED(KVL_STATUS_NULL_POINTER, "table", kvl_rope_table(context, inv_freq, 4, 1, 0, 2, c, NULL));
    REFUSED(KVL_STATUS_INVALID_VALUE, "rotary_dim is 3", kvl_rope_table(context, inv_freq, 3, 1, 0, 2, c, s));
    REFUSED(KVL_STATUS_SHAPE, "rows is -2", kvl_rope_table(context, inv_freq, 4, 1, 0, -2, c, s));
    REFUSED(KVL_STATUS_OUT_OF_RANGE, "2^52", kvl_rope_table(context, inv_freq, 4, 1, INT64_MIN, 2, c, s));
    REFUSED(KVL_STATUS_INVALID_VALUE, "magnitude", kvl_rope_table(context, inv_freq, 4, NAN, 0, 2, c, s));
    REFUSED(KVL_STATUS_OVERLAP, "cos and sin", kvl_rope_table(context, inv_freq, 4, 1, 0, 2, c, c + 3));
    REFUSED(KVL_STATUS_OVERLAP, "inv_freq", kvl_rope_table(context, (double *)(void *)s, 4, 1, 0, 2, c, s));
    REFUSED(KVL_STATUS_BOUNDS, "aligned", kvl_rope_table(context, inv_freq, 4, 1, 0, 2, (float *)(void *)(output.bytes + 1), s));
    inv_freq[1] = INFINITY;
    REFUSED(KVL_STATUS_INVALID_VALUE, "inv_freq[1]", kvl_rope_table(context, inv_freq, 4, 1, 0, 2, c, s));
    inv_freq[1] = 2;
    REFUSED(KVL_STATUS_NULL_POINTER, "slopes", kvl_alibi_slopes(NULL, 3));
    REFUSED(KVL_STATUS_SHAPE, "heads is -3", kvl_alibi_slopes(c, -3));
    REFUSED(KVL_STATUS_SHAPE, "address space", kvl_alibi_slopes(c, INT64_MAX));
}

static void rope(void) {
    static float x[16];
    static const double inv_freq[] = {1, 2};
    static const float table[8];
    static const int32_t offsets[] = {2}, positions[] = {0, 4};
    kvl_const_view src = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 2, 2, 4);
    kvl_view dst = kvl_make_view(output.floats, KVL_DTYPE_F32, 1, 2, 2, 4), good_dst = dst;
    kvl_rope_params good = KVL_ROPE_PARAMS_INIT, p;
    good.rotary_dim = 4;
    good.inv_freq = inv_freq;
    good.offsets = offsets;
    p = good;
#define TRY(status, text)                                                                                              \
    do {                                                                                                               \
        REFUSED(status, text, kvl_rope(context, NULL, &src, &dst, &p));                                                \
        p = good;                                                                                                      \
        dst = good_dst;                                                                                                \
    } while (0)
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_rope(NULL, NULL, &src, &dst, &p));
    REFUSED(KVL_STATUS_NULL_POINTER, "src", kvl_rope(context, NULL, NULL, &dst, &p));
    REFUSED(KVL_STATUS_NULL_POINTER, "dst", kvl_rope(context, NULL, &src, NULL, &p));
    REFUSED(KVL_STATUS_NULL_POINTER, "kvl_rope_params", kvl_rope(context, NULL, &src, &dst, NULL));
    p.struct_size = 1;
    TRY(KVL_STATUS_STRUCT_SIZE, "kvl_rope_params.struct_size is 1");
    p.reserved = 1;
    TRY(KVL_STATUS_INVALID_ENUM, "reserved");
    p.pairing = 2;
    TRY(KVL_STATUS_INVALID_ENUM, "pairing is 2");
    p.rotary_dim = 3;
    TRY(KVL_STATUS_INVALID_VALUE, "rotary_dim is 3");
    p.rotary_dim = 6;
    TRY(KVL_STATUS_SHAPE, "rotary_dim 6 is above the head size 4");
    p.rotary_dim = -4;
    TRY(KVL_STATUS_SHAPE, "rotary_dim is -4");
    p.inv_freq = NULL;
    TRY(KVL_STATUS_NULL_POINTER, "inv_freq");
    p.cos = table;
    p.sin = table;
    TRY(KVL_STATUS_INVALID_VALUE, "both inv_freq and a table");
    p.inv_freq = NULL;
    p.cos = table;
    p.table_rows = 4;
    TRY(KVL_STATUS_NULL_POINTER, "sin");
    p.magnitude = INFINITY;
    TRY(KVL_STATUS_INVALID_VALUE, "magnitude");
    p.offsets = NULL;
    TRY(KVL_STATUS_NULL_POINTER, "offsets");
    p.positions = positions;
    TRY(KVL_STATUS_INVALID_VALUE, "both offsets and positions");
    p.inv_freq = NULL;
    p.cos = p.sin = table;
    p.table_rows = 3; /* Positions 2 and 3. */
    TRY(KVL_STATUS_OUT_OF_RANGE, "the cos/sin table has 3 rows");
    p.inv_freq = NULL;
    p.cos = p.sin = table;
    p.table_rows = 4;
    p.offsets = NULL;
    p.positions = positions;
    TRY(KVL_STATUS_OUT_OF_RANGE, "0..=4");
    p.inv_freq = NULL;
    p.cos = p.sin = table;
    p.table_rows = -4;
    TRY(KVL_STATUS_SHAPE, "table_rows is -4");
    p.offsets = (const int32_t *)(const void *)((const char *)offsets + 1);
    TRY(KVL_STATUS_BOUNDS, "offsets");
    dst.shape[3] = 3;
    TRY(KVL_STATUS_SHAPE, "dim");
    {
        /* Almost in place. */
        kvl_const_view near_dst = kvl_as_const(dst);
        near_dst.data = output.floats + 1;
        REFUSED(KVL_STATUS_OVERLAP, "src and dst share memory", kvl_rope(context, NULL, &near_dst, &dst, &p));
    }
#undef TRY
    paint();
    OK(kvl_rope(context, NULL, &src, &dst, &p));
}

static void norm(void) {
    static float x[16], weight[4];
    static const double inv_freq[] = {1, 2, 3};
    static const int32_t offsets[] = {2};
    kvl_const_view src = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 2, 2, 4), good_src = src;
    kvl_view dst = kvl_make_view(output.floats, KVL_DTYPE_F32, 1, 2, 2, 4), good_dst = dst;
    kvl_rms_norm_params good = KVL_RMS_NORM_PARAMS_INIT, p;
    kvl_rope_params turn = KVL_ROPE_PARAMS_INIT;
    good.weight = weight;
    turn.rotary_dim = 4;
    turn.inv_freq = inv_freq;
    turn.offsets = offsets;
    p = good;
#define TRY(status, text)                                                                                              \
    do {                                                                                                               \
        REFUSED(status, text, kvl_rms_norm(context, NULL, &src, &dst, &p));                                            \
        REFUSED(status, text, kvl_rms_norm_rope(context, NULL, &src, &dst, &p, &turn));                                \
        p = good;                                                                                                      \
        src = good_src;                                                                                                \
        dst = good_dst;                                                                                                \
    } while (0)
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_rms_norm(NULL, NULL, &src, &dst, &p));
    REFUSED(KVL_STATUS_NULL_POINTER, "src", kvl_rms_norm(context, NULL, NULL, &dst, &p));
    REFUSED(KVL_STATUS_NULL_POINTER, "dst", kvl_rms_norm(context, NULL, &src, NULL, &p));
    REFUSED(KVL_STATUS_NULL_POINTER, "kvl_rms_norm_params", kvl_rms_norm(context, NULL, &src, &dst, NULL));
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_rms_norm_rope(NULL, NULL, &src, &dst, &p, &turn));
    REFUSED(KVL_STATUS_NULL_POINTER, "src", kvl_rms_norm_rope(context, NULL, NULL, &dst, &p, &turn));
    REFUSED(KVL_STATUS_NULL_POINTER, "dst", kvl_rms_norm_rope(context, NULL, &src, NULL, &p, &turn));
    REFUSED(KVL_STATUS_NULL_POINTER, "kvl_rms_norm_params", kvl_rms_norm_rope(context, NULL, &src, &dst, NULL, &turn));
    REFUSED(KVL_STATUS_NULL_POINTER, "kvl_rope_params", kvl_rms_norm_rope(context, NULL, &src, &dst, &p, NULL));
    p.struct_size = 16;
    TRY(KVL_STATUS_STRUCT_SIZE, "kvl_rms_norm_params.struct_size is 16");
    p.reserved = 1;
    TRY(KVL_STATUS_INVALID_ENUM, "reserved");
    p.eps = -1;
    TRY(KVL_STATUS_INVALID_VALUE, "eps is -1");
    p.eps = NAN;
    TRY(KVL_STATUS_INVALID_VALUE, "eps is NaN");
    p.weight = (const float *)(const void *)((const char *)weight + 1);
    TRY(KVL_STATUS_BOUNDS, "weight");
    dst.shape[3] = 3;
    TRY(KVL_STATUS_SHAPE, "dim");
    src.dtype = 4;
    TRY(KVL_STATUS_INVALID_ENUM, "src.dtype is 4");
    src.data = output.floats + 1;
    TRY(KVL_STATUS_OVERLAP, "src and dst share memory");
    turn.rotary_dim = 6;
    REFUSED(KVL_STATUS_SHAPE, "rotary_dim 6 is above the head size 4",
            kvl_rms_norm_rope(context, NULL, &src, &dst, &p, &turn));
    turn.rotary_dim = 4;
#undef TRY
    paint();
    OK(kvl_rms_norm(context, NULL, &src, &dst, &p));
    OK(kvl_rms_norm_rope(context, NULL, &src, &dst, &p, &turn));
}

static void hadamard(void) {
    static float x[2 * 2 * 12];
    const kvl_const_view good_src = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 2, 2, 12);
    const kvl_view good_dst = kvl_make_view(output.floats, KVL_DTYPE_F32, 1, 2, 2, 12);
    kvl_const_view src = good_src;
    kvl_view dst = good_dst;
    int64_t block = 7;
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_hadamard(NULL, NULL, &src, &dst, 4));
    REFUSED(KVL_STATUS_NULL_POINTER, "src", kvl_hadamard(context, NULL, NULL, &dst, 4));
    REFUSED(KVL_STATUS_NULL_POINTER, "dst", kvl_hadamard(context, NULL, &src, NULL, 4));
    REFUSED(KVL_STATUS_INVALID_VALUE, "block is 0, which is no power of two from 2 to 512", kvl_hadamard(context, NULL, &src, &dst, 0));
    REFUSED(KVL_STATUS_INVALID_VALUE, "block is 3", kvl_hadamard(context, NULL, &src, &dst, 3));
    REFUSED(KVL_STATUS_INVALID_VALUE, "block is 1024", kvl_hadamard(context, NULL, &src, &dst, 1024));
    REFUSED(KVL_STATUS_SHAPE, "block is -1, which is negative", kvl_hadamard(context, NULL, &src, &dst, -1));
    REFUSED(KVL_STATUS_SHAPE, "block is 8, which does not divide the dim = 12 of src", kvl_hadamard(context, NULL, &src, &dst, 8));
    dst.shape[3] = 8;
    REFUSED(KVL_STATUS_SHAPE, "dim", kvl_hadamard(context, NULL, &src, &dst, 4));
    dst = good_dst;
    src.data = output.floats + 1;
    REFUSED(KVL_STATUS_OVERLAP, "src and dst share memory", kvl_hadamard(context, NULL, &src, &dst, 4));
    src = good_src;
    paint();
    OK(kvl_hadamard(context, NULL, &src, &dst, 4));
    REFUSED(KVL_STATUS_NULL_POINTER, "block", kvl_hadamard_block(12, NULL));
    REFUSED(KVL_STATUS_SHAPE, "dim is -1, which is negative", kvl_hadamard_block(-1, &block));
    CHECK(block == 7, "%d", (int)block);
}

static void pack(void) {
    static float x[2 * 3 * 2 * 4];
    kvl_const_view src = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 3, 2, 4), packed = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 2, 2, 8);
    kvl_view dst = kvl_make_view(output.floats, KVL_DTYPE_F32, 1, 2, 2, 8), plain = kvl_make_view(output.floats, KVL_DTYPE_F32, 1, 3, 2, 4);
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_pack_row_pairs(NULL, NULL, &src, &dst));
    REFUSED(KVL_STATUS_NULL_POINTER, "src", kvl_pack_row_pairs(context, NULL, NULL, &dst));
    REFUSED(KVL_STATUS_NULL_POINTER, "dst", kvl_pack_row_pairs(context, NULL, &src, NULL));
    REFUSED(KVL_STATUS_SHAPE, "dst has seq = 3, but the 3 tokens of src make 2 pairs",
            kvl_pack_row_pairs(context, NULL, &src, &plain));
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_unpack_row_pairs(NULL, NULL, &packed, &plain));
    REFUSED(KVL_STATUS_NULL_POINTER, "src", kvl_unpack_row_pairs(context, NULL, NULL, &plain));
    REFUSED(KVL_STATUS_NULL_POINTER, "dst", kvl_unpack_row_pairs(context, NULL, &packed, NULL));
    REFUSED(KVL_STATUS_SHAPE, "src has seq = 2, but the 2 tokens of dst make 1 pairs",
            kvl_unpack_row_pairs(context, NULL, &packed, &dst));
    plain.dtype = KVL_DTYPE_F16;
    REFUSED(KVL_STATUS_DTYPE, "src is f32, but dst is f16", kvl_unpack_row_pairs(context, NULL, &packed, &plain));
    dst.dtype = KVL_DTYPE_BF16;
    REFUSED(KVL_STATUS_DTYPE, "src is f32, but dst is bf16", kvl_pack_row_pairs(context, NULL, &src, &dst));
    dst.dtype = plain.dtype = KVL_DTYPE_F32;
    src.data = output.floats + 3;
    REFUSED(KVL_STATUS_OVERLAP, "src and dst share memory", kvl_pack_row_pairs(context, NULL, &src, &dst));
    packed.data = output.floats + 3;
    REFUSED(KVL_STATUS_OVERLAP, "src and dst share memory", kvl_unpack_row_pairs(context, NULL, &packed, &plain));
}

static void kv_read(void) {
    static float x[2 * 8 * 2 * 4], floats[2 * 8 * 2];
    static const int32_t zeros[2];
    int32_t list[2];
    kvl_cache_scales scales = KVL_CACHE_SCALES_INIT;
    kvl_kv_read_params good = KVL_KV_READ_PARAMS_INIT, p;
    scales.k = kvl_make_view(floats, KVL_DTYPE_F32, 2, 8, 2, 1);
    good.k_cache = good.v_cache = kvl_make_const_view(x, KVL_FORMAT_F32, 2, 8, 2, 4);
    good.k = kvl_make_view(output.floats, KVL_DTYPE_F32, 2, 3, 2, 4);
    good.v = kvl_make_view(output.floats + 2 * 3 * 2 * 4, KVL_DTYPE_F32, 2, 3, 2, 4);
    good.positions = zeros;
    p = good;
#define LIST(a, b) (list[0] = a, list[1] = b, list)
#define TRY(status, text)                                                                                              \
    do {                                                                                                               \
        REFUSED(status, text, kvl_kv_read(context, NULL, &p));                                                         \
        p = good;                                                                                                      \
    } while (0)
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_kv_read(NULL, NULL, &p));
    REFUSED(KVL_STATUS_NULL_POINTER, "kvl_kv_read_params", kvl_kv_read(context, NULL, NULL));
    p.struct_size -= 8;
    TRY(KVL_STATUS_STRUCT_SIZE, "kvl_kv_read_params.struct_size is 416");
    p.reserved = 1;
    TRY(KVL_STATUS_INVALID_ENUM, "kvl_kv_read_params.reserved is 1");
    memset(&p.v, 0, sizeof p.v);
    TRY(KVL_STATUS_NULL_POINTER, "only one of v and v_cache");
    p.positions = NULL;
    TRY(KVL_STATUS_NULL_POINTER, "positions is null");
    p.positions = LIST(0, 6);
    TRY(KVL_STATUS_CAPACITY, "sequence 1 reads 3 tokens at position 6, but the cache holds 8");
    p.positions = LIST(-1, 0);
    TRY(KVL_STATUS_OUT_OF_RANGE, "positions[0] is -1");
    p.counts = LIST(4, 0);
    TRY(KVL_STATUS_OUT_OF_RANGE, "counts[0] is 4");
    p.sequences = LIST(0, 2);
    TRY(KVL_STATUS_OUT_OF_RANGE, "sequence 2 of the cache");
    p.v_packing = 7;
    TRY(KVL_STATUS_INVALID_ENUM, "v_packing is 7");
    p.k.shape[3] = 3;
    TRY(KVL_STATUS_SHAPE, "dim");
    p.v.data = output.floats + 4;
    TRY(KVL_STATUS_OVERLAP, "k and v share memory");
    p.k_cache.data = output.floats;
    TRY(KVL_STATUS_OVERLAP, "k_cache and k share memory");
    p.scales = &scales;
    TRY(KVL_STATUS_INVALID_VALUE, "k_cache is f32, which has no scales");
    p.k_cache.dtype = KVL_FORMAT_INT8;
    TRY(KVL_STATUS_INVALID_VALUE, "k_cache is int8, but has no scales");
    p.k.dtype = KVL_FORMAT_INT8;
    TRY(KVL_STATUS_INVALID_ENUM, "k.dtype is 3, which is no kvl_dtype");
    memset(&p.v, 0, sizeof p.v);
    memset(&p.v_cache, 0, sizeof p.v_cache);
    scales.v = scales.k;
    memset(&scales.k, 0, sizeof scales.k);
    p.scales = &scales;
    TRY(KVL_STATUS_INVALID_VALUE, "the scales of v_cache are given, but v_cache is absent");
#undef TRY
#undef LIST
    paint();
    OK(kvl_kv_read(context, NULL, &p));
}

static void kv_write(void) {
    enum { CACHE = 2 * 8 * 2 * 4 };
    static float x[2 * 3 * 2 * 4];
    static const int32_t zeros[6], offsets[2];
    static const double inv_freq[] = {1, 2};
    int32_t list[6];
    kvl_rope_params turn = KVL_ROPE_PARAMS_INIT;
    kvl_kv_write_params good = KVL_KV_WRITE_PARAMS_INIT, p;
    good.k = good.v = kvl_make_const_view(x, KVL_DTYPE_F32, 2, 3, 2, 4);
    good.k_cache = kvl_make_view(output.floats, KVL_DTYPE_F32, 2, 8, 2, 4);
    good.v_cache = kvl_make_view(output.floats + CACHE, KVL_DTYPE_F32, 2, 8, 2, 4);
    good.positions = zeros;
    p = good;
#define LIST(a, b, c, d, e, f) (list[0] = a, list[1] = b, list[2] = c, list[3] = d, list[4] = e, list[5] = f, list)
#define TRY(status, text)                                                                                              \
    do {                                                                                                               \
        REFUSED(status, text, kvl_kv_write(context, NULL, &p));                                                        \
        p = good;                                                                                                      \
    } while (0)
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_kv_write(NULL, NULL, &p));
    REFUSED(KVL_STATUS_NULL_POINTER, "kvl_kv_write_params", kvl_kv_write(context, NULL, NULL));
    p.struct_size -= 8;
    TRY(KVL_STATUS_STRUCT_SIZE, "kvl_kv_write_params.struct_size is 440");
    {
        static float floats[2 * 8 * 2];
        kvl_cache_scales scales = KVL_CACHE_SCALES_INIT;
        scales.v = kvl_make_view(floats, KVL_DTYPE_F32, 2, 8, 2, 1);
        p.scales = &scales;
        TRY(KVL_STATUS_INVALID_VALUE, "v_cache is f32, which has no scales, but scales are given");
        p.scales = &scales;
        memset(&p.v, 0, sizeof p.v);
        memset(&p.v_cache, 0, sizeof p.v_cache);
        TRY(KVL_STATUS_INVALID_VALUE, "the scales of v_cache are given, but v_cache is absent");
        p.v_cache.dtype = KVL_FORMAT_INT8;
        TRY(KVL_STATUS_INVALID_VALUE, "v_cache is int8, but has no scales");
        p.v_cache.dtype = KVL_FORMAT_INT8;
        scales.v.data = output.floats + 1;
        p.scales = &scales;
        TRY(KVL_STATUS_OVERLAP, "share memory");
    }
    memset(&p.v, 0, sizeof p.v);
    TRY(KVL_STATUS_NULL_POINTER, "only one of v and v_cache");
    memset(&p.v_cache, 0, sizeof p.v_cache);
    TRY(KVL_STATUS_NULL_POINTER, "only one of v and v_cache");
    p.k.data = NULL;
    TRY(KVL_STATUS_NULL_POINTER, "k: data is null");
    p.v.dtype = 99;
    TRY(KVL_STATUS_INVALID_ENUM, "v.dtype is 99");
    p.k_cache.shape[2] = 1;
    TRY(KVL_STATUS_SHAPE, "k_cache");
    p.v.shape[1] = 2;
    TRY(KVL_STATUS_SHAPE, "seq");
    p.positions = NULL;
    TRY(KVL_STATUS_NULL_POINTER, "positions");
    p.slots = zeros;
    TRY(KVL_STATUS_INVALID_VALUE, "both positions and slots");
    p.positions = LIST(0, 6, 0, 0, 0, 0);
    TRY(KVL_STATUS_CAPACITY, "sequence 1 writes 3 tokens at position 6, but the cache holds 8");
    p.positions = LIST(0, INT32_MAX, 0, 0, 0, 0);
    TRY(KVL_STATUS_CAPACITY, "2147483647");
    p.positions = LIST(0, -1, 0, 0, 0, 0);
    TRY(KVL_STATUS_OUT_OF_RANGE, "positions[1] is -1");
    p.counts = LIST(3, 4, 0, 0, 0, 0);
    TRY(KVL_STATUS_OUT_OF_RANGE, "counts[1] is 4");
    p.counts = LIST(-1, 0, 0, 0, 0, 0);
    TRY(KVL_STATUS_OUT_OF_RANGE, "counts[0] is -1");
    p.sequences = LIST(0, 2, 0, 0, 0, 0);
    TRY(KVL_STATUS_OUT_OF_RANGE, "sequence 2 of the cache");
    p.sequences = LIST(-1, 0, 0, 0, 0, 0);
    TRY(KVL_STATUS_OUT_OF_RANGE, "sequence -1 of the cache");
    p.sequences = LIST(1, 1, 0, 0, 0, 0);
    TRY(KVL_STATUS_DUPLICATE_SLOT, "sequence 1 of the cache");
    p.positions = NULL;
    p.slots = LIST(0, 1, 2, 0, 1, 8);
    TRY(KVL_STATUS_CAPACITY, "slots[1, 2] is 8");
    p.positions = NULL;
    p.slots = LIST(0, 1, -2, 0, 1, 2);
    TRY(KVL_STATUS_OUT_OF_RANGE, "slots[0, 2] is -2");
    p.positions = NULL;
    p.slots = LIST(0, 5, 0, -1, -1, -1);
    TRY(KVL_STATUS_DUPLICATE_SLOT, "slot 0 of sequence 0 of the cache");
    p.v_cache.data = output.floats + CACHE - 1;
    TRY(KVL_STATUS_OVERLAP, "k_cache and v_cache share memory");
    p.k.data = output.floats + 3;
    TRY(KVL_STATUS_OVERLAP, "k and k_cache share memory");
    p.v.data = output.floats + 3;
    TRY(KVL_STATUS_OVERLAP, "k_cache and v share memory");
    p.k_cache.strides[1] = 0;
    TRY(KVL_STATUS_STRIDE, "k_cache");
    p.k_cache.strides[0] = INT64_MIN;
    TRY(KVL_STATUS_STRIDE, "k_cache");
    p.k_cache.bytes = CACHE * sizeof(float) - 1;
    TRY(KVL_STATUS_BOUNDS, "k_cache");
    turn.rotary_dim = 4;
    turn.inv_freq = inv_freq;
    p.rope = &turn;
    TRY(KVL_STATUS_NULL_POINTER, "offsets");
    turn.offsets = offsets;
    turn.struct_size = 3;
    p.rope = &turn;
    TRY(KVL_STATUS_STRUCT_SIZE, "kvl_rope_params");
    p.reserved = 1;
    TRY(KVL_STATUS_INVALID_ENUM, "kvl_kv_write_params.reserved is 1");
    p.v_packing = 2;
    TRY(KVL_STATUS_INVALID_ENUM, "v_packing is 2");
    p.v_packing = KVL_PACKING_ROW_PAIRS;
    TRY(KVL_STATUS_SHAPE, "v_cache has dim = 4, but pairs of v have 8");
    {
        kvl_rms_norm_params norm = KVL_RMS_NORM_PARAMS_INIT;
        norm.eps = INFINITY;
        p.k_norm = &norm;
        TRY(KVL_STATUS_INVALID_VALUE, "eps is inf");
        norm.struct_size--;
        p.k_norm = &norm;
        TRY(KVL_STATUS_STRUCT_SIZE, "kvl_rms_norm_params");
    }
    {
        static const int32_t pages[] = {0, 2}, starts[] = {0, 8, 17}, many[6];
        kvl_layout layout = KVL_LAYOUT_INIT;
#define LAYOUT(status, text)                                                                                           \
    do {                                                                                                               \
        p.layout = &layout;                                                                                            \
        TRY(status, text);                                                                                             \
        layout = (kvl_layout)KVL_LAYOUT_INIT;                                                                          \
    } while (0)
        layout.struct_size = 8;
        LAYOUT(KVL_STATUS_STRUCT_SIZE, "kvl_layout");
        layout.kind = 5;
        LAYOUT(KVL_STATUS_INVALID_ENUM, "kind is 5");
        layout.sink_tokens = 1;
        LAYOUT(KVL_STATUS_INVALID_VALUE, "no ring");
        layout.kind = KVL_LAYOUT_KIND_RING;
        layout.sink_tokens = 8;
        LAYOUT(KVL_STATUS_CAPACITY, "8 sink tokens, but k_cache has 8 slots");
        layout.kind = KVL_LAYOUT_KIND_RING;
        layout.sink_tokens = -1;
        LAYOUT(KVL_STATUS_SHAPE, "sink_tokens is -1");
        layout.kind = KVL_LAYOUT_KIND_RING;
        layout.sink_tokens = 6;
        p.positions = LIST(0, 6, 0, 0, 0, 0);
        LAYOUT(KVL_STATUS_DUPLICATE_SLOT, "sequence 1 writes 3 tokens into a ring of 2 slots");
        layout.kind = KVL_LAYOUT_KIND_PAGED;
        layout.num_sequences = 2;
        layout.pages_per_sequence = 1;
        LAYOUT(KVL_STATUS_NULL_POINTER, "table");
        layout.kind = KVL_LAYOUT_KIND_PAGED;
        layout.num_sequences = 2;
        layout.pages_per_sequence = 1;
        layout.table = pages;
        LAYOUT(KVL_STATUS_OUT_OF_RANGE, "page_table[1, 0] is 2, but k_cache has batch = 2");
        layout.kind = KVL_LAYOUT_KIND_PAGED;
        p.positions = NULL;
        p.slots = LIST(0, 1, 2, 3, 4, 16);
        LAYOUT(KVL_STATUS_CAPACITY, "slots[1, 2] is 16, but the cache holds 16");
        layout.kind = KVL_LAYOUT_KIND_PAGED;
        p.positions = NULL;
        p.slots = LIST(9, 1, 2, 3, -1, 9);
        LAYOUT(KVL_STATUS_DUPLICATE_SLOT, "tokens [0, 0] and [1, 2] both go to slot 9 of the pool");
        layout.kind = KVL_LAYOUT_KIND_RAGGED;
        layout.num_sequences = 2;
        layout.table = starts;
        LAYOUT(KVL_STATUS_SHAPE, "a batch of one");
        layout.kind = KVL_LAYOUT_KIND_INDIRECT;
        layout.num_sequences = 0;
        layout.table = many;
        LAYOUT(KVL_STATUS_INVALID_VALUE, "indirect");
#undef LAYOUT
    }
    /* The size of the struct before it had a layout: later bytes are not read. */
    p.struct_size = offsetof(kvl_kv_write_params, layout);
    p.layout = (const kvl_layout *)(const void *)x;
    p.v_packing = 77;
    paint();
    OK(kvl_kv_write(context, NULL, &p));
    p = good;
#undef TRY
#undef LIST
    paint();
    OK(kvl_kv_write(context, NULL, &p));
}

static void attention(void) {
    static float x[2 * 5 * 4 * 8];
    static union {
        unsigned char bytes[(1 << 18) + 64];
        double aligned;
    } memory;
    void *workspace = memory.bytes + (64 - (uintptr_t)memory.bytes % 64) % 64;
    size_t bytes = 1 << 18, *needed = (size_t *)output.bytes;
    static const unsigned char mask[1];
    int32_t list[2];
    float ones[4] = {1, 1, 1, 1};
    kvl_attention_params good = KVL_ATTENTION_PARAMS_INIT, p;
    good.q = kvl_make_const_view(x, KVL_DTYPE_F32, 2, 3, 4, 8);
    good.k = good.v = kvl_make_const_view(x, KVL_DTYPE_F32, 2, 5, 2, 8);
    good.out = kvl_make_view(output.floats, KVL_DTYPE_F32, 2, 3, 4, 8);
    good.lse = output.floats + 2 * 3 * 4 * 8;
    p = good;
#define LIST(a, b) (list[0] = a, list[1] = b, list)
#define TRY(status, text)                                                                                              \
    do {                                                                                                               \
        REFUSED(status, text, kvl_attention(context, NULL, workspace, bytes, &p));                                     \
        p = good;                                                                                                      \
    } while (0)
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_attention(NULL, NULL, workspace, bytes, &p));
    REFUSED(KVL_STATUS_NULL_POINTER, "kvl_attention_params", kvl_attention(context, NULL, workspace, bytes, NULL));
    REFUSED(KVL_STATUS_WORKSPACE, "needs", kvl_attention(context, NULL, workspace, 64, &p));
    REFUSED(KVL_STATUS_WORKSPACE, "aligned", kvl_attention(context, NULL, NULL, bytes, &p));
    REFUSED(KVL_STATUS_WORKSPACE, "aligned", kvl_attention(context, NULL, (char *)workspace + 32, bytes - 32, &p));
    p.struct_size = 0;
    TRY(KVL_STATUS_STRUCT_SIZE, "kvl_attention_params.struct_size is 0");
    p.reserved = 1;
    TRY(KVL_STATUS_INVALID_ENUM, "reserved");
    p.reserved2 = 1;
    TRY(KVL_STATUS_INVALID_ENUM, "reserved2");
    p.precision = 3;
    TRY(KVL_STATUS_INVALID_ENUM, "precision is 3");
    p.precision = -1;
    TRY(KVL_STATUS_INVALID_ENUM, "precision is -1");
    /* The size of the struct before it had a precision: later bytes are not read. */
    p.struct_size = offsetof(kvl_attention_params, precision);
    p.precision = 3;
    OK(kvl_attention(context, NULL, workspace, bytes, &p));
    p = good;
    /* The size before layouts, and a size that no version has. */
    p.struct_size = offsetof(kvl_attention_params, layout);
    p.layout = (const kvl_layout *)(const void *)x;
    p.num_sequences = -9;
    p.plan = (const kvl_plan *)(const void *)x;
    paint();
    OK(kvl_attention(context, NULL, workspace, bytes, &p));
    CHECK(stained(), "nothing was written");
    p = good;
    p.struct_size = offsetof(kvl_attention_params, plan);
    TRY(KVL_STATUS_STRUCT_SIZE, "kvl_attention_params.struct_size is 656");
    p.flags = 8;
    TRY(KVL_STATUS_INVALID_ENUM, "0x8");
    p.window_left = 4;
    TRY(KVL_STATUS_INVALID_VALUE, "window_left is 4, but its flag is not set");
    p.window_right = -1;
    TRY(KVL_STATUS_INVALID_VALUE, "window_right is -1, but its flag is not set");
    p.flags = KVL_ATTENTION_FLAG_WINDOW_LEFT;
    p.window_left = -2;
    TRY(KVL_STATUS_INVALID_VALUE, "window_left is -2");
    p.flags = KVL_ATTENTION_FLAG_WINDOW_RIGHT;
    p.window_right = -1;
    TRY(KVL_STATUS_INVALID_VALUE, "window_right is -1");
    p.scale = NAN;
    TRY(KVL_STATUS_INVALID_VALUE, "scale");
    p.softcap = -1;
    TRY(KVL_STATUS_INVALID_VALUE, "softcap is -1");
    p.q.data = NULL;
    TRY(KVL_STATUS_NULL_POINTER, "q: data is null");
    p.out.data = NULL;
    TRY(KVL_STATUS_NULL_POINTER, "out: data is null");
    p.v.dtype = 55;
    TRY(KVL_STATUS_INVALID_ENUM, "v.dtype is 55");
    p.k.dtype = 77;
    TRY(KVL_STATUS_INVALID_ENUM, "k.dtype is 77");
    p.q.shape[2] = 3;
    p.out.shape[2] = 3;
    TRY(KVL_STATUS_SHAPE, "3 heads, which is no multiple of the 2");
    p.q.shape[3] = 7;
    TRY(KVL_STATUS_SHAPE, "dim");
    p.q.shape[3] = p.k.shape[3] = 1025;
    TRY(KVL_STATUS_SHAPE, "1024");
    p.k.shape[0] = 1;
    TRY(KVL_STATUS_SHAPE, "batch");
    p.v.shape[1] = -5;
    TRY(KVL_STATUS_SHAPE, "v has seq = -5");
    p.q.strides[1] = INT64_MIN;
    TRY(KVL_STATUS_STRIDE, "q");
    p.out.strides[1] = 0;
    TRY(KVL_STATUS_STRIDE, "out");
    p.k.bytes = 4;
    TRY(KVL_STATUS_BOUNDS, "k");
    p.lengths = LIST(5, 6);
    TRY(KVL_STATUS_OUT_OF_RANGE, "lengths[1] is 6");
    p.lengths = LIST(-1, 5);
    TRY(KVL_STATUS_OUT_OF_RANGE, "lengths[0] is -1");
    p.kv_starts = LIST(0, -3);
    TRY(KVL_STATUS_OUT_OF_RANGE, "kv_starts[1] is -3");
    p.lengths = (const int32_t *)(const void *)((const char *)list + 2);
    TRY(KVL_STATUS_BOUNDS, "lengths");
    p.alibi_slopes = (const float *)(const void *)((const char *)ones + 1);
    TRY(KVL_STATUS_BOUNDS, "alibi_slopes");
    p.sink_logits = (const float *)(const void *)((const char *)ones + 1);
    TRY(KVL_STATUS_BOUNDS, "sink_logits");
    p.lse = (float *)(void *)(output.bytes + 4001);
    TRY(KVL_STATUS_BOUNDS, "lse");
    p.mask.data = mask;
    TRY(KVL_STATUS_SHAPE, "mask has shape");
    p.mask.shape[0] = 2, p.mask.shape[1] = 3, p.mask.shape[2] = 4, p.mask.shape[3] = 5;
    TRY(KVL_STATUS_NULL_POINTER, "mask: data is null");
    p.mask.data = mask;
    p.mask.shape[0] = 2, p.mask.shape[1] = 3, p.mask.shape[2] = 4, p.mask.shape[3] = 5;
    p.mask.strides[0] = 1;
    p.mask.bytes = 1;
    TRY(KVL_STATUS_BOUNDS, "mask");
    p.mask.data = mask;
    p.mask.shape[3] = -1;
    TRY(KVL_STATUS_SHAPE, "mask has keys = -1");
    p.bias = kvl_make_const_view(x, KVL_DTYPE_F32, 3, 3, 4, 5);
    TRY(KVL_STATUS_SHAPE, "bias has shape");
    p.bias = kvl_make_const_view(x, 5, 2, 3, 4, 5);
    TRY(KVL_STATUS_INVALID_ENUM, "bias.dtype");
    p.bias = kvl_make_const_view(output.floats, KVL_DTYPE_F32, 2, 3, 4, 5);
    TRY(KVL_STATUS_OVERLAP, "bias and out share memory");
    p.v.data = output.floats + 1;
    TRY(KVL_STATUS_OVERLAP, "v and out share memory");
    p.q.data = output.floats;
    TRY(KVL_STATUS_OVERLAP, "q and out share memory");
    p.lse = output.floats + 7;
    TRY(KVL_STATUS_OVERLAP, "out and lse share memory");
    {
        /* Caches of two rows, or pages, of five slots. */
        static const int32_t pages[] = {0, 2}, good_pages[] = {1, 0}, beams[] = {0, 0, 1, 1, 1, 0, 0, 0, 0, 2};
        static const int32_t starts[] = {0, 2, 5}, falling[] = {0, 4, 3}, prefixes[] = {0, 3};
        kvl_layout layout = KVL_LAYOUT_INIT;
#define LAYOUT(status, text)                                                                                           \
    do {                                                                                                               \
        p.layout = &layout;                                                                                            \
        TRY(status, text);                                                                                             \
        layout = (kvl_layout)KVL_LAYOUT_INIT;                                                                          \
    } while (0)
#define PAGED(entries) (layout.kind = KVL_LAYOUT_KIND_PAGED, layout.num_sequences = 2, layout.pages_per_sequence = 1, layout.table = (entries))
        layout.struct_size = 8;
        LAYOUT(KVL_STATUS_STRUCT_SIZE, "kvl_layout.struct_size is 8");
        layout.kind = 5;
        LAYOUT(KVL_STATUS_INVALID_ENUM, "kind is 5");
        layout.kind = -1;
        LAYOUT(KVL_STATUS_INVALID_ENUM, "kind is -1");
        layout.sink_tokens = 1;
        LAYOUT(KVL_STATUS_INVALID_VALUE, "sink_tokens is 1, but the layout is no ring");
        layout.pages_per_sequence = 3;
        LAYOUT(KVL_STATUS_INVALID_VALUE, "pages_per_sequence is 3, but the layout is not paged");
        layout.table = pages;
        LAYOUT(KVL_STATUS_INVALID_VALUE, "a table, but kind 0 takes none");
        PAGED(NULL);
        LAYOUT(KVL_STATUS_NULL_POINTER, "table");
        PAGED(good_pages);
        layout.pages_per_sequence = 0;
        LAYOUT(KVL_STATUS_INVALID_VALUE, "lengths is absent"); /* Right as long as there are no tokens. */
        PAGED(good_pages);
        layout.num_sequences = -2;
        LAYOUT(KVL_STATUS_SHAPE, "num_sequences is -2");
        PAGED(good_pages);
        LAYOUT(KVL_STATUS_INVALID_VALUE, "lengths is absent");
        PAGED(good_pages);
        p.lengths = LIST(5, 5);
        layout.num_sequences = 1;
        LAYOUT(KVL_STATUS_SHAPE, "k has sequences = 1, but q has 2");
        PAGED(good_pages);
        p.lengths = LIST(5, 6);
        LAYOUT(KVL_STATUS_OUT_OF_RANGE, "lengths[1] is 6");
        PAGED(pages);
        p.lengths = LIST(5, 1);
        LAYOUT(KVL_STATUS_OUT_OF_RANGE, "page_table[1, 0] is 2, but k has batch = 2");
        layout.kind = KVL_LAYOUT_KIND_INDIRECT;
        layout.num_sequences = 2;
        layout.table = beams;
        LAYOUT(KVL_STATUS_OUT_OF_RANGE, "beam_table[1, 4] is 2, but k has batch = 2");
        layout.kind = KVL_LAYOUT_KIND_RAGGED;
        layout.num_sequences = 2;
        layout.table = starts;
        LAYOUT(KVL_STATUS_SHAPE, "k has batch = 2, but ragged sequences lie in a batch of one");
        layout.kind = KVL_LAYOUT_KIND_RAGGED;
        layout.num_sequences = 2;
        layout.table = falling;
        p.k.shape[0] = p.v.shape[0] = 1;
        LAYOUT(KVL_STATUS_OUT_OF_RANGE, "cu_seqlens[2] is 3, but cu_seqlens[1] is 4");
        layout.kind = KVL_LAYOUT_KIND_RING;
        LAYOUT(KVL_STATUS_INVALID_VALUE, "lengths is absent");
        layout.kind = KVL_LAYOUT_KIND_RING;
        layout.sink_tokens = 5;
        p.lengths = LIST(5, 5);
        LAYOUT(KVL_STATUS_CAPACITY, "5 sink tokens, but k has 5 slots");
        /* Three queries without a window, after two tokens were overwritten. */
        layout.kind = KVL_LAYOUT_KIND_RING;
        p.lengths = LIST(5, 7);
        LAYOUT(KVL_STATUS_CAPACITY, "sequence 1 sees keys from 0 on, but of its 7 tokens the ring retains those from 2");
        layout.kind = KVL_LAYOUT_KIND_RING;
        layout.sink_tokens = 2;
        p.lengths = LIST(4, 6);
        p.prefix_lengths = prefixes;
        p.flags = KVL_ATTENTION_FLAG_WINDOW_LEFT;
        LAYOUT(KVL_STATUS_CAPACITY, "prefix_lengths[1] is 3, but the ring keeps 2 sink tokens");
#undef PAGED
#undef LAYOUT
        p.prefix_lengths = LIST(6, 0);
        TRY(KVL_STATUS_OUT_OF_RANGE, "prefix_lengths[0] is 6");
        p.prefix_lengths = LIST(0, -1);
        TRY(KVL_STATUS_OUT_OF_RANGE, "prefix_lengths[1] is -1");
        p.num_sequences = 2;
        TRY(KVL_STATUS_INVALID_VALUE, "num_sequences is 2, but there are no cu_seqlens_q");
        p.num_sequences = 2;
        p.cu_seqlens_q = starts;
        TRY(KVL_STATUS_SHAPE, "cu_seqlens_q");
    }
    {
        static const unsigned char bits[16];
        kvl_bit_mask good_mask = KVL_BIT_MASK_INIT, bit_mask;
        good_mask.data = bits;
        good_mask.bytes = sizeof bits;
        good_mask.shape[0] = 2, good_mask.shape[1] = 3, good_mask.shape[2] = 4, good_mask.shape[3] = 5;
        good_mask.strides[0] = 24, good_mask.strides[1] = 8;
        bit_mask = good_mask;
#define MASK(status, text)                                                                                             \
    do {                                                                                                               \
        p.bit_mask = &bit_mask;                                                                                        \
        TRY(status, text);                                                                                             \
        bit_mask = good_mask;                                                                                          \
    } while (0)
        bit_mask.struct_size = 4;
        MASK(KVL_STATUS_STRUCT_SIZE, "kvl_bit_mask.struct_size is 4");
        bit_mask.data = NULL;
        MASK(KVL_STATUS_NULL_POINTER, "bit_mask: data is null");
        bit_mask.bytes = 5;
        MASK(KVL_STATUS_BOUNDS, "reaches bytes 0..6 of a buffer of 5");
        bit_mask.offset = -1;
        MASK(KVL_STATUS_BOUNDS, "reaches bytes -1..6");
        bit_mask.strides[0] = INT64_MAX;
        MASK(KVL_STATUS_BOUNDS, "of a buffer of 16");
        bit_mask.shape[3] = 4;
        MASK(KVL_STATUS_SHAPE, "bit_mask ends at key 4 of sequence 0, which has 5 keys");
        bit_mask.shape[1] = 2;
        MASK(KVL_STATUS_SHAPE, "bit_mask has shape [2, 2, 4, 5]");
        bit_mask.shape[2] = -4;
        MASK(KVL_STATUS_SHAPE, "bit_mask has heads = -4");
        bit_mask.first_keys = LIST(0, -1);
        MASK(KVL_STATUS_OUT_OF_RANGE, "first_keys[1] of bit_mask is -1");
        bit_mask.data = output.bytes;
        MASK(KVL_STATUS_OVERLAP, "bit_mask and out share memory");
        {
            /* Three queries a row: of 5 keys from bit 3 on, 5 bits apart; of 4 keys from bit 20 on, 9 bits apart. */
            static const int64_t row_starts[] = {3, 20}, widths[] = {5, 9}, before[] = {3, -20}, backwards[] = {-5, 9},
                                 far[] = {3, INT64_MAX}, wide[] = {INT64_MAX, 9};
            good_mask.strides[0] = good_mask.strides[1] = 0;
            good_mask.bit_offsets = row_starts;
            good_mask.query_strides = widths;
            good_mask.bytes = 6;
            bit_mask = good_mask;
#define ROWS(status, text)                                                                                             \
    do {                                                                                                               \
        p.lengths = LIST(5, 4);                                                                                        \
        MASK(status, text);                                                                                            \
    } while (0)
            p.lengths = LIST(5, 4);
            p.bit_mask = &bit_mask;
            OK(kvl_attention(context, NULL, workspace, bytes, &p));
            bit_mask.bytes = 5;
            ROWS(KVL_STATUS_BOUNDS, "the 3 queries of 4 keys of sequence 1, 9 bits apart from bit 20, reach bytes 2..6 of a buffer of 5");
            bit_mask.strides[2] = 1;
            bit_mask.bytes = 5;
            ROWS(KVL_STATUS_BOUNDS, "sequence 1, 9 bits apart from bit 20, reach bytes 2..6");
            bit_mask.strides[2] = -2;
            ROWS(KVL_STATUS_BOUNDS, "sequence 0, 5 bits apart from bit 3, reach bytes -1..3");
            bit_mask.bit_offsets = far;
            ROWS(KVL_STATUS_BOUNDS, "9 bits apart from bit 9223372036854775807, reach bytes");
            bit_mask.bytes = 0;
            bit_mask.query_strides = wide;
            ROWS(KVL_STATUS_STRIDE, "sequence 0, 9223372036854775807 bits apart from bit 3, leave the address space");
            bit_mask.bit_offsets = before;
            ROWS(KVL_STATUS_OUT_OF_RANGE, "bit_offsets[1] of bit_mask is -20, which is negative");
            bit_mask.query_strides = backwards;
            ROWS(KVL_STATUS_OUT_OF_RANGE, "query_strides[0] of bit_mask is -5, which is negative");
            bit_mask.query_strides = NULL;
            ROWS(KVL_STATUS_INVALID_VALUE, "bit_mask has bit_offsets, but query_strides is null");
            bit_mask.bit_offsets = NULL;
            ROWS(KVL_STATUS_INVALID_VALUE, "bit_mask has query_strides, but bit_offsets is null");
            bit_mask.offset = 8;
            ROWS(KVL_STATUS_INVALID_VALUE, "bit_mask has bit_offsets, but its offset, which they replace, is 8");
            bit_mask.strides[1] = 5;
            ROWS(KVL_STATUS_INVALID_VALUE, "strides[1], which they replace, is 5");
            bit_mask.bit_offsets = (const int64_t *)(const void *)((const char *)row_starts + 4);
            ROWS(KVL_STATUS_BOUNDS, "bit_offsets of bit_mask at");
            bit_mask.shape[3] = 4;
            ROWS(KVL_STATUS_SHAPE, "bit_mask ends at key 4 of sequence 0, which has 5 keys");
            bit_mask.data = output.bytes;
            bit_mask.bytes = 0;
            ROWS(KVL_STATUS_OVERLAP, "bit_mask and out share memory");
#undef ROWS
        }
#undef MASK
    }
    {
        /* Two rows of three queries; the second has space for one more token. */
        static const int32_t one[] = {1, 1}, two[] = {0, 2}, negative[] = {1, -1};
        kvl_plan *plan = NULL, **made = (kvl_plan **)&output.pointer;
        p.lengths = LIST(3, 4);
        OK(kvl_plan_create(&p, &plan));
        p = good;
        p.plan = plan;
        REFUSED(KVL_STATUS_INVALID_VALUE, "a plan is to be made", kvl_plan_create(&p, made));
        p.lengths = LIST(3, 4);
        TRY(KVL_STATUS_INVALID_VALUE, "both plan and lengths");
        p.plan = plan;
        p.flags = KVL_ATTENTION_FLAG_CAUSAL;
        TRY(KVL_STATUS_INVALID_VALUE, "both plan and flags");
        p.plan = plan;
        p.prefix_lengths = one;
        TRY(KVL_STATUS_INVALID_VALUE, "both plan and prefix_lengths");
        p.plan = plan;
        p.q.shape[1] = p.out.shape[1] = 2;
        TRY(KVL_STATUS_SHAPE, "the plan is for q of batch and seq [2, 3], but q has [2, 2]");
        p.plan = plan;
        p.k.shape[1] = p.v.shape[1] = 4;
        TRY(KVL_STATUS_SHAPE, "the plan is for k of batch and seq [2, 5], but k has [2, 4]");
        REFUSED(KVL_STATUS_NULL_POINTER, "kvl_attention_params", kvl_plan_create(NULL, made));
        REFUSED(KVL_STATUS_NULL_POINTER, "plan", kvl_plan_create(&p, NULL));
        REFUSED(KVL_STATUS_NULL_POINTER, "plan", kvl_plan_update(NULL, &p));
        REFUSED(KVL_STATUS_NULL_POINTER, "plan", kvl_plan_advance(NULL, one, 2));
        REFUSED(KVL_STATUS_NULL_POINTER, "plan", kvl_plan_set_table(NULL, 0, 0, one, 1));
        p.lengths = LIST(3, 6);
        REFUSED(KVL_STATUS_OUT_OF_RANGE, "lengths[1] is 6", kvl_plan_create(&p, made));
        REFUSED(KVL_STATUS_OUT_OF_RANGE, "lengths[1] is 6", kvl_plan_update(plan, &p));
        p = good;
        REFUSED(KVL_STATUS_NULL_POINTER, "counts", kvl_plan_advance(plan, NULL, 2));
        REFUSED(KVL_STATUS_SHAPE, "counts has 1 entries, but the plan has 2 sequences", kvl_plan_advance(plan, one, 1));
        REFUSED(KVL_STATUS_SHAPE, "num_sequences is -1", kvl_plan_advance(plan, one, -1));
        REFUSED(KVL_STATUS_OUT_OF_RANGE, "counts[1] is -1", kvl_plan_advance(plan, negative, 2));
        REFUSED(KVL_STATUS_CAPACITY, "has 4 tokens and is given 2 more, but has room for 5", kvl_plan_advance(plan, two, 2));
        REFUSED(KVL_STATUS_INVALID_VALUE, "no table", kvl_plan_set_table(plan, 0, 0, one, 1));
        /* None of these calls has changed it. */
        OK(kvl_plan_advance(plan, one, 2));
        REFUSED(KVL_STATUS_CAPACITY, "has 5 tokens", kvl_plan_advance(plan, one, 2));
        {
            static const int32_t pages[] = {1, -1, 0, -1}, bad[] = {2};
            kvl_layout layout = KVL_LAYOUT_INIT;
            layout.kind = KVL_LAYOUT_KIND_PAGED;
            layout.num_sequences = layout.pages_per_sequence = 2;
            layout.table = pages;
            p.layout = &layout;
            p.lengths = LIST(5, 4);
            OK(kvl_plan_update(plan, &p));
            REFUSED(KVL_STATUS_OUT_OF_RANGE, "page_table[0, 1] is -1, but k has batch = 2", kvl_plan_advance(plan, one, 2));
            REFUSED(KVL_STATUS_OUT_OF_RANGE, "entry 0 of sequence 1 is 2", kvl_plan_set_table(plan, 1, 0, bad, 1));
            REFUSED(KVL_STATUS_OUT_OF_RANGE, "sequence 2", kvl_plan_set_table(plan, 2, 0, one, 1));
            REFUSED(KVL_STATUS_OUT_OF_RANGE, "entries 1..3", kvl_plan_set_table(plan, 1, 1, one, 2));
            REFUSED(KVL_STATUS_SHAPE, "first is -1", kvl_plan_set_table(plan, 1, -1, one, 1));
            REFUSED(KVL_STATUS_NULL_POINTER, "entries", kvl_plan_set_table(plan, 1, 1, NULL, 1));
            OK(kvl_plan_set_table(plan, 0, 1, one, 1));
            OK(kvl_plan_advance(plan, one, 2));
            p = good;
        }
        {
            static const unsigned char bits[16] = {1};
            kvl_bit_mask by_head = KVL_BIT_MASK_INIT;
            by_head.data = bits;
            by_head.bytes = sizeof bits;
            by_head.shape[0] = 2, by_head.shape[1] = 3, by_head.shape[2] = 4, by_head.shape[3] = 5;
            by_head.strides[2] = 5;
            p.bit_mask = &by_head;
            p.lengths = LIST(3, 4);
            OK(kvl_plan_update(plan, &p));
            by_head.bytes = 2;
            REFUSED(KVL_STATUS_BOUNDS, "reaches bytes 0..3 of a buffer of 2", kvl_plan_update(plan, &p));
            REFUSED(KVL_STATUS_BOUNDS, "reaches bytes 0..3 of a buffer of 2", kvl_plan_create(&p, made));
            by_head.bytes = 0;
            p.q.shape[2] = 2;
            REFUSED(KVL_STATUS_SHAPE, "bit_mask has shape [2, 3, 4, 4], but must have [2, 3, 2, 4]", kvl_plan_update(plan, &p));
            REFUSED(KVL_STATUS_INVALID_VALUE, "the plan holds masks", kvl_plan_advance(plan, one, 2));
            p = good;
            p.plan = plan;
            p.bit_mask = &by_head;
            TRY(KVL_STATUS_INVALID_VALUE, "both plan and bit_mask are given, but bit_mask is the plan's to say");
            p.plan = plan;
            p.mask.data = mask;
            p.mask.shape[0] = 2, p.mask.shape[1] = 3, p.mask.shape[2] = 4, p.mask.shape[3] = 5;
            TRY(KVL_STATUS_INVALID_VALUE, "both plan and mask are given, but mask is the plan's to say");
            p.plan = plan;
            p.q.shape[2] = p.out.shape[2] = 2;
            TRY(KVL_STATUS_SHAPE, "the plan's masks are for q of 4 heads, but q has 2");
            p.plan = plan;
            OK(kvl_attention(context, NULL, workspace, bytes, &p));
            p = good;
        }
        kvl_plan_destroy(plan);
        kvl_plan_destroy(NULL);
    }
    {
        kvl_const_view prefix = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 7, 2, 8), other = prefix;
#define PREFIX(status, text)                                                                                           \
    do {                                                                                                               \
        REFUSED(status, text, kvl_attention_with_prefix(context, NULL, workspace, bytes, &other, &prefix, NULL, &p));        \
        p = good;                                                                                                      \
        other = prefix;                                                                                                \
    } while (0)
        REFUSED(KVL_STATUS_NULL_POINTER, "prefix_k", kvl_attention_with_prefix(context, NULL, workspace, bytes, NULL, &prefix, NULL, &p));
        REFUSED(KVL_STATUS_NULL_POINTER, "prefix_v", kvl_attention_with_prefix(context, NULL, workspace, bytes, &prefix, NULL, NULL, &p));
        REFUSED(KVL_STATUS_WORKSPACE, "1024", kvl_attention_with_prefix(context, NULL, workspace, 1024, &prefix, &prefix, NULL, &p));
        other.shape[0] = 2;
        PREFIX(KVL_STATUS_SHAPE, "batch = 2, but all sequences share one prefix");
        other.shape[2] = 1;
        PREFIX(KVL_STATUS_SHAPE, "heads");
        other.data = output.floats;
        PREFIX(KVL_STATUS_OVERLAP, "the prefix's k and out share memory");
        p.alibi_slopes = ones;
        PREFIX(KVL_STATUS_INVALID_VALUE, "alibi_slopes");
        p.flags = KVL_ATTENTION_FLAG_WINDOW_LEFT;
        PREFIX(KVL_STATUS_INVALID_VALUE, "window_left");
        p.lengths = LIST(5, 6);
        PREFIX(KVL_STATUS_OUT_OF_RANGE, "lengths[1] is 6");
#undef PREFIX
        REFUSED(KVL_STATUS_NULL_POINTER, "prefix_k", kvl_attention_with_prefix_workspace_size(NULL, &p, NULL, needed));
        REFUSED(KVL_STATUS_NULL_POINTER, "bytes", kvl_attention_with_prefix_workspace_size(&prefix, &p, NULL, NULL));
    }
    {
        /* Caches with scales. */
        static float floats[2 * 5 * 2];
        kvl_cache_scales good_scales = KVL_CACHE_SCALES_INIT, scales;
        good_scales.k = good_scales.v = kvl_make_view(floats, KVL_DTYPE_F32, 2, 5, 2, 1);
        good_scales.k.bytes = good_scales.v.bytes = sizeof floats;
        scales = good_scales;
#define SCALES(status, text)                                                                                           \
    do {                                                                                                               \
        p.scales = &scales;                                                                                            \
        TRY(status, text);                                                                                             \
        scales = good_scales;                                                                                          \
        p.k.dtype = p.v.dtype = KVL_FORMAT_INT8;                                                                       \
    } while (0)
        SCALES(KVL_STATUS_INVALID_VALUE, "k is f32, which has no scales, but scales are given");
        p.v.dtype = KVL_FORMAT_BF16;
        SCALES(KVL_STATUS_INVALID_VALUE, "v is bf16, which has no scales, but scales are given");
        memset(&scales.k, 0, sizeof scales.k);
        SCALES(KVL_STATUS_INVALID_VALUE, "k is int8, but has no scales");
        memset(&scales.v, 0, sizeof scales.v);
        SCALES(KVL_STATUS_INVALID_VALUE, "v is int8, but has no scales");
        p.k.dtype = KVL_FORMAT_FP8_E4M3;
        SCALES(KVL_STATUS_STRIDE, "the scales of k have the strides [10, 2, 1, 1], but fp8_e4m3 has one scale per head or per tensor");
        scales.k.dtype = KVL_DTYPE_BF16;
        SCALES(KVL_STATUS_DTYPE, "the scales of k are bf16, which is neither f32 nor f16");
        scales.v.dtype = KVL_FORMAT_INT8;
        SCALES(KVL_STATUS_INVALID_ENUM, "the scales of v.dtype is 3, which is no kvl_dtype");
        scales.k.reserved = 2;
        SCALES(KVL_STATUS_INVALID_ENUM, "the scales of k.reserved is 2");
        scales.struct_size = 16;
        SCALES(KVL_STATUS_STRUCT_SIZE, "kvl_cache_scales.struct_size is 16");
        scales.k.data = NULL;
        SCALES(KVL_STATUS_NULL_POINTER, "data is null");
        scales.v.data = (char *)floats + 2;
        SCALES(KVL_STATUS_BOUNDS, "is not aligned to its 4-byte elements");
        scales.k.bytes--;
        SCALES(KVL_STATUS_BOUNDS, "reaches byte 80 of a buffer of 79");
        scales.v.strides[1] = -2;
        SCALES(KVL_STATUS_BOUNDS, "bytes before the start of its buffer");
        scales.k.strides[0] = INT64_MAX;
        SCALES(KVL_STATUS_STRIDE, "the scales of k");
        scales.v.shape[3] = 2;
        SCALES(KVL_STATUS_SHAPE, "the scales of v have the shape [2, 5, 2, 2], but one per token and head is [2, 5, 2, 1]");
        scales.k.data = output.floats, scales.k.bytes = 0;
        SCALES(KVL_STATUS_OVERLAP, "k and out share memory");
        scales.v.data = output.floats + 2 * 3 * 4 * 8 + 5, scales.v.bytes = 0;
        SCALES(KVL_STATUS_OVERLAP, "share memory");
        scales.k_affine = KVL_AFFINE_SIGNED;
        SCALES(KVL_STATUS_INVALID_VALUE, "k_affine, v_affine = 0x1, but are those of int8");
        scales.v_zeros = scales.v;
        SCALES(KVL_STATUS_INVALID_VALUE, "the scales of v have zero points");
        p.k.dtype = KVL_FORMAT_AFFINE8;
        scales.k_affine = KVL_AFFINE_SIGNED | KVL_AFFINE_OFFSET;
        SCALES(KVL_STATUS_INVALID_ENUM, "the scales of k have the bits 1 and 2 of KVL_AFFINE, which exclude each other");
        p.k.dtype = KVL_FORMAT_AFFINE8;
        scales.k_affine = 64;
        SCALES(KVL_STATUS_INVALID_ENUM, "the scales of k have unknown bits 0x40 of KVL_AFFINE");
        p.k.dtype = KVL_FORMAT_AFFINE8;
        scales.k_zeros = scales.k;
        scales.k_zeros.dtype = 18;
        SCALES(KVL_STATUS_INVALID_ENUM, "the zero points of k.dtype is 18, which is no kvl_dtype");
        p.k.dtype = KVL_FORMAT_AFFINE8;
        memset(&scales.k, 0, sizeof scales.k);
        SCALES(KVL_STATUS_INVALID_VALUE, "k is affine8, but has no scales");
        p.k.dtype = KVL_FORMAT_AFFINE8;
        scales.k.shape[1] = 3;
        SCALES(KVL_STATUS_SHAPE, "the scales of k have seq = 3, which does not divide the 5 of k");
        p.v_packing = KVL_PACKING_ROW_PAIRS;
        SCALES(KVL_STATUS_UNSUPPORTED, "v is int8, whose values are never packed in pairs");
        p.q.dtype = KVL_FORMAT_INT8;
        SCALES(KVL_STATUS_INVALID_ENUM, "q.dtype is 3, which is no kvl_dtype");
        p.out.dtype = KVL_FORMAT_INT8;
        SCALES(KVL_STATUS_INVALID_ENUM, "out.dtype is 3, which is no kvl_dtype");
        p = good;
#undef SCALES
    }
#undef TRY
    REFUSED(KVL_STATUS_NULL_POINTER, "kvl_attention_params", kvl_attention_workspace_size(NULL, NULL, needed));
    REFUSED(KVL_STATUS_NULL_POINTER, "bytes", kvl_attention_workspace_size(&p, NULL, NULL));
    p.q.shape[1] = INT64_MAX;
    REFUSED(KVL_STATUS_SHAPE, "q", kvl_attention_workspace_size(&p, NULL, needed));
    p.q.shape[1] = -1;
    REFUSED(KVL_STATUS_SHAPE, "negative", kvl_attention_workspace_size(&p, NULL, needed));
    p = good;
    p.v.shape[3] = 0;
    REFUSED(KVL_STATUS_SHAPE, "v has dim = 0", kvl_attention_workspace_size(&p, NULL, needed));
    p = good;
    paint();
    OK(kvl_attention_workspace_size(&p, NULL, needed));
    CHECK(*needed > 0 && *needed <= bytes, "%d bytes", (int)*needed);
    OK(kvl_attention(context, NULL, workspace, bytes, &p));
#undef LIST
}

static void merge(void) {
    static float x[16];
    static const float lse_in[4];
    float *lse = output.floats + 16;
    kvl_attention_state good[2], states[2];
    kvl_view out = kvl_make_view(output.floats, KVL_DTYPE_F32, 1, 2, 2, 4);
    good[0].out = good[1].out = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 2, 2, 4);
    good[0].lse = good[1].lse = lse_in;
    memcpy(states, good, sizeof good);
#define TRY(status, text)                                                                                              \
    do {                                                                                                               \
        REFUSED(status, text, kvl_merge_states(context, NULL, states, 2, &out, lse));                                  \
        memcpy(states, good, sizeof good);                                                                             \
    } while (0)
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_merge_states(NULL, NULL, states, 2, &out, lse));
    REFUSED(KVL_STATUS_NULL_POINTER, "states", kvl_merge_states(context, NULL, NULL, 2, &out, lse));
    REFUSED(KVL_STATUS_NULL_POINTER, "out", kvl_merge_states(context, NULL, states, 2, NULL, lse));
    REFUSED(KVL_STATUS_INVALID_VALUE, "0 states", kvl_merge_states(context, NULL, states, 0, &out, lse));
    REFUSED(KVL_STATUS_INVALID_VALUE, "257 states", kvl_merge_states(context, NULL, states, 257, &out, lse));
    states[1].lse = NULL;
    TRY(KVL_STATUS_NULL_POINTER, "states[1].lse");
    states[0].out.dtype = KVL_DTYPE_BF16;
    TRY(KVL_STATUS_DTYPE, "bf16");
    states[0].out.dtype = 44;
    TRY(KVL_STATUS_INVALID_ENUM, "44");
    states[1].out.shape[1] = 1;
    TRY(KVL_STATUS_SHAPE, "seq");
    states[1].out.data = output.floats + 15;
    TRY(KVL_STATUS_OVERLAP, "state 1 and out share memory");
    states[0].lse = lse;
    TRY(KVL_STATUS_OVERLAP, "state 0 and lse share memory");
    out.strides[3] = 0;
    TRY(KVL_STATUS_STRIDE, "out");
#undef TRY
}

static void chunks(void) {
    enum { LEN = 2 * 3 * 4 * (16 + 16) };
    static float x[2 * 5 * 4 * 8], of_spans[2 * LEN], sinks[4];
    static union {
        unsigned char bytes[(1 << 18) + 64];
        double aligned;
    } memory;
    static const int32_t starts[] = {0, 2, 3}, all[] = {5, 5};
    void *workspace = memory.bytes + (64 - (uintptr_t)memory.bytes % 64) % 64;
    size_t bytes = 1 << 18, *needed = (size_t *)output.bytes;
    int64_t *len = (int64_t *)output.bytes;
    float *states = output.floats;
    int i;
    {
        static int32_t lengths[LEN + 1];
        kvl_attention_params good = KVL_ATTENTION_PARAMS_INIT, p;
        kvl_layout layout = KVL_LAYOUT_INIT;
        good.q = kvl_make_const_view(x, KVL_DTYPE_F32, 2, 3, 4, 8);
        good.k = good.v = kvl_make_const_view(x, KVL_DTYPE_F32, 2, 5, 2, 8);
        p = good;
#define TRY(status, text)                                                                                              \
    do {                                                                                                               \
        REFUSED(status, text, kvl_attention_chunks(context, NULL, workspace, bytes, &p, states, LEN));                 \
        p = good;                                                                                                      \
    } while (0)
        REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_attention_chunks(NULL, NULL, workspace, bytes, &p, states, LEN));
        REFUSED(KVL_STATUS_NULL_POINTER, "kvl_attention_params",
                kvl_attention_chunks(context, NULL, workspace, bytes, NULL, states, LEN));
        REFUSED(KVL_STATUS_WORKSPACE, "needs", kvl_attention_chunks(context, NULL, workspace, 64, &p, states, LEN));
        REFUSED(KVL_STATUS_WORKSPACE, "aligned", kvl_attention_chunks(context, NULL, NULL, bytes, &p, states, LEN));
        REFUSED(KVL_STATUS_WORKSPACE, "aligned",
                kvl_attention_chunks(context, NULL, (char *)workspace + 32, bytes - 32, &p, states, LEN));
        REFUSED(KVL_STATUS_NULL_POINTER, "states: data is null",
                kvl_attention_chunks(context, NULL, workspace, bytes, &p, NULL, LEN));
        REFUSED(KVL_STATUS_SHAPE, "states has 767 floats, but must have 768 for 5 keys",
                kvl_attention_chunks(context, NULL, workspace, bytes, &p, states, LEN - 1));
        REFUSED(KVL_STATUS_SHAPE, "states has 769 floats", kvl_attention_chunks(context, NULL, workspace, bytes, &p, states, LEN + 1));
        REFUSED(KVL_STATUS_SHAPE, "states_len is -1, which is negative",
                kvl_attention_chunks(context, NULL, workspace, bytes, &p, states, -1));
        REFUSED(KVL_STATUS_BOUNDS, "states: data",
                kvl_attention_chunks(context, NULL, workspace, bytes, &p, (float *)(void *)(output.bytes + 2), LEN));
        REFUSED(KVL_STATUS_OVERLAP, "q and states share memory",
                kvl_attention_chunks(context, NULL, workspace, bytes, &p, x + 191, LEN));
        p.v.data = output.floats + LEN - 1;
        TRY(KVL_STATUS_OVERLAP, "v and states share memory");
        /* At the end of the states, outside of the outputs of these rows. */
        p.k.data = output.floats + LEN - 1;
        TRY(KVL_STATUS_OVERLAP, "k and states share memory");
        p.mask.data = output.bytes + LEN * sizeof(float) - 1;
        p.mask.shape[0] = 2, p.mask.shape[1] = 3, p.mask.shape[2] = 4, p.mask.shape[3] = 5;
        TRY(KVL_STATUS_OVERLAP, "mask and states share memory");
        p.bias = kvl_make_const_view(output.floats + LEN - 1, KVL_DTYPE_F32, 2, 3, 4, 5);
        TRY(KVL_STATUS_OVERLAP, "bias and states share memory");
        for (i = 0; i <= LEN; i++) lengths[i] = 5;
        p.lengths = lengths;
        REFUSED(KVL_STATUS_OVERLAP, "lengths and states share memory",
                kvl_attention_chunks(context, NULL, workspace, bytes, &p, (float *)(void *)(lengths + 1), LEN));
        p.lengths = all;
        p.kv_starts = p.offsets = lengths;
        REFUSED(KVL_STATUS_OVERLAP, "kv_starts and states share memory",
                kvl_attention_chunks(context, NULL, workspace, bytes, &p, (float *)(void *)lengths, LEN));
        p = good;
        p.alibi_slopes = of_spans;
        REFUSED(KVL_STATUS_OVERLAP, "alibi_slopes and states share memory",
                kvl_attention_chunks(context, NULL, workspace, bytes, &p, of_spans + 3, LEN));
        p = good;
        p.sink_logits = sinks;
        TRY(KVL_STATUS_INVALID_VALUE, "sink_logits are given where segments are merged");
        p.out = kvl_make_view(output.floats + LEN, KVL_DTYPE_F32, 2, 3, 4, 8);
        TRY(KVL_STATUS_INVALID_VALUE, "out is given where segments are merged");
        p.lse = output.floats + LEN;
        TRY(KVL_STATUS_INVALID_VALUE, "lse is given where segments are merged");
        p.v.dtype = -4;
        TRY(KVL_STATUS_INVALID_ENUM, "v.dtype is -4");
        p.flags = 8;
        TRY(KVL_STATUS_INVALID_ENUM, "0x8");
        p.layout = &layout;
        p.lengths = all;
        layout.kind = KVL_LAYOUT_KIND_RING;
        REFUSED(KVL_STATUS_INVALID_VALUE, "a ring is no segment", kvl_attention_chunks_states_len(&p, len));
        REFUSED(KVL_STATUS_INVALID_VALUE, "a ring is no segment", kvl_attention_chunks_workspace_size(&p, NULL, needed));
        TRY(KVL_STATUS_INVALID_VALUE, "a ring is no segment");
        p.q = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 3, 4, 8);
        p.cu_seqlens_q = starts;
        p.num_sequences = 2;
        REFUSED(KVL_STATUS_INVALID_VALUE, "ragged queries have no format", kvl_attention_chunks_states_len(&p, len));
        REFUSED(KVL_STATUS_INVALID_VALUE, "ragged queries have no format", kvl_attention_chunks_workspace_size(&p, NULL, needed));
        {
            kvl_plan *plan = NULL;
            kvl_attention_params planned = good;
            OK(kvl_plan_create(&p, &plan));
            planned.q = p.q;
            planned.plan = plan;
            REFUSED(KVL_STATUS_INVALID_VALUE, "ragged queries have no format", kvl_attention_chunks_states_len(&planned, len));
            kvl_plan_destroy(plan);
        }
        TRY(KVL_STATUS_INVALID_VALUE, "ragged queries have no format");
#undef TRY
        REFUSED(KVL_STATUS_NULL_POINTER, "kvl_attention_params", kvl_attention_chunks_states_len(NULL, len));
        REFUSED(KVL_STATUS_NULL_POINTER, "len", kvl_attention_chunks_states_len(&p, NULL));
        REFUSED(KVL_STATUS_NULL_POINTER, "kvl_attention_params", kvl_attention_chunks_workspace_size(NULL, NULL, needed));
        REFUSED(KVL_STATUS_NULL_POINTER, "bytes", kvl_attention_chunks_workspace_size(&p, NULL, NULL));
        p.q.shape[0] = p.q.shape[1] = p.q.shape[2] = p.k.shape[1] = INT32_MAX;
        REFUSED(KVL_STATUS_SHAPE, "more than an address space holds", kvl_attention_chunks_states_len(&p, len));
        p.q.shape[1] = -2;
        REFUSED(KVL_STATUS_SHAPE, "negative", kvl_attention_chunks_states_len(&p, len));
    }
    {
        kvl_chunk_states good_spans[2], spans[257];
        kvl_merge_chunks_params good = KVL_MERGE_CHUNKS_PARAMS_INIT, p;
        for (i = 0; i < 2; i++) {
            good_spans[i].states = of_spans + i * LEN;
            good_spans[i].len = LEN;
        }
        memcpy(spans, good_spans, sizeof good_spans);
        good.segments = spans;
        good.num_segments = 2;
        good.kv_heads = 2;
        good.sink_logits = sinks;
        good.out = kvl_make_view(output.floats, KVL_DTYPE_F32, 2, 3, 4, 8);
        good.lse = output.floats + 2 * 3 * 4 * 8;
        p = good;
#define TRY(status, text)                                                                                              \
    do {                                                                                                               \
        REFUSED(status, text, kvl_merge_chunks(context, NULL, workspace, bytes, &p));                                  \
        p = good;                                                                                                      \
        memcpy(spans, good_spans, sizeof good_spans);                                                                  \
    } while (0)
/* Errors that do not depend on addresses: the function for the workspace size must report them too. */
#define BOTH(status, text)                                                                                             \
    do {                                                                                                               \
        REFUSED(status, text, kvl_merge_chunks_workspace_size(&p, NULL, needed));                                      \
        TRY(status, text);                                                                                             \
    } while (0)
        REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_merge_chunks(NULL, NULL, workspace, bytes, &p));
        REFUSED(KVL_STATUS_NULL_POINTER, "kvl_merge_chunks_params", kvl_merge_chunks(context, NULL, workspace, bytes, NULL));
        REFUSED(KVL_STATUS_WORKSPACE, "needs", kvl_merge_chunks(context, NULL, workspace, 64, &p));
        REFUSED(KVL_STATUS_WORKSPACE, "aligned", kvl_merge_chunks(context, NULL, (char *)workspace + 32, bytes - 32, &p));
        REFUSED(KVL_STATUS_NULL_POINTER, "kvl_merge_chunks_params", kvl_merge_chunks_workspace_size(NULL, NULL, needed));
        REFUSED(KVL_STATUS_NULL_POINTER, "bytes", kvl_merge_chunks_workspace_size(&p, NULL, NULL));
        p.struct_size = 8;
        BOTH(KVL_STATUS_STRUCT_SIZE, "kvl_merge_chunks_params.struct_size is 8");
        p.segments = NULL;
        BOTH(KVL_STATUS_NULL_POINTER, "segments is null");
        p.num_segments = 0;
        BOTH(KVL_STATUS_INVALID_VALUE, "0 segments");
        p.num_segments = 257;
        BOTH(KVL_STATUS_INVALID_VALUE, "257 segments, but a call merges 1 to 256");
        spans[1].len = -LEN;
        BOTH(KVL_STATUS_SHAPE, "segments[1].len is -768, which is negative");
        spans[1].len = LEN - 1;
        BOTH(KVL_STATUS_SHAPE, "segment 1 has 767 floats, which are no chunks of 768");
        spans[0].len = 0;
        BOTH(KVL_STATUS_SHAPE, "segment 0 has 0 floats");
        p.kv_heads = 3;
        BOTH(KVL_STATUS_SHAPE, "no multiple of kv_heads = 3");
        p.kv_heads = -1;
        BOTH(KVL_STATUS_SHAPE, "kv_heads is -1");
        p.k_format = 14;
        BOTH(KVL_STATUS_INVALID_ENUM, "k_format is 14");
        p.precision = 3;
        BOTH(KVL_STATUS_INVALID_ENUM, "precision is 3");
        p.out.shape[3] = 1025;
        BOTH(KVL_STATUS_SHAPE, "out has dim = 1025");
        p.out.shape[1] = -1;
        BOTH(KVL_STATUS_SHAPE, "negative");
        p.out.strides[3] = 0;
        TRY(KVL_STATUS_STRIDE, "out");
        spans[1].states = NULL;
        TRY(KVL_STATUS_NULL_POINTER, "segment 1 is null, but has 768 floats");
        spans[1].states = (const float *)(const void *)((const char *)of_spans + 2);
        TRY(KVL_STATUS_BOUNDS, "the states of a segment");
        spans[1].states = output.floats + 2 * 3 * 4 * 8 - 1;
        TRY(KVL_STATUS_OVERLAP, "segment 1 and out share memory");
        spans[0].states = output.floats + 2 * 3 * 4 * 9 - 1;
        TRY(KVL_STATUS_OVERLAP, "segment 0 and lse share memory");
        p.sink_logits = output.floats + 2 * 3 * 4 * 8 - 4;
        TRY(KVL_STATUS_OVERLAP, "sink_logits and out share memory");
        p.sink_logits = p.lse + 1;
        TRY(KVL_STATUS_OVERLAP, "sink_logits and lse share memory");
        p.lse--;
        TRY(KVL_STATUS_OVERLAP, "out and lse share memory");
        p.lse = (float *)(void *)(output.bytes + 2);
        TRY(KVL_STATUS_BOUNDS, "lse");
#undef BOTH
#undef TRY
    }
}

int main(void) {
    kvl_context *made = NULL;
    last_error();
    OK(kvl_context_create(NULL, &made));
    context = made;
    contexts();
    newer_headers();
    runners();
    views();
    frequencies();
    table();
    rope();
    norm();
    pack();
    hadamard();
    kv_write();
    kv_read();
    attention();
    merge();
    chunks();
    kvl_context_destroy(made);
    return finish("errors");
}
