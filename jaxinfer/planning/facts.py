"""The steps of a candidate as XLA compiles them, beside what was planned."""

import dataclasses
from collections.abc import Sequence

import jax

from jaxinfer.planner import format_bytes
from jaxinfer.planning import target
from jaxinfer.planning.candidates import Candidate, Planner
from jaxinfer.planning.compiled import CompiledStep, compile_step
from jaxinfer.planning.hardware import GPUS
from jaxinfer.planning.programs import devices_of, planned_programs, widest_shapes

_MOST_COLLECTIVES = 6  # that are told one by one, the largest


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFacts:
    """Of one program on one device.

    Attributes:
      name: what the step does.
      planned_argument_bytes, planned_workspace_bytes: what the plan has for them.
    """

    name: str
    step: CompiledStep
    planned_argument_bytes: int
    planned_workspace_bytes: int

    @property
    def excess_bytes(self) -> int:
        """By which arguments are more than planned."""
        return self.step.argument_bytes - self.planned_argument_bytes


def devices_for(planner: Planner) -> str:
    """Prepares nothing; says what steps would be compiled for. Temporaries of CPUs are another compiler's."""
    if planner.cluster.name in GPUS and (reason := target.missing()):
        return (
            f"virtual CPU devices, whose temporaries are only near those of a {planner.cluster.device_kind}: {reason}"
        )
    return planner.cluster.device_kind


def compile_steps(planner: Planner, candidate: Candidate) -> list[StepFacts]:
    """The largest step that decodes, and the largest that prefills beside it, of a few of the layers."""
    on_gpus = planner.cluster.name in GPUS and not target.missing()
    num_devices = candidate.num_devices
    devices = devices_of(planner.cluster, num_devices) if on_gpus else jax.devices("cpu")[:num_devices]
    programs, counts = planned_programs(planner, candidate, devices)
    return [
        StepFacts(
            name=name,
            step=compile_step(programs, shape, counts),
            planned_argument_bytes=candidate.plan.argument_bytes(shape),
            planned_workspace_bytes=candidate.plan.memory.workspace_bytes,
        )
        for name, shape in widest_shapes(candidate.plan.buckets).items()
    ]


def text(candidate: Candidate, facts: Sequence[StepFacts], num_layers: int) -> str:
    """Lines for each step; `num_layers` are those of the whole model."""
    first = facts[0].step
    seconds = sum(fact.step.lower_seconds + fact.step.compile_seconds for fact in facts)
    lines = [f"{candidate.mesh}, {first.num_layers} of {num_layers} layers compiled for each kind, {seconds:.1f} s:"]
    for fact in facts:
        step, planned = fact.step, fact.planned_workspace_bytes
        lines.append(
            f"  {fact.name}: {format_bytes(step.argument_bytes)} of arguments ({fact.excess_bytes:+d} bytes), of them "
            f"{format_bytes(step.alias_bytes)} in place; {format_bytes(step.temporary_bytes)} of temporaries "
            f"({format_bytes(planned)} planned)"
        )
        for travels in step.collectives[:_MOST_COLLECTIVES]:
            where = f"over {','.join(travels.mesh_axes)}"
            counts = [f"{travels.in_layers} in layers"] * bool(travels.in_layers)
            counts += [f"{travels.outside} beside them"] * bool(travels.outside)
            size = f"{travels.dtype} of {format_bytes(travels.num_bytes)}"
            lines.append(f"    {travels.op} {size} {where}: {' and '.join(counts)}")
        if smaller := step.collectives[_MOST_COLLECTIVES:]:
            num_smaller = sum(travels.in_layers + travels.outside for travels in smaller)
            lines.append(f"    {num_smaller} more, of at most {format_bytes(smaller[0].num_bytes)}")
    return "\n".join(lines)
