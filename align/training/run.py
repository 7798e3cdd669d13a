"""A run on rows, from its recipe to its summary; one that is there already goes on where it stopped."""

import logging
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from rich.console import Console
from transformers import TrainingArguments, set_seed

from align.data import Audit, Prepared, Row, in_one_line, prompt_text, render
from align.data.ratings import with_ratings
from align.data.select import with_trained_places
from align.evaluate.samples import Measured, paired_changes, side_by_side
from align.evaluate.sampling import sample_completions
from align.evaluate.token_view import TokenView
from align.files import read_json, write_json
from align.losses.list_loss import ListLoss
from align.losses.reward_loss import check_ratings, columns_read, deviation_field, set_of, strength_field
from align.model.checkpoint import export_tokenizer
from align.model.checkpointing import checkpoint_layers, layers_to_checkpoint
from align.model.checks import check_token_ids
from align.model.policy import Policy
from align.model.precision import hold_frozen
from align.model.reward import RewardModel, load_reward_model
from align.progress import progress, stage
from align.recipe import Recipe
from align.report import write_report
from align.report.displacement import diagnose
from align.report.summary import ROWS, next_steps, print_summary
from align.runs.build import build_policy, check_objectives, check_positions, load_options, loss_of, prepare
from align.runs.memory import in_memory, scoring_in_words
from align.runs.record import hold_to_record, record_lists
from align.runs.run_directory import RunDirectory, start_log
from align.runs.start import start_from
from align.training.advice import advise
from align.training.annotate import Annotated, annotate_lists, filter_by_ches, list_ches
from align.training.arguments import check_ranks_can_move, fit_to_plan, grow, planned_steps, training_arguments
from align.training.tracking import flat, run_name, set_project
from align.training.trainer import AlignTrainer
from rewards import load_scorer

log = logging.getLogger("align")


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, and what summary.json holds."""

    path: Path
    summary: dict[str, Any]


def train_rows(recipe: Recipe, *, measured: Path | None = None, show: bool = True) -> RunResult:
    """Train the recipe's policy on rows; a run that is already in `recipe.output` goes on where it stopped.

    Args:
        measured: what was measured of the same policy on the same held-out lists, where that is known.
        show: print the figures at the end.

    Raises:
        UserError: the recipe, its data or its model cannot work; said before the first step.
    """
    run, arguments = open_run(recipe)
    finished = is_finished(run)
    if finished:
        _hold_to_record(recipe, run, arguments)
    else:
        in_memory(recipe, lambda own: _train(own, run, arguments, measured), goes_on=run.goes_on)
    return conclude(recipe, run, finished=finished, main=arguments.process_index == 0, show=show)


def open_run(recipe: Recipe) -> tuple[RunDirectory, TrainingArguments]:
    """The recipe's run directory, begun or gone on with, and what transformers' Trainer is told.

    Raises:
        UserError: the folder holds another recipe's run, or other files.
    """
    run = RunDirectory(recipe.output)
    if recipe.train.report_to:
        set_project(recipe.train.project)
    arguments = training_arguments(
        recipe.train,
        checkpoints=run.checkpoints,
        run_name=run_name(run.path),
        recipe_values=flat(recipe.model_dump(mode="json"), "recipe"),
    )
    with arguments.main_process_first():
        run.open(recipe)
    start_log(run, main=arguments.process_index == 0)
    for change in run.changes:
        log.info("%s", change)
    return run, arguments


def is_finished(run: RunDirectory) -> bool:
    """Whether all that the recipe asks for was done before."""
    return run.summary.exists() and run.grows_from is None


def conclude(recipe: Recipe, run: RunDirectory, *, finished: bool, main: bool, show: bool = True) -> RunResult:
    """What a run ends with: its page, and its figures on the terminal.

    Args:
        finished: whether it was so before.
        main: whether this process speaks.
        show: print the figures.
    """
    summary = read_json(run.summary)
    if finished and main:
        print(f"finished before; nothing was done; `align report {run.path}` shows its figures")
        print(f"run directory: {run.path}")
    elif main and not show:
        write_report([run.path])
    elif main:
        print_summary(str(run.path), summary, show=recipe.sampling.show)
        print(f"report: {write_report([run.path])}")
        print(next_steps(str(run.path), summary["task"]))
    return RunResult(run.path, summary)


def _train(recipe: Recipe, run: RunDirectory, arguments: TrainingArguments, measured: Path | None) -> None:
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    set_seed(recipe.train.seed)
    loss: Any = loss_of(recipe)
    scorer = _scorer(recipe)
    prepared, rated = _hold_to_record(recipe, run, arguments)
    check_objectives(recipe, prepared)
    check_positions(recipe, prepared)
    if arguments.process_index == 0:
        _show(prepared.audit)
    policy, annotated = _load(recipe, prepared, rated, loss, device=arguments.device)
    lists, heldout = filter_by_ches(recipe, prepared, annotated.train), _heldout(recipe, annotated)
    plan = _plan(recipe, run, lists, arguments)
    _advise(recipe, run, prepared.audit, steps=len(plan), lists=len(lists))
    start_from(recipe.policy.start_run, policy)
    trainer = AlignTrainer(
        policy=policy,
        loss=loss,
        lists=lists,
        plan=plan,
        heldout=heldout,
        run=run,
        tokens_per_batch=recipe.train.batch_tokens,
        keep_checkpoints=recipe.train.keep_checkpoints,
        keep_best=recipe.train.keep_best,
        args=arguments,
    )
    _set_checkpointing(recipe, trainer)

    sampled_rows = [] if recipe.task == "reward" else prepared.heldout_rows[: recipe.sampling.prompts]
    prompts = [_for_scorer(row, policy) for row in sampled_rows]
    shown = 0 if recipe.task == "reward" else recipe.sampling.token_lists
    view = TokenView(trainer.scorer, policy, heldout, trainer.accelerator, count=shown)

    def measure(when: str) -> Measured:
        found: dict[str, dict[int, float]] = {name: {} for name, *_ in ROWS}
        metrics = trainer.evaluate_heldout(found, label=f"evaluating {when} training")
        by_list = {
            name: [value for _, value in sorted(gather_object(list(own.items())))] for name, own in found.items()
        }
        with trainer.accelerator.autocast():
            completions = _sample(recipe, policy, heldout) if sampled_rows else []
        with scoring_in_words(
            recipe.sampling.reward, "sampling.reward.tokens_per_batch={}", goes_on=f"it {run.goes_on()}"
        ):
            rewards = stage("scoring the samples")(scorer.score)(prompts, completions) if scorer else []
        return Measured(metrics, completions, list(rewards), view.logprobs(), by_list)

    before = _measured_once(
        run.before,
        partial(Measured.load, measured) if measured else partial(measure, "before"),
        save=trainer.is_world_process_zero(),
    )
    trainer.train_from(run.last_checkpoint(), logging_steps=recipe.train.logging_steps, before=before.all_metrics())
    if recipe.train.keep_best and run.best.exists():
        policy.load_state(run.best)
    after = measure("after")
    if trainer.is_world_process_zero():
        _save_adapter(run, policy)
        texts = [prompt_text(row, policy.tokenizer) for row in prepared.heldout_rows]
        view.write(run.token_view, texts, recipe.score.beta, before.token_logprobs, after.token_logprobs)
        _conclude(run, trainer, after, _summarise(recipe, run, trainer, prepared, annotated, before, after, texts))
    trainer.accelerator.wait_for_everyone()


def _conclude(run: RunDirectory, trainer: AlignTrainer, after: Measured, summary: dict[str, Any]) -> None:
    after.save(run.after)  # which an online run's next iteration need not measure again
    write_json(run.summary, summary)
    trainer.end_tracking(summary)


def _heldout(recipe: Recipe, annotated: Annotated) -> Dataset:
    """The held-out lists, which know what training would keep of them."""
    data = recipe.data
    lists = with_trained_places(annotated.heldout, select=data.select, list_size=data.list_size, seed=recipe.train.seed)
    if "trained" in lists.column_names:
        log.info(
            "the held-out loss is of the completions that training would keep of a list; the rest is of whole lists"
        )
    return lists


def _plan(recipe: Recipe, run: RunDirectory, lists: Dataset, arguments: TrainingArguments) -> list[list[int]]:
    """The lists of every step; a shorter run that is there becomes the beginning, or is refused."""
    plan = planned_steps(recipe.train, lists)
    fit_to_plan(arguments, recipe.train, steps=len(plan))
    if run.grows_from:
        grow(run, recipe, planned_steps(run.grows_from.train, lists), plan, main=arguments.process_index == 0)
        run.grows_from = None  # what it did is the beginning of this run
    return plan


def _scorer(recipe: Recipe) -> Any:
    """What scores the samples, if anything does."""
    reward = recipe.sampling.reward
    return stage("loading the scorer")(load_scorer)(reward) if reward else None


def _hold_to_record(
    recipe: Recipe, run: RunDirectory, arguments: TrainingArguments
) -> tuple[Prepared, Annotated | None]:
    """The recipe's rows, with ratings for a reward model; refused where the run has worked on others.

    Raises:
        UserError: the rows or the base model are not those that the run began with.
    """
    with arguments.main_process_first():
        prepared = prepare(recipe)
        rated = _rated(recipe, prepared) if recipe.task == "reward" else None
    if rated:
        check_ratings(rated.train, recipe.objective, recipe.reward.outputs)
    lists = rated or prepared
    parts = {"train": record_lists(lists.train), "heldout": record_lists(lists.heldout)}
    hold_to_record(run, recipe, parts, main=arguments.process_index == 0)
    return prepared, rated


def _show(audit: Audit) -> None:
    Console(stderr=True).print(render(audit))
    log.debug("%s", in_one_line(audit))


def _advise(recipe: Recipe, run: RunDirectory, audit: Audit, *, steps: int, lists: int) -> None:
    """Advice, where a run begins."""
    if run.last_checkpoint() is None:
        for sentence in advise(audit, steps=steps, lists=lists, train=recipe.train, data=recipe.data):
            log.info("advice: %s", sentence)


def _set_checkpointing(recipe: Recipe, trainer: AlignTrainer) -> None:
    """Which layers compute again in the backward pass, the same on every process."""
    train, count = recipe.train, None
    if train.gradient_checkpointing == "auto":
        budget = train.activation_memory_gb * 1e9 if train.activation_memory_gb else None
        batch = trainer.policy.collate([trainer.lists[0]])
        with trainer.accelerator.autocast():
            count = layers_to_checkpoint(trainer.scorer, batch, tokens=train.batch_tokens, budget=budget)
        counts = trainer.accelerator.gather(torch.tensor([count], device=trainer.args.device))
        count = int(counts.max())
    if train.gradient_checkpointing and count != 0:
        checkpoint_layers(trainer.scorer.model, count)


def _load(
    recipe: Recipe, prepared: Prepared, rated: Annotated | None, loss: ListLoss, *, device: torch.device
) -> tuple[Policy, Annotated]:
    """The reward model and its rated lists, or the policy and the lists with what frozen models say about them."""
    check_ranks_can_move(recipe.policy.adapter, len(planned_steps(recipe.train, prepared.train)))
    if rated:
        return _load_reward_model(recipe, prepared, device=device), rated
    # KTO's baseline needs the reference of completions that no cache holds.
    keep_reference = loss.needs_baseline or not recipe.reference.cache
    steps = len(planned_steps(recipe.train, prepared.train))
    policy = build_policy(recipe, prepared, total_steps=steps, device=device, keep_reference=keep_reference)
    return policy, annotate_lists(recipe, policy, prepared, reference=loss.needs_reference)


def _rated(recipe: Recipe, prepared: Prepared) -> Annotated:
    """The lists with what a reward model's objectives learn from."""
    names = recipe.reward.outputs
    fields = {"strength": strength_field(recipe.objective), "deviation": deviation_field(recipe.objective)}
    options: dict[str, Any] = {"names": names, **fields}
    sets = {name: set_of(name, recipe.data.sources) for name in set(prepared.train["source"][:])}
    lists = with_ratings(prepared.train, prepared.train_rows, sets=sets, **options)
    of_no_set = dict.fromkeys(prepared.heldout["source"][:], -1)
    heldout = with_ratings(prepared.heldout, prepared.heldout_rows, sets=of_no_set, **options)
    prepared.audit.mark_read(columns_read(recipe.objective, names))
    return Annotated(lists, heldout, {})


def _load_reward_model(recipe: Recipe, prepared: Prepared, *, device: torch.device) -> RewardModel:
    names = recipe.reward.outputs
    steps = len(planned_steps(recipe.train, prepared.train))
    model = load_reward_model(outputs=names, **load_options(recipe, prepared, total_steps=steps, device=device))
    check_token_ids(model.model, model.tokenizer, [prepared.train, prepared.heldout])
    if recipe.train.precision == "bfloat16":
        hold_frozen(model.model, torch.bfloat16)
    return model


def _measured_once(path: Path, measure: Callable[[], Measured], *, save: bool) -> Measured:
    """What was measured before an interruption, since a resumed run no longer has the initial policy."""
    if path.exists():
        return Measured.load(path)
    measured = measure()
    if save:
        measured.save(path)
    return measured


def _sample(recipe: Recipe, policy: Policy, heldout: Dataset) -> list[str]:
    sampling = recipe.sampling
    prompts = [heldout[i]["prompt_ids"] for i in range(min(sampling.prompts, len(heldout)))]
    with progress("sampling", len(prompts), unit="completions") as advance:
        completions = sample_completions(
            policy.model,
            policy.tokenizer,
            prompts,
            **sampling.model_dump(include={"max_tokens", "temperature", "top_k", "top_p"}),
            seed=recipe.train.seed,
            tokens_per_batch=recipe.train.batch_tokens,
            advance=advance,
        )
    return [texts[0] for texts in completions]


def _for_scorer(row: Row, policy: Policy) -> Any:
    """A prompt as a scorer reads it: text or messages; token ids are decoded."""
    if isinstance(row.prompt, list) and row.prompt and isinstance(row.prompt[0], int):
        return policy.tokenizer.decode(row.prompt, skip_special_tokens=True)
    return row.prompt


@stage("saving what was trained")
def _save_adapter(run: RunDirectory, policy: Policy) -> None:
    """The adapter with the tokenizer beside it: the whole folder or none."""
    temporary = run.path / "adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    policy.save_adapter(temporary)
    export_tokenizer(policy.tokenizer, temporary, source=policy.folder)
    shutil.rmtree(run.adapter, ignore_errors=True)
    temporary.rename(run.adapter)


def _summarise(
    recipe: Recipe,
    run: RunDirectory,
    trainer: AlignTrainer,
    prepared: Prepared,
    annotated: Annotated,
    before: Measured,
    after: Measured,
    prompts: Sequence[str],
) -> dict[str, Any]:
    seconds = run.seconds()
    displacement = {}
    if "ches_normalised" in annotated.heldout.column_names and any(annotated.heldout["ches_normalised"]):
        displacement["displacement"] = diagnose(after.by_list["best_logprob_change"], list_ches(annotated.heldout))
    return {
        "task": recipe.task,
        "objective": [term.model_dump(mode="json") for term in recipe.objective] or recipe.task,
        "adapter": recipe.policy.adapter.model_dump(mode="json"),
        "seed": recipe.train.seed,
        "data": prepared.audit.to_dict(),
        "annotation": annotated.figures,
        "steps": trainer.state.global_step,
        "train_seconds": seconds,
        "tokens_per_second": trainer.planned_tokens / seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "eval_before": before.all_metrics(),
        "eval_after": after.all_metrics(),
        "eval_change": paired_changes(before, after),
        "samples": side_by_side(prompts[: len(after.completions)], before, after),
        **displacement,
    }


def peak_memory_bytes() -> int:
    """Most memory held so far: of the GPU's allocator where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
