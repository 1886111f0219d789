"""A model folder in which a file is missing: what is said goes by what is there instead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkpoints import INDEX, SINGLE, tensors_of, write, write_config, write_shards

from fastkv import LLM, FastKVError
from fastkv.models.hub import model_folder


def complaint(folder: Path) -> str:
    """The one line with which the folder is refused."""
    with pytest.raises(FastKVError) as caught:
        LLM(folder, device="cpu")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ([], "the folder is empty"),
        (["notes.txt"], "a folder in the Hugging Face layout"),
        (["adapter_config.json", "adapter_model.safetensors"], "an adapter (LoRA)"),
        (["model.Q4_K_M.gguf"], "a GGUF model"),
        (["params.json", "consolidated.00.pth"], "its authors' own layout"),
        (["model_index.json", "unet/config.json"], "a pipeline"),
        (["checkpoint-500/config.json"], "there is one in checkpoint-500"),
    ],
)
def test_a_folder_without_config(tmp_path: Path, files: list[str], said: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = complaint(tmp_path)
    assert found.startswith(f"{tmp_path / 'config.json'}: no such file; ")
    assert said in found


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", SINGLE])
def test_a_link_to_a_file_that_is_gone(tmp_path: Path, file: str) -> None:
    folder = write(tmp_path / "model", tensors_of())
    (folder / file).unlink(missing_ok=True)
    (folder / file).symlink_to(tmp_path / "gone")
    assert complaint(folder) == f"{folder / file}: a link to a file that is not there ({tmp_path / 'gone'})"


def test_an_index_that_is_gone(tmp_path: Path) -> None:
    write_shards(tmp_path, tensors_of())
    (tmp_path / INDEX).unlink()
    assert re.search(r"without the index model-00001-of-00003\.safetensors is not read", complaint(tmp_path))
    (tmp_path / INDEX).symlink_to("nowhere")
    assert complaint(tmp_path) == f"{tmp_path / INDEX}: a link to a file that is not there (nowhere)"


def test_a_folder_without_weights(tmp_path: Path) -> None:
    assert complaint(write_config(tmp_path)) == f"{tmp_path}: no {SINGLE} and no {INDEX}"


def test_a_link_to_a_folder_that_is_gone(tmp_path: Path) -> None:
    """Neither a file nor a hub's id."""
    link = tmp_path / "model"
    link.symlink_to("nowhere")
    for name in (link, str(link)):
        with pytest.raises(FastKVError, match=r"model: a link to a folder that is not there \(nowhere\)"):
            model_folder(name)
