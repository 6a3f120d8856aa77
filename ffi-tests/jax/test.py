#!/usr/bin/env python3
"""The operations of kvlane_jax.py against JAX's own.

    test.py PREFIX WORK
"""
import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import kvlane_jax
import numpy as np
from jax import lax

kvlane_jax.load(*sys.argv[1:])
rng = np.random.default_rng(1)
normal = lambda *shape, dtype=jnp.float32: jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)
bits = lambda x: np.asarray(x).view(np.uint8)


def same_bits(a, b, what):
    assert a.shape == b.shape and a.dtype == b.dtype and np.array_equal(bits(a), bits(b)), what


def close(a, b, tolerance, what):
    assert a.shape == b.shape, (what, a.shape, b.shape)
    error = float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max())
    assert error <= tolerance, (what, error)
    return error


def wanted_attention(q, k, v, lengths, starts=0, causal=True, scale=None, softcap=0.0, window_left=-1):
    """[batch, seq, heads, dim], in f32."""
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    logits = jnp.einsum("bshd,bthd->bhst", q, jnp.repeat(k, group, 2), precision="highest") * (scale or q.shape[-1] ** -0.5)
    if softcap:
        logits = softcap * jnp.tanh(logits / softcap)
    column = lambda x: jnp.broadcast_to(jnp.asarray(x), q.shape[:1])[:, None, None]
    rows, keys = column(lengths) - q.shape[1] + jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])
    mask = (keys < column(lengths)) & (keys >= column(starts))
    if causal:
        mask &= keys <= rows
    if window_left >= 0:
        mask &= keys >= rows - window_left
    weights = jax.nn.softmax(jnp.where(mask[:, None], logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhst,bthd->bshd", weights, jnp.repeat(v, group, 2), precision="highest")


def wanted_rope(x, offsets, base, rotary_dim, interleaved):
    half = rotary_dim // 2
    # f64, as the library does, of NumPy: JAX has it only when it is enabled.
    angles = (np.asarray(offsets)[:, None] + np.arange(x.shape[1]))[..., None, None] * base ** (-np.arange(half) / half)
    first, second = (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)) if interleaved else (slice(0, half), slice(half, rotary_dim))
    source = np.asarray(x, np.float64)
    result = source.copy()
    result[..., first] = source[..., first] * np.cos(angles) - source[..., second] * np.sin(angles)
    result[..., second] = source[..., second] * np.cos(angles) + source[..., first] * np.sin(angles)
    return jnp.asarray(result, jnp.float32)


BATCH, SLOTS, HEADS, KV_HEADS, DIM = 3, 70, 8, 2, 32
positions = jnp.asarray([0, 41, 65], jnp.int32)

# RoPE, for a batch, and a sequence at a time under vmap.
for dtype, tolerance in ((jnp.float32, 2e-6), (jnp.bfloat16, 2e-2), (jnp.float16, 2e-3)):
    x = normal(BATCH, 5, HEADS, DIM, dtype=dtype)
    for base, rotary_dim, interleaved in ((10000.0, DIM, False), (500000.0, 16, True)):
        options = {"base": base, "rotary_dim": rotary_dim, "interleaved": interleaved}
        rotate = jax.jit(lambda x, offsets: kvlane_jax.rope(x, offsets, **options))
        got = rotate(x, positions)
        close(got, wanted_rope(x, positions, **options), tolerance, ("rope", dtype, options))
        same_bits(got, jax.jit(jax.vmap(rotate))(x, positions), "rope under vmap")
print("rope: the numbers of its formula in f32, bf16 and f16; under vmap the same bits")

# The write: to the bit what a dynamic_update_slice for each sequence does.
slices = jax.vmap(lambda cache, tokens, start: lax.dynamic_update_slice_in_dim(cache, tokens.astype(cache.dtype), start, axis=0))
for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
    for source in {jnp.float32, dtype}:
        cache, tokens = normal(BATCH, SLOTS, KV_HEADS, DIM, dtype=dtype), normal(BATCH, 5, KV_HEADS, DIM, dtype=source)
        before, wanted = cache.copy(), slices(cache, tokens, positions)
        same_bits(jax.jit(kvlane_jax.update)(cache, tokens, positions), wanted, "update")
        same_bits(jax.jit(jax.vmap(kvlane_jax.update))(cache, tokens, positions), wanted, "update under vmap")
        same_bits(cache, before, "a cache that was not donated has changed")
        # Beams: every sequence of the inner vmap with several continuations of one cache.
        beams = normal(4, BATCH, 5, KV_HEADS, DIM, dtype=source)
        got = jax.jit(jax.vmap(jax.vmap(kvlane_jax.update), in_axes=(None, 0, None)))(cache, beams, positions)
        same_bits(got, jax.vmap(slices, in_axes=(None, 0, None))(cache, beams, positions), "update under two vmaps")
v_cache, v = normal(BATCH, SLOTS, KV_HEADS, 48), normal(BATCH, 5, KV_HEADS, 48)
k_cache, k = normal(BATCH, SLOTS, KV_HEADS, DIM, dtype=jnp.bfloat16), normal(BATCH, 5, KV_HEADS, DIM)
for write in (kvlane_jax.write, jax.vmap(kvlane_jax.write)):
    for got, wanted in zip(jax.jit(write)(k_cache, v_cache, k, v, positions), (slices(k_cache, k, positions), slices(v_cache, v, positions))):
        same_bits(got, wanted, "write")
print("write: the bits of dynamic_update_slice under vmap, with and without vmap")

# Attention.
worst = 0.0
for dtype, tolerance in ((jnp.float32, 5e-6), (jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)):
    for seq in (1, 5):
        q = normal(BATCH, seq, HEADS, DIM, dtype=dtype)
        k, v = (normal(BATCH, SLOTS, KV_HEADS, DIM, dtype=dtype) for _ in range(2))
        lengths, starts = jnp.asarray([seq, 44, 70], jnp.int32), jnp.asarray([0, 3, 11], jnp.int32)
        for options in ({}, {"softcap": 30.0, "scale": 1.5}, {"window_left": 7}, {"causal": False}):
            attend = lambda q, k, v, lengths, starts: kvlane_jax.attention(q, k, v, lengths, starts=starts, **options)
            got = jax.jit(attend)(q, k, v, lengths, starts)
            error = close(got, wanted_attention(q, k, v, lengths, starts, **options), tolerance, ("attention", dtype, seq, options))
            worst = max(worst, error) if dtype == jnp.float32 else worst
            same_bits(got, jax.jit(jax.vmap(attend))(q, k, v, lengths, starts), "attention under vmap")
        # Several queries of all sequences on caches that are not mapped, and on one sequence of them.
        several = normal(4, *q.shape, dtype=dtype)
        got = jax.jit(jax.vmap(lambda q: kvlane_jax.attention(q, k, v, lengths)))(several)
        same_bits(got, jnp.stack([kvlane_jax.attention(q, k, v, lengths) for q in several]), "queries over shared caches")
        got = jax.jit(jax.vmap(lambda q: kvlane_jax.attention(q, k[1], v[1], 44)))(several[:, 1])
        same_bits(got, jnp.stack([kvlane_jax.attention(q, k[1], v[1], 44) for q in several[:, 1]]), "queries over a shared sequence")
print(f"attention: {worst:.1e} from JAX's in f32; under vmap the same bits")


# Steps of a decoder under jit and scan: the caches stay where they are.
def step(state, token):
    k_cache, v_cache, lengths = state
    q, k, v = token
    q, k = kvlane_jax.rope(q, lengths), kvlane_jax.rope(k, lengths)
    k_cache, v_cache = kvlane_jax.write(k_cache, v_cache, k, v, lengths)
    lengths = lengths + q.shape[1]
    return (k_cache, v_cache, lengths), kvlane_jax.attention(q, k_cache, v_cache, lengths)


steps, lengths = 6, jnp.asarray([0, 40, 63], jnp.int32)
q, (k, v) = normal(steps, BATCH, 1, HEADS, DIM), (normal(steps, BATCH, 1, KV_HEADS, DIM) for _ in range(2))
caches = [normal(BATCH, SLOTS, KV_HEADS, DIM) for _ in range(2)]
wanted, wanted_k, wanted_v = [], *caches
for i in range(steps):
    at = lengths + i
    wanted_k = slices(wanted_k, wanted_rope(k[i], at, 10000.0, DIM, False), at)
    wanted_v = slices(wanted_v, v[i], at)
    wanted.append(wanted_attention(wanted_rope(q[i], at, 10000.0, DIM, False), wanted_k, wanted_v, at + 1))
wanted = jnp.stack(wanted)
decode = jax.jit(lambda k_cache, v_cache, tokens: lax.scan(step, (k_cache, v_cache, lengths), tokens), donate_argnums=(0, 1))
pointers = [cache.unsafe_buffer_pointer() for cache in caches]
(*after, _), got = decode(*caches, (q, k, v))
assert [cache.unsafe_buffer_pointer() for cache in after] == pointers, "a cache was copied"
assert all(cache.is_deleted() for cache in caches)
error = close(got, wanted, 1e-5, "decode")
close(after[0], wanted_k, 5e-6, "keys after decode")
same_bits(after[1], wanted_v, "values after decode")
print(f"decode under jit and scan: caches in place, {error:.1e} from JAX's operations")

for what, call, words in (
    ("a token that does not fit", lambda: kvlane_jax.update(normal(2, 8, 2, 16), normal(2, 3, 2, 16), 6), ("position 6", "holds 8")),
    ("another head size", lambda: kvlane_jax.attention(normal(1, 1, 2, 16), normal(1, 8, 2, 32), normal(1, 8, 2, 32), 8), ("16", "32")),
    ("a length above the cache", lambda: kvlane_jax.attention(normal(1, 1, 2, 16), normal(1, 8, 2, 16), normal(1, 8, 2, 16), 9), ("8", "9")),
    ("an odd rotary_dim", lambda: kvlane_jax.rope(normal(1, 1, 2, 16), 0, rotary_dim=7), ("7",)),
):
    try:
        jax.block_until_ready(call())
        sys.exit(f"{what} is no error")
    except jax.errors.JaxRuntimeError as error:
        assert all(word in str(error) for word in words), (what, error)
print("bad input: errors with the library's sentences")
