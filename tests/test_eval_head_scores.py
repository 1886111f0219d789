"""fastkv-eval head-scores: a head's score is how often it looks at the token that is being copied, and at no other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from places import ROOT
from torch import Tensor

import fastkv
from fastkv import LLM, FastKVError, FullKV, HeadKV
from fastkv.console.files import check_own_file
from fastkv.eval import cli
from fastkv.eval.example import Draw, Example, Task
from fastkv.eval.head_scores import retrieval
from fastkv.eval.head_scores.command import KIND, model_name, table
from fastkv.eval.head_scores.retrieval import Copying, HeadScores, Needle, find_needle, strongest_entry, watch_copying
from fastkv.eval.tasks import COPYING, GENERATED

MODEL = str(ROOT / "examples" / "archive" / "model")


def archive_needle(llm: LLM, code: str = "5831") -> Needle:
    """A short text of the bundled model's kind: the record asked for is neither the first nor the last."""
    text = (
        "The access code of the calm owl is 9264. A painter wrapped the brass key at the market. "
        f"The access code of the copper castle is {code}. The access code of the bold fox is 7102.\n"
        "Question: The access code of the copper castle is"
    )
    assert llm.tokenizer is not None
    needle = find_needle(llm.tokenizer.encode(text), llm.tokenizer.encode(f"{text} {code}"))
    assert needle is not None
    return needle


def made_up_needle(llm: LLM, n_tokens: int = 60) -> Needle:
    """Token ids of no meaning for a model of random weights; those of the answer come up once."""
    ids = torch.randperm(llm.config.vocab_size, generator=torch.Generator().manual_seed(1)).tolist()[:n_tokens]
    return Needle(ids, ids[20:26], 20)


def whole_attention(llm: LLM, ids: list[int]) -> Tensor:
    """Every layer's attention matrix, by plain pieces: float32 [L, Hq, N, N]."""
    model = llm._model
    n_tokens, group = len(ids), llm.config.n_heads // llm.config.n_kv_heads
    hidden, rope = model.embed(torch.tensor([ids])), model.rope_of_range(0, n_tokens)
    rows, columns = torch.arange(n_tokens)[:, None], torch.arange(n_tokens)[None]
    found = []
    with torch.inference_mode():
        for layer, block in enumerate(model.blocks):
            q, k, v = block.project(hidden, rope)
            k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
            seen = columns <= rows
            window = llm.config.windows[layer]
            if window is not None:
                seen &= columns > rows - window
            products = (q @ k.transpose(2, 3) / llm.config.head_dim**0.5).masked_fill(~seen, float("-inf"))
            attention = products.softmax(dim=-1)
            found.append(attention[0])
            hidden = block.mlp(hidden + block.attention_output(attention @ v))
    return torch.stack(found)


def expected_hits(llm: LLM, needle: Needle) -> Tensor:
    """bool [m, L, Hq] from the attention matrices. Row N - 1 + i is the query that predicts the answer's token i."""
    text = needle.prompt + needle.answer
    strongest = whole_attention(llm, text).argmax(dim=-1).tolist()  # [L][Hq][N + m]
    n_tokens, end = len(needle.prompt), needle.place + len(needle.answer)
    return torch.tensor(
        [
            [
                [needle.place <= of_head[row] < end and text[of_head[row]] == text[row + 1] for of_head in of_layer]
                for of_layer in strongest
            ]
            for row in range(n_tokens - 1, n_tokens - 1 + len(needle.answer))
        ]
    )


@pytest.mark.parametrize("code", ["5831", "7738"])
def test_hits_are_those_of_whole_attention_matrices(archive_llm: LLM, code: str) -> None:
    needle = archive_needle(archive_llm, code)
    found = watch_copying(archive_llm, needle)
    assert torch.equal(found.hits, expected_hits(archive_llm, needle))
    assert 0.05 < found.hits.double().mean() < 0.5  # neither nothing nor everything: something to compare


@pytest.mark.parametrize("window", [None, 16, 45])
def test_strongest_positions_are_those_of_whole_attention_matrices(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Random weights hardly ever hit a needle of six tokens, so here every position counts, hit or not."""
    if window is not None:
        config = dataclasses.replace(tiny_llm.config, sliding_windows=(window,) * tiny_llm.config.n_layers)
        monkeypatch.setattr(tiny_llm, "config", config)
        monkeypatch.setattr(tiny_llm._model, "config", config)
    needle = made_up_needle(tiny_llm)
    seen: list[Tensor] = []
    monkeypatch.setattr(retrieval.torch, "isin", lambda strongest, _: seen.append(strongest) or strongest > 0)
    watch_copying(tiny_llm, needle)
    n_tokens = len(needle.prompt)
    rows = whole_attention(tiny_llm, needle.prompt + needle.answer)[:, :, n_tokens - 1 : -1]
    assert torch.equal(torch.stack(seen), rows.argmax(dim=-1).permute(2, 0, 1))


def test_a_hit_is_the_token_that_comes_next(tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads that look where they are told: at the token to come, one before, one after, and at its twin.

    The twin is the same token outside the needle. Steps counted from one too few or too many would make the second or
    the third head the one that copies.
    """
    needle = made_up_needle(tiny_llm)
    needle.prompt[5:11] = needle.answer
    lengths = []

    def looking(q: Tensor, keys: Tensor) -> Tensor:
        lengths.append(keys.shape[2])
        at = needle.place + keys.shape[2] - len(needle.prompt)  # with the prompt's last token read, the first to copy
        return torch.tensor([at, at - 1, at + 1, at - 15])

    monkeypatch.setattr(retrieval, "strongest_entry", looking)
    found = watch_copying(tiny_llm, needle)
    n_layers = tiny_llm.config.n_layers
    assert sorted(set(lengths)) == list(range(60, 66))
    assert found.hits.all(dim=0).tolist() == [[True, False, False, False]] * n_layers
    assert not found.hits[:, :, 1:].any()


def test_a_token_that_comes_up_twice_may_be_copied_from_either_place() -> None:
    needle = Needle([1, 7, 8, 7, 2, 9], [7, 8, 7], 1)
    assert [needle.sources(step) for step in range(3)] == [[1, 3], [2], [1, 3]]


def test_the_models_own_choice_is_that_of_its_logits(archive_llm: LLM) -> None:
    """The right record's code is what the model says; of another record's code at most a digit is."""
    right = archive_needle(archive_llm)
    wrong = Needle(right.prompt, right.prompt[9:13], 9)
    assert archive_llm.tokenizer is not None
    assert archive_llm.tokenizer.decode(wrong.answer) == " 9264"
    for needle, most in ((right, 1.0), (wrong, 0.5)):
        predicted = watch_copying(archive_llm, needle).predicted
        choices = []
        for step in range(4):
            ids = needle.prompt + needle.answer[:step]
            choices.append(archive_llm.prefill(ids, FullKV(), max_tokens=0).logits[0].argmax().item())
        assert predicted.tolist() == [choice == token for choice, token in zip(choices, needle.answer, strict=True)]
        assert predicted.double().mean() <= most
    assert watch_copying(archive_llm, right).predicted.all()


def test_query_heads_attend_to_their_own_kv_head() -> None:
    """Four query heads, two KV heads of three keys: heads 0 and 1 read the first, 2 and 3 the second."""
    keys = torch.eye(3).expand(1, 2, 3, 3).clone()
    keys[0, 1] = keys[0, 1].flip(0)
    q = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]])[None, :, None]
    assert strongest_entry(q, keys).tolist() == [0, 1, 2, 0]
    close = torch.tensor([1.0, 1 + 2**-7]).bfloat16()  # in bfloat16 both products round to the same
    assert strongest_entry(torch.tensor([[[[257.0]]]]), close.view(1, 1, 2, 1)).tolist() == [1]


@pytest.mark.parametrize(
    ("prompt", "continued", "found"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4, 2, 3], ([2, 3], 1)),
        ([2, 3, 4, 9], [2, 3, 4, 9, 2, 3], ([2, 3], 0)),
        ([1, 2, 3, 4], [1, 2, 3, 4, 4], ([4], 3)),
        ([1, 2, 3, 2, 3], [1, 2, 3, 2, 3, 2, 3], None),  # twice: copied from which?
        ([1, 2, 3, 4], [1, 2, 3, 4, 2, 4], None),  # other tokens than in the prompt
        ([1, 2, 3, 4], [1, 2, 3, 5, 2, 3], None),  # the prompt's last token grew into another
        ([1, 2, 3, 4], [1, 2, 3, 4], None),  # nothing to copy
    ],
)
def test_where_the_needle_is(prompt: list[int], continued: list[int], found: tuple[list[int], int] | None) -> None:
    assert find_needle(prompt, continued) == (None if found is None else Needle(prompt, *found))


def test_every_example_counts_the_same() -> None:
    """One answer of two tokens and one of four: two layers, four query heads of two KV heads, counted by hand."""
    short, long = torch.zeros(2, 2, 4, dtype=torch.bool), torch.zeros(4, 2, 4, dtype=torch.bool)
    short[:, 0, 0] = True
    short[0, 1, 3] = True
    long[0, 0, 1] = True
    parts = [Copying(short, torch.tensor([True, True])), Copying(long, torch.tensor([True, False, False, False]))]
    found = retrieval.head_scores(parts, 2)
    assert found.query_heads.tolist() == [[0.5, 0.125, 0, 0], [0, 0, 0, 0.25]]
    assert found.kv_heads.tolist() == [[0.3125, 0], [0, 0.125]]
    assert found.predicted == (1 + 0.25) / 2


def test_the_table_by_hand() -> None:
    query_heads = torch.tensor([[0.5, 0.1, 0, 0], [0, 0, 0, 0.25]], dtype=torch.float64)
    kv_heads = torch.tensor([[0.3, 0], [0, 0.1]], dtype=torch.float64)
    lines = table(HeadScores(query_heads, kv_heads, 0.625)).splitlines()
    assert lines[:2] == [
        "| layer | KV head | score | of its query heads | of all scores, up to here |",
        "| --- | --- | --- | --- | --- |",
    ]
    assert lines[2:5] == ["| 0 | 0 | 0.300 | 0.500 0.100 | 75.0 % |", "| 1 | 1 | 0.100 | 0.000 0.250 | 100.0 % |", ""]
    assert lines[-2] == "Of 8 query heads 2 have a score above 0.1; of 4 KV heads 2 have none."
    assert lines[-1] == "Given those before it, 62.5 % of these tokens were the model's own choice."
    unable = table(HeadScores(query_heads, kv_heads, 0.4)).splitlines()
    assert unable[-1].startswith("A model that chooses so few of them itself hardly shows how it copies: ")
    many = torch.arange(1.0, 25.0).view(12, 2).double()
    assert table(HeadScores(many, many, 0)).count("\n| ") == 11  # a rule and ten heads


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[[str], tuple[int, str, str]]:
    """The command's status, stdout and stderr; {model} is the bundled model, {out} a file in an empty folder."""

    def run(line: str) -> tuple[int, str, str]:
        line = line.replace("{model}", MODEL).replace("{out}", str(tmp_path / "heads.json"))
        try:
            status = cli.main(["head-scores", *line.split()])
        except SystemExit as left:  # the parser's own complaints
            status = int(str(left.code))
        return status, *capfd.readouterr()

    return run


def test_the_bundled_models_heads(command: Callable[[str], tuple[int, str, str]], tmp_path: Path) -> None:
    """Layer 1 copies: with queries and tokens one step apart its scores would be near 0."""
    line = "--model {model} --output {out} --task archive --length 512 300 512 --depth 0.8 0.2 --examples 2"
    line += " --dtype float32"
    status, out, err = command(line)
    assert (status, err) == (0, "")
    path = tmp_path / "heads.json"
    written = path.read_bytes()
    report = json.loads(written)
    expected = {
        "kind": "fastkv-head-scores",
        "model": "model",
        "tasks": ["archive"],
        "lengths": [300, 512],
        "depths": [0.2, 0.8],
        "examples": 2,
        "seed": 0,
        "chat": False,
        "measured": 8,
        "left_out": 0,
        "fastkv": fastkv.__version__,
        "torch": torch.__version__,
        "device": "cpu",
        "dtype": "float32",
    }
    assert {name: report[name] for name in expected} == expected
    assert set(report) - set(expected) == {"files", "said", "scores", "query_heads"}
    scores, query_heads = (torch.tensor(report[name]).double() for name in ("scores", "query_heads"))
    assert (scores.shape, query_heads.shape) == ((8, 2), (8, 4))
    assert scores.min() >= 0
    assert scores.max() <= 1
    torch.testing.assert_close(scores, query_heads.view(8, 2, 2).mean(dim=2))
    assert scores[1].min() > 0.7
    assert scores[1].sum() > 0.9 * scores.sum()
    assert report["said"] > 0.7
    assert out.startswith("| layer | KV head | score |")
    assert f"| 1 | {scores[1].argmax()} | {scores.max():.3f} |" in out.splitlines()[2]
    assert HeadKV(head_scores=path).table == tuple(map(tuple, report["scores"]))
    assert list(tmp_path.iterdir()) == [path]  # and nothing beside it
    assert command(line) == (0, out, "")
    assert path.read_bytes() == written
    assert command(line + " --seed 1")[0] == 0
    assert path.read_bytes() != written


def test_chat_puts_the_needles_into_the_template(
    command: Callable[[str], tuple[int, str, str]],
    archive_llm: LLM,
    archive_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer continues where the model's turn has begun, and still stands in the user's."""
    chatty = tmp_path / "chatty"
    shutil.copytree(archive_folder, chatty)
    (chatty / "chat_template.jinja").write_text("User: {{ messages[0].content }}\nModel:")
    needles: list[Needle] = []

    def watch(llm: LLM, needle: Needle) -> Copying:
        needles.append(needle)
        return watch_copying(llm, needle)

    monkeypatch.setattr(retrieval, "watch_copying", watch)
    line = f"--model {chatty} --output {{out}} --length 200 --depth 0.5 --examples 2 --dtype float32"
    assert command(line)[0] == command(f"{line} --chat")[0] == 0
    assert json.loads((tmp_path / "heads.json").read_text())["chat"] is True
    assert archive_llm.tokenizer is not None
    texts = [archive_llm.tokenizer.decode(needle.prompt) for needle in needles]
    in_chat = [False, False, True, True]
    assert [text.startswith("User: The text below mentions secret numbers.") for text in texts] == in_chat
    assert ["\nModel:Answer: The secret number of the " in text for text in texts] == in_chat
    for needle, text in zip(needles, texts, strict=True):
        answer = archive_llm.tokenizer.decode(needle.answer)
        assert f"{text.rsplit('Answer: The', 1)[1]}{answer}." in text
        assert len(answer) == 8  # a space and seven digits


@pytest.fixture
def answered_otherwise(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Draw], bool]], None]:
    """Lets the archive task expect, in some examples, an answer that its text does not have."""
    archive = GENERATED["archive"]

    def change(where: Callable[[Draw], bool]) -> None:
        def write(draw: Draw) -> Example:
            example = archive.write(draw)
            return dataclasses.replace(example, answers=("no code",)) if where(draw) else example

        task: Task = dataclasses.replace(archive, write=write)
        monkeypatch.setitem(GENERATED, "archive", task)

    return change


def test_examples_without_a_needle_are_left_out_and_counted(
    command: Callable[[str], tuple[int, str, str]],
    answered_otherwise: Callable[[Callable[[Draw], bool]], None],
    tmp_path: Path,
) -> None:
    line = "--model {model} --output {out} --task archive --length 200 --depth 0.5 --dtype float32 --examples"
    assert "left out" not in command(f"{line} 1")[1]
    alone = json.loads((tmp_path / "heads.json").read_text())
    answered_otherwise(lambda draw: draw.slot.index > 0)
    status, out, err = command(f"{line} 3")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith("2 of 3 examples were left out: ")
    report = json.loads((tmp_path / "heads.json").read_text())
    assert (report["measured"], report["left_out"], report["examples"]) == (1, 2, 3)
    assert report["query_heads"] == alone["query_heads"]


def test_no_needle_at_all_is_an_error(
    command: Callable[[str], tuple[int, str, str]],
    answered_otherwise: Callable[[Callable[[Draw], bool]], None],
    tmp_path: Path,
) -> None:
    answered_otherwise(lambda draw: True)
    status, out, err = command("--model {model} --output {out} --task archive --length 200 --depth 0.5 --examples 3")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "in none of the 3 examples do the answer's tokens stand in the prompt exactly once" in err
    assert list(tmp_path.iterdir()) == []


def test_scores_of_nothing_are_not_written(
    command: Callable[[str], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All heads the same is nothing that a budget could be shared out by."""
    monkeypatch.setattr(retrieval, "strongest_entry", lambda q, keys: torch.zeros(q.shape[1], dtype=torch.int64))
    status, out, err = command("--model {model} --output {out} --task archive --length 200 --depth 0.5 --examples 1")
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert "no head ever attended most to the token being copied" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--output {out}", "--model"),
        ("--model {model}", "--output"),
        ("--model {model} --output no/such/heads.json", "--output: no/such/heads.json: cannot be written"),
        ("--model {model} --output {folder}", "cannot be written, for it is no ordinary file"),
        (
            "--model {model} --output {out} --task cwe",
            f"--task: task must be one of {', '.join(COPYING)}, not 'cwe'",
        ),
        ("--model {model} --output {out} --task archive vt", "not 'vt'"),
        ("--model {model} --output {out} --task niah_multivalue", "not 'niah_multivalue'"),
        ("--model {model} --output {out} --task qa", "not 'qa'"),
        ("--model {model} --output {out} --task longbench:qasper", "not 'longbench:qasper'"),
        ("--model {model} --output {out} --task other", f"task must be one of {', '.join(COPYING)}"),
        ("--model {model} --output {out} --length 0", "--length: length must be"),
        ("--model {model} --output {out} --length 8190 --task archive", "--length: 8190 tokens and an answer of 8"),
        ("--model {model} --output {out} --length 9000", "--length: the prompt has 9000 tokens"),
        ("--model {model} --output {out} --length 20", "--length: 20 tokens are too short for task niah_single"),
        ("--model {model} --output {out} --depth 2", "--depth: depth must be"),
        ("--model {model} --output {out} --examples 0", "--examples: examples must be"),
        ("--model {model} --output {out} --threads 0", "--threads: threads must be"),
        ("--model {model} --output {out} --chat", "--chat: "),
        ("--model {tiny} --output {out}", "--model: the model has no tokenizer"),
        ("--model no/such/folder --output {out}", "no/such/folder"),
    ],
)
def test_a_mistake_is_one_line(
    command: Callable[[str], tuple[int, str, str]], tiny_folder: Path, tmp_path: Path, line: str, says: str
) -> None:
    status, out, err = command(line.replace("{tiny}", str(tiny_folder)).replace("{folder}", str(tmp_path)))
    assert (status, out, len(err.splitlines())) == (2, "", 1), err
    assert err.startswith("fastkv-eval: error: ")
    assert says in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "replaced"),
    [(b"", True), (b'{"kind": "fastkv-head-scores", "model": "m"}\n', True), (b'{"format": "fastkv-eval 1"}\n', False)],
)
def test_only_files_of_this_command_are_replaced(tmp_path: Path, content: bytes, replaced: bool) -> None:
    """The answers of a long run must not be lost to a wrong --output."""
    path = tmp_path / "file"
    path.write_bytes(content)
    if replaced:
        check_own_file(path, KIND)
    else:
        with pytest.raises(FastKVError, match="file: is there already, and is none of this command's"):
            check_own_file(path, KIND)
    assert path.read_bytes() == content


def test_a_model_is_called_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path / "my-model")
    names = [model_name(given) for given in (".", "../my-model/", "org/name")]
    assert names == ["my-model", "my-model", "org/name"]
