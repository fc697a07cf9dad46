"""Find the context residues of evaluated proteins. Context residues are given to the model and not scored."""

from protlig_dd.data.case import Context, context_tokens, has_only_context, nothing_to_design, targets_of
from protlig_dd.data.crops import designed_crops, window
from protlig_dd.evaluation.inputs import Proteins
from protlig_dd.evaluation.likelihood.scoring import Given
from protlig_dd.inference.model import TrainedModel
from protlig_dd.system.terminal import announce


def resolve_context(requested: str, trained: TrainedModel, proteins: Proteins, path: str) -> Context:
    """Return which letters of the proteins mark context residues: none, lower-case letters or upper-case letters.

    Args:
        requested: none, lower, upper or auto. If the model was trained with context and a protein has both upper-case
            and lower-case letters, `auto` is the context of the training. Otherwise `auto` is none. If the model was
            trained with context, a message reports the result of `auto`.
        path: file of the proteins, for messages.

    Raises:
        ValueError: lower or upper is requested, but no protein has both upper-case and lower-case letters.
    """
    if requested == "auto":
        if trained.context == "none":
            return "none"
        if proteins.has_case:
            announce(f"the {trained.context}-case residues are given, as in training (context=auto)", trained.processes)
            return trained.context
        announce(
            f"warning: the model was trained with data.context={trained.context}, but {path} has no record with both "
            "upper-case and lower-case letters: all residues are scored",
            trained.processes,
        )
        return "none"
    context: Context = "lower" if requested == "lower" else "upper" if requested == "upper" else "none"
    if context != "none" and not proteins.has_case:
        kept = (
            "does not keep the case of letters; prepare it again from FASTA records"
            if proteins.store is not None
            else "has no record"
        )
        raise ValueError(f"context={context}: {path} {kept} with both upper-case and lower-case letters")
    return context


def message_of_crops(cropped: int, max_len: int, context: Context, models: str = "this model was") -> str:
    """Return a message that reports how many proteins are cropped, and how.

    Args:
        models: the subject and the auxiliary verb of `this model was trained on`.
    """
    message = f"{cropped} proteins have more than {max_len} residues, the maximum length that {models} trained on"
    first = f"only the first {max_len} residues of each are scored"
    most = f"each is cropped to the {max_len} consecutive residues with the largest number of residues to score"
    return f"{message}: {first if context == 'none' else most}"


def given_proteins(proteins: Proteins, context: Context, max_len: int) -> list[Given]:
    """Return the proteins to score, cropped to at most max_len residues.

    Designed residues are residues that are not context. Of the crops with the most designed residues, the first is
    used. Without context, this crop is the first max_len residues.

    Raises:
        ValueError: all amino acids of a protein are context; the message names the protein.
    """
    given = []
    for id_, tokens, lower in zip(proteins.ids, proteins.sequences, proteins.lower_case, strict=True):
        residues = len(tokens) - 2
        is_context = context_tokens(lower, residues, context)
        if is_context is not None and has_only_context(tokens, is_context):
            raise ValueError(nothing_to_design(f"record {id_}", context))
        start = 0
        if is_context is not None and residues > max_len:
            start = int(designed_crops(targets_of(tokens, is_context), max_len, first=True)[0])
        cropped = None if is_context is None else window(is_context, start, max_len)
        given.append(Given(window(tokens, start, max_len), cropped))
    return given
