"""fastkv-eval share-layers: the most distant pair is tried first, and stays where the model hardly changes by it."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from places import ROOT
from sharing import entries_and_hidden
from torch import Tensor

from fastkv import LLM, FastKVError
from fastkv.cache.layer_map import read_map
from fastkv.eval import cli
from fastkv.eval.share_layers.search import ranked, search
from fastkv.eval.share_layers.similarity import MeanEntries, batches, final_hidden, mean_cosine
from fastkv.eval.share_layers.texts import texts_of
from fastkv.models.files import fingerprint

MODEL = str(ROOT / "examples" / "archive" / "model")
FAST = ["--model", MODEL, "--dtype", "float32", "--quiet"]


def plain_distances(llm: LLM, texts: Sequence[Sequence[int]]) -> Tensor:
    """Of the layers' means, position by position over the texts that are so long: float64 [L, L]."""
    n_layers, longest = llm.config.n_layers, max(map(len, texts))
    stored = [entries_and_hidden(llm, ids, range(n_layers))[0] for ids in texts]
    means = []
    for layer in range(n_layers):
        positions = []
        for at in range(longest):
            there = [torch.stack(layers[layer])[:, 0, :, at] for layers in stored if layers[layer][0].shape[2] > at]
            positions.append(torch.stack(there).double().mean(dim=0))
        means.append(torch.stack(positions).flatten())
    return torch.tensor([[float((one - other).norm()) for other in means] for one in means])


def plain_cosine(llm: LLM, texts: Sequence[Sequence[int]], sources: Sequence[int]) -> float:
    """The mean over all tokens of the texts."""
    cosines = []
    for ids in texts:
        before, after = (entries_and_hidden(llm, ids, each)[1] for each in (range(llm.config.n_layers), sources))
        cosines += F.cosine_similarity(before, after, dim=-1)[0].tolist()
    return sum(cosines) / len(cosines)


def random_texts(llm: LLM, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, llm.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def measured(llm: LLM, texts: list[list[int]]) -> tuple[MeanEntries, list[tuple[Tensor, Tensor]]]:
    means = MeanEntries(llm.config.n_layers, max(map(len, texts)))
    return means, [(ids, means.add(llm.model, ids)) for ids in batches(texts, llm.device)]


def test_texts_of_every_length_count(tiny_llm: LLM) -> None:
    """The paper's own code leaves out texts of other lengths without a word; two of these four have others."""
    texts = random_texts(tiny_llm, [20, 33, 20, 7])
    means, known = measured(tiny_llm, texts)
    assert sorted(tuple(ids.shape) for ids, _ in known) == [(1, 7), (1, 33), (2, 20)]
    torch.testing.assert_close(means.distances(), plain_distances(tiny_llm, texts).double(), rtol=1e-4, atol=1e-4)
    sources = (0, 1, 2, 3, 0, 2)
    found = mean_cosine(tiny_llm.model, known, sources)
    assert found == pytest.approx(plain_cosine(tiny_llm, texts, sources), abs=1e-5)
    assert found < 0.9999
    assert mean_cosine(tiny_llm.model, known, tuple(range(6))) == pytest.approx(1, abs=1e-6)


def test_final_states_are_those_of_plain_pieces(tiny_llm: LLM) -> None:
    (ids,) = random_texts(tiny_llm, [40])
    for sources in (tuple(range(6)), (0, 1, 2, 1, 4, 0)):
        found = final_hidden(tiny_llm.model, torch.tensor([ids]), sources)
        torch.testing.assert_close(found, entries_and_hidden(tiny_llm, ids, sources)[1], rtol=1e-4, atol=1e-4)


def test_pairs_come_by_falling_distance() -> None:
    distances = [[0.0, 3.0, 5.0], [3.0, 0.0, 5.0], [5.0, 5.0, 0.0]]
    assert ranked(distances) == [(2, 0), (2, 1), (1, 0)]


def test_the_search_by_hand() -> None:
    """Four layers: (3, 0) changes too much; then 2 reads 0, so 2 is read by none, 0 reads none, and 2 nothing else."""
    distance = {(3, 0): 9.0, (2, 0): 8.0, (3, 2): 7.0, (1, 0): 6.0, (2, 1): 5.0, (3, 1): 4.0}
    distances = [[distance.get((max(a, b), min(a, b)), 0.0) for b in range(4)] for a in range(4)]
    asked: list[tuple[int, ...]] = []

    def cosine(sources: tuple[int, ...]) -> float:
        asked.append(sources)
        return 0.5 if sources[3] == 0 else 0.75

    tried = list(search(distances, 3, 0.5, cosine))
    assert asked == [(0, 1, 2, 0), (0, 1, 0, 3), (0, 0, 0, 3)]
    assert [(one.reader, one.source, one.distance, one.cosine, one.stays) for one in tried] == [
        (3, 0, 9.0, 0.5, False),
        (2, 0, 8.0, 0.75, True),
        (1, 0, 6.0, 0.75, True),
    ]
    asked.clear()
    assert [one.stays for one in search(distances, 1, 0.4, cosine)] == [True]  # enough is enough
    fits = list(search(distances, 1, 0.4, cosine, lambda reader, source: source == 1))
    assert [(one.reader, one.source) for one in fits] == [(2, 1)]


def test_nothing_of_a_text_is_left_out(archive_llm: LLM) -> None:
    """Each part begins with BOS, as a prompt does."""
    tokenizer = archive_llm.tokenizer
    assert tokenizer is not None
    text = "The access code of the calm owl is 9264. A painter wrapped the brass key at the market."
    bos, *ids = tokenizer.encode(text)
    cut, goes_on = texts_of(tokenizer, text, 30, 10, 0)
    assert {each[0] for each in cut} == {bos}
    assert list(itertools.chain(*(each[1:] for each in cut))) == ids
    assert {len(each) for each in cut[:-1]} == {10}
    assert not goes_on
    few, goes_on = texts_of(tokenizer, text, 2, 10, 0)
    assert (few, goes_on) == (cut[:2], True)
    drawn = texts_of(tokenizer, None, 5, 64, 1)[0]
    assert [len(each) for each in drawn] == [64] * 5
    assert drawn != texts_of(tokenizer, None, 5, 64, 2)[0]
    with pytest.raises(FastKVError, match="no tokens"):
        texts_of(tokenizer, "", 5, 64, 0)
    with pytest.raises(FastKVError, match="length must be above 1"):
        texts_of(tokenizer, text, 5, 1, 0)


def test_the_command(archive_llm: LLM, archive_folder: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The first pair that is tried is the most distant one; the file says what was found, and the engine reads it."""
    path = tmp_path / "map.json"
    arguments = [*FAST, "--layers", "2", "--output", str(path), "--examples", "4", "--length", "24"]
    assert cli.main(["share-layers", *arguments]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    content = json.loads(path.read_text())
    assert archive_llm.tokenizer is not None
    texts = texts_of(archive_llm.tokenizer, None, 4, 24, 0)[0]
    distances = plain_distances(archive_llm, texts)
    farthest = int(distances.argmax())
    first, second = content["pairs"]
    assert {first["reader"], first["source"]} == set(divmod(farthest, archive_llm.config.n_layers))
    assert first["distance"] == pytest.approx(float(distances.max()), rel=1e-4)
    sources = list(range(archive_llm.config.n_layers))
    for pair in (first, second):
        sources[pair["reader"]] = pair["source"]
        assert pair["cosine"] == pytest.approx(plain_cosine(archive_llm, texts, sources), abs=1e-4)
        assert f"| {pair['reader']} | {pair['source']} |" in out
    assert (content["kv_saved"], content["texts"], content["tokens"]) == (0.25, 4, 96)
    assert "4 texts of 24 tokens of generated small talk" in out
    found = read_map(path)
    assert list(found.sources(archive_llm.config.n_layers)) == sources
    found.check_model(fingerprint(archive_folder))
    before = path.read_bytes()
    assert cli.main(["share-layers", *arguments]) == 0  # over a file of its own
    assert path.read_bytes() == before


def test_fewer_than_wanted_are_told(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, text = tmp_path / "map.json", tmp_path / "text"
    text.write_text("The access code of the calm owl is 9264. A painter wrapped the brass key at the market.\n")
    few = [*FAST, "--output", str(path), "--text", str(text), "--length", "16", "--layers", "7"]
    assert cli.main(["share-layers", *few, "--threshold", "0.95"]) == 0
    out = capfd.readouterr().out
    n_pairs = len(json.loads(path.read_text())["pairs"])
    assert 0 < n_pairs < 7
    assert "7 layers were wanted, but no other pair keeps the cosine above 0.95." in out
    assert f"texts of 16 tokens (1 of them shorter) out of {text}." in out
    path.unlink()
    assert cli.main(["share-layers", *few, "--threshold", "1"]) == 2
    assert "--threshold: none of 28 pairs keeps the cosine above 1; lower it" in capfd.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--layers 0", "--layers: layers must be a whole number of at least 1"),
        ("--layers 8", "--layers: layers must be a whole number of at least 1 and at most 7"),
        ("--layers 1 --length 0", "--length: length must be"),
        ("--layers 1 --length 5000", "--length: length must be a whole number of at least 1 and at most 1024"),
        ("--layers 1 --examples 0", "--examples: examples must be"),
        ("--layers 1 --threshold 2", "--threshold: threshold must be a number of at least -1 and at most 1"),
        ("--layers 1 --threads 0", "--threads: threads must be"),
        ("--layers 1 --kv-dtype int8", "--kv-dtype: layers are compared by their K and V as they are"),
        ("--layers 1 --text no/such", "--text no/such: cannot be read"),
        ("--layers 1 --output {model}/config.json", "--output: {model}/config.json: is there already"),
        ("", "--layers"),
    ],
)
def test_mistakes(capfd: pytest.CaptureFixture[str], tmp_path: Path, flags: str, said: str) -> None:
    output = [] if "--output" in flags else ["--output", str(tmp_path / "map.json")]
    assert cli.main(["share-layers", *FAST, *output, *flags.format(model=MODEL).split()]) == 2
    err = capfd.readouterr().err
    assert said.format(model=MODEL) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "map.json").exists()


def test_a_model_without_a_tokenizer(capfd: pytest.CaptureFixture[str], tmp_path: Path, tiny_folder: Path) -> None:
    arguments = ["--model", str(tiny_folder), "--quiet", "--layers", "1", "--output", str(tmp_path / "map.json")]
    assert cli.main(["share-layers", *arguments]) == 2
    assert "has no tokenizer" in capfd.readouterr().err


# --- the file, read ---

GOOD: dict[str, Any] = {
    "kind": "fastkv-share-layers",
    "files": "0123456789abcdef",
    "n_layers": 6,
    "pairs": [{"reader": 5, "source": 1}, {"reader": 3, "source": 1, "cosine": 0.9}],
}


def test_what_a_map_says(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(GOOD))
    found = read_map(path)
    assert found.pairs == ((3, 1), (5, 1))
    assert found.sources(6) == (0, 1, 2, 1, 4, 1)
    assert read_map({4: 2}).sources(6) == (0, 1, 2, 3, 2, 5)
    assert read_map({}).sources(3) == (0, 1, 2)
    with pytest.raises(FastKVError, match="made for a model of 6 layers, but this one has 8"):
        found.sources(8)
    with pytest.raises(FastKVError, match=r"another model \(the checksum of its files is 0123456789abcdef"):
        found.check_model("f" * 16)
    with pytest.raises(FastKVError, match="layer 4 is none of this model, whose layers are 0 to 3"):
        read_map({4: 2}).sources(4)


def pairs(*numbers: Any) -> list[dict[str, Any]]:
    return [{"reader": reader, "source": source} for reader, source in numbers]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no JSON", "is no JSON object with kind, files, n_layers and pairs"),
        ("[]", "is no JSON object"),
        ({"kind": "fastkv-policy"}, "is of the kind 'fastkv-policy', not 'fastkv-share-layers'"),
        ({"files": 1}, "must be a JSON object with"),
        ({"n_layers": "6"}, "must be a JSON object with"),
        ({"pairs": {"5": 1}}, "must be a JSON object with"),
        ({"pairs": [[5, 1]]}, "each of its pairs must be an object with reader and source"),
        ({"pairs": pairs((5, -1))}, "a layer must be a whole number of at least 0, not -1"),
        ({"pairs": pairs((None, 1))}, "a layer must be a whole number of at least 0, not None"),
        ({"pairs": pairs((5, True))}, "a layer must be a whole number of at least 0, not True"),
        ({"pairs": pairs((1, 5))}, "layer 1 would read layer 5, which does not come before it"),
        ({"pairs": pairs((2, 2))}, "layer 2 would read layer 2, which does not come before it"),
        ({"pairs": pairs((5, 1), (5, 2))}, "layer 5 comes up twice as a reader"),
        ({"pairs": pairs((5, 3), (3, 1))}, "layer 3 is to be read, but reads layer 1 itself"),
    ],
)
def test_a_map_that_is_none(tmp_path: Path, change: Any, said: str) -> None:
    path = tmp_path / "map.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**GOOD, **change}))
    with pytest.raises(FastKVError) as caught:
        read_map(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert caught.value.setting == "share_layers"


def test_a_map_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FastKVError, match="cannot be read"):
        read_map(tmp_path / "none")
    with pytest.raises(FastKVError, match="must be a file or a mapping of layers, not 5"):
        read_map(5)  # type: ignore[arg-type]
