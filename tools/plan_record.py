"""Compares what is planned for a step with what XLA says of it: every family on ten meshes of GPUs that are not there.

python tools/plan_record.py --record=docs/benchmarks/plan_h100.json

Models are those of tests/published_configs, of which a few layers are compiled for H100s; what is in the record is not
compiled again. Needs the CUDA plugin and no GPU: run with JAX_PLATFORMS=cpu. Exit code 1 if arguments differ by a byte.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from jaxinfer.planning import facts, plan, target
from jaxinfer.planning.candidates import Candidate, Rejection
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
PROGRAMS = ("decode", "prefill", "sampler")
_TOLERANCE = 0.2
_PROMPT_TOKENS, _OUTPUT_TOKENS, _NUM_SEQS = 384, 128, 64


def meshes(has_experts: bool) -> tuple[str, ...]:
    return (*MESHES[: -len(EXPERT_MESHES)], *EXPERT_MESHES) if has_experts else MESHES


def compare(name: str, wanted: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of each of these meshes the bytes of its programs, planned and compiled; or why it cannot be."""
    model = plan.read_model_config(str(CONFIGS / f"{name}.json"))
    workload = Workload(prompt_tokens=_PROMPT_TOKENS, output_tokens=_OUTPUT_TOKENS)
    cluster = plan.cluster("h100:8")
    asked = {"max_num_seqs": _NUM_SEQS}
    planner = plan.planner(model, asked, cluster, workload, mem_fraction=MEM_FRACTION)
    found = {mesh: planner.candidate(mesh) for mesh in wanted}
    yield from ((mesh, {"refused": each.reason}) for mesh, each in found.items() if isinstance(each, Rejection))
    candidates = {mesh: each for mesh, each in found.items() if isinstance(each, Candidate)}
    of_each = facts.compile_candidates(planner, [*candidates.values()], all_samplers=True)
    yield from ((mesh, of_candidate(compiled)) for mesh, compiled in zip(candidates, of_each, strict=True))


def of_candidate(compiled: facts.CandidateFacts) -> dict[str, Any]:
    """Bytes, and FLOPs by how many times those that are planned."""
    return {
        "temporaries": {
            "planned": compiled.planned_temporary_bytes,
            "sampler": compiled.sampler_bytes,
            **{fact.name: fact.step.temporary_bytes for fact in compiled.steps},
        },
        "arguments": {fact.name: [fact.planned_argument_bytes, fact.step.argument_bytes] for fact in compiled.steps},
        "flops": {fact.name: round((fact.step.product_flops or 0) / fact.planned_flops, 4) for fact in compiled.steps},
    }


def differing(record: dict[str, Any]) -> list[str]:
    """Steps whose arguments are not as planned."""
    return [
        f"{key}: {name}"
        for key, found in record.items()
        for name, (planned, taken) in found.get("arguments", {}).items()
        if planned != taken
    ]


def summary(record: dict[str, Any]) -> str:
    """How many are equal, and by how much what is planned for temporaries is more than what they take."""
    compiled = {key: found["temporaries"] for key, found in record.items() if "temporaries" in found}
    ratios = {key: sizes["planned"] / max(sizes[name] for name in PROGRAMS) for key, sizes in compiled.items()}
    flops = [ratio for found in record.values() for ratio in found.get("flops", {}).values()]
    by_ratio = sorted(ratios, key=ratios.__getitem__)
    within = sum(abs(ratio - 1) <= _TOLERANCE for ratio in ratios.values())
    ends = " to ".join(f"{ratios[key]:.2f} ({key})" for key in (by_ratio[0], by_ratio[-1]))
    return (
        f"{len(compiled)} meshes, {len(record) - len(compiled)} refused; arguments of {len(differing(record))} steps "
        f"differ; FLOPs {min(flops):.3f} to {max(flops):.3f} times those planned; planned for temporaries {ends} times "
        f"what they take, median {ratios[by_ratio[len(by_ratio) // 2]]:.2f}, within {_TOLERANCE:.0%} in {within}"
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
        missing = [mesh for mesh in meshes(has_experts) if f"{name} | {mesh}" not in record]
        for mesh, found in compare(name, missing):
            record[f"{name} | {mesh}"] = found
            print(name, mesh, json.dumps(found), flush=True)
            lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(record.items()))
            options.record.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(summary(record))
    return 1 if differing(record) else 0


if __name__ == "__main__":
    sys.exit(main())
