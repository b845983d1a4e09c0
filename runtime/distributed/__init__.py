"""Stages on other hosts: what they and their head say to each other, a stage behind a socket, and a runner of such."""
