"""Speed of a loaded model as its user meets it: through `model.generate`, greedy, one sequence at a time.

    first token   prompt in, one token out, the model loaded and warm
    generation    prompt in, `new_tokens` out; an end-of-text token does not end it
    prefill       one forward pass over up to 512 tokens, logits of the last position only where the model can

Each figure is the median of several runs after a warm-up; all runs of the generation are kept. Also the texts that go
with it: greedy, and sampled from the k likeliest tokens. Left out: batches, beams, and speculative decoding.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from nybble.calibrate.windows import tokenize
from nybble.errors import InputError, NumericError, UsageError


@dataclass(frozen=True)
class Speed:
    """Seconds are wall clock; every figure is a median over `repeats` runs, except `seconds`, which holds them all."""

    first_token_seconds: float
    seconds: list[float]
    """Runs of the generation of `new_tokens`, in order."""
    tokens_per_second: float
    """new_tokens over the median of `seconds`."""
    prefill_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    prefill_tokens: int

    @property
    def median_seconds(self) -> float:
        """Median of `seconds`."""
        return statistics.median(self.seconds)


def measure_speed(
    model: Any,
    prompt_ids: list[int],
    new_tokens: int = 50,
    repeats: int = 5,
    prefill_tokens: int = 512,
    context: int | None = None,
    seed: int = 0,
) -> Speed:
    """Time a Hugging Face causal language model in evaluation mode.

    `context` is the most tokens that the model can hold (None: as its configuration says). The prefill text is
    random ids, new ones in each run, drawn with `seed`. Raises InputError when prompt and new tokens exceed the
    context, UsageError on counts below 1.
    """
    if new_tokens < 1 or repeats < 1 or prefill_tokens < 1:
        raise UsageError(f"new_tokens {new_tokens}, repeats {repeats}, prefill_tokens {prefill_tokens}: each must be at least 1")
    context = context_of(model) if context is None else context
    check_room(prompt_ids, new_tokens, context)
    ids = torch.tensor([prompt_ids], dtype=torch.int64, device=_device(model))  # [1, prompt]

    _generate(model, ids, min(new_tokens, 4))
    first = [_timed(lambda: _generate(model, ids, 1), ids.device) for _ in range(repeats)]
    seconds = [_timed(lambda: _generate(model, ids, new_tokens), ids.device) for _ in range(repeats)]

    length = prefill_tokens if context is None else min(prefill_tokens, context)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(vocabulary, (1, length), generator=generator).to(ids.device) for _ in range(repeats + 1)]
    _forward(model, texts[0])
    prefill = [_timed(lambda text=text: _forward(model, text), ids.device) for text in texts[1:]]

    return Speed(
        first_token_seconds=statistics.median(first),
        seconds=seconds,
        tokens_per_second=new_tokens / statistics.median(seconds),
        prefill_tokens_per_second=length / statistics.median(prefill),
        prompt_tokens=len(prompt_ids),
        new_tokens=new_tokens,
        prefill_tokens=length,
    )


def prompt_tokens(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, as the tokenizer begins a text (with bos where it has one). InputError without any."""
    ids = tokenize(tokenizer, prompt, special_tokens=True)
    if not ids:
        raise InputError("the prompt is empty; give at least one word to continue")
    return ids


def greedy_text(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """What the model writes after the prompt, always its likeliest token, to end-of-text or `new_tokens`."""
    return _continue(model, tokenizer, prompt, new_tokens, {"do_sample": False})


def top_k_text(model: Any, tokenizer: Any, prompt: str, new_tokens: int, seed: int, k: int = 40) -> str:
    """What the model writes after the prompt, drawn from its `k` likeliest tokens at temperature 1.

    The same seed gives the same text on the same machine; the global random state is left as it was. Raises
    NumericError when the model's probabilities are not finite.
    """
    if k < 1:
        raise UsageError(f"k {k}: at least 1 token to draw from is needed")
    device = _device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _continue(model, tokenizer, prompt, new_tokens, {"do_sample": True, "top_k": k})


def context_of(model: Any) -> int | None:
    """The most tokens that the model can hold by its configuration; None when it names no limit."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def check_room(prompt_ids: list[int], new_tokens: int, context: int | None) -> None:
    """Raise InputError when the prompt is empty, or it and the new tokens exceed the context."""
    if not prompt_ids:
        raise InputError("the prompt is empty; give at least one word to continue")
    total = len(prompt_ids) + new_tokens
    if context is not None and total > context:
        raise InputError(
            f"prompt of {len(prompt_ids)} tokens and {new_tokens} new ones make {total}, more than the model's context "
            f"of {context}; shorten the prompt to {max(0, context - new_tokens)} tokens or ask for fewer"
        )


def _continue(model: Any, tokenizer: Any, prompt: str, new_tokens: int, sampling: dict[str, Any]) -> str:
    ids = prompt_tokens(tokenizer, prompt)
    check_room(ids, new_tokens, context_of(model))
    end = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    output = _generate(model, torch.tensor([ids], device=_device(model)), new_tokens, end=end, **sampling)[0].tolist()
    # Decoded together with the prompt and cut: a sentencepiece tokenizer drops the space that begins a text.
    before = tokenizer.decode(ids, skip_special_tokens=True)
    whole = tokenizer.decode(output, skip_special_tokens=True)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(output[len(ids) :], skip_special_tokens=True))


def _generate(model: Any, ids: torch.Tensor, new_tokens: int, end: Any = None, **sampling: Any) -> torch.Tensor:
    """ids [1, prompt] -> [1, prompt + new]; all `new_tokens` when `end` is None."""
    from transformers import GenerationConfig

    settings: dict[str, Any] = {"do_sample": False, **sampling}
    if end is None:
        settings["min_new_tokens"] = new_tokens
    config = GenerationConfig(
        max_new_tokens=new_tokens, num_beams=1, use_cache=True, eos_token_id=end, pad_token_id=0, **settings
    )
    with _own_settings(model), torch.inference_mode():
        try:
            return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise NumericError("the model's probabilities are not finite, so no text can be sampled from it") from error


@contextmanager
def _own_settings(model: Any) -> Iterator[None]:
    """Set the model's stored generation settings aside: generate fills what we leave open (eos) from them."""
    from transformers import GenerationConfig

    stored = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = stored


def _forward(model: Any, ids: torch.Tensor) -> None:
    last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
    with torch.inference_mode():
        model(input_ids=ids, **({"logits_to_keep": 1} if last_only else {}))


def _timed(work: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _device(model: Any) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return torch.device(tensor.device)
    return torch.device("cpu")
