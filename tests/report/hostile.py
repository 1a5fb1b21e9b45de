"""Records whose every text comes from someone who means harm."""

from __future__ import annotations

from dataclasses import replace

from nybble.evaluate.record import Record

HOSTILE = (
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=alert(1)>",
    "\"><svg onload=alert(1)>",
    "'-alert(1)-'{{ 7 * 7 }}{% raw %}",
    "</style><style>*{display:none}</style><!--",
    "javascript:alert(1) $\\frac{1}{0}$ \u2028\u2029\u202e\x00\x1b[31m\ud800 \U0001f600 漢字",
)  # fmt: skip


def poison(records: list[Record], texts: tuple[str, ...]) -> list[Record]:
    """A text wherever a record from outside could hold one, another in each record."""
    text = texts[0]
    run = replace(
        records[0].run, id=text, created=text, prompt=text, versions={text: text},
        model={**records[0].run.model, "name": text, "architecture": text, "blake3": text},
        text={**(records[0].run.text or {}), "name": text, "protocol": text},
        machine={**records[0].run.machine, "cpu": text, "system": text},
    )  # fmt: skip
    return [
        replace(
            record,
            variant=f"{text}{k}",
            format=record.format if k < 2 else text,
            method=text,
            plan_hash=text,
            sample_greedy=f"{k}{text}",
            sample_top_k=text,
            notes=[text],
            run=run,
            layers=[replace(layer, name=f"{text}{n}", format=text, kind=text) for n, layer in enumerate(record.layers[:4])],
        )
        for k, (record, text) in enumerate(zip(records, texts, strict=False))
    ]
