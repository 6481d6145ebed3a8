"""The token store gives back what was put in, from disk as from memory, and knows its own contents."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from training_hub.data.lengths import blocks, fit
from training_hub.data.selection import num_duplicates, split_validation, without_duplicates
from training_hub.data.store import SampleBlock, StoreWriter, TokenStore, content_hash
from training_hub.errors import DataError
from training_hub.folders import damage, write_whole
from training_hub.types import Origin, Sample


def sample(*ids: int, line: int = 1, source: str = "a.jsonl", weights: list[float] | None = None) -> Sample:
    chosen = np.array(weights, np.float32) if weights else np.ones(len(ids), np.float32)
    chosen[0] = 0
    return Sample(np.array(ids, np.int32), chosen, Origin(source, line))


SAMPLES = [sample(1, 2, 3), sample(4, 5, line=2, weights=[0, 0.5]), sample(6, 7, 8, 9, line=9)]


def written(folder: Path, groups: list[list[Sample]], **opened: object) -> TokenStore:
    """A store on disk, one appended block per group, one hash per sample."""
    with write_whole(folder, replace=True) as aside, StoreWriter(aside) as writer:
        for group in groups:
            writer.append(SampleBlock.of(group, [content_hash([one]) for one in group], 0, [0] * len(group)))
        writer.finish([("a.jsonl", "line")], {"rows": 3})
    return TokenStore.open(folder, **opened)  # type: ignore[arg-type]


def same(left: TokenStore, right: TokenStore) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(left[i].ids, right[i].ids)
        and np.array_equal(left[i].weights, right[i].weights)
        and left[i].origin == right[i].origin
        for i in range(len(left))
    )


def test_samples_come_back_as_they_went_in_from_disk_and_from_memory(tmp_path: Path) -> None:
    for store in (written(tmp_path / "s", [SAMPLES[:2], [], SAMPLES[2:]]), TokenStore.from_samples(SAMPLES)):
        assert len(store) == 3
        for given, got in zip(SAMPLES, (store[i] for i in range(3)), strict=True):
            assert got.ids.dtype == np.int32 and got.weights.dtype == np.float32
            assert got.ids.tolist() == given.ids.tolist() and got.weights.tolist() == given.weights.tolist()
            assert got.origin == given.origin
        assert store.lengths.tolist() == [3, 2, 4]
        assert store.trained_tokens.tolist() == [2, 1, 3]
        assert store.trained_weight.tolist() == [2.0, 0.5, 3.0]
        assert store.source_index.tolist() == [0, 0, 0]
        assert str(store.origin(2)) == "a.jsonl line 9"
        with pytest.raises(IndexError):
            store[3]


def test_an_empty_store_can_be_written_and_opened(tmp_path: Path) -> None:
    store = written(tmp_path / "s", [])
    assert len(store) == 0 and store.lengths.tolist() == [] and num_duplicates(store) == 0


def test_how_samples_were_grouped_when_written_leaves_no_trace(tmp_path: Path) -> None:
    one, other = written(tmp_path / "a", [SAMPLES]), written(tmp_path / "b", [[s] for s in SAMPLES])
    assert one.fingerprint == other.fingerprint


def test_the_fingerprint_tells_order_weights_selection_and_mixing_apart(tmp_path: Path) -> None:
    reweighted = [*SAMPLES[:2], sample(6, 7, 8, 9, line=9, weights=[0, 1, 1, 0])]
    stores = [
        written(tmp_path / "a", [SAMPLES]),
        written(tmp_path / "b", [SAMPLES[::-1]]),
        written(tmp_path / "c", [reweighted]),
        written(tmp_path / "d", [SAMPLES]).subset(np.array([0, 1])),
        written(tmp_path / "e", [SAMPLES], source_weights=(2.0,)),
    ]
    assert len({store.fingerprint for store in stores}) == len(stores)


def test_a_subset_of_a_subset_shows_the_right_samples() -> None:
    store = TokenStore.from_samples(SAMPLES).subset(np.array([2, 0])).subset(np.array([1]))
    assert [store[0].ids.tolist(), store.lengths.tolist(), store.trained_tokens.tolist()] == [[1, 2, 3], [3], [2]]


def test_a_changed_byte_or_a_missing_file_is_damage(tmp_path: Path) -> None:
    written(tmp_path / "s", [SAMPLES])
    assert damage(tmp_path / "s") == []
    ids = tmp_path / "s" / "ids.bin"
    content = bytearray(ids.read_bytes())
    content[0] ^= 1
    ids.write_bytes(content)
    assert "ids.bin" in damage(tmp_path / "s")[0]
    ids.unlink()
    assert "ids.bin" in damage(tmp_path / "s")[0]


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a token store"):
        TokenStore.open(tmp_path)


def test_rows_equal_in_ids_and_weights_are_duplicates_and_the_first_is_kept() -> None:
    other_weights = sample(1, 2, 3, line=4, weights=[0, 0, 1])
    store = TokenStore.from_samples([SAMPLES[1], SAMPLES[0], other_weights, sample(1, 2, 3, line=7)])
    assert num_duplicates(store) == 1
    kept = without_duplicates(store)
    assert [kept.origin(i).line for i in range(len(kept))] == [2, 1, 4]


def rows_of_two() -> TokenStore:
    """40 rows of two samples each; every content comes twice."""
    samples, hashes = [], []
    for line in range(1, 41):
        pair = [sample(1, line % 20 + 10, line=line), sample(2, line % 20 + 10, line=line)]
        samples += pair
        hashes += [content_hash(pair)] * 2
    block = SampleBlock.of(samples, hashes, 0, [0] * len(samples))
    return TokenStore.from_block(block, [("a.jsonl", "line")])


def contents(store: TokenStore) -> set[int]:
    return {int(store[i].ids[1]) for i in range(len(store))}


def test_the_samples_of_a_row_and_all_its_duplicates_stay_on_one_side_of_the_split() -> None:
    store = rows_of_two()
    train, validation = split_validation(store, 0.25, seed=1)
    assert (len(train), len(validation)) == (60, 20)  # 5 of 20 contents, twice, two samples each
    assert not contents(train) & contents(validation)


def test_the_split_depends_on_content_and_seed_and_not_on_order() -> None:
    store = rows_of_two()
    once = contents(split_validation(store, 0.25, seed=1)[1])
    backwards = store.subset(np.arange(80).reshape(40, 2)[::-1].reshape(-1))
    assert contents(split_validation(backwards, 0.25, seed=1)[1]) == once
    others = [contents(split_validation(store, 0.25, seed=seed)[1]) for seed in range(2, 6)]
    assert any(other != once for other in others)


def test_a_split_that_leaves_nothing_to_train_on_is_refused() -> None:
    store = TokenStore.from_samples(SAMPLES[:1])
    with pytest.raises(DataError, match="leaves nothing to train on"):
        split_validation(store, 0.1, seed=1)


def tally_and(policy: str, *given: Sample) -> tuple[list[tuple[list[int], list[float]]], dict[str, int]]:
    tally: Counter[str] = Counter()
    kept = fit(given, 3, policy, tally)
    return [(one.ids.tolist(), one.weights.tolist()) for one in kept], dict(tally)


def test_samples_as_long_as_allowed_are_kept_by_every_policy() -> None:
    for policy in ("error", "drop", "truncate", "split"):
        assert tally_and(policy, SAMPLES[0]) == ([([1, 2, 3], [0, 1, 1])], {})


def test_truncating_counts_what_is_cut_and_leaves_out_what_has_nothing_trained_then() -> None:
    late = sample(1, 2, 3, 4, weights=[0, 0, 0, 1])
    kept, tally = tally_and("truncate", SAMPLES[2], late)
    assert kept == [([6, 7, 8], [0, 1, 1])]
    assert tally == {"overlong": 2, "truncated": 1, "dropped": 1, "tokens_lost": 5, "trained_tokens_lost": 2}


def test_splitting_trains_every_token_that_was_trained_exactly_once() -> None:
    long = sample(*range(10, 20), weights=[0, 1, 0, 2, 1, 1, 0, 0, 0, 1])
    kept, tally = tally_and("split", long)
    assert all(len(ids) <= 3 for ids, _ in kept)
    trained = [(token, weight) for ids, weights in kept for token, weight in zip(ids, weights, strict=True) if weight]
    assert trained == [(11, 1.0), (13, 2.0), (14, 1.0), (15, 1.0), (19, 1.0)]
    assert tally == {"overlong": 1, "split": 1, "pieces": 4, "pieces_untrained": 1}


def test_documents_become_full_blocks_with_every_token_but_the_first_trained_and_a_shorter_last_one() -> None:
    documents = TokenStore.from_samples([sample(1, 2, 3), sample(4, line=2), sample(5, 6, 7, 8, 9, 10, 11, line=3)])
    assert [(first, b.ids.tolist(), b.weights.tolist(), b.origin.line) for first, b in blocks(documents, 4)] == [
        (0, [1, 2, 3, 4], [0, 1, 1, 1], 1),
        (2, [5, 6, 7, 8], [0, 1, 1, 1], 3),
        (2, [9, 10, 11], [0, 1, 1], 3),
    ]
