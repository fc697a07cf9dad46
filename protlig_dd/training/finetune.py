"""Copy settings from the source model of a run: the model of `from=`, whose weights the run starts from."""

from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from protlig_dd.config.components import TRAINING_NOISE, graph_with_rates
from protlig_dd.config.fields import marked
from protlig_dd.config.read import as_dict, flatten, shorten
from protlig_dd.config.train import TrainConfig, all_settings, config_in
from protlig_dd.inference.model import find_saved
from protlig_dd.model.config import COMPUTE_ONLY, OF_THE_RUN, TUNABLE, ModelConfig
from protlig_dd.system.distributed import processes_from_environment
from protlig_dd.system.tables import as_written
from protlig_dd.system.terminal import announce
from protlig_dd.training.resume import has_steps

FREE = {"model": marked(ModelConfig, TUNABLE), "noise": TRAINING_NOISE, "graph": ()}
FREE_KEYS = {f"{section}.{key}" for section, keys in FREE.items() for key in keys}
OWN = [*marked(ModelConfig, COMPUTE_ONLY), *marked(ModelConfig, OF_THE_RUN)]


def with_source_model(config: TrainConfig, source: TrainConfig, named: Collection[str]) -> TrainConfig:
    """Return the config with the network, graph, noise, parametrisation and time conditioning of the source model.

    Two kinds of settings may differ from those of the source. FREE_KEYS (dropout, and the noise settings that only the
    training loss uses) keep the value of `config` if they are in `named`. OWN (settings that affect only how the
    network is computed, and the adapters) always keep the value of `config`.

    Args:
        source: config of the source model.
        named: keys and config groups that the command line sets, and those of the FREE_KEYS that the experiment sets.

    Raises:
        ValueError: any other named setting of the network or the diffusion process differs from that of the source. The
            message has the keys and both values.
    """
    mine, theirs = as_dict(config), as_dict(source)
    # as_dict omits some keys at their default, but the command line may set them. A key set to null takes
    # the source's value
    mine["model"], theirs["model"] = asdict(config.model), asdict(source.model)
    kept = {key for key, value in mine["model"].items() if value is None}
    mine["model"] |= {key: theirs["model"][key] for key in kept}
    mine["graph"] = graph_with_rates(mine["graph"], theirs["graph"])
    conflicts = []

    def compare(key: str, value: Any, other: Any) -> None:
        if value != other:
            conflicts.append(
                f"{key}: {shorten(as_written(other))} in the source, {shorten(as_written(value))} requested"
            )

    for section, free in FREE.items():
        for key, value in mine[section].items():
            if section in named or f"{section}.{key}" in named:
                if key in free:
                    theirs[section][key] = value
                elif key not in OWN:
                    compare(f"{section}.{key}", value, theirs[section].get(key))
    for key in ("parametrisation", "time_conditioning"):
        if key in named and mine[key] != "auto":
            compare(key, mine[key], theirs[key])
    if conflicts:
        raise ValueError(
            f"from={config.from_} does not match the command line ({'; '.join(conflicts)}); "
            "omit these settings to use those of the source"
        )
    own = {key: getattr(config.model, key) for key in OWN}
    return replace(
        config,
        model=ModelConfig(**{**theirs["model"], **own}),
        graph=theirs["graph"],
        noise=theirs["noise"],
        parametrisation=theirs["parametrisation"],
        time_conditioning=theirs["time_conditioning"],
    )


def resolve_source_model(config: TrainConfig, path: Path) -> TrainConfig:
    """Return the config of a run that starts from another model's averaged weights.

    The network, graph, noise, parametrisation and time conditioning are copied from the other model. `from_sha256` is
    the checksum of its weights.

    Args:
        path: the run folder.

    Raises:
        ValueError: the model of `from=` does not exist, or it does not match the command line or `from_sha256`.
    """
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    named = {override.key_or_group for override in overrides}
    experiment_keys = keys_set_by_experiment()
    recorded = None
    if has_steps(path) and not config.run.fresh:  # the source may since have changed or been deleted
        recorded = config_in(path)
    if recorded is not None and recorded.from_ == config.from_:
        source, checksum = recorded, recorded.from_sha256
    else:
        saved = find_saved(str(config.from_))
        source, checksum = saved.config, saved.weights_sha256()
    if config.from_sha256 not in (None, checksum):
        raise ValueError(f"from={config.from_} has weights of SHA-256 {checksum}, not from_sha256={config.from_sha256}")
    resolved = with_source_model(config, source, named | (experiment_keys & FREE_KEYS))
    before, after = all_settings(as_dict(config)), all_settings(as_dict(resolved))
    ignored = [
        f"{key}={shorten(as_written(after.get(key)))} (not {shorten(as_written(value))})"
        for key, value in before.items()
        if (key in experiment_keys or key.partition(".")[0] in experiment_keys) and value != after.get(key)
        if not (key.startswith("model.") and value is None)  # null stands for the source's value
    ]
    if ignored:
        announce(
            f"from={config.from_}: these settings are the source's, not those of the experiment and its config groups: "
            f"{', '.join(ignored)}",
            processes_from_environment(),
        )
    if config.data.max_len < source.data.max_len:
        announce(
            f"data.max_len={config.data.max_len} is less than the source's {source.data.max_len}: the fine-tuned model "
            f"is for proteins of up to {config.data.max_len} residues",
            processes_from_environment(),
        )
    if source.data.context != "none" == config.data.context:
        announce(
            f"warning: the source was trained with data.context={source.data.context}, but this run has "
            "data.context=none, so it trains on all residues",
            processes_from_environment(),
        )
    return replace(resolved, from_sha256=checksum)


def keys_set_by_experiment() -> set[str]:
    """Return the config keys and groups that the chosen experiment, or an experiment in its `defaults`, sets."""
    runtime = HydraConfig.get().runtime
    folders = [Path(source.path) / "experiment" for source in runtime.config_sources if source.schema == "file"]

    def keys_of(experiment: str) -> set[str]:
        file = next((file for folder in folders if (file := folder / f"{experiment}.yaml").is_file()), None)
        if file is None:
            return set()
        content = dict(OmegaConf.to_container(OmegaConf.load(file)) or {})  # type: ignore[arg-type]
        found: set[str] = set()
        for entry in content.pop("defaults", []):
            if isinstance(entry, dict):  # an entry such as `override /model: tiny`
                found |= {str(key).split()[-1].lstrip("/") for key in entry}
            elif entry != "_self_":
                found |= keys_of(entry)
        return found | set(flatten(content))

    chosen = runtime.choices.get("experiment")
    return keys_of(chosen) if chosen else set()
