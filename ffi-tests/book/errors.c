/* What a call says that is refused. */
#include "book.h"

int main(void) {
    static float keys[8 * 2 * 4], values[8 * 2 * 4], k[2 * 4] = {1}, v[2 * 4] = {1};
    const int32_t position = 8;
    kvl_context *context = NULL;
    check(kvl_context_create(NULL, &context));

    /* [sentence] */
    kvl_view k_cache = kvl_make_view(keys, KVL_DTYPE_F32, 1, 8, 2, 4); /* room for the positions 0 to 7 */
    kvl_view v_cache = kvl_make_view(values, KVL_DTYPE_F32, 1, 8, 2, 4);
    kvl_kv_write_params write = kvl_make_kv_write(k_cache, v_cache, k, v, KVL_DTYPE_F32, 1, 1, &position);
    kvl_status status = kvl_kv_write(context, NULL, &write);
    if (status == KVL_STATUS_CAPACITY) {
        char sentence[1024];
        kvl_last_error(sentence, sizeof sentence);
        printf("%s: %s\n", kvl_status_string(status), sentence);
    }
    /* [sentence] */
    EXPECT(status == KVL_STATUS_CAPACITY);
    for (int i = 0; i < 8 * 2 * 4; i++) {
        EXPECT(keys[i] == 0 && values[i] == 0); /* nothing has been written */
    }

    /* [bytes] */
    /* A view that knows the size of its buffer is checked against it. */
    write.k_cache.bytes = sizeof keys;
    write.k_cache.shape[1] = 9;
    write.v_cache.shape[1] = 9;
    EXPECT(kvl_kv_write(context, NULL, &write) == KVL_STATUS_BOUNDS);
    /* [bytes] */

    /* [length] */
    /* The sentence can be asked for in its whole length. */
    const size_t size = kvl_last_error(NULL, 0);
    char *whole = malloc(size);
    EXPECT(whole != NULL);
    kvl_last_error(whole, size);
    /* [length] */
    EXPECT(strlen(whole) + 1 == size && strstr(whole, "k_cache") != NULL);

    /* A call that succeeds leaves it as it is. */
    write.k_cache.shape[1] = write.v_cache.shape[1] = 8;
    const int32_t first = 0;
    write.positions = &first;
    check(kvl_kv_write(context, NULL, &write));
    EXPECT(kvl_last_error(NULL, 0) == size);
    free(whole);
    kvl_context_destroy(context);
    return 0;
}
