"""Adapters while a model runs: loaded, chosen by requests, and given to steps."""
