"""A static checker of artifacts: it proves from program and manifest alone that the ranks compute one unsplit model."""

from furiosa_llm.builder.proof.checker import check_program, constants_of, prove
from furiosa_llm.builder.proof.placement import Fault, ProofReport

__all__ = ["Fault", "ProofReport", "check_program", "constants_of", "prove"]
