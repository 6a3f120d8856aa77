/* The rules of the header about processes and threads: fork, signals and stacks. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* pthread_getattr_np */
#endif
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"

enum { THREADS = 3, BATCH = 2, SEQ = 9, HEADS = 6, KV = 2, CAPACITY = 1280, D = 64, STATES = 256 };

static const int32_t lengths[BATCH] = {1100, 1280};
static const int32_t positions[BATCH] = {1091, 1271};
static float q[BATCH * SEQ * HEADS * D], k[BATCH * SEQ * KV * D], v[BATCH * SEQ * KV * D];

/* The outputs of all operations. */
typedef struct memory {
    float k_cache[BATCH * CAPACITY * KV * D], v_cache[BATCH * CAPACITY * KV * D];
    float k_scales[BATCH * CAPACITY * KV], v_scales[BATCH * CAPACITY * KV];
    float turned[BATCH * SEQ * HEADS * D];
    float repeated[BATCH * CAPACITY * HEADS * D];
    float out[BATCH * SEQ * HEADS * D], lse[BATCH * SEQ * HEADS];
    float merged[BATCH * SEQ * HEADS * D];
} memory;

static memory expected, got;
static char workspace_bytes[1 << 23];

static void *workspace(void) {
    return workspace_bytes + (-(uintptr_t)workspace_bytes & 63);
}

/* Keys or values of a cache of a format, which takes at most the space of f32. */
static kvl_view cache(float *data, kvl_format format) {
    return kvl_make_view(data, format, BATCH, CAPACITY, KV, D);
}

static kvl_status attend(const kvl_context *context, const kvl_parallel_runner *runner, kvl_attention_params *p) {
    size_t bytes = 0;
    kvl_status status = kvl_attention_workspace_size(p, runner, &bytes);
    CHECK(status == KVL_STATUS_OK || bytes == 0, "-");
    CHECK(bytes + 64 <= sizeof workspace_bytes, "%d bytes of workspace", (int)bytes);
    return status == KVL_STATUS_OK ? kvl_attention(context, runner, workspace(), bytes, p) : status;
}

/* The operations of a decoder, over a cache of a format. */
static void operations(const kvl_context *context, const kvl_parallel_runner *runner, kvl_format format, memory *to) {
    static const double inv_freq[D / 2] = {1.0, 0.5, 0.25, 0.125};
    static const float slopes[HEADS] = {0.5f, 0.25f, 0.125f, 0.0625f, 0.03125f, 0.015625f};
    kvl_rope_params rope = KVL_ROPE_PARAMS_INIT;
    kvl_rms_norm_params norm = KVL_RMS_NORM_PARAMS_INIT;
    kvl_kv_write_params write = KVL_KV_WRITE_PARAMS_INIT;
    kvl_kv_read_params read = KVL_KV_READ_PARAMS_INIT;
    kvl_cache_scales scales = KVL_CACHE_SCALES_INIT, prefix_scales;
    kvl_attention_params p = KVL_ATTENTION_PARAMS_INIT;
    kvl_attention_state states[8];
    static kvl_kv_layer layer;
    kvl_cache whole = KVL_CACHE_INIT;
    kvl_const_view source = kvl_make_const_view(q, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D), prefix_k, prefix_v;
    kvl_view view = kvl_make_view(to->turned, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    kvl_plan *plan = NULL;
    int32_t now[BATCH];
    size_t i, bytes = 0;
    const kvl_rope_params *ropes = &rope;

    rope.rotary_dim = D;
    rope.inv_freq = inv_freq;
    rope.offsets = positions;
    OK(kvl_rope(context, runner, &source, &view, &rope));
    OK(kvl_rms_norm_rope(context, runner, &source, &view, &norm, &rope));

    memset(to->k_cache, 0, sizeof to->k_cache);
    memset(to->v_cache, 0, sizeof to->v_cache);
    memset(to->k_scales, 0, sizeof to->k_scales);
    memset(to->v_scales, 0, sizeof to->v_scales);
    write.k = kvl_make_const_view(k, KVL_DTYPE_F32, BATCH, SEQ, KV, D);
    write.v = kvl_make_const_view(v, KVL_DTYPE_F32, BATCH, SEQ, KV, D);
    write.k_cache = cache(to->k_cache, format);
    write.v_cache = cache(to->v_cache, format);
    if (format == KVL_FORMAT_INT8) {
        scales.k = kvl_make_view(to->k_scales, KVL_DTYPE_F32, BATCH, CAPACITY, KV, 1);
        scales.v = kvl_make_view(to->v_scales, KVL_DTYPE_F32, BATCH, CAPACITY, KV, 1);
        write.scales = &scales;
    }
    write.positions = positions;
    write.rope = &rope;
    write.k_norm = &norm;
    OK(kvl_kv_write(context, runner, &write));

    read.k_cache = kvl_as_const(write.k_cache);
    read.v_cache = kvl_as_const(write.v_cache);
    read.k = kvl_make_view(to->out, KVL_DTYPE_F32, BATCH, SEQ, KV, D);
    read.v = kvl_make_view(to->merged, KVL_DTYPE_F32, BATCH, SEQ, KV, D);
    read.positions = positions;
    read.scales = write.scales;
    OK(kvl_kv_read(context, runner, &read));

    if (format < KVL_FORMAT_INT8) {
        source = kvl_as_const(write.k_cache);
        view = kvl_make_view(to->repeated, format, BATCH, CAPACITY, HEADS, D);
        OK(kvl_repeat_kv(context, runner, &source, &view));
    }

    p.q = kvl_make_const_view(to->turned, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    p.k = kvl_as_const(write.k_cache);
    p.v = kvl_as_const(write.v_cache);
    p.out = kvl_make_view(to->out, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    p.lse = to->lse;
    p.scales = write.scales;
    p.lengths = lengths;
    p.flags = KVL_ATTENTION_FLAG_CAUSAL;
    p.alibi_slopes = slopes;
    p.softcap = 30;
    OK(attend(context, runner, &p));
    p.precision = KVL_PRECISION_HIGH;
    OK(attend(context, runner, &p));
    OK(kvl_plan_create(&p, &plan));
    kvl_plan_destroy(plan);
    p.alibi_slopes = NULL;
    prefix_k = p.k;
    prefix_v = p.v;
    prefix_k.shape[0] = prefix_v.shape[0] = 1;
    prefix_scales = scales;
    prefix_scales.k.shape[0] = prefix_scales.v.shape[0] = 1;
    OK(kvl_attention_with_prefix_workspace_size(&prefix_k, &p, runner, &bytes));
    CHECK(bytes + 64 <= sizeof workspace_bytes, "%d bytes of workspace", (int)bytes);
    OK(kvl_attention_with_prefix(context, runner, workspace(), bytes, &prefix_k, &prefix_v, format == KVL_FORMAT_INT8 ? &prefix_scales : NULL,
                                 &p));
    p.q.shape[1] = 1; /* A decode step. */
    p.out.shape[1] = 1;
    OK(attend(context, runner, &p));

    for (i = 0; i < COUNT(states); i++) {
        states[i].out = kvl_make_const_view(to->out, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
        states[i].lse = to->lse;
    }
    view = kvl_make_view(to->merged, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    OK(kvl_merge_states(context, runner, states, COUNT(states), &view, NULL));

    layer.k = write.k_cache;
    layer.v = write.v_cache;
    layer.scales = write.scales;
    whole.layers = &layer;
    whole.num_layers = 1;
    whole.lengths = now;
    memcpy(now, lengths, sizeof now);
    rope.offsets = NULL;
    OK(kvl_cache_evict(context, runner, &whole, 0, 8, 16, &ropes, 1));
    OK(kvl_cache_copy_prefix(context, runner, &whole, 0, (const int32_t[]){1}, 1, 100));
    OK(kvl_cache_reorder_workspace_size(&whole, runner, &bytes));
    CHECK(bytes + 64 <= sizeof workspace_bytes, "%d bytes of workspace", (int)bytes);
    OK(kvl_cache_reorder(context, runner, workspace(), bytes, &whole, (const int32_t[]){1, 0}));
    /* With a sentence. */
    CHECK(kvl_cache_advance(&whole, (const int32_t[]){0, 9999}) == KVL_STATUS_CAPACITY, "-");
}

/* ------------------------------------------------------------------------------------------------------------------ */

/* Runs in the child of a fork; exits with the number of the first failed check. */
static void child(const kvl_context *context, const kvl_parallel_runner *of_pool, kvl_thread_pool *pool) {
    kvl_parallel_runner own = KVL_PARALLEL_RUNNER_INIT;
    kvl_const_view source = kvl_make_const_view(q, KVL_DTYPE_F32, 1, 1, 1, D);
    kvl_view view = kvl_make_view(got.out, KVL_DTYPE_F32, 1, 1, 1, D);
    kvl_thread_pool *another = NULL;
    failures = 0; /* The parent counts its own failures. */
    alarm(300); /* A call that hangs makes the child die of a signal. */
    memset(&got, 0, sizeof got);
    /* One head is too little work for several threads, but is refused too. */
    if (kvl_repeat_kv(context, of_pool, &source, &view) != KVL_STATUS_PARALLEL) _exit(1);
    if (strstr(sentence(), "threads do not survive fork") == NULL) _exit(2);
    source = kvl_make_const_view(expected.k_cache, KVL_DTYPE_F32, BATCH, CAPACITY, KV, D);
    view = kvl_make_view(got.repeated, KVL_DTYPE_F32, BATCH, CAPACITY, HEADS, D);
    if (kvl_repeat_kv(context, of_pool, &source, &view) != KVL_STATUS_PARALLEL) _exit(3);
    if (got.repeated[0] != 0 || got.out[0] != 0) _exit(4);
    if (of_pool->run(of_pool->ctx, 1, NULL, NULL) == 0) _exit(5);
    kvl_thread_pool_destroy(pool);
    /* The context works, on the calling thread and on a pool of the child. */
    operations(context, NULL, KVL_FORMAT_F32, &got);
    if (memcmp(&expected, &got, sizeof got) != 0) _exit(6);
    /* QEMU's user mode aborts where the child of a process with threads starts a thread. */
    if (getenv("KVLANE_EMULATED") != NULL) _exit(failures > 0 ? 10 : 0);
    if (kvl_thread_pool_create(THREADS, &another) != KVL_STATUS_OK) _exit(7);
    if (kvl_thread_pool_runner(another, &own) != KVL_STATUS_OK) _exit(8);
    memset(&got, 0, sizeof got);
    operations(context, &own, KVL_FORMAT_F32, &got);
    if (memcmp(&expected, &got, sizeof got) != 0) _exit(9);
    kvl_thread_pool_destroy(another);
    _exit(failures > 0 ? 10 : 0);
}

static void forks(const kvl_context *context) {
    kvl_parallel_runner runner = KVL_PARALLEL_RUNNER_INIT;
    kvl_thread_pool *pool = NULL;
    char printed[256];
    int status = 0, ends[2];
    ssize_t n;
    pid_t pid;
    OK(kvl_thread_pool_create(THREADS, &pool));
    OK(kvl_thread_pool_runner(pool, &runner));
    operations(context, NULL, KVL_FORMAT_F32, &expected);
    operations(context, &runner, KVL_FORMAT_F32, &got);
    CHECK(memcmp(&expected, &got, sizeof got) == 0, "the pool changes the result");
    if (pipe(ends) != 0) abort();
    fflush(stderr);
    pid = fork();
    if (pid < 0) abort();
    if (pid == 0) {
        dup2(ends[1], 2);
        close(ends[0]);
        close(ends[1]);
        child(context, &runner, pool);
    }
    close(ends[1]);
    n = read(ends[0], printed, sizeof printed - 1);
    printed[n > 0 ? n : 0] = 0;
    close(ends[0]);
    if (waitpid(pid, &status, 0) != pid) abort();
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %#x", (unsigned)status);
    CHECK(n == 0, "the child printed: %s", printed);
    /* The parent still has its threads. */
    memset(&got, 0, sizeof got);
    operations(context, &runner, KVL_FORMAT_F32, &got);
    CHECK(memcmp(&expected, &got, sizeof got) == 0, "the pool changes the result");
    kvl_thread_pool_destroy(pool);
}

/* ------------------------------------------------------------------------------------------------------------------ */

static volatile sig_atomic_t arrived;
static pthread_t arrived_on;

static void on_signal(int number) {
    (void)number;
    arrived_on = pthread_self();
    arrived = 1;
}

static int blocked_on_pool, other_threads;
static size_t least_stack;
static pthread_t main_thread;
static pthread_mutex_t seen = PTHREAD_MUTEX_INITIALIZER;

/* A task that inspects its thread. */
static void look(void *ctx, size_t i) {
    static const int numbers[] = {SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGCHLD, SIGALRM, SIGPIPE, SIGPROF};
    pthread_attr_t attributes;
    sigset_t mask;
    size_t size = 0, s;
    int blocked = 1;
    (void)ctx, (void)i;
    pthread_sigmask(SIG_SETMASK, NULL, &mask);
    for (s = 0; s < COUNT(numbers); s++) blocked &= sigismember(&mask, numbers[s]);
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) abort();
    pthread_attr_getstacksize(&attributes, &size);
    pthread_attr_destroy(&attributes);
    pthread_mutex_lock(&seen);
    blocked_on_pool += blocked;
    other_threads += !pthread_equal(pthread_self(), main_thread);
    if (least_stack == 0 || size < least_stack) least_stack = size;
    pthread_mutex_unlock(&seen);
}

static void signals_and_stacks_of_the_pool(void) {
    kvl_parallel_runner runner = KVL_PARALLEL_RUNNER_INIT;
    kvl_thread_pool *pool = NULL;
    struct sigaction action;
    sigset_t before, after, usr1;
    int number, tasks;
    main_thread = pthread_self();
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigaction(SIGUSR1, &action, NULL);
    pthread_sigmask(SIG_SETMASK, NULL, &before);
    OK(kvl_thread_pool_create(THREADS, &pool));
    OK(kvl_thread_pool_runner(pool, &runner));
    pthread_sigmask(SIG_SETMASK, NULL, &after);
    for (number = 1; number < 32; number++) {
        CHECK(sigismember(&before, number) == sigismember(&after, number), "signal %d", number);
    }
    tasks = 64;
    CHECK(runner.run(runner.ctx, (size_t)tasks, look, NULL) == 0, "-");
    CHECK(blocked_on_pool == tasks && other_threads == tasks, "%d and %d of %d tasks", blocked_on_pool, other_threads,
          tasks);
    CHECK(least_stack >= 2u << 20, "a stack of %d bytes", (int)least_stack);

    /* A signal to the process stays pending while this thread blocks it: no thread of the pool takes it. */
    sigemptyset(&usr1);
    sigaddset(&usr1, SIGUSR1);
    pthread_sigmask(SIG_BLOCK, &usr1, NULL);
    if (kill(getpid(), SIGUSR1) != 0) abort();
    CHECK(runner.run(runner.ctx, (size_t)tasks, look, NULL) == 0, "-");
    usleep(20000);
    CHECK(!arrived, "a thread of the pool took a signal");
    pthread_sigmask(SIG_UNBLOCK, &usr1, NULL);
    CHECK(arrived && pthread_equal(arrived_on, main_thread), "the signal did not arrive here");
    kvl_thread_pool_destroy(pool);
}

/* ------------------------------------------------------------------------------------------------------------------ */

static void *on_a_small_stack(void *unused) {
    static const kvl_isa levels[] = {KVL_ISA_SCALAR, KVL_ISA_AVX2, KVL_ISA_AVX512,   KVL_ISA_AVX512_BF16,
                                     KVL_ISA_AMX,    KVL_ISA_NEON, KVL_ISA_NEON_BF16};
    size_t i;
    kvl_format format;
    (void)unused;
    for (i = 0; i < COUNT(levels); i++) {
        kvl_context_params params = KVL_CONTEXT_PARAMS_INIT;
        kvl_context *context = NULL;
        params.max_isa = levels[i];
        if (!kvl_isa_available(levels[i])) continue;
#ifdef SMALL_STACK
        /* On a large stack for the sanitizers, with which the portable level takes most of the time. */
        if (levels[i] == KVL_ISA_SCALAR) continue;
#endif
        OK(kvl_context_create(&params, &context));
        for (format = KVL_FORMAT_F32; format <= KVL_FORMAT_FP8_E5M2; format++) operations(context, NULL, format, &got);
        kvl_context_destroy(context);
    }
    return NULL;
}

/* Merges convert their list of states on the stack; this is the longest list. */
static void *merge_on_a_small_stack(void *from) {
    static kvl_attention_state states[STATES];
    const kvl_context *context = from;
    kvl_view view = kvl_make_view(got.merged, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
    size_t i;
    for (i = 0; i < COUNT(states); i++) {
        states[i].out = kvl_make_const_view(got.out, KVL_DTYPE_F32, BATCH, SEQ, HEADS, D);
        states[i].lse = got.lse;
    }
    OK(kvl_merge_states(context, NULL, states, STATES, &view, NULL));
    return NULL;
}

/* Two thirds of the stack that the header states to be enough. */
#ifndef SMALL_STACK
#define SMALL_STACK 65536
#endif

static void small_stack(void *(*body)(void *), void *argument) {
    pthread_attr_t attributes;
    pthread_t thread;
    size_t size = SMALL_STACK;
    const long least = sysconf(_SC_THREAD_STACK_MIN);
    if (least > 0 && (size_t)least > size) size = (size_t)least;
    pthread_attr_init(&attributes);
    if (pthread_attr_setstacksize(&attributes, size) != 0) abort();
    if (pthread_create(&thread, &attributes, body, argument) != 0) abort();
    pthread_join(thread, NULL);
    pthread_attr_destroy(&attributes);
}

int main(void) {
    kvl_thread_pool *pool = NULL;
    kvl_context *context = NULL;
    /* Threads of a pool have a stack of their own size, which the header states. */
    setenv("RUST_MIN_STACK", "300000", 1);
    fill(q, COUNT(q), 7);
    fill(k, COUNT(k), 8);
    fill(v, COUNT(v), 9);
    OK(kvl_context_create(NULL, &context));
    small_stack(on_a_small_stack, NULL);
    small_stack(merge_on_a_small_stack, context);
    if (kvl_thread_pool_create(1, &pool) == KVL_STATUS_UNSUPPORTED) {
        printf("no thread pool in this build\n");
    } else {
        kvl_thread_pool_destroy(pool);
        signals_and_stacks_of_the_pool();
        forks(context);
    }
    kvl_context_destroy(context);
    return finish("process");
}
