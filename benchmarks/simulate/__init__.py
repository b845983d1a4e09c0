"""Predictions of `furiosa-llm simulate` against published measurements."""
