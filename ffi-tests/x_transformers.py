#!/usr/bin/env python3
"""The attention of x-transformers through the C ABI: its own decoders and encoders, whose attention core is kvlane's.

    python3 -m venv target/x-transformers && . target/x-transformers/bin/activate
    pip install --no-deps -r ffi-tests/requirements-x-transformers.txt
    cargo build --release --features capi
    python ffi-tests/x_transformers.py

Each configuration is a stack of layers of x-transformers with random weights, and a copy of it in which the module Attend, and
what surrounds it (rotation, QK-norm, biases, masks, memories, the cache), is replaced by calls of kvlane. Projections, gates and
feed-forward layers stay as they are. Every attention layer of the copy has a cache of its own, in a layout of its own: [batch,
seq, heads, dim] or [batch, heads, seq, dim], keys and values interleaved in one buffer, pages of either order, ragged, indirect,
and a ring where the layer has a window. A context's keys and values are written once.

What is compared, all in f32, with the outputs of the original's full pass:
- the copy's full pass;
- prefill of a part, then one token a step;
- chunks of several tokens from caches that are empty at first;
- the original's own cached steps (last tokens), where it has them.

With flash attention wherever the original offers it, and without. The largest difference must be at most 1e-5 of the largest
output, or of 1. Beam search reorders the caches of all layers and is compared with full passes over each beam's tokens.

How options become calls:
- Query head h of x-transformers reads KV head h % kv_heads: one call per KV head, with strided views of the query heads.
- ALiBi is slopes in decoders; symmetric ALiBi, T5's and all other position biases are a bias.
- Memory keys and values are a prefix that all sequences share (kvl_attention_with_prefix); with ALiBi, a state of their own
  (kvl_merge_states); with a window, the first tokens of the cache (`prefix_lengths`, sink tokens of a ring).
- A zero key and value is a sink logit of 0; a learned sink is a sink logit.
- xPos is RoPE by tables whose rows are scaled.
- l2norm is RMS norm with weights 1 / sqrt(dim). Norm and rotation of keys take place in kvl_kv_write, per head where weights are.
- Attention by distance is a product of vectors with one more element.
- Masks that are intervals are `kv_starts` and `lengths`, others a boolean mask.

Options that no call expresses are listed below with the reason, and printed. Every option of x-transformers' Attention must be
in a configuration, in that list, or among those that are outside the attention core, or the test fails.
"""

from __future__ import annotations

import argparse
import copy
import ctypes as C
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

# The package has the name of this file, whose directory would come first.
sys.path.append(sys.path.pop(0))

import kvlane
import numpy as np
import torch
import x_transformers as xt
from kvlane import AttentionParams, Context, Layout, RmsNormParams, RopeParams, WriteParams
from torch import Tensor, nn
from x_transformers.attend import Attend, Intermediates
from x_transformers.x_transformers import AlibiPositionalBias, Attention, LayerIntermediates, PerRowDataDependentAlibi

LIMIT = 1e-5
BATCH, SEQ, CONTEXT, DIM, CAPACITY, PAGE = 3, 14, 9, 48, 48, 4
LAYOUTS = ("BSHD", "BHSD", "interleaved", "paged", "paged by head", "ragged", "indirect")

# Options of Attention that no call of the library expresses.
INEXPRESSIBLE = {
    "pre_talking_heads": "mixes the logits of different heads",
    "post_talking_heads": "mixes the softmax weights of different heads",
    "pre_scale_post_talking_heads": "multiplies weights by mixed logits",
    "sparse_topk, sparse_topk_straight_through": "masks keys by the rank of their logits",
    "hard": "takes the one key with the largest logit",
    "sigmoid": "has no softmax",
    "gumbel_softmax, gumbel_softmax_temp, gumbel_softmax_hard": "draws random numbers",
    "selective": "subtracts sums of other queries' logits",
    "cog_signed": "gives weights signs",
    "custom_attn_fn": "is any function of the logits",
    "inverted_attention": "takes the softmax over queries",
    "use_cope, cope_max_pos, cope_soft_onehot_pos, cope_talking_heads": "has positions that are sums of gates made of the logits",
}
# Combinations and arguments, of which the same is true.
INEXPRESSIBLE_ELSEWHERE = {
    "softclamp_logits with a bias": "clamps after the bias is added; the library's softcap comes before it, as in Gemma",
    "residual_attn, cross_residual_attn": "adds one layer's logits to the next one's; the library returns no logits",
    "attn_delta": "is added to the softmax weights",
    "return_attn, return_attn_z_loss, qk_clip_": "needs the logits or weights of all keys",
}
# Options that act before or after the attention core, and are the original's own code in the copy.
OUTSIDE = {
    "dropout": "training",
    "sublayer_dropout": "training",
    "zero_init_output": "initial weights",
    "output_proj_depth": "initial weights",
    "low_rank_silu_gates": "gates of the output",
    "gate_values_rank": "gates of the output",
    "gate_values_headwise": "gates of the output",
    "output_gate_rank": "gates of the output",
    "output_gate_headwise": "gates of the output",
    "hybrid_module": "a branch beside attention",
    "hybrid_mask_kwarg": "a branch beside attention",
    "hybrid_fold_axial_dim": "a branch beside attention",
    "hybrid_learned_mix": "a branch beside attention",
    "dim_out": "size of the output's projection",
    "onnxable": "how the original makes its causal mask",
    "attend_sdp_kwargs": "which kernels of PyTorch the original uses",
    "flash_pack_seq": "another package's kernels for GPUs, in the original; in the library, ragged queries",
}


def int32(x: Iterable[int] | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, dtype=np.int32)


def heads_third(x: Tensor) -> np.ndarray:
    """[batch, heads, seq, dim] of PyTorch, seen as [batch, seq, heads, dim]."""
    return x.detach().numpy().transpose(0, 2, 1, 3)


def empty(*shape: int) -> np.ndarray:
    """What a call that writes too little leaves visible."""
    return np.full(shape, np.nan, np.float32)


# ---------------------------------------------------------------- a layer's cache


class LayerCache:
    """Keys and values of one attention layer, in one layout, which only kvlane writes."""

    def __init__(
        self, c: Context, name: str, shape: tuple[int, int, int], dims: tuple[int, int], ring: tuple[int, int]
    ) -> None:
        """`shape` is [batch, capacity, heads]; `ring` is the capacity of a ring and how many sink tokens it has."""
        batch, capacity, heads = shape
        self.c, self.name = c, name
        self.lengths = np.zeros(batch, np.int32)
        self.layout = Layout()
        self.table = np.zeros(0, np.int32)
        rng = np.random.default_rng(0)
        pages = capacity // PAGE
        if name == "ring":
            shape = (batch, ring[0], heads)
            self.layout = Layout(kind=kvlane.RING, sink_tokens=ring[1])
        elif name.startswith("paged"):
            # A few pages more than the sequences have, in any order.
            order = rng.permutation(batch * pages + 2 * batch)
            self.table = int32(order[: batch * pages].reshape(batch, pages))
            self.layout = Layout(kind=kvlane.PAGED, num_sequences=batch, pages_per_sequence=pages)
            shape = (len(order), PAGE, heads)
        elif name == "ragged":
            self.table = int32(np.arange(batch + 1) * capacity)
            self.layout = Layout(kind=kvlane.RAGGED, num_sequences=batch)
            shape = (1, batch * capacity, heads)
        elif name == "indirect":
            self.table = np.zeros((batch, capacity), np.int32)
            self.layout = Layout(kind=kvlane.INDIRECT, num_sequences=batch)
        if self.table.size:
            self.layout.table = self.table.ctypes.data
        if name in ("BHSD", "paged by head"):
            first, second, third = shape
            self.k, self.v = (empty(first, third, second, dim).transpose(0, 2, 1, 3) for dim in dims)
        elif name == "interleaved":
            both = empty(*shape, sum(dims))
            self.k, self.v = both[..., : dims[0]], both[..., dims[0] :]
        else:
            self.k, self.v = (empty(*shape, dim) for dim in dims)

    @property
    def length(self) -> int:
        return int(self.lengths[0])

    def write(self, k: np.ndarray, v: np.ndarray, runs: Sequence[tuple[slice, dict[str, Any]]]) -> None:
        """Appends tokens. `runs` are ranges of heads with the norm and the rotation of their keys."""
        for heads, fields in runs:
            tensors = {"k": k, "v": v, "k_cache": self.k, "v_cache": self.v}
            views = {name: kvlane.view(x[:, :, heads]) for name, x in tensors.items()}
            params = WriteParams(**views, positions=self.lengths.ctypes.data)
            if self.name != "indirect":
                params.layout = C.addressof(self.layout)
            for name, struct in fields.items():
                setattr(params, name, C.addressof(struct))
            self.c.write(params)
        if self.name == "indirect":
            self.c.cache_set_table_tokens(self.table, self.lengths, k.shape[1])
        self.lengths += k.shape[1]

    def reorder(self, parents: np.ndarray) -> None:
        """Sequence b becomes what sequence `parents[b]` was. All have the same length."""
        if self.name == "indirect":
            self.c.cache_reorder_table(self.table, self.lengths, parents)
        elif self.name.startswith("paged"):
            self.reorder_pages(parents)
        elif self.name == "ragged":
            raise NotImplementedError("no call reorders ragged sequences")
        else:
            layer = kvlane.KvLayer(kvlane.view(self.k), kvlane.view(self.v))
            layout = C.addressof(self.layout)
            lengths = self.lengths.ctypes.data
            cache = kvlane.Cache(layers=C.pointer(layer), num_layers=1, layout=layout, lengths=lengths)
            self.c.cache_reorder(cache, parents)

    def reorder_pages(self, parents: np.ndarray) -> None:
        """Full pages become shared; a last page that is not full is copied, since its sequences will write to it."""
        full, rest = divmod(self.length, PAGE)
        before = self.table.copy()
        self.table[:, :full] = before[parents, :full]
        used = set(self.table[:, :full].ravel().tolist())
        free = sorted({*range(len(self.k))} - used - set(before[:, full].tolist() if rest else ()))
        moves = []
        for b, parent in enumerate(parents):
            for entry in range(full, self.table.shape[1]):
                self.table[b, entry] = free.pop(0)
            if rest:
                moves.append((before[parent, full], self.table[b, full]))
        if moves:
            self.c.cache_copy_pages(self.k, self.v, int32(moves))


# ---------------------------------------------------------------- the attention core


class Positions(nn.Module):
    """Takes the place of a rotary embedding in the copy, and hands its positions on to the attention layers."""

    def forward(self, positions: Tensor) -> np.ndarray:
        return int32(np.atleast_2d(positions.numpy()))


class Norm:
    """RMS norm of heads, or of groups of their elements; weights are [heads, dim]."""

    def __init__(self, weights: np.ndarray, groups: int = 1) -> None:
        self.weights, self.groups = np.ascontiguousarray(weights, np.float32), groups

    def params(self, head: int, first: int = 0) -> RmsNormParams:
        # F.normalize adds nothing to the mean.
        return RmsNormParams(weight=self.weights[head, first:].ctypes.data, eps=1e-30)

    def apply(self, c: Context, x: np.ndarray) -> None:
        width = x.shape[3] // self.groups
        for head in range(x.shape[2]):
            for first in range(0, x.shape[3], width):
                part = x[:, :, head : head + 1, first : first + width]
                c.rms_norm(part, part, self.params(head, first))


def take_norms(attention: Attention) -> list[Norm | None]:
    """The norms of queries and keys, which the copy's own code then no longer applies."""
    dim = attention.to_q.out_features // attention.heads
    norms: list[Norm | None] = []
    for which, heads in (("q", attention.heads), ("k", attention.kv_heads)):
        multihead = getattr(attention, f"{which}_rmsnorm")
        if attention.qk_norm:
            scale = getattr(attention, f"qk_norm_{which}_scale")
            scale = scale.detach().numpy()[:, 0] if isinstance(scale, Tensor) else np.ones((heads, dim))
            # l2norm divides by the root of a sum, RMS norm by that of a mean.
            norms.append(Norm(scale / np.sqrt(dim / attention.qk_norm_groups), attention.qk_norm_groups))
        elif multihead is not None:
            norms.append(Norm(multihead.gamma.detach().numpy()[:, 0] + 1))
        else:
            norms.append(None)
    attention.q_rmsnorm = attention.k_rmsnorm = None
    attention.qk_norm = False
    return norms


@dataclass
class Call:
    """What an attention layer is given beside its input."""

    cache: LayerCache | None
    cross: bool
    keys_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    bias: Callable[[int, int], Tensor | None] = lambda i, j: None
    alibi_heads: int = 0
    q_positions: np.ndarray | None = None
    k_positions: np.ndarray | None = None
    added: tuple[Tensor, Tensor] | None = None
    added_mask: Tensor | None = None


@dataclass
class Visible:
    """The keys that queries see, and what is added to their logits, as kvlane takes them."""

    causal: bool = False
    window: int | None = None
    offsets: np.ndarray | None = None
    lengths: np.ndarray | None = None
    kv_starts: np.ndarray | None = None
    prefix_lengths: np.ndarray | None = None
    mask: np.ndarray | None = None
    bias: np.ndarray | None = None
    alibi_slopes: np.ndarray | None = None
    sink_logits: np.ndarray | None = None
    layout: Layout | None = None

    def params(self, heads: slice) -> AttentionParams:
        """All but the tensors, for some of the query heads. What it points to lives as long as it does."""
        params = AttentionParams()
        params.flags = kvlane.CAUSAL if self.causal else 0
        if self.window is not None:
            params.flags |= kvlane.WINDOW_LEFT
            params.window_left = self.window
        lists = {name: getattr(self, name) for name in ("offsets", "lengths", "kv_starts", "prefix_lengths")}
        for name in ("alibi_slopes", "sink_logits"):
            per_head = getattr(self, name)
            lists[name] = None if per_head is None else np.ascontiguousarray(per_head[heads], np.float32)
        params.alive = lists
        for name, array in lists.items():
            setattr(params, name, None if array is None else array.ctypes.data)
        if self.mask is not None:
            params.mask = kvlane.mask(self.mask if self.mask.shape[2] == 1 else self.mask[:, :, heads])
        if self.bias is not None:
            params.bias = kvlane.view(self.bias if self.bias.shape[2] == 1 else self.bias[:, :, heads])
        if self.layout is not None:
            params.layout = C.addressof(self.layout)
        return params


class Core(nn.Module):
    """Takes the place of one attention layer's Attend, and wraps the layer."""

    def __init__(self, c: Context, attention: Attention, layout: str, layers: nn.Module) -> None:
        super().__init__()
        attend: Attend = attention.attend
        # In a list, a module is not a part of this one.
        self.c, self.name, self.attention = c, layout, [attention]
        self.heads, self.kv_heads, self.window = attention.heads, attention.kv_heads, attention.max_attend_past
        self.rotated, self.rotary = attention.rotate_num_heads, [layers.rotary_pos_emb]
        self.polar = layers.polar_pos_emb is not None
        self.scale, self.distance = float(attend.scale), attend.l2_distance
        self.softcap = attend.logit_softclamp_value if attend.softclamp_logits else 0.0
        self.gates, self.projected = [attention.data_dependent_alibi], [attention.rel_proj_pos_bias]
        # How many tokens a call brings at most, which a ring needs room for; the first keys that all queries see.
        self.capacity, self.chunk, self.prefix = CAPACITY, CAPACITY, None
        l2norm = attention.qk_norm
        self.q_norm, self.k_norm = take_norms(attention)

        sinks = [np.zeros(self.heads)] if attend.add_zero_kv else []
        sinks += [attend.head_attn_sink.detach().numpy()] if attend.head_learned_sink else []
        self.sinks = np.logaddexp.reduce(sinks).astype(np.float32) if sinks else None

        self.memory = None
        if attention.num_mem_kv:
            # [heads, tokens, dim], as [1, tokens, heads, dim].
            self.memory = [heads_third(m[None]).copy() for m in (attention.mem_k, attention.mem_v)]
            if l2norm:
                self.k_norm.apply(c, self.memory[0])
        # A ring has no keys but its own: memories are its sink tokens.
        self.kept = self.memory[0].shape[1] if self.memory and layout == "ring" else 0

        attention.num_mem_kv, attention.max_attend_past = 0, None
        attention.data_dependent_alibi = attention.rel_proj_pos_bias = None
        attention.attend = self
        self.original = attention.forward
        attention.forward = self.layer

    # ---- the layer

    def layer(self, x: Tensor, **given: Any) -> tuple[Tensor, Intermediates]:
        """The layer's forward: keeps for `forward` what is attention's, and leaves the rest to the original."""
        previous, cross = given.get("cache"), given.get("context") is not None
        cache = previous.cached_kv if previous is not None else None
        mem = given.get("mem") if cache is None or cache.length == self.kept else None
        keys_mask = given.get("context_mask")
        if keys_mask is None and not cross:
            keys_mask = given.get("mask")
        if (m := given.get("mem")) is not None:
            before = 0 if mem is not None else cache.length - self.kept - m.shape[1]
            masks = (given["mem_mask"], m.shape[1]), (keys_mask, before + x.shape[1])
            # Without a mask, all are visible.
            of_all = (torch.ones(len(x), n, dtype=torch.bool) if mask is None else mask for mask, n in masks)
            keys_mask = torch.cat(tuple(of_all), dim=-1)
        q_positions = given.get("rotary_pos_emb")
        rel_pos, pos, attn_bias = (given.get(name) for name in ("rel_pos", "pos", "attn_bias"))
        alibi = isinstance(rel_pos, AlibiPositionalBias) and pos is None and self.attention[0].causal and not self.kept

        def bias(i: int, j: int) -> Tensor | None:
            if rel_pos is not None and not alibi:
                return rel_pos(i, j) if pos is None else rel_pos.forward_custom_pos(pos)
            if self.gates[0] is not None:
                return self.gate_bias(x)
            if self.projected[0] is not None:
                return self.projected[0](x, seq_len_k=j)
            return attn_bias

        self.call = Call(
            cache=cache,
            cross=cross,
            keys_mask=keys_mask,
            attn_mask=given.get("attn_mask"),
            bias=bias,
            alibi_heads=rel_pos.heads if alibi else 0,
            q_positions=q_positions,
            k_positions=given.get("context_rotary_pos_emb") if cross else q_positions,
            added=given.get("additional_key_values"),
            added_mask=given.get("additional_key_value_mask"),
        )
        passed = ("context", "polar_pos_emb", "kv_input_residual", "value_residual", "causal")
        options = {name: given[name] for name in passed if given.get(name) is not None}
        if previous is None and given.get("mask") is not None:
            options["mask"] = given["mask"]  # sets the output of padding to 0
        out, intermediates = self.original(x, mem=mem, return_intermediates=True, **options)
        intermediates.cached_kv = self.call.cache
        return out, intermediates

    def gate_bias(self, x: Tensor) -> Tensor:
        """Data-dependent ALiBi. In decoders a logit's bias is c_i - c_j, and the softmax does not depend on c_i."""
        gates, cache = self.gates[0], self.call.cache
        if isinstance(gates, PerRowDataDependentAlibi):
            # A bias of each query is a sum over all keys between, for which the inputs are kept.
            cache.inputs = torch.cat((getattr(cache, "inputs", x[:, :0]), x), dim=1)
            return gates(cache.inputs)
        if not gates.causal:
            return gates(x)
        new = gates.to_forget_gates(x) * gates.post_log_scale
        before = getattr(cache, "gate_sums", new[..., :0])
        carried = before[..., -1:] if before.shape[-1] else 0
        cache.gate_sums = torch.cat((before, new.cumsum(dim=-1) + carried), dim=-1)
        return -cache.gate_sums[:, :, None, :]

    def new_cache(self, batch: int, dims: tuple[int, int]) -> LayerCache:
        ring = ((self.window or 0) + self.chunk + self.kept, self.kept)
        cache = LayerCache(self.c, self.name, (batch, self.capacity, self.kv_heads), dims, ring)
        if self.kept:
            k, v = (np.broadcast_to(m, (batch, *m.shape[1:])) for m in self.memory)
            cache.write(k, v, [(slice(None), {})])
        return cache

    def dims(self) -> tuple[int, int]:
        attention = self.attention[0]
        dim = attention.to_q.out_features // self.heads
        return dim * (2 if self.polar else 1) + self.distance, attention.to_v.out_features // self.kv_heads

    # ---- the core

    def rope(self, positions: np.ndarray, batch: int, tokens: int, sign: int) -> RopeParams:
        """The rotation of the last of the positions. `sign` is 1 for queries and -1 for keys, which xPos scales."""
        rotary = self.rotary[0]
        inv_freq = rotary.inv_freq.double().numpy() / rotary.interpolation_factor
        positions = int32(np.broadcast_to(positions[:, positions.shape[1] - tokens :], (batch, tokens)))
        params = RopeParams(pairing=kvlane.INTERLEAVED, rotary_dim=2 * len(inv_freq), positions=positions.ctypes.data)
        params.alive = [positions, inv_freq]
        if rotary.scale is None:
            params.inv_freq = inv_freq.ctypes.data
            return params
        # The original counts the powers of its scale from the middle of the text; only their difference has an effect.
        row = np.arange(self.capacity)[:, None]
        scale = rotary.scale.double().numpy() ** (sign * row / rotary.scale_base)
        cos, sin = (np.ascontiguousarray(f(row * inv_freq) * scale, np.float32) for f in (np.cos, np.sin))
        params.alive += [cos, sin]
        params.cos, params.sin, params.table_rows = cos.ctypes.data, sin.ctypes.data, self.capacity
        return params

    def runs(self, rope: RopeParams | None) -> list[tuple[slice, dict[str, Any]]]:
        """Heads of the keys that have the same norm and rotation."""
        first = self.kv_heads - min(self.rotated, self.kv_heads) if rope is not None else self.kv_heads
        if self.k_norm is not None:
            borders = list(range(self.kv_heads + 1))
        else:
            borders = sorted({0, first, self.kv_heads})
        runs = []
        for start, end in pairwise(borders):
            fields: dict[str, Any] = {"rope": rope} if start >= first else {}
            if self.k_norm is not None:
                fields["k_norm"] = self.k_norm.params(start)
            runs.append((slice(start, end), fields))
        return runs

    def write(self, k: np.ndarray, v: np.ndarray) -> None:
        """Norm, rotation and the way into the cache: one call per run of heads, or, where a call cannot, before it."""
        cache, rope = self.call.cache, None
        if self.call.k_positions is not None:
            rope = self.rope(self.call.k_positions, *k.shape[:2], -1)
        if not self.distance and (self.k_norm is None or self.k_norm.groups == 1):
            cache.write(k, v, self.runs(rope))
            return
        k = k.copy()
        if self.k_norm is not None:
            self.k_norm.apply(self.c, k)
        if rope is not None:
            self.c.rope(k, k, rope)
        if self.distance:
            k = np.concatenate((k, (k**2).sum(axis=3, keepdims=True)), axis=3)
        cache.write(k, v, [(slice(None), {})])

    def queries(self, q: np.ndarray) -> np.ndarray:
        q = np.ascontiguousarray(q)
        if self.q_norm is not None:
            self.q_norm.apply(self.c, q)
        if self.call.q_positions is not None:
            rotated = q[:, :, self.heads - self.rotated :]
            self.c.rope(rotated, rotated, self.rope(self.call.q_positions, *q.shape[:2], 1))
        if self.distance:
            # -|q - k|^2 is 2 q.k - |k|^2 and a number that is the same for all keys.
            q = np.concatenate((2 * q, np.full((*q.shape[:3], 1), -1, np.float32)), axis=3)
        return q

    def attention_call(
        self,
        tensors: tuple[np.ndarray, np.ndarray, np.ndarray],
        visible: Visible,
        call: Callable[[AttentionParams, slice], None],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The output and its LSE: one call for all heads, or one per KV head with the query heads that read it."""
        q, k, v = tensors
        kv_heads = k.shape[2]
        out, lse = empty(*q.shape[:3], v.shape[3]), empty(*q.shape[:3])
        groups = [slice(g, None, kv_heads) for g in range(kv_heads)] if 1 < kv_heads < self.heads else [slice(None)]
        for g, heads in enumerate(groups):
            kv = slice(None) if len(groups) == 1 else slice(g, g + 1)
            params = visible.params(heads)
            part = empty(*lse[:, :, heads].shape)
            params.q, params.k, params.v = (kvlane.view(x) for x in (q[:, :, heads], k[:, :, kv], v[:, :, kv]))
            params.out, params.lse = kvlane.view(out[:, :, heads]), part.ctypes.data
            params.scale, params.softcap = self.scale, self.softcap
            call(params, kv)
            lse[:, :, heads] = part
        return out, lse

    def visible(self, batch: int, seq: int, causal: bool) -> Visible:
        call, cache = self.call, self.call.cache
        keys = cache.length
        visible = Visible(causal=causal and not call.cross, window=self.window, sink_logits=self.sinks)
        visible.offsets, visible.lengths = int32([keys - seq] * batch), cache.lengths
        visible.layout = cache.layout if cache.name not in ("BSHD", "BHSD", "interleaved") else None
        if self.prefix is not None:
            visible.prefix_lengths = int32(self.prefix)
        elif self.kept:
            visible.prefix_lengths = int32([self.kept] * batch)

        mask = None
        if call.keys_mask is not None:
            mask = np.pad(call.keys_mask.numpy(), ((0, 0), (self.kept, 0)), constant_values=True)
            start, count = mask.argmax(axis=1), mask.sum(axis=1)
            position = np.arange(keys)
            is_interval = (mask == ((position >= start[:, None]) & (position < (start + count)[:, None]))).all()
            # A ring's lengths are its tokens, and what a prefix or a memory keeps visible comes before any start.
            to_the_end = (start + count == keys).all()
            if is_interval and (cache.name != "ring" or to_the_end) and visible.prefix_lengths is None:
                visible.kv_starts, visible.lengths = int32(start), int32(start + count)
                mask = None
            else:
                mask = mask[:, None, None, :]
        if call.attn_mask is not None:
            given = call.attn_mask.numpy()
            given = given[(None,) * (4 - given.ndim)].transpose(0, 2, 1, 3)
            mask = given if mask is None else given & mask
        visible.mask = mask

        if (bias := call.bias(seq, keys - self.kept)) is not None:
            bias = bias.detach().numpy()
            bias = bias[(None,) * (4 - bias.ndim)].transpose(0, 2, 1, 3)[:, -seq:]
            visible.bias = np.pad(bias, ((0, 0), (0, 0), (0, 0), (self.kept, 0)))
        if call.alibi_heads:
            visible.alibi_slopes = np.zeros(self.heads, np.float32)
            visible.alibi_slopes[: call.alibi_heads] = self.c.alibi_slopes(call.alibi_heads)
        if self.softcap and visible.bias is not None:
            raise NotImplementedError("softclamp_logits with a bias")
        return visible

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, **_: Any) -> tuple[Tensor, Intermediates]:
        """As Attend's, of the new tokens alone."""
        call, c = self.call, self.c
        q_new, k_new, v_new = (heads_third(x) for x in (q, k, v))
        batch, seq = q_new.shape[:2]
        if call.cache is None:
            call.cache = self.new_cache(batch, (k_new.shape[3] + self.distance, v_new.shape[3]))
        if k_new.shape[1]:
            self.write(k_new, v_new)
        queries, cache = self.queries(q_new), call.cache
        visible = self.visible(batch, seq, causal)

        states = []
        memory = self.memory if self.memory and not self.kept else None
        if memory and visible.alibi_slopes is None and visible.window is None and call.added is None:

            def own(params: AttentionParams, kv: slice) -> None:
                c.attention_with_prefix(*(m[:, :, kv] for m in memory), params)

        else:

            def own(params: AttentionParams, kv: slice) -> None:
                c.attention(params)

            if memory:
                k_memory, v_memory = (np.broadcast_to(m, (batch, *m.shape[1:])) for m in memory)
                states.append(
                    self.attention_call((queries, k_memory, v_memory), Visible(), lambda p, _: c.attention(p))
                )
        if call.added is not None:
            k_added, v_added = map(heads_third, call.added)
            of_added = Visible()
            if call.added_mask is not None:
                of_added.mask = call.added_mask.numpy()[:, None, None, :]
            states.append(self.attention_call((queries, k_added, v_added), of_added, lambda p, _: c.attention(p)))
        states.insert(0, self.attention_call((queries, cache.k, cache.v), visible, own))
        out = states[0][0]
        if len(states) > 1:
            out = empty(*out.shape)
            c.merge_states(states, out)
        return torch.from_numpy(out).transpose(1, 2), Intermediates()


def install(c: Context, layers: nn.Module, first: int, layouts: Sequence[str] = LAYOUTS) -> list[Core]:
    """Replaces the core of every attention layer; layouts go round, from the `first`, with a ring every other time it can be."""
    cores: list[Core] = []
    for kind, (_, block, _) in zip(layers.layer_types, layers.layers, strict=True):
        if kind in "ac":
            at = first + len(cores)
            has_ring = kind == "a" and block.causal and block.max_attend_past is not None and at % 2 == 0
            cores.append(Core(c, block, "ring" if has_ring else layouts[at % len(layouts)], layers))
    if layers.rotary_pos_emb is not None:
        layers.rotary_pos_emb = Positions()
    return cores


# ---------------------------------------------------------------- configurations


@dataclass
class Config:
    """A stack of layers and what it is given. Options are those of x-transformers."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Sequence[str] = ()
    kind: Callable[..., nn.Module] = xt.Decoder
    # Why the original's cached steps are not compared; None if they are.
    no_original_cache: str | None = None
    # Some of x-transformers' arguments are for full passes alone.
    full_only: bool = False


ONE_TOKEN = "its cached steps forget the gates of earlier tokens"
ROTARY = {"rotary_pos_emb": True}
FULL_ROTARY = {"rotary_pos_emb": True, "rotary_emb_dim": 16}
GROUPED = {"heads": 6, "attn_kv_heads": 2}
CROSS = {"cross_attend": True}

CONFIGS = [
    Config("plain"),
    Config("heads of 20, values of 28", {"attn_dim_head": 20, "attn_value_dim_head": 28}),
    Config("one head of 5", {"heads": 1, "attn_dim_head": 5, "attn_project_out": True}),
    Config("grouped queries", GROUPED),
    Config("one KV head", {"attn_one_kv_head": True}),
    Config("rotary, half of the head", ROTARY),
    Config("rotary, the whole head", FULL_ROTARY),
    Config("rotary, interpolated", {**ROTARY, "rotary_interpolation_factor": 2.5}),
    Config("rotary, base rescaled", {**ROTARY, "rotary_base_rescale_factor": 4.0}),
    Config("rotary, grouped queries", {**ROTARY, **GROUPED}),
    Config("rotary, given positions", ROTARY, ["positions"]),
    Config("rotary, half of the heads", {**ROTARY, "rotate_num_heads": 2}),
    Config("xpos", {"rotary_xpos": True, "rotary_xpos_scale_base": 16}),
    Config("xpos, one KV head, window", {"rotary_xpos": True, "attn_one_kv_head": True, "attn_max_attend_past": 5}),
    Config("polar positions", {"polar_pos_emb": True}),
    Config("ALiBi", {"alibi_pos_bias": True}),
    Config("ALiBi, six heads", {"alibi_pos_bias": True, "heads": 6}),
    Config(
        "ALiBi on some heads, one KV head", {"alibi_pos_bias": True, "alibi_num_heads": 2, "attn_one_kv_head": True}
    ),
    Config("ALiBi, grouped queries", {"alibi_pos_bias": True, **GROUPED}),
    Config("T5 bias", {"rel_pos_bias": True}),
    Config("T5 bias, few buckets, grouped queries", {"rel_pos_bias": True, "rel_pos_num_buckets": 8, **GROUPED}),
    Config("dynamic position bias", {"dynamic_pos_bias": True}),
    Config("dynamic position bias, logarithms", {"dynamic_pos_bias": True, "dynamic_pos_bias_log_distance": True}),
    Config(
        "data-dependent ALiBi",
        {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_kwargs": {"bias_init": 1.0}},
        no_original_cache=ONE_TOKEN,
    ),
    Config(
        "data-dependent ALiBi per query",
        {
            "attn_data_dependent_alibi": True,
            "attn_data_dependent_alibi_per_row": True,
            "attn_data_dependent_alibi_per_row_dim_head": 6,
        },
        no_original_cache=ONE_TOKEN,
    ),
    Config(
        "projected relative bias",
        {"attn_use_rel_proj_pos_bias": True, "attn_rel_proj_num_distance_basis": 5, "attn_rel_proj_max_dist": 6},
    ),
    Config("window", {"attn_max_attend_past": 4}),
    Config("window of one token", {"attn_max_attend_past": 0}),
    Config("window, rotary, grouped queries", {"attn_max_attend_past": 5, **ROTARY, **GROUPED}),
    Config("window, ALiBi", {"attn_max_attend_past": 3, "alibi_pos_bias": True}),
    Config("window, T5 bias", {"attn_max_attend_past": 3, "rel_pos_bias": True}),
    Config("memory KV", {"attn_num_mem_kv": 3}),
    Config("memory KV, grouped queries, rotary", {"attn_num_mem_kv": 2, **GROUPED, **ROTARY}),
    Config("memory KV, window", {"attn_num_mem_kv": 3, "attn_max_attend_past": 4}),
    Config("memory KV, window, left padding", {"attn_num_mem_kv": 3, "attn_max_attend_past": 4}, ["left padding"]),
    Config("memory KV, ALiBi", {"attn_num_mem_kv": 3, "alibi_pos_bias": True}),
    Config("memory KV, ALiBi, window", {"attn_num_mem_kv": 2, "alibi_pos_bias": True, "attn_max_attend_past": 4}),
    Config("memory KV, T5 bias", {"attn_num_mem_kv": 3, "rel_pos_bias": True}),
    Config("memory KV, left padding", {"attn_num_mem_kv": 3}, ["left padding"]),
    Config("null KV", {"attn_add_zero_kv": True}),
    Config("null KV, ALiBi, grouped queries", {"attn_add_zero_kv": True, "alibi_pos_bias": True, **GROUPED}),
    Config("learned sinks", {"attn_head_learned_sink": True}),
    Config(
        "learned sinks, grouped queries, window", {"attn_head_learned_sink": True, **GROUPED, "attn_max_attend_past": 4}
    ),
    Config(
        "learned sinks, null KV, memory KV",
        {"attn_head_learned_sink": True, "attn_add_zero_kv": True, "attn_num_mem_kv": 2},
    ),
    Config("l2 QK-norm", {"attn_qk_norm": True}),
    Config("l2 QK-norm, groups, scale", {"attn_qk_norm": True, "attn_qk_norm_groups": 4, "attn_qk_norm_scale": 7}),
    Config("l2 QK-norm, weights per head, rotary", {"attn_qk_norm": True, "attn_qk_norm_dim_scale": True, **ROTARY}),
    Config("l2 QK-norm, memory KV", {"attn_qk_norm": True, "attn_num_mem_kv": 2}),
    Config("RMS QK-norm, rotary", {"attn_qk_rmsnorm": True, **ROTARY}),
    Config("RMS QK-norm, grouped queries", {"attn_qk_rmsnorm": True, **GROUPED}),
    Config("RMS K-norm", {"attn_k_rmsnorm": True}),
    Config("RMS norm of values", {"attn_value_rmsnorm": True}),
    Config("softcap", {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 2.0}),
    Config(
        "softcap, rotary, left padding",
        {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 1.0, **ROTARY},
        ["left padding"],
    ),
    Config("distance", {"attn_l2_distance": True}),
    Config("distance, rotary, grouped queries", {"attn_l2_distance": True, **ROTARY, **GROUPED}),
    Config("left padding", {}, ["left padding"]),
    Config("left padding, rotary, window", {**ROTARY, "attn_max_attend_past": 4}, ["left padding"]),
    Config("left padding, ALiBi, grouped queries", {"alibi_pos_bias": True, **GROUPED}, ["left padding"]),
    Config("left padding, T5 bias", {"rel_pos_bias": True}, ["left padding"]),
    Config("right padding", {}, ["right padding"]),
    Config("right padding, window", {"attn_max_attend_past": 4}, ["right padding"]),
    Config("masked keys", ROTARY, ["masked keys"]),
    Config("attention mask", ROTARY, ["attention mask"], full_only=True),
    Config("attention mask per head, grouped queries", GROUPED, ["attention mask per head"], full_only=True),
    Config("attention bias", {}, ["bias"]),
    Config("Transformer-XL memories", {}, ["memories"]),
    Config(
        "Transformer-XL memories, rotary, masks",
        ROTARY,
        ["memories", "memory masks"],
        no_original_cache="its cached steps mask the memories and the new tokens alone",
    ),
    Config("keys and values from elsewhere", {}, ["added"]),
    Config("keys and values from elsewhere, grouped", {**GROUPED, **ROTARY}, ["added", "added masks"]),
    Config("value residuals", {"add_value_residual": True}),
    Config(
        "gated values, scaled heads", {"attn_gate_values": True, "attn_head_scale": True, "attn_swiglu_values": True}
    ),
    Config("gated heads and outputs", {"attn_gate_value_heads": True, "attn_output_gate": True}),
    Config("attention on attention", {"attn_on_attn": True}),
    Config("laser", {"attn_laser": True, "attn_laser_softclamp_value": 5.0}),
    # The original projects on the values of all tokens of a call, so that its own steps differ from a full pass.
    Config(
        "orthogonal values",
        {"attn_orthog_projected_values": True, "attn_orthog_projected_values_per_head": True},
        full_only=True,
    ),
    Config(
        "latent queries, keys and values",
        {"attn_use_latent_q": True, "attn_dim_latent_q": 20, "attn_use_latent_kv": True, "attn_dim_latent_kv": 24},
    ),
    Config(
        "latent keys and values, some heads rotated",
        {"attn_use_latent_kv": True, "attn_dim_latent_kv": 24, "attn_latent_rope_subheads": 2, **ROTARY},
    ),
    Config("several residual streams", {"num_residual_streams": 3, "qkv_receive_diff_residuals": True}),
    Config("cross-attention", CROSS, ["context"]),
    Config("cross-attention, masked context", CROSS, ["context mask"]),
    Config("cross-attention, a context without a key", CROSS, ["context mask", "no context"]),
    Config("cross-attention, rotary", {**CROSS, **ROTARY}, ["context mask"]),
    Config("cross-attention, rotary context", {**CROSS, **ROTARY}, ["context mask", "context positions"]),
    Config("cross-attention, grouped queries, memory KV", {**CROSS, **GROUPED, "attn_num_mem_kv": 2}, ["context mask"]),
    Config("cross-attention, a context of another size", {**CROSS, "cross_attn_dim_context": 36}, ["context"]),
    Config(
        "cross-attention, ALiBi, null KV, left padding",
        {**CROSS, "alibi_pos_bias": True, "attn_add_zero_kv": True},
        ["context", "left padding"],
    ),
    Config("cross-attention alone", {}, ["context mask"], xt.CrossAttender, full_only=True),
    Config("encoder", {}, ["right padding"], xt.Encoder, full_only=True),
    Config("encoder, rotary, grouped queries", {**ROTARY, **GROUPED}, ["right padding"], xt.Encoder, full_only=True),
    Config("encoder, ALiBi", {"alibi_pos_bias": True}, ["masked keys"], xt.Encoder, full_only=True),
    Config(
        "encoder, T5 bias, memory KV",
        {"rel_pos_bias": True, "attn_num_mem_kv": 2},
        ["right padding"],
        xt.Encoder,
        full_only=True,
    ),
    Config("encoder, data-dependent ALiBi", {"attn_data_dependent_alibi": True}, [], xt.Encoder, full_only=True),
    Config("encoder, window", {"attn_max_attend_past": 4}, ["right padding"], xt.Encoder, full_only=True),
    Config("prefix decoder", {}, ["prefix"], xt.PrefixDecoder, no_original_cache="it has none"),
    Config(
        "prefix decoder, rotary, grouped queries",
        {**ROTARY, **GROUPED},
        ["prefix"],
        xt.PrefixDecoder,
        no_original_cache="it has none",
    ),
]


class Inputs:
    """Random inputs of a configuration, and the arguments that the original has for them."""

    def __init__(self, config: Config, layers: nn.Module) -> None:
        generator = torch.Generator().manual_seed(7)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.names = set(config.inputs)
        self.x = normal(BATCH, SEQ, DIM)
        rows, tokens = torch.arange(BATCH)[:, None], torch.arange(SEQ)[None]
        self.valid = torch.ones(BATCH, SEQ, dtype=torch.bool)
        self.prefix = torch.tensor([5, 0, 3])
        self.starts = torch.tensor([0, 4, 2])
        if "left padding" in self.names:
            self.valid = tokens >= self.starts[:, None]
        if "right padding" in self.names:
            self.valid = tokens < torch.tensor([SEQ, SEQ - 3, 7])[:, None]
        # Outputs are compared where a token's own key is visible: of a query that sees no key, the output is 0 here, and may be
        # the mean over all keys in the original.
        self.holes = (tokens * 7 + rows * 3) % 5 != 1
        if "masked keys" in self.names:
            self.valid = self.holes
        self.context = normal(BATCH, CONTEXT, config.options.get("cross_attn_dim_context", DIM))
        lengths = torch.tensor([CONTEXT, 0 if "no context" in self.names else 4, 6])
        self.context_mask = torch.arange(CONTEXT)[None] < lengths[:, None]
        self.context_positions = torch.arange(CONTEXT) * 2 + 1
        self.positions = torch.cumsum(torch.randint(1, 3, (BATCH, SEQ), generator=generator), dim=-1)
        heads = config.options.get("heads", 4)
        mask = torch.rand(heads, SEQ, SEQ, generator=generator) > 0.3
        self.attention_mask = mask | torch.eye(SEQ, dtype=torch.bool)
        self.bias = normal(heads, SEQ, SEQ)
        attentions = [
            block for kind, (_, block, _) in zip(layers.layer_types, layers.layers, strict=True) if kind == "a"
        ]
        self.memories = [normal(BATCH, 3, DIM) for _ in attentions]
        self.memory_masks = [torch.tensor([[True] * 3, [False, True, True], [False] * 3])] * len(attentions)
        shape = (BATCH, config.options.get("attn_kv_heads", heads), 4, 16)
        self.added = [(normal(*shape), normal(*shape)) for _ in attentions]
        self.added_mask = torch.tensor([[True] * 4, [True, False, True, False], [False] * 4])

    def arguments(self, total: int, new: int) -> dict[str, Any]:
        """For the `new` last ones of the first `total` tokens."""
        is_full = new == total
        arguments: dict[str, Any] = {}
        if any(name.startswith("context") for name in self.names):
            arguments["context"] = self.context
        if "context mask" in self.names:
            arguments["context_mask"] = self.context_mask
        if "context positions" in self.names:
            arguments["context_pos"] = self.context_positions
        if "left padding" in self.names:
            arguments["seq_start_pos"] = self.starts
        if "right padding" in self.names:
            arguments["mask" if is_full else "self_attn_kv_mask"] = self.valid[:, :total]
        if "masked keys" in self.names:
            arguments["self_attn_kv_mask"] = self.holes[:, :total]
        if "positions" in self.names:
            arguments["pos"] = self.positions[:, :total]
        if "attention mask" in self.names:
            arguments["attn_mask"] = self.attention_mask[0]
        if "attention mask per head" in self.names:
            arguments["attn_mask"] = self.attention_mask
        if "bias" in self.names:
            arguments["attn_bias"] = self.bias[:, total - new : total, :total]
        if "memories" in self.names:
            arguments["mems"] = self.memories
        if "memory masks" in self.names:
            arguments["mem_masks"] = self.memory_masks
        if "added" in self.names:
            arguments["self_attn_additional_kv"] = self.added
        if "added masks" in self.names:
            arguments["additional_kv_mask"] = self.added_mask
        return arguments


def randomise(layers: nn.Module) -> None:
    """Random numbers in parameters that begin as zeros or ones, so that what they do is seen."""
    generator = torch.Generator().manual_seed(3)
    for p in layers.parameters():
        if p.numel() > 1 and (p == p.flatten()[0]).all():
            p.data += torch.randn(p.shape, generator=generator) * 0.3


def difference(got: Tensor, want: Tensor, valid: Tensor) -> float:
    """The largest one, as a fraction of the largest output or of 1."""
    got, want = got[valid], want[valid]
    if not torch.isfinite(got).all():
        return float("inf")
    return float((got - want).abs().max() / max(1.0, float(want.abs().max())))


def empty_cache(cores: Sequence[Core], inputs: Inputs, arguments: dict[str, Any]) -> LayerIntermediates:
    """Caches without a token; those of the context are complete."""
    caches = []
    for core in cores:
        attention, context = core.attention[0], arguments.get("context")
        if attention.causal or context is None:
            caches.append(Intermediates(cached_kv=core.new_cache(BATCH, core.dims())))
        else:
            positions = arguments.get("context_pos")
            rotary = {} if positions is None else {"context_rotary_pos_emb": int32(positions[None])}
            if rotary:
                rotary["rotary_pos_emb"] = int32(np.zeros((1, 1)))
            caches.append(attention(inputs.x[:, :1], context=context, **rotary)[1])
    return LayerIntermediates(attn_intermediates=caches, cache_length=0)


def in_steps(
    run: Callable[..., Any], inputs: Inputs, chunks: Sequence[int], cache: LayerIntermediates | None
) -> tuple[Tensor, LayerIntermediates]:
    """Outputs of all tokens, computed chunk by chunk."""
    outputs, total = [], 0
    for new in chunks:
        x = inputs.x[:, total : total + new]
        total += new
        options = {} if cache is None else {"cache": cache, "cache_age": new}
        out, cache = run(x, return_hiddens=True, **options, **inputs.arguments(total, new))
        outputs.append(out)
    return torch.cat(outputs, dim=1), cache


def check(c: Context, config: Config, index: int, flash: bool) -> dict[str, float] | None:
    """Differences by what was compared; None if the original has no flash attention for this configuration."""
    torch.manual_seed(index)
    options = {
        "dim": DIM,
        "depth": 3,
        "heads": 4,
        "attn_dim_head": 16,
        "ff_mult": 2,
        "verbose": False,
        **config.options,
    }
    if flash:
        options["attn_flash"] = True
    try:
        original = config.kind(**options)
    except AssertionError:
        if flash:
            return None
        raise
    original.eval()
    randomise(original)
    patched = copy.deepcopy(original)
    cores = install(c, patched, index)
    inputs = Inputs(config, original)

    def run(x: Tensor, **arguments: Any) -> Any:
        return patched(x, **arguments)

    arguments = inputs.arguments(SEQ, SEQ)
    if "prefix" in inputs.names:
        want = original(inputs.x, prefix_attn_len=inputs.prefix, **arguments)
        patched.causal = True
        for core in cores:
            core.attention[0].causal, core.prefix = True, inputs.prefix.numpy()

        def run(x: Tensor, **arguments: Any) -> Any:
            return xt.x_transformers.AttentionLayers.forward(patched, x, **arguments)

    else:
        want = original(inputs.x, **arguments)
    found = {"full": difference(run(inputs.x, **arguments), want, inputs.valid)}
    if config.full_only:
        return found

    prefill = 6
    for core in cores:
        core.chunk = prefill
    steps = [prefill] + [1] * (SEQ - prefill)
    got, _ = in_steps(run, inputs, steps, None)
    found["steps"] = difference(got, want, inputs.valid)
    first = empty_cache(cores, inputs, arguments)
    got_chunks, _ = in_steps(run, inputs, [prefill, 1, 4, SEQ - prefill - 5], first)
    found["chunks"] = difference(got_chunks, want, inputs.valid)
    if config.no_original_cache is None:
        theirs, _ = in_steps(original, inputs, steps, None)
        last = slice(prefill - 1, None)
        found["last tokens"] = difference(got[:, last], theirs[:, last], inputs.valid[:, last])
    return found


# ---------------------------------------------------------------- whole models


def generation(c: Context, flash: bool) -> dict[str, float]:
    """Greedy tokens of prompts of different lengths, and logits, of a language model."""
    torch.manual_seed(1)
    decoder = xt.Decoder(
        dim=DIM,
        depth=3,
        heads=4,
        attn_kv_heads=2,
        attn_dim_head=16,
        attn_flash=flash,
        alibi_pos_bias=True,
        verbose=False,
    )
    original = xt.AutoregressiveWrapper(
        xt.TransformerWrapper(num_tokens=50, max_seq_len=CAPACITY, attn_layers=decoder)
    ).eval()
    patched = copy.deepcopy(original)
    install(c, patched.net.attn_layers, 0)
    prompts = torch.randint(1, 50, (BATCH, 7), generator=torch.Generator().manual_seed(2))
    # The original cuts its caches, which are tensors, to the length of the model, if it is not told to leave them.
    options = {
        "seq_len": 24,
        "temperature": 0.0,
        "prompt_lens": torch.tensor([7, 3, 5]),
        "restrict_to_max_seq_len": False,
    }
    want, got = (model.generate(prompts, **options) for model in (original, patched))
    logits = [model.net(torch.cat((prompts, want), dim=1)) for model in (original, patched)]
    valid = torch.ones(logits[0].shape[:2], dtype=torch.bool)
    return {"tokens": float((want != got).sum()), "logits": difference(logits[1], logits[0], valid)}


def translation(c: Context, flash: bool) -> dict[str, float]:
    """Greedy tokens and logits of an encoder and a decoder, with a padded batch of sources."""
    torch.manual_seed(2)
    sizes = {
        "depth": 2,
        "heads": 4,
        "num_tokens": 50,
        "max_seq_len": CAPACITY,
        "attn_dim_head": 16,
        "attn_flash": flash,
        "verbose": False,
    }
    options = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in sizes.items()}
    original = xt.XTransformer(dim=DIM, dec_cross_attn_kv_heads=2, dec_rotary_pos_emb=True, **options).eval()
    patched = copy.deepcopy(original)
    install(c, patched.encoder.attn_layers, 0)
    install(c, patched.decoder.net.attn_layers, 3)
    source = torch.randint(1, 50, (BATCH, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.arange(11)[None] < torch.tensor([11, 4, 8])[:, None]
    start = torch.ones(BATCH, 1, dtype=torch.long)
    want, got = (
        m.generate(source, start, 20, mask=mask, temperature=0.0, restrict_to_max_seq_len=False)
        for m in (original, patched)
    )
    logits = []
    for model in (original, patched):
        encoded = model.encoder(source, mask=mask, return_embeddings=True)
        logits.append(model.decoder.net(torch.cat((start, want), dim=1), context=encoded, context_mask=mask))
    valid = torch.ones(logits[0].shape[:2], dtype=torch.bool)
    return {"tokens": float((want != got).sum()), "logits": difference(logits[1], logits[0], valid)}


def beam_search(c: Context, flash: bool) -> dict[str, float]:
    """Beam search of two prompts whose caches are reordered at every step, against full passes over each beam's tokens."""
    torch.manual_seed(3)
    beams, steps, layouts = 4, 14, [name for name in LAYOUTS if name != "ragged"]
    # The last layer has a window and a ring.
    windows = (None,) * len(layouts) + (5,)
    decoder = xt.Decoder(
        dim=DIM, depth=len(windows), heads=4, attn_kv_heads=2, attn_dim_head=16, attn_flash=flash, attn_max_attend_past=windows,
        ff_mult=1, rotary_pos_emb=True, rotary_emb_dim=16, verbose=False,
    )  # fmt: skip
    original = xt.TransformerWrapper(num_tokens=50, max_seq_len=CAPACITY, attn_layers=decoder).eval()
    patched = copy.deepcopy(original)
    cores = install(c, patched.attn_layers, 0, layouts)
    if [core.name for core in cores] != [*layouts, "ring"]:
        raise AssertionError(f"layouts {[core.name for core in cores]}")
    prompts = torch.randint(1, 50, (2, 6), generator=torch.Generator().manual_seed(4))
    for core in cores:
        core.chunk = prompts.shape[1]
    tokens = prompts.repeat_interleave(beams, dim=0)
    # At first, the beams of a prompt are one.
    scores = torch.tensor([0.0] + [-torch.inf] * (beams - 1)).repeat(2)
    worst, cache, moved = 0.0, None, 0
    for _ in range(steps):
        logits, cache = patched(tokens, return_intermediates=True, cache=cache)
        want = original(tokens)[:, -1:]
        worst = max(worst, difference(logits[:, -1:], want, torch.ones(len(tokens), 1, dtype=torch.bool)))
        total = (scores[:, None] + logits[:, -1].log_softmax(dim=-1)).reshape(2, -1)
        scores, best = (x.reshape(-1) for x in total.topk(beams, dim=-1))
        parents = best // 50 + torch.arange(2).repeat_interleave(beams) * beams
        tokens = torch.cat((tokens[parents], best[:, None] % 50), dim=1)
        moved += int((parents != torch.arange(len(parents))).sum())
        for intermediates in cache.attn_intermediates:
            intermediates.cached_kv.reorder(int32(parents.numpy()))
    return {"logits": worst, "no beam has moved": float(moved < steps)}


def long_text(c: Context, flash: bool) -> dict[str, float]:
    """A text of more keys than one unit of the library's sums, with heads of 64, in one pass, and its last tokens in steps."""
    torch.manual_seed(4)
    size, prefill = 1400, 1392
    options = {"dim": 128, "depth": 4, "heads": 4, "attn_kv_heads": 2, "attn_flash": flash, "rotary_pos_emb": True}
    windows = (None, None, 300, None)
    decoder = xt.Decoder(**options, ff_mult=1, attn_max_attend_past=windows, rotary_emb_dim=64, verbose=False)
    original = decoder.eval()
    patched = copy.deepcopy(original)
    cores = install(c, patched, 4)
    for core in cores:
        core.capacity = core.chunk = size
    x = torch.randn(1, size, 128, generator=torch.Generator().manual_seed(5))
    want, valid = original(x), torch.ones(1, size, dtype=torch.bool)
    got, cache = patched(x[:, :prefill], return_hiddens=True)
    outputs = [got]
    for at in range(prefill, size):
        got, cache = patched(x[:, at : at + 1], cache=cache, return_hiddens=True)
        outputs.append(got)
    steps = torch.cat(outputs, dim=1)
    return {"full": difference(patched(x), want, valid), "steps": difference(steps, want, valid)}


MODELS = {
    "a long text, a window, rotary, grouped queries": long_text,
    "generation, left padding, absolute positions": generation,
    "encoder and decoder, generation": translation,
    "beam search": beam_search,
}


# ---------------------------------------------------------------- the list of options


def unlisted() -> list[str]:
    """Options of Attention that no configuration has and no list names, and names that are no options."""
    options = set(inspect.signature(Attention.__init__).parameters) - {"self", "dim"}
    # Every configuration has the first ones; options of the stack set the others.
    used = {"heads", "causal", "dim_head", "flash", "learned_value_residual_mix"}
    for config in CONFIGS:
        used |= {name.removeprefix("cross_").removeprefix("attn_") for name in config.options}
    refused = {name for names in INEXPRESSIBLE for name in names.split(", ")}
    listed = used | refused | set(OUTSIDE)
    wrong = [f"the option {name} is in no configuration and no list" for name in sorted(options - listed)]
    page = (kvlane.ROOT / "src" / "docs" / "conformance.md").read_text(encoding="utf-8")
    names = [name for name in (*INEXPRESSIBLE, *INEXPRESSIBLE_ELSEWHERE) if f"| {name} |" not in page.replace("`", "")]
    wrong += [f"src/docs/conformance.md has no row for {name}" for name in names]
    return wrong + [f"{name} is no option" for name in sorted({*refused, *OUTSIDE} - options)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, default=kvlane.LIBRARY, help="libkvlane.so (default: %(default)s)")
    parser.add_argument("--filter", default="", help="only the configurations whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    failures = unlisted()
    passed, worst = 0, 0.0
    with Context(options.library) as c:
        tests: list[tuple[str, Callable[[bool], dict[str, float] | None]]] = [
            (config.name, partial(check, c, config, index)) for index, config in enumerate(CONFIGS)
        ]
        tests += [(name, partial(test, c)) for name, test in MODELS.items()]
        for name, test in tests:
            if options.filter not in name:
                continue
            found = {False: test(False), True: test(True)}
            bad = [
                key
                for differences in found.values()
                for key, value in (differences or {}).items()
                if not value <= LIMIT
            ]
            print(f"{'FAIL' if bad else 'pass'} {name}")
            for flash, differences in found.items():
                if differences is not None:
                    numbers = ", ".join(f"{key} {value:.1e}" for key, value in differences.items())
                    print(f"     {'with' if flash else 'without'} flash attention: {numbers}")
                    worst = max(worst, *differences.values())
            failures += [f"{name}: {', '.join(bad)} above {LIMIT}"] if bad else []
            passed += not bad
        print("What no call of the library expresses:")
        for name, reason in {**INEXPRESSIBLE, **INEXPRESSIBLE_ELSEWHERE}.items():
            print(f"     {name}: {reason}")
        versions = f"x-transformers {version('x-transformers')}, PyTorch {torch.__version__}"
        print(f"{versions}: {len(tests)} configurations at the level {c.isa}, the largest difference is {worst:.1e}")
    print(*failures, sep="\n")
    print(f"{passed} passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
