"""Where tokens lie in a text, told by the bytes of each, for tokenizers that take a text apart and lose nothing of it.

Asking the library for places costs a fifth of tokenising. A byte-level tokenizer's tokens, laid end to end, are the
text; so the lengths of the tokens say where each lies. That they are the text is checked in every call.
"""

# T tokens, V vocabulary, B bytes of the texts

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: tuple[NormalForm, ...] = ("NFC", "NFD", "NFKC", "NFKD")
# Parts of a tokenizer.json that only cut a text. ByteLevel without its space in front is the one that makes bytes.
CUTTERS = ("Split", "Digits", "ByteLevel", "Punctuation", "UnicodeScripts")

Places = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Bytewise:
    """Bytes of each token: `widths` [V] int32, how many; `firsts` [V] uint8, the first one.

    `forms`: what the tokenizer makes of a text before it reads it; only texts that are so already can be told.
    """

    widths: np.ndarray
    firsts: np.ndarray
    forms: tuple[NormalForm, ...]

    @staticmethod
    def of(backend: Any) -> Bytewise | None:
        """Of a tokenizer of the tokenizers library; None for one whose tokens need not be the text."""
        description = json.loads(backend.to_str())
        forms = _forms(description["normalizer"])
        if forms is None or not _only_cuts(description["pre_tokenizer"]) or not _is_plain_bpe(description["model"]):
            return None
        texts = {index: _bytes(token) for token, index in description["model"]["vocab"].items()}
        texts |= {token["id"]: token["content"].encode("utf-8") for token in description["added_tokens"]}
        widths, firsts = np.zeros(max(texts) + 1, np.int32), np.zeros(max(texts) + 1, np.uint8)
        for index, content in texts.items():
            widths[index], firsts[index] = len(content), content[0] if content else 0
        return Bytewise(widths, firsts, forms)

    def places(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[Places | None]:
        """(ids, starts, ends), each [T] int32 in characters, per text; None for one that its tokens are not."""
        together = self._places(texts, ids)
        if together is not None:
            return list(together)
        alone = (self._places([text], [own]) for text, own in zip(texts, ids, strict=True))
        return [found[0] if found is not None else None for found in alone]

    def _places(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[Places] | None:
        """The same for all of the texts, laid end to end; None unless all are their tokens."""
        text = "".join(texts)
        ids_T = np.fromiter(chain.from_iterable(ids), np.int32)
        widths_T = self.widths[ids_T]
        ends_T = np.cumsum(widths_T, dtype=np.int64)
        starts_T = ends_T - widths_T
        bytes_B = np.frombuffer(text.encode("utf-8"), np.uint8)
        token_borders = np.cumsum([0, *map(len, ids)])
        byte_borders = np.cumsum([0, *(len(one) if one.isascii() else len(one.encode("utf-8")) for one in texts)])
        all_ends = np.concatenate([[0], ends_T])
        if (all_ends[token_borders] != byte_borders).any() or not widths_T.all():
            return None
        if (bytes_B[starts_T] != self.firsts[ids_T]).any():
            return None
        if not text.isascii():
            if not all(unicodedata.is_normalized(form, text) for form in self.forms):
                return None
            # The bytes of a character behind its first are 10xxxxxx.
            character_B = np.cumsum((bytes_B & 0xC0) != 0x80) - 1
            starts_T, ends_T = character_B[starts_T], character_B[ends_T - 1] + 1
        characters = np.cumsum([0, *map(len, texts)])
        return [
            (ids_T[a:b], (starts_T[a:b] - before).astype(np.int32), (ends_T[a:b] - before).astype(np.int32))
            for (a, b), before in zip(pairwise(token_borders.tolist()), characters.tolist(), strict=False)
        ]


def _forms(normalizer: Mapping[str, Any] | None) -> tuple[NormalForm, ...] | None:
    """The normal forms of Unicode that a normalizer brings a text into; None where it does something else."""
    if normalizer is None:
        return ()
    if normalizer["type"] == "Sequence":
        found = [_forms(part) for part in normalizer["normalizers"]]
        return None if None in found else tuple(form for part in found for form in part or ())
    return next(((form,) for form in FORMS if form == normalizer["type"]), None)


def _only_cuts(pre_tokenizer: Mapping[str, Any] | None) -> bool:
    """Whether it makes bytes of a text, cuts it, and takes nothing away."""
    parts = list(_parts(pre_tokenizer)) if pre_tokenizer is not None else []
    return (
        bool(parts)
        and parts[-1]["type"] == "ByteLevel"
        and all(
            part["type"] in CUTTERS and part.get("behavior") != "Removed" and not part.get("add_prefix_space")
            for part in parts
        )
    )


def _parts(pre_tokenizer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if pre_tokenizer["type"] == "Sequence":
        for part in pre_tokenizer["pretokenizers"]:
            yield from _parts(part)
    else:
        yield pre_tokenizer


def _is_plain_bpe(model: Mapping[str, Any]) -> bool:
    marks = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return model["type"] == "BPE" and not any(model.get(mark) for mark in marks)


def _alphabet() -> dict[str, int]:
    """The byte behind each letter of a byte-level vocabulary: printable ones are themselves, others from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


_BYTES = _alphabet()


def _bytes(token: str) -> bytes:
    """What a token of a byte-level vocabulary says; nothing where it has other letters, which no text gives."""
    known = [_BYTES.get(letter, -1) for letter in token]
    return b"" if -1 in known else bytes(known)
