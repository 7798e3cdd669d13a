"""`align export`."""

from pathlib import Path
from typing import Any

from align.command import TRUST_REMOTE_CODE, Command, option
from align.errors import UserError

DTYPES = ("float32", "bfloat16", "float16")


def check_places(given: dict[str, Any]) -> None:
    """Refuse what cannot be exported from or to, before torch is loaded.

    Raises:
        UserError: there is no such folder, or the output is taken.
    """
    path, output = Path(given["run_or_adapter"]), Path(given["output"])
    if not path.is_dir():
        what = "is no folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}; give a run directory or an adapter's folder")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(
            f"{output} exists and is not empty (an export is there whole or not at all); give another output folder or "
            "remove it"
        )


COMMANDS = (
    Command(
        "export",
        "an adapter or, with --merge, a full checkpoint of a run",
        "align.export.export:export",
        (
            option("run_or_adapter", metavar="RUN", help="a run directory, or an adapter's folder"),
            option("output", metavar="OUTPUT", help="a new or empty folder"),
            option("--merge", action="store_true", help="base and adapter in one checkpoint"),
            option("--dtype", choices=DTYPES, help="what weights are stored in (default: as trained)"),
            TRUST_REMOTE_CODE,
            option("--push", metavar="HUB_NAME", help="upload the result to the hub as well"),
        ),
        before=check_places,
    ),
)
