"""Bad input is one line that says what is wrong, status 2, and nothing is written: one table."""

import os
import shlex
import shutil

import numpy as np
import pytest
from helpers import damage, pictures, refused, save_small_dit

import dit
import evaluate
import sample_grid
import train_accelerate

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def shelf(trained, small_ckpt, data, tmp_path_factory):
    """A folder of what the commands below name: good things first, then bad ones."""
    folder = tmp_path_factory.mktemp("shelf")
    (folder / "run").symlink_to(trained)
    (folder / "data").symlink_to(data)
    shutil.copy(small_ckpt, folder / "small.safetensors")

    # Networks that cannot do all that is asked of them.
    save_small_dit(folder / "unguided.safetensors", class_dropout_prob=0.0)
    save_small_dit(folder / "flow.safetensors", dict(objective="flow"), learn_sigma=False)
    save_small_dit(folder / "latent.safetensors", in_channels=4, num_classes=10)

    # Folders of pictures.
    (folder / "empty").mkdir()
    pictures(folder / "few", count=3)
    pictures(folder / "large", count=9, size=16)
    shutil.copytree(pictures(folder / "splits" / "train"), folder / "splits" / "test")
    shutil.rmtree(folder / "splits" / "test" / "b")
    damage(pictures(folder / "broken", count=9) / "a" / "004.png", "cut")

    # Archives of images.
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    arrays = dict(
        good=images, gray=images[..., :1], float=images / 255.0, range=images.astype(np.int32) * 2,
        objects=np.array([{}, 1], dtype=object))
    for name, array in arrays.items():
        np.savez(folder / f"{name}.npz", arr_0=array)
    statistics = dict(mu=np.zeros(5), sigma=np.eye(5), network="pixels")
    np.savez(folder / "narrow.npz", arr_0=images, **statistics)
    (folder / "text.npz").write_text("no archive")
    return folder


BAD_INPUT = [  # the script, its flags, and words of the message
    # Weights.
    (dit, "convert nowhere a.pt", "nowhere"),
    (dit, "convert run small.safetensors", "exists"),
    (sample_grid, "--ckpt nowhere", "nowhere"),
    (evaluate, "--ckpt nowhere --ref data", "nowhere"),
    (train_accelerate, "--init nowhere", "nowhere"),
    (train_accelerate, "--init latent.safetensors", "does not fit DiT-Ti/2"),
    (train_accelerate, "--model DiT-Q/2", "DiT-Q/2", "DiT-XL/2"),
    (sample_grid, "--ckpt small.safetensors --model DiT-Q/2", "DiT-XL/2"),
    (sample_grid, "--ckpt small.safetensors --model DiT-L/4", "not 24"),
    (sample_grid, "--ckpt small.safetensors --image-size 256", "8 px, not 256"),
    (evaluate, "--ckpt run --ref data --image-size 16", "8 px"),
    (sample_grid, "--ckpt small.safetensors --num-classes 10", "num_classes 4, not 10"),
    (evaluate, "--ckpt run --ref data --num-classes 3", "num_classes 2, not 3"),
    (sample_grid, "--ckpt flow.safetensors --objective ddpm", "trained with --objective flow"),

    # The autoencoder.
    (sample_grid, "--ckpt run --vae nowhere", "nowhere"),
    (sample_grid, "--ckpt small.safetensors --vae nobody/no-such-vae", "nobody/no-such-vae"),
    (sample_grid, "--ckpt latent.safetensors", "pixels, 1 or 3 channels"),
    (train_accelerate, "--vae nowhere --image-size 32", "nowhere"),
    (train_accelerate, "--latent-cache cache", "--latent-cache does nothing with --vae none"),

    # Data.
    (train_accelerate, "--data-path nowhere", "nowhere", "digits"),
    (train_accelerate, "--data-path empty --vae none", "empty"),
    (evaluate, "--samples nowhere --ref data", "nowhere"),
    (evaluate, "--samples empty --ref data", "empty"),
    (evaluate, "--samples broken --ref data", "004.png"),
    (evaluate, "--samples data --ref broken", "004.png"),
    (evaluate, "--samples large --ref data", "16 x 16", "8 x 8"),
    (evaluate, "--samples few --ref data --metrics pr", "3 images"),
    (evaluate, "--samples gray.npz --ref data", "gray.npz", "(9, 8, 8, 1)"),
    (evaluate, "--samples float.npz --ref data", "float.npz", "float64"),
    (evaluate, "--samples range.npz --ref data", "range.npz", "int32"),
    (evaluate, "--samples objects.npz --ref data", "objects.npz", "object"),
    (evaluate, "--samples text.npz --ref data", "text.npz"),
    (evaluate, "--samples data --ref narrow.npz --metrics fid", "5", "12"),
    (train_accelerate, "--num-classes 9", "--num-classes 9, but the data has a label 9"),
    (train_accelerate, "--val-split 1.5", "--val-split 1.5: give a share between 0 and 1"),
    (train_accelerate, "--val-split train", "--val-split train is the split itself"),
    (train_accelerate, "--data-path data --vae none --image-size 8 --val-split test",
     "test: data has train"),
    (train_accelerate, "--data-path splits --vae none --image-size 8 --val-split test",
     "--val-split test has other classes"),

    # Classes.
    (sample_grid, "--ckpt small.safetensors --class-labels 'golden retreiver'",
     "golden retriever (1)"),
    (sample_grid, "--ckpt small.safetensors --class-labels 4", "'4'", "0 to 3"),
    (sample_grid, "--ckpt small.safetensors --class-labels -1", "'-1'", "0 to 3"),
    (sample_grid, "--ckpt small.safetensors --class-labels 1.0", "'1.0'", "0 to 3"),
    (sample_grid, "--ckpt small.safetensors --class-labels ²", "'²'", "0 to 3"),
    (sample_grid, "--ckpt small.safetensors --class-labels ''", "no class ''"),
    (sample_grid, "--ckpt small.safetensors --class-labels n01440764", "WordNet"),

    # Numbers out of bounds.
    (sample_grid, "--ckpt run --num-sampling-steps 0", "--num-sampling-steps 0", "1 to 1000"),
    (sample_grid, "--ckpt run --num-sampling-steps 1001", "1 to 1000"),
    (sample_grid, "--ckpt run --num-sampling-steps -3", "1 to 1000"),
    (evaluate, "--ckpt run --ref data --num-sampling-steps 2000", "--num-sampling-steps 2000"),
    (evaluate, "--ckpt run --ref data --num-fid-samples 0", "--num-fid-samples 0"),
    (evaluate, "--ckpt run --ref data --num-fid-samples 3 --metrics fid,pr", "3 images"),
    (sample_grid, "--ckpt run --sampler ddim --eta 1.5", "0 to 1"),
    (sample_grid, "--ckpt run --cfg-scale nan", "nan must be a number"),
    (sample_grid, "--ckpt run --cfg-channels 0", "--cfg-channels 0 must be 1 or more"),
    (sample_grid, "--ckpt run --cfg-channels 4", "3 channels"),
    (sample_grid, "--ckpt run --seed -1", "--seed -1 must be 0 or more"),
    (sample_grid, f"--ckpt run --seed {2**63}", f"--seed {2**63} must be {2**62} or less"),
    (train_accelerate, f"--global-seed {2**63}", f"--global-seed {2**63} must be {2**62} or less"),
    (sample_grid, "--ckpt run --nrow 0", "--nrow 0"),
    (sample_grid, "--ckpt run --images-per-class -1", "--images-per-class -1"),
    (sample_grid, "--ckpt run --per-proc-batch-size 0",
     "--per-proc-batch-size 0 must be 1 or more"),
    (train_accelerate, "--log-every 0", "--log-every 0 must be 1 or more"),
    (train_accelerate, "--ema-decay 2", "--ema-decay 2.0 must be 1 or less"),
    (train_accelerate, "--image-size 7", "input size 7 must divide by patch size 2"),
    (train_accelerate, "--global-batch-size 9 --gradient-accumulation-steps 2",
     "divide by processes x accumulation steps = 2"),

    # Names that are none of those.
    (train_accelerate, "--features nothing", "nothing", "efficientnet-lite0"),
    (evaluate, "--ckpt nowhere --features nothing", "nothing", "efficientnet-lite0"),
    (evaluate, "--samples data --ref data --metrics fid,fad", "fad"),
    (sample_grid, "--ckpt run --sampler heun", "ddpm has no sampler 'heun': use one of ddpm"),
    (train_accelerate, "--sampler heun", "ddpm has no sampler 'heun'"),
    (train_accelerate, "--objective flow --sampler ddim", "flow has no sampler 'ddim'"),
    (sample_grid, "--ckpt run --guidance-interval 5", "two noise levels"),
    (sample_grid, "--ckpt run --guidance-interval 5,1", "not below"),
    (sample_grid, "--ckpt run --sweep depth=1,2", "cfg_scale"),
    (sample_grid, "--ckpt run --sweep cfg_scale", "values"),
    (sample_grid, "--ckpt run --sweep cfg_scale=a", "values"),
    (sample_grid, "--ckpt run --sweep num_sampling_steps=5,2000", "2000"),
    (sample_grid, "--ckpt run --sweep sampler=plms", "--sampler plms must be one of ddpm"),
    (sample_grid, "--ckpt run --sweep sampler=euler", "ddpm has no sampler 'euler'"),

    # What the machine or the network cannot do.
    (train_accelerate, "--tracker wandb", "pip install wandb"),
    (train_accelerate, "--mixed-precision fp16", "fp16"),
    (sample_grid, "--ckpt unguided.safetensors --cfg-scale 2", "label dropout"),

    # Flags that would do nothing.
    (train_accelerate, "--time-sampling uniform",
     "--time-sampling uniform is for --objective flow, sit and jit"),
    (sample_grid, "--ckpt run --eta 0.5", "ddim alone"),
    (sample_grid, "--ckpt run --cfg-channels 1 --cfg-scale 1", "does nothing at --cfg-scale 1"),
    (sample_grid, "--ckpt run --guidance-interval 0.3,5 --cfg-scale 1",
     "does nothing at --cfg-scale 1"),
    (sample_grid, "--ckpt run --guidance-interval 1000,2000", "none of the steps' noise levels"),
    (sample_grid, "--ckpt run --sweep cfg_scale=1,2 --trajectory a.gif", "--trajectory"),
    (sample_grid, "--ckpt run --sweep cfg_scale=1,2 --nrow 2", "--nrow"),
    (sample_grid, "--ckpt run --sweep cfg_scale=1,2 --cfg-scale 4", "which varies it"),
    (evaluate, "--samples data --ref data --num-fid-samples 9", "error: --num-fid-samples "),
    (evaluate, "--samples data --ref data --label-mode balanced", "error: --label-mode "),
    (evaluate, "--samples data --ref data --seed 1", "error: --seed "),
    (evaluate, "--samples data --ref data --cfg-scale 2", "error: --cfg-scale "),
    (evaluate, "--samples data --ref data --no-tf32", "error: --tf32 "),
    (evaluate, "--samples data --ref data --save-npz new.npz", "error: --save-npz "),
    (evaluate, "--samples good.npz --ref good.npz --num-workers 2", "error: --num-workers "),
    (evaluate, "--samples good.npz --ref good.npz --image-size 8", "error: --image-size "),
    (evaluate, "--ckpt run --ref good.npz --label-column label", "error: --label-column "),
    (evaluate, "--ckpt run run --ref good.npz --save-images new", "error: --save-images "),
    (evaluate, "--ckpt run --ref data --plot a.png", "error: --plot "),
    (evaluate, "--ref data --save-ref new.npz --json new.json", "error: --json "),
    (evaluate, "--ref data --save-ref new.npz --num-sampling-steps 3",
     "error: --num-sampling-steps "),
    (evaluate, "--ckpt run --ref data --features efficientnet-lite0 --resize adm",
     "error: --resize "),

    # Where nothing can be written.
    (sample_grid, "--ckpt run --output nowhere/out.png", "nowhere"),
    (sample_grid, "--ckpt run --output out.bmp", ".webp"),
    (sample_grid, "--ckpt run --output out", ".png"),
    (sample_grid, f"--ckpt run --output {'a' * 250}.png", "too long"),
    (sample_grid, "--ckpt run --trajectory out.mp4", ".gif"),
    (sample_grid, "--ckpt run --trajectory nowhere/out.gif", "nowhere"),
    (evaluate, "--samples data --ref data --json nowhere/out.json", "--json"),
    (evaluate, "--samples data --ref data --json empty", "--json"),
    (train_accelerate, "--results-dir /proc/nowhere", "/proc/nowhere"),
]


@pytest.mark.parametrize(
    ("script", "flags", "words"), [(script, flags, words) for script, flags, *words in BAD_INPUT],
    ids=[f"{script.__name__} {flags[:60]}" for script, flags, *_ in BAD_INPUT])
def test_bad_input_is_one_line_and_nothing_is_written(
        script, flags, words, shelf, monkeypatch, capsys):
    monkeypatch.chdir(shelf)
    before = sorted(shelf.rglob("*"))
    message = refused(capsys, script, *shlex.split(flags))
    assert all(word in message for word in words), message
    assert sorted(shelf.rglob("*")) == before


def test_a_class_folder_that_is_closed_is_named(tmp_path, monkeypatch, capsys):
    scandir = os.scandir
    closed = pictures(tmp_path / "pictures") / "b"

    def refuse(path):
        if str(path) == str(closed):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may enter every folder
    flags = ["--data-path", tmp_path / "pictures", "--vae", "none", "--results-dir", tmp_path]
    assert "/b: Permission denied" in refused(capsys, train_accelerate, *flags)
