"""From the names and numbers of a config to a network, a graph and a noise schedule; knows nothing of Hydra.

Components are chosen by name from a registry, never by an import path: a config that comes with weights cannot run
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
from protlig_dd.model.mixers.attention import resolve_attention_backend
from protlig_dd.runs.checkpoint import load_weights

T = TypeVar("T")

TRAINING_NOISE = ("curriculum", "max_weight")  # of the noise's keys, those that only the training loss knows


def load_model(
    weights: Path,
    *,
    model: ModelConfig,
    graph: Mapping[str, Any],
    noise: Mapping[str, Any],
    parametrisation: str,
    time_conditioning: bool,
    device: torch.device,
    precision: str,
) -> ScoreFn:
    """The network of a config with weights from a safetensors file, evaluating, as a score function.

    Args:
        precision: bf16 | fp32, that the network computes in.

    Raises:
        ValueError: an unknown component or option, or weights that do not fit.
    """
    backend = resolve_attention_backend("auto", device, precision, model.hidden_size // model.n_heads)
    process = build_graph(graph)
    with device:
        network = build_model(model, backend, time_conditioning).eval()
    load_weights(weights, network)
    autocast = torch.bfloat16 if precision == "bf16" else None
    return ScoreFn(network, process, build_noise(noise, process), parametrisation, time_conditioning, autocast)


def build_graph(spec: Mapping[str, Any]) -> Graph:
    return build("graph", GRAPHS, spec)


def build_noise(spec: Mapping[str, Any], graph: Graph) -> Noise:
    """The schedule of a config; what is left open (null) is the graph's: its slowest mode, and how far it goes."""
    own = {
        "eps": math.exp(graph.sigma_max * graph.lambda_2),
        "rate": -graph.lambda_2,
        "sigma_max": graph.sigma_max,
    }
    accepted = inspect.signature(NOISES[spec["name"]]).parameters if spec.get("name") in NOISES else {}
    options = {key: value for key, value in spec.items() if key not in TRAINING_NOISE}
    options |= {key: own[key] for key in own if key in accepted and spec.get(key) is None}
    return build("noise", NOISES, options)


def build_model(config: ModelConfig, attention_backend: str, time_conditioning: bool) -> DiT:
    """The network of a config, with the attention backend as resolved for this machine."""
    return DiT(config, attention_backend, time_conditioning=time_conditioning)


def build(kind: str, registry: Mapping[str, Callable[..., T]], spec: Mapping[str, Any]) -> T:
    """Look `spec["name"]` up in a registry and construct it with the other keys.

    Raises:
        ValueError: no or an unknown name, or an option that this component does not take.
    """
    options = {key: value for key, value in spec.items() if key != "name"}
    name = str(spec.get("name"))
    if name not in registry:
        raise ValueError(f"{kind}.name={name}: there are {', '.join(registry)}")
    accepted = inspect.signature(registry[name]).parameters
    for key, value in options.items():
        if key not in accepted:
            raise ValueError(unknown_key(f"{kind}.{key}", [f"{kind}.{option}" for option in accepted]))
        if accepted[key].annotation in (int, float) and not isinstance(value, int | float):
            raise ValueError(f"{kind}.{key}={value}: give a number")
    try:
        return registry[name](**options)
    except TypeError as error:  # a list where a text belongs, say
        raise ValueError(f"{kind} {options}: {error}") from error


def unknown_key(key: str, known: list[str]) -> str:
    """One line that names the key and the nearest known one."""
    if key in known:  # an option of another component, or of another command
        component, dot, _ = key.partition(".")
        return f"the chosen {component} has no {key}; another has" if dot else f"this command has no {key!r}"
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown config key {key!r}; did you mean {near[0]!r}?" if near else f"unknown config key {key!r}"


MAX_WEIGHT = 10.0  # docs/performance.md


def resolve_max_weight(spec: Mapping[str, Any], graph: Graph) -> float | None:
    """The cap on the loss' weight that a noise's config asks for; `auto` is MAX_WEIGHT where it was found to help."""
    wanted = spec.get("max_weight")
    if wanted == "auto":
        return MAX_WEIGHT if graph.masks else None
    return wanted


def graph_with_rates(spec: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:
    """The graph's config with the rates of a matrix file written into it, so that a run needs the file no more.

    Args:
        earlier: the graph of the run that this may go on from, {} where there is none; its rates stand in for a file
            that is gone.
    """
    spec = dict(spec)
    if not isinstance(spec.get("matrix"), str) or spec.get("rates") is not None:
        return spec
    if Path(spec["matrix"]).is_file():
        spec["rates"] = substitution_rates(spec["matrix"], spec.get("kind", "log_odds"), spec.get("scale")).tolist()
    elif {**earlier, "rates": None} == {**spec, "rates": None}:
        spec["rates"] = earlier.get("rates")
    return spec
