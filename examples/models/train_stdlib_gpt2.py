"""Trains the small language model that ships with this repository, from text every machine has.

    python examples/models/train_stdlib_gpt2.py

A byte-level BPE tokenizer and a GPT-2-shaped model are trained on Python's own standard library and
written as an ordinary Hugging Face folder with a model card. One CPU core and about an hour are enough.
"""

import argparse
import json
import math
import platform
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from clt_stream.text.stdlib import is_held_out, python_stdlib

END = "<|endoftext|>"
VOCABULARY, CONTEXT, HELD_OUT_SHARE = 4096, 256, 0.05
BATCH, PEAK_RATE = 16, 3e-3


def train_tokenizer(documents: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(
        (text for _, text in documents),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer, documents: list[tuple[str, str]]) -> list[torch.Tensor]:
    texts = [text for _, text in documents]
    return [torch.tensor(one.ids) for one in tokenizer.backend_tokenizer.encode_batch(texts)]


def pack(documents: list[torch.Tensor], end: int) -> torch.Tensor:
    """One long run of tokens: every document follows an end-of-text token, and one closes the last."""
    mark = torch.tensor([end])
    return torch.cat([part for document in documents for part in (mark, document)] + [mark])


def windows(documents: list[torch.Tensor], end: int, batch: int, seed: int):
    """Endless training batches; every epoch shuffles the documents, packs them and shuffles the windows."""
    order = random.Random(seed)
    while True:
        run = pack(order.sample(documents, len(documents)), end)
        run = run[order.randrange(CONTEXT) :]
        count = (len(run) - 1) // CONTEXT
        starts = torch.tensor(order.sample(range(count), count)) * CONTEXT
        for chosen in starts[: count - count % batch].view(-1, batch):
            yield run[chosen[:, None] + torch.arange(CONTEXT + 1)]


def loss_of(model: GPT2LMHeadModel, batch: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats of every token of ``batch`` but the first column, which is only read."""
    logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, run: torch.Tensor) -> float:
    """Mean loss over a packed run in windows that follow each other, so every token is predicted once."""
    parts = (run[None, start : start + CONTEXT + 1] for start in range(0, len(run) - 1, CONTEXT))
    return sum(loss_of(model, part, "sum").item() for part in parts) / (len(run) - 1)


def save(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Half precision on disk: three more bits of mantissa than bfloat16, and these weights are small."""
    stored = GPT2LMHeadModel(model.config)
    stored.load_state_dict(model.state_dict())
    stored.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = json.loads((out / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name every release of transformers knows
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(200, max(1, steps // 20))
    fall = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
    return peak * (step + 1) / warm if step < warm else peak * (0.02 + 0.98 * fall)


CARD = """---
license: psf-2.0
library_name: transformers
---
# stdlib-gpt2
A small language model of Python source code and of the Python language reference, made to be looked into: activations can be collected from it on a CPU in minutes, and what it was trained on is present wherever Python is. It is not meant to write code.

| | |
|---|---|
| architecture | GPT-2 (`GPT2LMHeadModel`): {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, context {config.n_positions}, tied embeddings, no dropout; {parameters:,} parameters, stored as float16 (load with `dtype=torch.float32`) |
| tokenizer | byte-level BPE, {config.vocab_size} entries, trained on the training documents; one end-of-text token begins, ends and pads |
| text | `clt_stream.text.stdlib.python_stdlib()` under CPython {python}: sources of the standard library and topics of `help()`, under the Python Software Foundation License Version 2 |
| trained on | {train} |
| held out | {held}: those with `is_held_out(identity, {share})` |
| training | {steps:,} steps of {batch} x {config.n_positions} tokens: {seen:,} tokens seen; AdamW, peak learning rate {rate}, warm-up, cosine; seed {args.seed}; {minutes:.0f} CPU minutes, {args.threads} thread(s) |

Loss of the stored files, loaded as float32, in windows of {config.n_positions} tokens that follow each other:

| held-out documents | nats per token | bits per byte |
|---|---|---|
{table}

Whole documents are held out, but the library repeats itself (licence headers, idioms, topics that quote each other): {repeated:.0%} of the held-out lines of 40 characters or more also stand in a training document.

Given `{prompt}`, it continues (temperature 0.7, seed {args.seed}):
```python
{sample}
```
Made by `python examples/models/train_stdlib_gpt2.py --tokens {args.tokens} --seed {args.seed} --threads {args.threads}`. The figures depend on the Python version, because it is the text, and in their last digits on torch and the processor.
"""  # noqa: E501


def write_card(args: argparse.Namespace, train: list, held: list, steps: int, minutes: float) -> str:
    """Loads the folder as any user would, measures it, writes its README.md and gives the table of losses."""
    model = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    tokenizer, table, counts = AutoTokenizer.from_pretrained(args.out), [], {}
    for kind, part in {
        "training": train,
        "all": held,
        "sources": [one for one in held if one[0].endswith(".py")],
        "topics of `help()`": [one for one in held if one[0].startswith("topics/")],
    }.items():
        ids, size = encode(tokenizer, part), sum(len(text.encode("utf-8")) for _, text in part)
        counts[kind] = f"{len(part):,} documents, {size:,} bytes, {sum(map(len, ids)):,} tokens"
        if kind != "training":
            run = pack(ids, tokenizer.eos_token_id)
            loss = held_out_loss(model, run)
            table.append(f"| {kind} | {loss:.4f} | {loss * (len(run) - 1) / math.log(2) / size:.4f} |")
    prompt = "def read_lines(path):"
    torch.manual_seed(args.seed)
    sample = model.generate(
        **tokenizer(END + prompt + "\n", return_tensors="pt"),
        max_new_tokens=120,
        do_sample=True,
        temperature=0.7,
        top_k=0,
    )
    known = {line for _, text in train for line in text.splitlines()}
    lines = [line for _, text in held for line in text.splitlines() if len(line) >= 40]
    (args.out / "README.md").write_text(
        CARD.format(
            args=args,
            config=model.config,
            parameters=model.num_parameters(),
            share=HELD_OUT_SHARE,
            python=platform.python_version(),
            train=counts["training"],
            held=counts["all"],
            batch=BATCH,
            steps=steps,
            seen=steps * BATCH * CONTEXT,
            rate=PEAK_RATE,
            minutes=minutes,
            table="\n".join(table),
            prompt=prompt,
            repeated=sum(line in known for line in lines) / len(lines),
            sample=tokenizer.decode(sample[0], skip_special_tokens=True).rstrip(),
        ),
        encoding="utf-8",
    )
    return "\n".join(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "stdlib-gpt2")
    parser.add_argument("--tokens", type=int, default=10_000_000, help="training tokens (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints in --out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    documents = python_stdlib()
    train = [one for one in documents if not is_held_out(one[0], HELD_OUT_SHARE)]
    held = [one for one in documents if is_held_out(one[0], HELD_OUT_SHARE)]
    tokenizer = train_tokenizer(train)
    end = tokenizer.eos_token_id
    batches = windows(encode(tokenizer, train), end, BATCH, args.seed)
    held_run = pack(encode(tokenizer, held), end)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=CONTEXT,
            n_embd=128,
            n_layer=6,
            n_head=4,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
            tie_word_embeddings=True,
        )
    )
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    steps, started = max(1, args.tokens // (BATCH * CONTEXT)), time.process_time()
    with tqdm(range(steps), file=sys.stderr, mininterval=5, unit="step") as bar:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, PEAK_RATE)
            loss = loss_of(model, next(batches))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if (step + 1) % args.save_every == 0:
                save(model, tokenizer, args.out)
                tqdm.write(f"step {step + 1}: held-out loss {held_out_loss(model, held_run):.4f}", file=sys.stderr)
    save(model, tokenizer, args.out)
    print("| held-out documents | nats per token | bits per byte |")
    print(write_card(args, train, held, steps, (time.process_time() - started) / 60))


if __name__ == "__main__":
    main()
