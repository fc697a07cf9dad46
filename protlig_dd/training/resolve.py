"""Complete a config with everything that defines the run."""

from dataclasses import replace
from pathlib import Path

from protlig_dd.config.components import build_graph, graph_with_rates
from protlig_dd.config.train import TrainConfig, check_train_config
from protlig_dd.model.layers import EMBEDDING_STD
from protlig_dd.model.positions import POSITIONS
from protlig_dd.training.finetune import resolve_source_model
from protlig_dd.training.resume import graph_of_run


def resolve(config: TrainConfig, path: Path) -> TrainConfig:
    """Return the config, completed by the values that follow from other settings.

    - The network, graph, noise, parametrisation and time conditioning are those of the model of `from=`, if it is set.
    - The graph's config gets the rates of its matrix file, if it has one.
    - `model.max_positions`, if null, becomes the largest number of tokens in a sequence, for position encodings that
      have a limit.
    - `model.sinusoid_scale`, if null, becomes the standard deviation of the initial embeddings, for position encodings
      that add sinusoids.
    - `time_conditioning`, if auto, becomes true or false.

    This function writes nothing and does not change the given config. A training run changes only `run.fresh` and
    `run.resume` after this.

    Args:
        path: the run folder.

    Raises:
        ValueError: some values cannot work together, or do not match the model of `from=`.
    """
    if config.from_ is not None:
        config = resolve_source_model(config, path)
    earlier = {} if config.run.fresh else graph_of_run(path)
    config = replace(config, graph=graph_with_rates(config.graph, earlier))
    kind = POSITIONS.get(config.model.positions)  # `check_train_config` reports an unknown kind
    if kind is not None and kind.limited and config.model.max_positions is None:
        tokens = config.data.max_len + 2  # <bos> and <eos>
        config = replace(config, model=replace(config.model, max_positions=tokens))
    if kind is not None and kind.scaled and config.model.sinusoid_scale is None and config.from_ is None:
        config = replace(config, model=replace(config.model, sinusoid_scale=EMBEDDING_STD))
    check_train_config(config)
    if config.time_conditioning == "auto":
        time_free = build_graph(config.graph).time_free_with(config.parametrisation)
        config = replace(config, time_conditioning=not time_free)
    return config
