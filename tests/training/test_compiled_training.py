"""A compiled net in training: one graph for the policy and one for the reference, no breaks, nothing compiled twice."""

from functools import partial
from typing import Any

import pytest
import torch
from tiny_policies import TinyModels, make_pairs, start
from torch._dynamo.utils import counters

from cdpo_ray.training.losses import preference_loss
from cdpo_ray.training.update import loss_of_pairs

FAMILIES = ("stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux", "flux2")
QUICK = [("stable_diffusion_3", True), ("flux", True)]
"""Others take longer: tracing a UNet takes more than half a minute."""


def cases() -> list[Any]:
    every = [(family, checkpointing) for family in FAMILIES for checkpointing in (False, True)]
    return [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.nightly) for case in every]


def num_graphs() -> int:
    return counters["stats"].get("unique_graphs", 0)


@pytest.mark.parametrize(("family", "checkpointing"), cases())
def test_policy_and_reference_are_one_graph_each_and_switching_recompiles_nothing(
    tiny_models: TinyModels, family: str, checkpointing: bool
) -> None:
    torch._dynamo.reset()
    counters.clear()
    model, policy = start(tiny_models(family), family)
    batch = make_pairs(model, 2)
    loss_at_beta = partial(preference_loss, beta=400.0)

    def launch() -> float:
        loss, _ = loss_of_pairs(policy, batch, preference_loss=loss_at_beta)
        loss.backward()
        return loss.item()

    eager = launch()
    if checkpointing:
        model.denoiser.enable_gradient_checkpointing()
    model.denoiser.compile(backend="eager")
    try:
        compiled = launch()
        first = num_graphs()
        launch()
        launch()
        assert (first, num_graphs(), dict(counters["graph_break"])) == (2, 2, {})
        assert compiled == pytest.approx(eager, abs=1e-6)
    finally:
        torch._dynamo.reset()
