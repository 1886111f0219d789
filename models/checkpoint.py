"""A safetensors checkpoint, one file or several with an index, opened lazily. No other format is ever opened."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastkv.errors import FastKVError, brief
from fastkv.models.fields import Fields
from fastkv.models.files import check_ordinary
from fastkv.models.lacking import no_shard, no_weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PLAIN = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Constants that older versions of published code saved with the weights, and that are computed: rotary tables, masks
# and positions.
_LEFT_OVER = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|masked_bias|causal_mask|position_ids)$"
)


class Checkpoint:
    """The tensors of a model folder, by name. A context manager: it holds memory-mapped files open."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path = path
        self._files = files
        self._stack = ExitStack()
        self._home: dict[str, tuple[Path, Any]] = {}
        self._open_all()

    def _open_all(self) -> None:
        try:
            for file in self._files:
                self._open(file)
        except BaseException:
            self._stack.close()
            raise

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Open `model.safetensors`, or the shards that `model.safetensors.index.json` names.

        Raises FastKVError if there is neither, or if a file is missing, broken, or outside the folder.
        """
        if (folder / SINGLE).is_file():
            return cls(folder / SINGLE, [folder / SINGLE])
        index = folder / INDEX
        if not index.is_file():
            raise FastKVError(no_weights(folder, SINGLE, INDEX))
        shards = _shards(index)
        checkpoint = cls(index, [folder / shard for shard in sorted(set(shards.values()))])
        for name, shard in shards.items():
            home = checkpoint._home.get(name)
            if home is None or home[0].name != shard:
                checkpoint.close()
                raise FastKVError(f"{index}: says that {shard} holds tensor {name}, which it does not")
        return checkpoint

    def _open(self, file: Path) -> None:
        check_ordinary(file)
        try:
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
        except FileNotFoundError:
            raise FastKVError(no_shard(file, INDEX)) from None
        except (SafetensorError, OSError) as error:
            raise FastKVError(f"{file}: not a whole safetensors file ({error}); download it again") from None
        for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
            if name in self._home:
                raise FastKVError(f"{file}: tensor {name} is also in {self._home[name][0].name}")
            self._home[name] = (file, handle)

    @property
    def names(self) -> list[str]:
        return list(self._home)

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._home[name][1].get_slice(name).get_shape())

    def dtype_of(self, name: str) -> str:
        """The stored dtype as torch spells it; FastKVError for one that weights are not read in."""
        file, handle = self._home[name]
        stored = handle.get_slice(name).get_dtype()
        if stored not in _PLAIN:
            raise FastKVError(
                f"{file}: tensor {name} is stored as {stored}, and weights are floats of 16, 32 or 64 bits (quantised "
                "checkpoints are not supported); use the float16, bfloat16 or float32 weights of the same model"
            )
        return _PLAIN[stored]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """FastKVError unless the tensor has this shape and a dtype of weights. Reads the header only."""
        file, found = self._home[name][0], self.shape_of(name)
        if found != shape:
            raise FastKVError(
                f"{file}: tensor {name} has shape {list(found)}, but config.json asks for {list(shape)}; "
                "the two do not belong together"
            )
        self.dtype_of(name)

    def read(self, name: str) -> Tensor:
        """The tensor, memory-mapped: nothing is read before it is used."""
        file, handle = self._home[name]
        try:
            return handle.get_tensor(name)
        except SafetensorError as error:
            raise FastKVError(f"{file}: tensor {name} cannot be read ({error}); download it again") from None

    def unmap(self) -> None:
        """Open the files anew: the pages that have been read so far count to the process no longer.

        The mapping of a tensor that is still held stays, for as long as it is.
        """
        self.close()
        self._home.clear()
        self._open_all()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stored_dtype(folder: Path) -> str:
    """The dtype of the checkpoint's first weights: for a config.json that does not state one."""
    with Checkpoint.open(folder) as checkpoint:
        first = next((name for name in checkpoint.names if not is_left_over(name)), None)
        if first is None:
            raise FastKVError(f"{checkpoint.path}: holds no tensors; download it again")
        return checkpoint.dtype_of(first)


def _shards(index: Path) -> dict[str, str]:
    weight_map = Fields.read(index).section("weight_map")
    if weight_map is None or not weight_map.values:
        raise FastKVError(f"{index}: the key 'weight_map' is missing or empty")
    for shard in weight_map.values.values():
        plain = isinstance(shard, str) and shard == Path(shard).name and "\\" not in shard and shard.isprintable()
        if not plain or not shard.endswith(".safetensors"):
            raise FastKVError(f"{index}: shard {brief(shard)} is not a .safetensors file of the model's own folder")
    return weight_map.values


def is_left_over(name: str) -> bool:
    """Whether a tensor is a constant that no model needs to be given."""
    return _LEFT_OVER.search(name) is not None
