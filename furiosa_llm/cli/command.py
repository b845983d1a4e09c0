"""How commands show their options: in groups, and each default and range in one style."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import click

ENGINE_GROUPS: Mapping[str, Sequence[str]] = {
    "Placement": (
        *("devices", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size"),
        *("num_blocks_per_pp_stage", "allow_subset", "workers", "threads", "spin_us"),
    ),
    "Several hosts": ("distributed_executor_backend", "ray_address", "placement_timeout", "artifact_cache"),
    "Sequences": (
        *("max_batch_size", "max_model_len", "max_prompt_len", "prefill_chunk_size", "enable_prefix_caching"),
        *("paged_attention_num_blocks", "max_processing_samples", "spare_blocks_ratio", "npu_queue_limit"),
    ),
    "Loading and running": (
        *("compute", "mapped", "separate", "full_verification", "batch_invariant", "step_timeout", "max_step_nbytes"),
    ),
}
"""The options of an engine, by what they are about."""
_OTHERS = "Options"
_TYPES = ((r"INTEGER( RANGE)?", "N"), (r"FLOAT( RANGE)?", "NUMBER"), (r", --\w*_\w*", ""))
"""The types as click calls them, and the vendor's spellings with underscores, which are taken all the same."""


class Command(click.Command):
    """A command whose options are shown in `groups`, names of parameters by title; those in none come first."""

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]] | None = None, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.groups = groups or {}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a section for each group."""
        titles = {name: title for title, names in self.groups.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in (_OTHERS, *self.groups)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                sections[titles.get(str(param.name), _OTHERS)].append(_in_style(*record))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


command = functools.partial(click.command, cls=Command)


def _in_style(names: str, text: str) -> tuple[str, str]:
    """The spellings with short types, and the help that ends in one bracket: `[default: 0; 0<=x<1]`."""
    for pattern, shown in _TYPES:
        names = re.sub(pattern, shown, names)
    text = re.sub(r"\]\s+\[", "; ", text)
    text = re.sub(r"; x>=[01](\.0)?\]", "]", text)
    text = re.sub(r"  \[x>=[01](\.0)?\]", "", text)
    return names, re.sub(r"(\[default: -?\d+)\.0(?=[;\]])", r"\1", text)
