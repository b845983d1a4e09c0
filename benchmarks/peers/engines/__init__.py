"""One file for each engine that is compared: a program that `benchmarks.peers.worker` starts in a process of its own."""
