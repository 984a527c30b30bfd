"""How fast this is beside others, on this machine, in one run. Not a test: pytest leaves it alone.

    python tests/benchmark.py                      every section; or name some, each takes minutes
    python tests/benchmark.py sample sample-xl     guided sampling steps of DiT-S/2, of DiT-XL/2
    python tests/benchmark.py train update         a training step; what AdamW and EMA take of it
    python tests/benchmark.py evaluate features    evaluate.py end to end; its features alone
    python tests/benchmark.py frechet kid statistics neighbours      metrics beside other packages
    python tests/benchmark.py jpeg listing cache startup         files, latents, --help
    python tests/benchmark.py losses               does bf16 learn as well as fp32? runs on digits
    python tests/benchmark.py steps --ckpt RUN     image quality against the number of steps

The contenders of a table do equal work, each at its best setting, and take turns, so that a busy
moment hits all of them. A row has the median time, the rate as a multiple of the first row's
(median of the turns' ratios), the share of the machine's own matrix-product rate, measured just
before, and the difference of its result from the first row's. The last table has ours beside the
best peer, with the spread of the turns. Tables are Markdown, for the README.

The official code takes part where the environment's DIT_REPO is a copy of it (needs timm),
torch-fidelity where it is installed. "Compiled" is torch.compile of the whole network, for ours
what --compile does.
"""

import argparse
import contextlib
import copy
import importlib.util
import io
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import dit  # noqa: E402
import evaluate  # noqa: E402
import train_accelerate  # noqa: E402
from gaussian_diffusion import create_diffusion, create_process  # noqa: E402
from sample_grid import (  # noqa: E402
    SAMPLING_FLAGS,
    Autoencoder,
    CompiledNetwork,
    IntervalGuidance,
    make_accelerator,
    sampling_settings,
)

LOOP = 4  # sampling steps that are timed together
SUMMARY = []  # the rows of the last table, one for each comparison of ours with a peer
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}

# ---------------------------------------------------------------------------------------- measuring


def clock(function, device):
    """(seconds, result) of one call."""
    start = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def matrix_rate(dtype, device, size=2048):
    """Multiply-adds a second of a product of two matrices (size, size), the best of ten."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return size**3 / min(clock(lambda: a @ b, device)[0] for _ in range(10))


def difference(result, reference):
    """|result - reference| / |reference| of tensors or numbers."""
    result, reference = (torch.as_tensor(x, dtype=torch.float64).cpu() for x in (result, reference))
    return float((result - reference).norm() / reference.norm())


def print_table(title, columns, rows):
    print(f"\n{title}\n")
    for row in [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]:
        print("|", " | ".join(map(str, row)), "|", flush=True)


def compare(title, contenders, args, macs=0):
    """Call the contenders, {name: function}, in turns, and print their table.

    Returns {name: median seconds}. Names that begin with "ours" are ours, the others are peers.
    macs: multiply-adds of a call; the share is of the bf16 rate where a name says so. The functions
    return what is to be compared, a tensor or number, or None. The first turn is not timed: it
    compiles and allocates.
    """
    # The machine's own rates just before, then all contenders in turns.
    kinds = PRECISIONS.items() if macs else ()
    rates = {kind: matrix_rate(dtype, args.device) for kind, dtype in kinds}
    turns = []
    for _ in range(1 + args.rounds):
        turns.append([clock(step, args.device) for step in contenders.values()])
    seconds = [[turn[i][0] for turn in turns[1:]] for i in range(len(contenders))]
    medians = {name: statistics.median(own) for name, own in zip(contenders, seconds, strict=True)}

    # One row each, compared with the first.
    compared, rows = turns[0][0][1] is not None, []
    for i, name in enumerate(contenders):
        ratios = [first / own for first, own in zip(seconds[0], seconds[i], strict=True)]
        rows.append([name, f"{medians[name] * 1e3:.1f}", f"{statistics.median(ratios):.2f}"])
        if macs:
            rate = rates["bf16" if "bf16" in name else "fp32"]
            rows[-1].append(f"{macs / medians[name] / rate:.0%}")
        if compared:
            rows[-1].append(f"{max(difference(turn[i][1], turn[0][1]) for turn in turns):.1e}")
    columns = ["", "ms", "times the first"]
    columns += ["of the matrix product's rate"] * bool(macs) + ["difference"] * compared
    products = [f"; {kind} matrix product {2 * rate / 1e9:.0f} GFLOP/s"
                for kind, rate in rates.items()]
    print_table(f"{title}{''.join(products)}; {torch.get_num_threads()} threads", columns, rows)
    summarize(title, dict(zip(contenders, seconds, strict=True)))
    return medians


def summarize(work, seconds):
    """Add to the last table our fastest and the fastest peer, of {name: seconds of each turn}."""
    fastest = sorted(seconds, key=lambda name: statistics.median(seconds[name]))
    ours = next((name for name in fastest if name.startswith("ours")), None)
    peer = next((name for name in fastest if not name.startswith("ours")), None)
    if ours and peer:
        ratios = [b / a for a, b in zip(seconds[ours], seconds[peer], strict=True)]
        shown = [f"{name}: {statistics.median(seconds[name]) * 1e3:.1f}" for name in (ours, peer)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        SUMMARY.append([work, *shown, spread])


def installed(name):
    if importlib.util.find_spec(name) is None:
        print(f"{name} is not installed: left out")
        return False
    return True


# ------------------------------------------------------------------------------------- the networks


def random_network(name, device, **overrides):
    """A DiT in eval mode (no label is dropped) of random weights: a fresh one predicts zeros."""
    torch.manual_seed(0)
    network = dit.build_dit(name, **overrides).to(device).eval()
    for p in network.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.02)
    return network


def random_batch(network, batch, device):
    """Latents (N, C, H, W) and labels (N,)."""
    shape = batch, network.in_channels, network.input_size, network.input_size
    x = torch.randn(shape, device=device)
    return x, torch.randint(network.num_classes, (batch,), device=device)


def cases(args, *sizes):
    """Name, random network, latents and labels of each (name, batch); quick: of a small one."""
    small = dict(input_size=8) if args.quick else {}
    for name, batch in [("DiT-Ti/2", 2)] if args.quick else sizes:
        network = random_network(name, args.device, **small)
        yield f"{name}, batch {batch}", network, *random_batch(network, batch, args.device)


class Diffusers(torch.nn.Module):
    """diffusers' DiTTransformer2DModel with the weights of `network`, called as that is.

    It has a copy of the embedders in every block and trains each by itself: after a step it is
    another network.
    """

    def __init__(self, network):
        from diffusers import DiTTransformer2DModel

        super().__init__()
        c = network.config
        net = DiTTransformer2DModel(
            c["num_heads"], c["hidden_size"] // c["num_heads"], c["in_channels"],
            network.out_channels, c["depth"], sample_size=c["input_size"],
            patch_size=c["patch_size"], num_embeds_ada_norm=c["num_classes"], norm_eps=1e-6)
        self.net = net.to(network.pos_embed.device).eval()
        weights = dit.to_diffusers(network.state_dict(), network.depth)
        self.net.load_state_dict(weights, strict=False)
        for module in self.net.modules():  # its frequencies of the timestep differ
            if hasattr(module, "time_proj"):
                module.time_proj.downscale_freq_shift = 0

    def forward(self, x, t, y):
        return self.net(x, timestep=t, class_labels=y).sample


def official(network, respacing):
    """The official network with the weights of `network`, and the official process.

    None if there is no copy, or it does not fit.
    """
    repo = os.environ.get("DIT_REPO")
    if not repo or network.num_classes != 1000 or network.input_size < 32:
        return None
    if repo not in sys.path:
        sys.path.append(repo)
    import diffusion
    import models

    keys = ("input_size", "patch_size", "hidden_size", "depth", "num_heads")
    with torch.device("meta"):
        theirs = models.DiT(**{key: network.config[key] for key in keys})
    theirs.load_state_dict(network.state_dict(), assign=True)
    return theirs.eval(), diffusion.create_diffusion(respacing)


# --------------------------------------------------------------------------------- train and sample


class TrainingStep:
    """An optimiser step of a copy of the network, which returns its loss.

    The k-th steps of all contenders see the same noise.
    """

    def __init__(self, network, diffusion, x, y, precision, ours=False, compiled=False):
        self.x, self.y, self.precision, self.ours = x, y, precision, ours
        self.diffusion, self.count = diffusion, itertools.count()
        self.network = self.called = copy.deepcopy(network)
        self.ema = copy.deepcopy(network).requires_grad_(False)
        trained = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=ours or None)
        if compiled and ours:
            for block in self.network.blocks:
                block.compile()
        elif compiled:
            self.called = torch.compile(self.network)

    def __call__(self):
        loss = self.forward_and_backward()
        self.adamw()
        self.optimizer.zero_grad()
        self.update_ema()
        return loss

    def forward_and_backward(self):
        torch.manual_seed(next(self.count))
        x, y = self.x, self.y
        t, noise = torch.randint(1000, y.shape, device=x.device), torch.randn_like(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self.diffusion.training_losses(self.called, x, t, dict(y=y), noise=noise)
            loss = losses["loss"].mean()
        loss.backward()
        return loss.detach()

    def adamw(self):
        self.optimizer.step()

    def update_ema(self):
        if self.ours:
            return train_accelerate.update_ema(self.ema, self.network, 0.9999, 10**6)
        pairs = zip(self.ema.parameters(), self.network.parameters(), strict=True)
        with torch.no_grad():
            for average, weight in pairs:
                average.lerp_(weight, 1e-4)


def settings_of(args, *names):
    """Yield (row, name, precision, compiled) for what is tried of each name."""
    tries = [("fp32", False), ("bf16", False), ("bf16", True)]
    for name, (precision, compiled) in itertools.product(names, tries):
        # diffusers in fp32 is as fast as the official code, and compiling is not quick.
        if (name, precision) != ("diffusers", "fp32") and not (compiled and args.quick):
            yield f"{name} {precision}{', compiled' if compiled else ''}", name, precision, compiled


def train(args):
    for name, network, x, y in cases(args, ("DiT-S/2", 16)):
        process = create_diffusion()
        networks = {"official": official(network, ""), "diffusers": (Diffusers(network), process),
                    "ours": (network, process)}
        contenders = {}
        for title, who, precision, compiled in settings_of(args, *networks):
            if networks[who]:
                contenders[title] = TrainingStep(
                    *networks[who], x, y, precision, who == "ours", compiled)
        macs = 3 * len(x) * dit.count_macs(network.config)
        compare(f"training step with AdamW and EMA, {name}", contenders, args, macs)


def update(args):
    """What of a training step is not the network's."""
    for name, network, x, y in cases(args, ("DiT-S/2", 32)):
        step = TrainingStep(network, create_diffusion(), x, y, "bf16", True, not args.quick)
        parts = {"forward and backward": step.forward_and_backward, "AdamW": step.adamw,
                 "EMA": step.update_ema}
        turns = [[clock(part, args.device)[0] for part in parts.values()]
                 for _ in range(1 + args.rounds)][1:]
        medians = [statistics.median(seconds) for seconds in zip(*turns, strict=True)]
        rows = [[part, f"{seconds * 1e3:.1f}", f"{seconds / sum(medians):.1%}"]
                for part, seconds in zip(parts, medians, strict=True)]
        print_table(f"parts of a training step, bf16, compiled, {name}", ["", "ms", "share"], rows)


def losses(args):
    """Train on digits in fp32 and bf16: the mean losses of the last 200 steps agree to 2 %."""
    means, steps, rows = [], 4 if args.quick else args.steps, []
    for precision in ("no", "bf16"):
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--max-steps {steps} --log-every 2 --sample-every 0 --eval-every 0 "
            flags += f"--ckpt-every {steps} --mixed-precision {precision} --results-dir {folder} "
            command = [sys.executable, ROOT / "train_accelerate.py", *flags.split()]
            subprocess.run([*command, "--run-name", "run"], check=True)
            text = (Path(folder) / "run" / "metrics.jsonl").read_text()
            lines = [json.loads(line) for line in text.splitlines()]
            lines = [line for line in lines if "loss" in line and line["step"] > steps - 200]
        means.append(statistics.mean(line["loss"] for line in lines))
        rate = statistics.median(line["images_per_second"] for line in lines)
        relative = f"{means[-1] / means[0] - 1:+.1%}"
        rows.append([precision, f"{means[-1]:.4f}", relative, f"{rate:.0f}"])
    columns = ["mixed precision", "mean loss of the last 200 steps", "relative to the first",
               "images a second"]
    print_table(f"digits, {steps} steps", columns, rows)


def guided(network, x, t, y, scale=4.0):
    """Guidance of the first three channels, as in the official code, around any network."""
    null = torch.full_like(y, 1000)
    both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
    cond, uncond = both.chunk(2)
    return torch.cat([uncond[:, :3] + scale * (cond[:, :3] - uncond[:, :3]), cond[:, 3:]], dim=1)


def sampling_steps(model, x, t, y, precision):
    """A function that takes LOOP DDPM steps from one x.

    It returns the predicted x_0, which has no noise. As in a sampling loop autocast is entered
    once, and need cast the weights once.
    """
    process = create_diffusion("250")

    @torch.no_grad()
    def steps():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            for _ in range(LOOP):
                p = process.p_mean_variance(
                    model, x, t, clip_denoised=False, model_kwargs=dict(y=y))
                torch.addcmul(p["mean"], (0.5 * p["log_variance"]).exp(), torch.randn_like(x))
        return p["pred_xstart"]

    return steps


def our_steps(network, x, t, y, precision, compiled):
    model = CompiledNetwork.of(network, precision, len(x)) if compiled else network
    model = partial(model.forward_with_cfg, cfg_scale=4.0, cfg_channels=3)
    return sampling_steps(model, x, t, y, precision)


def diffusers_steps(network, x, t, y, precision, compiled):
    model = Diffusers(network)
    model = partial(guided, torch.compile(model) if compiled else model)
    return sampling_steps(model, x, t, y, precision)


def official_steps(network, x, t, y, precision, compiled):
    """As sampling_steps, with the official process and guidance; None without the official code."""
    theirs = official(network, "250")
    if not theirs:
        return None
    model, process = theirs
    if compiled:
        model.forward = torch.compile(model.forward)

    @torch.no_grad()
    def steps():
        kwargs = dict(y=torch.cat([y, torch.full_like(y, 1000)]), cfg_scale=4.0)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            for _ in range(LOOP):
                p = process.p_sample(
                    model.forward_with_cfg, torch.cat([x, x]), torch.cat([t, t]),
                    clip_denoised=False, model_kwargs=kwargs)
        return p["pred_xstart"][: len(x)]

    return steps


def sample(args, case=("DiT-S/2", 4), compiled=True):
    makers = {"official": official_steps, "diffusers": diffusers_steps, "ours": our_steps}
    for name, network, x, y in cases(args, case):
        t, contenders = torch.full_like(y, 100), {}
        for title, who, precision, compile in settings_of(args, *makers):
            if compiled or not compile:
                steps = makers[who](network, x, t, y, precision, compile)
                contenders |= {title: steps} if steps else {}
        macs = LOOP * 2 * len(x) * dit.count_macs(network.config)
        compare(f"{LOOP} guided DDPM steps, {name}", contenders, args, macs)


def sample_xl(args):
    """Not compiled: that alone takes minutes on a CPU."""
    sample(args, ("DiT-XL/2", 1), compiled=False)


def steps(args):
    """The Frechet distance of a run's samples against the number of steps and the precision."""
    if args.ckpt is None:
        return print("steps: left out, it needs --ckpt, a run on digits")
    accelerator, data = make_accelerator(), evaluate.load_data("digits")
    network = dit.load_checkpoint(args.ckpt, args.device)
    features = evaluate.load_features("efficientnet-lite0", args.device)
    reference = evaluate.reference_features(data, features, accelerator, ("fid",))
    count, rows, first = 64 if args.quick else len(data), [], None
    few, many = (4, 8) if args.quick else (20, 250)
    tries = [  # another seed's distance is the noise of this metric
        ("ddpm", many, "fp32", 0), ("ddpm", many, "fp32", count), ("ddpm", many, "bf16", 0),
        ("ddpm", few, "fp32", 0), ("ddim", few, "fp32", 0), ("dpm++", few, "fp32", 0),
        ("dpm++", few, "bf16", 0), ("dpm++", few // 2, "fp32", 0)]
    flags = argparse.Namespace(**{flag.dest: flag.default for flag in SAMPLING_FLAGS})
    for flags.sampler, flags.num_sampling_steps, flags.dtype, seed in tries:
        process, sampling = sampling_settings(flags, network, 1.0)
        sampling["cfg_scale"] = 1.0
        start = time.perf_counter()
        distance = evaluate.evaluate_model(
            network, process, Autoencoder(channels=1), reference, features, count, accelerator,
            ("fid",), seed, intervals=False, **sampling)["fd"]
        first = first or distance
        rows.append([flags.sampler, flags.num_sampling_steps, flags.dtype, seed,
                     f"{distance:.2f}", f"{distance / first - 1:+.1%}",
                     f"{time.perf_counter() - start:.0f}"])
    columns = ["sampler", "steps", "precision", "seed", "FD", "relative to the first", "seconds"]
    print_table(f"image quality and steps, {count} samples without guidance", columns, rows)


# ------------------------------------------------------------------------------------------ metrics


def frechet(args):
    size, random = 32 if args.quick else 2048, np.random.RandomState(0)
    for kind, count in (("full rank", 4 * size), ("half rank", size // 2)):
        rows = random.randn(count, size) @ random.randn(size, size)
        frechet_of(kind, *evaluate.compute_statistics(rows), args)


def frechet_of(kind, mu, sigma, args):
    """Of two normals whose distance is known: the second covariance is 4 times the first."""
    from cleanfid import fid

    mu2, sigma2, exact = mu + 0.1, 4 * sigma, 0.01 * len(mu) + np.trace(sigma)
    contenders = {"clean-fid": partial(fid.frechet_distance, mu, sigma, mu2, sigma2),
                  "ours": partial(evaluate.frechet_distance, mu, sigma, mu2, sigma2)}
    if installed("torch_fidelity"):
        from torch_fidelity.metric_fid import fid_statistics_to_metric

        both = dict(mu=mu, sigma=sigma), dict(mu=mu2, sigma=sigma2)
        name = "frechet_inception_distance"
        contenders["torch-fidelity"] = lambda: fid_statistics_to_metric(*both, False)[name]
    compare(f"Frechet distance of {len(mu)} features, {kind}", contenders, args)
    off = ", ".join(f"{name} {difference(f(), exact):.0e}" for name, f in contenders.items())
    print(f"\nrelative errors: {off}")


def kid(args):
    count, width, size, subsets = (60, 32, 50, 3) if args.quick else (5000, 2048, 1000, 100)
    random = np.random.default_rng(0)
    real, fake = (torch.from_numpy(random.normal(size=(count, width)).astype(np.float32) * scale)
                  for scale in (1.0, 0.97))
    settings = dict(kid_subsets=subsets, kid_subset_size=size, rng_seed=2020, verbose=False)
    contenders = {}
    if installed("torch_fidelity"):
        from torch_fidelity.metric_kid import kid_features_to_metric

        name = "kernel_inception_distance_mean"
        contenders["torch-fidelity"] = lambda: kid_features_to_metric(fake, real, **settings)[name]
    contenders["ours"] = lambda: evaluate.kernel_distance(real, fake, subsets, size)[0]
    compare(f"KID of {count} x {width} features, {subsets} subsets of {size}", contenders, args)


def statistics_of_features(args):
    rows = np.random.default_rng(0).normal(size=(200, 32) if args.quick else (10_000, 2048))
    rows = rows.astype(np.float32)
    compare("mean and covariance of {} x {} features".format(*rows.shape), {
        # As clean-fid and torch-fidelity call it; np.cov computes in float64.
        "numpy": lambda: (rows.mean(0), np.cov(rows, rowvar=False))[1],
        "ours": lambda: evaluate.compute_statistics(rows)[1],
    }, args)


def prc_child(who, real, fake, width):
    """(seconds, (precision, recall), peak memory in GB) in a process of its own."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(real, width, generator=generator)
    fake = torch.randn(fake, width, generator=generator) * 0.97
    if who == "ours":
        work = partial(evaluate.precision_recall, real, fake)
    else:
        from torch_fidelity.metric_prc import calculate_precision_recall_full

        work = partial(calculate_precision_recall_full, fake, real)
    seconds, values = clock(work, real.device)
    return seconds, values, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def neighbours(args):
    sizes, seconds_of, rows = (200, 400, 32) if args.quick else (10_000, 20_000, 2048), {}, []
    for who in ["torch-fidelity", "ours"] if installed("torch_fidelity") else ["ours"]:
        # The peak memory of a fresh process is its own.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            seconds, values, peak = pool.submit(prc_child, who, *sizes).result()
        seconds_of[who] = [seconds]
        rows.append([who, f"{seconds:.1f}", f"{peak:.2f}", *map("{:.4f}".format, values)])
    title = "precision and recall, {} real x {} generated x {}".format(*sizes)
    columns = ["", "seconds", "peak memory, GB", "precision", "recall"]
    print_table(title, columns, rows)
    summarize(title, seconds_of)


# --------------------------------------------------------------------------- evaluate.py as a whole


def noise_images(count, side):
    """ImageData of random pictures, side pixels high and wide."""
    pixels = np.random.RandomState(0).randint(256, size=(count, side, side, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    return evaluate.ImageData("noise", images, [0] * count, None, side)


def features(args):
    """The evaluator's own share of the time."""
    accelerator, data = make_accelerator(), noise_images(8 if args.quick else 512, 64)
    network = evaluate.load_features("efficientnet-lite0", args.device)
    batches = list(evaluate.image_batches(data, accelerator))

    def alone():
        for batch in batches:
            network(batch.to(args.device))

    def evaluator():
        evaluate.reference_features(data, network, accelerator, ("fid",))

    contenders = {"the feature network alone": alone, "ours, the evaluator": evaluator}
    compare(f"features and statistics of {len(data)} images", contenders, args)


@contextlib.contextmanager
def timed(owner, name, seconds, part, device):
    """Within it the time of every call of owner.name is added to seconds[part]."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        took, result = clock(partial(function, *args, **kwargs), device)
        seconds[part] += took
        return result

    with mock.patch.object(owner, name, wrapper):
        yield


def evaluation(args):
    """Where the time goes from noise to a metric, with networks of the usual sizes.

    Weights are random: that of Stable Diffusion's VAE, whose shape this one has, is a download.
    """
    from diffusers import AutoencoderKL

    count, channels = (2, (4, 4, 4, 4)) if args.quick else (8, (128, 256, 512, 512))
    vae = AutoencoderKL(
        block_out_channels=channels, layers_per_block=2, latent_channels=4,
        norm_num_groups=min(channels[0], 32), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4)
    vae = vae.to(args.device, memory_format=torch.channels_last).eval().requires_grad_(False)
    vae = Autoencoder(vae, "random")
    name, size = ("DiT-Ti/2", 8) if args.quick else ("DiT-S/2", 32)
    network = random_network(name, args.device, input_size=size)
    reader = evaluate.load_features("efficientnet-lite0", args.device)
    accelerator, data = make_accelerator(), noise_images(8, size * vae.factor)
    reference = evaluate.reference_features(data, reader, accelerator, ("fid",))

    rows = []
    for dtype, compile in [("fp32", False)] if args.quick else [("fp32", False), ("bf16", True)]:
        process = create_process("ddpm", "dpm++", 20)
        seconds = dict.fromkeys(("compiling", "network", "VAE", "features"), 0.0)
        with (timed(CompiledNetwork, "of", seconds, "compiling", args.device),
              timed(IntervalGuidance, "__call__", seconds, "network", args.device),
              timed(Autoencoder, "decode", seconds, "VAE", args.device),
              timed(type(reader), "__call__", seconds, "features", args.device)):
            total, _ = clock(partial(
                evaluate.evaluate_model, network, process, vae, reference, reader, count,
                accelerator, ("fid",), batch_size=4, intervals=False, cfg_scale=1.5,
                sampler="dpm++", dtype=dtype, compile=compile), args.device)
        parts = [*seconds.values(), total - sum(seconds.values()), total]
        rows.append([f"{dtype}{', --compile' if compile else ''}", *map("{:.1f}".format, parts)])
    columns = ["", *seconds, "the rest", "all"]
    title = f"evaluate.py with {count} generated samples of {size * vae.factor} px, {name}"
    print_table(f"{title}, 20 steps of dpm++ with guidance: seconds", columns, rows)


# ----------------------------------------------------------------------------------- data and start


def quiet_load(folder, size):
    """load_data without its line on stdout, which would stand between the tables."""
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluate.load_data(str(folder), size)


def jpeg(args):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, ToTensor

    random, count = np.random.RandomState(0), 16 if args.quick else 256
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "class").mkdir()
        for i in range(count):
            pixels = random.randint(256, size=(24, 32, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).resize((500, 375))
            image.save(Path(folder) / "class" / f"{i:04d}.jpg", quality=90)
        crop = partial(evaluate.center_crop_arr, image_size=256)
        theirs = ImageFolder(folder, Compose([crop, ToTensor(), Normalize([0.5] * 3, [0.5] * 3)]))
        ours = quiet_load(folder, 256)
        compare(f"{count} JPEG files of 500 x 375 pixels as tensors of 256 x 256", {
            "torchvision's ImageFolder": lambda: torch.stack([theirs[i][0] for i in range(count)]),
            "ours": lambda: torch.stack([ours[i][0] for i in range(count)]) / 127.5 - 1,
        }, args)


def listing(args):
    """Finding ImageNet's files and numbering its classes; no image is read."""
    from torchvision.datasets import ImageFolder

    # A file has so many names at most that a few of them make all.
    classes, count = (4, 16) if args.quick else (1000, 1_281_167)
    with tempfile.TemporaryDirectory() as folder:
        for c in range(classes):
            inside = Path(folder) / "images" / f"n{c:08d}"
            inside.mkdir(parents=True)
            first = inside / f"{c:07d}.png"
            Image.new("RGB", (8, 8)).save(first)
            for i in range(c + classes, count, classes):
                os.link(first, inside / f"{i:07d}.png")
        folder = Path(folder) / "images"
        compare(f"listing a folder of {classes} classes, {count} files", {
            "torchvision's ImageFolder": lambda: torch.tensor(ImageFolder(folder).targets),
            "ours": lambda: torch.from_numpy(quiet_load(folder, 8).labels),
        }, args)


def cache(args):
    count = 16 if args.quick else 256
    rows = [(torch.randn(2, 8, 32, 32).half(), 0) for _ in range(count)]
    network = random_network("DiT-Ti/2" if args.quick else "DiT-S/8", args.device)
    batch = random_batch(network, 32, args.device)
    step = TrainingStep(network, create_diffusion(), *batch, "bf16", ours=True)
    order = torch.randperm(count).tolist()
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "shard.safetensors"
        train_accelerate.write_shard(shard, rows, [], {})
        latents = train_accelerate.LatentCache([shard], [count], [])
        title = f"{count} latents from the cache, and a training step of 32, DiT-S/8"
        medians = compare(title, {
            "training bf16": lambda: step() and None,
            "latent cache": lambda: [latents[i, False] for i in order] and None,
        }, args)
    read, trained = count / medians["latent cache"], 32 / medians["training bf16"]
    print(f"latents read {read:.0f} a second, trained {trained:.0f}: {read / trained:.0f} times as "
          "fast")


def startup(args):
    run = lambda *command, cwd=ROOT: lambda: subprocess.run(
        [sys.executable, *command], cwd=cwd, check=True, capture_output=True) and None
    scripts = ["dit.py", "sample_grid.py", "evaluate.py", "train_accelerate.py"]
    scripts = scripts[:1] if args.quick else scripts
    contenders = {"import torch": run("-c", "import torch")}
    if "DIT_REPO" in os.environ:
        official = run("sample.py", "--help", cwd=os.environ["DIT_REPO"])
        contenders["official sample.py --help"] = official
    contenders |= {f"{script} --help": run(script, "--help") for script in scripts}
    compare("starting", contenders, args)


SECTIONS = {
    "train": train, "update": update, "sample": sample, "sample-xl": sample_xl,
    "evaluate": evaluation, "features": features, "frechet": frechet, "kid": kid,
    "statistics": statistics_of_features, "neighbours": neighbours, "jpeg": jpeg,
    "listing": listing, "cache": cache, "startup": startup, "losses": losses, "steps": steps,
}


def main(args):
    args.device = make_accelerator().device
    args.rounds = args.rounds or (1 if args.quick else 3)
    for section in args.section or SECTIONS:
        began = time.monotonic()
        SECTIONS[section](args)
        print(f"\n({section}: {time.monotonic() - began:.0f} s)", flush=True)
    if SUMMARY:
        columns = ["", "ms", "best peer, ms", "times the best peer (the turns)"]
        print_table("ours beside the best peer", columns, SUMMARY)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Measure speed beside other implementations.")
    add = parser.add_argument
    add("section", nargs="*", help=f"{', '.join(SECTIONS)} (default: all)")
    add("--rounds", type=int, help="turns of the contenders (default: 3)")
    add("--steps", type=int, default=1500,
        help="training steps of `losses` (default: %(default)s)")
    add("--ckpt", help="a run on digits, for `steps` (default: leave that out)")
    add("--quick", action="store_true",
        help="does it run? tiny sizes, one turn, nothing compiled (default: no)")
    args = parser.parse_args(argv)
    if unknown := set(args.section) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(unknown)}: choose from {', '.join(SECTIONS)}")
    return args


if __name__ == "__main__":
    dit.run_command(main, parse_args())
