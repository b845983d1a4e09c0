"""Bars of speed, memory and parity: `python -m benchmarks` prints every figure, and fails if a bar is missed."""
