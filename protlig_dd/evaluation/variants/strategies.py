"""Strategies for scoring variants, and the choice of a strategy for each variant of an assay."""

from collections.abc import Sequence

import numpy as np

from protlig_dd.diffusion.graphs.base import Graph
from protlig_dd.evaluation.variants.assays import Assay

REQUESTED = "as requested"  # the reason that is printed if the user set strategy=
UNMASKED = ("wildtype_marginals", "ratio")  # the network reads the unmasked wild type
ONE_BY_ONE = (*UNMASKED, "site_marginals")  # each site is scored separately


def strategies_of(graph: Graph) -> tuple[str, ...]:
    """Return the strategies available for a graph; the first is the default for substitutions."""
    if graph.masks:
        return ("masked_marginals", "site_marginals", "wildtype_marginals", "bound")
    return ("ratio", "bound")


def choose_strategies(requested: str, graph: Graph, assay: Assay) -> tuple[list[str], str]:
    """Return the strategy of each variant, and the reason for the choice.

    `auto` scores substitutions by the graph's default strategy, and insertions and deletions by the bound.

    Raises:
        ValueError: the graph does not support the strategy, or the strategy cannot score the insertions and deletions
            of the assay.
    """
    available, first = strategies_of(graph), assay.first_indel
    if requested not in ("auto", *available):
        raise ValueError(
            f"strategy={requested} is not available for graph={graph.name}; choose from auto, {', '.join(available)}"
        )
    if requested == "auto":
        why = f"the graph is {graph.name}" if first is None else "there are insertions or deletions"
        return [available[0] if variant.indel is None else "bound" for variant in assay.variants], why
    if first is not None and requested != "bound":
        indel = assay.variants[first].indel
        assert indel is not None
        raise ValueError(
            f"{assay.where[first]}: {len(indel.ids)} residues replace {indel.stop - indel.start}, "
            f"but strategy={requested} scores substitutions only; use auto or bound"
        )
    return [requested] * len(assay.variants), REQUESTED


def rows_by_strategy(strategies: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the row indices of each strategy, with strategies in order of first appearance."""
    return {name: np.flatnonzero(np.array(strategies) == name) for name in dict.fromkeys(strategies)}
