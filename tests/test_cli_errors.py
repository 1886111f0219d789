"""Bad input: exit status 2, nothing on stdout, and one line on stderr that names the file or the flag."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file, save_file

from fastkv.cli import main
from fastkv.cli_flags import build_parser
from fastkv.engine.sampler import not_finite_error

ARCHIVE = ROOT / "examples" / "archive" / "model"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Complaint = Callable[..., str]
Change = dict[str, Any] | str | bytes | None


@pytest.fixture
def complaint(capfd: pytest.CaptureFixture[str]) -> Complaint:
    """complaint(*argv, names=...) runs the command, holds it to the rules for mistakes, and returns what it said."""

    def run(*argv: str, names: str | list[str]) -> str:
        try:
            status: Any = main(list(argv))
        except SystemExit as left:  # the parser's own complaints
            status = left.code
        out, err = capfd.readouterr()
        check(status, out, err, names)
        return err

    return run


def check(status: Any, out: str, err: str, names: str | list[str]) -> None:
    assert status == 2, err[-1000:]
    assert out == ""
    assert err.startswith("fastkv-run: error: ")
    assert err.endswith("\n")
    assert len(err.splitlines()) == 1
    assert err[:-1].isprintable()
    assert len(err) < 2100
    assert "Traceback" not in err
    for name in [names] if isinstance(names, str) else names:
        assert name in err


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    path = tmp_path / "prompt.txt"
    path.write_text("The code of the archive is")
    return str(path)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., str]:
    """make(config={...}, **{name: change}) gives a copy of the bundled model with some files changed.

    A change is new keys for a JSON file, text, bytes, or None for a file that is to go. Dots in a name are "__".
    """
    folder = tmp_path / "model"

    def build(**changes: Change) -> str:
        folder.mkdir()
        for source in ARCHIVE.iterdir():
            (folder / source.name).symlink_to(source)
        for key, change in changes.items():
            name = key.replace("__", ".")
            if isinstance(change, dict):
                change = json.dumps({**json.loads((folder / name).read_text()), **change})
            (folder / name).unlink(missing_ok=True)
            if change is not None:
                (folder / name).write_bytes(change.encode() if isinstance(change, str) else change)
        return str(folder)

    return build


Make = Callable[..., str]


# --- the model folder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        "no/such/folder",
        "nowhere",
        "/no/such/folder",
        "./nowhere",
        "~nobody-of-that-name/model",
        "x" * 5000,
        "org/name/",
        "org/name.git",
        "org/-name",
        "org/a..b",
        "org/a--b",
        "org/ünïcode",
        "org/" + "x" * 200,
        "https://huggingface.co/org/name",
        "org/name with spaces",
    ],
    ids=lambda model: model[:20],
)
def test_a_model_that_is_neither_folder_nor_id(complaint: Complaint, prompt: str, model: str) -> None:
    """Ids that the hub would refuse by their form alone raised the hub library's own exceptions."""
    complaint("--model", model, "--prompt", prompt, names=[model[:20], "--model"])


def test_an_empty_model(complaint: Complaint, prompt: str) -> None:
    """`--model "$UNSET"` meant the current folder, and the complaint was of a config.json that nobody had asked for."""
    complaint("--model", "", "--prompt", prompt, names="--model")


def test_a_model_that_is_a_file(complaint: Complaint, prompt: str) -> None:
    complaint("--model", prompt, "--prompt", prompt, names=[prompt, "--model"])


def test_a_folder_without_config(complaint: Complaint, prompt: str, tmp_path: Path) -> None:
    complaint("--model", str(tmp_path), "--prompt", prompt, names=[str(tmp_path / "config.json"), "--model"])


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"3", b'"text"', b"{'a': 1}", b'{"a": "\xe9"}', b"\x00\x01", b"[" * 100_000, b"{}"],
    ids=lambda text: repr(text[:10]),
)
def test_a_broken_config(complaint: Complaint, prompt: str, make: Make, text: bytes) -> None:
    complaint("--model", make(config__json=text), "--prompt", prompt, names="config.json")


def test_a_config_that_is_a_folder(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = make(config__json=None)
    (Path(folder) / "config.json").mkdir()
    complaint("--model", folder, "--prompt", prompt, names="config.json")


@pytest.mark.parametrize(
    "key", ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
)
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "8", True, [8], 10**30])
def test_a_config_with_a_wrong_size(complaint: Complaint, prompt: str, make: Make, key: str, value: Any) -> None:
    if (key, value) == ("num_hidden_layers", 10**30):
        pytest.skip("would be built layer by layer")
    complaint("--model", make(config__json={key: value}), "--prompt", prompt, names=["config.json", key])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_key_value_heads", 3),
        ("head_dim", 7),
        ("rms_norm_eps", "small"),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 10**400),
        ("rope_theta", -1),
        ("rope_scaling", "linear"),
        ("rope_scaling", {"rope_type": "dynamic", "factor": 2.0}),
        ("tie_word_embeddings", "yes"),
        ("attention_bias", 1),
        ("max_position_embeddings", 0),
        ("eos_token_id", "end"),
        ("bos_token_id", -1),
        ("hidden_act", "gelu"),
        ("torch_dtype", "float8_e4m3fn"),
        ("torch_dtype", "int8"),
        ("architectures", "LlamaForCausalLM"),
    ],
)
def test_a_config_with_a_wrong_value(complaint: Complaint, prompt: str, make: Make, key: str, value: Any) -> None:
    named = "dtype" if key == "torch_dtype" else "rope_scaling" if key == "rope_scaling" else key
    folder = make(config__json={key: value}, generation_config__json=None)
    complaint("--model", folder, "--prompt", prompt, names=["config.json", named])


@pytest.mark.parametrize(
    "stated",
    [
        {"architectures": ["MixtralForCausalLM"]},
        {"architectures": [], "model_type": "mixtral"},
        {"architectures": None, "model_type": None},
        {"architectures": ["Two", "Names"]},
    ],
)
def test_an_unsupported_architecture(complaint: Complaint, prompt: str, make: Make, stated: dict[str, Any]) -> None:
    """It is named, with a list of those that are supported."""
    said = complaint("--model", make(config__json=stated), "--prompt", prompt, names="config.json")
    for name in stated["architectures"] or [stated["model_type"] or "none"]:
        assert name in said
    for name in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"):
        assert name in said


def test_a_name_cannot_control_the_terminal(complaint: Complaint, prompt: str, make: Make) -> None:
    """A model folder is not trusted: what it says is shown, never obeyed, as an escape sequence would be."""
    folder = make(config__json={"architectures": ["\x1b[2J\x1b]0;title\x07\u202e"]})
    complaint("--model", folder, "--prompt", prompt, names="config.json")


@pytest.mark.parametrize("scheme", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {}])
def test_a_quantised_checkpoint(complaint: Complaint, prompt: str, make: Make, scheme: dict[str, Any]) -> None:
    folder = make(config__json={"quantization_config": scheme})
    complaint("--model", folder, "--prompt", prompt, names=["config.json", "quantised", "quantization_config"])


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff"])
def test_a_broken_file_beside_the_config(complaint: Complaint, prompt: str, make: Make, name: str, text: bytes) -> None:
    complaint("--model", make(**{name.replace(".", "__"): text}), "--prompt", prompt, names=name)


# --- the weights ------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "model.ckpt", "weights.pkl"])
@pytest.mark.parametrize("dtype", ["bfloat16", None])
def test_pickled_weights_are_never_opened(
    complaint: Complaint, prompt: str, make: Make, tmp_path: Path, name: str, dtype: str | None
) -> None:
    trap = tmp_path / "sprung"
    folder = make(model__safetensors=None, config__json={"torch_dtype": dtype})
    (Path(folder) / name).write_bytes(pickle.dumps(Trap(trap)))
    complaint("--model", folder, "--prompt", prompt, names=[folder, name, "safetensors"])
    assert not trap.exists()
    pickle.loads((Path(folder) / name).read_bytes())
    assert trap.exists()  # it does spring where it is opened


def test_no_weights_at_all(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = make(model__safetensors=None)
    complaint("--model", folder, "--prompt", prompt, names=[folder, WEIGHTS])


def test_weights_under_another_name(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = make(model__safetensors=None)
    (Path(folder) / "weights.safetensors").symlink_to(ARCHIVE / WEIGHTS)
    complaint("--model", folder, "--prompt", prompt, names=[folder, "weights.safetensors"])


@pytest.mark.parametrize("dtype", ["bfloat16", None])
@pytest.mark.parametrize("cut", [0, 4, 100, -1, -100_000])
def test_truncated_weights(complaint: Complaint, prompt: str, make: Make, cut: int, dtype: str | None) -> None:
    whole = (ARCHIVE / WEIGHTS).read_bytes()
    folder = make(model__safetensors=whole[:cut], config__json={"torch_dtype": dtype})
    complaint("--model", folder, "--prompt", prompt, names=WEIGHTS)


@pytest.mark.parametrize("junk", [b"not a safetensors file at all", b"\xff" * 64, b"\x80\x04\x95" + b"x" * 64])
def test_weights_that_are_something_else(complaint: Complaint, prompt: str, make: Make, junk: bytes) -> None:
    complaint("--model", make(model__safetensors=junk), "--prompt", prompt, names=WEIGHTS)


def save(folder: str, tensors: dict[str, torch.Tensor], name: str = WEIGHTS) -> None:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, Path(folder) / name)


def test_a_missing_tensor(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = make(model__safetensors=None)
    tensors = load_file(ARCHIVE / WEIGHTS)
    del tensors["model.layers.3.self_attn.k_proj.weight"]
    save(folder, tensors)
    complaint("--model", folder, "--prompt", prompt, names=[WEIGHTS, "model.layers.3.self_attn.k_proj.weight"])


def test_an_unexpected_tensor(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = make(model__safetensors=None)
    save(folder, {**load_file(ARCHIVE / WEIGHTS), "model.layers.3.self_attn.q_proj.bias": torch.zeros(128)})
    complaint("--model", folder, "--prompt", prompt, names=[WEIGHTS, "model.layers.3.self_attn.q_proj.bias"])


@pytest.mark.parametrize("shape", [(64, 127), (128, 64), (64 * 128,), (1, 64, 128)])
def test_a_misshapen_tensor(complaint: Complaint, prompt: str, make: Make, shape: tuple[int, ...]) -> None:
    folder = make(model__safetensors=None)
    name = "model.layers.3.self_attn.k_proj.weight"
    save(folder, {**load_file(ARCHIVE / WEIGHTS), name: torch.zeros(shape, dtype=torch.bfloat16)})
    complaint("--model", folder, "--prompt", prompt, names=[WEIGHTS, name, str(list(shape)), "[64, 128]"])


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_a_tensor_of_another_type(complaint: Complaint, prompt: str, make: Make, dtype: torch.dtype) -> None:
    folder = make(model__safetensors=None)
    name = "model.layers.3.self_attn.k_proj.weight"
    save(folder, {**load_file(ARCHIVE / WEIGHTS), name: torch.zeros(64, 128).to(dtype)})
    complaint("--model", folder, "--prompt", prompt, names=[WEIGHTS, name])


def sharded(make: Make, **elsewhere: Any) -> str:
    """The bundled model in two shards; `elsewhere` changes where the index says that tensors are."""
    folder = make(model__safetensors=None)
    tensors = load_file(ARCHIVE / WEIGHTS)
    names = sorted(tensors)
    where = {name: f"model-0000{1 + (place >= 9)}-of-00002.safetensors" for place, name in enumerate(names)}
    for shard in set(where.values()):
        save(folder, {name: tensors[name] for name in names if where[name] == shard}, shard)
    where.update({name.replace("__", "."): shard for name, shard in elsewhere.items()})
    (Path(folder) / INDEX).write_text(json.dumps({"weight_map": where}))
    return folder


def test_shards_load(make: Make, prompt: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The cases below are wrong in one thing only."""
    assert main(["--model", sharded(make), "--prompt", prompt, "--max-tokens", "1"]) == 0


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/inside.safetensors",
        "..\\outside.safetensors",
        "..",
        "",
        "pytorch_model.bin",
        "model.safetensors\0.bin",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_an_index_that_points_elsewhere(complaint: Complaint, prompt: str, make: Make, shard: Any) -> None:
    folder = sharded(make, model__norm__weight=shard)
    outside = Path(folder).parent / "outside.safetensors"
    save_file({"model.norm.weight": torch.ones(128)}, outside)
    complaint("--model", folder, "--prompt", prompt, names=INDEX)


def test_an_index_that_names_half_a_character(complaint: Complaint, prompt: str, make: Make) -> None:
    complaint("--model", sharded(make, model__norm__weight="\ud800.safetensors"), "--prompt", prompt, names=INDEX)


def test_an_index_whose_shard_is_missing(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = sharded(make)
    (Path(folder) / "model-00002-of-00002.safetensors").unlink()
    complaint("--model", folder, "--prompt", prompt, names="model-00002-of-00002.safetensors")


def test_an_index_whose_shard_is_a_folder(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = sharded(make)
    (Path(folder) / "model-00002-of-00002.safetensors").unlink()
    (Path(folder) / "model-00002-of-00002.safetensors").mkdir()
    complaint("--model", folder, "--prompt", prompt, names="model-00002-of-00002.safetensors")


def test_an_index_that_says_the_wrong_shard(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = sharded(make, model__norm__weight="model-00001-of-00002.safetensors")
    complaint("--model", folder, "--prompt", prompt, names=[INDEX, "model.norm.weight"])


def test_a_tensor_in_two_shards(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = sharded(make, extra="twice.safetensors")
    save(folder, {"model.norm.weight": torch.ones(128)}, "twice.safetensors")
    complaint("--model", folder, "--prompt", prompt, names=["twice.safetensors", "model.norm.weight"])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_a_broken_index(complaint: Complaint, prompt: str, make: Make, text: str) -> None:
    folder = make(model__safetensors=None)
    (Path(folder) / INDEX).write_text(text)
    complaint("--model", folder, "--prompt", prompt, names=INDEX)


def test_no_code_of_a_model_folder_is_run(
    make: Make, prompt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """`auto_map` names code that a checkpoint brings along; other programs import it."""
    auto = {"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M", "AutoTokenizer": ["modeling.T", None]}
    folder = make(config__json={"auto_map": auto}, tokenizer_config__json={"auto_map": auto, "tokenizer_class": "T"})
    for name in ("modeling", "configuration", "tokenization", "__init__"):
        (Path(folder) / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    monkeypatch.chdir(folder)
    assert main(["--model", ".", "--prompt", prompt, "--max-tokens", "1"]) == 0
    assert not (tmp_path / "run").exists()


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_no_tokenizer(complaint: Complaint, prompt: str, make: Make) -> None:
    """The command has only text to give, so the message names the folder and what is missing from it."""
    folder = make(tokenizer__json=None)
    said = complaint("--model", folder, "--prompt", prompt, names=[folder, "tokenizer.json", "tokenizer.model"])
    assert "token ids" not in said


def test_no_tokenizer_for_a_chat(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = make(tokenizer__json=None)
    complaint("--model", folder, "--prompt", prompt, "--chat", names=[folder, "tokenizer.json", "tokenizer.model"])


@pytest.mark.parametrize("text", [b"", b"{", b"{}", b"[]", b"\xff\x00", b'{"version": "9.0"}'])
def test_a_broken_tokenizer_json(complaint: Complaint, prompt: str, make: Make, text: bytes) -> None:
    complaint("--model", make(tokenizer__json=text), "--prompt", prompt, names="tokenizer.json")


def test_a_broken_tokenizer_json_beside_a_good_tokenizer_model(
    complaint: Complaint, prompt: str, make: Make, stories_folder: Path
) -> None:
    good = (stories_folder / "tokenizer.model").read_bytes()
    folder = make(tokenizer__json="{", tokenizer__model=good)
    complaint("--model", folder, "--prompt", prompt, names="tokenizer.json")


@pytest.mark.parametrize("text", [b"", b"\x0a\x05", b"not a model", b"\x00" * 100])
def test_a_broken_tokenizer_model(complaint: Complaint, prompt: str, make: Make, text: bytes) -> None:
    folder = make(tokenizer__json=None, tokenizer__model=text)
    complaint("--model", folder, "--prompt", prompt, names="tokenizer.model")


def test_a_tokenizer_that_fails_on_the_prompt(complaint: Complaint, prompt: str, make: Make) -> None:
    broken = json.loads((ARCHIVE / "tokenizer.json").read_text())
    broken["model"] = {"type": "WordLevel", "vocab": {"the": 0}, "unk_token": "<unk>"}
    folder = make(tokenizer__json=json.dumps({**broken, "added_tokens": [], "post_processor": None}))
    complaint("--model", folder, "--prompt", prompt, names="tokenizer.json")


def test_a_tokenizer_of_another_model(complaint: Complaint, prompt: str, make: Make) -> None:
    """Its ids are beyond the model's embedding: no fault of the prompt, so the model's folder is named."""
    table = json.loads((ARCHIVE / "tokenizer.json").read_text())
    table["model"]["vocab"] = {piece: i + 5000 * (i > 1) for piece, i in table["model"]["vocab"].items()}
    folder = make(tokenizer__json=json.dumps(table))
    complaint("--model", folder, "--prompt", prompt, names=[folder, "1024"])


# --- the chat template ------------------------------------------------------------------------------------------------


def test_no_chat_template(complaint: Complaint, prompt: str, make: Make) -> None:
    folder = make()
    complaint("--model", folder, "--prompt", prompt, "--chat", names=["--chat", folder, "chat_template.jinja"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages",
        "{% for m in messages %}",
        "{{ raise_exception('no\nsystem messages') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch escaped') }}",
        "{% include 'config.json' %}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{{ 1 / 0 }}",
        "{% if false %}nothing{% endif %}",
        b"\xff\xfe{\x00",
    ],
)
def test_a_chat_template_that_fails(
    complaint: Complaint, prompt: str, make: Make, monkeypatch: pytest.MonkeyPatch, template: str | bytes
) -> None:
    folder = make(chat_template__jinja=template)
    monkeypatch.chdir(folder)
    complaint("--model", folder, "--prompt", prompt, "--chat", names=str(Path(folder) / "chat_template.jinja"))
    assert not (Path(folder) / "escaped").exists()


def test_system_without_chat(complaint: Complaint, prompt: str) -> None:
    complaint("--model", str(ARCHIVE), "--prompt", prompt, "--system", "be brief", names=["--system", "--chat"])
    complaint("--model", str(ARCHIVE), "--prompt", prompt, "--chat-arg", "a=b", names=["--chat-arg", "--chat"])


def test_a_system_message_that_is_not_utf8(complaint: Complaint, prompt: str, make: Make) -> None:
    """Python hands bytes that it cannot read on as lone surrogates."""
    folder = make(chat_template__jinja="{{ messages[0]['content'] }}")
    said = os.fsdecode(b"caf\xe9")
    complaint("--model", folder, "--prompt", prompt, "--chat", "--system", said, names="--system")


# --- the prompt -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\n", "empty"),
        (b"\r\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"\xef\xbb\xbf\n", "empty"),
        (b"\x00\x01\x02", "binary"),
        (b"text and a \x00 byte", "binary"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "binary"),
        ("café".encode("latin-1"), "UTF-8"),
        ("“quoted”".encode("cp1252"), "UTF-8"),
        ("日本語".encode("shift_jis"), "UTF-8"),
        ("text".encode("utf-16"), "UTF-16"),
        ("text".encode("utf-16-le"), "binary"),
        ("\ufefftext".encode("utf-16-be"), "UTF-16"),
        ("text".encode("utf-32"), "UTF-"),
        (b"half a character \xe4\xb8", "UTF-8"),
        (b"a surrogate \xed\xa0\x80", "UTF-8"),
        (b"overlong \xc0\xaf", "UTF-8"),
    ],
)
def test_a_bad_prompt_file(complaint: Complaint, tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(content)
    complaint("--model", str(ARCHIVE), "--prompt", str(path), names=["--prompt", str(path), says])


@pytest.mark.parametrize("name", ["missing.txt", "folder", "prompt.txt/inside", "x" * 300, "dangling"])
def test_a_prompt_file_that_cannot_be_read(complaint: Complaint, tmp_path: Path, prompt: str, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    path = str(tmp_path / name)
    complaint("--model", str(ARCHIVE), "--prompt", path, names=["--prompt", path])


def test_an_empty_prompt_name(complaint: Complaint) -> None:
    complaint("--model", str(ARCHIVE), "--prompt", "", names="--prompt")


def test_a_closed_standard_input(complaint: Complaint, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fastkv-run --prompt - <&-`: Python has no sys.stdin then."""
    monkeypatch.setattr(sys, "stdin", None)
    complaint("--model", str(ARCHIVE), "--prompt", "-", names=["--prompt", "standard input"])


@pytest.mark.parametrize("length", [63, 64, 65, 500])
def test_a_prompt_beyond_the_context(complaint: Complaint, make: Make, tmp_path: Path, length: int) -> None:
    """The limit is named, and the flag whose file is too long; 63 tokens and a BOS leave no room for an answer."""
    path = tmp_path / "long.txt"
    path.write_text("1" * length)  # a token a digit
    folder = make(config__json={"max_position_embeddings": 64})
    said = complaint("--model", folder, "--prompt", str(path), names=["--prompt", "64"])
    assert str(length + 1) in said
    assert ("max_position_embeddings" in said) == (length >= 64)


def test_a_prompt_is_looked_at_before_the_model(complaint: Complaint, tmp_path: Path) -> None:
    """A mistyped name should not cost the time of a load."""
    complaint("--model", str(tmp_path / "nowhere"), "--prompt", str(tmp_path / "x.txt"), names="--prompt")


def test_a_prompt_longer_than_a_sliding_window(complaint: Complaint, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("1" * 300)
    stated = {"architectures": ["MistralForCausalLM"], "sliding_window": 200}
    said = complaint("--model", make(config__json=stated), "--prompt", str(path), names=["--prompt", "sliding_window"])
    assert "200" in said
    assert "full" in said  # what to do


# --- the flags --------------------------------------------------------------------------------------------------------

NO_SHARE = ["0", "-0.0", "-1", "1.5", "nan", "inf", "-inf", "abc", "", "0.1x", "1e400"]
NO_COUNT = ["0", "-1", "1.5", "nan", "abc", "", "1e3"]
WRONG = {
    "--policy": ["", "kvsnap", "FastKV", "full,fastkv"],
    "--tsp-layer": ["-1", "8", "100", "9" * 40, "1.5", "abc", ""],
    "--tsp-rate": NO_SHARE,
    "--kv-retention": NO_SHARE,
    "--tsp-len": [*NO_COUNT, "7"],
    "--kv-len": [*NO_COUNT, "7"],
    "--window": NO_COUNT,
    "--kernel": [*NO_COUNT, "2", "8", "-7"],
    "--pooling": ["", "mean", "MAX", "none"],
    "--queries": ["", "mean", "MAX"],
    "--reach": ["-1", "1.5", "x", "", "9" * 9],
    "--tsp-reach": ["-1", "1.5", "x", "", "9" * 9],
    "--tsp-window": ["-1", "1.5", "x", "", "9" * 25],
    "--lookahead": ["-1", "1.5", "x", ""],
    "--lookahead-reach": ["-1", "1.5", "x", "", "9" * 9],
    "--values": ["", "1", "on", "maybe"],
    "--instruct": ["", "1", "maybe"],
    "--sinks": ["-1", "1.5", "x"],
    "--share": ["-0.1", "nan", "inf", "x"],
    "--narrow": ["-0.1", "1.1", "nan", "x", ""],
    "--min-tokens": NO_COUNT,
    "--keep-mass": NO_SHARE,
    "--keep-mass-by": ["", "model", "head"],  # of nothing, without --keep-mass
    "--keep-mass-most": [*NO_SHARE, "0.5"],
    "--max-tokens": [*NO_COUNT, "100000", "9" * 40, "9" * 4000],
    "--decode-budget": [*NO_COUNT, "31", "9" * 40],
    "--speculation": ["", "self,ngram", "NGRAM"],
    "--draft-tokens": [*NO_COUNT, "17", "9" * 40, "2"],  # nothing is drafted without --lossless or --speculation
    "--draft-weights": ["", "int2", "INT4", "int4", "int8"],  # nothing drafts without --lossless
    "--temperature": ["-1", "9" * 5000, "-0.001", "nan", "inf", "abc", ""],
    "--top-k": ["-1", str(2**63), "9" * 4000, "9" * 5000, "1.5", "nan", "abc", ""],
    "--top-p": ["0", "-0.5", "1.1", "nan", "inf", "abc", ""],
    "--min-p": ["-0.1", "1.1", "nan", "inf", "abc", ""],
    "--repetition-penalty": ["0", "-1", "nan", "inf", "abc", ""],
    "--seed": ["-1", "1.5", "nan", "abc", "", str(2**63), "9" * 40, "9" * 400, "9" * 5000],
    "--stop": [""],
    "--device": [
        *("", "gpu", "mps", "xpu", "cpu:1", "cuda:x", "cuda:-1", "cuda:99", "meta", "CPU", "9"),
        *("cuda:" + "9" * 5000, "cuda:²", "cuda:٣"),
    ],
    "--stop-token": ["", "no such token", "1000000", "9" * 5000],
    "--chat-arg": ["", "x", "=x", "a b=1", "1=1"],
    "--dtype": ["", "int8", "fp16", "float64", "float8_e4m3fn", "torch.float32"],
    "--weights": ("int4", "INT8", ""),
    "--kv-dtype": ["int2", "INT8", "float16", ""],
    "--share-layers": ["", ".", "no/such.json", "/dev/full", str(ARCHIVE / "config.json")],
    "--attention": ["", "cudnn", "efficient", "sdpa", "AUTO"],
    "--threads": ["0", "-1", "9" * 5000, "1.5", "abc", "", str(2**31), "9" * 40],
    "--report": ["", ".", "no/such/folder/page.html"],
    "--revision": ["main", ""],  # of a folder, which has none
}


@pytest.mark.parametrize(
    ("flag", "value"),
    [(flag, value) for flag, values in WRONG.items() for value in values],
    ids=lambda value: value[:20],
)
def test_a_setting_out_of_range(complaint: Complaint, prompt: str, flag: str, value: str) -> None:
    complaint("--model", str(ARCHIVE), "--prompt", prompt, flag, value, names=f"{flag}:" if value else flag)


def test_every_flag_with_a_value_has_wrong_ones_here() -> None:
    """A new flag comes with its mistakes."""
    settings = {action.option_strings[-1] for action in build_parser()._actions if action.nargs is None}
    several = {"--prompts", "--output", "--batch-size", "--kv-memory"}  # tests/test_job.py
    several.add("--policy-file")  # tests/test_policy_file.py
    several |= {"--context", "--cache", "--save-cache"}  # tests/test_many_questions.py
    assert settings - {"--model", "--prompt", "--system", *OF_ONE_POLICY} - several == set(WRONG)


OF_ONE_POLICY = {
    "--recent-share": ("h2o", ["-0.1", "1.1", "nan", "x"]),
    "--first-layer": ("pyramidinfer", ["-1", "8", "x"]),
    "--decay": ("pyramidinfer", ["0", "1.1", "x"]),
    "--floor": ("pyramidinfer", ["0", "1.1", "x"]),
    "--head-floor": ("adakv", ["-0.1", "1.1", "nan", "x"]),
    "--head-scores": ("headkv", ["", ".", "no/such.json", "/dev/full", str(ARCHIVE / "config.json")]),
    "--beta": ("headkv", ["0.9", "nan", "x"]),
    "--filter-layer": ("gemfilter", ["-1", "8", "x"]),
    "--tau": ("asl", ["0", "-1", "nan", "x"]),
    "--lookback": ("asl", ["1", "1.5", "x"]),
    "--score-decay": ("structkv", ["-0.1", "1.1", "x"]),
    "--pivot": ("structkv", ["", "fall"]),
    "--reading": ("asl", ["", "mine"]),
    "--full-layers": ("claa", ["-1", "1.5", "x"]),
    "--norm": ("criticalkv", ["", "l3"]),
    "--certain-mass": ("defensivekv", ["-0.1", "1.1", "x"]),
    "--budgets": ("keydiff", ["", "layers"]),
    "--sketch": ("compactor", ["-1", "1.5", "9" * 9]),
    "--chunk": ("compactor", [*NO_COUNT, "9" * 9]),
    "--attention-weight": ("compactor", ["-0.1", "nan", "x"]),
    "--future": ("expected-attention", [*NO_COUNT, "9" * 9]),
    "--epsilon": ("expected-attention", ["-0.1", "nan", "x"]),
    "--alpha": ("restkv", ["0", "1.1", "x"]),
    "--drop-norm": ("dbudget", ["-0.1", "1.1", "nan", "x"]),
    "--uncounted": ("dbudget", ["-1", "0.5", "x"]),
    "--read-retention": ("quest", NO_SHARE),
    "--read-len": ("clusterkv", [*NO_COUNT, "17"]),
    "--dense-layers": ("sinkrouter", ["-1", "1.5", "x"]),
    "--page": ("quest", NO_COUNT),
    "--per-cluster": ("clusterkv", NO_COUNT),
}


@pytest.mark.parametrize(
    ("flag", "policy", "value"),
    [(flag, policy, value) for flag, (policy, values) in OF_ONE_POLICY.items() for value in values],
)
def test_a_setting_of_one_policy_out_of_range(
    complaint: Complaint, prompt: str, flag: str, policy: str, value: str
) -> None:
    argv = ["--model", str(ARCHIVE), "--prompt", prompt, "--policy", policy, flag, value]
    complaint(*argv, names=flag)
    complaint("--model", str(ARCHIVE), "--prompt", prompt, flag, "1", names=[flag, "no setting of --policy fastkv"])


@pytest.mark.parametrize("sinks", ["-1", "1.5", "x", "200"])  # 200 leave no room in a budget of 128
def test_a_setting_that_another_policy_means_otherwise(complaint: Complaint, prompt: str, sinks: str) -> None:
    argv = ["--model", str(ARCHIVE), "--prompt", prompt, "--policy", "streamingllm", "--sinks", sinks]
    complaint(*argv, names="sinks")


@pytest.mark.parametrize("flag", ["--model", "--prompt", "--policy", "--tsp-rate", "--seed", "--stop", "--device"])
def test_a_flag_without_its_value(complaint: Complaint, prompt: str, flag: str) -> None:
    complaint("--model", str(ARCHIVE), "--prompt", prompt, flag, names=flag)


@pytest.mark.parametrize("flag", ["--tsp-len", "--kv-len"])
def test_a_length_below_the_window(complaint: Complaint, prompt: str, flag: str) -> None:
    argv = ["--window", "200", "--tsp-len", "200", "--kv-len", "200", flag, "199"]
    complaint("--model", str(ARCHIVE), "--prompt", prompt, *argv, names=[f"{flag}:", "200", "199"])


def test_max_tokens_beyond_the_context(complaint: Complaint, prompt: str, make: Make) -> None:
    """The message says how many there may be, and those there may be."""
    folder = make(config__json={"max_position_embeddings": 64})
    said = complaint("--model", folder, "--prompt", prompt, "--max-tokens", "64", names=["--max-tokens:", "64"])
    most = int(said.split("at most ")[1].split(",")[0])
    complaint("--model", folder, "--prompt", prompt, "--max-tokens", str(most + 1), names="--max-tokens:")
    assert main(["--model", folder, "--prompt", prompt, "--ignore-eos", "--max-tokens", str(most)]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_cuda_where_there_is_none(complaint: Complaint, prompt: str, device: str) -> None:
    complaint("--model", str(ARCHIVE), "--prompt", prompt, "--device", device, names=["--device:", device, "cpu"])


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--tsp-layer", "1"),
        ("--tsp-rate", "0.5"),
        ("--kv-retention", "0.5"),
        ("--tsp-len", "100"),
        ("--kv-len", "100"),
        ("--window", "8"),
        ("--kernel", "7"),
        ("--pooling", "max"),
        ("--min-tokens", "128"),
    ],
)
def test_a_fastkv_setting_beside_another_policy(complaint: Complaint, prompt: str, flag: str, value: str) -> None:
    """Refused, not ignored: even with its default value."""
    argv = ["--model", str(ARCHIVE), "--prompt", prompt, "--policy", "full"]
    complaint(*argv, flag, value, names=[flag, "--policy full"])


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], ["--model"]),
        (["--model", "x"], "--prompt"),
        (["--prompt", "x"], "--model"),
        (["--model", "x", "--prompt", "x", "--no-such-flag"], "--no-such-flag"),
        (["--model", "x", "--prompt", "x", "--temp", "1"], "--temp"),
        (["--model", "x", "--prompt", "x", "--max", "1"], "--max"),
        (["--mod", "x", "--prompt", "x"], "--model"),
        (["--model", "x", "--prompt", "x", "a prompt\nof two lines"], "a prompt"),
        (["--model", "x", "--prompt", "x", "--chat=yes"], "--chat"),
        (["--model", "x", "--prompt", "x", "--json=yes"], "--json"),
        (["model.safetensors", "prompt.txt"], "--model"),
    ],
)
def test_a_command_line_that_cannot_be_read(complaint: Complaint, argv: list[str], names: str | list[str]) -> None:
    """Also an abbreviated flag: it would change its meaning with the next flag of that beginning."""
    complaint(*argv, names=names)


def test_complaints_never_go_to_stdout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Where stderr is closed, `print(file=sys.stderr)` prints to stdout, into the file that was to hold the text."""
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--model", str(ARCHIVE), "--prompt", str(tmp_path / "missing.txt")]) == 2
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("value", ["1e-320", "1e-46", "1e-40"])
def test_a_temperature_too_small_to_divide_by(prompt: str, capfd: pytest.CaptureFixture[str], value: str) -> None:
    """Next to zero is next to greedy: logits divided by such a number are infinite, and then no number at all.

    In float32, because bfloat16 has ties, which are drawn for.
    """
    argv = ["--model", str(ARCHIVE), "--prompt", prompt, "--max-tokens", "8", "--dtype", "float32", "--quiet"]
    assert main(argv) == 0
    greedy = capfd.readouterr().out
    assert greedy.strip()
    assert main([*argv, "--temperature", value, "--seed", "1"]) == 0
    assert capfd.readouterr().out == greedy


def test_a_fault_is_no_mistake_of_the_users(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One line as for a mistake, but exit status 1: the command was right, and may work on another machine."""

    def overflow(args: object) -> int:
        raise not_finite_error(torch.float16)

    monkeypatch.setattr("fastkv.cli._run", overflow)
    assert main(["--model", "x", "--prompt", "x"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("fastkv-run: error: --dtype: ")
    assert "float16" in err
    assert len(err.splitlines()) == 1


# --- the machine ------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit(complaint: Complaint, prompt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is loaded, with both sizes and what to do."""
    monkeypatch.setattr("fastkv.engine.memory.available_bytes", lambda device: 2**20)
    monkeypatch.setattr("fastkv.engine.loaded.load_weights", lambda *args, **settings: pytest.fail("they are loaded"))
    argv = ["--model", str(ARCHIVE), "--prompt", prompt]
    complaint(*argv, names=[ARCHIVE.name, "1.0 MiB", "smaller model"])
    complaint(*argv, "--dtype", "bfloat16", names=ARCHIVE.name)


MOST = 2**31 - 1


@pytest.mark.parametrize("sizes", [{"intermediate_size": MOST}, {"intermediate_size": MOST, "hidden_size": MOST}])
def test_a_model_much_too_large(complaint: Complaint, prompt: str, make: Make, sizes: dict[str, int]) -> None:
    """Sizes of which each is a number like any other, but whose product no machine can hold, or even count in bytes.

    The weights are of another size, which is said before anything is built.
    """
    folder = make(config__json=sizes)
    complaint("--model", folder, "--prompt", prompt, "--dtype", "float32", names=["model.safetensors", "config.json"])


def test_a_cache_that_does_not_fit(complaint: Complaint, prompt: str, make: Make) -> None:
    argv = ["--model", make(config__json={"max_position_embeddings": MOST}), "--prompt", prompt]
    complaint(*argv, "--max-tokens", str(2 * 10**9), names=["KV cache", "GiB", "max_tokens"])


def test_an_unknown_hub_id_while_offline(tmp_path: Path, prompt: str) -> None:
    """In a process of its own, because the hub's library reads its variables once."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fastkv", "--model", "org/no-such-model", "--prompt", prompt]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    check(done.returncode, done.stdout, done.stderr, ["org/no-such-model", "offline"])
