"""Products of rows with their groups' weights: the experts of a mixture. A backend is a module in this folder with

- `unsupported(smallest_size: int, device: jax.Device | None) -> str | None`: why it cannot multiply by weights of which
  a dimension has this size, there, or None if it can; without a device, why it cannot anywhere;
- `workspace_numbers(*, num_rows, num_expected, num_groups, embed_dim, mlp_dim) -> int`, as `xla.py` has it;
- `grouped_map(function, params, x, group_sizes, num_expected=None) -> out`, as `xla.py` documents it.
"""

from pallas_kernels.backends import Backends, Choice
from pallas_kernels.grouped_matmul.product import Product

__all__ = ["Choice", "Product", "backend", "backends", "choose", "resolve"]

_BACKENDS = Backends(__name__, "moe_backend", parts=("product",))
backends, backend, choose, resolve = _BACKENDS.names, _BACKENDS.load, _BACKENDS.choose, _BACKENDS.resolve
