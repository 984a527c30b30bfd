"""Diffusion Transformers (DiT): the network, and its weights in and out.

The paper is "Scalable Diffusion Models with Transformers", Peebles & Xie, 2022, arXiv:2212.09748. Read its section 3.2
first; nothing else of this project is needed to understand this file. What happens in one forward pass:

    tokens = patchify(x) + positions                        a p x p patch of the latent is one token
    c      = MLP(sinusoids(t)) + table[y]                   the conditioning vector: timestep and class
    for every block, with (shift, scale, gate) x 2 = Linear(SiLU(c)):                    adaLN-Zero, figure 3
        tokens = tokens + gate_1 * Attention((1 + scale_1) * LayerNorm(tokens) + shift_1)
        tokens = tokens + gate_2 * MLP      ((1 + scale_2) * LayerNorm(tokens) + shift_2)
    output = unpatchify(Linear((1 + scale) * LayerNorm(tokens) + shift))        noise (and variance) per pixel

Parameter names and shapes are those of the official code, so official weights load as they are.

    python dit.py                    the paper's twelve configurations: parameters, and Gflops beside the paper's
    python dit.py convert SRC DST    weights from any layout that load_checkpoint reads to any that it writes
"""

import argparse
import hashlib
import json
import math
import os
import re
import sys
import zipfile
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

DIT_CONFIGS = {  # table 1 of the paper, patch sizes 2, 4, 8
    f"DiT-{size}/{patch}": dict(depth=depth, hidden_size=width, patch_size=patch, num_heads=heads)
    for size, depth, width, heads in [("XL", 28, 1152, 16), ("L", 24, 1024, 16), ("B", 12, 768, 12), ("S", 12, 384, 6)]
    for patch in (2, 4, 8)
}
DEMO_CONFIGS = {"DiT-Ti/2": dict(depth=4, hidden_size=96, patch_size=2, num_heads=3)}  # ours, for the digits demo
PAPER_GFLOPS = {  # table 4 of the paper at 256 px, and section 5.1 at 512 px: multiply-adds, counted once
    ("DiT-XL/2", 32): 118.64, ("DiT-XL/4", 32): 29.05, ("DiT-XL/8", 32): 7.39, ("DiT-L/2", 32): 80.71,
    ("DiT-L/4", 32): 19.70, ("DiT-L/8", 32): 5.01, ("DiT-B/2", 32): 23.01, ("DiT-B/4", 32): 5.56, ("DiT-B/8", 32): 1.42,
    ("DiT-S/2", 32): 6.06, ("DiT-S/4", 32): 1.41, ("DiT-S/8", 32): 0.36, ("DiT-XL/2", 64): 524.60,
}


# ------------------------------------------------------------------------------------------------ the network


def modulate(x, shift, scale):
    """(1 + scale) * x + shift, the same for all tokens: x (N, T, D), shift and scale (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    """Cut x (N, C, H, W) into p x p patches and project each to a token: (N, T, D), T = H/p * W/p, row by row.

    Figure 4 of the paper.
    """

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, D, H/p, W/p) -> (N, T, D)


class TimestepEmbedder(nn.Module):
    """t (N,) -> (N, D): sinusoids of 128 frequencies from 1 down to 1/10000, then a two-layer MLP.

    The sinusoids are those of Vaswani et al., 2017, section 3.5, cosines first.
    """

    def __init__(self, hidden_size, frequency_size=256):
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        half = self.frequency_size // 2
        steps = torch.arange(half, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000) / half * steps)  # always float32: t reaches 999
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y (N,) -> (N, D). With label dropout (Ho & Salimans, 2022, algorithm 1) the last row is the null label."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        rows = torch.empty(num_classes + (dropout_prob > 0), hidden_size)  # DiT.initialize_weights fills them
        self.embedding_table = nn.Embedding.from_pretrained(rows, freeze=False)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y, drop=None):
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        N, T, D = x.shape
        qkv = self.qkv(x).view(N, T, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, heads, T, D/heads)
        if q.is_cpu and q.dtype == torch.bfloat16:  # the fused kernel is 1.4 to 7 times slower there
            x = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear, on every token."""

    def __init__(self, hidden_size, mlp_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero conditioning (section 3.2); zero gates: it starts as the identity."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)  # each (N, D)
        x = x + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift2, scale2))
        return x  # (N, T, D)


class FinalLayer(nn.Module):
    """adaLN, then a projection of each token to the p * p * out_channels values of its patch."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p*p*out_channels)


class DiT(nn.Module):
    """The Diffusion Transformer (Peebles & Xie, 2022, figure 3).

    Args: input_size, height and width of x in pixels of the latent (32 for 256 px images); patch_size p; in_channels C;
    hidden_size D; depth, number of blocks; num_heads; mlp_ratio; class_dropout_prob, how often training hides the label
    (0: no null label, so no guidance); num_classes; learn_sigma, whether C more channels predict the variance.
    Raises InputError when the sizes do not fit together.
    """

    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, class_dropout_prob=0.1, num_classes=1000, learn_sigma=True):
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise InputError(f"input size {input_size} must divide by patch size {patch_size}, and hidden size "
                             f"{hidden_size} by 4 and by {num_heads} heads")
        super().__init__()
        self.config = dict(input_size=input_size, patch_size=patch_size, in_channels=in_channels,
                           hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
                           class_dropout_prob=class_dropout_prob, num_classes=num_classes, learn_sigma=learn_sigma)
        self.metadata = {}  # what save_checkpoint stored beside the weights
        self.input_size = input_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.num_classes = num_classes
        self.class_dropout_prob = class_dropout_prob
        self.learn_sigma = learn_sigma
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        positions = sincos_positions(hidden_size, input_size // patch_size).to(self.x_embedder.proj.weight.device)
        self.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)  # (1, T, D), fixed
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for matrices, normal(0.02) for the embeddings, zero for biases, gates (adaLN-Zero) and the output."""
        if self.pos_embed.is_meta:  # shapes without memory: weights come later
            return
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for layer in self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]:
            nn.init.normal_(layer.weight, std=0.02)
        zero_layers = [block.adaLN_modulation[-1] for block in self.blocks]
        for layer in [*zero_layers, self.final_layer.adaLN_modulation[-1], self.final_layer.linear]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def unpatchify(self, x):
        """Tokens (N, T, p*p*C) -> pixels (N, C, H, W), the inverse of PatchEmbed's order."""
        p, side = self.patch_size, self.input_size // self.patch_size
        x = x.view(x.shape[0], side, side, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.out_channels, side * p, side * p)

    def forward(self, x, t, y, drop=None):
        """Predict the noise in x, and with learn_sigma the variance's interpolation (IDDPM, equation 15).

        x (N, C, H, W) float; t (N,) original timesteps, fractional ones allowed; y (N,) int64, num_classes is the
        null label; drop (N,) bool: whose labels to hide (None: at random in training). Returns (N, C, H, W), or
        (N, 2C, H, W) with learn_sigma. Raises InputError if x is not input_size x input_size with C channels.
        """
        if x.shape[1:] != (self.in_channels, self.input_size, self.input_size):
            raise InputError(f"this DiT takes (N, {self.in_channels}, {self.input_size}, {self.input_size}), but x is "
                             f"{tuple(x.shape)}: images must be square and of the model's --image-size")
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y, drop)  # (N, D)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p*p*out_channels)
        return self.unpatchify(x)  # (N, out_channels, H, W)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=None):
        """Classifier-free guidance (Ho & Salimans, 2022, equation 6): eps = eps_null + cfg_scale * (eps_y - eps_null).

        Shapes as in `forward`. cfg_scale 1 is no guidance, at the cost of one pass. cfg_channels: how many of the first
        channels are guided, None for all C; the official code guides 3. The other channels are the conditional ones.
        Raises InputError when the model has no null label.
        """
        if cfg_scale == 1:
            return self(x, t, y)
        if self.class_dropout_prob == 0:
            raise InputError("guidance needs a model trained with label dropout; this one has no null label: "
                             "use --cfg-scale 1")
        null = torch.full_like(y, self.num_classes)
        cond, uncond = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).float().chunk(2)
        n = self.in_channels if cfg_channels is None else cfg_channels
        guided = uncond[:, :n] + cfg_scale * (cond[:, :n] - uncond[:, :n])
        return torch.cat([guided, cond[:, n:]], dim=1)


def sincos_positions(hidden_size, side):
    """Fixed 2-D position embeddings (Vaswani et al., 2017, section 3.5, once per axis) of side x side tokens.

    Returns (side * side, hidden_size) float32: the first half tells the column, the second the row.
    """
    quarter = hidden_size // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * omega  # (side, D/4)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns = one_axis.repeat(side, 1)
    rows = one_axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def named_config(name):
    """The arguments of DiT for a name in DIT_CONFIGS or DEMO_CONFIGS; InputError if there is none."""
    configs = DIT_CONFIGS | DEMO_CONFIGS
    if name not in configs:
        raise InputError(f"unknown model {name!r}: choose one of {', '.join(configs)}")
    return configs[name]


def build_dit(name, **overrides):
    """The model of a name, freshly initialised; overrides are arguments of DiT. InputError if unknown."""
    return DiT(**(named_config(name) | overrides))


def count_macs(config):
    """Multiply-adds of one forward pass of one image, counted once: what the paper calls flops (table 4).

    config: a model's `config`. All linear layers, both attention products, adaLN, the timestep's MLP, patch and final
    layer, as PyTorch's flop counter, halved; no normalisation, activation or softmax.
    """
    width, patch, channels = config["hidden_size"], config["patch_size"], config["in_channels"]
    tokens = (config["input_size"] // patch) ** 2
    mlp = int(width * config["mlp_ratio"])
    block = 4 * width * width + 2 * width * mlp + 2 * tokens * width  # qkv and proj, fc1 and fc2, QK^T and AV
    ends = patch * patch * width * (channels + channels * (1 + config["learn_sigma"]))  # patch and final layer
    once = 256 * width + width * width + (6 * config["depth"] + 2) * width * width  # timestep MLP, adaLN of all layers
    return tokens * (config["depth"] * block + ends) + once


def print_configs():
    """The paper's configurations as a table: size, parameters, and Gflops beside the paper's."""
    print(f"{'':10}{'image':>7}{'tokens':>8}{'depth':>7}{'width':>7}{'heads':>7}{'parameters':>14}{'Gflops':>9}{'paper':>9}")
    for (name, input_size), paper in PAPER_GFLOPS.items():
        with torch.device("meta"):
            model = build_dit(name, input_size=input_size)
        c, parameters = model.config, sum(p.numel() for p in model.parameters())
        print(f"{name:10}{input_size * 8:>7}{model.pos_embed.shape[1]:>8}{c['depth']:>7}{c['hidden_size']:>7}"
              f"{c['num_heads']:>7}{parameters:>14,}{count_macs(c) / 1e9:>9.2f}{paper:>9.2f}")


# ------------------------------------------------------------------------------------------------ weights in and out

HUB = {"DiT-XL/2-256": "facebook/DiT-XL-2-256", "DiT-XL/2-512": "facebook/DiT-XL-2-512"}  # names that download
HEADS = {c["hidden_size"]: c["num_heads"] for c in (DIT_CONFIGS | DEMO_CONFIGS).values()}  # no tensor's shape says it
FLAGS = dict(input_size="--image-size", in_channels="--vae", num_classes="--num-classes",
             class_dropout_prob="--class-dropout-prob")  # which flag sets an entry of the config; every other: --model


def save_checkpoint(path, model, **metadata):
    """Write a model's weights, float32 as they are, to a .safetensors file that also carries its config and metadata.

    metadata: any JSON values (step, class_names, vae ...); load_checkpoint returns them as `model.metadata`.
    Raises InputError when the file cannot be written; what was there before is then untouched.
    """
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    header = dict(config=json.dumps(model.config), metadata=json.dumps(metadata))
    header["fingerprint"] = fingerprint(header, state_dict)
    write_atomically(path, lambda temporary: save_file(state_dict, temporary, metadata=header))


def load_checkpoint(path_or_name, device="cpu"):
    """A DiT in eval mode, float32, with its `config` and the `metadata` stored with it (may be empty), from any of

    - a run's folder: the EMA weights of its newest checkpoint; if that is damaged, of the one before, said on stderr
    - a .safetensors file of save_checkpoint
    - an official .pt: a bare state dict, or a training checkpoint, whose EMA weights are taken; no pickled code is run
    - a diffusers folder: a DiTPipeline's, or the transformer folder in it
    - a name in HUB, downloaded once and checked against the hub's SHA-256; those weights are under CC BY-NC 4.0

    Raises InputError when nothing is there, the file is damaged or would run code, or the weights do not fit.
    """
    path = Path(path_or_name)
    if str(path_or_name) in HUB and not path.exists():
        path = _download(str(path_or_name))
    steps = [folder for folder in path.glob("checkpoints/*") if folder.name.isdigit()]
    candidates = sorted(steps, key=lambda folder: int(folder.name), reverse=True) or [path]
    for candidate in candidates:
        try:
            config, state_dict, metadata = _read(candidate)
            break
        except InputError as error:
            if candidate is candidates[-1]:
                raise
            log_stderr(f"warning: {error}; taking the checkpoint before it")
    with torch.device("meta"):  # no memory, no initialisation: the tensors that were read become the weights
        model = DiT(**config)
    load_weights(model, state_dict, candidate)
    model.metadata = metadata
    return model.to(device, torch.float32).eval()


def load_weights(model, state_dict, source):
    """Load official-layout weights into a model strictly. source: what messages call them.

    Raises InputError naming the first keys that differ and the flag that is probably wrong.
    """
    want, got = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (model.state_dict(), state_dict))
    wrong = [name for name in want | got if want.get(name) != got.get(name)]
    if wrong:
        shown = ", ".join(f"{k} is {got.get(k, 'missing')}, expected {want.get(k, 'none')}" for k in wrong[:3])
        theirs = _official_config(state_dict, source)
        flags = sorted({FLAGS.get(key, "--model") for key in _differing(theirs, model.config)})
        hint = f"check {' and '.join(flags)}" if flags else "is it damaged, or of another network?"
        raise InputError(f"{source} does not fit the model, {len(wrong)} keys differ: {shown}; {hint}")
    model.load_state_dict(state_dict, assign=model.pos_embed.is_meta)


def check_config(model, source, name=None, **expected):
    """Raise InputError, naming the flag, when a loaded model is not the one that the command line describes.

    name: of a configuration, expected: entries such as input_size and num_classes; those that are None may be anything.
    """
    expected = {key: value for key, value in expected.items() if value is not None}
    for key, value in ((named_config(name) if name else {}) | expected).items():
        if model.config[key] != value:
            raise InputError(f"{source} has {key} {model.config[key]}, not {value}: check {FLAGS.get(key, '--model')}")


def _differing(config, other):
    """The keys of config that differ in other; of label dropout it matters only whether there is a null label."""
    return [key for key, value in config.items()
            if (bool(value) != bool(other[key]) if key == "class_dropout_prob" else value != other[key])]


def _read(path):
    """(config, official-layout state dict, metadata) of a file or folder, told apart by what is there."""
    if (path / "transformer").is_dir():
        path = path / "transformer"
    if any(path.glob("diffusion_pytorch_model*")):
        return _read_diffusers(path)
    if path.is_dir():
        path = path / "ema.safetensors"
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: give a run's folder, a .safetensors file, an official .pt, "
                         f"a diffusers folder, or {' or '.join(HUB)}")
    if path.suffix != ".safetensors":
        return _read_official(path)
    header, state_dict = _read_safetensors(path)
    if "config" not in header:
        raise InputError(f"{path} was not written by save_checkpoint: it has no config; of diffusers give the folder")
    stored = header.pop("fingerprint", None)  # files of the first release have another checksum: not compared
    if stored is not None and stored != fingerprint(header, state_dict):
        raise InputError(f"{path} is damaged: its fingerprint does not match its contents")
    return json.loads(header["config"]), state_dict, json.loads(header["metadata"])


def _read_safetensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}, is it damaged? {error}") from error


def _read_pickle(path):
    """The dict that torch.save wrote, of tensors, plain containers and argparse.Namespace; running code is refused."""
    try:
        if zipped := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:  # torch.load compares no checksums
                if name := file.testzip():
                    raise zipfile.BadZipFile(name)
                if any(name.endswith("/constants.pkl") for name in file.namelist()):
                    raise InputError(f"{path} is refused: it is TorchScript, which is code, not weights")
        with torch.serialization.safe_globals([argparse.Namespace]):  # mapped: optimizer states stay on the disk
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except Exception as error:  # a parser of arbitrary bytes may raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            raise InputError(f"{path} is refused: its pickle asks for {code[1]}, which could run code") from error
        raise InputError(f"cannot read {path} as torch.save's, is it damaged? {type(error).__name__}") from error
    if not isinstance(saved, dict):
        raise InputError(f"{path} holds a {type(saved).__name__}, not a dict of weights")
    return saved


def _read_official(path):
    """A bare state dict, or a training checkpoint with model, ema, opt and args."""
    saved = _read_pickle(path)
    args = vars(saved["args"]) if isinstance(saved.get("args"), argparse.Namespace) else {}
    state_dict = next((saved[part] for part in ("ema", "model") if isinstance(saved.get(part), dict)), saved)
    config = _official_config(state_dict, path, args.get("num_classes"))
    if config["hidden_size"] not in HEADS:
        raise InputError(f"{path} has width {config['hidden_size']}, and an official .pt does not say how many heads; "
                         f"known are widths {', '.join(map(str, HEADS))}")
    config["num_heads"] = HEADS[config["hidden_size"]]
    return config, state_dict, {key: args[key] for key in ("image_size", "vae") if key in args}


def _official_config(state_dict, source, num_classes=None):
    """A model's config, but for num_heads, from the shapes of its weights.

    Without num_classes the last row of the label table is taken for the null label, as in all official weights.
    """
    needed = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2,
              "blocks.0.mlp.fc1.weight": 2, "final_layer.linear.weight": 2}
    for name, dimensions in needed.items():
        if getattr(state_dict.get(name), "ndim", None) != dimensions:
            raise InputError(f"{source} does not hold a DiT's weights: {name} is missing or has another shape")
    patches, positions, labels, fc1, last = (state_dict[name].shape for name in needed)
    width, channels, patch, _ = patches
    has_null = labels[0] != num_classes
    return dict(input_size=math.isqrt(positions[1]) * patch, patch_size=patch, in_channels=channels, hidden_size=width,
                depth=len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")}),
                mlp_ratio=fc1[0] / width, class_dropout_prob=0.1 * has_null, num_classes=labels[0] - has_null,
                learn_sigma=last[0] == 2 * channels * patch * patch)


# diffusers' DiTTransformer2DModel: other names; q, k, v apart; the embedders repeated in every block; no positions. Its
# timestep embedding has other frequencies (downscale_freq_shift 1 for 0): with the same weights its output differs.

DIFFUSERS_CONFIG = dict(input_size="sample_size", patch_size="patch_size", in_channels="in_channels",
                        depth="num_layers", num_heads="num_attention_heads", num_classes="num_embeds_ada_norm")
DIFFUSERS_FIXED = dict(norm_type="ada_norm_zero", activation_fn="gelu-approximate", attention_bias=True,
                       norm_elementwise_affine=False)


def _diffusers_keys(depth):
    """Official key -> its diffusers keys: the three thirds of qkv, the copies of an embedder, else one."""
    names = {"x_embedder.proj": ["pos_embed.proj"], "t_embedder.mlp.0": [], "t_embedder.mlp.2": [],
             "y_embedder.embedding_table": [], "final_layer.adaLN_modulation.1": ["proj_out_1"],
             "final_layer.linear": ["proj_out_2"]}
    for i in range(depth):
        ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
        names["t_embedder.mlp.0"].append(theirs + "norm1.emb.timestep_embedder.linear_1")
        names["t_embedder.mlp.2"].append(theirs + "norm1.emb.timestep_embedder.linear_2")
        names["y_embedder.embedding_table"].append(theirs + "norm1.emb.class_embedder.embedding_table")
        names[ours + "adaLN_modulation.1"] = [theirs + "norm1.linear"]
        names[ours + "attn.qkv"] = [theirs + "attn1.to_q", theirs + "attn1.to_k", theirs + "attn1.to_v"]
        names[ours + "attn.proj"] = [theirs + "attn1.to_out.0"]
        names[ours + "mlp.fc1"] = [theirs + "ff.net.0.proj"]
        names[ours + "mlp.fc2"] = [theirs + "ff.net.2"]
    return {f"{layer}.{kind}": [f"{name}.{kind}" for name in names[layer]]
            for layer in names for kind in ("weight", "bias")}


def _to_diffusers(state_dict, depth):
    tensors = {}
    for key, names in _diffusers_keys(depth).items():
        if key in state_dict:  # all but the bias of the embedding table
            parts = state_dict[key].chunk(3) if ".qkv." in key else [state_dict[key]] * len(names)
            tensors |= {name: part.clone() for name, part in zip(names, parts, strict=True)}  # none may share memory
    return tensors


def _from_diffusers(tensors, config, source):
    """Official-layout weights; what has no place there keeps its name, so that load_weights names it."""
    side = config["input_size"] // config["patch_size"]
    state_dict = {"pos_embed": sincos_positions(config["hidden_size"], side)[None]}
    for key, names in _diffusers_keys(config["depth"]).items():
        parts = [tensors.pop(name) for name in names if name in tensors]
        if parts:
            state_dict[key] = torch.cat(parts) if ".qkv." in key else parts[0]
        if ".qkv." not in key and not all(torch.equal(part, parts[0]) for part in parts):
            raise InputError(f"{source} was trained on in diffusers: {key} differs between blocks, but a DiT has one")
    return state_dict | tensors


def _read_diffusers(folder):
    """A transformer folder: config.json, and diffusion_pytorch_model as .safetensors, its shards, or .bin."""
    try:
        theirs = json.loads((folder / "config.json").read_text())
        config = {ours: theirs[key] for ours, key in DIFFUSERS_CONFIG.items()}
        config["hidden_size"] = theirs["num_attention_heads"] * theirs["attention_head_dim"]
        config["learn_sigma"] = theirs["out_channels"] == 2 * theirs["in_channels"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} is not a diffusers DiT, by its config.json: {error!r}") from error
    wrong = [f"{key} {theirs[key]}" for key, value in DIFFUSERS_FIXED.items() if theirs.get(key, value) != value]
    if wrong:
        raise InputError(f"{folder} is not a diffusers DiT: its config.json has {', '.join(wrong)}")
    one, pickled = (folder / f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin"))
    files = [one] if one.exists() else sorted(folder.glob("diffusion_pytorch_model-*.safetensors"))
    tensors = {} if files or not pickled.exists() else _read_pickle(pickled)
    for file in files:
        tensors |= _read_safetensors(file)[1]
    return config, _from_diffusers(tensors, config, folder), {}


def _download(name):
    """The folder of a name's weights in the hub's cache, downloaded if they are not there; InputError if it cannot."""
    from huggingface_hub import snapshot_download

    log_stderr(f"{name}: Meta's weights, huggingface.co/{HUB[name]}, licence CC BY-NC 4.0: not for commercial use")
    try:
        snapshot = snapshot_download(HUB[name], allow_patterns=["transformer/*.json", "transformer/*.safetensors"])
        folder = Path(snapshot) / "transformer"
        if not any(folder.glob("*.safetensors")):
            snapshot_download(HUB[name], allow_patterns="transformer/*.bin")
    except Exception as error:  # whatever the hub's client and its HTTP library raise
        raise InputError(f"cannot download {name} from huggingface.co ({type(error).__name__}): is there a network? "
                         "Else give --ckpt its file or folder") from error
    for weights in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        if fingerprint(weights) != weights.resolve().name:  # the hub's cache names large files by SHA-256
            raise InputError(f"{weights} is damaged: delete {weights.resolve()} and run again")
    return folder


def convert(source, destination):
    """Write weights that load_checkpoint reads in another layout, float32 ones bit for bit.

    destination: NAME.safetensors is ours, NAME.pt an official bare state dict, any other a folder in which transformer/
    will be diffusers'. Only ours carries metadata (class names, VAE), only diffusers' drops the fixed positions. Raises
    InputError if destination exists, if its layout cannot say what the model is, or if it cannot be written.
    """
    destination = Path(destination)
    ours, official = destination.suffix == ".safetensors", destination.suffix == ".pt"
    target = destination if ours or official else destination / "transformer"
    if target.exists():
        raise InputError(f"{target} exists and is left as it is: remove it or give another name")
    model = load_checkpoint(source)
    state_dict, config = model.state_dict(), model.config
    implied = dict(class_dropout_prob=0.1)  # what the other layouts do not say, so it has to be this
    implied |= dict(num_heads=HEADS.get(config["hidden_size"])) if official else dict(mlp_ratio=4.0)
    lost = [] if ours else [f"{key} {config[key]}" for key in _differing(implied, config)]
    if lost:
        raise InputError(f"{target} could not say that the model has {', '.join(lost)}: convert to a .safetensors")
    if ours:
        save_checkpoint(target, model, **model.metadata)
    elif official:
        write_atomically(target, lambda temporary: torch.save(state_dict, temporary))
    else:
        theirs = DIFFUSERS_FIXED | {key: config[name] for name, key in DIFFUSERS_CONFIG.items()} | dict(
            _class_name="DiTTransformer2DModel", attention_head_dim=config["hidden_size"] // config["num_heads"],
            out_channels=model.out_channels, norm_eps=1e-6)  # their default eps is 1e-5
        tensors = _to_diffusers(state_dict, config["depth"])
        write_atomically(target / "diffusion_pytorch_model.safetensors",
                         lambda temporary: save_file(tensors, temporary, metadata=dict(format="pt")))
        write_json(target / "config.json", theirs)
    print(f"wrote {target}")


def main(args):
    if args.command == "convert":
        convert(args.source, args.destination)
    else:
        print_configs()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Print the paper's configurations, or convert weights.")
    command = parser.add_subparsers(dest="command").add_parser("convert", help="write weights in another layout")
    command.add_argument("source", help="a run's folder, .safetensors, official .pt, diffusers folder or known name")
    command.add_argument("destination", help="NAME.safetensors (ours), NAME.pt (official) or a folder (diffusers)")
    return parser.parse_args(argv)


# ---------------------------------------------------------- machinery: skip it on a first reading


class InputError(ValueError):
    """What the user gave cannot be used. Command lines print it as one line and exit with 2."""


class RankLocalError(InputError):
    """An InputError that only one rank may hit (say, a broken image in its share), so every rank prints it."""

    def __init__(self, message):
        # A DataLoader's worker puts its traceback above the message: only the message is for the user.
        worker_traceback = rf"(?s)^Caught .*\n([\w.]+\.)?{type(self).__name__}: "
        super().__init__(re.sub(worker_traceback, "", str(message).strip()))


def log_stderr(text, everywhere=False):
    """Print one line on stderr, on rank 0 or, if only this rank may know, everywhere."""
    if everywhere or int(os.environ.get("RANK", 0)) == 0:
        print(" ".join(text.split()), file=sys.stderr)


def run_command(main, args=None):
    """Run `main(args)` as a command line: an InputError becomes one line on stderr and exit status 2.

    Ctrl-C gives status 130. Any other exception is a bug and keeps its traceback.
    """
    try:
        main(args)
    except InputError as error:
        log_stderr(f"error: {error}", everywhere=isinstance(error, RankLocalError))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def fingerprint(*parts):
    """SHA-256 in hex of what the parts hold: the identity of data, weights, settings and files alike.

    A Path stands for its file's bytes, a tensor for its type, shape and values, a dict for its sorted
    items, bytes for themselves; anything else for its repr. One file alone gives the usual SHA-256.
    """
    digest = hashlib.sha256()

    def add(part):
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while block := file.read(1 << 24):
                    digest.update(block)
        elif torch.is_tensor(part):
            values = part.detach().cpu().contiguous()
            digest.update(f"{values.dtype}{tuple(values.shape)}".encode())
            digest.update(values.flatten().view(torch.uint8).numpy())
        elif isinstance(part, dict):
            for name in sorted(part):
                digest.update(str(name).encode())
                add(part[name])
        elif isinstance(part, bytes):
            digest.update(part)
        else:
            digest.update(repr(part).encode())

    for part in parts:
        add(part)
    return digest.hexdigest()


def sync_folder(folder):
    """Have the names in a folder reach the disk, as after a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path, write):
    """Call write(temporary_path), flush to disk, rename to path: the file appears whole or not at all.

    Raises RankLocalError naming path and reason when the system refuses (full disk, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        os.chmod(temporary, mode)  # safetensors leaves a file that only its owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise RankLocalError(f"cannot write {path}: {error}") from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        reason = "torch.save could not finish, is the disk full?"
        raise RankLocalError(f"cannot write {path}: {reason}") from error
    finally:
        if temporary.is_file():
            temporary.unlink()


def write_json(path, value):
    """Write a JSON file whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path, mend="delete it, and the same command makes it anew"):
    """The value in a JSON file; InputError, saying how to mend it, if it is damaged or not there."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): {mend}") from error


if __name__ == "__main__":
    run_command(main, parse_args())
