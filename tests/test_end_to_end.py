"""Train, sample and evaluate through the three command lines, on a tiny run of the digits demo."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent


def run(script, *args, cwd, check=True):
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, args)], cwd=cwd, capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("e2e")
    run(
        "train_accelerate.py",
        "--max-steps",
        6,
        "--global-batch-size",
        16,
        "--ckpt-every",
        3,
        "--log-every",
        2,
        "--sample-every",
        0,
        "--eval-samples",
        8,
        "--num-sampling-steps",
        2,
        cwd=folder,
    )
    return folder / "results" / "digits-DiT-Ti-2"


def test_training_leaves_checkpoints_and_metrics(tiny_run):
    assert sorted(p.name for p in (tiny_run / "checkpoints").iterdir()) == ["0000003", "0000006"]
    lines = [json.loads(line) for line in (tiny_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert lines[-1]["fd"] > 0 and lines[-1]["num_samples"] == 8


def test_sampling_writes_a_grid(tiny_run, tmp_path):
    run(
        "sample_grid.py",
        "--ckpt",
        tiny_run,
        "--class-labels",
        "3,1,4",
        "--num-sampling-steps",
        2,
        "--output",
        "grid.png",
        cwd=tmp_path,
    )
    assert Image.open(tmp_path / "grid.png").size[0] > 100


def test_evaluation_writes_json(tiny_run, tmp_path):
    run(
        "evaluate.py",
        "--ckpt",
        tiny_run,
        "--ref",
        "digits",
        "--num-fid-samples",
        12,
        "--num-sampling-steps",
        2,
        "--json",
        "out.json",
        cwd=tmp_path,
    )
    figures = json.loads((tmp_path / "out.json").read_text())
    assert (
        figures["num_samples"] == 12
        and figures["num_reference"] == 1797
        and figures["features"] == "efficientnet-lite0"
    )


@pytest.mark.parametrize(
    ("script", "args", "words"),
    [
        ("train_accelerate.py", ["--model", "DiT-Q/2"], ["DiT-Q/2", "DiT-XL/2"]),
        ("train_accelerate.py", ["--data-path", "nowhere"], ["nowhere", "digits"]),
        ("evaluate.py", ["--ckpt", "nowhere"], ["nowhere"]),
        ("sample_grid.py", ["--ckpt", "nowhere"], ["nowhere"]),
    ],
)
def test_bad_input_is_one_line_and_status_2(script, args, words, tmp_path):
    result = run(script, *args, cwd=tmp_path, check=False)
    assert result.returncode == 2
    assert all(word in result.stderr for word in words), result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
