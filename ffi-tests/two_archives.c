/* A program with two archives of Rust code, each with a standard library of its own. */
#include <stdio.h>

#include "kvlane.h"

int other_rust(int x); /* -1 from a panic that it catches. */

int main(void) {
    kvl_context *context = NULL;
    char sentence[256];
    if (other_rust(1) != 2 || other_rust(0) != -1) return 1;
    if (kvl_context_create(NULL, &context) != KVL_STATUS_OK) return 2;
    if (kvl_attention(context, NULL, NULL, 0, NULL) != KVL_STATUS_NULL_POINTER) return 3;
    kvl_last_error(sentence, sizeof sentence);
    kvl_context_destroy(context);
    puts(sentence);
    return 0;
}
