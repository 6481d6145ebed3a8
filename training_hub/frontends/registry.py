"""Algorithms and backends by name, and the classes behind them, as training_hub has them.

Besides what is built in, an algorithm is found after `AlgorithmRegistry.register_algorithm`, or through the entry-point
group `training_hub.algorithms` (a class derived from Algorithm); a backend after `register_backend`, in the `backends`
of its algorithm's class, or, as an engine that reads recipes, through the group `training_hub.backends`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, ClassVar

from training_hub.algorithms import ALGORITHMS
from training_hub.errors import RecipeError
from training_hub.frontends.dialects import KEYWORDS_OF, REQUIRED_OF, recipe_from, request_from


class Backend(ABC):
    """What runs an algorithm on the keywords that its caller gave."""

    @abstractmethod
    def execute_training(self, algorithm_params: dict[str, Any]) -> Any:
        """Train, and return the result. `algorithm_params`: the keywords that were given and are not None."""


class Algorithm(ABC):
    """A way to train, to be called with keywords. `backends` are those it brings along, the preferred one first."""

    backends: ClassVar[Mapping[str, type[Backend]]] = MappingProxyType({})

    def __init__(self, backend: Backend, **keywords: Any):
        self.backend = backend
        self.keywords = keywords
        """Defaults for each call of train()."""

    @abstractmethod
    def train(self, **keywords: Any) -> Any:
        """Train with these keywords and return what the backend returns."""

    @abstractmethod
    def get_required_params(self) -> dict[str, type]:
        """Keywords that train() cannot do without, with their types."""

    @abstractmethod
    def get_optional_params(self) -> dict[str, type]:
        """All other keywords of train(), with their types."""


class ContractBackend(Backend):
    """A backend that turns keywords into a recipe and runs that; subclasses name the algorithm and the contract."""

    algorithm: ClassVar[str]
    contract: ClassVar[str]

    def execute_training(self, algorithm_params: dict[str, Any]) -> Any:
        """Run the recipe that the keywords describe; a TrainResult. Raises RecipeError listing all that is wrong."""
        request = request_from(algorithm_params, self.algorithm)
        recipe = recipe_from(request.layer, algorithm=self.algorithm, backend=self.contract, live=request.live)

        from training_hub.backends import Given
        from training_hub.launch import run

        live = {"rows": request.rows, "validation_rows": request.validation_rows, "watchers": request.watchers}
        return run(recipe, Given(**live, metrics=request.metrics))


class InstructLabTrainingSFTBackend(ContractBackend):
    """SFT with the parameters and defaults of instructlab-training, run by our engine."""

    algorithm = "sft"
    contract = "instructlab-training"


class TorchSFTBackend(ContractBackend):
    """SFT with the recipe's own defaults, run by our engine."""

    algorithm = "sft"
    contract = "torch"


class JaxSFTBackend(ContractBackend):
    """SFT with the recipe's own defaults, run by our engine on JAX."""

    algorithm = "sft"
    contract = "jax"


class MiniTrainerOSFTBackend(ContractBackend):
    """OSFT with the parameters and defaults of mini-trainer, run by our engine."""

    algorithm = "osft"
    contract = "mini-trainer"


class TorchOSFTBackend(ContractBackend):
    """OSFT with the recipe's own defaults, run by our engine."""

    algorithm = "osft"
    contract = "torch"


class JaxOSFTBackend(ContractBackend):
    """OSFT with the recipe's own defaults, run by our engine on JAX."""

    algorithm = "osft"
    contract = "jax"


class TorchLoRASFTBackend(ContractBackend):
    """LoRA with the recipe's own defaults, run by our engine."""

    algorithm = "lora_sft"
    contract = "torch"


class JaxLoRASFTBackend(ContractBackend):
    """LoRA with the recipe's own defaults, run by our engine on JAX."""

    algorithm = "lora_sft"
    contract = "jax"


class UnslothLoRABackend(ContractBackend):
    """LoRA with the parameters and defaults of training_hub's backend of this name, run by our engine."""

    algorithm = "lora_sft"
    contract = "unsloth"


class ContractAlgorithm(Algorithm):
    """An algorithm whose keywords stand in the tables of `dialects`; subclasses name the function."""

    function: ClassVar[str]

    def train(self, **keywords: Any) -> Any:
        """Train; takes the keywords of the function but for `backend`, and returns what the backend returns."""
        given = {name: value for name, value in keywords.items() if value is not None}
        return self.backend.execute_training({**self.keywords, **given})

    def get_required_params(self) -> dict[str, type]:
        return {name: KEYWORDS_OF[self.function][name].type() for name in REQUIRED_OF[self.function]}

    def get_optional_params(self) -> dict[str, type]:
        known, required = KEYWORDS_OF[self.function], REQUIRED_OF[self.function]
        return {name: keyword.type() for name, keyword in known.items() if name not in required} | {
            "callbacks": list,
            "overrides": dict,
        }


class SFTAlgorithm(ContractAlgorithm):
    """Supervised fine-tuning: all weights learn from the cross-entropy of the trained tokens."""

    function = "sft"
    backends = MappingProxyType(
        {"instructlab-training": InstructLabTrainingSFTBackend, "torch": TorchSFTBackend, "jax": JaxSFTBackend}
    )


class OSFTAlgorithm(ContractAlgorithm):
    """Orthogonal subspace fine-tuning: the largest singular directions of each weight are protected."""

    function = "osft"
    backends = MappingProxyType(
        {"mini-trainer": MiniTrainerOSFTBackend, "torch": TorchOSFTBackend, "jax": JaxOSFTBackend}
    )


class LoRASFTAlgorithm(ContractAlgorithm):
    """Supervised fine-tuning of an adapter beside frozen weights: LoRA and its kin."""

    function = "lora_sft"
    backends = MappingProxyType({"unsloth": UnslothLoRABackend, "torch": TorchLoRASFTBackend, "jax": JaxLoRASFTBackend})


class AlgorithmRegistry:
    """Every algorithm and backend by name. What is registered holds for this process."""

    # The one place of the package that changes at run time: registering is what this class is for.
    _algorithms: ClassVar[dict[str, type[Algorithm]]] = {
        "sft": SFTAlgorithm,
        "osft": OSFTAlgorithm,
        "lora_sft": LoRASFTAlgorithm,
    }
    _backends: ClassVar[dict[str, dict[str, type[Backend]]]] = {}

    @classmethod
    def register_algorithm(cls, name: str, algorithm_class: type[Algorithm]) -> None:
        """Make `algorithm_class` known as `name`, in place of one that has the name already."""
        cls._algorithms[name] = algorithm_class

    @classmethod
    def register_backend(cls, algorithm_name: str, backend_name: str, backend_class: type[Backend]) -> None:
        """Make `backend_class` (a class with `execute_training`) known as a backend of an algorithm.

        Raises RecipeError where the algorithm is not known or the class lacks the method.
        """
        if algorithm_name not in cls.list_algorithms():
            raise RecipeError(f"Algorithm '{algorithm_name}' must be registered before registering backends")
        if not callable(getattr(backend_class, "execute_training", None)):
            raise RecipeError(
                f"backend '{backend_name}': {backend_class!r} has no method execute_training(self, algorithm_params). "
                "Derive it from training_hub.Backend."
            )
        cls._backends.setdefault(algorithm_name, {})[backend_name] = backend_class

    @classmethod
    def get_algorithm(cls, name: str) -> type[Algorithm]:
        """The class of the algorithm `name`. Raises RecipeError (a ValueError) where there is none."""
        if name in cls._algorithms:
            return cls._algorithms[name]
        for point in entry_points(group="training_hub.algorithms"):
            if point.name == name:
                return point.load()
        raise RecipeError(f"Algorithm '{name}' not found")

    @classmethod
    def get_backend(cls, algorithm_name: str, backend_name: str) -> type[Backend]:
        """The class of a backend of an algorithm. Raises RecipeError (a ValueError) where there is none."""
        known = cls._backends_of(algorithm_name)
        if backend_name in known:
            return known[backend_name]
        if backend_name in cls._engines(algorithm_name):
            attributes = {"algorithm": algorithm_name, "contract": backend_name, "__doc__": "An installed engine."}
            return type(f"{backend_name} backend", (ContractBackend,), attributes)
        raise RecipeError(f"Backend '{backend_name}' not found for algorithm '{algorithm_name}'")

    @classmethod
    def list_algorithms(cls) -> list[str]:
        """The names of all algorithms."""
        installed = (point.name for point in entry_points(group="training_hub.algorithms"))
        return list(dict.fromkeys([*cls._algorithms, *installed]))

    @classmethod
    def list_backends(cls, algorithm_name: str) -> list[str]:
        """The names of an algorithm's backends, the preferred one first; [] for an algorithm that is not known."""
        if algorithm_name not in cls.list_algorithms():
            return []
        return list(dict.fromkeys([*cls._backends_of(algorithm_name), *cls._engines(algorithm_name)]))

    @classmethod
    def _backends_of(cls, algorithm_name: str) -> dict[str, type[Backend]]:
        own = getattr(cls.get_algorithm(algorithm_name), "backends", {})
        return {**own, **cls._backends.get(algorithm_name, {})}

    @staticmethod
    def _engines(algorithm_name: str) -> list[str]:
        """Installed engines; they read recipes, so they run the algorithms that recipes know."""
        if algorithm_name not in ALGORITHMS:
            return []
        return [point.name for point in entry_points(group="training_hub.backends")]


def create_algorithm(algorithm_name: str, backend_name: str | None = None, **keywords: Any) -> Algorithm:
    """An algorithm to call `train` on. Without a name, its preferred backend. `keywords` are defaults for each train().

    Raises RecipeError (a ValueError) where the algorithm or the backend is not known.
    """
    algorithm_class = AlgorithmRegistry.get_algorithm(algorithm_name)
    if backend_name is None:
        available = AlgorithmRegistry.list_backends(algorithm_name)
        if not available:
            raise RecipeError(f"No backends available for algorithm '{algorithm_name}'")
        backend_name = available[0]
    backend_class = AlgorithmRegistry.get_backend(algorithm_name, backend_name)
    return algorithm_class(backend=backend_class(), **keywords)
