"""The artifact's program made ready to run: segments, stages, lanes, the serving graph."""
