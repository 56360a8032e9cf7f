"""Triton kernels and their launchers, one file an op; imported as ``qformer_fast.kernels``."""

from qformer_fast.kernels.bias_gelu import bias_gelu_bwd, bias_gelu_fwd

__all__ = ["bias_gelu_bwd", "bias_gelu_fwd"]
