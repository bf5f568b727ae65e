"""What tests of kernels for CPUs share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import AttentionSpec, cpu

SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=16, scale=0.25)
CPU = jax.devices("cpu")[0]

needs_compiler = pytest.mark.skipif(cpu.unsupported(SPEC, CPU) is not None, reason="there is no C++ compiler here")


def attend(q, pages, positions, spec: AttentionSpec = SPEC, v_pages=None, table=(0, 1, 2, 3)) -> np.ndarray:
    """A prompt's tokens one after the other, of the sequence whose pages are `table`."""
    sequence = [jnp.asarray(a, jnp.int32) for a in ([table], positions[:1], [len(positions)])]
    pools = pages, pages if v_pages is None else v_pages
    return np.asarray(cpu.ragged_paged_attention(q, *pools, *sequence, spec=spec))
