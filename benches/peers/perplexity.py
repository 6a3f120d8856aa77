#!/usr/bin/env python3
"""What quantised caches cost in `kvlane perplexity` and in llama.cpp, on the same model files and the same text.

    python3 -m venv target/peers && . target/peers/bin/activate
    pip install numpy==2.4.6 llama-cpp-python==0.3.36
    cargo build --release --features driver
    python benches/peers/perplexity.py SmolLM2-135M-Instruct.Q4_1.gguf gemma-3-270m-q4_k_m.gguf

Prints a table of the perplexity of each with each type of cache, and of the mean Kullback-Leibler divergence of the next
token's distribution from that of the same program with an f32 cache. Both have the same tokens. llama.cpp rounds the inputs
of its linear layers to eight bits, so that the two programs differ with an f32 cache too. It rotates quantised keys and
values by a Hadamard matrix, unless LLAMA_ATTN_ROT_DISABLE=1 is in its environment; both are measured, and stand beside
`--rotate both` and no rotation.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The numbers of ggml's types.
TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q5_1": 7, "q5_0": 6, "q4_1": 3, "iq4_nl": 20, "q4_0": 2}


def kvlane(model: Path, text: Path, type_: str, rotated: bool, threads: int) -> dict:
    program = ROOT / "target" / "release" / "kvlane"
    command = [program, "perplexity", text, "--model", model, "--kv-type", type_, "--baseline", "--json"]
    command += ["--threads", threads] + ["--rotate", "both"] if rotated else []
    out = json.loads(subprocess.run([str(c) for c in command], capture_output=True, check=True, text=True).stdout)
    distance = out["baseline"]
    return {
        "tokens": out["tokens"],
        "perplexity": out["perplexity"],
        "divergence": distance["mean_kl_divergence"],
        "same": distance["same_choice"],
    }


def llama(model: Path, text: Path, types: list[str], rotated: bool, threads: int) -> dict:
    """Runs in a process of its own, which this script starts with `--llama`."""
    request = json.dumps([str(model), text.read_text(encoding="utf-8"), types, threads])
    environment = dict(os.environ) | ({} if rotated else {"LLAMA_ATTN_ROT_DISABLE": "1"})
    command = [sys.executable, __file__, "--llama"]
    done = subprocess.run(command, input=request, capture_output=True, check=True, text=True, env=environment)
    return json.loads(done.stdout)


def run_llama() -> None:
    import llama_cpp as lc
    import numpy as np

    path, text, types, threads = json.load(sys.stdin)
    silent = lc.llama_log_callback(lambda *_: None)
    lc.llama_log_set(silent, ctypes.c_void_p(0))
    lc.llama_backend_init()
    options = lc.llama_model_default_params()
    options.use_extra_bufts = False
    model = lc.llama_model_load_from_file(path.encode(), options)
    vocab = lc.llama_model_get_vocab(model)
    words = lc.llama_vocab_n_tokens(vocab)
    raw, room = text.encode(), (lc.llama_token * (len(text) + 8))()
    n = lc.llama_tokenize(vocab, raw, len(raw), room, len(room), True, False)
    ids = list(room[:n])

    def log_probabilities(type_: str) -> np.ndarray:
        """Of every token after each of the text's, [tokens, words]."""
        options = lc.llama_context_default_params()
        options.n_ctx = n + 8
        options.n_batch = options.n_ubatch = 256
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = TYPES[type_]
        options.flash_attn_type = 1  # LLAMA_FLASH_ATTN_TYPE_ENABLED
        context = lc.llama_init_from_model(model, options)
        batch, rows = lc.llama_batch_init(256, 0, 1), []
        for start in range(0, n, 256):
            batch.n_tokens = min(256, n - start)
            for i in range(batch.n_tokens):
                batch.token[i], batch.pos[i] = ids[start + i], start + i
                batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, 1
            if lc.llama_decode(context, batch):
                sys.exit("llama_decode failed")
            x = np.ctypeslib.as_array(lc.llama_get_logits(context), (batch.n_tokens, words)).astype(np.float32)
            x -= x.max(axis=1, keepdims=True)
            rows.append(x - np.log(np.exp(x, dtype=np.float64).sum(axis=1, keepdims=True)).astype(np.float32))
        lc.llama_batch_free(batch)
        lc.llama_free(context)
        return np.concatenate(rows)

    baseline, results = log_probabilities("f32"), {}
    for type_ in types:
        found = baseline if type_ == "f32" else log_probabilities(type_)
        chosen = found[np.arange(n - 1), ids[1:]].astype(np.float64)
        divergence = 0.0
        for p, q in zip(baseline[:-1], found[:-1], strict=True):
            divergence += float((np.exp(p, dtype=np.float64) * (p.astype(np.float64) - q)).sum()) / (n - 1)
        same = float((baseline[:-1].argmax(axis=1) == found[:-1].argmax(axis=1)).mean())
        results[type_] = {
            "tokens": n - 1,
            "perplexity": math.exp(-chosen.mean()),
            "divergence": divergence,
            "same": same,
        }
    json.dump(results, sys.stdout)


def main() -> None:
    if sys.argv[1:] == ["--llama"]:
        return run_llama()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--text", type=Path, default=ROOT / "tests/data/page.txt")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    for model in args.models:
        print(f"\n{model.name}\n")
        print("| keys and values | kvlane | llama.cpp | kvlane, rotated | llama.cpp, rotated |")
        print("| --- | ---: | ---: | ---: | ---: |", flush=True)
        theirs = [llama(model, args.text, list(TYPES), rotated, args.threads) for rotated in (False, True)]
        for type_ in TYPES:
            runs = [kvlane(model, args.text, type_, False, args.threads), theirs[0][type_]]
            runs += [kvlane(model, args.text, type_, True, args.threads), theirs[1][type_]]
            if len({run["tokens"] for run in runs}) > 1:
                sys.exit(f"{[run['tokens'] for run in runs]} tokens: not the same text")
            cells = [f"{r['perplexity']:.2f}, {r['divergence']:.1e}, {100 * r['same']:.1f} %" for r in runs]
            print(f"| {type_} | {' | '.join(cells)} |", flush=True)
    return None


if __name__ == "__main__":
    main()
