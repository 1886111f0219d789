"""Tokens that a folder names or adds beside its tokenizer: found, hidden and stopped at as `transformers` does it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from fastkv.errors import FastKVError
from fastkv.models.config import ModelConfig
from fastkv.models.fields import Fields
from fastkv.models.text import tokenizer as tokenizer_module
from fastkv.models.text.special_tokens import SpecialTokens

TURN = "<|turn|>"
NEXT = 258  # the id that a token gets which the vocabulary does not have yet
RULES = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
TEXTS = ["a<|turn|>b", "a <|turn|> b", "a  <|turn|>  b", "<|turn|>", "xa<|turn|>bx", "ends <|turn|>", "a\n<|turn|>\nb"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with a byte-level tokenizer.json of 256 bytes, <s> and </s>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({letter: place for place, letter in enumerate(letters)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "config.json", json.loads((ROOT / "examples/archive/model/config.json").read_text()))
    return tmp_path


@pytest.fixture
def pieces(stories_folder: Path, tmp_path: Path) -> Path:
    """A model folder with a tokenizer.model of 512 pieces."""
    for name in ("config.json", "tokenizer.model"):
        shutil.copyfile(stories_folder / name, tmp_path / name)
    return tmp_path


def write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def state(folder: Path, **files: dict[str, Any]) -> None:
    """state(folder, tokenizer_config={…}, added_tokens={…}) writes these files."""
    for name, values in files.items():
        write(folder / f"{name}.json", values)


def ours(folder: Path) -> tokenizer_module.Tokenizer:
    tokenizer = tokenizer_module.Tokenizer.from_pretrained(folder, ModelConfig.from_pretrained(folder))
    assert tokenizer is not None
    return tokenizer


def assert_agrees(folder: Path, texts: list[str], decodes: bool = True) -> None:
    transformers = pytest.importorskip("transformers")
    mine, theirs = ours(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in texts:
        ids = mine.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert not decodes or mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text


WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "in the table": {"tokenizer_config": {"added_tokens_decoder": {str(NEXT): {"content": TURN, **RULES}}}},
    "in the table, special": {
        "tokenizer_config": {"added_tokens_decoder": {str(NEXT): {"content": TURN, "special": True, **RULES}}}
    },
    "in the older table": {"tokenizer_config": {}, "added_tokens": {TURN: NEXT}},
    "in the older table, with a name": {"tokenizer_config": {"pad_token": TURN}, "added_tokens": {TURN: NEXT}},
    "with a name": {"tokenizer_config": {"eos_token": TURN}},
    "with a name, as an object": {
        "tokenizer_config": {"eos_token": {"__type": "AddedToken", "content": TURN, **RULES, "lstrip": True}}
    },
    "with a name of its own": {"tokenizer_config": {"image_token": TURN}},
    "in a list": {"tokenizer_config": {"additional_special_tokens": [TURN]}},
    "in an object": {"tokenizer_config": {"extra_special_tokens": {"turn_token": TURN}}},
    "in the older list of names": {"tokenizer_config": {}, "special_tokens_map": {"eos_token": TURN}},
    "in the older list, as an object": {
        "tokenizer_config": {"eos_token": "</s>"},
        "special_tokens_map": {"eos_token": {"content": TURN, **RULES, "rstrip": True}},
    },
    "nowhere": {"tokenizer_config": {}},
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_beside_a_tokenizer_json(folder: Path, way: str) -> None:
    """They used to be spelled out, letter by letter, unless the tokenizer.json itself had them."""
    state(folder, **WAYS[way])
    assert_agrees(folder, TEXTS)
    assert (NEXT in ours(folder).encode(TEXTS[0])) == (way != "nowhere")


@pytest.mark.parametrize("way", WAYS)
def test_tokens_beside_a_tokenizer_model(pieces: Path, way: str) -> None:
    """Every token of added_tokens.json used to count as special, so that the model's <tool> vanished."""
    files = json.loads(json.dumps(WAYS[way]).replace(str(NEXT), "512"))
    files["tokenizer_config"] |= {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    state(pieces, **files)
    assert_agrees(pieces, TEXTS)


@pytest.mark.parametrize("rule", ["lstrip", "rstrip", "single_word", "normalized", "special"])
@pytest.mark.parametrize("legacy", [True, False])
def test_the_rules_of_a_token_beside_a_tokenizer_model(pieces: Path, rule: str, legacy: bool) -> None:
    """A token may take the white space around it, or be one between words alone: that used to be ignored.

    For texts without a space after the token: there transformers 5 departs from the sentencepiece library.
    """
    token = {"content": TURN, **RULES, rule: True}
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True}
    state(pieces, tokenizer_config={**config, "added_tokens_decoder": {"512": token}})
    # Ours gives the text back as it was; a legacy tokenizer of transformers puts a space into it.
    assert_agrees(pieces, [text for text in TEXTS if not legacy or f"{TURN} " not in text], decodes=not legacy)


@pytest.mark.parametrize("wanted", [True, False, None])
def test_a_tokenizer_model_without_a_space_in_front(pieces: Path, wanted: bool | None) -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "bos_token": "<s>"}
    state(pieces, tokenizer_config={**config, **({} if wanted is None else {"add_prefix_space": wanted})})
    assert_agrees(pieces, ["Hello world", "a<s>b", "Once upon a time"])


@pytest.mark.parametrize("wanted", [True, False, None])
@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_json_with_a_space_in_front(folder: Path, wanted: bool | None, kind: str) -> None:
    """Of the classes that ask for it: the others take tokenizer.json as it is."""
    stated = {} if wanted is None else {"add_prefix_space": wanted}
    state(folder, tokenizer_config={"tokenizer_class": kind, **stated})
    assert_agrees(folder, ["Hello world", " Hello", "a</s>b"])


@pytest.mark.parametrize("scheme", [True, False])
def test_a_space_in_front_is_found_inside_a_sequence(folder: Path, scheme: bool) -> None:
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    steps = [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    library.pre_tokenizer = pre_tokenizers.Sequence(steps)
    library.save(str(folder / "tokenizer.json"))
    state(folder, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": scheme})
    plain = library.encode("Hello", add_special_tokens=False).ids
    assert ours(folder).encode("Hello") == library.encode(" " * scheme, add_special_tokens=False).ids + plain


@pytest.mark.parametrize("table", [True, False])
def test_the_older_list_of_names_ends_answers(folder: Path, table: bool) -> None:
    """special_tokens_map.json was never read: generation did not stop where it alone names the EOS."""
    config = {"added_tokens_decoder": {"257": {"content": "</s>", "special": True, **RULES}}} if table else {}
    state(folder, tokenizer_config=config, special_tokens_map={"eos_token": "</s>"})
    assert 257 in ours(folder).eos_ids


def test_the_newer_names_win_where_the_newer_table_is(folder: Path) -> None:
    """The older file is a leftover then."""
    table = {"257": {"content": "</s>", "special": True, **RULES}}
    config = {"eos_token": "</s>", "added_tokens_decoder": table}
    state(folder, tokenizer_config=config, special_tokens_map={"eos_token": "<s>"})
    assert 256 not in ours(folder).eos_ids
    state(folder, tokenizer_config={"eos_token": "</s>"}, special_tokens_map={"eos_token": "<s>"})
    assert 256 in ours(folder).eos_ids


def test_another_id_than_the_vocabulary_gives_is_told(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers goes by the vocabulary, and so does the model that was trained with it."""
    state(folder, tokenizer_config={"added_tokens_decoder": {"300": {"content": TURN, **RULES}}})
    assert_agrees(folder, TEXTS)
    assert "300" in caplog.text
    assert str(NEXT) in caplog.text


@pytest.mark.parametrize(
    ("file", "values", "names"),
    [
        ("added_tokens", {"e": -3}, "e"),
        ("added_tokens", {"e": True}, "e"),
        ("added_tokens", {"e": "3"}, "e"),
        ("added_tokens", {"e": 2**31}, "e"),
        ("added_tokens", {"e": 1.5}, "e"),
        ("added_tokens", {"\ud800": 3}, "added_tokens"),
        ("tokenizer_config", {"added_tokens_decoder": {"9" * 5000: {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config", {"added_tokens_decoder": {"٣": {"content": "a"}}}, "added_tokens_decoder"),
        ("tokenizer_config", {"added_tokens_decoder": {"5": {"content": "\udc00"}}}, "added_tokens_decoder"),
        ("tokenizer_config", {"added_tokens_decoder": {"5": {"content": "a", "lstrip": 1}}}, "lstrip"),
        ("tokenizer_config", {"bos_token": "\ud800"}, "bos_token"),
        ("tokenizer_config", {"pad_token": {"content": "\ud800"}}, "pad_token"),
        ("tokenizer_config", {"image_token": "\ud800"}, "image_token"),
        ("tokenizer_config", {"additional_special_tokens": ["\ud800"]}, "additional_special_tokens"),
        ("tokenizer_config", {"additional_special_tokens": "x"}, "additional_special_tokens"),
        ("special_tokens_map", {"eos_token": 5}, "eos_token"),
        ("special_tokens_map", {"eos_token": "\ud800"}, "eos_token"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "pieces"])
def test_a_broken_file_is_named(
    request: pytest.FixtureRequest, kind: str, file: str, values: dict[str, Any], names: str
) -> None:
    folder: Path = request.getfixturevalue(kind)
    state(folder, **{file: values})
    with pytest.raises(FastKVError, match=rf"{file}\.json") as caught:
        ours(folder)
    assert names in str(caught.value)


@pytest.mark.parametrize("nothing", [None, "", {"content": ""}])
@pytest.mark.parametrize("kind", ["folder", "pieces"])
def test_a_name_may_stand_for_no_token(request: pytest.FixtureRequest, kind: str, nothing: Any) -> None:
    folder: Path = request.getfixturevalue(kind)
    state(folder, tokenizer_config={"bos_token": nothing, "unk_token": nothing, "add_bos_token": True})
    tokenizer = ours(folder)
    assert tokenizer.bos_id is None
    assert tokenizer.encode("hello")


def test_an_object_without_a_text_is_no_token() -> None:
    with pytest.raises(FastKVError, match="eos_token"):
        SpecialTokens.of(Fields({"eos_token": {"lstrip": True}}, "tokenizer_config.json"))


@pytest.mark.parametrize(
    ("text", "warns"), [("hello", False), ("<s>hello", True), ("hello<s>", False), (" <s>hello", False)]
)
def test_a_second_bos_is_told(folder: Path, caplog: pytest.LogCaptureFixture, text: str, warns: bool) -> None:
    """It stays, as in transformers; a user who pasted the template's text finds out."""
    state(folder, tokenizer_config={"bos_token": "<s>", "add_bos_token": True})
    tokenizer = ours(folder)
    assert [tokenizer.encode(text)[0] for _ in range(3)] == [256] * 3
    assert caplog.text.count("BOS") == warns


def test_a_normalised_token_is_found_after_the_normalizer(folder: Path) -> None:
    library = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library.normalizer = normalizers.Lowercase()
    library.add_tokens([AddedToken("<t>", normalized=True)])
    library.save(str(folder / "tokenizer.json"))
    table = {"259": {"content": "<x>", **RULES, "normalized": True}, "260": {"content": "<y>", **RULES}}
    state(folder, tokenizer_config={"added_tokens_decoder": table})
    assert_agrees(folder, ["a<T>b<X>c<Y>d", "<t><x><y>"])


REAL = os.environ.get("FASTKV_REAL_MODELS")


@pytest.mark.skipif(REAL is None, reason="FASTKV_REAL_MODELS does not name the folder that holds the real models")
def test_a_real_vocabulary_and_one_token_more(tmp_path: Path) -> None:
    source = Path(str(REAL)) / "smollm2-135m"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    stated = json.loads((source / "tokenizer_config.json").read_text())
    state(tmp_path, tokenizer_config={**stated, "additional_special_tokens": [TURN]})
    assert ours(tmp_path).encode("a<|turn|>b") == [81, 49152, 82]
    (tmp_path / "chat_template.jinja").write_text("{{ unk_token }}Hello{{ pad_token }}")
    assert ours(tmp_path).encode_chat([{"role": "user", "content": "x"}]) == [0, 19556, 2]
    state(tmp_path, tokenizer_config={**stated, "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True})
    assert ours(tmp_path).encode("Hello world") == [38699, 905]
