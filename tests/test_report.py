"""The report page: every token has its text and its caches on it, and nothing of a prompt can act there."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastkv import LLM, FastKV, FastKVError, SamplingParams
from fastkv.console.files import check_writable
from fastkv.models.text.tokenizer_json import JsonVocabulary
from fastkv.report.data import Report, report_of
from fastkv.report.echoes import MOST, echoes
from fastkv.report.page import as_script_data, render, write_report
from fastkv.report.texts import token_texts

EVIL = (
    "</script><script>window.x=1</script><!-- <img src=x onerror=alert(1)> & \u2028 \u202edcba \x85 \ud800 @@script@@"
)


def a_report(texts: list[str], answer: str = "done", policy: str = "fastkv") -> Report:
    """3 layers x 2 heads, of which the last layer sees every second token and each cache keeps some."""
    n = len(texts)
    reach = torch.ones(3, n, dtype=torch.bool)
    reach[2] = torch.arange(n) % 2 == 0
    kept = torch.stack([torch.arange(n) % (cache + 2) == 0 for cache in range(6)]).unflatten(0, (3, 2))
    rows = [("policy", policy)]
    return Report(policy, texts, "t" * n, list(range(n)), {}, reach, kept & reach[:, None], answer, "stop", [], rows)


def data_of(page: str) -> dict[str, Any]:
    """What the page's script reads, found in the page as a browser finds it: up to the first end of a script."""
    return json.loads(page.split('id="data">')[1].split("</script")[0])


def bits(text: str, *shape: int) -> torch.Tensor:
    """A mask of the page, bool [*shape, N rounded up to 8]."""
    packed = torch.tensor(list(base64.b64decode(text)))
    return (packed[:, None] >> torch.arange(8) & 1).flatten().view(*shape, -1).bool()


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> JsonVocabulary:
    """Each id is one byte, so that most characters take several; <s> is special."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return JsonVocabulary(path)


def test_the_texts_of_tokens_add_up_and_pieces_of_characters_are_marked(byte_tokenizer: JsonVocabulary) -> None:
    ids = byte_tokenizer.encode("a<s>é 日\U0001f600z")
    texts, kinds = token_texts(byte_tokenizer, ids)
    assert kinds == "tsptt" + "pp" + "t" + "ppp" + "tt"
    assert texts == ["a", "", "", "é", " ", "", "", "日", "", "", "", "\U0001f600", "z"]


def test_no_character_is_lost_in_a_long_text(byte_tokenizer: JsonVocabulary) -> None:
    text = "日本語のテキスト, emoji \U0001f600 und Umlaute äöü. " * 20
    texts, _ = token_texts(byte_tokenizer, byte_tokenizer.encode(text))
    assert "".join(texts) == text


def test_bytes_that_never_become_a_character_show_as_such(byte_tokenizer: JsonVocabulary) -> None:
    broken = byte_tokenizer.encode("é")[:1]
    texts, kinds = token_texts(byte_tokenizer, [*broken * 5, *byte_tokenizer.encode(" end")])
    assert texts == ["", *["\ufffd"] * 4, "\ufffd ", "e", "n", "d"]
    assert kinds == "p" + "t" * 8


def test_echoes_are_the_longest_runs_of_words_that_the_prompt_has_once() -> None:
    texts = ["The", " code", " of", " the", " red", " fox", " is", " 1", "3", "9", "5", ".", " The", " fox", " ran"]
    assert echoes(" 1395.", texts) == [(7, 11)]
    assert echoes("It was the RED fox.", texts) == [(3, 6)]
    assert echoes("The fox", texts) == [(12, 14)]
    assert echoes("fox", texts) == []  # stands there twice
    assert echoes("", texts) == echoes("what else", texts) == []


def test_echoes_are_few() -> None:
    words = [f"word{i}" for i in range(100)]
    found = echoes(" x ".join(reversed(words)), [f" {word}" for word in words])
    assert len(found) == MOST
    assert found == sorted(found)


def test_a_report_of_a_real_request(archive_llm: LLM, archive_folder: Path) -> None:
    text = (archive_folder.parent / "prompt.txt").read_text().rstrip("\n")
    ids = archive_llm.tokenizer.encode(text)  # type: ignore[union-attr]
    pre = archive_llm.prefill(ids)
    out = archive_llm.generate(ids, SamplingParams(max_tokens=20))
    report = report_of(archive_llm, ids, pre.tokens, pre.kept, out)
    assert "".join(report.texts) == text
    assert report.names[ids[0]] == "BOS"
    assert (report.texts[0], report.kinds[0]) == ("", "s")
    for layer, (seen, kept) in enumerate(zip(pre.tokens, pre.kept, strict=True)):
        assert report.reach[layer].nonzero()[:, 0].tolist() == sorted(seen[0].tolist())
        for head, positions in enumerate(kept[0]):
            assert report.kept[layer, head].nonzero()[:, 0].tolist() == positions.tolist()
    ((first, end),) = report.echoes
    assert "".join(report.texts[first:end]).strip() == out.text.strip().rstrip(".")
    data = data_of(render(report))
    n_layers, n_heads, n_tokens = report.kept.shape
    assert torch.equal(bits(data["kept"], n_layers, n_heads)[..., :n_tokens], report.kept)
    assert torch.equal(bits(data["reach"], n_layers)[..., :n_tokens], report.reach)
    assert data["ids"] == ids
    assert dict(map(tuple, data["figures"]))["prompt"] == f"{len(ids):,} tokens"
    assert data["attention"] == list(out.metrics.layer_attention)
    assert len(data["attention"]) == n_layers


def test_without_a_tokenizer_tokens_have_no_texts(tiny_llm: LLM) -> None:
    ids = list(range(40))
    policy = FastKV(kv_len=12, tsp_len=20)
    pre = tiny_llm.prefill(ids, policy)
    report = report_of(tiny_llm, ids, pre.tokens, pre.kept, tiny_llm.generate(ids, SamplingParams(max_tokens=2)))
    assert report.texts == [""] * 40
    assert report.kinds == "s" * 40
    assert report.kept.sum(-1).unique().tolist() == [12]
    assert report.reach.sum(-1).tolist() == [40, 40, 40, 20, 20, 20]


def test_a_batch_is_refused(tiny_llm: LLM) -> None:
    pre = tiny_llm.prefill(torch.arange(20).view(2, 10))
    out = tiny_llm.generate(list(range(10)), SamplingParams(max_tokens=1))
    with pytest.raises(FastKVError, match="one prompt, not a batch of 2"):
        report_of(tiny_llm, list(range(10)), pre.tokens, pre.kept, out)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 300])
def test_masks_survive_the_way_to_the_page(length: int) -> None:
    report = a_report(["x"] * length)
    data = data_of(render(report))
    assert bits(data["kept"], 3, 2).shape[-1] == -(-length // 8) * 8
    assert torch.equal(bits(data["kept"], 3, 2)[..., :length], report.kept)
    assert torch.equal(bits(data["reach"], 3)[..., :length], report.reach)
    assert not bits(data["kept"], 3, 2)[..., length:].any()


def test_nothing_of_a_prompt_becomes_markup() -> None:
    report = a_report([EVIL, EVIL], answer=EVIL, policy="<b>fastkv")
    page = render(report)
    harmless = render(a_report(["x", "x"]))
    for mark in ("<", ">", "</script", "<!--"):
        assert page.count(mark) == harmless.count(mark), mark
    assert not re.search(r"[\x85\u2028\u202e\ud800-\udfff]", page)
    page.encode("utf-8")
    data = data_of(page)
    assert data["texts"] == [EVIL, EVIL]
    assert data["answer"] == EVIL
    assert "<title>What &lt;b&gt;fastkv kept of 2 tokens</title>" in page


def test_script_data_is_json_whatever_it_holds() -> None:
    text = "".join(map(chr, [*range(0x3000), 0xFEFF, 0xDFFF, 0xD800, 0x1F600]))
    assert json.loads(as_script_data(text)) == text


def test_the_page_allows_itself_and_nothing_else() -> None:
    page = render(a_report(["x"]))
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    assert rules.keys() == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    for kind, element in (("script-src", r"<script>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
        (own,) = re.findall(element, page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
        assert rules[kind] == f"'sha256-{digest}'"
    assert {rules["default-src"], rules["base-uri"], rules["form-action"]} == {"'none'"}


def test_the_page_names_no_other_file_and_no_dangerous_function() -> None:
    page = render(a_report(["x"]))
    assert not re.search(r"https?:|//\w+\.|@import|url\(|\ssrc=|\shref=|\son\w+=", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", page)


def test_writing(tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    check_writable(path, "report")
    assert not path.exists()
    write_report(path, a_report(["é", "x"]))
    before = path.read_bytes()
    assert "é".encode() in before
    check_writable(path, "report")
    assert path.read_bytes() == before
    link = tmp_path / "link.html"
    link.symlink_to(tmp_path / "later.html")
    check_writable(link, "report")
    assert link.is_symlink()
    assert not link.exists()


@pytest.mark.parametrize(
    "act", [lambda path: check_writable(path, "report"), lambda path: write_report(path, a_report(["x"]))]
)
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("missing/out.html", "No such file or directory"),
        ("file/out.html", "Not a directory"),
        (".", "Is a directory"),
        ("a" * 300, "File name too long"),
    ],
)
def test_a_path_that_cannot_be_written(tmp_path: Path, act: Callable[[Path], None], name: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FastKVError, match=rf"cannot be written \({why}\)") as caught:
        act(tmp_path / name)
    assert caught.value.setting == "report"
