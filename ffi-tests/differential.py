#!/usr/bin/env python3
"""Random attention through the C ABI against two implementations that share nothing with it: PyTorch's and ggml's.

    python3 -m venv target/peers && . target/peers/bin/activate
    pip install --no-deps -r benches/peers/requirements.txt
    cargo build --release --features capi
    python ffi-tests/differential.py --cases 2000 --seed 7

A case has random shapes, layouts and types, and any of: lengths, kv_starts, offsets, causal, windows, a boolean mask, a bias,
ALiBi, softcap, sink logits, a scale. kvlane gets them as they are; the others get one mask that says the same, since that is what
they understand. What one of them cannot express is skipped for it, counted and named. It fails if a difference is above its
limit; the seed and the number of the case are printed, and `--only NUMBER` runs that case alone.

| family | what is compared | limit, as a fraction of the largest value of V |
| --- | --- | --- |
| PyTorch f64 | scaled_dot_product_attention in f64 on the same rounded inputs | the error that kvlane's kernel states |
| PyTorch f32, f16, bf16 | the same in the type of the cache, which PyTorch may round in between | 1e-5, 4e-3, 1e-2 |
| ggml f32, f16, bf16 | ggml_flash_attn_ext, f32 queries; it sums values of f16 in f16 | 1e-4, 6e-3, 1.5e-2 |

The rounding of kvlane's own output comes on top of each. Limits grow with ALiBi's part of the logits above 32, as those of
the library's tests do with logits: in f32 a logit of 1000 is rounded by 3e-5, and so are the weights that come of it.
"""

from __future__ import annotations

import argparse
import ctypes as C
import importlib.util
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import kvlane
import numpy as np
import torch
from kvlane import AttentionParams, Context
from ml_dtypes import bfloat16

NAMES = {np.dtype(np.float32): "f32", np.dtype(np.float16): "f16", np.dtype(bfloat16): "bf16"}
TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Half a unit in the last place of 1.
ROUNDING = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
LIMITS = {
    "PyTorch": {"f32": 1e-5, "f16": 4e-3, "bf16": 1e-2},
    "ggml": {"f32": 1e-4, "f16": 6e-3, "bf16": 1.5e-2},
}


class Skip(Exception):
    """Why a case is not for an implementation."""


@dataclass
class Case:
    """Arrays are [batch, seq, heads, dim], scores [batch, seq, heads, keys]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    out_type: np.dtype
    scale: float | None
    softcap: float
    causal: bool
    left: int | None
    right: int | None
    lengths: np.ndarray | None
    kv_starts: np.ndarray | None
    offsets: np.ndarray | None
    mask: np.ndarray | None
    bias: np.ndarray | None
    max_bias: float
    sink_logits: np.ndarray | None

    @staticmethod
    def random(r: np.random.Generator) -> Case:
        def chance(p: float) -> bool:
            return bool(r.random() < p)

        batch, kv_heads, group = (int(r.integers(1, n)) for n in (4, 4, 6))
        heads = kv_heads * group
        seq = int(r.choice([1, 1, int(r.integers(1, 20)), int(r.integers(20, 90))]))
        keys = int(r.choice([int(r.integers(1, 40)), int(r.integers(40, 300)), int(r.integers(1000, 1300))]))
        dims = [8, 16, 32, 40, 64, 80, 96, 128, int(r.integers(1, 257))]
        dim = int(r.choice(dims))
        v_dim = dim if chance(0.6) else int(r.choice(dims))
        kv, q_type, out_type = (kvlane.DTYPES[int(r.integers(3))] for _ in range(3))

        def normals(dtype: np.dtype, *shape: int) -> np.ndarray:
            # In memory as BSHD or as BHSD.
            if chance(0.5):
                return r.standard_normal(shape, dtype=np.float32).astype(dtype)
            b, s, h, d = shape
            return r.standard_normal((b, h, s, d), dtype=np.float32).astype(dtype).transpose(0, 2, 1, 3)

        # The same for all rows or all heads, or not.
        scores = (batch if chance(0.5) else 1, seq, heads if chance(0.5) else 1, keys)
        whole = (batch, seq, heads, keys)
        mask = bias = None
        if chance(0.3):
            mask = np.broadcast_to(r.random(scores) < r.choice([0.1, 0.5, 0.9]), whole)
        if chance(0.3):
            # ggml knows no other type, and bfloat16 would be one more rounding for it.
            bias = r.standard_normal(scores, dtype=np.float32).astype(np.float16)
            bias[r.random(scores) < 0.1] = -np.inf
            bias = np.broadcast_to(bias, whole)
        lengths = r.integers(0, keys + 1, batch, dtype=np.int32) if chance(0.5) else None
        return Case(
            q=normals(q_type, batch, seq, heads, dim),
            k=normals(kv, batch, keys, kv_heads, dim),
            v=normals(kv, batch, keys, kv_heads, v_dim),
            out_type=out_type,
            scale=float(np.float32(r.uniform(0.01, 0.5))) if chance(0.3) else None,
            softcap=float(np.float32(r.uniform(1, 50))) if chance(0.3) else 0.0,
            causal=chance(0.5),
            left=int(r.integers(0, keys)) if chance(0.2) else None,
            right=int(r.integers(0, keys)) if chance(0.2) else None,
            lengths=lengths,
            kv_starts=r.integers(0, keys // 2 + 1, batch, dtype=np.int32) if chance(0.2) else None,
            offsets=r.integers(-5, keys, batch, dtype=np.int32) if chance(0.3) else None,
            mask=mask,
            bias=bias,
            max_bias=float(r.choice([8.0, 4.0])) if chance(0.2) else 0.0,
            sink_logits=r.standard_normal(heads, dtype=np.float32) if chance(0.2) else None,
        )

    @property
    def kv(self) -> str:
        return NAMES[self.k.dtype]

    @cached_property
    def distance(self) -> np.ndarray:
        """[batch, seq, 1, keys]: how far a key is ahead of its query."""
        (batch, seq), keys = self.q.shape[:2], self.k.shape[1]
        lengths = np.full(batch, keys) if self.lengths is None else self.lengths
        offsets = lengths - seq if self.offsets is None else self.offsets
        position = offsets[:, None] + np.arange(seq)
        return (np.arange(keys) - position[:, :, None])[:, :, None]

    @cached_property
    def visible(self) -> np.ndarray:
        (batch, seq, heads, _), keys = self.q.shape, self.k.shape[1]
        seen, key, ahead = np.ones((batch, seq, heads, keys), dtype=bool), np.arange(keys), self.distance
        if self.causal:
            seen &= ahead <= 0
        if self.left is not None:
            seen &= -ahead <= self.left
        if self.right is not None:
            seen &= ahead <= self.right
        if self.lengths is not None:
            seen &= key < self.lengths[:, None, None, None]
        if self.kv_starts is not None:
            seen &= key >= self.kv_starts[:, None, None, None]
        if self.mask is not None:
            seen &= self.mask
        if self.bias is not None:
            seen &= self.bias != -np.inf
        return seen

    @cached_property
    def slopes(self) -> np.ndarray:
        """As the paper and ggml have them."""
        heads = self.q.shape[2]
        n = 2 ** int(math.log2(heads))
        exponents = [-(h + 1) / n if h < n else -(2 * (h - n) + 1) / (2 * n) for h in range(heads)]
        return np.array([2.0 ** (self.max_bias * e) for e in exponents], dtype=np.float32)

    @cached_property
    def condition(self) -> float:
        """How much more than usual rounding matters."""
        if not self.max_bias:
            return 1.0
        alibi = np.where(self.visible, np.abs(self.slopes[:, None] * self.distance), 0)
        return max(1.0, float(alibi.max(initial=0)) / 32)

    def run(self, c: Context) -> np.ndarray:
        batch, seq, heads, _ = self.q.shape
        out = np.full((batch, seq, heads, self.v.shape[3]), np.nan, dtype=self.out_type)
        params = AttentionParams(out=kvlane.view(out), softcap=self.softcap, scale=self.scale or 0.0)
        params.q, params.k, params.v = (kvlane.view(x) for x in (self.q, self.k, self.v))
        params.flags = kvlane.CAUSAL if self.causal else 0
        if self.left is not None:
            params.flags, params.window_left = params.flags | kvlane.WINDOW_LEFT, self.left
        if self.right is not None:
            params.flags, params.window_right = params.flags | kvlane.WINDOW_RIGHT, self.right
        for name in ("lengths", "kv_starts", "offsets", "sink_logits"):
            if (x := getattr(self, name)) is not None:
                setattr(params, name, x.ctypes.data)
        if self.max_bias:
            params.alibi_slopes = self.slopes.ctypes.data
        if self.mask is not None:
            params.mask = kvlane.mask(self.mask)
        if self.bias is not None:
            params.bias = kvlane.view(self.bias)
        c.attention(params)
        return out.astype(np.float64)


def heads_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 1, 3))


def tensor(x: np.ndarray) -> torch.Tensor:
    if x.dtype == bfloat16:
        return torch.from_numpy(heads_first(x).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(heads_first(x))


def pytorch(case: Case, dtype: torch.dtype) -> np.ndarray:
    if case.softcap:
        raise Skip("scaled_dot_product_attention has no softcap")
    if case.sink_logits is not None:
        raise Skip("scaled_dot_product_attention has no sink logits")
    added = None
    if case.bias is not None:
        added = case.bias.astype(np.float64)
    if case.max_bias:
        added = (0 if added is None else added) + case.slopes[:, None].astype(np.float64) * case.distance
    if added is None:
        mask = torch.from_numpy(heads_first(case.visible))
    else:
        mask = torch.from_numpy(heads_first(np.where(case.visible, added, -np.inf)))
        if dtype in (torch.float16, torch.bfloat16) and not torch.equal(mask.to(dtype).double(), mask):
            raise Skip("the mask has to be of the type of the queries, where this bias would be another")
        mask = mask.to(dtype)
    q, k, v = (tensor(x).to(dtype) for x in (case.q, case.k, case.v))
    gqa = q.shape[1] != k.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=case.scale, enable_gqa=gqa)
    return out.double().numpy().transpose(0, 2, 1, 3)


class Ggml:
    """The libraries inside the package llama-cpp-python."""

    codes = {"f32": 0, "f16": 1, "bf16": 30}

    class Init(C.Structure):
        _fields_ = (("size", C.c_size_t), ("buffer", C.c_void_p), ("no_alloc", C.c_bool))

    class Plan(C.Structure):
        """The beginning of ggml_cplan, and room for what newer versions add to it."""

        _fields_ = (("work_size", C.c_size_t), ("work_data", C.c_void_p), ("rest", C.c_char * 256))

    class PoolParams(C.Structure):
        """ggml_threadpool_params, which is only handed on, and room for what newer versions add to it."""

        _fields_ = (("rest", C.c_char * 1024),)

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("No module named 'llama_cpp'")
        directory = Path(spec.origin).with_name("lib")
        self.base = C.CDLL(str(directory / "libggml-base.so"), mode=C.RTLD_GLOBAL)
        self.cpu = C.CDLL(str(directory / "libggml-cpu.so"), mode=C.RTLD_GLOBAL)
        pointer = C.c_void_p
        for library, name, result, arguments in (
            (self.base, "ggml_init", pointer, [self.Init]),
            (self.base, "ggml_free", None, [pointer]),
            (self.base, "ggml_tensor_overhead", C.c_size_t, []),
            (self.base, "ggml_graph_overhead", C.c_size_t, []),
            (self.base, "ggml_new_tensor_4d", pointer, [pointer, C.c_int] + [C.c_int64] * 4),
            (self.base, "ggml_flash_attn_ext", pointer, [pointer] * 5 + [C.c_float] * 3),
            (self.base, "ggml_flash_attn_ext_add_sinks", None, [pointer] * 2),
            (self.base, "ggml_new_graph", pointer, [pointer]),
            (self.base, "ggml_build_forward_expand", None, [pointer, pointer]),
            (self.base, "ggml_get_data", pointer, [pointer]),
            (self.base, "ggml_nbytes", C.c_size_t, [pointer]),
            (self.base, "ggml_threadpool_params_default", self.PoolParams, [C.c_int]),
            (self.cpu, "ggml_threadpool_new", pointer, [pointer]),
            (self.cpu, "ggml_graph_plan", self.Plan, [pointer, C.c_int, pointer]),
            (self.cpu, "ggml_graph_compute", C.c_int, [pointer, pointer]),
        ):
            f = getattr(library, name)
            f.restype, f.argtypes = result, arguments
        self.cpu.ggml_cpu_init()
        self.pool = self.cpu.ggml_threadpool_new(C.byref(self.base.ggml_threadpool_params_default(1)))

    def __call__(self, case: Case) -> np.ndarray:
        if case.max_bias and case.bias is not None:
            raise Skip("flash_attn_ext multiplies the mask by the slope, so it has no bias beside ALiBi")
        if case.max_bias and np.abs(case.distance[case.visible.any(axis=2, keepdims=True)]).max(initial=0) > 2048:
            raise Skip("distances above 2048 are rounded in flash_attn_ext's mask, which is f16")
        (batch, seq, heads, dim), (_, keys, kv_heads, v_dim) = case.q.shape, case.v.shape
        added: Any = 0 if case.bias is None else case.bias
        if case.max_bias:
            added = case.distance
        mask = heads_first(np.where(case.visible, added, -np.inf).astype(np.float16))
        q, k, v = (heads_first(x) for x in (case.q.astype(np.float32), case.k, case.v))
        inputs = [q, k, v, mask] + ([] if case.sink_logits is None else [case.sink_logits])
        b, room = self.base, 4 * batch * seq * heads * v_dim + sum(x.nbytes for x in inputs)
        room += 16 * (b.ggml_tensor_overhead() + 256) + b.ggml_graph_overhead()
        buffer = kvlane.aligned(room)
        context = b.ggml_init(self.Init(room, buffer.ctypes.data, False))

        def tensor(type_: str, x: np.ndarray, *shape: int) -> int:
            t = b.ggml_new_tensor_4d(context, self.codes[type_], *shape)
            if b.ggml_nbytes(t) != x.nbytes:
                raise RuntimeError(f"ggml needs {b.ggml_nbytes(t)} bytes for {shape}, not {x.nbytes}")
            C.memmove(b.ggml_get_data(t), x.ctypes.data, x.nbytes)
            return t

        try:
            out = b.ggml_flash_attn_ext(
                context,
                tensor("f32", q, dim, seq, heads, batch),
                tensor(case.kv, k, dim, keys, kv_heads, batch),
                tensor(case.kv, v, v_dim, keys, kv_heads, batch),
                tensor("f16", mask, keys, seq, heads, batch),
                dim**-0.5 if case.scale is None else case.scale,
                case.max_bias,
                case.softcap,
            )
            if case.sink_logits is not None:
                b.ggml_flash_attn_ext_add_sinks(out, tensor("f32", case.sink_logits, heads, 1, 1, 1))
            graph = b.ggml_new_graph(context)
            b.ggml_build_forward_expand(graph, out)
            plan = self.cpu.ggml_graph_plan(graph, 1, self.pool)
            work = kvlane.aligned(plan.work_size + 64)
            plan.work_data = work.ctypes.data
            if (status := self.cpu.ggml_graph_compute(graph, C.byref(plan))) != 0:
                raise RuntimeError(f"ggml_graph_compute: {status}")
            size = batch * seq * heads * v_dim
            x = np.ctypeslib.as_array(C.cast(b.ggml_get_data(out), C.POINTER(C.c_float)), (size,))
            return x.reshape(batch, seq, heads, v_dim).astype(np.float64)
        finally:
            b.ggml_free(context)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=kvlane.LIBRARY, help="libkvlane.so (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, help="the number of a case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    contexts = [Context(options.library, isa) for isa in kvlane.levels(options.library)]
    print(f"seed {options.seed}: {options.cases} cases, each on one of the levels {', '.join(c.isa for c in contexts)}")

    ggml = Ggml()
    families = {
        "PyTorch f64": lambda case: pytorch(case, torch.float64),
        "PyTorch": lambda case: pytorch(case, TORCH[case.kv]),
        "ggml": ggml,
    }
    # Family and type of the cache -> how many were compared, the largest error, and its largest share of the limit.
    compared: Counter[str] = Counter()
    largest: defaultdict[str, float] = defaultdict(float)
    nearest: defaultdict[str, float] = defaultdict(float)
    skipped: Counter[tuple[str, str]] = Counter()
    failures = []
    for number in range(options.cases) if options.only is None else [options.only]:
        case = Case.random(np.random.default_rng([options.seed, number]))
        context = contexts[number % len(contexts)]
        got = case.run(context)
        unit = float(np.abs(case.v.astype(np.float64)).max())
        for name, reference in families.items():
            try:
                want = reference(case)
            except Skip as reason:
                skipped[name, str(reason)] += 1
                continue
            stated = name not in LIMITS
            limit = context.attention_error(case.k.dtype) if stated else LIMITS[name][case.kv]
            limit *= case.condition
            rounding = ROUNDING[NAMES[case.out_type]] * np.abs(want)
            error = np.maximum(np.abs(got - want) - rounding, 0) / unit
            # A NaN on one side alone is the largest error there is.
            worst = float(np.where(np.isnan(error), math.inf, error).max(initial=0))
            key = f"{name} over {case.kv}" if stated else f"{name} {case.kv}"
            compared[key] += 1
            largest[key], nearest[key] = max(largest[key], worst), max(nearest[key], worst / limit)
            if worst > limit:
                failures.append(f"case {number} at {context.isa}, {key}: {worst:.3g} of the largest V, limit {limit:.3g}")

    print(f"{'family':24} {'compared':>8} {'largest error':>14} {'of the limit':>13}")
    for key in sorted(compared):
        print(f"{key:24} {compared[key]:8} {largest[key]:14.3g} {nearest[key]:12.1%}")
    for (name, reason), n in sorted(skipped.items()):
        print(f"skipped for {name}, {n} cases: {reason}")
    print(*failures, f"{len(failures)} failures", sep="\n")
    return 1 if failures or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
