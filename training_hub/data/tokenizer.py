"""A tokenizer that says where each token lies in the text, and which tokens end a turn."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from training_hub.data.bytewise import Bytewise
from training_hub.errors import DataError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)
# Words, runs of white space, digits, punctuation, two scripts and a letter made of two code points (e + acute accent).
PROBE = "The  quick (brown) fox,\n\n\tran 123 times. Déjà vu, e\u0301, 漢字!"

_MADE_WHEN_ASKED = ("fingerprint", "around", "_bytewise", "_names", "_control", "_renamed")
# Texts of one call of the library: what it makes of more is out of the processor's cache before it is read or freed.
TEXTS_PER_CALL = 64

Encoding = tuple[np.ndarray, np.ndarray, np.ndarray]


class Tokenised:
    """A text's `ids` [T] int32, and which of its tokens lie where.

    Most masks need the tokens at two characters: asking for these costs a tenth of writing down the places of all.
    """

    __slots__ = ("_made", "ids")

    def __init__(self, made: Any):
        self._made = made
        self.ids = np.fromiter(made.ids, np.int32)

    def arrays(self) -> Encoding:
        """(ids, starts, ends) as of `ChatTokenizer.encode_batch`."""
        return _arrays(self._made)

    def between(self, start: int, end: int) -> tuple[int, int] | None:
        """(first, behind the last) of the tokens that begin in the characters start:end.

        None where no token begins right at `start`, or one lies there without any character: then all places tell.
        """
        made = self._made
        first, last = made.char_to_token(start), made.char_to_token(end - 1)
        if first is None or last is None or made.token_to_chars(first)[0] != start:
            return None
        if first > 0:
            before = made.token_to_chars(first - 1)
            if before[0] >= start or before[1] > start:
                return None
        count = len(made)
        behind = last + 1
        while behind < count and made.token_to_chars(behind)[0] < end:
            behind += 1
        return first, behind


# The largest vocabularies have a quarter of a million; the library writes down every id below the largest.
MOST_TOKENS = 1 << 24


class ChatTokenizer:
    """The tokenizer of a model, giving ids together with the place of each token in the text.

    `hf` is the transformers object. Truncation, padding and special tokens added around a text are off: a chat template
    writes its own, and adding them again is how a text comes to begin with two of them.
    """

    def __init__(self, hf: Any, folder: Path | None = None, extra_stop_ids: Sequence[int] = ()):
        self.hf = hf
        self.folder = folder
        _check_numbers(hf)
        self._backend = _backend_of(hf)
        self.bos_id: int | None = hf.bos_token_id
        self.eos_id: int | None = hf.eos_token_id
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        added = self._backend.get_added_tokens_decoder()
        self.special_ids: dict[str, int] = {token.content: index for index, token in added.items() if token.special}
        own = () if self.eos_id is None else (self.eos_id,)
        self.stop_ids: frozenset[int] = frozenset(i for i in (*own, *extra_stop_ids) if 0 <= i < self.vocab_size)
        names = {index: token.content for index, token in added.items()}
        self.stop_tokens: frozenset[str] = frozenset(
            names.get(i) or self._backend.id_to_token(i) for i in self.stop_ids if self._backend.id_to_token(i)
        )
        _check_offsets(self)

    @classmethod
    def load(cls, path: str, *, trust_remote_code: bool = False, revision: str | None = None) -> ChatTokenizer:
        """The tokenizer in folder `path`, or of that name on the hub. Raises DataError, with the remedy."""
        from transformers import AutoTokenizer

        folder = _folder(path)
        if folder is not None:
            _check_files(folder)
        try:
            hf = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, revision=revision, local_files_only=folder is not None
            )
            return cls(hf, folder, _stop_ids(path, folder, revision))
        except DataError:
            raise
        except (
            Exception
        ) as error:  # a damaged file raises anything: tokenizers a bare Exception, transformers AttributeError
            raise DataError(f"tokenizer {path}: cannot be loaded: {_first_line(error)}") from error

    @classmethod
    def wrap(cls, hf: Any) -> ChatTokenizer:
        """The same around a loaded transformers tokenizer; stop ids also from the folder it came from."""
        origin = str(getattr(hf, "name_or_path", "") or "")
        folder = Path(origin) if origin and Path(origin).is_dir() else None
        return cls(hf, folder, _stop_ids(origin, folder, None) if folder else ())

    @property
    def special_tokens(self) -> dict[str, str]:
        """What a chat template sees under names like bos_token."""
        return {name: str(token) for name, token in self.hf.special_tokens_map.items() if isinstance(token, str)}

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The model's own template; a dictionary where it has several by name."""
        own = getattr(self.hf, "chat_template", None)
        if isinstance(own, list):
            return {entry["name"]: entry["template"] for entry in own}
        return own

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides which ids a text gets, and which tokens end a turn."""
        parts = [self._backend.to_str(), json.dumps(self.special_tokens, sort_keys=True), str(sorted(self.stop_ids))]
        parts += [str(self._backend.encode_special_tokens), str(self.around)]
        return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids this tokenizer puts before and after a plain text by itself, as ([bos], []) for Llama."""
        bare = self._backend.encode("a", add_special_tokens=False).ids
        full = list(self.hf("a")["input_ids"])
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return tuple(full[:start]), tuple(full[start + len(bare) :])
        return (), ()

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """(ids, starts, ends), each [T] int32, per text: token t covers the characters starts[t]:ends[t].

        The ids are those of `hf.apply_chat_template(tokenize=True)` for the same rendered text. A character that is
        several tokens gives each of them its own place.
        """
        return [_arrays(encoding) for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def tokenise(self, texts: Sequence[str]) -> list[Tokenised | Encoding]:
        """The same in less time: with the places of tokens when they are asked for, or from the bytes of tokens."""
        made: list[Tokenised | Encoding] = []
        for start in range(0, len(texts), TEXTS_PER_CALL):
            made += self._tokenised(list(texts[start : start + TEXTS_PER_CALL]))
        return made

    def _tokenised(self, texts: list[str]) -> list[Tokenised | Encoding]:
        if self._bytewise is None:
            return [Tokenised(made) for made in self._backend.encode_batch(texts, add_special_tokens=False)]
        ids = [made.ids for made in self._backend.encode_batch_fast(texts, add_special_tokens=False)]
        found = self._bytewise.places(texts, ids)
        left = [text for text, places in zip(texts, found, strict=True) if places is None]
        others = iter(self._backend.encode_batch(left, add_special_tokens=False) if left else ())
        return [Tokenised(next(others)) if places is None else places for places in found]

    @cached_property
    def _bytewise(self) -> Bytewise | None:
        return Bytewise.of(self._backend)

    def encode_literally(self, text: str, literal: Sequence[tuple[int, int]]) -> Encoding:
        """As `encode_batch` of one text, reading what stands at the places `literal` as plain text, never as a token.

        Raises DataError where this tokenizer has no other way to write it than the special token itself.
        """
        edges = [0, *itertools.chain.from_iterable(literal), len(text)]
        parts: list[str] = []
        lengths: list[int] = []
        for number, (start, end) in enumerate(itertools.pairwise(edges)):
            at = start
            for match in self._control.finditer(text, start, end) if number % 2 == 0 else ():
                parts += [text[at : match.start()], self._names[match.group()]]
                lengths += [1] * (match.start() - at) + [len(match.group())]
                at = match.end()
            parts.append(text[at:end])
            lengths += [1] * (end - at)
        ids, starts, ends = _arrays(self._renamed[0].encode("".join(parts), add_special_tokens=False))
        places = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        ids, starts, ends = self._renamed[1][ids], places[starts], places[ends]
        special = np.isin(ids, [*self.special_ids.values(), *self.stop_ids])
        for start, end in literal:
            if np.any(special & (starts < end) & (ends > start)):
                raise DataError(
                    f"{text[start:end]!r} is a special token, and this tokenizer has no other way to write it. Remove "
                    "it from the text."
                )
        return ids, starts, ends

    @cached_property
    def _names(self) -> dict[str, str]:
        """A character for every token that only a template may write."""
        return {
            token: chr(0x100000 + number)
            for number, token in enumerate({**self.special_ids, **dict.fromkeys(self.stop_tokens)})
        }

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(token) for token in sorted(self._names, key=len, reverse=True)) or r"(?!)")

    @cached_property
    def _renamed(self) -> tuple[Any, np.ndarray]:
        """The tokenizer with special tokens called by `_names`, which no text writes, and the true id of each id."""
        from tokenizers import Tokenizer

        description = json.loads(self._backend.to_str())
        added = [(token, token["content"]) for token in description["added_tokens"]]
        for token, content in added:
            token["content"] = self._names.get(content, content)
        copy = Tokenizer.from_str(json.dumps(description))
        true_ids = np.arange(
            max(copy.get_vocab_size(with_added_tokens=True), self.vocab_size) + len(added), dtype=np.int32
        )
        for token, content in added:
            true_ids[copy.token_to_id(token["content"])] = self._backend.token_to_id(content)
        return copy, true_ids

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _MADE_WHEN_ASKED}


def _arrays(encoding: Any) -> Encoding:
    ids = np.array(encoding.ids, np.int32)
    places = np.fromiter(itertools.chain.from_iterable(encoding.offsets), np.int32, 2 * len(ids))
    return ids, places[0::2], places[1::2]


def _check_numbers(hf: Any) -> None:
    """Raise DataError for numbers that no tokenizer has, before the libraries count up to them or stumble over them."""
    longest = hf.model_max_length
    if not isinstance(longest, (int, float)):
        raise DataError(f"tokenizer_config.json: model_max_length: found {longest!r}; allowed: a number, or nothing.")
    text, largest = max(hf.get_vocab().items(), key=lambda item: item[1], default=("", 0))
    if largest >= MOST_TOKENS:
        raise DataError(
            f"tokenizer.json: token {text!r} has the id {largest:,}; allowed: below {MOST_TOKENS:,}. It is "
            "damaged: copy it again."
        )


def _backend_of(hf: Any) -> Any:
    """A copy of the Rust tokenizer inside `hf`, set to neither cut, pad nor trim the places of tokens."""
    from tokenizers import Tokenizer

    inner = getattr(hf, "backend_tokenizer", None)
    if not isinstance(inner, Tokenizer):
        raise DataError(
            f"tokenizer {getattr(hf, 'name_or_path', '')}: {type(hf).__name__} cannot say where its tokens lie in the "
            "text, so no mask can be made. Use a fast tokenizer: one with a tokenizer.json "
            "(transformers' AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(FOLDER) writes it)."
        )
    try:
        description = json.loads(inner.to_str())
    except Exception as error:  # tokenizers raises plain Exception for parts written in Python
        raise DataError(
            f"tokenizer: has parts that cannot be written as tokenizer.json: {_first_line(error)}"
        ) from error
    description["truncation"] = description["padding"] = None
    _keep_white_space(description.get("post_processor"))
    copy = Tokenizer.from_str(json.dumps(description))
    copy.encode_special_tokens = inner.encode_special_tokens
    return copy


def _keep_white_space(processor: dict[str, Any] | None) -> None:
    # ByteLevel with trim_offsets leaves a token's white space out of its place: a lone " " gets no place at all,
    # and lands in the neighbouring span. The ids do not depend on it.
    if processor is None:
        return
    if "trim_offsets" in processor:
        processor["trim_offsets"] = False
    for inner in processor.get("processors", ()):
        _keep_white_space(inner)


def _check_offsets(tokenizer: ChatTokenizer) -> None:
    """Raise DataError where tokens do not cover the text from left to right: masks would fall on the wrong ones."""
    ids, starts, ends = tokenizer.encode_batch([PROBE])[0]
    covered = np.zeros(len(PROBE), bool)
    for start, end in zip(starts, ends, strict=True):
        covered[start:end] = True
    # A normaliser may drop white space and accents; whole words that no token covers mean offsets that cannot be used.
    words = np.array([character.isascii() and character.isalnum() for character in PROBE])
    if len(ids) == 0 or np.any(np.diff(starts) < 0) or ends.max() > len(PROBE) or not covered[words].all():
        raise DataError(
            f"tokenizer {getattr(tokenizer.hf, 'name_or_path', '')}: the places it gives its tokens do not cover "
            f"the text (probe {PROBE!r}), so no mask can be trusted. Use the tokenizer.json that the model was "
            "published with."
        )


def _folder(path: str) -> Path | None:
    """`path` as an existing folder, None for a name on the hub; DataError for a path that is not there."""
    place = Path(path).expanduser()
    if place.is_dir():
        return place
    if place.exists():
        raise DataError(f"tokenizer {path}: is a file; name the folder it lies in, {place.parent}.")
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or "\\" in path:
        raise DataError(f"tokenizer {path}: there is no such folder.{_near(place)}")
    return None


def _near(place: Path) -> str:
    import difflib

    if not place.parent.is_dir():
        return f" Nor is there {place.parent}."
    names = [entry.name for entry in place.parent.iterdir() if entry.is_dir()]
    near = difflib.get_close_matches(place.name, names, n=3)
    return f" Did you mean {' or '.join(str(place.parent / name) for name in near)}?" if near else ""


def _check_files(folder: Path) -> None:
    """Collect what is wrong with a folder's tokenizer files before transformers stumbles over it."""
    found = [folder / name for name in TOKENIZER_FILES if (folder / name).exists()]
    if not found:
        raise DataError(
            f"tokenizer {folder}: holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...). Copy the tokenizer "
            "files of the model there, or name another folder: model.tokenizer."
        )
    problems = [problem for file in found for problem in _file_problems(file)]
    if problems:
        raise DataError(problems)


def _file_problems(file: Path) -> list[str]:
    with file.open("rb") as handle:
        head = handle.read(64)
    if head.startswith(b"version https://git-lfs"):
        return [f"{file}: is a Git LFS pointer, not the file itself. Run `git lfs pull` in {file.parent}."]
    if not head:
        return [f"{file}: is empty. Download it again."]
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            return [f"{file}: is not valid JSON ({error}). Download it again."]
    return []


def _stop_ids(path: str, folder: Path | None, revision: str | None) -> tuple[int, ...]:
    """End-of-sequence ids that generation_config.json and config.json name, for a folder or a hub name."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = folder / name if folder else _from_hub(path, name, revision)
        if file is None or not file.is_file():
            continue
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file}: is not valid JSON ({error}). Download it again.") from error
        for section in (config, config.get("text_config") or {}):
            value = section.get("eos_token_id")
            found += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
    return tuple(dict.fromkeys(found))


def _from_hub(path: str, name: str, revision: str | None) -> Path | None:
    from transformers.utils import cached_file

    file = cached_file(
        path,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(file) if file else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
