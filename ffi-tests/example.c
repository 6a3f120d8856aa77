/* A prompt of four tokens and three more, one at a time, through a cache of keys and values in bfloat16. */
#include <stdio.h>
#include <stdlib.h>

#include "kvlane.h"

enum { HEADS = 4, KV_HEADS = 2, DIM = 8, CAPACITY = 16, PROMPT = 4, STEPS = 3 };

static void check(kvl_status status) {
    if (status != KVL_STATUS_OK) {
        char sentence[1024];
        kvl_last_error(sentence, sizeof sentence);
        fprintf(stderr, "%s: %s\n", kvl_status_string(status), sentence);
        exit(1);
    }
}

/* A stand-in for a model's linear layers. */
static void project(float *to, int n, int position) {
    for (int i = 0; i < n; i++) {
        to[i] = (float)((i * 7 + position * 5) % 11 - 5) / 5.0f;
    }
}

/* One step of one layer: `seq` tokens, of which the first is at position `length`. */
static void step(const kvl_context *context, const double *inv_freq, uint16_t *k_cache, uint16_t *v_cache, int32_t length,
                 int seq) {
    float q[PROMPT * HEADS * DIM], k[PROMPT * KV_HEADS * DIM], v[PROMPT * KV_HEADS * DIM], out[PROMPT * HEADS * DIM];
    for (int t = 0; t < seq; t++) {
        project(q + t * HEADS * DIM, HEADS * DIM, length + t);
        project(k + t * KV_HEADS * DIM, KV_HEADS * DIM, length + t + 1);
        project(v + t * KV_HEADS * DIM, KV_HEADS * DIM, length + t + 2);
    }

    /* Queries are rotated in place, keys on their way into the cache. */
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    rope.pairing = KVL_PAIRING_HALF_SPLIT;
    rope.rotary_dim = DIM;
    rope.inv_freq = inv_freq;
    rope.offsets = &length;
    kvl_view queries = kvl_make_view(q, KVL_DTYPE_F32, 1, seq, HEADS, DIM);
    kvl_const_view same = kvl_as_const(queries);
    check(kvl_rope(context, NULL, &same, &queries, &rope));

    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    write.k = kvl_make_const_view(k, KVL_DTYPE_F32, 1, seq, KV_HEADS, DIM);
    write.v = kvl_make_const_view(v, KVL_DTYPE_F32, 1, seq, KV_HEADS, DIM);
    write.k_cache = kvl_make_view(k_cache, KVL_DTYPE_BF16, 1, CAPACITY, KV_HEADS, DIM);
    write.v_cache = kvl_make_view(v_cache, KVL_DTYPE_BF16, 1, CAPACITY, KV_HEADS, DIM);
    write.positions = &length;
    write.rope = &rope;
    check(kvl_kv_write(context, NULL, &write));

    /* The whole cache is passed, with the number of valid tokens. */
    int32_t valid = length + seq;
    kvl_attention_params attention = KVL_ATTENTION_PARAMS_INIT;
    attention.q = kvl_as_const(queries);
    attention.k = kvl_as_const(write.k_cache);
    attention.v = kvl_as_const(write.v_cache);
    attention.out = kvl_make_view(out, KVL_DTYPE_F32, 1, seq, HEADS, DIM);
    attention.flags = KVL_ATTENTION_FLAG_CAUSAL;
    attention.lengths = &valid;

    size_t bytes;
    check(kvl_attention_workspace_size(&attention, NULL, &bytes));
    unsigned char *memory = malloc(bytes + 63);
    if (memory == NULL) {
        exit(1);
    }
    void *workspace = memory + (64 - (uintptr_t)memory % 64) % 64; /* A workspace is aligned to 64 bytes. */
    check(kvl_attention(context, NULL, workspace, bytes, &attention));
    free(memory);

    const float *last = out + (seq - 1) * HEADS * DIM;
    printf("%2d tokens in the cache, output begins with %.3f %.3f %.3f\n", (int)valid, last[0], last[1], last[2]);
}

int main(void) {
    kvl_context *context = NULL;
    check(kvl_context_create(NULL, &context));

    kvl_rope_frequencies_params scaling = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    scaling.rotary_dim = DIM;
    scaling.base = 10000.0;
    double inv_freq[DIM / 2], magnitude;
    check(kvl_rope_frequencies(&scaling, inv_freq, DIM / 2, &magnitude));

    static uint16_t k_cache[CAPACITY * KV_HEADS * DIM], v_cache[CAPACITY * KV_HEADS * DIM];
    int32_t length = 0;
    step(context, inv_freq, k_cache, v_cache, length, PROMPT);
    for (length = PROMPT; length < PROMPT + STEPS; length++) {
        step(context, inv_freq, k_cache, v_cache, length, 1);
    }
    kvl_context_destroy(context);
    return 0;
}
