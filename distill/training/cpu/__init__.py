"""Kernels for training on a CPU."""
