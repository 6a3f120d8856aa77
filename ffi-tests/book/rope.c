/* Rotary embedding and the norm before it. */
#include "book.h"

enum { HEADS = 4, DIM = 32, ROTARY = 16, TOKENS = 3 };

int main(void) {
    static float q[TOKENS * HEADS * DIM], rotated[TOKENS * HEADS * DIM], other[TOKENS * HEADS * DIM];
    kvl_context *context = NULL;
    check(kvl_context_create(NULL, &context));
    project(q, TOKENS * HEADS * DIM, 1);

    /* [frequencies] */
    /* Once, when a model is loaded: Llama 3.1's scaling, over half of every head. */
    kvl_rope_frequencies_params llama3 = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    llama3.rotary_dim = ROTARY;
    llama3.base = 500000.0;
    llama3.scaling = KVL_ROPE_SCALING_LLAMA3;
    llama3.factor = 8.0;
    llama3.low_freq_factor = 1.0;
    llama3.high_freq_factor = 4.0;
    llama3.original_max_position = 8192.0;
    double inv_freq[ROTARY / 2], magnitude;
    check(kvl_rope_frequencies(&llama3, inv_freq, ROTARY / 2, &magnitude));
    /* [frequencies] */
    EXPECT(inv_freq[0] == 1.0 && magnitude == 1.0 && inv_freq[ROTARY / 2 - 1] < 1e-5);

    /* [rope] */
    /* Tokens at the positions 1000, 1001 and 1002. */
    const int32_t offset = 1000;
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    rope.pairing = KVL_PAIRING_HALF_SPLIT;
    rope.rotary_dim = ROTARY;
    rope.inv_freq = inv_freq;
    rope.magnitude = magnitude;
    rope.offsets = &offset;
    const kvl_const_view from = kvl_make_const_view(q, KVL_DTYPE_F32, 1, TOKENS, HEADS, DIM);
    const kvl_view to = kvl_make_view(rotated, KVL_DTYPE_F32, 1, TOKENS, HEADS, DIM);
    check(kvl_rope(context, NULL, &from, &to, &rope));
    /* [rope] */
    EXPECT(rotated[DIM - 1] == q[DIM - 1]); /* beyond rotary_dim, elements are copied */
    const double angle = 1000.0, x = q[0], y = q[ROTARY / 2];
    EXPECT(fabs(rotated[0] - (x * cos(angle) - y * sin(angle))) < 1e-6);

    /* [table] */
    /* The same from a table of cosines and sines, of the positions 0 to 2047. */
    enum { ROWS = 2048 };
    static float cosines[ROWS * ROTARY / 2], sines[ROWS * ROTARY / 2];
    check(kvl_rope_table(context, inv_freq, ROTARY, magnitude, 0, ROWS, cosines, sines));
    kvl_rope_params by_table = KVL_ROPE_PARAMS_INIT;
    by_table.pairing = KVL_PAIRING_HALF_SPLIT;
    by_table.rotary_dim = ROTARY;
    by_table.cos = cosines;
    by_table.sin = sines;
    by_table.table_rows = ROWS;
    by_table.offsets = &offset;
    /* [table] */
    const kvl_view again = kvl_make_view(other, KVL_DTYPE_F32, 1, TOKENS, HEADS, DIM);
    check(kvl_rope(context, NULL, &from, &again, &by_table));
    for (int i = 0; i < TOKENS * HEADS * DIM; i++) {
        EXPECT(fabsf(rotated[i] - other[i]) < 1e-6f);
    }

    /* [norm] */
    /* Norm and rotation of queries in one pass, in place. */
    static float weight[DIM];
    for (int i = 0; i < DIM; i++) {
        weight[i] = 1.0f + (float)i / DIM;
    }
    kvl_rms_norm_params norm = KVL_RMS_NORM_PARAMS_INIT;
    norm.weight = weight;
    norm.eps = 1e-5f;
    const kvl_view queries = kvl_make_view(q, KVL_DTYPE_F32, 1, TOKENS, HEADS, DIM);
    check(kvl_rms_norm_rope(context, NULL, &from, &queries, &norm, &rope));
    /* [norm] */

    /* The bits of the two steps. */
    project(other, TOKENS * HEADS * DIM, 1);
    const kvl_const_view source = kvl_as_const(again), normalised = kvl_as_const(to);
    check(kvl_rms_norm(context, NULL, &source, &to, &norm));
    check(kvl_rope(context, NULL, &normalised, &again, &rope));
    EXPECT(memcmp(other, q, sizeof q) == 0);
    kvl_context_destroy(context);
    return 0;
}
