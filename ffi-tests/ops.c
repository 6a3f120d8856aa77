/* Every operation compared with known results, at every level of this machine. */
#include "check.h"

static void library(void) {
    size_t i, j, count = kvl_kernel_count();
    kvl_kernel_info info = KVL_KERNEL_INFO_INIT;
    CHECK(kvl_abi_version() == KVL_ABI_VERSION, "%u", (unsigned)kvl_abi_version());
    CHECK(strchr(kvl_version_string(), '.') != NULL, "%s", kvl_version_string());
    for (i = 0; i <= 16; i++) {
        for (j = 0; j < i; j++) {
            const char *a = kvl_status_string((kvl_status)i), *b = kvl_status_string((kvl_status)j);
            CHECK(strcmp(a, b) != 0, "%d and %d are both %s", (int)i, (int)j, a);
        }
    }
    CHECK(strcmp(kvl_status_string(KVL_STATUS_OK), "ok") == 0, "%s", kvl_status_string(KVL_STATUS_OK));
    CHECK(strcmp(kvl_status_string(-1), "unknown status") == 0, "%s", kvl_status_string(-1));
    CHECK(strcmp(kvl_isa_name(KVL_ISA_AVX512), "avx512") == 0, "%s", kvl_isa_name(KVL_ISA_AVX512));
    CHECK(strcmp(kvl_isa_name(77), "unknown") == 0, "%s", kvl_isa_name(77));
    CHECK(kvl_isa_available(KVL_ISA_BEST) == 1, "-");
    CHECK(kvl_isa_available(KVL_ISA_SCALAR) == 1, "-");
    CHECK(kvl_isa_available(-1) == 0, "-");
    CHECK(count > 0, "%d", (int)count);
    for (i = 0; i < count; i++) {
        OK(kvl_kernel_info_at(i, &info));
        CHECK(strstr(info.name, kvl_isa_name(info.isa)) != NULL, "%s is of %s", info.name, kvl_isa_name(info.isa));
        CHECK(info.available == kvl_isa_available(info.isa), "%s", info.name);
        CHECK(info.max_error >= 0 && info.max_error < 5e-3f, "%s has %g", info.name, (double)info.max_error);
    }
    CHECK(kvl_kernel_info_at(count, &info) == KVL_STATUS_OUT_OF_RANGE, "-");
}

/* The advice is taken for whole pages alone, and moves no byte. */
static void huge_pages(void) {
    const size_t bytes = (size_t)5 << 20;
    unsigned char *data = calloc(bytes, 1);
    int32_t advised = -1;
    size_t i, sum = 0;
    CHECK(data != NULL, "-");
    if (data == NULL) return;
    OK(kvl_advise_huge_pages(data, bytes, &advised));
    CHECK(advised == 0 || advised == 1, "%d", (int)advised);
    memset(data, 3, bytes);
    OK(kvl_advise_huge_pages(data + 1, bytes - 1, &advised));
    for (i = 0; i < bytes; i++) sum += data[i];
    CHECK(sum == 3 * bytes, "%d", (int)sum);
    advised = -1;
    OK(kvl_advise_huge_pages(data, 100, &advised));
    CHECK(advised == 0, "%d", (int)advised);
    OK(kvl_advise_huge_pages(NULL, 0, &advised));
    CHECK(advised == 0, "%d", (int)advised);
    free(data);
}

/* Zero is the choice for this CPU; what is set is there to be read. */
static void tuning(kvl_context *context) {
    kvl_tuning usual = KVL_TUNING_INIT, set = KVL_TUNING_INIT, got = KVL_TUNING_INIT;
    OK(kvl_context_tuning(context, &usual));
    CHECK(usual.block != 0 && usual.block_order != 0 && usual.run != 0 && usual.run_one_row != 0 && usual.run_long_heads != 0 && usual.run_distance != 0 && usual.score_tiles != 0, "%d", (int)usual.block);
    set.block = KVL_PREFETCH_OFF;
    set.block_order = KVL_KEY_ORDER_SEQUENTIAL;
    set.run_one_row = KVL_PREFETCH_SECOND_LEVEL;
    set.run_long_heads = KVL_PREFETCH_NEXT_KEYS;
    set.run_distance = 100;
    set.score_tiles = KVL_SCORE_TILES_NARROW;
    OK(kvl_context_set_tuning(context, &set));
    OK(kvl_context_tuning(context, &got));
    CHECK(got.block == KVL_PREFETCH_OFF && got.block_order == KVL_KEY_ORDER_SEQUENTIAL && got.run_distance == 100, "%d", (int)got.block);
    CHECK(got.run_long_heads == KVL_PREFETCH_NEXT_KEYS && got.score_tiles == KVL_SCORE_TILES_NARROW, "%d", (int)got.run_long_heads);
    CHECK(got.run == usual.run && got.run_one_row == KVL_PREFETCH_SECOND_LEVEL, "%d", (int)got.run);
    /* What was read can be set. */
    OK(kvl_context_set_tuning(context, &usual));
    OK(kvl_context_tuning(context, &got));
    CHECK(memcmp(&usual, &got, sizeof got) == 0, "-");
    OK(kvl_context_set_tuning(context, &set));
    memset(&set, 0, sizeof set);
    set.struct_size = sizeof set;
    OK(kvl_context_set_tuning(context, &set));
    OK(kvl_context_tuning(context, &got));
    CHECK(memcmp(&usual, &got, sizeof got) == 0, "-");
}

static void names(const kvl_context *context) {
    static const kvl_dtype types[] = {KVL_DTYPE_F32, KVL_DTYPE_F16, KVL_DTYPE_BF16};
    static const kvl_op both[] = {KVL_OP_ROPE, KVL_OP_KV_WRITE, KVL_OP_RMS_NORM, KVL_OP_HADAMARD}, one[] = {KVL_OP_REPEAT_KV, KVL_OP_ATTENTION, KVL_OP_MERGE_STATES};
    kvl_isa isa = KVL_ISA_BEST;
    const char *name = NULL, *high = NULL, *other = NULL, *only = "";
    size_t i, s, d;
    OK(kvl_context_isa(context, &isa));
    for (s = 0; s < COUNT(types); s++) {
        OK(kvl_context_kernel_name(context, KVL_OP_ATTENTION, types[s], types[s], &name));
        OK(kvl_context_attention_kernel_names(context, types[s], types[s], KVL_PRECISION_HIGH, &high, &other));
        CHECK(strcmp(high, other) == 0, "%s and %s", high, other);
        int partial = isa == KVL_ISA_AVX512_BF16 || isa == KVL_ISA_AMX || isa == KVL_ISA_NEON_BF16;
        int apart = partial && types[s] == KVL_DTYPE_BF16;
        CHECK(apart == (strcmp(name, high) != 0), "%s and %s", name, high);
        OK(kvl_context_attention_kernel_names(context, types[s], types[s], KVL_PRECISION_DEFAULT, &high, &other));
        CHECK(strcmp(high, other) == 0, "%s and %s", high, other);
        CHECK(strcmp(name, high) == 0, "%s and %s", name, high);
        /* K and V of two formats: a kernel for each, of one level. */
        OK(kvl_context_attention_kernel_names(context, types[s], KVL_FORMAT_INT8, KVL_PRECISION_DEFAULT, &high, &other));
        CHECK(strncmp(other, "attention_int8_", 15) == 0, "%s", other);
        CHECK(strcmp(strrchr(high, '_'), strrchr(other, '_')) == 0, "%s and %s", high, other);
        {
            kvl_packing packing = -1;
            OK(kvl_context_v_packing(context, types[s], &packing));
            CHECK(packing == (strcmp(name, "attention_bf16_amx") == 0 ? KVL_PACKING_ROW_PAIRS : KVL_PACKING_ROWS), "%d", (int)packing);
        }
    }
    OK(kvl_context_attention_kernel_names(context, KVL_FORMAT_INT8, KVL_FORMAT_F16, KVL_PRECISION_INTEGER, &high, &other));
    if (isa == KVL_ISA_AMX) {
        CHECK(strcmp(high, "attention_int8_integer_amx") == 0, "%s", high);
        CHECK(strcmp(other, "attention_f16_avx512") == 0, "%s", other);
    } else if (isa == KVL_ISA_AVX512_VNNI || isa == KVL_ISA_AVX512_BF16) {
        CHECK(strcmp(high, "attention_int8_integer_avx512vnni") == 0, "%s", high);
        CHECK(strcmp(other, "attention_f16_avx512") == 0, "%s", other);
    } else if (isa == KVL_ISA_NEON_I8MM || isa == KVL_ISA_NEON_BF16) {
        CHECK(strcmp(high, "attention_int8_integer_neoni8mm") == 0, "%s", high);
        CHECK(strcmp(other, "attention_f16_neon") == 0, "%s", other);
    } else if (isa == KVL_ISA_NEON_DOTPROD) {
        CHECK(strcmp(high, "attention_int8_integer_neondotprod") == 0, "%s", high);
        CHECK(strcmp(other, "attention_f16_neon") == 0, "%s", other);
    } else if (isa == KVL_ISA_AVX_VNNI) {
        CHECK(strcmp(high, "attention_int8_integer_avxvnni") == 0, "%s", high);
        CHECK(strcmp(other, "attention_f16_avx2") == 0, "%s", other);
    } else {
        OK(kvl_context_attention_kernel_names(context, KVL_FORMAT_INT8, KVL_FORMAT_F16, KVL_PRECISION_DEFAULT, &name, &other));
        CHECK(strcmp(high, name) == 0, "%s and %s", high, name);
    }
    isa = isa == KVL_ISA_AVX512_VNNI    ? KVL_ISA_AVX512
          : isa == KVL_ISA_AVX_VNNI     ? KVL_ISA_AVX2
          : isa == KVL_ISA_NEON_DOTPROD ? KVL_ISA_NEON
          : isa == KVL_ISA_NEON_I8MM    ? KVL_ISA_NEON
                                        : isa;
    if (isa == KVL_ISA_AVX512_BF16 || isa == KVL_ISA_AMX || isa == KVL_ISA_NEON_BF16) {
        /* Another level serves everything else. */
        only = isa == KVL_ISA_AMX           ? "attention_bf16_amx"
               : isa == KVL_ISA_AVX512_BF16 ? "attention_bf16_avx512bf16"
                                            : "attention_bf16_neonbf16";
        OK(kvl_context_kernel_name(context, KVL_OP_ATTENTION, KVL_DTYPE_BF16, KVL_DTYPE_BF16, &name));
        CHECK(strcmp(name, only) == 0, "%s", name);
        isa = isa == KVL_ISA_NEON_BF16 ? KVL_ISA_NEON : KVL_ISA_AVX512;
    }
    OK(kvl_context_kernel_name(context, KVL_OP_ROPE_ANGLES, KVL_DTYPE_F32, KVL_DTYPE_F32, &name));
    CHECK(strstr(name, kvl_isa_name(isa)) != NULL, "%s", name);
    for (s = 0; s < COUNT(types); s++) {
        for (d = 0; d < COUNT(types); d++) {
            for (i = 0; i < COUNT(both); i++) {
                OK(kvl_context_kernel_name(context, both[i], types[s], types[d], &name));
                CHECK(strstr(name, kvl_isa_name(isa)) != NULL, "%s", name);
            }
        }
        for (i = 0; i < COUNT(one); i++) {
            OK(kvl_context_kernel_name(context, one[i], types[s], types[s], &name));
            if (strcmp(name, only) == 0) continue;
            CHECK(strstr(name, kvl_isa_name(isa)) != NULL, "%s", name);
        }
    }
    OK(kvl_context_kernel_name(context, KVL_OP_ATTENTION, KVL_DTYPE_BF16, KVL_DTYPE_BF16, &name));
    CHECK(strncmp(name, "attention_bf16_", 15) == 0, "%s", name);
}

static void frequencies(void) {
    double f[8], magnitude = 0;
    size_t i;
    kvl_rope_frequencies_params p = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    p.rotary_dim = 8; /* The default base. */
    OK(kvl_rope_frequencies(&p, f, 4, &magnitude));
    {
        static const double wanted[] = {1.0, 0.1, 0.01, 0.001};
        for (i = 0; i < 4; i++) NEAR(f[i], wanted[i], 1e-12);
        NEAR(magnitude, 1, 0);
    }
    p.base = 10000;
    p.factor = 4;
    p.scaling = KVL_ROPE_SCALING_LINEAR;
    OK(kvl_rope_frequencies(&p, f, 4, &magnitude));
    {
        static const double wanted[] = {0.25, 0.025, 0.0025, 0.00025};
        for (i = 0; i < 4; i++) NEAR(f[i], wanted[i], 1e-12);
    }
    p.scaling = KVL_ROPE_SCALING_NTK;
    OK(kvl_rope_frequencies(&p, f, 4, &magnitude));
    {
        static const double wanted[] = {1.0, 0.06299605249474366, 0.003968502629920499, 0.00025};
        for (i = 0; i < 4; i++) NEAR(f[i], wanted[i], 1e-12);
    }
    p.scaling = KVL_ROPE_SCALING_LONGROPE;
    {
        static const double factors[] = {1, 2, 3, 4}, wanted[] = {1.0, 0.05, 0.01 / 3, 0.00025};
        p.factors = factors;
        p.factor = 32;
        p.original_max_position = 4096;
        OK(kvl_rope_frequencies(&p, f, 4, &magnitude));
        for (i = 0; i < 4; i++) NEAR(f[i], wanted[i], 1e-12);
        NEAR(magnitude, 1.1902380714238083, 1e-12);
        p.attention_factor = 1.5;
        OK(kvl_rope_frequencies(&p, f, 4, &magnitude));
        NEAR(magnitude, 1.5, 0);
        p.attention_factor = 0;
        p.factors = NULL;
    }
    p.rotary_dim = 16;
    p.scaling = KVL_ROPE_SCALING_YARN;
    p.factor = 16;
    p.original_max_position = 2048; /* The defaults of beta_fast and beta_slow are 32 and 1. */
    OK(kvl_rope_frequencies(&p, f, 8, &magnitude));
    {
        static const double wanted[] = {1.0,       0.31622776601683794,   0.1,     0.024211188335664154,
                                        0.0053125, 0.0009388011803624875, 6.25e-5, 1.976423537605237e-5};
        for (i = 0; i < 8; i++) NEAR(f[i], wanted[i], 1e-12);
        NEAR(magnitude, 1.2772588722239782, 1e-12);
    }
    p.keep_ramp = 1;
    OK(kvl_rope_frequencies(&p, f, 8, &magnitude));
    CHECK(f[4] != 0.0053125, "the ramp is rounded all the same");
    p.keep_ramp = 0;
    p.scaling = KVL_ROPE_SCALING_LLAMA3;
    p.base = 500000;
    p.factor = 8;
    p.original_max_position = 8192; /* The defaults of low_freq_factor and high_freq_factor are 1 and 4. */
    OK(kvl_rope_frequencies(&p, f, 8, &magnitude));
    {
        static const double wanted[] = {1.0,
                                        0.19392274474868576,
                                        0.03760603093086393,
                                        0.007292664737217109,
                                        0.0005248461609929547,
                                        3.428102195952591e-05,
                                        6.647869871181235e-06,
                                        1.2891731721515574e-06};
        for (i = 0; i < 8; i++) NEAR(f[i], wanted[i], 1e-12);
        NEAR(magnitude, 1, 0);
    }
}

static void table(const kvl_context *context) {
    static const double inv_freq[] = {1.0, 0.01};
    float cosines[6], sines[6];
    int r, i;
    OK(kvl_rope_table(context, inv_freq, 4, 0, 1000000, 3, cosines, sines));
    for (r = 0; r < 3; r++) {
        for (i = 0; i < 2; i++) {
            NEAR(cosines[2 * r + i], cos((1000000 + r) * inv_freq[i]), 1e-7);
            NEAR(sines[2 * r + i], sin((1000000 + r) * inv_freq[i]), 1e-7);
        }
    }
    OK(kvl_rope_table(context, inv_freq, 4, 2.0, -1, 1, cosines, sines));
    NEAR(cosines[0], 2 * cos(1.0), 1e-6);
    NEAR(sines[0], -2 * sin(1.0), 1e-6);
    OK(kvl_rope_table(context, inv_freq, 4, 0, 0, 0, NULL, NULL));
}

static void rope(const kvl_context *context) {
    /* Two rows, two tokens, one head of six elements, of which four are rotated. */
    static const double inv_freq[] = {1.0, 0.01};
    static const int32_t offsets[] = {3, 100}, positions[] = {3, 4, 100, 101};
    float x[24], y[24], z[24], cosines[2 * 110], sines[2 * 110];
    int pairing, n, i;
    kvl_rope_params p = KVL_ROPE_PARAMS_INIT;
    kvl_const_view src;
    kvl_view dst = kvl_make_view(y, KVL_DTYPE_F32, 2, 2, 1, 6);
    fill(x, 24, 1);
    src = kvl_make_const_view(x, KVL_DTYPE_F32, 2, 2, 1, 6);
    for (pairing = KVL_PAIRING_INTERLEAVED; pairing <= KVL_PAIRING_HALF_SPLIT; pairing++) {
        p.pairing = pairing;
        p.rotary_dim = 4;
        p.inv_freq = inv_freq;
        p.cos = p.sin = NULL;
        p.offsets = offsets;
        p.positions = NULL;
        OK(kvl_rope(context, NULL, &src, &dst, &p));
        for (n = 0; n < 4; n++) {
            const float *a = x + 6 * n, *b = y + 6 * n;
            for (i = 0; i < 2; i++) {
                double angle = positions[n] * inv_freq[i], c = cos(angle), s = sin(angle);
                int first = pairing == KVL_PAIRING_INTERLEAVED ? 2 * i : i, second = pairing == KVL_PAIRING_INTERLEAVED ? 2 * i + 1 : i + 2;
                NEAR(b[first], a[first] * c - a[second] * s, 1e-6);
                NEAR(b[second], a[second] * c + a[first] * s, 1e-6);
            }
            CHECK(b[4] == a[4] && b[5] == a[5], "what does not turn is copied");
        }
        /* Explicit positions, a table, in place, and with gaps between elements: the same bits. */
        p.offsets = NULL;
        p.positions = positions;
        memset(z, 0, sizeof z);
        dst.data = z;
        OK(kvl_rope(context, NULL, &src, &dst, &p));
        CHECK(memcmp(y, z, sizeof z) == 0, "explicit positions");
        OK(kvl_rope_table(context, inv_freq, 4, 0, 0, 110, cosines, sines));
        p.inv_freq = NULL;
        p.cos = cosines;
        p.sin = sines;
        p.table_rows = 110;
        memset(z, 0, sizeof z);
        OK(kvl_rope(context, NULL, &src, &dst, &p));
        CHECK(memcmp(y, z, sizeof z) == 0, "a table");
        memcpy(z, x, sizeof z);
        {
            kvl_const_view same = kvl_as_const(dst);
            OK(kvl_rope(context, NULL, &same, &dst, &p));
        }
        CHECK(memcmp(y, z, sizeof z) == 0, "in place");
        dst.data = y;
    }
    {
        /* The last element first. */
        float backwards[24];
        kvl_view view = kvl_make_view(backwards + 23, KVL_DTYPE_F32, 2, 2, 1, 6);
        for (i = 0; i < 4; i++) view.strides[i] = -view.strides[i];
        OK(kvl_rope(context, NULL, &src, &view, &p));
        for (i = 0; i < 24; i++) CHECK(backwards[23 - i] == y[i], "element %d", i);
    }
    {
        uint16_t narrow[24];
        kvl_view view = kvl_make_view(narrow, KVL_DTYPE_BF16, 2, 2, 1, 6);
        view.bytes = sizeof narrow;
        OK(kvl_rope(context, NULL, &src, &view, &p));
        for (i = 0; i < 24; i++) NEAR(from_bf16(narrow[i]), y[i], 1.0 / 256);
    }
}

static void kv_write(const kvl_context *context) {
    /* Two rows of three tokens, two heads of two elements; caches for five tokens, with two unused rows. */
    enum { HEAD = 2, ROW = 5 * 2 * HEAD };
    float k[24], v[24];
    uint16_t k_cache[4 * ROW], v_cache[4 * ROW];
    float fused[4 * ROW], apart[4 * ROW], rotated[24];
    static const int32_t positions[] = {2, 4}, counts[] = {3, 1}, rows[] = {3, 0}, slots[] = {4, -1, 0, 1, 2, 3};
    static const double inv_freq[] = {1.0};
    static const int32_t offsets[] = {2, 4};
    kvl_kv_write_params p = KVL_KV_WRITE_PARAMS_INIT;
    kvl_rope_params turn = KVL_ROPE_PARAMS_INIT;
    int i, t;
    for (i = 0; i < 24; i++) {
        k[i] = (float)(i + 1);
        v[i] = -(float)(i + 1) / 2;
    }
    p.k = kvl_make_const_view(k, KVL_DTYPE_F32, 2, 3, 2, HEAD);
    p.v = kvl_make_const_view(v, KVL_DTYPE_F32, 2, 3, 2, HEAD);
    p.k_cache = kvl_make_view(k_cache, KVL_DTYPE_BF16, 4, 5, 2, HEAD);
    p.v_cache = kvl_make_view(v_cache, KVL_DTYPE_F16, 4, 5, 2, HEAD);
    p.k_cache.bytes = sizeof k_cache;
    p.v_cache.bytes = sizeof v_cache;

    memset(k_cache, 0xff, sizeof k_cache);
    memset(v_cache, 0xff, sizeof v_cache);
    p.positions = positions;
    p.counts = counts;
    p.sequences = rows;
    OK(kvl_kv_write(context, NULL, &p));
    for (i = 0; i < 4 * ROW; i++) {
        int row = i / ROW, slot = i % ROW / 4, e = i % 4;
        float wanted = 0;
        if (row == 3 && slot >= 2) wanted = k[(slot - 2) * 4 + e];
        if (row == 0 && slot == 4) wanted = k[12 + e];
        if (wanted != 0) {
            CHECK(from_bf16(k_cache[i]) == wanted, "%d is %g", i, (double)from_bf16(k_cache[i]));
            CHECK(v_cache[i] != 0xffff, "%d was not written", i);
        } else {
            CHECK(k_cache[i] == 0xffff && v_cache[i] == 0xffff, "%d was written", i);
        }
    }
    CHECK(v_cache[3 * ROW + 8] == 0xb800, "-0.5 in f16 is %x", v_cache[3 * ROW + 8]);

    /* By slot, keys only. */
    memset(k_cache, 0xff, sizeof k_cache);
    memset(v_cache, 0xff, sizeof v_cache);
    p.positions = p.counts = p.sequences = NULL;
    p.slots = slots;
    memset(&p.v, 0, sizeof p.v);
    memset(&p.v_cache, 0, sizeof p.v_cache);
    OK(kvl_kv_write(context, NULL, &p));
    for (t = 0; t < 6; t++) {
        if (slots[t] >= 0) {
            const uint16_t *at = k_cache + t / 3 * ROW + slots[t] * 4;
            for (i = 0; i < 4; i++) CHECK(from_bf16(at[i]) == k[4 * t + i], "token %d", t);
        }
    }
    CHECK(k_cache[4] == 0xffff, "slot 1 of row 0 was written");
    for (i = 0; i < 4 * ROW; i++) CHECK(v_cache[i] == 0xffff, "values were written");

    /* Fused RoPE has the bits of RoPE and a write. */
    turn.rotary_dim = HEAD;
    turn.inv_freq = inv_freq;
    turn.offsets = offsets;
    memset(fused, 0, sizeof fused);
    memset(apart, 0, sizeof apart);
    p.slots = NULL;
    p.positions = positions;
    p.counts = counts;
    p.k_cache = kvl_make_view(fused, KVL_DTYPE_F32, 4, 5, 2, HEAD);
    p.rope = &turn;
    OK(kvl_kv_write(context, NULL, &p));
    {
        kvl_view to = kvl_make_view(rotated, KVL_DTYPE_F32, 2, 3, 2, HEAD);
        OK(kvl_rope(context, NULL, &p.k, &to, &turn));
        p.k = kvl_as_const(to);
    }
    p.k_cache.data = apart;
    p.rope = NULL;
    OK(kvl_kv_write(context, NULL, &p));
    CHECK(memcmp(fused, apart, sizeof fused) == 0, "the fused write differs");
    CHECK(fused[2 * 4] != 0, "nothing was written");
}

/* Rows of five tokens, one after another, into caches of every layout, and values in pairs. */
static void layouts(const kvl_context *context) {
    enum { BATCH = 2, SEQ = 5, SLOTS = 32 };
    /* As pages of four, rows of sixteen, or one long row. */
    static const int32_t pages[] = {6, 1, 3, 0, 2, 7}, starts[] = {2, 12, 32}, positions[] = {3, 6}, slots[] = {31, 4, -1, 5, 6, 0, 1, 2, 3, 7};
    static const int32_t ring[2][SEQ] = {{3, 4, 5, 2, 3}, {2, 3, 4, 5, 2}};
    float k[BATCH * SEQ], v[BATCH * SEQ];
    int kind, packed, b, t, i;
    for (i = 0; i < BATCH * SEQ; i++) {
        k[i] = (float)(i + 1);
        v[i] = -(float)(i + 1);
    }
    for (kind = 0; kind <= 5; kind++) {
        for (packed = 0; packed < 2; packed++) {
            float k_cache[SLOTS], v_cache[SLOTS], wanted_k[SLOTS], wanted_v[SLOTS];
            static const int32_t counts[] = {3, 4};
            kvl_kv_write_params p = KVL_KV_WRITE_PARAMS_INIT;
            kvl_layout layout = KVL_LAYOUT_INIT;
            int rows = kind == KVL_LAYOUT_KIND_RAGGED ? 1 : kind == KVL_LAYOUT_KIND_PAGED || kind == 5 ? 8 : 2;
            int each = kind == KVL_LAYOUT_KIND_RING ? 6 : SLOTS / rows;
            if (kind == KVL_LAYOUT_KIND_INDIRECT) continue;
            memset(k_cache, 0, sizeof k_cache);
            memset(v_cache, 0, sizeof v_cache);
            memset(wanted_k, 0, sizeof wanted_k);
            memset(wanted_v, 0, sizeof wanted_v);
            p.k = kvl_make_const_view(k, KVL_DTYPE_F32, BATCH, SEQ, 1, 1);
            p.v = kvl_make_const_view(v, KVL_DTYPE_F32, BATCH, SEQ, 1, 1);
            p.k_cache = kvl_make_view(k_cache, KVL_DTYPE_F32, rows, each, 1, 1);
            p.v_cache = kvl_make_view(v_cache, KVL_DTYPE_F32, rows, packed ? each / 2 : each, 1, packed ? 2 : 1);
            p.positions = positions;
            p.v_packing = packed ? KVL_PACKING_ROW_PAIRS : KVL_PACKING_ROWS;
            p.layout = kind == KVL_LAYOUT_KIND_CONTIGUOUS && packed ? NULL : &layout;
            layout.kind = kind == 5 ? KVL_LAYOUT_KIND_PAGED : kind;
            if (kind == KVL_LAYOUT_KIND_RING) {
                layout.sink_tokens = 2;
                p.counts = counts;
            }
            if (kind == KVL_LAYOUT_KIND_PAGED) {
                layout.table = pages;
                layout.num_sequences = 2;
                layout.pages_per_sequence = 3;
            }
            if (kind == KVL_LAYOUT_KIND_RAGGED) {
                layout.table = starts;
                layout.num_sequences = 2;
            }
            if (kind == 5) { /* By slots of the pool, without a table. */
                p.positions = NULL;
                p.slots = slots;
            }
            OK(kvl_kv_write(context, NULL, &p));
            for (b = 0; b < BATCH; b++) {
                for (t = 0; t < SEQ; t++) {
                    int at = positions[b] + t, slot = b * each + at;
                    if (kind == KVL_LAYOUT_KIND_RING && t >= counts[b]) continue;
                    if (kind == KVL_LAYOUT_KIND_RING) slot = b * each + ring[b][t];
                    if (kind == KVL_LAYOUT_KIND_PAGED) slot = pages[3 * b + at / 4] * 4 + at % 4;
                    if (kind == KVL_LAYOUT_KIND_RAGGED) slot = starts[b] + at;
                    if (kind == 5) slot = slots[b * SEQ + t];
                    if (slot < 0) continue;
                    wanted_k[slot] = k[b * SEQ + t];
                    /* With heads of one element, a pair of slots is two consecutive slots. */
                    wanted_v[slot] = v[b * SEQ + t];
                }
            }
            CHECK(memcmp(k_cache, wanted_k, sizeof k_cache) == 0, "keys, kind %d", kind);
            CHECK(memcmp(v_cache, wanted_v, sizeof v_cache) == 0, "values, kind %d, packed %d", kind, packed);
        }
    }
}

static void pack(const kvl_context *context) {
    static const float v[] = {1, 2, 3, 4, 5, 6}, wanted[] = {1, 3, 2, 4, 5, 9, 6, 9};
    float packed[8] = {9, 9, 9, 9, 9, 9, 9, 9}, back[6];
    kvl_const_view src = kvl_make_const_view(v, KVL_DTYPE_F32, 1, 3, 1, 2);
    kvl_view dst = kvl_make_view(packed, KVL_DTYPE_F32, 1, 2, 1, 4), plain = kvl_make_view(back, KVL_DTYPE_F32, 1, 3, 1, 2);
    OK(kvl_pack_row_pairs(context, NULL, &src, &dst));
    CHECK(memcmp(packed, wanted, sizeof packed) == 0, "-");
    src = kvl_as_const(dst);
    OK(kvl_unpack_row_pairs(context, NULL, &src, &plain));
    CHECK(memcmp(back, v, sizeof back) == 0, "-");
}

/* Norm, norm and RoPE in one call, and both fused with a write. */
static void norm(const kvl_context *context) {
    enum { HEADS = 3, D = 6, N = 2 * HEADS * D };
    static const float weight[] = {1, 2, 0.5f, -1, 3, 1};
    static const double inv_freq[] = {1.0, 0.01};
    static const int32_t positions[] = {7};
    float x[N], y[N], z[N], w[N];
    int h, i;
    kvl_rms_norm_params p = KVL_RMS_NORM_PARAMS_INIT;
    kvl_rope_params turn = KVL_ROPE_PARAMS_INIT;
    kvl_const_view src, between;
    kvl_view dst = kvl_make_view(y, KVL_DTYPE_F32, 1, 2, HEADS, D), to = kvl_make_view(z, KVL_DTYPE_F32, 1, 2, HEADS, D);
    fill(x, N, 8);
    src = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 2, HEADS, D);
    p.weight = weight;
    p.eps = 0.25f;
    OK(kvl_rms_norm(context, NULL, &src, &dst, &p));
    for (h = 0; h < 2 * HEADS; h++) {
        double squares = 0;
        for (i = 0; i < D; i++) squares += (double)x[h * D + i] * (double)x[h * D + i];
        for (i = 0; i < D; i++) {
            NEAR(y[h * D + i], (double)x[h * D + i] / sqrt(squares / D + 0.25) * (double)weight[i], 1e-6);
        }
    }
    turn.pairing = KVL_PAIRING_HALF_SPLIT;
    turn.rotary_dim = 4;
    turn.inv_freq = inv_freq;
    turn.offsets = positions;
    between = kvl_as_const(dst);
    OK(kvl_rope(context, NULL, &between, &to, &turn));
    dst.data = w;
    OK(kvl_rms_norm_rope(context, NULL, &src, &dst, &p, &turn));
    CHECK(memcmp(z, w, sizeof w) == 0, "one pass differs from two");
    {
        float cache[4 * HEADS * D];
        static const int32_t at[] = {1};
        kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
        memset(cache, 0, sizeof cache);
        write.k = src;
        write.k_cache = kvl_make_view(cache, KVL_DTYPE_F32, 1, 4, HEADS, D);
        write.positions = at;
        write.k_norm = &p;
        OK(kvl_kv_write(context, NULL, &write));
        CHECK(memcmp(cache + HEADS * D, y, sizeof y) == 0, "a normalised write");
        write.rope = &turn;
        OK(kvl_kv_write(context, NULL, &write));
        CHECK(memcmp(cache + HEADS * D, z, sizeof z) == 0, "a normalised and rotated write");
    }
    /* An eps of 0 means 1e-6, and absent weights mean 1. */
    p.weight = NULL;
    p.eps = 0;
    for (i = 0; i < N; i++) x[i] = 1e-3f;
    OK(kvl_rms_norm(context, NULL, &src, &dst, &p));
    NEAR(w[0], sqrt(0.5), 1e-6);
}

static void repeat(const kvl_context *context) {
    static const float x[] = {1, 2, 3, 4}, wanted[] = {1, 2, 1, 2, 1, 2, 3, 4, 3, 4, 3, 4};
    float y[12];
    kvl_const_view src = kvl_make_const_view(x, KVL_DTYPE_F32, 1, 1, 2, 2);
    kvl_view dst = kvl_make_view(y, KVL_DTYPE_F32, 1, 1, 6, 2);
    OK(kvl_repeat_kv(context, NULL, &src, &dst));
    CHECK(memcmp(y, wanted, sizeof y) == 0, "-");
}

/* The definition in double, for one query and head, masked by `visible`. */
static double define(const float *q, const float *k, const float *v, int keys, int stride, int d, int dv, double scale, double cap,
                     const float *bias, const double *alibi, double sink, const unsigned char *visible, double *out) {
    double most = sink, sum = 0, weight;
    double logits[64];
    int j, i;
    for (j = 0; j < keys; j++) {
        double x = 0;
        for (i = 0; i < d; i++) x += (double)q[i] * (double)k[j * stride * d + i];
        x *= scale;
        if (cap > 0) x = cap * tanh(x / cap);
        logits[j] = x + (bias ? (double)bias[j] : 0) + (alibi ? alibi[j] : 0);
        if (visible[j] && logits[j] > most) most = logits[j];
    }
    for (i = 0; i < dv; i++) out[i] = 0;
    if (most == -INFINITY) return -INFINITY;
    sum = exp(sink - most);
    for (j = 0; j < keys; j++) {
        if (!visible[j]) continue;
        weight = exp(logits[j] - most);
        sum += weight;
        for (i = 0; i < dv; i++) out[i] += weight * (double)v[j * stride * dv + i];
    }
    for (i = 0; i < dv; i++) out[i] /= sum;
    return most + log(sum);
}

static void *workspace_for(const kvl_attention_params *p, size_t *bytes) {
    void *memory;
    OK(kvl_attention_workspace_size(p, NULL, bytes));
    memory = aligned_alloc(64, (*bytes + 64) / 64 * 64);
    if (memory == NULL) abort();
    return memory;
}

/* A Hadamard rotation alone, in a write, in attention, in a read and where keys are turned on. */
static void hadamard(const kvl_context *context) {
    enum { KEYS = 6, D = 12, N = KEYS * D };
    static const float ones[] = {1, 2, 3, 4}, wanted[] = {5, -1, -2, 0};
    static const int32_t at[] = {0}, length[] = {KEYS};
    float y[4], k[N], v[N], turned[N], k_cache[N], v_cache[N], k_back[N], v_back[N], q[2 * D], plain[2 * D], out[2 * D];
    void *workspace;
    int64_t block = 0;
    size_t bytes = 0;
    int i;
    kvl_const_view src = kvl_make_const_view(ones, KVL_DTYPE_F32, 1, 1, 1, 4);
    kvl_view dst = kvl_make_view(y, KVL_DTYPE_F32, 1, 1, 1, 4);
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    kvl_kv_read_params read = KVL_KV_READ_PARAMS_INIT;
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    OK(kvl_hadamard(context, NULL, &src, &dst, 4));
    CHECK(memcmp(y, wanted, sizeof y) == 0, "%g %g %g %g", (double)y[0], (double)y[1], (double)y[2], (double)y[3]);
    src = kvl_as_const(dst);
    OK(kvl_hadamard(context, NULL, &src, &dst, 4));
    CHECK(memcmp(y, ones, sizeof y) == 0, "twice is not at all");
    OK(kvl_hadamard_block(D, &block));
    CHECK(block == 4, "%d", (int)block);
    OK(kvl_hadamard_block(7, &block));
    CHECK(block == 0, "%d", (int)block);
    OK(kvl_hadamard_block(4096, &block));
    CHECK(block == 512, "%d", (int)block);

    fill(k, N, 21);
    fill(v, N, 22);
    fill(q, 2 * D, 23);
    src = kvl_make_const_view(k, KVL_DTYPE_F32, 1, KEYS, 1, D);
    dst = kvl_make_view(turned, KVL_DTYPE_F32, 1, KEYS, 1, D);
    OK(kvl_hadamard(context, NULL, &src, &dst, 4));
    write.k = src;
    write.v = kvl_make_const_view(v, KVL_DTYPE_F32, 1, KEYS, 1, D);
    write.k_cache = kvl_make_view(k_cache, KVL_DTYPE_F32, 1, KEYS, 1, D);
    write.v_cache = kvl_make_view(v_cache, KVL_DTYPE_F32, 1, KEYS, 1, D);
    write.positions = at;
    write.k_hadamard = 4;
    write.v_hadamard = 2;
    OK(kvl_kv_write(context, NULL, &write));
    CHECK(memcmp(k_cache, turned, sizeof turned) == 0, "a rotated write");

    p.q = kvl_make_const_view(q, KVL_DTYPE_F32, 1, 1, 2, D);
    p.k = src;
    p.v = write.v;
    p.out = kvl_make_view(plain, KVL_DTYPE_F32, 1, 1, 2, D);
    p.lengths = length;
    workspace = workspace_for(&p, &bytes);
    OK(kvl_attention(context, NULL, workspace, bytes, &p));
    p.k = kvl_as_const(write.k_cache);
    p.v = kvl_as_const(write.v_cache);
    p.out.data = out;
    p.k_hadamard = 4;
    p.v_hadamard = 2;
    OK(kvl_attention(context, NULL, workspace, bytes, &p));
    free(workspace);
    for (i = 0; i < 2 * D; i++) NEAR(out[i], (double)plain[i], 1e-5);

    read.k_cache = p.k;
    read.v_cache = p.v;
    read.k = kvl_make_view(k_back, KVL_DTYPE_F32, 1, KEYS, 1, D);
    read.v = kvl_make_view(v_back, KVL_DTYPE_F32, 1, KEYS, 1, D);
    read.positions = at;
    read.k_hadamard = 4;
    read.v_hadamard = 2;
    OK(kvl_kv_read(context, NULL, &read));
    for (i = 0; i < N; i++) {
        NEAR(k_back[i], (double)k[i], 1e-6);
        NEAR(v_back[i], (double)v[i], 1e-6);
    }
    {
        /* A turn by frequencies of 0 changes nothing, so that keys only move. */
        static const double still[] = {0, 0};
        int32_t lengths[] = {KEYS};
        kvl_rope_params turn = KVL_ROPE_PARAMS_INIT;
        const kvl_rope_params *turns[1];
        kvl_kv_layer layer;
        kvl_cache cache = KVL_CACHE_INIT;
        memset(&layer, 0, sizeof layer);
        layer.k = write.k_cache;
        cache.layers = &layer;
        cache.num_layers = 1;
        cache.lengths = lengths;
        turn.rotary_dim = 4;
        turn.inv_freq = still;
        turn.k_hadamard = 4;
        turns[0] = &turn;
        OK(kvl_cache_evict(context, NULL, &cache, 0, 0, 2, turns, 1));
        for (i = 0; i < (KEYS - 2) * D; i++) NEAR(k_cache[i], (double)turned[2 * D + i], 1e-6);
    }
}

static void attention(const kvl_context *context) {
    enum { BATCH = 2, SEQ = 5, HEADS = 6, KV = 2, KEYS = 19, D = 7, DV = 10 };
    static float q[BATCH * SEQ * HEADS * D], k[BATCH * KEYS * KV * D], v[BATCH * KEYS * KV * DV];
    static float out[BATCH * SEQ * HEADS * DV], lse[BATCH * SEQ * HEADS], bias[SEQ * KEYS], slopes[HEADS], sinks[HEADS];
    static unsigned char mask[BATCH * SEQ * KEYS];
    static const int32_t lengths[] = {19, 11}, starts[] = {2, 0}, offsets[] = {9, -2};
    int variant, b, t, h, j, e;
    size_t bytes;
    void *workspace;
    fill(q, COUNT(q), 2);
    fill(k, COUNT(k), 3);
    fill(v, COUNT(v), 4);
    fill(bias, COUNT(bias), 5);
    fill(sinks, COUNT(sinks), 6);
    bias[3] = -INFINITY;
    OK(kvl_alibi_slopes(slopes, HEADS));
    for (j = 0; j < (int)COUNT(mask); j++) mask[j] = (unsigned char)(j % 7 == 3 ? 0 : j % 5 + 1);

    /* Poison beyond a row's length and before its first key must have no effect. */
    for (b = 0; b < BATCH; b++) {
        for (j = 0; j < KEYS; j++) {
            if (j >= starts[b] && j < lengths[b]) continue;
            for (e = 0; e < KV * D; e++) k[(b * KEYS + j) * KV * D + e] = NAN;
            for (e = 0; e < KV * DV; e++) v[(b * KEYS + j) * KV * DV + e] = INFINITY;
        }
    }

    for (variant = 0; variant < 8; variant++) {
        kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
        int left = -1, right = -1, causal = 0;
        p.q = kvl_make_const_view(q, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
        p.k = kvl_make_const_view(k, KVL_DTYPE_F32, BATCH, KEYS, KV, D);
        p.v = kvl_make_const_view(v, KVL_DTYPE_F32, BATCH, KEYS, KV, DV);
        p.out = kvl_make_view(out, KVL_DTYPE_F32, BATCH, SEQ, HEADS, DV);
        p.lse = lse;
        p.lengths = lengths;
        p.kv_starts = starts;
        if (variant == 1 || variant == 7) {
            p.flags |= KVL_ATTENTION_FLAG_CAUSAL;
            causal = 1;
        }
        if (variant == 2 || variant == 7) {
            p.flags |= KVL_ATTENTION_FLAG_WINDOW_LEFT | KVL_ATTENTION_FLAG_WINDOW_RIGHT;
            p.window_left = left = 4;
            p.window_right = right = 0;
            p.offsets = offsets;
        }
        if (variant == 3) {
            p.flags |= KVL_ATTENTION_FLAG_CAUSAL;
            causal = 1;
            p.scale = 3.0f;
        }
        if (variant == 4 || variant == 7) {
            p.mask.data = mask;
            p.mask.shape[0] = BATCH, p.mask.shape[1] = SEQ, p.mask.shape[2] = HEADS, p.mask.shape[3] = KEYS;
            p.mask.strides[0] = SEQ * KEYS, p.mask.strides[1] = KEYS, p.mask.strides[2] = 0, p.mask.strides[3] = 1;
            p.mask.bytes = sizeof mask;
        }
        if (variant == 5 || variant == 7) {
            p.bias = kvl_make_const_view(bias, KVL_DTYPE_F32, BATCH, SEQ, HEADS, KEYS);
            p.bias.strides[0] = 0, p.bias.strides[1] = KEYS, p.bias.strides[2] = 0;
            p.bias.bytes = sizeof bias;
            p.alibi_slopes = slopes;
        }
        if (variant == 6 || variant == 7) {
            p.sink_logits = sinks;
            p.softcap = 2.0f;
        }
        memset(out, 0xff, sizeof out);
        memset(lse, 0xff, sizeof lse);
        workspace = workspace_for(&p, &bytes);
        OK(kvl_attention(context, NULL, workspace, bytes, &p));
        free(workspace);

        for (b = 0; b < BATCH; b++) {
            for (t = 0; t < SEQ; t++) {
                int at = t + (p.offsets ? offsets[b] : lengths[b] - SEQ);
                for (h = 0; h < HEADS; h++) {
                    int row = (b * SEQ + t) * HEADS + h, kv = h / (HEADS / KV);
                    unsigned char visible[KEYS];
                    double wanted[DV], alibi[KEYS], joint;
                    for (j = 0; j < KEYS; j++) {
                        visible[j] = j < lengths[b] && j >= starts[b] && (!causal || j <= at) &&
                                     (left < 0 || j >= at - left) && (right < 0 || j <= at + right) &&
                                     (!p.mask.data || mask[(b * SEQ + t) * KEYS + j]) &&
                                     (!p.bias.data || bias[t * KEYS + j] != -INFINITY);
                        alibi[j] = (double)slopes[h] * (j - at);
                    }
                    joint = define(q + row * D, k + (b * KEYS * KV + kv) * D, v + (b * KEYS * KV + kv) * DV, KEYS, KV, D, DV,
                                   p.scale != 0 ? (double)p.scale : 1 / sqrt((double)D), (double)p.softcap,
                                   p.bias.data ? bias + t * KEYS : NULL, p.alibi_slopes ? alibi : NULL,
                                   p.sink_logits ? (double)sinks[h] : -INFINITY, visible, wanted);
                    if (joint == -INFINITY) {
                        CHECK(lse[row] == -INFINITY, "variant %d row %d has LSE %g", variant, row, (double)lse[row]);
                    } else {
                        NEAR(lse[row], joint, 2e-5);
                    }
                    for (e = 0; e < DV; e++) NEAR(out[row * DV + e], wanted[e], 2e-5);
                }
            }
        }
    }
    {
        /* A call without rows is valid. */
        kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
        p.q = kvl_make_const_view(NULL, KVL_DTYPE_F32, 0, 1, HEADS, D);
        p.k = kvl_make_const_view(NULL, KVL_DTYPE_F32, 0, KEYS, KV, D);
        p.v = kvl_make_const_view(NULL, KVL_DTYPE_F32, 0, KEYS, KV, DV);
        p.out = kvl_make_view(NULL, KVL_DTYPE_F32, 0, 1, HEADS, DV);
        OK(kvl_attention(context, NULL, NULL, 0, &p));
    }
}

/* 16-bit types: a single visible key has weight 1 for every query. */
static void narrow_attention(const kvl_context *context) {
    static const kvl_dtype types[] = {KVL_DTYPE_F16, KVL_DTYPE_BF16};
    static const uint16_t two[] = {0x4000, 0x4000}, minus_three[] = {0xc200, 0xc040};
    int i, e;
    for (i = 0; i < 2; i++) {
        uint16_t q[8], k[3 * 8], v[3 * 8], out[8];
        int32_t length = 1;
        kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
        size_t bytes;
        void *workspace;
        for (e = 0; e < 24; e++) {
            k[e] = e < 8 ? two[i] : 0x7fff; /* NaN past the end. */
            v[e] = e < 8 ? minus_three[i] : 0x7fff;
            if (e < 8) q[e] = two[i];
        }
        p.q = kvl_make_const_view(q, types[i], 1, 1, 1, 8);
        p.k = kvl_make_const_view(k, types[i], 1, 3, 1, 8);
        p.v = kvl_make_const_view(v, types[i], 1, 3, 1, 8);
        p.out = kvl_make_view(out, types[i], 1, 1, 1, 8);
        p.lengths = &length;
        workspace = workspace_for(&p, &bytes);
        OK(kvl_attention(context, NULL, workspace, bytes, &p));
        for (e = 0; e < 8; e++) CHECK(out[e] == minus_three[i], "type %d: %x", i, out[e]);
        free(workspace);
    }
}

static void merge(const kvl_context *context) {
    static const float a[] = {1, 1}, b[] = {4, 7}, nothing[] = {NAN, NAN};
    const float lse_a = 0, lse_b = logf(2), lse_nothing = -INFINITY;
    float out[2], lse = 0;
    kvl_attention_state states[3];
    kvl_view to = kvl_make_view(out, KVL_DTYPE_F32, 1, 1, 1, 2);
    states[0].out = kvl_make_const_view(a, KVL_DTYPE_F32, 1, 1, 1, 2);
    states[0].lse = &lse_a;
    states[1].out = kvl_make_const_view(nothing, KVL_DTYPE_F32, 1, 1, 1, 2);
    states[1].lse = &lse_nothing;
    states[2].out = kvl_make_const_view(b, KVL_DTYPE_F32, 1, 1, 1, 2);
    states[2].lse = &lse_b;
    OK(kvl_merge_states(context, NULL, states, 3, &to, &lse));
    NEAR(out[0], 3, 1e-6);
    NEAR(out[1], 5, 1e-6);
    NEAR(lse, log(3.0), 1e-6);
    OK(kvl_merge_states(context, NULL, states + 1, 1, &to, &lse));
    CHECK(out[0] == 0 && out[1] == 0 && lse == -INFINITY, "%g %g %g", (double)out[0], (double)out[1], (double)lse);
    OK(kvl_merge_states(context, NULL, states, 2, &to, NULL));
    CHECK(out[0] == 1 && out[1] == 1, "%g %g", (double)out[0], (double)out[1]);
}

/* Two segments on the grid, each with its own lists: the bits of one call over all keys. */
static void chunks(const kvl_context *context) {
    enum { BATCH = 2, SEQ = 3, HEADS = 4, KV = 2, KEYS = KVL_SPLIT_GRID + 40, D = 6, DV = 5, SPANS = 2 };
    static float q[BATCH * SEQ * HEADS * D], k[BATCH * KEYS * KV * D], v[BATCH * KEYS * KV * DV], sinks[HEADS];
    static float out[BATCH * SEQ * HEADS * DV], merged[BATCH * SEQ * HEADS * DV];
    static float lse[BATCH * SEQ * HEADS], merged_lse[BATCH * SEQ * HEADS];
    static const int32_t lengths[BATCH] = {KEYS, 700}, starts[BATCH] = {3, 0};
    kvl_chunk_states spans[SPANS];
    kvl_attention_params whole = KVL_ATTENTION_PARAMS_INIT;
    kvl_merge_chunks_params merge = KVL_MERGE_CHUNKS_PARAMS_INIT;
    kvl_shard shard = KVL_SHARD_INIT;
    size_t bytes;
    void *workspace;
    int i;
    fill(q, COUNT(q), 11);
    fill(k, COUNT(k), 12);
    fill(v, COUNT(v), 13);
    fill(sinks, COUNT(sinks), 14);
    whole.q = kvl_make_const_view(q, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    whole.k = kvl_make_const_view(k, KVL_DTYPE_F32, BATCH, KEYS, KV, D);
    whole.v = kvl_make_const_view(v, KVL_DTYPE_F32, BATCH, KEYS, KV, DV);
    whole.flags = KVL_ATTENTION_FLAG_CAUSAL;
    whole.lengths = lengths;
    whole.kv_starts = starts;
    shard.num_sequence = SPANS;
    for (i = 0; i < SPANS; i++) {
        kvl_attention_params p = whole;
        kvl_view part;
        int32_t local[3][BATCH];
        int64_t first, count, len = 0;
        float *states;
        shard.sequence = i;
        OK(kvl_shard_keys(&shard, KEYS, &first, &count));
        OK(kvl_shard_lengths(first, count, BATCH, SEQ, lengths, starts, NULL, local[0], local[1], local[2]));
        p.lengths = local[0];
        p.kv_starts = local[1];
        p.offsets = local[2];
        part = kvl_make_view(k, KVL_DTYPE_F32, BATCH, KEYS, KV, D);
        OK(kvl_shard_view(&part, 1, first, count, &part));
        p.k = kvl_as_const(part);
        part = kvl_make_view(v, KVL_DTYPE_F32, BATCH, KEYS, KV, DV);
        OK(kvl_shard_view(&part, 1, first, count, &part));
        p.v = kvl_as_const(part);
        OK(kvl_attention_chunks_states_len(&p, &len));
        CHECK(len == BATCH * SEQ * HEADS * (16 + 16), "%d floats", (int)len);
        states = malloc((size_t)len * sizeof *states);
        OK(kvl_attention_chunks_workspace_size(&p, NULL, &bytes));
        workspace = aligned_alloc(64, (bytes + 64) / 64 * 64);
        if (states == NULL || workspace == NULL) abort();
        memset(states, 0xff, (size_t)len * sizeof *states);
        OK(kvl_attention_chunks(context, NULL, workspace, bytes, &p, states, len));
        free(workspace);
        spans[i].states = states;
        spans[i].len = len;
    }
    merge.segments = spans;
    merge.num_segments = SPANS;
    merge.kv_heads = KV;
    merge.k_format = merge.v_format = KVL_FORMAT_F32;
    merge.sink_logits = sinks;
    merge.out = kvl_make_view(merged, KVL_DTYPE_F32, BATCH, SEQ, HEADS, DV);
    merge.lse = merged_lse;
    memset(merged, 0xff, sizeof merged);
    memset(merged_lse, 0xff, sizeof merged_lse);
    OK(kvl_merge_chunks_workspace_size(&merge, NULL, &bytes));
    workspace = aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (workspace == NULL) abort();
    OK(kvl_merge_chunks(context, NULL, workspace, bytes, &merge));
    free(workspace);
    for (i = 0; i < SPANS; i++) free((void *)spans[i].states);

    whole.out = kvl_make_view(out, KVL_DTYPE_F32, BATCH, SEQ, HEADS, DV);
    whole.lse = lse;
    whole.sink_logits = sinks;
    workspace = workspace_for(&whole, &bytes);
    OK(kvl_attention(context, NULL, workspace, bytes, &whole));
    free(workspace);
    CHECK(memcmp(out, merged, sizeof out) == 0, "%g and %g", (double)out[0], (double)merged[0]);
    CHECK(memcmp(lse, merged_lse, sizeof lse) == 0, "%g and %g", (double)lse[0], (double)merged_lse[0]);
}

static void alibi(void) {
    float slopes[12];
    int h;
    OK(kvl_alibi_slopes(slopes, 8));
    for (h = 0; h < 8; h++) CHECK(slopes[h] == ldexpf(1, -(h + 1)), "%g", (double)slopes[h]);
    OK(kvl_alibi_slopes(slopes, 12));
    CHECK(slopes[7] == ldexpf(1, -8), "%g", (double)slopes[7]);
    for (h = 8; h < 12; h++) NEAR(slopes[h], pow(2, -0.5 * (2 * (h - 8) + 1)), 1e-7);
    OK(kvl_alibi_slopes(NULL, 0));
}

/* Masks and biases with axes of one element have the bits of the expanded ones. */
static void broadcast(const kvl_context *context) {
    enum { BATCH = 2, SEQ = 3, HEADS = 4, KV = 2, KEYS = 40, D = 8, N = BATCH * SEQ * HEADS * D };
    static float q[N], k[BATCH * KEYS * KV * D], v[BATCH * KEYS * KV * D], out[2][N];
    static uint8_t mask[BATCH * SEQ * HEADS * KEYS], narrow_mask[SEQ * KEYS];
    static float bias[BATCH * SEQ * HEADS * KEYS], narrow_bias[HEADS];
    static uint8_t bits[SEQ * KEYS / 8];
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    kvl_bit_mask bit_mask = KVL_BIT_MASK_INIT;
    void *workspace = NULL;
    size_t bytes = 0;
    int i, wide;
    fill(q, COUNT(q), 31);
    fill(k, COUNT(k), 32);
    fill(v, COUNT(v), 33);
    fill(narrow_bias, COUNT(narrow_bias), 34);
    for (i = 0; i < SEQ * KEYS; i++) {
        narrow_mask[i] = i % 3 != 1;
        if (narrow_mask[i]) bits[i / 8] |= (uint8_t)(1u << i % 8);
    }
    for (i = 0; i < BATCH * SEQ * HEADS * KEYS; i++) {
        const int key = i % KEYS, head = i / KEYS % HEADS, token = i / KEYS / HEADS % SEQ;
        mask[i] = narrow_mask[token * KEYS + key];
        bias[i] = narrow_bias[head];
    }
    p.q = kvl_make_const_view(q, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    p.k = kvl_make_const_view(k, KVL_DTYPE_F32, BATCH, KEYS, KV, D);
    p.v = kvl_make_const_view(v, KVL_DTYPE_F32, BATCH, KEYS, KV, D);
    p.out = kvl_make_view(out[0], KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    OK(kvl_attention_workspace_size(&p, NULL, &bytes));
    workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (workspace == NULL) abort();
    for (wide = 1; wide >= 0; wide--) {
        /* [1, seq, 1, keys] of bytes, [1, 1, heads, 1] of numbers; strides of axes of one element are not used. */
        kvl_const_view view = kvl_make_const_view(wide ? mask : narrow_mask, KVL_DTYPE_F32, wide ? BATCH : 1, SEQ,
                                                  wide ? HEADS : 1, KEYS);
        p.mask.data = view.data;
        memcpy(p.mask.shape, view.shape, sizeof view.shape);
        memcpy(p.mask.strides, view.strides, sizeof view.strides);
        p.mask.bytes = wide ? sizeof mask : sizeof narrow_mask;
        p.bias = wide ? kvl_make_const_view(bias, KVL_DTYPE_F32, BATCH, SEQ, HEADS, KEYS)
                      : kvl_make_const_view(narrow_bias, KVL_DTYPE_F32, 1, 1, HEADS, 1);
        p.bias.bytes = wide ? sizeof bias : sizeof narrow_bias;
        p.out.data = out[wide];
        OK(kvl_attention(context, NULL, workspace, bytes, &p));
    }
    CHECK(memcmp(out[0], out[1], sizeof out[0]) == 0, "a mask and a bias that broadcast");
    memset(&p.mask, 0, sizeof p.mask);
    bit_mask.data = bits;
    bit_mask.bytes = sizeof bits;
    bit_mask.shape[0] = 1, bit_mask.shape[1] = SEQ, bit_mask.shape[2] = 1, bit_mask.shape[3] = KEYS;
    bit_mask.strides[0] = 977, bit_mask.strides[1] = KEYS, bit_mask.strides[2] = 977;
    p.bit_mask = &bit_mask;
    memset(out[0], 0, sizeof out[0]);
    p.out.data = out[0];
    OK(kvl_attention(context, NULL, workspace, bytes, &p));
    CHECK(memcmp(out[0], out[1], sizeof out[0]) == 0, "a bit mask that broadcasts");
    p.bias.shape[2] = 3;
    p.bias.bytes = 0;
    CHECK(kvl_attention(context, NULL, workspace, bytes, &p) == KVL_STATUS_SHAPE, "-");
    CHECK(strstr(sentence(), "bias has shape [1, 1, 3, 1], but must have [2, 3, 4, 40]") != NULL, "%s", sentence());
    free(workspace);
}

/* Bytes from -127 to 127 and a scale for each head of each token, to nearest. */
static void quantise(const float *from, size_t heads, int dim, int8_t *units, float *scales) {
    size_t i;
    for (i = 0; i < heads; i++) {
        float largest = 0;
        int d;
        for (d = 0; d < dim; d++) largest = fmaxf(largest, fabsf(from[i * (size_t)dim + (size_t)d]));
        scales[i] = largest / 127;
        for (d = 0; d < dim; d++) {
            const size_t at = i * (size_t)dim + (size_t)d;
            units[at] = (int8_t)(scales[i] > 0 ? rintf(from[at] / scales[i]) : 0);
        }
    }
}

/* Attention over a cache of int8 is that over the numbers that it stands for; K and V have formats of their own. */
static void int8(const kvl_context *context) {
    enum { BATCH = 2, HEADS = 4, KV = 2, KEYS = 40, D = 16, ROWS = BATCH * KEYS * KV, N = ROWS * D };
    static float k[N], v[N], q[BATCH * HEADS * D], out[2][BATCH * HEADS * D], k_scales[ROWS], v_scales[ROWS];
    static int8_t k_units[N], v_units[N];
    kvl_cache_scales scales = KVL_CACHE_SCALES_INIT, keys_alone = KVL_CACHE_SCALES_INIT;
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    void *workspace = NULL;
    size_t bytes = 0;
    int i, which;
    fill(q, COUNT(q), 41);
    fill(k, COUNT(k), 42);
    fill(v, COUNT(v), 43);
    quantise(k, ROWS, D, k_units, k_scales);
    quantise(v, ROWS, D, v_units, v_scales);
    for (i = 0; i < N; i++) {
        k[i] = (float)k_units[i] * k_scales[i / D];
        v[i] = (float)v_units[i] * v_scales[i / D];
    }
    scales.k = kvl_make_view(k_scales, KVL_DTYPE_F32, BATCH, KEYS, KV, 1);
    scales.v = kvl_make_view(v_scales, KVL_DTYPE_F32, BATCH, KEYS, KV, 1);
    scales.k.bytes = sizeof k_scales;
    scales.v.bytes = sizeof v_scales;
    keys_alone.k = scales.k;
    p.q = kvl_make_const_view(q, KVL_DTYPE_F32, BATCH, 1, HEADS, D);
    p.k = kvl_make_const_view(k, KVL_FORMAT_F32, BATCH, KEYS, KV, D);
    p.v = kvl_make_const_view(v, KVL_FORMAT_F32, BATCH, KEYS, KV, D);
    p.out = kvl_make_view(out[0], KVL_DTYPE_F32, BATCH, 1, HEADS, D);
    OK(kvl_attention_workspace_size(&p, NULL, &bytes));
    workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (workspace == NULL) abort();
    OK(kvl_attention(context, NULL, workspace, bytes, &p));
    p.out.data = out[1];
    for (which = 0; which < 2; which++) {
        /* Keys alone, then both. */
        p.k = kvl_make_const_view(k_units, KVL_FORMAT_INT8, BATCH, KEYS, KV, D);
        if (which) p.v = kvl_make_const_view(v_units, KVL_FORMAT_INT8, BATCH, KEYS, KV, D);
        p.scales = NULL;
        CHECK(kvl_attention(context, NULL, workspace, bytes, &p) == KVL_STATUS_INVALID_VALUE, "-");
        CHECK(strstr(sentence(), "k is int8, but has no scales") != NULL, "%s", sentence());
        p.scales = which ? &scales : &keys_alone;
        memset(out[1], 0, sizeof out[1]);
        OK(kvl_attention(context, NULL, workspace, bytes, &p));
        for (i = 0; i < BATCH * HEADS * D; i++) NEAR(out[1][i], out[0][i], 2e-6);
    }
    p.v = kvl_make_const_view(v, KVL_FORMAT_F32, BATCH, KEYS, KV, D);
    CHECK(kvl_attention(context, NULL, workspace, bytes, &p) == KVL_STATUS_INVALID_VALUE, "-");
    CHECK(strstr(sentence(), "v is f32, which has no scales, but scales are given") != NULL, "%s", sentence());
    p.scales = &keys_alone;
    keys_alone.k.shape[3] = 2;
    CHECK(kvl_attention(context, NULL, workspace, bytes, &p) == KVL_STATUS_SHAPE, "%s", sentence());
    keys_alone.k.shape[3] = 1;
    keys_alone.k.dtype = KVL_DTYPE_BF16;
    CHECK(kvl_attention(context, NULL, workspace, bytes, &p) == KVL_STATUS_DTYPE, "%s", sentence());
    keys_alone.struct_size = 8;
    CHECK(kvl_attention(context, NULL, workspace, bytes, &p) == KVL_STATUS_STRUCT_SIZE, "%s", sentence());
    free(workspace);
}

static void saturation(kvl_isa isa) {
    const float source[4] = {1e6f, -70000, INFINITY, 2};
    static const uint16_t rounded[4] = {0x7c00, 0xfc00, 0x7c00, 0x4000}, saturated[4] = {0x7bff, 0xfbff, 0x7bff, 0x4000};
    uint16_t keys[4], values[4];
    const int32_t position = 0;
    int flag;
    for (flag = 0; flag < 2; flag++) {
        kvl_context_params params = KVL_CONTEXT_PARAMS_INIT;
        kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
        kvl_context *context = NULL;
        params.max_isa = isa;
        params.flags = flag ? KVL_CONTEXT_FLAG_SATURATE_F16 : 0;
        OK(kvl_context_create(&params, &context));
        if (context == NULL) continue;
        write.k = write.v = kvl_make_const_view(source, KVL_DTYPE_F32, 1, 1, 1, 4);
        write.k_cache = kvl_make_view(keys, KVL_DTYPE_F16, 1, 1, 1, 4);
        write.v_cache = kvl_make_view(values, KVL_DTYPE_F16, 1, 1, 1, 4);
        write.positions = &position;
        OK(kvl_kv_write(context, NULL, &write));
        CHECK(memcmp(keys, flag ? saturated : rounded, sizeof keys) == 0, "%x %x", keys[0], keys[1]);
        CHECK(memcmp(values, flag ? saturated : rounded, sizeof values) == 0, "%x %x", values[0], values[1]);
        kvl_context_destroy(context);
    }
}

/* A cache of int8 with a scale per token and head: written, inserted into another one of f32, and read back. */
static void int8_writes(const kvl_context *context) {
    enum { BATCH = 2, SEQ = 21, KV = 2, CAPACITY = 40, D = 16, N = BATCH * CAPACITY * KV * D };
    static float k[BATCH * SEQ * KV * D], v[BATCH * SEQ * KV * D];
    static int8_t k_units[N], v_units[N];
    static float k_scales[BATCH * CAPACITY * KV], k_plain[N], v_plain[N];
    static uint16_t v_scales[BATCH * CAPACITY * KV], v_half[BATCH * SEQ * KV * D];
    static const int32_t zeros[BATCH] = {0, 0};
    int32_t lengths[BATCH] = {SEQ, SEQ}, plain_lengths[BATCH] = {0, 0};
    kvl_cache_scales scales = KVL_CACHE_SCALES_INIT;
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    kvl_kv_read_params read = KVL_KV_READ_PARAMS_INIT;
    kvl_cache cache = KVL_CACHE_INIT, plain = KVL_CACHE_INIT;
    kvl_kv_layer layer, plain_layer;
    int i, b;
    memset(k_units, 0, sizeof k_units);
    memset(k_scales, 0, sizeof k_scales);
    fill(k, COUNT(k), 42);
    fill(v, COUNT(v), 43);
    scales.k = kvl_make_view(k_scales, KVL_DTYPE_F32, BATCH, CAPACITY, KV, 1);
    scales.v = kvl_make_view(v_scales, KVL_DTYPE_F16, BATCH, CAPACITY, KV, 1);
    scales.k.bytes = sizeof k_scales;
    scales.v.bytes = sizeof v_scales;
    write.k = kvl_make_const_view(k, KVL_DTYPE_F32, BATCH, SEQ, KV, D);
    write.v = kvl_make_const_view(v, KVL_DTYPE_F32, BATCH, SEQ, KV, D);
    write.k_cache = kvl_make_view(k_units, KVL_FORMAT_INT8, BATCH, CAPACITY, KV, D);
    write.v_cache = kvl_make_view(v_units, KVL_FORMAT_INT8, BATCH, CAPACITY, KV, D);
    write.positions = zeros;
    CHECK(kvl_kv_write(context, NULL, &write) == KVL_STATUS_INVALID_VALUE, "-");
    CHECK(strstr(sentence(), "k_cache is int8, but has no scales") != NULL, "%s", sentence());
    write.scales = &scales;
    scales.k.shape[3] = 2;
    CHECK(kvl_kv_write(context, NULL, &write) == KVL_STATUS_SHAPE, "%s", sentence());
    scales.k.shape[3] = 1;
    scales.struct_size = 8;
    CHECK(kvl_kv_write(context, NULL, &write) == KVL_STATUS_STRUCT_SIZE, "%s", sentence());
    scales.struct_size = sizeof scales;
    CHECK(k_units[0] == 0 && k_scales[0] == 0, "something was written");
    OK(kvl_kv_write(context, NULL, &write));
    for (i = 0; i < SEQ * KV; i++) {
        /* The largest magnitude of a head is 127 units. */
        float largest = 0;
        int d, unit = 0;
        for (d = 0; d < D; d++) {
            largest = fmaxf(largest, fabsf(k[i * D + d]));
            if (abs(k_units[i * D + d]) > unit) unit = abs(k_units[i * D + d]);
            NEAR(k_units[i * D + d] * k_scales[i], k[i * D + d], k_scales[i] * 0.5001);
        }
        CHECK(unit == 127, "%d", unit);
        NEAR(k_scales[i], largest / 127, 1e-7);
    }

    /* Out of int8 into f32, as a sequence that is inserted. */
    layer.k = write.k_cache;
    layer.v = write.v_cache;
    layer.scales = &scales;
    cache.layers = &layer;
    plain_layer.k = kvl_make_view(k_plain, KVL_DTYPE_F32, BATCH, CAPACITY, KV, D);
    plain_layer.v = kvl_make_view(v_plain, KVL_DTYPE_F32, BATCH, CAPACITY, KV, D);
    plain_layer.scales = NULL;
    plain.layers = &plain_layer;
    cache.num_layers = plain.num_layers = 1;
    cache.lengths = lengths;
    plain.lengths = plain_lengths;
    for (b = 0; b < BATCH; b++) OK(kvl_cache_insert_sequence(context, NULL, &plain, b, &cache, b, SEQ));
    for (i = 0; i < SEQ * KV * D; i++) {
        CHECK(k_plain[i] == k_units[i] * k_scales[i / D], "%d: %.9g", i, (double)k_plain[i]);
        NEAR(v_plain[i], v[i], 0.01);
    }

    /* And read back, with another type for the values. */
    memset(k_plain, 0, sizeof k_plain);
    read.k_cache = kvl_as_const(write.k_cache);
    read.v_cache = kvl_as_const(write.v_cache);
    read.k = kvl_make_view(k_plain, KVL_DTYPE_F32, BATCH, SEQ, KV, D);
    read.v = kvl_make_view(v_half, KVL_DTYPE_BF16, BATCH, SEQ, KV, D);
    read.positions = zeros;
    CHECK(kvl_kv_read(context, NULL, &read) == KVL_STATUS_INVALID_VALUE, "-");
    CHECK(strstr(sentence(), "k_cache is int8, but has no scales") != NULL, "%s", sentence());
    CHECK(kvl_kv_read(context, NULL, NULL) == KVL_STATUS_NULL_POINTER, "%s", sentence());
    read.scales = &scales;
    read.v.data = NULL;
    CHECK(kvl_kv_read(context, NULL, &read) == KVL_STATUS_NULL_POINTER && k_plain[0] == 0, "%s", sentence());
    read.v.data = v_half;
    OK(kvl_kv_read(context, NULL, &read));
    for (i = 0; i < BATCH * SEQ * KV * D; i++) {
        const int at = i / (SEQ * KV * D) * (CAPACITY * KV * D) + i % (SEQ * KV * D);
        CHECK(k_plain[i] == (float)k_units[at] * k_scales[at / D], "%d: %.9g", i, (double)k_plain[i]);
        NEAR(from_bf16(v_half[i]), v[i], 0.01);
    }
}

/* A cache of eight-bit floats with static scales, which nothing writes. */
static void fp8(const kvl_context *context) {
    enum { SEQ = 3, KV = 2, CAPACITY = 8, D = 4, N = CAPACITY * KV * D };
    static const float k[SEQ * KV * D] = {1, -1.0625f, 448, 1e6f, 0.5f, -1, 2, 3}, v[SEQ * KV * D] = {1, -1.25f, 61440, 0.1f};
    static const int32_t zero = 0;
    uint8_t k_units[N], v_units[N], moved[N];
    float k_scales[KV] = {1, 0.5f}, one = 1, k_read[SEQ * KV * D], v_read[SEQ * KV * D], infinite = INFINITY;
    int32_t lengths[1] = {SEQ}, other_lengths[1] = {0};
    kvl_cache_scales scales = KVL_CACHE_SCALES_INIT;
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    kvl_kv_read_params read = KVL_KV_READ_PARAMS_INIT;
    kvl_cache cache = KVL_CACHE_INIT, other = KVL_CACHE_INIT;
    kvl_kv_layer layer, other_layer;
    int i;
    memset(k_units, 7, sizeof k_units);
    memset(v_units, 7, sizeof v_units);
    /* One scale per head for the keys, none for the values. */
    scales.k = kvl_make_view(k_scales, KVL_DTYPE_F32, 1, CAPACITY, KV, 1);
    scales.k.bytes = sizeof k_scales;
    write.k = kvl_make_const_view(k, KVL_DTYPE_F32, 1, SEQ, KV, D);
    write.v = kvl_make_const_view(v, KVL_DTYPE_F32, 1, SEQ, KV, D);
    write.k_cache = kvl_make_view(k_units, KVL_FORMAT_FP8_E4M3, 1, CAPACITY, KV, D);
    write.v_cache = kvl_make_view(v_units, KVL_FORMAT_FP8_E5M2, 1, CAPACITY, KV, D);
    write.positions = &zero;
    write.scales = &scales;
    scales.k.bytes = 0;
    CHECK(kvl_kv_write(context, NULL, &write) == KVL_STATUS_STRIDE, "-");
    CHECK(strstr(sentence(), "the scales of k_cache have the strides [16, 2, 1, 1], but fp8_e4m3 has one scale per head") != NULL, "%s",
          sentence());
    CHECK(k_units[0] == 7, "something was written");
    scales.k.strides[0] = scales.k.strides[1] = 0;
    scales.k.bytes = sizeof k_scales;
    OK(kvl_kv_write(context, NULL, &write));
    {
        /* 1, -1.0625 (a tie, to even), 448 and what saturates; the second head in halves. */
        static const uint8_t keys[8] = {0x38, 0xb8, 0x7e, 0x7e, 0x38, 0xc0, 0x48, 0x4c}, values[4] = {0x3c, 0xbd, 0x7b, 0x2e};
        CHECK(memcmp(k_units, keys, sizeof keys) == 0, "%x %x %x", k_units[1], k_units[3], k_units[7]);
        CHECK(memcmp(v_units, values, sizeof values) == 0, "%x %x %x", v_units[1], v_units[2], v_units[3]);
        CHECK(k_units[SEQ * KV * D] == 7 && k_scales[0] == 1 && k_scales[1] == 0.5f, "more was written");
    }
    read.k_cache = kvl_as_const(write.k_cache);
    read.v_cache = kvl_as_const(write.v_cache);
    read.k = kvl_make_view(k_read, KVL_DTYPE_F32, 1, SEQ, KV, D);
    read.v = kvl_make_view(v_read, KVL_DTYPE_F32, 1, SEQ, KV, D);
    read.positions = &zero;
    read.scales = &scales;
    OK(kvl_kv_read(context, NULL, &read));
    CHECK(k_read[1] == -1 && k_read[3] == 448 && k_read[5] == -1 && k_read[7] == 3, "%g %g", (double)k_read[5], (double)k_read[7]);
    CHECK(v_read[1] == -1.25f && v_read[2] == 57344 && v_read[3] == 0.09375f, "%g", (double)v_read[3]);

    /* Into a cache with another scale, where the numbers are rounded again; infinities saturate. */
    layer.k = write.k_cache;
    layer.v = write.v_cache;
    layer.scales = &scales;
    other_layer.k = kvl_make_view(moved, KVL_FORMAT_FP8_E4M3, 1, CAPACITY, KV, D);
    other_layer.v = kvl_make_view(v_units, KVL_FORMAT_FP8_E5M2, 1, CAPACITY, KV, D);
    other_layer.scales = NULL;
    memset(&other_layer.v, 0, sizeof other_layer.v);
    memset(&layer.v, 0, sizeof layer.v);
    cache.layers = &layer;
    other.layers = &other_layer;
    cache.num_layers = other.num_layers = 1;
    cache.lengths = lengths;
    other.lengths = other_lengths;
    OK(kvl_cache_insert_sequence(context, NULL, &other, 0, &cache, 0, SEQ));
    for (i = 0; i < D; i++) CHECK(moved[i] == k_units[i], "%x, not %x", moved[i], k_units[i]);
    CHECK(moved[D] == 0x30 && moved[D + 1] == 0xb8 && moved[D + 3] == 0x44, "%x %x", moved[D], moved[D + 3]);
    write.k = kvl_make_const_view(&infinite, KVL_DTYPE_F32, 1, 1, 1, 1);
    write.v = write.k;
    write.k_cache = kvl_make_view(k_units, KVL_FORMAT_FP8_E4M3, 1, CAPACITY, 1, 1);
    write.v_cache = kvl_make_view(v_units, KVL_FORMAT_FP8_E5M2, 1, CAPACITY, 1, 1);
    /* One scale for both. */
    scales.k = scales.v = kvl_make_view(&one, KVL_DTYPE_F32, 1, CAPACITY, 1, 1);
    scales.k.strides[1] = scales.v.strides[1] = 0;
    OK(kvl_kv_write(context, NULL, &write));
    CHECK(k_units[0] == 0x7e && v_units[0] == 0x7b, "%x %x", k_units[0], v_units[0]);
}

/* What the inline helpers fill in, field by field. */
static void helpers(void) {
    static float k_memory[2 * 5 * 3 * 8], v_memory[2 * 5 * 3 * 4], k[2 * 2 * 3 * 8], v[2 * 2 * 3 * 4], q[2 * 2 * 6 * 8];
    static float out[2 * 2 * 6 * 4];
    static const int32_t list[2] = {1, 2};
    const kvl_view k_cache = kvl_make_view(k_memory, KVL_DTYPE_F32, 2, 5, 3, 8);
    const kvl_view v_cache = kvl_make_view(v_memory, KVL_DTYPE_F32, 2, 5, 3, 4);
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT, made_write;
    kvl_attention_params attention = KVL_ATTENTION_PARAMS_INIT, made_attention;
    write.k = kvl_make_const_view(k, KVL_DTYPE_F32, 2, 2, 3, 8);
    write.v = kvl_make_const_view(v, KVL_DTYPE_F32, 2, 2, 3, 4);
    write.k_cache = k_cache;
    write.v_cache = v_cache;
    write.positions = list;
    made_write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, 2, 2, list);
    CHECK(memcmp(&write, &made_write, sizeof write) == 0, "kvl_make_kv_write");
    attention.q = kvl_make_const_view(q, KVL_DTYPE_F32, 2, 2, 6, 8);
    attention.k = kvl_as_const(k_cache);
    attention.v = kvl_as_const(v_cache);
    attention.out = kvl_make_view(out, KVL_DTYPE_F32, 2, 2, 6, 4);
    attention.flags = KVL_ATTENTION_FLAG_CAUSAL;
    attention.lengths = list;
    made_attention = kvl_make_causal_attention(k_cache, v_cache, q, out, KVL_DTYPE_F32, 2, 2, 6, list);
    CHECK(memcmp(&attention, &made_attention, sizeof attention) == 0, "kvl_make_causal_attention");
}

/* Caches of blocks of 32 elements: keys of one block a head, values of two. */
static void blocks(const kvl_context *context) {
    enum { SEQ = 2, KV = 2, CAPACITY = 4, D = 32, V = 64, K_BLOCKS = CAPACITY * KV, V_BLOCKS = 2 * CAPACITY * KV };
    static const int32_t zero = 0, length = SEQ;
    float k[SEQ * KV * D], v[SEQ * KV * V], q[KV * D], out[KV * V], v_read[SEQ * KV * V];
    uint16_t k_units[K_BLOCKS * 17], v_units[V_BLOCKS * 9];
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    kvl_kv_read_params read = KVL_KV_READ_PARAMS_INIT;
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    size_t bytes;
    void *memory;
    int i;
    for (i = 0; i < SEQ * KV * D; i++) k[i] = i % D == 0 ? 127 : (float)(i % D) + 0.5f;
    for (i = 0; i < SEQ * KV * V; i++) v[i] = i % 32 == 0 ? -8 : (float)(i % 8);
    for (i = 0; i < KV * D; i++) q[i] = 0;
    memset(k_units, 7, sizeof k_units);
    memset(v_units, 7, sizeof v_units);
    write.k = kvl_make_const_view(k, KVL_DTYPE_F32, 1, SEQ, KV, D);
    write.v = kvl_make_const_view(v, KVL_DTYPE_F32, 1, SEQ, KV, V);
    write.k_cache = kvl_make_view(k_units, KVL_FORMAT_Q8_0, 1, CAPACITY, KV, D);
    write.v_cache = kvl_make_view(v_units, KVL_FORMAT_Q4_0, 1, CAPACITY, KV, V);
    CHECK(write.v_cache.strides[0] == CAPACITY * KV * 2 && write.v_cache.strides[2] == 2, "strides count blocks");
    write.k_cache.bytes = sizeof k_units;
    write.v_cache.bytes = sizeof v_units - 1;
    write.positions = &zero;
    CHECK(kvl_kv_write(context, NULL, &write) == KVL_STATUS_BOUNDS && k_units[0] == 0x0707, "%s", sentence());
    write.v_cache.bytes = sizeof v_units;
    write.k_cache.shape[3] = write.k.shape[3] = 31;
    CHECK(kvl_kv_write(context, NULL, &write) == KVL_STATUS_SHAPE && strstr(sentence(), "dim = 31") != NULL, "%s", sentence());
    write.k_cache.shape[3] = write.k.shape[3] = D;
    write.v_cache.strides[3] = 2;
    CHECK(kvl_kv_write(context, NULL, &write) == KVL_STATUS_STRIDE && k_units[0] == 0x0707, "%s", sentence());
    write.v_cache.strides[3] = 1;
    write.v_cache.data = (char *)v_units + 1;
    write.v_cache.bytes = 0;
    CHECK(kvl_kv_write(context, NULL, &write) == KVL_STATUS_BOUNDS && strstr(sentence(), "not aligned") != NULL, "%s", sentence());
    write.v_cache.data = v_units;
    OK(kvl_kv_write(context, NULL, &write));
    {
        /* A factor of 1; ties are rounded away from zero. */
        const int8_t *block = (const int8_t *)k_units;
        CHECK(k_units[0] == 0x3c00 && block[2] == 127 && block[3] == 2 && block[33] == 32, "%x %d %d", k_units[0], block[3], block[33]);
        CHECK(v_units[0] == 0x3c00 && v_units[1] == 0x9980 && v_units[2] == 0xbbaa, "%x %x", v_units[1], v_units[2]);
        CHECK(k_units[SEQ * KV * 17] == 0x0707 && v_units[SEQ * KV * 18] == 0x0707, "more was written");
    }
    read.k_cache = kvl_as_const(write.k_cache);
    read.v_cache = kvl_as_const(write.v_cache);
    read.k = kvl_make_view(k, KVL_DTYPE_F32, 1, SEQ, KV, D);
    read.v = kvl_make_view(v_read, KVL_DTYPE_F32, 1, SEQ, KV, V);
    read.positions = &zero;
    OK(kvl_kv_read(context, NULL, &read));
    for (i = 0; i < SEQ * KV * V; i++) CHECK(v_read[i] == v[i], "%d: %g", i, (double)v_read[i]);
    CHECK(k[D] == 127 && k[D + 1] == 2, "%g", (double)k[D + 1]);

    p.q = kvl_make_const_view(q, KVL_DTYPE_F32, 1, 1, KV, D);
    p.k = read.k_cache;
    p.v = read.v_cache;
    p.out = kvl_make_view(out, KVL_DTYPE_F32, 1, 1, KV, V);
    p.lengths = &length;
    memory = workspace_for(&p, &bytes);
    OK(kvl_attention(context, NULL, memory, bytes, &p));
    free(memory);
    /* Queries of zeros weigh all values alike, and these are the same for both tokens. */
    for (i = 0; i < KV * V; i++) NEAR(out[i], v[i], 1e-5);
}

int main(void) {
    kvl_isa isa;
    int levels = 0;
    library();
    helpers();
    huge_pages();
    frequencies();
    alibi();
    for (isa = KVL_ISA_BEST; isa <= KVL_ISA_NEON_I8MM; isa++) {
        kvl_context_params params = KVL_CONTEXT_PARAMS_INIT;
        kvl_context *context = NULL;
        kvl_isa got = KVL_ISA_BEST;
        if (!kvl_isa_available(isa)) continue;
        params.max_isa = isa;
        OK(kvl_context_create(isa == KVL_ISA_BEST ? NULL : &params, &context));
        if (context == NULL) continue;
        OK(kvl_context_isa(context, &got));
        /* An environment variable can lower it. */
        CHECK(isa == KVL_ISA_BEST || got == isa || getenv("KVLANE_MAX_ISA") != NULL, "asked for %s, got %s", kvl_isa_name(isa), kvl_isa_name(got));
        names(context);
        tuning(context);
        table(context);
        rope(context);
        kv_write(context);
        saturation(isa);
        layouts(context);
        pack(context);
        norm(context);
        hadamard(context);
        repeat(context);
        attention(context);
        narrow_attention(context);
        broadcast(context);
        int8(context);
        int8_writes(context);
        fp8(context);
        blocks(context);
        merge(context);
        chunks(context);
        kvl_context_destroy(context);
        levels++;
    }
    kvl_context_destroy(NULL);
    printf("operations checked at %d levels\n", levels);
    return finish("ops");
}
