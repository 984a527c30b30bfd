"""What goes wrong outside the programs: full disks, damaged and hostile files, two runs at once, numbers not finite.

Every command line is called in this process as its script calls it, so that a fault can be put anywhere; what
tests/chaos.py does to whole processes is not repeated here, nor what the tests of single files show already.
"""

import builtins
import errno
import io
import json
import os
import pathlib
import shutil
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

import dit
import evaluate
import sample_grid
import train_accelerate
from dit import DiT, InputError, load_checkpoint, run_command, save_checkpoint

NO_SPACE = os.strerror(errno.ENOSPC)
SMALL = ["--model", "DiT-Test/2", "--image-size", "8", "--vae", "none", "--global-batch-size", "8", "--num-workers",
         "0", "--num-sampling-steps", "2", "--max-steps", "6", "--ckpt-every", "2", "--log-every", "1",
         "--sample-every", "4", "--eval-every", "4", "--eval-samples", "8", "--lr", "0.01", "--warmup-steps", "1"]


class Pixels:
    """A feature network that costs nothing: 2 x 2 mean pixels."""

    name, distance, spatial, width, any_size = "pixels", "FD", False, 12, True

    def __call__(self, images):
        rows = torch.nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return rows, (rows[:, :10] / 50).softmax(1), None


@pytest.fixture(scope="module", autouse=True)
def quick():
    """A network of a few weights and features without a network, in all scripts."""
    with pytest.MonkeyPatch.context() as patch:
        config = dict(depth=1, hidden_size=16, patch_size=2, num_heads=2)
        patch.setitem(dit.DEMO_CONFIGS, "DiT-Test/2", config)
        patch.setitem(dit.HEADS, 16, 2)
        for script in (evaluate, train_accelerate):
            patch.setattr(script, "load_features", lambda *args: Pixels())
        yield


def pictures(folder, count=24, size=8):
    for i in range(count):
        target = Path(folder) / "ab"[i % 2] / f"{i:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        image = np.random.default_rng(i).integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(image).save(target)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    command(train_accelerate, *train_flags(data, folder), "--max-steps", "4")
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy of that run, to be gone on with."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def train_flags(data, folder):
    return [*SMALL, "--data-path", data, "--results-dir", folder.parent, "--run-name", folder.name]


def command(script, *flags):
    run_command(script.main, script.parse_args([str(flag) for flag in flags]))


def refused(capsys, script, *flags):
    """The one line on stderr with which a command ends with status 2; stdout is not looked at."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, warnings.catch_warnings(record=True) as shown:
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # as Python does where no tests run
        command(script, *flags)
    assert not shown, [str(warning.message) for warning in shown]
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------ a full disk


class FullDisk:
    """A disk that is full from its n-th writing operation on, counted from 0, as far as the files below `root` go.

    Operations: to create a file or folder, to write, to sync, to rename. `seen` lists them as (what, path). safetensors
    and torch write by themselves: they fail in the middle of a file, as they were seen to do on a full tmpfs.
    """

    def __init__(self, root, n):
        self.root, self.n, self.seen = str(root), n, []

    @property
    def full(self):
        return len(self.seen) > self.n

    def has(self, path):
        return f"{path}/".startswith(f"{self.root}/")

    def use(self, what, path):
        if self.has(path):
            self.seen.append((what, str(path)))
            if self.full:
                raise OSError(errno.ENOSPC, NO_SPACE, str(path))

    def __enter__(self):
        self.patch, disk = pytest.MonkeyPatch(), self
        plain_open, os_open = io.open, os.open

        class File(io.FileIO):
            def write(self, data):
                try:
                    disk.use("write", self.name)
                except OSError:
                    raise OSError(errno.ENOSPC, NO_SPACE) from None  # as the kernel says it: without a name
                return super().write(data)

            def fileno(self):
                if self.new:
                    raise io.UnsupportedOperation  # by which PIL would write past this class
                return super().fileno()

        def open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, **kwargs):
            if not disk.has(file) or kwargs.get("opener") or not set(mode) & set("wax+"):
                return plain_open(file, mode, buffering, encoding, errors, newline, **kwargs)
            disk.use("open", file)
            raw = File(str(file), mode.replace("b", "").replace("t", ""))
            raw.new = "w" in mode and "b" in mode
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        def open_descriptor(path, flags, *args, **kwargs):
            if flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE:
                disk.use("create", path)
            return os_open(path, flags, *args, **kwargs)

        def sync(descriptor):
            disk.use("sync", os.readlink(f"/proc/self/fd/{descriptor}"))  # and no more, for the tests' speed

        def renaming(original):
            def rename(source, target, **kwargs):
                disk.use("rename", target)
                return original(source, target, **kwargs)
            return rename

        def making(original):
            def mkdir(path, *args, **kwargs):
                if not os.path.isdir(path):
                    disk.use("mkdir", path)
                return original(path, *args, **kwargs)
            return mkdir

        def saving(original, error):
            def save(value, path, *args, **kwargs):
                original(value, path, *args, **kwargs)
                try:
                    disk.use("write", path)
                except OSError:
                    os.truncate(path, os.path.getsize(path) // 2)
                    raise error from None
            return save

        for module in (io, builtins):
            self.patch.setattr(module, "open", open_file)
        mkdir, rename = making(os.mkdir), renaming(os.replace)
        for name, function in dict(open=open_descriptor, fsync=sync, replace=rename, mkdir=mkdir).items():
            self.patch.setattr(os, name, function)
        if accessor := getattr(pathlib, "_NormalAccessor", None):  # Python 3.10: paths keep these functions themselves
            for name, function in dict(open=open_file, replace=rename, mkdir=mkdir).items():
                self.patch.setattr(accessor, name, staticmethod(function))
        rust = SafetensorError(f"Error while serializing: I/O error: {NO_SPACE} (os error 28)")
        for script in (dit, train_accelerate):
            self.patch.setattr(script, "save_file", saving(script.save_file, rust))
        torchs = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        self.patch.setattr(torch, "save", saving(torch.save, torchs))
        return self

    def __exit__(self, *exception):
        self.patch.undo()


def sweep(capsys, root, work, check=lambda: None, prepare=lambda: None):
    """work() on a disk that is full from its first, second, third ... operation on, until nothing fails any more.

    Each time it must end with status 2 and one line that names the file or folder and the reason, and leave no
    temporary file; check() looks at what is left. Returns all operations that were seen.
    """
    wrong, seen = [], []
    for n in range(400):
        prepare()
        capsys.readouterr()
        with FullDisk(root, n) as disk:
            try:
                work()
                ended = 0
            except SystemExit as error:
                ended = error.code
            except Exception as error:
                ended = repr(error)
        said = capsys.readouterr().err.splitlines()
        seen += disk.seen
        if not disk.full:
            assert ended == 0 and not wrong, "\n".join(map(str, wrong or said))
            return seen
        what, path = disk.seen[n]
        if ended != 2 or len(said) != 1 or not any(name in said[0] for name in final_names(path)) or not (
                NO_SPACE in said[0] or "is the disk full" in said[0]):
            wrong.append((what, path, ended, said))
        left = [path.name for path in Path(root).rglob("*") if ".tmp" in path.name]
        if left:
            wrong.append((what, path, "left", left))
        check()
    pytest.fail("it fails however much space there is")


def final_names(path):
    """How a message may call a path: as it is, or, of a temporary file, as what it is to become; or the folder."""
    path = Path(path)
    final = path.name.split(f".{os.getpid()}.tmp")[0].removeprefix(".") if ".tmp" in path.name else path.name
    return str(path), str(path.with_name(final)), str(path.parent)


def kinds(seen, name):
    """What was done to files of a name, or their temporary ones."""
    return {what for what, path in seen if name in Path(path).name}


def test_training_on_a_full_disk(run, data, tmp_path, capsys):
    begun, before = tmp_path / "begun", load_file(run / "checkpoints" / "0000004" / "ema.safetensors")
    shutil.copytree(run, begun)

    def prepare():
        shutil.rmtree(run)
        shutil.copytree(begun, run)

    def check():
        model = load_checkpoint(run)
        assert model.metadata["step"] in (4, 6)
        assert model.metadata["step"] == 6 or same(model.state_dict(), before)

    work = lambda: command(train_accelerate, *train_flags(data, run), "--keep-checkpoints", "2")
    seen = sweep(capsys, run, work, check, prepare)
    for name in ("config.json", "metrics.jsonl", "ema.safetensors", "model.safetensors", "optimizer.pt", "state.json",
                 "0000006.png", "best.safetensors"):
        assert {"write", "sync"} <= kinds(seen, name), name


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """The folder of a tiny KL autoencoder of diffusers."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae") / "vae"
    AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, layers_per_block=1,
                  down_block_types=["DownEncoderBlock2D"] * 2,
                  up_block_types=["UpDecoderBlock2D"] * 2).save_pretrained(folder)
    return folder


@pytest.fixture
def cached(data, vae, tmp_path, monkeypatch):
    """Flags of a run that builds a latent cache of three shards in tmp_path/cache, and then makes one step."""
    monkeypatch.setattr(train_accelerate.LatentCache, "SHARD", 8)
    return [*train_flags(data, tmp_path / "cache-run"), "--image-size", "16", "--vae", vae, "--max-steps", "1",
            "--sample-every", "0", "--eval-samples", "0", "--latent-cache", tmp_path / "cache"]


def test_caching_on_a_full_disk(cached, tmp_path, capsys):
    cache, whole = tmp_path / "cache", []

    def check():
        shards = sorted(cache.glob("moments-*"))
        assert len(shards) >= len(whole) and not any(cache.glob("index.json")) or len(shards) == 3
        whole[:] = shards  # what was there before the disk was full is used again
        for shard in shards:
            train_accelerate.shard_header(shard)

    seen = sweep(capsys, cache, lambda: command(train_accelerate, *cached), check)
    assert {"create", "write", "sync", "rename"} <= kinds(seen, "index.json") and len(whole) == 3
    index = json.loads((cache / "index.json").read_text())
    assert index["count"] == 24 and index["counts"] == [8, 8, 8]


@pytest.mark.parametrize(("flags", "name"), [
    (["--json", "out/a.json"], "a.json"), (["--save-npz", "out/a.npz"], "a.npz"),
    (["--save-images", "out/images"], "000005.png"), (["--save-images", "out/images"], "settings.json"),
    (["--ckpt", "run", "run", "--plot", "out/a.png"], "a.png")])
def test_evaluating_on_a_full_disk(trained, data, flags, name, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.json").write_text("old")
    flags = [str(tmp_path / flag) if flag.startswith("out/") else flag.replace("run", str(trained)) for flag in flags]

    def check():
        assert name == "a.json" or (tmp_path / "out" / "a.json").read_text() == "old"
        assert name != "a.json" or (tmp_path / "out" / "a.json").read_text() in ("old", *new)

    new = []
    if name == "a.json":
        command(evaluate, *flags, "--ckpt", trained, "--ref", data, "--num-fid-samples", "6")
        new.append((tmp_path / "out" / "a.json").read_text())
        (tmp_path / "out" / "a.json").write_text("old")
    common = ["--ref", data, "--num-fid-samples", "6", *([] if "--ckpt" in flags else ["--ckpt", trained])]
    seen = sweep(capsys, tmp_path / "out", lambda: command(evaluate, *common, *flags), check)
    assert {"write", "sync", "rename"} <= kinds(seen, name)


def test_a_reference_on_a_full_disk(data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "ref.npz"
    seen = sweep(capsys, out.parent, lambda: command(evaluate, "--ref", data, "--save-ref", out, "--metrics", "fid"))
    assert {"write", "sync", "rename"} <= kinds(seen, "ref.npz") and np.load(out)["arr_0"].shape == (24, 8, 8, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif"])
def test_sampling_on_a_full_disk(suffix, trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / f"a{suffix}"
    out.write_text("old")
    flags = ["--trajectory", out, "--output", tmp_path / "b.png"] if suffix == ".gif" else ["--output", out]
    check = lambda: out.read_text(errors="replace") == "old" or Image.open(out).load()
    seen = sweep(capsys, out.parent, lambda: command(
        sample_grid, "--ckpt", trained, "--class-labels", "0", "--num-sampling-steps", "2", *flags), check)
    assert {"write", "sync", "rename"} <= kinds(seen, out.name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "diffusers"])
def test_converting_on_a_full_disk(name, trained, tmp_path, capsys):
    out = tmp_path / "out"
    seen = sweep(capsys, out, lambda: command(dit, "convert", trained, out / name),
                 prepare=lambda: shutil.rmtree(out, ignore_errors=True))
    assert {"write", "sync", "rename"} <= kinds(seen, "" if name == "diffusers" else name)
    assert same(load_checkpoint(out / name).state_dict(), load_checkpoint(trained).state_dict())


# ------------------------------------------------------------------------------------------------ damaged files


def damage(path, how):
    """Cut a file in half, empty it, or flip one bit: in the middle, or of its first or last byte."""
    content = bytearray(path.read_bytes())
    if how in ("first", "middle", "last"):
        content[dict(first=0, middle=len(content) // 2, last=-1)[how]] ^= 0x80
    path.write_bytes(dict(cut=content[: len(content) // 2], empty=b"").get(how, content))


@pytest.mark.parametrize("how", ["cut", "empty", "first", "middle", "last"])
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_damaged_records_of_a_run(name, how, run, data, capsys):
    """Lines are missing, or are not what was written: a kill tears only what follows the checkpoint, see below."""
    damage(run / name, how)
    left = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = refused(capsys, train_accelerate, *train_flags(data, run))
    assert f"{run / name} is damaged" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == left  # nothing was overwritten


def test_a_log_torn_by_a_kill_is_mended(run, data):
    log = run / "metrics.jsonl"
    whole = log.read_text()
    log.write_text(whole + '{"step": 5, "loss": 0.1}\n{"step": 6, "lo')
    command(train_accelerate, *train_flags(data, run))
    lines = log.read_text().splitlines()
    assert lines[: len(whole.splitlines())] == whole.splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 6] and '"loss": 0.1}' not in lines


def test_what_a_kill_leaves_is_swept_up(run, data, cached, tmp_path):
    """Temporary names of write_atomically, of an unfinished checkpoint, and those that safetensors makes by itself."""
    (tmp_path / "cache").mkdir()
    left = [run / ".best.safetensors.123.tmp.safetensors", run / "samples" / ".0000004.png.123.tmp.png",
            run / ".tmpTYjvfW", run / "checkpoints" / ".0000006.tmp" / ".tmpTYjvfW", tmp_path / "cache" / ".tmpTYjvfW"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half a fi")
    command(train_accelerate, *train_flags(data, run))
    command(train_accelerate, *cached)
    assert not [path for path in left if path.exists()]


@pytest.mark.parametrize("script", [sample_grid, evaluate, train_accelerate])
@pytest.mark.parametrize("how", ["cut", "empty", "middle", "last"])
def test_damaged_weights(script, how, trained, data, tmp_path, capsys):
    file = tmp_path / "a.safetensors"
    shutil.copy(trained / "best.safetensors", file)
    damage(file, how)
    if script is train_accelerate:
        said = refused(capsys, script, *train_flags(data, tmp_path / "run"), "--init", file)
    else:
        said = refused(capsys, script, "--ckpt", file, "--num-sampling-steps", "2", *(
            ["--ref", data, "--num-fid-samples", "6"] if script is evaluate else ["--output", tmp_path / "a.png"]))
    assert "a.safetensors" in said and "damaged" in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.fixture(scope="module")
def reference(data, tmp_path_factory):
    """An .npz of images with their statistics."""
    path = tmp_path_factory.mktemp("ref") / "ref.npz"
    command(evaluate, "--ref", data, "--save-ref", path)
    return path


def member(path, name):
    """Where in an archive the contents of a member lie, as a slice."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo(name)
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
        start = info.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        return slice(start, start + info.compress_size)


@pytest.mark.parametrize("flag", ["--samples", "--ref"])
@pytest.mark.parametrize("how", ["cut", "empty", "last", "arr_0", "mu", "header"])
def test_damaged_npz(how, flag, reference, data, tmp_path, capsys):
    file = tmp_path / "a.npz"
    content = bytearray(reference.read_bytes())
    place = member(reference, "mu.npy" if how == "mu" else "arr_0.npy")
    content[place.start + 9 if how == "header" else place.stop - 5] ^= 1
    file.write_bytes(content if how in ("arr_0", "mu", "header") else reference.read_bytes())
    if how in ("cut", "empty"):
        damage(file, how)
    if how == "last":
        file.write_bytes(reference.read_bytes()[:-1])
    flags = dict({"--samples": data, "--ref": data}, **{flag: file})
    if how == "mu":
        flags = {"--samples": data, "--ref": file}  # the statistics of samples are not read
    said = refused(capsys, evaluate, *(word for pair in flags.items() for word in pair), "--metrics", "fid,pr")
    assert str(file) in said


@pytest.mark.parametrize("how", ["cut", "empty", "first", "middle"])
def test_a_damaged_png(how, data, tmp_path, capsys):
    broken = pictures(tmp_path / "broken") / "a" / "004.png"
    damage(broken, how)
    for flags in (["--ref", tmp_path / "broken", "--samples", data], ["--samples", tmp_path / "broken", "--ref", data]):
        assert str(broken) in refused(capsys, evaluate, *flags)
    said = refused(capsys, train_accelerate, *train_flags(tmp_path / "broken", tmp_path / "run"))
    assert str(broken) in said


@pytest.mark.parametrize("how", ["cut", "empty", "first", "middle"])
def test_damaged_samples_are_drawn_again(how, trained, data, tmp_path):
    flags = ["--ckpt", trained, "--ref", data, "--num-fid-samples", "6", "--save-images", tmp_path / "png"]
    command(evaluate, *flags)
    before = {path: path.read_bytes() for path in (tmp_path / "png").iterdir()}
    damage(tmp_path / "png" / "000003.png", how)
    command(evaluate, *flags)
    assert {path: path.read_bytes() for path in (tmp_path / "png").iterdir()} == before


@pytest.mark.parametrize("how", ["cut", "empty", "first"])
def test_damaged_settings_of_samples(how, trained, data, tmp_path, capsys):
    flags = ["--ckpt", trained, "--ref", data, "--num-fid-samples", "6", "--save-images", tmp_path / "png"]
    command(evaluate, *flags)
    damage(tmp_path / "png" / "settings.json", how)
    assert str(tmp_path / "png") in refused(capsys, evaluate, *flags)


# ------------------------------------------------------------------------------------------------ numbers not finite


class NotFinite:
    """A process whose loss, or its gradient alone, is not a number at some calls."""

    def __init__(self, process, where, calls):
        self.process, self.where, self.calls, self.seen = process, where, calls, 0

    def __getattr__(self, name):
        return getattr(self.process, name)

    def training_losses(self, model, *args):
        losses, self.seen = self.process.training_losses(model, *args), self.seen + 1
        if self.seen in self.calls:
            zero = next(p for p in model.parameters() if p.requires_grad).square().sum() * 0
            losses["loss"] = losses["loss"] + (zero.sqrt() if self.where == "gradient" else zero + torch.inf)
        return losses


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite(where, run, data, monkeypatch, capsys):
    process, flags = train_accelerate.create_diffusion, train_flags(data, run)
    calls = {2}  # the run goes on from step 4, so that this is step 6

    def create_diffusion(*args, **kwargs):
        return NotFinite(process(*args, **kwargs), where, calls)

    monkeypatch.setattr(train_accelerate, "create_diffusion", create_diffusion)
    said = refused(capsys, train_accelerate, *flags)
    files = train_accelerate.load_data(str(data), 8)
    args = train_accelerate.parse_args([str(flag) for flag in flags])
    train_accelerate.fill_preset(args)
    sampler = train_accelerate.GlobalBatches(args, len(files), 0, 6, train_accelerate.make_accelerator())
    assert "step 6" in said and str(sampler.indices(5)) in said and "--skip-nonfinite 1" in said
    assert str(run / "checkpoints" / "0000004") in said and load_checkpoint(run).metadata["step"] == 4
    command(train_accelerate, *flags, "--skip-nonfinite", "1")
    model, lines = load_checkpoint(run), map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert model.metadata["step"] == 6 and all(p.isfinite().all() for p in model.parameters())
    figures = [(line["skipped_steps"], np.isfinite(line["loss"])) for line in lines if "loss" in line]
    assert figures == [(0, True)] * 5 + [(1, True)]
    calls.update({1, 3})  # steps 7, 8 and 9, while step 6 is remembered as the first that was left out
    said = refused(capsys, train_accelerate, *flags, "--skip-nonfinite", "2", "--max-steps", "10")
    assert "--skip-nonfinite 3" in said and "step 8" in said


# ------------------------------------------------------------------------------------------------ hostile files


class Hostile:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["arr_0", "mu", "network"])
def test_object_arrays_are_never_unpickled(name, reference, data, tmp_path, capsys):
    made, file = tmp_path / "made", tmp_path / "a.npz"
    np.savez(file, **dict(np.load(reference)) | {name: np.array([Hostile(made)], dtype=object)})
    for flags in [["--samples", data, "--ref", file], ["--samples", file, "--ref", data]][: 1 + (name == "arr_0")]:
        assert str(file) in refused(capsys, evaluate, *flags)
    assert not made.exists()
    np.load(file, allow_pickle=True)[name]  # the file is as hostile as it claims
    assert made.exists()


def test_members_of_archives_do_not_escape(reference, data, tmp_path, monkeypatch, capsys):
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    file = inside / "a.npz"
    shutil.copy(reference, file)
    with zipfile.ZipFile(file, "a") as archive:
        for name in ("../escaped.npy", str(tmp_path / "escaped.npy"), "..\\escaped.npy", "a/../../escaped", ""):
            archive.writestr(name or "\N{SNOWMAN}\n.npy", b"escaped")
        link = zipfile.ZipInfo("link.npy")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc")
    command(evaluate, "--samples", file, "--ref", file, "--metrics", "fid")
    assert [path.name for path in tmp_path.iterdir()] == ["inside"] and os.listdir(inside) == ["a.npz"]
    assert "FD" in capsys.readouterr().out


def npy(shape, descr="<f8"):
    """The start of an .npy file that claims an array of this shape, and holds nothing."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, dict(descr=descr, fortran_order=False, shape=shape))
    return file.getvalue()


@pytest.mark.parametrize(("name", "content"), [
    ("arr_0", npy((10**12, 8, 8, 3), "|u1")), ("arr_0", npy((-1, 8, 8, 3), "|u1")), ("arr_0", b""),
    ("arr_0", b"\x93NUMPY\x09\x00"), ("arr_0", b"\x93NUMPY\x01\x00\x10\x00{'descr': 1/0}\n"),
    ("mu", npy((10**15,))), ("sigma", npy((10**8, 10**8))), ("mu", b"\x93NUMPY\x01\x00\x02\x00]]"), ("mu", b"text"),
    ("network", npy((), "<U9999999"))])
def test_arrays_that_are_not_what_they_claim(name, content, reference, data, tmp_path, capsys):
    file = tmp_path / "a.npz"
    with zipfile.ZipFile(reference) as old, zipfile.ZipFile(file, "w") as new:
        for other in old.namelist():
            new.writestr(other, content if other == f"{name}.npy" else old.read(other))
    flags = ["--samples", file, "--ref", data] if name == "arr_0" else ["--samples", data, "--ref", file]
    assert str(file) in refused(capsys, evaluate, *flags)


def png(width, height, *chunks):
    """A PNG file that claims a size, with other chunks (kind, content) and no pixels."""
    chunk = lambda kind, content: (len(content).to_bytes(4, "big") + kind + content
                                   + zlib.crc32(kind + content).to_bytes(4, "big"))
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in [(b"IHDR", header), *chunks, (b"IEND", b"")])


def bombs():
    """Image files of a few kilobytes that ask for gigabytes."""
    zeros = zlib.compress(bytes(10**8), 9)
    return dict(header=png(60000, 60000, (b"IDAT", zlib.compress(bytes(1000)))),
                pixels=png(60000, 60000, (b"IDAT", zeros)),
                text=png(8, 8, (b"zTXt", b"a\0\0" + zeros), (b"IDAT", zlib.compress(bytes(8 * 25)))),
                below=png(20000, 8000, (b"IDAT", zeros[:500])))


@pytest.mark.parametrize("name", bombs())
def test_image_bombs_are_refused(name, data, tmp_path, capsys):
    import resource

    bomb = pictures(tmp_path / "bombs") / "a" / "000.png"
    bomb.write_bytes(bombs()[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = refused(capsys, evaluate, "--samples", data, "--ref", tmp_path / "bombs")
    assert str(bomb) in said and (name != "below" or "20000 x 8000" in said)  # which PIL would only warn of
    assert str(bomb) in refused(capsys, evaluate, *["--samples", tmp_path / "bombs", "--ref", data])
    said = refused(capsys, train_accelerate, *train_flags(tmp_path / "bombs", tmp_path / "run"))
    assert str(bomb) in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6  # kB


def test_links_in_a_folder_of_pictures(data, tmp_path, capsys):
    """A link to pictures stands for them; one that leads back adds nothing; one that leads nowhere is named."""
    folder = tmp_path / "linked"
    folder.mkdir()
    (folder / "a").symlink_to(data / "a")
    (folder / "b").symlink_to(data / "b")
    assert len(evaluate.load_data(str(folder), 8)) == 24
    (folder / "b").unlink()
    shutil.copytree(data / "b", folder / "b")
    (folder / "b" / "back").symlink_to(folder)
    assert len(evaluate.load_data(str(folder), 8)) == 24
    (folder / "b" / "back").unlink()
    (folder / "b" / "999.png").symlink_to(tmp_path / "nowhere.png")
    assert "999.png" in refused(capsys, evaluate, "--samples", data, "--ref", folder)


def test_torchscript_is_loaded_from_the_given_path_alone(trained, data, tmp_path, monkeypatch, capsys):
    """Such a file is code. Nothing else that a command reads, and no file lying about, may be taken for one."""
    script = tmp_path / "code.pt"
    torch.jit.script(torch.nn.ReLU()).save(script)
    loaded = []
    monkeypatch.setattr(torch.jit, "load", lambda file, **kwargs: loaded.append(file) or torch.nn.ReLU())
    monkeypatch.chdir(tmp_path)
    for name in ("inception-2015-12-05.pt", "efficientnet-lite0", "inception"):
        shutil.copy(script, tmp_path / name)
    for flags in ([sample_grid, "--ckpt", script], [sample_grid, "--ckpt", trained, "--vae", script],
                  [dit, "convert", script, tmp_path / "a.safetensors"], [evaluate, "--samples", script, "--ref", data],
                  [evaluate, "--samples", data, "--ref", script],
                  [train_accelerate, *train_flags(data, tmp_path / "run"), "--init", script]):
        refused(capsys, *flags)
    command(evaluate, "--samples", data, "--ref", data, "--metrics", "fid")
    assert evaluate.load_features("efficientnet-lite0", "cpu", "adm").width and not loaded
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "code" in text.split("--features FEATURES")[-1].split("--resize")[0]  # the help says so


def test_a_vae_runs_no_pickle(vae, trained, tmp_path, capsys):
    folder, made = tmp_path / "vae", tmp_path / "made"
    shutil.copytree(vae, folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(dict(a=Hostile(made)), folder / "diffusion_pytorch_model.bin")
    assert str(folder) in refused(capsys, sample_grid, "--ckpt", trained, "--vae", folder)
    assert not made.exists()
    for name in ("os", "utils", "StableDiffusionPipeline", "../AutoencoderKL", ["AutoencoderKL"], None):
        (folder / "config.json").write_text(json.dumps(dict(_class_name=name)))
        assert str(folder) in refused(capsys, sample_grid, "--ckpt", trained, "--vae", folder)


def test_a_data_set_runs_no_script(tmp_path, monkeypatch, capsys):
    """Nor does a folder that has one: old versions of `datasets` did."""
    import datasets

    folder, made = tmp_path / "set", tmp_path / "made"
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(made)!r}, 'w')")
    datasets.Dataset.from_dict(dict(image=["a", "b"], label=[0, 1])).to_parquet(folder / "train.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    refused(capsys, train_accelerate, *train_flags(folder, tmp_path / "run"))
    assert not made.exists()


# ------------------------------------------------------------------------------------------------ errors and bugs


@pytest.mark.parametrize(("flags", "words"), [
    ([dit, "convert", "nowhere", "a.pt"], "nowhere"), ([dit, "convert", "RUN", "RUN/best.safetensors"], "exists"),
    ([sample_grid, "--ckpt", "nowhere"], "nowhere"), ([sample_grid, "--ckpt", "RUN", "--class-labels", "99"], "'99'"),
    ([sample_grid, "--ckpt", "RUN", "--class-labels", ""], "no class ''"),
    ([sample_grid, "--ckpt", "RUN", "--num-sampling-steps", "0"], "--num-sampling-steps 0"),
    ([sample_grid, "--ckpt", "RUN", "--vae", "nowhere"], "nowhere"),
    ([evaluate, "--ckpt", "nowhere", "--ref", "DATA"], "nowhere"),
    ([evaluate, "--ckpt", "RUN", "--ref", "DATA", "--num-sampling-steps", "2000"], "--num-sampling-steps 2000"),
    ([evaluate, "--ckpt", "RUN", "--ref", "DATA", "--num-fid-samples", "0"], "--num-fid-samples 0"),
    ([train_accelerate, "--data-path", "nowhere"], "nowhere"), ([train_accelerate, "--model", "DiT-Q/2"], "DiT-Q/2"),
    ([train_accelerate, "--vae", "nowhere", "--image-size", "32"], "nowhere"),
    ([train_accelerate, "--init", "nowhere"], "nowhere"), ([train_accelerate, "--image-size", "7"], "divide"),
    ([train_accelerate, "--results-dir", "/proc/nowhere"], "/proc/nowhere"),
], ids=lambda value: value if isinstance(value, str) else value[0].__name__)
def test_errors_are_one_line(flags, words, trained, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script, *flags = flags
    flags = [flag.replace("RUN", str(trained)).replace("DATA", str(data)) for flag in flags]
    if script is train_accelerate and "--data-path" not in flags:
        flags = ["--vae", "none", *flags]
    assert words in refused(capsys, script, *flags)
    assert not list(tmp_path.iterdir())  # nothing was begun


@pytest.mark.parametrize(("script", "name", "flags"), [
    (dit, "load_checkpoint", ["convert", "RUN", "a.pt"]), (sample_grid, "class_names", ["--ckpt", "RUN"]),
    (evaluate, "evaluate_model", ["--ckpt", "RUN", "--ref", "DATA"]), (train_accelerate, "build_network", []),
    (train_accelerate, "update_ema", [])], ids=lambda value: value if isinstance(value, str) else None)
def test_a_bug_gives_its_traceback(script, name, flags, trained, data, tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        return None + 1

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, name, bug)
    flags = flags or train_flags(data, tmp_path / "run")
    with pytest.raises(TypeError, match="NoneType") as error:
        command(script, *[dict(RUN=trained, DATA=data).get(str(flag), flag) for flag in flags])
    assert error.traceback[-1].name == "bug"


@pytest.mark.parametrize("rank", [0, 1])
def test_what_one_process_alone_may_meet_is_shown_by_any(rank, monkeypatch, capsys):
    monkeypatch.setenv("RANK", str(rank))

    def fail(error):
        raise error

    for error, shown in ((InputError("all meet it"), rank == 0), (evaluate.BrokenImage("one meets it"), True)):
        with pytest.raises(SystemExit):
            run_command(fail, error)
        assert (f"error: {error}\n" == capsys.readouterr().err) == shown


# ------------------------------------------------------------------------------------------------ properties

counts, widths, seeds = st.integers(7, 24), st.integers(1, 6), st.integers(0, 10**6)
few = settings(max_examples=25, deadline=None, derandomize=True)


def sets(seed, real, fake, width):
    """Two sets of features; some have equal rows and equal coordinates, as the features of flat images do."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(real, width)), rng.normal(size=(fake, width)) * rng.choice([0.1, 1, 10]) + rng.normal()
    return (a.round(), b.round()) if seed % 3 == 0 else (a, np.concatenate([b[1:], a[:1]])) if seed % 3 == 1 else (a, b)


@few
@given(seeds, counts, counts, widths)
def test_metrics_do_not_depend_on_the_order(seed, real, fake, width):
    a, b = sets(seed, real, fake, width)
    rng = np.random.default_rng(seed)
    c, d = rng.permutation(a), rng.permutation(b)
    fid = lambda a, b: evaluate.frechet_distance(*evaluate.compute_statistics(a), *evaluate.compute_statistics(b))
    assert fid(c, d) == pytest.approx(fid(a, b), rel=1e-6, abs=1e-5)
    assert evaluate.precision_recall(c, d) == evaluate.precision_recall(a, b)
    assert evaluate.density_coverage(c, d) == pytest.approx(evaluate.density_coverage(a, b), abs=1e-12)
    n, kid = min(real, fake), lambda a, b: evaluate.kernel_distance(a, b, num_subsets=2)[0]
    a, b = a[:n], b[:n]  # of sets of one size KID takes all rows, of a larger one it draws some
    assert kid(rng.permutation(a), rng.permutation(b)) == pytest.approx(kid(a, b), rel=1e-6, abs=1e-6)
    assert kid(b, a) == pytest.approx(kid(a, b), rel=1e-6, abs=1e-6)
    probs = np.exp(a) / np.exp(a).sum(1, keepdims=True)
    assert evaluate.inception_score(rng.permutation(probs))[0] == pytest.approx(evaluate.inception_score(probs)[0])


@few
@given(seeds, counts, counts, widths)
def test_ranges_and_symmetries_of_metrics(seed, real, fake, width):
    a, b = sets(seed, real, fake, width)
    fid = lambda a, b: evaluate.frechet_distance(*evaluate.compute_statistics(a), *evaluate.compute_statistics(b))
    assert 0 <= fid(a, b) == pytest.approx(fid(b, a), rel=1e-6, abs=1e-5) and 0 <= fid(a, a) < 1e-5
    precision, recall = evaluate.precision_recall(a, b)
    assert (recall, precision) == evaluate.precision_recall(b, a) and 0 <= precision <= 1 and 0 <= recall <= 1
    assert evaluate.precision_recall(a, a) == (1, 1)
    density, coverage = evaluate.density_coverage(a, b)
    assert 0 <= density <= real / 5 and 0 <= coverage <= 1 and (density > 0) == (coverage > 0)
    probs = np.exp(b - b.max(1, keepdims=True))
    score, _ = evaluate.inception_score(probs / probs.sum(1, keepdims=True))
    assert 1 - 1e-9 <= score <= min(width, fake) + 1e-9


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
json_values = st.recursive(st.none() | st.booleans() | st.integers(-2**53, 2**53) | texts
                           | st.floats(allow_nan=False, allow_infinity=False),
                           lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
                           max_leaves=8)
configs = st.builds(
    lambda patch, side, heads, quarter, **rest: dict(patch_size=patch, input_size=patch * side, num_heads=heads,
                                                     hidden_size=4 * heads * quarter, **rest),
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), depth=st.integers(1, 3),
    in_channels=st.integers(1, 4), mlp_ratio=st.sampled_from([1.0, 2.0, 4.0]), num_classes=st.integers(1, 5),
    class_dropout_prob=st.sampled_from([0.0, 0.1, 0.5]), learn_sigma=st.booleans())


@few
@given(config=configs, metadata=st.dictionaries(texts, json_values, max_size=3), seed=seeds)
def test_checkpoints_come_back_as_they_went(config, metadata, seed, tmp_path_factory):
    metadata = {key: value for key, value in metadata.items() if key not in ("path", "model")}
    torch.manual_seed(seed)
    model, path = DiT(**config), tmp_path_factory.mktemp("round") / "a.safetensors"
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * torch.tensor([1e-30, 1.0, 1e30])[seed % 3]
    save_checkpoint(path, model, **metadata)
    found = load_checkpoint(path)
    assert found.config == model.config and found.metadata == metadata and not found.training
    assert same(found.state_dict(), model.state_dict())
    dit.convert(path, path.with_name("b.safetensors"))
    again = load_checkpoint(path.with_name("b.safetensors"))
    assert same(again.state_dict(), model.state_dict()) and again.metadata == metadata


words = st.text(st.characters(categories=["Ll", "Lu", "Nd", "Zs"]), min_size=1, max_size=8).filter(str.strip)


@few
@given(st.lists(st.lists(words, min_size=1, max_size=3).map(", ".join), min_size=1, max_size=8), st.data())
def test_classes_are_found_by_any_of_their_names(names, draw):
    number = draw.draw(st.integers(0, len(names) - 1))
    name = draw.draw(st.sampled_from([names[number], *names[number].split(",")]))
    upper = name.upper() if name.upper().lower() == name.lower() else name
    spoken = draw.draw(st.sampled_from([name, upper, f" {name} "]))
    having = [n for n, of in enumerate(names) if name.strip().lower() in
              {word.strip().lower() for word in (of, *of.split(","))}]
    assert sample_grid.find_class(spoken, names) == having[0]  # the first of several


@few
@given(st.text(max_size=8), st.integers(1, 12))
def test_class_labels_are_numbers_in_range_or_refused(text, classes):
    names = [f"class {chr(97 + n)}" for n in range(classes)]
    try:
        assert sample_grid.find_class(text, names) in range(classes)
    except InputError as error:
        assert f"0 to {classes - 1}" in str(error) and len(str(error)) < 200
    for n in (0, classes - 1):
        assert sample_grid.find_class(f" {n}", names) == n
    for wrong in (str(classes), "-1", "1.0", "", "٣٣", "²"):
        with pytest.raises(InputError):
            sample_grid.find_class(wrong, names)
