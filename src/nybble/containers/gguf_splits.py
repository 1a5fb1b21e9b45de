"""How byte-level BPE tokenizers cut a text into words before they merge, under the names that llama.cpp has for it.

`tokenizer.ggml.pre` of a GGUF file holds such a name; a wrong one silently gives other tokens. A tokenizer.json says the same in
its `normalizer` and `pre_tokenizer`. Only names whose tokens were compared with llama.cpp's on real text stand here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Split:
    """One way of cutting."""

    pattern: str = ""
    """Words, as a regular expression; empty: GPT-2's, which the byte-level step has built in."""
    digits: bool = False
    """Every digit is a word of its own, whatever the pattern says."""
    composed: bool = False
    """The text is normalized to NFC first (llama.cpp does not)."""
    whole_words: bool = False
    """A word that is a token is that token, whatever the merges say."""
    begins: bool = False
    """llama.cpp puts bos before a text unless the file says otherwise."""
    specials_apart: bool = False
    """Special tokens behind the others usually stand outside the vocabulary of tokenizer.json."""

    def normalizer(self) -> dict[str, Any] | None:
        """As tokenizer.json has it."""
        return {"type": "NFC"} if self.composed else None

    def pre_tokenizer(self) -> dict[str, Any]:
        """As tokenizer.json has it."""
        last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": not self.pattern}
        steps: list[dict[str, Any]] = []
        if self.digits:
            steps.append({"type": "Digits", "individual_digits": True})
        if self.pattern:
            steps.append({"type": "Split", "pattern": {"Regex": self.pattern}, "behavior": "Isolated", "invert": False})
        return {"type": "Sequence", "pretokenizers": [*steps, last]} if steps else last


SPLITS: dict[str, Split] = {
    "gpt-2": Split(),
    "llama-bpe": Split(rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}{{1,3}}|{OTHERS}", whole_words=True, begins=True, specials_apart=True),
    "qwen2": Split(rf"{CONTRACTIONS}|{LETTERS}|\p{{N}}|{OTHERS}", composed=True, specials_apart=True),
    "smollm": Split(digits=True),
}
ALIASES = {
    "phi-2": "gpt-2",
    "llama-v3": "llama-bpe",
    "llama3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
}
"""Other names by which llama.cpp cuts in the same way."""


def split_named(name: str) -> Split | None:
    """The way of cutting that a file's `tokenizer.ggml.pre` names; None for one that is not known here."""
    return SPLITS.get(ALIASES.get(name, name))


def name_of(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for how a tokenizer.json cuts; None where it has none that is known here."""
    found = (plain(tokenizer.get("normalizer")), plain(tokenizer.get("pre_tokenizer")))
    whole_words = bool((tokenizer.get("model") or {}).get("ignore_merges"))
    for name, split in SPLITS.items():
        if found == (plain(split.normalizer()), plain(split.pre_tokenizer())) and whole_words == split.whole_words:
            return name
    return None


def plain(part: Any) -> Any:
    """A part of a tokenizer.json without what makes no difference to tokens: empty settings, offsets, sequences of one."""
    if isinstance(part, list):
        return [plain(step) for step in part]
    if not isinstance(part, dict):
        return part
    steps = part.get("pretokenizers") or part.get("normalizers")
    if part.get("type") == "Sequence" and isinstance(steps, list) and len(steps) == 1:
        return plain(steps[0])
    return {key: plain(value) for key, value in part.items() if key != "trim_offsets" and value not in (None, "", False)}
