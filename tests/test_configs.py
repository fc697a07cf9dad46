"""Tests of the shipped configs and of the command line.

The configs compose, match the schema and state the right model sizes.
"""

import re
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from protlig_dd.config.cli import quoted, run_verb
from protlig_dd.config.components import build_model
from protlig_dd.config.read import (
    as_dict,
    as_yaml,
    config_folder,
    defaults_of,
    expand_home,
    flatten,
    known_keys,
    read_config,
)
from protlig_dd.config.train import (
    TrainConfig,
    all_settings,
    changed_keys,
    check_train_config,
    config_in,
    may_change,
    recorded_config,
)
from protlig_dd.config.verbs import (
    EmbedConfig,
    EvaluateConfig,
    ExportConfig,
    InfillConfig,
    JudgeConfig,
    PrepareConfig,
    ReportPageConfig,
    SampleConfig,
    ScoreConfig,
    VariantsConfig,
)
from protlig_dd.data.store import SequenceStore
from protlig_dd.training.build import run

from .conftest import ROOT, Command, assert_one_line_error, composed


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


@pytest.mark.slow
def test_every_option_of_every_group_is_valid() -> None:
    for group in ("model", "graph", "noise", "optim", "data", "logger", "experiment"):
        assert options(group)
        for option in options(group):
            matrix = ["graph.matrix=BLOSUM80"] if option == "substitution" else []
            check_train_config(read_config(composed(f"{group}={option}", *matrix), TrainConfig))
    check_train_config(read_config(composed(name="config_uniref50_stable"), TrainConfig))
    read_config(composed("input=a.fasta", name="prepare"), PrepareConfig)
    read_config(composed("from=runs/demo", name="sample"), SampleConfig)
    read_config(composed("runs=[runs/demo]", name="report"), ReportPageConfig)
    read_config(composed("from=runs/demo", "input=a.fasta", name="infill"), InfillConfig)
    read_config(composed("from=runs/demo", "input=a.fasta", name="evaluate"), EvaluateConfig)
    read_config(composed("samples=a.fasta", "natural=b.fasta", name="judge"), JudgeConfig)
    read_config(composed("from=runs/demo", "input=a.fasta", name="embed"), EmbedConfig)
    read_config(composed("from=runs/demo", name="score"), ScoreConfig)
    read_config(composed("from=runs/demo", "to=models/demo", name="export"), ExportConfig)
    read_config(composed("from=runs/demo", name="variants"), VariantsConfig)


def test_every_key_has_a_default_and_only_listed_keys_may_change_on_resume() -> None:
    keys = set(flatten(composed()))
    schema = {key for key in known_keys(TrainConfig) if not key.startswith(("graph.", "noise."))}
    assert schema <= keys
    changeable = {key for key in keys if may_change(key)}
    groups = {key for key in keys if key.startswith(("run.", "trainer.", "logger.", "report."))}
    single = {"plan", "data.path", "data.members", "data.workers", "model.attention_backend", "model.checkpointing"}
    assert changeable == groups | single


@pytest.mark.parametrize(
    "name",
    [
        "größe.fasta",
        "uniprot (1).fasta",
        "epoch=1.fasta",
        "a'b.fasta",
        'a"b.fasta',
        "a\\b.fasta",
        "c:\\",
        "[1,2",
        "a b",
        "a{b",
        "x,(y",
        "~/p.fasta",
        "$HOME",
        'a\\"b(',
    ],
)
def test_a_file_may_have_any_name(name: str) -> None:
    """Names that Hydra's grammar would misread are quoted."""
    override = OverridesParser.create().parse_override(quoted(f"input={name}"))
    assert override.value() == name or override.is_sweep_override()
    assert quoted("optim.lr=1e-3,2e-3") == "optim.lr=1e-3,2e-3"  # valid values are not quoted
    assert quoted("free=[12-40,77]") == "free=[12-40,77]"
    assert quoted("--help") == "--help"


def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    cfg = composed(quoted("from=~/runs/a"), quoted("output=~/b.fasta"), name="sample")
    config = read_config(cfg, SampleConfig)
    assert (config.from_, config.output) == ("/home/me/runs/a", "/home/me/b.fasta")
    assert expand_home(["~", "~other/x", "a~/b", {"x": "~/y"}]) == ["/home/me", "~other/x", "a~/b", {"x": "/home/me/y"}]


def test_the_rank_variables_of_a_launcher_are_checked(run_python: Command) -> None:
    done = run_python("-m", "protlig_dd.prepare", "input=x.fasta", "output=x.h5", RANK="", WORLD_SIZE="")
    assert_one_line_error(done, "x.fasta: no such file")
    assert_one_line_error(
        run_python("-m", "protlig_dd.prepare", "input=x.fasta", "output=x.h5", RANK="one"), "RANK=one: must be a number"
    )
    rank_1 = run_python("-m", "protlig_dd.prepare", "input=x.fasta", "output=x.h5", RANK="1", WORLD_SIZE="2")
    assert rank_1.stderr == "[rank 1] nothing to do: RANK=1 is set, and rank 0 does all the work\n"


def test_every_default_has_a_comment() -> None:
    for path in config_folder().rglob("*.yaml"):
        if path.stem in ("verb", "config_uniref50_stable") or path.parent.name == "experiment":
            continue
        for line in path.read_text().split("\nhydra:")[0].splitlines():
            key, colon, value = line.partition(":")
            if colon and value.strip() and not key.strip().startswith(("#", "-")) and key.strip() != "name":
                assert "#" in line or key.strip() in ("dropout", "n_blocks", "eps", "seed", "betas", "test_fraction"), (
                    f"{path.name}: {line}"
                )


@pytest.mark.parametrize(("preset", "millions"), [("tiny", 1.6), ("small", 35), ("medium", 150), ("large", 650)])
def test_presets_have_the_size_that_they_state(preset: str, millions: float) -> None:
    config = read_config(composed(f"model={preset}"), TrainConfig)
    with torch.device("meta"):
        model = build_model(config.model, "sdpa", time_conditioning=False)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(millions * 1e6, rel=0.07)
    stated = (config_folder() / "model" / f"{preset}.yaml").read_text().splitlines()[0]
    assert stated.startswith(f"# {count / 1e6:.1f} M" if count < 1e7 else f"# {count / 1e6:.0f} M")


@pytest.mark.parametrize("recipe", options("experiment"))
def test_stop_within_is_long_enough_for_the_checkpoint_of_a_recipe(recipe: str) -> None:
    """`stop_within` is more than twice the time that is needed to write the recipe's checkpoint.

    A table in docs/reliability.md has this time for the medium model on 2 CPU cores. The time is assumed to be
    proportional to the size of the checkpoint, which is 12 bytes per parameter with Muon.
    """
    table = (ROOT / "docs/reliability.md").read_text()
    (row,) = re.findall(r"^\| medium, 149 M \| ([\d,]+) \| [\d.]+ \| [\d.]+ \| ([\d.]+) \|", table, re.MULTILINE)
    seconds = float(row[1]) / (149e6 * 12)
    config = read_config(composed(f"experiment={recipe}"), TrainConfig)
    with torch.device("meta"):
        model = build_model(config.model, "sdpa", time_conditioning=False)
    size = 12 * sum(parameter.numel() for parameter in model.parameters())
    assert config.trainer.stop_within > 2 * size * seconds


def test_changed_keys_name_both_values_and_leave_out_keys_that_may_change() -> None:
    old = OmegaConf.to_container(composed())
    new = OmegaConf.to_container(composed("optim.lr=0.5", "trainer.max_steps=5", "graph=uniform"))
    assert isinstance(old, dict)
    assert isinstance(new, dict)
    assert changed_keys(old, new) == ["graph.name: absorbing -> uniform", "optim.lr: 0.003 -> 0.5"]


def test_a_change_of_a_key_that_a_file_leaves_out_is_shown_with_its_default(tmp_path: Path) -> None:
    """Configs of earlier versions do not contain newer keys.

    This version leaves out a newer key that has its default value, so that earlier versions can read the config.
    """
    others = {
        "model.positions": "t5",
        "model.mixers": "ttt_linear",
        "model.max_positions": 700,
        "model.tie_weights": True,
        "model.sinusoid_scale": 0.5,
        "model.attention_bias": True,
        "model.norm_eps": 0.01,
        "model.rotary_frequencies": [1.0, 0.5],
        "model.head": "lm",
        "model.token_dropout": True,
        "model.lora.rank": 4,
        "model.lora.alpha": 8.0,
        "model.lora.layers": ["mlp"],
        "model.lora.others": True,
        "data.context": "lower",
        "data.order": "blocks",
        "from": "runs/a",
        "from_sha256": "0" * 64,
    }
    defaults = {key: value for key, value in defaults_of(TrainConfig).items() if not may_change(key)}
    assert defaults.keys() == others.keys()  # a key that is added later must be added to `others`
    plain = read_config(composed("model=tiny"), TrainConfig)
    for key, value in others.items():
        other = read_config(composed("model=tiny", f"{key}={value}"), TrainConfig)
        for before, now, message in (
            (plain, other, f"{key}: {defaults[key]} -> {value}"),
            (other, plain, f"{key}: {value} -> {defaults[key]}"),
        ):
            (tmp_path / "config.yaml").write_text(as_yaml(before))
            assert changed_keys(recorded_config(tmp_path), as_dict(now)) == [message]
        of_earlier_version = as_dict(plain)
        group, _, name = key.partition(".")
        (of_earlier_version[group] if name else of_earlier_version).pop(name.partition(".")[0] or group, None)
        assert changed_keys(of_earlier_version, as_dict(other)) == [f"{key}: {defaults[key]} -> {value}"]
        assert changed_keys(of_earlier_version, as_dict(plain)) == []
    assert all_settings({"trainer": {"epochs": 2}})["trainer.compile"] == "auto"  # earlier versions do not have the key


def test_the_config_of_a_run_is_read_without_the_limits_on_new_values(tmp_path: Path) -> None:
    values = as_dict(read_config(composed("model=tiny", "noise.curriculum=1e3"), TrainConfig))
    assert values["noise"]["curriculum"] == 1000
    # newer keys are left out at their defaults, so that earlier versions can read the config
    assert not {"positions", "mixers"} & values["model"].keys()
    values["optim"]["min_lr_ratio"], values["report"]["draws"] = 1.5, 0
    with pytest.raises(ValueError, match=r"optim.min_lr_ratio must be at most 1, got 1.5"):
        read_config(OmegaConf.create(values), TrainConfig)
    OmegaConf.save(OmegaConf.create(values), tmp_path / "config.yaml")
    saved = config_in(tmp_path)
    assert (saved.optim.min_lr_ratio, saved.report.draws, saved.model.positions) == (1.5, 0, "rope")
    assert changed_keys(recorded_config(tmp_path), as_dict(saved)) == []


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["optim.lrx=3"], ["'optim.lrx'", "'optim.lr'"]),
        (["+noise.sigma=3"], ["'noise.sigma'", "'noise.eps'"]),
        (["optim.lr=fast"], ["optim.lr=fast", "valid number"]),
        (["experiment=dmeo"], ["experiment=dmeo: choose from demo, uniref50_150m"]),
        (["run.name=a,b"], ["run.name=a,b: write several values as one list: run.name=[a,b]"]),
        (["run.name=[a,b]"], ["run.name=[a,b]: give one value, not a list"]),
        (["model.hidden_size=2560", "model.n_heads=120"], ["hidden_size=2560", "n_heads=120"]),
        (["model.hidden_size=36", "model.n_heads=4"], ["hidden_size=36", "n_heads=4", "head_dim 9"]),
        (["model.mixer=attention"], ["'model.mixer'", "'model.mixers'"]),
        (["model.mixers=[attention,ttt_linear]"], ["model.mixers has 2 names", "model.n_blocks=11"]),
        (["model.mixers=ttt"], ["model.mixers=ttt: choose from attention, ttt_linear, ttt_mlp"]),
        (["data.path=none.h5"], ["none.h5", "no such data file"]),
        (["data.tokens_per_pack=500"], ["tokens_per_pack=500", "max_len=1024"]),
        (["model.attention_backend=flash_attn", "trainer.device=cpu"], ["flash_attn runs on CUDA", "device is cpu"]),
        (["graph=uniform", "parametrisation=x0", "time_conditioning=false"], ["time_conditioning=false", "absorbing"]),
        (["+graph.n_states=5"], ["'graph.n_states'"]),
        (["noise.curiculum=3"], ["'noise.curiculum'", "'noise.curriculum'"]),
        (["noise=loglinear", "noise.sigma_max=3"], ["the chosen noise has no key noise.sigma_max"]),
        (["noise.epss=0.1"], ["'noise.epss'", "'noise.eps'"]),
        (["modle=tiny"], ["'modle'", "'model'"]),
        (["graph=blosum62", "graph.matrix=BLOSUM61"], ["BLOSUM61", "BLOSUM62"]),
        (["graph=substitution"], ["graph.matrix"]),
        (["graph=blosum62", "report.predictor=ancestral"], ["ancestral", "absorbing"]),
        (["noise.curriculum=-1"], ["noise.curriculum", "at least 0", "-1"]),
        (["optim.name=sgd"], ["optim.name=sgd", "adamw"]),
        (["optim.min_lr_ratio=-3"], ["optim.min_lr_ratio", "at least 0", "-3"]),
        (["optim.weight_decay=-1"], ["optim.weight_decay", "at least 0", "-1"]),
        (["trainer.max_steps=null", "trainer.epochs=nan"], ["trainer.epochs", "above 0", "nan"]),
        (["graph.name=gamma"], ["graph.name=gamma", "absorbing, uniform"]),
        (["trainer.epochs=2"], ["trainer.max_steps=400000", "trainer.epochs=2"]),
        (["trainer.log_every=0"], ["trainer.log_every", "at least 1", "0"]),
        (["noise.eps=high"], ["noise.eps=high", "give a number"]),
        (["graph=uniform", "noise=cosine", "noise.eps=[1]"], ["noise.eps=[1]", "give a number"]),
        (["data.path=null"], ["data.path", "give a store"]),
        (["logger.wandb_mode=of"], ["logger.wandb_mode=of", "online, offline"]),
        (["report.split=dev"], ["report.split=dev", "train, validation, test"]),
        (["run.name=../elsewhere"], ["run.name", "plain folder name"]),
        (["run.name=my run"], ["run.name='my run'", "must not contain white space"]),
    ],
)
def test_a_wrong_config_is_a_one_line_error_before_data_are_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["protlig_dd.training", *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as stop:
        run_verb(run, "train", TrainConfig)
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    for part in parts:
        assert part in line
    assert list(tmp_path.iterdir()) == []


def test_help_explains_every_key(run_python: Command) -> None:
    text = run_python("-m", "protlig_dd.sample", "--help").stdout
    assert "Sample new proteins from a trained model." in text
    for line in (ROOT / "configs/sample.yaml").read_text().splitlines():
        assert line.startswith(("#", "defaults:", "  - ")) or line.strip() in text


def test_help_shows_the_chosen_options(run_python: Command) -> None:
    text = run_python("-m", "protlig_dd.training", "graph=pam250", "noise=geometric", "--help").stdout
    assert "matrix: PAM250" in text
    assert "sigma_max: null" in text
    assert_one_line_error(run_python("-m", "protlig_dd.training", "graph=nope", "--help"), "graph=nope: choose from")
    assert "model=tiny " in run_python("-m", "protlig_dd.training", "experiment=demo", "--help").stdout
    several = ["~experiment", "graph=uniform,absorbing", "experiment=null", "--help"]
    assert "name: uniform" in run_python("-m", "protlig_dd.training", *several).stdout
    assert_one_line_error(run_python("-m", "protlig_dd.sample", "graph=uniform"), "this command has no 'graph'")


def test_an_unknown_flag_is_a_one_line_error(run_python: Command) -> None:
    assert_one_line_error(run_python("-m", "protlig_dd.sample", "--prod"), "--prod", "key=value")


def test_hydra_full_error_prints_the_traceback(run_python: Command) -> None:
    command = ["-m", "protlig_dd.training", "data.path=none.h5"]
    assert_one_line_error(run_python(*command), "none.h5: no such data file")
    assert "Traceback" in run_python(*command, HYDRA_FULL_ERROR="1").stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_device_cuda_without_cuda_is_a_one_line_error(run_python: Command, tmp_path: Path) -> None:
    for arguments in (
        ["-m", "protlig_dd.training", "trainer.device=cuda"],
        [
            "-m",
            "protlig_dd.training.run_train_uniref50_optimized",
            "--device",
            "cuda:1",
            "--config",
            str(config_folder() / "config_uniref50_stable.yaml"),
        ],
    ):
        assert_one_line_error(run_python(*arguments), "device=cuda", "CUDA is not available")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_plain_command_is_composed_once_and_a_sweep_is_left_to_hydra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("defaults: [train, _self_]\nhydra: {mode: MULTIRUN}\n")
    seen: list[tuple[float, bool]] = []

    def verb(cfg: DictConfig) -> None:
        assert "hydra" not in cfg
        seen.append((cfg.optim.lr, HydraConfig.get().mode == RunMode.MULTIRUN))

    def ran(*arguments: str) -> list[tuple[float, bool]]:
        seen.clear()
        monkeypatch.setattr("sys.argv", ["protlig_dd.training", *arguments])
        run_verb(verb, "train", TrainConfig)
        return list(seen)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with monkeypatch.context() as patch:
        patch.setattr("hydra.main", None)
        assert ran("optim.lr=0.5") == [(0.5, False)]
    assert ran("-m", "optim.lr=0.5,0.25") == [(0.5, True), (0.25, True)]
    assert ran("hydra.mode=MULTIRUN", "optim.lr=0.5,0.25") == [(0.5, True), (0.25, True)]
    other_config = ("--config-path", str(tmp_path), "--config-name", "mine")
    searched = f"hydra.searchpath=['file://{config_folder()}']"
    assert ran(*other_config, searched, "optim.lr=0.5,0.25") == [(0.5, True), (0.25, True)]
    with pytest.raises(SystemExit):
        ran("optim.lr=0.5,0.25")  # without -m
    assert "error: " in capsys.readouterr().err


def test_the_package_lists_its_verbs(run_python: Command) -> None:
    done = run_python("-m", "protlig_dd")
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines()[2:]]
    assert listed == sorted(
        [
            "convert",
            "embed",
            "evaluate",
            "export",
            "infill",
            "judge",
            "prepare",
            "report",
            "sample",
            "score",
            "training",
            "variants",
        ]
    )
    assert "judge      Judge generated proteins: compare them with natural held-out proteins" in done.stdout
    for verb, suggestion in (("evalute", "evaluate"), ("sample", "sample"), ("nothing-like-it", "VERB")):
        process = run_python("-m", "protlig_dd", verb, "from=runs/demo")
        message = f"`python -m protlig_dd {verb}` is not a command; use python -m protlig_dd.{suggestion}"
        assert_one_line_error(process, message)


def test_every_verb_that_reads_proteins_warns_of_dna(trained_run: Path, tmp_path: Path, run_python: Command) -> None:
    (tmp_path / "dna.fasta").write_text(f">gene\n{'ACGTTGCA' * 9}\n>rna\n{'ACGUNNACGU' * 5}\n>protein\nMKVLAWGCDE\n")
    warning = "warning: 2 of 3 sequences of {} look like DNA or RNA, and were read as proteins"
    source = f"from={trained_run}"
    for verb, *more in (
        ("prepare", "output=a.h5", "split.validation_fraction=0", "split.test_fraction=0"),
        ("embed", source, "output=b.h5"),
        ("evaluate", source, "output=c", "draws=1"),
        ("score", source, "output=c.csv", "draws=1", "pseudo=false"),
        ("infill", source, "output=d.fasta", "free=2", "n=1", "steps=2", "free_draws=0"),
    ):
        done = run_python("-m", f"protlig_dd.{verb}", "input=dna.fasta", *more)
        assert done.returncode == 0, done.stderr
        assert warning.format("the input" if verb == "prepare" else "dna.fasta") in " ".join(done.stdout.split())
    done = run_python("-m", "protlig_dd.variants", source, f"target={'ACGT' * 9}", "output=e.csv")
    assert "warning: 1 of 1 sequences of target= look like DNA or RNA" in " ".join(done.stdout.split())


MODEL = ("from=nowhere", "output=out")
MISSING: list[tuple[str, tuple[str, ...]]] = [
    ("sample", MODEL),
    ("sample", ("from=RUN/nowhere", "output=out")),
    ("sample", ("from=RUN/checkpoints/nowhere", "output=out")),
    ("sample", ("from=RUN", "output=out", "lengths=9", "log_bias=nowhere.csv")),
    ("infill", (*MODEL, "input=two.fasta", "free=2")),
    ("infill", ("from=RUN", "input=nowhere", "free=2", "output=out")),
    ("evaluate", (*MODEL, "input=two.fasta")),
    ("evaluate", ("from=RUN", "input=nowhere", "output=out")),
    ("evaluate", ("from=RUN", "input=two.fasta", "train=nowhere", "output=out")),
    ("score", ("from=nowhere", "input=two.fasta", "output=out.csv")),
    ("score", ("from=RUN", "input=nowhere", "output=out.csv")),
    ("embed", ("from=nowhere", "input=two.fasta", "output=out.h5")),
    ("embed", ("from=RUN", "input=nowhere", "output=out.h5")),
    ("variants", ("from=nowhere", "target=one.fasta", "output=out.csv")),
    ("variants", ("from=RUN", "target=nowhere.fasta", "output=out.csv")),
    ("variants", ("from=RUN", "target=one.fasta", "assay=nowhere", "output=out.csv")),
    ("variants", ("from=RUN", "assay=nowhere", "reference=one.fasta", "output=out")),
    ("variants", ("from=RUN", "assay=.", "reference=nowhere", "output=out")),
    ("judge", ("samples=nowhere", "natural=STORE", "output=out")),
    ("judge", ("samples=two.fasta", "natural=nowhere", "output=out")),
    ("judge", ("samples=two.fasta", "natural=STORE", "train=nowhere", "output=out")),
    ("judge", ("samples=two.fasta", "natural=STORE", "hmm=nowhere", "output=out")),
    ("export", ("from=nowhere", "to=out")),
    ("report", ("runs=[nowhere]", "output=out")),
    ("report", ("runs=nowhere", "output=out")),
    ("prepare", ("input=nowhere", "output=out.h5")),
    ("prepare", ("input=[two.fasta,nowhere]", "output=out.h5")),
    ("prepare", ("input={train: two.fasta, validation: nowhere, test: two.fasta}", "output=out.h5")),
    ("prepare", ("inspect=nowhere",)),
    ("prepare", ("input=two.fasta", "output=out.h5", "filter.taxa=[2]", "filter.taxa_nodes=nowhere")),
    ("training", ("experiment=demo", "data.path=nowhere")),
    ("training", ("experiment=demo", "data.path=[STORE,nowhere]")),
    ("training", ("experiment=demo", "data.path=STORE", "from=nowhere")),
    ("training", ("experiment=demo", "data.path=STORE", "run.resume=nowhere")),
    ("training", ("experiment=demo", "data.path=STORE", "graph=substitution", "graph.matrix=nowhere")),
]


@pytest.mark.slow
@pytest.mark.parametrize("verb", sorted({verb for verb, _ in MISSING}))
def test_a_missing_path_is_reported_as_missing(
    verb: str, trained_run: Path, store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    (tmp_path / "one.fasta").write_text(">a\nMKVLAWGCDEFH\n")
    (tmp_path / "two.fasta").write_text(">a\nMKVLAWGCDEFH\n>b\nMKVLAWGCDEFHA\n")
    before = sorted(tmp_path.rglob("*"))
    for options in (options for name, options in MISSING if name == verb):
        arguments = [option.replace("RUN", str(trained_run)).replace("STORE", str(store.path)) for option in options]
        process = run_python("-m", f"protlig_dd.{verb}", *arguments, HYDRA_FULL_ERROR="0")
        assert_one_line_error(process, "nowhere")
        assert re.search(
            r"nowhere\S* (does not exist|is neither a file)|no such (data )?(file|folder)", process.stderr
        ), options
        assert sorted(tmp_path.rglob("*")) == before


def test_every_from_key_names_the_same_three_sources() -> None:
    """The key's comment lists the sources, and --help prints this comment.

    `export` is left out, because an exported model cannot be exported again. `convert` reads models of others.
    """
    found = [path for path in (ROOT / "configs").glob("*.yaml") if re.search("^from:", path.read_text(), re.MULTILINE)]
    assert len(found) == 9
    for path in found:
        if path.stem in ("convert", "export"):
            continue
        (line,) = re.findall(r"^from:.*", path.read_text(), re.MULTILINE)
        assert re.search(r"a run( folder \(its newest checkpoint\))?, a checkpoint or an exported model", line), path
