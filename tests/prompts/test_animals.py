"""The paper's animals and activities."""

from cdpo_ray.prompts.animals import ANIMALS, animal_photo_prompts, animal_prompts

PAPER = """
cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant
butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama
camel bat gorilla hedgehog kangaroo
"""


def test_the_animals_are_the_papers_forty_five() -> None:
    assert PAPER.split() == ANIMALS
    assert len(set(ANIMALS)) == 45


def test_each_animal_does_each_activity_once() -> None:
    prompts = animal_prompts()
    assert len(prompts) == len(set(prompts)) == 135
    for animal in ANIMALS:
        mine = [prompt for prompt in prompts if prompt.split()[1] == animal]
        assert [prompt.split(maxsplit=2)[2] for prompt in mine] == [
            "washing the dishes",
            "riding a bike",
            "playing chess",
        ]


def test_the_article_follows_the_animals_first_letter() -> None:
    assert "an ant playing chess" in animal_prompts()
    assert "a cat washing the dishes" in animal_prompts()
    assert {prompt.split()[1] for prompt in animal_prompts() if prompt.startswith("an ")} == {"ant"}


def test_each_animal_is_photographed_once() -> None:
    photos = animal_photo_prompts()
    assert [photo.split()[-1] for photo in photos] == ANIMALS
    assert {photo.rsplit(maxsplit=1)[0] for photo in photos} == {"a photo of a", "a photo of an"}
    assert "a photo of a cat" in photos and "a photo of an ant" in photos
