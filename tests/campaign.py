"""A random load on an engine core, and what must be true of it afterwards."""

import random
from collections.abc import Callable

from jaxinfer.engine_core import EngineCore
from jaxinfer.request import FinishReason, Request


def campaign(
    core: EngineCore,
    rng: random.Random,
    num_steps: int,
    make: Callable[[int], Request],
    *,
    preempt_every: int = 0,
    after_step: Callable[[], None] = lambda: None,
) -> list[Request]:
    """Random arrivals and aborts for `num_steps`, then until all is done. The books are checked after every step.

    `make` gives the request of a number. While requests arrive, every `preempt_every` steps somebody who runs is
    preempted, needed or not.
    """
    requests: list[Request] = []
    start, turns = core.stats.steps, 0
    while (is_loading := core.stats.steps - start < num_steps) or core.has_work:
        if is_loading and rng.random() < 0.3:
            requests.append(make(len(requests)))
            core.scheduler.add(requests[-1])
        if requests and rng.random() < 0.02:
            core.abort(rng.choice(requests))
        running = [request for rows in core.scheduler.running for request in rows]
        if is_loading and preempt_every and turns % preempt_every == 0 and running:
            core.scheduler._preempt(rng.choice(running))
        core.step()
        core.scheduler.check()
        after_step()
        turns += 1
        assert turns < 100 * num_steps, "no progress"
    return requests


def report(core: EngineCore, requests: list[Request], solo: Callable[[Request], list[int]]) -> dict[str, int]:
    """What happened, by name. `solo` gives the output of a request that is alone."""
    mismatches = finished = errors = 0
    for request in requests:
        output, wanted = request.output_token_ids, solo(request)
        if request.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
            wanted = wanted[: len(output)]
            errors += request.finish_reason is FinishReason.ERROR
        else:
            finished += 1
        mismatches += output != wanted
    return {
        "steps": core.stats.steps,
        "finished": finished,
        "errors": errors,
        "tokens": sum(len(r.output_token_ids) for r in requests),
        "preemptions": core.scheduler.num_preemptions,
        "mismatching requests": mismatches,
        "leaked pages": sum(a.num_usable_pages - a.num_free for a in core.scheduler.allocators),
    }
