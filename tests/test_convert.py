"""Conversion of ESM-2 and DPLM: equality with transformers, and models that cannot be converted."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from omegaconf import DictConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.convert import convert
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.data.store import SequenceStore
from protlig_dd.evaluate import evaluate
from protlig_dd.export import export
from protlig_dd.hub import ProteinDiffusion
from protlig_dd.inference.esm import ESM_VOCABULARY, EsmSource, esm_token_ids, translate
from protlig_dd.infill import infill
from protlig_dd.model.dit import DiT
from protlig_dd.sample import sample_proteins
from protlig_dd.tokenizer import LETTERS, MASK, ProteinTokenizer
from protlig_dd.variants import score

from .conftest import Command, assert_one_line_error, composed, raises_value_error
from .esm import AMINO_ACIDS, ESM_TOKENS, esm_ids, esm_logits, random_esm
from .test_export import COMMIT, REPOSITORY, hub_server
from .test_kinds_of_networks import SMALL

SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "deep": {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 3},
    "wide": {"hidden_size": 320, "num_hidden_layers": 3, "num_attention_heads": 20},  # ESM-2 8M has width 320, 20 heads
}


def changed_sequences(proteins: list[FastaRecord], seed: int = 0) -> list[str]:
    """Return real proteins of different lengths in which some residues are masked, or are X, B, U, Z, O or J."""
    rng = np.random.default_rng(seed)
    sequences = []
    for record, fraction in zip(proteins[:8], (0, 0.15, 0.5, 0.9, 1, 0.15, 0.15, 0), strict=True):
        letters = np.array(list(record.sequence[:150]))
        letters[rng.random(len(letters)) < 0.05] = rng.choice(list("XBUZOJ"))
        letters[rng.random(len(letters)) < fraction] = "_"
        sequences.append("".join(letters))
    return [*sequences, "M", "_"]


def pack(sequences: list[str]) -> PackedBatch:
    """Return a pack of sequences in which `_` stands for <mask>."""
    tokens = []
    for sequence in sequences:
        ids = torch.from_numpy(ProteinTokenizer().encode(sequence.replace("_", "X")).astype(np.int64))
        ids[1:-1][torch.tensor([letter == "_" for letter in sequence])] = MASK
        tokens.append(ids)
    return PackedBatch.pack(tokens)


def logits_of(network: DiT, sequences: list[str]) -> list[Tensor]:
    batch = pack(sequences)
    return batch.unpack(network(batch, torch.zeros(len(sequences))))


def converted(folder: Path, **options: Any) -> tuple[transformers.EsmForMaskedLM, Path]:
    """Return a random model, and the folder of its conversion."""
    source = random_esm(folder / "source", **options)
    convert(composed(f"from={folder}/source", f"to={folder}/model", name="convert"))
    return source, folder / "model"


@pytest.mark.parametrize("token_dropout", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_a_converted_model_has_the_logits_of_transformers(
    size: str, token_dropout: bool, proteins: list[FastaRecord], tmp_path: Path
) -> None:
    source, folder = converted(tmp_path, token_dropout=token_dropout, **SIZES[size])
    network = ProteinDiffusion.from_pretrained(folder, device="cpu").network
    sequences = changed_sequences(proteins)
    assert {len(sequence) for sequence in sequences} > {1}
    with torch.no_grad():
        expected = esm_logits(source, sequences)
        packed = logits_of(network, sequences)
        alone = [logits_of(network, [sequence])[0] for sequence in sequences]
    assert max(float(logits.abs().max()) for logits in expected) > 1
    for ours in (packed, alone):
        for logits, reference in zip(ours, expected, strict=True):
            torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)


def test_in_float64_a_converted_model_differs_from_transformers_by_rounding_only(
    proteins: list[FastaRecord], tmp_path: Path
) -> None:
    source, folder = converted(tmp_path)
    network = ProteinDiffusion.from_pretrained(folder, device="cpu").network.double()
    sequences = changed_sequences(proteins)
    with torch.no_grad():
        for logits, reference in zip(
            logits_of(network, sequences), esm_logits(source.double(), sequences), strict=True
        ):
            torch.testing.assert_close(logits, reference, rtol=1e-6, atol=1e-6)  # angles are float32 in both


@pytest.mark.parametrize("token_dropout", [True, False])
def test_a_converted_model_has_the_gradients_of_transformers(
    token_dropout: bool, proteins: list[FastaRecord], tmp_path: Path
) -> None:
    source, folder = converted(tmp_path, token_dropout=token_dropout)
    network = ProteinDiffusion.from_pretrained(folder, device="cpu").network
    sequences = changed_sequences(proteins)
    weights = torch.randn(sum(map(len, sequences)) + 2 * len(sequences), 20, generator=torch.Generator().manual_seed(1))
    (torch.cat(esm_logits(source, sequences)) * weights).sum().backward()
    (torch.cat(logits_of(network, sequences)) * weights).sum().backward()
    gradients = {name: p.grad for name, p in source.named_parameters() if p.grad is not None}
    expected = translate(EsmSource(folder, source.config.to_dict(), gradients, {}))
    for name, parameter in network.named_parameters():
        if name == "head.out.gain":  # the source has no such parameter
            continue
        assert parameter.grad is not None, name
        scale = float(expected[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4 * scale)


def test_embeddings_of_a_converted_model_are_the_last_hidden_states_of_transformers(
    proteins: list[FastaRecord], tmp_path: Path
) -> None:
    source, folder = converted(tmp_path)
    model = ProteinDiffusion.from_pretrained(folder, device="cpu")
    sequences = [record.sequence[:150] for record in proteins[:5]]
    ids, mask = esm_ids(sequences)
    with torch.no_grad():
        states = source.esm(ids, attention_mask=mask).last_hidden_state
    for vector, state, sequence in zip(model.embed(sequences), states, sequences, strict=True):
        torch.testing.assert_close(vector, state[1 : len(sequence) + 1].mean(0), rtol=1e-5, atol=1e-5)


def use(verb: Callable[[DictConfig], None], name: str, *overrides: str) -> None:
    verb(composed(*overrides, "device=cpu", "precision=fp32", name=name))


def test_mutation_scores_of_a_converted_model_equal_those_of_the_public_esm_script(
    proteins: list[FastaRecord], tmp_path: Path
) -> None:
    """The script is examples/variant-prediction/predict.py of github.com/facebookresearch/esm.

    It masks one position at a time (masked-marginals) or none (wt-marginals), and subtracts the log-probability of the
    wild type's residue from that of the mutant's. Both are taken over all 33 tokens, which cancels in the difference.
    """
    source, folder = converted(tmp_path)
    target = proteins[0].sequence[:40]
    ids, mask = esm_ids([target])
    masked = ids.repeat(len(target), 1)
    masked[range(len(target)), range(1, len(target) + 1)] = ESM_TOKENS.index("<mask>")
    with torch.no_grad():
        unmasked = source(ids, attention_mask=mask).logits[0, 1:-1].log_softmax(-1)
        one_masked = source(masked).logits[range(len(target)), range(1, len(target) + 1)].log_softmax(-1)
    for strategy, log_p in (("masked_marginals", one_masked), ("wildtype_marginals", unmasked)):
        file = tmp_path / f"{strategy}.csv"
        use(score, "variants", f"from={folder}", f"target={target}", f"strategy={strategy}", f"output={file}")
        with file.open() as handle:
            rows = list(csv.DictReader(handle))
        assert len(rows) == 19 * len(target)
        for row in rows:
            wild, position, mutant = row["mutant"][0], int(row["mutant"][1:-1]) - 1, row["mutant"][-1]
            expected = log_p[position, ESM_TOKENS.index(mutant)] - log_p[position, ESM_TOKENS.index(wild)]
            assert float(row["score"]) == pytest.approx(float(expected), abs=1e-4)


def test_the_exact_count_bound_of_a_converted_model_equals_one_computed_with_transformers(tmp_path: Path) -> None:
    """A protein of two residues has three sets of masked residues, so its bound can be computed exactly."""
    source, folder = converted(tmp_path)
    (tmp_path / "two.fasta").write_text(">two\nMK\n")
    with torch.no_grad():
        logits = esm_logits(source, ["_K", "M_", "__"])
    first, second, both = (row.log_softmax(-1) for row in logits)
    m, k = AMINO_ACIDS.index("M"), AMINO_ACIDS.index("K")
    # one or two of the L = 2 residues are masked, with probability 1/2 each; a set of k has the weight L / k
    one_masked = -(2 * first[1, m] + 2 * second[2, k]) / 2
    expected = float((one_masked - both[1, m] - both[2, k]) / 2)
    found = ["near=false", "draws=2000", "masked=false", f"output={tmp_path}/evaluation"]
    use(evaluate, "evaluate", f"from={folder}", f"input={tmp_path}/two.fasta", *found)
    report = json.loads((tmp_path / "evaluation/report.json").read_text())
    assert report["bound"] == pytest.approx(expected / 2, abs=5 * report["bound_se"])


def test_samples_and_designs_of_a_converted_model_have_their_fixed_residues_and_lengths(
    proteins: list[FastaRecord], tmp_path: Path
) -> None:
    _, folder = converted(tmp_path)
    start = proteins[0].sequence[:30]
    (tmp_path / "partial.fasta").write_text(f">a\n{start[:10]}__________{start[20:]}\n")
    use(sample_proteins, "sample", f"from={folder}", "n=2", "lengths=25", "steps=5", f"output={tmp_path}/s.fasta")
    use(infill, "infill", f"from={folder}", f"input={tmp_path}/partial.fasta", "steps=5", f"output={tmp_path}/i.fasta")
    assert [len(record.sequence) for record in read_fasta(tmp_path / "s.fasta")] == [25, 25]
    for record in read_fasta(tmp_path / "i.fasta"):
        assert (record.sequence[:10], record.sequence[20:]) == (start[:10], start[20:])


def test_every_token_but_j_has_its_name_in_esm() -> None:
    assert list(ESM_VOCABULARY) == ESM_TOKENS
    names = [ESM_TOKENS[i] for i in esm_token_ids()]
    assert names == [*AMINO_ACIDS, "<mask>", *"XBZ", "<unk>", *"UO", "<cls>", "<eos>", "<pad>"]
    assert LETTERS[names.index("<unk>")] == "J"


def test_stored_rotary_frequencies_are_kept(proteins: list[FastaRecord], tmp_path: Path) -> None:
    """ESM-2's frequencies have been rounded to float16, in older files once per block."""
    source = random_esm(tmp_path / "source")
    frequencies = [buffer for name, buffer in source.named_buffers() if name.endswith("rotary_embeddings.inv_freq")]
    rounded = frequencies[0].half().float()
    for buffer in frequencies:  # one in transformers 5, one per block in version 4
        assert not torch.equal(rounded, buffer)
        buffer.copy_(rounded)
    file = tmp_path / "source/model.safetensors"
    weights = {name: tensor for name, tensor in load_file(file).items() if "inv_freq" not in name}
    names = [f"esm.encoder.layer.{block}.attention.self.rotary_embeddings.inv_freq" for block in range(2)]
    save_file(weights | {name: rounded.clone() for name in names}, file)
    convert(composed(f"from={tmp_path}/source", f"to={tmp_path}/model", name="convert"))
    network = ProteinDiffusion.from_pretrained(tmp_path / "model", device="cpu").network
    sequences = changed_sequences(proteins)
    with torch.no_grad():
        for logits, reference in zip(logits_of(network, sequences), esm_logits(source, sequences), strict=True):
            torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)
    save_file(weights | {names[0]: rounded.clone(), names[1]: 2 * rounded}, file)
    with raises_value_error(f"{names[1]} differs from {names[0]}; ESM-2's blocks share their frequencies"):
        read_and_convert(tmp_path / "source", tmp_path / "other")


def read_and_convert(source: Path, to: Path) -> None:
    convert(composed(f"from={source}", f"to={to}", name="convert"))


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_in_a_pickle_are_read_without_running_code(
    sharded: bool, proteins: list[FastaRecord], tmp_path: Path
) -> None:
    source = random_esm(tmp_path / "source", tie_word_embeddings=False)
    folder = tmp_path / "source"
    state = source.state_dict()
    (folder / "model.safetensors").unlink()
    if sharded:
        names = sorted(state)
        shards = {"pytorch_model-1.bin": names[::2], "pytorch_model-2.bin": names[1::2]}
        for file, part in shards.items():
            torch.save({name: state[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    read_and_convert(folder, tmp_path / "model")
    network = ProteinDiffusion.from_pretrained(tmp_path / "model", device="cpu").network
    sequences = changed_sequences(proteins)
    with torch.no_grad():
        for logits, reference in zip(logits_of(network, sequences), esm_logits(source, sequences), strict=True):
            torch.testing.assert_close(logits, reference, rtol=1e-5, atol=1e-5)


class Touch:
    """An object whose unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_a_pickle_that_runs_code_is_an_error_and_runs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    random_esm(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"a": Touch(tmp_path / "touched")}, folder / "pytorch_model.bin")
    with raises_value_error(
        f"{folder}/pytorch_model.bin: damaged, or a pickle with more than tensors, which could run code"
    ):
        read_and_convert(folder, tmp_path / "model")
    assert not (tmp_path / "touched").exists()
    assert not (tmp_path / "model").exists()


def edit_config(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | values))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def swap_tokens(folder: Path) -> None:
    tokens = [*ESM_TOKENS]
    tokens[4], tokens[5] = tokens[5], tokens[4]
    (folder / "vocab.txt").write_text("\n".join(tokens))


QUERY = "esm.encoder.layer.1.attention.self.query.weight"
BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "another architecture": (
        lambda folder: edit_config(folder, model_type="bert", architectures=["BertForMaskedLM"]),
        "config.json: model_type=bert (BertForMaskedLM); only ESM-2 and models with its architecture",
    ),
    "ESM-1b": (
        lambda folder: edit_config(folder, position_embedding_type="absolute"),
        "config.json: position_embedding_type=absolute, but ESM-2 has position_embedding_type=rotary",
    ),
    "the vocabulary of DPLM-2": (
        lambda folder: edit_config(folder, vocab_size=8229),
        "config.json: vocab_size=8229, but ESM-2 has vocab_size=33",
    ),
    "other token ids": (swap_tokens, "vocab.txt: token 4 is 'A', but ESM-2's is 'L'"),
    "another mask": (
        lambda folder: edit_config(folder, mask_token_id=31),
        "config.json: mask_token_id=31, but ESM-2's <mask> has id 32",
    ),
    "narrow inner layers": (
        lambda folder: edit_config(folder, intermediate_size=64),
        "config.json: intermediate_size=64, but hidden_size=32 needs 128",
    ),
    "another width": (
        lambda folder: edit_config(folder, hidden_size=64, intermediate_size=256),
        "esm.embeddings.word_embeddings.weight has shape (33, 32), but hidden_size=64 and 33 tokens need (33, 64)",
    ),
    "a matrix of another shape": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({QUERY: torch.zeros(30, 32)})),
        f"{QUERY} has shape (30, 32), but hidden_size=32 and 33 tokens need (32, 32)",
    ),
    "a missing tensor": (
        lambda folder: edit_weights(folder, lambda weights: weights.__delitem__(QUERY)),
        f"the weights lack {QUERY}",
    ),
    "an unknown tensor": (
        lambda folder: edit_weights(folder, lambda weights: weights.update({"esm.gate": torch.zeros(2)})),
        "esm.gate is not part of ESM-2's architecture",
    ),
    "no weights": (
        lambda folder: (folder / "model.safetensors").unlink(),
        "no weights; expected model.safetensors or pytorch_model.bin in it",
    ),
    "damaged weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 40),
        "model.safetensors: cannot be read (",
    ),
    "no number": (
        lambda folder: edit_config(folder, layer_norm_eps=None),
        "config.json: layer_norm_eps=None; it must be a number",
    ),
    "no list of tokens": (
        lambda folder: edit_config(folder, vocab_list=5),
        "config.json (vocab_list): 5 is not a list of tokens",
    ),
    "a damaged index": (
        lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 5}}'),
        "model.safetensors.index.json: damaged; weight_map must have the name of a file for each tensor",
    ),
    "an index that leaves the folder": (
        lambda folder: (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../b.safetensors"}}'
        ),
        "model.safetensors.index.json: '../b.safetensors' is not the name of a file in this folder",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "source: no config.json in it"),
    "an adapter of peft": (
        lambda folder: (folder / "config.json").rename(folder / "adapter_config.json"),
        "source: no config.json in it, but an adapter of peft; merge it with its model first",
    ),
    "a pointer of Git LFS": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x\n"),
        "model.safetensors is a pointer of Git LFS, not the weights; run `git lfs pull`",
    ),
    "no head": (
        lambda folder: edit_weights(folder, lambda w: [w.pop(name) for name in list(w) if name.startswith("lm_head")]),
        "the weights have no lm_head; a model without it (EsmModel) cannot predict residues",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_source_that_is_not_esm2_is_an_error_that_names_the_difference(case: str, tmp_path: Path) -> None:
    damage, message = BAD[case]
    random_esm(tmp_path / "source")
    damage(tmp_path / "source")
    with raises_value_error(re.escape(message)):
        read_and_convert(tmp_path / "source", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_source_of_a_converted_model_is_in_its_description_and_card(tmp_path: Path) -> None:
    _, folder = converted(tmp_path)
    description = json.loads((folder / "config.json").read_text())
    (checksum,) = description["converted_from"]["sha256"].values()
    assert checksum in (folder / "README.md").read_text()
    assert description["max_len"] == 1022
    assert description["converted_from"]["name"] == "source"


def test_convert_names_bad_arguments_in_one_line(tmp_path: Path, run_python: Command) -> None:
    random_esm(tmp_path / "source")
    process = run_python("-m", "protlig_dd.convert", "from=source", "to=model", "revision=main")
    assert_one_line_error(process, "revision=main is for a name on the hub, but from=source is a local folder")
    process = run_python("-m", "protlig_dd.convert", "from=owner/none", "to=model", HF_HUB_OFFLINE="1")
    assert_one_line_error(
        process, "owner/none is not a local folder, and the hub cannot be reached", "hf download owner/none"
    )
    process = run_python("-m", "protlig_dd.convert", "from=source", "to=model")
    assert process.returncode == 0, process.stderr
    assert "for proteins of up to 1022 residues" in process.stdout
    process = run_python("-m", "protlig_dd.convert", "from=model", "to=other")
    assert_one_line_error(process, "model is a model of protlig_dd already")
    process = run_python("-m", "protlig_dd.score", "from=source", "sequence=MKTAY")
    assert_one_line_error(process, "source is a model of transformers with the architecture of ESM-2; convert it first")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("FOLDER/none", "FOLDER/none: no such folder"),
        ("./none", "./none: no such folder"),
        ("FOLDER/file", "FOLDER/file is a file; give the folder that contains it"),
        (
            "esm2_t12_35M_UR50D",
            "'esm2_t12_35M_UR50D' is neither a local folder nor the name of a model on the hub, owner/",
        ),
        (
            "https://huggingface.co/a/b",
            "'https://huggingface.co/a/b' is neither a local folder nor the name of a model",
        ),
        ("", "from is empty; give a folder or, as from=, a name on the hub"),
        ("FOLDER", "FOLDER: no config.json in it"),
    ],
)
def test_a_source_that_is_neither_a_folder_nor_a_name_is_an_error(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    here = str(tmp_path)
    with raises_value_error(re.escape(message.replace("FOLDER", here))):
        convert(composed(f"from='{name.replace('FOLDER', here)}'", f"to={tmp_path}/model", name="convert"))


@pytest.mark.slow
def test_a_model_fine_tuned_from_a_converted_one_records_its_origin(
    store: SequenceStore, tmp_path: Path, run_python: Command
) -> None:
    _, folder = converted(tmp_path)
    keys = [key for key in SMALL if not key.startswith("model.")]
    process = run_python("-m", "protlig_dd.training", *keys, "from=model", f"data.path={store.path}")
    assert process.returncode == 0, process.stderr
    assert "data.max_len=40 is less than the source's 1022: the fine-tuned model is for proteins" in process.stdout
    export(composed(f"from={tmp_path}/runs/demo", f"to={tmp_path}/exported", name="export"))
    origins = [
        json.loads((path / "config.json").read_text())["converted_from"] for path in (folder, tmp_path / "exported")
    ]
    assert origins[0] == origins[1]
    (checksum,) = origins[0]["sha256"].values()
    card = (tmp_path / "exported/README.md").read_text()
    assert "| derived from | source; its licence applies to these weights |" in card
    assert checksum in card
    assert "| fine-tuned from | model |" in card
    assert "A protein language model by score-entropy discrete diffusion" in card
    converted_card = (folder / "README.md").read_text()
    assert "a masked language model, converted for protlig_dd" in converted_card
    assert "This model has not been measured." in converted_card
    assert "noise" not in converted_card


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True])
def test_a_model_is_downloaded_from_a_hub_and_its_commit_recorded(
    pickled: bool, tmp_path: Path, run_python: Command
) -> None:
    source = random_esm(tmp_path / "source")
    if pickled:
        torch.save(source.state_dict(), tmp_path / "source/pytorch_model.bin")
        (tmp_path / "source/model.safetensors").unlink()
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    verb = ("-m", "protlig_dd.convert")
    with hub_server() as (address, files):
        files |= {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
        files["modeling_evil.py"] = b"raise SystemExit"
        files["optimizer.bin" if pickled else "pytorch_model.bin"] = b"not needed"
        process = run_python(*verb, f"from={REPOSITORY}", "to=model", "revision=v1", HF_ENDPOINT=address, **environment)
        assert process.returncode == 0, process.stderr
        process = run_python(
            *verb, f"from={REPOSITORY}", "to=other", "revision=missing", HF_ENDPOINT=address, **environment
        )
        assert_one_line_error(process, f"{REPOSITORY} has no revision 'missing' on the hub")
        process = run_python(*verb, "from=someone/gated", "to=other", HF_ENDPOINT=address, **environment)
        assert_one_line_error(process, "someone/gated is gated: accept its terms on this page, then run `hf auth")
    origin = json.loads((tmp_path / "model/config.json").read_text())["converted_from"]
    assert (origin["name"], origin["commit"]) == (REPOSITORY, COMMIT)
    assert f"converted from | {REPOSITORY}, revision v1, commit {COMMIT}" in (tmp_path / "model/README.md").read_text()
    downloaded = {path.name for path in (tmp_path / "home").rglob("*") if path.is_symlink() or path.is_file()}
    assert not {"modeling_evil.py", "optimizer.bin", "pytorch_model.bin" if not pickled else ""} & downloaded
    read_and_convert(tmp_path / "source", tmp_path / "local")
    assert (tmp_path / "local/model.safetensors").read_bytes() == (tmp_path / "model/model.safetensors").read_bytes()
