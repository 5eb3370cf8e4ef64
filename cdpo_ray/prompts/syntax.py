"""Text that a prompt asks for in quotes, and other programs' prompt syntax, which is not interpreted here."""

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

DOUBLE_QUOTED = re.compile(
    r"""(?<!\d)"(?P<straight>[^"]{1,300})\"|“(?P<curly>[^”]{1,300})”|„(?P<low>[^“”]{1,300})[“”]"""
    r"""|«(?P<angled>[^»]{1,300})»|「(?P<corner>[^」]{1,300})」|『(?P<white>[^』]{1,300})』"""
)
"""Text in quotes of any language; a straight quote after a digit means inches."""
SINGLE_QUOTED = re.compile(r"(?<!\w)['‘](?!\d\ds\b|n['’])(?P<text>\S|\S.{0,298}?\S)['’](?!\w)")
"""Text in single quotes, without the apostrophes of dog's, dogs', '90s and 'n'."""


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


def quoted_texts(prompt: str) -> list[str]:
    """Texts in quotes, in order, with a letter or digit; single quotes count only in prompts without double quotes."""
    found = [match[match.lastgroup or 0] for match in DOUBLE_QUOTED.finditer(prompt)]
    found = found or [match["text"] for match in SINGLE_QUOTED.finditer(prompt)]
    return [text for text in found if any(map(str.isalnum, text))]
