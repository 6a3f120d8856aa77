"""Attention and cache for models of Hugging Face transformers, on the CPU.

    kvlane.hf.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="kvlane")
    model.generate(**inputs, cache=kvlane.hf.Cache(model.config))
    model.generate(**inputs, cache=kvlane.hf.Cache(model.config, k_type="int8", v_type="q4_0"))

`register` makes known the attention and the mask function that belongs to it. The latter says which keys are visible by numbers per
sequence (a length, a first key, a position, windows) where these suffice: causal attention with or without a window, and padding at
either end. Any other mask, and every mask of a graph that is being compiled, is the boolean one that `sdpa` is given.

Every cache of transformers serves. `Cache` is one that is written in place by `kvlane.torch.kv_write` and read where it lies; those of
transformers are copied at every token (`DynamicCache`).

Models of transformers run under `torch.no_grad()` when they generate; a backward pass through this attention is an error, and so are
dropout and `output_attentions`, since no weights are ever stored. Errors of the library are `kvlane.Error`.
"""

from __future__ import annotations

import ctypes as C
import math
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import AttentionInterface, AttentionMaskInterface, cache_utils, masking_utils
from transformers.utils.import_utils import is_tracing

from . import capi
from . import torch as operators

__all__ = ["Cache", "attention", "mask", "register"]

# What keys and values are stored as; the blocks of ggml beside.
_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn,
          "fp8_e5m2": torch.float8_e5m2}
# The types that other attention cannot read as they are.
_STORED = {"int8", "fp8_e4m3", "fp8_e5m2", *operators._BLOCKS}
# A window that hides nothing.
_NONE = -1
_HUGE_PAGE = 1 << 21
# Elements of which a write takes longer than waking a thread.
_WORTH_THREADS = 1 << 17


def register(name: str = "kvlane") -> None:
    """Makes `attn_implementation=name` known to transformers, for all models."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def _windows(function: Any) -> tuple[int, int] | None:
    """The keys before and after a query's own that a mask function of transformers shows, -1 for all; none if it does more than that."""
    if function is masking_utils.causal_mask_function:
        return _NONE, 0
    if function is masking_utils.bidirectional_mask_function:
        return _NONE, _NONE

    # The other functions are closures, which only their names tell apart.
    def made_by(maker: Any, part: Any) -> bool:
        return getattr(part, "__qualname__", "").startswith(f"{maker.__name__}.") and part.__module__ == masking_utils.__name__

    def variables(part: Any) -> dict[str, Any]:
        return dict(zip(part.__code__.co_freevars, (cell.cell_contents for cell in part.__closure__ or ())))

    if not made_by(masking_utils.and_masks, function):
        return None
    parts = variables(function).get("mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2:
        return None
    window = variables(parts[0]).get("sliding_window") if hasattr(parts[0], "__code__") else None
    if not isinstance(window, int) or window < 1:
        return None
    if made_by(masking_utils.sliding_window_overlay, parts[0]) and parts[1] is masking_utils.causal_mask_function:
        return window - 1, 0
    if made_by(masking_utils.sliding_window_bidirectional_overlay, parts[0]) and parts[1] is masking_utils.bidirectional_mask_function:
        return window, window
    return None


def mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
         mask_function: Any = masking_utils.causal_mask_function, attention_mask: Tensor | None = None, allow_is_causal_skip: bool = True,
         use_vmap: bool = False, device: Any = "cpu", **rest: Any) -> Tensor | None:
    """The mask function: None if every query sees all keys up to its own and the keys end with the last query's; int32
    [batch, 1, 1, 5], the visibility that `attention` takes; or a boolean mask [batch, 1, seq, keys]."""
    windows = None
    if not (use_vmap or is_tracing(attention_mask if attention_mask is not None else q_offset)):
        windows = _windows(mask_function)
    visibility = None
    if windows is not None and (allow_is_causal_skip or windows[1] != 0):
        visibility = _visibility(batch_size, q_length, kv_length, int(q_offset), kv_offset, windows, attention_mask)
    if visibility is None:
        # What `sdpa` is given, without the shortcuts that only `sdpa` understands.
        return masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, allow_is_causal_skip=False, allow_is_bidirectional_skip=False, use_vmap=use_vmap, device=device)
    ends, starts, offset, left, right = visibility
    if right == 0 and isinstance(ends, int) and ends == kv_length == offset + q_length and (left == _NONE or left >= ends - 1):
        return None
    columns = torch.empty((batch_size, 1, 1, 5), dtype=torch.int32, device=device)
    for i, column in enumerate(visibility):
        columns[:, 0, 0, i] = column
    return columns


def _visibility(batch: int, q_length: int, kv_length: int, q_offset: int, kv_offset: int, windows: tuple[int, int],
                attention_mask: Tensor | None) -> tuple[int | Tensor, int | Tensor, int, int, int] | None:
    """Lengths, first keys, the position of the first query, windows; none if a sequence has padding between its tokens."""
    offset = q_offset - kv_offset
    # A static cache has room for more keys than it holds.
    length = min(offset + q_length, kv_length) if windows[1] == 0 else kv_length
    if attention_mask is not None:
        given = attention_mask[:, kv_offset : kv_offset + length]
        if given.shape[1] < length:
            given = torch.nn.functional.pad(given, (0, length - given.shape[1]))
        if not given.all():
            numbers = given.to(torch.int32)
            shown = numbers.sum(dim=1)
            some = shown > 0
            starts, ends = numbers.argmax(dim=1) * some, (length - numbers.flip(1).argmax(dim=1)) * some
            return (ends, starts, offset, *windows) if torch.equal(ends - starts, shown) else None
    return length, 0, offset, *windows


_OPERATOR = ("attention_by_visibility(Tensor q, Tensor k, Tensor v, Tensor visibility, *, Tensor? bias=None, float? scale=None, "
             "float softcap=0.0, Tensor? sink_logits=None, Tensor? k_scales=None, Tensor? v_scales=None, str? k_format=None, "
             "str? v_format=None, int threads=0) -> Tensor")


def _by_visibility_impl(q: Tensor, k: Tensor, v: Tensor, visibility: Tensor, **options: Any) -> Tensor:
    return operators._run_attention(q, k, v, **_options_of(visibility, q), **options)


def _options_of(visibility: Tensor, q: Tensor) -> dict[str, Any]:
    if visibility.dtype != torch.int32 or visibility.dim() != 4 or visibility.shape[1:] != (1, 1, 5):
        raise TypeError(f"visibility is {visibility.dtype} of the shape {tuple(visibility.shape)}, not int32 [batch, 1, 1, 5]")
    if visibility.shape[0] != q.shape[0]:
        raise ValueError(f"visibility is of {visibility.shape[0]} sequences, but q has {q.shape[0]}")
    ends, starts, offsets = visibility[:, 0, 0, :3].t().contiguous()
    left, right = visibility[0, 0, 0, 3:].tolist()
    return {"lengths": ends, "kv_starts": starts, "offsets": offsets, "causal": right == 0, "window_left": None if left == _NONE else left,
            "window_right": None if right in (_NONE, 0) else right}


_by_visibility = operators._define(_OPERATOR, _by_visibility_impl,
                                   lambda q, k, v, visibility, **options: operators._attention_fake(q, k, v, **options))
operators._without_gradient(_by_visibility)


class _Stored(Tensor):
    """Keys or values [batch, kv_heads, keys, dim] of a quantised cache, as they are stored. `attention` reads them so; all else that is done
    with them is done with their numbers."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, units: Tensor, scales: Tensor | None, format: str | None, dtype: torch.dtype) -> _Stored:
        shape = (*units.shape[:3], operators._dim(units, format, "k"))
        stored = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cpu")
        stored.units, stored.scales, stored.format = units, scales, format
        return stored

    def numbers(self) -> Tensor:
        return operators._numbers(self.units, self.scales, self.format, self.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        args, kwargs = tree_map(lambda x: x.numbers() if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)

    def __repr__(self, **rest: Any) -> str:
        return f"{type(self).__name__}({self.format or self.units.dtype}, {tuple(self.shape)})"


def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
              scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
              position_bias: Tensor | None = None, **rest: Any) -> tuple[Tensor, None]:
    """The attention function: queries [batch, heads, seq, dim], keys and values [batch, kv_heads, keys, dim], nothing of which is copied
    or repeated; returns [batch, seq, heads, dim], and no weights."""
    if dropout:
        raise ValueError(f"dropout is {dropout}, but this attention is for inference; call model.eval()")
    if rest.get("output_attentions"):
        raise ValueError("output_attentions is set, but this attention never stores its weights; use the implementation eager")
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0}
    if type(key) is _Stored:
        options["k_scales"], options["k_format"], key = key.scales, key.format, key.units
    if type(value) is _Stored:
        options["v_scales"], options["v_format"], value = value.scales, value.format, value.units
    if s_aux is not None:
        options["sink_logits"] = s_aux.detach().reshape(-1).float().contiguous()
    if position_bias is not None:
        options["bias"] = position_bias.transpose(1, 2)
    if attention_mask is None:
        # The last query sees the last key.
        options["causal"] = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    elif attention_mask.dtype == torch.int32:
        if not operators._plain(query, key, value, attention_mask):
            return _by_visibility(*_swapped(query, key, value), attention_mask, **_swapped_scales(options)), None
        options |= _options_of(attention_mask, query)
    elif attention_mask.dtype == torch.bool:
        options["mask"] = attention_mask[..., : key.shape[2]].transpose(1, 2)
    else:
        bias = attention_mask[..., : key.shape[2]].transpose(1, 2)
        options["bias"] = bias if position_bias is None else options["bias"] + bias
    if operators._plain(query, key, value):
        return operators._run_attention(query, key, value, heads_first=True, **options), None
    return operators._attention(*_swapped(query, key, value), **_swapped_scales(options)), None


def _swapped(*states: Tensor) -> tuple[Tensor, ...]:
    """[batch, heads, seq, dim] as the operators take them."""
    return tuple(x.transpose(1, 2) for x in states)


def _swapped_scales(options: dict[str, Any]) -> dict[str, Any]:
    scales = {name: options[name].transpose(1, 2) for name in ("k_scales", "v_scales") if options.get(name) is not None}
    return options | scales


class _Layer(cache_utils.CacheLayerMixin):
    """The keys and values of a layer: [batch, kv_heads, capacity, dim] each, of which the first `length` tokens are valid, and scales [batch,
    kv_heads, capacity] of int8. With a sliding window, tokens that no later query sees are dropped when the capacity is used up."""

    is_compileable = False
    is_croppable = True

    def __init__(self, sliding_window: int | None = None, max_length: int = 0, dtype: torch.dtype | None = None, k_type: str | None = None,
                 v_type: str | None = None, **rest: Any) -> None:
        super().__init__()
        self.is_sliding = sliding_window is not None
        if sliding_window is not None:
            self.sliding_window = sliding_window
        self.max_length, self.dtype = max_length, dtype
        self.k_type, self.v_type = k_type, v_type
        self.k_format, self.v_format = (name if name in operators._BLOCKS else None for name in (k_type, v_type))
        self.k_scales = self.v_scales = None
        # `crop` may still ask for as many tokens before the window as were added since it was last called.
        self.record_past, self.recorded = False, 0
        self.dropped = self.length = 0

    def activate_past_recording(self) -> None:
        self.record_past = True

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0] if self.is_initialized else -1

    def _parts(self) -> list[tuple[str, Tensor]]:
        """All memory, [batch, kv_heads, capacity, ...] each."""
        names = ("keys", "values", "k_scales", "v_scales") if self.is_initialized else ()
        return [(name, getattr(self, name)) for name in names if getattr(self, name) is not None]

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for _, states in self._parts())

    @staticmethod
    def _room(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        if size < _HUGE_PAGE:
            return torch.empty(shape, dtype=dtype, device="cpu")
        memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8, device="cpu")
        start = -memory.data_ptr() % _HUGE_PAGE
        memory = memory[start : start + size]
        capi.kvl_advise_huge_pages(memory.data_ptr(), size, C.c_int32())
        return memory.view(dtype).view(shape)

    def _rooms(self, kind: str, shape: tuple[int, int, int, int]) -> tuple[Tensor, Tensor | None]:
        """Memory for keys or values of the type `kind`, and for their scales."""
        *tokens, dim = shape
        if kind in operators._BLOCKS:
            if dim % operators._BLOCK_ELEMENTS:
                raise ValueError(f"a cache in {kind} has blocks of {operators._BLOCK_ELEMENTS} elements, but the model's heads have {dim}")
            return self._room((*tokens, dim // operators._BLOCK_ELEMENTS * operators._BLOCKS[kind][1]), torch.uint8), None
        scales = self._room(tuple(tokens), torch.float32) if kind == "int8" else None
        return self._room(shape, _TYPES.get(kind, self.dtype)), scales

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.device.type != "cpu":
            raise ValueError(f"the keys are on {key_states.device}; this cache is one of the CPU")
        self.dtype = self.dtype or key_states.dtype
        batch, heads, seq, dim = key_states.shape
        capacity = self._capacity(0, seq) if self.is_sliding else max(self.max_length, seq + 256)
        self.keys, self.k_scales = self._rooms(self.k_type, (batch, heads, capacity, dim))
        self.values, self.v_scales = self._rooms(self.v_type, (batch, heads, capacity, value_states.shape[3]))
        self.is_initialized = True

    def _seen(self) -> int:
        """How many of the tokens the next query may see."""
        return min(self.length, self.sliding_window - 1) if self.is_sliding else self.length

    def _capacity(self, kept: int, seq: int) -> int:
        """Of a window: as much again as is kept, so that few copies are made, but no more because of one long prompt."""
        return max(2 * kept + seq + 256, min(2 * self.sliding_window, 2 * seq) + 256)

    def _make_room(self, seq: int) -> None:
        """Room for `seq` more tokens: by dropping what no window reaches, or in other memory."""
        capacity = self.keys.shape[2]
        if self.length + seq <= capacity:
            return
        kept = min(self.length, self._seen() + self.recorded * self.record_past)
        old, start = self._parts(), self.length - kept
        wanted = self._capacity(kept, seq) if self.is_sliding else 2 * (kept + seq)
        # In place, the first of the tokens that are kept must not lie where they go.
        if start < kept or kept + seq > capacity or (self.is_sliding and capacity > 2 * wanted):
            for name, states in old:
                setattr(self, name, self._room((*states.shape[:2], wanted, *states.shape[3:]), states.dtype))
        for name, states in old:
            getattr(self, name)[:, :, :kept] = states[:, :, start : self.length]
        self.dropped, self.length = self.dropped + start, kept

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new tokens, and returns the memory of all that are seen."""
        batch, _, seq, _ = key_states.shape
        if not self.is_initialized or (batch != self.batch_size and self.get_seq_length() == 0):
            self.lazy_initialization(key_states, value_states)
        seen = self._seen()
        self._make_room(seq)
        keys, values, k_scales, v_scales = self.keys, self.values, self.k_scales, self.v_scales
        options = {"k_scales": k_scales, "v_scales": v_scales, "k_format": self.k_format, "v_format": self.v_format,
                   "threads": 1 if key_states.numel() < _WORTH_THREADS else 0}
        if operators._plain(key_states, value_states):
            operators._kv_write_impl(key_states, value_states, keys, values, position=self.length, heads_first=True, **options)
            operators._written(*(x for x in (keys, values, k_scales, v_scales) if x is not None))
        else:
            positions = torch.full((batch,), self.length, dtype=torch.int32, device="cpu")
            operators._kv_write(*_swapped(key_states, value_states, keys, values), positions=positions, **_swapped_scales(options))
        first, total = self.length - seen, seen + seq
        self.length += seq
        self.recorded += seq
        keys, values = keys.narrow(2, first, total), values.narrow(2, first, total)
        if self.k_type in _STORED:
            keys = _Stored(keys, None if k_scales is None else k_scales.narrow(2, first, total), self.k_format, key_states.dtype)
        if self.v_type in _STORED:
            values = _Stored(values, None if v_scales is None else v_scales.narrow(2, first, total), self.v_format, value_states.dtype)
        return keys, values

    def get_seq_length(self) -> int:
        return self.dropped + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        seen = self._seen()
        return seen + query_length, self.get_seq_length() - seen

    def get_max_length(self) -> int:
        return self.sliding_window if self.is_sliding else -1

    def reset(self) -> None:
        self.dropped = self.length = self.recorded = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last `-tokens_to_remove` tokens."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop is given {tokens_to_remove}; the number of tokens to remove is negative there")
        left, total = self.length + tokens_to_remove, self.get_seq_length() + tokens_to_remove
        needed = min(total, self.sliding_window - 1) if self.is_sliding else total
        if left < needed or total < 0:
            raise RuntimeError(f"{-tokens_to_remove} tokens are to be removed, but only {self.length} of {self.get_seq_length()} are held, of "
                               f"which {max(needed, 0)} stay; activate_past_recording makes the cache hold more")
        self.length, self.recorded = left, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes a copy of what sequence `beam_idx[b]` was. What stays where it is is not copied."""
        moved = (beam_idx != torch.arange(len(beam_idx))).nonzero().flatten()
        if self.length and len(moved):
            for _, states in self._parts():
                states = _movable(states)[:, :, : self.length]
                states[moved] = states[beam_idx[moved]]

    def _select(self, rows: Tensor) -> None:
        for name, states in self._parts():
            target = self._room((len(rows), *states.shape[1:]), states.dtype)
            _movable(target)[:, :, : self.length] = _movable(states)[rows, :, : self.length]
            setattr(self, name, target)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size)[indices])


def _movable(states: Tensor) -> Tensor:
    """PyTorch does not index eight-bit floats by lists."""
    return states.view(torch.uint8) if states.dtype in operators._STATIC_SCALES else states


class Cache(transformers.Cache):
    """A cache that is written in place and read where it lies. It grows by doubling from `max_length` tokens on, so that a good guess
    saves copies; layers with a sliding window take at most a few windows. `dtype` is what keys and values are stored as, by default that
    of the model; with another one, only this attention can read it.

    `k_type` and `v_type` name what keys and values are stored as instead: f32, f16, bf16; int8, with a scale per token and head; fp8_e4m3,
    fp8_e5m2; or blocks of ggml, q8_0, q4_0, q4_1, q5_0, q5_1, iq4_nl, for heads of a multiple of 32 elements. One that is not given stays as
    `dtype` says. Other attention than `kvlane` is given the numbers of a quantised cache, all of them at every token.

    It is not for threads that use it at the same time, and neither for compiled models, which take `StaticCache`."""

    def __init__(self, config: transformers.PreTrainedConfig, max_length: int = 0, dtype: torch.dtype | None = None,
                 k_type: str | None = None, v_type: str | None = None) -> None:
        for argument, kind in (("k_type", k_type), ("v_type", v_type)):
            if kind is not None and kind not in _TYPES and kind not in operators._BLOCKS:
                raise ValueError(f"{argument} is {kind!r}, which is none of {', '.join((*_TYPES, *operators._BLOCKS))}")
        kinds, options = cache_utils.get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        served = {"full_attention", "sliding_attention", "chunked_attention", "dummy"}
        if not served.issuperset(kinds):
            raise ValueError(f"the model has layers of the kinds {', '.join(sorted(set(kinds) - served))}; this cache serves attention alone")
        stored = {"max_length": max_length, "dtype": dtype, "k_type": k_type, "v_type": v_type}
        layers = [cache_utils.DummyLayer() if kind == "dummy" else _Layer(**stored, **fields) for kind, fields in zip(kinds, options)]
        super().__init__(layers=layers)

    @property
    def nbytes(self) -> int:
        """The bytes that it takes."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, _Layer))
