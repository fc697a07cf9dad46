"""Types of config fields that say what a value must be, and what is told of one that is not."""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, ValidationError

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
"""Of every schema: no key that it does not have, and `run.name=7` is a text."""


def _not_true_or_false(value: Any) -> Any:
    if isinstance(value, bool):  # which Python counts among the numbers
        raise ValueError("give a number")
    return value


STORED = "stored"
"""The context in which a config is read that a run or an exported model has kept: its values were allowed then."""


def limited(allows: Callable[[Any], bool], words: str) -> AfterValidator:
    """A limit on new values, told as `KEY WORDS, got VALUE`."""

    def check(value: Any, info: Any) -> Any:  # a ValidationInfo, a protocol that no test at run time takes
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
Share = Annotated[NotNegative, limited(lambda x: x <= 1, "must be at most 1")]
Decay = Annotated[NotNegative, limited(lambda x: x < 1, "must be below 1")]
SplitName = Literal["train", "validation", "test"]


def _true_false_auto(value: Any) -> Any:
    if value not in (True, False, "auto"):
        raise ValueError("there are auto, true and false")
    return value


Auto = Annotated[Any, AfterValidator(_true_false_auto)]
"""true, false or auto."""

MAY_CHANGE = "may change when a run is resumed"


def marked(schema: type, mark: str) -> list[str]:
    """The fields of a dataclass whose annotation carries this mark."""
    hints = get_type_hints(schema, include_extras=True)
    return [name for name, hint in hints.items() if mark in get_args(hint)[1:]]


def first_problem(error: ValidationError) -> str:
    """One line about the first value that is not what its field says: key, value, what is allowed."""
    found = error.errors()[0]
    parts = (f"[{part}]" if isinstance(part, int) else f".{part.removesuffix('_')}" for part in found["loc"])
    key, given, context = "".join(parts).lstrip("."), found["input"], found.get("ctx", {})
    match found["type"]:
        case "missing" | "missing_argument":
            return f"{key} is required: give {key}=..."
        case "literal_error":
            choices = re.findall("'([^']*)'", context["expected"])
            return f"{key}={given}; there are {', '.join(choices)}"
        case "list_type":
            return f"{key}: give a list: [a] or [a,b]"
        case "dataclass_type":
            return f"{key}={given}: {key} is a group of keys, such as {key}.KEY=..."
        case "value_error":
            message = str(context["error"])
            if message.startswith(key):
                return message
            return f"{key} {message}, got {given}" if message.startswith("must ") else f"{key}={given}; {message}"
    return f"{key}={given}: {found['msg'][0].lower()}{found['msg'][1:]}"
