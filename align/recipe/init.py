"""`align init`: a commented recipe of one's own, with the method's part as the shipped recipe has it."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from align.errors import UserError
from align.shipped import recipe_file

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
DATA = "my_rows.jsonl"
SCORER = "my-reward-model"
_PAIRS = "Rows {prompt, chosen, rejected}, or lists {prompt, completions, grades | rewards | ranks}."
_LABELLED = "Rows {prompt, completion, label: true | false}."
_SHOWN = "Rows {prompt, completion} or {messages}; of lists and pairs the best completion."
_PROMPTS = "Rows whose prompts are completed: {prompt}."


class Start(NamedTuple):
    """Where a task's recipe comes from."""

    recipe: str
    """The shipped one."""
    title: str
    rows: str
    """What rows it trains on."""


TASKS = {
    "preference": Start("lipo_lambda", "LiPO-lambda on lists, or on pairs as lists of two (arXiv:2402.01878).", _PAIRS),
    "lipo": Start("lipo_lambda", "LiPO-lambda on lists, or on pairs as lists of two (arXiv:2402.01878).", _PAIRS),
    "dpo": Start("dpo", "DPO on pairs, or on each list's best and worst completion (arXiv:2305.18290).", _PAIRS),
    "simpo": Start("simpo", "SimPO: a margin on length-normalised log-probabilities (arXiv:2405.14734).", _PAIRS),
    "orpo": Start("orpo", "ORPO: likelihood and odds ratio, no reference (arXiv:2403.07691).", _PAIRS),
    "kto": Start("kto", "KTO on single completions labelled good or bad (arXiv:2402.01306).", _LABELLED),
    "sft": Start("sft", "Plain next-token training on each row's best completion.", _SHOWN),
    "reward": Start("reward_bradley_terry", "A reward model by Bradley-Terry (arXiv:2203.02155).", _PAIRS),
    "online": Start("online_lipo", "Online LiPO-lambda: sample, score, train, and again.", _PROMPTS),
    "token_reg": Start("treg", "T-REG: LiPO-lambda with a token-level term (arXiv:2412.02685).", _PAIRS),
}
OURS = {"task", "output", "policy", "data", "train", "sampling", "token_rewards", "with_sources"}
"""Sections that the template writes, or that are about the stories."""
DATA_KEYS = {"grades", "select", "overlong"}
"""Keys of the shipped recipe's `data` that belong to the method."""


def init(task: str, file: str | None = None, *, model: str = MODEL, data: str = DATA) -> Path:
    """Write a recipe for one's own model and rows.

    Args:
        task: a name of `TASKS`.
        file: where to; by default TASK.yaml in the current folder.
        model, data: what `policy.model` and `data.sources` say.

    Returns:
        The file.

    Raises:
        UserError: there is a file already.
    """
    path = Path(file or f"{task}.yaml")
    if path.exists():
        again = " ".join([task, *_given(model, data)])
        raise UserError(f"{path}: is there already; give another file name: align init {again} --output mine.yaml")
    filled = recipe_of(task, path, model=model, data=data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(filled, encoding="utf-8")
    return path


def _given(model: str, data: str) -> Iterator[str]:
    """The options of `align init` that are not its defaults."""
    for flag, value, default in (("--model", model, MODEL), ("--data", data, DATA)):
        if value != default:
            yield f"{flag} {shlex.quote(value)}"


def recipe_of(task: str, path: Path, *, model: str = MODEL, data: str = DATA) -> str:
    """The commented recipe of a task as it stands in a file; arguments as for `init`."""
    import jinja2  # here, as the command line imports this module for its list of tasks

    text = recipe_file(TASKS[task].recipe).read_text(encoding="utf-8")
    blocks = dict(_blocks(text, indent=""))
    method = "".join(block + "\n" for name, block in blocks.items() if name not in OURS)
    keys = "".join(block for name, block in _blocks(blocks["data"], indent="  ") if name in DATA_KEYS)
    template = Path(__file__).with_name("init.yaml.jinja").read_text(encoding="utf-8")
    return jinja2.Template(template, keep_trailing_newline=True).render(
        title=TASKS[task].title,
        file=path,
        stem=path.stem,
        task=yaml.safe_load(text)["task"],
        model=_quoted(model),
        data=_quoted(data),
        rows=TASKS[task].rows,
        data_keys=keys,
        method=method.replace("data/story-scorer", SCORER).replace("max_tokens: 64", "max_tokens: 256"),
        constant=task == "online",
    )


def print_init(task: str, file: str | None = None, *, model: str = MODEL, data: str = DATA) -> None:
    """Write the recipe and say what to do with it."""
    path = init(task, file, model=model, data=data)
    left = left_to_set(path)
    before = f"set {', '.join(left)} there, then " if left else ""
    print(f"{path}: {before}`align inspect {path}` and `align train {path}`")


def left_to_set(path: Path) -> list[str]:
    """The keys of a recipe from `init` that still say what it put there for want of the user's own."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    said = {
        "policy.model": recipe["policy"]["model"] == MODEL,
        "data.sources": recipe["data"]["sources"] == [{"path": DATA}],
        "rollout.reward": recipe.get("rollout", {}).get("reward", {}).get("model") == SCORER,
    }
    return [key for key, default in said.items() if default]


def _blocks(text: str, *, indent: str) -> Iterator[tuple[str, str]]:
    """Each key at an indentation with the comments above it and all below it."""
    comments: list[str] = []
    block: list[str] = []
    name = ""
    for line in text.splitlines(keepends=True):
        key = re.match(rf"{indent}(\w+):", line)
        if key:
            if block:
                yield name, "".join(block)
            name, block, comments = key[1], [*comments, line], []
        elif line.startswith(f"{indent}#") or not line.strip():
            comments = [*comments, line] if line.strip() else []
        elif block:
            block += [*comments, line]
            comments = []
    if block:
        yield name, "".join(block)


def _quoted(text: str) -> str:
    """A string as YAML within a flow mapping."""
    return text if re.fullmatch(r"[\w./~-]+", text) else yaml.safe_dump(text, default_style='"').strip()
