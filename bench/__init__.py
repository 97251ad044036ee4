"""Benchmarks of flatmtl: ``make bench`` on a CPU, ``bench/gpu.sh`` on a CUDA machine."""
