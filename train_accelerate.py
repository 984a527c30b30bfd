"""Train a DiT: data -> latents -> noise -> loss -> weights, on one CPU or many GPUs. Read evaluate.py first.

    accelerate launch train_accelerate.py                            digits, a tiny DiT, two CPU cores, two minutes
    accelerate launch train_accelerate.py --data-path FOLDER --model DiT-B/4   your pictures, in class folders
    torchrun --nproc_per_node 2 train_accelerate.py                            two processes on a CPU

One step, with images x, labels y, the process of gaussian_diffusion.py and the network eps_theta of dit.py:

    t ~ uniform steps, eps ~ normal        both functions of (seed, step, index in the batch)
    x_t  = q_sample(latents(x), t, eps)
    loss = mean |eps - eps_theta(x_t, t, y)|^2 + L_vb
    AdamW step;  ema = decay * ema + (1 - decay) * weights
"""

import argparse
import copy
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import load_file, save_file

from dit import InputError, build_dit, load_checkpoint, run_command, save_checkpoint, write_atomically
from evaluate import evaluate, load_data, print_figures
from gaussian_diffusion import create_diffusion
from sample_grid import Autoencoder, add_sampling_args, class_grid, sampling_settings, save_grid

PAPER = dict(
    model="DiT-XL/2",
    image_size=256,
    vae="ema",
    global_batch_size=256,
    lr=1e-4,
    warmup_steps=0,
    grad_clip=0.0,
    ema_decay=0.9999,
    mirror=True,
    epochs=1400,
    max_steps=None,
    ckpt_every=50_000,
    log_every=100,
    sample_every=50_000,
    eval_samples=10_000,
    num_sampling_steps=250,
    cfg_scale=4.0,
)
PRESETS = {
    "digits": PAPER
    | dict(
        model="DiT-Ti/2",
        image_size=8,
        vae="none",
        global_batch_size=128,
        lr=2e-3,
        warmup_steps=100,
        grad_clip=1.0,
        ema_decay=0.995,
        mirror=False,
        max_steps=1500,
        ckpt_every=500,
        log_every=50,
        sample_every=500,
        eval_samples=500,
        num_sampling_steps=50,
        cfg_scale=1.5,
    )
}


class GlobalBatches(torch.utils.data.Sampler):
    """This process's part of every micro-batch from a step on, as lists of (index, mirror).

    The data form an endless stream, one permutation an epoch, a function of (seed, epoch); step s takes its s-th batch.
    """

    def __init__(self, size, batch, seed, start, stop, parts, mine, mirror):
        self.size, self.batch, self.seed, self.start, self.stop = size, batch, seed, start, stop
        self.parts, self.mine, self.mirror = parts, mine, mirror

    def __len__(self):
        return (self.stop - self.start) * len(self.mine)

    def permutation(self, epoch):
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(hash((self.seed, 1, epoch)) % 2**63))

    def __iter__(self):
        epoch, order = None, None
        for step in range(self.start, self.stop):
            batch = []
            for position in range(step * self.batch, (step + 1) * self.batch):
                if position // self.size != epoch:
                    epoch, order = position // self.size, self.permutation(position // self.size)
                batch.append(int(order[position % self.size]))
            flips = (
                torch.rand(self.batch, generator=torch.Generator().manual_seed(hash((self.seed, 2, step)) % 2**63))
                < 0.5
            )
            pairs = list(zip(batch, (flips & self.mirror).tolist(), strict=True))
            size = self.batch // self.parts
            for part in self.mine:
                yield pairs[part * size : (part + 1) * size]


def draw_randomness(args, step, latent_shape, moments_noise, num_steps, device):
    """The whole global batch's timesteps, noise, label drops and VAE noise of a step: a function of (seed, step)."""
    g = torch.Generator(device).manual_seed(hash((args.global_seed, 3, step)) % 2**63)
    n = args.global_batch_size
    t = torch.randint(num_steps, (n,), generator=g, device=device)
    drop = torch.rand(n, generator=g, device=device) < args.class_dropout_prob
    noise = torch.randn(n, *latent_shape, generator=g, device=device)
    draw = torch.randn(n, *latent_shape, generator=g, device=device) if moments_noise else None
    return t, drop, noise, draw


@torch.no_grad()
def update_ema(ema, model, decay, step):
    """ema = d * ema + (1 - d) * weights, with d rising to decay as (1 + step) / (10 + step)."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def save_state(folder, step, model, ema, optimizer, metadata):
    """The full state as checkpoints/STEP, whole or not at all."""
    final, temporary = folder / "checkpoints" / f"{step:07d}", folder / "checkpoints" / f".{step:07d}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_checkpoint(temporary / "ema.safetensors", ema, step=step, **metadata)
    save_file(model.state_dict(), temporary / "model.safetensors")
    torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)


def load_state(folder, model, ema, optimizer):
    """Load the newest checkpoint, if there is one; returns its step, else 0."""
    found = sorted((folder / "checkpoints").glob("[0-9]*"))
    if not found:
        return 0
    model.load_state_dict(load_file(found[-1] / "model.safetensors"))
    ema.load_state_dict(load_checkpoint(found[-1] / "ema.safetensors").state_dict())
    optimizer.load_state_dict(torch.load(found[-1] / "optimizer.pt", weights_only=True))
    return int(found[-1].name)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a DiT. Unset flags take the preset of the data: digits, or the paper's."
    )
    add = parser.add_argument

    def preset(flag, text, **kwargs):
        name = flag[2:].replace("-", "_")
        add(
            flag,
            default=None,
            help=f"{text} (default: {PRESETS['digits'][name]} for digits, else {PAPER[name]})",
            **kwargs,
        )

    add("--data-path", default="digits", help="digits, or a folder of class folders (default: %(default)s)")
    add("--results-dir", default="results", help="where the run's folder is made (default: %(default)s)")
    add("--run-name", default=None, help="the run's folder (default: data and model)")
    add("--global-seed", type=int, default=0, help="all randomness of training comes from it (default: %(default)s)")
    add("--num-workers", type=int, default=0, help="processes that load images (default: %(default)s)")
    add("--class-dropout-prob", type=float, default=0.1, help="how often a label is hidden (default: %(default)s)")
    add("--gradient-accumulation-steps", type=int, default=1, help="micro-batches a step (default: %(default)s)")
    add(
        "--mixed-precision",
        choices=("no", "fp16", "bf16"),
        default=None,
        help="autocast (default: accelerate's config)",
    )
    preset("--model", "the network")
    preset("--image-size", "pixels", type=int)
    preset("--vae", "ema, mse, a hub id, a folder, or none for pixels")
    preset("--global-batch-size", "images a step, over all processes", type=int)
    preset("--lr", "AdamW's learning rate", type=float)
    preset("--warmup-steps", "steps of linear warm-up", type=int)
    preset("--grad-clip", "largest gradient norm, 0 for no limit", type=float)
    preset("--ema-decay", "decay of the averaged weights", type=float)
    preset("--epochs", "passes over the data", type=int)
    preset("--max-steps", "steps; wins over --epochs", type=int)
    preset("--ckpt-every", "steps between checkpoints", type=int)
    preset("--log-every", "steps between log lines", type=int)
    preset("--sample-every", "steps between sample grids, 0 for none", type=int)
    preset("--eval-samples", "images generated for the evaluation at the end, 0 for none", type=int)
    add_sampling_args(parser)
    return parser.parse_args(argv)


def fill_preset(args):
    for name, value in PRESETS.get(args.data_path, PAPER).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def main(args):
    fill_preset(args)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    if accelerator.device.type == "cpu" and accelerator.num_processes == 1:
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # `accelerate launch` leaves one thread
    device, accumulation = accelerator.device, args.gradient_accumulation_steps
    parts = accelerator.num_processes * accumulation
    if args.global_batch_size % parts:
        raise InputError(
            f"--global-batch-size {args.global_batch_size} must divide by processes x accumulation steps = {parts}"
        )

    data = load_data(args.data_path, args.image_size)
    vae = Autoencoder.load(args.vae, device, data.channels)
    torch.manual_seed(args.global_seed)
    model = build_dit(
        args.model,
        input_size=args.image_size // vae.factor,
        in_channels=vae.channels,
        num_classes=len(data.class_names),
        class_dropout_prob=args.class_dropout_prob,
    ).to(device)
    metadata = dict(
        data=data.name,
        class_names=data.class_names,
        vae=vae.name,
        sampling=dict(num_sampling_steps=args.num_sampling_steps, cfg_scale=args.cfg_scale),
    )
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    ema.metadata = metadata
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0)
    diffusion = create_diffusion()

    folder = Path(args.results_dir) / (args.run_name or f"{data.name}-{args.model.replace('/', '-')}")
    start = load_state(folder, model, ema, optimizer)
    total = args.max_steps or math.ceil(args.epochs * len(data) / args.global_batch_size)
    weights = model  # the names of the weights, whatever prepare wraps around them
    model, optimizer = accelerator.prepare(model.train(), optimizer)

    mine = [a * accelerator.num_processes + accelerator.process_index for a in range(accumulation)]
    sampler = GlobalBatches(len(data), args.global_batch_size, args.global_seed, start, total, parts, mine, args.mirror)
    loader = iter(torch.utils.data.DataLoader(data, batch_sampler=sampler, num_workers=args.num_workers))
    sample_diffusion, sampling = sampling_settings(args, ema, args.cfg_scale)
    if accelerator.is_main_process:
        write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(vars(args), indent=1)))
    progress = Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TextColumn("{task.fields[rate]:.0f} images/s"),
        TimeRemainingColumn(),
        disable=not accelerator.is_main_process,
    )
    bar = progress.add_task("train", total=total, completed=start, loss=math.nan, rate=0)
    logged, clock = [], time.perf_counter()
    with progress:
        for step in range(start, total):
            randomness = draw_randomness(
                args,
                step,
                (vae.channels, weights.input_size, weights.input_size),
                vae.vae is not None,
                diffusion.num_timesteps,
                device,
            )
            for micro, part in enumerate(mine):
                images, y = next(loader)
                own = slice(part * len(y), (part + 1) * len(y))
                t, drop, noise, draw = (None if r is None else r[own] for r in randomness)
                x = vae.sample(vae.encode(images.to(device)), noise=draw)
                with (
                    accelerator.autocast(),
                    accelerator.no_sync(model) if micro + 1 < accumulation else torch.enable_grad(),
                ):
                    losses = diffusion.training_losses(model, x, t, dict(y=y.to(device), drop=drop), noise)
                    loss = losses["loss"].mean()
                    accelerator.backward(loss / accumulation)
                logged.append(loss.detach())
            if args.grad_clip:
                accelerator.clip_grad_norm_(model.parameters(), args.grad_clip)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
            optimizer.step()
            optimizer.zero_grad()
            update_ema(ema, weights, args.ema_decay, step)
            done = step + 1
            if done % args.log_every == 0 or done == total:
                loss = accelerator.reduce(torch.stack(logged).mean(), "mean").item()
                rate = len(logged) * args.global_batch_size / accumulation / (time.perf_counter() - clock)
                if accelerator.is_main_process:
                    with open(folder / "metrics.jsonl", "a") as file:
                        file.write(json.dumps(dict(step=done, loss=loss, images_per_second=rate)) + "\n")
                progress.update(bar, loss=loss, rate=rate)
                logged, clock = [], time.perf_counter()
            progress.update(bar, completed=done)
            if accelerator.is_main_process and (done % args.ckpt_every == 0 or done == total):
                save_state(folder, done, weights, ema, optimizer, metadata)
            if accelerator.is_main_process and args.sample_every and (done % args.sample_every == 0 or done == total):
                images, nrow, names = class_grid(ema, sample_diffusion, vae, 4, args.global_seed, device, **sampling)
                save_grid(images, folder / "samples" / f"{done:07d}.png", nrow, names)

    if args.eval_samples:
        figures = evaluate(
            ema, sample_diffusion, vae, data, args.eval_samples, accelerator, seed=args.global_seed, **sampling
        )
        if accelerator.is_main_process:
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(dict(step=total, **figures)) + "\n")
            print_figures(figures, f"{folder.name} at step {total}")
    accelerator.print(
        f"run: {folder}\nsample: python sample_grid.py --ckpt {folder}\n"
        f"evaluate: accelerate launch evaluate.py --ckpt {folder} --ref {args.data_path}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main, parse_args())
