#!/usr/bin/env python3
"""The operators of kvlane.torch: against PyTorch's own attention, opcheck, compiled and exported, errors, gradients.

    python ffi-tests/python/torch_ops.py [--inductor]

Needs the wheel of kvlane and PyTorch; with --inductor also a C++ compiler.
"""
import sys
from concurrent.futures import ThreadPoolExecutor

import kvlane
import kvlane.torch as ops
import torch
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(1)
torch._dynamo.config.recompile_limit = 64
BATCH, SEQ, HEADS, KV_HEADS, DIM, CAPACITY, PAGE = 2, 3, 6, 2, 32, 64, 16
TYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of float32's own sums; of a rounding of the output, and where the CPU multiplies bf16, of the weights.
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def refused(kind, text, call, *args, **options):
    try:
        call(*args, **options)
    except kind as error:
        assert text in str(error), f"{error!r} does not say {text!r}"
    else:
        sys.exit(f"no error with {text!r}")


def visible(keys, lengths, seq, starts=None, left=None, right=0):
    """A mask [batch, 1, seq, keys] for PyTorch, by the rules of kvl_attention_params."""
    key, rows = torch.arange(keys), lengths[:, None] - seq + torch.arange(seq)
    shown = key < lengths[:, None, None]
    if starts is not None:
        shown = shown & (key >= starts[:, None, None])
    if right is not None:
        shown = shown & (key <= rows[:, :, None] + right)
    if left is not None:
        shown = shown & (key >= rows[:, :, None] - left)
    return shown.expand(len(lengths), seq, keys)[:, None]


def reference(q, k, v, mask=None, bias=None, scale=None, softcap=0.0, sinks=None):
    """The definition, in float64; attention of PyTorch has neither a softcap nor sinks."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    logits = q @ k.transpose(2, 3) * (scale or q.shape[3] ** -0.5)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias.double()
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        logits = torch.cat((logits, sinks.double()[None, :, None, None].expand(*logits.shape[:3], 1)), dim=3)
    lse = logits.logsumexp(dim=3).transpose(1, 2)
    weights = logits.softmax(dim=3)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2), lse


def close(found, wanted, dtype):
    assert found.dtype == dtype, (found.dtype, dtype)
    error = (found.double() - wanted.double()).abs().max().item()
    assert error < ERROR[dtype], (dtype, error)


def heads_first(*shape, dtype):
    """[batch, seq, heads, dim] that lies in memory as PyTorch's attention has it."""
    batch, seq, heads, dim = shape
    return torch.randn(batch, heads, seq, dim).to(dtype).transpose(1, 2)


def tensors(dtype, seq=SEQ, first=torch.randn):
    if first is torch.randn:
        return tuple(torch.randn(BATCH, n, h, DIM).to(dtype) for n, h in ((seq, HEADS), (CAPACITY, KV_HEADS), (CAPACITY, KV_HEADS)))
    return tuple(first(BATCH, n, h, DIM, dtype=dtype) for n, h in ((seq, HEADS), (CAPACITY, KV_HEADS), (CAPACITY, KV_HEADS)))


def attention_by_options():
    lengths, starts = int32(9, 50), int32(2, 0)
    slopes, sinks = torch.rand(HEADS), torch.randn(HEADS)
    for dtype in TYPES:
        for order in (torch.randn, heads_first):
            q, k, v = tensors(dtype, first=order)
            causal = visible(CAPACITY, lengths, SEQ)
            out = ops.attention(q, k, v, lengths=lengths, causal=True)
            close(out, reference(q, k, v, causal)[0], dtype)
            own = scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=causal, enable_gqa=True).transpose(1, 2)
            close(out, own, dtype)
            assert torch.equal(out, ops.attention(q, k, v, mask=causal.transpose(1, 2))) or dtype == torch.bfloat16
            assert torch.equal(out, ops.attention(q, k, v, lengths=lengths, causal=True, threads=3))
            close(ops.attention(q, k, v, lengths=lengths, kv_starts=starts, causal=True, window_left=4),
                  reference(q, k, v, visible(CAPACITY, lengths, SEQ, starts, 4))[0], dtype)
            close(ops.attention(q, k, v, lengths=lengths, window_left=2, window_right=1),
                  reference(q, k, v, visible(CAPACITY, lengths, SEQ, left=2, right=1))[0], dtype)
            bias = torch.randn(BATCH, SEQ, 1, CAPACITY).to(dtype)
            found, lse = ops.attention_with_lse(q, k, v, lengths=lengths, causal=True, bias=bias, scale=0.3, softcap=5.0, sink_logits=sinks)
            wanted, wanted_lse = reference(q, k, v, causal, bias.transpose(1, 2), 0.3, 5.0, sinks)
            close(found, wanted, dtype)
            assert (lse - wanted_lse).abs().max() < (1e-2 if dtype == torch.bfloat16 else 1e-4)
            distance = torch.arange(CAPACITY) - (lengths[:, None] - SEQ + torch.arange(SEQ))[..., None]
            alibi = slopes[None, :, None, None] * distance[:, None]
            close(ops.attention(q, k, v, lengths=lengths, causal=True, alibi_slopes=slopes), reference(q, k, v, causal, alibi)[0], dtype)
            close(ops.attention(q, k, v, lengths=lengths, causal=True, offsets=lengths - SEQ, high_precision=True), own, dtype)
    # Types of their own, values of another size, ragged queries.
    q, k, v = torch.randn(BATCH, SEQ, HEADS, DIM), *tensors(torch.float16)[1:]
    close(ops.attention(q, k, v[..., :8], lengths=lengths, causal=True), reference(q, k, v[..., :8], visible(CAPACITY, lengths, SEQ))[0],
          torch.float32)
    ragged = ops.attention(q.flatten(0, 1)[None, :4], k, v, lengths=lengths, causal=True, cu_seqlens_q=int32(0, 3, 4))
    assert torch.equal(ragged[0, :3], ops.attention(q[:1], k[:1], v[:1], lengths=lengths[:1], causal=True)[0])
    assert torch.equal(ragged[0, 3:], ops.attention(q[1:, :1], k[1:], v[1:], lengths=lengths[1:], causal=True)[0])


def pages():
    """The same bits from pages as from one cache."""
    lengths, table = int32(9, 50), torch.randperm(2 * CAPACITY // PAGE, dtype=torch.int32).view(BATCH, -1)
    for dtype in TYPES:
        q, k, v = tensors(dtype)
        k_pages, v_pages = (torch.full((2 * CAPACITY // PAGE, PAGE, KV_HEADS, DIM), torch.nan, dtype=dtype) for _ in range(2))
        ops.kv_write(k, v, k_pages, v_pages, positions=int32(0, 0), block_table=table)
        assert torch.equal(k_pages[table.long()].view_as(k), k)
        slots = table.repeat_interleave(PAGE, dim=1) * PAGE + torch.arange(PAGE, dtype=torch.int32).repeat(CAPACITY // PAGE)
        again = torch.zeros_like(k_pages)
        ops.kv_write(k, v, again, torch.zeros_like(v_pages), slots=slots, paged=True)
        assert torch.equal(again, k_pages)
        found = ops.attention(q, k_pages, v_pages, lengths=lengths, causal=True, block_table=table)
        assert torch.equal(found, ops.attention(q, k, v, lengths=lengths, causal=True))


def quantised():
    """Caches with scales: against attention over what they hold, written and in pages, and what a write rounds."""
    lengths, table = int32(9, 50), torch.randperm(2 * CAPACITY // PAGE, dtype=torch.int32).view(BATCH, -1)
    paged = (2 * CAPACITY // PAGE, PAGE, KV_HEADS)
    causal = visible(CAPACITY, lengths, SEQ)
    for kind in (torch.float32, torch.float16):
        # A scale per token and head, computed by the write.
        q, k, v = tensors(torch.float32)
        caches = [torch.zeros(*x.shape, dtype=torch.int8) for x in (k, v)]
        scales = [torch.zeros(x.shape[:3], dtype=kind) for x in (k, v)]
        ops.kv_write(k, v, *caches, positions=int32(0, 0), k_scales=scales[0], v_scales=scales[1])
        held = [cache.float() * scale.float()[..., None] for cache, scale in zip(caches, scales)]
        for x, kept, cache, scale in zip((k, v), held, caches, scales):
            assert (cache.abs().amax(dim=3) == 127).all()
            assert ((x - kept).abs() <= 0.51 * scale.float()[..., None]).all()
        out, lse = ops.attention_with_lse(q, *caches, lengths=lengths, causal=True, k_scales=scales[0], v_scales=scales[1])
        wanted, wanted_lse = reference(q, *held, causal)
        close(out, wanted, torch.float32)
        assert (lse - wanted_lse).abs().max() < 1e-4
        # The same bits from pages, whose scales lie in pages too, in an order of their own.
        pages = [torch.zeros(*paged, DIM, dtype=torch.int8) for _ in range(2)]
        of_pages = [torch.zeros(paged[0], paged[2], paged[1], dtype=kind).transpose(1, 2) for _ in range(2)]
        ops.kv_write(k, v, *pages, positions=int32(0, 0), block_table=table, k_scales=of_pages[0], v_scales=of_pages[1])
        assert torch.equal(of_pages[0][table.long()].reshape(scales[0].shape), scales[0])
        found = ops.attention(q, *pages, lengths=lengths, causal=True, block_table=table, k_scales=of_pages[0], v_scales=of_pages[1])
        assert torch.equal(found, out)
        for eight in (torch.float8_e4m3fn, torch.float8_e5m2):
            # Static ones, for the tensor and for each head, and a cache without any.
            for static in (torch.tensor(0.25, dtype=kind), torch.tensor([0.25, 2.0], dtype=kind), None):
                caches = [torch.zeros(*x.shape, dtype=torch.uint8).view(eight) for x in (k, v)]
                kept = None if static is None else static.clone()
                ops.kv_write(k, v, *caches, positions=int32(0, 0), k_scales=static, v_scales=static)
                assert static is None or torch.equal(static, kept)
                factor = 1.0 if static is None else static.float().expand(KV_HEADS)[:, None]
                for x, cache in zip((k, v), caches):
                    assert torch.equal(cache.view(torch.uint8), (x / factor).to(eight).view(torch.uint8))
                out = ops.attention(q, *caches, lengths=lengths, causal=True, k_scales=static, v_scales=static)
                close(out, reference(q, *(cache.float() * factor for cache in caches), causal)[0], torch.float32)
    # Keys and values of formats of their own.
    mixed = ops.attention(q, held[0], caches[1], lengths=lengths, causal=True, v_scales=torch.tensor([0.5]))
    close(mixed, reference(q, held[0], caches[1].float() * 0.5, causal)[0], torch.float32)
    # Blocks of ggml, in either order of the axes and in pages.
    for format, (unit, numbers) in BLOCKS.items():
        for order in (lambda *shape: torch.zeros(*shape, dtype=torch.uint8), lambda *shape: heads_first(*shape, dtype=torch.uint8)):
            caches = [order(BATCH, CAPACITY, KV_HEADS, unit * DIM // 32) for _ in range(2)]
            formats = {"k_format": format, "v_format": format}
            ops.kv_write(k, v, *caches, positions=int32(0, 0), **formats)
            held = [numbers(cache) for cache in caches]
            for x, kept in zip((k, v), held):
                assert ((x - kept).abs() <= x.abs().amax(dim=3, keepdim=True) / (7.9 if unit == 18 else 230)).all(), format
            out = ops.attention(q, *caches, lengths=lengths, causal=True, **formats)
            close(out, reference(q, *held, causal)[0], torch.float32)
            with torch.enable_grad():
                assert torch.equal(out, ops.attention(q, *caches, lengths=lengths, causal=True, **formats))
        pages = [torch.zeros(*paged, unit, dtype=torch.uint8) for _ in range(2)]
        ops.kv_write(k, v, *pages, positions=int32(0, 0), block_table=table, **formats)
        assert torch.equal(ops.attention(q, *pages, lengths=lengths, causal=True, block_table=table, **formats), out)
        # Values alone.
        close(ops.attention(q, k, caches[1], lengths=lengths, causal=True, v_format=format), reference(q, k, held[1], causal)[0], torch.float32)


def q8_0(blocks):
    blocks = blocks.contiguous().unflatten(3, (-1, 34))
    return (blocks[..., :2].contiguous().view(torch.float16).float() * blocks[..., 2:].view(torch.int8).float()).flatten(3)


def q4_0(blocks):
    blocks = blocks.contiguous().unflatten(3, (-1, 18))
    halves = torch.cat((blocks[..., 2:] & 15, blocks[..., 2:] >> 4), dim=-1)
    return (blocks[..., :2].contiguous().view(torch.float16).float() * (halves.float() - 8)).flatten(3)


# The bytes of a block, and what they stand for.
BLOCKS = {"q8_0": (34, q8_0), "q4_0": (18, q4_0)}


def turned(x, inv_freq, positions, interleaved):
    angle = positions[..., None].double() * inv_freq
    cos, sin = (f(angle)[:, :, None] for f in (torch.cos, torch.sin))
    n = 2 * len(inv_freq)
    rotary, rest = x[..., :n].double(), x[..., n:].double()
    if interleaved:
        a, b = rotary[..., ::2], rotary[..., 1::2]
        rotary = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)
    else:
        a, b = rotary.chunk(2, dim=-1)
        rotary = torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    return torch.cat((rotary, rest), dim=-1)


def rotations():
    inv_freq = torch.from_numpy(kvlane.rope_frequencies(24)[0])
    first = int32(7, 1000)
    every = first[:, None] + torch.arange(SEQ, dtype=torch.int32)
    for dtype in TYPES:
        for order in (torch.randn, heads_first):
            x = tensors(dtype, first=order)[0]
            for interleaved in (False, True):
                found = ops.rope(x, inv_freq, first, interleaved=interleaved)
                close(found, turned(x, inv_freq, every, interleaved), dtype)
                assert torch.equal(found, ops.rope(x, inv_freq, every, interleaved=interleaved))
                here = x.clone()
                ops.rope_(here, inv_freq, first, interleaved=interleaved)
                assert torch.equal(found, here)
    # On the way into the cache, with a norm.
    k, v = (torch.randn(BATCH, SEQ, KV_HEADS, DIM) for _ in range(2))
    weight = torch.rand(DIM)
    k_cache, v_cache = (torch.zeros(BATCH, CAPACITY, KV_HEADS, DIM) for _ in range(2))
    ops.kv_write(k, v, k_cache, v_cache, positions=int32(5, 20), inv_freq=inv_freq, k_norm=weight, k_norm_eps=1e-5)
    normed = torch.nn.functional.rms_norm(k, (DIM,), weight, 1e-5)
    wanted = turned(normed, inv_freq, int32(5, 20)[:, None] + torch.arange(SEQ), False)
    for b, n in enumerate((5, 20)):
        close(k_cache[b, n : n + SEQ], wanted[b], torch.float32)
        assert torch.equal(v_cache[b, n : n + SEQ], v[b])
    assert k_cache.count_nonzero() == k.numel()


def opchecks():
    """PyTorch's checks of schemas, fake kernels and tracing."""
    inv_freq = torch.from_numpy(kvlane.rope_frequencies(24)[0])
    lengths, starts, table = int32(9, 50), int32(2, 0), torch.arange(8, dtype=torch.int32).view(2, 4)
    check = torch.library.opcheck
    for dtype in TYPES:
        q, k, v = tensors(dtype)
        hf = tensors(dtype, first=heads_first)
        for operator in (torch.ops.kvlane.attention.default, torch.ops.kvlane.attention_with_lse.default):
            check(operator, (q, k, v), {"lengths": lengths, "causal": True})
        check(torch.ops.kvlane.attention.default, hf, {"kv_starts": starts, "causal": True, "window_left": 4, "softcap": 5.0})
        check(torch.ops.kvlane.attention.default, (q, k, v), {"mask": torch.ones(BATCH, 1, 1, CAPACITY, dtype=torch.bool)})
        check(torch.ops.kvlane.attention.default, (q, k.view(8, PAGE, KV_HEADS, DIM), v.view(8, PAGE, KV_HEADS, DIM)),
              {"lengths": lengths, "block_table": table, "sink_logits": torch.zeros(HEADS)})
        new, cache = q[:, :, :KV_HEADS], (k.clone(), v.clone())
        check(torch.ops.kvlane.kv_write.default, (new, new, *cache), {"positions": lengths})
        check(torch.ops.kvlane.kv_write.default, (new, new, *cache), {"positions": lengths, "inv_freq": inv_freq, "k_norm": torch.ones(DIM)})
        check(torch.ops.kvlane.kv_write.default, (new, new, *(x.view(8, PAGE, KV_HEADS, DIM) for x in cache)),
              {"slots": int32(5, -1, 7, 40, 41, 127).view(2, 3), "paged": True})
        per_token = {"k_scales": torch.rand(BATCH, CAPACITY, KV_HEADS), "v_scales": torch.rand(BATCH, CAPACITY, KV_HEADS)}
        static = {"k_scales": torch.tensor(0.5), "v_scales": torch.rand(KV_HEADS) + 0.5}
        for of, scales in ((torch.int8, per_token), (torch.float8_e4m3fn, static), (torch.float8_e5m2, {})):
            cache, utils = [(8 * x).to(of) for x in (k, v)], ["test_autograd_registration", "test_faketensor"]
            if of == torch.int8:
                # PyTorch compares what an operator has changed by arithmetic that it does not have for floats of eight bits.
                utils += ["test_schema", "test_aot_dispatch_dynamic"]
            check(torch.ops.kvlane.kv_write.default, (new, new, *cache), {"positions": lengths, **scales}, test_utils=utils)
            for operator in (torch.ops.kvlane.attention.default, torch.ops.kvlane.attention_with_lse.default):
                check(operator, (q, *cache), {"lengths": lengths, **scales}, test_utils=utils)
        cache, formats = [torch.zeros(BATCH, CAPACITY, KV_HEADS, 34, dtype=torch.uint8) for _ in range(2)], {"k_format": "q8_0", "v_format": "q8_0"}
        check(torch.ops.kvlane.kv_write.default, (new, new, *cache), {"positions": lengths, **formats})
        check(torch.ops.kvlane.attention.default, (q, *cache), {"lengths": lengths, **formats})
        check(torch.ops.kvlane.rope.default, (q, inv_freq, lengths))
        check(torch.ops.kvlane.rope_.default, (q.clone(), inv_freq, lengths), {"interleaved": True})


class Step(torch.nn.Module):
    """A layer's step over its cache, which holds the model's type or another one."""

    def __init__(self, dtype, cache=None):
        super().__init__()
        cache = cache or dtype
        self.project = torch.nn.Linear(64, (HEADS + 2 * KV_HEADS) * DIM, dtype=dtype)
        self.register_buffer("k_cache", torch.zeros(BATCH, CAPACITY, KV_HEADS, DIM).to(cache))
        self.register_buffer("v_cache", torch.zeros(BATCH, CAPACITY, KV_HEADS, DIM).to(cache))
        self.register_buffer("inv_freq", torch.from_numpy(kvlane.rope_frequencies(DIM)[0]))
        per_token = cache == torch.int8
        self.register_buffer("k_scales", torch.zeros(BATCH, CAPACITY, KV_HEADS) if per_token else None)
        self.register_buffer("v_scales", torch.zeros(BATCH, CAPACITY, KV_HEADS) if per_token else None)
        if cache == torch.float8_e4m3fn:
            self.k_scales = self.v_scales = torch.tensor([0.5, 0.25])

    def forward(self, x, lengths):
        scales = {"k_scales": self.k_scales, "v_scales": self.v_scales}
        q, k, v = self.project(x).unflatten(2, (-1, DIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=2)
        ops.kv_write(k, v, self.k_cache, self.v_cache, positions=lengths, inv_freq=self.inv_freq, **scales)
        q = ops.rope(q, self.inv_freq, lengths)
        return ops.attention(q, self.k_cache, self.v_cache, lengths=lengths + x.shape[1], causal=True, **scales).flatten(2)


@torch.no_grad()
def compiled(backends):
    for dtype in TYPES:
        step = Step(dtype)
        prompt, token = torch.randn(BATCH, 5, 64, dtype=dtype), torch.randn(BATCH, 1, 64, dtype=dtype)

        def run(call):
            step.k_cache.zero_(), step.v_cache.zero_()
            outputs = [call(prompt, int32(0, 3)), call(token, int32(5, 8)), call(token, int32(6, 9))]
            return outputs, step.k_cache.clone(), step.v_cache.clone()

        wanted, k, v = run(step)
        for backend in backends if dtype == torch.float32 else backends[:1]:
            found, found_k, found_v = run(torch.compile(step, backend=backend, fullgraph=True))
            for a, b in zip((*found, found_k, found_v), (*wanted, k, v)):
                close(a, b, dtype)
        exported = torch.export.export(step, (prompt, int32(0, 3)), dynamic_shapes={"x": {1: torch.export.Dim("seq", max=CAPACITY)}, "lengths": {}})
        names = [str(node.target) for node in exported.graph.nodes]
        assert any("kvlane.attention" in n for n in names) and any("kvlane.kv_write" in n for n in names), names
        program = exported.module()
        found = program(prompt, int32(0, 3))
        close(found, wanted[0], dtype)
        assert torch.equal(program.k_cache[0, :5], k[0, :5])
    # A cache with scales is written in place by a compiled step too.
    for cache in (torch.int8, torch.float8_e4m3fn):
        step = Step(torch.float32, cache)
        for backend in backends:
            call = torch.compile(step, backend=backend, fullgraph=True)
            found, held = [], []
            for run in (step, call):
                step.k_cache.zero_()
                found.append(run(prompt.float(), int32(0, 3)))
                held.append((step.k_cache.clone(), step.k_scales.clone()))
            close(found[1], found[0], torch.float32)
            assert torch.equal(held[0][0].view(torch.uint8), held[1][0].view(torch.uint8)) and held[0][0].float().count_nonzero() > 0
            assert torch.equal(held[0][1], held[1][1])
        exported = torch.export.export(step, (prompt.float(), int32(0, 3)))
        close(exported.module()(prompt.float(), int32(0, 3)), found[0], torch.float32)


def errors():
    q, k, v = tensors(torch.float32)
    lengths = int32(9, 50)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            refused(kvlane.Error, "softcap", ops.attention, q, k, v, softcap=-1.0)
            refused(kvlane.Error, "16", ops.attention, q[..., :16], k, v)
            refused(kvlane.Error, str(CAPACITY + 1), ops.attention, q, k, v, lengths=int32(1, CAPACITY + 1))
            refused(TypeError, "lengths is torch.int64", ops.attention, q, k, v, lengths=lengths.long())
            refused(TypeError, "list with gaps", ops.attention, q, k, v, lengths=int32(1, 2, 3, 4)[::2])
            refused(ValueError, "(3,), but (2,)", ops.attention, q, k, v, lengths=int32(1, 2, 3))
            refused(TypeError, "q is torch.float64", ops.attention, q.double(), k, v)
            blocks = torch.zeros(BATCH, CAPACITY, KV_HEADS, 34, dtype=torch.uint8)
            refused(TypeError, "k is torch.uint8, which is none of", ops.attention, q, blocks, v)
            refused(TypeError, "k is torch.float32, but a cache in q8_0 is torch.uint8", ops.attention, q, k, v, k_format="q8_0")
            refused(ValueError, "v_format is 'q3_0', which is none of q8_0", ops.attention, q, k, blocks, v_format="q3_0")
            refused(ValueError, "a block of q8_0 is 34 bytes", ops.attention, q, blocks[..., :33], v, k_format="q8_0")
            refused(ValueError, "a block of q4_0 is 18 bytes", ops.attention, q, blocks[..., :18], v, k_format="q4_0")
            refused(ValueError, "v_format is 'int8'", ops.kv_write, k, v, k.clone(), blocks, positions=lengths, v_format="int8")
            refused(TypeError, "mask is torch.float32", ops.attention, q, k, v, mask=torch.ones(1, 1, 1, CAPACITY))
            refused(kvlane.Error, str(CAPACITY), ops.kv_write, q[:, :, :2], q[:, :, :2], k, v, positions=int32(0, CAPACITY - 1))
            eight, of_tokens = k.to(torch.int8), torch.ones(BATCH, CAPACITY, KV_HEADS)
            refused(kvlane.Error, "k is int8, but has no scales", ops.attention, q, eight, v)
            refused(kvlane.Error, "k is f32, which has no scales, but scales are given", ops.attention, q, k, v, k_scales=of_tokens)
            refused(ValueError, f"(2, {CAPACITY - 1}, 2), but", ops.attention, q, eight, v, k_scales=of_tokens[:, 1:])
            refused(TypeError, "k_scales is torch.bfloat16", ops.attention, q, eight, v, k_scales=of_tokens.bfloat16())
            refused(ValueError, "needs one element or (2,)", ops.attention, q, k.to(torch.float8_e5m2), v, k_scales=torch.ones(3))
            refused(kvlane.Error, "scales", ops.kv_write, q[:, :, :2], q[:, :, :2], eight, v, positions=lengths)
            refused(ValueError, "rope_positions", ops.kv_write, k, v, k, v, slots=torch.zeros(2, CAPACITY, dtype=torch.int32),
                    inv_freq=torch.ones(4, dtype=torch.float64))
    # Nothing has a gradient, and nothing loses one silently.
    weight = torch.ones(DIM, requires_grad=True)
    out = ops.attention(q * weight, k, v, lengths=lengths)
    assert torch.equal(out.detach(), ops.attention(q, k, v, lengths=lengths)) and out.requires_grad
    refused(RuntimeError, "kvlane::attention has no gradient", out.sum().backward)
    refused(RuntimeError, "kvlane::rope has no gradient", ops.rope(q * weight, torch.ones(4, dtype=torch.float64), lengths).sum().backward)
    refused(RuntimeError, "writes k_cache, which requires a gradient", ops.kv_write, q[:, :, :2], q[:, :, :2], k * weight, v, positions=lengths)
    refused(RuntimeError, "writes k_scales, which requires a gradient", ops.kv_write, q[:, :, :2], q[:, :, :2], eight, v, positions=lengths,
            k_scales=of_tokens.requires_grad_())
    # A backward pass that needs what a write has changed says so, too.
    with torch.no_grad():
        cache = k.clone()
    product = (cache * weight).sum()
    with torch.no_grad():
        ops.kv_write(q[:, :, :2], q[:, :, :2], cache, v, positions=lengths)
    refused(RuntimeError, "modified by an inplace operation", product.backward)


def threads_and_modes():
    """Threads of the caller at once, and inference mode, whose tensors count no versions."""
    q, k, v = tensors(torch.float32, seq=40)
    wanted = ops.attention(q, k, v, causal=True)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda i: ops.attention(q, k, v, causal=True, threads=1 + i % 2), range(40)):
            assert torch.equal(found, wanted)
    with torch.inference_mode():
        own = k.clone()
        for cache in (k, own):
            ops.kv_write(q[:, :1, :KV_HEADS], q[:, :1, :KV_HEADS], cache, v.clone(), positions=int32(3, 4))
        assert torch.equal(k, own)


if __name__ == "__main__":
    with torch.no_grad():
        attention_by_options()
        pages()
        quantised()
        rotations()
        opchecks()
        threads_and_modes()
    compiled(["eager", "aot_eager", *(["inductor"] if "--inductor" in sys.argv else [])])
    errors()
    print(f"kvlane {kvlane.__version__} in PyTorch {torch.__version__}: level {kvlane.isa()}, {torch.get_num_threads()} threads")
