"""Fusion: which patterns are found, that nothing is lost or reordered or lies over another."""

from __future__ import annotations

from collections import Counter

import pytest

from engineroom.engine import models
from engineroom.kernels import ops
from engineroom.kernels.cpu.lower import lower
from engineroom.kernels.fuse import early_rows, fuse
from engineroom.kernels.program import Program, R, T
from tests.kernels.programs import mixture, two_layers
from tests.models.published import CONFIGS


def same_form(name: str) -> int:
    return 0


def recorded(name: str) -> Program:
    values = CONFIGS[name]
    family = models.find_by_hf(values["architectures"][0])
    return models.record(family, family.config_from_hf(values))


def test_a_llama_layer_is_six_steps() -> None:
    steps = fuse(recorded("Llama-2-7b"), same_form)
    assert [s.pattern for s in steps[:9]] == [
        "embedding",
        "norm_linear_group",
        "rope",
        "kv_write",
        "rope",
        "attention",
        "linear_add",
        "norm_gated_linear",
        "linear_add",
    ]
    assert len(steps[1].main) == 3 and len(steps[7].main) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_every_operation_is_in_one_step_and_reads_what_is_made(name: str) -> None:
    program = early_rows(recorded(name))
    steps = fuse(program, same_form)
    found = Counter(op.output for s in steps for op in (s.norm, *s.main, s.after) if op is not None)
    assert found == Counter(op.output for op in program)
    known = {h.id for h in program.handles if h.kind != "value"}
    for step in steps:
        missing = [i for i in step.reads if i not in known]
        assert not missing, f"{step.pattern} reads {missing} before it is made"
        known.update(step.outputs)
    assert program.result is not None and program.result.id in known


def test_a_mixture_is_one_gated_step_and_one_of_the_experts_alone() -> None:
    program = early_rows(mixture())
    assert all(program.handles[op.output].shape[0] == R for op in program.ops[-18:])
    steps = fuse(program, same_form)
    made = [s for s in steps if s.main[0].name == "expert_linear"]
    assert [s.pattern for s in made] == ["gated_experts", "expert_linear"] * 2
    for gated in made[::2]:
        weights = [program.handles[op.inputs[1]].name for op in gated.main]  # type: ignore[index]
        assert [w[2:] for w in weights] == ["gates", "ups"] and gated.after is not None
    found = Counter(op.output for s in steps for op in (s.norm, *s.main, s.after) if op is not None)
    assert found == Counter(op.output for op in program)
    assert len(fuse(program, lambda name: name)) > len(steps)  # gates and ups in forms of their own


def test_other_experts_are_no_pair() -> None:
    p = Program()
    step = ops.StepHandles.of(p)
    x = ops.embedding(p.weight("e", (9, 8)), step.token_ids)
    routers = [ops.linear(x, p.weight(f"router{i}", (4, 8))) for i in range(2)]
    gate, up = (
        ops.expert_linear(x, p.weight("w", (4 * 6, 8)), ops.top_experts(r, 2), num_experts=4)
        for r in routers
    )
    p.finish(ops.select_rows(ops.silu_mul(gate, up), step.logit_rows))
    patterns = [s.pattern for s in fuse(p, same_form)]
    assert patterns.count("expert_linear") == 2 and "gated_experts" not in patterns


def test_experts_with_and_without_a_bias_are_no_pair() -> None:
    p = Program()
    step = ops.StepHandles.of(p)
    x = ops.embedding(p.weight("e", (9, 8)), step.token_ids)
    chosen = ops.top_experts(ops.linear(x, p.weight("router", (4, 8))), 2)
    gate, up = (
        ops.expert_linear(x, p.weight(name, (4 * 6, 8)), chosen, bias, num_experts=4)
        for name, bias in (("gates", None), ("ups", p.weight("bias", (4 * 6,))))
    )
    p.finish(ops.select_rows(ops.clamped_silu_mul(gate, up), step.logit_rows))
    assert "gated_experts" not in [s.pattern for s in fuse(p, same_form)]


def test_layers_of_different_forms_stay_apart() -> None:
    program = two_layers()
    forms = {"0.q": 1, "0.k": 2, "0.v": 1}
    steps = fuse(program, lambda name: forms.get(name, 0))
    first = [s for s in steps if s.main[0].name == "linear"][:2]
    weights = [[program.handles[op.inputs[1]].name for op in s.main] for s in first]
    assert weights == [["0.q", "0.v"], ["0.k"]]
    assert all(s.norm is None for s in first)  # the norm has readers in both


def test_a_value_that_others_read_is_not_swallowed() -> None:
    p = Program()
    step = ops.StepHandles.of(p)
    x = ops.embedding(p.weight("e", (9, 32)), step.token_ids)
    y = ops.linear(x, p.weight("w", (32, 32)))
    z = ops.add(ops.add(x, y), y)  # y is read twice
    p.finish(ops.select_rows(z, step.logit_rows))
    assert [s.pattern for s in fuse(p, same_form)] == [
        "embedding",
        "linear",
        "add",
        "add",
        "select_rows",
    ]


def test_early_rows_moves_the_last_feed_forward_and_nothing_before_attention() -> None:
    program = early_rows(two_layers())
    rows = {op.name: program.handles[op.output].shape[0] for op in program}
    last = max(i for i, op in enumerate(program.ops) if op.name == "attention")
    after = [program.handles[op.output].shape[0] for op in program.ops[last + 1 :]]
    assert set(after) == {R}
    before = {program.handles[op.output].shape[0] for op in program.ops[: last + 1]}
    assert before == {T, 0}
    assert rows["softcap"] == R
    selected = [op for op in program if op.name == "select_rows"]
    assert len(selected) == 2  # attention's result and the residual stream


@pytest.mark.parametrize("name", CONFIGS)
def test_values_alive_together_do_not_share_columns(name: str) -> None:
    lowered = lower(recorded(name), same_form)
    program = lowered.program
    last: dict[int, int] = {}
    epoch = 0  # barriers so far: memory changes hands only across one
    epochs = []
    for index, node in enumerate(lowered.nodes):
        epoch += node.barrier
        epochs.append(epoch)
        for value in node.step.reads if node.step else ():
            last[value] = index
    alive: dict[int, tuple[bool, int, int]] = {}
    for index, node in enumerate(lowered.nodes):
        for value in node.step.outputs if node.step else ():
            if value not in node.places:
                continue
            place = node.places[value]
            span = (place.per_logit_row, place.column, place.column + place.width)
            for other, (rows, first, stop) in list(alive.items()):
                ended = last.get(other, -1)
                done = ended <= index and (epochs[ended] < epochs[index] or ended == index)
                if rows != span[0] or stop <= span[1] or span[2] <= first:
                    continue
                in_place = (first, stop) == span[1:] and ended == index
                assert done and (in_place or epochs[ended] < epochs[index]), (
                    f"%{value} lies over %{other}"
                )
                del alive[other]
            alive[value] = span
    assert program.result is not None and program.result.id in alive
    assert lowered.token_columns < 40 * program.handles[program.ops[0].output].shape[1]  # type: ignore[operator]
