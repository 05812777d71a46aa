import copy
import dataclasses
import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emerging_optimizers import schedules
from emerging_optimizers.schedules import ConstantFrequency, CosineFrequency, LinearFrequency, StepFrequency

EXAMPLES = [
    ConstantFrequency(7),
    LinearFrequency(1, 10, 900),
    CosineFrequency(20, 2, 100),
    StepFrequency(1, {100: 10, 1000: 50}),
    StepFrequency(3, ()),
]
each_example = pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
positive = st.integers(1, 10**6)


@each_example
def test_repr_evaluates_to_an_equal_schedule(schedule):
    assert eval(repr(schedule), vars(schedules)) == schedule


@each_example
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_schedule_comes_back_equal(schedule, protocol):
    back = pickle.loads(pickle.dumps(schedule, protocol))
    assert back == schedule
    assert hash(back) == hash(schedule)
    assert [back(t) for t in range(50)] == [schedule(t) for t in range(50)]


@each_example
def test_a_deep_copy_is_equal(schedule):
    assert copy.deepcopy(schedule) == schedule


def test_different_schedules_are_unequal():
    assert len(set(EXAMPLES)) == len(EXAMPLES)
    assert LinearFrequency(1, 10, 9) != CosineFrequency(1, 10, 9)
    assert LinearFrequency(1, 10, 9) != LinearFrequency(1, 10, 8)


@each_example
def test_a_schedule_cannot_be_changed(schedule):
    field = dataclasses.fields(schedule)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(schedule, field, 2)


def test_constant():
    assert {ConstantFrequency(4)(t) for t in range(100)} == {4}


def test_linear_rises_by_equal_amounts():
    assert [LinearFrequency(1, 5, 8)(t) for t in range(11)] == [1, 2, 2, 3, 3, 4, 4, 5, 5, 5, 5]


def test_linear_falls():
    assert [LinearFrequency(4, 1, 3)(t) for t in range(5)] == [4, 3, 2, 1, 1]


def test_a_half_rounds_up_whatever_the_last_bits_say():
    assert math.cos(math.pi / 3) > 0.5  # so that the plain sum falls just below 3.5
    assert CosineFrequency(1, 11, 900)(300) == 4
    assert [LinearFrequency(1, 4, 2)(1), LinearFrequency(1, 2, 2)(1)] == [3, 2]


def test_cosine_is_slow_at_both_ends():
    values = [CosineFrequency(1, 101, 100)(t) for t in range(101)]
    assert values[10] - values[0] == 2
    assert values[55] - values[45] == 16
    assert values[100] - values[90] == 2
    assert values[50] == 51


@pytest.mark.parametrize("kind", [LinearFrequency, CosineFrequency])
@given(start=positive, end=positive, steps=positive, t=st.integers(0, 2 * 10**6))
def test_interpolation_is_monotone_between_its_ends(kind, start, end, steps, t):
    schedule = kind(start, end, steps)
    assert schedule(0) == start
    assert schedule(steps) == schedule(steps + t) == end
    low, high = sorted((start, end))
    assert low <= schedule(t) <= high
    assert (schedule(t + 1) - schedule(t)) * (end - start) >= 0
    assert type(schedule(t)) is int


def test_step_changes_at_the_milestone_itself():
    schedule = StepFrequency(2, {5: 4, 8: 1})
    assert [schedule(t) for t in range(10)] == [2] * 5 + [4] * 3 + [1] * 2


def test_step_takes_milestones_as_mapping_or_pairs_in_any_order():
    expected = StepFrequency(2, ((5, 4), (8, 1)))
    assert StepFrequency(2, {8: 1, 5: 4}) == expected
    assert StepFrequency(2, [[8, 1], [5, 4]]) == expected
    assert StepFrequency(2, iter([(5, 4), (8, 1)])) == expected


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: ConstantFrequency(0), ValueError, "frequency: got 0, wanted an int of at least 1"),
        (lambda: ConstantFrequency(2.0), TypeError, r"frequency: got 2\.0, wanted an int"),
        (lambda: ConstantFrequency(True), TypeError, "frequency: got True, wanted an int"),
        (lambda: LinearFrequency(0, 1, 1), ValueError, "start: got 0"),
        (lambda: LinearFrequency(1, -3, 1), ValueError, "end: got -3"),
        (lambda: LinearFrequency(1, 1, 0), ValueError, "steps: got 0"),
        (lambda: CosineFrequency("1", 1, 1), TypeError, "start: got '1'"),
        (lambda: CosineFrequency(1, 0, 1), ValueError, "end: got 0"),
        (lambda: CosineFrequency(1, 1, None), TypeError, "steps: got None"),
        (lambda: StepFrequency(0, {}), ValueError, "start: got 0"),
        (lambda: StepFrequency(1, 5), TypeError, "milestones: got 5, wanted a mapping or pairs"),
        (lambda: StepFrequency(1, [5]), TypeError, r"milestones: got \[5\], wanted a mapping or pairs"),
        (lambda: StepFrequency(1, [(5, 2, 1)]), TypeError, r"milestones: got \[\(5, 2, 1\)\]"),
        (lambda: StepFrequency(1, {0: 2}), ValueError, "milestones: step: got 0"),
        (lambda: StepFrequency(1, {5: 0}), ValueError, "milestones: frequency from step 5: got 0"),
        (lambda: StepFrequency(1, {"5": 2}), TypeError, "milestones: step: got '5'"),
        (lambda: StepFrequency(1, [(5, 2), (5, 3)]), ValueError, "wanted each step once"),
    ],
)
def test_a_bad_argument_is_named(build, error, message):
    with pytest.raises(error, match=f"^.*{message}"):
        build()


@each_example
def test_a_negative_step_is_an_error(schedule):
    with pytest.raises(ValueError, match="t: got -1"):
        schedule(-1)
