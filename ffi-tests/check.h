/* Shared by the test programs: checks that count and print, and reproducible pseudo-random numbers. */
#ifndef CHECK_H
#define CHECK_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvlane.h"

static int failures = 0;

/* Text in the style of printf after the condition describes the failure. */
#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            failures++;                                                                                                \
            fprintf(stderr, "%s:%d: not true: %s: ", __FILE__, __LINE__, #condition);                                  \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fprintf(stderr, "\n");                                                                                     \
        }                                                                                                              \
    } while (0)

static inline const char *sentence(void) {
    static char text[1024];
    kvl_last_error(text, sizeof text);
    return text;
}

#define OK(call)                                                                                                       \
    do {                                                                                                               \
        kvl_status status_ = (call);                                                                                   \
        CHECK(status_ == KVL_STATUS_OK, "%s: %s", kvl_status_string(status_), sentence());                             \
    } while (0)

#define NEAR(value, wanted, tolerance)                                                                                 \
    do {                                                                                                               \
        double value_ = (value), wanted_ = (wanted);                                                                   \
        CHECK(fabs(value_ - wanted_) <= (tolerance), "%s is %.9g, not %.9g", #value, value_, wanted_);                 \
    } while (0)

#define COUNT(array) (sizeof(array) / sizeof((array)[0]))

static inline int finish(const char *program) {
    if (failures > 0) {
        fprintf(stderr, "%s: %d checks failed\n", program, failures);
    }
    return failures > 0;
}

/* Between -1 and 1. */
static inline float noise(uint32_t *state) {
    *state = *state * 1664525u + 1013904223u;
    return (float)(*state >> 8) / 8388608.0f - 1.0f;
}

static inline void fill(float *data, size_t n, uint32_t seed) {
    size_t i;
    for (i = 0; i < n; i++) {
        data[i] = noise(&seed);
    }
}

static inline float from_bf16(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

#endif
