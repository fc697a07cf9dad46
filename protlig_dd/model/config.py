"""The configuration of a network."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

COMPUTE_ONLY = "affects how the network is computed, not which function it computes"
ADDED_LATER = (
    "left out of files if its value is the default, so that earlier versions of the program can read the files"
)
TUNABLE = "may be changed when the network is fine-tuned"
OF_THE_RUN = "belongs to a run, not to its network: fine-tuning never takes it from the source model"
NORMS = ("layer", "rms")
MLPS = ("gelu", "gelu_erf", "geglu", "swiglu", "relu2")
HEADS = ("linear", "lm")
ADAPTED = ("attention", "mlp")  # the choices of model.lora.layers


@dataclass(frozen=True)
class LoraConfig:
    """The keys of `model.lora`, which are documented in configs/model/*.yaml."""

    rank: int | None = None
    alpha: float | None = None
    layers: list[str] = field(default_factory=lambda: list(ADAPTED))
    others: bool = False

    @property
    def scale(self) -> float:
        """The factor alpha / rank of the adapters' products B A."""
        assert self.rank is not None
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def description(self) -> str:
        """What a run with adapters trains, as in `LoRA rank 16 in attention, mlp`."""
        alpha = "" if self.alpha is None else f" (alpha {self.alpha:g})"
        layers = [f"in {', '.join(self.layers)}"] if self.layers else []
        others = ["the embedding and the output head"] if self.others else []
        return f"LoRA rank {self.rank}{alpha} {' and '.join(layers + others)}"


@dataclass
class ModelConfig:
    """The keys of `model`, which are documented in configs/model/*.yaml."""

    hidden_size: int
    n_heads: int
    n_blocks: int
    cond_dim: int
    dropout: Annotated[float, TUNABLE]
    attention_backend: Annotated[str, COMPUTE_ONLY]
    norm: str
    mlp: str
    qk_norm: bool
    checkpointing: Annotated[bool, COMPUTE_ONLY]
    positions: Annotated[str, ADDED_LATER] = "rope"
    mixers: Annotated[Any, ADDED_LATER] = "attention"  # one name for all blocks, or a list of one name per block
    max_positions: Annotated[int | None, ADDED_LATER] = None
    tie_weights: Annotated[bool, ADDED_LATER] = False
    sinusoid_scale: Annotated[float | None, ADDED_LATER] = None
    attention_bias: Annotated[bool, ADDED_LATER] = False
    norm_eps: Annotated[float | None, ADDED_LATER] = None
    rotary_frequencies: Annotated[list[float] | None, ADDED_LATER] = None
    head: Annotated[str, ADDED_LATER] = "linear"
    token_dropout: Annotated[bool, ADDED_LATER] = False
    lora: Annotated[LoraConfig, ADDED_LATER, OF_THE_RUN] = LoraConfig()

    def __post_init__(self) -> None:
        if isinstance(self.mixers, tuple):
            self.mixers = list(self.mixers)
        listed = isinstance(self.mixers, list) and len(self.mixers) > 0
        if listed and len(self.mixers) == self.n_blocks == self.mixers.count(self.mixers[0]):
            self.mixers = self.mixers[0]  # one name instead of a list, so that equal networks have equal configs

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.n_heads

    @property
    def attention_blocks(self) -> list[int]:
        """The numbers of the blocks whose mixer is attention, counted from 0."""
        names = self.mixers if isinstance(self.mixers, list) else [self.mixers] * self.n_blocks
        return [number for number, name in enumerate(names) if name == "attention"]


def unknown_choice(key: str, value: object, choices: Iterable[str]) -> str:
    """Return an error message that lists the choices and suggests the nearest."""
    names = list(choices)
    nearest = difflib.get_close_matches(str(value), names, n=1)
    return f"{key}={value}: choose from {', '.join(names)}" + (f"; did you mean {nearest[0]!r}?" if nearest else "")


def stored_model(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of `model` and their values as files store them.

    A key that is marked ADDED_LATER is left out if it has its default, so that earlier versions of the program can read
    the file.

    Args:
        values: the keys of `model` and their values. Files of earlier versions may have `mixer`, the mixer of all
            blocks, which is renamed to `mixers`.
    """
    renamed = {"mixers" if key == "mixer" and "mixers" not in values else key: value for key, value in values.items()}
    return without_added_defaults(renamed, ModelConfig)


def without_added_defaults(values: Mapping[str, Any], schema: Any) -> dict[str, Any]:
    """Return the values of a config group whose dataclass is `schema`.

    A key that `schema` marks ADDED_LATER is left out if it has its default.
    """
    hints = get_type_hints(schema, include_extras=True)
    later = {field.name: field.default for field in fields(schema) if ADDED_LATER in get_args(hints[field.name])}
    later |= {key: asdict(value) for key, value in later.items() if is_dataclass(value) and not isinstance(value, type)}
    return {key: value for key, value in values.items() if key not in later or value != later[key]}
