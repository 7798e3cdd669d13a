"""The policy: a base model with what trains on it, and the reference that it started from."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from align.bounds import check_folder
from align.errors import UserError
from align.model.adapters import AdapterConfig, Full
from align.model.attach import (
    REFERENCE,
    TRAINED,
    adapter_config,
    adapter_layers,
    adapter_state,
    attach_adapter,
    continue_adapter,
    tuner,
)
from align.model.checkpoint import ADAPTER_FILE, export_adapter, export_model, load_state, save_state
from align.model.checks import check_forward, check_training_mode
from align.model.config import PolicySection
from align.model.forward import TokenScorer, evaluating, language_part
from align.model.fusing import enable_fusing
from align.model.identity import Identity, base_identity, reference_identity
from align.model.load import LoadOptions, load_model, load_tokenizer, model_folder, model_name
from align.model.moving import MOVING, MovingReference
from align.model.packing import enable_packing
from align.model.sharding import at_rest
from align.packing import packed_collate
from align.packing.batch import Example, collate
from align.packing.rope import fix_frequencies
from align.progress import stage
from align.types import ListBatch
from rewards.files import is_of_other_weights

log = logging.getLogger("align")


class Policy:
    """A model that trains, its tokenizer, and its reference."""

    has_reference = True

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        adapter: str,
        base: Identity,
        frozen: PreTrainedModel | None = None,
        dropout: dict[str, float] | None = None,
        packing: bool = False,
        folder: Path | None = None,
    ) -> None:
        """Args:
        adapter: the adapter's name in the recipe, "full" or "start_adapter".
        base: identity of the files that the base model came from.
        frozen: the reference as a model of its own, for full training.
        dropout: the model's own dropout probabilities, where they are off while it trains.
        packing: whether the model can take packed rows, and is to.
        folder: the base's files.
        """
        self.folder = folder
        self.model = model
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.base = base
        self.frozen = frozen
        self.dropout = dropout or {}
        self.packing = packing
        self.stand_in: nn.Module | None = None
        """What a TokenScorer runs in place of `model` while the reference is asked for and is a model of its own."""
        self.trained = False
        """Whether a step was taken, so that the weights are no longer the initial ones."""
        self._scorer: nn.Module | None = None
        self.moving: MovingReference | None = None
        """What moves the reference, where it follows the policy."""
        self._layers = adapter_layers(model)
        self._has_copy = isinstance(model, PeftModel) and REFERENCE in model.peft_config

    @property
    def pad_id(self) -> int:
        """Token id that fills rows."""
        return self.tokenizer.pad_token_id

    def collate(self, examples: Sequence[Example]) -> ListBatch:
        """Tokenised lists as the model reads them, on its device."""
        batch = packed_collate(examples) if self.packing else collate(examples, pad_id=self.pad_id)
        return batch.to(self.model.device)

    def scorer(self) -> nn.Module:
        """The model as one module from lists to what the loss is computed from; always the same one."""
        if self._scorer is None:
            self._scorer = self._new_scorer()
        return self._scorer

    def _new_scorer(self) -> nn.Module:
        return TokenScorer(self)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the policy's scorer computes the reference: no gradient, no dropout; training finds all as it was.

        Raises:
            RuntimeError: full training without a copy of the initial weights, after the first step.
        """
        with evaluating(self.model), torch.no_grad(), self._reference_weights():
            yield

    def follow(self, *, every: int, mixture: float) -> None:
        """Let the reference follow the policy from now on; see MovingReference."""
        self.moving = MovingReference(self.model, self.frozen, every=every, mixture=mixture)

    def _reference_weights(self) -> Any:
        if self.moving and self.moving.moved and self._layers:
            return adapter_state(self._layers, _active_adapter=[MOVING])
        if self._has_copy:
            return adapter_state(self._layers, _active_adapter=[REFERENCE])
        if self._layers:
            return adapter_state(self._layers, _disable_adapters=True)
        if self.frozen is not None:
            return self._standing_in(self.frozen)
        if self.trained:
            raise RuntimeError("the initial weights are gone: full training was loaded with keep_reference=False")
        return nullcontext()

    @contextmanager
    def _standing_in(self, model: nn.Module) -> Iterator[None]:
        self.stand_in = model
        try:
            yield
        finally:
            self.stand_in = None

    def after_step(self, step: int) -> None:
        """To be called between the optimizer's step and zero_grad: AdaLoRA moves its ranks by the gradients, and a
        reference that follows the policy is moved.

        Args:
            step: optimizer steps taken, this one included.
        """
        self.trained = True
        if self.adapter == "adalora":
            tuner(self.model).update_and_allocate(step)
        if self.moving:
            self.moving.after_step(step)

    def penalty(self) -> Tensor | float:
        """What AdaLoRA and SORSA add to the loss, their mean ||P P' - I||_F over the factors; 0.0 for any other."""
        adapted = isinstance(self.model, PeftModel)
        weight = getattr(adapter_config(self.model), "orth_reg_weight", 0.0) if adapted else 0.0
        if not weight:
            return 0.0
        factors = [_orthogonality(name, p) for name, p in self.model.named_parameters() if _is_factor(name)]
        return weight * torch.stack(factors).mean()

    def reference_identity(self) -> Identity:
        """All that the reference's log-probabilities depend on besides token ids and precision."""
        at_rest(self._scorer)
        return reference_identity(self.model, self.base, REFERENCE if self._has_copy else None)

    def save_adapter(self, folder: Path) -> None:
        """Write what was trained for use elsewhere: a PEFT adapter for the original base, or a whole model.

        Where weights are sharded every process calls this, as it does `save_state`.
        """
        at_rest(self._scorer)
        if isinstance(self.model, PeftModel):
            export_adapter(self.model, folder, base=self.base)
        else:
            export_model(self.model, folder, dropout=self.dropout)

    def save_state(self, folder: Path) -> None:
        """Write all that training has changed, bit for bit, and the start it is measured from."""
        at_rest(self._scorer)
        save_state(self.model, folder, base=self.base)
        if self.moving:
            self.moving.save(folder)

    def load_state(self, folder: Path, *, keep_reference: bool = False) -> None:
        """Go on from `save_state`.

        Args:
            keep_reference: take the trained weights alone, and leave the frozen start that they are measured from.

        Raises:
            UserError: the state is missing or belongs to another base or adapter.
        """
        at_rest(self._scorer)
        load_state(self.model, folder, base=self.base, keep_reference=keep_reference)
        self.trained = True

    def load_moved(self, folder: Path) -> None:
        """Go on from `save_state` with the reference too, where it follows the policy."""
        if self.moving:
            self.moving.load(folder)


@stage("loading the model")
def load_policy(
    section: PolicySection,
    options: LoadOptions = LoadOptions(),  # noqa: B008, frozen
    *,
    keep_reference: bool = True,
) -> Policy:
    """The policy of a recipe's `policy` section, at its start.

    Args:
        section: all of it but `start_run`, whose weights are put in afterwards.
        keep_reference: full training keeps a copy of the initial weights; False where the reference is cached before
            the first step.

    Raises:
        UserError: something named does not exist, does not fit, or nothing would train.
    """
    model, device = section.model, torch.device(options.device)
    _check_quantization(section.adapter, section.quantization, device)
    code = {"trust_remote_code": section.trust_remote_code}
    folder = model_folder(model, section.revision, **code)
    tokenizer = load_tokenizer(model, revision=section.revision, chat_template=section.chat_template, **code)
    base, own_dropout = load_model(
        folder,
        dtype=section.dtype,
        attention=section.attention,
        quantization=section.quantization,
        dropout=options.dropout,
        device=device,
        **code,
    )
    packing = make_ready(base, options, name=model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        trained = with_adapter(base, section, options, folder)
    what = "start_adapter" if section.start_adapter is not None else section.adapter.name
    if not any(p.requires_grad for p in trained.parameters()):
        raise UserError(f"policy.adapter: nothing of {model} would train with {what}; check its targets")
    enable_fusing(trained, name=model)
    frozen = deepcopy(base).requires_grad_(False).eval() if what == "full" and keep_reference else None
    identity = {**base_identity(model, folder), "quantization": section.quantization}
    known: dict[str, Any] = {"frozen": frozen, "dropout": own_dropout, "packing": packing, "folder": folder}
    return Policy(trained, tokenizer, adapter=what, base=identity, **known)


def make_ready(base: PreTrainedModel, options: LoadOptions, *, name: str) -> bool:
    """Mend and check what every forward pass relies on; whether rows will be packed."""
    fix_frequencies(base, name=name)
    check_forward(base, name=name)
    if not options.dropout:
        check_training_mode(base, name=name)
    packing = options.packing and enable_packing(base, name=name)
    freeze_other_parts(base, name=name)
    return packing


def with_adapter(
    base: PreTrainedModel, section: PolicySection, options: LoadOptions, folder: Path
) -> PreTrainedModel | PeftModel:
    adapter = section.adapter
    if section.start_adapter is not None:
        check_folder(Path(section.start_adapter).expanduser())
        _check_weights_of(Path(section.start_adapter).expanduser(), section.model, folder)
        wrapped = continue_adapter(base, section.start_adapter, instead_of=adapter)
        own = adapter_config(wrapped)  # whose base may be another copy, or a path from where it was made
        own.base_model_name_or_path, own.revision = model_name(section.model), section.revision
        return wrapped
    if isinstance(adapter, Full):
        return base
    return attach_adapter(base, adapter, section, options, folder=folder)


def _check_weights_of(start_adapter: Path, model: str, folder: Path) -> None:
    """Refuse an adapter whose base was overwritten since; one put onto a model of another name is told of it."""
    file = start_adapter / ADAPTER_FILE
    if not file.is_file() or not is_of_other_weights(file, folder):
        return
    named = json.loads((start_adapter / "adapter_config.json").read_text()).get("base_model_name_or_path") or ""
    if Path(named).expanduser().resolve() == folder.resolve():
        raise UserError(
            f"{start_adapter} was trained on other weights than {model} holds now; put the old ones back, or train anew"
        )
    log.warning("%s was trained on %s, whose weights are not those of %s", start_adapter, named, model)


def freeze_other_parts(base: PreTrainedModel, *, name: str) -> None:
    """Of a model that sees or hears too, the language part alone trains; the rest is kept as it is."""
    is_language = language_part(base)
    others = [(n, p) for n, p in base.named_parameters() if not is_language(n)]
    for _, parameter in others:
        parameter.requires_grad_(False)
    if others:
        kept = ", ".join(sorted({".".join(n.split(".")[:2]) for n, _ in others}))
        log.warning(
            "%s (%s) reads more than text: its language part alone is trained, on text; %s stay as they are and are "
            "part of an export",
            name,
            type(base).__name__,
            kept,
        )


def _check_quantization(adapter: AdapterConfig, quantization: str | None, device: torch.device) -> None:
    adapter.check_quantization(quantization)
    if quantization is not None and device.type == "cpu":
        raise UserError(
            "policy.quantization: 4bit needs a GPU: on a CPU bitsandbytes gives wrong gradients after scoring"
        )


def _is_factor(name: str) -> bool:
    own = f"lora_A.{TRAINED}" in name or f"lora_B.{TRAINED}" in name
    return own and not name.endswith(".middle")


def _orthogonality(name: str, factor: Float[Tensor, "r H"]) -> Tensor:
    gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
    return torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device))
