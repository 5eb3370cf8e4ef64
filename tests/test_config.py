"""A configuration is valid or refused, with every fault named as the user wrote it."""

import ast
import copy
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import cdpo_ray
from cdpo_ray.config import COMBINATIONS, REWARDS, Config, load_config, parse_yaml, validate
from cdpo_ray.config.benchmarks import BENCHMARKS
from cdpo_ray.config.curriculum import DRAWN_BY, MEASURE_NAMES
from cdpo_ray.config.losses import LOSS_VARIANTS
from cdpo_ray.config.rewards import RewardsSection
from cdpo_ray.config.section import sections_in, without_credentials
from cdpo_ray.curriculum.measures import ACCEPTS, MEASURES
from cdpo_ray.curriculum.schedule import Schedule
from cdpo_ray.errors import ConfigError
from cdpo_ray.training.losses import LOSSES

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
PACKAGE = Path(cdpo_ray.__file__).parent


def refused(*overrides: str) -> list[str]:
    """The faults of the quickstart with these overrides."""
    with pytest.raises(ConfigError, match=r"quickstart\.yaml: \d+ fault") as caught:
        load_config(QUICKSTART, overrides)
    head, *faults = str(caught.value).split("\n")
    assert head == f"{QUICKSTART}: {len(faults)} fault{'s' * (len(faults) != 1)}"
    return [fault.removeprefix("  ") for fault in faults]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_from_the_repository_root(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parents[1])
    assert load_config(path).run.name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_values_that_a_run_records_are_its_configuration(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parents[1])
    config = load_config(path)
    assert load_config(config.plain()) == config


def test_full_fine_tuning_records_the_default_lora_and_refuses_another() -> None:
    config = load_config(QUICKSTART, ["training.method=full"])
    assert load_config(config.plain()) == config
    assert refused("training.method=full", "training.lora.rank=3") == [
        "training: `lora` must not be given with `method` 'full', which trains all weights"
    ]


@pytest.mark.parametrize(
    ("family", "multiple"),
    [
        ("stable_diffusion_3", 16),
        ("flux", 16),
        ("flux2", 16),
        ("z_image", 16),
        ("qwen_image", 16),
        ("sana", 32),
    ],
)
def test_images_of_families_with_patches_are_whole_patches(family: str, multiple: int) -> None:
    fits = ("model.family=" + family, f"model.path={PACKAGE}", f"generation.height={1024 + multiple}")
    assert load_config(QUICKSTART, fits).generation.height == 1024 + multiple
    assert refused(*fits, f"generation.width={1024 + multiple // 2}") == [
        f"`generation.width` must be a multiple of {multiple} for the family '{family}', got {1024 + multiple // 2}"
    ]
    assert load_config(QUICKSTART, ("generation.width=1032",)).generation.width == 1032


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    values = parse_yaml(QUICKSTART.read_text(), where="quickstart")
    del values["run"]["name"], values["evaluation"]["judges"]
    values["generation"]["images_per_prompt"] = 1
    values["generation"]["height"] = 30
    values["rewards"]["names"] = ["pickscor"]
    values["model"]["dtype"] = "float8"
    values["training"] |= {"beta": 0, "bta": 3, "zero_stage": 4, "empty_prompt_fraction": 1}
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match="10 faults") as caught:
        load_config(path)
    head, *faults = str(caught.value).split("\n")
    assert head == f"{path}: 10 faults"
    assert set(faults) == {
        "  `run.name` is missing",
        "  `evaluation.judges` is missing",
        "  `generation.images_per_prompt` must be >= 2, got 1",
        "  `generation.height` must be a multiple of 8, got 30",
        f"  `rewards.names.0` must be one of {', '.join(map(repr, REWARDS))} or 'module:function', got 'pickscor';"
        " did you mean 'pickscore'?",
        "  `model.dtype` must be 'float32', 'bfloat16' or 'float16', got 'float8'",
        "  `training.beta` must be > 0, got 0",
        "  unknown key `training.bta`; did you mean `training.beta`?",
        "  `training.zero_stage` must be <= 3, got 4",
        "  `training.empty_prompt_fraction` must be < 1, got 1",
    }


@pytest.mark.parametrize("beta", ["0", "-5", "-1e-9"])
def test_fault_24_a_beta_that_is_not_positive_is_refused(beta: str) -> None:
    assert refused(f"training.beta={beta}") == [f"`training.beta` must be > 0, got {parse_yaml(beta, where='')}"]


@pytest.mark.parametrize("value", [".nan", ".inf"])
def test_a_beta_that_is_no_number_is_refused(value: str) -> None:
    (fault,) = refused(f"training.beta={value}")
    assert fault.startswith("`training.beta` must be a finite number, got ")


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("training.learning_rat=1", "unknown key `training.learning_rat`; did you mean `training.learning_rate`?"),
        ("training.lora.rnk=1", "unknown key `training.lora.rnk`; did you mean `training.lora.rank`?"),
        ("trainin={}", "unknown key `trainin`; did you mean `training`?"),
        ("generation.zzz=1", "unknown key `generation.zzz`"),
        ("rewards.names=[clipp]", "; did you mean 'clip'?"),
    ],
)
def test_fault_24_an_unknown_name_is_refused_with_the_nearest_known_one(wrong: str, hint: str) -> None:
    (fault,) = refused(wrong)
    assert hint in fault
    assert ("did you mean" in fault) == ("did you mean" in hint)


def test_an_empty_list_is_called_empty_and_a_faulty_item_is_reported_once() -> None:
    assert refused("rewards.names=[]") == ["`rewards.names` must not be empty"]
    assert len(refused("rewards.names=[nothing_like_it]")) == 1


def test_a_consistency_model_has_no_more_denoising_steps_than_timesteps() -> None:
    assert refused("model.family=latent_consistency", "generation.num_denoising_steps=51") == [
        "`generation.num_denoising_steps` is 51, but a latent consistency model has only 50 timesteps; lower it:"
        " 1 to 8 are usual"
    ]
    load_config(QUICKSTART, ["model.family=latent_consistency", "generation.num_denoising_steps=50"])


def test_only_the_published_target_of_a_consistency_model_needs_and_has_a_teacher(tmp_path: Path) -> None:
    by_teacher = "training.consistency_target=teacher"
    consistency = ["model.family=latent_consistency", f"model.path={tmp_path}"]
    load_config(QUICKSTART, consistency)
    assert refused(*consistency, by_teacher) == [
        "`model.teacher` must name the model that the consistency model was distilled from"
    ]
    assert refused(*consistency, "model.teacher={path: embedded}") == [
        "`model.teacher` is used with `training.consistency_target` 'teacher' only, got 'image'; leave it out, or set"
        " the target"
    ]
    assert refused(by_teacher) == [
        "`training.consistency_target` 'teacher' needs the family 'latent_consistency', got 'stable_diffusion'"
    ]


@pytest.mark.parametrize(
    ("family", "given", "rule"),
    [
        ("stable_diffusion", None, {}),
        ("stable_diffusion", "sampler", {"num_denoising_steps": 10}),
        ("stable_diffusion", "[249, 499, 749, 999]", {"listed": (249, 499, 749, 999)}),
        ("flux", "{low: 500}", {"low": 500, "high": 1000}),
        ("latent_consistency", None, {"num_denoising_steps": 10}),
        ("latent_consistency", "all", {}),
    ],
)
def test_timesteps_of_training_are_those_of_the_sampler_for_a_consistency_model_else_all(
    family: str, given: str | None, rule: dict[str, object]
) -> None:
    overrides = [f"model.family={family}"] + ([f"training.timesteps={given}"] if given else [])
    assert load_config(QUICKSTART, overrides).timestep_rule == rule


def test_timesteps_that_a_model_does_not_have_are_refused() -> None:
    assert refused("model.family=flux", "training.timesteps=sampler") == [
        "`training.timesteps` 'sampler' is not known for the family 'flux', whose timesteps depend on the image's size;"
        " give a list or a range"
    ]
    assert refused("model.family=latent_consistency", "training.timesteps={low: 20, high: 38}") == [
        "`training.timesteps` 20 to 38 holds none of 19, 39, ..., 999; widen it"
    ]


@pytest.mark.parametrize(
    ("family", "scale", "bounds"),
    [("flux", 4.5, (4.5, 4.5)), ("latent_consistency", 8, (7, 7)), ("latent_consistency", 1, (0, 0))],
)
def test_the_guidance_trained_at_is_the_guidance_sampled_at(
    family: str, scale: float, bounds: tuple[float, float]
) -> None:
    config = load_config(QUICKSTART, [f"model.family={family}", f"generation.guidance_scale={scale}"])
    assert config.guidance_range == bounds


def test_more_stages_than_rank_gaps_are_refused_with_both_remedies() -> None:
    assert refused("curriculum.num_stages=9") == [
        "`curriculum.num_stages` is 9, but 8 images per prompt have only 7 rank gaps; lower it,"
        " or raise `generation.images_per_prompt`"
    ]
    assert load_config(QUICKSTART, ["curriculum.num_stages=7"]).curriculum.num_stages == 7
    assert refused("curriculum.min_rank_gap=5") == [
        "`curriculum.num_stages` is 4, but 8 images per prompt have only 3 rank gaps of at least 5; lower it,"
        " or raise `generation.images_per_prompt`"
    ]
    assert refused("curriculum.min_rank_gap=8") == [
        "`curriculum.min_rank_gap` is 8, but 8 images per prompt have rank gaps of at most 7; lower it,"
        " or raise `generation.images_per_prompt`"
    ]


def test_other_schedules_can_have_more_stages_than_rank_gaps() -> None:
    for other in ("measure=score_gap", "order=none", "preset=released-code"):
        assert load_config(QUICKSTART, [f"curriculum.{other}", "curriculum.num_stages=9"]).curriculum.num_stages == 9


def test_the_papers_schedule_is_the_default() -> None:
    curriculum = load_config(QUICKSTART, ["curriculum.num_stages=5"]).curriculum
    assert Schedule(**curriculum.model_dump(exclude={"preset", "updates_per_stage", "num_margin_draws"})) == Schedule()
    assert curriculum.preset == "paper"


@pytest.mark.parametrize(
    ("ranked_by", "min_score_gap"),
    [("clip", 0.1), ("my:hpsv2", 0.1), ("hpsv2", 0.02), ("vlm_alignment", 0.02), ("aesthetic", 0.2)],
)
def test_the_released_codes_preset_sets_keys_that_are_not_given(ranked_by: str, min_score_gap: float) -> None:
    preset = [
        "curriculum={preset: released-code, updates_per_stage: 5}",
        f"rewards=[{ranked_by}]",
        f"rewards.aesthetic.head={QUICKSTART}",
        "rewards.vlm_alignment={captioner: ., sentence_encoder: .}",
    ]
    config = load_config(QUICKSTART, preset)
    curriculum = config.curriculum
    assert (curriculum.measure, curriculum.boundaries, curriculum.pacing) == ("score_gap", "linear", "cumulative")
    assert (curriculum.order, curriculum.num_stages) == ("easy_to_hard", 5)
    assert curriculum.min_score_gap == min_score_gap
    assert config.plain()["curriculum"]["min_score_gap"] == min_score_gap
    assert Config.model_validate(config.plain()) == config
    given = load_config(QUICKSTART, [*preset, "curriculum.min_score_gap=0", "curriculum.num_stages=3"]).curriculum
    assert (given.min_score_gap, given.num_stages, given.measure) == (0, 3, "score_gap")


def test_the_released_codes_preset_depends_on_the_ranking_reward() -> None:
    ranked = ("rewards=[clip,hpsv2]", "rewards.rank_by=hpsv2", "curriculum.preset=released-code")
    assert load_config(QUICKSTART, ranked).curriculum.min_score_gap == 0.02


def test_the_released_codes_preset_has_no_minimum_gap_of_combined_scores() -> None:
    ranked = ("rewards=[clip,jpeg_size]", "rewards.rank_by=pareto", "curriculum.preset=released-code")
    assert load_config(QUICKSTART, ranked).curriculum.min_score_gap == 0


@pytest.mark.parametrize("rank_by", COMBINATIONS)
def test_every_reward_with_a_weight_counts_in_a_combination(rank_by: str) -> None:
    ranked = ["rewards=[clip,jpeg_size,oracle]", f"rewards.rank_by={rank_by}"]
    assert load_config(QUICKSTART, ranked).rewards.ranking_weights == {"clip": 1, "jpeg_size": 1, "oracle": 1}
    weights = "rewards.weights={jpeg_size: -0.2, oracle: 0}"
    if rank_by == "weighted_sum":
        rewards = load_config(QUICKSTART, [*ranked, weights]).rewards
        assert rewards.ranking_weights == {"clip": 1, "jpeg_size": -0.2}
        assert rewards.ranking_sentence == "weighted_sum of 1 clip, -0.2 jpeg_size"
    else:
        assert refused(*ranked, weights) == [f"rewards: `weights` belong to `rank_by` 'weighted_sum', got '{rank_by}'"]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ("rewards.rank_by=pareto",),
            "rewards: `rank_by` 'pareto' needs at least two rewards with a weight, got ['clip']; add more to `names`",
        ),
        (
            ("rewards=[clip,jpeg_size]", "rewards.rank_by=weighted_sum", "rewards.weights={oracle: 1}"),
            "rewards: `weights` must be of `names` ['clip', 'jpeg_size'], got ['oracle']",
        ),
        (
            ("curriculum.min_gap_in_noise=2",),
            "`curriculum.min_gap_in_noise` needs `rewards.noise_prompts`, the number of prompts to score twice",
        ),
        (
            ("rewards=[clip,'m:f']", "rewards.arguments={jpeg_size: {quality: 50}}"),
            "`rewards.arguments` must be of your own rewards among `rewards.names` and `evaluation.judges`, which are"
            " ['m:f'], got 'jpeg_size'",
        ),
        (
            ("run.samples_from=runs/other", "rounds=2"),
            "`run.samples_from` gives the images of one round, but `rounds` is 2; leave out one",
        ),
    ],
)
def test_what_a_ranking_lacks_is_reported(overrides: tuple[str, ...], fault: str) -> None:
    assert refused(*overrides) == [fault]


def test_a_misspelt_ranking_is_refused_with_the_known_ones() -> None:
    (fault,) = refused("rewards.rank_by=paretto")
    assert "'perturbation', 'preference', 'weighted_sum', 'mean_rank', 'pareto' or" in fault
    assert fault.endswith("got 'paretto'; did you mean 'pareto'?")


def test_plain_dpo_draws_from_all_pairs_in_every_stage() -> None:
    config = load_config(QUICKSTART, ["curriculum.preset=plain-dpo"])
    assert config.curriculum.order == "none"
    assert Config.model_validate(config.plain()) == config


def test_a_window_is_two_stages_unless_given_and_belongs_to_its_pacing() -> None:
    sliding = "curriculum.pacing=sliding_window"
    config = load_config(QUICKSTART, [sliding])
    assert config.curriculum.window == 2
    assert Config.model_validate(config.plain()) == config
    assert load_config(QUICKSTART, [sliding, "curriculum.window=3"]).curriculum.window == 3
    assert refused("curriculum.window=3") == [
        "curriculum: `window` belongs to `pacing` 'sliding_window', got 'cumulative'"
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "`measure` 'margin' needs `boundaries` 'equal_count', got 'linear'"),
        (
            ("boundaries=equal_count", "draws=by_measure"),
            "`measure` 'margin' can be negative, so `draws` must be 'uniform', got 'by_measure'",
        ),
        (
            ("boundaries=equal_count", "order=shuffled"),
            "`measure` 'margin' is measured during training, so `order` must be 'easy_to_hard' or 'hard_to_easy',"
            " got 'shuffled'",
        ),
    ],
)
def test_a_margin_needs_choices_that_training_can_measure(overrides: tuple[str, ...], message: str) -> None:
    assert refused("curriculum.measure=margin", *(f"curriculum.{each}" for each in overrides)) == [
        f"curriculum: {message}"
    ]


def test_a_margin_with_equal_counts_is_accepted() -> None:
    margin = ("curriculum.measure=margin", "curriculum.boundaries=equal_count", "curriculum.order=hard_to_easy")
    assert load_config(QUICKSTART, margin).curriculum.measure == "margin"


def test_an_unknown_preset_and_a_section_that_is_no_mapping_are_refused() -> None:
    assert refused("curriculum.preset=papr") == [
        "`curriculum.preset` must be 'paper', 'released-code' or 'plain-dpo', got 'papr'"
    ]
    assert len(refused("curriculum=3")) == 1


def test_fault_24_a_repeated_key_is_refused_with_its_line() -> None:
    text = "run:\n  name: one\n  seed: 1\n  name: two\n"
    with pytest.raises(ConfigError, match=r"^x\.yaml:4:3: not valid YAML: key `name` is given twice$"):
        parse_yaml(text, where="x.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-5", 1e-5), ("5E3", 5000.0), ("-2.5e2", -250.0), (".5e1", 5.0), ("1.0e-4", 1e-4), ("+1e0", 1.0)],
)
def test_a_number_with_an_exponent_is_a_float(text: str, value: float) -> None:
    read = parse_yaml(text, where="x")
    assert isinstance(read, float) and read == value


@pytest.mark.parametrize("text", ["e5", "1e", "0x1e5", "1e5x", "12", "a1e5"])
def test_text_that_resembles_an_exponent_is_read_as_yaml_reads_it(text: str) -> None:
    assert parse_yaml(text, where="x") == yaml.safe_load(text)


def test_fault_24_a_python_tag_is_refused_and_does_not_run(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "evil.yaml"
    path.write_text(f'run: !!python/object/apply:os.system ["touch {mark}"]\n')
    with pytest.raises(ConfigError, match=r"evil\.yaml:1:6: not valid YAML: could not determine a constructor"):
        load_config(path)
    assert not mark.exists()


def test_broken_yaml_is_refused_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"^x\.yaml:2:\d+: not valid YAML"):
        parse_yaml("run: {name: one\nmodel: [", where="x.yaml")


def test_a_file_that_is_missing_not_text_or_no_mapping_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: .*No such file"):
        load_config(tmp_path / "nowhere.yaml")
    (tmp_path / "latin.yaml").write_bytes("run: {name: café}".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: cannot be read: .*utf-8"):
        load_config(tmp_path / "latin.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match=r"list\.yaml: must be a mapping of sections, got list"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.yaml: must be a mapping of sections, got NoneType"):
        load_config(tmp_path / "empty.yaml")


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + QUICKSTART.read_bytes())
    assert load_config(tmp_path / "bom.yaml") == load_config(QUICKSTART)


def nested(names: str, inner: str) -> str:
    """Anchors, each of which refers nine times to the one before."""
    pairs = itertools.pairwise(names)
    return f"a: &a {{x: 1}}\n{''.join(f'{b}: &{b} {inner}' % ', '.join([f'*{a}'] * 9) + chr(10) for a, b in pairs)}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested("abcdefghijk", "[%s]"), r"5:\d+: not valid YAML: more than 10,000 values, targets of aliases"),
        (nested("abcdefghijk", "{<<: [%s]}"), r"5:\d+: not valid YAML: more than 10,000 values"),
        (f"a: &a {'x' * 90_000}\nb: [{'*a, ' * 20}]", r"2:\d+: not valid YAML: more than 10,000 values"),
        ("a: &a [*a]", "1:8: not valid YAML: an alias refers to a value that contains it"),
        ("a: &a {<<: *a}", "1:12: not valid YAML: an alias refers to a value that contains it"),
        (f"a: {'1' * 5000}", "1:4: not valid YAML: a number of 5,000 characters; at most 50 are allowed"),
        (f"a: 0x{'f' * 5000}", "1:4: not valid YAML: a number of 5,002 characters"),
        (f"a: 1{':1' * 5000}.5", "1:4: not valid YAML: a number of 10,003 characters"),
        (f"%YAML {'1' * 5000}.1\n---\na: 1", "not valid YAML: Exceeds the limit"),
        ("[" * 10_000, "1:31: not valid YAML: values are nested deeper than 30 levels"),
        ("{a: " * 10_000, r"1:\d+: not valid YAML: values are nested deeper than 30 levels"),
        ("".join(f"{' ' * depth}-\n" for depth in range(300)), "31:31: not valid YAML: values are nested deeper"),
        (f"[{'0, ' * 30_000}]", r"1:\d+: not valid YAML: more than 10,000 values"),
        ("a: &b 1\nc: *" + "d" * 5000, r"2:4: not valid YAML: found undefined alias 'd+\.\.\.d+'$"),
        ("1: a", "1:1: not valid YAML: a key must be text, got int '1'; quote it"),
        ("on: a", "1:1: not valid YAML: a key must be text, got bool 'on'; quote it"),
        ("? [a]\n: b", "1:3: not valid YAML: a key must be text, got seq"),
        ("a: 1\nb: \0", r"2: not valid YAML: holds the character U\+0000, which YAML does not allow"),
        ('a: "\\UFFFFFFFF"', "not valid YAML: "),
        ("a: !!bool foo", "1:4: not valid YAML: 'foo' is not a valid bool"),
        ('a: !!int ""', "1:4: not valid YAML: '' is not a valid int"),
        ("a: !!binary aGk=", "1:4: not valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 1", "2:1: not valid YAML: but found another document"),
    ],
)
def test_fault_54_yaml_that_would_take_long_or_break_the_parser_is_one_line_with_its_place(
    text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"^x\.yaml:(| ){message}") as caught:
        parse_yaml(text, where="x.yaml")
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)
    if "\n" not in text and "\0" not in text:
        with pytest.raises(ConfigError, match=r"^override 'run="):
            load_config(QUICKSTART, [f"run={text}"])


def test_a_date_is_text_and_merge_keys_do_not_override_given_keys() -> None:
    assert load_config(QUICKSTART, ["run.name=2026-11-26"]).run.name == "2026-11-26"
    assert parse_yaml("a: 2026-99-99", where="x") == {"a": "2026-99-99"}
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, *a], z: 4}\nd: *b"
    b = {"x": 1, "y": 3}
    assert parse_yaml(text, where="x") == {"a": {"x": 1, "y": 2}, "b": b, "c": b | {"z": 4}, "d": b}


def test_an_override_of_a_value_that_has_an_alias_changes_no_other(tmp_path: Path) -> None:
    text = QUICKSTART.read_text().replace("generators: {num", "generators: &pool {num")
    path = tmp_path / "alias.yaml"
    path.write_text(text.replace("scorers: {num_actors: 2}", "scorers: *pool"))
    resources = load_config(path, ["resources.generators.num_actors=3"]).resources
    assert (resources.generators.num_actors, resources.scorers.num_actors) == (3, 2)


def test_fault_54_many_faults_are_counted_and_the_first_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(QUICKSTART.read_text() + "".join(f"key_{number}: 1\n" for number in range(4000)))
    with pytest.raises(ConfigError, match=r": 4,000 faults\n") as caught:
        load_config(path)
    lines = str(caught.value).split("\n")
    assert lines[1] == "  unknown key `key_0`" and lines[-1] == "  and 3,980 more" and len(lines) == 22
    path.write_text("".join(f"key_{number}: 1\n" for number in range(20_000)))
    with pytest.raises(ConfigError, match=r"keys\.yaml: has more than 100,000 characters"):
        load_config(path)


def test_fault_54_long_values_and_keys_are_shortened_with_control_characters_escaped() -> None:
    (fault,) = refused(f"run.name={'x' * 50_000}")
    assert fault == f"`run.name` must have at most 100 characters, got '{'x' * 99}...{'x' * 49}'"
    assert refused(f"model.path={'x' * 50_000}")[0].startswith("model: `path` must be 'embedded', an existing folder")
    assert len(refused(f"model.path={'x' * 50_000}")[0]) < 1000
    (fault,) = refused('run={name: x, "\\e[31m": 1}')
    assert fault == r"unknown key `run.\x1b[31m`"
    assert refused(f"{'k' * 5000}=1") == [f"unknown key `{'k' * 100}...{'k' * 50}`"]
    with pytest.raises(ConfigError, match=r"has 5,000 nested sections; no key is that deep") as caught:
        load_config(QUICKSTART, [f"{'a.' * 5000}b=1"])
    assert len(str(caught.value)) < 400
    (fault,) = refused(f"model.revision={{a: 'https://me:5ec2e7{'7' * 300}@host'}}")
    assert "5ec2e7" not in fault


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_fault_54_a_config_that_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "config.yaml"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    what = {"folder": "a folder", "pipe": "not a regular file"}[kind]
    with pytest.raises(ConfigError, match=f"{path}: is {what}; give the path of a YAML file"):
        load_config(path)


def test_overrides_change_what_they_name_and_nothing_else() -> None:
    plain = load_config(QUICKSTART).plain()
    changed = load_config(QUICKSTART, ["training.lora.rank=4", "run.name=other", "training.learning_rate=1e-5"]).plain()
    plain["training"]["lora"]["rank"] = 4
    plain["run"]["name"] = "other"
    plain["training"]["learning_rate"] = 1e-5
    assert changed == plain


def test_values_and_overrides_may_be_dictionaries_which_stay_unchanged() -> None:
    values = parse_yaml(QUICKSTART.read_text(), where="quickstart")
    overrides = {"training.lora": {"rank": 4}, "training.lora.alpha": 8, "rewards": ["clip", "jpeg_size"], "rounds": 2}
    given, names = copy.deepcopy((values, overrides)), ("training.lora.rank=4", "training.lora.alpha=8", "rounds=2")
    config = load_config(values, overrides)
    assert config == load_config(QUICKSTART, [*names, "rewards=[clip,jpeg_size]"])
    assert (values, overrides) == given
    with pytest.raises(ConfigError, match=r"^configuration: 1 fault\n  unknown key `training.bta`; did you mean"):
        load_config(values, {"training.bta": 2000})
    with pytest.raises(ConfigError, match=r"^override 'training.beta.x': `beta` is a value, not a section"):
        load_config(QUICKSTART, {"training.beta.x": 3})
    with pytest.raises(ConfigError, match=r"^configuration: \d+ faults\n  `run` is missing"):
        load_config({})


def test_the_short_form_of_rewards_sets_their_names() -> None:
    rewards = load_config(QUICKSTART, ["rewards=[clip,jpeg_size]", "rewards.rank_by=jpeg_size"]).rewards
    assert rewards.names == ("clip", "jpeg_size")
    assert rewards.ranking_reward == "jpeg_size"


def test_the_first_reward_ranks_unless_another_is_named() -> None:
    assert load_config(QUICKSTART, ["rewards=[jpeg_size,clip]"]).rewards.ranking_reward == "jpeg_size"
    assert refused("rewards.rank_by=oracle") == [
        "rewards: `rank_by` must be one of `names` ['clip'], or 'weighted_sum', 'mean_rank', 'pareto', got 'oracle'",
    ]
    assert refused("rewards=[clip,clip]") == ["rewards: `names` must not repeat a reward, got ['clip', 'clip']"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.beta", "must be `section.key=value`, for example `training.beta=2000`"),
        ("=3", "must be `section.key=value`"),
        ("training.beta.x=3", "`beta` is a value, not a section"),
        ("run.name=[", "not valid YAML"),
    ],
)
def test_an_override_that_cannot_be_read_is_quoted(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match="override") as caught:
        load_config(QUICKSTART, [override])
    assert repr(override) in str(caught.value) and message in str(caught.value)


@pytest.mark.parametrize("revision", [None, "main", "a" * 39, "A" * 40, "g" * 40])
def test_a_hub_id_needs_a_full_commit(revision: str | None) -> None:
    (fault,) = refused("model.path=someone/some-model", f"model.revision={revision or 'null'}")
    assert fault == (
        "model: `path` 'someone/some-model' is not a local folder, so it is read as a hub id, which needs `revision`"
        f" (a full commit of 40 hex digits), got {revision!r}; the history of the hub page's `Files and versions` lists"
        " the commits; as a folder it would be"
        f" {Path.cwd()}/someone/some-model (relative paths start at the working directory)"
    )


def test_a_hub_id_with_a_full_commit_is_accepted() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = load_config(QUICKSTART, ["model.path=someone/some-model", f"model.revision='{commit}'"]).model
    assert (model.path, model.revision) == ("someone/some-model", commit)


@pytest.mark.parametrize("path", ["./nowhere/x", "../nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_a_model_folder_that_is_missing_is_named(path: str) -> None:
    assert refused(f"model.path={path}") == [
        f"model: `path` must be 'embedded', an existing folder or a hub id, got {path!r}: no folder"
        f" {os.path.abspath(path)}{'' if path.startswith('/') else ' (relative paths start at the working directory)'}"
    ]


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("clip.pt", "HPSv3.safetensors", "head.pth", "vocab.txt", "ImageReward.pt", "prompts.txt"):
        (tmp_path / name).touch()
    given = {
        "run.dir": "runs",
        "run.samples_from": "runs/other",
        "prompts.train.source": "prompts.txt",
        "model.path": ".",
        "rewards.clip.checkpoint": ".",
        "rewards.hpsv2.checkpoint": "clip.pt",
        "rewards.hpsv3.checkpoint": "HPSv3.safetensors",
        "rewards.hpsv3.processor": ".",
        "rewards.unifiedreward.checkpoint": ".",
        "rewards.pickscore.checkpoint": ".",
        "rewards.pickscore.processor": ".",
        "rewards.aesthetic.head": "head.pth",
        "rewards.aesthetic.checkpoint": ".",
        "rewards.imagereward.checkpoint": "ImageReward.pt",
        "rewards.imagereward.vocabulary": "vocab.txt",
        "rewards.vlm_alignment.captioner": ".",
        "rewards.vlm_judge.checkpoint": ".",
        "rewards.vqa.checkpoint": ".",
        "rewards.vqa.questions": "questions.jsonl",
        "rewards.vlm_alignment.sentence_encoder": ".",
        "tracking.mlflow.tracking_uri": "mlruns",
    }
    overrides = [f"{key}=~/{name}" for key, name in given.items()]
    (tmp_path / "my.yaml").write_bytes(QUICKSTART.read_bytes())
    config = load_config(
        "~/my.yaml", ["rewards.clip.architecture=ViT-B-32", "tracking.mlflow.experiment=e", *overrides]
    ).plain()
    for key, name in given.items():
        found = config
        for part in key.split("."):
            found = found[part]
        assert found == f"{tmp_path}/{name}", key
    judged = ["prompts.train=null", "preferences={path: '~/a b/*.parquet', format: pairs}", "curriculum.order=none"]
    preferences = load_config(QUICKSTART, judged).preferences
    assert preferences is not None and preferences.path == f"{tmp_path}/a b/*.parquet"


def test_a_single_file_is_completed_by_the_pinned_configuration_of_its_family(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    for family, name in (("stable_diffusion", "sd15"), ("stable_diffusion_xl", "sdxl")):
        model = load_config(QUICKSTART, [f"model.path={path}", f"model.family={family}"]).model
        published = load_config(QUICKSTART.with_name(f"{name}.yaml")).model
        assert model.config is not None
        assert model.config.model_dump() == {"path": published.path, "revision": published.revision}
        assert model.layout is model.config and published.layout is published
        assert validate({**load_config(QUICKSTART).plain(), "model": model.model_dump()}, where="x").model == model
    own = load_config(QUICKSTART, [f"model.path={path}", "model.config={path: embedded}"]).model
    assert own.layout.path == "embedded"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.path={0}.ckpt"], r"`path` must be .* or a \.safetensors file, .* pickled checkpoints"),
        (["model.path={0}.safetensors", "model.family=flux"], r"single files are loaded for stable_diffusion and"),
        (["model.config={{path: embedded}}"], r"`config` completes a single file, got no file"),
        (["model.path=models/none.safetensors"], r"no file /.*models/none\.safetensors \(relative paths start at"),
        (["model.path={0}.safetensors", "model.config={{path: {0}.safetensors}}"], r"got the file"),
        (["model.path={0}.safetensors", "model.config={{path: a/b}}"], r"needs `revision`"),
    ],
    ids=range(6),
)
def test_fault_37_single_files_that_are_not_loaded_are_refused(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    for suffix in (".ckpt", ".safetensors"):
        (tmp_path / f"model{suffix}").touch()
    with pytest.raises(ConfigError, match=message):
        load_config(QUICKSTART, [override.format(tmp_path / "model") for override in overrides])


def test_a_clip_checkpoint_must_be_a_folder_or_a_pinned_hub_id(tmp_path: Path) -> None:
    assert "`checkpoint` must be a folder or a hub id" in refused("rewards.clip.architecture=ViT-B-32")[0]
    both = ("rewards.clip.architecture=ViT-B-32", "rewards.clip.checkpoint=someone/clip")
    assert "`revision` must be a commit of 40 hex digits for a hub id, got None" in refused(*both)[0]
    missing = ("rewards.clip.architecture=ViT-B-32", "rewards.clip.checkpoint=/nowhere/clip.pt")
    assert "`checkpoint` must be an existing folder or a hub id, got '/nowhere/clip.pt'" in refused(*missing)[0]
    there = ("rewards.clip.architecture=ViT-B-32", f"rewards.clip.checkpoint={tmp_path}")
    assert load_config(QUICKSTART, there).rewards.clip.architecture == "ViT-B-32"


def test_imagereward_needs_a_checksum_only_where_it_is_used(tmp_path: Path) -> None:
    fault = (
        "`rewards.imagereward.sha256` must be the SHA-256 of ImageReward.pt: the hub shows it on the file's page, and"
        " `sha256sum` prints that of a file"
    )
    assert refused("rewards=[clip,imagereward]") == refused("evaluation.judges=[imagereward]") == [fault]
    (tmp_path / "vocab.txt").touch()
    options = f"{{sha256: {'b' * 64}, vocabulary: {tmp_path / 'vocab.txt'}, vocabulary_revision: null}}"
    given = load_config(QUICKSTART, ["rewards=[imagereward]", f"rewards.imagereward={options}"]).rewards
    assert given.options("imagereward") == {
        "checkpoint": "zai-org/ImageReward",
        "revision": "5736be03b2652728fb87788c9797b0570450ab72",
        "sha256": "b" * 64,
        "vocabulary": str(tmp_path / "vocab.txt"),
        "vocabulary_revision": None,
    }


def test_vlm_alignment_needs_a_captioner_only_where_it_is_used() -> None:
    assert refused("rewards=[vlm_alignment]") == [
        "`rewards.vlm_alignment` must have a `captioner` (a folder or a hub id), or an `endpoint`"
    ]
    endpoint = "rewards.vlm_alignment.endpoint={url: 'http://localhost:8000/v1', model: a-vlm}"
    given = load_config(QUICKSTART, ["rewards=[vlm_alignment]", endpoint]).rewards.options("vlm_alignment")
    assert given["endpoint"]["timeout_seconds"] == 60 and given["captioner"] is None


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        (
            "captioner: ., endpoint: {url: 'http://a/v1', model: m}",
            "`captioner` and `endpoint` must not be given together",
        ),
        ("captioner: ./nowhere/at/all", "`captioner` must be an existing folder or a hub id, got './nowhere/at/all'"),
        ("captioner: some/one, captioner_revision: main", "`captioner_revision` must be a commit of 40 hex digits"),
        ("sentence_encoder_revision: null", "`sentence_encoder_revision` must be a commit of 40 hex digits"),
    ],
)
def test_the_models_of_vlm_alignment_are_local_or_pinned(options: str, fault: str) -> None:
    (found,) = refused(f"rewards.vlm_alignment={{{options}}}")
    assert found.startswith(f"rewards.vlm_alignment: {fault}")


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ["rewards=[vlm_judge]"],
            "`rewards.vlm_judge` must have a `checkpoint` (a folder or a hub id), or an `endpoint`",
        ),
        (["rewards=[vqa]"], "`rewards.vqa` must have a `checkpoint` (a folder or a hub id), or an `endpoint`"),
        (
            ["rewards=[vqa]", "rewards.vqa.checkpoint=."],
            "`rewards.vqa.questions` is missing: a JSONL file of questions; `cdpo questions` writes one",
        ),
        (
            ["rewards.vqa={checkpoint: ., endpoint: {url: 'http://a/v1', model: m}}"],
            "rewards.vqa: `checkpoint` and `endpoint` must not be given together; leave out one",
        ),
        (
            ["rewards.vlm_judge={checkpoint: some/one, revision: main}"],
            "rewards.vlm_judge: `revision` must be a commit of 40 hex digits for a hub id, got 'main'",
        ),
        (
            ["rewards.vlm_judge={mode: yes_no, scale: [0, 9]}"],
            "rewards.vlm_judge: `scale` belongs to `mode` 'rating', got 'yes_no'; leave it out",
        ),
        (
            ["rewards.vlm_judge.opponents=4"],
            "rewards.vlm_judge: `opponents` belongs to `mode` 'pairwise', got 'rating'; leave it out",
        ),
        (
            ["rewards.vlm_judge.scale=[5, 1]"],
            "rewards.vlm_judge: `scale` must be the lowest and the highest rating, got [5, 1]",
        ),
        (
            ["rewards.vlm_judge.question=Is it good?"],
            "rewards.vlm_judge: `question` must contain {prompt}, which stands for the prompt",
        ),
        (
            ["evaluation.judges=[vlm_judge]", "rewards.vlm_judge={checkpoint: ., mode: pairwise}"],
            "`evaluation.judges` must not have 'vlm_judge' with `mode: pairwise`, whose scores compare the images of"
            " one model with each other, not those of two models; name another judge",
        ),
    ],
)
def test_a_vision_language_judge_needs_a_pinned_model_and_options_of_its_mode(overrides: list[str], fault: str) -> None:
    (found,) = refused(*overrides)
    assert found.startswith(fault)


def test_a_pairwise_judge_ranks_but_does_not_evaluate_and_is_not_asked_while_images_are_generated() -> None:
    config = load_config(
        QUICKSTART, ["rewards=[vlm_judge,clip]", "rewards.vlm_judge={checkpoint: ., mode: pairwise, opponents: 4}"]
    )
    assert config.rewards.ranking_reward == "vlm_judge" and list(config.rewards.judges) == ["vlm_judge", "clip"]
    assert list(config.rewards.judges_of_one_image) == ["clip"]
    assert "vlm_judge" not in config.evaluation_judges
    rated = load_config(QUICKSTART, ["rewards=[vlm_judge]", "rewards.vlm_judge.checkpoint=."])
    assert "vlm_judge" in rated.evaluation_judges and list(rated.rewards.judges_of_one_image) == ["vlm_judge"]


def test_a_second_scoring_asks_an_endpoint_again() -> None:
    endpoint = "{url: 'http://localhost:8000/v1', model: a-vlm}"
    config = load_config(QUICKSTART, [f"rewards.vlm_judge.endpoint={endpoint}"])
    first, second = (config.rewards.options("vlm_judge", again=again) for again in (False, True))
    assert "reuse" not in first["endpoint"] and second["endpoint"].pop("reuse") is False and first == second
    assert config.rewards.options("clip", again=True) == config.rewards.options("clip")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a/v1",
        "a/v1",
        "http://me:secret@a/v1",
        "http://me:secret/with/slashes@a/v1",
        "http://me:secret with spaces@a/v1",
        "http://secret@a/v1",
        "me:secret@a/v1",
        "http://a/v1?key=secret",
        "http://a/v1?secret",
        "http://a/v1?x=1&api_key=secret",
        "http://a/v1#secret",
        "http://a/v1?key='secret'",
        "http://me:'secret@a/v1",
        "a/v1?api_key=secret",
    ],
)
def test_fault_62_an_endpoint_is_a_plain_url_and_a_secret_in_it_is_not_shown(url: str) -> None:
    (fault,) = refused(f'rewards.vlm_alignment.endpoint={{url: "{url}", model: m}}')
    assert fault.startswith("`rewards.vlm_alignment.endpoint.url` must be an http or https URL without user, password")
    (other,) = refused(f'rewards.vlm_alignment.endpoint="{url}"')
    with pytest.raises(ConfigError, match=r"^override ") as unparsed:
        load_config(QUICKSTART, (f'rewards.vlm_alignment.endpoint={{url: "{url}"',))
    assert "secret" not in f"{fault}{other}{unparsed.value}"
    assert without_credentials(fault) == fault and fault.endswith("name it in `token_variable`")


@pytest.mark.parametrize(
    ("reward", "key", "kind"),
    [
        ("hpsv2", "checkpoint", "file"),
        ("hpsv3", "checkpoint", "file"),
        ("hpsv3", "processor", "folder"),
        ("unifiedreward", "checkpoint", "folder"),
        ("pickscore", "checkpoint", "folder"),
        ("pickscore", "processor", "folder"),
        ("aesthetic", "checkpoint", "folder"),
        ("imagereward", "checkpoint", "file"),
        ("imagereward", "vocabulary", "file"),
    ],
)
def test_published_weights_are_a_pinned_hub_id_or_local(reward: str, key: str, kind: str, tmp_path: Path) -> None:
    revision_key = "revision" if key == "checkpoint" else f"{key}_revision"
    where = f"rewards.{reward}"
    here = tmp_path if kind == "folder" else tmp_path / "weights.pt"
    (tmp_path / "weights.pt").touch()
    load_config(QUICKSTART, (f"{where}.{key}={here}", f"{where}.{revision_key}=null"))
    assert refused(f"{where}.{revision_key}=main") == [
        f"{where}: `{revision_key}` must be a commit of 40 hex digits for a hub id, got 'main'; the history of the hub"
        " page's `Files and versions` lists the commits"
    ]
    assert refused(f"{where}.{key}=/nowhere/at/all") == [
        f"{where}: `{key}` must be an existing {kind} or a hub id, got '/nowhere/at/all': no {kind} /nowhere/at/all"
    ]


@pytest.mark.parametrize("key", ["hpsv2.sha256", "aesthetic.head_sha256", "imagereward.sha256"])
def test_a_checksum_is_64_hex_digits(key: str) -> None:
    assert refused(f"rewards.{key}={'A' * 64}") == [f"`rewards.{key}` must match ^[0-9a-f]{{64}}$, got '{'A' * 64}'"]


@pytest.mark.parametrize("use", ["rewards=[aesthetic]", "evaluation.judges=[aesthetic]"])
def test_a_missing_reward_option_is_a_fault_where_the_reward_is_used(use: str, tmp_path: Path) -> None:
    (fault,) = refused(use)
    assert fault.startswith("`rewards.aesthetic.head` is missing: the path of sac+logos+ava1-l14-linearMSE.pth, ")
    (tmp_path / "head.pth").touch()
    assert load_config(QUICKSTART, (use, f"rewards.aesthetic.head={tmp_path / 'head.pth'}"))
    assert refused("rewards.aesthetic.head=/nowhere/head.pth") == [
        "rewards.aesthetic: `head` must be an existing file, got '/nowhere/head.pth': no file /nowhere/head.pth"
    ]


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    assert refused("training.batch_size_per_worker=3") == [
        "training: `global_batch_size` must be a multiple of `num_workers` x `batch_size_per_worker` = 6, got 16"
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("resources.trainers.gpus_per_worker=0.5", "training.num_workers=2"),
            "`resources.trainers.gpus_per_worker` must be 1 for 2 workers, got 0.5: NCCL does not support two",
        ),
        (
            ("resources.trainers.gpus_per_worker=2",),
            "`resources.trainers.gpus_per_worker` must be at most 1, because a worker trains on one GPU, got 2; raise",
        ),
        (("resources.trainers.gpus_per_worker=1.5",), "`resources.trainers.gpus_per_worker` must be at most 1"),
        (("resources.generators.gpus_per_actor=1.5",), "`gpus_per_actor` must be at most 1 or a whole number, got 1.5"),
    ],
)
def test_a_number_of_gpus_that_no_process_can_use_is_refused(overrides: tuple[str, ...], message: str) -> None:
    (fault,) = refused(*overrides)
    assert message in fault


def test_a_single_worker_can_have_a_fraction_of_a_gpu() -> None:
    given = ("resources.trainers.gpus_per_worker=0.5", "training.num_workers=1")
    assert load_config(QUICKSTART, given).resources.trainers.gpus_per_worker == 0.5


def test_pairs_per_launch_is_the_share_of_a_worker_unless_it_is_given() -> None:
    assert load_config(QUICKSTART).training.pairs_per_launch == 8
    assert load_config(QUICKSTART, ["training.batch_size_per_worker=4"]).training.pairs_per_launch == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("prompts.train={count: 3}",), "`train.source` must name a prompt set, a file or a hub data set"),
        (("prompts.heldout={count: 3}",), "`heldout` must have either `source` or `fraction`"),
        (("prompts.heldout={source: scenes, fraction: 0.5}",), "`heldout` must have either `source` or `fraction`"),
        (("prompts.train={source: scenes, fraction: 0.5}",), "`fraction` belongs to `heldout`"),
    ],
)
def test_both_sides_of_the_prompts_must_be_given(overrides: tuple[str, ...], message: str) -> None:
    (fault,) = refused(*overrides)
    assert fault.startswith(f"prompts: {message}")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("file: a.csv", "`revision` must be a commit of 40 hex digits for a hub id, got None"),
        ("file: a.csv, revision: main", "`revision` must be a commit of 40 hex digits for a hub id, got 'main'"),
        (f"revision: {'0f' * 20}", "`file` must name a file within the hub data set, got None"),
        (f"file: ../a.csv, revision: {'0f' * 20}", "`file` must name a file within the hub data set, got '../a.csv'"),
    ],
)
def test_a_hub_data_set_is_pinned_and_its_file_within_it(keys: str, message: str) -> None:
    assert refused(f"prompts.train={{source: some/prompts, {keys}}}") == [f"prompts.train: {message}"]


def test_a_pinned_hub_data_set_is_accepted_and_no_other_source_has_a_revision() -> None:
    pinned = f"file: data/a.csv, revision: {'0f' * 20}"
    train = load_config(QUICKSTART, [f"prompts.train={{source: some/prompts, {pinned}}}"]).prompts.train
    assert (train.source, train.file, train.revision, train.column) == (
        "some/prompts",
        "data/a.csv",
        "0f" * 20,
        "prompt",
    )
    assert refused(f"prompts.train={{source: prompts.csv, {pinned}}}") == [
        "prompts.train: `file` and `revision` belong to a hub data set, but `source` is not a hub id: 'prompts.csv'"
    ]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            "source: geneval2",
            "`revision` must be a commit of 40 hex digits of the data set Jialuo21/GenEval2, got None; the history of"
            " the hub page's `Files and versions` lists the commits, or set `path` to a copy of geneval2_data.jsonl"
            " (https://github.com/facebookresearch/GenEval2)",
        ),
        ("source: parti, file: a.tsv", "`parti` takes either `path` or `revision`, and no `file`"),
        (
            f"source: parti, path: a.tsv, revision: {'0f' * 20}",
            "`parti` takes either `path` or `revision`, and no `file`",
        ),
        (
            "source: prompts.csv, path: a.csv",
            "`path` is for benchmarks (drawbench, parti, hpdv2, geneval2, pickapic_test); the path of any other file is"
            " `source`, which is 'prompts.csv'",
        ),
    ],
)
def test_a_benchmark_is_pinned_or_a_local_copy(keys: str, message: str) -> None:
    assert refused(f"prompts.heldout={{{keys}}}") == [f"prompts.heldout: {message}"]


def test_a_benchmark_brings_its_commit_and_columns_which_the_settings_record() -> None:
    pinned = BENCHMARKS["drawbench"]
    heldout = load_config(QUICKSTART, ["prompts.heldout={source: drawbench, count: 9}"]).prompts.heldout
    assert (heldout.revision, heldout.column, heldout.category_column) == (pinned.revision, "Prompts", "Category")
    chosen = f"{{source: geneval2, revision: {'0f' * 20}, category_column: skill}}"
    heldout = load_config(QUICKSTART, [f"prompts.heldout={chosen}"]).prompts.heldout
    assert (heldout.revision, heldout.column, heldout.category_column) == ("0f" * 20, "prompt", "skill")
    local = load_config(QUICKSTART, ["prompts.heldout={source: parti, path: a.tsv}"]).prompts.heldout
    assert (local.revision, local.path) == (None, "a.tsv")
    assert load_config(QUICKSTART).prompts.heldout.category_column is None


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden", "-flag", "a b"])
def test_a_run_name_cannot_leave_its_folder(name: str) -> None:
    (fault,) = refused(f"run.name='{name}'")
    assert fault.startswith("`run.name` must ") and fault.endswith(f"got {name!r}")


def test_a_config_is_immutable() -> None:
    config = load_config(QUICKSTART)
    with pytest.raises(ValueError, match="frozen"):
        config.run.seed = 1  # type: ignore[misc]


def test_a_config_is_restored_from_its_plain_form() -> None:
    config = load_config(QUICKSTART, ["rewards=[clip,my_rewards:brightness]", "training.lora.alpha=16"])
    assert validate(yaml.safe_load(yaml.safe_dump(config.plain())), where="plain") == config


def test_each_reward_gets_its_own_options_and_a_user_function_none() -> None:
    rewards = load_config(QUICKSTART, ["rewards.jpeg_size.quality=50"]).rewards
    assert rewards.options("jpeg_size") == {"quality": 50}
    assert rewards.options("clip") == {
        "architecture": "embedded",
        "checkpoint": None,
        "revision": None,
        "scale": "cosine",
    }
    assert rewards.options("oracle") == {}
    assert rewards.options("names:clip") == {}


def test_options_of_rewards_belong_to_a_reward() -> None:
    options = {name for name, field in RewardsSection.model_fields.items() if sections_in(field.annotation)}
    assert options - {"perturbation"} <= {*REWARDS}


def test_names_of_measures_and_losses_match_the_implemented_ones() -> None:
    assert tuple(MEASURES) == MEASURE_NAMES
    assert tuple(ACCEPTS) == DRAWN_BY
    assert {*LOSSES, "sft"} == {*LOSS_VARIANTS}


def test_a_config_is_checked_without_torch_ray_and_diffusers() -> None:
    code = (
        "import sys; from cdpo_ray.config import load_config; load_config(sys.argv[1]);"
        "print(sorted({'torch', 'ray', 'diffusers', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(QUICKSTART)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def knobs(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from knobs(field.annotation)
        else:
            yield name


def words_of(tree: ast.AST) -> Iterator[str]:
    """Names that code uses as attribute, argument or field; comments and docstrings do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            yield str(node.slice.value)


def test_every_key_is_read_somewhere() -> None:
    elsewhere = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "config"]
    used = {word for path in elsewhere for word in words_of(ast.parse(path.read_text()))}
    trees = [ast.parse(path.read_text()) for path in (PACKAGE / "config").glob("*.py")]
    for node in [node for tree in trees for node in ast.walk(tree)]:
        is_property = isinstance(node, ast.FunctionDef) and any(
            ast.unparse(d) == "property" for d in node.decorator_list
        )
        if is_property and node.name in used:
            used |= set(words_of(node))
    assert set(knobs(Config)) - used == set()


def test_perturbation_ranks_images_but_cannot_judge_them() -> None:
    rewards = load_config(QUICKSTART, ("rewards.names=[perturbation,clip]",)).rewards
    assert (rewards.ranking_reward, rewards.max_masked_fraction, list(rewards.judges)) == (
        "perturbation",
        0.9,
        ["clip"],
    )
    assert load_config(QUICKSTART).rewards.max_masked_fraction is None
    (fault,) = refused("evaluation.judges=[perturbation]")
    assert fault.startswith("`evaluation.judges.0` must be one of 'clip', ")


JUDGED = ("prompts.train=null", "preferences={path: set.parquet, format: pickapic}")


def test_preferences_replace_training_prompts_and_generated_images() -> None:
    pairs = (*JUDGED, "curriculum.measure=score_gap_quantile")
    config = load_config(QUICKSTART, (*pairs, "rewards.names=[preference,clip]", "rewards.rank_by=clip"))
    assert (config.rewards.ranking_reward, list(config.rewards.judges)) == ("clip", ["clip"])
    assert validate(yaml.safe_load(yaml.safe_dump(config.plain())), where="plain") == config
    assert load_config(QUICKSTART, (*JUDGED, "curriculum.order=none")).preferences is not None


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (JUDGED[:1], "`prompts.train` is missing"),
        (JUDGED[1:], "`prompts.train` must not be given with `preferences`"),
        (JUDGED, "`curriculum.measure` must not be 'rank_gap' for pairs, whose rank gap is always 1; choose"),
        ((*JUDGED, "rounds=2"), "`rounds` must not be given with `preferences`"),
        ((*JUDGED, "run.samples_from=runs/other"), "`run.samples_from` must not be given with `preferences`"),
        ((*JUDGED, "rewards=[perturbation]"), "`rewards.names 'perturbation'` must not be given with `preferences`"),
        (("rewards=[preference]",), "`rewards.names` 'preference' needs the section `preferences`"),
        (
            (*JUDGED, "preferences.difficulty=rank"),
            "`preferences.difficulty` 'rank' needs `rewards.rank_by` 'preference'",
        ),
        ((*JUDGED, "preferences.format=ranked_folders"), "`rewards.rank_by` must be 'preference' for ranked folders"),
        (
            (*JUDGED, "preferences.format=ranked_folders", "preferences.difficulty=score"),
            "preferences: `columns` and `difficulty` belong to tables; folders are ranked by their images' names",
        ),
        (
            (*JUDGED, "preferences.format=pickapick"),
            "`preferences.format` must be 'pickapic', 'pairs', 'winner', 'hpdv2', ",
        ),
    ],
)
def test_keys_that_conflict_with_preferences_are_refused(overrides: tuple[str, ...], fault: str) -> None:
    assert any(fault in found for found in refused(*overrides))


def test_rankings_of_more_than_two_images_may_be_ordered_by_rank_gap() -> None:
    given = ("preferences={path: set.parquet, format: imagerewarddb, difficulty: rank}", "rewards=[preference]")
    assert load_config(QUICKSTART, (JUDGED[0], *given)).curriculum.cuts_by_rank_gap


def test_the_runs_own_rewards_judge_held_out_images_too() -> None:
    config = load_config(QUICKSTART, ("rewards=[perturbation,clip,jpeg_size]", "rewards.jpeg_size.quality=40"))
    assert list(config.evaluation_judges) == ["clip", "jpeg_size", "oracle", "oracle_strict"]
    assert config.evaluation_judges["jpeg_size"] == {"quality": 40}


def test_fault_19_one_image_a_prompt_is_refused_with_the_key() -> None:
    assert refused("generation.images_per_prompt=1")[0] == "`generation.images_per_prompt` must be >= 2, got 1"


SEARCH = (
    "prompts.validation={source: scenes, count: 8}",
    "search={num_trials: 4, space: {training.beta: {low: 50, high: 1000, log: true}}}",
)


def searched(space: str, **others: str) -> tuple[str, ...]:
    given = "".join(f", {key}: {value}" for key, value in ({"num_trials": "4"} | others).items() if value)
    return (SEARCH[0], f"search={{space: {space}{given}}}")


def test_a_search_is_read_with_its_defaults_and_restored_from_its_plain_form() -> None:
    space = (
        "{curriculum.num_stages: [1, 2, 4], training.beta: {low: 50, high: 1000, log: true},"
        " curriculum.window: {choices: [1, 2], when: {curriculum.pacing: sliding_window}},"
        " curriculum.pacing: [cumulative, sliding_window], training.lora.rank: {low: 2, high: 16},"
        " training.lora.targets: [[to_q], [to_q, to_k, to_v, to_out.0]]}"
    )
    config = load_config(QUICKSTART, searched(space))
    search = config.search
    assert search is not None and search.stop_early is not None
    assert (search.algorithm, search.objectives, search.stop_early.reduction_factor) == ("tpe", ("reward",), 2)
    assert (config.search_judge, search.images_per_prompt, search.confirm_seeds) == ("clip", 4, 3)
    knobs = {knob.key: knob for knob in search.knobs}
    assert list(knobs) == [
        "curriculum.num_stages",
        "training.beta",
        "curriculum.pacing",
        "curriculum.window",
        "training.lora.rank",
        "training.lora.targets",
    ], "as given, but a condition after what it names"
    beta, rank = knobs["training.beta"], knobs["training.lora.rank"]
    assert (beta.low, beta.high, beta.log, beta.is_integer) == (50.0, 1000.0, True, False)
    assert (rank.low, rank.high, rank.log, rank.is_integer) == (2, 16, False, True)
    assert knobs["curriculum.window"].when == {"curriculum.pacing": ["sliding_window"]}
    assert validate(yaml.safe_load(yaml.safe_dump(config.plain())), where="plain") == config
    assert load_config(QUICKSTART).search is None


def test_all_faults_of_a_space_are_reported_at_once_with_hints() -> None:
    faults = refused(
        *searched(
            "{training.bta: [1], training.lora: [1], curriculum.preset: [paper], training.num_workers: [1, 2],"
            " training.seed: [1], run.dir: [a], training.learning_rate: {low: 2, high: 1},"
            " training.weight_decay: {low: 0, high: 1, log: true}, training.loss: {choices: [dpo], hwen: {}},"
            " training.adam_beta1: 0.9, curriculum.order: [], curriculum.draws: [uniform, uniform],"
            " curriculum.label_noise: {low: 0}}",
            algoritm="tpe",
        ),
        "training.beta=0",
    )
    assert set(faults) == {
        "`training.beta` must be > 0, got 0",
        "unknown key `search.algoritm`; did you mean `search.algorithm`?",
        "search.space: unknown key `training.bta`; did you mean `training.beta`?",
        "search.space: unknown key `run.dir`; give a key of curriculum or training",
        "search.space: `training.lora` is a section; give a key of it, such as `training.lora.rank`",
        "search.space: `curriculum.preset` sets other keys: give those",
        "search.space: `training.num_workers` changes how a schedule is trained, not its outcome",
        "search.space: `training.seed` is not part of a schedule: `search.confirm_seeds` trains the best again with"
        " other seeds",
        "search.space.training.learning_rate: `low` must be below `high`, got 2 and 1",
        "search.space.training.weight_decay: `low` must be > 0 with `log`, got 0",
        "unknown key `search.space.training.loss.hwen`; did you mean `search.space.training.loss.when`?",
        "`search.space.training.adam_beta1` must be a list of choices, or a range {low: ..., high: ...}, got 0.9",
        "`search.space.curriculum.order.choices` must not be empty",
        "`search.space.curriculum.draws` must not repeat a choice, got ['uniform', 'uniform']",
        "search.space.curriculum.label_noise: `high` of the range is missing",
    }


def test_a_knob_has_valid_values_and_a_condition_that_can_be_met() -> None:
    faults = refused(
        *searched(
            "{training.beta: {low: 0, high: 300}, training.lora.rank: {low: 1.5, high: 4}, training.loss: [dpo, dpp],"
            " curriculum.window: [1, 0, null], curriculum.order: {low: 1, high: 2},"
            " curriculum.num_stages: {choices: [2, 4], when: {training.bta: 1, curriculum.pacing: [one_stage, none]}},"
            " curriculum.pacing: [cumulative, one_stage]}"
        )
    )
    assert set(faults) == {
        "search.space: `training.beta` must be greater than 0, got 0.0",
        "search.space: `training.lora.rank` must be a valid integer, got a number with a fractional part, got 1.5",
        "search.space: `training.loss` must be one of 'dpo', 'ipo', 'hinge', 'robust', 'sft' or 'module:function',"
        " got 'dpp'; did you mean 'dpo'?",
        "search.space: `curriculum.window` must be greater than or equal to 1, got 0",
        "search.space: `curriculum.order` is not a number, so it has no range; give a list of choices",
        "search.space: `curriculum.num_stages` depends on `training.bta`, which is not in the space; add it, or"
        " remove the `when`",
        "search.space: `curriculum.num_stages` depends on `curriculum.pacing` being 'none', which is not in the"
        " space: curriculum.pacing: cumulative, one_stage",
    }
    circle = (
        "{curriculum.num_stages: {choices: [4], when: {curriculum.pacing: cumulative}}, training.beta: [200],"
        " curriculum.pacing: {choices: [cumulative], when: {curriculum.num_stages: 4}}}"
    )
    assert refused(*searched(circle)) == [
        "search.space: `curriculum.num_stages`, `curriculum.pacing` depend on each other in a circle; remove a `when`"
    ]


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            searched("{training.beta: [200]}", num_trials=""),
            "search: `num_trials` is missing: the number of trials of `algorithm` 'tpe'",
        ),
        (
            searched("{training.beta: [200]}", algorithm="grid"),
            "search: `num_trials` must not be given with `algorithm` 'grid', which tries every point",
        ),
        (
            searched("{training.beta: {low: 1, high: 300}}", algorithm="grid", num_trials=""),
            "search: `space.training.beta` is a range, but a grid needs choices; give a list of them",
        ),
        (
            (*SEARCH, "search.objectives=[reward, reward]"),
            "search: `objectives` must not repeat one, got ['reward', 'reward']",
        ),
        (
            searched("{curriculum.updates_per_stage: [50]}", updates_per_trial="80"),
            "search: `updates_per_trial` decides the number of updates per stage, so `space` must not contain"
            " `curriculum.updates_per_stage`; leave out one of them",
        ),
        (
            searched("{curriculum.num_stages: {low: 1, high: 6}}", updates_per_trial="5"),
            "`search.updates_per_trial` must be at least 6, one update for each stage, got 5",
        ),
        (
            (*SEARCH, "search.updates_per_trial=3"),
            "`search.updates_per_trial` must be at least 4, one update for each stage, got 3",
        ),
        (
            SEARCH[1:],
            "`search` needs `prompts.validation`, prompts to judge trials by; give a `source` or a `fraction`",
        ),
        ((*SEARCH, "rounds=2"), "`search` trains one round per trial, but `rounds` is 2; leave out one"),
        (
            (*SEARCH, "search.judge=hpsv2"),
            "`search.judge` must be one of ['clip', 'oracle', 'oracle_strict'], the judges of the evaluation, got"
            " 'hpsv2'",
        ),
        (
            (*SEARCH, "rewards.names=[perturbation]"),
            "`search.judge` is missing: no ranking reward looks at images; give one of ['clip', 'oracle',"
            " 'oracle_strict']",
        ),
        (
            searched("{training.beta: [100, 300]}"),
            "`search.space.training.beta` must include 200.0, the value of the first trial, the paper's schedule;"
            " widen it",
        ),
        (
            searched("{curriculum.pacing: [one_stage]}"),
            "`search.space.curriculum.pacing` must include cumulative, the value of the first trial, the paper's"
            " schedule; widen it",
        ),
        (
            (*SEARCH, "curriculum.measure=score_gap", "curriculum.num_stages=9"),
            "`search` starts with the paper's schedule, which is invalid here: `curriculum.num_stages` is 9,"
            " but 8 images per prompt have only 7 rank gaps; lower it, or raise `generation.images_per_prompt`",
        ),
    ],
)
def test_a_search_that_cannot_start_is_refused(overrides: tuple[str, ...], fault: str) -> None:
    assert refused(*overrides) == [fault]


def test_a_search_is_refused_with_preferences() -> None:
    (faults,) = refused(*JUDGED, "curriculum.order=none", "rewards=[clip]", *SEARCH)
    assert faults == (
        "`prompts.validation` must not be given with `preferences`; `search` must not be given with `preferences`"
    )


def test_the_judge_of_a_search_is_the_first_that_looks_at_images_or_the_given_one() -> None:
    combined = (*SEARCH, "rewards.names=[perturbation,clip,jpeg_size]", "rewards.rank_by=mean_rank")
    assert load_config(QUICKSTART, combined).search_judge == "clip"
    assert load_config(QUICKSTART, (*combined, "search.judge=oracle")).search_judge == "oracle"


@pytest.mark.parametrize(
    ("heldout", "validation", "message"),
    [
        ("{source: a.txt}", "{count: 3}", "`validation` must have either `source` or `fraction`"),
        ("{source: a.txt}", "{source: b.txt, fraction: 0.1}", "`validation` must have either `source` or `fraction`"),
        ("{fraction: 0.5}", "{fraction: 0.5}", "`fraction` of `heldout` and `validation` must be below 1 together"),
    ],
)
def test_validation_prompts_have_one_source_and_leave_something_to_train_on(
    heldout: str, validation: str, message: str
) -> None:
    (fault,) = refused(f"prompts.heldout={heldout}", f"prompts.validation={validation}")
    assert fault.startswith(f"prompts: {message}")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        (
            {"model.quantization": "nf4", "training.method": "full"},
            "`model.quantization` 'nf4' freezes the weights, which `training.method` 'full' trains; leave it out, or"
            " train a LoRA",
        ),
        (
            {"model.dtype": "float16", "training.method": "full"},
            "`model.dtype` 'float16' must not be given with `training.method` 'full', whose gradients it cannot hold;"
            " use 'bfloat16' or 'float32', or train a LoRA, which is always float32",
        ),
        (
            {"model.quantization": "int8", "training.zero_stage": 3},
            "`training.zero_stage` 3 shards the base model, which quantised weights do not support; use 0 to 2 with"
            " `model.quantization`",
        ),
        (
            {"model.quantization": "int8", "training.lora": {"use_dora": True}},
            "`training.lora.use_dora` must not be given with `model.quantization`, because it would learn the norms of"
            " the rounded weights; leave out one",
        ),
        (
            {"training.lora": {"use_dora": True}, "training.zero_stage": 3},
            "`lora.use_dora` needs `zero_stage` 0 to 2, because it reads whole weights between layers, got 3",
        ),
        (
            {"training.lora": {"use_rslora": True}},
            "`use_rslora` needs `alpha`: the scale is alpha / sqrt(rank); 8 at rank 64 gives 1",
        ),
        (
            {"training.optimizer": "adamw_8bit", "training.zero_stage": 2},
            "`optimizer` 'adamw_8bit' needs `zero_stage` 0, because its 8-bit moments cannot be sharded, got 2; leave"
            " out one of them",
        ),
    ],
)
def test_options_incompatible_with_quantised_weights_or_moments_are_refused(
    changes: dict[str, object], fault: str
) -> None:
    given = parse_yaml(QUICKSTART.read_text(), where="quickstart")
    del given["training"]["lora"]
    for key, value in changes.items():
        section, name = key.split(".")
        given[section][name] = value
    with pytest.raises(ConfigError, match=re.escape(fault)):
        validate(given, where="test")


def test_keys_that_need_bitsandbytes_are_named() -> None:
    overrides = ["model.quantization=nf4", "training.optimizer=adamw_8bit"]
    named = ["`model.quantization` nf4", "`training.optimizer` adamw_8bit"]
    assert load_config(QUICKSTART, overrides).keys_that_need_bitsandbytes == named
    assert load_config(QUICKSTART, ["model.quantization=int8"]).keys_that_need_bitsandbytes == []


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (
            ("training.loss=sft", "training.safeguard=0.9", "training.adaptive_beta=0.6"),
            "training: `adaptive_beta` must not be given with `loss` 'sft', which has no rejected images; `safeguard`"
            " must not be given with `loss` 'sft', which has no rejected images",
        ),
        (
            ("training.zero_stage=3", "training.ema_decay=0.9"),
            "training: `ema_decay` 0.9 keeps a copy of the LoRA, which needs `method` 'lora' and `zero_stage` 0 to 2,"
            " got 'lora' and 3; leave it out",
        ),
        (
            ("training.zero_stage=3", "training.health.on_alarm=stop"),
            "training: `health.on_alarm` stop keeps a copy of the LoRA, which needs `method` 'lora' and `zero_stage` 0"
            " to 2, got 'lora' and 3; leave it out",
        ),
        (
            ("training.health.on_alarm=stop", "training.health.max_error_rise=null"),
            "training.health: `on_alarm` 'stop' needs `max_error_rise`, the bound of the alarm; give one of both",
        ),
    ],
)
def test_stability_keys_that_cannot_take_effect_are_refused(overrides: tuple[str, ...], fault: str) -> None:
    assert refused(*overrides) == [fault]


def test_the_published_training_is_one_key_from_the_defaults() -> None:
    """A constant learning rate without warm-up; all other means against instability are off by default."""
    training = load_config(QUICKSTART, ["training.schedule.warmup_updates=0"]).training
    assert training.schedule.decay == "constant" and training.health.on_alarm == "warn"
    assert training.safeguard is training.adaptive_beta is training.ema_decay is None
