"""What a run on rows leaves behind: the adapter, its token view and its summary."""

import resource
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate import PartialState

from align.evaluate.samples import Measured, paired_changes, side_by_side
from align.files import partial_folder, sync
from align.model.checkpoint import export_tokenizer
from align.model.policy import Policy
from align.model.sharding import is_sharded
from align.progress import stage
from align.report.displacement import diagnose
from align.report.write import write_report
from align.runs.run_directory import RunDirectory
from align.training.annotate import list_ches
from align.training.meter import Meter
from align.training.parts import RunParts


def write_results(parts: RunParts, meter: Meter, before: Measured, after: Measured) -> None:
    """Write everything that is known at the end, the summary last: a run that has one is finished."""
    run, prompts = parts.run, meter.heldout_prompts()
    with run.replaced(run.token_view) as file:
        meter.view.write(file, prompts, parts.recipe.score.beta, before.token_logprobs, after.token_logprobs)
    summary = _summarise(parts, before, after, prompts)
    with run.replaced(run.after) as file:  # which an online run's next iteration need not measure again
        after.save(file)
    sync(run.metrics)
    run.digests.note({run.metrics: run.metrics})
    run.write_json(run.summary, summary)
    if parts.trainer.tracking.trackers:
        write_report([run.path])  # which they are given
    parts.trainer.end_tracking(summary)


@stage("saving what was trained")
def save_adapter(run: RunDirectory, policy: Policy) -> None:
    """The adapter with the tokenizer beside it: the whole folder or none. Every process calls it."""
    main = PartialState().is_main_process
    with run.replaced_folder(run.adapter) if main else nullcontext(partial_folder(run.adapter)) as temporary:
        if main or is_sharded(policy.scorer()):
            policy.save_adapter(temporary)
        if main:
            export_tokenizer(policy.tokenizer, temporary, source=policy.folder)


def _summarise(parts: RunParts, before: Measured, after: Measured, prompts: Sequence[str]) -> dict[str, Any]:
    recipe, trainer, annotated = parts.recipe, parts.trainer, parts.annotated
    seconds = parts.run.seconds()
    displacement = {}
    if "ches_normalised" in annotated.heldout.column_names and any(annotated.heldout["ches_normalised"]):
        displacement["displacement"] = diagnose(after.by_list["best_logprob_change"], list_ches(annotated.heldout))
    weights = annotated.heldout["loss_weight"][:] if "loss_weight" in annotated.heldout.column_names else None
    return {
        "task": recipe.task,
        "objective": [term.model_dump(mode="json") for term in recipe.objective] or recipe.task,
        "adapter": recipe.policy.adapter.model_dump(mode="json"),
        "seed": recipe.train.seed,
        "data": parts.prepared.audit.to_dict(),
        "annotation": annotated.figures,
        "steps": trainer.state.global_step,
        "bad_steps": trainer.bad.count(),
        "train_seconds": seconds,
        "tokens_per_second": trainer.trained_tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "eval_before": before.all_metrics(),
        "eval_after": after.all_metrics(),
        "eval_change": paired_changes(before, after, weights),
        "samples": side_by_side(prompts[: len(after.completions)], before, after),
        **displacement,
    }


def peak_memory_bytes() -> int:
    """Most memory held so far: of the GPU's allocator where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
