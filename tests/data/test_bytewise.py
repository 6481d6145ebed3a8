"""Places told by the bytes of tokens are those that the library tells."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.tiny import LINES, chat_tokenizer, hf_tokenizer
from training_hub.data.tokenizer import TEXTS_PER_CALL, ChatTokenizer, Tokenised

TEXTS = (
    "Hello there,  four\n\n漢字 é<|im_end|>\n<|im_start|>user <think>x",
    "",
    "a",
    " \t\n ",
    "e\u0301 and \u1100\u1161 and ﬁ",
    "🙂🙃 👩‍👩‍👧 x",
    "  <|im_end|>  y <|im_end|>",
    "a\u0000b \u00ad Ġ ĠA ÿĀ",
)


def texts(count: int = 400) -> list[str]:
    draw = random.Random(0)
    letters = [
        chr(code) for part in ((1, 592), (768, 880), (0x3040, 0x30FF), (0x1F600, 0x1F640)) for code in range(*part)
    ]
    made = ["".join(draw.choices(letters, k=draw.randrange(40))) for _ in range(count)]
    return [*TEXTS, *LINES, *made, *LINES * TEXTS_PER_CALL]


def wrapped(pre_tokenizer: object, normalizer: object = None) -> ChatTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.normalizer = pre_tokenizer, normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return ChatTokenizer.wrap(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def told_by_bytes(tokenizer: ChatTokenizer, given: list[str]) -> int:
    """How many texts were told by the bytes of their tokens, after a comparison of all with the library's places."""
    quick = tokenizer.tokenise(given)
    for text, found, expected in zip(given, quick, tokenizer.encode_batch(given), strict=True):
        arrays = found.arrays() if isinstance(found, Tokenised) else found
        assert [part.tolist() for part in arrays] == [part.tolist() for part in expected], text
        assert [part.dtype for part in arrays] == [part.dtype for part in expected]
    return sum(not isinstance(found, Tokenised) for found in quick)


def test_a_byte_level_tokenizer_is_told_by_its_bytes_whatever_the_text():
    given = texts()
    assert told_by_bytes(chat_tokenizer(), given) == len(given)


def test_a_text_that_is_not_in_the_normal_form_is_told_by_the_library():
    tokenizer = wrapped(pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC())
    assert told_by_bytes(tokenizer, ["Hello é", "Hello e\u0301", "four"]) == 2


def test_a_special_token_that_takes_white_space_is_told_by_the_library():
    tokenizer = ChatTokenizer.wrap(
        hf_tokenizer(special=[AddedToken("<|im_end|>", special=True, normalized=False, lstrip=True, rstrip=True)])
    )
    assert told_by_bytes(tokenizer, ["four<|im_end|>four", "four <|im_end|>", "<|im_end|>\n", "four"]) == 2


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        pre_tokenizers.Sequence(
            [pre_tokenizers.Split(",", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ],
    ids=["adds a space", "drops white space", "drops a comma"],
)
def test_tokenizers_that_add_or_lose_text_are_left_to_the_library(pre_tokenizer):
    assert told_by_bytes(wrapped(pre_tokenizer), [*LINES, *TEXTS]) == 0


def test_a_letter_without_a_token_is_told_by_the_library():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [letter for letter in pre_tokenizers.ByteLevel.alphabet() if letter != "~"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    small = ChatTokenizer.wrap(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert told_by_bytes(small, ["Hello there", "~ there ~"]) == 1


def test_published_byte_level_tokenizers_are_told_by_their_bytes():
    folder = os.environ.get("TRAINING_HUB_TEST_DATA")
    if not folder:
        pytest.skip("TRAINING_HUB_TEST_DATA names no folder with published tokenizers")
    given = texts()
    for name in ("gpt2", "minimind"):
        assert told_by_bytes(ChatTokenizer.load(str(Path(folder) / "tokenizers" / name)), given) == len(given)
