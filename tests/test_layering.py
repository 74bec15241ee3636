"""Arrows between the rooms point down: kif_cli → {kif_vllm, kif_hf} → kif_runtime → kif_kernels."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "kif_kernels": ROOT / "kernels" / "kif_kernels",
    "kif_runtime": ROOT / "kif_runtime",
    "kif_hf": ROOT / "integrations" / "kif_hf",
    "kif_vllm": ROOT / "integrations" / "kif_vllm",
    "kif_cli": ROOT / "integrations" / "kif_cli",
}
MAY_IMPORT = {
    "kif_kernels": set(),
    "kif_runtime": {"kif_kernels"},
    "kif_hf": {"kif_runtime", "kif_kernels"},
    "kif_vllm": {"kif_runtime", "kif_kernels"},
    "kif_cli": {"kif_vllm", "kif_hf", "kif_runtime", "kif_kernels"},
}
# What a room may not know, though it is installed: kernels know tensors only, the runtime knows models and not servers.
FOREIGN = {
    "kif_kernels": {"transformers", "safetensors", "peft", "vllm", "typer", "rich"},
    "kif_runtime": {"vllm", "typer", "rich"},
    "kif_hf": {"vllm", "typer", "rich"},
    "kif_vllm": {"typer", "rich"},
    "kif_cli": {"vllm"},
}


def sources() -> list[tuple[str, Path]]:
    return [(room, path) for room, folder in ROOMS.items() for path in sorted(folder.rglob("*.py"))]


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all absolute imports, wherever they stand, import_module("…") included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found |= {a.value.split(".")[0] for a in node.args[:1] if isinstance(a, ast.Constant)}
    return found


def climbs_out(tree: ast.AST, depth: int) -> bool:
    """Whether a relative import leaves its room."""
    return any(isinstance(node, ast.ImportFrom) and node.level > depth for node in ast.walk(tree))


@pytest.mark.parametrize(("room", "path"), [pytest.param(*s, id=str(s[1].relative_to(ROOT))) for s in sources()])
def test_imports_point_down(room, path):
    tree = ast.parse(path.read_text(), str(path))
    names = imported(tree)
    upwards = {n for n in names if n in ROOMS} - MAY_IMPORT[room] - {room}
    assert not upwards
    assert not names & FOREIGN[room]
    assert not climbs_out(tree, len(path.relative_to(ROOMS[room]).parts))


def test_the_check_sees_every_form_of_import():
    code = (
        "import a.b\nfrom c.d import e\ndef f():\n    import g as h\nimport_module('i.j')\nimportlib.import_module('k')"
    )
    assert imported(ast.parse(code)) == {"a", "c", "g", "i", "k"}
    assert climbs_out(ast.parse("from ..x import y"), 1)
    assert not climbs_out(ast.parse("from .x import y"), 1)


def test_no_room_is_forgotten():
    packages = {p.parent for p in ROOT.glob("*/kif_*/__init__.py")} | {p.parent for p in ROOT.glob("kif_*/__init__.py")}
    assert packages <= set(ROOMS.values())
    assert len(sources()) > 10
