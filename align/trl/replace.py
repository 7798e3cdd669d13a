"""Our trainers under TRL's names, for scripts whose imports cannot be changed."""

import importlib
import sys
import warnings
from importlib.util import find_spec

ROOMS = {
    "DPO": "trl.trainer",
    "KTO": "trl.trainer",
    "Reward": "trl.trainer",
    "CPO": "trl.experimental.cpo",
    "ORPO": "trl.experimental.orpo",
}
"""Where TRL 1.16 has each trainer; its experimental part may lack some in another release."""


def patch() -> list[str]:
    """Put the trainers and configurations into an installed `trl`; call it before `from trl import ...`.

    Names in modules are replaced, no source is rewritten. A configuration of TRL's, made before, is taken as well.

    Returns:
        Every name that was replaced, with its module.

    Raises:
        ModuleNotFoundError: there is no trl.
    """
    importlib.import_module("trl")
    return [name for trainer, room in ROOMS.items() for name in _replaced(trainer, room)]


def _replaced(trainer: str, room: str) -> list[str]:
    if ".experimental" in room and (find_spec("trl.experimental") is None or find_spec(room) is None):
        return []
    ours = importlib.import_module("align.trl")
    replaced = []
    for kind in ("Config", "Trainer"):
        own = f"{room}.{trainer.lower()}_{kind.lower()}"
        with warnings.catch_warnings():  # of what may change in any release: ours stays
            warnings.simplefilter("ignore")
            importlib.import_module(own)
        for module in [room, own, *(["trl"] if room == "trl.trainer" else [])]:
            setattr(sys.modules[module], trainer + kind, getattr(ours, trainer + kind))
            replaced.append(f"{module}.{trainer}{kind}")
    return replaced
