"""The bundled example's own tools: its texts, its prompts, and a training run small enough to do here."""

from __future__ import annotations

import importlib
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from fastkv.eval.tasks import archive_text
from fastkv.models.config import ModelConfig
from fastkv.models.llama import Llama
from fastkv.models.weights import load_weights

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "archive"
SMALL = ["--lengths", "128", "--batch-tokens", "1024", "--hidden", "32", "--layers", "2", "--report-every", "6"]
STEPS = 24


def load_scripts(*names: str) -> list[Any]:
    """The example's scripts import each other as neighbours, as they do when run."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(EXAMPLE))


make_prompt, train, encoding = load_scripts("make_prompt", "train", "encoding")
data, network, plan, state, loop = load_scripts(
    "training_data", "training_network", "training_plan", "training_state", "training_loop"
)
encode = encoding.load_encode(EXAMPLE / "model" / "tokenizer.json")


def start(*arguments: str) -> subprocess.Popen[str]:
    """train.py as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-B", str(EXAMPLE / "train.py"), "--threads", "1", *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_here(*arguments: str) -> str:
    """train.py in this process, which spares it the imports; what it reported."""
    lines: list[str] = []
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "report", lines.append)
        assert train.main(["--threads", "1", *arguments]) == 0
    torch.set_num_threads(threads)
    return "\n".join(lines)


def losses(output: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss (\d+\.\d+)", output)]


def load(folder: Path) -> Llama:
    return load_weights(ModelConfig.from_pretrained(folder), folder, torch.float32, torch.device("cpu"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 24 steps: its folder, and what it reported."""
    folder = tmp_path_factory.mktemp("train") / "unbroken"
    return folder, run_here("--out", str(folder), "--steps", str(STEPS), "--held-out", "4", *SMALL)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The same run in two halves: its folder, and what each half reported."""
    folder = tmp_path_factory.mktemp("train") / "halves"
    options = ["--out", str(folder), "--stop-after", str(STEPS // 2), "--held-out", "4"]
    return folder, run_here(*options, "--steps", str(STEPS), *SMALL), run_here(*options, "--resume")


def test_loss_falls(unbroken: tuple[Path, str]) -> None:
    found = losses(unbroken[1])
    assert len(found) == STEPS // 6
    assert found[-1] < found[0] - 0.5
    assert all(words in unbroken[1] for words in ("codes right", "min left", "held out: length  128"))


def test_folder_is_a_model(unbroken: tuple[Path, str]) -> None:
    """The engine's strict loader takes it; beside the model there is the state, and neither pickle nor leftover."""
    folder, _ = unbroken
    config = ModelConfig.from_pretrained(folder)
    assert (config.hidden_size, config.intermediate_size, config.n_layers, config.head_dim) == (32, 96, 2, 32)
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (1,))
    assert all(torch.isfinite(parameter).all() for parameter in load(folder).parameters())
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    bundled = {path.name for path in (EXAMPLE / "model").iterdir()}
    assert {path.name for path in folder.iterdir()} == bundled | {"state.safetensors"}


def test_transformers_agrees(unbroken: tuple[Path, str]) -> None:
    """It loads the folder, and its logits are the training forward's."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(unbroken[0], dtype=torch.float32)
    ids = torch.randint(2, 1000, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(network.forward(load(unbroken[0]), ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)


def test_resume_goes_on(unbroken: tuple[Path, str], halves: tuple[Path, str, str]) -> None:
    """Two halves give what one run gives: the steps, the losses, every weight and every moment of Adam's."""
    folder, first, second = halves
    assert f"step {STEPS // 2:5d}  saved" in first
    assert f"step {STEPS // 2:5d}  resumed" in second
    assert f"step {STEPS:5d}  saved" in second
    assert losses(first + second) == pytest.approx(losses(unbroken[1]), abs=1e-3)
    for name in ("state.safetensors", "model.safetensors"):
        torch.testing.assert_close(load_file(folder / name), load_file(unbroken[0] / name), rtol=1e-3, atol=1e-4)


def test_a_run_begins_with_a_model(unbroken: tuple[Path, str], tmp_path: Path) -> None:
    """--weights: every weight of that model, and other codes to train it on, which a resumed run keeps."""
    folder, settings = unbroken[0], plan.Settings(hidden=32, layers=2, digits=(7, 12))
    run = loop.Run(tmp_path, settings, plan.Budget(None, 5), print)
    run.begin_with(folder)
    torch.testing.assert_close(run.model.state_dict(), load(folder).state_dict(), rtol=0, atol=0)
    run.save()
    assert state.read_record(tmp_path).settings == settings
    said = run_here(
        "--out", str(tmp_path / "begun"), "--weights", str(folder), "--steps", "6", "--held-out", "4", *SMALL
    )
    assert losses(said)[0] < losses(unbroken[1])[1]


def test_interrupt_saves(tmp_path: Path) -> None:
    """Ctrl-C ends the run after the step in hand, with everything saved and no traceback."""
    with start("--out", str(tmp_path), "--steps", "100000", *SMALL) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("step     6")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert (process.returncode, errors) == (130, "")
    assert "--resume goes on" in output
    load(tmp_path)
    assert state.read_record(tmp_path).counters.step >= 6


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        (train, "--minutes 0", "--minutes"),
        (train, "--lengths 12", "--lengths"),
        (train, "--lengths many", "--lengths"),
        (train, "--hidden 40", "--hidden"),
        (train, "--lr nan", "--lr"),
        (train, "--bogus", "--bogus"),
        (train, "--resume --out missing", "nothing to resume"),
        (train, "--resume --out broken", "state.safetensors"),
        (train, "--out broken", "already"),
        (train, f"--out {EXAMPLE / 'model'}", "already"),
        (train, "--resume --layers 3 --out HALVES", "--layers"),
        (train, "--resume --digits 7 12 --out HALVES", "--digits"),
        (train, "--resume --weights HALVES --out HALVES", "--weights"),
        (train, "--weights HALVES --out other", "HALVES"),
        (train, "--weights missing --out other", "missing"),
        (train, "--digits 12 7", "--digits"),
        (train, "--digits 1 2 3", "--digits"),
        (train, "--digits 0", "--digits"),
        (make_prompt, "--tokens 5", "--tokens"),
        (make_prompt, "--depth 2", "--depth"),
        (make_prompt, "--digits 12 7", "--digits"),
        (make_prompt, "--records 400", "400 records"),
        (make_prompt, "--tokenizer missing.json", "missing.json"),
        (make_prompt, "--out missing/prompt.txt", "missing"),
    ],
)
def test_bad_arguments(
    script: Any,
    arguments: str,
    named: str,
    halves: tuple[Path, str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One clear line, and exit status 2."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(SystemExit) as ended:
        script.main([str(halves[0]) if word == "HALVES" else word for word in arguments.split(" ")])
    output, error = capsys.readouterr()
    assert (ended.value.code, output, error.count("\n")) == (2, "", 1)
    assert named.replace("HALVES", str(halves[0])) in error


def test_stages_grow() -> None:
    stages = plan.plan(plan.LENGTHS)
    assert [stage.lengths for stage in stages] == [(128,), (256,), (512,), (1024,), plan.LENGTHS, plan.LENGTHS]
    assert [stage.hiding for stage in stages] == [False] * 5 + [True]
    assert sum(stage.share for stage in stages) == pytest.approx(1)
    found = [plan.stage_at(stages, step / 1000, None) for step in range(1000)]
    assert [found.count(stage) / 1000 for stage in stages] == pytest.approx([s.share for s in stages], abs=0.002)
    # Retrieval at 4 % leaves 96 % for the others, in their old proportions.
    found = [plan.stage_at(stages, step / 1000, 0.04) for step in range(1000)]
    assert found.index(stages[1]) == 40
    assert found.count(stages[5]) / 1000 == pytest.approx(0.96 * 0.3 / 0.85, abs=0.002)
    drawn = [stages[-1].draw_length(rng) for rng in [random.Random(0)] for _ in range(4000)]
    counts = [drawn.count(length) for length in plan.LENGTHS]
    assert 0 < counts[0] < counts[2] < counts[5]  # the long ones oftener


def test_learning_rate_warms_up_and_falls() -> None:
    rates = [plan.learning_rate(1.0, step, step / 5000) for step in range(5001)]
    assert (rates[0], rates[-1]) == pytest.approx((1 / 200, 0))
    assert rates.index(max(rates)) == 199


def test_mask_hides_the_far_only() -> None:
    """A query sees itself and the six tokens before it, and of the others those that are not hidden."""
    hidden = network.hide(random.Random(2), 3, 40)
    assert hidden.any()
    mask = network.layer_0_mask(hidden)
    assert mask.shape == (3, 1, 40, 40)
    for text, query in itertools.product(range(3), range(40)):
        seen = [key <= query and (query - key < 7 or not hidden[text, key]) for key in range(40)]
        assert mask[text, 0, query].tolist() == seen
    assert mask[..., 0].all()


def test_hidden_share_is_drawn_per_text() -> None:
    """A quarter of the texts hide nothing; the others hide up to 97 %, often much; the first token never."""
    hidden = network.hide(random.Random(0), 2000, 400)
    assert not hidden[:, 0].any()
    shares = hidden[:, 1:].float().mean(dim=1)
    assert (shares == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert 0.95 < shares.max() < 1
    assert shares[shares > 0].median() > 0.6


@pytest.mark.parametrize(("n_layers", "gets_through"), [(1, False), (2, True)])
def test_hiding_is_of_layer_0_only(n_layers: int, gets_through: bool) -> None:
    """With everything hidden, a change reaches six places on; farther it comes only through the layers above."""
    model = Llama(ModelConfig("LlamaForCausalLM", 1024, 32, 64, n_layers, 2, 1, 16, 512, tie_word_embeddings=True))
    network.initialise(model, 0)
    hidden = torch.arange(20)[None] > 0
    ids = torch.arange(20)[None] + 100
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)  # so that a change shows
        change = network.forward(model, ids + 300 * (torch.arange(20) == 5), hidden)
        change -= network.forward(model, ids, hidden)
    assert change[0, 11].abs().max() > 1e-4
    assert (change[0, 12:].abs().max() > 1e-4) == gets_through


@pytest.mark.parametrize("tokens", [300, 3000])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_prompt(tokens: int, depth: float) -> None:
    """As long as asked, the record where asked, its code in the text once, and the same again from the same seed."""
    for seed in range(5):
        prompt = make_prompt.make_prompt(encode, tokens, depth, seed)
        assert prompt == make_prompt.make_prompt(encode, tokens, depth, seed)
        assert tokens - 20 <= len(encode(prompt.text)) + 1 <= tokens
        assert prompt.text.count(prompt.answers[0]) == 1
        body, asked = prompt.text.split("\n")
        key = tuple(asked.split()[-3:-1])
        assert asked == archive_text.question(key)
        before, after = (len(encode(part)) for part in body.split(archive_text.record(key, prompt.answers[0])))
        assert before / (before + after) == pytest.approx(depth, abs=12 / tokens)


def test_prompt_with_a_long_code(tmp_path: Path) -> None:
    assert make_prompt.main(["--digits", "12", "--answer-file", str(tmp_path / "answer.txt")]) == 0
    assert re.fullmatch(r"\d{12}\n", (tmp_path / "answer.txt").read_text())


def test_prompt_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file ends in one newline; stdout is the prompt alone, as it is. The bundled files are such files."""
    files = ["--out", str(tmp_path / "prompt.txt"), "--answer-file", str(tmp_path / "answer.txt")]
    assert make_prompt.main(["--seed", "8", *files]) == 0
    assert capsys.readouterr() == ("", "")
    assert make_prompt.main(["--seed", "8"]) == 0
    printed = capsys.readouterr()
    assert (tmp_path / "prompt.txt").read_text() == printed.out + "\n" == (EXAMPLE / "prompt.txt").read_text()
    assert "answer: " + (tmp_path / "answer.txt").read_text() == printed.err
    assert (tmp_path / "answer.txt").read_text() == (EXAMPLE / "answer.txt").read_text()


def test_texts_of_four_digits_are_those_that_the_bundled_model_was_trained_on() -> None:
    """The lengths of codes are a setting; where it is not given, nothing that is drawn changes."""
    batch = data.make_batch(random.Random(0), encode, 4, 512)
    assert zlib.crc32(batch.ids.numpy().tobytes()) == 1161999692


@pytest.mark.parametrize(("length", "digits"), [(64, (4, 4)), (128, (4, 4)), (1000, (4, 4)), (128, (7, 12))])
def test_training_example(length: int, digits: tuple[int, int]) -> None:
    """Exactly as long as asked; each answer is the code that the text gives, weighted whole, with EOS behind it."""
    tokenizer, rng = Tokenizer.from_file(str(EXAMPLE / "model" / "tokenizer.json")), random.Random(0)
    found: set[int] = set()
    for _ in range(10):
        ids, weights = data.make_example(rng, encode, length, digits)
        used = length - weights.count(0.0)
        assert len(ids) == len(weights) == length
        assert length - used < 20 + (digits[1] - digits[0]) * ids[:used].count(1)
        text = tokenizer.decode(ids[:used], skip_special_tokens=False).removeprefix("<|begin_of_text|>")
        body, _, questions = text.partition("\n")
        asked = re.findall(r"Question: (The access code of the \w+ \w+ is) (\d+)\.\n<\|end_of_text\|>", questions)
        assert len(asked) == ids[:used].count(1) >= 1
        assert weights.count(1.0) == sum(len(code) + 3 for _, code in asked)
        found |= {len(code) for _, code in asked}
        assert all(body.count(f"{sentence} {code}.") == body.count(code) == 1 for sentence, code in asked)
        assert 3 <= body.count("The access code") <= 48
    assert found <= set(range(digits[0], digits[1] + 1))
    assert len(found) > 1 or digits[0] == digits[1]


@pytest.mark.parametrize("digits", [(4, 4), (7, 12)])
def test_count_right(digits: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer is right if its code, full stop and newline all are; neither EOS nor the text around it counts."""
    batch = data.make_batch(random.Random(0), encode, 4, 128, digits, n_questions=1)
    predicted = batch.ids[:, 1:].clone()
    monkeypatch.setattr(network, "forward", lambda model, ids: torch.nn.functional.one_hot(predicted, 1024))
    assert network.count_right(None, batch) == (4, 4)
    answers = (batch.weights[:, 1:] == 1).int().argmax(dim=1)  # where they begin
    lengths = (batch.weights[:, 1:] == 1).sum(dim=1)
    predicted[0, answers[0] + 2] += 1  # a digit
    predicted[1, answers[1] + lengths[1] - 1] -= 1  # EOS
    predicted[2, 3] += 1  # the text
    assert network.count_right(None, batch) == (3, 4)
