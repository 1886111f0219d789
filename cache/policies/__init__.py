"""The methods, one short file each, by the name that `--policy` takes."""

from __future__ import annotations

from fastkv.cache.policies.adakv import AdaKV
from fastkv.cache.policies.asl import ASL
from fastkv.cache.policies.fastkv import FastKV
from fastkv.cache.policies.full import FullKV
from fastkv.cache.policies.gemfilter import GemFilter
from fastkv.cache.policies.h2o import H2O
from fastkv.cache.policies.headkv import HeadKV
from fastkv.cache.policies.pyramidinfer import PyramidInfer
from fastkv.cache.policies.pyramidkv import PyramidKV
from fastkv.cache.policies.snapkv import SnapKV
from fastkv.cache.policies.streamingllm import StreamingLLM
from fastkv.cache.policies.structkv import StructKV
from fastkv.cache.policy import Policy

_ALL: tuple[type[Policy], ...] = (
    *(FastKV, FullKV, SnapKV, PyramidKV, AdaKV, HeadKV, H2O, StreamingLLM),
    *(GemFilter, PyramidInfer, StructKV, ASL),
)
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in _ALL}

__all__ = [
    "ASL",
    "H2O",
    "POLICIES",
    "AdaKV",
    "FastKV",
    "FullKV",
    "GemFilter",
    "HeadKV",
    "PyramidInfer",
    "PyramidKV",
    "SnapKV",
    "StreamingLLM",
    "StructKV",
]
