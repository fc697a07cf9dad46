"""Download a model from the Hugging Face Hub, and check the name of a model."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def download(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download files of a model on the hub, and return their folder in the hub's cache.

    The folder is named after the commit. Without a network, files that are in the cache already are used.

    Args:
        name: the model's name on the hub, owner/name.
        revision: branch, tag or commit; None for the default branch.
        patterns: names of the files, with `*` for any text.

    Raises:
        ValueError: `name` is neither a local folder nor a model that can be downloaded; the message has the reason and
            what to do.
    """
    check_not_a_path(name)
    try:
        hub = hugging_face()
    except ValueError as error:
        raise ValueError(f"{name} is not a local folder, and {error}") from error
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except hub.errors.GatedRepoError as error:
        reason = f"https://huggingface.co/{name} is gated: accept its terms on this page, then run `hf auth login`"
        raise ValueError(f"{name} is not a local folder, and cannot be downloaded: {reason}") from error
    except hub.errors.RevisionNotFoundError as error:
        raise ValueError(
            f"{name} has no revision {revision!r} on the hub; revision= takes a branch, tag or commit"
        ) from error
    except hub.errors.LocalEntryNotFoundError as error:
        raise ValueError(
            f"{name} is not a local folder, and the hub cannot be reached; on a machine with a network, run "
            f"`hf download {name} --local-dir FOLDER`, then copy FOLDER to this machine and give its path (a gated "
            "model also needs `hf auth login`)"
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name} is not a local folder, and was not found on the hub: {reason}") from error


def check_not_a_path(name: str) -> None:
    """Raise a ValueError if `name` is a path of this machine, or cannot name a model on the hub (owner/name)."""
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file; give the folder that contains it")
    if path.is_absolute() or name.startswith((".", "~")) or (len(path.parts) > 1 and Path(path.parts[0]).is_dir()):
        raise ValueError(f"{name}: no such folder")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ValueError(f"{name!r} is neither a local folder nor the name of a model on the hub, owner/name")


def check_name(hub: Any, name: str) -> None:
    """Raise a ValueError unless a model on the hub could have this name.

    Args:
        hub: the module that `hugging_face` returns.
    """
    try:
        hub.utils.validate_repo_id(name)
    except hub.errors.HFValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{name!r:.100} cannot be the name of a model on the hub, owner/name: {reason}") from error
    if "/" not in name:
        raise ValueError(f"{name!r} lacks the owner: give the name of a model on the hub as owner/name")


def hugging_face() -> Any:
    """Import and return huggingface_hub, which is an optional package."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise ValueError("huggingface_hub is not installed: pip install 'protlig_dd[hub]'") from error
    return huggingface_hub
