"""A block of FASTA records as tokens: one pass of C over all of its letters, and a look at every oddity."""

import itertools
from typing import NamedTuple

import numpy as np
import xxhash

from protlig_dd.data.fasta import WHITESPACE, FastaBlock
from protlig_dd.tokenizer import AMINO_ACIDS, BOS, CONTEXT_LETTERS, EOS, LETTERS

# Codes of one byte on its way to a token: the token, with _LOWER added for a lower-case letter; or one of these.
_LOWER, _STOP, _ILLEGAL = 64, 128, 129
_CODES = bytearray([_ILLEGAL]) * 256
for _id, _letter in enumerate(LETTERS):
    if _letter != "_":
        _CODES[ord(_letter)], _CODES[ord(_letter.lower())] = _id, _id | _LOWER
_CODES[ord("*")] = _STOP
_TABLE = bytes(_CODES)
_FOLD = bytes(code & ~_LOWER for code in range(256))

_BASES = bytes(LETTERS.index(letter) for letter in "ACGTUN")
FEWEST_BASES = 20  # a shorter protein may well be so

# Never change these: the split of every sequence of every store follows from the first.
ID_SEED, SEQUENCE_SEED = 0x70726F746C6967, 0x64647365646464


class EncodedBlock(NamedTuple):
    sequences: list[bytes]
    """n times the tokens of the residues."""
    tokens: np.ndarray
    """(total,) uint8: every sequence as `<bos> residues <eos>`."""
    lengths: np.ndarray
    """(n,) int64: tokens of each, the two ends included."""
    id_hashes: np.ndarray
    """(n,) uint64: 64-bit XXH3 of the id's UTF-8 bytes, keyed by ID_SEED."""
    lower_case: int
    """Letters that were lower-case; they are tokens like their upper-case twins."""
    nucleotides: int
    """Records that look like DNA or RNA."""

    def where(self, keep: np.ndarray) -> "EncodedBlock":
        """The records for which keep (n,) is True."""
        if keep.all():
            return self
        sequences = list(itertools.compress(self.sequences, keep.tolist()))
        tokens = self.tokens[np.repeat(keep, self.lengths)]
        return EncodedBlock(
            sequences, tokens, self.lengths[keep], self.id_hashes[keep], self.lower_case, self.nucleotides
        )

    def sequence_hashes(self) -> np.ndarray:
        """(n, 2) uint64: the 128-bit XXH3 of each sequence, keyed by SEQUENCE_SEED."""
        digest = xxhash.xxh3_128_digest
        digests = b"".join([digest(sequence, SEQUENCE_SEED) for sequence in self.sequences])
        return np.frombuffer(digests, dtype=">u8").astype(np.uint64).reshape(-1, 2)


def encode_block(block: FastaBlock) -> EncodedBlock:
    """Tokens of a block's records. Lower case is folded, white space and one trailing `*` of a record are dropped.

    Raises:
        ValueError: a record without residues or with any other character; names file, record, line and position.
    """
    sequences, lower_case = [body.translate(_TABLE, WHITESPACE) for body in block.bodies], 0
    tokens = _joined(sequences)
    if tokens.max() >= _LOWER:
        sequences = [sequence.removesuffix(bytes([_STOP])) for sequence in sequences]
        tokens = _joined(sequences)
        if tokens.max() >= _STOP:
            _refuse(block)
        lower_case = int((tokens >= _LOWER).sum())
        sequences, tokens = [sequence.translate(_FOLD) for sequence in sequences], tokens & ~np.uint8(_LOWER)
    if not all(sequences):
        raise ValueError(f"{block.where(sequences.index(b''))}: no residues")
    lengths = np.array([len(sequence) + 2 for sequence in sequences])
    digest = xxhash.xxh3_64_digest
    digests = b"".join([digest(id_, ID_SEED) for id_ in block.ids])
    hashes = np.frombuffer(digests, ">u8").astype(np.uint64)
    return EncodedBlock(sequences, tokens, lengths, hashes, lower_case, sum(map(is_nucleotide, sequences)))


def is_nucleotide(tokens: bytes) -> bool:
    """Whether nine in ten of the first hundred residues are letters of DNA or RNA: A, C, G, T, U, N. Some true proteins
    are so, but few.
    """
    start = tokens[:100]
    return len(start) >= FEWEST_BASES and 10 * len(start.translate(None, _BASES)) <= len(start)


def nucleotide_warning(found: int, records: int, name: str) -> str:
    """What to tell a user of them."""
    return f"warning: {found:,} of {records:,} sequences of {name} look like DNA or RNA, and were read as proteins"


def _joined(sequences: list[bytes]) -> np.ndarray:
    """`<bos> residues <eos>` of each, end to end."""
    return np.frombuffer(bytes([EOS, BOS]).join([b"", *sequences, b""]), np.uint8)[1:-1]


def _refuse(block: FastaBlock) -> None:
    """Raise for the first record of a block that is empty or has an illegal character."""
    for i, body in enumerate(block.bodies):
        residues = body.translate(None, WHITESPACE).removesuffix(b"*")
        if not residues:
            raise ValueError(f"{block.where(i)}: no residues")
        for position, byte in enumerate(residues, start=1):
            if _CODES[byte] >= _STOP:
                shown = repr(chr(byte)) if byte < 128 else f"byte {byte:#04x}"
                raise ValueError(
                    f"{block.where(i, position)}: illegal character {shown} at position {position} of "
                    f"{len(residues)}; legal are the letters {AMINO_ACIDS + CONTEXT_LETTERS}"
                )
