/* Serving: requests that come and go, in pages of a common pool. */
#include "book.h"

/* [pool] */
enum { LAYERS = 2, HEADS = 4, KV_HEADS = 2, DIM = 16 };
enum { PAGES = 12, PAGE_SIZE = 8, REQUESTS = 2, PAGES_PER_REQUEST = 4 };

typedef struct pool {
    kvl_kv_layer layers[LAYERS];                  /* [PAGES, PAGE_SIZE, KV_HEADS, DIM] each */
    int32_t table[REQUESTS * PAGES_PER_REQUEST];  /* the pages of every request, in order */
    int32_t lengths[REQUESTS];                    /* the tokens of every request */
    int32_t uses[PAGES];                          /* how many requests have a page */
} pool;

static kvl_layout layout_of(const pool *p) {
    kvl_layout layout = KVL_LAYOUT_INIT;
    layout.kind = KVL_LAYOUT_KIND_PAGED;
    layout.num_sequences = REQUESTS;
    layout.pages_per_sequence = PAGES_PER_REQUEST;
    layout.table = p->table;
    return layout;
}

/* A free page; which one does not matter. */
static int32_t take_page(pool *p) {
    for (int32_t page = PAGES - 1; page >= 0; page--) {
        if (p->uses[page] == 0) {
            p->uses[page] = 1;
            return page;
        }
    }
    exit(1); /* a server would put a request off */
}

/* Pages for `count` more tokens of a request. */
static void make_room(pool *p, int request, int32_t count) {
    const int32_t length = p->lengths[request];
    for (int32_t i = (length + PAGE_SIZE - 1) / PAGE_SIZE; i * PAGE_SIZE < length + count; i++) {
        p->table[request * PAGES_PER_REQUEST + i] = take_page(p);
    }
}
/* [pool] */

static kvl_context *context;
static workspace space;
static float memory[LAYERS][2][PAGES * PAGE_SIZE * KV_HEADS * DIM];
static float plain[LAYERS][2][REQUESTS * PAGES_PER_REQUEST * PAGE_SIZE * KV_HEADS * DIM];
static float q[REQUESTS * 16 * HEADS * DIM], k[REQUESTS * 16 * KV_HEADS * DIM], v[REQUESTS * 16 * KV_HEADS * DIM];
static float outputs[LAYERS][REQUESTS * 16 * HEADS * DIM], wanted[REQUESTS * 16 * HEADS * DIM];

static void draw(int layer, int64_t seq, uint32_t step) {
    project(q, (size_t)(REQUESTS * seq * HEADS * DIM), 10 * step + (uint32_t)layer);
    project(k, (size_t)(REQUESTS * seq * KV_HEADS * DIM), 10 * step + (uint32_t)layer + 3);
    project(v, (size_t)(REQUESTS * seq * KV_HEADS * DIM), 10 * step + (uint32_t)layer + 6);
}

/* The same step in contiguous rows, whose outputs must be those of the pages. */
static void compare(int layer, int64_t seq, uint32_t number, const int32_t *lengths, const int32_t *counts, const float *got) {
    const int32_t after[REQUESTS] = {lengths[0] + counts[0], lengths[1] + counts[1]};
    draw(layer, seq, number);
    const int64_t capacity = PAGES_PER_REQUEST * PAGE_SIZE;
    kvl_view k_cache = kvl_make_view(plain[layer][0], KVL_DTYPE_F32, REQUESTS, capacity, KV_HEADS, DIM);
    kvl_view v_cache = kvl_make_view(plain[layer][1], KVL_DTYPE_F32, REQUESTS, capacity, KV_HEADS, DIM);
    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, REQUESTS, seq, lengths);
    write.counts = counts;
    check(kvl_kv_write(context, NULL, &write));
    kvl_attention_params attention =
        kvl_make_causal_attention(k_cache, v_cache, q, wanted, KVL_DTYPE_F32, REQUESTS, seq, HEADS, after);
    attention.offsets = lengths;
    attend(context, NULL, &space, &attention);
    for (int b = 0; b < REQUESTS; b++) {
        const size_t row = (size_t)(b * seq) * HEADS * DIM;
        EXPECT(memcmp(got + row, wanted + row, (size_t)counts[b] * HEADS * DIM * sizeof *got) == 0);
    }
}

/* [step] */
/* One step of all requests: `counts[b]` of `seq` new tokens of each, prompts and single tokens mixed. */
static void step(pool *p, int64_t seq, const int32_t *counts, uint32_t number) {
    int32_t before[REQUESTS], after[REQUESTS];
    for (int b = 0; b < REQUESTS; b++) {
        make_room(p, b, counts[b]);
        before[b] = p->lengths[b];
        after[b] = p->lengths[b] + counts[b];
    }
    const kvl_layout layout = layout_of(p);
    for (int i = 0; i < LAYERS; i++) {
        draw(i, seq, number); /* q, k and v of the model's layer */
        kvl_kv_write_params write =
            kvl_make_kv_write(p->layers[i].k, p->layers[i].v, k, v, KVL_DTYPE_F32, REQUESTS, seq, before);
        write.counts = counts;
        write.layout = &layout;
        check(kvl_kv_write(context, NULL, &write));

        kvl_attention_params attention = kvl_make_causal_attention(p->layers[i].k, p->layers[i].v, q, outputs[i],
                                                                   KVL_DTYPE_F32, REQUESTS, seq, HEADS, after);
        attention.layout = &layout;
        attention.offsets = before; /* tokens are at the start of their rows of q */
        attend(context, NULL, &space, &attention);
    }
    memcpy(p->lengths, after, sizeof after);
}
/* [step] */

/* A step, and its comparison. */
static void step_and_compare(pool *p, int64_t seq, const int32_t *counts, uint32_t number) {
    const int32_t before[REQUESTS] = {p->lengths[0], p->lengths[1]};
    step(p, seq, counts, number);
    for (int i = 0; i < LAYERS; i++) {
        compare(i, seq, number, before, counts, outputs[i]);
    }
}

/* [slots] */
/* The same write by slots, as servers give them that have a slot mapping: slots count over the pool, page by page. */
static void write_by_slots(const pool *p, int layer, int64_t seq, const int32_t *counts) {
    int32_t slots[REQUESTS * 16];
    for (int b = 0; b < REQUESTS; b++) {
        for (int32_t t = 0; t < seq; t++) {
            const int32_t position = p->lengths[b] + t, entry = b * PAGES_PER_REQUEST + position / PAGE_SIZE;
            slots[b * seq + t] = t < counts[b] ? p->table[entry] * PAGE_SIZE + position % PAGE_SIZE : -1;
        }
    }
    const kvl_layout layout = layout_of(p);
    kvl_kv_write_params write =
        kvl_make_kv_write(p->layers[layer].k, p->layers[layer].v, k, v, KVL_DTYPE_F32, REQUESTS, seq, NULL);
    write.slots = slots;
    write.layout = &layout;
    check(kvl_kv_write(context, NULL, &write));
}
/* [slots] */

static float decoded[10][LAYERS][REQUESTS * HEADS * DIM]; /* the outputs of ten steps */

static void decode_with_a_plan(pool *p) {
    int32_t lengths[REQUESTS] = {p->lengths[0], p->lengths[1]};
    /* [plan] */
    /* Once, and after requests come or go: everything that all layers share is read and checked here. */
    const int32_t one[REQUESTS] = {1, 1};
    const kvl_layout layout = layout_of(p);
    kvl_attention_params shared = kvl_make_causal_attention(p->layers[0].k, p->layers[0].v, NULL, NULL, KVL_DTYPE_F32,
                                                            REQUESTS, 1, HEADS, p->lengths);
    shared.layout = &layout;
    kvl_plan *plan = NULL;
    check(kvl_plan_create(&shared, &plan));

    for (uint32_t number = 0; number < 10; number++) {
        for (int b = 0; b < REQUESTS; b++) {
            const int32_t last = p->lengths[b] / PAGE_SIZE;
            make_room(p, b, 1);
            check(kvl_plan_set_table(plan, b, last, &p->table[b * PAGES_PER_REQUEST + last], 1));
        }
        check(kvl_plan_advance(plan, one, REQUESTS));
        for (int i = 0; i < LAYERS; i++) {
            draw(i, 1, 100 + number);
            kvl_kv_write_params write =
                kvl_make_kv_write(p->layers[i].k, p->layers[i].v, k, v, KVL_DTYPE_F32, REQUESTS, 1, p->lengths);
            write.layout = &layout;
            check(kvl_kv_write(context, NULL, &write));

            kvl_attention_params attention = KVL_ATTENTION_PARAMS_INIT;
            attention.q = kvl_make_const_view(q, KVL_DTYPE_F32, REQUESTS, 1, HEADS, DIM);
            attention.k = kvl_as_const(p->layers[i].k);
            attention.v = kvl_as_const(p->layers[i].v);
            attention.out = kvl_make_view(decoded[number][i], KVL_DTYPE_F32, REQUESTS, 1, HEADS, DIM);
            attention.plan = plan; /* in place of flags, lengths and layout */
            attend(context, NULL, &space, &attention);
        }
        for (int b = 0; b < REQUESTS; b++) {
            p->lengths[b] += 1;
        }
    }
    kvl_plan_destroy(plan);
    /* [plan] */
    for (uint32_t number = 0; number < 10; number++) {
        for (int i = 0; i < LAYERS; i++) {
            compare(i, 1, 100 + number, lengths, one, decoded[number][i]);
        }
        lengths[0] += 1;
        lengths[1] += 1;
    }
}

static void end_request(pool *p, int request) {
    /* [end] */
    for (int32_t i = 0; i * PAGE_SIZE < p->lengths[request]; i++) {
        p->uses[p->table[request * PAGES_PER_REQUEST + i]] -= 1;
    }
    p->lengths[request] = 0;
    /* [end] */
}

static void fork_request(pool *p, int from, int to) {
    /* [fork] */
    /* Request `to` continues what `from` has so far. Full pages are shared; the last one, which both will write, is copied. */
    const int32_t full = p->lengths[from] / PAGE_SIZE, rest = p->lengths[from] % PAGE_SIZE;
    for (int32_t i = 0; i < full; i++) {
        const int32_t page = p->table[from * PAGES_PER_REQUEST + i];
        p->table[to * PAGES_PER_REQUEST + i] = page;
        p->uses[page] += 1;
    }
    if (rest > 0) {
        const int32_t move[2] = {p->table[from * PAGES_PER_REQUEST + full], take_page(p)};
        check(kvl_cache_copy_pages(context, NULL, p->layers, LAYERS, move, 1));
        p->table[to * PAGES_PER_REQUEST + full] = move[1];
    }
    p->lengths[to] = p->lengths[from];
    /* [fork] */
    const size_t row = PAGES_PER_REQUEST * PAGE_SIZE * KV_HEADS * DIM;
    for (int i = 0; i < LAYERS; i++) {
        for (int j = 0; j < 2; j++) {
            memcpy(plain[i][j] + (size_t)to * row, plain[i][j] + (size_t)from * row, row * sizeof(float));
        }
    }
}

int main(void) {
    static pool p;
    check(kvl_context_create(NULL, &context));
    for (int i = 0; i < LAYERS; i++) {
        p.layers[i].k = kvl_make_view(memory[i][0], KVL_DTYPE_F32, PAGES, PAGE_SIZE, KV_HEADS, DIM);
        p.layers[i].v = kvl_make_view(memory[i][1], KVL_DTYPE_F32, PAGES, PAGE_SIZE, KV_HEADS, DIM);
    }
    const int32_t prompts[REQUESTS] = {11, 3};
    step_and_compare(&p, 11, prompts, 1);
    EXPECT(p.lengths[0] == 11 && p.lengths[1] == 3);

    /* A slot mapping writes the bytes that the table writes. */
    const int32_t one[REQUESTS] = {1, 1};
    static float before[LAYERS][2][PAGES * PAGE_SIZE * KV_HEADS * DIM];
    step_and_compare(&p, 1, one, 2);
    memcpy(before, memory, sizeof memory);
    p.lengths[0] -= 1;
    p.lengths[1] -= 1;
    draw(LAYERS - 1, 1, 2);
    write_by_slots(&p, LAYERS - 1, 1, one);
    EXPECT(memcmp(before, memory, sizeof memory) == 0);
    p.lengths[0] += 1;
    p.lengths[1] += 1;

    decode_with_a_plan(&p);
    end_request(&p, 1);
    fork_request(&p, 0, 1);
    EXPECT(p.lengths[1] == 22 && p.table[0] == p.table[PAGES_PER_REQUEST] && p.table[2] != p.table[PAGES_PER_REQUEST + 2]);
    step_and_compare(&p, 1, one, 3);

    /* [defragment] */
    int32_t map[PAGES];
    int64_t used = 0;
    check(kvl_cache_defragment(context, NULL, p.layers, LAYERS, p.table, REQUESTS, PAGES_PER_REQUEST, p.lengths, map, &used));
    /* Pages from `used` on are free; page i is now page map[i]. */
    /* [defragment] */
    EXPECT(used == 4);
    int32_t uses[PAGES] = {0};
    for (int32_t page = 0; page < PAGES; page++) {
        if (map[page] >= 0) {
            uses[map[page]] = p.uses[page];
        }
    }
    memcpy(p.uses, uses, sizeof uses);
    step_and_compare(&p, 1, one, 4);
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
