"""`model.mixers` (attention or test-time training): one mixer for all blocks, or one for each block.

The tests cover configs of all versions and each use of a model.
"""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from protlig_dd.batch import PackedBatch
from protlig_dd.config.read import as_dict, read_config
from protlig_dd.config.train import TrainConfig, changed_keys, check_train_config, config_in, recorded_config
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.diffusion.sampling import sample
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.variants.assays import Assay
from protlig_dd.evaluation.variants.fitness import score_variants
from protlig_dd.evaluation.variants.mutants import Variant
from protlig_dd.hub import ProteinDiffusion
from protlig_dd.inference.embedding import embed
from protlig_dd.inference.exported import DEFAULT_KINDS, model_card, write_exported
from protlig_dd.inference.model import find_saved, load_trained
from protlig_dd.inference.sharing import Work
from protlig_dd.model.config import ModelConfig, stored_model
from protlig_dd.model.dit import DiT
from protlig_dd.model.mixers import MIXERS
from protlig_dd.model.mixers.attention import Attention
from protlig_dd.model.mixers.ttt import TTTMLP, TTTLinear
from protlig_dd.tokenizer import MASK, N_STATES, ProteinTokenizer
from protlig_dd.training.finetune import with_source_model

from .conftest import SMALL_MODEL, composed, make_model, random_batch

GOLDEN = Path(__file__).parent / "golden/files"
MIXED = ["ttt_linear", "attention", "ttt_mlp"]
NETWORK = make_model(n_blocks=3, mixers=MIXED, time_conditioning=False, norm="rms", qk_norm=True).eval()
SCORE = ScoreFn(NETWORK, Absorbing(), LogLinearNoise(), "x0", time_conditioning=False)


def config_of(*overrides: str) -> TrainConfig:
    return read_config(composed(*overrides), TrainConfig)


@pytest.mark.parametrize(
    ("override", "kinds"),
    [
        ("model.dropout=0", [Attention] * 4),
        ("model.mixers=ttt_mlp", [TTTMLP] * 4),
        ("model.mixers=[attention,attention,ttt_linear,attention]", [Attention, Attention, TTTLinear, Attention]),
    ],
)
def test_a_command_line_names_one_mixer_or_one_for_each_block(override: str, kinds: list[type]) -> None:
    config = config_of("model=tiny", "model.n_blocks=4", override)
    with torch.device("meta"):
        model = DiT(config.model, "sdpa")
    assert [type(block.mixer) for block in model.blocks] == kinds


def test_equal_networks_have_equal_configs() -> None:
    listed, named = (config_of("model=tiny", f"model.mixers={m}") for m in ("[ttt_mlp,ttt_mlp]", "ttt_mlp"))
    assert listed == named
    assert "mixers" not in as_dict(config_of("model=tiny", "model.mixers=[attention,attention]"))["model"]
    mixed = config_of("model=tiny", "model.mixers=[attention,ttt_mlp]")
    assert read_config(OmegaConf.create(as_dict(mixed)), TrainConfig) == mixed


def test_a_tuple_of_mixers_is_read_as_a_list() -> None:
    assert ModelConfig(**SMALL_MODEL, mixers=("attention", "ttt_mlp")).mixers == ["attention", "ttt_mlp"]
    assert ModelConfig(**SMALL_MODEL, mixers=("ttt_mlp", "ttt_mlp")).mixers == "ttt_mlp"


@pytest.mark.parametrize("mixers", ["[]", "attention"])
def test_a_network_without_blocks_is_an_error(mixers: str) -> None:
    with pytest.raises(ValueError, match="model.n_blocks must be at least 1, got 0"):
        check_train_config(config_of("model=tiny", "model.n_blocks=0", f"model.mixers={mixers}"))


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        (["attention"] * 3, "model.mixers has 3 names, but model.n_blocks=2: give a list with one name for each block"),
        ([], "model.mixers has 0 names, but model.n_blocks=2"),
        ("ttt_liner", "model.mixers=ttt_liner: choose from attention, ttt_linear, ttt_mlp; did you mean 'ttt_linear'"),
        (["attention", "atention"], r"model.mixers\[1\]=atention: choose from .*; did you mean 'attention'"),
        (["attention", 7], r"model.mixers\[1\]=7: choose from attention, ttt_linear, ttt_mlp$"),
        (None, "model.mixers=None: choose from attention"),
        ({"attention": 1}, "choose from attention"),
    ],
)
def test_a_wrong_mixer_or_number_of_mixers_is_an_error(mixers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(ModelConfig(**SMALL_MODEL, mixers=mixers), "sdpa")


def test_a_mixer_of_another_width_is_rejected_when_the_network_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wide(TTTLinear):
        def __init__(self, config: ModelConfig, backend: str) -> None:
            super().__init__(replace(config, hidden_size=2 * config.hidden_size), backend)

    monkeypatch.setitem(MIXERS, "wide", Wide)
    with pytest.raises(ValueError, match="mixer wide has width 64, but the Block that contains it has width 32"):
        DiT(ModelConfig(**SMALL_MODEL, mixers=["attention", "wide"]), "sdpa")


def test_the_config_of_an_earlier_run_with_one_mixer_key_is_read_and_resumed(tmp_path: Path) -> None:
    file = GOLDEN / "runs/stopped/config.yaml"
    (tmp_path / "config.yaml").write_text(file.read_text().replace("model:\n", "model:\n  mixer: attention\n"))
    saved = config_in(tmp_path)
    assert saved == config_in(file.parent)
    assert changed_keys(recorded_config(tmp_path), as_dict(saved)) == []
    other = replace(saved, model=replace(saved.model, mixers="ttt_linear"))
    assert changed_keys(recorded_config(tmp_path), as_dict(other)) == ["model.mixers: attention -> ttt_linear"]


def test_an_earlier_export_with_one_mixer_key_is_loaded_and_saved(tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    shutil.copytree(GOLDEN / "exported", folder)
    description = json.loads((folder / "config.json").read_text())
    description["model"]["mixer"] = "attention"
    (folder / "config.json").write_text(json.dumps(description))
    batch, sigma = random_batch([30, 7]), torch.ones(2)
    expected = ProteinDiffusion.from_pretrained(GOLDEN / "exported", device="cpu")(batch, sigma)
    assert torch.equal(ProteinDiffusion.from_pretrained(folder, device="cpu")(batch, sigma), expected)
    loaded = load_trained(str(folder), device="cpu", precision="fp32")
    assert torch.equal(loaded.score_fn.logits(batch, sigma), expected)
    ProteinDiffusion.from_pretrained(folder, device="cpu").save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())["model"]
    assert not {"mixer", "mixers"} & again.keys()  # so that earlier versions can read the file


def test_a_mixed_network_is_exported_and_loaded(tmp_path: Path) -> None:
    model = asdict(ModelConfig(**SMALL_MODEL | {"n_blocks": 3, "norm": "rms", "qk_norm": True}, mixers=MIXED))
    description = json.loads((GOLDEN / "exported/config.json").read_text()) | {"model": model}
    write_exported(tmp_path / "mixed", NETWORK.state_dict(), description)
    batch, sigma = random_batch([30, 7]), torch.ones(2)
    loaded = ProteinDiffusion.from_pretrained(tmp_path / "mixed", device="cpu")
    assert torch.equal(loaded(batch, sigma), SCORE.logits(batch, sigma))
    assert find_saved(str(tmp_path / "mixed")).config.model.mixers == MIXED
    card = (tmp_path / "mixed/README.md").read_text()
    assert "| network | 3 blocks, width 32, 4 heads; mixers [ttt_linear, attention, ttt_mlp] |" in card


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({}, "2 blocks, width 32, 4 heads"),
        ({"mixers": "ttt_mlp"}, "2 blocks, width 32, 4 heads; mixers ttt_mlp"),
        ({"mlp": "geglu", "norm": "layer"}, "2 blocks, width 32, 4 heads; mlp geglu; norm layer"),
        (
            {"positions": "diet", "max_positions": 99, "tie_weights": True, "qk_norm": False},
            "2 blocks, width 32, 4 heads; positions diet; qk_norm false; tie_weights true",
        ),
    ],
)
def test_the_model_card_lists_the_kinds_of_parts_that_are_not_the_default(options: dict[str, Any], line: str) -> None:
    description = json.loads((GOLDEN / "exported/config.json").read_text())
    shipped = {"norm": "rms", "qk_norm": True}
    model = asdict(ModelConfig(**{**SMALL_MODEL, **shipped, **options}))
    for written in (model, stored_model(model)):  # with and without newer keys that have their default value
        assert f"\n| network | {line} |\n" in model_card(description | {"model": written})
    config = config_of("model=tiny").model
    assert all(getattr(config, key) == value for key, value in DEFAULT_KINDS.items())  # the defaults of configs/model


def test_fine_tuning_uses_the_mixers_of_the_source_and_rejects_others() -> None:
    source = replace(config_of("model=tiny", "model.mixers=[ttt_linear,attention]"), time_conditioning=False)
    found = with_source_model(config_of("from=runs/a"), source, {"from"})
    assert found.model.mixers == ["ttt_linear", "attention"]
    with pytest.raises(ValueError, match=r"model.mixers: \[ttt_linear, attention\] in the source, attention req"):
        with_source_model(config_of("from=runs/a", "model.mixers=attention"), source, {"model.mixers"})


def test_embeddings_are_the_hidden_states_of_each_protein_alone(proteins: list[FastaRecord]) -> None:
    encoded = [ProteinTokenizer().encode(record.sequence[:70]) for record in proteins[:3]]
    for layer in range(4):
        found = embed(NETWORK, SCORE, encoded, layer=layer, max_len=70)
        for tokens, states in zip(encoded, found, strict=True):
            batch = PackedBatch.pack([torch.from_numpy(tokens)])
            expected = NETWORK.hidden_states(batch, torch.zeros(1), layer)[1:-1]
            assert torch.allclose(states, expected, atol=1e-5, rtol=1e-5)


def test_a_mixed_network_samples_proteins_and_scores_variants(proteins: list[FastaRecord]) -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    sampled = [sample(SCORE, [40, 9], SamplerOptions(steps=4), generator) for generator in generators]
    for pack in sampled:
        assert [len(protein) for protein in pack] == [40, 9]
        assert all((protein < N_STATES).all() for protein in pack)
    assert not np.array_equal(sampled[0][0], sampled[1][0])

    tokens = torch.from_numpy(ProteinTokenizer().encode(proteins[0].sequence[:60])).long()
    position, mutant = 20, (int(tokens[21]) + 3) % N_STATES
    rows = Assay(["mutant"], [["0"]], [Variant(((position, mutant),))], ["row 0"], *[np.full(1, np.nan)] * 2)
    settings = {"strategy": "masked_marginals", "max_len": 100, "draws": 2, "seed": 0}
    found = score_variants(SCORE, tokens[1:-1].numpy(), rows, Work(200), **settings)
    masked = tokens.clone()
    masked[position + 1] = MASK
    logits = SCORE.logits(PackedBatch.pack([masked]), torch.ones(1))[position + 1].detach()
    assert found.nats[0] == pytest.approx(float(logits[mutant] - logits[tokens[position + 1]]), rel=1e-4)
