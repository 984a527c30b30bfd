"""The diffusion process: noise schedules, the training loss, and three samplers. Read dit.py first.

DDPM (Ho et al., 2020), IDDPM (Nichol & Dhariwal, 2021), DDIM (Song et al., 2021), DPM-Solver++ (Lu et al., 2022).
With alpha_t = 1 - beta_t, abar_t = alpha_1 ... alpha_t and eps a standard normal:

    q(x_t | x_0)         x_t  = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                             DDPM (4)
    the network's eps    x_0 ~= (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)                         DDPM (15)
    q(x_{t-1}|x_t,x_0)   mean = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0
                              + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
                         beta~_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t                           DDPM (6), (7)
    learned variance     Sigma = exp(v log beta_t + (1 - v) log beta~_t)                            IDDPM (15)
    loss                 |eps - eps_theta|^2 + L_vb, where L_vb trains v alone                      IDDPM (16)

Steps count from 0 (least noise) to num_timesteps - 1, so step 0 here is t = 1 in the papers. Respacing keeps a subset
of the original 1000 steps and joins what lies between: abar stays the same at the steps kept (IDDPM, section 4).
Coefficients are computed in float64 and applied in float32.
"""

import math

import torch


def get_named_beta_schedule(name, num_timesteps):
    """The betas, float64 (num_timesteps,): "linear" (DDPM, section 4) or "squaredcos_cap_v2" (IDDPM, equation 17).

    Raises ValueError for another name, and for a length at which a beta would not be between 0 and 1.
    """
    if name == "linear":  # 1e-4 to 0.02 at 1000 steps; at other lengths about the same noise in all
        if num_timesteps <= 20:
            raise ValueError(f"a linear schedule needs more than 20 steps, not {num_timesteps}")
        return torch.linspace(0.1 / num_timesteps, 20 / num_timesteps, num_timesteps, dtype=torch.float64)
    if name == "squaredcos_cap_v2":
        time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown noise schedule {name!r}: use linear or squaredcos_cap_v2")


def space_timesteps(num_timesteps, section_counts):
    """The original steps to keep, ascending ints. section_counts, a string or a list of ints, says how many:

    "" all; "250" spread evenly from first to last; "10,15,20" that many from each equal section, the least noisy first;
    "ddim50" 50 steps with an integer stride from step 0 (DDIM, appendix D.3); "trailing20" spread evenly to the last,
    starting one stride from no noise: for DPM-Solver++, which loses its order if its last stride, in log signal to
    noise, is many times the one before. Raises ValueError for anything else, and when there are not so many steps.
    """
    if section_counts == "":
        return list(range(num_timesteps))
    text = section_counts if isinstance(section_counts, str) else ",".join(map(str, section_counts))
    kind = next((word for word in ("ddim", "trailing") if text.startswith(word)), "")
    try:
        counts = [int(count) for count in text.removeprefix(kind).split(",")]
    except ValueError:
        raise ValueError(f"respacing {text!r} is none of '', '250', '10,15,20', 'ddim50', 'trailing20'") from None
    if kind == "ddim":
        for stride in range(1, num_timesteps + 1):
            steps = list(range(0, num_timesteps, stride))
            if counts == [len(steps)]:
                return steps
        raise ValueError(f"respacing {text!r}: no integer stride keeps so many of {num_timesteps} steps")
    if kind == "trailing" and counts[1:] == [] and 1 <= counts[0] <= num_timesteps:
        return [num_timesteps * (k + 1) // counts[0] - 1 for k in range(counts[0])]
    size, extra = divmod(num_timesteps, len(counts))  # the first `extra` sections are one longer
    steps, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 1 <= count <= length:
            raise ValueError(f"cannot keep {count} of {length} steps: choose 1 to {length}")
        stride, position = (length - 1) / max(1, count - 1), 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride  # summed, not multiplied: ties round as in the official code
        start += length
    return steps


def create_diffusion(timestep_respacing="", noise_schedule="linear", learn_sigma=True):
    """The process of the official DiT: 1000 steps, of which timestep_respacing keeps some. ValueError as above."""
    betas = get_named_beta_schedule(noise_schedule, 1000)
    return GaussianDiffusion(betas, space_timesteps(1000, timestep_respacing), learn_sigma)


class GaussianDiffusion:
    """A diffusion process over the steps timestep_map (ascending ints) of a process with these betas, float64 (T,).

    In every method x is (N, C, H, W), t is int64 (N,), steps of this process, and `model` is a callable
    model(x, t, **model_kwargs) that gets original timesteps and returns the predicted noise (N, C, H, W); with
    learn_sigma (N, 2C, H, W), the second half being v, scaled to [-1, 1]. Another number of channels is a ValueError.
    """

    def __init__(self, betas, timestep_map, learn_sigma=True):
        self.timestep_map = list(timestep_map)
        self.num_timesteps = len(self.timestep_map)
        self.learn_sigma = learn_sigma
        kept = torch.cumprod(1 - betas, 0)[self.timestep_map]
        one = torch.ones(1, dtype=torch.float64)
        self.betas = betas = 1 - kept / torch.cat([one, kept[:-1]])  # each joins the steps since the one kept before
        self.alphas_cumprod = abar = torch.cumprod(1 - betas, 0)
        self.sigmas = (1 / abar - 1).sqrt().tolist()  # noise levels: noise over signal
        before = torch.cat([one, abar[:-1]])
        variance = betas * (1 - before) / (1 - abar)  # beta~; 0 at step 0, where the logarithm takes step 1's instead
        first = variance[1:2] if self.num_timesteps > 1 else betas
        log_variance = torch.cat([first, variance[1:]]).log()
        tables = dict(
            sqrt_abar=abar.sqrt(), sqrt_one_minus_abar=(1 - abar).sqrt(),
            sqrt_recip_abar=(1 / abar).sqrt(), sqrt_recipm1_abar=(1 / abar - 1).sqrt(),
            mean_x_start=betas * before.sqrt() / (1 - abar), mean_x_t=(1 - before) * (1 - betas).sqrt() / (1 - abar),
            variance=variance, log_variance=log_variance, log_beta=betas.log(),
            log_fixed_variance=torch.cat([first, betas[1:]]).log())
        self._tables = {"cpu": {name: table.float()[:, None, None, None] for name, table in tables.items()}}
        self._tables["cpu"]["timestep"] = torch.tensor(self.timestep_map)

    def _at(self, name, t):
        """A table's values at steps t, float32 (N, 1, 1, 1); a device gets its copy of the tables once."""
        device = str(t.device)
        if device not in self._tables:
            self._tables[device] = {key: table.to(t.device) for key, table in self._tables["cpu"].items()}
        return self._tables[device][name][t]

    # ------------------------------------------------------------------------------------------ one step

    def q_sample(self, x_start, t, noise):
        """Draw x_t from q(x_t | x_0), float32: DDPM (4)."""
        return self._at("sqrt_abar", t) * x_start + self._at("sqrt_one_minus_abar", t) * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean (N, C, H, W), variance and clipped log variance (N, 1, 1, 1) of q(x_{t-1} | x_t, x_0): DDPM (6), (7)."""
        mean = self._at("mean_x_start", t) * x_start + self._at("mean_x_t", t) * x_t
        return mean, self._at("variance", t), self._at("log_variance", t)

    def _call(self, model, x, t, model_kwargs):
        """The model's eps and, with learn_sigma, v, else None: (N, C, H, W), float32 whatever it computes in."""
        output = model(x, self._at("timestep", t), **(model_kwargs or {})).float()
        expected = x.shape[1] * (2 if self.learn_sigma else 1)
        if output.shape[1] != expected:
            raise ValueError(f"model gave {output.shape[1]} channels, learn_sigma={self.learn_sigma} needs {expected}")
        return output.chunk(2, dim=1) if self.learn_sigma else (output, None)

    def _predict(self, eps, v, x, t, clip_denoised):
        """p(x_{t-1} | x_t) from the network's output: see p_mean_variance."""
        pred_xstart = self._at("sqrt_recip_abar", t) * x - self._at("sqrt_recipm1_abar", t) * eps
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean, _, log_variance = self.q_posterior_mean_variance(pred_xstart, x, t)
        if v is None:
            log_variance = self._at("log_fixed_variance", t)
        else:
            share = (v + 1) / 2
            log_variance = share * self._at("log_beta", t) + (1 - share) * log_variance  # IDDPM (15)
        return dict(mean=mean, variance=log_variance.exp(), log_variance=log_variance, pred_xstart=pred_xstart)

    def p_mean_variance(self, model, x, t, clip_denoised=False, model_kwargs=None):
        """p(x_{t-1} | x_t), DDPM (11) and IDDPM (15): dict of mean, variance, log_variance, pred_xstart.

        clip_denoised clamps the predicted x_0 to [-1, 1], right for pixels. Without learn_sigma the variance is beta_t.
        """
        eps, v = self._call(model, x, t, model_kwargs)
        return self._predict(eps, v, x, t, clip_denoised)

    # ------------------------------------------------------------------------------------------ training

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Losses of each sample (N,): mse of the noise; vb in bits per dimension, if learn_sigma; loss, their sum."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        eps, v = self._call(model, x_t, t, model_kwargs)
        mse = (noise - eps).square().flatten(1).mean(1)
        if v is None:
            return dict(loss=mse, mse=mse)
        vb = self._vb_bits(eps.detach(), v, x_start, x_t, t)  # trains the variance alone: IDDPM, section 3.1
        return dict(loss=mse + vb, mse=mse, vb=vb)

    def _vb_bits(self, eps, v, x_start, x_t, t):
        """One term of the bound (N,): KL(q || p), DDPM (5), or at step 0 the likelihood; bits per dimension."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        p = self._predict(eps, v, x_t, t, clip_denoised=False)
        gap = p["log_variance"] - true_log_variance
        kl = 0.5 * (gap - 1 + (-gap).exp() + (true_mean - p["mean"]).square() * (-p["log_variance"]).exp())
        nll = -discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    # ------------------------------------------------------------------------------------------ sampling

    def _p_at(self, model, x, i, clip_denoised, model_kwargs):
        """p_mean_variance of the whole batch at step i; model_kwargs may be a function of i."""
        kwargs = model_kwargs(i) if callable(model_kwargs) else model_kwargs
        return self.p_mean_variance(model, x, torch.full((len(x),), i, device=x.device), clip_denoised, kwargs)

    def p_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False, step_noise=None, on_step=None):
        """DDPM, algorithm 2: from noise x_T (N, C, H, W) to samples of the same shape.

        model_kwargs: a dict, or a function of the step i that returns one, so that guidance can depend on the step.
        step_noise(i, x) returns step i's noise (default: torch.randn_like(x)); it is called for i = T - 1 down to 1.
        on_step(i, x, pred_xstart) is called after each step.
        """
        x = noise
        for i in reversed(range(self.num_timesteps)):
            p = self._p_at(model, x, i, clip_denoised, model_kwargs)
            x = p["mean"]
            if i > 0:
                x = x + (0.5 * p["log_variance"]).exp() * (step_noise(i, x) if step_noise else torch.randn_like(x))
            if on_step:
                on_step(i, x, p["pred_xstart"])
        return x

    def ddim_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False, eta=0.0, step_noise=None,
                         on_step=None):
        """DDIM (12), sigma from (16): deterministic at eta 0, as noisy as DDPM at eta 1. Arguments: p_sample_loop."""
        x, abar = noise, [1.0, *self.alphas_cumprod.tolist()]
        for i in reversed(range(self.num_timesteps)):
            x0 = self._p_at(model, x, i, clip_denoised, model_kwargs)["pred_xstart"]
            now, before = abar[i + 1], abar[i]
            eps = (x - math.sqrt(now) * x0) / math.sqrt(1 - now)  # of the clipped x_0
            sigma = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
            x = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * eps
            if i > 0 and eta > 0:
                x = x + sigma * (step_noise(i, x) if step_noise else torch.randn_like(x))
            if on_step:
                on_step(i, x, x0)
        return x

    def dpm_solver_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False, on_step=None):
        """DPM-Solver++(2M), algorithm 2 of Lu et al., deterministic. Arguments: p_sample_loop.

        Second order in lambda = log(signal / noise); the first step, and the last, to no noise at all, are of first.
        """
        x, last = noise, None
        signal, spread = self.alphas_cumprod.sqrt().tolist(), (1 - self.alphas_cumprod).sqrt().tolist()
        for i in reversed(range(self.num_timesteps)):
            x0 = self._p_at(model, x, i, clip_denoised, model_kwargs)["pred_xstart"]
            if i == 0:
                x = x0
            else:
                h = math.log(self.sigmas[i] / self.sigmas[i - 1])  # the step's length in lambda
                slope = (x0 - last[0]) * (h / (2 * last[1])) if last else 0
                x = spread[i - 1] / spread[i] * x - signal[i - 1] * math.expm1(-h) * (x0 + slope)
                last = x0, h
            if on_step:
                on_step(i, x, x0)
        return x


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """log p, in nats, of 8-bit data x in [-1, 1] under a Gaussian integrated over each level's bin: DDPM (13).

    The normal cdf is the tanh approximation of the official code (Page, 1977), which its figures contain.
    """
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    log = lambda p: p.clamp(min=1e-12).log()
    inverse = (-log_scale).exp()
    upper, lower = cdf((x - mean + 1 / 255) * inverse), cdf((x - mean - 1 / 255) * inverse)
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))
