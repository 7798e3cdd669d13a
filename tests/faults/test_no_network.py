"""A training run, without HF_HUB_OFFLINE, in a process that tells of every connection that is asked for."""

import os
import subprocess
import sys

from align.recipe import dump_recipe

PROGRAM = """
import socket, sys
asked = []
def refuse(*arguments, **keywords):
    asked.append(arguments)
    raise OSError("no network here")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = socket.socket.sendto = refuse
from align.cli import main
main(["train", sys.argv[1]])
print("asked", asked)
"""


def test_a_training_run_opens_no_connection(make_recipe, tmp_path):
    recipe = make_recipe(train={"epochs": 1, "steps": 1})
    path = tmp_path / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    command = [sys.executable, "-c", PROGRAM, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "asked []"
    assert (tmp_path / "run" / "summary.json").exists()
