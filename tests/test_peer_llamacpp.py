"""llama.cpp beside this engine: the file it gets is the same model, and the table says what was measured.

What needs neither package of llama.cpp runs everywhere; the process that asks it is tested with a stand-in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file

from fastkv import LLM, FastKVError, FullKV, SamplingParams
from fastkv.errors import FaultError
from fastkv.models.rope_config import RopeConfig

STAND_IN = """
from types import SimpleNamespace as Some
__version__ = "1.2"
llama_load_mode = Some(LLAMA_LOAD_MODE_MMAP=1)
llama_flash_attn_type = Some(LLAMA_FLASH_ATTN_TYPE_AUTO=-1)

def CommonParams():
    return Some(model=Some(), cpuparams=Some(), cpuparams_batch=Some())

def get_system_info():
    return "CPU : SSE3 = 1 | AVX2 = 1 | AVX512 = 0 | "

class Server:
    def __init__(self, params):
        print("words of the library")
        self.params = params

    def handle_completions(self, asked):
        prompt, new = asked["prompt"], asked["n_predict"]
        if prompt[0] == 99:
            raise SystemExit("broken")
        if prompt[0] == 98:
            return {"error": "no"}
        times = {"cache_n": 7 if prompt[0] == 97 else 0, "prompt_n": len(prompt), "predicted_n": new}
        chosen = [{"id": prompt[-1] + 1 + i} for i in range(new)]
        heard = [self.params.model.path, self.params.n_ctx, self.params.cpuparams.n_threads]
        heard += [asked["cache_prompt"], asked["ignore_eos"], asked["top_k"]]
        return {"choices": [{"logprobs": {"content": chosen}}], "timings": times | {"heard": heard}}
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package xllamacpp for the process that llama.cpp runs in."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "xllamacpp.py").write_text(STAND_IN)
    (tmp_path / "packages" / "fastkv").symlink_to(ROOT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))


class Peer:
    """Stands for llama.cpp: twice the time for F32, and the tokens of an engine that is given to the class."""

    llm: LLM
    settings: list[tuple[str, int, int]] = []  # noqa: RUF012

    def __init__(self, path: Path, threads: int, n_ctx: int, ubatch: int = 512) -> None:
        self.slow = 2 if "F32" in path.name else 1
        self.about = {"version": "9.9", "instructions": ["AVX2", "FMA"]}
        self.settings.append((path.name, n_ctx, ubatch))

    def complete(self, ids: list[int], new_tokens: int) -> dict[str, Any]:
        return {"prompt_ms": 500.0 * self.slow, "predicted_ms": (new_tokens - 1) * 10.0 * self.slow}

    def tokens(self, ids: list[int], new_tokens: int) -> list[int]:
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
        return [*self.llm.generate(ids, params, FullKV()).token_ids[:-2], -1, -1]

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def run(
    benchmarks: Any, archive_folder: Path, archive_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """The command on the bundled model, with a llama.cpp that is none."""
    monkeypatch.setattr(benchmarks.peer_llamacpp.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(benchmarks.gguf_file, "gguf_file", lambda model, kind, folder: folder / f"{kind}.gguf")
    monkeypatch.setattr(benchmarks.llamacpp, "LlamaCpp", Peer)
    monkeypatch.setattr(Peer, "llm", archive_llm, raising=False)
    monkeypatch.setattr(Peer, "settings", [])
    small = ["--model", str(archive_folder), "--rounds", "2", "--new-tokens", "4", "--gguf-folder", str(tmp_path)]
    return lambda *argv: benchmarks.peer_llamacpp.main([*small, *map(str, argv)])


def test_every_context_has_its_rows(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--context", 50, 90, "--ubatch", 64, "--json", tmp_path / "out.json") == 0
    printed = capsys.readouterr().out
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]
    assert re.fullmatch(r"- CPUs that .*: \S+ at 50, \S+ at 90", printed.splitlines()[-1])
    engines = [["llama.cpp", "F32"], ["llama.cpp", "Q8_0"]]
    engines += [[f"fastkv, {policy}", "float32"] for policy in ("full", "fastkv")]
    assert [cells[:3] for cells in table[1:]] == [[n, *engine] for n in ("50", "90") for engine in engines]
    assert {len(cells) for cells in table} == {7}
    assert table[1][3:] == ["1.000 (1.000 – 1.000)", "–", "50.0 (50.0 – 50.0)", "–"]
    assert table[2][3:] == ["0.500 (0.500 – 0.500)", "–", "100.0 (100.0 – 100.0)", "–"]
    written = json.loads((tmp_path / "out.json").read_text())
    for row in written["rows"]:
        assert len(row["samples"]) == 2
        if row["engine"] != "llama.cpp":
            assert row["prefill_to_peer"] == 1.0 / row["ttft_s"]
            assert row["decode_to_peer"] == row["decode_tokens_per_s"] / 50.0
    assert "--context 50 90" in written["command"]
    assert (written["rounds"], written["new_tokens"], written["same_tokens"]) == (2, 4, 14)
    assert Peer.settings[1:] == [(f"{kind}.gguf", n + 4, 64) for n in (50, 90) for kind in ("F32", "Q8_0")]


def test_the_head_says_what_the_rows_are(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--context", 50) == 0
    head = capsys.readouterr().out.split("|")[0]
    words = ("1 thread;", torch.__version__, "xllamacpp 9.9", "AVX2 FMA", "14 of 16", "2 of each", "4 new tokens")
    for word in (*words, f"torch {torch.backends.cpu.get_cpu_capability()}"):
        assert word in head, word


def test_ratios_are_between_weights_of_the_same_kind(benchmarks: Any) -> None:
    """float32 to F32, int8 to Q8_0: how many times as fast, in either column."""
    times = {"llama.cpp F32": (4.0, 10.0), "llama.cpp Q8_0": (3.0, 40.0), "full float32": (2.0, 5.0)}
    times |= {"fastkv float32": (1.0, 20.0), "full int8": (6.0, 20.0), "fastkv int8": (1.5, 80.0)}
    samples = {name: [benchmarks.runners.Sample(*pair, 9.0)] for name, pair in times.items()}
    rows = benchmarks.peer_llamacpp.summarise(samples, 100)
    found = {(row["engine"], row["weights"]): (row.get("prefill_to_peer"), row.get("decode_to_peer")) for row in rows}
    assert found == {
        ("llama.cpp", "F32"): (None, None),
        ("llama.cpp", "Q8_0"): (None, None),
        ("full", "float32"): (2.0, 0.5),
        ("fastkv", "float32"): (4.0, 2.0),
        ("full", "int8"): (0.5, 0.5),
        ("fastkv", "int8"): (2.0, 2.0),
    }


def test_the_load_of_others(benchmarks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 10 s two CPUs are busy for 16 s: 4 s by this process, 5 s by its children, so 7 s by others."""
    clock = SimpleNamespace(now=100.0)
    second = os.sysconf("SC_CLK_TCK")
    stat, times = tmp_path / "stat", [1.0, 2.0, 3.0, 4.0, 0.0]
    monkeypatch.setattr(benchmarks.other_load, "_STAT", stat)
    monkeypatch.setattr(benchmarks.other_load, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(benchmarks.other_load.os, "times", lambda: times)
    stat.write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 5 5 5\n")
    load = benchmarks.other_load.OtherLoad()
    stat.write_text(
        f"cpu  {6 * second} {5 * second} {second} {99 * second} {77 * second} {second} {second} {2 * second}"
    )
    clock.now, times[:] = 110.0, [4.0, 3.0, 7.0, 5.0, 0.0]
    assert load.cpus() == pytest.approx(0.7)
    stat.unlink()
    assert load.cpus() is None
    assert benchmarks.peer_llamacpp.foot(
        [{"context": 2048, "other_cpus": 0.704}, {"context": 9, "other_cpus": None}]
    ) == ("- CPUs that other programs used meanwhile, in the mean: 0.70 at 2,048, unknown at 9")


def test_a_row_as_a_line(benchmarks: Any) -> None:
    row = {"context": 4096, "engine": "full", "weights": "int8", "ttft_s": 1.5, "ttft_range": [1.25, 2.0]}
    row |= {"decode_tokens_per_s": 20.0, "decode_range": [19.0, 21.5], "prefill_to_peer": 0.5, "decode_to_peer": 2.0}
    line = "| 4,096 | fastkv, full | int8 | 1.500 (1.250 – 2.000) | 0.50 | 20.0 (19.0 – 21.5) | 2.00 |"
    assert benchmarks.peer_llamacpp.table_row(row) == line


@pytest.mark.parametrize(
    ("one", "other", "agreeing"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 5, 3], 1), ([4, 2], [1, 2], 0), ([1, 2, 3], [1, 2], 2)],
)
def test_tokens_agree_up_to_where_they_part(benchmarks: Any, one: list[int], other: list[int], agreeing: int) -> None:
    assert benchmarks.peer_llamacpp.leading_agreement(one, other) == agreeing


def test_another_model_is_not_measured(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Peer, "tokens", lambda self, ids, new_tokens: [-1] * new_tokens)
    assert run("--context", 50) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert "not the same model" in error


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--context", "0"], "--context must be a whole number of at least 1, not 0"),
        (["--context", "9000"], "--context 9000 with --new-tokens 4 is more than the model's context of 8192"),
        (["--new-tokens", "1"], "--new-tokens must be a whole number of at least 2"),
        (["--rounds", "0"], "--rounds"),
        (["--threads", "0"], "--threads"),
        (["--ubatch", "0"], "--ubatch"),
        (["--weights", "int4"], "--weights: invalid choice: 'int4'"),
        (["--json", "missing/out.json"], "--json: missing/out.json: cannot be written"),
        (["--gguf-folder", "a-file"], "--gguf-folder: a-file: is no folder"),
        (["--model", "no-folder"], "no-folder: no such folder"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    argv: list[str],
    named: str,
    benchmarks: Any,
    run: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    monkeypatch.setattr(benchmarks.gguf_file, "gguf_file", lambda *_: pytest.fail("the run began"))
    assert run(*argv) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("peer_llamacpp.py: error: ")
    assert named in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a-file"]


@pytest.mark.parametrize("package", ["xllamacpp", "gguf"])
def test_a_missing_package_is_told_with_the_way_to_get_it(
    package: str,
    benchmarks: Any,
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find = benchmarks.peer_llamacpp.importlib.util
    monkeypatch.setattr(find, "find_spec", lambda name: None if name == package else name)
    assert run("--context", 50) == 2
    said = f"peer_llamacpp.py: error: this needs {package}: pip install xllamacpp gguf\n"
    assert capsys.readouterr().err == said


def test_a_process_of_its_own_is_asked(benchmarks: Any, stand_in: None) -> None:
    with benchmarks.llamacpp.LlamaCpp(Path("some.gguf"), 3, 70) as peer:
        assert peer.about == {"version": "1.2", "instructions": ["SSE3", "AVX2"]}
        assert peer.complete([5, 6], 4)["heard"] == ["some.gguf", 70, 3, False, True, 1]
        assert peer.tokens([5, 6], 3) == [7, 8, 9]
    assert peer._process.returncode is not None


@pytest.mark.parametrize(
    ("first", "said"), [(99, "llama.cpp has stopped"), (98, "refused a request"), (97, r"did not do .* \(7, 2, 4\)")]
)
def test_what_is_no_measurement_is_a_fault(benchmarks: Any, stand_in: None, first: int, said: str) -> None:
    """It breaks off, it answers with an error, or it had seen some of the prompt before."""
    with benchmarks.llamacpp.LlamaCpp(Path("some.gguf"), 1, 70) as peer, pytest.raises(FaultError, match=said):
        peer.complete([first, 6], 4)


def test_a_file_that_cannot_be_loaded_is_a_fault(benchmarks: Any, stand_in: None, tmp_path: Path) -> None:
    (tmp_path / "packages" / "xllamacpp.py").write_text("raise SystemExit('broken')")
    with pytest.raises(FaultError, match="has stopped"):
        benchmarks.llamacpp.LlamaCpp(Path("some.gguf"), 1, 70)


# --- the GGUF file ---


@pytest.fixture
def tiny_model(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer of four tokens, two of them added: it has room for 256."""
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_folder, folder)
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    added = [{"id": 3, "content": "<end>", "special": True}, {"id": 5, "content": "<word>", "special": False}]
    tokenizer = {
        "added_tokens": added,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def test_every_weight_is_there_once(benchmarks: Any, tiny_model: Path, tmp_path: Path) -> None:
    """q and k in the order of neighbours, by a slow loop; all else as the checkpoint has it."""
    gguf = pytest.importorskip("gguf")
    path = benchmarks.gguf_file.gguf_file(tiny_model, "F32", tmp_path / "out")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}
    stored = load_file(tiny_model / "model.safetensors")
    assert len(found) == len(stored) + 1  # rope_freqs
    for name in ("q", "k"):
        rows = stored[f"model.layers.4.self_attn.{name}_proj.weight"].float()
        turned = found[f"blk.4.attn_{name}.weight"]
        for head in range(rows.shape[0] // 16):
            for i in range(8):
                assert torch.equal(turned[16 * head + 2 * i], rows[16 * head + i])
                assert torch.equal(turned[16 * head + 2 * i + 1], rows[16 * head + 8 + i])
    same = {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
        "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
        "blk.5.attn_output": "model.layers.5.self_attn.o_proj",
        "blk.3.ffn_gate": "model.layers.3.mlp.gate_proj",
        "blk.3.ffn_up": "model.layers.3.mlp.up_proj",
        "blk.3.ffn_down": "model.layers.3.mlp.down_proj",
        "blk.2.attn_norm": "model.layers.2.input_layernorm",
        "blk.2.ffn_norm": "model.layers.2.post_attention_layernorm",
    }
    for theirs, ours in same.items():
        assert torch.equal(found[f"{theirs}.weight"], stored[f"{ours}.weight"].float()), theirs


def test_eight_bits_are_within_half_a_step(benchmarks: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Matrices alone; a step is the largest of 32 values / 127, itself rounded to 11 bits."""
    gguf = pytest.importorskip("gguf")
    paths = [benchmarks.gguf_file.gguf_file(tiny_model, kind, tmp_path) for kind in ("F32", "Q8_0")]
    exact, coarse = ({tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in paths)
    assert exact.keys() == coarse.keys()
    for name, tensor in coarse.items():
        values = torch.from_numpy(exact[name].data.copy())
        if values.dim() == 1:
            assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
            continue
        assert tensor.tensor_type == gguf.GGMLQuantizationType.Q8_0
        assert list(tensor.shape) == list(exact[name].shape)
        read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        largest = values.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True)
        error = (values - read).unflatten(-1, (-1, 32)).abs()
        assert (error <= largest / 127 * (0.5 + 127 * 2**-11)).all()


def test_settings_and_tokenizer(benchmarks: Any, tiny_model: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(benchmarks.gguf_file.gguf_file(tiny_model, "F32", tmp_path)).fields
    found = {name: field.contents() for name, field in fields.items()}
    expected = {
        "general.architecture": "llama",
        "llama.block_count": 6,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 500_000.0,
        "llama.context_length": 8192,
        "llama.vocab_size": 256,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["tokenizer.ggml.tokens"][:7] == ["a", "b", "ab", "<end>", "[PAD4]", "<word>", "[PAD6]"]
    assert found["tokenizer.ggml.token_type"][:7] == [1, 1, 1, 3, 5, 4, 5]
    assert len(found["tokenizer.ggml.tokens"]) == len(found["tokenizer.ggml.token_type"]) == 256


def test_frequencies_are_divided_as_the_scaling_says(benchmarks: Any) -> None:
    """llama3: the fast pairs are kept and the slow ones divided by the factor; linear: all are divided."""
    divisors = benchmarks.gguf_file.frequency_divisors(RopeConfig(500_000.0, "llama3", 8.0, 1024), 16)
    assert divisors[0] == 1.0
    assert divisors[-1] == pytest.approx(8.0)
    assert (divisors.diff() >= 0).all()
    linear = benchmarks.gguf_file.frequency_divisors(RopeConfig(10_000.0, "linear", 4.0), 16)
    assert torch.allclose(linear, torch.full((8,), 4.0))


def test_a_file_is_made_once_and_whole(benchmarks: Any, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    make, out = benchmarks.gguf_file.gguf_file, tmp_path / "out"
    first = make(tiny_model, "F32", out)
    written = first.stat().st_mtime_ns
    assert make(tiny_model, "F32", out) == first
    assert first.stat().st_mtime_ns == written
    assert list(out.iterdir()) == [first]
    config = tiny_model / "config.json"
    config.write_text(config.read_text().replace("500000.0", "400000.0"))
    assert make(tiny_model, "F32", out) != first  # another model of the same name


def test_nothing_is_left_of_a_file_that_was_not_finished(
    benchmarks: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")

    def full_disk(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(benchmarks.gguf_file, "_values", full_disk)
    with pytest.raises(FastKVError, match=r"cannot be written \(No space left on device\)"):
        benchmarks.gguf_file.gguf_file(tiny_model, "F32", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}, "not of Qwen3ForCausalLM"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "with yarn scaling"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "Qwen2ForCausalLM with llama3 scaling"),
    ],
)
def test_models_that_are_not_converted(
    benchmarks: Any, tiny_folder: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    from fastkv.models.config import ModelConfig

    config = json.loads((tiny_folder / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FastKVError, match=said):
        benchmarks.gguf_file.check_convertible(ModelConfig.from_pretrained(tmp_path))


@pytest.mark.parametrize(("change", "said"), [("no file", "no such file"), ("Unigram", "no byte-level BPE")])
def test_tokenizers_that_are_not_converted(
    benchmarks: Any, tiny_model: Path, tmp_path: Path, change: str, said: str
) -> None:
    pytest.importorskip("gguf")
    path = tiny_model / "tokenizer.json"
    if change == "no file":
        path.unlink()
    else:
        path.write_text(path.read_text().replace("BPE", change))
    with pytest.raises(FastKVError, match=said):
        benchmarks.gguf_file.gguf_file(tiny_model, "F32", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_goes_on_as_this_engine_does(
    benchmarks: Any, archive_llm: LLM, archive_folder: Path, tiny_llm: LLM, tiny_model: Path, tmp_path: Path, tied: bool
) -> None:
    """The bundled model, whose head is its embedding; and one with llama3's rotary scaling and a head of its own."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    llm, folder = (archive_llm, archive_folder) if tied else (tiny_llm, tiny_model)
    ids = list(range(7, 247))
    ours = llm.generate(ids, SamplingParams(max_tokens=8, ignore_eos=True), FullKV()).token_ids
    with benchmarks.llamacpp.LlamaCpp(benchmarks.gguf_file.gguf_file(folder, "F32", tmp_path), 1, 256) as peer:
        assert peer.tokens(ids, 8) == ours
