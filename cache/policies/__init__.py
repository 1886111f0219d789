"""The methods, one short file each.

A new policy is its file and ONE line here. Exports, flags, help texts and the tables of the docs follow from that
(cache/catalogue.py). The order is that of help texts and tables.

These files import torch inside the functions that compute, and elsewhere for type checkers only: so the command can
tell every policy and its settings by importing the classes themselves, without waiting for torch.
"""
# isort: skip_file

from typing import TYPE_CHECKING

from fastkv.cache.policies.fastkv import FastKV as FastKV
from fastkv.cache.policies.fastkv_paper import FastKVPaper as FastKVPaper
from fastkv.cache.policies.fastkv_ada import FastKVAda as FastKVAda
from fastkv.cache.policies.claa import CLAA as CLAA
from fastkv.cache.policies.full import FullKV as FullKV
from fastkv.cache.policies.snapkv import SnapKV as SnapKV
from fastkv.cache.policies.pyramidkv import PyramidKV as PyramidKV
from fastkv.cache.policies.adakv import AdaKV as AdaKV
from fastkv.cache.policies.headkv import HeadKV as HeadKV
from fastkv.cache.policies.criticalkv import CriticalKV as CriticalKV
from fastkv.cache.policies.criticaladakv import CriticalAdaKV as CriticalAdaKV
from fastkv.cache.policies.defensivekv import DefensiveKV as DefensiveKV
from fastkv.cache.policies.defensivekv_layer import DefensiveKVLayer as DefensiveKVLayer
from fastkv.cache.policies.restkv import ReSTKV as ReSTKV
from fastkv.cache.policies.tova import TOVA as TOVA
from fastkv.cache.policies.h2o import H2O as H2O
from fastkv.cache.policies.streamingllm import StreamingLLM as StreamingLLM
from fastkv.cache.policies.dbudget import DBudgetKV as DBudgetKV
from fastkv.cache.policies.keydiff import KeyDiff as KeyDiff
from fastkv.cache.policies.compactor import Compactor as Compactor
from fastkv.cache.policies.expected_attention import ExpectedAttention as ExpectedAttention
from fastkv.cache.policies.kvzip import KVzip as KVzip
from fastkv.cache.policies.quest import Quest as Quest
from fastkv.cache.policies.clusterkv import ClusterKV as ClusterKV
from fastkv.cache.policies.rocketkv import RocketKV as RocketKV
from fastkv.cache.policies.sinkrouter import SinkRouter as SinkRouter
from fastkv.cache.policies.gemfilter import GemFilter as GemFilter
from fastkv.cache.policies.pyramidinfer import PyramidInfer as PyramidInfer
from fastkv.cache.policies.structkv import StructKV as StructKV
from fastkv.cache.policies.asl import ASL as ASL

if not TYPE_CHECKING:  # type checkers read the lines above
    __all__ = [name for name, value in list(globals().items()) if isinstance(value, type)]
