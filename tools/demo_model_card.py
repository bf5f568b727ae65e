"""The model card of the demonstration model: written from figures and samples, never by hand."""

import pathlib
from typing import Any

from jaxinfer import Engine, SamplingParams

PROMPTS = ("Once upon a time", "The old woman", '"Where are you going?" asked the fox.')

_SAMPLING = {"temperature": 0.7, "max_tokens": 100, "seed": 0}

_CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---

# jaxinfer demonstration model

A Llama of {num_params:,} parameters that writes fairy tales. It exists so that `run_inference` has something to
run at once, offline: it knows no facts and follows no instructions.

## Data

Sixteen English story collections in the public domain: Andrew Lang's coloured fairy books, the Grimms in Taylor's
and Edwardes's translation, Andersen, Joseph Jacobs's English fairy tales, *Alice's Adventures in Wonderland* and
*The Wonderful Wizard of Oz*. Titles and headers are removed. Every twentieth story is held out: {train_tokens:,}
tokens to train on, {held_out_tokens:,} held out. The stories are a hundred years old and more, and so are their
views of people.

## Recipe

`tools/train_demo_model.py`: a byte-level BPE of {vocab_size:,} tokens; {steps:,} steps of {batch_tokens:,} tokens
({epochs:.1f} epochs) in float32; Muon for hidden matrices and AdamW for the rest; windows of {short_window} tokens,
at the end of {context}; a constant learning rate that falls to a fiftieth over the last part. Stored in {dtype}.

## Held-out perplexity

{perplexity:.1f} per token, in windows of {context} tokens, on stories that it never saw; of the weights in {dtype}.

## Samples

At temperature {temperature}, {max_tokens} tokens, seed {seed}, not selected:

{samples}
"""


def samples(model_dir: pathlib.Path) -> list[str]:
    """What the model in `model_dir` writes after each of `PROMPTS`."""
    with Engine(str(model_dir), max_num_seqs=len(PROMPTS)) as engine:
        outputs = engine.generate(PROMPTS, SamplingParams(**_SAMPLING, ignore_eos=True))
    return [f"{output.prompt}{output.outputs[0].text}" for output in outputs]


def render(facts: dict[str, Any], texts: list[str]) -> str:
    """The card in Markdown, with the facts that `train_demo_model` measured."""
    quoted = ["\n".join(f"> {line}".rstrip() for line in text.splitlines()) for text in texts]
    return _CARD.format(**facts, **_SAMPLING, samples="\n\n---\n\n".join(quoted))
