"""A safetensors checkpoint, one file or several with an index, opened lazily. No other format is ever opened."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastkv.errors import FastKVError
from fastkv.models.fields import Fields

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


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
            raise FastKVError(_nothing_to_load(folder))
        shards = _shards(index)
        checkpoint = cls(index, [folder / shard for shard in sorted(set(shards.values()))])
        for name, shard in shards.items():
            home = checkpoint._home.get(name)
            if home is None or home[0].name != shard:
                checkpoint.close()
                raise FastKVError(f"{index}: says that {shard} holds tensor {name}, which it does not")
        return checkpoint

    def _open(self, file: Path) -> None:
        try:
            handle = self._stack.enter_context(safe_open(file, framework="pt"))
        except FileNotFoundError:
            raise FastKVError(f"{file}: no such file, though {INDEX} names it; is the download complete?") from None
        except (SafetensorError, OSError) as error:
            raise FastKVError(f"{file}: not a whole safetensors file ({error}); download it again") from None
        for name in handle.keys():  # noqa: SIM118 (the handle is no mapping)
            if name in self._home:
                raise FastKVError(f"{file}: tensor {name} is also in {self._home[name][0].name}")
            self._home[name] = (file, handle)

    @property
    def names(self) -> list[str]:
        return list(self._home)

    def dtype_of(self, name: str) -> str:
        """The stored dtype as torch spells it; FastKVError for one that only quantised checkpoints have."""
        file, handle = self._home[name]
        stored = handle.get_slice(name).get_dtype()
        if stored not in _PLAIN:
            raise FastKVError(
                f"{file}: tensor {name} is stored as {stored}: quantised checkpoints are not supported; "
                "use the float16, bfloat16 or float32 weights of the same model"
            )
        return _PLAIN[stored]

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """FastKVError unless the tensor has this shape and an unquantised dtype. Reads the header only."""
        file, handle = self._home[name]
        found = tuple(handle.get_slice(name).get_shape())
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
    """The dtype of the checkpoint's first tensor: for a config.json that does not state one."""
    with Checkpoint.open(folder) as checkpoint:
        if not checkpoint.names:
            raise FastKVError(f"{checkpoint.path}: holds no tensors; download it again")
        return checkpoint.dtype_of(checkpoint.names[0])


def _shards(index: Path) -> dict[str, str]:
    weight_map = Fields.read(index).section("weight_map")
    if weight_map is None or not weight_map.values:
        raise FastKVError(f"{index}: the key 'weight_map' is missing or empty")
    for shard in weight_map.values.values():
        plain = isinstance(shard, str) and shard == Path(shard).name and "\\" not in shard and shard.isprintable()
        if not plain or not shard.endswith(".safetensors"):
            raise FastKVError(f"{index}: shard {shard!r} is not a .safetensors file of the model's own folder")
    return weight_map.values


def _nothing_to_load(folder: Path) -> str:
    pickled = sorted(path.name for pattern in _PICKLED for path in folder.glob(pattern))
    if pickled:
        return (
            f"{folder}: holds only pickled weights ({pickled[0]}), which are never opened because a pickle can run "
            "code; convert them to safetensors first"
        )
    other = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"; {other[0]} is not read under that name" if other else ""
    return f"{folder}: no {SINGLE} and no {INDEX}{hint}"
