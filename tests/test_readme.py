"""The texts tell the truth: tested commands run, flags exist, and every flag says its default."""

import ast
import contextlib
import importlib
import io
import json
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT

SCRIPTS = ["dit", "sample_grid", "evaluate", "train_accelerate"]
TINY = {  # added to a README command so that it ends in seconds: a later flag wins
    "train_accelerate.py": "--max-steps 4 --global-batch-size 16 --ckpt-every 2 --sample-every 2 "
    "--eval-samples 16 --num-sampling-steps 2",
    "evaluate.py": "--num-fid-samples 16 --num-sampling-steps 2",
    "sample_grid.py": "--num-sampling-steps 2",
    "dit.py": "",
}
LAUNCHERS = {  # flags of accelerate launch and torchrun, which stand before a script's name
    "--nproc_per_node", "--nnodes", "--node_rank", "--rdzv-backend", "--rdzv-endpoint",
    "--num_processes", "--num_machines", "--machine_rank", "--main_process_ip",
    "--main_process_port", "--config_file"}
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")


def commands_of_blocks():
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"<!-- tested -->\n+```bash\n(.*?)```", readme, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


@pytest.fixture(scope="module")
def helps():
    """A script's name -> what --help says; of the programs in tests/ and docs/, their text."""
    texts = {}
    for name in SCRIPTS:
        printed = io.StringIO()
        for command in [["--help"]] + [["convert", "--help"]] * (name == "dit"):
            with contextlib.redirect_stdout(printed), pytest.raises(SystemExit):
                importlib.import_module(name).parse_args(command)
        texts[f"{name}.py"] = printed.getvalue()
    for path in (*ROOT.glob("tests/*.py"), *ROOT.glob("docs/*/*.py")):
        texts.setdefault(path.name, path.read_text())
    return texts


def snippets(path):
    """What may name flags: code in a text or notebook, and the docstring of a script."""
    text = path.read_text()
    if path.suffix == ".py":
        text = f"```\n{ast.get_docstring(ast.parse(text))}```"
    if path.suffix == ".ipynb":
        cells = ["".join(cell["source"]) for cell in json.loads(text)["cells"]]
        text = "".join(f"```\n{cell}\n```\n" for cell in cells)
    # Columns of other projects' flags stand between two such marks.
    text = "".join(text.split("<!-- flags of others -->")[::2]).replace("\\\n", " ")
    blocks = re.findall(r"```.*?\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [line.strip(" !%") for line in "\n".join(blocks).splitlines()] + spans


TEXTS = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("docs/*.ipynb"),
         *(ROOT / f"{name}.py" for name in ("gaussian_diffusion", *SCRIPTS))]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_text_names_a_flag_that_does_not_exist(path, helps):
    """After a script's name the flags are that script's; elsewhere they are of any, or a launcher.

    Commands of other programs are left out.
    """
    flags = {name: set(FLAG.findall(text)) | {"--help"} for name, text in helps.items()}
    every, wrong = LAUNCHERS.union(*flags.values()), []
    for snippet in snippets(path):
        if re.match(r"(hf|pip|git|apt-get|apt) ", snippet):
            continue
        named = [name for name in flags if re.search(rf"(?<![\w.]){name}", snippet)]
        known, where = every, snippet
        if named:
            known = set().union(*(flags[name] for name in named))
            where = snippet[min(snippet.index(name) for name in named):]
        wrong += [(flag, snippet) for flag in FLAG.findall(where) if flag not in known]
    assert not wrong


def test_every_flag_says_its_default(helps):
    for script in SCRIPTS:
        options = re.split(r"\n  (?=-)", helps[f"{script}.py"].split("options:")[1])
        for option in options[1:]:
            flat = " ".join(option.split())
            said = "default" in flat or "required" in flat or flat.startswith("-h")
            assert said, f"{script}: {flat}"


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, ROOT / "tests" / "benchmark.py", "--quick"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for title in ("training step", "digits, 4 steps", "guided DDPM steps", "Frechet", "KID",
                  "precision and", "JPEG files", "a folder of", "starting"):
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
        words += TINY[script].split()
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        output = f"{shlex.join(words)}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"
        assert result.returncode == 0, output
    assert list(tmp_path.glob("results/*/samples/*.png"))
