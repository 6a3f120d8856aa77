#!/usr/bin/env python3
"""The installed wheel of kvlane: numpy and DLPack arrays against a definition in numpy, errors, lists of other types, threads and fork.

Needs kvlane, numpy and ml_dtypes, and jax for arrays of another library.
"""
import gc
import inspect
import os
import re
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
import kvlane
import ml_dtypes
import numpy as np
from kvlane import capi

rng = np.random.default_rng(1)
BATCH, SEQ, HEADS, KV_HEADS, DIM, CAPACITY = 2, 3, 6, 2, 32, 64


def noise(*shape, dtype=np.float32):
    return rng.standard_normal(shape, np.float32).astype(dtype)


def refused(kind, text, call, *args, **fields):
    try:
        call(*args, **fields)
    except kind as error:
        assert text in str(error), f"{error!r} does not say {text!r}"
    else:
        sys.exit(f"no error with {text!r}")


def reference(q, k, v, lengths):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    logits = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(q.shape[3])
    rows = lengths[:, None] - q.shape[1] + np.arange(q.shape[1])
    logits = np.where(np.arange(k.shape[1]) <= rows[:, None, :, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhst,bthd->bshd", weights / weights.sum(-1, keepdims=True), v)


def step(dtype, like=lambda x: x, order=(0, 1, 2, 3)):
    """A write and attention, with caches of a type whose axes lie in memory in an order."""
    shape = (BATCH, CAPACITY, KV_HEADS, DIM)
    k_cache, v_cache = (np.zeros([shape[axis] for axis in order], dtype).transpose(np.argsort(order)) for _ in range(2))
    lengths = np.array([5, 20], np.int32)
    k_cache[:], v_cache[:] = noise(*shape).astype(dtype), noise(*shape).astype(dtype)
    q, k, v = noise(BATCH, SEQ, HEADS, DIM), noise(BATCH, SEQ, KV_HEADS, DIM), noise(BATCH, SEQ, KV_HEADS, DIM)
    kvlane.kv_write(like(k), like(v), k_cache, v_cache, positions=lengths)
    for b, n in enumerate(lengths):
        assert np.array_equal(k_cache[b, n : n + SEQ], k[b].astype(dtype)), "written keys"
    lengths += SEQ
    out = kvlane.attention(like(q), like(k_cache), like(v_cache), lengths=lengths, causal=True)
    error = np.abs(out - reference(q, k_cache, v_cache, lengths)).max()
    # Rounds weights to bf16 where the CPU multiplies matrices of it.
    assert error < (3e-2 if dtype == ml_dtypes.bfloat16 else 1e-5), (dtype, error)
    return q, k_cache, v_cache, lengths, out


for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
    for order in ((0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)):
        q, k, v, lengths, out = step(dtype, order=order)
        # A list of Python's is the same; threads change no bit.
        assert np.array_equal(out, kvlane.attention(q, k, v, lengths=lengths.tolist(), causal=True, threads=3))

# Arguments that the library would misread, before it is called, and those that it refuses itself.
refused(TypeError, "lengths is int64, but the library has int32", kvlane.attention, q, k, v, lengths=lengths.astype(np.int64))
refused(TypeError, "list with gaps", kvlane.attention, q, k, v, lengths=np.arange(4, dtype=np.int32)[::2])
refused(OverflowError, "outside of int32", kvlane.attention, q, k, v, lengths=[2**31, 1])
refused(TypeError, "elements of float64", kvlane.attention, q, k, v, lengths=[1.5, 2])
refused(ValueError, "lengths has 3 entries for 2 sequences", kvlane.attention, q, k, v, lengths=[1, 2, 3])
refused(TypeError, "q is float64", kvlane.attention, q.astype(np.float64), k, v)
refused(TypeError, "q has 3 axes", kvlane.attention, q[0], k, v)
refused(TypeError, "neither an array", kvlane.attention, [1.0], k, v)
refused(AttributeError, "no field colour", kvlane.attention, q, k, v, colour=1)
fixed = np.zeros_like(q)
fixed.flags.writeable = False
refused(TypeError, "read-only", kvlane.attention, q, k, v, out=fixed)
refused(kvlane.Error, "softcap", kvlane.attention, q, k, v, softcap=-1.0)
refused(kvlane.Error, "16", kvlane.attention, q[..., :16], k, v)
try:
    kvlane.attention(q, k, v, lengths=[1, CAPACITY + 1])
except kvlane.Error as error:
    assert error.status in (capi.KVL_STATUS_OUT_OF_RANGE, capi.KVL_STATUS_CAPACITY, capi.KVL_STATUS_INVALID_VALUE), error.status

# A mask, a plan, the LSE, and what structs keep alive.
mask = np.arange(CAPACITY)[None, None, None] < lengths[:, None, None, None]
lse = np.empty((BATCH, SEQ, HEADS), np.float32)
masked = kvlane.attention(q, k, v, mask=mask, lse=lse)
assert np.isfinite(lse).all() and np.abs(masked - kvlane.attention(q, k, v, lengths=lengths)).max() < 3e-2
params = capi.kvl_attention_params(q=noise(1, 1, 2, 8), k=noise(1, 4, 2, 8), v=np.ones((1, 4, 2, 8), np.float32), lengths=[3],
                                   out=(result := np.empty((1, 1, 2, 8), np.float32)))
gc.collect()
room = np.zeros(1 << 16, np.uint8)
capi.kvl_attention(kvlane._context(), None, room[-room.ctypes.data % 64 :], 1 << 15, params)
assert np.allclose(result, 1)

# Rotation, by its definition.
inv_freq, magnitude = kvlane.rope_frequencies(DIM)
assert magnitude == 1
x = noise(1, SEQ, HEADS, DIM)
turned = kvlane.rope(x.copy(), inv_freq, [7])
angle = (7 + np.arange(SEQ))[:, None] * inv_freq
real, imaginary = x[0, ..., : DIM // 2], x[0, ..., DIM // 2 :]
wanted = real * np.cos(angle)[:, None] - imaginary * np.sin(angle)[:, None]
assert np.abs(turned[0, ..., : DIM // 2] - wanted).max() < 1e-5

# A Hadamard rotation, by its definition, alone and in a cache.
block = kvlane.hadamard_block(DIM)
matrix = np.array([[(-1) ** (i & j).bit_count() for j in range(block)] for i in range(block)]) / block**0.5
assert kvlane.hadamard_block(96) == 32 and kvlane.hadamard_block(7) == 0
rotated = kvlane.hadamard(x.copy())
assert np.abs(rotated.reshape(-1, block) - x.reshape(-1, block) @ matrix).max() < 1e-5
plain_caches, rotated_caches = ([np.zeros((1, SEQ, HEADS, DIM), np.float32) for _ in range(2)] for _ in range(2))
kvlane.kv_write(x, x, *plain_caches, positions=[0])
kvlane.kv_write(x, x, *rotated_caches, positions=[0], k_hadamard=block, v_hadamard=2)
assert np.array_equal(rotated_caches[0], rotated)
apart = kvlane.attention(x, *rotated_caches, k_hadamard=block, v_hadamard=2) - kvlane.attention(x, *plain_caches)
assert np.abs(apart).max() < 1e-5

# The whole of the header, with its comments.
functions = [f for name, f in vars(capi).items() if name.startswith("kvl_") and inspect.isfunction(f)]
assert len(functions) >= 60, len(functions)
for function in functions:
    assert "Thread safety" in function.__doc__ and hasattr(capi._library, function.__name__), function.__name__
header = Path(__file__).parents[2] / "include/kvlane.h"
if header.exists():
    declared = set(re.findall(r"^(?:const )?\w+ \*?(kvl_\w+)\(", header.read_text(), re.M))
    assert declared == {f.__name__ for f in functions}, declared ^ {f.__name__ for f in functions}
for name, struct in vars(capi).items():
    if inspect.isclass(struct) and name.startswith("kvl_") and struct._fields_[0][0] == "struct_size":
        assert struct().struct_size > 0, name

# A pool of the parent is none of the child's: the child makes its own.
big = [noise(4, 512, 8, 64) for _ in range(3)]
here = kvlane.attention(*big, causal=True, threads=2)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(here, kvlane.attention(*big, causal=True, threads=2)) else 1)
assert os.waitpid(child, 0)[1] == 0, "threads after fork"

# Arrays of another library, imported last because its threads do not like to fork.
try:
    import jax.numpy as jnp
except ImportError:
    print("jax is not installed: no array of another library")
else:
    for dtype in (np.float32, ml_dtypes.bfloat16):
        step(dtype, like=jnp.asarray)
print(f"kvlane {kvlane.__version__} for Python: {len(functions)} functions, level {kvlane.isa()}")
