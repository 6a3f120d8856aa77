#!/usr/bin/env python3
"""Writes minimind_reference.json: what MiniMind's code computes with small models of random weights.

    git clone https://github.com/jingyaogong/minimind && git -C minimind checkout d65ef2c
    pip install -r tests/data/torch_requirements.txt
    python tests/data/make_minimind_reference.py minimind

The weights (`random_weights.py`, names of its checkpoints) need no file. The code is MiniMind's, unchanged. There are two
models: one with a dense feed-forward part, and one with experts, of which two serve a token. A prompt is fed with a cache,
then single tokens. The data has the configuration as its files have it, the logits of every token that was fed, and the cache
at the end. The script checks that all tokens at once, through PyTorch's own attention, give the same logits, and that no
token's second and third expert come so close that rounding could exchange them.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

import random_weights

VOCAB, EXPERTS, USED = 64, 4, 2
PIECES = [7, 1, 1, 1, 1]
LEAST_MARGIN = 0.003


def rounded(values):
    return [float(f"{v:.6g}") for v in np.asarray(values, np.float64).ravel()]


def record(use_moe: bool):
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, MOEFeedForward

    config = MiniMindConfig(
        hidden_size=64,
        num_hidden_layers=2,
        use_moe=use_moe,
        vocab_size=VOCAB,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
        num_experts=EXPERTS,
        num_experts_per_tok=USED,
        moe_intermediate_size=32,
    )
    model = MiniMindForCausalLM(config)
    weights = {}
    for name, parameter in model.state_dict().items():
        shape = tuple(parameter.shape)
        source = "model.embed_tokens.weight" if name == "lm_head.weight" else name
        scale = 2.0**-3 if name.endswith("mlp.gate.weight") else 2.0**-5
        values = random_weights.norm(source, *shape) if len(shape) == 1 else random_weights.matrix(source, shape, scale)
        weights[name] = torch.from_numpy(values)
    model.load_state_dict(weights)
    model.eval()

    margins = []

    def watch(gate, inputs, logits):
        best = torch.softmax(logits, dim=-1).sort(dim=-1).values
        margins.append(float((best[..., -USED] - best[..., -USED - 1]).min()))

    for module in model.modules():
        if isinstance(module, MOEFeedForward):
            module.gate.register_forward_hook(watch)

    total = sum(PIECES)
    for seed in range(100):
        tokens = torch.from_numpy(np.random.default_rng(seed).integers(0, VOCAB, (1, total)))
        margins.clear()
        with torch.inference_mode():
            whole = model(tokens).logits[0]
        if not use_moe or min(margins) >= LEAST_MARGIN:
            break
    else:
        sys.exit("no tokens with sufficient margins")
    logits, past, start = [], None, 0
    with torch.inference_mode():
        for piece in PIECES:
            # One query per new token, and no more.
            out = model(tokens[:, start : start + piece], past_key_values=past, use_cache=True)
            logits.append(out.logits[0])
            past, start = out.past_key_values, start + piece
    logits = torch.cat(logits)
    print(f"cached and whole differ by {(logits - whole).abs().max():.2e}; {margins and min(margins)}", file=sys.stderr)
    memory = torch.stack([part[0] for layer in past for part in layer])
    config.architectures = ["MiniMindForCausalLM"]
    # `to_dict` has what the files have, except for parts that newer versions of transformers rename.
    fields = {key: value for key, value in config.to_dict().items() if value is not None}
    fields["rope_theta"] = config.rope_theta
    keep = "architectures bos_token_id eos_token_id head_dim hidden_act hidden_size intermediate_size "
    keep += "max_position_embeddings moe_intermediate_size norm_topk_prob num_attention_heads num_experts "
    keep += "num_experts_per_tok num_hidden_layers num_key_value_heads rms_norm_eps rope_theta tie_word_embeddings "
    keep += "use_moe vocab_size"
    return {
        "config": {key: fields[key] for key in keep.split()},
        "parameters": {name: list(p.shape) for name, p in model.state_dict().items()},
        "tokens": tokens[0].tolist(),
        "logits": rounded(logits),
        # [layer, keys or values, token, head, element]
        "memory": rounded(memory),
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(folder))
    reference = {
        "original": "jingyaogong/minimind at d65ef2c00ebc6082f9df11541e1b191655eddb00",
        "pieces": PIECES,
        "dense": record(use_moe=False),
        "experts": record(use_moe=True),
    }
    text = json.dumps(reference, separators=(",", ":"))
    for key in ["dense", "experts", "tokens", "logits", "memory", "parameters"]:
        text = text.replace(f'"{key}":', f'\n"{key}":')
    Path(__file__).with_name("minimind_reference.json").write_text(text + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
