#!/usr/bin/env python3
"""kvlane.hf in models of Hugging Face transformers: the tokens of `eager` and `sdpa`, with every cache, padding, beams, guesses, windows.

    python ffi-tests/python/hf.py [--smollm2 FILE.gguf] [--gemma3 FILE.gguf]

Small models of random weights are always tried; those files, if they are given. Needs the wheel of kvlane, PyTorch and transformers,
and for files gguf and accelerate.
"""
import argparse
import copy
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import kvlane
import kvlane.hf
import torch
import transformers
from transformers import (AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, DynamicCache, Gemma2Config, Gemma2ForCausalLM,
                          Gemma3TextConfig, Gemma3ForCausalLM, GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM, StaticCache)
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

SIZES = {"vocab_size": 199, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2, "max_position_embeddings": 512}
HYBRID = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_hidden_layers": 3}
torch.manual_seed(3)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
kvlane.hf.register()


def refused(kind, text, call, *args, **options):
    try:
        call(*args, **options)
    except kind as error:
        assert text in str(error), f"{error!r} does not say {text!r}"
    else:
        raise AssertionError(f"no error with {text!r}")


def small_models():
    """Grouped queries; windows that are shorter than the texts, a scale of their own, a softcap; sinks."""
    yield "llama", LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2))
    yield "gemma3", Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **HYBRID, query_pre_attn_scalar=20, attn_logit_softcapping=None))
    yield "gemma2", Gemma2ForCausalLM(Gemma2Config(**SIZES, **HYBRID, query_pre_attn_scalar=20, attn_logit_softcapping=3.0))
    yield "gpt_oss", GptOssForCausalLM(GptOssConfig(**{**SIZES, **HYBRID}, num_local_experts=2, num_experts_per_tok=1))


def implementations(name):
    # Neither a softcap nor sinks are in PyTorch's attention.
    return ("eager",) if name in ("gemma2", "gpt_oss") else ("eager", "sdpa")


def caches(config, room):
    yield "DynamicCache", lambda: DynamicCache(config=config)
    yield "StaticCache", lambda: StaticCache(config, room)
    yield "Cache", lambda: kvlane.hf.Cache(config)
    yield "Cache with room", lambda: kvlane.hf.Cache(config, room)


def padded(prompts, pad, side="left"):
    longest = max(map(len, prompts))
    rows = [(longest - len(p)) * [pad] + p if side == "left" else p + (longest - len(p)) * [pad] for p in prompts]
    shown = [(longest - len(p)) * [0] + len(p) * [1] if side == "left" else len(p) * [1] + (longest - len(p)) * [0] for p in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(shown)}


def generated(model, implementation, inputs, **options):
    model.set_attn_implementation(implementation)
    kind = {"do_sample": False, "min_new_tokens": options.get("max_new_tokens", 24), "max_new_tokens": 24}
    return model.generate(**inputs, **{**kind, **options})


def tokens(name, model, prompts, new=12, beams=3):
    """Every way of generation against the other implementations."""
    config, pad = model.config.get_text_config(), model.config.pad_token_id or 0
    longest = max(map(len, prompts))
    batch = padded(prompts, pad)
    tried = 0
    for inputs in (padded(prompts[:1], pad), batch):
        wanted, *same = (generated(model, implementation, inputs, max_new_tokens=new) for implementation in implementations(name))
        for cache, make in caches(config, longest + new):
            found = generated(model, "kvlane", inputs, max_new_tokens=new, cache=make())
            assert all(torch.equal(found, x) for x in (wanted, *same)), (name, cache, found, wanted, same)
            tried += 1
    # A cache of ours serves other implementations, too.
    assert torch.equal(generated(model, "eager", batch, max_new_tokens=new, cache=kvlane.hf.Cache(config)), wanted), name
    # Padding changes nothing: each prompt by itself has the tokens that it has in the batch.
    for prompt, row in zip(prompts, generated(model, "kvlane", batch, max_new_tokens=new, cache=kvlane.hf.Cache(config))):
        alone = generated(model, "kvlane", padded([prompt], pad), max_new_tokens=new, cache=kvlane.hf.Cache(config))[0]
        assert torch.equal(alone[len(prompt):], row[longest:]), (name, "padding", alone, row)
    # Beams, several of a sequence, sampling with one seed, guesses of a smaller model and of the text itself.
    first = padded(prompts[:1], pad)
    assistant = copy.deepcopy(model)
    with torch.no_grad():
        assistant.get_output_embeddings().weight.add_(0.02 * torch.randn_like(assistant.get_output_embeddings().weight))
    ways = {"beams": (batch, {"num_beams": beams, "num_return_sequences": 2}), "prompt lookup": (first, {"prompt_lookup_num_tokens": 3}),
            "assistant": (first, {"assistant_model": assistant}), "sampling": (batch, {"do_sample": True, "top_k": 20}),
            "chunked prompt": (batch, {"prefill_chunk_size": 5})}
    for way, (inputs, options) in ways.items():
        results = []
        for implementation in (*implementations(name), "kvlane", "own"):
            own = {"cache": kvlane.hf.Cache(config)} if implementation == "own" else {}
            if way == "assistant":
                assistant.set_attn_implementation("kvlane" if own else implementation)
            torch.manual_seed(5)
            results.append(generated(model, "kvlane" if own else implementation, inputs, max_new_tokens=new, **options, **own))
        for found in results[1:]:
            assert torch.equal(found, results[0]), (name, way, results)
        tried += 2
    print(f"{name}: {tried} generations have the tokens of {' and '.join(implementations(name))}")


@torch.no_grad()
def logits(name, model):
    """One pass over padded batches, padding on either side and between tokens, with a mask of one's own, and without a cache."""
    ids = torch.randint(3, 199, (3, 40))
    shown = torch.ones_like(ids)
    shown[1, :11], shown[2, :3] = 0, 0
    right, holes = shown.flip(1), shown.clone()
    holes[0, 10:20] = 0
    own = torch.zeros(3, 1, 40, 40).masked_fill(torch.rand(3, 1, 40, 40) < 0.3, torch.finfo(torch.float32).min)
    own[..., 0] = 0
    worst = 0.0
    for attention_mask in (None, shown, right, holes, own, own == 0):
        results = []
        for implementation in ("eager", "kvlane"):
            model.set_attn_implementation(implementation)
            if attention_mask is not None and attention_mask.dtype == torch.bool and implementation == "eager":
                given = torch.zeros(1).where(attention_mask, torch.finfo(torch.float32).min)
            else:
                given = attention_mask
            by_kind = {kind: given for kind in ("full_attention", "sliding_attention")}
            if attention_mask is not None and attention_mask.dim() == 4 and hasattr(model.config, "layer_types"):
                given = by_kind
            results.append(model(ids, attention_mask=given, use_cache=False).logits)
        difference = (results[0] - results[1]).abs()
        if attention_mask is not None and attention_mask.dim() == 2:
            difference = difference[attention_mask.bool()]
        worst = max(worst, difference.max().item())
    assert worst < 2e-3 * results[0].abs().max().item(), (name, worst)
    # What the mask function is for: without it, padding is seen.
    model.set_attn_implementation("kvlane")
    right_one = model(ids, attention_mask=shown).logits[1, -1]
    del transformers.masking_utils.AttentionMaskInterface._global_mapping["kvlane"]
    wrong_one = model(ids, attention_mask=shown).logits[1, -1]
    kvlane.hf.register()
    assert (right_one - wrong_one).abs().max() > 0.05, "padding makes no difference to this model"
    print(f"{name}: logits within {worst:.1e} of eager's; without the mask function they would be {(right_one - wrong_one).abs().max():.1f} off")


def masks():
    """Numbers where they suffice, and what they are."""
    config = LlamaConfig(**SIZES, num_hidden_layers=1, sliding_window=16, attn_implementation="kvlane")
    embeds, cache = torch.empty(2, 1, 0), kvlane.hf.Cache(LlamaConfig(**SIZES, num_hidden_layers=1))
    states = torch.randn(2, 2, 30, 32)
    cache.update(states, states, 0)
    shown = torch.ones(2, 31, dtype=torch.int64)
    make = {"config": config, "inputs_embeds": embeds, "cache": cache, "position_ids": None}
    assert create_causal_mask(**make, attention_mask=shown) is None
    shown[1, :5] = 0
    assert create_causal_mask(**make, attention_mask=shown).squeeze().tolist() == [[31, 0, 30, -1, 0], [31, 5, 30, -1, 0]]
    assert create_sliding_window_causal_mask(**make, attention_mask=shown).squeeze().tolist() == [[31, 0, 30, 15, 0], [31, 5, 30, 15, 0]]
    shown[1, 10] = 0
    dense = create_causal_mask(**make, attention_mask=shown)
    assert dense.dtype == torch.bool and dense.shape == (2, 1, 1, 31)
    every = create_causal_mask(**make, attention_mask=None, and_mask_function=lambda b, h, q, k: k % 2 == 0)
    assert every.dtype == torch.bool and every.sum() == 2 * 16


def cache_by_itself():
    """Windows that drop tokens, crops, growth, memory that stays where it is."""
    config = Gemma3TextConfig(**SIZES, **HYBRID)
    cache = kvlane.hf.Cache(config, max_length=8)
    sliding, whole = cache.layers[0], cache.layers[1]
    history = torch.empty(2, 2, 0, 32)
    moves = 0
    for seq in (5, 1, 1, 30, 300, *(200 * [1]), 40, 700, 1):
        new = torch.randn(2, 2, seq, 32)
        history = torch.cat((history, new), dim=2)
        before = whole.keys.data_ptr() if whole.is_initialized else 0
        for layer, window in ((0, 15), (1, 1 << 20)):
            expected, offset = cache.get_mask_sizes(seq, layer)
            keys, values = cache.update(new, -new, layer)
            seen = history[:, :, max(history.shape[2] - seq - window, 0) :]
            assert keys.shape[2] == expected and offset == history.shape[2] - expected, (layer, seq)
            assert torch.equal(keys, seen) and torch.equal(values, -seen), (layer, seq)
        cache.update(new, -new, 2)
        moves += whole.keys.data_ptr() != before
    assert moves <= 4 and sliding.keys.shape[2] < history.shape[2], (moves, sliding.keys.shape)
    assert cache.get_seq_length() == cache.get_seq_length(1) == history.shape[2]
    refused(RuntimeError, "are to be removed, but only", cache.crop, -history.shape[2])
    whole.crop(-100)
    assert torch.equal(cache.update(new, new, 1)[0], torch.cat((history[:, :, :-100], new), dim=2))
    cache.activate_past_recording()
    cache.layers[0].crop(0)
    for _ in range(600):
        cache.update(new, new, 0)
    total = cache.get_seq_length()
    cache.layers[0].crop(-600)
    keys, _ = cache.update(new, new, 0)
    assert cache.get_seq_length() == total - 599 and torch.equal(keys[:, :, :15], history[:, :, -15:])
    whole.reorder_cache(torch.tensor([1, 1]))
    whole.batch_repeat_interleave(2)
    assert torch.equal(whole.keys[0, :, :50], history[1, :, :50]) and whole.batch_size == 4
    cache.layers[1].batch_select_indices(torch.tensor([3]))
    assert whole.batch_size == 1 and torch.equal(whole.keys[0, :, :50], history[1, :, :50])
    kept, twin = whole.keys[:, :, : whole.length].clone(), copy.deepcopy(cache)
    twin.update(new[:1], new[:1], 1)
    assert torch.equal(whole.keys[:, :, : whole.length], kept) and twin.get_seq_length(1) == whole.length + 1
    cache.reset()
    assert cache.get_seq_length() == 0
    # Stored in another type than the model's.
    half = kvlane.hf.Cache(config, dtype=torch.float16)
    assert half.update(new, new, 0)[0].dtype == torch.float16
    refused(ValueError, "linear_attention", kvlane.hf.Cache, Gemma3TextConfig(**SIZES, num_hidden_layers=1, layer_types=["linear_attention"]))


# The error of an element in units of the largest of its head.
TYPES = {"f16": 5e-4, "bf16": 4e-3, "int8": 4e-3, "q8_0": 5e-3, "fp8_e4m3": 6.3e-2, "q5_1": 4e-2, "q5_0": 6.5e-2, "q4_1": 8e-2,
         "fp8_e5m2": 0.126, "q4_0": 0.126, "iq4_nl": 0.126}


@torch.no_grad()
def quantised():
    """What a quantised cache holds, attention over that, and all that is done with caches."""
    formats = {name.removeprefix("KVL_FORMAT_").lower() for name in dir(kvlane.capi) if name.startswith("KVL_FORMAT_")}
    assert formats == {"f32", *TYPES, "affine8", "affine4"}, formats
    config, causal = LlamaConfig(**SIZES, num_hidden_layers=2), torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    module = torch.nn.Module()
    module.is_causal = True

    def numbers(x):
        return x.numbers() if hasattr(x, "numbers") else x.float()

    def held(x, k_type, v_type):
        return tuple(map(numbers, kvlane.hf.Cache(config, k_type=k_type, v_type=v_type).update(x, -x, 0)))

    for k_type, v_type in (*((kind, kind) for kind in TYPES), ("int8", "q4_0"), ("q5_1", None), (None, "fp8_e4m3")):
        new, q = torch.randn(2, 2, 40, 32), torch.randn(2, 4, 40, 32)
        types = {"k_type": k_type, "v_type": v_type}
        cache = kvlane.hf.Cache(config, 40, **types)
        # A prompt, another part of it, a token.
        for first, last in ((0, 20), (20, 39), (39, 40)):
            keys, values = cache.update(new[:, :, first:last], -new[:, :, first:last], 0)
        for x, wanted, kind in ((keys, new, k_type), (values, -new, v_type)):
            assert x.shape == new.shape and x.dtype == torch.float32 or kind in ("f16", "bf16"), kind
            bound = TYPES.get(kind, 0.0) * wanted.abs().amax(dim=3, keepdim=True)
            assert ((numbers(x) - wanted).abs() <= bound).all() and (torch.equal(numbers(x), wanted) == (kind is None)), kind
            # Whatever else is done with it is done with its numbers.
            assert torch.equal((x + 0).float(), numbers(x)) and torch.equal(x.transpose(1, 2)[:, 3].float(), numbers(x)[:, :, 3]), kind
        assert all(map(torch.equal, map(numbers, (keys, values)), held(new, **types))), types
        wholes = numbers(keys), numbers(values)
        padded_one = torch.tensor([[[[40, 0, 0, -1, 0]]], [[[40, 7, 0, 9, 0]]]], dtype=torch.int32)
        for mask in (None, causal, padded_one):
            for queries in (q, q[:, :, -1:]):
                given = causal[:, :, -queries.shape[2] :] if mask is causal else mask
                padded_one[..., 2] = 40 - queries.shape[2]
                found, wanted = (kvlane.hf.attention(module, queries, *x, given)[0] for x in ((keys, values), wholes))
                # bf16 products of bf16 caches round the weights.
                assert (found - wanted).abs().max() < (3e-2 if "bf16" in (k_type, v_type) else 2e-5), (types, mask is None)
                with torch.enable_grad():
                    assert torch.equal(kvlane.hf.attention(module, queries, keys, values, given)[0], found)
                if queries is q:
                    sdpa = torch.nn.functional.scaled_dot_product_attention(q, keys.float(), values.float(), attn_mask=causal, enable_gqa=True)
                    assert mask is padded_one or (sdpa.transpose(1, 2) - wanted).abs().max() < 2e-5
        # Growth, beams, crops, copies, windows that drop tokens.
        keys, values = (numbers(x) for x in cache.update(new[:, :, :1].repeat(1, 1, 600, 1), -new[:, :, :1].repeat(1, 1, 600, 1), 0))
        assert torch.equal(keys[:, :, :40], wholes[0]) and torch.equal(values[:, :, 640 - 600 :], wholes[1][:, :, :1].expand(-1, -1, 600, -1))
        cache.layers[0].crop(-600)
        cache.layers[0].reorder_cache(torch.tensor([1, 1]))
        cache.layers[0].batch_repeat_interleave(2)
        twin = copy.deepcopy(cache)
        cache.layers[0].batch_select_indices(torch.tensor([3]))
        for one, rows in ((cache, 1), (twin, 4)):
            keys, values = (numbers(x) for x in one.update(*(x[:1, :, :1].expand(rows, -1, -1, -1) for x in (new, -new)), 0))
            for x, whole in ((keys, wholes[0]), (values, wholes[1])):
                assert x.shape[:3] == (rows, 2, 41) and torch.equal(x[-1, :, :40], whole[1]) and torch.equal(x[-1, :, 40], whole[0, :, 0])
        windows = kvlane.hf.Cache(Gemma3TextConfig(**SIZES, **HYBRID), **types)
        for _ in range(50):
            keys, values = (numbers(x) for x in windows.update(new, -new, 0))
        assert torch.equal(keys[:, :, -40:], wholes[0]) and torch.equal(values[:, :, :15], wholes[1][:, :, -15:])
        assert windows.get_seq_length() == 2000 and windows.layers[0].keys.shape[2] < 1000
    exact, small = kvlane.hf.Cache(config, 300), kvlane.hf.Cache(config, 300, k_type="int8", v_type="q4_0")
    exact.update(new, new, 0), small.update(new, new, 0)
    assert (exact.nbytes, small.nbytes) == (2 * 2 * 2 * 300 * 32 * 4, 2 * 2 * 300 * (32 + 4 + 18)), (exact.nbytes, small.nbytes)
    refused(ValueError, "v_type is 'int4', which is none of f32", kvlane.hf.Cache, config, v_type="int4")
    refused(ValueError, "k_type is torch.int8, which is none of", kvlane.hf.Cache, config, k_type=torch.int8)
    odd = kvlane.hf.Cache(config, k_type="q4_0")
    refused(ValueError, "blocks of 32 elements, but the model's heads have 24", odd.update, new[..., :24], new[..., :24], 0)
    # Whole models: decoding as in one pass, padded, with windows, and in other implementations.
    for name, model in list(small_models())[:2]:
        model.eval()
        config = model.config.get_text_config()
        batch = padded([torch.randint(3, 199, (n,)).tolist() for n in (30, 21)], 0)
        for types in ({"k_type": "int8", "v_type": "int8"}, {"k_type": "q8_0", "v_type": "q8_0"}):
            whole, steps = [], []
            for implementation in ("kvlane", "eager"):
                model.set_attn_implementation(implementation)
                whole.append(model(**batch, cache=kvlane.hf.Cache(config, **types)).logits[:, -1])
                cache = kvlane.hf.Cache(config, **types)
                for first, last in ((0, 20), *((i, i + 1) for i in range(20, 30))):
                    logits_here = model(batch["input_ids"][:, first:last], attention_mask=batch["attention_mask"][:, :last], cache=cache).logits
                steps.append(logits_here[:, -1])
            exact = model(**batch, use_cache=False).logits[:, -1]
            # A rounding to a neighbour, which may follow from one of an f32, is in proportion to the format.
            for found in (whole[1], *steps):
                assert (found - whole[0]).abs().max() < 0.03 * exact.abs().max(), (name, types)
            assert 0 < (whole[0] - exact).abs().max() < 0.1 * exact.abs().max(), (name, types)
        for options in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
            inputs = batch if "num_beams" in options else padded([batch["input_ids"][0].tolist()], 0)
            found = generated(model, "kvlane", inputs, max_new_tokens=12, cache=kvlane.hf.Cache(config, **types), **options)
            assert found.shape[1] == inputs["input_ids"].shape[1] + 12
    print(f"caches in {', '.join(TYPES)}: attention is that over their numbers")


@torch.no_grad()
def other_uses():
    """A model that is compiled, one that looks both ways, types, errors."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2)).eval()
    ids = torch.randint(3, 199, (2, 9))
    model.set_attn_implementation("sdpa")
    cache, wanted = StaticCache(model.config, 32), []
    for step in (ids, ids[:, :1], ids[:, 1:2]):
        wanted.append(model(step, cache=cache).logits)
    model.set_attn_implementation("kvlane")
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        compiled, cache = torch.compile(model, backend=backend), StaticCache(model.config, 32)
        cache.early_initialization(2, 2, 32, torch.float32, torch.device("cpu"))
        for step, logits in zip((ids, ids[:, :1], ids[:, 1:2]), wanted):
            assert (compiled(step, cache=cache).logits - logits).abs().max() < 1e-3
    encoder = BertModel(BertConfig(vocab_size=199, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)).eval()
    shown = torch.ones(2, 9, dtype=torch.int64)
    shown[1, 4:] = 0
    outputs = []
    for implementation in ("eager", "kvlane"):
        encoder.set_attn_implementation(implementation)
        outputs.append(encoder(ids, attention_mask=shown).last_hidden_state[shown.bool()])
    assert (outputs[0] - outputs[1]).abs().max() < 1e-4
    for dtype, bound in ((torch.float16, 0.02), (torch.bfloat16, 0.15)):
        low = copy.deepcopy(model).to(dtype)
        low.set_attn_implementation("eager")
        wanted = low(ids).logits
        low.set_attn_implementation("kvlane")
        assert (low(ids, cache=kvlane.hf.Cache(low.config)).logits - wanted).abs().max() < bound * wanted.abs().max(), dtype
    model.train()
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.1
    refused(ValueError, "dropout is 0.1", model, ids)
    model.eval()
    with torch.enable_grad():
        refused(RuntimeError, "kvlane::attention has no gradient", model(ids, labels=ids, use_cache=False).loss.backward)
    q = torch.randn(1, 4, 1, 32)
    refused(kvlane.Error, "16", kvlane.hf.attention, model, q, q[..., :16], q, None)
    refused(ValueError, "output_attentions is set", kvlane.hf.attention, model, q, q, q, None, output_attentions=True)


def from_file(name, file, texts):
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    tokens(name, model, [tokenizer(text).input_ids for text in texts], new=10, beams=2)
    with_quantised_caches(name, model, tokenizer, texts)
    return model, tokenizer


@torch.no_grad()
def with_quantised_caches(name, model, tokenizer, texts):
    """Greedy texts with caches of eight bits, the loss of a text with fewer, and their bytes."""
    config = model.config.get_text_config()
    page = (Path(__file__).parents[2] / "tests/data/page.txt").read_text()
    ids = tokenizer(page, return_tensors="pt").input_ids[:, :300]
    model.set_attn_implementation("kvlane")

    def measured(k_type, v_type):
        """The loss of a prompt and of tokens after it, one by one, and the bytes of the cache."""
        cache = kvlane.hf.Cache(config, 300, k_type=k_type, v_type=v_type)
        pieces = [ids[:, :280], *ids[:, 280:].split(1, dim=1)]
        every = torch.cat([model(piece, cache=cache).logits for piece in pieces], dim=1)
        return torch.nn.functional.cross_entropy(every[0, :-1], ids[0, 1:]).item(), cache.nbytes

    exact, size = measured(None, None)
    for k_type, v_type, bound, share in (("int8", "int8", 0.01, 0.3), ("q8_0", "q8_0", 0.005, 0.27), ("q8_0", "q4_0", 0.03, 0.21),
                                         ("fp8_e4m3", "fp8_e4m3", 0.02, 0.2501)):
        loss, bytes_here = measured(k_type, v_type)
        assert abs(loss - exact) < bound * exact and loss != exact and bytes_here < share * size, (name, k_type, v_type, loss, exact)
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt")
        wanted = generated(model, "kvlane", inputs, max_new_tokens=10, cache=kvlane.hf.Cache(config))
        # One scale for a head of Gemma's 256 elements moves its close choices.
        for kind in ("int8", "q8_0") if config.head_dim <= 64 else ("q8_0",):
            found = generated(model, "kvlane", inputs, max_new_tokens=10, cache=kvlane.hf.Cache(config, k_type=kind, v_type=kind))
            assert torch.equal(found, wanted), (name, kind, tokenizer.decode(found[0]))
    print(f"{name}: losses of a page with quantised caches are near {exact:.4f}, and q8_0 gives the greedy texts")


def documented(model, tokenizer):
    """The program of the documentation, with the model in a directory."""
    text = (Path(__file__).parents[2] / "src/docs/c_api.md").read_text()
    program = re.search(r"<!-- hf -->\n```python\n(.*?)```", text, re.S)[1]
    config = copy.deepcopy(model.config)
    del config.quantization_config  # of the file; the model holds plain numbers
    plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder), tokenizer.save_pretrained(folder)
        program = re.sub(r'^name = .*$', f"name = {folder!r}", program, count=1, flags=re.M)
        printed = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    print(printed, end="")
    assert "Paris" in printed


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--smollm2", type=Path)
    parser.add_argument("--gemma3", type=Path)
    options = parser.parse_args()
    # For small tensors, threads would only wait for each other.
    torch.set_num_threads(1)
    masks()
    cache_by_itself()
    quantised()
    prompts = [torch.randint(3, 199, (n,)).tolist() for n in (23, 9, 1)]
    for name, model in small_models():
        model.eval()
        logits(name, model)
        tokens(name, model, prompts)
    other_uses()
    texts = "The capital of France is", "Once upon a time, in a village by the sea, there lived"
    if options.smollm2:
        documented(*from_file("smollm2", options.smollm2, texts))
    if options.gemma3:
        from_file("gemma3-270m", options.gemma3, texts)
    print(f"kvlane {kvlane.__version__} in transformers {transformers.__version__}, PyTorch {torch.__version__}: level {kvlane.isa()}")
