"""The direction of imports: what decides is host Python, what computes never asks it.

Parses every import, those inside functions too. A new module must be given a layer in `LAYERS`.
"""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("jaxinfer", "sharding_rules", "pallas_kernels")

# A module may import its own layer and those below it. An entry covers the modules beneath it, too.
LAYERS = {
    "sharding_rules": 0,
    "pallas_kernels": 0,
    # Host only: never jax.
    "jaxinfer.beam_search": 1,
    "jaxinfer.chat_template": 1,
    "jaxinfer.chunk_policy": 1,
    "jaxinfer.config": 1,
    "jaxinfer.config_file": 1,
    "jaxinfer.encoder_batch": 1,
    "jaxinfer.engine_config": 1,
    "jaxinfer.expert_placement": 1,
    "jaxinfer.frames": 1,
    "jaxinfer.generation_config": 1,
    "jaxinfer.hf_config": 1,
    "jaxinfer.hf_rope": 1,
    "jaxinfer.hf_weight_names": 1,
    "jaxinfer.host_memory": 1,
    "jaxinfer.intake": 1,
    "jaxinfer.integers": 1,
    "jaxinfer.kubernetes_job": 1,
    "jaxinfer.launch": 1,
    "jaxinfer.layouts": 1,
    "jaxinfer.metrics": 1,
    "jaxinfer.model_files": 1,
    "jaxinfer.output_text": 1,
    "jaxinfer.outputs": 1,
    "jaxinfer.page_allocator": 1,
    "jaxinfer.planner": 1,
    "jaxinfer.planning": 1,
    "jaxinfer.planning.calibration": 5,
    "jaxinfer.planning.candidates": 5,
    "jaxinfer.planning.facts": 5,
    "jaxinfer.planning.drawing": 5,
    "jaxinfer.planning.dry_run": 5,
    "jaxinfer.planning.compiled": 5,
    "jaxinfer.planning.plan": 5,
    "jaxinfer.planning.programs": 5,
    "jaxinfer.planning.plots": 5,
    "jaxinfer.planning.report": 5,
    "jaxinfer.planning.step_timer": 5,
    "jaxinfer.plan_flags": 7,
    "jaxinfer.process_group": 1,
    "jaxinfer.program_store": 2,
    "jaxinfer.programs": 2,
    "jaxinfer.progress": 1,
    "jaxinfer.prompts": 1,
    "jaxinfer.rendezvous": 1,
    "jaxinfer.roll_call": 1,
    "jaxinfer.request": 1,
    "jaxinfer.request_stats": 1,
    "jaxinfer.request_stream": 1,
    "jaxinfer.sampling_params": 1,
    "jaxinfer.scheduler": 1,
    "jaxinfer.sentence_modules": 1,
    "jaxinfer.shard": 1,
    "jaxinfer.slot_table": 1,
    "jaxinfer.stages": 1,
    "jaxinfer.stats": 1,
    "jaxinfer.step_plan": 1,
    "jaxinfer.tokenizer": 1,
    "jaxinfer.unknown_names": 1,
    # Arrays.
    "jaxinfer.bandwidth": 2,
    "jaxinfer.batch": 2,
    "jaxinfer.compilation_cache": 2,
    "jaxinfer.compilations": 2,
    "jaxinfer.context_parallel": 2,
    "jaxinfer.device_memory": 2,
    "jaxinfer.devices": 2,
    "jaxinfer.distributed": 2,
    "jaxinfer.extras": 2,
    "jaxinfer.kv_cache": 2,
    "jaxinfer.logits_processors": 2,
    "jaxinfer.logprobs": 2,
    "jaxinfer.meshes": 2,
    "jaxinfer.partitioning": 2,
    "jaxinfer.planning.target": 2,
    "jaxinfer.quantization": 2,
    "jaxinfer.sampling": 2,
    # The model's parts, the models, what loads and runs them.
    "jaxinfer.layers": 3,
    "jaxinfer.attention": 3,
    "jaxinfer.microbatches": 3,
    "jaxinfer.pipeline": 3,
    "jaxinfer.models": 4,
    "jaxinfer.checkpoint": 5,
    "jaxinfer.memory": 5,
    "jaxinfer.decoder_plan": 5,
    "jaxinfer.full_sampler": 5,
    "jaxinfer.param_specs": 5,
    "jaxinfer.parameters": 5,
    "jaxinfer.lockstep": 5,
    "jaxinfer.resolve": 5,
    "jaxinfer.resolve_together": 5,
    "jaxinfer.runner": 5,
    "jaxinfer.sampler_lowerings": 5,
    "jaxinfer.sampler_programs": 5,
    "jaxinfer.step_programs": 5,
    "jaxinfer.transfer": 5,
    "jaxinfer.step_layers": 5,
    "jaxinfer.steps": 5,
    "jaxinfer.async_engine": 6,
    "jaxinfer.embedder": 6,
    "jaxinfer.engine": 6,
    "jaxinfer.engine_core": 6,
    "jaxinfer.engine_thread": 6,
    # Programs.
    "jaxinfer.cli_flags": 7,
    "jaxinfer.engine_flags": 7,
    "jaxinfer.plan_mesh": 7,
    "jaxinfer.cli_output": 7,
    "jaxinfer.convert_checkpoint": 7,
    "jaxinfer.run_inference": 7,
    "jaxinfer.server": 7,
    "tools": 7,
}
HOST_LAYER = 1
PUBLIC = "jaxinfer"  # jaxinfer/__init__.py offers names from every layer, to users and programs only
PROGRAMS_LAYER = 7

BANNED_ANYWHERE = ("jax._src", "pickle", "cloudpickle", "dill", "shelve")
BANNED_OUTSIDE_BENCHMARKS = ("torch",)

Modules = dict[str, tuple[pathlib.Path, set[str]]]  # name -> (file, names that it imports)


def module_name(path: pathlib.Path, root: pathlib.Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: pathlib.Path) -> set[str]:
    """Every name that a file imports, with the packages around it, which run first.

    `from a import b` gives both "a" and "a.b", for b may be a module.
    """
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.rsplit(".", cut)[0] for name in names for cut in range(name.count(".") + 1)}


def read_modules(root: pathlib.Path) -> Modules:
    files = [file for top in (*PACKAGES, "tools") for file in sorted((root / top).rglob("*.py"))]
    return {module_name(file, root): (file, imports_of(file)) for file in files}


def layer_of(name: str) -> int | None:
    """The layer of the longest entry of `LAYERS` that is `name` or a package around it."""
    while name:
        if name in LAYERS:
            return LAYERS[name]
        name = name.rpartition(".")[0]
    return None


def is_under(name: str, tops: tuple[str, ...]) -> bool:
    return any(name == top or name.startswith(top + ".") for top in tops)


def own_imports(modules: Modules, name: str) -> set[str]:
    """Modules of ours that `name` imports, by the file that answers: `sharding_rules.axes.HEADS` is none."""
    # A package's __init__ names its own submodules, and they it, without a cycle that could bite: running a
    # submodule's file needs no more of the package than its existence.
    return {m for m in modules[name][1] if m in modules and m != name and not is_under(name, (m,))}


def public_names(modules: Modules, imports: set[str]) -> set[str]:
    """Those of `imports` that jaxinfer/__init__.py provides, such as "jaxinfer.Engine"."""
    in_package = {name for name in imports if name.rpartition(".")[0] == PUBLIC}
    return {name for name in in_package if not any(is_under(module, (name,)) for module in modules)}


def violations(root: pathlib.Path) -> list[str]:
    """What breaks the rules, a sentence each."""
    modules = read_modules(root)
    problems = []
    for name, (file, imports) in modules.items():
        where = str(file.relative_to(root))
        layer = layer_of(name)
        if name != PUBLIC and layer is None:
            problems.append(f"{where}: no layer; give it one in LAYERS")
        problems += [f"{where} imports {m}" for m in sorted(imports) if is_under(m, BANNED_ANYWHERE)]
        if not where.startswith("tools/bench"):
            problems += [f"{where} imports {m}" for m in sorted(imports) if is_under(m, BANNED_OUTSIDE_BENCHMARKS)]
        for imported in sorted(own_imports(modules, name)):
            above = layer_of(imported)
            if layer is not None and above is not None and above > layer:
                problems.append(f"{where} (layer {layer}) imports {imported} (layer {above})")
        if name != PUBLIC and layer != PROGRAMS_LAYER:
            problems += [f"{where} imports {m} from the public surface" for m in sorted(public_names(modules, imports))]
        if layer == HOST_LAYER and (chain := chain_to_jax(modules, name)):
            problems.append(f"{where} is host only but reaches jax: {' -> '.join(chain)}")
    return problems + [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(modules)]


def chain_to_jax(modules: Modules, start: str) -> list[str] | None:
    """The shortest path of imports from `start` to jax or flax, or None."""
    queue, seen = [[start]], {start}
    while queue:
        chain = queue.pop(0)
        if any(is_under(m, ("jax", "jaxlib", "flax")) for m in modules[chain[-1]][1]):
            return [*chain, "jax"]
        for following in sorted(own_imports(modules, chain[-1]) - seen):
            seen.add(following)
            queue.append([*chain, following])
    return None


def cycles(modules: Modules) -> list[list[str]]:
    """Import cycles, each once, found by depth-first search."""
    found, done = [], set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for imported in sorted(own_imports(modules, name)):
                visit(imported, [*path, name])
            done.add(name)

    for name in sorted(modules):
        visit(name, [])
    return found


def test_imports_go_down():
    found = violations(ROOT)
    assert not found, "\n".join(found)


def test_host_modules_run_without_jax():
    """As above, but by running them: catches what a third-party library or a package's __init__ drags in."""
    modules = [name for name in read_modules(ROOT) if layer_of(name) == HOST_LAYER]
    code = f"import sys, {', '.join(modules)}; assert not {{'jax', 'flax', 'torch'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_module_is_seen():
    modules = read_modules(ROOT)
    assert {"jaxinfer", "jaxinfer.config", "jaxinfer.models.llama", "sharding_rules.axes"} <= set(modules)
    assert own_imports(modules, "jaxinfer.layers.decoder") >= {"jaxinfer.config", "sharding_rules.axes"}


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"jaxinfer/planner.py": "def f():\n    import jax.numpy"},
            "planner.py is host only but reaches jax: jaxinfer.planner",
        ),
        (
            {"jaxinfer/config.py": "import sharding_rules.extra", "sharding_rules/extra.py": "from jax import numpy"},
            "reaches jax: jaxinfer.config -> sharding_rules.extra -> jax",
        ),
        (
            {"jaxinfer/layers/norm.py": "from jaxinfer.models import llama", "jaxinfer/models/llama.py": ""},
            "jaxinfer/layers/norm.py (layer 3) imports jaxinfer.models.llama (layer 4)",
        ),
        ({"jaxinfer/novelty.py": ""}, "jaxinfer/novelty.py: no layer"),
        ({"pallas_kernels/op/triton.py": "from jax._src import core"}, "pallas_kernels/op/triton.py imports jax._src"),
        ({"jaxinfer/checkpoint/reader.py": "import pickle"}, "jaxinfer/checkpoint/reader.py imports pickle"),
        ({"tools/plan.py": "import torch.nn"}, "tools/plan.py imports torch.nn"),
        (
            {"jaxinfer/runner.py": "import jaxinfer.transfer", "jaxinfer/transfer.py": "from jaxinfer import runner"},
            "import cycle: jaxinfer.runner -> jaxinfer.transfer -> jaxinfer.runner",
        ),
        (
            {"jaxinfer/sampling.py": "from jaxinfer import Engine", "jaxinfer/__init__.py": ""},
            "imports jaxinfer.Engine from",
        ),
    ],
)
def test_planted_violations_are_detected(tmp_path: pathlib.Path, files: dict[str, str], problem: str):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = violations(tmp_path)
    assert any(problem in sentence for sentence in found), found


def test_benchmarks_may_import_torch(tmp_path: pathlib.Path):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "bench_peer.py").write_text("import torch")
    assert violations(tmp_path) == []
