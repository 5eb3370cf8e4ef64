"""What cannot be fetched is told in one line with the command that stages it."""

from cdpo_ray.hub import how_to_stage


def test_fault_25_what_cannot_be_fetched_is_told_in_one_line_with_the_command_that_stages_it() -> None:
    error = OSError("no route to the hub\nand a page of advice")
    assert how_to_stage("some/clip", "model.safetensors", "0f", error, key="rewards.clip.checkpoint") == (
        "`rewards.clip.checkpoint` some/clip (revision 0f): cannot be fetched: no route to the hub; stage it first:"
        " `hf download some/clip model.safetensors --revision 0f`"
    )
    assert how_to_stage("some/blip", "", "0f", error, key="key").endswith("`hf download some/blip --revision 0f`")
    assert how_to_stage("some/set", "a.csv", "0f", error, key="key", dataset=True).endswith(
        "`hf download --repo-type dataset some/set a.csv --revision 0f`"
    )
