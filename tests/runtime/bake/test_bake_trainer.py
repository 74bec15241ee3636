"""The training loop: parts, stops and starts, and what is not finite."""

import dataclasses
import json

import pytest
import torch

from kif_runtime.bake import durability
from kif_runtime.bake.adapter import adapted, copied, parameters
from kif_runtime.bake.checkpoints import NAME as CHECKPOINT
from kif_runtime.bake.checkpoints import read
from kif_runtime.bake.objectives import Step
from kif_runtime.bake.objectives.capsule import CapsuleObjective
from kif_runtime.bake.passes import Passes
from kif_runtime.bake.settings import Settings
from kif_runtime.bake.trainer import LOG, Trainer
from kif_runtime.bake.validation import distances, states
from kif_runtime.errors import BakingError

SETTINGS = Settings(
    rank=4, alpha=8, blocks=2, steps=6, forget_rows=4, retain_rows=8, validate_every=3, checkpoint_every=1, enough=0.0
)


@pytest.fixture
def trainer(tiny, data, tmp_path):
    """trainer(**changes) -> a Trainer on a fresh adapter, always the same one."""
    made = []

    def build(folder=tmp_path, run="run", **changes):
        context = adapted(tiny.model, SETTINGS, seed=0)
        passes = Passes(context.__enter__(), [tiny.capsule])
        made.append(context)
        options = {"objective": CapsuleObjective(start=False), "settings": SETTINGS} | changes
        found = parameters(passes.model)
        forget, retain = data.forget[:20], data.retain[:40:2]  # enough, and quick
        return Trainer(passes, options.pop("objective"), forget, retain, options.pop("settings"), found, folder, run,
                       validate=lambda: states(passes, data.held_forget[:8], data.held_retain[:8], 1),
                       **options)  # fmt: skip

    def leave():
        while made:
            made.pop().__exit__(None, None, None)

    build.leave = leave
    yield build
    leave()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def close(a, b, bound):
    return max(float((a[n] - b[n]).abs().max()) for n in a) <= bound


@pytest.mark.slow
def test_training_brings_the_student_to_the_teacher(trainer, tmp_path):
    outcome = trainer(settings=dataclasses.replace(SETTINGS, steps=30, learning_rate=3e-2)).train()
    assert outcome.ratios["forget"] < 0.5 and outcome.ratios["retain"] < 0.2
    rows = [json.loads(line) for line in (tmp_path / LOG).read_text().splitlines()]
    assert rows[0] == {"step": 0, "forget": 20, "retain": 20}
    assert rows[1]["validation"] == {"forget": pytest.approx(1, abs=1e-4), "retain": 0}
    assert [row["step"] for row in rows if "terms" in row] == list(range(outcome.steps))


def test_a_step_is_the_same_however_its_rows_are_split(trainer, tmp_path):
    gradients = []
    for parts in (1, 2, 4):
        t = trainer(tmp_path, parts=parts)
        torch.nn.init.normal_(t.adapter[next(iter(t.adapter))], generator=torch.Generator().manual_seed(0))
        terms = t._gradients(2)
        gradients.append((terms, {n: p.grad.clone() for n, p in t.adapter.items()}))
        trainer.leave()
    whole = gradients[0]
    for terms, grads in gradients[1:]:
        assert close(terms, whole[0], 1e-6)
        assert close(grads, whole[1], 1e-6)


def test_memory_that_does_not_suffice_halves_the_rows(trainer, tmp_path):
    class Hungry(CapsuleObjective):
        def loss(self, step: Step):
            if len(step.forget) > 2:
                raise torch.OutOfMemoryError("of this test")
            return super().loss(step)

    t = trainer(objective=Hungry(start=False))
    t.train()
    assert t.parts == 2
    trainer.leave()
    (tmp_path / "new").mkdir()
    with pytest.raises(BakingError, match="does not suffice for a single row"):
        trainer(run="another", folder=tmp_path / "new", objective=Greedy(start=False)).train()


class Greedy(CapsuleObjective):
    def loss(self, step: Step):
        raise torch.OutOfMemoryError("of this test")


class Interrupted(CapsuleObjective):
    """Stops as a kill would, in the middle of a step."""

    def __init__(self, at: int) -> None:
        super().__init__(start=False)
        self.at = at

    def loss(self, step: Step):
        if step.number == self.at:
            raise KeyboardInterrupt
        return super().loss(step)


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 4])
def test_interrupted_and_resumed_is_never_interrupted(trainer, tmp_path, at):
    settings = dataclasses.replace(SETTINGS, checkpoint_every=2)
    whole = trainer(tmp_path, settings=settings)
    for path in ("a", "b"):
        (tmp_path / path).mkdir()
    whole.folder = tmp_path / "a"
    outcome, wanted = whole.train(), copied(whole.adapter)
    trainer.leave()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", objective=Interrupted(at), settings=settings).train()
    trainer.leave()
    again = trainer(tmp_path / "b", settings=settings)
    resumed = again.train()
    assert same(copied(again.adapter), wanted)
    assert resumed == outcome


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(trainer, tmp_path):
    t = trainer()
    t.train()
    assert read(tmp_path, "run").step == 6
    with pytest.raises(BakingError, match="of another run"):
        read(tmp_path, "another")
    (tmp_path / CHECKPOINT).write_bytes((tmp_path / CHECKPOINT).read_bytes()[:-7])
    with pytest.raises(BakingError, match="cannot be read; remove it"):
        read(tmp_path, "run")


def test_a_loss_that_is_not_finite_stops_and_is_named(trainer, tmp_path):
    class Broken(CapsuleObjective):
        def loss(self, step: Step):
            terms = super().loss(step)
            return terms | ({"retain": terms["retain"] * float("nan")} if step.number == 4 else {})

    t = trainer(objective=Broken(start=False))
    with pytest.raises(BakingError, match=r"loss term 'retain' is not a finite number at step 4; .*checkpoint"):
        t.train()
    assert read(tmp_path, "run").step == 4
    assert all(bool(v.isfinite().all()) for v in read(tmp_path, "run").adapter.values())


def test_training_ends_where_the_ratios_are_good_enough(trainer):
    outcome = trainer(settings=dataclasses.replace(SETTINGS, enough=1.1)).train()
    assert (outcome.steps, outcome.stopped) == (0, "validation")


def test_the_best_adapter_stays(trainer):
    ratios = iter([{"forget": f, "retain": 0.0} for f in (1.0, 0.2, 0.9)])
    t = trainer()
    t.validate = lambda: next(ratios)
    seen = []
    t.objective.after = lambda step: seen.append(copied(t.adapter))
    outcome = t.train()
    assert (outcome.best_step, outcome.ratios) == (3, {"forget": 0.2, "retain": 0.0})
    assert same(copied(t.adapter), seen[2]) and not same(seen[2], seen[5])


def test_rows_that_cannot_be_shared_evenly_are_refused(trainer):
    with pytest.raises(BakingError, match="cannot be shared evenly by 2 processes"):
        t = trainer(settings=dataclasses.replace(SETTINGS, forget_rows=3))
        t.processes.__class__ = type("Two", (type(t.processes),), {"count": 2})
        t.train()


def test_the_loss_is_what_its_docstring_says(trainer, tiny):
    t = trainer()
    torch.nn.init.normal_(t.adapter[next(iter(t.adapter))], std=0.3, generator=torch.Generator().manual_seed(0))
    for p in t.adapter.values():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    step = t._rows(0, 0, 1)

    def unit(x):
        return x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def far(a, b, batch):
        away = (unit(a.hidden[1]) - unit(b.hidden[1])).square().mean(-1)
        return torch.stack([row[: int(n)].sum() for row, n in zip(away, batch.mask.sum(1), strict=True)])

    student, teacher = step.student(step.forget, hidden=[1]), step.teacher(step.forget, hidden=[1])
    reference = step.reference(step.forget, hidden=[1])
    forget = (far(student, teacher, step.forget) / far(reference, teacher, step.forget)).mean()
    retain = (
        4.0 * far(step.student(step.retain, hidden=[1]), step.reference(step.retain, hidden=[1]), step.retain).mean()
    )
    terms = CapsuleObjective(start=False).loss(step)
    assert float(terms["forget"]) == pytest.approx(float(forget), rel=1e-4)
    assert float(terms["retain"]) == pytest.approx(float(retain), rel=1e-4)


@pytest.mark.parametrize("name", durability.PRESSURES)
def test_an_attack_in_the_loop_is_felt_by_the_student_alone_and_leaves_no_trace(trainer, name):
    t = trainer()
    for p in t.adapter.values():
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    step, before = t._rows(0, 0, 1), copied(t.adapter)
    peace, own = step.student(step.forget, hidden=[1]).hidden[1], step.reference(step.forget, hidden=[1]).hidden[1]
    with durability.PRESSURES[name](step):
        attacked = step.student(step.forget, hidden=[1]).hidden[1]
        assert torch.equal(step.reference(step.forget, hidden=[1]).hidden[1], own)
    assert not torch.equal(attacked, peace)
    assert same(copied(t.adapter), before)
    assert torch.equal(step.student(step.forget, hidden=[1]).hidden[1], peace)


def test_relearning_moves_back_towards_the_reference(trainer):
    t = trainer(settings=dataclasses.replace(SETTINGS, steps=10, learning_rate=3e-2))
    t.train()
    step = t._rows(0, 0, 1)
    own = step.reference(step.forget, hidden=[1])

    def away():
        return float(distances(step.student(step.forget, hidden=[1]), own, step.forget, 1).mean())

    before = away()
    with durability.relearned(step):
        assert away() < before


def test_an_attack_that_fails_half_way_leaves_the_adapter_as_it_was(trainer, monkeypatch):
    """Memory may run out in it, and the step is then taken again in smaller parts."""
    step = trainer()._rows(0, 0, 1)
    before = {name: p.detach().clone() for name, p in step.adapter.items()}
    move, moved = durability._move, []

    def once(*args):
        if moved:
            raise MemoryError
        moved.append(move(*args))

    monkeypatch.setattr(durability, "_move", once)
    with pytest.raises(MemoryError), durability.relearned(step):
        pass
    assert all(torch.equal(p, before[name]) for name, p in step.adapter.items())


def test_training_under_attack_reaches_the_adapter(trainer):
    t = trainer(pressure=durability.pressures(["relearn", "latent", "4bit"], None))
    assert t.train().steps == 6
    with pytest.raises(BakingError, match="no durability term 'x'"):
        durability.pressures(["x"], None)
