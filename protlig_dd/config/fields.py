"""Types of config fields that say what a value must be, and what is told of one that is not."""

import re
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True)
"""Of every schema: no key that it does not have, and `run.name=7` is a text."""


def _not_true_or_false(value: Any) -> Any:
    if isinstance(value, bool):  # which Python counts among the numbers
        raise ValueError("give a number")
    return value


Whole = Annotated[int, BeforeValidator(_not_true_or_false)]
Number = Annotated[float, BeforeValidator(_not_true_or_false)]
AtLeast0 = Annotated[Whole, Field(ge=0)]
AtLeast1 = Annotated[Whole, Field(ge=1)]
AtLeast2 = Annotated[Whole, Field(ge=2)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Above1 = Annotated[Number, Field(gt=1)]
Share = Annotated[Number, Field(ge=0, le=1)]
Decay = Annotated[Number, Field(ge=0, lt=1)]
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
    parts = [str(part).removesuffix("_") for part in found["loc"] if not isinstance(part, int)]
    key, given, limits = ".".join(parts), found["input"], found.get("ctx", {})
    match found["type"]:
        case "greater_than_equal" | "less_than_equal":
            bound = f"least {limits['ge']:g}" if "ge" in limits else f"most {limits['le']:g}"
            return f"{key} must be at {bound}, got {given}"
        case "greater_than":
            return f"{key} must be above {limits['gt']:g}, got {given}"
        case "less_than":
            return f"{key} must be below {limits['lt']:g}, got {given}"
        case "multiple_of":
            return f"{key} must be a multiple of {limits['multiple_of']:g}, got {given}"
        case "literal_error":
            choices = re.findall("'([^']*)'", limits["expected"])
            return f"{key}={given}; there are {', '.join(choices)}"
        case "list_type":
            return f"{key}: give a list: [a] or [a,b]"
        case "value_error":
            message = str(limits["error"])
            return message if message.startswith(key) else f"{key}={given}; {message}"
    return f"{key}={given}: {found['msg'][0].lower()}{found['msg'][1:]}"
