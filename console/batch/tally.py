"""What has been done of a batch, in numbers and in a line for people."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from fastkv.console.batch.flags import NAME
from fastkv.console.batch.shards import Prompts, Shard
from fastkv.console.batch.worker import Done
from fastkv.console.words import counted
from fastkv.errors import FastKVError, FaultError

GIVEN_UP = 3  # shards that may be, before all the work is


class Tally:
    """Counts what workers tell of the shards that were to be done. todo, records: prompts, in all and so far."""

    def __init__(self, prompts: Prompts, shards: Sequence[Shard]) -> None:
        self.todo = sum(shard.records for shard in shards)
        self.records = 0
        self._known = prompts.records - self.todo
        self._shards = {shard.number: shard for shard in shards}
        self._done: list[Done] = []
        self._lost: list[str] = []
        self._told: set[str] = set()
        self._began = time.perf_counter()

    def add(self, done: Done) -> list[str]:
        """Count it; lines to say. Raises FastKVError for what is wrong with all shards, or with too many."""
        if done.fatal is not None:
            kind = FaultError if done.fault else FastKVError
            raise kind(done.fatal, setting=done.setting)
        lines = [line for line in done.warnings if line not in self._told]
        self._told.update(lines)
        if done.lost is None:
            self._done.append(done)
            self.records += done.records
            return lines
        self._lost.append(f"{self._shards[done.shard].told}: {done.lost}")
        if len(self._lost) > GIVEN_UP:
            raise FaultError(f"{len(self._lost)} shards could not be done, the last one {self._lost[-1]}")
        return [*lines, f"{NAME}: warning: {self._lost[-1]}"]

    def check(self, missing: Collection[Shard]) -> None:
        """FaultError where not all is done; missing: the shards without a file."""
        if not missing:
            return
        if self._lost:
            those = f"{counted(len(missing), 'shard')} could not be done: {self._lost[0]}"
        else:
            those = f"{counted(len(missing), 'shard')} did not come: {next(iter(missing)).told}"
        raise FaultError(f"{those}; the rest is there, and the same command tries again")

    def line(self, output: str, begun_again: int) -> str:
        """The figures. begun_again: shards that a worker took up which another one had begun."""
        seconds = time.perf_counter() - self._began
        answers, errors, tokens, reused, warned = (
            sum(getattr(done, name) for done in self._done)
            for name in ("answers", "errors", "new_tokens", "reused_tokens", "warned")
        )
        text = f"{counted(answers, 'answer')} to {output}: {counted(tokens, 'token')} in {seconds:,.1f} s"
        text += f", {tokens / seconds:,.1f} tokens/s with their prompts" if self._done else ""
        text += f"; {reused:,} tokens of prompts that begin alike were read once" if reused else ""
        text += f'; see "warning" in {warned:,} of them' if warned else ""
        text += f'; {counted(errors, "prompt")} failed: see "error" in their records' if errors else ""
        whose = "its" if begun_again == 1 else "their"
        text += f"; {counted(begun_again, 'worker')} died, and {whose} work was done again" if begun_again else ""
        known = self._known
        text += f"; {known:,} {'was' if known == 1 else 'were'} there already" if known else ""
        dtypes = sorted({done.dtype for done in self._done if done.dtype is not None})
        return text + (f"; computed in {' and in '.join(dtypes)}: --dtype would make it one" if len(dtypes) > 1 else "")
