"""Faults of the builder: rules, padding, planning, lowering, weights, fusion, shapes, and the proof."""

from __future__ import annotations

from tests.seeded_faults.fault import Fault

RULES = (
    Fault(
        name="an activation takes partial sums",
        file="builder/rules/elementwise.py",
        old="replace(broadcast(view), padding=padding)",
        new="replace(broadcast(view), linear=(0,), padding=padding)",
        effect="ranks apply Relu to their parts of a sum before it is added up: wrong outputs",
        hints=("tests/builder/plan/test_sweep.py::test_sums_are_made_where_they_must_be[Relu]",),
    ),
    Fault(
        name="an old softmax over one axis",
        file="builder/rules/reduction.py",
        old="return _along_axis(view, range(_axis(view, 1), view.rank(0)))",
        new="return _along_axis(view, [_axis(view, 1)])",
        effect="models of opset 12 and before normalise each rank's part by itself",
        hints=("tests/builder/rules/test_texts.py::test_text[Softmax opset 11]",),
    ),
    Fault(
        name="a mean of parts is a mean",
        file="builder/rules/reduction.py",
        old="return _reduction(view, summed=exact, average=exact)",
        new="return _reduction(view, summed=exact, average=False)",
        effect="a mean over a split dimension is as many times too large as there are ranks",
        hints=("tests/builder/rules/test_proofs.py::test_a_few_splits_are_right[ReduceMean]",),
    ),
    Fault(
        name="every rank adds the bias",
        file="builder/rules/linear_algebra.py",
        old='masked=(2,) if view.has(2) else (), padding="product"',
        new='padding="product"',
        effect="a Gemm whose contraction is split adds its bias once for each rank",
        hints=("tests/builder/rules/test_proofs.py::test_a_few_splits_are_right[Gemm 00]",),
    ),
    Fault(
        name="a table may be split where it is no table",
        file="builder/rules/indexing.py",
        old='    if not is_table:\n        data[axis] = "*"\n',
        new="",
        effect="Gather takes positions of the whole from a rank's part: wrong rows, or none",
        hints=("tests/builder/rules/test_proofs.py::test_a_few_splits_are_right[Gather]",),
    ),
    Fault(
        name="zeros and numbers make zeros",
        file="builder/rules/padding.py",
        old='case "sum" if len(found) == len(data):',
        new='case "sum" if found:',
        effect="what is added to padding is taken for zero, and contracted: wrong outputs",
        hints=("tests/builder/test_traps.py::test_a_number_added_to_padding_leaves_no_zeros",),
    ),
)

PLANNING = (
    Fault(
        name="collectives may grow with the context",
        file="builder/plan/pricing.py",
        old="self._payload(collective, assignment, self._subject.longer)",
        new="self._payload(collective, assignment, self._subject.decode)",
        effect="a plan exchanges the whole KV cache for every token",
        hints=("tests/builder/plan/test_search.py::test_what_would_grow_with_the_context_is_refused_with_that_reason",),
    ),
    Fault(
        name="scales count as matrices",
        file="builder/plan/pricing.py",
        old=" and value not in beside\n",
        new="\n",
        effect="a collective costs a quantised model too little, so that plans have too many",
        hints=("tests/builder/plan/test_search.py::test_scales_are_no_matrices_of_their_own",),
    ),
    Fault(
        name="dead values are freed too soon",
        file="builder/lower/working_memory.py",
        old="ends.setdefault(last_use.get(name, i), [])",
        new="ends.setdefault(i, [])",
        effect="`plan` does not warn of a step that no PE has memory for",
        hints=("tests/builder/test_model_plan.py::test_activations_are_the_most_that_is_alive",),
    ),
    Fault(
        name="a segment is the first one",
        file="builder/factors/factor.py",
        old="return kids[1 if start else 0]",
        new="return kids[0]",
        effect="a slice of a packed projection is tied to its neighbour's rows",
        hints=("tests/builder/factors/test_factor.py",),
    ),
)

LOWERING = (
    Fault(
        name="the first element is padding",
        file="builder/lower/emit.py",
        old="shards = np.stack([indices >= 0 for",
        new="shards = np.stack([indices > 0 for",
        effect="clearing padding clears element 0 of the dimension with it",
        hints=(
            "tests/builder/test_traps.py::test_padding_that_is_not_a_number_does_no_harm",
            "tests/builder/test_traps.py::test_what_follows_a_short_block_is_cleared",
        ),
    ),
    Fault(
        name="gathered parts in the inverse order",
        file="builder/lower/emit.py",
        old="positions[order[valid]] = valid",
        new="positions[valid] = order[valid]",
        effect="a gathered packed dimension comes out permuted",
        hints=("tests/builder/rules/test_proofs.py::test_a_few_splits_are_right[Conv groups]",),
    ),
    Fault(
        name="targets are aligned from the left",
        file="builder/lower/sizes.py",
        old="i = d - (len(layout) - len(raw))",
        new="i = d",
        effect="an Expand to fewer dimensions than its output has is told a global size for a local one",
        hints=("tests/builder/rules/test_proofs.py::test_a_few_splits_are_right[Expand by fewer sizes]",),
    ),
    Fault(
        name="every part begins at the beginning",
        file="builder/write/shards.py",
        old="np.where(maps[d] < 0, -1, maps[d] + tensor.part.start)",
        new="np.where(maps[d] < 0, -1, maps[d])",
        effect="keys and values of a packed weight get the query's rows",
        hints=("tests/builder/write/test_shards.py::test_shards_of_a_part",),
    ),
    Fault(
        name="the high half of a byte comes first",
        file="builder/write/shards.py",
        old="codes = (data[:, None] >> shifts)",
        new="codes = (data[:, None] >> shifts[::-1])",
        effect="4-bit weights whose shards share bytes are stored with neighbours swapped",
        hints=("tests/builder/write/test_shards.py::test_shards",),
    ),
)

READING = (
    Fault(
        name="shapes are kept for ops of other attributes",
        file="builder/shapes/interpreter.py",
        old="tuple(v is None for v in node.inputs), attributes)",
        new="tuple(v is None for v in node.inputs), ())",
        effect="a Transpose has the shape of an earlier one: models are refused, or split wrongly",
        hints=("tests/builder/test_odd_graphs.py::test_shapes_of_ops_that_differ_in_an_attribute",),
    ),
    Fault(
        name="data may begin at the end of the file",
        file="builder/source/external_data.py",
        old="if start + expected > size:",
        new="if start > size:",
        effect="a model whose weights were copied in part is not refused by name",
        hints=("tests/builder/source/test_external_data.py::test_data_past_the_end",),
    ),
    Fault(
        name="a divisor multiplies the scores",
        file="builder/rewrite/fusion/matching.py",
        old='return 1 / number if node.op_type == "Div" else number',
        new="return number",
        effect="attention that divides by the square root of its size is not fused: slow decoding",
        hints=("tests/builder/rewrite/fusion/test_fuse.py::test_attention_is_fused_and_gives_the_same[division]",),
    ),
    Fault(
        name="a fused cache is not compared",
        file="builder/rewrite/fusion/trial.py",
        old="zip(fused[1:3], original[1:3], strict=True)",
        new="zip(fused[1:2], original[1:2], strict=True)",
        effect="a fused attention that spoils the values' cache passes its proof",
        hints=("tests/builder/rewrite/fusion/test_fuse.py::test_the_proof_compares_both_caches",),
    ),
)

PROOF = (
    Fault(
        name="a sum over too many axes is a sum",
        file="builder/proof/collectives.py",
        old="if data.partial != frozenset(axes) or not axes",
        new="if not data.partial <= frozenset(axes) or not axes",
        effect="`verify` calls a program right that counts copies twice",
        hints=("tests/builder/proof/test_faults.py::test_seeded_fault_is_found[a sum made twice]",),
    ),
)

FAULTS = (*RULES, *PLANNING, *LOWERING, *READING, *PROOF)
