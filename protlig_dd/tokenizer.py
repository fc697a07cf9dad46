"""Convert protein letters to token ids and back.

The diffused states are the 20 amino acids, ids 0..19. Id 20 is the absorbing state `<mask>`. Ids above 20
are context: they are never noised, never predicted and never in the loss. There are 30 ids in all.
"""

import numpy as np

AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
CONTEXT_LETTERS = "XBZJUO"  # unknown, Asx, Glx, Xle, selenocysteine, pyrrolysine
N_STATES = len(AMINO_ACIDS)
MASK = N_STATES
LETTERS = AMINO_ACIDS + "_" + CONTEXT_LETTERS  # `_` stands for <mask> in decoded text; `encode` rejects `_`
CONTEXT = MASK + 1  # the id of X, which also replaces context tokens in PackedBatch.targets
BOS, EOS, PAD = 27, 28, 29
VOCAB_SIZE = 30

_ILLEGAL = 255
_ENCODE = np.full(256, _ILLEGAL, dtype=np.uint8)
for _id, _letter in enumerate(LETTERS):
    if _id != MASK:
        _ENCODE[ord(_letter)] = _id
_DECODE = np.frombuffer(LETTERS.encode(), dtype=np.uint8)


class ProteinTokenizer:
    """Convert proteins to token ids and back.

    Decoding restores each of the 26 upper-case IUPAC letters. A trailing `*` (stop) is dropped.
    """

    vocab_size = VOCAB_SIZE

    def encode(self, sequence: str, name: str = "sequence") -> np.ndarray:
        """Encode one protein as `<bos> residues <eos>`.

        Args:
            sequence: upper-case IUPAC letters, optionally followed by `*`.
            name: the protein's name in error messages.

        Returns:
            uint8 array of residues + 2 ids.

        Raises:
            ValueError: an empty sequence, or a character that is not an upper-case IUPAC letter. The message names the
                protein, the 1-based position and the character.
        """
        residues = sequence.removesuffix("*")
        if not residues:
            raise ValueError(f"{name}: no residues")
        # "replace" turns each non-Latin-1 character into one `?`, so positions stay correct
        ids = _ENCODE[np.frombuffer(residues.encode("latin-1", "replace"), dtype=np.uint8)]
        illegal = np.flatnonzero(ids == _ILLEGAL)
        if illegal.size:
            position = int(illegal[0])
            raise ValueError(
                f"{name}: illegal character {residues[position]!r} at position {position + 1} of {len(residues)}; "
                f"allowed are the letters {AMINO_ACIDS + CONTEXT_LETTERS}"
            )
        tokens = np.empty(len(ids) + 2, dtype=np.uint8)
        tokens[0], tokens[1:-1], tokens[-1] = BOS, ids, EOS
        return tokens

    def decode(self, ids: np.ndarray) -> str:
        """Return the letters of an id array; `<bos>`, `<eos>` and `<pad>` are dropped, `<mask>` becomes `_`.

        Raises:
            ValueError: an id outside 0..29.
        """
        ids = np.asarray(ids)
        if ids.size and not (int(ids.min()) >= 0 and int(ids.max()) < VOCAB_SIZE):
            raise ValueError(f"token ids must be in 0..{VOCAB_SIZE - 1}, got {int(ids.min())}..{int(ids.max())}")
        return _DECODE[ids[ids < BOS]].tobytes().decode("ascii")
