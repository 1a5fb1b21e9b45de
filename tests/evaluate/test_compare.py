"""The main job on real models, with few windows: are the records complete, sane, repeatable, and readable again."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GPTNeoConfig, GPTNeoForCausalLM

import nybble
import nybble.demo
from nybble.errors import InputError, UsageError
from nybble.evaluate.record import HISTOGRAM_BINS, Record, from_line, read_results
from nybble.files.native import open_native
from nybble.models.checkpoint import open_checkpoint

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SETTINGS: dict[str, Any] = {
    "variants": "fast",
    "windows": 2,
    "window": 128,
    "repeats": 1,
    "new_tokens": 5,
    "threads": 2,
    "seed": 7,
}
QUALITY = ("perplexity", "perplexity_se", "kl_mean", "kl_se", "kl_p99", "top1_agreement")
MEMORY = ("memory_before_bytes", "memory_after_load_bytes", "memory_peak_bytes", "memory_after_cleanup_bytes")


@dataclasses.dataclass
class Outcome:
    records: list[Record]
    seen: list[str]
    progress: list[tuple[str, str, float]]
    left: list[Path]

    def __getitem__(self, variant: str) -> Record:
        return next(record for record in self.records if record.variant == variant)


def make_gpt_neo(folder: Path) -> Path:
    """A tiny GPT-Neo of random weights with the tokenizer of the model that ships."""
    source = nybble.demo.model_folder()
    settings = {"hidden_size": 48, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
    config = GPTNeoConfig(vocab_size=4096, max_position_embeddings=64, window_size=8, bos_token_id=0, eos_token_id=0, **settings)
    GPTNeoForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """One run on the model that ships, shared by the tests of this file."""
    work = tmp_path_factory.mktemp("work")
    outcome = Outcome([], [], [], [])
    outcome.records = nybble.compare(
        **SETTINGS,
        work=work,
        progress=lambda *step: outcome.progress.append(step),
        on_record=lambda record: outcome.seen.append(record.variant),
    )
    outcome.left = list(work.iterdir())
    return outcome


def test_one_record_per_variant_in_order_and_nothing_left(demo_run: Outcome) -> None:
    assert [record.variant for record in demo_run.records] == ["fp32", "int8:channel", "int4:g64"] == demo_run.seen
    assert demo_run.left == []
    fractions = [fraction for _, _, fraction in demo_run.progress]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1


def test_records_are_complete(demo_run: Outcome) -> None:
    for record in demo_run.records:
        empty = {field.name for field in dataclasses.fields(record) if getattr(record, field.name) is None}
        assert empty <= (set() if Path("/proc/self/status").is_file() else set(MEMORY))
        assert record.seconds_50_tokens_runs is not None
        assert len(record.seconds_50_tokens_runs) == 1
        assert record.tokens_per_second == pytest.approx(5 / (record.seconds_50_tokens or 0))
        assert (record.first_token_seconds or 0) > 0
        assert (record.prefill_tokens_per_second or 0) > (record.tokens_per_second or 0)
        assert (record.limit_tokens_per_second or 0) > 0
        assert (record.load_seconds or 0) > 0
        assert (record.quantize_seconds or 0) > 0
        assert record.sample_greedy
        assert record.sample_top_k


def test_the_engine_is_measured_beside_torch(demo_run: Outcome) -> None:
    bandwidth = demo_run.records[0].run.machine["bandwidth_bytes_per_second"]
    for record in demo_run.records:
        engine = record.engine
        assert engine is not None
        assert engine.activations == ("float" if record.variant == "fp32" else "int8")
        assert (engine.cache, engine.threads) == ("int16", 2)
        assert engine.instruction_set == record.run.machine["instruction_set"]
        assert len(engine.seconds_50_tokens_runs) == 1
        assert engine.tokens_per_second == pytest.approx(5 / engine.seconds_50_tokens)
        assert engine.start_seconds > engine.load_seconds > 0
        assert min(engine.first_token_seconds, engine.prefill_tokens_per_second, engine.batch8_tokens_per_second) > 0
        assert engine.bandwidth_share == pytest.approx(engine.bytes_per_token * engine.tokens_per_second / bandwidth)
        assert engine.bytes_per_token > 0.9 * record.weight_bytes
        assert not [note for note in record.notes if "engine" in note]
    base, int8, int4 = (record.engine.weight_bytes for record in demo_run.records if record.engine)
    assert base > 3 * int8 > 4 * int4


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_the_engine_needs_less_memory_than_torch(demo_run: Outcome) -> None:
    for record in demo_run.records:
        assert record.engine is not None
        before, after = record.engine.memory_before_bytes or 0, record.engine.memory_after_load_bytes or 0
        assert before < (record.memory_before_bytes or 0) / 2  # no torch in that process
        assert before < after < (record.memory_after_load_bytes or 0)


@pytest.mark.slow
def test_a_model_without_a_table_is_measured_by_torch_alone(tmp_path: Path) -> None:
    """GPT-Neo has no table for the engine; its tokenizer is that of the model that ships."""
    folder = make_gpt_neo(tmp_path / "neo")
    (record,) = nybble.compare(folder, **{**SETTINGS, "variants": "fp32", "window": 32, "new_tokens": 4})
    assert record.engine is None
    assert [note for note in record.notes if note.startswith("not decoded by the engine: ")]
    assert (record.seconds_50_tokens or 0) > 0
    assert json.loads(record.to_line())["engine"] is None
    assert from_line(record.to_line()) == record


def test_quality_is_sane(demo_run: Outcome) -> None:
    base, int8, int4 = demo_run.records
    assert (base.kl_mean, base.kl_p99, base.top1_agreement) == (0, 0, 1)
    assert int8.kl_mean is not None
    assert int4.kl_mean is not None
    assert 0 < int8.kl_mean < 0.001 < int4.kl_mean < 0.2
    assert 1 > (int8.top1_agreement or 0) > (int4.top1_agreement or 0) > 0.7
    assert int8.perplexity == pytest.approx(base.perplexity, rel=0.005)
    assert base.perplexity is not None
    assert 5 < base.perplexity < 100
    assert 1 < (int4.perplexity or 0) / base.perplexity < 1.2


def test_bytes_fall_as_the_bits_say(demo_run: Outcome) -> None:
    base, int8, int4 = demo_run.records
    assert base.bpw == 32
    assert 8 < int8.bpw < 8.2
    assert int4.bpw == 4.25
    assert int8.weight_bytes / base.weight_bytes == pytest.approx(int8.bpw / 32, rel=0.02)
    assert int4.weight_bytes / base.weight_bytes == pytest.approx(int4.bpw / 32, rel=0.04)  # norms and biases stay
    for record in demo_run.records:
        assert record.file_bytes < record.weight_bytes + 32_000
        weights = sum(layer.shape[0] * layer.shape[1] for layer in record.layers)
        assert sum(layer.bpw * layer.shape[0] * layer.shape[1] for layer in record.layers) == pytest.approx(record.bpw * weights)
    assert base.weight_bytes == 4 * base.run.model["parameters"]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
def test_memory_holds_the_weights_and_gives_them_back(demo_run: Outcome) -> None:
    base = demo_run["fp32"]
    for record in demo_run.records:
        before, loaded, peak, after = (getattr(record, name) for name in MEMORY)
        assert before < loaded <= peak
        assert after < peak
        assert loaded - before > 0.5 * record.weight_bytes
    grown = {
        record.variant: (record.memory_after_load_bytes or 0) - (record.memory_before_bytes or 0) for record in demo_run.records
    }
    assert grown["int4:g64"] < 0.6 * grown["fp32"]  # the model's 24 MB; pages and allocators blur a few
    assert grown["fp32"] < 2 * base.weight_bytes


def test_layers_and_histograms(demo_run: Outcome) -> None:
    base, int8, int4 = demo_run.records
    for record in demo_run.records:
        assert len(record.layers) == len(base.layers) == 26
        assert len(record.model_histogram) == HISTOGRAM_BINS
        assert sum(record.model_histogram) == sum(layer.shape[0] * layer.shape[1] for layer in record.layers)
        assert record.model_histogram_limit == base.model_histogram_limit
        for layer in record.layers:
            assert sum(layer.histogram) == layer.shape[0] * layer.shape[1]
    for float_layer, fine, coarse in zip(base.layers, int8.layers, int4.layers, strict=True):
        assert float_layer.name == fine.name == coarse.name
        assert float_layer.relative_error == 0
        assert 1e-6 < fine.relative_error < 1e-3 < coarse.relative_error < 0.05
        assert float_layer.histogram_limit == fine.histogram_limit


def test_the_run_says_where_it_comes_from(demo_run: Outcome) -> None:
    run = demo_run.records[0].run
    assert all(record.run == run for record in demo_run.records)
    assert run.model["architecture"] == "GPT2LMHeadModel"
    assert run.model["blake3"] == open_checkpoint(nybble.demo.model_folder()).digest()
    assert run.model["random_weights"] is False
    assert run.text is not None
    facts = {key: run.text[key] for key in ("protocol", "window", "windows", "scored_tokens", "kl_tokens", "bos")}
    assert facts == {"protocol": "paper", "window": 128, "windows": 2, "scored_tokens": 254, "kl_tokens": 254, "bos": False}
    assert len(run.text["sha256"]) == 64
    assert {"nybble", "python", "torch", "transformers", "tokenizers", "numpy"} == set(run.versions)
    assert run.machine["bandwidth_bytes_per_second"] > 1e8
    assert (run.threads, run.seed, run.new_tokens, run.repeats) == (2, 7, 5, 1)
    assert run.prompt_tokens > 3


def test_the_plan_hash_is_that_of_quantize(demo_run: Outcome, tmp_path: Path) -> None:
    saved = nybble.quantize(nybble.demo.model_folder(), "int4:g64").save(tmp_path / "m")
    assert demo_run["int4:g64"].plan_hash == open_native(saved).provenance["plan_hash"]
    assert len({record.plan_hash for record in demo_run.records}) == 3


def test_the_saved_lines_are_read_again_and_reported(
    demo_run: Outcome, tmp_path: Path, nybble_command: Callable[..., Any]
) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text("".join(record.to_line() + "\n" for record in demo_run.records), encoding="utf-8")
    assert read_results(path) == demo_run.records
    assert from_line(demo_run.records[1].to_line()) == demo_run.records[1]
    done = nybble_command("report", path, "-o", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "int8:channel" in page
    assert list(tmp_path.glob("*.md"))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_quality_and_texts(demo_run: Outcome) -> None:
    again = nybble.compare(**SETTINGS)
    for first, second in zip(demo_run.records, again, strict=True):
        for name in (*QUALITY, "sample_greedy", "sample_top_k", "bpw", "weight_bytes", "file_bytes", "plan_hash"):
            assert getattr(first, name) == getattr(second, name), name
        assert first.layers == second.layers
    other = nybble.compare(**{**SETTINGS, "variants": "fp32", "seed": 8})
    assert other[0].sample_top_k != demo_run.records[0].sample_top_k
    assert other[0].perplexity == demo_run.records[0].perplexity


@pytest.mark.slow
def test_rows_that_do_not_fit_the_groups() -> None:
    model, text = DATA / "models" / "stories260k-llama", DATA / "text" / "tinystories" / "validation_first1000.txt"
    if not (model / "config.json").is_file() or not text.is_file():
        pytest.skip("the stories model and text are not beside this checkout")
    records = nybble.compare(
        model, text, **{**SETTINGS, "variants": "int8,int4:g64,int4:g64+rtn:mse"}, calibrate=text, keep=["lm_head"]
    )
    assert [record.variant for record in records] == ["fp32", "int8:channel", "int4:g64", "int4:g64+rtn:mse"]
    assert records[0].notes == []
    assert any("rows of 172 columns" in note for note in records[2].notes)
    assert any("kept in float" in note for note in records[2].notes)
    kl = [record.kl_mean for record in records]
    assert kl[0] == 0
    assert None not in kl
    assert np.all(np.diff([kl[0], kl[1], kl[3]]) > 0)  # type: ignore[arg-type]
    assert records[0].run.text is not None
    assert records[0].run.text["bos"] is True


@pytest.mark.slow
def test_a_shape_gives_memory_and_speed_but_no_quality() -> None:
    base, int8, int4 = nybble.compare(shape="gpt2", variants="fast", repeats=1, new_tokens=2, threads=2)
    assert base.run.model["random_weights"] is True
    assert base.run.text is None
    assert all(getattr(record, name) is None for record in (base, int8, int4) for name in (*QUALITY, "sample_greedy"))
    assert base.run.model["parameters"] == 124_439_808
    assert int8.weight_bytes < 0.26 * base.weight_bytes
    assert int4.weight_bytes < 0.14 * base.weight_bytes
    assert (base.memory_after_load_bytes or 0) > (int8.memory_after_load_bytes or 0) > (int4.memory_after_load_bytes or 0)
    assert json.loads(base.to_line())["perplexity"] is None


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"variants": "int44"}, UsageError),
        ({"protocol": "papr"}, UsageError),
        ({"windows": 0}, UsageError),
        ({"shape": "gpt2", "model": "x"}, UsageError),
        ({"text": "no-such-file.txt"}, InputError),
        ({"model": Path("no-such-folder")}, InputError),
        ({"calibrate": "no-such-file.txt"}, InputError),
    ],
    ids=str,
)
def test_wrong_arguments_fail_at_once_and_leave_nothing(
    arguments: dict[str, Any], error: type[Exception], tmp_path: Path
) -> None:
    with pytest.raises(error):
        nybble.compare(**arguments, work=tmp_path)
    assert list(tmp_path.iterdir()) == []
