"""What a run's figures depend on besides its recipe."""

import platform
import sys
import time
from importlib.metadata import version
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Versions, machine and command, for `environment.json`."""
    packages = ("align-lm", "torch", "transformers", "peft", "datasets", "accelerate")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "packages": {name: version(name) for name in packages},
        "command": sys.argv,
    }
