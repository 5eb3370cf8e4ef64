"""The documentation is true of the program: commands, configurations, keys, messages and links."""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from cdpo_ray.cli import _parse
from cdpo_ray.config import load_config, parse_yaml, validate
from cdpo_ray.config.reference import all_keys, describe
from cdpo_ray.errors import CdpoError, ConfigError

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
GENERATED = {DOCS / "reference" / "cli.md", DOCS / "config.md"}
"""Pages that their own tests compare with the parser and with the declarations of keys."""
PAGES = sorted({ROOT / "README.md", ROOT / "cluster" / "README.md", *DOCS.rglob("*.md")} - GENERATED)
BESIDE_THE_SITE = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY", "CHANGELOG")] + [
    ROOT / "cluster" / "README.md",
    ROOT / "benchmarks" / "README.md",
]
"""Pages whose links the build of the site does not check."""

STAND_INS = {
    "CONFIG": "configs/quickstart.yaml",
    "...": "configs/quickstart.yaml",
    "my.yaml": "configs/quickstart.yaml",
    "mine.yaml": "configs/quickstart.yaml",
    "cats.yaml": "configs/quickstart.yaml",
}
"""Placeholder of a configuration, or one that users bring -> the configuration that is read in its place."""
OTHER_STAND_INS = {"VERB": "check", "SECTION": "training", "KEY": "training.beta"}
MISSING = ([], ["CONFIG"], ["runs/a", "runs/b"])
"""Appended to a command in running text, where `cdpo import --check` stands for `cdpo import CONFIG --check`."""
TYPED = ("", "bash", "console")
"""Languages of blocks whose lines are typed; a block without one may also be output."""

FENCE = re.compile(r"^( *)```([\w-]*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
COMMAND = re.compile(r"^(?:.*\s--\s|time\s)?cdpo\s(.*)$", re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
KEY = re.compile(rf"^((?:{'|'.join(name for name in all_keys() if '.' not in name)})(?:\.[a-z_0-9]+)+)(?:$|[=:]| )")
FILE_ENDINGS = (".py", ".md", ".yaml", ".html", ".txt", ".gz", ".csv")


class Command(NamedTuple):
    """A command line of the documentation, without the program's name.

    Attributes:
        is_typed: it is a line of a block, so it must be complete.
    """

    text: str
    is_typed: bool


def commands(markdown: str) -> Iterator[Command]:
    for _, language, block in FENCE.findall(markdown):
        if language in TYPED:
            yield from (Command(found[1], True) for line in block.split("\n") if (found := COMMAND.match(line.strip())))
    yield from (Command(found[1], False) for text in spans(markdown) if (found := COMMAND.match(text)))


def commented(config: str) -> Iterator[Command]:
    """Commands in the comments of a configuration."""
    text = " ".join(line.partition("#")[2].strip() for line in config.split("\n"))
    yield from (Command(found[1], False) for span in SPAN.findall(text) if (found := COMMAND.match(span)))


def spans(markdown: str) -> list[str]:
    """Code spans, each on one line."""
    return [" ".join(text.replace("\\|", "|").split()) for text in SPAN.findall(FENCE.sub("", markdown))]


def parsed(command: Command) -> Namespace:
    """A command as the parser reads it.

    Raises:
        ValueError: the parser refuses it; holds its message.
    """
    words = shlex.split(command.text, comments=True)
    end = next((place for place, word in enumerate(words) if word in ("|", ">", "&&")), len(words))
    words = [OTHER_STAND_INS.get(word, word) for word in words[:end]]
    errors = []
    for more in MISSING[: 1 if command.is_typed else None]:
        with contextlib.redirect_stderr(io.StringIO()) as printed, contextlib.redirect_stdout(io.StringIO()):
            try:
                return _parse([*words, *more])
            except SystemExit as ended:
                if ended.code == 0:  # --help or --version
                    return Namespace(verb=words[0])
                errors.append(printed.getvalue().strip().split("\n")[-1])
    raise ValueError(errors[0])


def check(command: Command) -> None:
    """Raise ValueError or CdpoError if a command, its configuration or its key is not valid."""
    found = parsed(command)
    if found.verb == "config":
        describe(found.name)
    for path in (getattr(found, "config", None), getattr(found, "judges", None)):
        if path and path.startswith("runs/"):
            path = "quickstart"
        if path in STAND_INS:
            path = "configs/tune.yaml" if found.verb == "tune" else STAND_INS[path]
        if path:
            load_config(path, getattr(found, "overrides", ()))


def faults(found: Iterator[Command]) -> Iterator[str]:
    for command in found:
        try:
            check(command)
        except (ValueError, CdpoError) as error:
            yield f"cdpo {command.text}: {error}"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_command_of_a_page_is_one_that_the_program_accepts(path: Path) -> None:
    assert list(faults(commands(path.read_text("utf-8")))) == []


def test_every_command_in_a_comment_of_a_configuration_is_one_that_the_program_accepts() -> None:
    assert [fault for path in CONFIGS for fault in faults(commented(path.read_text("utf-8")))] == []


def test_commands_are_found_in_blocks_tables_and_running_text() -> None:
    page = (
        "Run `cdpo\ncheck a.yaml`, then:\n\n```bash\ncdpo run a.yaml x=1  # note\n"
        "ray job submit -- cdpo run b.yaml\nls\n```\n\n| `cdpo config \\| cat` |\n\n```text\ncdpo: output\n```\n"
    )
    assert [command.text for command in commands(page)] == [
        "run a.yaml x=1  # note",
        "run b.yaml",
        "check a.yaml",
        "config | cat",
    ]
    assert [command.text for command in commented("a: 1  # see `cdpo\nb: 2  # check x.yaml`\n")] == ["check x.yaml"]
    assert sum(command.is_typed for path in PAGES for command in commands(path.read_text("utf-8"))) > 40


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("cdpo dance configs/smoke.yaml", "dance"),
        ("cdpo run configs/smoke.yaml --fast", "unrecognized arguments: --fast"),
        ("cdpo run", "the following arguments are required"),
        ("cdpo run configs/none.yaml", "cannot be read"),
        ("cdpo run configs/smoke.yaml training.bta=1", "unknown key `training.bta`"),
        ("cdpo run configs/smoke.yaml training.beta=-1", "must be > 0"),
        ("cdpo tune CONFIG search.num_trials=0", "must be >= 1"),
        ("cdpo config training.bta", "unknown key `training.bta`"),
        ("cdpo compare runs/a runs/b --judges none.yaml", "cannot be read"),
    ],
)
def test_a_command_that_the_program_refuses_is_found(block: str, message: str) -> None:
    [fault] = faults(commands(f"```bash\n{block}\n```\n"))
    assert message in fault


# --- configurations


def yaml_blocks(markdown: str) -> list[str]:
    return [block for _, language, block in FENCE.findall(markdown) if language == "yaml"]


def merged(base: Any, over: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{key: merged(base.get(key), value) for key, value in over.items()}}


@functools.cache
def bases() -> list[Any]:
    return [yaml.safe_load(path.read_text("utf-8")) for path in CONFIGS]


def yaml_fault(block: str) -> str | None:
    """Why a block is not (part of) a configuration: it must be valid alone, or over one of those in `configs/`."""
    try:
        values = parse_yaml(block, where="block")
    except ConfigError as error:
        return str(error)
    if not isinstance(values, Mapping):
        return "is not a mapping of sections"
    errors = []
    for base in [{}] if "run" in values else bases():
        try:
            validate(merged(base, values), where="block")
            return None
        except ConfigError as error:
            errors.append(str(error))
    return min(errors, key=len)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_yaml_block_of_a_page_is_part_of_a_valid_configuration(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = yaml_blocks(path.read_text("utf-8"))
    for named in re.findall(r"[\w/-]+\.safetensors", "".join(blocks)):
        (tmp_path / named).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / named).touch()
    monkeypatch.chdir(tmp_path)
    found = {block: yaml_fault(block) for block in blocks}
    assert {block: fault for block, fault in found.items() if fault} == {}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("training: {bta: 1}\n", "unknown key `training.bta`"),
        ("training: {loss: {name: robust, sft: 1}}\n", "unknown key `training.loss.sft`"),
        ("training: {beta: 1", "not valid YAML"),
        ("- training\n", "is not a mapping"),
        ("run: {name: a}\n", "`model` is missing"),  # a whole configuration lacks nothing
        ("curriculum: {measure: rank_gap}\npreferences: {path: a, format: pairs}\n", "must not be"),
    ],
)
def test_a_block_that_is_not_part_of_a_valid_configuration_is_found(block: str, message: str) -> None:
    [found] = yaml_blocks(f"```yaml\n{block}\n```\n")
    assert message in (yaml_fault(found) or "")


def unknown_keys(markdown: str) -> list[str]:
    named = (found[1] for text in spans(markdown) if (found := KEY.match(text)))
    return sorted({key for key in named if key not in all_keys() and not key.endswith(FILE_ENDINGS)})


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_key_that_a_page_names_exists(path: Path) -> None:
    assert unknown_keys(path.read_text("utf-8")) == []


def test_a_key_that_does_not_exist_is_found() -> None:
    assert unknown_keys("`training.bta`, `run.py`, `training.beta`, `rewards.names: [a]`, `model.pth=x`") == [
        "model.pth",
        "training.bta",
    ]


# --- examples


def python_blocks(path: str) -> str:
    """All Python blocks of a page, as one module."""
    return "\n\n".join(
        block for _, language, block in FENCE.findall((DOCS / path).read_text("utf-8")) if language == "python"
    )


def test_the_examples_of_a_reward_a_loss_and_a_measure_are_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np
    import torch

    from cdpo_ray.curriculum.pairs import PairArrays
    from cdpo_ray.rewards.scorer import Scorer
    from cdpo_ray.training.losses import dpo_loss, loss_function

    monkeypatch.chdir(tmp_path)
    for page, name in (("guides/own_reward.md", "rewards"), ("guides/losses.md", "losses")):
        (tmp_path / f"docs_{name}.py").write_text(python_blocks(page))
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[1, 0, ::2] = 99  # red rows
    scores = Scorer({"docs_rewards:redness": {}, "docs_rewards:Sharpness": {}})(images + 1, ["a", "b"])
    assert [scores[name].tolist() for name in scores] == [[1.0, 50.5], [0.0, 33.0]]
    margin = torch.tensor([-1.0, 0.0, 2.0])
    assert torch.equal(loss_function("docs_losses:focal")(margin, gamma=0), dpo_loss(margin))
    namespace: dict[str, Any] = {}
    exec(python_blocks("concepts/difficulty.md"), namespace)
    index = np.arange(2)
    pairs = PairArrays(index, index, index, rank_gap=np.array([1, 4]), score_gap=np.array([4.0, 1.0]), draw=index)
    assert namespace["hardness"](pairs).tolist() == [2.0, 2.0]


# --- messages


@functools.cache
def literals() -> str:
    """All texts of the package, without back quotes; a value in a text is a line break."""
    found = []
    for path in (ROOT / "cdpo_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(str(part.value) if isinstance(part, ast.Constant) else "\n" for part in node.values)
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-.\w]*[sdfr]", "\n", node.value))
    return "\n\n".join(found).replace("`", "")


def messages(markdown: str) -> Iterator[str]:
    """Code spans in the first column of tables of messages."""
    for table in re.findall(r"^\| (?:message|you see) .*\n(?:\|.*\n)+", markdown, re.MULTILINE):
        for row in table.split("\n")[2:]:
            yield from (text for text in SPAN.findall(row.split(" | ")[0]) if not text.startswith("cdpo "))


def absent(message: str) -> list[str]:
    """Parts of a message, between its ``...``, that no text of the package holds."""
    return [part for part in message.split("...") if part.strip(" ;,?()") and part not in literals()]


def test_every_message_that_troubleshooting_quotes_exists() -> None:
    found = list(messages((DOCS / "guides" / "troubleshooting.md").read_text("utf-8")))
    assert len(found) > 30
    assert {message: parts for message in found if (parts := absent(message))} == {}


def test_a_message_that_no_line_of_the_package_has_is_found() -> None:
    [known, unknown] = messages(
        "| message | do |\n|---|---|\n| `unknown key ...` | a |\n| `the moon is ... full of cheese` | `b` |\n"
    )
    assert absent(known) == []
    assert absent(unknown) == ["the moon is ", " full of cheese"]


# --- links


def anchors(markdown: str) -> set[str]:
    """Anchors of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", markdown), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(markdown: str, folder: Path) -> list[str]:
    broken = []
    for target in LINK.findall(FENCE.sub("", markdown)):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = folder / name
        text = markdown if not name else path.read_text("utf-8") if path.suffix == ".md" and path.is_file() else ""
        if (name and not path.exists()) or (anchor and anchor not in anchors(text)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("path", BESIDE_THE_SITE, ids=name_of)
def test_every_link_and_picture_beside_the_site_exists(path: Path) -> None:
    assert broken_links(path.read_text("utf-8"), path.parent) == []


def test_a_broken_link_is_found() -> None:
    page = (
        "## A `b`: c\n[1](docs/index.md) [2](docs/none.md) [3](#a-b-c) [4](#none) [5](docs/index.md#none) ![6](x.png)\n"
    )
    assert broken_links(page, ROOT) == ["docs/none.md", "#none", "docs/index.md#none", "x.png"]


# --- the site


def build(config: Path, site_dir: Path) -> subprocess.CompletedProcess[str]:
    """Build a site strictly; not with ``--quiet``, which hides warnings from ``--strict`` too."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site_dir)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site_dir = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", site_dir)
    assert done.returncode == 0, done.stderr
    return site_dir


def test_the_build_refuses_broken_links_anchors_and_pages_that_are_not_in_the_navigation(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[1](none.md) [2](#none) [3](/none.md) ![4](none.png)\n")
    (tmp_path / "docs" / "alone.md").write_text("# Alone\n")
    values = {
        "INHERIT": str(ROOT / "mkdocs.yml"),
        "docs_dir": "docs",
        "nav": ["index.md"],
        "plugins": [],
        "extra_css": [],
    }
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(values))
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    for fault in ("'none.md'", "'#none'", "'/none.md'", "'none.png'", "alone.md"):
        assert fault in done.stderr


class Assets(HTMLParser):
    """Collects the addresses that a browser loads with a page, without those that a reader follows."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        loaded = [given.get(name, "") for name in ("src", "srcset", "poster", "data", "action", "xlink:href")]
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            loaded.append(given.get("href", ""))
        self.found += filter(None, loaded)
        self.handle_data(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        self.found += re.findall(r"(?:url\(|@import\s+|fetch\()[\"']?([^\"')\s]+)", data)


LOADED_LATER = ('class="mermaid"', 'data-md-component="source"', "<iframe")
"""What the theme's script, or a frame, loads from elsewhere."""


def from_elsewhere(html: str) -> list[str]:
    page = Assets()
    page.feed(html)
    remote = [address for address in page.found if re.match(r"(?:[a-z]+:)?//", address.strip())]
    return remote + [mark for mark in LOADED_LATER if mark in html]


def test_the_site_has_every_page_and_loads_nothing_from_another_host(site: Path) -> None:
    pages = {path.relative_to(site).with_suffix(".md") for path in site.rglob("*.html")}
    assert {path.relative_to(DOCS) for path in DOCS.rglob("*.md")} <= pages
    for path in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = path.read_text("utf-8")
        found = from_elsewhere(text if path.suffix == ".html" else f"<style>{text}</style>")
        assert found == [], path


@pytest.mark.parametrize(
    "html",
    [
        '<link rel="stylesheet" href="https://fonts.googleapis.com/css">',
        '<link href="//fonts.gstatic.com" rel="preconnect">',
        '<script src="https://unpkg.com/mermaid"></script>',
        '<img src="http://a.example/pixel.gif">',
        "<style>@import 'https://a.example/a.css';</style>",
        '<p style="background: url(https://a.example/a.png)">',
        "<script>fetch('https://a.example/count')</script>",
        '<pre class="mermaid"></pre>',
    ],
)
def test_an_asset_of_another_host_is_found(html: str) -> None:
    assert len(from_elsewhere(html)) == 1


def test_links_that_a_reader_follows_are_no_assets() -> None:
    page = '<a href="https://arxiv.org"></a><link rel="canonical" href="https://a.example"><img src="a.png"><svg></svg>'
    assert from_elsewhere(page) == []
