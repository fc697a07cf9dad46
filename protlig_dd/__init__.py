"""Protein language models by score-entropy discrete diffusion (SEDD, arXiv 2310.16834)."""

import os

if os.environ.get("PROTLIG_TYPECHECK") == "1":
    # Installed here, before any submodule is imported, so that spawned ranks and command lines are checked too.
    from protlig_dd.runtime.typecheck import install

    install("protlig_dd")

__version__ = "0.1.0"
