"""The same models in Hugging Face transformers: float32, eager attention. Needs PyTorch."""

import math
import pathlib
import warnings
from typing import Any

import numpy as np

# A gap between the two largest logits below this fraction of their range could go either way in float32.
NEAR_TIE = 1e-3


def load(model_dir: pathlib.Path, **options: Any) -> Any:  # transformers.PreTrainedModel
    """The model of a directory. Raises AssertionError unless its weights were used, each exactly once.

    `options` are those of the model's class.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other projects deprecate is not ours to fail on
        import torch
        import transformers

        transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(model_dir)
        [architecture] = list(config.architectures or [])
        model, info = getattr(transformers, architecture).from_pretrained(
            model_dir,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            **options,
        )
    unused = {key: value for key, value in info.items() if value}
    assert not unused, f"transformers did not take the weights as they are: {unused}"
    return model.eval()


def load_encoder(model_dir: pathlib.Path) -> Any:
    """As `load`, without the head of a training objective, which our files have no tensors of."""
    return load(model_dir, add_pooling_layer=False)


def hidden(model: Any, token_ids: list[int]) -> np.ndarray:
    """float32 [len(token_ids), D], an encoder's last activations."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([token_ids])).last_hidden_state[0].numpy()


def logits(model: Any, token_ids: list[int]) -> np.ndarray:
    """float32 [len(token_ids), V]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].float().numpy()


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int] | None:
    """The likeliest tokens after `prompt`; None where a near-tie makes them a matter of rounding."""
    import torch

    tokens: list[int] = []
    cache, fed = None, prompt
    with torch.no_grad():
        while len(tokens) < num_tokens:
            output = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
            cache, last = output.past_key_values, output.logits[0, -1]
            best, second = torch.topk(last, 2).values.tolist()
            if best - second < NEAR_TIE * float(last.max() - last.min()):
                return None
            tokens.append(int(last.argmax()))
            fed = tokens[-1:]
    return tokens


def attention_entropy(model: Any, token_ids: list[int]) -> np.ndarray:
    """Of the last position, per layer and head, as a fraction of uniform attention's: [layers * heads]."""
    import torch

    with torch.no_grad():
        layers = model(torch.tensor([token_ids]), output_attentions=True, use_cache=False).attentions
    probs = torch.cat([layer[0, :, -1] for layer in layers]).numpy()
    return -np.sum(probs * np.log(np.maximum(probs, 1e-30)), axis=-1) / math.log(len(token_ids))
