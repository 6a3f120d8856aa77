#!/usr/bin/env python3
"""Writes llama3_reference.json: what Meta's code computes with a small Llama-3 of random weights.

    git clone https://github.com/meta-llama/llama3 && git -C llama3 checkout a0940f9
    pip install -r tests/data/torch_requirements.txt
    python tests/data/make_llama3_reference.py llama3

The weights (`random_weights.py`, names of Meta's checkpoints) need no file. The code is Meta's, unchanged. It asks for
fairscale's parallel layers and for a GPU; a stand-in gives it plain layers for the one process that there is, and leaves
its caches where they are.

Two rows hold a static cache. A prompt is fed at `start_pos` 0, then pieces of it and single tokens at later ones. The data
has the logits of every token that was fed, and what the cache holds at the end. The script checks that the cache was
written in the new tokens' slots alone, and that all tokens at once give the same logits.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch

import random_weights

DIM, LAYERS, HEADS, KV_HEADS, VOCAB, HIDDEN, CONTEXT = 64, 2, 8, 2, 64, 192, 32
ROWS = 2
PIECES = [7, 1, 1, 4, 1, 1, 1]


def stand_in_for_fairscale():
    def linear(inputs, outputs, bias, **_):
        assert not bias
        return torch.nn.Linear(inputs, outputs, bias=False)

    layers = types.ModuleType("fairscale.nn.model_parallel.layers")
    layers.ColumnParallelLinear = layers.RowParallelLinear = linear
    layers.VocabParallelEmbedding = lambda vocab, dim, **_: torch.nn.Embedding(vocab, dim)
    initialize = types.ModuleType("fairscale.nn.model_parallel.initialize")
    initialize.get_model_parallel_world_size = lambda: 1
    for name in ["fairscale", "fairscale.nn", "fairscale.nn.model_parallel"]:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["fairscale.nn.model_parallel"].initialize = initialize
    sys.modules[initialize.__name__], sys.modules[layers.__name__] = initialize, layers
    torch.Tensor.cuda = lambda self: self


def rounded(values):
    return [float(f"{v:.6g}") for v in np.asarray(values, np.float64).ravel()]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    stand_in_for_fairscale()
    # The package's own __init__ imports its tokenizer, which needs more.
    package = types.ModuleType("llama")
    package.__path__ = [str(folder / "llama")]
    sys.modules["llama"] = package
    from llama.model import ModelArgs, Transformer

    model = Transformer(
        ModelArgs(
            dim=DIM,
            n_layers=LAYERS,
            n_heads=HEADS,
            n_kv_heads=KV_HEADS,
            vocab_size=VOCAB,
            multiple_of=64,
            max_batch_size=ROWS,
            max_seq_len=CONTEXT,
        )
    )
    weights = {}
    for name, parameter in model.state_dict().items():
        shape = tuple(parameter.shape)
        values = random_weights.norm(name, *shape) if len(shape) == 1 else random_weights.matrix(name, shape, 2.0**-5)
        weights[name] = torch.from_numpy(values)
    assert weights["layers.0.feed_forward.w1.weight"].shape == (HIDDEN, DIM)
    model.load_state_dict(weights)
    model.eval()

    total = sum(PIECES)
    tokens = torch.from_numpy(np.random.default_rng(3).integers(0, VOCAB, (ROWS, total)))
    caches = lambda: torch.stack([c for l in model.layers for c in (l.attention.cache_k, l.attention.cache_v)])
    logits, start = [], 0
    for piece in PIECES:
        before = caches().clone()
        logits.append(model(tokens[:, start : start + piece], start))
        changed = (caches() != before).any(dim=0).any(dim=3).any(dim=2)
        assert changed.sum() == ROWS * piece and changed[:, start : start + piece].all()
        start += piece
    logits, memory = torch.cat(logits, dim=1), caches()[:, :, :total].clone()
    assert not caches()[:, :, total:].any()
    whole = model(tokens, 0)
    print(f"cached and whole differ by {(logits - whole).abs().max():.2e}", file=sys.stderr)
    reference = {
        "original": "meta-llama/llama3 at a0940f9cf7065d45bb6675660f80d305c041a754",
        "pieces": PIECES,
        "tokens": tokens.tolist(),
        # [row, token, vocabulary]
        "logits": [rounded(row) for row in logits],
        # For each row [layer, keys or values, token, head, element]
        "memory": [rounded(memory[:, row]) for row in range(ROWS)],
    }
    text = json.dumps(reference, separators=(",", ":"))
    Path(__file__).with_name("llama3_reference.json").write_text(text.replace(',"', ',\n"') + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
