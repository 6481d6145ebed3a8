"""From AutoTrain's parameters to a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_hub.errors import BackendError
from training_hub.frontends.autotrain.meaning import Asked
from training_hub.frontends.dialects import recipe_from
from training_hub.recipe import Recipe
from training_hub.recipe.hub import Hub

if TYPE_CHECKING:
    from training_hub.types import TrainResult

ALGORITHM, BACKEND = "sft", "torch"


class TrainedModel:
    """What `train` gives: the model, loaded when it is first used as one, and everything that came out of the run.

    `result` is the TrainResult, whose fields (status, model_path, metrics, history, ...) are also found here; what is
    none of them is the model's own (config, parameters, ...).
    """

    def __init__(self, result: TrainResult):
        self.result = result
        self._loaded: Any = None
        self._tokenizer: Any = None

    @property
    def model(self) -> Any:
        """The final model, as transformers loads it, in evaluation mode."""
        if self._loaded is None:
            from transformers import AutoModelForCausalLM

            self._loaded = AutoModelForCausalLM.from_pretrained(self._folder, local_files_only=True).eval()
        return self._loaded

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that lies beside it."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self._folder, local_files_only=True)
        return self._tokenizer

    def generate(self, inputs: Any = None, **options: Any) -> Any:
        """The model's `generate`; given text, or a list of messages, the answer as text, at most 256 tokens of it."""
        if isinstance(inputs, str):
            encoded = self.tokenizer(inputs, return_tensors="pt")
        elif isinstance(inputs, list) and inputs and isinstance(inputs[0], dict):
            encoded = self.tokenizer.apply_chat_template(
                inputs, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            return self.model.generate(inputs, **options)
        limit = {} if {"max_new_tokens", "max_length"} & options.keys() else {"max_new_tokens": 256}
        known = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        said = self.model.generate(**known, **{**limit, **options})
        return self.tokenizer.decode(said[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        """Write model and tokenizer into a folder, as transformers does; the project keeps its own in `final`."""
        self.model.save_pretrained(folder, **options)
        self.tokenizer.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Send the files of the final model to the hub, as `hub.push` does; their address there.

        The token is the one of HF_TOKEN or of `hf auth login`. Raises BackendError where there is none, or where the
        hub refuses.
        """
        from training_hub.launch.hub import objections, push
        from training_hub.monitoring.console import open_console
        from training_hub.recipe.folder import RunFolder
        from training_hub.recipe.load import load_file

        recipe = load_file(RunFolder(self.result.output_dir).recipe)
        wanted = recipe.model_copy(update={"hub": Hub(push=True, repo_id=repo_id, private=private)})
        problems = objections(wanted)
        if problems:
            raise BackendError(problems)
        return push(Path(self._folder), wanted, open_console(recipe.monitoring.console))

    @property
    def _folder(self) -> str:
        if self.result.model_path is None:
            raise BackendError(
                f"{self.result.output_dir} holds no final model: {self.result.reason or 'none was asked for'}."
            )
        return str(self.result.model_path)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "result":  # copying and pickling ask before __init__
            raise AttributeError(name)
        return getattr(self.result, name) if hasattr(self.result, name) else getattr(self.model, name)

    def __repr__(self) -> str:
        return f"TrainedModel({self.result.status}, {self.result.model_path})"


def recipe_of(wanted: Asked) -> Recipe:
    """The recipe that parameters stand for. Raises RecipeError that lists everything that is wrong."""
    live = () if wanted.rows is None else ("data.path",)
    return recipe_from(wanted.layer, algorithm=ALGORITHM, backend=BACKEND, live=live)


def run(wanted: Asked, **live: Any) -> TrainedModel:
    """Train, with a live model or tokenizer where these are given."""
    recipe = recipe_of(wanted)

    from training_hub.backends import Given
    from training_hub.launch import run as launch
    from training_hub.monitoring.console import open_console

    console = open_console(recipe.monitoring.console)
    for note in wanted.notes:
        console.say(f"recipe: {note}")
    return TrainedModel(launch(recipe, Given(rows=wanted.rows, **live)))
