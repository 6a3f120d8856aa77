/* Operations on whole caches and shards: known results, and errors that change nothing. */
#include "check.h"

enum { ROWS = 3, SLOTS = 6, HEADS = 2, D = 4, TOKEN = HEADS * D, CACHE = ROWS * SLOTS * TOKEN };

/* Two layers in one block of memory, so that wrong writes are detected. */
static struct {
    float k[2][CACHE], v[CACHE];
    int32_t lengths[ROWS];
} all, saved;

static kvl_kv_layer layers[2];
static _Alignas(64) unsigned char workspace[1 << 14];
static const kvl_context *context;

/* Element 0 identifies the token: row * 100 + slot. */
static kvl_cache fresh(int32_t a, int32_t b, int32_t c) {
    kvl_cache cache = KVL_CACHE_INIT;
    int row, slot, i;
    for (row = 0; row < ROWS; row++) {
        for (slot = 0; slot < SLOTS; slot++) {
            for (i = 0; i < TOKEN; i++) {
                const size_t at = (size_t)(row * SLOTS + slot) * TOKEN + (size_t)i;
                all.k[0][at] = all.k[1][at] = all.v[at] = i % D == 0 ? (float)(row * 100 + slot) : 0.5f * (float)i;
            }
        }
    }
    all.lengths[0] = a, all.lengths[1] = b, all.lengths[2] = c;
    memset(layers, 0, sizeof layers);
    layers[0].k = kvl_make_view(all.k[0], KVL_DTYPE_F32, ROWS, SLOTS, HEADS, D);
    layers[0].v = kvl_make_view(all.v, KVL_DTYPE_F32, ROWS, SLOTS, HEADS, D);
    layers[1].k = kvl_make_view(all.k[1], KVL_DTYPE_F32, ROWS, SLOTS, HEADS, D); /* Without values. */
    cache.layers = layers;
    cache.num_layers = 2;
    cache.lengths = all.lengths;
    saved = all;
    return cache;
}

static int token(int row, int slot) {
    const float *k = all.k[1] + (row * SLOTS + slot) * TOKEN, *v = all.v + (row * SLOTS + slot) * TOKEN;
    CHECK(memcmp(k, v, TOKEN * sizeof *k) == 0, "keys and values of row %d, slot %d differ", row, slot);
    return (int)v[D];
}

#define ROW(row, ...)                                                                                                  \
    do {                                                                                                               \
        static const int wanted_[] = {__VA_ARGS__};                                                                    \
        int slot_;                                                                                                     \
        for (slot_ = 0; slot_ < (int)COUNT(wanted_); slot_++)                                                          \
            CHECK(token(row, slot_) == wanted_[slot_], "row %d, slot %d holds %d", row, slot_, token(row, slot_));      \
    } while (0)

#define LENGTHS(a, b, c)                                                                                               \
    CHECK(all.lengths[0] == (a) && all.lengths[1] == (b) && all.lengths[2] == (c), "%d %d %d", (int)all.lengths[0],    \
          (int)all.lengths[1], (int)all.lengths[2])

#define REFUSED(wanted, text, call)                                                                                    \
    do {                                                                                                               \
        kvl_status got_;                                                                                               \
        saved = all;                                                                                                   \
        got_ = (call);                                                                                                 \
        CHECK(got_ == (wanted), "%d: %s", (int)got_, got_ == KVL_STATUS_OK ? "accepted" : sentence());                        \
        CHECK(strstr(sentence(), (text)) != NULL, "no \"%s\" in: %s", (text), sentence());                             \
        CHECK(memcmp(&saved, &all, sizeof all) == 0, "something was written");                                         \
    } while (0)

static void rows(void) {
    static const int32_t one[] = {1}, two[] = {2, 1}, counts[] = {0, 1, 2}, shorter[] = {1, 2, 3}, parents[] = {1, 0, 1};
    static const int32_t values[] = {6, 5};
    kvl_cache cache = fresh(4, 2, 1), other;
    kvl_layout ring = KVL_LAYOUT_INIT;
    size_t bytes = 0;
    OK(kvl_cache_advance(&cache, counts));
    LENGTHS(4, 3, 3);
    OK(kvl_cache_truncate(&cache, shorter, 0, 0));
    LENGTHS(1, 2, 3);
    OK(kvl_cache_set_lengths(&cache, two, values, 2));
    LENGTHS(1, 5, 6);
    OK(kvl_cache_reset(NULL, &cache, one, 1, 0));
    LENGTHS(1, 0, 6);
    CHECK(memcmp(saved.k, all.k, sizeof all.k) == 0, "lengths move no byte");
    OK(kvl_cache_reset(NULL, &cache, one, 1, 1));
    ROW(0, 0, 1, 2, 3, 4, 5);
    ROW(1, 0, 0, 0, 0, 0, 0);
    CHECK(all.k[0][SLOTS * TOKEN + 5] == 0, "not cleared");

    cache = fresh(4, 2, 1);
    OK(kvl_cache_copy_prefix(context, NULL, &cache, 0, two, 2, 3));
    LENGTHS(4, 3, 3);
    ROW(1, 0, 1, 2, 103, 104, 105);
    ROW(2, 0, 1, 2, 203, 204, 205);

    cache = fresh(4, 2, 1);
    OK(kvl_cache_reorder_workspace_size(&cache, NULL, &bytes));
    CHECK(bytes > 0 && bytes <= sizeof workspace, "%d", (int)bytes);
    OK(kvl_cache_reorder(context, NULL, workspace, bytes, &cache, parents));
    LENGTHS(2, 4, 2);
    ROW(0, 100, 101, 2);
    ROW(1, 0, 1, 2, 3, 104);
    ROW(2, 100, 101, 202);
    REFUSED(KVL_STATUS_WORKSPACE, "bytes", kvl_cache_reorder(context, NULL, workspace, bytes - 1, &cache, parents));
    REFUSED(KVL_STATUS_WORKSPACE, "64 bytes", kvl_cache_reorder(context, NULL, workspace + 8, bytes, &cache, parents));
    REFUSED(KVL_STATUS_NULL_POINTER, "parents is null", kvl_cache_reorder(context, NULL, workspace, bytes, &cache, NULL));

    /* A row of 16-bit elements from another cache. */
    {
        static uint16_t half[3][SLOTS * TOKEN];
        static kvl_kv_layer sources[2];
        int32_t length = 3;
        int i, j;
        for (i = 0; i < 3; i++) {
            for (j = 0; j < SLOTS * TOKEN; j++) half[i][j] = 0x3f80; /* 1 */
        }
        memset(sources, 0, sizeof sources);
        sources[0].k = kvl_make_view(half[0], KVL_DTYPE_BF16, 1, SLOTS, HEADS, D);
        sources[0].v = kvl_make_view(half[1], KVL_DTYPE_BF16, 1, SLOTS, HEADS, D);
        sources[1].k = kvl_make_view(half[2], KVL_DTYPE_BF16, 1, SLOTS, HEADS, D);
        other = cache = fresh(4, 2, 1);
        other.layers = sources;
        other.lengths = &length;
        OK(kvl_cache_insert_sequence(context, NULL, &cache, 2, &other, 0, 2));
        LENGTHS(4, 2, 2);
        ROW(2, 1, 1, 202);
        CHECK(all.k[0][2 * SLOTS * TOKEN] == 1 && all.k[0][(2 * SLOTS + 2) * TOKEN] == 202, "-");
        REFUSED(KVL_STATUS_OUT_OF_RANGE, "length is 4", kvl_cache_insert_sequence(context, NULL, &cache, 2, &other, 0, 4));
        REFUSED(KVL_STATUS_SHAPE, "length is -1", kvl_cache_insert_sequence(context, NULL, &cache, 2, &other, 0, -1));
        other.lengths = all.lengths;
        REFUSED(KVL_STATUS_OVERLAP, "list of lengths", kvl_cache_insert_sequence(context, NULL, &cache, 2, &other, 0, 1));
        other.lengths = &length;
        sources[1].k = layers[1].k;
        sources[1].k.shape[0] = 1;
        REFUSED(KVL_STATUS_OVERLAP, "layer 1", kvl_cache_insert_sequence(context, NULL, &cache, 2, &other, 0, 1));
    }

    /* A ring with two sink tokens that has wrapped around. */
    cache = fresh(9, 2, 1);
    ring.kind = KVL_LAYOUT_KIND_RING;
    ring.sink_tokens = 2;
    cache.layout = &ring;
    {
        static const int32_t back[] = {8, 2, 1};
        REFUSED(KVL_STATUS_OUT_OF_RANGE, "has overwritten positions 2 to 4", kvl_cache_truncate(&cache, back, KVL_ATTENTION_FLAG_CAUSAL, 0));
        REFUSED(KVL_STATUS_INVALID_VALUE, "window_left is -2", kvl_cache_truncate(&cache, back, KVL_ATTENTION_FLAG_WINDOW_LEFT, -2));
        REFUSED(KVL_STATUS_INVALID_VALUE, "window_left is 3, but its flag is not set", kvl_cache_truncate(&cache, back, 0, 3));
        REFUSED(KVL_STATUS_INVALID_ENUM, "unknown bits 0x8", kvl_cache_truncate(&cache, back, 8, 0));
        REFUSED(KVL_STATUS_OUT_OF_RANGE, "position 4 of sequence 0", kvl_cache_truncate(&cache, back, KVL_ATTENTION_FLAG_WINDOW_LEFT, 4));
        OK(kvl_cache_truncate(&cache, back, KVL_ATTENTION_FLAG_WINDOW_LEFT, 3));
        LENGTHS(8, 2, 1);
        REFUSED(KVL_STATUS_INVALID_VALUE, "a ring drops", kvl_cache_evict(context, NULL, &cache, 0, 0, 1, NULL, 0));
    }
}

static void evict(void) {
    static const double inv_freq[] = {0.5, 0.25};
    static const float cosines[4] = {1, 1, 1, 1};
    kvl_rope_params turn = KVL_ROPE_PARAMS_INIT;
    const kvl_rope_params *ropes[3] = {NULL, NULL, NULL};
    kvl_cache cache = fresh(5, 6, 0);
    OK(kvl_cache_evict(context, NULL, &cache, 1, 1, 3, NULL, 0));
    LENGTHS(5, 4, 0);
    ROW(1, 100, 103, 104, 105, 104, 105);
    ROW(0, 0, 1, 2, 3, 4, 5);

    /* Only the keys of layer 0 are rotated, by minus two positions. */
    cache = fresh(5, 6, 0);
    turn.rotary_dim = D;
    turn.inv_freq = inv_freq;
    turn.magnitude = 3; /* Already applied to the keys. */
    ropes[0] = &turn;
    OK(kvl_cache_evict(context, NULL, &cache, 1, 1, 3, ropes, 2));
    ROW(1, 100, 103, 104, 105, 104, 105);
    {
        const float *was = saved.k[0] + (SLOTS + 3) * TOKEN, *is = all.k[0] + (SLOTS + 1) * TOKEN;
        const double c = cos(-1.0), s = sin(-1.0), c2 = cos(-0.5), s2 = sin(-0.5);
        NEAR(is[0], was[0] * c - was[1] * s, 1e-4);
        NEAR(is[1], was[1] * c + was[0] * s, 1e-4);
        NEAR(is[2], was[2] * c2 - was[3] * s2, 1e-5);
        NEAR(is[D + 3], was[D + 3] * c2 + was[D + 2] * s2, 1e-5);
    }
    REFUSED(KVL_STATUS_SHAPE, "3 rotations", kvl_cache_evict(context, NULL, &cache, 1, 1, 2, ropes, 3));
    REFUSED(KVL_STATUS_OUT_OF_RANGE, "1 to 7", kvl_cache_evict(context, NULL, &cache, 0, 1, 7, ropes, 1));
    REFUSED(KVL_STATUS_OUT_OF_RANGE, "sequence is -1", kvl_cache_evict(context, NULL, &cache, -1, 0, 0, ropes, 1));
    REFUSED(KVL_STATUS_SHAPE, "first is -1", kvl_cache_evict(context, NULL, &cache, 0, -1, 0, ropes, 1));
    turn.rotary_dim = D + 2;
    REFUSED(KVL_STATUS_SHAPE, "rotary_dim 6", kvl_cache_evict(context, NULL, &cache, 0, 0, 1, ropes, 1));
    turn.rotary_dim = D;
    turn.pairing = 7;
    REFUSED(KVL_STATUS_INVALID_ENUM, "pairing is 7", kvl_cache_evict(context, NULL, &cache, 0, 0, 1, ropes, 1));
    turn.pairing = KVL_PAIRING_HALF_SPLIT;
    turn.cos = cosines;
    REFUSED(KVL_STATUS_INVALID_VALUE, "by frequencies", kvl_cache_evict(context, NULL, &cache, 0, 0, 1, ropes, 1));
    turn.cos = NULL;
    turn.inv_freq = NULL;
    REFUSED(KVL_STATUS_NULL_POINTER, "inv_freq", kvl_cache_evict(context, NULL, &cache, 0, 0, 1, ropes, 1));
    turn.struct_size = 3;
    REFUSED(KVL_STATUS_STRUCT_SIZE, "kvl_rope_params", kvl_cache_evict(context, NULL, &cache, 0, 0, 1, ropes, 1));
    REFUSED(KVL_STATUS_NULL_POINTER, "ropes is null", kvl_cache_evict(context, NULL, &cache, 0, 0, 1, NULL, 1));
}

static void evict_running(void) {
    static const double inv_freq[] = {0.5, 0.25};
    static const float cosines[4] = {1, 1, 1, 1};
    float first[2 * TOKEN];
    kvl_rope_params turn = KVL_ROPE_PARAMS_INIT;
    const kvl_rope_params *ropes[3] = {NULL, NULL, NULL};
    kvl_const_view keys[3] = {{0}};
    kvl_cache cache = fresh(5, 6, 0);
    int i;
    /* Keys before the gap keep their bits, and without rotations the others too. */
    OK(kvl_cache_evict_running(context, NULL, &cache, 1, 1, 3, 0, NULL, NULL, 0));
    LENGTHS(5, 4, 0);
    ROW(1, 100, 103, 104, 105, 104, 105);

    /* The first key of layer 0 is written again, at position 7 + 2; the others keep their bits. */
    cache = fresh(5, 6, 0);
    turn.rotary_dim = D;
    turn.inv_freq = inv_freq;
    turn.magnitude = 3;
    ropes[0] = &turn;
    for (i = 0; i < 2 * TOKEN; i++) {
        first[i] = (float)(i + 1) / 8;
    }
    keys[0] = kvl_make_const_view(first, KVL_DTYPE_F32, 1, 2, TOKEN / D, D);
    OK(kvl_cache_evict_running(context, NULL, &cache, 1, 1, 3, 7, keys, ropes, 2));
    LENGTHS(5, 4, 0);
    {
        const float *was = saved.k[0] + SLOTS * TOKEN, *is = all.k[0] + SLOTS * TOKEN;
        const double c = cos(4.5), s = sin(4.5), c2 = cos(2.25), s2 = sin(2.25);
        NEAR(is[0], 3 * (first[0] * c - first[1] * s), 1e-6);
        NEAR(is[1], 3 * (first[1] * c + first[0] * s), 1e-6);
        NEAR(is[D + 2], 3 * (first[D + 2] * c2 - first[D + 3] * s2), 1e-6);
        CHECK(memcmp(is + TOKEN, was + 3 * TOKEN, 3 * TOKEN * sizeof *is) == 0, "tokens behind the gap have changed");
    }
    REFUSED(KVL_STATUS_SHAPE, "3 unrotated keys",
            kvl_cache_evict_running(context, NULL, &cache, 1, 1, 2, 0, keys, ropes, 3));
    REFUSED(KVL_STATUS_SHAPE, "of 2 tokens, but 3 are kept",
            kvl_cache_evict_running(context, NULL, &cache, 1, 3, 4, 0, keys, ropes, 2));
    REFUSED(KVL_STATUS_SHAPE, "dropped is -1",
            kvl_cache_evict_running(context, NULL, &cache, 1, 1, 2, -1, keys, ropes, 2));
    REFUSED(KVL_STATUS_CAPACITY, "has lost 2147483647",
            kvl_cache_evict_running(context, NULL, &cache, 1, 1, 2, INT32_MAX, keys, ropes, 2));
    REFUSED(KVL_STATUS_OUT_OF_RANGE, "1 to 7",
            kvl_cache_evict_running(context, NULL, &cache, 0, 1, 7, 0, keys, ropes, 1));
    REFUSED(KVL_STATUS_NULL_POINTER, "keys is null",
            kvl_cache_evict_running(context, NULL, &cache, 1, 1, 2, 0, NULL, ropes, 2));
    keys[0].shape[0] = 2;
    keys[0].shape[1] = 1;
    REFUSED(KVL_STATUS_SHAPE, "batch = 2", kvl_cache_evict_running(context, NULL, &cache, 1, 1, 2, 0, keys, ropes, 2));
    keys[0] = kvl_make_const_view(all.v, KVL_DTYPE_F32, 1, 2, TOKEN / D, D);
    REFUSED(KVL_STATUS_OVERLAP, "layer 0", kvl_cache_evict_running(context, NULL, &cache, 1, 1, 2, 0, keys, ropes, 2));
    turn.cos = cosines;
    REFUSED(KVL_STATUS_INVALID_VALUE, "by frequencies",
            kvl_cache_evict_running(context, NULL, &cache, 1, 1, 2, 0, keys, ropes, 2));
}

static void tables(void) {
    int32_t table[3 * 4], lengths[3] = {0, 0, 0}, before[3 * 4];
    static const int32_t parents[] = {2, 2, 0}, wanted[] = {2, 2, 2, 0, 0, 1};
    size_t bytes = 0;
    int i;
    OK(kvl_cache_set_table_tokens(table, 3, 4, lengths, 2));
    for (i = 0; i < 3; i++) lengths[i] = 2;
    OK(kvl_cache_reorder_table_workspace_size(3, 4, &bytes));
    OK(kvl_cache_reorder_table(workspace, bytes, table, 3, 4, lengths, parents));
    OK(kvl_cache_set_table_tokens(table, 3, 4, lengths, 1));
    for (i = 0; i < 3; i++) {
        CHECK(table[4 * i] == wanted[i] + (i == 2 ? -2 : 0), "row %d: %d", i, (int)table[4 * i]);
        CHECK(table[4 * i + 1] == table[4 * i] && table[4 * i + 2] == i, "row %d: %d", i, (int)table[4 * i + 2]);
    }
    memcpy(before, table, sizeof table);
    CHECK(kvl_cache_reorder_table(workspace, bytes - 1, table, 3, 4, lengths, parents) == KVL_STATUS_WORKSPACE, "-");
    CHECK(kvl_cache_reorder_table(workspace, bytes, table, 3, 4, table + 1, parents) == KVL_STATUS_OVERLAP, "-");
    CHECK(strstr(sentence(), "table and lengths share memory") != NULL, "%s", sentence());
    CHECK(kvl_cache_set_table_tokens(table, 3, 4, lengths, 3) == KVL_STATUS_CAPACITY, "-");
    CHECK(kvl_cache_set_table_tokens(table, 3, -4, lengths, 1) == KVL_STATUS_SHAPE, "-");
    CHECK(kvl_cache_set_table_tokens(NULL, 3, 4, lengths, 1) == KVL_STATUS_NULL_POINTER, "-");
    CHECK(kvl_cache_reorder_table_workspace_size(3, 4, NULL) == KVL_STATUS_NULL_POINTER, "-");
    CHECK(memcmp(before, table, sizeof table) == 0, "the table has changed");
}

static void pages(void) {
    /* Here the rows of memory are pages of six tokens: row 0 has page 2, and page 0 up to its length. */
    int32_t table[4] = {2, 0, 2, -7}, map[ROWS], lengths[2] = {6, 6};
    static const int32_t moves[] = {0, 1}, twice[] = {0, 1, 2, 1};
    int64_t used = -1;
    kvl_cache cache = fresh(0, 0, 0);
    kvl_layout paged = KVL_LAYOUT_INIT;
    OK(kvl_cache_defragment(context, NULL, layers, 2, table, 2, 2, lengths, map, &used));
    CHECK(used == 1 && table[0] == 0 && table[1] == -1 && table[2] == 0 && table[3] == -1, "%d", (int)used);
    CHECK(map[0] == -1 && map[1] == -1 && map[2] == 0, "-");
    ROW(0, 200, 201, 202, 203, 204, 205);
    OK(kvl_cache_copy_pages(context, NULL, layers, 2, moves, 1));
    ROW(1, 200, 201, 202, 203, 204, 205);
    REFUSED(KVL_STATUS_DUPLICATE_SLOT, "page 1", kvl_cache_copy_pages(context, NULL, layers, 2, twice, 2));
    REFUSED(KVL_STATUS_SHAPE, "no layers", kvl_cache_copy_pages(context, NULL, layers, 0, moves, 1));
    REFUSED(KVL_STATUS_NULL_POINTER, "layers is null", kvl_cache_copy_pages(context, NULL, NULL, 2, moves, 1));
    REFUSED(KVL_STATUS_OUT_OF_RANGE, "lengths[0] is 6, but the sequence holds 0",
            kvl_cache_defragment(context, NULL, layers, 2, table, 2, 0, lengths, map, &used));
    REFUSED(KVL_STATUS_OVERLAP, "share memory",
            kvl_cache_defragment(context, NULL, layers, 2, table, 2, 2, table + 1, map, &used));
    REFUSED(KVL_STATUS_NULL_POINTER, "used is null",
            kvl_cache_defragment(context, NULL, layers, 2, table, 2, 2, lengths, map, NULL));

    /* Both rows use page 0, so that neither can be cleared alone. */
    paged.kind = KVL_LAYOUT_KIND_PAGED;
    paged.num_sequences = paged.pages_per_sequence = 2;
    paged.table = table;
    cache.layout = &paged;
    all.lengths[0] = all.lengths[1] = 6;
    REFUSED(KVL_STATUS_OVERLAP, "page 0", kvl_cache_reset(NULL, &cache, table, 1, 1));
    cache.lengths = table;
    REFUSED(KVL_STATUS_OVERLAP, "the layout's table", kvl_cache_reset(NULL, &cache, lengths, 1, 0));
}

static void mistakes(void) {
    static const int32_t zeros[ROWS] = {0, 0, 0};
    size_t bytes;
    kvl_cache cache = fresh(5, 6, 0);
    REFUSED(KVL_STATUS_NULL_POINTER, "kvl_cache", kvl_cache_advance(NULL, zeros));
    REFUSED(KVL_STATUS_NULL_POINTER, "counts is null", kvl_cache_advance(&cache, NULL));
    REFUSED(KVL_STATUS_OVERLAP, "share memory", kvl_cache_advance(&cache, all.lengths));
    REFUSED(KVL_STATUS_INVALID_ENUM, "zero is 2", kvl_cache_reset(NULL, &cache, zeros, 1, 2));
    REFUSED(KVL_STATUS_NULL_POINTER, "sequences is null", kvl_cache_reset(NULL, &cache, NULL, 1, 1));
    REFUSED(KVL_STATUS_DUPLICATE_SLOT, "both 0", kvl_cache_reset(NULL, &cache, zeros, 2, 1));
    REFUSED(KVL_STATUS_NULL_POINTER, "bytes", kvl_cache_reorder_workspace_size(&cache, NULL, NULL));
    REFUSED(KVL_STATUS_NULL_POINTER, "context", kvl_cache_reorder(NULL, NULL, workspace, sizeof workspace, &cache, zeros));
    cache.lengths = NULL;
    REFUSED(KVL_STATUS_NULL_POINTER, "lengths is null", kvl_cache_advance(&cache, zeros));
    cache.lengths = all.lengths;
    cache.struct_size = 7;
    REFUSED(KVL_STATUS_STRUCT_SIZE, "kvl_cache.struct_size is 7", kvl_cache_advance(&cache, zeros));
    cache.struct_size = sizeof cache;
    cache.num_layers = 0;
    REFUSED(KVL_STATUS_SHAPE, "no layers", kvl_cache_reorder_workspace_size(&cache, NULL, &bytes));
    cache.num_layers = 2;
    /* The last layer is invalid; the first must not change. */
    layers[1].k.dtype = 99;
    REFUSED(KVL_STATUS_INVALID_ENUM, "layer 1: k.dtype is 99", kvl_cache_reset(NULL, &cache, zeros, 1, 1));
    layers[1].k = layers[0].v;
    REFUSED(KVL_STATUS_OVERLAP, "v of layer 0", kvl_cache_reset(NULL, &cache, zeros, 1, 1));
    layers[1].k = layers[0].k;
    layers[1].k.data = NULL;
    REFUSED(KVL_STATUS_NULL_POINTER, "layer 1: k", kvl_cache_reset(NULL, &cache, zeros, 1, 1));
    layers[1].k.data = all.k[1];
    layers[1].k.bytes = sizeof all.k[1] - 1;
    REFUSED(KVL_STATUS_BOUNDS, "layer 1: k", kvl_cache_evict(context, NULL, &cache, 0, 0, 1, NULL, 0));
}

static void shards(void) {
    kvl_shard shard = KVL_SHARD_INIT;
    int64_t first = -1, count = -1, heads[4] = {-1, -1, -1, -1};
    int32_t lengths[2] = {1500, 700}, local[3][2], slots[4] = {9, 9, 9, 9};
    static const int32_t position[1] = {1022};
    kvl_view whole = kvl_make_view(all.v, KVL_DTYPE_F32, ROWS, SLOTS, HEADS, D), part;
    OK(kvl_shard_sequences(&shard, 7, &first, &count));
    CHECK(first == 0 && count == 7, "the default is the whole, not %d of %d", (int)first, (int)count);
    shard.num_data = 2;
    shard.num_model = 4;
    shard.num_sequence = 2;
    OK(kvl_shard_from_rank(11, &shard));
    CHECK(shard.data == 1 && shard.model == 1 && shard.sequence == 1 && shard.num_model == 4, "-");
    OK(kvl_shard_sequences(&shard, 7, &first, &count));
    CHECK(first == 4 && count == 3, "%d %d", (int)first, (int)count);
    OK(kvl_shard_heads(&shard, 32, 8, heads, heads + 1, heads + 2, heads + 3));
    CHECK(heads[0] == 8 && heads[1] == 8 && heads[2] == 2 && heads[3] == 2, "%d", (int)heads[0]);
    OK(kvl_shard_heads(&shard, 8, 2, heads, heads + 1, heads + 2, heads + 3));
    CHECK(heads[0] == 2 && heads[1] == 2 && heads[2] == 0 && heads[3] == 1, "%d", (int)heads[0]);
    OK(kvl_shard_keys(&shard, 3 * KVL_SPLIT_GRID - 1, &first, &count));
    CHECK(first == 2 * KVL_SPLIT_GRID && count == KVL_SPLIT_GRID - 1, "%d %d", (int)first, (int)count);
    OK(kvl_shard_lengths(1024, 1024, 2, 1, lengths, NULL, NULL, local[0], local[1], local[2]));
    CHECK(local[0][0] == 476 && local[0][1] == 0 && local[1][0] == 0, "%d", (int)local[0][0]);
    CHECK(local[2][0] == 475 && local[2][1] == -325, "%d", (int)local[2][1]);
    OK(kvl_shard_slots(1024, 1024, 1, 4, position, slots));
    CHECK(slots[0] == -1 && slots[1] == -1 && slots[2] == 0 && slots[3] == 1, "%d", (int)slots[2]);
    whole.bytes = sizeof all.v;
    OK(kvl_shard_view(&whole, 2, 1, 1, &part));
    CHECK(part.data == (void *)(all.v + D) && part.shape[2] == 1 && part.shape[1] == SLOTS, "-");
    CHECK(part.bytes == sizeof all.v - D * sizeof(float) && part.strides[1] == TOKEN, "%d", (int)part.bytes);

    first = -1;
    shard.model = 4;
    REFUSED(KVL_STATUS_OUT_OF_RANGE, "model is 4", kvl_shard_sequences(&shard, 7, &first, &count));
    shard.model = 0;
    REFUSED(KVL_STATUS_NULL_POINTER, "count is null", kvl_shard_keys(&shard, 7, &first, NULL));
    REFUSED(KVL_STATUS_SHAPE, "capacity is -1", kvl_shard_keys(&shard, -1, &first, &count));
    REFUSED(KVL_STATUS_SHAPE, "5 query heads", kvl_shard_heads(&shard, 5, 2, heads, heads, heads, heads));
    REFUSED(KVL_STATUS_OUT_OF_RANGE, "rank is 16", kvl_shard_from_rank(16, &shard));
    REFUSED(KVL_STATUS_OVERLAP, "share memory",
            kvl_shard_lengths(0, 9, 2, 1, lengths, NULL, NULL, local[0], local[0], local[2]));
    REFUSED(KVL_STATUS_OUT_OF_RANGE, "no segment", kvl_shard_slots(0, INT64_MAX, 1, 4, position, slots));
    REFUSED(KVL_STATUS_SHAPE, "1 + 2", kvl_shard_view(&whole, 2, 1, 2, &part));
    REFUSED(KVL_STATUS_INVALID_ENUM, "axis is 4", kvl_shard_view(&whole, 4, 0, 1, &part));
    CHECK(first == -1, "%d", (int)first);
}

/* Two tokens share a scale, and are quantised again where they did not share it before. */
static void shared_scales(void) {
    static signed char units[2 * 4] = {127, 64, 127, -127, 9, 9, 9, 9}, large[4 * 1026];
    static float scales[2 * 2] = {1, 2, 5, 6}, large_scales[2 * 1026];
    const int32_t to = 1;
    int32_t lengths[2] = {4, 0};
    kvl_cache_scales described = KVL_CACHE_SCALES_INIT;
    kvl_kv_layer layer;
    kvl_cache cache = KVL_CACHE_INIT;
    memset(&layer, 0, sizeof layer);
    described.k = kvl_make_view(scales, KVL_DTYPE_F32, 2, 2, 1, 1);
    described.k_affine = KVL_AFFINE_SIGNED;
    layer.k = kvl_make_view(units, KVL_FORMAT_AFFINE8, 2, 4, 1, 1);
    layer.scales = &described;
    cache.layers = &layer;
    cache.num_layers = 1;
    cache.lengths = lengths;
    /* 127, 64, 254, -254 become 64, 254 by a scale of 2, and -254, which keeps its own. */
    OK(kvl_cache_evict(context, NULL, &cache, 0, 0, 1, NULL, 0));
    OK(kvl_cache_copy_prefix(context, NULL, &cache, 0, &to, 1, 3));
    {
        static const signed char wanted[2 * 4] = {32, 127, -127, -127, 32, 127, -127, 9};
        static const float scales_wanted[2 * 2] = {2, 2, 2, 2};
        CHECK(memcmp(units, wanted, sizeof units) == 0, "%d %d %d %d", units[0], units[1], units[2], units[3]);
        CHECK(memcmp(scales, scales_wanted, sizeof scales) == 0, "%g %g", scales[0], scales[1]);
        CHECK(lengths[0] == 3 && lengths[1] == 3, "%d %d", (int)lengths[0], (int)lengths[1]);
    }
    described.k = kvl_make_view(large_scales, KVL_DTYPE_F32, 1, 2, 1, 1026);
    layer.k = kvl_make_view(large, KVL_FORMAT_AFFINE8, 1, 4, 1, 1026);
    REFUSED(KVL_STATUS_SHAPE, "layer 0: k has dim = 1026 and scales that 2 tokens share, but such heads above 1024 do not move",
            kvl_cache_evict(context, NULL, &cache, 0, 0, 1, NULL, 0));
}

int main(void) {
    kvl_context *made = NULL;
    OK(kvl_context_create(NULL, &made));
    context = made;
    rows();
    evict();
    evict_running();
    shared_scales();
    tables();
    pages();
    mistakes();
    shards();
    kvl_context_destroy(made);
    return finish("cache");
}
