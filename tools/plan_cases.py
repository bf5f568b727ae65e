"""Models that people ask about, on devices that they have: plans for the README, computed anew each time."""

import dataclasses
import pathlib
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.planner import format_bytes
from jaxinfer.planning import plan, report
from jaxinfer.planning.candidates import Candidate, Planner, Rejection, ranked
from jaxinfer.planning.workload import Workload

CONFIGS = pathlib.Path(__file__).resolve().parent.parent / "tests" / "published_configs"
MEM_FRACTION = 0.95
EXAMPLE = "tests/published_configs/llama_3_1_70b_instruct.json"
_EXAMPLE_TOP = 5

# As GLM-130B is shaped (arXiv:2210.02414), with the MLP of a Llama.
SIZE_130B = {
    "vocab_size": 150_528,
    "embed_dim": 12_288,
    "num_layers": 70,
    "num_q_heads": 96,
    "num_kv_heads": 96,
    "head_dim": 128,
    "mlp_dim": 32_768,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A row of the table.

    Attributes:
      title: of the model.
      config: its file, without ".json"; `changes` are made to it.
      weight_dtype: "int4" and the like, for what no engine runs yet.
    """

    title: str
    config: str
    devices: str
    dtype: str = "bfloat16"
    weight_dtype: str = "auto"
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    prompt_tokens: int = 1024
    output_tokens: int = 256

    def planner(self) -> Planner:
        cluster = plan.cluster(self.devices)
        workload = Workload(prompt_tokens=self.prompt_tokens, output_tokens=self.output_tokens)
        asked = {"dtype": self.dtype}
        return plan.planner(
            self.model, asked, cluster, workload, weight_dtype=self.weight_dtype, mem_fraction=MEM_FRACTION
        )

    @property
    def model(self) -> ModelConfig:
        return dataclasses.replace(plan.read_model_config(str(CONFIGS / f"{self.config}.json")), **self.changes)


_LONG: dict[str, Any] = {"prompt_tokens": 2**17 - 1024, "output_tokens": 1024}
CASES = (
    *(
        Case(title="Llama 2 13B, float16", config="llama_2_13b", devices=f"rtx3090-24g:{n}", dtype="float16")
        for n in (1, 2, 3, 4)
    ),
    *(Case(title="QwQ 32B", config="qwq_32b", devices=f"a6000-48g:{n}") for n in (1, 2)),
    *(
        Case(title="130B, float16", config="llama_2_13b", devices=f"h100:{n}", dtype="float16", changes=SIZE_130B)
        for n in (2, 4)
    ),
    Case(
        title="130B, int4",
        config="llama_2_13b",
        devices="h100:1",
        dtype="float16",
        changes=SIZE_130B,
        weight_dtype="int4",
    ),
    Case(title="Llama 3.1 70B, 128 Ki tokens", config="llama_3_1_70b_instruct", devices="h100:8", **_LONG),
    Case(
        title="the same with as many KV as query heads",
        config="llama_3_1_70b_instruct",
        devices="h100:8",
        changes={"num_kv_heads": 64},
        **_LONG,
    ),
    Case(title="Mixtral 8x7B", config="mixtral_8x7b_instruct_v0_1", devices="h100:2"),
    Case(title="DeepSeek V3", config="deepseek_v3", devices="h200:2x8"),
)


def table() -> str:
    """Markdown: of each case the mesh with the most tokens per second."""
    rows = [
        "| model, bfloat16 unless said | devices | tokens each | best mesh | weights | cache of a token | sequences |",
        "|---|---|--:|---|--:|--:|--:|",
    ]
    for case in CASES:
        found = [*case.planner().candidates()]
        best = ranked([each for each in found if isinstance(each, Candidate)], "throughput")
        asked = f"| {case.title} | `{case.devices}` | {case.prompt_tokens + case.output_tokens:,} |"
        if best:
            memory = best[0].plan.memory
            of_token = format_bytes(memory.page_bytes / memory.page_size)
            sizes = f"{format_bytes(memory.weights_bytes)} | {of_token}"
            rows.append(f"{asked} `{best[0].mesh}` | {sizes} | {best[0].performance.num_seqs} |")
        else:
            rejected = [each for each in found if isinstance(each, Rejection) and each.excess_bytes]
            closest = min(rejected, key=lambda each: each.excess_bytes or 0)
            rows.append(f"{asked} none, not `{closest.mesh}`: {closest.reason} | | | |")
    return "\n".join(rows)


def example() -> str:
    """What `plan_mesh --model=EXAMPLE --devices=h100:8 --top=5` prints."""
    case = Case(title="", config=pathlib.Path(EXAMPLE).stem, devices="h100:8", dtype="auto")
    planner = case.planner()
    found = [*planner.candidates()]
    best = ranked([each for each in found if isinstance(each, Candidate)], planner.workload.objective)
    command = report.to_run(best[0], "path/to/model", MEM_FRACTION)
    return f"```text\n{report.text(planner, found, _EXAMPLE_TOP, MEM_FRACTION)}\n\n{command}\n```"
