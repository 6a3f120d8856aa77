/* Versions at run time, and structs of other versions. */
#include "book.h"

/* [newer] */
/* A struct as a later header may have it: the same, and a field at the end. */
typedef struct newer_context_params {
    kvl_context_params known;
    int64_t added;
} newer_context_params;
/* [newer] */

int main(void) {
    /* [abi] */
    const uint32_t header = KVL_ABI_VERSION, library = kvl_abi_version();
    if (library >> 16 != header >> 16) {
        fprintf(stderr, "kvlane.h is of ABI %u, the library of %u\n", (unsigned)(header >> 16), (unsigned)(library >> 16));
        return 1;
    }
    if ((library & 0xffff) < (header & 0xffff)) {
        /* An older library: its functions work, and fields that it does not know must stay 0. */
        fprintf(stderr, "kvlane %s is older than the program\n", kvl_version_string());
    }
    /* [abi] */
    EXPECT(library == header);

    /* A newer program: accepted as long as the new field has its default. */
    newer_context_params params = {.known = {.struct_size = sizeof params}};
    kvl_context *context = NULL;
    check(kvl_context_create(&params.known, &context));
    kvl_context_destroy(context);
    params.added = 1;
    EXPECT(kvl_context_create(&params.known, &context) == KVL_STATUS_STRUCT_SIZE);

    /* A struct that was not initialised. */
    params.known.struct_size = 3;
    EXPECT(kvl_context_create(&params.known, &context) == KVL_STATUS_STRUCT_SIZE);
    return 0;
}
