"""What a run was: everything that decides what it finds, as the header of its file."""

from __future__ import annotations

import hashlib
import platform
from datetime import date
from pathlib import Path
from typing import Any

import torch

from fastkv import __version__
from fastkv.engine.llm import LLM
from fastkv.eval.policy_spec import PolicySpec
from fastkv.eval.runner import Plan

SAMPLE = 1 << 16  # bytes of a large file that are read, at each of its ends


def describe(llm: LLM, folder: Path, plan: Plan, specs: list[PolicySpec]) -> dict[str, Any]:
    """A JSON object: date, model files, machine, versions, examples and policies of a run."""
    return {
        "date": date.today().isoformat(),
        "files": fingerprint(folder),
        "device": torch.cuda.get_device_name(llm.device) if llm.device.type == "cuda" else str(llm.device),
        "dtype": str(llm.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "fastkv": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "tasks": [task.name for task in plan.tasks],
        "sources": {task.name: task.source for task in plan.tasks if task.source is not None},
        "lengths": plan.lengths,
        "depths": plan.depths,
        "examples": plan.examples,
        "seed": plan.seed,
        "max_tokens": plan.max_tokens,
        "longbench_examples": plan.longbench_examples,
        "longbench_tokens": plan.longbench_tokens,
        "policies": [
            {"label": one.label, "name": one.policy.name, **one.policy.settings(llm.config.n_layers)} for one in specs
        ],
    }


def fingerprint(folder: Path) -> str:
    """A checksum of the names, sizes and ends of a model's files: whether the folder still holds the same model."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.suffix not in (".json", ".jinja", ".model", ".safetensors"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE))
            if size > 2 * SAMPLE:
                file.seek(-SAMPLE, 2)
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:16]
