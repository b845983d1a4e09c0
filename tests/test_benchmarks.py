"""What the benchmarks count with, counted itself."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks import growth, steady, threads
from benchmarks.bars import put_into
from benchmarks.parallelism import Bubbles, greedy_tokens, pipelined_milliseconds
from benchmarks.second_replica import capacity, kv_nbytes
from benchmarks.serving import InstantRunner
from benchmarks.stepping import PAST, Served, alternate, ratio
from furiosa_llm.runtime.artifact.dtypes import Array
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.engine.engine_args import EngineArgs
from furiosa_llm.runtime.engine.launch import load_engine
from furiosa_llm.runtime.execution.driver import Barrier
from furiosa_llm.runtime.execution.states import SlotStates
from furiosa_llm.runtime.placement.stages import choose_stages
from furiosa_llm.runtime.runners.batch import Batch, Decode, Piece, Prefill, Row, WantedLogits
from furiosa_llm.runtime.runners.local_runner import Host
from tests.support.runtime.models import LlamaSize, llama
from tests.support.runtime.runners import VOCAB, CountingRunner

ROOT = Path(__file__).parent.parent
_PROGRAM = """
import mmap, os, sys
from pathlib import Path
from benchmarks.counted import count
source, result, how, times = sys.argv[1:]
def command():
    with (Path(source) / "weights").open("rb", buffering=0) as file:
        if how == "mapped":
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).close()
        for _ in range(int(times)):
            os.pread(file.fileno(), 10**7, 0)
count(command, Path(source), Path(result))
"""


def _counted(tmp_path: Path, how: str, times: int) -> tuple[int, list[str]]:
    source = tmp_path / "source"
    source.mkdir(exist_ok=True)
    (source / "weights").write_bytes(bytes(10**7))
    result = tmp_path / "result"
    arguments = [str(source), str(result), how, str(times)]
    subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], check=True, cwd=ROOT)
    found = json.loads(result.read_text())
    return found["nbytes_read"], found["mapped"]


def prefill(group: int, slot: int, count: int, logits: WantedLogits = "all") -> Prefill:
    tokens = tuple(range(1, count + 1))
    piece = Piece(sequence_id=slot, slot=slot, start=0, tokens=tokens, logits=logits)
    return Prefill(group=group, copies=(), pieces=(piece,))


def decode(group: int, rows: int, start: int) -> Decode:
    made = tuple(Row(sequence_id=slot, start=start, token=1) for slot in range(rows))
    return Decode(group=group, copies=(), rows=made)


class StagedRunner(CountingRunner):
    """Two stages, which are said to run for 3 and for 1 seconds with each decode; a batch is done when it is taken."""

    def __init__(self) -> None:
        super().__init__(num_groups=2)
        self.busy_seconds = [0.0, 0.0]

    def submit(self, batch: Batch) -> Future[Array]:
        future = super().submit(batch)
        future.result()
        if isinstance(batch, Decode):
            self.busy_seconds[0] += 3.0
            self.busy_seconds[1] += 1.0
        return future


@pytest.fixture
def staged() -> Iterator[StagedRunner]:
    runner = StagedRunner()
    yield runner
    runner.close()


def test_every_byte_that_is_read_is_counted(tmp_path: Path) -> None:
    (without, _), (once, _), (twice, mapped) = (_counted(tmp_path, "read", times) for times in range(3))
    assert 0 <= once - without - 10**7 < 10**5
    assert 0 <= twice - without - 2 * 10**7 < 10**5
    assert mapped == []


def test_maps_are_noted(tmp_path: Path) -> None:
    assert _counted(tmp_path, "mapped", 0)[1] == ["weights"]


def test_what_is_stepped(staged: StagedRunner) -> None:
    served = Served(staged, rows=2, group=1)
    served.prefill(3)
    served.decode()
    served.decode()
    served.rewind(3)
    served.decode()
    served.prefill(2)
    served.decode()
    prefills = [prefill(1, slot, 3) for slot in range(2)], [prefill(1, slot, 2) for slot in range(2)]
    decodes = [decode(1, 2, 3), decode(1, 2, 4), decode(1, 2, 3)], [decode(1, 2, 2)]
    assert staged.batches == [*prefills[0], *decodes[0], *prefills[1], *decodes[1]]


def test_a_pipeline_is_measured_while_it_is_full(staged: StagedRunner) -> None:
    bubbles = Bubbles(stages=2)
    milliseconds = pipelined_milliseconds(staged, bubbles)
    steps = {group: [b for b in staged.batches if isinstance(b, Decode) and b.group == group] for group in (0, 1)}
    for group, found in steps.items():
        assert found == [decode(group, 2, PAST + step) for step in range(len(found))]
    assert len(steps[0]) == len(steps[1])
    measured = len(steps[1]) - 2  # one ends before, and one begins at the end
    assert bubbles.wall == pytest.approx(measured * milliseconds / 1e3)
    assert bubbles.busy == 2 * measured * 4


def test_the_share_of_bubbles() -> None:
    assert Bubbles(stages=2, busy=3.0, wall=2.0).share == 0.25


def test_who_goes_first_changes() -> None:
    calls: list[str] = []

    def measure(name: str, milliseconds: float) -> float:
        calls.append(name)
        return milliseconds

    times = alternate({"a": lambda: measure("a", 3.0), "b": lambda: measure("b", 2.0)}, 3)
    assert "".join(calls) == "ab" + "ba" + "ab" + "ba"
    assert times == {"a": [3.0] * 3, "b": [2.0] * 3}


def test_ratios_are_of_a_round() -> None:
    bar = ratio("x", {"a": [1.0, 40.0, 9.0], "b": [1.0, 20.0, 3.0]}, "a", "b", limit=1.5)
    assert bar.figure == 2.0  # of 1, 2 and 3; the ratio of the medians is 3
    assert not bar.kept


def test_greedy_tokens_follow_each_other(staged: StagedRunner) -> None:
    assert greedy_tokens(staged, [4, 5], 3) == [6, 7, 8]
    assert staged.batches[1:] == [
        Decode(group=0, copies=(), rows=(Row(sequence_id=0, start=start, token=token),))
        for start, token in ((2, 6), (3, 7))
    ]


def test_time_between_full_decodes_is_counted() -> None:
    runner = InstantRunner(rows=2, vocabulary=VOCAB)
    full, partial = decode(0, 2, 1), decode(0, 1, 1)
    for batch in (prefill(0, 0, 3, "last"), full, full, full, partial, full, full):
        logits = runner.submit(batch).result()
    assert len(runner.between) == 3
    assert all(seconds > 0 for seconds in runner.between)
    assert logits.shape == (2, VOCAB)
    assert runner.submit(prefill(0, 0, 3, "none")).result().shape == (0, VOCAB)


def test_the_kv_of_a_slot_is_counted(tmp_path: Path) -> None:
    artifact = open_artifact(llama(Mesh((2, 2)), LlamaSize()).write(tmp_path))
    with Host(artifact, choose_stages(artifact), threads=1) as host:
        runner = host.runner(slots_per_group=1)
        Served(runner).prefill(PAST)
        states = runner._groups[0]._memory[0]._states
        runner.close()
    assert isinstance(states, SlotStates)
    assert states.capacity == capacity()
    assert kv_nbytes(artifact.manifest) == sum(buffer.nbytes for buffer in states._buffers.values())


def test_tables_are_put_between_their_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end of a -->\nafter\n")
    put_into(page, "a", "| new |")
    assert page.read_text() == "before\n<!-- a -->\n| new |\n<!-- end of a -->\nafter\n"
    with pytest.raises(ValueError, match="found no <!-- b --> followed by <!-- end of b -->; put the two lines"):
        put_into(page, "b", "")


# -- parts of a step -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processor", [False, True])
def test_the_parts_of_a_step_add_up(tmp_path: Path, processor: bool) -> None:
    folder = llama(Mesh((2, 2)), LlamaSize()).write(tmp_path)
    with closing(load_engine(EngineArgs(folder, threads=2, max_batch_size=2))) as core:
        step = steady.profile(core, [[1, 2], [3, 4]], 12, processor=processor)
    parts = [step.parts[part] for part in (*steady.PARTS, *([steady.BESIDE] if processor else []))]
    assert sum(parts) == pytest.approx(step.total)
    for part in (steady.CALLS, steady.WAITS, steady.SUMS, steady.BINDING, steady.SAMPLING, steady.OWN):
        assert 0 < step.parts[part] < step.total
    assert Barrier.wait.__module__ == "furiosa_llm.runtime.execution.driver"


def test_a_step_that_is_little_of_onnxruntime_misses_its_bar() -> None:
    def of(calls: float, rest: float) -> steady.Step:
        parts = dict.fromkeys([*steady.PARTS, steady.BESIDE], 0.0) | {steady.CALLS: calls, steady.REST: rest}
        return steady.Step(total=10.0, parts=parts)

    steps = {"much": of(9.0, 0.1), "little": of(8.0, 0.3)}
    assert [bar.kept for bar in steady.bars({True: steps})] == [True, True, False, False]
    assert "| onnxruntime | 9.00 (90.0%) | 8.00 (80.0%) |" in steady.table(steps, processor=True).splitlines()


# -- threads -------------------------------------------------------------------------------------------------------


def test_no_spinning_is_compared_with_the_fastest() -> None:
    found = {
        threads.Setting(model=model, cores=2, threads=2, spin_us=spin_us, busy=busy): threads.Took(
            wall=wall * slower, processor=1.0
        )
        for model, slower in (("fast", 1.0), ("slow", 2.0))
        for busy, walls in ((False, (12.0, 11.0, 10.0)), (True, (20.0, 30.0, 25.0)))
        for spin_us, wall in zip((0, 50, 1000), walls, strict=True)
    }
    bars = list(threads.bars(found))
    for model, (alone, beside) in {"fast": bars[:2], "slow": bars[2:]}.items():
        assert (alone.figure, alone.kept, beside.figure, beside.kept) == (1.2, False, 0.8, True)
        assert alone.what == f"{model}, 2 threads alone: no spinning / 1000 us"
    assert threads.table(found).splitlines()[2] == "| fast | 2 | 2 | 0 | 12.0, 1.0 ms | 20.0, 1.0 ms |"


# -- cost growth ---------------------------------------------------------------------------------------------------


def test_an_exponent_is_the_slope_of_logarithms() -> None:
    assert growth.exponent({1: 3.0, 2: 12.0, 8: 192.0}) == pytest.approx(2.0)
    assert growth.exponent({1: 5.0, 4: 5.0}) == pytest.approx(0.0)


@pytest.mark.parametrize(("power", "kept"), [(1.0, True), (1.04, True), (1.06, False), (0.94, False)])
def test_only_linear_factors_have_a_bar(power: float, kept: bool) -> None:
    costs = {value: growth.Cost(decode=2 * value**power, prefill=7.0) for value in (1, 2, 8)}
    assert growth.bar("layers", costs).kept is kept
    assert growth.bar("batch", costs).limit is None
    assert f"decode {power:.3f}, prefill 0.000" in growth.bar("layers", costs).beside


def test_a_constant_is_taken_off() -> None:
    """4 + 2 x has the exponent 1 without the 4, which next to nothing takes too, and less with it."""
    nothing = growth.Cost(decode=4.0, prefill=0.0)
    costs = {value: growth.Cost(decode=4.0 + 2 * value, prefill=3.0 * value) for value in (1, 2, 8)}
    assert not growth.bar("layers", costs).kept
    without = {value: cost.without(nothing) for value, cost in costs.items()}
    assert growth.bar("layers", without).figure == pytest.approx(0.0)
    *_, row = growth.table({"layers": without}).splitlines()
    assert row == "| layers, 1 to 8 | **1.000** | 1 +- 0.05 | 1.000 | 2.0 to 16.0 | 3 to 24 |"


@pytest.mark.slow
def test_the_cost_of_a_small_model_is_measured_and_drawn(tmp_path: Path) -> None:
    """Two stages and replicas, and two prompts in each."""
    case = growth.Case(layers=2, hidden=64, tp=2, pp=2, dp=2, batch=2, tokens=2, warm=0.01)
    (cost,) = growth.measure([case], tmp_path)
    assert cost.decode > 0 < cost.prefill
    growth.plot({"layers": {1: cost, 2: cost}}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
