"""Every key is described where it is declared, and the reference shows it."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from cdpo_ray.config import Config
from cdpo_ray.config.reference import all_keys, describe, reference_page
from cdpo_ray.errors import ConfigError

ROOT = Path(__file__).parents[1]


MAPPINGS = ("search.space", "judge.candidates")


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Sections that a field's type has anywhere."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from sections_in(part)


def declared(section: type[BaseModel], parent: str = "") -> Iterator[tuple[str, FieldInfo, list[type[BaseModel]]]]:
    """Every key with its field and the sections within it; those of a mapping are under ``<key>``.

    A key that several variants of a section have is listed once.
    """
    for name, field in section.model_fields.items():
        inner = list(sections_in(field.annotation))
        yield f"{parent}{name}", field, inner
        inside = f"{parent}{name}." + ("<key>." if f"{parent}{name}" in MAPPINGS else "")
        yield from {key: (key, *rest) for each in inner for key, *rest in declared(each, inside)}.values()


DECLARED = list(declared(Config))


def test_every_key_has_a_description() -> None:
    missing = [
        name
        for name, field, inner in DECLARED
        if not (field.description or "").strip() and not any((each.__doc__ or "").strip() for each in inner)
    ]
    assert missing == []


def test_descriptions_are_sentences_of_at_most_five_lines() -> None:
    texts = {name: field.description for name, field, _ in DECLARED if field.description}
    assert [name for name, text in texts.items() if not text.endswith(".")] == []
    assert [name for name, text in texts.items() if len(text.split("\n")) > 5] == []


def test_the_reference_has_every_declared_key_in_order() -> None:
    assert list(all_keys()) == [name for name, _, _ in DECLARED]


def test_the_page_is_up_to_date() -> None:
    """After a change: ``python -m cdpo_ray.config.reference > docs/config.md``."""
    written = (ROOT / "docs" / "config.md").read_text()
    assert written == reference_page()
    shown = [line for line in written.split("\n") if line.startswith(("- **`", "## `"))]
    assert len(shown) > 150 and max(map(len, written.split("\n"))) < 250


def test_the_page_is_written_by_its_module() -> None:
    command = [sys.executable, "-m", "cdpo_ray.config.reference"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert (found.stdout, found.stderr) == (reference_page(), "")


@pytest.mark.parametrize(
    ("key", "facts"),
    [
        ("training.beta", ["type     number", "bounds   > 0", "default  required"]),
        ("training.seed", ["type     integer | null", "bounds   >= 0, < 2^63", "default  null"]),
        ("training.lora.targets", ['default  ["to_q", "to_k", "to_v", "to_out.0"]', "bounds   not empty"]),
        ("training.guidance_range", ["bounds   2 items, each >= 0"]),
        ("training.empty_prompt_fraction", ["bounds   >= 0, < 1", "default  0.0"]),
        ("generation.height", ["bounds   >= 8, multiple of 8"]),
        ("curriculum.preset", ["choices  paper, released-code, plain-dpo", "default  paper"]),
        ("model.compile", ["choices  true, false, auto", "default  false"]),
        ("search.objectives", ["choices  reward, win_rate, diversity, implicit_accuracy"]),
        ("run.name", [r"bounds   at most 100 characters, matches `^[A-Za-z0-9][\w.-]*$`"]),
    ],
)
def test_a_key_shows_its_type_bounds_choices_and_default(key: str, facts: list[str]) -> None:
    head, *lines = describe(key).split("\n")
    assert head == key
    for fact in facts:
        assert f"  {fact}" in lines


def test_every_default_and_description_is_shown_as_the_section_declares_it() -> None:
    for name, field, inner in DECLARED:
        text = " ".join(describe(name).split())
        if field.description:
            assert " ".join(field.description.split()) in text, name
        if inner or field.default_factory or name == "training.loss.name":  # each variant has its name as default
            continue
        if field.is_required():
            assert "default required" in text, name
        else:
            (shown,) = [line for line in describe(name).split("\n") if line.startswith("  default  ")]
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            assert yaml.safe_load(shown.removeprefix("  default  ")) == default, name


def test_a_section_shows_all_its_keys_with_their_whole_descriptions() -> None:
    text = describe("training")
    for name, key in all_keys().items():
        if name.startswith("training."):
            assert f"\n{name}\n" in text
            assert key.description in " ".join(text.split())


def test_all_keys_are_listed_with_type_default_and_first_sentence() -> None:
    lines = [" ".join(line.split()) for line in describe().split("\n")]
    assert "training.keep_last integer = 2 Number of checkpoints to keep." in lines
    assert any(line.startswith("training.beta number, required Strength of the KL penalty") for line in lines)
    listed = {line.partition(" ")[0] for line in lines}
    left_out = {name for name, key in all_keys().items() if "." in name and name not in listed and not key.is_section}
    same_as_others = ("prompts.heldout.", "prompts.validation.", "resources.scorers.")
    same_as_others += ("rewards.vlm_judge.endpoint.", "rewards.vqa.endpoint.")
    assert all(name.startswith(same_as_others) for name in left_out)


def test_keys_of_a_repeated_section_are_described_once_per_page() -> None:
    page = reference_page()
    assert "**`prompts.train.count`**" in page and "**`prompts.heldout.count`**" not in page
    assert "Same keys as `prompts.train`." in page
    assert "\nprompts.heldout.count\n" in describe("prompts.heldout")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("training.bta", r"^unknown key `training\.bta`; did you mean `training\.beta`\?$"),
        ("beta", r"^unknown key `beta`; did you mean `training\.beta`\?$"),
        ("trainin", r"^unknown key `trainin`; did you mean `training`\?$"),
        ("zzz", r"^unknown key `zzz`; the sections are run, rounds, prompts, .*, search, judge$"),
        ("", r"^unknown key ``; the sections are run, "),
        ("\x1b[31m", r"^unknown key `\\x1b\[31m`; the sections are "),
        ("x" * 5000, r"^unknown key `x{200}\.\.\. \(5,000 characters\)`; the sections are "),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_or_with_the_sections(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        describe(name)


def test_keys_are_described_without_torch_and_ray() -> None:
    code = (
        "import sys; from cdpo_ray.config.reference import describe; describe();"
        "print(sorted({'torch', 'ray', 'diffusers', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
