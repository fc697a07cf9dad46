"""Convert a composed config to a dataclass, and back.

configs/*.yaml contain the keys, their defaults and comments. train.py and verbs.py contain the types and the limits on
values. An unknown key is an error, so a misspelt override is never ignored.
"""

import inspect
import keyword
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from protlig_dd.config.components import TRAINING_NOISE, unknown_key
from protlig_dd.config.fields import STORED, first_problem
from protlig_dd.diffusion.graphs.registry import GRAPHS
from protlig_dd.diffusion.noise import NOISES
from protlig_dd.model.config import stored_model, without_added_defaults

T = TypeVar("T")
COMPONENTS: dict[str, Mapping[str, Callable[..., Any]]] = {"graph": GRAPHS, "noise": NOISES}


def config_folder() -> Path:
    """Return the folder of the shipped configs: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def read_config(cfg: DictConfig, schema: type[T], *, stored: bool = False) -> T:
    """Return a composed config as an instance of its schema, a dataclass that checks the values.

    Args:
        stored: the config was saved with a run or an exported model; its numbers may exceed today's limits.

    Raises:
        ValueError: an unknown key (the message suggests the nearest), a missing value, or a value that is not allowed.
    """
    try:
        content = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(content, dict)
    missing = next((key for key, value in flatten(content).items() if "???" in (value, *elements_of(value))), None)
    if missing is not None:
        raise ValueError(f"{missing} is required: give {missing}=...")
    values = ((str(key), expand_home(value)) for key, value in content.items())
    arguments = {f"{key}_" if keyword.iskeyword(key) else key: value for key, value in values}
    try:
        return TypeAdapter(schema).validate_python(arguments, context=STORED if stored else None)
    except ValidationError as error:
        unknown = next((found for found in error.errors() if found["type"] == "unexpected_keyword_argument"), None)
        if unknown is not None:
            key = ".".join(str(part).removesuffix("_") for part in unknown["loc"])
            raise ValueError(unknown_key(key, known_keys(schema))) from error
        raise ValueError(first_problem(error)) from error


def elements_of(value: Any) -> list[Any]:
    """Return a list as it is, and [] for anything else."""
    return value if isinstance(value, list) else []


def expand_home(value: Any) -> Any:
    """Replace a leading `~` of every string in a value by the home folder: shells do not expand `~` after `key=`."""
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value == "~" or value.startswith("~/") else value
    if isinstance(value, list):
        return [expand_home(element) for element in value]
    if isinstance(value, dict):
        return {key: expand_home(element) for key, element in value.items()}
    return value


def as_dict(config: Any) -> dict[str, Any]:
    """Return a config as a dictionary with the keys of YAML and the command line: `from` instead of `from_`.

    Keys of `model` and `data` that are marked ADDED_LATER are left out if they have their default (see `stored_model`).
    """
    values = {key.removesuffix("_"): value for key, value in asdict(config).items()}
    if "model" in values:
        values["model"] = stored_model(values["model"])
    if "data" in values:
        values["data"] = without_added_defaults(values["data"], type(config.data))
    return values


def as_yaml(config: Any) -> str:
    """Return a config as YAML that `read_config` can read."""
    return OmegaConf.to_yaml(OmegaConf.create(as_dict(config)))


def known_keys(schema: type, prefix: str = "") -> list[str]:
    """Return the keys of a schema as users write them on the command line, such as optim.lr."""
    keys: list[str] = []
    for name, kind in get_type_hints(schema).items():
        key = prefix + name.removesuffix("_")
        if isinstance(kind, type) and is_dataclass(kind):
            keys += known_keys(kind, f"{key}.")
        elif key in COMPONENTS:
            components = COMPONENTS[key].values()
            options = {option for component in components for option in inspect.signature(component).parameters}
            options |= {"name", *TRAINING_NOISE} if key == "noise" else {"name"}
            keys += [f"{key}.{option}" for option in sorted(options)]
        else:
            keys.append(key)
    return keys


def defaults_of(schema: type, prefix: str = "") -> dict[str, Any]:
    """Return the keys of a schema that a file may leave out, and their defaults: {"model.positions": "rope", ...}."""
    kinds, defaults = get_type_hints(schema), dict[str, Any]()
    for field in fields(schema):
        key, kind = prefix + field.name.removesuffix("_"), kinds[field.name]
        if isinstance(kind, type) and is_dataclass(kind):
            defaults |= defaults_of(kind, f"{key}.")
        elif field.default is not MISSING:
            defaults[key] = field.default
        elif field.default_factory is not MISSING:
            defaults[key] = field.default_factory()
    return defaults


def flatten(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a nested config to {"optim.lr": 0.001, ...}; missing values are kept as `???`."""
    content = OmegaConf.to_container(cfg, throw_on_missing=False) if OmegaConf.is_config(cfg) else cfg
    if not isinstance(content, Mapping):
        return {prefix: content}
    if not content:
        return {prefix: content} if prefix else {}
    parts = [flatten(value, f"{prefix}.{key!s}" if prefix else str(key)) for key, value in content.items()]
    return {key: value for part in parts for key, value in part.items()}


def shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."
