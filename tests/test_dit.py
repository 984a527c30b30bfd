"""The network against figures of the official code, and weights in and out of every layout."""

import argparse
import errno
import json
import math
import os
import pickle
import resource
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from golden import fill, formula
from helpers import ROOT, command, contents, damage, refused, same, save_vae
from safetensors.torch import load_file, save_file

import dit
from dit import DiT, InputError, build_dit, load_checkpoint, save_checkpoint

# Made with the official code, in float32.
GOLDEN = np.load(Path(__file__).parent / "data" / "golden" / "models.npz")
CASES = json.loads(str(GOLDEN["cases"]))
STEM = "diffusion_pytorch_model"  # what diffusers calls its files of weights
TINY = dict(input_size=8, patch_size=2, in_channels=3, hidden_size=96, depth=2, num_heads=3,
            num_classes=10)


def make(config, kwargs):
    return build_dit(config, **kwargs) if config else DiT(**kwargs)


def close(got, key, stride=1, tolerance=2e-5):
    """Largest error over largest value; where they are kept the mean and spread of the output."""
    want = torch.from_numpy(GOLDEN[key]).double()
    assert got.dtype == torch.float32
    error = (got[:, :, ::stride, ::stride].double() - want).abs().max()
    assert error <= tolerance * want.abs().max()
    if key + ".stats" in GOLDEN:
        mean, std, total = GOLDEN[key + ".stats"]
        whole = got.double()
        assert abs(whole.mean() - mean) < tolerance * std
        assert abs(whole.std(correction=0) - std) < tolerance * std
        assert abs(whole.abs().sum() / total - 1) < tolerance


@pytest.fixture
def tiny():
    return fill(DiT(**TINY), 7)


def inputs(model, n=3):
    """x, t, y; the last y is the null label."""
    x = formula("x", (n, model.in_channels, model.input_size, model.input_size), 1)
    return x, torch.linspace(0, 999, n), torch.tensor([1, 4, model.num_classes])[:n]


# ------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("case", CASES["models"], ids=lambda case: case["id"])
@torch.no_grad()
def test_outputs_equal_the_official_ones(case):
    """forward at fractional, whole and out-of-range t, positions, guidance of all and of three."""
    name, seed = case["id"], case["seed"]
    model = fill(make(case["config"], case["kwargs"]), seed, case["small"])
    x, y = formula("x", case["x_shape"], seed), torch.tensor(case["y"])
    close(model(x, torch.tensor(case["t"]), y), f"{name}.fwd", case["stride"])
    if f"{name}.fwd_int" in GOLDEN:
        close(model(x, torch.tensor(case["t_int"]), y), f"{name}.fwd_int")
    if f"{name}.pos_embed" in GOLDEN:
        assert np.abs(model.pos_embed[0, :, ::8].numpy() - GOLDEN[f"{name}.pos_embed"]).max() < 1e-6
    for channels, scale in case["cfg"]["runs"] if case["cfg"] else ():
        t, y = torch.tensor(case["cfg"]["t"]), torch.tensor(case["cfg"]["y"])
        x = formula("cfg_x", (len(y), *case["x_shape"][1:]), seed)
        got = model.forward_with_cfg(x, t, y, scale, cfg_channels=None if channels == "all" else 3)
        close(got, f"{name}.cfg_{channels}_{scale}")


@torch.no_grad()
def test_label_dropout_gives_the_null_label():
    """In training with probability 1 every label is hidden, as officially; a mask hides its own."""
    case = CASES["train_mode"]
    model = fill(DiT(**case["kwargs"]), case["seed"]).train()
    x, t = formula("x", case["x_shape"], case["seed"]), torch.tensor(case["t"])
    y = torch.tensor(case["y"])
    close(model(x, t, y), "drop_all.fwd")
    first = model(x, t, y, drop=torch.tensor([True, False]))
    hidden = torch.tensor([10, y[1]])
    assert torch.equal(first, model(x, t, hidden, drop=torch.tensor([False, False])))
    assert not torch.allclose(first[1], model(x, t, y)[1])


def test_configurations_have_the_official_shapes_and_sizes():
    assert set(dit.DIT_CONFIGS) == set(CASES["param_counts"])
    with torch.device("meta"):
        for name, (total, trainable) in CASES["param_counts"].items():
            model = build_dit(name)
            assert sum(p.numel() for p in model.parameters()) == total, name
            assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable, name
        for case in CASES["shapes"]:
            state = make(case["config"], case["kwargs"]).state_dict()
            got = {key: list(tensor.shape) for key, tensor in state.items()}
            assert len(got) == case["keys"] and case["shapes"].items() <= got.items()


def test_multiply_adds_equal_the_flop_counter_and_the_paper():
    from torch.utils.flop_counter import FlopCounterMode

    odd = dict(input_size=12, patch_size=3, in_channels=1, hidden_size=48, depth=2, num_heads=4,
               mlp_ratio=3.0, num_classes=5, learn_sigma=False)
    with torch.device("meta"):
        for model in (build_dit("DiT-S/4"), build_dit("DiT-B/2", input_size=64), DiT(**odd)):
            x = torch.empty(1, model.in_channels, model.input_size, model.input_size)
            with FlopCounterMode(display=False) as counter:
                model.eval()(x, torch.zeros(1), torch.zeros(1, dtype=torch.int64))
            assert dit.count_macs(model.config) * 2 == counter.get_total_flops()
        for name, input_size, macs, paper in CASES["macs"]:
            assert dit.count_macs(build_dit(name, input_size=input_size).config) == macs
            assert dit.PAPER_GFLOPS[name, input_size] == paper
            assert abs(macs / 1e9 - paper) < max(0.002 * paper, 0.005)


def test_the_table_shows_parameters_and_gflops_beside_the_papers(capsys):
    dit.main(dit.parse_args([]))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 14
    assert lines[1] == ["DiT-XL/2", "256", "256", "28", "1152", "16", "675,129,632", "118.62",
                        "118.64", "13.50", "400.5", "36.0"]


def test_the_bytes_of_training_state_are_those_of_a_training(tiny):
    ema = fill(DiT(**TINY), 7)
    trained = [p for p in tiny.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained)
    gradients(tiny, tiny)
    adam.step()
    tensors = [*tiny.parameters(), *ema.parameters(), *[p.grad for p in trained]]
    for state in adam.state.values():
        tensors += [state["exp_avg"], state["exp_avg_sq"]]
    assert dit.state_bytes(tiny) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_bytes_kept_for_backward_are_those_of_real_tensors(checkpointing, tiny):
    """float16 has bfloat16's size, and on a CPU the fused attention that GPUs have for both."""
    tiny.train().gradient_checkpointing = checkpointing
    kept = []
    for n in (1, 3):
        storages = set()
        x, t, y = inputs(tiny, n)
        with torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, kept=storages: kept.add(tensor.untyped_storage()) or tensor,
                lambda tensor: tensor), torch.autocast("cpu", torch.float16):
            tiny(x, t, y)
        kept.append(sum(storage.nbytes() for storage in storages))
    assert dit.kept_bytes(tiny.config)[checkpointing] == (kept[1] - kept[0]) / 2


@pytest.mark.parametrize("case", CASES["init"], ids=["S8", "tiny"])
def test_initialisation_is_the_papers(case):
    """Zero gates, output and biases; Xavier-uniform matrices, bounded; normal(0.02) embeddings."""
    torch.manual_seed(1)
    model = make(case["config"], case["kwargs"])
    state = model.state_dict()
    for name, (kind, size) in case["tensors"].items():
        tensor, n = state[name].double(), state[name].numel()
        largest, std = tensor.abs().max(), tensor.std(correction=0)
        if kind == "zero":
            assert largest == 0, name
        elif kind == "normal":
            assert abs(std / size - 1) < 5 / math.sqrt(2 * n) and largest > 2 * size, name
        elif kind == "uniform":
            assert size * (1 - 20 / n) < largest <= size * (1 + 1e-6), name
            assert abs(std * math.sqrt(3) / size - 1) < 2.5 / math.sqrt(n) + 1e-3, name
    assert not model.pos_embed.requires_grad
    x, t, y = inputs(model)
    assert model.eval()(x, t, y).abs().max() == 0  # the final layer is zero


def test_other_shapes_are_refused(tiny):
    x, t, y = inputs(tiny)
    for wrong in (x[..., :6], x[..., :4, :4], x[:, :2]):  # rectangular, other size, other channels
        with pytest.raises(InputError, match="image-size"):
            tiny(wrong, t, y)
    with pytest.raises(InputError, match="must divide"):
        DiT(**TINY | dict(input_size=9))
    with pytest.raises(InputError, match="DiT-Q/2.*DiT-XL/2"):
        build_dit("DiT-Q/2")


@torch.no_grad()
def test_guidance_of_scale_one_is_one_conditional_pass(tiny):
    x, t, y = inputs(tiny)
    sizes = []
    tiny.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert torch.equal(tiny.forward_with_cfg(x, t, y, 1.0), tiny(x, t, y))
    assert sizes == [3, 3]
    tiny.forward_with_cfg(x, t, y, 1.5)
    assert sizes == [3, 3, 6]


@torch.no_grad()
def test_guidance_in_bfloat16_is_computed_in_float32(tiny):
    x, t, y = inputs(tiny)
    with torch.autocast("cpu", torch.bfloat16):
        guided = tiny.forward_with_cfg(x, t, y, 4.0)
        null = torch.full_like(y, tiny.num_classes)
        both = tiny(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
    cond, uncond = both.double().chunk(2)
    want = (uncond + 4 * (cond - uncond))[:, :3]
    assert both.dtype == torch.bfloat16 and guided.dtype == torch.float32
    assert (guided[:, :3] - want).abs().max() < 1e-5 * want.abs().max()


def test_tokens_are_contiguous_in_every_block(tiny):
    """Otherwise every LayerNorm copies them."""
    seen = []
    for block in tiny.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    tiny(*inputs(tiny))
    assert seen == [True, True]


@torch.no_grad()
def test_guidance_needs_a_null_label():
    model = fill(DiT(**TINY, class_dropout_prob=0.0), 7)
    x, t, y = inputs(model)
    y = y.clamp(max=9)
    with pytest.raises(InputError, match="label dropout.*--cfg-scale 1"):
        model.forward_with_cfg(x, t, y, 1.5)
    assert torch.equal(model.forward_with_cfg(x, t, y, 1), model(x, t, y))


def gradients(model, forward):
    x, t, y = inputs(model)
    model.zero_grad()
    out = forward(x, t, y, torch.tensor([False, True, False]))
    (out * formula("g", out.shape, 3)).sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def test_gradient_checkpointing_changes_nothing(tiny):
    tiny.train()
    runs = []
    tiny.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    plain = gradients(tiny, tiny)
    assert len(runs) == 1
    tiny.gradient_checkpointing = True
    saving = gradients(tiny, tiny)
    assert len(runs) == 3  # the backward pass ran the block again
    assert torch.equal(plain[0], saving[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], saving[1], strict=True))


def check_compiled(model, **options):
    model.train()
    plain = gradients(model, model)
    compiled = gradients(model, torch.compile(model, fullgraph=True, **options))
    assert torch.allclose(plain[0], compiled[0], rtol=1e-4, atol=1e-5)
    for a, b in zip(plain[1], compiled[1], strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)


def test_torch_compile_traces_the_whole_network(tiny):
    check_compiled(tiny, backend="aot_eager")


@pytest.mark.slow
def test_torch_compile_changes_nothing(tiny):
    check_compiled(tiny)
    tiny.gradient_checkpointing = True
    check_compiled(tiny)


def test_timesteps_are_embedded_in_float32_under_autocast(tiny):
    """bfloat16 cannot tell t = 998 from t = 999."""
    seen = []
    tiny.t_embedder.mlp[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16):
        tiny.t_embedder(torch.tensor([998, 999]))
    frequencies = 10000.0 ** (-torch.arange(128).double() / 128)
    angles = torch.tensor([[998.0], [999.0]], dtype=torch.float64) * frequencies
    assert seen[0].dtype == torch.float32
    assert (seen[0] - torch.cat([angles.cos(), angles.sin()], 1)).abs().max() < 1e-4
    # So it is with weights in bfloat16, which take what comes out.
    tiny.bfloat16().t_embedder(torch.tensor([998, 999]))
    assert (seen[1] - torch.cat([angles.cos(), angles.sin()], 1)).abs().max() < 1e-2


# ------------------------------------------------------------------------ weights in and out


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and same(a, b) and all(a[name].dtype == b[name].dtype for name in a)


def to_folder(model, path):
    """Convert a model to a folder of diffusers; returns its transformer folder."""
    save_checkpoint(path.with_suffix(".safetensors"), model)
    dit.convert(path.with_suffix(".safetensors"), path)
    return path / "transformer"


def official(path, ema, **args):
    """A training checkpoint as the official train.py writes it; its other weights are others."""
    other = DiT(**ema.config)
    optimizer = torch.optim.AdamW(other.parameters())
    torch.save(dict(model=other.state_dict(), ema=ema.state_dict(), opt=optimizer.state_dict(),
                    args=argparse.Namespace(**args)), path)
    return path


def diffusers_model(folder):
    """diffusers' model of a folder, strictly loaded."""
    from diffusers import DiTTransformer2DModel

    model, info = DiTTransformer2DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def test_our_file_carries_config_and_metadata(tiny, tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    save_checkpoint(path, tiny, step=5, class_names=["a", "ü"], sampling=dict(cfg_scale=1.5))
    assert os.listdir(path.parent) == ["a.safetensors"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # others may read it
    state = torch.random.get_rng_state()
    model = load_checkpoint(path)
    assert torch.equal(state, torch.random.get_rng_state())
    assert equal(model, tiny) and model.config == tiny.config and not model.training
    assert model.metadata == dict(step=5, class_names=["a", "ü"], sampling=dict(cfg_scale=1.5))
    assert model.x_embedder.proj.weight.requires_grad and not model.pos_embed.requires_grad


def test_the_config_is_the_ten_arguments_in_their_order(tiny):
    names = ["input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads",
             "mlp_ratio", "class_dropout_prob", "num_classes", "learn_sigma"]
    assert list(tiny.config) == names and tiny.config.items() >= TINY.items()
    assert all(getattr(tiny, name) == value for name, value in tiny.config.items())
    with pytest.raises(TypeError, match="width"):
        DiT(**TINY, width=96)


def test_a_file_of_the_first_release_loads(tiny, tmp_path):
    """It has a checksum of another name and kind, and no fingerprint."""
    header = dict(config=json.dumps(tiny.config), metadata=json.dumps(dict(step=3)), crc32="12345")
    save_file(tiny.state_dict(), tmp_path / "a.safetensors", metadata=header)
    model = load_checkpoint(tmp_path / "a.safetensors")
    assert equal(model, tiny) and model.config == tiny.config and model.metadata == dict(step=3)


def test_every_pair_of_layouts_is_bit_for_bit(tiny, tmp_path):
    names = ("a.safetensors", "a.pt", "a")
    save_checkpoint(tmp_path / "start.safetensors", tiny)
    for first in names:
        dit.convert(tmp_path / "start.safetensors", tmp_path / first)
        for second in names:
            target = tmp_path / f"from-{first}" / second
            dit.convert(tmp_path / first, target)
            model = load_checkpoint(target)
            assert equal(model, tiny) and model.config == tiny.config, (first, second)
    assert list(torch.load(tmp_path / "a.pt", weights_only=True)) == list(tiny.state_dict())
    assert equal(load_checkpoint(tmp_path / "a" / "transformer"), tiny)


@pytest.mark.parametrize("change", [
    dict(learn_sigma=False), dict(in_channels=1, input_size=6), dict(patch_size=4)])
def test_other_configurations_survive_other_layouts(change, tmp_path):
    model = fill(DiT(**TINY | change), 3)
    save_checkpoint(tmp_path / "a.safetensors", model)
    for name in ("a.pt", "a"):
        dit.convert(tmp_path / "a.safetensors", tmp_path / name)
        assert load_checkpoint(tmp_path / name).config == model.config


def test_convert_refuses_what_a_layout_cannot_say(tmp_path):
    for change, names in [(dict(class_dropout_prob=0.0), ["b.pt", "b"]),
                          (dict(num_heads=4), ["b.pt"]),
                          (dict(mlp_ratio=2.0), ["b"])]:
        save_checkpoint(tmp_path / "a.safetensors", DiT(**TINY | change))
        for name in names:
            with pytest.raises(InputError, match=next(iter(change))):
                dit.convert(tmp_path / "a.safetensors", tmp_path / name)
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_convert_overwrites_nothing(tiny, tmp_path):
    """Neither a file, nor a folder that holds any part of what would be written there."""
    save_checkpoint(tmp_path / "a.safetensors", tiny)
    (tmp_path / "c" / "transformer").mkdir(parents=True)
    (tmp_path / "d").mkdir()
    for name in ("b.pt", "d/README.md"):
        (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    for name, part in [("a.safetensors", "a.safetensors"), ("b.pt", "b.pt"), ("c", "transformer"),
                       ("d", "README.md")]:
        with pytest.raises(InputError, match=f"{part} exists"):
            dit.convert(tmp_path / "a.safetensors", tmp_path / name)
    assert contents(tmp_path) == before


@torch.no_grad()
def test_diffusers_opens_ours_and_is_equal_but_for_its_timesteps(tiny, tmp_path):
    """diffusers 0.42 hard-codes downscale_freq_shift=1, the official code has 0.

    Set to 0 outputs are equal, else not.

    If only the last line fails, diffusers was mended: say so in the README.
    """
    theirs = diffusers_model(to_folder(tiny, tmp_path / "a"))
    assert theirs.config.norm_eps == 1e-6
    x, t, y = inputs(tiny)
    want, stock = tiny(x, t, y), theirs(x, timestep=t, class_labels=y).sample
    for module in theirs.modules():
        if hasattr(module, "time_proj"):
            module.time_proj.downscale_freq_shift = 0
    assert (theirs(x, timestep=t, class_labels=y).sample - want).abs().max() < 1e-5
    difference = (stock - want).abs().amax((1, 2, 3))
    assert difference[0] < 1e-5 and difference[1:].max() > 0.05  # t = 0 knows no frequency


def test_what_diffusers_wrote_loads(tiny, tmp_path):
    """In one file, in shards, and pickled as .bin; in a pipeline's folder or alone."""
    theirs = diffusers_model(to_folder(tiny, tmp_path / "a"))
    theirs.save_pretrained(tmp_path / "one" / "transformer")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="500KB")
    theirs.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert len(list((tmp_path / "shards").glob("*-of-*"))) > 1
    for name in ("one", "shards", "bin"):
        assert equal(load_checkpoint(tmp_path / name), tiny), name
    with torch.no_grad():
        theirs.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias[0] += 1
    theirs.save_pretrained(tmp_path / "trained")
    with pytest.raises(InputError, match="t_embedder.mlp.0.bias differs between blocks"):
        load_checkpoint(tmp_path / "trained")
    config = json.loads((tmp_path / "bin" / "config.json").read_text())
    config = json.dumps(config | dict(norm_type="ada_norm_single"))
    (tmp_path / "bin" / "config.json").write_text(config)
    with pytest.raises(InputError, match="ada_norm_single"):
        load_checkpoint(tmp_path / "bin")
    next((tmp_path / "shards").glob("*-00002-of-*")).unlink()
    with pytest.raises(InputError, match="missing"):
        load_checkpoint(tmp_path / "shards")


def test_official_training_checkpoint_gives_its_ema(tiny, tmp_path):
    path = official(tmp_path / "0400000.pt", tiny, model="DiT-Ti/2", image_size=64, num_classes=10,
                    vae="mse", lr=1e-4)
    model = load_checkpoint(path)
    assert equal(model, tiny) and model.config == tiny.config
    assert model.metadata == dict(image_size=64, vae="mse")
    bare = DiT(**TINY, class_dropout_prob=0.0)
    path = official(path, bare, num_classes=10)  # as many rows as classes
    assert load_checkpoint(path).config == bare.config
    torch.save(tiny.state_dict(), path)
    assert load_checkpoint(path).config == tiny.config


def test_xl_takes_an_official_checkpoint_strictly():
    case = next(case for case in CASES["shapes"] if case["config"] == "DiT-XL/2")
    shapes = dict(case["shapes"])
    for key in [key for key in shapes if key.startswith("blocks.0.")]:
        shapes |= {key.replace(".0.", f".{i}.", 1): shapes[key] for i in range(28)}
    with torch.device("meta"):
        model = build_dit("DiT-XL/2")
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
    dit.load_weights(model, state, "xl.pt")
    assert len(state) == case["keys"]
    del state["blocks.27.mlp.fc2.bias"]
    with pytest.raises(InputError, match="1 keys differ: blocks.27.mlp.fc2.bias is missing"):
        dit.load_weights(model, state, "xl.pt")


@pytest.mark.parametrize(("change", "key", "flags"), [
    (dict(input_size=16), "pos_embed is (1, 64, 96), expected (1, 16, 96)", "check --image-size"),
    (dict(num_classes=4), "y_embedder.embedding_table.weight is (5, 96)", "check --num-classes"),
    (dict(class_dropout_prob=0.0, num_classes=12), "embedding_table", "check --num-classes"),
    (dict(depth=3), "blocks.2.attn.qkv.weight is (288, 96), expected none", "check --model"),
    (dict(depth=1), "blocks.1.attn.qkv.weight is missing", "check --model"),
    (dict(hidden_size=48), "pos_embed is (1, 16, 48)", "check --model"),
    (dict(patch_size=4), "pos_embed is (1, 4, 96)", "check --model"),
    (dict(in_channels=4), "x_embedder.proj.weight is (96, 4, 2, 2)", "check --vae"),
    (dict(input_size=16, num_classes=4), "pos_embed", "check --image-size and --num-classes"),
])
def test_weights_that_do_not_fit_name_keys_and_flag(change, key, flags):
    other = DiT(**TINY | change)
    with pytest.raises(InputError) as error:
        dit.load_weights(DiT(**TINY), other.state_dict(), "other.pt")
    said = str(error.value)
    assert key in said and said.endswith(flags) and "other.pt" in said


def test_a_checkpoint_of_other_settings_names_the_flag(tiny):
    dit.check_config(tiny, "run", input_size=8, num_classes=None)
    for name, expected, flag in [(None, dict(input_size=64), "--image-size"),
                                 ("DiT-XL/2", {}, "--model"),
                                 (None, dict(num_classes=9), "--num-classes")]:
        with pytest.raises(InputError, match=f"^run has .* check {flag}$"):
            dit.check_config(tiny, "run", name, **expected)


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused(legacy, tiny, tmp_path):
    made = tmp_path / "made"
    content = dict(ema=tiny.state_dict(), args=Hostile(made))
    (tmp_path / "diffusers").mkdir()
    (tmp_path / "diffusers" / "config.json").write_text(json.dumps(dict(
        sample_size=8, patch_size=2, in_channels=3, out_channels=6, num_layers=2,
        num_attention_heads=3,
        attention_head_dim=32, num_embeds_ada_norm=10)))
    for path in (tmp_path / "a.pt", tmp_path / "diffusers" / "diffusion_pytorch_model.bin"):
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        words = "refused: its pickle asks for .*system, which could run code"
        with pytest.raises(InputError, match=words):
            load_checkpoint(path if path.suffix == ".pt" else path.parent)
    assert not made.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the file is as hostile as it claims
    assert made.exists()


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    path = tmp_path / "a.pt"
    path.write_bytes(pickle.dumps(Hostile(tmp_path / "made"), protocol=2))
    assert "a.pt" in refused(capsys, dit, "convert", path, tmp_path / "b.safetensors")
    assert os.listdir(tmp_path) == ["a.pt"]


def test_import_costs_no_more_than_torch():
    code = "import sys, dit; print({'diffusers', 'torch._dynamo'} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


def test_damaged_files_are_told(tiny, tmp_path):
    ours, pt = tmp_path / "a.safetensors", tmp_path / "a.pt"
    save_checkpoint(ours, tiny, step=1)
    whole = ours.read_bytes()
    torch.save(tiny.state_dict(), pt)
    for path in (ours, pt):
        damage(path, "middle")
        with pytest.raises(InputError, match="damaged"):
            load_checkpoint(path)
    heads = whole.index(b"num_heads\\\": 3") + len(b"num_heads\\\": ")
    other_heads = whole[:heads] + b"2" + whole[heads + 1 :]
    for content in (whole[:-1000], whole[:50], b"", b"text", other_heads):
        ours.write_bytes(content)
        pt.write_bytes(content)
        for path in (ours, pt):
            with pytest.raises(InputError, match="damaged"):
                load_checkpoint(path)


@pytest.mark.parametrize("config", [
    "", "{}{", "[]", '{"width": 96}', '{"patch_size": 0}', '{"num_heads": "3"}'])
def test_a_header_without_a_fingerprint_may_hold_anything(config, tiny, tmp_path):
    header = dict(config=config, metadata="{}")
    save_file(tiny.state_dict(), tmp_path / "a.safetensors", metadata=header)
    with pytest.raises(InputError, match="damaged|divide"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_files_of_other_kinds_are_told(tmp_path):
    save_file(dict(a=torch.zeros(3)), tmp_path / "a.safetensors")
    torch.save(dict(a=torch.zeros(3)), tmp_path / "a.pt")
    torch.save([torch.zeros(3)], tmp_path / "b.pt")
    torch.save(DiT(**TINY | dict(hidden_size=60)).state_dict(), tmp_path / "c.pt")
    for name, words in [("a.safetensors", "has no config"),
                        ("a.pt", "x_embedder.proj.weight is missing"),
                        ("b.pt", "holds a list"), ("c.pt", "width 60"), (".", "no checkpoint"),
                        ("none.pt", "no checkpoint"), ("DiT-XL/2-128", "DiT-XL/2-256")]:
        with pytest.raises(InputError, match=words):
            load_checkpoint(tmp_path / name)


def test_a_run_gives_its_newest_whole_checkpoint(tiny, tmp_path, capsys):
    for step in (900, 1000, 20000):  # in numbers, not in letters
        save_checkpoint(tmp_path / "checkpoints" / str(step) / "ema.safetensors", tiny, step=step)
    (tmp_path / "checkpoints" / ".30000.tmp").mkdir()
    shutil.copytree(tmp_path / "checkpoints" / "900", tmp_path / "checkpoints" / "30000-copy")
    (tmp_path / "checkpoints" / "40000").symlink_to("900")  # of another step
    (tmp_path / "config.json").write_text("{}")
    assert load_checkpoint(tmp_path).metadata == dict(step=20000)
    assert load_checkpoint(tmp_path / "checkpoints" / "900").metadata == dict(step=900)
    assert capsys.readouterr().err == ""
    damage(tmp_path / "checkpoints" / "20000" / "ema.safetensors", "middle")
    assert load_checkpoint(tmp_path).metadata == dict(step=1000)
    said = capsys.readouterr().err
    assert "20000" in said and "damaged" in said and "before" in said
    assert len(said.splitlines()) == 1
    for step in (900, 1000):
        (tmp_path / "checkpoints" / str(step) / "ema.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="900"):
        load_checkpoint(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub's client, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub" / "models--facebook--DiT-XL-2-256"


def test_a_name_offline_is_one_clear_line(hub):
    with pytest.raises(InputError, match="cannot download DiT-XL/2-256 from huggingface.co"):
        load_checkpoint("DiT-XL/2-256")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_downloaded_name_is_verified(kind, hub, tiny, tmp_path, capsys):
    import hashlib

    made = to_folder(tiny, tmp_path / "a")
    snapshot, blobs = hub / "snapshots" / "abc" / "transformer", hub / "blobs"
    for folder in (snapshot, blobs, hub / "refs"):
        folder.mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_bytes((made / "config.json").read_bytes())
    weights = made / f"{STEM}.safetensors"
    if kind == "bin":
        torch.save(load_file(weights), made / f"{STEM}.bin")
        weights = made / f"{STEM}.bin"
    blob = blobs / hashlib.sha256(weights.read_bytes()).hexdigest()
    blob.write_bytes(weights.read_bytes())
    (snapshot / weights.name).symlink_to(blob)
    assert equal(load_checkpoint("DiT-XL/2-256"), tiny)
    assert "CC BY-NC" in capsys.readouterr().err
    damage(blob, "middle")
    with pytest.raises(InputError, match="is damaged: delete"):
        load_checkpoint("DiT-XL/2-256")


def test_a_full_disk_is_told_and_leaves_the_old_file(tiny, tmp_path):
    """RLIMIT_FSIZE stands for a full disk: writes fail half-way, of safetensors, torch, Python."""
    state = tiny.state_dict()
    writers = [lambda path: save_checkpoint(path, tiny),
               lambda path: dit.write_atomically(path, lambda new: torch.save(state, new)),
               lambda path: dit.write_atomically(path, lambda new: new.write_bytes(bytes(10**6)))]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in writers:
        (tmp_path / "a.safetensors").write_text("old")
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with pytest.raises(InputError, match="cannot write .*a.safetensors: .*(large|full)"):
                write(tmp_path / "a.safetensors")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert (tmp_path / "a.safetensors").read_text() == "old"
        assert os.listdir(tmp_path) == ["a.safetensors"]
    with pytest.raises(InputError, match="cannot write"):
        save_checkpoint(tmp_path / "a.safetensors" / "b.safetensors", tiny)  # in a file


def test_bugs_keep_their_traceback(tmp_path):
    def bug(_):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        dit.write_atomically(tmp_path / "a", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        dit.run_command(bug)


@pytest.mark.parametrize(("error", "status", "said"), [
    (InputError("two\nlines"), 2, "error: two lines\n"), (KeyboardInterrupt(), 130, "")])
def test_run_command_ends_without_traceback(error, status, said, capsys):
    def main(_):
        raise error

    with pytest.raises(SystemExit) as exit:
        dit.run_command(main)
    assert exit.value.code == status and capsys.readouterr().err == said


# ------------------------------------------------------------------------------ what people bring


def renamed(network, rename):
    return {rename(name): tensor for name, tensor in network.state_dict().items()}


def first_block(wrapper):
    return lambda name: name.replace("blocks.0.", f"blocks.0.{wrapper}.")


@pytest.mark.parametrize("pack", [
    lambda own, other: renamed(own, "module.{}".format),
    lambda own, other: renamed(own, "_orig_mod.{}".format),
    lambda own, other: renamed(own, "module._orig_mod.{}".format),
    lambda own, other: renamed(own, first_block("_orig_mod")),
    lambda own, other: renamed(own, first_block("_checkpoint_wrapped_module")),
    lambda own, other: dict(state_dict=own.state_dict()),
    lambda own, other: dict(state_dict=renamed(own, "net.{}".format), epoch=3),
    lambda own, other: dict(model=own.state_dict(), ema={}, step=torch.tensor(3)),
    lambda own, other: dict(model=own.state_dict(), ema=None),
    lambda own, other: dict(model=other.state_dict(), ema=renamed(own, "module.{}".format)),
    lambda own, other: dict(model=other.state_dict(), model_ema=dict(module=own.state_dict())),
    lambda own, other: dict(n_averaged=torch.tensor(5), **renamed(own, "net.{}".format)),
], ids=str)
def test_weights_are_found_under_any_name(pack, tiny, tmp_path):
    """In a .pt; what is flat also in a .safetensors without a config."""
    content = pack(tiny, fill(DiT(**TINY), 8))
    torch.save(content, tmp_path / "a.pt")
    assert equal(load_checkpoint(tmp_path / "a.pt"), tiny)
    if all(map(torch.is_tensor, content.values())):
        save_file(content, tmp_path / "a.safetensors")
        model = load_checkpoint(tmp_path / "a.safetensors")
        assert equal(model, tiny) and model.config == tiny.config


def test_which_weights_were_taken_is_said_or_asked(tiny, tmp_path, capsys):
    for content, said in [(dict(ema=tiny.state_dict(), model=tiny.state_dict()), ""),
                          (dict(ema={}, model=tiny.state_dict()), "'model' are taken, it has no")]:
        torch.save(content, tmp_path / "a.pt")
        load_checkpoint(tmp_path / "a.pt")
        assert said in (err := capsys.readouterr().err) and bool(err) == bool(said)
    torch.save(dict(good=tiny.state_dict(), best=tiny.state_dict()), tmp_path / "a.pt")
    with pytest.raises(InputError, match="several networks, good., best.: keep one"):
        load_checkpoint(tmp_path / "a.pt")
    endless = {}
    endless["again"] = endless
    torch.save(endless, tmp_path / "a.pt")
    with pytest.raises(InputError, match="x_embedder.proj.weight is missing"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_runs_own_weights_have_the_config_beside_them(tmp_path):
    model = fill(DiT(**TINY | dict(num_heads=4), class_dropout_prob=0.0), 7)  # no shape says these
    folder = tmp_path / "checkpoints" / "0000002"
    save_checkpoint(folder / "ema.safetensors", fill(DiT(**model.config), 8), step=2, vae="none")
    save_file(model.state_dict(), folder / "model.safetensors")
    raw = load_checkpoint(folder / "model.safetensors")
    assert equal(raw, model) and raw.config == model.config
    assert raw.metadata == dict(step=2, vae="none")
    dit.save_weights(tmp_path / "b.safetensors", model.state_dict(), model.config, dict(step=3))
    alone = load_checkpoint(tmp_path / "b.safetensors")
    assert equal(alone, model) and alone.config == model.config and alone.metadata == dict(step=3)


def test_a_copy_beside_a_runs_checkpoints_is_not_the_runs(tiny, tmp_path):
    for step, name in enumerate(("0000002", "0000003-keep", "4-best", "\u00b2", "0x9")):
        save_checkpoint(tmp_path / "checkpoints" / name / "ema.safetensors", tiny, step=step)
    assert load_checkpoint(tmp_path).metadata == dict(step=0)


@pytest.mark.parametrize("names", [
    [f"{STEM}.fp16.safetensors"], [f"{STEM}.non_ema.safetensors"], ["model.safetensors"],
    [f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors"],
    [f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}.fp16-00002-of-00002.safetensors"],
    [f"{STEM}-00001-of-00002.fp16.safetensors", f"{STEM}-00002-of-00002.fp16.safetensors"],
    [f"{STEM}.bin"], [f"{STEM}.fp16.bin"], ["pytorch_model.bin"],
    [f"{STEM}-00001-of-00002.bin", f"{STEM}-00002-of-00002.bin"],
], ids=lambda names: names[0])
def test_diffusers_files_of_every_name(names, tiny, tmp_path):
    """Any one set of weights loads; where a second is there, float32 .safetensors is preferred."""
    folder = to_folder(tiny, tmp_path / "a")
    plain = folder / f"{STEM}.safetensors"
    tensors, whole = load_file(plain), plain.read_bytes()
    plain.unlink()
    for part, name in enumerate(names):
        share = dict(list(tensors.items())[part :: len(names)])
        (torch.save if name.endswith("bin") else save_file)(share, folder / name)
    (folder / f"{names[0]}.index.json").write_text("{}")
    (folder / f"._{STEM}.safetensors").write_text("a Mac's")
    torch.save({}, folder / "optimizer.bin")
    assert equal(load_checkpoint(tmp_path / "a"), tiny)
    if len(names) == 1 and not names[0].endswith("bin"):
        assert equal(load_checkpoint(folder / names[0]), tiny)

    # Beside the plain file others are ignored, but for shards of the same weights.
    plain.write_bytes(whole)
    if "of-00002.safetensors" in names[0] and "fp16" not in names[0]:
        with pytest.raises(InputError, match="in two files"):
            load_checkpoint(folder)
    else:
        for name in names:
            (folder / name).write_bytes(b"")
        assert equal(load_checkpoint(folder), tiny)


def test_a_pipelines_own_vae_is_remembered(tiny, tmp_path):
    to_folder(tiny, tmp_path / "a")
    assert load_checkpoint(tmp_path / "a").metadata == {}
    (tmp_path / "a" / "vae").mkdir()
    (tmp_path / "a" / "vae" / "config.json").write_text("{}")
    assert load_checkpoint(tmp_path / "a").metadata == dict(vae=str(tmp_path / "a" / "vae"))
    assert load_checkpoint(tmp_path / "a" / "transformer").metadata == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused(value, tiny, tmp_path, capsys):
    with torch.no_grad():
        tiny.blocks[1].mlp.fc1.bias[3] = value
    save_checkpoint(tmp_path / "a.safetensors", tiny)
    torch.save(tiny.state_dict(), tmp_path / "a.pt")
    torch.save(tiny.half().state_dict(), tmp_path / "half.pt")
    for name in ("a.safetensors", "a.pt", "half.pt"):
        words = f"{name} .*blocks.1.mlp.fc1.bias has values that are not finite"
        with pytest.raises(InputError, match=words):
            load_checkpoint(tmp_path / name)
    for step in (1, 2):
        model = fill(DiT(**TINY), 7) if step == 1 else tiny
        save_checkpoint(tmp_path / "checkpoints" / str(step) / "ema.safetensors", model, step=step)
    assert load_checkpoint(tmp_path).metadata == dict(step=1)
    assert "blocks.1.mlp.fc1.bias" in capsys.readouterr().err


# ----------------------------------------------------------------------- a whole pipeline, its card


def latent_run(folder, vae, **changes):
    """A run on the latents of a VAE: checkpoint, settings, metrics with intervals, two grids."""
    model = fill(DiT(**TINY | dict(in_channels=4, num_classes=1000) | changes), 7)
    metadata = dict(data="flowers", class_names=["rose", "süß"], vae=str(vae), step=20)
    save_checkpoint(folder / "checkpoints" / "0000020" / "ema.safetensors", model, **metadata)
    (folder / "samples").mkdir()
    for step in (10, 20):
        (folder / "samples" / f"{step:07}.png").write_bytes(b"grid %d" % step)
    settings = dict(data_path="my flowers", model="DiT-Ti/2", max_steps=20, epochs=None, lr=1e-4)
    dit.write_json(folder / "config.json", settings)
    lines = [dict(step=10, features="inception", fid=9.0), dict(step=20, loss=1.0),
             dict(step=20, features="inception", fid=8.25, fid_low=8.0, fid_high=8.5, samples=50)]
    lines = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(lines + '{"step": 21, "features": "inc')
    return folder


@torch.no_grad()
def test_a_folder_is_a_whole_pipeline_that_draws_our_pictures(tmp_path, monkeypatch):
    """By the code on its card, which sets the timestep's frequencies to the official ones."""
    from gaussian_diffusion import create_diffusion
    from sample_grid import load_vae

    monkeypatch.chdir(tmp_path)
    run = latent_run(tmp_path / "run", save_vae(tmp_path / "own-vae", scaling_factor=0.7))
    dit.convert(run, "flowers")
    card = Path("flowers", "README.md").read_text()
    namespace = {}
    exec(card.split("```python\n")[1].split("```")[0], namespace)
    assert Path("sample.png").is_file()
    pipe = namespace["pipe"]
    assert pipe.labels == {"rose": 0, "süß": 1}

    model = load_checkpoint("flowers")
    assert equal(model, load_checkpoint(run))
    vae = load_vae(model)
    assert vae.name == str(tmp_path / "flowers" / "vae")
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for steps, scale in [(20, 1.0), (50, 4.0)]:
        kwargs = dict(y=torch.tensor([1, 207]), cfg_scale=scale)
        latents = create_diffusion(f"ddim{steps}").ddim_sample_loop(
            model.forward_with_cfg, noise, model_kwargs=kwargs)
        ours = vae.decode(latents)
        theirs = pipe([1, 207], guidance_scale=scale, num_inference_steps=steps,
                      generator=torch.Generator().manual_seed(3), output_type="np").images
        ours = ours.permute(0, 2, 3, 1).float().numpy()
        assert ours.std() > 10
        assert np.abs(ours - 255 * theirs).max() < 1


def test_the_card_tells_of_the_run(tmp_path):
    run = latent_run(tmp_path / "run", save_vae(tmp_path / "own-vae", scaling_factor=0.7))
    command(dit, "convert", run, tmp_path / "flowers")
    card = (tmp_path / "flowers" / "README.md").read_text()
    assert card.startswith("---\nlicense: other") and card.count("FILL IN") == 3
    assert "trained on\nflowers for 20 steps. ![Samples](samples.png)" in card
    assert (tmp_path / "flowers" / "samples.png").read_bytes() == b"grid 20"
    assert "train_accelerate.py --data-path 'my flowers' --model DiT-Ti/2 --max-steps 20 --" in card
    assert "| fid | 8.25 | 8 to 8.5 |\n| samples | 50 |  |\n" in card and "9.0" not in card
    assert '"lr": 0.0001' in card and '"depth": 2' in card and "downscale_freq_shift" in card
    # Weights that are no run's have a card too.
    dit.convert(run / "checkpoints" / "0000020" / "ema.safetensors", tmp_path / "b")
    assert "20 steps" in (tmp_path / "b" / "README.md").read_text()
    assert not (tmp_path / "b" / "samples.png").exists()


@pytest.mark.parametrize(("metadata", "vae", "reason"), [
    (dict(vae="none"), {}, "this model draws pixels"),
    (dict(objective="flow"), {}, "its objective flow predicts image - noise"),
    ({}, dict(shift_factor=0.1), "shifts them too"),
    ({}, dict(latents_mean=[0.1] * 4, latents_std=[1.0] * 4), "shifts them too")], ids=str)
def test_what_no_pipeline_draws_is_a_transformer_and_one_line(metadata, vae, reason, tmp_path,
                                                             capsys):
    """Its metadata travel all the same, unknown to diffusers, which does not mind."""
    model = fill(DiT(**TINY | dict(in_channels=4)), 7)
    metadata = dict(vae=str(save_vae(tmp_path / "vae", **vae)), class_names=["a"]) | metadata
    save_checkpoint(tmp_path / "a.safetensors", model, **metadata)
    command(dit, "convert", tmp_path / "a.safetensors", tmp_path / "a")
    said = capsys.readouterr().out.splitlines()
    assert len([line for line in said if reason in line]) == 1
    assert sorted(os.listdir(tmp_path / "a")) == ["README.md", "transformer"]
    assert reason in (tmp_path / "a" / "README.md").read_text()
    again = load_checkpoint(tmp_path / "a")
    assert equal(again, model) and again.metadata == metadata
    diffusers_model(tmp_path / "a" / "transformer")
    assert "_metadata" not in capsys.readouterr().err


def test_a_vae_of_the_hub_is_copied_from_its_cache_or_named(tmp_path, hub, capsys):
    run = latent_run(tmp_path / "run", "mse")
    dit.convert(run, tmp_path / "a")
    said = capsys.readouterr().err
    assert "stabilityai/sd-vae-ft-mse is not on this machine" in said
    assert len(said.splitlines()) == 1 and not (tmp_path / "a" / "vae").exists()
    given = "vae=AutoencoderKL.from_pretrained('stabilityai/sd-vae-ft-mse')"
    assert given in said and given in (tmp_path / "a" / "README.md").read_text()

    cached = hub.parent / "models--stabilityai--sd-vae-ft-mse"
    save_vae(cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    dit.convert(run, tmp_path / "b")
    assert capsys.readouterr().err == ""
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        copied = tmp_path / "b" / "vae" / name
        assert copied.read_bytes() == (cached / "snapshots" / "abc" / name).read_bytes()


@pytest.mark.parametrize(("case", "said"), [
    ("works", ""), ("no login", "not logged in, run `hf auth login`"),
    ("no network", "is there a network"), ("refused", "403: not yours")])
def test_push_uploads_the_folder(case, said, tiny, tmp_path, monkeypatch, capsys):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    calls = []
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "diary.txt").touch()  # what else lies there is nobody's business

    class HfApi:
        def create_repo(self, repository, **options):
            if case == "refused":
                raise RuntimeError("403: not yours")
            calls.append((repository, options))
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            files = [str(file.relative_to(folder_path)) for file in Path(folder_path).rglob("*.*")]
            uploaded = filter_repo_objects(sorted(files), allow_patterns=allow_patterns)
            calls.append((repo_id, list(uploaded)))

    monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
    token = None if case == "no login" else "hf_x"
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    monkeypatch.setattr(dit, "reach_hub", lambda: case != "no network")
    save_checkpoint(tmp_path / "a.safetensors", tiny)
    push = tmp_path / "a.safetensors", tmp_path / "a", "--push", "me/flowers"
    if case == "works":
        command(dit, "convert", *push)
        assert calls == [("me/flowers", dict(private=True, exist_ok=True)),
                         ("me/flowers", ["README.md", "transformer/config.json",
                                         f"transformer/{STEM}.safetensors"])]
        assert "uploaded to https://huggingface.co/me/flowers" in capsys.readouterr().out
    else:
        error = refused(capsys, dit, "convert", *push)
        assert said in error and f"hf upload me/flowers {tmp_path / 'a'}" in error and not calls
        assert equal(load_checkpoint(tmp_path / "a"), tiny)
    for name in ("b.pt", "b.safetensors"):
        refused(capsys, dit, "convert", tmp_path / "a.safetensors", tmp_path / name, *push[2:])
        assert not (tmp_path / name).exists()


def test_the_objective_is_said_where_a_file_cannot(tiny, tmp_path, capsys):
    """As with SiT's own weights: DiT's names and shapes, a bare state dict."""
    torch.save(tiny.state_dict(), tmp_path / "sit.pt")
    command(dit, "convert", tmp_path / "sit.pt", tmp_path / "a.safetensors", "--objective", "sit")
    model = load_checkpoint(tmp_path / "a.safetensors")
    assert equal(model, tiny) and model.learn_sigma and model.metadata == dict(objective="sit")
    dit.convert(tmp_path / "a.safetensors", tmp_path / "a")
    dit.convert(tmp_path / "a", tmp_path / "b.safetensors", "sit")
    assert load_checkpoint(tmp_path / "b.safetensors").metadata == dict(objective="sit")
    other = [tmp_path / "a", tmp_path / "c.safetensors", "--objective", "ddpm"]
    assert "a was trained with --objective sit, not ddpm" in refused(capsys, dit, "convert", *other)
    dit.convert(tmp_path / "a", tmp_path / "c.pt")
    assert "c.pt does not say that its objective is sit" in capsys.readouterr().err


# ---------------------------------------------------------------------------------- house rules


def test_what_is_not_a_file_is_written_through(tiny, tmp_path):
    """A FIFO, a device and links to them stay what they are; a link's file is written."""
    fifo, link, missing = tmp_path / "fifo", tmp_path / "link", tmp_path / "missing"
    os.mkfifo(fifo)
    link.symlink_to(fifo)
    missing.symlink_to(tmp_path / "new" / "file")
    for path in (fifo, link):
        reader = subprocess.Popen(["cat", str(fifo)], stdout=subprocess.PIPE)
        dit.write_atomically(path, lambda new: new.write_text("hello"))
        assert reader.communicate()[0] == b"hello" and fifo.is_fifo() and link.is_symlink()
    dit.write_atomically(missing, lambda new: new.write_text("hello"))
    assert missing.is_symlink() and (tmp_path / "new" / "file").read_text() == "hello"
    null = tmp_path / "null"
    null.symlink_to(os.devnull)
    dit.write_atomically(null, lambda new: new.write_text("hello"))
    assert Path(os.devnull).is_char_device() and null.is_symlink()
    with pytest.raises(InputError, match="cannot write"):
        dit.write_atomically(tmp_path, lambda new: new.write_text("hello"))
    assert sorted(os.listdir(tmp_path)) == ["fifo", "link", "missing", "new", "null"]


@pytest.mark.parametrize("piped", [True, False])
def test_our_own_stdout_is_written_through(piped, tmp_path):
    code = ("import dit; print('a'); dit.write_json('/proc/self/fd/1', 1); print('b'); "
            "dit.write_json('/dev/stdout', 2); print('c')")
    buffered = os.environ | dict(PYTHONUNBUFFERED="")
    with open(tmp_path / "out", "wb") as file:
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=buffered, check=True,
                                stdout=subprocess.PIPE if piped else file)
    text = result.stdout if piped else (tmp_path / "out").read_bytes()
    assert text == b"a\n1\nb\n2\nc\n"


@pytest.mark.parametrize(("reason", "windows"), [
    ("EINVAL", False), ("ENOTSUP", False), ("ENOSYS", False), ("EPERM", False), ("EACCES", True)])
def test_file_systems_that_refuse_go_on_with_one_warning(reason, windows, tmp_path, monkeypatch,
                                                        capsys):
    """fsync of a folder and chmod; a full disk or a broken one is another matter.

    Windows refuses to open a folder.
    """
    dit.warn_once.cache_clear()
    fsync, os_open, number = os.fsync, os.open, getattr(errno, reason)

    def refuse(number):
        raise OSError(number, os.strerror(number))

    def sync(descriptor):
        return refuse(number) if stat.S_ISDIR(os.fstat(descriptor).st_mode) else fsync(descriptor)

    def open_file(path, *args, **kwargs):
        refused = windows and os.path.isdir(path)
        return refuse(number) if refused else os_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "chmod", lambda *args: refuse(number))
    for _ in range(2):
        dit.write_json(tmp_path / "a.json", 1)
    said = capsys.readouterr().err
    assert "cannot sync folders" in said and len(said.splitlines()) == 1
    number = errno.EIO
    with pytest.raises(InputError, match="cannot write"):
        dit.write_json(tmp_path / "b.json", 1)
    assert (tmp_path / "a.json").read_text() == "1\n"


@pytest.mark.parametrize(("environment", "shown"), [
    ({}, True), (dict(RANK="1"), True), (dict(RANK="1", WORLD_SIZE="1"), True),
    (dict(RANK="x"), True), (dict(RANK="1", WORLD_SIZE="2"), False),
    (dict(RANK="0", WORLD_SIZE="2"), True)])
def test_only_a_rank_among_several_is_silent(environment, shown, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    dit.log_stderr("hello")
    assert capsys.readouterr().err == ("hello\n" if shown else "")
    dit.log_stderr("hello", everywhere=True)
    assert capsys.readouterr().err == "hello\n"


@pytest.mark.parametrize("code", [
    "print('short')",  # only the interpreter's last flush meets the cut pipe
    "[print('x' * 1000, flush=True) for _ in range(1000)]"])
def test_output_that_is_cut_ends_quietly(code):
    code = f"import dit\ndef main(_):\n    input()\n    {code}\ndit.run_command(main)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | dict(PYTHONUNBUFFERED=""),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    process.stdin.write(b"now\n")
    process.stdin.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_a_broken_pipe_to_something_else_is_a_bug():
    def main(_):
        raise BrokenPipeError("a worker")

    with pytest.raises(BrokenPipeError, match="a worker"):
        dit.run_command(main)


@pytest.mark.parametrize("kind", ["silent", "refused", "down", "up"])
def test_a_hub_that_does_not_answer_is_known_in_time(kind, monkeypatch):
    """And from then on its client is offline; one that answers is used."""
    import huggingface_hub

    class Session:
        def head(self, url, timeout):
            if kind == "silent":
                time.sleep(5)
            if kind == "refused":
                raise OSError("refused")
            return SimpleNamespace(status_code=503 if kind == "down" else 200)

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    began = time.monotonic()
    assert dit.reach_hub.__wrapped__(seconds=0.2) == (kind == "up")
    assert time.monotonic() - began < 2
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    assert offline == (kind != "up")
    assert os.environ["HF_HUB_OFFLINE"] == ("" if kind == "up" else "1")
