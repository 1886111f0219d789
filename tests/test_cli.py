"""The command when all is well: text on stdout, figures on stderr, and the ways in which it can be stopped."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models

import fastkv
from fastkv import FastKV
from fastkv.cli import main
from fastkv.cli_flags import build_parser
from fastkv.console import summary
from fastkv.console.prompt import read_prompt
from fastkv.engine.output import Metrics
from fastkv.engine.step import Caches, EagerStepper
from fastkv.kernels import row_attention

# A model that recites: after each character comes the next one of this list, after the last the end of the text.
ALPHABET = "abcdefghijklmnopqrstuvwxyz é日本\U0001f600\n.ABCDEFGHIJKLMNOPQRSTUVWXYZ!"
BOS, EOS, FIRST = 0, 1, 2  # ids; the characters come after
N_LAYERS, N_KV_HEADS, HEAD_DIM = 4, 2, 4
SLOT_BYTES = N_LAYERS * N_KV_HEADS * HEAD_DIM * 2 * 4  # K and V of a token, in float32
CONTEXT = 100_000
HIDDEN = FIRST + len(ALPHABET)

Run = Callable[..., "Result"]


class Result(NamedTuple):
    status: int
    out: str
    err: str


def after(character: str) -> str:
    """What the model recites after a prompt that ends with `character`."""
    return ALPHABET[ALPHABET.index(character) + 1 :]


@pytest.fixture(scope="module")
def reciter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the reciting model: layers that add nothing, and a head that knows each character's successor."""
    folder = tmp_path_factory.mktemp("reciter")
    generator = torch.Generator().manual_seed(0)
    tensors = {"model.embed_tokens.weight": torch.eye(HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    heads = {"q_proj": 2 * N_KV_HEADS, "k_proj": N_KV_HEADS, "v_proj": N_KV_HEADS}
    for layer in range(N_LAYERS):
        block = f"model.layers.{layer}."
        for name, count in heads.items():
            weight = torch.randn(count * HEAD_DIM, HIDDEN, generator=generator)
            tensors[f"{block}self_attn.{name}.weight"] = weight
        tensors[f"{block}self_attn.o_proj.weight"] = torch.zeros(HIDDEN, 2 * N_KV_HEADS * HEAD_DIM)
        tensors[f"{block}mlp.gate_proj.weight"] = torch.zeros(8, HIDDEN)
        tensors[f"{block}mlp.up_proj.weight"] = torch.zeros(8, HIDDEN)
        tensors[f"{block}mlp.down_proj.weight"] = torch.zeros(HIDDEN, 8)
        tensors[f"{block}input_layernorm.weight"] = torch.ones(HIDDEN)
        tensors[f"{block}post_attention_layernorm.weight"] = torch.ones(HIDDEN)
    head = torch.zeros(HIDDEN, HIDDEN)
    head[FIRST, BOS] = head[FIRST, EOS] = head[EOS, HIDDEN - 1] = 1.0
    for token_id in range(FIRST, HIDDEN - 1):
        head[token_id + 1, token_id] = 1.0
    save_file({**tensors, "lm_head.weight": head}, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": HIDDEN,
        "hidden_size": HIDDEN,
        "intermediate_size": 8,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 2 * N_KV_HEADS,
        "num_key_value_heads": N_KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "torch_dtype": "float32",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    vocabulary = {"<s>": BOS, "</s>": EOS} | {character: FIRST + i for i, character in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    stated = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({**stated, "chat_template": template}))
    return folder


@pytest.fixture
def run(reciter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """run(prompt, *argv, status=0): the command in this process, on the reciting model."""

    def call(prompt: str | bytes, *argv: str, status: int = 0) -> Result:
        path = tmp_path / "prompt.txt"
        path.write_bytes(prompt.encode() if isinstance(prompt, str) else prompt)
        given = main(["--model", str(reciter), "--prompt", str(path), *argv])
        result = Result(given, *capfd.readouterr())
        assert result.status == status, result.err
        return result

    return call


# --- what goes where --------------------------------------------------------------------------------------------------


def test_stdout_is_the_text_and_nothing_else(run: Run) -> None:
    result = run("xyz")
    assert result.out == after("z")
    assert result.err


def test_no_newline_is_added_to_the_text(run: Run) -> None:
    assert run("x", "--max-tokens", "2", "--quiet") == (0, "yz", "")


def test_quiet_says_nothing_on_stderr(run: Run) -> None:
    assert run("xyz", "--quiet").err == ""


def test_no_terminal_no_progress(run: Run) -> None:
    """Not a carriage return, not an escape sequence, where stderr is a file."""
    assert all(line.isprintable() for line in run("xyz").err.splitlines())


def test_figures(run: Run) -> None:
    """Each of them, against what the method says of a prompt of 1 000 tokens."""
    prompt = "abcdefghij" * 99 + "abcdefghi"  # and a BOS: 1 000 tokens
    argv = ["--tsp-rate", "0.5", "--kv-retention", "0.25", "--min-tokens", "8", "--max-tokens", "10"]
    err = run(prompt, *argv).err
    figures = {line[:13].strip(): line[13:] for line in err.splitlines()}
    assert figures["policy"].startswith("fastkv")
    assert "cpu" in figures["policy"]
    assert "float32" in figures["policy"]
    assert figures["prompt"] == "1,000 tokens"
    assert float(figures["first token"].removesuffix(" s")) > 0
    decoded, speed = figures["decode"].split(", ", 1)
    assert decoded == "10 tokens"
    assert float(speed.removesuffix(" tokens/s").replace(",", "")) > 0
    entries = N_LAYERS * N_KV_HEADS * 1000
    assert f"{entries // 4:,} of {entries:,} entries (25.0 %)" in figures["KV kept"]
    kept, full = (-(-(tokens + 10) // 32) * 32 * SLOT_BYTES / 2**20 for tokens in (250, 1000))
    assert f"{kept:.1f} MiB of {full:.1f} MiB" in figures["KV kept"]
    assert figures["TSP"] == "500 tokens (50.0 %) propagated after layer 1"
    assert "MiB" in figures["peak memory"]
    assert re.fullmatch(r"kept \d+ % of attention mass.*", figures["attention"])
    assert len(figures) == 8


def test_figures_of_many_reductions_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "MOST_STAGES", 1)
    settings = ["--first-layer", "0", "--decay", "0.5", "--floor", "0.1", "--min-tokens", "8"]
    err = run("x" * 1000, "--policy", "pyramidinfer", *settings).err
    (line,) = (line for line in err.splitlines() if " propagated after " in line)
    assert line.startswith("tokens       500 tokens (50.0 %) propagated after layer 0, fewer from layer to layer, ")
    assert line.endswith(f" propagated after layer {N_LAYERS - 2}")


def test_figures_of_a_single_token_have_no_speed(run: Run) -> None:
    line = next(line for line in run("x", "--max-tokens", "1").err.splitlines() if line.startswith("decode"))
    assert line.split() == ["decode", "1", "token"]


def test_figures_say_where_nothing_is_dropped(run: Run) -> None:
    """A prompt below min_tokens is kept whole: 100 %, and no line on TSP."""
    err = run("xyz").err
    assert "(100.0 %)" in err
    assert "TSP" not in err


def test_policy_full(run: Run) -> None:
    prompt = "abcdefghij" * 50
    full = run(prompt, "--policy", "full", "--max-tokens", "20")
    assert "full" in full.err.splitlines()[0]
    assert "(100.0 %)" in full.err
    assert "TSP" not in full.err
    assert full.out == run(prompt, "--max-tokens", "20").out == after("j")[:20]


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_json_is_one_object(run: Run, reciter: Path, quiet: list[str]) -> None:
    """The same keys as in the library, whatever the prompt; figures go on to stderr."""
    result = run("xyz", "--json", *quiet)
    assert len(result.out.splitlines()) == 1
    assert result.out.endswith("\n")
    printed = json.loads(result.out)
    assert printed["text"] == after("z")
    assert printed["token_ids"] == [*range(FIRST + ALPHABET.index("z") + 1, HIDDEN), EOS]
    assert printed["finish_reason"] == "stop"
    assert printed["policy"]["name"] == "fastkv"
    assert set(printed["policy"]) == {"name", *(field.name for field in dataclasses.fields(FastKV))}
    assert list(printed["metrics"]) == [field.name for field in dataclasses.fields(Metrics)]
    assert printed["metrics"]["prompt_tokens"] == 4
    assert printed["metrics"]["new_tokens"] == len(printed["token_ids"])
    entries = N_LAYERS * N_KV_HEADS * 4
    size = 288 * SLOT_BYTES  # for 4 + 256 tokens, rounded up to whole blocks of 32
    expected = {"kv_tokens": 4, "kv_entries": entries, "kv_bytes": size, "tsp_tokens": 4}
    assert {**printed["metrics"], **expected, "kv_full_entries": entries, "kv_full_bytes": size} == printed["metrics"]
    assert bool(result.err) == (not quiet)


def test_json_holds_text_as_it_is(run: Run) -> None:
    """Not escaped: a person may read it too."""
    assert "é日本\U0001f600\\n." in run("x", "--json").out


def test_json_of_another_policy(run: Run) -> None:
    printed = json.loads(run("x", "--json", "--policy", "full").out)
    assert printed["policy"] == {"name": "full"}
    assert printed["metrics"]["kv_entries"] == printed["metrics"]["kv_full_entries"]


# --- what the flags do ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["--max-tokens", "3"], "bcd"),
        (["--stop", "efg"], "bcd"),
        (["--stop", "no such", "--stop", "hi", "--stop", "fg"], "bcde"),
        (["--stop", "日"], ALPHABET[1:28]),
        (["--stop", "-", "--max-tokens", "2"], "bc"),
        (["--stop", "b"], ""),
        (["--stop-token", "e"], "bcd"),
        (["--stop-token", str(FIRST + 4), "--stop-token", "f"], "bcd"),
        (["--stop-token", "e", "--ignore-eos"], "bcd"),
        (["--stop", "</s>", "--ignore-eos", "--max-tokens", "99"], ALPHABET[1:]),  # a special token, which has no text
        ([], ALPHABET[1:]),
        (["--ignore-eos", "--max-tokens", str(HIDDEN)], ALPHABET[1:] + ALPHABET[:2]),
        (["--temperature", "0.001", "--seed", "3", "--max-tokens", "5"], "bcdef"),
        (["--temperature", "9", "--top-k", "1", "--max-tokens", "5"], "bcdef"),
        (["--temperature", "1", "--min-p", "1", "--max-tokens", "5"], "bcdef"),
        (["--temperature", "1", "--top-p", "1e-9", "--max-tokens", "5"], "bcdef"),
    ],
)
def test_what_ends_the_text(run: Run, argv: list[str], text: str) -> None:
    assert run("a", "--quiet", *argv).out == text


def test_seed_and_temperature(run: Run) -> None:
    argv = ["--quiet", "--temperature", "50", "--max-tokens", "30", "--ignore-eos", "--seed"]
    assert run("a", *argv, "1").out == run("a", *argv, "1").out
    assert run("a", *argv, "1").out != run("a", *argv, "2").out


def test_repetition_penalty(run: Run) -> None:
    """The prompt has the letter that would come next; a penalty makes it no better than the rest."""
    assert run("cba", "--quiet", "--max-tokens", "1").out == "b"
    argv = ["--quiet", "--max-tokens", "50", "--temperature", "0.05", "--seed", "1", "--ignore-eos"]
    plain, penalised = run("cba", *argv).out, run("cba", *argv, "--repetition-penalty", "1e6").out
    assert plain.startswith("bcdefg")
    assert not penalised.startswith("bcdefg")


def test_settings_of_the_policy_arrive(run: Run) -> None:
    """Each flag reaches the setting of its name: the JSON tells the settings that were used."""
    given = {
        "tsp_layer": 2,
        "tsp_rate": 0.5,
        "kv_retention": 0.25,
        "tsp_len": 300,
        "kv_len": 200,
        "window": 4,
        "kernel": 5,
        "pooling": "avg",
        "min_tokens": 16,
        "queries": "sum",
        "reach": 3,
        "tsp_reach": 4,
        "tsp_window": 12,
        "values": False,
        "sinks": 2,
        "share": 0.5,
        "narrow": 0.25,
        "lookahead": 1,
        "lookahead_reach": 5,
    }
    texts = {name: {False: "no"}.get(value, str(value)) for name, value in given.items()}
    argv = [text for name, value in texts.items() for text in (f"--{name.replace('_', '-')}", value)]
    printed = json.loads(run("abcdefghij" * 50, "--json", "--max-tokens", "1", *argv).out)
    unset = {"keep_mass": None, "keep_mass_by": "layer", "keep_mass_most": 1.0}  # does not go with --kv-len
    assert printed["policy"] == {"name": "fastkv", **given, **unset}
    assert printed["metrics"]["tsp_tokens"] == 300
    assert printed["metrics"]["kv_tokens"] == 200
    argv = ["--keep-mass", "0.5", "--keep-mass-by", "head", "--keep-mass-most", "0.4", "--min-tokens", "16"]
    printed = json.loads(run("abcdefghij" * 50, "--json", "--max-tokens", "1", *argv).out)
    found = [printed["policy"][name] for name in unset]
    assert found == [0.5, "head", 0.4]
    assert max(printed["metrics"]["layer_entries"]) <= 200 * 2
    assert len(set(printed["metrics"]["layer_entries"])) > 1


def test_a_decode_budget_bounds_the_answer_and_is_told(run: Run) -> None:
    argv = ["--policy", "full", "--ignore-eos", "--max-tokens", "90", "--decode-budget", "32"]
    told, printed = run("x", *argv), json.loads(run("x", "--json", *argv).out)
    assert "budget       32 entries a head while decoding" in told.err.splitlines()
    assert printed["decode_budget"] == 32
    assert printed["metrics"]["new_tokens"] == 90
    assert printed["metrics"]["kv_bytes"] < printed["metrics"]["kv_full_bytes"]
    plain = run("x", *argv[:-2])
    assert told.out == plain.out
    assert "budget" not in plain.err


def test_lossless_is_the_answer_of_the_full_cache_and_is_told(run: Run) -> None:
    argv = ["--ignore-eos", "--max-tokens", "9", "--draft-tokens", "2", "--lossless", "--draft-weights", "int8"]
    plain = run("abcdefghij" * 50, "--ignore-eos", "--max-tokens", "9", "--policy", "full")
    told, printed = run("abcdefghij" * 50, *argv), json.loads(run("abcdefghij" * 50, "--json", *argv).out)
    assert told.out == plain.out == printed["text"]
    spec = printed["metrics"]["speculation"]
    assert 1 + spec["verifications"] + spec["plain_steps"] + spec["accepted_tokens"] == 9
    assert f"lossless     {spec['accepted_tokens']} of {spec['drafted_tokens']} drafted tokens accepted" in told.err
    assert "on top of the full cache" in told.err
    assert printed["warning"] is None
    text = run("abab" * 50, "--speculation", "ngram", "--max-tokens", "4").err
    assert "ngram " in text
    assert "draft  " not in text


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--lossless", "--speculation", "ngram"], "--speculation ngram"),
        (["--lossless", "--output", "out.jsonl"], "error: --lossless does not go with --output"),
        (["--speculation", "ngram", "--context", "c.txt"], "error: --speculation does not go with --context:"),
        (["--lossless", "--context", "c.txt"], "error: --lossless does not go with --context:"),
        (["--lossless", "--decode-budget", "64"], "--decode-budget"),
        (["--speculation", "ngram", "--draft-weights", "int8"], "--draft-weights"),
        (["--lossless", "--policy", "full"], "error: --lossless: policy full keeps all entries"),
        (["--speculation", "self", "--policy", "full"], "error: --speculation: policy full keeps all entries"),
        (["--speculation", "ngram", "--policy", "quest"], "error: --speculation: speculation ngram does not go with"),
        (["--lossless", "--draft-weights", "int8", "--weights", "int8"], "both int8"),
        (["--lossless", "--draft-weights", "int4"], "take int8"),  # of rows of 62
        (["--lossless", "--draft-weights", "int4", "--weights", "int8"], "take int8"),
    ],
)
def test_what_speculation_does_not_go_with(
    run: Run, argv: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.txt").write_text("x")
    found = run("x", *argv, status=2)
    assert named in found.err
    assert not (tmp_path / "out.jsonl").exists()


def test_the_default_tsp_layer_is_told(run: Run) -> None:
    assert json.loads(run("x", "--json", "--max-tokens", "1").out)["policy"]["tsp_layer"] == 1


@pytest.mark.parametrize(("dtype", "printed"), [("auto", "float32"), ("bfloat16", "bfloat16"), ("float16", "float16")])
def test_dtype_and_device(run: Run, dtype: str, printed: str) -> None:
    result = run("x", "--dtype", dtype, "--device", "cpu", "--max-tokens", "4")
    assert result.out == "yz é"
    assert f"on cpu in {printed}" in result.err


def test_threads(run: Run) -> None:
    try:
        assert run("x", "--threads", "2", "--max-tokens", "1", "--quiet").out == "y"
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_chat_and_system(run: Run) -> None:
    """The template of this model writes a BOS and the messages; the BOS is there once."""
    printed = json.loads(run("xyz", "--chat", "--system", "abc", "--json").out)
    assert printed["text"] == after("z")
    assert printed["metrics"]["prompt_tokens"] == 1 + 3 + 3
    assert json.loads(run("xyz", "--chat", "--json").out)["metrics"]["prompt_tokens"] == 1 + 3


def test_a_warning_is_a_line_of_the_command(run: Run) -> None:
    said = run("<s>a", "--max-tokens", "1", "--quiet").err
    assert said.startswith("fastkv-run: warning: the prompt begins with a BOS token")
    assert len(said.splitlines()) == 1
    assert run("a", "--max-tokens", "1", "--quiet").err == ""


def test_arguments_of_the_chat_template(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is JSON is what it says, and anything else a text. One that is not used is a mistake."""
    template = "{{ a is sameas false }}{{ b }}{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr("fastkv.models.text.chat._stated", lambda fields: template)
    given = json.loads(run("xyz", "--chat", "--chat-arg", "a=false", "--chat-arg", "b=cd", "--json").out)
    assert given["metrics"]["prompt_tokens"] == len("Truecdxyz")
    refused = run("xyz", "--chat", "--chat-arg", "enable_thinking=false", status=2)
    assert refused.err.startswith("fastkv-run: error: --chat-arg: ")
    assert "enable_thinking" in refused.err


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for action in build_parser()._actions:
        assert action.option_strings[-1] in printed.out
        assert action.help


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr() == (f"fastkv-run {fastkv.__version__}\n", "")


# --- the prompt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"one", "one"),
        (b"one\n", "one"),
        (b"one\r\n", "one"),
        (b"one\n\n", "one\n"),
        (b"one\r\n\r\n", "one\r\n"),
        (b"one\n\r\n", "one\n"),
        (b"one\r\n\n", "one\r\n"),
        (b"one\r", "one\r"),
        (b"one \n", "one "),
        (b"\none\n", "\none"),
        (b"  one\ttwo  ", "  one\ttwo  "),
        (b"one\r\ntwo\rthree\nfour", "one\r\ntwo\rthree\nfour"),
        (b"\xef\xbb\xbfone", "one"),
        (b"\xef\xbb\xbf\xef\xbb\xbfone", "\ufeffone"),
        (b"one\xef\xbb\xbf", "one\ufeff"),
        (b"\n\n", "\n"),
        (b" ", " "),
        ("é日本\U0001f600\u2028".encode(), "é日本\U0001f600\u2028"),
        (b"\x1b[0m\x0c\x7f", "\x1b[0m\x0c\x7f"),
    ],
)
def test_a_prompt_file_is_taken_verbatim(tmp_path: Path, content: bytes, text: str) -> None:
    """But for a byte-order mark, and one newline at its end, which editors put there."""
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    assert read_prompt(str(path)) == text


def test_the_prompt_reaches_the_model(run: Run) -> None:
    assert run("\ufeffab é\n", "--max-tokens", "2", "--quiet").out == "日本"


# --- in a process of its own ------------------------------------------------------------------------------------------


def start(folder: Path, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
    """The command in a process of its own: its stdout and stderr are pipes unless `options` say otherwise."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment = {**inherited, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    settings = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, "-m", "fastkv", "--model", str(folder), *argv]
    return subprocess.Popen(command, env=environment, **settings)


def read_some(process: subprocess.Popen[bytes]) -> bytes:
    """What stdout holds as soon as it holds something."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], 60)
    assert ready, "nothing came"
    return os.read(process.stdout.fileno(), 1 << 16)


FOREVER = ["--max-tokens", "90000", "--ignore-eos"]


def test_standard_input_and_broken_locale(reciter: Path) -> None:
    """Text in and out is UTF-8, whatever the environment says; the figures that it cannot spell do no harm."""
    environment = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    process = start(reciter, "--prompt", "-", env=environment)
    out, err = process.communicate("\ufeffxyz é\n".encode())
    assert process.returncode == 0, err
    assert out.decode() == after("é")
    assert b"prompt       6 tokens" in err  # a BOS and five characters


def test_text_comes_as_it_is_made_and_ctrl_c_keeps_it(reciter: Path) -> None:
    """Pieces arrive long before the end. Ctrl-C: the text so far stays, the figures follow, and no traceback."""
    process = start(reciter, "--prompt", "-", *FOREVER)
    assert process.stdin is not None
    process.stdin.write(b"a")
    process.stdin.close()
    first = b""
    while len(first) < 20:
        first += read_some(process)
    assert process.poll() is None
    assert len(first) < 8000  # not a buffer full
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = first + process.stdout.read(), process.stderr.read().decode()
    assert process.wait(60) == 130
    expected = (ALPHABET * 2000).encode()[1 : len(out) + 1]
    assert out == expected
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err
    assert err.startswith("policy ")
    assert " tokens/s" in err


def test_a_closed_pipe_ends_quietly(reciter: Path) -> None:
    """`fastkv-run ... | head`: the reader has what it wanted, and nothing went wrong."""
    process = start(reciter, "--prompt", "-", *FOREVER)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"a")
    process.stdin.close()
    assert read_some(process)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 0


def test_a_pipe_that_nobody_reads(reciter: Path, tmp_path: Path) -> None:
    """The same for output that comes at once, at the very end."""
    (tmp_path / "prompt.txt").write_text("a")
    reader, writer = os.pipe()
    os.close(reader)
    process = start(reciter, "--prompt", str(tmp_path / "prompt.txt"), "--json", stdout=writer)
    os.close(writer)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, b"")


@pytest.mark.parametrize("argv", [[], ["--json"]])
def test_ctrl_c_while_generating(run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    """Exactly ten tokens are there when the signal comes; the JSON tells them as an interrupted request."""
    steps = 0
    step = EagerStepper.step

    def interrupted(self: EagerStepper, caches: Caches) -> None:
        nonlocal steps
        steps += 1
        if steps == 10:
            signal.raise_signal(signal.SIGINT)
        step(self, caches)

    monkeypatch.setattr(EagerStepper, "step", interrupted)
    result = run("a", *argv, "--max-tokens", "50", status=130)
    assert "decode       10 tokens" in result.err
    if not argv:
        assert result.out == "bcdefghijk"
    else:
        printed = json.loads(result.out)
        assert printed["text"] == "bcdefghijk"
        assert len(printed["token_ids"]) == printed["metrics"]["new_tokens"] == 10
        assert printed["finish_reason"] == "interrupted"


def test_ctrl_c_before_the_first_token(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **settings: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fastkv.engine.loaded.load_weights", interrupted)
    assert run("a", status=130) == (130, "", "")


def test_ctrl_c_while_reading_the_prompt(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been measured or kept by then, and no figure says so."""

    def interrupted(*args: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("fastkv.engine.decode_batch.prefill", interrupted)
    result = run("a", "--policy", "gemfilter", "--kv-len", "1", status=130)
    assert result.out == ""
    assert [line[:13].strip() for line in result.err.splitlines()] == ["policy", "prompt", "decode"]


def test_a_terminal_gets_its_figures_on_a_line_of_their_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a newline in stdout, which stays the text alone."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    result = run("a", "--max-tokens", "2")
    assert result.out == "bc"
    assert result.err.startswith("\npolicy")
    ended = run("\U0001f600", "--max-tokens", "1")
    assert ended.out == "\n"
    assert ended.err.startswith("policy")


@pytest.mark.parametrize("argv", [[], ["--json"], ["--quiet"]])
def test_without_stderr(run: Run, monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    """A program without a console has no sys.stderr: the figures have nowhere to go, and the text is what it is."""
    monkeypatch.setattr(sys, "stderr", None)
    result = run("x", "--max-tokens", "2", *argv)
    assert (json.loads(result.out)["text"] if "--json" in argv else result.out) == "yz"
    assert result.err == ""


def python(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, check=False)


def test_python_m_fastkv_is_the_command() -> None:
    done = python("-m", "fastkv", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fastkv-run {fastkv.__version__}\n", "")


HEAVY = ("torch", "numpy", "safetensors", "tokenizers", "sentencepiece", "huggingface_hub", "jinja2", "transformers")


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["--no-such-flag"], 2),
        (["--model", "x", "--prompt", "/no/such/file"], 2),
        (["--model", "x", "--prompt", "/no/such/file", "--threads", "0"], 2),
    ],
)
def test_answers_that_need_no_model_come_at_once(argv: list[str], status: int) -> None:
    """Nothing heavy is imported for help, the version, or a complaint about the command line or the prompt."""
    code = f"""
import atexit, sys
atexit.register(lambda: print("heavy:", [name for name in {HEAVY} if name in sys.modules]))
from fastkv.cli import main
sys.exit(main())
"""
    done = python("-c", code, *argv)
    assert done.returncode == status, done.stderr
    assert done.stdout.endswith("heavy: []\n")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = f"import sys, fastkv; dir(fastkv); print([name for name in {HEAVY} if name in sys.modules])"
    assert python("-c", code).stdout == "[]\n"


def test_loading_a_model_loads_no_compiler(reciter: Path) -> None:
    """Initialising weights on the meta device, which is for nothing, made torch import its compiler: seconds."""
    code = "import sys; from fastkv import LLM; LLM(sys.argv[1]).generate('a'); print('torch._dynamo' in sys.modules)"
    assert python("-c", code, str(reciter)).stdout == "False\n"


def test_several_tsp_layers(run: Run) -> None:
    argv = ["--tsp-layer", "0,1", "--tsp-rate", "0.5,0.2", "--min-tokens", "8", "--max-tokens", "2", "--json"]
    policy = json.loads(run("abcdefghij" * 20, *argv).out)["policy"]
    assert (policy["tsp_layer"], policy["tsp_rate"]) == ([0, 1], [0.5, 0.2])


@pytest.mark.parametrize("calibration", ["on", "off"])
def test_verbose_tells_which_kernels_were_chosen(
    calibration: str, run: Run, monkeypatch: pytest.MonkeyPatch, cache_folder: Path
) -> None:
    """After the figures, one line for each choice; no line without the flag."""
    row_attention.forget()
    monkeypatch.setenv("FASTKV_CALIBRATION", calibration)
    monkeypatch.setattr(row_attention, "_COLD", 2**10)
    result = run("abc", "--verbose", "--dtype", "float32", "--device", "cpu", "--max-tokens", "4")
    row_attention.forget()
    told = [line for line in result.err.splitlines() if line.startswith("kernel")]
    if calibration == "off":
        assert told == ["kernels      not measured: FASTKV_CALIBRATION is off"]
        assert not cache_folder.exists()
        return
    assert any(
        re.fullmatch(r"kernel +attention of .* entries, float32, 1 threads: \w+ \(\w+ [\d.]+ ms, .*\)", line)
        for line in told
    )
    assert result.err.splitlines()[-len(told) :] == told
    assert "kernel" not in run("abc", "--dtype", "float32", "--device", "cpu", "--max-tokens", "4").err
