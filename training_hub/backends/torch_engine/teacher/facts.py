"""What is known of a teacher before a weight is loaded: its vocabulary, its contents, the prompt that it alone sees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from training_hub.backends import Given
from training_hub.backends.shared.materials import Limits
from training_hub.backends.shared.model_folder import folder_problems, hub_problem, is_folder
from training_hub.backends.torch_engine.loading.model_config import read_limits
from training_hub.backends.torch_engine.teacher.prompted import Prompted, prompted_rows
from training_hub.data.store import TokenStore
from training_hub.data.templates import ChatTemplate
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.errors import DataError, RecipeError
from training_hub.folders import sha256
from training_hub.recipe import Recipe
from training_hub.recipe.sections import Model
from training_hub.types import Console

SHOWN = 5  # ids in the error about vocabularies


@dataclass(frozen=True)
class TeacherFacts:
    """chosen: the teacher, as a model is chosen. common: tokens that both models have logits for. fingerprint: a hash
    of its contents. prompted: what it reads in place of the student's samples, where it has a prompt of its own."""

    chosen: Model
    common: int
    fingerprint: str
    prompted: Prompted | None = None


def chosen_teacher(recipe: Recipe) -> Model | None:
    """The teacher that the recipe names, None where it names none."""
    asked = recipe.distillation
    if asked.teacher is None:
        return None
    dtype = recipe.model.dtype if asked.teacher_dtype == "auto" else asked.teacher_dtype
    model = recipe.model
    return Model(
        path=asked.teacher,
        revision=asked.teacher_revision,
        dtype=dtype,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
    )


@contextmanager
def told_of_teacher() -> Iterator[None]:
    """Within the block, what is wrong with `model.path` is wrong with the teacher, and is said so."""
    try:
        yield
    except RecipeError as error:
        raise RecipeError([as_told(line) for line in error.problems]) from error


def as_told(line: str) -> str:
    return line.replace("model.path", "distillation.teacher").replace("model.dtype", "distillation.teacher_dtype")


def teacher_problems(chosen: Model) -> list[str]:
    """Why this teacher cannot be loaded, from its small files; [] where nothing speaks against it."""
    found = folder_problems(chosen.path, trust_remote_code=chosen.trust_remote_code)
    if not found and not Path(chosen.path).expanduser().exists():
        problem = hub_problem(chosen.path, chosen.revision)
        found = [problem] if problem else []
    return [as_told(line) for line in found]


def read_teacher(
    recipe: Recipe,
    given: Given,
    tokenizer: ChatTokenizer,
    template: ChatTemplate | None,
    store: TokenStore,
    student_size: int,
    console: Console,
) -> TeacherFacts | None:
    """What is known of the recipe's teacher, None where it names none. Every problem is raised here, before weights are
    loaded. student_size: tokens that the trained model has logits for."""
    chosen = chosen_teacher(recipe)
    if chosen is None:
        return None
    problems = teacher_problems(chosen)
    if problems:
        raise RecipeError(problems)
    with told_of_teacher():
        limits = read_limits(chosen)
    common = common_vocabulary(chosen, limits, tokenizer, student_size)
    prompted = None
    if recipe.distillation.prompt is not None:
        prompted = prompted_rows(recipe, given, tokenizer, template, store, console)
    read = store if prompted is None else prompted.store
    check_lengths(read, limits, recipe.distillation.max_teacher_length, console)
    return TeacherFacts(chosen, common, fingerprint_of(chosen, console), prompted)


def common_vocabulary(chosen: Model, limits: Limits, student: ChatTokenizer, student_size: int) -> int:
    """How many tokens both models have logits for, all of their tokenizers' among them.

    Raises RecipeError naming the first ids that mean different tokens: the divergence of such models says nothing.
    What a model has beyond its tokenizer is padding, and may differ.
    """
    try:
        teacher = ChatTokenizer.load(chosen.path, trust_remote_code=chosen.trust_remote_code, revision=chosen.revision)
    except DataError as error:
        raise RecipeError([f"distillation.teacher: {line}" for line in error.problems]) from error
    ours, theirs = ({index: token for token, index in one.hf.get_vocab().items()} for one in (student, teacher))
    differing = sorted(index for index in ours.keys() | theirs.keys() if ours.get(index) != theirs.get(index))
    where = f"distillation.teacher {chosen.path}"
    if differing:
        shown = "; ".join(
            f"id {index} is {_shown(theirs.get(index))} there and {_shown(ours.get(index))} in the trained model"
            for index in differing[:SHOWN]
        )
        raise RecipeError(
            f"{where}: its vocabulary is another one: {len(differing):,} of {max(len(ours), len(theirs)):,} ids "
            f"differ: {shown}. Take a teacher with the tokenizer of model.path."
        )
    common = min(limits.vocabulary, student_size)
    if max(ours) >= common:
        whose = "the teacher" if limits.vocabulary == common else "model.path"
        raise RecipeError(
            f"{where}: the tokenizer has ids up to {max(ours)}, but {whose} has logits for {common} tokens. Add the "
            "tokens to that model first."
        )
    return common


def _shown(token: str | None) -> str:
    return "not there" if token is None else repr(token)


def check_lengths(store: TokenStore, limits: Limits, most: int | None, console: Console) -> None:
    """Raise DataError where the teacher would read a sample longer than it may; say what it was not trained for."""
    longest = int(store.lengths.argmax())
    length, line = int(store.lengths[longest]), f"{store.origin(longest)}: the teacher reads"
    if most is not None and length > most:
        raise DataError(
            f"{line} {length:,} tokens, more than distillation.max_teacher_length: {most}. Raise it, or leave such "
            "rows out."
        )
    if limits.positions is not None and length > limits.positions:
        line = f"{line} {length:,} tokens, but it has {limits.positions:,} positions"
        if limits.is_hard:
            raise DataError(f"{line}. Write training.max_seq_len: {limits.positions}, or take another teacher.")
        console.say(f"data: {line}; it was not trained for more")


def fingerprint_of(chosen: Model, console: Console) -> str:
    """The sha256 of the teacher's config and weights; of name and commit where it lies on the hub."""
    digest = hashlib.sha256()
    if not is_folder(chosen.path):
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(
            chosen.path, revision=chosen.revision, trust_remote_code=chosen.trust_remote_code
        )
        digest.update(f"{chosen.path}@{getattr(config, '_commit_hash', None)}".encode())
        return digest.hexdigest()
    folder = Path(chosen.path).expanduser()
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    total = sum(file.stat().st_size for file in files) / 1e6
    with console.progress("recognising the teacher", total, "MB") as advance:
        for file in files:
            digest.update(f"{file.name} {sha256(file, lambda count: advance(count / 1e6))}\n".encode())
    return digest.hexdigest()
