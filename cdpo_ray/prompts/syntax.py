"""Detection of other programs' prompt syntax, which is not interpreted here."""

import re
from collections.abc import Iterable

SYNTAX = {
    "weights, such as (cat:1.2) or ((cat))": re.compile(r"\([^()]*:\s*[\d.]+\s*\)|\(\(|\[[^\[\]:]+:[^\[\]]*\]"),
    "tags of weights, such as <lora:name:0.8>": re.compile(r"<(?:lora|lyco|hypernet|embedding):[^<>]*>", re.IGNORECASE),
    "wildcards, such as __animal__": re.compile(r"__[\w/*.-]+?__"),
    "choices, such as {red|blue}": re.compile(r"\{[^{}|]*\|[^{}]*\}"),
    "BREAK or AND": re.compile(r"\b(?:BREAK|AND)\b"),
    "options, such as --ar or --neg": re.compile(r"(?:^|\s)--[a-z]"),
    "settings, such as Negative prompt: or Steps:": re.compile(r"^(?:Negative prompt|Steps)\s*:", re.IGNORECASE),
    "a # at the beginning": re.compile(r"^#"),
}
"""Syntax of AUTOMATIC1111, ComfyUI, Midjourney and dynamic prompts, with an example of each."""


def literal_syntax(prompts: Iterable[str]) -> list[str]:
    """One line for each kind of `SYNTAX` that the prompts contain, with the number of prompts."""
    counts = dict.fromkeys(SYNTAX, 0)
    for prompt in prompts:
        for what, pattern in SYNTAX.items():
            counts[what] += pattern.search(prompt) is not None
    return [
        f"{number:,} prompt{'s contain' if number > 1 else ' contains'} {what}: read literally"
        for what, number in counts.items()
        if number
    ]
