"""Streamed text adds up to the text itself, and no piece holds half a character, for every kind of tokenizer."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
from places import OUTSIDE_MODELS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from fastkv.models.fields import Fields
from fastkv.models.text.detokenizer import Detokenizer
from fastkv.models.text.special_tokens import SpecialTokens
from fastkv.models.text.tokenizer import Vocabulary
from fastkv.models.text.tokenizer_json import JsonVocabulary
from fastkv.models.text.tokenizer_sentencepiece import SentencePieceVocabulary

BROKEN = "\ufffd"
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"

TEXTS = [
    "",
    "a",
    " ",
    "Hello world, hello again!",
    "  two leading spaces",
    "trailing spaces  ",
    "many   spaces    inside",
    "tabs\tand\nnewlines\n\n  indented\r\n",
    "\nbegins with a newline",
    " \n \n ",
    "日本語のテキスト",
    "日本語 hello 日本 world",
    "नमस्ते दुनिया",
    "e\u0301 a\u0308 o\u0302 combining",
    "Ünïcödé ßtraße",
    "\U0001f600",
    "\U0001f600 hello",
    "\U0001f600\U0001f600\U0001f600 hello",
    f"a family {FAMILY} and more",
    "flags \U0001f1eb\U0001f1f7\U0001f1e9\U0001f1ea end",
    "\u200bzero width\u200b",
    "hello \U0001f600日本 hello\n  \U0001f600 end",
]

CORPUS = [
    "hello world and hello again",
    "the quick brown fox jumps over the lazy dog",
    "two  spaces and   three, begins and ends",
    "many leading and trailing spaces inside combining text",
] * 20


def train_sentencepiece(path: Path, **options: object) -> None:
    written = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "remove_extra_whitespaces": False,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=written, **settings)
    path.write_bytes(written.getvalue())


def from_sentencepiece(folder: Path, **options: object) -> Vocabulary:
    train_sentencepiece(folder / "tokenizer.model", **options)
    return SentencePieceVocabulary(folder / "tokenizer.model", SpecialTokens.of(Fields({}, str(folder))))


def byte_level(folder: Path) -> Vocabulary:
    """As of Llama 3 and Qwen: tokens are runs of bytes, and often end inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "日本語日本語 \U0001f600\U0001f600\U0001f602"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return JsonVocabulary(folder / "tokenizer.json")


def byte_fallback(folder: Path) -> Vocabulary:
    """As of Llama 2 and TinyLlama: pieces, bytes for what has none, and a run of bytes decodes whole or not at all."""
    train_sentencepiece(folder / "source.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "source.model"))
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for i, piece in enumerate(vocabulary)
        if not (pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_byte(i))
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return JsonVocabulary(folder / "tokenizer.json")


def stories(folder: Path) -> Vocabulary:
    path = OUTSIDE_MODELS / "stories260K" / "tokenizer.model"
    if not path.is_file():
        pytest.skip("the stories260K model is not here")
    return SentencePieceVocabulary(path, SpecialTokens.of(Fields({}, str(folder))))


KINDS: dict[str, Callable[[Path], Vocabulary]] = {
    "stories": stories,
    "sentencepiece": from_sentencepiece,
    "sentencepiece, unigram": lambda folder: from_sentencepiece(folder, model_type="unigram"),
    "sentencepiece, no prefix": lambda folder: from_sentencepiece(folder, add_dummy_prefix=False),
    "sentencepiece, one space": lambda folder: from_sentencepiece(folder, remove_extra_whitespaces=True),
    "byte level": byte_level,
    "byte fallback": byte_fallback,
}


@pytest.fixture(scope="module", params=KINDS)
def vocabulary(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


class Letters:
    """A tokenizer whose ids are characters, 0 saying nothing. longest: the most that it had to decode at once."""

    def __init__(self) -> None:
        self.longest = 0

    def decode(self, ids: list[int]) -> str:
        self.longest = max(self.longest, len(ids))
        return "".join(chr(i) for i in ids if i)

    def bytes_of(self, token_id: int) -> bytes | None:
        return b"" if token_id else None


def stream(vocabulary: Vocabulary, prompt: list[int], ids: list[int]) -> tuple[list[str], str]:
    """The pieces of `ids` behind `prompt`, and what the end brings."""
    detokenizer = Detokenizer(vocabulary, prompt)
    return [detokenizer.push(i) for i in ids], detokenizer.flush()


def whole(vocabulary: Vocabulary, ids: list[int]) -> int:
    """How many of `ids` are left without those of a character that is unfinished at their end."""
    count = len(ids)
    while vocabulary.decode(ids[:count]).endswith(BROKEN):
        count -= 1
    return count


def cuts(vocabulary: Vocabulary) -> Iterator[tuple[list[int], int]]:
    """(ids, place of the cut) for every text and every cut between two tokens."""
    for text in TEXTS:
        ids = vocabulary.encode(text)
        for place in range(len(ids) + 1):
            yield ids, place


def test_the_texts_test_something(vocabulary: Vocabulary) -> None:
    """The tokenizers must cut characters apart, and give every text back, or the other tests prove little."""
    kept = sum(vocabulary.decode(vocabulary.encode(text)) == text for text in TEXTS)
    assert kept >= len(TEXTS) - 7  # one of the tokenizers folds runs of spaces
    assert sum(whole(vocabulary, ids[:place]) < place for ids, place in cuts(vocabulary)) > 50


def test_pieces_add_up_behind_any_prompt(vocabulary: Vocabulary) -> None:
    """decode(prompt) + the pieces == decode(all ids), wherever the prompt ends between two characters.

    Llama 2's tokenizer.json shows a run of bytes as broken where it is cut inside a character: with a fixed number of
    prompt tokens for context, a prompt that ended with two emoji cost the next word its space.
    """
    for ids, place in cuts(vocabulary):
        if whole(vocabulary, ids[:place]) == place:
            pieces, rest = stream(vocabulary, ids[:place], ids[place:])
            before = vocabulary.decode(ids[:place])
            assert before + "".join(pieces) == vocabulary.decode(ids), (ids, place)
            assert rest == ""
            assert not any(BROKEN in piece for piece in pieces), (ids, place)


@pytest.mark.parametrize("end", ["", ".", "!.", " a", "\U0001f600", "é", "\n"])
def test_a_long_prompt_in_a_script_without_tokens(vocabulary: Vocabulary, end: str) -> None:
    """Where each character is three bytes, and each byte a token, a window of any fixed sizes may begin inside one."""
    ids = vocabulary.encode("ሰላም" * 200 + end + " hello hello")
    behind = vocabulary.encode("ሰላም" * 200 + end)
    assert ids[: len(behind)] == behind
    pieces, _ = stream(vocabulary, behind, ids[len(behind) :])
    assert "".join(pieces) == " hello hello"


def test_a_character_that_the_prompt_begins_is_emitted_whole(vocabulary: Vocabulary) -> None:
    """A prompt of token ids may end inside a character: its text is the whole characters, and the rest is ours.

    A prompt that was nothing but the beginning of a character used to be forgotten, and its end came out broken.
    """
    for ids, place in cuts(vocabulary):
        done = whole(vocabulary, ids[:place])
        if done < place:
            pieces, rest = stream(vocabulary, ids[:place], ids[place:])
            before = vocabulary.decode(ids[:done])
            assert before + "".join(pieces) + rest == vocabulary.decode(ids), (ids, place)
            assert not any(BROKEN in piece for piece in pieces), (ids, place)


def test_an_unfinished_character_at_the_end_is_not_emitted(vocabulary: Vocabulary) -> None:
    for ids, place in cuts(vocabulary):
        pieces, rest = stream(vocabulary, [], ids[:place])
        expected = vocabulary.decode(ids[: whole(vocabulary, ids[:place])])
        assert "".join(pieces) + rest == expected, (ids, place)


def test_a_piece_comes_with_the_token_that_completes_it(vocabulary: Vocabulary) -> None:
    """No lag: after each token everything is out that the tokens so far have settled."""
    for text in TEXTS:
        ids = vocabulary.encode(text)
        shown = ""
        detokenizer = Detokenizer(vocabulary)
        for place, token_id in enumerate(ids, start=1):
            shown += detokenizer.push(token_id)
            if whole(vocabulary, ids[:place]) == place:
                assert shown == vocabulary.decode(ids[:place]), (ids, place)


def test_ids_that_say_nothing_change_nothing(vocabulary: Vocabulary) -> None:
    """Special tokens and unknown ids give no text, and do not cost their neighbours a space."""
    nothing = 10**6
    assert vocabulary.decode([nothing]) == ""
    for text in TEXTS:
        ids = vocabulary.encode(text)
        for place in range(len(ids)):
            if whole(vocabulary, ids[:place]) == place:
                pieces, _ = stream(vocabulary, [*ids[:place], nothing], [nothing, nothing, *ids[place:], nothing])
                assert vocabulary.decode(ids[:place]) + "".join(pieces) == vocabulary.decode(ids), (ids, place)


def test_bytes_that_are_no_text_do_not_stop_the_text(vocabulary: Vocabulary) -> None:
    """A model may write bytes that never become a character; what follows them still comes out."""
    half = vocabulary.encode("日")[:-1]
    ids = [*half, *vocabulary.encode("hello")]
    pieces, rest = stream(vocabulary, [], ids)
    assert "".join(pieces) == vocabulary.decode(ids)
    assert "".join(pieces).endswith("hello")
    assert rest == ""


def test_a_prompt_of_broken_bytes_is_survived(vocabulary: Vocabulary) -> None:
    half = vocabulary.encode("日")[-1:]
    pieces, rest = stream(vocabulary, half * 40, vocabulary.encode("hello"))
    assert ("".join(pieces) + rest).replace(BROKEN, "").strip() == "hello"


def test_each_step_decodes_a_short_window() -> None:
    """A long text costs no more a token than a short one: nothing is decoded from the beginning again."""
    letters = Letters()
    detokenizer = Detokenizer(letters, [97] * 1000)
    assert [detokenizer.push(98) for _ in range(1000)] == ["b"] * 1000
    assert letters.longest < 20


def test_tokens_that_say_nothing_cost_no_more_than_others() -> None:
    """A run of them used to be decoded as a whole at each of its tokens."""
    letters = Letters()
    detokenizer = Detokenizer(letters, [97])
    assert [detokenizer.push(0) for _ in range(1000)] == [""] * 1000
    assert detokenizer.push(98) == "b"
    assert letters.longest < 40


def test_a_replacement_character_that_the_model_means_is_text(vocabulary: Vocabulary) -> None:
    """U+FFFD has bytes of its own: it is not the sign of an unfinished character.

    An answer that ended with it lost it, and a run of them printed nothing, and slowed down with its length.
    """
    prompt = vocabulary.encode("hello")
    ids = vocabulary.encode(f"hello caf{BROKEN}")[len(prompt) :]
    pieces, rest = stream(vocabulary, prompt, ids)
    assert "".join(pieces) == f" caf{BROKEN}"
    assert rest == ""
    run = vocabulary.encode("hello" + BROKEN * 40)[len(prompt) :]
    pieces, _ = stream(vocabulary, prompt, run)
    assert "".join(pieces) == BROKEN * 40
    assert len("".join(pieces[: len(run) // 2])) >= 18


def test_what_says_nothing_may_stand_inside_a_character(vocabulary: Vocabulary) -> None:
    """A special token between the bytes of a character leaves it whole, as it does for the tokenizer."""
    nothing = 10**6
    ids = vocabulary.encode("hello 日 world")
    for place in range(len(ids) + 1):
        mixed = [*ids[:place], nothing, nothing, *ids[place:]]
        pieces, rest = stream(vocabulary, [], mixed)
        assert "".join(pieces) + rest == vocabulary.decode(ids), place


def test_only_an_unfinished_character_is_held_back(vocabulary: Vocabulary) -> None:
    """Bytes that begin character after character, and end none, come out with the next one."""
    begin = vocabulary.encode("日")[:-1]
    if not any(map(vocabulary.bytes_of, begin)):
        pytest.skip("a tokenizer without bytes")
    pieces, _ = stream(vocabulary, vocabulary.encode("hello"), begin * 20)
    assert "".join(pieces).count(BROKEN) >= 19
    assert max(map(len, pieces)) <= 3


def test_without_a_tokenizer_there_is_no_text() -> None:
    detokenizer = Detokenizer(None, [1, 2, 3])
    assert [detokenizer.push(i) for i in range(20)] == [""] * 20
    assert detokenizer.flush() == ""


def test_the_bundled_models_text_streams_whole(archive_folder: Path) -> None:
    """The same with the model that comes with the package."""
    vocabulary = JsonVocabulary(archive_folder / "tokenizer.json")
    for before, after in pairwise(TEXTS):
        prompt, ids = vocabulary.encode(before), vocabulary.encode(after)
        pieces, _ = stream(vocabulary, prompt, ids)
        assert before + "".join(pieces) == before + after
