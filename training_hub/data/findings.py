"""Whether what was found of a conversation in its rendering agrees with what its messages say; if not, in which words.

Problems name the row and the message. Notes are short and the same for all rows, so that they can be counted.
"""

from __future__ import annotations

from training_hub.data.chat import called_functions, missing_of_call, python_repr, shows
from training_hub.data.regions import Place, Stage, Turn
from training_hub.errors import DataError
from training_hub.types import Conversation, Message

AS_TEXT = "special tokens in messages encoded as text"
NO_STOP = "stop token not trained: the template puts none behind the turn"
NO_STOP_ID = "turn ends in a token or text that the model does not stop at; see docs/guides/templates.md"
UNSTEADY = "template shows earlier turns differently from how they were generated; see data.turns: unroll"
REASONING_EARLIER = "reasoning of earlier turns not shown"
REASONING_DROPPED = "template drops reasoning_content"
PARTLY_SHOWN = "part of an answer not shown by the template"
PROMPT_DIFFERS = "generation prompt holds text that the template does not show in front of answers"
LAST_UNTRAINED = "conversation ends in a turn that is not trained"
NO_WEIGHT = "row of weight 0 left out"


def where(row: Conversation, index: int) -> str:
    return f"{row.origin}: message {index + 1} ({row.messages[index].role})"


def refusal(row: Conversation, stage: Stage, error: DataError) -> str:
    """The template's own words, and the message up to which it would have gone along."""
    for count in range(1, len(row.messages)):
        if stage.upto(count) is None and (count == 1 or stage.upto(count - 1) is not None):
            return f"{where(row, count - 1)}: {error}"
    return f"{where(row, len(row.messages) - 1)}: {error}"


def unshown(row: Conversation, text: str) -> list[str]:
    """Messages whose text the template leaves out. Answers are checked where they are trained."""
    problems = []
    for index, message in enumerate(row.messages):
        if message.role == "assistant" or not (message.content or "").strip():
            continue
        if not shows(text, message.content or ""):
            problems.append(
                f"{where(row, index)}: the chat template shows nothing of {_short(message.content or '')}. Leave the "
                "message out, or choose a template that has this role: data.chat_template."
            )
    return problems


def turn_problems(row: Conversation, index: int, text: str, place: Place) -> list[str]:
    """What contradicts the finding that message `index` is shown at `place`."""
    message, turn = row.messages[index], where(row, index)
    region = text[min(place.start, place.shown) : place.end]
    if place.start > place.end:
        return [f"{turn}: the generation prompt already holds {_short(region)}; nothing is left to train."]
    content = (message.content or "").strip()
    if content and not region.strip():
        return [f"{turn}: the chat template shows nothing of {_short(content)}."]
    own = text[place.shown : place.end].strip()
    if content and not shows(region, content) and not (own and own in content):
        return [f"{turn}: says {_short(content)} but the chat template shows {_short(region)} in its place."]
    for name, arguments in called_functions(message):
        missing = missing_of_call(name, arguments, region)
        if missing:
            return [f"{turn}: the chat template does not show {missing}; it shows {_short(region)}."]
    foreign = python_repr(message, region)
    if foreign:
        return [f"{turn}: the chat template writes {_short(foreign)}, Python's notation, into the text."]
    return _neighbour_problems(row, index, text, place)


def _neighbour_problems(row: Conversation, index: int, text: str, place: Place) -> list[str]:
    """Text of the turns next to it that could only lie inside the place: found nowhere on their own side of it."""
    sides = ((index - 1, text[: place.start]), (index + 1, text[place.closed :]))
    problems = []
    for other, side in sides:
        if not 0 <= other < len(row.messages):
            continue
        content = (row.messages[other].content or "").strip()
        if content and content in text and content not in side and content in text[place.start : place.closed]:
            problems.append(
                f"{where(row, index)}: the chat template mixes it with message {other + 1} "
                f"({row.messages[other].role}), {_short(content)}."
            )
    return problems


def turn_notes(message: Message, text: str, turn: Turn) -> list[str]:
    region = text[min(turn.place.start, turn.place.shown) : turn.place.end]
    notes = []
    content, reasoning = (message.content or "").strip(), (message.reasoning_content or "").strip()
    if content and not shows(region, content):
        notes.append(PARTLY_SHOWN)
    if reasoning and not shows(region, reasoning):
        alone = turn.alone[0][turn.alone[1].start : turn.alone[1].end] if turn.alone else ""
        notes.append(REASONING_EARLIER if shows(alone, reasoning) else REASONING_DROPPED)
    return notes


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
