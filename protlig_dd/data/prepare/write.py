"""Write a store from a spool."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from protlig_dd.data.datasets import write_datasets, write_manifest
from protlig_dd.data.prepare.case import FOLD, kept_case
from protlig_dd.data.prepare.counts import Rows, count_rows
from protlig_dd.data.prepare.spool import Spool, offsets_of, piece_bounds, select_rows
from protlig_dd.data.store import COLUMNS, FORMAT_VERSION, SPLITS, fingerprint_of
from protlig_dd.system.workers import Workers
from protlig_dd.tokenizer import LETTERS, VOCAB_SIZE

LENGTH_BIN = 50


def write_store(
    path: Path,
    spool: Spool,
    keep: np.ndarray,
    splits: np.ndarray,
    source: dict[str, Any],
    workers: Workers,
    on_bytes: Callable[[int], None],
) -> None:
    """Write a store of the kept rows.

    If no row is dropped, and no letter is lower-case, the spool's file of tokens becomes the store. Tokens are then
    written only once.

    The manifest is `source` plus statistics of the splits. If the store keeps the case of letters, the manifest also
    has statistics of upper-case and lower-case letters.
    """
    lengths, header_lengths = spool.load("length"), spool.load("header_length")
    token_counts = np.zeros((len(SPLITS), VOCAB_SIZE), dtype=np.int64)

    has_lower_case = spool.size("case_row") > 0
    case = kept_case(spool, lengths, keep) if has_lower_case else None

    groups = np.where(keep, splits, np.uint8(len(SPLITS)))  # the tokens of dropped rows are counted in the last group

    def rows() -> Iterator[Rows]:
        for first, end, start, _ in piece_bounds(lengths):
            yield Rows(spool.path("tokens"), spool.starts["tokens"] + start, lengths[first:end], groups[first:end])

    def tokens() -> Iterator[np.ndarray]:
        # no workers are running if the input was small
        counts = (workers.map if workers.started else map)(partial(count_rows, len(SPLITS) + 1), rows())
        for first, end, block in spool.pieces("tokens", lengths):
            if case is not None:
                case.count(first, end, block, groups[first:end])
            if has_lower_case:
                block &= FOLD
            token_counts[:] += next(counts)[: len(SPLITS)]
            on_bytes(len(block))
            yield select_rows(block, lengths[first:end], keep[first:end])

    def headers() -> Iterator[np.ndarray]:
        for first, end, block in spool.pieces("headers", header_lengths):
            on_bytes(len(block))
            yield select_rows(block, header_lengths[first:end], keep[first:end])

    n, in_place = int(keep.sum()), bool(keep.all()) and not has_lower_case
    file = spool.path("tokens") if in_place else path
    totals = [int(column.sum(where=keep, dtype=np.int64)) for column in (lengths, header_lengths)]
    write_columns(
        file,
        {
            "tokens": (totals[0], tokens()),
            "offsets": (n + 1, offsets_of(lengths, keep)),
            "headers": (totals[1], headers()),
            "header_offsets": (n + 1, offsets_of(header_lengths, keep)),
            "split": (n, [splits[keep]]),
            "token_counts": (token_counts.size, [token_counts.reshape(-1)]),
            **(case.columns() if case is not None else {}),
        },
        lambda: (
            source
            | {"splits": _describe_splits(lengths, keep, splits, token_counts), "length_bin": LENGTH_BIN}
            | (case.describe() if case is not None else {})
        ),
        present="tokens" if in_place else None,
    )
    file.replace(path)


def write_columns(
    path: Path,
    columns: dict[str, tuple[int, Iterable[np.ndarray]]],
    manifest: Callable[[], dict[str, Any]],
    *,
    present: str | None = None,
) -> None:
    """Write a store's datasets.

    Args:
        columns: {name: (size, consecutive blocks of values)} of every dataset except the manifest. Datasets are
            written in this order.
        manifest: returns the manifest; called after the columns have been written.
        present: the first dataset, if the file already has its values (see `write_datasets`).
    """

    def finish(file: h5py.File, checksums: dict[str, str]) -> None:
        write_manifest(file, manifest())
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["alphabet"] = np.bytes_(LETTERS)
        file.attrs["fingerprint"] = np.bytes_(fingerprint_of(checksums))

    write_datasets(
        path,
        {name: (COLUMNS[name], size, blocks) for name, (size, blocks) in columns.items()},
        finish,
        present=present,
    )


def _describe_splits(
    lengths: np.ndarray, keep: np.ndarray, splits: np.ndarray, token_counts: np.ndarray
) -> dict[str, Any]:
    """Return each split's numbers of sequences, residues and letters, and its histogram of lengths.

    Each bin of the histogram is LENGTH_BIN residues wide.
    """
    described = {}
    for code, name in enumerate(SPLITS):
        residues = lengths[keep & (splits == code)] - 2
        described[name] = {
            "sequences": len(residues),
            "residues": int(residues.sum(dtype=np.int64)),
            "letters": {
                x: int(c) for x, c in zip(LETTERS, token_counts[code, : len(LETTERS)], strict=True) if x != "_"
            },
            "lengths": np.bincount(residues // LENGTH_BIN).tolist(),
        }
    return described
