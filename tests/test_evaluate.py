"""Feature networks against eager copies, sets and references, the command line."""

import contextlib
import io
import itertools
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import threading
import urllib.error
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers import Pixels, save_vae, small_dit
from PIL import Image
from torch import nn

import evaluate
from dit import DiT, InputError, load_checkpoint, save_checkpoint
from evaluate import (
    NpzImages,
    find_nearest,
    frechet_ratio,
    load_data,
    load_features,
    main,
    memorization,
    parse_args,
    reference_features,
    sample_labels,
)
from gaussian_diffusion import create_diffusion
from sample_grid import Autoencoder, make_accelerator

FOLDER = Path(__file__).parent / "data" / "metrics"
CASES = np.load(FOLDER / "cases.npz")
RNG = np.random.default_rng(0)


# ---------------------------------------------------------- features


@pytest.mark.parametrize(("mode", "tolerance"), [("tf1", 0.01), ("clean", 0.005)])
@pytest.mark.parametrize("name", ["noise48", "photo256"])
def test_resize_equals_tensorflow_and_clean_fid(mode, tolerance, name):
    image = torch.from_numpy(CASES[f"resize/img_{name}"]).permute(2, 0, 1)[None].float()
    resized = getattr(evaluate, f"resize_{mode}")(image)[0].permute(1, 2, 0).numpy()
    rows, columns = CASES["resize/yx"].T
    expected = CASES[f"resize/{mode}_{name}"]
    np.testing.assert_allclose(resized[rows, columns], expected, atol=tolerance)


class Conv(nn.Module):
    def __init__(self, channels, out, stride=1, kernel=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, bias=False)

    def forward(self, x):
        return self.conv(x).relu()


class Mixed(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.tower = Conv(channels, 9), Conv(channels, 5)

    def forward(self, x):
        return torch.cat([self.conv(x), self.tower(x)], 1)


class StandIn(nn.Module):
    """inception-2015-12-05.pt with few channels: layers up to mixed_10, an output with a bias."""

    def __init__(self, width=24):
        super().__init__()
        torch.manual_seed(1)
        layers = nn.Sequential()
        layers.add_module("conv", Conv(3, 6, 50, 50))
        for i in range(11):
            layers.add_module(f"mixed_{i}" if i else "mixed", Mixed(6 if i == 0 else 14))
        layers.add_module("last", Conv(14, width))
        layers.add_module("pool2", nn.AdaptiveAvgPool2d(1))
        self.layers, self.output = layers, nn.Linear(width, 10)
        nn.init.constant_(self.output.bias, 7.0)
        self.output.bias.data[0] = -7
        for parameter in self.layers.parameters():
            parameter.data *= 1.6

    def forward(self, img, return_features: bool = False):
        x = self.layers((img - 128) / 128).flatten(1)
        return x if return_features else self.output(x).softmax(1)


@pytest.fixture(scope="session")
def standin(tmp_path_factory):
    path = tmp_path_factory.mktemp("net") / "standin.pt"
    torch.jit.script(StandIn().eval()).save(path)
    return str(path)


@pytest.mark.parametrize("resize", ["adm", "clean"])
def test_network_equals_an_eager_copy(standin, resize):
    eager = StandIn().eval()
    images = torch.from_numpy(RNG.integers(0, 256, (5, 3, 32, 32), dtype=np.uint8))
    seen = []
    hook = lambda module, inputs, output: seen.append(output)
    eager.layers.mixed_6.conv.register_forward_hook(hook)
    x = (evaluate.resize_tf1 if resize == "adm" else evaluate.resize_clean)(images.float())
    with torch.no_grad():
        pool = eager(x, return_features=True)
    network = load_features(standin, "cpu", resize)
    found, probs, spatial = network(images)
    assert network.width == 24 and resize in network.name
    torch.testing.assert_close(found, pool)
    torch.testing.assert_close(probs, (pool @ eager.output.weight.T).softmax(1))
    side = seen[0].shape[-1]
    places = itertools.product(range(side), range(side), range(7))
    by_hand = torch.stack([seen[0][:, c, h, w] for h, w, c in places], 1)
    torch.testing.assert_close(spatial, by_hand)


def test_spatial_features_have_the_order_of_adm_files(standin):
    network = load_features(standin, "cpu")
    nchw = torch.from_numpy(CASES["spatial/nchw"]).float()
    block = type("Block", (), dict(conv=lambda self, x: nchw, __call__=lambda self, x: x))
    network.layers = {"mixed_6": block(),
                      "pool2": lambda x: torch.zeros(len(x), network.width, 1, 1)}
    spatial = network(torch.zeros(3, 3, 8, 8, dtype=torch.uint8))[2]
    np.testing.assert_array_equal(spatial.numpy(), CASES["spatial/vec"].astype(np.float32))


def test_inception_is_downloaded_once_and_whole(standin, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def urlopen(url, timeout):
        calls.append(url)
        return io.BytesIO(Path(standin).read_bytes())

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    assert load_features("inception", "cpu").width == 24 and "sha256" in capsys.readouterr().out
    assert load_features("inception", "cpu").width == 24
    files = [path.name for path in tmp_path.rglob("*.*")]
    assert len(calls) == 1 and files == ["inception-2015-12-05.pt"]


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def urlopen(url, timeout):
        raise urllib.error.URLError("unreachable")

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(InputError, match="unreachable.*efficientnet-lite0"):
        load_features("inception", "cpu")
    assert not list(tmp_path.rglob("*.pt"))


def test_efficientnet_is_silent_and_called_fd(capsys):
    network = load_features("efficientnet-lite0", "cpu")
    rows, probs, spatial = network(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    assert (rows.shape, probs.shape) == ((2, 1280), (2, 1000))
    assert spatial is None and network.distance == "FD"
    assert probs.sum(1).tolist() == pytest.approx([1, 1]) and not any(capsys.readouterr())
    with pytest.raises(InputError, match="sfid"):
        evaluate.choose_metrics(["sfid"], network)


# ---------------------------------------------------------- DINOv2


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A folder as save_pretrained writes it: DINOv2's layout, one block, waves for weights."""
    transformers = pytest.importorskip("transformers", reason="it is optional, for DINOv2 alone")
    net = transformers.Dinov2Model(transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=518))
    for i, (_, weight) in enumerate(sorted(net.named_parameters())):
        places = torch.arange(weight.numel(), dtype=torch.float64)
        weight.data = torch.sin(0.7 * places + i).view(weight.shape).float()
    folder = tmp_path_factory.mktemp("net") / "dinov2"
    net.save_pretrained(folder)
    return str(folder)


def test_dinov2_equals_the_official_network(dinov2):
    """The expected values are those of its own code with these weights, after edm2's resize."""
    images = torch.arange(2 * 3 * 20 * 30).view(2, 3, 20, 30).mul(37).remainder(251).byte()
    network = load_features(dinov2, "cpu")
    features, probs, spatial = network(images)
    expected = [[0.474699616, -0.451015502, -0.336854815, 0.672243655],
                [0.475113839, -0.451827049, -0.336224377, 0.671643972]]
    torch.testing.assert_close(features[:, :4], torch.tensor(expected), rtol=0, atol=2e-6)
    assert (network.width, network.distance, probs, spatial) == (16, "FD", None, None)
    assert network.name.startswith("dinov2-edm2-")
    for resize in ("dgm-eval", "torch-fidelity"):
        other = load_features(dinov2, "cpu", resize)
        assert resize in other.name and not torch.allclose(other(images)[0], features, atol=1e-4)
    with pytest.raises(InputError, match="--resize clean .*edm2 or dgm-eval or torch-fidelity"):
        load_features(dinov2, "cpu", "clean")


def test_resizes_of_dinov2_are_those_of_its_evaluators():
    """dgm-eval's is torchvision's of a PIL image; edm2's is clean-fid's without its clipping."""
    transforms = pytest.importorskip("torchvision").transforms
    image = RNG.integers(0, 2, (40, 60, 3), dtype=np.uint8) * 255
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    resize = transforms.Resize((224, 224), transforms.InterpolationMode.BICUBIC)
    theirs = transforms.ToTensor()(resize(Image.fromarray(image)))
    torch.testing.assert_close(evaluate.resize_pil(pixels)[0] / 255, theirs, rtol=0, atol=0)
    channels = [Image.fromarray(pixels[0, i].numpy()).resize((224, 224), Image.BICUBIC)
                for i in range(3)]  # in float32
    resized = evaluate.resize_bicubic(pixels)[0].numpy()
    np.testing.assert_allclose(resized, np.stack(channels), atol=5e-3)
    assert resized.min() < -10 and resized.max() > 265


def test_fd_dinov2_against_edm2s_statistics(dinov2, standin, forty, tmp_path, capsys):
    network = load_features(dinov2, "cpu")
    images = torch.stack([image for image, _ in load_data(forty)])
    mu, sigma = evaluate.compute_statistics(network(images)[0])
    adm = evaluate.compute_statistics(load_features(standin, "cpu")(images)[0])
    statistics = dict(num_images=40, fid=dict(mu=adm[0], sigma=adm[1]),
                      fd_dinov2=dict(mu=mu, sigma=sigma))
    for protocol in (3, 4, 5):
        (tmp_path / "ref.pkl").write_bytes(pickle.dumps(statistics, protocol))
        result = cli("--samples", forty, "--ref", tmp_path / "ref.pkl", "--features", dinov2,
                     out=tmp_path / "a.json")
        assert result["fd"] == pytest.approx(0, abs=1e-4) and "fid" not in result
        assert result["features"] == network.name and "inception_score" not in result
    result = cli("--samples", forty, "--ref", tmp_path / "ref.pkl", "--features", standin,
                 out=tmp_path / "b.json")
    assert result["fid"] == pytest.approx(0, abs=1e-6)
    for features, resize in ((dinov2, "dgm-eval"), (standin, "clean")):
        with pytest.raises(InputError, match="ref.pkl has no statistics of"):
            cli("--samples", forty, "--ref", tmp_path / "ref.pkl", "--features", features,
                "--resize", resize)

    # Of images, the metrics of their features; --save-ref keeps what serves again.
    args = ("--samples", forty, "--features", dinov2)
    cli("--ref", forty, "--features", dinov2, "--save-ref", tmp_path / "ref.npz")
    result = cli(*args, "--ref", tmp_path / "ref.npz", out=tmp_path / "c.json")
    assert result["fd"] == pytest.approx(0, abs=1e-4) and result["precision"] == 1


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize("hostile", [
    Hostile(), np.array([Hostile()], dtype=object), np.ma.zeros(3)])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickled_statistics_run_no_code(hostile, protocol, standin, forty, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(
        dict(fid=dict(mu=hostile, sigma=np.eye(24))), protocol))
    with pytest.raises(InputError, match="ref.pkl .*could run code"):
        cli("--samples", forty, "--ref", tmp_path / "ref.pkl", "--features", standin)
    assert os.listdir(tmp_path) == ["ref.pkl"]


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1]), pickle.dumps(dict(fid=3)),
                                     pickle.dumps(dict(fid=dict(mu=np.zeros(24))))[:-9]])
def test_other_pickles_are_one_line(content, standin, forty, tmp_path):
    (tmp_path / "ref.pkl").write_bytes(content)
    with pytest.raises(InputError, match="ref.pkl has no statistics") as raised:
        cli("--samples", forty, "--ref", tmp_path / "ref.pkl", "--features", standin)
    assert "\n" not in str(raised.value)


def test_dinov2_without_weights_or_package_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="it is optional, for DINOv2 alone")
    for name, words in (("dinov2", "facebook/dinov2-large"), (str(tmp_path), str(tmp_path))):
        with pytest.raises(InputError, match=f"weights from {words}") as raised:
            load_features(name, "cpu")
        assert "\n" not in str(raised.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers"):
        load_features("dinov2", "cpu")


# ---------------------------------------------------------- sets and generation


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    model = DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=24, depth=1, num_heads=2,
                num_classes=10)
    nn.init.normal_(model.final_layer.linear.weight, std=0.05)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_checkpoint(path, model, vae="none", step=30, data_path="digits",
                    sampling=dict(num_sampling_steps=3, cfg_scale=1.0))
    return str(path)


@pytest.fixture(scope="session")
def forty(tmp_path_factory):
    """A reference of forty digits, as a folder."""
    folder, data = tmp_path_factory.mktemp("forty"), load_data("digits")
    for i in range(40):
        Image.fromarray(data[i][0].permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")
    return str(folder)


def cli(*args, out=None):
    """main() with these flags; the JSON that it wrote."""
    main(parse_args([str(a) for a in args] + (["--json", str(out)] if out else [])))
    return json.loads(Path(out).read_text()) if out else None


NAMES = ("fid", "sfid", "inception_score", "precision", "recall", "kid", "kid_std", "density",
         "coverage")


def same(a, b, tolerance=1e-6):
    return all(abs(a[name] - b[name]) <= tolerance * max(1, abs(a[name])) for name in NAMES)


def test_folder_npz_and_in_process_agree(checkpoint, standin, forty, tmp_path, capsys):
    common = ("--features", standin, "--ref", forty, "--per-proc-batch-size", 8)
    made = cli("--ckpt", checkpoint, "--num-fid-samples", 21, "--save-images", tmp_path / "png",
               "--save-npz", tmp_path / "a.npz", *common, out=tmp_path / "made.json")
    folder = cli("--samples", tmp_path / "png", *common, out=tmp_path / "folder.json")
    npz = cli("--samples", tmp_path / "a.npz", *common, out=tmp_path / "npz.json")
    assert same(made, folder) and same(made, npz)
    assert made["fid_low"] < made["fid"] < made["fid_high"] and made["precision_high"] <= 1
    expected = dict(num_samples=21, num_reference=40, num_sampling_steps=3, cfg_scale=1.0, seed=0,
                    step=30, label_mode="random", image_size=8, pr_k=3, dc_k=5,
                    kid_subset_size=21, sampler="ddpm")
    assert {key: made[key] for key in expected} == expected and "biased" in made["warnings"]
    with np.load(tmp_path / "a.npz") as saved:
        assert saved["arr_0"].shape == (21, 8, 8, 3) and saved["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(saved["arr_1"], sample_labels(10, 21).numpy())
        picture = np.asarray(Image.open(tmp_path / "png" / "000020.png"))
        np.testing.assert_array_equal(picture, saved["arr_0"][20])
    assert "FID" in capsys.readouterr().out


def test_a_killed_evaluation_continues(checkpoint, standin, forty, tmp_path, monkeypatch):
    args = ("--ckpt", checkpoint, "--features", standin, "--ref", forty, "--metrics", "fid, is",
            "--save-images", tmp_path / "png")
    whole = cli(*args, "--num-fid-samples", 12, out=tmp_path / "whole.json")
    for i in (2, 5, 11):
        (tmp_path / "png" / f"{i:06d}.png").unlink()
    cut = tmp_path / "png" / "000007.png"
    cut.write_bytes(cut.read_bytes()[:60])
    drawn, sample = [], evaluate.sample_images
    record = lambda *a, **k: drawn.extend(a[4]) or sample(*a, **k)
    monkeypatch.setattr(evaluate, "sample_images", record)
    again = cli(*args, "--num-fid-samples", 12, "--per-proc-batch-size", 5,
                out=tmp_path / "again.json")
    assert drawn == [2, 5, 7, 11]
    assert again["fid"] == pytest.approx(whole["fid"], rel=1e-6)
    for other in (("--seed", 1), ("--cfg-scale", 2), ("--num-sampling-steps", 2)):
        with pytest.raises(InputError, match=other[0][2:].replace("-", "_")):
            cli(*args, "--num-fid-samples", 12, *other)


def test_an_image_does_not_depend_on_the_count_or_the_batch(checkpoint):
    model = load_checkpoint(checkpoint)

    def make(n, batch):
        images = evaluate.GeneratedImages(
            model, create_diffusion("3"), Autoencoder(channels=1), n, make_accelerator(), seed=4)
        return torch.cat(list(images.batches(0, 1, batch)))

    assert torch.equal(make(11, 4)[:7], make(7, 3))
    nine = sample_labels(10, 9).tolist()
    assert sample_labels(10, 5000)[:9].tolist() == nine != sample_labels(10, 9, seed=1).tolist()
    assert sample_labels(3, 7, "balanced").tolist() == [0, 1, 2, 0, 1, 2, 0]


class Rank:
    """What the evaluator uses of an Accelerator, for one of several threads."""

    device, is_main_process = torch.device("cpu"), False

    def __init__(self, rank, world, shared, barrier):
        self.process_index, self.num_processes = rank, world
        self.shared, self.barrier = shared, barrier

    def exchange(self, x):
        self.shared[self.process_index] = x.clone()
        self.barrier.wait(60)
        everyone = [x.clone() for x in self.shared]
        self.barrier.wait(60)
        return everyone

    def gather(self, x):
        return torch.cat(self.exchange(x))

    def reduce(self, x):
        return torch.stack(self.exchange(x)).sum(0)


@pytest.mark.parametrize("count", [13, 16])
def test_processes_give_the_metrics_of_one(standin, forty, tmp_path, count):
    network, world = load_features(standin, "cpu"), 3
    images = RNG.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images)
    samples, data = NpzImages(tmp_path / "a.npz"), evaluate.load_folder(forty)
    results, shared, barrier = {}, [None] * world, threading.Barrier(world)

    def work(accelerator):
        reference = reference_features(data, network, accelerator, batch_size=4)
        results[accelerator.process_index] = evaluate.evaluate_images(
            samples, reference, network, accelerator, batch_size=2)

    ranks = [Rank(rank, world, shared, barrier) for rank in range(world)]
    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    one = make_accelerator()
    reference = reference_features(data, network, one)
    alone = evaluate.evaluate_images(samples, reference, network, one)
    assert len(results) == world and all(same(alone, result) for result in results.values())


@pytest.mark.slow
def test_two_real_processes_give_the_metrics_of_one(checkpoint, standin, forty, tmp_path):
    args = ["evaluate.py", "--ckpt", checkpoint, "--features", standin, "--ref", forty,
            "--num-fid-samples", "15", "--per-proc-batch-size", "4"]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    runs, images = [], []
    for name, start in (("one", []), ("two", torchrun)):
        out = ["--json", f"{tmp_path / name}.json", "--save-npz", f"{tmp_path / name}.npz"]
        result = subprocess.run([sys.executable, *start, *args, *out], text=True,
                                cwd=Path(__file__).parent.parent, capture_output=True)
        assert result.returncode == 0, result.stderr
        runs.append(json.loads((tmp_path / f"{name}.json").read_text()))
        images.append(np.load(tmp_path / f"{name}.npz")["arr_0"])
    assert same(*runs)
    np.testing.assert_array_equal(*images)


# ---------------------------------------------------------- references


def write_images(folder, count, size=8, seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return images


def test_a_saved_reference_stands_for_its_images(standin, tmp_path):
    images = write_images(tmp_path / "ref", 30)
    write_images(tmp_path / "fake", 12, seed=1)
    common = ("--features", standin, "--per-proc-batch-size", 7)
    cli("--ref", tmp_path / "ref", "--save-ref", tmp_path / "ref.npz", *common)
    with np.load(tmp_path / "ref.npz") as saved:
        assert set(saved.files) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "network"}
        np.testing.assert_array_equal(saved["arr_0"], images)
        arrays = dict(saved)
    fake = ("--samples", tmp_path / "fake", *common)
    by_folder = cli(*fake, "--ref", tmp_path / "ref", out=tmp_path / "a.json")
    by_file = cli(*fake, "--ref", tmp_path / "ref.npz", out=tmp_path / "b.json")
    assert same(by_folder, by_file)
    unnamed = {name: array for name, array in arrays.items() if name != "network"}
    np.savez(tmp_path / "adm.npz", **unnamed | dict(mu=arrays["mu"] + 1))
    moved = cli(*fake, "--ref", tmp_path / "adm.npz", out=tmp_path / "c.json")
    shift = np.sum((arrays["mu"] + 1 - compute_mean(tmp_path / "fake", standin)) ** 2)
    # Stored statistics win.
    assert moved["fid"] != pytest.approx(by_file["fid"], rel=1e-3) and shift > 0
    assert moved["precision"] == by_file["precision"]
    np.savez(tmp_path / "stats.npz", mu=arrays["mu"], sigma=arrays["sigma"])
    args = (*fake, "--ref", tmp_path / "stats.npz")
    by_statistics = cli(*args, "--metrics", "fid", out=tmp_path / "d.json")
    assert by_statistics["fid"] == pytest.approx(by_file["fid"], abs=1e-9)
    for metrics, word in (("fid,sfid", "mu_s"), ("fid,pr", "arr_0"), ("kid", "arr_0")):
        with pytest.raises(InputError, match=word):
            cli(*args, "--metrics", metrics)
    with pytest.raises(InputError, match="clean"):
        cli(*fake, "--ref", tmp_path / "ref.npz", "--resize", "clean")
    np.savez(tmp_path / "other.npz", **arrays | dict(network="another-adm"))
    with pytest.raises(InputError, match="another-adm"):
        cli(*fake, "--ref", tmp_path / "other.npz")


def compute_mean(folder, standin):
    images = torch.stack([image for image, _ in evaluate.load_folder(folder)])
    return load_features(standin, "cpu")(images)[0].numpy().mean(0)


def test_mixed_sizes_are_for_clean_only(standin, tmp_path):
    write_images(tmp_path / "ref", 9)
    write_images(tmp_path / "mixed", 8)
    Image.new("RGB", (10, 8)).save(tmp_path / "mixed" / "wide.png")
    args = ("--samples", tmp_path / "mixed", "--ref", tmp_path / "ref", "--features", standin,
            "--metrics", "fid")
    with pytest.raises(InputError, match="10 x 8"):
        cli(*args)
    assert cli(*args, "--resize", "clean", out=tmp_path / "a.json")["num_samples"] == 9


def test_every_phase_has_a_bar_that_ends(checkpoint, standin, forty, monkeypatch):
    bars = {}

    class Bar(contextlib.nullcontext):
        def __init__(self, accelerator, text, total):
            super().__init__(self)
            self.text, bars[text] = text, [0, total]

        def advance(self, count=1):
            bars[self.text][0] += count

    monkeypatch.setattr(evaluate, "ProgressBar", Bar)
    cli("--ckpt", checkpoint, "--features", standin, "--ref", forty, "--num-fid-samples", 8,
        "--per-proc-batch-size", 3, "--val-split", 0.3)
    held = bars[Path(forty).name][0]
    assert bars == {Path(forty).name: [held, held], "samples": [8, 8], "distances": [8, 8]}


def test_several_checkpoints_are_compared(checkpoint, standin, forty, tmp_path, capsys):
    runs = cli("--ckpt", checkpoint, checkpoint, "--features", standin, "--ref", forty,
               "--num-fid-samples", 8, "--metrics", "fid,pr", "--plot", tmp_path / "plot.png",
               out=tmp_path / "a.json")
    assert len(runs) == 2 and runs[0] == runs[1] and Image.open(tmp_path / "plot.png").size[0] > 300
    assert capsys.readouterr().out.count("step 30") == 2


def test_flags_and_files_that_cannot_be_used(checkpoint, standin, forty, tmp_path):
    """What only a stand-in of Inception shows; tests/test_bad_input.py has the others."""
    (tmp_path / "text.npz").write_text("no archive")
    for flags, words in (
            (("--samples", forty, "--ref", forty, "--features", tmp_path / "text.npz"),
             "text.npz is no TorchScript"),
            (("--ckpt", checkpoint, "--resize", "clean"), "efficientnet")):
        with pytest.raises(InputError, match=words) as raised:
            cli(*flags)
        assert "\n" not in str(raised.value)


# ---------------------------------------------------------- what people bring


def statistics_file(path, **changes):
    """An .npz of statistics alone, as clean-fid and others write it."""
    np.savez(path, **dict(mu=np.zeros(24), sigma=np.eye(24)) | changes)
    return path


@pytest.mark.parametrize(("name", "where", "value", "words"), [
    ("mu", 3, np.nan, "mu .*nan at .3."), ("mu", 23, np.inf, "mu .*inf at .23."),
    ("sigma", (1, 2), np.nan, "sigma .*nan at .1, 2."), ("mu_s", 0, -np.inf, "mu_s .*-inf at .0.")])
def test_statistics_that_are_not_finite_are_named(standin, tmp_path, name, where, value, words):
    arrays = dict(mu=np.zeros(24), sigma=np.eye(24), mu_s=np.zeros(7), sigma_s=np.eye(7))
    arrays[name][where] = value
    path = statistics_file(tmp_path / "ref.npz", **arrays)
    write_images(tmp_path / "fake", 8)
    with pytest.raises(InputError, match=words):
        cli("--samples", tmp_path / "fake", "--ref", path, "--features", standin)


@pytest.mark.parametrize("resize", ["adm", "clean"])
def test_statistics_alone_give_the_metrics_that_they_allow(standin, tmp_path, capsys, resize):
    write_images(tmp_path / "fake", 8)
    args = ("--samples", tmp_path / "fake", "--ref", statistics_file(tmp_path / "ref.npz"),
            "--features", standin, "--resize", resize)
    result = cli(*args, out=tmp_path / "a.json")
    assert {"fid", "inception_score"} <= result.keys() and result["num_reference"] is None
    assert not {"sfid", "precision", "kid", "density"} & result.keys()
    said = capsys.readouterr().out
    assert said.count("left out") == 1 and "sfid (ref.npz has no mu_s" in said
    assert "kid (ref.npz has no images arr_0" in said
    adm = statistics_file(tmp_path / "adm.npz", mu_s=np.zeros(7), sigma_s=np.eye(7))
    if resize == "clean":
        with pytest.raises(InputError, match="the ADM suite"):
            cli(*args, "--ref", adm)


def test_metrics_that_few_images_do_not_allow_are_left_out_or_refused(
        checkpoint, standin, forty, tmp_path, capsys, monkeypatch):
    args = ("--ckpt", checkpoint, "--features", standin, "--ref", forty, "--num-fid-samples", 4)
    result = cli(*args, out=tmp_path / "a.json")
    assert {"fid", "precision", "kid"} <= result.keys() and "density" not in result
    assert "left out are dc (4 images are too few" in capsys.readouterr().out
    monkeypatch.setattr(evaluate, "sample_images", None)  # nothing is drawn before it is refused
    with pytest.raises(InputError, match="dc .4 images"):
        cli(*args, "--metrics", "fid,dc")
    with pytest.raises(InputError, match="fid .1 images"):
        cli(*args, "--num-fid-samples", 1, "--metrics", "fid")


def test_the_default_reference_is_what_the_model_was_trained_on(
        checkpoint, standin, tmp_path, monkeypatch):
    write_images(tmp_path / "data", 9)
    model = load_checkpoint(checkpoint)
    few = ("--features", standin, "--num-fid-samples", 4, "--metrics", "fid")
    for metadata in (dict(data_path=str(tmp_path / "data")), dict(data_path=str(tmp_path / "gone")),
                     dict()):
        path = tmp_path / f"{len(metadata)}{metadata.get('data_path', '')[-4:]}.safetensors"
        save_checkpoint(path, model, vae="none", sampling=dict(num_sampling_steps=2), **metadata)
    result = cli("--ckpt", tmp_path / "1data.safetensors", *few, out=tmp_path / "a.json")
    assert (result["reference"], result["num_reference"]) == ("data", 9)
    with pytest.raises(InputError, match="gone.*--ref"):
        cli("--ckpt", tmp_path / "1gone.safetensors", *few)
    for flags in (("--ckpt", tmp_path / "0.safetensors", *few), ("--samples", tmp_path / "data"),
                  ("--save-ref", tmp_path / "ref.npz"), ()):
        with pytest.raises(InputError, match="give --ref"):
            cli(*flags)


@pytest.mark.parametrize("size", [(10, 8), (4, 16)])
def test_a_reference_of_several_sizes_is_refused_before_it_is_read(tmp_path, size, monkeypatch):
    write_images(tmp_path / "ref", 9)
    Image.new("RGB", size).save(tmp_path / "ref" / "wide.png")
    args = ("--ref", tmp_path / "ref", "--features", "efficientnet-lite0", "--save-ref",
            tmp_path / "ref.npz")
    read, images = [], evaluate.ImageData.read
    monkeypatch.setattr(evaluate.ImageData, "read",
                        lambda *args: read.append(args) or images(*args))
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]}.*--image-size"):
        cli(*args)
    assert not (tmp_path / "ref.npz").exists() and not read
    monkeypatch.setattr(evaluate.ImageData, "check_one_size", lambda data: None)
    with pytest.raises(InputError, match=f"{size[0]} x {size[1]}.*--image-size"):
        cli(*args)  # found while it is read
    assert not (tmp_path / "ref.npz").exists() and read
    cli(*args, "--image-size", 8)
    assert np.load(tmp_path / "ref.npz")["arr_0"].shape == (10, 8, 8, 3)


def test_features_that_are_not_finite_name_their_image(forty, tmp_path):
    calls = []

    class Broken(Pixels):
        def __call__(self, images):
            features, probs, _ = super().__call__(images)
            calls.append(images)
            if len(calls) == 2:
                features[3, 5] = torch.nan
            return features, probs, None

    one = make_accelerator()
    with pytest.raises(InputError, match=r"image .*/11\.png are not finite"):
        reference_features(evaluate.load_folder(forty), Broken(), one, batch_size=8)
    np.savez(tmp_path / "a.npz", np.zeros((40, 8, 8, 3), np.uint8))
    calls.clear()
    with pytest.raises(InputError, match=r"image 11 of a\.npz are not finite"):
        reference_features(NpzImages(tmp_path / "a.npz"), Broken(), one, batch_size=8)


@pytest.mark.parametrize(("sigma", "words"), [
    (np.triu(np.ones((24, 24))), "not symmetric"), (-np.eye(24), "negative")])
def test_a_matrix_that_is_no_covariance_is_named(standin, forty, tmp_path, sigma, words):
    path = statistics_file(tmp_path / "ref.npz", sigma=sigma)
    with pytest.raises(InputError, match=f"sigma of .*ref.npz is no covariance.*{words}"):
        cli("--samples", forty, "--ref", path, "--features", standin)


def test_a_file_of_another_kind_is_a_data_set(standin, forty, tmp_path):
    content = [dict(bytes=path.read_bytes(), path=None) for path in sorted(Path(forty).iterdir())]
    rows = datasets.Dataset.from_dict(dict(image=content)).cast_column("image", datasets.Image())
    rows.to_parquet(tmp_path / "ref.parquet")
    result = cli("--samples", forty, "--ref", tmp_path / "ref.parquet", "--image-size", 8,
                 "--features", standin, "--metrics", "fid", out=tmp_path / "a.json")
    assert result["num_reference"] == 40 and result["fid"] == pytest.approx(0, abs=1e-6)


def test_images_that_the_model_left_out_are_left_out(checkpoint, standin, tmp_path):
    write_images(tmp_path / "data", 9)
    (tmp_path / "data" / "004.png").write_text("no picture")
    model = load_checkpoint(checkpoint)
    for name, left_out in (("whole", []), ("partly", [4])):
        save_checkpoint(tmp_path / f"{name}.safetensors", model, vae="none", left_out=left_out,
                        sampling=dict(num_sampling_steps=2), data_path=f"{tmp_path}/data")
    few = ("--features", standin, "--num-fid-samples", 4, "--metrics", "fid")
    for spelled in ((), ("--ref", f"{tmp_path}/./data/")):
        result = cli("--ckpt", tmp_path / "partly.safetensors", *few, *spelled,
                     out=tmp_path / "a.json")
        assert result["num_reference"] == 8
        with pytest.raises(InputError, match=r"cannot read image .*004\.png"):
            cli("--ckpt", tmp_path / "whole.safetensors", *few, *spelled)


def test_metrics_may_go_to_what_is_no_file(forty, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    flags = ["--samples", forty, "--ref", forty, "--json"]
    evaluate.check_args(parse_args([*flags, str(tmp_path / "pipe")]))
    with pytest.raises(InputError, match="--json"):
        evaluate.check_args(parse_args([*flags, str(tmp_path)]))


# ---------------------------------------------------------- against held-out real images


@pytest.fixture(scope="module")
def digits():
    """The pixels of the digits as features (1797, 64), in a random order, and their labels."""
    data = load_data("digits")
    order = np.random.default_rng(0).permutation(len(data))
    rows = torch.stack([data[int(i)][0][0].flatten().float() for i in order])
    return rows, torch.from_numpy(data.labels[order])


def test_the_nearest_row_is_exact():
    for name in ("plain", "ties", "copies", "offset"):
        real = torch.from_numpy(RNG.normal(size=(150, 7)))
        fake = torch.from_numpy(RNG.normal(size=(60, 7)))
        if name == "ties":
            real, fake = real.round(), fake.round()
        if name == "copies":
            fake[:20] = real[50:70]
        if name == "offset":
            real, fake = real + 1e6, fake + 1e6
        number, nearness = find_nearest(real, fake)
        distances = (fake[:, None] - real).square().sum(2)
        own = (real[:, None] - real).square().sum(2).fill_diagonal_(torch.inf).min(1).values
        least = distances.min(1).values
        assert torch.equal(distances[range(60), number], least)
        expected = torch.where(least == 0, 0, least / own[number])
        torch.testing.assert_close(nearness, expected, rtol=1e-12, atol=0)


def test_planted_copies_are_found_and_fresh_digits_are_not_accused(digits):
    rows, _ = digits
    train, fresh, yardstick = rows.split([1000, 400, 397])
    planted = torch.cat([fresh[:190], train[::100], fresh[190:]])
    _, nearness = find_nearest(train, planted)
    assert sorted(nearness.topk(10, largest=False).indices.tolist()) == list(range(190, 200))
    assert (nearness == 0).sum() == 10
    low, high = evaluate.wilson_interval(memorization(train, yardstick), len(yardstick))
    assert low < memorization(train, fresh) < high
    half = torch.cat([fresh[:200], train[:200]])
    assert memorization(train, half) > high + 0.1


def test_a_copy_of_an_image_that_stands_twice_counts():
    real = torch.tensor([[0.0], [0.0], [5.0], [9.0]])
    assert memorization(real, torch.tensor([[0.0], [5.0], [0.1], [6.0]])) == 0.75


def test_real_against_real_has_a_ratio_of_one(digits):
    rows, _ = digits
    train, fresh, held = rows.double().split([997, 400, 400])
    pool = evaluate.sum_rows(train).result()
    ratio, error = frechet_ratio(*pool, fresh, held)
    spread = math.exp(1.96 * error)
    assert 1 / spread < ratio < spread < 1.5
    assert frechet_ratio(*pool, fresh + 30, held)[0] > spread
    # Equal counts: fewer rows are farther by their number alone.
    ratio, _ = frechet_ratio(*pool, torch.cat([fresh, held]), held[:200])
    assert 1 / spread < ratio < spread * 1.2


def test_the_error_of_the_ratio_equals_its_spread():
    rng, found = np.random.default_rng(3), []
    pool = torch.zeros(3).double(), torch.eye(3).double()
    draw = lambda shift: torch.from_numpy(rng.normal(size=(300, 3)) + shift)
    for _ in range(150):
        found.append(frechet_ratio(*pool, draw(0.5), draw(0.3)))
    ratios, errors = np.array(found).T
    assert np.mean(errors) == pytest.approx(np.std(np.log(ratios)), rel=0.2)


def class_folders(folder, seed=0, each=20):
    """Pictures of two classes that differ in brightness."""
    rng = np.random.default_rng(seed)
    for name, mean in (("dark", 60), ("light", 180)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = rng.integers(mean - 50, mean + 50, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.png")
    return folder


def test_held_out_images_are_the_yardstick(standin, tmp_path, capsys):
    class_folders(tmp_path / "ref", each=60)
    class_folders(tmp_path / "fake", seed=1)
    shutil.copy(tmp_path / "ref" / "dark" / "07.png", tmp_path / "fake" / "dark" / "07.png")
    args = ("--samples", tmp_path / "fake", "--ref", tmp_path / "ref", "--features", standin,
            "--resize", "clean")
    result = cli(*args, "--val-split", 0.4, "--neighbours", tmp_path / "near.png",
                 out=tmp_path / "a.json")
    assert result["num_reference"] + result["num_held_out"] == 120
    assert 30 < result["num_held_out"] < 66
    assert result["fdr_low"] < result["fdr"] < result["fdr_high"]
    for name in ("class_agreement", "memorization", "memorization_real"):
        assert 0 <= result[f"{name}_low"] <= result[name] <= result[f"{name}_high"] <= 1
    assert result["class_agreement"] > 0.9
    said = capsys.readouterr().out
    titles = ["FID", "fdr", "class agreement", "memorisation", "precision", "recall", "coverage"]
    places = [said.index(f"{title} ") for title in titles]
    assert places == sorted(places) and "1 means near as real" in said

    # The planted copy comes first, above its original.
    picture = np.asarray(Image.open(tmp_path / "near.png"))
    data = load_data(str(tmp_path / "fake"))
    copy = data[7][0].permute(1, 2, 0).numpy().repeat(8, 0).repeat(8, 1)
    found = [y for y in range(picture.shape[0] - 64) if (picture[y : y + 64, 2:66] == copy).all()]
    assert len(found) == (2 if "07" in held_in(tmp_path / "ref", 0.4) else 1)

    # By default nothing is held out, and what needs it is left out.
    result = cli(*args, out=tmp_path / "b.json")
    assert "fdr" not in result and result["num_reference"] == 120 and "memorization" in result
    assert "fdr" not in capsys.readouterr().out
    with pytest.raises(InputError, match="--val-split 2"):
        cli(*args, "--val-split", 2)
    with pytest.raises(InputError, match="cannot compute fdr .it needs held-out real images"):
        cli(*args, "--metrics", "fdr")
    with pytest.raises(InputError, match="mem"):
        cli(*args, "--metrics", "fid", "--neighbours", tmp_path / "near.png")


def test_a_training_run_scores_digits_by_all_that_its_end_table_shows(capsys):
    """The calls that the trainer makes, of its data without the share that it holds out."""
    model, network, one = small_dit(num_classes=10), Pixels(), make_accelerator()
    model.metadata = dict(class_names=[str(digit) for digit in range(10)])
    data, held = load_data("digits").hold_out(0.1)
    metrics = evaluate.choose_metrics(
        None, network, data, 20, evaluate.model_classes(model), held)
    real = reference_features(data, network, one, metrics)
    yardstick = reference_features(held, network, one, ("mem",))
    result = evaluate.evaluate_model(model, create_diffusion("2"), Autoencoder(channels=1), real,
                                     network, 20, one, metrics=metrics, held=yardstick)
    assert result["num_held_out"] == len(held) and result["num_reference"] == len(data)
    capsys.readouterr()
    evaluate.print_metrics(result)
    first_column = [line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines()
                    if line.startswith("│")]
    assert [name for name in first_column if name != "memorisation, real"][:7] == [
        "FD", "fdr", "class agreement", "memorisation", "precision", "recall", "coverage"]


def held_in(folder, share):
    rest, _ = load_data(str(folder)).hold_out(share)
    return {Path(rest.images[int(row)]["path"]).stem for row in rest.rows if row < 60}


def test_what_is_held_out_depends_on_the_image_alone(tmp_path):
    data = load_data(str(class_folders(tmp_path / "ref", each=60)))
    rest, held = data.hold_out(0.3)
    assert len(rest) + len(held) == 120 and not set(rest.rows) & set(held.rows)
    fewer, held_then = data.without([0, 5, 9]).hold_out(0.3)
    assert set(held_then.rows) == set(held.rows) - {0, 5, 9} and set(fewer.rows) < set(rest.rows)


def test_another_split_is_held_out_by_name(standin, tmp_path):
    for split, seed in (("train", 0), ("val", 1)):
        class_folders(tmp_path / "ref" / split, seed)
    args = ("--samples", class_folders(tmp_path / "fake", 2), "--ref", tmp_path / "ref",
            "--features", standin, "--metrics", "fdr,mem")
    result = cli(*args, "--val-split", "validation", out=tmp_path / "a.json")
    assert result["num_held_out"] == 40 and {"fdr", "memorization_real"} <= result.keys()
    with pytest.raises(InputError, match="itself"):
        cli(*args, "--val-split", "train")


def test_classes_of_other_names_are_not_compared(standin, tmp_path, capsys):
    class_folders(tmp_path / "ref")
    class_folders(tmp_path / "fake", 1)
    (tmp_path / "fake" / "dark").rename(tmp_path / "fake" / "pale")
    args = ("--samples", tmp_path / "fake", "--ref", tmp_path / "ref", "--features", standin)
    assert "class_agreement" not in cli(*args, out=tmp_path / "a.json")
    assert "agree (the reference ref has not the samples' classes)" in capsys.readouterr().out


def test_imagenets_classes_are_read_by_the_network_itself():
    """Where the labels are ImageNet's thousand, the classifier's own reading counts."""
    network = load_features("efficientnet-lite0", "cpu")
    rows = torch.from_numpy(RNG.normal(size=(40, 12)))
    common = dict(network=network.name, rows=rows, classes=(1000, None))
    labels = torch.arange(40) % 7
    real = evaluate.Features("real", 40, labels=(labels + 1) % 7, **common)
    fake = evaluate.Features("fake", 40, labels=labels, read=labels.clone(), **common)
    fake.read[:10] = 999
    assert evaluate.compare(real, fake, network, ("agree",))["class_agreement"] == 0.75
    fake.classes = real.classes = (7, None)
    assert evaluate.compare(real, fake, network, ("agree",))["class_agreement"] == 0


# ---------------------------------------------------------- sweeps and plots


def test_each_row_of_a_sweep_equals_the_single_run(
        checkpoint, standin, forty, tmp_path, monkeypatch):
    args = ("--ckpt", checkpoint, "--features", standin, "--ref", forty, "--num-fid-samples", 8,
            "--metrics", "fid,is,pr")
    seen, features = [], evaluate.reference_features
    monkeypatch.setattr(evaluate, "reference_features",
                        lambda *args, **kwargs: seen.append(1) or features(*args, **kwargs))
    rows = cli(*args, "--sweep", "cfg_scale=1,2.5", "--plot", tmp_path / "plot.png",
               "--save-images", tmp_path / "png", out=tmp_path / "a.json")
    assert len(seen) == 1 and [row["cfg_scale"] for row in rows] == [1, 2.5]
    assert Image.open(tmp_path / "plot.png").size[0] > 800
    for scale, row in zip((1, 2.5), rows, strict=True):
        alone = cli(*args, "--cfg-scale", scale, out=tmp_path / "b.json")
        assert alone == {name: value for name, value in row.items() if name != "sweep"}
    assert len(list((tmp_path / "png" / "cfg_scale=2.5").glob("*.png"))) == 8

    # Killed and started again, it draws no sample twice.
    monkeypatch.setattr(evaluate, "sample_images", None)
    again = cli(*args, "--sweep", "cfg_scale=1,2.5", "--save-images", tmp_path / "png",
                out=tmp_path / "c.json")
    assert again == rows
    for flags, words in ((("--sweep", "cfg_scale=1,x"), "cfg_scale=1,x"),
                         (("--sweep", "colour=1"), "colour=1"),
                         (("--sweep", "cfg_scale=1", "--cfg-scale", 2), "--cfg-scale"),
                         (("--sweep", "cfg_scale=1", "--save-npz", tmp_path / "x.npz"), "--sweep"),
                         (("--sweep", "num_sampling_steps=0"), "--num-sampling-steps 0")):
        with pytest.raises(InputError, match=words):
            cli(*args, *flags)


def test_a_sweep_of_intervals_and_samplers(checkpoint, standin, forty, tmp_path, capsys):
    args = ("--ckpt", checkpoint, "--features", standin, "--ref", forty, "--num-fid-samples", 4,
            "--metrics", "fid", "--plot", tmp_path / "plot.png")
    rows = cli(*args, "--cfg-scale", 2, "--sweep", "guidance_interval=0.1:5,0:200",
               out=tmp_path / "a.json")
    assert [row["guidance_interval"] for row in rows] == [[0.1, 5], [0, 200]]
    rows = cli(*args, "--sweep", "sampler=ddim,dpm++", out=tmp_path / "b.json")
    assert [row["sampler"] for row in rows] == ["ddim", "dpm++"]
    assert "sampler ddim" in capsys.readouterr().out


def test_a_runs_curves(tmp_path, capsys):
    lines = [dict(step=i, loss=1 / i, images_per_second=9.0) for i in range(1, 40)]
    lines += [dict(step=20, fd=3.0, fd_low=2.5, fd_high=3.5, recall=0.5, num_samples=9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    cli("--plot-run", tmp_path)
    assert Image.open(tmp_path / "curves.png").size[0] > 800 and "wrote" in capsys.readouterr().out
    cli("--plot-run", tmp_path, "--plot", tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() == (tmp_path / "curves.png").read_bytes()
    with pytest.raises(InputError, match="--json does nothing"):
        cli("--plot-run", tmp_path, out=tmp_path / "a.json")
    for text in ("", "{", '{"loss": 1}', '{"step": 1}'):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(InputError, match="metrics.jsonl"):
            cli("--plot-run", tmp_path)


# ---------------------------------------------------------- autoencoders


def test_psnr_and_ssim_are_scikit_images():
    """The expected values are scikit-image 0.26's, with the settings that the docstrings name."""
    rng = np.random.default_rng(7)
    x = rng.integers(0, 256, (2, 3, 24, 30), dtype=np.uint8)
    noise = np.round(rng.normal(size=x.shape) * [[[[20]]], [[[60]]]])
    y = (x + noise).clip(0, 255).astype(np.uint8)
    pair = torch.from_numpy(x), torch.from_numpy(y)
    psnr, ssim = evaluate.peak_signal_to_noise(*pair), evaluate.structural_similarity(*pair)
    assert psnr.tolist() == pytest.approx([22.40796214596187, 13.826844114178718], abs=1e-9)
    assert ssim.tolist() == pytest.approx([0.9644712850337404, 0.777771541452383], abs=1e-9)
    same = evaluate.structural_similarity(pair[0], pair[0])
    assert same.tolist() == pytest.approx([1, 1], abs=1e-12)
    assert evaluate.peak_signal_to_noise(pair[0], pair[0]).tolist() == [math.inf] * 2


def test_an_autoencoder_is_scored(standin, tmp_path, capsys):
    class_folders(tmp_path / "data", each=5)
    args = ("--reconstruct", tmp_path / "data", "--features", standin, "--image-size", 16,
            "--per-proc-batch-size", 4)
    same = cli(*args, "--vae", "none", out=tmp_path / "a.json")
    assert same["psnr"] == math.inf and same["ssim"] == pytest.approx(1, abs=1e-12)
    assert same["num_samples"] == 10
    result = cli(*args, "--vae", save_vae(tmp_path / "vae"), "--plot", tmp_path / "grid.png",
                 out=tmp_path / "b.json")
    assert 0 <= same["rfid"] < 1e-4 * result["rfid"]  # this network's features are tiny numbers
    assert result["psnr"] < 30 and result["ssim"] < 0.9
    assert "rFID" in capsys.readouterr().out

    # By hand: the crops, the means of the latents, all images at once.
    data, vae = load_data(str(tmp_path / "data"), 16), Autoencoder.load(tmp_path / "vae")
    images = torch.stack([image for image, _ in data])
    mean = vae.encode(images).chunk(2, dim=1)[0]
    made = vae.decode(mean * vae.scale)
    error = (made.double() - images).square().mean((1, 2, 3))
    assert result["psnr"] == pytest.approx(float((10 * (255**2 / error).log10()).mean()), abs=1e-3)
    picture = Image.open(tmp_path / "grid.png")
    assert picture.size[0] > 4 * 64 and picture.size[1] >= 3 * 64
    with pytest.raises(InputError, match="--ref does nothing"):
        cli(*args, "--ref", tmp_path / "data")


# ---------------------------------------------------------- references are read once


class Counted(Pixels):
    """A feature network that counts the images that it sees."""

    seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return super().__call__(images)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip([*a.pool, a.rows], [*b.pool, b.rows], strict=True))


def test_a_reference_is_read_once(tmp_path, capsys):
    images = write_images(tmp_path / "ref", 9)
    network, one = Counted(), make_accelerator()

    def features(size=None, **options):
        data = load_data(str(tmp_path / "ref"), size)
        return reference_features(data, network, one, cache=True, **options)

    first = features()
    file, = (evaluate.cache_folder() / "references").iterdir()
    assert network.seen == 9 and equal(first, features()) and network.seen == 9
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("reference")]
    assert "kept in" in said[0] and "read from" in said[1] and str(file) in said[1]
    assert "0 MB are kept there, at most 4 GB" in said[1]

    # Another crop, other pictures: another file.
    features(size=4)
    Image.fromarray(images[0][::-1].copy()).save(tmp_path / "ref" / "000.png")
    features()
    assert network.seen == 27 and len(list(file.parent.iterdir())) == 3

    # What is missing is added, and stays.
    Image.fromarray(images[0]).save(tmp_path / "ref" / "000.png")
    file.unlink()
    features(metrics=("fid",))
    features(metrics=("kid",))
    assert network.seen == 45 and equal(first, features()) and network.seen == 45


@pytest.mark.parametrize("how", ["cut", "empty", "flipped"])
def test_a_damaged_file_is_made_anew(how, tmp_path, capsys):
    write_images(tmp_path / "ref", 9)
    network, data = Counted(), load_data(str(tmp_path / "ref"))
    features = lambda: reference_features(data, network, make_accelerator(), cache=True)
    first = features()
    file, = (evaluate.cache_folder() / "references").iterdir()
    content = bytearray(file.read_bytes())
    content[-9] ^= 64
    cut = dict(cut=content[:-40], empty=b"", flipped=content)
    file.write_bytes(cut[how])
    assert equal(first, features()) and network.seen == 18
    assert f"{file} is damaged" in capsys.readouterr().out
    assert equal(first, features()) and network.seen == 18


def test_the_cache_is_bounded_and_can_be_done_without(tmp_path, monkeypatch, capsys):
    folder = evaluate.cache_folder() / "references"
    monkeypatch.setattr(evaluate, "CACHE_BYTES", 6000)
    network, one = Counted(), make_accelerator()
    data = [load_data(str(tmp_path / str(i)))
            for i in range(4) if len(write_images(tmp_path / str(i), 9, seed=i))]
    read = lambda i: reference_features(data[i], network, one, cache=True)
    read(0)
    oldest, = folder.iterdir()
    (folder / "notes.safetensors").write_text("somebody's")
    for age, i in ((100, 1), (200, 0), (50, 2), (0, 3)):
        read(i)
        os.utime(max(folder.glob("?" * 32 + ".*"), key=os.path.getmtime), (2e9 - age, 2e9 - age))
    sizes = [path.stat().st_size for path in folder.glob("?" * 32 + ".*")]
    assert sum(sizes) <= 6000 and len(sizes) >= 2 and not oldest.exists()
    assert (folder / "notes.safetensors").exists()
    monkeypatch.setattr(evaluate, "CACHE_BYTES", 100)
    seen = network.seen
    reference_features(load_data(str(tmp_path / "3"), 4), network, one, cache=True)
    assert network.seen == seen + 9 and "too large" in capsys.readouterr().out


def test_metrics_that_need_nothing_of_the_reference(standin, forty, tmp_path):
    args = ("--samples", forty, "--ref", forty, "--features", standin, "--metrics", "is")
    for _ in range(2):
        assert cli(*args, out=tmp_path / "a.json")["inception_score"] >= 1


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path, standin, forty, capsys):
    evaluate.cache_folder().write_text("a file in its place")
    args = ("--samples", forty, "--ref", forty, "--features", standin, "--metrics", "fid")
    assert cli(*args, out=tmp_path / "a.json")["fid"] == pytest.approx(0, abs=1e-6)
    assert "are not kept" in capsys.readouterr().out
    cli(*args, "--no-reference-cache")
    assert "kept" not in capsys.readouterr().out


def test_turned_images_are_counted(tmp_path, standin, capsys):
    write_images(tmp_path / "ref", 9)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(tmp_path / "ref" / "000.png").save(tmp_path / "ref" / "000.png", exif=exif)
    args = ("--samples", tmp_path / "ref", "--ref", tmp_path / "ref", "--features", standin,
            "--metrics", "fid")
    for _ in range(2):  # the second time from the cache
        cli(*args)
        assert capsys.readouterr().out.count("1 of the 9 images of ref were turned upright") == 2
    cli(*args, "--no-upright")
    assert "turned upright" not in capsys.readouterr().out
