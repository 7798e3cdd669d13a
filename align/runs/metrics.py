"""The lines of metrics.jsonl."""

import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger("align")


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Lines of JSON; one that is none, which a kill or a power cut has left, is passed over, and said."""
    found = []
    for number, line in enumerate(file.read_bytes().splitlines() if file.exists() else (), start=1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            log.warning("%s, line %d: damaged, passed over", file, number)
    return found


def any_heldout(lines: list[dict[str, Any]]) -> bool:
    """Whether the policy was measured on held-out lists in the middle of training."""
    return any("eval_loss" in line for line in lines)
