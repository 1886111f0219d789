"""Chat templates: small Jinja programs of a grammar, and those that somebody wrote to do harm."""

from __future__ import annotations

from fuzz.edits import Bytes, Content, Edit, Put
from fuzz.strategies_values import mostly
from hypothesis import strategies as st

HOSTILE = [
    "{{ 'a' * 10**9 }}",
    "{{ ('a' * 10**5) * 10**5 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ 9 ** 99999999 }}",
    "{{ 10 ** 10000 }}",
    "{{ 7 ** 7 ** 7 % 3 }}",
    "{{ 2 << 10**9 }}",
    "{{ [0] * 10**9 }}",
    "{{ [0] * 10**8 | length }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ 'a' | center(999999999) }}",
    "{{ 'a' | indent(999999999, true) }}",
    "{{ 'a'.ljust(999999999) }}",
    "{{ 'a'.zfill(999999999) }}",
    "{{ ('a,' * 1000).replace('a', 'b' * 1000000) | length }}",
    "{{ 'a' | replace('a', 'a' * 99999999) | replace('a', 'aa') | length }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
    "{% for i in range(50000) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
    "{{ lipsum(n=9999, max=99999) }}",
    "{{ cycler(1, 2).__init__.__globals__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append({}) }}",
    "{{ raise_exception('no') }}",
    "{{ raise_exception(messages) }}",
    "{{ raise_exception() }}",
    "{{ raise_exception('a' * 10**7) }}",
    "{{ raise_exception('\\n\\x1b[2J') }}",
    "{{ strftime_now('%Y') }}",
    "{{ strftime_now('%' * 1001) }}",
    "{{ strftime_now('\\ud800') }}",
    "{{ strftime_now(5) }}",
    "{{ messages | tojson(indent=10**8) }}",
    "{{ messages | tojson(cls=5) }}",
    "{{ messages | tojson(separators=('a', 'b')) }}",
    "{{ x | tojson }}",
    "{{ range | tojson }}",
    "{{ '\\ud800' }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% import 'x' as x %}",
    "{% generation %}a{% endgeneration %}",
    "{% generation %}",
    "{% break %}",
    "{% continue %}",
    "{% block a %}{% endblock %}{% block a %}{% endblock %}",
    "{{ self }}",
    "{{ loop }}",
    "{{ caller() }}",
    "{% call f() %}{% endcall %}",
    "{% set x %}{% endset %}{{ x.y.z }}",
    "{% trans %}",
    "{{ 1 / 0 }}",
    "{{ messages | sort }}",
    "{{ messages | groupby('role') | list }}",
    "{{ messages | map('f') | list }}",
    "{{ messages | batch(10**9, 'x') | list | length }}",
    "{{ messages | slice(10**8) | list | length }}",
    "{{ 'a' | wordwrap(0) }}",
    "{{ 'a' | truncate(-1) }}",
    "{{ 5 | filesizeformat }}",
    "{{ 1e308 | round(400) }}",
    "{{ 10**400 | float }}",
    "{{ 10**5000 }}",
    "{{ 'a' | urlize }}",
    "{{ 'http://a' * 5000 | urlize }}",
    "{{ ('(' * 30000) | urlize | length }}",
    "{{ ('<' * 30000) | striptags | length }}",
    "{{ '9' * 100000 | int }}",
    "{{ ('9' * 5000) | int }}",
    "{{ {}.setdefault }}",
    "{{ dict(a=1).items().__class__ }}",
    "{{ joiner }}",
    "{{ namespace(a=1).b }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{% filter upper %}{% endfilter %}",
    "{% filter nothing %}{% endfilter %}",
    "{% raw %}{{{% endraw %}",
    "{# #",
    "{{",
    "{%",
    "}}",
    "{% autoescape true %}{% endautoescape %}",
    "",
]
NAMES = [
    "messages",
    "m",
    "x",
    "bos_token",
    "eos_token",
    "add_generation_prompt",
    "tools",
    "documents",
    "loop",
    "range",
    "namespace",
    "self",
    "true",
    "none",
]
FILTERS = [
    "trim",
    "upper",
    "length",
    "list",
    "tojson",
    "first",
    "last",
    "join",
    "string",
    "int",
    "float",
    "reverse",
    "sort",
    "unique",
    "sum",
    "abs",
    "dictsort",
    "items",
    "safe",
    "escape",
    "map(attribute='role')",
    "selectattr('role')",
    "default('d')",
    "batch(2)",
    "indent(3)",
    "center(9)",
    "truncate(3)",
    "pprint",
    "random",
    "wordcount",
    "title",
    "urlencode",
    "xmlattr",
    "forceescape",
    "attr('x')",
    "replace('a', 'b')",
    "format(1)",
    "groupby('role')",
    "min",
    "max",
    "round",
    "nothing",
]
TESTS = [
    "defined",
    "none",
    "string",
    "mapping",
    "iterable",
    "number",
    "odd",
    "divisibleby(0)",
    "in(messages)",
    "sameas(x)",
    "nothing",
    "callable",
    "filter('x')",
]
OPERATORS = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "<", ">", "in", "and", "or", "not in"]
_DEPTHS = [
    ("(", "1", ")"),
    ("[", "1", "]"),
    ("-", "1", ""),
    ("not ", "1", ""),
    ("{'a':", "1", "}"),
    ("1 + ", "1", ""),
    ("'a' ~ ", "1", ""),
    ("(1,", "1", ")"),
    ("", "x", ".a"),
    ("", "x", "[0]"),
    ("", "x", "|trim"),
    ("", "x", "()"),
    ("1 if 1 else ", "1", ""),
    ("1 < ", "1", ""),
]
_BLOCKS = [
    ("{% if x %}", "{% endif %}"),
    ("{% for a in b %}", "{% endfor %}"),
    ("{% macro a() %}", "{% endmacro %}"),
    ("{% set x %}", "{% endset %}"),
    ("{% call f() %}", "{% endcall %}"),
    ("{% filter upper %}", "{% endfilter %}"),
    ("{% generation %}", "{% endgeneration %}"),
    ("{{ 1 }}", ""),
    ("{% if 1 %}{% elif 2 %}", "{% endif %}"),
    ("{% set a = 1 %}", ""),
    ("{#", "#}"),
    ("{% raw %}", "{% endraw %}"),
    ("{% with %}", "{% endwith %}"),
    ("{% autoescape true %}", "{% endautoescape %}"),
]


def expressions() -> st.SearchStrategy[str]:
    leaves = st.sampled_from([*NAMES, "1", "0", "-1", "1.5", "10**9", "''", "'a'", "'role'", "[]", "{}", "'é'"])

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner),
            st.builds("{} | {}".format, inner, st.sampled_from(FILTERS)),
            st.builds("({} is {})".format, inner, st.sampled_from(TESTS)),
            st.builds("{}[{}]".format, inner, inner),
            st.builds(
                "{}.{}".format,
                inner,
                st.sampled_from(
                    ["role", "content", "x", "items()", "__class__", "upper()", "split()", "index", "first"]
                ),
            ),
            st.builds("({} if {} else {})".format, inner, inner, inner),
            st.builds("[{}, {}]".format, inner, inner),
            st.builds("{}[{}:{}:{}]".format, inner, inner, inner, inner),
            st.builds("{}({})".format, inner, inner),
            st.builds("{{{}: {}}}".format, inner, inner),
        )

    return st.recursive(leaves, larger, max_leaves=6)


def programs() -> st.SearchStrategy[str]:
    leaves = st.builds("{{{{ {} }}}}".format, expressions()) | st.sampled_from(
        ["text", "\n  ", "<s>", "{{ m['content'] }}"]
    )

    def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.builds("{{% for m in {} %}}{}{{% endfor %}}".format, expressions(), inner),
            st.builds("{{% for m in messages %}}{}{{% else %}}{}{{% endfor %}}".format, inner, inner),
            st.builds("{{% if {} %}}{}{{% else %}}{}{{% endif %}}".format, expressions(), inner, inner),
            st.builds("{{% set x = {} %}}{}".format, expressions(), inner),
            st.builds(
                "{{% set ns = namespace(x={}) %}}{{% set ns.x = {} %}}{}".format, expressions(), expressions(), inner
            ),
            st.builds("{{% macro x(m) %}}{}{{% endmacro %}}{{{{ x({}) }}}}".format, inner, expressions()),
            st.builds("{}{}".format, inner, inner),
            st.builds("{{%- if {} -%}}{}{{%- endif -%}}".format, expressions(), inner),
        )

    return st.recursive(leaves, larger, max_leaves=5)


def _deep() -> st.SearchStrategy[Bytes]:
    """An expression or a block inside itself, many times."""
    times = st.sampled_from([20, 95, 101, 250, 1000, 5000, 50_000])

    def expression(form: tuple[str, str, str], times: int) -> Bytes:
        before, middle, after = form
        ends = after.encode() * times
        return Bytes(b"{{ ", before.encode(), times, middle.encode() + ends + b" }}")

    def block(form: tuple[str, str], times: int) -> Bytes:
        return Bytes(b"", form[0].encode(), times, form[1].encode() * times)

    return st.builds(expression, st.sampled_from(_DEPTHS), times) | st.builds(block, st.sampled_from(_BLOCKS), times)


def template_edits() -> st.SearchStrategy[Edit]:
    file = st.just("chat_template.jinja")
    source = mostly(programs(), st.sampled_from(HOSTILE), 2)
    as_bytes = source.map(lambda text: Bytes(text.encode("utf-8", "replace")))
    config, key = st.just("tokenizer_config.json"), st.just(("chat_template",))
    named = st.lists(
        st.fixed_dictionaries({"name": st.sampled_from(["default", "tool", 5]), "template": source | st.integers()}),
        max_size=2,
    )
    return st.one_of(
        st.builds(Content, file, as_bytes),
        st.builds(Content, file, as_bytes),
        st.builds(Content, file, _deep()),
        st.builds(Put, config, key, source | named),
    )
