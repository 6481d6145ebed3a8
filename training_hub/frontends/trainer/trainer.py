"""SFTTrainer: an object that trains, as users of EasyDeL and of TRL write it, on the one recipe."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from training_hub.errors import BackendError, RecipeError
from training_hub.folders import write_json
from training_hub.frontends.autotrain.run import TrainedModel
from training_hub.frontends.trainer.callbacks import problems_of as callback_problems
from training_hub.frontends.trainer.callbacks import set_name, watchers_of
from training_hub.frontends.trainer.config import SFTConfig, config_from
from training_hub.frontends.trainer.fields import EASYDEL, TRL
from training_hub.frontends.trainer.handed import Things, handed, own_folder
from training_hub.frontends.trainer.loading import ModelHandle
from training_hub.recipe import Recipe
from training_hub.recipe.translate import shown

if TYPE_CHECKING:
    from training_hub.backends import Examiner
    from training_hub.types import TrainResult


EXAMINER = "torch"
"""The engine that measures a model by itself where the one that trained it does not."""


class TrainOutput(NamedTuple):
    """What `train` gives, as transformers has it; `result` is the TrainResult with everything that came out."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]
    result: TrainResult


@dataclass(frozen=True)
class State:
    """How far training has come. log_history: a dictionary for each logged step and each evaluation."""

    log_history: list[dict[str, Any]]
    global_step: int = 0
    epoch: float = 0.0
    max_steps: int = 0


HOOKS = tuple(
    "compute_loss training_step prediction_step evaluation_loop prediction_loop get_batch_samples log "
    "get_train_dataloader get_eval_dataloader create_optimizer create_scheduler create_optimizer_and_scheduler "
    "optimizer_step _prepare_dataset _save_checkpoint _inner_training_loop configure_dataloaders configure_functions "
    "create_collect_function on_step_start on_step_end".split()
)
"""Methods of other trainers by which a class derived from them changes how it trains, and which are not called here."""


class SFTTrainer:
    """Supervised fine-tuning of a model on rows, in the names of EasyDeL and of TRL.

    model: folder or hub name, what AutoEasyDeLModelForCausalLM.from_pretrained gave, a model of transformers in memory,
        or what another trainer made.
    arguments (EasyDeL's name) or args (TRL's): SFTConfig, that of TRL, TrainingArguments or a dictionary. Which of the
        two names is used says whose defaults hold.
    train_dataset: a `datasets` object, DataFrame, list of dictionaries, or the name of a file. eval_dataset: the same,
        or a dictionary of several by name.
    processing_class: the tokenizer, or its folder. Without it the one beside the model.
    formatting_func: makes a text, several, or a row of a row; or a list of texts of many rows, given as columns.
    data_collator: labels rows that hold input_ids. peft_config: trains an adapter.
    compute_metrics: a function of two texts, (answer, reference), for answers to eval_dataset.
    callbacks: callbacks of transformers, or functions that take a StepReport.

    Everything that is wrong is told here, in one RecipeError, before a weight is read.
    """

    def __init_subclass__(cls, **options: Any):
        """Raises RecipeError for a method that would never be called."""
        super().__init_subclass__(**options)
        found = [name for name in HOOKS if name in cls.__dict__]
        if found:
            raise RecipeError(
                f"{cls.__name__}: {', '.join(found)} of another trainer would never be called here. Losses, "
                "optimizers, schedules and sampling are fields of SFTConfig; what is to happen at each step is a "
                "callback."
            )

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Callable[[Any], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: Sequence[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: Callable[[Any], Any] | None = None,
        *,
        arguments: Any = None,
        tokenizer: Any = None,
    ):
        if args is not None and arguments is not None:
            raise RecipeError("args and arguments: two names of one thing. Keep one.")
        if tokenizer is not None and processing_class is not None:
            raise RecipeError("tokenizer and processing_class: two names of one thing. Keep one.")
        given = args if arguments is None else arguments
        if isinstance(model, SFTConfig):
            raise RecipeError("model: found an SFTConfig. Write SFTTrainer(arguments=CONFIG, model=MODEL, ...)")
        self.args = SFTConfig(output_dir=own_folder(model)) if given is None else config_from(given)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = processing_class if tokenizer is None else tokenizer
        self._things = Things(
            style=TRL if arguments is None else EASYDEL,
            config=self.args,
            model=model,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processing_class,
            formatting_func=formatting_func,
            data_collator=data_collator,
            compute_metrics=compute_metrics,
            callbacks=tuple(callbacks or ()),
            peft_config=peft_config,
            quantization_config=quantization_config,
        )
        problems = _not_here(
            compute_loss_func=compute_loss_func,
            optimizers=None if tuple(optimizers) == (None, None) else optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._handed = handed(self._things, problems)
        self.recipe = self._handed.recipe()
        self._callbacks = list(callbacks or ())
        self._output: TrainOutput | None = None
        self._trained: TrainedModel | None = None
        self._is_trained_in_place = False

    @property
    def arguments(self) -> SFTConfig:
        """The same as args."""
        return self.args

    @property
    def tokenizer(self) -> Any:
        """The same as processing_class."""
        return self.processing_class

    @property
    def model(self) -> Any:
        """The model: as it was handed over, and once it is trained what came out, loaded when it is first used."""
        if self._trained is not None:
            return self._handed.live["model"] if self._is_trained_in_place else self._trained.model
        given = self._things.model
        if isinstance(given, str | os.PathLike):
            return ModelHandle(os.fspath(given), {}, {}).model
        return given

    @property
    def state(self) -> State:
        """How far training has come, with what was logged, in the words of transformers."""
        if self._output is None:
            return State([])
        history = self._output.result.history
        last = history[-1] if history else {}
        every = self.recipe.monitoring.log_interval
        logged = [one for row in history for one in _logged(row, row["step"] % every == 0 or row is last)]
        total = int(self._output.result.plan.get("total_steps", 0))
        return State(logged, int(last.get("step", 0)), float(last.get("epoch", 0.0)), total)

    def train(self, resume_from_checkpoint: bool | str | os.PathLike[str] | None = None) -> TrainOutput:
        """Train. A run of the same settings that was stopped in the same folder goes on; a finished one stays as it is.

        resume_from_checkpoint: False begins anew and moves aside what the folder holds. Raises RecipeError or DataError
        before anything is loaded, and what a run raises.
        """
        from training_hub.backends import Given
        from training_hub.launch import run
        from training_hub.monitoring.console import open_console

        recipe = self._resuming(resume_from_checkpoint)
        console = open_console(recipe.monitoring.console)
        for note in self._handed.notes:
            console.say(f"recipe: {note}")
        shown_to_callbacks = {"model": self._handed.live.get("model"), "processing_class": self.processing_class}
        watchers = watchers_of(self._callbacks, self.args, recipe.monitoring.log_interval, **shown_to_callbacks)
        if "model" in self._handed.live:  # of a run that is over already nothing is heard, and the model stays as it is
            watchers.append(self._note_step)
        metrics = () if self._things.compute_metrics is None else (self._things.compute_metrics,)
        result = run(recipe, Given(**self._handed.live, watchers=tuple(watchers), metrics=metrics))
        self._trained = TrainedModel(result)
        steps = [row for row in result.history if row.get("loss") is not None]
        mean = sum(row["loss"] for row in steps) / max(1, len(steps))
        told = {"train_loss": mean, "train_runtime": result.seconds, **result.metrics}
        self._output = TrainOutput(int(steps[-1]["step"]) if steps else 0, mean, told, result)
        return self._output

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Loss and perplexity of the model on eval_dataset, by name: eval_loss, eval_perplexity, eval_rows; of several
        sets each by its name, eval_NAME_loss. Before training of the model as it was handed over.

        ignore_keys: taken and not needed, since only these numbers come back.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None:
            raise RecipeError("eval_dataset: not given. Hand it to SFTTrainer, or to evaluate().")
        if isinstance(rows, Mapping):
            parts = [self.evaluate(one, None, f"{metric_key_prefix}_{name}") for name, one in rows.items()]
            return {name: value for part in parts for name, value in part.items()}
        scores = self._scores(rows)
        return {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Write model and tokenizer into a folder, by default that of the run: after training the final ones."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.recipe.output if output_dir is None else output_dir)
        path = None if self._trained is None else self._trained.result.model_path
        if path is not None:
            shutil.copytree(path, folder, dirs_exist_ok=True)
            return
        self.model.save_pretrained(folder)
        if hasattr(self.processing_class, "save_pretrained"):
            self.processing_class.save_pretrained(folder)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """The same as save_model."""
        self.save_model(save_directory)

    def add_callback(self, callback: Any) -> None:
        """Let another callback hear of the next call of train()."""
        problems = list(callback_problems([callback]))
        if problems:
            raise RecipeError(problems)
        self._callbacks.append(callback)

    def is_world_process_zero(self) -> bool:
        """Whether this is the first process of the run."""
        return os.environ.get("RANK", "0") == "0"

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Say metrics, one on each line."""
        from training_hub.monitoring.console import open_console  # which loads numpy

        console = open_console(self.recipe.monitoring.console if self.is_world_process_zero() else "off")
        for name, value in sorted(metrics.items()):
            console.say(f"{split} metrics: {name} {value:.6g}" if isinstance(value, float) else f"{name} {value}")

    def save_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Write metrics into SPLIT_results.json of the run folder."""
        if self.is_world_process_zero():
            write_json(Path(self.recipe.output) / f"{split}_results.json", dict(metrics))

    def save_state(self) -> None:
        """Write `state` into trainer_state.json of the run folder."""
        if self.is_world_process_zero():
            write_json(Path(self.recipe.output) / "trainer_state.json", asdict(self.state))

    def push_to_hub(self, repo_id: str | None = None, *, private: bool = True) -> str:
        """Send the final model to the hub; its address there. Raises BackendError where there is none yet."""
        name = repo_id or self.args.hub_model_id
        if self._trained is None:
            raise BackendError("push_to_hub: nothing is trained yet. Call train() first.")
        if name is None:
            raise RecipeError("push_to_hub: needs repo_id, or hub_model_id in SFTConfig: OWNER/NAME.")
        return self._trained.push_to_hub(name, private=private)

    def _note_step(self, report: Any) -> None:
        self._is_trained_in_place = True

    def _resuming(self, checkpoint: Any) -> Recipe:
        """The recipe, beginning anew where that is asked for."""
        if checkpoint is None or checkpoint is True:
            return self.recipe
        if checkpoint is False:
            restart = self.recipe.checkpoint.model_copy(update={"resume": "restart"})
            return self.recipe.model_copy(update={"checkpoint": restart})
        raise RecipeError(
            f"resume_from_checkpoint: found {shown(checkpoint)}; started again in the same folder, a run goes on from "
            "its newest whole checkpoint. Write True, or leave it out."
        )

    def _scores(self, rows: Any) -> dict[str, float]:
        """Scores of the model as it now is on rows."""
        from training_hub.backends import Given
        from training_hub.frontends.trainer.rows import rows_of
        from training_hub.monitoring.console import open_console
        from training_hub.recipe.saved import with_saved

        found = rows_of(rows, self._handed.rows, "eval_dataset")
        path = None if self._trained is None else self._trained.result.model_path
        own = {"validation": None, "validation_fraction": 0.0, "deduplicate": False, "max_rows": None}
        data = self.recipe.data.model_copy(update={**own, "path": found.settings.get("data.path")})
        quiet = {"watch": None, "generate": False} if self._things.compute_metrics is None else {"watch": None}
        recipe = self.recipe.model_copy(
            update={"data": data, "evaluation": self.recipe.evaluation.model_copy(update=quiet)}
        )
        live = {name: self._handed.live[name] for name in ("tokenizer",) if name in self._handed.live}
        if path is not None:
            recipe = with_saved(recipe, str(path))
        elif "model" in self._handed.live:
            live["model"] = self._handed.live["model"]
        own_metrics = () if self._things.compute_metrics is None else (self._things.compute_metrics,)
        given = Given(rows=found.live, metrics=own_metrics, **live)
        engine = _examiner(self.recipe)
        return engine.examine(recipe, given, open_console(recipe.monitoring.console), own_metrics).scores


def _examiner(recipe: Recipe) -> Examiner:
    """The engine that measures the recipe's model: its own, or else one that reads what that one saves."""
    from training_hub.algorithms import engine_of
    from training_hub.backends import Examiner, find_backend

    engines = (find_backend(name) for name in (engine_of(recipe), EXAMINER))
    return next(engine for engine in engines if isinstance(engine, Examiner))


def _not_here(**given: Any) -> list[str]:
    """Lines for arguments of TRL that are there to be refused."""
    why = {
        "compute_loss_func": "the loss is chosen by fields: loss_type='dft', label_smoothing_factor, or distillation",
        "optimizers": "an optimizer is chosen by name: SFTConfig(optimizer=EasyDeLOptimizers.ADAMW) or optim=",
        "optimizer_cls_and_kwargs": "an optimizer is chosen by name: SFTConfig(optimizer=...) or optim=",
        "preprocess_logits_for_metrics": "logits of all rows never exist here; compute_metrics is asked about texts",
    }
    return [f"{name}: {why[name]}. Leave it out." for name, value in given.items() if value is not None]


def _logged(row: Mapping[str, Any], is_due: bool) -> list[dict[str, Any]]:
    """The entries of log_history that a row of the history stands for."""
    place = {"epoch": row["epoch"], "step": row["step"]}
    found = [{**{name: row[name] for name in ("loss", "grad_norm", "learning_rate")}, **place}] if is_due else []
    if row.get("validation_loss") is not None:
        sets = {set_name(name): value for name, value in row.items() if name.startswith("validation_loss/")}
        whole = {"eval_loss": row["validation_loss"], "eval_perplexity": row["validation_perplexity"]}
        found.append({**whole, **sets, **place})
    return found
