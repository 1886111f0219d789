"""The memory of one rank for a request that need not run here: no weights, no GPU. Worked out as fastkv-run does.

What a running process takes besides is not counted: libraries, a GPU's own context, captured graphs, and what NCCL
holds for its messages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fastkv.cache.decode_budget import DecodeBudget
from fastkv.cache.policy import Policy
from fastkv.cache.pool import bucket, bytes_of
from fastkv.engine.footprint import Footprint, footprint, within_products
from fastkv.engine.loading import load_parts
from fastkv.engine.offloading import plan as offload_plan
from fastkv.engine.offloading.plan import why_not_offloaded
from fastkv.engine.plan import RequestPlan, plan_request, position_limit
from fastkv.engine.planning.rank_sizes import rank_config, stored_config
from fastkv.engine.request import answer_length
from fastkv.engine.sampler import SamplingParams
from fastkv.errors import FastKVError
from fastkv.models.config import ModelConfig
from fastkv.models.llama import Llama
from fastkv.models.weights import model_bytes


@dataclass(frozen=True)
class Wanted:
    """A request, and how it is to run. batch: prompts that decode together; each is read by itself before that.

    config: of the whole model. folder: its files, None where there are none. device: its kind is what counts. threads:
    of a CPU. max_tokens: None means what fastkv-run takes.
    """

    config: ModelConfig
    policy: Policy
    n_tokens: int
    dtype: torch.dtype
    device: torch.device
    max_tokens: int | None = None
    batch: int = 1
    ranks: int = 1
    weights: str | None = None
    kv_dtype: str | None = None
    decode_budget: DecodeBudget | None = None
    folder: Path | None = None
    threads: int = 1

    @property
    def rank(self) -> ModelConfig:
        """The network of one rank; with the whole vocabulary, over which its logits are."""
        return rank_config(self.config, self.ranks)

    @property
    def stored(self) -> ModelConfig:
        """The same with the rows of embedding and head that it holds."""
        return stored_config(self.config, self.ranks)


@dataclass(frozen=True)
class Planned:
    """What one rank takes. weights: bytes. request: its sizes. needs: the rest, at the worst moment.

    products: what a CPU's products take for themselves.
    """

    wanted: Wanted
    weights: int
    request: RequestPlan
    needs: Footprint
    products: int

    @property
    def working(self) -> int:
        """Bytes that are neither weights nor KV cache."""
        return self.needs.total - self.needs.cache + self.products

    @property
    def total(self) -> int:
        return self.weights + self.needs.total + self.products


@dataclass(frozen=True)
class Offloaded:
    """The same where hidden states and K/V of the layer at work lie in the host's memory: bytes of both, of a rank."""

    device: int
    host: int


class PlannedModel(Llama):
    """A network whose parameters have no memory, on a device that need not be there."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, int8: bool) -> None:
        with torch.device("meta"):
            super().__init__(config)
            if int8:
                self.lm_head.scale = torch.empty(config.vocab_size)
        self.computes_in(dtype)
        self._planned_device = device

    @property
    def device(self) -> torch.device:
        return self._planned_device


def planned(wanted: Wanted) -> Planned:
    """What one rank needs. Raises FastKVError for what fastkv-run would refuse, but for too little memory."""
    config, policy = wanted.config, wanted.policy
    policy.validate(config.n_layers, config.n_kv_heads)
    if wanted.ranks > 1 and not policy.splits_heads:
        raise FastKVError(f"policy {policy.name} does not go with several GPUs: take another one", setting="gpus")
    rank, evicts = wanted.rank, wanted.decode_budget is not None
    if wanted.kv_dtype == "int4" and config.head_dim % 2:
        raise FastKVError(f"int4 stores channels in pairs, and head_dim is {config.head_dim}", setting="kv_dtype")
    limit = position_limit(rank, policy, wanted.n_tokens, evicts=evicts)
    params = SamplingParams(max_tokens=wanted.max_tokens)
    max_tokens = answer_length(rank, params, wanted.n_tokens, limit, evicts=evicts)
    sizes = wanted.n_tokens, max_tokens, wanted.dtype, limit
    request = plan_request(rank, policy, *sizes, decode_budget=wanted.decode_budget, kv_dtype=wanted.kv_dtype)
    needs = _needs(wanted, request)
    products = within_products(rank, wanted.threads) if wanted.device.type == "cpu" else 0
    return Planned(wanted, weight_bytes(wanted), request, needs, products)


def offloaded(plan: Planned) -> list[Offloaded]:
    """Ways to keep hidden states, K and V of the layer at work in the host's memory, the fastest first."""
    if why_not_offloaded(plan.request) is not None:
        return []
    ways = (_needs(plan.wanted, way) for way in offload_plan.offloaded(plan.request))
    return [Offloaded(plan.weights + needs.total + plan.products, needs.on_host) for needs in ways]


def _needs(wanted: Wanted, request: RequestPlan) -> Footprint:
    slot = bytes_of(request.layout, [bucket(count) for count in request.capacities], request.shape)
    model = _model(wanted.rank, wanted.dtype, wanted.device, wanted.weights is not None)
    return footprint(model, request, wanted.batch * slot, slots=wanted.batch)


@lru_cache(maxsize=64)
def _model(config: ModelConfig, dtype: torch.dtype, device: torch.device, int8: bool) -> PlannedModel:
    return PlannedModel(config, dtype, device, int8)


def weight_bytes(wanted: Wanted) -> int:
    """Bytes of a rank's parameters; on a CPU with its tokenizer, and without an embedding that stays a mapped file."""
    folder = wanted.folder if wanted.ranks == 1 else None
    return _loaded_bytes(wanted.stored, folder, wanted.dtype, wanted.weights, wanted.device)


@lru_cache(maxsize=64)  # plans that are compared ask for the same again and again
def _loaded_bytes(
    config: ModelConfig, folder: Path | None, dtype: torch.dtype, weights: str | None, device: torch.device
) -> int:
    parts = load_parts(config, folder, dtype, weights, device)
    return parts["parameters"] + parts.get("the tokenizer", 0)


matrix_bytes = lru_cache(maxsize=64)(model_bytes)
