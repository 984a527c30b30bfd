"""What goes wrong outside the programs: full disks, damaged and hostile files, numbers not finite.

Every command line is called in this process as its script calls it, so that a fault can be put
anywhere; what tests/chaos.py does to whole processes is not repeated here, nor what the tests of
single files show already.
"""

import builtins
import errno
import io
import json
import os
import pathlib
import re
import resource
import shutil
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import command, contents, damage, pictures, refused, same, train_flags
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

pytestmark = pytest.mark.usefixtures("quick")
NO_SPACE = os.strerror(errno.ENOSPC)


# ------------------------------------------------------------------------------------- a full disk


class FullDisk:
    """A disk that is full from its n-th writing operation on, for the files below `root`.

    Operations, counted from 0: to create a file or folder, to write, to sync, to rename. `seen`
    lists them as (what, path). safetensors and torch write by themselves: they fail in the middle
    of a file, with the errors that they were seen to give on a full tmpfs.
    """

    def __init__(self, root, n):
        self.root = str(root)
        self.n = n
        self.seen = []

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
        disk, plain_open, os_open = self, io.open, os.open

        class File(io.FileIO):
            def write(self, data):
                try:
                    disk.use("write", self.name)
                except OSError:
                    # As the kernel says it: without a name.
                    raise OSError(errno.ENOSPC, NO_SPACE) from None
                return super().write(data)

            def fileno(self):
                if self.new:
                    raise io.UnsupportedOperation  # by which PIL would write past this class
                return super().fileno()

        def open_file(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None,
                      **kwargs):
            if not disk.has(file) or kwargs.get("opener") or not set(mode) & set("wax+"):
                return plain_open(file, mode, buffering, encoding, errors, newline, **kwargs)
            disk.use("open", file)
            raw = File(str(file), mode.replace("b", "").replace("t", ""))
            raw.new = "w" in mode and "b" in mode
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            return io.TextIOWrapper(buffered, encoding, errors, newline)

        def open_descriptor(path, flags, *args, **kwargs):
            if flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE:
                disk.use("create", path)
            return os_open(path, flags, *args, **kwargs)

        def sync(descriptor):  # and no more, for the tests' speed
            disk.use("sync", os.readlink(f"/proc/self/fd/{descriptor}"))

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

        self.patch = pytest.MonkeyPatch()
        for module in (io, builtins):
            self.patch.setattr(module, "open", open_file)
        mkdir, rename = making(os.mkdir), renaming(os.replace)
        system = dict(open=open_descriptor, fsync=sync, replace=rename, mkdir=mkdir)
        for name, function in system.items():
            self.patch.setattr(os, name, function)
        # In Python 3.10 paths keep these functions themselves.
        if accessor := getattr(pathlib, "_NormalAccessor", None):
            for name, function in dict(open=open_file, replace=rename, mkdir=mkdir).items():
                self.patch.setattr(accessor, name, staticmethod(function))
        rust = f"Error while serializing: I/O error: {NO_SPACE} (os error 28)"
        self.patch.setattr(dit, "save_file", saving(dit.save_file, SafetensorError(rust)))
        text = "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"
        self.patch.setattr(torch, "save", saving(torch.save, RuntimeError(text)))
        return self

    def __exit__(self, *exception):
        self.patch.undo()


def sweep(capsys, root, work, check=lambda: None, prepare=lambda: None):
    """work() on a disk that is full from its first, second ... operation on, until nothing fails.

    Each time it must end with status 2 and one line that names the file or folder and the reason,
    and leave no temporary file; check() looks at what is left. Returns all operations that were
    seen.
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
        named = any(name in line for line in said for name in final_names(path))
        reason = any(NO_SPACE in line or "is the disk full" in line for line in said)
        if ended != 2 or len(said) != 1 or not named or not reason:
            wrong.append((what, path, ended, said))
        left = [path.name for path in Path(root).rglob("*") if ".tmp" in path.name]
        if left:
            wrong.append((what, path, "left", left))
        check()
    pytest.fail("it fails however much space there is")


def final_names(path):
    """How a message may call a path: as it is, or what it is to become; or the folder."""
    path = Path(path)
    final = path.name
    if ".tmp" in final:
        final = final.split(f".{os.getpid()}.tmp")[0].removeprefix(".")
    return str(path), str(path.with_name(final)), str(path.parent)


def kinds(seen, name):
    """What was done to files of a name, or their temporary ones."""
    return {what for what, path in seen if name in Path(path).name}


def test_training_on_a_full_disk(run, data, tmp_path, capsys):
    begun = tmp_path / "begun"
    before = load_file(run / "checkpoints" / "0000004" / "ema.safetensors")
    shutil.copytree(run, begun)
    # Whatever the next evaluation gives is the best so far, so that it is written.
    log = begun / "metrics.jsonl"
    log.write_text(re.sub(r'"fd": [\d.]+', '"fd": 1e9', log.read_text()))

    def prepare():
        shutil.rmtree(run)
        shutil.copytree(begun, run)

    def check():
        model = load_checkpoint(run)
        step = model.metadata["step"]
        assert step == 6 or step == 4 and same(model.state_dict(), before)

    flags = [*train_flags(data, run), "--keep-checkpoints", "2"]
    seen = sweep(capsys, run, lambda: command(train_accelerate, *flags), check, prepare)
    for name in ("config.json", "metrics.jsonl", "ema.safetensors", "model.safetensors",
                 "optimizer.pt", "state.json", "0000006.png", "best.safetensors"):
        assert {"write", "sync"} <= kinds(seen, name), name
    assert ("sync", str(run / "metrics.jsonl")) in seen  # and not only when it is begun anew


def test_caching_on_a_full_disk(data, vae_folder, tmp_path, monkeypatch, capsys):
    cache, whole = tmp_path / "cache", []
    monkeypatch.setattr(train_accelerate.LatentCache, "SHARD", 8)
    flags = [*train_flags(data, tmp_path / "run"), "--image-size", "16", "--vae", vae_folder,
             "--max-steps", "1", "--sample-every", "0", "--eval-samples", "0", "--latent-cache",
             cache]

    def check():
        shards = sorted(cache.glob("moments-*"))
        assert len(shards) == 3 or len(shards) >= len(whole) and not (cache / "index.json").exists()
        whole[:] = shards  # what was there before the disk was full is used again
        for shard in shards:
            load_file(shard)

    seen = sweep(capsys, cache, lambda: command(train_accelerate, *flags), check)
    assert {"write", "sync", "rename"} <= kinds(seen, "index.json") and len(whole) == 3
    index = json.loads((cache / "index.json").read_text())
    assert index["count"] == 24 and index["counts"] == [8, 8, 8]


@pytest.mark.parametrize(("flags", "name"), [
    ("--json out/a.json", "a.json"), ("--save-npz out/a.npz", "a.npz"),
    ("--save-images out/images", "000005.png"), ("--save-images out/images", "settings.json"),
    ("--ckpt RUN RUN --metrics fid --plot out/a.png", "a.png")])
def test_evaluating_on_a_full_disk(trained, data, flags, name, tmp_path, capsys):
    old = tmp_path / "out" / "a.json"
    old.parent.mkdir()
    old.write_text("old")
    flags = ["--ckpt", trained, "--ref", data, "--num-fid-samples", "6",
             *flags.replace("RUN", str(trained)).replace("out/", f"{old.parent}/").split()]
    allowed = {"old"}
    if name == "a.json":
        command(evaluate, *flags)
        allowed.add(old.read_text())
        old.write_text("old")

    def check():
        assert old.read_text() in allowed

    seen = sweep(capsys, old.parent, lambda: command(evaluate, *flags), check)
    assert {"write", "sync", "rename"} <= kinds(seen, name)


def test_a_reference_on_a_full_disk(data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "ref.npz"
    flags = ["--ref", data, "--save-ref", out, "--metrics", "fid"]
    seen = sweep(capsys, out.parent, lambda: command(evaluate, *flags))
    assert {"write", "sync", "rename"} <= kinds(seen, "ref.npz")
    assert np.load(out)["arr_0"].shape == (24, 8, 8, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".gif"])
def test_sampling_on_a_full_disk(suffix, trained, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / f"a{suffix}"
    out.write_text("old")
    flags = ["--ckpt", trained, "--class-labels", "0", "--num-sampling-steps", "2", "--output"]
    flags += [tmp_path / "b.png", "--trajectory", out] if suffix == ".gif" else [out]
    check = lambda: out.read_text(errors="replace") == "old" or Image.open(out).load()
    seen = sweep(capsys, out.parent, lambda: command(sample_grid, *flags), check)
    assert {"write", "sync", "rename"} <= kinds(seen, out.name)


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt", "diffusers"])
def test_converting_on_a_full_disk(name, trained, tmp_path, capsys):
    out = tmp_path / "out"
    seen = sweep(capsys, out, lambda: command(dit, "convert", trained, out / name),
                 prepare=lambda: shutil.rmtree(out, ignore_errors=True))
    assert {"write", "sync", "rename"} <= kinds(seen, "" if name == "diffusers" else name)
    assert same(load_checkpoint(out / name).state_dict(), load_checkpoint(trained).state_dict())


# ----------------------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def reference(quick, data, tmp_path_factory):
    """An .npz of images with their statistics."""
    path = tmp_path_factory.mktemp("ref") / "ref.npz"
    command(evaluate, "--ref", data, "--save-ref", path)
    return path


# The last byte of an archive or a PNG means nothing.
HOW = dict.fromkeys(("settings", "log", "weights"), ("cut", "empty", "first", "middle", "last"))
HOW |= dict.fromkeys(("archive", "picture"), ("cut", "empty", "first", "middle"))


@pytest.mark.parametrize(("kind", "how"), [(kind, how) for kind in HOW for how in HOW[kind]])
def test_damaged_files_are_named_and_nothing_is_written(
        kind, how, run, data, reference, tmp_path, capsys):
    """By every command that reads them.

    tests/test_train.py damages checkpoints and caches, and mends what a kill tears off a log;
    tests/test_dit.py damages other files of weights.
    """
    training = [train_accelerate, *train_flags(data, run)]
    if kind in ("settings", "log"):
        file = run / dict(settings="config.json", log="metrics.jsonl")[kind]
        commands = [training]
    if kind == "weights":
        file = run / "best.safetensors"
        new = [train_accelerate, *train_flags(data, tmp_path / "new")]
        commands = [[sample_grid, "--ckpt", file, "--output", tmp_path / "a.png"],
                    [evaluate, "--ckpt", file, "--ref", data, "--num-fid-samples", "6"],
                    [*new, "--init", file], [dit, "convert", file, tmp_path / "a.pt"]]
    if kind == "archive":
        file = Path(shutil.copy(reference, tmp_path / "a.npz"))
        commands = [[evaluate, "--samples", file, "--ref", data],
                    [evaluate, "--samples", data, "--ref", file, "--metrics", "fid,pr"]]
    if kind == "picture":
        file = pictures(tmp_path / "broken") / "a" / "004.png"
        broken = file.parent.parent
        commands = [[evaluate, "--samples", broken, "--ref", data],
                    [evaluate, "--samples", data, "--ref", broken],
                    [train_accelerate, *train_flags(broken, tmp_path / "new")]]
    damage(file, how)
    before = contents(tmp_path)
    for script, *flags in commands:
        assert str(file) in refused(capsys, script, *flags), script.__name__
    assert kind == "picture" or contents(tmp_path) == before  # it is met while training


@pytest.mark.parametrize("how", ["cut", "empty", "first", "middle"])
def test_damaged_samples_are_drawn_again_and_their_settings_refused(
        how, trained, data, tmp_path, capsys):
    folder = tmp_path / "png"
    flags = ["--ckpt", trained, "--ref", data, "--num-fid-samples", "6", "--save-images", folder]
    command(evaluate, *flags)
    before = contents(folder)
    damage(folder / "000003.png", how)
    command(evaluate, *flags)
    assert contents(folder) == before
    damage(folder / "settings.json", how)
    assert str(folder) in refused(capsys, evaluate, *flags)


def member(path, name):
    """Where in an archive the contents of a member lie, as a slice."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        info = archive.getinfo(name)
        file.seek(info.header_offset + 26)
        lengths = file.read(4)
        name_and_extra = sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
        start = info.header_offset + 30 + name_and_extra
        return slice(start, start + info.compress_size)


@pytest.mark.parametrize("flag", ["--samples", "--ref"])
@pytest.mark.parametrize("place", ["arr_0", "mu", "header", "end"])
def test_a_bit_of_an_archive(place, flag, reference, data, tmp_path, capsys):
    file = tmp_path / "a.npz"
    content = bytearray(reference.read_bytes())
    array = member(reference, "mu.npy" if place == "mu" else "arr_0.npy")
    content[array.start + 9 if place == "header" else array.stop - 5] ^= 1
    file.write_bytes(reference.read_bytes()[:-1] if place == "end" else content)
    flag = "--ref" if place == "mu" else flag  # the statistics of samples are not read
    flags = {"--samples": data, "--ref": data} | {flag: file}
    words = [word for pair in flags.items() for word in pair]
    assert str(file) in refused(capsys, evaluate, *words, "--metrics", "fid,pr")


# ------------------------------------------------------------------------------ numbers not finite


class NotFinite:
    """A process whose loss, or its gradient alone, is not a number at some calls."""

    def __init__(self, process, where, calls):
        self.process = process
        self.where = where
        self.calls = calls
        self.seen = 0

    def __getattr__(self, name):
        return getattr(self.process, name)

    def training_losses(self, model, *args):
        losses = self.process.training_losses(model, *args)
        self.seen += 1
        if self.seen in self.calls:
            zero = next(p for p in model.parameters() if p.requires_grad).square().sum() * 0
            wrong = zero.sqrt() if self.where == "gradient" else zero + torch.inf
            losses["loss"] = losses["loss"] + wrong
        return losses


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_numbers_that_are_not_finite(where, run, data, monkeypatch, capsys):
    process, flags = train_accelerate.create_process, train_flags(data, run)
    calls = {2}  # the run is resumed from step 4, so that this is step 6
    monkeypatch.setattr(train_accelerate, "create_process",
                        lambda *args, **kwargs: NotFinite(process(*args, **kwargs), where, calls))
    said = refused(capsys, train_accelerate, *flags)
    args = train_accelerate.parse_args([str(flag) for flag in flags])
    train_accelerate.fill_preset(args)
    accelerator = train_accelerate.make_accelerator()
    images = train_accelerate.GlobalBatches(args, 24, 0, 6, accelerator).indices(5)
    assert "step 6" in said and str(images) in said and "--skip-nonfinite 1" in said
    assert str(run / "checkpoints" / "0000004") in said
    assert load_checkpoint(run).metadata["step"] == 4

    command(train_accelerate, *flags, "--skip-nonfinite", "1")
    model = load_checkpoint(run)
    assert model.metadata["step"] == 6 and all(p.isfinite().all() for p in model.parameters())
    state = torch.load(run / "checkpoints" / "0000006" / "optimizer.pt", weights_only=True)
    moments = state["optimizer"]["state"].values()
    assert all(x.isfinite().all() for values in moments for x in values.values())
    assert {int(values["step"]) for values in moments} == {5}  # AdamW has not counted it
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    assert [line["skipped_steps"] for line in lines] == [0] * 5 + [1]
    assert np.isfinite([line["loss"] for line in lines[:-1]]).all()
    assert lines[-1]["loss"] is None  # there was no other step

    # Steps 7, 8 and 9, while step 6 is remembered as the first that was left out.
    calls.update({1, 3})
    flags += ["--skip-nonfinite", "2", "--max-steps", "10"]
    said = refused(capsys, train_accelerate, *flags)
    assert "--skip-nonfinite 3" in said and "step 8" in said


# ----------------------------------------------------------------------------------- hostile files


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
    assert str(file) in refused(capsys, evaluate, "--samples", data, "--ref", file)
    if name == "arr_0":
        assert str(file) in refused(capsys, evaluate, "--samples", file, "--ref", data)
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
        for name in ("../escaped.npy", str(tmp_path / "escaped.npy"), "..\\escaped.npy",
                     "a/../../escaped", "\N{SNOWMAN}\n.npy"):
            archive.writestr(name, b"escaped")
        link = zipfile.ZipInfo("link.npy")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc")
    command(evaluate, "--samples", file, "--ref", file, "--metrics", "fid")
    assert os.listdir(tmp_path) == ["inside"] and os.listdir(inside) == ["a.npz"]
    assert "FD" in capsys.readouterr().out


def npy(shape, descr="<f8"):
    """The start of an .npy file that claims an array of this shape, and holds nothing."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, dict(descr=descr, fortran_order=False, shape=shape))
    return file.getvalue()


@pytest.mark.parametrize(("name", "content"), [
    ("arr_0", npy((10**12, 8, 8, 3), "|u1")), ("arr_0", npy((-1, 8, 8, 3), "|u1")), ("arr_0", b""),
    ("arr_0", b"\x93NUMPY\x09\x00"), ("arr_0", b"\x93NUMPY\x01\x00\x10\x00{'descr': 1/0}\n"),
    ("mu", npy((10**15,))), ("sigma", npy((10**8, 10**8))), ("mu", b"text"),
    ("mu", b"\x93NUMPY\x01\x00\x02\x00]]"), ("network", npy((), "<U9999999"))])
def test_arrays_that_are_not_what_they_claim(name, content, reference, data, tmp_path, capsys):
    file = tmp_path / "a.npz"
    with zipfile.ZipFile(reference) as old, zipfile.ZipFile(file, "w") as new:
        for other in old.namelist():
            new.writestr(other, content if other == f"{name}.npy" else old.read(other))
    samples, reference = (file, data) if name == "arr_0" else (data, file)
    flags = ["--samples", samples, "--ref", reference]
    assert str(file) in refused(capsys, evaluate, *flags)


def png(width, height, *chunks):
    """A PNG file that claims a size, with other chunks (kind, content) and no pixels."""
    size = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    header = (b"IHDR", size + bytes([8, 2, 0, 0, 0]))
    file = b"\x89PNG\r\n\x1a\n"
    for kind, content in (header, *chunks, (b"IEND", b"")):
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        file += len(content).to_bytes(4, "big") + kind + content + checksum
    return file


def bombs():
    """Image files of a few kilobytes that ask for gigabytes."""
    zeros = zlib.compress(bytes(10**8), 9)
    pixels = zlib.compress(bytes(8 * 25))
    return dict(
        header=png(60000, 60000, (b"IDAT", zlib.compress(bytes(1000)))),
        pixels=png(60000, 60000, (b"IDAT", zeros)),
        text=png(8, 8, (b"zTXt", b"a\0\0" + zeros), (b"IDAT", pixels)),
        below=png(20000, 8000, (b"IDAT", zeros[:500])))


@pytest.mark.parametrize("name", bombs())
def test_image_bombs_are_refused(name, data, tmp_path, capsys):
    folder = pictures(tmp_path / "bombs")
    bomb = folder / "a" / "000.png"
    bomb.write_bytes(bombs()[name])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = refused(capsys, evaluate, "--samples", data, "--ref", folder)
    assert str(bomb) in said
    assert name != "below" or "20000 x 8000" in said  # of which PIL would only warn
    assert str(bomb) in refused(capsys, evaluate, "--samples", folder, "--ref", data)
    said = refused(capsys, train_accelerate, *train_flags(folder, tmp_path / "run"))
    assert str(bomb) in said
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10**6  # kB


def test_links_in_a_folder_of_pictures(data, tmp_path, capsys):
    """One to pictures stands for them; one that leads back adds nothing; one to nowhere: named."""
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


def test_torchscript_is_loaded_from_the_given_path_alone(
        trained, data, tmp_path, monkeypatch, capsys):
    """It is code: nothing else that a command reads may be taken for it, nor a file lying about."""
    script, loaded = tmp_path / "code.pt", []
    torch.jit.script(torch.nn.ReLU()).save(script)
    load = lambda file, **kwargs: loaded.append(file) or torch.nn.ReLU()
    monkeypatch.setattr(torch.jit, "load", load)
    monkeypatch.chdir(tmp_path)
    for name in ("inception-2015-12-05.pt", "efficientnet-lite0", "inception"):
        shutil.copy(script, tmp_path / name)
    for flags in ([sample_grid, "--ckpt", script],
                  [sample_grid, "--ckpt", trained, "--vae", script],
                  [dit, "convert", script, tmp_path / "a.safetensors"],
                  [evaluate, "--samples", script, "--ref", data],
                  [evaluate, "--samples", data, "--ref", script],
                  [train_accelerate, *train_flags(data, tmp_path / "run"), "--init", script]):
        refused(capsys, *flags)
    command(evaluate, "--samples", data, "--ref", data, "--metrics", "fid")
    assert evaluate.load_features("efficientnet-lite0", "cpu", "adm").width and not loaded
    # The help says so.
    with pytest.raises(SystemExit):
        evaluate.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "code" in text.split("--features FEATURES")[-1].split("--resize")[0]


def test_a_vae_runs_no_pickle(vae_folder, trained, tmp_path, capsys):
    folder, made = tmp_path / "vae", tmp_path / "made"
    shutil.copytree(vae_folder, folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(dict(a=Hostile(made)), folder / "diffusion_pytorch_model.bin")
    assert str(folder) in refused(capsys, sample_grid, "--ckpt", trained, "--vae", folder)
    assert not made.exists()
    for name in ("os", "utils", "StableDiffusionPipeline", "../AutoencoderKL", ["AutoencoderKL"],
                 None):
        (folder / "config.json").write_text(json.dumps(dict(_class_name=name)))
        assert str(folder) in refused(capsys, sample_grid, "--ckpt", trained, "--vae", folder)


def test_a_data_set_runs_no_script(tmp_path, monkeypatch, capsys):
    """Nor does a folder that has one: old versions of `datasets` did."""
    import datasets

    folder, made = tmp_path / "set", tmp_path / "made"
    folder.mkdir()
    (folder / "set.py").write_text(f"open({str(made)!r}, 'w')")
    table = datasets.Dataset.from_dict(dict(image=["a", "b"], label=[0, 1]))
    table.to_parquet(folder / "train.parquet")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    refused(capsys, train_accelerate, *train_flags(folder, tmp_path / "run"))
    assert not made.exists()


# ----------------------------------------------------------------------------------- bugs and ranks


@pytest.mark.parametrize(("script", "name", "flags"), [
    (dit, "load_checkpoint", "convert RUN a.pt"),
    (sample_grid, "class_names", "--ckpt RUN"),
    (evaluate, "evaluate_model", "--ckpt RUN --ref DATA"),
    (train_accelerate, "build_network", ""), (train_accelerate, "update_ema", ""),
], ids=lambda value: value if isinstance(value, str) else None)
def test_a_bug_gives_its_traceback(
        script, name, flags, trained, data, tmp_path, monkeypatch):
    def bug(*args, **kwargs):
        return None + 1

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, name, bug)
    words = [dict(RUN=trained, DATA=data).get(word, word) for word in flags.split()]
    with pytest.raises(TypeError, match="NoneType") as error:
        command(script, *(words or train_flags(data, tmp_path / "run")))
    assert error.traceback[-1].name == "bug"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_one_process_alone_may_meet_is_shown_by_any(rank, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(os, "_exit", sys.exit)  # by which one of several processes ends

    def fail(error):
        raise error

    all_meet, one_meets = InputError("all meet it"), evaluate.BrokenImage("one meets it")
    for error, shown in ((all_meet, rank == "0"), (one_meets, True)):
        with pytest.raises(SystemExit):
            run_command(fail, error)
        assert (f"error: {error}\n" == capsys.readouterr().err) == shown


# ------------------------------------------------------------------------------------- properties

few = settings(max_examples=25, deadline=None, derandomize=True)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
numbers = st.integers(-2**53, 2**53) | st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8)
configs = st.builds(
    lambda patch, side, heads, quarter, **rest: dict(
        patch_size=patch, input_size=patch * side, num_heads=heads,
        hidden_size=4 * heads * quarter, **rest),
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3),
    depth=st.integers(1, 3), in_channels=st.integers(1, 4),
    mlp_ratio=st.sampled_from([1.0, 2.0, 4.0]), num_classes=st.integers(1, 5),
    class_dropout_prob=st.sampled_from([0.0, 0.1, 0.5]), learn_sigma=st.booleans())


@few
@given(config=configs, metadata=st.dictionaries(texts, json_values, max_size=3),
       seed=st.integers(0, 10**6))
def test_checkpoints_come_back_as_they_went(config, metadata, seed, tmp_path_factory):
    metadata = {key: metadata[key] for key in metadata.keys() - {"path", "model"}}
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
