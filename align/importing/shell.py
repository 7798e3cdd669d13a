"""Arguments of a training command in a shell script, read without a shell."""

import ast
import operator
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from align.bounds import load_yaml, parse_python
from align.errors import UserError

COMMANDS = {
    ("swift",): "ms-swift",
    ("megatron",): "Megatron-SWIFT",
    ("llamafactory-cli", "train"): "LLaMA-Factory",
    ("lmf", "train"): "LLaMA-Factory",
    ("trl",): "TRL",
}
"""First words -> whose command it is."""
OPERATIONS: dict[type, Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
DEVICES = ("NPROC_PER_NODE", "nproc_per_node")


class Called(NamedTuple):
    """One training command."""

    tool: str
    verb: str
    """The word behind the tool, such as `rlhf` or `dpo`; empty where it has none."""
    values: dict[str, Any]
    devices: int
    file: str | None
    """A configuration that it names."""


def read_shell(file: Path) -> Called:
    """The one training command of a shell script.

    Raises:
        UserError: none or several, or a value that only a shell could compute.
    """
    text = re.sub(r"\\\r?\n", " ", file.read_text(encoding="utf-8"))
    variables: dict[str, str] = {}
    found: list[Called] = []
    for line in text.splitlines():
        line = re.sub(r"\$\(\(.*?\)\)|\$\(.*?\)|`.*?`", lambda part: _computed(part[0], variables, file), line)
        try:
            words = shlex.split(line, comments=True)
        except ValueError as error:
            raise UserError(
                f"{file}: cannot be read as shell words ({error}); write each option as --key value"
            ) from None
        words = [_expanded(word, variables) for word in words]
        while words and (match := re.fullmatch(r"(?:export\s+)?(\w+)=(.*)", words[0], re.S)) or words[:1] == ["export"]:
            if match := re.fullmatch(r"(\w+)=(.*)", words[0], re.S):
                variables[match[1]] = match[2]
            words = words[1:]
        if called := _called(words, variables, file):
            found.append(called)
    training = [one for one in found if one.verb not in ("export", "infer", "deploy", "eval", "vllm-serve", "env")]
    if len(training) != 1:
        what = "no training command" if not training else f"{len(training)} training commands"
        known = "`swift rlhf`, `trl dpo` or `llamafactory-cli train`"
        raise UserError(f"{file}: {what}; keep the one with its options, such as {known}")
    return training[0]


def _computed(text: str, variables: dict[str, str], file: Path) -> str:
    """The value of `$(expr 16 / $n)` or `$((16 / n))`; other commands are left for where they matter."""
    inner = re.sub(r"^\$\(\(|\)\)$|^\$\(|\)$|^`|`$", "", text).strip()
    inner = _expanded(re.sub(r"^expr\s+", "", inner).replace("\\*", "*"), variables)
    try:
        return str(_arithmetic(parse_python(inner, "eval").body, variables))
    except (SyntaxError, ValueError, KeyError, ArithmeticError, RecursionError, MemoryError):
        return "'$(...)'"


def _arithmetic(node: ast.expr, variables: dict[str, str]) -> int:
    if isinstance(node, ast.BinOp):
        left, right = _arithmetic(node.left, variables), _arithmetic(node.right, variables)
        return int(OPERATIONS[type(node.op)](left, right))
    if isinstance(node, ast.Name):
        return int(variables[node.id])
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    raise ValueError


def _expanded(word: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda name: variables.get(name[1], name[0]), word)


def _called(words: list[str], variables: dict[str, str], file: Path) -> Called | None:
    for first, tool in COMMANDS.items():
        for place in range(len(words)):
            if tuple(words[place : place + len(first)]) == first:
                return _arguments(tool, words[place + len(first) :], variables, file)
    return None


def _arguments(tool: str, words: list[str], variables: dict[str, str], file: Path) -> Called:
    verb = words[0] if words and not words[0].startswith("-") and tool != "LLaMA-Factory" else ""
    rest = words[1:] if verb else words
    config = rest[0] if rest and not rest[0].startswith("-") and "=" not in rest[0] else None
    values: dict[str, Any] = {}
    key = ""
    for word in rest[1:] if config else rest:
        if word.startswith("--"):
            key, equals, value = word[2:].replace("-", "_").partition("=")
            values[key] = _scalar(value) if equals else True
        elif word in (">", ">>", "2>&1", "|", "&", "&&", ";"):
            break
        elif not key and "=" in word:
            name, _, value = word.partition("=")
            values[name] = _scalar(value)
        elif key:
            before = values[key]
            values[key] = (
                _scalar(word)
                if before is True
                else [*before, _scalar(word)]
                if isinstance(before, list)
                else [before, _scalar(word)]
            )
    for name, value in values.items():
        if "$" in str(value):
            raise UserError(f"{file}: `--{name} {value}` is computed by the shell; write its value")
    config = str(values.pop("config")) if "config" in values else config
    devices = next((variables[name] for name in DEVICES if name in variables), "1")
    return Called(tool, verb, values, int(devices) if devices.isdecimal() else 1, config)


def _scalar(text: str) -> Any:
    """A word as YAML reads it, where that is a number or a truth value."""
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, bool | int | float) or value is None else text
