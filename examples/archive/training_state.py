"""What a training run leaves in its folder: a Hugging Face model, and the state from which it can go on.

Only safetensors and JSON, no pickle. Every file is written beside its place and then moved there, so that a run that is
killed leaves either the old file or the new one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from training_plan import Budget, Settings

from fastkv.errors import FastKVError
from fastkv.models.llama import Llama
from fastkv.models.weights import checkpoint_tensors
from fastkv.storage import write_atomically

BUNDLED = Path(__file__).parent / "model"
COPIED = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
MODEL, STATE = "model.safetensors", "state.safetensors"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Counters:
    """How far a run is. `retrieval_at`: the progress at which the first stage found retrieval, if it did."""

    step: int = 0
    minutes: float = 0.0
    retrieval_at: float | None = None


@dataclass(frozen=True)
class Record:
    """The JSON part of a saved state."""

    settings: Settings
    budget: Budget
    counters: Counters


def prepare_folder(folder: Path, settings: Settings) -> None:
    """Make `folder` and put everything of a model folder there but the weights."""
    config = json.loads((BUNDLED / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": settings.hidden,
        "intermediate_size": settings.intermediate,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.n_heads,
        "num_key_value_heads": settings.n_kv_heads,
    }
    files = {name: (BUNDLED / name).read_bytes() for name in COPIED}
    files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomically(folder / name, content)


def save_model(folder: Path, model: Llama) -> None:
    """The weights in bfloat16, under their Hugging Face names."""
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in checkpoint_tensors(model).items()}
    write_atomically(folder / MODEL, save(tensors, metadata={"format": "pt"}))


def save_state(folder: Path, model: Llama, optimizer: torch.optim.Optimizer, record: Record) -> None:
    """Everything a run needs to go on, in one file: weights in float32, Adam's moments, and the JSON in its header."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach()
        moments = optimizer.state.get(parameter, {})
        tensors.update({f"{moment}.{name}": value for moment, value in moments.items()})
    header = {"record": json.dumps(asdict(record))}
    write_atomically(folder / STATE, save(tensors, metadata=header))


def read_record(folder: Path) -> Record:
    """The JSON part of a folder's state. Raises FastKVError where there is none, or a broken one."""
    path = folder / STATE
    if not path.is_file():
        raise FastKVError(f"{path}: no such file, so there is nothing to resume; leave --resume out")
    try:
        with safe_open(path, framework="pt") as file:
            values = json.loads((file.metadata() or {})["record"])
        pairs = {name: tuple(value) for name, value in values["settings"].items() if isinstance(value, list)}
        settings = Settings(**values["settings"] | pairs)
        return Record(settings, Budget(**values["budget"]), Counters(**values["counters"]))
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(path, error) from None


def load_state(folder: Path, model: Llama, optimizer: torch.optim.Optimizer) -> None:
    """Fill `model` and `optimizer` from a folder's state. Raises FastKVError where it does not fit them."""
    path = folder / STATE
    try:
        with safe_open(path, framework="pt") as file:
            for name, parameter in model.named_parameters():
                with torch.no_grad():
                    parameter.copy_(file.get_tensor(f"weight.{name}"))
                if f"{_MOMENTS[0]}.{name}" in file.keys():  # noqa: SIM118 (the handle is no mapping)
                    moments: dict[str, Any] = {moment: file.get_tensor(f"{moment}.{name}") for moment in _MOMENTS}
                    optimizer.state[parameter] = moments
    except (SafetensorError, OSError, RuntimeError) as error:
        raise _broken(path, error) from None


def _broken(path: Path, error: Exception) -> FastKVError:
    reason = " ".join(str(error).split())
    return FastKVError(f"{path}: not a training state that can be read ({type(error).__name__}: {reason})")
