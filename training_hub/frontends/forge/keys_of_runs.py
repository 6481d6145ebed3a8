"""The keys that say what is learned from what: model, optimizer, lr_scheduler, training, validation, eval."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from training_hub.frontends.forge.key import COUNT, FLAG, LIST, NUMBER, TEXT, Key

RUN: Mapping[str, Key] = MappingProxyType(
    {
        "model.name": Key(
            "llama3",
            "Family: llama3 or qwen3. Compared with the model that is there.",
            TEXT,
        ),
        "model.flavor": Key(
            "debugmodel",
            "Size: 8B, 70B, 32B, ... Compared with the model that is there; debugmodel is any size. "
            "Without a path, the model of this name on the hub.",
            TEXT,
        ),
        "model.hf_assets_path": Key(
            None,
            "Folder of the model in Hugging Face format, or hf://NAME on the hub. Its tokenizer is taken,"
            " and its weights where checkpoint.initial_load_path names none.",
            TEXT,
        ),
        "model.converters": Key(
            [],
            "[float8] multiplies linear layers in 8 bits (training.fp8).",
            LIST,
        ),
        "optimizer.name": Key(
            "AdamW",
            "Any of the recipe's optimizers; torchtitan has AdamW and Adam.",
            TEXT,
            path="optimizer.name",
        ),
        "optimizer.lr": Key(
            0.0008,
            "Learning rate at its peak. torchtitan's default is for training from nothing.",
            NUMBER,
            path="optimizer.lr",
        ),
        "optimizer.beta1": Key(
            0.9,
            "Decay of the mean of gradients.",
            NUMBER,
        ),
        "optimizer.beta2": Key(
            0.95,
            "Decay of the mean of squared gradients.",
            NUMBER,
        ),
        "optimizer.eps": Key(
            1e-08,
            "Added to the denominator.",
            NUMBER,
        ),
        "optimizer.weight_decay": Key(
            0.1,
            "Decay of matrices. torchtitan's default is for training from nothing.",
            NUMBER,
            path="optimizer.weight_decay",
        ),
        "optimizer.implementation": Key(
            "fused",
            "for-loop, foreach or fused.",
            TEXT,
            only=("fused",),
            reason="the engine takes the fastest, and the result is the same",
        ),
        "optimizer.early_step_in_backward": Key(
            False,
            "Step during the backward pass.",
            FLAG,
            only=(False,),
            reason="gradients of a step are summed and clipped before it",
        ),
        "lr_scheduler.warmup_steps": Key(
            200,
            "Steps in which the rate rises.",
            COUNT,
            path="lr_scheduler.warmup_steps",
        ),
        "lr_scheduler.decay_type": Key(
            "linear",
            "linear, sqrt or cosine.",
            TEXT,
        ),
        "lr_scheduler.decay_ratio": Key(
            None,
            "Share of the run in which the rate falls; null: all after warm-up.",
            NUMBER,
        ),
        "lr_scheduler.min_lr_factor": Key(
            0.0,
            "Where the rate ends, as a share of its peak.",
            NUMBER,
        ),
        "training.local_batch_size": Key(
            8,
            "Samples of each process in a step; with training.seq_len it bounds the tokens that go "
            "through a device at once.",
            COUNT,
        ),
        "training.global_batch_size": Key(
            -1,
            "Samples of a step over all processes; -1: local_batch_size x processes that see different data.",
            COUNT,
        ),
        "training.seq_len": Key(
            2048,
            "Longest sample, or the length of blocks of text (c4), in tokens.",
            COUNT,
            path="training.max_seq_len",
        ),
        "training.steps": Key(
            10000,
            "Optimizer steps.",
            COUNT,
            path="training.steps",
        ),
        "training.max_norm": Key(
            1.0,
            "Gradients are scaled down to this norm.",
            NUMBER,
            path="training.max_norm",
        ),
        "training.dtype": Key(
            "float32",
            "Format of the weights that the optimizer moves.",
            TEXT,
            only=("float32",),
            reason="the optimizer always moves float32 weights (optimizer.state: split keeps them in fewer bytes)",
        ),
        "training.mixed_precision_param": Key(
            None,
            "Format of forward and backward: bfloat16 or float32. Not given: bfloat16 where the hardware "
            "multiplies it fast.",
            TEXT,
        ),
        "training.mixed_precision_reduce": Key(
            "float32",
            "Format in which gradients are summed.",
            TEXT,
            only=("float32",),
            reason="gradients are summed in float32",
            follows="parallelism.mixed_precision_reduce",
        ),
        "training.compile": Key(
            False,
            "Compile the blocks. torchtitan 0.2 reads compile.enable instead.",
            FLAG,
            path="training.compile",
        ),
        "compile.enable": Key(
            False,
            "The same.",
            FLAG,
            path="training.compile",
        ),
        "training.enable_cpu_offload": Key(
            False,
            "Keep sharded weights in the host's memory.",
            FLAG,
            only=(False,),
            reason="weights stay on the device",
            follows="parallelism.enable_cpu_offload",
        ),
        "training.gc_freq": Key(
            50,
            "Steps between collections of Python's garbage.",
            COUNT,
            only=(50,),
            reason="the engine makes none that would have to be collected in step with the others",
        ),
        "training.seed": Key(
            None,
            "Start of every random choice; null: 42.",
            COUNT,
        ),
        "debug.seed": Key(
            None,
            "The same, as torchtitan 0.2 writes it.",
            COUNT,
        ),
        "training.deterministic": Key(
            False,
            "Only operations that give the same bits each time.",
            FLAG,
            only=(False,),
            reason="on a CPU every run has them; on a GPU attention kernels do not",
        ),
        "debug.deterministic": Key(
            False,
            "The same, as torchtitan 0.2 writes it.",
            FLAG,
            only=(False,),
            reason="on a CPU every run has them; on a GPU attention kernels do not",
        ),
        "training.dataset": Key(
            "c4_test",
            "c4, c4_test, c4_validation, or a file, folder, glob or hub name of your own.",
            TEXT,
        ),
        "training.dataset_path": Key(
            None,
            "Where the rows of that lie.",
            TEXT,
        ),
        "training.datasets": Key(
            None,
            "Instead: a list of {path, name, split, data_files, weight}.",
            LIST,
        ),
        "validation.enable": Key(
            False,
            "Measure the loss on validation.dataset.",
            FLAG,
        ),
        "validation.dataset": Key(
            "c4_validation",
            "What training.dataset takes.",
            TEXT,
        ),
        "validation.dataset_path": Key(
            None,
            "Where the rows of that lie.",
            TEXT,
        ),
        "validation.local_batch_size": Key(
            8,
            "With validation.steps: samples of each process in a validation step.",
            COUNT,
        ),
        "validation.seq_len": Key(
            None,
            "Longest validation sample.",
            COUNT,
        ),
        "validation.freq": Key(
            10,
            "Steps between validations.",
            COUNT,
        ),
        "validation.steps": Key(
            -1,
            "Validation steps; -1: all rows.",
            COUNT,
        ),
        "eval.eval_every_n_steps": Key(
            None,
            "Steps between validations on eval.datasets.",
            COUNT,
        ),
        "eval.max_eval_steps": Key(
            None,
            "Batches of training.local_batch_size samples of each process; null: all rows.",
            COUNT,
        ),
        "eval.datasets": Key(
            None,
            "A list of {path, name, split, data_files}, each a validation set.",
            LIST,
        ),
    }
)
