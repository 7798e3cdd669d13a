"""Wiring: a recipe becomes objects, and they become a run."""

import json
import logging
import math
import resource
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from datasets import Dataset
from rich.console import Console
from transformers import TrainingArguments, set_seed

from align.annotate import Annotated, annotate_lists, annotation_table, filter_by_ches, list_ches
from align.data import Audit, Prepared, Row, Source, in_one_line, prepare_data, prompt_text, read_chat_template, render
from align.data.collate import collate
from align.data.contrast import Templates
from align.data.ratings import with_ratings
from align.data.steps import micro_batches, plan_steps
from align.errors import UserError
from align.evaluate.displacement import diagnose
from align.evaluate.samples import Measured, side_by_side
from align.evaluate.sampling import sample_completions
from align.evaluate.token_view import TokenView
from align.loss import ListLoss, build_loss, likelihood_loss
from align.model.adapters import Eva
from align.model.checkpointing import checkpoint_layers, layers_to_checkpoint
from align.model.checks import check_reference_identity, check_token_ids
from align.model.load import load_tokenizer
from align.model.policy import Policy, load_policy
from align.model.precision import hold_frozen
from align.model.reward import RewardModel, load_reward_model
from align.objectives import PROPERTIES, ObjectiveConfig, check_grades, check_score
from align.objectives.token_reg import Column
from align.recipe import ContrastSection, Recipe
from align.report import write_report
from align.reward_loss import RewardLoss, build_reward_loss, check_ratings, ranks, set_of, strength_field
from align.run_directory import RunDirectory, start_log, write_json
from align.summary import print_summary
from align.trainer import AlignTrainer
from align.types import LONGEST_WAIT
from rewards import load_scorer
from rewards.heads import Attributes, BradleyTerry

log = logging.getLogger("align")


@dataclass(frozen=True)
class RunResult:
    """A finished run: its directory, and what summary.json holds."""

    path: Path
    summary: dict[str, Any]


def train(recipe: Recipe) -> RunResult:
    """Train the recipe's policy; a run that is already in `recipe.output` goes on where it stopped.

    Raises:
        UserError: the recipe, its data or its model cannot work; said before the first step.
    """
    if recipe.online:
        from align.rollout.loop import check_online, train_online  # which trains with this module

        check_online(recipe)
    run = RunDirectory(recipe.output)
    arguments = training_arguments(recipe, run)
    main = arguments.process_index == 0
    with arguments.main_process_first():
        run.open(recipe)
    start_log(run, main=main)
    if not run.summary.exists():
        if recipe.online:
            train_online(recipe, run)
        else:
            _train(recipe, run, arguments)
    summary = json.loads(run.summary.read_text())
    if main:
        print_summary(str(run.path), summary, show=recipe.sampling.show)
        print(f"report: {write_report([run.path])}")
    return RunResult(run.path, summary)


def _train(recipe: Recipe, run: RunDirectory, arguments: TrainingArguments) -> None:
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    set_seed(recipe.train.seed)
    loss: Any = loss_of(recipe)
    scorer = load_scorer(recipe.sampling.reward) if recipe.sampling.reward else None
    with arguments.main_process_first():
        prepared = prepare(recipe)
    check_objectives(recipe, prepared)
    if arguments.process_index == 0:
        _show(prepared.audit)
    load = load_with_ratings if recipe.task == "reward" else _load_with_annotations
    policy, annotated = load(recipe, prepared, loss, device=arguments.device)
    lists, heldout = filter_by_ches(recipe, prepared, annotated.train), annotated.heldout
    plan = _plan(recipe, lists)
    _fit_to_plan(arguments, recipe, steps=len(plan))
    start_from(recipe.policy.start_run, policy)
    trainer = AlignTrainer(
        policy=policy,
        loss=loss,
        lists=lists,
        plan=plan,
        heldout=heldout,
        run=run,
        tokens_per_batch=recipe.train.tokens_per_batch,
        keep_checkpoints=recipe.train.keep_checkpoints,
        keep_best=recipe.train.keep_best,
        args=arguments,
    )
    _set_checkpointing(recipe, trainer)

    sampled_rows = [] if recipe.task == "reward" else prepared.heldout_rows[: recipe.sampling.prompts]
    prompts = [_for_scorer(row, policy) for row in sampled_rows]
    shown = 0 if recipe.task == "reward" else recipe.sampling.token_lists
    view = TokenView(trainer.scorer, policy, heldout, trainer.accelerator, count=shown)

    def measure() -> Measured:
        moved: dict[int, float] = {}
        metrics = trainer.evaluate_heldout(moved)
        changes = [change for _, change in sorted(gather_object(list(moved.items())))]
        with trainer.accelerator.autocast():
            completions = _sample(recipe, policy, heldout) if sampled_rows else []
        rewards = scorer.score(prompts, completions) if scorer else []
        return Measured(metrics, completions, list(rewards), view.logprobs(), changes)

    before = _measured_once(run.before, measure, save=trainer.is_world_process_zero())
    trainer.train_from(run.last_checkpoint(), logging_steps=recipe.train.logging_steps)
    if recipe.train.keep_best and run.best.exists():
        policy.load_state(run.best)
    after = measure()
    if trainer.is_world_process_zero():
        _save_adapter(run, policy)
        texts = [prompt_text(row, policy.tokenizer) for row in prepared.heldout_rows]
        view.write(run.token_view, texts, recipe.score.beta, before.token_logprobs, after.token_logprobs)
        write_json(run.summary, _summarise(recipe, run, trainer, prepared, annotated, before, after, texts))
    trainer.accelerator.wait_for_everyone()


def _show(audit: Audit) -> None:
    Console(stderr=True).print(render(audit))
    log.debug("%s", in_one_line(audit))


def _set_checkpointing(recipe: Recipe, trainer: AlignTrainer) -> None:
    """Which layers compute again in the backward pass, the same on every process."""
    train, count = recipe.train, None
    if train.gradient_checkpointing == "auto":
        budget = train.activation_memory_gb * 1e9 if train.activation_memory_gb else None
        batch = trainer.policy.collate([trainer.lists[0]])
        with trainer.accelerator.autocast():
            count = layers_to_checkpoint(trainer.scorer, batch, tokens=train.tokens_per_batch, budget=budget)
        counts = trainer.accelerator.gather(torch.tensor([count], device=trainer.args.device))
        count = int(counts.max())
    if train.gradient_checkpointing and count != 0:
        checkpoint_layers(trainer.scorer.model, count)


def _fit_to_plan(arguments: TrainingArguments, recipe: Recipe, *, steps: int) -> None:
    arguments.max_steps = steps
    arguments.warmup_steps = math.ceil(recipe.train.warmup_ratio * steps)
    arguments.save_steps = recipe.train.save_steps or max(1, math.ceil(steps / 10))


def annotate(recipe: Recipe, console: Console | None = None) -> dict[str, Any]:
    """Compute all that frozen models say about the recipe's rows into the cache, CHES included, and print a summary.

    Run it again after an interruption, and it goes on; `align train` finds what it has computed.

    Returns:
        What is printed, of the training lists.

    Raises:
        UserError: the recipe, its data or its model cannot work.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    state = PartialState(timeout=LONGEST_WAIT)
    with state.main_process_first():
        prepared = prepare(recipe)
    check_objectives(recipe, prepared)
    policy = _load_policy(recipe, prepared, total_steps=1, device=state.device, keep_reference=False)
    annotated = annotate_lists(recipe, policy, prepared, reference=True, ches=True)
    if state.is_main_process:
        (console or Console()).print(annotation_table(annotated.figures, len(annotated.train)))
    return annotated.figures


def _plan(recipe: Recipe, lists: Dataset) -> list[list[int]]:
    train = recipe.train
    return plan_steps(
        lists["weight"][:],
        lists_per_step=train.lists_per_step,
        epochs=train.epochs,
        steps=train.steps,
        seed=train.seed,
    )


def loss_of(recipe: Recipe) -> ListLoss | RewardLoss:
    """The loss of a list under the recipe."""
    if recipe.task == "reward":
        return build_reward_loss(recipe.reward, recipe.objective, sources=len(recipe.data.sources))
    return policy_loss(recipe)


def policy_loss(recipe: Recipe) -> ListLoss:
    """The loss of a list under the recipe of a policy."""
    if recipe.task == "sft":
        return likelihood_loss()
    return build_loss(
        recipe.score,
        list_objectives(recipe),
        wpo=recipe.wpo,
        dpop=recipe.dpop,
        regularizer=recipe.regularizer,
        token_weights=recipe.token_weights,
    )


def prepare(recipe: Recipe) -> Prepared:
    """The recipe's rows as token ids, and their audit."""
    data, policy = recipe.data, recipe.policy
    fields = data.model_dump(exclude={"sources", "eval_sources", "select", "append_eos", "ches"})
    own_ends = None if recipe.task == "reward" else data.append_eos is not False
    contrast: Templates | None = None
    if recipe.needs_token_rewards and isinstance(recipe.token_rewards, ContrastSection):
        contrast = {"better": recipe.token_rewards.better, "worse": recipe.token_rewards.worse}
    return prepare_data(
        sources=[Source(**source.model_dump()) for source in data.sources],
        eval_sources=[Source(**source.model_dump()) for source in data.eval_sources],
        select="best" if recipe.task == "sft" else data.select,
        tokenizer=load_tokenizer(
            policy.model,
            revision=policy.revision,
            chat_template=policy.chat_template,
            trust_remote_code=policy.trust_remote_code,
        ),
        chat_template=read_chat_template(policy.chat_template),
        min_completions=min_completions(recipe),
        append_eos=own_ends,
        seed=recipe.train.seed,
        contrast=contrast,
        token_weights=isinstance(recipe.token_weights, Column),
        **fields,
    )


def min_completions(recipe: Recipe) -> int:
    """Completions that a row must have to be of use: two to prefer one, one for what looks at single completions."""
    if recipe.task == "reward":
        return 2 if ranks(recipe.objective) else 1
    return max((PROPERTIES[term.name].min_list_size for term in recipe.objective), default=1)


def list_objectives(recipe: Recipe) -> list[ObjectiveConfig]:
    """The objectives that are functions of a list's scores or rewards and its grades alone."""
    return [term for term in recipe.objective if not isinstance(term, BradleyTerry | Attributes)]


def check_objectives(recipe: Recipe, prepared: Prepared) -> None:
    """Refuse, before training, grades and list sizes that an objective is not defined for.

    Raises:
        UserError: names the row.
    """
    objectives = list_objectives(recipe)
    if recipe.task != "reward":
        for objective in objectives:
            check_score(objective.name, objective.score or recipe.score)
    for part in (prepared.train, prepared.heldout):
        for source, row, grades in zip(part["source"][:], part["row"][:], part["grades"][:], strict=True):
            one_list = torch.tensor([grades])
            for objective in objectives:
                try:
                    check_grades(objective.name, one_list, torch.ones_like(one_list, dtype=torch.bool))
                except UserError as error:
                    raise UserError(f"{source}, row {row}: {error}") from None


def _load_with_annotations(
    recipe: Recipe, prepared: Prepared, loss: ListLoss, *, device: torch.device
) -> tuple[Policy, Annotated]:
    """The policy, and the lists with what frozen models say about them."""
    # KTO's baseline needs the reference of completions that no cache holds.
    keep_reference = loss.needs_baseline or not recipe.reference.cache
    steps = len(_plan(recipe, prepared.train))
    policy = _load_policy(recipe, prepared, total_steps=steps, device=device, keep_reference=keep_reference)
    return policy, annotate_lists(recipe, policy, prepared, reference=loss.needs_reference)


def _load_policy(
    recipe: Recipe, prepared: Prepared, *, total_steps: int, device: torch.device, keep_reference: bool
) -> Policy:
    options = load_options(recipe, prepared, total_steps=total_steps, device=device)
    policy = load_policy(**options, keep_reference=keep_reference)
    check_token_ids(policy.model, policy.tokenizer, [prepared.train, prepared.heldout])
    check_reference_identity(policy, policy.collate([prepared.train[0]]))
    if recipe.train.precision == "bfloat16":
        hold_frozen(policy.model, torch.bfloat16)
    return policy


def load_with_ratings(
    recipe: Recipe, prepared: Prepared, loss: RewardLoss, *, device: torch.device
) -> tuple[RewardModel, Annotated]:
    """The reward model, and the lists with what its objectives learn from."""
    names = recipe.reward.outputs
    options: dict[str, Any] = {"names": names, "strength": strength_field(recipe.objective)}
    sets = {name: set_of(name, recipe.data.sources) for name in set(prepared.train["source"][:])}
    lists = with_ratings(prepared.train, prepared.train_rows, sets=sets, **options)
    of_no_set = dict.fromkeys(prepared.heldout["source"][:], -1)
    heldout = with_ratings(prepared.heldout, prepared.heldout_rows, sets=of_no_set, **options)
    check_ratings(lists, recipe.objective, names)
    steps = len(_plan(recipe, prepared.train))
    model = load_reward_model(outputs=names, **load_options(recipe, prepared, total_steps=steps, device=device))
    check_token_ids(model.model, model.tokenizer, [prepared.train, prepared.heldout])
    if recipe.train.precision == "bfloat16":
        hold_frozen(model.model, torch.bfloat16)
    return model, Annotated(lists, heldout, {})


def load_options(recipe: Recipe, prepared: Prepared, *, total_steps: int, device: torch.device) -> dict[str, Any]:
    """What a policy and a reward model are both loaded with."""
    init_batches = None
    if isinstance(recipe.policy.adapter, Eva):
        pad_id = load_tokenizer(recipe.policy.model).pad_token_id
        examples = list(prepared.train.select(range(min(256, len(prepared.train)))))
        batches = micro_batches(examples, tokens_per_batch=recipe.train.tokens_per_batch)
        init_batches = [collate(batch, pad_id=pad_id) for batch in batches]
    return {
        **{name: value for name, value in recipe.policy if name != "start_run"},
        "dropout": recipe.train.dropout,
        "seed": recipe.train.seed,
        "device": device,
        "total_steps": total_steps,
        "init_batches": init_batches,
        "packing": recipe.train.packing,
    }


def start_from(run: str | None, policy: Policy) -> None:
    """Put what a run trained, if one is given, into a policy; the reference stays the policy's own."""
    if run is None:
        return
    state = RunDirectory(run).final_state()
    if not RunDirectory(run).summary.exists():
        raise UserError(f"policy.start_run: the run in {run} is not finished; let `align train` end it")
    # A frozen start that the policy was loaded with is the reference, whatever the run's own was.
    policy.load_state(state, keep_reference=policy.adapter == "start_adapter")


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
    completions = sample_completions(
        policy.model,
        policy.tokenizer,
        prompts,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=recipe.train.seed,
        tokens_per_batch=recipe.train.tokens_per_batch,
    )
    return [texts[0] for texts in completions]


def _for_scorer(row: Row, policy: Policy) -> Any:
    """A prompt as a scorer reads it: text or messages; token ids are decoded."""
    if isinstance(row.prompt, list) and row.prompt and isinstance(row.prompt[0], int):
        return policy.tokenizer.decode(row.prompt, skip_special_tokens=True)
    return row.prompt


def _save_adapter(run: RunDirectory, policy: Policy) -> None:
    """The adapter with the tokenizer beside it: the whole folder or none."""
    temporary = run.path / "adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    policy.save_adapter(temporary)
    policy.tokenizer.save_pretrained(temporary)
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
        displacement["displacement"] = diagnose(after.changes, list_ches(annotated.heldout))
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
        "samples": side_by_side(prompts[: len(after.completions)], before, after),
        **displacement,
    }


def peak_memory_bytes() -> int:
    """Most memory held so far: of the GPU's allocator where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def training_arguments(recipe: Recipe, run: RunDirectory) -> TrainingArguments:
    """The recipe's `train` section as transformers names it; what depends on the data is set later."""
    train = recipe.train
    on_cpu = not torch.accelerator.is_available()
    # transformers makes this too, but on a CPU without a timeout.
    PartialState(cpu=on_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=LONGEST_WAIT)
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        per_device_train_batch_size=1,  # of the data loader, whose items are whole optimizer steps
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.schedule,
        optim=train.optimizer,
        weight_decay=train.weight_decay,
        adam_beta1=train.adam_beta1,
        adam_beta2=train.adam_beta2,
        max_grad_norm=train.max_grad_norm,
        use_cpu=on_cpu,  # else bf16 is refused there
        bf16=train.precision == "bfloat16",
        fp16=train.precision == "float16",
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if train.eval_steps else "no",
        eval_steps=train.eval_steps,
        save_strategy="steps",
        report_to=list(train.report_to) or "none",
        run_name=run.path.name,
        seed=train.seed,
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        label_names=[],
    )
