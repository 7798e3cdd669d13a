"""What becomes of each argument of TRL's, said where it is done and on the page of arguments."""

import logging
from typing import Any

from align.errors import UserError

log = logging.getLogger("align")

WITHOUT_EFFECT = {
    "padding_free": "rows are packed without padding in any case",
    "use_liger_kernel": "layers and the head run as Align's own fused operations",
    "liger_kernel_config": "layers and the head run as Align's own fused operations",
    "activation_offloading": "packed passes keep activations on the device; gradient_checkpointing saves what it would",
    "use_logits_to_keep": "the head sees the completions' positions alone in any case",
    "use_liger_loss": "no loss builds logits in any case",
    "label_pad_token_id": "there are no padded labels",
    "padding_value": "rows are packed without padding in any case",
    "base_model_attribute_name": "the decoder is found by itself",
    "force_use_ref_model": "a `ref_model` is used wherever it is given",
    "generate_during_eval": "add TRL's LogCompletionsCallback to `callbacks`, or use `align evaluate policy`",
}
"""Arguments that change nothing here, and why or what does it instead."""
REFUSED = {
    "is_encoder_decoder": "encoder-decoder models are not supported; of TRL 1 its CPOTrainer and ORPOTrainer take them",
    "model_adapter_name": "activate the adapter that is to train before you hand the model over (model.set_adapter)",
    "ref_adapter_name": "the adapter that the model comes with is its reference; give a `ref_model` for another one",
}
"""Arguments of older releases that cannot be taken, and what to do instead."""
_WHOLE = "a reward is of a whole sequence; pairs longer than max_length are left out, with a count"
OF_ONE: dict[tuple[str, str], tuple[str, str]] = {
    ("Reward", "chat_template_path"): (
        "limited",
        "only a file; another tokenizer's template may need tokens that the model lacks, so write it to a .jinja file, "
        "or use trl.RewardTrainer",
    ),
    ("Reward", "max_prompt_length"): ("without effect", _WHOLE),
    ("Reward", "max_completion_length"): ("without effect", _WHOLE),
    ("CPO", "max_completion_length"): ("without effect", "TRL reads it for encoder-decoders alone"),
    ("ORPO", "max_completion_length"): ("without effect", "TRL reads it for encoder-decoders alone"),
}
"""What a trainer does with an argument that others honour, and why. The sentences are those of its errors too."""


def answer(trainer: str, name: str) -> tuple[str, str]:
    """What a trainer does with an argument: honoured, limited, without effect or refused; and why, where not honoured.

    Args:
        trainer: such as "DPO".
    """
    if (trainer, name) in OF_ONE:
        return OF_ONE[trainer, name]
    if name in REFUSED:
        return "refused", REFUSED[name]
    if name in WITHOUT_EFFECT:
        return "without effect", WITHOUT_EFFECT[name]
    return "honoured", ""


def beyond(trainer: str, name: str) -> UserError:
    """The error of a value that a trainer cannot take."""
    return UserError(f"{name}: {answer(trainer, name)[1]}")


def answer_arguments(args: Any, trainer: str) -> None:
    """Say which of the arguments that were given have no effect, and refuse those that cannot be taken.

    Raises:
        UserError: an argument that cannot be taken.
    """
    for name in [*REFUSED, *WITHOUT_EFFECT, *(name for of, name in OF_ONE if of == trainer)]:
        value, (what, why) = getattr(args, name, None), answer(trainer, name)
        if what == "refused" and value:
            raise beyond(trainer, name)
        if what == "without effect" and value is not None and value is not False:
            log.warning("%s has no effect: %s", name, why)
    if getattr(args, "liger_kernel_config", None) or getattr(args, "use_liger_kernel", False):
        args.use_liger_kernel = False  # transformers would replace the forward that the trainer gives the model
