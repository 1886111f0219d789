"""What the steps of gpu_suite.py are made of: cases, and what these share. Measures nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cost import wait_for
from suite_record import Record

from fastkv import LLM
from fastkv.engine.device import resolve_dtype
from fastkv.models.config import ModelConfig
from fastkv.models.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent
SHORTEST = 64  # tokens of a context, however small the scale is


@dataclass(frozen=True)
class Case:
    """One figure or several that belong together. seconds: the estimate."""

    name: str
    seconds: float
    run: Callable[[], dict[str, Any]]


class Suite:
    """What the cases share: the settings, the record, the time that is left, and a model once one is asked for."""

    def __init__(self, args: Namespace, device: torch.device, record: Record, ends_at: float) -> None:
        self.args, self.device, self.record = args, device, record
        self._ends_at = ends_at
        self._llm: LLM | None = None

    @property
    def llm(self) -> LLM:
        if self._llm is None:
            self._llm = LLM(self.args.model, device=self.device, dtype=self.args.dtype, load_format="dummy")
            wait_for(self.device)
        return self._llm

    @property
    def config(self) -> ModelConfig:
        known = self.args.model in PRESETS
        return PRESETS[self.args.model] if known else ModelConfig.from_pretrained(Path(self.args.model))

    @property
    def dtype(self) -> torch.dtype:
        return resolve_dtype(self.args.dtype, self.config.dtype or "float32", self.device)

    @property
    def left(self) -> float:
        """Seconds before the deadline."""
        return self._ends_at - time.monotonic()

    def tokens(self, context: int) -> int:
        """That many, scaled as the command says."""
        return max(SHORTEST, round(context * self.args.scale))

    def clean(self) -> None:
        """No buffers of an earlier case, so that a peak belongs to one case alone."""
        if self._llm is not None:
            self._llm.free_buffers()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def child(self, argv: list[str], limit: float, settings: dict[str, str] | None = None) -> tuple[int | None, str]:
        """Run another Python for at most `limit` seconds: its exit status (None: it was ended) and what it printed.

        settings: variables for its environment.
        """
        self.clean()
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            process = subprocess.Popen(
                [sys.executable, *argv],
                cwd=ROOT,
                env={**os.environ, **(settings or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it has started
                    process.wait()
            output.seek(0)
            return status, output.read()


class NotNeededError(Exception):
    """A case has nothing left to tell."""
