"""State space models: recurrences with a state of constant size, and the layers made of them."""

from llmlib.ssm.decode import causal_conv, state_update
from llmlib.ssm.duality import ssd, ssd_matrix, ssd_quadratic, ssd_recurrent
from llmlib.ssm.layers import GatedRMSNorm, Mamba, Mamba2, StateSpaceMixer
from llmlib.ssm.linear import (
    FAMILY,
    GatedDeltaNet,
    LinearAttention,
    Member,
    gated_delta_recurrent,
    gated_delta_rule,
    linear_attention,
    linear_attention_quadratic,
    matrix_recurrence,
)
from llmlib.ssm.mamba3 import Mamba3, mamba3_quadratic, mamba3_recurrent, mamba3_scan
from llmlib.ssm.s4d import (
    S4D,
    discretise,
    hippo_legs,
    s4d_convolve,
    s4d_inv,
    s4d_kernel,
    s4d_lin,
    s4d_real,
    s4d_recurrent,
)
from llmlib.ssm.scan import (
    associative_scan,
    associative_scan_work_efficient,
    selective_scan,
    selective_scan_matrix,
    selective_scan_parallel,
)

__all__ = [
    "FAMILY",
    "S4D",
    "GatedDeltaNet",
    "GatedRMSNorm",
    "LinearAttention",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "Member",
    "StateSpaceMixer",
    "associative_scan",
    "associative_scan_work_efficient",
    "causal_conv",
    "discretise",
    "gated_delta_recurrent",
    "gated_delta_rule",
    "hippo_legs",
    "linear_attention",
    "linear_attention_quadratic",
    "mamba3_quadratic",
    "mamba3_recurrent",
    "mamba3_scan",
    "matrix_recurrence",
    "s4d_convolve",
    "s4d_inv",
    "s4d_kernel",
    "s4d_lin",
    "s4d_real",
    "s4d_recurrent",
    "selective_scan",
    "selective_scan_matrix",
    "selective_scan_parallel",
    "ssd",
    "ssd_matrix",
    "ssd_quadratic",
    "ssd_recurrent",
    "state_update",
]
