"""The latencies that a request may be asked to keep below a limit."""

from __future__ import annotations

OBJECTIVES = ("ttft", "tpot", "e2el")
"""What goodput may be asked for: limits of these, in milliseconds."""
