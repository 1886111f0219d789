"""The training run itself: one step after another, a progress line now and then, a save every few minutes.

What a step does depends on the seed and the step's number alone, so a resumed run does what an unbroken one does.
"""

from __future__ import annotations

import math
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from encoding import load_encode
from torch import nn
from training_data import make_batch
from training_network import count_right, hide, initialise, loss_of
from training_plan import RETRIEVAL, Budget, Settings, Stage, learning_rate, plan, stage_at
from training_state import BUNDLED, Counters, Record, load_state, prepare_folder, save_model, save_state

from fastkv.errors import FastKVError
from fastkv.eval.tasks.archive import Encode
from fastkv.models.config import ModelConfig
from fastkv.models.llama import Llama
from fastkv.models.weights import load_weights

BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.98), 0.05, 1.0
SAVE_MINUTES = 5.0

Report = Callable[[str], None]


class Run:
    """A training run: the network, its optimizer, and how far they are."""

    def __init__(self, folder: Path, settings: Settings, budget: Budget, report: Report) -> None:
        prepare_folder(folder, settings)
        self.folder, self.settings, self.budget, self.report = folder, settings, budget, report
        self.encode: Encode = load_encode(BUNDLED / "tokenizer.json")
        self.stages = plan(settings.lengths)
        self.counters = Counters()
        self.model = Llama(ModelConfig.from_pretrained(folder))
        initialise(self.model, settings.seed)
        self.optimizer = torch.optim.AdamW(decay_groups(self.model), lr=settings.lr, betas=BETAS)
        self._losses: list[float] = []
        self._began = self._saved = time.monotonic()
        self._minutes_before = 0.0

    def begin_with(self, folder: Path) -> None:
        """Take the weights of another model of the same size. Raises FastKVError where the folder holds none such."""
        weights = load_weights(self.model.config, folder, torch.float32, torch.device("cpu"))
        self.model.load_state_dict(weights.state_dict())

    def resume(self, counters: Counters) -> None:
        """Go on from the folder's saved state, whose counters these are."""
        load_state(self.folder, self.model, self.optimizer)
        self.counters = counters
        self._minutes_before = counters.minutes

    @property
    def progress(self) -> float:
        return self.budget.progress(self.counters.minutes, self.counters.step)

    def train(self, stop_after: int | None) -> bool:
        """Take steps until the run is over, `stop_after` steps are done, or Ctrl-C; True if it was Ctrl-C."""
        last = None if stop_after is None else self.counters.step + stop_after
        with Interrupt() as interrupt:
            while self.progress < 1 and self.counters.step != last and not interrupt.seen:
                self._step()
                if time.monotonic() - self._saved > SAVE_MINUTES * 60:
                    self.save()
            self.save()
        return interrupt.seen

    def _step(self) -> None:
        progress, counters = self.progress, self.counters
        stage = stage_at(self.stages, progress, counters.retrieval_at)
        rng = random.Random(f"{self.settings.seed} step {counters.step}")
        length = stage.draw_length(rng)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings.lr, counters.step, progress)
        self._losses.append(self._descend(rng, stage, length))
        counters.step += 1
        counters.minutes = self._minutes_before + (time.monotonic() - self._began) / 60
        if counters.step % self.settings.report_every == 0:
            self._measure(stage, length)

    def _descend(self, rng: random.Random, stage: Stage, length: int) -> float:
        size = batch_size(self.settings, length)
        batch = make_batch(rng, self.encode, size, length, self.settings.digits)
        loss = loss_of(self.model, batch, hide(rng, size, length) if stage.hiding else None)
        value = loss.item()
        if not math.isfinite(value):
            raise FastKVError(f"the loss became {value} at step {self.counters.step}; start anew with a lower --lr")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        return value

    def _measure(self, stage: Stage, length: int) -> None:
        """Accuracy on fresh texts of this length; says how things stand, and whether the first stage is over."""
        counters = self.counters
        rng = random.Random(f"{self.settings.seed} check {counters.step}")
        batch = make_batch(rng, self.encode, batch_size(self.settings, length), length, self.settings.digits)
        right, asked = count_right(self.model, batch)
        loss, self._losses = sum(self._losses) / len(self._losses), []
        left = counters.minutes / self.progress * (1 - self.progress)
        self.report(
            f"step {counters.step:5d}  length {length:4d}  loss {loss:.4f}  codes right {100 * right / asked:5.1f} %  "
            f"{left:.1f} min left{'  (layer 0 hides)' if stage.hiding else ''}"
        )
        if stage is self.stages[0] and counters.retrieval_at is None and right / asked >= RETRIEVAL:
            counters.retrieval_at = self.progress
            self.report(f"step {counters.step:5d}  retrieval has appeared: on to longer texts")

    def save(self) -> None:
        """The state first: a run that is killed between the two files can still go on from where it was."""
        record = Record(self.settings, self.budget, self.counters)
        save_state(self.folder, self.model, self.optimizer, record)
        save_model(self.folder, self.model)
        self._saved = time.monotonic()

    def test(self, n_texts: int) -> None:
        """Right codes of `n_texts` held-out texts with one question each, for every length."""
        for length in self.settings.lengths:
            rng = random.Random(f"{self.settings.seed} held out {length}")
            right = done = 0
            while done < n_texts:
                size = min(batch_size(self.settings, length), n_texts - done)
                batch = make_batch(rng, self.encode, size, length, self.settings.digits, n_questions=1)
                right += count_right(self.model, batch)[0]
                done += size
            self.report(f"held out: length {length:4d}  {right} of {n_texts} codes right")


class Interrupt:
    """Ctrl-C as something to look at between steps. A second one stops at once."""

    seen = False

    def __enter__(self) -> Interrupt:
        self._before: Any = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


def batch_size(settings: Settings, length: int) -> int:
    """Texts of a step: as many as make up its tokens, one at the least."""
    return max(1, settings.batch_tokens // length)


def decay_groups(model: Llama) -> list[dict[str, Any]]:
    """Parameter groups for AdamW: the matrices decay, the norms do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
