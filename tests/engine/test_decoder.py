"""Decoder on real models and at its limits: what torch computes, the same bits whatever runs it, one-line errors, no leak."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import nybble
from nybble import kernels
from nybble.engine import Decoder
from nybble.errors import FileFormatError, InputError, UsageError

MODELS = Path(__file__).parents[3] / "shared" / "data" / "models"
VOCABULARIES = {"stdlib-gpt2-6m": 4096, "stories260k-llama": 512}
SPECS = (
    "int8:channel", "int4:g32", "int4:g64,asym", "int2:g32,asym", "nf4:g64,dq", "fp4:channel", "int5:channel,asym", "fp16",
    "bf16", "int8:tensor", "int3:g128", "int6:g256,asym", "int7:g32", "nf4:g64", "fp4:g32", "fp32",
)  # fmt: skip
"""Every family, granularity and option; the first nine also on the larger model."""
CASTS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CASES = [("stdlib-gpt2-6m", spec) for spec in SPECS[:9]] + [("stories260k-llama", spec) for spec in SPECS]
LIMIT = 1e-4
"""What exact mode may differ by, as a share of the largest logit. Measured: at most 2e-6."""


pytestmark = pytest.mark.usefixtures("one_thread")


def folder_of(name: str) -> Path:
    if not (MODELS / name).is_dir():
        pytest.skip(f"{MODELS / name} is not here")
    return MODELS / name


def some_ids(vocabulary: int, count: int = 64) -> list[int]:
    return np.random.default_rng(1).integers(3, vocabulary, count).tolist()


def torch_logits(model: Any, ids: list[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        found: NDArray[np.float32] = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return found


def apart(got: NDArray[np.float32], wanted: NDArray[np.float32]) -> float:
    """The largest difference as a share of the largest logit."""
    return float(np.abs(got.astype(np.float64) - wanted).max() / np.abs(wanted).max())


def rounded(name: str, spec: str) -> Any:
    """The float model with its weights rounded to a cast's type; transformers would also compute in it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(folder_of(name)), dtype=torch.float32, local_files_only=True).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(CASTS[spec]).float()
    return model


@pytest.fixture(scope="module")
def text() -> list[int]:
    return some_ids(97, 20)


@pytest.fixture(scope="module")
def decoder(tiny_folder: Path) -> Decoder:
    """The tiny GPT-2, one thread, exact."""
    return Decoder.load(tiny_folder, threads=1, exact=True)


# ---- real models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "spec"), CASES)
def test_real_models_quantized(name: str, spec: str, tmp_path: Path) -> None:
    folder = nybble.quantize(folder_of(name), spec).save(tmp_path / "quantized")
    ids = some_ids(VOCABULARIES[name])
    model = rounded(name, spec) if spec in CASTS else nybble.load(folder).model()
    decoder = Decoder.load(folder, threads=1, exact=True)
    wanted = torch_logits(model, ids)
    error = apart(decoder.logits(ids), wanted)
    assert error < LIMIT, f"{error:.2g}"

    # Greedy text: torch, reading prompt and new tokens at once, would have taken each of them.
    new = decoder.generate(ids[:10], max_new_tokens=200, stop_tokens=())
    assert len(new) == 200
    assert torch_logits(model, ids[:10] + new).argmax(-1)[9:-1].tolist() == new

    fast = Decoder.load(folder, threads=1, cache="f32").logits(ids)
    difference = float(np.linalg.norm(fast - wanted) / np.linalg.norm(wanted))
    if spec in CASTS:
        assert difference < LIMIT, "a float weight is multiplied exactly in both modes"
    else:  # measured: 0.007 to 0.02; rounding to int8 in blocks of 64 cannot cost nothing
        assert 1e-3 < difference < 0.05


@pytest.mark.parametrize("name", VOCABULARIES)
def test_real_models_in_float(name: str) -> None:
    from transformers import AutoModelForCausalLM

    ids = some_ids(VOCABULARIES[name])
    model = AutoModelForCausalLM.from_pretrained(str(folder_of(name)), dtype=torch.float32, local_files_only=True).eval()
    wanted = torch_logits(model, ids)
    for exact in (True, False):
        decoder = Decoder.load(folder_of(name), threads=1, exact=exact, cache="f32")
        assert apart(decoder.logits(ids), wanted) < LIMIT
        assert decoder.vocabulary == VOCABULARIES[name]
        assert decoder.context == 512
    start = torch.tensor([ids[:10]])
    told = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=200, min_new_tokens=200, do_sample=False, pad_token_id=0
    )
    # min_new_tokens forbids the end of the text, which a free choice could have been.
    free = Decoder.load(folder_of(name), threads=1, exact=True).generate(ids[:10], max_new_tokens=200, stop_tokens=())
    ends = set(decoder.end_tokens)
    until = next((i for i, token in enumerate(free) if token in ends), 200)
    assert told[0, 10 : 10 + until].tolist() == free[:until]
    assert until > 20, "the text ends too early for the test to say much"


# ---- the same bits ----------------------------------------------------------------------------------------------------

BITS = """
import hashlib, json, sys
import numpy as np
from nybble import kernels
from nybble.engine import Decoder
found = {}
for folder, caches in json.loads(sys.argv[1]):
    ids = np.random.default_rng(2).integers(3, 97, 21).tolist()
    for exact in (True, False):
        for cache in caches:
            for threads in (1, 2):
                decoder = Decoder.load(folder, threads=threads, exact=exact, cache=cache)
                digest = hashlib.sha256(decoder.logits(ids).tobytes())
                digest.update(json.dumps(decoder.generate(ids[:5], max_new_tokens=6, stop_tokens=())).encode())
                found.setdefault(f"{folder} {exact} {cache}", set()).add(digest.hexdigest())
print(json.dumps([kernels.instruction_set(), {key: sorted(values) for key, values in found.items()}]))
"""


def test_every_instruction_set_and_both_thread_counts_give_the_same_bits(
    tiny: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    python_script: Callable[..., str],
    environment: dict[str, str],
) -> None:
    native = kernels.native()
    if native is None:
        pytest.skip("the C++ extension is not built, or NYBBLE_KERNELS=reference is set")
    folders = []
    for name, spec in (
        ("gpt2", "int4:g32,asym"),
        ("gpt2", "fp16"),
        ("llama", "nf4:g64"),
        ("qwen3", "int3:g64"),
        ("gemma", "int8:channel"),
    ):
        folders.append(
            (
                str(nybble.quantize(tiny(name), spec).save(tmp_path / f"{name}-{len(folders)}")),
                ["f32", "f16", "int16", "int8", "int4"],
            )
        )
    if (MODELS / "stdlib-gpt2-6m").is_dir():
        folders.append((str(nybble.quantize(MODELS / "stdlib-gpt2-6m", "int4:g32").save(tmp_path / "real")), ["f16", "int16"]))
    seen: dict[str, dict[str, list[str]]] = {}
    for name in native.instruction_sets():
        monkeypatch.setitem(environment, "NYBBLE_KERNELS", name)
        ran, found = json.loads(python_script(BITS, json.dumps(folders)))
        assert ran == name
        seen[name] = found
    first = seen["scalar"]
    for name, found in seen.items():
        for case, digests in found.items():
            assert len(digests) == 1, f"{name}: {case} depends on threads"
            assert digests == first[case], f"{name}: {case} differs from scalar"
    # fp16 weights are multiplied exactly in both modes; no other two cases are the same computation.
    assert len({digests[0] for digests in first.values()}) == len(first) - 5, "different cases gave the same bits"


def test_long_prompts_are_read_in_pieces_with_the_same_bits(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1400,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "long")
    ids = some_ids(97, 1300)
    decoder = Decoder.load(tmp_path / "long", threads=2, exact=True)
    got = decoder.logits(ids)
    assert apart(got, torch_logits(model, ids)) < LIMIT
    for count in (511, 512, 513, 1024, 1025, 1300):
        np.testing.assert_array_equal(decoder.prefill(ids[:count]), got[count - 1])
    fast = Decoder.load(tmp_path / "long", threads=2)
    prompts = [ids[:700], ids[:3], ids[100:800]]
    assert fast.generate_batch(prompts, max_new_tokens=5) == [fast.generate(prompt, max_new_tokens=5) for prompt in prompts]
    many = [ids[i : i + 3] for i in range(530)]  # more texts than rows of one run
    alone = fast.generate(many[529], max_new_tokens=3)
    assert fast.generate_batch(many, max_new_tokens=3)[529] == alone


def test_batches_sample_each_text_as_it_would_be_alone(decoder: Decoder, text: list[int]) -> None:
    how: dict[str, Any] = {"max_new_tokens": 15, "temperature": 0.9, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.2}
    prompts = [text[:3], text, text[5:9]]
    together = decoder.generate_batch(prompts, seed=11, stop_tokens=(), **how)
    assert together == [decoder.generate(prompt, seed=11 + i, stop_tokens=(), **how) for i, prompt in enumerate(prompts)]
    assert together[0] != decoder.generate(prompts[0], seed=99, stop_tokens=(), **how)


# ---- texts end --------------------------------------------------------------------------------------------------------


def test_end_tokens_end_a_text(decoder: Decoder, text: list[int]) -> None:
    free = decoder.generate(text, max_new_tokens=20, stop_tokens=())
    assert len(free) == 20
    stop = free[5]
    assert decoder.generate(text, max_new_tokens=20, stop_tokens=[stop]) == free[: free.index(stop) + 1]
    assert decoder.end_tokens == (2,)
    assert 2 not in decoder.generate(text, max_new_tokens=20)[:-1]
    batch = decoder.generate_batch([text, text[:4]], max_new_tokens=20, stop_tokens=[stop])
    assert batch == [decoder.generate(prompt, max_new_tokens=20, stop_tokens=[stop]) for prompt in (text, text[:4])]
    assert decoder.generate_batch([], max_new_tokens=5) == []


def test_a_stream_gives_tokens_as_they_come(decoder: Decoder, text: list[int]) -> None:
    stream = decoder.stream(text, max_new_tokens=10, stop_tokens=())
    first = next(stream)
    assert [first, *stream] == decoder.generate(text, max_new_tokens=10, stop_tokens=())
    with pytest.raises(InputError):  # at the call, not at the first token
        decoder.stream([], max_new_tokens=10)


def test_a_decoder_is_as_new_after_every_text(decoder: Decoder, text: list[int]) -> None:
    wanted = decoder.logits(text)
    decoder.generate(text[::-1], max_new_tokens=40, stop_tokens=())
    stream = decoder.stream(text[:3], max_new_tokens=10)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    decoder.generate_batch([text, text[:2], text[:9]], max_new_tokens=9)
    np.testing.assert_array_equal(decoder.logits(text), wanted)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])  # queries, keys and values in one matrix, and in three
def test_rows_that_nobody_wants_change_nothing(name: str, exact: bool, tiny: Callable[..., Any], tmp_path: Path) -> None:
    folder = nybble.quantize(tiny(name), "int4:g32").save(tmp_path / "model")
    decoder = Decoder.load(folder, threads=2, exact=exact)
    runner = decoder._runner
    ids = np.array(some_ids(90, 30))
    for count in (*range(1, 21), 30):
        runner.reserve(1, 32)
        rows = ids[:count], np.arange(count), np.zeros(count, dtype=np.int64)
        whole = runner.run(*rows, np.arange(count))
        following = [np.array([value]) for value in (ids[0], count, 0, 0)]
        after = runner.run(*following)
        for wanted in ([], [0], [count - 1], [count // 2], sorted({count // 3, count - 1})):
            runner.reserve(1, 32)
            some = runner.run(*rows, np.array(wanted, dtype=np.int64))
            np.testing.assert_array_equal(some, whole[wanted])
            np.testing.assert_array_equal(runner.run(*following), after)  # the cache holds every row


def test_matrices_that_share_rows_may_need_other_sums_of_them(tiny: Callable[..., Any], tmp_path: Path) -> None:
    """Queries whose scales are too small for whole numbers, values whose scales are not: both read the same quantized rows."""
    model = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 1e-30
    folder = nybble.quantize(model, "int4:g32,f32").save(tmp_path / "model")
    decoder = Decoder.load(folder, threads=1)
    ids = some_ids(90, 30)
    wanted = [decoder.prefill(ids[:count]) for count in (1, 2, 3, 4)]
    np.testing.assert_array_equal(decoder.logits(ids)[:4], wanted)


# ---- limits and errors ------------------------------------------------------------------------------------------------


def one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 250


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "give at least one id"),
        ([[1, 2]], r"ids have shape \(1, 2\)"),
        ([1, 97], "id 97 at position 1 is not of the vocabulary, 0 to 96"),
        ([-1], "id -1 at position 0 is not of the vocabulary"),
        ([1.5], "ids must be whole numbers"),
        (["a"], "ids must be whole numbers"),
        ([True, False], "ids must be whole numbers"),
        ([1 << 70], "ids must be whole numbers"),
        ([[1], [1, 2]], "ids must be whole numbers"),
    ],
)
def test_ids_that_make_no_sense(decoder: Decoder, ids: Any, message: str) -> None:
    for call in (
        decoder.logits,
        decoder.prefill,
        decoder.generate,
        decoder.stream,
        lambda ids: decoder.generate_batch([[1], ids]),
    ):
        with pytest.raises(InputError, match=message) as caught:
            call(ids)
        one_line(caught.value)


def test_the_context_is_a_limit_that_can_be_reached(decoder: Decoder) -> None:
    ids = some_ids(97, 64)
    assert decoder.context == 64
    assert decoder.logits(ids).shape == (64, 97)
    assert len(decoder.generate(ids[:50], max_new_tokens=14, stop_tokens=())) == 14
    with pytest.raises(InputError, match="prompt of 65 tokens are more than the context of 64; shorten it"):
        decoder.logits([*ids, 3])
    expected = (
        "prompt of 50 tokens and 15 new ones make 65, more than the context of 64; "
        "shorten the prompt to 49 tokens or ask for fewer"
    )
    for call in (decoder.generate, decoder.stream, lambda ids, **how: decoder.generate_batch([[1], ids], **how)):
        with pytest.raises(InputError, match=re.escape(expected)) as caught:
            call(ids[:50], max_new_tokens=15)
        one_line(caught.value)


def test_a_smaller_context_can_be_asked_for(tiny_folder: Path, decoder: Decoder) -> None:
    small = Decoder.load(tiny_folder, threads=1, exact=True, context=16)
    ids = some_ids(97, 17)
    np.testing.assert_array_equal(small.logits(ids[:16]), decoder.logits(ids[:16]))
    with pytest.raises(InputError, match="more than the context of 16"):
        small.logits(ids)
    for context in (0, 65, -1, 1.5, True):
        with pytest.raises(UsageError, match=r"context .* is not a whole number from 1 to 64"):
            Decoder.load(tiny_folder, context=context)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threads": 0}, "threads 0 is not a whole number from 1 to 256"),
        ({"threads": 257}, "threads 257"),
        ({"threads": "2"}, "threads '2'"),
        ({"cache": "int2"}, "unknown cache 'int2'"),
    ],
)
def test_arguments_out_of_range(tiny_folder: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Decoder.load(tiny_folder, **arguments)
    one_line(caught.value)


@pytest.mark.parametrize("new", [0, -1, 65, 2.0, None])
def test_new_tokens_out_of_range(decoder: Decoder, new: Any) -> None:
    for call in (decoder.generate, decoder.stream, lambda ids, max_new_tokens: decoder.generate_batch([ids], max_new_tokens)):
        with pytest.raises(UsageError, match=r"max_new_tokens .* is not a whole number from 1 to 64"):
            call([1], max_new_tokens=new)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises((InputError, FileFormatError)) as caught:
        Decoder.load(tmp_path / "nothing")
    one_line(caught.value)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises((InputError, FileFormatError)) as caught:
        Decoder.load(tmp_path)
    one_line(caught.value)


def resident() -> int:
    import os

    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="reads Linux's /proc")
def test_ten_thousand_tokens_leave_nothing_behind(tiny_folder: Path, text: list[int]) -> None:
    decoders = [Decoder.load(tiny_folder, threads=threads) for threads in (1, 1, 1, 1, 1, 2)]

    def tokens() -> int:
        return sum(tokens_of(decoder) for decoder in decoders)

    def tokens_of(decoder: Decoder) -> int:
        count = len(decoder.generate(text, max_new_tokens=44, stop_tokens=()))
        count += len(decoder.generate(text[:9], max_new_tokens=50, temperature=0.8, top_p=0.9, stop_tokens=()))
        return count + sum(map(len, decoder.generate_batch([text, text[:3]], max_new_tokens=40, stop_tokens=())))

    for _ in range(2):
        tokens()
    before, done = resident(), 0
    while done < 10_000:
        done += tokens()
    grown = resident() - before
    assert grown < 2 << 20, f"{grown} bytes more after {done} tokens"
