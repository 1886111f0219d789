"""The texts of fastkv-eval: fixed by the seed, as long as asked, the answers in them, and nothing else that fits."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from fastkv import LLM, FastKVError
from fastkv.eval.example import Draw, Example, Slot, Task
from fastkv.eval.fitting import fit
from fastkv.eval.runner import Prompts
from fastkv.eval.tasks import GENERATED, NAMES, build_tasks
from fastkv.eval.tasks.archive_text import question, record
from fastkv.eval.tasks.haystack import different, hide
from fastkv.eval.tasks.needle import SEVERAL, needle
from fastkv.eval.tasks.tracing import chain
from fastkv.eval.tasks.words import zipf_counts

LONGEST_PIECE = 40  # tokens that a sentence, a list entry or a word of any task takes at most


@pytest.fixture(scope="module")
def prompts(archive_llm: LLM) -> Prompts:
    return Prompts(archive_llm)


@pytest.fixture
def qa_file(tmp_path: Path) -> Path:
    """Thirty questions, each with a passage of its own."""
    rng, path = random.Random(0), tmp_path / "qa.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(30):
            told = f"The keeper of lamp {i} was Keeper{i:02d}."
            sentences = [f"Lamp {i} burnt oil number {rng.randrange(1000)} in year {year}." for year in range(12)]
            context = " ".join([*sentences[:6], told, *sentences[6:]])
            print(
                json.dumps({"question": f"Who kept lamp {i}?", "answers": f"Keeper{i:02d}", "context": context}),
                file=file,
            )
    return path


def write(
    prompts: Prompts, task: Task, length: int, depth: float | None = None, index: int = 0, seed: int = 0
) -> Example:
    return task.write(Draw(Slot(task.name, length, depth, index), seed, prompts.count, prompts.bare, prompts.decode))


def depths_of(task: Task) -> list[float | None]:
    return [0.0, 0.4, 1.0] if task.has_depth else [None]


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_fixes_a_text(prompts: Prompts, name: str, qa_file: Path) -> None:
    (task,) = build_tasks([name], qa_file if name == "qa" else None)
    depth = depths_of(task)[-1]
    first = write(prompts, task, 900, depth)
    assert first == write(prompts, task, 900, depth)
    assert first.text != write(prompts, task, 900, depth, index=1).text
    assert first.text != write(prompts, task, 900, depth, seed=1).text


@pytest.mark.parametrize("length", [460, 1000, 3000])
@pytest.mark.parametrize("name", NAMES)
def test_as_long_as_asked(prompts: Prompts, name: str, length: int, qa_file: Path) -> None:
    """Never longer than asked, by the model's own count with BOS, and less than one more piece shorter."""
    (task,) = build_tasks([name], qa_file if name == "qa" else None)
    for depth in depths_of(task):
        for index in range(3 if length < 3000 else 1):
            tokens = prompts.count(write(prompts, task, length, depth, index))
            assert length - LONGEST_PIECE < tokens <= length


@pytest.mark.parametrize("name", [name for name in GENERATED if name not in ("niah_single", "archive", "archive_long")])
def test_too_short_a_length(prompts: Prompts, name: str) -> None:
    with pytest.raises(FastKVError, match=f"100 tokens are too short for task {name}"):
        write(prompts, GENERATED[name], 100)


@pytest.mark.parametrize("name", ["niah_single", "archive", "archive_long"])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.7, 1.0])
def test_needles_lie_at_their_depth(prompts: Prompts, name: str, depth: float) -> None:
    """Counted in tokens: the text in front of the needle is that share of all text around it."""
    for index in range(3):
        example = write(prompts, GENERATED[name], 2000, depth, index)
        (answer,) = example.answers
        archive = name.startswith("archive")
        text = example.text.split("\n")[0] if archive else example.text.rsplit("\n\n", 1)[0].split("\n\n")[-1]
        (told,) = re.findall(rf"The [^.]*? is {answer}\.", text)
        before, after = (len(prompts.bare(part)) for part in text.split(told))
        assert before / (before + after) == pytest.approx(depth, abs=0.02)


@pytest.mark.parametrize(
    ("name", "n_needles", "n_answers"),
    [
        ("niah_single", 1, 1),
        ("niah_multikey", SEVERAL, 1),
        ("niah_multivalue", SEVERAL, SEVERAL),
        ("niah_multiquery", SEVERAL, SEVERAL),
    ],
)
def test_needles(prompts: Prompts, name: str, n_needles: int, n_answers: int) -> None:
    """Each answer stands once in the text, in a needle of a key that is asked; no other needle has its number."""
    for index in range(5):
        example = write(prompts, GENERATED[name], 1200, 0.5 if name == "niah_single" else None, index)
        hay, asked = example.text.rsplit("Question:", 1)
        found = re.findall(r"The secret number of the ([a-z]+-[a-z]+) is (\d{7})\.", hay)
        assert len(found) == n_needles
        assert len({number for _, number in found}) == n_needles
        assert len(example.answers) == n_answers
        assert all(needle(key, number) in hay for key, number in found)
        of_asked = {number for key, number in found if f"the {key}" in asked}
        assert of_asked == set(example.answers)
        assert not any(number in asked for _, number in found)


def test_variable_tracking(prompts: Prompts) -> None:
    """The chains, read back from the text in its order, give the asked variables that value and the others another."""
    for index in range(5):
        example = write(prompts, GENERATED["vt"], 1500, index=index)
        worked, asked_of = example.prompt.rsplit("The text below", 1)
        hay, asked = asked_of.rsplit("Question:", 1)
        values: dict[str, str] = {}
        for name, source in re.findall(r"Variable ([A-Z]{5}) is set to (?:variable )?(\w+)\.", hay):
            values[name] = values.get(source, source)
        value = re.search(r"\d+", asked)
        assert value is not None
        assert {name for name, held in values.items() if held == value[0]} == set(example.answers)
        assert len(values) == len(example.answers) == 5
        assert not any(name in example.lead or name in worked for name in values)


@pytest.mark.parametrize(("name", "length"), [("vt", 1500), ("cwe", 3000), ("cwe", 9000)])
def test_a_worked_example_stands_in_front(prompts: Prompts, name: str, length: int) -> None:
    """Of the same kind, with its right answer, in other words; short prompts have none."""
    example = write(prompts, GENERATED[name], length)
    asked = example.lead.split("\n")[1].split(" value ")[0]
    worked, rest = example.prompt.split("\n\n" + example.prompt.split("\n")[0])  # the intro, when it comes again
    text, answer = worked.split("\nAnswer:")
    found = answer.split(":")[1].split()
    words = [word for word in found if not word.endswith(".")]
    assert answer.strip().startswith(asked.removeprefix("Answer: "))
    assert len(set(words)) == len(example.answers)
    assert all(word not in rest for word in words)
    if name == "vt":
        assert set(words) == set(re.findall(r"Variable ([A-Z]{5}) is", text))
    else:
        counts = Counter(word for _, word in re.findall(r"(\d+)\. ([a-z]+)", text)).most_common()
        assert {word for word, _ in counts[:10]} == set(words)
        assert counts[9][1] >= 3 * counts[10][1]
    assert prompts.count(Example(worked, ())) <= length / 4
    assert "Question:" not in write(prompts, GENERATED[name], 600).prompt.rsplit("Question:", 1)[0]


def test_the_counts_are_ruler_s(prompts: Prompts) -> None:
    """arXiv 2404.06654, appendix: the settings of its thirteen tasks, as far as these families have them."""
    tokens = {name: GENERATED[name].max_new_tokens for name in ("niah_single", "niah_multiquery", "cwe", "fwe")}
    assert tokens == {"niah_single": 128, "niah_multiquery": 128, "cwe": 120, "fwe": 50}
    numbered = re.findall(r"\d+\. ([a-z]+)", write(prompts, GENERATED["cwe"], 12000).prompt.rsplit("Remember", 1)[1])
    counts = Counter(numbered).most_common()
    assert [count for _, count in counts[:11]] == [30] * 10 + [3]


def test_a_chain_of_assignments() -> None:
    assert chain(["A", "B"], "5") == ["Variable A is set to 5.", "Variable B is set to variable A."]


@pytest.mark.parametrize("length", [450, 1500, 6000])
def test_common_words(prompts: Prompts, length: int) -> None:
    example = write(prompts, GENERATED["cwe"], length)
    numbered = re.findall(r"(\d+)\. ([a-z]+)", example.prompt.rsplit("Remember them.", 1)[1])
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    counts = Counter(word for _, word in numbered)
    common = counts.most_common(10)
    assert {word for word, _ in common} == set(example.answers)
    rest = [count for word, count in counts.items() if word not in example.answers]
    places = [place for place, (_, word) in enumerate(numbered) if word in example.answers]
    assert sum(places) / len(places) == pytest.approx(len(numbered) / 2, rel=0.3)  # all over the list
    assert min(count for _, count in common) >= 4 * max(rest, default=1)


@pytest.mark.parametrize("length", [400, 1500, 6000])
def test_frequent_words(prompts: Prompts, length: int) -> None:
    example = write(prompts, GENERATED["fwe"], length)
    words = example.prompt.split("\n\n")[1].split()
    places = [place for place, word in enumerate(words) if word == example.answers[0]]
    assert sum(places) / len(places) == pytest.approx(len(words) / 2, rel=0.3)  # all over the text
    counts = Counter(words).most_common()
    assert [word for word, _ in counts[:3]] == list(example.answers)
    assert counts[2][1] > counts[3][1]


@pytest.mark.parametrize("total", [40, 53, 100, 1000, 54321])
def test_zipf(total: int) -> None:
    counts = zipf_counts(total)
    assert sum(counts) == total
    assert counts[0] > counts[1] > counts[2] > counts[3]
    assert counts[0] / total == pytest.approx(6 / 3.14159265**2, abs=1 / total)


@pytest.mark.parametrize(("name", "digits"), [("archive", {4}), ("archive_long", {7, 8, 9, 10, 11, 12})])
def test_the_codes_are_as_long_as_those_of_the_training(prompts: Prompts, name: str, digits: set[int]) -> None:
    examples = [write(prompts, GENERATED[name], 600, 0.5, index) for index in range(12)]
    told = re.findall(r"is (\d+)\.", " ".join(example.prompt for example in examples))
    assert {len(code) for code in told} == digits
    assert all(len(example.answers[0]) in digits for example in examples)
    assert max(digits) + 3 <= GENERATED[name].max_new_tokens  # the full stop, the newline and EOS


@pytest.mark.parametrize("name", ["archive", "archive_long"])
def test_the_archive_task_asks_as_the_model_was_trained(prompts: Prompts, name: str) -> None:
    example = write(prompts, GENERATED[name], 1000, 0.5)
    (code,) = example.answers
    asked = example.text.split("\n")[1]
    key = (asked.split()[-3], asked.split()[-2])
    assert asked == question(key)
    assert example.text.count(record(key, code)) == 1
    assert example.text.count(code) == 1


def test_questions_and_distractors(prompts: Prompts, qa_file: Path) -> None:
    """The question's own passage is whole and somewhere among others; each question comes once."""
    (task,) = build_tasks(["qa"], qa_file)
    examples = [write(prompts, task, 1500, index=index) for index in range(30)]
    assert len({example.answers for example in examples}) == 30
    places = set()
    for example in examples:
        (answer,) = example.answers
        passages = re.findall(r"Passage \d+: (.*)", example.prompt)
        (place,) = (i for i, passage in enumerate(passages) if answer in passage)
        assert len(passages[place].split(". ")) == 13
        places.add(place)
    assert len(places) > 2


def test_a_file_with_too_little_text(prompts: Prompts, qa_file: Path) -> None:
    (task,) = build_tasks(["qa"], qa_file)
    with pytest.raises(FastKVError, match="50000 tokens are too many for task qa"):
        write(prompts, task, 50000)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2: is not JSON"),
        ("[1]", "line 2: is no object"),
        ('{"answers": "a", "context": "b"}', "line 2: question"),
        ('{"question": "q", "answers": [], "context": "b"}', "line 2: answers or answer"),
        ('{"question": "q", "answers": "a", "context": 3}', "line 2: context or paragraph"),
        ('{"question": "q", "answers": "a", "context": [" "]}', "line 2: context or paragraph"),
    ],
)
def test_a_broken_file_of_questions(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text('{"question": "q", "answer": "a", "paragraph": "b"}\n' + line + "\n")
    with pytest.raises(FastKVError, match=says):
        build_tasks(["qa"], path)


def test_nothing_is_drawn_twice() -> None:
    """Two needles with one key, or two variables with one name, would have no right answer."""
    draws = iter("abacabad")
    assert list(itertools.islice(different(lambda: next(draws)), 4)) == ["a", "b", "c", "d"]


def test_hiding_in_hay() -> None:
    hay = ["aaa", "bbb", "ccc", "ddd"]
    assert hide(hay, [(0.0, "X"), (1.0, "Y"), (0.5, "Z")]) == "X aaa bbb Z ccc ddd Y"
    assert hide(hay, [(0.52, "second"), (0.48, "first")]) == "aaa bbb first second ccc ddd"
    assert hide([], [(0.9, "Y"), (0.1, "X")]) == "X Y"


@pytest.mark.parametrize("piece", [1, 3, 17])
@pytest.mark.parametrize("limit", [10, 11, 500, 12345])
def test_fitting(piece: int, limit: int) -> None:
    """The largest n, found with few counts, whatever a piece takes; uneven pieces do not confuse it."""
    counted = []

    def count(example: Example) -> int:
        counted.append(example)
        n = len(example.prompt)
        return 10 + piece * n + n // 7

    draw = Draw(Slot("t", limit, None, 0), 0, count, lambda text: [], lambda ids: "")
    example = fit(draw, lambda n: Example("x" * n, ()))
    assert count(example) <= limit < count(Example(example.prompt + "x", ()))
    assert len(counted) < 30


def test_a_chat_template_counts(archive_folder: Path, tmp_path: Path) -> None:
    """The template's own tokens are part of the length, and the answer begins in the model's turn."""
    folder = tmp_path / "model"
    shutil.copytree(archive_folder, folder)
    template = "{% for m in messages %}User says: {{ m.content }}{% endfor %}\nAssistant, in many more words:"
    (folder / "chat_template.jinja").write_text(template)
    prompts = Prompts(LLM(folder, dtype="float32", device="cpu"), chat=True)
    for name in ("niah_single", "archive"):
        example = write(prompts, GENERATED[name], 600, 0.5)
        tokens = prompts.count(example)
        assert 600 - LONGEST_PIECE < tokens <= 600
        assert tokens > len(prompts.bare(example.prompt)) + 10
        text = prompts._tokenizer.decode(prompts.ids(example))
        assert text.endswith("Assistant, in many more words:" + example.lead.lstrip())


def test_another_tokenizer(stories_folder: Path) -> None:
    """A sentencepiece model puts a space of its own in front of every sentence that is encoded alone."""
    prompts = Prompts(LLM(stories_folder, dtype="float32", device="cpu"))
    for name, task in GENERATED.items():
        tokens = prompts.count(write(prompts, task, 1500, 0.5 if task.has_depth else None))
        assert 1500 - 60 < tokens <= 1500, name
