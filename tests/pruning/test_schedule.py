from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.schedule import PolynomialDecay

GOLDEN = PolynomialDecay(begin=100, end=110, frequency=2, initial_sparsity=0.2, final_sparsity=0.8)


@pytest.mark.parametrize(("step", "expected"), [(100, 0.2), (102, 0.4928), (105, 0.725), (110, 0.8)])
def test_golden_values_of_tensorflow_model_optimization(step, expected):
    assert GOLDEN.sparsity(step) == pytest.approx(expected, abs=1e-12)


def test_nothing_is_planned_before_begin_and_the_target_holds_after_end():
    assert [GOLDEN.sparsity(step) for step in (0, 99, 111, 10**6)] == [0, 0, 0.8, 0.8]
    assert not any(GOLDEN.prunes_at(step) for step in (0, 98, 99, 111, 112))


@pytest.mark.parametrize("frequency", [1000, 3000, 4690, 7])
def test_the_target_is_hit_exactly_whatever_the_frequency(frequency):
    decay = PolynomialDecay(begin=0, end=4690, frequency=frequency, final_sparsity=0.5)
    cuts = [step for step in range(4691) if decay.prunes_at(step)]
    assert cuts[0] == 0
    assert cuts[-1] == 4690
    assert decay.sparsity(cuts[-1]) == 0.5


def test_pruning_takes_place_every_100_steps_unless_told_otherwise():
    decay = PolynomialDecay(begin=5, end=305, final_sparsity=0.5)
    assert [step for step in range(400) if decay.prunes_at(step)] == [5, 105, 205, 305]


def test_power_1_is_a_straight_line_and_power_2_a_parabola():
    line = PolynomialDecay(begin=0, end=10, frequency=1, final_sparsity=0.5, power=1)
    assert [line.sparsity(step) for step in (0, 5, 10)] == pytest.approx([0, 0.25, 0.5])
    assert replace(line, power=2).sparsity(5) == pytest.approx(0.375)


def test_begin_equal_to_end_prunes_once_and_completely():
    once = PolynomialDecay(begin=7, end=7, final_sparsity=0.9)
    assert [step for step in range(20) if once.prunes_at(step)] == [7]
    assert once.sparsity(7) == 0.9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_sparsity": 1.0}, "allowed: 0 <= initial <= final < 1"),
        ({"final_sparsity": float("nan")}, "allowed: 0 <= initial <= final < 1"),
        ({"initial_sparsity": -0.1}, "allowed: 0 <= initial <= final < 1"),
        ({"initial_sparsity": 0.9}, "allowed: 0 <= initial <= final < 1"),
        ({"end": 99}, "allowed: 0 <= begin <= end"),
        ({"begin": -1}, "allowed: 0 <= begin <= end"),
        ({"power": 0}, "allowed: above 0"),
        ({"frequency": 0}, "allowed: 1 to 10"),
        ({"frequency": 11}, "allowed: 1 to 10"),
    ],
)
def test_what_makes_no_schedule_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GOLDEN, **change)


@given(
    begin=st.integers(0, 50),
    span=st.integers(1, 200),
    frequency=st.integers(1, 200),
    ends=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)).map(sorted),
    power=st.floats(0.1, 10),
)
def test_sparsity_never_falls_and_stays_between_its_ends(begin, span, frequency, ends, power):
    initial, final = ends
    decay = PolynomialDecay(begin, begin + span, final, initial, min(frequency, span), power)
    planned = [decay.sparsity(step) for step in range(begin, begin + span + 1)]
    assert planned == sorted(planned)
    assert planned[0] == pytest.approx(initial)
    assert planned[-1] == final
