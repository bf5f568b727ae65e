"""How much of which prompts a step prefills beside the rows that decode. Host only."""

from collections.abc import Sequence
from itertools import pairwise

from jaxinfer.integers import round_up
from jaxinfer.request import Request
from jaxinfer.step_plan import MAX_CHUNKS, Chunk


class ChunkPolicy:
    """Of one data shard, whose started prompts are given in order, with the number of rows that decode.

    `max_num_batched_tokens` is the budget of a step; rows that decode count one each. `chunk_sizes`, ascending, are
    the numbers of tokens that the chunks of a step are padded to; none: there is no padding. Each shard decides by
    itself; the largest of their numbers is what all are padded to.
    """

    def __init__(self, max_num_batched_tokens: int, chunk_sizes: tuple[int, ...] = ()):
        self._max_num_batched_tokens = max_num_batched_tokens
        self._chunk_sizes = chunk_sizes

    def has_room(self, started: Sequence[Request], num_decoding: int) -> bool:
        """Whether the next step has tokens left for another prompt when these have taken theirs."""
        return len(started) < MAX_CHUNKS and _num_tokens(started) < self._budget(num_decoding)

    def chunks(self, started: Sequence[Request], num_decoding: int) -> list[Chunk]:
        """What the next step prefills: the first prompts first, and at least one token if there is a prompt."""
        num_tokens = self.num_tokens(_num_tokens(started), num_decoding)
        chunks: list[Chunk] = []
        for request in started:
            if num_tokens:
                start = request.num_prefilled
                chunks.append(Chunk(request, start, min(request.num_prefill_tokens, start + num_tokens)))
                num_tokens -= chunks[-1].num_tokens
        return chunks

    def num_tokens(self, num_waiting: int, num_decoding: int) -> int:
        """That the next step prefills of so many that wait to be."""
        num_tokens = min(num_waiting, self._budget(num_decoding))
        for smaller, larger in pairwise(self._chunk_sizes):
            if smaller < num_tokens <= larger // 2:  # there would be more padding than tokens: the rest can wait
                return smaller
        return num_tokens

    def padded(self, num_tokens: int) -> int:
        """What a step's tokens are padded to."""
        return round_up(num_tokens, self._chunk_sizes) if self._chunk_sizes else num_tokens

    def _budget(self, num_decoding: int) -> int:
        left = max(1, self._max_num_batched_tokens - num_decoding)
        return min(left, self._chunk_sizes[-1]) if self._chunk_sizes else left


def _num_tokens(requests: Sequence[Request]) -> int:
    return sum(r.num_prefill_tokens - r.num_prefilled for r in requests)
