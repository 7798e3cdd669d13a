"""What the checks of the rows said of a preparation, kept beside it: no row is looked at twice."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from align.files import write_json
from align.lint import Finding
from align.locks import in_turn
from align.manifest import json_digest

FILE = "checks.json"
Findings = dict[str, Finding | None]
"""By check, None where it found nothing of the kind."""

log = logging.getLogger("align")


def kept_findings(folder: Path, names: Sequence[str], look: Callable[[Sequence[str]], Findings]) -> list[Finding]:
    """What these checks say, in their order.

    Args:
        folder: of a preparation.
        look: makes the checks that are asked of it, those that are not there.
    """
    with in_turn(folder / f"{FILE}.lock", work="looks at the same rows"):
        found = _read(folder / FILE)
        missing = [name for name in names if name not in found]
        if missing:
            found |= look(missing)
            values: dict[str, Any] = {name: own and asdict(own) for name, own in found.items()}
            write_json(folder / FILE, {"findings": values, "digest": json_digest(values)})
    return [own for name in names if (own := found[name]) is not None]


def _read(file: Path) -> Findings:
    if not file.exists():
        return {}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        values = kept["findings"]
        if kept["digest"] != json_digest(values):
            raise ValueError("its digest is another one")
        return {name: own and Finding(**own | {"places": tuple(own["places"])}) for name, own in values.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is damaged (%s); the rows are looked at again", file, error)
        return {}
