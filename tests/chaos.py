"""Kill the programs at random moments, start them again with the same command, and compare with an undisturbed run.

    python tests/chaos.py                     # all scenarios, 100 kills each of training, cache and evaluation; minutes
    python tests/chaos.py train --kills 20    # one of: train cache evaluate signals ranks

Each life is a forked child of this process, which has the imports done, so that a kill falls into the work and not into
`import torch`. The last line is 'N passed, M failed'.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import evaluate  # noqa: E402
import train_accelerate  # noqa: E402
from dit import run_command  # noqa: E402

torch.set_num_threads(1)
TIMINGS = {"images_per_second", "step_seconds", "data_seconds", "compute_seconds", "flops_per_second",
           "memory_gb"}
SMALL = ["--model", "DiT-Ti/2", "--global-batch-size", "8", "--num-workers", "0", "--num-sampling-steps", "2",
         "--features", "efficientnet-lite0"]
RUN_FLAGS = [*SMALL, "--image-size", "8", "--vae", "none", "--max-steps", "120", "--ckpt-every", "3",
             "--log-every", "2", "--sample-every", "20", "--eval-every", "30",
             "--eval-samples", "8", "--warmup-steps", "10"]


def start(script, argv, log):
    """A child process that runs the script's command line; its pid."""
    pid = os.fork()
    if pid == 0:
        with open(log, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        status = 1
        try:
            run_command(script.main, script.parse_args(argv))
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def wait(pid, seconds=None):
    """The child's exit status (negative: the signal that ended it), or None if it still runs after so many seconds."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() > end:
            return None
        time.sleep(0.005)


def lives(script, argv, log, kills, longest, rng):
    """Start, kill at a random moment, start again; after `kills` kills let it finish. Returns the kills that hit."""
    hit = 0
    while hit < kills:
        pid = start(script, argv, log)
        status = wait(pid, rng.uniform(0, longest))
        if status is None:
            os.kill(pid, signal.SIGKILL)
            status = wait(pid)  # 0 where it has just finished
        if status != -signal.SIGKILL:
            assert status == 0, f"exit status {status}: see {log}\n{Path(log).read_text()[-3000:]}"
            return hit
        hit += 1
    assert wait(start(script, argv, log)) == 0, Path(log).read_text()[-3000:]
    return hit


def digest(folder):
    """Path -> SHA-256 of every file below a folder, so that a left-over file shows; metrics without their timings.

    Of config.json, which names the folder, and state.json, which has the others' checksums, only the presence.
    """
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in data.decode().splitlines()]
            data = json.dumps([{k: v for k, v in line.items() if k not in TIMINGS} for line in lines]).encode()
        name = str(path.relative_to(folder))
        found[name] = "" if path.name in ("config.json", "state.json") else hashlib.sha256(data).hexdigest()
        if path.name == "optimizer.pt":  # an archive: compare what is in it
            found[name] = str(flatten(torch.load(path, weights_only=True)))
        if path.suffix == ".safetensors":  # whose metadata stand in any order
            with safe_open(path, "pt") as file:
                found[name] = str([sorted((file.metadata() or {}).items()), flatten(load_file(path))])
    return found


def flatten(value):
    """A nested optimiser state as something that compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {k: flatten(v) for k, v in value.items()}
    return [flatten(v) for v in value] if isinstance(value, (list, tuple)) else value


def differences(expected, found):
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def pictures(folder, count=24, size=8):
    rng = np.random.default_rng(0)
    for i in range(count):
        target = Path(folder) / "ab"[i % 2]
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(target / f"{i:03d}.png")
    return str(folder)


def repeat(work, script, argv, output, kills, longest, rng):
    """Undisturbed once, then disturbed until `kills` kills are used; the names of files that ever differed."""
    wrong, used, rounds = set(), 0, 0
    assert wait(start(script, argv(work / "quiet"), work / "quiet.log")) == 0, (work / "quiet.log").read_text()[-3000:]
    expected = digest(output(work / "quiet"))
    while used < kills:
        rounds += 1
        folder = work / f"round{rounds}"
        used += lives(script, argv(folder), work / f"round{rounds}.log", kills - used, longest, rng)
        wrong |= set(differences(expected, digest(output(folder))))
        shutil.rmtree(folder)
    return used, rounds, sorted(wrong)


def scenario_train(work, kills, rng):
    data = pictures(work / "data")

    def argv(folder):
        return [*RUN_FLAGS, "--data-path", data, "--results-dir", str(folder), "--run-name", "run"]

    used, rounds, wrong = repeat(work, train_accelerate, argv, lambda folder: folder / "run", kills, 4, rng)
    return f"{used} SIGKILLs over {rounds} training runs; files that differ: {wrong or 'none'}", not wrong


def scenario_cache(work, kills, rng):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4, layers_per_block=1,
                  down_block_types=["DownEncoderBlock2D"] * 2,
                  up_block_types=["UpDecoderBlock2D"] * 2).save_pretrained(work / "vae")
    data = pictures(work / "data", count=600, size=32)
    train_accelerate.LatentCache.SHARD = 50  # twelve shards

    def argv(folder):
        return [*SMALL, "--data-path", data, "--image-size", "32", "--vae", str(work / "vae"), "--max-steps", "1",
                "--sample-every", "0", "--eval-samples", "0", "--latent-cache", str(folder / "cache"),
                "--results-dir", str(folder)]

    used, rounds, wrong = repeat(work, train_accelerate, argv, lambda folder: folder / "cache", kills, 4, rng)
    return f"{used} SIGKILLs over {rounds} cache builds; files that differ: {wrong or 'none'}", not wrong


def scenario_evaluate(work, kills, rng):
    data = pictures(work / "data")
    first = [*RUN_FLAGS, "--max-steps", "3", "--data-path", data, "--results-dir", str(work), "--run-name", "run"]
    assert wait(start(train_accelerate, first, work / "run.log")) == 0, (work / "run.log").read_text()[-3000:]

    def argv(folder):
        folder.mkdir(exist_ok=True)
        return ["--ckpt", str(work / "run"), "--ref", data, "--num-fid-samples", "256", "--per-proc-batch-size", "4",
                "--num-sampling-steps", "10", "--features", "efficientnet-lite0", "--save-images",
                str(folder / "images"), "--json", str(folder / "figures.json")]

    def output(folder):
        figures = json.loads((folder / "figures.json").read_text())
        kept = {k: v for k, v in figures.items() if str(folder) not in str(v) and k not in TIMINGS}
        (folder / "figures.json").write_text(json.dumps(kept))
        return folder

    used, rounds, wrong = repeat(work, evaluate, argv, output, kills, 4, rng)
    return f"{used} SIGKILLs over {rounds} evaluations; files that differ: {wrong or 'none'}", not wrong


def scenario_signals(work, kills, rng):
    data = pictures(work / "data")

    def argv(folder):
        return [*RUN_FLAGS, "--ckpt-every", "1000", "--data-path", data, "--results-dir", str(folder),
                "--run-name", "run"]

    assert wait(start(train_accelerate, argv(work / "quiet"), work / "quiet.log")) == 0
    expected = {k: v for k, v in digest(work / "quiet" / "run").items() if "0000120" in k or k == "metrics.jsonl"}
    statuses, wrong, tries = [], set(), max(2, kills // 10)
    for i in range(tries):
        number, folder = (signal.SIGTERM, signal.SIGINT)[i % 2], work / f"round{i}"
        pid = start(train_accelerate, argv(folder), work / "signals.log")
        while not (folder / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        os.kill(pid, number)
        statuses.append(wait(pid) == 128 + number)
        assert wait(start(train_accelerate, argv(folder), work / "signals.log")) == 0
        found = {k: v for k, v in digest(folder / "run").items() if k in expected}
        wrong |= set(differences(expected, found))
    passed = all(statuses) and not wrong
    text = f"{tries} SIGTERM or SIGINT, {sum(statuses)} with exit status 128+n"
    return f"{text}; files that differ: {sorted(wrong) or 'none'}", passed


def scenario_ranks(work, kills, rng):
    """One of two processes is killed; how long the other lives on; then the same command finishes the run."""
    data, slowest, tries = pictures(work / "data"), 0.0, max(2, kills // 25)
    for i in range(tries):
        folder = work / f"round{i}"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port",
                   str(29600 + i), str(ROOT / "train_accelerate.py"), *RUN_FLAGS, "--data-path", data,
                   "--results-dir", str(folder), "--run-name", "run"]
        with open(work / "ranks.log", "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            while not (folder / "run" / "metrics.jsonl").exists():
                time.sleep(0.05)
                assert process.poll() is None, (work / "ranks.log").read_text()[-3000:]
            time.sleep(rng.uniform(0, 1))
            listed = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
            children, killed = listed.stdout.split(), time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(children[i % 2]), signal.SIGKILL)
            process.wait(timeout=120)
            slowest = max(slowest, time.monotonic() - killed)
            assert subprocess.run(command, stdout=log, stderr=log).returncode == 0
    return f"{tries} kills of one of two processes: the other ended within {slowest:.0f} s; all resumed", slowest < 30


def main():
    scenarios = {name[9:]: f for name, f in globals().items() if name.startswith("scenario_")}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenario", nargs="*", help=f"of {', '.join(scenarios)} (default: all)")
    parser.add_argument("--kills", type=int, default=100, help="kills per scenario (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    results = []
    for name in args.scenario or scenarios:
        began, work = time.monotonic(), Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))
        try:
            text, passed = scenarios[name](work, args.kills, random.Random(args.seed))
        except AssertionError as error:
            text, passed = str(error), False
        results.append(passed)
        print(f"{'PASS' if passed else 'FAIL'} {name}: {text} ({time.monotonic() - began:.0f} s)", flush=True)
        shutil.rmtree(work, ignore_errors=not passed)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
