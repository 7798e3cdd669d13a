"""`align inspect`: what a recipe would train on, without training."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from align.data import render
from align.data.audit import facts_of
from align.errors import UserError
from align.files import write_text
from align.model.classifier import is_read_at_last_token
from align.progress import counted
from align.recipe import Recipe, dump_recipe
from align.recipe.idle import say_idle
from align.recipe.recipe import dump_set
from align.report.rows_page import ShownRow, render_rows
from align.rollout.prompts import describe_prompts, read_prompts
from align.runs.build import check_objectives, prepare, tokenizer_of
from align.training.arguments import planned_steps
from align.training.token_rows import in_terminal, prompt_tokens, shown_row


def inspect_recipe(
    recipe: Recipe, *, rows: int, whole: bool = False, html: str | None = None, console: Console | None = None
) -> None:
    """Print the audit of the recipe's data, what the recipe sets and the first rows as the model reads them.

    Args:
        rows: lists, or prompts, to show.
        whole: every key of the recipe, not only those that are not at their defaults.
        html: file of a page that shows the rows with every token's role and id.

    Raises:
        UserError: the recipe or its data cannot work, or the page cannot be written.
    """
    console = console or Console()
    said = Text(dump_recipe(recipe) if whole else dump_set(recipe))
    say_idle(recipe)
    if recipe.online:
        shown, facts = _inspect_prompts(recipe, said, rows=rows, console=console)
        _write_page(html, shown, facts, console)
        return
    prepared = prepare(recipe, every_check=True)
    console.print(render(prepared.audit))
    check_objectives(recipe, prepared)
    steps = len(planned_steps(recipe.train, prepared.train))
    lists = min(recipe.train.lists_per_step, len(prepared.train))
    console.print(f"{counted(steps, 'optimizer step')} of {counted(lists, 'list')}\n")
    console.print(said)
    policy = recipe.policy
    tokenizer = tokenizer_of(policy)
    read = "read but not trained on", "trained on"
    if recipe.task == "reward":
        at_last = is_read_at_last_token(policy.model, policy.revision, trust_remote_code=policy.trust_remote_code)
        read = "read", "its reward at the last token" if at_last else "its reward of the whole text"
    learns = recipe.task != "reward"
    shown = [
        shown_row(example, tokenizer, learns=learns)
        for example in prepared.train.select(range(min(rows, len(prepared.train))))
    ]
    for row in shown:
        console.print(in_terminal(row, tokenizer, *read))
    checks = {own.check: own.said for own in prepared.audit.lint}
    _write_page(html, shown, facts_of(prepared.audit) | checks, console)


def _inspect_prompts(
    recipe: Recipe, said: Text, *, rows: int, console: Console
) -> tuple[list[ShownRow], dict[str, str]]:
    """What an online run starts from: there are no completions yet."""
    prompts = read_prompts(recipe)
    counts = describe_prompts(prompts)
    console.print(counts + "\n")
    console.print(said)
    shown = [
        ShownRow(row.id, f"{row.source}, row {row.number}", prompt_tokens(prompts.tokenizer, ids), [])
        for row, ids in list(zip(prompts.rows, prompts.ids, strict=True))[:rows]
    ]
    for row in shown:
        console.print(in_terminal(row, prompts.tokenizer, "read but not trained on", ""))
    return shown, {"prompts": counts}


def _write_page(html: str | None, rows: list[ShownRow], facts: dict[str, str], console: Console) -> None:
    if html is None:
        return
    target = Path(html)
    try:
        write_text(target, render_rows(target.stem, rows, facts))
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror}); give --html another file") from None
    console.print(f"page: {html}")
