"""State space models: recurrences with a state of constant size, and the layers made of them."""

from llmlib.ssm.decode import causal_conv, state_update
from llmlib.ssm.duality import ssd, ssd_matrix, ssd_quadratic, ssd_recurrent
from llmlib.ssm.layers import GatedRMSNorm, Mamba, Mamba2, StateSpaceMixer
from llmlib.ssm.scan import associative_scan, selective_scan, selective_scan_matrix, selective_scan_parallel

__all__ = [
    "GatedRMSNorm",
    "Mamba",
    "Mamba2",
    "StateSpaceMixer",
    "associative_scan",
    "causal_conv",
    "selective_scan",
    "selective_scan_matrix",
    "selective_scan_parallel",
    "ssd",
    "ssd_matrix",
    "ssd_quadratic",
    "ssd_recurrent",
    "state_update",
]
