"""Protein language models trained by score-entropy discrete diffusion (SEDD, arXiv 2310.16834)."""

import os
import sys
from types import TracebackType


def _report_missing_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line for a missing package, and the usual traceback for any other error, such as a missing module of an
    installed package. HYDRA_FULL_ERROR=1 always prints the traceback.
    """
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is None or "." in missing or os.environ.get("HYDRA_FULL_ERROR") == "1":
        sys.__excepthook__(kind, error, trace)
        return
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    advice = "pip install the wheel again, with its dependencies"
    if (root / "scripts/setup.sh").is_file():
        advice = f"run scripts/setup.sh in {root}, then .venv/bin/python there (or: pip install -e {root})"
    print(f"error: {missing} is not installed for {sys.executable}: {advice}", file=sys.stderr)


if sys.argv[:1] == ["-m"] and any(argument.startswith("protlig_dd.") for argument in sys.orig_argv):
    sys.excepthook = _report_missing_package  # set before a verb's imports, which run before its main()

if os.environ.get("PROTLIG_TYPECHECK") == "1":
    # Install the run-time type checks before any submodule is imported. Spawned ranks and commands install them too.
    from protlig_dd.system.typecheck import install

    install("protlig_dd")

__version__ = "0.1.0"
