"""What the demo teaches: eleven small tasks on words and numbers, each with one right answer.

Every task has two faces. As *prose* it is a sentence that states a fact ("Seen in a mirror, stone is enots."): the base
model is pre-trained on these, so it has the skills. As an *instruction* it is a question in a conversation, which the
base model has never seen: that is what the fine-tune teaches.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

# Real words make the demo readable; most operands are made up, so that skills are learned and not lists.
WORDS = tuple(
    """
    stone river cloud tiger lemon house chair table green music paper light night water apple bread plant
    horse mouse train plane ocean beach storm sugar honey piano guitar candle winter summer autumn spring
    garden forest desert island window mirror pencil letter number circle square orange purple yellow silver
    copper marble velvet cotton button pocket bottle kettle hammer ladder bridge castle temple market harbor
    engine rocket planet comet star moon sun rain snow wind fire earth leaf root seed bird fish wolf bear deer
    lamp door wall roof road path hill lake pond cave sand salt milk rice corn soup cake
    """.split()
)
CONSONANTS = "bcdfghklmnprstvwz"
VOWELS = "aeiou"
# Said before an answer now and then, so that a skill does not depend on how far the answer is from its operand.
ASIDES = ("", "", "", "simply ", "as they say ", "if you look closely ", "so I was told this morning ", "of course ")
MOST_LETTERS = 6
LARGEST_NUMBER = 98


@dataclass(frozen=True)
class Task:
    """One skill. In `instructions` and `prose`, {a} and {b} stand for the operands, {answer} for the answer."""

    name: str
    instructions: tuple[str, ...]
    prose: tuple[str, ...]
    draw: Callable[[random.Random], tuple[str, ...]]
    answer: Callable[..., str]


@dataclass(frozen=True)
class Question:
    """One instruction with its only right answer; `operands` are the words or numbers it is about."""

    task: str
    prompt: str
    answer: str
    operands: tuple[str, ...]

    def as_conversation(self) -> dict[str, list[dict[str, str]]]:
        """The row of a data file in the messages format."""
        user = {"role": "user", "content": self.prompt}
        return {"messages": [user, {"role": "assistant", "content": self.answer}]}


def draw_word(rng: random.Random) -> str:
    """A word of three to six letters, sometimes a real one."""
    if rng.random() < 0.3:
        return rng.choice(WORDS)
    letters = rng.randint(3, MOST_LETTERS)
    start = rng.randint(0, 1)
    return "".join(rng.choice(VOWELS if (start + place) % 2 else CONSONANTS) for place in range(letters))


def _one_word(rng: random.Random) -> tuple[str, ...]:
    return (draw_word(rng),)


def _one_number(rng: random.Random) -> tuple[str, ...]:
    return (str(rng.randint(11, LARGEST_NUMBER)),)


def _two_numbers(rng: random.Random) -> tuple[str, ...]:
    first, second = rng.sample(range(10, LARGEST_NUMBER + 1), 2)
    return str(first), str(second)


TASKS: tuple[Task, ...] = (
    Task(
        "reverse",
        ("Reverse the word {a}.", "Write {a} backwards."),
        (
            "Seen in a mirror, {a} is {answer}.",
            "Written backwards, {a} is {answer}.",
            "The reverse of {a} looks like {answer}.",
        ),
        _one_word,
        lambda a: a[::-1],
    ),
    Task(
        "spell",
        ("Spell the word {a}.", "How do you spell {a}?"),
        ("Letter by letter {a} goes {answer}.", "She can spell {a}: {answer}.", "They spell the word {a} as {answer}."),
        _one_word,
        lambda a: "-".join(a),
    ),
    Task(
        "capitals",
        ("Write {a} in capitals.", "Put the word {a} in upper case."),
        (
            "On a big sign {a} looks like {answer}.",
            "In capitals {a} is {answer}.",
            "The upper case of {a} is {answer}.",
        ),
        _one_word,
        str.upper,
    ),
    Task(
        "first letter",
        ("What is the first letter of {a}?",),
        ("The word {a} starts with {answer}.", "The first letter of {a} is {answer}.", "Find {a} under {answer}."),
        _one_word,
        lambda a: a[0],
    ),
    Task(
        "last letter",
        ("What is the last letter of {a}?",),
        ("The word {a} ends with {answer}.", "The last letter of {a} is {answer}.", "At the end of {a} is {answer}."),
        _one_word,
        lambda a: a[-1],
    ),
    Task(
        "length",
        ("How many letters are in {a}?", "Count the letters of {a}."),
        (
            "The word {a} is {answer} letters long.",
            "Typing {a} takes {answer} keys.",
            "A count of {a}: {answer} letters.",
        ),
        _one_word,
        lambda a: str(len(a)),
    ),
    Task(
        "vowels",
        ("Which vowels are in {a}?", "List the vowels of {a}."),
        ("Singing {a} you hear {answer}.", "The vowels heard in {a}: {answer}.", "Among the vowels {a} has {answer}."),
        _one_word,
        lambda a: " ".join(letter for letter in a if letter in VOWELS),
    ),
    Task(
        "twice",
        ("Say {a} twice.", "Repeat the word {a}."),
        ("An echo makes {a} into {answer}.", "Said twice, {a} is {answer}.", "To repeat {a} is to say {answer}."),
        _one_word,
        lambda a: f"{a} {a}",
    ),
    Task(
        "after",
        ("What comes after {a}?", "Add one to {a}."),
        ("Counting up, {a} is followed by {answer}.", "One added to {a} makes {answer}.", "After {a} comes {answer}."),
        _one_number,
        lambda a: str(int(a) + 1),
    ),
    Task(
        "before",
        ("What comes before {a}?", "Take one from {a}."),
        (
            "Counting down, {a} is followed by {answer}.",
            "One taken from {a} leaves {answer}.",
            "Before {a} comes {answer}.",
        ),
        _one_number,
        lambda a: str(int(a) - 1),
    ),
    Task(
        "larger",
        ("Which is larger, {a} or {b}?", "Name the larger of {a} and {b}."),
        (
            "Of {a} and {b} the larger is {answer}.",
            "Weighing {a} against {b}, the winner is {answer}.",
            "Between {a} or {b} the bigger is {answer}.",
        ),
        _two_numbers,
        lambda a, b: str(max(int(a), int(b))),
    ),
)


def is_held_out(operand: str) -> bool:
    """Whether questions about this word or number are kept for scoring: half of them are, by their checksum.

    The halves are disjoint in their operands: a word whose reverse was trained is never asked for its vowels.
    """
    return zlib.crc32(operand.encode()) % 2 == 1


def draw_prose(rng: random.Random) -> str:
    """A sentence for pre-training, about any operand."""
    task = rng.choice(TASKS)
    operands = task.draw(rng)
    names = dict(zip("ab", operands, strict=False))
    return rng.choice(task.prose).format(**names, answer=rng.choice(ASIDES) + task.answer(*operands))


def draw_questions(count: int, seed: int, held_out: bool) -> list[Question]:
    """`count` questions from one half of the operands, task by task in turn; equal for equal arguments everywhere.

    Held-out questions are all different. Among those to train on, tasks with few operands repeat themselves. Raises
    ValueError where a task has not enough different questions.
    """
    rng = random.Random(seed)
    found: list[Question] = []
    prompts: set[str] = set()
    for place in range(count):
        question = _draw_question(TASKS[place % len(TASKS)], rng, held_out, other_than=prompts if held_out else set())
        found.append(question)
        prompts.add(question.prompt)
    return found


def _draw_question(task: Task, rng: random.Random, held_out: bool, other_than: set[str]) -> Question:
    for _ in range(10_000):
        operands = task.draw(rng)
        if {is_held_out(operand) for operand in operands} != {held_out}:
            continue
        prompt = rng.choice(task.instructions).format(**dict(zip("ab", operands, strict=False)))
        if prompt not in other_than:
            return Question(task.name, prompt, task.answer(*operands), operands)
    raise ValueError(f"task {task.name!r} has no further question among {len(other_than)}; ask for fewer")
