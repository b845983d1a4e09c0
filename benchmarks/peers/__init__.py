"""This project beside its peers, on one model and the same cores: `python -m benchmarks.peers --help`."""
