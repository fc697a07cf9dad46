"""From a composed config to a dataclass, and back.

Values, defaults and their one-line comments live in configs/*.yaml; types and what a value must be in train.py and
verbs.py. A key that is not there is an error, so a misspelt override can never be ignored.
"""

import inspect
import keyword
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from protlig_dd.config.components import TRAINING_NOISE, unknown_key
from protlig_dd.config.fields import STORED, first_problem, marked
from protlig_dd.diffusion.graphs.registry import GRAPHS
from protlig_dd.diffusion.noise import NOISES
from protlig_dd.model.config import LATER, ModelConfig

T = TypeVar("T")
COMPONENTS: dict[str, Mapping[str, Callable[..., Any]]] = {"graph": GRAPHS, "noise": NOISES}


def config_folder() -> Path:
    """The shipped configs: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def read_config(cfg: DictConfig, schema: type[T], *, stored: bool = False) -> T:
    """Check a composed config against its schema and return it as that dataclass.

    Args:
        stored: what a run or an exported model has kept, whose numbers need not lie within the limits of today.

    Raises:
        ValueError: an unknown key (with the nearest known one), a missing value, or one that its field does not allow.
    """
    try:
        content = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(content, dict)
    missing = next((key for key, value in flatten(content).items() if "???" in (value, *listed(value))), None)
    if missing is not None:
        raise ValueError(f"{missing} is required: give {missing}=...")
    named = ((str(key), at_home(value)) for key, value in content.items())
    arguments = {f"{key}_" if keyword.iskeyword(key) else key: value for key, value in named}
    try:
        return TypeAdapter(schema).validate_python(arguments, context=STORED if stored else None)
    except ValidationError as error:
        unknown = next((one for one in error.errors() if one["type"] == "unexpected_keyword_argument"), None)
        if unknown is not None:
            key = ".".join(str(part).removesuffix("_") for part in unknown["loc"])
            raise ValueError(unknown_key(key, known_keys(schema))) from error
        raise ValueError(first_problem(error)) from error


def listed(value: Any) -> list[Any]:
    """The elements of a list; of anything else none."""
    return value if isinstance(value, list) else []


def at_home(value: Any) -> Any:
    """The value with the home folder for a `~` that paths in it begin with, which shells leave behind `key=`."""
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value == "~" or value.startswith("~/") else value
    if isinstance(value, list):
        return [at_home(one) for one in value]
    if isinstance(value, dict):
        return {key: at_home(one) for key, one in value.items()}
    return value


def spelt(config: Any) -> dict[str, Any]:
    """A config as YAML and the command line spell it: `from`, not `from_`."""
    values = {key.removesuffix("_"): value for key, value in asdict(config).items()}
    if "model" in values:  # earlier versions read what they know
        later = {field.name: field.default for field in fields(ModelConfig) if field.name in marked(ModelConfig, LATER)}
        values["model"] = {key: one for key, one in values["model"].items() if key not in later or one != later[key]}
    return values


def as_yaml(config: Any) -> str:
    """A config as the file that `read_config` reads."""
    return OmegaConf.to_yaml(OmegaConf.create(spelt(config)))


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Dotted keys of a schema, as they are spelt on the command line."""
    keys: list[str] = []
    for name, kind in get_type_hints(schema).items():
        key = prefix + name.removesuffix("_")
        if isinstance(kind, type) and is_dataclass(kind):
            keys += known_keys(kind, f"{key}.")
        elif key in COMPONENTS:
            options = {option for make in COMPONENTS[key].values() for option in inspect.signature(make).parameters}
            options |= {"name", *TRAINING_NOISE} if key == "noise" else {"name"}
            keys += [f"{key}.{option}" for option in sorted(options)]
        else:
            keys.append(key)
    return keys


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Nested config -> {"optim.lr": 0.001, ...}; missing values are kept as `???`."""
    content = OmegaConf.to_container(cfg, throw_on_missing=False) if OmegaConf.is_config(cfg) else cfg
    if not isinstance(content, Mapping):
        return {prefix: content}
    if not content:
        return {prefix: content} if prefix else {}
    parts = [flatten(value, f"{prefix}.{key!s}" if prefix else str(key)) for key, value in content.items()]
    return {key: value for part in parts for key, value in part.items()}


def shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."
