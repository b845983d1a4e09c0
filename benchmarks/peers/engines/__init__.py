"""One file for each engine that is compared: a program that `benchmarks.peers.worker` starts as a process."""
