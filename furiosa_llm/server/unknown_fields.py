"""Fields of requests that this server does not know: refused if they would change the answer, else left alone."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from pydantic import model_validator

from furiosa_llm.server.errors import ApiError
from furiosa_llm.server.fields import Body
from furiosa_llm.server.notes import IGNORED, note

_OF_OTHERS = frozenset(
    (
        *("chat_template", "logits_processors", "logits_processor_pattern", "vllm_xargs", "instructions", "system"),
        *("max_new_tokens", "num_predict", "n_predict", "num_beams", "do_sample", "stop_sequences", "options"),
        *(
            "repeat_penalty",
            "typical_p",
            "top_a",
            "tfs_z",
            "mirostat",
            "mirostat_mode",
            "epsilon_cutoff",
        ),
        *("xtc_probability", "dry_multiplier", "dynatemp_range", "smoothing_factor", "grammar", "json_schema", "regex"),
        *("ebnf", "structural_tag", "guided_structural_tag", "images", "return_tokens_as_token_ids", "bad_words_ids"),
        *("max_tokens_per_doc", "max_tokens_per_query", "max_chunks_per_doc", "rank_fields", "truncation_side"),
    )
)
"""What other servers take, and what would change the answer."""
_OFF = {"typical_p": 1, "tfs_z": 1, "repeat_penalty": 1, "num_beams": 1, "do_sample": True}
"""What switches them off, where it is not nothing, zero or false."""
_MAX_UNKNOWN = 32
_ALIKE = 0.85
"""How much like a field that is known a name has to be to count as a slip of the pen: max_token, temprature."""


class RequestBody(Body):
    """The whole body of a request."""

    @model_validator(mode="before")
    @classmethod
    def _without_effect(cls, value: Any) -> Any:
        """Raises ApiError for fields that are not known, if the client would count on their effect."""
        if isinstance(value, dict):
            unknown = [name for name in value if name not in cls.model_fields and not _is_off(name, value[name])]
            if len(unknown) > _MAX_UNKNOWN:
                raise _refused(unknown[0], f"{len(unknown)} fields are not known, at most {_MAX_UNKNOWN} are let pass")
            for name in unknown:
                _check(name, cls.model_fields)
        return value


def _is_off(name: str, value: Any) -> bool:
    """Whether a field asks for what happens without it."""
    return value is None or (name in _OF_OTHERS and (value == _OFF[name] if name in _OFF else not value))


def _check(name: str, known: Any) -> None:
    if name in _OF_OTHERS:
        raise _refused(name, "this server does not have it; leave it out")
    if alike := get_close_matches(name[:64], known, 1, _ALIKE):
        raise _refused(name, f"did you mean {alike[0]}?")
    note(IGNORED, name)


def _refused(name: str, reason: str) -> ApiError:
    shown = name[:200]
    return ApiError(400, f"Unrecognized request argument supplied: {shown} ({reason})", param=shown)
