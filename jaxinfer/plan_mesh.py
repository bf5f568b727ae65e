"""`plan_mesh`: which mesh of which devices a model fits, and how fast it would be there. Nothing is loaded.

    plan_mesh --model=path/to/model --devices=h100:8
    plan_mesh --model=path/to/config.json --devices=h200:2x8 --objective=latency --prompt_tokens=8192
    plan_mesh --model=path/to/model --devices=h100:8 --compile=3          # as XLA sees them, with no GPU here

The plan goes to stdout. A user's mistake ends in one line and exit code 1.
"""

import gc
import os
import pathlib
import sys
import time
from typing import TYPE_CHECKING

from absl import app, flags, logging

from jaxinfer import devices, engine_flags, plan_flags
from jaxinfer.cli_output import say
from jaxinfer.engine_config import EngineConfig

if TYPE_CHECKING:
    from jaxinfer.planning.candidates import Candidate, Planner

_PLACEHOLDER = "path/to/model"  # in the command to paste, where a config.json was given


def main(argv: list[str]) -> int:
    """The exit code. `argv` is what the flags left over."""
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}; the model is given as --model={argv[1]}")
        run()
    except KeyboardInterrupt:
        say("plan_mesh: interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, RuntimeError, OSError) as error:
        if logging.get_verbosity() >= logging.DEBUG:
            raise
        say(f"plan_mesh: error: {error}")
        return 1
    return 0


def run() -> None:
    """Prints the plan. Raises ValueError for what cannot be planned, RuntimeError where no mesh can be."""
    fields = engine_flags.engine_fields()
    EngineConfig(**fields)
    if plan_flags.DEVICES.value is None:
        raise ValueError("--devices is missing; give what to plan for, as --devices=h100:8")
    if plan_flags.COMPILE.value and plan_flags.WEIGHT_DTYPE.value != "auto":
        raise ValueError(
            f"--compile={plan_flags.COMPILE.value}: there is no program for --weight_dtype="
            f"{plan_flags.WEIGHT_DTYPE.value} yet; leave one of them out"
        )
    devices.prefer_cpu()
    if plan_flags.COMPILE.value:  # where GPUs cannot be compiled for, CPU devices stand in for them
        devices.set_num_cpu_devices(_num_devices())
    if logging.get_verbosity() < logging.DEBUG:
        logging.set_verbosity(logging.WARNING)
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's, of what a GPU that is not there would be asked
    from jaxinfer.planning import plan, plots, report
    from jaxinfer.planning.candidates import Candidate, Rejection, ranked

    if plan_flags.PLOT.value:
        plots.check(plan_flags.PLOT.value)
    cluster = plan.cluster(
        plan_flags.DEVICES.value,
        devices_per_node=plan_flags.NUM_GPUS_PER_NODE.value,
        **{flag.name: flag.value for flag in _LINKS if flag.value is not None},
    )
    if cluster.platform != "gpu" and plan_flags.MEM_FRACTION.present:
        raise ValueError(f"--mem_fraction={plan_flags.MEM_FRACTION.value}: is for GPUs; --memory_fraction is for all")
    mem_fraction = plan_flags.MEM_FRACTION.value if cluster.platform == "gpu" else None
    model_config = plan.read_model_config(fields.pop("model", None), plan_flags.WEIGHT_DTYPE.value)
    most = model_config.max_position
    workload = plan_flags.workload(min(most, fields.get("max_model_len") or most))
    given = {name for name in fields if flags.FLAGS[name].present}
    planner = plan.planner(
        model_config,
        {name: value for name, value in fields.items() if name in given},
        cluster,
        workload,
        weight_dtype=plan_flags.WEIGHT_DTYPE.value,
        mem_fraction=mem_fraction,
    )
    found = [*planner.candidates()]
    print(report.text(planner, found, plan_flags.TOP.value, mem_fraction))
    best = ranked([each for each in found if isinstance(each, Candidate)], workload.objective)
    if not best:
        enough = planner.more_devices([each for each in found if isinstance(each, Rejection)])
        hint = f"; --devices={enough} would do" if enough and not fields.get("mesh") else ""
        raise RuntimeError(f"none of these meshes can be, as the lines above say{hint}")
    if plan_flags.WEIGHT_DTYPE.value == "auto":
        print(f"\n{report.to_run(best[0], _model_to_run(), mem_fraction)}")
    _show(planner, best, report.heading(planner, mem_fraction))


def _show(planner: "Planner", best: "list[Candidate]", heading: str) -> None:
    """What is asked for beyond the table."""
    from jaxinfer.planning import plots, report

    if plan_flags.BARS.value:
        print(f"\n{report.bars(best[: plan_flags.TOP.value])}")
    if plan_flags.PLOT.value:
        plots.plot_plan(plan_flags.PLOT.value, planner, best, heading)
        say(f"plan_mesh: wrote {plan_flags.PLOT.value}")
    if plan_flags.COMPILE.value:
        _compile(planner, best)
    if (packed := plan_flags.WEIGHT_DTYPE.value) != "auto":
        print(f"\nwhat if: no engine loads weights of {packed} yet")


def _compile(planner: "Planner", best: "list[Candidate]") -> None:
    from jaxinfer.planning import facts

    print(f"\nsteps compiled for {facts.devices_for(planner)}:")
    start = time.monotonic()
    gc.disable()  # it would take a fifth of the time
    try:
        for of_candidate in facts.compile_candidates(planner, best[: plan_flags.COMPILE.value]):
            print(facts.text(of_candidate, planner.model.num_layers), flush=True)
    finally:
        gc.enable()
    print(f"compiled in {time.monotonic() - start:.1f} s")


_LINKS = (
    plan_flags.LINK_GB_S,
    plan_flags.NETWORK_GB_S,
    plan_flags.LINK_LATENCY_S,
    plan_flags.NETWORK_LATENCY_S,
)


def _num_devices() -> int:
    from jaxinfer.planning.clusters import parse_devices

    devices = plan_flags.DEVICES.value
    assert devices is not None  # a flag that is required
    _, num_nodes, each = parse_devices(devices, devices_per_node=plan_flags.NUM_GPUS_PER_NODE.value)
    return num_nodes * each


def _model_to_run() -> str | None:
    """For the command to paste."""
    model = flags.FLAGS["model"].value
    return _PLACEHOLDER if model is not None and pathlib.Path(model).expanduser().is_file() else model


def cli() -> None:
    """The console script."""
    app.run(main, flags_parser=plan_flags.parse)


if __name__ == "__main__":
    cli()
