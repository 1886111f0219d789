"""The supported model families, and which of them a model belongs to."""

from __future__ import annotations

from fastkv.errors import FastKVError, brief
from fastkv.models.family import Family
from fastkv.models.fields import Fields
from fastkv.models.granite import Granite
from fastkv.models.mistral import Mistral
from fastkv.models.olmo2 import Olmo2
from fastkv.models.qwen2 import Qwen2
from fastkv.models.qwen3 import Qwen3


class LlamaFamily(Family):
    """Llama 2, 3, 3.1, 3.2 and others of that architecture: a Family as it is."""

    architectures = (("llama", "LlamaForCausalLM"),)


FAMILIES: tuple[Family, ...] = (LlamaFamily(), Mistral(), Qwen2(), Qwen3(), Olmo2(), Granite())


def find_family(fields: Fields) -> tuple[Family, str]:
    """The family of a config.json, and the architecture's name; `model_type` decides where no architecture is stated.

    Raises FastKVError for one that is not supported.
    """
    names = fields.get("architectures", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise fields.complain("architectures", "a list of names")
    stated = {name.casefold() for name in names}
    for family in FAMILIES:
        for model_type, name in family.architectures:
            if stated & _spellings(name) or (not names and fields.get("model_type", None) == model_type):
                return family, name
    named = names[:8] or [fields.get("model_type", "none stated")]
    listed = ", ".join(brief(name).strip("'") for name in named)
    raise FastKVError(f"{fields.source}: architecture {listed} is not supported; supported are {_supported()}")


def family_of(architecture: str) -> Family:
    """The family that an architecture such as LlamaForCausalLM belongs to; FastKVError if there is none."""
    for family in FAMILIES:
        if any(architecture == name for _, name in family.architectures):
            return family
    raise FastKVError(f"architecture {architecture} is not supported; supported are {_supported()}")


def _spellings(name: str) -> set[str]:
    """The architecture in a config.json, in lower case: as LLaMAForCausalLM of the first exports, or a base model's."""
    return {name.casefold(), name.replace("ForCausalLM", "Model").casefold()}


def _supported() -> str:
    return ", ".join(name for family in FAMILIES for _, name in family.architectures)
