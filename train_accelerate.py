"""Train a DiT: data -> latents -> noise -> loss -> weights, on one CPU or many GPUs.

    accelerate launch train_accelerate.py                     digits, a tiny DiT, two CPU cores
    accelerate launch train_accelerate.py \\
        --data-path FOLDER --model DiT-B/4                    your pictures, a folder per class
    accelerate launch --config_file docs/accelerate/eight_gpus.yaml train_accelerate.py \\
        --data-path ILSVRC/imagenet-1k --latent-cache latents --compile     the paper, eight GPUs
    torchrun --nproc_per_node 2 train_accelerate.py           two processes on a CPU

Read evaluate.py first. One step, with images x, labels y, a process of gaussian_diffusion.py and
the network f of dit.py:

    x_0 = latents(x),  eps ~ normal       functions of (seed, step, index in the global batch), as t

    --objective ddpm (the paper)          flow, sit (SiT), jit (f predicts x_0)
    t    ~ uniform steps                  logit-normal in [0, 1], or uniform
    x_t  = q_sample(x_0, t, eps)          t x_0 + (1 - t) eps
    loss = |eps - f(x_t, t, y)|^2 + L_vb  |x_0 - eps - f(x_t, t, y)|^2

    AdamW step;  ema = decay * ema + (1 - decay) * weights

The same command again resumes the run where it stopped, and it ends as if it had never stopped:
nothing is drawn from hidden state. All processes must see the run's folder.
"""

import argparse
import bisect
import contextlib
import copy
import functools
import itertools
import json
import math
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import psutil
import safetensors.torch
import torch
from accelerate import DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from filelock import FileLock, Timeout
from PIL import Image
from torch.nn.utils import get_total_norm

import dit
from dit import (
    InputError,
    RankLocalError,
    fingerprint,
    log_stderr,
    note,
    read_json,
    save_checkpoint,
    step_folders,
    write_json,
    writing,
)
from evaluate import (
    BrokenImage,
    Inception,
    add_data_args,
    choose_metrics,
    evaluate_model,
    gather_rows,
    load_data,
    load_features,
    model_classes,
    plot_run,
    print_metrics,
    read_batches,
    reference_features,
    split_off,
)
from gaussian_diffusion import OBJECTIVES, create_process
from sample_grid import (
    SAMPLING_FLAGS,
    SEED,
    Autoencoder,
    Flag,
    ProgressBar,
    add_flags,
    add_sampling_args,
    class_grid,
    default_labels,
    describe_device,
    in_batches,
    in_plain_words,
    make_accelerator,
    sampling_settings,
    save_grid,
)


def main(args):
    """Train. The flags and their values in each recipe are the table SETTINGS, below."""
    # Unset flags take the recipe's values. Processes, devices and precision are accelerate's part.
    fill_preset(args)
    accelerator = start_accelerator(args)
    device = accelerator.device

    # All that the user gave is read and checked before anything is written: the images, and the
    # autoencoder whose latents the network learns (none: the pixels are the latents).
    columns = args.image_column, args.label_column
    whole = load_data(args.data_path, args.image_size, *columns, args.split, args.upright)
    data, held = hold_out(args, whole)  # to learn from, and never to learn from
    vae = Autoencoder.load(args.vae, device, pixel_channels(args, whole, accelerator))
    folder = run_folder(args, data)
    fit_to_data(args, data, held, vae, folder, accelerator)

    # The network, its moving average (EMA), which samples better, and the process that adds noise.
    init = None if own_checkpoints(folder) else args.init
    network = build_network(args, vae, init).to(device)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    diffusion = create_process(args.objective, time_sampling=args.time_sampling)
    ema.metadata = describe(args, data, vae, diffusion)
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    adam = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0, fused=True)

    log = Log(folder, accelerator)
    previews = Previews(args, ema, vae, diffusion, data, held, log, accelerator)
    settings = identify(args, data, vae, accelerator)
    stop = StopSignals(folder, accelerator)
    with stop, open_run(folder, settings, accelerator):
        introduce(args, data, network, previews, accelerator)
        # With a cache the VAE encodes each image once, not once an epoch.
        if args.latent_cache:
            cache = latent_cache(args, whole, vae, accelerator)
            previews.leave_out(cache.broken)
            data = cache.part(data)
        if args.compile:
            torch._dynamo.config.optimize_ddp = False  # it cuts blocks where DDP's buckets end
            for block in network.blocks:  # all alike, so one compilation; in place: names stay
                block.compile()
        model, optimizer = prepare(accelerator, network.train(), adam)

        # All that a run has to remember. Everything else is a function of the seed and the step.
        means = RunningMeans(diffusion.loss_names, accelerator)
        checkpoints = Checkpoints(folder, args, accelerator, model, ema, adam, means, log)
        start, total = checkpoints.resume(), count_steps(args, len(data))
        fit_to_memory(args, diffusion, network, model, adam, accelerator)
        on_main(accelerator, write_json, folder / "config.json", settings | vars(args))
        previews.catch_up(start, total)

        # Workers load this process's parts of the global batches ahead of the steps.
        sampler = GlobalBatches(args, len(data), start, total, accelerator)
        batches = read_batches(data, sampler, args.num_workers, pin=device.type == "cuda")
        stopwatch = Stopwatch(args, network, start, accelerator)
        progress = ProgressBar(accelerator, "step", total, start)
        with contextlib.closing(batches), progress:
            for step in range(start, total):
                stop.saved = False

                # 1. The randomness of the step: a function of (seed, step, index in the batch).
                t, drop, noise, vae_noise = draw_randomness(args, step, diffusion, network, device)

                # 2. Forward and backward, one part of the batch after another: gradients add up.
                for own in sampler.mine:
                    batch = stopwatch.next(batches)
                    images, y = (tensor.to(device, non_blocking=True) for tensor in batch)
                    moments = images if args.latent_cache else vae.encode(images)
                    x = vae.sample(moments, noise=vae_noise[own])  # (n, C, h, w)
                    with accelerator.accumulate(model):
                        labels = dict(y=y, drop=drop[own])
                        losses = diffusion.training_losses(model, x, t[own], labels, noise[own])
                        accelerator.backward(losses["loss"].mean())
                    means.add(losses, x)

                # 3. Update the weights, unless a number is not finite, and then the EMA.
                norm = clip_gradients(accelerator, model, args.grad_clip)
                finite = means.end_step(step, norm)
                lr = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
                update_weights(accelerator, optimizer, lr, finite)
                update_ema(ema, network, args.ema_decay, step)

                # 4. Log, save, preview. What is saved before an evaluation cannot be lost in it.
                done, stopping = step + 1, stop.agreed()
                due = what_is_due(args, done, total)
                saves = stopping or "ckpt" in due or "eval" in due
                if saves or "log" in due:
                    means.check(args.skip_nonfinite, sampler, checkpoints)
                if "log" in due:
                    line = log.append(done, lr=lr, **means.take(), **stopwatch.take(done))
                    progress.note = in_words(line)
                progress.advance()
                with stopwatch.paused():
                    if saves:
                        checkpoints.save(done)
                        stop.saved = True
                    if stopping:
                        stop.exit()
                    previews.make(done, due)
    print_end(args, log, accelerator)


# ------------------------------------------------------------------------------------ the settings


ByData = namedtuple("ByData", "digits others")  # a value that follows the data
# Steps: a share of the run's, but no more than most and, as pictures cost time, no less than least.
PerRun = namedtuple("PerRun", "times most least", defaults=[1])
UpTo = namedtuple("UpTo", "most")  # images to score, see Previews


class Setting(Flag):
    """A row of SETTINGS: a flag of the command line, None until the program fills it in.

    paper, laptop: the value that it takes in each recipe when it is not given. bounds: the smallest
    and the largest number that make sense. resume: whether a run can be resumed with another value:
    "fixed" never, since its weights hang on it; "asked" with --allow-changes; "free" always.
    """

    def __init__(self, name, paper, laptop, bounds, resume, help, shown=None, **options):
        self.recipes = dict(paper=paper, laptop=laptop)
        self.resume = resume
        # What argparse has to know follows from the kind of the values.
        value = laptop if paper is None else paper
        if isinstance(value, ByData | PerRun | UpTo):
            value = value[0]
        if isinstance(value, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif value is not None:
            options.setdefault("type", type(value))
        default = spoken(paper)
        if laptop != paper:
            default += f", for small networks {spoken(laptop)}"
        super().__init__(name, help, shown=shown or default, bounds=bounds, **options)


def spoken(value):
    """A value of the table as the help says it."""
    if isinstance(value, ByData):
        return f"{spoken(value.digits)} for digits, else {spoken(value.others)}"
    if isinstance(value, PerRun):
        return f"a run's steps / {value.times}, at most {value.most}"
    if isinstance(value, UpTo):
        return f"up to {value.most}, what costs no more than the training before"
    return in_plain_words(value)


def number_or_auto(text):
    return AUTO if text == "auto" else int(text)


ANY, FROM_0, FROM_1, SHARE = None, (0, math.inf), (1, math.inf), (0, 1)
SIZE, NETWORK, VAE = ByData(8, 256), ByData("DiT-Ti/2", "DiT-XL/2"), ByData("none", "ema")
HELD = ByData("0.1", "0")
STEPS = ByData(1000, 600)  # a step of 28-px pictures takes ten times as long as one of digits
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
OWN_CORES = max(1, CORES // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
WORKERS = ByData(0, min(4, OWN_CORES))  # digits are in memory
AUTO = 0  # parts of a batch
LOGS, TENTHS, WHOLE = PerRun(20, 100), PerRun(10, 50_000), PerRun(1, 50_000)
PREVIEWS = PerRun(10, 50_000, least=10)

SETTINGS = {
    #           flag                             the paper    laptop      bounds   on resume
    "what": [
        Setting("--data-path",                   "digits",    "digits",   ANY,     "free",
                "digits, a folder, or a hub id, see evaluate.py"),
        Setting("--num-classes",                 None,        None,       FROM_1,  "fixed",
                "number of classes", type=int, shown="the data's"),
        Setting("--val-split",                   HELD,        HELD,       ANY,     "fixed",
                "never train on these images, and log the loss on them: a share of the data, or "
                "the name of another split", metavar="SHARE_OR_NAME"),
        Setting("--image-size",                  SIZE,        SIZE,       FROM_1,  "fixed",
                "pixels"),
        Setting("--mirror",                      True,        False,      ANY,     "asked",
                "flip images at random"),
        Setting("--model",                       NETWORK,     NETWORK,    ANY,     "fixed",
                "the network, one of python dit.py's table; unset flags take its recipe: the "
                "paper's for the paper's twelve, else the laptop's"),
        Setting("--vae",                         VAE,         VAE,        ANY,     "free",
                "ema, mse (stabilityai/sd-vae-ft-*), a hub id, a diffusers folder, or none"),
        Setting("--class-dropout-prob",          0.1,         0.1,        SHARE,   "fixed",
                "how often a label is hidden, 0 for no guidance"),
        Setting("--init",                        None,        None,       ANY,     "asked",
                "begin with these weights, to fine-tune them", shown="new ones", metavar="CKPT"),
        Setting("--latent-cache",                None,        None,       ANY,     "asked",
                "keep the VAE's moments here", shown="encode every time", metavar="DIR"),
        Setting("--max-broken",                  100,         100,        FROM_0,  "free",
                "images that a cache may leave out"),
    ],
    "how": [
        Setting("--objective",                   "ddpm",      "ddpm",     ANY,     "fixed",
                "what the network learns: ddpm the noise, as in the paper; flow the velocity of "
                "straight paths; sit the same with the time as SiT's weights take it; jit the "
                "image at the end of these paths, by the same loss",
                choices=OBJECTIVES),
        Setting("--time-sampling",               None,        None,       ANY,     "fixed",
                "times that flow, sit and jit train at; logit-normal favours the middle",
                choices=("uniform", "logit-normal"), shown="logit-normal"),
        Setting("--global-batch-size",           256,         128,        FROM_1,  "asked",
                "images a step, over all processes"),
        Setting("--epochs",                      1400,        None,       FROM_1,  "free",
                "passes over the data"),
        Setting("--max-steps",                   None,        STEPS,      FROM_1,  "free",
                "steps; with --epochs, what ends first"),
        Setting("--lr",                          1e-4,        4e-3,       FROM_0,  "asked",
                "AdamW's learning rate"),
        Setting("--warmup-steps",                0,           100,        FROM_0,  "asked",
                "steps in which the learning rate rises to --lr"),
        Setting("--grad-clip",                   0.0,         1.0,        FROM_0,  "asked",
                "largest gradient norm, 0 for no limit"),
        Setting("--ema-decay",                   0.9999,      0.995,      SHARE,   "asked",
                "decay of the averaged weights, which warms up"),
        Setting("--global-seed",                 0,           0,          SEED,    "asked",
                "all randomness comes from it"),
        Setting("--skip-nonfinite",              0,           0,          FROM_0,  "free",
                "leave out N steps whose loss or gradient is not finite", metavar="N"),
    ],
    "machine": [
        Setting("--mixed-precision",             None,        None,       ANY,     "asked",
                "autocast of the network; weights stay float32",
                choices=("no", "fp16", "bf16"), shown="as accelerate is configured, else no"),
        Setting("--gradient-accumulation-steps", AUTO,        AUTO,       FROM_0,  "asked",
                "parts of a batch, one after the other; auto finds how few fit the memory",
                type=number_or_auto, metavar="N|auto",
                shown="auto; one on a CPU"),
        Setting("--gradient-checkpointing",      False,       False,      ANY,     "asked",
                "less memory, a third more time"),
        Setting("--num-workers",                 WORKERS,     WORKERS,    FROM_0,  "free",
                "processes that load images, for each process that trains",
                shown="0 for digits, else 4 or the cores that there are"),
    ],
    "the run's folder": [
        Setting("--results-dir",                 "results",   "results",  ANY,     "free",
                "where runs are kept"),
        Setting("--run-name",                    None,        None,       ANY,     "free",
                "the run's folder in it", shown="data and model"),
        Setting("--allow-changes",               False,       False,      ANY,     "free",
                "resume with other settings than before"),
        Setting("--log-every",                   LOGS,        LOGS,       FROM_1,  "free",
                "steps between lines in metrics.jsonl"),
        Setting("--ckpt-every",                  TENTHS,      TENTHS,     FROM_1,  "free",
                "steps between checkpoints"),
        Setting("--keep-checkpoints",            3,           3,          FROM_1,  "free",
                "how many of the last are kept"),
        Setting("--sample-every",                PREVIEWS,    PREVIEWS,   FROM_0,  "free",
                "steps between sample grids, 0 for none"),
        Setting("--eval-every",                  WHOLE,       WHOLE,      FROM_0,  "free",
                "steps between evaluations, 0 for none"),
        Setting("--eval-samples",                UpTo(10_000), UpTo(500), FROM_0,  "free",
                "images for an evaluation, 0 for none"),
        Setting("--features",                    None,        None,       ANY,     "free",
                "the evaluation's feature network, see evaluate.py", shown="efficientnet-lite0 "
                "below 64 px or where Inception cannot be had, else inception"),
        Setting("--tracker",                     "none",      "none",     ANY,     "free",
                "also log there", choices=("none", "tensorboard", "wandb")),
    ],
}
ROWS = list(itertools.chain.from_iterable(SETTINGS.values()))
EVAL_SAMPLES = next(row for row in ROWS if row.name == "--eval-samples")

# Previews and scores while training: good pictures for little time.
PREVIEW_SCALE, QUICK_STEPS = 1.5, 20
QUICK_SAMPLERS = dict.fromkeys(OBJECTIVES, "euler") | dict(ddpm="dpm++")
# Validation: held-out images at most, and times of each, one in each fifth of the process.
VALIDATED, BANDS = 200, 5


def recipe(args):
    """Which column of SETTINGS unset flags take their values from: it follows the network."""
    return "paper" if args.model in dit.DIT_CONFIGS else "laptop"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a DiT. Unset flags take the network's recipe, the data's size.",
        epilog="The same command again resumes the run where it stopped.")
    for title, settings in SETTINGS.items():
        add_flags(parser, title, settings)
    add_data_args(parser)
    add_sampling_args(parser)
    return parser.parse_args(argv)


def of_digits(args):
    return args.data_path == "digits"


def fill_preset(args):
    """Unset flags take the recipe's values, but for those that fit_to_data and Previews choose.

    InputError for values that make no sense.
    """
    # The data choose the network, which chooses the recipe.
    args.data_path = args.data_path or "digits"
    args.model = args.model or getattr(NETWORK, "digits" if of_digits(args) else "others")
    dit.named_config(args.model)
    # A run's length by one of the two leaves the recipe's other out.
    limits = {"epochs", "max_steps"}
    kept = limits if any(getattr(args, name) is not None for name in limits) else set()
    for setting in ROWS:
        value = setting.recipes[recipe(args)]
        if isinstance(value, ByData):
            value = value.digits if of_digits(args) else value.others
        later = isinstance(value, PerRun | UpTo) or setting.dest in kept
        if getattr(args, setting.dest) is None and not later:
            setattr(args, setting.dest, value)
        setting.check(args)
    if args.eval_samples == 0:
        args.eval_every = 0

    # An option that would do nothing is an error.
    if args.objective == "ddpm" and args.time_sampling:
        raise InputError(f"--time-sampling {args.time_sampling} is for --objective flow, sit and "
                         "jit: ddpm's times are uniform")
    if args.latent_cache and args.vae == "none":
        raise InputError("--latent-cache does nothing with --vae none: pixels need no encoding")
    if args.tracker not in ("none", *map(str, get_available_trackers())):
        raise InputError(f"--tracker {args.tracker} needs a package: pip install {args.tracker}")
    if args.time_sampling is None:
        args.time_sampling = "uniform" if args.objective == "ddpm" else "logit-normal"


def start_accelerator(args):
    accelerator = make_accelerator(
        args.mixed_precision, args.tf32, project_dir=args.results_dir,
        gradient_accumulation_steps=max(1, args.gradient_accumulation_steps),
        log_with=None if args.tracker == "none" else args.tracker)
    # Gradients are summed over the processes where they lie: DDP's copies of XL/2's take 2.7 GB.
    accelerator.ddp_handler = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    return accelerator


def hold_out(args, whole):
    """(images to train on, held-out images) of ImageData; (all, None) if none are to be held out.

    InputError when the held-out images have other classes.
    """
    data, held = split_off(whole, args.val_split, args.data_path, args)
    if held and held.classes != data.classes:
        raise InputError(f"--val-split {args.val_split} has other classes than the training images")
    if held:
        note(f"{len(held)} images are held out, {len(data)} are trained on")
    return data, held


def pixel_channels(args, data, accelerator):
    """The channels of pixels: the data's, but one when all that is trained on them is gray."""
    if args.vae != "none" or data.channels == 1 or not on_main(accelerator, data.all_gray):
        return data.channels
    accelerator.print("all images are gray: pixels have one channel")
    return 1


def fit_to_data(args, data, held, vae, folder, accelerator):
    """Check the settings against the data and the processes; take from them what is unset."""
    # What accelerate's configuration says counts where no flag does, and is on record then.
    args.mixed_precision = accelerator.mixed_precision
    configured = accelerator.gradient_accumulation_steps
    if args.gradient_accumulation_steps == AUTO and configured > 1:
        args.gradient_accumulation_steps = configured
    # What auto has found is kept when the run is resumed.
    if args.gradient_accumulation_steps == AUTO and own_checkpoints(folder):
        recorded = read_json(folder / "config.json")
        args.gradient_accumulation_steps = recorded.get("gradient_accumulation_steps", AUTO)
    accelerator.gradient_accumulation_steps = max(1, args.gradient_accumulation_steps)

    # Every process makes as many equal parts of the batch as the others.
    parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
    if args.global_batch_size % parts:
        raise InputError(f"--global-batch-size {args.global_batch_size} must divide by processes x "
                         f"accumulation steps = {parts}")
    if held and len(held) < accelerator.num_processes:
        raise InputError(f"--val-split {args.val_split}: {len(held)} images are too few for "
                         f"{accelerator.num_processes} processes")
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise InputError("--mixed-precision fp16 does nothing on this device: use bf16 or no")
    if args.image_size % vae.factor:
        raise InputError(
            f"--image-size {args.image_size} must divide by {vae.factor}, the VAE's downsampling; "
            "or train on pixels with --vae none")

    # More classes than the data have are allowed; one is no condition: nothing to hide or guide.
    largest = max(max(part.labels) for part in (data, held) if part)
    if args.num_classes is None:
        args.num_classes = data.num_classes
    if largest >= args.num_classes:
        raise InputError(f"--num-classes {args.num_classes}, but the data has a label {largest}")
    if args.num_classes == 1:
        args.class_dropout_prob = 0.0

    # A short run logs, draws and saves as often as a long one, seen over its length.
    total = count_steps(args, len(data))
    for setting in ROWS:
        value = setting.recipes[recipe(args)]
        if isinstance(value, PerRun) and getattr(args, setting.dest) is None:
            every = math.ceil(total / value.times)
            setattr(args, setting.dest, max(value.least, min(every, value.most)))


def identify(args, data, vae, accelerator):
    """The settings of the run, as config.json keeps them.

    Data and VAE are known by what they hold: their folders may be moved.
    """
    weights = fingerprint(vae.vae.state_dict(), vae.scale, vae.shift) if vae.vae else None
    return vars(args) | dict(
        data=data.identity(), images=len(data), channels=vae.channels, vae_weights=weights,
        num_processes=accelerator.num_processes)


def count_steps(args, size):
    """Steps in all: --max-steps or --epochs of a data set's size, whichever ends first."""
    by_epochs = math.inf
    if args.epochs:
        by_epochs = math.ceil(args.epochs * size / args.global_batch_size)
    return min(by_epochs, args.max_steps or math.inf)


def what_is_due(args, step, last):
    """Which of log, ckpt, sample, eval are due after a step: every so many, and at the last.

    With any of the latter two also val, the validation loss.
    """
    everys = {name: getattr(args, f"{name}_every") for name in ("log", "ckpt", "sample", "eval")}
    due = {name for name, every in everys.items()
           if every > 0 and step > 0 and (step % every == 0 or step == last)}
    return due | {"val"} if due & {"sample", "eval"} else due


def describe(args, data, vae, diffusion):
    """What travels with the weights, beside their step: what sampling and evaluating need."""
    # Classes that the data have not, which --num-classes may ask for, have numbers for names.
    names = data.class_names
    if names:
        names = [*names, *map(str, range(len(names), args.num_classes))]
    metadata = dict(
        data=data.name, class_names=names, vae=vae.name, image_size=args.image_size,
        objective=diffusion.objective, data_path=args.data_path,
    )
    # The same files have to be found from another folder, too.
    for name in ("vae", "data_path"):
        is_name = metadata[name] in ("digits", "none", "ema", "mse")
        if not is_name and os.path.exists(metadata[name]):
            metadata[name] = os.path.abspath(metadata[name])

    # A small network is best sampled as its previews are; the paper's as in the paper.
    flags = args
    if recipe(args) == "laptop":
        flags = quick_sampling(args)
        flags.cfg_scale = PREVIEW_SCALE if args.cfg_scale is None else args.cfg_scale
    given = lambda flags, *names: {
        name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    metadata["sampling"] = given(flags, "sampler", "num_sampling_steps", "cfg_scale")
    return metadata | given(args, "image_column", "label_column", "split", "val_split")


def quick_sampling(args):
    """The flags with the sampler of previews and scores, unless another is given.

    In bfloat16 if training is: that is faster.
    """
    quick = copy.copy(args)
    if args.mixed_precision == "bf16":
        quick.dtype = "bf16"
    if quick.sampler is None:
        quick.sampler = QUICK_SAMPLERS[args.objective]
        if quick.num_sampling_steps is None:
            quick.num_sampling_steps = QUICK_STEPS
    return quick


def introduce(args, data, network, previews, accelerator):
    """The first lines of a run: what was chosen and why."""
    parameters = sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
    gflops = dit.count_macs(network.config) / 1e9
    why = dict(paper="the paper's recipe", laptop="the recipe of small networks")[recipe(args)]
    total = count_steps(args, len(data))
    passes = total * args.global_batch_size / len(data)
    precision = dict(no="fp32").get(args.mixed_precision, args.mixed_precision)
    every = lambda name: f"every {min(getattr(args, name), total)} steps"
    draws = f"draws {every('sample_every')}, " if args.sample_every else ""
    accelerator.print(
        f"network {args.model}: {parameters / 1e6:.1f} million parameters, {gflops:.2f} Gflops an "
        f"image, {why}, objective {args.objective}\n"
        f"{describe_device(accelerator, precision)}\n"
        f"{total} steps of {args.global_batch_size} images, {passes:.1f} passes over the data; "
        f"logs {every('log_every')}, {draws}saves {every('ckpt_every')}\n"
        f"{previews.plan}", flush=True)


# ----------------------------------------------------------------------------------- network, step


def build_network(args, vae, init):
    """A new DiT for the data, with the weights of the checkpoint `init` if it is not None."""
    # Initial weights depend on the seed alone, and are the same in every process.
    torch.manual_seed(args.global_seed)
    network = dit.build_dit(
        args.model, input_size=args.image_size // vae.factor, in_channels=vae.channels,
        num_classes=args.num_classes, class_dropout_prob=args.class_dropout_prob,
        learn_sigma=args.objective == "ddpm",
    )
    network.gradient_checkpointing = args.gradient_checkpointing
    if init is not None:
        take_weights(network, args.model, init)
    return network


def take_weights(network, name, init):
    """Give a new network of that name the weights of the checkpoint init, to fine-tune them.

    The position embedding may be of another size there, and the label table may have another number
    of rows: they are new then. The half of the final layer that predicts ddpm's variance is left
    out or new. InputError when anything else differs.
    """
    given = dit.load_checkpoint(init)
    # What may differ is made to fit below, the rest said in words.
    made_to_fit = {"input_size", "num_classes", "class_dropout_prob", "learn_sigma"}
    wrong = [f"{entry} {given.config[entry]}, not {value}"
             for entry, value in network.config.items()
             if value != given.config[entry] and entry not in made_to_fit]
    if wrong:
        hint = ""
        if network.in_channels != given.in_channels:
            hint = ("; channels are 1 for gray pixels, 3 for pixels in colour (--vae none), and 4 "
                    "for the usual latents")
        raise InputError(f"--init {init} does not fit {name} here: it has {'; '.join(wrong)}{hint}")

    # Positions are fixed sinusoids, and rows of other classes would mean nothing here.
    own, weights = network.state_dict(), given.state_dict()
    weights["pos_embed"] = own["pos_embed"]
    table = "y_embedder.embedding_table.weight"
    rows, given_rows = len(own[table]), len(weights[table])
    if rows != given_rows:
        log_stderr(f"--init: the label table is new, {rows} rows in place of {given_rows}")
        weights[table] = own[table]

    # The last layer's rows are p x p pixels of out_channels each, the predicted variance last.
    if network.learn_sigma != given.learn_sigma:
        done = "new, zero" if network.learn_sigma else "left out"
        log_stderr(f"--init: the final layer's half for ddpm's variance is {done}")
        pixels, channels = network.patch_size**2, network.in_channels
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            fitting = own[name].unflatten(0, (pixels, -1))  # (p p, C or 2C, ...)
            fitting[:, :channels] = weights[name].unflatten(0, (pixels, -1))[:, :channels]
            weights[name] = fitting.flatten(0, 1)
    network.load_state_dict(weights)


TRIED = ("cuda", "xpu", "mps", "npu")  # devices whose memory a batch may be too large for
REMEDIES = ("out of memory: --gradient-checkpointing or a smaller --model or --image-size need "
            "less, as do a --latent-cache and --gradient-accumulation-steps N, a batch in N parts")


def fit_to_memory(args, diffusion, network, model, adam, accelerator):
    """Cut batches in as few parts as fit the device's memory, unless their number is given.

    All randomness hangs on a place in the global batch, so that more parts are the same batch. A
    trial of forward and backward tells whether a part fits; processes agree. InputError when not
    even one image does.
    """
    # FSDP's processes would wait for one that is out of memory.
    tried = accelerator.device.type in TRIED and accelerator.distributed_type != "FSDP"
    parts = args.gradient_accumulation_steps or 1
    own = args.global_batch_size // accelerator.num_processes
    while args.gradient_accumulation_steps == AUTO and tried:
        fits = trial_fits(own // parts, diffusion, network, model, adam, accelerator)
        everywhere = accelerator.reduce(torch.tensor(float(fits), device=accelerator.device))
        if everywhere == accelerator.num_processes:
            break
        if parts == own:
            raise InputError(f"not even one image fits: {REMEDIES}")
        # About twice as many, all of one size.
        parts = next(n for n in range(2 * parts, own + 1) if own % n == 0)
        accelerator.print(f"out of memory: a batch is cut in {parts} parts", flush=True)
    args.gradient_accumulation_steps = accelerator.gradient_accumulation_steps = parts


def trial_fits(size, diffusion, network, model, adam, accelerator):
    """Whether forward and backward of so many images fit the memory; nothing is changed."""
    fits = True
    try:
        # AdamW makes two moments of each weight in its first step; the gradients stay here.
        trained = [weight for weight in network.parameters() if weight.requires_grad]
        moments = [] if adam.state else [torch.empty_like(weight) for weight in 2 * trained]
        shape = size, network.in_channels, network.input_size, network.input_size
        x = torch.zeros(shape, device=accelerator.device)
        y = torch.zeros(size, dtype=torch.int64, device=x.device)
        t = diffusion.draw_times(size, torch.Generator(x.device).manual_seed(0))
        with accelerator.no_sync(model):
            losses = diffusion.training_losses(model, x, t, dict(y=y, drop=y > 0), noise=x)
            losses["loss"].mean().backward()
        del moments
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fits = False
    # Outside of the handler, which keeps the failed step's tensors alive.
    adam.zero_grad()
    clear_device_cache()
    return fits


def prepare(accelerator, network, adam):
    """The network and its optimizer as the processes share them: accelerate's prepare."""
    # Accelerate would have FSDP compute in bfloat16 throughout: the residual stream, positions and
    # the sums of gradients lose digits there. Without a policy of its own and in autocast, it
    # computes as DDP does.
    sharded = accelerator.distributed_type == "FSDP"
    if sharded:
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    model, optimizer = accelerator.prepare(network, adam)
    if sharded:
        model.forward = accelerator.autocast()(model.forward)
    return model, optimizer


def clip_gradients(accelerator, model, most):
    """The norm of all gradients together, which are scaled down to `most` unless that is 0."""
    if most:
        norm = accelerator.clip_grad_norm_(model.parameters(), most)
    else:
        accelerator.unscale_gradients()  # of float16
        norm = get_total_norm([w.grad for w in model.parameters() if w.grad is not None])
    return full_tensor(norm)


def update_weights(accelerator, optimizer, lr, finite):
    """AdamW's step with this learning rate; none where the tensor `finite` is False."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Fused AdamW skips its update on the device when found_inf is 1: no GPU-to-CPU wait. The scaler
    # of float16 sets it by itself.
    if accelerator.scaler is None:
        optimizer.optimizer.found_inf = (~finite).float()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def update_ema(ema, network, decay, step):
    """ema = d * ema + (1 - d) * weights, with d rising to decay as (1 + step) / (10 + step)."""
    d = min(decay, (1 + step) / (10 + step))
    # One by one: with FSDP no process has to hold all weights once more.
    for average, weight in zip(ema.parameters(), network.parameters(), strict=True):
        average.lerp_(full_tensor(weight), 1 - d)


def full_tensor(tensor):
    """The tensor itself, or all of what FSDP has spread over the processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def validation_loss(args, held, ema, vae, diffusion, accelerator):
    """The loss of the EMA weights on held-out ImageData: val_loss, val_loss_bands of BANDS numbers.

    Of at most VALIDATED images, each at one time in each of BANDS equal parts of the way from data
    to noise. Times and noise are functions of (seed, image): only the weights move the loss, and
    the processes share the images. Training's own loss has the same meaning where its times are
    uniform, but labels are never hidden here.
    """
    images = held.spread(VALIDATED)
    shape = BANDS, ema.in_channels, ema.input_size, ema.input_size

    def losses(numbers):
        # The randomness of each image; float64 never rounds up into the next band.
        times, noise, vae_noise = [], [], []
        for row in images.rows[numbers].tolist():
            generator = seeded("cpu", args.global_seed, "validation", row)
            within = torch.rand(BANDS, generator=generator, dtype=torch.float64)
            times.append((torch.arange(BANDS) + within) / BANDS)
            noise.append(torch.randn(shape, generator=generator))
            vae_noise.append(torch.randn(shape[1:], generator=generator))

        # Forward, each image once for each of its times.
        on_device = lambda parts, join: join(parts).to(accelerator.device)
        pixels, y = zip(*[images[number] for number in numbers], strict=True)
        moments = vae.encode(on_device(pixels, torch.stack))
        x = vae.sample(moments, noise=on_device(vae_noise, torch.stack))
        x = x.repeat_interleave(BANDS, 0)  # (n BANDS, C, h, w)
        y = torch.tensor(y, device=x.device).repeat_interleave(BANDS)
        t = diffusion.times_at(torch.cat(times)).to(accelerator.device)
        with accelerator.autocast():
            found = diffusion.training_losses(ema, x, t, dict(y=y), on_device(noise, torch.cat))
        return found["loss"].unflatten(0, (-1, BANDS))

    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    rows = torch.cat([part for _, part in in_batches(losses, mine, 32)])
    bands = gather_rows(rows, len(images), accelerator).cpu().double().mean(0)
    return dict(val_loss=float(bands.mean()), val_loss_bands=bands.tolist())


# -------------------------------------------------------------------------------------- randomness


def seeded(device, *key):
    """A generator whose numbers depend on the key alone: the same in every process and run."""
    digest = bytes.fromhex(fingerprint(key))
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@functools.lru_cache(maxsize=2)
def epoch_order(seed, count, epoch):
    """The order of the data in an epoch: a permutation (count,)."""
    return torch.randperm(count, generator=seeded("cpu", seed, "order", epoch))


class GlobalBatches(torch.utils.data.Sampler):
    """This process's parts of the steps from start to stop, each a list of (index, mirror).

    The data are an endless stream, epoch after epoch, each in its own order; step s takes the
    stream's s-th global batch. It is cut into processes x accumulation parts, of which process r of
    P takes r, P + r, 2P + r, ... one after the other: `mine`, where they lie in the batch.
    """

    def __init__(self, args, count, start, stop, accelerator):
        self.seed = args.global_seed
        self.mirror = args.mirror
        self.batch = args.global_batch_size
        self.count = count
        self.steps = range(start, stop)
        parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
        size = self.batch // parts
        mine = range(accelerator.process_index, parts, accelerator.num_processes)
        self.mine = [slice(part * size, (part + 1) * size) for part in mine]

    def indices(self, step):
        """The data's indices in the global batch of a step."""
        indices = []
        for position in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(position, self.count)
            indices.append(int(epoch_order(self.seed, self.count, epoch)[place]))
        return indices

    def __iter__(self):
        for step in self.steps:
            flips = torch.rand(self.batch, generator=seeded("cpu", self.seed, "mirror", step)) < 0.5
            mirrors = (flips & self.mirror).tolist()
            examples = list(zip(self.indices(step), mirrors, strict=True))
            for own in self.mine:
                yield examples[own]


def draw_randomness(args, step, diffusion, network, device):
    """Times (B,), label drops (B,), noise and VAE noise (B, C, h, w) of a step's global batch.

    Every process draws all of them, and uses its own: they are functions of (seed, step, index in
    the batch), and of the kind of device, since a GPU's random numbers differ from a CPU's.
    """
    generator = seeded(device, args.global_seed, "noise", step)
    batch, size = args.global_batch_size, network.input_size
    shape = batch, network.in_channels, size, size
    t = diffusion.draw_times(batch, generator)
    drop = torch.rand(batch, generator=generator, device=device) < args.class_dropout_prob
    noise = torch.randn(shape, generator=generator, device=device)
    vae_noise = torch.randn(shape, generator=generator, device=device)
    return t, drop, noise, vae_noise


# -------------------------------------------------------------------------------- the latent cache


class LatentCache(torch.utils.data.Dataset):
    """The VAE's moments of a data set on disk: cache[index, mirror] -> moments (2C, h, w), label.

    Shards of SHARD images each, in the data set's order without its broken images, hold moments
    (n, 2, 2C, h, w) float16 of every image and its mirror image, labels (n,), and checksums (n, 2)
    of both, which each read verifies. Moments stay in the files: memory does not grow with data.
    broken: which of the data set's images are left out, ascending.
    """

    SHARD = 2048

    def __init__(self, shards, counts, broken):
        self.shards = shards
        self.broken = broken
        self.starts = [0, *itertools.accumulate(counts)]
        self.places = range(self.starts[-1])

    def part(self, images):
        """The same cache with those images alone that ImageData has, a part of the same data."""
        part = copy.copy(self)
        rows = images.without(self.broken).rows
        part.places = rows - np.searchsorted(self.broken, rows)  # each broken one leaves a gap
        return part

    def __len__(self):
        return len(self.places)

    def __getitem__(self, key):
        index, mirror = key
        place = int(self.places[index])
        shard = bisect.bisect_right(self.starts, place) - 1
        row = place - self.starts[shard]
        moments, labels, checksums = open_shard(self.shards[shard], os.getpid())
        moments, label = moments[row, int(mirror)], int(labels[row])
        if zlib.crc32(moments.numpy(), label) != checksums[row, int(mirror)]:
            raise RankLocalError(f"{self.shards[shard]} is damaged: {MEND}")
        return moments, label


MEND = "delete it, and the same command makes it anew"


def latent_cache(args, data, vae, accelerator):
    """The data set's LatentCache in the folder of --latent-cache; the processes share its making.

    Raises InputError if the folder's cache is of other data, another VAE or another crop, if a file
    in it is damaged, and if more images than --max-broken cannot be read.
    """
    # What the latents depend on: a cache of anything else is refused.
    folder, size = Path(args.latent_cache), LatentCache.SHARD
    settings = dict(
        data=data.identity(), images=len(data), image_size=args.image_size, upright=args.upright,
        vae_weights=fingerprint(vae.vae.state_dict()), shard_images=size,
    )
    shards = [folder / f"moments-{s:05d}.safetensors" for s in range(math.ceil(len(data) / size))]
    on_main(accelerator, check_cache, folder, shards, settings)

    # Each process makes its own of the missing shards, in batches of 32 images.
    plan = {}
    for s in range(accelerator.process_index, len(shards), accelerator.num_processes):
        if not shards[s].exists():
            images = torch.arange(s * size, min(len(data), (s + 1) * size))
            plan[s] = [batch.tolist() for batch in images.split(32)]
    batches = list(itertools.chain.from_iterable(plan.values()))
    loaded = read_batches(NamedBroken(data), batches, args.num_workers, collate=list)

    # A shard appears whole when its last image is encoded: a kill costs no more than one shard.
    total = sum(map(len, batches))
    with ProgressBar(accelerator, "latents", total) as progress, contextlib.closing(loaded):
        for s, of_shard in plan.items():
            rows, broken = [], []
            for examples in itertools.islice(loaded, len(of_shard)):
                broken += [[index, label] for index, image, label in examples if image is None]
                good = [(image, label) for _, image, label in examples if image is not None]
                if good:
                    x = torch.stack([image for image, _ in good]).to(accelerator.device)
                    both = torch.stack([vae.encode(x), vae.encode(x.flip(3))], dim=1)
                    moments = both.half().cpu().contiguous()  # (N, 2, 2C, h, w)
                    rows += zip(moments, [label for _, label in good], strict=True)
                progress.advance(len(examples))
            write_shard(shards[s], rows, broken, settings)
    accelerator.wait_for_everyone()
    index = on_main(accelerator, finish_cache, folder, shards, settings, args.max_broken)
    return LatentCache(shards, index["counts"], [number for number, _ in index["broken"]])


class NamedBroken(torch.utils.data.Dataset):
    """data[index] as (index, image, label); a broken image as (index, None, what is wrong)."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, index):
        try:
            return index, *self.data[index]
        except BrokenImage as error:
            return index, None, str(error)


def write_shard(path, rows, broken, settings):
    """rows: pairs of moments (2, 2C, h, w), of an image and its mirror image, and label.

    The bytes are made in memory: the temporary names that safetensors gives do not say whose they
    are, and another run may be filling the same folder.
    """
    checksums = [[zlib.crc32(moments.numpy(), label) for moments in both] for both, label in rows]
    tensors = dict(
        moments=torch.stack([both for both, _ in rows]) if rows else torch.empty(0),
        labels=torch.tensor([label for _, label in rows]),
        checksums=torch.tensor(checksums),
    )
    header = dict(cache=json.dumps(dict(settings=settings, broken=broken)))
    content = safetensors.torch.save(tensors, header)
    dit.write_atomically(path, lambda temporary: temporary.write_bytes(content))


def appeared(path, seconds=60):
    """The path of a file, which another node has written a moment ago, when it can be seen here."""
    end = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.5)
    return path


@functools.cache
def open_shard(path, process):
    """A shard's moments, left in the file, and its labels and checksums; opened once a process."""
    file = safetensors.safe_open(appeared(path), "pt")
    return file.get_slice("moments"), file.get_tensor("labels"), file.get_tensor("checksums")


def shard_header(path):
    """A shard's settings, number of images, and broken images as [index, what is wrong].

    InputError if it is damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["cache"])
            return header["settings"], len(file.get_tensor("labels")), header["broken"]
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): {MEND}") from error


def check_cache(folder, shards, settings):
    """Refuse a folder with a damaged file or a cache of other settings; sweep up after a kill."""
    found = {path: shard_header(path)[0] for path in shards if path.exists()}
    index = folder / "index.json"
    if index.exists():
        found[index] = read_json(index)
    for path, old in found.items():
        if changed := differences(old, settings):
            raise InputError(f"{path} is of another latent cache ({changed}): give another folder")
    remove_leftovers(folder, CACHE_LEFTOVERS)


def finish_cache(folder, shards, settings, max_broken):
    """Write index.json, which says what all the shards hold; returns what it says."""
    _, counts, broken = zip(*[shard_header(appeared(path)) for path in shards], strict=True)
    broken = list(itertools.chain(*broken))
    index = folder / "index.json"
    if len(broken) > max_broken:
        raise InputError(f"{len(broken)} images cannot be read, more than --max-broken "
                         f"{max_broken}: {broken[-1][1]}")
    if not sum(counts):
        raise InputError(f"none of the {len(broken)} images can be read: {broken[0][1]}")
    if broken:
        print(f"latent cache: {len(broken)} broken images are left out, named in {index}")
    content = settings | dict(count=sum(counts), counts=counts, broken=broken)
    write_json(index, content)
    return content


# ------------------------------------------------------------------------------------- checkpoints


def run_folder(args, data):
    """Where the run lives: named after data and network unless it is given a name."""
    named_after = f"{data.name}-{args.model}".replace("/", "-")
    folder = Path(args.results_dir) / (args.run_name or named_after)
    # A name too long for the file system, or a file where a folder should be.
    with writing(folder, InputError), contextlib.suppress(FileNotFoundError):
        folder.stat()
    return folder


def own_checkpoints(folder):
    """A run's checkpoints under the trainer's names: a copy such as 2000 is somebody's own."""
    return step_folders(folder, STEP)


class Checkpoints:
    """Save and resume all that a run remembers, in checkpoints/STEP of its folder:

    model.safetensors, ema.safetensors: the weights and their moving average, each with its config
    optimizer.pt: AdamW's moments, float16's loss scale, the means since the last log line, and how
        many lines the log had
    state.json: a fingerprint of each of these files; it is written last
    """

    def __init__(self, folder, args, accelerator, model, ema, optimizer, means, log):
        self.folder = folder
        self.keep = args.keep_checkpoints
        self.seed = args.global_seed
        self.accelerator = accelerator
        self.model = model
        self.ema = ema
        self.optimizer = optimizer
        self.means = means
        self.log = log

    # What is NOT saved, and why a resumed run is exact all the same: the state of random generators
    # (draw_randomness makes the step's anew from seed and step), the position in the data
    # (GlobalBatches counts it from the step), the learning rate (a function of the step), and the
    # noise of previews (it hangs on their seed alone).

    def save(self, step):
        """Save the state as checkpoints/STEP, whole or not at all, and keep the newest few."""
        # With FSDP each process holds a share: all take part, and the main process gets it all.
        states, options = full_states()
        weights = states.get_model_state_dict(self.model, options=options)
        optimizer = states.get_optimizer_state_dict(self.model, self.optimizer, options=options)
        scaler = self.accelerator.scaler and self.accelerator.scaler.state_dict()
        state = dict(
            optimizer=optimizer, step=step, seed=self.seed, scaler=scaler,
            lines=len(self.log.lines), **self.means.state(),
        )
        on_main(self.accelerator, self.write, step, weights, state)

    def write(self, step, weights, state):
        """Write a checkpoint's files into a hidden folder, and rename that when it is whole."""
        final = self.folder / "checkpoints" / f"{step:07d}"
        new = final.with_name(f".{final.name}.tmp")
        # The weights in a network without memory of its own, to be written as the EMA is.
        with torch.device("meta"):
            network = dit.DiT(**self.ema.config)
        network.load_state_dict(weights, assign=True)
        metadata = self.ema.metadata | dict(step=step)
        try:
            with writing(final):
                save_checkpoint(new / "ema.safetensors", self.ema, **metadata)
                save_checkpoint(new / "model.safetensors", network, **metadata)
                dit.write_atomically(new / "optimizer.pt", lambda path: torch.save(state, path))
                files = {path.name: fingerprint(path) for path in sorted(new.iterdir())}
                write_json(new / "state.json", dict(step=step, fingerprints=files))
                # From here on the checkpoint counts; older ones have done their duty.
                remove_folder(final)
                os.replace(new, final)
                dit.sync_folder(final.parent)
                for old in own_checkpoints(self.folder)[: -self.keep]:
                    remove_folder(old)
        except InputError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise InputError(f"{error}; {self.last_good()}") from error

    def resume(self):
        """Load the newest intact checkpoint, if there is one; returns its step, else 0."""
        step, lines = 0, 0
        if name := on_main(self.accelerator, self.newest_intact):
            folder = self.folder / "checkpoints" / name
            # Mapped, so that the processes of a machine share one copy in memory.
            state = torch.load(
                folder / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)
            step, lines = state["step"], state["lines"]
            states, options = full_states()
            weights = safetensors.torch.load_file(folder / "model.safetensors")
            states.set_model_state_dict(self.model, weights, options=options)
            moments = state["optimizer"]
            states.set_optimizer_state_dict(self.model, self.optimizer, moments, options=options)
            self.ema.load_state_dict(safetensors.torch.load_file(folder / "ema.safetensors"))
            self.means.load(state["window"], state["skipped"], state["overflows"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        # What was logged after the checkpoint will be logged again.
        self.log.lines = on_main(self.accelerator, self.log.cut, step, lines)
        return step

    def newest_intact(self):
        """The name of the newest checkpoint that is as written; newer ones are set aside."""
        # The newest first: what is damaged, with the reason, until one is as it was written.
        damaged, found = {}, None
        for path in reversed(own_checkpoints(self.folder)):
            try:
                files = read_json(path / "state.json")["fingerprints"]
                wrong = [name for name, value in files.items() if fingerprint(path / name) != value]
                reason = ", ".join(wrong)
            except (InputError, OSError, KeyError, AttributeError, TypeError) as error:
                reason = str(error)
            if not reason:
                found = path
                break
            damaged[path] = reason
        # Without any intact one nothing is touched: perhaps the user can restore a file.
        if damaged and found is None:
            where = self.folder / "checkpoints"
            raise InputError(f"no checkpoint in {where} is whole: give another --run-name")
        for path, reason in damaged.items():
            aside = path.with_name(f"damaged-{path.name}")
            log_stderr(f"{path} is damaged ({reason}): set aside, the run resumes from {found}")
            remove_folder(aside)
            os.replace(path, aside)
        return found and found.name

    def last_good(self):
        """Words for an error message: where the last checkpoint is."""
        found = own_checkpoints(self.folder)
        return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint is saved yet"


def full_states():
    """torch's functions for states, and the option that gives the main process all of FSDP's."""
    # Slow to import, and --help needs none of it.
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


# -------------------------------------------------------------------------- log, means, speed


def in_words(line):
    """The numbers of a log line that a person watches."""
    names = ("loss", "grad_norm", "lr", "images_per_second", "val_loss", "fid", "fd",
             "inception_score")
    return "  ".join(f"{name} {line[name]:.4g}" for name in names if line.get(name) is not None)


class Log:
    """metrics.jsonl of a run's folder: one JSON object a line, written by the main process.

    lines: what it holds, as dicts, on every process.
    """

    def __init__(self, folder, accelerator):
        self.folder = folder
        self.path = folder / "metrics.jsonl"
        self.accelerator = accelerator
        self.lines = []

    def append(self, step, **metrics):
        """Add a line, and give its numbers to the tracker; returns the line."""
        line = dict(step=step, **metrics)
        self.lines.append(line)
        on_main(self.accelerator, self.write, json.dumps(line) + "\n")
        # A terminal shows them beside its bar; any other log gets them in a line.
        if not sys.stdout.isatty():
            self.accelerator.print(f"step {step}  {in_words(line)}", flush=True)
        numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        for band, value in enumerate(metrics.get("val_loss_bands", ())):
            numbers[f"val_loss_bands/{band}"] = value
        self.accelerator.log(numbers, step=step)
        return line

    def write(self, line):
        with writing(self.path), open(self.path, "a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def show(self, step, path, name="samples"):
        """Give the tracker the picture of a step."""
        for tracker in self.accelerator.trackers:
            pixels = np.asarray(Image.open(path).convert("RGB"))[None]  # (1, H, W, 3)
            options = dict(dataformats="NHWC") if tracker.name == "tensorboard" else {}
            tracker.log_images({name: pixels}, step, **options)

    def show_curves(self, step):
        """Give the tracker the curves of all that the log holds; they stay in the run's folder."""
        if self.accelerator.trackers:
            plot_run(self.folder)
            self.show(step, self.folder / "curves.png", "curves")

    def best(self, name):
        """The line with the lowest value of a metric, or None."""
        found = [line for line in self.lines if name in line]
        return min(found, key=lambda line: line[name], default=None)

    def cut(self, step, least):
        """Cut off what was logged after a step, and a line that a kill broke off; returns the rest.

        InputError when a line cannot be read, or there are fewer than the checkpoint saw.
        """
        # A kill tears the last line alone, which has no end then: any other damage is refused.
        kept = []
        if not self.path.exists():
            return kept
        for line in self.path.read_text(errors="replace").splitlines(keepends=True):
            try:
                if "\ufffd" in line:
                    raise ValueError("not text")
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.path} is damaged at {line[:40]!r}: mend or remove that "
                                 "line") from error
        # The checkpoint knows how many lines there were.
        if len(kept) < least:
            raise InputError(
                f"{self.path} is damaged: {len(kept)} lines up to step {step} in place of {least}; "
                "restore it, or delete it to resume without them")
        dit.write_atomically(self.path, lambda new: new.write_text("".join(kept)))
        return [json.loads(line) for line in kept]


class RunningMeans:
    """Means since the last log line, over steps, parts of the batch and processes.

    They are sums on the device, so that no step waits for it. A step whose loss or gradient is not
    finite is left out, and counted: as skipped, or as an overflow of float16, whose scaler makes
    the next ones smaller.
    """

    def __init__(self, loss_names, accelerator):
        self.accelerator = accelerator
        self.loss_names = loss_names
        self.names = (*loss_names, "latent_mean", "latent_square", "grad_norm")
        device = accelerator.device
        self.parts = torch.zeros(len(self.names) - 1, device=device)  # of the step in hand
        self.sums = torch.zeros(len(self.names) + 1, device=device)  # the last counts steps
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.overflows = torch.zeros_like(self.skipped)
        self.first_bad = torch.full_like(self.skipped, -1)

    def add(self, losses, x):
        """Add a part of the step's batch: its losses (n,) by name and its latents (n, C, h, w)."""
        values = [losses[name].detach().mean() for name in self.loss_names]
        values += [x.mean(), x.square().mean()]
        self.parts += torch.stack(values) / self.accelerator.gradient_accumulation_steps

    def end_step(self, step, grad_norm):
        """Add the step itself; returns a bool tensor, whether it is finite on every process."""
        one = torch.ones_like(grad_norm)
        values = torch.cat([self.parts, torch.stack([grad_norm, one])])
        self.parts.zero_()
        # A float16 gradient too large is the scaler's business, which skips the update by itself.
        judged = values[:-2] if self.accelerator.scaler is not None else values
        finite = self.accelerator.reduce(judged.isfinite().all().float(), "mean") == 1
        counted = finite & values.isfinite().all()
        self.sums += torch.where(counted, values, 0)
        self.skipped += ~finite
        self.overflows += finite & ~counted
        self.first_bad = torch.where(~finite & (self.first_bad < 0), step, self.first_bad)
        return finite

    def check(self, allowed, sampler, checkpoints):
        """InputError when more steps than allowed have been left out as not finite."""
        skipped, step = int(self.skipped), int(self.first_bad)
        if step >= 0 and skipped > allowed:
            raise InputError(
                f"the loss or its gradient is not finite at step {step + 1}, on the images "
                f"{sampler.indices(step)}; {checkpoints.last_good()}; --skip-nonfinite {skipped} "
                "leaves such steps out"
            )
        self.first_bad.fill_(-1)
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.get_scale() < 1:
            raise InputError(f"float16 is too small for these gradients, whose scale fell to "
                             f"{scaler.get_scale()}: use --mixed-precision bf16; "
                             f"{checkpoints.last_good()}")

    def take(self):
        """The means of the log line, a dict, None where no step was finite; the next ones begin."""
        *sums, steps = self.accelerator.reduce(self.sums, "mean").tolist()
        self.sums.zero_()
        means = {name: total / max(steps, 1) for name, total in zip(self.names, sums, strict=True)}
        variance = means.pop("latent_square") - means["latent_mean"] ** 2
        means["latent_std"] = math.sqrt(max(0, variance))
        if steps == 0:
            means = dict.fromkeys(means)
        if self.accelerator.scaler is not None:
            means["overflowed_steps"] = int(self.overflows)
        return means | dict(skipped_steps=int(self.skipped))

    def state(self):
        """Every process's own sums and the number of steps left out, for a checkpoint."""
        window = self.accelerator.gather(self.sums[None]).cpu()  # (processes, names)
        return dict(
            window=window, skipped=int(self.skipped), overflows=int(self.overflows))

    def load(self, window, skipped, overflows):
        """Each process takes its own sums again; if their number has changed, the mean."""
        same = len(window) == self.accelerator.num_processes
        self.sums.copy_(window[self.accelerator.process_index] if same else window.mean(0))
        self.skipped.fill_(skipped)
        self.overflows.fill_(overflows)


# A device's dense float16 and bfloat16 peak, by how its name begins; TF32 has half of it.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}


class Stopwatch:
    """How fast the steps since the last log line were, without what is done between steps."""

    def __init__(self, args, network, step, accelerator):
        self.accelerator = accelerator
        self.batch = args.global_batch_size
        # Backward costs twice forward, and a multiply-add is two operations.
        self.flops_per_image = 3 * 2 * dit.count_macs(network.config)
        self.restart(step)

    def restart(self, step):
        self.step = step
        self.waited = 0.0
        self.began = time.perf_counter()

    def next(self, batches):
        """The next of the batches; the time that it takes counts as waiting for data."""
        began = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - began
        return batch

    @contextlib.contextmanager
    def paused(self):
        """Saving and previews are no training time."""
        began = time.perf_counter()
        yield
        self.began += time.perf_counter() - began

    def take(self, step):
        """The speed of the log line after a step, a dict; the next measurement begins."""
        steps = step - self.step
        seconds = (time.perf_counter() - self.began) / steps
        waited = self.waited / steps
        flops = self.batch * self.flops_per_image / seconds
        # A GPU's memory is the most that was ever in use, a CPU's what the process holds now.
        device = self.accelerator.device
        cuda = device.type == "cuda"
        held = psutil.Process().memory_info().rss
        used = torch.cuda.max_memory_allocated(device) if cuda else held
        speed = dict(
            images_per_second=self.batch / seconds, step_seconds=seconds, data_seconds=waited,
            compute_seconds=seconds - waited, flops_per_second=flops, memory_gb=used / 1e9,
        )
        # Model flops utilisation (Chowdhery et al., 2022): the share of the devices' peak.
        name = torch.cuda.get_device_name(device) if cuda else ""
        peaks = [peak for prefix, peak in PEAK_FLOPS.items() if name.startswith(prefix)]
        if peaks:
            float32 = self.accelerator.mixed_precision == "no"
            peak = peaks[0] * (0.5 if float32 else 1) * self.accelerator.num_processes
            speed["mfu"] = flops / peak
        self.restart(step)
        return speed


class Previews:
    """Pictures and metrics of the EMA weights while they train, on all processes.

    They use no randomness of the training, so that a run ends the same with and without them.
    plan: what they do, in words.
    """

    def __init__(self, args, ema, vae, trained, data, held, log, accelerator):
        self.args = args
        self.ema = ema
        self.vae = vae
        self.trained = trained  # the process that the network is trained for
        self.data = data
        self.held = held
        self.log = log
        self.accelerator = accelerator
        # Pictures are guided, which shows the classes best; metrics only where weights suggest it.
        quick = quick_sampling(args)
        self.diffusion, self.sampling = sampling_settings(quick, ema, cfg_scale=PREVIEW_SCALE)
        _, self.scored = sampling_settings(quick, ema, cfg_scale=1.0)
        self.reference = None
        self.held_out = None  # the Features of held
        self.features = None
        self.plan = "no scores"
        self.size_scores()
        if args.eval_every:
            self.prepare_scores()

    def size_scores(self):
        """Unless flags say it, how many images to score: what costs no more than the training.

        Both are counted in the network's evaluations of an image, of which a training step has
        three (backward is two), and are compared from one evaluation to the next.
        """
        args = self.args
        if args.eval_samples is not None or not args.eval_every:
            return
        total = min(args.eval_every, count_steps(args, len(self.data)))
        guided = 1 if self.scored["cfg_scale"] == 1 else 2
        each = guided * len(self.diffusion.noise_levels(self.scored["sampler"]))
        affordable = int(3 * args.global_batch_size * total / each)
        most = EVAL_SAMPLES.recipes[recipe(args)].most
        args.eval_samples = min(most, affordable, len(self.data))
        if args.eval_samples < 2:
            args.eval_samples = args.eval_every = 0
            self.plan = "no scores: they would cost more than the training; --eval-samples N scores"

    def prepare_scores(self):
        """Choose the feature network, the reference's images, and the metrics that they allow."""
        args, count = self.args, self.args.eval_samples
        if args.features is None:
            args.features = self.choose_features()
        self.features = load_features(args.features, self.accelerator.device)

        # Of large data sets those alone that do not keep every feature of the reference.
        asked = None
        if len(self.compared) > 50_000:
            asked = ("fid", "fdr", "is") if self.held else ("fid", "is")
        self.metrics = choose_metrics(
            asked, self.features, self.compared, count, model_classes(self.ema), self.held)
        self.plan = (
            f"scores every {args.eval_every} steps: {count} samples, {self.diffusion.num_timesteps}"
            f" steps of {self.scored['sampler']} each, guidance {self.scored['cfg_scale']}, "
            f"against {len(self.compared)} images, by {args.features}")

    def choose_features(self):
        """Inception, as in the literature, unless images are small or it is not to be had."""
        if self.args.image_size < 64:
            return "efficientnet-lite0"
        try:
            on_main(self.accelerator, Inception.download)
        except InputError:
            note("Inception is not here and cannot be downloaded: scores are distances in "
                 "EfficientNet-Lite0's features, fd in place of fid")
            return "efficientnet-lite0"
        return "inception"

    def leave_out(self, broken):
        """Images that the latent cache could not read are left out here and, later, elsewhere."""
        if not broken:
            return
        self.ema.metadata["left_out"] = broken
        self.data = self.data.without(broken)
        if self.held and self.held.split == self.data.split:  # a share of the same images
            self.held = self.held.without(broken)

    @property
    def compared(self):
        """The images to compare with: all, but a laptop's so many as take it about a minute."""
        few = recipe(self.args) == "laptop" and self.args.eval_samples
        return self.data.spread(10 * self.args.eval_samples) if few else self.data

    def picture(self, step):
        return self.log.folder / "samples" / f"{step:07d}.png"

    def draw(self, step):
        """Write samples/STEP.png, from the same noise at every step."""
        count = len(default_labels(self.ema, 4)[0])
        batches = math.ceil(count / self.accelerator.num_processes / 32)
        steps = batches * self.diffusion.num_timesteps
        with ProgressBar(self.accelerator, "preview", steps) as progress:
            images, nrow, captions = class_grid(
                self.ema, self.diffusion, self.vae, 4, self.args.global_seed, self.accelerator,
                batch_size=32, on_step=lambda *_: progress.advance(), **self.sampling)
        on_main(self.accelerator, save_grid, images, self.picture(step), nrow, captions)
        on_main(self.accelerator, self.log.show, step, self.picture(step))

    def evaluate(self, step):
        """Log metrics; the weights with the run's lowest FID, or FD, are kept: best.safetensors."""
        try:
            metrics = self.score()
        except SystemExit:  # by a signal
            self.accelerator.print("to score alone:", evaluate_command(self.args, self.log))
            raise
        # The best weights are written before the log says so: a kill between the two costs nothing.
        on_main(self.accelerator, self.keep_best, step, metrics)
        self.log.append(step, **metrics)
        on_main(self.accelerator, self.log.show_curves, step)

    def keep_best(self, step, metrics):
        name = self.features.distance.lower()
        best = self.log.best(name)
        if name in metrics and (best is None or metrics[name] < best[name]):
            metadata = self.ema.metadata | {"step": step, name: metrics[name]}
            save_checkpoint(self.log.folder / "best.safetensors", self.ema, **metadata)

    def score(self):
        # The data's own features are computed once, at the first evaluation.
        reading = dict(num_workers=self.args.num_workers, progress=True, cache=True)
        if self.reference is None:
            self.reference = reference_features(
                self.compared, self.features, self.accelerator, self.metrics, **reading)
            if self.held:  # as many as the samples that they are compared with
                held = self.held.spread(self.args.eval_samples)
                self.held_out = reference_features(
                    held, self.features, self.accelerator, ("kid",), **reading)
        return evaluate_model(
            self.ema, self.diffusion, self.vae, self.reference, self.features,
            self.args.eval_samples, self.accelerator, metrics=self.metrics, held=self.held_out,
            seed=self.args.global_seed, progress=True, **self.scored)

    def make(self, step, due):
        """Do what is due of sample, val and eval: see what_is_due."""
        if "sample" in due:
            self.draw(step)
        if "val" in due and self.held:
            self.log.append(step, **validation_loss(
                self.args, self.held, self.ema, self.vae, self.trained, self.accelerator))
        if "eval" in due:
            self.evaluate(step)

    def catch_up(self, step, last):
        """Do what was due at the step that a run resumes from, and that its end prevented."""
        due = what_is_due(self.args, step, last)
        if on_main(self.accelerator, self.picture(step).exists):
            due -= {"sample"}
        for name, key in dict(val="val_loss", eval="features").items():
            if any(line["step"] == step and key in line for line in self.log.lines):
                due -= {name}
        self.make(step, due)


def print_end(args, log, accelerator):
    """Where the run is, its metrics, and what to type next."""
    # The last lines of a validation and of an evaluation, which have these keys.
    last = lambda key: next((line for line in reversed(log.lines) if key in line), {})
    table = last("val_loss") | last("features")
    if table and accelerator.is_main_process:
        print_metrics(table, log.folder.name)
        for name in ("fid", "fd"):
            if best := log.best(name):
                where = log.folder / "best.safetensors"
                print(f"best {name} {best[name]:.4f} at step {best['step']}: {where}")
    accelerator.print(
        f"run: {log.folder}\nsample: python sample_grid.py --ckpt {shlex.quote(str(log.folder))}\n"
        f"evaluate: {evaluate_command(args, log)}")


def evaluate_command(args, log):
    """What to type to score a run; its weights say which data, columns and split they learned."""
    words = ["accelerate", "launch", "evaluate.py", "--ckpt", str(log.folder)]
    if args.features:
        words += ["--features", args.features]
    return shlex.join(words)


# ----------------------------------------------------------------------------------------- signals


class StopSignals:
    """SIGTERM and SIGINT end the run after the step in hand, saved, with exit status 128 + n.

    saved: True while everything done so far is on disk (while caching, sampling, evaluating); then
    they end the run at once. So does a second signal, a second or more after the first (launchers
    repeat it at once), and the end of the launcher is one, too.
    """

    def __init__(self, folder, accelerator):
        self.folder = folder
        self.accelerator = accelerator
        self.number = 0
        self.since = math.inf
        self.saved = True
        # Only a launcher's end is the run's: a shell may well end before what it began.
        launched = os.environ.keys() & {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"}
        self.parent = os.getppid() if launched else None
        # Processes ask each other through the CPU's memory, which need not wait for a GPU's queue.
        several = accelerator.num_processes > 1
        self.group = torch.distributed.new_group(backend="gloo") if several else None

    def __enter__(self):
        numbers = signal.SIGTERM, signal.SIGINT
        self.previous = {number: signal.signal(number, self.handle) for number in numbers}

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        again = time.monotonic() > self.since + 1
        self.since = min(self.since, time.monotonic())
        self.number = number
        if self.saved or again:
            self.exit()

    def agreed(self):
        """Whether a signal has reached any of the processes: the same answer on all of them."""
        if self.parent not in (None, os.getppid()):
            self.number = self.number or signal.SIGTERM
        if self.group is not None:
            number = torch.tensor(self.number)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
            self.number = int(number)
        return self.number > 0

    def exit(self):
        name = signal.Signals(self.number).name
        self.accelerator.print(f"stopped by {name}: the same command resumes from what is saved in "
                               f"{self.folder}")
        raise SystemExit(128 + self.number)


# ---------------------------------------------------------- machinery: skip it on a first reading

# The names of checkpoints, and of what a killed process leaves in the folders that it made: nothing
# else there is ever removed. Folders end in a slash; `pid` is who wrote in a shared folder.
STEP = r"\d{7,}"  # the name of a checkpoint's folder
PARTIAL = r"\.\d{1,9}\.tmp\.\w+"
RUN_LEFTOVERS = rf"\.(config\.json|metrics\.jsonl|best\.safetensors){PARTIAL}|\.tmp[0-9A-Za-z]{{6}}"
SAMPLE_LEFTOVERS = rf"\.{STEP}\.png{PARTIAL}"
CHECKPOINT_LEFTOVERS = rf"\.{STEP}\.tmp/|\.(damaged-)?{STEP}\.old\.tmp/"
CACHE_LEFTOVERS = r"\.(moments-\d{5}\.safetensors|index\.json)\.(?P<pid>\d{1,9})\.tmp\.\w+"


def remove_leftovers(folder, pattern):
    """Remove what a killed process left in a folder: whatever has such a name as a whole."""
    for path in folder.iterdir() if folder.is_dir() else ():
        found = re.fullmatch(pattern, path.name + "/" * path.is_dir())
        if found is None:
            continue
        # In a folder that runs share, a living process may still be writing its file.
        pid = found.groupdict().get("pid")
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif pid is None or not psutil.pid_exists(int(pid)):
            path.unlink(missing_ok=True)


def remove_folder(folder):
    """Remove a folder so that no half of it is ever seen under its name."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        if hidden.is_symlink():  # to what was moved away, which stays
            hidden.unlink()
        else:
            shutil.rmtree(hidden)


def differences(old, new):
    """Words for what differs: of each name in `new`, what it was and what it is."""
    changed = [name for name in new if old.get(name) != new[name]]
    return ", ".join(f"{name} was {shown(old.get(name))}, now {shown(new[name])}"
                     for name in changed)


def shown(value):
    """A setting in a message: of a fingerprint the first digits say enough."""
    is_fingerprint = isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)
    return f"content {value[:8]}" if is_fingerprint else repr(value)


@contextlib.contextmanager
def open_run(folder, settings, accelerator):
    """The run's folder, locked against other processes while this is entered, and its tracker."""
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        on_main(accelerator, claim, lock, folder, settings)
        if settings["tracker"] != "none":
            start_tracker(folder, settings, accelerator)
        yield
        # Not after an error of this process alone: the end of the group waits for the others.
        accelerator.end_training()
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RankLocalError(REMEDIES) from error
    finally:
        lock.release()


def out_of_memory(error):
    """Whether an error says that the device's memory is full, in whichever of their words."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def start_tracker(folder, settings, accelerator):
    """Begin to log to settings["tracker"], or continue there; InputError when it refuses.

    settings["tracker_run"] becomes the name by which W&B knows the run.
    """
    accelerator.project_configuration.logging_dir = str(folder)
    shown = {name: str(value) for name, value in settings.items()}
    # A resumed run is the same run there, without the points after its checkpoint.
    saved = own_checkpoints(folder)
    begun = read_json(folder / "config.json") if saved else {}
    settings["tracker_run"] = begun.get("tracker_run") or secrets.token_hex(8)
    options = dict(
        tensorboard=dict(purge_step=int(saved[-1].name) + 1 if saved else None),
        wandb=dict(id=settings["tracker_run"], resume="allow"))
    try:
        accelerator.init_trackers(folder.name, shown, options)
    except Exception as error:  # of whatever kind the tracker's library raises
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--tracker {settings['tracker']}: {reason[0]}") from error


def claim(lock, folder, settings):
    """Lock a run's folder, compare its settings with these, and sweep up after a kill."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / ".lock"):
        (folder / ".lock").touch()
        # A dead process holds no lock: filelock closes the file in the workers that it forked.
        try:
            with dit.where_supported(f"{folder} is on a file system without locks: let only one "
                                     "process train in it"):
                lock.acquire()
        except Timeout as error:
            reason = f"another process trains in {folder}: give this run another --run-name"
            raise InputError(reason) from error
    if (folder / "config.json").exists() and own_checkpoints(folder):
        check_settings(folder, json.loads(json.dumps(settings)))
    remove_leftovers(folder, RUN_LEFTOVERS)
    remove_leftovers(folder / "samples", SAMPLE_LEFTOVERS)
    remove_leftovers(folder / "checkpoints", CHECKPOINT_LEFTOVERS)


def check_settings(folder, new):
    """InputError unless a run that has begun can be resumed with these settings."""
    old = read_json(folder / "config.json")
    rules = {flag.dest: "free" for flag in SAMPLING_FLAGS} | {row.dest: row.resume for row in ROWS}
    # TF32 and compilation are the two sampling flags that training feels, too; data and VAE are
    # known by what they hold.
    rules |= dict.fromkeys(("image_column", "label_column", "split", "num_processes"), "free")
    rules |= dict(tf32="asked", compile="asked", vae_weights="fixed", channels="fixed")
    asked = {name: value for name, value in new.items() if rules.get(name, "asked") != "free"}
    fixed = {name: value for name, value in asked.items() if rules.get(name) == "fixed"}
    begun = f"{folder} was begun with other settings"
    if changed := differences(old, fixed):
        raise InputError(f"{begun} ({changed}): give another --run-name")
    if (changed := differences(old, asked)) and not new["allow_changes"]:
        raise InputError(f"{begun} ({changed}): --allow-changes resumes with the new ones")
    if changed := differences(old, dict(num_processes=new["num_processes"])):
        print(f"{changed}: results agree with those of an unchanged run up to rounding")


def on_main(accelerator, work, *args):
    """Do work(*args) on the main process; all processes get its result, or raise its InputError."""
    outcome = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work(*args)
        except InputError as error:
            outcome[1] = str(error)
    result, message = broadcast_object_list(outcome)
    if message:
        raise InputError(message)
    return result


if __name__ == "__main__":
    dit.run_command(main, parse_args())
