"""The metrics against values of other implementations and against their definitions."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
from dit import InputError
from evaluate import (
    Statistics,
    compute_statistics,
    density_coverage,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)

FOLDER = Path(__file__).parent / "data" / "metrics"
CASES = np.load(FOLDER / "cases.npz")
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
RNG = np.random.default_rng(0)


# ---------------------------------------------------------------------------------------- values


def softmax(logits):
    p = np.exp(np.float64(logits) - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def figure(case, name):
    numbers = [int(n) for n in re.findall(r"=(\d+)", name)]
    if name.startswith("is_adm"):
        return inception_score(softmax(CASES[f"{case}/logits"]), *numbers)[0]
    real = CASES[f"{case}/real"]
    fake = real if case == "identical" else CASES[f"{case}/fake"]
    if name == "fid":
        return frechet_distance(*compute_statistics(real), *compute_statistics(fake))
    if name.startswith("kid"):
        return kernel_distance(real, fake, *numbers)[name.startswith("kid_std")]
    if name.startswith("prdc"):
        return density_coverage(real, fake, int(name[6]))["coverage" in name]
    return precision_recall(real, fake, 3)[name.startswith("recall")]


@pytest.mark.parametrize(("case", "name"), [
    (case, name) for case, metrics in EXPECTED.items() for name in metrics])
def test_metric_equals_other_implementations(case, name):
    expected = EXPECTED[case][name]
    assert abs(figure(case, name) - expected["value"]) <= expected["tol"]


def brute_force(real, fake, k):
    """Precision, recall, density and coverage by definition, in float64 from differences."""
    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()

    def distances(a, b):
        return torch.stack([(row - b).square().sum(1) for row in a])

    def radii(x):
        return distances(x, x).fill_diagonal_(torch.inf).kthvalue(k, 1).values

    d, real_radii, fake_radii = distances(real, fake), radii(real)[:, None], radii(fake)[None]
    shares = [(d <= real_radii).any(0), (d <= fake_radii).any(1),
              (d < real_radii).sum() / (k * len(fake)), (d < real_radii).any(1)]
    return [float(share.double().mean()) for share in shares]


def hard_sets():
    g, f = RNG.normal(size=(130, 16)), RNG.normal(size=(101, 16)) * 0.8 + 0.2
    outlier = g.copy()
    outlier[3] *= 1e4
    centres = RNG.normal(size=(10, 16))[RNG.integers(0, 10, 130)]
    return dict(
        plain=(g, f), offset=(g + 1e4, f + 1e4), tiny=(g * 1e-5, f * 1e-5), outlier=(outlier, f),
        near_duplicates=(g, g[:101] + 1e-6 * f),
        clusters=(centres + 1e-4 * g, centres[:101] + 1e-4 * f),
        copies=(g, g[::-1][:90]), ties=(RNG.integers(0, 2, (130, 6)), RNG.integers(0, 3, (101, 6))),
        constant=(np.ones((30, 4)), np.ones((20, 4))),
        two_points=(np.repeat(g[:2], 20, 0), np.repeat(g[:4], 10, 0)),
        rectified=(np.maximum(g, 0), np.maximum(f, 0)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", list(hard_sets()))
def test_neighbourhoods_are_exact(name, dtype, monkeypatch):
    monkeypatch.setattr(evaluate, "PAIRS", 48 * 101)  # several strips
    real, fake = (x.astype(dtype) for x in hard_sets()[name])
    for k in (1, 5):
        found = [*precision_recall(real, fake, k), *density_coverage(real, fake, k)]
        np.testing.assert_allclose(found, brute_force(real, fake, k), atol=1e-6)


def test_precision_is_of_the_fake_and_recall_of_the_real():
    wide, narrow = RNG.normal(size=(300, 4)), 0.1 * RNG.normal(size=(200, 4))
    precision, recall = precision_recall(wide, narrow)
    assert precision == 1 and recall < 0.2
    assert precision_recall(narrow, wide) == (recall, precision)


def distance_from_the_data(real, fake):
    """FID with |F^T G|_* of the covariances' exact factors, the centred data."""
    x, y = ((s - s.mean(0)) / (len(s) - 1) ** 0.5 for s in (real, fake))
    nuclear = np.linalg.svd(x @ y.T, compute_uv=False).sum()
    means = ((real.mean(0) - fake.mean(0)) ** 2).sum()
    return means + (x**2).sum() + (y**2).sum() - 2 * nuclear


@pytest.mark.parametrize("case", [
    "few", "few_both", "ill", "ill_rotated", "self", "self_few", "offset", "dead"])
def test_fid_of_singular_covariances_equals_the_one_from_the_data(case):
    scale, turn = 10.0 ** -np.linspace(0, 8, 48), np.linalg.qr(RNG.normal(size=(48, 48)))[0]
    a, b = RNG.normal(size=(90, 48)), RNG.normal(size=(100, 48)) + 0.1
    real, fake = dict(
        few=(a[:20], b), few_both=(a[:20], b[:30]), ill=(a * scale, b * scale),
        ill_rotated=(a * scale, b * scale @ turn), self=(a, a),
        self_few=(a[:9], a[:9]), offset=(a + 1e6, b + 1e6),
        dead=(a * (scale > 1e-3), b * (scale > 1e-2)),
    )[case]
    found = frechet_distance(*compute_statistics(real), *compute_statistics(fake))
    expected, traces = distance_from_the_data(real, fake), real.var(0).sum() + fake.var(0).sum()
    assert abs(found - expected) < 1e-10 * traces and found >= 0


def test_directions_without_variance_add_nothing_to_fid():
    """Rounding gives them eigenvalues of 1e-14, whose roots would add 1.6e-8 of the distance."""
    real, fake = RNG.normal(size=(256, 512)), RNG.normal(size=(1024, 512)) + 0.1
    found = frechet_distance(*compute_statistics(real), *compute_statistics(fake))
    assert found == pytest.approx(distance_from_the_data(real, fake), rel=1e-12)


def test_statistics_in_batches_equal_numpys_at_a_large_offset():
    rows = RNG.normal(size=(1001, 8)) + 1e7
    statistics = Statistics()
    for part in torch.from_numpy(rows).split(64):
        statistics.add(part)
    mean, covariance = statistics.result()
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(covariance, np.cov(rows, rowvar=False), rtol=1e-6, atol=1e-8)


def test_half_precision_integers_and_tensors_are_taken_as_they_are():
    half = RNG.normal(size=(50, 8)).astype(np.float16)
    wide = half.astype(np.float64)
    np.testing.assert_array_equal(compute_statistics(half)[1], compute_statistics(wide)[1])
    mean, covariance = compute_statistics(RNG.integers(0, 255, (50, 8), dtype=np.uint8))
    assert isinstance(mean, np.ndarray) and covariance.dtype == np.float64 and mean.max() > 100
    of_tensor = kernel_distance(torch.from_numpy(half), half, 3, 20)
    assert of_tensor == kernel_distance(half.astype(np.float32), half, 3, 20)


def test_inception_score_takes_exact_zeros_and_keeps_the_order():
    ordered = np.repeat(np.eye(4), 10, 0)
    assert inception_score(ordered) == (pytest.approx(4, rel=1e-12), 0)
    assert inception_score(ordered, 10) == (1, 0)  # one class a chunk
    with_a_short_chunk = inception_score(np.eye(4)[[0, 1, 0, 1, 2]], 4)
    assert with_a_short_chunk == (pytest.approx(1.5), pytest.approx(0.5))


def test_kid_takes_small_sets_whole_and_draws_the_fake_first():
    real, fake = RNG.normal(size=(30, 6)), RNG.normal(size=(20, 6))
    mean, _ = kernel_distance(real, fake, 1, 1000, seed=3)
    x = fake[(draw := np.random.RandomState(3)).choice(20, 20, replace=False)]
    y = real[draw.choice(30, 20, replace=False)]
    xx, yy, xy = ((a @ b.T / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    off = ~np.eye(20, dtype=bool)
    assert mean == pytest.approx(xx[off].mean() + yy[off].mean() - 2 * xy.mean(), rel=1e-12)


@pytest.mark.parametrize("call", [
    lambda: precision_recall(np.ones((3, 4)), np.ones((9, 4))),
    lambda: density_coverage(np.ones((9, 4)), np.ones((5, 4))),
    lambda: precision_recall(np.ones((9, 4)), np.ones((9, 5))),
    lambda: kernel_distance(np.ones((9, 4)), np.ones((1, 4))),
    lambda: compute_statistics(np.ones((1, 4))),
    lambda: compute_statistics(np.ones(4)),
    lambda: frechet_distance(np.ones(3), np.eye(3), np.ones(4), np.eye(4)),
])
def test_sets_that_do_not_fit_are_named(call):
    with pytest.raises(InputError, match=r"\d"):
        call()


# ----------------------------------------------------------------------------------- uncertainty


def spread(draw, value, error):
    """The standard deviation of a metric over 200 draws, and the mean of its standard errors."""
    sets = [torch.from_numpy(draw()) for _ in range(200)]
    return np.std([value(x) for x in sets]), np.mean([error(x) for x in sets])


def test_errors_equal_the_spread_over_repeated_draws():
    rng = np.random.default_rng(5)
    real = torch.from_numpy(rng.normal(size=(500, 5)) + 0.4)
    stats = [torch.from_numpy(x) for x in compute_statistics(real)]
    rows = lambda: rng.normal(size=(200, 5)) * [1, 0.5, 1, 2, 1]
    own = lambda x: [torch.from_numpy(s) for s in compute_statistics(x)]
    std, error = spread(rows, lambda x: frechet_distance(*stats, *own(x)),
                        lambda x: evaluate.frechet_error(x, *stats, *own(x)))
    assert error == pytest.approx(std, rel=0.2)
    std, error = spread(rows, lambda x: kernel_distance(real, x, 5, 200)[0],
                        lambda x: evaluate.kernel_error(
                            real, x, kernel_distance(real, x, 5, 200)[1], 5))
    assert error == pytest.approx(std, rel=0.3)
    probs = lambda: softmax(rng.normal(size=(200, 6)) * 3)
    std, error = spread(probs, lambda x: inception_score(x, 120)[0],
                        lambda x: evaluate.inception_error(x, 120))
    assert error == pytest.approx(std, rel=0.2)


def test_wilson_interval():
    assert evaluate.wilson_interval(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert evaluate.wilson_interval(0.0, 10)[1] == pytest.approx(0.2775, abs=1e-4)


# ----------------------------------------------------------------------------------- properties

counts, widths, seeds = st.integers(7, 24), st.integers(1, 6), st.integers(0, 10**6)
few = settings(max_examples=25, deadline=None, derandomize=True)


def sets(seed, real, fake, width):
    """Two sets of features; some have equal rows or equal coordinates, as those of flat images."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(real, width))
    b = rng.normal(size=(fake, width)) * rng.choice([0.1, 1, 10]) + rng.normal()
    kinds = (a.round(), b.round()), (a, np.concatenate([b[1:], a[:1]])), (a, b)
    return kinds[seed % 3]


def fid(a, b):
    return frechet_distance(*compute_statistics(a), *compute_statistics(b))


@few
@given(seeds, counts, counts, widths)
def test_metrics_do_not_depend_on_the_order(seed, real, fake, width):
    a, b = sets(seed, real, fake, width)
    rng = np.random.default_rng(seed)
    c, d = rng.permutation(a), rng.permutation(b)
    assert fid(c, d) == pytest.approx(fid(a, b), rel=1e-6, abs=1e-5)
    assert precision_recall(c, d) == precision_recall(a, b)
    assert density_coverage(c, d) == pytest.approx(density_coverage(a, b), abs=1e-12)
    # Of sets of one size KID takes all rows, of a larger one it draws some.
    a, b = a[: min(real, fake)], b[: min(real, fake)]
    kid = lambda a, b: kernel_distance(a, b, num_subsets=2)[0]
    assert kid(rng.permutation(a), rng.permutation(b)) == pytest.approx(kid(a, b), 1e-6, 1e-6)
    assert kid(b, a) == pytest.approx(kid(a, b), rel=1e-6, abs=1e-6)
    score = inception_score(softmax(a))[0]
    assert inception_score(rng.permutation(softmax(a)))[0] == pytest.approx(score)


@few
@given(seeds, counts, counts, widths)
def test_ranges_and_symmetries_of_metrics(seed, real, fake, width):
    a, b = sets(seed, real, fake, width)
    assert fid(a, b) >= 0 and fid(a, b) == pytest.approx(fid(b, a), rel=1e-6, abs=1e-5)
    assert 0 <= fid(a, a) < 1e-5
    precision, recall = precision_recall(a, b)
    assert (recall, precision) == precision_recall(b, a)
    assert 0 <= precision <= 1 and 0 <= recall <= 1 and precision_recall(a, a) == (1, 1)
    density, coverage = density_coverage(a, b)
    assert 0 <= density <= real / 5 and 0 <= coverage <= 1 and (density > 0) == (coverage > 0)
    score, _ = inception_score(softmax(b))
    assert 1 - 1e-9 <= score <= min(width, fake) + 1e-9
