"""The configurations of the verbs that use a model or data."""

from dataclasses import dataclass
from typing import Any

from protlig_dd.config.components import build_graph as build_graph
from protlig_dd.config.components import build_model as build_model
from protlig_dd.config.components import build_noise as build_noise


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
