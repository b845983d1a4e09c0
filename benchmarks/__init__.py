"""Speed, memory and parity bars: `python -m benchmarks` prints every figure beside its bar, and fails if one is missed."""
