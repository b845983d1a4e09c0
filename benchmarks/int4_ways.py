"""Ways to express SmolLM2's Q4_1 blocks on onnxruntime, compared: `python -m benchmarks.int4_ways`.

Q4_1 is w = d*q + m per block of 32, with a real m that MatMulNBits' integer zero points cannot hold. Every way has the
same graph around its products and the same 8-bit embedding and head; each is measured for perplexity on the shipped
excerpt and for the time of one decode step (batch 1, past 128, IOBinding, past and present in one buffer), in rounds
that take the models in random order. Times are medians; ratios are medians of the ratio to float32 within a round,
which a noisy machine moves least.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np
import onnxruntime as ort

from fixtures.perplexity import excerpt_tokens, perplexity
from furiosa_llm.example.llama.genai import write_genai_graph
from furiosa_llm.example.llama.onnx_writer import DATA, MODEL, ModelWriter, write_model_files
from furiosa_llm.example.llama.projection import DenseProjection, Projection
from furiosa_llm.example.smollm2.blocks import BLOCK, Float
from furiosa_llm.example.smollm2.gguf_weights import GgufWeights
from furiosa_llm.example.smollm2.int4 import Bytes, Int4Projection, pack_nibbles
from furiosa_llm.example.smollm2.recipe import ensure, ensure_gguf

PAST = 128
CAPACITY = 256
_REFERENCE = "float32"


class FloatZeroPoints(Int4Projection):
    """Exact: the zero point -m/d as a float32 tensor."""

    def project(self, writer: ModelWriter, scope: str, parts: Sequence[str], x: str) -> str:
        """See `Projection.project`."""
        weight = self.q4_weight(parts)
        step = _nonzero(weight.step)
        quants = np.where(weight.step[..., None] == 0, 0, weight.quants).astype(np.uint8)
        zero_points = -weight.minimum / step
        return _whole_product(self, writer, scope, x, pack_nibbles(quants), step, 4, zero_points)


class RoundedZeroPoints(Int4Projection):
    """Not exact: the zero point -m/d rounded to 0..15."""

    def project(self, writer: ModelWriter, scope: str, parts: Sequence[str], x: str) -> str:
        """See `Projection.project`."""
        weight = self.q4_weight(parts)
        zero_points = np.clip(np.rint(-weight.minimum / _nonzero(weight.step)), 0, 15).astype(np.uint8)
        even = np.pad(zero_points, ((0, 0), (0, zero_points.shape[1] % 2)))
        packed = pack_nibbles(weight.quants)
        return _whole_product(self, writer, scope, x, packed, weight.step, 4, pack_nibbles(even))


class Symmetric(Int4Projection):
    """Not exact: quantised again, symmetric around zero, as an exporter would without zero points."""

    def project(self, writer: ModelWriter, scope: str, parts: Sequence[str], x: str) -> str:
        """See `Projection.project`."""
        weight = self.q4_weight(parts)
        values = weight.step[..., None] * weight.quants + weight.minimum[..., None]
        extreme = np.take_along_axis(values, np.abs(values).argmax(axis=-1)[..., None], axis=-1)[..., 0]
        step = _nonzero((extreme / -8).astype(np.float32))
        quants = np.clip(np.rint(values / step[..., None]) + 8, 0, 15).astype(np.uint8)
        return _whole_product(self, writer, scope, x, pack_nibbles(quants), step, 4, None)


class EightBits(Int4Projection):
    """Nearly exact: 8 bits with a step of d/17 and an integer zero point; no weight is off by more than d/34."""

    def project(self, writer: ModelWriter, scope: str, parts: Sequence[str], x: str) -> str:
        """See `Projection.project`."""
        weight = self.q4_weight(parts)
        step = (_nonzero(weight.step) / np.float32(17)).astype(np.float32)
        zero_points = np.clip(np.rint(-weight.minimum / step), 0, 255).astype(np.uint8)
        return _whole_product(self, writer, scope, x, weight.quants * np.uint8(17), step, 8, zero_points)


class BlockSumsByMatMul(Int4Projection):
    """Exact: as shipped, but each block's inputs are summed by a product with a matrix of zeros and ones."""

    def __init__(self, source: GgufWeights, accuracy_level: int = 4) -> None:
        super().__init__(source, accuracy_level)
        self._indicators: dict[int, str] = {}

    def write_block_sums(self, writer: ModelWriter, x: str, blocks: int) -> str:
        """See `Int4Projection.write_block_sums`."""
        if blocks not in self._indicators:
            ones = np.repeat(np.eye(blocks, dtype=np.float32), BLOCK, axis=0)
            self._indicators[blocks] = writer.initializer(f"block_indicator_{blocks}", ones)
        path = x.removesuffix("/output_0") + "/block_sums/MatMul"
        return writer.node("MatMul", [x, self._indicators[blocks]], [f"{path}/output_0"], name=path)


WAYS: dict[str, type[Int4Projection]] = {
    "block sums, Reshape + ReduceSum (shipped)": Int4Projection,
    "block sums, MatMul": BlockSumsByMatMul,
    "float zero points": FloatZeroPoints,
    "rounded integer zero points": RoundedZeroPoints,
    "quantised again, symmetric": Symmetric,
    "8 bits, integer zero points": EightBits,
}


@dataclass(slots=True, kw_only=True)
class Candidate:
    """One model under measurement."""

    name: str
    nbytes: int
    perplexity: float
    step: Callable[[], None]
    wall_ms: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)

    def measure(self, steps: int) -> None:
        """Adds the mean wall and processor time of `steps` steps."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.step()
        self.wall_ms.append((time.perf_counter() - wall) / steps * 1e3)
        self.cpu_ms.append((time.process_time() - cpu) / steps * 1e3)


def _nonzero(step: Float) -> Float:
    return np.where(step == 0, np.float32(1), step)


def _whole_product(
    projection: Int4Projection,
    writer: ModelWriter,
    scope: str,
    x: str,
    packed: Bytes,
    scales: Float,
    bits: int,
    zero_points: Bytes | Float | None,
) -> str:
    output = f"{scope}/MatMul/output_0"
    return projection.matmul_nbits(
        writer, scope, x, packed=packed, scales=scales, output=output, bits=bits, zero_points=zero_points
    )


def _candidate(name: str, source: GgufWeights, projection: Projection, folder: Path, threads: int) -> Candidate:
    """Writes the model into `folder`, loads it, and measures its perplexity."""
    folder.mkdir()
    write_model_files(folder, lambda writer: write_genai_graph(writer, source, projection))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(folder / MODEL, options, providers=["CPUExecutionProvider"])
    shape = (1, source.config.num_key_value_heads, 0, source.config.head_dim)
    past = {value.name: np.zeros(shape, np.float32) for value in session.get_inputs() if "past" in value.name}
    tokens = excerpt_tokens(ensure("int4") / "tokenizer.json")
    (logits,) = session.run(["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **past})
    nbytes = (folder / DATA).stat().st_size
    return Candidate(
        name=name, nbytes=nbytes, perplexity=perplexity(logits, tokens), step=_decode_step(session, source)
    )


def _decode_step(session: ort.InferenceSession, source: GgufWeights) -> Callable[[], None]:
    """A function that decodes one token after `PAST`; everything is bound once and the caches are updated in place."""
    config = source.config
    binding = session.io_binding()
    random = np.random.default_rng(0)
    shape = (1, config.num_key_value_heads, CAPACITY, config.head_dim)
    values = {
        "input_ids": np.array([[504]], dtype=np.int64),
        "attention_mask": np.ones((1, PAST + 1), dtype=np.int64),
    }
    held = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
    for layer in range(config.num_hidden_layers):
        for part in ("key", "value"):
            cache = ort.OrtValue.ortvalue_from_numpy(random.standard_normal(shape, dtype=np.float32))
            held[f"past_key_values.{layer}.{part}"] = cache
            binding.bind_ortvalue_output(f"present.{layer}.{part}", cache)
    for name, value in held.items():
        binding.bind_ortvalue_input(name, value)
    logits = ort.OrtValue.ortvalue_from_numpy(np.zeros((1, 1, config.vocab_size), dtype=np.float32))
    binding.bind_ortvalue_output("logits", logits)

    def step(_buffers: object = (held, logits)) -> None:  # the binding does not keep its buffers alive
        session.run_with_iobinding(binding)

    return step


def _print_table(candidates: Sequence[Candidate]) -> None:
    reference = candidates[0]
    click.echo("| way | data, MB | perplexity | wall, ms | CPU, ms | wall / float32 | CPU / float32 |")
    click.echo("|---|---|---|---|---|---|---|")
    for candidate in candidates:
        wall, cpu = np.array(candidate.wall_ms), np.array(candidate.cpu_ms)
        ratios = [np.median(wall / np.array(reference.wall_ms)), np.median(cpu / np.array(reference.cpu_ms))]
        figures = f"{np.median(wall):.1f} | {np.median(cpu):.1f} | {ratios[0]:.2f} | {ratios[1]:.2f}"
        click.echo(f"| {candidate.name} | {candidate.nbytes / 1e6:.0f} | {candidate.perplexity:.3f} | {figures} |")


@click.command()
@click.option("--threads", default=2, show_default=True, help="Intra-op threads of each session.")
@click.option("--accuracy-level", type=click.Choice(["4", "0"]), default="4", show_default=True)
@click.option("--rounds", default=40, show_default=True, help="Rounds; each measures every model once.")
@click.option("--steps", default=4, show_default=True, help="Decode steps of one model per round.")
def main(threads: int, accuracy_level: str, rounds: int, steps: int) -> None:
    """Measure every way against float32 and print a table."""
    source = GgufWeights(ensure_gguf())
    projections: dict[str, Projection] = {_REFERENCE: DenseProjection(source)}
    projections |= {name: way(source, int(accuracy_level)) for name, way in WAYS.items()}
    with tempfile.TemporaryDirectory() as work:
        candidates = [
            _candidate(name, source, projection, Path(work) / str(index), threads)
            for index, (name, projection) in enumerate(projections.items())
        ]
    for candidate in candidates:
        candidate.step()
    order = np.random.default_rng(0)
    for _ in range(rounds):
        for index in order.permutation(len(candidates)):
            candidates[index].measure(steps)
    click.echo(
        f"{threads} threads, accuracy_level {accuracy_level}, batch 1, past {PAST}, {rounds} rounds of {steps}\n"
    )
    _print_table(candidates)


if __name__ == "__main__":
    main(prog_name="python -m benchmarks.int4_ways")
