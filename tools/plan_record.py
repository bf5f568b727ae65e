"""Compares what is planned for a step with what XLA says of it: every family on ten meshes of GPUs that are not there.

python tools/plan_record.py --record=docs/benchmarks/plan_h100.json

Models are those of tests/published_configs, of which a few layers are compiled for H100s; what is in the record is not
compiled again. Needs the CUDA plugin and no GPU: run with JAX_PLATFORMS=cpu. Exit code 1 if arguments differ by a byte.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from jaxinfer.planning import facts, plan, target
from jaxinfer.planning.candidates import Candidate
from jaxinfer.planning.workload import Workload
from jaxinfer.tools.plan_cases import CONFIGS, MEM_FRACTION

# Of each family a model that is as large as a GPU holds of it, or somewhat larger.
MODELS = (
    "deepseek_v2_lite",
    "gemma_2_9b",
    "gemma_3_1b_it",
    "glm_4_9b_0414",
    "gpt2",
    "gpt_oss_20b",
    "llama_3_1_8b_instruct",
    "mistral_7b_v0_1",
    "mixtral_8x7b_instruct_v0_1",
    "olmo_2_7b",
    "opt_125m",
    "phi_3_mini_4k_instruct",
    "qwen_2_5_7b_instruct",
    "qwen_3_8b",
    "qwen_3_30b_a3b",
)
MESHES = (
    "data:1",
    "data:2",
    "tensor:2",
    "tensor:4",
    "stage:2",
    "context:2",
    "data:2,tensor:2",
    "stage:2,tensor:2",
    "context:2,tensor:2",
    "data:2,stage:2,tensor:2",
)
EXPERT_MESHES = ("expert:2", "expert:2,tensor:2")  # in place of the last two of a model with experts
_PROMPT_TOKENS, _OUTPUT_TOKENS, _NUM_SEQS = 384, 128, 64


def meshes(has_experts: bool) -> tuple[str, ...]:
    return (*MESHES[: -len(EXPERT_MESHES)], *EXPERT_MESHES) if has_experts else MESHES


def compare(name: str, mesh: str) -> dict[str, Any]:
    """Bytes of both steps, planned and compiled; or why the mesh cannot be."""
    model = plan.read_model_config(str(CONFIGS / f"{name}.json"))
    workload = Workload(prompt_tokens=_PROMPT_TOKENS, output_tokens=_OUTPUT_TOKENS)
    cluster = plan.cluster("h100:8")
    asked = {"max_num_seqs": _NUM_SEQS}
    planner = plan.planner(model, asked, cluster, workload, mem_fraction=MEM_FRACTION)
    found = planner.candidate(mesh)
    if not isinstance(found, Candidate):
        return {"refused": found.reason}
    return {
        fact.name: {
            "planned_arguments": fact.planned_argument_bytes,
            "arguments": fact.step.argument_bytes,
            "planned_workspace": fact.planned_workspace_bytes,
            "temporaries": fact.step.temporary_bytes,
            "in_place": fact.step.alias_bytes,
            "seconds": round(fact.step.lower_seconds + fact.step.compile_seconds, 1),
        }
        for fact in facts.compile_steps(planner, found)
    }


def differing(record: dict[str, Any]) -> list[str]:
    """Steps whose arguments are not as planned."""
    return [
        f"{key}: {name}"
        for key, steps in record.items()
        for name, step in steps.items()
        if isinstance(step, dict) and step["arguments"] != step["planned_arguments"]
    ]


def summary(record: dict[str, Any]) -> str:
    """How many are equal, and by how much what is planned for temporaries is more than what they take."""
    steps = [step for by_name in record.values() for step in by_name.values() if isinstance(step, dict)]
    largest = [  # of the two programs: what is planned is for both
        (steps["decode"]["planned_workspace"], max(step["temporaries"] for step in steps.values()))
        for steps in record.values()
        if "decode" in steps
    ]
    ratios = sorted(planned / taken for planned, taken in largest)
    num_refused = sum("refused" in by_name for by_name in record.values())
    return (
        f"{len(steps)} steps, arguments equal in {len(steps) - len(differing(record))}, {num_refused} meshes refused; "
        f"planned for temporaries {ratios[0]:.2f} to {ratios[-1]:.2f} times what they take, "
        f"median {ratios[len(ratios) // 2]:.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=pathlib.Path, required=True, help="JSON file, added to")
    parser.add_argument("--models", default=",".join(MODELS), help="of tests/published_configs")
    options = parser.parse_args()
    if reason := target.missing():
        parser.error(f"nothing to compile for GPUs with: {reason}")
    record = json.loads(options.record.read_text(encoding="utf-8")) if options.record.exists() else {}
    for name in options.models.split(","):
        has_experts = plan.read_model_config(str(CONFIGS / f"{name}.json")).moe is not None
        for mesh in meshes(has_experts):
            key = f"{name} | {mesh}"
            if key not in record:
                record[key] = compare(name, mesh)
                print(key, json.dumps(record[key]), flush=True)
                lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
                options.record.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(summary(record))
    return 1 if differing(record) else 0


if __name__ == "__main__":
    sys.exit(main())
