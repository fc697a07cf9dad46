"""ProteinGym's reference file, which describes the assays of a folder."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from protlig_dd.evaluation.variants.assays import read_csv
from protlig_dd.evaluation.variants.mutants import AS_THE_TARGET, Numbering, encode

REFERENCE = ("DMS_id", "target_seq")
BREAKDOWNS = (
    "MSA_Neff_L_category",
    "taxon",
)  # optional columns; results are also averaged over the assays with the same value in such a column


class Reference(NamedTuple):
    """One assay of a benchmark."""

    id: str
    path: Path
    target: np.ndarray
    protein: str
    """The column UniProt_ID; DMS_id if it is empty or missing."""
    type: str
    """The column coarse_selection_type; `Clinical` if it is empty or missing."""
    more: dict[str, str]
    """Values of the BREAKDOWNS columns that are not empty, by column name."""
    numbering: Numbering = AS_THE_TARGET


def read_reference(path: Path, folder: Path) -> list[Reference]:
    """Return the assays of ProteinGym's reference file (`path`) whose CSV files are in the folder.

    Raises:
        ValueError: the reference file lacks a column, lists an assay twice, has an invalid DMS_id, or has no row for a
            CSV file of the folder; the folder has no CSV files; or a target has an illegal letter.
    """
    files = {
        file.name for file in folder.glob("*.csv") if file.name[0] != "." and file.resolve() != path.resolve()
    }  # hidden files are skipped, because macOS leaves ._A.csv beside A.csv
    header, lines = read_csv(path)
    missing = [name for name in REFERENCE if name not in header]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]}; its columns are {', '.join(header)}")
    found: dict[str, Reference] = {}
    for where, row in lines:
        cells = dict(zip(header, (cell.strip() for cell in row), strict=True))
        name, file = cells["DMS_id"], cells.get("DMS_filename") or f"{cells['DMS_id']}.csv"
        if file not in files:
            continue
        if not name or Path(name).name != name:
            raise ValueError(f"{where}: DMS_id {name!r} is not a valid file name")
        if file in found or name in {reference.id for reference in found.values()}:
            raise ValueError(f"{where}: DMS_id {name} occurs twice")
        target = encode(cells["target_seq"].upper(), f"{where}, target_seq")
        more = {key: cells[key].capitalize() for key in BREAKDOWNS if cells.get(key)}
        # clinical reference files have neither UniProt_ID nor coarse_selection_type: each assay is a separate protein
        protein, kind = cells.get("UniProt_ID") or name, cells.get("coarse_selection_type") or "Clinical"
        numbering = numbering_of(cells, where, path)
        found[file] = Reference(name, folder / file, target, protein, kind, more, numbering)
    if not files:
        raise ValueError(f"{folder}: no CSV files in this folder")
    if unknown := sorted(files - found.keys()):
        raise ValueError(f"{folder / unknown[0]}: no row in the reference file {path}")
    return list(found.values())


def numbering_of(cells: Mapping[str, str], where: str, path: Path) -> Numbering:
    """Return how the reference file numbers the positions in an assay's `mutant` column.

    In ProteinGym's assays position 1 is the first residue of target_seq. A reference file may have a column start_idx:
    the position of the target's first residue. The published files do not have it, but ProteinGym's ESM script reads
    it, and so does this function. The column raw_mut_offset is about the raw files from which ProteinGym made its
    assays: position p of an assay is position p - raw_mut_offset of its raw file. This function does not apply
    raw_mut_offset, but error messages about a position mention it.
    """
    start, raw = cells.get("start_idx", ""), cells.get("raw_mut_offset", "")
    if start:
        try:
            offset = float(start) - 1  # spreadsheets write 101 as 101.0 if another row is empty
        except ValueError:
            offset = math.nan
        if not offset.is_integer():
            raise ValueError(f"{where}: start_idx must be a whole number, got {start!r}")
        return Numbering(int(offset), f", from start_idx={start} in {path}")
    if raw:
        raw_file = f"raw_mut_offset={raw} in {path} applies to the raw file only"
        return Numbering(0, f"; {raw_file}; to score the raw file, set offset to minus this number")
    return AS_THE_TARGET
