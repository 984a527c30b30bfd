"""Train, sample and evaluate through the three command lines; digits are learnt."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from dit import load_checkpoint
from gaussian_diffusion import create_diffusion
from sample_grid import Autoencoder, sample_images


def run(line, cwd):
    """Run a command as a process of its own; what it printed."""
    script, *args = line.split()
    command = [sys.executable, str(ROOT / script), *args]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """A run on 60 digits, one picture each: to read all 1,797 would take most of a minute."""
    folder = tmp_path_factory.mktemp("end-to-end")
    digits = load_digits()
    for i in range(60):
        path = folder / "some" / str(digits.target[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).save(path)
    output = run("train_accelerate.py --data-path some --vae none --image-size 8 --model DiT-Ti/2 "
                 "--max-steps 6 --global-batch-size 16 --ckpt-every 3 --log-every 2 "
                 "--sample-every 3 --eval-every 6 --eval-samples 8 --num-sampling-steps 2 "
                 "--val-split 0.2 --features efficientnet-lite0 --num-workers 0", folder)
    assert "python sample_grid.py --ckpt" in output
    # The end table tells what matters first.
    names = ["FD", "fdr", "class agreement", "memorisation", "precision", "recall", "coverage",
             "validation loss"]
    rows = [line.split("│")[1].strip() for line in output.splitlines() if line.startswith("│")]
    assert [name for name in rows if name in names] == names
    return folder / "results" / "some-DiT-Ti-2"


def test_training_leaves_checkpoints_pictures_and_metrics(tiny_run):
    names = lambda folder: sorted(path.name for path in (tiny_run / folder).iterdir())
    assert names("checkpoints") == ["0000003", "0000006"]
    assert names("samples") == ["0000003.png", "0000006.png"]
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert all(line["images_per_second"] > 0 for line in lines if "loss" in line)
    assert lines[-1]["fd"] > 0 and lines[-1]["num_samples"] == 8
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6]


def test_sampling_and_evaluating_that_run(tiny_run, tmp_path):
    run(f"sample_grid.py --ckpt {tiny_run} --class-labels 3,1,4 --num-sampling-steps 2 "
        "--output grid.png", tmp_path)
    assert Image.open(tmp_path / "grid.png").size[0] > 100
    run(f"evaluate.py --ckpt {tiny_run} --num-fid-samples 12 --num-sampling-steps 2 "
        "--features efficientnet-lite0 --json out.json", tmp_path)
    metrics = json.loads((tmp_path / "out.json").read_text())
    # What training held out is held out here, too.
    trained_on = json.loads((tiny_run / "config.json").read_text())["images"]
    assert (metrics["num_samples"], metrics["num_reference"]) == (12, trained_on)
    assert trained_on + metrics["num_held_out"] == 60 and metrics["fdr"] > 0
    assert metrics["features"] == "efficientnet-lite0"
    assert "fd" in metrics and "fid" not in metrics


@pytest.mark.slow
def test_digits_are_learnt(tmp_path):
    """Most of the demo: the loss falls, and a classifier of real digits reads the asked labels."""
    run("train_accelerate.py --max-steps 1000 --sample-every 0 --eval-samples 0 --results-dir runs",
        tmp_path)
    folder = tmp_path / "runs" / "digits-DiT-Ti-2"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[-1] < 0.12, losses
    model, vae, y = load_checkpoint(folder), Autoencoder(channels=1), torch.arange(200) % 10
    images = sample_images(model, create_diffusion("50"), vae, y, range(200), cfg_scale=1.5)
    digits = load_digits()
    svm = SVC(gamma=0.001).fit(digits.data, digits.target)
    read = svm.predict(images[:, 0].flatten(1).numpy() / 255 * 16)
    assert np.mean(read == y.numpy()) > 0.9
