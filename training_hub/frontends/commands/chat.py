"""`training-hub chat`: talk to a saved model on a terminal, or ask it once; a second model may answer beside it."""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from training_hub.errors import BackendError, DataError, RecipeError
from training_hub.recipe.recipe import Recipe

if TYPE_CHECKING:
    from training_hub.backends import Voice
    from training_hub.evaluation.predictions import Reply
    from training_hub.types import Message

USAGE = """training-hub chat --model M [--beside BASE] [--system TEXT] [--prompt TEXT]
                         [--section.field VALUE ...] [section.field=VALUE ...]"""

HELP = """/system TEXT   what the model is told before the conversation; without TEXT: nothing
/reset         begin a new conversation
/quit          leave; so does the end of input
//text         a message that begins with /"""

MOST_TOKENS = 512


def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("chat")
    group.add_argument("--beside", metavar="BASE", help="another model, which answers the same beside it")
    group.add_argument("--prompt", metavar="TEXT", help="ask this, print the answer and end")
    group.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")
    group.add_argument(
        "--max-new-tokens", type=int, default=MOST_TOKENS, metavar="N", help=f"longest answer (default: {MOST_TOKENS})"
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (default), more draws"
    )
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest (default: 1)")


@dataclass
class Side:
    """One of the models that answer, and the conversation as it has gone with it."""

    name: str
    voice: Voice
    messages: list[Message] = field(default_factory=list)


@dataclass
class Talk:
    """The conversation: who answers, what was said before it, how answers are made and shown."""

    sides: list[Side]
    options: Namespace
    seed: int
    write: Callable[[str], None]
    system: str | None = None
    turns: int = 0

    def ask(self, text: str) -> None:
        """Let every side answer, each in its own conversation; an interrupted answer stays as far as it came."""
        from training_hub.types import Message

        self.turns += 1
        for side in self.sides:
            if len(self.sides) > 1:
                self.write(f"{side.name}: ")
            before = [Message("system", self.system)] if self.system else []
            heard: list[str] = []
            asked = [*side.messages, Message("user", text)]
            try:
                reply = self._reply(side, [*before, *asked], heard)
            except KeyboardInterrupt:
                self.write(" (stopped)\n")
            except DataError as error:
                self.write(f"error: {shown(str(error))}\n")
                continue
            else:
                self.write("\n")
                _tell(reply, self.options)
            side.messages = [*asked, Message("assistant", "".join(heard))]

    def reset(self) -> None:
        """Forget what was said, but for what the model is told before."""
        for side in self.sides:
            side.messages = []

    def _reply(self, side: Side, messages: list[Message], heard: list[str]) -> Reply:
        def hear(piece: str) -> None:
            heard.append(piece)
            self.write(shown(piece))

        return side.voice.reply(
            messages,
            hear,
            max_new_tokens=self.options.max_new_tokens,
            temperature=self.options.temperature,
            top_p=self.options.top_p,
            seed=self.seed + self.turns,
        )


def run(recipe: Recipe, options: Namespace) -> int:
    """Talk until the end of input, or answer `--prompt` once."""
    _refuse(options)
    talk = Talk(_sides(recipe, options), options, recipe.seed, _write, options.system)
    if options.prompt is not None:
        talk.ask(options.prompt)
        return 0
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        import readline  # noqa: F401  (arrow keys and history in input())

        _write(f"{' and '.join(side.name for side in talk.sides)} listen. /help lists what is not a message.\n")
    while (line := _line(is_terminal)) is not None:
        if line.startswith("/") and not line.startswith("//"):
            if not obey(talk, line):
                break
        elif line.strip():
            talk.ask(line.removeprefix("/"))
    return 0


def obey(talk: Talk, line: str) -> bool:
    """Do what a line that begins with / says; whether the talk goes on."""
    command, _, text = line.strip().partition(" ")
    if command in ("/quit", "/exit"):
        return False
    if command == "/reset":
        talk.reset()
        talk.write("a new conversation begins\n")
    elif command == "/system":
        talk.system = text.strip() or None
        talk.reset()
        talk.write(f"a new conversation begins, {'with' if talk.system else 'without'} a system message\n")
    elif command == "/help":
        talk.write(f"{HELP}\n")
    else:
        talk.write(f"{shown(command)} is not known:\n{HELP}\n")
    return True


def shown(text: str) -> str:
    """Text as a terminal may be given it: line breaks and tabs stay, other control characters are written out."""
    from training_hub.monitoring.words import printable

    return "\n".join(printable(line, longest=sys.maxsize) for line in text.split("\n"))


def _refuse(options: Namespace) -> None:
    problems = []
    if options.max_new_tokens < 1:
        problems.append(f"--max-new-tokens: found {options.max_new_tokens}; allowed: a whole number of at least 1.")
    if not 0 <= options.temperature < float("inf"):
        problems.append(f"--temperature: found {options.temperature}; allowed: a number of at least 0.")
    if not 0 < options.top_p <= 1:
        problems.append(f"--top-p: found {options.top_p}; allowed: a number greater than 0 and at most 1.")
    if options.top_p != 1 and options.temperature == 0:
        problems.append(f"--top-p: {options.top_p} would change nothing at temperature 0. Write --temperature 0.7")
    if options.prompt is not None and not options.prompt.strip():
        problems.append("--prompt: found nothing; write what is to be answered.")
    if problems:
        raise RecipeError(problems)


def _sides(recipe: Recipe, options: Namespace) -> list[Side]:
    """The models that answer. What is wrong with either is raised before one is loaded."""
    from training_hub.algorithms import engine_of
    from training_hub.backends import Speaker, find_backend
    from training_hub.experiments.comparison import names_of
    from training_hub.recipe.saved import with_saved

    paths = [recipe.model.path, *([options.beside] if options.beside else [])]
    names = names_of(paths)
    engine = find_backend(engine_of(recipe))
    if not isinstance(engine, Speaker):
        raise BackendError(f"backend {engine.name!r} cannot be talked to: it has no method voice(recipe).")
    recipes = [with_saved(recipe, path) for path in paths]
    problems = [line for one in recipes for line in engine.objections(one)]
    if problems:
        raise RecipeError(problems)
    sides = []
    for name, one in zip(names, recipes, strict=True):
        print(f"loading {name}", file=sys.stderr)
        sides.append(Side(name, engine.voice(one)))
        if not sides[-1].voice.has_template:
            print(
                f"{name}: has no chat template, so it goes on with the text; to ask it as the other is asked, write "
                "--chat-template",
                file=sys.stderr,
            )
    return sides


def _tell(reply: Reply, options: Namespace) -> None:
    """To those at a terminal: how fast it was, and whether it was cut."""
    if reply.finish_reason == "length":
        print(f"(cut at {reply.tokens} tokens: --max-new-tokens)", file=sys.stderr)
    elif sys.stderr.isatty() and options.prompt is None:
        print(f"({reply.tokens} tokens, {reply.tokens / max(reply.seconds, 1e-9):.1f} a second)", file=sys.stderr)


def _line(is_terminal: bool) -> str | None:
    """The next line typed or piped in; None at the end, and for Ctrl-C while nothing is said."""
    if not is_terminal:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        return input("you: ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _write(text: str) -> None:
    print(text, end="", flush=True)
