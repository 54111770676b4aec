"""Attention: the op and its twins, the mixers around it, and their caches."""

from llmlib.attention.cache import GrowingCache, Int8Cache, RingCache, cache_bytes, quantise
from llmlib.attention.functional import attention, masked_softmax, visible
from llmlib.attention.layer import Attention, CrossAttention

__all__ = [
    "Attention",
    "CrossAttention",
    "GrowingCache",
    "Int8Cache",
    "RingCache",
    "attention",
    "cache_bytes",
    "masked_softmax",
    "quantise",
    "visible",
]
