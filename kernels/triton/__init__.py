"""Triton kernels and their launchers, one file an op; imported as ``qformer_fast.kernels``."""
