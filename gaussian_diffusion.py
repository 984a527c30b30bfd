"""Two processes between data x_0 and noise eps: diffusion and flow matching. Read dit.py first.

GaussianDiffusion is DDPM (Ho et al., 2020) with the learned variance of IDDPM (Nichol & Dhariwal,
2021), as DiT uses it. FlowMatching is SiT (Ma et al., 2024): the same network, straight paths.

                    GaussianDiffusion                           FlowMatching
    time            t = T (noise), ..., 1, 0 (data)             t = 0 (noise) to 1 (data)
    x_t             sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps     t x_0 + (1 - t) eps
    noise level     sigma_t = sqrt((1 - abar_t) / abar_t)       sigma_t = (1 - t) / t
    the network     eps_theta(x_t, t), share_theta(x_t, t)      velocity_theta(x_t, t)
    its target      eps                                         velocity = dx_t / dt = x_0 - eps
    loss            |eps - eps_theta|^2 + L_vb                  |velocity - velocity_theta|^2
    predicted x_0   x_t / sqrt(abar_t) - sigma_t eps_theta      x_t + (1 - t) velocity_theta
    a step          draw x_{t-1} from p(x_{t-1} | x_t)          x_t + dt velocity_theta

The objective jit is flow matching whose network predicts x_0, from which the velocity follows.

With alpha_t = 1 - beta_t and abar_t = alpha_1 ... alpha_t, diffusion's p is q at the predicted x_0:

    q(x_{t-1} | x_t, x_0)   mean = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0
                                 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t
                            beta~_t = (1 - abar_{t-1}) / (1 - abar_t) beta_t         DDPM (6, 7)
    variance of p           exp(share log beta_t + (1 - share) log beta~_t)          IDDPM (15)
    L_vb = KL(q || p)       trains the share alone                                   IDDPM (16)

Its steps count from 0 (least noise) to num_timesteps - 1, so step 0 here is t = 1 in the papers.
Its coefficients are computed in float64 and applied in float32.
"""

import math

import torch


class GaussianDiffusion:
    """A diffusion process over the steps timestep_map of a longer one.

    betas: float64 (T,), of the long process. timestep_map: ascending ints, the steps of it to keep;
    abar stays the same at these (respacing: IDDPM, section 4).

    In every method x is (N, C, H, W) and t is int64 (N,), steps of this process. `model` is a
    callable model(x, t, **model_kwargs) that gets original timesteps and returns the predicted
    noise (N, C, H, W); with learn_sigma (N, 2C, H, W), the second half placing the variance between
    beta~ (at -1) and beta (at 1). Another number of channels is a ValueError.
    """

    objective = "ddpm"
    samplers = ("ddpm", "ddim", "dpm++")

    def __init__(self, betas, timestep_map, learn_sigma=True):
        self.timestep_map = list(timestep_map)
        self.num_timesteps = len(self.timestep_map)
        self.learn_sigma = learn_sigma
        self.loss_names = ("loss", "mse", "vb") if learn_sigma else ("loss", "mse")

        # Each beta covers all original steps since the previous kept one.
        one = torch.ones(1, dtype=torch.float64)
        kept = torch.cumprod(1 - betas, 0)[self.timestep_map]
        self.betas = betas = 1 - kept / torch.cat([one, kept[:-1]])
        self.alphas_cumprod = abar = torch.cumprod(1 - betas, 0)
        sigma = (1 / abar - 1).sqrt()
        self.sigmas = sigma.tolist()

        # beta~ is 0 at step 0, where the logarithms take step 1's, as in the official code.
        abar_before = torch.cat([one, abar[:-1]])
        posterior_variance = betas * (1 - abar_before) / (1 - abar)
        first = posterior_variance[1:2] if self.num_timesteps > 1 else betas
        tables = dict(
            sqrt_abar=abar.sqrt(),
            sqrt_one_minus_abar=(1 - abar).sqrt(),
            recip_sqrt_abar=(1 / abar).sqrt(),
            sigma=sigma,
            posterior_x_start=betas * abar_before.sqrt() / (1 - abar),
            posterior_x_t=(1 - abar_before) * (1 - betas).sqrt() / (1 - abar),
            posterior_variance=posterior_variance,
            log_posterior_variance=torch.cat([first, posterior_variance[1:]]).log(),
            log_beta=betas.log(),
            log_fixed_variance=torch.cat([first, betas[1:]]).log(),
        )
        self._tables = {name: table.float()[:, None, None, None] for name, table in tables.items()}
        self._tables["timestep"] = torch.tensor(self.timestep_map)
        self._tables_on = {}  # by device

    # ---------------------------------------------------------------------- forward: data to noise

    def q_sample(self, x_start, t, noise):
        """Draw x_t from q(x_t | x_0), float32: DDPM (4)."""
        return self._at("sqrt_abar", t) * x_start + self._at("sqrt_one_minus_abar", t) * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """q(x_{t-1} | x_t, x_0), DDPM (6, 7): (mean, variance, clipped log variance).

        The mean is (N, C, H, W), the others (N, 1, 1, 1); at step 0 the variance is 0 and its
        logarithm that of step 1.
        """
        mean = self._at("posterior_x_start", t) * x_start + self._at("posterior_x_t", t) * x_t
        return mean, self._at("posterior_variance", t), self._at("log_posterior_variance", t)

    # --------------------------------------------------------------------------------------- loss

    def draw_times(self, n, generator):
        """Steps to train at, uniform: int64 (n,) on the generator's device."""
        return torch.randint(
            self.num_timesteps, (n,), generator=generator, device=generator.device)

    def times_at(self, noise_share):
        """Steps so far on the way from data to noise, in [0, 1), float (n,): int64 (n,)."""
        return (noise_share * self.num_timesteps).long()

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Losses of each sample, a dict of (N,) by loss_names: loss is the sum of the others.

        mse is that of the noise; vb, with learn_sigma, one term of the variational bound, in bits
        per dimension.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        eps, variance_share = self._network(model, x_t, t, model_kwargs)
        mse = (noise - eps).square().flatten(1).mean(1)
        if not self.learn_sigma:
            return dict(loss=mse, mse=mse)
        # Without eps's gradient the bound trains the variance alone: IDDPM, section 3.1.
        vb = self._vb_bits(eps.detach(), variance_share, x_start, x_t, t)
        return dict(loss=mse + vb, mse=mse, vb=vb)

    def _vb_bits(self, eps, variance_share, x_start, x_t, t):
        """KL(q || p), DDPM (5), or at step 0 the likelihood, in bits per dimension: (N,)."""
        q_mean, _, q_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        p = self._p(eps, variance_share, x_t, t, clip_denoised=False)
        log_ratio = p["log_variance"] - q_log_variance
        squared_error = (q_mean - p["mean"]).square() * (-p["log_variance"]).exp()
        kl = 0.5 * (log_ratio - 1 + (-log_ratio).exp() + squared_error)
        nll = -discretized_gaussian_log_likelihood(x_start, p["mean"], 0.5 * p["log_variance"])
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    # -------------------------------------------------------------------- samplers: noise to data

    def p_mean_variance(self, model, x, t, clip_denoised=False, model_kwargs=None):
        """p(x_{t-1} | x_t), DDPM (11) and IDDPM (15).

        A dict of mean, variance (beta_t without learn_sigma), log_variance and pred_xstart, the
        predicted x_0, which clip_denoised clamps to [-1, 1], right for pixels.
        """
        eps, variance_share = self._network(model, x, t, model_kwargs)
        return self._p(eps, variance_share, x, t, clip_denoised)

    def p_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False, step_noise=None,
                      on_step=None):
        """DDPM, algorithm 2: from noise x_T (N, C, H, W) to samples of the same shape.

        step_noise(i, x) gives the noise of steps i = num_timesteps - 1 down to 1 (default: fresh).
        on_step(i, x, pred_x0) is called after each step, i = num_timesteps - 1 down to 0.
        """
        x, draw = noise, step_noise or fresh_noise
        for i in reversed(range(self.num_timesteps)):
            p = self._p_at_step(i, model, x, clip_denoised, model_kwargs)
            pred_x0, x = p["pred_xstart"], p["mean"]
            if i > 0:
                x = x + (0.5 * p["log_variance"]).exp() * draw(i, x)
            if on_step:
                on_step(i, x, pred_x0)
        return x

    def ddim_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False, eta=0.0,
                         step_noise=None, on_step=None):
        """DDIM (Song et al., 2021), equations 12 and 16. Other arguments: p_sample_loop.

        eta: the noise added, from 0 (none: deterministic) to 1 (as much as DDPM with beta~).
        """
        x, draw = noise, step_noise or fresh_noise
        abar_at = self.alphas_cumprod.tolist()
        abar_before_at = [1.0, *abar_at[:-1]]  # no noise is left after step 0
        for i in reversed(range(self.num_timesteps)):
            pred_x0 = self._p_at_step(i, model, x, clip_denoised, model_kwargs)["pred_xstart"]
            abar, abar_before = abar_at[i], abar_before_at[i]
            # The eps that belongs to the clipped x_0, part of which may be drawn anew.
            eps = (x - math.sqrt(abar) * pred_x0) / math.sqrt(1 - abar)
            std = eta * math.sqrt((1 - abar_before) / (1 - abar) * (1 - abar / abar_before))
            x = math.sqrt(abar_before) * pred_x0 + math.sqrt(1 - abar_before - std**2) * eps
            if i > 0 and eta > 0:
                x = x + std * draw(i, x)
            if on_step:
                on_step(i, x, pred_x0)
        return x

    def dpm_solver_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False,
                               on_step=None):
        """DPM-Solver++(2M) (Lu et al., 2022), algorithm 2, deterministic. Arguments: p_sample_loop.

        Second order in lambda = -log sigma; the first and the last step are of first order.
        """
        # The second order comes from the step before, so the first step has to do without.
        x, previous_x0, previous_h = noise, None, None
        sqrt_abar = self.alphas_cumprod.sqrt().tolist()
        sqrt_one_minus_abar = (1 - self.alphas_cumprod).sqrt().tolist()
        for i in reversed(range(self.num_timesteps)):
            pred_x0 = self._p_at_step(i, model, x, clip_denoised, model_kwargs)["pred_xstart"]
            if i == 0:
                x = pred_x0  # no noise is left: sigma is 0 and h infinite
            else:
                # Extrapolate the predicted x_0 to the middle of the step, whose length is h.
                h = math.log(self.sigmas[i] / self.sigmas[i - 1])
                middle_x0 = pred_x0
                if previous_x0 is not None:
                    middle_x0 = pred_x0 + (pred_x0 - previous_x0) * (h / (2 * previous_h))
                shrink = sqrt_one_minus_abar[i - 1] / sqrt_one_minus_abar[i]
                x = shrink * x - sqrt_abar[i - 1] * math.expm1(-h) * middle_x0
                previous_x0, previous_h = pred_x0, h
            if on_step:
                on_step(i, x, pred_x0)
        return x

    def sample(self, sampler, model, noise, step_noise=None, **settings):
        """Sample by name, one of `samplers`; settings are further arguments of that loop."""
        check_sampler(self, sampler)
        if sampler == "ddpm":
            return self.p_sample_loop(model, noise, step_noise=step_noise, **settings)
        if sampler == "ddim":
            return self.ddim_sample_loop(model, noise, step_noise=step_noise, **settings)
        return self.dpm_solver_sample_loop(model, noise, **settings)

    def noise_levels(self, sampler):
        """The noise level sigma of each network evaluation of a sampler's loop, in its order."""
        check_sampler(self, sampler)
        return self.sigmas[::-1]

    # ------------------------------------------------------------- what loss and samplers share

    def _network(self, model, x, t, model_kwargs):
        """The network's eps and variance share (without learn_sigma None), float32 (N, C, H, W).

        The share, from 0 to 1, is that of log beta in the log variance.
        """
        output = model(x, self._at("timestep", t), **(model_kwargs or {})).float()
        expected = x.shape[1] * (2 if self.learn_sigma else 1)
        if output.shape[1] != expected:
            raise ValueError(f"model gave {output.shape[1]} channels, "
                             f"learn_sigma={self.learn_sigma} needs {expected}")
        if not self.learn_sigma:
            return output, None
        eps, interpolation = output.chunk(2, dim=1)
        return eps, (interpolation + 1) / 2

    def _p(self, eps, variance_share, x, t, clip_denoised):
        """p(x_{t-1} | x_t) from the network's output: see p_mean_variance."""
        pred_x0 = self._at("recip_sqrt_abar", t) * x - self._at("sigma", t) * eps
        if clip_denoised:
            pred_x0 = pred_x0.clamp(-1, 1)
        mean, _, least = self.q_posterior_mean_variance(pred_x0, x, t)
        if self.learn_sigma:
            most = self._at("log_beta", t)
            log_variance = variance_share * most + (1 - variance_share) * least  # IDDPM (15)
        else:
            log_variance = self._at("log_fixed_variance", t)
        return dict(mean=mean, variance=log_variance.exp(), log_variance=log_variance,
                    pred_xstart=pred_x0)

    def _at(self, name, t):
        """A table's values at steps t, (N, 1, 1, 1); each device gets one copy of the tables."""
        device = str(t.device)
        if device not in self._tables_on:
            self._tables_on[device] = {
                key: table.to(t.device) for key, table in self._tables.items()}
        return self._tables_on[device][name][t]

    def _p_at_step(self, i, model, x, clip_denoised, model_kwargs):
        """p_mean_variance with the whole batch at step i."""
        t = torch.full((len(x),), i, device=x.device)
        return self.p_mean_variance(model, x, t, clip_denoised, model_kwargs)


class FlowMatching:
    """Straight paths, walked from noise to data in num_timesteps equal steps of t from 0 to 1.

    In every method x is (N, C, H, W) and t is float32 (N,), 0 at noise and 1 at data, as in SiT's
    code. `model` is a callable model(x, time, **model_kwargs) that returns the predicted velocity
    (N, C, H, W), or (N, 2C, H, W) with a second half to ignore. Its time is t with network_time
    "sit", for SiT's weights, and 1000 (1 - t) with "ddpm", so that DDPM's can be fine-tuned.
    time_sampling, "uniform" or "logit-normal": see draw_times. predicts: "velocity", or "data",
    with which the model returns x_0 in its place, as in JiT (Li & He, 2025).
    """

    samplers = ("euler", "heun", "sde")
    loss_names = ("loss", "mse")

    def __init__(self, num_timesteps, network_time="ddpm", time_sampling="uniform",
                 predicts="velocity"):
        if num_timesteps < 1:
            raise ValueError(f"cannot take {num_timesteps} steps: choose 1 or more")
        if network_time not in ("ddpm", "sit"):
            raise ValueError(f"unknown network_time {network_time!r}: use ddpm or sit")
        if time_sampling not in ("uniform", "logit-normal"):
            raise ValueError(f"unknown time_sampling {time_sampling!r}: use uniform, logit-normal")
        if predicts not in ("velocity", "data"):
            raise ValueError(f"cannot predict {predicts!r}: use velocity or data")
        self.num_timesteps = num_timesteps
        self.network_time = network_time
        self.time_sampling = time_sampling
        self.predicts = predicts
        self.objective = "flow" if network_time == "ddpm" else "sit"
        if predicts == "data":
            self.objective = "jit"

    # ---------------------------------------------------------------------- forward: data to noise

    def q_sample(self, x_start, t, noise):
        """x_t, float32: where the straight line from noise to x_start is at t."""
        t = t[:, None, None, None]  # (N, 1, 1, 1)
        return t * x_start + (1 - t) * noise

    # --------------------------------------------------------------------------------------- loss

    def draw_times(self, n, generator):
        """Times to train at, float32 (n,) on the generator's device.

        Logit-normal, the sigmoid of a standard normal, favours the middle (Esser et al., 2024).
        """
        if self.time_sampling == "uniform":
            return torch.rand(n, generator=generator, device=generator.device)
        return torch.randn(n, generator=generator, device=generator.device).sigmoid()

    def times_at(self, noise_share):
        """Times so far on the way from data to noise, in [0, 1), float (n,): float32 (n,)."""
        return (1 - noise_share).float()

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Losses of each sample, a dict of (N,) by loss_names; both are the velocity's mse."""
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        velocity = self._network(model, x_t, t, model_kwargs)
        target = x_start - noise if self.predicts == "velocity" else slope(x_t, x_start, t)
        mse = (target - velocity).square().flatten(1).mean(1)
        return dict(loss=mse, mse=mse)

    # -------------------------------------------------------------------- samplers: noise to data

    def euler_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False, on_step=None):
        """Euler's method. Arguments and result: GaussianDiffusion.p_sample_loop.

        clip_denoised clamps the predicted x_0 to [-1, 1] and takes the velocity that leads there;
        the last step ends there, in the other two samplers too.
        """
        x = noise
        for i, t, t_end in self._steps("euler"):
            velocity, pred_x0 = self._velocity_at(t, model, x, clip_denoised, model_kwargs)
            x = x + (t_end - t) * velocity
            if on_step:
                on_step(i, x, pred_x0)
        return x

    def heun_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False, on_step=None):
        """Heun's method, of second order: the mean of the velocities at both ends of Euler's step.

        Two evaluations in every step; pred_x0 is that of the first.
        """
        x = noise
        for i, t, t_end in self._steps("heun"):
            velocity, pred_x0 = self._velocity_at(t, model, x, clip_denoised, model_kwargs)
            x_end = x + (t_end - t) * velocity
            velocity_end, _ = self._velocity_at(t_end, model, x_end, clip_denoised, model_kwargs)
            x = x + (t_end - t) * (velocity + velocity_end) / 2
            if clip_denoised and i == 0:
                x = pred_x0
            if on_step:
                on_step(i, x, pred_x0)
        return x

    def sde_sample_loop(self, model, noise, model_kwargs=None, clip_denoised=False, step_noise=None,
                        on_step=None):
        """SiT's reference sampler: Euler-Maruyama to t = 0.96, then one step without noise.

        dx = (velocity + w score) dt + sqrt(2 w) dW has the marginals of the paths for every w >= 0;
        with w = 1 - t and score = (t velocity - x) / (1 - t) its drift is (1 + t) velocity - x.
        """
        x, draw = noise, step_noise or fresh_noise
        for i, t, t_end in self._steps("sde"):
            velocity, pred_x0 = self._velocity_at(t, model, x, clip_denoised, model_kwargs)
            x = x + (t_end - t) * ((1 + t) * velocity - x)
            if i > 0:
                x = x + math.sqrt(2 * (1 - t) * (t_end - t)) * draw(i, x)
            elif clip_denoised:
                x = pred_x0
            if on_step:
                on_step(i, x, pred_x0)
        return x

    def sample(self, sampler, model, noise, step_noise=None, **settings):
        """Sample by name, one of `samplers`; settings are further arguments of that loop."""
        check_sampler(self, sampler)
        if sampler == "euler":
            return self.euler_sample_loop(model, noise, **settings)
        if sampler == "heun":
            return self.heun_sample_loop(model, noise, **settings)
        return self.sde_sample_loop(model, noise, step_noise=step_noise, **settings)

    def noise_levels(self, sampler):
        """The noise level sigma of each network evaluation of a sampler's loop, in its order."""
        check_sampler(self, sampler)
        times = []
        for _, t, t_end in self._steps(sampler):
            times += [t, t_end] if sampler == "heun" else [t]
        return [(1 - t) / t if t > 0 else math.inf for t in times]

    # ------------------------------------------------------------- what loss and samplers share

    def _network(self, model, x, t, model_kwargs):
        """The network's velocity, float32 (N, C, H, W), whatever the network computes in."""
        time = t if self.network_time == "sit" else 1000 * (1 - t)
        output = model(x, time, **(model_kwargs or {})).float()
        channels = x.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise ValueError(f"model gave {output.shape[1]} channels, not {channels} or twice that")
        output = output[:, :channels]
        return output if self.predicts == "velocity" else slope(x, output, t)

    def _velocity_at(self, t, model, x, clip_denoised, model_kwargs):
        """The velocity and the predicted x_0 of the whole batch at one t, a number."""
        velocity = self._network(model, x, torch.full((len(x),), t, device=x.device), model_kwargs)
        pred_x0 = x + (1 - t) * velocity
        if clip_denoised:
            pred_x0 = pred_x0.clamp(-1, 1)
            if t < 1:  # at t = 1 the velocity says nothing about x_0, which is x
                velocity = (pred_x0 - x) / (1 - t)
        return velocity, pred_x0

    def _steps(self, sampler):
        """Each step's (i, t, t at its end); i counts down from num_timesteps - 1 to 0."""
        n = self.num_timesteps
        times = [k / n for k in range(n + 1)]
        if sampler == "sde":
            if n < 2:
                raise ValueError("the sampler sde needs 2 or more steps: its last has no noise")
            times = [*(0.96 * k / (n - 1) for k in range(n - 1)), 0.96, 1.0]
        return zip(reversed(range(n)), times[:-1], times[1:], strict=True)


# -------------------------------------------------------------------------- choosing a process


OBJECTIVES = ("ddpm", "flow", "sit", "jit")


def create_process(objective="ddpm", sampler=None, num_sampling_steps=None, learn_sigma=True,
                   time_sampling="uniform"):
    """The process of an objective: to train with or, given both, to sample with in so many steps.

    "ddpm" is the official DiT's; "flow" and "sit" are FlowMatching with the network time "ddpm" and
    "sit", "jit" is "flow" whose network predicts the data. learn_sigma says what ddpm's network
    predicts; time_sampling how the others are trained. Raises ValueError for an objective, sampler,
    number or time_sampling that there is not.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}: use one of {', '.join(OBJECTIVES)}")
    if objective == "ddpm":
        if time_sampling != "uniform":
            raise ValueError(f"time_sampling {time_sampling!r} is for flow, sit and jit alone")
        # Training uses all 1000 steps; dpm++ needs a spacing of its own: see space_timesteps.
        respacing = "" if num_sampling_steps is None else str(num_sampling_steps)
        if sampler == "dpm++" and respacing:
            respacing = "trailing" + respacing
        process = create_diffusion(respacing, learn_sigma=learn_sigma)
    else:
        # Training draws from all of [0, 1], whatever the number of steps.
        steps = 1 if num_sampling_steps is None else num_sampling_steps
        network_time = "sit" if objective == "sit" else "ddpm"
        predicts = "data" if objective == "jit" else "velocity"
        process = FlowMatching(steps, network_time, time_sampling, predicts)
    if sampler is not None:
        check_sampler(process, sampler)
    return process


# -------------------------------------------------------------------------- schedules and respacing


def create_diffusion(timestep_respacing="", noise_schedule="linear", learn_sigma=True):
    """The process of the official DiT: 1000 steps, of which timestep_respacing keeps some.

    noise_schedule and timestep_respacing, with their ValueErrors: see the two functions below.
    """
    betas = get_named_beta_schedule(noise_schedule, 1000)
    return GaussianDiffusion(betas, space_timesteps(1000, timestep_respacing), learn_sigma)


def get_named_beta_schedule(name, num_timesteps):
    """The betas, float64 (num_timesteps,).

    "linear" is DDPM's (section 4): 1e-4 to 0.02 at 1000 steps, at other lengths about the same
    noise in all. "squaredcos_cap_v2" is IDDPM's (equation 17). Raises ValueError for another name,
    and for a length at which a beta would not be between 0 and 1.
    """
    if name == "linear":
        if num_timesteps <= 20:
            raise ValueError(f"a linear schedule needs more than 20 steps, not {num_timesteps}")
        first, last = 0.1 / num_timesteps, 20 / num_timesteps
        return torch.linspace(first, last, num_timesteps, dtype=torch.float64)
    if name == "squaredcos_cap_v2":
        time = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        abar = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
    raise ValueError(f"unknown noise schedule {name!r}: use linear or squaredcos_cap_v2")


def space_timesteps(num_timesteps, section_counts):
    """The original steps to keep, ascending ints; section_counts, a string, says how many.

    ""            all
    "250"         spread evenly from the first to the last
    "trailing20"  spread evenly to the last, starting one stride from no noise: for DPM-Solver++,
                  which loses its order if its last stride in lambda is many times the one before
    Two more strings of the official code, which no script here uses:
    "10,15,20"    that many from each equal section, the least noisy first; or a list of ints
    "ddim50"      an integer stride from step 0 (DDIM, appendix D.3)
    Raises ValueError for anything else, and when there are not so many steps.
    """
    if section_counts == "":
        return list(range(num_timesteps))

    # Read the string: one of the words or none, then how many steps of each section.
    text = section_counts
    if not isinstance(section_counts, str):
        text = ",".join(map(str, section_counts))
    word = next((word for word in ("ddim", "trailing") if text.startswith(word)), "")
    try:
        counts = [int(count) for count in text.removeprefix(word).split(",")]
    except ValueError:
        counts = []
    if not counts or (word and len(counts) > 1):
        raise ValueError(
            f"respacing {text!r} is none of '', '250', 'trailing20', '10,15,20', 'ddim50'")

    if word == "ddim":
        return strided_steps(num_timesteps, counts[0])
    if word == "trailing":
        check_count(num_timesteps, counts[0])
        return [num_timesteps * (k + 1) // counts[0] - 1 for k in range(counts[0])]

    # The first `extra` sections are one step longer than the others.
    size, extra = divmod(num_timesteps, len(counts))
    steps, start = [], 0
    for section, count in enumerate(counts):
        length = size + (section < extra)
        check_count(length, count)
        steps += [start + step for step in even_steps(length, count)]
        start += length
    return steps


def even_steps(length, count):
    """count of the steps 0 to length - 1, evenly from the first to the last."""
    steps, position = [], 0.0
    for _ in range(count):
        steps.append(round(position))
        position += (length - 1) / max(1, count - 1)  # summed: ties round as in the official code
    return steps


def strided_steps(length, count):
    """count of the steps 0 to length - 1, from step 0 on with an integer stride."""
    for stride in range(1, length + 1):
        if len(range(0, length, stride)) == count:
            return list(range(0, length, stride))
    raise ValueError(f"respacing 'ddim{count}': no integer stride keeps so many of {length} steps")


def check_count(length, count):
    """Raise ValueError when so many of length steps cannot be kept."""
    if not 1 <= count <= length:
        raise ValueError(f"cannot keep {count} of {length} steps: choose 1 to {length}")


# ---------------------------------------------------------- machinery: skip it on a first reading


def check_sampler(process, sampler):
    """Raise ValueError when the process has no sampler of that name."""
    if sampler not in process.samplers:
        raise ValueError(f"the objective {process.objective} has no sampler {sampler!r}: "
                         f"use one of {', '.join(process.samplers)}")


def slope(x, x_start, t):
    """The velocity that leads from x at t (N,) to x_start at 1, too small from t = 0.95 on.

    There it would be up to infinite, and so would an error of x_start in it (JiT).
    """
    return (x_start - x) / (1 - t).clamp(min=0.05)[:, None, None, None]


def fresh_noise(i, x):
    """The default of step_noise."""
    return torch.randn_like(x)


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """log p, in nats, of 8-bit data x in [-1, 1] under a Gaussian integrated over each level's bin.

    DDPM (13). The normal cdf is the tanh approximation of the official code (Page, 1977), which its
    losses contain.
    """
    cdf = lambda z: 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    log = lambda p: p.clamp(min=1e-12).log()
    inverse = (-log_scale).exp()
    upper = cdf((x - mean + 1 / 255) * inverse)
    lower = cdf((x - mean - 1 / 255) * inverse)
    # The first level's bin reaches to minus infinity, the last level's to infinity.
    inner = torch.where(x > 0.999, log(1 - lower), log(upper - lower))
    return torch.where(x < -0.999, log(upper), inner)
