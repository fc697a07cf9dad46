"""How variants can be scored, and which way suits a model and an assay."""

from collections.abc import Sequence

import numpy as np

from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.evaluation.variants.assays import Assay

ASKED_FOR = "as asked for"  # why a strategy was chosen
UNMASKED = ("wildtype_marginals", "ratio")  # strategies that see nothing but the wild type
ONE_BY_ONE = (*UNMASKED, "site_marginals")  # and that look at each site by itself


def strategies_of(graph: Graph) -> tuple[str, ...]:
    """The strategies that a graph has; the first is the one for substitutions."""
    if graph.masks:
        return ("masked_marginals", "site_marginals", "wildtype_marginals", "bound")
    return ("ratio", "bound")


def choose_strategies(wanted: str, graph: Graph, assay: Assay) -> tuple[list[str], str]:
    """The strategy of each variant, and why: `auto` is each one's own, insertions and deletions by bound.

    Raises:
        ValueError: one that this graph does not have, or that has no place for insertions and deletions; says which do.
    """
    able, first = strategies_of(graph), assay.first_indel
    if wanted not in ("auto", *able):
        raise ValueError(f"strategy={wanted}: a model with this graph ({graph.name}) can do {', '.join(able)}")
    if wanted == "auto":
        why = f"the graph is {graph.name}" if first is None else "there are insertions or deletions"
        return [able[0] if one.indel is None else "bound" for one in assay.variants], why
    if first is not None and wanted != "bound":
        indel = assay.variants[first].indel
        assert indel is not None
        raise ValueError(
            f"{assay.where[first]}: {len(indel.ids)} residues stand in the place of {indel.stop - indel.start}, "
            f"but strategy={wanted} needs equal lengths; use auto, or bound"
        )
    return [wanted] * len(assay.variants), ASKED_FOR


def rows_by_strategy(strategies: Sequence[str]) -> dict[str, np.ndarray]:
    """Of each strategy the rows that have it, (rows,); the one of the first row first."""
    return {name: np.flatnonzero(np.array(strategies) == name) for name in dict.fromkeys(strategies)}
