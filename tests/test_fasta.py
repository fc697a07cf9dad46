import gzip
from pathlib import Path

import pytest

from protlig_dd.data.fasta import read_fasta

TEXT = (
    ">UniRef50_A0A8C0C0Z5 NADP-retinol dehydrogenase n=1 Tax=Buteo japonicus TaxID=224669 RepID=A0A8C0C0Z5_9AVES\n"
    "MATLVPRIVL\nITGCSSGIGL\n\n>P31007\nMPVKKQEAHRALE*\n"
)


@pytest.mark.parametrize("zipped", [False, True])
def test_records_of_plain_and_gzipped_files(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "proteins"  # gzip is recognised by content, not by name
    path.write_bytes(gzip.compress(TEXT.encode()) if zipped else TEXT.encode())
    first, second = read_fasta(path)
    assert first.id == "UniRef50_A0A8C0C0Z5"
    assert first.description.startswith("NADP-retinol dehydrogenase n=1 Tax=Buteo")
    assert first.sequence == "MATLVPRIVLITGCSSGIGL"
    assert second == ("P31007", "", "MPVKKQEAHRALE*", str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty, no FASTA records"),
        (b"\n\n", "empty, no FASTA records"),
        (b"MKV\n>a\nMKV\n", "line 1 is not a FASTA header: 'MKV'"),
        (b">a\nMKV\n> no id\nMKV\n", r"no id in its header '> no id' \(after record a\)"),
        (gzip.compress(TEXT.encode() * 5000)[:2000], "truncated or damaged gzip, after record "),
        (gzip.compress(b"", mtime=0), "empty, no FASTA records"),
        (b">a\nMK\xff\n", "not a text file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.fasta"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_fasta(path))
    assert str(path) in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.fasta: no such FASTA file"):
        list(read_fasta(tmp_path / "none.fasta"))
