"""That the model of the clients' programs says what it is to say; the programs themselves run by `make clients`."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from furiosa_llm import LLM, SamplingParams, StructuredOutputsParams
from furiosa_llm.runtime.requests import request
from tests.clients.__main__ import CLIENTS
from tests.support.artifacts import ROOT, artifact_of
from tests.support.server.scripted import REFUSED, scripted


def test_a_script_is_said_where_it_is_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    artifact = artifact_of("tiny-llama-optimum")
    sampler = scripted(tmp_path, Tokenizer.from_file(str(artifact / "tokenizer.json")))
    monkeypatch.setattr(request, "Sampler", sampler)
    digits = SamplingParams(max_tokens=9, structured_outputs=StructuredOutputsParams(regex="[0-9]{3}"))
    with LLM.load_artifact(artifact) as llm:
        greedy = SamplingParams(temperature=0.0, max_tokens=9)
        unscripted = llm.generate("x", greedy).outputs[0].text
        for name, text in (("a.txt", "Hello,\nworld"), ("b.txt", "123"), ("c.txt", "12x")):
            (tmp_path / name).write_text(text)
        said = llm.generate("x", SamplingParams(max_tokens=99, temperature=1.0)).outputs[0]
        assert (said.text, said.finish_reason) == ("Hello,\nworld", "stop")
        assert llm.generate("x", digits).outputs[0].text == "123"
        assert llm.generate("x", digits).outputs[0].text != "12x"
        assert [path.name for path in tmp_path.iterdir()] == [REFUSED]
        assert (tmp_path / REFUSED).read_text() == "'12x': not allowed behind '12'\n"
        assert llm.generate("x", greedy).outputs[0].text == unscripted


def test_the_guide_has_the_versions_that_are_tried() -> None:
    guide = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.]+) \|", guide, re.MULTILINE)
    packages = [package for client in CLIENTS for package in (*client.packages, *client.folders)]
    tried = [re.fullmatch(r"([\w-]+)(?:\[.*\])?==([\d.]+)", package) for package in packages]
    beside = {"aiohttp"}
    assert set(rows) == {match.groups() for match in tried if match is not None and match[1] not in beside}
    for code in re.findall(r"^```python\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
        ast.parse(code)
