"""Exported models in Hugging Face transformers: the same logits, states, gradients and token ids as in protlig_dd.

The tests use the version of transformers in the environment. test_exported_models_work_in_transformers_4 runs all of
them again with version 4.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer

from protlig_dd.batch import PackedBatch
from protlig_dd.config.components import build_model
from protlig_dd.convert import convert
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.export import export
from protlig_dd.hub import ProteinDiffusion
from protlig_dd.inference.exported import DESCRIPTION, EXPORTED, READ, WEIGHTS, write_exported
from protlig_dd.inference.for_transformers import CODE, FILES, SUPPORTED, unsupported
from protlig_dd.inference.model import SavedModel, describe, find_saved
from protlig_dd.model.config import HEADS, MLPS, NORMS
from protlig_dd.model.mixers import MIXERS
from protlig_dd.model.positions import POSITIONS
from protlig_dd.tokenizer import BOS, EOS, MASK, PAD, ProteinTokenizer
from protlig_dd.training.resolve import resolve

from .conftest import ROOT, composed, require, train_config
from .esm import random_esm
from .test_convert import changed_sequences, pack

SIZES = ("model.hidden_size=32", "model.n_heads=4", "model.n_blocks=3", "model.cond_dim=16", "run.name=small")
TIMED = ("graph=uniform", "parametrisation=log_score")
NETWORKS = {
    "default": (),
    "the other choices": (
        *TIMED,
        "model.norm=layer",
        "model.mlp=geglu",
        "model.qk_norm=false",
        "model.tie_weights=true",
    ),
    "with time": ("time_conditioning=true", "model.mlp=swiglu", "model.positions=sinusoidal", "model.dropout=0.1"),
    "without positions": ("model.positions=none", "model.mlp=relu2", "model.head=lm", "model.norm_eps=0.01"),
}
ESM = {"esm2": {}, "esm2, untied": {"tie_word_embeddings": False, "token_dropout": False}}
VERSION_4 = ROOT / f"{os.environ.get('PROTLIG_VENV', '.venv')}-transformers4"


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let transformers copy the code of exported models to a temporary folder, and not to its cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", folder)
        patch.syspath_prepend(folder)
        yield


def exported(folder: Path, *overrides: str) -> Path:
    """Write the export of a run whose network has random weights; return its folder."""
    config = resolve(train_config(*SIZES, *overrides), Path("none"))
    network = build_model(config.model, "sdpa", bool(config.time_conditioning))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    saved = SavedModel(folder, folder, config, 0, None, None, "", [])
    write_exported(folder, network.state_dict(), describe(saved, None))
    return folder


@pytest.fixture(scope="module", params=[*NETWORKS, *ESM])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported model of each kind. Tests must not change it."""
    folder, name = tmp_path_factory.mktemp("model"), request.param
    if name in NETWORKS:
        return exported(folder / "exported-1.0", *NETWORKS[name])
    random_esm(folder / "source", **ESM[name])
    convert(composed(f"from={folder}/source", f"to={folder}/esm2", name="convert"))
    return folder / "esm2"


only_default = pytest.mark.parametrize("model", ["default"], indirect=True)


def load(kind: Any, folder: Path, **options: Any) -> Any:
    return kind.from_pretrained(folder, trust_remote_code=True, **options)


def inputs_of(folder: Path, sequences: list[str]) -> dict[str, Tensor]:
    """Return padded ids, mask, and sigma if the network reads it. In `sequences`, `_` stands for <mask>."""
    texts = [sequence.replace("_", "<mask>") for sequence in sequences]
    inputs = dict(load(AutoTokenizer, folder)(texts, padding=True, return_tensors="pt"))
    description = json.loads((folder / DESCRIPTION).read_text())
    if description["time_conditioning"]:
        inputs["sigma"] = torch.linspace(*description["sigma_range"], len(sequences))
    return inputs


def unpadded(output: Tensor, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Return the rows of a padded output without padding."""
    return [row[read.bool()] for row, read in zip(output, inputs["attention_mask"], strict=True)]


def sigma_in(inputs: dict[str, Tensor]) -> Tensor:
    return inputs.get("sigma", torch.zeros(len(inputs["input_ids"])))


def test_logits_are_those_of_protlig_dd(model: Path, proteins: list[FastaRecord]) -> None:
    sequences = changed_sequences(proteins)
    inputs, batch = inputs_of(model, sequences), pack(sequences)
    network = ProteinDiffusion.from_pretrained(model, device="cpu").network
    masked_lm = load(AutoModelForMaskedLM, model)
    assert not masked_lm.training
    with torch.no_grad():
        expected = batch.unpack(network(batch, sigma_in(inputs)))
        padded = unpadded(masked_lm(**inputs).logits, inputs)
        ids = inputs["input_ids"].flip(1)  # padding before each protein, and its residues in reverse order
        reversed_batch = PackedBatch.pack([tokens.flip(0) for tokens in batch.unpack(batch.tokens)])
        reversed_logits = reversed_batch.unpack(network(reversed_batch, sigma_in(inputs)))
        from_the_left = masked_lm(ids, sigma=inputs.get("sigma")).logits  # without a mask, <pad> is not read
        alone = [
            masked_lm(tokens.unsqueeze(0), sigma=inputs["sigma"][[i]] if "sigma" in inputs else None).logits[0]
            for i, tokens in enumerate(batch.unpack(batch.tokens))
        ]
    assert max(float(logits.abs().max()) for logits in expected) > 1
    for i, logits in enumerate(expected):
        for found, reference in (
            (padded[i], logits),
            (alone[i], logits),
            (from_the_left[i, -len(logits) :], reversed_logits[i]),
        ):
            torch.testing.assert_close(found[:, :20], reference, rtol=1e-5, atol=1e-5)
            assert found[:, 20:].eq(-1e4).all()
            assert found.softmax(-1)[:, 20:].eq(0).all()


def test_hidden_states_are_those_of_protlig_dd(model: Path, proteins: list[FastaRecord]) -> None:
    sequences = [record.sequence[:80] for record in proteins[:4]]
    inputs, batch = inputs_of(model, sequences), pack(sequences)
    ours, base = ProteinDiffusion.from_pretrained(model, device="cpu"), load(AutoModel, model)
    with torch.no_grad():
        output = base(**inputs, output_hidden_states=True)
        assert "hidden_states" not in base(**inputs)
        last, states = base(**inputs, output_hidden_states=True, return_dict=False)
        assert torch.equal(base(**inputs).last_hidden_state, output.last_hidden_state)
        assert torch.equal(states[-1], last)
        for layer, states in enumerate(output.hidden_states):
            expected = batch.unpack(ours.network.hidden_states(batch, sigma_in(inputs), layer))
            for found, reference in zip(unpadded(states, inputs), expected, strict=True):
                torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)
    assert len(output.hidden_states) == len(ours.network.blocks) + 1
    if "sigma" not in inputs:
        means = [states[1:-1].mean(0) for states in unpadded(output.last_hidden_state, inputs)]
        torch.testing.assert_close(torch.stack(means), ours.embed(sequences), rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_protlig_dd(model: Path, proteins: list[FastaRecord]) -> None:
    sequences = changed_sequences(proteins)
    inputs, batch = inputs_of(model, sequences), pack(sequences)
    network = ProteinDiffusion.from_pretrained(model, device="cpu").network
    masked_lm = load(AutoModelForMaskedLM, model)
    weights = torch.randn(len(batch.tokens), 20, generator=torch.Generator().manual_seed(1))
    (network(batch, sigma_in(inputs)) * weights).sum().backward()
    logits = torch.cat(unpadded(masked_lm(**inputs).logits, inputs))
    (logits[:, :20] * weights).sum().backward()
    expected = {name: parameter.grad for name, parameter in network.named_parameters()}
    for name, parameter in masked_lm.named_parameters():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForMaskedLM])
def test_every_weight_is_loaded_unchanged(kind: Any, model: Path) -> None:
    weights = load_file(model / WEIGHTS)
    loaded, info = load(kind, model, output_loading_info=True)
    assert loaded.state_dict().keys() == weights.keys() == dict(loaded.named_parameters()).keys()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    assert not list(loaded.buffers())  # transformers would not restore buffers that are not in the file
    assert not any(info[f"{problem}_keys"] for problem in ("missing", "mismatched", "unexpected"))


@only_default
@pytest.mark.parametrize("kind", [AutoModel, AutoModelForMaskedLM])
def test_weights_that_do_not_fit_are_an_error(kind: Any, model: Path, tmp_path: Path) -> None:
    weights = load_file(model / WEIGHTS)
    for name in (DESCRIPTION, CODE):
        (tmp_path / name).write_bytes((model / name).read_bytes())
    for tensor in ("head.out.bias", "blocks.1.q_norm.weight"):
        others = {name: value for name, value in weights.items() if name != tensor}
        save_file(others, tmp_path / WEIGHTS, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=f"the weights do not fit config.json: missing {tensor}"):
            load(kind, tmp_path)
    save_file(weights | {"head.gate": torch.zeros(2)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights do not fit config.json: unexpected head\.gate"):
        load(kind, tmp_path)
    save_file(weights | {"head.out.bias": torch.zeros(21)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"the weights do not fit config.json: mismatched .*head\.out\.bias"):
        load(kind, tmp_path, ignore_mismatched_sizes=True)


@only_default
def test_token_ids_are_those_of_protlig_dd(model: Path, proteins: list[FastaRecord]) -> None:
    encode, decode = ProteinTokenizer().encode, ProteinTokenizer().decode
    for trusted in (True, False):  # the tokenizer has no code
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trusted)
        assert (tokenizer.mask_token_id, tokenizer.bos_token_id) == (MASK, BOS)
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (EOS, PAD)
        assert (len(tokenizer), tokenizer.model_max_length) == (30, 1026)
    sequences = [*(record.sequence for record in proteins), "XBZJUO", "M", "ACDEFGHIKLMNPQRSTVWY" * 60]
    assert {letter for sequence in sequences for letter in sequence} >= set("XBZJUO")
    for sequence, ids in zip(sequences, tokenizer(sequences)["input_ids"], strict=True):
        assert ids == encode(sequence).tolist()
        assert tokenizer.decode(ids, skip_special_tokens=True) == decode(np.array(ids)) == sequence
    batch = tokenizer([sequences[0], "M<mask>K"], padding=True, return_tensors="pt")
    assert batch["input_ids"][1].tolist() == [BOS, 10, MASK, 8, EOS] + [PAD] * (len(sequences[0]) - 3)
    assert batch["attention_mask"][1].tolist() == [1] * 5 + [0] * (len(sequences[0]) - 3)
    assert set(batch) == {"input_ids", "attention_mask"}
    for illegal in ("mkt", "MK T", "MK*", "MK_", "M\nK", "MK1"):
        with pytest.raises(Exception, match="Missing .UNK. token from the vocabulary"):
            tokenizer(illegal)


@pytest.mark.parametrize("kind", [AutoModel, AutoModelForMaskedLM])
def test_a_model_that_transformers_saves_loads_again(kind: Any, model: Path, tmp_path: Path) -> None:
    first = load(kind, model)
    first.save_pretrained(tmp_path / "saved")
    load(AutoTokenizer, model).save_pretrained(tmp_path / "saved")
    inputs = inputs_of(model, ["MKTAYIAKQR", "MSH_WGYG"])
    with torch.no_grad():
        for again in (AutoModel, AutoModelForMaskedLM):
            found, expected = (load(again, folder)(**inputs)[0] for folder in (tmp_path / "saved", model))
            assert torch.equal(found, expected)
    assert load(AutoTokenizer, tmp_path / "saved")("MKX")["input_ids"] == [BOS, 10, 8, 21, EOS]
    description = json.loads((tmp_path / "saved" / DESCRIPTION).read_text())
    original = json.loads((model / DESCRIPTION).read_text())
    assert not {"weights_sha256", "report"} & description.keys()  # they describe the exported weights
    same = original.keys() - {"weights_sha256", "report", "architectures"}
    assert {key: description[key] for key in same} == {key: original[key] for key in same}
    with pytest.raises(ValueError, match="saved: saved by transformers, and protlig_dd reads only models that it"):
        ProteinDiffusion.from_pretrained(tmp_path / "saved", device="cpu")


@only_default
def test_weights_tuned_in_transformers_can_be_used_in_protlig_dd(model: Path, tmp_path: Path) -> None:
    tuned = load(AutoModelForMaskedLM, model).train()
    optimizer = torch.optim.SGD(tuned.parameters(), lr=0.01)
    inputs = inputs_of(model, ["MKTAY_AKQR", "MSH_WGYG"])
    labels = torch.where(inputs["input_ids"] == MASK, 3, -100)
    losses = []
    for _ in range(5):
        losses.append(tuned(**inputs, labels=labels).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    ours = ProteinDiffusion.from_pretrained(model, device="cpu")
    ours.network.load_state_dict(tuned.state_dict())
    ours.save_pretrained(tmp_path / "tuned")
    batch = pack(["MKTAY_AKQR", "MSH_WGYG"])
    network = ProteinDiffusion.from_pretrained(tmp_path / "tuned", device="cpu").network
    with torch.no_grad():
        logits = torch.cat(unpadded(tuned.eval()(**inputs).logits, inputs))
        torch.testing.assert_close(network(batch, torch.zeros(2)), logits[:, :20], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parametrisation", ["x0", "log_score"])
def test_the_loss_is_the_mean_cross_entropy_of_amino_acids(parametrisation: str, tmp_path: Path) -> None:
    """With the absorbing graph, logits of both parametrisations are log-probabilities up to a constant."""
    model = exported(tmp_path / "model", f"parametrisation={parametrisation}", "graph=absorbing")
    masked_lm, inputs = load(AutoModelForMaskedLM, model), inputs_of(model, ["MKTXY_IA", "MS"])
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    output = masked_lm(**inputs, labels=labels)
    counted = labels.ge(0) & labels.lt(20)  # not <bos>, X, <mask>, <eos> and padding
    assert int(counted.sum()) == 8
    expected = F.cross_entropy(output.logits[counted], labels[counted])
    torch.testing.assert_close(output.loss, expected)


def test_weights_can_be_loaded_as_bf16(model: Path, proteins: list[FastaRecord]) -> None:
    inputs = inputs_of(model, [record.sequence[:60] for record in proteins[:4]])
    exact, rounded = (load(AutoModelForMaskedLM, model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        expected, found = (network(**inputs).logits[..., :20] for network in (exact, rounded))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = exact(**inputs).logits[..., :20]
    for logits in (found, mixed):
        assert logits.dtype == torch.float32  # exp() of bf16 logits would be off by 0.2%
        assert (logits - expected).std() < 0.1 * expected.std()


def test_the_config_has_the_sizes_that_transformers_expects(model: Path) -> None:
    config, network = load(AutoConfig, model), json.loads((model / DESCRIPTION).read_text())["model"]
    sizes = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.vocab_size)
    assert sizes == (network["hidden_size"], network["n_blocks"], network["n_heads"], 30)
    assert config.model_type == "protlig_dd"


@only_default
def test_the_pipeline_fills_masks_with_the_most_probable_amino_acids(model: Path) -> None:
    options = {"model": str(model), "trust_remote_code": True, "device": "cpu"}
    rows = transformers.pipeline("fill-mask", tokenizer=load(AutoTokenizer, model), **options)(
        "MKT<mask>YIAK", top_k=20
    )
    assert sorted(row["token_str"] for row in rows) == list("ACDEFGHIKLMNPQRSTVWY")
    network = ProteinDiffusion.from_pretrained(model, device="cpu").network
    with torch.no_grad():
        probabilities = network(pack(["MKT_YIAK"]), torch.zeros(1))[4].softmax(-1)
    for row in rows:
        assert row["score"] == pytest.approx(float(probabilities[row["token"]]), abs=1e-5)


@only_default
def test_wrong_inputs_are_errors_that_name_them(model: Path) -> None:
    masked_lm, ids = load(AutoModelForMaskedLM, model), torch.tensor([[BOS, 3, EOS]])
    for arguments, message in (
        ({"input_ids": torch.tensor([[BOS, 30, EOS]])}, "input_ids has the id 30; protlig_dd has the ids 0 to 29"),
        ({"input_ids": torch.tensor([[BOS, -1, EOS]])}, "input_ids has the id -1"),
        ({"input_ids": ids[0]}, r"input_ids must be (sequences, tokens), got shape (3,)"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 2)}, "attention_mask has shape (1, 2), but input_ids has"),
        ({"input_ids": ids, "attention_mask": torch.zeros(1, 3)}, "a sequence has no tokens"),
        ({"input_ids": torch.full((1, 3), PAD)}, "a sequence has no tokens"),
        ({"input_ids": ids, "sigma": torch.ones(1)}, "this network does not read sigma (time_conditioning=false)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            masked_lm(**arguments)


@pytest.mark.parametrize("model", ["the other choices"], indirect=True)
def test_a_network_with_time_conditioning_needs_sigma(model: Path) -> None:
    masked_lm, ids = load(AutoModelForMaskedLM, model), torch.tensor([[BOS, 3, EOS]] * 2)
    expected = r"a tensor \(2,\), the total noise of each sequence, 0.0009995 \(clean\) to 6.908 \(pure noise\)"
    with pytest.raises(ValueError, match=rf"\(time_conditioning=true\): give sigma, {expected}"):
        masked_lm(ids)
    with pytest.raises(ValueError, match=rf"sigma has shape \(1,\): give {expected}"):
        masked_lm(ids, sigma=torch.ones(1))
    with pytest.raises(
        ValueError, match=r"the logits of this network are scores \(parametrisation=log_score, graph=uniform\)"
    ):
        masked_lm(ids, sigma=torch.ones(2), labels=ids)
    low, high = masked_lm.config.sigma_range
    noise = ProteinDiffusion.from_pretrained(model, device="cpu").noise
    assert [low, high] == noise(torch.tensor([noise.t_min, 1.0]))[0].tolist()


@pytest.mark.parametrize("model", ["with time"], indirect=True)
def test_dropout_is_active_in_training_mode_only(model: Path) -> None:
    masked_lm, inputs = load(AutoModelForMaskedLM, model), inputs_of(model, ["MKTAYIAKQR"])
    with torch.no_grad():
        assert torch.equal(masked_lm(**inputs).logits, masked_lm(**inputs).logits)
        masked_lm.train()
        assert not torch.equal(masked_lm(**inputs).logits, masked_lm(**inputs).logits)


@pytest.mark.parametrize("positions", POSITIONS)
def test_exports_have_code_exactly_if_transformers_can_compute_the_network(
    positions: str, proteins: list[FastaRecord], tmp_path: Path
) -> None:
    folder = exported(tmp_path / "model", f"model.positions={positions}", "time_conditioning=false")
    written, card = {path.name for path in folder.iterdir()}, (folder / "README.md").read_text()
    description = json.loads((folder / DESCRIPTION).read_text())
    network = ProteinDiffusion.from_pretrained(folder, device="cpu").network
    if positions not in SUPPORTED["positions"]:
        assert written == set(READ)
        assert not {"auto_map", "model_type", "architectures"} & description.keys()
        assert "AutoModel" not in card
        assert unsupported(description["model"]) == f"model.positions={positions}"
        return
    assert written == set(EXPORTED)
    assert "AutoModelForMaskedLM" in card
    sequences = changed_sequences(proteins)
    inputs, batch = inputs_of(folder, sequences), pack(sequences)
    with torch.no_grad():
        logits = torch.cat(unpadded(load(AutoModelForMaskedLM, folder)(**inputs).logits, inputs))
        expected = network(batch, torch.zeros(len(sequences)))
    torch.testing.assert_close(logits[:, :20], expected, rtol=1e-5, atol=1e-5)


def test_every_kind_of_norm_mlp_and_head_is_supported_and_other_mixers_are_not(tmp_path: Path) -> None:
    assert {key: set(SUPPORTED[key]) for key in ("norm", "mlp", "head")} == {
        "norm": set(NORMS),
        "mlp": set(MLPS),
        "head": set(HEADS),
    }
    assert unsupported({}) is None
    for mixer in MIXERS.keys() - {"attention"}:
        assert unsupported({"mixers": mixer}) == f"model.mixers={mixer}"
    mixed = exported(tmp_path / "mixed", "model.mixers=[attention,attention,ttt_linear]")
    assert {path.name for path in mixed.iterdir()} == set(READ)


def test_export_prints_which_part_transformers_cannot_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, positions in (("rope", "rope"), ("t5", "t5")):
        folder = exported(tmp_path / name, f"model.positions={positions}")
        monkeypatch.setattr("protlig_dd.export.is_exported", lambda path: False)
        export(composed(f"from={folder}", f"to={tmp_path}/of_{name}", name="export"))
        line = "transformers cannot load this model: model.positions=t5; use ProteinDiffusion (protlig_dd.hub)"
        assert (line in " ".join(capsys.readouterr().out.split())) == (name == "t5")


@only_default
def test_protlig_dd_does_not_run_the_code_in_an_export(model: Path, tmp_path: Path) -> None:
    for name in EXPORTED:
        (tmp_path / name).write_bytes((model / name).read_bytes())
    (tmp_path / CODE).write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    ours = ProteinDiffusion.from_pretrained(tmp_path, device="cpu")
    assert find_saved(str(tmp_path)).step == 0
    assert not (tmp_path / "ran").exists()
    ours.save_pretrained(tmp_path / "copy")
    for name in EXPORTED:  # also the code: it is that of this version, and not that of the folder
        assert (tmp_path / "copy" / name).read_bytes() == (model / name).read_bytes()


def test_an_export_without_files_for_transformers_is_read_and_gets_them_when_it_is_saved(tmp_path: Path) -> None:
    golden = ROOT / "tests/golden/files/exported"
    assert not {path.name for path in golden.iterdir()} & set(FILES)
    model = ProteinDiffusion.from_pretrained(golden, device="cpu")
    model.save_pretrained(tmp_path / "copy")
    batch, inputs = pack(["MKTAYIAKQR"]), inputs_of(tmp_path / "copy", ["MKTAYIAKQR"])
    with torch.no_grad():
        logits = load(AutoModelForMaskedLM, tmp_path / "copy")(**inputs).logits[0, :, :20]
        torch.testing.assert_close(logits, model.network(batch, torch.zeros(1)), rtol=1e-5, atol=1e-5)


def test_the_code_in_an_export_needs_only_torch_and_transformers() -> None:
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "protlig_dd/inference" / CODE).read_text())):
        if isinstance(node, ast.ImportFrom):
            # earlier versions of transformers cannot import a second file if the folder's name has a dot
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
    assert imported - sys.stdlib_module_names == {"torch", "transformers"}


@only_default
def test_the_python_code_in_the_docs_runs(model: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs/sharing.md").read_text().partition("## With transformers")[2]
    code, tuned = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[:2]
    names: dict[str, Any] = {"model": ProteinDiffusion.from_pretrained(model, device="cpu")}
    exec(code.replace("models/demo", str(model)), names)
    assert names["logits"].shape == (2, 12, 30)
    assert len(names["residues"]) == 10
    assert set(names["residues"]) <= set("ACDEFGHIKLMNPQRSTVWY")
    assert names["states"].shape == (2, 12, 32)
    exec(tuned.replace("models/tuned", str(tmp_path / "tuned")), names)
    assert (tmp_path / "tuned" / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()


def test_the_code_in_the_model_card_runs(model: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(blocks[-1].replace('"this folder, or owner/name on the Hugging Face Hub"', repr(str(model))), names)
    assert names["logits"].shape == (1, 10, 30)


RUN_TESTS = """
import sys, transformers, pytest
assert transformers.__version__.startswith("4."), transformers.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_exported_models_work_in_transformers_4() -> None:
    """Run the other tests of this file, and the comparisons of test_convert.py, with transformers 4."""
    require(VERSION_4.is_dir(), f"transformers 4 is not installed in {VERSION_4} (scripts/setup.sh --dev)")
    ignored = ["ignore::DeprecationWarning", "ignore::FutureWarning"]  # version 4 is older than its libraries
    options = ["-q", "-p", "no:cacheprovider", *(part for text in ignored for part in ("-W", text))]
    # the expression selects all tests of the first file, by its name
    tests = [
        "tests/test_transformers.py",
        "tests/test_convert.py",
        "-m",
        "not slow",
        "-k",
        "(transformers and not bound) or frequencies",
    ]
    environment = os.environ | {"PYTHONPATH": f"{VERSION_4}:{ROOT}"}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-c", RUN_TESTS, *options, *tests]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-2000:]
