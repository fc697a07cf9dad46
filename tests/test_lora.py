"""Low-rank adapters: their algebra, runs that train them, their checkpoints, and the use of the merged model."""

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from protlig_dd.config.components import build_model
from protlig_dd.config.read import as_dict, config_folder, read_config
from protlig_dd.config.train import (
    OPTIMIZERS,
    TrainConfig,
    changed_keys,
    check_train_config,
    config_in,
    recorded_config,
)
from protlig_dd.convert import convert
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.embed import embed_proteins
from protlig_dd.evaluate import evaluate
from protlig_dd.evaluation.likelihood.trained_on import find_source_model
from protlig_dd.export import export
from protlig_dd.hub import ProteinDiffusion
from protlig_dd.inference.adapters import BASE
from protlig_dd.inference.model import find_saved, load_trained
from protlig_dd.infill import infill
from protlig_dd.model.config import LoraConfig
from protlig_dd.model.dit import DiT
from protlig_dd.model.layers import StackedLinear
from protlig_dd.model.lora import LowRank, add_adapters, base_weights, merged_weights
from protlig_dd.model.mixers import MIXERS
from protlig_dd.report import report
from protlig_dd.runs.checkpoint import complete_checkpoints, trained_parameters
from protlig_dd.runs.metrics import read_metrics
from protlig_dd.sample import sample_proteins
from protlig_dd.system.files import sha256
from protlig_dd.training.build import train_rank
from protlig_dd.training.cost import activation_bytes, kept_weight_bytes, plan, print_plan
from protlig_dd.training.finetune import with_source_model
from protlig_dd.training.optim.make import make_optimizer
from protlig_dd.training.resolve import resolve
from protlig_dd.training.trainer import make_model
from protlig_dd.variants import score
from scripts import lora

from .conftest import (
    ROOT,
    Command,
    MadeOnce,
    assert_one_line_error,
    composed,
    random_batch,
    require_program,
    train_config,
)
from .conftest import make_model as random_model
from .esm import random_esm
from .test_optim import OPTIM
from .test_plan_of_a_run import saved_bytes
from .test_training import assert_bit_identical, last_tensors


def adapted(model: DiT, rank: int = 3, seed: int = 1, **options: object) -> DiT:
    """Add adapters to a model, with random numbers in B too, so that the adapters affect the output."""
    add_adapters(model, LoraConfig(rank, **options))  # type: ignore[arg-type]
    torch.manual_seed(seed)
    for part in model.modules():
        if isinstance(part, LowRank):
            nn.init.normal_(part.b, std=0.3)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(random_batch([9, 30]), torch.tensor([0.3, 2.0]))
    return found


def test_the_first_matrix_of_an_adapter_starts_uniform_as_in_the_code_of_the_paper() -> None:
    """Kaiming-uniform with a = sqrt(5), so the limit is 1 / sqrt(columns)."""
    model = random_model()
    add_adapters(model, LoraConfig(8))
    for part in model.modules():
        if isinstance(part, LowRank):
            limit = part.a.shape[-1] ** -0.5
            assert float(part.a.detach().abs().max()) <= limit
            assert float(part.a.detach().std()) == pytest.approx(limit / 3**0.5, rel=0.25)
            assert not part.b.any()


@pytest.mark.parametrize("mixer", MIXERS)
def test_new_adapters_do_not_change_the_output_by_a_bit(mixer: str) -> None:
    model = random_model(mixers=["attention", mixer], qk_norm=True)
    before = logits(model)
    add_adapters(model, LoraConfig(4, alpha=20.0))
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(adapted(random_model(mixers=["attention", mixer], qk_norm=True))), before)


@pytest.mark.parametrize("alpha", [None, 7.0])
@pytest.mark.parametrize(
    "options", [{}, {"mlp": "swiglu", "attention_bias": True}, {"mixers": ["ttt_mlp", "attention"]}]
)
def test_the_merged_network_has_the_output_of_the_adapted_network(options: dict[str, object], alpha: float) -> None:
    model = adapted(random_model(**options), alpha=alpha)
    merged, plain = merged_weights(model), random_model(seed=5, **options)
    assert merged.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(merged)
    assert torch.equal(logits(plain), logits(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(plain), logits(model))  # B A is added in float32 under autocast too
    unmerged = base_weights(model)
    assert all(torch.equal(tensor, unmerged[name]) for name, tensor in random_model(**options).named_parameters())


def test_q_k_and_v_have_adapters_of_their_own() -> None:
    model = adapted(random_model(), rank=2)
    qkv = model.blocks[0].qkv
    assert isinstance(qkv, StackedLinear)
    adapter = qkv.adapter
    assert isinstance(adapter, LowRank)
    assert adapter.a.shape == (3, 2, 32)
    assert adapter.b.shape == (3, 32, 2)
    parts = (qkv.merged() - qkv.weight).chunk(3)
    for part, a, b in zip(parts, adapter.a, adapter.b, strict=True):
        torch.testing.assert_close(part, b @ a, atol=1e-6, rtol=1e-5)
        assert torch.linalg.matrix_rank(part.double(), rtol=1e-4) == 2


def test_the_gradients_of_a_and_b_are_those_of_two_plain_matrices() -> None:
    """With y = x (W + s B A)^T, the gradient of B is s G^T x A^T, and that of A is s B^T G^T x."""
    torch.manual_seed(0)
    layer, scale = StackedLinear(8, 6, stacked=2).double(), 1.5
    layer.weight.requires_grad_(False)
    layer.adapter = LowRank(12, 8, stacked=2, rank=3, scale=scale).double()
    nn.init.normal_(layer.adapter.b)
    x, upstream = torch.randn(20, 8, dtype=torch.float64), torch.randn(20, 12, dtype=torch.float64)
    layer(x).backward(upstream)
    assert layer.weight.grad is None
    for i, part in enumerate(upstream.chunk(2, dim=1)):
        a, b = layer.adapter.a[i].detach(), layer.adapter.b[i].detach()
        assert layer.adapter.a.grad is not None
        assert layer.adapter.b.grad is not None
        torch.testing.assert_close(layer.adapter.b.grad[i], scale * part.T @ x @ a.T)
        torch.testing.assert_close(layer.adapter.a.grad[i], scale * b.T @ part.T @ x)


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_chosen_layers_are_adapted_and_everything_else_is_frozen(mixer: str) -> None:
    outputs = ["attention_out"] if mixer == "attention" else ["gate", "ttt_out"]
    layers = {"attention": ["qkv", *outputs], "mlp": ["mlp.up", "mlp.down"]}
    for chosen, others in ((["attention"], False), (["mlp"], True), (["mlp", "attention"], False), ([], True)):
        model = random_model(mixers=mixer)
        add_adapters(model, LoraConfig(2, None, chosen, others))
        expected = {
            f"blocks.{i}.{layer}.adapter.{matrix}"
            for i in "01"
            for kind in chosen
            for layer in layers[kind]
            for matrix in "ab"
        }
        if others:
            expected |= {name for name, _ in model.named_parameters() if name.startswith(("embedding.", "head."))}
            assert {"embedding.weight", "head.out.weight", "head.norm.weight"} <= expected
        assert trained_parameters(model).keys() == expected


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_change_adapters_by_adamw_and_no_frozen_weight(name: str, checkpointing: bool) -> None:
    model = random_model(dropout=0.1, checkpointing=checkpointing).train()
    add_adapters(model, LoraConfig(2))
    optimizer = make_optimizer(model, replace(OPTIM, name=name, lr=1e-2, weight_decay=0.1), "fp32")
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.1
    assert decayed["params"] == list(trained_parameters(model).values())
    assert plain["params"] == []
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(2):  # the first step changes B only, because the gradient of A is zero while B is zero
        optimizer.zero_grad()
        model(random_batch([9, 30]), torch.ones(2)).square().sum().backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) is (".adapter." not in name), name
        assert parameter.requires_grad is (parameter.grad is not None) is (".adapter." in name), name


def test_muon_updates_no_part_of_a_run_with_adapters_that_also_trains_the_head() -> None:
    model = random_model()
    add_adapters(model, LoraConfig(2, others=True))
    optimizer = make_optimizer(model, replace(OPTIM, name="muon", lr=1e-2, weight_decay=0.1), "fp32")
    assert isinstance(optimizer, torch.optim.AdamW)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain = ({names[parameter] for parameter in group["params"]} for group in optimizer.param_groups)
    assert {"head.out.weight", "head.adaln.weight"} == {name for name in decayed if ".adapter." not in name}
    assert plain == {"embedding.weight", "head.out.bias", "head.adaln.bias", "head.norm.weight"}


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["rank=4"], r"^model.lora.rank=4: adapters extend a trained model; give from=$"),
        (["rank=0"], r"^model.lora.rank must be at least 1, or null for no adapters, got 0$"),
        (["rank=33"], r"^model.lora.rank=33 is larger than 32, the smallest .* in blocks.0.qkv \(32 x 32\)$"),
        (["rank=40", "layers=[mlp]"], r"^model.lora.rank=40 is larger than 32, .* in blocks.0.mlp.up \(128 x 32\)$"),
        (["rank=4", "layers=[mpl]"], r"^model.lora.layers\[0\]=mpl: choose from attention, mlp; did you mean 'mlp'\?$"),
        (["rank=4", "layers=[]"], r"^model.lora.layers=\[\] and model.lora.others=false leave nothing to train"),
        (["rank=4", "alpha=0"], r"^model.lora.alpha must be a finite number above 0, or null for alpha = rank, got 0$"),
        (["alpha=4"], r"^model.lora.alpha has no effect without adapters; also give model.lora.rank$"),
        (["layers=[mlp]"], r"^model.lora.layers has no effect without adapters; also give model.lora.rank$"),
        (["others=true"], r"^model.lora.others has no effect without adapters; also give model.lora.rank$"),
        (["rank=true"], r"^model.lora.rank=True; give a number$"),
        (["layers=mlp"], r"^model.lora.layers: give a list: \[a\] or \[a,b\]$"),
    ],
)
def test_wrong_settings_are_errors(options: list[str], message: str) -> None:
    keys = [f"model.lora.{option}" for option in options]
    source = [] if "give from" in message else ["from=runs/a"]
    with pytest.raises(ValueError, match=message):
        check_train_config(train_config("experiment=demo", "model.hidden_size=32", "model.n_heads=2", *source, *keys))


def test_a_fine_tuned_run_has_its_own_adapters_and_never_those_of_its_source() -> None:
    source = replace(train_config("model=tiny", "model.lora.rank=2"), time_conditioning=False)
    plain = with_source_model(train_config("from=a"), source, {"from"})
    assert plain.model.lora == LoraConfig()
    keys = ("from=a", "model=tiny", "model.lora.rank=8", "model.lora.layers=[mlp]")
    found = with_source_model(train_config(*keys), source, {key.partition("=")[0] for key in keys})
    assert found.model.lora == LoraConfig(8, layers=["mlp"])
    assert replace(found.model, lora=LoraConfig()) == plain.model


def test_configs_of_runs_without_adapters_do_not_mention_them(tmp_path: Path) -> None:
    assert "lora" not in as_dict(train_config("model=tiny"))["model"]
    config = train_config("model=tiny", "from=a", "model.lora.rank=8")
    OmegaConf.save(OmegaConf.create(as_dict(config)), tmp_path / "config.yaml")
    assert config_in(tmp_path) == config
    assert changed_keys(recorded_config(tmp_path), as_dict(config)) == []


# --- runs -------------------------------------------------------------------------------------------------------------

TUNE = [
    "experiment=demo",
    "data.tokens_per_pack=1200",
    "data.max_len=300",
    "optim.lr=0.02",
    "optim.warmup_steps=1",
    "trainer.max_steps=4",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.eval_every=2",
    "trainer.eval_max_sequences=4",
    "trainer.checkpoint_every=2",
    "trainer.log_rows=true",
    "report.max_sequences=4",
    "report.draws=2",
    "report.samples=0",
    "logger=none",
]
LORA = ["model.lora.rank=2", "model.lora.alpha=6"]
Tune = Callable[..., Path]


@pytest.fixture
def resolved(store: SequenceStore, monkeypatch: pytest.MonkeyPatch) -> Callable[..., TrainConfig]:
    """Return a function that composes and resolves the config of a run in a folder that starts from a source."""
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)

    def function(path: Path, source: Path, *overrides: str) -> TrainConfig:
        options = [*TUNE, f"from={source}", f"data.path={store.path}", f"run.name={path.name}", *overrides]
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            cfg = compose("train", options, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        with open_dict(cfg):
            del cfg["hydra"]
        return resolve(read_config(OmegaConf.create(cfg), TrainConfig), path)

    return function


@pytest.fixture
def tune(resolved: Callable[..., TrainConfig]) -> Tune:
    """Return a function that fine-tunes a source in this process, and returns the run folder."""

    def function(path: Path, source: Path, *overrides: str) -> Path:
        train_rank(resolved(path, source, *overrides), path, None)
        return path

    return function


@pytest.fixture(scope="session")
def esm(made_once: MadeOnce) -> Path:
    """The folder of an exported model that was converted from a random ESM-2."""

    def fill(folder: Path) -> None:
        random_esm(folder / "source")
        convert(composed(f"from={folder}/source", f"to={folder}/model", name="convert"))

    return made_once("lora_esm", fill) / "model"


@pytest.fixture(params=["run", "esm"])
def source(request: pytest.FixtureRequest) -> Path:
    """A model to fine-tune: a run, or a converted ESM-2."""
    path: Path = request.getfixturevalue({"run": "trained_run", "esm": "esm"}[request.param])
    return path


def use(verb: Callable[..., None], name: str, model: Path, *overrides: str) -> None:
    verb(composed(f"from={model}", "device=cpu", "precision=fp32", *overrides, name=name))


@pytest.mark.slow
def test_a_run_trains_adapters_and_every_command_uses_the_merged_model(
    source: Path,
    tune: Tune,
    store: SequenceStore,
    proteins: list[FastaRecord],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tune(tmp_path / "runs/tuned", source, *LORA)
    printed = " ".join(capsys.readouterr().out.split())
    start, saved = find_saved(str(source)), find_saved(str(run))
    weights, merged = start.tensors(), saved.tensors()
    (_, newest) = complete_checkpoints(run)

    # the checkpoints contain the adapters only, and the run folder has a copy of the source's weights
    adapters = {
        f"blocks.{i}.{layer}.adapter.{matrix}"
        for i in range(saved.config.model.n_blocks)
        for layer in ("qkv", "attention_out", "mlp.up", "mlp.down")
        for matrix in "ab"
    }
    numbers = sum(tensor.numel() for tensor in load_file(newest / "ema.safetensors").values())
    for name, factor in (("model", 1), ("ema", 1), ("optimizer", 2)):
        tensors = load_file(newest / f"{name}.safetensors")
        assert {key.partition("/")[0] for key in tensors} == adapters
        assert factor * numbers <= sum(tensor.numel() for tensor in tensors.values()) <= factor * numbers + len(tensors)
    assert (run / BASE).read_bytes() == start.weights.read_bytes()
    assert config_in(run).from_sha256 == sha256(run / BASE)
    total = numbers + sum(tensor.numel() for tensor in weights.values())
    count = f"{numbers / 1e6:.3g} M of {total / 1e6:.3g} M parameters"
    assert f"{count} are trained (LoRA rank 2 (alpha 6) in attention, mlp)" in printed

    # the model that commands read has the weights W + 3 B A
    assert saved.config.model == start.config.model
    averages = load_file(newest / "ema.safetensors")
    for name, tensor in merged.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.adapter.b" in averages:
            product = (averages[f"{layer}.adapter.b"] @ averages[f"{layer}.adapter.a"]).flatten(0, 1)
            torch.testing.assert_close(tensor, weights[name] + 3 * product)
            assert not torch.equal(tensor, weights[name])
        else:
            assert torch.equal(tensor, weights[name])

    # its export is the same model
    export(composed(f"from={run}", f"to={tmp_path}/model", name="export"))
    exported = ProteinDiffusion.from_pretrained(tmp_path / "model", device="cpu")
    assert (
        saved.weights_sha256() == sha256(tmp_path / "model/model.safetensors") == exported.description["weights_sha256"]
    )
    assert exported.description["lora"] == {"rank": 2, "alpha": 6, "layers": ["attention", "mlp"], "others": False}
    assert "lora" not in exported.description["model"]
    card = (tmp_path / "model/README.md").read_text()
    assert f"| fine-tuned from | {source.name} by LoRA rank 2 (alpha 6) in attention, mlp, merged with" in card
    batch = random_batch([30, 12])
    network = load_trained(str(run), device="cpu", precision="fp32").network
    assert torch.equal(exported.network(batch, torch.zeros(2)), network(batch, torch.zeros(2)))
    assert json.loads((run / "report.json").read_text())["parameters"] == total - numbers

    # commands give the same results for the run and its export
    (tmp_path / "some.fasta").write_text("".join(f">{p.id}\n{p.sequence[:60]}\n" for p in proteins[:3]))
    given = f"input={tmp_path}/some.fasta"
    for name, model in (("run", run), ("export", tmp_path / "model")):
        folder = tmp_path / f"of_{name}"
        use(sample_proteins, "sample", model, "n=2", "lengths=20", "steps=3", f"output={folder}/samples.fasta")
        use(embed_proteins, "embed", model, given, f"output={folder}/vectors.npz")
        use(infill, "infill", model, given, "free=[3-9]", "n=1", "steps=3", f"output={folder}/infilled.fasta")
        others = [f"compare={source}", f"train={store.path}", "near=false"]
        use(evaluate, "evaluate", model, given, *others, "draws=2", f"output={folder}/evaluation")
        use(score, "variants", model, f"target={proteins[0].sequence[:6]}", f"output={folder}/variants.csv")
    for file in ("evaluation/per_sequence.csv", "infilled.fasta", "samples.fasta"):
        assert (tmp_path / "of_run" / file).read_text() == (tmp_path / "of_export" / file).read_text()
    # the export does not name the training data, so the column of the composition differs
    tables = [
        csv.DictReader((tmp_path / f"of_{name}/variants.csv").read_text().splitlines()) for name in ("run", "export")
    ]
    assert len({tuple(row["score"] for row in table) for table in tables}) == 1
    vectors = [np.load(tmp_path / f"of_{name}/vectors.npz")["embeddings"] for name in ("run", "export")]
    assert np.array_equal(*vectors)
    summary = json.loads((tmp_path / "of_run/variants.json").read_text())
    assert summary["weights_sha256"] == saved.weights_sha256()
    report(composed(f"runs={run}", f"output={tmp_path}/page.html", name="report"))
    assert "fine-tuned by LoRA of rank 2" in (tmp_path / "page.html").read_text()


def test_the_first_step_has_the_loss_of_the_source(trained_run: Path, tune: Tune, tmp_path: Path) -> None:
    runs = [tune(tmp_path / name, trained_run, *more) for name, more in (("full", []), ("lora", LORA))]
    full, lora = (read_metrics(run / "metrics.jsonl") for run in runs)
    assert lora[0]["val_nll"] == full[0]["val_nll"]
    assert lora[1]["loss"] == full[1]["loss"]
    assert lora[4]["loss"] != full[4]["loss"]


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical_and_does_not_need_its_source(
    trained_run: Path, tune: Tune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(trained_run, tmp_path / "source")
    options = [*LORA, "model.lora.others=true", "optim=muon", "model.dropout=0.1"]
    whole = tune(tmp_path / "whole", moved, *options)
    halves = tune(tmp_path / "halves", moved, *options, "trainer.stop_at_step=2")
    first = last_tensors(halves)
    assert {"model/embedding.weight", "model/head.out.weight"} <= first.keys()
    shutil.rmtree(moved)
    tune(halves, moved, *options)
    assert f"resuming from {halves}/checkpoints/step_00000002" in capsys.readouterr().out.replace("\n", "")
    assert_bit_identical(whole, halves)
    assert not all(torch.equal(tensor, last_tensors(halves)[name]) for name, tensor in first.items())
    with pytest.raises(ValueError, match=r"another config \(model.lora.rank: 2 -> 3\)"):
        tune(halves, moved, *options, "model.lora.rank=3")
    with pytest.raises(ValueError, match=r"another config \(model.lora.alpha: 6.0 -> None"):
        tune(halves, moved, *options, "model.lora.alpha=null", "model.lora.rank=2")


@pytest.mark.slow
def test_the_weights_that_adapters_extend_must_be_in_the_run_folder(
    trained_run: Path, tune: Tune, tmp_path: Path
) -> None:
    run = tune(tmp_path / "runs/tuned", trained_run, *LORA, "trainer.stop_at_step=2")
    (checkpoint,) = complete_checkpoints(run)
    copied = shutil.copytree(checkpoint, tmp_path / "copied/step_00000002")
    needed = r"contains only adapters \(model.lora.rank=2\), and base.safetensors of its run is needed too: .*export"
    with pytest.raises(ValueError, match=needed):
        find_saved(str(copied))
    assert find_saved(str(checkpoint)).weights_sha256() == find_saved(str(run)).weights_sha256()
    content = (run / BASE).read_bytes()
    (run / BASE).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for use_base in (lambda: find_saved(str(run)), lambda: tune(run, trained_run, *LORA)):
        with pytest.raises(ValueError, match=r"base.safetensors: damaged, SHA-256 is \w{12}, but the run started from"):
            use_base()
    (run / BASE).unlink()
    with pytest.raises(ValueError, match=needed):
        find_saved(str(run))
    with pytest.raises(
        ValueError, match=r"base.safetensors is missing, but checkpoints of a run with adapters contain"
    ):
        tune(run, trained_run, *LORA)
    (run / BASE).write_bytes(content)
    tune(run, trained_run, *LORA)
    assert find_saved(str(run)).step == 4


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["model.lora.rank=3", "model.lora.layers=[mlp]"]])
def test_a_run_with_adapters_can_be_fine_tuned_again(
    more: list[str], trained_run: Path, tune: Tune, tmp_path: Path
) -> None:
    """With or without adapters, the second run starts from the merged weights of the first."""
    first = tune(tmp_path / "first", trained_run, *LORA)
    merged = find_saved(str(first))
    second = tune(tmp_path / "second", first, *more, "trainer.max_steps=1", "optim.lr=0")
    found, config = find_saved(str(second)), config_in(second)
    assert found.tensors().keys() == merged.tensors().keys()
    assert all(torch.equal(tensor, merged.tensors()[name]) for name, tensor in found.tensors().items())
    assert config.from_sha256 == merged.weights_sha256() == sha256(second / BASE)
    assert config.model.lora.rank == (3 if more else None)
    model, reason = find_source_model(config, second)
    assert model is not None, reason
    assert model.path == complete_checkpoints(first)[-1]
    assert (find_saved(str(second)).adapters is None) is (not more)


@pytest.mark.parametrize("options", [[], ["optim=adamw"], LORA, [*LORA, "model.lora.others=true"]])
def test_a_learning_rate_of_zero_changes_nothing(
    options: list[str], trained_run: Path, tune: Tune, tmp_path: Path
) -> None:
    run = tune(tmp_path / "run", trained_run, *options, "optim.lr=0", "optim.schedule=cosine", "trainer.max_steps=2")
    weights = find_saved(str(run)).tensors()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in find_saved(str(trained_run)).tensors().items())
    assert [row["lr"] for step, row in read_metrics(run / "metrics.jsonl").items() if step] == [0, 0]
    for model in (run, trained_run):
        use(sample_proteins, "sample", model, "n=2", "lengths=30", "steps=4", f"output={tmp_path}/{model.name}.fasta")
    before, after = (list(read_fasta(tmp_path / f"{model.name}.fasta")) for model in (trained_run, run))
    assert [record.sequence for record in before] == [record.sequence for record in after]


# --- the plan ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("mixer", "layers"), [("attention", "[attention,mlp]"), ("ttt_linear", "[attention]")])
def test_the_plan_counts_what_a_run_with_adapters_costs(
    mixer: str, layers: str, precision: str, others: bool, store: SequenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"model.mixers={mixer}", "model.lora.rank=4", f"model.lora.layers={layers}", f"model.lora.others={others}"]
    keys += ["model.hidden_size=64", "model.n_heads=4"]
    config = replace(train_config("model=tiny", "from=a", "trainer.max_steps=5", *keys), time_conditioning=False)
    monkeypatch.setattr("protlig_dd.training.cost.TOKENS", 32)  # two chunks of ttt_linear
    found = plan(config, StoreGroup([store]), torch.device("cpu"), precision, 1, peak=1e12)
    model = make_model(config, torch.device("cpu"), "sdpa")
    trained = sum(tensor.numel() for tensor in trained_parameters(model).values())
    assert found["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    assert found["trained_parameters"] == trained < 0.2 * found["parameters"]

    # gradients, averages and the optimizer's two numbers of each trained weight
    optimizer = make_optimizer(model, config.optim, precision)
    model(random_batch([9]), torch.ones(1)).sum().backward()
    optimizer.step()
    gradients = sum(parameter.grad.numel() for parameter in model.parameters() if parameter.grad is not None)
    moments = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.ndim)
    assert (gradients, moments) == (trained, 2 * trained)
    kept = kept_weight_bytes(model, precision)
    assert found["state_bytes"] == 4 * (found["parameters"] + 2 * gradients + moments) + kept

    # the tensors that a forward pass keeps: a constant number of bytes, and a number for each token
    of_tokens = [saved_bytes(model, [tokens], precision) for tokens in (128, 256)]
    assert of_tokens[1] - of_tokens[0] == pytest.approx(128 * activation_bytes(config, precision), rel=0.01)
    first_layer = 4 * 3 * 64**2  # if the embedding is frozen, the first layer needs no gradient of its input
    constant = 2 * of_tokens[0] - of_tokens[1]
    assert kept - 2 * first_layer - kept / 8 <= constant <= kept


def test_the_plan_counts_no_weight_gradients_of_frozen_layers(store: SequenceStore) -> None:
    lengths, flops = [100, 50], dict[str, int]()
    for layers in ("[attention,mlp]", "[mlp]", "[attention]"):
        keys = ("model=tiny", "from=a", "model.lora.rank=4", f"model.lora.layers={layers}")
        model = build_model(train_config(*keys).model, "sdpa", False)
        flops[layers] = model.training_flops(lengths)
        head = 2 * 20 * 256 * 150
        assert 3 * model.flops(lengths) - flops["[attention,mlp]"] == head
    numbers = {"[mlp]": 2 * 4 * 256**2, "[attention]": 2 * 8 * 256**2}  # weights of the frozen layers in two blocks
    for layers, frozen in numbers.items():
        assert flops["[attention,mlp]"] - flops[layers] == 2 * frozen * 150


def test_the_plan_prints_how_many_parameters_are_trained(
    store: SequenceStore, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("model=tiny", "from=a", "model.lora.rank=4", "model.lora.others=true", "data.max_len=60")
    config = replace(train_config(*keys, "trainer.max_steps=5"), time_conditioning=False)
    print_plan(config, StoreGroup([store]), torch.device("cpu"), "fp32", 1)
    printed = " ".join(capsys.readouterr().out.split())
    trained = 2 * 4 * (3 * 512 + 512 + 2 * 1280) + 30 * 256 + 256 + 20 * 256 + 20
    parts = "in attention, mlp and the embedding and the output head"
    assert f"1.6 M; {trained / 1e6:.3g} M are trained (LoRA rank 4 {parts})" in printed


# --- processes and kernels --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_the_same_adapters_as_one(
    trained_run: Path, run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    options = [*TUNE, *LORA, f"from={trained_run}", f"data.path={store.path}", "optim.packs_per_step=2"]
    for name, more in (("one", []), ("two", ["trainer.devices=2"])):
        process = run_python("-m", "protlig_dd.training", *options, f"run.name={name}", *more)
        assert process.returncode == 0, process.stdout + process.stderr
    one, two = (last_tensors(tmp_path / "runs" / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    assert [sha256(tmp_path / "runs" / name / BASE) for name in ("one", "two")] == [
        sha256(find_saved(str(trained_run)).weights)
    ] * 2
    for options_of_error, message in (
        (["model.lora.rank=99"], "model.lora.rank=99 is larger than 32, the smallest dimension of a matrix in"),
        (["from=null"], "model.lora.rank=2: adapters extend a trained model; give from="),
    ):
        failed = run_python("-m", "protlig_dd.training", *options, "run.name=wrong", *options_of_error)
        assert_one_line_error(failed, message)
    assert not (tmp_path / "runs/wrong").exists()


@pytest.mark.slow
@pytest.mark.system
def test_a_compiled_run_with_adapters_has_the_losses_of_an_eager_one(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    """Blocks share compiled code, except that the first has code of its own: its input needs no gradient."""
    require_program("g++")
    random_esm(tmp_path / "source", num_hidden_layers=3)
    convert(composed(f"from={tmp_path}/source", f"to={tmp_path}/model", name="convert"))
    options = [*TUNE, *LORA, f"from={tmp_path}/model", f"data.path={store.path}", "optim.lr=1e-3"]
    losses = []
    for compiled in ("false", "true"):
        process = run_python(
            "-m",
            "protlig_dd.training",
            *options,
            f"run.name=compiled_{compiled}",
            f"trainer.compile={compiled}",
            new=True,
            PROTLIG_TYPECHECK="0",
            TORCH_LOGS="recompiles",
            TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        )
        assert process.returncode == 0, process.stderr
        assert process.stderr.count("Recompiling function") == (2 if compiled == "true" else 0), process.stderr
        rows = read_metrics(tmp_path / f"runs/compiled_{compiled}/metrics.jsonl").values()
        losses.append([row["loss"] for row in rows if "loss" in row])
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# --- scripts/lora.py --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_family_of_the_script_is_connected_and_its_source_never_saw_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "DATA", tmp_path)
    numbers = lora.write_data()
    assert (numbers["family_train"], numbers["family_held_out"], numbers["left out"]) == (32, 17, 37)  # as in the docs
    sets = {name: list(read_fasta(lora.fasta(name))) for name in ("family_train", "family_held_out", "source_train")}
    train, held_out, others = ([(record.id, lora.words_of(record)) for record in sets[name]] for name in sets)
    family = train + held_out
    assert len({name for name, _ in family}) == 49
    for name, words in family:
        assert any(len(words & of_other) >= 7 for other, of_other in family if other != name)
    assert not any(len(words & of_member) >= 7 for _, words in others for _, of_member in family)
    named = [
        record for record in (*sets["family_train"], *sets["family_held_out"]) if "ATP-binding" in record.description
    ]
    assert len(named) > 40
    assert SequenceStore(tmp_path / "family.h5").split("validation").size == 17


@pytest.mark.slow
def test_the_script_prints_the_table_of_the_docs(
    python: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def command(verb: str, *arguments: str) -> None:
        commands.append(verb)
        process = python("-m", f"protlig_dd.{verb}", *arguments, cwd=tmp_path)
        assert process.returncode == 0, process.stderr

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lora, "command", command)
    monkeypatch.setattr(lora, "COMMON", [*lora.COMMON, "model.hidden_size=32", "model.n_heads=2", "model.n_blocks=1"])
    monkeypatch.setattr(lora, "ARMS", {name: lora.ARMS[name] for name in ("all weights", "LoRA, rank 4")})
    lora.compare(2, 2, [1e-3])
    first = capsys.readouterr().out
    heading, rule, source, *rows = [line for line in first.splitlines() if line.startswith("|")]
    text = (ROOT / "docs/finetuning.md").read_text()
    assert f"{heading}\n{rule}\n" in text
    for name in lora.ARMS:
        assert f"| {name} | 0.001 |" in text
    assert [row.count("|") for row in (rule, source, *rows)] == [10] * 4
    run = tmp_path / "runs/lora_LoRA_rank_4_2_2_0.001"
    of_lora = [cell.strip() for cell in rows[1].split("|")][1:-1]
    trained = sum(tensor.numel() for tensor in load_file(complete_checkpoints(run)[0] / "ema.safetensors").values())
    assert of_lora[:2] + of_lora[4:5] == ["LoRA, rank 4", "0.001", f"{trained:,}"]
    assert commands == ["training", *["training", "evaluate"] * 2]
    lora.compare(2, 2, [1e-3])
    assert commands == ["training", *["training", "evaluate"] * 2]  # finished runs are not trained again
    assert capsys.readouterr().out == first
