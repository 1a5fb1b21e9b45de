"""`nybble train`: text in, a trained model's folder out; stopped anywhere it goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nybble.cli import console

if TYPE_CHECKING:
    from nybble.train.loop import Step, Trainer
    from nybble.train.settings import Settings

NAME = "train"
STDLIB = "stdlib"
HELP = """Train a language model, from scratch or from one that is there, in fp32, bf16 or fp16.

\b
nybble train MODEL --text text.txt --steps 500 -o model-tuned              fine-tuning
nybble train --shape gpt2-6m --text folder -o model --steps 5000           from scratch, with a tokenizer of its own
nybble train MODEL --text text.txt -o model-tuned --steps 500 --precision bf16 --optimizer adamw8bit
nybble train MODEL --text text.txt -o model-int4 --qat int4:g64 --teacher MODEL --steps 300    weights rounded in every pass
nybble train MODEL --text text.txt -o model-int3 --qat int3:g64 --qat-method best --teacher MODEL --lr 0.0002    begun by best
nybble train MODEL --text text.txt -o model-small --layers 3 --teacher MODEL                   distillation to fewer layers
torchrun --nproc-per-node 2 -m nybble train MODEL --text text.txt -o model-tuned --steps 500
The same command again goes on where a run stopped.
"""


def run(
    model: Annotated[str | None, typer.Argument(help="Model folder or hub name to begin with.")] = None,
    text: Annotated[
        str | None, typer.Option(help="Text to learn from: file (.txt, .json, .jsonl), folder, or stdlib: this Python's library.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to make, or to go on in.")] = None,
    shape: Annotated[str | None, typer.Option(help="Random weights instead: gpt2-6m, llama-6m, gpt2, ... or FILE.json.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Model folder or hub name whose tokenizer a new model takes.")] = None,
    vocabulary: Annotated[int, typer.Option(help="Tokens of a new tokenizer.")] = 4096,
    held_out: Annotated[Path | None, typer.Option(help="Text to measure on; default a twentieth of the text.")] = None,
    steps: Annotated[int, typer.Option(help="Updates of the weights.")] = 1000,
    batch: Annotated[int, typer.Option(help="Windows of a step.")] = 8,
    micro: Annotated[int | None, typer.Option(help="Windows of one pass; gradients of several are summed.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 256,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 0.001,
    final_lr: Annotated[float, typer.Option(help="What is left of it in the last step, as a share.")] = 0.1,
    warmup: Annotated[int | None, typer.Option(help="Steps until it; default a fiftieth of all.")] = None,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradients; 0: none.")] = 1.0,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16 (autocast; fp16 scales the loss).")] = "fp32",
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit or adamw4bit.")] = "adamw",
    narrow_embeddings: Annotated[
        bool, typer.Option("--narrow-embeddings", help="Optimizer of few bits for embeddings too; they keep 32 otherwise.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations twice instead of keeping them.")
    ] = False,
    evaluate_every: Annotated[int, typer.Option(help="Steps between held-out losses; 0: at the end.")] = 100,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: at the end.")] = 100,
    qat: Annotated[str | None, typer.Option(help="Quantization-aware: the format of weights in every pass.")] = None,
    qat_method: Annotated[
        str, typer.Option(help="What it begins with, and what becomes of inputs: rtn, best, dynamic, best+static, ...")
    ] = "rtn",
    qat_scales: Annotated[
        str | None,
        typer.Option(
            help="fit (the format's own, in every pass), fixed or learned; default learned where a method chooses them."
        ),
    ] = None,
    qat_observe: Annotated[int, typer.Option(help="Steps in which static grids of inputs follow what they see.")] = 0,
    keep: Annotated[list[str] | None, typer.Option(help="Weights that stay in float with --qat. Repeatable.")] = None,
    rule: Annotated[list[str] | None, typer.Option(help="PATTERN=FORMAT for some weights with --qat. Repeatable.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Model whose predictions are learnt instead of the text.")] = None,
    share: Annotated[float, typer.Option(help="Of the loss that the teacher has; the rest is the text's.")] = 1.0,
    temperature: Annotated[float, typer.Option(help="Of the teacher's and the student's predictions.")] = 1.0,
    hidden: Annotated[float, typer.Option(help="Weight of the distance of hidden states in that loss; 1 is usual.")] = 0.0,
    keep_zeros: Annotated[
        bool, typer.Option("--keep-zeros", help="Weights that are zero stay so: training after nybble prune.")
    ] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="With torchrun: weights and states in parts, one with each process (FSDP).")
    ] = False,
    layers: Annotated[int | None, typer.Option(help="Begin with so many of MODEL's layers, spread evenly.")] = None,
    seed: Annotated[int, typer.Option(help="Order of the windows, random weights, dropout.")] = 0,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all cores.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default a GPU where there is one.")] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what is in the output folder and begin anew.")] = False,
) -> None:
    """Read the text, begin or go on, save, report."""
    from nybble.errors import UsageError
    from nybble.methods import parse_method
    from nybble.train.qat import chooses
    from nybble.train.settings import Settings

    if text is None or output is None:
        raise UsageError("train needs --text TEXT and -o OUTPUT")
    if (model is None) == (shape is None):
        raise UsageError("train begins with a MODEL or with random weights of --shape SHAPE: give one of them")
    warmup = max(1, steps // 50) if warmup is None else warmup
    settings = Settings(
        steps=steps,
        batch=batch,
        micro=min(micro or batch, batch),
        window=window,
        learning_rate=lr,
        final=final_lr,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        precision=precision,
        optimizer=optimizer,
        wide_embeddings=not narrow_embeddings,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        evaluate_every=evaluate_every,
        save_every=save_every,
        qat=qat,
        qat_method=str(parse_method(qat_method)),
        qat_scales=qat_scales or ("learned" if chooses(qat_method) else "fit"),
        qat_observe=qat_observe,
        keep=tuple(keep or ()),
        rules=tuple(console.parse_rules(rule or ())),
        share=share,
        temperature=temperature,
        hidden=hidden,
        shard=shard,
        keep_zeros=keep_zeros,
    )
    settings.check()
    if qat is None and (keep or rule or qat_scales or qat_method != "rtn" or qat_observe):
        raise UsageError("--keep, --rule and all of --qat-... say what --qat FORMAT does; give it")
    if teacher is None and (hidden or share != 1 or temperature != 1):
        raise UsageError("--hidden, --share and --temperature say how a teacher is learnt from; give --teacher MODEL")
    if threads is not None:
        import torch

        if not 1 <= threads <= 1024:
            raise UsageError(f"{threads} threads: give 1 to 1024")
        torch.set_num_threads(threads)
    _train(model, shape, tokenizer, vocabulary, text, held_out, settings, output, device, restart, teacher, layers)


def _train(
    model: str | None, shape: str | None, tokenizer: str | None, vocabulary: int, text: str, held_out: Path | None,
    settings: Settings, output: Path, device: str | None, restart: bool, teacher: str | None, layers: int | None,
) -> None:  # fmt: skip
    from nybble.errors import InputError
    from nybble.models.hub import resolve
    from nybble.models.loading import load_model, load_tokenizer
    from nybble.report.training import write_training_report
    from nybble.train import session, start
    from nybble.train.distill import fewer_layers
    from nybble.train.world import join

    if shape is not None:
        start.check_shape(shape)
    documents, measured = _texts(text, held_out)
    with join(device) as world, console.progress() as bar:
        session.check_folder(output)
        head = "" if world.first else None
        if model is not None:
            begin = start.load(resolve(model, download=True))
        else:
            from_folder = None if tokenizer is None else load_tokenizer(resolve(tokenizer, download=True))
            learnt = from_folder or start.make_tokenizer(documents, vocabulary)
            begin = start.new(str(shape), learnt, settings.seed)
        if layers is not None:
            begin = replace(begin, model=fewer_layers(begin.model, layers), name=f"{begin.name}, {layers} layers")
        judge = None if teacher is None else load_model(resolve(teacher, download=True))
        if begin.end is None and len(documents) > 1:
            raise InputError("the tokenizer has no end-of-text token to put between documents; give one text")

        def begun(trainer: Trainer, done: int) -> None:
            parameters = sum(p.numel() for p in begin.model.parameters())
            said = f"{parameters / 1e6:.2f} M parameters, {len(trainer.text.ids):,} tokens, {settings.steps} steps of "
            epochs = settings.steps * settings.batch / trainer.text.windows
            said += f"{settings.batch * settings.window:,} tokens ({epochs:.1f} epochs)"
            if world.first:
                bar.remark(said + (f"; going on after step {done}" if done else ""))

        def watch(step: Step) -> None:
            if head is None:
                return
            tokens = settings.batch * settings.window / step.seconds
            bar.update(head, f"loss {step.loss:.3f}, {tokens:,.0f} tokens/s", step.step / settings.steps)
            if step.held_out is not None:
                bar.remark(f"step {step.step}: loss {step.loss:.4f}, held out {step.held_out:.4f}")

        def progress(what: str, done: int, total: int) -> None:
            if head is not None:
                bar.update(head, what, done / max(1, total))

        try:
            trained = session.train(begin, documents, measured, settings, output, world, judge, watch, begun, restart, progress)
        except KeyboardInterrupt:
            bar.remark(f"stopped; the same command goes on from {output / session.TRAINING / session.CHECKPOINTS}")
            raise
        if not world.first:
            return
        write_training_report(output / session.TRAINING, trained, settings)
    path = [trained.before, *([] if trained.rounded is None else [trained.rounded]), trained.after]
    method = "rounded" if settings.qat_method == "rtn" else settings.qat_method
    words = " -> ".join(f"{loss:.4f}" for loss in path)
    typer.echo(
        f"{output}: held-out loss {words} nats per token{'' if trained.rounded is None else f' (float, {method}, trained)'}"
    )


def _texts(text: str, held_out: Path | None) -> tuple[list[str], list[str] | None]:
    """(documents to learn from, documents to measure on or None: part of the first)."""
    from nybble.demo import text as library
    from nybble.train.data import read_text_tree

    measured = None if held_out is None else read_text_tree(held_out)
    if text == STDLIB:
        return library.training_documents(), measured or library.held_out_documents()
    return read_text_tree(text), measured
