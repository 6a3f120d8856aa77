/* A decoder of the Llama family in plain C: kvlane does the work around the cache, and loops do the rest.
 *
 *     decode MODEL f32|f16|bf16 STEPS ID...
 *
 * runs the prompt ID... in one pass, then STEPS tokens one at a time, always the most likely, and prints their ids. MODEL is
 * little-endian, without padding, and written by tests/ffi.rs:
 *
 *     char[8]   "KVLDECO1"
 *     int32[10] vocab, dim, layers, heads, kv_heads, head_dim, ffn_dim, rotary_dim, pairing (a kvl_pairing), tied (0 or 1)
 *     float64[2] base of RoPE, epsilon of RMSNorm
 *     float32[] embedding [vocab, dim]
 *               for each layer: attention norm [dim], q|k|v [(heads + 2 kv_heads) head_dim, dim],
 *                               attention output [dim, heads head_dim], feed-forward norm [dim], gate|up [2 ffn_dim, dim],
 *                               down [dim, ffn_dim]
 *               output norm [dim]
 *               unless tied: output [vocab, dim]
 */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvlane.h"

static void fail(const char *what) {
    fprintf(stderr, "decode: %s\n", what);
    exit(1);
}

static void check(kvl_status status) {
    char sentence[1024];
    if (status != KVL_STATUS_OK) {
        kvl_last_error(sentence, sizeof sentence);
        fail(sentence);
    }
}

static void *allocate(size_t n, size_t size) {
    void *memory = calloc(n + 1, size);
    if (memory == NULL) fail("out of memory");
    return memory;
}

static float *floats(size_t n) { return allocate(n, sizeof(float)); }

typedef struct layer {
    float *attn_norm, *qkv, *attn_out, *ffn_norm, *gate_up, *down;
    void *k_cache, *v_cache;
} layer;

typedef struct model {
    int32_t vocab, dim, layers, heads, kv_heads, head_dim, ffn_dim, rotary_dim, pairing, tied;
    double base, epsilon;
    float *embedding, *output_norm, *output;
    layer *layer;
} model;

static void read_exactly(FILE *file, void *to, size_t bytes) {
    if (fread(to, 1, bytes, file) != bytes) fail("the model file is too short");
}

static float *read_floats(FILE *file, int64_t n) {
    float *to = floats((size_t)n);
    read_exactly(file, to, (size_t)n * sizeof(float));
    return to;
}

static model read_model(const char *path) {
    model m;
    char magic[8];
    int32_t head[10];
    int i;
    FILE *file = fopen(path, "rb");
    if (file == NULL) fail(strerror(errno));
    read_exactly(file, magic, sizeof magic);
    if (memcmp(magic, "KVLDECO1", 8) != 0) fail("that is no model file");
    read_exactly(file, head, sizeof head);
    for (i = 0; i < 10; i++) {
        if (head[i] < (i < 8 ? 1 : 0) || head[i] > 1 << 20) fail("a number in the model file is out of range");
    }
    m.vocab = head[0], m.dim = head[1], m.layers = head[2], m.heads = head[3], m.kv_heads = head[4];
    m.head_dim = head[5], m.ffn_dim = head[6], m.rotary_dim = head[7], m.pairing = head[8], m.tied = head[9];
    read_exactly(file, &m.base, sizeof m.base);
    read_exactly(file, &m.epsilon, sizeof m.epsilon);
    m.embedding = read_floats(file, (int64_t)m.vocab * m.dim);
    m.layer = allocate((size_t)m.layers, sizeof(layer));
    for (i = 0; i < m.layers; i++) {
        layer *l = &m.layer[i];
        l->attn_norm = read_floats(file, m.dim);
        l->qkv = read_floats(file, (int64_t)(m.heads + 2 * m.kv_heads) * m.head_dim * m.dim);
        l->attn_out = read_floats(file, (int64_t)m.heads * m.head_dim * m.dim);
        l->ffn_norm = read_floats(file, m.dim);
        l->gate_up = read_floats(file, 2 * (int64_t)m.ffn_dim * m.dim);
        l->down = read_floats(file, (int64_t)m.ffn_dim * m.dim);
    }
    m.output_norm = read_floats(file, m.dim);
    m.output = m.tied ? m.embedding : read_floats(file, (int64_t)m.vocab * m.dim);
    fclose(file);
    return m;
}

static void free_model(model *m) {
    int i;
    for (i = 0; i < m->layers; i++) {
        layer *l = &m->layer[i];
        free(l->attn_norm), free(l->qkv), free(l->attn_out), free(l->ffn_norm), free(l->gate_up), free(l->down);
        free(l->k_cache), free(l->v_cache);
    }
    if (!m->tied) free(m->output);
    free(m->layer), free(m->output_norm), free(m->embedding);
}

/* y[t] = W x[t] for `n` tokens; W is [rows, cols]. In double, so that the order of the sum does not matter. */
static void linear(const float *w, const float *x, int n, int rows, int cols, float *y) {
    int t, r, c;
    for (t = 0; t < n; t++) {
        for (r = 0; r < rows; r++) {
            const float *a = w + (size_t)r * (size_t)cols, *b = x + (size_t)t * (size_t)cols;
            double sum = 0;
            for (c = 0; c < cols; c++) sum += (double)a[c] * (double)b[c];
            y[(size_t)t * (size_t)rows + (size_t)r] = (float)sum;
        }
    }
}

static void rms_norm(const float *x, const float *weight, int n, int dim, double epsilon, float *y) {
    int t, i;
    for (t = 0; t < n; t++) {
        const float *from = x + t * dim;
        double squares = 0, scale;
        for (i = 0; i < dim; i++) squares += (double)from[i] * (double)from[i];
        scale = 1 / sqrt(squares / dim + epsilon);
        for (i = 0; i < dim; i++) y[t * dim + i] = (float)((double)from[i] * scale) * weight[i];
    }
}

static void add(float *x, const float *y, int n) {
    int i;
    for (i = 0; i < n; i++) x[i] += y[i];
}

typedef struct decoder {
    model m;
    kvl_context *context;
    kvl_dtype kv_type;
    int capacity, length;
    double *inv_freq, magnitude;
    float *x, *h, *qkv, *attn, *delta, *gate_up, *act, *logits; /* For `capacity` tokens at once. */
    void *workspace;
    size_t workspace_bytes;
} decoder;

/* Views of the buffer that the fused projection fills, without copies. */
static kvl_view part(const decoder *d, int n, int first_head, int heads) {
    int width = (d->m.heads + 2 * d->m.kv_heads) * d->m.head_dim;
    kvl_view view = kvl_make_view(d->qkv + first_head * d->m.head_dim, KVL_DTYPE_F32, 1, n, heads, d->m.head_dim);
    view.strides[0] = (int64_t)n * width;
    view.strides[1] = width;
    return view;
}

static kvl_attention_params attention_params(const decoder *d, int n) {
    const model *m = &d->m;
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    p.q = kvl_as_const(part(d, n, 0, m->heads));
    p.k = p.v = kvl_make_const_view(NULL, d->kv_type, 1, d->capacity, m->kv_heads, m->head_dim);
    p.out = kvl_make_view(d->attn, KVL_DTYPE_F32, 1, n, m->heads, m->head_dim);
    p.flags = KVL_ATTENTION_FLAG_CAUSAL;
    return p;
}

/* Appends tokens; returns the most likely next token. */
static int forward(decoder *d, const int *ids, int n) {
    const model *m = &d->m;
    const int q_dim = m->heads * m->head_dim, width = q_dim + 2 * m->kv_heads * m->head_dim;
    const int32_t position = d->length, valid = d->length + n;
    const float *last = d->h + (n - 1) * m->dim;
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    int i, t, best = 0;
    rope.pairing = m->pairing;
    rope.rotary_dim = m->rotary_dim;
    rope.inv_freq = d->inv_freq;
    rope.magnitude = d->magnitude;
    rope.offsets = &position;
    for (t = 0; t < n; t++) {
        memcpy(d->x + t * m->dim, m->embedding + (size_t)ids[t] * (size_t)m->dim, (size_t)m->dim * sizeof(float));
    }
    for (i = 0; i < m->layers; i++) {
        layer *l = &m->layer[i];
        kvl_view q = part(d, n, 0, m->heads);
        kvl_const_view q_in = kvl_as_const(q);
        kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
        kvl_attention_params attention = attention_params(d, n);

        rms_norm(d->x, l->attn_norm, n, m->dim, m->epsilon, d->h);
        linear(l->qkv, d->h, n, width, m->dim, d->qkv);

        check(kvl_rope(d->context, NULL, &q_in, &q, &rope));
        write.k = kvl_as_const(part(d, n, m->heads, m->kv_heads));
        write.v = kvl_as_const(part(d, n, m->heads + m->kv_heads, m->kv_heads));
        write.k_cache = kvl_make_view(l->k_cache, d->kv_type, 1, d->capacity, m->kv_heads, m->head_dim);
        write.v_cache = kvl_make_view(l->v_cache, d->kv_type, 1, d->capacity, m->kv_heads, m->head_dim);
        write.positions = &position;
        write.rope = &rope;
        check(kvl_kv_write(d->context, NULL, &write));
        attention.k = kvl_as_const(write.k_cache);
        attention.v = kvl_as_const(write.v_cache);
        attention.lengths = &valid;
        check(kvl_attention(d->context, NULL, d->workspace, d->workspace_bytes, &attention));

        linear(l->attn_out, d->attn, n, m->dim, q_dim, d->delta);
        add(d->x, d->delta, n * m->dim);
        rms_norm(d->x, l->ffn_norm, n, m->dim, m->epsilon, d->h);
        linear(l->gate_up, d->h, n, 2 * m->ffn_dim, m->dim, d->gate_up);
        for (t = 0; t < n * m->ffn_dim; t++) {
            const float *row = d->gate_up + t / m->ffn_dim * 2 * m->ffn_dim;
            float gate = row[t % m->ffn_dim], up = row[m->ffn_dim + t % m->ffn_dim];
            d->act[t] = gate / (1 + expf(-gate)) * up;
        }
        linear(l->down, d->act, n, m->dim, m->ffn_dim, d->delta);
        add(d->x, d->delta, n * m->dim);
    }
    rms_norm(d->x, m->output_norm, n, m->dim, m->epsilon, d->h);
    linear(m->output, last, 1, m->vocab, m->dim, d->logits);
    for (i = 1; i < m->vocab; i++) {
        if (d->logits[i] > d->logits[best]) best = i;
    }
    d->length += n;
    return best;
}

static void make_decoder(decoder *d, const char *path, const char *kv_type, int capacity) {
    static const char *const types[] = {"f32", "f16", "bf16"};
    kvl_rope_frequencies_params frequencies = KVL_ROPE_FREQUENCIES_PARAMS_INIT;
    const model *m = &d->m;
    size_t tokens = (size_t)capacity, elements;
    int i, n;
    d->m = read_model(path);
    d->capacity = capacity;
    d->length = 0;
    d->kv_type = -1;
    for (i = 0; i < 3; i++) {
        if (strcmp(kv_type, types[i]) == 0) d->kv_type = i;
    }
    check(kvl_context_create(NULL, &d->context));

    frequencies.rotary_dim = m->rotary_dim;
    frequencies.base = m->base;
    d->inv_freq = allocate((size_t)m->rotary_dim / 2, sizeof(double));
    check(kvl_rope_frequencies(&frequencies, d->inv_freq, m->rotary_dim / 2, &d->magnitude));

    d->x = floats(tokens * (size_t)m->dim);
    d->h = floats(tokens * (size_t)m->dim);
    d->delta = floats(tokens * (size_t)m->dim);
    d->qkv = floats(tokens * (size_t)((m->heads + 2 * m->kv_heads) * m->head_dim));
    d->attn = floats(tokens * (size_t)(m->heads * m->head_dim));
    d->gate_up = floats(tokens * 2 * (size_t)m->ffn_dim);
    d->act = floats(tokens * (size_t)m->ffn_dim);
    d->logits = floats((size_t)m->vocab);
    /* Bytes for the widest type. A cache need not be zero, because slots beyond the length are never read. */
    elements = tokens * (size_t)(m->kv_heads * m->head_dim);
    for (i = 0; i < m->layers; i++) {
        m->layer[i].k_cache = floats(elements);
        m->layer[i].v_cache = floats(elements);
        memset(m->layer[i].k_cache, 0xff, elements * sizeof(float));
        memset(m->layer[i].v_cache, 0xff, elements * sizeof(float));
    }
    d->workspace_bytes = 0;
    for (n = 1; n <= capacity; n++) {
        kvl_attention_params p = attention_params(d, n);
        size_t bytes;
        check(kvl_attention_workspace_size(&p, NULL, &bytes));
        if (bytes > d->workspace_bytes) d->workspace_bytes = bytes;
    }
    d->workspace = aligned_alloc(64, (d->workspace_bytes + 63) / 64 * 64);
    if (d->workspace == NULL) fail("out of memory");
}

static void free_decoder(decoder *d) {
    free_model(&d->m);
    kvl_context_destroy(d->context);
    free(d->inv_freq), free(d->x), free(d->h), free(d->delta), free(d->qkv), free(d->attn), free(d->gate_up);
    free(d->act), free(d->logits), free(d->workspace);
}

int main(int argc, char **argv) {
    decoder d;
    int steps, prompt = argc - 4, i, next;
    int *ids;
    if (prompt < 1 || (steps = atoi(argv[3])) < 1) fail("usage: decode MODEL f32|f16|bf16 STEPS ID...");
    ids = allocate((size_t)prompt, sizeof *ids);
    make_decoder(&d, argv[1], argv[2], prompt + steps);
    for (i = 0; i < prompt; i++) {
        ids[i] = atoi(argv[4 + i]);
        if (ids[i] < 0 || ids[i] >= d.m.vocab) fail("a token is outside of the vocabulary");
    }
    next = forward(&d, ids, prompt);
    for (i = 0; i < steps; i++) {
        printf("%d\n", next);
        if (i + 1 < steps) next = forward(&d, &next, 1);
    }
    free(ids);
    free_decoder(&d);
    return 0;
}
