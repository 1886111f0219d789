"""The output folder of fastkv-batch: a manifest that says whose it is, and a file for each shard that is done.

A file of a shard is whole as soon as it is there: it is written beside its name, and then takes it. The manifest is one
line of JSON, locked while a command works.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastkv.console.batch.shards import Shard
from fastkv.console.files import check_folder
from fastkv.console.job import flat
from fastkv.console.jsonl import RecordFile, as_line, difference
from fastkv.errors import FastKVError, FaultError
from fastkv.storage import unwritable, write_atomically

MANIFEST = "batch.json"
KIND = "fastkv-batch"
_BEGUN = ".begun"  # a file for each shard that a worker began
_LEFT = ".fastkv-*.tmp"  # what a worker that died was writing
_BEGINNING = as_line({"kind": KIND})[:-2]  # of a manifest


def missing(folder: Path, shards: Iterable[Shard]) -> list[Shard]:
    """The shards that are not done."""
    return [shard for shard in shards if not (folder / shard.name).is_file()]


class OutputFolder:
    """A folder that no other command writes to until the end of the `with`.

    content: what the run is (input, model, settings). Raises FastKVError where the folder is of another run, holds
    other things, is written to by another process, or cannot be made. Where nothing was done, nothing of it stays.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.manifest: dict[str, Any] = json.loads(json.dumps({"kind": KIND, **content}, default=str))
        check_folder(path, "output")
        self._is_new = not path.exists()
        try:
            path.mkdir(parents=True, exist_ok=True)
            there = os.listdir(path)
        except OSError as error:
            raise unwritable(path, error, "output") from None
        if there and MANIFEST not in there:
            raise self._refused("is not empty, and none of this command's")
        self._file = RecordFile(path / MANIFEST)
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise

    def missing(self, shards: Iterable[Shard]) -> list[Shard]:
        return missing(self.path, shards)

    def begun_again(self) -> int:
        """How often a worker began what another one, which is gone, had begun."""
        return sum(len(path.read_bytes().splitlines()) - 1 for path in (self.path / _BEGUN).glob("*"))

    def __enter__(self) -> OutputFolder:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # what is done is done
            self._sweep()
            self._leave()
        self._file.close()

    def _begin(self) -> None:
        tail = self._file.tail
        if not (tail.startswith(_BEGINNING) or _BEGINNING.startswith(tail)) or len(self._file.objects) > 1:
            raise self._file.foreign(len(self._file.objects) + 1)
        self._file.drop_tail()
        if self._file.objects:
            self._check(self._file.objects[0])
        else:
            self._file.append(self.manifest)
        try:
            self._sweep()
            (self.path / _BEGUN).mkdir()
        except OSError as error:
            raise unwritable(self.path, error, "output") from None

    def _check(self, found: dict[str, Any]) -> None:
        if found.get("kind") != KIND:
            raise self._file.foreign(1)
        stored, wanted = flat(found), flat(self.manifest)
        for name in [*wanted, *stored]:
            if stored.get(name) != wanted.get(name):
                told = difference(stored.get(name), wanted.get(name))
                raise self._refused(f"was made with {name.replace('_', ' ')} {told}")

    def _refused(self, why: str) -> FastKVError:
        return FastKVError(f"{self.path}: {why}; name another folder", setting="output")

    def _leave(self) -> None:
        """Without a shard nothing is to be continued: a flag that was wrong may be mended, and the folder taken."""
        if any(self.path.glob("shard-*")):
            return
        self._file.path.unlink(missing_ok=True)
        if self._is_new:
            self.path.rmdir()

    def _sweep(self) -> None:
        """Take away what is of no use to a later command."""
        shutil.rmtree(self.path / _BEGUN, ignore_errors=True)
        for path in self.path.glob(_LEFT):
            path.unlink(missing_ok=True)


def check_shared(folder: Path, manifest: dict[str, Any], machine: str) -> None:
    """A worker's own look at the folder: FastKVError unless it holds this manifest."""
    try:
        found = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        found = None
    if found != manifest:
        raise FastKVError(
            f"{folder}: is not the same folder on {machine}; all machines must have it under this name",
            setting="output",
        )


def begin(folder: Path, shard: Shard, worker: str) -> int:
    """Note that a worker begins a shard; how often that was done in this run."""
    path = folder / _BEGUN / shard.name
    try:
        with path.open("ab") as file:
            file.write(f"{worker}\n".encode())
        return len(path.read_bytes().splitlines())
    except OSError as error:
        raise unwritable(path, error, "output") from None


def write_shard(folder: Path, shard: Shard, records: list[dict[str, Any]]) -> None:
    """All its records, in one step. Raises FaultError on a full disk."""
    path = folder / shard.name
    try:
        write_atomically(path, b"".join(map(as_line, records)))
    except OSError as error:
        raise unwritable(path, error, "output") from None


def read_records(folder: Path, shard: Shard) -> list[dict[str, Any]]:
    """What another worker wrote. Raises FaultError for a file that holds anything else."""
    path = folder / shard.name
    try:
        records: list[dict[str, Any]] = [json.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, ValueError):
        raise FaultError(f"{path}: holds no records; delete it, and start the command again") from None
    return records
