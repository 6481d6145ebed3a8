"""How fast answers are made: our batches against transformers' generate one row at a time, and in padded batches.

    python benchmarks/generation.py                    # about three minutes of one core; --write keeps the table
    python benchmarks/generation.py --tiny             # whether it runs

Three ways make the same answers of one random Llama, in turn, in one process: `ours` sorts rows by length and fills
batches to so many tokens; `batches` takes as many rows at a time as fit that even where they are long, as they come,
padded to their longest; `one by one` asks each row alone. All decode greedily with a cache of keys and values, and stop
at the same tokens, so that rows end at different lengths as real answers do. In float32 the answers of all three must
be equal, token for token.

Times are processor time (user and system), which a busy machine disturbs least; wall time stands beside it.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from training_hub.backends.shared.answers import Decoding, Prompt
from training_hub.backends.torch_engine.answers.generate import answers

FILE = Path(__file__).parent / "generation" / "RESULTS.md"
VOCABULARY = 8192
STOPS = tuple(range(16, 16 + VOCABULARY // 40))  # one token in forty ends an answer
Ids = list[tuple[int, ...]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few rows, to see whether it runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"write the table to {FILE.relative_to(FILE.parents[2])}")
    chosen = parser.parse_args()
    rows, limit, at_once = (6, 6, 512) if chosen.tiny else (40, 48, 2048)
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_llama(chosen.tiny).to(dtype).eval()
        prompts = random_prompts(rows, limit, longest=40 if chosen.tiny else 400)
        lines += compare(model, prompts, at_once, chosen.rounds)
    text = table(lines, model, rows, limit, at_once, chosen.rounds)
    print(text)
    if chosen.write:
        FILE.parent.mkdir(exist_ok=True)
        FILE.write_text(text, encoding="utf-8")


def compare(model: Any, prompts: Sequence[Prompt], at_once: int, rounds: int) -> list[dict[str, Any]]:
    """A line for each way: tokens per second of processor time and of wall time, median and spread over the rounds."""
    size = max(1, at_once // (max(len(one.ids) for one in prompts) + prompts[0].limit))
    ways: dict[str, Callable[[], Ids]] = {
        "ours": lambda: [one.ids for one in answers(model, prompts, Decoding(STOPS), at_once)],
        f"batches of {size}": lambda: plain(model, prompts, size),
        "one by one": lambda: plain(model, prompts, 1),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    made: dict[str, Ids] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            processor, wall = time.process_time(), time.perf_counter()
            made[name] = way()
            taken[name].append((time.process_time() - processor, time.perf_counter() - wall))
    reference = made["one by one"]
    same = [sum(one == other for one, other in zip(each, reference, strict=True)) for each in made.values()]
    if model.dtype == torch.float32 and set(same) != {len(prompts)}:
        raise SystemExit(f"the answers differ: {dict(zip(ways, same, strict=True))} of {len(prompts)} are alike")
    tokens = sum(map(len, reference))
    return [
        {
            "dtype": str(model.dtype).removeprefix("torch."),
            "way": name,
            "tokens": tokens,
            "processor": [tokens / seconds for seconds, _ in taken[name]],
            "wall": [tokens / seconds for _, seconds in taken[name]],
            "same": f"{count} of {len(prompts)}",
        }
        for name, count in zip(ways, same, strict=True)
    ]


@torch.no_grad()
def plain(model: Any, prompts: Sequence[Prompt], size: int) -> Ids:
    """transformers' generate on so many rows at a time, as they come, padded on the left."""
    found: Ids = []
    config = GenerationConfig(
        max_new_tokens=prompts[0].limit, do_sample=False, eos_token_id=list(STOPS), pad_token_id=STOPS[0]
    )
    for start in range(0, len(prompts), size):
        group = prompts[start : start + size]
        longest = max(len(one.ids) for one in group)
        ids = torch.tensor([[0] * (longest - len(one.ids)) + list(one.ids) for one in group])
        mask = torch.tensor([[0] * (longest - len(one.ids)) + [1] * len(one.ids) for one in group])
        made = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        for row in made[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in STOPS), len(row))
            found.append(tuple(row[:end]))
    return found


def random_llama(is_tiny: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    width, layers = (32, 2) if is_tiny else (512, 8)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16 if is_tiny else 8,
            num_key_value_heads=2 if is_tiny else 4,
            max_position_embeddings=1024,
            # Large enough that the answers depend on the prompts.
            initializer_range=0.1,
        )
    )


def random_prompts(rows: int, limit: int, longest: int) -> list[Prompt]:
    """Prompts of lengths that are mostly short and sometimes long, as those of conversations are."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(longest / 5), 0.8, rows), 4, longest).astype(int)
    return [Prompt(random.integers(1000, VOCABULARY, length).tolist(), limit) for length in lengths]


def table(lines: Sequence[dict[str, Any]], model: Any, rows: int, limit: int, at_once: int, rounds: int) -> str:
    parameters = sum(weight.numel() for weight in model.parameters()) / 1e6
    slowest = {line["dtype"]: statistics.median(line["processor"]) for line in lines if line["way"] == "one by one"}
    shown = [
        f"| {line['dtype']} | {line['way']} | {spread(line['processor'])} | {spread(line['wall'])} | "
        f"{statistics.median(line['processor']) / slowest[line['dtype']]:.1f}x | {line['same']} |"
        for line in lines
    ]
    return "\n".join(
        [
            "# Answers per second",
            "",
            "`python benchmarks/generation.py --write`: " + " ".join((__doc__ or "").split("\n\n")[2].split()),
            "",
            f"A Llama of {parameters:.1f} M random weights, {rows} prompts, at most {limit} tokens each, "
            f"{at_once:,} tokens at once; median of {rounds} alternating rounds, lowest and highest in brackets. "
            f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} thread, "
            f"{processor_name()}.",
            "",
            f"At the end {os.getloadavg()[2]:.1f} processes wanted one of {os.cpu_count()} cores, on average over 15 "
            "minutes.",
            "",
            "| format | way | answer tokens per processor second | per wall second | of one by one | same answers |",
            "|---|---|---|---|---|---|",
            *shown,
            "",
        ]
    )


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


if __name__ == "__main__":
    main()
