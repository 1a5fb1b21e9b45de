"""The race itself, with workers that answer from a table: turns, failures, medians, what is kept and what is left out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble import kernels
from nybble.bench import race as race_module
from nybble.bench.child import Children
from nybble.bench.race import failures_of_ours, race
from nybble.bench.report import draw_decode, render_markdown, table_of
from nybble.bench.standing import Race, count_equal
from nybble.errors import InputError, MeasureError, NybbleError, OutputError, UsageError

Answer = Callable[[dict[str, Any]], dict[str, Any]]
GB = 10**9


def turn(seconds: float, **more: Any) -> dict[str, Any]:
    """What a worker would answer."""
    return {
        "load_s": 0.1,
        "first_token_s": 0.2,
        "memory_before_load_bytes": 10_000_000,
        "memory_loaded_bytes": 30_000_000,
        "memory_peak_bytes": 40_000_000,
        "tokens": [1] * 50,
        "decode_s": seconds,
        "prefill_s": 0.25,
        "batch_s": {"1": seconds, "4": 2 * seconds, "8": 3 * seconds, "16": 5 * seconds},
        "weight_bytes": 12_000_000,
        "token_bytes": 10_000_000,
        "cache_element_bytes": 2,
        "version": "1.0",
        **more,
    }


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], list[dict[str, Any]]]:
    """Replaces the worker processes by a function; returns the list in which every job is kept."""

    def install(answer: Answer) -> list[dict[str, Any]]:
        jobs: list[dict[str, Any]] = []

        def run(self: Children, job: dict[str, Any], what: str) -> dict[str, Any]:
            jobs.append(job)
            if job["do"] == "check":
                return {"missing": None}
            if job["do"] in ("make", "convert"):
                Path(job["target"]).write_text("made")
                return {}
            return answer(job)

        monkeypatch.setattr(Children, "run", run)
        monkeypatch.setattr(kernels, "read_bandwidth", lambda *_: 40.0 * GB)
        return jobs

    return install


def names(jobs: list[dict[str, Any]]) -> list[str]:
    return [f"{job['runtime']} {job['format']}" for job in jobs if job["do"] == "measure"]


def test_racers_take_turns(workers: Callable[[Answer], list[dict[str, Any]]]) -> None:
    jobs = workers(lambda job: turn(0.5))
    done = race(formats="f16,int8", against="llama.cpp:Q4_0", rounds=2)
    assert names(jobs) == ["nybble fp16", "nybble int8:channel", "llama.cpp Q4_0"] * 2
    assert [len(standing.turns) for standing in done.standings] == [2, 2, 2]
    assert done.skipped == ()
    assert [job["format"] for job in jobs if job["do"] == "make"] == ["int8:channel", "Q4_0"], "f16 is the float folder's own"
    halves = [job for job in jobs if job["do"] == "convert"]
    assert [(job["runtime"], job["container"], Path(job["target"]).name) for job in halves] == [
        ("nybble", "gguf", "F16.gguf.part")
    ]
    assert [Path(job["source"]).name for job in jobs if job["do"] == "make"][1] == "F16.gguf", "which llama.cpp makes its own of"
    assert [job["runtime"] for job in jobs if job["do"] == "check"] == ["nybble", "llama.cpp"]
    texts = jobs[-1]["workload"]["texts"]
    assert len(texts) == 6, "one to warm up and five to time"


def test_figures_are_medians_over_rounds(workers: Callable[[Answer], list[dict[str, Any]]]) -> None:
    seconds = {"torch": iter([2.0, 4.0, 3.0]), "nybble": iter([0.5, 0.5, 1.0])}
    workers(lambda job: turn(next(seconds[job["runtime"]])))
    done = race(formats="int8", against="torch:fp32", rounds=3, repeats=2, threads=1)
    ours, torch = (done.line(standing) for standing in done.finished)
    assert (ours["peer"], ours["format"], ours["spec"], ours["threads"]) == ("nybble", "int8", "int8:channel", 1)
    assert ours["baseline"] == "torch fp32"
    assert ours["seconds_50"] == 0.5
    assert ours["tokens_per_second"] == 100
    assert ours["best"]["tokens_per_second"] == 100
    assert ours["best"]["seconds_50"] == 0.5
    assert ours["turns"]["seconds_50"] == [0.5, 0.5, 1.0]
    assert ours["turns"]["ratio_to_baseline"] == [4, 8, 3]
    assert ours["ratio_to_baseline"] == 4, "the median of the rounds' ratios, not the ratio of the medians (6)"
    assert torch["ratio_to_baseline"] == 1
    assert torch["best"]["first_token_s"] == 0.2
    assert ours["batch8_tokens_per_second"] == pytest.approx(8 * 50 / 1.5, abs=1e-4)
    assert ours["prefill_512_s"] == 0.25
    assert ours["prefill_tokens_per_second"] == 2048
    # The model that ships caches 2 * 6 layers * 256 numbers a position, 29.5 positions on average.
    assert ours["bytes_per_token"] == 10_000_000 + 2 * 6 * 256 * 2 * 59 // 2
    assert ours["bandwidth_share"] == pytest.approx(ours["bytes_per_token"] * 100 / (40 * GB), rel=1e-3)
    assert (ours["rounds"], ours["repeats"], ours["exact"]) == (3, 2, False)
    assert "exact" not in torch


def test_a_share_is_of_what_memory_reads_beside_its_turn(
    workers: Callable[[Answer], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    workers(lambda job: turn(0.5))
    readings = iter([20.0 * GB, 40.0 * GB, 80.0 * GB, 50.0 * GB, 25.0 * GB, 25.0 * GB])  # before and after each of three turns
    monkeypatch.setattr(kernels, "read_bandwidth", lambda *_: next(readings))
    done = race(formats="int8", rounds=3)
    ours = done.line(done.finished[0])
    rate = ours["bytes_per_token"] * 100
    assert ours["turns"]["bandwidth_share"] == pytest.approx([rate / (each * GB) for each in (40, 80, 25)], rel=1e-3)
    assert ours["bandwidth_share"] == pytest.approx(rate / (40 * GB), rel=1e-3)
    assert ours["bandwidth_bytes_per_second"] == 40 * GB
    assert done.bandwidths == (25 * GB, 80 * GB)


def test_a_clipped_work_load_has_no_figure_of_the_full_one(
    workers: Callable[[Answer], list[dict[str, Any]]], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny("gpt2")
    model.config.n_positions = 40
    model.transformer.wpe.weight.data = model.transformer.wpe.weight.data[:40].clone()
    model.save_pretrained(tmp_path / "short")
    jobs = workers(lambda job: turn(0.5, tokens=[1] * 35))
    told: list[str] = []
    done = race(tmp_path / "short", formats="f32", rounds=1, remark=told.append)
    line = done.line(done.finished[0])
    assert told == list(done.workload.notes)
    assert len(told) == 2
    assert jobs[-1]["workload"]["new_tokens"] == line["new_tokens"] == 35
    assert line["tokens_per_second"] == 70
    assert line["prefill_tokens"] == 40
    assert "seconds_50" not in line
    assert "prefill_512_s" not in line


def test_a_peer_that_fails_costs_the_race_that_peer(workers: Callable[[Answer], list[dict[str, Any]]]) -> None:
    def answer(job: dict[str, Any]) -> dict[str, Any]:
        if job["format"] == "Q8_0":
            raise MeasureError("it fell over")
        return turn(0.5)

    jobs = workers(answer)
    told: list[str] = []
    done = race(formats="f16", against="llama.cpp", rounds=2, remark=told.append)
    assert told == ["llama.cpp Q8_0 failed: it fell over"]
    assert names(jobs).count("llama.cpp Q8_0") == 1, "it does not get another turn"
    assert [str(standing.racer) for standing in done.finished] == ["nybble f16", "llama.cpp F16", "llama.cpp Q4_0"]
    assert failures_of_ours(done) == []
    assert "it fell over" in render_markdown(done, plot=False)


def test_a_failure_of_ours_is_known_as_ours(workers: Callable[[Answer], list[dict[str, Any]]]) -> None:
    def answer(job: dict[str, Any]) -> dict[str, Any]:
        if job["format"] == "int8:channel":
            raise MeasureError("it fell over")
        return turn(0.5)

    workers(answer)
    assert failures_of_ours(race(formats="f16,int8", rounds=1)) == ["nybble int8 failed: it fell over"]


def test_nobody_left_is_an_error(workers: Callable[[Answer], list[dict[str, Any]]]) -> None:
    def answer(job: dict[str, Any]) -> dict[str, Any]:
        raise MeasureError("it fell over")

    workers(answer)
    with pytest.raises(InputError, match="no racer finished: nybble f16 failed: it fell over"):
        race(formats="f16", rounds=1)


def test_a_work_folder_keeps_files_for_the_same_model_only(
    workers: Callable[[Answer], list[dict[str, Any]]], tiny: Callable[..., Any], tmp_path: Path
) -> None:
    jobs = workers(lambda job: turn(0.5))
    for seed in (0, 1):
        tiny("gpt2", seed).save_pretrained(tmp_path / f"model-{seed}")
    for model in ("model-0", "model-0", "model-1"):
        race(tmp_path / model, formats="int8", rounds=1, work=tmp_path / "work")
    made = [job for job in jobs if job["do"] == "make"]
    assert [Path(job["source"]).name for job in made] == ["model-0", "model-1"]
    kept = sorted(path.relative_to(tmp_path / "work").parts[-1] for path in (tmp_path / "work").rglob("*") if path.is_file())
    assert kept == ["nybble-int8-channel", "nybble-int8-channel"]


def test_a_work_folder_that_cannot_be_made(workers: Callable[[Answer], list[dict[str, Any]]], tmp_path: Path) -> None:
    workers(lambda job: turn(0.5))
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot make the work folder"):
        race(formats="int8", rounds=1, work=tmp_path / "file" / "work")


def test_a_file_that_fails_half_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(self: Children, job: dict[str, Any], what: str) -> dict[str, Any]:
        if job["do"] == "check":
            return {"missing": None}
        (Path(job["target"]) / "half").mkdir(parents=True)
        raise MeasureError("no space left")

    monkeypatch.setattr(Children, "run", run)
    with pytest.raises(InputError, match="nobody can race: nybble int8 is skipped: no space left"):
        race(formats="int8", rounds=1, work=tmp_path / "work")
    assert [path for path in (tmp_path / "work").rglob("*") if path.name.startswith("nybble-int8")] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"formats": ""}, "no formats"),
        ({"against": "lama.cpp"}, "unknown peer"),
        ({"rounds": 0}, "rounds is 0"),
        ({"repeats": -1}, "repeats is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"what": "decode,dance"}, "unknown part of the work load 'dance'"),
        ({"what": ","}, "--what names nothing"),
        ({"shape": "gpt9"}, "unknown shape 'gpt9'"),
        ({"shape": "gpt2", "model": "m"}, "give no MODEL"),
        ({"peer_pythons": [("torch", "python")]}, "names no peer"),
        ({"against": "torch", "peer_pythons": [("torch", "no/such/python")]}, "'no/such/python' is not a program"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Children, "run", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(UsageError, match=words):
        race(**arguments)


def test_a_quantized_folder_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    import nybble

    nybble.quantize(tiny_folder, "int8").save(tmp_path / "small")
    with pytest.raises(InputError, match="quantized already"):
        race(tmp_path / "small")


def test_equal_tokens_are_counted_from_the_start() -> None:
    assert count_equal([1, 2, 3], [1, 2, 3]) == 3
    assert count_equal([1, 2, 3], [1, 5, 3]) == 1
    assert count_equal([], [1]) == 0


@pytest.fixture
def finished(workers: Callable[[Answer], list[dict[str, Any]]]) -> Race:
    workers(lambda job: turn(0.05 if job["runtime"] == "nybble" else 0.1))
    return race(formats="f16,int8,int4:g32,nf4:g64,int2:g32", against="llama.cpp", rounds=2)


def test_the_table_holds_every_racer_and_figure(finished: Race) -> None:
    columns, racers, rows = table_of(finished)
    assert racers[0] == "nybble f16"
    assert len(racers) == len(rows) == 8
    row = dict(zip([column.key for column in columns], rows[0], strict=True))
    assert row["tokens_per_second"] == "1,000"
    assert row["ratio_to_baseline"] == "2.00"
    assert row["weight_bytes"] == "12.0"
    assert row["batch16_tokens_per_second"] == "3,200"
    text = render_markdown(finished, plot=True)
    assert all(name.replace("_", "\\_") in text for name in racers)
    assert "(decode.png)" in text


def test_the_plot_is_a_picture(finished: Race) -> None:
    plot = draw_decode(finished)
    assert plot is not None
    assert plot.startswith(b"\x89PNG\r\n")
    assert len(plot) > 10_000


def test_no_decoding_no_plot_and_no_column(workers: Callable[[Answer], list[dict[str, Any]]]) -> None:
    without = {key: value for key, value in turn(1).items() if key not in ("decode_s", "batch_s")}
    workers(lambda job: without)
    done = race(formats="f16", rounds=1, what="prefill")
    assert draw_decode(done) is None
    keys = [column.key for column in table_of(done)[0]]
    assert "prefill_tokens_per_second" in keys
    assert "tokens_per_second" not in keys
    assert "tokens_per_second" not in json.dumps(done.line(done.finished[0])).replace("prefill_tokens_per_second", "")


class TestChildren:
    """Real processes that go wrong."""

    def children(self, tmp_path: Path, program: str) -> Children:
        """Workers whose Python is a program of ours."""
        python = tmp_path / "python"
        python.write_text(f"#!{sys.executable}\n{program}\n")
        python.chmod(0o755)
        return Children(tmp_path, 1, {"torch": str(python)})

    def run(self, tmp_path: Path, program: str) -> dict[str, Any]:
        return self.children(tmp_path, program).run({"do": "measure", "runtime": "torch"}, "torch fp32")

    def test_an_answer_is_the_last_line(self, tmp_path: Path) -> None:
        assert self.run(tmp_path, 'print("noise"); print(\'{"a": 1}\')') == {"a": 1}

    def test_an_error_keeps_its_class(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="too long"):
            self.run(tmp_path, 'print(\'{"error": "InputError", "message": "too long"}\'); raise SystemExit(1)')
        with pytest.raises(MeasureError, match="odd"):
            self.run(tmp_path, 'print(\'{"error": "print", "message": "odd"}\')')

    def test_a_death_names_its_last_words(self, tmp_path: Path) -> None:
        with pytest.raises(MeasureError, match="torch fp32 ended with code 3: last words"):
            self.run(tmp_path, "import sys; print('last words', file=sys.stderr); sys.exit(3)")
        with pytest.raises(MeasureError, match="torch fp32 was ended by SIGKILL; most often the machine ran out of memory"):
            self.run(tmp_path, "import os; os.kill(os.getpid(), 9)")

    def test_one_that_never_ends_is_ended(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("nybble.bench.child.MEASURE_SECONDS", 0.2)
        with pytest.raises(NybbleError, match="torch fp32 took over 0 s and was ended"):
            self.run(tmp_path, "import time; time.sleep(60)")


def test_the_scratch_folder_goes_away(
    workers: Callable[[Answer], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    workers(lambda job: turn(0.5))
    made = tmp_path / "scratch"
    monkeypatch.setattr(race_module.tempfile, "mkdtemp", lambda prefix: (made.mkdir(), str(made))[1])
    race(formats="int8", rounds=1)
    assert not made.exists()
