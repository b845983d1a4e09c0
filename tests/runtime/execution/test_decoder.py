"""Stepping a decoder: the same logits as the unsplit model's whole pass, however the tokens are fed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

from furiosa_llm.runtime import Executor, open_artifact
from furiosa_llm.runtime.artifact.layout import Mesh
from furiosa_llm.runtime.artifact.manifest import StateMode
from furiosa_llm.runtime.errors import ExecutionError, InputError, UnsupportedError
from furiosa_llm.runtime.execution.decoder import DecoderSession
from furiosa_llm.runtime.execution.ort import Session, SessionSettings
from furiosa_llm.runtime.verification import reference as reference_module
from furiosa_llm.runtime.verification.reference import ReferenceModel
from tests.runtime.execution.test_executor import plain, step_inputs
from tests.support.runtime.models import LlamaSize, llama, mlp

Array = npt.NDArray[Any]
SIZE = LlamaSize(max_length=1024)
ONE = Mesh((1,))
MODES: tuple[StateMode, ...] = ("in_place", "append")


def reference(folder: Path, mode: StateMode) -> ReferenceModel:
    whole = llama(ONE, SIZE, mode)
    onnx.save(whole.model(), folder / "model.onnx")
    return ReferenceModel(
        folder / "model.onnx", inputs=whole.inputs, outputs=whole.outputs, states=whole.states, threads=1
    )


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> StateMode:
    chosen: StateMode = request.param
    return chosen


@pytest.fixture(params=["artifact", "reference"])
def model(request: pytest.FixtureRequest, mode: StateMode, tmp_path: Path) -> Iterator[Executor | ReferenceModel]:
    if request.param == "reference":
        yield reference(tmp_path, mode)
        return
    with Executor(open_artifact(llama(Mesh((2, 2)), SIZE, mode).write(tmp_path / "a")), threads=2) as executor:
        yield executor


def whole_pass(token_ids: Array) -> Array:
    """The logits behind every token, from one pass of plain onnxruntime."""
    return plain(llama(ONE, SIZE).model(), step_inputs(SIZE, token_ids))["logits"]


def tokens(batch: int, length: int) -> Array:
    return np.random.default_rng(7).integers(0, SIZE.vocab, (batch, length))


def test_steps_give_the_logits_of_one_pass(model: Executor | ReferenceModel) -> None:
    token_ids = tokens(1, 300)
    expected = whole_pass(token_ids)[0]
    session = DecoderSession(model)
    for _ in range(2):
        np.testing.assert_allclose(session.step(token_ids[:, :9])[0], expected[8], atol=1e-4)
        np.testing.assert_allclose(session.step(token_ids[:, 9:14])[0], expected[13], atol=1e-4)
        for position in range(14, 300):
            logits = session.step(token_ids[:, position : position + 1])
            np.testing.assert_allclose(logits[0], expected[position], atol=1e-4)
        assert session.length == 300
        session.reset()
        session.reserve(600)


def test_a_batch_of_equal_lengths(model: Executor | ReferenceModel) -> None:
    token_ids = tokens(3, 20)
    expected = whole_pass(token_ids)
    session = DecoderSession(model)
    np.testing.assert_allclose(session.step(token_ids[:1, :4])[0], expected[0, 3], atol=1e-4)
    session.reset()
    np.testing.assert_allclose(session.step(token_ids[:, :15]), expected[:, 14], atol=1e-4)
    for position in range(15, 20):
        np.testing.assert_allclose(
            session.step(token_ids[:, position : position + 1]), expected[:, position], atol=1e-4
        )


def test_sessions_on_one_executor_do_not_mix(mode: StateMode, tmp_path: Path) -> None:
    token_ids = tokens(2, 12)
    expected = whole_pass(token_ids)
    with Executor(open_artifact(llama(Mesh((2,)), SIZE, mode).write(tmp_path)), threads=2) as executor:
        sessions = [DecoderSession(executor) for _ in range(2)]
        for position in range(12):
            for row, session in enumerate(sessions):
                logits = session.step(token_ids[row : row + 1, position : position + 1])
                np.testing.assert_allclose(logits[0], expected[row, position], atol=1e-4)


def test_a_step_binds_nothing_new_in_place(tmp_path: Path) -> None:
    with Executor(open_artifact(llama(Mesh((2,)), SIZE).write(tmp_path)), threads=1) as executor:
        session = DecoderSession(executor)
        session.step(tokens(1, 4))
        first = session.step(tokens(1, 1))
        assert session.step(tokens(1, 1)).ctypes.data == first.ctypes.data


def test_threads_do_not_change_a_bit(mode: StateMode, tmp_path: Path) -> None:
    artifact = open_artifact(llama(Mesh((2, 2, 2)), SIZE, mode).write(tmp_path))
    results = []
    for threads in (1, 2, 4):
        with Executor(artifact, threads=threads) as executor:
            session = DecoderSession(executor)
            logits = [session.step(tokens(1, 6)).copy()]
            logits.extend(session.step(tokens(1, 1)).copy() for _ in range(4))
        results.append(np.concatenate(logits))
    assert all(np.array_equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize(
    ("token_ids", "message"),
    [
        (np.zeros((1, 0), dtype=np.int64), r"token ids: found int64 \[1, 0\], expected integers \[batch, sequence\]"),
        (np.zeros(3, dtype=np.int64), r"found int64 \[3\]"),
        (np.zeros((1, 2)), r"found float64 \[1, 2\]"),
        (np.zeros((2, 1), dtype=np.int64), "found 2 sequences in a batch of 1; reset before changing"),
        (np.zeros((1, 8), dtype=np.int64), "11 tokens pass the model's limit of 10; reset, or use fewer tokens"),
    ],
)
def test_wrong_tokens_are_refused(token_ids: Array, message: str, tmp_path: Path) -> None:
    session = DecoderSession(reference(tmp_path, "in_place"), max_length=10)
    session.step(tokens(1, 3))
    with pytest.raises(InputError, match=message):
        session.step(token_ids)


def test_a_failed_step_can_be_repeated(mode: StateMode, tmp_path: Path) -> None:
    token_ids = tokens(1, 6)
    expected = whole_pass(token_ids)[0]
    with Executor(open_artifact(llama(Mesh((2,)), SIZE, mode).write(tmp_path)), threads=2) as executor:
        session = DecoderSession(executor)
        session.step(token_ids[:, :4])
        for _ in range(2):
            with pytest.raises(ExecutionError, match="segment 0 failed on rank"):
                session.step(np.full((1, 1), 10**6))
        np.testing.assert_allclose(session.step(token_ids[:, 4:5])[0], expected[4], atol=1e-4)
        np.testing.assert_allclose(session.step(token_ids[:, 5:6])[0], expected[5], atol=1e-4)


def test_a_model_that_is_no_decoder(tmp_path: Path) -> None:
    with (
        Executor(open_artifact(mlp(Mesh((2,))).write(tmp_path)), threads=1) as executor,
        pytest.raises(UnsupportedError, match="the model is not a decoder: it has no input for token ids"),
    ):
        DecoderSession(executor)


def test_an_input_that_tokens_do_not_give(tmp_path: Path) -> None:
    artifact = open_artifact(llama(Mesh((2,)), SIZE).write(tmp_path))
    inputs = list(artifact.manifest.inputs)
    inputs[1] = replace(inputs[1], role="other")
    manifest = replace(artifact.manifest, inputs=tuple(inputs))
    with Executor(replace(artifact, manifest=manifest), threads=1) as executor:
        session = DecoderSession(executor)
        with pytest.raises(UnsupportedError, match="input 'attention_mask' of role 'other' and shape"):
            session.step(tokens(1, 2))


def test_states_that_a_session_cannot_keep(tmp_path: Path) -> None:
    artifact = open_artifact(llama(Mesh((2,)), SIZE).write(tmp_path))
    with Executor(artifact, threads=1) as executor:
        whole = executor.decoder_interface
        unpaired = replace(whole, states=whole.states[1:])
        strange = replace(whole, state_shapes={**whole.state_shapes, "past.0.key": ("batch", 8, "window", 16)})
        for interface, message in (
            (unpaired, r"state 'past\.0\.key' is not made by the model itself"),
            (strange, r"state 'past\.0\.key' has the shape \['batch', 8, 'window', 16\]"),
        ):
            with pytest.raises(UnsupportedError, match=message):
                DecoderSession(_Described(executor, interface))


class _Described:
    """A decoder that describes itself otherwise than it is."""

    def __init__(self, executor: Executor, interface: Any) -> None:
        self.decoder_interface = interface
        self.bind_steps = executor.bind_steps
        self.step = executor.step


def test_a_reference_transposes_its_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime would transpose one above its limit in every step: as a measure it would be slower than it is."""
    made: list[SessionSettings] = []

    def session(*arguments: Any) -> Session:
        made.append(arguments[-1])
        return Session(*arguments)

    monkeypatch.setattr(reference_module, "Session", session)
    program = llama(ONE, replace(SIZE, vocab=8192))
    onnx.save(program.model(), tmp_path / "wide.onnx")
    ReferenceModel(tmp_path / "wide.onnx", inputs=program.inputs, outputs=program.outputs, states=program.states)
    assert [settings.folded_nbytes for settings in made] == [4 * 8192 * SIZE.hidden]


def test_a_reference_that_is_another_model(tmp_path: Path) -> None:
    whole = llama(ONE, SIZE)
    description: dict[str, Any] = {"inputs": whole.inputs, "outputs": whole.outputs, "states": whole.states}
    with pytest.raises(InputError, match="cannot be read: No such file or directory; give the model"):
        ReferenceModel(tmp_path / "none.onnx", **description)
    (tmp_path / "bad.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(InputError, match=r"bad\.onnx is not an ONNX model"):
        ReferenceModel(tmp_path / "bad.onnx", **description)
    onnx.save(mlp(ONE).model(), tmp_path / "mlp.onnx")
    with pytest.raises(InputError, match=r"mlp\.onnx has the inputs \['x'\], the artifact \['input_ids'"):
        ReferenceModel(tmp_path / "mlp.onnx", **description)
