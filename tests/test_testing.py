"""docs/testing.md agrees with the tests, with scripts/test_times.py and with scripts/test.sh."""

import re
from pathlib import Path

import pytest

from scripts import test_times
from scripts.test_times import GROUPS, group_of, read_times, table

from .conftest import ROOT

XML = """<testsuites><testsuite>
<testcase classname="tests.test_noise" name="test_a[1]" time="1.5"/>
<testcase classname="tests.test_report_page" name="test_pages_in_a_browser" time="20"/>
<testcase classname="tests.test_report_page" name="test_b" time="2"/>
<testcase classname="tests.test_noise" name="test_c" time="9"><skipped/></testcase>
</testsuite></testsuites>"""


def test_every_test_is_in_a_group_and_every_group_has_tests() -> None:
    found = set()
    for path in (ROOT / "tests").glob("test_*.py"):
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE):
            found.add(group_of(path.stem, name).name)
    assert found == {group.name for group in GROUPS}
    with pytest.raises(ValueError, match=r"tests/test_new\.py is in no group"):
        group_of("test_new", "test_a")


def test_the_table_sums_the_times_of_the_tests_that_ran(tmp_path: Path) -> None:
    (tmp_path / "times.xml").write_text(XML)
    rows = {row.split(" | ")[0].strip("| "): row for row in table(read_times(tmp_path / "times.xml"))}
    assert rows["maths"].endswith("| 1 | 2 |")
    assert rows["browser"].endswith("| 1 | 20 |")
    assert rows["report page"].endswith("| 1 | 2 |")
    assert rows["all"].endswith("| 3 | 24 |")


def test_the_docs_contain_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "times.xml").write_text(XML)
    monkeypatch.setattr("sys.argv", ["test_times", str(tmp_path / "times.xml")])
    test_times.main()
    text = (ROOT / "docs/testing.md").read_text()
    for row in capsys.readouterr().out.splitlines():
        if not row.startswith(("| ---", "| all")):
            assert row.rsplit(" | ", 2)[0] in text
    monkeypatch.setattr("sys.argv", ["test_times", "none.xml"])
    with pytest.raises(SystemExit, match=r"error: none\.xml: .*No such file"):
        test_times.main()


def test_the_script_and_the_docs_agree_on_the_tests_to_run() -> None:
    markers = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert markers == ["gpu", "slow", "system", "campaign"]
    script = (ROOT / "scripts/test.sh").read_text()
    assert '-m "not system and not campaign"' in script
    text = (ROOT / "docs/testing.md").read_text()
    for command in ('./scripts/test.sh -m "not slow"', "./scripts/test.sh --all", "./scripts/test.sh"):
        assert f"`{command}`" in text
    for path in (ROOT / "tests").glob("test_*.py"):  # system and campaign tests must be slow, so `not slow` skips them
        for marks, name in re.findall(r"^((?:@pytest\.mark[^\n]*\n)+)def (\w+)", path.read_text(), re.MULTILINE):
            if "mark.system" in marks or "mark.campaign" in marks:
                assert "mark.slow" in marks or "pytestmark = pytest.mark.slow" in path.read_text(), name
