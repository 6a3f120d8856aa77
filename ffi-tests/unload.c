/* Loads the library, uses it on several threads and with a pool, and unloads it while the threads are alive. */
#include <dirent.h>
#include <dlfcn.h>
#include <pthread.h>
#include <time.h>

#include "check.h"

static void *library;

/* A function of the library. C has no conversion from an object pointer to a function pointer. */
#define FIND(name)                                                                                                     \
    do {                                                                                                               \
        void *found_ = dlsym(library, #name);                                                                          \
        if (found_ == NULL) abort();                                                                                   \
        memcpy(&name##_, &found_, sizeof found_);                                                                      \
    } while (0)

static kvl_status (*kvl_context_create_)(const kvl_context_params *, kvl_context **);
static void (*kvl_context_destroy_)(kvl_context *);
static kvl_status (*kvl_repeat_kv_)(const kvl_context *, const kvl_parallel_runner *, const kvl_const_view *,
                                    const kvl_view *);
static kvl_status (*kvl_thread_pool_create_)(size_t, kvl_thread_pool **);
static void (*kvl_thread_pool_destroy_)(kvl_thread_pool *);
static kvl_status (*kvl_thread_pool_runner_)(const kvl_thread_pool *, kvl_parallel_runner *);
static size_t (*kvl_last_error_)(char *, size_t);

enum { N = 1 << 16 };
static float x[N], y[2 * N];

static void use(void) {
    kvl_context *context = NULL;
    kvl_thread_pool *pool = NULL;
    kvl_parallel_runner runner = KVL_PARALLEL_RUNNER_INIT;
    kvl_const_view src = kvl_make_const_view(x, KVL_DTYPE_F32, 1, N / 64, 1, 64);
    kvl_view dst = kvl_make_view(y, KVL_DTYPE_F32, 1, N / 64, 2, 64);
    char text[64];
    kvl_status status;
    CHECK(kvl_context_create_(NULL, &context) == KVL_STATUS_OK, "-");
    CHECK(kvl_repeat_kv_(context, NULL, &src, &dst) == KVL_STATUS_OK, "-");
    CHECK(y[65] == x[1], "-");
    status = kvl_thread_pool_create_(3, &pool);
    if (status != KVL_STATUS_UNSUPPORTED) {
        CHECK(status == KVL_STATUS_OK, "-");
        CHECK(kvl_thread_pool_runner_(pool, &runner) == KVL_STATUS_OK, "-");
        CHECK(kvl_repeat_kv_(context, &runner, &src, &dst) == KVL_STATUS_OK, "-");
        kvl_thread_pool_destroy_(pool);
    }
    CHECK(kvl_repeat_kv_(NULL, NULL, &src, &dst) == KVL_STATUS_NULL_POINTER, "-");
    CHECK(kvl_last_error_(text, sizeof text) > 1, "-");
    kvl_context_destroy_(context);
}

static int threads_of_this_process(void) {
    DIR *tasks = opendir("/proc/self/task");
    struct dirent *entry;
    int n = 0;
    if (tasks == NULL) return -1;
    while ((entry = readdir(tasks)) != NULL) n += entry->d_name[0] != '.';
    closedir(tasks);
    return n;
}

static pthread_barrier_t used, unloaded;

static void *outlive(void *unused) {
    (void)unused;
    use();
    pthread_barrier_wait(&used);
    pthread_barrier_wait(&unloaded);
    /* The library's data of this thread is released when the thread ends. */
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t thread;
    int round, before;
    if (argc != 2) return 2;
    fill(x, N, 3);
    pthread_barrier_init(&used, NULL, 2);
    pthread_barrier_init(&unloaded, NULL, 2);
    for (round = 0; round < 3; round++) {
        before = threads_of_this_process();
        library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) {
            fprintf(stderr, "%s\n", dlerror());
            return 1;
        }
        FIND(kvl_context_create);
        FIND(kvl_context_destroy);
        FIND(kvl_repeat_kv);
        FIND(kvl_thread_pool_create);
        FIND(kvl_thread_pool_destroy);
        FIND(kvl_thread_pool_runner);
        FIND(kvl_last_error);
        use();
        if (pthread_create(&thread, NULL, outlive, NULL) != 0) abort();
        pthread_barrier_wait(&used);
        /* An emulator has threads of its own. */
        if (getenv("KVLANE_EMULATED") == NULL) {
            /* Threads that were joined can be listed for a moment. */
            struct timespec moment = {0, 10000000};
            int n = threads_of_this_process(), waits;
            for (waits = 0; waits < 500 && n != before + (before > 0); waits++) {
                nanosleep(&moment, NULL);
                n = threads_of_this_process();
            }
            CHECK(n == before + (before > 0), "%d threads", n);
        }
        CHECK(dlclose(library) == 0, "%s", dlerror());
        pthread_barrier_wait(&unloaded);
        pthread_join(thread, NULL);
    }
    return failures > 0;
}

/* The macro CHECK calls kvl_last_error of the linked library; this program links none. */
size_t kvl_last_error(char *buffer, size_t size) {
    if (size > 0) buffer[0] = 0;
    return 1;
}

const char *kvl_status_string(kvl_status status) {
    (void)status;
    return "";
}
