"""How causal language models of transformers make logits of a decoder's output, beyond a linear layer."""

from typing import Any

from transformers import PreTrainedModel

SCALES = {"logit_scale": 1, "logits_scaling": -1, "lm_head_multiplier": 1, "output_multiplier": 1}
"""What models' configs call a factor of the logits, and the power in which it counts."""
SCALES_OF_TYPE: dict[str, dict[str, int]] = {"hyperclovax": {"logits_scaling": 1}, "mpt": {}}
"""The same of the models that read these names otherwise, or not at all."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def scale_and_cap(config: Any) -> dict[str, Any]:
    """Keywords of linear_logprobs: logits = cap tanh(scale (h W' + b) / cap).

    Args:
        config: of the text model; null, as some configs say, counts as 1, or as no cap.
    """
    scale = 1.0
    for name, power in SCALES_OF_TYPE.get(config.model_type, SCALES).items():
        if (factor := getattr(config, name, None)) is not None:
            scale *= factor**power
    caps = [cap for cap in (getattr(config, name, None) for name in SOFT_CAPS) if cap is not None]
    return {"logit_scale": scale, "softcap": (*caps, None)[0]}


def decoder_of(base: Any) -> PreTrainedModel:
    """The module whose last hidden states the LM head reads."""
    decoder: PreTrainedModel = base.get_decoder()
    if decoder is not base:
        return decoder
    inner: PreTrainedModel = base.model  # Llama 4's text model names another module than it has
    return inner
