"""Attention over a key/value cache for CPUs.

Arrays are those of numpy, or of anything with DLPack (torch, jax, bfloat16 included), with the axes [batch, seq, heads, dim] in any order
in memory. `attention`, `kv_write` and `rope` are one call each; `kvlane.capi` has the whole C library, generated from its header. A call
that the library refuses raises `Error`, with a sentence that names the argument, and has written nothing. `kvlane.torch` has operators of
PyTorch and `kvlane.hf` attention for models of Hugging Face; they import what they need, which this module does not.

    k_cache, v_cache = (numpy.zeros((2, 64, 2, 32), numpy.float16) for _ in range(2))
    lengths = numpy.zeros(2, numpy.int32)
    kvlane.kv_write(k, v, k_cache, v_cache, positions=lengths)
    lengths += k.shape[1]
    out = kvlane.attention(q, k_cache, v_cache, lengths=lengths, causal=True)

Calls release Python's lock, and may be made from several threads. `threads` runs a call on a pool of the process, which a forked child
replaces by one of its own.
"""

from __future__ import annotations

import ctypes as C
import functools
import os
from typing import Any

import numpy as np

from . import capi
from ._base import Array, Error

__all__ = ["Error", "attention", "capi", "hadamard", "hadamard_block", "isa", "kv_write", "rope", "rope_frequencies"]
__version__ = capi.kvl_version_string()


@functools.cache
def _context() -> C.c_void_p:
    handle = C.c_void_p()
    capi.kvl_context_create(None, handle)
    return handle


def isa() -> str:
    """The level whose kernels are used on this CPU, such as "avx2"."""
    level = C.c_int32()
    capi.kvl_context_isa(_context(), level)
    return capi.kvl_isa_name(level.value)


@functools.cache
def _pool(process: int, threads: int) -> capi.kvl_parallel_runner:
    handle, runner = C.c_void_p(), capi.kvl_parallel_runner()
    capi.kvl_thread_pool_create(threads, handle)
    capi.kvl_thread_pool_runner(handle, runner)
    return runner


def _runner(threads: int) -> capi.kvl_parallel_runner | None:
    if threads < 1:
        raise ValueError(f"threads is {threads}; 1 is the calling thread")
    return None if threads == 1 else _pool(os.getpid(), threads)


def _counted(fields: dict[str, Any], names: tuple[str, ...], sequences: int) -> None:
    """The library cannot see how long a list is."""
    for name in names:
        if fields.get(name) is not None:
            n = len(fields[name])
            if n != sequences:
                raise ValueError(f"{name} has {n} entries for {sequences} sequences")


def attention(q: Any, k: Any, v: Any, *, out: Any = None, causal: bool = False, window_left: int | None = None,
              window_right: int | None = None, threads: int = 1, **fields: Any) -> Any:
    """Softmax attention of queries [batch, seq, heads, dim] over keys and values [batch, slots, kv_heads, dim]; returns `out`, a new
    array of float32 if none is given. The other fields are those of `capi.kvl_attention_params`: lengths, kv_starts, offsets, mask,
    bias, scale, softcap, alibi_slopes, sink_logits, lse, layout, scales, k_hadamard, v_hadamard and so on. With a layout, lists are as
    long as its sequences."""
    shape, v_shape = Array(q, "q").shape, Array(v, "v").shape
    if out is None and len(shape) == len(v_shape) == 4:
        out = np.empty((*shape[:3], v_shape[3]), np.float32)
    flags = causal * capi.KVL_ATTENTION_FLAG_CAUSAL
    if window_left is not None:
        flags |= capi.KVL_ATTENTION_FLAG_WINDOW_LEFT
    if window_right is not None:
        flags |= capi.KVL_ATTENTION_FLAG_WINDOW_RIGHT
    params = capi.kvl_attention_params(q=q, k=k, v=v, out=out, flags=flags, window_left=window_left or 0,
                                       window_right=window_right or 0, **fields)
    if fields.get("cu_seqlens_q") is None:
        _counted(fields, ("lengths", "kv_starts", "offsets", "prefix_lengths"), shape[0])
    _counted(fields, ("alibi_slopes", "sink_logits"), shape[2])
    runner, size = _runner(threads), C.c_size_t()
    capi.kvl_attention_workspace_size(params, runner, size)
    room = np.empty(size.value + 63, np.uint8)
    workspace = room[-room.ctypes.data % 64 :][: size.value]
    capi.kvl_attention(_context(), runner, workspace, size.value, params)
    return out


def kv_write(k: Any, v: Any, k_cache: Any, v_cache: Any, *, threads: int = 1, **fields: Any) -> None:
    """Writes new keys and values [batch, seq, kv_heads, dim] into caches [batch, slots, kv_heads, dim]. The other fields are those of
    `capi.kvl_kv_write_params`: positions, counts, sequences, slots, rope, k_norm, layout, scales, k_hadamard, v_hadamard and so on."""
    params = capi.kvl_kv_write_params(k=k, v=v, k_cache=k_cache, v_cache=v_cache, **fields)
    _counted(fields, ("positions", "counts", "sequences"), params.k.shape[0])
    capi.kvl_kv_write(_context(), _runner(threads), params)


def hadamard_block(dim: int) -> int:
    """The block of the Hadamard rotation of a head of `dim` elements: the largest power of two that divides it, at most 512; 0 if it is
    odd."""
    block = C.c_int64()
    capi.kvl_hadamard_block(dim, block)
    return block.value


def hadamard(x: Any, block: int = 0, *, out: Any = None, threads: int = 1) -> Any:
    """Rotates heads [batch, seq, heads, dim] by a normalised Walsh-Hadamard matrix, in blocks of `block` elements, or the largest that a
    head has. Twice is not at all. In place unless `out` is given; returns what was written."""
    to = x if out is None else out
    capi.kvl_hadamard(_context(), _runner(threads), x, to, block or hadamard_block(Array(x, "x").shape[3]))
    return to


def rope_frequencies(rotary_dim: int, base: float = 10000.0, **fields: Any) -> tuple[np.ndarray, float]:
    """Inverse frequencies, and the factor on cosines and sines. The other fields are those of `capi.kvl_rope_frequencies_params`."""
    inv_freq, magnitude = np.empty(rotary_dim // 2, np.float64), C.c_double()
    capi.kvl_rope_frequencies(capi.kvl_rope_frequencies_params(rotary_dim=rotary_dim, base=base, **fields), inv_freq, len(inv_freq), magnitude)
    return inv_freq, magnitude.value


def rope(x: Any, inv_freq: np.ndarray, offsets: Any, *, out: Any = None, interleaved: bool = False, threads: int = 1,
         **fields: Any) -> Any:
    """Rotates heads [batch, seq, heads, dim]; `offsets` are the positions of the first tokens, one per sequence. In place unless `out` is
    given; returns what was written. The other fields are those of `capi.kvl_rope_params`."""
    to = x if out is None else out
    params = capi.kvl_rope_params(pairing=capi.KVL_PAIRING_INTERLEAVED if interleaved else capi.KVL_PAIRING_HALF_SPLIT,
                                  rotary_dim=2 * len(inv_freq), inv_freq=inv_freq, offsets=offsets, **fields)
    _counted({"offsets": offsets}, ("offsets",), Array(x, "x").shape[0])
    capi.kvl_rope(_context(), _runner(threads), x, to, params)
    return to
