"""What a user may choose about an engine. Names follow vLLM's where the meaning is the same."""

import dataclasses
import typing

from jaxinfer.unknown_names import StrictFields

DTYPES = ("auto", "float32", "bfloat16", "float16")
_FP8 = "float8_e4m3fn"
KV_CACHE_DTYPES = {"auto": None, "int8": "int8", "fp8": _FP8, "fp8_e4m3": _FP8}
NOT_FLAGS = frozenset({"show_progress"})  # run_inference always shows it

_KINDS = {str: "text", int: "an integer", float: "a number", bool: "True or False", type(None): "None"}
_AT_LEAST = {
    "max_num_seqs": 1,
    "max_num_batched_tokens": 1,
    "decode_steps": 1,
    "max_model_len": 2,  # a prompt of one token, and one that is generated
    "page_size": 1,
    "kv_cache_bytes": 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig(StrictFields):
    """Each field is a keyword of `Engine` and, `NOT_FLAGS` excepted, a flag of `run_inference` with the same name.

    Raises ValueError, naming the flag, for a value of another type or out of range.

    Attributes:
      model: model directory; None for the demonstration model.
      mesh: device mesh as "data:2,tensor:4"; "" for one device.
      sharding: a strategy in `sharding_rules/`, or "auto" for `inference`.
      dtype: of weights, activations and cache; "auto" is bfloat16 on GPU and float32 on CPU.
      kv_cache_dtype: "int8" or "fp8_e4m3" (also "fp8") quantises keys and values as they are cached, those of a token
        and a head by a scale of their own; "auto" does not.
      max_model_len: longest prompt plus output in tokens; None for what the model was trained for, at most 4096.
      max_num_seqs: sequences that decode together, or texts that an encoder reads together, over the whole mesh.
      max_num_batched_tokens: most tokens of a step in one data shard: a token of each sequence that decodes, and
        beside them prompts, or pieces of them. Of an encoder padded texts, which have no pieces: at least one.
      page_size: tokens per cache page; None for 64 on GPU and 16 on CPU.
      kv_cache_bytes: size of the cache per device; None for what the sequences can use, within memory_fraction.
      memory_fraction: share of a device's free memory that weights, cache and a step's workspace may take.
      decode_steps: tokens per sequence and dispatch when no request waits; one when one does.
      enable_prefix_caching: keep the pages of finished requests for those that start alike.
      seed: base of the seeds of requests that name none.
      attention_backend: a backend in `pallas_kernels/paged_attention/`, or "auto".
      moe_backend: a backend in `pallas_kernels/grouped_matmul/`, or "auto".
      expert_placement: JSON file that says which expert is in which slot of the devices of `expert`: some in several,
        as copies. `expert_placement.propose` makes one. None: each once.
      expert_counts: count the tokens of each expert, for the metrics.
      generation_config: "auto" applies the model's generation_config.json, "none" does not.
      wait_for_programs: an `Engine` is made when all programs are compiled. False: at once, a step waits for its own
        program, and the rest is compiled beside the steps. Several processes always wait.
      show_progress: progress lines for loading, compiling and `generate`, on stderr.
    """

    model: str | None = None
    mesh: str = ""
    sharding: str = "auto"
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 512
    page_size: int | None = None
    kv_cache_bytes: int | None = None
    memory_fraction: float = 0.9
    decode_steps: int = 8
    enable_prefix_caching: bool = True
    seed: int = 0
    attention_backend: str = "auto"
    moe_backend: str = "auto"
    expert_placement: str | None = None
    expert_counts: bool = False
    generation_config: str = "auto"
    wait_for_programs: bool = True
    show_progress: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self._check_type(field)
        for name, low in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"--{name}={value}: must be an integer of at least {low}")
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"--memory_fraction={self.memory_fraction}: must be above 0 and at most 1")
        cache_dtypes = ("kv_cache_dtype", KV_CACHE_DTYPES)
        for name, legal in (("dtype", DTYPES), cache_dtypes, ("generation_config", ("auto", "none"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"--{name}={getattr(self, name)}: unknown; known: {', '.join(legal)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"--seed={self.seed}: must be an integer in [0, 2**32)")

    @property
    def cache_dtype(self) -> str | None:
        """Of a quantised cache, by its name in JAX."""
        return KV_CACHE_DTYPES[self.kv_cache_dtype]

    def _check_type(self, field: dataclasses.Field) -> None:
        """Exact types, for True is an int to isinstance, and a numpy integer would overflow in byte arithmetic."""
        value, kinds = getattr(self, field.name), typing.get_args(field.type) or (field.type,)
        if type(value) not in kinds and not (float in kinds and type(value) is int):
            wanted = " or ".join(_KINDS[kind] for kind in kinds)
            raise ValueError(f"--{field.name}={value!r}: must be {wanted}")
