"""What the tests of the vLLM plugin share. Those that need vLLM itself are marked slow and run in .venv-vllm."""

import hashlib
import importlib.util
import json
import shutil

import pytest

_SPEC = importlib.util.find_spec("vllm")
HAVE_VLLM = _SPEC is not None and _SPEC.origin is not None  # this folder itself is found as a package without origin
WHY_NOT = "vLLM is not importable here: run `make setup-vllm`, then `.venv-vllm/bin/python -m pytest tests/vllm`"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow") and not HAVE_VLLM and "tests/vllm" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if WHY_NOT in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(
            f"{len(skipped)} TESTS OF THE vLLM PLUGIN DID NOT RUN. {WHY_NOT}", red=True, bold=True
        )


SUBJECTS = ("France", "Russia", "Mexico")


@pytest.fixture(scope="session")
def mined(tmp_path_factory):
    """A directory with capsules of SUBJECTS, mined on the embedded model."""
    from kif_runtime import load_model, mine

    folder = tmp_path_factory.mktemp("capsules")
    model, tokenizer = load_model("embedded", device="cpu")
    for name in SUBJECTS:
        capsule = mine(model, tokenizer, name)
        capsule.save(folder / f"{capsule.id}.kif.safetensors")
    return folder


@pytest.fixture(scope="session")
def everywhere():
    """A capsule of Great Britain under names that between them need signatures at every usual site."""
    from kif_runtime import load_model, mine

    return mine(
        *load_model("embedded", device="cpu"), "Great Britain", aliases=["England", "United Kingdom of Great Britain"]
    )


@pytest.fixture(scope="session")
def embedded_checkpoint():
    """The folder of the embedded model, as vLLM serves it."""
    from kif_runtime.models import embedded_folder

    return embedded_folder()


@pytest.fixture(scope="module")
def engine(embedded_checkpoint):
    """engine(kif=..., **flags) -> a running Engine on the embedded model; all are closed at the end of the module."""
    from engines import Engine

    made = []

    def start(kif=None, model=embedded_checkpoint, **flags):
        made.append(Engine(model, kif, **flags))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def folder(mined, tmp_path_factory):
    """The directory of `server`: France is mandatory, Russia may be named by all, Mexico by the owner of one key."""
    folder = tmp_path_factory.mktemp("served")
    for path in mined.iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="session")
def server(folder, tmp_path_factory):
    """One running `kif serve` for all tests of HTTP; the last of them ends it."""
    from servers import OWNER, Server

    place = tmp_path_factory.mktemp("server")
    owner = hashlib.sha256(OWNER.encode()).hexdigest()
    (place / "allow.json").write_text(json.dumps({"*": ["russia", "france"], owner: ["mexico", "great-britain"]}))
    kif = {
        "mandatory": ["france"], "allow": str(place / "allow.json"), "audit": str(place / "audit.jsonl"), "watch": 0.2,
        "capsule_metrics": True,
    }  # fmt: skip
    running = Server(folder, place / "log.txt", kif)
    running.audit = place / "audit.jsonl"
    try:
        yield running.wait()
    finally:
        running.close()
