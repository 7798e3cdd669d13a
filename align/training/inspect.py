"""`align inspect`: what a recipe would train on, without training."""

from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from align.data import render
from align.model.classifier import is_read_at_last_token
from align.packing.batch import Example
from align.progress import counted
from align.recipe import Recipe, dump_recipe
from align.recipe.idle import say_idle
from align.rollout.prompts import describe_prompts, read_prompts
from align.runs.build import check_objectives, prepare, tokenizer_of
from align.training.arguments import planned_steps

CONTEXT_COLOUR, COMPLETION_COLOUR = "dim", "green"


def inspect_recipe(recipe: Recipe, *, rows: int, console: Console | None = None) -> None:
    """Print the resolved recipe, the audit of its data and the first rows as the model reads them."""
    console = console or Console()
    console.print(Text(dump_recipe(recipe)))
    say_idle(recipe)
    if recipe.online:
        _inspect_prompts(recipe, rows=rows, console=console)
        return
    prepared = prepare(recipe)
    console.print(render(prepared.audit))
    check_objectives(recipe, prepared)
    steps = len(planned_steps(recipe.train, prepared.train))
    lists = min(recipe.train.lists_per_step, len(prepared.train))
    console.print(f"{counted(steps, 'optimizer step')} of {counted(lists, 'list')}\n")
    policy = recipe.policy
    tokenizer = tokenizer_of(policy)
    read = "read but not trained on", "trained on"
    if recipe.task == "reward":
        at_last = is_read_at_last_token(policy.model, policy.revision, trust_remote_code=policy.trust_remote_code)
        read = "read", "its reward at the last token" if at_last else "its reward of the whole text"
    for example in prepared.train.select(range(min(rows, len(prepared.train)))):
        console.print(describe(example, tokenizer, *read))


def _inspect_prompts(recipe: Recipe, *, rows: int, console: Console) -> None:
    """What an online run starts from: there are no completions yet."""
    prompts = read_prompts(recipe)
    console.print(describe_prompts(prompts))
    for row, ids in list(zip(prompts.rows, prompts.ids, strict=True))[:rows]:
        text = Text(f"{row.id} ({row.source}, row {row.number})\n", style="bold")
        console.print(text.append("  " + _tokens(prompts.tokenizer, ids) + "\n", style=CONTEXT_COLOUR))


def describe(example: Example, tokenizer: PreTrainedTokenizerBase, prompt_use: str, completion_use: str) -> Text:
    """One list decoded, its completions in another colour and every token's border marked.

    Args:
        prompt_use, completion_use: what training does with the tokens, in words.
    """
    text = Text()
    text.append(f"{example['id']} ({example['source']}, row {example['row']})\n", style="bold")
    text.append(f"prompt, {len(example['prompt_ids'])} tokens, {prompt_use}\n")
    text.append("  " + _tokens(tokenizer, example["prompt_ids"]) + "\n", style=CONTEXT_COLOUR)
    for grade, ids in zip(example["grades"], example["completion_ids"], strict=True):
        text.append(f"grade {grade:.3f}, {len(ids)} tokens, {completion_use}\n")
        text.append("  " + _tokens(tokenizer, ids) + "\n", style=COMPLETION_COLOUR)
    return text


def _tokens(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return "|".join(repr(tokenizer.decode([i]))[1:-1] for i in ids)
