/* Latent attention (MLA): one KV head, whose values are the first elements of its keys. */
#include "book.h"

enum { HEADS = 8, LATENT = 64, ROTARY = 16, CAPACITY = 16, TOKENS = 5 };

int main(void) {
    static float memory[CAPACITY * (LATENT + ROTARY)], q[HEADS * (LATENT + ROTARY)], out[HEADS * LATENT];
    static float latents[TOKENS * LATENT], rotaries[TOKENS * ROTARY];
    const int32_t position = 0, length = TOKENS;
    double inv_freq[ROTARY / 2], magnitude;
    workspace space = {0};
    kvl_context *context = NULL;
    check(kvl_context_create(NULL, &context));
    kvl_rope_frequencies_params frequencies = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    frequencies.rotary_dim = ROTARY;
    check(kvl_rope_frequencies(&frequencies, inv_freq, ROTARY / 2, &magnitude));
    for (int t = 0; t < TOKENS; t++) {
        for (int i = 0; i < LATENT; i++) {
            latents[t * LATENT + i] = (float)t;
        }
    }
    project(rotaries, TOKENS * ROTARY, 2);

    /* [write] */
    /* Two parts of one buffer: strides are those of whole keys. */
    kvl_view cache = kvl_make_view(memory, KVL_DTYPE_F32, 1, CAPACITY, 1, LATENT + ROTARY), latent, rotary;
    check(kvl_shard_view(&cache, 3, 0, LATENT, &latent));
    check(kvl_shard_view(&cache, 3, LATENT, ROTARY, &rotary));

    /* The rotated part is written as keys, so that the rotation meets it, and the latent part as values. */
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    rope.pairing = KVL_PAIRING_INTERLEAVED;
    rope.rotary_dim = ROTARY;
    rope.inv_freq = inv_freq;
    rope.offsets = &position;
    kvl_kv_write_params write = kvl_make_kv_write(rotary, latent, rotaries, latents, KVL_DTYPE_F32, 1, TOKENS, &position);
    write.rope = &rope;
    check(kvl_kv_write(context, NULL, &write));
    /* [write] */
    EXPECT(memory[3 * (LATENT + ROTARY)] == 3 && memory[LATENT] == rotaries[0]);

    /* [attend] */
    /* Keys are the whole cache, values its first elements. The scale is that of the heads before the absorption. */
    kvl_attention_params attention =
        kvl_make_causal_attention(cache, latent, q, out, KVL_DTYPE_F32, 1, 1, HEADS, &length);
    attention.scale = 1.0f / sqrtf(128 + 64);
    attend(context, NULL, &space, &attention);
    /* [attend] */
    EXPECT(fabsf(out[0] - 2) < 1e-6f && fabsf(out[HEADS * LATENT - 1] - 2) < 1e-6f); /* the mean of 0 to 4 */
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
