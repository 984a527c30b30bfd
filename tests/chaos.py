"""Kill the programs at random moments, run the same command again, compare with a quiet run.

    python tests/chaos.py                    all scenarios, 100 kills each of training, cache and
                                             evaluation; minutes
    python tests/chaos.py train --kills 20   one of: train cache evaluate signals ranks

Each life is a forked child of this process, which has the imports done, so that a kill falls into
the work and not into `import torch`. The last line is 'N passed, M failed'.
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
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from helpers import (  # noqa: E402
    ROOT,
    TIMINGS,
    command,
    fork,
    pictures,
    save_vae,
    wait,
    wait_or_kill,
)
from safetensors import safe_open  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import evaluate  # noqa: E402
import train_accelerate  # noqa: E402

torch.set_num_threads(1)
SMALL = ["--model", "DiT-Ti/2", "--global-batch-size", "8", "--num-workers", "0",
         "--num-sampling-steps", "2", "--features", "efficientnet-lite0"]
RUN_FLAGS = [*SMALL, "--image-size", "8", "--vae", "none", "--max-steps", "120", "--ckpt-every",
             "3", "--log-every", "2", "--sample-every", "20", "--eval-every", "30",
             "--eval-samples", "8", "--warmup-steps", "10"]


# ------------------------------------------------------------------------------------ lives, kills


def start(script, flags, folder, log):
    """A child process that runs a script's command line; its id.

    The cache of references is one of the round's own, beside its folder: it counts what a kill
    leaves there, and the oldest files go first.
    """
    cache = dict(XDG_CACHE_HOME=f"{folder}-cache")
    return fork(lambda: command(script, *flags), cache, log)


def finish(script, flags, folder, log):
    """Run a command to its end, which must be a good one."""
    status = wait(start(script, flags, folder, log))[0]
    assert status == 0, f"exit status {status}: see {log}\n{Path(log).read_text()[-3000:]}"


def lives(script, flags, folder, log, kills, longest, rng):
    """Start, kill at a random moment, start again; after `kills` kills let it finish.

    Returns the kills that hit.
    """
    for hit in range(kills):
        pid = start(script, flags, folder, log)
        status = wait_or_kill(pid, rng.uniform(0, longest))  # 0 where it has just finished
        if status != -signal.SIGKILL:
            assert status == 0, f"exit status {status}: see {log}\n{Path(log).read_text()[-3000:]}"
            return hit
    finish(script, flags, folder, log)
    return kills


def repeat(work, what, script, flags, output, kills, rng, longest=4):
    """Undisturbed once, then disturbed until `kills` kills are used: a scenario's result.

    flags, output: functions of a round's folder.
    """
    quiet, wrong, used, rounds = work / "quiet", set(), 0, 0
    quiet.mkdir()
    finish(script, flags(quiet), quiet, work / "quiet.log")
    expected = digest(output(quiet))
    while used < kills:
        rounds += 1
        folder, log = work / f"round{rounds}", work / f"round{rounds}.log"
        folder.mkdir()
        used += lives(script, flags(folder), folder, log, kills - used, longest, rng)
        wrong |= differences(expected, digest(output(folder)))
        shutil.rmtree(folder)
        shutil.rmtree(f"{folder}-cache", ignore_errors=True)
    return compared(f"{used} SIGKILLs over {rounds} {what}", wrong)


def compared(text, wrong):
    """What a scenario says, and whether it has passed: no file may differ."""
    return f"{text}; files that differ: {sorted(wrong) or 'none'}", not wrong


def digest(folder):
    """Path -> what every file below a folder holds, so that a left-over file shows.

    Metrics without their timings; of config.json, which names the folder, and state.json, which
    has the others' fingerprints, only the presence.
    """
    found = {}
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        value = path.read_bytes()
        if path.name in ("config.json", "state.json"):
            value = b""
        elif path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in value.decode().splitlines()]
            value = str([{k: v for k, v in line.items() if k not in TIMINGS} for line in lines])
        elif path.name == "optimizer.pt":  # an archive: compare what is in it
            value = str(flatten(torch.load(path, weights_only=True)))
        elif path.suffix == ".safetensors":  # whose metadata stand in any order
            with safe_open(path, "pt") as file:
                value = str([sorted((file.metadata() or {}).items()), flatten(load_file(path))])
        found[str(path.relative_to(folder))] = value
    return found


def flatten(value):
    """A nested optimiser state as something that compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {k: flatten(v) for k, v in value.items()}
    return [flatten(v) for v in value] if isinstance(value, (list, tuple)) else value


def differences(expected, found):
    names = expected.keys() | found.keys()
    return {name for name in names if expected.get(name) != found.get(name)}


# --------------------------------------------------------------------------------------- scenarios


def scenario_train(work, kills, rng):
    data = pictures(work / "data")

    def flags(folder):
        return [*RUN_FLAGS, "--data-path", data, "--results-dir", folder, "--run-name", "run"]

    return repeat(work, "training runs", train_accelerate, flags, lambda folder: folder / "run",
                  kills, rng)


def scenario_cache(work, kills, rng):
    vae = save_vae(work / "vae", block_out_channels=(8, 16), norm_num_groups=4)
    data = pictures(work / "data", count=600, size=32)
    train_accelerate.LatentCache.SHARD = 50  # twelve shards

    def flags(folder):
        return [*SMALL, "--data-path", data, "--image-size", "32", "--vae", vae, "--max-steps", "1",
                "--sample-every", "0", "--eval-samples", "0", "--latent-cache", folder / "latents",
                "--results-dir", folder]

    return repeat(work, "cache builds", train_accelerate, flags, lambda folder: folder / "latents",
                  kills, rng)


def scenario_evaluate(work, kills, rng):
    data = pictures(work / "data")
    first = [*RUN_FLAGS, "--max-steps", "3", "--data-path", data, "--results-dir", work,
             "--run-name", "run"]
    finish(train_accelerate, first, work, work / "run.log")

    def flags(folder):
        return ["--ckpt", work / "run", "--ref", data, "--num-fid-samples", "256",
                "--per-proc-batch-size", "4", "--num-sampling-steps", "10", "--features",
                "efficientnet-lite0", "--save-images", folder / "images", "--json",
                folder / "metrics.json"]

    return repeat(work, "evaluations", evaluate, flags, lambda folder: folder, kills, rng)


def scenario_signals(work, kills, rng):
    data = pictures(work / "data")

    def flags(folder):
        return [*RUN_FLAGS, "--ckpt-every", "1000", "--data-path", data, "--results-dir", folder,
                "--run-name", "run"]

    quiet, log = work / "quiet", work / "signals.log"
    finish(train_accelerate, flags(quiet), quiet, log)
    expected = digest(quiet / "run").items()
    expected = {k: v for k, v in expected if "0000120" in k or k == "metrics.jsonl"}
    statuses, wrong, tries = [], set(), max(2, kills // 10)
    for i in range(tries):
        number, folder = (signal.SIGTERM, signal.SIGINT)[i % 2], work / f"round{i}"
        pid = start(train_accelerate, flags(folder), folder, log)
        while not (folder / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1))
        os.kill(pid, number)
        statuses += [status == 128 + number for status in wait(pid)]
        finish(train_accelerate, flags(folder), folder, log)
        found = {k: v for k, v in digest(folder / "run").items() if k in expected}
        wrong |= differences(expected, found)
    text, same = compared(
        f"{tries} SIGTERM or SIGINT, {sum(statuses)} with exit status 128+n", wrong)
    return text, same and all(statuses)


def scenario_ranks(work, kills, rng):
    """One of two processes is killed; how long the other lives on; the same command resumes."""
    data, slowest, tries = pictures(work / "data"), 0.0, max(2, kills // 25)
    for i in range(tries):
        folder, text = work / f"round{i}", work / "ranks.log"
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
                  "--master_port", str(29600 + i), ROOT / "train_accelerate.py", *RUN_FLAGS,
                  "--data-path", data, "--results-dir", folder, "--run-name", "run"]
        with open(text, "a") as log:
            process = subprocess.Popen(launch, stdout=log, stderr=log)
            while not (folder / "run" / "metrics.jsonl").exists():
                time.sleep(0.05)
                assert process.poll() is None, text.read_text()[-3000:]
            time.sleep(rng.uniform(0, 1))
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                                      text=True, check=True).stdout.split()
            killed = time.monotonic()
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(children[i % 2]), signal.SIGKILL)
            process.wait(timeout=120)
            slowest = max(slowest, time.monotonic() - killed)
            assert subprocess.run(launch, stdout=log, stderr=log).returncode == 0
    text = f"{tries} kills of one of two processes: the other ended within {slowest:.0f} s"
    return f"{text}; all resumed", slowest < 30


def main():
    scenarios = {name[9:]: f for name, f in globals().items() if name.startswith("scenario_")}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("scenario", nargs="*", help=f"of {', '.join(scenarios)} (default: all)")
    add("--kills", type=int, default=100, help="kills per scenario (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    args = parser.parse_args()
    results = []
    for name in args.scenario or scenarios:
        began, work = time.monotonic(), Path(tempfile.mkdtemp(prefix=f"chaos-{name}-"))
        try:
            text, passed = scenarios[name](work, args.kills, random.Random(args.seed))
        except AssertionError as error:
            text, passed = str(error), False
        results.append(passed)
        seconds = time.monotonic() - began
        print(f"{'PASS' if passed else 'FAIL'} {name}: {text} ({seconds:.0f} s)", flush=True)
        shutil.rmtree(work, ignore_errors=not passed)
    print(f"{sum(results)} passed, {len(results) - sum(results)} failed")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
