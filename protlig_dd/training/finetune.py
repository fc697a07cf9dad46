"""What a run that starts from another model (`from=`) takes over of it."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from protlig_dd.config.components import TRAINING_NOISE, graph_with_rates
from protlig_dd.config.fields import marked
from protlig_dd.config.read import flatten, shorten, spelt
from protlig_dd.config.train import TrainConfig, config_in
from protlig_dd.inference.model import find_saved
from protlig_dd.model.config import COMPUTING, TUNABLE, ModelConfig
from protlig_dd.system.distributed import processes_from_environment
from protlig_dd.system.files import sha256
from protlig_dd.system.terminal import announce
from protlig_dd.training.resume import has_steps

FREE = {"model": marked(ModelConfig, TUNABLE), "noise": TRAINING_NOISE, "graph": ()}
FREE_KEYS = {f"{section}.{key}" for section, keys in FREE.items() for key in keys}
THIS_MACHINE = marked(ModelConfig, COMPUTING)


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


def starting_from(config: TrainConfig, path: Path) -> TrainConfig:
    """The config of a run that begins with another model's averaged weights: its network, graph, noise and
    parametrisation are that model's, and the checksum of the weights is kept with it.

    Raises:
        ValueError: no such model, or another than the command line describes.
    """
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    given = {override.key_or_group for override in overrides}
    recipe = set_by_experiment()
    begun = None
    if has_steps(path) and not config.run.fresh:  # it remembers, whatever has become of what it began with
        begun = config_in(path)
    if begun is not None and begun.from_ == config.from_:
        source, found = begun, begun.from_sha256
    else:
        saved = find_saved(str(config.from_))
        source, found = saved.config, sha256(saved.weights)
    if config.from_sha256 not in (None, found):
        raise ValueError(f"from={config.from_} has weights of SHA-256 {found}, not from_sha256={config.from_sha256}")
    taken = taken_over(config, source, given | (recipe & FREE_KEYS))
    before, after = flatten(spelt(config)), flatten(spelt(taken))
    left_out = [
        f"{key}={shorten(str(value))} ({shorten(str(after.get(key)))} there)"
        for key, value in before.items()
        if (key in recipe or key.partition(".")[0] in recipe) and value != after.get(key)
    ]
    if left_out:
        announce(
            f"from={config.from_} is another model than the experiment's, of which is left out: {', '.join(left_out)}",
            processes_from_environment(),
        )
    return replace(taken, from_sha256=found)


def set_by_experiment() -> set[str]:
    """The keys and groups that the file of the chosen experiment sets, and those of experiments that it builds on."""
    runtime = HydraConfig.get().runtime
    folders = [Path(source.path) / "experiment" for source in runtime.config_sources if source.schema == "file"]

    def named(experiment: str) -> set[str]:
        file = next((file for folder in folders if (file := folder / f"{experiment}.yaml").is_file()), None)
        if file is None:
            return set()
        content = dict(OmegaConf.to_container(OmegaConf.load(file)) or {})  # type: ignore[arg-type]
        found: set[str] = set()
        for entry in content.pop("defaults", []):
            if isinstance(entry, dict):  # `override /model: tiny`
                found |= {str(key).split()[-1].lstrip("/") for key in entry}
            elif entry != "_self_":
                found |= named(entry)
        return found | set(flatten(content))

    chosen = runtime.choices.get("experiment")
    return named(chosen) if chosen else set()
