"""Idioms that a reader would have to read twice are absent; a failure says what to write instead."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = (".github", "benchmarks", "cdpo_ray", "cluster", "configs", "docs", "examples", "tests")
SUFFIXES = {".cff", ".ipynb", ".jinja", ".md", ".py", ".toml", ".yaml", ".yml"}
NOT_OURS = {"tests/test_words.py"}  # quotes what it forbids

ONE = r"(?<!in\x20)an? "  # "in a row a step fails" is English
PER = r"an? (?!few|time|priori)\w+"

# Regex of an idiom -> what to write. Case is ignored, except of `None`; a space matches a line break; "_" ends a word.
WORDS = {
    "told": "reported, logged, given; of a variable: lines, message, reason",
    "tells (that|how|what|which|whether|of|all|it|who|where|why)": "reports, describes, says, shows",
    "anew": "again, from the start; made anew: regenerated; begun anew: restarted",
    "the goods": "table schemas",
    "spoken": "formatted, as text",
    "mend(s|ed|ing)?": "fix, correct, repair",
    "so many": "number of ..., maximum number of ...",
    "may not be": "must not be",
    "none: ": "`None`: ...",
    "none (if|where|when|trains|leaves|takes|draws)": "`None` if ...",
    "what (is|was) kept": "the checkpoint, the kept files; name the thing",
    "the whole way": "the whole pipeline, end to end",
    "of (its|their) own making": "its own, their own",
    "of one's own": "user-defined, your own",
    "of (its|their) own will": "by itself, on its own",
    "is to stop": "should stop",
    "in vain": "without success, without effect",
    "walk(s|ed)? (the|all|on|as|through)": "runs, visits, iterates over",
    "goes on": "continues, resumes",
    "(go|gone|going) on (with|after|from|where|at)": "continue, resume",
    "(is|are|was|were|be|been) asked( for| of)?": "requested, called, queried",
    "asked (for|of)": "requested, required",
    "heard": "received",
    "take(s|n)? no heed of": "ignore",
    "heeds?": "respects, uses",
    "(?<!soon\\x20)(?<!long\\x20)(?<!far\\x20)as (it is|they are)(?=[.;,:)\"])": "unchanged",
    "(?<!there\\x20)is no (?!longer|more|less|fewer|new|such|\\w+er )\\w+": "is not a ...",
    "what came of (it|them)": "the result, the outcome",
    "gives whether": "returns whether",
    "(worker|process|node|ray|driver|actor)s? lives?": "is alive, is running",
    "as of `": "see `...`, same as `...`",
    "broken off": "interrupted",
    "tak(es?|en) up(?! to)( again)?": "resume, continue from",
    "pass(es|ed)? over": "skip",
    "very (same|draws|difference|first)": "same, exact",
    "of now": "current",
    "how (it|a \\w+|the \\w+) stands?": "status of ...",
    "set aside": "quarantined",
    "turned round": "swapped, inverted",
    "cares? to": "wants to, needs to",
    "at hand": "available",
    f"{ONE}(batch|caption|column|file|finding|folder|generator|line|list|name|number|process|prompt|record|request|row"
    f"|score|sentence|share|strip|table|tensor|thread|token|value) {PER}": "one ... per ...",
    "(actors|bytes|calls|draws|files|images|lines|numbers|pairs|prompts|rows|samples|scores|threads|tokens|updates"
    "|values|weights|workers) an? (batch|call|file|folder|gpu|image|model|node|pair|process|prompt|reward|row|sample"
    "|stage|step|token|update|worker)": "... per ...",
    "once an? (batch|call|file|node|process|run|stage|step|update|worker)": "once per ...",
    "a \\w+ each": "one ... per ...",
    "(data's way|way of the data|way through)": "data flow, pipeline",
}  # fmt: skip


class Allowed(NamedTuple):
    """A phrase that stays in the lines of one file that hold it."""

    file: str
    phrase: str
    reason: str


ALLOWED = [
    Allowed("tests/prompts/test_sources.py", "is no line break", "a prompt in quotation marks"),
]


class Found(NamedTuple):
    file: str
    line: int
    word: str
    text: str
    entry: str

    def __str__(self) -> str:
        return f'{self.file}:{self.line}: {self.word}; write "{WORDS[self.entry]}"'


# White space, marks of a comment, or the quotes between two parts of one string.
GAP = re.compile(r"""(?:\s|[#"]|(?<=\s)f(?="))+""")


def compiled() -> re.Pattern[str]:
    """All idioms at once, which is several times faster than one after another; group ``n<number>`` of each."""
    each = [
        f"(?P<n{number}>{entry.replace(' ', GAP.pattern)}{'' if entry[-1] in ' `' else '(?![a-z])'})"
        for number, entry in enumerate(WORDS)
    ]
    return re.compile(f"(?<![a-z])(?:{'|'.join(each)})")


ENTRIES = list(WORDS)
PATTERN = compiled()


def find(file: str, text: str) -> list[Found]:
    lines = text.split("\n")
    found = []
    for match in PATTERN.finditer(text.lower()):
        if text.startswith("None", match.start()):
            continue
        number = text.count("\n", 0, match.start())
        entry = ENTRIES[int(str(match.lastgroup)[1:])]
        found.append(Found(file, number + 1, GAP.sub(" ", match[0]).strip(), lines[number], entry))
    return found


def texts() -> dict[str, str]:
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*"))] + sorted(ROOT.iterdir())
    names = {path.relative_to(ROOT).as_posix(): path for path in paths if path.suffix in SUFFIXES and path.is_file()}
    return {name: path.read_text("utf-8") for name, path in names.items() if name not in NOT_OURS}


@pytest.fixture(scope="module")
def every() -> list[Found]:
    return [each for file, text in texts().items() for each in find(file, text)]


def allows(allowed: Allowed, found: Found) -> bool:
    return found.file == allowed.file and allowed.phrase in found.text


def test_no_idiom_has_to_be_read_twice(every: list[Found]) -> None:
    left = [each for each in every if not any(allows(allowed, each) for allowed in ALLOWED)]
    counts = ", ".join(f"{word} {count}" for word, count in Counter(each.entry for each in left).most_common())
    assert not left, "\n".join([f"{len(left)} idioms", *map(str, left), counts])


def test_every_exception_is_still_needed(every: list[Found]) -> None:
    assert [allowed for allowed in ALLOWED if not any(allows(allowed, each) for each in every)] == []


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("who is told of a run", "told"),
        ("def test_a_fault_is_told():", "told"),
        ('HOW_TO_MEND = ""', "mend"),
        ("# skipped: so\n    # many in a row", "so many"),
        ('f"which so"\n        f" many"', "so many"),
        ("rows: a row a sample.", "a row a sample"),
        ("lora: none trains the whole net", "none trains"),
        ("image_size: none: the model's own", "none:"),
        ("StoreError: as of `read`", "as of `"),
    ],
)
def test_an_idiom_is_found_across_lines_strings_and_names(text: str, word: str) -> None:
    assert [(each.line, each.word) for each in find("a.py", text)] == [(1, word)]


@pytest.mark.parametrize(
    "text",
    [
        "in a row a restart",
        "recommended; amended",
        "as soon as it is made",
        "there is no room; it is no longer here",
        "None: full fine-tuning",
        "a thousand a time",
        "it takes up to a minute",
        "buffer.tell()",
        "ast.walk(tree)",
    ],
)
def test_plain_english_is_not_found(text: str) -> None:
    assert find("a.py", text) == []
