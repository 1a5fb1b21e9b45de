"""Text to token ids and back, with the tokenizers library alone: no torch, no transformers.

A folder's tokenizer is its tokenizer.json, taken as it is, or GPT-2's byte-level BPE from vocab.json and merges.txt. The
special tokens that its other files name (tokenizer_config.json, special_tokens_map.json, added_tokens.json) are known in a
text as in transformers, and a text gets the same tokens added before and after it. Two things of transformers are left
out: SentencePiece's tokenizer.model, and rebuilding a tokenizer.json from what transformers knows of its model.

The library is imported when a tokenizer is loaded. What that costs is its building of the merge table: about 0.1 s for a
vocabulary of 50,000.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nybble.containers import open_contents
from nybble.errors import FileFormatError, InputError
from nybble.files.json_strict import read_object

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
GPT2_SPECIAL = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
"""What these classes take where the files say nothing."""
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys under which the files of a tokenizer name its special tokens."""
LISTED = ("additional_special_tokens", "extra_special_tokens")
REPLACEMENT = "\ufffd"
"""What decoding puts for bytes that are no UTF-8, and for a character whose last bytes are still to come."""


class TextCodec:
    """Text to token ids and back, for one model folder; made by `load`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._falls_back_to_bytes = b'"ByteFallback"' in _state(tokenizer.decoder)

    @classmethod
    def load(cls, folder: str | Path) -> TextCodec:
        """The tokenizer of a model: of its folder, or of a file that holds one (GGUF).

        Raises InputError, which says what is missing, when there is none that can be read without transformers;
        FileFormatError when a file of it is broken.
        """
        folder = Path(folder)
        if folder.is_file():
            return cls._of_file(folder)
        stated = _read(folder / "tokenizer_config.json")
        name = stated.get("tokenizer_class") or ("GPT2Tokenizer" if _model_type(folder) in ("gpt2", "") else "")
        config = {**(GPT2_SPECIAL if name in GPT2_CLASSES else {}), **stated}
        if not isinstance(stated.get("added_tokens_decoder"), dict):  # the newer form of the same facts
            config.update(_read(folder / "special_tokens_map.json"))
        add_prefix_space = bool(config.get("add_prefix_space", False))
        if (folder / "tokenizer.json").is_file():
            tokenizer = _from_json(folder / "tokenizer.json")
            if name in GPT2_CLASSES and type(tokenizer.pre_tokenizer).__name__ == "ByteLevel":
                tokenizer.pre_tokenizer.add_prefix_space = add_prefix_space
            _add_tokens(tokenizer, folder, config)
        else:
            _check_vocabulary_files(folder, str(name))
            tokenizer = _from_vocabulary(folder, add_prefix_space)
            _add_tokens(tokenizer, folder, config)
            _add_template(tokenizer, folder, config)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    @classmethod
    def _of_file(cls, path: Path) -> TextCodec:
        extras = open_contents(path).extras
        with tempfile.TemporaryDirectory() as folder:
            for name, content in extras.items():
                (Path(folder) / name).write_bytes(content)
            if not any(name in extras for name in ("tokenizer.json", "vocab.json")):
                raise InputError(f"{path} holds no tokenizer that nybble reads; give token ids (Decoder), or another file")
            return cls.load(folder)

    @property
    def vocabulary(self) -> int:
        """How many ids there are, added tokens included; a model's table of tokens may have more rows, to fill a tile."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """Ids of a text; with `special_tokens` also those that begin and end one (bos where the tokenizer has it).

        The name of a special token inside the text becomes that token. Raises InputError when the tokenizer cannot take
        the text (bytes that are no UTF-8, a token that it lacks).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"character {error.start} of the text is no Unicode; it may come from bytes that are no UTF-8"
            ) from error
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special_tokens).ids)
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:  # a panic of the Rust side derives from BaseException, not from Exception
            raise InputError(f"the tokenizer failed on the text ({type(error).__name__}: {_line(error)})") from error

    def decode(self, ids: Iterable[int], special_tokens: bool = False) -> str:
        """The text of ids; special tokens are left out, or stand there by name with `special_tokens`.

        Bytes that are no UTF-8 give U+FFFD; ids beyond the vocabulary give nothing.
        """
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not special_tokens))

    def is_silent(self, token: int) -> bool:
        """Whether an id gives no text: a special token, or one beyond the vocabulary."""
        return token in self._special or self._tokenizer.id_to_token(token) is None

    def is_byte(self, token: int) -> bool:
        """Whether an id stands for one byte of a character that the vocabulary lacks (SentencePiece's `<0xE2>`)."""
        if not self._falls_back_to_bytes:
            return False
        name = self._tokenizer.id_to_token(token) or ""
        return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


class Detokenizer:
    """Text of ids that come one by one.

    The pieces that `feed` and at last `finish` return are together what decode(prompt + ids) adds to decode(prompt): no
    piece ends inside a UTF-8 character, and the space before a word is there although SentencePiece's decoders drop the
    one that begins a text. `prompt` are ids of a text, or none. An id costs the decoding of a few ids, not of all.

        before  ids whose text is out; they only show the decoder that a text has begun
        open    ids after them; all of their text is out, but for what a next id may change
    """

    def __init__(self, codec: TextCodec, prompt: Sequence[int] = ()) -> None:
        self._codec = codec
        self._before = [token for token in prompt if not codec.is_silent(token)]
        self._before_text = codec.decode(self._before)
        self._open: list[int] = []
        self._out = 0
        """Characters of `open` that are out."""

    def feed(self, token: int) -> str:
        """The text that is certain once this id is known; often one word, "" while a character is incomplete."""
        if self._codec.is_silent(token):
            return ""
        self._open.append(token)
        if self._codec.is_byte(token):  # one bad byte later would turn the whole run of bytes into U+FFFD
            return ""
        text = self._text()
        if text is None:
            return ""
        if text.endswith(REPLACEMENT):
            return self._release(text[:-1])
        piece = self._release(text)
        # ids without a text of their own do not suffice: a decoder may have stripped the space that they are
        self._before = self._open if self._codec.decode(self._open) else self._before + self._open
        self._before_text = self._codec.decode(self._before)
        self._open, self._out = [], 0
        return piece

    def finish(self) -> str:
        """What was held back: an incomplete character, as U+FFFD."""
        return self._release(self._codec.decode(self._before + self._open)[len(self._before_text) :])

    def _text(self) -> str | None:
        """Text of the open ids; None while they change the text before them."""
        text = self._codec.decode(self._before + self._open)
        return text[len(self._before_text) :] if text.startswith(self._before_text) else None

    def _release(self, text: str) -> str:
        piece = text[self._out :]
        self._out = max(self._out, len(text))
        return piece


def _from_json(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise FileFormatError(f"{path} is not a tokenizer that the tokenizers library can read: {_line(error)}") from error


def _from_vocabulary(folder: Path, add_prefix_space: bool) -> Tokenizer:
    """GPT-2's tokenizer: a BPE over bytes, each byte written as one visible character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise FileFormatError(f"{folder}: vocab.json and merges.txt do not make a tokenizer: {_line(error)}") from error
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _check_vocabulary_files(folder: Path, name: str) -> None:
    """Raise InputError when a folder without tokenizer.json has no GPT-2 vocabulary either."""
    missing = [file for file in ("vocab.json", "merges.txt") if not (folder / file).is_file()]
    if missing == ["vocab.json", "merges.txt"]:
        other = next((file for file in ("tokenizer.model", "vocab.txt") if (folder / file).is_file()), None)
        found = f"only {other}, which needs transformers" if other else "and no vocab.json with merges.txt"
        raise InputError(f"{folder} has no tokenizer.json, {found}; copy tokenizer.json there from the model's source")
    if missing:
        raise InputError(f"{folder} lacks {missing[0]} (nor has it a tokenizer.json); copy it there from the model's source")
    if name not in GPT2_CLASSES:
        raise InputError(
            f"{folder} has vocab.json and merges.txt of {name or 'a tokenizer'!r}, but only GPT-2's way of using them is "
            "known; copy tokenizer.json there from the model's source"
        )


def _add_tokens(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """Make the tokens known that the files beside the vocabulary name: those with a stated id first, by id.

    Raises FileFormatError when the vocabulary gives such a token another id.
    """
    named = [_settings(folder, config[key]) for key in NAMED if config.get(key)]
    for key in LISTED:
        listed = config.get(key)
        named += [_settings(folder, token) for token in listed] if isinstance(listed, list) else []
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for place, token in [*_placed_tokens(folder, config, named), *((None, token) for token in named)]:
        content = token["content"]
        if content in known:
            continue
        known.add(content)
        tokenizer.add_tokens([_added_token(token)])
        given = tokenizer.token_to_id(content)
        if place is not None and given != place:
            raise FileFormatError(f"{folder}: token {content!r} should have id {place}, but after the vocabulary it gets {given}")


def _placed_tokens(folder: Path, config: dict[str, Any], named: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """(id, token) of tokenizer_config.json's added_tokens_decoder, or of added_tokens.json where it has none."""
    decoder = config.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        stated = [(key, _settings(folder, token)) for key, token in decoder.items()]
    else:
        special = {token["content"] for token in named}
        ids = _read(folder / "added_tokens.json").items()
        stated = [(key, {"content": content, "special": content in special}) for content, key in ids]
    for key, token in stated:
        if not str(key).isdecimal():
            raise FileFormatError(f"{folder}: the id of token {token['content']!r} is {key!r}, which is no number")
    return sorted(((int(key), token) for key, token in stated), key=lambda pair: pair[0])


def _settings(folder: Path, token: Any) -> dict[str, Any]:
    """A special token as files spell it, a string or an object, as settings of an AddedToken."""
    if isinstance(token, str):
        token = {"content": token}
    if not isinstance(token, dict) or not isinstance(token.get("content"), str) or not token["content"]:
        raise FileFormatError(f"{folder}: {str(token)[:80]!r} stands where a token's name belongs")
    return {"special": True, "normalized": False, **token}


def _added_token(settings: dict[str, Any]) -> AddedToken:
    from tokenizers import AddedToken

    flags = {key: bool(settings[key]) for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in settings}
    return AddedToken(settings["content"], **flags)


def _add_template(tokenizer: Tokenizer, folder: Path, config: dict[str, Any]) -> None:
    """Put bos and eos around a text where tokenizer_config.json asks for it."""
    from tokenizers import processors

    wanted = [config.get(f"{end}_token") if config.get(f"add_{end}_token") else None for end in ("bos", "eos")]
    first, last = (_settings(folder, token)["content"] if token else None for token in wanted)
    parts = [*([first] if first else []), "$A", *([last] if last else [])]
    used = [(token, tokenizer.token_to_id(token)) for token in {first, last} if token]
    if used:
        tokenizer.post_processor = processors.TemplateProcessing(single=parts, pair=None, special_tokens=used)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; empty when there is no such file. Raises FileFormatError when it is broken."""
    return read_object(path) if path.exists() or path.is_symlink() else {}


def _model_type(folder: Path) -> str:
    return str(_read(folder / "config.json").get("model_type", ""))


def _state(part: Any) -> bytes:
    """A part of a tokenizer as JSON, empty where there is none."""
    return bytes(part.__getstate__()) if part is not None else b""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or "no message"
