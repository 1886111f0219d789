"""A safetensors file of our own, checked whole: written through one buffer, read as a memory map.

safetensors' writer holds a copy of everything and writes by itself, so that a full disk costs the earlier file; its
reader opens the file twice, between which another process may replace it. The format is the same: eight bytes of
length, a header in JSON, the tensors. The last tensor is a checksum of all bytes before it.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, TypeGuard

import torch
from torch import Tensor

DTYPES = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CHECKSUM = "checksum"
_DIGEST = 32  # bytes
_BLOCK = 2**16  # bytes whose words are added up
_BUFFER = 64 * _BLOCK
_ALIGNED = 64  # where the tensors begin, a multiple of it
_LONGEST_HEADER = 2**24


class BrokenFileError(Exception):
    """What is wrong with a file, as the end of a sentence that begins with its name."""


class TensorFile:
    """The tensors of a file, as views of its memory map, and the texts in its header.

    Nothing is read before it is used, and a file that is deleted or replaced meanwhile stays as it was. To shorten a
    file that is mapped is to pull the memory away: `replacing` never does.
    """

    def __init__(self, path: Path) -> None:
        """Raises BrokenFileError for what is no such file, or is not whole; OSError where it cannot be read."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise BrokenFileError("is no safetensors file")
            self._whole = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        self._begin, entries = _header(self._whole)
        self.metadata = _metadata(entries.pop("__metadata__", None))
        self._places, end = _places(entries)
        if self._begin + end != size:
            what = "is cut off" if self._begin + end > size else "was written to after it was whole"
            raise BrokenFileError(f"{what}: it has {size} bytes, and its header tells of {self._begin + end}")

    def check(self) -> None:
        """Read all of it once, and raise BrokenFileError unless each byte is what was written."""
        end = len(self._whole) - _DIGEST
        if self._places.get(_CHECKSUM) != (torch.uint8, (_DIGEST,), end - self._begin, end + _DIGEST - self._begin):
            raise BrokenFileError("has no checksum where one belongs")
        digest = _Digest(self._whole[: self._begin].numpy().tobytes())
        digest.add(self._whole[self._begin : end])
        if digest.bytes() != self._whole[end:].numpy().tobytes():
            raise BrokenFileError("was changed after it was written, or the disk lost a part of it")

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> set[str]:
        """Of its tensors, the checksum left out."""
        return self._places.keys() - {_CHECKSUM}

    def tensor(self, name: str, dtype: torch.dtype, n_dims: int) -> Tensor:
        """Raises BrokenFileError unless there is one of this dtype, with so many dimensions."""
        found = self._places.get(name)
        if found is None or found[0] != dtype or len(found[1]) != n_dims:
            raise BrokenFileError(f"has no tensor {name} of {n_dims} dimensions in {dtype}")
        _, shape, begin, end = found
        return self._whole[self._begin + begin : self._begin + end].view(dtype).view(shape)


def write_tensors(file: IO[bytes], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write a file that TensorFile reads, and any reader of safetensors. The host gets one tensor at a time.

    Their dtypes are those of DTYPES; those of more bytes come first. Raises OSError where writing fails.
    """
    header = _new_header(metadata, tensors)
    file.write(header)
    digest, buffer, used = _Digest(header), torch.empty(_BUFFER, dtype=torch.uint8), 0
    for tensor in tensors.values():
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        while len(data):
            piece = data[: _BUFFER - used]
            buffer[used : used + len(piece)] = piece
            used, data = used + len(piece), data[len(piece) :]
            if used == _BUFFER:
                _flush(file, digest, buffer)
                used = 0
    _flush(file, digest, buffer[:used])
    file.write(digest.bytes())


def _flush(file: IO[bytes], digest: _Digest, data: Tensor) -> None:
    digest.add(data)
    file.write(data.numpy().data)


class _Digest:
    """A hash of the header, and of the sums of the 64-bit words of each block of what follows.

    A cryptographic hash of all would take several times as long as everything else. Any change of a single word shows,
    and of several ones all but one in 2 ** 64; somebody who wants to hide a change can.
    """

    def __init__(self, header: bytes) -> None:
        self._hash = hashlib.blake2b(header, digest_size=_DIGEST)

    def add(self, data: Tensor) -> None:
        """uint8; whole blocks, but for the last call."""
        whole = len(data) // _BLOCK * _BLOCK
        rest = torch.zeros(_BLOCK, dtype=torch.uint8)
        rest[: len(data) - whole] = data[whole:]
        for part in (data[:whole], rest) if len(data) > whole else (data,):
            self._hash.update(part.view(torch.int64).view(-1, _BLOCK // 8).sum(dim=1).numpy().tobytes())

    def bytes(self) -> bytes:
        return self._hash.digest()


def _new_header(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.itemsize
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    entries[_CHECKSUM] = {"dtype": "U8", "shape": [_DIGEST], "data_offsets": [end, end + _DIGEST]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text


def _header(whole: Tensor) -> tuple[int, dict[str, Any]]:
    """Where the tensors begin, and what the header says."""
    length = int.from_bytes(whole[:8].numpy().tobytes(), "little")
    if length > _LONGEST_HEADER or (8 + length) % _ALIGNED:
        raise BrokenFileError("is no session file")
    if length > len(whole) - 8:
        raise BrokenFileError("is cut off in its header")
    try:
        entries = json.loads(whole[8 : 8 + length].numpy().tobytes())
    except (ValueError, RecursionError):
        entries = None
    if not isinstance(entries, dict):
        raise BrokenFileError("is no safetensors file: its header is no JSON object")
    return 8 + length, entries


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise BrokenFileError("is no session file: its header says nothing of one")
    return found


_Place = tuple[torch.dtype, tuple[int, ...], int, int]  # dtype, shape, first byte and the one after the last


def _places(entries: Mapping[str, Any]) -> tuple[dict[str, _Place], int]:
    """Where each tensor lies, one after the other, and where the last one ends."""
    places: dict[str, _Place] = {}
    end = 0
    for name, entry in entries.items():
        places[name] = place = _place(name, entry)
        if place[2] != end:
            raise BrokenFileError(f"has no tensor {name} where the one before it ends")
        end = place[3]
    return places, end


def _place(name: str, entry: Any) -> _Place:
    if isinstance(entry, dict):
        dtype, shape, offsets = DTYPES.get(str(entry.get("dtype"))), entry.get("shape"), entry.get("data_offsets")
        if dtype is not None and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2:
            begin, end = offsets
            if end - begin == math.prod(shape) * dtype.itemsize and begin % dtype.itemsize == 0:
                return dtype, tuple(shape), begin, end
    raise BrokenFileError(f"tells of a tensor {name} that cannot be")


def _are_sizes(found: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of a few numbers that can be sizes, whatever their product with one that is 0."""
    if not isinstance(found, list) or len(found) > 4 or not all(type(each) is int and each >= 0 for each in found):
        return False
    return math.prod(max(1, each) for each in found) < 2**62
