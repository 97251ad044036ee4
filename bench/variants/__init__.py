"""Kernels that were tried and are not shipped: see README.md."""
