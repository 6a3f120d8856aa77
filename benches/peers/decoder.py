#!/usr/bin/env python3
"""Times whole decoding steps of `kvlane generate` against llama.cpp, in turns, on the same model files.

    python3 -m venv target/peers && . target/peers/bin/activate
    pip install numpy==2.4.6 llama-cpp-python==0.3.36
    cargo build --release --features driver
    python benches/peers/decoder.py SmolLM2-135M-Instruct.Q4_1.gguf gemma-3-270m-q4_k_m.gguf

A round is one turn of each, in a process of its own: a prompt in one call, then single tokens, the likeliest each time.
Medians over the rounds count. Both have the same tokens, the same number of threads, an f32 cache, and weights in
memory before the clock starts. llama.cpp runs without the repacking of weights, which fails on some of these files
(`use_extra_bufts`); `--repack` turns it on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TEXT = (
    "The history of the lighthouse begins long before electricity. Fires were lit on hills, later on towers of stone, "
    "and keepers carried wood, then oil, up winding stairs every evening. Ships that came home in autumn storms saw the "
    "light before they saw the land, and steered by it. "
)


def kvlane(model: Path, prompt: str, tokens: int, threads: int) -> dict:
    program = ROOT / "target" / "release" / "kvlane"
    command = [program, "generate", "--model", model, "--prompt", prompt, "--max-tokens", tokens, "--threads", threads]
    command += ["--temperature", "0", "--json"]
    out = json.loads(subprocess.run([str(c) for c in command], capture_output=True, check=True, text=True).stdout)
    return {
        "prefill": out["prefill_tokens_per_second"],
        "decode": out["decode_tokens_per_second"],
        "prompt": out["prompt_ids"],
        "ids": out["ids"],
    }


def llama(model: Path, ids: list[int], tokens: int, threads: int, repack: bool) -> dict:
    """Runs in a process of its own, which this script starts with `--llama`."""
    request = json.dumps([str(model), ids, tokens, threads, repack])
    command = [sys.executable, __file__, "--llama"]
    out = subprocess.run(command, input=request, capture_output=True, check=True, text=True).stdout
    return json.loads(out)


def run_llama() -> None:
    import llama_cpp as lc
    import numpy as np

    path, ids, tokens, threads, repack = json.load(sys.stdin)
    silent = lc.llama_log_callback(lambda *_: None)
    lc.llama_log_set(silent, ctypes.c_void_p(0))
    lc.llama_backend_init()
    options = lc.llama_model_default_params()
    options.use_extra_bufts = repack
    model = lc.llama_model_load_from_file(path.encode(), options)
    options = lc.llama_context_default_params()
    options.n_ctx = len(ids) + tokens + 8
    options.n_batch = options.n_ubatch = 512
    options.n_threads = options.n_threads_batch = threads
    options.type_k = options.type_v = 0  # GGML_TYPE_F32
    context = lc.llama_init_from_model(model, options)
    vocab = lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model))

    def step(ids: list[int]) -> int:
        array = (lc.llama_token * len(ids))(*ids)
        for start in range(0, len(ids), 512):
            piece = (lc.llama_token * min(512, len(ids) - start)).from_buffer(array, 4 * start)
            if lc.llama_decode(context, lc.llama_batch_get_one(piece, len(piece))):
                sys.exit("llama_decode failed")
        logits = lc.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (vocab,)).argmax())

    # The first pass touches the mapped weights.
    step(ids[:8])
    lc.llama_memory_clear(lc.llama_get_memory(context), True)
    start = time.perf_counter()
    out = [step(ids)]
    middle = time.perf_counter()
    while len(out) < tokens:
        out.append(step(out[-1:]))
    end = time.perf_counter()
    rates = {"prefill": len(ids) / (middle - start), "decode": (tokens - 1) / (end - middle), "ids": out}
    json.dump(rates, sys.stdout)


def main() -> None:
    if sys.argv[1:] == ["--llama"]:
        return run_llama()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64, help="tokens to decode")
    parser.add_argument("--repeat", type=int, default=8, help="how often the prompt repeats its text")
    parser.add_argument("--repack", action="store_true")
    args = parser.parse_args()
    print("| model | | kvlane (tokens/s) | llama.cpp (tokens/s) | ratio |\n| --- | --- | ---: | ---: | ---: |")
    for model in args.models:
        ours, theirs = [], []
        for _ in range(args.rounds):
            ours.append(kvlane(model, TEXT * args.repeat, args.tokens, args.threads))
            theirs.append(llama(model, ours[-1]["prompt"], args.tokens, args.threads, args.repack))
        same = 0
        for a, b in zip(ours[0]["ids"], theirs[0]["ids"]):
            if a != b:
                break
            same += 1
        for what in ("prefill", "decode"):
            mine, other = (statistics.median(r[what] for r in runs) for runs in (ours, theirs))
            print(f"| {model.name} | {what} | {mine:.1f} | {other:.1f} | {mine / other:.2f} |")
        print(f"{model.name}: {len(ours[0]['prompt'])} tokens; the first {same} generated are equal", file=sys.stderr)
    return None


if __name__ == "__main__":
    main()
