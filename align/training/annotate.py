"""What frozen models say about the rows, as columns: reference log-probabilities, token rewards, CHES."""

import logging
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset, List, Value
from rich.console import Console

from align.cluster.connect import Cluster, on_cluster
from align.cluster.pool import Pool
from align.data import Prepared
from align.data.ches import ches_scores, choose_lists
from align.errors import UserError
from align.model.adapters import Full
from align.model.config import PolicySection, TrainedSection
from align.model.identity import Identity
from align.model.load import LoadOptions
from align.model.policy import Policy, load_policy
from align.model.reference import Block, ListReader, Spread, flat_values, read_lists
from align.model.token_rewards import CONTEXTS, contrast_rewards, learnt_in, squashed, with_token_column
from align.model.value_cache import Found, Kind, Values
from align.recipe import Recipe
from align.runs.build import build_policy, check_objectives, prepare
from align.runs.digests import check_written
from align.runs.memory import in_memory
from align.tables import Table
from align.types import LONGEST_WAIT

SHARE_ABOVE = 0.05
"""A token reward beyond this counts as one that says something."""
IDLE_SHARE = 0.01
"""With fewer such tokens than this a contrast does nothing."""
CHES_PERCENTILES = (5, 25, 50, 75, 95)
FIRST = 256
"""Rows that an adapter which starts from rows may look at."""

log = logging.getLogger("align")


@dataclass(frozen=True)
class Annotated:
    """Lists with what was computed about them."""

    train: Dataset
    heldout: Dataset
    figures: dict[str, Any]
    """Of the training lists, for the summary."""


def annotate(
    recipe: Recipe,
    console: Console | None = None,
    *,
    ray: str | None = None,
    actors: int | None = None,
    gpus: float | None = None,
) -> dict[str, Any]:
    """Compute all that frozen models say about the recipe's rows into the cache, CHES included, and print a summary.

    Run it again after an interruption, and it goes on; `align train` finds what it has computed.

    Args:
        ray: address of a Ray cluster whose actors compute it, or `local`; the values stay the same.
        actors, gpus: how many actors, and of how many GPUs; by default what the cluster holds.

    Returns:
        What is printed, of the training lists.

    Raises:
        UserError: the recipe, its data or its model cannot work.
    """
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    state = PartialState(timeout=LONGEST_WAIT)
    with on_cluster(ray, actors, gpus) as cluster:
        with state.main_process_first():
            prepared = prepare(recipe)
        check_objectives(recipe, prepared)

        def compute(own: Recipe) -> Annotated:
            policy = build_policy(own, prepared, total_steps=1, device=state.device, keep_reference=False)
            if cluster is None:
                return annotate_lists(own, policy, prepared, reference=True, ches=True)
            with closing(_Spread(cluster, own, prepared)) as spread:
                return annotate_lists(own, policy, prepared, reference=True, ches=True, spread=spread)

        annotated: Annotated = in_memory(recipe, compute, goes_on=lambda: "goes on from what is in the cache")
    if state.is_main_process:
        (console or Console()).print(annotation_table(annotated.figures, len(annotated.train)))
    return annotated.figures


class _Spread:
    """A cluster's actors, which read blocks for one policy at a time and stay from one call to the next."""

    def __init__(self, cluster: Cluster, recipe: Recipe, prepared: Prepared) -> None:
        first = prepared.train.select(range(min(FIRST, len(prepared.train))))
        few = Dataset.from_list(first.to_list(), features=first.features)  # in memory: a file may not be there
        rows = replace(prepared, train=few, heldout=few.select([]), train_rows=[], heldout_rows=[])
        self.cluster, self.start = cluster, partial(_start_reading, recipe, rows)
        self.pool: Pool | None = None
        self.trained = False

    def __call__(self, policy: Policy, *, trained: bool) -> Spread:
        """What computes blocks of the recipe's policy, or of the trained model: the same as this process has."""
        return partial(self._read, policy.reference_identity(), trained)

    def _read(self, identity: Identity, trained: bool, blocks: Iterator[Block]) -> Iterator[tuple[Block, list[Found]]]:
        if self.pool is None or trained != self.trained:
            self.close()  # which may hold all GPUs
            self.pool, self.trained = self.cluster.pool(partial(self.start, identity, trained)), trained
        yield from self.pool.map(blocks)

    def close(self) -> None:
        if self.pool:
            self.pool.close()


def _start_reading(recipe: Recipe, prepared: Prepared, identity: Identity, trained: bool) -> ListReader:
    """The reference of an actor.

    Raises:
        UserError: on the actor's machine it would say something else.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    policy: Policy | None = build_policy(recipe, prepared, total_steps=1, device=device, keep_reference=False)
    if trained and policy:
        policy = _trained_model(recipe, policy)
    assert policy is not None
    if policy.reference_identity() != identity:
        raise UserError(
            f"--ray: {recipe.policy.model} is another model on a machine of the cluster than here: its files, or the "
            "versions of the libraries differ; make them equal"
        )
    return ListReader(policy, recipe.train.batch_tokens, recipe.train.precision)


def annotate_lists(
    recipe: Recipe,
    policy: Policy,
    prepared: Prepared,
    *,
    reference: bool,
    ches: bool = False,
    spread: Callable[..., Spread] | None = None,
) -> Annotated:
    """The lists with the columns that the recipe needs, computed or read from the cache; warns of an idle contrast.

    Columns: `reference_logprobs` and, where token-level members are asked for, `token_rewards`, both per learnt
    token; `ches` and `ches_normalised` of the best completion against every worse one.

    Args:
        policy: at its start.
        reference: whether the training lists need the reference's log-probabilities.
        ches: whether the training lists get CHES even if the recipe does not filter by it.
        spread: gives what computes a policy's values elsewhere; by default they are computed here.

    Raises:
        UserError: the model that token rewards come from does not exist or does not fit.
    """
    source = _trained_model(recipe, policy) if recipe.needs_token_rewards else None
    moving = recipe.reference.name == "moving"
    if moving and reference:
        log.info("the reference moves: training computes it in every step; what is held out is measured by its start")
    cached, ches = recipe.reference.cache, ches or recipe.data.ches is not None
    read = _reader(recipe, policy, spread)
    read_trained = _reader(recipe, source, spread, trained=True) if source else None
    wanted = cached and reference and not moving
    train = _annotate_part(recipe, read, read_trained, prepared.train, reference=wanted, ches=ches)
    heldout = _annotate_part(recipe, read, read_trained, prepared.heldout, reference=cached or moving, ches=cached)
    figures = _figures(train)
    _warn_if_idle(figures)
    return Annotated(train, heldout, figures)


def _reader(
    recipe: Recipe, policy: Policy, spread: Callable[..., Spread] | None, *, trained: bool = False
) -> Callable[..., Found]:
    """`read_lists` of a policy, as the recipe has it."""
    return partial(
        read_lists,
        policy=policy,
        tokens_per_batch=recipe.train.batch_tokens,
        cache_dir=recipe.reference.cache_dir,
        precision=recipe.train.precision,
        spread=spread(policy, trained=trained) if spread else None,
    )


def _annotate_part(
    recipe: Recipe,
    read: Callable[..., Found],
    read_trained: Callable[..., Found] | None,
    lists: Dataset,
    *,
    reference: bool,
    ches: bool,
) -> Dataset:
    if not len(lists):
        return lists
    wanted: dict[Kind, bool] = {"logprobs": reference or read_trained is not None, "gram": ches}
    kinds = tuple(kind for kind, want in wanted.items() if want)
    plain = lists.remove_columns([name for name in CONTEXTS if name in lists.column_names])
    found = read(plain, kinds=kinds) if kinds else {}
    annotated = plain
    if reference:
        annotated = with_token_column(annotated, "reference_logprobs", flat_values(plain, found["logprobs"]))
    if read_trained is not None:
        trained = read_trained(plain, label="trained model")["logprobs"]
        ratio = flat_values(plain, trained) - flat_values(plain, found["logprobs"])
        squash = isinstance(recipe.token_rewards, TrainedSection) and recipe.token_rewards.squash
        annotated = with_token_column(annotated, "token_rewards", squashed(ratio) if squash else ratio)
    elif recipe.needs_token_rewards:
        annotated = with_token_column(annotated, "token_rewards", contrast_rewards(lists, read))
    return _with_ches(annotated, found["gram"]) if ches else annotated


def _with_ches(lists: Dataset, stored: Values) -> Dataset:
    grams = np.split(flat := flat_values(lists, stored), np.cumsum([len(g) ** 2 for g in lists["grades"][:]])[:-1])
    assert len(flat), "a list has completions"
    columns: dict[str, list[list[float]]] = {"ches": [], "ches_normalised": []}
    for gram, counts, grades in zip(grams, learnt_in(lists), lists["grades"][:], strict=True):
        size = len(grades)
        for name, values in zip(columns, ches_scores(gram.reshape(size, size), counts, grades), strict=True):
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
    check_written(folder)
    options = LoadOptions(device=policy.model.device, packing=recipe.train.packing)
    names = ("dtype", "attention", "trust_remote_code")
    held: dict[str, Any] = {name: getattr(recipe.policy, name) for name in names}
    if (folder / "adapter_config.json").exists():
        start = PolicySection(model=recipe.policy.model, start_adapter=str(folder), **held)
    else:
        start = PolicySection(model=str(folder) if run else section.model, adapter=Full(), **held)
    trained = load_policy(start, options, keep_reference=start.start_adapter is not None)
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
