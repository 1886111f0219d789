"""Two ranks on two GPUs, over NCCL with captured graphs, answer as one GPU does. Skipped where torch sees fewer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

import fastkv

if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
    pytest.skip("takes two GPUs", allow_module_level=True)


def test_two_gpus_answer_as_one() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(ROOT / "benchmarks" / "ranks.py"), "--device", "cuda", "--prompts", "4"]
    environment = {**os.environ, "PYTHONPATH": str(Path(fastkv.__file__).parent.parent)}
    model = ["--model", str(ROOT / "examples" / "archive" / "model")]
    done = subprocess.run([*torchrun, *script, *model], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 answers differ" in done.stdout
