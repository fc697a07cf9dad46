import bz2
import gzip
import hashlib
import io
import itertools
import lzma
import re
import sys
from pathlib import Path

import Bio.SeqIO
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protlig_dd.data import fasta
from protlig_dd.data.encode import encode_block
from protlig_dd.data.fasta import FastaFile, Header, parse_header, read_fasta

TEXT = (
    ">UniRef50_A0A8C0C0Z5 NADP-retinol dehydrogenase n=1 Tax=Buteo japonicus TaxID=224669 RepID=A0A8C0C0Z5_9AVES\n"
    "MATLVPRIVL\nITGCSSGIGL\n\n>P31007\nMPVKKQEAHRALE*\n"
)


@pytest.mark.parametrize("zipped", [False, True])
def test_plain_and_gzipped_files_give_the_same_records(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "proteins"  # gzip is recognised by content, not by name
    path.write_bytes(gzip.compress(TEXT.encode()) if zipped else TEXT.encode())
    first, second = read_fasta(path)
    assert first.id == "UniRef50_A0A8C0C0Z5"
    assert first.description.startswith("NADP-retinol dehydrogenase n=1 Tax=Buteo")
    assert first.sequence == "MATLVPRIVLITGCSSGIGL"
    assert second == ("P31007", "", "MPVKKQEAHRALE*", str(path))


@given(
    st.lists(
        st.tuples(st.lists(st.text("ACD", max_size=9), min_size=1, max_size=3), st.booleans()), min_size=1, max_size=6
    ),
    st.lists(st.sampled_from(["\n", "\r\n", "\r\r\n", "\r"]), min_size=1, max_size=5),
    st.integers(1, 9),
    st.booleans(),
)
def test_line_ends_of_any_system_give_the_same_records(
    records: list[tuple[list[str], bool]], ends: list[str], piece: int, marked: bool
) -> None:
    """The line ends are mixed, the file is read in pieces of any size, and it may begin with a byte-order mark."""
    lines = [line for i, (body, described) in enumerate(records) for line in (f">r{i}{' a b' * described}", *body)]
    text = "".join(line + end for line, end in zip(lines, itertools.cycle(ends), strict=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "PIECE_BYTES", piece)
        patch.setattr(fasta, "BLOCK_BYTES", 2 * piece + 8)  # the first block must be long enough to show the file type
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbf" * marked + text.encode())))
        found = [(record.id, record.description, record.sequence) for record in read_fasta("-")]
    assert found == [(f"r{i}", "a b" * described, "".join(body)) for i, (body, described) in enumerate(records)]


def test_errors_name_the_right_line_for_any_line_ends(tmp_path: Path) -> None:
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "x.fasta").write_bytes(f">a{end}MKV{end}>b{end}MKV{end}M1V{end}".encode())
        blocks = FastaFile(tmp_path / "x.fasta").blocks()
        with pytest.raises(ValueError, match=r"x.fasta: record 2 \(b\), line 5: illegal character '1' at position 5"):
            list(map(encode_block, blocks))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), "is UTF-16, not UTF-8; save it as UTF-8"),
        (bz2.compress(TEXT.encode()), "is compressed by bzip2; only gzip is read"),
        (lzma.compress(TEXT.encode()), "is compressed by xz; only gzip is read"),
        (b"\x28\xb5\x2f\xfd\x04\x58", "is compressed by zstd; only gzip is read"),
        (b"PK\x03\x04\x14\x00", "is a zip archive; only gzip is read"),
    ],
)
def test_errors_name_unsupported_encodings_and_compressions(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.fasta").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.fasta {message}"):
        list(read_fasta(tmp_path / "x.fasta"))


PIR = """>P1;CRAB_ANAPL
ALPHA CRYSTALLIN B CHAIN
  MDITIHNPLI RRPLFSWLAP
  SRIFDQIFGE*

>P1;CRAB_BOVIN
alpha crystallin B chain (alpha(B)-crystallin) - bovine
MDIAIHHPWI*
"""


@pytest.mark.parametrize("first", ["", ">whole\nMKV\n"])
@pytest.mark.parametrize("zipped", [False, True])
def test_pir_is_rejected_with_a_command_that_converts_it(tmp_path: Path, first: str, zipped: bool) -> None:
    """If PIR were read as FASTA, the sequences would begin with the letters of their descriptions."""
    text = (first + PIR).encode()
    (tmp_path / "x.pir").write_bytes(gzip.compress(text) if zipped else text)
    line = 3 if first else 1
    with pytest.raises(ValueError, match=rf"x.pir: record .* \(P1;CRAB_ANAPL\), line {line}.* looks like PIR") as error:
        list(read_fasta(tmp_path / "x.pir"))
    assert "\n" not in str(error.value)
    command = re.search(r'Bio\.SeqIO\.convert\("(.*?)", "(.*?)", "(.*?)", "(.*?)"\)', str(error.value))
    assert command is not None
    (tmp_path / command[1]).write_text(PIR)
    with (tmp_path / command[1]).open() as file:  # given a path, Biopython would not close the file
        Bio.SeqIO.convert(file, command[2], tmp_path / command[3], command[4])
    records = list(read_fasta(tmp_path / "out.fasta"))
    assert [record.id for record in records] == ["CRAB_ANAPL", "CRAB_BOVIN"]
    assert records[0].sequence == "MDITIHNPLIRRPLFSWLAPSRIFDQIFGE"


@pytest.mark.parametrize(
    "text", ["P1;x\nMKV\n>y\nMKV*\n", "P1x\nMKV*\n", "PP1;x\nMKV*\n", "ab;x\nMKV*\n", "x\nP1;*\n>P"]
)
def test_fasta_with_only_one_feature_of_pir_is_read(tmp_path: Path, text: str) -> None:
    """A PIR record has both a code before its id and a * at the end of its sequence."""
    (tmp_path / "x.fasta").write_text(f">{text}")
    assert len(list(read_fasta(tmp_path / "x.fasta"))) == 1 + text.count(">")


def test_several_gzip_members_are_read_as_one_file(tmp_path: Path) -> None:
    (tmp_path / "two.gz").write_bytes(gzip.compress(TEXT.encode()) + gzip.compress(b">c\nMKV\n"))
    assert [record.id for record in read_fasta(tmp_path / "two.gz")] == ["UniRef50_A0A8C0C0Z5", "P31007", "c"]


def test_any_flipped_bit_in_gzip_is_an_error_or_changes_no_record(tmp_path: Path) -> None:
    path, content = tmp_path / "flipped.gz", bytearray(gzip.compress(TEXT.encode(), mtime=0))
    path.write_bytes(content)
    expected, messages = list(read_fasta(path)), []
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            found = list(read_fasta(path))
        except ValueError as error:
            messages.append(str(error))
        else:
            assert found == expected, f"bit {bit}"
    assert all(message.startswith(f"{path}: ") for message in messages)
    assert len(messages) > 0.9 * 8 * len(content)  # the other bits are in gzip's header: its time and system


def test_plain_and_gzipped_records_are_read_from_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (TEXT.encode(), gzip.compress(TEXT.encode())):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        file = FastaFile("-")
        assert [id_ for block in file.blocks() for id_ in block.ids] == [b"UniRef50_A0A8C0C0Z5", b"P31007"]
        assert file.sha256 == hashlib.sha256(content).hexdigest()
        assert (file.name, file.size, file.records) == ("stdin", len(content), 2)


NAMES = st.text("abc|_ =[](>", min_size=1).map(lambda text: "x" + text)
LINES = st.lists(st.text("ACDEFGHIKLMNPQRSTVWY", max_size=8), max_size=4)


@given(
    st.lists(st.tuples(NAMES, LINES), min_size=1, max_size=30),
    st.integers(1, 40),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\n"]),
)
def test_blocks_of_any_size_give_the_same_records_and_line_numbers(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, list[str]]], size: int, end: str, last: str
) -> None:
    lines, expected = ["", ""], []
    for name, body in records:
        expected.append((name.strip(), "".join(body), len(lines) + 1))
        lines += [f">{name}", *body]
    path = tmp_path_factory.mktemp("blocks") / "some.fasta"
    path.write_bytes((end.join(lines) + (end if last else "")).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fasta, "BLOCK_BYTES", size)
        found = []
        for block in FastaFile(path).blocks():
            for i, (header, body) in enumerate(zip(block.headers, block.bodies, strict=True)):
                line = int(block.location(i).rpartition(" ")[2])
                assert f": record {len(found) + 1} (" in block.location(i)
                found.append((header.decode().strip(), body.translate(None, fasta.WHITESPACE).decode(), line))
    assert found == expected


# parallel test processes must generate the same parameters, so gzip must not store the time (mtime=0)
ZIPPED, ZIPPED_MANY, ZIPPED_NOTHING = (gzip.compress(TEXT.encode() * times, mtime=0) for times in (1, 5000, 0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, no FASTA records"),
        (b"\n \n", "empty, no FASTA records"),
        (b"\n\nMKV\n>a\nMKV\n", "line 3 is not a FASTA header: 'MKV'"),
        (b">a\nMKV\n> no id\nMKV\n", r"record 2 \(\), line 3: no id in the header '> no id'"),
        (b">a\nMKV\n>\nMKV\n", r"record 2 \(\), line 3: no id in the header '>'"),
        (b">a\nMKV\n>b \xff\xfe\nMKV\n", r"record 2 \(b\), line 3: the header is not UTF-8"),
        (ZIPPED_MANY[:2000], r"truncated or damaged gzip; the last record that was read is \d+: "),
        (ZIPPED[:-5], "truncated or damaged gzip; the last record that was read is 0: "),
        (ZIPPED[:-8] + b"12345678", "truncated or damaged gzip; the last record that was read is 0: CRC"),
        (ZIPPED[:40], "truncated or damaged gzip; the last record that was read is 0: "),
        (ZIPPED_NOTHING, "empty, no FASTA records"),
        (b">a\nMKV\nMK\xff\n", r"record 1 \(a\), line 3: the sequence is not ASCII"),
    ],
)
def test_errors_name_the_file_and_the_fault(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.fasta"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_fasta(path))
    assert str(error.value).startswith(str(path))


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.fasta: no such file"):
        list(read_fasta(tmp_path / "none.fasta"))
    with pytest.raises(ValueError, match="a folder, not a FASTA file"):
        list(read_fasta(tmp_path))


@pytest.mark.parametrize("before", [b">a\nMKV\n", b">a\nMKV\n" * 100_000])
def test_a_record_longer_than_the_limit_is_an_error(tmp_path: Path, before: bytes) -> None:
    limit = fasta.LONGEST_RECORD
    path = tmp_path / "long.fasta"
    for line_length in (60, limit + 1):
        whole, rest = divmod(limit + 100, line_length)
        path.write_bytes(before + b">long one\n" + (b"A" * line_length + b"\n") * whole + b"A" * rest + b"\n>c\nM\n")
        number = before.count(b">") + 1
        with pytest.raises(
            ValueError, match=rf"record {number}.*line {2 * number - 1} is longer than 16,777,216 bytes"
        ):
            list(FastaFile(path).blocks())


def test_a_line_of_two_gigabytes_is_rejected_early(tmp_path: Path) -> None:
    path = tmp_path / "bomb.fasta.gz"
    member = gzip.compress(b"A" * (64 << 20))
    path.write_bytes(gzip.compress(b">bomb\n") + member * 32)
    read: list[int] = []
    with pytest.raises(ValueError, match=r"record 1, line 1 is longer than 16,777,216 bytes"):
        list(FastaFile(path, on_bytes=read.append).blocks())
    assert sum(read) <= 1 << 20


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (
            "UniRef50_Q9K794 Putative AgrB-like protein n=2 Tax=Alkalihalobacillus TaxID=2675234 RepID=AGRB_BACHD",
            Header("UniRef50_Q9K794", "Putative AgrB-like protein", 2, "Alkalihalobacillus", 2675234, "AGRB_BACHD"),
        ),
        (
            "UniRef50_UPI0002 Acyl [acyl-carrier n=3 Tax=x] n=1 Tax=Bacillus sp. [in: a=b (c)] TaxID=N/A RepID=UPI1",
            Header("UniRef50_UPI0002", "Acyl [acyl-carrier n=3 Tax=x]", 1, "Bacillus sp. [in: a=b (c)]", None, "UPI1"),
        ),
        ("UniRef50_A n=7 Tax=Homo sapiens RepID=A_HUMAN", Header("UniRef50_A", "", 7, "Homo sapiens", None, "A_HUMAN")),
        (
            "sp|P31007|DLG1_DROME Disks large 1 OS=Drosophila melanogaster (x=y) OX=7227 GN=dlg1 PE=1 SV=2",
            Header("sp|P31007|DLG1_DROME", "Disks large 1", None, "Drosophila melanogaster (x=y)", 7227, None),
        ),
        ("P31007", Header("P31007", "", None, None, None, None)),
        ("P31007\tmy own n=3 words", Header("P31007", "my own n=3 words", None, None, None, None)),
    ],
)
def test_headers_of_every_form_are_parsed(header: str, expected: Header) -> None:
    assert parse_header(header) == expected
