#!/usr/bin/env python3
"""Tokens per second of a Hugging Face model that decodes, with kvlane and with PyTorch's own attention, in turns in one process.

    python benches/peers/hf_decode.py [MODEL] [--context 4096,16384] [--threads N] [--dtype float32] [--batch N] [--steps N] [--types int8,q4_0]

MODEL is a directory or a GGUF file; without one it is a Llama of 135 million random weights. Caches are filled with random numbers up to
the context. A row is the median of the steps of one implementation; ratios are to `sdpa` with its default cache, DynamicCache. The last row,
whose attention returns its queries and whose cache keeps nothing, is what the rest of the model takes.

Needs the wheel of kvlane, PyTorch and transformers.
"""

import argparse
import statistics
import time
from pathlib import Path

import kvlane.hf
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

parser = argparse.ArgumentParser()
parser.add_argument("model", nargs="?", type=Path)
parser.add_argument("--context", default="4096,16384")
parser.add_argument("--threads", type=int, default=torch.get_num_threads())
parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
parser.add_argument("--batch", type=int, default=1)
parser.add_argument("--steps", type=int, default=15)
parser.add_argument("--types", default="int8,q4_0", help="quantised caches, too")
options = parser.parse_args()


def load():
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=32768,
            tie_word_embeddings=True,
        )
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    if options.model.suffix == ".gguf":
        return AutoModelForCausalLM.from_pretrained(
            options.model.parent, gguf_file=options.model.name, dtype=dtype
        ).eval()
    return AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()


def filled(cache, config, context):
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    states = torch.randn(2, options.batch, config.num_key_value_heads, context, dim).to(getattr(torch, options.dtype))
    for layer in range(config.num_hidden_layers):
        cache.update(states[0], states[1], layer)
    return cache


class Nothing(DynamicCache):
    def update(self, keys, values, *args, **kwargs):
        return keys, values


@torch.no_grad()
def main():
    torch.set_num_threads(options.threads)
    kvlane.hf.register()
    AttentionInterface.register("none", lambda module, query, key, value, mask, **rest: (query.transpose(1, 2), None))
    AttentionMaskInterface.register("none", lambda *args, **kwargs: None)
    model = load()
    config = model.config.get_text_config()
    torch.manual_seed(1)
    token = torch.randint(1, 1000, (options.batch, 1))
    print(
        f"{config.model_type}, {options.dtype}, batch {options.batch}, {options.threads} threads, {kvlane.isa()}, PyTorch {torch.__version__}"
    )
    for context in map(int, options.context.split(",")):
        room = context + options.steps + 2
        runs = {
            "sdpa, DynamicCache": ("sdpa", filled(DynamicCache(config=config), config, context)),
            "sdpa, StaticCache": ("sdpa", filled(StaticCache(config, room), config, context)),
            "kvlane, DynamicCache": ("kvlane", filled(DynamicCache(config=config), config, context)),
            "kvlane, Cache": ("kvlane", filled(kvlane.hf.Cache(config, room), config, context)),
        }
        if options.dtype == "float32":
            runs["kvlane, Cache, f16"] = "kvlane", filled(kvlane.hf.Cache(config, room, torch.float16), config, context)
        for kind in options.types.split(","):
            if kind:
                runs[f"kvlane, {kind}"] = "kvlane", filled(kvlane.hf.Cache(config, room, k_type=kind, v_type=kind), config, context)
        runs["nothing"] = "none", Nothing(config=config)
        seconds = {name: [] for name in runs}
        for step in range(-1, options.steps):
            for name, (implementation, cache) in runs.items():
                model.config._attn_implementation = implementation
                start = time.perf_counter()
                model(token, cache=cache, use_cache=True)
                if step >= 0:
                    seconds[name].append(time.perf_counter() - start)
        base = statistics.median(seconds["sdpa, DynamicCache"])
        for name, times in seconds.items():
            median = statistics.median(times)
            print(f"{context:6} {name:20} {options.batch / median:7.2f} tokens/s  {base / median:5.2f} x")


main()
