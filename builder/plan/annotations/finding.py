"""What the checker of annotations reports."""

from __future__ import annotations

import dataclasses
from typing import Literal

Severity = Literal["error", "warning"]
"""`error`: the annotations contradict the standard, the model or each other; `warning`: they mean something that is
probably not meant, that the standard leaves to the backend, or that cannot be checked."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong with a model's annotations."""

    severity: Severity
    node: str
    """The node, as operator and name; empty if it concerns the model."""
    tensor: str
    """The tensor's name; empty if it concerns the whole node."""
    what: str
    """What was found, and what was expected."""
    remedy: str
    """What to do."""


def error(node: str, tensor: str, what: str, remedy: str) -> Finding:
    """A finding of severity error."""
    return Finding(severity="error", node=node, tensor=tensor, what=what, remedy=remedy)


def warning(node: str, tensor: str, what: str, remedy: str) -> Finding:
    """A finding of severity warning."""
    return Finding(severity="warning", node=node, tensor=tensor, what=what, remedy=remedy)
