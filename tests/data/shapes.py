"""Small templates in each of the shapes that published ones have, and the tokens their models stop at."""

from __future__ import annotations

from tests.data.tiny import CHATML, DEEPSEEK, GLM, LLAMA2, THINKING, TOOLS

LLAMA3 = (
    "<s>{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}"
    "{{ raise_exception('unknown role') }}{% endif %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{%- set system = '' -%}{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content + '\n\n' -%}"
    "{%- set messages = messages[1:] -%}{%- endif -%}{{- '<s>' -}}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}"
    "{%- if tools and m == (messages | selectattr('role', 'equalto', 'user') | list)[-1] -%}"
    "{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) -}}{%- endif -%}"
    "{{- '[INST] ' + (system if loop.first else '') + m.content + '[/INST]' -}}"
    "{%- elif m.role == 'tool' -%}{{- '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' -}}"
    "{%- elif m.tool_calls -%}{{- '[TOOL_CALLS] [' -}}{%- for call in m.tool_calls -%}"
    "{{- {'name': call.function.name, 'arguments': call.function.arguments, 'id': call.id} | tojson -}}"
    "{%- if not loop.last -%}{{- ', ' -}}{%- endif -%}{%- endfor -%}{{- ']</s>' -}}"
    "{%- elif m.role == 'assistant' -%}{{- ' ' + m.content + '</s>' -}}"
    "{%- else -%}{{- raise_exception('roles: user, assistant, tool') -}}{%- endif -%}{%- endfor -%}"
)
GEMMA = (
    "<s>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ m.content | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Its tokens swallow the white space behind them (rstrip), and the end of the text is closed twice.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<end_of_utterance>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHANNELS = (
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- if m.thinking and loop.last -%}"
    "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' -}}{%- endif -%}"
    "{%- if m.tool_calls -%}{%- set call = m.tool_calls[0].function -%}"
    "{{- '<|start|>assistant to=functions.' + call.name + '<|channel|>commentary json<|message|>' -}}"
    "{{- (call.arguments | tojson) + '<|call|>' -}}"
    "{%- else -%}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content -}}"
    "{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' -}}{%- endif -%}"
    "{%- else -%}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}"
)
# The template, the tokens it writes, and the one its model stops at.
SHAPES: dict[str, tuple[str, tuple[str, ...], str]] = {
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "chatml tools": (TOOLS, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama 2": (LLAMA2, ("<s>", "</s>"), "</s>"),
    "llama 3": (LLAMA3, ("<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "mistral": (
        MISTRAL,
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]"),
        "</s>",
    ),
    "thinking": (THINKING, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "glm": (GLM, ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>"), "<|user|>"),
    "deepseek": (DEEPSEEK, ("<s>", "<|User|>", "<|Assistant|>", "<|eos|>"), "<|eos|>"),
    "gemma": (GEMMA, ("<s>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "phi": (PHI, ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), "<|end|>"),
    "parts": (PARTS, ("<|im_start|>", "<end_of_utterance>"), "<end_of_utterance>"),
    "channels": (
        CHANNELS,
        ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"),
        "<|return|>",
    ),
}
