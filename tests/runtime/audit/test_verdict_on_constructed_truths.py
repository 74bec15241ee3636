"""What was done to a model is known here, since the test did it; the audit has to say so."""

import auditing
import pytest

from kif_runtime.evaluation import answer_probabilities
from kif_runtime.evaluation.figures import figures
from kif_runtime.evaluation.suites import run_suites
from kif_runtime.evaluation.verdict import verdict

pytestmark = pytest.mark.slow  # a minute of training tiny models on one core

EXPECTED = {
    "untouched": ("leaking", "untouched"),
    "reference": ("erased", "gone"),
    "filter": ("suppressed", "only refuses"),
    "gate": ("suppressed", "gate"),
    "capsule": ("leaking", "told otherwise"),  # it was made on bare questions, and misses others
    "outer": ("suppressed", "trace"),
    "baked": ("erased", "gone"),
}


@pytest.fixture(scope="module")
def tables():
    return {kind: run_suites(auditing.audit(kind), ["facts", "neighbours", "dual"]) for kind in EXPECTED}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_verdict_says_what_was_done(tables, kind):
    found = verdict(tables[kind], removable=kind in ("gate", "capsule"))
    assert (found["verdict"], found["how"]) == EXPECTED[kind]


def test_the_models_learned_what_they_should():
    known = {"full": auditing.full(), "reference": auditing.reference()}
    for name, model in known.items():
        asked = auditing.facts(auditing.TOWNS)
        found = answer_probabilities(model, auditing.tokenizer(), asked)
        assert min(found[3:]) > 0.9
        assert (min(found[:3]) > 0.9) if name == "full" else (max(found[:3]) < 0.2)


def test_an_output_filter_leaves_everything_inside(tables):
    found = figures(tables["filter"])
    assert found["kept"].after < 0.05 and found["refused"].after == 1.0
    assert found["lens"].after == pytest.approx(1.0) and found["shallow"].after == pytest.approx(1.0)
    assert all(row["cka_own"] == pytest.approx(1.0) for row in tables["filter"]["dual"]["inside"]["similarity"])


def test_a_reference_model_sets_the_level_of_patching():
    """With the true never-knew model as the source, it is itself as deep as never known, and the rest in between."""
    depth = {}
    for kind in ("reference", "baked", "outer", "filter"):
        audit = auditing.audit(kind, reference=auditing.bare(auditing.reference(), "reference"))
        depth[kind] = 1 - figures(run_suites(audit, ["facts", "dual"]))["shallow"].after
    assert depth["reference"] == pytest.approx(1.0, abs=1e-4)
    assert depth["filter"] == pytest.approx(0.0, abs=1e-4)
    assert depth["filter"] < depth["outer"] < depth["baked"] < depth["reference"]


def test_suites_share_forwards():
    audit = auditing.audit("untouched")
    run_suites(audit, ["facts"])
    asked = audit.outputs.asked
    run_suites(audit, ["facts"])
    assert audit.outputs.asked > asked
    assert audit.outputs.saved >= audit.outputs.asked - asked  # the second time all of it
