"""What a row is asked for, and the blend it sets."""

import pytest
import torch

from clp_engine.core.conditions import Conditions, blend_coefficients, parse_weights

NAMES = ["coverage", "brevity", "faithfulness"]


def conditions(kl, weights=(0.25, 0.75)):
    return Conditions(torch.tensor([weights] * len(kl)), torch.tensor(kl))


def test_a_condition_per_prompt_becomes_one_per_completion():
    both = Conditions(torch.eye(2), torch.tensor([0.1, 0.2])).repeat(3)
    assert len(both) == 6
    assert both.kl.tolist() == pytest.approx([0.1] * 3 + [0.2] * 3)
    assert both.weights[:, 0].tolist() == [1, 1, 1, 0, 0, 0]


def test_cat_and_index_undo_each_other():
    first, second = conditions([0.1, 0.2]), conditions([0.3], (1.0, 0.0))
    joined = Conditions.cat([first, second])
    assert torch.equal(joined[2:].weights, second.weights) and torch.equal(joined[:2].kl, first.kl)


@pytest.mark.parametrize("form", ["none", "linear", "odds"])
def test_the_reference_is_the_row_whose_blend_is_zero(form):
    assert (blend_coefficients(Conditions.reference(3, 2), form, min_kl=0.1) == 0).all()


def test_none_is_the_weighting_itself():
    asked = conditions([0.1, 0.6])
    assert torch.equal(blend_coefficients(asked), asked.weights)


def test_linear_scales_by_one_minus_alpha():
    blend = blend_coefficients(conditions([0.0, 0.6, 1.0]), "linear")
    torch.testing.assert_close(blend, torch.tensor([[0.25, 0.75], [0.1, 0.3], [0.0, 0.0]]))


def test_odds_is_one_at_the_smallest_alpha_and_follows_the_odds_from_there():
    blend = blend_coefficients(conditions([0.1, 0.5, 1.0]), "odds", min_kl=0.1)
    torch.testing.assert_close(blend, torch.tensor([[0.25, 0.75], [0.25 / 9, 0.75 / 9], [0.0, 0.0]]))


def test_odds_goes_beyond_one_below_the_smallest_alpha_of_training():
    assert blend_coefficients(conditions([0.05]), "odds", min_kl=0.1).sum().item() == pytest.approx(19 / 9)


@pytest.mark.parametrize("form", ["linear", "odds"])
def test_beta_blends_like_the_alpha_it_stands_for(form):
    alpha = torch.tensor([0.1, 0.3, 0.6])
    by_alpha = blend_coefficients(Conditions(torch.eye(3), alpha), form, min_kl=0.1)
    beta = Conditions(torch.eye(3), alpha / (1 - alpha))
    by_beta = blend_coefficients(beta, form, min_kl=1 / 9, kl_is_beta=True)
    torch.testing.assert_close(by_alpha, by_beta)


def test_odds_keeps_coefficients_outside_the_simplex():
    """Blends may extrapolate: a negative weight is not a missing one."""
    blend = blend_coefficients(conditions([0.1], (1.5, -0.5)), "odds", min_kl=0.1)
    torch.testing.assert_close(blend, torch.tensor([[1.5, -0.5]]))


def test_odds_without_a_kl_penalty_is_an_error():
    with pytest.raises(ValueError, match="needs a KL coefficient above 0 in every row; got 0"):
        blend_coefficients(conditions([0.1, 0.0]), "odds", min_kl=0.1)


@pytest.mark.parametrize(
    "form, options, message",
    [
        ("inverse", {}, "expected one of none, linear, odds"),
        ("odds", {}, "alpha between 0 and 1; got None"),
        ("odds", dict(min_kl=0.0), "alpha between 0 and 1; got 0.0"),
        ("odds", dict(min_kl=1.0), "alpha between 0 and 1; got 1.0"),
        ("odds", dict(min_kl=0.0, kl_is_beta=True), "beta > 0; got 0.0"),
    ],
)
def test_blend_errors(form, options, message):
    with pytest.raises(ValueError, match=message):
        blend_coefficients(conditions([0.1]), form, **options)


def test_weights_by_name_leave_out_what_weighs_nothing():
    assert parse_weights({"brevity": 0.4, "coverage": 0.6}, NAMES).tolist() == pytest.approx([0.6, 0.4, 0.0])
    assert parse_weights([0.2, 0.3, 0.5], NAMES).tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert parse_weights(None, NAMES).tolist() == pytest.approx([1 / 3] * 3)


def test_weights_that_nearly_sum_to_one_are_normalised():
    assert parse_weights([0.333, 0.333, 0.333], NAMES).sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"coverge": 1.0}, "unknown objective 'coverge'; this policy has coverage, brevity, faithfulness"),
        ({"a": 0.5, "b": 0.5}, "unknown objectives 'a', 'b'"),
        ({"coverage": 1.2, "brevity": -0.2}, "must not be negative; got coverage=1.2, brevity=-0.2"),
        ({"coverage": 0.7, "brevity": 0.7}, "must sum to 1; got .*, which sums to 1.4"),
        ([0.5, 0.5], "2 entries; expected 3, in the order coverage, brevity, faithfulness"),
        ([float("nan"), 0.5, 0.5], "must not be negative"),
    ],
)
def test_weight_errors(weights, message):
    with pytest.raises(ValueError, match=message):
        parse_weights(weights, NAMES)
