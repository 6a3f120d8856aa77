/* The library's pool of threads, and a runner over threads of the program. */
#include <pthread.h>

#include "book.h"

enum { HEADS = 16, KV_HEADS = 4, DIM = 64, CAPACITY = 2048, THREADS = 3 };

static kvl_context *context;
static workspace space;
static float keys[CAPACITY * KV_HEADS * DIM], values[CAPACITY * KV_HEADS * DIM], q[HEADS * DIM];
static float out[HEADS * DIM], wanted[HEADS * DIM];

static kvl_attention_params work(float *to) {
    static const int32_t length = CAPACITY;
    return kvl_make_causal_attention(kvl_make_view(keys, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM),
                                     kvl_make_view(values, KVL_DTYPE_F32, 1, CAPACITY, KV_HEADS, DIM), q, to, KVL_DTYPE_F32, 1,
                                     1, HEADS, &length);
}

static void pool(void) {
    kvl_attention_params attention = work(out);
    /* [pool] */
    kvl_thread_pool *threads = NULL;
    check(kvl_thread_pool_create(THREADS, &threads)); /* once; 0 is one thread per CPU */
    kvl_parallel_runner runner = KVL_PARALLEL_RUNNER_INIT;
    check(kvl_thread_pool_runner(threads, &runner));

    attend(context, &runner, &space, &attention); /* any number of calls */

    kvl_thread_pool_destroy(threads);
    /* [pool] */
}

/* [crew] */
/* Threads that wait for work. The calling thread takes part. */
typedef struct crew {
    pthread_t threads[THREADS - 1];
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    void (*task)(void *, size_t);
    void *task_ctx;
    size_t next, n, running;
    int ends;
} crew;

/* Runs tasks until none is left. The mutex is held before and after. */
static void run_tasks(crew *c) {
    while (c->next < c->n) {
        const size_t i = c->next++;
        c->running++;
        pthread_mutex_unlock(&c->mutex);
        c->task(c->task_ctx, i);
        pthread_mutex_lock(&c->mutex);
        c->running--;
    }
    if (c->running == 0) {
        pthread_cond_signal(&c->done);
    }
}

static void *work_for(void *ctx) {
    crew *c = ctx;
    pthread_mutex_lock(&c->mutex);
    while (!c->ends) {
        run_tasks(c);
        pthread_cond_wait(&c->wake, &c->mutex);
    }
    pthread_mutex_unlock(&c->mutex);
    return NULL;
}

/* What the library calls: task(task_ctx, i) once for every i below n, and all have returned when this returns. */
static int32_t run_on_crew(void *ctx, size_t n, void (*task)(void *task_ctx, size_t i), void *task_ctx) {
    crew *c = ctx;
    pthread_mutex_lock(&c->mutex);
    c->task = task;
    c->task_ctx = task_ctx;
    c->next = 0;
    c->n = n;
    pthread_cond_broadcast(&c->wake);
    run_tasks(c);
    while (c->running > 0) {
        pthread_cond_wait(&c->done, &c->mutex);
    }
    pthread_mutex_unlock(&c->mutex);
    return 0;
}
/* [crew] */

static void own(void) {
    static crew c = {.mutex = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER, .done = PTHREAD_COND_INITIALIZER};
    kvl_attention_params attention = work(out);
    for (int i = 0; i < THREADS - 1; i++) {
        EXPECT(pthread_create(&c.threads[i], NULL, work_for, &c) == 0);
    }
    /* [own] */
    kvl_parallel_runner runner = KVL_PARALLEL_RUNNER_INIT;
    runner.ctx = &c;
    runner.num_threads = THREADS;
    runner.run = run_on_crew;
    attend(context, &runner, &space, &attention);
    /* [own] */
    for (int i = 0; i < 100; i++) {
        attend(context, &runner, &space, &attention);
    }
    pthread_mutex_lock(&c.mutex);
    c.ends = 1;
    pthread_cond_broadcast(&c.wake);
    pthread_mutex_unlock(&c.mutex);
    for (int i = 0; i < THREADS - 1; i++) {
        pthread_join(c.threads[i], NULL);
    }
}

int main(void) {
    check(kvl_context_create(NULL, &context));
    project(keys, CAPACITY * KV_HEADS * DIM, 1);
    project(values, CAPACITY * KV_HEADS * DIM, 2);
    project(q, HEADS * DIM, 3);
    kvl_attention_params alone = work(wanted);
    attend(context, NULL, &space, &alone);
    pool();
    EXPECT(memcmp(out, wanted, sizeof out) == 0);
    memset(out, 0, sizeof out);
    own();
    EXPECT(memcmp(out, wanted, sizeof out) == 0);
    free(space.memory);
    kvl_context_destroy(context);
    return 0;
}
