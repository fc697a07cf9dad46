"""Protein language models by score-entropy discrete diffusion (SEDD, arXiv 2310.16834)."""

import os

if os.environ.get("PROTLIG_TYPECHECK") == "1":
    # Installed here, before any submodule is imported, so that spawned ranks and command lines are checked too.
    import warnings

    from beartype.roar import BeartypeDecorHintPep585DeprecationWarning
    from jaxtyping import install_import_hook

    warnings.filterwarnings("ignore", category=BeartypeDecorHintPep585DeprecationWarning)  # omegaconf's own hints
    install_import_hook("protlig_dd", "beartype.beartype")

__version__ = "0.1.0"
