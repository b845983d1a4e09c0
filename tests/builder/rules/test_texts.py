"""Every rule's text, on one small model or more."""

import pytest

from furiosa_llm.builder.rules import OPS
from tests.support.builder.op_case import OpCase
from tests.support.builder.op_cases import CASES
from tests.support.builder.plans import prepare_proto


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_text(case: OpCase) -> None:
    domain, _, op_type = case.op.rpartition(".")
    nodes = prepare_proto(case.model()).analysis.nodes
    texts = [info.rule.text for info in nodes if (info.node.domain, info.node.op_type) == (domain, op_type)]
    assert texts[-1] == case.text


def test_every_rule_has_a_case() -> None:
    covered = {case.op for case in CASES}
    ruled = {f"{domain}.{op_type}".lstrip(".") for (domain, op_type), op in OPS.items() if op.rule is not None}
    assert ruled - covered == set()
