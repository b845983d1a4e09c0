"""ONNX IR-11 multi-device annotations: a plan written into a model, read from one, and checked."""

from furiosa_llm.builder.plan.annotations.check import check_sharding, is_annotated
from furiosa_llm.builder.plan.annotations.emit import annotate, write_annotated
from furiosa_llm.builder.plan.annotations.finding import Finding
from furiosa_llm.builder.plan.annotations.read import constraints_of, read_constraints

__all__ = [
    "Finding",
    "annotate",
    "check_sharding",
    "constraints_of",
    "is_annotated",
    "read_constraints",
    "write_annotated",
]
