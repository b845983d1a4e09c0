"""Shards, files and manifest, in a folder that appears whole or not at all."""
