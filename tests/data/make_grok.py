#!/usr/bin/env python3
"""Writes grok.gguf, a Grok-1 of random weights, and grok_reference.json, what others compute from it.

    git clone https://github.com/xai-org/grok-1 && git -C grok-1 checkout 7050ed2
    pip install -r tests/data/grok_requirements.txt
    python tests/data/make_grok.py --grok-1 grok-1

Without --grok-1 only the model file is written. The model has everything that Grok-1 has, in small: 12 query heads over 2
key/value heads, 8 experts of which 2 serve a token, norms before and after each block, the three multipliers. Its file has
the names and the metadata that llama.cpp's converter writes. The weights (`random_weights.py`) are exact in every type that
is used below, so that all programs compute with the same model.

Two programs are recorded:

- xai-org/grok-1, unchanged: its `InferenceRunner` puts prompts into rows of one memory, in padded buckets, and steps the rows
  that are active. Weights are given to it as its checkpoint has them, most as int8 with scales. It runs twice. As published it
  computes in bf16: activations, scores and memory are rounded to it. A second run reads f32 for the name bf16, so that
  nothing is rounded and its formulas can be compared closely.
- llama.cpp, with the weights as f32 and as the file has them, and a cache of f32.

Tokens are given, not sampled: random ones, except that no token's second and third expert may come so close that rounding
could exchange them. The data has the logits after every prompt and step, and what each added to the memory. The script
checks that the original leaves the rest of an active row's memory alone.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import random_weights

HERE = Path(__file__).resolve().parent

VOCAB, DIM, HEADS, KV_HEADS, HEAD_DIM, FFN, EXPERTS, USED, LAYERS = 128, 96, 12, 2, 8, 32, 8, 2, 2
EPS, CAP, CONTEXT = 1e-5, 30.0, 64
EMBEDDING_SCALE, ATTENTION_SCALE, OUTPUT_SCALE = 9.75, 0.3125, 0.59375
PAD, BOS, EOS, UNKNOWN = range(4)

# The runner's memory: rows, slots of a row, and the sizes to which prompts are padded.
ROWS, SLOTS, BUCKETS = 3, 24, (8, 16)
# The second expert of a token is at least this much more probable than the third, as a logarithm.
LEAST_MARGIN = 0.2


def tensors():
    """By llama.cpp's names; (values, exponent of the scale), no exponent for those that stay f32."""
    all = {}

    def matrix(name, shape, exponent):
        all[name] = (random_weights.matrix(name, shape, 2.0**exponent), exponent)

    def norm(name):
        all[name] = (random_weights.norm(name, DIM), None)

    matrix("token_embd.weight", (VOCAB, DIM), -4)
    norm("output_norm.weight")
    for i in range(LAYERS):
        block = f"blk.{i}."
        norm(block + "attn_norm.weight")
        # Scores up to 30, so that the cap matters.
        matrix(block + "attn_q.weight", (HEADS * HEAD_DIM, DIM), -4)
        matrix(block + "attn_k.weight", (KV_HEADS * HEAD_DIM, DIM), -4)
        matrix(block + "attn_v.weight", (KV_HEADS * HEAD_DIM, DIM), -5)
        matrix(block + "attn_output.weight", (DIM, HEADS * HEAD_DIM), -5)
        norm(block + "attn_output_norm.weight")
        norm(block + "ffn_norm.weight")
        name = block + "ffn_gate_inp.weight"
        all[name] = (random_weights.matrix(name, (EXPERTS, DIM), 2.0**-4), None)
        matrix(block + "ffn_gate_exps.weight", (EXPERTS, FFN, DIM), -5)
        matrix(block + "ffn_up_exps.weight", (EXPERTS, FFN, DIM), -5)
        matrix(block + "ffn_down_exps.weight", (EXPERTS, DIM, FFN), -4)
        norm(block + "post_ffw_norm.weight")
    return all


def vocabulary():
    """Letters and syllables: pieces, scores and types as SentencePiece has them."""
    syllables = [c + v for c in "tnsrhldcmkpgbfvwyjz" for v in "aeiou"]
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz", *",.;:!?'-"]
    pieces = ["[PAD]", "[BOS]", "[EOS]", "<unk>", *letters, *syllables][:VOCAB]
    types = [3, 3, 3, 2] + [1] * (VOCAB - 4)
    scores = [0.0] * 4 + [-1000.0] * len(letters) + [-float(i) for i in range(VOCAB - 4 - len(letters))]
    return pieces, scores, types


def q4_0(values, exponent):
    """Blocks of 32: the scale in f16, and 16 bytes whose low nibbles are the first half."""
    q = (values / 2.0**exponent + 8).astype(np.uint8).reshape(*values.shape[:-1], -1, 32)
    nibbles = q[..., :16] | q[..., 16:] << 4
    scales = np.broadcast_to(np.array([2.0**exponent], np.float16).view(np.uint8), (*nibbles.shape[:-1], 2))
    return np.concatenate([scales, nibbles], axis=-1).reshape(*values.shape[:-1], -1)


def write_gguf(path, quantised):
    import gguf

    w = gguf.GGUFWriter(path, "grok")
    w.add_name("Grok-1 in small, random weights")
    w.add_license("MIT OR Apache-2.0")
    w.add_vocab_size(VOCAB)
    w.add_context_length(CONTEXT)
    w.add_embedding_length(DIM)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(FFN)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(EPS)
    w.add_rope_dimension_count(HEAD_DIM)
    w.add_rope_freq_base(10000.0)
    w.add_expert_count(EXPERTS)
    w.add_expert_used_count(USED)
    w.add_attn_logit_softcapping(CAP)
    w.add_router_logit_softcapping(30.0)
    w.add_attn_output_scale(ATTENTION_SCALE)
    w.add_embedding_scale(EMBEDDING_SCALE)
    w.add_logit_scale(OUTPUT_SCALE)
    pieces, scores, types = vocabulary()
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(pieces)
    w.add_token_scores(scores)
    w.add_token_types(types)
    w.add_bos_token_id(BOS)
    w.add_eos_token_id(EOS)
    w.add_pad_token_id(PAD)
    w.add_unk_token_id(UNKNOWN)
    w.add_add_bos_token(True)
    for name, (values, exponent) in tensors().items():
        if quantised and exponent is not None:
            w.add_tensor(name, q4_0(values, exponent), raw_dtype=gguf.GGMLQuantizationType.Q4_0)
        else:
            w.add_tensor(name, values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def plan(sequences):
    """What is done with the rows, in order. `sequences` are the tokens of row 0, of row 1, of its second text, of row 2."""
    texts = [iter(s) for s in sequences]
    take = lambda text, n: [next(texts[text]) for _ in range(n)]
    insert = lambda row, text, n: {"insert": row, "tokens": take(text, n)}
    step = lambda *pairs: {"step": [row for row, _ in pairs], "tokens": [next(texts[text]) for _, text in pairs]}
    zero, one, again, two = (0, 0), (1, 1), (1, 2), (2, 3)
    return [
        insert(*one, 5),
        step(one),
        step(one),
        insert(*zero, 11),
        step(zero, one),
        step(zero, one),
        # Row 1 has ended. Then a shorter prompt takes its place.
        step(zero),
        insert(*again, 3),
        step(zero, again),
        # A prompt of the size of its bucket, and tokens until the row is full.
        insert(*two, 16),
        *[step(two) for _ in range(SLOTS - 16)],
    ]


# The number of tokens that `plan` takes of each.
LENGTHS = [15, 9, 4, SLOTS]


# ------------------------------------------------------------ the original


def original_params(template, wide):
    """The weights in the form and under the names of the original's checkpoint."""
    import jax.numpy as jnp
    from model import QuantizedWeight8bit

    given = tensors()

    def quantised(name):
        """Stored as [.., in, out]."""
        values, exponent = given[name]
        q = np.swapaxes((values / 2.0**exponent).astype(np.int8), -1, -2)
        scales = np.full((*q.shape[:-2], 1, q.shape[-1]), 2.0**exponent, np.float32)
        return QuantizedWeight8bit(weight=jnp.asarray(q), scales=jnp.asarray(scales, jnp.float32 if wide else jnp.bfloat16))

    params = {
        "language_model/in_out_embed": {"embeddings": given["token_embd.weight"][0]},
        "language_model/rms_norm": {"scale": given["output_norm.weight"][0]},
    }
    for i in range(LAYERS):
        block, layer = f"blk.{i}.", f"transformer/decoder_layer_{i}/"
        for theirs, ours in [("query", "attn_q"), ("key", "attn_k"), ("value", "attn_v")]:
            params[layer + "multi_head_attention/" + theirs] = {"w": quantised(f"{block}{ours}.weight")}
        # With int8 the original loses this layer's axis of rows, which one row alone survives.
        params[layer + "multi_head_attention/linear"] = {"w": given[block + "attn_output.weight"][0].T}
        for theirs, ours in [("linear", "ffn_gate"), ("linear_v", "ffn_up"), ("linear_1", "ffn_down")]:
            params[layer + "moe/" + theirs] = {"w": quantised(f"{block}{ours}_exps.weight")}
        params[layer + "router"] = {"w": given[block + "ffn_gate_inp.weight"][0].T}
        for theirs, ours in [
            ("rms_norm", "attn_norm"),
            ("rms_norm_1", "attn_output_norm"),
            ("rms_norm_2", "ffn_norm"),
            ("rms_norm_3", "post_ffw_norm"),
        ]:
            params[layer + theirs] = {"scale": given[f"{block}{ours}.weight"][0]}
    assert params.keys() == template.keys(), params.keys() ^ template.keys()
    for name, weights in template.items():
        for part, weight in weights.items():
            assert params[name][part].shape == weight.shape, name
    return params


def rounded(values, digits=6):
    return [float(f"{v:.{digits}g}") for v in np.asarray(values, np.float64).ravel()]


def choose_sequences(margin):
    """Random tokens of sufficient margins. `margin` takes sequences [n, SLOTS] and a position. Token 0 is padding to the
    original and does not occur."""
    rng, sequences = np.random.default_rng(1), []
    for length in LENGTHS:
        sequence = [BOS]
        assert margin(np.array([sequence + [0] * (SLOTS - 1)], np.int32), 0)[0] >= LEAST_MARGIN
        while len(sequence) < length:
            candidates = np.zeros((16, SLOTS), np.int32)
            candidates[:, : len(sequence)] = sequence
            candidates[:, len(sequence)] = rng.integers(4, VOCAB, 16)
            good = np.flatnonzero(margin(candidates, len(sequence)) >= LEAST_MARGIN)
            assert len(good), "no token has a sufficient margin"
            sequence.append(int(candidates[good[0], len(sequence)]))
        sequences.append(sequence)
    return sequences


def record_original(folder, wide, sequences):
    sys.path.insert(0, str(folder))
    import jax
    import jax.numpy as jnp

    if wide:
        jnp.bfloat16 = jnp.float32
    import haiku as hk
    import model
    import runners

    # Logits are not part of what the runner returns. Its function for sampling is given them.
    seen, sample_token = [], runners.sample_token

    def watching(rngs, lm_outputs, settings):
        jax.debug.callback(lambda logits: seen.append(np.asarray(logits, np.float32)), lm_outputs.logits)
        return sample_token(rngs, lm_outputs, settings)

    runners.sample_token = watching
    margins, route = [], model.Router.compute_routing_prob

    def routing(self, *args):
        result = route(self, *args)
        jax.debug.callback(lambda p: margins.append(np.sort(np.asarray(p), axis=-1)), result[0])
        return result

    def margin(tokens, position):
        """The least margin over the layers for each sequence."""
        margins.clear()
        whole(params, tokens)
        jax.effects_barrier()
        assert len(margins) == LAYERS
        return np.min([np.log(p[:, position, -USED] / p[:, position, -USED - 1]) for p in margins], axis=0)

    language_model = model.LanguageModelConfig(
        vocab_size=VOCAB,
        pad_token=PAD,
        eos_token=EOS,
        sequence_len=SLOTS,
        output_multiplier_scale=OUTPUT_SCALE,
        embedding_multiplier_scale=EMBEDDING_SCALE,
        model=model.TransformerConfig(
            emb_size=DIM,
            widening_factor=FFN * 3 / 2 / DIM,
            key_size=HEAD_DIM,
            num_q_heads=HEADS,
            num_kv_heads=KV_HEADS,
            num_layers=LAYERS,
            attn_output_multiplier=ATTENTION_SCALE,
            shard_activations=True,
            num_experts=EXPERTS,
            num_selected_experts=USED,
        ),
    )
    runner = runners.InferenceRunner(
        pad_sizes=BUCKETS,
        runner=runners.ModelRunner(model=language_model, bs_per_device=float(ROWS)),
        name="local",
        load="",
        tokenizer_path=str(Path(folder) / "tokenizer.model"),
        local_mesh_config=(1, 1),
        between_hosts_config=(1, 1),
    )
    runner.initialize()
    mesh, params = runner.runner.mesh, original_params(runner.params.params, wide)

    settings = runners.SampleSettings(
        temperature=np.ones(ROWS, np.float32),
        nucleus_p=np.ones(ROWS, np.float32),
        mask=np.ones((ROWS, VOCAB), np.int32),
        active=np.zeros(ROWS, np.int32),
    )
    last = runners.SampleOutput(
        token_id=np.zeros((ROWS, 1), np.int32),
        prob=np.zeros((ROWS, 1), jnp.bfloat16),
        top_k_token_ids=np.zeros((ROWS, runners.TOP_K), np.int32),
        top_k_probs=np.zeros((ROWS, runners.TOP_K), jnp.bfloat16),
    )
    new_settings = runners.SampleSettings(
        temperature=np.float32(1),
        nucleus_p=np.float32(1),
        mask=np.ones(VOCAB, np.int32),
        active=np.ones((), np.int32),
    )

    def snapshot(memory):
        """[layer, k or v, row, slot, head, element]."""
        return np.stack([np.stack([np.asarray(l.k, np.float32), np.asarray(l.v, np.float32)]) for l in memory.layers])

    # bf16 has two to three digits.
    digits = 6 if wide else 4

    model.Router.compute_routing_prob = routing
    whole = jax.jit(hk.without_apply_rng(hk.transform(lambda tokens: language_model.make(mesh=mesh)(tokens).logits)).apply)
    results, lengths = [], [0] * ROWS
    with mesh:
        # All positions at once, without a memory.
        if sequences is None:
            sequences = choose_sequences(margin)
        longest = sequences[-1]
        every = np.asarray(whole(params, np.array([longest], np.int32))[0], np.float32)
        model.Router.compute_routing_prob = route

        rngs = jax.random.split(jax.random.PRNGKey(1), ROWS)
        memory = runner.new_memory(params, ROWS, SLOTS)
        before = snapshot(memory)
        assert not before.any(), "memory begins as zeros"
        dtype = str(memory.layers[0].k.dtype)
        for action in plan(sequences):
            seen.clear()
            if "insert" in action:
                row, prompt = action["insert"], np.array(action["tokens"], np.int32)
                padded = runners.pad_to_size(prompt, runner.get_pad_bucket(len(prompt)))
                rngs, last, memory, settings = runner.prefill_memory(
                    params, rngs, memory, settings, last, padded, len(prompt), np.uint64(1), new_settings, row
                )
                rows, first = [row], {row: 0}
                lengths[row] = len(prompt)
            else:
                rows = action["step"]
                first = {row: lengths[row] for row in rows}
                tokens = np.zeros((ROWS, 1), np.int32)
                for row, token in zip(rows, action["tokens"]):
                    tokens[row] = token
                    lengths[row] += 1
                active = np.isin(np.arange(ROWS), rows).astype(np.int32)
                settings = settings._replace(active=active)
                rngs, last, memory = runner.sample_step(params, rngs, last._replace(token_id=tokens), memory, settings)
            jax.effects_barrier()
            (logits,) = seen
            after = snapshot(memory)
            for row in rows:
                assert (after[:, :, row, : first[row]] == before[:, :, row, : first[row]]).all(), (action, row)
            if "step" in action:
                for row in set(range(ROWS)) - set(rows):
                    # The original writes the token of a row that is not active into its slot 0.
                    assert (after[:, :, row, 1:] == before[:, :, row, 1:]).all(), (action, row)
            logits = logits[:, 0] if "insert" in action else logits[rows, 0]
            results.append(
                {
                    "logits": [rounded(l, digits) for l in logits],
                    "memory": [rounded(after[:, :, row, first[row] : lengths[row]], digits) for row in rows],
                }
            )
            before = after

        # One token more than fits; and a prompt as long as the memory for a row that holds four tokens. (The original
        # takes several tokens at once only if they are as many as the memory has slots.)
        full, held = lengths.index(SLOTS), 4
        settings = settings._replace(active=np.eye(ROWS, dtype=np.int32)[full])
        tokens = np.full((ROWS, 1), 9, np.int32)
        _, _, memory = runner.sample_step(params, rngs, last._replace(token_id=tokens), memory, settings)

        def overwritten(memory, held):
            """The slots of the full row that held tokens and hold others now."""
            changed = (snapshot(memory) != before)[:, :, full].any(axis=(0, 1, 3, 4))
            return [int(i) for i in np.flatnonzero(changed) if i < held]

        one_more = overwritten(memory, SLOTS)
        before = snapshot(memory)
        several = hk.without_apply_rng(
            hk.transform(lambda tokens, memory: language_model.make(mesh=mesh)(tokens, memory).model_state)
        )
        layers = [l._replace(step=jnp.full(ROWS, held, jnp.int32)) for l in memory.layers]
        memory = several.apply(params, jnp.full((ROWS, SLOTS), 9, jnp.int32), model.Memory(layers=layers))
        many_more = overwritten(memory, held)
    return {
        "memory_type": dtype,
        "sequences": sequences,
        "steps": results,
        "whole": [rounded(l, digits) for l in every[::3]],
        "overflow": [
            {"held": SLOTS, "new": 1, "overwritten": one_more},
            {"held": held, "new": SLOTS, "overwritten": many_more},
        ],
    }


# ---------------------------------------------------------------- llama.cpp


def record_llama(path, tokens):
    """Logits of every third position, from all tokens at once, and how far those are from tokens one by one."""
    import llama_cpp

    llama = llama_cpp.Llama(
        str(path), n_ctx=CONTEXT, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )
    llama.eval(tokens)
    whole = np.array(llama.scores[: len(tokens)], np.float32)
    llama.reset()
    for token in tokens:
        llama.eval([token])
    single = np.array(llama.scores[: len(tokens)], np.float32)
    print(f"llama.cpp, one by one: {np.abs(whole - single).max():.2e}", file=sys.stderr)
    return [rounded(l) for l in whole[::3]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grok-1", type=Path, help="the original's code; records grok_reference.json")
    parser.add_argument("--output", type=Path, default=HERE / "grok.gguf")
    parser.add_argument("--part", choices=["bf16", "f32", "llama"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        # The tokens come by standard input, except to the part that chooses them.
        sequences = json.load(sys.stdin)
        if args.part != "llama":
            result = record_original(args.grok_1.resolve(), args.part == "f32", sequences)
        else:
            import llama_cpp

            with tempfile.TemporaryDirectory() as folder:
                plain = Path(folder) / "grok-f32.gguf"
                write_gguf(plain, quantised=False)
                result = {
                    "version": f"llama-cpp-python {llama_cpp.__version__}",
                    "f32": record_llama(plain, sequences[-1]),
                    "q4_0": record_llama(args.output, sequences[-1]),
                }
        print(json.dumps(result))
        return
    write_gguf(args.output, quantised=True)
    if args.grok_1 is None:
        return
    # Each part in a process of its own: the second run of the original must not see the first one's types.
    parts, sequences = {}, None
    for part in ["f32", "bf16", "llama"]:
        command = [sys.executable, __file__, "--grok-1", args.grok_1, "--output", args.output, "--part", part]
        done = subprocess.run(command, check=True, input=json.dumps(sequences).encode(), stdout=subprocess.PIPE)
        parts[part] = json.loads(done.stdout)
        sequences = sequences or parts[part]["sequences"]
    assert parts["bf16"].pop("sequences") == parts["f32"].pop("sequences")
    overflow = parts["bf16"].pop("overflow")
    assert overflow == parts["f32"].pop("overflow")
    reference = {
        "original": "xai-org/grok-1 at 7050ed204b8206bb8645c7b7bbef7252f79561b0",
        "rows": ROWS,
        "slots": SLOTS,
        "plan": plan(sequences),
        "overflow": overflow,
        "longest": sequences[-1],
        **parts,
    }
    text = json.dumps(reference, separators=(",", ":"))
    # One step a line keeps a diff readable.
    text = text.replace('{"logits"', '\n{"logits"').replace('{"insert"', '\n{"insert"').replace('{"step"', '\n{"step"')
    (HERE / "grok_reference.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
