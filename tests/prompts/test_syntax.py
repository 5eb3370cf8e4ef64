"""Syntax of other programs is counted, and plain prompts contain none; text in quotes is found."""

import time

import pytest

from cdpo_ray.prompts.animals import animal_prompts
from cdpo_ray.prompts.syntax import literal_syntax, quoted_texts


@pytest.mark.parametrize(
    ("prompt", "kinds"),
    [
        ("(masterpiece:1.3), a cat", ["weights"]),
        ("((best quality)), 1girl", ["weights"]),
        ("a [cat:dog:0.5] in a hat", ["weights"]),
        ("a cat <lora:owlStyle:0.8>", ["tags"]),
        ("a __season/winter__ light", ["wildcards"]),
        ("{red|blue} bicycle, __season__", ["wildcards", "choices"]),
        ("a cat BREAK a dog", ["BREAK"]),
        ("a cat --ar 16:9", ["options"]),
        ("Negative prompt: lowres", ["settings"]),
        ("Steps: 20, Sampler: Euler a", ["settings"]),
        ("# a comment", ["a"]),
    ],
)
def test_each_syntax_is_reported_with_the_number_of_prompts(prompt: str, kinds: list[str]) -> None:
    lines = literal_syntax([prompt, prompt, "a plain cat"])
    assert [line.split()[3].rstrip(",") for line in lines] == kinds
    assert all(line.startswith("2 prompts contain ") and line.endswith(": read literally") for line in lines)


def test_plain_prompts_hold_no_syntax() -> None:
    plain = [
        "a sign (old, from 1:2 on) that says {hello}",
        "snake_case and __init",
        "step by step: a well-known - cat",
        "[a] b",
    ]
    assert literal_syntax([*animal_prompts(), *plain]) == []


@pytest.mark.parametrize("unit", ["(", "(:", "{|", "{", "|", "[:", "[", "__", "__a", "<lora:", ":1", "_", "-- "])
def test_a_long_prompt_is_searched_in_no_time(unit: str) -> None:
    started = time.process_time()
    literal_syntax([f"{opening}{unit * 20_000}" for opening in ("", "(", "{", "[", "__", "<lora:")])
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "OPEN"', ["OPEN"]),
        ("a cake with “Happy” and “Birthday”", ["Happy", "Birthday"]),
        ("„Guten Tag“ und «Bonjour»", ["Guten Tag", "Bonjour"]),
        ('写着"开门"的牌子, 「営業中」', ["开门", "営業中"]),
        ("a sign 'DON'T STOP', and ‘Tom’s diner’", ["DON'T STOP", "Tom’s diner"]),
        ("say \"the 'A' team\"", ["the 'A' team"]),
        ('a 12" disc called "Hits"', ["Hits"]),
    ],
)
def test_text_in_quotes_is_found(prompt: str, texts: list[str]) -> None:
    assert quoted_texts(prompt) == texts


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat",
        "a dog's house",
        "the dogs' bowls",
        "a '90s poster of the dogs' bowl",
        "rock 'n' roll",
        '12" and 7"',
        '"!" ""',
        '"a',
    ],
)
def test_apostrophes_inches_and_marks_are_no_quoted_text(prompt: str) -> None:
    assert quoted_texts(prompt) == []


@pytest.mark.parametrize("unit", ['"', "'a", " 'a", "“", "«a", " 'a b "])
def test_a_long_prompt_is_searched_for_quotes_in_no_time(unit: str) -> None:
    started = time.process_time()
    quoted_texts(unit * 20_000)
    assert time.process_time() - started < 2
