"""Measurements of an artifact: throughput, latency and goodput of requests at once, in turn, or as they arrive."""
