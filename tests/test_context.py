"""Tests of context: residues that the network reads, but that are never noised and not in the loss.

The case of letters marks the context residues. All other residues are called designed.
"""

import gzip
import itertools
import json
import math
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from protlig_dd.batch import PackedBatch
from protlig_dd.config.read import as_dict
from protlig_dd.config.train import changed_keys
from protlig_dd.data.case import context_tokens, lower_case_of, targets_of
from protlig_dd.data.context import check_designed, context_of, designed_counts
from protlig_dd.data.crops import designed_crops
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.loader import PackDataset, pack_loader
from protlig_dd.data.prepare import spool
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.prepare.filters import Filters
from protlig_dd.data.prepare.splits import Split
from protlig_dd.data.store import SPLITS, SequenceStore, StoreGroup, fingerprint_of
from protlig_dd.diffusion.exact_count import masked_nats
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.likelihood import integrand, nll_bound, reconstruction
from protlig_dd.diffusion.loss import score_entropy_loss
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.numerics import sum_by_sequence
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.evaluation.inputs import read_proteins
from protlig_dd.evaluation.likelihood.baselines import baselines_of, fit_baselines
from protlig_dd.evaluation.likelihood.held_out import designed_frequencies
from protlig_dd.evaluation.samples.redesigns import Redesign, free_draws
from protlig_dd.hub import ProteinDiffusion
from protlig_dd.inference.inspect import sigma_of
from protlig_dd.inference.layouts import mask_free_positions, read_records
from protlig_dd.inference.sequences import encode_with_free
from protlig_dd.inference.sharing import Work
from protlig_dd.system.distributed import ALONE
from protlig_dd.tokenizer import AMINO_ACIDS, BOS, CONTEXT, EOS, MASK, N_STATES, ProteinTokenizer
from protlig_dd.training.objective import Objective
from protlig_dd.training.trainer import count_residues

from . import brute_force
from .conftest import (
    Command,
    assert_one_line_error,
    exact_score_fn,
    graph_of,
    make_model,
    marked,
    raises_value_error,
    train_config,
)
from .test_likelihood import GRAPHS, UnconvertedScores, all_states, exact_noise, quadrature_nodes

encode = ProteinTokenizer().encode


def write(path: Path, sequences: list[str]) -> Path:
    path.write_text("".join(f">p{i} a protein\n{sequence}\n" for i, sequence in enumerate(sequences)))
    return path


def build(tmp_path: Path, sequences: list[str], name: str = "mixed") -> SequenceStore:
    return build_store([write(tmp_path / f"{name}.fasta", sequences)], tmp_path / f"{name}.h5")


# ---- the store


def test_a_store_without_mixed_case_records_keeps_no_case(tmp_path: Path, proteins: list[FastaRecord]) -> None:
    """If no record has letters of both cases, the store does not keep the case.

    Upper-case and lower-case records then give the same contents. The columns and manifest entries for the case are
    absent.
    """
    upper = build(tmp_path, [record.sequence for record in proteins], "upper")
    lower = build(tmp_path, [record.sequence.lower() for record in proteins], "lower")
    each = build(tmp_path, [r.sequence.lower() if i % 2 else r.sequence for i, r in enumerate(proteins)], "each")
    with h5py.File(upper.path) as file:
        names = set(file)
        assert names == {"tokens", "offsets", "headers", "header_offsets", "split", "token_counts", "manifest"}
        columns = {name: file[name][:].tobytes() for name in names - {"manifest"}}
    ordered = ("tokens", "offsets", "headers", "header_offsets", "split", "token_counts")
    # the fingerprint is the same as in earlier versions, whose stores could not keep the case
    text = " ".join(f"{name}={upper.checksums[name]}" for name in ordered)
    assert upper.fingerprint == xxhash.xxh3_128_hexdigest(text.encode())
    for store in (lower, each):
        assert not store.has_case
        assert store.fingerprint == upper.fingerprint
        with h5py.File(store.path) as file:
            assert {name: file[name][:].tobytes() for name in file if name != "manifest"} == columns
        assert store.manifest.keys() == upper.manifest.keys()
        differing = {key for key, value in store.manifest.items() if value != upper.manifest[key]}
        assert differing == {"inputs", "lower_case_letters"}


SEQUENCES = st.lists(
    st.one_of(st.text("ACDX", min_size=1), st.text("acdx", min_size=1), st.text("ACDEXacdex", min_size=1, max_size=40)),
    min_size=1,
    max_size=12,
)


@given(SEQUENCES, st.integers(1, 5))
def test_the_case_of_every_residue_of_a_mixed_store_is_kept(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[str], rows_at_once: int
) -> None:
    folder = tmp_path_factory.mktemp("case")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "ROWS_AT_ONCE", rows_at_once)
        patch.setattr(spool, "COPY_BYTES", 16)
        path = write(folder / "a.fasta", sequences)
        store = build_store([path], folder / "a.h5", filters=Filters(duplicates=True))
    mixed = [sequence for sequence in sequences if sequence != sequence.upper() and sequence != sequence.lower()]
    assert store.has_case == bool(mixed)
    for row, sequence in enumerate(sequences):
        assert ProteinTokenizer().decode(store[row]) == sequence.upper()
        found, expected = store.lower_case(row), [letter.islower() for letter in sequence]
        assert (found is None) == (not mixed or not any(expected))
        assert found is None or found.tolist() == expected
    if not mixed:
        return
    store.verify()
    assert store.manifest["case"]["sequences"] == len(mixed)
    for context in ("lower", "upper"):
        targets = [targets_of(encode(x.upper()), context_tokens(lower_case_of(x), len(x), context)) for x in sequences]
        group = StoreGroup([store], context)
        for row, expected_targets in enumerate(targets):
            assert targets_of(store[row], context_of(group, row)).tolist() == expected_targets.tolist()
        counts = np.bincount(np.concatenate(targets), minlength=30)
        assert designed_counts(group)[0, :N_STATES].tolist() == counts[:N_STATES].tolist()
        bad = [
            f"p{i}"
            for i, (x, t) in enumerate(zip(sequences, targets, strict=True))
            if set(x.upper()) & set(AMINO_ACIDS) and not (t < N_STATES).any()
        ]
        entry = store.manifest["case"]["only_context"][context]
        assert entry == {"sequences": len(bad), "first": bad[:3]}
        if bad:
            with raises_value_error(f"record {bad[0]}: context={context} leaves nothing to design"):
                check_designed(group)
        else:
            check_designed(group)


def test_a_row_with_fewer_bits_of_case_than_residues_is_an_error(tmp_path: Path) -> None:
    store = build_store([write(tmp_path / "a.fasta", ["ACDEFGHIKlmn"])], tmp_path / "a.h5")
    assert store.lower_case(0) is not None
    with raises_value_error("h5, row 0: 2 bytes of case_bits for 17 residues, expected 3"):
        store._case.lower_case(0, 17)


def test_gzip_and_several_files_and_filters_keep_the_case(tmp_path: Path, proteins: list[FastaRecord]) -> None:
    texts = [marked(record) for record in proteins[:60]]
    (tmp_path / "all.fasta").write_text("".join(texts))
    (tmp_path / "a.gz").write_bytes(gzip.compress("".join(texts[:30]).encode()))
    (tmp_path / "b.fasta").write_text("".join(texts[30:]))
    whole = build_store([tmp_path / "all.fasta"], tmp_path / "whole.h5")
    parts = build_store([tmp_path / "a.gz", tmp_path / "b.fasta"], tmp_path / "parts.h5")
    assert whole.has_case
    assert whole.fingerprint == parts.fingerprint
    split = Split(validation_fraction=0.3, test_fraction=0.2)
    some = build_store([tmp_path / "all.fasta"], tmp_path / "some.h5", filters=Filters(max_length=200), split=split)
    assert 0 < len(some) < len(whole)
    rows = {whole.id(row): row for row in range(len(whole))}
    for row in range(len(some)):
        expected = whole.lower_case(rows[some.id(row)])
        found = some.lower_case(row)
        assert found is not None
        assert expected is not None
        assert np.array_equal(found, expected)
    for code, name in enumerate(SPLITS):
        found_lower = [some.lower_case(row) for row in some.split(name)]
        assert some.case_counts[code].sum() == sum(int(lower.sum()) for lower in found_lower if lower is not None)


def test_records_that_differ_only_in_case_are_duplicates_and_are_counted(tmp_path: Path) -> None:
    sequences = ["MKVLWAAL", "mkvlWAAL", "MKVLwaal", "ACDEFGHI", "ACDEFGHI", "acdefghi"]
    path = write(tmp_path / "a.fasta", sequences)
    store = build_store([path], tmp_path / "a.h5")
    assert [store.id(row) for row in range(len(store))] == ["p0", "p3"]  # the first record of each sequence
    assert not store.has_case
    assert store.manifest["dropped"]["duplicates"] == 4
    assert store.manifest["repeated_in_other_case"] == 3
    both = build_store([path], tmp_path / "both.h5", filters=Filters(duplicates=True))
    assert (len(both), both.manifest["repeated_in_other_case"]) == (6, 3)
    assert "repeated_in_other_case" not in build(tmp_path, ["ACD", "acd"], "one").manifest
    more = build(tmp_path, [*sequences, "WYwyACDE"], "more")
    assert [lower is None or lower.tolist() for lower in map(more.lower_case, range(3))] == [
        True,
        True,
        [False, False, True, True, False, False, False, False],
    ]


def test_damage_to_the_case_is_found_and_the_case_is_in_the_fingerprint(
    tmp_path: Path, marked_store: SequenceStore, store: SequenceStore
) -> None:
    assert marked_store.fingerprint != store.fingerprint
    for name in ("case_rows", "case_offsets", "case_bits", "case_counts"):
        assert fingerprint_of(marked_store.checksums | {name: "0"}) != marked_store.fingerprint
        data = bytearray(marked_store.path.read_bytes())
        data[marked_store._extents[name][0]] ^= 1
        (tmp_path / "damaged.h5").write_bytes(data)
        with raises_value_error(f"{name} is damaged"):
            SequenceStore(tmp_path / "damaged.h5").verify()


def test_prepare_and_inspect_print_the_case(tmp_path: Path, run_python: Command) -> None:
    write(tmp_path / "a.fasta", ["MKVlwaAL", "acdefg", "MKVLWAAL", "ACDEF"])
    printed = run_python("-m", "protlig_dd.prepare", "input=a.fasta", "output=a.h5").stdout
    assert "1 sequences have upper-case and lower-case letters" in printed
    assert "data.context=lower would be an error: all amino acids of 1 sequences are lower-case letters: p1" in printed
    assert "1 sequences differ from an earlier one only in the case of letters; only the earlier one is kept" in printed
    shown = run_python("-m", "protlig_dd.prepare", "inspect=a.h5").stdout
    assert "\nMKVlwaAL\n" in shown
    assert "all checksums match" in shown


# ---- packs


def test_a_pack_keeps_its_context_in_copies_pickles_and_repetitions() -> None:
    context = torch.tensor([False, True, False, True, False, False, True])
    batch = PackedBatch.pack([torch.tensor([BOS, 3, 4, 5]), torch.tensor([6, 7, EOS])], context=context)
    assert batch.targets.tolist() == [BOS, CONTEXT, 4, CONTEXT, 6, 7, CONTEXT]
    noised = batch.with_tokens(torch.full((7,), MASK))
    assert noised.tokens.tolist() == [MASK, 3, MASK, 5, MASK, MASK, EOS]
    for copy in (pickle.loads(pickle.dumps(batch)), batch.to("cpu"), noised):
        assert copy.context is not None
        assert copy.context.tolist() == context.tolist()
    twice = batch.repeated(2)
    assert (twice.lengths, twice.targets.tolist()) == ((4, 3, 4, 3), batch.targets.tolist() * 2)
    without = replace(batch, context=None)
    assert without.targets is without.tokens
    with raises_value_error(r"context must be \(7,\) torch.bool on cpu, got \(7,\) torch.int64"):
        replace(batch, context=context.long())


def residue_text(tokens: np.ndarray, is_context: np.ndarray) -> str:
    letters = [(ProteinTokenizer().decode(tokens[[i]]), is_context[i]) for i in range(len(tokens))]
    return "".join(letter.lower() if low else letter for letter, low in letters)


@pytest.mark.parametrize(("crop", "seed"), [("random", 0), ("start", 0), ("random", None)])
def test_every_crop_keeps_the_case_of_its_residues_and_has_designed_ones(
    crop: str, seed: int | None, marked_store: SequenceStore, proteins: list[FastaRecord]
) -> None:
    group = StoreGroup([marked_store], "lower")
    dataset = PackDataset(group, group.split("train"), max_len=40, tokens_per_pack=600, seed=seed, crop=crop)
    texts = ["".join(marked(record).split("\n")[1:]) for record in proteins]
    starts = set()
    for index in range(0, len(dataset), 3):
        batch = dataset[index]
        assert batch.context is not None
        parts = zip(batch.unpack(batch.tokens), batch.unpack(batch.context), batch.rows.tolist(), strict=True)
        for tokens, is_context, row in parts:
            text = residue_text(tokens.numpy(), is_context.numpy())
            assert text in texts[row]
            assert len(text) <= 40
            designed = sum(map(str.isupper, text))
            assert designed > 0
            if crop == "start" or seed is None:
                assert designed == min(12, len(texts[row]))
            starts.add(designed)
    assert (len(starts) > 5) == (crop == "random" and seed is not None)


def test_without_marks_a_crop_begins_at_the_first_residue_or_anywhere() -> None:
    everything = encode("ACDEFGHIKL")
    assert designed_crops(everything, 4, first=True).tolist() == [0]
    assert designed_crops(everything, 4, first=False).tolist() == list(range(7))
    end = targets_of(everything, context_tokens(np.arange(10) < 8, 10, "lower"))  # only K and L are designed
    assert designed_crops(end, 4, first=True).tolist() == [6]
    assert designed_crops(end, 4, first=False).tolist() == [5, 6]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_and_pickled_groups_read_the_same_context(marked_store: SequenceStore) -> None:
    group = pickle.loads(pickle.dumps(StoreGroup([marked_store], "upper")))
    dataset = PackDataset(group, group.split("train"), max_len=100, tokens_per_pack=600, seed=1)
    for index, batch in enumerate(pack_loader(dataset, range(3), workers=1, pin_memory=False)):
        assert torch.equal(batch.targets, dataset[index].targets)
        assert bool(batch.context.any())


def test_a_store_without_the_case_cannot_give_context(store: SequenceStore, marked_store: SequenceStore) -> None:
    for context in ("lower", "upper"):
        with raises_value_error(f"{store.path}: data.context={context} needs the case .* prepare it again"):
            StoreGroup([marked_store, store], context)
    assert context_of(StoreGroup([store]), 0) is None


# ---- loss and bounds


@pytest.mark.parametrize("name", GRAPHS)
def test_context_is_unchanged_in_x_t_and_has_no_gradient(name: str, marked_store: SequenceStore) -> None:
    group = StoreGroup([marked_store], "lower")
    batch = PackDataset(group, group.split("train"), max_len=60, tokens_per_pack=500, seed=0)[0]
    assert batch.context is not None
    seen: list[Tensor] = []
    logits = torch.zeros(len(batch.tokens), 20, requires_grad=True)

    def network(noised: PackedBatch, sigma: Tensor) -> Tensor:
        seen.append(noised.tokens)
        return logits

    score_fn = ScoreFn(network, graph_of(name, 20), LogLinearNoise(), "x0")
    loss, residues = score_entropy_loss(score_fn, batch, torch.Generator().manual_seed(0))
    loss.backward()
    designed = (batch.tokens < 20) & ~batch.context
    assert int(residues) == int(designed.sum()) == count_residues(batch)
    assert torch.equal(seen[0][~designed], batch.tokens[~designed])
    assert bool((seen[0][designed] != batch.tokens[designed]).any())
    assert logits.grad is not None
    assert not logits.grad[~designed].any()
    assert bool(logits.grad[designed].any())
    bound = nll_bound(score_fn, batch, generator=torch.Generator().manual_seed(1), draws=4)
    assert not bound.token_nats[~designed].any()
    assert bool((bound.token_nats[designed] > 0).any())
    assert bound.residues.tolist() == sum_by_sequence(designed, batch).tolist()
    assert len(seen) > 4
    assert all(torch.equal(tokens.view(-1, len(designed))[:, ~designed][0], batch.tokens[~designed]) for tokens in seen)


def test_replacing_context_residues_by_x_changes_only_the_network_input(marked_store: SequenceStore) -> None:
    """If X replaces the context residues, the noise and the loss weights stay the same.

    The network of this test ignores its input, so the loss must stay the same too.
    """
    group = StoreGroup([marked_store], "lower")
    batch = PackDataset(group, group.split("train"), max_len=60, tokens_per_pack=500, seed=0)[0]
    score_fn = ScoreFn(lambda noised, sigma: torch.zeros(len(noised.tokens), 20), Absorbing(), LogLinearNoise(), "x0")
    objective = Objective(Absorbing(), LogLinearNoise(), "x0", True, max_weight=10.0, curriculum_steps=8)
    as_letters = PackedBatch.pack(batch.unpack(batch.targets))
    for step in (2, 20):
        losses = [objective.loss(score_fn, b, torch.Generator().manual_seed(3), step) for b in (batch, as_letters)]
        assert losses[0] == losses[1]


def conditional(toy: brute_force.Toy, context: dict[int, int]) -> brute_force.Toy:
    """Return the distribution of the designed sites given the context sites.

    Args:
        context: the state of each context site, {site: state}.
    """
    index = tuple(context.get(site, slice(None)) for site in range(toy.sites))
    return brute_force.Toy(toy.graph, toy.n, toy.sites - len(context), toy.p0[index] / toy.p0[index].sum())


@pytest.mark.parametrize("sites", [{1: 2}, {0: 1, 3: 0}])
def test_the_exact_count_given_context_is_the_conditional_likelihood(sites: dict[int, int]) -> None:
    """The nats, averaged over all numbers k and all sets of k masked residues, are -log p(designed sites | context).

    The network returns the exact posterior of x0.
    """
    toy = brute_force.random_toy("absorbing", n=3, sites=4)
    score_fn = exact_score_fn(toy, "x0")
    free = [site for site in range(4) if site not in sites]
    for states in [(0,) * len(free), (2, 1, 0)[: len(free)]]:
        x0 = torch.tensor([dict(zip(free, states, strict=True)).get(site, sites.get(site, 0)) for site in range(4)])
        subsets = [set(chosen) for k in range(1, len(free) + 1) for chosen in itertools.combinations(free, k)]
        is_context = torch.tensor([site in sites for site in range(4)]).repeat(len(subsets))
        batch = PackedBatch.pack([x0] * len(subsets), context=is_context)
        masked = torch.tensor([site in subset for subset in subsets for site in range(4)])
        nats = sum_by_sequence(masked_nats(score_fn, batch, masked), batch)
        weights = [1 / len(free) / math.comb(len(free), len(subset)) for subset in subsets]
        exact = -math.log(conditional(toy, sites).p0[states])
        assert float(nats @ torch.tensor(weights, dtype=torch.float64)) == pytest.approx(exact, abs=1e-5)


@pytest.mark.parametrize("name", GRAPHS)
def test_the_integral_given_context_is_the_conditional_likelihood_to_a_millionth(name: str) -> None:
    """Enumerate all x_t of the designed sites 0 and 2. The scores are exact, given the clean context at site 1."""
    toy, sites = brute_force.random_toy(name, n=3, sites=3), {1: 2}
    rest, graph = conditional(toy, sites), graph_of(name, 3)
    noise, xt = exact_noise(graph), all_states(graph, 2)
    for states in itertools.product(range(3), repeat=2):
        clean = torch.tensor([states[0], 2, states[1]]).expand(len(xt), 3)
        is_context = torch.tensor([False, True, False]).repeat(len(xt))
        batch = PackedBatch.pack(list(clean), context=is_context)
        noised = torch.stack([xt[:, 0], torch.full((len(xt),), CONTEXT), xt[:, 1]], 1).reshape(-1)

        def network(given: PackedBatch, sigma: Tensor) -> Tensor:
            tokens = given.tokens.view(-1, 3)
            assert bool((tokens[:, 1] == 2).all())  # the network reads the clean context
            scores = torch.full((len(tokens), 3, 3), 7.0, dtype=torch.float64)  # scores at the context have no effect
            scores[:, [0, 2]] = rest.log_score(tokens[:, [0, 2]], float(sigma[0]))
            return scores.view(-1, 3)

        score_fn = UnconvertedScores(network, graph, noise, "log_score")

        def probability(sigma: float, states: tuple[int, ...] = states) -> Tensor:
            return brute_force.transition(name, 3, sigma)[torch.tensor(states), xt].prod(1)

        total = 0.0
        for t, weight in quadrature_nodes(noise):
            nats = integrand(score_fn, batch, t.expand(len(xt)), noised).view(-1, 3).sum(1)
            total += weight * float(probability(float(noise(t)[0])) @ nats)
        lowest, highest = (noise(torch.tensor(t, dtype=torch.float64))[0] for t in (noise.t_min, 1.0))
        total += float(graph.prior_kl(batch.targets[:3], highest.expand(3)).sum())
        nats = reconstruction(score_fn, batch, lowest.expand(len(xt)), noised).view(-1, 3).sum(1)
        total += float(probability(float(lowest)) @ nats)
        assert total == pytest.approx(-math.log(rest.p0[states]), abs=1e-6)


@pytest.mark.parametrize("conditioned", [True, False])
def test_the_bound_given_context_agrees_with_that_of_infilled_residues(
    conditioned: bool, marked_store: SequenceStore
) -> None:
    """`free_draws` and `nll_bound` draw different masks, so the two bounds agree up to a few standard errors.

    With trained_with_context=True, sigma matches the masked fraction of the designed residues, not of all residues.
    """
    group = StoreGroup([marked_store], "lower")
    rows = [row for row in group.split("train").tolist() if 60 < group.lengths[row] < 120][:12]
    tokens, contexts = [marked_store[row] for row in rows], [context_of(group, row) for row in rows]
    model = make_model(time_conditioning=conditioned).eval()
    noise = LogLinearNoise()
    score_fn = ScoreFn(model, Absorbing(), noise, "x0", conditioned, trained_with_context=True)
    batch = PackedBatch.pack(
        [torch.from_numpy(ids.astype(np.int64)) for ids in tokens],
        context=torch.from_numpy(np.concatenate([c for c in contexts if c is not None])),
    )
    generator = torch.Generator().manual_seed(0)
    bound = nll_bound(score_fn, batch, generator=generator, draws=32, estimator="exact_count")
    designs = [
        Redesign("p", ids[1:-1], ~context[1:-1] & (ids[1:-1] < N_STATES), i)
        for i, (ids, context) in enumerate(zip(tokens, contexts, strict=True))
        if context is not None
    ]
    draws = free_draws(score_fn, designs, Work(2000, "", ALONE), draws=32, seed=1)
    difference = draws.sum(0) - bound.nats.numpy()
    error = bound.standard_error.square().sum().sqrt() * 2**0.5
    assert abs(difference.sum()) < 4 * error
    assert float(bound.nats.sum()) > 100 * abs(difference.sum()) > 0


# ---- baselines, evaluation and infilling


def test_baselines_are_fitted_to_designed_residues_and_score_only_them(marked_store: SequenceStore) -> None:
    tokens, is_context = encode("ACAC"), np.array([False, True, False, True, False, False])
    baselines = fit_baselines([tokens], [is_context])
    counts = np.ones(N_STATES)
    counts[1] += 2
    np.testing.assert_allclose(np.exp(baselines.unigram), counts / counts.sum())
    unigram, bigram = baselines.nats(tokens, is_context)
    assert np.flatnonzero(unigram).tolist() == np.flatnonzero(bigram).tolist() == [2, 4]
    assert bigram[2] == -baselines.bigram[0, 1]
    group = StoreGroup([marked_store], "lower")
    np.testing.assert_allclose(np.exp(baselines_of(group).unigram), designed_frequencies(group))
    assert designed_counts(group)[0, :N_STATES].sum() == sum(
        min(12, length) for length in group.lengths[group.split("train")].tolist()
    )


def test_configs_without_data_context_mean_none_and_a_changed_context_is_named() -> None:
    config = train_config()
    assert config.data.context == "none"
    plain, given = as_dict(config), as_dict(train_config("data.context=lower"))
    assert "context" not in plain["data"]  # so that earlier versions can read the config
    assert changed_keys(plain, given) == ["data.context: none -> lower"]
    assert changed_keys(given, plain) == ["data.context: lower -> none"]
    assert changed_keys(given, given) == []
    with raises_value_error("data.context=lowr; choose from none, lower, upper"):
        train_config("data.context=lowr")


@pytest.mark.parametrize(
    ("context", "expected"), [("lower", "ac___gh___"), ("upper", "__DEF___KX")], ids=["lower", "upper"]
)
def test_infilling_fixes_the_letters_of_one_case(tmp_path: Path, context: str, expected: str) -> None:
    path = tmp_path / "a.fasta"
    path.write_text(">p\nacDEFgh_KX\n")
    ((record, ids),) = read_records(path)
    template = mask_free_positions(record, ids, fixed=None, free=None, context=context)
    assert ProteinTokenizer().decode(template) == expected.upper()


OPTIONS = [
    "experiment=demo",
    "run.name=given",
    "data.context=lower",
    "data.tokens_per_pack=600",
    "data.max_len=100",
    "model.hidden_size=32",
    "model.n_heads=2",
    "model.n_blocks=1",
    "trainer.max_steps=4",
    "trainer.device=cpu",
    "trainer.precision=fp32",
    "trainer.eval_every=4",
    "trainer.eval_max_sequences=4",
    "report.draws=2",
    "report.samples=0",
    "report.max_sequences=20",
]


def test_the_sigma_of_a_network_trained_with_context_matches_its_free_residues() -> None:
    score_fn = ScoreFn(make_model(), graph_of("absorbing", N_STATES), LogLinearNoise(), "x0")
    batch = PackedBatch.pack([torch.from_numpy(encode_with_free("A" * 9 + "_", "p"))])
    fixed, given = (
        float(sigma_of(replace(score_fn, trained_with_context=flag), batch, None)) for flag in (False, True)
    )
    assert fixed == pytest.approx(-math.log(0.9))
    assert given == pytest.approx(float(score_fn.noise(torch.ones(1))[0]))


@pytest.mark.slow
def test_a_run_with_context_is_evaluated_and_infilled_with_it(
    tmp_path: Path, run_python: Command, marked_store: SequenceStore, store: SequenceStore, proteins: list[FastaRecord]
) -> None:
    training = ["-m", "protlig_dd.training", *OPTIONS]
    done = run_python(*training, f"data.path={marked_store.path}")
    assert done.returncode == 0, done.stderr
    designed, known = (
        int(counts[0, :N_STATES].sum())
        for counts in (designed_counts(StoreGroup([marked_store], "lower")), marked_store.token_counts)
    )
    assert f"{designed:,} of {known:,} amino acids of the training split are designed" in done.stdout
    report = json.loads((tmp_path / "runs/given/report.json").read_text())
    assert (report["context"], report["residues"]) == ("lower", 20 * 12)
    assert "240 designed residues given the lower-case residues" in done.stdout

    (tmp_path / "test.fasta").write_text("".join(marked(record) for record in proteins[380:]))
    found = {}
    for name, data in (("store", marked_store.path), ("fasta", "test.fasta")):
        verb = ["-m", "protlig_dd.evaluate", "from=runs/given", f"input={data}", f"output={name}", "near=false"]
        done = run_python(*verb, "device=cpu", "precision=fp32", "draws=4")
        assert done.returncode == 0, done.stderr
        found[name] = json.loads((tmp_path / name / "report.json").read_text())
        assert "20 proteins, 240 designed residues" in (tmp_path / name / "report.md").read_text()
    assert [found["store"][key] for key in ("context", "trained_context", "baseline_context")] == ["lower"] * 3
    assert {key: found["fasta"][key] for key in ("bound", "unigram", "bigram", "residues")} == {
        key: found["store"][key] for key in ("bound", "unigram", "bigram", "residues")
    }
    # only one of the two records has both cases; context=auto must not depend on which record is drawn
    (tmp_path / "few.fasta").write_text(f">plain\n{'ACDEFGHIKL' * 4}\n" + marked(proteins[380]))
    drawn = [read_proteins(tmp_path / "few.fasta", "test", 1, seed) for seed in range(8)]
    assert {found.ids[0] for found in drawn} == {"plain", proteins[380].id}
    assert all(found.has_case for found in drawn)

    assert run_python("-m", "protlig_dd.export", "from=runs/given", "to=shared").returncode == 0
    assert ProteinDiffusion.from_pretrained(tmp_path / "shared", device="cpu").score_fn.trained_with_context
    sampled = run_python("-m", "protlig_dd.sample", "from=shared", "output=s.fasta", "n=1", "steps=2", "nll_draws=0")
    given = "warning: this model was trained with data.context=lower (lower-case residues are given, the others are"
    assert given in sampled.stdout

    keys = ("target=MKTAYIAKQR", "output=scan.csv", "device=cpu")
    scanned = run_python("-m", "protlig_dd.variants", "from=shared", *keys)
    assert scanned.returncode == 0, scanned.stderr
    assert given in scanned.stdout
    (tmp_path / "assays").mkdir()
    (tmp_path / "assays/a.csv").write_text("mutant,DMS_score\nM1A,0.5\nK2V,0.1\n")
    (tmp_path / "reference.csv").write_text("DMS_id,target_seq,DMS_filename\na,MKTAYIAKQR,a.csv\n")
    keys = ("assay=assays", "reference=reference.csv", "output=scored", "device=cpu")
    scored = run_python("-m", "protlig_dd.variants", "from=shared", *keys)
    assert scored.returncode == 0, scored.stderr
    assert given in scored.stdout

    # the page does not pair runs whose reports are about different residues of the same proteins
    shutil.copytree(tmp_path / "runs/given", tmp_path / "runs/other")
    pages = []
    for context in ("lower", "upper"):
        other = json.loads((tmp_path / "runs/given/report.json").read_text()) | {"context": context}
        (tmp_path / "runs/other/report.json").write_text(json.dumps(other))
        done = run_python("-m", "protlig_dd.report", "runs=[runs/given,runs/other]", f"output={context}.html")
        assert done.returncode == 0, done.stderr
        pages.append((tmp_path / f"{context}.html").read_text())
    assert [">0.0000<" in page for page in pages] == [True, False]
    assert ["The runs differ in data.context, so their bounds count different residues" in page for page in pages] == [
        False,
        True,
    ]
    assert "given the lower-case residues" in pages[0]

    verb = ["-m", "protlig_dd.evaluate", "from=runs/given", f"input={store.path}", "device=cpu", "near=false"]
    assert "has no record with both" in run_python(*verb, "output=plain", "draws=1", "masked=false").stdout
    refused = run_python(*verb, "output=again", "context=lower")
    assert_one_line_error(refused, "context=lower", str(store.path), "does not keep the case")

    changed = run_python(*training, f"data.path={marked_store.path}", "data.context=none", "trainer.max_steps=5")
    assert_one_line_error(changed, "data.context: lower -> none")
    short = run_python(*training, f"data.path={marked_store.path}", "data.context=upper", "run.name=none")
    assert_one_line_error(short, "context=upper leaves nothing to design: all amino acids are upper-case letters")
    missing = run_python(*training, f"data.path={store.path}", "run.name=none")
    assert_one_line_error(missing, str(store.path), "data.context=lower", "prepare it again")
    write(tmp_path / "bad.fasta", ["MKVLwaalMKVL", "mkvlacdefg"])
    build_store([tmp_path / "bad.fasta"], tmp_path / "bad.h5")
    bad = run_python(*training, f"data.path={tmp_path / 'bad.h5'}", "run.name=none")
    assert_one_line_error(bad, "bad.h5: record p1: context=lower leaves nothing to design")
    assert not (tmp_path / "runs/none").exists()
    planned = run_python(*training, f"data.path={marked_store.path}", "plan=true")
    assert planned.returncode == 0, planned.stderr

    records = [record for record in proteins if len(record.sequence) < 100][:2]
    (tmp_path / "wt.fasta").write_text("".join(marked(record) for record in records))
    verb = ["-m", "protlig_dd.infill", "from=runs/given", "input=wt.fasta", "output=d.fasta", "device=cpu"]
    done = run_python(*verb, "context=lower", "n=2", "steps=4", "free_draws=2")
    assert done.returncode == 0, done.stderr
    rows = (tmp_path / "d.map.csv").read_text().splitlines()
    start = (len(records[0].sequence) - 12) // 3
    assert f"{records[0].id}_1,{start + 1},{start + 12},true,,{start + 1}" in rows
    assert "fixes no residue" not in done.stdout
    (tmp_path / "forgotten.fasta").write_text(f">forgotten\n{records[0].sequence.upper()}\n")
    options = ("context=lower", "n=1", "steps=2", "free_draws=0")
    whole = run_python(*verb[:3], "input=forgotten.fasta", "output=w.fasta", "device=cpu", *options)
    assert re.search(
        r"warning: context=lower fixes no residue, so all residues are redesigned: .*forgotten", whole.stdout
    )
    both = run_python(*verb[:-2], "output=e.fasta", "context=lower", "free=1-3")
    assert_one_line_error(both, "give only one of fixed=, free=, context= and contig=")
