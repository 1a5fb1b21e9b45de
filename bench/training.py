"""Mixed precision and optimizer states in 8 and 4 bits beside float32 and torch.optim.AdamW: loss, memory and time of training a
small GPT-2 on text.

The model has the shape of the one that ships (5.9 million parameters) and starts from random weights, or from its own with
`--start shipped`. It learns the next token of windows drawn from nybble.demo.text.calibration_text(), or of `--tokens`, a file of
uint16 token ids. Every row sees the same weights and windows for a seed. The learning rate warms up and falls as a cosine to a
tenth. Held-out loss, in float32, is that of windows spread evenly over evaluation_text(). A row is an optimizer in a precision,
in a process of its own, whose peak of memory is measured.

    adamw            torch.optim.AdamW, float32 states
    adamw, eps       the same with eps 1.01e-8: how far two runs drift apart that differ in nothing that matters
    adam8bit         8-bit states, embeddings in float32 (the paper's stable embedding rule)
    adam8bit, all    8-bit states, embeddings too
    adam4bit         4-bit states, embeddings in float32
    adam4bit, all    4-bit states, embeddings too

    fp32, bf16, fp16   products and activations; fp16 with a scaled loss, as `nybble train` does it

Run: OMP_NUM_THREADS=1 .venv/bin/python bench/training.py [--steps 500] [--batch 8] [--seeds 0 1 2] [--json FILE]
The files of several runs with other seeds join in one table: bench/training.py --join FILE FILE
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import resource
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
from nybble.train.precision import computing, multiplying, scaler_of
from nybble.train.settings import PRECISIONS

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


def train(args: argparse.Namespace, name: str, precision: str, seed: int) -> dict[str, Any]:
    torch.set_num_threads(args.threads)
    tokens, held = texts(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = memory(device)
    model = start(args, seed).to(device)
    scaler = scaler_of(precision, device)
    skipped = 0
    optimizer = OPTIMIZERS[name](model, args.lr)
    draw = torch.Generator().manual_seed(seed)
    losses, in_step, begun = [], 0.0, time.perf_counter()
    for step in range(args.steps):
        places = torch.randint(len(tokens) - args.length, (args.batch,), generator=draw)
        ids = torch.stack([tokens[place : place + args.length + 1] for place in places.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = rate(args, step)
        with multiplying(precision, device):
            with computing(precision, device):
                loss = loss_of(model, ids.to(device))
            scaler.scale(loss).backward()
        losses.append(loss.item())  # waits for the device
        began, scale = time.perf_counter(), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        in_step += time.perf_counter() - began
        optimizer.zero_grad()
    seconds = (time.perf_counter() - begun) / args.steps
    peak = memory(device) - before
    with torch.inference_mode():
        heard = statistics.fmean(loss_of(model.eval(), part.to(device)).item() for part in held.split(args.batch))
    row = {"optimizer": name, "precision": precision, "seed": seed, "device": device.type, "bytes": state_bytes(optimizer)}
    row |= {"loss": statistics.fmean(losses[-LAST:]), "held_out": heard, "step_s": seconds, "optimizer_s": in_step / args.steps}
    return row | {"peak_mb": peak / 1e6, "skipped": skipped}


def memory(device: torch.device) -> int:
    """The most that the process has held so far: resident on the CPU, allocated on a GPU; bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def texts(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """(token ids to learn from [T], held-out windows [N, T])."""
    if args.tokens:
        tokens = torch.from_numpy(np.fromfile(args.tokens, dtype="<u2").astype(np.int64))
    else:
        tokens = tokens_of(text.calibration_text())
    judged = tokens_of(text.evaluation_text())
    places = np.linspace(0, len(judged) - args.length - 1, HELD_WINDOWS).astype(int)
    return tokens, torch.stack([judged[place : place + args.length + 1] for place in places.tolist()])


def table(rows: list[dict[str, Any]]) -> str:
    """Against float32 AdamW of the same seed; seconds and memory are medians over seeds."""
    seeds = sorted({row["seed"] for row in rows})
    of = {(row["precision"], row["optimizer"], row["seed"]): row for row in rows}
    base = {seed: of["fp32", BASE, seed] for seed in seeds}
    head = f"| precision | {'optimizer':14} | " + " | ".join(f"seed {seed}: last {LAST}, held out" for seed in seeds)
    lines = [f"{head} | mean | states | peak MB | s a step (optimizer) | skipped |"]
    lines.append("| --- | --- |" + " --: |" * (len(seeds) + 5))
    for precision in PRECISIONS:
        for name in OPTIMIZERS:
            mine = [of[precision, name, seed] for seed in seeds if (precision, name, seed) in of]
            if len(mine) < len(seeds):
                continue
            cells: list[str] = []
            means: dict[str, list[float]] = {}
            first = name == BASE and precision == "fp32"
            for row in mine:
                both = []
                for key in ("loss", "held_out"):
                    change = 100 * (row[key] / base[row["seed"]][key] - 1)
                    both.append(f"{row[key]:.4f}" + ("" if first else f" ({change:+.2f} %)"))
                    means.setdefault(key, []).append(change)
                cells.append(", ".join(both))
            mean = "" if first else ", ".join(f"{statistics.fmean(values):+.2f} %" for values in means.values())
            share = mine[0]["bytes"] / base[seeds[0]]["bytes"]
            step, inside, peak, skipped = (
                statistics.median(row[key] for row in mine) for key in ("step_s", "optimizer_s", "peak_mb", "skipped")
            )
            cost = f"{share:.4f} | {peak:.0f} | {step:.3f} ({inside:.4f}) | {skipped:g}"
            lines.append(f"| {precision} | {name:14} | {' | '.join(cells)} | {mean} | {cost} |")
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
    cli.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    cli.add_argument("--tokens", type=Path, help="file of uint16 token ids to learn from")
    cli.add_argument("--threads", type=int, default=1)
    cli.add_argument("--json", type=Path, help="rows to this file")
    cli.add_argument("--join", type=Path, nargs="+", help="print the table of rows that --json wrote")
    args = cli.parse_args()
    if args.join:
        print(table([row for path in args.join for row in json.loads(path.read_text(encoding="utf-8"))]))
        return
    names = args.optimizers or [name for name in OPTIMIZERS if name != "adamw, eps"]
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for seed, precision, name in itertools.product(args.seeds, args.precisions, names):
            rows.append(pool.apply(train, (args, name, precision, seed)))
            print(json.dumps(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows), encoding="utf-8")
    print(f"\n{args.steps} steps of {args.batch} windows of {args.length}, from {args.start}\n")
    if BASE in names and "fp32" in args.precisions:
        print(table(rows))


if __name__ == "__main__":
    main()
