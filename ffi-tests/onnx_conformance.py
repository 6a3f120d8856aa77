#!/usr/bin/env python3
"""ONNX's node tests of Attention, RotaryEmbedding and TensorScatter, through the C ABI, at every ISA level of this CPU.

    python3 -m venv target/conformance && . target/conformance/bin/activate
    pip install -r ffi-tests/requirements.txt
    cargo build --release --features capi
    python ffi-tests/onnx_conformance.py

The package onnx makes the cases, inputs and expected outputs: 93 of Attention (opset 23 to 25), 8 of RotaryEmbedding, 3 of
TensorScatter, not counting those that run the same numbers on the expansion of the operator into simpler ones. Every
output of every case is compared with the tolerance of ONNX's own runner; it is a failure if one is not, or if there are
more or fewer cases.

How the operators become calls:
- ONNX's axes are [batch, heads, seq, dim], or [batch, seq, heads * dim] in three dimensions: strides, nothing is copied.
- `past_key` and `past_value`, then K and V, are written to the present caches by kvl_kv_write, and attention reads those.
- A boolean mask is kvl_mask, any other a bias; both are broadcast by strides of 0. Those shorter than the keys are
  padded here, as ONNX says.
- `nonpad_kv_seqlen` is `lengths`. Without it, query 0 stands behind the past: `offsets` is its length.
- kvlane has no output of scores, and needs none. `qk_matmul_output` after the softmax is attention with the identity as
  values. Before it, a score is the LSE of a query that sees one key alone.
- TensorScatter is kvl_kv_write: `positions` where it is linear, `slots` where it is circular.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import kvlane
import numpy as np
import onnx
from kvlane import AttentionParams, Context, RopeParams, WriteParams
from ml_dtypes import bfloat16

COUNTS = {"Attention": 93, "RotaryEmbedding": 8, "TensorScatter": 3}
# Values of qk_matmul_output_mode.
RAW, CAPPED, MASKED, WEIGHTS = range(4)

Attributes = dict[str, Any]
Arrays = dict[str, np.ndarray]


def int32(x: Iterable[int] | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, dtype=np.int32)


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """What a call that writes too little leaves visible."""
    return np.full(shape, np.nan, dtype)


def heads_third(x: np.ndarray, heads: int) -> np.ndarray:
    """[batch, heads, seq, dim] or [batch, seq, heads * dim], seen as [batch, seq, heads, dim]."""
    if x.ndim == 4:
        return x.transpose(0, 2, 1, 3)
    batch, seq, width = x.shape
    return x.reshape(batch, seq, heads, width // heads)


# ---------------------------------------------------------------- Attention


def write_caches(c: Context, pairs: list[tuple[np.ndarray, np.ndarray]], position: int) -> None:
    """Writes new keys, and new values, to the same position of every row of their caches."""
    (k, k_cache), (v, v_cache) = pairs
    positions = int32([position] * len(k))
    views = {"k": k, "v": v, "k_cache": k_cache, "v_cache": v_cache}
    c.write(WriteParams(**{n: kvlane.view(x) for n, x in views.items()}, positions=positions.ctypes.data))


def padded(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A mask of ONNX, [batch, heads, seq, keys] or the last axes of that, seen as [batch, seq, heads, keys]."""
    missing = shape[-1] - mask.shape[-1]
    hidden = False if mask.dtype == np.bool_ else -np.inf
    mask = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, missing)], constant_values=hidden)
    return np.broadcast_to(mask, shape).transpose(0, 2, 1, 3)


def attention(c: Context, x: Arrays, a: Attributes, outputs: set[str]) -> Arrays:
    q = heads_third(x["Q"], a.get("q_num_heads", 0))
    k, v = (heads_third(x[name], a.get("kv_num_heads", 0)) for name in "KV")
    (batch, seq, heads, _), (_, new, kv_heads, dim), v_dim = q.shape, k.shape, v.shape[3]
    past, result = 0, {}
    if "past_key" in x:
        past = x["past_key"].shape[2]
        present = [empty((batch, kv_heads, past + new, n), t.dtype) for n, t in ((dim, k), (v_dim, v))]
        caches = [p.transpose(0, 2, 1, 3) for p in present]
        pasts = [x[name].transpose(0, 2, 1, 3) for name in ("past_key", "past_value")]
        write_caches(c, list(zip(pasts, caches, strict=True)), 0)
        write_caches(c, list(zip((k, v), caches, strict=True)), past)
        result = dict(zip(("present_key", "present_value"), present, strict=True))
        k, v = caches
    keys = past + new

    params = AttentionParams(q=kvlane.view(q), k=kvlane.view(k), v=kvlane.view(v), softcap=a.get("softcap", 0.0))
    params.scale = a.get("scale", 0.0)
    params.flags = kvlane.CAUSAL if a.get("is_causal") else 0
    # -1 stands for no window.
    for name, flag in (("left", kvlane.WINDOW_LEFT), ("right", kvlane.WINDOW_RIGHT)):
        if (window := a.get(f"{name}_window_size", -1)) != -1:
            params.flags |= flag
            setattr(params, f"window_{name}", window)
    # Whatever a struct points to must live until the call: here, in local variables.
    if "nonpad_kv_seqlen" in x:
        lengths = int32(x["nonpad_kv_seqlen"])
        params.lengths = lengths.ctypes.data
    else:
        offsets = int32([past] * batch)
        params.offsets = offsets.ctypes.data
    visible = None
    if "attn_mask" in x:
        mask = padded(x["attn_mask"], (batch, heads, seq, keys))
        if mask.dtype == np.bool_:
            visible, params.mask = mask, kvlane.mask(mask)
        else:
            params.bias = kvlane.view(mask)

    flat = x["Q"].ndim == 3
    shape = (batch, seq, heads, v_dim) if flat else (batch, heads, seq, v_dim)
    y = empty(shape, q.dtype)
    params.out = kvlane.view(y if flat else y.transpose(0, 2, 1, 3))
    c.attention(params)
    result["Y"] = y.reshape(batch, seq, heads * v_dim) if flat else y
    if "qk_matmul_output" in outputs:
        mode = a.get("qk_matmul_output_mode", RAW)
        if mode == WEIGHTS:
            result["qk_matmul_output"] = weights(c, params, (batch, heads, seq, keys), kv_heads, q.dtype, v.dtype)
        else:
            # The output itself is not of interest there, and must not take the place of this one.
            unused = empty((batch, seq, heads, v_dim), q.dtype)
            params.out = kvlane.view(unused)
            result["qk_matmul_output"] = scores(c, params, (batch, heads, seq, keys), visible, mode).astype(q.dtype)
    return result


def weights(
    c: Context, params: AttentionParams, shape: tuple[int, ...], kv_heads: int, dtype: np.dtype, v_dtype: np.dtype
) -> np.ndarray:
    """What the softmax gives: attention to values of which the j-th is 1 at j and 0 elsewhere."""
    params, out, keys = AttentionParams.from_buffer_copy(params), empty(shape, dtype), shape[-1]
    identity = np.broadcast_to(np.eye(keys, dtype=v_dtype)[None, :, None], (shape[0], keys, kv_heads, keys))
    params.v, params.out = kvlane.view(identity), kvlane.view(out.transpose(0, 2, 1, 3))
    c.attention(params)
    return out


def scores(
    c: Context, params: AttentionParams, shape: tuple[int, ...], visible: np.ndarray | None, mode: int
) -> np.ndarray:
    """What goes into the softmax, up to the step that a mode says: the LSE of each key alone."""
    params = AttentionParams.from_buffer_copy(params)
    batch, heads, seq, keys = shape
    if mode != MASKED:
        visible, params.flags, params.lengths, params.bias = None, 0, None, kvlane.View()
        params.window_left = params.window_right = 0
    if mode == RAW:
        params.softcap = 0.0
    lse, scores = empty((batch, seq, heads), np.float32), empty(shape, np.float32)
    params.lse = lse.ctypes.data
    for key in range(keys):
        alone = np.broadcast_to(np.arange(keys) == key, (batch, seq, heads, keys))
        if visible is not None:
            alone = alone & visible
        params.mask = kvlane.mask(alone)
        c.attention(params)
        scores[..., key] = lse.transpose(0, 2, 1)
    return scores


# ---------------------------------------------------------------- RotaryEmbedding and TensorScatter


def rotary_embedding(c: Context, x: Arrays, a: Attributes, _: set[str]) -> Arrays:
    src = heads_third(x["input"], a.get("num_heads", 0))
    batch, seq, _, dim = src.shape
    # Without positions, the table has a row for every token.
    positions = int32(x.get("position_ids", np.arange(batch * seq)))
    cos, sin = (np.ascontiguousarray(x[f"{name}_cache"], np.float32) for name in ("cos", "sin"))
    y = empty(x["input"].shape, x["input"].dtype)
    params = RopeParams(
        pairing=kvlane.INTERLEAVED if a.get("interleaved") else kvlane.HALF_SPLIT,
        rotary_dim=a.get("rotary_embedding_dim", 0) or dim,
        cos=cos.ctypes.data,
        sin=sin.ctypes.data,
        table_rows=cos.size // cos.shape[-1],
        positions=positions.ctypes.data,
    )
    c.rope(src, heads_third(y, a.get("num_heads", 0)), params)
    return {"output": y}


def tensor_scatter(c: Context, x: Arrays, a: Attributes, _: set[str]) -> Arrays:
    if a.get("axis", -2) != -2:
        raise NotImplementedError(f"axis {a['axis']}")
    past, update, first = x["past_cache"], x["update"], x["write_indices"]
    # Three axes are one head.
    as_heads = (lambda t: t.transpose(0, 2, 1, 3)) if past.ndim == 4 else (lambda t: t[:, :, None])
    # Keys and values are the same here, but each has a cache.
    present = [past.copy(), past.copy()]
    k_cache, v_cache = map(as_heads, present)
    new = as_heads(update)
    batch, seq, capacity = len(new), new.shape[1], k_cache.shape[1]
    params = WriteParams(k=kvlane.view(new), v=kvlane.view(new))
    params.k_cache, params.v_cache = kvlane.view(k_cache), kvlane.view(v_cache)
    if a.get("mode", "linear") == "linear":
        positions = int32(first)
        params.positions = positions.ctypes.data
    else:
        slots = int32((first.reshape(batch, 1) + np.arange(seq)) % capacity)
        params.slots = slots.ctypes.data
    c.write(params)
    if not np.array_equal(*present):
        raise AssertionError("the same keys and values, but different caches")
    return {"present_cache": present[0]}


OPERATORS: dict[str, Callable[[Context, Arrays, Attributes, set[str]], Arrays]] = {
    "Attention": attention,
    "RotaryEmbedding": rotary_embedding,
    "TensorScatter": tensor_scatter,
}


# ---------------------------------------------------------------- the cases


def collect() -> list[Any]:
    with warnings.catch_warnings():
        # Making the cases of all other operators overflows and divides by zero, as they mean to.
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    starts = ("test_attention", "test_rotary", "test_tensorscatter")
    return [case for case in cases if case.name.startswith(starts) and not case.name.endswith("_expanded")]


def tolerance(case: Any, dtype: np.dtype) -> tuple[float, float]:
    """Of ONNX's runner, which compares bfloat16 to within two units."""
    return (max(case.rtol, 2**-6) if dtype == bfloat16 else case.rtol), case.atol


def run(c: Context, case: Any) -> str:
    """What is wrong with a case; nothing if it passes."""
    (node,) = case.model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    attributes = {name: v.decode() if isinstance(v, bytes) else v for name, v in attributes.items()}
    given, wanted = ([name for name in names if name] for names in (node.input, node.output))
    wrong = []
    for inputs, expected in case.data_sets:
        arrays = {name: np.asarray(x) for name, x in zip(given, inputs, strict=True)}
        got = OPERATORS[node.op_type](c, arrays, attributes, set(wanted))
        for name, want in zip(wanted, expected, strict=True):
            if name not in got:
                wrong.append(f"{name} has not been computed")
                continue
            x = got[name]
            if (x.shape, x.dtype) != (want.shape, want.dtype):
                wrong.append(f"{name} is {x.dtype}{x.shape}, not {want.dtype}{want.shape}")
                continue
            rtol, atol = tolerance(case, want.dtype)
            x, want = x.astype(np.float64), want.astype(np.float64)
            ok = np.isclose(x, want, rtol=rtol, atol=atol, equal_nan=True)
            if not ok.all():
                at = tuple(int(i) for i in np.argwhere(~ok)[0])
                wrong.append(f"{name}{list(at)} is {x[at]}, not {want[at]} ({(~ok).sum()} of {ok.size} are wrong)")
    return "; ".join(wrong)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=kvlane.LIBRARY, help="libkvlane.so (default: %(default)s)")
    parser.add_argument("--filter", default="", help="only the cases whose name contains this")
    options = parser.parse_args()

    cases = collect()
    counts = Counter(case.model.graph.node[0].op_type for case in cases)
    failures = [f"{counts[op]} cases of {op}, not {n}" for op, n in COUNTS.items() if counts[op] != n]
    failures += [f"{n} cases of {op}, which is not known" for op, n in counts.items() if op not in COUNTS]
    contexts = [Context(options.library, isa) for isa in kvlane.levels(options.library)]
    names = [c.isa for c in contexts]
    required = os.environ.get("KVLANE_REQUIRE_ISA", "scalar").split(",")
    failures += [f"level {name} is required, but there are only {names}" for name in required if name not in names]
    selected = [case for case in cases if options.filter in case.name]
    for case in selected:
        wrong = {}
        for c in contexts:
            try:
                wrong[c.isa] = run(c, case)
            except (kvlane.Error, ArithmeticError, AssertionError, KeyError, NotImplementedError, ValueError) as error:
                wrong[c.isa] = f"{type(error).__name__}: {error}"
        bad = [f"{isa}: {sentence}" for isa, sentence in wrong.items() if sentence]
        print(f"{'FAIL' if bad else 'pass'} {case.name}", *bad, sep="\n     ")
        failures += [f"{case.name} at {sentence}" for sentence in bad]
    total = ", ".join(f"{n} of {op}" for op, n in sorted(counts.items()))
    print(f"onnx {onnx.__version__}: {total}; {len(selected)} run at each of the levels {', '.join(names)}")
    print(*failures, f"{len(failures)} failures", sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
