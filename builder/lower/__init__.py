"""The SPMD program of a plan: its nodes, shapes, blocks and memory."""
