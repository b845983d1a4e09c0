"""Random JSON schemas of the keywords that people use, none of which can only be met by an endless text."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def random_schema(chance: random.Random) -> Schema:
    """A schema whose definitions are referred to from anywhere in it."""
    definitions = {"number": _number(chance), "word": _word(chance)}
    return {**_object(chance, depth=2), "$defs": definitions}


def _schema(chance: random.Random, depth: int) -> Schema:
    plain = [_number, _word, _enum, _constant, _reference, _nullable]
    if depth == 0:
        return chance.choice(plain)(chance)
    kind = chance.randrange(len(plain) + 4)
    if kind < len(plain):
        return plain[kind](chance)
    if kind == len(plain):
        return _array(chance, depth - 1)
    if kind == len(plain) + 1:
        return {"anyOf": [_schema(chance, depth - 1) for _ in range(2)]}
    return _object(chance, depth - 1)


def _object(chance: random.Random, depth: int) -> Schema:
    names = chance.sample(["a", "b", 'q"uote', "né", "long name"], chance.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _schema(chance, depth) for name in names},
        "required": chance.sample(names, chance.randint(0, len(names))),
        "additionalProperties": chance.choice([False, False, False, {"type": "boolean"}]),
    }


def _array(chance: random.Random, depth: int) -> Schema:
    least = chance.randint(0, 2)
    return {
        "type": "array",
        "items": _schema(chance, depth),
        "minItems": least,
        "maxItems": least + chance.randint(0, 2),
    }


def _number(chance: random.Random) -> Schema:
    least = chance.randint(-20, 20)
    kind = chance.choice(["integer", "number"])
    return {"type": kind, "minimum": least, "maximum": least + chance.randint(0, 30)}


def _word(chance: random.Random) -> Schema:
    return chance.choice(
        [
            {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
            {"type": "string", "minLength": 1, "maxLength": 5},
            {"type": "string", "format": "date"},
        ]
    )


def _enum(chance: random.Random) -> Schema:
    return {"enum": chance.sample(["red", "größe", "", 1, 2.5, True, None], chance.randint(1, 4))}


def _constant(chance: random.Random) -> Schema:
    return {"const": chance.choice([7, "x\ny", [1, {"k": None}]])}


def _reference(chance: random.Random) -> Schema:
    return {"$ref": f"#/$defs/{chance.choice(['number', 'word'])}"}


def _nullable(chance: random.Random) -> Schema:
    return {"type": [chance.choice(["boolean", "integer"]), "null"]}
