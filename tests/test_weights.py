"""safetensors -> model: nothing missing, nothing left over, nothing unpickled, and never in memory twice."""

from __future__ import annotations

import itertools
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import HEAD, INDEX, SINGLE, TINY, shapes, tensors_of, write, write_config, write_index, write_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastkv import LLM, FastKVError, FullKV
from fastkv.engine import memory
from fastkv.models.checkpoint import Checkpoint, stored_dtype
from fastkv.models.config import ModelConfig
from fastkv.models.llama import Llama
from fastkv.models.weights import checkpoint_tensors, load_weights, model_bytes

CPU = torch.device("cpu")
QUERY = "model.layers.0.self_attn.q_proj.weight"
OUTPUT = "model.layers.1.self_attn.o_proj.weight"


def _load(folder: Path, dtype: torch.dtype = torch.float32) -> Llama:
    return load_weights(ModelConfig.from_pretrained(folder), folder, dtype, CPU)


def _refused(folder: Path, *parts: str) -> None:
    """The folder must not load: FastKVError with one line that contains every part."""
    with pytest.raises(FastKVError) as caught:
        LLM(folder, policy=FullKV(), dtype="float32", device="cpu")
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message


# --- what is loaded ---

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "llama-tied": {**TINY, "tie_word_embeddings": True},
    "llama-biases": {**TINY, "attention_bias": True, "mlp_bias": True},
    "qwen2": {**TINY, "architectures": ["Qwen2ForCausalLM"], "attention_bias": True},
    "qwen3": {**TINY, "architectures": ["Qwen3ForCausalLM"], "attention_bias": True},
    "olmo2": {**TINY, "architectures": ["Olmo2ForCausalLM"]},
    "granite": {**TINY, "architectures": ["GraniteForCausalLM"], "mlp_bias": True},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_arrives_in_its_parameter(tmp_path: Path, name: str) -> None:
    """A fused parameter is the concatenation of its pieces in the documented order; every other one is its tensor."""
    values = VARIANTS[name]
    tensors = tensors_of(values)
    model = _load(write(tmp_path, tensors, values))
    wanted = {
        name.removeprefix("model.").replace(".mlp.", ".feed_forward."): tensor
        for name, tensor in tensors.items()
        if not any(piece in name for piece in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    }
    fused = {
        "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "feed_forward.gate_up_proj": ("gate_proj", "up_proj"),
    }
    for layer, kind, (whole, parts) in itertools.product(range(2), ("weight", "bias"), fused.items()):
        home = f"model.layers.{layer}.{whole.split('.')[0].replace('feed_forward', 'mlp')}"
        pieces = [tensors[f"{home}.{part}.{kind}"] for part in parts if f"{home}.{part}.{kind}" in tensors]
        if pieces:
            wanted[f"layers.{layer}.{whole}.{kind}"] = torch.cat(pieces)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(parameters[key], tensor), key


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoint_tensors_is_the_way_back(tmp_path: Path, name: str) -> None:
    values = VARIANTS[name]
    tensors = tensors_of(values)
    model = _load(write(tmp_path / "first", tensors, values))
    taken_apart = checkpoint_tensors(model)
    assert taken_apart.keys() == tensors.keys()
    assert all(torch.equal(taken_apart[key], tensor) for key, tensor in tensors.items())
    again = _load(write(tmp_path / "second", taken_apart, values))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_tied_head_is_the_embedding(tmp_path: Path) -> None:
    values = VARIANTS["llama-tied"]
    tensors = tensors_of(values)
    model = _load(write(tmp_path, tensors, values))
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, tensors["model.embed_tokens.weight"])


def test_an_untied_head_is_its_own(tmp_path: Path) -> None:
    model = _load(write(tmp_path, tensors_of()))
    assert model.lm_head.weight is not model.embed_tokens.weight
    assert not torch.equal(model.lm_head.weight, model.embed_tokens.weight)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_conversion_of_dtypes(tmp_path: Path, stored: torch.dtype, asked: torch.dtype) -> None:
    tensors = tensors_of(dtype=stored)
    model = _load(write(tmp_path, tensors), asked)
    assert {parameter.dtype for parameter in model.parameters()} == {asked}
    found = checkpoint_tensors(model)
    assert all(torch.equal(found[name], tensor.to(asked)) for name, tensor in tensors.items())


def test_a_checkpoint_of_two_dtypes(tmp_path: Path) -> None:
    """Norms are often kept in float32 beside bfloat16 matrices."""
    tensors = {name: t if t.dim() == 1 else t.bfloat16() for name, t in tensors_of().items()}
    model = _load(write(tmp_path, tensors), torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_stored_dtype_is_read_from_the_weights(tmp_path: Path) -> None:
    assert stored_dtype(write(tmp_path, tensors_of(dtype=torch.bfloat16))) == "bfloat16"


def test_progress_rises_to_the_size_of_the_model(tmp_path: Path) -> None:
    config = ModelConfig.from_pretrained(write(tmp_path, tensors_of()))
    seen: list[tuple[int, int]] = []
    load_weights(config, tmp_path, torch.bfloat16, CPU, lambda done, total: seen.append((done, total)))
    total = model_bytes(config, torch.bfloat16)
    assert total == 2 * sum(tensor.numel() for tensor in tensors_of().values())
    assert {of for _, of in seen} == {total}
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("n_shards", [1, 2, 7])
def test_shards_load_as_one_file_does(tmp_path: Path, n_shards: int) -> None:
    tensors = tensors_of()
    write_shards(tmp_path, tensors, n_shards)
    found = checkpoint_tensors(_load(tmp_path))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    """The index of an earlier, sharded save may be left in the folder."""
    tensors = tensors_of()
    write_index(write(tmp_path, tensors), {QUERY: "model-00001-of-00002.safetensors"})
    assert torch.equal(checkpoint_tensors(_load(tmp_path))[QUERY], tensors[QUERY])


def test_shards_behind_links_load(tmp_path: Path) -> None:
    """The hub's cache keeps the files elsewhere, under other names, and links to them."""
    tensors = tensors_of()
    folder = tmp_path / "snapshot"
    for shard in set(write_shards(folder, tensors).values()):
        blob = tmp_path / f"blob-of-{shard[:11]}"
        (folder / shard).rename(blob)
        (folder / shard).symlink_to(blob)
    found = checkpoint_tensors(_load(folder))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# --- nothing missing, nothing left over ---


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        QUERY,
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
        HEAD,
    ],
)
def test_a_missing_tensor(tmp_path: Path, name: str) -> None:
    tensors = tensors_of()
    del tensors[name]
    _refused(write(tmp_path, tensors), str(tmp_path / SINGLE), "missing", name)


def test_many_missing_tensors_are_counted(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in tensors_of().items() if ".layers.1.mlp." not in name}
    _refused(write(tmp_path, tensors), "missing", "model.layers.1.mlp.gate_proj.weight", "and 2 more", "download")


TENSOR_OF_ITS_OWN = {
    "Qwen2ForCausalLM": "q_proj.bias",
    "Qwen3ForCausalLM": "q_norm.weight",
    "Olmo2ForCausalLM": "q_norm.weight",
}


@pytest.mark.parametrize("kind", TENSOR_OF_ITS_OWN)
def test_tensors_that_only_the_family_has_may_not_be_missing(tmp_path: Path, kind: str) -> None:
    folder = write(tmp_path, tensors_of(), {**TINY, "architectures": [kind]})
    _refused(folder, SINGLE, "missing", TENSOR_OF_ITS_OWN[kind])


def test_a_norm_that_the_family_does_not_have_is_unexpected(tmp_path: Path) -> None:
    values = VARIANTS["olmo2"]
    name = "model.layers.1.input_layernorm.weight"
    _refused(write(tmp_path, {**tensors_of(values), name: torch.ones(24)}, values), "unexpected", name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.rotary_emb.cos_cached.scale",
        "model.layers.0.self_attn.rotary_emb.inv_freq.scale",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "vision_tower.weight",
        "lm_head.bias",
        "norm.weight",
    ],
)
def test_an_unexpected_tensor(tmp_path: Path, name: str) -> None:
    _refused(write(tmp_path, {**tensors_of(), name: torch.zeros(3)}), str(tmp_path / SINGLE), "unexpected", name)


def test_an_unexpected_tensor_in_a_shard(tmp_path: Path) -> None:
    tensors = {**tensors_of(), "surprise": torch.zeros(3)}
    write_shards(tmp_path, tensors)
    _refused(tmp_path, str(tmp_path / INDEX), "unexpected", "surprise")


def test_a_shard_may_not_hold_more_than_the_index_says(tmp_path: Path) -> None:
    homes = write_shards(tmp_path, {**tensors_of(), "surprise": torch.zeros(3)})
    del homes["surprise"]
    write_index(tmp_path, homes)
    _refused(tmp_path, "unexpected", "surprise")


def test_rotary_tables_may_be_left_over(tmp_path: Path) -> None:
    """Checkpoints of older versions carry them; they are computed here, and the stored ones change nothing."""
    extra = {"model.rotary_emb.inv_freq": torch.full((4,), 9.0)}
    extra |= {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.full((4,), 9.0) for layer in range(2)}
    plain = _load(write(tmp_path / "plain", tensors_of()))
    with_tables = _load(write(tmp_path / "extra", {**tensors_of(), **extra}))
    assert torch.equal(with_tables.rope_of_range(0, 9).rotations[0].cos, plain.rope_of_range(0, 9).rotations[0].cos)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param("model.embed_tokens.weight", (61, 24), id="vocabulary"),
        pytest.param("model.embed_tokens.weight", (24, 60), id="transposed"),
        pytest.param(QUERY, (24, 32), id="query-transposed"),
        pytest.param("model.layers.0.self_attn.k_proj.weight", (32, 24), id="keys-of-all-heads"),
        pytest.param("model.layers.0.mlp.gate_proj.weight", (80, 24), id="gate-and-up-in-one"),
        pytest.param("model.norm.weight", (24, 1), id="norm-of-two-dimensions"),
        pytest.param("model.norm.weight", (1,), id="norm-that-would-broadcast"),
        pytest.param("model.layers.1.self_attn.q_proj.weight", (1, 24), id="piece-that-would-broadcast"),
        pytest.param("model.layers.1.self_attn.v_proj.weight", (), id="scalar"),
    ],
)
def test_a_misshapen_tensor(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    wanted = list(shapes(TINY)[name])
    folder = write(tmp_path, {**tensors_of(), name: torch.zeros(shape)})
    _refused(folder, str(tmp_path / SINGLE), name, str(list(shape)), str(wanted))


@pytest.mark.parametrize("name", [QUERY, OUTPUT])
@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
    ],
    ids=str,
)
def test_a_quantised_tensor(tmp_path: Path, name: str, dtype: torch.dtype, stored: str) -> None:
    tensors = tensors_of()
    tensors[name] = torch.zeros_like(tensors[name]).to(dtype)
    _refused(write(tmp_path, tensors), str(tmp_path / SINGLE), name, stored)


def test_a_quantised_checkpoint_without_a_stated_dtype(tmp_path: Path) -> None:
    values = {key: value for key, value in TINY.items() if key != "torch_dtype"}
    folder = write(tmp_path, {name: tensor.to(torch.int8) for name, tensor in tensors_of().items()}, values)
    _refused(folder, str(tmp_path / SINGLE), "I8", "quantised")


def test_names_in_a_complaint_stay_on_its_line(tmp_path: Path) -> None:
    """A tensor's name is whatever the file says: line breaks and terminal codes in it must not reach the terminal."""
    folder = write(tmp_path, {**tensors_of(), "first\nsecond\x1b[2Jthird": torch.zeros(3)})
    _refused(folder, "unexpected", "first")
    with pytest.raises(FastKVError) as caught:
        LLM(folder, dtype="float32", device="cpu")
    assert "\x1b" not in str(caught.value)


# --- broken files ---


BREAKS: dict[str, Callable[[bytes], bytes]] = {
    "last-byte-lost": lambda content: content[:-1],
    "second-half-lost": lambda content: content[: len(content) // 2],
    "only-the-length": lambda content: content[:8],
    "half-the-length": lambda content: content[:4],
    "cut-inside-the-header": lambda content: content[:100],
    "empty": lambda content: b"",
    "garbage": lambda content: bytes(range(256)) * 16,
    "zeros": lambda content: bytes(4096),
    "a-web-page": lambda content: b"<!doctype html>\n<html><body>404</body></html>\n",
    "a-large-file-pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "header-is-no-json": lambda content: struct.pack("<Q", 8) + b"{'a': 1}",
    "header-is-a-list": lambda content: struct.pack("<Q", 8) + b"[      ]",
    "bytes-left-over": lambda content: content + bytes(64),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, tensors_of()) / SINGLE
    path.write_bytes(BREAKS[name](path.read_bytes()))
    _refused(tmp_path, str(path), "not a whole safetensors file", "download it again")


@pytest.mark.parametrize("name", ["last-byte-lost", "empty", "a-large-file-pointer"])
def test_a_broken_shard(tmp_path: Path, name: str) -> None:
    shard = tmp_path / write_shards(tmp_path, tensors_of())[OUTPUT]
    shard.write_bytes(BREAKS[name](shard.read_bytes()))
    _refused(tmp_path, str(shard), "not a whole safetensors file")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    _refused(write(tmp_path, {}), str(tmp_path / SINGLE), "missing")
    silent = {key: value for key, value in TINY.items() if key != "torch_dtype"}
    _refused(write(tmp_path / "silent", {}, silent), str(tmp_path / "silent" / SINGLE), "no tensors")


# --- the index ---


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "sub/inside.safetensors",
        "./model.safetensors",
        "sub/../model-00001-of-00003.safetensors",
        "..\\outside.safetensors",
        "sub\\inside.safetensors",
        "C:\\outside.safetensors",
        "..",
        "",
        "model-00001-of-00003.bin",
        "pytorch_model.bin",
        None,
        3,
        ["model-00001-of-00003.safetensors"],
        "{folder}/outside.safetensors",
    ],
    ids=repr,
)
def test_a_shard_must_be_a_safetensors_file_of_the_folder(tmp_path: Path, shard: Any) -> None:
    """The index comes with the model; what it names beyond the folder is not opened, even where it would load."""
    folder = tmp_path / "model"
    homes = write_shards(folder, tensors_of())
    (folder / "sub").mkdir()
    for place in (tmp_path / "outside.safetensors", folder / "sub" / "inside.safetensors"):
        shutil.copy(folder / homes[QUERY], place)
    shard = shard.replace("{folder}", str(tmp_path)) if isinstance(shard, str) else shard
    write_index(folder, {name: shard if home == homes[QUERY] else home for name, home in homes.items()})
    _refused(folder, str(folder / INDEX), repr(shard), "own folder")


def test_a_shard_name_that_no_system_takes(tmp_path: Path) -> None:
    homes = write_shards(tmp_path, tensors_of())
    write_index(tmp_path, {**homes, QUERY: "model\0.safetensors"})
    _refused(tmp_path, str(tmp_path))


def test_a_shard_name_too_long(tmp_path: Path) -> None:
    homes = write_shards(tmp_path, tensors_of())
    write_index(tmp_path, {**homes, QUERY: "x" * 1000 + ".safetensors"})
    _refused(tmp_path, str(tmp_path))


def test_a_missing_shard(tmp_path: Path) -> None:
    shard = tmp_path / write_shards(tmp_path, tensors_of())[OUTPUT]
    shard.unlink()
    _refused(tmp_path, str(shard), "no such file", INDEX)


def test_a_dangling_link_in_place_of_a_shard(tmp_path: Path) -> None:
    shard = tmp_path / write_shards(tmp_path, tensors_of())[OUTPUT]
    shard.unlink()
    shard.symlink_to(tmp_path / "gone")
    _refused(tmp_path, str(shard), "a link to a file that is not there", str(tmp_path / "gone"))


def test_a_folder_in_place_of_a_shard(tmp_path: Path) -> None:
    shard = tmp_path / write_shards(tmp_path, tensors_of())[OUTPUT]
    shard.unlink()
    shard.mkdir()
    _refused(tmp_path, str(shard))


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    homes = write_shards(tmp_path, tensors_of())
    wrong = next(shard for shard in homes.values() if shard != homes[QUERY])
    write_index(tmp_path, {**homes, QUERY: wrong})
    _refused(tmp_path, str(tmp_path / INDEX), wrong, QUERY)


def test_an_index_that_names_a_tensor_that_is_nowhere(tmp_path: Path) -> None:
    homes = write_shards(tmp_path, tensors_of())
    write_index(tmp_path, {**homes, "model.layers.9.weight": homes[QUERY]})
    _refused(tmp_path, str(tmp_path / INDEX), homes[QUERY], "model.layers.9.weight")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    """Which of the two would hold is anybody's guess."""
    tensors = tensors_of()
    homes = write_shards(tmp_path, tensors)
    other = next(shard for shard in homes.values() if shard != homes[QUERY])
    save_file({**load_file(tmp_path / other), QUERY: tensors[QUERY] + 1}, tmp_path / other)
    _refused(tmp_path, homes[QUERY], other, QUERY)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": null}', "{}", '{"weight_map": "x"}'],
)
def test_a_broken_index(tmp_path: Path, content: str) -> None:
    write_shards(tmp_path, tensors_of())
    (tmp_path / INDEX).write_text(content)
    _refused(tmp_path, str(tmp_path / INDEX))


# --- pickles ---


class _Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "weights.ckpt"])
def test_pickled_weights_are_never_opened(tmp_path: Path, name: str) -> None:
    folder = write_config(tmp_path / "model")
    mark = tmp_path / "unpickled"
    (folder / name).write_bytes(pickle.dumps(_Trap(mark)))
    _refused(folder, str(folder), name, "pickled", "safetensors")
    assert not mark.exists()
    (folder / name).write_bytes(b"\x00 not even a pickle")
    _refused(folder, str(folder), name, "pickled")


def test_a_pickle_under_the_name_of_safetensors(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "model")
    mark = tmp_path / "unpickled"
    (folder / SINGLE).write_bytes(pickle.dumps(_Trap(mark)))
    _refused(folder, str(folder / SINGLE), "not a whole safetensors file")
    assert not mark.exists()


def test_a_pickle_beside_safetensors_is_ignored(tmp_path: Path) -> None:
    mark = tmp_path / "unpickled"
    folder = write(tmp_path / "model", tensors_of())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(mark)))
    LLM(folder, dtype="float32", device="cpu")
    assert not mark.exists()


def test_a_folder_without_weights(tmp_path: Path) -> None:
    _refused(write_config(tmp_path), str(tmp_path), SINGLE, INDEX)


def test_weights_under_another_name_are_pointed_at(tmp_path: Path) -> None:
    folder = write(tmp_path, tensors_of())
    (folder / SINGLE).rename(folder / "consolidated.safetensors")
    _refused(folder, str(folder), "consolidated.safetensors", SINGLE)


# --- memory ---


def test_a_model_larger_than_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "big-model", tensors_of())
    needed = model_bytes(ModelConfig.from_pretrained(folder), torch.float32)
    reads: list[str] = []
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: reads.append(name))
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed // 4)
    _refused(folder, "big-model", "needs", "MiB", "bfloat16")
    assert reads == []


def test_a_model_that_just_fits_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, tensors_of())
    needed = model_bytes(ModelConfig.from_pretrained(folder), torch.float32)
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed)
    LLM(folder, dtype="float32", device="cpu")
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)  # where the system does not say
    LLM(folder, dtype="float32", device="cpu")
    monkeypatch.setattr(memory, "available_bytes", lambda device: needed // 2)
    LLM(folder, dtype="bfloat16", device="cpu")


def _status(field: str) -> int | None:
    """A figure of /proc/self/status in bytes; None where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    figures = dict(line.split(":", 1) for line in lines)
    return int(figures[field].split()[0]) * 1024 if field in figures else None


def _mapped(file: Path, tensor: Tensor) -> bool:
    """Whether the tensor's memory is a mapping of the file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return line.endswith(str(file.resolve()))
    return False


needs_proc = pytest.mark.skipif(_status("RssAnon") is None, reason="needs /proc/self/status with RssAnon (Linux)")


@needs_proc
def test_an_embedding_alone_stays_the_mapped_file(tmp_path: Path) -> None:
    """It takes no memory before it is used, and none that the system could not take back."""
    file = write(tmp_path, tensors_of()) / SINGLE
    mapped = {name for name, parameter in _load(tmp_path).named_parameters() if _mapped(file, parameter)}
    assert mapped == {"embed_tokens.weight"}
    assert not any(_mapped(file, parameter) for parameter in _load(tmp_path, torch.bfloat16).parameters())


def test_writing_to_a_parameter_leaves_the_file_alone(tmp_path: Path) -> None:
    file = write(tmp_path, tensors_of()) / SINGLE
    before = file.read_bytes()
    model = _load(tmp_path)
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.zero_()
    assert file.read_bytes() == before


# Two layers of 19 M parameters and two tables of 4 M; about half of it in parameters that are fused from pieces.
LARGE = {
    **TINY,
    "vocab_size": 4096,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}

MEASURE = """
import sys
from pathlib import Path
import torch
from fastkv.models.config import ModelConfig
from fastkv.models.weights import load_weights, meta_model

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024

folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
config = ModelConfig.from_pretrained(folder)
torch.set_num_threads(1)
meta_model(config)  # what torch imports for it is no part of the model
own, resident = [status("RssAnon")], status("VmRSS")
model = load_weights(config, folder, dtype, torch.device("cpu"), lambda done, total: own.append(status("RssAnon")))
print(max(own) - own[0], status("VmHWM") - resident)
"""


@needs_proc
@pytest.mark.parametrize(
    ("stored", "asked", "own_limit", "resident_limit"),
    [
        # Own memory: all of it, once. Resident: that and the pages of the file that the last 64 MiB were copied from.
        pytest.param(torch.float32, "float32", 1.1, 1.6, id="as-stored"),
        pytest.param(torch.bfloat16, "float32", 1.1, 1.5, id="widened"),
    ],
)
def test_a_model_is_never_in_memory_twice(
    tmp_path: Path, stored: torch.dtype, asked: str, own_limit: float, resident_limit: float
) -> None:
    """Peaks of a process that does nothing but load, in multiples of the model's bytes (185 MB).

    Own memory (anonymous pages) is seen after each parameter; the system itself keeps the peak of what was resident,
    the file's pages included. Reading the whole file first costs 1.0 more of both as stored, and 0.5 widened.
    """
    tensors = {name: torch.zeros(shape, dtype=stored) for name, shape in shapes(LARGE).items()}
    write(tmp_path, tensors, LARGE)
    whole = model_bytes(ModelConfig.from_pretrained(tmp_path), getattr(torch, asked))
    assert 150e6 < whole < 200e6
    command = [sys.executable, "-c", MEASURE, str(tmp_path), asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    own, resident = (int(figure) / whole for figure in done.stdout.split())
    assert 0.3 < own < own_limit
    assert own < resident < resident_limit


STARTUP = """
import sys
import torch
from fastkv.models.config import ModelConfig
from fastkv.models.weights import meta_model
before = "sympy" in sys.modules
meta_model(ModelConfig("LlamaForCausalLM", 60, 24, 40, 2, 4, 2, 8, 128))
print(before, "sympy" in sys.modules)
"""


def test_building_the_network_imports_no_symbolic_mathematics() -> None:
    """Drawing an embedding's initial values on the meta device makes torch import its decompositions and sympy.

    That is more than a second of every start and 70 MB, for values that are never used.
    """
    done = subprocess.run([sys.executable, "-c", STARTUP], capture_output=True, text=True, check=True, timeout=60)
    before, after = done.stdout.split()
    assert after == before
