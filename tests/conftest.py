"""One thread a process and no network, before torch is imported; and what test files share."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import shutil  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
from helpers import (  # noqa: E402
    Pixels,
    command,
    pictures,
    save_small_dit,
    save_vae,
    train_flags,
)

import dit  # noqa: E402
import evaluate  # noqa: E402
import train_accelerate  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory):
    """No fixture writes to the user's cache ..."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """... and no test; none finds what another has kept there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def vae_folder(tmp_path_factory):
    return save_vae(tmp_path_factory.mktemp("vae") / "vae")


@pytest.fixture(scope="session")
def small_ckpt(tmp_path_factory):
    return save_small_dit(tmp_path_factory.mktemp("small") / "small.safetensors")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """24 pictures of 8 x 8 pixels in two class folders."""
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def quick():
    """DiT-Test/2, of a few weights, and features that need no network, in all scripts."""
    with pytest.MonkeyPatch.context() as patch:
        config = dict(depth=1, hidden_size=16, patch_size=2, num_heads=2)
        patch.setitem(dit.DEMO_CONFIGS, "DiT-Test/2", config)
        patch.setitem(dit.HEADS, 16, 2)
        for script in (evaluate, train_accelerate):
            patch.setattr(script, "load_features", load_pixels)
        yield


def load_pixels(name, *args):
    evaluate.check_features(name)
    return Pixels()


@pytest.fixture(scope="module")
def trained(quick, data, tmp_path_factory):
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    command(train_accelerate, *train_flags(data, folder), "--max-steps", "4")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run, to be resumed."""
    return Path(shutil.copytree(trained, tmp_path / "run"))
