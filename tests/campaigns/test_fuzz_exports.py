"""A share of the export fuzz, and one export of each kind that the builder once had wrong."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import onnx
import pytest

from furiosa_llm.builder import ArtifactBuilder
from furiosa_llm.runtime.artifact.reader import open_artifact
from furiosa_llm.runtime.execution.executor import Executor
from tests.campaigns.fuzz_exports import FINE, REWRITES, campaign, original, passes, rewritten, tried
from tests.support.builder.parity import Case
from tests.support.exports import BASES

NAMED = {rewrite.__name__: rewrite for rewrite in REWRITES}
GENAI, PLAIN, GPT2 = "tiny-llama-genai-fp32/model.onnx", "bsnh", "gpt2_past"
HYBRID, MIXTURE, MOBIUS = "genai-qwen35", "tiny-mixtral-dynamo-tf5/model.onnx", "mobius-llama"
ROWS = {
    "weights that are Constant nodes, stored in parts": (GENAI, 4, "constant_nodes"),
    "a lookup by rows that are copies": (GPT2, 4, "position_vector"),
    "caches written behind a number of positions": (GPT2, 4, "written"),
    "caches written by slices, whose heads only a product shows": (PLAIN, 4, "layout written"),
    "one position a step behind a past": (PLAIN, 2, "one_position"),
    "embeddings of one position": (PLAIN, 2, "embeddings one_position"),
    "the size of a head behind a change of form": (GENAI, 2, "unit_dimension"),
    "heads inside the last dimension": (PLAIN, 4, "layout"),
    "the batch behind the sequence": (GPT2, 2, "time_first"),
    "the batch behind the sequence, by an attention op alone": (GENAI, 2, "time_first"),
    "a total that only the growth of states tells from a past": (GENAI, 2, "no_mask symbols"),
    "stacks of caches that are written": (GENAI, 2, "stacked written"),
    "scores of the last position over written caches": (PLAIN, 2, "written last_scores"),
    "a batch that an attention op alone tells from a head's vector": (GENAI, 2, "layout symbols"),
    "positions of one row, without symbols": (PLAIN, 2, "position_vector symbols"),
    "embeddings that only a sum ties to positions": (GPT2, 4, "embeddings symbols batch_size names"),
    "a mask of numbers beside recurrent states of one sequence": (
        HYBRID,
        4,
        "batch_size no_positions mask_type embeddings",
    ),
    "tokens as [sequence, batch], which states alone show": (MIXTURE, 2, "position_vector time_first"),
    "tokens as [sequence, batch] beside a mask of each sequence": (PLAIN, 4, "stacked time_first layout"),
    "a stack of caches of flat heads, whose vectors have no size": (GENAI, 2, "stacked flat_heads"),
    "heads beside dimensions of one sequence and one position": (HYBRID, 4, "one_position square_mask batch_size"),
    "one position a step, in front of the batch": (PLAIN, 8, "one_position position_vector time_first"),
    "heads of one position, of which two readings fit until the states": (
        PLAIN,
        2,
        "flat_heads one_position products_as_gemm",
    ),
    "one position a step beside a number that says so": (PLAIN, 4, "no_mask no_positions batch_size one_position"),
    "one position behind a fixed batch, which only its ops tell": (
        MOBIUS,
        4,
        "symbols one_position batch_size square_mask time_first",
    ),
    "heads that one position leaves without sizes": (PLAIN, 4, "products_as_gemm flat_heads one_position"),
}
"""Base, tensor parallel size and rewrites."""
FAST = (
    "weights that are Constant nodes, stored in parts",
    "a lookup by rows that are copies",
    "one position a step behind a past",
    "embeddings that only a sum ties to positions",
    "heads that one position leaves without sizes",
)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in ROWS])
def test_an_export_of_a_kind_that_was_wrong(name: str, tmp_path: Path) -> None:
    base, size, rewrites = ROWS[name]
    chosen = next(one for one in BASES if one.name == base)
    export = rewritten(chosen, [NAMED[word] for word in rewrites.split()], random.Random(1))
    assert export.applied == rewrites.split()
    assert tried(chosen, export, size, tmp_path) == ("same", "")


@pytest.mark.slow
def test_tokens_of_a_batch_behind_a_mask_of_four_dimensions(tmp_path: Path) -> None:
    base = next(one for one in BASES if one.name == MIXTURE)
    export = rewritten(base, [NAMED["square_mask"]], random.Random(1))
    assert tried(base, export, 2, tmp_path, generate=True) == ("same", "")


@pytest.mark.slow
def test_symbols_that_show_the_batch_behind_the_sequence_beside_a_number_of_positions(tmp_path: Path) -> None:
    base = next(one for one in BASES if one.name == "tiny-llama-optimum/model.onnx")
    rewrites = [NAMED[name] for name in ("no_positions", "symbols", "time_first")]
    export = rewritten(base, rewrites, random.Random(5))
    assert tried(base, export, 4, tmp_path) == ("same", "")


@pytest.mark.slow
def test_chunks_of_several_sequences_over_written_caches(tmp_path: Path) -> None:
    """The op takes one; that there is a past only the input shows that holds its length."""
    base = next(one for one in BASES if one.name == GENAI)
    export = rewritten(base, [NAMED["written"]], random.Random(1))
    onnx.save(export.proto(), tmp_path / "model.onnx")
    ArtifactBuilder(tmp_path / "model.onnx").build(tmp_path / "artifact")
    chunk = Case("chunk", 2, 5, 7)
    feeds = export.feeds(original(base).feeds(chunk, 0), chunk)
    with Executor(open_artifact(tmp_path / "artifact"), threads=1) as executor:
        both = executor.run(feeds)["logits"]
        for row in range(2):
            one = {name: a[row : row + 1] if len(a) == 2 else a for name, a in feeds.items()}
            assert np.allclose(executor.run(one)["logits"], both[row : row + 1], atol=1e-5)


@pytest.mark.release
def test_a_few_random_exports() -> None:
    assert [str(result) for result in campaign(12) if result.kind not in FINE] == []


def test_the_bar() -> None:
    assert passes({"same": 97, "refused": 1, "price": 2})
    assert not passes({"same": 96, "refused": 2, "price": 2})
    assert not passes({"same": 97, "price": 3})
    assert not passes({"same": 1999, "wrong": 1})


def test_a_fixed_size_that_is_tried_by_chance_shows_no_role(tmp_path: Path) -> None:
    """All sizes are fixed, to 11 positions in all: so many old ones are what is tried first."""
    base = next(one for one in BASES if one.name == PLAIN)
    export = rewritten(base, [NAMED[word] for word in ("no_mask", "names", "all_sizes")], random.Random(12))
    assert [1] in [[dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in export.proto().graph.input]
    assert tried(base, export, 4, tmp_path) == ("same", "")
