"""What a run directory holds, read and checked."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from align.bounds import load_yaml
from align.errors import UserError
from align.runs.metrics import without_checksum
from align.runs.run_directory import RunDirectory

Line = dict[str, float]
"""One line of metrics.jsonl."""


READ = ("recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", "token_view.jsonl")

TokenNumbers = list[FiniteFloat | None]
"""One number per token; None for a token that is not learnt."""


class TokenCompletion(BaseModel):
    """One completion's tokens as text, and what is known of each."""

    model_config = ConfigDict(frozen=True)

    tokens: list[str]
    token_rewards: TokenNumbers | None = None
    """T-REG's rewards; None where the run computed none."""
    implicit_before: TokenNumbers
    """Each token's share of the implicit reward, before and after training."""
    implicit_after: TokenNumbers
    logprob_before: TokenNumbers
    """log p(token), in nats."""
    logprob_after: TokenNumbers

    @property
    def learnt(self) -> list[bool]:
        """Which tokens are learnt; the others are read only, and nothing is known of them."""
        return [value is not None for value in self.logprob_before]

    @model_validator(mode="after")
    def _one_value_per_token(self) -> "TokenCompletion":
        for name, values in self:
            if values is not None and len(values) != len(self.tokens):
                raise ValueError(f"{name} has {len(values)} values for {len(self.tokens)} tokens")
            if name != "tokens" and values is not None and [v is not None for v in values] != self.learnt:
                raise ValueError(f"{name} has null at other tokens than logprob_before")
        return self


class TokenList(BaseModel):
    """A line of token_view.jsonl: one list."""

    model_config = ConfigDict(frozen=True)

    id: str | int
    prompt: str
    grades: list[FiniteFloat]
    completions: list[TokenCompletion] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_grade_per_completion(self) -> "TokenList":
        if len(self.grades) != len(self.completions):
            raise ValueError(f"{len(self.grades)} grades for {len(self.completions)} completions")
        return self


@dataclass(frozen=True)
class Run:
    """One run as the page shows it."""

    path: Path
    recipe: dict[str, Any]
    recipe_text: str
    environment: dict[str, Any] | None
    summary: dict[str, Any] | None
    """None while the run is not finished."""
    steps: list[Line]
    """One per optimizer step."""
    evaluations: list[Line]
    """Held-out metrics in the middle of training; their names begin with eval_."""
    token_lists: list[TokenList] | None
    """None for a run that has no token_view.jsonl."""

    @property
    def name(self) -> str:
        return self.path.resolve().name


def read_run(path: Path) -> Run:
    """Everything of a run directory that the page shows.

    Raises:
        UserError: `path` holds no run, or a file of it is broken; names the file and the line.
    """
    files = RunDirectory(path)
    if not files.recipe.exists():
        raise UserError(f"{path}: holds no run (there is no recipe.yaml); give the folder that `align train` wrote to")
    files.check(*READ)
    lines = [_numbers(line, where) for where, line in _json_lines(files.metrics)]
    token_view = path / "token_view.jsonl"
    text = _text(files.recipe)
    return Run(
        path=path,
        recipe=_recipe(text, files.recipe),
        recipe_text=text,
        environment=_json_object(path / "environment.json"),
        summary=_json_object(files.summary),
        steps=[line for line in lines if "loss" in line],
        evaluations=[line for line in lines if "eval_loss" in line],
        token_lists=[_token_list(line, where) for where, line in _json_lines(token_view)]
        if token_view.exists()
        else None,
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; let `align train` write it again") from None


def _recipe(text: str, path: Path) -> dict[str, Any]:
    try:
        recipe = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())}); restore the file") from None
    if not isinstance(recipe, dict):
        raise UserError(f"{path}: is not a recipe; restore the file")
    return recipe


def _json_object(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return _parsed(_text(path), str(path))


def _json_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line with its place; a last one that is being written, or that a kill has cut short, is left out."""
    lines = _text(path).split("\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            own = without_checksum(line)
        except ValueError as error:
            raise UserError(f"{where}: {error}; remove it or restore the file") from None
        yield where, _parsed(own, where)


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise UserError(f"{where}: is not JSON ({said}); remove it or restore the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object; remove it or restore the file")
    return value


def _numbers(line: dict[str, Any], where: str) -> Line:
    if "step" not in line:
        raise UserError(f"{where}: has no `step`; remove it or restore the file")
    for name, value in line.items():
        if not isinstance(value, int | float):
            raise UserError(f"{where}: `{name}` is not a number; remove the line or restore the file")
    return line


def _token_list(line: dict[str, Any], where: str) -> TokenList:
    try:
        return TokenList.model_validate(line)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f"{where}: {field + ': ' if field else ''}{first['msg']}; restore the file") from None
