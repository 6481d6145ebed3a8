"""Pre-train a larger base for benchmarks/continual.py: 3.3 million parameters, 98 % of them matrices in its blocks.

    python benchmarks/continual_base.py --output build/continual-base    # or: make continual-base

The tokenizer, the prose and the run are those of the demo's base (training_hub/demo/base.py), so that the tasks of
`benchmarks/continual.py base` are as strange to it as they are to that one. What comes out is not committed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from training_hub.demo.base import CONTEXT, byte_tokenizer, write_prose

WIDTH = 256
LAYERS = 4
BLOCK = 192
BLOCKS_PER_STEP = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/continual-base"))
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of 2,304 tokens")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"The base is in {pretrain(arguments.output, arguments.steps, arguments.seed)}")


def pretrain(folder: Path, steps: int, seed: int) -> Path:
    """The Hugging Face folder of the base; a run that was broken off goes on, a finished one is returned."""
    from training_hub.launch import run
    from training_hub.recipe import Recipe

    if not (folder / "untrained").exists():
        folder.mkdir(parents=True, exist_ok=True)
        documents = int(steps * BLOCK * BLOCKS_PER_STEP / 1300) + 1  # a document has about 1,500 tokens
        write_prose(folder / "prose.jsonl", documents, sentences=40, seed=seed)
        write_prose(folder / "held-out.jsonl", 10, sentences=40, seed=seed + 1)
        save_untrained(folder / "untrained", seed)
    recipe = Recipe.model_validate(
        {
            "output": str(folder / "run"),
            "seed": seed,
            "model": {"path": str(folder / "untrained"), "save_dtype": "float32"},
            "data": {
                "path": str(folder / "prose.jsonl"),
                "validation": str(folder / "held-out.jsonl"),
                "pretraining": True,
                "block_size": BLOCK,
                "cache": False,
            },
            "training": {
                "steps": steps,
                "global_batch_size": BLOCKS_PER_STEP,
                "max_seq_len": BLOCK,
                "max_tokens_per_gpu": BLOCK * BLOCKS_PER_STEP,
                "preflight": False,
            },
            "optimizer": {"lr": 2e-3, "weight_decay": 0.1},
            "lr_scheduler": {"name": "cosine", "warmup_ratio": 0.03, "min_lr": 4e-5},
            "monitoring": {"console": "plain"},
        }
    )
    path = run(recipe).model_path
    if path is None:
        raise SystemExit("The run ended without a final model.")
    return path


def save_untrained(folder: Path, seed: int) -> None:
    """A model with random weights, and its tokenizer with one token per byte."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH * 11 // 4,
        num_hidden_layers=LAYERS,
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


if __name__ == "__main__":
    main()
