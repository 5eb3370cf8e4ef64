"""`vlm_judge`: each mode against probabilities by hand, a server that answers badly, and a planted position bias."""

import base64
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from caption_server import Answer as Reply
from caption_server import CaptionServer, choosing, failing, saying
from tiny_captioners import CHOICES, WORDS, first_token_softmax, smooth_images, token_of
from torch import Tensor

from cdpo_ray.config import VlmJudgeOptions
from cdpo_ray.curriculum.noise import score_noise
from cdpo_ray.dataflow.columns import tensor_column
from cdpo_ray.dataflow.images import decode_png
from cdpo_ray.errors import RewardError
from cdpo_ray.rewards import vlm_judge
from cdpo_ray.rewards.bradley_terry import bradley_terry
from cdpo_ray.rewards.scorer import PixelScorer, Scorer

pytestmark = pytest.mark.usefixtures("local_answers")


def judge(**options: Any) -> dict[str, dict[str, Any]]:
    return {"vlm_judge": VlmJudgeOptions(**options).model_dump(mode="json")}


def served(server: CaptionServer, **options: Any) -> dict[str, dict[str, Any]]:
    endpoint = {"url": server.url, "model": "a-vlm", "max_retries": 0, "num_concurrent_requests": 2}
    return judge(endpoint=endpoint, **options)


def scores(rewards: dict[str, dict[str, Any]], images: Tensor, prompts: list[str]) -> np.ndarray:
    return Scorer(rewards)(images, prompts)["vlm_judge"]


def flat_images(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)


def shown(payload: dict[str, Any]) -> list[int]:
    """Values of the flat images of a request."""
    urls = [part["image_url"]["url"] for part in payload["messages"][0]["content"][:-1]]
    return [int(decode_png(base64.b64decode(url.split(",")[1]))[0, 0, 0]) for url in urls]


def text_of(payload: dict[str, Any]) -> str:
    return payload["messages"][0]["content"][-1]["text"]


@pytest.fixture
def any_mass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with random weights seldom begins its answer with a choice."""
    monkeypatch.setattr(vlm_judge, "MIN_MASS", 0)


@pytest.mark.usefixtures("any_mass")
def test_yes_is_the_softmax_of_a_plain_forward_pass_and_batches_change_nothing(chat_dir: Path) -> None:
    images, prompts = smooth_images(3), ["a red bird", "the blue bike and the dog", "a cat"]
    options = judge(mode="yes_no", checkpoint=str(chat_dir), question="{prompt}")
    found = scores(options, images, prompts)
    for number, prompt in enumerate(prompts):
        asked = f"{prompt} Please answer yes or no."
        known = [word if word in (*WORDS, *CHOICES) else "<unk>" for word in asked.split()]
        expected = first_token_softmax(chat_dir, [images[number]], " ".join(known))
        assert found[number] == pytest.approx(
            sum(expected[token_of(word)].item() for word in ("yes", "Yes", "YES")), abs=1e-5
        )
    alone = [scores(options, images[[number]], [prompt])[0] for number, prompt in enumerate(prompts)]
    np.testing.assert_allclose(found, alone, atol=1e-5)


@pytest.mark.usefixtures("any_mass")
def test_a_rating_is_the_expected_value_over_the_numbers_of_the_scale(chat_dir: Path) -> None:
    images = smooth_images(2)
    found = scores(judge(scale=(1, 2), checkpoint=str(chat_dir), question="{prompt}"), images, ["a cat", "a dog"])
    for number, prompt in enumerate(("a cat", "a dog")):
        words = f"{prompt} <unk> <unk> one <unk> <unk> 1 <unk> <unk>"  # Answer with one number from 1 to 2.
        share = first_token_softmax(chat_dir, [images[number]], words)
        one, two = share[token_of("1")].item(), share[token_of("2")].item()
        assert found[number] == pytest.approx((one + 2 * two) / (one + two), abs=1e-4)


def test_ratings_of_an_endpoint_are_expected_values_and_the_question_has_rubric_and_prompt() -> None:
    shares = {1: {"5": 0.75, "4": 0.25}, 2: {"1": 0.4, " 2": 0.4, "Bad": 0.2}, 3: {"3": 1.0}}
    with CaptionServer(lambda payload: choosing(shares[shown(payload)[0]])) as server:
        found = scores(served(server), flat_images(1, 2, 3), ["a {low} cat", "a dog", "a dog"])
    assert found == pytest.approx([4.75, 1.5, 3])
    texts = {text_of(payload) for _, payload in server.requests}
    assert any('prompt: "a {low} cat". ' in text for text in texts), "braces of a prompt are kept"
    assert all("1 means that it shows nothing" in text and "one number from 1 to 5." in text for text in texts)


def test_json_is_asked_for_and_validated_and_an_invalid_answer_costs_its_image_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    texts = {
        1: '{"rating": 4}',
        2: 'Sure! ```json\n{"rating": 2.5}\n```',
        3: '{"rating": 6}',
        4: '{"rating": "4"}',
        5: '{"rating": true}',
        6: '{"score": 4}',
        7: "4",
        8: '{"rating": NaN}',
        9: "[" * 10_000 + "{" * 10_000 + "}",
        10: '{"rating": 1e999}',
    }
    with CaptionServer(lambda payload: saying(texts[shown(payload)[0]])) as server, caplog.at_level(logging.WARNING):
        found = scores(served(server, read="json"), flat_images(*texts), ["a cat"] * 10)
    np.testing.assert_array_equal(found, [4, 2.5] + [np.nan] * 8)
    assert "JSON alone" in text_of(server.requests[0][1])
    assert [re.sub("; the first:.*", "", message) for message in caplog.messages] == [
        "reward `vlm_judge`: 8 of 10 answers are missing or invalid; such images have no score"
    ]
    assert """must be JSON with a number from 1 to 5 under "rating", got '{"rating": 6}'""" in caplog.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [('{"answer": "Yes"}', 1), ('{"answer": false}', 0), ('{"answer": "maybe"}', np.nan)],
)
def test_yes_as_json_is_one_or_zero(text: str, expected: float) -> None:
    with CaptionServer(lambda _: saying(text)) as server:
        found = scores(served(server, mode="yes_no", read="json"), flat_images(1), ["a cat"])
    np.testing.assert_array_equal(found, [expected])


def test_an_answer_that_is_none_of_the_choices_has_no_score(caplog: pytest.LogCaptureFixture) -> None:
    with CaptionServer(lambda payload: choosing({"yes": 0.9} if shown(payload) == [1] else {"The": 1.0})) as server:
        found = scores(served(server, mode="yes_no"), flat_images(1, 2), ["a cat", "a cat"])
    np.testing.assert_allclose(found, [0.9, np.nan])
    assert "begins with one of the choices with a probability of 0, less than 0.01" in caplog.text


def test_a_server_that_answers_nothing_is_an_error_with_its_reason() -> None:
    with (
        CaptionServer(lambda _: failing(401)) as server,
        pytest.raises(RewardError, match=r"reward `vlm_judge`: none of 2 questions was answered: .* status 401$"),
    ):
        scores(served(server), flat_images(1, 2), ["a cat", "a dog"])


def preferring(strength_per_value: float, position: float, payload: dict[str, Any]) -> Reply:
    """A judge that prefers brighter images, and one position, by log odds."""
    first, second = shown(payload)
    share = 1 / (1 + np.exp(-(strength_per_value * (first - second) + position)))
    return choosing({"1": float(share), "2": float(1 - share)})


VALUES = (40, 10, 30, 20, 60)
TWO_PROMPTS = ["a cat"] * 3 + ["a dog"] * 2


@pytest.mark.parametrize("position", [0.0, 1.0])
def test_pairs_are_shown_in_both_orders_and_scores_are_strengths_within_the_prompt(position: float) -> None:
    with CaptionServer(lambda payload: preferring(0.05, position, payload)) as server:
        found = scores(served(server, mode="pairwise"), flat_images(*VALUES), TWO_PROMPTS)
    asked = sorted((shown(payload), '"a cat"' in text_of(payload)) for _, payload in server.requests)
    cats, dogs = [40, 10, 30], [20, 60]
    assert asked == sorted(
        ([one, other], group is cats) for group in (cats, dogs) for one in group for other in group if one != other
    )
    for group, strengths in ((cats, found[:3]), (dogs, found[3:])):
        log_odds = 0.05 * np.subtract.outer(group, group) + position
        expected, _ = bradley_terry(1 / (1 + np.exp(-log_odds)))
        np.testing.assert_allclose(strengths, expected, atol=1e-6)
        assert np.argsort(strengths).tolist() == np.argsort(group).tolist()
        assert strengths.sum() == pytest.approx(0, abs=1e-9)


def test_a_planted_position_bias_is_reported_once_and_does_not_decide(caplog: pytest.LogCaptureFixture) -> None:
    with (
        CaptionServer(lambda payload: choosing({"1": 1.0})) as server,
        caplog.at_level(logging.INFO, logger="cdpo_ray.rewards.vlm_judge"),
    ):
        scorer = Scorer(served(server, mode="pairwise"))
        for _ in range(2):
            found = scorer(flat_images(*range(1, 6)), ["a cat"] * 5)["vlm_judge"]
            np.testing.assert_allclose(found, np.zeros(5), atol=1e-9)
    first, second = (record for record in caplog.records if record.name == vlm_judge.__name__)
    assert first.levelno == logging.WARNING and second.levelno == logging.INFO
    assert first.getMessage().startswith(
        "reward `vlm_judge`: the image shown first was preferred in 100 % of 20 comparisons; each pair is shown in both"
    )
    assert second.getMessage().endswith("preferred in 100 % of 40 comparisons")


def test_a_judge_without_position_bias_prefers_the_first_image_in_half_of_the_comparisons(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with (
        CaptionServer(lambda payload: preferring(1, 0, payload)) as server,
        caplog.at_level(logging.INFO, logger="cdpo_ray.rewards.vlm_judge"),
    ):
        scores(served(server, mode="pairwise"), flat_images(*range(1, 6)), ["a cat"] * 5)
    (message,) = (record.getMessage() for record in caplog.records if record.name == vlm_judge.__name__)
    assert message.endswith("preferred in 50 % of 20 comparisons")


def test_each_image_is_compared_with_as_many_as_asked_for() -> None:
    with CaptionServer(lambda payload: preferring(0.1, 0, payload)) as server:
        options = served(server, mode="pairwise", opponents=2)
        found = scores(options, flat_images(*range(1, 7)), ["a cat"] * 6)
    pairs = [shown(payload) for _, payload in server.requests]
    assert len(pairs) == 6 * 2 and all((one - other) % 6 in (1, 5) for one, other in pairs)
    assert np.argsort(found).tolist() == list(range(6))


def test_choices_as_json_are_strengths_too_and_an_image_without_comparisons_has_no_score(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(payload: dict[str, Any]) -> Reply:
        first, second = shown(payload)
        if 9 in (first, second):
            return saying('{"better": 1.5}')
        return saying(json.dumps({"better": 1 if first > second else 2}))

    with CaptionServer(answer) as server:
        found = scores(served(server, mode="pairwise", read="json"), flat_images(1, 9, 3), ["a cat"] * 3)
    assert np.isfinite(found).tolist() == [True, False, True] and found[2] > 0 > found[0]
    assert "4 of 6 answers are missing or invalid; a comparison without an answer does not count" in caplog.text
    with CaptionServer(answer) as server:
        assert np.isnan(scores(served(server, mode="pairwise"), flat_images(1), ["a cat"])).all()
        assert not server.requests


def test_the_noise_of_a_pairwise_judge_is_that_of_its_answers() -> None:
    images = flat_images(*range(1, 25)).reshape(6, 4, 3, 8, 8)
    rows = pa.table({"prompt": [f"p{number}" for number in range(6)], "pixels": tensor_column(images.numpy())})
    noise = {}
    for sigma in (0.0, 0.4):
        generator = np.random.default_rng(0)

        def answer(payload: dict[str, Any], sigma: float = sigma, generator: Any = generator) -> Reply:
            return preferring(0.1, 0.3 + sigma * generator.normal(), payload)

        with CaptionServer(answer) as server:
            rewards = served(server, mode="pairwise")
            again = served(server, mode="pairwise")
            again["vlm_judge"]["endpoint"]["reuse"] = False
            first = PixelScorer(rewards, 5)(rows)
            second = PixelScorer(again, 5, mixed=True)(rows)
        assert len(server.requests) == 2 * 6 * 12
        noise[sigma] = score_noise(*(np.array(scored["score_vlm_judge"].to_pylist()) for scored in (first, second)))
    assert noise[0.0] < 1e-9 and 0.05 < noise[0.4] < 0.4
