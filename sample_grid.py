"""From noise to pictures: the VAE, sampling with guidance, and grids. Read dit.py and gaussian_diffusion.py first.

python sample_grid.py --ckpt results/digits-DiT-Ti-2        the digits demo's grid, one column a class
python sample_grid.py --ckpt RUN_OR_FILE --class-labels 207,360 --cfg-scale 4 --sampler dpm++ --num-sampling-steps 20
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, PngImagePlugin

from dit import InputError, load_checkpoint, run_command, write_atomically
from gaussian_diffusion import create_diffusion

SAMPLERS = ("ddpm", "ddim", "dpm++")
OFFICIAL_LABELS = "207,360,387,974,88,979,417,279"


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
def sample_images(
    model, diffusion, vae, y, seeds, cfg_scale=1.0, sampler="ddpm", eta=0.0, cfg_channels=None, on_step=None
):
    """Images of the labels y (N,): uint8 (N, 3, H, W). All noise of image i comes from seeds[i]."""
    device = y.device
    generators = [torch.Generator(device).manual_seed(int(seed)) for seed in seeds]
    shape = (model.in_channels, model.input_size, model.input_size)

    def step_noise(i=None, x=None):
        return torch.stack([torch.randn(shape, generator=g, device=device) for g in generators])

    kwargs = dict(
        model_kwargs=dict(y=y, cfg_scale=cfg_scale, cfg_channels=cfg_channels),
        clip_denoised=vae.vae is None,
        on_step=on_step,
    )
    if sampler == "ddpm":
        latents = diffusion.p_sample_loop(model.forward_with_cfg, step_noise(), step_noise=step_noise, **kwargs)
    elif sampler == "ddim":
        latents = diffusion.ddim_sample_loop(
            model.forward_with_cfg, step_noise(), eta=eta, step_noise=step_noise, **kwargs
        )
    elif sampler == "dpm++":
        latents = diffusion.dpm_solver_sample_loop(model.forward_with_cfg, step_noise(), **kwargs)
    else:
        raise InputError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
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
    """The sampling flags, the same in all three command lines. A default of None is filled in from the model's data."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--sampler", choices=SAMPLERS, default="ddpm", help="how to walk from noise to image (default: %(default)s)"
    )
    group.add_argument(
        "--num-sampling-steps", type=int, default=None, help="steps of the sampler (default: 50 for digits, else 250)"
    )
    group.add_argument("--eta", type=float, default=0.0, help="noise of DDIM: 0 none, 1 as DDPM (default: %(default)s)")
    group.add_argument(
        "--cfg-scale", type=float, default=None, help="guidance scale, 1 is off (default: 1.5 for digits, 4 for grids)"
    )
    group.add_argument(
        "--cfg-channels",
        type=int,
        default=None,
        help="guide only the first channels; the official code's behaviour is 3 (default: all)",
    )


def sampling_settings(args, model, cfg_scale):
    """The diffusion process and the keyword arguments of sample_images that the sampling flags ask for.

    Unset flags take what the model's metadata suggest ("sampling"), else 250 and cfg_scale.
    """
    suggested = model.metadata.get("sampling", {})
    steps = args.num_sampling_steps or suggested.get("num_sampling_steps", 250)
    scale = suggested.get("cfg_scale", cfg_scale) if args.cfg_scale is None else args.cfg_scale
    diffusion = create_diffusion(str(steps), learn_sigma=model.learn_sigma)
    return diffusion, dict(cfg_scale=scale, sampler=args.sampler, eta=args.eta, cfg_channels=args.cfg_channels)


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
    device = Accelerator().device
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
