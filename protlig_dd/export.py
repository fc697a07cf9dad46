"""Export a trained model as a folder to share: safetensors, JSON, a model card and code for transformers; no pickle.

python -m protlig_dd.export from=runs/demo to=models/demo
"""

from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from protlig_dd.config.cli import run_verb
from protlig_dd.config.read import read_config
from protlig_dd.config.verbs import ExportConfig
from protlig_dd.inference.exported import CARD, is_exported, read_description, read_json, write_exported
from protlig_dd.inference.for_transformers import unsupported
from protlig_dd.inference.model import describe, find_saved, load_saved, run_folder
from protlig_dd.system.files import check_free, creating
from protlig_dd.system.terminal import console


def export(cfg: DictConfig) -> None:
    """Write a folder with a checkpoint's averaged weights and the files that are needed to use these weights.

    Adapters are merged with the weights that they extend.
    If `from=` is a run, its newest checkpoint is exported.
    """
    config = read_config(cfg, ExportConfig)
    to = check_free(config.to)
    if is_exported(Path(config.from_)):
        raise ValueError(f"{config.from_} is an exported model already; copy it")
    saved = find_saved(config.from_)
    for problem in saved.skipped:
        console.print(f"skipped: {problem}")
    with creating(to) as folder:
        write_exported(folder, saved.tensors(), describe(saved, report_of(saved.path, saved.step)))
        load_saved(find_saved(str(folder)), torch.device("cpu"), "fp32")  # check that the new folder loads
    description = read_description(to)
    digest = description["weights_sha256"]
    console.print(f"{to}: {saved.path}, weights {digest[:12]}; add a licence to its model card, {to / CARD}")
    if part := unsupported(description["model"]):
        console.print(f"transformers cannot load this model: {part}; use ProteinDiffusion (protlig_dd.hub)")


def report_of(checkpoint: Path, step: int) -> dict[str, Any] | None:
    """Return the run's report on this checkpoint, without samples, judges and paths; None if it does not exist."""
    run = run_folder(checkpoint)
    file = None if run is None else run / "report.json"
    report = read_json(file) if file is not None and file.is_file() else {}
    if report.get("step") != step:
        return None
    if isinstance(leaks := report.get("in_training"), dict):  # leave out paths on this machine
        report["in_training"] = {key: leaks.get(key) for key in ("copies", "others")}
    return {key: value for key, value in report.items() if key not in ("samples", "shown", "judges", "verdicts")}


def main() -> None:
    """The command line."""
    run_verb(export, "export", ExportConfig, rank0_only=True)


if __name__ == "__main__":
    main()
