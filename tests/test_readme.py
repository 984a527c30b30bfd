"""The README tells the truth: its tested commands run, its flags exist, and every flag says its default."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
WALKTHROUGH = (ROOT / "docs" / "walkthrough.md").read_text()
SCRIPTS = ["train_accelerate.py", "evaluate.py", "sample_grid.py"]
TINY = {  # added to a README command so that it ends in seconds: a later flag wins
    "train_accelerate.py": "--max-steps 4 --global-batch-size 16 --ckpt-every 2 --sample-every 2 --eval-samples 16 "
    "--num-sampling-steps 2",
    "evaluate.py": "--num-fid-samples 16 --num-sampling-steps 2",
    "sample_grid.py": "--num-sampling-steps 2",
    "dit.py": "",
}
OTHER_FLAGS = {"--nproc_per_node", "--nnodes", "--node_rank", "--rdzv-backend", "--rdzv-endpoint", "--num_processes",
               "--num_machines", "--machine_rank", "--main_process_ip", "--main_process_port", "--config_file"}


def commands_of_blocks():
    blocks = re.findall(r"<!-- tested -->\n+```bash\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def help_text(script):
    command = [sys.executable, script, "--help"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def helps():
    return {script: help_text(script) for script in SCRIPTS}


def test_every_flag_in_the_readme_exists(helps):
    known = set(re.findall(r"--[a-z][a-z0-9-]*", " ".join(helps.values()))) | OTHER_FLAGS
    table = README.split("<!-- flags of others -->")  # columns of other projects' flags stand between two such marks
    ours = "".join(table[::2]) + WALKTHROUGH
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", ours))
    assert named and named <= known, sorted(named - known)


def test_every_flag_says_its_default(helps):
    for script, text in helps.items():
        options = re.split(r"\n  (?=-)", text.split("options:")[1])
        for option in options[1:]:
            flat = " ".join(option.split())
            assert "default" in flat or "required" in flat or flat.startswith("-h"), f"{script}: {flat}"


def test_line_counts_are_those_of_the_files():
    counts = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE))
    assert len(counts) == 5
    assert counts == {name: str(len((ROOT / name).read_text().splitlines())) for name in counts}


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, ROOT / "tests" / "benchmark.py", "--quick"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for title in ("training step", "digits, 4 steps", "guided DDPM steps", "Frechet", "precision and", "starting"):
        assert title in result.stdout, title


@pytest.mark.slow
def test_the_tested_commands_run(tmp_path):
    """Each command of the tested blocks in the README's order, in one folder, with tiny sizes."""
    commands = commands_of_blocks()
    assert len(commands) >= 5
    for words in commands:
        if words[0] in ("pip", "git", "cd"):
            continue
        script = next(word for word in words if word.endswith(".py"))
        if words[0] == "accelerate":  # the same launcher, from this interpreter
            words = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *words[2:]]
        elif words[0] == "torchrun":
            words = [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        else:
            words = [sys.executable, *words[1:]]
        words = [str(ROOT / word) if word == script else word for word in words]
        result = subprocess.run(words + TINY[script].split(), cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
    assert list(tmp_path.glob("results/*/samples/*.png"))
