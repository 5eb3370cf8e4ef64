"""Table schemas: the columns of every table, with shapes and units.

A tensor is stored as a list of its values, in row-major order, with its shape in the metadata of the field (`shape`).

`1-samples/samples-*.parquet`, one row per prompt, in prompt order; a row group has 4 MiB of tensors, at least one row:

- `prompt_index` int64: position of the prompt in the training set
- `prompt_id` string: 16 hex digits of the prompt's BLAKE2b; safe as a name
- `prompt` string
- `latents` tensor [sample, channel, height, width]: final latents of the sampler
- `prompt_embedding` tensor [token, channel]: conditioning of the denoiser
- `pooled_embedding` tensor [channel]: only for families that have one
- `num_tokens_cut` int64: number of tokens of the prompt beyond the text encoder's maximum
- `latents_std`, as `latents`: imported images only; the posterior's standard deviation (`latents` is its mean)
- `score_label` list of float64 per sample: higher is preferred; imported images only; NaN: no label
- `num_images_cut` int64: imported images only; number of images that were cropped to the training shape
- `images` list of binary: PNG per sample; only if `generation.keep_images`
- `score_<reward>` list of float64 per sample: only rewards that were computed during generation

`1-samples/set_aside.jsonl`, `5-evaluation/set_aside.jsonl`, the quarantine: prompts that failed in the model, if any:

- `prompt_index`, `prompt`, `reason` (imported images: unusable rows, by file and row)
- `images`, `num_images`: of a prompt that has a row; indices of the images without a score (black), number of images

`2-scores/<reward>.parquet`, one row per sample, in prompt and sample order:

- `prompt_index`, `prompt_id`, `sample_index`
- `score_<reward>` float64: higher is better

`2-scores/label.parquet` is the same for the labels of imported images, without held-out prompts;
`2-scores/second/<reward>.parquet` is the same for the first `rewards.noise_prompts` prompts, scored in other batches.

`3-stages/stage-<k>/*.parquet`, one row per drawn pair, easy to hard; training reads them in the order of `draw`:

- `stage` int64: 1-based
- `draw` int64: position in the stage's training order, which mixes easy and hard pairs
- `prompt_index` int64
- `chosen`, `rejected` int64: sample index of the better and of the worse image
- `rank_gap` int64: difference of the two ranks; large is easy
- `score_gap` float64
- `within_noise` bool: whether `score_gap` is within the noise of score gaps; null: the noise was not measured

`3-stages/stages.json` has the candidates and draws of each stage, see `curriculum/explanation.py: describe_stage`;
`3-stages/prompts-<k>.parquet` those of each prompt.

`4-training/previews/prompts.json` has the held-out prompts that are sampled at the end of each stage, if any;
`4-training/previews/stage-<k>/<prompt_id>.png` is an image of each, from the same noise at every stage; stage 0 is the
base model.

`5-evaluation/comparison.parquet`, one row per (held-out prompt, image):

- `prompt_index`, `prompt_id`, `prompt`, `sample_index`
- `category` string: of the prompt, or null; only if some held-out prompts have one
- `base_image`, `tuned_image`: PNG bytes, generated from the same noise
- `base_score_<judge>`, `tuned_score_<judge>` float64
- `base_<measure>`, `tuned_<measure>` float64: appearance; `saturation` and `edge_density` 0..1, `jpeg_kilobytes`
- `implicit_value` float32: how much the fine-tuned model favours the base's image, in units of the training error; only
  if `evaluation.num_margin_draws`

`5-evaluation/metrics.json`:

- `judges`: per judge, comparison of base and tuned; each estimate has `mean`, `low`, `high`, or with fewer than 10
  prompts `mean`, `no_interval` (the reason)
- `diversity`: the same for the root-mean-square pixel distance between images of a prompt, 0..1
- `appearance`: the same per measure of appearance
- `agreement`: per pair of judges, rank correlation within a prompt, -1..1, on the images of each model
- `preference_accuracy`: per judge, share of pairs of the base's images that the implicit value orders like the judge
- `categories`: only if some held-out prompts have one; a list of `category`, `num_prompts`, and `judges`: per judge,
  the comparison on its prompts (null: no finite score), with intervals corrected for the number of categories

`votes/heldout/<voter>.jsonl`, `votes/samples/<voter>.jsonl`, one line per vote of a person (`cdpo rate`), beside the
steps: see `evaluation/votes.py: Vote`.

A search (`cdpo tune`) adds:

- `validation/`, `heldout/`: images of the base model for these prompts, as `1-samples`
- `trials/<number>/trial.json`, `confirmation/<number>-seed-<seed>/trial.json`: see `search/trials.py`; each folder is a
  run
- `tune.json`: results of the search, see `search/findings.py`

`cdpo judge` adds `candidates/<name>/`, each like a run whose prompts are the held-out ones:

- `4-training/` of an adapter: the LoRA, as training writes it
- `1-samples/samples-*.parquet`: `prompt_index`, `prompt_id`, `prompt` and `images`; lists of `saturation`,
  `edge_density` and `jpeg_kilobytes` per image; `diversity`; `num_tokens_cut`
- `2-scores/<judge>.parquet`

and `judge.json`: results, in the layout of `compare.json` of `cdpo compare`
"""

import hashlib

SAMPLES, SCORES, STAGES, TRAINING, EVALUATION = "1-samples", "2-scores", "3-stages", "4-training", "5-evaluation"
COMMITS_DIR = "commits"  # folder of checkpoints in an unfinished `4-training`
REPORT = "report.html"
VOTES = "votes"  # folder of people's votes, beside the steps
PREVIEWS = "previews"  # folder in `4-training`
PREVIEW_PROMPTS = f"{PREVIEWS}/prompts.json"
VALIDATION, HELDOUT = "validation", "heldout"  # of a search: images of the base model for these prompts
TRIALS, CONFIRMATION, FOUND = "trials", "confirmation", "tune.json"
TRIAL = "trial.json"
CANDIDATES, JUDGED = "candidates", "judge.json"
STEP_FOLDERS = (SAMPLES, SCORES, STAGES, TRAINING, EVALUATION)
PREFERENCE = "preference"  # reward that judges no image: human labels, or ranks or scores of the preference data
LABEL = "label"  # labels of preferred images, stored as scores of a reward but not used for ranking
PEOPLE = "people"  # judge whose scores are votes, see `evaluation/people.py`
PERTURBATION = "perturbation"  # reward that judges no image: how little of its prompt was perturbed
ARMS = ("base", "tuned")
IMPLICIT_VALUE = "implicit_value"
CATEGORY = "category"
CONDITIONING = ("prompt_embedding", "pooled_embedding")
PIXEL_COLUMNS = {"pixels": "images"} | {f"{arm}_pixels": f"{arm}_image" for arm in ARMS}
"""Column of raw pixels, uint8 ``[sample, 3, height, width]`` per row -> the column of PNGs that is written instead."""
PREDICTED = "predicted"
"""Key of a step's estimate in `status.json` and in the details of its manifest: ``gpu`` (its name) and ``seconds``."""


def prompt_id(prompt: str) -> str:
    """Identifier of a prompt: 16 hex digits of its BLAKE2b hash."""
    return hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def preview_file(stage: int, prompt: str) -> str:
    """Path within `4-training` of a prompt's image after a stage; stage 0: of the base model."""
    return f"{PREVIEWS}/stage-{stage}/{prompt_id(prompt)}.png"


def score_file(reward: str, *, second: bool = False) -> str:
    """Path within `2-scores` of a reward's scores, or of its second scores."""
    return f"second/{reward}.parquet" if second else f"{reward}.parquet"


def score_column(reward: str) -> str:
    """Name of the column of a reward's scores; a custom reward's ``module:function`` is used unchanged."""
    return f"score_{reward}"
