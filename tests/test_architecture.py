"""Who may import whom: a newcomer can read one folder without opening the others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = {"torch", "jaxtyping", "pydantic", "numpy"}
MAY_IMPORT = {
    "align/objectives": LIBRARIES | {"align.types", "align.section", "align.lazy", "align.errors", "align.objectives"},
    "align/kernels": LIBRARIES | {"align.kernels", "cuda"},
    "align/data": LIBRARIES
    | {"align.types", "align.section", "align.lazy", "align.shipped", "align.errors", "align.data", "rewards.grading"}
    | {"rewards.templates"}
    | {"datasets", "transformers", "tokenizers"}
    | {"align.progress", "pyarrow", "rich", "jinja2", "accelerate"},
    "rewards": LIBRARIES
    | {
        "rewards",
        "httpx",
        "align.kernels",
        "align.packing",
        "transformers",
        "safetensors",
        "peft",
        "huggingface_hub",
        "yaml",
    },
}
"""Folder -> packages and modules that its files may import besides the standard library."""
EVERYWHERE_REFUSED = {"trl", "pickle", "vllm"}
"""TRL is a test's peer only; weights are safetensors; vLLM belongs to the rollout worker alone."""
VLLM_MODULES = {"align/rollout/vllm_engine.py", "align/rollout/vllm_arguments.py"}
"""What the rollout worker runs; it imports vLLM inside functions only."""
INSIDE_VLLM = {"align/rollout/inside_vllm/runner_v1.py", "align/rollout/inside_vllm/runner_v2.py"}
"""What vLLM itself imports."""


def imports(file: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module}
    return names


def is_standard(name: str) -> bool:
    import sys

    return name.split(".")[0] in sys.stdlib_module_names


def below(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_it_may(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        wrong = {n for n in imports(file) if not is_standard(n) and not below(n, MAY_IMPORT[folder])}
        wrong = {n for n in wrong if not (file.stem.startswith(("bench", "peers")))}
        assert not wrong, f"{file.relative_to(ROOT)} imports {wrong}"


def test_nothing_imports_what_the_package_refuses():
    for folder in ("align", "rewards"):
        for file in (ROOT / folder).rglob("*.py"):
            if "bench" in file.parts or file.stem == "bench":
                continue
            refused = EVERYWHERE_REFUSED - (
                {"vllm"} if str(file.relative_to(ROOT)) in VLLM_MODULES | INSIDE_VLLM else set()
            )
            assert not [n for n in imports(file) if below(n, refused)], file


def test_the_trainer_knows_nothing_of_rollouts():
    assert not [name for name in imports(ROOT / "align/trainer.py") if below(name, {"align.rollout"})]


def test_vllm_is_imported_inside_functions_only():
    for name in VLLM_MODULES:
        for node in ast.parse((ROOT / name).read_text()).body:
            modules = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            assert not [module for module in modules if below(module, {"vllm"})], name


def test_no_module_is_a_drawer():
    names = {file.stem for folder in ("align", "rewards") for file in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "misc", "common"}
