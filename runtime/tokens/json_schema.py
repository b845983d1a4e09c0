"""JSON schemas on their way to the grammar library: numbers bounded, and, if wished, without what it cannot enforce."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from furiosa_llm.runtime.tokens.grammar import looked_at

Schema = dict[str, Any]

_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")
"""Keywords that hold schemas, of those that the library knows."""
_TYPES = frozenset(("null", "boolean", "object", "array", "number", "string", "integer"))
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_GREATEST = 10**18 - 1
"""Of numbers without bounds: what has fewer digits than an integer of 64 bits."""
_LEAST_STEP = 1e-9
"""Of numbers without a step: they would have fractions without end."""


def bounded(schema: Mapping[str, Any]) -> Schema:
    """`schema` with numbers of finite length only: a small model may write digits for ever."""
    return _mapped(dict(schema), _with_bounds, ("anyOf", "oneOf", "prefixItems"))


def eased(schema: Mapping[str, Any]) -> tuple[Schema, list[str]]:
    """As much of `schema` as the library can enforce, and what was dropped in words."""
    dropped: list[str] = []
    root = dict(schema)
    made = _mapped(root, lambda one: _enforceable(one, root, dropped))
    own = made.get("x-guidance")
    made["x-guidance"] = {"lenient": True, "coerce_one_of": True, **(own if isinstance(own, dict) else {})}
    refusal, warnings = looked_at(LLMatcher.grammar_from_json_schema(json.dumps(made)))
    if not refusal:
        return made, [*dropped, *warnings]
    kind = schema.get("type")
    return {"type": kind} if isinstance(kind, str) and kind in _TYPES else {}, [f"the whole schema: {refusal}"]


def _mapped(schema: Schema, change: Callable[[Schema], Schema], listed: Sequence[str] = _LISTED) -> Schema:
    """`schema` with `change` made to it and to all schemas in it, among them those in the lists that are `listed`."""
    made = change(schema)
    for name, value in made.items():
        if name in _NAMED and isinstance(value, dict):
            made[name] = {key: _changed(one, change, listed) for key, one in value.items()}
        elif name in listed and isinstance(value, list):
            made[name] = [_changed(one, change, listed) for one in value]
        elif name in _SINGLE:
            made[name] = _changed(value, change, listed)
    return made


def _changed(value: Any, change: Callable[[Schema], Schema], listed: Sequence[str]) -> Any:
    return _mapped(value, change, listed) if isinstance(value, dict) else value


def _types(schema: Schema) -> list[Any]:
    kind = schema.get("type")
    return kind if isinstance(kind, list) else [kind]


def _with_bounds(schema: Schema) -> Schema:
    made = dict(schema)
    # What stands beside other conditions may be meant to be narrowed by them, or to exclude these bounds.
    if any(name in schema for name in ("enum", "const", "allOf", "$ref")):
        return made
    types = _types(schema)
    if "number" not in types and "integer" not in types:
        return made
    found = [schema[name] for name in (*_LOWER, *_UPPER) if name in schema]
    if any(not isinstance(one, int | float) or abs(one) > _GREATEST for one in found):
        return made
    for names, bound in ((_LOWER, -_GREATEST), (_UPPER, _GREATEST)):
        if not any(name in schema for name in names):
            made[names[0]] = bound
    if "number" in types and "multipleOf" not in schema and all(one == 0 or abs(one) >= 1 for one in found):
        made["multipleOf"] = _LEAST_STEP
    return made


def _enforceable(schema: Schema, root: Schema, dropped: list[str]) -> Schema:
    """`schema` without what makes the library refuse it as a whole, its lenient ways notwithstanding."""
    made = dict(schema)

    def drop(name: str) -> None:
        dropped.append(f"{name} {json.dumps(made.pop(name), default=str)[:80]}")

    if not all(isinstance(one, str) and one in _TYPES for one in _types(schema) if one is not None):
        drop("type")
    for name in (*_LOWER, *_UPPER):
        if isinstance(made.get(name), int | float) and abs(made[name]) > _GREATEST:
            drop(name)
    if isinstance(made.get("pattern"), str) and not _is_pattern(made["pattern"]):
        drop("pattern")
    if "pattern" in made and "format" in made:
        drop("format")
    if "$ref" in made and not _resolves(made["$ref"], root):
        drop("$ref")
    patterns = made.get("patternProperties")
    if isinstance(patterns, dict) and not all(map(_is_pattern, patterns)):
        drop("patternProperties")
    return made


def _is_pattern(pattern: str) -> bool:
    schema = {"type": "string", "pattern": pattern}
    return not looked_at(LLMatcher.grammar_from_json_schema(json.dumps(schema)))[0]


def _resolves(reference: Any, root: Schema) -> bool:
    """Whether it is the path of something in the schema itself."""
    if not isinstance(reference, str) or not reference.startswith("#"):
        return False
    found: Any = root
    for part in filter(None, reference[1:].split("/")):
        name = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return False
    return True
