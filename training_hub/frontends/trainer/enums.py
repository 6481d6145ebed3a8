"""The enumerations of EasyDeL, by its names; what cannot be had here is refused where it is used, in words."""

from __future__ import annotations

from enum import StrEnum


class EasyDeLOptimizers(StrEnum):
    """Values of SFTConfig(optimizer=...)."""

    ADAFACTOR = "adafactor"
    ADAMW = "adamw"
    LION = "lion"
    MARS = "mars"
    MUON = "muon"
    QUAD = "quad"
    RMSPROP = "rmsprop"
    SKEW = "skew"


class EasyDeLSchedulers(StrEnum):
    """Values of SFTConfig(scheduler=...)."""

    NONE = "none"
    LINEAR = "linear"
    COSINE = "cosine"


class EasyDeLGradientCheckPointers(StrEnum):
    """What a layer forgets in forward and makes again in backward."""

    NONE = ""
    EVERYTHING_SAVEABLE = "everything_saveable"
    NOTHING_SAVEABLE = "nothing_saveable"
    CHECKPOINT_DOTS = "checkpoint_dots"
    CHECKPOINT_DOTS_WITH_NO_BATCH_DIMS = "checkpoint_dots_with_no_batch_dims"
    DOTS_SAVEABLE = "dots_saveable"
    DOTS_WITH_NO_BATCH_DIMS_SAVEABLE = "dots_with_no_batch_dims_saveable"


class EasyDeLBackends(StrEnum):
    """Kinds of devices."""

    CPU = "cpu"
    GPU = "gpu"
    TPU = "tpu"


class EasyDeLPlatforms(StrEnum):
    """Languages that EasyDeL has kernels in."""

    JAX = "jax"
    PALLAS = "pallas"
    TRITON = "triton"


class AttentionMechanisms(StrEnum):
    """Values of attn_mechanism."""

    AUTO = "auto"
    VANILLA = "vanilla"
    SDPA = "sdpa"
    FLASH_ATTN2 = "flash_attn2"
    CUDA_FLASH_ATTN2 = "cuda_flash_attn2"
    CUDNN = "cudnn"
    BLOCKWISE = "blockwise"
    BLOCKSPARSE = "blocksparse"
    RING = "ring"
