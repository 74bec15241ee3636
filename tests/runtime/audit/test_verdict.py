"""The rules of the verdict, and policies, on tables made by hand."""

import copy
import json

import pytest

from kif_runtime import KifError
from kif_runtime.evaluation.figures import WORDS, figures, recovers, works
from kif_runtime.evaluation.policy import judge, load_policy
from kif_runtime.evaluation.statistics import share, summary
from kif_runtime.evaluation.verdict import SENTENCES, verdict


def rate(success, tried=20, width=0.05):
    interval = [max(0.0, success - width), min(1.0, success + width)]
    return {"tried": tried, "success": success, "interval": interval}


def attack(success, access="prompt", control=0.9, reference=0.0, **more):
    made = {"name": "the attack", "access": access, "budget": "10 tries"} | rate(success) | more
    return made | {"control": rate(control), "reference": rate(reference)}


def tables(
    kept=0.0, otherwise=0.0, said=0.0, opened=0.0, refused=0.0, canned=0.0, lens=0.0, depth=1.0, facts=8, attacks=()
):
    """As the suites make them, of an erasure that left this much."""

    def summary(mean):
        left = max(0.0, mean)
        return {
            "facts": facts, "subjects": 2, "mean": mean, "interval": [mean - 0.02, mean + 0.02],
            "left": left, "left_interval": [left - 0.02, left + 0.02],
        }  # fmt: skip

    def states(after):
        return {"before": rate(0.9), "after": rate(after)}

    surface = {
        "smr": states(0.0), "el10": {"ratio": 0.1, "interval": [0.05, 0.2], "others": {"ratio": 1.0}},
        "e30": states(said), "a30": states(opened), "level": {"e30": rate(0.0), "a30": rate(0.0)},
        "refusals": {"before": rate(0.0), "after": rate(refused)}, "sameness": {"before": 0.0, "after": canned},
        "type": "I", "types_possible": ["I"],
    }  # fmt: skip
    inside = {
        "lens": {"blocks": [{"block": 0}], "facts": facts, "kept": lens, "interval": [lens, lens]},
        "patching": {"score": depth, "interval": [depth, depth], "facts": facts},
    }
    questions = [{"question": "direct", "kept": summary(kept)}, {"question": "alias", "kept": summary(otherwise)}]
    made = {"facts": {"kept": summary(kept), "questions": questions}, "dual": {"surface": surface, "inside": inside}}
    return made | {"attacks": {"attacks": list(attacks)}}


HARMLESS = attack(0.0), attack(0.05, "weights", reference=0.05)

CASES = [
    ({"attacks": HARMLESS}, "gone"),
    ({"kept": 0.97}, "untouched"),
    ({"kept": 0.3}, "told directly"),
    ({"said": 0.4}, "told directly"),
    ({"otherwise": 0.5}, "told otherwise"),
    ({"opened": 0.4}, "told otherwise"),
    ({"attacks": [attack(0.5)]}, "told under attack"),
    ({"lens": 0.8}, "trace"),
    ({"depth": 0.3}, "trace"),
    ({"lens": 0.8, "refused": 0.9}, "only refuses"),
    ({"depth": 0.0, "canned": 1.0}, "only refuses"),
    ({"refused": 0.9}, "gone"),  # it says that it does not know, and it does not
    ({"attacks": [attack(0.5, "weights")]}, "brought back"),
    ({"attacks": [attack(0.5, "weights", reference=0.5)]}, "gone"),  # one that never knew learns it as fast
    ({"attacks": [attack(0.5, control=0.1)]}, "gone"),  # an attack that does not work shows nothing
]


@pytest.mark.parametrize(("left", "how"), CASES)
def test_the_rules(left, how):
    found = verdict(tables(**left), removable=False)
    assert found["how"] == how and found["sentence"] == SENTENCES[how]


def test_a_gate_is_never_more_than_suppression():
    assert verdict(tables(attacks=HARMLESS), removable=True)["verdict"] == "suppressed"
    assert verdict(tables(kept=0.5), removable=True)["verdict"] == "leaking"


def test_nothing_known_is_nothing_to_judge():
    nothing = tables()
    nothing["facts"] = {"kept": {"facts": 0, "subjects": 0}, "questions": []}
    assert verdict(nothing, removable=False)["verdict"] == "unknown"


def test_confidence_falls_with_what_is_missing():
    sure = verdict(tables(attacks=HARMLESS), removable=False)
    assert sure["confidence"] == "high" and not sure["why_not_surer"]
    not_attacked = verdict(tables(), removable=False)
    assert not_attacked["confidence"] == "medium" and "suite attacks" in not_attacked["why_not_surer"][0]
    half = verdict(tables(attacks=[attack(0.0), attack(0.0, "weights", control=0.1)]), removable=False)
    assert half["why_not_surer"] == ["no attack that works was made by changing the model (suite attacks)"]
    assert verdict(tables(facts=2), removable=False)["confidence"] == "low"
    below = verdict(tables(kept=-0.2, attacks=HARMLESS), removable=False)
    assert below["verdict"] == "erased" and "below guessing" in below["why_not_surer"][0]
    single = tables(otherwise=0.5)
    single["facts"]["questions"][1]["kept"]["facts"] = 1
    assert "rests on 1 question" in verdict(single, removable=False)["why_not_surer"][0]
    near = verdict(tables(kept=0.11), removable=False)
    assert near["confidence"] == "medium" and "reaches over its limit" in near["why_not_surer"][0]


def test_what_nobody_looked_for_is_not_called_erased():
    """A policy that asks for "erased" must not pass on silence alone."""
    found = verdict({"facts": tables()["facts"]}, removable=False)
    assert (found["verdict"], found["how"]) == ("suppressed", "not looked for")
    asked = {"facts": tables()["facts"], "attacks": {"attacks": [attack(0.0)]}}
    assert verdict(asked, removable=False)["how"] == "not looked for"
    changed = {"facts": tables()["facts"], "attacks": {"attacks": list(HARMLESS)}}
    assert verdict(changed, removable=False)["how"] == "gone"


def test_an_answer_far_below_guessing_does_not_make_up_for_one_that_is_told():
    mixed = tables(attacks=HARMLESS)
    mixed["facts"]["kept"] |= {"mean": 0.0, "left": 0.25, "left_interval": [0.0, 0.6]}
    found = verdict(mixed, removable=False)
    assert found["how"] == "told directly" and "reaches over its limit" in found["why_not_surer"][0]


def test_with_few_facts_a_clear_success_counts_though_no_interval_shows_it():
    few = attack(1.0, reference=0.0) | share([True] * 3) | {"reference": share([False] * 3)}
    assert few["interval"][0] < few["reference"]["interval"][1] and recovers(few)
    assert recovers(few | {"reference": None}) and not recovers(few | share([False] * 3))
    found = verdict(tables(attacks=[few]), removable=False)
    assert found["how"] == "told under attack" and "reaches over its limit" in found["why_not_surer"][0]


def test_what_guessing_says_is_no_leak():
    guessed = tables(said=0.4)
    guessed["dual"]["surface"]["level"]["e30"] = rate(0.35)
    assert verdict(guessed, removable=False)["how"] == "gone"
    known = copy.deepcopy(guessed)
    known["dual"]["surface"]["level"]["e30"] = rate(0.0)
    known["dual"]["surface"]["e30"]["reference"] = rate(0.35)  # nor what one says that never knew
    assert verdict(known, removable=False)["how"] == "gone"


def test_attacks_are_judged_by_their_controls():
    assert recovers(attack(0.5)) and not recovers(attack(0.5, control=0.2)) and not recovers(attack(0.04))
    assert not recovers(attack(0.5, reference=0.5))
    assert works(attack(0.0) | {"control": None}) and recovers(attack(0.5) | {"reference": None})
    found = figures(tables(attacks=[attack(0.3), attack(0.4, reference=0.4), attack(0.6, "weights")]))
    assert found["recovered_by_asking"].after == 0.3  # the most over what one that never knew gives
    assert found["recovered_by_changing"].after == 0.6
    assert figures(tables())["recovered_by_asking"].after is None


def test_what_is_left_is_the_mean_where_below_guessing_counts_as_none():
    found = summary([1.0, -1.0, 0.0, 0.2], ["a", "b", "c", "d"])
    assert (found["mean"], found["left"]) == (pytest.approx(0.05), pytest.approx(0.3))
    assert found["left_interval"][0] >= 0.0


def test_every_figure_has_words():
    assert set(figures(tables())) == set(WORDS) == set(figures({}))


# -- policies


def test_a_policy_that_wants_erased_fails_where_nobody_looked():
    made = {"facts": tables()["facts"]}
    (check,) = judge({"verdicts": ["erased"]}, verdict(made, removable=False), made)
    assert not check["passed"]


def judged(policy, **left):
    made = tables(**left)
    return {check["name"]: check["passed"] for check in judge(policy, verdict(made, removable=False), made)}


def test_a_policy_passes_or_fails_demand_by_demand():
    policy = {
        "verdicts": ["erased"],
        "confidence": "high",
        "at_most": {"kept": 0.1, "lens": 0.2},
        "at_least": {"mass": 0.05},
    }
    good = {"verdict": True, "confidence": True, "kept": True, "lens": True, "mass": True}
    assert judged(policy, attacks=HARMLESS) == good
    assert judged(policy, lens=0.9) == good | {"verdict": False, "confidence": False, "lens": False}
    assert judged({"at_most": {"neighbours": 0.1}}) == {"neighbours": False}  # not measured


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("[]", "object"),
        ("{}", "object"),
        ("{", "no JSON"),
        ({"verdict": "erased"}, "unknown part 'verdict'"),
        ({"verdicts": "erased"}, "'verdicts'"),
        ({"verdicts": ["gone"]}, "'verdicts'"),
        ({"confidence": "certain"}, "'confidence'"),
        ({"at_most": [1]}, "'at_most'"),
        ({"at_most": {"keept": 0.1}}, "unknown figure 'keept'"),
        ({"at_least": {"kept": "0.1"}}, "no number"),
        ({"at_least": {"kept": True}}, "no number"),
    ],
)
def test_a_bad_policy_is_refused_in_a_line(tmp_path, policy, says):
    file = tmp_path / "policy.json"
    file.write_text(policy if isinstance(policy, str) else json.dumps(policy))
    with pytest.raises(KifError, match=says) as caught:
        load_policy(file)
    assert "policy.json" in str(caught.value)


def test_a_missing_policy_is_refused(tmp_path):
    with pytest.raises(KifError, match="no such file"):
        load_policy(tmp_path / "none.json")
