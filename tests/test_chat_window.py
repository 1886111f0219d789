"""In a chat the observation window covers the end of the question, besides what the template writes after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fastkv import CLAA, LLM, FastKV, FullKV, SamplingParams, SnapKV, StructKV
from fastkv.models.text.chat import ChatIds, written_after

TEMPLATE = "{% for m in messages %}{{ m.content }}. {% endfor %}Answer of the assistant:"
LONG = {"role": "user", "content": "the letters of the alphabet are many " * 12}


@pytest.fixture(scope="module")
def chat_llm(archive_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """The bundled model with a template."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(archive_folder, folder)
    file = folder / "tokenizer_config.json"
    stated = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(stated | {"chat_template": TEMPLATE}))
    return LLM(folder, device="cpu")


@pytest.mark.parametrize(
    ("text", "messages", "expected"),
    [
        ("<u>Hello</u><a>", [{"role": "user", "content": "Hello"}], "</u><a>"),
        ("<u>Hello</u><a>", [{"role": "user", "content": "  Hello\n"}], "</u><a>"),  # templates strip
        ("<u>Hi</u><a>Hi</a><u>Hi</u><a>", [{"role": "user", "content": "Hi"}] * 2, "</u><a>"),  # the last one counts
        ("<u>HELLO</u><a>", [{"role": "user", "content": "Hello"}], ""),  # a template that rewrites
        ("<u></u><a>", [{"role": "user", "content": ""}], ""),
        ("<u></u><a>", [], ""),
    ],
)
def test_what_the_template_writes_after_the_last_message(
    text: str, messages: list[dict[str, str]], expected: str
) -> None:
    assert written_after(text, messages[-1]["content"] if messages else None) == expected


@pytest.mark.parametrize(
    ("policy", "n_tokens", "expected"),
    [
        (FastKV(), 2000, 16),
        (FastKV(window=4), 2000, 10),
        (FastKV(kv_len=24), 2000, 12),  # half of the budget is for other tokens
        (FastKV(kv_len=10), 2000, 10),  # never less than what was asked for
        (FastKV(min_tokens=1), 100, 10),
        (FastKV(tsp_len=12), 2000, 10),  # no room among the propagated tokens
        (StructKV(tsp_len=12), 2000, 8),
        (CLAA(tsp_len=24), 2000, 12),
        (SnapKV(), 2000, 14),
    ],
)
def test_the_window_grows_by_the_template(policy: FastKV | SnapKV, n_tokens: int, expected: int) -> None:
    covering = policy.covering(6, n_tokens)
    assert isinstance(covering, (FastKV, SnapKV))
    assert covering.window == expected
    assert policy.covering(0, n_tokens) is policy
    if isinstance(policy, FastKV):
        assert covering.tsp_window == (policy.tsp_window + 6 if policy.tsp_window else 0)


def test_other_policies_stay_as_they_are() -> None:
    policy = FullKV()
    assert policy.covering(6, 100) is policy


def test_a_chat_request_uses_it_and_says_so(chat_llm: LLM) -> None:
    params = SamplingParams(max_tokens=1)
    ids = chat_llm.chat([LONG])
    assert isinstance(ids, ChatIds)
    assert ids.tail > 0
    assert chat_llm.generate(ids, params).run.settings["window"] == 10 + ids.tail
    assert chat_llm.generate(list(ids), params).run.settings["window"] == 10
    assert chat_llm.generate([ids], params)[0].run.settings["window"] == 10 + ids.tail


def test_ids_with_more_after_them_have_no_template_at_their_end(chat_llm: LLM) -> None:
    more: list[int] = [5]
    assert not hasattr(chat_llm.chat([LONG]) + more, "tail")
