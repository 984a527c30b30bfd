"""The trainer: exactness, kills, checkpoints, cache, signals, refusals.

Two processes are forks of this one.
"""

import itertools
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from helpers import (
    ROOT,
    TIMINGS,
    Pixels,
    damage,
    end_workers,
    fork,
    fork_two,
    pictures,
    reset_accelerate,
    same,
    save_vae,
    wait,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import dit
import train_accelerate
from dit import InputError, build_dit, load_checkpoint, save_checkpoint
from evaluate import load_data
from gaussian_diffusion import OBJECTIVES, create_process
from sample_grid import Autoencoder
from train_accelerate import main, parse_args

FLAGS = ["--max-steps", 6, "--global-batch-size", 8, "--ckpt-every", 2, "--log-every", 3,
         "--sample-every", 0, "--eval-every", 0, "--num-sampling-steps", 2, "--warmup-steps", 2,
         "--lr", 0.002, "--run-name", "run"]


def train(folder, *flags):
    """Train in this process; later flags win. Returns the run's folder."""
    reset_accelerate()
    main(parse_args([str(flag) for flag in [*FLAGS, "--results-dir", folder, *flags]]))
    return Path(folder) / "run"


def checkpoints(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def weights(run, name="model", step=6):
    return load_file(run / "checkpoints" / f"{step:07d}" / f"{name}.safetensors")


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def result(run):
    """All of a run that must not depend on its interruptions."""
    last = sorted((run / "checkpoints").glob("[0-9]*"))[-1]
    state = torch.load(last / "optimizer.pt", weights_only=True)
    tensors = {f"ema.{k}": v for k, v in load_file(last / "ema.safetensors").items()}
    tensors |= {f"model.{k}": v for k, v in load_file(last / "model.safetensors").items()}
    for name, values in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{name}.{k}": v for k, v in values.items()}
    log = [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines(run)]
    return last.name, tensors, log


def assert_same(run, other):
    (step, tensors, log), (other_step, other_tensors, other_log) = result(run), result(other)
    assert step == other_step and log == other_log
    assert tensors.keys() == other_tensors.keys() and len(tensors) > 100
    assert [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])] == []
    assert list(run.rglob(".*tmp*")) == []
    names = [{path.relative_to(root) for path in root.rglob("*")} for root in (run, other)]
    assert names[0] == names[1]


@pytest.fixture
def quick_evaluation(monkeypatch):
    """An evaluation that takes no time; its distance falls and rises: the best is at the middle."""
    def metrics(ema, *args, seed, dtype, **sampling):
        assert not ema.training
        step = sum(p.double().sum() for p in ema.parameters()).item()
        return dict(fd=abs(math.sin(1e3 * step)), features="none", num_samples=3, dtype=dtype)

    monkeypatch.setattr(train_accelerate, "load_features", lambda name, device: Pixels())
    monkeypatch.setattr(train_accelerate, "reference_features", lambda *args, **settings: None)
    monkeypatch.setattr(train_accelerate, "evaluate_model", metrics)
    monkeypatch.setattr(train_accelerate, "VALIDATED", 9)


def train_until_killed(last, *flags):
    """Train, and SIGKILL this process in the step `last`, before its update of the EMA."""
    update_ema = train_accelerate.update_ema

    def update(ema, network, decay, step):
        if step == last:
            os.kill(os.getpid(), signal.SIGKILL)
        update_ema(ema, network, decay, step)

    train_accelerate.update_ema = update
    train(*flags)


def slow_train(*flags):
    """Train with a pause in every step."""
    update_ema = train_accelerate.update_ema
    train_accelerate.update_ema = lambda *args: (time.sleep(0.05), update_ema(*args))
    train(*flags)


PREVIEWS = ["--sample-every", 3, "--eval-every", 2, "--keep-checkpoints", 2]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Six steps that nothing interrupts, without previews."""
    return train(tmp_path_factory.mktemp("whole"))


# ---------------------------------------------------------------------------------------- exactness


def die_at(write):
    """SIGKILL this process at its write-th rename, counted from 1."""
    count, replace = itertools.count(1), os.replace

    def replace_or_die(*args):
        if next(count) == write:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(*args)

    os.replace = replace_or_die


def test_kills_at_every_write_leave_no_trace(tmp_path, quick_evaluation):
    """SIGKILL before one rename after another, each time resumed, until a run ends by itself."""
    flags = [*PREVIEWS, "--val-split", 0.1]
    whole = train(tmp_path / "whole", *flags)

    def killed(write):
        die_at(write)
        train(tmp_path / "killed", *flags)

    moments = [3, 4, 6, 7, 1, 8, 9, 10, 5, 12, 2, 11, 100]
    statuses = [wait(fork(lambda n=n: killed(n)))[0] for n in moments]
    assert statuses[-1] == 0 and statuses.count(-signal.SIGKILL) >= 6, statuses
    assert_same(tmp_path / "killed" / "run", whole)


def test_a_kill_between_writes_resumes_exactly(tmp_path, whole_run):
    assert wait(fork(lambda: train_until_killed(4, tmp_path))) == [-9]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        # What a later step left, and a line half-written.
        file.write('{"step": 5, "loss": 0.1}\n{"step": 6, "lo')
    assert_same(train(tmp_path), whole_run)


def test_more_steps_later_are_as_if_asked_for_at_once(tmp_path, whole_run):
    train(tmp_path, "--max-steps", 3)
    assert same(result(train(tmp_path))[1], result(whole_run)[1])


LOSSES = dict(ddpm={"loss", "mse", "vb"}, flow={"loss", "mse"}, sit={"loss", "mse"})


@pytest.mark.parametrize("objective", ["ddpm", "flow"])
def test_two_processes_are_one_with_two_accumulation_steps(tmp_path, objective, quick_evaluation):
    flags = ["--objective", objective, "--log-every", 1, "--val-split", 0.1, "--eval-every", 3]
    one = train(tmp_path / "one", "--gradient-accumulation-steps", 2, *flags)
    assert wait(*fork_two(lambda: train(tmp_path / "two", *flags))) == [0, 0]
    training = {*LOSSES[objective], "grad_norm", "latent_std"}
    validated = 0
    for a, b in zip(lines(one), lines(tmp_path / "two" / "run"), strict=True):
        if "loss" in a:
            assert a.keys() & {*LOSSES["ddpm"], *training} == training
        for name in a.keys() & {*training, "val_loss", "val_loss_bands"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)
        validated += "val_loss" in a
    assert validated == 2


def test_flow_resumes_exactly_and_its_weights_say_so(tmp_path):
    flags = ["--objective", "flow", "--sample-every", 3, "--ckpt-every", 3]
    whole = train(tmp_path / "whole", *flags)
    train(tmp_path / "parts", *flags, "--max-steps", 3)
    for words, others in {
        "objective was 'flow', now 'sit'": ["--objective", "sit"],
        "time_sampling was 'logit-normal', now 'uniform'": ["--time-sampling", "uniform"],
    }.items():
        with pytest.raises(InputError, match=words):
            train(tmp_path / "parts", *flags, *others, "--allow-changes")
    assert_same(train(tmp_path / "parts", *flags), whole)
    ema = load_checkpoint(whole)
    assert ema.metadata["objective"] == "flow" and ema.out_channels == ema.in_channels == 1


def test_two_processes_resume_exactly(tmp_path):
    """Both are killed in the middle of a log line's steps, after a checkpoint."""
    flags = ["--log-every", 4, "--ckpt-every", 3]
    killed = lambda: train_until_killed(3, tmp_path / "parts", *flags)
    assert wait(*fork_two(lambda: train(tmp_path / "whole", *flags))) == [0, 0]
    assert wait(*fork_two(killed)) == [-9, -9]
    assert wait(*fork_two(lambda: train(tmp_path / "parts", *flags))) == [0, 0]
    assert_same(tmp_path / "parts" / "run", tmp_path / "whole" / "run")


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"),
                    reason="FSDP of this PyTorch needs a GPU")
def test_ranks_of_fsdp_train_save_and_resume_as_those_of_ddp(tmp_path, monkeypatch, precision):
    """FSDP2 on two CPU processes: the same losses, and a resumed run equals a whole one."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    make = train_accelerate.make_accelerator

    def sharded(*args, **kwargs):
        # accelerate offers FSDP on GPUs alone; this says it to its state afterwards.
        accelerator = make(*args, **kwargs)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["DiTBlock"],
            cpu_ram_efficient_loading=False, state_dict_type="FULL_STATE_DICT",
        )
        if precision == "bf16":
            plugin.set_mixed_precision(precision)  # as accelerate does then
        for state in (AcceleratorState._shared_state, PartialState._shared_state):
            state |= dict(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
        return accelerator

    flags = ["--log-every", 1, "--ckpt-every", 3, "--mixed-precision", precision]
    flags += ["--grad-clip", 0] if precision == "bf16" else []
    assert wait(*fork_two(lambda: train(tmp_path / "ddp", *flags))) == [0, 0]
    monkeypatch.setattr(train_accelerate, "make_accelerator", sharded)
    assert wait(*fork_two(lambda: train(tmp_path / "fsdp", *flags))) == [0, 0]
    shutil.copytree(tmp_path / "fsdp", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "run" / "checkpoints" / "0000006")
    assert wait(*fork_two(lambda: train(tmp_path / "again", *flags))) == [0, 0]
    assert_same(tmp_path / "again" / "run", tmp_path / "fsdp" / "run")
    for a, b in zip(lines(tmp_path / "ddp" / "run"), lines(tmp_path / "fsdp" / "run"), strict=True):
        assert [a["loss"], a["grad_norm"]] == pytest.approx([b["loss"], b["grad_norm"]], rel=1e-5)


# --------------------------------------------------------------------------------- what a step does


def test_the_ema_moves_once_a_step_by_the_decay_that_warms_up(tmp_path):
    """From the saved weights of every step, with two micro-batches a step."""
    run = train(tmp_path, "--gradient-accumulation-steps", 2, "--ckpt-every", 1,
                "--keep-checkpoints", 9, "--ema-decay", 0.3)
    torch.manual_seed(0)
    name = "blocks.0.attn.qkv.weight"
    ema = build_dit("DiT-Ti/2", input_size=8, in_channels=1, num_classes=10).state_dict()[name]
    for step in range(6):
        d = min(0.3, (1 + step) / (10 + step))
        ema = d * ema + (1 - d) * weights(run, "model", step + 1)[name]
        assert torch.allclose(ema, weights(run, "ema", step + 1)[name], rtol=0, atol=1e-6)


def test_logged_losses_are_means_over_all_steps_and_micro_batches(tmp_path):
    each = lines(train(tmp_path / "each", "--log-every", 1))
    window = lines(train(tmp_path / "window", "--log-every", 6, "--gradient-accumulation-steps", 4))
    assert [line["step"] for line in window] == [6]
    for name in ("loss", "mse", "vb", "grad_norm", "latent_mean"):
        assert window[0][name] == pytest.approx(np.mean([line[name] for line in each]), rel=1e-4)


def test_each_epoch_takes_every_image_once_in_an_order_of_its_own():
    args = parse_args(["--global-batch-size", "4", "--mirror"])
    train_accelerate.fill_preset(args)
    reset_accelerate()
    accelerator = train_accelerate.make_accelerator()
    batches = list(train_accelerate.GlobalBatches(args, 10, 0, 50, accelerator))
    stream = list(itertools.chain(*batches))
    assert set(map(len, batches)) == {4} and 60 < sum(mirror for _, mirror in stream) < 140
    epochs = [tuple(index for index, _ in stream[i : i + 10]) for i in range(0, 200, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 20 and tuple(range(10)) not in epochs
    # A later start takes the same stream, from there on.
    later = list(train_accelerate.GlobalBatches(args, 10, 30, 50, accelerator))
    assert later == batches[30:]


def test_held_out_images_are_never_trained_on(tmp_path, monkeypatch, quick_evaluation):
    read_batches, seen = train_accelerate.read_batches, set()

    def watched(data, batches, *args, **settings):
        batches = list(batches)
        seen.update(int(data.rows[index]) for batch in batches for index, _ in batch)
        return read_batches(data, batches, *args, **settings)

    monkeypatch.setattr(train_accelerate, "read_batches", watched)
    flags = ["--val-split", 0.5, "--max-steps", 9, "--global-batch-size", 128, "--eval-every", 9]
    run = train(tmp_path, *flags)
    data, held = load_data("digits").hold_out(0.5)
    assert seen == set(data.rows) and not seen & set(held.rows) and len(held) > 800
    line = lines(run)[-2]
    assert line["val_loss"] == pytest.approx(np.mean(line["val_loss_bands"]))
    assert load_checkpoint(run).metadata["val_split"] == "0.5"
    with pytest.raises(InputError, match="val_split was '0.5', now '0.1'.*--run-name"):
        train(tmp_path, "--allow-changes")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_validation_sees_all_noise_levels_and_the_same_each_time(objective):
    """Five bands of times, from little noise to much, and images and noise of each image's own."""
    reset_accelerate()
    args = filled("--objective", objective, "--num-classes", 10)
    accelerator = train_accelerate.start_accelerator(args)
    vae, process = Autoencoder.load("none", channels=1), create_process(objective)
    ema = train_accelerate.build_network(args, vae, None)
    seen = []

    def losses(model, x, t, labels, noise):
        assert model is ema and labels.keys() == {"y"}
        seen.append((x, t, labels["y"], noise))
        return dict(loss=t / 1000 if objective == "ddpm" else 1 - t)

    process.training_losses = losses
    held = load_data("digits").select(range(70))
    measure = lambda part: train_accelerate.validation_loss(
        args, part, ema, vae, process, accelerator)
    bands = measure(held)["val_loss_bands"]
    assert [int(5 * band) for band in bands] == [0, 1, 2, 3, 4]
    x, _, y, noise = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert torch.equal(x[::5], vae.encode(torch.stack([image for image, _ in held])))
    assert y[::5].tolist() == held.labels.tolist()
    assert len(noise.flatten(1).unique(dim=0)) == 350 and abs(float(noise.std()) - 1) < 0.02
    # An image's times and noise hang neither on the others nor on the batch.
    assert measure(held) == measure(held)
    seen.clear()
    measure(held.select([40]))
    assert torch.equal(seen[0][3], noise[200:205])


@pytest.mark.long
def test_the_validation_loss_rises_where_a_network_learns_images_by_heart(tmp_path, monkeypatch):
    """On 100 digits, not on 1,500."""
    found = {}
    for count, steps in ((100, 2500), (1500, 1000)):
        def part(*args, count=count):
            data, held = load_data("digits").hold_out(0.1)
            return data.select(range(count)), held

        monkeypatch.setattr(train_accelerate, "split_off", part)
        monkeypatch.setattr(train_accelerate.Previews, "draw", lambda *args: None)
        run = train(tmp_path / str(count), "--val-split", 0.1, "--max-steps", steps, "--lr", 0.004,
                    "--global-batch-size", 32, "--log-every", 250, "--sample-every", 250)
        found[count] = [line["val_loss"] for line in lines(run) if "val_loss" in line]
    # On two cores 100 digits gave 0.1206 after 1,250 steps, and from there on more and more.
    assert found[100][-1] > 1.03 * min(found[100]) > 1.03 * min(found[1500]), found
    assert found[1500][-1] < 1.02 * min(found[1500]), found


def test_without_a_limit_gradients_are_measured_and_left_as_they_are(tmp_path, monkeypatch):
    limited = lines(train(tmp_path / "limited", "--grad-clip", 1e9, "--log-every", 1))
    monkeypatch.delattr("accelerate.Accelerator.clip_grad_norm_")
    free = lines(train(tmp_path / "free", "--grad-clip", 0, "--log-every", 1))
    for a, b in zip(limited, free, strict=True):
        assert (a["loss"], a["grad_norm"]) == (b["loss"], b["grad_norm"])


def test_gradients_lie_in_the_memory_that_processes_sum(monkeypatch):
    reset_accelerate()
    accelerator = train_accelerate.start_accelerator(filled())
    assert accelerator.ddp_handler.to_kwargs()["gradient_as_bucket_view"]


def test_learning_rate_warms_up_by_the_step(tmp_path):
    run = train(tmp_path, "--log-every", 1, "--warmup-steps", 4, "--lr", 0.004)
    rates = [line["lr"] for line in lines(run)]
    assert rates == pytest.approx([0.001, 0.002, 0.003, 0.004, 0.004, 0.004])


def test_previews_leave_training_as_it_is_and_keep_the_best(tmp_path, whole_run, quick_evaluation):
    run = train(tmp_path, *PREVIEWS)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, weights(whole_run)[name])
    assert {path.name for path in (run / "samples").iterdir()} == {"0000003.png", "0000006.png"}
    figures = {line["step"]: line["fd"] for line in lines(run) if "fd" in line}
    assert list(figures) == [2, 4, 6]
    best = load_checkpoint(run / "best.safetensors")
    assert best.metadata["step"] == min(figures, key=figures.get)
    assert best.metadata["fd"] == min(figures.values())
    assert checkpoints(run) == ["0000004", "0000006"]


def test_two_processes_draw_the_grid_of_one(tmp_path):
    flags = "--sample-every", 3, "--max-steps", 3
    train(tmp_path / "one", *flags)
    assert wait(*fork_two(lambda: train(tmp_path / "two", *flags))) == [0, 0]
    paths = (tmp_path / name / "run" / "samples" / "0000003.png" for name in ("one", "two"))
    one, two = (np.asarray(Image.open(path)).astype(int) for path in paths)
    assert one.shape == two.shape and np.abs(one - two).max() <= 2 and one.std() > 20


def test_bfloat16_keeps_weights_in_float32_and_losses_near(tmp_path, whole_run, quick_evaluation):
    run = train(tmp_path, "--mixed-precision", "bf16", "--gradient-checkpointing", *PREVIEWS)
    reset_accelerate()
    assert {tensor.dtype for tensor in weights(run, "ema").values()} == {torch.float32}
    a, b = ([line["loss"] for line in lines(folder) if "loss" in line][-1]
            for folder in (run, whole_run))
    assert a != b and a == pytest.approx(b, rel=0.02) and lines(run)[-1]["dtype"] == "bf16"


def test_the_tracker_gets_what_the_log_gets_once(tmp_path, monkeypatch, quick_evaluation):
    """Its numbers and pictures, also of a run that resumes before its last line."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    started = []
    init = accelerate.Accelerator.init_trackers

    def watched(accelerator, name, shown, options):
        started.append(options["wandb"])
        init(accelerator, name, shown, options)

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", watched)
    flags = ["--tracker", "tensorboard", "--log-every", 1, "--sample-every", 3, "--eval-every", 3,
             "--eval-samples", 8]
    run = train(tmp_path, *flags, "--max-steps", 5)
    shutil.rmtree(run / "checkpoints" / "0000005")
    train(tmp_path, *flags)
    events = EventAccumulator(str(run / "run")).Reload()
    for name in ("loss", "val_loss"):
        logged = [(line["step"], pytest.approx(line[name])) for line in lines(run) if name in line]
        assert [(scalar.step, scalar.value) for scalar in events.Scalars(name)] == logged
    assert [scalar.step for scalar in events.Scalars("val_loss_bands/4")] == [3, 6]
    for name in ("samples", "curves"):
        assert [image.step for image in events.Images(name)] == [3, 6]
    # W&B is told that it is the same run.
    assert started[0] == started[1] and started[1]["resume"] == "allow"


@pytest.mark.slow
def test_a_compiled_network_saves_the_same_names_and_resumes(tmp_path, whole_run):
    train(tmp_path, "--compile", "--max-steps", 3)
    run = train(tmp_path, "--compile")
    assert not torch._dynamo.config.optimize_ddp
    assert result(run)[1].keys() == result(whole_run)[1].keys()
    assert lines(run)[-1]["loss"] == pytest.approx(lines(whole_run)[-1]["loss"], rel=1e-4)


# ----------------------------------------------------------------------------- when things go wrong


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_state_and_exits_with_its_number(
    tmp_path, number, monkeypatch, capfd, whole_run,
):
    original = train_accelerate.update_ema

    def signalled(ema, network, decay, step):
        original(ema, network, decay, step)
        if step == 2 and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), number)

    monkeypatch.setattr(train_accelerate, "update_ema", signalled)
    handler = signal.getsignal(number)
    with pytest.raises(SystemExit) as stop:
        train(tmp_path)
    assert stop.value.code == 128 + number and signal.getsignal(number) == handler
    assert f"stopped by {number.name}" in capfd.readouterr().out
    assert checkpoints(tmp_path / "run") == ["0000002", "0000003"]
    run = train(tmp_path)
    assert result(run)[2] == result(whole_run)[2]


def test_a_signal_to_one_of_two_processes_stops_both(tmp_path):
    pids = fork_two(lambda: slow_train(tmp_path, "--max-steps", 1000))
    wait_for(tmp_path / "run" / "checkpoints" / "0000004")
    os.kill(pids[1], signal.SIGTERM)
    assert wait(*pids) == [143, 143]


def wait_for(path, seconds=300):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"no {path}"
        time.sleep(0.02)


def test_killing_one_of_two_processes_ends_the_other(tmp_path):
    pids = fork_two(lambda: train(tmp_path, "--max-steps", 100000))
    wait_for(tmp_path / "run" / "checkpoints" / "0000004")
    os.kill(pids[1], signal.SIGKILL)
    began = time.time()
    statuses = wait(*pids)
    assert statuses[1] == -9 and statuses[0] != 0 and time.time() - began < 20


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    first = fork(lambda: slow_train(tmp_path, "--max-steps", 1000, "--num-workers", 1))
    wait_for(tmp_path / "run" / "checkpoints" / "0000002")
    with pytest.raises(InputError, match="another process trains in"):
        train(tmp_path)
    os.kill(first, signal.SIGKILL)
    assert wait(first) == [-9]
    # At once, though the dead process's worker may still be there.
    train(tmp_path, "--num-workers", 0)


def test_other_settings_are_refused_allowed_or_free(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(InputError, match=r"lr was 0.002, now 0.1.*--allow-changes"):
        train(tmp_path, "--lr", 0.1)
    with pytest.raises(InputError, match=r"class_dropout_prob was 0.1, now 0.2.*--run-name"):
        train(tmp_path, "--class-dropout-prob", 0.2, "--allow-changes")
    config = tmp_path / "run" / "config.json"
    assert json.loads(config.read_text())["lr"] == 0.002
    run = train(tmp_path, "--lr", 0.1, "--allow-changes", "--max-steps", 7, "--num-workers", 1)
    assert json.loads(config.read_text())["lr"] == 0.1 and lines(run)[-1]["lr"] == 0.1


def test_a_signal_while_scoring_ends_at_once_and_says_how_to_score(
    tmp_path, monkeypatch, capfd, quick_evaluation,
):
    monkeypatch.setattr(train_accelerate, "evaluate_model",
                        lambda *args, **settings: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit) as stop:
        train(tmp_path, "--eval-every", 3, "--eval-samples", 4)
    printed = capfd.readouterr().out
    assert stop.value.code == 130 and checkpoints(tmp_path / "run")[-1] == "0000003"
    assert f"to score alone: accelerate launch evaluate.py --ckpt {tmp_path / 'run'}" in printed


def test_an_error_of_one_process_does_not_wait_for_the_others(tmp_path):
    """Not even for the end of their group, which may take hours."""
    def fail():
        torch.distributed.destroy_process_group = lambda: time.sleep(1000)
        original = train_accelerate.update_ema

        def update(*args):
            if os.environ["RANK"] == "1":
                raise dit.RankLocalError("a broken image, say")
            original(*args)

        train_accelerate.update_ema = update
        train(tmp_path)

    statuses = wait(*fork_two(fail))
    assert statuses[1] == 2 and statuses[0] != 0


@pytest.mark.parametrize(("error", "status", "words"), [
    ("dit.RankLocalError('a broken image')", 2, "error: a broken image"),
    ("ZeroDivisionError", 1, "ZeroDivisionError"), ("SystemExit(143)", 143, ""),
    ("RuntimeError('[/gloo/gloo/transport/tcp/pair.cc:545] Connection reset by peer')", 1,
     "error: another process of this run has ended, or cannot be reached\n"),
    ("dit.torch.distributed.DistBackendError('NCCL: remote process exited')", 1,
     "error: another process of this run has ended, or cannot be reached\n")])
def test_one_of_several_processes_prints_and_is_gone(error, status, words):
    """Whatever would wait at Python's end for the others."""
    code = f"""
import atexit, time, dit
atexit.register(time.sleep, 1000)
def main(args):
    raise {error}
dit.run_command(main)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                           timeout=300, env=os.environ | dict(WORLD_SIZE="2", RANK="1"))
    assert ended.returncode == status and words in ended.stderr
    assert ("Traceback" in ended.stderr) == (error == "ZeroDivisionError")


def test_steps_not_finite_are_no_part_of_a_mean():
    """Nor do they make it 0: test_faults.py has a line without any other step."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gradient_accumulation_steps=1, num_processes=1, scaler=None,
        reduce=lambda tensor, how: tensor)
    means = train_accelerate.RunningMeans(("loss",), accelerator)
    for step, loss in enumerate([1.0, math.nan, 4.0, math.inf]):
        means.add(dict(loss=torch.full((2,), loss)), torch.ones(2, 1, 8, 8))
        assert bool(means.end_step(step, torch.tensor(2.0))) == math.isfinite(loss)
    line = means.take()
    assert (line["loss"], line["grad_norm"], line["skipped_steps"]) == (2.5, 2.0, 2)


def test_overflows_of_float16_are_counted_and_no_loss_of_zero_is_logged():
    scale = [2.0]
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gradient_accumulation_steps=1, num_processes=1,
        scaler=SimpleNamespace(get_scale=lambda: scale[0]), reduce=lambda tensor, how: tensor)
    means = train_accelerate.RunningMeans(("loss",), accelerator)
    checkpoints = SimpleNamespace(last_good=lambda: "none")
    for step, norm in enumerate([math.inf, math.nan]):
        means.add(dict(loss=torch.ones(2)), torch.ones(2, 1, 8, 8))
        assert means.end_step(step, torch.tensor(norm))  # the scaler skips it by itself
    means.check(0, None, checkpoints)
    line = means.take()
    assert line["loss"] is None and line["overflowed_steps"] == 2 and line["skipped_steps"] == 0
    scale[0] = 0.5
    with pytest.raises(InputError, match="scale fell to 0.5: use --mixed-precision bf16"):
        means.check(0, None, checkpoints)


@pytest.mark.parametrize(
    "name", ["ema.safetensors", "model.safetensors", "optimizer.pt", "state.json"])
@pytest.mark.parametrize("harm", ["middle", "cut", "empty", "gone"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_used(
    tmp_path, whole_run, name, harm, capfd,
):
    shutil.copytree(whole_run, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "0000006" / name
    path.unlink() if harm == "gone" else damage(path, harm)
    run = train(tmp_path)
    assert "0000006 is damaged" in capfd.readouterr().err
    shutil.rmtree(run / "checkpoints" / "damaged-0000006")
    assert_same(run, whole_run)


def test_damage_to_all_checkpoints_is_refused_and_nothing_touched(tmp_path, whole_run):
    shutil.copytree(whole_run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "model.safetensors").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(InputError, match="no checkpoint in .* is whole"):
            train(tmp_path)


def test_a_disk_that_fills_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    original = dit.save_file

    def full(tensors, path, metadata=None):
        if ".0000004.tmp/.model" in str(path):
            Path(path).write_bytes(b"part")
            raise OSError(28, "No space left on device")
        original(tensors, path, metadata)

    monkeypatch.setattr(dit, "save_file", full)
    words = r"cannot write .*0000004.*No space left.*last good checkpoint is .*0000002"
    with pytest.raises(InputError, match=words):
        train(tmp_path)
    assert checkpoints(tmp_path / "run") == ["0000002"]


def filled(*flags):
    """The settings of these flags, before the data are known."""
    args = parse_args([str(flag) for flag in flags])
    train_accelerate.fill_preset(args)
    return args


@pytest.mark.parametrize(("flags", "expected"), [
    ([], dict(model="DiT-Ti/2", image_size=8, vae="none", lr=4e-3, ema_decay=0.995,
              max_steps=1000)),
    (["--data-path", "x"], dict(model="DiT-XL/2", image_size=256, vae="ema", lr=1e-4, epochs=1400)),
    (["--data-path", "x", "--model", "DiT-Ti/2"],
     dict(image_size=256, vae="ema", lr=4e-3, max_steps=600, epochs=None, grad_clip=1.0)),
    (["--model", "DiT-S/8"], dict(image_size=8, vae="none", lr=1e-4, global_batch_size=256)),
    (["--objective", "flow"], dict(time_sampling="logit-normal")),
    (["--max-steps", 5, "--model", "DiT-B/2"], dict(epochs=None, max_steps=5)),
    (["--epochs", 2], dict(model="DiT-Ti/2", epochs=2, max_steps=None)),
    (["--data-path", "x", "--lr", 0.5], dict(lr=0.5, global_batch_size=256, ema_decay=0.9999)),
])
def test_the_recipe_follows_the_network_and_sizes_the_data(flags, expected):
    args = vars(filled(*flags))
    assert {name: args[name] for name in expected} == expected


@pytest.mark.parametrize(("flags", "logs", "saves", "scores", "samples", "reference"), [
    # As many evaluations of the network as the training: 3 an image, 40 or 20 a guided sample.
    (["--max-steps", 40], 2, 4, 40, 3 * 128 * 40 // 40, 1797),
    (["--max-steps", 1000], 50, 100, 1000, 500, 1797),
    (["--max-steps", 40, "--cfg-scale", 1], 2, 4, 40, 500, 1797),
    (["--max-steps", 40, "--eval-samples", 900], 2, 4, 40, 900, 1797),
    (["--max-steps", 4, "--global-batch-size", 16], 1, 1, 4, 4, 40),
    (["--max-steps", 1, "--global-batch-size", 16], 1, 1, 0, 0, 1797),
    (["--max-steps", 90_000, "--model", "DiT-S/8"], 100, 9000, 50_000, 1797, 1797),
])
def test_intervals_and_scores_follow_the_length_of_the_run(
    flags, logs, saves, scores, samples, reference, quick_evaluation,
):
    reset_accelerate()
    args = filled("--results-dir", "nowhere", *flags)
    accelerator = train_accelerate.start_accelerator(args)
    data, vae = load_data("digits"), Autoencoder.load("none", channels=1)
    train_accelerate.fit_to_data(args, data, None, vae, Path("nowhere"), accelerator)
    ema = train_accelerate.build_network(args, vae, None)
    process = create_process(args.objective)
    ema.metadata = train_accelerate.describe(args, data, vae, process)
    log = train_accelerate.Log(Path("nowhere"), accelerator)
    previews = train_accelerate.Previews(args, ema, vae, process, data, None, log, accelerator)
    assert (args.log_every, args.ckpt_every) == (logs, saves)
    assert args.sample_every == max(10, saves)
    assert (args.eval_every, args.eval_samples) == (scores, samples)
    assert len(previews.compared) == reference


def test_the_paper_keeps_its_intervals():
    args = filled("--data-path", "x")
    assert train_accelerate.count_steps(args, 1_281_167) == 7_006_383
    for row in train_accelerate.ROWS:
        value = row.recipes["paper"]
        if isinstance(value, train_accelerate.PerRun):
            assert value.most == {"log_every": 100}.get(row.dest, 50_000)
            assert 7_006_383 / value.times > value.most
    assert train_accelerate.count_steps(filled("--epochs", 2), 1797) == math.ceil(2 * 1797 / 128)


def test_every_setting_says_what_a_change_means_and_the_help_speaks_english(capsys):
    assert {row.resume for row in train_accelerate.ROWS} == {"fixed", "asked", "free"}
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"{row.name} " in text for row in train_accelerate.ROWS)
    assert "None" not in text and "False" not in text and "True" not in text


def test_weights_say_what_they_are_and_where_their_data_lie(tmp_path, shelf, monkeypatch):
    """The raw weights load as the EMA does, with the same config and metadata."""
    monkeypatch.chdir(shelf)
    flags = ["--data-path", "data", "--vae", "none", "--image-size", 16, "--model", "DiT-Ti/2"]
    run = train(tmp_path, *flags, "--num-workers", 0, "--max-steps", 2)
    files = run / "checkpoints" / "0000002"
    model, ema = (load_checkpoint(files / f"{name}.safetensors") for name in ("model", "ema"))
    assert model.config == ema.config and model.metadata == ema.metadata
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, load_file(files / "model.safetensors")[name])
    assert model.metadata["data_path"] == str(shelf / "data") and model.metadata["step"] == 2
    assert model.metadata["objective"] == "ddpm" and "image_column" not in model.metadata


# ----------------------------------------------------------------------------- whose files they are


def grow(folder, *names):
    """Files with text in them; returns what they hold."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"a person's {name}")
    return {folder / name: (folder / name).read_text() for name in names}


def test_only_names_of_its_own_are_removed_from_a_cache(tmp_path, shelf, small_shards):
    """Not a person's files, nor those that another run is writing at this moment."""
    theirs = grow(tmp_path / "cache", ".tmp_drawings/1.txt", "app/deep/.env.tmpl", ".notes.tmp.txt",
                  ".tmpABCDEF", "sub/.index.json.999999999.tmp.json", ".index.json.tmp.json",
                  f".moments-00001.safetensors.{os.getppid()}.tmp.safetensors")
    dead = grow(tmp_path / "cache", ".moments-00001.safetensors.999999999.tmp.safetensors",
                ".index.json.999999998.tmp.json")
    cached(tmp_path, shelf, "--max-steps", 1)
    assert {path: path.read_text() for path in theirs} == theirs
    assert not [path for path in dead if path.exists()]


def test_only_names_of_its_own_are_removed_from_a_run(tmp_path, whole_run, capfd):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    for name in ("0000002-keep", "1-best-so-far", "best", "4"):
        shutil.copytree(run / "checkpoints" / "0000006", run / "checkpoints" / name)
    (run / "checkpoints" / "0000099").symlink_to("best")
    theirs = grow(run, ".tmp_drawings/1.txt", ".notes.tmp.txt", "samples/.0000004.png.tmp",
                  "checkpoints/.mine.tmp/1.txt", "checkpoints/1-best-so-far/notes.txt")
    left = grow(run, ".best.safetensors.123.tmp.safetensors", ".tmpTYjvfW",
                "samples/.0000004.png.123.tmp.png", "checkpoints/.0000006.tmp/.tmpTYjvfW",
                "checkpoints/.damaged-0000006.old.tmp/optimizer.pt")
    train(tmp_path, "--max-steps", 10, "--keep-checkpoints", 1)
    kept = {"0000010", "0000002-keep", "1-best-so-far", "best", "4", ".mine.tmp", "0000099"}
    assert set(checkpoints(run)) == kept and "damaged" not in capfd.readouterr().err
    assert {path: path.read_text() for path in theirs} == theirs
    assert not [path for path in left if path.exists() or path.parent.name.endswith(".tmp")
                and path.parent.exists()]


def test_a_checkpoint_that_was_moved_and_linked_back_is_resumed_from(tmp_path, whole_run):
    """Rotation takes the link, and not what it leads to."""
    run, moved = tmp_path / "run", tmp_path / "disk" / "0000006"
    shutil.copytree(whole_run, run)
    shutil.move(run / "checkpoints" / "0000006", moved)
    (run / "checkpoints" / "0000006").symlink_to(moved)
    theirs = {path: path.read_bytes() for path in moved.iterdir()}
    train(tmp_path, "--max-steps", 7, "--keep-checkpoints", 2)
    assert lines(run)[-1]["step"] == 7 and checkpoints(run) == ["0000006", "0000007"]
    train(tmp_path, "--max-steps", 8, "--keep-checkpoints", 1)
    assert checkpoints(run) == ["0000008"]
    assert {path: path.read_bytes() for path in moved.iterdir()} == theirs


# -------------------------------------------------------------------------------------- fine-tuning


def test_init_takes_the_weights_and_makes_a_new_label_table(tmp_path, capfd):
    given = build_dit("DiT-Ti/2", input_size=16, in_channels=1, num_classes=4)
    gates = given.blocks[1].adaLN_modulation[-1].weight
    torch.nn.init.normal_(gates)
    save_checkpoint(tmp_path / "given.safetensors", given)
    run = train(tmp_path, "--init", tmp_path / "given.safetensors", "--lr", 0, "--max-steps", 2)
    assert "label table is new, 11 rows in place of 5" in capfd.readouterr().err
    found = weights(run, "ema", 2)
    assert torch.equal(found["blocks.1.adaLN_modulation.1.weight"], gates)
    assert found["pos_embed"].shape == (1, 16, 96)
    assert found["y_embedder.embedding_table.weight"].shape == (11, 96)
    (tmp_path / "given.safetensors").unlink()
    # It resumes from its own checkpoint.
    train(tmp_path, "--init", tmp_path / "given.safetensors", "--lr", 0)


@pytest.mark.parametrize(("given_by", "trained", "words"), [
    (True, "flow", "variance is left out"), (False, "ddpm", "variance is new, zero")])
def test_init_fits_the_final_layer_to_the_objective(tmp_path, given_by, trained, words, capfd):
    given = build_dit("DiT-Ti/2", input_size=8, in_channels=1, num_classes=10, learn_sigma=given_by)
    torch.nn.init.normal_(given.final_layer.linear.weight)
    save_checkpoint(tmp_path / "given.safetensors", given)
    train(tmp_path, "--init", tmp_path / "given.safetensors", "--lr", 0, "--max-steps", 2,
          "--objective", trained)
    assert words in capfd.readouterr().err
    found = load_checkpoint(tmp_path / "run")
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([1, 10])
    assert torch.equal(found(x, t, y)[:, :1], given.eval()(x, t, y)[:, :1])


@pytest.mark.parametrize("flags", [[], ["--objective", "flow", "--grad-clip", 0]])
def test_a_batch_that_does_not_fit_is_cut_and_stays_the_same_batch(tmp_path, monkeypatch, flags):
    """A network that has no memory for more than two images; the run equals one cut by hand."""
    by_hand = train(tmp_path / "hand", "--gradient-accumulation-steps", 4, *flags)
    forward, sizes = dit.DiT.forward, []

    def small(network, x, t, y, drop=None):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(network, x, t, y, drop)

    monkeypatch.setattr(dit.DiT, "forward", small)
    monkeypatch.setattr(train_accelerate, "TRIED", ("cpu",))
    train(tmp_path / "auto", "--max-steps", 3, *flags)
    assert sizes[:4] == [8, 4, 2, 2]
    sizes.clear()
    run = train(tmp_path / "auto", *flags)
    assert set(sizes) == {2} and len(sizes) == 12  # no trial when it resumes
    assert json.loads((run / "config.json").read_text())["gradient_accumulation_steps"] == 4
    tensors, expected = result(run)[1], result(by_hand)[1]
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_two_processes_agree_on_the_parts_of_a_batch(tmp_path, monkeypatch):
    """Only one of them is short of memory; and where no image fits a line says what helps."""
    forward = dit.DiT.forward

    def small(network, x, t, y, drop=None):
        if len(x) > (4 if os.environ["RANK"] == "0" else 1):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return forward(network, x, t, y, drop)

    monkeypatch.setattr(dit.DiT, "forward", small)
    monkeypatch.setattr(train_accelerate, "TRIED", ("cpu",))
    assert wait(*fork_two(lambda: train(tmp_path, "--max-steps", 2))) == [0, 0]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["gradient_accumulation_steps"] == 4

    def none(*args, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(dit.DiT, "forward", none)
    with pytest.raises(InputError, match="^not even one image fits: .*--gradient-checkpointing"):
        train(tmp_path, "--run-name", "other")


# --------------------------------------------------------------------------------- the latent cache


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A folder with 23 small pictures in two class folders, and a VAE with a scale and a shift."""
    folder = tmp_path_factory.mktemp("shelf")
    pictures(folder / "data", 23, 20)
    save_vae(folder / "vae", scaling_factor=0.5, shift_factor=0.1)
    return folder


@pytest.fixture
def broken(shelf, tmp_path):
    """A copy of that folder with a picture that is none."""
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    (tmp_path / "data" / "a" / "004.png").write_bytes(b"no picture")
    return tmp_path


def cached(folder, shelf, *flags):
    train_accelerate.open_shard.cache_clear()
    return train(
        folder, "--data-path", shelf / "data", "--vae", shelf / "vae", "--image-size", 16,
        "--model", "DiT-Ti/2", "--num-workers", 0, "--latent-cache", Path(folder) / "cache", *flags,
    )


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(train_accelerate.LatentCache, "SHARD", 6)


def tree(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_training_from_the_cache_is_training_from_the_pictures(tmp_path, shelf, small_shards):
    run = cached(tmp_path / "with", shelf)
    names = ["index.json", *(f"moments-0000{i}.safetensors" for i in range(4))]
    assert sorted(tree(tmp_path / "with" / "cache")) == names
    index = json.loads((tmp_path / "with" / "cache" / "index.json").read_text())
    assert index["count"] == 23 and index["counts"] == [6, 6, 6, 5] and index["broken"] == []
    without = train(
        tmp_path / "without", "--data-path", shelf / "data", "--vae", shelf / "vae",
        "--image-size", 16, "--model", "DiT-Ti/2", "--num-workers", 2)
    for a, b in zip(lines(run), lines(without), strict=True):
        assert [a["loss"], a["latent_std"]] == pytest.approx([b["loss"], b["latent_std"]], rel=1e-3)


def test_a_cache_built_by_two_and_through_kills_is_the_same(tmp_path, shelf, small_shards):
    cached(tmp_path / "whole", shelf, "--max-steps", 1)
    whole = tree(tmp_path / "whole" / "cache")

    def killed(write):
        die_at(write)
        cached(tmp_path / "killed", shelf, "--max-steps", 1)

    statuses = [wait(fork(lambda n=n: killed(n)))[0] for n in (2, 3, 4, 100)]
    assert statuses == [-9, -9, -9, 0]
    assert tree(tmp_path / "killed" / "cache") == whole
    assert wait(*fork_two(lambda: cached(tmp_path / "two", shelf, "--max-steps", 1))) == [0, 0]
    assert tree(tmp_path / "two" / "cache") == whole


def test_a_cache_of_something_else_or_damaged_is_refused(tmp_path, shelf, small_shards):
    cached(tmp_path, shelf, "--max-steps", 1)
    cache = tmp_path / "cache"
    shutil.copytree(shelf / "vae", shelf / "other", dirs_exist_ok=True)
    tensors = load_file(shelf / "other" / "diffusion_pytorch_model.safetensors")
    tensors = {name: tensor + (name == "quant_conv.bias") for name, tensor in tensors.items()}
    save_file(tensors, shelf / "other" / "diffusion_pytorch_model.safetensors")
    others = {"image_size was 16, now 8": ["--image-size", 8],
              "vae_weights": ["--vae", shelf / "other"]}
    for words, flags in others.items():
        before = tree(cache)
        with pytest.raises(InputError, match=words):
            cached(tmp_path, shelf, "--run-name", "new", *flags)
        assert tree(cache) == before
    shard = cache / "moments-00002.safetensors"
    data = bytearray(shard.read_bytes())
    data[-2000] ^= 1
    shard.unlink()  # a new file: workers may still read the old one's memory
    shard.write_bytes(data)
    for workers in (0, 1):
        words = "^[^\n]*moments-00002.safetensors is damaged: delete it[^\n]*$"
        with pytest.raises(InputError, match=words):
            cached(tmp_path, shelf, "--max-steps", 9, "--num-workers", workers)
        end_workers()
    shard.unlink()
    shard.write_bytes(data[:-5])
    with pytest.raises(InputError, match="moments-00002.safetensors is damaged"):
        cached(tmp_path, shelf, "--max-steps", 9)
    shard.unlink()
    cached(tmp_path, shelf, "--max-steps", 9)
    (cache / "index.json").write_text("{")
    with pytest.raises(InputError, match="index.json is damaged"):
        cached(tmp_path, shelf, "--max-steps", 9)


def test_broken_images_are_named_and_left_out_up_to_a_limit(
    tmp_path, broken, small_shards, capfd,
):
    with pytest.raises(InputError, match="1 images cannot be read, more than --max-broken 0.*"):
        cached(tmp_path, broken, "--max-broken", 0)
    cached(tmp_path, broken)
    assert "1 broken images are left out" in capfd.readouterr().out
    index = json.loads((tmp_path / "cache" / "index.json").read_text())
    assert index["count"] == 22 and index["counts"] == [5, 6, 6, 5] and index["broken"][0][0] == 2
    assert "004.png" in index["broken"][0][1]
    with pytest.raises(InputError, match="^[^\n]*004.png[^\n]*$"):
        train(tmp_path, "--data-path", broken / "data", "--vae", "none", "--image-size", 16,
              "--model", "DiT-Ti/2", "--run-name", "direct", "--num-workers", 1)


def test_a_command_with_workers_ends_when_it_fails(broken):
    """The workers outlive SIGTERM, with which Python ends its processes and then waits for them."""
    command = [sys.executable, ROOT / "train_accelerate.py", "--data-path", "data", "--vae", "none",
               "--image-size", 8, "--model", "DiT-Ti/2", "--global-batch-size", 8,
               "--num-workers", 2, "--eval-samples", 0]
    words = [str(word) for word in command]
    ended = subprocess.run(words, cwd=broken, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and "004.png" in ended.stderr.splitlines()[-1]


# -------------------------------------------------------------------------------- what people bring


OWN = ["--vae", "none", "--image-size", 8, "--model", "DiT-Ti/2", "--num-workers", 0]


def grow_classes(folder, *names, count=3, value=0):
    """A folder per class of small shelf, of the same names in each."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((9, 9, 3), (value + 40 * number + i) % 256, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_data_and_vae_are_known_by_what_they_hold(tmp_path, shelf, monkeypatch):
    """However their paths are spelled, and wherever they are moved."""
    shutil.copytree(shelf, tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    paths = ["here/data", "./here/data/", tmp_path / "here" / "data", "there/data"]
    for step, path in enumerate(paths, start=1):
        if step == 4:
            os.rename("here", "there")
        vae = Path(path).parent / "vae"
        run = train(tmp_path, "--data-path", path, "--vae", vae, "--image-size", 16, "--model",
                    "DiT-Ti/2", "--num-workers", 0, "--max-steps", step)
    assert lines(run)[-1]["step"] == 4
    metadata = load_checkpoint(run).metadata
    assert metadata["vae"] == str(tmp_path / "there" / "vae")
    assert metadata["data_path"] == str(tmp_path / "there" / "data")


@pytest.mark.parametrize("harm", ["renamed", "swapped", "new label"])
def test_other_data_under_the_same_path_are_refused(tmp_path, harm):
    data = grow_classes(tmp_path / "data", "ant", "bee", "cat")
    train(tmp_path, "--data-path", data, *OWN, "--max-steps", 1)
    if harm == "renamed":
        os.rename(data / "ant", data / "dog")
    elif harm == "swapped":
        shutil.rmtree(data)
        grow_classes(data, "ant", "bee", "cat", value=7)
    else:
        os.rename(data / "ant" / "0.png", data / "bee" / "3.png")
    with pytest.raises(InputError, match="data was .*, now .*: --allow-changes"):
        train(tmp_path, "--data-path", data, *OWN)


def test_a_cache_of_other_pictures_with_equal_names_and_counts_is_refused(tmp_path, shelf):
    shutil.copytree(shelf / "vae", tmp_path / "vae")
    for version in (1, 2):
        grow_classes(tmp_path / f"v{version}" / "data", "ant", "bee", value=version)
    make = lambda version: train(
        tmp_path, "--data-path", tmp_path / version / "data", "--vae", tmp_path / "vae",
        "--image-size", 8, "--model", "DiT-Ti/2", "--num-workers", 0, "--latent-cache",
        tmp_path / "cache", "--max-steps", 1, "--run-name", version)
    make("v1")
    with pytest.raises(InputError, match="of another latent cache"):
        make("v2")


@pytest.mark.parametrize("split", [[], ["--val-split", 0.4]])
def test_what_the_cache_left_out_is_left_out_elsewhere(tmp_path, broken, small_shards, split):
    """Of scores and of the held-out images; the cache is one, whatever is held out."""
    cached(tmp_path, broken, "--max-steps", 1)
    run = cached(tmp_path, broken, "--max-steps", 1, "--eval-every", 1, "--eval-samples", 4,
                 "--run-name", "run2", *split).with_name("run2")
    whole, scores = load_data(str(broken / "data"), 16), lines(run)[-1]
    data, held = whole.without([2]).hold_out(0.4) if split else (whole.without([2]), [])
    assert (scores["num_reference"], len(held) > 4) == (len(data), bool(split))
    assert load_checkpoint(run).metadata["left_out"] == [2]
    assert ("fdr" in scores) == bool(split) == ("val_loss" in lines(run)[-2])

    # Each image's own label and moments, in the order of the data.
    shards = sorted((tmp_path / "cache").glob("moments-*"))
    cache = train_accelerate.LatentCache(shards, [5, 6, 6, 5], [2])
    part, vae = cache.part(whole.hold_out(0.4)[0] if split else whole), Autoencoder.load(
        str(broken / "vae"))
    assert len(part) == len(data)
    for index in range(len(data)):
        moments, label = part[index, False]
        assert label == data[index][1]
        assert torch.allclose(moments.float(), vae.encode(data[index][0][None])[0], atol=1e-2)


def test_a_cache_of_nothing_but_broken_images_is_one_line(tmp_path, shelf):
    shutil.copytree(shelf, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "data").rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(InputError, match="none of the 23 images can be read: .*png"):
        cached(tmp_path, tmp_path)


def test_four_pictures_and_more_classes_than_they_have(tmp_path):
    data = grow_classes(tmp_path / "data", "ant", "bee", "cat", "dog", count=1)
    run = train(tmp_path, "--data-path", data, *OWN, "--num-classes", 6, "--max-steps", 2,
                "--sample-every", 2, "--eval-every", 2, "--eval-samples", 4)
    assert {"fd", "kid", "precision"} <= lines(run)[-1].keys() and "density" not in lines(run)[-1]
    names = load_checkpoint(run).metadata["class_names"]
    assert names == ["ant", "bee", "cat", "dog", "4", "5"]
    assert (run / "samples" / "0000002.png").exists()


def test_gray_pictures_train_one_channel_and_weights_in_colour_do_not_fit(tmp_path, capfd):
    for path in grow_classes(tmp_path / "data", "ant", "bee").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    flags = ["--data-path", tmp_path / "data", *OWN, "--max-steps", 1]
    run = train(tmp_path, *flags)
    assert load_checkpoint(run).in_channels == 1
    assert "all images are gray" in capfd.readouterr().out
    # A run of three channels can't be resumed with one.
    config = run / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(channels=3)))
    with pytest.raises(InputError, match=r"\(channels was 3, now 1\): give another --run-name"):
        train(tmp_path, *flags)
    given = build_dit("DiT-Ti/2", input_size=8, in_channels=3, num_classes=2)
    save_checkpoint(tmp_path / "given.safetensors", given)
    with pytest.raises(InputError, match="in_channels 3, not 1; channels are 1 for gray pixels"):
        train(tmp_path, *flags, "--init", tmp_path / "given.safetensors", "--run-name", "other")


def test_settings_of_accelerates_configuration_are_recorded(tmp_path, monkeypatch):
    with monkeypatch.context() as configured:
        configured.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
        configured.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
        run = train(tmp_path, "--max-steps", 1)
    config = json.loads((run / "config.json").read_text())
    assert (config["mixed_precision"], config["gradient_accumulation_steps"]) == ("bf16", 2)
    with pytest.raises(InputError, match="mixed_precision was 'bf16', now 'no'"):
        train(tmp_path, "--max-steps", 2)
    train(tmp_path, "--max-steps", 2, "--mixed-precision", "bf16",
          "--gradient-accumulation-steps", 2)


@pytest.mark.parametrize(("name", "words"), [("a/b", None), ("n" * 255, None),
                                             ("n" * 256, "cannot write .*too long")])
def test_any_name_of_a_run_works_or_is_one_line(tmp_path, name, words):
    work = lambda: train(tmp_path, "--run-name", name, "--max-steps", 2, "--sample-every", 1,
                         "--tracker", "tensorboard")
    if words:
        with pytest.raises(InputError, match=words):
            work()
    else:
        work()
        assert checkpoints(tmp_path / name) == ["0000002"]


def test_a_tracker_that_refuses_is_one_line(tmp_path, monkeypatch):
    def refuse(*args, **settings):
        raise RuntimeError("api_key not configured (no-tty)\nmore")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    with pytest.raises(InputError, match=r"^--tracker tensorboard: api_key .* \(no-tty\)$"):
        train(tmp_path, "--tracker", "tensorboard")


def test_a_folder_that_cannot_be_written_or_locked_is_said_as_such(tmp_path, monkeypatch, capfd):
    from filelock import FileLock

    def refuse(*args, **settings):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    run = train(tmp_path, "--max-steps", 2)
    assert checkpoints(run) == ["0000002"] and "without locks" in capfd.readouterr().err

    def forbidden(*args, **settings):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", forbidden)
    with pytest.raises(InputError, match="cannot write .*Permission denied"):
        train(tmp_path, "--max-steps", 2)


def test_the_commands_at_the_end_are_whole(tmp_path, capfd):
    run = train(tmp_path / "a folder", "--max-steps", 2)
    printed = capfd.readouterr().out
    typed = [shlex.split(line) for line in printed.splitlines()]
    assert [words for words in typed if words[-1] == str(run) and "sample_grid.py" in words]
    assert [words for words in typed if words[-1] == str(run) and "evaluate.py" in words]
    assert "step 2  loss" in printed


def test_the_end_of_the_launcher_ends_the_run_saved(tmp_path):
    """SIGKILL to a process that started the trainer, as `accelerate launch` does."""
    def launch():
        work = lambda: slow_train(tmp_path, "--max-steps", 10_000, "--ckpt-every", 5)
        (tmp_path / "pid").write_text(str(fork(work, dict(ACCELERATE_DYNAMO_BACKEND="no"))))
        time.sleep(600)

    launcher = fork(launch)
    wait_for(tmp_path / "run" / "checkpoints" / "0000005")
    os.kill(launcher, signal.SIGKILL)
    wait(launcher)
    trainer = int((tmp_path / "pid").read_text())
    end = time.time() + 30
    while psutil.pid_exists(trainer) and psutil.Process(trainer).status() != "zombie":
        assert time.time() < end
        time.sleep(0.1)
    assert int(checkpoints(tmp_path / "run")[-1]) % 5  # saved where it was


def test_a_second_signal_ends_a_step_that_hangs(tmp_path):
    def hang():
        train_accelerate.update_ema = lambda *args: [time.sleep(1) for _ in range(100)]
        (tmp_path / "begun").touch()
        train(tmp_path)

    process = fork(hang)
    wait_for(tmp_path / "run" / "config.json")
    time.sleep(1)
    os.kill(process, signal.SIGTERM)
    time.sleep(1.5)
    os.kill(process, signal.SIGTERM)
    began = time.time()
    assert wait(process) == [143] and time.time() - began < 10


# ------------------------------------------------------------------------------ configuration files


CONFIGURATIONS = sorted((ROOT / "docs" / "accelerate").glob("*.yaml"))
PROCESSES = dict(one_gpu=1, eight_gpus=8, two_nodes=16, fsdp=8)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
def test_configuration_files_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    config = load_config_from_file(str(path))
    assert config.num_processes == PROCESSES[path.stem]
    assert config.mixed_precision == "bf16"
    if path.stem == "fsdp":
        assert config.distributed_type == DistributedType.FSDP
        assert config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"] == "DiTBlock"
