"""Pictures: the VAE wrapper, sampling, and every flag of sample_grid.py seen in its pixels."""

import contextlib
import io
import json
import math
import os
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import (
    CLASS_NAMES,
    ROOT,
    command,
    fork_two,
    refused,
    save_small_dit,
    save_vae,
    small_dit,
    wait,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sample_grid
from dit import InputError, RankLocalError, load_checkpoint, reach_hub
from gaussian_diffusion import FlowMatching, create_diffusion
from sample_grid import (
    Autoencoder,
    class_grid,
    class_names,
    find_class,
    load_vae,
    make_grid,
    model_wnids,
    parse_labels,
    sample_images,
    synonyms,
)


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory):
    return str(save_vae(tmp_path_factory.mktemp("kl"), scaling_factor=0.5, shift_factor=0.1))


@pytest.fixture
def draw(small_ckpt, tmp_path):
    """Run the command line in this process; the picture it wrote, as PIL image.

    steps: None leaves them to the weights, or to the flags.
    """
    def draw(*flags, ckpt=small_ckpt, steps=3, output="out.png"):
        counted = ["--num-sampling-steps", steps] if steps else []
        command(sample_grid, "--ckpt", ckpt, "--output", tmp_path / output, *counted, *flags)
        return Image.open(tmp_path / output)

    return draw


def draw_again(picture, folder):
    """The picture that the command in a picture draws."""
    words = shlex.split(picture.text["command"])
    assert words[:2] == ["python", "sample_grid.py"]
    command(sample_grid, *words[2:], "--output", folder / "again.png")
    return Image.open(folder / "again.png")


def same_pixels(picture, other):
    return np.array_equal(np.asarray(picture), np.asarray(other))


def cells(image, columns, rows=1, captions=False, margin=2):
    """The cells of a grid of enlarged 8 x 8 images, back at 8 x 8: (rows * columns, 8, 8, 3)."""
    pixels, out, top = np.asarray(image.convert("RGB")), [], 2
    for _ in range(rows):
        top += 13 if captions else 0
        out += [pixels[top : top + 64 : 8, margin + c * 66 : margin + c * 66 + 64 : 8]
                for c in range(columns)]
        top += 66
    return np.stack(out)


def expected(labels, process, **sampling):
    """What the network of small_ckpt draws of the labels, from the seeds 0, 1 ... (N, 3, 8, 8)."""
    sampling = dict(seeds=range(len(labels)), cfg_scale=4.0) | sampling
    vae = Autoencoder(channels=1)
    return sample_images(small_dit(), process, vae, torch.tensor(labels), **sampling)


def shows(cells, images):
    """Whether cells are these images (N, 3, 8, 8)."""
    return np.array_equal(cells, images.permute(0, 2, 3, 1).numpy())


# ----------------------------------------------------------------------------------------- the VAE


def test_pixels_are_their_own_latents():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    for channels in (1, 3):
        vae = Autoencoder.load("none", channels=channels)
        latents = vae.sample(vae.encode(images))
        assert latents.shape == (2, channels, 16, 16) and latents.min() == -1 and latents.max() == 1
        assert torch.equal(vae.decode(latents), images)


def test_rounding_is_sample_ddps():
    x = torch.tensor([-1.5, -1.0, -0.5, 0.0, 1 / 255, 0.5, 0.9999, 1.0, 2.0]).view(1, 1, 3, 3)
    expected = np.clip(127.5 * x.numpy() + 128, 0, 255).astype(np.uint8)
    assert np.array_equal(Autoencoder(channels=1).decode(x)[:, :1].numpy(), expected)


def test_kl_autoencoder_encodes_samples_and_decodes(kl_folder):
    from diffusers import AutoencoderKL

    vae, reference = Autoencoder.load(kl_folder), AutoencoderKL.from_pretrained(kl_folder)
    assert (vae.name, vae.channels, vae.factor, vae.scale, vae.shift) == (kl_folder, 4, 2, 0.5, 0.1)
    images = torch.randint(256, (3, 3, 16, 16),
                           generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    moments = vae.encode(images)
    posterior = reference.encode(images / 127.5 - 1).latent_dist
    torch.testing.assert_close(moments, torch.cat([posterior.mean, posterior.logvar], 1), rtol=1e-4,
                               atol=1e-5)
    noise = torch.randn(3, 4, 8, 8)
    latents = vae.sample(moments, noise=noise)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise - 0.1) * 0.5,
                               rtol=1e-4, atol=1e-5)
    decoded = reference.decode(latents / 0.5 + 0.1).sample
    expected = (127.5 * decoded + 128).clamp(0, 255).to(torch.uint8)
    difference = vae.decode(latents).int() - expected.int()
    assert difference.abs().max() <= 1 and vae.decode(latents).dtype == torch.uint8
    drawn = [vae.sample(moments, generator=torch.Generator().manual_seed(seed))
             for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_vae_works_in_slices_in_float32(kl_folder, monkeypatch):
    vae, sizes, dtypes = Autoencoder.load(kl_folder), [], []
    vae.vae.decoder.register_forward_pre_hook(lambda module, x: sizes.append(len(x[0])))
    vae.vae.decoder.conv_in.register_forward_hook(lambda module, x, out: dtypes.append(out.dtype))
    latents = torch.randn(5, 4, 8, 8)
    whole = vae.decode(latents)
    monkeypatch.setattr(sample_grid, "SLICE_PIXELS", 2 * 16 * 16)
    with torch.autocast("cpu", torch.bfloat16):
        sliced = vae.decode(latents.bfloat16().float())
    assert sizes == [5, 2, 2, 1] and set(dtypes) == {torch.float32}
    assert (vae.decode(latents).int() - whole.int()).abs().max() <= 1
    assert sliced.shape == whole.shape == (5, 3, 16, 16)


def test_autoencoder_without_a_distribution(tmp_path):
    from diffusers import AutoencoderTiny

    AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
                    num_encoder_blocks=(1, 1),
                    num_decoder_blocks=(1, 1)).save_pretrained(tmp_path)
    vae = Autoencoder.load(str(tmp_path))
    assert type(vae.vae).__name__ == "AutoencoderTiny"
    assert (vae.channels, vae.factor, vae.scale) == (4, 2, 1.0)
    images = torch.randint(256, (2, 3, 16, 16)).to(torch.uint8)
    moments = vae.encode(images)
    assert moments.shape == (2, 8, 8, 8)
    torch.testing.assert_close(vae.sample(moments), vae.vae.encode(images / 127.5 - 1).latents,
                               atol=1e-4, rtol=1e-4)
    assert vae.decode(vae.sample(moments)).shape == images.shape


STATISTICS = dict(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 2.0, 1.5, 3.0])


def kl_with(folder, **config):
    """A small AutoencoderKL's folder, its config.json changed."""
    path = save_vae(folder, scaling_factor=0.5) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(folder)


def test_latents_are_normalised_per_channel_as_diffusers_pipelines_do(tmp_path):
    vae = Autoencoder.load(kl_with(tmp_path, **STATISTICS))
    images = torch.randint(256, (2, 3, 16, 16)).to(torch.uint8)
    latents = vae.sample(vae.encode(images), noise=torch.zeros(()))
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in STATISTICS.values())
    # StableDiffusionXLImg2ImgPipeline.prepare_latents, StableDiffusionXLPipeline.__call__
    expected = (vae.vae.encode(images / 127.5 - 1).latent_dist.mean - mean) * 0.5 / std
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    pixels = vae.vae.decode(latents * std / 0.5 + mean).sample
    expected = (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)
    assert (vae.decode(latents).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(("config", "words"), [
    (STATISTICS | dict(shift_factor=0.1), "without shift_factor"),
    (dict(latents_mean=[0.0] * 4), "latents_mean goes with latents_std"),
    (dict(_class_name="AutoencoderRAE"), "AutoencoderRAE scales latents in a way of its own"),
    (dict(_class_name="AutoencoderKLWan"), "AutoencoderKLWan scales"),
    (dict(_class_name="DiTTransformer2DModel"), "supported are AutoencoderKL")])
def test_vaes_of_unknown_scale_are_refused_by_name(tmp_path, config, words):
    with pytest.raises(InputError, match=words):
        Autoencoder.load(kl_with(tmp_path, **config))


def test_a_vae_that_is_not_finite_is_refused(tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    vae.decoder.conv_in.bias.data[0] = math.nan
    vae.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not finite"):
        Autoencoder.load(tmp_path)


def test_a_pipelines_own_vae_is_used(kl_folder):
    model = small_dit(in_channels=4)
    model.metadata = dict(vae=Path(kl_folder))
    assert load_vae(model).name == kl_folder and load_vae(model, "").name == kl_folder


def test_without_a_network_vaes_are_refused_soon(monkeypatch):
    import huggingface_hub

    def wait(*args, **kwargs):
        time.sleep(60)

    monkeypatch.setattr(huggingface_hub, "get_session", wait)
    reach_hub.cache_clear()
    monkeypatch.setattr(reach_hub.__wrapped__, "__defaults__", (0.5,))  # in place of 5 seconds
    began = time.monotonic()
    with pytest.raises(InputError, match=r"sd-vae-ft-ema from .* \(offline\): is there"):
        Autoencoder.load("ema")
    assert time.monotonic() - began < 4


def test_missing_vaes_are_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(_class_name="NoSuchAutoencoder")))
    for name in (tmp_path / "nowhere", "nobody/no-such-vae", "ema", tmp_path, ROOT / "docs"):
        with pytest.raises(InputError, match="cannot (load|download) the VAE.*--vae") as error:
            Autoencoder.load(str(name))
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_vae_must_fit_the_model(kl_folder):
    with pytest.raises(InputError, match="latents of 4 channels.*trained on 1"):
        load_vae(small_dit(), kl_folder)
    with pytest.raises(InputError, match="pixels.*trained on 4"):
        load_vae(small_dit(in_channels=4), "none")


# ---------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++", "euler", "heun", "sde"])
def test_an_image_does_not_depend_on_its_company(sampler):
    model, diffusion, vae = small_dit(), create_diffusion("5"), Autoencoder(channels=1)
    if sampler not in diffusion.samplers:
        diffusion = FlowMatching(5)
    settings = dict(cfg_scale=2.0, sampler=sampler, eta=0.5)
    together = sample_images(model, diffusion, vae, torch.tensor([0, 1, 2, 3, 1]), [7, 8, 9, 10, 7],
                             **settings)
    for i, (y, seed) in enumerate([(0, 7), (1, 8), (2, 9)]):
        alone = sample_images(model, diffusion, vae, torch.tensor([y]), [seed], **settings)
        # matrix products round by batch size
        assert (alone[0].int() - together[i].int()).abs().max() <= 1
    assert not torch.equal(together[0], together[4])  # the same noise, another class
    torch.manual_seed(123)
    again = sample_images(model, diffusion, vae, torch.tensor([0, 1, 2, 3, 1]), [7, 8, 9, 10, 7],
                          **settings)
    assert torch.equal(together, again)  # nothing hangs on global randomness
    assert torch.initial_seed() == 123


def test_guidance_interval_saves_the_second_pass():
    model, diffusion, vae = small_dit(), create_diffusion("20"), Autoencoder(channels=1)
    passes, images = {}, {}
    for interval in (None, (0.3, 5.0), (1000.0, 2000.0)):
        batches = []
        hook = model.register_forward_pre_hook(
            lambda module, args, batches=batches: batches.append(len(args[0])))
        images[interval] = sample_images(model, diffusion, vae, torch.tensor([1, 2]), [0, 1],
                                         cfg_scale=3.0,
                                         guidance_interval=interval)
        hook.remove()
        passes[interval] = batches
    inside = [0.3 <= sigma <= 5 for sigma in reversed(diffusion.sigmas)]
    assert 3 < sum(inside) < 17
    assert passes[None] == [4] * 20 and passes[0.3, 5.0] == [4 if i else 2 for i in inside]
    assert passes[1000.0, 2000.0] == [2] * 20
    plain = sample_images(model, diffusion, vae, torch.tensor([1, 2]), [0, 1])
    assert torch.equal(images[1000.0, 2000.0], plain)
    assert not torch.equal(images[0.3, 5.0], plain)
    assert not torch.equal(images[0.3, 5.0], images[None])


@pytest.mark.parametrize(("sampler", "times"), [
    ("euler", [0, 0.25, 0.5, 0.75]), ("sde", [0, 0.32, 0.64, 0.96]),
    ("heun", [0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1])])
def test_guidance_interval_of_a_flow(sampler, times):
    """Noise levels (1 - t) / t, here from 1/3 to 3: t from 0.25 to 0.75."""
    model, flow, batches = small_dit(), FlowMatching(4), []
    model.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    sample_images(model, flow, Autoencoder(channels=1), torch.tensor([1, 2]), [0, 1], cfg_scale=3.0,
                  sampler=sampler, guidance_interval=(0.333, 3.0))
    assert batches == [4 if 0.25 <= t <= 0.75 else 2 for t in times]


def test_guidance_acts_on_the_velocity():
    model, vae, y = small_dit(in_channels=3), Autoencoder(channels=3), torch.tensor([1, 2])
    null = torch.full_like(y, 4)
    noise = torch.stack([torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed))
                         for seed in (0, 1)])
    with torch.no_grad():  # one step of Euler, from t = 0, which the network sees as 1000
        t = torch.full((2,), 1000.0)
        velocity, velocity_null = model(noise, t, y)[:, :3], model(noise, t, null)[:, :3]
    velocity[:, :2] = velocity_null[:, :2] + 2.0 * (velocity[:, :2] - velocity_null[:, :2])
    expected = vae.decode((noise + velocity).clamp(-1, 1))
    drawn = sample_images(model, FlowMatching(1), vae, y, [0, 1], cfg_scale=2.0, cfg_channels=2)
    assert (drawn.int() - expected.int()).abs().max() <= 1


def test_bf16_runs_the_network_alone_in_bf16():
    model, diffusion, vae, dtypes = small_dit(), create_diffusion("5"), Autoencoder(channels=1), []
    model.blocks[0].mlp.fc1.register_forward_hook(
        lambda module, args, out: dtypes.append(out.dtype))
    seen = []
    y, seeds = torch.tensor([1, 2]), [0, 1]
    bf16 = sample_images(model, diffusion, vae, y, seeds, dtype="bf16",
                         on_step=lambda i, x, x0: seen.append(x.dtype))
    fp32 = sample_images(model, diffusion, vae, y, seeds)
    assert dtypes == [torch.bfloat16] * 5 + [torch.float32] * 5 and set(seen) == {torch.float32}
    difference = (bf16.int() - fp32.int()).abs()
    assert difference.max() > 0 and difference.float().mean() < 4


@pytest.fixture
def compilations(monkeypatch):
    """What torch.compile compiled: for each time whether weights were frozen; they run as usual."""
    from torch._inductor import config

    compiled, real = [], torch.compile

    def backend(graph, inputs):
        compiled.append(config.freezing)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: real(
        model, backend=backend, **options))
    monkeypatch.setattr(sample_grid.CompiledNetwork, "last", None)
    yield compiled
    torch.compiler.reset()


def test_one_compilation_serves_all_batches(compilations, capsys):
    """All samplers, guided or not, in an interval, by some channels; smaller and larger batches."""
    model, vae, y = small_dit(in_channels=3), Autoencoder(channels=3), torch.tensor([0, 1, 2, 3, 1])
    for sampling in (
            dict(), dict(cfg_scale=3.0), dict(cfg_scale=3.0, cfg_channels=1),
            dict(cfg_scale=3.0, guidance_interval=(0.3, 5.0)), dict(sampler="ddim", eta=0.5),
            dict(sampler="dpm++", cfg_scale=3.0), dict(sampler="euler"),
            dict(sampler="heun", cfg_scale=3.0), dict(sampler="sde")):
        flow = sampling.get("sampler") in FlowMatching.samplers
        diffusion = FlowMatching(4) if flow else create_diffusion("4")
        for n in (3, 1, 5):
            plain, compiled = (sample_images(
                model, diffusion, vae, y[:n], range(n), compile=compile, **sampling)
                for compile in (False, True))
            assert (plain.int() - compiled.int()).abs().max() <= 1
    assert compilations == [True]
    assert capsys.readouterr().err.count("compiling the network for 3 images at a time") == 1


def test_frozen_weights_are_compiled_anew_when_they_have_changed(compilations):
    """As an EMA's between previews; then live, so no third time. Another precision, or network."""
    model, diffusion, vae = small_dit(), create_diffusion("3"), Autoencoder(channels=1)
    sample = lambda **settings: sample_images(
        model, diffusion, vae, torch.tensor([1, 2]), [0, 1], **settings)
    for _ in range(3):
        assert (sample(compile=True).int() - sample().int()).abs().max() <= 1
        with torch.no_grad():
            torch._foreach_lerp_(list(model.parameters()), [0 * p for p in model.parameters()], 0.2)
    assert compilations == [True, False]
    sample(compile=True, dtype="bf16")
    model = small_dit(depth=1)
    sample(compile=True)
    assert compilations == [True, False, True, True]


def test_without_a_compiler_it_is_said(draw, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **options: real(model, backend=broken))
    with pytest.raises(SystemExit):
        draw("--compile")
    said = capsys.readouterr().err
    assert "--compile does not work here, leave it out: " in said and "no C++ compiler" in said
    assert sample_grid.CompiledNetwork.last is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_pictures_are_the_same_up_to_rounding(dtype):
    model, diffusion, vae = small_dit(depth=1), create_diffusion("10"), Autoencoder(channels=1)
    for block in model.blocks:
        block.compile()  # as in a training run, whose code is left alone
    model.train()(torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.tensor([0, 1])).sum().backward()
    model.eval()
    ema = small_dit(depth=1)
    for factor in (1.0, 0.9):  # the second time the weights have changed
        with torch.no_grad():
            torch._foreach_mul_(list(ema.parameters()), factor)
        plain, compiled = (sample_images(
            ema, diffusion, vae, torch.arange(4), range(4), cfg_scale=2.0, dtype=dtype,
            compile=compile) for compile in (False, True))
        difference = (plain.int() - compiled.int()).abs()
        assert difference.max() <= (1 if dtype == "fp32" else 30) and difference.float().mean() < 3


def test_latents_that_are_not_finite_are_no_black_picture(draw):
    model, diffusion, vae = small_dit(), create_diffusion("5"), Autoencoder(channels=1)
    model.y_embedder.embedding_table.weight.data[2] = math.nan
    y = torch.tensor([0, 2, 1])
    with pytest.raises(RankLocalError, match="seed 8 is not finite after step 1 of 5"):
        sample_images(model, diffusion, vae, y, [7, 8, 9])
    sample_images(model, diffusion, vae, y[::2], [7, 9])


def test_latents_are_decoded_by_the_vae(kl_folder):
    model, diffusion = small_dit(in_channels=4), create_diffusion("3")
    vae = Autoencoder.load(kl_folder)
    latents = []
    keep = lambda i, x, x0: latents.append(x)
    images = sample_images(model, diffusion, vae, torch.tensor([0, 1]), [3, 4], on_step=keep)
    assert images.shape == (2, 3, 16, 16) and latents[0].shape == (2, 4, 8, 8)
    assert latents[-1].abs().max() > 1  # latents are not clipped to [-1, 1] as pixels are
    assert torch.equal(images, vae.decode(latents[-1]))


def test_class_grid_has_a_column_for_each_class():
    model, diffusion, vae = small_dit(), create_diffusion("2"), Autoencoder(channels=1)
    model.metadata = dict(class_names=CLASS_NAMES)
    images, nrow, text = class_grid(model, diffusion, vae, 2, 5, Accelerator(cpu=True))
    assert images.shape == (8, 3, 8, 8) and nrow == 4
    assert text[:2] == ["tench, seed 5", "golden retriever, seed 6"] and text[4] == "tench, seed 9"
    alone = sample_images(model, diffusion, vae, torch.tensor([1]), [10])
    assert (images[5].int() - alone[0].int()).abs().max() <= 1
    images, nrow, text = class_grid(small_dit(num_classes=1), diffusion, vae, 3, 0,
                                    Accelerator(cpu=True))
    # unconditional: a square, no class
    assert len(images) == 9 and nrow == 3 and text[:2] == ["seed 0", "seed 1"]


def test_out_of_memory_takes_smaller_batches(monkeypatch, capsys):
    model, diffusion, vae = small_dit(), create_diffusion("3"), Autoencoder(channels=1)
    y = torch.tensor([0, 1, 2, 3, 1, 2, 0])
    draw_all = lambda: sample_grid.sample_shared(
        model, diffusion, vae, y, range(7), Accelerator(cpu=True), 5, trajectory_steps={1})
    whole, sizes, real, most = draw_all(), [], sample_grid.sample_images, 2

    def small_memory(model, diffusion, vae, y, seeds, **sampling):
        sizes.append(len(y))
        if len(y) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(model, diffusion, vae, y, seeds, **sampling)

    monkeypatch.setattr(sample_grid, "sample_images", small_memory)
    assert (draw_all().int() - whole.int()).abs().max() <= 1
    assert sizes == [5, 2, 2, 2, 1]
    assert "out of memory with 5 images at a time; going on with 2" in capsys.readouterr().err
    most = 0
    with pytest.raises(RankLocalError, match="out of memory with one image at a time: CUDA"):
        draw_all()


# ----------------------------------------------------------------------------------------- classes


def test_classes_by_name_synonym_and_number():
    for text, number in (("golden retriever", 1), (" GOLDEN Retriever ", 1), ("Tinca tinca", 0),
                         ("3", 3)):
        assert find_class(text, CLASS_NAMES) == number
    # a name goes first
    assert find_class("10", ["1", "10", "2"]) == 1 and find_class("0", ["1", "10", "2"]) == 0
    assert find_class("7", ["a, 7", "b"] * 1 + list("cdefgh")) == 7  # a synonym does not
    assert find_class("crane", ["crane, bird", "crane"]) == 1  # a whole name before a synonym
    assert [find_class(text, ["Cat", "cat"]) for text in ("Cat", "cat")] == [0, 1]
    for names in (["crane", "otter", "crane"], ["crane, bird", "otter", "crane, machine"]):
        with pytest.raises(InputError, match=r"'crane' may be class 0 \(crane.* and 2 \(crane"):
            find_class("crane", names)
    with pytest.raises(InputError, match=r"0 \(Cat\) and 1 \(cat\)"):
        find_class("CAT", ["Cat", "cat"])
    with pytest.raises(InputError,
                       match=r"no class 'golden retreiver'.*golden retriever \(1\).*0 to 3"):
        find_class("golden retreiver", CLASS_NAMES)
    with pytest.raises(InputError,
                       match=r"golden retriever \(1\), labrador retriever \(2\)|labrador.*golden"):
        find_class("retriever", CLASS_NAMES)
    for text in ("4", "-1", "", "2.0", "\N{SUPERSCRIPT TWO}"):
        with pytest.raises(InputError, match="0 to 3"):
            find_class(text, CLASS_NAMES)


words = st.text(st.characters(categories=["Ll", "Lu", "Nd", "Zs"]), min_size=1, max_size=8).filter(
    str.strip)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(words, min_size=1, max_size=3).map(", ".join), min_size=1, max_size=8),
       st.data())
def test_classes_are_found_by_their_names_or_said_why_not(names, data):
    number = data.draw(st.integers(0, len(names) - 1))
    spoken = data.draw(st.sampled_from([names[number], *names[number].split(","), str(number)]))
    key = " ".join(spoken.split())
    whole = [n for n, name in enumerate(names) if " ".join(name.split()) == key]
    having = [n for n, name in enumerate(names) if key.lower() in synonyms(name)]
    if len(whole) == 1:
        assert find_class(f" {spoken} ", names) == whole[0]  # to the letter, before all else
    elif key.isascii() and key.isdigit() and int(key) < len(names) and not whole:
        with contextlib.suppress(InputError):  # two classes that differ by capitals
            assert find_class(spoken, names) in (int(key), *having)
    elif len(set(having)) > 1 or len(whole) > 1:
        with contextlib.suppress(InputError):
            assert find_class(spoken, names) in having
    else:
        assert find_class(spoken, names) == number


@pytest.mark.parametrize(("text", "labels"), [
    ("1,3", [1, 3]), ("tench, Tinca tinca", [0]), ("otter,tench,tinca tinca,0", [3, 0, 0]),
    ("Tinca tinca, tench", [0, 0]), ("otter", [3]), ("tench , golden retriever", [0, 1])])
def test_names_may_have_commas(text, labels):
    assert parse_labels(text, CLASS_NAMES) == labels


def test_wordnet_ids_come_from_the_metadata():
    with torch.device("meta"):
        model = small_dit(num_classes=1000)
    with pytest.raises(InputError, match="do not say the WordNet ids.*0 to 999"):
        parse_labels("n01440764", class_names(model), model_wnids(model))
    model.metadata = dict(class_names=[f"n{i:08d}" for i in range(1000)])
    labels = parse_labels("n00000207,n00000001", class_names(model), model_wnids(model))
    assert labels == [207, 1]
    few = small_dit(num_classes=2)
    few.metadata = dict(class_names=["n02110185", "n01440764"])
    assert parse_labels("n01440764", class_names(few), model_wnids(few)) == [1]
    with pytest.raises(InputError, match="no class 'n00000009'.*0 to 1"):
        parse_labels("n00000009", class_names(few), model_wnids(few))


def test_imagenets_double_names():
    """torchvision tells the two cranes and maillots apart; two classes differ by a capital only."""
    with torch.device("meta"):
        names = class_names(small_dit(num_classes=1000))
    expected = {"crane": 517, "crane bird": 134, "Cardigan": 264, "cardigan": 474}
    assert {text: find_class(text, names) for text in expected} == expected
    with pytest.raises(InputError, match="264.*474"):
        find_class("CARDIGAN", names)


def test_imagenets_names_are_known():
    with torch.device("meta"):
        model = small_dit(num_classes=1000)
    names = class_names(model)
    assert len(names) == 1000 and names[207] == "golden retriever"
    assert find_class("otter", names) == 360
    model.metadata = dict(class_names=[f"n{i:08d}" for i in range(1000)])
    assert class_names(model)[207] == "golden retriever"
    model.metadata = dict(class_names=[f"thing {i}" for i in range(1000)])
    assert class_names(model)[207] == "thing 207"
    assert class_names(small_dit()) == ["0", "1", "2", "3"]


# ---------------------------------------------------------------------------- the flags, in pixels


def test_labels_nrow_and_captions(draw):
    flags = ["--class-labels", "golden retriever,3,tinca TINCA", "--nrow", "2"]
    image = draw(*flags, "--no-captions")
    assert image.size == (2 + 2 * 66, 2 + 2 * 66)
    drawn = cells(image, 2, 2)
    assert shows(drawn[:3], expected([1, 3, 0], create_diffusion("3")))
    assert (drawn[3] == 255).all()  # an empty place
    captioned = draw(*flags)
    assert captioned.size == (134, 134 + 2 * 13)
    assert np.array_equal(cells(captioned, 2, 2, captions=True), drawn)
    strip = np.asarray(captioned)[2:15, 2:66]
    assert strip.min() < 100 and strip.max() == 255  # letters


def test_default_grid_has_columns_of_classes(draw):
    drawn = cells(draw("--no-captions"), 4, 4)
    drawer = small_dit(), create_diffusion("3"), Autoencoder(channels=1)
    expected = class_grid(*drawer, 4, 0, Accelerator(cpu=True), cfg_scale=4.0)[0]
    assert shows(drawn, expected)


def test_images_per_class_repeats_the_labels(draw):
    flags = ["--no-captions", "--class-labels"]
    drawn = cells(draw(*flags, "1,2", "--images-per-class", "3"), 2, 3)
    flat = cells(draw(*flags, "1,2,1,2,1,2", "--nrow", "2"), 2, 3)
    assert np.array_equal(drawn, flat) and not np.array_equal(drawn[0], drawn[2])


def test_seed_and_batches_do_what_they_say(draw):
    flags = ["--class-labels", "1,1,1", "--no-captions"]
    first = cells(draw(*flags), 3)
    shifted = cells(draw(*flags, "--seed", "1"), 3)
    assert np.array_equal(first[1:], shifted[:2]) and not np.array_equal(first[0], shifted[0])
    batched = cells(draw(*flags, "--per-proc-batch-size", "1"), 3)
    assert np.abs(batched.astype(int) - first).max() <= 1


@pytest.mark.parametrize(("flags", "same"), [
    (["--sampler", "ddim"], False), (["--sampler", "dpm++"], False),
    (["--cfg-scale", "1.5"], False),
    (["--num-sampling-steps", "4"], False), (["--guidance-interval", "0.3,5"], False),
    (["--dtype", "bf16"], False),
    (["--cfg-scale", "4"], True), (["--sampler", "ddpm"], True),
    (["--guidance-interval", "0,1000"], True),
    (["--num-sampling-steps", "3"], True), (["--vae", "none"], True), (["--no-tf32"], True),
    (["--num-classes", "4", "--image-size", "8"], True), (["--no-compile"], True)])
def test_sampling_flags_change_the_pixels(draw, flags, same):
    base = cells(draw("--class-labels", "1,2", "--no-captions"), 2)
    changed = cells(draw("--class-labels", "1,2", "--no-captions", *flags), 2)
    assert np.array_equal(base, changed) == same


@pytest.mark.parametrize(("objective", "flags", "sampler", "process"), [
    ("flow", [], "euler", FlowMatching(4)),
    ("flow", ["--sampler", "heun"], "heun", FlowMatching(4)),
    ("sit", ["--sampler", "sde"], "sde", FlowMatching(4, "sit")),
    (None, ["--objective", "sit"], "euler", FlowMatching(4, "sit")),
    (None, ["--objective", "flow"], "euler", FlowMatching(4)),
    (None, ["--sampler", "dpm++"], "dpm++", create_diffusion("trailing4"))])
def test_sampling_follows_objective_and_sampler(draw, tmp_path, objective, flags, sampler, process):
    path = tmp_path / "a.safetensors"
    weights = save_small_dit(path, dict(objective=objective) if objective else None)
    image = draw("--class-labels", "1,2", "--no-captions", *flags, ckpt=weights, steps=4)
    assert shows(cells(image, 2), expected([1, 2], process, sampler=sampler))
    settings = json.loads(image.text["settings"])
    assert (settings["objective"], settings["sampler"]) == (process.objective, sampler)
    assert same_pixels(draw_again(image, tmp_path), image)


@pytest.mark.parametrize(("flags", "words"), [
    (["--sampler", "ddim"], "flow has no sampler 'ddim': use one of euler, heun, sde"),
    (["--sampler", "euler", "--eta", "0.5"], "ddim alone"),
    (["--sampler", "sde", "--num-sampling-steps", "1"], "sde needs 2 or more steps"),
    (["--objective", "ddpm"], "was trained with --objective flow, not ddpm")])
def test_what_a_flow_refuses(tmp_path, capsys, flags, words):
    flow = save_small_dit(tmp_path / "flow.safetensors", dict(objective="flow"))
    assert words in refused(capsys, sample_grid, "--ckpt", flow, *flags)


def test_a_notebook_draws_with_the_settings_of_the_run(tmp_path):
    suggested = dict(num_sampling_steps=2, cfg_scale=1.5)
    path = save_small_dit(tmp_path / "a.safetensors", dict(sampling=suggested))
    model = load_checkpoint(path)
    images = sample_grid.draw(model, [3, "tench", 1], seed=5)
    assert torch.equal(images, expected([3, 0, 1], create_diffusion("2"), seeds=[5, 6, 7],
                                        cfg_scale=1.5))
    assert make_grid(images, nrow=3).size == (2 + 3 * 66, 2 + 66)
    other = sample_grid.draw(model, [3, 0, 1], seed=5, cfg_scale=3.0, guidance_interval=(0.1, 200))
    assert not torch.equal(other, images)
    for labels, overrides, words in (([4], {}, "from 0 to 3"), ([-1], {}, "from 0 to 3"),
                                     (["dog"], {}, "no class 'dog'"),
                                     ([0], dict(dtype="fp8"), "--dtype fp8 must be one of"),
                                     ([0], dict(num_sampling_steps=0), "1 or more")):
        with pytest.raises(InputError, match=words):
            sample_grid.draw(model, labels, **overrides)
    with pytest.raises(TypeError, match="no argument 'steps'"):
        sample_grid.draw(model, [0], steps=5)


def test_eta_changes_ddim(draw):
    flags = ["--class-labels", "1", "--sampler", "ddim", "--no-captions"]
    images = [cells(draw(*flags, *eta), 1) for eta in ([], ["--eta", "0"], ["--eta", "1"])]
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_cfg_channels_guides_the_first_ones(draw, tmp_path):
    colour = save_small_dit(tmp_path / "colour.safetensors", in_channels=3)
    one, three, all_ = (
        cells(draw("--class-labels", "1", "--no-captions", *flags, ckpt=colour), 1)
        for flags in (["--cfg-channels", "1"], ["--cfg-channels", "3"], []))
    assert np.array_equal(three, all_) and not np.array_equal(one, all_)


def test_suggested_sampling_comes_with_the_weights(draw, tmp_path):
    suggested = dict(num_sampling_steps=2, cfg_scale=1.5)
    weights = save_small_dit(tmp_path / "a.safetensors", dict(sampling=suggested))
    flags = ["--class-labels", "1", "--no-captions"]
    picture = draw(*flags, "--cfg-scale", "1.5", ckpt=weights, steps=2)
    unasked = draw(*flags, ckpt=weights, steps=None, output="b.png")
    assert same_pixels(unasked, picture)
    assert json.loads(unasked.text["settings"]).items() >= suggested.items()


def test_vae_flag_decodes(draw, tmp_path, kl_folder):
    latent = save_small_dit(tmp_path / "latent.safetensors", dict(vae="ema"), in_channels=4)
    image = draw("--vae", kl_folder, "--class-labels", "0,1", "--no-captions", "--image-size", "16",
                 ckpt=latent)
    assert image.size == (2 + 2 * 66, 2 + 66)
    assert json.loads(image.text["settings"])["vae"] == kl_folder
    vae = Autoencoder.load(kl_folder)
    expected = sample_images(small_dit(in_channels=4), create_diffusion("3"), vae,
                             torch.tensor([0, 1]), [0, 1],
                             cfg_scale=4.0)
    assert np.array_equal(np.asarray(image)[2:66:4, 2:66:4], expected[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_formats(draw, suffix):
    exact = np.asarray(draw("--class-labels", "1,2", output="exact.png")).astype(int)
    image = draw("--class-labels", "1,2", output=f"out{suffix}")
    assert image.format == sample_grid.FORMATS[suffix.lower()]
    allowed = 0.01 if image.format == "PNG" else 8
    assert np.abs(np.asarray(image.convert("RGB")) - exact).mean() < allowed


def test_the_picture_tells_how_to_draw_it_again(draw, small_ckpt, tmp_path):
    first = draw("--class-labels", "golden retriever,3", "--seed", "5", "--sampler",
                 "ddim", "--eta", "0.5", "--cfg-scale", "2", "--guidance-interval", "0.1,50",
                 "--no-captions", "--images-per-class", "2")
    settings = json.loads(first.text["settings"])
    assert settings["seed"] == 5 and settings["ckpt"] == small_ckpt
    assert settings["class_labels"] == "golden retriever,3"
    assert same_pixels(draw_again(first, tmp_path), first)


def test_trajectory_shows_the_prediction_along_the_way(draw, tmp_path):
    flags = ["--class-labels", "1,2", "--no-captions", "--trajectory", tmp_path / "t.gif"]
    picture = draw(*flags, steps=6)
    film = Image.open(tmp_path / "t.gif")
    assert film.n_frames == 6 and film.size == picture.size  # steps 5 to 1, then the images
    frames = [cells(film.seek(k) or film.convert("RGB"), 2).astype(int) for k in range(6)]
    assert np.abs(frames[-1] - cells(picture, 2)).mean() < 3
    predicted = []
    vae = Autoencoder(channels=1)

    def keep(i, x, x0):
        predicted.append(vae.decode(x0).permute(0, 2, 3, 1).numpy())

    expected([1, 2], create_diffusion("6"), on_step=keep)
    assert np.abs(frames[0] - predicted[0]).mean() < 3
    assert np.abs(frames[2] - predicted[2]).mean() < 3


@pytest.mark.parametrize("sweep", [
    "cfg_scale=1,1.5,4", "num_sampling_steps=2,3,5", "eta=0,0.5,1", "sampler=ddpm,ddim,dpm++"])
def test_sweep_has_a_row_for_each_value(draw, tmp_path, sweep):
    name, _, values = sweep.partition("=")
    extra = ["--sampler", "ddim"] if name == "eta" else []
    image = draw("--class-labels", "1,2", "--sweep", sweep, "--no-captions", *extra,
                 steps=None if name == "num_sampling_steps" else 3)
    margin = image.size[0] - 2 * 66
    assert margin > 30 and np.asarray(image)[:, :margin].min() < 100  # the values, on the left
    rows = cells(image, 2, 3, margin=margin)
    assert "sweep" in json.loads(image.text["settings"])
    assert name not in shlex.split(image.text["command"])
    for row, value in enumerate(values.split(",")):
        flag = f"--{name.replace('_', '-')}"
        single = draw("--class-labels", "1,2", "--no-captions", flag, value, *extra)
        assert np.array_equal(cells(single, 2), rows[2 * row : 2 * row + 2])
    assert same_pixels(draw_again(image, tmp_path), image)


def test_sweep_names_the_columns_once(draw):
    image = draw("--class-labels", "1,2", "--sweep", "cfg_scale=1,4")
    assert image.size[1] == 2 + 13 + 2 * 66


def test_grids_place_and_enlarge():
    images = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 128, 128) * 100
    grid = np.asarray(make_grid(images, 8, ["a very long name that does not fit here"] * 3))
    assert grid.shape[1] == 2 + 3 * 130  # no empty columns
    assert [grid[-64, 2 + c * 130 + 5, 0] for c in range(3)] == [0, 100, 200]
    assert (grid[:, 130:132][:13] == 255).all()  # the caption was cut at its image's edge


# -------------------------------------------------------------------------- official command lines


def test_official_command_lines(tmp_path, monkeypatch, capsys):
    """sample.py's own flags: the classes, four a row, guidance 4, 250 steps, the mse VAE."""
    asked = []

    def load(name, device):
        asked.append(name)
        return small_dit(in_channels=4, num_classes=1000, input_size=32 if "256" in name else 64,
                         patch_size=8)

    def load_autoencoder(name, device, channels):
        asked.append(name)
        vae = Autoencoder(name=name, channels=4)
        vae.vae, vae.factor = "official", 8
        vae.decode = lambda x: (x[:, :3] * 50 + 128).clamp(0, 255).to(torch.uint8)
        return vae

    monkeypatch.setattr(sample_grid, "load_checkpoint", load)
    monkeypatch.setattr(sample_grid.Autoencoder, "load", load_autoencoder)
    monkeypatch.chdir(tmp_path)
    command(sample_grid, "--image-size", "512", "--seed", "1", "--num-sampling-steps", "2")
    assert asked == ["DiT-XL/2-512", "mse"]
    image = Image.open("sample.png")
    assert image.size == (2 + 4 * 66, 2 + 2 * (66 + 13))
    settings = json.loads(image.text["settings"])
    assert (settings["cfg_scale"], settings["seed"], settings["vae"]) == (4.0, 1, "mse")
    args = sample_grid.parse_args([])
    assert sample_grid.sampling_settings(args, load("256", None), 4.0)[0].num_timesteps == 250
    model = load("256", None)
    labels, nrow = sample_grid.choose_labels(args, model, class_names(model))
    assert (labels, nrow) == ([207, 360, 387, 974, 88, 979, 417, 279], 4)
    other = ["--model", "DiT-L/4", "--image-size", "256", "--ckpt", "X256.pt"]
    assert "depth 2, not 24" in refused(capsys, sample_grid, *other)
    assert asked[-1] == "X256.pt"  # found before a VAE is downloaded


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(("flags", "words"), [
    (["--class-labels", "golden retreiver"], "golden retriever (1)"),
    (["--class-labels", "4"], "0 to 3"),
    (["--num-sampling-steps", "1001"], "1 to 1000"), (["--num-sampling-steps", "0"], "1 to 1000"),
    (["--num-sampling-steps", "-3"], "1 to 1000"),
    (["--sampler", "dpm++", "--num-sampling-steps", "1001"], "1 to 1000"),
    (["--eta", "0.5"], "ddim alone"),
    (["--sampler", "ddim", "--eta", "1.5"], "0 to 1"), (["--cfg-channels", "2"], "1 channel"),
    (["--guidance-interval", "5"], "two noise levels"),
    (["--guidance-interval", "5,1"], "not below"),
    (["--output", "nowhere/out.png"], "nowhere"), (["--output", "out.bmp"], ".webp"),
    (["--output", "out"], ".png"),
    (["--trajectory", "out.mp4"], ".gif"), (["--trajectory", "nowhere/out.gif"], "nowhere"),
    (["--nrow", "0"], "--nrow 0"), (["--images-per-class", "-1"], "--images-per-class -1"),
    (["--seed", "-1"], "--seed -1 must be 0 or more"),
    (["--cfg-scale", "nan"], "nan must be a number"),
    (["--cfg-channels", "0"], "--cfg-channels 0 must be 1 or more"),
    (["--cfg-channels", "1", "--cfg-scale", "1"], "does nothing at --cfg-scale 1"),
    (["--guidance-interval", "0.3,5", "--cfg-scale", "1"], "does nothing at --cfg-scale 1"),
    (["--guidance-interval", "1000,2000"], "none of the steps' noise levels"),
    (["--sweep", "cfg_scale=1,2", "--trajectory", "a.gif"], "--trajectory"),
    (["--class-labels", "n01440764"], "WordNet"), (["--output", f"{'a' * 250}.png"], "too long"),
    (["--per-proc-batch-size", "0"], "--per-proc-batch-size 0 must be 1 or more"),
    (["--sweep", "depth=1,2"], "cfg_scale"),
    (["--sweep", "cfg_scale"], "values"), (["--sweep", "cfg_scale=a"], "values"),
    (["--sweep", "cfg_scale=1,2", "--nrow", "2"], "--nrow"),
    (["--sweep", "sampler=euler"], "ddpm has no sampler 'euler'"),
    (["--sampler", "heun"], "ddpm has no sampler 'heun': use one of ddpm"),
    (["--sweep", "sampler=plms"], "--sampler plms must be one of ddpm"),
    (["--sweep", "cfg_scale=1,2", "--cfg-scale", "4"], "which varies it"),
    (["--sweep", "num_sampling_steps=5,2000"], "2000"), (["--model", "DiT-Q/2"], "DiT-XL/2"),
    (["--model", "DiT-L/4"], "not 24"), (["--image-size", "256"], "8 px, not 256"),
    (["--num-classes", "10"], "num_classes 4, not 10"),
    (["--vae", "nobody/no-such-vae"], "the VAE nobody/no-such-vae")])
def test_bad_input_is_said_before_sampling(small_ckpt, tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.setattr(sample_grid, "sample_shared", None)  # sampling would be a TypeError
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, sample_grid, "--ckpt", small_ckpt, *flags)
    assert not list(tmp_path.iterdir())


def test_guidance_needs_a_null_class(draw, tmp_path, capsys):
    no_null = save_small_dit(tmp_path / "plain.safetensors", class_dropout_prob=0.0)
    said = refused(capsys, sample_grid, "--ckpt", no_null, "--cfg-scale", "2")
    assert "label dropout" in said
    # unset: no guidance
    assert json.loads(draw(ckpt=no_null).text["settings"])["cfg_scale"] == 1.0


def test_scale_below_one_warns(draw, capsys):
    draw("--cfg-scale", "0", "--class-labels", "1")
    assert "off at 1.0, not at 0" in capsys.readouterr().err
    draw("--cfg-scale", "1", "--class-labels", "1")
    assert "warning" not in capsys.readouterr().err


def test_the_stored_command_works_with_spaces(draw, tmp_path):
    folder = tmp_path / "a run's folder"
    folder.mkdir()
    small = save_small_dit(folder / "small ema.safetensors")
    first = draw("--class-labels", "tench, Tinca tinca", "--no-captions", ckpt=small)
    assert same_pixels(draw_again(first, tmp_path), first)


def test_pipes_and_devices_are_written_through(draw, small_ckpt, tmp_path):
    exact = draw("--class-labels", "1", output="exact.png")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    with ThreadPoolExecutor() as pool:
        for name in ("pipe", "link"):
            received = pool.submit((tmp_path / name).read_bytes)
            command(sample_grid, "--ckpt", small_ckpt, "--class-labels", "1",
                    "--num-sampling-steps", "3", "--output", tmp_path / name)
            assert same_pixels(Image.open(io.BytesIO(received.result())), exact)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()
    sample_grid.save_grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), os.devnull, 1)
    assert Path(os.devnull).is_char_device()


def test_output_folder_must_be_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to .*file"):
        sample_grid.check_output(tmp_path / "file" / "out.png", sample_grid.FORMATS)
    with pytest.raises(InputError, match="cannot write"):
        sample_grid.check_output("/proc/out.png", sample_grid.FORMATS)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InputError, match="must end in"):
        sample_grid.check_output(tmp_path / "folder.png", sample_grid.FORMATS)
    sample_grid.check_output(tmp_path / "out.png", sample_grid.FORMATS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


# --------------------------------------------------------------------------- processes and threads


def test_processes_share_the_work(draw, tmp_path, capfd):
    alone = draw("--class-labels", "1,2,3", output="alone.png")
    capfd.readouterr()
    two = fork_two(lambda: draw("--class-labels", "1,2,3", output="shared.png"))
    assert wait(*two) == [0, 0] and capfd.readouterr().out.count("wrote") == 1
    difference = np.asarray(Image.open(tmp_path / "shared.png")).astype(int) - np.asarray(alone)
    assert np.abs(difference).max() <= 1


def test_a_lone_process_gets_its_cores_back(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for launcher, threads in ((True, "1"), (True, "3"), (False, "1")):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")  # as `accelerate launch` leaves it
        if not launcher:
            monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
        sample_grid.make_accelerator()
    # three threads, or one without the launcher, are a choice
    assert asked == [len(os.sched_getaffinity(0))]


def test_progress_is_a_line_now_and_then_without_a_terminal(monkeypatch, capsys):
    """With the time left and the note; of the first process alone, and one bar inside another."""
    clock = [0.0]
    monkeypatch.setattr(sample_grid.time, "monotonic", lambda: clock[0])
    for is_main_process in (True, False):
        accelerator = SimpleNamespace(is_main_process=is_main_process)
        with sample_grid.ProgressBar(accelerator, "step", 10, done=2) as outer:
            outer.note = "loss 0.5"
            for clock[0] in (29, 31, 40, 60, 62):
                with sample_grid.ProgressBar(accelerator, "preview", 3) as inner:
                    inner.advance(3)
                outer.advance()
            clock[0] = 0.0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 4/10", "step 7/10"]
    assert all(line.endswith(" left  loss 0.5") for line in lines)


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_set_for_products_and_convolutions(tf32):
    sample_grid.make_accelerator(tf32=tf32)
    assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == tf32


def test_a_process_waits_hours_for_another():
    assert sample_grid.make_accelerator().init_handler.timeout >= timedelta(hours=1)


def test_bf16_needs_a_gpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    sample_grid.check_bf16(torch.device("cpu"), "--dtype")
    with pytest.raises(InputError, match="--dtype bf16: Tesla V100 has no bfloat16, leave it out"):
        sample_grid.check_bf16(torch.device("cuda:0"), "--dtype")
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *version: version < (14, 0))
    with pytest.raises(InputError, match="--dtype bf16: the Mac's GPU has no bfloat16"):
        sample_grid.check_bf16(torch.device("mps"), "--dtype")
    model, asked = small_dit(), []
    monkeypatch.setattr(sample_grid, "check_bf16", lambda device, flag: asked.append(flag))
    sample_grid.sampling_settings(sample_grid.parse_args(["--dtype", "bf16"]), model, 1.0)
    AcceleratorState._reset_state()
    sample_grid.make_accelerator("bf16")
    AcceleratorState._reset_state()
    assert asked == ["--dtype", "--mixed-precision"]


def test_what_accelerate_refuses_is_said(monkeypatch):
    def refuse(**settings):
        raise ValueError(f"{settings['mixed_precision']} mixed precision requires a GPU")

    monkeypatch.setattr(sample_grid, "Accelerator", refuse)
    with pytest.raises(InputError, match="accelerate cannot start here: bf16 mixed precision"):
        sample_grid.make_accelerator("bf16")


def test_the_device_is_said(draw, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    draw("--class-labels", "1")
    assert "running on the CPU, in fp32\n" in capsys.readouterr().out
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = sample_grid.describe_device(Accelerator(cpu=True), "bf16")
    assert text.startswith("running on the CPU, in bf16 (no usable GPU: if there is one")
    assert "built for 13.0" in text
