"""`align evaluate rows`: how a policy ranks graded rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from align.data import Prepared, Source, prepare_data, read_chat_template, render
from align.data.select import with_trained_places
from align.errors import UserError
from align.evaluate.lists import evaluate_lists
from align.files import read_json, write_json
from align.losses.list_loss import ListLoss, build_loss
from align.model.adapters import Full
from align.model.checks import check_fits
from align.model.forward import TokenScorer
from align.model.policy import Policy, load_policy
from align.objectives.pairwise import Logistic
from align.objectives.scores import LikelihoodMean
from align.recipe import load_recipe
from align.report.summary import ROWS, figure
from align.runs.build import policy_loss
from align.runs.memory import lack_in_words
from align.runs.run_directory import RunDirectory


def evaluate_rows(
    path: str,
    *,
    model: str,
    split: str | None = None,
    ignore: Sequence[str] = (),
    grades: str | None = None,
    max_length: int | None = None,
    append_eos: bool | None = None,
    chat_template: str | None = None,
    tokens_per_batch: int = 8192,
    json_path: str | None = None,
    console: Console | None = None,
) -> dict[str, float]:
    """Ranking metrics of a policy against the rows' grades, printed and returned.

    A run ranks by its implicit reward and by likelihood; a plain model or adapter by likelihood alone.

    Args:
        path: rows: a file, a folder or a hub data set.
        model: a run directory, an adapter's folder, a model's folder or a hub name.
        ignore: columns that count as absent.
        grades, max_length, append_eos: as in a recipe's `data`; by default a run's own, else a recipe's defaults.
        json_path: where every figure is written as well.

    Raises:
        UserError: rows or model cannot be read or do not fit.
    """
    console = console or Console()
    policy, loss, template = load_measured(model, chat_template)
    given = {"grades": grades, "max_length": max_length, "append_eos": append_eos}
    prepared = prepare_data(
        sources=[Source(path, split=split)],
        ignore=ignore,
        eval_fraction=0.0,
        tokenizer=policy.tokenizer,
        chat_template=read_chat_template(template),
        **(_reading(Path(model)) | {name: value for name, value in given.items() if value is not None}),
    )
    check_fits(policy.model, [prepared.train])
    ranks_by_reward = (Path(model) / "recipe.yaml").exists()
    lists = _as_trained(Path(model), prepared.train)
    options: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "accelerator": Accelerator()}
    with lack_in_words("--tokens-per-batch {}", tokens_per_batch, goes_on="it does not change the figures"):
        metrics = evaluate_lists(TokenScorer(policy), policy, loss, lists, **options)
    if not ranks_by_reward:
        own = ("likelihood", "token", "entropy")
        metrics = {name: value for name, value in metrics.items() if name.startswith(own)}
    console.print(render(prepared.audit))
    console.print(_table(model, metrics, prepared))
    if json_path:
        write_json(Path(json_path), {"model": model, "data": prepared.audit.to_dict(), "metrics": metrics})
    return metrics


def load_measured(model: str, chat_template: str | None) -> tuple[Policy, ListLoss, str | None]:
    """The policy of a run, an adapter or a plain model, how it scores, and the chat template."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(model)
    if (folder / "recipe.yaml").exists():
        return load_run(folder, chat_template, device)
    by_likelihood = build_loss(LikelihoodMean(beta=1.0), [Logistic()])
    arguments: dict[str, Any] = {"device": device, "chat_template": chat_template}
    if (folder / "adapter_config.json").exists():
        config = read_json(folder / "adapter_config.json")
        base = config["base_model_name_or_path"]
        revision = None if Path(base).expanduser().is_dir() else config.get("revision")
        arguments |= {"revision": revision, "start_adapter": model}
        return load_policy(base, **arguments), by_likelihood, chat_template
    return load_policy(model, adapter=Full(), keep_reference=False, **arguments), by_likelihood, chat_template


def load_run(folder: Path, chat_template: str | None, device: str) -> tuple[Policy, ListLoss, str | None]:
    """A run's policy as it was trained, its loss, and its chat template.

    Raises:
        UserError: there is no checkpoint yet.
    """
    run = RunDirectory(folder)
    recipe = run.read_recipe()
    if recipe.task == "reward":
        raise UserError(f"{folder}: the run of a reward model; measure it with `align evaluate rewards`")
    state = run.final_state()
    section = recipe.policy.keywords() | {"chat_template": chat_template or recipe.policy.chat_template}
    policy = load_policy(**section, seed=recipe.train.seed, device=device, total_steps=1, like=state)
    policy.load_state(state)
    ranks = recipe.model_copy(update={"regularizer": None, "token_weights": None})  # rows have no token rewards
    return policy, policy_loss(ranks), section["chat_template"]


def _reading(folder: Path) -> dict[str, Any]:
    """How a run reads rows, so that its held-out rows give the figures of its summary; nothing of a plain model."""
    if not (folder / "recipe.yaml").exists():
        return {}
    data = load_recipe(folder / "recipe.yaml").data
    own = {name: getattr(data, name) for name in ("grades", "max_length", "max_prompt_length", "overlong")}
    return own | {"append_eos": data.append_eos is not False}


def _as_trained(folder: Path, lists: Dataset) -> Dataset:
    """The lists with what a run's training would keep of them, so that its loss is that of its summary."""
    if not (folder / "recipe.yaml").exists():
        return lists
    recipe = load_recipe(folder / "recipe.yaml")
    data = recipe.data
    return with_trained_places(lists, select=data.select, list_size=data.list_size, seed=recipe.train.seed)


def _table(model: str, metrics: dict[str, float], prepared: Prepared) -> Table:
    table = Table("", model, title=f"{len(prepared.train)} lists", title_justify="left")
    for key, label, pattern in ROWS:
        if key in metrics:
            table.add_row(label, figure(pattern, metrics[key]))
    return table
