"""The vocabulary of axis names.

Every axis of every weight, activation and cache array carries one of the logical names below (or
None for an axis that is never split). A sharding strategy maps logical names to mesh axes. They are
constants so that a typo is an AttributeError instead of a silently replicated weight.
"""

# Logical axes.
LAYERS = "layers"
EMBED = "embed"
HEADS = "heads"
KV_HEADS = "kv_heads"
HEAD_DIM = "head_dim"
LATENT = "latent"
MLP = "mlp"
VOCAB = "vocab"
POSITIONS = "positions"  # of a table of learned ones
EXPERTS = "experts"
EXPERT_MLP = "expert_mlp"  # of one expert
BATCH = "batch"
PAGES = "pages"

LOGICAL_AXES = (
    LAYERS,
    EMBED,
    HEADS,
    KV_HEADS,
    HEAD_DIM,
    LATENT,
    MLP,
    EXPERT_MLP,
    VOCAB,
    POSITIONS,
    EXPERTS,
    BATCH,
    PAGES,
)

# Mesh axes, slowest link first: replicas and stages may cross nodes, tensor stays inside one.
DATA = "data"
STAGE = "stage"
EXPERT = "expert"
CONTEXT = "context"
TENSOR = "tensor"

MESH_AXES = (DATA, STAGE, EXPERT, CONTEXT, TENSOR)

LogicalAxes = tuple[str | None, ...]
Dimensions = tuple[str | tuple[str, ...] | None, ...]  # where several axes may lie in one, the slowest first
