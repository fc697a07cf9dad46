"""Encode a block of FASTA records as tokens.

Whole sequences are translated at once. Slower checks follow only if letters are lower-case or not in the alphabet.
"""

import itertools
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.lib.stride_tricks import sliding_window_view

from protlig_dd.data.fasta import WHITESPACE, FastaBlock
from protlig_dd.tokenizer import AMINO_ACIDS, BOS, CONTEXT_LETTERS, EOS, LETTERS, VOCAB_SIZE

LOWER = 64  # added to the token id of a lower-case letter
# The code of a byte is the token id of its letter (plus LOWER for lower case), or _STOP (for `*`), or _ILLEGAL.
_STOP, _ILLEGAL = 128, 129
_CODES = bytearray([_ILLEGAL]) * 256
for _id, _letter in enumerate(LETTERS):
    if _letter != "_":
        _CODES[ord(_letter)], _CODES[ord(_letter.lower())] = _id, _id | LOWER
_CODES[ord("*")] = _STOP
_TABLE = bytes(_CODES)
_FOLD = bytes(code & ~LOWER for code in range(256))

_BASES = bytes(LETTERS.index(letter) for letter in "ACGTUN")
_IS_BASE = np.isin(np.arange(VOCAB_SIZE), list(_BASES))
FEWEST_BASES = 20  # minimum length for is_nucleotide: shorter proteins may consist of these letters by chance

# Never change these seeds: all hashed splits depend on ID_SEED.
ID_SEED, SEQUENCE_SEED = 0x70726F746C6967, 0x64647365646464


class EncodedBlock(NamedTuple):
    sequences: list[bytes]
    """The residue tokens of each of the n sequences."""
    tokens: np.ndarray
    """(total,) uint8: every sequence as `<bos> residues <eos>`."""
    lengths: np.ndarray
    """(n,) int64: tokens of each sequence, including `<bos>` and `<eos>`."""
    id_hashes: np.ndarray
    """(n,) uint64, see `hash_ids`."""
    lower_case: int
    """Number of lower-case letters. They were encoded like upper-case letters."""
    nucleotides: int
    """Number of records that look like DNA or RNA."""
    is_lower: np.ndarray | None = None
    """(total,) bool: which tokens were lower-case letters; None if no letter of the block was lower-case."""

    def select(self, keep: np.ndarray) -> "EncodedBlock":
        """Return the records for which `keep` (n,) is True.

        The counts `lower_case` and `nucleotides` remain those of the whole block.
        """
        if keep.all():
            return self
        sequences = list(itertools.compress(self.sequences, keep.tolist()))
        selected = np.repeat(keep, self.lengths)
        is_lower = None if self.is_lower is None else self.is_lower[selected]
        return self._replace(
            sequences=sequences,
            tokens=self.tokens[selected],
            lengths=self.lengths[keep],
            id_hashes=self.id_hashes[keep],
            is_lower=is_lower,
        )

    def sequence_hashes(self) -> np.ndarray:
        """Return the 128-bit XXH3 of each sequence, with the seed SEQUENCE_SEED: (n, 2) uint64, the high half first."""
        digest = xxhash.xxh3_128_digest
        digests = b"".join([digest(sequence, SEQUENCE_SEED) for sequence in self.sequences])
        return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def encode_block(block: FastaBlock) -> EncodedBlock:
    """Encode a block's records. White space and one trailing `*` per record are dropped.

    Lower-case letters get the tokens of upper-case letters; `is_lower` records which letters were lower-case.

    Raises:
        ValueError: a record has no residues, or contains a character that is not a letter. The message names the file,
            the record, the line and the position of the character.
    """
    sequences, lower_case, is_lower = [body.translate(_TABLE, WHITESPACE) for body in block.bodies], 0, None
    tokens = _joined(sequences)
    if tokens.max() >= LOWER:
        sequences = [sequence.removesuffix(bytes([_STOP])) for sequence in sequences]
        tokens = _joined(sequences)
        if tokens.max() >= _STOP:
            _raise_for_bad_record(block)
        is_lower = tokens >= LOWER
        lower_case = int(is_lower.sum())
        sequences, tokens = [sequence.translate(_FOLD) for sequence in sequences], tokens & ~np.uint8(LOWER)
    if not all(sequences):
        raise ValueError(f"{block.location(sequences.index(b''))}: no residues")
    lengths = np.fromiter(map(len, sequences), np.int64, len(sequences)) + 2
    nucleotides = sum(is_nucleotide(sequences[i]) for i in _perhaps_nucleotides(tokens, lengths).tolist())
    return EncodedBlock(
        sequences, tokens, lengths, hash_ids(block.ids), lower_case, nucleotides, is_lower if lower_case else None
    )


def hash_ids(ids: list[bytes]) -> np.ndarray:
    """Return the 64-bit XXH3 of each id's UTF-8 bytes, with the seed ID_SEED: (n,) uint64."""
    digest = xxhash.xxh3_64_digest
    return np.frombuffer(b"".join([digest(id_, ID_SEED) for id_ in ids]), ">u8").astype(np.uint64)


def _perhaps_nucleotides(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the rows of the sequences for which is_nucleotide may be True. They include few proteins.

    If the first 100 residues have at most 10 residues that are not bases, so have the first FEWEST_BASES residues.

    Args:
        tokens: (total,) every sequence as `<bos> residues <eos>`.
        lengths: (n,) tokens of each sequence.
    """
    rows = np.flatnonzero(lengths >= FEWEST_BASES + 2)
    if not len(rows):
        return rows
    first_residues = (np.cumsum(lengths) - lengths + 1)[rows]
    is_base = _IS_BASE[sliding_window_view(tokens, FEWEST_BASES)[first_residues]]
    return rows[is_base.sum(1) >= FEWEST_BASES - 10]


def is_nucleotide(tokens: bytes) -> bool:
    """Whether a sequence looks like DNA or RNA: at least 90% of its first 100 residues are A, C, G, T, U or N.

    The result is False for sequences shorter than FEWEST_BASES. It is True for only a few real proteins.
    """
    start = tokens[:100]
    return len(start) >= FEWEST_BASES and 10 * len(start.translate(None, _BASES)) <= len(start)


def nucleotide_warning(found: int, records: int, name: str) -> str:
    """Return the warning that `found` of `records` sequences look like DNA or RNA."""
    return f"warning: {found:,} of {records:,} sequences of {name} look like DNA or RNA, and were read as proteins"


def _joined(sequences: list[bytes]) -> np.ndarray:
    """Concatenate the sequences, each as `<bos> residues <eos>`."""
    return np.frombuffer(bytes([EOS, BOS]).join([b"", *sequences, b""]), np.uint8)[1:-1]


def _raise_for_bad_record(block: FastaBlock) -> None:
    """Raise ValueError for the first record of a block that has no residues or has an illegal character."""
    for i, body in enumerate(block.bodies):
        residues = body.translate(None, WHITESPACE).removesuffix(b"*")
        if not residues:
            raise ValueError(f"{block.location(i)}: no residues")
        for position, byte in enumerate(residues, start=1):
            if _CODES[byte] >= _STOP:
                shown = repr(chr(byte)) if byte < 128 else f"byte {byte:#04x}"
                raise ValueError(
                    f"{block.location(i, position)}: illegal character {shown} at position {position} of "
                    f"{len(residues)}; allowed are the letters {AMINO_ACIDS + CONTEXT_LETTERS}"
                )
