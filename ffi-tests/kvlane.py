"""kvlane.h for numpy: the structs and functions that the scripts beside this file call, through ctypes.

Arrays have the axes of the library, [batch, seq, heads, dim], in any order in memory: a transposed array is a view with
other strides. bfloat16 is the type of the package ml_dtypes.
"""

from __future__ import annotations

import ctypes as C
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16, float8_e4m3fn, float8_e5m2

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "libkvlane.so"

DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(bfloat16))
# The formats of caches: the element types, and units of a byte.
FORMATS = (*DTYPES, np.dtype(np.int8), np.dtype(float8_e4m3fn), np.dtype(float8_e5m2))
INTERLEAVED, HALF_SPLIT = 0, 1
CAUSAL, WINDOW_LEFT, WINDOW_RIGHT = 1, 2, 4
ISA_BEST = 0
OP_ATTENTION = 4
CONTIGUOUS, RING, PAGED, INDIRECT, RAGGED = range(5)


class View(C.Structure):
    """kvl_view and kvl_const_view, which differ in C only."""

    _fields_ = (
        ("data", C.c_void_p),
        ("dtype", C.c_int32),
        ("reserved", C.c_int32),
        ("shape", C.c_int64 * 4),
        ("strides", C.c_int64 * 4),
        ("bytes", C.c_size_t),
    )


class Mask(C.Structure):
    _fields_ = (
        ("data", C.c_void_p),
        ("shape", C.c_int64 * 4),
        ("strides", C.c_int64 * 4),
        ("bytes", C.c_size_t),
    )


class Sized(C.Structure):
    """A struct that begins with its size; everything that is not given is zero."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(C.sizeof(self), **fields)


class ContextParams(Sized):
    _fields_ = (("struct_size", C.c_size_t), ("max_isa", C.c_int32), ("reserved", C.c_int32))


class KernelInfo(Sized):
    _fields_ = (
        ("struct_size", C.c_size_t),
        ("name", C.c_char_p),
        ("op", C.c_int32),
        ("src", C.c_int32),
        ("dst", C.c_int32),
        ("isa", C.c_int32),
        ("available", C.c_int32),
        ("max_error", C.c_float),
    )


class RopeParams(Sized):
    _fields_ = (
        ("struct_size", C.c_size_t),
        ("pairing", C.c_int32),
        ("reserved", C.c_int32),
        ("rotary_dim", C.c_int64),
        ("inv_freq", C.c_void_p),
        ("magnitude", C.c_double),
        ("cos", C.c_void_p),
        ("sin", C.c_void_p),
        ("table_rows", C.c_int64),
        ("offsets", C.c_void_p),
        ("positions", C.c_void_p),
        ("k_hadamard", C.c_int64),
    )


class RmsNormParams(Sized):
    _fields_ = (
        ("struct_size", C.c_size_t),
        ("weight", C.c_void_p),
        ("eps", C.c_float),
        ("reserved", C.c_int32),
    )


class Layout(Sized):
    _fields_ = (
        ("struct_size", C.c_size_t),
        ("kind", C.c_int32),
        ("sink_tokens", C.c_int32),
        ("num_sequences", C.c_int64),
        ("pages_per_sequence", C.c_int64),
        ("table", C.c_void_p),
    )


class WriteParams(Sized):
    _fields_ = (
        ("struct_size", C.c_size_t),
        ("k", View),
        ("v", View),
        ("k_cache", View),
        ("v_cache", View),
        ("positions", C.c_void_p),
        ("counts", C.c_void_p),
        ("sequences", C.c_void_p),
        ("slots", C.c_void_p),
        ("rope", C.c_void_p),
        ("layout", C.c_void_p),
        ("k_norm", C.c_void_p),
        ("v_packing", C.c_int32),
        ("reserved", C.c_int32),
        ("scales", C.c_void_p),
        ("k_hadamard", C.c_int64),
        ("v_hadamard", C.c_int64),
    )


class AttentionParams(Sized):
    _fields_ = (
        ("struct_size", C.c_size_t),
        ("q", View),
        ("k", View),
        ("v", View),
        ("out", View),
        ("lse", C.c_void_p),
        ("scale", C.c_float),
        ("softcap", C.c_float),
        ("flags", C.c_uint32),
        ("reserved", C.c_int32),
        ("window_left", C.c_int64),
        ("window_right", C.c_int64),
        ("lengths", C.c_void_p),
        ("kv_starts", C.c_void_p),
        ("offsets", C.c_void_p),
        ("mask", Mask),
        ("bias", View),
        ("alibi_slopes", C.c_void_p),
        ("sink_logits", C.c_void_p),
        ("precision", C.c_int32),
        ("reserved2", C.c_int32),
        ("layout", C.c_void_p),
        ("cu_seqlens_q", C.c_void_p),
        ("num_sequences", C.c_int64),
        ("prefix_lengths", C.c_void_p),
        ("bit_mask", C.c_void_p),
        ("plan", C.c_void_p),
        ("v_packing", C.c_int32),
        ("reserved3", C.c_int32),
        ("query_positions", C.c_void_p),
        ("scales", C.c_void_p),
        ("k_hadamard", C.c_int64),
        ("v_hadamard", C.c_int64),
    )


class AttentionState(C.Structure):
    _fields_ = (("out", View), ("lse", C.c_void_p))


class KvLayer(C.Structure):
    _fields_ = (("k", View), ("v", View), ("scales", C.c_void_p))


class Cache(Sized):
    _fields_ = (
        ("struct_size", C.c_size_t),
        ("layers", C.POINTER(KvLayer)),
        ("num_layers", C.c_size_t),
        ("layout", C.c_void_p),
        ("lengths", C.c_void_p),
    )


class Error(Exception):
    """What a call that failed had to say."""


def view(x: np.ndarray) -> View:
    """A view of an array, with the bytes from its first element to its last one."""
    strides = [s // x.itemsize for s in x.strides]
    return View(x.ctypes.data, FORMATS.index(x.dtype), 0, x.shape, tuple(strides), behind(x))


def mask(x: np.ndarray) -> Mask:
    """A view of an array of booleans [batch, seq, heads, keys]."""
    if x.dtype != np.bool_:
        raise TypeError(f"a mask of {x.dtype}")
    return Mask(x.ctypes.data, x.shape, x.strides, behind(x))


def behind(x: np.ndarray) -> int:
    return np.lib.array_utils.byte_bounds(x)[1] - x.ctypes.data


def aligned(size: int) -> np.ndarray:
    """Bytes from an address that is a multiple of 64, as a workspace must be."""
    room = np.empty(size + 63, dtype=np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size]


class Context:
    """A context of one ISA level, and the operations that use it, on the calling thread."""

    def __init__(self, library: Path = LIBRARY, isa: int = ISA_BEST) -> None:
        self.lib = lib = C.CDLL(str(library))
        lib.kvl_isa_name.restype = C.c_char_p
        lib.kvl_kernel_count.restype = C.c_size_t
        lib.kvl_last_error.argtypes = [C.c_void_p, C.c_size_t]
        lib.kvl_context_kernel_name.argtypes = [C.c_void_p, C.c_int32, C.c_int32, C.c_int32, C.c_void_p]
        lib.kvl_kernel_info_at.argtypes = [C.c_size_t, C.c_void_p]
        lib.kvl_attention.argtypes = [C.c_void_p, C.c_void_p, C.c_void_p, C.c_size_t, C.c_void_p]
        lib.kvl_rope.argtypes = [C.c_void_p] * 5
        lib.kvl_kv_write.argtypes = [C.c_void_p] * 3
        lib.kvl_rms_norm.argtypes = [C.c_void_p] * 5
        lib.kvl_merge_states.argtypes = [C.c_void_p, C.c_void_p, C.c_void_p, C.c_size_t, C.c_void_p, C.c_void_p]
        lib.kvl_attention_with_prefix_workspace_size.argtypes = [C.c_void_p] * 4
        lib.kvl_attention_with_prefix.argtypes = [C.c_void_p, C.c_void_p, C.c_void_p, C.c_size_t] + [C.c_void_p] * 4
        lib.kvl_alibi_slopes.argtypes = [C.c_void_p, C.c_int64]
        lib.kvl_cache_reorder_workspace_size.argtypes = [C.c_void_p] * 3
        lib.kvl_cache_reorder.argtypes = [C.c_void_p, C.c_void_p, C.c_void_p, C.c_size_t, C.c_void_p, C.c_void_p]
        lib.kvl_cache_reorder_table_workspace_size.argtypes = [C.c_int64, C.c_int64, C.c_void_p]
        lib.kvl_cache_reorder_table.argtypes = [C.c_void_p, C.c_size_t, C.c_void_p, C.c_int64, C.c_int64] + [
            C.c_void_p
        ] * 2
        lib.kvl_cache_set_table_tokens.argtypes = [C.c_void_p, C.c_int64, C.c_int64, C.c_void_p, C.c_int64]
        lib.kvl_cache_copy_pages.argtypes = [C.c_void_p, C.c_void_p, C.c_void_p, C.c_size_t, C.c_void_p, C.c_size_t]
        lib.kvl_context_destroy.argtypes = [C.c_void_p]
        if (major := lib.kvl_abi_version() >> 16) != 0:
            raise Error(f"{library} has major version {major} of the ABI, this script is written for 0")
        self.handle = C.c_void_p()
        self.check(lib.kvl_context_create(C.byref(ContextParams(max_isa=isa)), C.byref(self.handle)))
        level = C.c_int32()
        self.check(lib.kvl_context_isa(self.handle, C.byref(level)))
        self.isa: str = lib.kvl_isa_name(level).decode()
        if isa not in (ISA_BEST, level.value):
            raise Error(f"asked for level {lib.kvl_isa_name(isa).decode()}, got {self.isa}: is KVLANE_MAX_ISA set?")

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.kvl_context_destroy(self.handle)

    def check(self, status: int) -> None:
        if status != 0:
            sentence = C.create_string_buffer(1024)
            self.lib.kvl_last_error(sentence, len(sentence))
            raise Error(sentence.value.decode())

    def attention_error(self, dtype: np.dtype) -> float:
        """What the registry states of the error of attention over K and V of a type, as a fraction of the largest V."""
        name, code = C.c_char_p(), FORMATS.index(dtype)
        self.check(self.lib.kvl_context_kernel_name(self.handle, OP_ATTENTION, code, code, C.byref(name)))
        for i in range(self.lib.kvl_kernel_count()):
            info = KernelInfo()
            self.check(self.lib.kvl_kernel_info_at(i, C.byref(info)))
            if info.name == name.value:
                return info.max_error
        raise Error(f"the registry lacks {name.value!r}")

    def attention(self, params: AttentionParams) -> None:
        size = C.c_size_t()
        self.check(self.lib.kvl_attention_workspace_size(C.byref(params), None, C.byref(size)))
        workspace = aligned(size.value)
        self.check(self.lib.kvl_attention(self.handle, None, workspace.ctypes.data, size, C.byref(params)))

    def attention_with_prefix(self, k: np.ndarray, v: np.ndarray, params: AttentionParams) -> None:
        """`k` and `v` are [1, tokens, kv_heads, dim], before each sequence's own keys."""
        size, k_view, v_view = C.c_size_t(), view(k), view(v)
        workspace_size = self.lib.kvl_attention_with_prefix_workspace_size
        self.check(workspace_size(C.byref(k_view), C.byref(params), None, C.byref(size)))
        workspace = aligned(size.value)
        call = self.lib.kvl_attention_with_prefix
        tensors = (C.byref(k_view), C.byref(v_view), None, C.byref(params))
        self.check(call(self.handle, None, workspace.ctypes.data, size, *tensors))

    def merge_states(self, states: Sequence[tuple[np.ndarray, np.ndarray]], out: np.ndarray) -> None:
        """`states` are outputs and their LSE."""
        array = (AttentionState * len(states))(*(AttentionState(view(o), lse.ctypes.data) for o, lse in states))
        self.check(self.lib.kvl_merge_states(self.handle, None, array, len(states), C.byref(view(out)), None))

    def rms_norm(self, src: np.ndarray, dst: np.ndarray, params: RmsNormParams) -> None:
        self.check(self.lib.kvl_rms_norm(self.handle, None, C.byref(view(src)), C.byref(view(dst)), C.byref(params)))

    def alibi_slopes(self, heads: int) -> np.ndarray:
        slopes = np.empty(heads, np.float32)
        self.check(self.lib.kvl_alibi_slopes(slopes.ctypes.data, heads))
        return slopes

    def cache_reorder(self, cache: Cache, parents: np.ndarray) -> None:
        size = C.c_size_t()
        self.check(self.lib.kvl_cache_reorder_workspace_size(C.byref(cache), None, C.byref(size)))
        workspace = aligned(size.value)
        call = self.lib.kvl_cache_reorder
        self.check(call(self.handle, None, workspace.ctypes.data, size, C.byref(cache), parents.ctypes.data))

    def cache_reorder_table(self, table: np.ndarray, lengths: np.ndarray, parents: np.ndarray) -> None:
        """`table` is [num_sequences, capacity]."""
        size = C.c_size_t()
        self.check(self.lib.kvl_cache_reorder_table_workspace_size(*table.shape, C.byref(size)))
        workspace, lists = aligned(size.value), (lengths.ctypes.data, parents.ctypes.data)
        call = self.lib.kvl_cache_reorder_table
        self.check(call(workspace.ctypes.data, size, table.ctypes.data, *table.shape, *lists))

    def cache_set_table_tokens(self, table: np.ndarray, positions: np.ndarray, tokens: int) -> None:
        call = self.lib.kvl_cache_set_table_tokens
        self.check(call(table.ctypes.data, *table.shape, positions.ctypes.data, tokens))

    def cache_copy_pages(self, k: np.ndarray, v: np.ndarray, moves: np.ndarray) -> None:
        """`moves` is [n, 2]: from page, to page."""
        layer = KvLayer(view(k), view(v))
        self.check(self.lib.kvl_cache_copy_pages(self.handle, None, C.byref(layer), 1, moves.ctypes.data, len(moves)))

    def rope(self, src: np.ndarray, dst: np.ndarray, params: RopeParams) -> None:
        self.check(self.lib.kvl_rope(self.handle, None, C.byref(view(src)), C.byref(view(dst)), C.byref(params)))

    def write(self, params: WriteParams) -> None:
        self.check(self.lib.kvl_kv_write(self.handle, None, C.byref(params)))


def levels(library: Path = LIBRARY) -> Sequence[int]:
    """The ISA levels that this CPU offers."""
    lib = C.CDLL(str(library))
    lib.kvl_isa_name.restype = C.c_char_p
    found, isa = [], ISA_BEST + 1
    while lib.kvl_isa_name(isa) != b"unknown":
        found += [isa] if lib.kvl_isa_available(isa) else []
        isa += 1
    return found
