"""A chat template runs in a process of its own, which ends when it takes too much; and what ends the model's turn."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

from fastkv import LLM, SamplingParams
from fastkv.errors import FastKVError, FaultError
from fastkv.models.text import template_process
from fastkv.models.text.native import guarded_call
from fastkv.models.text.template_process import TemplateProcess

HELLO = [{"role": "user", "content": "hello"}]
Template = Callable[[str], TemplateProcess]


@pytest.fixture
def render(tmp_path: Path) -> Callable[..., str]:
    """render(template, **variables)"""

    def call(source: str, **variables: Any) -> str:
        return TemplateProcess(source, tmp_path / "chat_template.jinja").render(variables, list(variables))

    return call


@pytest.mark.parametrize(
    "template",
    [
        "{{ 10000 ** 10000000 }}",  # a constant: worked out while compiling
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_ended(
    render: Callable[..., str], monkeypatch: pytest.MonkeyPatch, template: str
) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.1)
    with pytest.raises(FastKVError, match=r"chat_template\.jinja.*has ended"):
        render(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 9 }}",
        "{{ 'a' | center(10 ** 9) }}",
        "{{ '%0999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'a'.ljust(10 ** 9) }}",
        "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "{% for a in range(9999) %}{{ 'b' * 999 }}{% endfor %}",
    ],
)
def test_a_template_that_takes_too_much_is_refused(render: Callable[..., str], template: str) -> None:
    with pytest.raises(FastKVError, match=r"chat_template\.jinja"):
        render(template)


def test_a_long_conversation_is_no_fault_of_the_template(render: Callable[..., str]) -> None:
    text = "many words " * 2**19  # 6 MB
    assert render("{{ text | trim | replace('many', 'few') }}", text=text) == text.strip().replace("many", "few")


def test_the_process_is_used_again_and_replaced_when_it_is_gone(tmp_path: Path) -> None:
    process = TemplateProcess("{{ x }}", tmp_path / "t")
    assert process.render({"x": 1}, []) == "1"
    first = process._process
    assert process.render({"x": 2}, []) == "2"
    assert process._process is first
    assert first is not None
    first.kill()
    first.wait()
    assert process.render({"x": 3}, []) == "3"


def test_an_interrupt_leaves_no_answer_to_the_next_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply that nobody waited for used to be taken for that to the next messages, of another user perhaps."""
    process = TemplateProcess("{{ x }}", tmp_path / "t")
    asked = template_process._asked

    def interrupted(child: Any, line: bytes) -> bytes:
        child.stdin.write(line + b"\n")
        child.stdin.flush()
        raise KeyboardInterrupt

    monkeypatch.setattr(template_process, "_asked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.render({"x": "first"}, [])
    monkeypatch.setattr(template_process, "_asked", asked)
    assert process.render({"x": "second"}, []) == "second"


@pytest.mark.parametrize("python", ["/bin/cat", "/bin/true", "", None])
def test_what_is_no_python_is_told(
    render: Callable[..., str], monkeypatch: pytest.MonkeyPatch, python: str | None
) -> None:
    monkeypatch.setattr(template_process.sys, "executable", python)
    with pytest.raises(FastKVError, match="template"):
        render("x")


@pytest.mark.parametrize("variable", ["PYTHONIOENCODING", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME"])
def test_variables_of_python_change_nothing(
    render: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit")
    monkeypatch.setenv(variable, "utf-16" if variable == "PYTHONIOENCODING" else str(tmp_path))
    assert render("é{{ x }}", x=1) == "é1"


def test_the_process_ends_with_its_model(tmp_path: Path) -> None:
    process = TemplateProcess("{{ x }}", tmp_path / "t")
    process.render({"x": 1}, [])
    child = process._process
    assert child is not None
    assert child.poll() is None
    del process
    gc.collect()
    assert child.poll() is not None


def test_a_fork_gets_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = TemplateProcess("{{ x }}", tmp_path / "t")
    process.render({"x": 1}, [])
    first = process._process
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert process.render({"x": 2}, []) == "2"
    assert process._process is not first


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes"])
def test_messages_are_json(render: Callable[..., str], value: Any) -> None:
    with pytest.raises(FastKVError, match="messages"):
        render("{{ x }}", x=value)


def test_a_system_that_lets_no_process_start(
    render: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(template_process.sys, "executable", str(tmp_path / "no-python"))
    with pytest.raises(FastKVError, match="could not be started"):
        render("x")


# --- what ends the model's turn ---------------------------------------------------------------------------------------

TURNS = "{% for m in messages %}<|turn|>{{ m.role }} {{ m.content | trim }}END\n{% endfor %}<|turn|>assistant"
ONE_SIDED = "{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('no') }}{% endif %}x{% endfor %}"


@pytest.fixture
def chat_llm(tmp_path: Path) -> Callable[..., LLM]:
    """chat_llm(template) is the bundled model with the special tokens <|end|> and <|turn|>, and a template."""
    for name in ("config.json", "tokenizer.json", "model.safetensors", "generation_config.json"):
        shutil.copyfile(ROOT / "examples/archive/model" / name, tmp_path / name)
    stated = json.loads((ROOT / "examples/archive/model/tokenizer_config.json").read_text())
    stated["additional_special_tokens"] = ["<|end|>", "<|turn|>"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))

    def build(template: str) -> LLM:
        (tmp_path / "chat_template.jinja").write_text(template)
        return LLM(tmp_path, device="cpu")

    return build


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (TURNS.replace("END", "<|end|>"), True),
        (TURNS.replace("END", " <|end|>"), True),
        (TURNS.replace("END", ""), True),  # the next turn's first token
        (TURNS.replace("END", "."), False),
        (TURNS.replace("END", "\n\n "), True),
        (TURNS.replace("END", "\n### Next"), False),
        (ONE_SIDED, False),
    ],
)
def test_what_the_template_writes_after_an_answer_ends_it(
    chat_llm: Callable[..., LLM], template: str, ends: bool
) -> None:
    """A model writes its end of turn, which config.json may not know: it went on with the user's next turn."""
    llm = chat_llm(template)
    assert llm.tokenizer is not None
    ids = llm.chat(HELLO)
    known = {llm.tokenizer.special_id("<|end|>"), llm.tokenizer.special_id("<|turn|>")}
    assert bool(ids.ends) == ends
    assert ids.ends <= known
    eos = llm._request(ids, None, None).eos_ids
    assert eos == llm.tokenizer.eos_ids | ids.ends
    assert not llm._request(ids, SamplingParams(ignore_eos=True), None).eos_ids
    assert llm._request(list(ids), None, None).eos_ids == llm.tokenizer.eos_ids


def test_a_stop_string_that_is_a_special_token_stops_at_its_id(chat_llm: Callable[..., LLM]) -> None:
    """It has no text, so the string was never found."""
    llm = chat_llm("x")
    assert llm.tokenizer is not None
    end = llm.tokenizer.special_id("<|end|>")
    assert end is not None
    params = SamplingParams(stop=["<|end|>", "no token"], stop_token_ids=[7], ignore_eos=True)
    assert llm._request("hello", params, None).eos_ids == {end, 7}


@pytest.mark.parametrize("ids", ["7", 7, [-1], [1.5], [True], ["7"], None])
def test_stop_token_ids_are_ids(ids: Any) -> None:
    with pytest.raises(FastKVError, match="stop_token_ids"):
        SamplingParams(stop_token_ids=ids)


def test_arguments_reach_the_template_and_unused_ones_are_refused(chat_llm: Callable[..., LLM]) -> None:
    template = "{% if enable_thinking is false %}quiet{% else %}loud{% endif %}"
    llm = chat_llm(template)
    assert llm.tokenizer is not None
    assert llm.tokenizer.decode(llm.chat(HELLO)) == "loud"
    assert llm.tokenizer.decode(llm.chat(HELLO, enable_thinking=False)) == "quiet"
    with pytest.raises(FastKVError, match="enable_thought") as caught:
        llm.chat(HELLO, enable_thought=False)
    assert caught.value.setting == "chat_arg"
    for name in ("add_generation_prompt", "messages", "self"):
        with pytest.raises(FastKVError, match=name) as caught:
            llm.chat(HELLO, **{name: False})
        assert caught.value.setting == "chat_arg"


def test_a_piece_that_decodes_to_nothing_does_not_end_an_answer(stories_folder: Path, tmp_path: Path) -> None:
    """sentencepiece's mark of a space is no text at the beginning, and no special token."""
    for path in stories_folder.iterdir():
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}\n### Next\n{% endfor %}")
    llm = LLM(tmp_path, device="cpu")
    assert llm.tokenizer is not None
    assert "" in [llm.tokenizer.decode([token_id]) for token_id in llm.tokenizer.encode("### Next")[1:]]
    assert not llm.chat(HELLO).ends


@pytest.mark.parametrize("message", ["hello", "assistant", "a", "turn", "user"])
def test_a_message_that_is_a_word_of_the_template(chat_llm: Callable[..., LLM], message: str) -> None:
    """Its last place in the text is the template's: what the template wrote after it was found too short."""
    llm = chat_llm(TURNS.replace("END", "<|end|>"))
    usual = llm.chat([{"role": "user", "content": "unusual"}]).tail
    assert llm.chat([{"role": "user", "content": message}]).tail == usual > 1


def test_a_broken_template_does_not_stop_plain_prompts(chat_llm: Callable[..., LLM]) -> None:
    llm = chat_llm("{% for x in")
    assert llm.generate("hello", SamplingParams(max_tokens=1)).token_ids
    with pytest.raises(FastKVError, match="broken"):
        llm.chat(HELLO)


# --- prompts that are far too long ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompt", "chat"])
def test_a_prompt_that_is_far_too_long_is_not_encoded_whole(
    chat_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """30 MB for a context of 4,096 tokens took 42 s and 5 GB before they were refused."""
    llm = chat_llm("{{ messages[0].content }}")
    assert llm.tokenizer is not None
    encoded: list[int] = []
    encode = llm.tokenizer._vocabulary.encode
    monkeypatch.setattr(llm.tokenizer._vocabulary, "encode", lambda text: encoded.append(len(text)) or encode(text))
    text = "the quick brown fox " * 200_000
    with pytest.raises(FastKVError, match="characters") as caught:
        llm.generate(text) if kind == "prompt" else llm.chat([{"role": "user", "content": text}])
    assert caught.value.setting == "prompt"
    assert 0 < sum(encoded) < len(text) / 4


def test_a_long_prompt_of_few_tokens_is_encoded(chat_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Characters alone tell nothing: a token may be long."""
    llm = chat_llm("x")
    assert llm.tokenizer is not None
    monkeypatch.setattr("fastkv.models.text.tokenizer._SHORT", 10)
    plain = llm.tokenizer.encode("<|end|>" * 60)
    assert llm.tokenizer.encode("<|end|>" * 60, limit=30 + 1) == plain
    with pytest.raises(FastKVError):
        llm.tokenizer.encode("<|end|>" * 200, limit=10)


def test_a_decoder_that_fails_is_a_fault_in_one_line(
    chat_llm: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = chat_llm("x")
    assert llm.tokenizer is not None

    def fail(ids: list[int]) -> str:
        with guarded_call():
            raise BaseException("a panic")

    monkeypatch.setattr(llm.tokenizer._vocabulary, "decode", fail)
    with pytest.raises(FaultError, match=r"tokenizer\.json.*a panic"):
        llm.generate([5, 6], SamplingParams(max_tokens=2))
