"""No template reaches out of its sandbox, and none works or grows without end."""

from __future__ import annotations

import resource
import sys
import time

import pytest

from training_hub.data.templates import ChatTemplate, TemplateStopped
from training_hub.errors import DataError

MESSAGES = [{"role": "user", "content": "Hello there"}]
DUNDERS = (
    "__class__ __mro__ __base__ __subclasses__ __globals__ __init__ __builtins__ __dict__ __code__ __reduce__".split()
)
# What a template has at hand, each a way to Python's internals if an attribute beginning with _ can be read.
OBJECTS = ("''", "messages", "cycler", "joiner", "namespace", "range", "raise_exception", "dict")
ESCAPES = [
    # CVE-2024-56326: str.format reached without a call that the sandbox sees.
    "{{ ['{0.__class__.__mro__}']|map('format', messages)|list }}{{ '{0.__class__}'.format|attr('__self__') }}",
    "{% set f = '{0.__class__}'.format %}{{ [messages]|map(f)|list }}{{ f(messages) }}",
    # CVE-2024-56201: code through the name of a template.
    "{% include \"\\'+open('/etc/passwd').read()+\\'\" %}",
    # CVE-2025-27516: |attr gives the unwrapped str.format.
    "{% set f = '{0.__class__.__init__.__globals__}'|attr('format') %}{{ f(messages) }}",
    *(f"{{{{ {thing}.{name} }}}}" for thing in OBJECTS[:1] for name in DUNDERS),
    *(f"{{{{ {thing}|attr('__class__') }}}}" for thing in OBJECTS),
    *(f"{{{{ {thing}['__init__']['__globals__'] }}}}" for thing in OBJECTS),
    *(f"{{{{ '{{0.{name}}}'.format(messages) }}}}" for name in DUNDERS),
    "{{ '{m.__class__}'.format_map({'m': messages}) }}",
    "{{ messages|map(attribute='__class__')|list|first }}",
    "{{ messages|selectattr('__class__.__name__', 'equalto', 'dict')|list|first }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|sort(attribute='__class__.__name__')|map(attribute='__class__')|join }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ self.__init__.__globals__ }}",
    "{% for x in [1] %}{{ loop.__init__.__globals__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop._iterable.__class__ }}{% endfor %}",
    "{% macro m() %}{% endmacro %}{{ m._environment }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}",
    "{% call(x) dict() %}{{ caller._func.__code__ }}{% endcall %}{{ dict.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ namespace({'_x': 1}) }}",
    "{{ strftime_now.__globals__ }}",
    "{{ strftime_now.__closure__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ ''.join.__self__.__class__ }}",
    "{{ (1).__class__.__base__.__subclasses__() }}",
    "{{ ('x' ~ 'y').__class__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update(content='x') }}",
    "{{ messages[0].pop('content') }}",
    "{{ messages.clear() }}",
    "{% import 'os' as os %}",
    "{% from 'os' import system %}",
    "{% include 'secret.txt' %}",
    "{% extends '/etc/passwd' %}",
    "{% do messages.append(1) %}",
]  # fmt: skip
DOUBLED = "{{% set ns = namespace(s={}, t={}) %}}{{% for i in range(60) %}}{}{{% endfor %}}{{{{ {} }}}}"
BOMBS = [
    "{{ 'a' * 200000000 }}",
    "{% set x = 200000000 * ['a'] %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}" + "{% if messages is defined %}{% endif %}" * 2000 + "{% endfor %}",
    "{% for i in range(9999) %}{{ range(99999)|map('string')|map('upper')|list|length }}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set l = range(99)|list %}{% for x in l recursive %}{% if loop.depth < 9 %}{{ loop(l) }}{% endif %}{% endfor %}",
    *(
        DOUBLED.format(first, first, f"{{% set ns.s = {grown} %}}{{% set ns.t = {grown.replace('.s', '.t')} %}}", use)
        for first, grown, use in (
            ("'a'", "ns.s + ns.s", "ns.s"),
            ("'a'", "ns.s ~ ns.s", "ns.s"),
            ("'a'", "(ns.s + ns.s)|trim", "ns.s"),
            ("[1]", "ns.s + ns.s", "ns.s"),
            ("[1]", "[ns.s, ns.s]", "ns.s"),
            ("[1]", "[ns.s, ns.s]", "ns.s|tojson"),
            ("[1]", "[ns.s, ns.s]", "ns.s == ns.t"),
            ("(1,)", "(ns.s, ns.s)", "{ns.s: 1}"),
            ("{}", "{'a': ns.s, 'b': ns.s}", "ns.s"),
            ("9", "ns.s * ns.s", "1"),
            ("9", "ns.s ** 9", "1"),
        )
    ),
    "{% macro f(n) %}{% if n %}{{ f(n-1, varargs, varargs) }}{% else %}{{ {}[varargs] }}{% endif %}{% endmacro %}"
    "{{ f(60, 1) }}",
    "{{ '%200000000d' % 1 }}",
    "{{ '%*d' % (200000000, 1) }}",
    "{{ '%200000000d'|format(1) }}",
    "{{ '{:200000000d}'.format(1) }}",
    "{{ '{:{w}d}'.format(1, w=200000000) }}",
    "{{ '{a:200000000}'.format_map({'a': 1}) }}",
    "{{ 'a'|center(200000000) }}",
    "{{ 'a'.center(200000000) }}",
    "{{ 'a'.zfill(200000000) }}",
    "{{ '\t'.expandtabs(200000000) }}",
    "{{ (1).to_bytes(200000000, 'big')|length }}",
    "{{ range(99999)|join('a' * 9999) }}",
    "{{ ('a' * 9999).join(range(99999)|map('string')) }}",
    "{{ ('a' * 9999).replace('a', 'a' * 99999) }}",
    "{{ ('a' * 9999)|replace('a', 'a' * 99999) }}",
    "{{ ('a' * 99999).translate({97: 'a' * 99999}) }}",
    "{{ ('a\n' * 9999)|indent(999999) }}",
    "{{ [1]|tojson(indent=200000000) }}",
    "{{ [1]|batch(200000000, 0)|list }}",
    "{{ [1]|slice(200000000)|list }}",
    "{{ 1.5|round(200000000, 'ceil') }}",
    "{{ (['a' * 999999] * 9999)|sort|length }}",
    "{{ ([['a']] * 99999)|sum(start=[])|length }}",
    "{{ ('a' * 20000000)|list|length }}",
    "{{ ('a ' * 9999999).split()|length }}",
    "{{ ('a ' * 9999999)|title }}",
    "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% set y = x[i:] %}{% endfor %}",
    "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}",
    "{% set x = 'a' * 999999 %}{% for i in range(99999) %}{% set y %}{{ x }}{% endset %}{% endfor %}",
    "{% filter upper %}{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}{% endfilter %}",
    "{% set c = cycler('a' * 99999) %}{% for i in range(99999) %}{{ c.next() }}{% endfor %}",
    "{{ strftime_now('%999999999Y') }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "a" * 999_999,
]  # fmt: skip


def test_sixty_ways_out_lead_nowhere():
    assert len(ESCAPES) >= 60
    for source in ESCAPES:
        messages = [dict(message) for message in MESSAGES]
        try:
            text = ChatTemplate("escape", source).render(messages)
        except DataError:
            text = ""
        assert not any(
            word in text for word in ("<class", "function", "module", "root:", "object at", "environment")
        ), source
        assert messages == MESSAGES, source


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.mark.parametrize("source", BOMBS, ids=lambda source: source[:40])
def test_a_template_without_end_is_stopped(source):
    ChatTemplate("bomb", "{{ messages }}").render(MESSAGES)
    memory, start = peak_mib(), time.thread_time()
    with pytest.raises(
        (TemplateStopped, DataError),
        match=r"chat template bomb(, line \d)?: (stopped: .* limit|RecursionError|DataError)",
    ):
        ChatTemplate("bomb", source).render(MESSAGES)
    # Processor time: other programs on the machine must not make this fail. Without its limit it has no end.
    assert time.thread_time() - start < 6
    assert peak_mib() - memory < 256


def test_limits_name_the_template_its_line_and_what_to_do():
    with pytest.raises(TemplateStopped) as caught:
        ChatTemplate("mine.jinja", "{% for m in messages %}\n{{ m.content * 200000000 }}{% endfor %}").render(MESSAGES)
    assert str(caught.value) == (
        "chat template mine.jinja, line 2: stopped: it makes more text than the limit of 32,000,000 characters, and 32 "
        "for each of the conversation, for one rendering. Simplify it, or choose another: data.chat_template."
    )


def test_a_long_conversation_is_rendered_however_often_its_template_copies_it():
    source = (
        "{% set ns = namespace(text='') %}{% for m in messages %}"
        "{% set ns.text = ns.text + m.content|trim %}{% endfor %}"
        "{{ ns.text }}"
    )
    messages = [{"role": "user", "content": "word " * 100_000} for _ in range(30)]
    assert len(ChatTemplate("long", source).render(messages)) == 30 * 499_999


def test_a_bomb_leaves_nothing_behind_for_the_next_rendering():
    for _ in range(3):
        with pytest.raises(TemplateStopped, match="stopped"):
            ChatTemplate("bomb", BOMBS[0]).render(MESSAGES)
        assert ChatTemplate("fine", "{{ messages[0].content ~ '!' }}").render(MESSAGES) == "Hello there!"


def test_operators_mean_what_they_mean_without_limits():
    source = (
        "{{ 'a' ~ 1 ~ none }}|{{ 1 + 2 * 3 ** 2 % 7 }}|{{ 'a' + 'b' * 2 }}|{{ '%s-%03d' % ('x', 7) }}|"
        "{{ [1] + [2] * 2 }}|"
        "{{ 1 < 2 < 3 }}|{{ 'b' in 'abc' and 4 not in [1, 2] }}|{{ 'abc'[::-1] }}|{{ {'a': (1, 'x')}.a }}|"
        "{{ 'a,b'.split(',') }}|"
        "{% for x in [1, 2, 3] if x > 1 %}{{ loop.index }}/{{ loop.length }}{{ ',' if not loop.last }}{% endfor %}|"
        "{% for x in range(9)|select('gt', 6) %}{{ x }}{{ loop.length }}{% endfor %}|{{ '{:>4}'.format(7) }}|"
        "{{ ','.join(['a', 'b']|map('upper')) }}|{% for k, v in {'a': 1}.items() %}{{ k.upper() ~ v }}{% endfor %}"
    )
    assert ChatTemplate("t", source).render(MESSAGES) == (
        "a1None|5|abb|x-007|[1, 2, 2]|True|True|cba|(1, 'x')|['a', 'b']|1/2,2/2|7282|   7|A,B|A1"
    )
