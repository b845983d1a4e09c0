"""A short run of the campaign in `fuzz_server`, and that it finds what it looks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from furiosa_llm.runtime.errors import ContextLengthError, SamplingParamsError
from furiosa_llm.server.errors import ApiError, api_error
from tests.campaigns import fuzz_server
from tests.campaigns.schemathesis_hooks import BETWEEN_FIELDS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzzed")
    fuzz_server.write_artifacts(made)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tools and a key", pytest.param("encoder", marks=pytest.mark.release)])
def test_the_server_keeps_to_its_schema(folder: Path, name: str) -> None:
    result = fuzz_server.try_server(folder, name, seconds=None, seed=0)
    assert result.finding is None, result.finding
    assert result.requests > 300


@pytest.mark.parametrize(
    ("error", "known"),
    [
        (ContextLengthError("This model's maximum context length is 4 tokens"), True),
        (SamplingParamsError("n must be at most 128, got 200."), False),
        (SamplingParamsError("top_p must be in [0, 1], got 2."), False),
        (SamplingParamsError("structured_outputs: found nothing, expected one of json, regex."), False),
        (SamplingParamsError("structured_outputs.choice must not be empty; leave it out to allow any text."), False),
        (SamplingParamsError("structured_outputs.choice cannot be compiled: it is large"), False),
        (SamplingParamsError("structured_outputs.regex cannot be compiled: look-around"), True),
        (SamplingParamsError('tools.3.function.parameters cannot be compiled: Unimplemented keys: ["not"]'), True),
        (ApiError(400, "response_format: type 'json_schema' and the field json_schema go together"), False),
    ],
)
def test_what_the_schema_can_say_is_no_excuse(error: Any, known: bool) -> None:
    assert bool(BETWEEN_FIELDS.search(api_error(error).info.message)) is known
