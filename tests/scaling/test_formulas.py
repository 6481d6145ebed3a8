"""The formulas of plans on paper: what must hold whatever the numbers, and how far published runs lie from them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from training_hub.recipe.parallelism import Degrees
from training_hub.scaling.choose import (
    DEVICES,
    EIGHT_BITS,
    GIB,
    LONG,
    ROOM,
    SIMPLER,
    Cluster,
    best,
    by_family,
    candidate,
    candidates,
    family,
    layouts,
    reasons,
    told,
)
from training_hub.scaling.formulas import Work, bubble, kept_numbers, memory, operations, traffic
from training_hub.scaling.models import KEPT

EIGHT, SEVENTY, MIXTURE = (KEPT[name] for name in ("llama3_8b", "llama3_70b", "qwen3_235b_a22b"))
WORK = Work(samples=1024, length=8192)
H100 = DEVICES["h100"]


def test_every_layout_has_all_devices_and_divides_evenly():
    for shape in (EIGHT, MIXTURE):
        for layout in layouts(shape, Cluster(H100, 64), WORK):
            assert layout.world_size == 64
            assert shape.key_heads % layout.tp == 0
            assert (layout.tp * layout.cp * layout.dp_shard) % layout.ep == 0
            assert layout.ep == 1 or shape.experts % layout.ep == 0
            assert WORK.samples >= layout.data


def test_shards_divide_the_state_and_copies_do_not():
    whole, halved = (memory(EIGHT, Degrees(dp_shard=n), WORK).state for n in (2, 4))
    assert whole == 2 * halved
    assert memory(EIGHT, Degrees(dp_replicate=8, dp_shard=2), WORK).state == whole
    # 16 bytes for each weight over 2 shards: bfloat16 products of float32 weights that Adam moves.
    assert whole == 16 * EIGHT.parameters / 2
    assert memory(EIGHT, Degrees(dp_replicate=8), WORK).state == 18 * EIGHT.parameters


def test_context_divides_weights_only_where_that_is_said():
    degrees = Degrees(dp_shard=4, cp=2)
    assert memory(EIGHT, degrees, WORK).state == memory(EIGHT, Degrees(dp_shard=4), WORK).state
    assert memory(EIGHT, degrees, replace(WORK, shards_context=True)).state == 16 * EIGHT.parameters / 8


def test_experts_lie_once_on_the_devices_of_a_copy():
    state = [memory(MIXTURE, Degrees(dp_shard=64, ep=e), WORK).state for e in (1, 8, 64)]
    assert state[0] == pytest.approx(state[1]) == pytest.approx(state[2])
    gathered = [memory(MIXTURE, Degrees(dp_shard=64, ep=e), WORK).gathered for e in (1, 8, 64)]
    assert gathered[0] > gathered[1] > gathered[2], "fewer experts of a layer are gathered"


def test_tensor_and_context_divide_activations_and_stages_hold_as_many_passes():
    alone = memory(EIGHT, Degrees(dp_shard=8), WORK).activations
    for layout in (Degrees(dp_shard=4, tp=2), Degrees(dp_shard=4, cp=2)):
        assert memory(EIGHT, layout, WORK).activations == pytest.approx(alone / 2)
    assert memory(EIGHT, Degrees(dp_shard=4, pp=2), WORK).activations == pytest.approx(alone), "half the layers, twice"


def test_forgetting_more_keeps_less_and_computes_more():
    kept = [kept_numbers(EIGHT, how) for how in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2] == EIGHT.width
    work = [
        operations(EIGHT, Degrees(dp_shard=8), replace(WORK, checkpointing=how)).total
        for how in ("none", "selective", "full")
    ]
    assert work[0] == work[1] < work[2] == pytest.approx(work[0] * 4 / 3)


def test_messages_are_those_of_rings():
    weights = EIGHT.parameters
    copies = traffic(EIGHT, Degrees(dp_replicate=4), WORK)
    assert copies.total == copies.copies == pytest.approx(2 * 3 / 4 * 4 * weights), "float32 gradients, once a step"
    one_pass = replace(WORK, samples=4)
    shards = traffic(EIGHT, Degrees(dp_shard=4), one_pass)
    # bfloat16 weights before forward and before backward, float32 gradients after: 2 + 2 + 4 bytes.
    assert shards.total == shards.shards == pytest.approx(3 / 4 * 8 * weights)
    assert traffic(EIGHT, Degrees(dp_shard=4), replace(WORK, samples=8)).shards == 2 * shards.shards, "in every pass"
    assert traffic(EIGHT, Degrees(), WORK).total == 0


def test_stages_wait_less_with_more_passes():
    assert bubble(Degrees(), WORK) == 0
    assert bubble(Degrees(pp=4), replace(WORK, samples=4)) == pytest.approx(3 / 7)
    assert bubble(Degrees(pp=4), replace(WORK, samples=64)) == pytest.approx(3 / 67)


# torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1, 3 and 4: model, layout, step, GiB.
TITAN = {"has_whole_logits": True, "products_kept": 0.5, "shards_context": True}
PUBLISHED = (
    (EIGHT, Degrees(dp_shard=8), Work(16, 8192, 2, "selective", **TITAN), 82.4),
    (EIGHT, Degrees(dp_shard=8), Work(16, 8192, 2, "selective", **TITAN), 77.0),
    (EIGHT, Degrees(dp_shard=128), Work(256, 8192, 2, "selective", **TITAN), 62.0),
    (EIGHT, Degrees(dp_shard=1, cp=8), Work(1, 262144, 1, "full", **TITAN), 84.5),
    (SEVENTY, Degrees(dp_shard=32, tp=8), Work(512, 8192, 16, "full", **TITAN), 71.9),
)


@pytest.mark.parametrize(("shape", "layout", "work", "gib"), PUBLISHED)
def test_published_memory_lies_above_the_formulas_and_within_what_is_left_free(shape, layout, work, gib):
    """The share of memory that is planned (ROOM) is what makes a layout that is taken fit in truth; the widest of the
    published runs, 71.9 GiB, lies 27 % above its formula, three points beyond 1 / ROOM."""
    computed = memory(shape, layout, work).total / GIB
    assert computed < gib < 1.02 * computed / ROOM


# Tokens per second and GPU of the same page's table 2: 8B on 8 GPUs, in 8 bits, one sample over so many devices.
WITH_CONTEXT = ((1, 32768, 3890), (2, 65536, 2540), (4, 131072, 1071), (8, 262144, 548))


def test_long_samples_slow_down_as_published_but_for_what_context_costs_beyond_attention():
    """Relative to one device a sample: within 5 % for two, and never slower than published. One rate for all operations
    would be 98 % too fast for eight, where an exchange of keys beyond its bytes is still missing."""
    found = []
    for context, length, _ in WITH_CONTEXT:
        layout = Degrees(dp_shard=8 // context, cp=context)
        work = Work(8 // context, length, 1, "full", is_in_eight_bits=True, **TITAN)
        found.append(length / context / candidate(EIGHT, layout, Cluster(H100, 8), work, 96).seconds)
    shares = [
        ours / found[0] / (theirs / WITH_CONTEXT[0][2]) for ours, (*_, theirs) in zip(found, WITH_CONTEXT, strict=True)
    ]
    assert shares[1] == pytest.approx(1, abs=0.05)
    assert shares == pytest.approx([1, 1, 1.35, 1.35], abs=0.06)


def test_what_is_said_to_have_more_parts_has_more():
    told_so = 0
    for world in (64, 512, 1024):
        found = candidates(MIXTURE, Cluster(H100, world), WORK, H100.memory_gib)
        chosen, families = best(found), {family(one.degrees): one for one in by_family(found)}
        assert chosen is not None
        for line in reasons(chosen, list(families.values())):
            if line.endswith("has more parts"):
                other = families[line.split(" would take")[0]]
                assert told(other.degrees).count(",") > told(chosen.degrees).count(","), line
                told_so += 1
    assert told_so


def test_products_in_eight_bits_are_faster_and_attention_is_not():
    short, long = (replace(WORK, length=length) for length in (512, 131072))
    gained = []
    for work in (short, long):
        both = [replace(work, is_in_eight_bits=is_so) for is_so in (False, True)]
        slow, fast = (candidate(EIGHT, Degrees(dp_shard=8), Cluster(H100, 8), one, 80).compute_seconds for one in both)
        gained.append(slow / fast)
    assert EIGHT_BITS > gained[0] > 1.4 > gained[1] > 1


def test_the_choice_fits_and_is_the_fastest_but_for_simplicity():
    for shape, world in ((EIGHT, 8), (SEVENTY, 256), (MIXTURE, 1024)):
        found = candidates(shape, Cluster(H100, world), WORK, H100.memory_gib)
        chosen = best(found)
        assert chosen is not None
        assert chosen.memory_gib <= ROOM * H100.memory_gib
        sure = [one.seconds for one in found if one.fits and not one.is_doubtful]
        assert chosen.seconds <= SIMPLER * min(sure)


def test_small_models_are_sharded_large_ones_divided_and_mixtures_by_experts():
    def chosen(shape, world):
        found = best(candidates(shape, Cluster(H100, world), WORK, H100.memory_gib))
        return family(found.degrees) if found else None

    assert chosen(EIGHT, 8) == "FSDP"
    assert chosen(SEVENTY, 8) is None, "16 bytes x 70 B over 8 are 131 GiB"
    assert chosen(SEVENTY, 256) == "FSDP + TP"
    assert "EP" in chosen(MIXTURE, 256)


def test_short_samples_are_divided_only_where_nothing_else_fits():
    found = candidates(SEVENTY, Cluster(H100, 256), WORK, H100.memory_gib)
    assert best(found).degrees.cp == 1
    long = Work(samples=256, length=16 * LONG)
    assert best(candidates(EIGHT, Cluster(H100, 256), long, H100.memory_gib)).degrees.cp > 1


def test_messages_within_a_host_are_faster():
    inside = candidate(SEVENTY, Degrees(dp_shard=8, tp=8), Cluster(H100, 64), WORK, 60)
    across = candidate(SEVENTY, Degrees(dp_shard=8, tp=8), Cluster(H100, 64, per_host=4), WORK, 60)
    assert across.sending_seconds > inside.sending_seconds


def test_each_family_is_shown_by_its_best():
    found = candidates(EIGHT, Cluster(H100, 16), WORK, H100.memory_gib)
    shown = by_family(found)
    names = [family(one.degrees) for one in shown]
    assert len(names) == len(set(names))
    assert {"DDP", "FSDP", "HSDP", "FSDP + TP", "FSDP + CP", "FSDP + PP"} <= set(names)
    for one in shown:
        same = [each for each in found if family(each.degrees) == family(one.degrees)]
        assert one.fits == any(each.fits for each in same)
