"""From noise to pictures: sampling with guidance, the VAE, and grids.

Read dit.py and gaussian_diffusion.py first.

    python sample_grid.py --ckpt results/digits-DiT-Ti-2        the digits demo: a column per class
    python sample_grid.py --image-size 512 --seed 1             official weights, downloaded once
    python sample_grid.py --ckpt CKPT --class-labels "golden retriever,88" --images-per-class 4
    python sample_grid.py --ckpt CKPT --sampler dpm++ --num-sampling-steps 20
    python sample_grid.py --ckpt CKPT --dtype bf16 --compile         faster for many images
    python sample_grid.py --ckpt CKPT --guidance-interval 0.3,5      guide at these noise levels
    python sample_grid.py --ckpt CKPT --trajectory out.gif           the predicted x_0 at each step
    python sample_grid.py --ckpt CKPT --sweep cfg_scale=1,1.5,4      a row per value, the same noise
    python sample_grid.py --ckpt SiT-XL-2-256x256.pt --objective sit --sampler sde
    accelerate launch --num_processes 8 sample_grid.py --ckpt CKPT   eight GPUs share the images

CKPT is a run's folder, a weights file (ours, the official .pt, diffusers) or a name that downloads.
A PNG remembers how it was made, in its text chunks "settings" and "command":
python -c "from PIL import Image; print(Image.open('sample.png').text['command'])"

In a notebook, with the settings that the run suggests:

    from dit import load_checkpoint
    from sample_grid import draw, make_grid
    model = load_checkpoint("results/digits-DiT-Ti-2")
    images = draw(model, [3, 1, 4, 1])
    make_grid(images, nrow=4)
"""

import argparse
import contextlib
import copy
import difflib
import json
import math
import os
import re
import shlex
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import rich
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dit import (
    DiT,
    InputError,
    RankLocalError,
    check_config,
    check_objective,
    hub_error,
    load_checkpoint,
    log_stderr,
    reach_hub,
    run_command,
    write_atomically,
)
from gaussian_diffusion import OBJECTIVES, FlowMatching, GaussianDiffusion, create_process

VAES = (  # of diffusers: those whose latents are scaled as their config says, see Autoencoder
    "AutoencoderKL", "AsymmetricAutoencoderKL", "AutoencoderDC", "AutoencoderKLHunyuanImage",
    "AutoencoderTiny", "VQModel",
)
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
OFFICIAL_LABELS = [207, 360, 387, 974, 88, 979, 417, 279]  # of the official sample.py
WNID = re.compile(r"n\d{8}")  # an id of WordNet, as ImageNet's folders are named
SLICE_PIXELS = 512 * 512  # the VAE sees so many image pixels at a time: 512 px fits in a few GB


@torch.no_grad()
def sample_images(model, diffusion, vae, y, seeds, cfg_scale=1.0, sampler=None, eta=0.0,
                  cfg_channels=None, guidance_interval=None, dtype="fp32", compile=False,
                  on_step=None):
    """Images of the labels y (N,), int64 on the model's device: uint8 (N, 3, H, W).

    diffusion: a GaussianDiffusion or FlowMatching; sampler: one of its samplers, by default its
    first. seeds: N ints; all noise of image i comes from seeds[i], so it is the same picture in any
    batch and on any device, up to rounding. cfg_scale, cfg_channels: see DiT.forward_with_cfg.
    guidance_interval: (low, high), see IntervalGuidance. eta: of the sampler ddim. dtype: "bf16"
    runs the network in bfloat16 autocast; the process and the VAE stay float32. compile: faster
    steps after a wait, see CompiledNetwork; pictures then hang on the batch's size by rounding.
    on_step(i, x, pred_xstart) is called after each step. RankLocalError, naming seed and step, when
    a latent becomes infinite or not a number; ValueError for a sampler that the process has not.
    """
    # Noise: one generator per image, on the CPU, whose numbers are the same for every device.
    shape = (model.in_channels, model.input_size, model.input_size)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def step_noise(i, x):
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])  # (N, C, h, w)
        if y.is_cuda:  # pinned memory is copied without waiting for the GPU
            return noise.pin_memory().to(y.device, non_blocking=True)
        return noise.to(y.device)

    # Whether each image is finite after each step; on the device, so that no step waits for it.
    finite = []

    def watch(i, x, pred_xstart):
        finite.append(x.isfinite().flatten(1).all(1))  # (N,)
        if on_step:
            on_step(i, x, pred_xstart)

    # Steps: pixels are clipped to [-1, 1] on the way, latents have no such range.
    sampler = sampler or diffusion.samplers[0]
    network = CompiledNetwork.of(model, dtype, len(y)) if compile else model
    levels = diffusion.noise_levels(sampler)
    guided = IntervalGuidance(network, levels, cfg_scale, guidance_interval)
    settings = dict(model_kwargs=dict(y=y, cfg_channels=cfg_channels),
                    clip_denoised=vae.vae is None, on_step=watch)
    if sampler == "ddim":
        settings["eta"] = eta
    # Autocast is entered once around all steps, so that it casts each weight only once.
    with torch.autocast(y.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        noise = step_noise(None, None)  # (N, C, h, w)
        latents = diffusion.sample(sampler, guided, noise, step_noise, **settings)

    # Latents become pixels, unless they would be black ones without a word.
    check_finite(torch.stack(finite).cpu(), seeds)
    return vae.decode(latents)


class IntervalGuidance:
    """A DiT with classifier-free guidance at some noise levels only.

    Kynkaanniemi et al., 2024, "Applying guidance in a limited interval improves sample and
    distribution quality in diffusion models": guidance harms variety at high noise levels and does
    nothing at low ones. A noise level sigma is noise relative to signal: sqrt((1 - abar) / abar) in
    diffusion, (1 - t) / t in flow matching, whose velocity is guided as eps is. Outside the
    interval a step costs one pass of the network in place of two.

    noise_levels: sigma of each call that will come, in their order (a process's noise_levels), from
    which all scales are made beforehand: asking the device for t would make every step wait.
    interval: (low, high), the noise levels to guide at, both included; None guides at all.
    """

    def __init__(self, model, noise_levels, cfg_scale, interval=None):
        low, high = interval or (0.0, math.inf)
        self.model = model
        self.scales = iter([cfg_scale if low <= s <= high else 1.0 for s in noise_levels])

    def __call__(self, x, t, y, cfg_channels=None):
        return self.model.forward_with_cfg(x, t, y, next(self.scales), cfg_channels)


def sample_shared(model, diffusion, vae, y, seeds, accelerator, batch_size=32, trajectory_steps=(),
                  on_step=None, **sampling):
    """sample_images for many images: the processes share them, each works in batches.

    Returns to every process uint8 (F + 1, N, 3, H, W) on the CPU: the predicted x_0 after each of
    the F trajectory_steps, then the images.
    """
    # Each batch keeps what the trajectory asks for, decoded at once: latents of all steps are many.
    def draw_part(part):
        frames = []

        def watch(i, x, pred_xstart):
            if i in trajectory_steps:
                frames.append(vae.decode(pred_xstart).cpu())
            if on_step:
                on_step(i, x, pred_xstart)

        part_seeds = [seeds[i] for i in part]
        images = sample_images(
            model, diffusion, vae, y[part], part_seeds, on_step=watch, **sampling)
        frames.append(images.cpu())
        return torch.stack(frames, dim=1).numpy()  # (n, F + 1, 3, H, W)

    made = []  # (i, the frames of image i), for the images of this process
    mine = range(accelerator.process_index, len(y), accelerator.num_processes)
    for part, frames in in_batches(draw_part, mine, batch_size):
        made += zip(part, frames, strict=True)

    # Every process gets all images, in their order, whoever made them.
    made = sorted(gather_object(made), key=lambda pair: pair[0])
    return torch.from_numpy(np.stack([frames for _, frames in made], axis=1))


def in_batches(work, items, batch_size):
    """Yield (part, work(part)) for parts, lists of batch_size items, one after the other.

    Out of memory, the part is halved and tried again, and those after it are as small: for work
    whose result does not depend on the batch. RankLocalError when one item alone is too much.
    """
    # How many items are done says where the next part begins, whatever size it will have.
    done = 0
    while done < len(items):
        part = list(items[done : done + batch_size])
        try:
            result = work(part)
        except torch.OutOfMemoryError as error:
            if len(part) == 1:
                raise RankLocalError(f"out of memory with one image at a time: {error}") from error
            result = None
        # Out here, where the error no longer holds the tensors that filled the memory.
        if result is None:
            batch_size = len(part) // 2
            clear_device_cache()
            log_stderr(f"warning: out of memory with {len(part)} images at a time; going on with "
                       f"{batch_size}", everywhere=True)
        else:
            yield part, result
            done += len(part)


def sampling_settings(args, model, cfg_scale):
    """The diffusion process and the keyword arguments of sample_images that the flags ask for.

    args: with the values of SAMPLING_FLAGS. Unset flags take what the model's metadata suggest
    ("sampling"), else 250 steps and cfg_scale. InputError for values out of bounds, for what the
    model, the device or the schedule cannot do, and for flags that would do nothing.
    """
    check_flags(args, SAMPLING_FLAGS)
    suggested = dict(model.metadata.get("sampling", {}))
    # The process is that which the weights were trained for; it knows its samplers.
    objective = model.metadata.get("objective", "ddpm")
    default = suggested.get("sampler", create_process(objective).samplers[0])
    sampler = args.sampler or default
    if "sampler" in suggested and sampler != default:
        suggested.pop("num_sampling_steps", None)  # so many steps were meant for that sampler
    steps = args.num_sampling_steps
    if steps is None:
        steps = suggested.get("num_sampling_steps", 250)
    try:
        diffusion = create_process(objective, sampler, steps, model.learn_sigma)
        levels = diffusion.noise_levels(sampler)
    except ValueError as error:
        raise InputError(f"--sampler {sampler} --num-sampling-steps {steps}: {error}") from error

    # Guidance needs a null class; a model without one is never guided unless asked to, which fails.
    can_guide = model.class_dropout_prob > 0
    scale = args.cfg_scale
    if scale is None:
        scale = suggested.get("cfg_scale", cfg_scale) if can_guide else 1.0
    if scale != 1 and not can_guide:
        raise InputError(f"--cfg-scale {scale} needs a null class, and this model was trained "
                         "without label dropout: use --cfg-scale 1.0")
    if scale < 1:
        log_stderr(f"warning: --cfg-scale {scale} weakens the class; guidance is off at 1.0, "
                   "not at 0")

    # What only the model, the sampler or the device can tell.
    if args.cfg_channels is not None and args.cfg_channels > model.in_channels:
        raise InputError(f"--cfg-channels {args.cfg_channels}: the model has {model.in_channels} "
                         "channels")
    if args.dtype == "bf16":
        check_bf16(model.pos_embed.device, "--dtype")

    # Flags that would do nothing.
    interval = parse_interval(args.guidance_interval)
    outside = interval and not any(interval[0] <= sigma <= interval[1] for sigma in levels)
    off = scale == 1 and "does nothing at --cfg-scale 1, where guidance is off"
    refuse_useless([
        ("--eta", args.eta, sampler != "ddim" and "is for --sampler ddim alone"),
        ("--cfg-channels", args.cfg_channels, off),
        ("--guidance-interval", args.guidance_interval, off),
        ("--guidance-interval", args.guidance_interval, outside and
         f"has none of the steps' noise levels, {min(levels):.2g} to {max(levels):.4g}, in it"),
    ])
    return diffusion, dict(
        cfg_scale=scale, sampler=sampler, eta=args.eta or 0.0, cfg_channels=args.cfg_channels,
        guidance_interval=interval, dtype=args.dtype, compile=args.compile)


def draw(model, labels, seed=0, vae=None, **overrides):
    """Images of the labels, class numbers or names, for a notebook: uint8 (N, 3, H, W) on the CPU.

    Image i comes from seed + i. vae: the model's own, if None. overrides: values of SAMPLING_FLAGS,
    such as cfg_scale=2.0; the others are as the model's metadata suggest, guidance scale 4 if they
    do not. TypeError for another name; InputError as the command line gives it.
    """
    # The flags as a command line without any would have them, but for the overrides.
    flags = {flag.dest: flag.default for flag in SAMPLING_FLAGS}
    if unknown := overrides.keys() - flags:
        raise TypeError(f"draw has no argument {min(unknown)!r}: it takes {', '.join(flags)}")
    diffusion, sampling = sampling_settings(
        argparse.Namespace(**flags | overrides), model, cfg_scale=4.0)

    # Labels may be names and numbers in turns.
    device = model.pos_embed.device
    vae = vae or load_vae(model, device=device)
    names = class_names(model)
    numbers = [find_class(label, names, model_wnids(model)) if isinstance(label, str) else label
               for label in labels]
    if not all(0 <= number < model.num_classes for number in numbers):
        raise InputError(f"labels {labels}: classes go from 0 to {model.num_classes - 1}")
    y = torch.tensor(numbers, device=device)
    return sample_images(
        model, diffusion, vae, y, range(seed, seed + len(y)), **sampling).cpu()


# -------------------------------------------------------------------------------------- the VAE


class Autoencoder:
    """Images to latents and back: an image autoencoder of diffusers, or none.

    Without one, pixels in [-1, 1] are the latents. vae: a diffusers module or None; name: what
    --vae said, stored with checkpoints; channels: of the latents (without a VAE of the pixels, 1 or
    3); factor: image pixels per latent pixel. The VAE computes in float32, outside autocast.

    Latents are scaled as diffusers' pipelines scale them, z = (x - shift) * scale, by entries of
    the VAE's config: shift_factor and scaling_factor, or per channel, as Stable Diffusion XL does,
    latents_mean and scaling_factor / latents_std. ValueError for a mixture of the two.
    """

    def __init__(self, vae=None, name="none", channels=3):
        self.vae = vae
        self.name = name
        self.channels = channels
        self.factor = 1
        self.scale = 1.0
        self.shift = 0.0
        if vae is not None:
            self._read_scale(vae.config)
            # No config says both sizes for all kinds of autoencoder: a black image does.
            moments = self.encode(torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=vae.device))
            self.channels = moments.shape[1] // 2
            self.factor = 64 // moments.shape[3]

    @classmethod
    def load(cls, name, device="cpu", channels=3):
        """The Autoencoder of a name; InputError when there is none, or it cannot be used.

        name: "none", "ema" or "mse" (stabilityai/sd-vae-ft-*, a download), a hub id, or a folder of
        diffusers. channels: of the pixels, for "none".
        """
        if name in (None, "none"):
            return cls(channels=channels)
        from huggingface_hub import try_to_load_from_cache

        # A hub that does not answer is asked no more: what was downloaded before is used.
        name = str(name)
        source = f"stabilityai/sd-vae-ft-{name}" if name in ("ema", "mse") else name
        offline = not os.path.exists(source) and not reach_hub()
        try:
            if offline and not try_to_load_from_cache(source, "config.json"):
                raise hub_error(f"the VAE {source}", None, "give --vae a folder of diffusers")
            import diffusers  # takes seconds

            # What it logs as an error is raised as well.
            diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
            # The class is named by a file that may be anybody's: only known ones are looked up.
            config = diffusers.AutoencoderKL.load_config(source, local_files_only=offline)
            kind = config["_class_name"]
            if kind not in VAES:
                raise ValueError(f"{kind} scales latents in a way of its own; supported are "
                                 f"{', '.join(VAES)}")
            vae = getattr(diffusers, kind).from_pretrained(
                source, torch_dtype=torch.float32, local_files_only=offline)
            if not all(parameter.isfinite().all() for parameter in vae.parameters()):
                raise ValueError("its weights are not finite")
            # Convolutions are faster with the channels of a pixel side by side.
            vae = vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
            return cls(vae, name)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"cannot load the VAE {source!r}: give --vae ema, mse, a hub id (and a network), "
                f"or a diffusers folder with config.json ({reason})") from error

    @torch.no_grad()
    def encode(self, images):
        """uint8 images (N, 3, H, W) -> moments (N, 2C, h, w): means, then log-variances.

        Without a VAE the pixels (N, channels, H, W), in [-1, 1].
        """
        x = images.float() / 127.5 - 1
        if self.vae is None:
            return x[:, : self.channels]
        return self._in_slices(self._moments, x, x[0, 0].numel())

    def sample(self, moments, generator=None, noise=None):
        """Draw latents (N, C, h, w) from moments, scaled to a standard deviation of about 1.

        noise: the draw's standard normal numbers (N, C, h, w); without it they come from generator.
        """
        if self.vae is None:
            return moments
        mean, log_variance = moments.float().chunk(2, dim=1)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        x = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        return (x - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents (N, C, h, w) -> uint8 images (N, 3, H, W).

        127.5 x + 128, clamped and truncated, rounds to the nearest level, as sample_ddp.py does.
        """
        x = latents.float()
        if self.vae is not None:
            pixels = x[0, 0].numel() * self.factor**2
            decode = lambda part: self.vae.decode(part).sample
            x = self._in_slices(decode, x / self.scale + self.shift, pixels)
        x = (127.5 * x + 128).clamp(0, 255).to(torch.uint8)
        return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x

    def _read_scale(self, config):
        self.scale = config.get("scaling_factor") or 1.0
        self.shift = config.get("shift_factor") or 0.0
        statistics = config.get("latents_mean"), config.get("latents_std")
        if statistics == (None, None):
            return
        if None in statistics or self.shift:
            raise ValueError("latents_mean goes with latents_std and without shift_factor")
        mean, std = torch.tensor(statistics, device=self.vae.device)[..., None, None]  # (C, 1, 1)
        self.shift, self.scale = mean, self.scale / std

    def _moments(self, x):
        posterior = self.vae.encode(x)
        if hasattr(posterior, "latent_dist"):
            return posterior.latent_dist.parameters
        # Without a distribution (AutoencoderTiny, AutoencoderDC) the variance is made to vanish.
        latents = posterior[0]
        return torch.cat([latents, torch.full_like(latents, -30)], dim=1)

    def _in_slices(self, function, x, pixels):
        """function(x), on as many images of so many pixels at a time as SLICE_PIXELS allows."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float().contiguous(memory_format=torch.channels_last)
            parts = x.split(max(1, SLICE_PIXELS // pixels))
            return torch.cat([function(part) for part in parts]).contiguous()  # (N, C, H, W) again


def load_vae(model, name=None, default="mse", device="cpu"):
    """The Autoencoder of a model: `name`, else the one it was trained with, else the default.

    InputError when its latents have another number of channels than the model.
    """
    name = name or model.metadata.get("vae") or default
    vae = Autoencoder.load(name, device, model.in_channels)
    fitting = (1, 3) if vae.vae is None else (vae.channels,)
    if model.in_channels not in fitting:
        has = "pixels, 1 or 3" if vae.vae is None else f"latents of {vae.channels}"
        raise InputError(f"--vae {name} has {has} channels, but the model was trained on "
                         f"{model.in_channels} channels")
    return vae


def load_model(ckpt, args, device):
    """The model of --ckpt, its Autoencoder, and the size of its images in pixels.

    args: with the values of MODEL_FLAGS and image_size. InputError, naming the flag, when they are
    not those of the weights. --objective becomes metadata of a model that has none.
    """
    model = load_checkpoint(ckpt, device)
    check_config(model, ckpt, args.model, num_classes=args.num_classes)
    check_objective(model, ckpt, args.objective)
    model.metadata.setdefault("objective", "ddpm")
    vae = load_vae(model, args.vae, "mse", device)
    size = model.input_size * vae.factor
    if args.image_size not in (None, size):
        raise InputError(f"{ckpt} makes images of {size} px, not {args.image_size}: check "
                         "--image-size and --vae")
    return model, vae, size


# -------------------------------------------------------------------------------------- grids


def make_grid(images, nrow, labels=None, row_labels=None):
    """uint8 images (N, 3, H, W) as one PIL picture, nrow a row; images below 64 px are enlarged.

    labels stand above the images, the first len(labels) of them; row_labels left of the rows.
    """
    images = images.permute(0, 2, 3, 1).cpu().numpy()  # (N, H, W, 3)
    labels = labels or []
    row_labels = row_labels or []

    # The size of a cell, and of the letters that stand in it.
    zoom = max(1, 64 // images.shape[2])
    height = images.shape[1] * zoom
    width = images.shape[2] * zoom
    gap = 2
    font = ImageFont.load_default(max(10, width // 20))
    line = int(font.size * 1.3)

    # Where the rows end: those with captions are one line of text higher.
    nrow = min(nrow, len(images))
    rows = math.ceil(len(images) / nrow)
    bottoms = [gap]
    for row in range(rows):
        captioned = row * nrow < len(labels)
        bottoms.append(bottoms[-1] + (line if captioned else 0) + height + gap)

    # The left margin has room for the longest row label.
    margin = gap
    if row_labels:
        margin += max(math.ceil(font.getlength(text)) for text in row_labels) + 2 * gap

    canvas = Image.new("RGB", (margin + nrow * (width + gap), bottoms[-1]), "white")
    pen = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        left = margin + i % nrow * (width + gap)
        top = bottoms[i // nrow + 1] - gap - height
        cell = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
        canvas.paste(cell, (left, top))
        # A caption ends where its image ends.
        if i < len(labels):
            text = labels[i]
            while font.getlength(text) > width:
                text = text[:-2] + "\N{HORIZONTAL ELLIPSIS}"
            pen.text((left, top - line), text, fill="black", font=font)
    for row, text in enumerate(row_labels):
        middle = bottoms[row + 1] - gap - height // 2
        pen.text((gap, middle), text, fill="black", font=font, anchor="lm")
    return canvas


def save_grid(images, path, nrow, labels=None, metadata=None, row_labels=None):
    """Write make_grid's picture as .jpg or .webp, else as PNG.

    metadata: a dict of str, for a PNG's text chunks. InputError when it cannot be written.
    """
    kind = FORMATS.get(Path(path).suffix.lower(), "PNG")
    options = dict(quality=95)
    if kind == "PNG":
        options = dict(pnginfo=PngImagePlugin.PngInfo())
        for key, value in (metadata or {}).items():
            options["pnginfo"].add_text(key, str(value))
    picture = make_grid(images, nrow, labels, row_labels)
    write_atomically(path, lambda temporary: picture.save(temporary, kind, **options))


def save_trajectory(frames, path, nrow, labels=None):
    """Write uint8 frames (F, N, 3, H, W) as a .gif of grids that rests on its last."""
    first, *others = [make_grid(images, nrow, labels) for images in frames]
    durations = [80] * len(others) + [2000]  # milliseconds
    options = dict(save_all=True, append_images=others, duration=durations, loop=0)
    write_atomically(path, lambda temporary: first.save(temporary, "GIF", **options))


def class_grid(model, diffusion, vae, per_class, seed, accelerator, **sampling):
    """A training run's own picture (see default_labels), image i from seed + i.

    Returns (images, nrow, captions), for save_grid.
    """
    labels, nrow = default_labels(model, per_class)
    seeds = range(seed, seed + len(labels))
    y = torch.tensor(labels, device=accelerator.device)
    images = sample_shared(model, diffusion, vae, y, seeds, accelerator, **sampling)[-1]
    return images, nrow, captions(labels, seeds, class_names(model))


def default_labels(model, per_class):
    """(labels, nrow): a column for each of the first ten classes, or a square if there is one."""
    classes = min(model.num_classes, 10)
    nrow = classes if classes > 1 else per_class
    return [i % classes for i in range(per_class * nrow)], nrow


def captions(y, seeds, names):
    """What stands above each image: the class's first name, if it is not the only one, and seed."""
    first = [names[c].split(",")[0] + ", " if len(names) > 1 else "" for c in y]
    return [f"{name}seed {seed}" for name, seed in zip(first, seeds, strict=True)]


# -------------------------------------------------------------------------------- command line


def main(args):
    # 1. What needs no weights is checked before they are loaded.
    check_flags(args, GRID_FLAGS)
    check_output(args.output, FORMATS)
    if args.trajectory:
        check_output(args.trajectory, (".gif",))
    rows, row_labels = sweep_rows(args)

    # 2. The weights, and what to draw with them: settings for each row, labels, seeds.
    accelerator = make_accelerator(tf32=args.tf32)
    accelerator.print(describe_device(accelerator, args.dtype))
    ckpt = args.ckpt or f"{args.model or 'DiT-XL/2'}-{args.image_size or 256}"
    model, vae, _ = load_model(ckpt, args, accelerator.device)
    names = class_names(model)
    labels, nrow = choose_labels(args, model, names)
    settings = [sampling_settings(row, model, cfg_scale=4.0) for row in rows]
    y = torch.tensor(labels, device=accelerator.device)
    seeds = range(args.seed, args.seed + len(labels))

    # 3. Sample; the bar counts the steps of each image of this process.
    mine = math.ceil(len(labels) / accelerator.num_processes)
    steps = mine * sum(diffusion.num_timesteps for diffusion, _ in settings)
    drawn = []
    with ProgressBar(accelerator, "sampling", steps) as progress:
        for diffusion, sampling in settings:
            kept = ()
            if args.trajectory:
                kept = set(np.linspace(diffusion.num_timesteps - 1, 1, 40).round())
            drawn.append(sample_shared(
                model, diffusion, vae, y, seeds, accelerator, args.per_proc_batch_size, kept,
                on_step=lambda i, x, pred_xstart: progress.advance(len(x)), **sampling))

    # 4. One process writes the picture.
    if accelerator.is_main_process:
        text = captions(labels, seeds, names) if args.captions else None
        nrow = len(labels) if args.sweep else args.nrow or nrow
        images = torch.cat([frames[-1] for frames in drawn])
        metadata = describe(args, ckpt, vae, *settings[0])
        save_grid(images, args.output, nrow, text, metadata, row_labels)
        print(f"wrote {args.output}")
        if args.trajectory:
            save_trajectory(drawn[0], args.trajectory, nrow, text)
            print(f"wrote {args.trajectory}")
    accelerator.end_training()


class Flag:
    """One flag: a row of the tables that the parser, its help and the checks are made of.

    name: "--lr". help: what it does; "(default: ...)" is added from `shown`, else from `default`.
    default: its value when it is not given; None means that the program decides, and `shown` says
    how. bounds: the smallest and the largest value that make sense, for numbers. options: of
    argparse. A default of True or False gives --name and --no-name.
    """

    def __init__(self, name, help, default=None, shown=None, bounds=None, **options):
        self.name = name
        self.dest = name[2:].replace("-", "_")
        self.default = default
        self.bounds = bounds
        self.options = options
        if isinstance(default, bool):
            self.options = dict(action=argparse.BooleanOptionalAction) | options
            shown = shown or ("on" if default else "off")
        self.help = f"{help} (default: {default if shown is None else shown})"

    def check(self, args):
        """InputError when the value in args is no choice, or no number within the bounds."""
        value = getattr(args, self.dest)
        choices = self.options.get("choices")
        if value is not None and choices and value not in choices:
            raise InputError(f"{self.name} {value} must be one of {', '.join(choices)}")
        if value is None or self.bounds is None:
            return
        low, high = self.bounds
        if not math.isfinite(value):
            raise InputError(f"{self.name} {value} must be a number")
        if not low <= value <= high:
            bound = f"{low} or more" if value < low else f"{high} or less"
            both = f" ({low} to {high})" if math.isfinite(low) and math.isfinite(high) else ""
            raise InputError(f"{self.name} {value} must be {bound}{both}")


def in_plain_words(value):
    """A flag's value as a person writes it: on, off and none in place of Python's names."""
    return {"True": "on", "False": "off", "None": "none"}.get(str(value), str(value))


def check_flags(args, flags):
    """InputError when a value in args is none that its row allows."""
    for flag in flags:
        flag.check(args)


def refuse_useless(rules):
    """InputError for a flag that is given although it would do nothing.

    rules: rows (flag, its value or None, why it does nothing, or False).
    """
    for name, value, reason in rules:
        if value is not None and reason:
            raise InputError(f"{name} {value} {reason}")


def add_flags(parser, title, flags):
    """Give the parser a group of flags, each from its row."""
    group = parser.add_argument_group(title)
    for flag in flags:
        text = flag.help.replace("%", "%%")
        # Set afterwards, since to a default that it is told Python 3.10 adds words of its own.
        group.add_argument(flag.name, help=text, **flag.options).default = flag.default


COUNT = (1, math.inf)  # the bounds of what is counted
SEED = (0, 2**62)  # below torch's largest, as each image adds its number
SAMPLING_FLAGS = [  # shared by all three command lines
    Flag("--sampler", f"how to walk from noise to image; {', '.join(FlowMatching.samplers)} are "
         "for --objective flow, sit and jit", shown="the weights' suggestion, else ddpm or euler",
         choices=(*GaussianDiffusion.samplers, *FlowMatching.samplers)),
    Flag("--num-sampling-steps", "steps of the sampler", shown="the weights' suggestion, else 250",
         bounds=(1, 1000), type=int),
    Flag("--eta", "noise of --sampler ddim: 0 none, 1 as much as DDPM", shown="0", bounds=(0, 1),
         type=float),
    Flag("--cfg-scale", "guidance scale; 1.0 is off, and 0 is not: it ignores the class",
         shown="the weights' suggestion, else 4.0 for pictures and 1.0 for metrics",
         bounds=(-math.inf, math.inf), type=float),
    Flag("--cfg-channels", "guide the first N channels only; 3 is what the official code does",
         shown="all", bounds=COUNT, type=int, metavar="N"),
    Flag("--guidance-interval", "guide only at noise levels sigma from LOW to HIGH: "
         "sqrt((1-abar)/abar) in diffusion, which has 0.01 to 157, (1-t)/t in flow matching",
         shown="all", metavar="LOW,HIGH"),
    Flag("--dtype", "the network's precision while sampling; bf16 is autocast", "fp32",
         choices=("fp32", "bf16")),
    Flag("--compile", "compile the network: a wait at first, then faster steps; pictures move by "
         "rounding, a few of 255 levels at most, and with the batch's size", False),
    Flag("--tf32", "TensorFloat-32 matrix products on NVIDIA GPUs: faster, ten bits of mantissa",
         True),
]
MODEL_FLAGS = [  # what load_model reads: shared with evaluate.py
    Flag("--model", "check that the weights are of this model", shown="whatever they are"),
    Flag("--num-classes", "check the number of classes", shown="the weights' own", bounds=COUNT,
         type=int),
    Flag("--vae", "ema, mse, a hub id, a diffusers folder, or none for pixels",
         shown="what the model was trained with, else mse"),
    Flag("--objective", "what the network was trained to predict: sit for SiT's own files, which "
         "do not say it", shown="the weights' own, else ddpm", choices=OBJECTIVES),
]
SWEEPABLE = ("cfg_scale", "num_sampling_steps", "eta", "sampler")
GRID_FLAGS = [  # sample_grid.py's own
    Flag("--ckpt", "a run's folder, a weights file, or a name that downloads",
         shown="DiT-XL/2-{image size}"),
    Flag("--image-size", "check the size of the images, in pixels; without --ckpt 256 or 512 "
         "chooses the weights", shown="the weights' own, else 256", bounds=COUNT, type=int),
    *MODEL_FLAGS,
    Flag("--class-labels", "classes by name, number or WordNet id, comma-separated",
         shown="the official eight of ImageNet; for other data the first ten classes"),
    Flag("--images-per-class", "times to repeat the labels",
         shown="4 for the first ten classes, else 1", bounds=COUNT, type=int),
    Flag("--seed", "image i is drawn from seed + i", 0, bounds=SEED, type=int),
    Flag("--output", "the picture to write: .png, .jpg or .webp", "sample.png"),
    Flag("--nrow", "images in a row", shown="one of each label if repeated, else by their number",
         bounds=COUNT, type=int),
    Flag("--captions", "class and seed above each image", True),
    Flag("--trajectory", "also write the predicted x_0 along the way", shown="no", metavar="GIF"),
    Flag("--sweep", f"one row for each value of {', '.join(SWEEPABLE)}", shown="no",
         metavar="NAME=V1,V2"),
    Flag("--per-proc-batch-size", "images at once on each process", 32, bounds=COUNT, type=int),
]


def add_sampling_args(parser):
    """The flags that all three command lines share: sampling and precision."""
    add_flags(parser, "sampling", SAMPLING_FLAGS)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Sample a grid of images.")
    add_flags(parser, "what to draw", GRID_FLAGS)
    add_sampling_args(parser)
    return parser.parse_args(argv)


def choose_labels(args, model, names):
    """The labels, a list of ints, and the images in a row that the flags ask for."""
    per_class = args.images_per_class
    if args.class_labels is not None:
        labels = parse_labels(args.class_labels, names, model_wnids(model))
    elif model.num_classes == 1000:
        labels = OFFICIAL_LABELS
    else:
        return default_labels(model, per_class or (1 if args.sweep else 4))
    n = len(labels)
    one_row = n <= 5 or (per_class or 1) > 1
    return labels * (per_class or 1), n if one_row else math.ceil(math.sqrt(2 * n))


def sweep_rows(args):
    """The arguments of each row of the picture, and the rows' names; one row without --sweep."""
    if args.sweep is None:
        return [args], None
    name, rows = swept_values(args, SWEEPABLE)
    # What the rows leave no place for.
    refuse_useless([
        ("--nrow", args.nrow, "does nothing with --sweep, which fills the rows"),
        ("--trajectory", args.trajectory, "shows one setting: leave out --sweep"),
    ])
    title = name.removeprefix("num_").replace("_", " ")
    return list(rows.values()), [f"{title} {text}" for text in rows]


def swept_values(args, sweepable):
    """NAME of --sweep NAME=V1,V2 ..., one of sweepable, and {a value's text: args with the value}.

    InputError for another name, and for values that NAME's own flag does not take.
    """
    name, _, values = args.sweep.partition("=")
    flags = {flag.dest: flag for flag in SAMPLING_FLAGS if flag.dest in sweepable}
    rows = {}
    # A value is read and checked as if its own flag had been given; a colon is its comma.
    for text in values.split(","):
        row = copy.copy(args)
        try:
            read = flags[name].options.get("type", str)
            setattr(row, name, read(text.replace(":", ",")))
        except (KeyError, ValueError):
            raise InputError(f"--sweep {args.sweep}: give a name of {', '.join(sweepable)} and "
                             "values, such as cfg_scale=1,1.5,4") from None
        flags[name].check(row)
        rows[text] = row
    # A value beside the swept ones would never be used.
    refuse_useless([
        (flags[name].name, getattr(args, name), "does nothing beside --sweep, which varies it")])
    return name, rows


def describe(args, ckpt, vae, diffusion, sampling):
    """The PNG's text chunks: "settings", JSON of the flags as they were used, and "command".

    The command draws the picture again.
    """
    settings = {name: value for name, value in vars(args).items() if value is not None}
    settings |= dict(ckpt=ckpt, vae=vae.name, objective=diffusion.objective)
    if not args.sweep:  # it may vary these
        settings |= dict(num_sampling_steps=diffusion.num_timesteps, sampler=sampling["sampler"],
                         cfg_scale=sampling["cfg_scale"])
    for name in ("output", "trajectory", "per_proc_batch_size"):
        settings.pop(name, None)
    words = ["python", "sample_grid.py"]
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return dict(settings=json.dumps(settings), command=shlex.join(words))


# ---------------------------------------------------------- machinery: skip it on a first reading


def make_accelerator(mixed_precision=None, tf32=True, **kwargs):
    """Accelerate's Accelerator, with TF32 as asked and all cores for a lone CPU process.

    kwargs go to Accelerator. InputError for a precision that the device has not.
    """
    # Hours, since processes wait for the one with the slowest GPU or the most images.
    kwargs.setdefault("kwargs_handlers", [InitProcessGroupKwargs(timeout=timedelta(hours=3))])
    # Said outright, or torchrun's processes on a CPU would each train alone.
    cpu = not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=cpu, **kwargs)
    except ValueError as error:
        raise InputError(f"accelerate cannot start here: {error}") from error
    if accelerator.mixed_precision == "bf16":
        check_bf16(accelerator.device, "--mixed-precision")
    # The older API for TF32, since it is the one that torch.compile reads.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32
    # `accelerate launch` leaves one thread unless told otherwise; any other number was a choice.
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ
    one_thread = os.environ.get("OMP_NUM_THREADS") == "1"
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu"
    if launched and one_thread and alone:
        has_affinity = hasattr(os, "sched_getaffinity")
        torch.set_num_threads(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count())
    return accelerator


def check_bf16(device, flag):
    """InputError, naming the flag that asked for it, where there is no bfloat16 but emulated."""
    has = dict(
        cuda=lambda: torch.cuda.is_bf16_supported(including_emulation=False),
        mps=lambda: torch.backends.mps.is_macos_or_newer(14, 0))
    if device.type in has and not has[device.type]():
        raise InputError(f"{flag} bf16: {device_name(device)} has no bfloat16, leave it out")


def device_name(device):
    """What a person calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return dict(cpu="the CPU", mps="the Mac's GPU").get(device.type, str(device))


def describe_device(accelerator, precision):
    """One line: what the program runs on, and the network's precision ("fp32", "bf16" ...).

    Without a GPU it says so if this PyTorch was built for one.
    """
    device = accelerator.device
    processes = accelerator.num_processes
    many = f", {processes} processes" if processes > 1 else ""
    built_for = torch.version.cuda or torch.version.hip
    lost = device.type == "cpu" and built_for and not torch.cuda.is_available()
    hint = (f" (no usable GPU: if there is one, its driver may be too old for this PyTorch, built "
            f"for {built_for})")
    return f"running on {device_name(device)}{many}, in {precision}{hint if lost else ''}"


class ProgressBar:
    """How far something is, on rank 0: a bar, or without a terminal a line every 30 seconds.

    Use it as a context manager and call `advance`; both show the time left, and `note`.
    """

    def __init__(self, accelerator, text, total, done=0):
        console = rich.get_console()  # the same for all, so that one bar may stand in another
        self.shown = accelerator.is_main_process
        self.bar = Progress(
            TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(),
            TextColumn("{task.fields[note]}"), TimeRemainingColumn(), console=console,
            disable=not (self.shown and console.is_terminal))
        self.bar.add_task(text, total=total, completed=done, note="")
        self.note = ""
        self.last_line = time.monotonic()

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *exception):
        self.bar.stop()

    def advance(self, count=1):
        self.bar.update(0, advance=count, note=self.note)
        if self.bar.disable and self.shown and time.monotonic() - self.last_line >= 30:
            self.last_line = time.monotonic()
            task = self.bar.tasks[0]
            left = TimeRemainingColumn().render(task)
            print(f"{task.description} {task.completed}/{task.total}, {left} left  {self.note}",
                  flush=True)


class CompiledNetwork:
    """A DiT compiled as a whole for sampling at one batch size: its forward_with_cfg, and no more.

    Other batches are cut into parts of that size, the last one filled up; guidance takes two parts
    in place of a batch twice the size. So one compilation serves every batch, guided or not.
    Weights are frozen where PyTorch can: cast and laid out for the products once, not every step.
    Sums are rounded in another order: in bf16 the digits' pictures move by 0.2 of 255 levels, at
    most 3, as much as from float32 to bf16.
    """

    last = None  # the one that was made last

    @classmethod
    def of(cls, model, dtype, batch):
        """The model compiled in dtype, "fp32" or "bf16"; batch: images at a time, if it is new.

        Weights that have changed since they were frozen are compiled once more, now unfrozen, since
        they will change again: a training run's previews. InputError when there is no compiler.
        """
        key = (model, dtype, model.pos_embed.device)
        versions = [weight._version for weight in model.parameters()]
        last, cls.last = cls.last, None
        known = last is not None and last.key == key
        if not known or (last.frozen and last.versions != versions):
            # PyTorch would take code that holds frozen weights for changed ones, too.
            if last is not None:
                torch.compiler.reset()
            last = cls(key, versions, batch, frozen=not known)
        cls.last = last
        return last

    @torch.no_grad()
    def __init__(self, key, versions, batch, frozen):
        from torch._inductor import config

        # `of` asks for key and versions, to know whether this network is still the right one.
        self.key = key
        self.versions = versions
        self.batch = batch
        self.frozen = frozen and hasattr(config, "freezing")  # not in every release
        self.model, dtype, device = key
        self.network = torch.compile(self.model, dynamic=False)

        # PyTorch compiles at the first call, here with zeros for images, times and labels.
        log_stderr(f"compiling the network for {batch} images at a time ...")
        began = time.monotonic()
        x = torch.zeros(batch, self.in_channels, self.input_size, self.input_size, device=device)
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        freezing = config.patch(freezing=True) if self.frozen else contextlib.nullcontext()
        try:
            with freezing, torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
                self(x, zeros, zeros)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # PyTorch's compiler, or that there is none for C++
            reason = str(error).strip().split("\n\n")[0]
            raise InputError(f"--compile does not work here, leave it out: {reason}") from error
        log_stderr(f"compiled in {time.monotonic() - began:.0f} s")

    def __call__(self, x, t, y):
        # The last part is filled up with copies of the last image.
        n, parts = len(x), math.ceil(len(x) / self.batch)
        rows = torch.arange(parts * self.batch, device=x.device).clamp(max=n - 1)
        outputs = [self.network(x[r], t[r].float(), y[r]) for r in rows.split(self.batch)]
        return torch.cat(outputs)[:n]

    forward_with_cfg = DiT.forward_with_cfg

    def __getattr__(self, name):  # what else DiT.forward_with_cfg asks for
        return getattr(self.model, name)


def check_finite(finite, seeds):
    """RankLocalError, naming seed and step, unless all of finite (steps, N) bool is true."""
    if finite.all():
        return
    step, image = (~finite).nonzero()[0].tolist()  # the first by step
    raise RankLocalError(
        f"the image of seed {seeds[image]} is not finite after step {step + 1} of {len(finite)}: "
        "the weights are damaged, or --cfg-scale or --dtype does not suit them")


def parse_interval(text):
    """"0.3,5" or (0.3, 5) -> [0.3, 5.0], None -> None; InputError for no such interval."""
    if text is None:
        return None
    try:
        low, high = (float(v) for v in (text.split(",") if isinstance(text, str) else text))
    except (TypeError, ValueError):
        raise InputError(f"--guidance-interval {text}: give two noise levels, such as 0.3,5"
                         ) from None
    if not 0 <= low <= high:
        raise InputError(f"--guidance-interval {text}: the first must be 0 or more, the second not "
                         "below it")
    return [low, high]


def class_names(model):
    """A name for each class: from the model's metadata, ImageNet's for its thousand, or numbers."""
    names = model.metadata.get("class_names")
    if model.num_classes == 1000 and (not names or model_wnids(model)):
        from torchvision.models import ResNet18_Weights

        return ResNet18_Weights.DEFAULT.meta["categories"]
    return names or [str(c) for c in range(model.num_classes)]


def model_wnids(model):
    """The WordNet id of each class, such as n01440764, if the metadata has them, else []."""
    names = model.metadata.get("class_names") or []
    return names if all(WNID.fullmatch(name) for name in names) else []


def parse_labels(text, names, wnids=()):
    """The class numbers of comma-separated classes, each as in find_class.

    Names may have commas themselves: the longest run of parts that is a whole name is one label.
    """
    whole = [synonyms(name) for name in names]
    parts, labels = text.split(","), []
    while parts:
        longest_first = range(len(parts), 1, -1)
        count = next((n for n in longest_first if synonyms(",".join(parts[:n])) in whole), 1)
        labels.append(find_class(",".join(parts[:count]), names, wnids))
        parts = parts[count:]
    return labels


def find_class(text, names, wnids=()):
    """The number of the one class that text means, by the first of these ways that finds any:

    its whole name, to the letter; its whole name in any capitals; its number; one of the
    comma-separated synonyms that a name consists of; its WordNet id. So a number is taken for a
    name only where a class has exactly that name. InputError when the way finds several classes (a
    bird and a machine are both called crane), or when none finds any, with the nearest names.
    """
    numbers = range(len(names))
    text = " ".join(text.split())
    words = synonyms(text)
    ways = [
        [n for n in numbers if " ".join(names[n].split()) == text],
        [n for n in numbers if words and synonyms(names[n]) == words],
        [n for n in numbers if text and str(n) == (text.lstrip("0") or "0")],
        [n for n in numbers if text.lower() in synonyms(names[n])],
        [n for n, wnid in enumerate(wnids) if wnid == text],
    ]
    # The first way that finds classes decides: an ambiguous name does not fall through to the next.
    found = next((way for way in ways if way), [])
    if len(found) == 1:
        return found[0]
    if found:
        shown = " and ".join(f"{n} ({names[n]})" for n in found[:5])
        raise InputError(f"{text!r} may be class {shown}: give its number")
    if WNID.fullmatch(text) and not wnids:
        raise InputError(f"no class {text!r}: these weights do not say the WordNet ids of their "
                         f"classes; give a name, or a number from 0 to {len(names) - 1}")

    # The nearest names: those that are spelled alike, then those that the text is a part of.
    known = {word: n for n in reversed(numbers) for word in synonyms(names[n])}
    near = difflib.get_close_matches(text.lower(), known, 3)
    near += [word for word in known if text and text.lower() in word]
    shown = ", ".join(f"{word} ({known[word]})" for word in dict.fromkeys(near[:4]))
    raise InputError(f"no class {text!r}: " + (f"the nearest are {shown}; " if near else "")
                     + f"numbers go from 0 to {len(names) - 1}")


def synonyms(name):
    """The words between a name's commas, in small letters: "tench, Tinca tinca" has two."""
    words = [" ".join(word.lower().split()) for word in name.split(",")]
    return [word for word in words if word]


def check_output(path, formats):
    """InputError unless a file of one of these formats can be written there; leaves nothing.

    A device or a pipe takes a picture whatever its name is.
    """
    path = Path(path)
    if os.path.exists(path) and not path.is_file() and not path.is_dir():
        return
    if path.suffix.lower() not in formats or os.path.isdir(path):
        raise InputError(f"cannot write a picture to {path}: the name of a file must end in "
                         f"{', '.join(formats)}")
    # The temporary name is as long as the one that will be written first.
    name = dict(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}")
    try:
        tempfile.NamedTemporaryFile(dir=path.parent, **name).close()
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}; choose an existing "
                         "folder") from error


if __name__ == "__main__":
    run_command(main, parse_args())
