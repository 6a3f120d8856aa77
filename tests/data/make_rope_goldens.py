#!/usr/bin/env python3
"""Writes rope_goldens.txt: frequencies and attention factors of RoPE scaling as Hugging Face transformers computes them.

    python3 tests/data/make_rope_goldens.py > tests/data/rope_goldens.txt

Needs transformers (5.x) and torch. A line is a name, `key=value` parameters as in `RopeScaling`, and after `|` the factor
on cosines and sines and the frequencies. transformers computes in f32, so the numbers are good to about 1e-6.
"""
import math

import torch
import transformers
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


def config(head_dim, theta, scaling, partial=1.0, max_positions=131072):
    rope = {"rope_theta": theta, "partial_rotary_factor": partial, **scaling}
    c = LlamaConfig(
        hidden_size=head_dim * 4, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=max_positions,
        rope_parameters=rope,
    )
    return c


def line(name, params, c, kind, **kwargs):
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](c, torch.device("cpu"), **kwargs)
    fields = " ".join(f"{k}={v}" for k, v in params.items())
    numbers = " ".join(repr(float(x)) for x in inv_freq)
    print(f"{name} {fields} | {float(factor)!r} {numbers}")


print(f"# transformers {transformers.__version__}; see make_rope_goldens.py")

for dim, base in ((64, 10000.0), (128, 500000.0)):
    for factor in (2.0, 4.0):
        c = config(dim, base, {"rope_type": "linear", "factor": factor})
        line("linear", {"dim": dim, "base": base, "factor": factor}, c, "linear")

# "dynamic" NTK is the NTK base at the factor that the length asks for: factor * length / original - (factor - 1).
for dim, base, factor, length in ((64, 10000.0, 2.0, 8192), (128, 10000.0, 4.0, 16384)):
    c = config(dim, base, {"rope_type": "dynamic", "factor": factor}, max_positions=4096)
    effective = factor * length / 4096 - (factor - 1)
    line("ntk", {"dim": dim, "base": base, "factor": effective}, c, "dynamic", seq_len=length)

for dim, base, factor, low, high, original in (
    (128, 500000.0, 8.0, 1.0, 4.0, 8192),
    (64, 500000.0, 32.0, 1.0, 4.0, 8192),
):
    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    params = {"dim": dim, "base": base, "factor": factor, "low": low, "high": high, "original": original}
    line("llama3", params, config(dim, base, scaling), "llama3")

for dim, base, factor, original, fast, slow, attention, truncate in (
    (128, 10000.0, 4.0, 4096, 32.0, 1.0, None, True),
    (64, 10000.0, 40.0, 4096, 32.0, 1.0, 1.0, True),
    (128, 1000000.0, 4.0, 32768, 32.0, 1.0, None, True),
    (64, 150000.0, 32.0, 4096, 32.0, 1.0, None, False),
    (96, 10000.0, 16.0, 2048, 16.0, 2.0, None, False),
):
    scaling = {
        "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "beta_fast": fast,
        "beta_slow": slow, "truncate": truncate,
    }
    if attention is not None:
        scaling["attention_factor"] = attention
    params = {"dim": dim, "base": base, "factor": factor, "original": original, "fast": fast, "slow": slow,
              "truncate": int(truncate)}
    if attention is not None:
        params["attention"] = attention
    line("yarn", params, config(dim, base, scaling, max_positions=int(original * factor)), "yarn")

for dim, base, original, maximum in ((96, 10000.0, 4096, 131072), (64, 10000.0, 4096, 8192)):
    half = dim // 2
    short = [round(1.0 + 0.01 * i, 4) for i in range(half)]
    long = [round(1.0 + 0.02 * i * i, 4) for i in range(half)]
    factor = maximum / original
    for name, factors, length in (("short", short, original), ("long", long, maximum)):
        scaling = {
            "rope_type": "longrope", "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": original, "factor": factor,
        }
        params = {"dim": dim, "base": base, "factor": factor, "original": original,
                  "factors": ",".join(str(x) for x in factors)}
        line("longrope", params, config(dim, base, scaling, max_positions=maximum), "longrope", seq_len=length)
