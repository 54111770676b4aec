"""Attention: the op and its twins, the mixers around it, their caches, and surgery on trained weights."""

from llmlib.attention.cache import GrowingCache, Int8Cache, RingCache, cache_bytes, quantise
from llmlib.attention.convert import max_logits, qk_clip_, to_grouped
from llmlib.attention.flash import FlashAttention
from llmlib.attention.flex import flex
from llmlib.attention.functional import attention, banded, masked_softmax, visible
from llmlib.attention.layer import Attention, CrossAttention
from llmlib.attention.mla import MLA
from llmlib.attention.path import PaTHAttention, path_attention, path_attention_recurrent, path_scores

__all__ = [
    "MLA",
    "Attention",
    "CrossAttention",
    "FlashAttention",
    "GrowingCache",
    "Int8Cache",
    "PaTHAttention",
    "RingCache",
    "attention",
    "banded",
    "cache_bytes",
    "flex",
    "masked_softmax",
    "max_logits",
    "path_attention",
    "path_attention_recurrent",
    "path_scores",
    "qk_clip_",
    "quantise",
    "to_grouped",
    "visible",
]
