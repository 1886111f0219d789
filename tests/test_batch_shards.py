"""How fastkv-batch cuts its input, and how many workers there are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastkv.console.batch.room import Machine, Room, Wanted, room
from fastkv.console.batch.shards import parsed, read_prompts, read_shard
from fastkv.console.prompt import read_jobs
from fastkv.errors import FastKVError


def test_shards_cover_every_record_once(tmp_path: Path) -> None:
    """Blank lines, a byte-order mark, lines that end in CRLF, and a last one that does not end."""
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"prompt": f"{n} \r\x0b\x85 ü"}, ensure_ascii=False) for n in range(10)]
    text = "\ufeff\n" + "\r\n".join(lines[:4]) + "\n  \n\u3000\n" + "\n\n".join(lines[4:])
    path.write_bytes(text.encode())
    for size in (1, 3, 10, 11):
        prompts = read_prompts(path, size)
        assert [shard.records for shard in prompts.shards] == [size] * (10 // size) + [10 % size] * (10 % size > 0)
        found = [line for shard in prompts.shards for line in read_shard(path, shard)]
        assert [line.job for line in found] == read_jobs(str(path))
        assert [str(line.number) for line in found] == [line.id for line in found]
        assert (prompts.records, prompts.checksum) == (10, read_prompts(path, 5).checksum and prompts.checksum)
        assert sorted(shard.name for shard in prompts.shards) == [shard.name for shard in prompts.shards]


def test_the_checksum_is_of_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n')
    one = read_prompts(path, 2).checksum
    path.write_text('{"prompt": "a"}\n\n')
    assert read_prompts(path, 2).checksum != one


def test_an_id_counts_once_across_shards(tmp_path: Path) -> None:
    """What is no prompt has taken no name."""
    path = tmp_path / "in.jsonl"
    names = ["a", "b", "a", 2, "c", "c"]
    texts = [json.dumps({"id": name, "prompt": "x"}) for name in names]
    path.write_text("\n".join([*texts, '{"prompt": "2"}', '{"id": "d", "prompt": ""}', '{"id": "d", "prompt": "x"}']))
    prompts = read_prompts(path, 2)
    assert [shard.repeated for shard in prompts.shards] == [(), (3,), (6,), (), ()]
    wrong = [line.number for shard in prompts.shards for line in read_shard(path, shard) if line.job is None]
    assert wrong == [3, 6, 8]


def test_lines_that_are_no_prompt_keep_their_name() -> None:
    for raw, name in ((b'{"id": "a"}', "a"), (b'{"id": 7}', "7"), (b'{"id": true}', "5"), (b"[1]", "5"), (b"x", "5")):
        line = parsed(raw, 5)
        assert line is not None
        assert (line.job, line.id) == (None, name)
        assert line.wrong is not None
        assert line.wrong.startswith("line 5: ")


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "has no lines"), (b" \n\n", "has no lines"), (b"\xff\xfe{\0}\0", "is UTF-16; save it as UTF-8")],
)
def test_files_without_prompts_are_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(data)
    with pytest.raises(FastKVError, match=said) as caught:
        read_prompts(path, 2)
    assert caught.value.setting == "prompts"


def test_a_file_that_changed_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    shard = read_prompts(path, 1).shards[1]
    path.write_text('{"prompt": "a"}\n{"prompt": "c"}\n')
    with pytest.raises(FastKVError, match="has changed since the command began"):
        read_shard(path, shard)


CPU, TWO_GPUS = Machine(8, 0), Machine(16, 2)
ELSEWHERE = Wanted(address="head:6379")


@pytest.mark.parametrize(
    ("wanted", "machines", "shards", "found"),
    [
        (Wanted(), [CPU], 9, Room(1, 8, 0, "cpu")),
        (Wanted(workers=3), [CPU], 9, Room(3, 2, 0, "cpu")),
        (Wanted(workers=20), [CPU], 99, Room(20, 1, 0, "cpu")),
        (Wanted(workers=3), [CPU], 2, Room(2, 4, 0, "cpu")),
        (Wanted(workers=2, threads=8), [CPU], 9, Room(2, 8, 0, "cpu")),
        (Wanted(), [TWO_GPUS], 9, Room(2, 8, 1, "cuda")),
        (Wanted(gpus_per_worker=0.5), [TWO_GPUS], 9, Room(4, 4, 0.5, "cuda")),
        (Wanted(device="cpu", workers=4), [TWO_GPUS], 9, Room(4, 4, 0, "cpu")),
        (replace(ELSEWHERE, workers=3), [CPU, CPU], 9, Room(3, 1, 0, "cpu")),
        (replace(ELSEWHERE, workers=3, threads=4), [CPU, CPU], 9, Room(3, 4, 0, "cpu")),
        (ELSEWHERE, [CPU, TWO_GPUS, TWO_GPUS], 9, Room(4, 1, 1, "cuda")),
    ],
    ids=str,
)
def test_room(wanted: Wanted, machines: list[Machine], shards: int, found: Room) -> None:
    wanted.check()
    assert room(wanted, machines, shards) == found


@pytest.mark.parametrize(
    ("wanted", "machines", "said"),
    [
        (Wanted(workers=3), [TWO_GPUS], "Ray has room for 2 with 5 CPUs and 1 GPU each, not for 3"),
        (replace(ELSEWHERE, workers=5, threads=5), [CPU, TWO_GPUS], "Ray has room for 2 with 5 CPUs and 1 GPU each"),
        (replace(ELSEWHERE, workers=3, threads=5), [CPU, CPU], "Ray has room for 2 with 5 CPUs each, not for 3"),
        (replace(ELSEWHERE, workers=9), [CPU], "Ray has room for 8 with 1 CPU each, not for 9"),
        (Wanted(device="cuda"), [CPU], "Ray knows of no GPU: leave it out, or take cpu"),
        (Wanted(gpus_per_worker=0.5), [CPU], "Ray knows of no GPU: leave it out"),
    ],
    ids=str,
)
def test_no_room(wanted: Wanted, machines: list[Machine], said: str) -> None:
    """Said at once: Ray itself would wait for more machines."""
    wanted.check()
    with pytest.raises(FastKVError, match=said):
        room(wanted, machines, 9)
