"""What `tools/plan_record.py` says of a record. Compiling for it is tested in test_compiled_for_gpus.py."""

from typing import Any

from jaxinfer.tools import plan_record


def entry(planned: int, taken: dict[str, int], decode_bytes: int = 7) -> dict[str, Any]:
    return {
        "temporaries": {"planned": planned, **taken},
        "arguments": {"decode": [7, decode_bytes], "prefill": [8, 8]},
        "flops": {"decode": 1.0, "prefill": 1.012},
    }


RECORD = {
    "gpt2 | data:1": entry(100, {"sampler": 80, "decode": 50, "prefill": 60}),
    "gpt2 | tensor:2": entry(66, {"sampler": 10, "decode": 50, "prefill": 60}),
    "gpt2 | tensor:4": entry(90, {"sampler": 100, "decode": 50, "prefill": 60}, decode_bytes=6),
    "gpt2 | stage:2": {"refused": "for a reason"},
}


def test_steps_whose_arguments_differ_are_named():
    assert plan_record.differing(RECORD) == ["gpt2 | tensor:4: decode"]


def test_the_summary_has_the_largest_program_of_each_and_both_ends():
    assert plan_record.summary(RECORD) == (
        "3 meshes, 1 refused; arguments of 1 steps differ; FLOPs 1.000 to 1.012 times those planned; planned for "
        "temporaries 0.90 (gpt2 | tensor:4) to 1.25 (gpt2 | data:1) times what they take, median 1.10, within 20% in 2"
    )


def test_models_with_experts_are_on_meshes_of_experts():
    assert len(plan_record.meshes(False)) == len(plan_record.meshes(True)) == 10
    assert [mesh for mesh in plan_record.meshes(True) if "expert" in mesh] == ["expert:2", "expert:2,tensor:2"]
