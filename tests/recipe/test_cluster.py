"""The files for clusters are what their launchers read, and give accelerate options that it has."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

CLUSTER = Path(__file__).parents[2] / "recipes/cluster"
FILES = {
    "slurm.sbatch": lambda text: text,
    "skypilot.yaml": lambda text: yaml.safe_load(text)["run"],
    "kuberay.yaml": lambda text: yaml.safe_load(text)["spec"]["entrypoint"],
}
"""File -> the shell that it runs."""


@pytest.mark.parametrize("name", FILES)
def test_it_is_bash_that_starts_accelerate_with_options_that_it_has(name):
    shell = FILES[name]((CLUSTER / name).read_text())
    assert subprocess.run(["bash", "-n"], input=shell, text=True, capture_output=True).stderr == ""
    (given,) = re.findall(r"accelerate launch (.*?-m align\.cli) train ", shell.replace("\\\n", " "), flags=re.S)
    numbers = re.sub(r'"\$(?:\(\(.*?\)\)|[A-Z_]+)"', "2", given.replace('"$CONFIG"', "recipes/accelerate/ddp.yaml"))
    numbers = re.sub(r'"\$\(.*?\)"', "first", numbers)
    options = launch_command_parser().parse_args(shlex.split(numbers))
    assert options.num_processes in (2, 8) and (CLUSTER.parents[1] / options.config_file).is_file()


def test_files_of_all_launchers_are_tried():
    assert sorted(FILES) == sorted(path.name for path in CLUSTER.iterdir())


def test_the_job_of_slurm_wants_a_recipe():
    done = subprocess.run(["bash", str(CLUSTER / "slurm.sbatch")], text=True, capture_output=True)
    assert done.returncode == 2 and "usage: sbatch slurm.sbatch RECIPE" in done.stderr
