"""From noise to pictures: the VAE, sampling with guidance, and grids. Read dit.py and gaussian_diffusion.py first.

python sample_grid.py --ckpt results/digits-DiT-Ti-2        the digits demo's grid, one column a class
python sample_grid.py --ckpt RUN_OR_FILE --class-labels 207,360 --cfg-scale 4 --sampler dpm++ --num-sampling-steps 20
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, PngImagePlugin

from dit import InputError, load_checkpoint, run_command, write_atomically
from gaussian_diffusion import create_diffusion

SAMPLERS = ("ddpm", "ddim", "dpm++")
OFFICIAL_LABELS = "207,360,387,974,88,979,417,279"


def make_accelerator(mixed_precision=None, tf32=True, **kwargs):
    """Accelerate's Accelerator, with TF32 as asked and all cores for a lone CPU process; kwargs go to Accelerator."""
    accelerator = Accelerator(mixed_precision=mixed_precision, **kwargs)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32  # the API that torch.compile reads
    # `accelerate launch` leaves one thread unless told otherwise; any other number was somebody's choice
    launched = "ACCELERATE_DYNAMO_BACKEND" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and accelerator.num_processes == 1 and accelerator.device.type == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    return accelerator


class Autoencoder:
    """Images to latents and back: a diffusers VAE, or none, where the pixels in [-1, 1] are the latents.

    vae: a diffusers autoencoder module or None; name: what --vae said, stored with checkpoints; channels: of the pixels
    where there is no VAE, 1 for grayscale.
    """

    def __init__(self, vae=None, name="none", channels=3):
        self.vae = vae
        self.name = name
        config = vae.config if vae is not None else {}
        self.scale = config.get("scaling_factor") or 1.0
        self.shift = config.get("shift_factor") or 0.0
        self.channels = config.get("latent_channels", channels)
        self.factor = 1 if vae is None else 2 ** (len(config["block_out_channels"]) - 1)  # pixels per latent pixel

    @classmethod
    def load(cls, name, device="cpu", channels=3):
        """name: "none", "ema" or "mse" (stabilityai/sd-vae-ft-*), a hub id, or a local diffusers folder."""
        if name in (None, "none"):
            return cls(channels=channels)
        from diffusers import AutoencoderKL

        source = f"stabilityai/sd-vae-ft-{name}" if name in ("ema", "mse") else name
        try:
            vae = AutoencoderKL.from_pretrained(source)
        except OSError as error:
            raise InputError(f"cannot load the VAE {source!r}: {error}") from error
        return cls(vae.to(device).eval().requires_grad_(False), name)

    def encode(self, images):
        """uint8 images (N, 3, H, W) -> moments: (N, 2C, h, w) mean and log-variance; the pixels without a VAE."""
        x = images.float() / 127.5 - 1
        return x[:, : self.channels] if self.vae is None else self.vae.encode(x).latent_dist.parameters

    def sample(self, moments, generator=None, noise=None):
        """Draw scaled latents (N, C, h, w) from moments; the draw's noise may be given."""
        if self.vae is None:
            return moments
        mean, log_variance = moments.float().chunk(2, dim=1)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
        x = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        return (x - self.shift) * self.scale

    def decode(self, latents):
        """Scaled latents (N, C, h, w) -> uint8 images (N, 3, H, W), rounded: 127.5 x + 128, clamped, truncated."""
        x = latents if self.vae is None else self.vae.decode(latents / self.scale + self.shift).sample
        x = (127.5 * x.float() + 128).clamp(0, 255).to(torch.uint8)
        return x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x


@torch.no_grad()
def sample_images(model, diffusion, vae, y, seeds, cfg_scale=1.0, sampler="ddpm", eta=0.0, cfg_channels=None,
                  guidance_interval=None, dtype="fp32", on_step=None):
    """Images of the labels y (N,), int64 on the model's device: uint8 (N, 3, H, W).

    All noise of image i comes from seeds[i], drawn on the CPU: the same picture on every device, up to rounding.
    guidance_interval (low, high): guide only at noise levels sqrt((1 - abar) / abar) between the two, where it helps
    (Kynkaanniemi et al., 2024); elsewhere a step costs one pass in place of two. dtype "bf16" runs the network in
    bfloat16 autocast; the process and the VAE stay float32. on_step(i, x, pred_xstart) is called after each step.
    """
    shape = (model.in_channels, model.input_size, model.input_size)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    low, high = guidance_interval or (0.0, float("inf"))

    def step_noise(i=None, x=None):
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
        return noise.pin_memory().to(y.device, non_blocking=True) if y.is_cuda else noise.to(y.device)

    def network(x, t, **kwargs):
        with torch.autocast(y.device.type, torch.bfloat16, enabled=dtype == "bf16"):
            return model.forward_with_cfg(x, t, **kwargs)

    def model_kwargs(i):
        return dict(y=y, cfg_scale=cfg_scale if low <= diffusion.sigmas[i] <= high else 1.0, cfg_channels=cfg_channels)

    kwargs = dict(model_kwargs=model_kwargs, clip_denoised=vae.vae is None, on_step=on_step)
    if sampler == "ddpm":
        latents = diffusion.p_sample_loop(network, step_noise(), step_noise=step_noise, **kwargs)
    elif sampler == "ddim":
        latents = diffusion.ddim_sample_loop(network, step_noise(), step_noise=step_noise, eta=eta, **kwargs)
    else:
        latents = diffusion.dpm_solver_sample_loop(network, step_noise(), **kwargs)
    return vae.decode(latents)


def save_grid(images, path, nrow, labels=None, metadata=None):
    """Write uint8 images (N, 3, H, W) as one picture, nrow a row, labels above; small ones are enlarged."""
    images = images.permute(0, 2, 3, 1).cpu().numpy()
    n, height, width, _ = images.shape
    zoom, gap, text = max(1, 64 // width), 2, 12 if labels else 0
    height, width = height * zoom, width * zoom
    rows = -(-n // nrow)
    canvas = Image.new("RGB", (nrow * (width + gap) + gap, rows * (height + gap + text) + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for i, image in enumerate(images):
        left, top = gap + i % nrow * (width + gap), gap + i // nrow * (height + gap + text)
        if labels:
            draw.text((left, top), labels[i], fill="black")
        canvas.paste(Image.fromarray(image).resize((width, height), Image.NEAREST), (left, top + text))
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, str(value))
    options = {"pnginfo": info} if str(path).endswith(".png") else {}
    write_atomically(path, lambda temporary: canvas.save(temporary, **options))


def class_grid(model, diffusion, vae, per_class, seed, device, **sampling):
    """The run's own picture: one column a class (at most 10 classes), per_class rows. Returns (images, nrow, names)."""
    classes = min(model.num_classes, 10)
    y = torch.arange(classes, device=device).repeat(per_class)
    images = sample_images(model, diffusion, vae, y, range(seed, seed + len(y)), **sampling)
    names = model.metadata.get("class_names") or [str(c) for c in range(classes)]
    return images, classes, [names[c] for c in y.tolist()]


def add_sampling_args(parser):
    """The flags that all three command lines share: sampling and precision. None: filled in from the model's data."""
    add = parser.add_argument_group("sampling").add_argument
    add("--sampler", choices=SAMPLERS, default="ddpm", help="how to walk from noise to image (default: %(default)s)")
    add("--num-sampling-steps", type=int, help="steps of the sampler, 1 to 1000 (default: 50 for digits, else 250)")
    add("--eta", type=float, help="noise of --sampler ddim: 0 none, 1 as much as DDPM (default: 0)")
    add("--cfg-scale", type=float, help="guidance scale; 1.0 is off, and 0 is not: it ignores the class "
        "(default: 1.5 for digits, else 4.0 for pictures and 1.0 for figures)")
    add("--cfg-channels", type=int, metavar="N", help="guide the first N channels only; 3 is what the official code "
        "does (default: all)")
    add("--guidance-interval", type=parse_interval, metavar="LOW,HIGH", help="guide only at noise levels "
        "sigma = sqrt((1-abar)/abar) from LOW to HIGH; the process has 0.01 to 157 (default: all)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="the network's precision while sampling; bf16 is "
        "autocast (default: %(default)s)")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TensorFloat-32 matrix products on NVIDIA "
        "GPUs: faster, ten bits of mantissa (default: on)")


def parse_interval(text):
    """"0.3,5" -> [0.3, 5.0]; ValueError for anything else."""
    low, high = (float(value) for value in text.split(","))
    if not 0 <= low <= high:
        raise ValueError
    return [low, high]


def sampling_settings(args, model, cfg_scale):
    """The diffusion process and the keyword arguments of sample_images that the sampling flags ask for.

    Unset flags take what the model's metadata suggest ("sampling"), else 250 and cfg_scale. InputError for settings
    that the model or the schedule cannot do, and for flags that would do nothing.
    """
    suggested = model.metadata.get("sampling", {})
    steps = suggested.get("num_sampling_steps", 250) if args.num_sampling_steps is None else args.num_sampling_steps
    can_guide = model.class_dropout_prob > 0
    scale = args.cfg_scale
    if scale is None:
        scale = suggested.get("cfg_scale", cfg_scale) if can_guide else 1.0
    if scale != 1 and not can_guide:
        raise InputError(f"--cfg-scale {scale} needs a model trained with label dropout: use --cfg-scale 1.0")
    if scale < 1 and int(os.environ.get("RANK", 0)) == 0:
        print(f"warning: --cfg-scale {scale} weakens the class; guidance is off at 1.0, not at 0", file=sys.stderr)
    if args.cfg_channels is not None and not 1 <= args.cfg_channels <= model.in_channels:
        raise InputError(f"--cfg-channels {args.cfg_channels}: this model has {model.in_channels} channels")
    if args.eta is not None and args.sampler != "ddim":
        raise InputError(f"--eta does nothing with --sampler {args.sampler}: use --sampler ddim")
    try:
        diffusion = create_diffusion(str(steps), learn_sigma=model.learn_sigma)
    except ValueError as error:
        raise InputError(f"--num-sampling-steps {steps}: {error}") from error
    return diffusion, dict(cfg_scale=scale, sampler=args.sampler, eta=args.eta or 0.0, cfg_channels=args.cfg_channels,
                           guidance_interval=args.guidance_interval, dtype=args.dtype)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Sample a grid of images.")
    parser.add_argument("--ckpt", required=True, help="a run's folder or a weights file")
    parser.add_argument(
        "--class-labels", default=None, help="class numbers, comma-separated (default: four of each, up to ten classes)"
    )
    parser.add_argument(
        "--vae", default=None, help="ema, mse, a hub id, a folder or none (default: what the model was trained with)"
    )
    parser.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i (default: %(default)s)")
    parser.add_argument("--output", default="sample.png", help="the picture to write (default: %(default)s)")
    add_sampling_args(parser)
    return parser.parse_args(argv)


def main(args):
    device = make_accelerator(tf32=args.tf32).device
    model = load_checkpoint(args.ckpt, device)
    vae = Autoencoder.load(args.vae or model.metadata.get("vae", "ema"), device, model.in_channels)
    diffusion, sampling = sampling_settings(args, model, cfg_scale=4.0)
    if args.class_labels is None:
        images, nrow, names = class_grid(model, diffusion, vae, 4, args.seed, device, **sampling)
    else:
        y = torch.tensor([int(c) for c in args.class_labels.split(",")], device=device)
        if not 0 <= y.min() <= y.max() < model.num_classes:
            raise InputError(f"class labels must be from 0 to {model.num_classes - 1}")
        images = sample_images(model, diffusion, vae, y, range(args.seed, args.seed + len(y)), **sampling)
        nrow, names = int(np.ceil(np.sqrt(len(y)))), [str(c) for c in y.tolist()]
    settings = dict(
        ckpt=str(Path(args.ckpt).name), seed=args.seed, num_sampling_steps=diffusion.num_timesteps, **sampling
    )
    save_grid(images, args.output, nrow, names, dict(settings=json.dumps(settings)))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_command(main, parse_args())
