"""Answers that keep to a JSON schema, a choice or a pattern: `python examples/structured_output.py ARTIFACT`."""

from __future__ import annotations

import json
import sys
from typing import Any

from furiosa_llm import LLM, SamplingParams, StructuredOutputsParams

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Seoul"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WANTED = [
    StructuredOutputsParams(json=SCHEMA),
    StructuredOutputsParams(choice=["yes", "no"]),
    StructuredOutputsParams(regex="[0-9]{4}-[0-9]{2}"),
]


def main(artifact: str) -> None:
    """Prints an answer of each form."""
    params = [SamplingParams(max_tokens=200, seed=1, structured_outputs=wanted) for wanted in WANTED]
    with LLM.load_artifact(artifact) as llm:
        forecast, choice, month = (output.outputs[0].text for output in llm.generate(["The answer is "] * 3, params))
    print(json.loads(forecast)["city"], choice, month)


if __name__ == "__main__":
    main(*sys.argv[1:])
