"""Train, sample and evaluate through the three command lines; digits are learnt; bad input ends in one line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

import evaluate
import sample_grid
import train_accelerate
from dit import load_checkpoint, run_command
from gaussian_diffusion import create_diffusion
from sample_grid import Autoencoder, sample_images

ROOT = Path(__file__).parent.parent


def run(command, cwd):
    script, *args = command.split()
    result = subprocess.run([sys.executable, str(ROOT / script), *args], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("end-to-end")
    output = run("train_accelerate.py --max-steps 6 --global-batch-size 16 --ckpt-every 3 --log-every 2 "
                 "--sample-every 3 --eval-every 6 --eval-samples 8 --num-sampling-steps 2", folder)
    assert "FD" in output and "python sample_grid.py --ckpt" in output
    return folder / "results" / "digits-DiT-Ti-2"


def test_training_leaves_checkpoints_pictures_and_metrics(tiny_run):
    assert sorted(p.name for p in (tiny_run / "checkpoints").iterdir()) == ["0000003", "0000006"]
    assert sorted(p.name for p in (tiny_run / "samples").iterdir()) == ["0000003.png", "0000006.png"]
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert all(line["images_per_second"] > 0 for line in lines if "loss" in line)
    assert lines[-1]["fd"] > 0 and lines[-1]["num_samples"] == 8


def test_sampling_and_evaluating_that_run(tiny_run, tmp_path):
    run(f"sample_grid.py --ckpt {tiny_run} --class-labels 3,1,4 --num-sampling-steps 2 --output grid.png", tmp_path)
    assert Image.open(tmp_path / "grid.png").size[0] > 100
    run(f"evaluate.py --ckpt {tiny_run} --ref digits --num-fid-samples 12 --num-sampling-steps 2 --json out.json",
        tmp_path)
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (figures["num_samples"], figures["num_reference"]) == (12, 1797)
    assert figures["features"] == "efficientnet-lite0" and "fd" in figures and "fid" not in figures


@pytest.mark.parametrize(("script", "args", "words"), [
    (train_accelerate, "--model DiT-Q/2", ["DiT-Q/2", "DiT-XL/2"]),
    (train_accelerate, "--data-path nowhere", ["nowhere", "digits"]),
    (train_accelerate, "--features nothing", ["nothing", "efficientnet-lite0"]),
    (evaluate, "--ckpt nowhere", ["nowhere"]),
    (evaluate, "--ckpt nowhere --features nothing", ["nothing", "efficientnet-lite0"]),
    (sample_grid, "--ckpt nowhere", ["nowhere"]),
])
def test_bad_input_is_one_line_and_status_2(script, args, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        run_command(script.main, script.parse_args(args.split()))
    message = capfd.readouterr().err.strip()
    assert exit_.value.code == 2 and len(message.splitlines()) == 1
    assert all(word in message for word in words), message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_digits_are_learnt(tmp_path):
    """Most of the demo: the loss falls, and a classifier of real digits reads the label that was asked for."""
    run("train_accelerate.py --max-steps 1000 --sample-every 0 --eval-samples 0 --results-dir runs", tmp_path)
    folder = tmp_path / "runs" / "digits-DiT-Ti-2"
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.12, losses
    y = torch.arange(200) % 10
    images = sample_images(load_checkpoint(folder), create_diffusion("50"), Autoencoder(channels=1), y, range(200), 1.5)
    digits = load_digits()
    svm = SVC(gamma=0.001).fit(digits.data, digits.target)
    read = svm.predict(images[:, 0].flatten(1).numpy() / 255 * 16)
    assert np.mean(read == y.numpy()) > 0.9
