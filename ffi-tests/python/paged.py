#!/usr/bin/env python3
"""A server's step with pages: sequences of different lengths, a block table, slots, and prompts and single tokens in one batch.

    python ffi-tests/python/paged.py

Layers keep keys and values in pages [pages, page_size, kv_heads, dim], of which a sequence has some, in any order, as in vLLM. Every
step writes its tokens by their slots and attends over the pages by the table; each output is compared with PyTorch's own attention over
the tokens of its sequence in a row. Needs the wheel of kvlane and PyTorch.
"""
import kvlane
import kvlane.torch as ops
import torch
from torch.nn.functional import scaled_dot_product_attention

HEADS, KV_HEADS, DIM, PAGE, PAGES, MAX_PAGES = 8, 2, 64, 16, 40, 12


class Pages:
    """Which pages are free, and which a sequence has."""

    def __init__(self):
        self.free = torch.randperm(PAGES).tolist()
        self.of = {}
        self.lengths = {}

    def extend(self, name, tokens):
        """The slots of the next tokens of a sequence, which count over all pages."""
        pages, length = self.of.setdefault(name, []), self.lengths.get(name, 0)
        while len(pages) * PAGE < length + tokens:
            pages.append(self.free.pop())
        self.lengths[name] = length + tokens
        return [pages[p // PAGE] * PAGE + p % PAGE for p in range(length, length + tokens)]

    def end(self, name):
        self.free += self.of.pop(name)
        del self.lengths[name]

    def table(self, names):
        # Entries beyond the length of a sequence are never read.
        rows = [self.of[n] + [-1] * (MAX_PAGES - len(self.of[n])) for n in names]
        return torch.tensor(rows, dtype=torch.int32)


def wanted(q, k, v):
    """Attention of the last queries of a sequence, [seq, heads, dim], over all of its tokens."""
    mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    heads_first = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def serve(dtype, bound):
    k_pages, v_pages = (torch.full((PAGES, PAGE, KV_HEADS, DIM), torch.nan, dtype=dtype) for _ in range(2))
    pages, history = Pages(), {}
    # New tokens per sequence and step: prompts come, some in chunks, sequences end, and their pages are others'.
    steps = [{"a": 70, "b": 5}, {"a": 1, "b": 1, "c": 33}, {"a": 1, "b": 1, "c": 40, "d": 100}, *[{"a": 1, "b": 1, "c": 1, "d": 1}] * 12,
             {"a": 1, "d": 1, "e": 90}, *[{"a": 1, "d": 1, "e": 1}] * 20]
    worst = 0.0
    for step in steps:
        for name in set(history) - set(step):
            pages.end(name), history.pop(name)
        names, counts = list(step), list(step.values())
        tokens = sum(counts)
        q, k, v = (torch.randn(1, tokens, h, DIM).to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS))
        slots = torch.tensor([[s for n in names for s in pages.extend(n, step[n])]], dtype=torch.int32)
        ops.kv_write(k, v, k_pages, v_pages, slots=slots, paged=True)
        lengths = torch.tensor([pages.lengths[n] for n in names], dtype=torch.int32)
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0)], dtype=torch.int32)
        out = ops.attention(q, k_pages, v_pages, lengths=lengths, causal=True, block_table=pages.table(names), cu_seqlens_q=starts)
        for name, first, count in zip(names, starts.tolist(), counts):
            own = slice(first, first + count)
            old = history.get(name, (k[0, :0], v[0, :0]))
            history[name] = tuple(torch.cat((before, new[0, own])) for before, new in zip(old, (k, v)))
            error = (out[0, own].float() - wanted(q[0, own], *history[name])).abs().max().item()
            assert error < bound, (dtype, name, error)
            worst = max(worst, error)
    print(f"{len(steps)} steps in {dtype}: within {worst:.1e} of PyTorch's attention")


if __name__ == "__main__":
    torch.manual_seed(2)
    with torch.no_grad():
        for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 3e-2)):
            serve(dtype, bound)
    print(f"kvlane {kvlane.__version__} in PyTorch {torch.__version__}: level {kvlane.isa()}")
