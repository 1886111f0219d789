"""Changes to tokenizer.json by its structure: every kind of part that the tokenizers library knows, with hostile
parameters; and to the files beside it."""

from __future__ import annotations

from typing import Any

from fuzz.edits import Edit, Flip, Put, PutSomewhere
from fuzz.strategies_values import integers, mostly, numbers, scalars, texts, values
from hypothesis import strategies as st

FILE = "tokenizer.json"
REGEXES = [
    "",
    "a",
    ".",
    ".*",
    "\\s+",
    "(a+)+$",
    "(?:)",
    "(?=a)",
    "[",
    "\\",
    "(" * 50,
    "a{100000}",
    "(?<=a+)b",
    "\\p{L}+",
    "(?i)HELLO",
    "(.)\\1",
    "$",
    "^",
    "\\d{1,3}",
    "(?>a*)*b",
    "((a*)*)*$",
]
WORDS = [
    "",
    " ",
    "a",
    "h",
    "he",
    "Ġ",
    "▁",
    "é",
    "\0",
    "<s>",
    "</s>",
    "hello",
    "aa",
    "日",
    "\U0001f600",
    "\ufffd",
    "##",
    "##a",
]
BEHAVIOURS = ["Removed", "Isolated", "MergedWithPrevious", "MergedWithNext", "Contiguous"]


def words() -> st.SearchStrategy[Any]:
    return mostly(st.sampled_from(WORDS), texts(), 5)


def _pattern() -> st.SearchStrategy[Any]:
    return st.builds(lambda text: {"String": text}, words()) | st.builds(
        lambda text: {"Regex": text}, st.sampled_from(REGEXES)
    )


def _part(kind: str, **parameters: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """An object of this type; now and then with a parameter missing or of another type."""
    sound = st.fixed_dictionaries({"type": st.just(kind), **parameters})
    odd = st.fixed_dictionaries(
        {"type": st.just(kind)}, optional={name: value | scalars() for name, value in parameters.items()}
    )
    return mostly(sound, odd) if parameters else sound


def _several(parts: st.SearchStrategy[Any], name: str) -> st.SearchStrategy[Any]:
    sequence = st.fixed_dictionaries({"type": st.just("Sequence"), name: st.lists(parts, max_size=4)})
    nested = st.fixed_dictionaries({"type": st.just("Sequence"), name: st.lists(sequence, max_size=2)})
    return mostly(parts, sequence | nested, 1)


def _counts() -> st.SearchStrategy[int]:
    return st.integers(0, 5) | integers()


def normalizers() -> st.SearchStrategy[Any]:
    yes = st.booleans()
    parts = st.one_of(
        *(_part(kind) for kind in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt", "ByteLevel")),
        _part("Strip", strip_left=yes, strip_right=yes),
        _part("Replace", pattern=_pattern(), content=words()),
        _part("Replace", pattern=_pattern(), content=words()),
        _part("Prepend", prepend=words()),
        _part("BertNormalizer", clean_text=yes, handle_chinese_chars=yes, strip_accents=yes | st.none(), lowercase=yes),
        _part("Precompiled", precompiled_charsmap=st.sampled_from(["", "AAAA", "ALQCAACEAAA=", "!"])),
    )
    bomb = st.builds(lambda part, times: {"type": "Sequence", "normalizers": [part] * times}, parts, st.integers(2, 40))
    return _several(parts, "normalizers") | bomb


def pre_tokenizers() -> st.SearchStrategy[Any]:
    yes = st.booleans()
    parts = st.one_of(
        *(_part(kind) for kind in ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "UnicodeScripts")),
        _part("ByteLevel", add_prefix_space=yes, trim_offsets=yes, use_regex=yes),
        _part("CharDelimiterSplit", delimiter=words()),
        _part(
            "Metaspace",
            replacement=words(),
            prepend_scheme=st.sampled_from(["always", "never", "first", "?"]),
            split=yes,
            add_prefix_space=yes,
        ),
        _part("Split", pattern=_pattern(), behavior=st.sampled_from([*BEHAVIOURS, "?"]), invert=yes),
        _part("Punctuation", behavior=st.sampled_from(BEHAVIOURS)),
        _part("Digits", individual_digits=yes),
        _part("FixedLength", length=_counts()),
    )
    return _several(parts, "pretokenizers")


def post_processors() -> st.SearchStrategy[Any]:
    yes = st.booleans()
    token = st.tuples(words(), _counts()).map(list)
    piece = st.one_of(
        st.builds(lambda name, kind: {"SpecialToken": {"id": name, "type_id": kind}}, words(), _counts()),
        st.builds(lambda name, kind: {"Sequence": {"id": name, "type_id": kind}}, st.sampled_from("ABC"), _counts()),
    )
    entry = st.builds(
        lambda name, ids: {"id": name, "ids": ids, "tokens": [name] * len(ids)},
        words(),
        st.lists(_counts(), max_size=3),
    )
    odd_entry = st.builds(
        lambda name, ids, tokens: {"id": name, "ids": ids, "tokens": tokens},
        words(),
        st.lists(_counts(), max_size=3),
        st.lists(words(), max_size=3),
    )
    table = st.lists(entry | odd_entry, max_size=3).map(lambda entries: {str(one["id"]): one for one in entries})
    parts = st.one_of(
        _part("BertProcessing", sep=token, cls=token),
        _part("RobertaProcessing", sep=token, cls=token, trim_offsets=yes, add_prefix_space=yes),
        _part("ByteLevel", add_prefix_space=yes, trim_offsets=yes, use_regex=yes),
        _part(
            "TemplateProcessing",
            single=st.lists(piece, max_size=4),
            pair=st.lists(piece, max_size=3),
            special_tokens=table,
        ),
    )
    return _several(parts, "processors")


def decoders() -> st.SearchStrategy[Any]:
    yes = st.booleans()
    parts = st.one_of(
        *(_part(kind) for kind in ("Fuse", "ByteFallback")),
        _part("BPEDecoder", suffix=words()),
        _part("ByteLevel", add_prefix_space=yes, trim_offsets=yes, use_regex=yes),
        _part("WordPiece", prefix=words(), cleanup=yes),
        _part(
            "Metaspace", replacement=words(), prepend_scheme=st.sampled_from(["always", "never", "first"]), split=yes
        ),
        _part("CTC", pad_token=words(), word_delimiter_token=words(), cleanup=yes),
        _part("Replace", pattern=_pattern(), content=words()),
        _part("Strip", content=words(), start=_counts(), stop=_counts()),
    )
    return _several(parts, "decoders")


def models() -> st.SearchStrategy[Any]:
    yes = st.booleans()
    vocabulary = st.dictionaries(st.sampled_from([word for word in WORDS if word]), _counts(), max_size=8)
    scored = st.lists(st.tuples(words(), numbers()).map(list), max_size=6)
    merges = st.lists(st.tuples(words(), words()).map(list) | st.sampled_from(["h e", "a a", "a", ""]), max_size=4)
    return st.one_of(
        _part("WordLevel", vocab=vocabulary, unk_token=words()),
        _part(
            "WordPiece",
            vocab=vocabulary,
            unk_token=words(),
            continuing_subword_prefix=words(),
            max_input_chars_per_word=_counts(),
        ),
        _part("Unigram", vocab=scored, unk_id=_counts() | st.none(), byte_fallback=yes),
        _part(
            "BPE",
            vocab=vocabulary,
            merges=merges,
            byte_fallback=yes,
            ignore_merges=yes,
            fuse_unk=yes,
            dropout=numbers() | st.none(),
            unk_token=words() | st.none(),
        ),
    )


def added_tokens() -> st.SearchStrategy[Any]:
    yes = st.booleans()
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    token = st.fixed_dictionaries(
        {"id": _counts() | st.integers(300, 345), "content": words(), **dict.fromkeys(flags, yes)}
    )
    return st.lists(token, max_size=4)


def tokenizer_edits() -> st.SearchStrategy[Edit]:
    file = st.just(FILE)
    bpe = st.sampled_from(
        [
            "dropout",
            "unk_token",
            "continuing_subword_prefix",
            "end_of_word_suffix",
            "fuse_unk",
            "byte_fallback",
            "ignore_merges",
        ]
    )
    limits = st.fixed_dictionaries(
        {},
        optional={
            "max_length": _counts(),
            "strategy": st.sampled_from(["LongestFirst", "BatchLongest", {"Fixed": 10**9}, "?"]),
            "stride": _counts(),
            "direction": st.sampled_from(["Left", "Right"]),
            "pad_to_multiple_of": _counts(),
            "pad_id": _counts(),
            "pad_type_id": _counts(),
            "pad_token": words(),
        },
    )
    return st.one_of(
        st.builds(Put, file, st.just(("normalizer",)), normalizers()),
        st.builds(Put, file, st.just(("pre_tokenizer",)), pre_tokenizers()),
        st.builds(Put, file, st.just(("post_processor",)), post_processors()),
        st.builds(Put, file, st.just(("decoder",)), decoders()),
        st.builds(Put, file, st.just(("model",)), models()),
        st.builds(Put, file, st.just(("added_tokens",)), added_tokens()),
        st.builds(Put, file, st.tuples(st.just("model"), bpe), words() | scalars()),
        st.builds(Put, file, st.tuples(st.sampled_from(["truncation", "padding"])), limits),
        st.builds(
            Put,
            file,
            st.tuples(st.just("model"), st.just("vocab"), words().filter(lambda word: isinstance(word, str))),
            _counts() | values(),
        ),
        st.builds(PutSomewhere, file, st.integers(0, 600), values()),
        st.builds(Flip, file, st.integers(0, 10_000), st.integers(1, 255)),
    )


def beside_edits() -> st.SearchStrategy[Edit]:
    """tokenizer_config.json, special_tokens_map.json, added_tokens.json, and the bytes of tokenizer.model."""
    config = st.just("tokenizer_config.json")
    names = [
        "bos_token",
        "eos_token",
        "unk_token",
        "add_bos_token",
        "add_eos_token",
        "legacy",
        "chat_template",
        "added_tokens_decoder",
        "model_max_length",
        "tokenizer_class",
    ]
    token = words() | st.builds(lambda content: {"content": content}, words() | scalars())
    key = st.sampled_from(
        ["", "0", "1", "5", "330", "339", "340", "-1", "²", "٣", "1e3", "9" * 30, "9" * 5000]
    ) | st.text(max_size=3)
    entry = st.fixed_dictionaries({"content": words()}, optional={"special": st.booleans() | scalars()}) | values()
    return st.one_of(
        st.builds(Put, config, st.sampled_from([("bos_token",), ("eos_token",)]), token),
        st.builds(
            Put,
            config,
            st.sampled_from([("add_bos_token",), ("add_eos_token",), ("legacy",)]),
            st.booleans() | scalars(),
        ),
        st.builds(Put, config, st.tuples(st.sampled_from(names)), values()),
        st.builds(Put, config, st.tuples(st.just("added_tokens_decoder"), key), entry),
        st.builds(Put, st.just("added_tokens.json"), st.tuples(key | st.sampled_from(WORDS)), integers() | values()),
        st.builds(Put, st.just("special_tokens_map.json"), st.tuples(st.sampled_from(names)), values()),
        st.builds(Flip, st.just("tokenizer.model"), st.integers(0, 6000), st.integers(1, 255)),
    )
