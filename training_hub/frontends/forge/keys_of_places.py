"""The keys that say where a run runs, and what it keeps and tells: processes, comm, checkpoint, metric_logging."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from training_hub.frontends.forge.key import COUNT, COUNT_OR_TEXT, FLAG, LIST, NUMBER, TEXT, Key

PLACE: Mapping[str, Key] = MappingProxyType(
    {
        "processes.procs": Key(
            1,
            "Processes of each host, one a GPU.",
            COUNT_OR_TEXT,
        ),
        "processes.hosts": Key(
            None,
            "Hosts (nodes); null is this one.",
            COUNT,
        ),
        "processes.with_gpus": Key(
            False,
            "true: on GPUs where there are any; false: on the CPU, whatever is there.",
            FLAG,
        ),
        "processes.num_replicas": Key(
            1,
            "Copies of the trainer.",
            COUNT,
            only=(1,),
            reason="a run has one trainer; start another run for another",
        ),
        "processes.mesh_name": Key(
            None,
            "Name of torchforge's mesh of actors.",
            TEXT,
            only=(None,),
            reason="nothing here is found by such a name",
        ),
        "provisioner.launcher": Key(
            None,
            "Who starts processes on other hosts.",
            TEXT,
        ),
        "provisioner.job_name": Key(
            None,
            "Name of the job.",
            TEXT,
            only=(None,),
            reason="this app submits no job; give the name to what does",
        ),
        "provisioner.cpu": Key(
            None,
            "Cores of a host.",
            COUNT,
            only=(None,),
            reason="this app submits no job; give it to what does",
        ),
        "provisioner.memory_mb": Key(
            None,
            "Memory of a host.",
            COUNT,
            only=(None,),
            reason="this app submits no job; give it to what does",
        ),
        "provisioner.gpus_per_node": Key(
            None,
            "GPUs of a host.",
            COUNT,
            only=(None,),
            reason="this app submits no job; processes.procs says how many processes a host has",
        ),
        "comm.init_timeout_seconds": Key(
            300,
            "Wait for all processes at the start.",
            NUMBER,
            only=(300,),
            reason="comm.train_timeout_seconds holds from the first moment",
        ),
        "comm.train_timeout_seconds": Key(
            100,
            "A process that keeps the others waiting for so long ends the run.",
            NUMBER,
            path="comm.timeout_seconds",
        ),
        "comm.trace_buf_size": Key(
            20000,
            "torchtitan's ring of NCCL calls.",
            COUNT,
            only=(0, 20000),
            reason="no calls are traced; a process that hangs writes its stacks to logs/rankN.log in any case. Write 0",
        ),
        "comm.save_traces_folder": Key(
            "comm_traces",
            "Where that ring is written.",
            TEXT,
            only=("comm_traces",),
            reason="no calls are traced",
        ),
        "checkpoint.enable": Key(
            False,
            "Save checkpoints and the final model.",
            FLAG,
        ),
        "checkpoint.folder": Key(
            "checkpoint",
            "Folder of the run: checkpoints/step-N, final/, metrics.jsonl.",
            TEXT,
            path="output",
        ),
        "checkpoint.interval": Key(
            500,
            "Steps between checkpoints.",
            COUNT,
        ),
        "checkpoint.initial_load_path": Key(
            None,
            "Weights to begin with: a folder in Hugging Face format. A checkpoint of this very folder: go on from it.",
            TEXT,
        ),
        "checkpoint.initial_load_in_hf": Key(
            False,
            "Whether these are in Hugging Face format.",
            FLAG,
        ),
        "checkpoint.initial_load_model_only": Key(
            True,
            "Begin with the weights alone.",
            FLAG,
            only=(True,),
            reason="a run goes on with optimizer and data position by itself, when it is started again with the "
            "same checkpoint.folder",
        ),
        "checkpoint.initial_load_in_hf_quantized": Key(
            False,
            "Weights of few bits.",
            FLAG,
            only=(False,),
            reason="such weights cannot be trained; take the folder of the unquantized model",
        ),
        "checkpoint.last_save_in_hf": Key(
            False,
            "Write final/ in Hugging Face format.",
            FLAG,
        ),
        "checkpoint.last_save_model_only": Key(
            True,
            "false: also a checkpoint at the last step, from which a longer run can go on.",
            FLAG,
        ),
        "checkpoint.export_dtype": Key(
            "float32",
            "Format of the weights in final/.",
            TEXT,
            path="model.save_dtype",
        ),
        "checkpoint.async_mode": Key(
            "disabled",
            "disabled, async or async_with_pinned_mem: whether training goes on while a checkpoint is written.",
            TEXT,
            path="checkpoint.async_mode",
        ),
        "checkpoint.keep_latest_k": Key(
            10,
            "Newest checkpoints that stay; 0: all.",
            COUNT,
        ),
        "checkpoint.load_step": Key(
            -1,
            "Step to go on from.",
            COUNT,
            only=(-1,),
            reason="a run goes on from its newest whole checkpoint",
        ),
        "checkpoint.exclude_from_loading": Key(
            [],
            "What is not loaded.",
            LIST,
            only=([],),
            reason="a run that goes on is the same run, so all of it is loaded",
        ),
        "checkpoint.enable_first_step_checkpoint": Key(
            False,
            "Save after the first step.",
            FLAG,
            only=(False,),
            reason="that saving works is proved before the first step (training.preflight)",
        ),
        "checkpoint.create_seed_checkpoint": Key(
            False,
            "Save before the first step and stop.",
            FLAG,
            only=(False,),
            reason="weights are read from the model's own folder",
        ),
        "checkpoint.load_only": Key(
            False,
            "Load and save nothing.",
            FLAG,
            only=(False,),
            reason="write checkpoint.enable: false to save nothing",
        ),
        "activation_checkpoint.mode": Key(
            "selective",
            "none, selective, full or memory_budget; with training.compile none or memory_budget.",
            TEXT,
        ),
        "activation_checkpoint.memory_budget": Key(
            0.5,
            "With mode: memory_budget, what a compiled block may keep, from 0 to 1.",
            NUMBER,
        ),
        "activation_checkpoint.selective_ac_option": Key(
            "op",
            'op: keep what is dear to make again. torchtitan\'s default is "2".',
            TEXT,
            only=("op",),
            reason="selective keeps the results of matrix products and attention in every layer; `2` (every "
            "second layer) is mode: selective or full here",
        ),
        "metric_logging.console.logging_mode": Key(
            "global_reduce",
            "Whose numbers are shown.",
            TEXT,
            only=("global_reduce",),
            reason="numbers are those of all processes together",
        ),
        "metric_logging.wandb.logging_mode": Key(
            None,
            "Report to Weights & Biases.",
            TEXT,
        ),
        "metric_logging.wandb.project": Key(
            None,
            "Project there.",
            TEXT,
        ),
        "metric_logging.wandb.group": Key(
            None,
            "Group there.",
            TEXT,
            only=(None,),
            reason="runs are told apart by project and name (monitoring.wandb_run_name)",
        ),
        "metrics.log_freq": Key(
            1,
            "Steps between log lines; torchforge says each, torchtitan every tenth.",
            COUNT,
            path="monitoring.log_interval",
        ),
        "metrics.enable_tensorboard": Key(
            False,
            "Write TensorBoard files.",
            FLAG,
        ),
        "metrics.save_tb_folder": Key(
            "tb",
            "Where.",
            TEXT,
        ),
        "metrics.enable_wandb": Key(
            False,
            "Report to Weights & Biases.",
            FLAG,
        ),
        "profiling.enable_profiling": Key(
            False,
            "Take steps apart (monitoring.profile).",
            FLAG,
            path="monitoring.profile",
        ),
    }
)
