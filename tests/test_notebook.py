"""docs/dit_in_an_hour.ipynb: what is committed, and that it runs from top to bottom."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "dit_in_an_hour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
SCRIPTS = {"dit", "gaussian_diffusion", "sample_grid", "evaluate", "train_accelerate"}


def test_it_was_run_once_from_top_to_bottom():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert len([output for output in outputs if "image/png" in output.get("data", {})]) >= 10
    assert NOTEBOOK.stat().st_size < 600_000


def test_it_imports_the_five_scripts_and_shows_their_source():
    imported = set()
    # The first cell has commands of Jupyter in it, which are not Python.
    for cell in CODE[1:]:
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.ImportFrom):
                imported.add(node.module)
    assert imported >= SCRIPTS
    source = "\n".join("".join(cell["source"]) for cell in CODE)
    assert len(re.findall(r"^show_source\(", source, re.MULTILINE)) >= 5


def test_only_colab_needs_a_network():
    commands = [line for cell in CODE for line in cell["source"] if line.strip()[:1] in "!%"]
    commands = [line for line in commands if line.strip()]
    assert len(commands) == 2 and all(line.startswith("    ") for line in commands)
    assert 'if "google.colab" in sys.modules:' in "".join(CODE[0]["source"])


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("nbclient", "ipykernel", "matplotlib"))),
    reason="the notebook needs packages: pip install nbclient ipykernel matplotlib")
def test_it_runs_from_top_to_bottom(monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    # Fewer steps of training, on one thread; its own assertions are the test.
    monkeypatch.setenv("NOTEBOOK_STEPS", "60")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = dict(metadata=dict(path=str(NOTEBOOK.parent)))
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
