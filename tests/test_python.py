"""The methods of `ProteinDiffusion` return what the commands write, and docs/python.md shows how to call them."""

import csv
import inspect
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from protlig_dd.batch import TOKENS_PER_PACK, PackedBatch
from protlig_dd.convert import convert
from protlig_dd.data.fasta import FastaRecord, read_fasta
from protlig_dd.diffusion.numerics import clamp_negative
from protlig_dd.hub import ProteinDiffusion
from protlig_dd.inference import sharing
from protlig_dd.infill import infill
from protlig_dd.sample import sample_proteins
from protlig_dd.score import score_proteins
from protlig_dd.tokenizer import AMINO_ACIDS, BOS, EOS, MASK, ProteinTokenizer
from protlig_dd.variants import score as score_variants

from .conftest import ROOT, composed, raises_value_error
from .esm import esm_logits, random_esm
from .exported import KINDS, write_random

PROTEIN = "MKTAYIAKQRQISFVKSHFSRQ"
MASKING = [kind for kind in KINDS if kind.startswith("absorbing")]


@pytest.fixture
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the exported model models/demo of a kind in KINDS (absorbing by default)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["verb"])  # ranks compare the arguments
    (tmp_path / "models").mkdir()
    write_random(tmp_path / "models/demo", getattr(request, "param", "absorbing"), max_len=80)
    return tmp_path


@pytest.fixture
def model(folder: Path) -> Iterator[ProteinDiffusion]:
    """The model of `folder` in training mode. A method must restore this mode, although it computes without dropout."""
    model = ProteinDiffusion.from_pretrained(folder / "models/demo", device="cpu")
    yield model.train()
    assert model.training
    assert model.network.training


def run(verb: Any, name: str, *overrides: str) -> None:
    """Run a command on models/demo."""
    verb(composed("from=models/demo", "device=cpu", "precision=fp32", *overrides, name=name))


def rows_of(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def sequences_of(path: str) -> list[str]:
    return [record.sequence for record in read_fasta(Path(path))]


def ids(sequence: str) -> torch.Tensor:
    return torch.tensor([AMINO_ACIDS.find(letter) for letter in sequence])


@pytest.mark.parametrize("folder", KINDS, indirect=True)
def test_bounds_and_pseudo_likelihoods_are_those_of_score(model: ProteinDiffusion, proteins: list[FastaRecord]) -> None:
    sequences = [*[record.sequence for record in proteins if len(record.sequence) < 60][:2], PROTEIN.lower()]
    Path("in.fasta").write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    run(score_proteins, "score", "input=in.fasta", "output=out.csv", "draws=4", "seed=2")
    rows = rows_of("out.csv")
    found = model.nll(sequences, draws=4, seed=2)
    assert found.residues.tolist() == [int(row["scored_residues"]) for row in rows]
    for values, column in (
        (found.bound, "bound"),
        (found.standard_error, "bound_se"),
        (found.perplexity, "perplexity"),
        (found.perplexity_standard_error, "perplexity_se"),
    ):
        assert [f"{value:.6f}" for value in values.tolist()] == [row[column] for row in rows]
    if "pseudo_nll" in rows[0]:
        pseudo = model.pseudo_nll(sequences)
        assert [f"{value:.6f}" for value in pseudo.tolist()] == [row["pseudo_nll"] for row in rows]
        profile = model.pssm(sequences[2])  # the mean over residues of the profile at the residue
        assert float(-profile.gather(1, ids(PROTEIN)[:, None]).mean()) == pytest.approx(float(pseudo[2]), abs=1e-9)
    else:
        with pytest.raises(ValueError, match="pseudo_nll masks one residue .* this model has graph=uniform"):
            model.pseudo_nll(sequences)
        with pytest.raises(ValueError, match="pssm masks one residue .* this model has graph=uniform"):
            model.pssm(PROTEIN)


@pytest.mark.parametrize("folder", MASKING, indirect=True)
def test_the_profile_agrees_with_site_marginals(model: ProteinDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    wild_type = "MKXTAYIAKQR"
    profile = model.pssm(wild_type)
    assert profile.shape == (11, 20)
    assert torch.isneginf(profile[2]).all()  # X is not an amino acid
    known = [0, 1, *range(3, 11)]
    torch.testing.assert_close(profile[known].exp().sum(-1), torch.ones(10, dtype=torch.float64))
    Path("wt.fasta").write_text(f">wt\n{wild_type}\n")
    run(score_variants, "variants", "target=wt.fasta", "strategy=site_marginals", "output=scan.csv")
    for row in rows_of("scan.csv"):
        site = int(row["mutant"][1:-1]) - 1
        wild, mutant = (profile[site, AMINO_ACIDS.index(letter)] for letter in (row["mutant"][0], row["mutant"][-1]))
        assert float(mutant - wild) == pytest.approx(float(row["score"]), abs=1e-5)
    monkeypatch.setattr("protlig_dd.hub.TOKENS_PER_PACK", 30)  # two copies at once
    torch.testing.assert_close(model.pssm(wild_type), profile, atol=1e-5, rtol=0)


def test_profiles_of_a_converted_esm2_are_those_of_transformers(folder: Path) -> None:
    source = random_esm(folder / "esm")
    convert(composed("from=esm", "to=models/esm", name="convert"))
    model = ProteinDiffusion.from_pretrained("models/esm", device="cpu")
    masked = [f"{PROTEIN[:i]}_{PROTEIN[i + 1 :]}" for i in range(len(PROTEIN))]
    with torch.no_grad():
        rows = [logits[i + 1].double().log_softmax(-1) for i, logits in enumerate(esm_logits(source, masked))]
        (clean,) = esm_logits(source, [PROTEIN])
    torch.testing.assert_close(model.pssm(PROTEIN), torch.stack(rows), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.logits(PROTEIN), clean[1:-1].log_softmax(-1), atol=1e-5, rtol=0)
    expected = -torch.stack(rows).gather(1, ids(PROTEIN)[:, None]).mean()
    assert float(model.pseudo_nll([PROTEIN])) == pytest.approx(float(expected), abs=1e-5)
    with pytest.raises(ValueError, match="this model has no record of its training lengths; give lengths="):
        model.sample(1)


@pytest.mark.parametrize("folder", KINDS, indirect=True)
@pytest.mark.parametrize("t", [None, 0.3])
def test_logits_are_the_distribution_of_each_residue_given_the_others(model: ProteinDiffusion, t: float | None) -> None:
    """With the parametrisation log_score and a graph without a mask, the step-by-step sampler's posterior checks them.

    The posterior of x0 given all of x_t is proportional to q(x0) P(sigma)[x0, x_t].
    """
    masking = model.score_fn.graph.masks
    sequence = "MK_TAYXIAK_R" if masking else "MKVTAYXIAKWR"
    found = model.logits(sequence, t=t)
    assert found.shape == (12, 20)
    assert found.dtype == torch.float32
    assert torch.isneginf(found[6]).all()  # X is not an amino acid
    residues = [i for i in range(12) if i != 6]
    torch.testing.assert_close(found[residues].exp().sum(-1), torch.ones(11))
    tokens = torch.tensor([BOS, *(MASK if x == "_" else ProteinTokenizer().encode(x)[1] for x in sequence), EOS])
    if t is not None or not masking:
        sigma = model.noise(torch.tensor([model.noise.t_min if t is None else t]))[0]
    else:
        sigma = torch.tensor([-math.log(1 - 2 / 11)])  # two of eleven residues are masked
    with torch.no_grad(), model.analysis():
        network_sigma = sigma if model.score_fn.time_conditioning else 0 * sigma
        logits = model.network(PackedBatch.pack([tokens]), network_sigma)[1:-1][residues]
    if masking or model.score_fn.parametrisation == "x0":
        torch.testing.assert_close(found[residues], F.log_softmax(logits, -1), atol=1e-5, rtol=1e-5)
        return
    xt, sigma_T = tokens[1:-1][residues], sigma.double().expand(11)
    expected = clamp_negative(model.score_fn.reverse_probs(logits.double(), xt, sigma_T, torch.zeros(11).double()))[0]
    posterior = found[residues].double().exp() * model.score_fn.graph._probs_into(xt, sigma_T)
    torch.testing.assert_close(posterior / posterior.sum(-1, keepdim=True), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("folder", ["absorbing", "uniform"], indirect=True)
def test_samples_are_those_of_the_command(model: ProteinDiffusion) -> None:
    options = ("steps=4", "seed=5", "nll_draws=0")
    cases: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({}, ()),
        ({"lengths": 12}, ("lengths=12",)),
        ({"lengths": "8-20", "predictor": "euler"}, ("lengths=8-20", "predictor=euler")),
        (
            {"lengths": [9] * 3, "temperature": 0.8, "top_p": 0.9, "log_bias": {"C": -math.inf, "K": 0.5}},
            ("lengths=9", "temperature=0.8", "top_p=0.9", "log_bias={C:-inf,K:0.5}"),
        ),
        ({"lengths": 2, "log_bias": "bias.csv"}, ("lengths=2", "log_bias=bias.csv")),
    ]
    Path("bias.csv").write_text("C,K\n-inf,0\n0,4\n")
    for i, (arguments, overrides) in enumerate(cases):
        run(sample_proteins, "sample", f"output={i}.fasta", "n=3", *options, *overrides)
        assert model.sample(3, steps=4, seed=5, **arguments) == sequences_of(f"{i}.fasta")
    row = torch.zeros(2, 20, dtype=torch.float64)
    row[0, 1], row[1, 8] = -math.inf, 4
    assert model.sample(3, lengths=2, steps=4, seed=5, log_bias=row) == sequences_of("4.fasta")
    assert [len(sequence) for sequence in model.sample(2, lengths=[3, 5], steps=2)] == [3, 5]
    assert not any("C" in sequence for sequence in sequences_of("3.fasta"))


@pytest.mark.parametrize("folder", ["absorbing", "uniform"], indirect=True)
def test_designs_are_those_of_the_command(model: ProteinDiffusion) -> None:
    sequences = ["MK__YIAKQR_ISF", "MKX_"]
    Path("in.fasta").write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(sequences)))
    run(infill, "infill", "input=in.fasta", "output=out.fasta", "n=3", "steps=4", "seed=2", "free_draws=0")
    designs = model.infill(sequences, 3, steps=4, seed=2)
    assert [design for group in designs for design in group] == sequences_of("out.fasta")
    for sequence, group in zip(sequences, designs, strict=True):
        for design in group:
            assert re.fullmatch(sequence.replace("_", f"[{AMINO_ACIDS}]"), design)
    forbidden = torch.zeros(14, 20), torch.zeros(4, 20)
    forbidden[1][3, 1:] = -math.inf  # only A is allowed at the last residue of the second protein
    designs = model.infill(sequences, 2, steps=4, log_bias=list(forbidden))
    assert [design[3] for design in designs[1]] == ["A", "A"]
    assert len(model.infill(["A_"])[0]) == 1


@pytest.mark.parametrize("folder", ["absorbing", "uniform"], indirect=True)
def test_scores_of_variants_are_those_of_the_command(model: ProteinDiffusion) -> None:
    Path("wt.fasta").write_text(f">wt\n{PROTEIN}\n")
    run(score_variants, "variants", "target=wt.fasta", "output=scan.csv")
    found, rows = model.variants(PROTEIN.lower()), rows_of("scan.csv")
    assert found.mutants == [row["mutant"] for row in rows]
    assert [f"{score:.6f}" for score in found.scores.tolist()] == [row["score"] for row in rows]
    assert found.standard_error is None
    mutants = ["M1A", "K2D:A4G", "k2del", "WT"]
    Path("assay.csv").write_text("mutant\n" + "\n".join(mutants))
    run(score_variants, "variants", "target=wt.fasta", "assay=assay.csv", "output=s.csv", "draws=4", "seed=1")
    found, rows = model.variants(PROTEIN, mutants, draws=4, seed=1), rows_of("s.csv")
    assert found.mutants == mutants
    assert [f"{score:.6f}" for score in found.scores.tolist()] == [row["score"] for row in rows]
    assert found.standard_error is not None
    assert [f"{error:.6f}" for error in found.standard_error.tolist()][2] == rows[2]["score_se"]
    shifted = model.variants(PROTEIN, ["M101A"], offset=100, strategy="bound", draws=4)
    assert shifted.scores.equal(model.variants(PROTEIN, ["M1A"], strategy="bound", draws=4).scores)


def test_the_defaults_of_the_methods_are_those_of_the_commands() -> None:
    for name, verb in (("nll", "score"), ("sample", "sample"), ("infill", "infill"), ("variants", "variants")):
        config = composed("from=x", *(["input=y"] if verb == "infill" else []), name=verb)
        assert config.tokens_per_pack == TOKENS_PER_PACK
        parameters = inspect.signature(getattr(ProteinDiffusion, name)).parameters
        for key, parameter in parameters.items():
            if key in config and (name, key) not in (("sample", "n"), ("infill", "n"), ("variants", "target")):
                expected = 0 if key == "offset" else config[key]  # null: 0 without a reference file
                assert parameter.default == expected, (name, key)


def test_methods_print_nothing_and_do_not_wait_for_other_processes(
    model: ProteinDiffusion, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sharing, "gather_objects", None)  # a call would fail
    model.nll([PROTEIN])
    model.pseudo_nll([PROTEIN])
    model.sample(2, lengths=5, steps=2)
    model.infill(["MK_"], steps=2)
    model.variants("MKV")
    assert capsys.readouterr() == ("", "")


def test_invalid_arguments_are_errors_that_name_them(model: ProteinDiffusion) -> None:
    long = "M" * 81
    cases: list[tuple[str, tuple[Any, ...], dict[str, Any], str]] = [
        ("nll", (PROTEIN,), {}, "nll takes a list of sequences, got the string 'MKTA"),
        ("nll", ([],), {}, "nll takes a list of sequences, .* is empty"),
        ("nll", (["MKV", "MK1"],), {}, r"sequences\[1\]: illegal character '1' at position 3 of 3"),
        ("nll", (["MKV", "MK_"],), {}, r"sequences\[1\]: illegal character '_' at position 3 of 3"),
        ("nll", ([long],), {}, r"sequences\[0\] has 81 residues; this model was trained on 1 to 80"),
        ("nll", (["MKV", "XXB"],), {}, r"sequences\[1\] has no residue to score"),
        ("nll", ([PROTEIN],), {"draws": 0}, "draws must be at least 1, got 0"),
        ("nll", ([PROTEIN],), {"draws": 1.5}, "draws is a whole number, got 1.5"),
        ("nll", ([PROTEIN],), {"seed": "a"}, "seed is a whole number, got 'a'"),
        ("pseudo_nll", (["", "MKV"],), {}, r"sequences\[0\]: no residues"),
        ("logits", ([PROTEIN],), {}, "sequence: a sequence is a string of letters"),
        ("logits", (long,), {}, "sequence has 81 residues; this model was trained on 1 to 80"),
        ("logits", (PROTEIN,), {"t": 2}, r"t must be a number in \[0.001, 1\], got 2"),
        ("pssm", ("MK_",), {}, "sequence: illegal character '_' at position 3 of 3"),
        ("pssm", (long,), {}, "sequence has 81 residues"),
        ("sample", (0,), {}, "n must be at least 1, got 0"),
        ("sample", ("3",), {}, "n is a whole number, got '3'"),
        ("sample", (2,), {"lengths": [5]}, "lengths has 1 numbers for n=2 proteins"),
        ("sample", (2,), {"lengths": [5, 81]}, r"lengths\[1\]: the protein has 81 residues; this model was trained on"),
        ("sample", (2,), {"lengths": [5, 2.5]}, r"lengths\[1\] is a whole number, got 2.5"),
        ("sample", (2,), {"lengths": 2.5}, "lengths is a number, a list of numbers or a text such as 100-300, got 2.5"),
        ("sample", (2,), {"lengths": "20-90"}, "lengths=20-90: the longest protein has 90 residues; this model was"),
        ("sample", (2,), {"lengths": 0}, "lengths=0: give a number or a range such as 100-300, or empirical"),
        ("sample", (2,), {"lengths": 5, "steps": 0}, "sampling needs at least 1 step, got 0"),
        ("sample", (2,), {"lengths": 5, "predictor": "tau"}, "unknown predictor 'tau'; choose from analytic, euler"),
        ("sample", (2,), {"lengths": 5, "log_bias": {"Z": 1}}, "log_bias: 'Z' is not one of the amino acids"),
        ("sample", (2,), {"lengths": 5, "log_bias": torch.zeros(4, 20)}, r"log_bias\[0\] has shape \(4, 20\)"),
        ("sample", (2,), {"lengths": 5, "log_bias": 1}, "log_bias is a mapping such as"),
        ("infill", ("MK_",), {}, "infill takes a list of sequences with `_` at free positions, got the string 'MK_'"),
        ("infill", ([5],), {}, r"sequences\[0\]: a sequence is a string of letters, got 5"),
        ("infill", (["MK_", "MK"],), {}, r"sequences\[1\] has no free position, so there is nothing to sample"),
        ("infill", ([long[:-1] + "__"],), {}, r"sequences\[0\] has 82 residues"),
        ("infill", (["MK_"], 0), {}, "n must be at least 1, got 0"),
        ("infill", (["MK_"], 10**7), {}, "n must be at most 1000000, got 10000000"),
        ("infill", (["MK_"] * 2,), {"log_bias": [torch.zeros(3, 20)]}, "a list of 1 tensors for 2 designs"),
        ("variants", ("MK1",), {}, "target: illegal character '1' at position 3 of 3"),
        (
            "variants",
            ("MKV", ["A1M"]),
            {},
            r"mutations\[0\]: A1M has A at position 1, but the target has M; set offset=",
        ),
        ("variants", ("MKV", ["M1A", "K9A"]), {}, r"mutations\[1\]: K9A is at position 9, outside the target's"),
        ("variants", ("MKV", "M1A"), {}, "mutations is a list such as .*, got the string 'M1A'"),
        ("variants", ("MKV", [1]), {}, r"mutations\[0\]: a mutation is a string such as A24P, got 1"),
        ("variants", ("MKV",), {"strategy": "ratio"}, "strategy=ratio is not available for graph=absorbing"),
        ("variants", ("MKV",), {"strategy": "bound", "draws": 3}, "draws must be even and at least 4, got 3"),
        ("variants", ("MKV",), {"seed": 0.5}, "seed is a whole number, got 0.5"),
    ]
    for method, arguments, options, message in cases:
        with raises_value_error(message):
            getattr(model, method)(*arguments, **options)


def test_the_examples_in_the_docs_run(folder: Path) -> None:
    """Run the Python blocks of docs/python.md one after the other, with the assertions that they contain."""
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.DOTALL)
    assert len(code) >= 7
    names: dict[str, Any] = {}
    for block in code:
        exec(block, names)
    shown = {name for name in vars(ProteinDiffusion) if re.search(rf"model\.{name}\(", "".join(code))}
    assert shown >= {"nll", "pseudo_nll", "logits", "pssm", "sample", "infill", "variants", "embed"}
