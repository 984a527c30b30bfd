"""How fast this is beside others, on this machine, in one run. Not a test: pytest leaves it alone.

    python tests/benchmark.py                      every section; or name some of
    python tests/benchmark.py train sample         a training step; a guided sampling step
    python tests/benchmark.py losses               does bf16 learn as well as fp32? runs on digits
    python tests/benchmark.py steps --ckpt RUN     image quality against the number of steps
    python tests/benchmark.py metrics data startup         metrics; reading data; --help

The contenders of a table do equal work and take turns, so that a busy moment hits all of them. A
row has the median time, the rate as a multiple of the first row's (median of the turns' ratios),
the share of the machine's own matrix-product rate, measured just before, and the difference of its
result from the first row's. The official code takes part where the environment's DIT_REPO is a copy
of it (needs timm), torch-fidelity where it is installed.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import dit  # noqa: E402
import evaluate  # noqa: E402
import train_accelerate  # noqa: E402
from gaussian_diffusion import create_diffusion  # noqa: E402
from sample_grid import (  # noqa: E402
    SAMPLING_FLAGS,
    Autoencoder,
    make_accelerator,
    sampling_settings,
)

SECTIONS = ("train", "losses", "sample", "steps", "metrics", "data", "startup")
LOOP = 4  # sampling steps that are timed together
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
    table = Table(columns[0], title=title)
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=max(120, Console().width)).print(table)


def compare(title, contenders, args, macs=0):
    """Call the contenders, {name: function}, in turns, and print their table.

    Returns {name: median seconds}.

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
    for kind, rate in rates.items():
        title += f"; {kind} matrix product {2 * rate / 1e9:.0f} GFLOP/s"
    print_table(f"{title}; {torch.get_num_threads()} threads", columns, rows)
    return medians


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


def compile_blocks(network):
    """What --compile does."""
    for block in network.blocks:
        block.compile()
    return network


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


def training_step(network, diffusion, x, y, precision, ours=False, compile=False):
    """A function that takes an optimiser step and returns its loss.

    The k-th steps of all contenders see the same noise.
    """
    network, count = copy.deepcopy(network), itertools.count()
    ema = copy.deepcopy(network).requires_grad_(False)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0, fused=ours or None)
    if compile:
        compile_blocks(network)

    def step():
        torch.manual_seed(next(count))
        t, noise = torch.randint(1000, y.shape, device=x.device), torch.randn_like(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = diffusion.training_losses(network, x, t, dict(y=y), noise=noise)["loss"].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if ours:
            train_accelerate.update_ema(ema, network, 0.9999, 10**6)
        else:
            pairs = zip(ema.parameters(), network.parameters(), strict=True)
            with torch.no_grad():
                for average, weight in pairs:
                    average.lerp_(weight, 1e-4)
        return loss.detach()

    return step


def train(args):
    for name, network, x, y in cases(args, ("DiT-S/4", 32), ("DiT-S/2", 16)):
        process = create_diffusion()
        peers = {"official": official(network, ""), "diffusers": (Diffusers(network), process)}
        contenders = {}
        for (who, peer), precision in itertools.product(peers.items(), PRECISIONS):
            if peer:
                contenders[f"{who} {precision}"] = training_step(*peer, x, y, precision)
        own = partial(training_step, network, process, x, y, ours=True)
        contenders |= {f"ours {precision}": own(precision) for precision in PRECISIONS}
        if not args.quick:
            contenders["ours bf16 compiled"] = own("bf16", compile=True)
        macs = 3 * len(x) * dit.count_macs(network.config)
        compare(f"training step with AdamW and EMA, {name}", contenders, args, macs)


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


def sampling_steps(model, process, x, t, y, precision):
    """A function that takes LOOP DDPM steps from one x.

    It returns the predicted x_0, which has no noise. As in a sampling loop autocast is entered
    once, and need cast the weights once.
    """

    @torch.no_grad()
    def steps():
        with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"):
            for _ in range(LOOP):
                p = process.p_mean_variance(
                    model, x, t, clip_denoised=False, model_kwargs=dict(y=y))
                torch.addcmul(p["mean"], (0.5 * p["log_variance"]).exp(), torch.randn_like(x))
        return p["pred_xstart"]

    return steps


def official_sampling_steps(model, process, x, t, y, precision):
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


def sample(args):
    for name, network, x, y in cases(args, ("DiT-S/2", 4), ("DiT-XL/2", 1)):
        process, t, contenders = create_diffusion("250"), torch.full_like(y, 100), {}
        if theirs := official(network, "250"):
            contenders = {f"official {kind}": official_sampling_steps(*theirs, x, t, y, kind)
                          for kind in PRECISIONS}
        models = {"diffusers": partial(guided, Diffusers(network)),
                  "ours": partial(network.forward_with_cfg, cfg_scale=4.0, cfg_channels=3)}
        for (who, model), kind in itertools.product(models.items(), PRECISIONS):
            contenders[f"{who} {kind}"] = sampling_steps(model, process, x, t, y, kind)
        if not args.quick:
            with torch.device("meta"):
                twin = dit.DiT(**network.config)
            twin.load_state_dict(network.state_dict(), assign=True)
            twin = compile_blocks(twin.eval())
            model = partial(twin.forward_with_cfg, cfg_scale=4.0, cfg_channels=3)
            steps = sampling_steps(model, process, x, t, y, "bf16")
            contenders["ours bf16, blocks compiled"] = steps
        macs = LOOP * 2 * len(x) * dit.count_macs(network.config)
        compare(f"{LOOP} guided DDPM steps, {name}", contenders, args, macs)


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


def frechet(kind, mu, sigma, args):
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
    off = ", ".join(f"{name} {difference(f(), exact):.0e}" for name, f in contenders.items())
    title = f"Frechet distance of {len(mu)} features, {kind}; relative errors: {off}"
    compare(title, contenders, args)


def kernel_distance(args):
    """KID is a mean over subsets: ten of them tell the time of a hundred."""
    count, width, size = (60, 32, 50) if args.quick else (5000, 2048, 1000)
    random = np.random.default_rng(0)
    real, fake = (torch.from_numpy(random.normal(size=(count, width)).astype(np.float32) * scale)
                  for scale in (1.0, 0.97))
    settings = dict(kid_subsets=10, kid_subset_size=size, rng_seed=2020, verbose=False)
    contenders = {}
    if installed("torch_fidelity"):
        from torch_fidelity.metric_kid import kid_features_to_metric

        name = "kernel_inception_distance_mean"
        contenders["torch-fidelity"] = lambda: kid_features_to_metric(fake, real, **settings)[name]
    contenders["ours"] = lambda: evaluate.kernel_distance(real, fake, 10, size)[0]
    compare(f"KID of {count} x {width} features, 10 subsets of {size}", contenders, args)


def set_statistics(args):
    rows = np.random.default_rng(0).normal(size=(200, 32) if args.quick else (10_000, 2048))
    rows = rows.astype(np.float32)
    wide = rows.astype(np.float64)  # as clean-fid and torch-fidelity do before they call numpy
    compare("mean and covariance of {} x {} features".format(*rows.shape), {
        "numpy": lambda: (wide.mean(0), np.cov(wide, rowvar=False))[1],
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


def precision_recall(args):
    sizes, first, rows = (200, 400, 32) if args.quick else (10_000, 20_000, 2048), None, []
    for who in ["torch-fidelity", "ours"] if installed("torch_fidelity") else ["ours"]:
        # The peak memory of a fresh process is its own.
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            seconds, values, peak = pool.submit(prc_child, who, *sizes).result()
        first = first or seconds
        rows.append([who, f"{seconds:.1f}", f"{first / seconds:.2f}", f"{peak:.2f}",
                     *map("{:.4f}".format, values)])
    columns = ["", "seconds", "times the first", "peak memory, GB", "precision", "recall"]
    print_table("precision and recall, {} real x {} generated x {}".format(*sizes), columns, rows)


def metrics(args):
    size, random = 32 if args.quick else 2048, np.random.RandomState(0)
    for kind, count in (("full rank", 4 * size), ("half rank", size // 2)):
        rows = random.randn(count, size) @ random.randn(size, size)
        frechet(kind, *evaluate.compute_statistics(rows), args)
    kernel_distance(args)
    set_statistics(args)
    precision_recall(args)

    # The evaluator's own share of the time.
    accelerator, count = make_accelerator(), 8 if args.quick else 512
    network = evaluate.load_features("efficientnet-lite0", args.device)
    pixels = random.randint(256, size=(count, 64, 64, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    data = evaluate.ImageData("noise", images, [0] * count, None, 64)
    batches = list(evaluate.image_batches(data, accelerator))

    def alone():
        for batch in batches:
            network(batch.to(args.device))

    def evaluator():
        evaluate.reference_features(data, network, accelerator, ("fid",))

    contenders = {"the feature network alone": alone, "the evaluator": evaluator}
    compare(f"features and statistics of {count} images", contenders, args)


# ----------------------------------------------------------------------------------- data and start


def quiet_load(folder, size):
    """load_data without its line on stdout, which would stand between the tables."""
    with contextlib.redirect_stdout(io.StringIO()):
        return evaluate.load_data(str(folder), size)


def read_jpegs(folder, count, args):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import Compose, Normalize, ToTensor

    random = np.random.RandomState(0)
    (folder / "class").mkdir(parents=True)
    for i in range(count):
        pixels = random.randint(256, size=(24, 32, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((500, 375))
        image.save(folder / "class" / f"{i:04d}.jpg", quality=90)
    crop = partial(evaluate.center_crop_arr, image_size=256)
    theirs = ImageFolder(folder, Compose([crop, ToTensor(), Normalize([0.5] * 3, [0.5] * 3)]))
    ours = quiet_load(folder, 256)
    compare(f"{count} JPEG files of 500 x 375 pixels as tensors of 256 x 256", {
        "torchvision's ImageFolder": lambda: torch.stack([theirs[i][0] for i in range(count)]),
        "ours": lambda: torch.stack([ours[i][0] for i in range(count)]) / 127.5 - 1,
    }, args)


def open_folder(folder, classes, files, args):
    """Finding the files and numbering the classes; no image is read."""
    from torchvision.datasets import ImageFolder

    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    for c in range(classes):
        (folder / f"n{c:08d}").mkdir(parents=True)
        for i in range(files):
            (folder / f"n{c:08d}" / f"{i:06d}.png").write_bytes(file.getvalue())
    compare(f"opening a folder of {classes} classes, {classes * files} files", {
        "torchvision's ImageFolder": lambda: torch.tensor(ImageFolder(folder).targets),
        "ours": lambda: torch.from_numpy(quiet_load(folder, 8).labels),
    }, args)


def read_cache(folder, count, args):
    rows = [(torch.randn(2, 8, 32, 32).half(), 0) for _ in range(count)]
    train_accelerate.write_shard(folder / "shard.safetensors", rows, [], {})
    cache = train_accelerate.LatentCache([folder / "shard.safetensors"], [count], [])
    order = torch.randperm(count).tolist()
    network = random_network("DiT-Ti/2" if args.quick else "DiT-S/8", args.device)
    batch = random_batch(network, 32, args.device)
    step = training_step(network, create_diffusion(), *batch, "bf16", ours=True)
    title = f"{count} latents from the cache, and a training step of 32, DiT-S/8"
    medians = compare(title, {
        "training bf16": lambda: step() and None,
        "latent cache": lambda: [cache[i, False] for i in order] and None,
    }, args)
    read, trained = count / medians["latent cache"], 32 / medians["training bf16"]
    print(f"latents read {read:.0f} a second, trained {trained:.0f}: {read / trained:.0f} times as "
          "fast")


def data(args):
    count = 16 if args.quick else 256
    classes, files = (4, 4) if args.quick else (1000, 50)
    with tempfile.TemporaryDirectory() as folder:
        read_jpegs(Path(folder) / "jpeg", count, args)
        open_folder(Path(folder) / "many", classes, files, args)
        read_cache(Path(folder), count, args)


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


def main(args):
    args.device = make_accelerator().device
    args.rounds = args.rounds or (1 if args.quick else 7)
    for section in args.section or SECTIONS:
        globals()[section](args)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Measure speed beside other implementations.")
    add = parser.add_argument
    add("section", nargs="*", help=f"{', '.join(SECTIONS)} (default: all)")
    add("--rounds", type=int, help="turns of the contenders (default: 7)")
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
