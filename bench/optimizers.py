"""Optimizer states in 8 and 4 bits beside torch.optim.AdamW: memory, loss and time of training a small GPT-2 on text.

The model has the shape of the one that ships (5.9 million parameters) and starts from random weights, or from its own with
`--start shipped`. It learns the next token of windows drawn from nybble.demo.text.calibration_text(), or of `--tokens`, a file of
uint16 token ids. Every optimizer sees the same weights and windows for a seed. The learning rate warms up and falls as a cosine
to a tenth. Held-out loss is that of windows spread evenly over evaluation_text().

    adamw            torch.optim.AdamW, float32 states
    adamw, eps       the same with eps 1.01e-8: how far two runs drift apart that differ in nothing that matters (--noise)
    adam8bit         8-bit states, embeddings in float32 (the paper's stable embedding rule)
    adam8bit, all    8-bit states, embeddings too
    adam4bit         4-bit states, embeddings in float32
    adam4bit, all    4-bit states, embeddings too

Run: OMP_NUM_THREADS=1 .venv/bin/python bench/optimizers.py [--steps 500] [--batch 8] [--seeds 0 1 2] [--json FILE]
The files of several runs with other seeds join in one table: bench/optimizers.py --join FILE FILE
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from nybble.demo import model_folder, text
from nybble.train.adam import Adam8bit, groups_of, state_bytes

WEIGHT_DECAY = 0.1
LAST = 20
"""Steps whose mean loss counts as the final one."""
HELD_WINDOWS = 64
BASE = "adamw"
Make = Callable[[torch.nn.Module, float], torch.optim.Optimizer]


def eight(bits: int, wide: bool) -> Make:
    return lambda model, lr: Adam8bit(groups_of(model, WEIGHT_DECAY, wide), lr, (0.9, 0.999), bits=bits)


def plain(eps: float) -> Make:
    return lambda model, lr: torch.optim.AdamW(groups_of(model, WEIGHT_DECAY), lr, (0.9, 0.999), eps=eps)


OPTIMIZERS: dict[str, Make] = {
    BASE: plain(1e-8),
    "adamw, eps": plain(1.01e-8),
    "adam8bit": eight(8, True),
    "adam8bit, all": eight(8, False),
    "adam4bit": eight(4, True),
    "adam4bit, all": eight(4, False),
}


def tokens_of(words: str) -> torch.Tensor:
    """Token ids int64 [T] of a text, by the tokenizer of the model that ships."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    return torch.tensor(tokenizer(words, verbose=False)["input_ids"])


def start(args: argparse.Namespace, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    if args.start == "shipped":
        return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).train()
    config = GPT2Config.from_pretrained(model_folder())
    config.n_layer, config.n_embd = args.layers or config.n_layer, args.width or config.n_embd
    return GPT2LMHeadModel(config).float().train()


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def rate(args: argparse.Namespace, step: int) -> float:
    """Learning rate of a step, counted from 0."""
    if step < args.warm_up:
        return args.lr * (step + 1) / args.warm_up
    done = (step - args.warm_up) / max(1, args.steps - args.warm_up)
    return args.lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))


def train(args: argparse.Namespace, name: str, seed: int, tokens: torch.Tensor, held: torch.Tensor) -> dict[str, Any]:
    model = start(args, seed)
    optimizer = OPTIMIZERS[name](model, args.lr)
    draw = torch.Generator().manual_seed(seed)
    losses, in_step, begun = [], 0.0, time.perf_counter()
    for step in range(args.steps):
        places = torch.randint(len(tokens) - args.length, (args.batch,), generator=draw)
        ids = torch.stack([tokens[place : place + args.length + 1] for place in places.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = rate(args, step)
        loss = loss_of(model, ids)
        loss.backward()
        before = time.perf_counter()
        optimizer.step()
        in_step += time.perf_counter() - before
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = (time.perf_counter() - begun) / args.steps
    with torch.inference_mode():
        heard = statistics.fmean(loss_of(model.eval(), part).item() for part in held.split(args.batch))
    row = {"optimizer": name, "seed": seed, "bytes": state_bytes(optimizer), "loss": statistics.fmean(losses[-LAST:])}
    row |= {"held_out": heard, "step_s": seconds, "optimizer_s": in_step / args.steps}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    of = {(row["optimizer"], row["seed"]): row for row in rows}
    base = {seed: of[BASE, seed] for seed in seeds}
    head = f"| {'optimizer':14} | states | " + " | ".join(f"seed {seed}: last {LAST}, held out" for seed in seeds)
    lines = [f"{head} | mean | s a step (optimizer) |", "| --- | --: |" + " --: |" * (len(seeds) + 2)]
    for name in OPTIMIZERS:
        mine = [of[name, seed] for seed in seeds if (name, seed) in of]
        if len(mine) < len(seeds):
            continue
        cells: list[str] = []
        means: dict[str, list[float]] = {}
        for row in mine:
            both = []
            for key in ("loss", "held_out"):
                change = 100 * (row[key] / base[row["seed"]][key] - 1)
                both.append(f"{row[key]:.4f}" + (f" ({change:+.2f} %)" if name != BASE else ""))
                means.setdefault(key, []).append(change)
            cells.append(", ".join(both))
        mean = ", ".join(f"{statistics.fmean(values):+.2f} %" for values in means.values()) if name != BASE else ""
        share = mine[0]["bytes"] / base[seeds[0]]["bytes"]
        seconds = [statistics.median(row[key] for row in mine) for key in ("step_s", "optimizer_s")]
        lines.append(f"| {name:14} | {share:.4f} | {' | '.join(cells)} | {mean} | {seconds[0]:.3f} ({seconds[1]:.4f}) |")
    return "\n".join(lines)


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--steps", type=int, default=500)
    cli.add_argument("--batch", type=int, default=8, help="windows a step")
    cli.add_argument("--length", type=int, default=128, help="tokens predicted in a window")
    cli.add_argument("--lr", type=float, default=1e-3)
    cli.add_argument("--warm-up", type=int, default=50)
    cli.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    cli.add_argument("--start", choices=["scratch", "shipped"], default="scratch")
    cli.add_argument("--layers", type=int, help="of a model from scratch, in place of the shipped model's")
    cli.add_argument("--width", type=int)
    cli.add_argument(
        "--optimizers", nargs="+", choices=list(OPTIMIZERS), help="all but the noise; those of several runs can be joined"
    )
    cli.add_argument("--noise", action="store_true", help="adamw once more with an eps that is 1 %% larger")
    cli.add_argument("--tokens", type=Path, help="file of uint16 token ids to learn from")
    cli.add_argument("--threads", type=int, default=1)
    cli.add_argument("--json", type=Path, help="rows to this file")
    cli.add_argument("--join", type=Path, nargs="+", help="print the table of rows that --json wrote")
    args = cli.parse_args()
    if args.join:
        print(table([row for path in args.join for row in json.loads(path.read_text(encoding="utf-8"))]))
        return
    torch.set_num_threads(args.threads)
    names = args.optimizers or [name for name in OPTIMIZERS if name != "adamw, eps" or args.noise]
    if args.tokens:
        tokens = torch.from_numpy(np.fromfile(args.tokens, dtype="<u2").astype(np.int64))
    else:
        tokens = tokens_of(text.calibration_text())
    judged = tokens_of(text.evaluation_text())
    places = np.linspace(0, len(judged) - args.length - 1, HELD_WINDOWS).astype(int)
    held = torch.stack([judged[place : place + args.length + 1] for place in places.tolist()])
    rows = []
    for seed in args.seeds:
        for name in names:
            rows.append(train(args, name, seed, tokens, held))
            print(json.dumps(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows), encoding="utf-8")
    print(f"\n{len(tokens)} tokens, {args.steps} steps of {args.batch} windows of {args.length}, from {args.start}\n")
    if BASE in names:
        print(table(rows))


if __name__ == "__main__":
    main()
