"""Attention: the op and its twins, the mixers around it, their caches, and surgery on trained weights."""

from llmlib.attention.cache import GrowingCache, Int8Cache, RingCache, cache_bytes, quantise
from llmlib.attention.convert import max_logits, qk_clip_, to_grouped
from llmlib.attention.flash import FlashAttention
from llmlib.attention.flex import flex
from llmlib.attention.functional import attention, banded, masked_softmax, visible
from llmlib.attention.layer import Attention, CrossAttention
from llmlib.attention.mla import MLA
from llmlib.attention.path import PaTHAttention, path_attention, path_attention_recurrent, path_scores
from llmlib.attention.sparse import (
    DSA,
    NSA,
    MoBA,
    blocks_ended,
    choose,
    compressed_attention,
    index_scores,
    indexer_loss,
    mean_key_scores,
    selected_attention,
)

__all__ = [
    "DSA",
    "MLA",
    "NSA",
    "Attention",
    "CrossAttention",
    "FlashAttention",
    "GrowingCache",
    "Int8Cache",
    "PaTHAttention",
    "MoBA",
    "RingCache",
    "attention",
    "banded",
    "blocks_ended",
    "cache_bytes",
    "choose",
    "compressed_attention",
    "flex",
    "index_scores",
    "indexer_loss",
    "masked_softmax",
    "max_logits",
    "path_attention",
    "path_attention_recurrent",
    "path_scores",
    "mean_key_scores",
    "qk_clip_",
    "quantise",
    "selected_attention",
    "to_grouped",
    "visible",
]
