"""Types of config fields: which values are allowed, and the error message for other values."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
"""Settings of every schema: unknown keys are errors, and `run.name=7` is read as a string."""


def _not_true_or_false(value: Any) -> Any:
    if isinstance(value, bool):  # bool is a subclass of int
        raise ValueError("give a number")
    return value


STORED = "stored"
"""Pydantic's validation context for the saved config of a run or an exported model. The values of such a config were
allowed when it was saved, so today's limits are not checked."""


def limited(allows: Callable[[Any], bool], words: str) -> AfterValidator:
    """Return a validator that rejects values for which `allows` is false, except in a saved config (STORED).

    Args:
        words: the part of the error message `KEY WORDS, got VALUE`, such as `must be above 0`.
    """

    def check(value: Any, info: Any) -> Any:  # info: pydantic.ValidationInfo, which beartype cannot check
        if info.context != STORED and not allows(value):
            raise ValueError(words)
        return value

    return AfterValidator(check)


Whole = Annotated[int, BeforeValidator(_not_true_or_false)]
Number = Annotated[float, BeforeValidator(_not_true_or_false)]
AtLeast0 = Annotated[Whole, limited(lambda x: x >= 0, "must be at least 0")]
AtLeast1 = Annotated[Whole, limited(lambda x: x >= 1, "must be at least 1")]
AtLeast2 = Annotated[Whole, limited(lambda x: x >= 2, "must be at least 2")]
Even = Annotated[Whole, limited(lambda x: x >= 4 and x % 2 == 0, "must be an even number of at least 4")]
Positive = Annotated[Number, limited(lambda x: x > 0, "must be above 0")]
NotNegative = Annotated[Number, limited(lambda x: x >= 0, "must be at least 0")]
Above1 = Annotated[Number, limited(lambda x: x > 1, "must be above 1")]
Fraction = Annotated[NotNegative, limited(lambda x: x <= 1, "must be at most 1")]
Decay = Annotated[NotNegative, limited(lambda x: x < 1, "must be below 1")]
SplitName = Literal["train", "validation", "test"]


def _true_false_auto(value: Any) -> Any:
    if value not in (True, False, "auto"):
        raise ValueError("choose from auto, true, false")
    return value


Auto = Annotated[Any, AfterValidator(_true_false_auto)]
"""true, false or auto"""


def _number_or_auto(value: Any) -> Any:
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError("must be auto or a whole number of at least 1")
    return value


NumberOrAuto = Annotated[Any, AfterValidator(_number_or_auto)]
"""A whole number of at least 1, or auto"""

MAY_CHANGE = "may change when a run is resumed"


def marked(schema: type, mark: str) -> list[str]:
    """Return the names of a dataclass's fields whose annotation has this mark."""
    hints = get_type_hints(schema, include_extras=True)
    return [name for name, hint in hints.items() if mark in get_args(hint)[1:]]


def first_problem(error: ValidationError) -> str:
    """Return a message about the first invalid value: its key, the value, and what is allowed."""
    found = error.errors()[0]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part.removesuffix('_')}" for part in found["loc"])
    key, value, context = "".join(parts).lstrip("."), found["input"], found.get("ctx", {})
    match found["type"]:
        case "missing" | "missing_argument":
            return f"{key} is required: give {key}=..."
        case "literal_error":
            choices = re.findall("'([^']*)'", context["expected"])
            return f"{key}={value}; choose from {', '.join(choices)}"
        case "string_type" if isinstance(value, list):
            return f"{key}={shown(value)}: give one value, not a list"
        case "list_type":
            return f"{key}: give a list: [a] or [a,b]"
        case "dataclass_type":
            return f"{key}={value}: {key} is a group of keys; set {key}.KEY=..."
        case "value_error":
            message = str(context["error"])
            if message.startswith(key):
                return message
            return f"{key} {message}, got {value}" if message.startswith("must ") else f"{key}={value}; {message}"
    return f"{key}={value}: {found['msg'][0].lower()}{found['msg'][1:]}"


def shown(values: list[Any]) -> str:
    """Return the text of a list as users write it on the command line."""
    return f"[{','.join(map(str, values))}]"
