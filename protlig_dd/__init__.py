"""Protein language models by score-entropy discrete diffusion (SEDD, arXiv 2310.16834)."""

import os
import sys
from types import TracebackType


def _say_how_to_install(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line for a package that is not installed; the traceback of all else (a module that a package lacks, say),
    and with HYDRA_FULL_ERROR=1.
    """
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is None or "." in missing or os.environ.get("HYDRA_FULL_ERROR") == "1":
        sys.__excepthook__(kind, error, trace)
        return
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    told = "pip install the wheel again, with what it needs"
    if (root / "scripts/setup.sh").is_file():
        told = f"run scripts/setup.sh in {root}, then .venv/bin/python there (or: pip install -e {root})"
    print(f"error: {missing} is not installed for {sys.executable}: {told}", file=sys.stderr)


if sys.argv[:1] == ["-m"] and any(one.startswith("protlig_dd.") for one in sys.orig_argv):
    sys.excepthook = _say_how_to_install  # python -m protlig_dd.VERB, whose imports come before its main

if os.environ.get("PROTLIG_TYPECHECK") == "1":
    # Installed here, before any submodule is imported, so that spawned ranks and command lines are checked too.
    from protlig_dd.system.typecheck import install

    install("protlig_dd")

__version__ = "0.1.0"
