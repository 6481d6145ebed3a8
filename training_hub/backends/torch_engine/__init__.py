"""The engine on torch. Importing it loads transformers' models, without what packages beside them say when loaded."""

from training_hub.backends.torch_engine.loading.quiet import quiet

with quiet():
    import transformers.modeling_utils  # noqa: F401  # imports torchao where there is one, which warns of GPU kernels
