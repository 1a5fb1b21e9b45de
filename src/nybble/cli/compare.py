"""`nybble compare`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nybble.cli import console

NAME = "compare"
HELP = """Quantize a model several ways and measure memory, speed and quality of each, side by side.

Speed is that of nybble's engine, with torch's generate beside it.

\b
nybble compare                                    the model that ships, offline, about four minutes
nybble compare gpt2 --text wiki.txt               a hub model (downloaded) or a folder, on your text
nybble compare MODEL --variants fp32,int4:g64,nf4:g64,dq
nybble compare MODEL --variants int4:g64,int4:g64+gptq,int3:g64+best --calibrate train.txt
nybble compare --shape gpt2 --variants fast       random weights: memory and speed only
"""


def run(
    model: Annotated[str | None, typer.Argument(help="Model folder or hub name; without it the model that ships.")] = None,
    text: Annotated[Path | None, typer.Option(help="Evaluation text: .txt, .json (list of strings), .jsonl (key text).")] = None,
    variants: Annotated[str, typer.Option(help="default, fast, all, or FORMAT[+METHOD],...")] = "default",
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results, page and plots.")] = Path("nybble-compare"),
    force: Annotated[bool, typer.Option("--force", help="Replace results that are there already.")] = False,
    shape: Annotated[str | None, typer.Option(help="Random weights of this shape (gpt2, ...) instead of MODEL.")] = None,
    protocol: Annotated[str, typer.Option(help="Perplexity protocol: paper, llama.cpp, stride.")] = "paper",
    window: Annotated[int | None, typer.Option(help="Tokens a window; default the context, at most 1024.")] = None,
    windows: Annotated[int, typer.Option(help="Windows to score at most.")] = 100,
    stride: Annotated[int | None, typer.Option(help="Tokens a sliding window moves (protocol stride).")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the samples continue, and speed is timed on.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate per timed run.")] = 50,
    repeats: Annotated[int, typer.Option(help="Timed runs of each speed figure; the median counts.")] = 5,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default all cores.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of samples and random prompts.")] = 0,
    keep: Annotated[
        list[str] | None, typer.Option(help="Weights that stay in float: name, last part or glob. Repeatable.")
    ] = None,
    rule: Annotated[list[str] | None, typer.Option(help="PATTERN=FORMAT for some weights. Repeatable.")] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(help="Calibration text for methods that read any: FILE, hub:DATASET, or self: the model's own."),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Forget what an interrupted run measured, and begin anew.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Records as JSON lines on standard output, no table.")] = False,
) -> None:
    """Measure, write the output folder, show the table."""
    from nybble.evaluate.compare import compare
    from nybble.evaluate.record import from_line
    from nybble.files.folder import check_output
    from nybble.files.job import how_to_go_on, is_published, open_job, remove
    from nybble.report import write_report
    from nybble.version import __version__

    rules = console.parse_rules(rule or ())
    check_output(output, force or is_published(output), marker="results.jsonl")
    facts = {
        "version of nybble": __version__,
        "model": model,
        "text": None if text is None else str(text),
        "variants": variants,
        "shape": shape,
        "way of scoring": [protocol, window, windows, stride],
        "way of timing": [prompt, new_tokens, repeats, threads],
        "seed": seed,
        "choice of weights": [list(keep or ()), [list(each) for each in rules]],
        "calibration": calibrate,
    }
    with console.progress() as bar:
        try:
            with open_job(output, facts, restart) as job:
                known = [from_line(record["record"]) for record in job.journal.records if "record" in record]
                if job.published:
                    records = known
                else:
                    if known:
                        bar.remark(f"going on with what is in {job.folder}: {len(known)} variants are measured")
                    remove(job.place)
                    job.place.mkdir()
                    records = compare(
                        model,
                        text,
                        variants,
                        shape=shape,
                        protocol=protocol,
                        window=window,
                        windows=windows,
                        stride=stride,
                        prompt=prompt,
                        new_tokens=new_tokens,
                        repeats=repeats,
                        threads=threads,
                        seed=seed,
                        keep=keep or (),
                        rules=rules,
                        calibrate=calibrate,
                        work=job.place,
                        download=True,
                        progress=bar.update,
                        on_record=lambda record: job.journal.append({"record": record.to_line()}),
                        known=known,
                    )
                    bar.update("", "writing the page", 1.0)
                    text_of = "".join(record.to_line() + "\n" for record in records)
                    (job.place / "results.jsonl").write_text(text_of, encoding="utf-8")
                    write_report(records, job.place / "report.html")
                    job.publish()
        except BaseException as error:
            if (remark := how_to_go_on(output, error)) is not None:
                bar.remark(remark)
            raise
    lines = "".join(record.to_line() + "\n" for record in records)
    if as_json:
        typer.echo(lines, nl=False)
        return
    show(records)
    typer.echo(f"\npage     {(output / 'report.html').resolve().as_uri()}")
    typer.echo(f"figures  {output / 'results.jsonl'}   plots  {output / 'plots'}   text  {output / 'report.md'}")


LEAST_FIRST = ("share", "peak", "change", "rate", "torch_rate", "bandwidth", "top1", "bpw", "perplexity")
"""Columns that a narrow terminal goes without, in this order; the page has them all."""


def show(records: list) -> None:  # type: ignore[type-arg]  # list[Record], imported late to start fast
    """The main columns that fit the terminal as a table, then warnings and the verdict."""
    from nybble.report import summary_table
    from nybble.report.judge import find_baseline, judge_variant, list_warnings, state_verdict

    table = summary_table(records)
    columns = []
    for i, column in enumerate(table.columns):
        if column.main:
            cells = [f"{row.cells[i].text} {row.cells[i].detail}".strip() for row in table.rows]
            columns.append((column.key, f"{column.by}\n{column.header}\n{column.unit}".strip(), cells))
    names = [row.name for row in table.rows]
    for key in LEAST_FIRST:
        if console.table_width([names, *(cells for _, _, cells in columns)], [h for _, h, _ in columns]) <= console.width():
            break
        columns = [column for column in columns if column[0] != key]
    lines = zip(names, *(cells for _, _, cells in columns), strict=True)
    console.print_table(["variant", *(header for _, header, _ in columns)], list(lines))
    baseline = find_baseline(records)
    judgements = [judge_variant(record, baseline) for record in records]
    typer.echo("")
    for _, level, sentence in list_warnings(records, judgements):
        typer.echo(f"{level}: {sentence}")
    typer.echo(f"\n{state_verdict(records, judgements)}")
