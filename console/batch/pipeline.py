"""The shards through Ray Data: a pool of actors, each with one engine. The only file that knows Ray.

Ray restarts an actor that dies, and has it do again what it was at, without end (the defaults of Ray Data); worker.py
gives a shard up that several have died of. Ray's own words stay in its log files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from fastkv.console.batch.room import Machine, Room, Wanted, room
from fastkv.console.batch.shards import Shard
from fastkv.console.batch.worker import Done, Setup, Worker
from fastkv.console.parser import check_installed
from fastkv.errors import FastKVError, FaultError, brief, one_line

_OBJECTS = 128 << 20  # bytes for what goes between processes: names of shards, and counts
_PATIENCE = 10  # seconds for a cluster's head to answer
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",  # nothing is sent to anyone
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # which it else warns of
}


def check_ray() -> None:
    """FastKVError unless Ray can be found. Imports nothing."""
    check_installed("fastkv-batch", "ray", "ray")


def run(setup_of: Callable[[Room], Setup], shards: Sequence[Shard], wanted: Wanted) -> Generator[Done, None, None]:
    """What became of each shard, as soon as that is known, in any order.

    setup_of: what the workers are to know. Raises FastKVError for a cluster that cannot be reached or has no room, and
    FaultError where Ray itself fails. Close it to end the work.
    """
    with _cluster(wanted, len(shards)) as ray:
        machines = [
            Machine(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0))
            for node in ray.nodes()
            if node["Alive"]
        ]
        found = room(wanted, machines, len(shards))
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_no_progress_timeout_s = -1  # else half an hour, and a shard may take longer
        texts = [{"shard": json.dumps(asdict(shard))} for shard in shards]
        done = ray.data.from_items(texts, override_num_blocks=len(texts)).map_batches(
            Worker,
            fn_constructor_args=(setup_of(found),),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=found.workers, max_tasks_in_flight_per_actor=1),
            num_cpus=found.threads,
            num_gpus=found.gpus or None,
        )
        try:
            for row in done.iter_rows():
                yield Done(**json.loads(row["done"]))
        except (FastKVError, GeneratorExit):
            raise
        except Exception as error:
            raise FaultError(f"Ray has failed: {_told(error)}") from None


@contextlib.contextmanager
def _cluster(wanted: Wanted, n_shards: int) -> Iterator[Any]:
    """Ray, connected; a cluster of its own ends with it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _check_reached(wanted.address)
    import ray
    import ray.data

    _hush()
    try:
        try:
            ray.init(**_where(wanted, n_shards), log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            if wanted.address is None:
                raise FaultError(f"Ray cannot begin: {_told(error)}") from None
            why = one_line(str(error), 300)
            raise FastKVError(f"the Ray cluster at {brief(wanted.address)}: {why}", setting="address") from None
        yield ray
    finally:
        ray.shutdown()


def _check_reached(address: str | None) -> None:
    """FastKVError where nobody listens: Ray itself would try for minutes."""
    if address in (None, "auto"):
        return
    host, _, port = str(address).rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE).close()
    except OSError:
        raise FastKVError(f"no Ray cluster answers at {brief(address)}", setting="address") from None


def _where(wanted: Wanted, n_shards: int) -> dict[str, Any]:
    """Arguments of ray.init: of a cluster of its own, or of one that is there, whose workers get our variables."""
    if wanted.address is None:
        workers = min(wanted.workers or 1, n_shards)
        cpus = max(_cores(), workers * (wanted.threads or 1))
        return {
            "address": "local",
            "num_cpus": cpus,
            "include_dashboard": False,
            "object_store_memory": _OBJECTS,
        }
    ours = {name: value for name, value in os.environ.items() if name.startswith("FASTKV_")}
    return {"address": wanted.address, "runtime_env": {"env_vars": ours}}


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Ray tells of what died on stdout, and its C++ parts write to the file 2: both lead nowhere meanwhile.

    sys.stderr, looked up anew, goes on leading where it did, for what the command has to say.
    """
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        told = sys.stderr
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        if told is not None and told is sys.__stderr__:
            before = os.dup(2)
            own = stack.enter_context(open(before, "w", encoding=sys.stderr.encoding, errors="backslashreplace"))
            stack.callback(os.dup2, before, 2)  # before it is closed
            stack.enter_context(contextlib.redirect_stderr(own))
            os.dup2(nowhere.fileno(), 2)
        yield


def _hush() -> None:
    """What Ray Data logs goes to its files, and not to the terminal."""
    log = logging.getLogger("ray.data")
    for handler in [handler for handler in log.handlers if handler.name == "console"]:
        log.removeHandler(handler)


def _told(error: Exception) -> str:
    """The last line of what may be many: of an error in a worker, the error itself."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {one_line(lines[-1].strip(), 300)}"
