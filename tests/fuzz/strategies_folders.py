"""Model folders with a few hostile changes, and what is asked of the model."""

from __future__ import annotations

from typing import Any

from fuzz.base_folders import FAMILIES, INDEX, KINDS, WEIGHTS
from fuzz.edits import Bytes, Content, Cut, Edit, Special
from fuzz.running_folders import Folder
from fuzz.strategies_config import config_edits
from fuzz.strategies_template import template_edits
from fuzz.strategies_tokenizer import beside_edits, tokenizer_edits
from fuzz.strategies_weights import weight_edits
from hypothesis import strategies as st

FILES = [
    "config.json",
    "generation_config.json",
    WEIGHTS,
    INDEX,
    "model-00001-of-00002.safetensors",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
]
WHOLE = [
    Bytes(),
    Bytes(b"{}"),
    Bytes(b"[]"),
    Bytes(b"null"),
    Bytes(b"\xff\xfe{\0}\0"),
    Bytes(b"\xef\xbb\xbf{}"),
    Bytes(b'{"a": "\xff"}'),
    Bytes(b"\0" * 100),
    Bytes(b"", b"[", 200_000),
    Bytes(b"", b'{"a":', 100_000),
    Bytes(b'{"vocab_size": ', b"9", 5000, b"}"),
    Bytes(b'{"eos_token_id": ', b"9", 5000, b"}"),
    Bytes(b'{"a": 1, "a": 2}'),
    Bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    Bytes(b"<!DOCTYPE html>"),
    Bytes(b"", b"a", 3_000_000),
]
SPECIALS = [
    "missing",
    "missing",
    "folder",
    "pipe",
    "unreadable",
    "link to nowhere",
    "link to .",
    "link to config.json",
    "link to /dev/null",
    "link to /dev/zero",
    "link to tokenizer.json",
    "link to /proc/self/mem",
]


def file_edits() -> st.SearchStrategy[Edit]:
    file = st.sampled_from(FILES)
    return st.one_of(
        st.builds(Special, file, st.sampled_from(SPECIALS)),
        st.builds(Content, file, st.sampled_from(WHOLE) | st.binary(max_size=40).map(Bytes)),
        st.builds(Cut, file, st.floats(0, 1)),
    )


def prompts() -> st.SearchStrategy[str]:
    some = [
        "hello world",
        "",
        " ",
        "<s>",
        "</s><s>",
        "<tool>x",
        "<added>",
        "日本語 \U0001f600",
        "\0",
        "\ud800",
        "a" * 100,
        "\r\n\t",
        "▁",
        "1234",
    ]
    return st.sampled_from(some) | st.text(min_size=1, max_size=20)


def messages() -> st.SearchStrategy[tuple[dict[str, Any], ...]]:
    role = st.sampled_from(["user", "user", "assistant", "system", "tool", "", "é"])
    message = st.fixed_dictionaries({"role": role, "content": prompts()})
    return st.lists(message, max_size=3).map(tuple)


# What is changed, by the name that it has in the table of `make fuzz`.
EDITS: dict[str, st.SearchStrategy[Edit]] = {
    "config": config_edits(),
    "weights": weight_edits(),
    "tokenizer": tokenizer_edits(),
    "beside the tokenizer": beside_edits(),
    "template": template_edits(),
    "files": file_edits(),
}
EDITS["anything"] = st.one_of(*EDITS.values())


def folders(what: str) -> st.SearchStrategy[Folder]:
    """Folders with one change of this kind, or up to three."""
    edit = EDITS[what]
    edits = st.lists(edit, min_size=1, max_size=1) | st.lists(edit, min_size=1, max_size=3)
    return st.builds(
        Folder,
        st.sampled_from(["LlamaForCausalLM", *FAMILIES]),
        st.sampled_from(["json", "shards"] if what == "tokenizer" else ["json", *KINDS]),
        edits.map(tuple),
        prompts(),
        messages(),
        st.sampled_from([None, None, None, "int8"]),
    )
