"""What a training run leaves for a person: the plot of its losses, and a page of text with its figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nybble.files.folder import write_whole, writing
from nybble.report.drawing import PALETTE, Plot, new_figure, render, style

if TYPE_CHECKING:
    from nybble.train.loop import Step
    from nybble.train.session import Trained
    from nybble.train.settings import Settings

SMOOTH = 50
"""Steps whose losses are averaged for the line over the dots; fewer in a short run."""


def draw_losses(steps: Sequence[Step]) -> Plot:
    """Losses of the steps' own windows and of the held-out text; below them the learning rate and, in fp16, the loss's scale."""
    with style():
        at = np.array([step.step for step in steps])
        losses = np.array([step.loss for step in steps])
        held = [(step.step, step.held_out) for step in steps if step.held_out is not None]
        # A teacher's loss is another quantity than that of the held-out text: then each has a scale of its own.
        apart = bool(held) and min(loss for _, loss in held) > 2 * np.median(losses)
        figure = new_figure(6.6 if apart else 5.2)
        *others, upper, lower = figure.subplots(3 if apart else 2, 1, sharex=True, height_ratios=([2] if apart else []) + [3, 1])
        upper.plot(at, losses, ".", ms=2, color=PALETTE["phase1"], label="each step", rasterized=len(steps) > 5000)
        width = max(1, min(SMOOTH, len(steps) // 10))
        if width > 1:
            smooth = np.convolve(losses, np.full(width, 1 / width), "valid")
            upper.plot(at[width - 1 :], smooth, color=PALETTE["int8"], lw=1.4, label=f"mean of {width} steps")
        if held:
            measured = others[0] if others else upper
            measured.plot(*zip(*held, strict=True), "o-", ms=3, lw=1, color=PALETTE["low"], label="held out")
        for axes in others:
            axes.set_title("Loss of the held-out text, nats per token (lower is better)")
            axes.grid(axis="y")
        upper.set_title("Loss that is trained, nats per token" if others else "Loss, nats per token (lower is better)")
        upper.legend()
        upper.grid(axis="y")
        lower.plot(at, [step.learning_rate for step in steps], color=PALETTE["ink"], lw=1.2)
        lower.set_ylabel("learning rate")
        lower.set_xlabel("step")
        if any(step.scale for step in steps):
            scale = lower.twinx()
            scale.plot(at, [step.scale for step in steps], color=PALETTE["limit"], lw=1.2)
            scale.set_yscale("log", base=2)
            scale.set_ylabel("scale of the loss", color=PALETTE["limit"])
            lost = [step.step for step in steps if step.skipped]
            for place in lost:
                lower.axvline(place, color=PALETTE["low"], lw=0.7)
        alt = f"Loss over {len(steps)} steps, from {losses[0]:.3f} to {losses[-1]:.3f} nats per token."
        return render(figure, "loss", "Loss", alt)


def write_training_report(folder: Path, trained: Trained, settings: Settings) -> list[Path]:
    """Write loss.svg, loss.png and report.md into the folder of a run; returns their paths. Raises OutputError."""
    plot = draw_losses(trained.steps)
    seconds = sorted(step.seconds for step in trained.steps)
    middle = seconds[len(seconds) // 2]
    skipped = sum(step.skipped for step in trained.steps)
    rows = {
        "parameters": f"{trained.parameters:,}",
        "tokens of the text": f"{trained.tokens:,}",
        "steps": f"{settings.steps} of {settings.batch} windows of {settings.window} tokens",
        "precision": settings.precision,
        "optimizer": settings.optimizer,
        "learning rate": f"{settings.learning_rate:g} after {settings.warmup} steps, then a cosine to {settings.final:g} of it",
        "seconds of a step": f"{middle:.3f} (median), {settings.batch * settings.window / middle:,.0f} tokens a second",
        "steps skipped": f"{skipped}" if settings.precision == "fp16" else "",
        "held-out loss": f"{trained.before:.4f} before, {trained.after:.4f} after; perplexity {np.exp(trained.after):.2f}",
        "weights": ""
        if settings.qat is None
        else f"{settings.qat} in every pass, begun by {settings.qat_method}, scales {settings.qat_scales}",
        f"held-out loss by {settings.qat_method}, before training": "" if trained.rounded is None else f"{trained.rounded:.4f}",
        "zeros": "kept" if settings.keep_zeros else "",
        "seed": str(settings.seed),
    }
    lines = ["# Training", "", f"![{plot.alt}](loss.png)", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in rows.items() if value]
    lines += ["", "Every step: `log.jsonl`. Losses are nats per token; the held-out text is measured in float32."]
    made = {"loss.svg": plot.svg, "loss.png": plot.png, "report.md": ("\n".join(lines) + "\n").encode()}
    with writing(folder):
        write_whole({folder / name: content for name, content in made.items()})
    return [folder / name for name in made]
