"""Which pod of an indexed job of Kubernetes this is, as its interface says; needs the package `kubernetes`."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

_NAMESPACE = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Pods(NamedTuple):
    """Of a job whose pods run together."""

    first_host: str
    num_pods: int
    own_index: int


def find_pods(env: Mapping[str, str]) -> Pods | None:
    """Those of this pod's job, which are found by the name `job-index.subdomain`.

    None where there is no such job, and where its pods are not all there at once or have no names for each other: then
    each is by itself. Raises ValueError if the job must not be read.
    """
    index, hostname = env.get("JOB_COMPLETION_INDEX"), env.get("HOSTNAME", "")
    if index is None or "KUBERNETES_SERVICE_HOST" not in env or importlib.util.find_spec("kubernetes") is None:
        return None
    job = _read_job(hostname.removesuffix(f"-{index}")).spec
    subdomain, count = job.template.spec.subdomain, job.completions or 1
    if subdomain is None or count == 1 or count != job.parallelism:
        return None
    return Pods(f"{hostname.removesuffix(index)}0.{subdomain}", count, int(index))


def _read_job(name: str) -> Any:
    import kubernetes  # pyright: ignore[reportMissingImports]

    try:
        kubernetes.config.load_incluster_config()
        return kubernetes.client.BatchV1Api().read_namespaced_job(name, _NAMESPACE.read_text().strip())
    except Exception as error:  # forbidden, without a token, out of reach: each has a type of its own
        why = " ".join(str(getattr(error, part)) for part in ("status", "reason") if hasattr(error, part)) or error
        raise ValueError(
            f"Kubernetes does not let this pod read its job {name}: {why}; let its service account get jobs, or give "
            f"--coordinator_address, --num_processes and --process_id"
        ) from error
