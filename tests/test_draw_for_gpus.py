"""The kernels that draw tokens, as they are compiled for GPUs; none is needed."""

import pathlib

import jax
import pytest

from pallas_kernels.draw import RowParams, triton
from tests import gpu_targets

pytestmark = pytest.mark.skipif(gpu_targets.missing() is not None, reason=str(gpu_targets.missing()))


@pytest.mark.parametrize("gpu", gpu_targets.EACH_CAPABILITY)
@pytest.mark.parametrize("vocab_size", [1000, 128_256])
def test_what_is_kept_of_a_row_fits_into_registers(gpu: str, vocab_size: int, tmp_path: pathlib.Path):
    dtypes = RowParams("float32", "int32", "float32", "float32", "uint32", "uint32")
    params = RowParams(*(jax.ShapeDtypeStruct((8,), dtype) for dtype in dtypes))
    logits = jax.ShapeDtypeStruct((8, vocab_size), "float32")
    gpu_targets.compile_for(gpu, triton.draw, logits, params, xla_dump_to=str(tmp_path))
    found = gpu_targets.resources(gpu, tmp_path)
    assert found.keys() >= {"_noise_kernel", "_choice_kernel"}
    assert not any(resources.spilled_bytes for resources in found.values()), found
