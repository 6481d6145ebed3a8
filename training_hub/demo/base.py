"""Pre-train the demo's base model again: `python -m training_hub.demo.base`.

A Llama of 0.7 million parameters whose tokens are bytes. It reads prose made by `tasks.draw_prose` and never sees a
question or a chat. The pre-training is an ordinary run of this package, with `is_pretraining=True`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

from training_hub.demo.tasks import draw_prose

BASE_FOLDER = Path(__file__).parent / "model"
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTEXT = 256
BLOCK = 192
BLOCKS_PER_STEP = 12
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def byte_tokenizer() -> Any:
    """A tokenizer with one token per byte and three special ones, as transformers saves and loads it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, START, END)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, model_max_length=CONTEXT
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def save_untrained(folder: Path, seed: int) -> None:
    """Write a model with random weights, its tokenizer and its chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prose(path: Path, documents: int, sentences: int, seed: int) -> None:
    """Write `documents` lines of JSON, each a text of `sentences` sentences."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as lines:
        for _ in range(documents):
            text = "".join(draw_prose(rng) + rng.choice(" \n") for _ in range(sentences))
            lines.write(json.dumps({"text": text}) + "\n")


def pretrain(folder: Path, steps: int, seed: int) -> Path:
    """Train a new base model in `folder`; the Hugging Face folder that came out."""
    from training_hub import sft

    save_untrained(folder / "untrained", seed)
    tokens_per_step = BLOCK * BLOCKS_PER_STEP
    # A document has about 1,500 tokens; a few more than needed, so that no sentence is read twice.
    documents = int(steps * tokens_per_step / 1_300) + 1
    write_prose(folder / "prose.jsonl", documents, sentences=40, seed=seed)
    result = sft(
        model_path=str(folder / "untrained"),
        data_path=str(folder / "prose.jsonl"),
        ckpt_output_dir=str(folder / "run"),
        data_output_dir=str(folder / "cache"),
        backend="torch",
        is_pretraining=True,
        block_size=BLOCK,
        max_seq_len=BLOCK,
        effective_batch_size=BLOCKS_PER_STEP,
        max_steps=steps,
        learning_rate=3e-3,
        weight_decay=0.1,
        warmup_ratio=0.03,
        lr_scheduler_kwargs={"min_lr": 6e-5},
        save_dtype="float16",
        seed=seed,
    )
    if result.model_path is None:
        raise SystemExit("The run ended without a final model.")
    return result.model_path


def main(arguments: list[str] | None = None) -> None:
    """Pre-train, then put the model in the place from which the demo loads it."""
    reader = argparse.ArgumentParser(
        prog="python -m training_hub.demo.base", description=(__doc__ or "").split("\n")[0]
    )
    reader.add_argument("--output", default=str(BASE_FOLDER), help="folder to write (default: %(default)s)")
    reader.add_argument("--steps", type=int, default=5000, help="optimizer steps (default: %(default)s)")
    reader.add_argument("--seed", type=int, default=0, help="weights, text and order (default: %(default)s)")
    options = reader.parse_args(arguments)
    output = Path(options.output)
    with tempfile.TemporaryDirectory() as folder:
        model = pretrain(Path(folder), options.steps, options.seed)
        output.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(model / name, output / name)
    print(f"The base model is in {output}")


if __name__ == "__main__":
    main()
