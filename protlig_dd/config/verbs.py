"""The configurations of all verbs (commands `python -m protlig_dd.VERB`) except training, which has train.py."""

from typing import Any, Literal

from pydantic.dataclasses import dataclass

from protlig_dd.config.fields import (
    STRICT,
    AtLeast0,
    AtLeast1,
    AtLeast2,
    Auto,
    Even,
    Fraction,
    Number,
    NumberOrAuto,
    SplitName,
    Whole,
)


@dataclass(config=STRICT)
class FilterConfig:
    min_length: AtLeast1
    max_length: AtLeast1 | None
    max_unknown: Fraction
    fragments: bool
    duplicates: bool
    taxa: list[int] | None
    taxa_nodes: str | None


@dataclass(config=STRICT)
class SplitConfig:
    validation_fraction: Fraction
    test_fraction: Fraction
    check: Literal["mmseqs"] | None
    on_hit: Literal["move", "drop"]


@dataclass(config=STRICT)
class MembersConfig:
    clusters: str | None
    store: str | None
    table: str | None


@dataclass(config=STRICT)
class PrepareConfig:
    input: Any
    output: str | None
    inspect: str | None
    workers: NumberOrAuto
    filter: FilterConfig
    split: SplitConfig
    members: MembersConfig


@dataclass(config=STRICT)
class SampleConfig:
    from_: str  # `from` on the command line and in YAML
    output: str
    n: AtLeast1
    lengths: str
    steps: AtLeast1
    predictor: str
    temperature: Number
    top_p: Number
    log_bias: Any
    nll_draws: AtLeast0
    seed: AtLeast0
    device: str
    precision: str
    tokens_per_pack: AtLeast1


@dataclass(config=STRICT)
class VariantsConfig:
    from_: str
    assay: str | None
    target: str | None
    reference: str | None
    output: str
    column: str
    offset: Whole | None
    bad_rows: Literal["fail", "skip"]
    strategy: str
    draws: Even
    seed: AtLeast0
    device: str
    precision: str
    tokens_per_pack: AtLeast1


@dataclass(config=STRICT)
class InfillConfig:
    from_: str
    input: str
    output: str
    map: str | None
    n: AtLeast1
    free: Any  # ranges such as 12-40, or a list of them
    fixed: Any
    context: Literal["lower", "upper"] | None
    contig: str | None
    lengths: str | None
    best: AtLeast1 | None
    steps: AtLeast1
    predictor: str
    temperature: Number
    top_p: Number
    log_bias: Any
    free_draws: AtLeast0
    nll_draws: AtLeast0
    seed: AtLeast0
    device: str
    precision: str
    tokens_per_pack: AtLeast1


@dataclass(config=STRICT)
class EmbedConfig:
    from_: str
    input: str
    output: str
    pooling: Literal["mean", "per_residue"]
    layer: Whole
    long: Literal["error", "window"]
    device: str
    precision: str
    tokens_per_pack: AtLeast1


@dataclass(config=STRICT)
class EvaluateConfig:
    from_: str
    input: str
    split: SplitName
    train: str | None
    compare: str | None
    context: Literal["auto", "none", "lower", "upper"]
    near: Auto
    output: str
    draws: AtLeast1
    masked: bool
    max_sequences: AtLeast1 | None
    seed: AtLeast0
    device: str
    precision: str
    tokens_per_pack: AtLeast1


@dataclass(config=STRICT)
class ScoreConfig:
    from_: str
    input: str | None
    sequence: str | None
    output: str | None
    context: Literal["auto", "none", "lower", "upper"]
    pseudo: Auto
    draws: AtLeast1
    seed: AtLeast0
    device: str
    precision: str
    tokens_per_pack: AtLeast1


@dataclass(config=STRICT)
class JudgeConfig:
    samples: str
    natural: str
    split: SplitName
    train: str | None
    output: str
    mmseqs: Auto
    hmm: str | None
    esm2: str | None
    esmfold: str | None
    bootstrap: AtLeast2
    seed: AtLeast0
    device: str


@dataclass(config=STRICT)
class ReportPageConfig:
    runs: Any  # a run folder, a folder of runs, a pattern, or a list of these
    output: str | None


@dataclass(config=STRICT)
class ExportConfig:
    from_: str
    to: str


@dataclass(config=STRICT)
class ConvertConfig:
    from_: str
    to: str
    revision: str | None
