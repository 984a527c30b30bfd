"""What several test files use: commands, forks, small networks, pictures, damage."""

import multiprocessing
import os
import signal
import socket
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from dit import DiT, InputError, run_command, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent
# What of a line of metrics.jsonl hangs on the clock and the machine.
TIMINGS = {"images_per_second", "step_seconds", "data_seconds", "compute_seconds",
           "flops_per_second", "memory_gb"}
CLASS_NAMES = ["tench, Tinca tinca", "golden retriever", "Labrador retriever", "otter"]

# The flags of a run of six steps on 8 x 8 pictures that takes a second; see conftest.py's quick.
QUICK_RUN = [
    "--model", "DiT-Test/2", "--image-size", "8", "--vae", "none", "--global-batch-size", "8",
    "--num-workers", "0", "--num-sampling-steps", "2", "--max-steps", "6", "--ckpt-every", "2",
    "--log-every", "1", "--sample-every", "4", "--eval-every", "4", "--eval-samples", "8",
    "--lr", "0.01", "--warmup-steps", "1",
]


def train_flags(data, folder):
    """The flags of a QUICK_RUN on these data in this folder."""
    where = ["--data-path", data, "--results-dir", folder.parent, "--run-name", folder.name]
    return [*QUICK_RUN, *where]


# ------------------------------------------------------------------------------ commands and forks


def command(script, *flags):
    """Run a script's command line in this process, as the script itself does."""
    reset_accelerate()
    run_command(script.main, script.parse_args([str(flag) for flag in flags]))


def refused(capsys, script, *flags):
    """The one line on stderr with which a command ends with status 2; stdout is not looked at."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, warnings.catch_warnings(record=True) as shown:
        # As Python does where no tests run.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        command(script, *flags)
    assert not shown, [str(warning.message) for warning in shown]
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def reset_accelerate():
    """Forget what accelerate remembers for a whole process: the next Accelerator is a new one."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


def fork(work, environment=(), log=None):
    """Start work() in a copy of this process; returns its id.

    Its exit status is 0, 1 for an exception, 2 for an InputError, or that of a SystemExit. log: a
    file to which its output is appended.
    """
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.environ.update(environment)
        if log:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
        work()
        status = 0
    except SystemExit as error:
        status = error.code
    except InputError as error:
        print(f"error: {error}", flush=True)
        status = 2
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def fork_two(work):
    """Start work() in two processes that accelerate takes for the ranks of one job: their ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    return [fork(work, job | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(2)]


def wait(*pids):
    """The exit statuses of forks: negative signal numbers for killed ones."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def end_workers():
    """Kill a loader's workers that an error has left: torch would wait seconds for each."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()


def wait_or_kill(pid, seconds):
    """The exit status of a fork, which is killed if it still runs after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    return wait(pid)[0]


# ------------------------------------------------------------------------------ networks and files


class Pixels:
    """A feature network that costs nothing: 2 x 2 mean pixels."""

    name, distance, width = "pixels", "FD", 12
    spatial, imagenet, any_size = False, False, True

    def __call__(self, images):
        rows = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return rows, (rows[:, :10] / 50).softmax(1), None


def small_dit(**overrides):
    """A DiT whose output depends on all of its inputs: random weights in place of the zero ones."""
    torch.manual_seed(0)
    config = dict(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=2, num_heads=2,
                  num_classes=4)
    model = DiT(**config | overrides).eval()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            torch.nn.init.normal_(parameter, std=0.08)
    return model


def save_small_dit(path, metadata=None, **overrides):
    """Write a small_dit of pixels in four named classes; returns the path as a str."""
    metadata = dict(vae="none", class_names=CLASS_NAMES) | (metadata or {})
    save_checkpoint(path, small_dit(**overrides), **metadata)
    return str(path)


def save_vae(folder, **config):
    """Write a tiny KL autoencoder of diffusers with random weights; returns the folder."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    config = dict(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4) | config
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        **config).save_pretrained(folder)
    return folder


def pictures(folder, count=24, size=8):
    """Write random square pictures 000.png ..., in turns to the class folders a and b."""
    for i in range(count):
        target = Path(folder) / "ab"[i % 2] / f"{i:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(image).save(target)
    return folder


def damage(path, how):
    """Cut a file in half, empty it, or flip a bit: in the middle, or of its first or last byte."""
    content = bytearray(path.read_bytes())
    if how in ("first", "middle", "last"):
        content[dict(first=0, middle=len(content) // 2, last=-1)[how]] ^= 0x80
    path.write_bytes(dict(cut=content[: len(content) // 2], empty=b"").get(how, content))


def contents(folder):
    """Path -> bytes of every file below a folder."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def same(a, b):
    """Whether two dicts of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
