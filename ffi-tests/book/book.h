/* What the programs of the book share. */
#ifndef BOOK_H
#define BOOK_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvlane.h"

/* [check] */
/* Ends the program if a call has failed. */
static inline void check(kvl_status status) {
    if (status != KVL_STATUS_OK) {
        char sentence[1024];
        kvl_last_error(sentence, sizeof sentence);
        fprintf(stderr, "%s: %s\n", kvl_status_string(status), sentence);
        exit(1);
    }
}
/* [check] */

/* [workspace] */
/* Scratch memory that grows when a call needs more, for one call at a time. */
typedef struct workspace {
    void *data; /* aligned to 64 bytes */
    size_t bytes;
    char *memory; /* what malloc has returned */
} workspace;

static inline void reserve(workspace *space, size_t bytes) {
    if (bytes > space->bytes) {
        free(space->memory);
        space->memory = malloc(bytes + 63);
        if (space->memory == NULL) {
            exit(1);
        }
        space->data = space->memory + (-(uintptr_t)space->memory & 63);
        space->bytes = bytes;
    }
}

static inline void attend(const kvl_context *context, const kvl_parallel_runner *runner, workspace *space,
                          const kvl_attention_params *params) {
    size_t bytes;
    check(kvl_attention_workspace_size(params, runner, &bytes));
    reserve(space, bytes);
    check(kvl_attention(context, runner, space->data, space->bytes, params));
}
/* [workspace] */

/* What the text of the book says of a result. */
#define EXPECT(condition)                                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition);                                  \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

/* A stand-in for a model's linear layers: numbers between -1 and 1. */
static inline void project(float *to, size_t n, uint32_t seed) {
    for (size_t i = 0; i < n; i++) {
        seed = seed * 1664525u + 1013904223u;
        to[i] = (float)(seed >> 8) / 8388608.0f - 1.0f;
    }
}

#endif
