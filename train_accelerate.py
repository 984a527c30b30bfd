"""Train a DiT: data -> latents -> noise -> loss -> weights, on one CPU or many GPUs. Read evaluate.py first.

    accelerate launch train_accelerate.py                            digits, a tiny DiT, two CPU cores, two minutes
    accelerate launch train_accelerate.py --data-path FOLDER --model DiT-B/4   your pictures, in class folders
    accelerate launch --config_file docs/accelerate/eight_gpus.yaml train_accelerate.py \\
        --data-path ILSVRC/imagenet-1k --latent-cache latents --compile        the paper's DiT-XL/2, on eight GPUs
    torchrun --nproc_per_node 2 train_accelerate.py                            two processes on a CPU

One step, with images x, labels y, the process of gaussian_diffusion.py and the network eps_theta of dit.py:

    t ~ uniform steps, eps ~ normal        both functions of (seed, step, index in the global batch)
    x_t  = q_sample(latents(x), t, eps)
    loss = mean |eps - eps_theta(x_t, t, y)|^2 + L_vb
    AdamW step;  ema = decay * ema + (1 - decay) * weights

The same command again goes on where the run stopped, and ends as if it had never stopped: nothing is drawn from hidden
state. A run's folder must be one that all processes see.
"""

import argparse
import bisect
import contextlib
import copy
import fcntl
import functools
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import zlib
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import dit
from dit import (
    InputError,
    RankLocalError,
    build_dit,
    fingerprint,
    load_checkpoint,
    read_json,
    run_command,
    save_checkpoint,
    write_atomically,
    write_json,
)
from evaluate import (
    BrokenImage,
    add_data_args,
    evaluate_model,
    load_data,
    load_features,
    print_figures,
    reference_set,
)
from gaussian_diffusion import create_diffusion
from sample_grid import (
    Autoencoder,
    ProgressBar,
    add_sampling_args,
    class_grid,
    make_accelerator,
    sampling_settings,
    save_grid,
)

PAPER = dict(
    model="DiT-XL/2", image_size=256, vae="ema", class_dropout_prob=0.1, global_batch_size=256, lr=1e-4, warmup_steps=0,
    grad_clip=0.0, ema_decay=0.9999, mirror=True, epochs=1400, max_steps=None, num_workers=4, log_every=100,
    ckpt_every=50_000, sample_every=50_000, eval_every=50_000, eval_samples=10_000, features="inception",
    sampling=dict(num_sampling_steps=250),
)
DIGITS = dict(
    model="DiT-Ti/2", image_size=8, vae="none", class_dropout_prob=0.1, global_batch_size=128, lr=4e-3,
    warmup_steps=100, grad_clip=1.0, ema_decay=0.995, mirror=False, epochs=None, max_steps=1000, num_workers=0,
    log_every=50, ckpt_every=500, sample_every=500, eval_every=1000, eval_samples=500, features="efficientnet-lite0",
    sampling=dict(num_sampling_steps=50, cfg_scale=1.5),
)
# What may change when a run goes on: never FIXED, which gives the weights their shapes; always FREE; else if told to.
FIXED = {"model", "image_size", "vae", "num_classes", "class_dropout_prob"}
FREE = {
    "results_dir", "run_name", "epochs", "max_steps", "num_workers", "num_processes", "log_every", "ckpt_every",
    "keep_checkpoints", "sample_every", "eval_every", "eval_samples", "features", "tracker", "skip_nonfinite",
    "max_broken", "allow_changes", "sampling", "sampler", "num_sampling_steps", "eta", "cfg_scale", "cfg_channels",
    "guidance_interval", "dtype",
}
BOUNDS = {  # the smallest and the largest value that make sense
    (1, math.inf): ("image_size", "num_classes", "global_batch_size", "epochs", "max_steps",
                    "gradient_accumulation_steps", "log_every", "ckpt_every", "keep_checkpoints"),
    (0, math.inf): ("lr", "warmup_steps", "grad_clip", "num_workers", "sample_every", "eval_every", "eval_samples",
                    "skip_nonfinite", "max_broken"),
    (0, 1): ("class_dropout_prob", "ema_decay"),
}
PEAK_FLOPS = {  # a device's dense float16 and bfloat16 peak, by how its name begins; TF32 has half of it
    "NVIDIA A100": 312e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}

# ------------------------------------------------------------------------------------------------ randomness


def seeded(device, *key):
    """A generator whose numbers depend on the key alone: the same in every process, run and Python version."""
    digest = bytes.fromhex(fingerprint(key))
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class GlobalBatches(torch.utils.data.Sampler):
    """This process's micro-batches of the steps from start to stop, each a list of (index, mirror).

    The data are an endless stream, epoch after epoch, each in the order of a permutation that (seed, epoch) gives; step
    s takes the stream's s-th global batch. It is cut into parts, processes x accumulation of them; process r of P takes
    the parts r, P + r, 2P + r, ... one after the other: `mine`.
    """

    def __init__(self, args, size, start, stop, accelerator):
        self.size, self.start, self.stop, self.seed, self.mirror = size, start, stop, args.global_seed, args.mirror
        self.batch, rank, processes = args.global_batch_size, accelerator.process_index, accelerator.num_processes
        self.mine = range(rank, processes * accelerator.gradient_accumulation_steps, processes)
        self.part_size = self.batch // (processes * len(self.mine))
        self.epoch, self.order = None, None

    def part(self, number):
        """Where a part lies in its global batch."""
        return slice(number * self.part_size, (number + 1) * self.part_size)

    def indices(self, step):
        """The data's indices in the global batch of a step."""
        indices = []
        for position in range(step * self.batch, (step + 1) * self.batch):
            epoch, place = divmod(position, self.size)
            if epoch != self.epoch:
                self.epoch = epoch
                self.order = torch.randperm(self.size, generator=seeded("cpu", self.seed, "order", epoch))
            indices.append(int(self.order[place]))
        return indices

    def __iter__(self):
        for step in range(self.start, self.stop):
            flips = torch.rand(self.batch, generator=seeded("cpu", self.seed, "mirror", step)) < 0.5
            examples = list(zip(self.indices(step), (flips & self.mirror).tolist(), strict=True))
            yield from (examples[self.part(number)] for number in self.mine)


def draw_randomness(args, step, num_timesteps, latent_shape, device):
    """Timesteps (B,), label drops (B,), noise and VAE noise (B, C, h, w) of a step's global batch, on every process.

    They are functions of (seed, step, index in the batch) and of the kind of device: a GPU's differ from a CPU's.
    """
    g, batch = seeded(device, args.global_seed, "noise", step), args.global_batch_size
    t = torch.randint(num_timesteps, (batch,), generator=g, device=device)
    drop = torch.rand(batch, generator=g, device=device) < args.class_dropout_prob
    noise, vae_noise = (torch.randn(batch, *latent_shape, generator=g, device=device) for _ in range(2))
    return t, drop, noise, vae_noise


# ------------------------------------------------------------------------------------------------ processes and signals


def on_main(accelerator, work, *args):
    """Do work(*args) on the main process alone; every process gets its result, or raises its InputError."""
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


class StopSignals:
    """SIGTERM and SIGINT end the run after the step in hand, with its state saved and exit status 128 + n.

    While `saved` says that there is nothing to lose (caching, sampling, evaluating) they end it at once.
    """

    def __init__(self, accelerator, folder):
        self.accelerator, self.folder, self.number, self.saved = accelerator, folder, 0, True
        # Processes ask each other through the CPU's memory, which does not wait for a GPU's queue of work.
        self.group = torch.distributed.new_group(backend="gloo") if accelerator.num_processes > 1 else None

    def __enter__(self):
        self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def handle(self, number, frame):
        self.number = number
        if self.saved:
            self.exit()

    def agreed(self):
        """Whether a signal has reached any of the processes: the same answer on all of them."""
        if self.group is not None:
            number = torch.tensor(self.number)
            torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, self.group)
            self.number = int(number)
        return self.number > 0

    def exit(self):
        name = signal.Signals(self.number).name
        self.accelerator.print(f"stopped by {name}: the same command goes on from what is saved in {self.folder}")
        raise SystemExit(128 + self.number)


def ignore_signals(worker):
    """Workers leave signals to their process, which still needs them for the step in hand."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ------------------------------------------------------------------------------------------------ files


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error


def remove_folder(folder):
    """Remove a folder so that no half of it is ever seen under its name."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old.tmp")
        shutil.rmtree(hidden, ignore_errors=True)
        os.replace(folder, hidden)
        shutil.rmtree(hidden)


def remove_leftovers(folder):
    """Remove the temporary files and folders of a process that was killed while it wrote."""
    for path in [*folder.rglob(".*.tmp*"), *folder.rglob(".tmp*")]:  # ours, and what safetensors names so
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def differences(old, new):
    return ", ".join(f"{name} was {old.get(name)!r}, now {new[name]!r}" for name in new if old.get(name) != new[name])


# ------------------------------------------------------------------------------------------------ data


def read_batches(data, sampler, workers, **options):
    """The sampler's micro-batches of data, loaded ahead by workers, which end when this generator is closed."""
    batches = iter(torch.utils.data.DataLoader(
        data, batch_sampler=sampler, num_workers=workers, worker_init_fn=ignore_signals, **options
    ))
    try:
        yield from batches
    finally:
        if workers:
            batches._shutdown_workers()  # they ignore the signal by which Python would end them, and wait for them


class LatentCache(torch.utils.data.Dataset):
    """The VAE's moments of a data set, kept on disk: `cache[index, mirror]` -> (moments (2C, h, w) float16, label).

    Shards of SHARD images each, in the data set's order without its broken images, hold moments (n, 2, 2C, h, w) of
    every image and its mirror image, labels (n,), and checksums (n, 2) of both, which each read verifies. The moments
    stay in the files: memory does not grow with the data.
    """

    SHARD = 2048

    def __init__(self, shards, counts):
        self.shards, self.starts = shards, [0, *itertools.accumulate(counts)]

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, key):
        index, mirror = key
        shard = bisect.bisect_right(self.starts, index) - 1
        row = index - self.starts[shard]
        moments, labels, checksums = open_shard(self.shards[shard], os.getpid())
        moments, label = moments[row, int(mirror)], int(labels[row])
        if zlib.crc32(moments.numpy(), label) != checksums[row, int(mirror)]:
            raise RankLocalError(f"{self.shards[shard]} is damaged: delete it, and the same command makes it anew")
        return moments, label


@functools.cache
def open_shard(path, process):
    """A shard's moments, left in the file, and its labels and checksums; every process opens the file for itself."""
    file = safe_open(path, "pt")
    return file.get_slice("moments"), file.get_tensor("labels"), file.get_tensor("checksums")


def shard_header(path):
    """A shard's settings, number of images, and broken images as [index, what is wrong]; InputError if damaged."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["cache"])
            return header["settings"], len(file.get_tensor("labels")), header["broken"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}): delete it, and the same command makes it anew") from error


def write_shard(path, rows, broken, settings):
    """rows: pairs of moments (2, 2C, h, w), of an image and its mirror image, and label."""
    checksums = [[zlib.crc32(moments.numpy(), label) for moments in both] for both, label in rows]
    tensors = dict(
        moments=torch.stack([both for both, _ in rows]) if rows else torch.empty(0),
        labels=torch.tensor([label for _, label in rows]), checksums=torch.tensor(checksums),
    )
    header = dict(cache=json.dumps(dict(settings=settings, broken=broken)))
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))


class NamedBroken(torch.utils.data.Dataset):
    """data[index] as (index, image, label); a broken image as (index, None, what is wrong)."""

    def __init__(self, data):
        self.data = data

    def __getitem__(self, index):
        try:
            return index, *self.data[index]
        except BrokenImage as error:
            return index, None, str(error)


def check_cache(folder, shards, settings):
    """Refuse a folder with a damaged file or the cache of other settings; remove what a kill has left half-written."""
    found = {path: shard_header(path)[0] for path in shards if path.exists()}
    if (index := folder / "index.json").exists():
        found[index] = read_json(index)
    for path, old in found.items():
        if changed := differences(old, settings):
            raise InputError(f"{path} is of another latent cache ({changed}): give another folder")
    make_folder(folder)
    remove_leftovers(folder)


def finish_cache(folder, shards, settings, max_broken):
    """Write index.json, which says what all the shards hold; returns their numbers of images."""
    _, counts, broken = zip(*map(shard_header, shards), strict=True)
    broken = list(itertools.chain(*broken))
    if len(broken) > max_broken:
        raise InputError(f"{len(broken)} images cannot be read, more than --max-broken {max_broken}: {broken[-1][1]}")
    if broken:
        print(f"latent cache: {len(broken)} broken images are left out, named in {folder / 'index.json'}")
    index = settings | dict(count=sum(counts), counts=counts, broken=broken)
    write_json(folder / "index.json", index)
    return counts


def latent_cache(args, data, vae, accelerator):
    """The data set's LatentCache in the folder of --latent-cache; all processes make the shards that it lacks.

    Raises InputError if the folder's cache is of other data, another VAE or another crop, if a file in it is damaged,
    and if more images than --max-broken cannot be read.
    """
    folder, size = Path(args.latent_cache), LatentCache.SHARD
    settings = dict(
        data=data.name, images=len(data), labels=fingerprint(torch.tensor(list(data.labels))),
        image_size=args.image_size, vae=vae.name, vae_weights=fingerprint(vae.vae.state_dict()), shard_images=size,
    )
    shards = [folder / f"moments-{s:05d}.safetensors" for s in range(math.ceil(len(data) / size))]
    on_main(accelerator, check_cache, folder, shards, settings)
    mine = range(accelerator.process_index, len(shards), accelerator.num_processes)
    missing = [s for s in mine if not shards[s].exists()]
    batches = {s: torch.arange(s * size, min(len(data), (s + 1) * size)).split(32) for s in missing}
    plan = [batch.tolist() for s in missing for batch in batches[s]]
    loader = contextlib.closing(read_batches(NamedBroken(data), plan, args.num_workers, collate_fn=list))
    with ProgressBar(accelerator, "latents", sum(map(len, plan))) as progress, loader as loaded:
        for s in missing:
            rows, broken = [], []
            for examples in itertools.islice(loaded, len(batches[s])):
                broken += [[index, label] for index, image, label in examples if image is None]
                good = [(image, label) for _, image, label in examples if image is not None]
                if good:
                    x = torch.stack([image for image, _ in good]).to(accelerator.device)
                    both = torch.stack([vae.encode(x), vae.encode(x.flip(3))], dim=1)  # (N, 2, 2C, h, w)
                    rows += zip(both.half().cpu().contiguous(), [label for _, label in good], strict=True)
                progress.advance(len(examples))
            write_shard(shards[s], rows, broken, settings)
    accelerator.wait_for_everyone()
    return LatentCache(shards, on_main(accelerator, finish_cache, folder, shards, settings, args.max_broken))


# ------------------------------------------------------------------------------------------------ the run's folder


def whole_states():
    """torch's functions for the state of a model and its optimiser, and the option that makes it whole.

    The main process has all of it then, also where FSDP has spread it over the processes.
    """
    from torch.distributed.checkpoint import (
        state_dict,  # slow to import, and --help needs none of it
    )

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


class Run:
    """A run's folder: settings, log and checkpoints, all written by the main process; entering it locks it."""

    def __init__(self, args, data, accelerator):
        self.name = args.run_name or f"{data.name}-{args.model}".replace("/", "-")
        self.folder, self.args, self.accelerator, self.lines = Path(args.results_dir) / self.name, args, accelerator, []
        self.settings = vars(args) | dict(images=len(data), num_processes=accelerator.num_processes)
        self.stop = StopSignals(accelerator, self.folder)

    def checkpoints(self):
        return sorted((self.folder / "checkpoints").glob("[0-9]*"))

    def __enter__(self):
        on_main(self.accelerator, self.open)
        self.stop.__enter__()
        if self.args.tracker != "none":
            self.accelerator.project_configuration.logging_dir = str(self.folder)
            self.accelerator.init_trackers(self.name, {name: str(value) for name, value in self.settings.items()})
        return self

    def __exit__(self, *exception):
        self.accelerator.end_training()
        self.stop.__exit__()
        if self.accelerator.is_main_process:
            self.lock.close()

    def open(self):
        """Lock the folder and compare the settings with those that the run was begun with."""
        make_folder(self.folder)
        try:
            self.lock = open(self.folder / ".lock", "w")  # noqa: SIM115 - the lock ends with the process
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which the workers do not inherit, unlike flock's
        except (BlockingIOError, PermissionError) as error:
            raise InputError(f"another process trains in {self.folder}: give this run another --run-name") from error
        except OSError as error:
            raise InputError(f"cannot write {self.folder / '.lock'}: {error.strerror}") from error
        config, new = self.folder / "config.json", json.loads(json.dumps(self.settings))
        if config.exists() and self.checkpoints():
            old = read_json(config)
            if fixed := differences(old, {name: new[name] for name in FIXED}):
                raise InputError(f"{self.folder} was begun with other settings ({fixed}): give another --run-name")
            changed = differences(old, {name: value for name, value in new.items() if name not in FREE})
            if changed and not self.args.allow_changes:
                raise InputError(f"{self.folder} was begun with other settings ({changed}): --allow-changes goes on so")
            if processes := differences(old, {"num_processes": new["num_processes"]}):
                print(f"{processes}: results agree with those of an unchanged run up to rounding")
        remove_leftovers(self.folder)

    def write_settings(self):
        write_json(self.folder / "config.json", self.settings)

    def log(self, step, **figures):
        """Append a line to metrics.jsonl and give its numbers to the tracker."""
        self.lines.append(dict(step=step, **figures))
        on_main(self.accelerator, self.append, json.dumps(self.lines[-1]) + "\n")
        self.accelerator.log({k: v for k, v in figures.items() if isinstance(v, int | float)}, step=step)

    def append(self, line):
        try:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self.folder / 'metrics.jsonl'}: {error.strerror}") from error

    def cut_log(self, step, least):
        """Cut from metrics.jsonl what was logged after a step, and a line that a kill broke off; returns the rest.

        InputError when a line cannot be read, or there are fewer than the checkpoint saw.
        """
        path, lines = self.folder / "metrics.jsonl", []
        if not path.exists():
            return lines
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            try:
                if "\ufffd" in line:
                    raise ValueError("not text")
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    lines.append(line)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged at {line[:40]!r}: mend or remove that line") from error
        if len(lines) < least:
            raise InputError(f"{path} is damaged: {len(lines)} lines up to step {step} in place of {least}; "
                             "restore it, or delete it to go on without them")
        write_atomically(path, lambda new: new.write_text("".join(lines)))
        return [json.loads(line) for line in lines]

    def best(self, name):
        """The log's line with the lowest figure of a name, or None."""
        return min((line for line in self.lines if name in line), key=lambda line: line[name], default=None)

    def resume(self, model, ema, optimizer, window):
        """Load this run's newest whole checkpoint into them, which `save` saves; returns its step, 0 without one."""
        self.model, self.ema, self.optimizer, self.window = model, ema, optimizer, window
        step, least, name = 0, 0, on_main(self.accelerator, self.newest_whole)
        if name:
            folder = self.folder / "checkpoints" / name
            state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            step, least = state["step"], state["lines"]
            states, options = whole_states()
            states.set_model_state_dict(model, load_file(folder / "model.safetensors"), options=options)
            states.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
            ema.load_state_dict(load_file(folder / "ema.safetensors"))
            window.load(state["window"], state["skipped"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        self.lines = on_main(self.accelerator, self.cut_log, step, least)
        on_main(self.accelerator, self.write_settings)  # once all that is there has been found whole
        return step

    def newest_whole(self):
        """The name of the newest checkpoint whose files are as they were written; damaged newer ones are set aside."""
        damaged = {}
        for path in reversed(self.checkpoints()):
            try:
                files = read_json(path / "state.json")["fingerprints"]
                damaged[path] = ", ".join(name for name, value in files.items() if fingerprint(path / name) != value)
            except (InputError, OSError, KeyError, AttributeError, TypeError) as error:
                damaged[path] = str(error)
            if not damaged[path]:
                break
        else:
            if damaged:
                raise InputError(f"no checkpoint in {self.folder / 'checkpoints'} is whole: give another --run-name")
            return None
        del damaged[path]
        for bad, reason in damaged.items():
            print(f"{bad} is damaged ({reason}): set aside, the run goes on from {path}", file=sys.stderr)
            remove_folder(bad.with_name(f"damaged-{bad.name}"))
            os.replace(bad, bad.with_name(f"damaged-{bad.name}"))
        return path.name

    def save(self, step):
        """Save the full state as checkpoints/STEP, whole or not at all, and keep the last --keep-checkpoints."""
        states, options = whole_states()
        weights = states.get_model_state_dict(self.model, options=options)
        optimizer = states.get_optimizer_state_dict(self.model, self.optimizer, options=options)
        scaler = self.accelerator.scaler and self.accelerator.scaler.state_dict()
        state = dict(optimizer=optimizer, step=step, seed=self.args.global_seed, scaler=scaler, lines=len(self.lines),
                     **self.window.state())
        on_main(self.accelerator, self.write, step, weights, state)
        self.stop.saved = True

    def write(self, step, weights, state):
        final = self.folder / "checkpoints" / f"{step:07d}"
        new = final.with_name(f".{final.name}.tmp")
        try:
            save_checkpoint(new / "ema.safetensors", self.ema, step=step, **self.ema.metadata)
            write_atomically(new / "model.safetensors", lambda path: save_file(weights, path))
            write_atomically(new / "optimizer.pt", lambda path: torch.save(state, path))
            files = {path.name: fingerprint(path) for path in sorted(new.iterdir())}
            write_json(new / "state.json", dict(step=step, fingerprints=files))
            remove_folder(final)
            os.replace(new, final)
            dit.sync_folder(final.parent)
            for old in self.checkpoints()[: -self.args.keep_checkpoints]:
                remove_folder(old)
        except (InputError, OSError) as error:
            shutil.rmtree(new, ignore_errors=True)
            reason = error if isinstance(error, InputError) else f"cannot write {final}: {error.strerror}"
            raise InputError(f"{reason}; {self.last_good()}") from error

    def last_good(self):
        found = self.checkpoints()
        return f"the last good checkpoint is {found[-1]}" if found else "no checkpoint has been saved yet"


class Window:
    """Sums over the steps since the last log line, kept on the device: true means over steps, accumulation, processes.

    A step whose loss or gradient is not finite is left out of them, and counted.
    """

    NAMES = "loss", "mse", "vb", "latent_mean", "latent_square", "grad_norm", "steps"

    def __init__(self, accelerator, batch, macs):
        self.accelerator, self.batch, device = accelerator, batch, accelerator.device
        self.flops_per_image = 3 * 2 * macs  # backward is twice forward, a multiply-add is two operations
        self.sums = torch.zeros(len(self.NAMES), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.first_bad = torch.full_like(self.skipped, -1)
        self.restart_clock()

    def restart_clock(self):
        self.steps, self.data_seconds, self.began = 0, 0.0, time.perf_counter()

    def next(self, batches):
        """The next micro-batch; the time that it took is data_seconds."""
        began = time.perf_counter()
        batch = next(batches)
        self.data_seconds += time.perf_counter() - began
        return batch

    def add(self, step, figures, grad_norm):
        """Add a step; returns, without waiting for the device, whether to make its update: the same everywhere."""
        figures = torch.stack([*figures, grad_norm, torch.ones_like(grad_norm)])
        # In float16 a gradient too large is the scaler's business, which makes no update and scales it down.
        judged = figures[:-2] if self.accelerator.scaler is not None else figures
        good = self.accelerator.reduce(judged.isfinite().all().float(), "mean") == 1
        self.sums += torch.where(good & figures.isfinite().all(), figures, 0)
        self.skipped += ~good
        self.first_bad = torch.where(~good & (self.first_bad < 0), step, self.first_bad)
        self.steps += 1
        return good

    def check(self, allowed, sampler, run):
        """InputError when more steps than allowed have been left out for a loss or a gradient that is not finite."""
        skipped, step = int(self.skipped), int(self.first_bad)
        if step >= 0 and skipped > allowed:
            raise InputError(
                f"the loss or its gradient is not finite at step {step + 1}, on the images {sampler.indices(step)}; "
                f"{run.last_good()}; --skip-nonfinite {skipped} leaves such steps out"
            )
        self.first_bad.fill_(-1)

    def means(self):
        """The log line's figures; a new window begins."""
        *sums, steps = self.accelerator.reduce(self.sums, "mean").tolist()
        figures = {name: total / max(steps, 1) for name, total in zip(self.NAMES, sums, strict=False)}
        figures["latent_std"] = math.sqrt(max(0, figures.pop("latent_square") - figures["latent_mean"] ** 2))
        seconds, device = (time.perf_counter() - self.began) / self.steps, self.accelerator.device
        cuda = device.type == "cuda"
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        figures |= dict(
            skipped_steps=int(self.skipped), images_per_second=self.batch / seconds, step_seconds=seconds,
            data_seconds=self.data_seconds / self.steps, compute_seconds=seconds - self.data_seconds / self.steps,
            flops_per_second=self.batch * self.flops_per_image / seconds,
            memory_gb=torch.cuda.max_memory_allocated(device) / 1e9 if cuda else kilobytes / 1e6,
        )
        name = torch.cuda.get_device_name(device) if cuda else ""
        if peak := next((peak for prefix, peak in PEAK_FLOPS.items() if name.startswith(prefix)), None):
            peak *= self.accelerator.num_processes * (0.5 if self.accelerator.mixed_precision == "no" else 1)
            figures["mfu"] = figures["flops_per_second"] / peak
        self.sums.zero_()
        self.restart_clock()
        return figures

    def state(self):
        """Every process's own sums and the steps left out, for a checkpoint."""
        return dict(window=self.accelerator.gather(self.sums[None]).cpu(), skipped=int(self.skipped))

    def load(self, sums, skipped):
        """Each process takes its own sums again; if their number has changed, the mean."""
        same = len(sums) == self.accelerator.num_processes
        self.sums.copy_(sums[self.accelerator.process_index] if same else sums.mean(0))
        self.skipped.fill_(skipped)


class Previews:
    """Pictures and figures of the EMA weights while they train, on all processes; no training randomness is used."""

    def __init__(self, args, ema, vae, data, accelerator, run):
        self.args, self.ema, self.vae, self.data, self.accelerator, self.run = args, ema, vae, data, accelerator, run
        self.diffusion, self.sampling = sampling_settings(args, ema, cfg_scale=1.0)
        self.network = load_features(args.features, accelerator.device) if args.eval_every else None
        self.metrics = None if len(data) <= 50_000 else ("fid", "is")  # the others keep every image's features
        self.reference = None

    def draw(self, step):
        """samples/STEP.png, from the same noise at every step."""
        images, nrow, captions = class_grid(
            self.ema, self.diffusion, self.vae, 4, self.args.global_seed, self.accelerator, **self.sampling)
        on_main(self.accelerator, save_grid, images, self.run.folder / "samples" / f"{step:07d}.png", nrow, captions)

    def evaluate(self, step):
        """Figures into metrics.jsonl; the weights with the run's lowest FID, or FD, are kept in best.safetensors."""
        if self.reference is None:
            workers = self.args.num_workers
            self.reference = reference_set(self.data, self.network, self.accelerator, self.metrics, num_workers=workers)
        figures = evaluate_model(
            self.ema, self.diffusion, self.vae, self.reference, self.network, self.args.eval_samples, self.accelerator,
            metrics=self.metrics, seed=self.args.global_seed, **self.sampling,
        )
        name = self.network.distance.lower()
        best = self.run.best(name)
        if best is None or figures[name] < best[name]:
            path = self.run.folder / "best.safetensors"
            metadata = self.ema.metadata | {"step": step, name: figures[name]}
            on_main(self.accelerator, lambda: save_checkpoint(path, self.ema, **metadata))
        self.run.log(step, **figures)

    def make_up(self, step, last):
        """What was due at the step that a run goes on from, and that its end prevented."""
        drawn = (self.run.folder / "samples" / f"{step:07d}.png").exists()
        if on_main(self.accelerator, lambda: not drawn and is_due(self.args.sample_every, step, last)):
            self.draw(step)
        evaluated = any(line["step"] == step and "features" in line for line in self.run.lines)
        if not evaluated and is_due(self.args.eval_every, step, last):
            self.evaluate(step)


# ------------------------------------------------------------------------------------------------ the training


def build_network(args, vae, init):
    """A new DiT for the data, with the weights of the checkpoint `init` if it is not None.

    The label table is new when it has another number of rows there, the position embedding when the size differs.
    """
    torch.manual_seed(args.global_seed)
    network = build_dit(
        args.model, input_size=args.image_size // vae.factor, in_channels=vae.channels, num_classes=args.num_classes,
        class_dropout_prob=args.class_dropout_prob,
    )
    network.gradient_checkpointing = args.gradient_checkpointing
    if init is not None:
        own, given = network.state_dict(), load_checkpoint(init).state_dict()
        table = "y_embedder.embedding_table.weight"
        given["pos_embed"] = own["pos_embed"]
        if len(given[table]) != len(own[table]):
            dit.log_stderr(f"--init: the label table is new, {len(own[table])} rows in place of {len(given[table])}")
            given[table] = own[table]
        if wrong := [name for name in own if name not in given or given[name].shape != own[name].shape]:
            raise InputError(f"--init {init} does not fit {args.model} here: {', '.join(wrong[:3])} have other shapes")
        network.load_state_dict(given)
    return network


def update_weights(accelerator, optimizer, lr, good):
    """AdamW's step with this learning rate; none where the tensor `good` is False, which the host need not know."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if accelerator.scaler is None:  # a scaler says so itself
        optimizer.optimizer.found_inf = (~good).float()
    optimizer.step()
    optimizer.zero_grad()


def whole(tensor):
    """The tensor itself, or all of what FSDP has spread over the processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def update_ema(ema, network, decay, step):
    """ema = d * ema + (1 - d) * weights, with d rising to decay as (1 + step) / (10 + step)."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), [whole(weight) for weight in network.parameters()], 1 - d)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description="Train a DiT. Unset flags take the preset of the data: the digits demo's, or the paper's.",
        epilog="The same command again goes on where the run stopped.",
    )

    def group(title):
        return parser.add_argument_group(title).add_argument

    def preset(add, flag, text, **kwargs):
        name = flag[2:].replace("-", "_")
        add(flag, help=f"{text} (default: {DIGITS[name]} for digits, else {PAPER[name]})", **kwargs)

    add = group("what")
    add("--data-path", default="digits", help="digits, a folder, or a hub id, see evaluate.py (default: %(default)s)")
    add("--num-classes", type=int, help="number of classes (default: the data's)")
    preset(add, "--image-size", "pixels", type=int)
    preset(add, "--mirror", "flip images at random", action=argparse.BooleanOptionalAction)
    preset(add, "--model", "the network, one of python dit.py's table")
    preset(add, "--vae", "ema or mse (stabilityai/sd-vae-ft-*), a hub id, a diffusers folder, or none for pixels")
    preset(add, "--class-dropout-prob", "how often a label is hidden, 0 for no guidance", type=float)
    add("--init", metavar="CKPT", help="begin with these weights, to fine-tune them (default: new ones)")
    add("--latent-cache", metavar="DIR", help="keep the VAE's moments of all images here (default: encode every time)")
    add("--max-broken", type=int, default=100, help="images that a cache may leave out (default: %(default)s)")

    add = group("how")
    preset(add, "--global-batch-size", "images a step, over all processes", type=int)
    preset(add, "--epochs", "passes over the data", type=int)
    preset(add, "--max-steps", "steps; with --epochs, what ends first", type=int)
    preset(add, "--lr", "AdamW's learning rate", type=float)
    preset(add, "--warmup-steps", "steps in which the learning rate rises to --lr", type=int)
    preset(add, "--grad-clip", "largest gradient norm, 0 for no limit", type=float)
    preset(add, "--ema-decay", "decay of the averaged weights, which warms up", type=float)
    add("--global-seed", type=int, default=0, help="all randomness comes from it (default: %(default)s)")
    add("--skip-nonfinite", type=int, default=0, metavar="N",
        help="leave out up to N steps whose loss or gradient is not finite (default: stop at the first)")

    add = group("machine")
    add("--mixed-precision", choices=("no", "fp16", "bf16"), help="autocast of the network; weights stay float32 "
        "(default: as accelerate is configured, else no)")
    add("--gradient-accumulation-steps", type=int, default=1, help="parts of a batch, one after the other (default: 1)")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time (default: off)")
    add("--compile", action="store_true", help="torch.compile the network (default: off)")
    preset(add, "--num-workers", "processes that load images, for each process that trains", type=int)

    add = group("the run's folder")
    add("--results-dir", default="results", help="where runs are kept (default: %(default)s)")
    add("--run-name", help="the run's folder in it (default: data and model)")
    add("--allow-changes", action="store_true", help="go on with other settings than before (default: refuse)")
    preset(add, "--log-every", "steps between lines in metrics.jsonl", type=int)
    preset(add, "--ckpt-every", "steps between checkpoints", type=int)
    add("--keep-checkpoints", type=int, default=3, help="how many of the last are kept (default: %(default)s)")
    preset(add, "--sample-every", "steps between sample grids, 0 for none", type=int)
    preset(add, "--eval-every", "steps between evaluations, 0 for none", type=int)
    preset(add, "--eval-samples", "images for an evaluation, 0 for none", type=int)
    preset(add, "--features", "the evaluation's feature network, see evaluate.py")
    add("--tracker", choices=("none", "tensorboard", "wandb"), default="none", help="also log there (default: none)")
    add_data_args(parser)
    add_sampling_args(parser)
    return parser.parse_args(argv)


def fill_preset(args):
    """Unset flags take the data's preset. InputError for values that make no sense."""
    preset = DIGITS if args.data_path == "digits" else PAPER
    if args.epochs is not None or args.max_steps is not None:
        preset = preset | dict(epochs=args.epochs, max_steps=args.max_steps)
    for name, value in preset.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    if not args.eval_samples:
        args.eval_every = 0
    for (low, high), names in BOUNDS.items():
        for name in names:
            value = getattr(args, name)
            if value is not None and not low <= value <= high:
                bound = f"{low} or more" if value < low else f"{high} or less"
                raise InputError(f"--{name.replace('_', '-')} {value} must be {bound}")
    if args.latent_cache and args.vae == "none":
        raise InputError("--latent-cache does nothing with --vae none: pixels need no encoding")
    if args.tracker not in ("none", *map(str, get_available_trackers())):
        raise InputError(f"--tracker {args.tracker} needs a package: pip install {args.tracker}")


def fit_to_data(args, data, vae, accelerator):
    """Check the settings against the data and the processes, and take from the data what is unset."""
    parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
    if args.global_batch_size % parts:
        raise InputError(
            f"--global-batch-size {args.global_batch_size} must divide by processes x accumulation steps = {parts}"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.scaler is None:
        raise InputError("--mixed-precision fp16 does nothing on this device: use bf16 or no")
    if args.image_size % vae.factor:
        raise InputError(f"--image-size {args.image_size} must divide by {vae.factor}, the VAE's downsampling")
    args.num_classes = data.num_classes if args.num_classes is None else args.num_classes
    if max(data.labels) >= args.num_classes:
        raise InputError(f"--num-classes {args.num_classes}, but the data has a label {max(data.labels)}")
    if args.num_classes == 1:
        args.class_dropout_prob = 0.0  # one class is no condition: there is nothing to hide and nothing to guide


def count_steps(args, size):
    """Steps in all: --max-steps or --epochs of a data set's size, whichever ends first."""
    by_epochs = math.ceil(args.epochs * size / args.global_batch_size) if args.epochs else math.inf
    return min(by_epochs, args.max_steps or math.inf)


def describe(args, data, vae):
    """What travels with the weights, beside their step."""
    suggested = args.sampling | {name: getattr(args, name) for name in args.sampling if getattr(args, name) is not None}
    names = data.class_names
    return dict(data=data.name, class_names=names, vae=vae.name, image_size=args.image_size, sampling=suggested)


def is_due(every, step, last):
    """Whether something is to be done after a step: at every so many, and at the last; never when every is 0."""
    return every > 0 and step > 0 and (step % every == 0 or step == last)


def print_end(args, run, accelerator):
    """Where the run is, its figures, and what to type next."""
    figures = [line for line in run.lines if "features" in line]
    if figures and accelerator.is_main_process:
        print_figures(figures[-1], run.name)
        name = "fid" if "fid" in figures[-1] else "fd"
        best = run.best(name)
        print(f"best {name} {best[name]:.4f} at step {best['step']}: {run.folder}/best.safetensors")
    accelerator.print(
        f"run: {run.folder}\nsample: python sample_grid.py --ckpt {run.folder}\n"
        f"evaluate: accelerate launch evaluate.py --ckpt {run.folder} --ref {args.data_path} --features {args.features}"
    )


def main(args):
    fill_preset(args)
    accelerator = make_accelerator(
        args.mixed_precision, args.tf32, gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.tracker == "none" else args.tracker, project_dir=args.results_dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=3))],  # one may have more to cache than another
    )
    device, accumulation = accelerator.device, accelerator.gradient_accumulation_steps

    # All that the user gave is read and checked before anything is written.
    data = load_data(args.data_path, args.image_size, args.image_column, args.label_column, args.split)
    vae = Autoencoder.load(args.vae, device, data.channels)
    fit_to_data(args, data, vae, accelerator)
    run = Run(args, data, accelerator)
    network = build_network(args, vae, init=None if run.checkpoints() else args.init).to(device)
    ema = copy.deepcopy(network).eval().requires_grad_(False)
    ema.metadata = describe(args, data, vae)
    diffusion = create_diffusion(learn_sigma=network.learn_sigma)
    previews = Previews(args, ema, vae, data, accelerator, run)
    trained = [p for p in network.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0, fused=True)

    with run:
        if args.latent_cache:
            data = latent_cache(args, data, vae, accelerator)
        if args.compile:
            for block in network.blocks:  # all alike: one compilation; in place, so that names of weights stay
                block.compile()
        model, optimizer = accelerator.prepare(network.train(), adam)
        window = Window(accelerator, args.global_batch_size, dit.count_macs(network.config))
        start, total = run.resume(model, ema, adam, window), count_steps(args, len(data))
        previews.make_up(start, total)

        sampler = GlobalBatches(args, len(data), start, total, accelerator)
        batches = read_batches(data, sampler, args.num_workers, pin_memory=device.type == "cuda")
        latent_shape = (network.in_channels, network.input_size, network.input_size)
        with contextlib.closing(batches), ProgressBar(accelerator, "step", total, start) as progress:
            for step in range(start, total):
                run.stop.saved = False
                t, drop, noise, vae_noise = draw_randomness(args, step, diffusion.num_timesteps, latent_shape, device)
                figures = torch.zeros(5, device=device)
                for part in sampler.mine:
                    images, y = (tensor.to(device, non_blocking=True) for tensor in window.next(batches))
                    own = sampler.part(part)
                    moments = images if args.latent_cache else vae.encode(images)
                    x = vae.sample(moments, noise=vae_noise[own])  # (n, C, h, w)
                    with accelerator.accumulate(model):
                        losses = diffusion.training_losses(model, x, t[own], dict(y=y, drop=drop[own]), noise[own])
                        loss, mse, vb = (losses[name].mean() for name in ("loss", "mse", "vb"))
                        accelerator.backward(loss)
                    figures += torch.stack([loss, mse, vb, x.mean(), x.square().mean()]).detach() / accumulation
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
                good = window.add(step, figures, whole(grad_norm))
                lr = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
                update_weights(accelerator, optimizer, lr, good)
                update_ema(ema, network, args.ema_decay, step)

                done, stopping = step + 1, run.stop.agreed()
                logs, saves, draws, evaluates = (
                    is_due(every, done, total)
                    for every in (args.log_every, args.ckpt_every, args.sample_every, args.eval_every)
                )
                saves = saves or evaluates or stopping  # so that a stop while evaluating loses nothing
                if logs or saves:
                    window.check(args.skip_nonfinite, sampler, run)
                note = None
                if logs:
                    line = window.means()
                    run.log(done, lr=lr, **line)
                    note = f"loss {line['loss']:.4f}  {line['images_per_second']:.0f} images/s"
                progress.advance(note=note)
                paused = time.perf_counter()
                if saves:
                    run.save(done)
                if stopping:
                    run.stop.exit()
                if draws:
                    previews.draw(done)
                if evaluates:
                    previews.evaluate(done)
                window.began += time.perf_counter() - paused
    print_end(args, run, accelerator)


if __name__ == "__main__":
    run_command(main, parse_args())
