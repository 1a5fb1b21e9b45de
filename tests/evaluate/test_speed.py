"""Speed figures are sane and the texts that go with them repeat; nothing here asserts how fast a machine is."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nybble.demo import model_folder
from nybble.errors import InputError, NumericError, UsageError
from nybble.evaluate.speed import context_of, greedy_text, measure_speed, prompt_tokens, top_k_text

PROMPT = "def main():\n"


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_folder())


def test_figures_are_sane(model: Any, tokenizer: Any) -> None:
    ids = prompt_tokens(tokenizer, PROMPT)
    found = measure_speed(model, ids, new_tokens=12, repeats=3, prefill_tokens=2000)
    assert len(found.seconds) == 3
    assert found.median_seconds == statistics.median(found.seconds)
    assert found.first_token_seconds > 0
    assert min(found.seconds) > 0
    assert found.tokens_per_second == pytest.approx(12 / found.median_seconds)
    assert found.prefill_tokens == 512  # the context, where the model has less than was asked for
    assert found.prefill_tokens_per_second > 0
    assert (found.prompt_tokens, found.new_tokens) == (len(ids), 12)


def test_every_run_makes_all_tokens_even_after_end_of_text(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only_end = copy.deepcopy(model)
    with torch.no_grad():
        only_end.transformer.ln_f.weight.zero_()
        only_end.transformer.ln_f.bias.copy_(1e3 * only_end.transformer.wte.weight[0])
    lengths: list[int] = []
    generate = type(model).generate

    def counted(self: Any, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        output = generate(self, ids, **settings)
        lengths.append(output.shape[1] - ids.shape[1])
        return output  # type: ignore[no-any-return]

    monkeypatch.setattr(type(model), "generate", counted)
    measure_speed(only_end, [5, 6], new_tokens=9, repeats=2, prefill_tokens=8)
    assert lengths == [4, 1, 1, 9, 9]


def test_stored_settings_of_the_model_are_untouched_and_do_not_matter(model: Any, tokenizer: Any) -> None:
    other = copy.deepcopy(model)
    other.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0)
    stored = copy.deepcopy(other.generation_config)
    assert greedy_text(other, tokenizer, PROMPT, 12) == greedy_text(model, tokenizer, PROMPT, 12)
    assert other.generation_config == stored


def test_prompt_longer_than_the_context(model: Any, tokenizer: Any) -> None:
    assert context_of(model) == 512
    message = r"prompt of 463 tokens and 50 new ones make 513, more than the model's context of 512; shorten .* to 462"
    with pytest.raises(InputError, match=message):
        measure_speed(model, [5] * 463)
    with pytest.raises(InputError, match="context of 512"):
        greedy_text(model, tokenizer, "x = 1\n" * 400, 50)
    with pytest.raises(InputError, match="context of 16"):
        measure_speed(model, [5] * 8, new_tokens=9, context=16)


def test_wrong_counts_and_empty_prompts(model: Any, tokenizer: Any) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        measure_speed(model, [5], new_tokens=0)
    with pytest.raises(UsageError, match="at least 1"):
        top_k_text(model, tokenizer, PROMPT, 4, seed=0, k=0)
    with pytest.raises(InputError, match="prompt is empty"):
        measure_speed(model, [])
    with pytest.raises(InputError, match="prompt is empty"):
        greedy_text(model, tokenizer, "", 4)
    with pytest.raises(InputError, match="tokenizer failed on the text"):
        prompt_tokens(tokenizer, "half a character \ud800")


def test_greedy_text_equals_a_plain_loop(model: Any, tokenizer: Any) -> None:
    ids = prompt_tokens(tokenizer, PROMPT)
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert 0 not in ids  # no end-of-text, or the comparison would be of something else
    assert PROMPT + greedy_text(model, tokenizer, PROMPT, 12) == tokenizer.decode(ids)


def test_sampled_text_repeats_with_its_seed_and_leaves_the_global_state(model: Any, tokenizer: Any) -> None:
    before = torch.get_rng_state()
    texts = [top_k_text(model, tokenizer, PROMPT, 20, seed) for seed in (1, 1, 2, 3)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3
    assert torch.equal(torch.get_rng_state(), before)
    assert top_k_text(model, tokenizer, PROMPT, 12, seed=5, k=1) == greedy_text(model, tokenizer, PROMPT, 12)


def test_sampling_from_a_broken_model(model: Any, tokenizer: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.transformer.ln_f.weight.fill_(torch.nan)
    with pytest.raises(NumericError, match="not finite"):
        top_k_text(broken, tokenizer, PROMPT, 4, seed=0)
