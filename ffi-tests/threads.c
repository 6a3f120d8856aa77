/* The caller's threads: a runner made of pthreads, faulty runners, the library's own pool, and errors per thread.
 *
 * These have no defined result, and do not occur here: two concurrent calls that write to the same memory (an output, a row
 * of a cache, a workspace); a list that changes while a call reads it; a context or pool that is destroyed while a call uses
 * it. Contexts, inputs and runners (if their `run` allows it) can be shared.
 */
#include <pthread.h>

#include "check.h"

/* Large enough that every operation uses more than one thread. */
enum { THREADS = 3, BATCH = 2, NEW = 512, SEQ = 12, HEADS = 6, KV = 2, CAPACITY = 1200, D = 64, STATES = 16 };

static float q[BATCH * SEQ * HEADS * D], k[BATCH * NEW * KV * D], v[BATCH * NEW * KV * D];
static const int32_t lengths[BATCH] = {600, 688};
static const int32_t whole[BATCH] = {1112, 1200};

/* The outputs of all operations, once per runner. */
typedef struct results {
    float k_cache[BATCH * CAPACITY * KV * D], v_cache[BATCH * CAPACITY * KV * D];
    float repeated[BATCH * CAPACITY * HEADS * D];
    float rotated[BATCH * CAPACITY * HEADS * D];
    float out[BATCH * SEQ * HEADS * D], lse[BATCH * SEQ * HEADS];
    float merged[BATCH * SEQ * HEADS * D], merged_lse[BATCH * SEQ * HEADS];
    float single[BATCH * HEADS * D];
} results;

static results serial, parallel, pooled, concurrent[2];

/* A runner that starts one thread per task and waits. A real runner would keep its threads. */
typedef struct job {
    void (*task)(void *, size_t);
    void *task_ctx;
    size_t i;
} job;

static void *run_job(void *from) {
    const job *j = from;
    j->task(j->task_ctx, j->i);
    return NULL;
}

static int calls; /* Calls of `run`, from the one thread that calls operations. */

static int32_t run_pthreads(void *ctx, size_t n, void (*task)(void *, size_t), void *task_ctx) {
    pthread_t threads[THREADS];
    job jobs[THREADS];
    size_t i;
    CHECK(ctx == &calls, "the context is another");
    CHECK(n >= 1 && n <= THREADS, "%d tasks for %d threads", (int)n, THREADS);
    if (n > THREADS) return 1;
    calls++;
    for (i = 0; i < n; i++) {
        jobs[i].task = task;
        jobs[i].task_ctx = task_ctx;
        jobs[i].i = i;
        if (pthread_create(&threads[i], NULL, run_job, &jobs[i]) != 0) abort();
    }
    for (i = 0; i < n; i++) pthread_join(threads[i], NULL);
    return 0;
}

static void everything(const kvl_context *context, const kvl_parallel_runner *runner, results *to) {
    static const double inv_freq[D / 2] = {1.0, 0.5, 0.25, 0.125};
    kvl_rope_params turn = KVL_ROPE_PARAMS_INIT;
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    kvl_attention_state states[STATES];
    kvl_view view;
    kvl_const_view source;
    size_t bytes = 0, more = 0;
    void *workspace;
    int i;
    turn.rotary_dim = D;
    turn.inv_freq = inv_freq;
    turn.offsets = lengths;

    /* Some history, then a write with RoPE. */
    fill(to->k_cache, COUNT(to->k_cache), 10);
    fill(to->v_cache, COUNT(to->v_cache), 11);
    write.k = kvl_make_const_view(k, KVL_DTYPE_F32, BATCH, NEW, KV, D);
    write.v = kvl_make_const_view(v, KVL_DTYPE_F32, BATCH, NEW, KV, D);
    write.k_cache = kvl_make_view(to->k_cache, KVL_DTYPE_F32, BATCH, CAPACITY, KV, D);
    write.v_cache = kvl_make_view(to->v_cache, KVL_DTYPE_F32, BATCH, CAPACITY, KV, D);
    write.positions = lengths;
    write.rope = &turn;
    OK(kvl_kv_write(context, runner, &write));

    source = kvl_as_const(write.k_cache);
    view = kvl_make_view(to->repeated, KVL_DTYPE_F32, BATCH, CAPACITY, HEADS, D);
    OK(kvl_repeat_kv(context, runner, &source, &view));
    source = kvl_as_const(view);
    view.data = to->rotated;
    OK(kvl_rope(context, runner, &source, &view, &turn));

    p.q = kvl_make_const_view(q, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    p.k = kvl_as_const(write.k_cache);
    p.v = kvl_as_const(write.v_cache);
    p.out = kvl_make_view(to->out, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    p.lse = to->lse;
    p.lengths = whole;
    p.flags = KVL_ATTENTION_FLAG_CAUSAL;
    OK(kvl_attention_workspace_size(&p, runner, &bytes));
    p.q.shape[1] = 1;
    OK(kvl_attention_workspace_size(&p, runner, &more));
    if (more > bytes) bytes = more;
    p.q.shape[1] = SEQ;
    workspace = aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (workspace == NULL) abort();
    OK(kvl_attention(context, runner, workspace, bytes, &p));

    for (i = 0; i < STATES; i++) {
        states[i].out = kvl_as_const(p.out);
        states[i].lse = to->lse;
    }
    view = kvl_make_view(to->merged, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    OK(kvl_merge_states(context, runner, states, STATES, &view, to->merged_lse));

    /* The last query only: a decode step, whose keys are split between threads. */
    p.q = kvl_make_const_view(q + (SEQ - 1) * HEADS * D, KVL_DTYPE_F32, BATCH, 1, HEADS, D);
    p.q.strides[0] = SEQ * HEADS * D;
    p.out = kvl_make_view(to->single, KVL_DTYPE_F32, BATCH, 1, HEADS, D);
    p.lse = NULL;
    OK(kvl_attention(context, runner, workspace, bytes, &p));
    for (i = 0; i < BATCH; i++) {
        const float *last = to->out + (i * SEQ + SEQ - 1) * HEADS * D;
        CHECK(memcmp(last, to->single + i * HEADS * D, HEADS * D * sizeof(float)) == 0, "row %d alone differs", i);
    }
    free(workspace);
}

static int32_t refuse(void *ctx, size_t n, void (*task)(void *, size_t), void *task_ctx) {
    (void)ctx, (void)n, (void)task, (void)task_ctx;
    return 7;
}

static int32_t forget(void *ctx, size_t n, void (*task)(void *, size_t), void *task_ctx) {
    (void)ctx, (void)n, (void)task, (void)task_ctx;
    return 0;
}

/* Every index twice, and one that does not exist: wrong, but harmless. */
static int32_t stutter(void *ctx, size_t n, void (*task)(void *, size_t), void *task_ctx) {
    size_t i;
    (void)ctx;
    for (i = 0; i < 2 * n; i++) task(task_ctx, i / 2);
    task(task_ctx, n + 5);
    return 0;
}

typedef struct caller {
    const kvl_context *context;
    results *to;
} caller;

/* An independent program that shares the context, but no output. */
static void *call_everything(void *from) {
    const caller *c = from;
    char text[64];
    CHECK(kvl_last_error(NULL, 0) == 1, "a fresh thread has an error");
    everything(c->context, NULL, c->to);
    CHECK(kvl_context_isa(NULL, NULL) == KVL_STATUS_NULL_POINTER, "-");
    kvl_last_error(text, sizeof text);
    CHECK(strcmp(text, "the pointer context is null") == 0, "%s", text);
    return NULL;
}

int main(void) {
    kvl_context *context = NULL;
    kvl_parallel_runner runner = KVL_PARALLEL_RUNNER_INIT;
    kvl_thread_pool *pool = NULL;
    kvl_status status;
    int i;
    fill(q, COUNT(q), 7);
    fill(k, COUNT(k), 8);
    fill(v, COUNT(v), 9);
    OK(kvl_context_create(NULL, &context));

    everything(context, NULL, &serial);
    runner.ctx = &calls;
    runner.num_threads = THREADS;
    runner.run = run_pthreads;
    everything(context, &runner, &parallel);
    CHECK(calls >= 7, "the runner was asked %d times", calls);
    CHECK(memcmp(&serial, &parallel, sizeof serial) == 0, "threads change the result");

    {
        kvl_const_view source = kvl_make_const_view(serial.k_cache, KVL_DTYPE_F32, BATCH, CAPACITY, KV, D);
        kvl_view view = kvl_make_view(parallel.repeated, KVL_DTYPE_F32, BATCH, CAPACITY, HEADS, D);
        runner.num_threads = 0;
        status = kvl_repeat_kv(context, &runner, &source, &view);
        CHECK(status == KVL_STATUS_INVALID_VALUE && strstr(sentence(), "num_threads"), "%d: %s", (int)status, sentence());
        runner.num_threads = THREADS;
        runner.run = refuse;
        status = kvl_repeat_kv(context, &runner, &source, &view);
        CHECK(status == KVL_STATUS_PARALLEL && strstr(sentence(), "runner"), "%d: %s", (int)status, sentence());
        runner.run = forget;
        status = kvl_repeat_kv(context, &runner, &source, &view);
        CHECK(status == KVL_STATUS_PARALLEL && strstr(sentence(), " 0 of "), "%d: %s", (int)status, sentence());
        runner.run = stutter;
        memset(parallel.repeated, 0, sizeof parallel.repeated);
        OK(kvl_repeat_kv(context, &runner, &source, &view));
        CHECK(memcmp(serial.repeated, parallel.repeated, sizeof serial.repeated) == 0, "-");
    }

    status = kvl_thread_pool_create(THREADS, &pool);
    if (status == KVL_STATUS_UNSUPPORTED) {
        printf("no thread pool in this build\n");
    } else {
        kvl_parallel_runner of_pool = KVL_PARALLEL_RUNNER_INIT;
        CHECK(status == KVL_STATUS_OK, "%s", sentence());
        OK(kvl_thread_pool_runner(pool, &of_pool));
        CHECK(of_pool.num_threads == THREADS, "%d", (int)of_pool.num_threads);
        everything(context, &of_pool, &pooled);
        CHECK(memcmp(&serial, &pooled, sizeof serial) == 0, "the pool changes the result");
        of_pool.struct_size = 1;
        CHECK(kvl_thread_pool_runner(pool, &of_pool) == KVL_STATUS_STRUCT_SIZE, "-");
        kvl_thread_pool_destroy(pool);
    }

    {
        pthread_t threads[2];
        caller callers[2];
        char before[1024];
        strcpy(before, sentence());
        for (i = 0; i < 2; i++) {
            callers[i].context = context;
            callers[i].to = &concurrent[i];
            if (pthread_create(&threads[i], NULL, call_everything, &callers[i]) != 0) abort();
        }
        for (i = 0; i < 2; i++) {
            pthread_join(threads[i], NULL);
            CHECK(memcmp(&serial, &concurrent[i], sizeof serial) == 0, "caller %d", i);
        }
        CHECK(strcmp(before, sentence()) == 0, "another thread's error came here: %s", sentence());
    }
    kvl_context_destroy(context);
    return finish("threads");
}
