"""Measurements on a CUDA device; ``bench/gpu.sh`` runs them. docs/gpu.md says how to read them."""
