"""Whether what is trained is what the rows say: trained tokens are decoded and compared with the rows, read again.

The masks were made from characters of a rendered text; this looks from the other end, at the ids a run will learn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from training_hub.data.columns import smallest
from training_hub.data.formats import FORMATS, FormatSettings, detect, parse, with_our_columns
from training_hub.data.readers import Broken, decode
from training_hub.data.sources import Source, open_object, open_sources
from training_hub.data.store import TokenStore
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError
from training_hub.recipe.sections import Data
from training_hub.types import Conversation, Message, Row, Sample, Text

SHORTEST_FOREIGN = 12
"""Characters, white space aside, from which on text of another turn within a trained one is no coincidence."""

TAKEN_AGAIN = 4
"""Rows read again for each one to be compared: some were left out, set aside or drawn elsewhere."""


@dataclass(frozen=True)
class Agreement:
    """Counts of the rows compared, and one line for each that disagrees. `reason` says why none could be compared."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    problems: tuple[str, ...] = ()
    reason: str = ""


def agreement(
    data: Data,
    store: TokenStore,
    tokenizer: ChatTokenizer,
    num_rows: int,
    rows: Any = None,
    longest: int | None = None,
) -> Agreement:
    """Compare the trained tokens of the first `num_rows` rows of `store` with what the rows say.

    `rows` are the live rows the store was made from, if it was. `longest`: the tokens at which rows were cut, where
    they were. Rows that were cut or split are passed over, and so is white space: SentencePiece has no token for a
    leading space of its own.
    """
    if data.pretraining:
        return Agreement(reason="pretraining trains every token of its blocks")
    if isinstance(rows, Iterator):
        return Agreement(reason="the rows given can be read only once")
    samples = _samples_by_row(store, num_rows * TAKEN_AGAIN)
    compared = tokens = trained = 0
    problems: list[str] = []
    for row in islice(_rows_again(data, rows), num_rows * TAKEN_AGAIN):
        of_row = samples.get(str(row.origin), [])
        found = _disagreement(row, of_row, data, tokenizer, longest) if of_row else None
        if found is None:
            continue
        compared += 1
        tokens += sum(len(sample) for sample in of_row)
        trained += sum(int(np.count_nonzero(sample.weights)) for sample in of_row)
        problems += [f"{row.origin}: {found}"] if found else []
        if compared == num_rows:
            break
    reason = "" if compared else "none of the first rows is whole in what is trained"
    return Agreement(compared, tokens, trained, tuple(problems), reason)


def _samples_by_row(store: TokenStore, count: int) -> dict[str, list[Sample]]:
    first = smallest(store.column("lines"), count)
    grouped: dict[str, list[Sample]] = {}
    for index in sorted(first.tolist()):
        sample = store[index]
        grouped.setdefault(str(sample.origin), []).append(sample)
    return grouped


def _rows_again(data: Data, rows: Any) -> Iterator[Row]:
    sources = open_sources(data) if rows is None else [replace(open_object(rows, split=data.split), format=data.format)]
    settings = FormatSettings.of(data)
    streams = [_parsed(source, settings) for source in sources]
    while streams:  # in turn, so that each source is looked at
        for stream in list(streams):
            row = next(stream, None)
            if row is None:
                streams.remove(stream)
            else:
                yield row


def _parsed(source: Source, settings: FormatSettings) -> Iterator[Row]:
    chosen = FORMATS.get(source.format)
    for part in source.parts:
        for origin, raw in part.rows(Counter()):
            row = decode(raw, origin)
            if isinstance(row, Broken):
                continue  # was reported, or left out by request, when the rows were prepared
            try:
                if chosen is None:
                    chosen = detect(with_our_columns(row, settings.columns), origin)
                yield parse(row, origin, chosen, settings).row
            except DataError:
                continue


def _disagreement(
    row: Row, samples: Sequence[Sample], data: Data, tokenizer: ChatTokenizer, longest: int | None
) -> str | None:
    """What is wrong with the row's samples, "" where they agree with it, None where they cannot be compared."""
    is_cut = data.overlong == "truncate" and (longest is None or len(samples[0]) >= longest)
    is_whole = len(samples) == 1 and data.overlong != "split" and not is_cut
    trained = [_trained_texts(sample, tokenizer) for sample in samples]
    if isinstance(row, Conversation):
        messages = _trained_messages(row, data)
        if data.turns == "unroll" and len(samples) == len(messages):
            pairs = list(zip(trained, ([each] for each in messages), strict=True))
        elif is_whole:
            pairs = [(trained[0], messages)]
        else:
            return None
        found = (_of_messages(texts, expected, row, tokenizer) for texts, expected in pairs)
        return next((line for line in found if line), "")
    if isinstance(row, Text) and is_whole:
        return _of_text(row, samples[0], tokenizer)
    return None


def _trained_messages(row: Conversation, data: Data) -> list[Message]:
    everyone = data.unmask or row.unmask
    chosen = []
    for message in row.messages:
        by_role = message.role == "assistant" or (everyone and message.role != "system")
        if float(by_role) if message.train is None else message.train:
            chosen.append(message)
    return chosen[-1:] if data.turns == "last" else chosen


def _of_messages(texts: list[str], messages: Sequence[Message], row: Conversation, tokenizer: ChatTokenizer) -> str:
    whole, at = "".join(texts), 0
    for number, message in enumerate(messages):
        wanted = _said(_answer(message.content or ""), tokenizer)
        place = whole.find(wanted, at)
        if place >= 0:
            at = place + len(wanted)
        elif not (len(texts) == len(messages) and _bare(texts[number], tokenizer) in wanted):
            return f"trained is {_short(whole)}, which does not hold the answer {_short(message.content or '')}"
    own = "".join(_all_of(message) for message in messages)
    for message in row.messages:
        text = _close(message.content or "")
        is_foreign = not any(message is each for each in messages) and len(text) >= SHORTEST_FOREIGN
        if is_foreign and text in whole and text not in own:
            return f"trained is text of a turn that is not to be trained ({message.role}): {_short(text)}"
    return ""


def _of_text(row: Text, sample: Sample, tokenizer: ChatTokenizer) -> str:
    found = _bare("".join(_trained_texts(sample, tokenizer)), tokenizer)
    wanted = _said("".join(text for text, weight in row.segments if weight), tokenizer)
    # Nothing predicts the first token of a text, and a token may join the end of a prompt with the completion.
    if found and (found in wanted or wanted in found):
        return ""
    return f"trained is {_short(found)}, but the row says {_short(wanted)}"


def _trained_texts(sample: Sample, tokenizer: ChatTokenizer) -> list[str]:
    """The text of each unbroken run of trained tokens, without white space."""
    is_trained = np.concatenate([[False], sample.weights > 0, [False]])
    edges = np.flatnonzero(is_trained[1:] != is_trained[:-1]).reshape(-1, 2)
    return [_decoded(sample.ids[start:end], tokenizer) for start, end in edges]


def _said(text: str, tokenizer: ChatTokenizer) -> str:
    """The text as this tokenizer can say it: one that lowers case or drops accents cannot say it otherwise."""
    return _decoded(tokenizer.encode_batch([text])[0][0], tokenizer)


def _decoded(ids: np.ndarray, tokenizer: ChatTokenizer) -> str:
    return _close(tokenizer.hf.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _bare(text: str, tokenizer: ChatTokenizer) -> str:
    for token in tokenizer.special_ids:
        text = text.replace(_close(token), "")
    return text


def _answer(content: str) -> str:
    # Templates of reasoning models leave the thoughts of earlier turns out, in serving too.
    return content.rpartition("</think>")[2]


def _all_of(message: Message) -> str:
    calls = "".join(str(call) for call in message.tool_calls)
    return _close(f"{message.reasoning_content or ''}{message.content or ''}{calls}")


def _close(text: str) -> str:
    return "".join(text.split())


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
