"""One function per algorithm, with the parameters that users of training_hub know."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from training_hub.frontends.registry import create_algorithm

if TYPE_CHECKING:
    from training_hub.types import StepReport, TrainResult

Metrics = str | Callable[..., float] | Sequence[str | Callable[..., float]]


def sft(
    model_path: str | os.PathLike[str],
    data_path: Any,
    ckpt_output_dir: str | os.PathLike[str],
    backend: str = "instructlab-training",
    num_epochs: float | None = None,
    effective_batch_size: int | None = None,
    learning_rate: float | None = None,
    max_seq_len: int | None = None,
    max_tokens_per_gpu: int | None = None,
    data_output_dir: str | None = None,
    save_samples: int | None = None,
    warmup_steps: int | None = None,
    accelerate_full_state_at_epoch: bool | None = None,
    checkpoint_at_epoch: bool | None = None,
    is_pretraining: bool | None = None,
    block_size: int | None = None,
    document_column_name: str | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    nproc_per_node: int | str | None = None,
    nnodes: int | None = None,
    node_rank: int | None = None,
    rdzv_id: int | str | None = None,
    rdzv_endpoint: str | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    wandb_project: str | None = None,
    wandb_entity: str | None = None,
    wandb_run_name: str | None = None,
    tensorboard_log_dir: str | None = None,
    mlflow_tracking_uri: str | None = None,
    mlflow_experiment_name: str | None = None,
    mlflow_run_name: str | None = None,
    *,
    max_batch_len: int | None = None,
    batch_size: int | None = None,
    max_steps: int | None = None,
    seed: int | None = None,
    random_seed: int | None = None,
    lr_scheduler: str | None = None,
    lr_scheduler_kwargs: Mapping[str, Any] | None = None,
    warmup_ratio: float | None = None,
    max_grad_norm: float | None = None,
    chat_template: str | None = None,
    chat_tmpl_path: str | None = None,
    unmask_messages: bool | None = None,
    use_processed_dataset: bool | None = None,
    validation_data_path: Any = None,
    validation_split: float | None = None,
    validation_frequency: int | None = None,
    validate_at_epoch: bool | None = None,
    generate: bool | int | None = None,
    metrics: Metrics | None = None,
    save_best_val_loss: bool | None = None,
    save_final_checkpoint: bool | None = None,
    keep_last_checkpoint_only: bool | None = None,
    save_dtype: str | None = None,
    trust_remote_code: bool | None = None,
    use_liger: bool | None = None,
    disable_flash_attn: bool | None = None,
    teacher_model: str | os.PathLike[str] | None = None,
    distill_divergence: str | None = None,
    distill_temperature: float | None = None,
    distill_alpha: float | None = None,
    distill_cache: str | None = None,
    distill_prompt: str | None = None,
    distill_max_teacher_length: int | None = None,
    callbacks: Sequence[Callable[[StepReport], None]] | Callable[[StepReport], None] | None = None,
    overrides: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> TrainResult:
    """Fine-tune a model on conversations, instructions or text: supervised fine-tuning of all its weights.

    A parameter that is None is not given, and the default of the backend's contract holds. An unknown parameter, a
    value that is not allowed and settings that contradict each other are a RecipeError (a ValueError) that lists all
    of them, raised before anything is loaded.

    What is trained, and where it goes:
        model_path: model folder in Hugging Face format, or a name on the hub.
        data_path: file, folder, glob or hub name, a list of these, or rows in memory (DataFrame, `datasets` object,
            list of dictionaries). Formats are recognised.
        ckpt_output_dir: folder of the run: recipe, metrics, checkpoints/step-N and the final model in final/.
        backend: "instructlab-training" (the default: that package's parameters and defaults), "torch" (the recipe's
            own defaults), or one that was registered or installed.
    How much:
        num_epochs: passes over the data (1). max_steps: optimizer steps instead.
        effective_batch_size (also batch_size): samples per optimizer step over all devices (3840).
        max_seq_len: longest sample in tokens (4096).
        max_tokens_per_gpu (also max_batch_len): tokens at once on a device (60000); bounds memory, never changes the
            result.
        is_pretraining, block_size, document_column_name: join plain documents and cut blocks of so many tokens.
    Data:
        chat_template (also chat_tmpl_path): a template's name or file; without it the model's own.
        unmask_messages: train every role but system. use_processed_dataset: rows hold input_ids and labels.
        data_output_dir: where processed data is kept.
        validation_data_path or validation_split, validation_frequency (steps), validate_at_epoch: validation.
        generate: let the model answer validation rows (True for 64, or how many); metrics: compare these answers by
            names (exact_match, f1, bleu, ...) and functions of your own, function(answer, reference) -> number.
    Optimizer:
        learning_rate (2e-6), beta1, beta2, eps, weight_decay (AdamW), max_grad_norm.
        lr_scheduler, lr_scheduler_kwargs ({"min_lr": ...}), warmup_steps or warmup_ratio. seed (also random_seed).
    Checkpoints:
        checkpoint_at_epoch (True), save_samples, keep_last_checkpoint_only, save_best_val_loss, save_final_checkpoint,
        save_dtype. accelerate_full_state_at_epoch asks for the same as checkpoint_at_epoch: every checkpoint here
        holds all that a run needs to go on.
    Distillation:
        teacher_model: learn the distribution of this model over the next token. distill_divergence (forward_kl,
            reverse_kl, jensen_shannon), distill_temperature (1), distill_alpha (1): share of the divergence in the
            loss, the rest is cross-entropy. distill_cache (none, top_k, sampled): ask the teacher once, before
            training. distill_prompt: a system message that only the teacher sees. distill_max_teacher_length: in
            tokens.
    Processes, as for torchrun:
        nproc_per_node, nnodes, node_rank, rdzv_id, rdzv_endpoint, master_addr, master_port.
    Watching:
        wandb_project, wandb_entity, wandb_run_name, tensorboard_log_dir, mlflow_tracking_uri, mlflow_experiment_name,
        mlflow_run_name: report there too. callbacks: functions called with each StepReport.
    Other:
        trust_remote_code: run Python code from the model folder. disable_flash_attn: attention sample by sample.
        use_liger: accepted either way; the engine always fuses head and loss.
        overrides: any setting of the recipe by its path, {"data.turns": "unroll"}.
        **kwargs: for a backend of your own, which gets all parameters that are given; others refuse them by name.

    Returns a TrainResult: status, output_dir, model_path, metrics, history, plan, engine, versions.
    """
    given = {**locals()}  # every parameter by its name; nothing else is defined yet
    keywords = {**given.pop("kwargs"), **given}
    return create_algorithm("sft", keywords.pop("backend")).train(**keywords)


def osft(
    model_path: str | os.PathLike[str],
    data_path: Any,
    unfreeze_rank_ratio: float | None = None,
    effective_batch_size: int | None = None,
    max_tokens_per_gpu: int | None = None,
    max_seq_len: int | None = None,
    learning_rate: float | None = None,
    ckpt_output_dir: str | os.PathLike[str] | None = None,
    data_output_dir: str | None = None,
    backend: str = "mini-trainer",
    target_patterns: Sequence[str] | None = None,
    seed: int | None = None,
    use_liger: bool | None = None,
    use_processed_dataset: bool | None = None,
    unmask_messages: bool | None = None,
    is_pretraining: bool | None = None,
    block_size: int | None = None,
    document_column_name: str | None = None,
    lr_scheduler: str | None = None,
    warmup_steps: int | None = None,
    lr_scheduler_kwargs: Mapping[str, Any] | None = None,
    beta1: float | None = None,
    beta2: float | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    checkpoint_at_epoch: bool | None = None,
    save_final_checkpoint: bool | None = None,
    num_epochs: float | None = None,
    nproc_per_node: int | str | None = None,
    nnodes: int | None = None,
    node_rank: int | None = None,
    rdzv_id: int | str | None = None,
    rdzv_endpoint: str | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    wandb_project: str | None = None,
    wandb_entity: str | None = None,
    wandb_run_name: str | None = None,
    tensorboard_log_dir: str | None = None,
    mlflow_tracking_uri: str | None = None,
    mlflow_experiment_name: str | None = None,
    mlflow_run_name: str | None = None,
    trust_remote_code: bool | None = None,
    *,
    batch_size: int | None = None,
    osft_memory_efficient_init: bool | None = None,
    max_steps: int | None = None,
    max_grad_norm: float | None = None,
    chat_template: str | None = None,
    validation_data_path: Any = None,
    validation_split: float | None = None,
    validation_frequency: int | None = None,
    validate_at_epoch: bool | None = None,
    generate: bool | int | None = None,
    metrics: Metrics | None = None,
    save_best_val_loss: bool | None = None,
    save_samples: int | None = None,
    save_dtype: str | None = None,
    callbacks: Sequence[Callable[[StepReport], None]] | Callable[[StepReport], None] | None = None,
    overrides: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> TrainResult:
    """Fine-tune a model while the largest singular directions of its weights stay as they are: orthogonal subspace
    fine-tuning (Nayak et al. 2025, arXiv:2504.07097), for learning new tasks without forgetting old ones.

    A parameter that is None is not given. What is required may also be given by its other name. An unknown parameter, a
    value that is not allowed, a missing one and settings that contradict each other are a RecipeError (a ValueError)
    that lists all of them, raised before anything is loaded.

    Required:
        model_path, data_path, ckpt_output_dir: as in `sft`.
        unfreeze_rank_ratio: share of each matrix's singular directions that may move, from 0 (the matrices are frozen)
            to 1 (they train in full); 0.1 to 0.5 is usual.
        effective_batch_size (also batch_size): samples per optimizer step over all devices.
        max_tokens_per_gpu: tokens at once on a device; bounds memory, never changes the result.
        max_seq_len: longest sample in tokens. learning_rate: at its peak.
    What is protected:
        target_patterns: parts of the names of weights; without it all linear layers inside the blocks, and experts.
            Everything else trains in full; overrides={"osft.others": "freeze"} leaves it as it is.
        osft_memory_efficient_init: accepted either way; weights are always decomposed one at a time.
    Data, optimizer, schedule, checkpoints, processes, watching:
        as in `sft`. beta1, beta2, eps and weight_decay reach the factors as they reach all other weights.
    Other:
        overrides: any setting of the recipe by its path, {"osft.form": "core"}.
        **kwargs: any other parameter of `sft`, or those of a backend of your own.

    Returns a TrainResult; its history has `osft_leak` and `osft_drift` of every step.
    """
    given = {**locals()}  # every parameter by its name; nothing else is defined yet
    keywords = {**given.pop("kwargs"), **given}
    return create_algorithm("osft", keywords.pop("backend")).train(**keywords)


def lora_sft(
    model_path: str | os.PathLike[str],
    data_path: Any,
    ckpt_output_dir: str | os.PathLike[str],
    backend: str = "unsloth",
    lora_r: int | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    target_modules: str | Sequence[str] | None = None,
    num_epochs: float | None = None,
    effective_batch_size: int | None = None,
    micro_batch_size: int | None = None,
    gradient_accumulation_steps: int | None = None,
    learning_rate: float | None = None,
    max_seq_len: int | None = None,
    lr_scheduler: str | None = None,
    warmup_steps: int | None = None,
    sample_packing: bool | None = None,
    flash_attention: bool | None = None,
    bf16: bool | None = None,
    dataset_type: str | None = None,
    field_messages: str | None = None,
    field_instruction: str | None = None,
    field_input: str | None = None,
    field_output: str | None = None,
    eval_data_path: str | None = None,
    eval_steps: int | None = None,
    save_steps: int | None = None,
    save_total_limit: int | None = None,
    logging_steps: int | None = None,
    weight_decay: float | None = None,
    seed: int | None = None,
    nproc_per_node: int | str | None = None,
    nnodes: int | None = None,
    node_rank: int | None = None,
    rdzv_id: int | str | None = None,
    rdzv_endpoint: str | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    wandb_project: str | None = None,
    wandb_entity: str | None = None,
    wandb_run_name: str | None = None,
    tensorboard_log_dir: str | None = None,
    mlflow_tracking_uri: str | None = None,
    mlflow_experiment_name: str | None = None,
    mlflow_run_name: str | None = None,
    enable_model_splitting: bool | None = None,
    *,
    tuner: str | None = None,
    use_rslora: bool | None = None,
    use_dora: bool | None = None,
    modules_to_save: Sequence[str] | None = None,
    adapter_path: str | os.PathLike[str] | None = None,
    merge_adapter: bool | None = None,
    load_in_4bit: bool | None = None,
    load_in_8bit: bool | None = None,
    bnb_4bit_quant_type: str | None = None,
    bnb_4bit_use_double_quant: bool | None = None,
    max_tokens_per_gpu: int | None = None,
    max_steps: int | None = None,
    max_grad_norm: float | None = None,
    chat_template: str | None = None,
    unmask_messages: bool | None = None,
    validation_data_path: Any = None,
    validation_split: float | None = None,
    generate: bool | int | None = None,
    metrics: Metrics | None = None,
    save_best_val_loss: bool | None = None,
    checkpoint_at_epoch: bool | None = None,
    trust_remote_code: bool | None = None,
    callbacks: Sequence[Callable[[StepReport], None]] | Callable[[StepReport], None] | None = None,
    overrides: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> TrainResult:
    """Fine-tune an adapter beside a model's frozen weights: LoRA (Hu et al. 2021, arXiv:2106.09685) and its kin.

    A parameter that is None is not given, and the default of the backend's contract holds. An unknown parameter, a
    value that is not allowed and settings that contradict each other are a RecipeError (a ValueError) that lists all
    of them, raised before anything is loaded. final/ is an adapter folder as PEFT writes it.

    What is trained, and where it goes:
        model_path, data_path, ckpt_output_dir: as in `sft`.
        backend: "unsloth" (the default: the parameters and defaults that training_hub has under this name, run by our
            engine; the words of the assistant are trained, not all of the text) or "torch" (the recipe's own defaults).
        lora_r (16), lora_alpha (32), lora_dropout (0): rank, scale (alpha / r) and dropout of the adapter.
        target_modules: "all-linear" (the default), a list of ends of module names, or a regular expression.
        tuner: "lora" (the default), "rslora", "dora", "pissa", "olora", or another tuner of PEFT by name; use_rslora
            and use_dora ask for two of these. modules_to_save: trained in full and saved with the adapter.
        adapter_path: an adapter to go on with. merge_adapter: also write the merged model, beside the adapter.
        load_in_4bit, load_in_8bit: frozen weights as NF4 (bnb_4bit_quant_type only "nf4", bnb_4bit_use_double_quant
            only True) or as 8-bit numbers.
    How much:
        num_epochs (3) or max_steps. effective_batch_size (2): samples per optimizer step over all devices; or
            micro_batch_size (2) and gradient_accumulation_steps (1), whose product with the number of processes it is.
        max_seq_len (2048). max_tokens_per_gpu: tokens at once on a device; bounds memory, never changes the result.
        sample_packing: lay samples end to end. bf16: True bfloat16, False float32; without it what is fast here.
        flash_attention: False turns the variable-length kernel off.
    Data:
        dataset_type: "chat_template", "alpaca" or "passthrough" (text that was rendered already); without it the rows
            say it. field_messages, field_instruction, field_input, field_output: names of columns.
        eval_data_path (also validation_data_path) or validation_split, eval_steps: validation; generate, metrics: as
            in `sft`.
        chat_template, unmask_messages: as in `sft`.
    Optimizer, schedule, checkpoints, processes, watching:
        learning_rate (2e-4), lr_scheduler ("linear"), warmup_steps (10), weight_decay, max_grad_norm, seed;
        save_steps, save_total_limit, save_best_val_loss, checkpoint_at_epoch, logging_steps; the others as in `sft`.
        enable_model_splitting: only False, since the engine keeps a model on one device.
    Other:
        overrides: any setting of the recipe by its path, {"lora.options": {"layers_to_transform": [0, 1]}}.
        **kwargs: any other parameter of `sft`, or those of a backend of your own.

    Returns a TrainResult; model_path is the adapter's folder.
    """
    given = {**locals()}  # every parameter by its name; nothing else is defined yet
    keywords = {**given.pop("kwargs"), **given}
    return create_algorithm("lora_sft", keywords.pop("backend")).train(**keywords)
