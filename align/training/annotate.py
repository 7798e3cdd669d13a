"""What frozen models say about the rows, as columns: reference log-probabilities, token rewards, CHES."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from rich.console import Console
from rich.table import Table

from align.data import Prepared
from align.data.ches import ches_scores, choose_lists
from align.errors import UserError
from align.model.adapters import Full
from align.model.config import TrainedSection
from align.model.policy import Policy, load_policy
from align.model.reference import flat_values, read_lists
from align.model.value_cache import Kind, Values
from align.recipe import Recipe
from align.runs.build import build_policy, check_objectives, prepare
from align.runs.memory import in_memory
from align.types import LONGEST_WAIT

SHARE_ABOVE = 0.05
"""A token reward beyond this counts as one that says something."""
IDLE_SHARE = 0.01
"""With fewer such tokens than this a contrast does nothing."""
CHES_PERCENTILES = (5, 25, 50, 75, 95)
CONTEXTS = ("better_ids", "worse_ids")
LIST_COLUMNS = ("prompt_ids", "completion_ids", "grades")

log = logging.getLogger("align")


@dataclass(frozen=True)
class Annotated:
    """Lists with what was computed about them."""

    train: Dataset
    heldout: Dataset
    figures: dict[str, Any]
    """Of the training lists, for the summary."""


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

    def compute(own: Recipe) -> Annotated:
        policy = build_policy(own, prepared, total_steps=1, device=state.device, keep_reference=False)
        return annotate_lists(own, policy, prepared, reference=True, ches=True)

    annotated: Annotated = in_memory(recipe, compute, goes_on=lambda: "goes on from what is in the cache")
    if state.is_main_process:
        (console or Console()).print(annotation_table(annotated.figures, len(annotated.train)))
    return annotated.figures


def annotate_lists(
    recipe: Recipe, policy: Policy, prepared: Prepared, *, reference: bool, ches: bool = False
) -> Annotated:
    """The lists with the columns that the recipe needs, computed or read from the cache; warns of an idle contrast.

    Columns: `reference_logprobs` and, where token-level members are asked for, `token_rewards`, both per completion
    token; `ches` and `ches_normalised` of the best completion against every worse one.

    Args:
        policy: at its start.
        reference: whether the training lists need the reference's log-probabilities.
        ches: whether the training lists get CHES even if the recipe does not filter by it.

    Raises:
        UserError: the model that token rewards come from does not exist or does not fit.
    """
    source = _trained_model(recipe, policy) if recipe.needs_token_rewards else None
    cached = recipe.reference.cache
    ches = ches or recipe.data.ches is not None
    train = _annotate_part(recipe, policy, source, prepared.train, reference=cached and reference, ches=ches)
    heldout = _annotate_part(recipe, policy, source, prepared.heldout, reference=cached, ches=cached)
    figures = _figures(train)
    _warn_if_idle(figures)
    return Annotated(train, heldout, figures)


def _annotate_part(
    recipe: Recipe, policy: Policy, source: Policy | None, lists: Dataset, *, reference: bool, ches: bool
) -> Dataset:
    if not len(lists):
        return lists
    options: dict[str, Any] = {
        "tokens_per_batch": recipe.train.batch_tokens,
        "cache_dir": recipe.reference.cache_dir,
        "precision": recipe.train.precision,
    }
    wanted: dict[Kind, bool] = {"logprobs": reference or source is not None, "gram": ches}
    kinds = tuple(kind for kind, want in wanted.items() if want)
    plain = lists.remove_columns([name for name in CONTEXTS if name in lists.column_names])
    found = read_lists(plain, policy, kinds=kinds, **options) if kinds else {}
    annotated = plain
    if reference:
        annotated = with_token_column(annotated, "reference_logprobs", flat_values(plain, found["logprobs"]))
    if source is not None:
        trained = read_lists(plain, source, label="trained model", **options)["logprobs"]
        ratio = flat_values(plain, trained) - flat_values(plain, found["logprobs"])
        squash = isinstance(recipe.token_rewards, TrainedSection) and recipe.token_rewards.squash
        annotated = with_token_column(annotated, "token_rewards", _squashed(ratio) if squash else ratio)
    elif recipe.needs_token_rewards:
        annotated = with_token_column(annotated, "token_rewards", contrast_rewards(lists, policy, **options))
    return _with_ches(annotated, found["gram"]) if ches else annotated


def contrast_rewards(lists: Dataset, policy: Policy, **options: Any) -> np.ndarray:
    """T-REG's token rewards of all completion tokens, one list after the other.

    rhat_t = sigmoid(log p_ref(y_t | better, y_<t) - log p_ref(y_t | worse, y_<t)) - 0.5

    Args:
        lists: with better_ids and worse_ids.
        options: as for `read_lists`.

    Source: T-REG, arXiv:2412.02685 (published notes).
    """
    contexts = lists.map(
        _one_list_per_context,
        batched=True,
        remove_columns=lists.column_names,
        features=Features({name: lists.features[name] for name in LIST_COLUMNS} | {"better": Value("bool")}),
        desc="contexts",
    )
    stored = read_lists(contexts, policy, label="token rewards", **options)["logprobs"]
    better = np.array(contexts["better"][:])
    sides = [flat_values(contexts.select(np.flatnonzero(better == side)), stored) for side in (True, False)]
    return _squashed(sides[0] - sides[1])


def _one_list_per_context(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Every list under each of its contexts: all completions under one, or each under its own."""
    out: dict[str, list[Any]] = {"prompt_ids": [], "completion_ids": [], "grades": [], "better": []}
    for row, completions in enumerate(batch["completion_ids"]):
        for name in CONTEXTS:
            contexts = batch[name][row]
            groups = [completions] if len(contexts) == 1 else [[ids] for ids in completions]
            for context, own in zip(contexts, groups, strict=True):
                out["prompt_ids"].append(context)
                out["completion_ids"].append(own)
                out["grades"].append([0.0] * len(own))
                out["better"].append(name == "better_ids")
    return out


def with_token_column(lists: Dataset, name: str, flat: np.ndarray) -> Dataset:
    """The lists with a column of one float32 per completion token, from all lists' values one after the other."""
    lengths = [[len(ids) for ids in row["completion_ids"]] for row in lists.select_columns(["completion_ids"])]
    inner = pa.ListArray.from_arrays(_offsets([n for row in lengths for n in row]), pa.array(flat, pa.float32()))
    outer = pa.ListArray.from_arrays(_offsets([len(row) for row in lengths]), inner)
    fingerprint = Hasher.hash([lists._fingerprint, name, hashlib.sha256(flat.tobytes()).hexdigest()])
    return lists.add_column(name, outer, new_fingerprint=fingerprint, feature=List(List(Value("float32"))))


def _offsets(sizes: Sequence[int]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32))


def _squashed(ratio: np.ndarray) -> np.ndarray:
    return (torch.from_numpy(ratio).sigmoid() - 0.5).numpy()


def _with_ches(lists: Dataset, stored: Values) -> Dataset:
    grams = np.split(flat := flat_values(lists, stored), np.cumsum([len(g) ** 2 for g in lists["grades"][:]])[:-1])
    assert len(flat), "a list has completions"
    columns: dict[str, list[list[float]]] = {"ches": [], "ches_normalised": []}
    for gram, ids, grades in zip(grams, lists["completion_ids"][:], lists["grades"][:], strict=True):
        size = len(grades)
        for name, values in zip(columns, ches_scores(gram.reshape(size, size), [*map(len, ids)], grades), strict=True):
            columns[name].append(values.tolist())
    for name, column in columns.items():
        lists = lists.add_column(name, column, feature=List(Value("float64")))  # type: ignore[arg-type]
    return lists


def _trained_model(recipe: Recipe, policy: Policy) -> Policy | None:
    """The model whose log-ratio is the token reward, as the reference of a policy; None for the contrast."""
    section = recipe.token_rewards
    if not isinstance(section, TrainedSection):
        return None
    folder = Path(section.model)
    run = (folder / "recipe.yaml").exists()
    if run and not (folder / "adapter").exists():
        raise UserError(f"token_rewards.model: {folder}: the run has not finished; let `align train` end it")
    folder = folder / "adapter" if run else folder
    arguments: dict[str, Any] = {"dtype": recipe.policy.dtype, "device": policy.model.device}
    arguments |= {"packing": recipe.train.packing, "attention": recipe.policy.attention}
    if (folder / "adapter_config.json").exists():
        trained = load_policy(recipe.policy.model, start_adapter=str(folder), **arguments)
    else:
        trained = load_policy(str(folder) if run else section.model, adapter=Full(), keep_reference=False, **arguments)
    if trained.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise UserError(
            f"token_rewards.model: {section.model} has another tokenizer than the policy; give one of its own"
        )
    return trained


def filter_by_ches(recipe: Recipe, prepared: Prepared, train: Dataset) -> Dataset:
    """The training lists without those that `data.ches` leaves out, or with less weight on them; both are counted.

    A list's score is the mean of its length-normalised CHES.
    """
    rule = recipe.data.ches
    if rule is None:
        return train
    scores = list_ches(train)
    train = train.remove_columns(["ches", "ches_normalised"])
    choice = choose_lists(scores, keep_fraction=rule.keep_fraction, threshold=rule.threshold)
    others = len(train) - int(choice.kept.sum())
    if others == len(train):
        lowest = min(scores)
        raise UserError(
            f"data.ches.threshold: no list has a score of {rule.threshold:g} or less; the lowest is {lowest:g}"
        )
    share = f"{others} of {len(train)} training lists have a normalised CHES above {choice.bound:.4g}"
    if not rule.other_weight:
        log.info("data.ches: %s and are left out", share)
        prepared.audit.left_out[f"normalised CHES above {choice.bound:.4g}"] = others
        prepared.audit.train_lists -= others
        return train.select(np.flatnonzero(choice.kept))
    log.info("data.ches: %s and are taken %g times as often as the others", share, rule.other_weight)
    prepared.audit.down_weighted = others
    weights = np.where(choice.kept, 1.0, rule.other_weight) * np.array(train["weight"][:])
    return train.remove_columns("weight").add_column("weight", weights)  # type: ignore[arg-type]


def list_ches(lists: Dataset) -> list[float]:
    """Every list's mean length-normalised CHES between its best completion and each worse one; 0 where all are tied."""
    return [float(np.mean(values)) if values else 0.0 for values in lists["ches_normalised"][:]]


def _figures(lists: Dataset) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if "token_rewards" in lists.column_names:
        rewards = np.abs([value for row in lists["token_rewards"] for own in row for value in own])
        figures["mean_abs_token_reward"] = float(rewards.mean())
        figures["share_above_0.05"] = float((rewards > SHARE_ABOVE).mean())
    for name in ("ches", "ches_normalised"):
        if name in lists.column_names:
            values = [value for row in lists[name] for value in row] or [0.0]
            figures[name] = {f"p{p}": float(np.percentile(values, p)) for p in CHES_PERCENTILES}
    return figures


def annotation_table(figures: dict[str, Any], lists: int) -> Table:
    """What was found about the training lists."""
    table = Table(title=f"{lists} training lists", title_justify="left", show_header=False)
    if "mean_abs_token_reward" in figures:
        table.add_row("mean |token reward|", f"{figures['mean_abs_token_reward']:.4f}")
        table.add_row(f"tokens with |token reward| above {SHARE_ABOVE}", f"{figures['share_above_0.05']:.1%}")
    for name, label in (("ches", "CHES"), ("ches_normalised", "CHES, length-normalised")):
        table.add_row(label, ", ".join(f"{key} {value:.4g}" for key, value in figures[name].items()))
    return table


def _warn_if_idle(figures: dict[str, Any]) -> None:
    if figures.get("share_above_0.05", 1.0) < IDLE_SHARE:
        log.warning(
            "the contrast does nothing: mean |token reward| is %.4f, and %.1f %% of the tokens have one above %g. To "
            "this model the two templates say the same; set token_rewards.better and token_rewards.worse to texts "
            "that it tells apart",
            figures["mean_abs_token_reward"],
            100 * figures["share_above_0.05"],
            SHARE_ABOVE,
        )
