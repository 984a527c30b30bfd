"""From noise to pictures: the VAE, sampling with guidance, and grids. Read dit.py and gaussian_diffusion.py first.

    python sample_grid.py --ckpt results/digits-DiT-Ti-2                 the digits demo: one column a class
    python sample_grid.py --image-size 512 --seed 1                      official weights, downloaded once
    python sample_grid.py --ckpt CKPT --class-labels "golden retriever,otter,88" --images-per-class 4
    python sample_grid.py --ckpt CKPT --sampler dpm++ --num-sampling-steps 20 --guidance-interval 0.3,5
    python sample_grid.py --ckpt CKPT --trajectory out.gif               the predicted x_0, step by step
    python sample_grid.py --ckpt CKPT --sweep cfg_scale=1,1.5,4          one row a value, the same noise in each
    accelerate launch --num_processes 8 sample_grid.py --ckpt CKPT ...   eight GPUs share the images

CKPT is a run's folder, a weights file (ours, the official .pt, diffusers) or a name that downloads. A PNG remembers how
it was made: python -c "from PIL import Image; print(Image.open('sample.png').text['command'])"
"""

import argparse
import copy
import difflib
import json
import math
import os
import re
import shlex
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dit import InputError, check_config, load_checkpoint, log_stderr, run_command, write_atomically
from gaussian_diffusion import create_diffusion

SAMPLERS = ("ddpm", "ddim", "dpm++")
FORMATS = (".png", ".jpg", ".jpeg", ".webp")
SWEEPS = dict(cfg_scale=float, num_sampling_steps=int, eta=float,  # what --sweep takes, and how a value is read
              sampler=lambda name: SAMPLERS[SAMPLERS.index(name)])
OFFICIAL_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]  # of the official sample.py
SLICE_PIXELS = 512 * 512  # images pass through the VAE so many pixels at a time: 512 px fits in a few GB


def make_accelerator(mixed_precision=None, tf32=True, **kwargs):
    """Accelerate's Accelerator, with TF32 as asked and all cores for a lone CPU process; kwargs go to Accelerator."""
    cpu = not torch.accelerator.is_available()  # said outright, or torchrun's processes on a CPU would each train alone
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=cpu, **kwargs)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32  # the API that torch.compile reads
    # `accelerate launch` leaves one thread unless told otherwise; any other number was somebody's choice
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and accelerator.num_processes == 1 and accelerator.device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return accelerator


class Flag:
    """One flag: the row of a table that the parser, its help and the checks are made of.

    name: "--lr". help: what it does; "(default: ...)" is added from `shown`, else from `default`. default: its value
    when it is not given; None means that the program decides, and `shown` says how. bounds: the smallest and the
    largest value that make sense. options: of argparse. A default of True or False gives --name and --no-name.
    """

    def __init__(self, name, help, default=None, shown=None, bounds=(-math.inf, math.inf), **options):
        self.name, self.default, self.bounds, self.options = name, default, bounds, options
        self.dest = name[2:].replace("-", "_")
        if isinstance(default, bool):
            self.options = dict(action=argparse.BooleanOptionalAction) | options
        shown = shown or {True: "on", False: "off"}.get(default, default)
        self.help = f"{help} (default: {shown})"

    def check(self, args):
        """InputError when the value in args is out of bounds."""
        value, (low, high) = getattr(args, self.dest), self.bounds
        if value is not None and not low <= value <= high:
            bound = f"{low} or more" if value < low else f"{high} or less"
            raise InputError(f"{self.name} {value} must be {bound}")


def add_flags(parser, title, flags):
    """Give the parser a group of flags, each from its row."""
    group = parser.add_argument_group(title)
    for flag in flags:
        group.add_argument(flag.name, default=flag.default, help=flag.help.replace("%", "%%"), **flag.options)


class ProgressBar:
    """How far something is, on rank 0: a bar with the time left, or without a terminal a line every 30 seconds.

    Use it as a context manager and call `advance`; `note` is shown beside it.
    """

    def __init__(self, accelerator, text, total, done=0):
        self.text, self.total, self.done, self.note = text, total, done, ""
        self.began, self.first, self.said = time.monotonic(), done, time.monotonic()
        self.visible, self.bar = accelerator.is_main_process, None

    def __enter__(self):
        console = Console()
        if self.visible and console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(),
                TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=console,
            )
            self.bar.add_task(self.text, total=self.total, completed=self.done, note="")
            self.bar.start()
        return self

    def __exit__(self, *exception):
        if self.bar:
            self.bar.stop()

    def advance(self, count=1, note=None):
        self.done += count
        self.note = self.note if note is None else note
        now = time.monotonic()
        if self.bar:
            self.bar.update(0, completed=self.done, note=self.note)
        elif self.visible and now - self.said >= 30:
            left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
            print(f"{self.text} {self.done}/{self.total}, {left / 60:.0f} min left  {self.note}", flush=True)
            self.said = now


def quiet_hub():
    """From now on the hub's client writes no line for each attempt to reach it: an error says it once."""
    import huggingface_hub

    huggingface_hub.logging.set_verbosity_error()


# ------------------------------------------------------------------------------------------ the VAE


class Autoencoder:
    """Images to latents and back: any image autoencoder of diffusers, or none, where pixels in [-1, 1] are the latents.

    vae: a diffusers module or None; name: what --vae said, stored with checkpoints; channels: of the latents (without a
    VAE of the pixels, 1 or 3); factor: image pixels per latent pixel. The VAE computes in float32, outside autocast.
    """

    def __init__(self, vae=None, name="none", channels=3):
        self.vae, self.name, self.channels, self.factor = vae, name, channels, 1
        self.scale, self.shift = 1.0, 0.0
        if vae is not None:
            self.scale = vae.config.get("scaling_factor") or 1.0
            self.shift = vae.config.get("shift_factor") or 0.0
            moments = self.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=vae.device))
            self.channels, self.factor = moments.shape[1] // 2, 64 // moments.shape[3]

    @classmethod
    def load(cls, name, device="cpu", channels=3):
        """name: "none", "ema" or "mse" (stabilityai/sd-vae-ft-*, a download), a hub id, or a local diffusers folder.

        Raises InputError when there is no such autoencoder, or it cannot be read.
        """
        if name in (None, "none"):
            return cls(channels=channels)
        import diffusers

        quiet_hub()
        source = f"stabilityai/sd-vae-ft-{name}" if name in ("ema", "mse") else str(name)
        warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`")  # between diffusers 0.42 and huggingface_hub
        try:
            config = diffusers.AutoencoderKL.load_config(source)
            kind = getattr(diffusers, str(config["_class_name"]))
            if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
                raise ValueError(f"{config['_class_name']} is no network")
            vae = kind.from_pretrained(source, torch_dtype=torch.float32)
            return cls(vae.to(device).eval().requires_grad_(False), name)
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"cannot load the VAE {source!r}: give ema, mse, a hub id (and a network), or a diffusers "
                             f"folder with config.json ({reason})") from error

    def _in_slices(self, function, x, pixels):
        """function on a few images at a time: as many, of `pixels` image pixels each, as SLICE_PIXELS has room for."""
        with torch.autocast(x.device.type, enabled=False):
            parts = x.float().split(max(1, SLICE_PIXELS // pixels))
            return torch.cat([function(part) for part in parts])

    def _moments(self, x):
        posterior = self.vae.encode(x)
        if hasattr(posterior, "latent_dist"):
            return posterior.latent_dist.parameters
        latents = posterior[0]  # without a distribution (AutoencoderTiny, AutoencoderDC): a vanishing variance
        return torch.cat([latents, torch.full_like(latents, -30)], dim=1)

    @torch.no_grad()
    def encode(self, images):
        """uint8 images (N, 3, H, W) -> moments: (N, 2C, h, w) mean and log-variance; without a VAE the pixels."""
        x = images.float() / 127.5 - 1
        return x[:, : self.channels] if self.vae is None else self._in_slices(self._moments, x, x[0, 0].numel())

    def sample(self, moments, generator=None, noise=None):
        """Draw scaled latents (N, C, h, w) from moments, with the draw's standard normal noise if it is given."""
        if self.vae is None:
            return moments
        mean, log_variance = moments.float().chunk(2, dim=1)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        x = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        return (x - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents (N, C, h, w) -> uint8 images (N, 3, H, W), rounded: 127.5 x + 128, clamped, truncated."""
        x = latents.float()
        if self.vae is not None:
            pixels = x[0, 0].numel() * self.factor**2
            x = self._in_slices(lambda z: self.vae.decode(z).sample, x / self.scale + self.shift, pixels)
        x = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
        return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


def load_vae(model, name=None, default="mse", device="cpu"):
    """The Autoencoder of a model: `name`, or the one it was trained with, or the default. InputError: misfits."""
    name = name or model.metadata.get("vae", default)
    vae = Autoencoder.load(name, device, model.in_channels)
    if vae.channels != model.in_channels or (vae.vae is None and vae.channels not in (1, 3)):
        has = "pixels, 1 or 3 channels" if vae.vae is None else f"latents of {vae.channels} channels"
        raise InputError(f"--vae {name} has {has}, but the model was trained on {model.in_channels} channels")
    return vae


def load_model(ckpt, args, device):
    """The model of --ckpt, its Autoencoder, and the size of its images in pixels, as the flags describe them.

    InputError, naming the flag, when --model, --num-classes, --vae or --image-size say something else.
    """
    model = load_checkpoint(ckpt, device)
    check_config(model, ckpt, args.model, num_classes=args.num_classes)
    vae = load_vae(model, args.vae, "mse", device)
    size = model.input_size * vae.factor
    if args.image_size not in (None, size):
        raise InputError(f"{ckpt} makes images of {size} px, not {args.image_size}: check --image-size and --vae")
    return model, vae, size


# ------------------------------------------------------------------------------------------ sampling


@torch.no_grad()
def sample_images(model, diffusion, vae, y, seeds, cfg_scale=1.0, sampler="ddpm", eta=0.0, cfg_channels=None,
                  guidance_interval=None, dtype="fp32", on_step=None):
    """Images of the labels y (N,), int64 on the model's device: uint8 (N, 3, H, W).

    All noise of image i comes from seeds[i], drawn on the CPU: the same picture in any batch and on any device, up to
    rounding. guidance_interval (low, high): guide only at noise levels sqrt((1 - abar) / abar) between the two, where
    it helps (Kynkaanniemi et al., 2024); elsewhere a step costs one pass in place of two. dtype "bf16" runs the network
    in bfloat16 autocast; the process and the VAE stay float32. on_step(i, x, pred_xstart) is called after each step.
    """
    shape = (model.in_channels, model.input_size, model.input_size)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    low, high = guidance_interval or (0.0, math.inf)

    def step_noise(i=None, x=None):
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return noise.pin_memory().to(y.device, non_blocking=True) if y.is_cuda else noise.to(y.device)

    def model_kwargs(i):
        return dict(y=y, cfg_scale=cfg_scale if low <= diffusion.sigmas[i] <= high else 1.0, cfg_channels=cfg_channels)

    network = model.forward_with_cfg
    kwargs = dict(model_kwargs=model_kwargs, clip_denoised=vae.vae is None, on_step=on_step)
    with torch.autocast(y.device.type, torch.bfloat16, enabled=dtype == "bf16"):  # around all steps: weights cast once
        if sampler == "ddpm":
            latents = diffusion.p_sample_loop(network, step_noise(), step_noise=step_noise, **kwargs)
        elif sampler == "ddim":
            latents = diffusion.ddim_sample_loop(network, step_noise(), step_noise=step_noise, eta=eta, **kwargs)
        elif sampler == "dpm++":
            latents = diffusion.dpm_solver_sample_loop(network, step_noise(), **kwargs)
        else:
            raise InputError(f"unknown sampler {sampler!r}: use one of {', '.join(SAMPLERS)}")
    return vae.decode(latents)


def sample_shared(model, diffusion, vae, y, seeds, accelerator, batch_size=32, film_steps=(), on_step=None, **sampling):
    """sample_images for many images: the processes share them, each works in batches, and all get everything.

    Returns uint8 (F + 1, N, 3, H, W) on the CPU: the predicted x_0 after each of the F film_steps, then the images.
    """
    mine = list(range(accelerator.process_index, len(y), accelerator.num_processes))
    made = []
    for part in (mine[start : start + batch_size] for start in range(0, len(mine), batch_size)):
        film = []

        def watch(i, x, pred_xstart, film=film):
            if i in film_steps:
                film.append(vae.decode(pred_xstart).cpu())
            if on_step:
                on_step(i, x, pred_xstart)

        images = sample_images(model, diffusion, vae, y[part], [seeds[i] for i in part], on_step=watch, **sampling)
        made += zip(part, torch.stack([*film, images.cpu()], dim=1).numpy(), strict=True)
    made = sorted(gather_object(made), key=lambda pair: pair[0])
    return torch.from_numpy(np.stack([frames for _, frames in made], axis=1))


SAMPLING_FLAGS = [
    Flag("--sampler", "how to walk from noise to image", "ddpm", choices=SAMPLERS),
    Flag("--num-sampling-steps", "steps of the sampler", shown="50 for digits, else 250", bounds=(1, 1000), type=int),
    Flag("--eta", "noise of --sampler ddim: 0 none, 1 as much as DDPM", shown="0", bounds=(0, 1), type=float),
    Flag("--cfg-scale", "guidance scale; 1.0 is off, and 0 is not: it ignores the class",
         shown="1.5 for digits, else 4.0 for pictures and 1.0 for metrics", type=float),
    Flag("--cfg-channels", "guide the first N channels only; 3 is what the official code does", shown="all",
         type=int, metavar="N"),
    Flag("--guidance-interval", "guide only at noise levels sigma = sqrt((1-abar)/abar) from LOW to HIGH; the "
         "process has 0.01 to 157", shown="all", metavar="LOW,HIGH"),
    Flag("--dtype", "the network's precision while sampling; bf16 is autocast", "fp32", choices=("fp32", "bf16")),
    Flag("--tf32", "TensorFloat-32 matrix products on NVIDIA GPUs: faster, ten bits of mantissa", True),
]


def add_sampling_args(parser):
    """The flags that all three command lines share: sampling and precision. None: filled in from the model's data."""
    add_flags(parser, "sampling", SAMPLING_FLAGS)


def parse_interval(text):
    """"0.3,5" -> [0.3, 5.0], None -> None; InputError for what is no interval of noise levels."""
    if text is None:
        return None
    try:
        low, high = (float(value) for value in text.split(","))
    except ValueError:
        raise InputError(f"--guidance-interval {text}: give two noise levels, such as 0.3,5") from None
    if not 0 <= low <= high:
        raise InputError(f"--guidance-interval {text}: the first must be 0 or more, the second not below it")
    return [low, high]


def sampling_settings(args, model, cfg_scale):
    """The diffusion process and the keyword arguments of sample_images that the sampling flags ask for.

    Unset flags take what the model's metadata suggest ("sampling"), else 250 steps and cfg_scale. InputError for what
    the model, the device or the schedule cannot do, and for flags that would do nothing.
    """
    suggested = model.metadata.get("sampling", {})
    steps = suggested.get("num_sampling_steps", 250) if args.num_sampling_steps is None else args.num_sampling_steps
    can_guide = model.class_dropout_prob > 0
    scale = args.cfg_scale
    if scale is None:
        scale = suggested.get("cfg_scale", cfg_scale) if can_guide else 1.0
    if scale != 1 and not can_guide:
        raise InputError(f"--cfg-scale {scale} needs a null class, and this model was trained without label dropout: "
                         "use --cfg-scale 1.0")
    if scale < 1:
        log_stderr(f"warning: --cfg-scale {scale} weakens the class; guidance is off at 1.0, not at 0")
    if args.cfg_channels is not None and not 1 <= args.cfg_channels <= model.in_channels:
        raise InputError(f"--cfg-channels {args.cfg_channels}: the model has {model.in_channels} channels")
    if args.eta is not None and (args.sampler != "ddim" or not 0 <= args.eta <= 1):
        raise InputError(f"--eta {args.eta} with --sampler {args.sampler}: eta is from 0 to 1 and for ddim alone")
    if args.dtype == "bf16" and model.pos_embed.is_cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"--dtype bf16: {torch.cuda.get_device_name()} has no bfloat16; use --dtype fp32")
    try:
        respacing = f"trailing{steps}" if args.sampler == "dpm++" else str(steps)
        diffusion = create_diffusion(respacing, learn_sigma=model.learn_sigma)
    except ValueError as error:
        raise InputError(f"--num-sampling-steps {steps}: {error}") from error
    return diffusion, dict(cfg_scale=scale, sampler=args.sampler, eta=args.eta or 0.0, cfg_channels=args.cfg_channels,
                           guidance_interval=parse_interval(args.guidance_interval), dtype=args.dtype)


# ------------------------------------------------------------------------------------------ grids


def class_names(model):
    """A name for each class: from the model's metadata, ImageNet's for its thousand, else numbers."""
    names = model.metadata.get("class_names")
    if model.num_classes == 1000 and (not names or all(re.fullmatch(r"n\d{8}", name) for name in names)):
        from torchvision.models import ResNet18_Weights

        return ResNet18_Weights.DEFAULT.meta["categories"]
    return names or [str(c) for c in range(model.num_classes)]


def find_class(text, names):
    """The number of a class given by name, or by one of a name's comma-separated synonyms, or by number, in this order.

    InputError with the nearest names when there is no such class.
    """
    known = {word.strip().lower(): n for n in reversed(range(len(names))) for word in (names[n], *names[n].split(","))}
    key = text.strip().lower()
    if key in known:
        return known[key]
    if key.isdecimal() and int(key) < len(names):
        return int(key)
    near = difflib.get_close_matches(key, known, 3) + [word for word in known if key and key in word]
    near = ", ".join(f"{word} ({known[word]})" for word in dict.fromkeys(near[:4]))
    raise InputError(f"no class {text!r}: " + (f"the nearest are {near}; " if near else "")
                     + f"numbers go from 0 to {len(names) - 1}")


def captions(y, seeds, names):
    """What stands above each image: the class's first name, where there are several classes, and the seed."""
    first = [names[c].split(",")[0] + ", " if len(names) > 1 else "" for c in y]
    return [f"{name}seed {seed}" for name, seed in zip(first, seeds, strict=True)]


def default_labels(model, per_class):
    """One column for each of the first ten classes, per_class rows: (labels, nrow); a square if there is one class."""
    classes = min(model.num_classes, 10)
    nrow = classes if classes > 1 else per_class
    return [i % classes for i in range(per_class * nrow)], nrow


def class_grid(model, diffusion, vae, per_class, seed, accelerator, **sampling):
    """A training run's own picture (see default_labels), image i from seed + i: (images, nrow, captions)."""
    labels, nrow = default_labels(model, per_class)
    seeds = range(seed, seed + len(labels))
    y = torch.tensor(labels, device=accelerator.device)
    images = sample_shared(model, diffusion, vae, y, seeds, accelerator, **sampling)[-1]
    return images, nrow, captions(labels, seeds, class_names(model))


def make_grid(images, nrow, labels=None, row_labels=None):
    """uint8 images (N, 3, H, W) as one PIL picture, nrow a row; images below 64 px are enlarged.

    labels stand above the images, the first len(labels) of them; row_labels to the left of the rows.
    """
    images, labels, row_labels = images.permute(0, 2, 3, 1).cpu().numpy(), labels or [], row_labels or []
    zoom, gap, nrow = max(1, 64 // images.shape[2]), 2, min(nrow, len(images))
    height, width = images.shape[1] * zoom, images.shape[2] * zoom
    font = ImageFont.load_default(max(10, width // 20))
    line = int(font.size * 1.3)
    rows = -(-len(images) // nrow)
    tops = [gap]  # of the rows, captions included
    for row in range(rows):
        tops.append(tops[-1] + height + gap + (line if row * nrow < len(labels) else 0))
    margin = gap + max((math.ceil(font.getlength(text)) + 2 * gap for text in row_labels), default=0)
    canvas = Image.new("RGB", (margin + nrow * (width + gap), tops[-1]), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        left, top = margin + i % nrow * (width + gap), tops[i // nrow + 1] - height - gap
        canvas.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (left, top))
        if i < len(labels):
            text = labels[i]
            while font.getlength(text) > width:
                text = text[:-2] + "\N{HORIZONTAL ELLIPSIS}"
            draw.text((left, top - line), text, fill="black", font=font)
    for row, text in enumerate(row_labels):
        draw.text((gap, tops[row + 1] - gap - height // 2), text, fill="black", font=font, anchor="lm")
    return canvas


def save_grid(images, path, nrow, labels=None, metadata=None, row_labels=None):
    """Write make_grid's picture as .png, .jpg or .webp; metadata, a dict of str, goes into a PNG's text chunks."""
    canvas, options = make_grid(images, nrow, labels, row_labels), dict(quality=95)
    if Path(path).suffix.lower() == ".png":
        options = dict(pnginfo=PngImagePlugin.PngInfo())
        for key, value in (metadata or {}).items():
            options["pnginfo"].add_text(key, str(value))
    write_atomically(path, lambda temporary: canvas.save(temporary, **options))


def save_film(frames, path, nrow, labels=None):
    """Write uint8 frames (F, N, 3, H, W) as a .gif of grids that rests on its last."""
    first, *others = [make_grid(images, nrow, labels) for images in frames]
    durations = [80] * len(others) + [2000]  # milliseconds
    write_atomically(path, lambda temporary: first.save(
        temporary, save_all=True, append_images=others, duration=durations, loop=0))


# ------------------------------------------------------------------------------------------ the command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Sample a grid of images.")
    add = parser.add_argument
    add("--ckpt", help="a run's folder, a weights file, or a name that downloads (default: DiT-XL/2-{image size})")
    add("--model", help="check that the weights are of this model (default: whatever they are)")
    add("--image-size", type=int, help="check the size of the images, in pixels; without --ckpt 256 or 512 chooses the "
        "weights (default: the weights' own, else 256)")
    add("--num-classes", type=int, help="check the number of classes (default: the weights' own)")
    add("--vae", help="ema, mse, a hub id, a diffusers folder, or none for pixels (default: what the model was trained "
        "with, else mse)")
    add("--class-labels", help="classes by name or number, comma-separated (default: the official eight of ImageNet; "
        "for other data the first ten classes)")
    add("--images-per-class", type=int, help="times to repeat the labels (default: 4 for the first ten, else 1)")
    add("--seed", type=int, default=0, help="image i is drawn from seed + i (default: %(default)s)")
    add("--output", default="sample.png", help="the picture to write: .png, .jpg or .webp (default: %(default)s)")
    add("--nrow", type=int, help="images in a row (default: one of each label if repeated, else by their number)")
    add("--captions", action=argparse.BooleanOptionalAction, default=True, help="class and seed above each image "
        "(default: on)")
    add("--trajectory", metavar="GIF", help="also write the predicted x_0 along the way (default: no)")
    add("--sweep", metavar="NAME=V1,V2", help=f"one row for each value of {', '.join(SWEEPS)} (default: no)")
    add("--per-proc-batch-size", type=int, default=32, help="images at once on each process (default: %(default)s)")
    add_sampling_args(parser)
    return parser.parse_args(argv)


def check_output(path, formats):
    """InputError unless a file of one of these formats can be written there; tries the folder, leaves nothing."""
    path = Path(path)
    if path.suffix.lower() not in formats or path.is_dir():
        raise InputError(f"cannot write a picture to {path}: the name of a file must end in {', '.join(formats)}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}; choose an existing folder") from error


def choose_labels(args, model, names):
    """The labels, a list of ints, and images in a row that the flags ask for."""
    per_class = args.images_per_class
    if args.class_labels is not None:
        labels = [find_class(text, names) for text in args.class_labels.split(",")]
    elif model.num_classes == 1000:
        labels = OFFICIAL_LABELS
    else:
        return default_labels(model, per_class or (1 if args.sweep else 4))
    n = len(labels)
    return labels * (per_class or 1), n if n <= 5 or (per_class or 1) > 1 else math.ceil(math.sqrt(2 * n))


def sweep_rows(args):
    """The arguments of each row of the picture, and the rows' names: one without --sweep."""
    if args.sweep is None:
        return [args], None
    name, _, values = args.sweep.partition("=")
    rows = []
    for value in values.split(","):
        row = copy.copy(args)
        try:
            setattr(row, name, SWEEPS[name](value))
        except (KeyError, ValueError):
            raise InputError(f"--sweep {args.sweep}: give a name of {', '.join(SWEEPS)} and values, such as "
                             "cfg_scale=1,1.5,4") from None
        rows.append(row)
    if args.trajectory or args.nrow:
        raise InputError("--sweep fills the rows of one picture: leave out --trajectory and --nrow")
    return rows, [f"{name.removeprefix('num_').replace('_', ' ')} {value}" for value in values.split(",")]


def describe(args, ckpt, vae, diffusion, sampling):
    """The PNG's text chunks: "settings", JSON of the flags as they were used, and "command", which draws it again."""
    settings = {name: value for name, value in vars(args).items() if value is not None}
    settings |= dict(ckpt=ckpt, vae=vae.name)
    if not args.sweep:  # it may vary these
        settings |= dict(num_sampling_steps=diffusion.num_timesteps, cfg_scale=sampling["cfg_scale"])
    for name in ("output", "trajectory", "per_proc_batch_size"):
        settings.pop(name, None)
    words = ["python", "sample_grid.py"]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    return dict(settings=json.dumps(settings), command=shlex.join(words))


def main(args):
    check_output(args.output, FORMATS)
    if args.trajectory:
        check_output(args.trajectory, (".gif",))
    for name, least in (("nrow", 1), ("images_per_class", 1), ("per_proc_batch_size", 1), ("seed", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    rows, row_labels = sweep_rows(args)
    accelerator = make_accelerator(tf32=args.tf32)
    ckpt = args.ckpt or f"{args.model or 'DiT-XL/2'}-{args.image_size or 256}"
    model, vae, _ = load_model(ckpt, args, accelerator.device)
    names = class_names(model)
    labels, nrow = choose_labels(args, model, names)
    settings = [sampling_settings(row, model, cfg_scale=4.0) for row in rows]

    y = torch.tensor(labels, device=accelerator.device)
    seeds = range(args.seed, args.seed + len(labels))
    batches = math.ceil(math.ceil(len(labels) / accelerator.num_processes) / args.per_proc_batch_size)
    steps = batches * sum(diffusion.num_timesteps for diffusion, _ in settings)
    progress = ProgressBar(accelerator, "sampling", steps)
    drawn = []
    with progress:
        for diffusion, sampling in settings:
            film_steps = np.linspace(diffusion.num_timesteps - 1, 1, 40).round() if args.trajectory else ()
            drawn.append(sample_shared(
                model, diffusion, vae, y, seeds, accelerator, args.per_proc_batch_size, set(film_steps),
                on_step=lambda i, x, pred_xstart: progress.advance(), **sampling))

    if accelerator.is_main_process:
        text = captions(labels, seeds, names) if args.captions else None
        images = torch.cat([frames[-1] for frames in drawn])
        nrow = len(labels) if args.sweep else args.nrow or nrow
        save_grid(images, args.output, nrow, text, describe(args, ckpt, vae, *settings[0]), row_labels)
        print(f"wrote {args.output}")
        if args.trajectory:
            save_film(drawn[0], args.trajectory, nrow, text)
            print(f"wrote {args.trajectory}")
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main, parse_args())
