"""Adapters as models of the server: listed, chosen by name, loaded and unloaded while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from furiosa_llm import LLM, EngineArgs, LoRARequest, SamplingParams
from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.cli.main import cli
from furiosa_llm.runtime.artifact.errors import AdapterError
from furiosa_llm.server.model import load_served, open_served
from furiosa_llm.server.settings import ServerSettings
from tests.server.conftest import serving
from tests.support.adapters import saved

MODEL = Path(__file__).parents[2] / "fixtures" / "zoo" / "tiny-llama-optimum" / "model.onnx"
SIZES = {f"model.layers.{layer}.self_attn.q_proj": (64, 64) for layer in (0, 1)}
BODY: dict[str, Any] = {"prompt": [5, 6, 7], "max_tokens": 5, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with the adapter `own`, and others beside it."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("own", "other", "third"), 1):
        saved(folder / name, SIZES, seed=seed)
    saved(folder / "wrong", {"model.layers.0.self_attn.q_proj": (8, 64)})
    ArtifactBuilder(MODEL, name="base", lora={"own": folder / "own"}).build(folder / "artifact")
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    """What each name must answer."""
    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    requests = {"base": None, "own": LoRARequest("own", 1)}
    requests |= {n: LoRARequest(n, i, str(folder / n)) for i, n in enumerate(("other", "third"), 2)}
    with LLM(folder / "artifact", threads=1) as llm:
        found = {
            name: llm.generate(prompt_token_ids=[BODY["prompt"]], sampling_params=params, lora_request=one)[0]
            for name, one in requests.items()
        }
    texts = {name: output.outputs[0].text for name, output in found.items()}
    assert len(set(texts.values())) == 4
    return texts


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    args = EngineArgs(folder / "artifact", threads=1)
    model = load_served(args, *open_served(args), None, 1, [("other", str(folder / "other"))])
    with serving(model, ServerSettings(runtime_lora_updating=True)) as url, httpx.Client(base_url=url) as found:
        yield found


def ask(client: httpx.Client, name: str, **changes: Any) -> httpx.Response:
    return client.post("/v1/completions", json={**BODY, "model": name, **changes})


def test_a_name_chooses_an_adapter(client: httpx.Client, expected: dict[str, str]) -> None:
    names = ["base", "own", "other"] * 3
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: ask(client, name).json(), names))
    assert [answer["choices"][0]["text"] for answer in answers] == [expected[name] for name in names]
    assert [answer["model"] for answer in answers] == names
    chat = {"model": "own", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=chat).json()["model"] == "own"


def test_names_are_listed(client: httpx.Client) -> None:
    cards = client.get("/v1/models").json()["data"]
    assert [(card["id"], card["root"], card["parent"]) for card in cards] == [
        ("base", "base", None),
        ("own", "base", "base"),
        ("other", "base", "base"),
    ]
    assert client.get("/v1/models/own").json()["id"] == "own"
    missing = ask(client, "none")
    assert missing.status_code == 404
    assert "this server has 'base', 'own', 'other'" in missing.json()["error"]["message"]


def test_adapters_come_and_go(client: httpx.Client, folder: Path, expected: dict[str, str]) -> None:
    def change(what: str, **body: str) -> tuple[int, str]:
        answer = client.post(f"/v1/{what}_lora_adapter", json=body)
        return answer.status_code, answer.text

    for name in ("third", "other"):  # the second time another file under the same name
        assert change("load", lora_name="new", lora_path=str(folder / name)) == (
            200,
            "Success: LoRA adapter 'new' added successfully.",
        )
        assert ask(client, "new").json()["choices"][0]["text"] == expected[name]
        status, text = change("load", lora_name="new", lora_path=str(folder / "own"))
        assert (status, "'new' is a name of the server's already" in text) == (400, True)
        assert change("unload", lora_name="new")[0] == 200
        assert ask(client, "new").status_code == 404
    status, text = change("unload", lora_name="new")
    assert (status, "there is no adapter 'new'" in text) == (404, True)
    status, text = change("load", lora_name="bad", lora_path=str(folder / "wrong"))
    assert (status, "has 8 features in, the model 64" in text) == (400, True)
    assert ask(client, "bad").status_code == 404


def test_clients_change_nothing_unless_they_may(folder: Path) -> None:
    args = EngineArgs(folder / "artifact", threads=1)
    model = load_served(args, *open_served(args), None, 1)
    with serving(model, ServerSettings()) as url:
        body = {"lora_name": "new", "lora_path": str(folder / "third")}
        assert httpx.post(f"{url}/v1/load_lora_adapter", json=body).status_code == 404
        schema = httpx.get(f"{url}/openapi.json").json()["components"]["schemas"]
        assert schema["CompletionRequest"]["properties"]["model"]["enum"] == ["base", "own"]


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ([("own", "third")], "'own' is a name of the server's already"),
        ([("base", "third")], "'base' is a name of the server's already"),
        ([("new", "wrong")], "another base model"),
    ],
)
def test_adapters_that_cannot_be_served(modules: list[tuple[str, str]], message: str, folder: Path) -> None:
    args = EngineArgs(folder / "artifact", threads=1)
    given = [(name, str(folder / path)) for name, path in modules]
    with pytest.raises(AdapterError, match=message):
        load_served(args, *open_served(args), None, 1, given)


@pytest.mark.parametrize(("lora", "name"), [("own", "own"), ("a={}/third", "third"), (None, "base")])
def test_generate_takes_one(lora: str | None, name: str, folder: Path) -> None:
    prompt = "hello"
    with LLM(folder / "artifact", threads=1) as llm:
        request = None if name == "base" else LoRARequest(name, 1, "" if name == "own" else str(folder / name))
        params = SamplingParams(max_tokens=4, temperature=0)
        expected = llm.generate(prompt, params, lora_request=request).outputs[0].text
    given = [] if lora is None else ["--lora", lora.format(folder)]
    command = ["generate", str(folder / "artifact"), "--prompt", prompt, "--max-tokens", "4", "--threads", "1", *given]
    assert CliRunner().invoke(cli, command).stdout == expected + "\n"


def test_an_adapter_that_is_unloaded_serves_who_has_it(folder: Path, expected: dict[str, str]) -> None:
    async def ask_and_unload() -> str:
        args = EngineArgs(folder / "artifact", threads=1)
        model = load_served(args, *open_served(args), None, 1)
        engine, text = model.kind.engine, ""  # type: ignore[union-attr]
        params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        request = model.adapters["own"]
        async for output in engine.generate({"prompt_token_ids": BODY["prompt"]}, params, "0", request):
            await engine.remove_lora(request.lora_int_id)
            text = output.outputs[0].text
        model.close()
        return text

    assert asyncio.run(ask_and_unload()) == expected["own"]
