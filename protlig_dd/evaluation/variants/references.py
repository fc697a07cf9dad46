"""ProteinGym's reference file: the assays of a folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protlig_dd.evaluation.variants.assays import read_csv
from protlig_dd.evaluation.variants.mutants import AS_THE_TARGET, Numbering, encode

REFERENCE = ("DMS_id", "target_seq")
BREAKDOWNS = ("MSA_Neff_L_category", "taxon")  # of a reference file, where it has them


class Reference(NamedTuple):
    """One assay of a benchmark."""

    id: str
    path: Path
    target: np.ndarray
    protein: str
    """UniProt_ID."""
    type: str
    """coarse_selection_type."""
    more: dict[str, str]
    """Those of BREAKDOWNS that the file has."""
    numbering: Numbering = AS_THE_TARGET


def read_reference(path: Path, folder: Path) -> list[Reference]:
    """The assays whose files lie in the folder, as ProteinGym's reference file describes them.

    Raises:
        ValueError: a missing column, an assay that is there twice, a CSV file of the folder that is not in the
            reference, a folder without any, an illegal letter of a target; named.
    """
    files = {
        file.name for file in folder.glob("*.csv") if file.name[0] != "." and file.resolve() != path.resolve()
    }  # macOS leaves ._A.csv beside A.csv
    header, lines = read_csv(path)
    missing = [name for name in REFERENCE if name not in header]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]}; there are {', '.join(header)}")
    found: dict[str, Reference] = {}
    for where, row in lines:
        cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
        name, file = cells["DMS_id"], cells.get("DMS_filename") or f"{cells['DMS_id']}.csv"
        if file not in files:
            continue
        if not name or Path(name).name != name:
            raise ValueError(f"{where}: DMS_id {name!r} cannot name a file")
        if file in found or name in {reference.id for reference in found.values()}:
            raise ValueError(f"{where}: {name} is there twice")
        target = encode(cells["target_seq"].upper(), f"{where}, target_seq")
        more = {key: cells[key].capitalize() for key in BREAKDOWNS if cells.get(key)}
        # clinical files name neither: each assay is a protein of its own
        protein, kind = cells.get("UniProt_ID") or name, cells.get("coarse_selection_type") or "Clinical"
        numbering = numbering_of(cells, where, path)
        found[file] = Reference(name, folder / file, target, protein, kind, more, numbering)
    if not files:
        raise ValueError(f"{folder}: no CSV files in it")
    if unknown := sorted(files - found.keys()):
        raise ValueError(f"{folder / unknown[0]} is not in {path}")
    return list(found.values())


def numbering_of(cells: Mapping[str, str], where: str, path: Path) -> Numbering:
    """What a reference file says of the positions in an assay's `mutant`.

    ProteinGym numbers its assays as their target_seq. Its script for ESM reads a column start_idx, which its own files
    do not have: the number of the target's first residue. Their column raw_mut_offset is of the files that the assays
    were made from, whose positions are smaller by so many, and only explains letters that do not fit.
    """
    start, raw = cells.get("start_idx", ""), cells.get("raw_mut_offset", "")
    if start:
        try:
            offset = float(start) - 1  # spreadsheets write 101.0 where other rows have none
        except ValueError:
            offset = math.nan
        if not offset.is_integer():
            raise ValueError(f"{where}: start_idx is a whole number, got {start!r}")
        return Numbering(int(offset), f", as start_idx={start} in {path} says")
    if raw:
        return Numbering(0, f"; raw_mut_offset={raw} in {path} is of the raw file: if this is it, offset=-{raw}")
    return AS_THE_TARGET
