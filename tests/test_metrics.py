import io
import json
import os
from pathlib import Path

import pytest
from rich.console import Console

from protlig_dd.batch import split_lengths
from protlig_dd.diffusion.samplers.base import SamplerOptions
from protlig_dd.inference.generate import Origin, designs_fasta
from protlig_dd.inference.lengths import draw_lengths
from protlig_dd.runs.metrics import MetricsLog, read_metrics
from protlig_dd.system import terminal
from protlig_dd.system.distributed import Processes
from protlig_dd.system.files import creating, free_name, write_atomic, write_folder, write_new
from protlig_dd.system.terminal import ProgressBar, announce

from .conftest import wait_for


def test_rows_are_flat_json_and_later_attempts_replace_earlier_ones(tmp_path: Path) -> None:
    for attempt, loss in ((1, 3.0), (2, 2.5)):
        log = MetricsLog(tmp_path, attempt, tensorboard=True, wandb_project=None, wandb_name=None)
        log.write([{"step": 1, "loss": loss}, {"step": 2, "loss": float("nan")}])
        log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["attempt"] for line in lines] == [1, 1, 2, 2]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[1] == {"step": 1, "loss": 2.5, "attempt": 2}
    assert rows[2]["loss"] is None
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 2


def test_a_partial_last_row_left_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for content, steps in (('{"step": 1, "loss": 3.0}\n{"step": 2, "lo', {1, 3}), ('{"st', {3}), ("", {3})):
        path.write_text(content)
        log = MetricsLog(tmp_path, 2, tensorboard=False, wandb_project=None, wandb_name=None)
        log.write([{"step": 3, "loss": 2.0}])
        log.close()
        assert set(read_metrics(path)) == steps


@pytest.mark.parametrize("damaged", ['{"step": 2, "lo', "[]", '{"loss": 2.0}'])
def test_a_damaged_row_is_an_error_that_names_its_line(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 3.0}}\n{damaged}\n{{"step": 3, "loss": 2.0}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: damaged"):
        read_metrics(path)


def test_brackets_are_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    announce("runs/m[bold]/m[/x]: written", Processes(0, 1, 0))
    assert capsys.readouterr().out == "runs/m[bold]/m[/x]: written\n"


@pytest.mark.slow
def test_wandb_records_the_rows_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("one", "two"):  # both runs share wandb's service, which keeps the working folder of the first run
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        Path("run").mkdir()
        config = {"optim": {"betas": [0.9, 0.987]}, "from": None}
        log = MetricsLog(Path("run"), 1, config=config, tensorboard=False, wandb_project="proteins", wandb_name="demo")
        log.write([{"step": 1, "loss": 3.0}])
        log.close()
        (written,) = (tmp_path / name).glob("run/wandb/offline-run-*/run-*.wandb")
        for word in (b"loss", b"0.987"):  # the service continues to write after the log is closed
            wait_for(lambda file=written, word=word: word in file.read_bytes())


def test_without_wandb_the_error_gives_the_install_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'protlig_dd\[wandb\]'"):
        MetricsLog(tmp_path, 1, tensorboard=False, wandb_project="proteins", wandb_name=None)


def test_without_a_terminal_progress_is_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressBar("training", 100) as bar:
        for _ in range(100):
            bar.advance(note="loss 2.9")
    lines = capsys.readouterr().out.strip().splitlines()
    assert 5 <= len(lines) <= 15
    assert lines[-1].startswith("training 100/100  loss 2.9")


def test_on_a_terminal_the_validation_bar_is_shown_during_training(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=screen, force_terminal=True, width=100))
    with ProgressBar("training", 2) as training:
        training.advance(note="loss 2.9")
        with ProgressBar("validation", 3) as validation:
            validation.advance(3)
        training.advance(note="loss 2.8")
    output = screen.getvalue()
    for part in ("training", "2/2", "loss 2.8", "validation", "3/3", "━━━"):
        assert part in output


def test_files_are_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "sub" / "file.txt"
    write_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_new_output_never_replaces_a_path_created_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, links: bool
) -> None:
    def fail(*_: object) -> None:
        raise PermissionError("no hard links")

    if not links:
        monkeypatch.setattr(os, "link", fail)
    path = tmp_path / "new.txt"
    write_new(path, "first")
    assert path.read_text() == "first"
    path.unlink()
    for folder in (False, True):
        with pytest.raises(ValueError, match="new.txt exists already"), creating(path) as temporary:  # noqa: PT012
            if folder:
                write_folder(temporary, {"a": "b"})
            else:
                temporary.write_text("second")
            {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to("nowhere")}[kind]()
        assert [p.name for p in tmp_path.iterdir()] == ["new.txt"]
        if kind == "file":
            assert path.read_text() == ""
        path.rmdir() if kind == "folder" else path.unlink()


def test_a_free_name_ends_in_the_next_free_number(tmp_path: Path) -> None:
    assert free_name(tmp_path / "demo").name == "demo.1"
    (tmp_path / "demo.1").mkdir()
    assert free_name(tmp_path / "demo").name == "demo.2"


def test_lengths_are_drawn_in_proportion_to_their_counts_and_packed_in_order() -> None:
    counts = [0, 0, 5, 0, 15, 80, 0]
    lengths = draw_lengths(counts, 4000, seed=1)
    assert lengths == draw_lengths(counts, 4000, seed=1)
    assert set(lengths) == {2, 4, 5}
    for length in (2, 4, 5):
        assert abs(lengths.count(length) / 4000 - counts[length] / 100) < 0.03
    assert split_lengths([5, 5, 5, 90, 1], 20) == [[5, 5], [5], [90], [1]]


def test_the_headers_of_designs_record_how_they_were_sampled() -> None:
    import numpy as np

    origin = Origin("demo", 5, 3, SamplerOptions(9, "euler"))
    text = designs_fasta([np.arange(20, dtype=np.uint8).repeat(4)], ["demo_1"], origin, [" nll=2.8"])
    header, first, second = text.splitlines()
    assert header == ">demo_1 run=demo step=5 seed=3 length=80 sampler=euler steps=9 nll=2.8"
    assert (len(first), len(second)) == (60, 20)
