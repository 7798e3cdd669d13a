"""`align COMMAND ...`: parse, dispatch, and turn a user's mistake into one sentence and exit code 2."""

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from align.command import ALLOW_CODE, TRUST_REMOTE_CODE, Command, Parser, add_commands, not_negative, option, positive
from align.errors import UserError
from align.evaluate.options import COMMANDS as EVALUATE
from align.export.options import COMMANDS as EXPORT
from align.importing.options import COMMANDS as IMPORTING
from align.judging.options import COMMANDS as JUDGING
from align.lacks import in_words
from align.recipe.options import COMMANDS as RECIPE
from align.report.options import COMMANDS as REPORT
from align.rollout.options import COMMANDS as ROLLOUT
from align.scoring.options import COMMANDS as SCORING
from align.stopping import Stopped, came, stoppable
from align.studies.options import COMMANDS as STUDIES
from align.training.options import COMMANDS as TRAINING

DOCTOR = Command(
    "doctor",
    "what this machine can do, and what to install for the rest",
    "align.doctor:doctor",
    (
        option("--install", dest="extra", choices=("rollout", "rollout-cpu"), help="install this extra"),
        option(
            "--plan",
            nargs="+",
            metavar=("RECIPE.yaml", "key=value"),
            help="memory by part, hours and disk of a recipe's run, and what to change where it does not fit",
        ),
        option("--devices", type=positive, metavar="N", help="plan for so many (default: those of this machine)"),
        option("--memory", metavar="80GB", help="of a GPU; by default that of this machine's device"),
        option("--rate", type=not_negative, metavar="TFLOP/s", help="what a device computes in a second; gives hours"),
        option("--measure", action="store_true", help="find the rate by a pass of the model on this machine"),
        option("--json", dest="as_json", action="store_true", help="print the plan as JSON"),
        TRUST_REMOTE_CODE,
        ALLOW_CODE,
    ),
)
COMMANDS = (*RECIPE, *IMPORTING, *TRAINING, *ROLLOUT, *EXPORT, *SCORING, *EVALUATE, *JUDGING, *STUDIES, *REPORT, DOCTOR)
"""In the order in which `align --help` tells them."""


GOES_ON = "the same command goes on from here"
AGAIN = "nothing half done is kept; give the same command again"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `align` command; exits with 0, 2 for a user's mistake, 1 for any other failure.

    By a signal it exits with 128 + its number, and with 75 where `train.time_limit` is over: the same command goes on.
    """
    with stoppable(began=time.monotonic()):
        _main(sys.argv[1:] if arguments is None else arguments)


def _main(words: Sequence[str]) -> None:
    parsed, rest = _parser().parse_known_args(words)
    given = vars(parsed)
    command, parser = given.pop("command"), given.pop("parser")
    try:
        if "overrides" in given:  # argparse takes positional arguments in one run only; an option may stand between
            consent = {name: given.pop(name, None) for name in ("trust_remote_code", "allow_code")}
            given["recipe"] = _recipe(parser, given["recipe"], [*given.pop("overrides"), *rest], words, consent)
        if command.before:
            command.before(given)
        _function(command)(**given)
        _leave()
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt as error:
        _stop(error if isinstance(error, Stopped) else Stopped(signal.SIGINT), command)
    except Exception as error:
        if came():  # of a library that a signal has reached in the middle of something, or another process
            _stop(Stopped(came()), command)
        sentence = _of_user(error)
        if sentence is None:
            raise
        print(f"align: {sentence}", file=sys.stderr)
        sys.exit(2)


def _stop(stopped: Stopped, command: Command) -> NoReturn:
    """Say what has ended the command and how it goes on, once where all processes have ended together."""
    if not (stopped.together and os.environ.get("RANK", "0") != "0"):
        print(f"align: {stopped}; {GOES_ON if command.goes_on else AGAIN}", file=sys.stderr, flush=True)
    if stopped.together:
        _leave(stopped.code)
    sys.exit(stopped.code)


def _leave(code: int = 0) -> None:
    """End this process with the others, where it is one of several."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        from align.training.processes import leave

        leave(code)


def _parser() -> Parser:
    parser = Parser(prog="align", description="Preference alignment of language models.")
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show program's version number and exit"
    )
    add_commands(parser, COMMANDS)
    return parser


def _of_user(error: Exception) -> str | None:
    """What to say of a user's mistake; None of any other failure."""
    rewards: Any = sys.modules.get("rewards.types")  # there as soon as anything scores
    if isinstance(error, UserError) or (rewards and isinstance(error, rewards.ScorerError)):
        return str(error)
    if sentence := in_words(error):
        return sentence
    if isinstance(error, RuntimeError | MemoryError):
        from align.runs.memory import in_one_sentence  # with torch, which such an error has loaded
        from align.training.processes import lost_process

        return in_one_sentence(error) or lost_process(error)
    return None


def _recipe(
    parser: Parser, recipe: str, overrides: Sequence[str], words: Sequence[str], consent: dict[str, Any]
) -> Any:
    """The recipe with its overrides; a mistake in it is answered before torch is imported, which takes seconds."""
    from align.recipe import load_recipe, recipe_keys

    if given := next((word for word in overrides if word.startswith("-")), None):
        sentence, known = _as_override(given, words, recipe_keys())
        near = parser.nearest(given)
        if near and (not known or near.strip("-") == given.partition("=")[0].strip("-").replace("_", "-")):
            parser.error(f"unrecognized arguments: {given}")
        raise UserError(sentence)
    return load_recipe(recipe, overrides, **consent)


def _as_override(option: str, words: Sequence[str], keys: frozenset[str]) -> tuple[str, bool]:
    """What to say of an option that another tool would take, `--learning_rate 5e-6`, and whether it is known."""
    from align.recipe.other_tools import override

    flag, equals, value = option.partition("=")
    after = [*words, ""][words.index(option) + 1]
    given = value if equals else after if after and not after.startswith("--") and "=" not in after else None
    said = flag if given is None else f"{flag}{equals or ' '}{given}"
    meant = override(flag, given, keys)
    example = meant or "such as `train.learning_rate=1e-4`"
    return f"`{said}`: a recipe's keys are laid over as key=value, without dashes: {example}", meant is not None


def _function(command: Command) -> Callable[..., Any]:
    """What a command runs; that torch is loaded for it, which takes seconds, is said before it begins."""
    module, _, name = command.runs.partition(":")
    if command.light:
        return getattr(importlib.import_module(module), name)
    from align.progress import stage

    with stage(f"align {_version()}: loading torch and transformers"):
        import datasets
        import transformers

        function = getattr(importlib.import_module(module), name)
    # No bars of other libraries between ours: loading weights is short, and tokenising shows on a terminal only.
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return function


def _version() -> str:
    from importlib.metadata import version  # takes as long as the rest of `--help`

    return version("align-lm")


class _Version(argparse.Action):
    """Says the version, which is looked up when it is asked for."""

    def __call__(self, *_: Any) -> None:
        print(f"align {_version()}")
        sys.exit(0)


if __name__ == "__main__":
    main()
