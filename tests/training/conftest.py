"""Fixtures of training in several processes."""

import pytest
from equal_runs import SAMPLING, SETTINGS, TRAIN, written_rows

from align.recipe import dump_recipe


@pytest.fixture
def make_setting(make_recipe, tmp_path):
    """A recipe by a name of SETTINGS or by its sections, and where it is written down."""

    def make(output: str, name: str | dict, **sections):
        own = {"train": TRAIN, "sampling": SAMPLING} | (SETTINGS[name] if isinstance(name, str) else name) | sections
        if rows := own.pop("rows", None):
            own["data"] = {"sources": [written_rows(tmp_path, kind) for kind in rows.split()]}
        recipe = make_recipe(output, **own)
        path = tmp_path / f"{output}.yaml"
        path.write_text(dump_recipe(recipe))
        return recipe, str(path)

    return make
