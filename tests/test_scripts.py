"""The scripts behind the tables of the docs run, and their tables are in the docs."""

import contextlib
import json
import re
import signal
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from protlig_dd.batch import PackedBatch
from protlig_dd.config.read import read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.tokenizer import PAD
from scripts import mutation_check
from scripts.arms import SCREEN, overrides
from scripts.benchmarks.variants import blocks
from scripts.diffusion_report import RUNS, samplers
from scripts.mutation_check import LISTS, read_mutations, read_results

from .conftest import ROOT, Command, Start, composed, make_model, make_store, thorough, wait_for
from .test_sampling import NOISES, SAMPLERS


def test_the_sampler_table_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    samplers(chains=300, steps=[2, 4])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 7 + 3
    assert all(0 <= float(cell.strip(" |")) < 1 for row in rows[2:] for cell in row[1:])


@pytest.mark.slow
def test_a_mutation_fails_a_test_and_leaves_the_checkout_alone(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = read_mutations(LISTS / "known.toml")
    (first,) = [one for one in known if one.what.startswith("Q[x, y]")]
    harmless = replace(first, what="a comment", new=f"{first.old}  # kept", tests="tests/test_noise.py")
    before = (ROOT / first.file).read_text()
    (tmp_path / "two.toml").write_text("".join(as_toml(one) for one in (first, harmless)))
    command = ["--list", str(tmp_path / "two.toml"), "--results", str(tmp_path / "results")]
    for _ in range(2):  # the second time nothing is tried again
        assert mutation_check.main(command) == 1
        table = capsys.readouterr().out
        assert "| `tests/test_graph.py::test_score_entropy" in table
        assert "| a comment | substitution.py | **none** |" in table
        assert "| diffusion | 2 | 1 | graph |" in table
        assert len((tmp_path / "results").read_text().splitlines()) == 2
    assert (ROOT / first.file).read_text() == before
    untested = replace(first, tests="tests/test_graph.py -k nothing_of_this_name")
    for wrong, message in (
        (untested, "ended with 5"),
        (
            replace(first, old="no such text"),
            "'no such text' occurs 0 times in protlig_dd/diffusion/graphs/substitution.py",
        ),
    ):
        (tmp_path / "two.toml").write_text(as_toml(wrong))
        assert mutation_check.main(command) == 2
        assert message in capsys.readouterr().err
    for text, message in (
        ("[[mutations]]", "two.toml: no [[mutation]] in it"),
        ("[[mutation]]\nwhat = 5\n", "two.toml, mutation 1: want the texts what, file, old, new, tests, got what"),
        ("[[mutation]\n", "two.toml: Expected"),
        (as_toml(replace(first, file="protlig_dd/none.py")), "two.toml: Q[x, y] for Q[y, x] in the loss: no such file"),
    ):
        (tmp_path / "two.toml").write_text(text)
        assert mutation_check.main(command) == 2
        assert message in capsys.readouterr().err
    drawn = []
    monkeypatch.setattr(mutation_check, "started", lambda left: contextlib.nullcontext())  # nothing is asked of it
    for day in ("2026-01-01", "2026-01-02", "2026-01-01"):  # results of a run that was killed while it wrote one
        (tmp_path / "results").write_text('{"key"')
        (tmp_path / "two.toml").write_text("".join(as_toml(one) for one in known[:4]))
        asked: list[str] = []
        monkeypatch.setattr(
            mutation_check, "verdict", lambda mutation, *_, asked=asked: asked.append(mutation.what) or "x"
        )
        assert mutation_check.main([*command, "--draw", "2", "--date", day]) == 0
        drawn.append(sorted(asked))
        assert len((tmp_path / "results").read_text().splitlines()) == 2
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.slow
@pytest.mark.campaign
def test_a_check_that_is_interrupted_goes_on(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves nothing running, and nothing in the temporary folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = ["-m", "scripts.mutation_check", "--room", "data", "model", "--results", str(tmp_path / "results")]
    process = start(*command, cwd=ROOT)
    wait_for(lambda: (tmp_path / "results").exists() and (tmp_path / "results").read_text().count("\n") > 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == f"interrupted; the same command goes on with what is in {tmp_path / 'results'}\n"
    left = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True, check=False).stdout
    assert left == ""
    known = read_results(tmp_path / "results")
    assert len(known) > 1
    assert all(test.startswith("`tests/test_") for test in known.values())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("mutation_check.", "warm-"))]


def as_toml(mutation: mutation_check.Mutation) -> str:
    return "[[mutation]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in asdict(mutation).items())


def test_every_mutation_can_still_be_made() -> None:
    found = [one for path in LISTS.glob("*.toml") for one in read_mutations(path)]
    assert len({one.what for one in found}) == len(found) >= 110
    for one in found:
        assert one.old != one.new
        assert all((ROOT / word).is_file() for word in one.tests.split() if word.startswith("tests/")), one.what


def test_the_docs_hold_every_row_of_the_tables() -> None:
    rows = {line.split(" | ")[0].removeprefix("| ") for line in (ROOT / "docs/diffusion.md").read_text().splitlines()}
    missing = {one.what for one in read_mutations(LISTS / "known.toml") if one.room == "diffusion"} - rows
    missing |= {", ".join(sampler) for sampler in SAMPLERS} - rows
    missing |= {f"{graph}, analytic, infilled" for graph in NOISES} - rows
    missing |= set(RUNS) - rows
    assert not missing


def test_the_commands_of_the_docs_are_there() -> None:
    named = {}
    for document in (ROOT / "docs").glob("*.md"):
        modules = re.findall(r"\bpython -m ((?:scripts|protlig_dd)[\w.]*\w)", document.read_text())
        files = re.findall(r"\bpython (scripts/\w+\.py)", document.read_text())
        named |= {(document.name, name): ROOT / f"{name.replace('.', '/')}.py" for name in modules}
        named |= {(document.name, name): ROOT / name for name in files}
    assert len(named) > 20
    assert not [name for name, path in named.items() if not (path.is_file() or path.with_suffix("").is_dir())]


def test_the_files_that_the_docs_name_are_there() -> None:
    for document in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"\b(?:scripts|configs)/[\w/]+\.\w+", document.read_text()):
            assert (ROOT / name).is_file(), f"{document.name}: {name}"


@pytest.mark.slow
def test_the_checkpoint_benchmark_prints_the_table_of_the_docs(run_python: Command) -> None:
    process = run_python("-m", "scripts.benchmarks.checkpoint", "--models", "tiny", "--repeats", "2")
    assert process.returncode == 0, process.stderr
    heading, rule, row = process.stdout.splitlines()
    text = (ROOT / "docs/reliability.md").read_text()
    assert f"{heading}\n{rule}\n{row.split(' | ')[0]} | {row.split(' | ')[1]} | " in text


@pytest.mark.slow
def test_the_data_benchmark_prints_the_tables_of_the_docs(run_python: Command) -> None:
    sizes = ("--gigabytes", "0.01", "--sequences", "20000", "--repeats", "1", "--seconds", "1", "--steps", "4")
    process = run_python("-m", "scripts.benchmarks.data", *sizes)
    assert process.returncode == 0, process.stderr
    printed = [line for line in process.stdout.splitlines() if line.startswith("|")]
    sections = (ROOT / "docs/scaling.md").read_text().split("\n## ")
    others = "\n".join(section for section in sections if not section.startswith(("Presets", "Recipes")))
    documented = [line for line in others.splitlines() if line.startswith("|")]

    def shape(lines: list[str]) -> list[str]:
        """Headings, first cells, and how many columns each row has."""
        return [line if line.startswith(("| ---", *HEADINGS)) else str(line.count("|")) for line in lines]

    assert shape(printed) == shape(documented)
    assert len(printed) == 4 * 2 + 2 + 3 + 2 + 2


DOCUMENTED = "\n".join((ROOT / f"docs/{name}.md").read_text() for name in ("performance", "scaling"))


@pytest.mark.slow
def test_the_benchmark_measures_what_it_compares(run_python: Command, tmp_path: Path) -> None:
    """Nothing is compiled: a compiled run has a test of its own."""
    sizes = ("--models", "256 x 2", "--max-len", "100", "--tokens", "600", "--steps", "1", "--warmup", "1")
    sizes += ("--repeats", "2", "--sampling-steps", "3", "6", "--json", str(tmp_path / "found.json"))
    parts = ["throughput", "profile", "sampling", *(["cost", "presets"] if thorough() else [])]
    process = run_python(
        "-m",
        "scripts.benchmarks",
        *parts,
        *sizes,
        new=True,
        PYTHONPATH=str(ROOT),
        PROTLIG_TYPECHECK="0",
        TORCH_COMPILE_DISABLE="1",
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "compiled"),
    )
    assert process.returncode == 0, process.stderr
    assert not list((tmp_path / "compiled").rglob("*.so"))
    found = json.loads((tmp_path / "found.json").read_text())
    variants = found["throughput"] + found.get("cost", [])
    assert [row["ratio"] for row in variants if "baseline" in row["variant"]] == [1.0]
    assert len({row["variant"] for row in found["throughput"]}) == len(found["throughput"]) >= 6
    (concatenated,) = [row for row in found["throughput"] if row["variant"].startswith("concatenated fp32")]
    assert 1 < concatenated["slots_per_residue"] < 1.05  # <bos> and <eos> are no residues; nothing is padded
    assert all(row["residues_per_s"] > 0 for row in variants)
    assert [row["steps"] for row in found["sampling"]] == [3, 6]
    assert all(0 < row["shares"]["aten::mm"] < 1 for row in found["profile"])
    assert not thorough() or [row["preset"] for row in found["presets"]] == ["tiny", "small", "medium", "large"]
    headings = [line for line in process.stdout.splitlines() if line.startswith(HEADINGS)]
    assert len(headings) == len(parts) - 1
    assert not [line for line in headings if line not in DOCUMENTED]
    assert not [row["variant"] for row in found.get("cost", []) if f"| {row['variant']} | " not in DOCUMENTED]


@pytest.mark.slow
def test_the_benchmark_measures_how_costs_grow(run_python: Command, tmp_path: Path) -> None:
    process = run_python("-m", "scripts.benchmarks", "growth", "--models", "256 x 2", "--tokens", "160")
    assert process.returncode == 0, process.stderr
    growth = json.loads((tmp_path / "benchmark.json").read_text())["growth"]
    assert len({(row["what"], row["value"]) for row in growth}) == len(growth) == 4 + 5 + 3 + 3 + 2 + 2
    assert all(row["ms_per_step"] > 0 for row in growth)
    headings = [line for line in process.stdout.splitlines() if line.startswith(HEADINGS)]
    assert len(headings) == 1
    assert headings[0] in DOCUMENTED


def test_concatenated_blocks_are_the_same_tokens_cut_anywhere() -> None:
    """As SEDD cuts its stream: all of one length, without <pad>, and attention from one protein to the next."""
    generator = torch.Generator().manual_seed(0)
    proteins = [torch.randint(0, 20, (length,), generator=generator) for length in (9, 4, 30, 7, 11, 5)]
    packs = [PackedBatch.pack(proteins[:2]), PackedBatch.pack(proteins[2:5]), PackedBatch.pack(proteins[5:])]
    found = list(blocks(iter(packs), 2, 8))
    assert [batch.lengths for batch in found] == [(8, 8)] * (66 // 16)
    stream = torch.cat(proteins)
    assert torch.equal(torch.cat([batch.tokens for batch in found]), stream[: 16 * len(found)])
    assert not any((batch.tokens == PAD).any() for batch in found)
    # token 8, the last of the first protein and the first of block 1, sees that block and nothing else
    model = make_model()
    logits = model(found[0], torch.ones(2))[8]
    for place, seen in ((12, True), (3, False)):  # another protein's in this block; its own protein's in block 0
        changed = found[0].tokens.clone()
        changed[place] = (changed[place] + 1) % 20
        other = model(PackedBatch.from_flat(changed, found[0].lengths), torch.ones(2))[8]
        assert torch.allclose(logits, other) != seen


def test_a_part_that_the_benchmark_has_not_is_refused(run_python: Command) -> None:
    wrong = run_python("-m", "scripts.benchmarks", "speed")
    assert wrong.returncode == 2
    assert "no part speed" in wrong.stderr


@pytest.mark.slow
def test_arms_are_trained_once_and_compared(run_python: Command, proteins: list[FastaRecord], tmp_path: Path) -> None:
    make_store(tmp_path / "few.h5", proteins, train=60, held_out=3)
    names = ("SEDD (log-score), lr 0.001", "QK-norm, Muon, lr 0.01; EMA over 5%", "the defaults")
    command = ("-m", "scripts.arms", "screen", "--data", "few.h5", "--sizes", "tiny", "--residues", "3000")
    command += ("--tokens", "1000", "--jobs", "2", "--threads", "1", "--only", *names)
    first = run_python(*command)
    assert first.returncode == 0, first.stderr
    found = json.loads((tmp_path / "runs/screen.json").read_text())
    assert {row["arm"] for row in found} == set(names)
    assert not any("error" in row for row in found), found
    made = {path: path.stat().st_mtime for path in tmp_path.glob("runs/*/report.json")}
    assert len(made) == 3
    again = run_python(*command)
    table = [line for line in again.stdout.splitlines() if line.startswith("| tiny")]
    assert table == [line for line in first.stdout.splitlines() if line.startswith("| tiny")]
    assert "+0.0000 ± 0.0000" in table[0]
    assert made == {path: path.stat().st_mtime for path in made}
    other = run_python(*command[:-3], names[0], "--seeds", "2", "--against", names[0])
    assert other.returncode == 0, other.stderr
    assert f"to '{names[0]}' |" in other.stdout
    assert len(json.loads((tmp_path / "runs/screen.json").read_text())) == 4
    unknown = run_python(*command[:-3], "Adam")
    assert unknown.returncode == 2
    assert "no arm 'Adam'" in unknown.stderr


def test_the_baseline_is_sedds_objective_and_network() -> None:
    """Whatever the defaults have become."""
    for name, arm in SCREEN.items():
        if not (thorough() or name.startswith("SEDD") or name == "the defaults" or "weight at most" in name):
            continue  # it takes a composed config each
        options = overrides(arm, "tiny", data=Path("x.h5"), residues=1e6, tokens=1000, seed=0)
        config = read_config(composed(*options), TrainConfig)
        capped = "weight at most" in name or name == "the defaults"
        assert (config.noise["max_weight"] is not None) == capped
        if name.startswith("SEDD"):
            assert config.parametrisation == "log_score"
            assert config.time_conditioning is True
            assert (config.optim.name, config.optim.schedule, config.optim.ema_decay) == ("adamw", "cosine", 0.9999)
            assert (config.model.norm, config.model.mlp, config.model.qk_norm) == ("layer", "gelu", False)


HEADINGS = (
    "| input |",
    "| at step |",
    "| tokens a pack |",
    "| model |",
    "| variant |",
    "| steps |",
    "| what |",
    "| preset |",
)
