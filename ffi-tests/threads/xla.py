#!/usr/bin/env python3
"""Attention on the threads of XLA: compiles xla.cpp against the library installed in PREFIX, calls it from JAX under jit, and
compares with the calling thread to the bit, and with JAX's own attention.

    xla.py PREFIX WORK

XLA gives threads only if it has more than one CPU; then tasks have to reach them.
"""
import ctypes
import os
import pathlib
import subprocess
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
import jax
import jax.numpy as jnp
import numpy as np

prefix, work = map(pathlib.Path, sys.argv[1:])
here = pathlib.Path(__file__).parent
library = work / "xla_attention.so"
subprocess.run(
    ["c++", "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{prefix}/include", "-isystem", jax.ffi.include_dir(), here / "xla.cpp",
     f"{prefix}/lib/libkvlane.a", "-Wl,--exclude-libs,libkvlane.a", "-lpthread", "-ldl", "-lm", "-o", library], check=True)
handler = ctypes.CDLL(str(library)).kvlane_attention
jax.ffi.register_ffi_target("kvlane_attention", jax.ffi.pycapsule(handler), platform="cpu")


def attention(q, k, v, lengths, alone):
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((1,), np.int32))
    return jax.ffi.ffi_call("kvlane_attention", results)(q, k, v, lengths, alone=alone)


call = jax.jit(attention, static_argnums=4)
rng = np.random.default_rng(1)
for seq in (1, 64):
    batch, heads, kv_heads, dim, capacity = 4, 8, 2, 64, 2048
    q = jnp.asarray(rng.standard_normal((batch, seq, heads, dim), np.float32))
    k, v = (jnp.asarray(rng.standard_normal((batch, capacity, kv_heads, dim), np.float32)) for _ in range(2))
    lengths = jnp.asarray([2048, 700, 1500, 64], jnp.int32)
    (threads, scheduled), (alone, none) = call(q, k, v, lengths, False), call(q, k, v, lengths, True)
    assert np.array_equal(np.asarray(threads).view(np.uint32), np.asarray(alone).view(np.uint32)), "other bits"
    assert none[0] == 0 and (scheduled[0] > 0 or os.cpu_count() == 1), f"{scheduled[0]} tasks on XLA's threads"
    rows = lengths[:, None] - seq + jnp.arange(seq)[None]
    mask = jnp.arange(capacity)[None, None] <= rows[..., None]
    wanted = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
    error = float(jnp.abs(wanted - alone).max())
    assert error < 1e-5, error
    print(f"XLA, {seq} queries per sequence: the bits of one thread, {scheduled[0]} tasks scheduled, {error:.1e} from JAX's attention")
try:
    call(q[..., :32], k, v, lengths, False)[0].block_until_ready()
    sys.exit("a wrong shape is no error")
except jax.errors.JaxRuntimeError as error:
    assert "32" in str(error) and "64" in str(error), error
