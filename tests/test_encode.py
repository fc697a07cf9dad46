from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.data.encode import ID_SEED, encode_block
from protlig_dd.data.fasta import FastaBlock, FastaFile, FastaRecord, FastaText, parse_text
from protlig_dd.tokenizer import AMINO_ACIDS, CONTEXT_LETTERS, ProteinTokenizer

SEQUENCES = st.lists(st.text(AMINO_ACIDS + CONTEXT_LETTERS, min_size=1, max_size=70), min_size=1, max_size=20)


def block_of(*bodies: bytes, ids: Sequence[bytes] = ()) -> FastaBlock:
    """Return a block of records with these bodies. The block begins with record 11 of a file, on line 101."""
    names = ids or [b"p%d" % i for i in range(len(bodies))]
    records = [b">%s\n%s\n" % (name, body.removesuffix(b"\n")) for name, body in zip(names, bodies, strict=True)]
    return parse_text(FastaText("a.fasta", 11, 101, b"".join(records)))


@given(SEQUENCES, st.sampled_from([b"\n", b"\r\n", b" \n\t"]), st.sampled_from([b"", b"*", b"*\n"]), st.booleans())
def test_a_block_is_encoded_as_the_tokenizer_encodes_each_sequence(
    sequences: list[str], end: bytes, tail: bytes, lower: bool
) -> None:
    bodies = []
    for sequence in sequences:
        text = (sequence.lower() if lower else sequence).encode()
        bodies.append(end.join(text[i : i + 9] for i in range(0, len(text), 9)) + tail)
    encoded = encode_block(block_of(*bodies))
    expected = [ProteinTokenizer().encode(sequence) for sequence in sequences]
    assert encoded.tokens.tolist() == np.concatenate(expected).tolist()
    assert encoded.lengths.tolist() == [len(tokens) for tokens in expected]
    assert encoded.lower_case == (sum(map(len, sequences)) if lower else 0)


def test_hashes_never_change() -> None:
    """Splits depend on the hashes of ids. The search for duplicates depends on the hashes of sequences."""
    encoded = encode_block(block_of(b"MKV", b"mkv", b"MKVA"))
    assert encoded.id_hashes.tolist() == [xxhash.xxh3_64_intdigest(b"p%d" % i, ID_SEED) for i in range(3)]
    assert encoded.id_hashes[0] == 10300873757441738782
    high_low = encoded.sequence_hashes()
    assert high_low[0].tolist() == high_low[1].tolist() == [2129636843705901130, 517296646781263596]
    assert high_low[2].tolist() != high_low[0].tolist()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"MK*V", r"illegal character '\*' at position 3 of 4"),
        (b"MKV**", r"illegal character '\*' at position 4 of 4"),
        (b"MK-V", "illegal character '-' at position 3 of 4"),
        (b"MK1V", "illegal character '1' at position 3 of 4"),
        (b"MK\x00V", r"illegal character '\\x00' at position 3 of 4"),
        (b"MK\x01\x02V", r"illegal character '\\x01' at position 3 of 5"),
        (b"MK\x01V", r"illegal character '\\x01' at position 3 of 4"),
        (b"MK\x02V", r"illegal character '\\x02' at position 3 of 4"),
        (b"MK\xc3\xa9V", r"illegal character byte 0xc3 at position 3 of 5"),
        (b"MK_V", "illegal character '_' at position 3 of 4"),
        (b"MK>V", "illegal character '>' at position 3 of 4"),
        (b"", "no residues"),
        (b" \n", "no residues"),
        (b"*\n", "no residues"),
    ],
)
@pytest.mark.parametrize("neighbour", [b"MKV\nA\n", b"mkv\nA*\n"])
def test_errors_name_the_file_record_and_line_of_a_bad_sequence(body: bytes, message: str, neighbour: bytes) -> None:
    with pytest.raises(ValueError, match=rf"^a\.fasta: record 12 \(p1\), line 10[45].*: {message}"):
        encode_block(block_of(neighbour, body, neighbour))


@pytest.mark.parametrize("empty", [b"", b" \n", b"*"])
def test_the_error_names_the_first_bad_record_of_a_block(empty: bytes) -> None:
    with pytest.raises(ValueError, match=r"record 11 \(p0\), line 101: no residues"):
        encode_block(block_of(empty, b"M1", b"MKV"))


def test_the_error_names_the_line_of_the_illegal_character(tmp_path: Path) -> None:
    (tmp_path / "a.fasta").write_bytes(b"\n>a x\nMKV\n>b y\r\nMKVA\r\n\r\nMK?\r\n")
    blocks = FastaFile(tmp_path / "a.fasta").blocks()
    with pytest.raises(ValueError, match=r"record 2 \(b\), line 7: illegal character '\?' at position 7 of 7"):
        list(map(encode_block, blocks))


NEARLY_DNA = st.tuples(st.text("KWkw", max_size=14), st.text("ACGTUNacgtun", min_size=12, max_size=120))


@given(
    st.lists(
        st.one_of(
            st.text("ACGTUNacgtunKW", min_size=1, max_size=150),
            NEARLY_DNA.map("".join),
            NEARLY_DNA.map(lambda parts: parts[1] + parts[0]),
        ),
        min_size=1,
        max_size=9,
    )
)
def test_dna_and_rna_are_counted(sequences: list[str]) -> None:
    """A sequence counts if it has at least 20 letters, and at least 90% of its first 100 letters are nucleotides."""
    expected = 0
    for sequence in sequences:
        start = sequence.upper()[:100]
        expected += len(start) >= 20 and sum(letter in "ACGTUN" for letter in start) >= 0.9 * len(start)
    assert encode_block(block_of(*(sequence.encode() for sequence in sequences))).nucleotides == expected


def test_proteins_are_not_counted_as_dna(proteins: list[FastaRecord]) -> None:
    assert encode_block(block_of(*(record.sequence.encode() for record in proteins))).nucleotides == 0
