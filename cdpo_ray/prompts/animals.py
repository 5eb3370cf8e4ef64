"""The paper's animals: 45 kinds, each at 3 activities (arXiv:2405.13637)."""

ANIMALS = (  # noqa: SIM905 - a list of 45 quoted words is harder to read
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle"
    " ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly"
    " llama camel bat gorilla hedgehog kangaroo"
).split()
ACTIVITIES = ("washing the dishes", "riding a bike", "playing chess")


def animal_prompts() -> list[str]:
    """All 135 prompts, ordered by animal."""
    return [f"{_article(animal)} {animal} {activity}" for animal in ANIMALS for activity in ACTIVITIES]


def animal_photo_prompts() -> list[str]:
    """45 prompts such as ``a photo of a cat``, which the paper judges by aesthetics."""
    return [f"a photo of {_article(animal)} {animal}" for animal in ANIMALS]


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"
