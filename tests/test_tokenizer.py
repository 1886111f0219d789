"""Text to ids and back as the model's own files say and as `transformers` reads them; chat templates in their cage."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from fastkv.errors import FastKVError
from fastkv.models.config import ModelConfig
from fastkv.models.text.tokenizer import Tokenizer

BOS, EOS, END_OF_TURN = 0, 1, 2  # of the small tokenizer.json
CORPUS = ["hello world and hello again", "the quick brown fox jumps over the lazy dog", "two  spaces\n\nand lines"] * 20

TEXTS = [
    "Hello world",
    "Once upon a time, there was a girl.",
    "tabs\tand\nnewlines\n\n  indented",
    "many   spaces    inside",
    "trailing space ",
    "日本語のテキスト",
    "emoji \U0001f600\U0001f600 and e\u0301",
    "\n",
    "1234567890 3.14",
    "<not> a </special> [token]",
    "x" * 200,
]

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "vocab_size": 1024,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}

Make = Callable[..., Tokenizer]


def write(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_pretrained(folder, ModelConfig.from_pretrained(folder))
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def trained() -> LibraryTokenizer:
    """A byte-level BPE with two special tokens, an end-of-turn token and a token that is added but not special."""
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<end_of_turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


@pytest.fixture
def make(trained: LibraryTokenizer, tmp_path: Path) -> Make:
    """make(bos, eos, config, generation, **tokenizer_config) gives a Tokenizer of a small tokenizer.json.

    bos, eos: whether the file's own post-processor puts them. config, generation: what those files state.
    """

    def build(
        bos: bool = True,
        eos: bool = False,
        config: dict[str, Any] | None = None,
        generation: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Tokenizer:
        tokenizer = LibraryTokenizer.from_str(trained.to_str())
        if bos or eos:
            single = f"{'<s> ' * bos}$A{' </s>' * eos}"
            ends = [("<s>", BOS), ("</s>", EOS)]
            tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        write(tmp_path / "config.json", **{**CONFIG, **(config or {})})
        if generation is not None:
            write(tmp_path / "generation_config.json", **generation)
        write(tmp_path / "tokenizer_config.json", **{"bos_token": "<s>", "eos_token": "</s>", **settings})
        return load(tmp_path)

    return build


@pytest.fixture
def make_pieces(tmp_path: Path) -> Make:
    """make_pieces({text: special}, **tokenizer_config) gives a Tokenizer of a small tokenizer.model. BOS 1, EOS 2."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=written,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(written.getvalue())

    def build(added: dict[str, bool] | None = None, **settings: Any) -> Tokenizer:
        size = pieces_of(tmp_path).vocab_size()
        extra = enumerate((added or {}).items(), start=size)
        table = {str(i): {"content": text, "special": special} for i, (text, special) in extra}
        write(tmp_path / "config.json", **{**CONFIG, "bos_token_id": 1, "eos_token_id": 2})
        ends = {"bos_token": "<s>", "eos_token": "</s>"}
        write(tmp_path / "tokenizer_config.json", **{**ends, "added_tokens_decoder": table, **settings})
        return load(tmp_path)

    return build


def pieces_of(folder: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


# --- BOS and EOS ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("stated", [None, False, True])
def test_bos_of_a_tokenizer_json(make: Make, trained: LibraryTokenizer, template: bool, stated: bool | None) -> None:
    """add_bos_token decides where it is stated; otherwise the file's own post-processor does."""
    settings = {} if stated is None else {"add_bos_token": stated}
    ids = make(bos=template, **settings).encode("hello")
    expected = template if stated is None else stated
    assert ids == [BOS] * expected + trained.encode("hello", add_special_tokens=False).ids


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("stated", [None, False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_eos_of_a_tokenizer_json(make: Make, template: bool, stated: bool | None, bos: bool) -> None:
    settings = {} if stated is None else {"add_eos_token": stated}
    ids = make(bos=bos, eos=template, **settings).encode("hello")
    assert (ids[-1] == EOS) == (template if stated is None else stated)
    assert (ids[0] == BOS) == bos
    assert BOS not in ids[1:]
    assert EOS not in ids[:-1]


@pytest.mark.parametrize("stated", [None, False, True])
def test_bos_of_a_tokenizer_model(make_pieces: Make, tmp_path: Path, stated: bool | None) -> None:
    """A tokenizer.model has no post-processor; Llama's rule is a BOS unless the configuration says otherwise."""
    settings = {} if stated is None else {"add_bos_token": stated}
    tokenizer = make_pieces(**settings)
    assert tokenizer.encode("hello") == [1] * (stated is not False) + pieces_of(tmp_path).encode("hello")


def test_eos_of_a_tokenizer_model(make_pieces: Make) -> None:
    assert make_pieces().encode("hello")[-1] != 2
    assert make_pieces(add_eos_token=True).encode("hello")[-1] == 2


@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>", "lstrip": False, "__type": "AddedToken"}])
def test_a_special_token_may_be_an_object(make: Make, bos: Any) -> None:
    tokenizer = make(bos=False, bos_token=bos, add_bos_token=True, config={"bos_token_id": None})
    assert tokenizer.bos_id == BOS
    assert tokenizer.encode("hello")[0] == BOS


@pytest.mark.parametrize("bos", [7, ["<s>"], {"content": 7}])
def test_a_special_token_of_another_type_is_refused(make: Make, bos: Any) -> None:
    with pytest.raises(FastKVError, match=r"tokenizer_config\.json.*bos_token"):
        make(bos_token=bos)


@pytest.mark.parametrize("end", ["bos", "eos"])
def test_an_end_that_is_asked_for_but_has_no_token_is_not_put(make: Make, tmp_path: Path, end: str) -> None:
    """The id in config.json is the model's, not the tokenizer's: it used to be put in front."""
    settings = {f"{end}_token": None, f"add_{end}_token": True}
    tokenizer = make(bos=False, config={"bos_token_id": END_OF_TURN, "eos_token_id": END_OF_TURN}, **settings)
    ids = tokenizer.encode("hello")
    assert ids == reference(tmp_path)("hello")["input_ids"]
    assert END_OF_TURN not in ids


@pytest.mark.parametrize(
    ("config", "generation", "eos_token", "expected"),
    [
        (EOS, None, None, {EOS}),
        ([EOS, END_OF_TURN], None, None, {EOS, END_OF_TURN}),
        (EOS, [EOS, END_OF_TURN], None, {EOS, END_OF_TURN}),
        (EOS, END_OF_TURN, None, {END_OF_TURN}),  # generation_config.json wins over config.json
        (EOS, None, "<end_of_turn>", {EOS, END_OF_TURN}),  # the tokenizer's joins them
        (None, None, "</s>", {EOS}),
        (None, None, None, set()),
        (EOS, None, "no such token", {EOS, 318}),  # which the vocabulary gets as its next one
    ],
)
def test_eos_ids(make: Make, config: Any, generation: Any, eos_token: str | None, expected: set[int]) -> None:
    stated = None if generation is None else {"eos_token_id": generation}
    tokenizer = make(config={"eos_token_id": config}, generation=stated, eos_token=eos_token)
    assert tokenizer.eos_ids == expected


# --- encoding and decoding --------------------------------------------------------------------------------------------


def test_special_tokens_are_never_in_decoded_text(make: Make) -> None:
    tokenizer = make()
    ids = tokenizer.encode("<s>hello<end_of_turn> world</s>")
    assert ids[:2] == [BOS, BOS]
    assert ids[-1] == EOS
    assert END_OF_TURN in ids
    assert tokenizer.decode(ids) == "hello world"
    assert tokenizer.decode([BOS, EOS, END_OF_TURN]) == ""


def test_added_tokens_that_are_not_special_are_text(make: Make) -> None:
    tokenizer = make()
    assert len(tokenizer.encode("<tool>")) == 2
    assert tokenizer.decode(tokenizer.encode("a<tool> b")) == "a<tool> b"


@pytest.mark.parametrize("unknown", [[320], [1023], [10**6], [2**31], [2**32], [2**40], [-1]])
def test_ids_outside_the_vocabulary_decode_to_nothing(make: Make, make_pieces: Make, unknown: list[int]) -> None:
    """A model's embedding is often larger than its tokenizer; and decode takes what it is given."""
    for tokenizer in (make(), make_pieces()):
        assert tokenizer.decode([400, *unknown]) == ""
        ids = tokenizer.encode("hello world")
        assert tokenizer.decode([*ids[:2], *unknown, *ids[2:]]) == "hello world"


@pytest.mark.parametrize("text", ["\ud800", "half \udc80 a character"])
def test_text_that_is_no_unicode_is_refused(make: Make, make_pieces: Make, text: str) -> None:
    """A lone surrogate, as Python makes of bytes that it cannot read, is a mistake of the caller's like any other."""
    for build in (make, make_pieces):
        tokenizer = build(chat_template="{{ messages[0]['content'] }}")
        with pytest.raises(FastKVError):
            tokenizer.encode(text)
        with pytest.raises(FastKVError):
            tokenizer.encode_chat([{"role": "user", "content": text}])


def test_an_encoder_that_fails_is_reported(make: Make, tmp_path: Path) -> None:
    """A tokenizer.json whose unknown token is not in its vocabulary loads, and fails at the first unknown letter."""
    make()
    broken = json.loads((tmp_path / "tokenizer.json").read_text())
    broken.update(
        model={"type": "WordLevel", "vocab": {"hello": 0}, "unk_token": "<unk>"},
        added_tokens=[],
        post_processor=None,
    )
    write(tmp_path / "tokenizer.json", **broken)
    with pytest.raises(FastKVError, match=r"tokenizer\.json"):
        load(tmp_path).encode("hello world")


def test_stored_truncation_and_padding_are_ignored(make: Make, tmp_path: Path) -> None:
    """They were for training batches: a prompt is neither cut nor filled up."""
    expected = make().encode("hello world " * 50)
    stored = LibraryTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_truncation(8)
    stored.enable_padding(length=1000)
    stored.save(str(tmp_path / "tokenizer.json"))
    assert load(tmp_path).encode("hello world " * 50) == expected
    assert len(expected) > 8


def test_tokenizer_json_wins(make: Make, make_pieces: Make) -> None:
    pieces = make_pieces().encode("hello world")
    both = make().encode("hello world")
    assert both != pieces
    assert both[0] == BOS


@pytest.mark.parametrize("kind", ["text", "directory", "dangling link"])
def test_a_broken_tokenizer_json_is_never_passed_over(make_pieces: Make, tmp_path: Path, kind: str) -> None:
    """Falling back to the tokenizer.model beside it would hide that the two differ; a download that lost a file leaves
    a link that leads nowhere.
    """
    make_pieces()
    path = tmp_path / "tokenizer.json"
    if kind == "text":
        path.write_text('{"version": "1.0"')
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "gone")
    with pytest.raises(FastKVError, match=r"tokenizer\.json"):
        load(tmp_path)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    write(tmp_path / "config.json", **CONFIG)
    assert Tokenizer.from_pretrained(tmp_path, ModelConfig.from_pretrained(tmp_path)) is None


# --- sentencepiece with tokens beside it ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*TEXTS, " leading", "   three leading", " "])
def test_plain_text_is_what_sentencepiece_says(make_pieces: Make, tmp_path: Path, text: str) -> None:
    tokenizer = make_pieces()
    assert tokenizer.encode(text)[1:] == pieces_of(tmp_path).encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_inside_a_text_are_found(make_pieces: Make, tmp_path: Path) -> None:
    """sentencepiece itself would spell "</s>" out letter by letter."""
    pieces = pieces_of(tmp_path)
    assert make_pieces().encode("hello</s>world") == [1, *pieces.encode("hello"), 2, *pieces.encode("world")]
    assert make_pieces().encode("</s></s>") == [1, 2, 2]


@pytest.mark.parametrize("legacy", [None, True, False])
def test_text_behind_a_special_token(make_pieces: Make, tmp_path: Path, legacy: bool | None) -> None:
    """Behind a special token, a legacy tokenizer begins anew, with a leading space; a newer one goes on as it was."""
    pieces = pieces_of(tmp_path)
    tokenizer = make_pieces(**({} if legacy is None else {"legacy": legacy}))
    fresh = pieces.encode("world")
    assert pieces.id_to_piece(fresh[0]).startswith("▁")
    behind = tokenizer.encode("hello</s>world")[len(pieces.encode("hello")) + 2 :]
    if legacy is False:
        assert not pieces.id_to_piece(behind[0]).startswith("▁")
        assert tokenizer.encode("</s> world")[2:] == fresh
    else:
        assert behind == fresh


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", ["a<tool>b", "<tool> hello", "hello <tool> world <tool>", "<tool><tool>\n<tool> "])
def test_added_tokens_beside_sentencepiece(make_pieces: Make, tmp_path: Path, legacy: bool, text: str) -> None:
    """They are single tokens, and the text around them comes back as it was.

    The run behind one was decoded as if a text began there, so that one of its spaces was lost.
    """
    tokenizer = make_pieces({"<tool>": False}, legacy=legacy)
    ids = tokenizer.encode(text)
    assert ids.count(pieces_of(tmp_path).vocab_size()) == text.count("<tool>")
    assert tokenizer.decode(ids) == text


def test_added_special_tokens_beside_sentencepiece(make_pieces: Make, tmp_path: Path) -> None:
    size = pieces_of(tmp_path).vocab_size()
    tokenizer = make_pieces({"<|end|>": True, "<|end|>.": True}, eos_token="<|end|>")
    assert tokenizer.encode("hello<|end|>")[-1] == size
    assert tokenizer.encode("hello<|end|>.")[-1] == size + 1  # the longer one
    assert tokenizer.decode(tokenizer.encode("hello<|end|> <|end|>.")).strip() == "hello"
    assert tokenizer.eos_ids == {2, size}


def test_added_tokens_json(make_pieces: Make, tmp_path: Path) -> None:
    """The older file for the same thing: of its tokens those are special that have a name elsewhere.

    All of them used to be, so that a <tool> that the model wrote vanished from its answer.
    """
    size = pieces_of(tmp_path).vocab_size()
    write(tmp_path / "added_tokens.json", **{"<pad>": size, "<tool>": size + 1})
    tokenizer = make_pieces(added_tokens_decoder=None, pad_token="<pad>")
    assert tokenizer.encode("hello<tool>")[-1] == size + 1
    assert tokenizer.decode([size, size + 1]) == "<tool>"


@pytest.mark.parametrize(
    "table",
    [{"x": {"content": "a"}}, {"5": "a"}, {"5": {"special": True}}, {"5": {"content": 5}}, {"-5": {"content": "a"}}],
)
def test_a_broken_table_of_added_tokens_is_refused(make_pieces: Make, table: dict[str, Any]) -> None:
    with pytest.raises(FastKVError, match=r"tokenizer_config\.json.*added_tokens_decoder"):
        make_pieces(added_tokens_decoder=table)


# --- the same as transformers -----------------------------------------------------------------------------------------


def reference(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_agrees(folder: Path, texts: list[str]) -> None:
    ours, theirs = load(folder), reference(folder)
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_the_bundled_tokenizer_is_as_transformers_reads_it(archive_folder: Path) -> None:
    specials = ["<|begin_of_text|>hello<|end_of_text|> world", " leading", "  two", " "]
    assert_agrees(archive_folder, [*TEXTS, *specials])


def test_a_tokenizer_json_is_as_transformers_reads_it(make: Make, tmp_path: Path) -> None:
    make()
    assert_agrees(tmp_path, [*TEXTS, "a<tool> b", "<s>hello</s> world<end_of_turn>", " leading"])


@pytest.mark.parametrize("rules", [{}, {"add_bos_token": False}, {"add_eos_token": True}, {"legacy": False}])
def test_a_tokenizer_model_is_as_transformers_reads_it(
    stories_folder: Path, tmp_path: Path, rules: dict[str, bool]
) -> None:
    """For texts that do not begin with a space: there transformers 5 departs from the sentencepiece library."""
    for name in ("config.json", "generation_config.json", "tokenizer.model"):
        shutil.copyfile(stories_folder / name, tmp_path / name)
    stated = json.loads((stories_folder / "tokenizer_config.json").read_text())
    write(tmp_path / "tokenizer_config.json", **{**stated, **rules})
    assert_agrees(tmp_path, [*TEXTS, "hello</s>world", "a</s>b</s>"])


# --- chat -------------------------------------------------------------------------------------------------------------

TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HELLO = [{"role": "user", "content": "hello world"}]
SYSTEM = [{"role": "system", "content": "be brief"}, *HELLO]


def rendered(make: Make, template: str, messages: list[dict[str, str]] = HELLO) -> str:
    """The text of a chat, by way of its ids; the special tokens are not in it."""
    tokenizer = make(chat_template=template)
    return tokenizer.decode(tokenizer.encode_chat(messages))


def test_a_chat_is_what_the_template_writes(make: Make, trained: LibraryTokenizer) -> None:
    ids = make(chat_template=TURNS).encode_chat(SYSTEM)
    text = "<s><|system|>\nbe brief</s>\n<|user|>\nhello world</s>\n<|assistant|>\n"
    assert ids == trained.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("written", [True, False])
def test_a_template_that_writes_bos_gets_no_second_one(make: Make, written: bool) -> None:
    template = TURNS if written else TURNS.replace("{{ bos_token }}", "")
    tokenizer = make(chat_template=template, add_bos_token=True, add_eos_token=True)
    ids = tokenizer.encode_chat(HELLO)
    assert ids.count(BOS) == written
    assert ids[-1] != EOS


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "pad_token", "unk_token", "image_token"])
def test_a_template_knows_the_tokens_that_have_a_name(make: Make, tmp_path: Path, name: str) -> None:
    """They used to be bos_token and eos_token alone; what has no name is nothing, as in transformers."""
    template = "{{ " + name + " }}hello"
    for token in ("<end_of_turn>", None):
        tokenizer = make(**{name: token}, chat_template=template)
        theirs = reference(tmp_path).apply_chat_template(HELLO, tokenize=True)["input_ids"]
        assert tokenizer.encode_chat(HELLO) == theirs
        assert (END_OF_TURN in theirs) == (token is not None)


def test_a_list_of_templates_has_a_default(make: Make) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert rendered(make, named) == "default"  # type: ignore[arg-type]
    assert rendered(make, {"other": "x", "default": "of an object"}) == "of an object"  # type: ignore[arg-type]


def test_chat_template_jinja_wins(make: Make, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("from the file ü", encoding="utf-8")
    assert rendered(make, "from the configuration") == "from the file ü"


def test_chat_template_json(make: Make, tmp_path: Path) -> None:
    """Where models that see keep theirs."""
    write(tmp_path / "chat_template.json", chat_template="of its own file")
    tokenizer = make()
    assert tokenizer.decode(tokenizer.encode_chat(HELLO)) == "of its own file"


@pytest.mark.parametrize("template", [[], [{"name": "other", "template": "x"}], ["x"], 7, {"other": "x"}])
def test_a_template_of_another_type_is_refused_in_a_chat(make: Make, template: Any) -> None:
    """Not while loading: a prompt that is no conversation needs none."""
    tokenizer = make(chat_template=template)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert tokenizer.has_chat
    with pytest.raises(FastKVError, match=r"tokenizer_config\.json.*chat_template"):
        tokenizer.encode_chat(HELLO)


def test_no_template(make: Make, tmp_path: Path) -> None:
    with pytest.raises(FastKVError, match="chat template") as caught:
        make().encode_chat(HELLO)
    assert str(tmp_path) in str(caught.value)


def test_a_template_that_writes_nothing_is_named(make: Make) -> None:
    """The user's prompt is not empty, so "the prompt is empty" sends him looking in the wrong place."""
    with pytest.raises(FastKVError, match="template"):
        make(chat_template="{% if false %}x{% endif %}").encode_chat(HELLO)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "hello world"}]'),
        ("{{ {'b': '<ü>', 'a': 1} | tojson }}", '{"b": "<ü>", "a": 1}'),  # not escaped for HTML, not sorted
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ ['ü'] | tojson(4) }}", '["\\u00fc"]'),  # its first argument is ensure_ascii
        ("{{ ['ü'] | tojson(false, 1) }}", '[\n "ü"\n]'),
        ("{{ 'ü' | tojson(ensure_ascii=True) }}", '"\\u00fc"'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=True, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}"
         "{% endfor %}", "02"),
        ("{% if true %}\n  x\n{% endif %}\ny", "  x\ny"),  # trim_blocks, lstrip_blocks
        ("{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}", "1"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(messages[0].role) }}", "<user>"),
        ("{{ tools is none and documents is none }}", "True"),
        ("{{ messages[0]['content'].split(' ')[1] | upper }}", "WORLD"),
        ("{{ undefined_name }}x", "x"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}", "hello world"),
    ],
)  # fmt: skip
def test_what_templates_may_use(make: Make, template: str, expected: str) -> None:
    assert rendered(make, template) == expected


def test_strftime_now(make: Make) -> None:
    assert rendered(make, "{{ strftime_now('%Y') }}") in {str(datetime.now().year), str(datetime.now().year - 1)}


@pytest.mark.parametrize("template", [TURNS, TURNS + "{{ messages | tojson }}", TURNS.replace("{{ bos_token }}", "")])
@pytest.mark.parametrize("messages", [HELLO, SYSTEM, [{"role": "user", "content": "<s> ü \U0001f600\n"}]])
def test_a_chat_is_as_transformers_renders_it(
    make: Make, tmp_path: Path, template: str, messages: list[dict[str, str]]
) -> None:
    ids = make(chat_template=template).encode_chat(messages)
    theirs = reference(tmp_path).apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    assert ids == (theirs if isinstance(theirs, list) else theirs["input_ids"])


@pytest.mark.parametrize(
    "behind", ["{% for x in messages", "{{ 1 +", "{% endif %}", "{{ x | no_such_filter }}", "{% no %}"]
)
def test_a_broken_template_is_named(make: Make, tmp_path: Path, behind: str) -> None:
    (tmp_path / "chat_template.jinja").write_text("fine so far\n" + behind)
    tokenizer = make()
    with pytest.raises(FastKVError, match=r"chat_template\.jinja.*broken"):
        tokenizer.encode_chat(HELLO)


NESTED = "{% for a in [1] %}" * 30 + "{% endfor %}" * 30


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only\nuser and assistant roles') }}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
        "{{ nothing.at_all }}",
        "{{ messages[0]['content'].no_such_method() }}",
        "{{ strftime_now(3) }}",
        "{{ strftime_now | tojson }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",  # RecursionError
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",  # RecursionError while compiling
        NESTED,  # SyntaxError: Python allows twenty nested blocks
        "{{ 'a' * 10 ** 18 }}",  # MemoryError
        "{{ 10 ** 5000 }}",  # ValueError while compiling: constants are worked out there
        "{{ 'a' * 10 ** 9 }}",  # of memory, while compiling
        "{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}",  # too long a text
        "{% set ns = namespace(s='ab') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}x",
    ],
    ids=lambda template: template[:40],
)
def test_a_template_that_fails_is_reported(make: Make, template: str) -> None:
    """A template is a program of someone else's: whatever goes wrong in it, the message names its file."""
    with pytest.raises(FastKVError, match="template") as caught:
        make(chat_template=template).encode_chat(HELLO)
    assert "tokenizer_config.json" in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__['sys'] }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ ''['__cl' ~ 'ass__'].__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_consts }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__['os'].system('id') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self._TemplateReference__context.environment }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages.append('x') }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{% extends 'config.json' %}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(make: Make, template: str) -> None:
    """It came with a model folder and may come from anyone: it reads its messages and writes text, nothing else."""
    messages = [dict(message) for message in HELLO]
    with pytest.raises(FastKVError, match="template"):
        make(chat_template="text " + template).encode_chat(messages)
    assert messages == HELLO
