"""Tests of the runs, records and tables of `python -m scripts.architecture`, which compares kinds of networks.

A kind of network is called an arm. The arms differ in the position encoding, the mixers, the MLP or tied weights.
"""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from protlig_dd.config.read import read_config
from protlig_dd.config.train import TrainConfig, config_in
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.store import SequenceStore
from protlig_dd.diffusion.graphs.absorbing import Absorbing
from protlig_dd.diffusion.noise import LogLinearNoise
from protlig_dd.diffusion.score import ScoreFn
from protlig_dd.model.config import MLPS
from protlig_dd.model.positions import POSITIONS
from protlig_dd.system.files import write_atomic
from protlig_dd.training.build import train_rank
from protlig_dd.training.resolve import resolve
from scripts import arms
from scripts.architecture import __main__ as architecture
from scripts.architecture import results, runs
from scripts.architecture.arms import ARMS, ENCODINGS, overrides
from scripts.architecture.robustness import CHECKS, chosen_proteins, count_successes, family
from scripts.architecture.tables import print_tables

from .conftest import Command, composed, make_model, make_store

Drive = Callable[..., int]
TINY = ["model.hidden_size=32", "model.n_heads=2", "model.cond_dim=8", "data.tokens_per_pack=1200"]
BASELINE_LABEL = "baseline: `positions=rope`, `mixers=attention`, `mlp=gelu`, `tie_weights=false`"
TINY += ["trainer.device=cpu", "trainer.precision=fp32", "report.draws=2"]


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory, proteins: list[FastaRecord]) -> Path:
    """A store of 40 proteins to train on, and 8 each for validation and testing."""
    path = tmp_path_factory.mktemp("few") / "few.h5"
    make_store(path, proteins, train=40, held_out=8)
    return path


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the command train small networks in this process. Return the names of the trained runs.

    The list grows by one entry for each training.
    """
    names: list[str] = []

    def train(name: str, arguments: list[str], threads: int, base: Path) -> dict[str, Any]:
        options = dict(argument.split("=", 1) for argument in [*arguments, *TINY, f"run.name={name}"])
        names.append(name)
        try:
            config = read_config(composed(*(f"{key}={value}" for key, value in options.items())), TrainConfig)
            train_rank(resolve(config, base / "runs" / name), base / "runs" / name, None)
        except ValueError as error:
            return {"error": str(error)}
        return arms.train(name, arguments, threads, base)

    monkeypatch.setattr(runs, "train", train)
    return names


@pytest.fixture
def drive(few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Drive:
    """Return a function that runs a part of the command in this process and returns the exit code.

    The function passes `--steps 2` to every part except `tables` and `robustness`.
    """

    def run(part: str, *options: str) -> int:
        budget = () if part in ("tables", "robustness") else ("--steps", "2")
        data = () if part == "tables" else ("--data", str(few))
        monkeypatch.setattr("sys.argv", ["architecture", part, "--folder", str(tmp_path), *data, *budget, *options])
        with pytest.raises(SystemExit) as raised:
            architecture.main()
        code = raised.value.code
        if isinstance(code, int):
            return code
        print(code)
        return 1

    return run


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def table_rows(text: str) -> list[list[str]]:
    """Return the cells of the printed table rows, without the heading and the line of dashes below the heading."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def test_the_arms_are_every_encoding_and_mlp_and_differ_from_the_baseline_in_one_key(few: Path) -> None:
    assert ENCODINGS[0] == "rope"
    assert set(ENCODINGS) == set(POSITIONS)
    assert set(ARMS) == {*POSITIONS, *MLPS, "ttt_linear", "tied"} - {"gelu"}
    demo = read_config(composed("experiment=demo"), TrainConfig)
    baseline = demo.model
    for arm in ARMS:
        config = read_config(composed(*overrides(arm, seed=1, data=few, steps=None)), TrainConfig)
        kinds = {"positions", "mixers", "mlp", "tie_weights"}
        changed = {key for key in kinds if getattr(config.model, key) != getattr(baseline, key)}
        assert changed == (set() if arm == "rope" else set(ARMS[arm])), arm
        assert replace(config.model, **{key: getattr(baseline, key) for key in kinds}) == baseline
        assert (config.trainer.max_steps, config.data.tokens_per_pack) == (450, 4096)
        assert config.optim == demo.optim
        assert (config.trainer.eval_every, config.report.samples, config.report.split, config.seed) == (0, 0, "test", 1)


def test_an_interrupted_command_resumes_and_trains_no_run_twice(
    drive: Drive,
    trainings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("bounds", "--only", "rope", "none")
    train = runs.train

    def interrupted(name: str, *arguments: Any) -> dict[str, Any]:
        if name.startswith("none_0"):
            raise KeyboardInterrupt
        return train(name, *arguments)

    monkeypatch.setattr(runs, "train", interrupted)
    assert drive(*command) == 130
    assert [(row["arm"], row["seed"]) for row in rows_of(tmp_path)] == [("rope", 0)]
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"part": "bounds", "arm"')  # a partial line, as a killed process leaves it
    monkeypatch.setattr(runs, "train", train)
    capsys.readouterr()
    assert drive(*command) == 0
    order = [("rope", 0), ("none", 0), ("rope", 1), ("none", 1), ("rope", 2)]
    assert [(row["arm"], row["seed"]) for row in rows_of(tmp_path)] == order
    printed = capsys.readouterr().out
    assert re.search(r"\n```\npython -m scripts.architecture bounds .*--data ", printed)
    assert [(cells[0], cells[2]) for cells in table_rows(printed)][1:] == [("`positions=none`", "2")]
    assert len(trainings) == len(set(trainings)) == 5
    content = (tmp_path / "results.jsonl").read_bytes()
    assert drive(*command) == 0
    assert drive("tables") == 0
    assert len(trainings) == 5
    assert (tmp_path / "results.jsonl").read_bytes() == content
    again = capsys.readouterr().out
    assert table_rows(again[again.rindex("```") :]) == table_rows(printed)


def test_a_failed_arm_is_recorded_and_tried_again_and_the_others_are_trained(
    drive: Drive,
    trainings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(ARMS, "none", {"positions": "nowhere"})
    assert drive("bounds", "--only", "none", "rope", "--seeds", "1") == 1
    failed, trained = rows_of(tmp_path)
    assert failed["error"].startswith("model.positions=nowhere: choose from rope")
    assert trained["nll"] > 0
    cells = table_rows(capsys.readouterr().out)[-1]
    assert cells[:2] == ["`positions=nowhere`", f"seed 0 failed: {failed['error']}"]
    monkeypatch.setitem(ARMS, "none", {"positions": "none"})
    assert drive("bounds", "--only", "none", "rope", "--seeds", "1") == 0
    assert [row["arm"] for row in rows_of(tmp_path)] == ["none", "rope", "none"]
    assert len(trainings) == 3
    assert "seed 0 failed" not in capsys.readouterr().out


def test_each_run_is_a_separate_process_whose_failure_is_recorded_for_its_arm(
    run_python: Command, few: Path, tmp_path: Path
) -> None:
    command = ("-m", "scripts.architecture", "bounds", "--only", "rope", "--seeds", "1", "--data", str(few))
    process = run_python(*command, "--steps", "0")
    assert process.returncode == 1, process.stdout + process.stderr
    (row,) = rows_of(tmp_path / "runs/architecture")
    assert row["error"].startswith("error: trainer.max_steps must be at least 1, got 0")
    assert f"seed 0 failed: {row['error']}" in process.stdout
    process = run_python(*command, "--steps", "1")
    assert process.returncode == 0, process.stdout + process.stderr
    row = rows_of(tmp_path / "runs/architecture")[-1]
    assert (tmp_path / "runs/architecture/runs" / row["run"] / "report.json").exists()
    assert row["peak_memory_gib"] > 0.1
    assert len(row["nats"]) == 8


def test_longer_proteins_are_bounded_at_full_length_or_rejected_with_both_numbers(
    drive: Drive, trainings: list[str], few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drive("lengths", "--only", "rope", "diet", "--draws", "2") == 0
    rope, diet = rows_of(tmp_path)
    store = SequenceStore(few)
    held_out = [int(store.lengths[row]) for split in ("validation", "test") for row in store.split(split)]
    expected = [sorted(n for n in held_out if low < n <= high) for low, high in rope["ranges"]]
    assert rope["ranges"] == [[0, 256], [256, 512], [512, 1024]]
    assert [sorted(bound["lengths"]) for bound in rope["bounds"]] == expected
    assert all(expected)
    assert diet["bounds"][0]["lengths"] == rope["bounds"][0]["lengths"]
    assert all(
        config_in(tmp_path / "runs" / name / "checkpoints/step_00000002").data.max_len == 256 for name in trainings
    )
    rejected = table_rows(capsys.readouterr().out)[1]
    for cell, high in ((rejected[3], 512), (rejected[-1], 1024)):
        text, numbers = cell.partition("has a table of 258 positions")[::2]
        assert text == "rejected: model.positions=diet "
        longest = int(numbers.partition("a sequence has ")[2].split()[0]) - 2
        assert longest in held_out
        assert high // 2 < longest <= high


def test_the_robustness_table_counts_every_use_of_every_protein(
    drive: Drive, trainings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert drive("robustness", "--only", "alibi", "--sampling-steps", "2") == 0
    assert table_rows(capsys.readouterr().out) == [["`positions=alibi`", "10", *["20 of 20"] * 3]]
    assert drive("robustness", "--only", "alibi", "--sampling-steps", "2") == 0
    assert len(trainings) == 1
    assert all(len(row["families"]) == 10 for row in rows_of(tmp_path))


def test_a_table_without_the_baseline_prints_why_it_has_no_differences(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"part": "bounds", "command": "c", "arm": "alibi", "seed": 0, "step": 2, "parameters": 9, "nll": 2.9}
    row |= {"nats": [29.0, 58.0], "lengths": [10, 20], "peak_memory_gib": 0.5}
    print_tables([row])
    assert "the baseline was not measured; --only rope measures it" in capsys.readouterr().out
    print_tables([row, row | {"arm": "rope"}])
    assert "not measured" not in capsys.readouterr().out


def test_the_chosen_proteins_are_two_of_each_of_ten_families() -> None:
    proteins = chosen_proteins()
    families = [family(protein) for protein in proteins]
    assert len({protein.sequence for protein in proteins}) == len(proteins) == 20
    assert families[::2] == families[1::2]
    assert len(set(families)) == 10
    assert families[0] == "EX7L"
    assert [family(FastaRecord(id, "", "")) for id in ("sp|P00001|CYC_HUMAN", "tr|A0A001|A0A001_ECOLI", "x_y")] == [
        "CYC",
        None,
        None,
    ]


def test_outputs_that_are_not_finite_are_failures() -> None:
    proteins = chosen_proteins()[:2]
    model = make_model(time_conditioning=False).eval()
    score_fn = ScoreFn(model, Absorbing(), LogLinearNoise(), "x0", time_conditioning=False)
    assert count_successes(score_fn, proteins, 2) == (dict.fromkeys(CHECKS, 2), [])
    with torch.no_grad():
        model.head.out.bias[3] = torch.nan
    counts, problems = count_successes(score_fn, proteins, 2)
    assert counts == dict.fromkeys(CHECKS, 0)
    assert len(problems) == 6
    assert f"forward of {proteins[0].id}: {3 * (len(proteins[0].sequence) + 2)} of the network's" in problems[0]


def test_the_tables_contain_means_over_seeds_and_paired_differences(capsys: pytest.CaptureFixture[str]) -> None:
    def row(arm: str, seed: int, nats: list[float]) -> dict[str, Any]:
        lengths = [10, 30]
        found = {"part": "bounds", "command": "do bounds", "arm": arm, "seed": seed, "step": 7, "parameters": 1234}
        return found | {"nll": sum(nats) / 40, "nats": nats, "lengths": lengths, "peak_memory_gib": 0.5 + seed}

    rows = [row("t5", 1, [20, 60]), row("t5", 0, [20, 76]), row("rope", 0, [30, 90]), row("rope", 1, [30, 82])]
    rows += [row("rope", 2, [50, 130]), {**row("none", 0, [0, 0]), "error": "a | b"}]
    print_tables(rows)
    text = capsys.readouterr().out
    assert text.startswith("\n```\ndo bounds\n```\n\n7 steps; 2 test proteins, 40 residues; nats/residue\n")
    # The nats of a protein are averaged over the seeds. A residual is nats - bound * length.
    # t5: the nats are 20 and 68, so the bound is 88 / 40. The residuals are -2 and 2, so the standard error is
    # sqrt(2 * 8) / 40. The differences t5 - rope over seeds 0 and 1 are -10 and -18, with residuals -3 and 3.
    # rope: the nats are 110/3 and 302/3, so the bound is 412/120. The residuals are 7/3 and -7/3.
    assert table_rows(text)[:2] == [
        [BASELINE_LABEL, "1,234", "3", "3.4333 ± 0.1167", "", "1.7000", "2.50"],
        ["`positions=t5`", "1,234", "2", "2.2000 ± 0.1000", "-0.7000 ± 0.1500", "0.4000", "1.50"],
    ]
    assert text.splitlines()[-1] == "| `positions=none` | seed 0 failed: a \\| b |  |  |  |  |  |"


def test_a_range_of_lengths_without_proteins_is_an_error(
    drive: Drive, trainings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert drive("lengths", "--proteins", "0") == 1
    assert "no held-out protein has 1 to 256 residues" in capsys.readouterr().out
    assert trainings == []


def test_a_repeated_measurement_replaces_the_earlier_row_of_the_results(tmp_path: Path) -> None:
    file = tmp_path / "new/results.jsonl"
    assert results.read(file) == {}
    first = {"part": "speed", "command": "c", "arm": "all", "seed": 0, "rows": [1]}
    for rows in ([1], [2]):
        results.append(file, first | {"rows": rows})
    assert list(results.read(file).values()) == [first | {"rows": [2]}]
    write_atomic(file, json.dumps(first) + "\n[]\n")
    with pytest.raises(ValueError, match=r"results.jsonl, line 2: not a row of results"):
        results.read(file)


def test_the_speed_of_every_kind_is_relative_to_the_baseline_and_printed_with_its_memory(
    drive: Drive, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--tokens", "600", "--repeats", "1", "--warmup", "0", "--device", "cpu", "--precision", "fp32")
    assert drive("speed", "--only", "diet", "rope", *options, "--steps", "1") == 0
    (found,) = rows_of(tmp_path)
    baseline, diet = found["rows"]
    assert (baseline["variant"], baseline["ratio"]) == ("rope", 1.0)
    assert diet["ratio"] == pytest.approx(diet["residues_per_s"] / baseline["residues_per_s"])
    cells = table_rows(capsys.readouterr().out)
    assert [row[0] for row in cells[1:]] == ["`positions=diet`"]
    assert [row[-1] for row in cells] == [f"{row['activation_bytes_per_token'] / 1024:,.1f}" for row in found["rows"]]
    assert diet["activation_bytes_per_token"] > baseline["activation_bytes_per_token"] > 0


@pytest.mark.parametrize(
    ("part", "selected"),
    [("bounds", list(ARMS)), ("speed", list(ARMS)), ("lengths", ENCODINGS), ("robustness", ENCODINGS)],
)
def test_each_part_compares_its_own_kinds_by_default(part: str, selected: list[str]) -> None:
    assert architecture.parser().parse_args([part]).only == selected


def test_tables_without_results_and_unknown_arms_are_errors(drive: Drive, capsys: pytest.CaptureFixture[str]) -> None:
    assert drive("tables") == 1
    assert "no results; run bounds, speed, lengths or robustness first" in capsys.readouterr().out
    assert drive("bounds", "--only", "rotary") == 2
    assert "invalid choice: 'rotary'" in capsys.readouterr().err
