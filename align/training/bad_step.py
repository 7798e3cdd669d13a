"""A step whose loss or gradient is no finite number: its lists are written out, and it is refused or passed over."""

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils import _pytree

from align.data.schema import Row
from align.errors import UserError
from align.evaluate.lists import reference_logprobs
from align.files import write_text
from align.progress import counted
from rewards.broken import REMEDY, broken_weights

log = logging.getLogger("align")

FILE = "bad_step.jsonl"
"""In the run directory."""
OF_GRADIENT = "gradient that is not finite is that of the output"
SKIPPED = "bad_step"
"""In metrics.jsonl, of a step that was passed over."""
ADVICE = "lower train.learning_rate, mend or leave out the rows, or pass over such steps with train.on_bad_step=skip"


class BadSteps:
    """Looks at every step before the optimizer takes it."""

    def __init__(self, trainer: Any, *, skip: bool) -> None:
        """Args:
        skip: whether a bad step is passed over; the optimizer's state and the weights then stay as they are.

        Raises:
            UserError: it cannot be passed over.
        """
        self.trainer, self.skip, self.rows = trainer, skip, ()
        self.skips = False
        """Whether the step under way is passed over."""
        if skip and trainer.is_deepspeed_enabled:
            raise UserError("train.on_bad_step: DeepSpeed takes its step before anyone can look; leave skip out")
        if skip and trainer.policy.adapter == "adalora":
            raise UserError("train.on_bad_step: adalora ranks directions by every step's gradients; leave skip out")

    rows: Sequence[Row]
    """The training rows as they were read."""

    def is_bad(self, loss: Tensor, norm: Any) -> bool:
        """Whether this process sees no finite number; float16's scaler itself passes over infinite gradients."""
        return not math.isfinite(float(loss)) or not (self.trainer.args.fp16 or math.isfinite(float(norm)))

    def met(self, bad: bool, loss: Tensor, norm: Any) -> None:
        """A step on which all processes agree.

        Raises:
            UserError: it is bad, and not to be passed over; says where it breaks.
        """
        self.skips = bad and self.skip
        if not bad:
            return
        step = self.trainer.state.global_step + 1
        if self.skip:
            self._write(step, {})
            log.warning("step %d: the loss or a gradient is no finite number; the step is passed over", step)
            if not self.trainer.args.fp16:
                self.trainer.model.zero_grad(set_to_none=True)  # an optimizer passes over what has no gradient
            return
        what = self._what(loss, norm)
        where, losses = self._repeat()
        self._write(step, losses)
        raise UserError(
            f"step {step}: {what}; {where}; the step's lists are in {self.trainer.run.path / FILE}; {ADVICE}"
        )

    def count(self) -> int:
        """Steps of the run that were passed over."""
        return sum(SKIPPED in line for line in self.trainer.run.read_metrics())

    def _what(self, loss: Tensor, norm: Any) -> str:
        losses = self.trainer.accelerator.gather(loss.detach().reshape(1)).tolist()
        if wrong := [value for value in losses if not math.isfinite(value)]:
            return f"the loss is {wrong[0]}"
        return f"the loss is {sum(losses) / len(losses):.4g}, the gradient's norm {float(norm)}"

    def _repeat(self) -> tuple[str, dict[int, float]]:
        """Where the step breaks, in words, and the loss of every list by its place in the training lists."""
        trainer = self.trainer
        if trainer.sharded or trainer.is_deepspeed_enabled:
            return "the weights are cut over processes, so it is not repeated", {}
        if broken := broken_weights(trainer.policy.model):
            return f"{broken}, after {counted(trainer.state.global_step, 'step')}", {}
        try:
            where, losses = self._watched()
            half = trainer.section.precision != "float32" or trainer.policy.model.dtype != torch.float32
            exact = self._watched(in_float32=True)[0] if half and where else where
        except (RuntimeError, MemoryError) as error:
            where, exact, losses = "", "", {}
            log.debug("not repeated: %s", error)
        parts = gather_object([(where, exact, losses)])
        first: Any = next((part for part in parts if part[0]), ("", ""))
        every = {place: loss for part in parts for place, loss in part[2].items()}
        return _words(first[0], first[1], precision=trainer.section.precision), every

    def _watched(self, *, in_float32: bool = False) -> tuple[str, dict[int, float]]:
        """The first layer that breaks in this process's lists, and their losses."""
        trainer, losses = self.trainer, {}
        model = trainer.scorer
        if in_float32:  # without the autocast that accelerate has put around its forward pass
            model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False).float()
        rows = trainer.plan[trainer.state.global_step]
        precision = torch.autocast(trainer.args.device.type, enabled=False) if in_float32 else nullcontext()
        model.zero_grad(set_to_none=True)
        with _watch(trainer.policy.model) as found, precision:
            for place in own_places(trainer, rows):
                batch = trainer.policy.collate([trainer.lists[place] | {"key": 0}])
                with nullcontext() if in_float32 else trainer.compute_loss_context_manager():
                    needs = trainer.loss.needs_reference
                    reference = reference_logprobs(model, trainer.policy, batch) if needs else None
                    stats = model(batch, trainer.outputs)
                loss = trainer.loss(stats, reference, batch, trainer.baseline).sum()
                losses[place] = float(loss.detach())
                loss.backward()
        return (found[0] if found else ""), losses

    def _write(self, step: int, losses: dict[int, float]) -> None:
        """The step's lists as they were read, into bad_step.jsonl beside those of earlier steps."""
        trainer = self.trainer
        if not trainer.is_world_process_zero():
            return
        file = trainer.run.path / FILE
        before = file.read_text().splitlines() if file.exists() else []
        old, lines = [line for line in before if json.loads(line)["step"] < step], []
        for place in trainer.plan[step - 1]:
            loss = losses.get(place)
            said = {} if loss is None else {"loss": loss if math.isfinite(loss) else None}
            lines.append({"step": step, **said, **self._as_read(trainer.lists[place])})
        write_text(file, "".join(f"{line}\n" for line in [*old, *(json.dumps(line, default=str) for line in lines)]))

    def _as_read(self, listed: dict[str, Any]) -> dict[str, Any]:
        """A list's row with what it says; its token ids where the rows are not at hand."""
        place = {"source": listed.get("source"), "row": listed.get("row")}
        row = next((one for one in self.rows if (one.source, one.number) == (place["source"], place["row"])), None)
        if row is None:
            return place | {name: listed[name] for name in ("prompt_ids", "completion_ids", "grades")}
        values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row) if f.name not in ("source", "number")}
        return place | {name: value for name, value in values.items() if value not in (None, {}, (), False)}


def own_places(trainer: Any, rows: Sequence[int]) -> Sequence[int]:
    """A process's part of a step's lists; dealt out in turn, since each is looked at alone."""
    return rows[trainer.args.process_index :: trainer.args.world_size]


def _words(own: str, exact: str, *, precision: str) -> str:
    if not own:
        return "repeated list by list, every layer gives finite numbers"
    if not exact:
        return f"in {precision} {own}, in float32 all are: give train.precision=float32 (bfloat16 for float16)"
    return f"{exact}, in float32"


@contextmanager
def _watch(model: nn.Module) -> Iterator[list[str]]:
    """In the list that it gives, in words, the first layer whose output or gradient is not finite."""
    found: list[str] = []

    def look(name: str, what: str, value: Tensor) -> None:
        if not found and value.is_floating_point() and not bool(value.isfinite().all()):
            found.append(f"the first {what} of `{name}`")

    def of_output(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            for value in _pytree.tree_leaves(dict(output) if hasattr(output, "to_tuple") else output):
                if isinstance(value, Tensor):
                    look(name, "output that is not finite is that", value.detach())
                    if value.requires_grad:
                        value.register_hook(lambda gradient: look(name, OF_GRADIENT, gradient))

        return hook

    hooks = [
        module.register_forward_hook(of_output(name.removeprefix("base_model.model.") or type(model).__name__))
        for name, module in model.named_modules()
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def refuse_divergence(name: str, value: float, *, step: int, model: nn.Module) -> None:
    """Refuse a figure that is no finite number, and say what of the weights is none.

    Raises:
        UserError: it is none; with what to set.
    """
    if math.isfinite(value):
        return
    broken = broken_weights(model)
    remedy = "lower train.learning_rate, or set" if step else f"before any step: {broken and REMEDY + ', or '}set"
    raise UserError(
        f"step {step}: the {name} is {value}; {broken + '; ' if broken else ''}{remedy} "
        "train.precision to bfloat16 or float32 if it is float16, and give `output` another folder"
    )
