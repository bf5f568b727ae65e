"""Meshes of the tests that compile a model for each: all in the long campaign, those that say most otherwise."""

import os


def chosen(meshes: tuple[str, ...], *telling: str) -> tuple[str, ...]:
    """`meshes` with JAXINFER_TEST_MESHES=all, else `telling`, which are of them."""
    assert set(telling) <= set(meshes)
    return meshes if os.environ.get("JAXINFER_TEST_MESHES") == "all" else telling
