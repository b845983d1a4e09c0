"""Faults to seed in a produced artifact: what a bug of the lowering, of the writer or of a disk might do to it.

Every kind gives one altered artifact for each place where it can be made. The manifest is altered along with the
program wherever a bug in the lowering would have done so: the fault must be found by what the program computes.
"""

from tests.support.builder import fault_collectives, fault_nodes, fault_ranks, fault_weights
from tests.support.builder.fault_subject import KINDS, Kind, Subject
from tests.support.builder.fault_weights import relaid, split_weights

GENERATORS = (fault_collectives, fault_nodes, fault_ranks, fault_weights)
"""The modules that fill the register of kinds."""

__all__ = ["GENERATORS", "KINDS", "Kind", "Subject", "relaid", "split_weights"]
