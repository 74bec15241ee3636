"""What the tests of the vLLM plugin share. Those that need vLLM itself are marked slow and run in .venv-vllm."""

import importlib.util

import pytest

HAVE_VLLM = importlib.util.find_spec("vllm") is not None
WHY_NOT = "vLLM is not importable here: run `make setup-vllm`, then `.venv-vllm/bin/python -m pytest tests/vllm`"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow") and not HAVE_VLLM and "tests/vllm" in str(item.path):
            item.add_marker(pytest.mark.skip(reason=WHY_NOT))


def pytest_terminal_summary(terminalreporter):
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if WHY_NOT in str(r.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} TESTS OF THE vLLM PLUGIN DID NOT RUN. {WHY_NOT}", red=True, bold=True)


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
