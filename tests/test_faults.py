"""The table of faults is true: every fault in it has tests, in the files that it names."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "faults.md").read_text()
ROWS = re.findall(r"^\| (\d+) \|.*\| ([^|]+) \|$", TABLE, flags=re.MULTILINE)


def files_with_tests_of(number: int) -> set[str]:
    found = {
        path
        for path in TESTS.rglob("test_*.py")
        if re.search(rf"\bdef test_fault_(\d\d_and_)?{number:02d}_", path.read_text())
    }
    return {str(path.relative_to(TESTS)) for path in found}


def test_every_fault_has_a_row_and_the_files_that_it_names_test_it() -> None:
    tests = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    tested = {
        int(number)
        for pair in re.findall(r"\bdef test_fault_(\d\d)_(?:and_(\d\d)_)?", tests)
        for number in pair
        if number
    }
    assert [int(number) for number, _ in ROWS] == sorted(tested)
    for number, told in ROWS:
        found = files_with_tests_of(int(number))
        assert found, f"fault {number} has no test"
        first = re.findall(r"`([\w/]+(?:\.py|/))`", told)[0]
        assert any(path.startswith(first) for path in found), (number, first, found)
