"""The processes against figures of the official code, diffusers' solver and their definitions."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import fill, formula
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dit import DiT
from gaussian_diffusion import (
    OBJECTIVES,
    FlowMatching,
    GaussianDiffusion,
    create_diffusion,
    create_process,
    discretized_gaussian_log_likelihood,
    get_named_beta_schedule,
    space_timesteps,
)

DATA = Path(__file__).parent / "data"
GOLDEN = np.load(DATA / "golden" / "diffusion.npz")  # made with the official code, float32
CASES = json.loads(str(GOLDEN["cases"]))
FLOW_GOLDEN = np.load(DATA / "flow" / "vectors.npz")  # made with the official SiT code, float32
FLOW_CASE = json.loads(str(FLOW_GOLDEN["case"]))


def golden_input(name, n):
    return formula(name, (n, *CASES["shape"]), CASES["seed"])


def toy(learn_sigma, denoiser=False):
    """The golden set's stand-in for a network; it sees original timesteps."""
    a, b, c, d, w, s = (CASES["toy"][k] for k in "abcdws")

    def model(x, t, y):
        u = t.to(x.dtype).view(-1, 1, 1, 1) / 1000
        label = torch.sin(y.to(x.dtype)).view(-1, 1, 1, 1)
        mixed = a * x + b * x.roll(1, 3) + c * x.roll(1, 1) + d * torch.cos(5 * u) + w * label
        eps = torch.tanh(mixed)
        if denoiser:
            eps = (1 - (1 - u) ** 3) * x + (1 - u) ** 2 * eps
        if not learn_sigma:
            return eps
        return torch.cat([eps, torch.sin(s * x.roll(1, 2) + 3 * u + 0.5)], dim=1)

    return model


def close(got, key, tolerance=1e-5):
    """Largest error over largest value: within the tolerance, or five times the rounding error
    that the official code itself makes."""
    want = torch.from_numpy(GOLDEN[key]).double()
    error = (got.expand(want.shape).double() - want).abs().max() / want.abs().max()
    limit = max(tolerance, 5 * CASES["float32_noise"].get(key, 0))
    assert error <= limit, f"{key}: {error:.2g} > {limit:.2g}"


# ----------------------------------------------------------------------------------- golden figures


@pytest.mark.parametrize("table", CASES["tables"])
def test_tables_equal_the_official_ones(table):
    schedule, respacing = table.split("|")
    diffusion = create_diffusion(respacing, schedule)
    keys = [key for key in GOLDEN.files if key.startswith(f"tab|{table}.")]
    golden = {key.rsplit(".", 1)[1]: GOLDEN[key] for key in keys}
    assert diffusion.timestep_map == golden["timestep_map"].tolist()
    np.testing.assert_allclose(diffusion.betas.numpy(), golden["betas"], rtol=1e-11, atol=1e-14)
    abar = diffusion.alphas_cumprod.numpy()
    np.testing.assert_allclose(abar, golden["alphas_cumprod"], rtol=1e-11, atol=1e-14)
    n = diffusion.num_timesteps
    one, zero, t = torch.ones(n, 1, 1, 1), torch.zeros(n, 1, 1, 1), torch.arange(n)
    coef1, variance, log_variance = diffusion.q_posterior_mean_variance(one, zero, t)
    coef2 = diffusion.q_posterior_mean_variance(zero, one, t)[0]
    for got, name in ((coef1, "posterior_mean_coef1"), (coef2, "posterior_mean_coef2"),
                      (variance, "posterior_variance"),
                      (log_variance, "posterior_log_variance_clipped")):
        got = got.flatten().numpy()
        np.testing.assert_allclose(got, golden[name], rtol=1e-6, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("point", CASES["points"], ids=lambda p: p["id"])
def test_single_steps_equal_the_official_ones(point):
    t, y, key = torch.tensor(point["t"]), torch.tensor(point["y"]), f"pt|{point['id']}"
    x_start, x_t, noise = (golden_input(name, len(t)) for name in ("x_start", "x_t", "noise"))
    for learn_sigma in (True, False):
        diffusion = create_diffusion(point["respacing"], point["schedule"], learn_sigma)
        close(diffusion.q_sample(0.7 * x_start, t, noise), f"{key}.q_sample")
        mean = diffusion.q_posterior_mean_variance(0.7 * x_start, x_t, t)[0]
        close(mean, f"{key}.q_posterior_mean")
        for clip in (True, False):
            p = diffusion.p_mean_variance(toy(learn_sigma), x_t, t, clip, dict(y=y))
            for name in ("mean", "log_variance", "pred_xstart"):
                close(p[name], f"{key}.pmv_sigma{int(learn_sigma)}_clip{int(clip)}.{name}")
            torch.testing.assert_close(p["variance"], p["log_variance"].exp())


@pytest.mark.parametrize("case", CASES["losses"], ids=lambda c: c["id"])
@pytest.mark.parametrize("learn_sigma", [True, False])
def test_losses_equal_the_official_ones(case, learn_sigma):
    t, y = torch.tensor(case["t"]), torch.tensor(case["y"])
    x_start = 0.7 * golden_input("loss_x_start", len(t))
    noise = 0.5 * golden_input("loss_noise", len(t))
    diffusion = create_diffusion(case["respacing"], case["schedule"], learn_sigma)
    losses = diffusion.training_losses(toy(learn_sigma), x_start, t, dict(y=y), noise)
    names = ("loss", "mse", "vb") if learn_sigma else ("loss", "mse")
    assert diffusion.loss_names == tuple(losses) == names
    for name, value in losses.items():
        close(value, f"loss|{case['id']}.sigma{int(learn_sigma)}.{name}")


@pytest.mark.parametrize(
    "case", CASES["loops"], ids=lambda c: f"{c['kind']}-{c['schedule']}-{c['respacing']}")
def test_sampling_loops_equal_the_official_ones(case):
    diffusion = create_diffusion(case["respacing"], case["schedule"], case["learn_sigma"])
    y, drawn = torch.tensor(CASES["loop_y"]), []

    def step_noise(i, x):
        drawn.append(i)
        return golden_input(f"noise{i}", len(x))

    loop = diffusion.p_sample_loop if case["kind"] == "p" else diffusion.ddim_sample_loop
    extra = {} if case["kind"] == "p" else dict(eta=case["eta"])
    x = loop(toy(case["learn_sigma"], denoiser=True), golden_input("loop_x_T", 2), dict(y=y),
             case["clip"], step_noise=step_noise, **extra)
    close(x, case["id"])
    stochastic = case["kind"] == "p" or case["eta"] > 0
    assert drawn == (list(range(diffusion.num_timesteps - 1, 0, -1)) if stochastic else [])


# -------------------------------------------------------------------------- schedules and respacing


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(["linear", "squaredcos_cap_v2"]), n=st.integers(21, 4000))
def test_schedules_add_noise_monotonically(name, n):
    betas = get_named_beta_schedule(name, n)
    assert betas.dtype == torch.float64 and betas.shape == (n,)
    assert (betas > 0).all() and (betas < 1).all() and (betas.diff() >= 0).all()
    abar = torch.cumprod(1 - betas, 0)
    assert (abar.diff() < 0).all() and abar[-1] < 0.01


def test_other_schedules_are_refused():
    with pytest.raises(ValueError, match="'quadratic'.*linear"):
        get_named_beta_schedule("quadratic", 1000)
    with pytest.raises(ValueError, match="more than 20"):
        get_named_beta_schedule("linear", 20)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), n=st.integers(1, 1500), sections=st.integers(1, 5))
def test_respacing_keeps_as_many_steps_as_asked(data, n, sections):
    sections = min(sections, n)
    lengths = [n // sections + (i < n % sections) for i in range(sections)]
    counts = [data.draw(st.integers(1, length)) for length in lengths]
    steps = space_timesteps(n, ",".join(map(str, counts)))
    assert steps == space_timesteps(n, counts)
    assert all(a < b for a, b in zip(steps, steps[1:], strict=False))
    assert 0 <= steps[0] <= steps[-1] < n
    start = 0
    for count, length in zip(counts, lengths, strict=True):
        assert sum(start <= step < start + length for step in steps) == count
        assert start in steps and (count == 1 or start + length - 1 in steps)
        start += length


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 1500), stride=st.integers(1, 300))
def test_ddim_respacing_has_one_stride(n, stride):
    steps = space_timesteps(n, f"ddim{len(range(0, n, stride))}")
    assert len(steps) == len(range(0, n, stride)) and steps[0] == 0
    assert len(set(np.diff(steps))) <= 1


@pytest.mark.parametrize(("respacing", "count", "ends"), [
    ("", 1000, (0, 999)), ("1", 1, (0, 0)), ("2", 2, (0, 999)), ("1000", 1000, (0, 999)),
    ("250", 250, (0, 999)), ("ddim50", 50, (0, 980)), ("10,15,20", 45, (0, 999)),
    ("trailing20", 20, (49, 999)), ("trailing1", 1, (999, 999)),
    ("trailing1000", 1000, (0, 999)), ("trailing999", 999, (0, 999))])
def test_edges_of_respacing(respacing, count, ends):
    steps = space_timesteps(1000, respacing)
    assert len(steps) == count and (steps[0], steps[-1]) == ends


@pytest.mark.parametrize(("respacing", "words"), [
    *[(r, "keep|stride") for r in CASES["bad_respacings"]],
    ("0", "keep 0 of 1000"), ("-5", "keep -5"), ("1001", "1 to 1000"), ("fifty", "'fifty'"),
    ("ddim", "'ddim'"), ("ddim0", "ddim0"), ("10,,20", "'10,,20'"),
    ("2.5", "'2.5'"), ("trailing0", "keep 0"), ("trailing1001", "1 to 1000"),
    ("trailing", "'trailing'"), ("trailing5,5", "'trailing5,5'"), ("ddim5,5", "'ddim5,5'")])
def test_impossible_respacings_are_refused_in_words(respacing, words):
    with pytest.raises(ValueError, match=words):
        create_diffusion(respacing)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 1000), name=st.sampled_from(["linear", "squaredcos_cap_v2"]))
def test_a_respaced_process_agrees_with_the_long_one(count, name):
    short, long = create_diffusion(str(count), name), create_diffusion("", name)
    kept = long.alphas_cumprod[short.timestep_map]
    torch.testing.assert_close(short.alphas_cumprod, kept, rtol=1e-10, atol=1e-15)
    assert short.num_timesteps == len(short.sigmas) == count
    assert short.sigmas[-1] == pytest.approx(math.sqrt(1 / kept[-1] - 1), rel=1e-6)


# ----------------------------------------------------------------------------------------- one step


def test_posterior_is_bayes_rule():
    """N(x_{t-1}; from x_0) N(x_t; from x_{t-1}), multiplied and normalised on a grid."""
    diffusion, t, x0, x_t = create_diffusion("50"), 20, 0.3, -0.8
    abar, beta = diffusion.alphas_cumprod.tolist(), diffusion.betas[t].item()
    grid = torch.linspace(-6, 6, 200001, dtype=torch.float64)
    log_p = -(grid - math.sqrt(abar[t - 1]) * x0) ** 2 / (2 * (1 - abar[t - 1])) - (
        x_t - math.sqrt(1 - beta) * grid) ** 2 / (2 * beta)
    p = log_p.softmax(0)
    mean = (p * grid).sum()
    shaped = lambda value: torch.full((1, 1, 1, 1), value)
    got, variance, _ = diffusion.q_posterior_mean_variance(
        shaped(x0), shaped(x_t), torch.tensor([t]))
    assert got.item() == pytest.approx(mean.item(), rel=1e-5)
    assert variance.item() == pytest.approx((p * (grid - mean) ** 2).sum().item(), rel=1e-5)


def test_noise_and_x_start_are_recovered():
    diffusion, t = create_diffusion(learn_sigma=False), torch.tensor([0, 500, 999])
    x_start, noise = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4)
    x_t = diffusion.q_sample(x_start, t, noise)
    assert x_t[2].std().item() == pytest.approx(noise[2].std().item(), rel=0.02)
    p = diffusion.p_mean_variance(lambda x, t: noise, x_t, t)
    torch.testing.assert_close(p["pred_xstart"][:2], x_start[:2], atol=2e-5, rtol=0)
    # Here the error is divided by sqrt(abar) = 0.006.
    torch.testing.assert_close(p["pred_xstart"][2], x_start[2], atol=1e-3, rtol=0)


def test_learned_variance_spans_beta_tilde_to_beta():
    diffusion, t = create_diffusion("100"), torch.tensor([0, 1, 60])
    x = torch.zeros(3, 1, 2, 2)
    log_beta = diffusion.betas.log()[t].float().view(-1, 1, 1, 1)
    log_beta_tilde = diffusion.q_posterior_mean_variance(x, x, t)[2]
    halfway = (log_beta + log_beta_tilde) / 2
    for second_half, expected in ((-1.0, log_beta_tilde), (0.0, halfway), (1.0, log_beta)):
        model = lambda x, t, value=second_half: torch.cat([x, torch.full_like(x, value)], 1)
        p = diffusion.p_mean_variance(model, x, t)
        torch.testing.assert_close(p["log_variance"], expected.expand_as(x))


def test_results_are_float32_in_mixed_precision():
    diffusion, t = create_diffusion(), torch.tensor([3, 700])
    x = torch.randn(2, 1, 4, 4)
    model = lambda x, t: torch.cat([x, x], 1).bfloat16()
    assert diffusion.q_sample(x.bfloat16(), t, x.bfloat16()).dtype == torch.float32
    assert diffusion.p_mean_variance(model, x, t)["mean"].dtype == torch.float32
    assert diffusion.training_losses(model, x, t)["vb"].dtype == torch.float32
    exact = lambda x, t: model(x, t).float()
    got, expected = (diffusion.p_mean_variance(f, x, t)["log_variance"] for f in (model, exact))
    assert torch.equal(got, expected)


def test_a_model_of_other_channels_is_refused():
    x, t = torch.zeros(1, 2, 4, 4), torch.tensor([0])
    with pytest.raises(ValueError, match="2 channels, learn_sigma=True needs 4"):
        create_diffusion().training_losses(lambda x, t: x, x, t)
    with pytest.raises(ValueError, match="4 channels, learn_sigma=False needs 2"):
        create_diffusion(learn_sigma=False).p_mean_variance(lambda x, t: torch.cat([x, x], 1), x, t)


# ----------------------------------------------------------------------------------------- the loss


def test_vb_trains_the_variance_alone():
    diffusion, t = create_diffusion(), torch.tensor([0, 1, 400])
    output = torch.randn(3, 4, 4, 4, requires_grad=True)
    losses = diffusion.training_losses(lambda x, t: output, torch.rand(3, 2, 4, 4), t)
    gradient, = torch.autograd.grad(losses["vb"].sum(), output, retain_graph=True)
    assert (gradient[:, :2] == 0).all() and (gradient[:, 2:] != 0).any(dim=(1, 2, 3)).all()
    gradient, = torch.autograd.grad(losses["mse"].sum(), output)
    assert (gradient[:, :2] != 0).all() and (gradient[:, 2:] == 0).all()


def test_loss_vanishes_for_the_true_noise_and_variance():
    """With the true noise and beta~, p equals q: no mse, and no KL but for step 0's likelihood."""
    diffusion, t = create_diffusion(), torch.tensor([1, 10, 999])
    x, noise = torch.rand(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    perfect = lambda x_t, t: torch.cat([noise, torch.full_like(noise, -1)], 1)
    losses = diffusion.training_losses(perfect, x, t, noise=noise)
    assert losses["mse"].abs().max() == 0 and losses["vb"].abs().max() < 1e-5


def test_each_sample_has_its_own_loss():
    diffusion, x, noise = create_diffusion(), torch.rand(4, 1, 4, 4), torch.randn(4, 1, 4, 4)
    t, model = torch.tensor([0, 5, 500, 999]), lambda x, t: torch.cat([x.sin(), x.cos()], 1)
    together = diffusion.training_losses(model, x, t, noise=noise)
    for i in range(4):
        alone = diffusion.training_losses(model, x[i : i + 1], t[i : i + 1], noise=noise[i : i + 1])
        assert all(torch.equal(alone[name], together[name][i : i + 1]) for name in together)


def test_discretized_likelihood_is_a_distribution_over_levels():
    levels = torch.arange(256) / 127.5 - 1
    log_likelihood = lambda x, mean, scale: discretized_gaussian_log_likelihood(
        x, torch.tensor(mean), torch.tensor(math.log(scale)))
    for mean, scale in ((0.0, 0.05), (-1.2, 0.3), (0.999, 1e-3), (0.1, 2.0)):
        assert log_likelihood(levels, mean, scale).exp().sum().item() == pytest.approx(1, abs=2e-4)
    likeliest = levels[log_likelihood(levels, 0.1, 0.05).argmax()].item()
    assert likeliest == pytest.approx(0.1, abs=1 / 255)
    normal = torch.distributions.Normal(0.0, 0.05)
    exact = (normal.cdf(levels[140] + 1 / 255) - normal.cdf(levels[140] - 1 / 255)).log().item()
    got = log_likelihood(levels[140], 0.0, 0.05).item()
    assert got == pytest.approx(exact, abs=1e-2)  # the tanh approximation


# ----------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("steps", ["1", "2", "20", "50", "ddim25", "trailing5", "trailing20"])
def test_dpm_solver_equals_diffusers(schedule, steps):
    from diffusers import DPMSolverMultistepScheduler

    betas = get_named_beta_schedule(schedule, 1000)
    # The cosine's last step has noise level 20,000, too much for float32's differences.
    kept = [min(step, 980) for step in space_timesteps(1000, steps)]
    diffusion = GaussianDiffusion(betas, kept)
    scheduler = DPMSolverMultistepScheduler(
        trained_betas=betas.numpy(), algorithm_type="dpmsolver++", solver_order=2,
        solver_type="midpoint", final_sigmas_type="zero")
    scheduler.set_timesteps(timesteps=diffusion.timestep_map[::-1])
    model, y, x = toy(True, denoiser=True), torch.tensor([1, 4]), golden_input("loop_x_T", 2)
    expected = x
    for t in scheduler.timesteps:
        expected = scheduler.step(model(expected, t.repeat(2), y)[:, :4], t, expected).prev_sample
    got = diffusion.dpm_solver_sample_loop(model, x, dict(y=y))
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def test_trailing_steps_are_diffusers():
    from diffusers import DPMSolverMultistepScheduler

    for count in (1, 5, 20, 250):
        scheduler = DPMSolverMultistepScheduler(timestep_spacing="trailing")
        scheduler.set_timesteps(count)
        assert scheduler.timesteps.tolist() == space_timesteps(1000, f"trailing{count}")[::-1]


def exact_gaussian(std):
    """The optimal eps for data N(0, std^2), whose sampling ODE has a known solution."""
    long = create_diffusion("")

    def model(x, t):
        abar = long.alphas_cumprod[t].float()[:, None, None, None]
        return (1 - abar).sqrt() * x / (abar * std**2 + 1 - abar)

    return model


def test_dpm_solver_is_of_second_order():
    """On Gaussian data, twice the steps make a quarter of the error; DDIM's only halves."""
    std, x, model = 0.5, torch.randn(2, 1, 4, 4), exact_gaussian(0.5)

    def errors(count):
        diffusion = create_diffusion(f"trailing{count}", learn_sigma=False)
        abar = diffusion.alphas_cumprod[-1].item()
        truth = x * std / math.sqrt(abar * std**2 + 1 - abar)
        return [(loop(model, x) - truth).abs().max().item()
                for loop in (diffusion.dpm_solver_sample_loop, diffusion.ddim_sample_loop)]

    (dpm10, ddim10), (dpm20, ddim20), (dpm40, ddim40) = errors(10), errors(20), errors(40)
    assert dpm10 / dpm20 > 3.5 and dpm20 / dpm40 > 3.5
    assert ddim10 / ddim20 < 2.5 and ddim20 / ddim40 < 2.5
    assert dpm20 < ddim20 / 2


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_samplers_reach_the_data_distribution(eta):
    """Gaussian data of standard deviation 0.5 come out with it, however much noise is added."""
    diffusion = create_diffusion("500", learn_sigma=False)
    torch.manual_seed(0)
    model, noise = exact_gaussian(0.5), torch.randn(64, 1, 16, 16)
    std = diffusion.ddim_sample_loop(model, noise, eta=eta).std().item()
    assert std == pytest.approx(0.5, rel=0.03)
    if eta == 1:
        assert diffusion.p_sample_loop(model, noise).std().item() == pytest.approx(0.5, rel=0.03)


def test_ddim_at_eta_one_draws_with_ddpms_small_variance():
    """DDIM (16) at eta 1 is beta~: the same noise gives DDPM's answer with that variance."""
    diffusion, x = create_diffusion("25"), golden_input("loop_x_T", 2)
    toy_model, y = toy(True, denoiser=True), torch.tensor([1, 4])
    model = lambda x, t: torch.cat([toy_model(x, t, y)[:, :4], torch.full_like(x, -1)], 1)
    step_noise = lambda i, x: golden_input(f"noise{i}", len(x))
    ddpm = diffusion.p_sample_loop(model, x, step_noise=step_noise)
    ddim = diffusion.ddim_sample_loop(model, x, eta=1.0, step_noise=step_noise)
    torch.testing.assert_close(ddim, ddpm, rtol=1e-4, atol=1e-5)


LOOPS = {"ddpm": "p_sample_loop", "ddim": "ddim_sample_loop", "dpm++": "dpm_solver_sample_loop"}


@pytest.mark.parametrize("sampler", LOOPS)
def test_loops_report_steps_clip_and_pass_arguments(sampler):
    diffusion, reported, called = create_diffusion("6"), [], []

    def model(x, t, scale):
        called.append((t.tolist(), scale))
        return torch.cat([x * 0.1 - 3, x * 0], 1)

    x = getattr(diffusion, LOOPS[sampler])(
        model, torch.randn(2, 1, 4, 4), dict(scale=7), clip_denoised=True,
        on_step=lambda i, x, pred_x0: reported.append((i, x.clone(), pred_x0.clone())))
    assert [i for i, _, _ in reported] == [5, 4, 3, 2, 1, 0]
    assert called == [([step, step], 7) for step in reversed(diffusion.timestep_map)]
    assert torch.equal(reported[-1][1], x)
    assert torch.equal(reported[-1][2], x)  # the last step ends at the predicted x_0
    assert all(pred_x0.abs().max() <= 1 for _, _, pred_x0 in reported) and x.max() <= 1


@pytest.mark.parametrize("sampler", LOOPS)
def test_samplers_by_name_and_their_noise_levels(sampler):
    """`sample` is the loop of that name; noise_levels has those that the network sees."""
    diffusion, x, steps = create_diffusion("6"), golden_input("loop_x_T", 2), []
    toy_model, y = toy(True, denoiser=True), torch.tensor([1, 4])

    def model(x, t):
        steps.append(t[0].item())
        return toy_model(x, t, y)

    settings = dict(clip_denoised=True)
    if sampler != "dpm++":
        settings["step_noise"] = lambda i, x: golden_input(f"noise{i}", len(x))
    if sampler == "ddim":
        settings["eta"] = 0.5
    expected = getattr(diffusion, LOOPS[sampler])(model, x, **settings)
    steps.clear()
    assert torch.equal(diffusion.sample(sampler, model, x, **settings), expected)
    abar = create_diffusion().alphas_cumprod[steps]
    assert diffusion.noise_levels(sampler) == pytest.approx(((1 - abar) / abar).sqrt().tolist())


def test_unknown_samplers_are_refused():
    diffusion, x = create_diffusion("6"), torch.zeros(1, 1, 4, 4)
    with pytest.raises(ValueError, match="ddpm has no sampler 'euler': use one of ddpm, ddim, dpm"):
        diffusion.sample("euler", lambda x, t: x, x)
    with pytest.raises(ValueError, match="no sampler 'heun'"):
        diffusion.noise_levels("heun")


# ------------------------------------------------------------------------------ what trainers ask


def test_times_are_uniform_steps_of_the_generator():
    diffusion = create_diffusion("50")
    expected = torch.randint(50, (1000,), generator=torch.Generator().manual_seed(3))
    t = diffusion.draw_times(1000, torch.Generator().manual_seed(3))
    assert torch.equal(t, expected) and set(t.tolist()) == set(range(50))


# ------------------------------------------------------------------------ flow matching against SiT


FLOW_LOOPS = {"euler": "euler_sample_loop", "heun": "heun_sample_loop", "sde": "sde_sample_loop"}


@pytest.fixture(scope="module")
def flow_model():
    return fill(DiT(**FLOW_CASE["config"]), FLOW_CASE["seed"]).requires_grad_(False)


def flow_input(name, n=2):
    return formula(f"flow_{name}", (n, 4, 8, 8), FLOW_CASE["seed"])


def flow_labels(n=2):
    return dict(y=torch.tensor(FLOW_CASE["y"][:n]))


def flow_close(got, key):
    want = torch.from_numpy(FLOW_GOLDEN[key])
    assert got.shape == want.shape
    error = ((got - want).abs().max() / want.abs().max()).item()
    assert error <= 2e-5, f"{key}: {error:.2g}"


def ignored_half(model):
    """The model without its second half of channels, as learn_sigma False would have it."""
    return lambda x, t, **kwargs: model(x, t, **kwargs).chunk(2, dim=1)[0]


@pytest.mark.parametrize("key", [key for key in FLOW_GOLDEN.files if key[:4] in ("ode_", "sde_")])
def test_flow_loops_equal_the_official_ones(flow_model, key):
    """Also with the other network time, when the network undoes it, and without a second half."""
    sampler, steps = key.removeprefix("ode_").split("_")[:2]
    steps = int(steps)
    network, kwargs = flow_model, flow_labels()
    if "cfg" in key:
        network, kwargs = flow_model.forward_with_cfg, kwargs | dict(cfg_scale=2.0)

    def step_noise(i, x):
        drawn.append(i)
        return flow_input(f"step_noise_{steps - 1 - i}")

    in_ddpm_time = lambda x, time, **kwargs: network(x, 1 - time / 1000, **kwargs)
    for network_time, model in (
            ("sit", network), ("sit", ignored_half(network)), ("ddpm", in_ddpm_time)):
        drawn = []
        settings = dict(step_noise=step_noise) if sampler == "sde" else {}
        loop = getattr(FlowMatching(steps, network_time), FLOW_LOOPS[sampler])
        flow_close(loop(model, flow_input("z"), kwargs, **settings), key)
        assert drawn == (list(range(steps - 1, 0, -1)) if sampler == "sde" else [])


def test_flow_losses_equal_the_official_ones(flow_model):
    t, seen = torch.tensor(FLOW_CASE["t"]), []

    def spy(x, time, y):
        seen.append(time)
        return flow_model(x, time, y)

    arguments = 0.7 * flow_input("x_start", 4), t, flow_labels(4), flow_input("noise", 4)
    losses = FlowMatching(1, "sit").training_losses(spy, *arguments)
    assert FlowMatching(1).loss_names == tuple(losses) == ("loss", "mse")
    flow_close(losses["loss"], "loss")
    assert torch.equal(losses["mse"], losses["loss"]) and torch.equal(seen[0], t)
    alone = FlowMatching(1, "sit").training_losses(ignored_half(flow_model), *arguments)
    assert torch.equal(alone["loss"], losses["loss"])
    FlowMatching(1, "ddpm").training_losses(spy, *arguments)
    torch.testing.assert_close(seen[1], 1000 * (1 - t))


# ------------------------------------------------------------------ flow matching by its definition


def straight(x_start):
    """The velocity, in SiT's time, that leads from anywhere straight to x_start."""
    return lambda x, t: (x_start - x) / (1 - t).clamp(min=1e-3)[:, None, None, None]


def gaussian_velocity(std):
    """The optimal velocity for data N(0, std^2), of SiT's time: E[x_0 - eps | x_t]."""
    def model(x, t):
        t = t[:, None, None, None]
        return (t * std**2 - (1 - t)) / ((t * std) ** 2 + (1 - t) ** 2) * x

    return model


def test_a_network_that_predicts_the_data_is_one_of_the_velocity():
    """Its loss and its samples are those of (x_0 - x) / (1 - t), the velocity that it means."""
    x_start, noise = torch.rand(4, 2, 4, 4) * 2 - 1, torch.randn(4, 2, 4, 4)
    share = lambda time: time[:, None, None, None] / 1000  # 1 - t
    guess = lambda x, time: (0.3 * x + share(time)).tanh()
    slope = lambda x, time: (guess(x, time) - x) / share(time).clamp(min=0.05)
    data, velocity = create_process("jit", "euler", 7), create_process("flow", "euler", 7)
    t = torch.tensor([0.0, 0.3, 0.9, 0.99])
    losses = [process.training_losses(model, x_start, t, noise=noise)["loss"]
              for process, model in ((data, guess), (velocity, slope))]
    torch.testing.assert_close(losses[0][:3], losses[1][:3])  # the same up to t = 0.95
    error = (guess(data.q_sample(x_start, t, noise), 1000 * (1 - t)) - x_start).square()
    expected = error.flatten(1).mean(1) / (1 - t).clamp(min=0.05) ** 2
    torch.testing.assert_close(losses[0], expected)
    for sampler in data.samplers:
        draw = lambda i, x: torch.ones_like(x)
        samples = [process.sample(sampler, model, noise, step_noise=draw)
                   for process, model in ((data, guess), (velocity, slope))]
        torch.testing.assert_close(*samples)
    # A perfect guess leads there, whatever the noise.
    got = data.sample("euler", lambda x, time: x_start, noise)
    torch.testing.assert_close(got, x_start, atol=1e-5, rtol=0)


def test_a_perfect_velocity_gives_the_data_in_one_step():
    x_start, noise = torch.rand(3, 2, 4, 4) * 2 - 1, torch.randn(3, 2, 4, 4)
    velocity = lambda x, time: x_start - noise
    for steps in (1, 2, 7):
        for sampler in ("euler", "heun"):
            got = FlowMatching(steps).sample(sampler, velocity, noise)
            torch.testing.assert_close(got, x_start, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        FlowMatching(1, "sit").euler_sample_loop(straight(x_start), noise), x_start)
    losses = FlowMatching(1).training_losses(velocity, x_start, torch.rand(3), noise=noise)
    assert (losses["loss"] == 0).all()


def test_q_sample_goes_from_noise_to_data():
    x_start, noise = torch.rand(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    x_t = FlowMatching(1).q_sample(x_start, torch.tensor([0.0, 0.25, 1.0]), noise)
    assert torch.equal(x_t[0], noise[0]) and torch.equal(x_t[2], x_start[2])
    torch.testing.assert_close(x_t[1], 0.25 * x_start[1] + 0.75 * noise[1])


def test_heun_is_of_second_order():
    """On Gaussian data the ODE's answer is noise x std: Heun's error falls as 1 / steps^2."""
    noise, model = torch.randn(2, 1, 4, 4), gaussian_velocity(0.5)

    def errors(steps):
        return [(FlowMatching(steps, "sit").sample(sampler, model, noise) - 0.5 * noise).abs().max()
                for sampler in ("euler", "heun")]

    (euler10, heun10), (euler20, heun20) = errors(10), errors(20)
    assert heun10 / heun20 > 3.3 and 1.5 < euler10 / euler20 < 2.5 and heun20 < euler20 / 5


def test_the_sde_has_the_marginals_of_the_paths():
    torch.manual_seed(0)
    noise, stds = torch.randn(64, 1, 16, 16), []
    flow = FlowMatching(250, "sit")
    keep = lambda i, x, pred_x0: stds.append(x.std().item())
    x = flow.sde_sample_loop(gaussian_velocity(0.5), noise, on_step=keep)
    assert x.std().item() == pytest.approx(0.5, rel=0.03)
    for i in (200, 125, 50):
        t = 0.96 * (250 - i) / 249  # after step i
        expected = math.hypot(0.5 * t, 1 - t)
        assert stds[249 - i] == pytest.approx(expected, rel=0.02)


def test_the_sde_ends_without_noise():
    """Its last step is Euler's along the drift, 0.04 long; noise is drawn in the others alone."""
    x, velocity = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    drawn, after = [], []
    got = FlowMatching(2).sde_sample_loop(
        lambda x, time: velocity, x, step_noise=lambda i, x: drawn.append(i) or torch.ones(1),
        on_step=lambda i, x, pred_x0: after.append(x))
    torch.testing.assert_close(after[0], x + 0.96 * (velocity - x) + math.sqrt(2 * 0.96))
    torch.testing.assert_close(got, after[0] + 0.04 * (1.96 * velocity - after[0]))
    assert drawn == [1]
    first, second = (FlowMatching(20).sde_sample_loop(lambda x, time: 0 * x, x) for _ in "12")
    assert not torch.equal(first, second)  # fresh noise, unless it is given


@pytest.mark.parametrize("network_time", ["ddpm", "sit"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("sampler", FLOW_LOOPS)
def test_flow_noise_levels_are_those_of_the_calls(sampler, steps, network_time):
    """`sample` is the loop of that name; noise_levels has those that the network sees."""
    steps = max(steps, 2) if sampler == "sde" else steps
    flow, times = FlowMatching(steps, network_time), []

    def model(x, time, scale):
        assert time.shape == (2,) and time.dtype == torch.float32 and time[0] == time[1]
        times.append(1 - time[0].item() / 1000 if network_time == "ddpm" else time[0].item())
        return scale * x

    settings = dict(model_kwargs=dict(scale=0.5))
    if sampler == "sde":
        settings["step_noise"] = lambda i, x: flow_input(f"z{i}")
    x = flow.sample(sampler, model, flow_input("z"), **settings)
    expected = [(1 - t) / max(t, 1e-9) for t in times]
    levels = flow.noise_levels(sampler)
    assert len(levels) == steps * (2 if sampler == "heun" else 1)
    if (sampler, steps) != ("sde", 1):  # which starts at t = 0.96
        assert levels.pop(0) == math.inf and expected.pop(0) > 1e8
    assert levels == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert sampler != "heun" or levels[-1] == 0
    assert torch.equal(x, getattr(flow, FLOW_LOOPS[sampler])(model, flow_input("z"), **settings))


@pytest.mark.parametrize("sampler", FLOW_LOOPS)
def test_flow_loops_report_the_predicted_x_start(sampler):
    flow, calls, reported = FlowMatching(4, "sit"), [], []

    def model(x, t):
        calls.append((x, t[0].item(), x.sin()))
        return x.sin()

    x = flow.sample(sampler, model, flow_input("z"),
                    on_step=lambda i, x, pred_x0: reported.append((i, x, pred_x0)))
    assert [i for i, _, _ in reported] == [3, 2, 1, 0] and torch.equal(reported[-1][1], x)
    first_of_step = calls[::2] if sampler == "heun" else calls
    for (_, _, pred_x0), (before, t, velocity) in zip(reported, first_of_step, strict=True):
        torch.testing.assert_close(pred_x0, before + (1 - t) * velocity)
    if sampler == "euler":
        torch.testing.assert_close(reported[-1][2], x)  # the last step ends at the predicted x_0


@pytest.mark.parametrize("sampler", FLOW_LOOPS)
def test_flow_clips_the_predicted_x_start(sampler):
    """A velocity that aims at 3 becomes the one that aims at 1, where the last step ends."""
    noise, predicted, flow = flow_input("z"), [], FlowMatching(6, "sit")
    settings = {} if sampler != "sde" else dict(step_noise=lambda i, x: flow_input(f"z{i}"))
    # At t = 1, where Heun's last step ends, no velocity is changed: give the same one in all.
    aims_at = lambda x_start: lambda x, t: 1 - x if t[0] == 1 else straight(x_start)(x, t)
    clipped = flow.sample(sampler, aims_at(3.0), noise, clip_denoised=True, **settings,
                          on_step=lambda i, x, pred_x0: predicted.append(pred_x0))
    torch.testing.assert_close(clipped, torch.ones_like(noise), rtol=1e-5, atol=2e-6)
    assert all(torch.equal(pred_x0, torch.ones_like(noise)) for pred_x0 in predicted)

    # Within [-1, 1] nothing changes before the last step.
    states = {clip: [] for clip in (False, True)}
    for clip, seen in states.items():
        flow.sample(sampler, aims_at(0.5), noise, clip_denoised=clip, **settings,
                    on_step=lambda i, x, pred_x0, seen=seen: seen.append(x))
    for plain, clipped in zip(states[False][:-1], states[True][:-1], strict=True):
        torch.testing.assert_close(clipped, plain, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(states[True][-1], torch.full_like(noise, 0.5), rtol=1e-5, atol=2e-6)


def test_flow_is_float32_in_mixed_precision():
    flow, x, t = FlowMatching(3), torch.randn(2, 1, 4, 4), torch.rand(2)
    model = lambda x, time: x.bfloat16()
    assert flow.q_sample(x.bfloat16(), t, x.bfloat16()).dtype == torch.float32
    assert flow.training_losses(model, x, t)["loss"].dtype == torch.float32
    assert all(flow.sample(sampler, model, x).dtype == torch.float32 for sampler in flow.samplers)


def test_logit_normal_times_favour_the_middle():
    draw = lambda sampling, seed: FlowMatching(1, time_sampling=sampling).draw_times(
        20000, torch.Generator().manual_seed(seed))
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    normal = torch.distributions.Normal(0.0, 1.0)
    logit_normal = normal.icdf(levels).sigmoid()
    for sampling, quantiles in (("uniform", levels), ("logit-normal", logit_normal)):
        t = draw(sampling, 0)
        assert t.shape == (20000,) and t.dtype == torch.float32 and 0 <= t.min() <= t.max() <= 1
        torch.testing.assert_close(t.quantile(levels), quantiles, rtol=0, atol=0.012)
        assert torch.equal(t, draw(sampling, 0)) and not torch.equal(t, draw(sampling, 1))


def test_what_flow_cannot_do_is_refused():
    x = torch.zeros(1, 2, 4, 4)
    for arguments, words in (
            (dict(num_timesteps=0), "cannot take 0 steps"),
            (dict(num_timesteps=5, network_time="edm"), "'edm': use ddpm or sit"),
            (dict(num_timesteps=5, time_sampling="cosine"), "'cosine': use uniform, logit-normal")):
        with pytest.raises(ValueError, match=words):
            FlowMatching(**arguments)
    with pytest.raises(ValueError, match="3 channels, not 2 or twice that"):
        FlowMatching(1).euler_sample_loop(lambda x, time: torch.zeros(1, 3, 4, 4), x)
    for use in (FlowMatching(1).noise_levels, lambda name: FlowMatching(1).sample(name, None, x)):
        with pytest.raises(ValueError, match="flow has no sampler 'ddim': use one of euler, heun"):
            use("ddim")
    with pytest.raises(ValueError, match="sde needs 2 or more steps"):
        FlowMatching(1).sde_sample_loop(lambda x, time: x, x)


# ------------------------------------------------------------------------- one constructor for both


def test_create_process_follows_the_objective():
    for objective in OBJECTIVES:
        assert create_process(objective).objective == objective
    assert create_process().num_timesteps == 1000 and create_process().learn_sigma
    assert create_process("flow").network_time == "ddpm"
    assert create_process("sit").network_time == "sit"
    assert create_process("sit", time_sampling="logit-normal").time_sampling == "logit-normal"
    assert create_process("flow", "heun", 7).num_timesteps == 7
    assert create_process("ddpm", "ddim", 20, learn_sigma=False).learn_sigma is False
    for sampler, respacing in (("ddpm", "20"), ("ddim", "20"), ("dpm++", "trailing20")):
        process = create_process("ddpm", sampler, 20)
        assert process.timestep_map == create_diffusion(respacing).timestep_map


@pytest.mark.parametrize(("arguments", "words"), [
    (dict(objective="edm"), "'edm': use one of ddpm, flow, sit"),
    (dict(objective="ddpm", sampler="heun", num_sampling_steps=5), "ddpm has no sampler 'heun'"),
    (dict(objective="sit", sampler="ddpm", num_sampling_steps=5), "sit has no sampler 'ddpm'"),
    (dict(objective="ddpm", sampler="ddpm", num_sampling_steps=1001), "1 to 1000"),
    (dict(objective="ddpm", sampler="dpm++", num_sampling_steps=0), "keep 0"),
    (dict(objective="flow", sampler="euler", num_sampling_steps=0), "cannot take 0 steps"),
    (dict(objective="ddpm", time_sampling="logit-normal"), "flow, sit and jit alone")])
def test_create_process_refuses_in_words(arguments, words):
    with pytest.raises(ValueError, match=words):
        create_process(**arguments)


# ------------------------------------------------------------------------------------------ devices


class Operations(TorchDispatchMode):
    """Records each operation's name, and its results' devices and dtypes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.append((operation.__name__, result.device.type, result.dtype))
        return result

    def copies(self):
        return [name for name, device, _ in self.seen if "_to_copy" in name and device == "meta"]


def test_a_device_gets_float32_tables_once():
    """No float64, which some devices lack; and no copy from the host in the steps of a loop."""
    diffusion = GaussianDiffusion(get_named_beta_schedule("linear", 1000), range(0, 1000, 100))
    x, model = torch.empty(2, 1, 4, 4, device="meta"), lambda x, t: torch.cat([x, x], 1)
    with Operations() as first:
        diffusion.p_sample_loop(model, x)
    with Operations() as second:
        for process in (diffusion, FlowMatching(3)):
            for sampler in process.samplers:
                assert process.sample(sampler, model, x).device.type == "meta"
    assert first.copies() and not second.copies()
    assert not [entry for entry in first.seen + second.seen if entry[1:] == ("meta", torch.float64)]


def test_the_process_does_no_work_in_numpy():
    source = Path(__file__).parent.parent.joinpath("gaussian_diffusion.py").read_text()
    assert "numpy" not in source and "import torch\n" in source
