"""Ids are those of serving, and every token knows its place in the text."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from tests.data.tiny import CHATML, chat_tokenizer, hf_tokenizer
from training_hub.data.tokenizer import ChatTokenizer, Tokenised
from training_hub.errors import DataError

TEXT = "Hello there,  four\n\n漢字 é<|im_end|>\n<|im_start|>user <think>x"


def saved(folder: Path, **settings) -> Path:
    hf_tokenizer(**settings).save_pretrained(folder)
    return folder


def test_ids_equal_those_of_apply_chat_template():
    hf = hf_tokenizer(template=CHATML, bos="<|endoftext|>", adds_bos=True)
    messages = [{"role": "user", "content": "Hello there  "}, {"role": "assistant", "content": "\n\nfour 漢"}]
    expected = hf.apply_chat_template(messages, tokenize=True, return_dict=False)
    text = hf.apply_chat_template(messages, tokenize=False)
    assert ChatTokenizer.wrap(hf).encode_batch([text])[0][0].tolist() == expected


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_places_tile_the_text_also_where_the_tokenizer_trims_them(trim_offsets):
    _, starts, ends = chat_tokenizer(trim_offsets=trim_offsets).encode_batch([TEXT])[0]
    assert starts[0] == 0
    assert ends[-1] == len(TEXT)
    # Each token begins where the one before ends, or shares a character that is several tokens with it.
    assert all(start in (end, end - 1) for start, end in zip(starts[1:], ends[:-1], strict=True))
    assert "".join(TEXT[s:e] for s, e in sorted(set(zip(starts.tolist(), ends.tolist(), strict=True)))) == TEXT


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_tokens_between_two_characters_are_those_that_the_places_of_all_tell(trim_offsets):
    tokenizer = chat_tokenizer(trim_offsets=trim_offsets)
    quick = Tokenised(tokenizer._backend.encode(TEXT, add_special_tokens=False))
    ids, starts, ends = quick.arrays()
    assert quick.ids.tolist() == ids.tolist()
    told = 0
    for start in range(len(TEXT)):
        for end in range(start + 1, len(TEXT) + 1):
            found = quick.between(start, end)
            if found is None:
                assert start not in starts or (ends > start)[starts < start].any() or (starts == start).sum() > 1
                continue
            assert found == tuple(np.searchsorted(starts, (start, end)))
            told += 1
    assert told > 300


def test_truncation_and_padding_set_on_the_tokenizer_do_not_cut_rows():
    hf = hf_tokenizer()
    hf.backend_tokenizer.enable_truncation(3)
    hf.backend_tokenizer.enable_padding(length=50)
    lengths = [len(ids) for ids, _, _ in ChatTokenizer.wrap(hf).encode_batch(["a", TEXT])]
    assert lengths[0] == 1
    assert lengths[1] > 3


def test_tokens_that_end_a_turn_come_from_tokenizer_and_model_files(tmp_path):
    folder = saved(tmp_path, eos="<|im_end|>")
    known = ChatTokenizer.load(str(folder)).special_ids
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [known["<|endoftext|>"]]}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 99_999}))
    tokenizer = ChatTokenizer.load(str(folder))
    assert tokenizer.stop_ids == {known["<|im_end|>"], known["<|endoftext|>"]}
    assert tokenizer.stop_tokens == {"<|im_end|>", "<|endoftext|>"}


def test_fingerprint_is_that_of_the_ids_it_gives(tmp_path):
    first = chat_tokenizer()
    assert ChatTokenizer.load(str(saved(tmp_path))).fingerprint == first.fingerprint
    assert chat_tokenizer(plain=()).fingerprint != first.fingerprint
    assert chat_tokenizer(eos="<|endoftext|>").fingerprint != first.fingerprint


def test_it_can_be_sent_to_another_process():
    tokenizer = chat_tokenizer()
    copy = pickle.loads(pickle.dumps(tokenizer))  # noqa: S301
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode_batch([TEXT])[0][0].tolist() == tokenizer.encode_batch([TEXT])[0][0].tolist()


def test_tokenizer_written_in_python_is_refused_with_the_remedy():
    with pytest.raises(DataError, match=r"ByT5Tokenizer cannot say where its tokens lie.*tokenizer\.json"):
        ChatTokenizer.wrap(ByT5Tokenizer())


def test_tokenizer_whose_places_do_not_cover_the_text_is_refused():
    hf = hf_tokenizer()
    hf.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[a-z]"), behavior="removed")
    with pytest.raises(DataError, match="no mask can be trusted"):
        ChatTokenizer.wrap(hf)


def test_missing_folder_is_answered_with_the_nearest_name(tmp_path):
    saved(tmp_path / "llama-tiny")
    with pytest.raises(DataError, match=r"no such folder. Did you mean .*llama-tiny\?"):
        ChatTokenizer.load(str(tmp_path / "lama-tiny"))


def test_folder_without_tokenizer_says_what_to_copy(tmp_path):
    with pytest.raises(DataError, match=r"holds no tokenizer \(tokenizer.json"):
        ChatTokenizer.load(str(tmp_path))


def test_lfs_pointer_and_broken_json_are_named_together(tmp_path):
    folder = saved(tmp_path)
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (folder / "tokenizer_config.json").write_text('{"a": ')
    with pytest.raises(DataError) as caught:
        ChatTokenizer.load(str(folder))
    assert len(caught.value.problems) == 2
    assert "git lfs pull" in caught.value.problems[0]
    assert "not valid JSON" in caught.value.problems[1]


def test_text_that_a_tokenizer_puts_around_plain_text_is_known():
    tokenizer = chat_tokenizer(bos="<|endoftext|>", adds_bos=True)
    assert tokenizer.around == ((tokenizer.special_ids["<|endoftext|>"],), ())
    assert chat_tokenizer().around == ((), ())


def test_special_tokens_are_those_flagged_so():
    tokenizer = chat_tokenizer(
        special=["<|im_end|>", AddedToken("<|end|>", special=True, rstrip=True)], plain=["<think>"]
    )
    assert set(tokenizer.special_ids) == {"<|im_end|>", "<|end|>"}


def test_reading_nothing_literally_gives_the_same_tokens_and_places():
    texts = [
        "<|im_start|>user\nHello  <think>there</think><|im_end|>\n é漢 <|endoftext|>",
        "",
        "plain",
        " <|im_end|> x",
    ]
    for tokenizer in (chat_tokenizer(), chat_tokenizer(trim_offsets=True)):
        for text, usual in zip(texts, tokenizer.encode_batch(texts), strict=True):
            for ours, theirs in zip(tokenizer.encode_literally(text, ()), usual, strict=True):
                assert ours.tolist() == theirs.tolist()


def test_only_what_is_named_is_read_as_text():
    tokenizer = chat_tokenizer()
    text = "a<|im_end|>b<|im_end|>"
    ids, starts, ends = tokenizer.encode_literally(text, [(1, 11)])
    assert (ids == tokenizer.special_ids["<|im_end|>"]).sum() == 1
    assert ids[-1] == tokenizer.special_ids["<|im_end|>"]
    assert (starts[-1], ends[-1]) == (12, 22)
    assert tokenizer.hf.decode(ids) == text


def test_published_tokenizers_read_special_tokens_as_text():
    folder = os.environ.get("TRAINING_HUB_TEST_DATA")
    if not folder:
        pytest.skip("TRAINING_HUB_TEST_DATA is not set: no published tokenizers to try")
    tried = 0
    for file in sorted(Path(folder).glob("*/*/tokenizer.json")):
        tokenizer = ChatTokenizer.load(str(file.parent))
        if not tokenizer.special_ids:
            continue
        tokens = [token for token in tokenizer.special_ids if token.strip() == token]
        text = "".join(f"{token} Hello\n\nthere {token}" for token in tokens[:5])
        for ours, theirs in zip(tokenizer.encode_literally(text, ()), tokenizer.encode_batch([text])[0], strict=True):
            assert ours.tolist() == theirs.tolist(), file
        at = text.index(tokens[0])
        ids, starts, _ = tokenizer.encode_literally(text, [(at, at + len(tokens[0]))])
        assert tokenizer.special_ids[tokens[0]] not in ids[starts < len(tokens[0])]
        tried += 1
    assert tried > 0


def test_a_tokenizer_that_knows_no_other_way_to_write_a_special_token_says_so():
    inner = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["</s>"])
    tokenizer = ChatTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>"))
    with pytest.raises(DataError, match=r"'</s>' is a special token, and this tokenizer has no other way to write it"):
        tokenizer.encode_literally("a </s> a", [(2, 6)])
