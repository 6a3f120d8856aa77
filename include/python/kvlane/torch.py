"""Operators of PyTorch: attention over a cache, the cache write, and rotary embedding, for tensors on the CPU.

Tensors have the axes [batch, seq, heads, dim], in any order in memory: those of PyTorch's own attention, [batch, heads, seq, dim], are
given as `x.transpose(1, 2)`, which copies nothing. Types are float32, float16 and bfloat16, each with each; caches may also be int8,
float8_e4m3fn and float8_e5m2, with scales, or blocks of ggml. Lists are int32 tensors, which are never converted from another type.

    k_cache, v_cache = (torch.zeros(2, 64, 2, 32, dtype=torch.bfloat16) for _ in range(2))
    lengths = torch.zeros(2, dtype=torch.int32)
    kvlane.torch.kv_write(k, v, k_cache, v_cache, positions=lengths)
    lengths += k.shape[1]
    out = kvlane.torch.attention(q, k_cache, v_cache, lengths=lengths, causal=True)

The scales of a cache are float32 or float16, and every call on the cache is given the same ones (`k_scales`, `v_scales`). An element is
what is stored times its scale:

- int8: [batch, slots, kv_heads], a scale per token and head, which `kv_write` computes and writes; of pages [pages, page_size, kv_heads].
- float8_e4m3fn, float8_e5m2: one element, for the tensor, or [kv_heads]; static scales, which no call writes. They are 1 if absent.

Blocks have their scales inside: the cache is uint8, the bytes of a head along its last axis, and every call on it is given the name of the
format (`k_format`, `v_format`): q8_0, of 34 bytes for 32 elements, q4_0 (18), q4_1 (20), q5_0 (22), q5_1 (24), iq4_nl (18).

They are `torch.ops.kvlane.attention` and so on, with fake kernels, so that `torch.compile` and `torch.export` take them as they are.
`threads` is the number of threads, 0 for `torch.get_num_threads()`; no bit of a result depends on it. A call that the library refuses
raises `kvlane.Error`, and has written nothing.

None has a gradient. Attention and `rope` of tensors that require one give their values, and raise in the backward pass; the cache write
is not recorded, and a cache that requires a gradient is an error.
"""

from __future__ import annotations

import ctypes as C
import struct
import threading
from typing import Any

import torch
from torch import Tensor

from . import _context, _runner, capi
from ._base import LIBRARY, check

__all__ = ["attention", "attention_with_lse", "kv_write", "rope", "rope_"]

_FORMATS = {
    torch.float32: capi.KVL_FORMAT_F32,
    torch.float16: capi.KVL_FORMAT_F16,
    torch.bfloat16: capi.KVL_FORMAT_BF16,
    torch.int8: capi.KVL_FORMAT_INT8,
    torch.float8_e4m3fn: capi.KVL_FORMAT_FP8_E4M3,
    torch.float8_e5m2: capi.KVL_FORMAT_FP8_E5M2,
}
# Formats of blocks of 32 elements, and the bytes of a block.
_BLOCK_ELEMENTS = 32
_BLOCKS = {
    "q8_0": (capi.KVL_FORMAT_Q8_0, 34),
    "q4_0": (capi.KVL_FORMAT_Q4_0, 18),
    "q4_1": (capi.KVL_FORMAT_Q4_1, 20),
    "q5_0": (capi.KVL_FORMAT_Q5_0, 22),
    "q5_1": (capi.KVL_FORMAT_Q5_1, 24),
    "iq4_nl": (capi.KVL_FORMAT_IQ4_NL, 18),
}
_STATIC_SCALES = (torch.float8_e4m3fn, torch.float8_e5m2)
# A view and a mask of the header. A decoder makes two calls per layer and token, so they are written at once, and not field by field.
_VIEW = struct.Struct("@Pii4q4qN")
_MASK = struct.Struct("@P4q4qN")
assert _VIEW.size == C.sizeof(capi.kvl_view) == C.sizeof(capi.kvl_const_view) and _MASK.size == C.sizeof(capi.kvl_mask)


def _setters(kind: type) -> dict:
    return {name: vars(kind)[name].__set__ for name, *_ in kind._fields_}


_ATTENTION, _WRITE, _READ, _ROPE, _LAYOUT, _NORM, _SCALES = map(_setters, (
    capi.kvl_attention_params, capi.kvl_kv_write_params, capi.kvl_kv_read_params, capi.kvl_rope_params, capi.kvl_layout,
    capi.kvl_rms_norm_params, capi.kvl_cache_scales))
_Q, _K, _V, _OUT, _MASK_AT, _BIAS = (getattr(capi.kvl_attention_params, name).offset for name in ("q", "k", "v", "out", "mask", "bias"))
_NEW_K, _NEW_V, _K_CACHE, _V_CACHE = (getattr(capi.kvl_kv_write_params, name).offset for name in ("k", "v", "k_cache", "v_cache"))


def _new(kind: type, setters: dict) -> C.Structure:
    """As `kind()`, in a third of the time."""
    params = kind.__new__(kind)
    setters["struct_size"](params, C.sizeof(kind))
    return params


def _block_bytes(format: str, name: str) -> tuple[int, int]:
    if format not in _BLOCKS:
        raise ValueError(f"{name[0]}_format is {format!r}, which is none of {', '.join(_BLOCKS)}")
    return _BLOCKS[format]


def _dim(x: Tensor, format: str | None, name: str) -> int:
    """The elements of a head."""
    return x.shape[3] if format is None else x.shape[3] // _block_bytes(format, name)[1] * _BLOCK_ELEMENTS


def _fill(into: C.Structure, offset: int, x: Tensor, name: str, heads_first: bool = False, format: str | None = None) -> None:
    shape, strides = x.shape, x.stride()
    if len(shape) != 4:
        raise TypeError(f"{name} has {len(shape)} axes, not the 4 of [batch, seq, heads, dim]")
    (batch, seq, heads, dim), (per_batch, per_token, per_head, step) = shape, strides
    if format is None:
        kind = _FORMATS.get(x.dtype)
        if kind is None:
            raise TypeError(f"{name} is {x.dtype}, which is none of {', '.join(map(str, _FORMATS))}")
    else:
        kind, unit = _block_bytes(format, name)
        if x.dtype != torch.uint8:
            raise TypeError(f"{name} is {x.dtype}, but a cache in {format} is torch.uint8")
        if dim % unit or (dim > 1 and step != 1) or any(n > 1 and s % unit for n, s in zip(shape[:3], strides)):
            raise ValueError(f"{name} has the shape {tuple(shape)} and the strides {strides}, but a block of {format} is {unit} bytes that "
                             "lie together")
        dim, step = dim // unit * _BLOCK_ELEMENTS, 1
        per_batch, per_token, per_head = per_batch // unit, per_token // unit, per_head // unit
    if heads_first:
        seq, heads, per_token, per_head = heads, seq, per_head, per_token
    _VIEW.pack_into(into, offset, x.data_ptr(), kind, 0, batch, seq, heads, dim, per_batch, per_token, per_head, step, 0)


def _view(x: Tensor, name: str) -> capi.kvl_view:
    view = capi.kvl_view()
    _fill(view, 0, x, name)
    return view


def _fill_scales(into: C.Structure, offset: int, x: Tensor | None, name: str, cache: Tensor, heads_first: bool) -> None:
    if x is None:
        return
    if x.dtype not in (torch.float32, torch.float16):
        raise TypeError(f"{name} is {x.dtype}, but scales are torch.float32 or torch.float16")
    if x.device.type != "cpu":
        raise TypeError(f"{name} is on {x.device}; the library reads memory of the CPU")
    shape, heads = tuple(x.shape), cache.shape[1 if heads_first else 2]
    if cache.dtype not in _STATIC_SCALES:
        if shape != tuple(cache.shape[:3]):
            raise ValueError(f"{name} has the shape {shape}, but a cache in {cache.dtype} needs {tuple(cache.shape[:3])}")
        strides = x.stride()
    elif x.numel() == 1:
        strides = (0, 0, 0)
    elif shape == (heads,):
        strides = (0, 0, x.stride(0))
    else:
        raise ValueError(f"{name} has the shape {shape}, but a cache in {cache.dtype} needs one element or {(heads,)}")
    (batch, seq, heads), (per_batch, per_token, per_head) = cache.shape[:3], strides
    if heads_first:
        seq, heads = heads, seq
        if x.dim() == 3:
            per_token, per_head = per_head, per_token
    _VIEW.pack_into(into, offset, x.data_ptr(), _FORMATS[x.dtype], 0, batch, seq, heads, 1, per_batch, per_token, per_head, 1, 0)


def _scales(k: Tensor, v: Tensor | None, k_scales: Tensor | None, v_scales: Tensor | None,
            heads_first: bool) -> capi.kvl_cache_scales | None:
    if k_scales is None and v_scales is None:
        return None
    scales = _new(capi.kvl_cache_scales, _SCALES)
    _fill_scales(scales, capi.kvl_cache_scales.k.offset, k_scales, "k_scales", k, heads_first)
    _fill_scales(scales, capi.kvl_cache_scales.v.offset, v_scales, "v_scales", v, heads_first)
    return scales


def _list(x: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> int | None:
    """The address of a list, of which the library cannot see how long it is."""
    if x is None:
        return None
    if x.dtype != dtype:
        raise TypeError(f"{name} is {x.dtype}, but the library has {dtype} there; convert it")
    if x.device.type != "cpu":
        raise TypeError(f"{name} is on {x.device}; the library reads memory of the CPU")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has the shape {tuple(x.shape)}, but {shape} is needed")
    if not x.is_contiguous():
        raise TypeError(f"{name} is a list with gaps: its elements must lie one behind the other")
    return x.data_ptr()


def _paged(table: Tensor | None) -> capi.kvl_layout:
    """The layout of pages; without a table, that of a write by slots."""
    layout = capi.kvl_layout()
    _LAYOUT["kind"](layout, capi.KVL_LAYOUT_KIND_PAGED)
    if table is not None:
        if table.dim() != 2:
            raise TypeError(f"block_table has {table.dim()} axes, not the 2 of [sequences, pages]")
        _LAYOUT["table"](layout, _list(table, "block_table", tuple(table.shape)))
        _LAYOUT["num_sequences"](layout, table.shape[0])
        _LAYOUT["pages_per_sequence"](layout, table.shape[1])
    return layout


def _threads(threads: int) -> capi.kvl_parallel_runner | None:
    return _runner(threads or torch.get_num_threads())


class _Workspace(threading.local):
    """Scratch memory of a thread, kept between its calls."""

    def __init__(self) -> None:
        self.grow(1 << 16)

    def grow(self, size: int) -> None:
        self.room = torch.empty(size + 63, dtype=torch.uint8, device="cpu")
        self.address, self.size = self.room.data_ptr() + 63 & ~63, size


_workspace = _Workspace()
_size_of_workspace, _attend, _write, _read, _rotate = (
    LIBRARY.kvl_attention_workspace_size, LIBRARY.kvl_attention, LIBRARY.kvl_kv_write, LIBRARY.kvl_kv_read, LIBRARY.kvl_rope)


# Between two layers of a decoder its weights push everything out of the CPU's caches, so that every call of PyTorch here, and every
# function of Python, takes several times as long as in a loop of its own.
def _run_attention(q, k, v, *, lengths=None, kv_starts=None, offsets=None, mask=None, bias=None, scale=None, softcap=0.0, causal=False,
                   window_left=None, window_right=None, prefix_lengths=None, alibi_slopes=None, sink_logits=None, block_table=None,
                   cu_seqlens_q=None, k_scales=None, v_scales=None, k_format=None, v_format=None, high_precision=False, threads=0,
                   with_lse=False, heads_first=False):
    """With `heads_first`, queries, the cache and its scales are [batch, heads, seq, dim]."""
    params, put = _new(capi.kvl_attention_params, _ATTENTION), _ATTENTION
    _fill(params, _Q, q, "q", heads_first)
    _fill(params, _K, k, "k", heads_first, k_format)
    _fill(params, _V, v, "v", heads_first, v_format)
    batch, seq, heads = q.shape[:3]
    if heads_first:
        seq, heads = heads, seq
    out = q.new_empty((batch, seq, heads, _dim(v, v_format, "v")))
    _fill(params, _OUT, out, "out")
    if cu_seqlens_q is not None:
        batch = max(cu_seqlens_q.numel() - 1, 0)
        put["cu_seqlens_q"](params, _list(cu_seqlens_q, "cu_seqlens_q", (batch + 1,)))
        put["num_sequences"](params, batch)
    if lengths is not None:
        put["lengths"](params, _list(lengths, "lengths", (batch,)))
    if kv_starts is not None:
        put["kv_starts"](params, _list(kv_starts, "kv_starts", (batch,)))
    if offsets is not None:
        put["offsets"](params, _list(offsets, "offsets", (batch,)))
    if prefix_lengths is not None:
        put["prefix_lengths"](params, _list(prefix_lengths, "prefix_lengths", (batch,)))
    if alibi_slopes is not None:
        put["alibi_slopes"](params, _list(alibi_slopes, "alibi_slopes", (heads,), torch.float32))
    if sink_logits is not None:
        put["sink_logits"](params, _list(sink_logits, "sink_logits", (heads,), torch.float32))
    if mask is not None:
        if mask.dtype != torch.bool or mask.dim() != 4:
            raise TypeError(f"mask is {mask.dtype} with {mask.dim()} axes, not torch.bool with the 4 of [batch, seq, heads, keys]")
        _MASK.pack_into(params, _MASK_AT, mask.data_ptr(), *mask.shape, *mask.stride(), 0)
    if bias is not None:
        _fill(params, _BIAS, bias, "bias")
    if scale is not None:
        put["scale"](params, scale)
    put["softcap"](params, softcap)
    flags = causal * capi.KVL_ATTENTION_FLAG_CAUSAL
    if window_left is not None:
        flags |= capi.KVL_ATTENTION_FLAG_WINDOW_LEFT
        put["window_left"](params, window_left)
    if window_right is not None:
        flags |= capi.KVL_ATTENTION_FLAG_WINDOW_RIGHT
        put["window_right"](params, window_right)
    put["flags"](params, flags)
    if high_precision:
        put["precision"](params, capi.KVL_PRECISION_HIGH)
    if block_table is not None:
        layout = _paged(block_table)
        put["layout"](params, C.addressof(layout))
    scales = _scales(k, v, k_scales, v_scales, heads_first)
    if scales is not None:
        put["scales"](params, C.addressof(scales))
    lse = None
    if with_lse:
        lse = q.new_empty((*q.shape[:3],), dtype=torch.float32)
        put["lse"](params, lse.data_ptr())
    runner, workspace, at = _threads(threads), _workspace, C.addressof(params)
    runner = None if runner is None else C.addressof(runner)
    status = _attend(_context(), runner, workspace.address, workspace.size, at)
    if status == capi.KVL_STATUS_WORKSPACE:
        # Nothing has been written.
        size = C.c_size_t()
        check(_size_of_workspace(at, runner, C.byref(size)))
        workspace.grow(size.value)
        status = _attend(_context(), runner, workspace.address, workspace.size, at)
    if status:
        check(status)
    return (out, lse) if with_lse else out


def _attention_impl(q, k, v, **options):
    return _run_attention(q, k, v, **options)


def _attention_with_lse_impl(q, k, v, **options):
    return _run_attention(q, k, v, with_lse=True, **options)


def _attention_fake(q, k, v, **options):
    torch._check(q.dim() == k.dim() == v.dim() == 4, lambda: "q, k and v have the 4 axes of [batch, seq, heads, dim]")
    return q.new_empty((*q.shape[:3], _dim(v, options.get("v_format"), "v")))


def _attention_with_lse_fake(q, k, v, **options):
    return _attention_fake(q, k, v), q.new_empty(q.shape[:3], dtype=torch.float32)


def _rotation(inv_freq, positions, batch, seq, interleaved, magnitude) -> capi.kvl_rope_params:
    params, put = capi.kvl_rope_params(), _ROPE
    put["pairing"](params, capi.KVL_PAIRING_INTERLEAVED if interleaved else capi.KVL_PAIRING_HALF_SPLIT)
    put["rotary_dim"](params, 2 * inv_freq.numel())
    put["inv_freq"](params, _list(inv_freq, "inv_freq", (inv_freq.numel(),), torch.float64))
    put["magnitude"](params, magnitude)
    if positions.dim() == 1:
        put["offsets"](params, _list(positions, "positions", (batch,)))
    else:
        put["positions"](params, _list(positions, "positions", (batch, seq)))
    return params


def _kv_write_impl(k, v, k_cache, v_cache, *, positions=None, counts=None, sequences=None, slots=None, block_table=None, paged=False,
                   inv_freq=None, rope_positions=None, interleaved=False, magnitude=1.0, k_norm=None, k_norm_eps=1e-6, k_scales=None,
                   v_scales=None, k_format=None, v_format=None, threads=0, position=None, heads_first=False):
    """`position`, a number, is that of all sequences; with `heads_first`, the new tokens, the cache and its scales are [batch, heads, seq,
    dim]."""
    params, put = _new(capi.kvl_kv_write_params, _WRITE), _WRITE
    _fill(params, _NEW_K, k, "k", heads_first)
    _fill(params, _NEW_V, v, "v", heads_first)
    _fill(params, _K_CACHE, k_cache, "k_cache", heads_first, k_format)
    _fill(params, _V_CACHE, v_cache, "v_cache", heads_first, v_format)
    batch, seq = k.shape[0], k.shape[2 if heads_first else 1]
    if position is not None:
        place = (C.c_int32 * batch)(*batch * (position,))
        put["positions"](params, C.addressof(place))
    if positions is not None:
        put["positions"](params, _list(positions, "positions", (batch,)))
    if counts is not None:
        put["counts"](params, _list(counts, "counts", (batch,)))
    if sequences is not None:
        put["sequences"](params, _list(sequences, "sequences", (batch,)))
    if slots is not None:
        put["slots"](params, _list(slots, "slots", (batch, seq)))
    if paged or block_table is not None:
        layout = _paged(block_table)
        put["layout"](params, C.addressof(layout))
    if inv_freq is not None:
        if rope_positions is None:
            rope_positions = positions
        if rope_positions is None:
            raise ValueError("rope_positions is needed to rotate keys that are written by slots")
        rotation = _rotation(inv_freq, rope_positions, batch, seq, interleaved, magnitude)
        put["rope"](params, C.addressof(rotation))
    if k_norm is not None:
        norm = capi.kvl_rms_norm_params()
        _NORM["weight"](norm, _list(k_norm, "k_norm", (k.shape[3],), torch.float32))
        _NORM["eps"](norm, k_norm_eps)
        put["k_norm"](params, C.addressof(norm))
    scales = _scales(k_cache, v_cache, k_scales, v_scales, heads_first)
    if scales is not None:
        put["scales"](params, C.addressof(scales))
    runner = _threads(threads)
    status = _write(_context(), None if runner is None else C.addressof(runner), C.addressof(params))
    if status:
        check(status)


def _kv_write_fake(k, v, k_cache, v_cache, **options):
    torch._check(k.dim() == v.dim() == k_cache.dim() == v_cache.dim() == 4,
                 lambda: "k, v and the caches have the 4 axes of [batch, seq, heads, dim]")


def _numbers(cache: Tensor, scales: Tensor | None, format: str | None, dtype: torch.dtype) -> Tensor:
    """The elements of a cache [batch, heads, seq, dim]."""
    out = torch.empty((*cache.shape[:3], _dim(cache, format, "k")), dtype=dtype, device="cpu")
    params = _new(capi.kvl_kv_read_params, _READ)
    _fill(params, capi.kvl_kv_read_params.k_cache.offset, cache, "k_cache", True, format)
    _fill(params, capi.kvl_kv_read_params.k.offset, out, "k", True)
    place = (C.c_int32 * cache.shape[0])()
    _READ["positions"](params, C.addressof(place))
    described = _scales(cache, None, scales, None, True)
    if described is not None:
        _READ["scales"](params, C.addressof(described))
    runner = _threads(0)
    check(_read(_context(), None if runner is None else C.addressof(runner), C.addressof(params)))
    return out


def _rotate_into(x, out, inv_freq, positions, interleaved, magnitude, threads):
    source, target = _view(x, "x"), _view(out, "out")
    params = _rotation(inv_freq, positions, *x.shape[:2], interleaved, magnitude)
    runner = _threads(threads)
    check(_rotate(_context(), None if runner is None else C.addressof(runner), C.addressof(source), C.addressof(target), C.addressof(params)))


def _rope_impl(x, inv_freq, positions, *, interleaved=False, magnitude=1.0, threads=0):
    out = x.new_empty(x.shape)
    _rotate_into(x, out, inv_freq, positions, interleaved, magnitude, threads)
    return out


def _rope_fake(x, inv_freq, positions, **options):
    return x.new_empty(x.shape)


def _rope_in_place_impl(x, inv_freq, positions, *, interleaved=False, magnitude=1.0, threads=0):
    _rotate_into(x, x, inv_freq, positions, interleaved, magnitude, threads)


_OPTIONS = ("Tensor? lengths=None, Tensor? kv_starts=None, Tensor? offsets=None, Tensor? mask=None, Tensor? bias=None, float? scale=None, "
            "float softcap=0.0, bool causal=False, SymInt? window_left=None, SymInt? window_right=None, Tensor? prefix_lengths=None, "
            "Tensor? alibi_slopes=None, Tensor? sink_logits=None, Tensor? block_table=None, Tensor? cu_seqlens_q=None, "
            "Tensor? k_scales=None, Tensor? v_scales=None, str? k_format=None, str? v_format=None, bool high_precision=False, int threads=0")
_TURN = "Tensor inv_freq, Tensor positions, *, bool interleaved=False, float magnitude=1.0, int threads=0"

_operators = torch.library.Library("kvlane", "DEF")


def _define(schema: str, implementation, fake) -> torch._ops.OpOverload:
    name = schema.partition("(")[0]
    _operators.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _operators.impl(name, implementation, "CPU")
    torch.library.register_fake(f"kvlane::{name}", fake, lib=_operators)
    return getattr(torch.ops.kvlane, name).default


class _WithoutGradient(torch.autograd.Function):
    """The values of an operator, and an error in the backward pass."""

    @staticmethod
    def forward(ctx, operator, tensors, options, *all_tensors):
        ctx.name = operator._schema.name
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*tensors, **options)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(f"{ctx.name} has no gradient; call it under torch.no_grad() or on detached tensors")


def _without_gradient(operator) -> None:
    def call(*tensors, **options):
        if torch.is_grad_enabled():
            every = [x for x in (*tensors, *options.values()) if isinstance(x, Tensor)]
            if any(x.requires_grad for x in every):
                return _WithoutGradient.apply(operator, tensors, options, *every)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*tensors, **options)

    _operators.impl(operator._schema.name.partition("::")[2], call, "Autograd")


def _untracked(operator) -> None:
    """A write into what requires a gradient would be lost to it."""
    name = operator._schema.name
    written = [(i, argument.name, argument.kwarg_only) for i, argument in enumerate(operator._schema.arguments)
               if argument.alias_info is not None and argument.alias_info.is_write]

    def call(*tensors, **options):
        if torch.is_grad_enabled():
            for i, argument, is_option in written:
                x = options.get(argument) if is_option else tensors[i]
                if x is not None and x.requires_grad:
                    raise RuntimeError(f"{name} writes {argument}, which requires a gradient; call it under torch.no_grad()")
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*tensors, **options)

    _operators.impl(name.partition("::")[2], call, "Autograd")


_attention = _define(f"attention(Tensor q, Tensor k, Tensor v, *, {_OPTIONS}) -> Tensor", _attention_impl, _attention_fake)
_attention_with_lse = _define(f"attention_with_lse(Tensor q, Tensor k, Tensor v, *, {_OPTIONS}) -> (Tensor, Tensor)",
                              _attention_with_lse_impl, _attention_with_lse_fake)
_kv_write = _define(
    "kv_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, *, Tensor? positions=None, Tensor? counts=None, "
    "Tensor? sequences=None, Tensor? slots=None, Tensor? block_table=None, bool paged=False, Tensor? inv_freq=None, "
    "Tensor? rope_positions=None, bool interleaved=False, float magnitude=1.0, Tensor? k_norm=None, float k_norm_eps=1e-06, "
    "Tensor(c!)? k_scales=None, Tensor(d!)? v_scales=None, str? k_format=None, str? v_format=None, int threads=0) -> ()",
    _kv_write_impl, _kv_write_fake)
_rope = _define(f"rope(Tensor x, {_TURN}) -> Tensor", _rope_impl, _rope_fake)
_rope_in_place = _define(f"rope_(Tensor(a!) x, {_TURN}) -> ()", _rope_in_place_impl, lambda x, inv_freq, positions, **options: None)
for _operator in (_attention, _attention_with_lse, _rope):
    _without_gradient(_operator)
for _operator in (_kv_write, _rope_in_place):
    _untracked(_operator)


def _plain(*tensors: Tensor) -> bool:
    """Whether nothing but values is wanted. The dispatcher takes longer over a call with many arguments than the call itself may take,
    so that it is passed by then."""
    # Where a graph is traced otherwise, a mode of the dispatcher or another type of tensor tells.
    if torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
        return False
    for x in tensors:
        if type(x) is not Tensor or not x.is_cpu:
            return False
    return True


def _written(*tensors: Tensor) -> None:
    """Tells PyTorch, which the dispatcher would have told, so that a backward pass that needs the former values notices."""
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Softmax attention of queries [batch, seq, heads, dim] over keys and values [batch, slots, kv_heads, dim]. Query head h reads KV
    head `h // (heads // kv_heads)`. Returns a new tensor [batch, seq, heads, v_dim] of the type of `q`.

    Query i of a sequence of n keys stands at position `n - seq + i`, or at `offsets[b] + i`. Options:

    - `lengths`, `kv_starts`, `offsets`, `prefix_lengths`: int32 [batch], the valid keys, the first of them, the position of query 0, and
      how many keys are visible whatever causality and windows say.
    - `causal`; `window_left`, `window_right`: keys before and after the query's own that are visible.
    - `mask`: bool [batch, seq, heads, keys], true for what is visible; `bias`: numbers of that shape that are added to logits. Axes of
      one entry broadcast.
    - `scale`, by default `dim ** -0.5`; `softcap`; `alibi_slopes` and `sink_logits`: float32 [heads].
    - `block_table`: int32 [batch, pages]; keys and values are then pages [pages, page_size, kv_heads, dim], and `lengths` is needed.
    - `k_scales`, `v_scales`, `k_format`, `v_format`: the scales of the cache, or the names of its blocks, see the module.
    - `cu_seqlens_q`: int32 [sequences + 1]; queries are then [1, tokens, heads, dim], and lists have an entry per sequence.
    - `high_precision`: see `KVL_PRECISION_HIGH`. `threads`."""
    return (_attention_impl if _plain(q, k, v) else _attention)(q, k, v, **options)


def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """As `attention`, and the logarithm of the sum of the exponentials of the logits, float32 [batch, seq, heads]."""
    return (_attention_with_lse_impl if _plain(q, k, v) else _attention_with_lse)(q, k, v, **options)


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, **options: Any) -> None:
    """Writes new keys and values [batch, seq, kv_heads, dim] into caches [batch, slots, kv_heads, dim], of types of their own. Options:

    - `positions`: int32 [batch], the slot of the first token of a sequence; or `slots`: int32 [batch, seq], that of every token, -1 for
      none.
    - `counts`: int32 [batch], how many tokens of a sequence are written; `sequences`: int32 [batch], its sequence of the cache.
    - `block_table`: int32 [sequences, pages]; caches are then pages [pages, page_size, kv_heads, dim]. With `slots`, which count over
      all pages, `paged=True` stands for it.
    - `inv_freq`: float64 [rotary_dim / 2], rotates keys on the way, at `positions` or at `rope_positions`, int32 [batch] or [batch, seq];
      `interleaved`, `magnitude`.
    - `k_norm`: float32 [dim], the weights of an RMS norm of the keys, before the rotation; `k_norm_eps`. `threads`.
    - `k_scales`, `v_scales`, `k_format`, `v_format`: as of `attention`; scales of int8 are written."""
    if _plain(k, v, k_cache, v_cache):
        _kv_write_impl(k, v, k_cache, v_cache, **options)
        of_tokens = ((k_cache, options.get("k_scales")), (v_cache, options.get("v_scales")))
        _written(k_cache, v_cache, *(x for cache, x in of_tokens if x is not None and cache.dtype not in _STATIC_SCALES))
    else:
        _kv_write(k, v, k_cache, v_cache, **options)


def rope(x: Tensor, inv_freq: Tensor, positions: Tensor, **options: Any) -> Tensor:
    """Rotates heads [batch, seq, heads, dim] into a new tensor. `inv_freq`: float64 [rotary_dim / 2], radians per position, as of
    `kvlane.rope_frequencies`. `positions`: int32 [batch], of the first tokens, or [batch, seq], of all. Options: `interleaved`,
    `magnitude`, `threads`."""
    return (_rope_impl if _plain(x, inv_freq, positions) else _rope)(x, inv_freq, positions, **options)


def rope_(x: Tensor, inv_freq: Tensor, positions: Tensor, **options: Any) -> None:
    """As `rope`, in place."""
    if _plain(x, inv_freq, positions):
        _rope_in_place_impl(x, inv_freq, positions, **options)
        _written(x)
    else:
        _rope_in_place(x, inv_freq, positions, **options)
