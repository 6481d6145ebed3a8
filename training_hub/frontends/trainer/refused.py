"""Fields of EasyDeL and TRL that are not here: which values ask for nothing, and what to write for all others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from training_hub.errors import RecipeError
from training_hub.frontends.keyword import Settings
from training_hub.recipe.translate import shown

OFF: tuple[Any, ...] = (None, False)
SECRETS = ("hub_token",)


@dataclass(frozen=True)
class Refused:
    """A field that is not here. off: values that ask for nothing and are taken. why: the rest of the error's line."""

    name: str
    why: str
    off: tuple[Any, ...] = OFF

    def settings(self, value: Any) -> Settings:
        """[] for a value that asks for nothing. Raises RecipeError for all others."""
        if any(value is one or (type(value) is type(one) and value == one) for one in (*self.off, {}, [])):
            return []
        found = "a value" if self.name in SECRETS else shown(value)
        raise RecipeError(f"{self.name}: found {found}; {self.why}")


_PARALLEL = "how a run is laid over devices is said by sharding_axis_dims of the model. Leave it out."
_NEWEST = "started again in the same folder, a run goes on from its newest whole checkpoint. Leave it out."
_GENERATION = (
    "answers are made by evaluation.generate. Write overrides={'evaluation.generate': 64, "
    "'evaluation.max_new_tokens': 128}, and leave fields of this kind out."
)
_QUANTIZED = (
    "weights are quantised where they are frozen, under an adapter. Give peft_config, and "
    "overrides={'model.quantization': 'int4'}."
)
_SPARSE = "weights are neither pruned nor made sparse here. Leave it out."
_OFFLOAD = "rows lie on disk and are mapped into memory as they are needed. Leave it out."
_LOADER = "batches are cut from tokens that lie on disk, in an order that the seed decides. Leave it out."
_DDP = "processes are started by torchrun and sum their gradients once per step. Leave it out."
_DEEPSPEED = "the engine here shards by its own means. Leave it out."
_LOGS = "metrics.jsonl in the output folder has every step. Leave it out."
_PRECISION = "numbers are multiplied in the format that bf16 says. Leave it out."
_TELL = "metrics are those of evaluation.metrics. Leave it out."
_HISTOGRAMS = "weights are not drawn as histograms; metrics.jsonl has the norm of gradients. Leave it out."

_OF_EASYDEL: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("aux_loss_enabled", "the loss of a router is not added. Leave it out.", OFF),
    ("custom_scheduler", "schedules are named. Write scheduler=EasyDeLSchedulers.COSINE or lr_scheduler_type.", OFF),
    ("grain_shard_index grain_shard_count", _LOADER, OFF),
    ("init_tx process_zero_is_admin save_optimizer_state save_tpu_preemption_checkpoints log_grad_norms report_metrics "
     "is_fine_tuning low_mem_usage", "it is always done here. Leave it out.", (None, True)),
    ("jax_distributed_config", "processes are laid out by processes.nodes and rdzv_endpoint, or by torchrun. Write "
     "overrides={'processes.nodes': 2, ...}.", OFF),
    ("log_all_workers remove_ckpt_after_load performance_mode", "it is never done here. Leave it out.", OFF),
    ("max_evaluation_steps per_epoch_evaluation_steps", "the whole of eval_dataset is measured. Hand over fewer rows.",
     OFF),
    ("per_epoch_training_steps", "an epoch is all rows. Write max_training_steps, or "
     "overrides={'data.max_rows': ...}.", OFF),
    ("quantization_mode quantization_group_size quantization_bits quantization_block tensor_straight_through "
     "straight_through_emulator", _QUANTIZED, OFF),
    ("metrics_to_show_in_rich_pbar watchers", _LOGS, OFF),
    ("model_parameters state_apply_fn_kwarguments_to_model", "a model is handed over as a whole: "
     "SFTTrainer(model=...). Leave it out.", OFF),
    ("generation_top_p generation_top_k generation_presence_penalty generation_frequency_penalty "
     "generation_repetition_penalty generation_temperature generation_do_sample generation_num_return_sequences "
     "generation_max_new_tokens generation_interval generation_prompts generation_use_train_prompts "
     "generation_extra_kwargs generation_config_overrides generation_seed generation_preview_print "
     "log_training_generations_to_wandb", _GENERATION, OFF),
    ("generation_shard_inputs generation_log_to_wandb use_esurge_generation esurge_use_tqdm esurge_silent_mode",
     _GENERATION, (None, False, True)),
    ("generation_num_prompts", _GENERATION, (None, 1)),
    ("generation_dataset_prompt_field", _GENERATION, (None, "prompt")),
    ("esurge_hbm_utilization", _GENERATION, (None, 0.45)),
    ("esurge_page_size", _GENERATION, (None, 32)),
    ("esurge_max_num_seqs esurge_max_num_seq_buckets esurge_min_input_pad esurge_runner_verbose "
     "esurge_max_num_batched_tokens esurge_enable_prefix_caching esurge_data_parallelism_axis", _GENERATION, OFF),
    ("benchmark_interval benchmarks", "scores are measured by evaluation.metrics on eval_dataset. Leave it out.", OFF),
    ("offload_dataset", _OFFLOAD, OFF),
    ("offload_device_type", _OFFLOAD, (None, "cpu")),
    ("offload_device_index", _OFFLOAD, (None, 0)),
    ("pruning_module sparsify_module", _SPARSE, OFF),
    ("sparse_module_type", _SPARSE, (None, "bcoo")),
    ("merge_lora_before_tpu_preemption_save", "checkpoints hold the adapter. Leave it out.", OFF),
    ("step_partition_spec", _PARALLEL, OFF),
    ("step_start_point force_step_start_point", _NEWEST, OFF),
    ("training_time_limit", "a run that is sent SIGTERM saves and goes on when it is started again. Start it with "
     "`timeout --signal=TERM 2h python ...`, and leave it out.", OFF),
    ("tx_mu_dtype", "moments are float32, or bytes: overrides={'optimizer.state': '8bit'}.", OFF),
    ("weight_distribution_pattern", _HISTOGRAMS, (None, ".*")),
    ("weight_distribution_log_steps", _HISTOGRAMS, (None, 500)),
    ("trainer_prefix", "a run at Weights & Biases is named by wandb_name. Leave it out.", (None, "SFT")),
)  # fmt: skip

_OF_TRL: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("router_aux_loss_coef", "the loss of a router is not added. Leave it out.", (None, 0.0)),
    ("eos_token pad_token", "tokens are the tokenizer's. Set them there and hand it over as processing_class.", OFF),
    ("activation_offloading", "activations are forgotten and made again. Write gradient_checkpointing=True.", OFF),
    ("activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing_kwargs",
     "what is forgotten is a policy: gradient_checkpointing=True, or 'checkpoint_dots'.", OFF),
    ("optim_args optim_target_modules", "an optimizer's settings are adam_beta1, adam_beta2, adam_epsilon and "
     "overrides={'optimizer.galore_rank': ...}.", OFF),
    ("bf16_full_eval fp16_full_eval tf32 half_precision_backend", _PRECISION, OFF),
    ("torch_compile torch_compile_backend torch_compile_mode", "layers run on fused kernels of the engine. Leave it "
     "out.", OFF),
    ("liger_kernel_config", "head and loss are always fused. Leave it out.", OFF),
    ("use_cache", "no cache of keys is used in training. Leave it out.", OFF),
    ("torch_empty_cache_steps", "memory is planned before the first step. Leave it out.", OFF),
    ("auto_find_batch_size", "what goes through the device at once is always planned to fit. Leave it out.",
     (None, False, True)),
    ("average_tokens_across_devices", "the loss is always a sum over all devices, divided once. Leave it out.",
     (None, True)),
    ("logging_strategy", "write logging_steps.", (None, "steps")),
    ("logging_first_step log_on_each_node include_num_input_tokens_seen log_level log_level_replica "
     "logging_nan_inf_filter", _LOGS, (None, False, True, "no", "passive", "warning")),
    ("project", "write overrides={'monitoring.wandb_project': ...}.", (None, "huggingface")),
    ("trackio_space_id trackio_bucket_id trackio_static_space_id", "Trackio is not here. Write report_to='wandb'.",
     OFF),
    ("eval_delay", "write eval_steps.", (None, 0)),
    ("prediction_loss_only", "logits are never kept. Leave it out.", (None, False, True)),
    ("eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics",
     _TELL, (None, False, True)),
    ("save_only_model", "every checkpoint holds all that a run needs to go on. Leave it out.", OFF),
    ("save_on_each_node", "the first process writes. Leave it out.", OFF),
    ("enable_jit_checkpoint", "a run that gets a signal always saves. Leave it out.", (None, False, True)),
    ("hub_token", "a secret, which is not taken here, so that it is in no file. Give it in the environment variable "
     "HF_TOKEN.", OFF),
    ("hub_strategy", "the final model is sent, once. Leave it out.", (None, "every_save", "end")),
    ("hub_always_push", "the final model is sent, once. Leave it out.", OFF),
    ("hub_revision", "a model is sent to the main branch. Leave it out.", OFF),
    ("ignore_data_skip restore_callback_states_from_checkpoint", _NEWEST, OFF),
    ("full_determinism", "the same seed gives the same numbers anyway. Leave it out.", (None, False, True)),
    ("data_seed", "there is one seed. Write seed.", OFF),
    ("accelerator_config parallelism_config", _PARALLEL, OFF),
    ("dataloader_drop_last", "no row is dropped. Leave it out.", OFF),
    ("dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order",
     _LOADER, (None, False, True)),
    ("label_names", "labels are made from what is trained. Leave it out.", OFF),
    ("length_column_name", _LOADER, (None, "length")),
    ("ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend", _DDP, OFF),
    ("ddp_timeout", "write overrides={'comm.timeout_seconds': ...}.", (None, 1800)),
    ("fsdp fsdp_config deepspeed", _DEEPSPEED, (None, "")),
    ("debug", "leave it out.", (None, "")),
    ("skip_memory_metrics", "each step's report has the peak of memory. Leave it out.", (None, False, True)),
    ("do_predict", "answers are made by `training-hub eval` or evaluate(). Leave it out.", OFF),
    ("resume_from_checkpoint", _NEWEST, (None, True)),
    ("local_rank", "a process learns its rank from torchrun's environment. Leave it out.", (None, -1)),
)  # fmt: skip


def _refusals(groups: tuple[tuple[str, str, tuple[Any, ...]], ...]) -> Iterator[tuple[str, Refused]]:
    for names, why, off in groups:
        for name in names.split():
            yield name, Refused(name, why, off)


REFUSED: Mapping[str, Refused] = MappingProxyType(dict([*_refusals(_OF_EASYDEL), *_refusals(_OF_TRL)]))
