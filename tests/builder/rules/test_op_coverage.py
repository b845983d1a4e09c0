"""Every op that onnxruntime and ONNX define has a rule, is replicated on purpose, is refused, or is listed here."""

from __future__ import annotations

import onnx
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from furiosa_llm.builder.errors import UnsupportedModelError
from furiosa_llm.builder.rewrite.decompose import DECOMPOSITIONS
from furiosa_llm.builder.rules import OPS
from furiosa_llm.builder.rules.view import MICROSOFT
from tests.support.builder.graphs import model
from tests.support.builder.plans import prepare_proto

NOT_IN_A_TENSOR_GRAPH = """
    Constant If Identity Loop Scan Optional OptionalGetElement OptionalHasElement ConcatFromSequence SequenceAt
    SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SplitToSequence
"""
"""Normalisation replaces or refuses them: constants, aliases, branches, sequences and optionals."""

DRAWS_RANDOM_NUMBERS = (
    "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike Sampling SampleOp"
)
OF_TEXT = """
    RegexFullMatch StringConcat StringNormalizer StringSplit TfIdfVectorizer Tokenizer WordConvEmbedding
    NGramRepeatBlock MurmurHash3 NGramHashMapping VarlenNGramHashMapping
"""
OF_TRAINING = """
    NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss BiasDropout BitmaskBiasDropout BitmaskDropout IsAllFinite
"""
SIZES_FROM_DATA = "NonMaxSuppression Unique ImageDecoder GatherPacked"
"""Their outputs' sizes follow from what the inputs hold, so that no program of known shapes can have them."""
SEARCHES = "BeamSearch GreedySearch WhisperBeamSearch"
"""They hold the whole model as a subgraph: normalisation refuses them with the remedy."""
NO_TRANSFORMER = """
    AttnLSTM BifurcationDetector CDist ConvTransposeWithDynamicPads CropAndResize Det DynamicQuantizeLSTM
    DynamicTimeWarping GridSample Inverse MatMulFpQ4 MatMulInteger16 MaxpoolWithMask NhwcMaxPool
    QEmbedLayerNormalization QLinearAveragePool QLinearConv QLinearGlobalAveragePool Range SparseToDenseMatMul
    UnfoldTensor VarlenCausalConvWithState
"""
"""No exporter of a transformer writes them; a model that has one is refused as unknown, or the op is replicated."""

LISTED = {
    name
    for text in (
        NOT_IN_A_TENSOR_GRAPH,
        DRAWS_RANDOM_NUMBERS,
        OF_TEXT,
        OF_TRAINING,
        SIZES_FROM_DATA,
        SEARCHES,
        NO_TRANSFORMER,
    )
    for name in text.split()
}


REMEDIES = {op_type: op.remedy for (domain, op_type), op in OPS.items() if domain == MICROSOFT and op.remedy}


def with_a_cpu_kernel() -> set[tuple[str, str]]:
    return {(k.domain, k.op_name) for k in ort.get_all_opkernel_def() if k.provider == "CPUExecutionProvider"}


def test_every_op_of_onnx_is_accounted_for() -> None:
    ops = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    ruled = {op for domain, op in OPS if domain == ""}
    assert ops - ruled - LISTED == set()


def test_every_op_of_onnxruntime_is_accounted_for() -> None:
    ops = {schema.name for schema in ort.get_all_operator_schema() if schema.domain == MICROSOFT}
    ruled = {op for domain, op in OPS if domain == MICROSOFT}
    assert ops - ruled - LISTED - DECOMPOSITIONS.keys() == set()


def test_what_is_refused_has_no_kernel_and_what_is_split_has() -> None:
    """An op that gets a kernel in a later onnxruntime is to get a rule."""
    kernels = with_a_cpu_kernel()
    assert {op for op in REMEDIES if (MICROSOFT, op) in kernels} == set()
    assert {op for domain, op in OPS if domain == MICROSOFT and (domain, op) not in kernels} == REMEDIES.keys()


@pytest.mark.parametrize("op", REMEDIES)
def test_an_op_without_a_kernel_is_refused_with_the_remedy(op: str) -> None:
    proto = model("float[4, 6] past_x", "float[4, 6] y", f"y = com.microsoft.{op}(past_x)")
    with pytest.raises(UnsupportedModelError, match=f"{op} .* has no CPU kernel .*; {(REMEDIES[op] or '')[:20]}"):
        prepare_proto(proto)


def test_an_op_that_is_replicated_on_purpose_says_why() -> None:
    nodes = "h, last = GRU<hidden_size=5>(past_x, w, r) y = Squeeze(h, one)"
    weights = {
        "w": (1, 15, 6),
        "r": (1, 15, 5),
        "one": onnx.numpy_helper.to_array(onnx.helper.make_tensor("", 7, [1], [1])),
    }
    prepared = prepare_proto(model("float[4, 2, 6] past_x", "float[4, 2, 5] y", nodes, weights))
    notes = [info.rule.note for info in prepared.analysis.nodes if info.rule.note]
    assert notes == [f"GRU is replicated: {OPS['', 'GRU'].replicated}"]
