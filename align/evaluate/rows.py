"""`align evaluate rows`: how a policy ranks graded rows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from rich.console import Console

from align.bounds import check_folder
from align.data import Prepared, Wanted, prepare_data, read_chat_template, render
from align.data.config import DataSection, SourceSection
from align.data.schema import Row
from align.data.select import with_trained_places
from align.data.source_view import SourceView, mapping_of
from align.data.sources import read_source
from align.errors import UserError
from align.evaluate.in_options import in_options
from align.evaluate.lists import evaluate_lists
from align.evaluate.variants import check_wordings, prompt_sensitivity
from align.files import read_object, write_json
from align.losses.list_loss import ListLoss, build_loss
from align.model.adapters import Full
from align.model.checks import check_fits
from align.model.config import PolicySection
from align.model.forward import TokenScorer
from align.model.load import LoadOptions
from align.model.policy import Policy, load_policy
from align.objectives.pairwise import Logistic
from align.objectives.scores import LikelihoodMean
from align.progress import counted
from align.recipe import Recipe, read_recipe, with_consent
from align.report.summary import ROWS, figure
from align.runs.build import policy_loss
from align.runs.digests import check_written
from align.runs.memory import lack_in_words
from align.runs.run_directory import RunDirectory
from align.tables import Table

OF_ONE = "give two or more answers to each prompt, since the order of answers is what is measured"


def evaluate_rows(
    path: str,
    *,
    model: str,
    split: str | None = None,
    ignore: Sequence[str] = (),
    columns: Sequence[str] = (),
    where: str | None = None,
    grades: str | None = None,
    max_length: int | None = None,
    append_eos: bool | None = None,
    chat_template: str | None = None,
    tokens_per_batch: int = 8192,
    limit: int | None = None,
    variants: str | None = None,
    json_path: str | None = None,
    trust_remote_code: bool = False,
    allow_code: bool = False,
    console: Console | None = None,
) -> dict[str, float]:
    """Ranking metrics of a policy against the rows' grades, printed and returned.

    A run ranks by its implicit reward and by likelihood; a plain model or adapter by likelihood alone.

    Args:
        path: rows: a file, a folder or a hub data set.
        model: a run directory, an adapter's folder, a model's folder or a hub name.
        ignore: columns that count as absent.
        columns: `name=place` for each column that the rows have elsewhere.
        where: a condition on the rows' own columns; others are left out.
        grades, max_length, append_eos: as in a recipe's `data`; by default a run's own, else a recipe's defaults.
        limit: read only this many rows.
        variants: a column with lists of other wordings of the prompt; how much log-probabilities depend on them is
            measured too (POSIX).
        json_path: where every figure is written as well.
        trust_remote_code: run the code that a model comes with; what a run's recipe says of it is no consent.
        allow_code: call the functions of a run's own objective and score.

    Raises:
        UserError: rows or model cannot be read or do not fit.
    """
    console = console or Console()
    view = SourceView(mapping_of(columns), where)
    consent = {"trust_remote_code": trust_remote_code, "allow_code": allow_code}
    rows: list[Row] = []
    if variants is not None:
        with in_options():
            rows = read_source(path, split=split, limit=limit, ignore=ignore, columns=view.columns, where=where).rows
        check_wordings(rows, variants)
    with in_options():
        policy, loss, template = load_measured(model, chat_template, **consent)
    given = {"grades": grades, "max_length": max_length, "append_eos": append_eos}
    section = _section(Path(model), path, split, view).model_copy(
        update={"ignore": tuple(ignore), "limit": limit}
        | {name: value for name, value in given.items() if value is not None}
    )
    ranks_by_reward = (Path(model) / "recipe.yaml").exists()
    wanted = Wanted(margins=ranks_by_reward and loss.takes_margins, instead_of_one=OF_ONE)
    with in_options():
        prepared = prepare_data(section, policy.tokenizer, chat_template=read_chat_template(template), wanted=wanted)
    check_fits(policy.model, [prepared.train])
    lists = _as_trained(Path(model), prepared.train)
    options: dict[str, Any] = {"tokens_per_batch": tokens_per_batch, "accelerator": Accelerator()}
    with lack_in_words("--tokens-per-batch {}", tokens_per_batch, goes_on="it does not change the figures"):
        metrics = evaluate_lists(TokenScorer(policy), policy, loss, lists, **options)
    if not ranks_by_reward:
        own = ("likelihood", "token", "entropy", "hidden_diversity")
        metrics = {name: value for name, value in metrics.items() if name.startswith(own)}
    if variants is not None:
        options = {"tokens_per_batch": tokens_per_batch}
        with in_options():
            metrics |= prompt_sensitivity(policy, rows, variants, _preparing(section, policy, template), **options)
        prepared.audit.mark_read([variants])
    console.print(render(prepared.audit))
    console.print(_table(model, metrics, prepared))
    if json_path:
        write_json(Path(json_path), {"model": model, "data": prepared.audit.to_dict(), "metrics": metrics})
    return metrics


def _preparing(section: DataSection, policy: Policy, template: str | None) -> Callable[[Path], Dataset]:
    """What reads a file of rows into lists as a section says, and keeps nothing of it."""

    def prepare(file: Path) -> Dataset:
        only = {"sources": (SourceSection(path=str(file)),), "ignore": (), "limit": None, "cache": False}
        chat = read_chat_template(template)
        return prepare_data(
            section.model_copy(update=only), policy.tokenizer, chat_template=chat, wanted=Wanted(min_completions=1)
        ).train

    return prepare


def load_measured(
    model: str, chat_template: str | None, *, trust_remote_code: bool = False, allow_code: bool = False
) -> tuple[Policy, ListLoss, str | None]:
    """The policy of a run, an adapter or a plain model, how it scores, and the chat template."""
    loss = build_loss(LikelihoodMean(beta=1.0), [Logistic()])
    if (Path(model) / "recipe.yaml").exists():
        loss = loss_of_run(Path(model), allow_code=allow_code)
    policy, template = load_any(model, chat_template, trust_remote_code=trust_remote_code)
    return policy, loss, template


def load_any(model: str, chat_template: str | None, *, trust_remote_code: bool) -> tuple[Policy, str | None]:
    """The policy of a run, an adapter or a plain model, and the chat template."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(model)
    if (folder / "recipe.yaml").exists():
        return load_run(folder, chat_template, device, trust_remote_code=trust_remote_code)
    check_written(folder)
    options = LoadOptions(device=device)
    held: dict[str, Any] = {"chat_template": chat_template, "trust_remote_code": trust_remote_code}
    if (file := folder / "adapter_config.json").exists():
        check_folder(folder)
        config = read_object(file)
        base = config.get("base_model_name_or_path")
        if not base:
            raise UserError(
                f"{folder / 'adapter_config.json'}: names no base model; give `base_model_name_or_path` there"
            )
        revision = None if Path(base).expanduser().is_dir() else config.get("revision")
        section = PolicySection(model=base, revision=revision, start_adapter=model, **held)
        return load_policy(section, options), chat_template
    section = PolicySection(model=model, adapter=Full(), **held)
    return load_policy(section, options, keep_reference=False), chat_template


def loss_of_run(folder: Path, *, allow_code: bool = False) -> ListLoss:
    """How a run scores, without what its rows alone would have."""
    run = RunDirectory(folder)
    recipe = with_consent(_of_policy(run), run.recipe, trust_remote_code=True, allow_code=allow_code)  # no model yet
    return policy_loss(recipe.model_copy(update={"regularizer": None, "token_weights": None}))


def load_run(
    folder: Path, chat_template: str | None, device: str, *, trust_remote_code: bool = False
) -> tuple[Policy, str | None]:
    """A run's policy as it was trained, and its chat template.

    Raises:
        UserError: there is no checkpoint yet, or its model's code would run without consent.
    """
    run = RunDirectory(folder)
    recipe = with_consent(_of_policy(run), run.recipe, trust_remote_code=trust_remote_code, allow_code=None)
    state = run.final_state()
    template = chat_template or recipe.policy.chat_template
    section = recipe.policy.model_copy(update={"chat_template": template})
    policy = load_policy(section, LoadOptions(seed=recipe.train.seed, device=device, total_steps=1, like=state))
    policy.load_state(state)
    return policy, template


def _of_policy(run: RunDirectory) -> Recipe:
    recipe = run.read_recipe()
    if recipe.task == "reward":
        raise UserError(f"{run.path}: the run of a reward model; measure it with `align evaluate rewards`")
    return recipe


def _section(folder: Path, path: str, split: str | None, view: SourceView) -> DataSection:
    """The rows, read as a run reads its own, so that its held-out rows give the figures of its summary."""
    source = SourceSection(path=path, split=split, columns=dict(view.columns), where=view.where)
    section = DataSection(sources=(source,), eval_fraction=0.0)
    if not (folder / "recipe.yaml").exists():
        return section
    data = read_recipe(folder / "recipe.yaml").data
    names = ("grades", "max_length", "max_prompt_length", "overlong", "append_eos", "learn", "template_options")
    return section.model_copy(update={name: getattr(data, name) for name in names})


def _as_trained(folder: Path, lists: Dataset) -> Dataset:
    """The lists with what a run's training would keep of them, so that its loss is that of its summary."""
    if not (folder / "recipe.yaml").exists():
        return lists
    recipe = read_recipe(folder / "recipe.yaml")
    data = recipe.data
    return with_trained_places(lists, select=data.select, list_size=data.list_size, seed=recipe.train.seed)


def _table(model: str, metrics: dict[str, float], prepared: Prepared) -> Table:
    table = Table("", model, title=counted(len(prepared.train), "list"), title_justify="left")
    for key, label, pattern in ROWS:
        if key in metrics:
            table.add_row(label, figure(pattern, metrics[key]))
    return table
