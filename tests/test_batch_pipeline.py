"""What fastkv-batch asks of Ray, and what becomes of Ray's errors: a stand-in for Ray, which runs nothing."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fastkv.console.batch import pipeline
from fastkv.console.batch.room import Room, Wanted
from fastkv.console.batch.shards import Shard
from fastkv.console.batch.worker import Done, Worker
from fastkv.errors import FastKVError, FaultError

SHARDS = [Shard(number, 1, 0, 9, 2, "") for number in range(3)]
Outcome = Callable[[str], str]


class StandIn:
    """calls: of what, and with what. outcome: what a worker makes of a shard."""

    def __init__(self) -> None:
        self.calls: dict[str, dict[str, Any]] = {}
        self.context = SimpleNamespace()
        self.resources: dict[str, float] = {"CPU": 4.0}
        self.outcome: Outcome = lambda text: json.dumps(asdict(Done(json.loads(text)["number"], answers=2)))
        self.running = False

    def modules(self) -> dict[str, ModuleType]:
        ray, data = ModuleType("ray"), ModuleType("ray.data")
        data.__dict__.update(
            DataContext=SimpleNamespace(get_current=lambda: self.context),
            ActorPoolStrategy=lambda **named: named,
            from_items=self.from_items,
        )
        nodes = [{"Alive": True, "Resources": self.resources}, {"Alive": False, "Resources": {"CPU": 99.0}}]
        ray.__dict__.update(init=self.init, shutdown=self.shutdown, nodes=lambda: nodes, data=data)
        return {"ray": ray, "ray.data": data}

    def init(self, **named: Any) -> None:
        print("Ray has begun")  # on stdout, where nothing may come
        self.calls["init"], self.running = named, True

    def shutdown(self) -> None:
        self.running = False

    def from_items(self, items: list[Any], **named: Any) -> SimpleNamespace:
        def map_batches(worker: type, **named: Any) -> SimpleNamespace:
            self.calls["map_batches"] = {"worker": worker, **named}
            return SimpleNamespace(iter_rows=rows)

        def rows() -> Iterator[dict[str, str]]:
            for item in items:
                yield {"done": self.outcome(item["shard"])}

        assert named == {"override_num_blocks": len(items)}
        return SimpleNamespace(map_batches=map_batches)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in pipeline.ENVIRONMENT:
        monkeypatch.setenv(name, "", prepend=None)
        monkeypatch.delenv(name)
    return stand_in


def run(wanted: Wanted) -> list[Done]:
    with pipeline.quiet(), closing(pipeline.run(lambda room: room, SHARDS, wanted)) as each:  # type: ignore[arg-type,return-value]
        return list(each)


def test_each_shard_is_given_to_a_pool(ray: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    """A block for each shard, and no more workers than asked for; an actor holds one shard, of which it may die."""
    assert [done.shard for done in run(Wanted(workers=2))] == [0, 1, 2]
    asked = ray.calls["map_batches"]
    assert asked["worker"] is Worker
    assert asked["fn_constructor_args"] == (Room(2, 2, 0.0, "cpu"),)
    assert asked["compute"] == {"size": 2, "max_tasks_in_flight_per_actor": 1}
    assert (asked["batch_size"], asked["num_cpus"], asked["num_gpus"]) == (1, 2, None)
    assert ray.context.execution_no_progress_timeout_s == -1  # a shard may take hours
    assert not ray.running
    assert capsys.readouterr() == ("", "")


def test_gpus_are_asked_for_where_there_are_any(ray: StandIn) -> None:
    ray.resources["GPU"] = 2.0
    run(Wanted(gpus_per_worker=0.5))
    asked = ray.calls["map_batches"]
    assert (asked["compute"]["size"], asked["num_gpus"]) == (3, 0.5)  # as many as shards


def test_a_cluster_of_its_own_or_one_that_is_there(ray: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers of another cluster get our variables; those of our own inherit them."""
    monkeypatch.setattr(os, "environ", {"FASTKV_CACHE": "/c", "HOME": "/h"})
    run(Wanted(workers=3, threads=50))
    assert ray.calls["init"]["address"] == "local"
    assert ray.calls["init"]["num_cpus"] == 150
    run(Wanted(address="auto"))
    assert ray.calls["init"]["runtime_env"] == {"env_vars": {"FASTKV_CACHE": "/c"}}
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "1"
    run(Wanted())
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"


def test_what_ray_says_is_one_line(ray: StandIn) -> None:
    def die(text: str) -> str:
        raise RuntimeError("a long story\n\nModuleNotFoundError: No module named 'fastkv'\n")

    ray.outcome = die
    with pytest.raises(
        FaultError, match=r"^Ray has failed: RuntimeError: ModuleNotFoundError: No module named 'fastkv'$"
    ):
        run(Wanted())
    assert not ray.running


def test_work_that_is_left_ends(ray: StandIn) -> None:
    with closing(pipeline.run(lambda room: room, SHARDS, Wanted())) as each:  # type: ignore[arg-type,return-value]
        next(each)
        assert ray.running
    assert not ray.running


def test_no_room_is_told_before_anything_is_asked(ray: StandIn) -> None:
    with pytest.raises(FastKVError, match="Ray has room for 0 with 9 CPUs each, not for 1"):
        run(Wanted(address="auto", threads=9))
    assert (ray.running, "map_batches" in ray.calls) == (False, False)


def test_an_address_where_nobody_listens(ray: StandIn) -> None:
    """Ray itself would try for minutes."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(FastKVError, match=f"no Ray cluster answers at '{address}'") as caught:
            run(Wanted(address=address))
    assert (caught.value.setting, ray.calls) == ("address", {})


def test_a_cluster_that_does_not_take_us_says_why(ray: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("Version mismatch:\nRay: 2.40.0")

    monkeypatch.setattr(sys.modules["ray"], "init", refuse)
    with pytest.raises(FastKVError, match=r"the Ray cluster at 'auto': Version mismatch: Ray: 2\.40\.0"):
        run(Wanted(address="auto"))
    with pytest.raises(FaultError, match=r"Ray cannot begin: RuntimeError: Ray: 2\.40\.0"):
        run(Wanted())
