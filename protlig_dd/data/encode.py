"""A block of FASTA records as tokens: one pass of C over all of its letters, and a look at every oddity."""

import itertools
from typing import NamedTuple

import numpy as np
import xxhash

from protlig_dd.data.fasta import WHITESPACE, FastaBlock
from protlig_dd.tokenizer import AMINO_ACIDS, BOS, CONTEXT_LETTERS, EOS, LETTERS

# Codes of one byte on its way to a token: the token, with _LOWER added for a lower-case letter; or one of these.
_LOWER, _STOP, _ILLEGAL, _BLANK = 64, 128, 129, 255
_CODES = bytearray([_ILLEGAL]) * 256
for _id, _letter in enumerate(LETTERS):
    if _letter != "_":
        _CODES[ord(_letter)], _CODES[ord(_letter.lower())] = _id, _id | _LOWER
for _byte in WHITESPACE:
    _CODES[_byte] = _BLANK
_CODES[ord("*")] = _STOP
_TABLE = bytes(_CODES)

# Never change these: the split of every sequence of every store follows from the first.
ID_SEED, SEQUENCE_SEED = 0x70726F746C6967, 0x64647365646464


class EncodedBlock(NamedTuple):
    tokens: np.ndarray
    """(total,) uint8: every sequence as `<bos> residues <eos>`."""
    lengths: np.ndarray
    """(n,) int64: tokens of each, the two ends included."""
    id_hashes: np.ndarray
    """(n,) uint64: 64-bit XXH3 of the id's UTF-8 bytes, keyed by ID_SEED."""
    lower_case: int
    """Letters that were lower-case; they are tokens like their upper-case twins."""

    def where(self, keep: np.ndarray) -> "EncodedBlock":
        """The records for which keep (n,) is True."""
        if keep.all():
            return self
        tokens = self.tokens[np.repeat(keep, self.lengths)]
        return EncodedBlock(tokens, self.lengths[keep], self.id_hashes[keep], self.lower_case)


def encode_block(block: FastaBlock) -> EncodedBlock:
    """Tokens of a block's records. Lower case is folded, white space and one trailing `*` of a record are dropped.

    Raises:
        ValueError: a record without residues or with any other character; names file, record, line and position.
    """
    # The line end behind a header becomes <bos>, the byte in front of the next record <eos>; headers are blanked.
    ends = np.append(block.starts[1:], len(block.text) + 1)
    if (ends - block.line_ends).min() < 2:
        raise ValueError(f"{block.where(int(np.argmax(ends - block.line_ends < 2)))}: no residues")
    codes = np.frombuffer(bytearray((block.text + b"\n").translate(_TABLE)), np.uint8)
    codes[block.line_ends], codes[ends - 1] = BOS, EOS
    parts = np.stack([block.line_ends - block.starts, ends - block.line_ends], axis=1)  # header, sequence lines
    keep = np.repeat(np.tile([False, True], len(parts)), parts.reshape(-1))
    codes = codes[keep & (codes != _BLANK)]
    lower_case = 0
    if codes.max() >= _LOWER:
        codes, lower_case = _fold(codes, block)
    starts = np.flatnonzero(codes == BOS)
    lengths = np.diff(starts, append=len(codes))
    if lengths.min() < 3:
        i = int(np.argmax(lengths < 3))
        raise ValueError(f"{block.where(i)}: no residues")
    digest = xxhash.xxh3_64_digest
    digests = b"".join([digest(id_, ID_SEED) for id_ in block.ids()])
    return EncodedBlock(codes, lengths, np.frombuffer(digests, ">u8").astype(np.uint64), lower_case)


def _fold(codes: np.ndarray, block: FastaBlock) -> tuple[np.ndarray, int]:
    """Codes with trailing stops dropped and lower case folded, and how many letters that were."""
    followed_by_end = np.append(codes[1:] == EOS, False)
    codes = codes[~((codes == _STOP) & followed_by_end)]
    if (codes >= _STOP).any():
        _refuse(block)
    lower_case = int((codes >= _LOWER).sum())
    return codes & (_LOWER - 1), lower_case


def _refuse(block: FastaBlock) -> None:
    """Raise for the first illegal character of a block."""
    for i, body in enumerate(block.bodies()):
        residues = body.translate(None, WHITESPACE).removesuffix(b"*")
        for position, byte in enumerate(residues, start=1):
            if _CODES[byte] >= _STOP:
                shown = repr(chr(byte)) if byte < 128 else f"byte {byte:#04x}"
                raise ValueError(
                    f"{block.where(i, position)}: illegal character {shown} at position {position} of "
                    f"{len(residues)}; legal are the letters {AMINO_ACIDS + CONTEXT_LETTERS}"
                )


def sequence_hashes(encoded: EncodedBlock) -> np.ndarray:
    """(n, 2) uint64: the 128-bit XXH3 of each sequence's tokens, keyed by SEQUENCE_SEED."""
    bounds = [0, *np.cumsum(encoded.lengths).tolist()]
    tokens, digest = encoded.tokens.tobytes(), xxhash.xxh3_128_digest
    digests = [digest(tokens[start:end], SEQUENCE_SEED) for start, end in itertools.pairwise(bounds)]
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64).reshape(-1, 2)
