"""The configuration's schema and its checks; components.py makes networks, graphs and schedules of it.

Values, defaults and their one-line comments live in configs/*.yaml; here are the types. A key that is not here is an
error, so a misspelt override can never be ignored.
"""

import inspect
import keyword
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from protlig_dd.diffusion.graph import GRAPHS, Absorbing, Graph
from protlig_dd.diffusion.noise import NOISES
from protlig_dd.diffusion.rates import substitution_rates
from protlig_dd.runtime.components import TRAINING_NOISE, ModelConfig, unknown_key
from protlig_dd.runtime.components import build_graph as build_graph  # those who read a config build from it
from protlig_dd.runtime.components import build_model as build_model
from protlig_dd.runtime.components import build_noise as build_noise

T = TypeVar("T")


@dataclass
class RunConfig:
    name: str
    fresh: bool
    resume: str


@dataclass
class DataConfig:
    path: Any  # a store, or a list of them
    weights: list[float] | None
    max_len: int
    crop: str
    tokens_per_pack: int
    workers: int


@dataclass
class OptimConfig:
    name: str
    lr: float
    min_lr_ratio: float
    warmup_steps: int
    betas: list[float]
    eps: float
    weight_decay: float
    grad_clip: float
    packs_per_step: int
    ema_decay: Any  # a number, or auto
    momentum: float
    schedule: str
    decay_share: float


@dataclass
class TrainerConfig:
    max_steps: int | None
    epochs: float | None
    stop_at_step: int | None
    device: str
    precision: str
    log_every: int
    log_rows: bool
    eval_every: int
    eval_draws: int
    eval_max_sequences: int
    checkpoint_every: int
    keep_last: int
    keep_every: int | None
    devices: Any  # a number, or auto
    max_restarts: int
    max_time: str | None
    stop_within: int
    timeout: int
    loss_spike: float | None
    compile: Any = "auto"  # true, false or auto


@dataclass
class LoggerConfig:
    tensorboard: bool
    wandb_project: str | None
    wandb_name: str | None
    wandb_mode: str | None = None


@dataclass
class ReportConfig:
    split: str
    max_sequences: int
    draws: int
    samples: int
    steps: int
    predictor: str
    untrained: bool


@dataclass
class TrainConfig:
    run: RunConfig
    seed: int
    data: DataConfig
    model: ModelConfig
    graph: dict[str, Any]
    noise: dict[str, Any]
    parametrisation: str
    time_conditioning: Any  # true, false or auto; in a run's own config no longer auto
    optim: OptimConfig
    trainer: TrainerConfig
    logger: LoggerConfig
    report: ReportConfig
    plan: bool = False
    from_: str | None = None
    from_sha256: str | None = None


@dataclass
class FilterConfig:
    min_length: int
    max_length: int | None
    max_unknown: float
    fragments: bool
    duplicates: bool
    taxa: list[int] | None
    taxa_nodes: str | None


@dataclass
class SplitConfig:
    validation_fraction: float
    test_fraction: float
    check: str | None
    on_hit: str


@dataclass
class PrepareConfig:
    input: Any
    output: str | None
    inspect: str | None
    filter: FilterConfig
    split: SplitConfig


@dataclass
class SampleConfig:
    from_: str  # `from` on the command line and in YAML
    output: str
    n: int
    lengths: str
    steps: int
    predictor: str
    temperature: float
    top_p: float
    log_bias: Any
    nll_draws: int
    seed: int
    device: str
    precision: str
    tokens_per_pack: int


@dataclass
class VariantsConfig:
    from_: str
    assay: str | None
    target: str | None
    reference: str | None
    output: str
    column: str
    offset: int | None
    bad_rows: str
    strategy: str
    draws: int
    seed: int
    device: str
    precision: str
    tokens_per_pack: int


@dataclass
class InfillConfig:
    from_: str
    input: str
    output: str
    map: str | None
    n: int
    free: Any  # ranges such as 12-40, or a list of them
    fixed: Any
    contig: str | None
    lengths: str | None
    best: int | None
    steps: int
    predictor: str
    temperature: float
    top_p: float
    log_bias: Any
    free_draws: int
    nll_draws: int
    seed: int
    device: str
    precision: str
    tokens_per_pack: int


@dataclass
class EmbedConfig:
    from_: str
    input: str
    output: str
    pooling: str
    layer: int
    long: str
    device: str
    precision: str
    tokens_per_pack: int


@dataclass
class EvaluateConfig:
    from_: str
    input: str
    split: str
    train: str | None
    compare: str | None
    near: Any  # true, false or auto
    output: str
    draws: int
    masked: bool
    max_sequences: int | None
    seed: int
    device: str
    precision: str
    tokens_per_pack: int


@dataclass
class JudgeConfig:
    samples: str
    natural: str
    split: str
    train: str | None
    output: str
    mmseqs: Any  # true, false or auto
    hmm: str | None
    esm2: str | None
    esmfold: str | None
    bootstrap: int
    seed: int
    device: str


@dataclass
class ReportPageConfig:
    runs: Any  # a run's folder, a folder of runs, a pattern, or a list of them
    output: str | None


@dataclass
class ExportConfig:
    from_: str
    to: str


# What may differ when a run is resumed, whole groups (with a dot at their end) and single keys. trainer.max_steps and
# trainer.epochs move the end of the learning rate's cosine; trainer.precision and model.attention_backend are compared
# as resolved, and of data.path the fingerprint.
RESUMABLE = (
    "plan",
    "run.",
    "trainer.",
    "logger.",
    "report.",
    "data.path",
    "data.workers",
    "model.attention_backend",
    "model.checkpointing",
)


MAX_WEIGHT = 10.0  # docs/performance.md
COMPONENTS: dict[str, Mapping[str, Callable[..., Any]]] = {"graph": GRAPHS, "noise": NOISES}


def config_folder() -> Path:
    """The shipped configs: inside an installed package, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def read_config(cfg: DictConfig, schema: type[T]) -> T:
    """Check a composed config against its schema and return it as that dataclass.

    Raises:
        ValueError: an unknown key (with the nearest known one), a missing value, or a value of the wrong type.
    """
    values = {str(key): value for key, value in cfg.items_ex(resolve=False)}
    fields = {f"{key}_" if keyword.iskeyword(key) else key: value for key, value in values.items()}
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), fields))
    except ConfigKeyError as error:
        raise ValueError(unknown_key(str(error.full_key), known_keys(schema))) from error
    except MissingMandatoryValue as error:
        key = str(error.full_key).removesuffix("_")
        raise ValueError(f"{key} is required: give {key}=...") from error
    except OmegaConfBaseException as error:
        what = str(error).splitlines()[0]
        if "is not a ListConfig" in what:
            what = "give a list: [a] or [a,b]"
        raise ValueError(f"{error.full_key}: {what}") from error
    assert isinstance(typed, schema)
    return at_home(typed)


def at_home(value: Any) -> Any:
    """The value with the home folder for a `~` that paths in it begin with, which shells leave behind `key=`."""
    if isinstance(value, str):
        return str(Path(value).expanduser()) if value == "~" or value.startswith("~/") else value
    if isinstance(value, list):
        return [at_home(one) for one in value]
    if isinstance(value, dict):
        return {key: at_home(one) for key, one in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: at_home(getattr(value, field.name)) for field in dataclass_fields(value)})
    return value


def spelt(config: Any) -> dict[str, Any]:
    """A config as YAML and the command line spell it: `from`, not `from_`."""
    return {key.removesuffix("_"): value for key, value in asdict(config).items()}


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


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every key that differs and may not when a run is resumed."""
    old_flat, new_flat = flatten(old), flatten(new)
    keys = [key for key in sorted(old_flat | new_flat) if not key.startswith(RESUMABLE)]
    return [
        f"{key}: {shorten(str(old_flat.get(key)))} -> {shorten(str(new_flat.get(key)))}"
        for key in keys
        if old_flat.get(key) != new_flat.get(key)
    ]


def shorten(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:80]}..."


def resolve_max_weight(spec: Mapping[str, Any], graph: Graph) -> float | None:
    """The cap on the loss' weight that a noise's config asks for; `auto` is MAX_WEIGHT where it was found to help."""
    wanted = spec.get("max_weight")
    if wanted == "auto":
        return MAX_WEIGHT if isinstance(graph, Absorbing) else None
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
