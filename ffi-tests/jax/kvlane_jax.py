"""Operations of JAX on CPUs: attention over a cache, the cache write and RoPE.

    kvlane_jax.load(PREFIX, WORK)   # compiles handlers.cpp against the library installed in PREFIX, once

Tensors are [..., seq, heads, dim] of f32, f16 or bf16, and lists of positions and lengths [...] of int32: with an axis for the
batch, or without one for a single sequence. Under vmap all sequences are computed in one call. Under jit, writes go to the
memory of the cache that they are given; XLA copies it first if it is needed afterwards, so donate it (`donate_argnums`). Arrays
that are spread over devices are given under shard_map, in which each device computes its own part. The operations have no
derivatives. Bad input raises the library's sentence; positions at which tokens do not fit are bad input, where
`dynamic_update_slice` moves them.
"""
import ctypes
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np

HERE = pathlib.Path(__file__).parent


def load(prefix, work):
    library = pathlib.Path(work) / "kvlane_jax.so"
    subprocess.run(
        ["c++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{prefix}/include", "-isystem",
         jax.ffi.include_dir(), HERE / "handlers.cpp", f"{prefix}/lib/libkvlane.a", "-Wl,--exclude-libs,libkvlane.a", "-lpthread",
         "-ldl", "-lm", "-o", library], check=True)
    handlers = ctypes.CDLL(str(library))
    for name in ("attention", "update", "write", "rope"):
        jax.ffi.register_ffi_target(f"kvlane_{name}", jax.ffi.pycapsule(getattr(handlers, f"kvlane_{name}")), platform="cpu")


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _list(x, leading):
    return jnp.broadcast_to(jnp.asarray(x, jnp.int32), leading)


def attention(q, k, v, lengths, *, starts=0, causal=True, scale=0.0, softcap=0.0, window_left=-1):
    """Queries `q` over the first `lengths` keys of the caches `k` and `v`, from `starts` on; the last query stands at the last key.
    A `scale` of 0 is 1 / sqrt(dim), a `softcap` of 0 and a `window_left` of -1 are none. A cache that vmap does not map is read
    where it is. Returns q's shape with the head size of `v`, in q's type."""
    result = jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype)
    leading = q.shape[:-3]
    # An axis of one for what is not mapped: the handler reads it in place.
    call = jax.ffi.ffi_call("kvlane_attention", result, vmap_method="expand_dims")
    return call(q, k, v, _list(lengths, leading), _list(starts, leading), causal=causal, scale=np.float32(scale),
                softcap=np.float32(softcap), window_left=np.int64(window_left))


def update(cache, tokens, positions):
    """The cache with `tokens` from `positions` on, as `dynamic_update_slice` along its axis seq, in the cache's type."""
    call = jax.ffi.ffi_call("kvlane_update", _like(cache), vmap_method="broadcast_all", input_output_aliases={0: 0})
    return call(cache, tokens, _list(positions, cache.shape[:-3]))


def write(k_cache, v_cache, k, v, positions):
    """Both caches with the new keys and values."""
    call = jax.ffi.ffi_call("kvlane_write", (_like(k_cache), _like(v_cache)), vmap_method="broadcast_all",
                            input_output_aliases={0: 0, 1: 1})
    return call(k_cache, v_cache, k, v, _list(positions, k_cache.shape[:-3]))


def rope(x, offsets, *, base=10000.0, rotary_dim=None, interleaved=False):
    """Rotates token t of a sequence by the angles of position `offsets + t`, in the memory of `x`."""
    call = jax.ffi.ffi_call("kvlane_rope", _like(x), vmap_method="broadcast_all", input_output_aliases={0: 0})
    return call(x, _list(offsets, x.shape[:-3]), base=np.float64(base), interleaved=interleaved,
                rotary_dim=np.int64(rotary_dim or x.shape[-1]))
