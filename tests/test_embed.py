"""Tests of embeddings.

The windows of long proteins, and the means over windows and over residues, are compared with direct computation.
Packing and the number of ranks must not change the embeddings. Both file formats and bad input are tested too.
"""

import functools
import itertools
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd import __version__
from protlig_dd.batch import PackedBatch
from protlig_dd.data.crops import window, window_starts
from protlig_dd.data.store import SequenceStore
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.diffusion.graphs.uniform import Uniform
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.inference.embedding import embed, resolve_layer
from protlig_dd.inference.embedding_file import ids_column
from protlig_dd.inference.model import load_trained
from protlig_dd.tokenizer import ProteinTokenizer

from .conftest import Command, assert_one_line_error, make_model
from .test_training import torchrun, train

CPU = torch.device("cpu")
LAYERS = 2


@functools.cache
def network(kind: str) -> tuple:
    """Return a model and its score function. `kind` is `time-free`, or `conditioned` for time conditioning."""
    graph: Graph = Absorbing() if kind == "time-free" else Uniform()
    model = make_model(time_conditioning=kind != "time-free", n_blocks=LAYERS, norm="rms").eval()
    return model, ScoreFn(model, graph, LogLinearNoise(), "x0", kind != "time-free")


def encoded(*sequences: str) -> list[np.ndarray]:
    return [ProteinTokenizer().encode(sequence) for sequence in sequences]


def random_proteins(lengths: list[int], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [ProteinTokenizer().encode("".join(rng.choice(list("ACDEFGHIKLX"), length))) for length in lengths]


@pytest.mark.parametrize("kind", ["time-free", "conditioned"])
@pytest.mark.parametrize("layer", range(LAYERS + 1))
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 9))
def test_a_protein_has_the_same_embedding_alone_and_in_a_pack(
    kind: str, layer: int, lengths: list[int], seed: int
) -> None:
    proteins = random_proteins(lengths, seed)
    run = functools.partial(embed, *network(kind), layer=layer, max_len=25)
    packed = run(proteins)
    assert [tuple(states.shape) for states in packed] == [(length, 32) for length in lengths]
    for protein, states in zip(proteins, packed, strict=True):
        (alone,) = run([protein])
        assert torch.allclose(states, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["time-free", "conditioned"])
def test_the_last_layer_gives_the_logits_and_the_first_is_the_embedding(kind: str) -> None:
    model, score_fn = network(kind)
    noise = score_fn.noise
    (tokens,) = encoded("MKTAYIAKQRX")
    last, first = (embed(model, score_fn, [tokens], layer=layer, max_len=11)[0] for layer in (2, 0))
    batch = PackedBatch.pack([torch.from_numpy(tokens)])
    sigma = noise(torch.full((1,), noise.t_min))[0]
    assert 0 < float(sigma) < 0.01
    logits = score_fn.logits(batch, sigma)[1:-1]
    assert torch.allclose(model.head.out(last), logits, atol=1e-6)
    assert torch.equal(first, model.embedding.weight[batch.tokens[1:-1]])
    network_sigma = sigma if kind == "conditioned" else torch.zeros(1)
    middle = model.hidden_states(batch, network_sigma, 1)
    assert torch.equal(embed(model, score_fn, [tokens], layer=1, max_len=11)[0], middle[1:-1])
    with pytest.raises(ValueError, match=r"layer must be from 0 \(the embedding\) to 2, got 3"):
        model.hidden_states(batch, network_sigma, 3)


@given(residues=st.integers(1, 300), most=st.integers(1, 60))
def test_windows_cover_a_protein_and_overlap_by_half(residues: int, most: int) -> None:
    starts = window_starts(residues, most)
    covered = np.zeros(residues, int)
    for start in starts:
        assert start + min(most, residues) <= residues
        covered[start : start + most] += 1
    assert covered.min() >= 1
    assert starts[0] == 0
    assert len(set(starts)) == len(starts)
    assert all(b - a <= max(1, most // 2) for a, b in itertools.pairwise(starts))
    assert len(starts) == 1 or len(starts) == 1 + -(-(residues - most) // max(1, most // 2))
    tokens = np.concatenate([[27], np.arange(residues) % 20, [28]])
    for start in starts:
        cut = window(tokens, start, most)
        assert cut[cut < 27].tolist() == tokens[1:-1][start : start + most].tolist()
        assert (27 in cut) == (start == 0)
        assert (28 in cut) == (start + most >= residues)


def test_a_long_protein_has_the_mean_over_its_windows() -> None:
    model, score_fn = network("time-free")
    (tokens,) = random_proteins([23], 3)
    (states,) = embed(model, score_fn, [tokens], layer=2, max_len=10)
    assert window_starts(23, 10) == [0, 4, 9, 13]
    seen: list[list[torch.Tensor]] = [[] for _ in range(23)]
    for start in (0, 4, 9, 13):
        piece = tokens[1:-1][start : start + 10]
        ends = ([27] if start == 0 else []), ([28] if start == 13 else [])
        batch = PackedBatch.pack([torch.tensor([*ends[0], *piece.tolist(), *ends[1]])])
        hidden = model.hidden_states(batch, torch.zeros(1), 2).detach()
        for i in range(10):
            seen[start + i].append(hidden[len(ends[0]) + i])
    expected = torch.stack([torch.stack(states_of_residue).mean(0) for states_of_residue in seen])
    assert torch.allclose(states, expected, atol=1e-5)


def test_the_windows_of_a_very_long_protein_are_computed_in_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, score_fn), seen = network("time-free"), list[int]()
    giant, hidden = encoded("MKVLAWGCDE" * 60), model.hidden_states
    whole = embed(model, score_fn, giant, layer=1, max_len=40)

    def watched(batch: PackedBatch, *rest: object) -> torch.Tensor:
        seen.append(len(batch.tokens))
        return hidden(batch, *rest)

    monkeypatch.setattr(model, "hidden_states", watched)
    parts = embed(model, score_fn, giant, layer=1, max_len=40, tokens_per_pack=100)
    assert max(seen) <= 100
    assert sum(seen) > 1100
    assert torch.allclose(whole[0], parts[0], atol=1e-5)
    seen.clear()
    embed(model, score_fn, encoded("MKVLAWGCDE" * 1200), layer=1, max_len=400)
    assert len(seen) == 2  # the windows have 23,602 tokens, more than one pack of the default tokens_per_pack
    assert max(seen) <= 16_384


def test_very_long_ids_fit_in_hdf5_and_are_an_error_in_npz(tmp_path: Path) -> None:
    """HDF5 stores each id at its own length. NPZ stores every id at the length of the longest id."""
    ids = ["x" * 300_000, *(f"p{i}" for i in range(2000))]
    assert sum(map(len, ids_column(ids, tmp_path / "x.h5"))) == sum(map(len, ids))
    with pytest.raises(
        ValueError, match=r"output=.*x.npz: NPZ stores every id .* 300,000 letters \(xxxx.*2.4 GB in total"
    ):
        ids_column(ids, tmp_path / "x.npz")
    assert ids_column(ids[1:], tmp_path / "x.npz").tolist() == ids[1:]


@pytest.mark.parametrize(("layer", "found"), [(-1, 2), (-3, 0), (0, 0), (2, 2)])
def test_layers_are_counted_from_either_end(layer: int, found: int) -> None:
    assert resolve_layer(layer, 2) == found
    for wrong in (3, -4):
        with pytest.raises(ValueError, match=f"layer={wrong}: this model has layers 0 "):
            resolve_layer(wrong, 2)


@pytest.mark.slow
def test_the_embed_command_writes_both_formats_on_any_number_of_ranks(
    run_python: Command, store: SequenceStore, tmp_path: Path
) -> None:
    train(run_python, store, "small", "trainer.max_steps=2", "trainer.device=cpu", "trainer.precision=fp32")
    sequences = {f"p/{i}": ProteinTokenizer().decode(store[i])[:150] for i in range(12)}
    sequences["p/200"] = "MKVLA" * 40  # 200 residues, the maximum without long=window
    text = "".join(f">{id_} kept out of the ids\n{sequence.lower()}\n" for id_, sequence in sequences.items())
    (tmp_path / "some.fasta").write_text(text)
    (tmp_path / "long.fasta").write_text(text + f">giant\n{'MKV' * 150}\n")
    command = ["-m", "protlig_dd.embed", "from=runs/small", "precision=fp32", "device=cpu"]

    def run(*more: str) -> str:
        process = run_python(*command, *more)
        assert process.returncode == 0, process.stderr
        return process.stdout

    out = run("input=some.fasta", "output=out/mean.h5", "tokens_per_pack=300")
    assert "out/mean.h5: 13 proteins, mean, 13 x 32 float32" in out
    run("input=some.fasta", "output=one.npz", "pooling=per_residue", "layer=1")
    trained = load_trained(str(tmp_path / "runs/small"), device="cpu", precision="fp32")
    parts = [trained.network, trained.score_fn, encoded(*sequences.values())]
    expected = embed(*parts, layer=2, max_len=200)
    with h5py.File(tmp_path / "out/mean.h5") as file:
        assert file["ids"].asstr()[:].tolist() == list(sequences)
        assert file["lengths"][:].tolist() == [len(sequence) for sequence in sequences.values()]
        assert file["embeddings"].dtype == np.float32
        means = torch.stack([states.mean(0) for states in expected])
        assert torch.allclose(torch.from_numpy(file["embeddings"][:]), means, atol=1e-5)
        assert dict(file.attrs) == {
            "run": "small",
            "step": 2,
            "checkpoint": "runs/small/checkpoints/step_00000002",
            "layer": 2,
            "pooling": "mean",
            "protlig_dd": __version__,
        }
    with np.load(tmp_path / "one.npz", allow_pickle=False) as file:
        assert file["ids"].tolist() == list(sequences)
        assert (int(file["step"]), int(file["layer"]), str(file["pooling"])) == (2, 1, "per_residue")
        offsets = file["offsets"]
        assert np.diff(offsets).tolist() == file["lengths"].tolist()
        for i, states in enumerate(embed(*parts, layer=1, max_len=200)):
            mine = torch.from_numpy(file["embeddings"][offsets[i] : offsets[i + 1]])
            assert torch.allclose(mine, states, atol=1e-5)

    ranks = [
        *torchrun(2, []),
        *command[2:],
        "input=long.fasta",
        "output=ranks.h5",
        "long=window",
        "tokens_per_pack=200",
    ]
    ranks[ranks.index("protlig_dd.training")] = "protlig_dd.embed"
    process = run_python(*ranks)
    assert process.returncode == 0, process.stderr
    run("input=long.fasta", "output=alone.h5", "long=window")
    with h5py.File(tmp_path / "ranks.h5") as shared, h5py.File(tmp_path / "alone.h5") as alone:
        assert np.allclose(shared["embeddings"][:], alone["embeddings"][:], atol=1e-5)
        assert shared["ids"].asstr()[-1] == "giant"
        assert shared["ids"][:].tolist() == alone["ids"][:].tolist()

    for more, parts_of_error in (
        (["input=long.fasta", "output=x.h5"], ["long.fasta: giant has 450 residues", "at most 200", "long=window"]),
        (["input=some.fasta", "output=x.csv"], ["output=x.csv: the name must end in .h5 or .npz"]),
        (["input=some.fasta", "output=out/mean.h5"], ["out/mean.h5 exists already"]),
        (["input=some.fasta", "output=x.h5", "pooling=max"], ["pooling=max", "mean, per_residue"]),
        (["input=some.fasta", "output=x.h5", "layer=3"], ["layer=3", "to 2"]),
        (["input=none.fasta", "output=x.h5"], ["none.fasta: no such file"]),
    ):
        assert_one_line_error(run_python(*command, *more), *parts_of_error)
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith((".x", "x."))]
    assert json.loads((tmp_path / "runs/small/report.json").read_text())["step"] == 2
