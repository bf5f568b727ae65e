"""What fits on which devices, and how fast it would be: `plan_mesh`.

`hardware` and `clusters` say what devices there are, `workload` what is asked of them, `weight_shapes` what the model's
parameters take of each, `roofline` how long a step is, `candidates` which meshes there are and why some cannot be,
`ranking` which is best. All of that is host arithmetic, over what modules and kernels say of their sizes. `compiled`
asks XLA, which knows GPUs that are not there. `bars` are pictures of plans for a terminal, `plots` for a file.
"""
