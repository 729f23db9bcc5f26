"""What a range test's curve says."""

import numpy as np
import pytest

from raylit.tune.search.learning_rate import RangeCurve


def curve(noise=0.0, seed=0, num_points=100):
    """A loss of 8 that falls around a rate of 1e-3 and rises above 1e-1, with the noise of batches, smoothed."""
    lrs = np.geomspace(1e-8, 1.0, num_points)
    decades = np.log10(lrs)
    raw = 8 - 6 / (1 + np.exp(-3 * (decades + 3))) + 40 * np.clip(decades + 1, 0, None) ** 2
    raw = raw + noise * np.random.default_rng(seed).normal(size=num_points)
    average, smoothed = 0.0, []
    for index, loss in enumerate(raw):
        average = 0.98 * average + 0.02 * loss
        smoothed.append(average / (1 - 0.98 ** (index + 1)))
    return RangeCurve(lrs=lrs.tolist(), losses=smoothed)


@pytest.mark.parametrize("noise", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_the_suggestion_lies_in_the_fall_for_any_first_losses(noise, seed):
    assert 1e-4 < curve(noise, seed).suggestion() < 1e-1


def test_the_suggestion_without_noise_is_the_steepest_point():
    found = curve()
    losses = np.array(found.results["loss"][10:-1])
    assert found.suggestion() == found.results["lr"][10 + int(np.argmin(np.gradient(losses)))]


def test_too_few_points_give_no_suggestion():
    with pytest.warns(UserWarning, match="too few points for a suggestion"):
        assert RangeCurve(lrs=[0.1, 0.2], losses=[1.0, 0.5]).suggestion() is None
    found = RangeCurve(lrs=[0.1, 0.2, 0.3, 0.4], losses=[3.0, 2.0, float("nan"), 0.5])
    assert found.suggestion(skip_begin=0, skip_end=0) in (0.1, 0.2, 0.4)
