"""align.Trainer in a notebook: progress changes in place, tables and results are shown as HTML, nothing fails."""

import os
from pathlib import Path

import pytest
import yaml

from align.recipe.recipe import dump_set

ROOT = Path(__file__).parents[2]
CELLS = (
    """import json, align
result = align.Trainer({recipe!r}, train_dataset=[json.loads(line) for line in open({rows!r})]).train()""",
    "result",
    "result.steps",
    "result.heldout.to_pandas()",
)


@pytest.mark.slow
def test_a_notebook_shows_progress_tables_and_results(make_recipe, rows_file, tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    execute = pytest.importorskip("nbconvert.preprocessors", reason="nbconvert is not installed").ExecutePreprocessor
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    recipe = yaml.safe_load(dump_set(make_recipe(train={"steps": 2})))
    filled = (cell.format(recipe=recipe, rows=str(rows_file)) if "{rows!r}" in cell else cell for cell in CELLS)
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in filled])
    execute(timeout=600, kernel_name="python3").preprocess(notebook, {"metadata": {"path": str(tmp_path)}})
    trained, *shown = ([output.get("data", {}) for output in cell.outputs] for cell in notebook.cells)
    lines = [data.get("text/plain", "") for data in trained]
    assert any(line.startswith("training") and "2/2 steps" in line for line in lines)
    assert sum("training" in line and "steps" in line for line in lines) == 1, "one line that changes"
    assert any("NDCG" in data.get("text/html", "") for data in trained)
    assert all("<table" in outputs[-1]["text/html"] for outputs in shown)
