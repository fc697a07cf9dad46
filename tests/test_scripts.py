"""The scripts that print the tables of the docs, and the agreement of the docs with them."""

import contextlib
import json
import re
import signal
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from protlig_dd.batch import PackedBatch
from protlig_dd.config.read import read_config
from protlig_dd.config.train import TrainConfig
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.model.mixers import MIXERS
from protlig_dd.tokenizer import PAD
from scripts import mutation_check, pictures
from scripts.arms import SCREEN, overrides
from scripts.benchmarks import __main__ as benchmarks
from scripts.benchmarks.variants import blocks
from scripts.diffusion_report import RUNS, samplers
from scripts.mutation_check import FOLDERS, LISTS, read_mutations, read_results

from .conftest import ROOT, Command, Start, composed, make_model, make_store, require_program, thorough, wait_for
from .test_sampling import NOISES, SAMPLERS


def test_the_sampler_table_has_all_rows(capsys: pytest.CaptureFixture[str]) -> None:
    samplers(chains=300, steps=[2, 4])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 7 + 3
    assert all(0 <= float(cell.strip(" |")) < 1 for row in rows[2:] for cell in row[1:])


@pytest.mark.slow
def test_a_mutation_fails_a_test_and_leaves_the_checkout_unchanged(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = read_mutations(LISTS / "known.toml")
    (first,) = [mutation for mutation in known if mutation.what.startswith("Q[x, y]")]
    harmless = replace(first, what="a comment", new=f"{first.old}  # kept", tests="tests/test_noise.py")
    before = (ROOT / first.file).read_text()
    (tmp_path / "two.toml").write_text("".join(as_toml(mutation) for mutation in (first, harmless)))
    command = ["--list", str(tmp_path / "two.toml"), "--results", str(tmp_path / "results")]
    for _ in range(2):  # the second check reuses the results
        assert mutation_check.main(command) == 1
        table = capsys.readouterr().out
        assert "| `tests/test_graph.py::test_score_entropy" in table
        assert "| a comment | substitution.py | **none** |" in table
        assert "| diffusion | 2 | 1 | graph |" in table
        assert len((tmp_path / "results").read_text().splitlines()) == 2
    assert (ROOT / first.file).read_text() == before
    untested = replace(first, tests="tests/test_graph.py -k nothing_of_this_name")
    for invalid, message in (
        (untested, "exited with 5"),
        (
            replace(first, old="no such text"),
            "'no such text' occurs 0 times in protlig_dd/diffusion/graphs/substitution.py",
        ),
    ):
        (tmp_path / "two.toml").write_text(as_toml(invalid))
        assert mutation_check.main(command) == 2
        assert message in capsys.readouterr().err
    for text, message in (
        ("[[mutations]]", "two.toml: no [[mutation]] entries"),
        ("[[mutation]]\nwhat = 5\n", "two.toml, mutation 1: needs the strings what, file, old, new, tests, got what"),
        ("[[mutation]\n", "two.toml: Expected"),
        (
            as_toml(replace(first, file="protlig_dd/none.py")),
            "two.toml: Q[x, y] instead of Q[y, x] in the loss: no such file",
        ),
    ):
        (tmp_path / "two.toml").write_text(text)
        assert mutation_check.main(command) == 2
        assert message in capsys.readouterr().err
    selections = []
    monkeypatch.setattr(mutation_check, "warm_server", lambda _: contextlib.nullcontext())  # no tests are run
    for day in ("2026-01-01", "2026-01-02", "2026-01-01"):
        (tmp_path / "results").write_text('{"key"')  # a partial line, left by a killed check
        (tmp_path / "two.toml").write_text("".join(as_toml(mutation) for mutation in known[:4]))
        selected: list[str] = []
        monkeypatch.setattr(
            mutation_check, "verdict", lambda mutation, *_, selected=selected: selected.append(mutation.what) or "x"
        )
        assert mutation_check.main([*command, "--draw", "2", "--date", day]) == 0
        selections.append(sorted(selected))
        assert len((tmp_path / "results").read_text().splitlines()) == 2
    assert selections[0] == selections[2] != selections[1]


@pytest.mark.slow
@pytest.mark.campaign
def test_an_interrupted_check_keeps_its_results(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupted check leaves no running process and no temporary folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = ["-m", "scripts.mutation_check", "--folder", "data", "model", "--results", str(tmp_path / "results")]
    process = start(*command, cwd=ROOT)
    wait_for(lambda: (tmp_path / "results").exists() and (tmp_path / "results").read_text().count("\n") > 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors == f"interrupted; repeat the command to resume with the results in {tmp_path / 'results'}\n"
    running = subprocess.run(["pgrep", "-g", str(process.pid)], capture_output=True, text=True, check=False).stdout
    assert running == ""
    results = read_results(tmp_path / "results")
    assert len(results) > 1
    assert all(test.startswith("`tests/test_") for test in results.values())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(("mutation_check.", "warm-"))]


def as_toml(mutation: mutation_check.Mutation) -> str:
    return "[[mutation]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in asdict(mutation).items())


def test_every_mutation_matches_the_source_and_names_existing_test_files() -> None:
    mutations = [mutation for path in LISTS.glob("*.toml") for mutation in read_mutations(path)]
    assert len({mutation.what for mutation in mutations}) == len(mutations) >= 110
    for mutation in mutations:
        assert mutation.old != mutation.new
        assert mutation.folder in FOLDERS, mutation.what  # mutations in other folders would never be checked
        files = [word for word in mutation.tests.split() if word.startswith("tests/")]
        assert all((ROOT / file).is_file() for file in files), mutation.what
        if " -k " in mutation.tests:  # a renamed test would no longer be selected
            names = re.findall(r"\w+", " ".join((ROOT / file).read_text() for file in files))
            words = set(re.findall(r"\w+", mutation.tests.split(" -k ")[1])) - {"or", "and", "not"}
            assert all(any(word in name for name in names) for word in words), mutation.what


def test_the_docs_contain_every_row_of_the_tables() -> None:
    rows = {line.split(" | ")[0].removeprefix("| ") for line in (ROOT / "docs/diffusion.md").read_text().splitlines()}
    missing = {
        mutation.what for mutation in read_mutations(LISTS / "known.toml") if mutation.folder == "diffusion"
    } - rows
    missing |= {", ".join(sampler) for sampler in SAMPLERS} - rows
    missing |= {f"{graph}, analytic, infilled" for graph in NOISES} - rows
    missing |= set(RUNS) - rows
    assert not missing


def test_the_python_modules_in_the_docs_exist() -> None:
    named = {}
    for document in (ROOT / "docs").glob("*.md"):
        modules = re.findall(r"\bpython -m ((?:scripts|protlig_dd)[\w.]*\w)", document.read_text())
        files = re.findall(r"\bpython (scripts/\w+\.py)", document.read_text())
        named |= {(document.name, name): ROOT / f"{name.replace('.', '/')}.py" for name in modules}
        named |= {(document.name, name): ROOT / name for name in files}
    assert len(named) > 20
    assert not [name for name, path in named.items() if not (path.is_file() or path.with_suffix("").is_dir())]


def test_the_files_that_the_docs_name_exist() -> None:
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
    others = ("Presets", "Recipes", *SECTIONS_ON_PLANS)
    sections_on_data = "\n".join(section for section in sections if not section.startswith(others))
    documented = [line for line in sections_on_data.splitlines() if line.startswith("|")]

    assert shape(printed) == shape(documented)
    assert len(printed) == 6 * 2 + 4 + 4 + 3 + 1 + 2 + 2


def shape(lines: list[str]) -> list[str]:
    """Return headings and rules unchanged, and each of the remaining rows as its number of cell borders."""
    return [line if line.startswith(("| ---", *HEADINGS)) else str(line.count("|")) for line in lines]


SECTIONS_ON_PLANS = ("BFD's size", "The order of an epoch")


@pytest.mark.slow
def test_the_benchmark_of_plans_prints_the_tables_of_the_docs(run_python: Command, tmp_path: Path) -> None:
    sizes = ("--sequences", "20000", "40000", "--most-full", "30000", "--read", "80000")
    process = run_python("-m", "scripts.benchmarks.plans", *sizes)
    assert process.returncode == 0, process.stderr
    printed = [line for line in process.stdout.splitlines() if line.startswith("|")]
    sections = (ROOT / "docs/scaling.md").read_text().split("\n## ")
    text = "\n".join(section for section in sections if section.startswith(SECTIONS_ON_PLANS))
    documented = [line for line in text.splitlines() if line.startswith("|")]
    assert shape(printed) == shape(documented)
    assert len(printed) == 3 * 2 + 4 + 6 + 2
    assert "| full | 40,000, 1.3 times the values of 30,000 |" in process.stdout
    assert list(tmp_path.iterdir()) == []  # all scratch files are removed


DOCUMENTED = "\n".join((ROOT / f"docs/{name}.md").read_text() for name in ("performance", "scaling"))


@pytest.mark.slow
def test_the_benchmark_measures_every_variant_and_prints_the_tables_of_the_docs(
    run_python: Command, tmp_path: Path
) -> None:
    """Nothing is compiled here; test_training.py tests a compiled run."""
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
    assert 1 < concatenated["slots_per_residue"] < 1.05  # <bos> and <eos> are not residues; nothing is padded
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


def test_the_benchmark_compares_the_mixers_at_each_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--models", "256 x 2", "--tokens", "40", "--lengths", "20", "50", "--steps", "1", "--warmup", "0")
    arguments += ("--repeats", "2", "--device", "cpu", "--precision", "fp32", "--json", str(tmp_path / "found.json"))
    monkeypatch.setattr("sys.argv", ["benchmarks", "mixers", *arguments])
    benchmarks.main()
    rows = json.loads((tmp_path / "found.json").read_text())["mixers"]
    assert [(row["sequences"], row["length"], row["mixer"]) for row in rows] == [
        (sequences, length, mixer) for sequences, length in ((2, 20), (1, 50)) for mixer in MIXERS
    ]
    assert [row["ratio"] for row in rows if row["mixer"] == "attention"] == [1.0, 1.0]
    assert all(row["tokens_per_s"] > 0 for row in rows)
    assert capsys.readouterr().out.count("\n| ttt_") == 4


def test_concatenated_blocks_are_the_token_stream_cut_at_fixed_lengths() -> None:
    """As in SEDD, blocks contain no <pad>, and a protein attends to the other proteins in its block."""
    generator = torch.Generator().manual_seed(0)
    proteins = [torch.randint(0, 20, (length,), generator=generator) for length in (9, 4, 30, 7, 11, 5)]
    packs = [PackedBatch.pack(proteins[:2]), PackedBatch.pack(proteins[2:5]), PackedBatch.pack(proteins[5:])]
    found = list(blocks(iter(packs), 2, 8))
    assert [batch.lengths for batch in found] == [(8, 8)] * (66 // 16)
    stream = torch.cat(proteins)
    assert torch.equal(torch.cat([batch.tokens for batch in found]), stream[: 16 * len(found)])
    assert not any((batch.tokens == PAD).any() for batch in found)
    # token 8 is the last of the first protein and the first of block 1; it attends to block 1 only
    model = make_model()
    logits = model(found[0], torch.ones(2))[8]
    # position 12 is in another protein of block 1, position 3 in the same protein but in block 0
    for position, attended in ((12, True), (3, False)):
        changed = found[0].tokens.clone()
        changed[position] = (changed[position] + 1) % 20
        changed_logits = model(PackedBatch.from_flat(changed, found[0].lengths), torch.ones(2))[8]
        assert torch.allclose(logits, changed_logits) != attended


def test_an_unknown_part_of_the_benchmark_is_an_error(run_python: Command) -> None:
    process = run_python("-m", "scripts.benchmarks", "speed")
    assert process.returncode == 2
    assert "no part speed; choose from" in process.stderr


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
    modified = {path: path.stat().st_mtime for path in tmp_path.glob("runs/*/report.json")}
    assert len(modified) == 3
    again = run_python(*command)
    table = [line for line in again.stdout.splitlines() if line.startswith("| tiny")]
    assert table == [line for line in first.stdout.splitlines() if line.startswith("| tiny")]
    assert "+0.0000 ± 0.0000" in table[0]
    assert modified == {path: path.stat().st_mtime for path in modified}
    other = run_python(*command[:-3], names[0], "--seeds", "2", "--against", names[0])
    assert other.returncode == 0, other.stderr
    assert f"difference to '{names[0]}' |" in other.stdout
    assert len(json.loads((tmp_path / "runs/screen.json").read_text())) == 4
    unknown = run_python(*command[:-3], "Adam")
    assert unknown.returncode == 2
    assert "no arm 'Adam'" in unknown.stderr


def test_the_baseline_arm_has_the_objective_and_network_of_sedd() -> None:
    """The baseline keeps SEDD's objective and network when the defaults change."""
    for name, arm in SCREEN.items():
        if not (thorough() or name.startswith("SEDD") or name == "the defaults" or "weight at most" in name):
            continue  # composing a config for every arm is slow
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
    "| tokens per pack |",
    "| model |",
    "| variant |",
    "| steps |",
    "| setting |",
    "| preset |",
    "| `data.order` |",
    "| store |",
)


def test_pictures_need_a_report_page_and_a_browser(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["pictures", str(tmp_path), "--output", str(tmp_path / "out")])
    monkeypatch.setenv("PATH", str(tmp_path))
    for message in (f"error: {tmp_path}/report.html: no such file", "error: no browser on the PATH"):
        with pytest.raises(SystemExit) as raised:
            pictures.main()
        assert raised.value.code == 1
        assert capsys.readouterr().err.startswith(message)
        (tmp_path / "report.html").touch()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.system
def test_pictures_of_a_run_are_small_png_files(trained_run: Path, tmp_path: Path, run_python: Command) -> None:
    require_program("chromium")
    done = run_python("-m", "scripts.pictures", str(trained_run), "--output", "out", new=True, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    for name, width in (("report", pictures.WINDOW[0]), ("heatmap", 1600), ("attention", 950)):
        with Image.open(tmp_path / "out" / f"{name}.png") as image:
            assert (image.format, image.width) == ("PNG", width)
            assert len(image.getcolors() or []) > 5
        for path in (tmp_path / "out" / f"{name}.png", ROOT / "docs/pictures" / f"{name}.png"):
            assert 10_000 < path.stat().st_size <= pictures.LARGEST
