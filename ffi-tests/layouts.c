/* Attention over every layout of a cache, with bit masks, prefixes and plans: the bits of contiguous rows. */
#include "check.h"

enum { ROWS = 2, HEADS = 4, KV = 2, D = 16, V_DIM = 8, CAPACITY = 24, MOST = 5 };
enum { PAGE = 4, PAGES_PER_ROW = CAPACITY / PAGE, POOL = ROWS * PAGES_PER_ROW + 2 };
enum { RING = 12, SINKS = 2, WINDOW = 5 };
enum { CONTIGUOUS, PAGED_NHD, PAGED_HND, RAGGED, INDIRECT, RING_ROWS, CACHES };

typedef struct cache {
    const char *name;
    kvl_layout layout;
    kvl_view k, v;
} cache;

static const kvl_context *context;
static _Alignas(64) unsigned char workspace[1 << 21];
static _Alignas(64) unsigned char memory[CACHES][2][1 << 13];
static float new_k[ROWS * MOST * KV * D], new_v[ROWS * MOST * KV * V_DIM], q[ROWS * MOST * HEADS * D];

static const int32_t pages[ROWS * PAGES_PER_ROW] = {7, 0, 12, 3, 9, 1, 4, 13, 2, 10, 6, 8};
static const int32_t starts[ROWS + 1] = {1, 1 + CAPACITY - 1, 2 * CAPACITY - 1};
static int32_t beams[ROWS * CAPACITY];

static size_t element(kvl_dtype dtype) { return dtype == KVL_DTYPE_F32 ? 4 : 2; }

static void hnd(kvl_view *view) {
    view->strides[0] = view->shape[1] * view->shape[2] * view->shape[3];
    view->strides[1] = view->shape[3];
    view->strides[2] = view->shape[1] * view->shape[3];
}

/* Caches full of NaN. */
static void make(cache caches[CACHES], kvl_dtype dtype) {
    static const char *const names[CACHES] = {"contiguous", "paged NHD", "paged HND", "ragged", "indirect", "ring"};
    static const int kinds[CACHES] = {KVL_LAYOUT_KIND_CONTIGUOUS, KVL_LAYOUT_KIND_PAGED, KVL_LAYOUT_KIND_PAGED, KVL_LAYOUT_KIND_RAGGED, KVL_LAYOUT_KIND_INDIRECT, KVL_LAYOUT_KIND_RING};
    static const int axes[CACHES][2] = {{ROWS, CAPACITY},     {POOL, PAGE},     {POOL, PAGE},
                                        {1, ROWS * CAPACITY}, {ROWS, CAPACITY}, {ROWS, RING}};
    int i;
    memset(memory, 0xff, sizeof memory);
    memset(beams, 0xff, sizeof beams);
    for (i = 0; i < CACHES; i++) {
        cache *c = &caches[i];
        c->name = names[i];
        c->layout = (kvl_layout)KVL_LAYOUT_INIT;
        c->layout.kind = kinds[i];
        c->layout.num_sequences = ROWS;
        c->k = kvl_make_view(memory[i][0], dtype, axes[i][0], axes[i][1], KV, D);
        c->v = kvl_make_view(memory[i][1], dtype, axes[i][0], axes[i][1], KV, V_DIM);
        c->k.bytes = c->v.bytes = sizeof memory[i][0];
    }
    hnd(&caches[PAGED_HND].k), hnd(&caches[PAGED_HND].v);
    caches[PAGED_NHD].layout.pages_per_sequence = caches[PAGED_HND].layout.pages_per_sequence = PAGES_PER_ROW;
    caches[PAGED_NHD].layout.table = caches[PAGED_HND].layout.table = pages;
    caches[RAGGED].layout.table = starts;
    caches[INDIRECT].layout.table = beams;
    caches[RING_ROWS].layout.sink_tokens = SINKS;
}

/* New tokens, `counts[b]` of `seq`, from `lengths[b]` on. */
static void append(const cache *c, int seq, const int32_t *lengths, const int32_t *counts) {
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    write.k = kvl_make_const_view(new_k, KVL_DTYPE_F32, ROWS, seq, KV, D);
    write.v = kvl_make_const_view(new_v, KVL_DTYPE_F32, ROWS, seq, KV, V_DIM);
    write.k_cache = c->k;
    write.v_cache = c->v;
    write.positions = lengths;
    write.counts = counts;
    /* Tokens go to their own row, as the table says. */
    write.layout = c->layout.kind == KVL_LAYOUT_KIND_INDIRECT ? NULL : &c->layout;
    OK(kvl_kv_write(context, NULL, &write));
    if (c->layout.kind == KVL_LAYOUT_KIND_INDIRECT) OK(kvl_cache_set_table_tokens(beams, ROWS, CAPACITY, lengths, seq));
}

static void draw(int seq, uint32_t seed) {
    fill(new_k, (size_t)(ROWS * seq * KV * D), seed);
    fill(new_v, (size_t)(ROWS * seq * KV * V_DIM), seed + 1);
    fill(q, (size_t)(ROWS * seq * HEADS * D), seed + 2);
}

static kvl_attention_params over(const cache *c, int seq) {
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    p.q = kvl_make_const_view(q, KVL_DTYPE_F32, ROWS, seq, HEADS, D);
    p.k = kvl_as_const(c->k);
    p.v = kvl_as_const(c->v);
    p.layout = &c->layout;
    return p;
}

/* The last task first. */
static int32_t backwards(void *ctx, size_t n, void (*task)(void *, size_t), void *task_ctx) {
    (void)ctx;
    while (n-- > 0) task(task_ctx, n);
    return 0;
}

typedef struct result {
    float out[ROWS * MOST * HEADS * V_DIM], lse[ROWS * MOST * HEADS];
} result;

/* With a workspace of exactly the required size, on one worker and on three. */
static result run(kvl_attention_params p) {
    kvl_parallel_runner three = KVL_PARALLEL_RUNNER_INIT;
    const kvl_parallel_runner *runners[2] = {NULL, &three};
    result results[2];
    int i;
    three.num_threads = 3;
    three.run = backwards;
    for (i = 0; i < 2; i++) {
        size_t bytes = 0;
        memset(&results[i], 0, sizeof results[i]);
        p.out = kvl_make_view(results[i].out, KVL_DTYPE_F32, p.q.shape[0], p.q.shape[1], HEADS, V_DIM);
        p.lse = results[i].lse;
        OK(kvl_attention_workspace_size(&p, runners[i], &bytes));
        CHECK(bytes > 0 && bytes <= sizeof workspace, "%d bytes", (int)bytes);
        memset(workspace, 0xff, bytes);
        OK(kvl_attention(context, runners[i], workspace, bytes, &p));
    }
    CHECK(memcmp(&results[0], &results[1], sizeof results[0]) == 0, "three workers give other bits");
    return results[0];
}

static int same(const result *a, const result *b) { return memcmp(a, b, sizeof *a) == 0; }

/* The call has computed: no row of the last query is 0 or NaN. */
static int alive(const result *r, int seq) {
    int b, h;
    for (b = 0; b < ROWS; b++) {
        for (h = 0; h < HEADS; h++) {
            const float x = r->out[((b + 1) * seq - 1) * HEADS * V_DIM + h * V_DIM];
            if (!(x != 0 && fabsf(x) < 2)) return 0;
        }
    }
    return 1;
}

/* The bytes of a token's first key and value head, located without the library. */
static const unsigned char *token(const cache *c, const kvl_view *view, int row, int position) {
    int64_t at[2] = {row, position};
    switch (c->layout.kind) {
    case KVL_LAYOUT_KIND_RING:
        if (position >= SINKS) at[1] = SINKS + (position - SINKS) % (RING - SINKS);
        break;
    case KVL_LAYOUT_KIND_PAGED:
        at[0] = pages[row * PAGES_PER_ROW + position / PAGE], at[1] = position % PAGE;
        break;
    case KVL_LAYOUT_KIND_RAGGED:
        at[0] = 0, at[1] = starts[row] + position;
        break;
    default:
        break;
    }
    return (const unsigned char *)view->data + (size_t)(at[0] * view->strides[0] + at[1] * view->strides[1]) * element(view->dtype);
}

static void where_tokens_lie(const cache *c, const cache *plain, const int32_t *lengths) {
    int b, p;
    for (b = 0; b < ROWS; b++) {
        for (p = 0; p < lengths[b]; p++) {
            /* Already overwritten. */
            if (c->layout.kind == KVL_LAYOUT_KIND_RING && lengths[b] > RING && p >= SINKS && p < lengths[b] - (RING - SINKS)) continue;
            CHECK(memcmp(token(c, &c->k, b, p), token(plain, &plain->k, b, p), D * element(c->k.dtype)) == 0 &&
                      memcmp(token(c, &c->v, b, p), token(plain, &plain->v, b, p), V_DIM * element(c->v.dtype)) == 0,
                  "%s, token %d of row %d", c->name, p, b);
        }
    }
}

/* A padded prompt in two pieces, then token by token, longer than the ring. */
static void prompt_and_decode(kvl_dtype dtype) {
    static const int seqs[] = {5, 4, 1, 1, 1, 1, 1, 1, 1, 1};
    static const int32_t first_counts[ROWS] = {5, 3}, prefixes[ROWS] = {SINKS, 1};
    int32_t lengths[ROWS] = {0, 0};
    cache caches[CACHES];
    size_t step;
    int i, b;
    make(caches, dtype);
    for (step = 0; step < COUNT(seqs); step++) {
        const int seq = seqs[step];
        result free_of_windows = {{0}, {0}}, windowed = {{0}, {0}}, prefixed = {{0}, {0}};
        int32_t counts[ROWS] = {seq, seq}, next[ROWS];
        if (step == 0) memcpy(counts, first_counts, sizeof counts);
        for (b = 0; b < ROWS; b++) next[b] = lengths[b] + counts[b];
        draw(seq, 100 * (uint32_t)step);
        for (i = 0; i < CACHES; i++) {
            kvl_attention_params p = over(&caches[i], seq);
            result is;
            append(&caches[i], seq, lengths, counts);
            p.lengths = next;
            p.flags = KVL_ATTENTION_FLAG_CAUSAL;
            if (i != RING_ROWS) {
                is = run(p);
                if (i == CONTIGUOUS) free_of_windows = is;
                CHECK(alive(&is, seq), "%s, step %d", caches[i].name, (int)step);
                CHECK(same(&is, &free_of_windows), "%s, step %d", caches[i].name, (int)step);
            }
            p.flags |= KVL_ATTENTION_FLAG_WINDOW_LEFT;
            p.window_left = WINDOW;
            is = run(p);
            if (i == CONTIGUOUS) windowed = is;
            CHECK(alive(&is, seq), "%s, step %d, window", caches[i].name, (int)step);
            CHECK(same(&is, &windowed), "%s, step %d, window", caches[i].name, (int)step);
            p.prefix_lengths = prefixes;
            is = run(p);
            if (i == CONTIGUOUS) prefixed = is;
            CHECK(same(&is, &prefixed), "%s, step %d, window and prefix", caches[i].name, (int)step);
        }
        CHECK((next[0] > WINDOW + 1) == !same(&windowed, &free_of_windows), "step %d: the window hides", (int)step);
        CHECK(seq == 1 && next[0] <= WINDOW + 1 ? same(&prefixed, &windowed) : !same(&prefixed, &windowed),
              "step %d: a prefix shows what causality and the window hide", (int)step);
        memcpy(lengths, next, sizeof lengths);
    }
    CHECK(lengths[1] > RING, "the ring has not gone round: %d", (int)lengths[1]);
    for (i = 0; i < CACHES; i++) where_tokens_lie(&caches[i], &caches[CONTIGUOUS], lengths);
    {
        /* One query without a window sees the sink tokens and the newest tokens of a ring, as with a byte mask. */
        static unsigned char shown[ROWS * CAPACITY];
        kvl_attention_params ring = over(&caches[RING_ROWS], 1), plain = over(&caches[CONTIGUOUS], 1);
        result a, z;
        int j;
        for (j = 0; j < ROWS * CAPACITY; j++) {
            const int key = j % CAPACITY;
            shown[j] = key < SINKS || key >= lengths[j / CAPACITY] - (RING - SINKS);
        }
        ring.lengths = plain.lengths = lengths;
        plain.mask.data = shown;
        plain.mask.shape[0] = ROWS, plain.mask.shape[1] = 1, plain.mask.shape[2] = HEADS, plain.mask.shape[3] = CAPACITY;
        plain.mask.strides[0] = CAPACITY, plain.mask.strides[3] = 1;
        plain.mask.bytes = sizeof shown;
        a = run(ring), z = run(plain);
        for (j = 0; j < ROWS * HEADS * V_DIM; j++) NEAR(a.out[j], z.out[j], 1e-5);
        for (j = 0; j < ROWS * HEADS; j++) NEAR(a.lse[j], z.lse[j], 1e-5);
    }
}

/* A cache of `lengths` tokens per row, in all layouts. */
static void prefilled(cache caches[CACHES], kvl_dtype dtype, const int32_t lengths[ROWS]) {
    int32_t have[ROWS] = {0, 0};
    int i, b, step;
    make(caches, dtype);
    for (step = 0; have[0] < lengths[0] || have[1] < lengths[1]; step++) {
        int32_t counts[ROWS];
        for (b = 0; b < ROWS; b++) counts[b] = lengths[b] - have[b] < MOST ? lengths[b] - have[b] : MOST;
        draw(MOST, 7000 + 10 * (uint32_t)step);
        for (i = 0; i < CACHES; i++) {
            /* The table takes the tokens of a step for all rows; entries beyond a row's tokens are never read. */
            append(&caches[i], MOST, have, counts);
        }
        for (b = 0; b < ROWS; b++) have[b] += counts[b];
    }
    draw(MOST, 9000);
}

/* Rows of three and of two queries, one after another, compared with one call per row. */
static void ragged_queries(kvl_dtype dtype) {
    static const int32_t lengths[ROWS] = {17, 11}, query_starts[ROWS + 1] = {0, 3, 5};
    cache caches[CACHES];
    result alone[ROWS], together;
    int i, b;
    prefilled(caches, dtype, lengths);
    for (b = 0; b < ROWS; b++) {
        const int n = query_starts[b + 1] - query_starts[b];
        kvl_attention_params p = over(&caches[CONTIGUOUS], n);
        p.q = kvl_make_const_view(q + query_starts[b] * HEADS * D, KVL_DTYPE_F32, 1, n, HEADS, D);
        p.k.shape[0] = p.v.shape[0] = 1;
        p.k.data = token(&caches[CONTIGUOUS], &caches[CONTIGUOUS].k, b, 0);
        p.v.data = token(&caches[CONTIGUOUS], &caches[CONTIGUOUS].v, b, 0);
        p.k.bytes = p.v.bytes = 0;
        p.lengths = lengths + b;
        p.flags = KVL_ATTENTION_FLAG_CAUSAL;
        p.layout = NULL;
        alone[b] = run(p);
    }
    for (i = 0; i < RING_ROWS; i++) {
        kvl_attention_params p = over(&caches[i], 5);
        p.q = kvl_make_const_view(q, KVL_DTYPE_F32, 1, 5, HEADS, D);
        p.cu_seqlens_q = query_starts;
        p.num_sequences = ROWS;
        p.lengths = lengths;
        p.flags = KVL_ATTENTION_FLAG_CAUSAL;
        together = run(p);
        for (b = 0; b < ROWS; b++) {
            const int first = query_starts[b], n = query_starts[b + 1] - first;
            CHECK(memcmp(together.out + first * HEADS * V_DIM, alone[b].out, (size_t)(n * HEADS * V_DIM) * sizeof(float)) == 0,
                  "%s, row %d", caches[i].name, b);
            CHECK(memcmp(together.lse + first * HEADS, alone[b].lse, (size_t)(n * HEADS) * sizeof(float)) == 0,
                  "%s, row %d", caches[i].name, b);
        }
    }
}

/* Five guesses after the cache, 0 -> 1 -> 3 and 0 -> 2 -> 4 in row 0, a chain in row 1: bits of the guesses compared with
 * bytes of all keys. */
static void tree(kvl_dtype dtype) {
    static const unsigned char bits[ROWS * MOST] = {1, 3, 5, 11, 21, 1, 3, 7, 15, 31};
    static const int32_t lengths[ROWS] = {12, 9}, first_keys[ROWS] = {12 - MOST, 9 - MOST};
    static unsigned char bytes[ROWS * MOST * CAPACITY];
    kvl_bit_mask mask = KVL_BIT_MASK_INIT;
    cache caches[CACHES];
    result wanted, causal, is;
    kvl_attention_params p;
    int i, b, s, j;
    prefilled(caches, dtype, lengths);
    for (b = 0; b < ROWS; b++) {
        for (s = 0; s < MOST; s++) {
            for (j = 0; j < CAPACITY; j++) {
                const int guess = j - first_keys[b];
                bytes[(b * MOST + s) * CAPACITY + j] =
                    guess < 0 || (guess < MOST && (bits[b * MOST + s] >> guess & 1) != 0);
            }
        }
    }
    p = over(&caches[CONTIGUOUS], MOST);
    p.lengths = lengths;
    p.mask.data = bytes;
    p.mask.bytes = sizeof bytes;
    p.mask.shape[0] = ROWS, p.mask.shape[1] = MOST, p.mask.shape[2] = HEADS, p.mask.shape[3] = CAPACITY;
    p.mask.strides[0] = MOST * CAPACITY, p.mask.strides[1] = CAPACITY, p.mask.strides[3] = 1;
    wanted = run(p);
    memset(&p.mask, 0, sizeof p.mask);
    p.flags = KVL_ATTENTION_FLAG_CAUSAL;
    causal = run(p);
    CHECK(!same(&wanted, &causal), "the tree is none");
    mask.data = bits;
    mask.bytes = sizeof bits;
    mask.shape[0] = ROWS, mask.shape[1] = MOST, mask.shape[2] = HEADS, mask.shape[3] = MOST;
    mask.strides[0] = 8 * MOST, mask.strides[1] = 8;
    mask.first_keys = first_keys;
    for (i = 0; i < CACHES; i++) {
        p = over(&caches[i], MOST);
        p.lengths = lengths;
        p.bit_mask = &mask;
        is = run(p);
        CHECK(same(&is, &wanted), "%s", caches[i].name);
        /* A chain equals causality. */
        CHECK(memcmp(is.out + MOST * HEADS * V_DIM, causal.out + MOST * HEADS * V_DIM, sizeof is.out / ROWS) == 0, "%s",
              caches[i].name);
    }
}

/* Masks of sequences one after another, each [queries, keys] from a whole byte on, compared with a byte per entry. */
static void flattened(kvl_dtype dtype) {
    static const int32_t lengths[ROWS] = {17, 11}, query_starts[ROWS + 1] = {0, 2, 5};
    static const int64_t shape[4] = {ROWS, 3, HEADS, CAPACITY};
    static unsigned char shown[ROWS][3][CAPACITY];
    unsigned char packed[16], original[16];
    int64_t row_starts[ROWS], query_strides[ROWS];
    kvl_bit_mask mask = KVL_BIT_MASK_INIT;
    cache caches[CACHES];
    kvl_attention_params p;
    result wanted, is;
    int i, b, s, j;
    size_t bytes = 0;
    prefilled(caches, dtype, lengths);
    memset(packed, 0, sizeof packed);
    for (b = 0; b < ROWS; b++) {
        const int n = query_starts[b + 1] - query_starts[b];
        row_starts[b] = 8 * (int64_t)bytes;
        query_strides[b] = lengths[b];
        for (s = 0; s < n; s++) {
            for (j = 0; j < lengths[b]; j++) {
                const int bit = (int)row_starts[b] + s * lengths[b] + j;
                shown[b][s][j] = (unsigned char)((j * j + 3 * s + b) % 5 != 0);
                packed[bit / 8] |= (unsigned char)(shown[b][s][j] << bit % 8);
            }
        }
        bytes += (size_t)(n * lengths[b] + 7) / 8;
    }
    memcpy(original, packed, sizeof packed);
    p = over(&caches[CONTIGUOUS], 5);
    p.q = kvl_make_const_view(q, KVL_DTYPE_F32, 1, 5, HEADS, D);
    p.cu_seqlens_q = query_starts;
    p.num_sequences = ROWS;
    p.lengths = lengths;
    p.mask.data = &shown[0][0][0];
    p.mask.bytes = sizeof shown;
    memcpy(p.mask.shape, shape, sizeof shape);
    p.mask.strides[0] = 3 * CAPACITY, p.mask.strides[1] = CAPACITY, p.mask.strides[3] = 1;
    wanted = run(p);
    memset(&p.mask, 0, sizeof p.mask);
    is = run(p);
    CHECK(!same(&is, &wanted), "the mask hides nothing");
    mask.data = packed;
    mask.bytes = bytes;
    memcpy(mask.shape, shape, sizeof shape);
    mask.bit_offsets = row_starts;
    mask.query_strides = query_strides;
    for (i = 0; i < RING_ROWS; i++) {
        kvl_attention_params planned = KVL_ATTENTION_PARAMS_INIT;
        kvl_plan *plan = NULL;
        p.k = kvl_as_const(caches[i].k);
        p.v = kvl_as_const(caches[i].v);
        p.layout = &caches[i].layout;
        p.bit_mask = &mask;
        is = run(p);
        CHECK(same(&is, &wanted), "%s", caches[i].name);
        /* The plan has its own copy of the bits. */
        OK(kvl_plan_create(&p, &plan));
        memset(packed, 0, sizeof packed);
        planned.q = p.q;
        planned.k = p.k;
        planned.v = p.v;
        planned.plan = plan;
        is = run(planned);
        CHECK(same(&is, &wanted), "%s, by a plan", caches[i].name);
        kvl_plan_destroy(plan);
        memcpy(packed, original, sizeof packed);
    }
}

/* Two layers, one with NHD pages and one with HND pages, share a plan from step to step; pages are added when needed. */
static void plans(kvl_dtype dtype) {
    static const int32_t begin[ROWS] = {7, 3}, one[ROWS] = {1, 1};
    int32_t lengths[ROWS], given[ROWS * PAGES_PER_ROW];
    kvl_layout so_far = KVL_LAYOUT_INIT;
    kvl_plan *plan = NULL;
    cache caches[CACHES];
    kvl_attention_params p;
    result wanted, is;
    int i, b, step;
    prefilled(caches, dtype, begin);
    memcpy(lengths, begin, sizeof lengths);
    memset(given, 0xff, sizeof given);
    for (b = 0; b < ROWS; b++) {
        for (i = 0; i * PAGE < begin[b]; i++) given[b * PAGES_PER_ROW + i] = pages[b * PAGES_PER_ROW + i];
    }
    so_far = caches[PAGED_NHD].layout;
    so_far.table = given;
    p = over(&caches[PAGED_NHD], 1);
    p.k.data = p.v.data = NULL; /* Only the shapes are used. */
    p.layout = &so_far;
    p.lengths = begin;
    p.flags = KVL_ATTENTION_FLAG_CAUSAL | KVL_ATTENTION_FLAG_WINDOW_LEFT;
    p.window_left = WINDOW;
    OK(kvl_plan_create(&p, &plan));
    /* The plan has its own copies of the lists. */
    memset(given, 0x7f, sizeof given);
    for (step = 0; step < 9; step++) {
        draw(1, 500 + 10 * (uint32_t)step);
        for (i = CONTIGUOUS; i <= PAGED_HND; i++) append(&caches[i], 1, lengths, NULL);
        for (b = 0; b < ROWS; b++) {
            if (lengths[b] % PAGE == 0) {
                const int page = lengths[b] / PAGE;
                OK(kvl_plan_set_table(plan, b, page, &pages[b * PAGES_PER_ROW + page], 1));
            }
            lengths[b]++;
        }
        OK(kvl_plan_advance(plan, one, ROWS));
        p = over(&caches[CONTIGUOUS], 1);
        p.lengths = lengths;
        p.flags = KVL_ATTENTION_FLAG_CAUSAL | KVL_ATTENTION_FLAG_WINDOW_LEFT;
        p.window_left = WINDOW;
        wanted = run(p);
        for (i = PAGED_NHD; i <= PAGED_HND; i++) {
            p = over(&caches[i], 1);
            p.layout = NULL;
            p.plan = plan;
            is = run(p);
            CHECK(alive(&is, 1) && same(&is, &wanted), "%s, step %d", caches[i].name, step);
        }
    }
    /* A new plan, for ragged queries over contiguous rows. */
    {
        static const int32_t query_starts[ROWS + 1] = {0, 1, 4};
        draw(MOST, 900);
        p = over(&caches[CONTIGUOUS], MOST);
        p.q = kvl_make_const_view(q, KVL_DTYPE_F32, 1, 4, HEADS, D);
        p.cu_seqlens_q = query_starts;
        p.num_sequences = ROWS;
        p.lengths = lengths;
        p.flags = KVL_ATTENTION_FLAG_CAUSAL;
        wanted = run(p);
        OK(kvl_plan_update(plan, &p));
        p.cu_seqlens_q = NULL;
        p.num_sequences = 0;
        p.lengths = NULL;
        p.flags = 0;
        p.layout = NULL;
        p.plan = plan;
        is = run(p);
        CHECK(same(&is, &wanted), "-");
    }
    kvl_plan_destroy(plan);
}

/* A prefix that both rows share, compared with rows that hold it each. */
static void shared_prefix(void) {
    enum { PREFIX = 14, OWN = 6 };
    static const int32_t own[ROWS] = {6, 3}, both[ROWS] = {PREFIX + 6, PREFIX + 3};
    static float k[ROWS][PREFIX + OWN][KV * D], v[ROWS][PREFIX + OWN][KV * V_DIM];
    static const float sinks[HEADS] = {0.5f, -1, 0, 2};
    kvl_const_view prefix_k, prefix_v;
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    result wanted, is;
    size_t bytes = 0, plain = 0;
    int i;
    fill(&k[0][0][0], sizeof k / sizeof(float), 61);
    fill(&v[0][0][0], sizeof v / sizeof(float), 62);
    memcpy(k[1], k[0], PREFIX * sizeof k[0][0]);
    memcpy(v[1], v[0], PREFIX * sizeof v[0][0]);
    draw(MOST, 63);
    p.q = kvl_make_const_view(q, KVL_DTYPE_F32, ROWS, 2, HEADS, D);
    p.k = kvl_make_const_view(k, KVL_DTYPE_F32, ROWS, PREFIX + OWN, KV, D);
    p.v = kvl_make_const_view(v, KVL_DTYPE_F32, ROWS, PREFIX + OWN, KV, V_DIM);
    p.lengths = both;
    p.flags = KVL_ATTENTION_FLAG_CAUSAL;
    p.sink_logits = sinks;
    wanted = run(p);

    prefix_k = p.k, prefix_v = p.v;
    prefix_k.shape[0] = prefix_v.shape[0] = 1;
    prefix_k.shape[1] = prefix_v.shape[1] = PREFIX;
    p.k.shape[1] = p.v.shape[1] = OWN;
    p.k.data = k[0][PREFIX];
    p.v.data = v[0][PREFIX];
    p.lengths = own;
    memset(&is, 0, sizeof is);
    p.out = kvl_make_view(is.out, KVL_DTYPE_F32, ROWS, 2, HEADS, V_DIM);
    p.lse = is.lse;
    OK(kvl_attention_with_prefix_workspace_size(&prefix_k, &p, NULL, &bytes));
    OK(kvl_attention_workspace_size(&p, NULL, &plain));
    CHECK(bytes > plain && bytes <= sizeof workspace, "%d bytes", (int)bytes);
    OK(kvl_attention_with_prefix(context, NULL, workspace, bytes, &prefix_k, &prefix_v, NULL, &p));
    for (i = 0; i < ROWS * 2 * HEADS * V_DIM; i++) NEAR(is.out[i], wanted.out[i], 1e-5);
    for (i = 0; i < ROWS * 2 * HEADS; i++) NEAR(is.lse[i], wanted.lse[i], 1e-5);
}

/* Beam search: a reordered table, compared with reordered rows. */
static void beam_search(kvl_dtype dtype) {
    static const int32_t parents[][ROWS] = {{0, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}, {1, 0}};
    int32_t lengths[ROWS] = {0, 0}, copied[ROWS] = {0, 0};
    static kvl_kv_layer layer;
    kvl_cache rows = KVL_CACHE_INIT;
    cache caches[CACHES];
    size_t step, bytes;
    int b;
    make(caches, dtype);
    layer.k = caches[CONTIGUOUS].k;
    layer.v = caches[CONTIGUOUS].v;
    rows.layers = &layer;
    rows.num_layers = 1;
    rows.lengths = copied;
    for (step = 0; step < COUNT(parents); step++) {
        kvl_attention_params p;
        result wanted, is;
        draw(1, 300 + 10 * (uint32_t)step);
        append(&caches[CONTIGUOUS], 1, lengths, NULL);
        append(&caches[INDIRECT], 1, lengths, NULL);
        for (b = 0; b < ROWS; b++) copied[b] = ++lengths[b];
        p = over(&caches[CONTIGUOUS], 1);
        p.lengths = lengths;
        wanted = run(p);
        p = over(&caches[INDIRECT], 1);
        p.lengths = lengths;
        is = run(p);
        CHECK(alive(&is, 1) && same(&is, &wanted), "step %d", (int)step);
        OK(kvl_cache_reorder_workspace_size(&rows, NULL, &bytes));
        OK(kvl_cache_reorder(context, NULL, workspace, bytes, &rows, parents[step]));
        OK(kvl_cache_reorder_table_workspace_size(ROWS, CAPACITY, &bytes));
        OK(kvl_cache_reorder_table(workspace, bytes, beams, ROWS, CAPACITY, lengths, parents[step]));
    }
}

int main(void) {
    static const kvl_dtype types[] = {KVL_DTYPE_F32, KVL_DTYPE_F16, KVL_DTYPE_BF16};
    static const kvl_isa levels[] = {KVL_ISA_SCALAR, KVL_ISA_AVX2, KVL_ISA_AVX512,   KVL_ISA_AVX512_BF16,
                                     KVL_ISA_AMX,    KVL_ISA_NEON, KVL_ISA_NEON_BF16};
    size_t level, type;
    for (level = 0; level < COUNT(levels); level++) {
        kvl_context_params params = KVL_CONTEXT_PARAMS_INIT;
        kvl_context *made = NULL;
        params.max_isa = levels[level];
        if (!kvl_isa_available(levels[level])) continue;
        OK(kvl_context_create(&params, &made));
        context = made;
        for (type = 0; type < COUNT(types); type++) {
            prompt_and_decode(types[type]);
            ragged_queries(types[type]);
            tree(types[type]);
            flattened(types[type]);
            plans(types[type]);
            beam_search(types[type]);
        }
        shared_prefix();
        kvl_context_destroy(made);
    }
    return finish("layouts");
}
