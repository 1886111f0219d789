"""Arguments of `fastkv-run`: every flag that the parser knows, with values that fit and that do not; and files."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fuzz.edits import Bytes
from fuzz.running_command import OUTPUT, Command
from fuzz.strategies_values import mostly
from hypothesis import strategies as st

from fastkv.cache.catalogue import POLICIES, SETTINGS
from fastkv.cache.setting import settings_of
from fastkv.cli_flags import build_parser

PROMPT, PROMPTS, POLICY = "prompt.txt", "prompts.jsonl", "policy.json"
HOSTILE = [
    *(
        "",
        " ",
        "-",
        "--",
        "-1",
        "0",
        "1",
        "2",
        "3",
        "7",
        "8",
        "0.5",
        "1.0",
        "1.5",
        "1e3",
        "1e-3",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1_0",
        "٣",
        "²",
        "0x10",
        "True",
    ),
    *(
        "9" * 25,
        "9" * 400,
        "9" * 5000,
        "1" + "0" * 5000,
        "0." + "0" * 400 + "1",
        "2147483648",
        "9223372036854775808",
        "18446744073709551616",
    ),
    *(
        "auto",
        "none",
        "null",
        "yes",
        "no",
        "max",
        "sum",
        "forward",
        "1,2",
        "2,1",
        ",",
        "1,",
        "0.5,0.2",
        "0,1,2,3,4,5,6,7",
    ),
    *(
        "a",
        "é",
        "\udcff",
        "\ud800",
        "\n",
        "\r",
        "\x1b[2J",
        "\u202e",
        "%s",
        "%(prog)s",
        "{}",
        "a" * 5000,
        "a/b",
        "../x",
        "~",
        "~x/y",
        "*",
        "'",
        '"',
    ),
    *(
        "cpu",
        "cuda",
        "cuda:0",
        "cuda:-1",
        "cuda:" + "9" * 5000,
        "meta",
        "mps",
        "cpu:1",
        "xpu",
        "float64",
        "int8",
        "math",
        "flash",
        "cudnn",
    ),
    *(
        "model",
        "a-folder",
        "a-link",
        PROMPT,
        PROMPTS,
        POLICY,
        OUTPUT,
        "missing",
        "missing/x",
        "/dev/null",
        "/dev/full",
        "a-folder/new",
        "org/name",
        "org/na me",
        "https://x/y",
    ),
]
# Values that fit, by the flag. The names of files are those of `files`.
FITTING: dict[str, list[str]] = {
    "model": ["model"],
    "prompt": [PROMPT, PROMPT, "-"],
    "prompts": [PROMPTS],
    "policy": list(POLICIES),
    "policy_file": [POLICY],
    "output": [OUTPUT],
    "report": ["report.html"],
    "device": ["cpu", "auto"],
    "dtype": ["auto", "float32", "bfloat16", "float16"],
    "weights": ["int8"],
    "threads": ["1", "2"],
    "revision": ["main"],
    "attention": ["auto", "math"],
    "batch_size": ["1", "3"],
    "kv_memory": ["1", "100"],
    "max_tokens": ["1", "2", "5"],
    "temperature": ["0", "0.7", "2"],
    "top_k": ["0", "5", "1000"],
    "top_p": ["0.1", "1"],
    "min_p": ["0", "0.2", "1"],
    "repetition_penalty": ["0.5", "1.3"],
    "seed": ["0", "5", "9223372036854775807"],
    "stop": ["e", " ", "\n", "the", "é"],
    "system": ["be short", ""],
    "kv_len": ["8", "12", "20"],
    "tsp_len": ["10", "10,5"],
    "tsp_layer": ["0", "1", "0,1"],
    "tsp_rate": ["0.2", "0.5,0.2", "1"],
    "window": ["1", "4", "8"],
    "kernel": ["1", "7"],
    "queries": ["sum", "max"],
    "pooling": ["max", "avg", "forward"],
    "values": ["yes", "no"],
    "head_scores": ["scores.json"],
}
_SMALL = ["0", "1", "2", "4", "0.1", "0.5", "1.0"]  # what is tried for any other setting
_JUNK = ["--help", "--version", "-h", "extra", "--nothing", f"--promp={PROMPT}", "--prompt", "@x", "--", "-x", ""]
# What decides where prompts come from and answers go; it is drawn apart from the rest.
_ENDS = (
    *("model", "prompt", "prompts", "policy", "policy_file", "output", "help", "version"),
    *("batch_size", "kv_memory", "reuse_prefix"),
)
Arguments = st.SearchStrategy[list[str]]


def _flag(action: argparse.Action, values: st.SearchStrategy[str]) -> Arguments:
    """A flag, with a value if it takes one."""
    name = action.option_strings[-1]
    if action.nargs == 0:
        return st.just([name])
    return st.builds(lambda text, joined: [f"{name}={text}"] if joined else [name, text], values, st.booleans())


def _sound(action: argparse.Action) -> Arguments:
    tried = FITTING.get(action.dest) or [text for text in _SMALL if _reads(action, text)]
    return _flag(action, st.sampled_from(tried))


def _reads(action: argparse.Action, text: str) -> bool:
    read: Any = action.type or str
    try:
        read(text)
    except ValueError:
        return False
    return True


def _wild(action: argparse.Action) -> Arguments:
    characters = st.characters(exclude_characters="\0", exclude_categories=())  # which no argument can hold
    return _flag(action, st.sampled_from(HOSTILE) | st.text(characters, max_size=6))


@st.composite
def arguments(draw: st.DrawFn) -> tuple[str, ...]:
    """A command that fits, with none, one or two arguments that do not."""
    actions = [action for action in build_parser()._actions if action.option_strings]
    name = draw(st.sampled_from(sorted(POLICIES)))
    own = [action for action in actions if action.dest in settings_of(POLICIES[name])]
    others = [action for action in actions if action.dest not in (*SETTINGS, *_ENDS)]
    one, many = ["--prompt", PROMPT], ["--prompts", PROMPTS, "--output", OUTPUT]
    several = [many, [*many, "--batch-size", "2"], [*many, "--reuse-prefix"]]
    parts = [
        draw(st.sampled_from([["--model", "model"]] * 29 + [[]])),
        draw(st.sampled_from([one] * 4 + [*several, ["--prompt", "-"]] * 2 + [[]])),
        draw(st.sampled_from([["--max-tokens", "3"]] * 9 + [[]])),
        *draw(st.lists(st.sampled_from(others).flatmap(_sound), max_size=2)),
    ]
    if own and draw(st.booleans()):
        parts += [["--policy", name], *draw(st.lists(st.sampled_from(own).flatmap(_sound), max_size=2))]
    wild = mostly(st.sampled_from(actions).flatmap(_wild), st.sampled_from(_JUNK).map(lambda text: [text]), 5)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        parts.append(draw(wild))
    if draw(st.booleans()):
        parts.reverse()
    return tuple(text for part in parts for text in part)


def commands() -> st.SearchStrategy[Command]:
    return st.builds(Command, arguments(), files(), prompt_bytes())


def prompt_bytes() -> st.SearchStrategy[Bytes]:
    sound = [
        "hello world and hello again, the quick brown fox jumps over the lazy dog",
        "é日本\U0001f600",
        "a\r\n",
        "\n\n",
    ]
    odd = [
        b"",
        b"\n",
        b"\0",
        b"\xff",
        b"\xff\xfea\0",
        b"\xef\xbb\xbf",
        b"\xef\xbb\xbfa",
        b"\xed\xa0\x80",
        b"<s></s>",
        b"a\xc3",
    ]
    exact = st.sampled_from(odd) | st.binary(max_size=60)
    long = st.builds(Bytes, st.just(b""), st.sampled_from([b"hello ", b"x", b"\xf0\x9f\x98\x80"]), st.integers(1, 150))
    return mostly(st.sampled_from([text.encode() for text in sound]).map(Bytes), exact.map(Bytes) | long)


def files() -> st.SearchStrategy[dict[str, Bytes]]:
    return st.fixed_dictionaries(
        {PROMPT: prompt_bytes(), PROMPTS: prompt_lines(), POLICY: _policy_file(), "scores.json": _head_scores()},
        optional={OUTPUT: _earlier(), "report.html": st.just(Bytes(b"old"))},
    )


def prompt_lines() -> st.SearchStrategy[Bytes]:
    """JSONL: most lines are prompts; others are odd JSON or any bytes."""
    text = st.sampled_from(["hello", "hello world and hello again", "é", "", "\ud800", "\0", "a" * 600]) | st.text(
        max_size=10
    )
    name = st.text(max_size=3) | st.integers() | st.sampled_from([None, True, 1.5, [], "1", 10**400])
    prompt = st.fixed_dictionaries({"prompt": text}, optional={"id": name})
    odd = st.fixed_dictionaries({}, optional={"prompt": text | st.none() | st.integers(), "id": name, "x": st.none()})
    sound = st.just({"prompt": "hello again"}) | prompt
    written = mostly(sound, odd, 8).map(lambda value: json.dumps(value).encode())
    raw = st.sampled_from(
        [
            b"",
            b" ",
            b"{",
            b"null",
            b"[]",
            b"[" * 100_000,
            b'{"a":' * 50_000,
            b"\xff",
            b'{"prompt": "a"} {}',
            b'{"prompt": NaN}',
            b'{"prompt": "a", "prompt": "b"}',
            b"\xef\xbb\xbf",
            b'{"id": 1' + b"0" * 5000 + b', "prompt": "a"}',
            b"\r",
            b"\x0c",
        ]
    )
    line = mostly(written, raw | st.binary(max_size=20), 8)
    return st.builds(
        lambda lines, end: Bytes(end.join(lines) + end),
        st.lists(line, min_size=1, max_size=4),
        st.sampled_from([b"\n", b"\n", b"\r\n", b"\r"]),
    )


def _policy_file() -> st.SearchStrategy[Bytes]:
    value = st.sampled_from([0, 1, 8, 0.5, -1, None, True, "max", "yes", [], [0, 1], {}, 1e400, 10**400, "\ud800"])
    settings = st.dictionaries(st.sampled_from([*SETTINGS, "x", ""]), value, max_size=3)
    whole = st.fixed_dictionaries(
        {
            "kind": st.sampled_from(["fastkv-policy"] * 9 + ["x", 5]),
            "date": st.sampled_from(["2026-01-01", "\n", "", 5]),
            "files": st.sampled_from(["0", "", "\x1b"]),
            "policy": st.sampled_from([*POLICIES, "x", None]),
            "settings": settings | value,
        }
    )
    return mostly(whole.map(lambda values: Bytes(json.dumps(values).encode())), _noise(), 5)


def _head_scores() -> st.SearchStrategy[Bytes]:
    number = st.sampled_from([0, 0.0, 1, 0.5, -1, 1e400, 1e-320, float("nan"), None, "1", True, 10**400])
    table: st.SearchStrategy[Any] = st.lists(st.lists(number, min_size=2, max_size=2), min_size=2, max_size=2)
    odd = st.lists(st.lists(number, max_size=3), max_size=3) | number
    sound = st.just([[0.1, 0.4], [0.3, 0.2]])
    return (sound | table | odd).map(lambda values: Bytes(json.dumps(values).encode())) | st.binary(max_size=20).map(
        Bytes
    )


def _earlier() -> st.SearchStrategy[Bytes]:
    """What is in the output file already."""
    some = [
        b"",
        b"\n",
        b"{}\n",
        b'{"id": ',
        b'{"id": "1", "prompt_sha256": "0"}\n',
        b"[]\n",
        b"text\n",
        b"\xff\n",
        b'{"id": "1"',
        b"[" * 100_000 + b"\n",
        b"[" * 100_000,
    ]
    return st.sampled_from(some).map(Bytes) | _noise()


def _noise() -> st.SearchStrategy[Bytes]:
    return st.binary(max_size=20).map(Bytes)
