"""The goods: the columns of every table, with shapes and units.

1-samples/samples-*.parquet    a row a prompt, in prompt order
    prompt_index      int64   place of the prompt in the training set
    prompt_id         string  16 hex digits of the prompt's BLAKE2b; safe as a name
    prompt            string
    latents           fixed-shape tensor [sample, channel, height, width], what the sampler ended with
    prompt_embedding  fixed-shape tensor [token, channel], what the denoiser was given
    pooled_embedding  fixed-shape tensor [channel], of families that have one
    num_tokens_cut    int64   tokens of the prompt beyond the text encoder's length
    latents_std       as latents; only of imported images: the posterior's standard deviation (`latents` is its mean)
    score_label       list<float64> a sample, higher is preferred; only of imported images, NaN where there is none
    num_images_cut    int64   of imported images, those that did not have the shape that is trained at
    images            list<binary> PNG a sample; only if `generation.keep_images`
    score_<reward>    list<float64> a sample; only rewards computed with the images
1-samples/set_aside.jsonl, 5-evaluation/set_aside.jsonl   prompts that raised inside the model and have no row, if any
    prompt_index, prompt, reason (of imported images: those that cannot be used, by file and row)
    images, num_images   of a prompt that has a row: which of how many images are black or not finite, without a score

2-scores/<reward>.parquet      a row a sample, in prompt and sample order
    prompt_index, prompt_id, sample_index, score_<reward> float64 (higher is better)
2-scores/label.parquet         as a reward's, of imported images that may be trained on: no prompt held out is there
2-scores/second/<reward>.parquet   the same of the first `rewards.noise_prompts` prompts, scored in other batches

3-stages/stage-<k>/*.parquet   a row a drawn pair, easy to hard; training takes them by `draw`, easy and hard mixed
    stage             int64   1-based
    draw              int64   place in the stage's training order
    prompt_index      int64
    chosen, rejected  int64   sample index of the better and of the worse image
    rank_gap          int64   ranks between the two: large = easy
    score_gap         float64
    within_noise      bool    score_gap is not above the noise of score gaps; null where it was not measured
3-stages/stages.json           what each stage admits and draws, see `curriculum/explanation.py: describe_stage`
3-stages/prompts-<k>.parquet   candidates and draws of each prompt

5-evaluation/comparison.parquet   a row a (held-out prompt, image)
    prompt_index, prompt_id, prompt, sample_index
    base_image, tuned_image                 PNG bytes, made from the same noise
    base_score_<judge>, tuned_score_<judge> float64
    base_<measure>, tuned_<measure> float64 how the image looks: saturation and edge_density 0..1, jpeg_kilobytes
    implicit_value    float32  how much the fine-tuned model favours the base's image, in units of the training error;
                      only if `evaluation.num_margin_draws`
5-evaluation/metrics.json
    judges            a comparison of base and tuned a judge
    diversity         the same of the root-mean-square pixel distance between images of a prompt, 0..1
    appearance        the same a measure of how images look
    agreement         of every two judges: rank correlation within a prompt, -1..1, on the images of each model
    preference_accuracy  a judge: share of pairs of the base's images that the implicit value orders like it

validation/, heldout/   of a search (`cdpo tune`): what the base model makes of these prompts, as `1-samples`
trials/<number>/trial.json, confirmation/<number>-seed-<seed>/trial.json   see `search/trials.py`; each folder is a run
tune.json               what came of it, see `search/findings.py`
"""

import hashlib

SAMPLES, SCORES, STAGES, TRAINING, EVALUATION = "1-samples", "2-scores", "3-stages", "4-training", "5-evaluation"
COMMITS_DIR = "commits"  # of `4-training`, until that is finished
VALIDATION, HELDOUT = "validation", "heldout"  # of a search: what the base model makes of these prompts
TRIALS, CONFIRMATION, FOUND = "trials", "confirmation", "tune.json"
TRIAL = "trial.json"
STEP_FOLDERS = (SAMPLES, SCORES, STAGES, TRAINING, EVALUATION)
PREFERENCE = "preference"  # the reward that judges no image: what people said, or the ranks or scores that came with it
LABEL = "label"  # kept as a reward's scores are, though it does not rank: who was preferred
PERTURBATION = "perturbation"  # the reward that judges no image: how much of its prompt an image was spared
ARMS = ("base", "tuned")
IMPLICIT_VALUE = "implicit_value"
CONDITIONING = ("prompt_embedding", "pooled_embedding")
PIXEL_COLUMNS = {"pixels": "images"} | {f"{arm}_pixels": f"{arm}_image" for arm in ARMS}
"""Column of raw pixels, uint8 ``[sample, 3, height, width]`` per row -> the column of PNGs that is written instead."""
PREDICTED = "predicted"
"""Key of a step's estimate in `status.json` and in the details of its manifest: ``gpu`` (its name) and ``seconds``."""


def prompt_id(prompt: str) -> str:
    """Name of a prompt: 16 hex digits, the same everywhere and always."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def score_file(reward: str, *, second: bool = False) -> str:
    """Where in `2-scores` a reward's scores are, or its second scores."""
    return f"second/{reward}.parquet" if second else f"{reward}.parquet"


def score_column(reward: str) -> str:
    """Column of a reward's scores; an own reward's ``module:function`` is kept as it is."""
    return f"score_{reward}"
