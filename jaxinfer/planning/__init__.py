"""What fits on which devices, and how fast it would be: `plan_mesh`.

`hardware` and `clusters` say what devices there are, and `calibration` measures a CPU; `workload` says what is asked of
them, `weight_shapes` what the model's parameters take of each, `roofline` how long a step is, `candidates` which meshes
there are, why some cannot be and which is best. All of that is host arithmetic, over what modules and kernels say of
their sizes. `facts` asks XLA, which compiles an engine's `programs` (`compiled`, `hlo`) for GPUs that are not there
(`target`). `bars` are pictures of plans for a terminal, `plots` for a file; `dry_run` plans for what is here.
"""
