/* A shared object with the static library inside, which shows nothing of it. */
#include "kvlane.h"

uint32_t plugin_kvlane_version(void);

uint32_t plugin_kvlane_version(void) {
    kvl_context *context = NULL;
    if (kvl_context_create(NULL, &context) != KVL_STATUS_OK) return UINT32_MAX;
    kvl_context_destroy(context);
    return kvl_abi_version();
}
