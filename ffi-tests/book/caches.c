/* The caches of all layers as one: requests join a batch, share a prompt, go back and leave. */
#include "book.h"

enum { LAYERS = 3, SEQUENCES = 4, KV_HEADS = 2, DIM = 8, CAPACITY = 32 };

static kvl_context *context;
static float memory[LAYERS][2][SEQUENCES * CAPACITY * KV_HEADS * DIM];
static uint16_t alone[LAYERS][2][CAPACITY * KV_HEADS * DIM];

int main(void) {
    check(kvl_context_create(NULL, &context));

    /* [make] */
    kvl_kv_layer layers[LAYERS];
    int32_t lengths[SEQUENCES] = {0};
    for (int i = 0; i < LAYERS; i++) {
        layers[i].k = kvl_make_view(memory[i][0], KVL_DTYPE_F32, SEQUENCES, CAPACITY, KV_HEADS, DIM);
        layers[i].v = kvl_make_view(memory[i][1], KVL_DTYPE_F32, SEQUENCES, CAPACITY, KV_HEADS, DIM);
        layers[i].scales = NULL;
    }
    kvl_cache cache = KVL_CACHE_INIT;
    cache.layers = layers;
    cache.num_layers = LAYERS;
    cache.lengths = lengths; /* one list for all layers, which the calls below change */
    /* [make] */

    /* A cache of one sequence, in another type. */
    kvl_kv_layer prompt_layers[LAYERS];
    int32_t prompt_length = 6;
    for (int i = 0; i < LAYERS; i++) {
        prompt_layers[i].k = kvl_make_view(alone[i][0], KVL_DTYPE_BF16, 1, CAPACITY, KV_HEADS, DIM);
        prompt_layers[i].v = kvl_make_view(alone[i][1], KVL_DTYPE_BF16, 1, CAPACITY, KV_HEADS, DIM);
        prompt_layers[i].scales = NULL;
        for (int t = 0; t < CAPACITY * KV_HEADS * DIM; t++) {
            alone[i][0][t] = alone[i][1][t] = 0x3f80; /* 1 */
        }
    }
    kvl_cache prompt = KVL_CACHE_INIT;
    prompt.layers = prompt_layers;
    prompt.num_layers = LAYERS;
    prompt.lengths = &prompt_length;

    /* [insert] */
    /* A prompt that was computed alone takes its place in the batch, as sequence 2. */
    check(kvl_cache_insert_sequence(context, NULL, &cache, 2, &prompt, 0, prompt_length));
    /* [insert] */
    EXPECT(lengths[2] == 6 && memory[LAYERS - 1][1][(2 * CAPACITY + 5) * KV_HEADS * DIM] == 1);
    EXPECT(memory[LAYERS - 1][1][(2 * CAPACITY + 6) * KV_HEADS * DIM] == 0);

    /* [copy] */
    /* Sequences 0 and 3 continue its first five tokens. */
    const int32_t to[2] = {0, 3};
    check(kvl_cache_copy_prefix(context, NULL, &cache, 2, to, 2, 5));
    /* [copy] */
    EXPECT(lengths[0] == 5 && lengths[1] == 0 && lengths[3] == 5);
    EXPECT(memory[0][0][(3 * CAPACITY + 4) * KV_HEADS * DIM] == 1);

    /* [advance] */
    /* After a step that has written one token of each but sequence 1. */
    const int32_t counts[SEQUENCES] = {1, 0, 1, 1};
    check(kvl_cache_advance(&cache, counts));
    /* [advance] */
    EXPECT(lengths[0] == 6 && lengths[1] == 0 && lengths[2] == 7 && lengths[3] == 6);

    /* [truncate] */
    /* Sequence 2 takes back its last three tokens; the others keep what they have. */
    const int32_t back[SEQUENCES] = {6, 0, 4, 6};
    check(kvl_cache_truncate(&cache, back, 0, 0));
    /* [truncate] */
    EXPECT(lengths[2] == 4);

    /* [reset] */
    /* Sequence 3 is over. Its memory is cleared, since it is another user's next. */
    const int32_t over = 3;
    check(kvl_cache_reset(NULL, &cache, &over, 1, 1));
    /* [reset] */
    EXPECT(lengths[3] == 0 && memory[0][0][(3 * CAPACITY + 4) * KV_HEADS * DIM] == 0);
    kvl_context_destroy(context);
    return 0;
}
