"""The diffusion process: noise schedules, the training loss, and three samplers. Read dit.py first.

DDPM (Ho et al., 2020), IDDPM (Nichol & Dhariwal, 2021), DDIM (Song et al., 2021), DPM-Solver++ (Lu et al., 2022).
With alpha_t = 1 - beta_t and abar_t = alpha_1 ... alpha_t, eps a standard normal:

    q(x_t | x_0)         x_t  = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                             DDPM (4)
    the network's eps    x_0 ~= (x_t - sqrt(1 - abar_t) eps) / sqrt(abar_t)                         DDPM (15)
    q(x_{t-1}|x_t,x_0)   mean = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0
                              + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
                         beta~_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t                           DDPM (6), (7)
    learned variance     Sigma = exp(v log beta_t + (1 - v) log beta~_t)                            IDDPM (15)
    loss                 |eps - eps_theta|^2 + L_vb, where L_vb trains v alone                      IDDPM (16)

Time steps count from 0 (least noise) to num_timesteps - 1. Respacing keeps a subset of the original 1000 steps and
joins what lies between, so the shortened process agrees with the long one where both exist (IDDPM, section 4).
"""

import math

import torch


def get_named_beta_schedule(name, num_timesteps):
    """The betas, float64 (num_timesteps,): "linear" (DDPM, section 4) or "squaredcos_cap_v2" (IDDPM, equation 17).

    Raises ValueError for another name.
    """
    if name == "linear":  # 1e-4 to 0.02 at 1000 steps; other lengths keep the total noise
        scale = 1000 / num_timesteps
        return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    if name == "squaredcos_cap_v2":
        time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
        abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown noise schedule {name!r}: linear or squaredcos_cap_v2")


def space_timesteps(num_timesteps, section_counts):
    """The original steps to keep, a sorted list of ints. section_counts says how many:

    "" all; "250" spread evenly from first to last; "10,15,20" that many from each equal section; "ddim50" 50 steps with
    a fixed integer stride from step 0 (DDIM, appendix D.3). Raises ValueError when there are not so many steps.
    """
    if section_counts == "":
        return list(range(num_timesteps))
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        count = int(section_counts[len("ddim") :])
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise ValueError(f"no integer stride gives exactly {count} of {num_timesteps} steps")
    counts = [int(c) for c in section_counts.split(",")] if isinstance(section_counts, str) else list(section_counts)
    size, extra = divmod(num_timesteps, len(counts))
    steps, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        if not 0 < count <= length:
            raise ValueError(f"cannot keep {count} of the {length} steps of section {section}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        position = 0.0
        for _ in range(count):
            steps.append(start + round(position))
            position += stride
        start += length
    return steps


def create_diffusion(timestep_respacing="", noise_schedule="linear", learn_sigma=True):
    """The process of the official DiT: 1000 steps, of which `timestep_respacing` keeps some (see space_timesteps)."""
    betas = get_named_beta_schedule(noise_schedule, 1000)
    return GaussianDiffusion(betas, space_timesteps(1000, timestep_respacing), learn_sigma)


class GaussianDiffusion:
    """A diffusion process over the steps `timestep_map` of the original betas (float64).

    In every method x is (N, C, H, W), t is an int64 tensor (N,) of steps of this (respaced) process, and `model` is a
    callable model(x, t, **model_kwargs) that gets original timesteps. model_kwargs is a dict, or in the sampling loops
    also a function of the step's index that returns one, so guidance may depend on the step.
    """

    def __init__(self, betas, timestep_map, learn_sigma=True):
        abar = torch.cumprod(1 - betas, 0)[timestep_map]
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        self.timestep_map = list(timestep_map)
        self.num_timesteps = len(timestep_map)
        self.learn_sigma = learn_sigma
        self.betas = betas = 1 - abar / before  # each joins the original steps since the one kept before
        self.alphas_cumprod = abar = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
        variance = (
            betas * (1 - before) / (1 - abar)
        )  # beta~ of DDPM (7); zero at step 0, so its log is taken from step 1
        log_variance = torch.cat([variance[1:2], variance[1:]]).log() if len(betas) > 1 else betas.log()
        fixed_large = torch.cat([variance[1:2], betas[1:]]) if len(betas) > 1 else betas
        self.sigmas = (1 / abar - 1).sqrt().tolist()  # noise levels, noise to signal, of each step
        self._tables = dict(
            timestep=torch.tensor(self.timestep_map),
            sqrt_abar=abar.sqrt(),
            sqrt_one_minus_abar=(1 - abar).sqrt(),
            sqrt_recip_abar=(1 / abar).sqrt(),
            sqrt_recipm1_abar=(1 / abar - 1).sqrt(),
            mean_x_start=betas * before.sqrt() / (1 - abar),
            mean_x_t=(1 - before) * (1 - betas).sqrt() / (1 - abar),
            variance=variance,
            log_variance=log_variance,
            log_beta=betas.log(),
            fixed_variance=fixed_large,
            fixed_log_variance=fixed_large.log(),
        )
        self._on_device = {}

    def _at(self, name, t):
        """The float32 values of a table at steps t, shaped (N, 1, 1, 1) to multiply with x."""
        if t.device not in self._on_device:
            self._on_device[t.device] = {k: v.to(t.device) for k, v in self._tables.items()}
        return self._on_device[t.device][name][t].float()[:, None, None, None]

    # ---------------------------------------------------------------- one step

    def q_sample(self, x_start, t, noise):
        """Draw x_t from q(x_t | x_0): DDPM (4)."""
        return self._at("sqrt_abar", t) * x_start + self._at("sqrt_one_minus_abar", t) * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0): DDPM (6), (7). Variances (N, 1, 1, 1)."""
        mean = self._at("mean_x_start", t) * x_start + self._at("mean_x_t", t) * x_t
        return mean, self._at("variance", t), self._at("log_variance", t)

    def _predict(self, output, x, t, clip_denoised):
        """p(x_{t-1} | x_t) from the network's output: dict of mean, variance, log_variance, pred_xstart."""
        output = output.float()
        if self.learn_sigma:
            output, v = output.chunk(2, dim=1)
            v = (v + 1) / 2  # the network's [-1, 1] spans beta~ to beta: IDDPM (15)
            log_variance = v * self._at("log_beta", t) + (1 - v) * self._at("log_variance", t)
            variance = log_variance.exp()
        else:
            variance, log_variance = self._at("fixed_variance", t), self._at("fixed_log_variance", t)
        pred_xstart = self._at("sqrt_recip_abar", t) * x - self._at("sqrt_recipm1_abar", t) * output
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        mean = self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return dict(mean=mean, variance=variance, log_variance=log_variance, pred_xstart=pred_xstart)

    def _call(self, model, x, t, model_kwargs):
        table = self._at("timestep", t).flatten()
        output = model(x, table.long(), **(model_kwargs or {}))
        expected = x.shape[1] * (2 if self.learn_sigma else 1)
        if output.shape[1] != expected:
            raise ValueError(
                f"the model gave {output.shape[1]} channels where learn_sigma={self.learn_sigma} needs {expected}"
            )
        return output

    def p_mean_variance(self, model, x, t, clip_denoised=False, model_kwargs=None):
        """p(x_{t-1} | x_t): dict of mean, variance, log_variance, pred_xstart; clip_denoised clamps x_0 to [-1, 1]."""
        return self._predict(self._call(model, x, t, model_kwargs), x, t, clip_denoised)

    # ---------------------------------------------------------------- training

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Per-sample losses (N,): mse of the noise, vb in bits per dimension (with learn_sigma), loss, their sum."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = self._call(model, x_t, t, model_kwargs).float()
        eps = output[:, : x_start.shape[1]]
        terms = dict(mse=(noise - eps).square().flatten(1).mean(1))
        terms["loss"] = terms["mse"]
        if self.learn_sigma:  # the mean is held fixed in the vb term: IDDPM, section 3.1
            frozen = torch.cat([eps.detach(), output[:, x_start.shape[1] :]], dim=1)
            terms["vb"] = self._vb_bits(frozen, x_start, x_t, t)
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms

    def _vb_bits(self, output, x_start, x_t, t):
        """A term of the variational bound, bits per dimension (N,): KL(q || p), DDPM (5); at t = 0 the likelihood."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        p = self._predict(output, x_t, t, clip_denoised=False)
        gap = p["log_variance"] - true_log_variance
        kl = 0.5 * (gap - 1 + (-gap).exp() + (true_mean - p["mean"]).square() * (-p["log_variance"]).exp())
        nll = -discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    # ---------------------------------------------------------------- sampling

    def _steps(self, model, x, model_kwargs):
        """Yield (i, t) from the noisiest step to 0, and a function that calls the model there."""
        for i in reversed(range(self.num_timesteps)):
            t = torch.full((x.shape[0],), i, device=x.device)
            kwargs = model_kwargs(i) if callable(model_kwargs) else model_kwargs
            yield i, t, kwargs

    def p_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False, step_noise=None, on_step=None):
        """DDPM, algorithm 2: from noise x_T (N, C, H, W) to samples of the same shape.

        step_noise(i, x) returns step i's noise (None: torch.randn_like); on_step(i, x, pred_xstart) follows each.
        """
        x = noise
        for i, t, kwargs in self._steps(model, x, model_kwargs):
            p = self.p_mean_variance(model, x, t, clip_denoised, kwargs)
            x = p["mean"]
            if i > 0:
                x = x + (0.5 * p["log_variance"]).exp() * (step_noise(i, x) if step_noise else torch.randn_like(x))
            if on_step:
                on_step(i, x, p["pred_xstart"])
        return x

    def ddim_sample_loop(
        self, model, noise, model_kwargs=None, clip_denoised=False, eta=0.0, step_noise=None, on_step=None
    ):
        """DDIM, equation 12: deterministic at eta 0, as noisy as DDPM at eta 1. Arguments as in p_sample_loop."""
        x = noise
        abar = [1.0, *self.alphas_cumprod.tolist()]
        for i, t, kwargs in self._steps(model, x, model_kwargs):
            x0 = self.p_mean_variance(model, x, t, clip_denoised, kwargs)["pred_xstart"]
            now, before = abar[i + 1], abar[i]
            eps = (x / math.sqrt(now) - x0) / math.sqrt(1 / now - 1)
            sigma = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))  # DDIM (16)
            x = math.sqrt(before) * x0 + math.sqrt(1 - before - sigma**2) * eps
            if i > 0 and eta > 0:
                x = x + sigma * (step_noise(i, x) if step_noise else torch.randn_like(x))
            if on_step:
                on_step(i, x, x0)
        return x

    def dpm_solver_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False, on_step=None):
        """DPM-Solver++(2M), algorithm 2 of Lu et al.: second order in the log signal-to-noise ratio, no fresh noise."""
        x = noise
        abar = self.alphas_cumprod.tolist()
        signal = [math.sqrt(a) for a in abar]
        spread = [math.sqrt(1 - a) for a in abar]
        log_snr = [math.log(a / s) for a, s in zip(signal, spread, strict=True)]  # lambda in the paper
        last_x0 = last_h = None
        for i, t, kwargs in self._steps(model, x, model_kwargs):
            x0 = self.p_mean_variance(model, x, t, clip_denoised, kwargs)["pred_xstart"]
            if i == 0:
                x = x0  # the last step goes to no noise at all, at first order
            else:
                h = log_snr[i - 1] - log_snr[i]
                slope = 0 if last_x0 is None else (x0 - last_x0) * (h / (2 * last_h))
                x = spread[i - 1] / spread[i] * x - signal[i - 1] * math.expm1(-h) * (x0 + slope)
                last_x0, last_h = x0, h
            if on_step:
                on_step(i, x, x0)
        return x


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """log p of 8-bit data x in [-1, 1] under a Gaussian integrated over each level's bin: DDPM (13)."""

    def cdf(z):  # the tanh approximation of the normal cdf that the official code uses
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = (-log_scale).exp()
    upper = cdf((x - mean + 1 / 255) * inverse)
    lower = cdf((x - mean - 1 / 255) * inverse)
    log = lambda p: p.clamp(min=1e-12).log()  # noqa: E731
    return torch.where(x < -0.999, log(upper), torch.where(x > 0.999, log(1 - lower), log(upper - lower)))
