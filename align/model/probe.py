"""What a model is compared with itself on, and how far two computations may differ."""

import torch
from transformers import PreTrainedModel

from align.packing.batch import Example

TOLERANCE = 1e-3
HALF_TOLERANCE = 0.25
"""Nats; bfloat16 logits around 20 are 0.125 apart."""


def tolerance(*dtypes: torch.dtype) -> float:
    """How far two computations of one token's log-probability may differ, in nats, where these dtypes are involved."""
    return TOLERANCE if all(dtype.itemsize > 2 for dtype in dtypes) else HALF_TOLERANCE


def probe_lists(base: PreTrainedModel) -> list[Example]:
    """Three small lists for comparing a model with itself; completions of the last one fork twice."""
    vocabulary = base.config.get_text_config().vocab_size
    ids = [(7 * i + 1) % vocabulary for i in range(24)]
    shapes = (
        (ids[:3], [ids[3:5], ids[5:10], ids[10:12]]),
        (ids[12:14], [ids[14:18], ids[18:24]]),
        (ids[5:7], [*([*ids[:4], i] for i in ids[4:9]), ids[8:10]]),
    )
    return [{"prompt_ids": prompt, "completion_ids": own, "grades": [0.0] * len(own)} for prompt, own in shapes]
