"""Train networks of every kind (position encoding, tied weights, feed-forward layer) and use them in every way."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from protlig_dd.config.components import build_model
from protlig_dd.config.read import as_dict, read_config
from protlig_dd.config.train import TrainConfig, check_train_config, config_in
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.store import SequenceStore, StoreGroup
from protlig_dd.embed import embed_proteins
from protlig_dd.evaluate import evaluate
from protlig_dd.export import export
from protlig_dd.hub import ProteinDiffusion
from protlig_dd.inference.model import load_trained
from protlig_dd.infill import infill
from protlig_dd.model.config import MLPS
from protlig_dd.model.positions import POSITIONS
from protlig_dd.runs.checkpoint import complete_checkpoints, load_tensors
from protlig_dd.sample import sample_proteins
from protlig_dd.training.build import train_rank
from protlig_dd.training.cost import kept_bytes, plan
from protlig_dd.training.finetune import with_source_model
from protlig_dd.training.resolve import resolve
from protlig_dd.training.trainer import make_model
from protlig_dd.variants import score

from .conftest import composed, random_batch
from .conftest import make_model as small_model
from .test_plan_of_a_run import saved_bytes

KINDS = list(POSITIONS)
MAX_LEN = 40
SMALL = [
    "experiment=demo",
    f"data.max_len={MAX_LEN}",
    "data.tokens_per_pack=300",
    "model.hidden_size=32",
    "model.n_heads=2",
    "model.cond_dim=8",
    "optim.lr=0.01",
    "optim.warmup_steps=1",
    "trainer.max_steps=3",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.eval_every=2",
    "trainer.eval_max_sequences=4",
    "report.max_sequences=4",
    "report.samples=0",
    "report.untrained=false",
    "logger=none",
]


def config_of(store: SequenceStore, *overrides: str) -> TrainConfig:
    return read_config(composed(*SMALL, f"data.path={store.path}", *overrides), TrainConfig)


def trained(config: TrainConfig, path: Path) -> Path:
    """Train in this process; return the run folder."""
    train_rank(resolve(config, path), path, None)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_every_kind_can_be_trained_and_used(
    kind: str, store: SequenceStore, proteins: list[FastaRecord], tmp_path: Path
) -> None:
    options = [f"model.positions={kind}", "model.tie_weights=true", f"model.mlp={MLPS[KINDS.index(kind) % len(MLPS)]}"]
    run = trained(config_of(store, *options), tmp_path / "run")
    config = config_in(run)
    long = next(protein for protein in proteins if len(protein.sequence) > 2 * MAX_LEN)
    (tmp_path / "long.fasta").write_text(f">{long.id}\n{long.sequence}\n")
    (tmp_path / "short.fasta").write_text(f">part\n{long.sequence[:MAX_LEN]}\n")

    checkpoint = complete_checkpoints(run)[-1]
    weights = load_tensors(checkpoint / "ema.safetensors")
    assert "head.out.weight" not in weights
    start = make_model(config, torch.device("cpu"), "sdpa")
    moved = {name for name, parameter in start.named_parameters() if not torch.equal(parameter, weights[name])}
    assert weights.keys() == dict(start.named_parameters()).keys()
    assert moved >= {name for name in weights if name.startswith(("positions.", "embedding.", "head."))}

    def use(verb: Callable[[DictConfig], None], name: str, *overrides: str) -> None:
        verb(composed(f"from={tmp_path}/model", "device=cpu", "precision=fp32", *overrides, name=name))

    export(composed(f"from={run}", f"to={tmp_path}/model", name="export"))
    use(sample_proteins, "sample", "n=2", f"lengths={MAX_LEN}", "steps=3", f"output={tmp_path}/samples.fasta")
    infilling = ["free=[3-9]", "n=1", "steps=3", f"output={tmp_path}/infilled.fasta"]
    use(infill, "infill", f"input={tmp_path}/short.fasta", *infilling)
    use(embed_proteins, "embed", f"input={tmp_path}/long.fasta", "long=window", f"output={tmp_path}/vectors.npz")
    use(evaluate, "evaluate", f"input={tmp_path}/long.fasta", "draws=2", f"output={tmp_path}/evaluation")
    use(score, "variants", f"target={long.sequence[:6]}", f"output={tmp_path}/variants.csv")
    assert [len(record.sequence) for record in read_fasta(tmp_path / "samples.fasta")] == [MAX_LEN] * 2
    assert [len(record.sequence) for record in read_fasta(tmp_path / "infilled.fasta")] == [MAX_LEN]
    with np.load(tmp_path / "vectors.npz") as vectors:
        (vector,) = vectors["embeddings"]
    model = ProteinDiffusion.from_pretrained(tmp_path / "model", device="cpu")
    torch.testing.assert_close(model.embed([long.sequence], long="window")[0], torch.from_numpy(vector))
    assert len((tmp_path / "variants.csv").read_text().splitlines()) == 1 + 6 * 19
    batch = random_batch([30, 12])
    network = load_trained(str(run), device="cpu", precision="fp32").network
    assert torch.equal(model.network(batch, torch.zeros(2)), network(batch, torch.zeros(2)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_what_a_network_of_every_kind_costs(
    kind: str, store: SequenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(store, f"model.positions={kind}", "model.tie_weights=true", "time_conditioning=false")
    config = resolve(config, Path("none"))
    longer = replace(config.model, max_positions=config.model.max_positions and 2 * MAX_LEN)
    of_real_tensors = saved_bytes(build_model(longer, "sdpa", False), [2 * MAX_LEN], "fp32")
    assert kept_bytes(config, "fp32", ["attention"] * 2, False, [2 * MAX_LEN]) == of_real_tensors
    monkeypatch.setattr("protlig_dd.training.cost.activation_bytes", lambda config, precision, backend: of_real_tensors)
    found = plan(config, StoreGroup([store]), torch.device("cpu"), "fp32", 1, peak=1e12)
    model = make_model(config, torch.device("cpu"), "sdpa")
    assert found["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
    lengths = [min(int(store.lengths[row]), MAX_LEN) + 2 for row in store.split("train")]
    assert found["flops_per_token"] == pytest.approx(3 * model.flops(lengths) / sum(lengths))


def test_a_table_of_positions_is_as_long_as_the_longest_training_sequence(store: SequenceStore) -> None:
    config = resolve(config_of(store, "model.positions=diet"), Path("none"))
    assert config.model.max_positions == MAX_LEN + 2
    assert as_dict(config)["model"]["max_positions"] == MAX_LEN + 2
    larger = resolve(config_of(store, "model.positions=diet", "model.max_positions=100"), Path("none"))
    assert larger.model.max_positions == 100
    short = config_of(store, "model.positions=diet", "model.max_positions=41")
    with pytest.raises(
        ValueError, match="=41 is less than the 42 tokens of .* at most 39 or model.max_positions to at least 42"
    ):
        resolve(short, Path("none"))


def test_a_new_run_records_the_factor_of_its_sinusoids_and_a_fine_tune_keeps_it(store: SequenceStore) -> None:
    source = resolve(config_of(store, "model.positions=sinusoidal", "model.sinusoid_scale=0.5"), Path("none"))
    new = resolve(config_of(store, "model.positions=sinusoidal"), Path("none"))
    assert (source.model.sinusoid_scale, new.model.sinusoid_scale) == (0.5, 0.02)
    assert as_dict(new)["model"]["sinusoid_scale"] == 0.02
    assert with_source_model(config_of(store, "from=a"), source, {"from"}).model == source.model
    assert "sinusoid_scale" not in as_dict(resolve(config_of(store), Path("none")))["model"]


def test_progress_lines_name_the_kinds_of_the_networks_parts() -> None:
    mixed = small_model(n_blocks=3, mixers=["attention", "ttt_linear", "attention"], tie_weights=True, mlp="swiglu")
    assert mixed.kinds == "positions rope, mixers 2 x attention (sdpa) + 1 x ttt_linear, mlp swiglu, tied weights"
    assert small_model(mixers="ttt_mlp").kinds == "positions rope, mixers ttt_mlp, mlp gelu"


def test_newer_keys_at_their_default_are_not_written_and_need_not_be_read(store: SequenceStore) -> None:
    config = resolve(config_of(store), Path("none"))
    assert not {"positions", "max_positions", "tie_weights"} & as_dict(config)["model"].keys()
    assert (config.model.positions, config.model.max_positions, config.model.tie_weights) == ("rope", None, False)


def test_fine_tuning_keeps_the_kind_and_the_table_of_the_source(store: SequenceStore) -> None:
    source = resolve(config_of(store, "model.positions=diet", "model.tie_weights=true"), Path("none"))
    kept = with_source_model(config_of(store, "from=a", "data.max_len=30"), source, {"from", "data.max_len"})
    assert kept.model == source.model
    check_train_config(kept)
    same = config_of(store, "from=a", "model.positions=diet", "model.tie_weights=true")
    assert with_source_model(same, source, {"model.positions", "model.tie_weights"}).model == source.model
    longer = with_source_model(config_of(store, "from=a", "data.max_len=41"), source, {"from", "data.max_len"})
    with pytest.raises(ValueError, match="of data.max_len=41 .*: set data.max_len to at most 40; .* fine-tuned"):
        check_train_config(longer)
    for override, message in (
        ("model.positions=rope", "model.positions: diet in the source, rope requested"),
        ("model.tie_weights=false", "model.tie_weights: true in the source, false requested"),
        ("model.max_positions=50", "model.max_positions: 42 in the source, 50 requested"),
    ):
        key = override.partition("=")[0]
        with pytest.raises(ValueError, match=message):
            with_source_model(config_of(store, "from=a", override), source, {key})


def test_a_protein_beyond_the_table_is_rejected_before_it_is_sampled(
    store: SequenceStore, proteins: list[FastaRecord], tmp_path: Path
) -> None:
    run = trained(config_of(store, "model.positions=diet", "trainer.max_steps=1"), tmp_path / "run")
    use = [f"from={run}", "device=cpu", "precision=fp32"]
    message = f"has 41 residues; this model was trained on 1 to {MAX_LEN}"
    with pytest.raises(ValueError, match=message):
        sample_proteins(composed(*use, "n=1", "lengths=41", f"output={tmp_path}/a.fasta", name="sample"))
    (tmp_path / "long.fasta").write_text(f">long\n{proteins[0].sequence[:41]}\n")
    for verb, name, options in (
        (infill, "infill", ["free=[3]", f"output={tmp_path}/b.fasta"]),
        (embed_proteins, "embed", [f"output={tmp_path}/b.npz", "long=error"]),
    ):
        with pytest.raises(ValueError, match="has 41 residues"):
            verb(composed(*use, f"input={tmp_path}/long.fasta", *options, name=name))
