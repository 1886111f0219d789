"""The methods, one short file each, by the name that `--policy` takes."""

from __future__ import annotations

from fastkv.cache.policies.fastkv import FastKV
from fastkv.cache.policies.full import FullKV
from fastkv.cache.policies.pyramidkv import PyramidKV
from fastkv.cache.policies.snapkv import SnapKV
from fastkv.cache.policies.streamingllm import StreamingLLM
from fastkv.cache.policy import Policy

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (FastKV, FullKV, PyramidKV, SnapKV, StreamingLLM)
}

__all__ = ["POLICIES", "FastKV", "FullKV", "PyramidKV", "SnapKV", "StreamingLLM"]
