"""Fine-tune language models: one engine, one recipe, from Python, YAML or flags.

The public names are imported when they are first used, so that `import training_hub` is instant and imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from training_hub.version import VERSION as __version__

if TYPE_CHECKING:
    from training_hub.backends.torch_engine.adaptations.osft import OsftOptimizer
    from training_hub.errors import (
        BackendError,
        CheckpointError,
        DataError,
        DiskError,
        HubError,
        Interrupted,
        LaunchError,
        RecipeError,
        TrainingError,
    )
    from training_hub.frontends.autotrain.params import LLMTrainingParams
    from training_hub.frontends.autotrain.trainer import CustomSFTTrainer
    from training_hub.frontends.continual import continual
    from training_hub.frontends.evaluate import evaluate
    from training_hub.frontends.functions import lora_sft, osft, sft
    from training_hub.frontends.merging import merge_adapter
    from training_hub.frontends.registry import (
        Algorithm,
        AlgorithmRegistry,
        Backend,
        InstructLabTrainingSFTBackend,
        LoRASFTAlgorithm,
        MiniTrainerOSFTBackend,
        OSFTAlgorithm,
        SFTAlgorithm,
        UnslothLoRABackend,
        create_algorithm,
    )
    from training_hub.frontends.trainer.config import SFTConfig
    from training_hub.frontends.trainer.enums import (
        AttentionMechanisms,
        EasyDeLBackends,
        EasyDeLGradientCheckPointers,
        EasyDeLOptimizers,
        EasyDeLPlatforms,
        EasyDeLSchedulers,
    )
    from training_hub.frontends.trainer.loading import AutoEasyDeLModelForCausalLM
    from training_hub.frontends.trainer.trainer import SFTTrainer
    from training_hub.recipe import Recipe
    from training_hub.types import StepReport, TrainResult

_ERRORS = "training_hub.errors"
_REGISTRY = "training_hub.frontends.registry"
_ENUMS = "training_hub.frontends.trainer.enums"

_HOME_OF = {
    "sft": "training_hub.frontends.functions",
    "osft": "training_hub.frontends.functions",
    "lora_sft": "training_hub.frontends.functions",
    "merge_adapter": "training_hub.frontends.merging",
    "continual": "training_hub.frontends.continual",
    "evaluate": "training_hub.frontends.evaluate",
    "LLMTrainingParams": "training_hub.frontends.autotrain.params",
    "CustomSFTTrainer": "training_hub.frontends.autotrain.trainer",
    "SFTConfig": "training_hub.frontends.trainer.config",
    "SFTTrainer": "training_hub.frontends.trainer.trainer",
    "AutoEasyDeLModelForCausalLM": "training_hub.frontends.trainer.loading",
    "AttentionMechanisms": _ENUMS,
    "EasyDeLBackends": _ENUMS,
    "EasyDeLGradientCheckPointers": _ENUMS,
    "EasyDeLOptimizers": _ENUMS,
    "EasyDeLPlatforms": _ENUMS,
    "EasyDeLSchedulers": _ENUMS,
    "OsftOptimizer": "training_hub.backends.torch_engine.adaptations.osft",
    "create_algorithm": _REGISTRY,
    "AlgorithmRegistry": _REGISTRY,
    "Algorithm": _REGISTRY,
    "Backend": _REGISTRY,
    "SFTAlgorithm": _REGISTRY,
    "InstructLabTrainingSFTBackend": _REGISTRY,
    "OSFTAlgorithm": _REGISTRY,
    "MiniTrainerOSFTBackend": _REGISTRY,
    "LoRASFTAlgorithm": _REGISTRY,
    "UnslothLoRABackend": _REGISTRY,
    "Recipe": "training_hub.recipe",
    "StepReport": "training_hub.types",
    "TrainResult": "training_hub.types",
    "HubError": _ERRORS,
    "RecipeError": _ERRORS,
    "DataError": _ERRORS,
    "BackendError": _ERRORS,
    "CheckpointError": _ERRORS,
    "TrainingError": _ERRORS,
    "DiskError": _ERRORS,
    "LaunchError": _ERRORS,
    "Interrupted": _ERRORS,
}

__all__ = [
    "Algorithm",
    "AlgorithmRegistry",
    "AttentionMechanisms",
    "AutoEasyDeLModelForCausalLM",
    "Backend",
    "BackendError",
    "CheckpointError",
    "CustomSFTTrainer",
    "DataError",
    "DiskError",
    "EasyDeLBackends",
    "EasyDeLGradientCheckPointers",
    "EasyDeLOptimizers",
    "EasyDeLPlatforms",
    "EasyDeLSchedulers",
    "HubError",
    "InstructLabTrainingSFTBackend",
    "Interrupted",
    "LLMTrainingParams",
    "LaunchError",
    "LoRASFTAlgorithm",
    "MiniTrainerOSFTBackend",
    "OSFTAlgorithm",
    "OsftOptimizer",
    "Recipe",
    "RecipeError",
    "SFTAlgorithm",
    "SFTConfig",
    "SFTTrainer",
    "StepReport",
    "TrainResult",
    "TrainingError",
    "UnslothLoRABackend",
    "__version__",
    "continual",
    "create_algorithm",
    "evaluate",
    "lora_sft",
    "merge_adapter",
    "osft",
    "sft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'training_hub' has no attribute '{name}'")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value  # found at once the next time
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
