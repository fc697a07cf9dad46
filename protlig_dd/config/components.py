"""Build the network, graph and noise schedule that a config names; this module does not depend on Hydra.

Components are chosen by name from a registry, never by an import path, so a config that comes with weights cannot run
code.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.rates import substitution_rates
from protlig_dd.diffusion.graphs.registry import GRAPHS
from protlig_dd.diffusion.noise import NOISES, Noise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.model.config import ModelConfig
from protlig_dd.model.dit import DiT
from protlig_dd.model.lora import add_adapters
from protlig_dd.model.mixers.attention import resolve_attention_backend

T = TypeVar("T")

TRAINING_NOISE = ("curriculum", "max_weight")  # keys of `noise` that only the training loss reads


def build_score_fn(
    *,
    model: ModelConfig,
    graph: Mapping[str, Any],
    noise: Mapping[str, Any],
    parametrisation: str,
    time_conditioning: bool,
    device: torch.device,
    precision: str,
) -> ScoreFn:
    """Return the score function of a config: its network in evaluation mode, with initial weights.

    Args:
        precision: bf16 | fp32, the precision of the network's forward pass.

    Raises:
        ValueError: an unknown component or option.
    """
    head_dim = model.hidden_size // model.n_heads
    backend = resolve_attention_backend("auto", device, precision, head_dim, model.positions)
    process = build_graph(graph)
    with device:
        network = build_model(model, backend, time_conditioning).eval()
    autocast = torch.bfloat16 if precision == "bf16" else None
    return ScoreFn(network, process, build_noise(noise, process), parametrisation, time_conditioning, autocast)


def build_graph(spec: Mapping[str, Any]) -> Graph:
    return build("graph", GRAPHS, spec)


def build_noise(spec: Mapping[str, Any], graph: Graph) -> Noise:
    """Return a config's noise schedule. Values that are null are computed from the graph.

    `graph.lambda_2` is the eigenvalue of the graph's slowest mode. `graph.sigma_max` is the total noise at which 0.1%
    of this mode is left.
    """
    defaults = {
        "eps": math.exp(graph.sigma_max * graph.lambda_2),
        "rate": -graph.lambda_2,
        "sigma_max": graph.sigma_max,
    }
    accepted = inspect.signature(NOISES[spec["name"]]).parameters if spec.get("name") in NOISES else {}
    options = {key: value for key, value in spec.items() if key not in TRAINING_NOISE}
    options |= {key: value for key, value in defaults.items() if key in accepted and spec.get(key) is None}
    return build("noise", NOISES, options)


def build_model(config: ModelConfig, attention_backend: str, time_conditioning: bool) -> DiT:
    """Return a config's network, with its adapters if it has any.

    Args:
        attention_backend: a resolved backend, not `auto`.
    """
    model = DiT(config, attention_backend, time_conditioning=time_conditioning)
    if config.lora.rank is not None:
        add_adapters(model, config.lora)
    return model


def build(kind: str, registry: Mapping[str, Callable[..., T]], spec: Mapping[str, Any]) -> T:
    """Look up `spec["name"]` in a registry and construct the component with the other keys.

    Raises:
        ValueError: a missing or unknown name, or an option that this component does not take.
    """
    options = {key: value for key, value in spec.items() if key != "name"}
    name = str(spec.get("name"))
    if name not in registry:
        raise ValueError(f"{kind}.name={name}: choose from {', '.join(registry)}")
    accepted = inspect.signature(registry[name]).parameters
    for key, value in options.items():
        if key not in accepted:
            raise ValueError(unknown_key(f"{kind}.{key}", [f"{kind}.{option}" for option in accepted]))
        if accepted[key].annotation in (int, float) and not isinstance(value, int | float):
            raise ValueError(f"{kind}.{key}={value}: give a number")
    try:
        return registry[name](**options)
    except TypeError as error:  # for example a list instead of a string
        raise ValueError(f"{kind} {options}: {error}") from error


def unknown_key(key: str, known: list[str]) -> str:
    """Return an error message that names the key and the nearest known key."""
    if key in known:  # a valid key of another component or command
        component, dot, _ = key.partition(".")
        if dot:
            return f"the chosen {component} has no key {key}; another {component} has this key"
        return f"this command has no {key!r}"
    nearest = difflib.get_close_matches(key, known, n=1)
    return f"unknown config key {key!r}; did you mean {nearest[0]!r}?" if nearest else f"unknown config key {key!r}"


MAX_WEIGHT = 10.0  # docs/performance.md has the measurements of this cap


def resolve_max_weight(spec: Mapping[str, Any], graph: Graph) -> float | None:
    """Return the cap on the loss weight, None for no cap; `auto` is MAX_WEIGHT if the graph has a mask, else no cap."""
    cap = spec.get("max_weight")
    if cap == "auto":
        return MAX_WEIGHT if graph.masks else None
    return cap


def graph_with_rates(spec: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """Return the graph's config with the rates of its matrix file, so that the run does not need the file again.

    Args:
        earlier: the graph's saved config, of the run that is resumed or of the model that fine-tuning starts from; {}
            if there is no such config. If the matrix file no longer exists, and all keys except `rates` have the same
            values in `spec` and `earlier`, the rates of `earlier` are used.
    """
    spec = dict(spec)
    if not isinstance(spec.get("matrix"), str) or spec.get("rates") is not None:
        return spec
    if Path(spec["matrix"]).is_file():
        spec["rates"] = substitution_rates(spec["matrix"], spec.get("kind", "log_odds"), spec.get("scale")).tolist()
    elif {**earlier, "rates": None} == {**spec, "rates": None}:
        spec["rates"] = earlier.get("rates")
    return spec
