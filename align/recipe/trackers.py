"""The experiment trackers that a recipe may name."""

import difflib
import importlib.util
from collections.abc import Sequence

PACKAGES: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml.core",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub", "mlflow"),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": (),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""transformers' names of trackers -> the modules that each needs."""
PIP_NAMES = {"azureml.core": "azureml-sdk", "comet_ml": "comet-ml"}
"""Modules whose package is called otherwise."""


def checked_trackers(names: Sequence[str]) -> tuple[str, ...]:
    """The trackers of a recipe, each of them known and installed.

    Args:
        names: transformers' names, or `all` for what is installed, or `none`.

    Raises:
        ValueError: names what is unknown, or the package that is missing.
    """
    if set(names) & {"all", "none"} and len(names) > 1:
        raise ValueError("`all` and `none` stand alone; give the names of trackers, or one of the two")
    for name in names:
        if name in ("all", "none"):
            continue
        if name not in PACKAGES:
            near = difflib.get_close_matches(name, PACKAGES, n=1)
            remedy = f"did you mean `{near[0]}`?" if near else f"take {', '.join(PACKAGES)}, `all` or `none`"
            raise ValueError(f"transformers has no tracker `{name}`; {remedy}")
        if missing := [PIP_NAMES.get(module, module) for module in PACKAGES[name] if not _is_there(module)]:
            pip = " ".join(missing)
            raise ValueError(f"{name} needs {' and '.join(missing)}, which is not installed; run `pip install {pip}`")
    return () if tuple(names) == ("none",) else tuple(names)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
