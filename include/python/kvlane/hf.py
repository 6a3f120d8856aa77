"""Attention and cache for models of Hugging Face transformers, on the CPU.

    kvlane.hf.register()
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="kvlane")
    model.generate(**inputs, cache=kvlane.hf.Cache(model.config))

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
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, cache_utils, masking_utils
from transformers.utils.import_utils import is_tracing

from . import capi
from . import torch as operators

__all__ = ["Cache", "attention", "mask", "register"]

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
             "float softcap=0.0, Tensor? sink_logits=None, int threads=0) -> Tensor")


def _by_visibility_impl(q: Tensor, k: Tensor, v: Tensor, visibility: Tensor, **options: Any) -> Tensor:
    if visibility.dtype != torch.int32 or visibility.dim() != 4 or visibility.shape[1:] != (1, 1, 5):
        raise TypeError(f"visibility is {visibility.dtype} of the shape {tuple(visibility.shape)}, not int32 [batch, 1, 1, 5]")
    if visibility.shape[0] != q.shape[0]:
        raise ValueError(f"visibility is of {visibility.shape[0]} sequences, but q has {q.shape[0]}")
    ends, starts, offsets = visibility[:, 0, 0, :3].t().contiguous()
    left, right = visibility[0, 0, 0, 3:].tolist()
    return operators._attention_impl(
        q, k, v, lengths=ends, kv_starts=starts, offsets=offsets, causal=right == 0, window_left=None if left == _NONE else left,
        window_right=None if right in (_NONE, 0) else right, **options)


_by_visibility = operators._define(_OPERATOR, _by_visibility_impl, lambda q, k, v, visibility, **options: operators._attention_fake(q, k, v))
operators._without_gradient(_by_visibility)


def attention(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
              scaling: float | None = None, is_causal: bool | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
              position_bias: Tensor | None = None, **rest: Any) -> tuple[Tensor, None]:
    """The attention function: queries [batch, heads, seq, dim], keys and values [batch, kv_heads, keys, dim], nothing of which is copied
    or repeated; returns [batch, seq, heads, dim], and no weights."""
    if dropout:
        raise ValueError(f"dropout is {dropout}, but this attention is for inference; call model.eval()")
    if rest.get("output_attentions"):
        raise ValueError("output_attentions is set, but this attention never stores its weights; use the implementation eager")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap or 0.0}
    if s_aux is not None:
        options["sink_logits"] = s_aux.detach().reshape(-1).float().contiguous()
    if position_bias is not None:
        options["bias"] = position_bias.transpose(1, 2)
    if attention_mask is None:
        # The last query sees the last key.
        options["causal"] = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    elif attention_mask.dtype == torch.int32:
        if operators._plain(q, k, v, attention_mask):
            return _by_visibility_impl(q, k, v, attention_mask, **options), None
        return _by_visibility(q, k, v, attention_mask, **options), None
    elif attention_mask.dtype == torch.bool:
        options["mask"] = attention_mask[..., : key.shape[2]].transpose(1, 2)
    else:
        bias = attention_mask[..., : key.shape[2]].transpose(1, 2)
        options["bias"] = bias if position_bias is None else options["bias"] + bias
    return operators.attention(q, k, v, **options), None


class _Layer(cache_utils.CacheLayerMixin):
    """The keys and values of a layer: [batch, kv_heads, capacity, dim] each, of which the first `length` tokens are valid. With a sliding
    window, tokens that no later query sees are dropped when the capacity is used up."""

    is_compileable = False
    is_croppable = True

    def __init__(self, sliding_window: int | None = None, max_length: int = 0, dtype: torch.dtype | None = None, **rest: Any) -> None:
        super().__init__()
        self.is_sliding = sliding_window is not None
        if sliding_window is not None:
            self.sliding_window = sliding_window
        self.max_length, self.dtype = max_length, dtype
        # `crop` may still ask for as many tokens before the window as were added since it was last called.
        self.record_past, self.recorded = False, 0
        self.dropped = self.length = 0

    def activate_past_recording(self) -> None:
        self.record_past = True

    @property
    def batch_size(self) -> int:
        return self.keys.shape[0] if self.is_initialized else -1

    def _room(self, batch: int, heads: int, capacity: int, dim: int) -> Tensor:
        size = batch * heads * capacity * dim * self.dtype.itemsize
        if size < _HUGE_PAGE:
            return torch.empty((batch, heads, capacity, dim), dtype=self.dtype)
        memory = torch.empty(size + _HUGE_PAGE, dtype=torch.uint8)
        start = -memory.data_ptr() % _HUGE_PAGE
        memory = memory[start : start + size]
        capi.kvl_advise_huge_pages(memory.data_ptr(), size, C.c_int32())
        return memory.view(self.dtype).view(batch, heads, capacity, dim)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        if key_states.device.type != "cpu":
            raise ValueError(f"the keys are on {key_states.device}; this cache is one of the CPU")
        self.dtype = self.dtype or key_states.dtype
        batch, heads, seq, dim = key_states.shape
        capacity = self._capacity(0, seq) if self.is_sliding else max(self.max_length, seq + 256)
        self.keys = self._room(batch, heads, capacity, dim)
        self.values = self._room(batch, heads, capacity, value_states.shape[3])
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
        old, start = (self.keys, self.values), self.length - kept
        wanted = self._capacity(kept, seq) if self.is_sliding else 2 * (kept + seq)
        # In place, the first of the tokens that are kept must not lie where they go.
        if start < kept or kept + seq > capacity or (self.is_sliding and capacity > 2 * wanted):
            self.keys, self.values = (self._room(*states.shape[:2], wanted, states.shape[3]) for states in old)
        for states, target in zip(old, (self.keys, self.values)):
            target[:, :, :kept] = states[:, :, start : self.length]
        self.dropped, self.length = self.dropped + start, kept

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Writes the new tokens, and returns the memory of all that are seen."""
        batch, seq = key_states.shape[0], key_states.shape[2]
        if not self.is_initialized or (batch != self.batch_size and self.get_seq_length() == 0):
            self.lazy_initialization(key_states, value_states)
        seen = self._seen()
        self._make_room(seq)
        operators.kv_write(key_states.transpose(1, 2), value_states.transpose(1, 2), self.keys.transpose(1, 2), self.values.transpose(1, 2),
                           positions=torch.full((batch,), self.length, dtype=torch.int32),
                           threads=1 if key_states.numel() < _WORTH_THREADS else 0)
        first = self.length - seen
        self.length += seq
        self.recorded += seq
        return self.keys.narrow(2, first, seen + seq), self.values.narrow(2, first, seen + seq)

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
            for states in (self.keys[:, :, : self.length], self.values[:, :, : self.length]):
                states[moved] = states[beam_idx[moved]]

    def _select(self, rows: Tensor) -> None:
        old = self.keys, self.values
        self.keys, self.values = (self._room(len(rows), *states.shape[1:]) for states in old)
        for states, target in zip(old, (self.keys, self.values)):
            target[:, :, : self.length] = states[rows, :, : self.length]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.is_initialized:
            self._select(torch.arange(self.batch_size)[indices])


class Cache(transformers.Cache):
    """A cache that is written in place and read where it lies. It grows by doubling from `max_length` tokens on, so that a good guess
    saves copies; layers with a sliding window take at most a few windows. `dtype` is what keys and values are stored as, by default that
    of the model; with another one, only this attention can read it.

    It is not for threads that use it at the same time, and neither for compiled models, which take `StaticCache`."""

    def __init__(self, config: transformers.PreTrainedConfig, max_length: int = 0, dtype: torch.dtype | None = None) -> None:
        kinds, options = cache_utils.get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        served = {"full_attention", "sliding_attention", "chunked_attention", "dummy"}
        if not served.issuperset(kinds):
            raise ValueError(f"the model has layers of the kinds {', '.join(sorted(set(kinds) - served))}; this cache serves attention alone")
        layers = [cache_utils.DummyLayer() if kind == "dummy" else _Layer(max_length=max_length, dtype=dtype, **fields)
                  for kind, fields in zip(kinds, options)]
        super().__init__(layers=layers)
