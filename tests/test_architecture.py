"""Who may import whom: a newcomer can read one folder without opening the others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = {"torch", "jaxtyping", "pydantic", "numpy"}
MAY_IMPORT = {
    "align/objectives": LIBRARIES
    | {"align.section", "align.lazy", "align.tensors", "align.registry", "align.own_code", "align.errors"}
    | {"align.objectives"},
    "align/lint": {"numpy", "torch", "align.lint", "align.registry", "align.lazy"},
    "align/kernels": LIBRARIES | {"align.kernels", "cuda"},
    "align/data": LIBRARIES
    | {"align.types", "align.section", "align.lazy", "align.shipped", "align.errors", "align.data", "rewards.grading"}
    | {"align.command", "align.registry", "align.lint"}
    | {"rewards.templates", "rewards.spelling", "rewards.dropped", "rewards.rendering", "align.packing.batch"}
    | {"align.packing.trie"}
    | {"datasets", "transformers", "tokenizers"}
    | {
        "align.progress",
        "align.tables",
        "align.bounds",
        "align.files",
        "align.locks",
        "align.manifest",
        "align.disk",
        "pyarrow",
        "rich",
        "jinja2",
        "accelerate",
    },
    "rewards": LIBRARIES
    | {
        "regex",
        "rewards",
        "httpcore",
        "httpx",
        "align.kernels",
        "align.packing",
        "align.section",
        "align.shipped",
        "align.registry",
        "align.consent",
        "align.bounds",
        "align.files",
        "transformers",
        "safetensors",
        "jinja2",
        "peft",
        "huggingface_hub",
        "yaml",
    },
}
"""Folder -> packages and modules that its files may import besides the standard library."""
FLOORS = (
    (
        "errors",
        "types",
        "section",
        "registry",
        "lazy",
        "tensors",
        "own_code",
        "files",
        "locks",
        "manifest",
        "stopping",
        "lacks",
        "progress",
        "tables",
        "consent",
        "bounds",
        "disk",
        "shipped",
        "command",
    ),
    ("kernels", "objectives", "lint"),
    ("fused", "packing"),
    ("rewards",),
    ("sections",),
    ("data",),
    ("model",),
    ("recipe",),
    ("losses",),
    ("runs",),
    ("cluster",),
    ("report",),
    ("evaluate", "scoring", "export", "importing"),
    ("rollout",),
    ("planning", "judging"),
    ("training", "trl"),
    ("doctor", "bench", "studies"),
    ("cli",),
)
"""Rooms from the ground up; none imports from a higher one, nor from another on its own floor but the ground's."""
SECTIONS = {
    "align.data.config",
    "align.data.bad_row",
    "align.data.paths",
    "align.data.strict_json",
    "align.data.where",
    "align.model.config",
    "align.model.adapter",
    "align.model.adapters",
    "align.model.middle_adapters",
    "align.model.peft_adapter",
    "align.model.peft_kinds",
    "align.rollout.config",
}
"""What a recipe may say of a room, and what reads it, stands in the room, and knows nothing of it."""
EVERYWHERE_REFUSED = {"trl", "pickle", "vllm"}
"""TRL is a test's peer, and `align import --check`'s; weights are safetensors; vLLM is the rollout worker's."""
PICKLED = "align/training/part_reader.py"
"""Reads a description by torch that is one, and lets it name plain classes alone."""
VLLM_MODULES = {
    "align/export/vllm_worker.py",
    "align/rollout/vllm_engine.py",
    "align/rollout/vllm_arguments.py",
}
"""What vLLM's own processes run; they import vLLM inside functions only."""
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


def modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    files = [file for folder in ("align", "rewards") for file in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported_modules(known: dict[str, Path]) -> dict[str, set[str]]:
    """The modules of ours that each imports, under TYPE_CHECKING and inside functions too."""
    edges = {}
    for name, file in known.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                places = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {place if place in known else node.module for place in places}
        edges[name] = found & known.keys() - {name}
    return edges


def room(module: str) -> str:
    parts = module.split(".")
    if module in SECTIONS:
        return "sections"
    return parts[0] if parts[0] == "rewards" or len(parts) == 1 else parts[1]


def is_standard(name: str) -> bool:
    import sys

    return name.split(".")[0] in sys.stdlib_module_names


def below(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def test_no_circle_of_imports():
    edges = imported_modules(modules())
    while leaves := [name for name, found in edges.items() if not found & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"these import each other, or one that does: {sorted(edges)}"


def test_no_room_imports_from_a_higher_one():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    wrong = []
    for module, found in imported_modules(modules()).items():
        for other in found - {"align"}:
            own, theirs = room(module), room(other)
            if own != theirs and own != "align" and floor[theirs] >= max(floor[own], 1):
                wrong.append(f"{module} imports {other}")
    assert not wrong


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
            place = str(file.relative_to(ROOT))
            refused = EVERYWHERE_REFUSED - ({"vllm"} if place in VLLM_MODULES | INSIDE_VLLM else set())
            refused -= {"pickle"} if place == PICKLED else set()
            refused -= {"trl"} if place == "align/importing/check.py" else set()
            assert not [n for n in imports(file) if below(n, refused)], file


def test_the_trainer_knows_nothing_of_rollouts():
    assert not [name for name in imports(ROOT / "align/training/trainer.py") if below(name, {"align.rollout"})]


def test_vllm_is_imported_inside_functions_only():
    for name in VLLM_MODULES:
        for node in ast.parse((ROOT / name).read_text()).body:
            modules = [alias.name for alias in getattr(node, "names", [])] + [getattr(node, "module", None) or ""]
            assert not [module for module in modules if below(module, {"vllm"})], name


def test_no_module_is_a_drawer():
    names = {file.stem for folder in ("align", "rewards") for file in (ROOT / folder).rglob("*.py")}
    assert not names & {"utils", "util", "helpers", "misc", "common"}
