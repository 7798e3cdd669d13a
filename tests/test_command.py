"""The commands' tables: each option reaches what the command runs, a misspelt one is answered where it was given."""

import importlib
import inspect
import json
import subprocess
import sys

import pytest

from align.cli import COMMANDS, _parser, main
from align.command import Command
from align.planning.command import plan_recipe
from align.recipe.recipe import SamplingSection

RUNNING = [command for command in COMMANDS if command.runs]
KEYWORDS = dict.fromkeys((command.name for command in COMMANDS), SamplingSection.model_fields.keys()) | {
    "doctor": inspect.signature(plan_recipe).parameters.keys()
}
"""What a command that takes any keyword gives them to."""
HEAVY = ("torch", "transformers", "datasets", "numpy", "rich", "pydantic")


def function_of(command: Command):
    module, _, name = command.runs.partition(":")
    return getattr(importlib.import_module(module), name)


def parsed(command: Command) -> dict:
    """What a command is called with where only what it requires is given."""
    words = command.name.split()
    for one in command.options:
        if not one.names[0].startswith("-"):
            words += [] if one.keywords.get("nargs") in ("?", "*") else ["x"]
        elif one.keywords.get("required"):
            words += [one.names[0], "x"]
    return vars(_parser().parse_args(words)).copy()


@pytest.mark.parametrize("command", RUNNING, ids=lambda command: command.name)
def test_what_a_command_parses_is_what_its_function_takes(command):
    given = {name: value for name, value in parsed(command).items() if name not in {"command", "parser"}}
    if "overrides" in given:  # the recipe is loaded with these
        for name in given.keys() & {"overrides", "trust_remote_code", "allow_code"}:
            del given[name]
    signature = inspect.signature(function_of(command))
    bound = signature.bind(**given)  # neither too few nor too many
    for name, value in bound.arguments.items():
        parameter = signature.parameters[name]
        if parameter.kind is parameter.VAR_KEYWORD:
            assert value.keys() <= KEYWORDS[command.name]
            continue
        given_by_hand = value == "x" or value == ["x"]
        if parameter.default is not parameter.empty and not given_by_hand:
            default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
            assert value == default, f"{command.name}: {name} has two defaults"


def spellings(flag: str) -> set[str]:
    """A letter too few, two exchanged, with underscores, with one dash."""
    name = flag[2:]
    return {f"--{name[:1]}{name[2:]}", f"--{name[1]}{name[0]}{name[2:]}", f"--{name.replace('-', '_')}", f"-{name}"}


MISSPELT = [
    (command, one.names[-1], wrong)
    for command in RUNNING
    for one in command.options
    for wrong in sorted(spellings(one.names[-1]))
    if one.names[-1].startswith("--") and not any(flag.startswith(wrong) for x in command.options for flag in x.names)
]


@pytest.mark.parametrize("value", [["3"], []], ids=["a value", "alone"])
@pytest.mark.parametrize(("command", "flag", "wrong"), MISSPELT, ids=lambda x: getattr(x, "name", x))
def test_a_misspelt_option_is_answered_below_its_commands_usage(
    command, flag, wrong, value, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    given = [word for one in command.options if not one.names[0].startswith("-") for word in ["dpo"]][:2]
    with pytest.raises(SystemExit) as stopped:
        main([*command.name.split(), *(given if "TASK" not in str(command.options) else []), wrong, *value])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith(f"usage: align {command.name} ") and f"\nalign {command.name}: error: " in error
    assert f"for `{wrong}`, did you mean `{flag}`?" in error


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["trian"], "train"), (["evaluate", "rwos"], "rows"), (["init", "dop"], "dpo"), (["score", "--comb"], None)],
)
def test_a_misspelt_command_or_choice(words, meant, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.endswith(f"did you mean `{meant}`?\n") if meant else "did you mean" not in error


def test_no_help_loads_what_takes_seconds():
    """Every command's, in one fresh interpreter."""
    program = (
        "import sys\nfrom align.cli import COMMANDS, main\n"
        "for command in COMMANDS:\n"
        "    try:\n        main([*command.name.split(), '--help'])\n"
        "    except SystemExit as end:\n        assert end.code == 0\n"
        f"import json\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []
    assert all(f"usage: align {command.name} " in done.stdout for command in COMMANDS)


REFUSED_EARLY = (
    (["train", "dpo", "policy.model=nobody/nothing"], "policy.model: nobody/nothing is neither a folder"),
    (["inspect", "dpo", "policy.model=nobody-s.model"], "HF_HUB_OFFLINE"),
    (["annotate", "dpo", "sampling.reward=nobody/nothing"], "sampling.reward.model: nobody/nothing"),
    (
        ["rollout", "online_lipo", "rollout.reward={name: judge, model: nobody/nothing}"],
        "rollout.reward.model: n",
    ),
    (["chat", "nobody/nothing"], "align: nobody/nothing is neither"),
    (["evaluate", "rows", "rows.jsonl", "--model", "nobody/nothing"], "unset HF_HUB_OFFLINE"),
    (["score", "r.jsonl", "o.jsonl", "--reward", "nobody/nothing"], "scorer.model: nobody/nothing is neither a folder"),
    (
        ["score", "r.jsonl", "o.jsonl", "--reward", "{name: length, max: 9}", "--reward", "{name: judge, model: a/b}"],
        "scorer.model: a/b is neither",
    ),
    (
        ["evaluate", "rewards", "rows.jsonl", "--reward", "{scorer: {name: judge, model: nobody/nothing}, weight: 2}"],
        "unset HF_HUB_OFFLINE",
    ),
    (["export", "FOLDER", "FOLDER"], "exists and is not empty"),
    (["export", "nowhere", "out"], "nowhere does not exist"),
)


@pytest.mark.parametrize(("words", "said"), REFUSED_EARLY, ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_what_cannot_work_is_refused_before_torch_is_loaded(words, said, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("align.cli._function", lambda command: pytest.fail("it was loaded"))
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path) if word == "FOLDER" else word for word in words])
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and said in line


@pytest.mark.parametrize("model", ["FOLDER", "nobody/cached", "nobody/nothing"])
def test_a_model_that_is_here_or_may_be_fetched_is_not_refused(model, tmp_path, monkeypatch):
    (tmp_path / "models--nobody--cached").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", model != "nobody/nothing")
    called = []
    monkeypatch.setattr("align.cli._function", lambda command: lambda **given: called.append(given["model"]))
    main(["chat", model.replace("FOLDER", str(tmp_path))])
    assert len(called) == 1
