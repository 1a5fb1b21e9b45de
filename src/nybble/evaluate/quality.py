"""Quality of a model on token windows: perplexity, and how far its predictions are from the float model's.

    perplexity       exp(mean of -log p(target)) over the scored targets of calibrate/windows.py
    KL               sum over the vocabulary of p (log p - log q), p the float model, q this one, in nats per token
    top-1 agreement  fraction of tokens where both models hold the same successor for the most likely

KL and agreement are taken at the positions that predict a scored target (position t - 1 for target t), so that every
figure speaks of the same tokens. Logits are raised to float32 before log_softmax, sums are float64. Standard errors
take different windows as independent of each other (tokens inside a window are not).

The float model's log-probabilities are computed once and kept in a file (`LogitCache`): 4 bytes times vocabulary per
token, so a byte budget decides how many windows KL is measured on. At most `batch_tokens` tokens are in flight.

Left out: padding and attention masks (windows have one length), tasks with answers, and samples of the model's own
text, whose loss is not a perplexity.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from nybble.calibrate.windows import Windows
from nybble.errors import FileFormatError, NumericError, OutputError, UsageError

CACHE_SCHEMA = "nybble.logits/1"
CACHE_BUDGET_BYTES = 2 * 1024**3
CHUNK_VALUES = 1 << 21
"""Log-probabilities handled at a time: 8 MiB of float32, which stays near the caches, whatever the vocabulary."""

Progress = Callable[[int, int], None]
"""Called with (windows done, windows in all) after each batch."""


@dataclass(frozen=True)
class Quality:
    """What was measured. A figure that could not be is None, and `note` says why."""

    perplexity: float
    """inf when a prediction is not finite (float16 overflow, a broken variant)."""
    perplexity_se: float | None
    """perplexity * standard error of the mean loss; None with one window."""
    nll_mean: float
    """Mean -log p(target), nats."""
    scored_tokens: int
    kl_mean: float | None
    kl_se: float | None
    kl_p99: float | None
    """99th percentile of the per-token KL."""
    kl_tokens: int
    top1_agreement: float | None
    note: str | None = None


@dataclass(frozen=True)
class LogitCache:
    """Log-probabilities of the float model, float32 [tokens, vocabulary], row by row in `<folder>/logits.bin`.

    Rows are the scored targets of the first `windows` windows, in order. A header, `logits.json`, says which model and
    which windows they belong to.
    """

    folder: Path
    model_digest: str
    windows_sha256: str
    windows: int
    tokens: int
    vocabulary: int

    @property
    def data(self) -> Path:
        """The file of raw little-endian float32 values."""
        return self.folder / "logits.bin"

    @property
    def size_bytes(self) -> int:
        """4 bytes per value."""
        return self.tokens * self.vocabulary * 4

    @staticmethod
    def create(
        folder: str | Path,
        model: Any,
        model_digest: str,
        windows: Windows,
        budget_bytes: int = CACHE_BUDGET_BYTES,
        batch_tokens: int = 2048,
        progress: Progress | None = None,
    ) -> LogitCache | None:
        """Run the float model over as many windows as fit the budget and keep what it predicts.

        None when not even one window fits (KL is then not measured). Raises NumericError when the model's own logits
        are not finite, OutputError when the folder cannot be written. An interrupted run leaves no cache behind.
        """
        folder = Path(folder)
        vocabulary = _vocabulary(model, windows)
        rows_after = np.cumsum(windows.scored.sum(axis=1))  # rows up to and including each window
        count = int(np.searchsorted(rows_after, budget_bytes // (vocabulary * 4), side="right"))
        if count == 0:
            return None
        cache = LogitCache(folder, model_digest, windows.sha256, count, int(rows_after[count - 1]), vocabulary)
        partial = folder / "logits.bin.partial"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            cache._header.unlink(missing_ok=True)
            try:
                with partial.open("wb") as file:
                    for chunk in log_probabilities(model, windows, count, batch_tokens, progress):
                        if not chunk.finite:
                            raise NumericError(
                                f"the float model's logits are not finite in window {chunk.window}; check its weights"
                            )
                        file.write(chunk.log_probs.cpu().numpy().astype("<f4", copy=False).data)
                os.replace(partial, cache.data)
            finally:
                partial.unlink(missing_ok=True)
            header = {
                "schema": CACHE_SCHEMA,
                "model_digest": model_digest,
                "windows_sha256": cache.windows_sha256,
                "windows": count,
                "shape": [cache.tokens, vocabulary],
            }
            temporary = folder / "logits.json.partial"
            temporary.write_text(json.dumps(header), encoding="utf-8")
            os.replace(temporary, cache._header)  # last: data without a header is no cache
        except OSError as error:
            raise OutputError(
                f"cannot keep {cache.size_bytes} bytes of float logits in {folder}: {error.strerror or error}"
            ) from error
        return cache

    @staticmethod
    def open(folder: str | Path, model_digest: str, windows: Windows) -> LogitCache | None:
        """The cache in a folder; None when there is none for this model and windows. FileFormatError if damaged."""
        folder = Path(folder)
        path = folder / "logits.json"
        if not path.is_file():
            return None
        try:
            header = json.loads(path.read_text(encoding="utf-8"))
            if header["schema"] != CACHE_SCHEMA:
                return None
            tokens, vocabulary = (int(n) for n in header["shape"])
            cache = LogitCache(
                folder, header["model_digest"], header["windows_sha256"], int(header["windows"]), tokens, vocabulary
            )
            size = cache.data.stat().st_size
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise FileFormatError(f"{path} is not a header of cached logits ({error}); delete the folder") from error
        if cache.model_digest != model_digest or cache.windows_sha256 != windows.sha256:
            return None
        if size != cache.size_bytes or tokens != int(windows.scored[: cache.windows].sum()):
            raise FileFormatError(f"{cache.data} has {size} bytes, {cache.size_bytes} promised; delete the folder")
        return cache

    @property
    def _header(self) -> Path:
        return self.folder / "logits.json"


@dataclass(frozen=True)
class Chunk:
    """Predictions of some scored targets of one window."""

    window: int
    targets: torch.Tensor  # int64 [rows]
    log_probs: torch.Tensor  # float32 [rows, vocabulary]
    finite: bool


def evaluate(
    model: Any,
    windows: Windows,
    cache: LogitCache | None = None,
    batch_tokens: int = 2048,
    progress: Progress | None = None,
) -> Quality:
    """Measure a causal language model, called as `model(input_ids=int64 [B, length]).logits`, in evaluation mode.

    With a cache, also KL and agreement against the float model that it came from. The result does not depend on
    `batch_tokens` or on threads (1e-6 relative for a float32 model). Predictions that are not finite do not raise: the
    perplexity is then inf and `note` names the window, so that a comparison can go on with the next variant. Raises
    UsageError when the cache belongs to other windows or to another vocabulary.
    """
    if cache is not None and cache.windows_sha256 != windows.sha256:
        raise UsageError("the cached float logits belong to other windows; make the cache again")
    tally = Tally(windows, cache.windows if cache else 0)
    file = cache.data.open("rb") if cache else None
    try:
        for chunk in log_probabilities(model, windows, len(windows), batch_tokens, progress):
            p = None
            if cache is not None and file is not None and chunk.window < cache.windows:
                if chunk.log_probs.shape[1] != cache.vocabulary:
                    width = chunk.log_probs.shape[1]
                    raise UsageError(f"the model predicts {width} tokens, the cached float logits {cache.vocabulary}")
                p = _read_rows(file, cache, chunk.log_probs.shape[0]).to(chunk.log_probs.device)
            tally.add(chunk, p)
            if tally.broken is not None:
                break
    finally:
        if file is not None:
            file.close()
    return tally.quality()


class Tally:
    """What has been seen of one model's predictions so far: its losses, and its distance from another's."""

    def __init__(self, windows: Windows, kl_windows: int) -> None:
        """KL is counted over the first `kl_windows` windows."""
        self.windows, self.kl_windows = windows, kl_windows
        self.loss = np.zeros(len(windows))  # float64, sums per window
        self.kl_sum = np.zeros(kl_windows)
        self.kl_values: list[NDArray[np.float64]] = []
        self.agreed = 0
        self.broken: int | None = None
        """The first window whose predictions are not finite."""

    def add(self, chunk: Chunk, p: torch.Tensor | None) -> None:
        """Count a chunk, and its distance from p, float32 log-probabilities [rows, vocabulary] of the same targets."""
        q = chunk.log_probs
        at_target = q.gather(1, chunk.targets[:, None]).double().sum().item()
        if self.broken is None and not (chunk.finite and math.isfinite(at_target)):
            self.broken = chunk.window
        if self.broken is not None:
            return
        self.loss[chunk.window] -= at_target
        if p is not None:
            kl = kl_divergence(p, q)
            self.kl_sum[chunk.window] += kl.sum().item()
            self.kl_values.append(kl.cpu().numpy())
            self.agreed += int((p.argmax(-1) == q.argmax(-1)).sum().item())

    @property
    def kl(self) -> NDArray[np.float64]:
        """KL per token [tokens], in order."""
        return np.concatenate(self.kl_values) if self.kl_values else np.zeros(0)

    def quality(self) -> Quality:
        """The figures of all that was added."""
        if self.broken is not None:
            return _broken(self.windows, self.broken)
        tokens = self.windows.scored.sum(axis=1)
        nll, nll_se = mean_and_error(self.loss, tokens)
        perplexity = math.exp(nll) if nll < 700 else math.inf
        kl_tokens = int(tokens[: self.kl_windows].sum())
        kl_mean, kl_se = mean_and_error(self.kl_sum, tokens[: self.kl_windows]) if kl_tokens else (None, None)
        return Quality(
            perplexity=perplexity,
            perplexity_se=None if nll_se is None else perplexity * nll_se,
            nll_mean=nll,
            scored_tokens=int(tokens.sum()),
            kl_mean=kl_mean,
            kl_se=kl_se,
            kl_p99=float(np.quantile(self.kl, 0.99)) if kl_tokens else None,
            kl_tokens=kl_tokens,
            top1_agreement=self.agreed / kl_tokens if kl_tokens else None,
        )


def kl_divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) per row, in nats, of log-probabilities float32 [rows, vocabulary]; float64 [rows], never negative."""
    p_probs, q_probs = p.exp(), q.exp()
    # Probabilities sum to 1, so q - p adds nothing but takes away the rounding error that all entries of a row share
    # (that of the log of the sum in log_softmax), which float32 would otherwise leave in the sum: about 1e-6 nats.
    # A token that p rules out has log p = -inf, and 0 * inf would be NaN.
    terms = (p - q).mul_(p_probs).masked_fill_(p_probs == 0, 0.0).add_(q_probs.sub_(p_probs))
    return terms.sum(-1, dtype=torch.float64).clamp_min_(0.0)  # what rounding leaves below 0 where the two agree


def _broken(windows: Windows, window: int) -> Quality:
    return Quality(
        perplexity=math.inf,
        perplexity_se=None,
        nll_mean=math.inf,
        scored_tokens=windows.scored_tokens,
        kl_mean=None,
        kl_se=None,
        kl_p99=None,
        kl_tokens=0,
        top1_agreement=None,
        note=f"predictions are not finite (first in window {window} of {len(windows)}): perplexity counts as infinite",
    )


def mean_and_error(sums: NDArray[np.float64], counts: NDArray[Any]) -> tuple[float, float | None]:
    """Mean per token of per-window sums, and its standard error with windows as the independent units.

    The mean is a ratio of sums, so that windows with more scored tokens weigh more; its variance is the usual one of a
    ratio: n / (n - 1) * sum of (sum_w - mean * count_w)^2 over the square of all counts. For equal counts this is the
    deviation of the window means over the root of their number. A window in which nothing is scored adds nothing.
    """
    used = counts > 0
    sums, counts = sums[used], counts[used].astype(np.float64)
    mean = float(sums.sum() / counts.sum())
    n = len(sums)
    if n < 2:
        return mean, None
    spread = float(((sums - mean * counts) ** 2).sum()) * n / (n - 1)
    return mean, math.sqrt(spread) / float(counts.sum())


def _read_rows(file: BinaryIO, cache: LogitCache, rows: int) -> torch.Tensor:
    """The next rows of the cache, float32 [rows, vocabulary]. Read, not mapped, so that they do not stay resident."""
    values = np.fromfile(file, dtype="<f4", count=rows * cache.vocabulary)
    if values.size != rows * cache.vocabulary:
        raise FileFormatError(f"{cache.data} is shorter than its header says; delete {cache.folder}")
    return torch.from_numpy(values.astype(np.float32, copy=False).reshape(rows, cache.vocabulary))


def log_probabilities(model: Any, windows: Windows, count: int, batch_tokens: int, progress: Progress | None) -> Iterator[Chunk]:
    """Predictions of every scored target of the first `count` windows, in order, a few rows at a time."""
    device = _device(model)
    batch = max(1, batch_tokens // windows.length)
    for start in range(0, count, batch):
        stop = min(start + batch, count)
        # A context that stayed open across a yield would leak into the caller.
        with torch.inference_mode():
            ids = torch.from_numpy(windows.ids[start:stop]).to(device)  # [B, L]
            logits = model(input_ids=ids).logits  # [B, L, V]
        for window in range(start, stop):
            targets = torch.from_numpy(np.flatnonzero(windows.scored[window])).to(device)  # positions t, [rows]
            for part in targets.split(max(1, CHUNK_VALUES // logits.shape[-1])):
                with torch.inference_mode():
                    log_probs = torch.log_softmax(logits[window - start, part - 1].float(), dim=-1)
                    # A NaN or +inf logit makes its whole row NaN, so that one column tells; -inf is a token ruled out.
                    finite = not bool(log_probs[:, 0].isnan().any())
                    chunk = Chunk(window, ids[window - start, part], log_probs, finite)
                yield chunk
        del logits
        if progress is not None:
            progress(stop, count)


def _vocabulary(model: Any, windows: Windows) -> int:
    """Columns of the model's logits, asked of the model itself: configurations can disagree with a padded head."""
    with torch.inference_mode():
        ids = torch.from_numpy(windows.ids[:1, :1]).to(_device(model))
        return int(model(input_ids=ids).logits.shape[-1])


def _device(model: Any) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return torch.device(tensor.device)
    return torch.device("cpu")
