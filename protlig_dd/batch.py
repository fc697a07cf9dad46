"""PackedBatch: sequences concatenated without padding.

Three sequences of 5, 6 and 4 tokens make one batch of 15:

    tokens       a a a a a b b b b b b c c c c        (total,) = (15,)
    segment_ids  0 0 0 0 0 1 1 1 1 1 1 2 2 2 2
    positions    0 1 2 3 4 0 1 2 3 4 5 0 1 2 3
    cu_seqlens   0         5           11      15     (n + 1,) = (4,)
    lengths      (5, 6, 4)       max_seqlen 6
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float64, Int32, Int64, Num
from torch import Tensor

from protlig_dd.tokenizer import CONTEXT, PAD

TOKENS_PER_PACK = 16_384  # default of the commands that use a model (configs/sample.yaml and others)


class StaticShape(NamedTuple):
    """The fixed shape that packs are padded to: tokens, sequences, and the length of the longest sequence."""

    tokens: int
    sequences: int
    longest: int


def sequence_slots(tokens: int, mean_tokens: float) -> int:
    """Return how many sequences a padded pack of `tokens` tokens has room for: 1.5 times the expected number, plus 8.

    A pack with more sequences is computed without padding.

    Args:
        mean_tokens: mean number of tokens per sequence.
    """
    return 8 + round(1.5 * tokens / mean_tokens)


@dataclass(frozen=True)
class PackedBatch:
    """n sequences concatenated in one 1-D tensor, with the offsets and positions that attention needs.

    `rows` has the row of each sequence in the data store. `lengths`, `max_seqlen` and `rows` are on the host, so that
    no kernel launch has to wait for the device.

    Raises:
        ValueError: fields disagree in shape, dtype or device; the message names both values.
    """

    tokens: Int64[Tensor, " total"]
    cu_seqlens: Int32[Tensor, " n_plus_1"]
    max_seqlen: int
    lengths: tuple[int, ...]
    segment_ids: Int64[Tensor, " total"]
    positions: Int64[Tensor, " total"]
    rows: Int64[Tensor, " n"]
    context: Bool[Tensor, " total"] | None = None
    """True for context tokens. The network reads them, but they are never noised and not in the loss. The letters
    X B Z J U O are treated in the same way without being marked here. None: there are no context tokens."""

    def __post_init__(self) -> None:
        check_tokens(self.tokens)
        total, n = self.tokens.shape[0], len(self.lengths)
        # a padded pack ends with empty sequences
        n_empty = next((i for i, length in enumerate(reversed(self.lengths)) if length), n)
        check_not_empty(self.lengths[: n - n_empty])
        if sum(self.lengths) != total:
            raise ValueError(f"lengths sum to {sum(self.lengths)} but tokens has {total}")
        if max(self.lengths) > self.max_seqlen:
            raise ValueError(f"max_seqlen is {self.max_seqlen} but the longest sequence has {max(self.lengths)}")
        for name, tensor, shape, dtype in (
            ("cu_seqlens", self.cu_seqlens, (n + 1,), torch.int32),
            ("segment_ids", self.segment_ids, (total,), torch.int64),
            ("positions", self.positions, (total,), torch.int64),
            ("rows", self.rows, (n,), torch.int64),
        ):
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"{name} must be {shape} {dtype}, got {tuple(tensor.shape)} {tensor.dtype} "
                    f"({n} sequences, {total} tokens)"
                )
            if name != "rows" and tensor.device != self.tokens.device:
                raise ValueError(f"{name} is on {tensor.device} but tokens is on {self.tokens.device}")
        if self.context is not None:
            check_context(self.context, self.tokens)

    @classmethod
    def pack(
        cls,
        sequences: Sequence[Tensor],
        rows: Sequence[int] | None = None,
        context: Bool[Tensor, " total"] | None = None,
    ) -> "PackedBatch":
        """Return a pack of 1-D integer tensors, one for each sequence.

        Args:
            sequences: n tensors of shape (length_i,), any integer dtype.
            rows: the row of each sequence in the data store; -1 for all sequences by default.
            context: whether each token is context; None: no token is.
        """
        if not sequences:
            raise ValueError("a pack needs at least one sequence")
        for i, sequence in enumerate(sequences):
            if sequence.ndim != 1:
                raise ValueError(f"sequence {i} of a pack must be 1-D, got shape {tuple(sequence.shape)}")
        flat = torch.cat([sequence.to(torch.int64) for sequence in sequences])
        return cls.from_flat(flat, [len(sequence) for sequence in sequences], rows, context)

    @classmethod
    def from_flat(
        cls,
        flat: Tensor,
        lengths: Sequence[int],
        rows: Sequence[int] | None = None,
        context: Bool[Tensor, " total"] | None = None,
    ) -> "PackedBatch":
        """Return a pack of sequences that are concatenated already: tokens (total,) of any integer dtype."""
        lengths = tuple(lengths)
        check_not_empty(lengths)
        if rows is not None and len(rows) != len(lengths):
            raise ValueError(f"{len(rows)} rows for {len(lengths)} sequences")
        # numpy's repeat takes a fifth of the time of torch's repeat_interleave
        length_n = np.array(lengths, np.int64)
        bounds = np.append(0, length_n.cumsum())
        geometry = {
            "cu_seqlens": bounds.astype(np.int32),
            "segment_ids": np.repeat(np.arange(len(lengths)), length_n),
            "positions": np.arange(bounds[-1]) - np.repeat(bounds[:-1], length_n),
        }
        return cls(
            tokens=flat.to(torch.int64),
            max_seqlen=max(lengths),
            lengths=lengths,
            rows=torch.tensor([-1] * len(lengths) if rows is None else [int(row) for row in rows]),
            context=context,
            **{name: torch.from_numpy(array).to(flat.device) for name, array in geometry.items()},
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle tokens as bytes, with lengths, rows and context, and rebuild the pack on the CPU.

        Otherwise a loader process would move each tensor to shared memory, which takes milliseconds.
        """
        tokens = self.tokens.numpy(force=True)
        ids = tokens.astype(np.uint8)
        if not np.array_equal(ids, tokens):
            raise ValueError("a pack with tokens outside 0..255 cannot be pickled")
        context = None if self.context is None else self.context.numpy(force=True)
        return PackedBatch._restore, (ids, self.lengths, self.rows.numpy(), context)

    @classmethod
    def _restore(
        cls, ids: np.ndarray, lengths: tuple[int, ...], rows: np.ndarray, context: np.ndarray | None
    ) -> "PackedBatch":
        context_T = None if context is None else torch.from_numpy(context)
        return cls.from_flat(torch.from_numpy(ids), lengths, rows.tolist(), context_T)

    @property
    def targets(self) -> Int64[Tensor, " total"]:
        """`tokens`, with X in place of each context token. Noise and loss read these targets, and skip X."""
        return self.tokens if self.context is None else torch.where(self.context, CONTEXT, self.tokens)

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Split any per-token tensor (total, ...) back into n tensors (length_i, ...)."""
        if x.shape[0] != len(self.tokens):
            raise ValueError(f"unpack needs {len(self.tokens)} tokens in the first dimension, got {x.shape[0]}")
        return list(x.split(list(self.lengths)))

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return the same batch with its per-token tensors on `device`; `rows` stays on the host."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("tokens", "cu_seqlens", "segment_ids", "positions", "context")
            if getattr(self, name) is not None
        }
        return replace(self, **moved)

    def pin_memory(self) -> "PackedBatch":
        """Return a copy in page-locked memory, which allows asynchronous copies to a GPU; a DataLoader calls this."""
        pinned = {
            name: getattr(self, name).pin_memory()
            for name in ("tokens", "cu_seqlens", "segment_ids", "positions", "context")
            if getattr(self, name) is not None
        }
        return replace(self, **pinned)

    def fits(self, shape: "StaticShape") -> bool:
        """Whether `padded_to` can pad the pack to this shape."""
        total, n = sum(self.lengths), len(self.lengths)
        tail = -(-(shape.tokens - total) // shape.longest)
        return total <= shape.tokens and n + tail <= shape.sequences and self.max_seqlen <= shape.longest

    def padded_to(self, shape: "StaticShape") -> "PackedBatch":
        """Append segments of <pad> up to shape.tokens tokens, and empty sequences up to shape.sequences.

        All padded packs have the same shapes, which compiled kernels and CUDA graphs need. The padding is computed on
        the pack's device, and the host does not wait for it. `context` is left out, as the network does not read it.

        Raises:
            ValueError: the pack is larger than the shape.
        """
        if not self.fits(shape):
            raise ValueError(
                f"a pack of {sum(self.lengths)} tokens in {len(self.lengths)} sequences of at most {self.max_seqlen} "
                f"does not fit into {shape.tokens} tokens in {shape.sequences} sequences of at most {shape.longest}"
            )
        total, n, device = sum(self.lengths), len(self.lengths), self.tokens.device
        missing, spare = shape.tokens - total, shape.sequences - n
        offset = torch.arange(missing, device=device)
        ends = (total + shape.longest * torch.arange(1, spare + 1, device=device)).clamp(max=shape.tokens)
        tails = [min(shape.longest, missing - start) for start in range(0, missing, shape.longest)]
        return PackedBatch(
            tokens=F.pad(self.tokens, (0, missing), value=PAD),
            cu_seqlens=torch.cat([self.cu_seqlens, ends.to(torch.int32)]),
            max_seqlen=shape.longest,
            lengths=(*self.lengths, *tails, *[0] * (spare - len(tails))),
            segment_ids=torch.cat([self.segment_ids, n + offset // shape.longest]),
            positions=torch.cat([self.positions, offset % shape.longest]),
            rows=F.pad(self.rows, (0, spare), value=-1),
        )

    def random_subset(
        self, candidates: Bool[Tensor, " total"], counts: Num[Tensor, " n"], u: Float64[Tensor, " total"]
    ) -> Bool[Tensor, " total"]:
        """Return (total,) bool: True for counts[i] candidates of each sequence i, chosen uniformly at random.

        The chosen candidates are those with the smallest u.

        Args:
            candidates: whether each token may be chosen.
            counts: how many to choose in each sequence, at most the number of its candidates.
            u: independent uniform draws on [0, 1).
        """
        # Sort the tokens by sequence. Within a sequence, candidates come first, in ascending order of u, and other
        # tokens after them. The random rank of a candidate is then its new position within its sequence.
        device = u.device
        segment = self.segment_ids.to(device)
        key = 2 * segment + torch.where(candidates.to(device), u, 1.5)
        rank = torch.empty_like(segment)
        rank[key.argsort()] = self.positions.to(device)
        return (rank < counts.to(device)[segment]).to(candidates.device) & candidates

    def with_tokens(self, tokens: Int64[Tensor, " total"]) -> "PackedBatch":
        """Return the same batch with other tokens, such as noised ones. Tokens marked in `context` are not replaced."""
        return replace(self, tokens=tokens if self.context is None else torch.where(self.context, self.tokens, tokens))

    def repeated(self, times: int) -> "PackedBatch":
        """Return a pack that contains the sequences of this pack `times` times. Its `rows` are -1."""
        context = None if self.context is None else self.context.repeat(times)
        return PackedBatch.from_flat(self.tokens.repeat(times), self.lengths * times, context=context)


def split_lengths(lengths: Sequence[int], tokens_per_pack: int) -> list[list[int]]:
    """Split lengths, in order, into packs of at most tokens_per_pack tokens. A longer sequence is a pack of its own.

    Args:
        lengths: number of residues of each sequence, without <bos> and <eos>, which count as tokens too.
    """
    packs: list[list[int]] = []
    room = 0
    for length in lengths:
        if length + 2 > room or not packs:
            packs.append([])
            room = tokens_per_pack
        packs[-1].append(length)
        room -= length + 2
    return packs


def check_not_empty(lengths: tuple[int, ...]) -> None:
    """Raise unless there is at least one sequence and each has at least one token."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a pack needs sequences of at least one token, got lengths {lengths}")


def check_context(context: Tensor, tokens: Tensor) -> None:
    """Raise unless `context` is one boolean per token, on the same device."""
    if context.shape != tokens.shape or context.dtype != torch.bool or context.device != tokens.device:
        raise ValueError(
            f"context must be {tuple(tokens.shape)} torch.bool on {tokens.device}, got {tuple(context.shape)} "
            f"{context.dtype} on {context.device}"
        )


def check_tokens(tokens: Tensor) -> None:
    """Raise unless `tokens` is what the model reads: 1-D int64."""
    if tokens.ndim != 1:
        raise ValueError(
            f"tokens must be packed into one dimension, (total,), got shape {tuple(tokens.shape)}; "
            "use PackedBatch.pack on a list of 1-D sequences"
        )
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be torch.int64, got {tokens.dtype}")
