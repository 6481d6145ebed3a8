"""AutoTrain's trainer class, to be derived from: `preprocess_function` sees the rows before anything else does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from training_hub.errors import DataError, RecipeError
from training_hub.frontends.autotrain.meaning import asked
from training_hub.frontends.autotrain.params import LLMTrainingParams
from training_hub.frontends.autotrain.run import TrainedModel, run
from training_hub.recipe.translate import shown

IN_MEMORY = "(in memory)"


class CustomSFTTrainer:
    """Supervised fine-tuning of a model at hand on rows at hand.

    model: folder or hub name, a model of transformers, or what `train` gave. args: LLMTrainingParams. train_dataset:
    DataFrame, `datasets` object or dictionaries; without it what args.data_path names is read, and not preprocessed
    here. tokenizer, processing_class: two names of one thing; needed beside a model in memory.
    """

    def __init__(
        self,
        model: Any = None,
        args: LLMTrainingParams | None = None,
        train_dataset: Any = None,
        tokenizer: Any = None,
        processing_class: Any = None,
    ):
        args = LLMTrainingParams() if args is None else args
        if not isinstance(args, LLMTrainingParams):
            raise RecipeError(f"args: found a {type(args).__name__}; allowed: LLMTrainingParams(...).")
        if tokenizer is not None and processing_class is not None:
            raise RecipeError("tokenizer and processing_class: two names of one thing. Keep one.")
        self.model, self.args, self.train_dataset = model, args, train_dataset
        self.processing_class = processing_class if tokenizer is None else tokenizer
        self.text_column = args.text_column

    @property
    def tokenizer(self) -> Any:
        """The same as processing_class."""
        return self.processing_class

    def preprocess_function(self, examples: dict[str, list[Any]]) -> Mapping[str, list[Any]]:
        """New columns for up to 1,000 rows, given as columns. As it is here, the rows stay what they are."""
        return examples

    def train(self) -> TrainedModel:
        """Preprocess the rows and train. Raises RecipeError or DataError before anything is loaded."""
        changes: dict[str, Any] = {}
        live: dict[str, Any] = {}
        if isinstance(self.model, TrainedModel):
            changes["model"] = str(self.model.result.model_path)
        elif isinstance(self.model, str):
            changes["model"] = self.model
        elif self.model is not None:
            changes["model"], live["model"] = IN_MEMORY, self.model
        if live and self.processing_class is None:
            raise RecipeError("tokenizer: not given; a model in memory needs one beside it. Write tokenizer=TOKENIZER")
        if self.processing_class is not None:
            live["tokenizer"] = self.processing_class
        rows = None if self.train_dataset is None else list(self._preprocessed(self.train_dataset))
        if rows is not None:
            changes["text_column"] = self._text_column_of(rows)
        params = LLMTrainingParams(**{**_given(self.args), **changes})
        return run(asked(params, rows=rows), **live)

    def _preprocessed(self, rows: Any) -> Iterator[dict[str, Any]]:
        from training_hub.frontends.rows import batches, dictionaries  # which loads numpy

        for examples in batches(dictionaries(rows)):
            made = self.preprocess_function(examples)
            if not isinstance(made, Mapping) or not all(isinstance(one, (list, tuple)) for one in made.values()):
                raise DataError(
                    f"preprocess_function: gave back {shown(made)}; a dictionary of columns is wanted: "
                    '{"text": [...]}.'
                )
            lengths = {name: len(values) for name, values in made.items()}
            if len(set(lengths.values())) > 1:
                raise DataError(f"preprocess_function: its columns have {lengths} rows; all must have as many.")
            yield from (dict(zip(made, values, strict=True)) for values in zip(*made.values(), strict=True))

    def _text_column_of(self, rows: list[dict[str, Any]]) -> str:
        """The column that is trained on once the rows are preprocessed: args.text_column, or `text` in its place."""
        there = rows[0] if rows else {}
        return self.text_column if self.text_column in there or "text" not in there else "text"


def _given(params: LLMTrainingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.model_fields_set if name != "data_path"}
