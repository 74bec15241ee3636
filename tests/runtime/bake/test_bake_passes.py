"""One set of weights in three roles, held against transformers and against attached capsules."""

import pytest
import torch

from kif_hf import attach
from kif_runtime.bake.adapter import adapted, parameters
from kif_runtime.bake.examples import collate
from kif_runtime.bake.passes import Passes
from kif_runtime.bake.settings import Settings


@pytest.fixture
def batch(data):
    return collate(data.forget[:6], range(6))


@pytest.fixture
def passes(tiny):
    with adapted(tiny.model, Settings(rank=4), seed=0) as wrapped:
        yield Passes(wrapped, [tiny.capsule])


@torch.no_grad()
def plain(model, batch):
    return model(input_ids=batch.ids, attention_mask=batch.mask, output_hidden_states=True)


def shaken(passes):
    for parameter in parameters(passes.model).values():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))


def test_a_fresh_adapter_changes_nothing(tiny, passes, batch):
    student, reference = passes.student(batch, hidden=[0, 2], logits=True), passes.reference(batch, hidden=[0, 2])
    assert all(torch.equal(student.hidden[b], reference.hidden[b]) for b in (0, 2))
    with passes.without_adapter():
        assert torch.equal(student.logits, plain(tiny.model, batch).logits)


def test_student_and_reference_part_with_the_adapter(tiny, passes, batch):
    shaken(passes)
    out = plain(tiny.model, batch)  # peft puts its layers into the model itself
    with passes.without_adapter():
        bare = plain(tiny.model, batch)
    assert torch.equal(passes.student(batch, hidden=[1]).hidden[1], out.hidden_states[2])
    assert torch.equal(passes.reference(batch, hidden=[1]).hidden[1], bare.hidden_states[2])
    assert not torch.equal(out.hidden_states[2], bare.hidden_states[2])


def test_the_teacher_is_the_model_with_the_capsules_attached(tiny, batch):
    with adapted(tiny.model, Settings(rank=4), seed=0) as wrapped:
        passes = Passes(wrapped, [tiny.capsule])
        shaken(passes)
        teacher = passes.teacher(batch, hidden=[1, 2], logits=True)
    with attach(tiny.model, [tiny.capsule]) as kif:
        wanted = plain(tiny.model, batch)
        assert sum(kif.fired.values()) > 0
    real = batch.mask.bool()
    assert torch.equal(teacher.hidden[2][real], wanted.hidden_states[3][real])
    assert torch.equal(teacher.logits[real], wanted.logits[real])


def test_blocks_after_the_last_asked_do_not_run(passes, batch):
    ran: list[int] = []
    before = [len(b._forward_hooks) for b in passes.blocks]
    handles = [b.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, b in enumerate(passes.blocks)]
    passes.student(batch, hidden=[1])
    passes.teacher(batch, hidden=[0])
    for handle in handles:
        handle.remove()
    assert ran in ([0, 1, 0], [0, 0])  # whether the hook of the last block itself runs depends on who came first
    assert [len(b._forward_hooks) for b in passes.blocks] == before


def test_an_edit_replaces_a_blocks_output(passes, batch):
    out = passes.reference(batch, hidden=[0, 1], edits={0: lambda x: x * 0})
    assert float(out.hidden[0].abs().max()) == 0
    assert not torch.equal(out.hidden[1], passes.reference(batch, hidden=[1]).hidden[1])


def test_a_disturbance_reaches_the_student_alone(passes, batch):
    before = passes.reference(batch, hidden=[1]).hidden[1]
    with passes.disturbing({0: lambda x: x + 1}):
        assert not torch.equal(passes.student(batch, hidden=[1]).hidden[1], before)
        assert torch.equal(passes.reference(batch, hidden=[1]).hidden[1], before)
    assert torch.equal(passes.student(batch, hidden=[1]).hidden[1], before)


def test_gradients_reach_the_adapter_and_nothing_else(tiny, passes, batch):
    shaken(passes)
    passes.student(batch, hidden=[2]).hidden[2].square().mean().backward()
    with_gradient = {n for n, p in passes.model.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n in parameters(passes.model) if any(f"layers.{b}." in n for b in (0, 1, 2))}
