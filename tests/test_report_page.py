"""The report page of a run: its contents, the escaping of text, and its appearance in a browser."""

import csv
import html
import json
import math
import re
import shutil
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markupsafe import escape
from safetensors.torch import load_file

from protlig_dd.config.cli import run_verb
from protlig_dd.config.verbs import ReportPageConfig
from protlig_dd.data.fasta import FastaRecord
from protlig_dd.data.prepare.build import build_store
from protlig_dd.data.store import SPLITS, SequenceStore, StoreGroup
from protlig_dd.evaluation.averages import per_residue
from protlig_dd.evaluation.likelihood.held_out import length_counts, training_frequencies, training_statistics
from protlig_dd.evaluation.report.curves import NATS, has_capped_weights
from protlig_dd.evaluation.report.page import comparison_page, run_page, write_run_page
from protlig_dd.evaluation.report.plots import Estimate, Series, dot_plot, nice_ticks, plot, smooth, thin, tick_texts
from protlig_dd.evaluation.report.run import differing_keys, read_run
from protlig_dd.evaluation.report.sections import LINE, RESIDUE_CLASSES, protein
from protlig_dd.evaluation.samples.statistics import Figure, format_figure
from protlig_dd.report import report
from protlig_dd.runs.checkpoint import complete_checkpoints
from protlig_dd.tokenizer import AMINO_ACIDS

from .browser import Browser, chromium
from .conftest import Command, MadeOnce, require_program
from .test_training import overrides_for

finite = st.floats(-1e6, 1e6)
NASTY = "<img src=x onerror=alert(1)>&\"'"


@pytest.fixture(scope="module")
def trained(store: SequenceStore, python: Command, made_once: MadeOnce) -> Path:
    """A run of 20 steps with two attempts, validation, samples, TensorBoard and offline Weights & Biases."""
    options = (
        "trainer.max_steps=20",
        "trainer.eval_every=8",
        "trainer.eval_max_sequences=4",
        "report.samples=14",
        "report.steps=4",
        "report.untrained=true",
    )
    trackers = ("logger=wandb", "logger.tensorboard=true", "logger.wandb_mode=offline")

    def fill(folder: Path) -> None:
        for added in (("trainer.stop_at_step=10",), trackers):
            process = python("-m", "protlig_dd.training", *overrides_for(store, "tiny", *options, *added), cwd=folder)
            assert process.returncode == 0, process.stdout + process.stderr
            copy = folder / f"runs/tiny/{len(added)}.html"
            shutil.copy(folder / "runs/tiny/report.html", copy)
        assert "report page            runs/tiny/report.html" in process.stdout

    return made_once("tracked", fill) / "runs/tiny"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that copies the trained run's small files to a run folder of the given name."""

    def copy(name: str) -> Path:
        ignored = shutil.ignore_patterns("checkpoints", "tensorboard", "wandb", "logs", "*.html")
        return Path(shutil.copytree(trained, tmp_path / "runs" / name, ignore=ignored))

    return copy


def paired_cells(page: str) -> list[list[str]]:
    """Return, for each run, the cell of "bound − first run" and the cell of its standard error."""
    table = page[page.index(">bound − first run<") :]
    rows = re.findall(r"<tr>(<t[hd].*?)</tr>", table[: table.index("</table>")], re.DOTALL)
    return [re.findall(r"<td.*?>(.*?)</td>", row)[3:5] for row in rows]


def judges_json(*rows: dict[str, Any]) -> dict[str, Any]:
    """Return the contents of a judges.json with these rows, as `judge` writes the file."""
    return {"samples": "designs.fasta", "natural": "held.fasta", "train": None, "seed": 0, "rows": list(rows)}


def drawings(page: str) -> list[ElementTree.Element]:
    """Return the plots; they must be well-formed XML."""
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def hover_values(page: str) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """Return the values that the page's script shows: {title of the plot: {name of the series: (x, y)}}."""
    found = {}
    for figure in re.findall(r"<figure.*?</figure>", page, re.DOTALL):
        title, values = re.search(r"<b>(.*?)</b>", figure), re.search(r"<script.*?>(.*?)</script>", figure)
        if title is not None and values is not None:
            curves = json.loads(values[1])["series"]
            found[html.unescape(title[1])] = {curve["name"]: (curve["x"], curve["y"]) for curve in curves}
    return found


@pytest.mark.slow
def test_training_ends_by_writing_the_page(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    assert page == run_page(read_run(trained))
    report = json.loads((trained / "report.json").read_text())
    for key in ("nll", "unigram_nll"):
        assert f'<td class="number">{report[key]:.4f}</td>' in page
        assert f'<td class="number">{report[f"{key}_se"]:.4f}</td>' in page
    assert f'<td class="number">{report["composition_kl"]:.4g}</td>' in page
    assert "2 more in samples/step_00000020.fasta" in page
    assert "optim.warmup_steps" in page
    assert "versions.torch" in page
    assert "has no report yet" not in page
    assert "This run has completed 10 of 20 steps and has no report yet." in (trained / "1.html").read_text()


@pytest.mark.slow
def test_the_figures_of_the_page_equal_those_recomputed_from_the_runs_files(trained: Path) -> None:
    """Recompute the boxes at the top and the table of bounds from report.csv, metrics.jsonl and the weights."""
    page = html.unescape((trained / "report.html").read_text())
    rows = list(csv.DictReader((trained / "report.csv").read_text().splitlines()))
    residues, bound, unigram = (
        np.array([float(row[key]) for row in rows]) for key in ("residues", "nll_nats", "unigram_nats")
    )

    def written(nats: np.ndarray, sign: str = "") -> list[str]:
        """Return the nats per residue and their standard error over proteins, as the page prints them."""
        ratio, n = nats.sum() / residues.sum(), len(nats)
        error = math.sqrt(((nats - ratio * residues) ** 2).sum() * n / (n - 1)) / residues.sum()
        return [f"{ratio:{sign}.4f}".replace("-", "−"), f"{error:.4f}"]

    def cells(name: str) -> list[str]:
        (row,) = re.findall(rf'<th scope="row">{name}</th>(.*?)</tr>', page)
        return re.findall(r"<td class=\"number\">(.*?)</td>", row)

    perplexities = [f"{math.exp(nats.sum() / residues.sum()):.3f}" for nats in (bound, unigram)]
    assert cells("this model, upper bound") == [*written(bound), perplexities[0]]
    assert cells("unigram model") == [*written(unigram), perplexities[1]]
    assert cells("this model − unigram, paired") == [*written(bound - unigram), ""]
    boxes = {
        name: (value, note) for name, value, note in re.findall(r"<dt>(.*?)</dt><dd>(.*?)<small>(.*?)</small>", page)
    }
    assert boxes["NLL bound, test set"] == (written(bound)[0], f"± {written(bound)[1]} nats/residue")
    difference = written(bound - unigram, "+")
    assert boxes["Difference to the unigram model"] == (difference[0], f"± {difference[1]} nats/residue, paired")
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = {
        line["step"]: line for line in lines if "residues" in line
    }  # a later attempt's row replaces an earlier one's
    assert boxes["Steps"] == ("20", f"trained on {steps[20]['residues']:,} residues")
    speeds = sorted(line["residues_per_s"] for line in steps.values())
    assert boxes["Speed"] == (f"{(speeds[9] + speeds[10]) / 2:,.0f}", "residues/s, median")
    weights = load_file(complete_checkpoints(trained)[-1] / "model.safetensors")
    millions = sum(tensor.numel() for tensor in weights.values()) / 1e6
    assert boxes["Parameters"] == (f"{millions:,.1f} M", "2 blocks of width 32")
    assert f"The test set: {len(rows)} proteins, {int(residues.sum()):,} residues, step 20" in page


@pytest.mark.slow
def test_the_curves_are_those_of_metrics_jsonl_with_attempts_merged(trained: Path) -> None:
    run = read_run(trained)
    plots = hover_values(run_page(run))
    x, y = plots["Loss and validation bound"]["loss, weights capped, each step"]
    assert x == list(range(1, 21))
    assert y == pytest.approx([run.metrics[step]["loss"] for step in range(1, 21)], rel=1e-4)
    assert {run.metrics[1]["attempt"], run.metrics[20]["attempt"]} == {1, 2}
    x, y = plots["Loss and validation bound"]["validation bound"]
    assert x == [8, 16, 20]
    assert y == pytest.approx([run.metrics[step]["val_nll"] for step in (8, 16, 20)], rel=1e-4)
    _, mfu = plots["Model FLOPs utilisation"]["each step"]
    assert mfu == pytest.approx([100 * run.metrics[step]["mfu"] for step in range(1, 21)], rel=1e-4)
    assert {"Learning rate", "Speed", "Gradient norm", "Length", "Composition"} <= plots.keys()


@pytest.mark.slow
def test_lengths_and_composition_are_those_of_the_store_and_the_samples(trained: Path, store: SequenceStore) -> None:
    run = read_run(trained)
    group = StoreGroup([store])
    plots, width = hover_values(run_page(run)), run.report["training"]["length_bin"]
    lengths = [length for row in store.split("train") if (length := len(store[row]) - 2) <= 200]
    x, shares = plots["Length"]["training split"]
    for middle, share in zip(x, shares, strict=True):
        inside = [length for length in lengths if abs(length + 0.5 - middle) < width / 2]
        assert share == pytest.approx(100 * len(inside) / len(lengths), rel=1e-4)
    assert sum(plots["Length"]["14 samples"][1]) == pytest.approx(100, abs=0.01)
    _, shares = plots["Composition"]["training split"]
    assert shares == pytest.approx((100 * training_frequencies(group)).tolist(), rel=1e-4)
    pooled = "".join(record.sequence for record in run.samples)
    percentages = [100 * pooled.count(letter) / len(pooled) for letter in AMINO_ACIDS]
    assert plots["Composition"]["14 samples"][1] == pytest.approx(percentages, rel=1e-4)
    for max_len in (1, 39, 40, 200):
        statistics = training_statistics(group, max_len)
        counts, cropped = length_counts(group, max_len)
        assert sum(statistics["length_counts"]) == sum(counts) == 360 - cropped
        assert (
            statistics["cropped"] == cropped == sum(int(store.lengths[row]) > max_len for row in store.split("train"))
        )
        assert len(statistics["length_counts"]) <= 40


@pytest.mark.slow
def test_both_trackers_record_scalars_samples_and_histograms(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = read_run(trained)
    events = EventAccumulator(str(trained / "tensorboard"), {"histograms": 0, "scalars": 0})
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == pytest.approx({step: run.metrics[step]["loss"] for step in range(1, 21)}, rel=1e-6)
    (text,) = events.Tensors("samples/text_summary")
    assert f"tiny_1  {run.samples[0].sequence}" in text.tensor_proto.string_val[0].decode()
    assert [event.step for event in events.Histograms("weights/blocks.1")] == [8, 16, 20]
    norms = events.Histograms("grad_norm/of_each_parameter")
    assert [event.step for event in norms] == [8, 16, 20]
    # the squared gradient norms of the parameters sum to the squared norm of the whole gradient
    for event in norms:
        assert event.histogram_value.sum_squares == pytest.approx(run.metrics[event.step]["grad_norm"] ** 2, rel=1e-4)
    (lengths,) = events.Histograms("samples/length")
    assert (lengths.step, lengths.histogram_value.num) == (20, 14)
    assert lengths.histogram_value.sum == sum(len(record.sequence) for record in run.samples)
    (letters,) = events.Histograms("samples/amino_acid")
    pooled = "".join(record.sequence for record in run.samples)
    counted = dict(zip(letters.histogram_value.bucket_limit, letters.histogram_value.bucket, strict=True))
    assert [counted.get(i + 0.5, 0) for i in range(20)] == [pooled.count(letter) for letter in AMINO_ACIDS]

    history = offline_history(trained)
    assert {row["_step"]: row["loss"] for row in history if "loss" in row} == pytest.approx(
        {step: run.metrics[step]["loss"] for step in range(11, 21)}  # only the second attempt logs to wandb
    )
    last = {key: value for row in history for key, value in row.items()}
    assert last["samples/amino_acid.values"] == [pooled.count(letter) for letter in AMINO_ACIDS]
    assert sum(last["samples/length.values"]) == 14
    assert sum(last["weights/blocks.1.values"]) > 1000
    table = next(trained.glob("wandb/offline-run-*/files")) / last["samples.path"]
    assert json.loads(table.read_text())["data"][0] == ["tiny_1", run.samples[0].sequence]


def offline_history(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of an offline run of Weights & Biases.

    The file has a header of 7 bytes, followed by messages in LevelDB's log format.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    content, at, parts, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:  # the end of a block is padding if no record header fits in it
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record, parts = Record.FromString(parts), b""
            items = record.history.item
            rows.append({".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.slow
def test_an_interrupted_run_has_a_page_without_the_missing_parts(copied: Callable[[str], Path]) -> None:
    folder = copied("cut")
    (folder / "report.json").unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')
    run = read_run(folder)
    page = run_page(run)
    assert "This run has completed 20 of 20 steps and has no report yet." in page
    assert "The validation set: 4 proteins" in page
    assert f'<td class="number">{run.metrics[20]["val_nll"]:.4f}</td>' in page
    assert "<h2>Samples</h2>" not in page
    for name in ("metrics.jsonl", "environment.json"):
        (folder / name).unlink()
    page = write_run_page(folder).read_text()
    assert "This run has completed 0 of 20 steps" in page
    assert not drawings(page)
    assert "optim.lr" in page


@pytest.mark.slow
def test_one_held_out_protein_is_enough_and_an_extended_run_keeps_the_step_of_its_report(
    proteins: list[FastaRecord], tmp_path: Path, run_python: Command
) -> None:
    id_ = 'sp|P1,"x"'  # the id of the test protein
    for name, records in (("train", proteins[:40]), ("validation", proteins[40:41]), ("test", proteins[41:42])):
        text = "".join(f">{id_ if name == 'test' else record.id}\n{record.sequence}\n" for record in records)
        (tmp_path / f"{name}.fasta").write_text(text)
    store = build_store({split: tmp_path / f"{split}.fasta" for split in SPLITS}, tmp_path / "family.h5")
    command = ("-m", "protlig_dd.training", *overrides_for(store, "one", "trainer.eval_every=2", "report.samples=2"))
    done = run_python(*command, "trainer.max_steps=4")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "runs/one"

    def fail(constant: str) -> None:
        raise AssertionError(f"{constant} is not valid JSON")

    report = json.loads((folder / "report.json").read_text(), parse_constant=fail)
    assert (report["sequences"], report["nll_se"], report["unigram_nll_se"]) == (1, None, None)
    assert report["precision"] == json.loads((folder / "environment.json").read_text())["precision"]
    (row,) = csv.DictReader((folder / "report.csv").read_text().splitlines())
    assert row["id"] == id_
    assert float(row["nll_nats"]) / int(row["residues"]) == pytest.approx(report["nll"], abs=1e-5)
    page = (folder / "report.html").read_text()
    assert "nan" not in page
    assert f"step 4, averaged weights, {report['precision']}." in page
    assert f"± ? {NATS}" in page
    x, y = hover_values(page)["Loss and validation bound"]["validation bound"]
    assert (x, len(y)) == ([2, 4], 2)
    exported = run_python("-m", "protlig_dd.export", "from=runs/one", "to=models/one")
    assert exported.returncode == 0, exported.stderr
    card = (tmp_path / "models/one/README.md").read_text()
    assert f"| bound on the negative log-likelihood | {report['nll']:.4f} ± nan |" in card
    assert page == run_page(read_run(folder))
    assert drawings(comparison_page([read_run(folder)]))
    done = run_python(*command, "trainer.max_steps=8", "trainer.stop_at_step=6", "run.resume=extend")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This run has completed 6 of 8 steps and has no report yet." in (folder / "report.html").read_text()
    shutil.copy(folder / "reports/step_00000004/report.json", folder)  # earlier versions kept the report there
    write_run_page(folder)
    run = read_run(folder)
    assert (run.last_step, run.report["step"]) == (6, 4)
    page = (folder / "report.html").read_text()
    assert "step 4, averaged weights" in page
    assert "This run has completed 6 of 8 steps. Its report (the bound and the samples) is from step 4." in page
    # the columns step and proteins
    assert '<td class="number">4</td><td class="number">1</td>' in comparison_page([run])
    (folder / "report.json").unlink()
    page = run_page(read_run(folder))  # the bounds of the last validation are used instead
    assert f"± ? {NATS}" in page
    assert "The validation set: 1 proteins" in page


def test_a_loss_with_capped_weights_is_labelled_as_such(trained: Path) -> None:
    run = read_run(trained)
    assert has_capped_weights(run)
    for changes in ({"noise.max_weight": None}, {"graph.name": "uniform"}):
        other = replace(run, config=run.config | changes)
        assert not has_capped_weights(other)
        assert "loss, each step" in hover_values(run_page(other))["Loss and validation bound"]
    assert has_capped_weights(replace(run, config=run.config | {"graph.name": "uniform", "noise.max_weight": 5}))


@pytest.mark.slow
def test_the_report_compares_samples_with_natural_proteins(copied: Callable[[str], Path], store: SequenceStore) -> None:
    run = read_run(copied("judged"))
    rows = {row["name"]: row for row in run.report["judges"]}
    whole = [int(store.lengths[row]) for row in store.split("test") if int(store.lengths[row]) <= 200]
    n = min(len(run.samples), len(whole) // 2)
    assert n > 2
    assert rows["proteins"]["samples"] == rows["proteins"]["natural"] == n
    assert rows["residues"]["samples"] == sum(len(record.sequence) for record in run.samples[:n])
    natural = rows["residues"]["natural"]
    assert natural == rows["residues"]["shuffled"]
    held = sorted(whole)
    assert sum(held[:n]) <= natural <= sum(held[-n:])
    page = run_page(run)
    compared = "The samples compared with proteins of the test set, and with the same proteins after shuffling their"
    assert f"{compared} residues." in page
    value = rows["3-mers, divergence in nats"]
    _, lengths, *others = run.report["verdicts"]
    assert lengths["told"] == "not judged: they were drawn from the lengths of the training set"
    assert [verdict["group"] for verdict in others] == ["composition and words", "repeats", "variety"]
    for verdict in (lengths, *others):
        assert f"<li>{verdict['group']}: {escape(verdict['told'])}</li>" in page
    for column in ("samples", "natural", "shuffled"):
        assert f'<td class="number">{format_figure(Figure(value[column], value[f"{column}_se"]))}</td>' in page


@pytest.mark.slow
def test_untrusted_text_is_escaped(copied: Callable[[str], Path]) -> None:
    folder = copied(NASTY)
    fasta = next((folder / "samples").glob("*.fasta"))
    fasta.write_text(fasta.read_text().replace(">tiny_1 ", f">{NASTY.replace(' ', '_')}</script><b> "))
    contents = judges_json({"name": NASTY, "samples": NASTY, "natural": 0.5})
    contents["verdicts"] = [{"group": NASTY, "verdict": "worse", "told": NASTY}]
    (folder / "judges.json").write_text(json.dumps(contents))
    with (folder / "config.yaml").open("a") as file:
        file.write(f"extra: {json.dumps(NASTY)}\n")
    run = read_run(folder)
    other = read_run(copied("other</script><b>".replace("/", "∕")))
    for page in (run_page(run), comparison_page([run, other])):
        assert "<img" not in page
        assert "<b>\n" not in page
        assert page.count("</script>") == page.count("<script")
        assert html.escape(NASTY).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in page
        assert drawings(page)
    assert "Samples compared with natural proteins" in run_page(run)
    assert "designs.fasta compared with natural proteins of held.fasta" in run_page(run)


@pytest.mark.slow
def test_every_plot_has_a_title_and_the_page_fetches_nothing(trained: Path) -> None:
    page = (trained / "report.html").read_text()
    plots = drawings(page)
    assert len(plots) == 8
    for svg in plots:
        assert svg.get("role") == "img"
        assert svg[0].tag == "title"
        assert svg[0].text
        numbers = [float(text) for text in re.findall(r"-?\d+\.\d+", "".join(path.get("d", "") for path in svg))]
        assert all(map(math.isfinite, numbers))
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in re.sub(r"<details>.*", "", page, flags=re.DOTALL)
    assert "url(" not in page


def run_report(*arguments: str) -> int:
    """Return the exit code of the command `report`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["protlig_dd.report", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "0")
        try:
            run_verb(report, "report", ReportPageConfig)
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def test_a_file_created_meanwhile_is_not_overwritten(
    trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_file(_: object) -> str:
        Path("mine.html").write_text("mine")
        return "the page"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("protlig_dd.report.run_page", create_file)
    assert run_report(f"runs=[{trained_run}]", "output=mine.html") == 1
    assert "error: mine.html exists already" in capsys.readouterr().err
    assert Path("mine.html").read_text() == "mine"


@pytest.mark.slow
def test_the_verb_rebuilds_and_compares_pages_and_rejects_damaged_files(
    copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = copied("first"), copied("second")
    monkeypatch.chdir(first.parents[1])
    config = (second / "config.yaml").read_text()
    config = config.replace("lr: 0.003", "lr: 0.5").replace("model:\n", "model:\n  positions: t5\n")
    # earlier versions did not write the key trainer.compile
    (second / "config.yaml").write_text(config.replace("  compile: auto\n", ""))
    for _ in range(2):  # the run's own page may be replaced
        assert run_report("runs=[runs/first]") == 0
        assert capsys.readouterr().out == "runs/first/report.html: first\n"
    assert (first / "report.html").read_text() == run_page(read_run(first))
    compare = ("runs=[runs/first,runs/second]", "output=both.html")
    assert run_report(*compare) == 0
    page = Path("both.html").read_text()
    cell = r'<td class="number">(.*?)</td>'
    rows = re.findall(rf'<th scope="row">(.*?)</th>{cell}{cell}', page)
    differing = [row for row in rows if row[0].partition(".")[0] in ("data", "model", "optim", "trainer")]
    assert differing == [("model.positions", "rope", "t5"), ("optim.lr", "0.003", "0.5")]
    assert "evaluated on different proteins: compare" not in page
    assert set(hover_values(page)["Loss, smoothed"]) == {"first", "second"}
    # the second run is 0.01 nats/residue better on every protein but the first, on which it is 5 nats worse in total
    proteins = list(csv.DictReader((first / "report.csv").read_text().splitlines()))
    residues = np.array([int(row["residues"]) for row in proteins])
    changes = np.where(np.arange(len(residues)) == 0, 5.0, -0.01 * residues)
    nats = [f"{float(row['nll_nats']) + change:.6f}" for row, change in zip(proteins, changes, strict=True)]
    original = (second / "report.csv").read_text()
    lines = [
        ",".join([row["id"], row["residues"], value, row["unigram_nats"]])
        for row, value in zip(proteins, nats, strict=True)
    ]
    (second / "report.csv").write_text("\n".join(["id,residues,nll_nats,unigram_nats", *lines]))
    difference, error = per_residue(changes, residues)
    cells = [f"{difference:.4f}".replace("-", "−"), f"{error:.4f}"]
    assert paired_cells(comparison_page([read_run(first), read_run(second)])) == [["", ""], cells]
    (second / "report.csv").write_text(original.replace(proteins[0]["id"], "another"))  # different proteins
    assert paired_cells(comparison_page([read_run(first), read_run(second)])) == [["", ""], ["", ""]]
    (second / "report.csv").write_text("id,residues\nP1,7\n")
    with pytest.raises(ValueError, match=r"second/report.csv: damaged, or not written by protlig_dd"):
        comparison_page([read_run(first), read_run(second)])
    (second / "report.csv").write_text(original)
    (first / "judges.json").write_text("{")
    capsys.readouterr()
    for arguments, parts in (
        (compare, ("both.html exists already",)),
        (("runs=[runs/none]",), ("runs/none does not exist",)),
        (("runs=[]",), ("runs=[]",)),
        (("runs=[runs/first]",), ("judges.json", "not JSON")),
    ):
        assert run_report(*arguments) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        for part in parts:
            assert part in line
    for name, content in (
        ("judges.json", '[{"name": "length", "samples": 3}]'),
        ("judges.json", json.dumps(judges_json({"samples": 3}))),
        ("judges.json", json.dumps({"rows": []})),
        ("judges.json", json.dumps(judges_json() | {"verdicts": ["worse"]})),
        ("report.json", "[]"),
        ("report.json", '{"nll": 3.0}'),
        ("environment.json", "7"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n'),
    ):
        (first / "judges.json").write_text(json.dumps(judges_json()))
        original = (first / name).read_text()
        (first / name).write_text(content)
        assert run_report("runs=[runs/first]") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: runs/first/{name}")
        (first / name).write_text(original)


@pytest.mark.slow
def test_runs_may_be_a_sweeps_folder_or_a_pattern(
    copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are one level below a sweep's folder, and two levels below a date's folder of Hydra's multirun."""
    runs = [
        copied(name)
        for name in (
            "sweep/lr-0.1",
            "sweep/lr-0.2",
            "multirun/2026-11-28/10-00-00/0",
            "multirun/2026-11-28/10-00-00/1",
            "multirun/2026-11-28/10-00-00/10",
        )
    ]
    monkeypatch.chdir(runs[0].parents[2])
    (runs[0] / "checkpoints/step_1").mkdir(parents=True)
    shutil.copy(runs[0] / "config.yaml", runs[0] / "checkpoints/step_1")  # a checkpoint is not a run
    Path("runs/sweep/.submitit").mkdir()
    Path("runs/sweep/lr-0.3").mkdir()
    shutil.copy(runs[0] / "config.yaml", "runs/sweep/lr-0.3")
    Path("runs/empty/deep/deeper/too_deep").mkdir(parents=True)
    shutil.copy(runs[0] / "config.yaml", "runs/empty/deep/deeper/too_deep")
    shutil.copy(runs[0] / "metrics.jsonl", "runs/empty/deep/deeper/too_deep")
    for wanted, names in (
        ("runs=runs/sweep", ["lr-0.1", "lr-0.2"]),
        ("runs=[runs/sweep]", ["lr-0.1", "lr-0.2"]),
        ("runs=runs/multirun/2026-11-28", ["0", "1", "10"]),
        ("runs=runs/multirun/*/*/0*", ["0"]),
        ("runs=runs/multirun/*/*/1*", ["1", "10"]),
        ("runs=runs/sweep/lr-0.[12]", ["lr-0.1", "lr-0.2"]),
        ("runs=[runs/sweep/*2,runs/multirun/*]", ["lr-0.2", "0", "1", "10"]),
        ("runs=[runs/sweep/lr-0.1,runs/sweep]", ["lr-0.1", "lr-0.2"]),  # each run once
        ("runs=runs/sweep/lr-0.2", ["lr-0.2"]),
    ):
        output = f"output={len(list(Path().glob('*.html')))}.html"
        assert run_report(wanted, output) == 0, wanted
        printed = "".join(capsys.readouterr().out.split("\n"))
        assert printed.endswith(f".html: {', '.join(names)}"), printed
        left_out = "runs/sweep/lr-0.3 is skipped: it has no metrics.jsonl" in printed
        assert left_out == ("sweep" in wanted.split("/")[-1])
    for wanted, part in (
        ("runs=runs/sweep/x*", "runs=runs/sweep/x*: no folder matches this pattern"),
        ("runs=[runs/sweep,runs/y?]", "runs=runs/y?: no folder matches this pattern"),
        ("runs=runs/empty", "runs=runs/empty: no run in this folder or the two levels below it"),
        ("runs=runs/empty*", "runs=runs/empty*: no run in"),
        ("runs=runs/none", "runs=runs/none does not exist"),
        ("runs=7", "runs=7 does not exist"),
        ("runs={a:1}", "runs: give a folder, a pattern, or a list of them"),
    ):
        assert run_report(wanted) == 1, wanted
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {part}"), line


LOOKS = r"""
(() => {
  const problems = [], width = document.documentElement.clientWidth;
  const report = (element, what) => problems.push(`${what}: ${element.tagName} ${element.outerHTML.slice(0, 120)}`);
  document.querySelectorAll("details").forEach(details => { details.open = true; });
  const scrolled = document.documentElement.scrollWidth;
  if (scrolled > width) problems.push(`the page is ${scrolled} wide`);
  for (const element of document.querySelectorAll("main, main *")) {
    const box = element.getBoundingClientRect(), within = element.closest(".scroll");
    if (within && within !== element || !box.width) continue; // scrollable parts may overflow
    if (box.left < -0.5 || box.right > width + 0.5) report(element, "overflows");
    const svg = element.closest("svg");
    if (svg && element.tagName === "text") {
      const frame = svg.getBoundingClientRect();
      const across = box.left >= frame.left - 0.5 && box.right <= frame.right + 0.5;
      if (!across || box.bottom > frame.bottom + 3) report(element, "is cut off");
    }
  }
  const plots = document.querySelectorAll("figure.plot");
  for (const plot of plots) {
    const drawn = [...plot.querySelectorAll("path:not(.grid):not(.rule)")];
    if (!drawn.length) report(plot, "empty");
    for (const path of drawn) {
      const box = path.getBBox();
      if (!(path.getTotalLength() > 0 && box.width + box.height > 1)) report(path, "has no size");
    }
  }
  const numbers = colour => colour.match(/[\d.]+/g).map(Number);
  const luminance = colour => numbers(colour).slice(0, 3).map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
  const opaque = element => {
    for (; element; element = element.parentElement) {
      const colour = getComputedStyle(element).backgroundColor, alpha = numbers(colour)[3];
      if (alpha === undefined || alpha === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  let texts = 0;
  const walker = document.createTreeWalker(document.querySelector("main"), NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script, [hidden]")) continue;
    const style = getComputedStyle(element), svg = element.closest("svg");
    const size = parseFloat(style.fontSize) * (svg ? svg.getScreenCTM().a : 1);
    if (size < 11) report(element, `text of ${size} px`);
    const [a, b] = [svg ? style.fill : style.color, opaque(element)].map(luminance);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < 4.5) report(element, `contrast ${contrast}`);
    texts += 1;
  }
  return {problems, texts, plots: plots.length};
})()
"""


def assert_looks_well(browser: Browser, path: Path, width: int, dark: bool, plots: int) -> None:
    browser.open(path.as_uri(), width=width, dark=dark)
    found = browser.evaluate(LOOKS)
    assert found["problems"] == []
    assert found["texts"] > 100
    assert found["plots"] == plots
    assert browser.problems == []
    assert set(browser.requests) == {path.as_uri()}
    browser.requests.clear()


@pytest.mark.slow
@pytest.mark.system
def test_pages_in_a_browser_look_well_and_show_values_under_the_pointer(
    trained: Path, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    require_program("chromium")
    folder = copied("a-run-with-a-very-long-name-" + "that-goes-on-" * 9)
    row = {"name": "another model", "samples": 9.25, "samples_se": 0.5, "natural": 6.5, "shuffled": 17}
    (folder / "judges.json").write_text(json.dumps(judges_json(row)))
    cells = re.findall(r'<td class="number">(.*?)</td>', run_page(read_run(folder)))
    assert cells[-3:] == ["9.25 ± 0.50", "6.5", "17"]
    both = tmp_path / "both.html"
    both.write_text(comparison_page([read_run(folder), read_run(trained)]))
    with chromium(tmp_path / "profile") as browser:
        for width in (375, 1280):
            for dark in (False, True):
                assert_looks_well(browser, trained / "report.html", width, dark, plots=8)
            assert_looks_well(browser, write_run_page(folder), width, False, plots=8)
            assert_looks_well(browser, both, width, False, plots=7)
            browser.open((trained / "report.html").as_uri(), width=width, height=5000)
            frame = browser.evaluate("""(() => {
              const plot = document.querySelectorAll("figure.plot")[1];
              const box = plot.querySelector("svg").getBoundingClientRect();
              return [box.left + box.width * 0.5, box.top + box.height * 0.5];
            })()""")
            tooltip = (
                'document.querySelectorAll("figure.plot")[1].querySelector(".tip:not([hidden])")?.textContent ?? ""'
            )
            assert browser.evaluate(tooltip) == ""
            browser.move_to(*frame)
            assert re.fullmatch(
                r"step \d+\nloss, weights capped, each step  \d\.\d+\nloss, weights capped, smoothed  \d\.\d+.*",
                browser.evaluate(tooltip),
            )
            assert browser.evaluate("""(() => {
              const [tip, svg] = [".tip:not([hidden])", "figure:has(.tip:not([hidden])) svg"]
                .map(selector => document.querySelector(selector).getBoundingClientRect());
              return tip.top >= svg.top && tip.bottom <= svg.bottom && tip.left >= svg.left && tip.right <= svg.right;
            })()""")
            browser.move_to(1, 1)
            assert browser.evaluate(tooltip) == ""


@given(finite, finite)
def test_ticks_are_round_numbers_inside_the_axis(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    if high - low <= 1e-6 * max(abs(low), abs(high), 1e-3):
        return
    ticks = nice_ticks(low, high)
    slack = 1e-6 * (high - low)
    assert 2 <= len(ticks) <= 11
    assert all(low - slack <= tick <= high + slack for tick in ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0], rtol=1e-6)
    assert f"{steps[0]:.1e}"[:3] in ("1.0", "2.0", "5.0")
    assert len(set(tick_texts(ticks))) == len(ticks)


def test_tick_labels_are_short() -> None:
    assert tick_texts([0.0, 0.001, 0.002]) == ["0.000", "0.001", "0.002"]
    assert tick_texts([-0.5, 0.0, 0.5]) == ["−0.5", "0.0", "0.5"]
    assert tick_texts([0.0, 20000.0, 40000.0]) == ["0", "20k", "40k"]
    assert tick_texts([0.0, 5e5, 1e6]) == ["0.0", "0.5M", "1.0M"]
    assert tick_texts([0.0, 5e-6, 1e-5]) == ["0", "5e−6", "1e−5"]
    with pytest.raises(ValueError, match="no length"):
        nice_ticks(2.0, 2.0)


@given(st.lists(finite, max_size=50), st.integers(1, 60))
def test_thinning_keeps_the_order_and_the_mean(values: list[float], most: int) -> None:
    x, y = thin(np.arange(float(len(values))).tolist(), values, most)
    assert len(x) == len(y) == min(most, len(values))
    assert x == sorted(x)
    sizes = [len(part) for part in np.array_split(values, max(1, len(y)))]
    assert max(sizes) - min(sizes) <= 1
    assert np.dot(sizes[: len(y)], y) == pytest.approx(sum(values), rel=1e-9, abs=1e-3)


@given(st.lists(finite, min_size=1, max_size=20), st.floats(1, 10))
def test_smoothing_is_a_weighted_mean_of_the_values_so_far(values: list[float], span: float) -> None:
    keep = 1 - 1 / span
    for i, mean in enumerate(smooth(values, span)):
        weights = [keep ** (i - j) for j in range(i + 1)]
        assert mean == pytest.approx(np.average(values[: i + 1], weights=weights), rel=1e-9, abs=1e-6)


def axis(ticks: list[tuple[str, str]]) -> Callable[[str], float]:
    """Return a function that converts a position on an axis to its value.

    Args:
        ticks: (position, label) of each tick.
    """
    units = {"k": 1e3, "M": 1e6, "G": 1e9}
    positions = [float(position) for position, _ in ticks]
    values = [float(text.replace("−", "-").rstrip("kMG")) * units.get(text[-1], 1.0) for _, text in ticks]
    slope, start = np.polyfit(positions, values, 1)
    assert np.allclose(np.polyval([slope, start], positions), values, atol=abs(slope) * 0.2)  # positions are rounded
    return lambda position: float(slope * float(position) + start)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 4e4])
def test_estimates_and_their_bars_match_the_axis(scale: float) -> None:
    rows = [Estimate("a", 2.0 * scale, 0.3 * scale), Estimate("b", -1.0 * scale, 0.05 * scale)]
    (svg,) = drawings(dot_plot("Bound", "nats", rows))
    drawing = ElementTree.tostring(svg, encoding="unicode")
    value_at = axis(re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]+)<', drawing))
    bars = re.findall(r'error" d="M([\d.]+) [\d.]+H([\d.]+)"', drawing)
    dots = re.findall(r'cx="([\d.]+)"', drawing)
    slack = 1e-2 * scale
    for row, (left, right), dot in zip(rows, bars, dots, strict=True):
        assert value_at(dot) == pytest.approx(row.value, abs=slack)
        assert value_at(left) == pytest.approx(row.value - 2 * row.error, abs=slack)
        assert value_at(right) == pytest.approx(row.value + 2 * row.error, abs=slack)
    names = re.findall(r'<text class="row"[^>]*>([^<]+)<', drawing)
    assert names == ["a", "b"]


@pytest.mark.parametrize("style", ["line", "dots"])
def test_points_and_their_bars_match_both_axes(style: str) -> None:
    x, y, errors = [100.0, 250.0, 400.0, 1000.0], [2.9, 2.7, 2.65, 2.6], [0.05, 0.02, 0.01, 0.0]
    (svg,) = drawings(plot("Loss", "nats", [Series("loss", x, y, style=style, errors=errors)]))
    drawing = ElementTree.tostring(svg, encoding="unicode")
    x_at = axis(re.findall(r'<text x="([\d.]+)" y="[\d.]+" text-anchor="middle">([^<]+)<', drawing))
    lines = re.findall(r'class="grid" d="M[\d.]+ ([\d.]+)H', drawing)
    texts = re.findall(r'text-anchor="end">([\d.−]+)<', drawing)
    y_at = axis(list(zip(lines, texts, strict=True)))
    (whiskers,) = re.findall(r'error" d="([^"]+)"', drawing)
    bars = re.findall(r"M([\d.]+) ([\d.]+)V([\d.]+)", whiskers)
    for step, value, error, (position, low, high) in zip(x, y, errors, bars, strict=True):
        assert x_at(position) == pytest.approx(step, abs=2)
        assert y_at(low) == pytest.approx(value - error, abs=2e-3)
        assert y_at(high) == pytest.approx(value + error, abs=2e-3)
    points = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawing)
    if style == "line":
        (path,) = re.findall(r'class="c0 line" d="M([^"]+)"', drawing)
        points += [tuple(point.split()) for point in path.split("L")]
    assert len(points) == 2 * len(x)  # each point has a dot on its bar, and either a dot or a corner of the curve
    for (position, height), step, value in zip(points, x * 2, y * 2, strict=True):
        assert x_at(position) == pytest.approx(step, abs=2)
        assert y_at(height) == pytest.approx(value, abs=2e-3)
    hover = json.loads(
        re.findall(
            r'<script type="application/json">(.*?)</script>',
            plot("Loss", "nats", [Series("loss", x, y, style=style, errors=errors)]),
        )[0]
    )
    assert (hover["series"][0]["x"], hover["series"][0]["y"]) == (x, y)


def test_plots_of_no_point_one_point_or_constant_values_are_drawn() -> None:
    assert plot("Nothing", "", [Series("none", [], [])]) == ""
    single = plot("One", "", [Series("one", [5.0], [2.0], errors=[0.0])])
    flat = plot("Flat", "", [Series("flat", [1.0, 2.0], [0.0, 0.0])], from_zero=True)
    for page in (single, flat):
        (svg,) = drawings(page)
        assert "nan" not in ElementTree.tostring(svg, encoding="unicode")


def test_estimates_without_an_error_have_no_bar() -> None:
    (svg,) = drawings(dot_plot("Bound", "", [Estimate("one protein", 2.9, math.nan), Estimate("many", 2.8, 0.01)]))
    drawing = ElementTree.tostring(svg, encoding="unicode")
    assert "nan" not in drawing
    starts, ends = zip(*re.findall(r'error" d="M([\d.]+) [\d.]+H([\d.]+)"', drawing), strict=True)
    assert starts[0] == ends[0]
    assert float(starts[1]) < float(ends[1])


def test_a_protein_is_wrapped_numbered_and_coloured() -> None:
    from protlig_dd.data.fasta import FastaRecord

    sequence = (AMINO_ACIDS + "XU") * 6
    shown = protein(FastaRecord("p", "", sequence))
    assert [start for start, _ in shown["lines"]] == [1, 61, 121]
    assert "".join(letters for _, parts in shown["lines"] for _, letters in parts) == sequence
    assert {sum(len(letters) for _, letters in parts) for _, parts in shown["lines"][:-1]} == {LINE}
    classes = dict(RESIDUE_CLASSES)
    assert sorted("".join(classes.values())) == sorted(AMINO_ACIDS)
    for _, parts in shown["lines"]:
        for name, letters in parts:
            assert set(letters) <= set(classes.get(name, "XU"))


def test_differing_keys_leave_out_equal_values_and_the_name() -> None:
    configs = [{"a": 1, "run.name": "x", "c": None}, {"a": 1, "run.name": "y", "b": 2, "c": None}]
    assert differing_keys(configs) == [["b", "—", "2"]]


def test_differing_keys_are_shown_as_config_files_contain_them() -> None:
    assert differing_keys([{"a": None, "b": ["x", "y"]}, {"a": True, "b": "x"}]) == [
        ["a", "null", "true"],
        ["b", "[x, y]", "x"],
    ]
