"""The table of faults is true: every fault in it has tests, in the files that it names."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "faults.md").read_text()
ROWS = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", TABLE, flags=re.MULTILINE)
NAME = re.compile(r"\bdef test_fault_(\d\d)_(?:and_(\d\d)_)?")


def faults_by_file() -> dict[str, set[int]]:
    """Numbers of the faults that each test file names."""
    return {
        str(path.relative_to(TESTS)): {
            int(number) for match in NAME.finditer(path.read_text()) for number in match.groups() if number
        }
        for path in TESTS.rglob("test_*.py")
    }


def test_every_fault_has_a_row_and_the_files_that_it_names_test_it() -> None:
    tested = faults_by_file()
    assert [int(number) for number, _ in ROWS] == sorted(set.union(*tested.values()))
    for number, files in ROWS:
        first = re.findall(r"`([\w/]+(?:\.py|/))`", files)[0]
        found = {path for path, numbers in tested.items() if int(number) in numbers}
        assert any(path.startswith(first) for path in found), (number, first, found)
