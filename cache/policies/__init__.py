"""The methods, one short file each, by the name that `--policy` takes."""

from __future__ import annotations

from fastkv.cache.policies.fastkv import FastKV
from fastkv.cache.policies.full import FullKV
from fastkv.cache.policies.h2o import H2O
from fastkv.cache.policies.pyramidinfer import PyramidInfer
from fastkv.cache.policies.pyramidkv import PyramidKV
from fastkv.cache.policies.snapkv import SnapKV
from fastkv.cache.policies.streamingllm import StreamingLLM
from fastkv.cache.policy import Policy

_ALL: tuple[type[Policy], ...] = (FastKV, FullKV, SnapKV, PyramidKV, PyramidInfer, H2O, StreamingLLM)
POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in _ALL}

__all__ = ["H2O", "POLICIES", "FastKV", "FullKV", "PyramidInfer", "PyramidKV", "SnapKV", "StreamingLLM"]
