"""Text alignment: batched against single sentence embeddings, missing captions, folders with code."""

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caption_server import Answer, CaptionServer, failing, saying
from safetensors.torch import load_file, save_file
from tiny_captioners import bert_tokenizer, build_blip, build_sentence_encoder
from torch import Tensor
from transformers import BertModel

from cdpo_ray.config import VlmAlignmentOptions
from cdpo_ray.errors import RewardError
from cdpo_ray.rewards.answers import Question
from cdpo_ray.rewards.scorer import Scorer
from cdpo_ray.rewards.vision_language import VisionLanguageModel
from cdpo_ray.rewards.vlm_alignment import SentenceEncoder

SENTENCES = ["a cat plays chess", "the red bird", "", "two dogs and one blue bike of the unknown", "a cat plays chess"]


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_sentence_encoder(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def blip_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_blip(tmp_path_factory.mktemp("models") / "blip")


pytestmark = pytest.mark.usefixtures("local_answers")


@torch.no_grad()
def one_by_one(encoder_dir: Path, sentences: list[str]) -> Tensor:
    """Embeddings in float64, one sentence per call without padding, summed token by token."""
    net, tokenizer = BertModel.from_pretrained(encoder_dir).double().eval(), bert_tokenizer()
    vectors = []
    for sentence in sentences:
        words = tokenizer.tokenize(sentence)[:10]  # two of 12 positions are the start and end token
        token_ids = tokenizer.convert_tokens_to_ids(["[CLS]", *words, "[SEP]"])
        states = net(torch.tensor([token_ids])).last_hidden_state[0]
        mean = sum(states) / len(token_ids)
        vectors.append(mean / mean.square().sum().sqrt())
    return torch.stack(vectors)


def alignment(**options: Any) -> Scorer:
    return Scorer({"vlm_alignment": VlmAlignmentOptions(**options).model_dump()})


def test_sentence_embeddings_are_normalised_means_over_their_tokens(encoder_dir: Path) -> None:
    sentences = [*SENTENCES, "a cat " * 30]
    found = SentenceEncoder(encoder_dir)(sentences)
    np.testing.assert_allclose(found, one_by_one(encoder_dir, sentences), rtol=0, atol=2e-6)


def test_an_encoder_with_another_pooling_is_refused(tmp_path: Path) -> None:
    folder = build_sentence_encoder(tmp_path / "encoder")
    (folder / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    with pytest.raises(RewardError, match=r"`rewards\.vlm_alignment\.sentence_encoder` .*must pool by the mean"):
        SentenceEncoder(folder)


def test_an_encoder_that_lacks_weights_is_refused_unless_they_are_unused(tmp_path: Path) -> None:
    folder = build_sentence_encoder(tmp_path / "encoder")
    weights = load_file(folder / "model.safetensors")
    unpooled = {name: weight for name, weight in weights.items() if not name.startswith("pooler.")}
    save_file(unpooled, folder / "model.safetensors", {"format": "pt"})
    assert len(unpooled) < len(weights) and SentenceEncoder(folder)(["a cat"]).shape == (1, 32)
    del unpooled["embeddings.LayerNorm.bias"]
    save_file(unpooled, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RewardError, match=r"lacks 1 weights of AutoModel, the first 'embeddings\.LayerNorm\.bias'"):
        SentenceEncoder(folder)


def test_the_score_is_the_cosine_of_caption_and_prompt(encoder_dir: Path, blip_dir: Path) -> None:
    images = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(images.float(), (32, 32)).to(torch.uint8)
    captions = captioner(blip_dir, max_tokens=6)(images, [Question("", (number,)) for number in range(3)])
    prompts = ["a cat", captions[1].text, "the blue bike"]
    vectors = one_by_one(encoder_dir, [*(caption.text for caption in captions), *prompts])
    expected = torch.nn.functional.cosine_similarity(vectors[:3], vectors[3:])
    # a captioner with random weights may return an empty caption, and the image has no score (transformers 5.17)
    expected[[bool(caption.fault) for caption in captions]] = torch.nan
    scorer = alignment(captioner=str(blip_dir), sentence_encoder=str(encoder_dir), max_caption_tokens=6)
    found = scorer(images, prompts)["vlm_alignment"]
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert found[1] == pytest.approx(1, abs=1e-6) and np.nanmax(found[[0, 2]]) < 0.99


def served(server: CaptionServer, encoder_dir: Path) -> Scorer:
    endpoint = {"url": server.url, "model": "a-vlm", "max_retries": 0, "num_concurrent_requests": 1}
    return alignment(endpoint=endpoint, sentence_encoder=str(encoder_dir))


def test_an_image_without_a_caption_scores_nan_with_one_warning_and_others_are_scored(
    encoder_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Answer] = [saying("a cat"), failing(500), saying(""), saying("the red bird")]
    images = torch.arange(1, 5, dtype=torch.uint8).reshape(4, 1, 1, 1).expand(4, 3, 8, 8)
    prompts = ["a cat", "a cat", "a cat", "a dog"]
    with CaptionServer(lambda _: answers.pop(0)) as server:
        scorer = served(server, encoder_dir)
        with caplog.at_level(logging.WARNING, logger="cdpo_ray"):
            found = scorer(images, prompts)["vlm_alignment"]
    red_bird, dog = one_by_one(encoder_dir, ["the red bird", "a dog"])
    np.testing.assert_allclose(found, [1, np.nan, np.nan, red_bird @ dog], rtol=0, atol=2e-6)
    assert [record.getMessage() for record in caplog.records] == [
        "reward `vlm_alignment`: 2 of 4 answers are missing or invalid; an image without a caption has no score;"
        f" the first: {server.url}/chat/completions answered with status 500"
    ]


def test_a_batch_without_any_caption_raises_the_reason(encoder_dir: Path) -> None:
    with CaptionServer(lambda _: failing(401)) as server:
        scorer = served(server, encoder_dir)
        with pytest.raises(RewardError, match=r"none of 2 questions was answered: http://.* answered with status 401$"):
            scorer(torch.ones(2, 3, 8, 8, dtype=torch.uint8), ["a cat", "a dog"])


def evil_pickle(canary: Path) -> bytes:
    class Evil:
        def __reduce__(self) -> tuple:
            return Path.mkdir, (canary,)

    return pickle.dumps(Evil())


def add_code(folder: Path, canary: Path, **config: Any) -> None:
    """Add code to the folder, and a configuration that names it as the model's class."""
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(canary)!r}).mkdir()\nclass EvilModel: pass\n")
    given = json.loads((folder / "config.json").read_text())
    maps = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageTextToText"), "evil.EvilModel")
    (folder / "config.json").write_text(json.dumps(given | {"auto_map": maps} | config))


def test_a_folder_with_only_pickled_weights_is_refused_and_does_not_run(tmp_path: Path) -> None:
    folder = build_sentence_encoder(tmp_path / "encoder")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(evil_pickle(tmp_path / "ran"))
    with pytest.raises(
        RewardError, match=r"`rewards\.vlm_alignment\.sentence_encoder` .*/encoder: cannot be loaded as AutoModel: .*"
    ):
        SentenceEncoder(folder)
    assert not (tmp_path / "ran").exists()


def captioner(folder: Path, max_tokens: int = 4) -> VisionLanguageModel:
    key = "rewards.vlm_alignment.captioner"
    return VisionLanguageModel(folder, max_tokens=max_tokens, key=key, captions_only=True)


@pytest.mark.parametrize(("build", "load"), [(build_sentence_encoder, SentenceEncoder), (build_blip, captioner)])
def test_a_model_that_requires_code_in_its_folder_is_refused_and_the_code_does_not_run(
    build: Any, load: Any, tmp_path: Path
) -> None:
    folder = build(tmp_path / "model")
    add_code(folder, tmp_path / "ran", model_type="evil")
    with pytest.raises(RewardError, match=rf"`rewards\..*` {folder}: cannot be loaded as Auto.* contains custom code"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_code_beside_a_model_that_does_not_require_it_does_not_run(encoder_dir: Path, tmp_path: Path) -> None:
    folder = build_sentence_encoder(tmp_path / "encoder")
    add_code(folder, tmp_path / "ran")
    found, expected = SentenceEncoder(folder)(SENTENCES), SentenceEncoder(encoder_dir)(SENTENCES)
    assert torch.equal(found, expected)
    assert not (tmp_path / "ran").exists()
