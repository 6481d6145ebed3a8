"""The sections of a recipe: what one run is, as plain frozen data.

A field's docstring is its documentation everywhere: command-line help, YAML reference, JSON schema and the
docstrings of the Python functions are made from it. A field is here only if it changes what happens.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _not_a_boolean(value: Any) -> Any:
    # YAML's `yes` and Python's True pass for 1 in a number field; a count of True is always a mistake.
    if isinstance(value, bool):
        raise ValueError("a number is wanted, not true or false")
    return value


def _a_number(value: Any) -> Any:
    # Text that happens to read as a number ("1e-5") would pass, and hides a mistake in the file or the program.
    if isinstance(value, str):
        raise ValueError("a number is wanted, not text")
    return _not_a_boolean(value)


Count = Annotated[int, BeforeValidator(_a_number), Field(ge=1)]
Index = Annotated[int, BeforeValidator(_a_number), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_a_number), Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, BeforeValidator(_a_number), Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, BeforeValidator(_a_number), Field(ge=0, le=1, allow_inf_nan=False)]
Decay = Annotated[float, BeforeValidator(_a_number), Field(ge=0, lt=1, allow_inf_nan=False)]


class Section(BaseModel):
    """A frozen group of settings; an unknown key is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=False,
        protected_namespaces=(),
        hide_input_in_errors=True,  # it may be a password
    )


class Model(Section):
    """The model that is trained and its tokenizer."""

    path: str
    """Folder in Hugging Face format, or a name on the hub."""

    tokenizer: str | None = None
    """Folder or hub name of the tokenizer, where it is not beside the model."""

    revision: str | None = None
    """Branch, tag or commit, for a model on the hub."""

    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Number format of forward and backward. auto: bfloat16 where the hardware multiplies it fast, else float32.
    With bfloat16 the optimizer keeps float32 master weights, which begin from the numbers of the model's files."""

    attention: Literal["auto", "documents", "varlen"] = "auto"
    """How attention keeps packed samples apart. documents: one call per sample (any device). varlen: torch's
    variable-length kernel (CUDA). auto: the fastest that passes a check against the plain model."""

    save_dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    """Number format of the final model. auto: the format the model came in, of most weights where they differ; those
    that have not moved keep their own, and an adapter's numbers are in float32."""

    quantization: Literal["none", "int8", "int4"] = "none"
    """Number format of the frozen weights beside which adapters train. int8: by torchao, a scale for each row. int4:
    NF4 with quantised scales, by bitsandbytes. Head and embeddings stay as they are."""

    trust_remote_code: bool = False
    """Run Python code that lies in the model folder."""


class DataSource(Section):
    """One of several sources that are mixed."""

    path: str
    """File, folder, glob or hub name."""

    weight: Positive = 1.0
    """How often each row is seen per epoch: 0.5 takes another half each epoch, 2 shows every row twice."""

    split: str | None = None
    """Split of a hub data set; data.split where not given."""

    format: str | None = None
    """Row format of this source; data.format where not given."""


class Data(Section):
    """The rows, and how they become tokens."""

    path: str | list[str | DataSource] | None = None
    """File (jsonl, json, csv, parquet; plain, gzip or zstd), folder, glob, hub name, or a list of these, each
    optionally as {path, weight, split, format}."""

    split: str = "train"
    """Split of a hub data set."""

    format: str = "auto"
    """Row format: messages, sharegpt, instruction, prompt_completion, text, tokens; auto recognises it by the keys."""

    columns: dict[str, str] = {}
    """Names of your columns, from ours: {messages: chat, prompt: question}."""

    roles: dict[str, str] = {}
    """Names of your roles, to ours: {bot: assistant, human: user}."""

    chat_template: str | None = None
    """chatml, zephyr, llama, alpaca, vicuna, mistral, or a Jinja file. Without it the model's own."""

    template_arguments: dict[str, Any] = {}
    """Extra variables for the chat template, as in serving: {enable_thinking: false}."""

    unmask: bool = False
    """Train every role but system, not only the assistant. A row's own `unmask` key says it for one row."""

    end_token: bool = True
    """Close plain text (text, prompt and completion) with the end-of-sequence token, trained like the text before it.
    In conversations the chat template says what closes a turn."""

    start_token: bool = True
    """Open plain text with what the tokenizer puts in front of a text by itself, such as a beginning-of-sequence token,
    which is not trained. In conversations the chat template says how one begins."""

    turns: Literal["all", "last", "unroll"] = "all"
    """Which assistant turns are trained. unroll makes one sample per turn, in exactly the bytes serving would show."""

    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to a row longer than training.max_seq_len: refuse the run, leave the row out, cut its end, or
    cut it into several. Always counted and reported."""

    pretraining: bool = False
    """Join all rows as documents and cut blocks of block_size tokens; every token is trained."""

    block_size: Count | None = None
    """Tokens per block with pretraining; training.max_seq_len where not given."""

    on_bad_row: Literal["error", "skip"] = "error"
    """What happens to a row that cannot be read or trained on: refuse the run listing all of them, or leave them out,
    counted, and listed in rejects.jsonl of the run folder. Rows that are only too long follow data.overlong."""

    max_bad_share: Share = 0.05
    """With on_bad_row: skip, the share of rows that may be left out; more refuse the run."""

    max_row_bytes: Count = 64 * 2**20
    """Longest row as it stands in a file, unpacked; a longer one is never held in memory and is a bad row."""

    packing: bool = True
    """Lay several samples end to end in one row, kept apart. Changes speed, never the result."""

    validation_packing: bool | None = None
    """The same for validation rows. Default: as data.packing."""

    shuffle: bool = True
    """Draw the rows in an order made from the seed, another one each epoch. Off: the order of the file."""

    deduplicate: bool = False
    """Train exact duplicates once. Off: they are counted and reported."""

    validation: str | list[str] | None = None
    """File, folder, glob or hub name of validation rows, or a list of these, each a set whose loss is told
    apart, too."""

    validation_fraction: Decay = 0.0
    """Share of the rows set aside for validation where `validation` is not given; duplicates stay together."""

    max_rows: Count | None = None
    """Use only this many rows, the first ones."""

    streaming: bool = False
    """Read rows in their order and only as far as training.steps needs, a hub data set as a stream that is never
    downloaded whole. What was read is then shuffled and kept as always."""

    validation_samples: Count | None = None
    """Use only this many validation samples, the first ones, and read no further. With pretraining: blocks."""

    workers: Index | None = None
    """Processes that render and tokenise; 0 works in this one. Default: one per core for large files."""

    chunk_rows: Count = 256
    """Rows that are rendered and tokenised at once, at most. Bounds memory, never changes the result."""

    chunk_bytes: Count = 2**20
    """Bytes of rows that are rendered and tokenised at once; a chunk ends with the row that reaches them. Of rows in
    memory their characters count. Bounds memory, never changes the result."""

    cache: bool = True
    """Keep tokenised data on disk, found again by the hash of everything it was made from."""

    cache_dir: str | None = None
    """Where tokenised data is kept. Default: training_hub in the user's cache folder."""

    cache_size: Positive = 20
    """Gigabytes (of 10^9 bytes) that kept tokenised data may take. What was not used for longest goes first, never what
    a running process uses."""


class Training(Section):
    """How much is learned from, and in what steps."""

    epochs: Positive | None = None
    """Passes over the data; a fraction is allowed. Default 1, unless steps are given."""

    steps: Count | None = None
    """Optimizer steps, instead of epochs."""

    global_batch_size: Count = 32
    """Samples per optimizer step, over all processes."""

    max_seq_len: Count = 4096
    """Longest sample, in tokens; data.overlong says what happens to longer ones."""

    max_tokens_per_gpu: Count | None = None
    """Tokens that go through a device at once. Bounds memory and never changes the result. Default: the larger of
    8192 and max_seq_len."""

    activation_checkpointing: Literal["auto", "none", "selective", "full", "offload", "memory_budget"] = "auto"
    """What layers forget in forward and make again in backward; changes memory and time, never the result.
    full: all but their input. selective: not the results of matrix products and of torch's attention. offload: as full,
    and the inputs wait in the host's memory, beside a GPU. memory_budget: what the compiler finds cheapest, within
    activation_memory_budget. auto: as little as the device's free memory allows, by the plan's estimate, of none,
    selective and full (with training.compile or cuda_graphs: none)."""

    activation_memory_budget: Share = 0.5
    """With activation_checkpointing: memory_budget, what a compiled block may keep for its backward pass, from 0 (its
    inputs) to 1 (what it would keep by itself)."""

    compile: bool = False
    """Compile each decoder block with torch.compile, which takes up to minutes at the first step. For GPUs: fewer and
    larger kernels. The result differs by rounding."""

    cuda_graphs: bool = False
    """Record forward and backward of a pack for each of a few sizes, to which packs are filled up, and replay them. For
    models so small that a GPU waits for its host, of which one process trains all or LoRA's weights. Needs the varlen
    attention of a CUDA device. The result differs by rounding; activations may take twice the memory."""

    fp8: bool = False
    """Multiply the matrices of linear layers in 8-bit floating point, forward and for the gradient of their input; the
    gradient of the weights, head and attention stay in bfloat16. Faster on wide models; needs CUDA, capability 8.9."""

    max_norm: NotNegative = 1.0
    """Gradients are scaled down to this norm over all weights; 0 turns clipping off."""

    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What a NaN or infinite loss or gradient does: stop the run naming the rows, or leave the step out."""

    max_skipped: Count = 10
    """With on_nonfinite: skip, so many steps left out in a row stop the run all the same."""

    preflight: bool = True
    """Before the first step, prove on this model and these rows what training relies on: masks, stop token, packing,
    accumulation, loss, update, saving. A proof that fails stops the run."""


class Optimizer(Section):
    """The update rule: from torch.optim, or from a package that is installed for it."""

    name: Literal[
        "AdamW", "Adam", "SGD", "Adafactor", "NAdam", "RAdam", "Adagrad", "RMSprop",
        "Lion", "Muon", "AdamWScheduleFree", "GaLoreAdamW", "AdamW8bit", "Lion8bit",
        "PagedAdamW", "PagedAdamW8bit", "PagedLion", "PagedLion8bit",
    ] = "AdamW"  # fmt: skip
    """Class in torch.optim, lion-pytorch (Lion), schedulefree, galore-torch or bitsandbytes (8bit, Paged). The state of
    Paged ones may leave a GPU for the host's memory, where on a CPU it lies anyway: the same steps. Muon moves the
    matrices inside the blocks, AdamW beside it embeddings, head, norms and biases, at one learning rate.
    AdamWScheduleFree averages its steps in place of a falling rate: it needs lr_scheduler.name: constant."""

    lr: Positive = 1e-5
    """Learning rate at its peak."""

    beta1: Decay = 0.9
    """Decay of the mean of gradients (Adam family, Lion)."""

    beta2: Decay = 0.95
    """Decay of the mean of squared gradients (Adam family); in Lion, of the mean of gradients that is kept."""

    eps: Positive = 1e-8
    """Added to the denominator (Adam family, Adagrad, RMSprop)."""

    weight_decay: NotNegative = 0.0
    """Decay of weights per step, times the learning rate. Applies to matrices, not to norms and biases."""

    momentum: Decay | None = None
    """Momentum. Default: 0 for SGD and RMSprop, 0.95 for Muon."""

    galore_rank: Count = 128
    """Rank in which GaLoreAdamW keeps the moments of each matrix inside the blocks."""

    galore_interval: Count = 200
    """Steps after which GaLoreAdamW finds new directions for a matrix, by a singular value decomposition."""

    galore_scale: Positive = 0.25
    """What GaLoreAdamW multiplies the updates of projected matrices by."""

    state: Literal["full", "split", "8bit"] = "full"
    """What AdamW keeps of each bfloat16 weight beside it. full: a float32 master and two float32 moments, 12 bytes.
    split: 16 bits that make the weight a float32 one, and the moments, 10 bytes; the same steps. 8bit: the moments in
    one byte each, 4 bytes; nearly the same steps. Float32 weights, and those in slices (fully sharded), need no
    master: 8, 8 and 2 bytes."""


class LRScheduler(Section):
    """The learning rate over the run."""

    name: Literal["cosine", "linear", "constant", "inverse_sqrt", "wsd"] = "cosine"
    """Shape after warm-up. wsd: warm-up, stable, decay."""

    warmup_steps: Index | None = None
    """Steps in which the rate rises from 0 to its peak."""

    warmup_ratio: Share | None = None
    """The same as a share of all steps, instead of warmup_steps."""

    min_lr: NotNegative = 0.0
    """Rate at which cosine, linear and wsd end."""

    decay_ratio: Share = 0.1
    """Share of all steps in which wsd falls."""


class Checkpoint(Section):
    """What is saved during the run, and how it goes on after a stop."""

    interval: Count | None = None
    """Save every so many optimizer steps."""

    save_samples: Index = 0
    """Save each time another so many samples have been trained; 0: off."""

    at_epoch: bool = False
    """Save at the end of each epoch."""

    minutes: Positive | None = 15
    """Save at the first step boundary after so many minutes without a save; null: off."""

    keep_last: Count | None = 3
    """How many of the newest checkpoints stay on disk; null keeps all."""

    keep_best: bool = False
    """Also keep the checkpoint that is best by evaluation.best_metric, and make it the final model."""

    final: bool = True
    """Write the final model as a Hugging Face folder."""

    max_shard_size: str = "50GB"
    """Largest file of weights in the final model (and in the merged one of lora.merge): a number with KB, MB, GB or TB,
    which count by thousands. A larger model lies in model-00001-of-0000N.safetensors with an index beside them."""

    async_mode: Literal["disabled", "async", "async_with_pinned_mem"] = "disabled"
    """disabled: training stands still until a checkpoint is on disk. async: until its numbers are copied into the
    host's memory, from which they are written while training goes on. async_with_pinned_mem: the copies have memory
    that is kept between saves; beside a GPU it is page-locked, and the next step begins before all is copied."""

    resume: Literal["auto", "restart", "never"] = "auto"
    """auto: go on with an unfinished run of the same recipe in the output folder, refuse a different one.
    restart: move what is there aside and begin anew. never: refuse a folder that holds a run."""


class Monitoring(Section):
    """Who hears of each step."""

    console: Literal["auto", "rich", "plain", "titan", "off"] = "auto"
    """Progress in the terminal. auto: a live line on a terminal, plain lines elsewhere. titan: lines as torchforge
    writes them."""

    log_interval: Count = 1
    """Report every so many steps; metrics.jsonl always has every step."""

    profile: bool = False
    """Take up to three steps after the second apart: seconds of matrix products, attention, elementwise work, loss
    head, optimizer and waiting for data, shown at the end and written to `profile.json`. Of steps with more than two
    packs fewer are taken, since what is noted of them has to be read. Slows those steps."""

    tensorboard: bool | str = False
    """Write TensorBoard files to `tensorboard` in the output folder, or to this folder."""

    wandb: bool = False
    """Report to Weights & Biases."""

    wandb_project: str | None = None
    """Project at Weights & Biases."""

    wandb_entity: str | None = None
    """Team or user at Weights & Biases."""

    wandb_run_name: str | None = None
    """Name of the run at Weights & Biases."""

    mlflow: bool = False
    """Report to MLflow."""

    mlflow_tracking_uri: str | None = None
    """Address of the MLflow server or database. Default: the database `mlflow.db` in the output folder."""

    mlflow_experiment_name: str | None = None
    """Experiment at MLflow."""

    mlflow_run_name: str | None = None
    """Name of the run at MLflow."""


class Processes(Section):
    """How many processes train, and where they meet."""

    procs: Annotated[int | Literal["auto", "gpu"], BeforeValidator(_not_a_boolean)] = 1
    """Processes on this node; auto or gpu: one per GPU."""

    nodes: Count = 1
    """Nodes."""

    node_rank: Index = 0
    """This node's number, from 0."""

    rdzv_id: str | int = 0
    """Name that all nodes of one run share."""

    rdzv_endpoint: str = ""
    """host:port of the first node; empty on a single node."""

    master_addr: str | None = None
    """Host of the first node, instead of rdzv_endpoint."""

    master_port: Index | None = None
    """Port of the first node, with master_addr."""
