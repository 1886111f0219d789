"""What a checkpoint holds against what config.json says: other names, a tied head stored, sizes that do not agree.

What loads, and what the head is, is as in transformers, whose logits are compared.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import HEAD, SINGLE, TINY, tensors_of, write, write_config
from places import ROOT
from safetensors.torch import save_file
from torch import Tensor

from fastkv import LLM, FastKVError, FullKV
from fastkv.cli import main
from fastkv.engine import memory
from fastkv.models import tying, weights
from fastkv.models.checkpoint import Checkpoint, stored_dtype
from fastkv.models.config import MAX_HEAD_DIM, MAX_LAYERS, ModelConfig
from fastkv.models.llama import Llama

EMBEDDING = "model.embed_tokens.weight"
TIED = {**TINY, "tie_word_embeddings": True}
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def load(folder: Path, **settings: Any) -> LLM:
    return LLM(folder, policy=FullKV(), device="cpu", **{"dtype": "float32", **settings})


def complaint(folder: Path, **settings: Any) -> str:
    """The one line with which the folder is refused."""
    with pytest.raises(FastKVError) as caught:
        load(folder, **settings)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


def logits(llm: LLM) -> Tensor:
    return llm.prefill(IDS).logits[0]


def assert_as_transformers(folder: Path, llm: LLM) -> None:
    """The logits of the last token are transformers'."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([IDS])).logits[0, -1]
    torch.testing.assert_close(logits(llm), expected, rtol=1e-4, atol=1e-4)


# --- a head that config.json says is the embedding ---


def test_a_tied_head_that_differs_is_used_as_it_is_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = tensors_of()
    llm = load(write(tmp_path, tensors, TIED))
    assert torch.equal(llm.model.lm_head.weight, tensors[HEAD])
    assert torch.equal(llm.model.embed_tokens.weight, tensors[EMBEDDING])
    assert not llm.config.tie_word_embeddings
    assert llm.config == llm.model.config
    [record] = caplog.records
    assert all(part in record.getMessage() for part in (SINGLE, "tie_word_embeddings", HEAD, EMBEDDING))
    assert_as_transformers(tmp_path, llm)


def test_a_tied_head_that_is_the_same_is_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = tensors_of(TIED)
    llm = load(write(tmp_path, {**tensors, HEAD: tensors[EMBEDDING].clone()}, TIED))
    assert llm.model.lm_head.weight is llm.model.embed_tokens.weight
    assert caplog.records == []
    assert_as_transformers(tmp_path, llm)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_are_compared_in_the_dtype_that_they_are_loaded_in(tmp_path: Path, dtype: str) -> None:
    """As in transformers: a head kept in more digits than the embedding is the same one where those are lost."""
    tensors = tensors_of(TIED)
    rounded = tensors[EMBEDDING].bfloat16()
    llm = load(write(tmp_path, {**tensors, EMBEDDING: rounded, HEAD: tensors[EMBEDDING]}, TIED), dtype=dtype)
    assert llm.config.tie_word_embeddings == (dtype == "bfloat16")


@pytest.mark.parametrize("row", [0, 30, 59])
def test_one_value_makes_a_difference_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """Tables are compared in parts, of seven rows here."""
    monkeypatch.setattr(tying, "_AT_A_TIME", 7 * 24)
    tensors = tensors_of(TIED)
    head = tensors[EMBEDDING].clone()
    assert load(write(tmp_path, {**tensors, HEAD: head}, TIED)).config.tie_word_embeddings
    head[row, 23] += 1
    assert not load(write(tmp_path, {**tensors, HEAD: head}, TIED)).config.tie_word_embeddings


def test_no_table_is_compared_whole_or_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the parts that are being compared, none of their values is in memory."""
    monkeypatch.setattr(tying, "_AT_A_TIME", 24)
    compared: list[int] = []
    equal = torch.equal

    def counting(one: Tensor, other: Tensor) -> bool:
        compared.append(one.numel())
        return equal(one, other)

    monkeypatch.setattr(torch, "equal", counting)
    tensors = tensors_of(TIED)
    load(write(tmp_path, {**tensors, HEAD: tensors[EMBEDDING].clone()}, TIED))
    assert compared == [24] * 60


def test_a_tied_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {**tensors_of(TIED), HEAD: torch.zeros(61, 24)}, TIED)
    assert all(part in complaint(folder) for part in (HEAD, "[61, 24]", "[60, 24]"))


def test_room_is_needed_for_a_head_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is counted before loading is what will be loaded: the head, too, and no embedding that stays the file."""
    folder = write(tmp_path, tensors_of(), TIED)
    loaded = [tensor for name, tensor in tensors_of().items() if "embed_tokens" not in name]
    needed = 4 * sum(tensor.numel() for tensor in loaded)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed - 1)
    assert "needs" in complaint(folder)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    load(folder)


def test_int8_weights_of_a_head_that_differs(tmp_path: Path) -> None:
    llm = load(write(tmp_path, tensors_of(), TIED), weights="int8")
    plain = load(write(tmp_path / "untied", tensors_of()), weights="int8")
    assert torch.equal(logits(llm), logits(plain))


def test_the_command_says_it_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = ROOT / "examples" / "archive" / "model"
    folder = tmp_path / "model"
    folder.mkdir()
    for file in archive.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    (folder / "config.json").unlink()
    config = json.loads((archive / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    with Checkpoint.open(archive) as checkpoint:
        tensors = {name: checkpoint.read(name).clone() for name in checkpoint.names}
    tensors[HEAD] = -tensors[EMBEDDING]
    (folder / SINGLE).unlink()
    save_file(tensors, folder / SINGLE)
    (tmp_path / "prompt.txt").write_text("a")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's, which would keep it from stderr
    assert main(["--model", str(folder), "--prompt", str(tmp_path / "prompt.txt"), "--quiet", "--max-tokens", "1"]) == 0
    [line] = capfd.readouterr().err.splitlines()
    assert "tie_word_embeddings" in line


# --- one name for both tables, and base models ---


@pytest.mark.parametrize("kept", [HEAD, EMBEDDING])
def test_a_tied_table_under_either_name(tmp_path: Path, kept: str) -> None:
    """safetensors' save_model keeps one name of a shared tensor, and tells the other in the file's metadata."""
    tensors = tensors_of(TIED)
    table = tensors.pop(EMBEDDING)
    dropped = HEAD if kept == EMBEDDING else EMBEDDING
    write_config(tmp_path, TIED)
    save_file({**tensors, kept: table}, tmp_path / SINGLE, {dropped: kept, "format": "pt"})
    llm = load(tmp_path)
    assert torch.equal(llm.model.embed_tokens.weight, table)
    assert llm.model.lm_head.weight is llm.model.embed_tokens.weight
    assert_as_transformers(tmp_path, llm)


def test_what_save_model_writes_loads(tmp_path: Path) -> None:
    transformers, safetensors = pytest.importorskip("transformers"), pytest.importorskip("safetensors.torch")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TIED)).eval()
    safetensors.save_model(model, str(write_config(tmp_path, TIED) / SINGLE))
    assert_as_transformers(tmp_path, load(tmp_path))


@pytest.mark.parametrize("lost", [HEAD, EMBEDDING])
def test_an_untied_table_may_not_be_missing(tmp_path: Path, lost: str) -> None:
    tensors = tensors_of()
    del tensors[lost]
    assert f"missing tensor {lost}" in complaint(write(tmp_path, tensors))


@pytest.mark.parametrize("values", [TINY, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("spelling", ["model.", "", "model.model."])
def test_names_with_and_without_the_prefix_of_the_base_model(
    tmp_path: Path, spelling: str, values: dict[str, Any]
) -> None:
    """LlamaModel.save_pretrained writes names without `model.`; transformers adds or drops one `model.` as needed."""
    tensors = tensors_of(values)
    respelt = {name.replace("model.", spelling, 1): tensor for name, tensor in tensors.items()}
    llm = load(write(tmp_path, respelt, values))
    assert torch.equal(llm.model.embed_tokens.weight, tensors[EMBEDDING])
    assert_as_transformers(tmp_path, llm)


@pytest.mark.parametrize("name", ["LlamaModel", "LLaMAForCausalLM"])
def test_other_names_of_the_architecture(tmp_path: Path, name: str) -> None:
    """A base model that is tied is whole; the first Llama exports spelt the name in another way."""
    values = {**TIED, "architectures": [name]}
    tensors = {key.removeprefix("model."): tensor for key, tensor in tensors_of(TIED).items()}
    llm = load(write(tmp_path, tensors, values))
    assert llm.config.architecture == "LlamaForCausalLM"
    assert_as_transformers(tmp_path, llm)


def test_a_base_model_without_a_head_is_refused(tmp_path: Path) -> None:
    """transformers would draw the head at random, and generate noise."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors_of().items() if name != HEAD}
    said = complaint(write(tmp_path, tensors, {**TINY, "architectures": ["LlamaModel"]}))
    assert all(part in said for part in (HEAD, "base model", "tie_word_embeddings"))


def test_two_spellings_of_one_tensor_are_one_too_many(tmp_path: Path) -> None:
    assert "unexpected tensor norm.weight" in complaint(
        write(tmp_path, {**tensors_of(), "norm.weight": torch.ones(24)})
    )


# --- names that belong to no such model ---


@pytest.mark.parametrize("prefix", ["module.", "base_model.model."])
def test_a_wrapped_model_is_told_from_an_incomplete_download(tmp_path: Path, prefix: str) -> None:
    said = complaint(write(tmp_path, {prefix + name: tensor for name, tensor in tensors_of().items()}))
    assert all(part in said for part in (EMBEDDING, prefix + EMBEDDING, f"begins with '{prefix}'"))
    assert "download" not in said


def test_a_model_within_another_one(tmp_path: Path) -> None:
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors_of().items()}
    said = complaint(write(tmp_path, {**tensors, "vision_tower.weight": torch.ones(3)}))
    assert all(
        part in said for part in (EMBEDDING, "language_model." + EMBEDDING, "part of another", "'language_model.'")
    )
    assert "download" not in said


def test_names_of_another_architecture(tmp_path: Path) -> None:
    said = complaint(write(tmp_path, {"transformer.wte.weight": torch.ones(60, 24)}))
    assert all(part in said for part in ("missing", EMBEDDING, "transformer.wte.weight", "do not belong"))


LEFT_OVER = (
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.layers.1.self_attn.rotary_emb.sin_cached",
    "model.layers.1.self_attn.rotary_emb.inv_freq",
    "model.rotary_emb.inv_freq",
    "model.rotary_emb.original_inv_freq",
    "rotary_emb.inv_freq",
    "model.layers.0.self_attn.masked_bias",
    "model.causal_mask",
    "model.position_ids",
)


def test_constants_that_older_code_saved_change_nothing(tmp_path: Path) -> None:
    plain = logits(load(write(tmp_path / "plain", tensors_of())))
    extra = {name: torch.full((7,), 9) for name in LEFT_OVER}
    assert torch.equal(logits(load(write(tmp_path / "extra", {**tensors_of(), **extra}))), plain)


def test_the_dtype_is_that_of_weights_not_of_constants(tmp_path: Path) -> None:
    folder = write(tmp_path, {**tensors_of(dtype=torch.float16), "model.position_ids": torch.arange(9)})
    assert stored_dtype(folder) == "float16"


# --- float64 ---


@pytest.mark.parametrize("stated", ["float64", None])
@pytest.mark.parametrize("weights", [None, "int8"])
def test_weights_in_float64_are_converted(tmp_path: Path, stated: str | None, weights: str | None) -> None:
    tensors = tensors_of(dtype=torch.float64)
    llm = load(write(tmp_path, tensors, {**TINY, "torch_dtype": stated}), dtype="auto", weights=weights)
    assert llm.dtype == torch.float32
    single = load(write(tmp_path / "single", {name: each.float() for name, each in tensors.items()}), weights=weights)
    assert torch.equal(logits(llm), logits(single))


# --- sizes ---


def test_a_file_of_fewer_layers_says_how_many(tmp_path: Path) -> None:
    said = complaint(write(tmp_path, tensors_of(), {**TINY, "num_hidden_layers": MAX_LAYERS}))
    assert all(part in said for part in (SINGLE, "2 layers", f"num_hidden_layers {MAX_LAYERS}"))


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
LARGE = (2**31 - 1, 2**31 - 2, 2**24, 4_000_000, 65_536, 10_000, MAX_LAYERS + 1)
ONE_AT_A_TIME = [{name: value} for name in SIZES for value in LARGE]
TWO_AT_ONCE = [dict.fromkeys(pair, 2**31 - 2) for pair in itertools.combinations(SIZES, 2)]
NAMED = [
    {"head_dim": 2**24},
    {"num_attention_heads": 4_000_000, "num_key_value_heads": 2},
    {"num_attention_heads": 4_000_000, "num_key_value_heads": 4_000_000},
    {"hidden_size": 2**31 - 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": None},
    {"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1, "vocab_size": 2**31 - 1},
    dict.fromkeys(SIZES, 2**31 - 2),
]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The sizes of the tensors that are made, those without memory aside. Neither probes nor weights may be made."""
    sizes: list[int] = []

    class Counting(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.device.type != "meta":
                sizes.append(result.numel())
            return result

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("built before the sizes were checked")

    for place in ("check_backend", "random_weights", "load_weights", "Tokenizer.from_pretrained"):
        monkeypatch.setattr(f"fastkv.engine.loaded.{place}", forbidden)
    with Counting():
        yield sizes


@pytest.mark.parametrize("changes", [*ONE_AT_A_TIME, *TWO_AT_ONCE, *NAMED], ids=str)
def test_sizes_that_the_file_does_not_have_are_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[int], changes: dict[str, Any]
) -> None:
    """A layer without memory is the most that is built: not the model, whose layers would take a minute."""
    monkeypatch.setattr("fastkv.models.weights.meta_model", lambda config: pytest.fail("the model is built"))
    complaint(write(tmp_path, tensors_of(), {**TINY, **changes}))
    assert max(made, default=0) <= MAX_HEAD_DIM


@pytest.mark.parametrize("changes", [*ONE_AT_A_TIME, *TWO_AT_ONCE, *NAMED], ids=str)
def test_random_weights_that_no_memory_holds_are_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: list[int], changes: dict[str, Any]
) -> None:
    """Without a file to compare with, memory decides: here 100 KB, of which the model of TINY itself takes 60."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 100_000)
    built: list[int] = []
    meta_model = weights.meta_model

    def building(config: ModelConfig) -> Llama:
        built.append(config.n_layers)
        return meta_model(config)

    monkeypatch.setattr(weights, "meta_model", building)
    complaint(write_config(tmp_path, {**TINY, **changes}), load_format="dummy")
    assert max(made, default=0) <= MAX_HEAD_DIM
    assert sum(built) <= TINY["num_hidden_layers"]
