"""A small real tokenizer and small templates, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from training_hub.data.templates import ChatTemplate
from training_hub.data.tokenizer import ChatTokenizer
from training_hub.types import Conversation, Message, Origin

LINES = (
    "Hello there, how are you today? I am fine. The answer is four, and the weather in Paris is sunny.",
    "user assistant system tool USER: ASSISTANT: ### Instruction: ### Response: name arguments city",
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def hf_tokenizer(
    special: Sequence[str | AddedToken] = CHATML_TOKENS,
    plain: Sequence[str] = ("<think>", "</think>", "<tool_call>", "</tool_call>"),
    eos: str | None = "<|im_end|>",
    bos: str | None = None,
    template: Any = None,
    trim_offsets: bool = False,
    adds_bos: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few hundred tokens, trained on LINES."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) if isinstance(t, str) else t for t in special]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    if adds_bos and bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos)
    wrapped.chat_template = template
    return wrapped


def chat_tokenizer(**settings: Any) -> ChatTokenizer:
    return ChatTokenizer.wrap(hf_tokenizer(**settings))


def template(source: str, tokenizer: ChatTokenizer | None = None) -> ChatTemplate:
    return ChatTemplate("test", source, tokenizer.special_tokens if tokenizer else {})


def talk(*turns: tuple[str, str | None] | Message, **settings: Any) -> Conversation:
    """A conversation of (role, content) pairs or messages, from line 7 of chat.jsonl."""
    messages = tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns)
    return Conversation(messages, Origin("chat.jsonl", 7), **settings)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Llama 2: content is trimmed, no generation prompt, answers are " answer </s>".
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content | trim }} </s>{% else %}"
    "{{ raise_exception('only user and assistant') }}"
    "{% endif %}{% endfor %}"
)
# Earlier reasoning is dropped; the last turn shows a block of thoughts even when it is empty.
THINKING = (
    "{%- set ns = namespace(last=-1) -%}{%- for m in messages -%}{%- if m.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# GLM: nothing closes a turn but the header of the next one.
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# DeepSeek R1: the generation prompt opens a block of thoughts that answers are shown without.
DEEPSEEK = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}{% else %}"
    "<|Assistant|>{{ m.content.split('</think>')[-1] }}<|eos|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
TOOLS = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}{%- if m.content -%}{{- m.content -}}{%- endif -%}"
    "{%- for call in m.tool_calls or [] -%}{%- if m.content or not loop.first -%}{{- '\n' -}}{%- endif -%}"
    '{{- \'<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) '
    "+ '}\n</tool_call>' -}}{%- endfor -%}{{- '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
