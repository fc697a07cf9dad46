"""What a run that starts from another model (`from=`) takes over of it."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from protlig_dd.runtime.components import ModelConfig
from protlig_dd.runtime.config import TrainConfig, graph_with_rates, shorten, spelt

FREE = {"model": ("dropout",), "noise": ("curriculum", "max_weight"), "graph": ()}
FREE_KEYS = {f"{section}.{key}" for section, keys in FREE.items() for key in keys}
THIS_MACHINE = ("attention_backend", "checkpointing")  # of the model's keys: how it is computed, not what


def taken_over(config: TrainConfig, source: TrainConfig, given: Collection[str]) -> TrainConfig:
    """The config with the source's network, graph, noise and parametrisation.

    Args:
        given: the keys and groups that the command line names. What it says of the network and its process must agree
            with the source; dropout and what only the training loss knows of the noise are the run's own.

    Raises:
        ValueError: it does not agree; names the keys and both values.
    """
    mine, theirs = spelt(config), spelt(source)
    mine["graph"] = graph_with_rates(mine["graph"], theirs["graph"])
    refused = []

    def compare(key: str, value: Any, other: Any) -> None:
        if value != other:
            refused.append(f"{key}: {shorten(str(other))} there, {shorten(str(value))} here")

    for section, free in FREE.items():
        for key, value in mine[section].items():
            if section in given or f"{section}.{key}" in given:
                if key in free:
                    theirs[section][key] = value
                elif key not in THIS_MACHINE:
                    compare(f"{section}.{key}", value, theirs[section].get(key))
    for key in ("parametrisation", "time_conditioning"):
        if key in given and mine[key] != "auto":
            compare(key, mine[key], theirs[key])
    if refused:
        raise ValueError(
            f"from={config.from_} is another model ({'; '.join(refused)}); leave these out to take its own"
        )
    machine = {key: mine["model"][key] for key in THIS_MACHINE}
    return replace(
        config,
        model=ModelConfig(**{**theirs["model"], **machine}),
        graph=theirs["graph"],
        noise=theirs["noise"],
        parametrisation=theirs["parametrisation"],
        time_conditioning=theirs["time_conditioning"],
    )
