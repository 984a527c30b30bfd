"""Diffusion Transformers (DiT): the network, and its weights in and out.

    python dit.py                    the paper's configurations: parameters, Gflops
    python dit.py convert SRC DST    weights from any layout that load_checkpoint reads to another
    python dit.py convert RUN FOLDER --push OWNER/NAME    a DiTPipeline with its card, uploaded
    python dit.py convert SiT-XL-2-256x256.pt sit.safetensors --objective sit

The paper is "Scalable Diffusion Models with Transformers", Peebles & Xie, 2022, arXiv:2212.09748;
its section 3.2 is all that is needed to understand this file. One forward pass:

    tokens = patchify(x) + positions              a p x p patch of the latent is one token
    c      = MLP(sinusoids(t)) + table[y]         the conditioning vector: timestep and class
    for every block, with (shift, scale, gate) x 2 = Linear(SiLU(c)):      adaLN-Zero, figure 3
        tokens += gate_msa * Attention((1 + scale_msa) * LayerNorm(tokens) + shift_msa)
        tokens += gate_mlp * MLP      ((1 + scale_mlp) * LayerNorm(tokens) + shift_mlp)
    output = unpatchify(Linear((1 + scale) * LayerNorm(tokens) + shift))   noise (and variance)

Shapes: N images, T tokens, D the width of a token. Names and shapes of the parameters are those
of the official code, so official weights load as they are.
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import traceback
import warnings
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------ the network, in the order of a forward pass


class PatchEmbed(nn.Module):
    """Cut x into p x p patches and project each to a token, row by row (figure 4)."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        x = self.proj(x)  # (N, C, H, W) -> (N, D, H/p, W/p)
        # Every block keeps this memory layout: contiguous tokens spare each LayerNorm a copy.
        return x.flatten(2).transpose(1, 2).contiguous()  # (N, T, D), T = H/p * W/p


def sincos_positions(hidden_size, side):
    """Fixed 2-D position embeddings of side x side tokens: (side * side, D) float32.

    Sinusoids (Vaswani et al., 2017, section 3.5) once per axis: the first half of the entries tells
    the column, the second the row.
    """
    quarter = hidden_size // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    place = torch.arange(side, dtype=torch.float64, device="cpu")
    angles = place[:, None] * omega  # (side, D/4)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns = one_axis.repeat(side, 1)
    rows = one_axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()  # (T, D)


class TimestepEmbedder(nn.Module):
    """t (N,) -> (N, D): sinusoids of 128 frequencies from 1 to 1/10000, then a two-layer MLP.

    The sinusoids are those of Vaswani et al., 2017, section 3.5, cosines first.
    """

    def __init__(self, hidden_size):
        super().__init__()
        first, second = nn.Linear(256, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), second)

    def forward(self, t):
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10000) / 128 * steps)
        angles = t.float()[:, None] * frequencies  # float32: in bfloat16 998 and 999 are the same
        sinusoids = torch.cat([angles.cos(), angles.sin()], dim=1)  # (N, 256)
        return self.mlp(sinusoids.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """y (N,) -> (N, D). With label dropout the table has one more row, the null label's.

    Label dropout: Ho & Salimans, 2022, algorithm 1.
    """

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        # Empty rows: DiT.initialize_weights fills them.
        rows = torch.empty(num_classes + (dropout_prob > 0), hidden_size)
        self.embedding_table = nn.Embedding.from_pretrained(rows, freeze=False)
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob

    def forward(self, y, drop=None):
        if drop is None and self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if drop is not None:
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)


class DiTBlock(nn.Module):
    """A transformer block with adaLN-Zero (section 3.2). Its gates begin at zero: the identity."""

    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        modulation = self.adaLN_modulation(c).unsqueeze(1)  # (N, 1, 6D): the same for all tokens
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=2)
        x = x + gate_msa * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        x = x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return x  # (N, T, D)


def modulate(x, shift, scale):
    """adaLN's scale and shift of normalised tokens: x (N, T, D), shift and scale (N, 1, D)."""
    return x * (1 + scale) + shift


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
        x = attend(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(N, T, D))


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v, in one fused kernel where that is the faster way."""
    # In bfloat16 on a CPU the fused kernel is slow: training DiT-S/2 (batch 4, two threads) takes
    # 23 % more time a step with it; sampling takes the same.
    if q.is_cpu and q.dtype == torch.bfloat16:
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Mlp(nn.Module):
    """Linear, GELU (tanh form), Linear, on every token."""

    def __init__(self, hidden_size, mlp_size):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class FinalLayer(nn.Module):
    """adaLN, then a projection of each token to the p * p * out_channels values of its patch."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=2)  # each (N, 1, D)
        return self.linear(modulate(self.norm_final(x), shift, scale))  # (N, T, p*p*out_channels)


@dataclass
class DiTConfig:
    """The arguments of DiT; the defaults are DiT-XL/2's for images of 256 px."""

    input_size: int = 32  # height and width of x, in pixels of the latent
    patch_size: int = 2  # p, the side of the patch that becomes a token
    in_channels: int = 4  # C, the channels of x
    hidden_size: int = 1152  # D, the width of a token
    depth: int = 28  # the number of blocks
    num_heads: int = 16
    mlp_ratio: float = 4.0  # the MLP's hidden width, as a multiple of D
    class_dropout_prob: float = 0.1  # how often training hides y; 0: no null label, so no guidance
    num_classes: int = 1000
    learn_sigma: bool = True  # whether C more channels predict the variance

    def __post_init__(self):
        """InputError unless patches tile the image, heads share D, and positions its quarters."""
        width = self.hidden_size
        try:
            remainders = self.input_size % self.patch_size, width % self.num_heads, width % 4
        except (TypeError, ZeroDivisionError):  # a damaged file may hold anything
            remainders = None
        if remainders != (0, 0, 0):
            raise InputError(f"input size {self.input_size} must divide by patch size "
                             f"{self.patch_size}, hidden size {width} by 4 and by "
                             f"{self.num_heads} heads")


class DiT(nn.Module):
    """The Diffusion Transformer (figure 3). Its arguments are DiTConfig's, by name.

    `config` is a dict of them, and each is an attribute too. `metadata` is what save_checkpoint
    stored beside the weights. Set `gradient_checkpointing` to train with less memory.
    Raises InputError when the sizes do not fit together.
    """

    def __init__(self, **config):
        super().__init__()
        self.config = asdict(DiTConfig(**config))
        for name, value in self.config.items():
            setattr(self, name, value)
        self.out_channels = self.in_channels * (2 if self.learn_sigma else 1)
        self.metadata = {}
        self.gradient_checkpointing = False

        # Input: a token a patch, their positions, and the two halves of the conditioning vector.
        width = self.hidden_size
        self.x_embedder = PatchEmbed(self.patch_size, self.in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(self.num_classes, width, self.class_dropout_prob)
        positions = sincos_positions(width, self.input_size // self.patch_size)  # (T, D)
        positions = positions.to(self.x_embedder.proj.weight.device)
        self.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)  # never trained

        # The blocks, and back to pixels.
        blocks = [DiTBlock(width, self.num_heads, self.mlp_ratio) for _ in range(self.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_layer = FinalLayer(width, self.patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for matrices, normal(0.02) for embeddings; zero for biases, gates and output."""
        # On the meta device there are shapes without memory: the weights come later.
        if self.pos_embed.is_meta:
            return

        # Every Linear as in a plain transformer; patchify is one too, though written as a Conv2d.
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        patchify = self.x_embedder.proj
        nn.init.xavier_uniform_(patchify.weight.view(patchify.weight.shape[0], -1))
        nn.init.zeros_(patchify.bias)

        # The embeddings of class and timestep begin small.
        embedding_table, mlp = self.y_embedder.embedding_table, self.t_embedder.mlp
        for layer in embedding_table, mlp[0], mlp[2]:
            nn.init.normal_(layer.weight, std=0.02)

        # adaLN-Zero: with zero gates every block begins as the identity, and the output as zero.
        zero_layers = [block.adaLN_modulation[-1] for block in self.blocks]
        zero_layers += [self.final_layer.adaLN_modulation[-1], self.final_layer.linear]
        for layer in zero_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x, t, y, drop=None):
        """Predict the noise in x, and with learn_sigma the variance (IDDPM, equation 15).

        x (N, C, H, W) float; t (N,) original timesteps, fractional ones allowed; y (N,) int64,
        num_classes is the null label; drop (N,) bool: whose labels to hide (None: at random in
        training). Returns (N, C, H, W), or (N, 2C, H, W) with learn_sigma. Raises InputError if x
        is not input_size x input_size with C channels.
        """
        C, size = self.in_channels, self.input_size
        if x.shape[1:] != (C, size, size):
            raise InputError(f"this DiT takes (N, {C}, {size}, {size}), but x is {tuple(x.shape)}: "
                             "images must be square and of the model's --image-size")
        x = self.x_embedder(x) + self.pos_embed  # (N, T, D)
        c = self.t_embedder(t) + self.y_embedder(y, drop)  # (N, D)
        # Checkpointing keeps each block's input alone and runs the block again in backward.
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, c, use_reentrant=False)
            else:
                x = block(x, c)  # (N, T, D)
        x = self.final_layer(x, c)  # (N, T, p*p*out_channels)
        return self.unpatchify(x)  # (N, out_channels, H, W)

    def unpatchify(self, x):
        """Tokens (N, T, p*p*C) -> pixels (N, C, H, W), the inverse of PatchEmbed's order."""
        p, side = self.patch_size, self.input_size // self.patch_size
        x = x.view(x.shape[0], side, side, p, p, self.out_channels)
        x = x.permute(0, 5, 1, 3, 2, 4)  # (N, C, side, p, side, p)
        return x.reshape(x.shape[0], self.out_channels, side * p, side * p)

    def forward_with_cfg(self, x, t, y, cfg_scale, cfg_channels=None):
        """Classifier-free guidance: eps = eps_null + cfg_scale * (eps_y - eps_null).

        Ho & Salimans, 2022, equation 6. Shapes as in `forward`. cfg_scale 1 is no guidance, at the
        cost of one pass. cfg_channels: how many of the first channels are guided, None for all C;
        the official code guides 3. The other channels are the conditional ones. Raises InputError
        when the model has no null label.
        """
        if cfg_scale == 1:
            return self(x, t, y)
        if self.class_dropout_prob == 0:
            raise InputError("guidance needs a model trained with label dropout; this one has no "
                             "null label: use --cfg-scale 1")
        # Both predictions in one pass of twice the batch.
        null = torch.full_like(y, self.num_classes)
        both = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null]))
        # In float32: of two close numbers in bfloat16 guidance would magnify the rounding.
        cond, uncond = both.float().chunk(2)
        n = self.in_channels if cfg_channels is None else cfg_channels
        guided = uncond[:, :n] + cfg_scale * (cond[:, :n] - uncond[:, :n])
        return torch.cat([guided, cond[:, n:]], dim=1)


DIT_CONFIGS = {  # table 1 of the paper, each with patch sizes 2, 4 and 8
    f"DiT-{size}/{patch}": dict(depth=depth, hidden_size=width, patch_size=patch, num_heads=heads)
    for size, depth, width, heads in [
        ("XL", 28, 1152, 16), ("L", 24, 1024, 16), ("B", 12, 768, 12), ("S", 12, 384, 6)
    ]
    for patch in (2, 4, 8)
}
DEMO_CONFIGS = {"DiT-Ti/2": dict(depth=4, hidden_size=96, patch_size=2, num_heads=3)}  # for digits


def named_config(name):
    """The arguments of DiT for a name in DIT_CONFIGS or DEMO_CONFIGS; InputError if unknown."""
    configs = DIT_CONFIGS | DEMO_CONFIGS
    if name not in configs:
        raise InputError(f"unknown model {name!r}: choose one of {', '.join(configs)}")
    return configs[name]


def build_dit(name, **overrides):
    """The model of a name, freshly initialised; overrides are arguments of DiT."""
    return DiT(**named_config(name) | overrides)


PAPER_GFLOPS = {  # table 4 at 256 px, section 5.1 at 512 px: multiply-adds, counted once
    ("DiT-XL/2", 32): 118.64, ("DiT-XL/4", 32): 29.05, ("DiT-XL/8", 32): 7.39,
    ("DiT-L/2", 32): 80.71, ("DiT-L/4", 32): 19.70, ("DiT-L/8", 32): 5.01,
    ("DiT-B/2", 32): 23.01, ("DiT-B/4", 32): 5.56, ("DiT-B/8", 32): 1.42,
    ("DiT-S/2", 32): 6.06, ("DiT-S/4", 32): 1.41, ("DiT-S/8", 32): 0.36,
    ("DiT-XL/2", 64): 524.60,
}


def count_macs(config):
    """Multiply-adds of a forward pass of one image: what the paper calls flops (table 4).

    config: a model's `config`. As PyTorch's flop counter, halved: matrix products are counted, but
    no normalisation, activation or softmax.
    """
    width, patch, channels = config["hidden_size"], config["patch_size"], config["in_channels"]
    tokens = (config["input_size"] // patch) ** 2
    mlp_size = int(width * config["mlp_ratio"])
    # For each token: qkv and proj, fc1 and fc2, q k^T and the product with v.
    block = 4 * width * width + 2 * width * mlp_size + 2 * tokens * width
    # For each token: patchify and the final layer.
    ends = patch * patch * width * (channels + channels * (1 + config["learn_sigma"]))
    # Once: the timestep's MLP, and adaLN's Linear of every block and of the final layer.
    once = 256 * width + width * width + (6 * config["depth"] + 2) * width * width
    return tokens * (config["depth"] * block + ends) + once


def print_configs():
    """The paper's configurations as a table: parameters, Gflops, and the memory of training.

    state: of weights, EMA, AdamW and gradients; kept: for each image of a step in bfloat16, without
    and with gradient checkpointing.
    """
    print(f"{'':10}{'image':>6}{'tokens':>7}{'depth':>6}{'width':>6}{'heads':>6}{'parameters':>13}"
          f"{'Gflops':>8}{'paper':>8}{'state, GB':>11}{'kept, MB/image':>16}")
    for (name, input_size), paper in PAPER_GFLOPS.items():
        with torch.device("meta"):
            model = build_dit(name, input_size=input_size)
        # The VAE makes a pixel of the latent from 8 x 8 of the image.
        pixels, tokens = input_size * 8, model.pos_embed.shape[1]
        parameters = sum(p.numel() for p in model.parameters())
        gflops = count_macs(model.config) / 1e9
        state = state_bytes(model) / 1e9
        kept = kept_bytes(model.config)
        print(f"{name:10}{pixels:>6}{tokens:>7}{model.depth:>6}{model.hidden_size:>6}"
              f"{model.num_heads:>6}{parameters:>13,}{gflops:>8.2f}{paper:>8.2f}{state:>11.2f}"
              f"{kept[0] / 1e6:>9.1f} {kept[1] / 1e6:>6.1f}")


# --------------------------------------------------------------------------- weights in and out

HUB = {f"DiT-XL/2-{size}": f"facebook/DiT-XL-2-{size}" for size in (256, 512)}  # names to download
HUB |= {repository: repository for repository in HUB.values()}


def save_checkpoint(path, model, **metadata):
    """Write a model's weights, as they are, to a .safetensors file that says what they are.

    Its header carries the model's config and the metadata: any JSON values (step, class_names, vae
    ...), which load_checkpoint returns as `model.metadata`. Raises InputError when the file cannot
    be written; what was there before is then untouched.
    """
    save_weights(path, model.state_dict(), model.config, metadata)


def save_weights(path, state_dict, config, metadata):
    """save_checkpoint for weights that are not in a model, such as those that FSDP gathered."""
    state_dict = {name: tensor.cpu().contiguous() for name, tensor in state_dict.items()}
    header = dict(config=json.dumps(config), metadata=json.dumps(metadata))
    header["fingerprint"] = fingerprint(header, state_dict)
    write_atomically(path, lambda temporary: save_file(state_dict, temporary, metadata=header))


def load_checkpoint(path_or_name, device="cpu"):
    """A DiT in eval mode, float32, with its `config` and the `metadata` stored with it, from any of

    - a run's folder: the EMA weights of its newest checkpoint (if damaged, of the one before)
    - a .safetensors file: of save_checkpoint, or with official names
    - an official .pt: a bare state dict, or a training checkpoint, whose EMA weights are taken;
      no pickled code is run
    - a diffusers folder: a DiTPipeline's, or the transformer folder in it
    - a name in HUB, downloaded once and verified; those weights are under CC BY-NC 4.0

    Raises InputError when nothing is there, the file is damaged or would run code, a weight is not
    finite, or the weights do not fit.
    """
    path = Path(path_or_name)
    if str(path_or_name) in HUB and not path.exists():
        path = download(str(path_or_name))

    # Of a run's checkpoints the newest that can be read; everything else is one candidate.
    candidates = step_folders(path)[::-1] or [path]
    for candidate in candidates:
        try:
            config, state_dict, metadata = read_weights(candidate)
            check_finite(state_dict, candidate)
            break
        except InputError as error:
            if candidate is candidates[-1]:
                raise
            log_stderr(f"warning: {error}; taking the checkpoint before it")

    # No memory and no initialisation: the tensors that were read become the weights.
    with torch.device("meta"):
        model = DiT(**config)
    load_weights(model, state_dict, candidate)
    model.metadata = metadata
    return model.to(device, torch.float32).eval()


def step_folders(run, name="[0-9]+"):
    """A run's checkpoints, the folders checkpoints/0002000 ... or links to such, the oldest first.

    name: a regular expression of theirs. What somebody put beside them, a copy or a link of another
    name, is not the run's.
    """
    found = [path for path in Path(run).glob("checkpoints/*") if re.fullmatch(name, path.name)
             and path.is_dir() and path.resolve().name == path.name]
    return sorted(found, key=lambda path: int(path.name))


def check_finite(state_dict, source):
    """InputError naming the first tensor with a NaN or infinity: it would draw black pictures."""
    for name, tensor in state_dict.items():
        if not tensor.float().isfinite().all():
            raise InputError(f"{source} cannot be used: {name} has values that are not finite, as "
                             "after a training that diverged")


def load_weights(model, state_dict, source):
    """Load official-layout weights into a model strictly. source: what messages call them.

    Raises InputError naming the first keys that differ and the flag that is probably wrong.
    """
    want = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    got = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    wrong = [name for name in want | got if want.get(name) != got.get(name)]
    if wrong:
        # What the weights would be says which setting of the model is another one.
        theirs = official_config(state_dict, source)
        flags = sorted({flag_of(entry) for entry in differing_entries(theirs, model.config)})
        hint = f"check {' and '.join(flags)}" if flags else "is it damaged, or of another network?"
        shown = [f"{name} is {got.get(name, 'missing')}, expected {want.get(name, 'none')}"
                 for name in wrong[:3]]
        raise InputError(f"{source} does not fit the model, {len(wrong)} keys differ: "
                         f"{', '.join(shown)}; {hint}")
    model.load_state_dict(state_dict, assign=model.pos_embed.is_meta)


def check_config(model, source, name=None, **expected):
    """Raise InputError, naming the flag, when a loaded model is not what the flags describe.

    name: of a configuration; expected: entries of the config such as input_size and num_classes;
    those that are None may be anything.
    """
    wanted = dict(named_config(name)) if name else {}
    wanted |= {entry: value for entry, value in expected.items() if value is not None}
    for entry in differing_entries(wanted, model.config):
        has, flag = model.config[entry], flag_of(entry)
        raise InputError(f"{source} has {entry} {has}, not {wanted[entry]}: check {flag}")


def flag_of(entry):
    """The flag that sets an entry of the config."""
    flags = dict(input_size="--image-size", in_channels="--vae", num_classes="--num-classes",
                 class_dropout_prob="--class-dropout-prob")
    return flags.get(entry, "--model")


def differing_entries(config, other):
    """The entries of config with another value in other; of label dropout, whether there is any."""
    def value(entries, entry):
        return entries[entry] > 0 if entry == "class_dropout_prob" else entries[entry]

    return [entry for entry in config if value(config, entry) != value(other, entry)]


def check_objective(model, source, objective=None):
    """Note what a model was trained to predict, where its file does not say so: ddpm, flow or sit.

    Raises InputError when the file says something else.
    """
    stored = model.metadata.get("objective")
    if objective and stored not in (None, objective):
        raise InputError(f"{source} was trained with --objective {stored}, not {objective}")
    if objective:
        model.metadata["objective"] = objective


LAYOUTS = {".safetensors": "ours", ".pt": "official"}  # of a destination; a folder is diffusers'


def convert(source, destination, objective=None):
    """Write weights that load_checkpoint reads in another layout, float32 ones bit for bit.

    destination: NAME.safetensors is ours, NAME.pt an official bare state dict, any other a folder
    of diffusers: transformer/, a model card and, if DiTPipeline can draw from the model, its other
    parts. Only official files carry no metadata (class names, VAE, objective), only diffusers' no
    fixed positions. objective: what the source does not say of itself. Raises InputError if the
    destination exists, if its layout cannot say what the model is, or if it cannot be written.
    """
    # Nothing that is there is written over: of a folder, none of the parts that it may get.
    destination = Path(destination)
    layout = LAYOUTS.get(destination.suffix, "diffusers")
    parts = [destination / name for name in PIPELINE] if layout == "diffusers" else [destination]
    for path in parts:
        if path.exists():
            raise InputError(f"{path} exists and is left as it is: remove it or give another name")
    model = load_checkpoint(source)
    check_objective(model, source, objective)

    # What a layout does not say is implied: the model must have just that.
    implied = dict(ours={}, diffusers=dict(class_dropout_prob=0.1, mlp_ratio=4.0),
                   official=dict(class_dropout_prob=0.1, num_heads=HEADS.get(model.hidden_size)))
    lost = differing_entries(implied[layout], model.config)
    if lost:
        has = ", ".join(f"{entry} {model.config[entry]}" for entry in lost)
        raise InputError(f"{destination} could not say that the model has {has}: "
                         "convert to a .safetensors")

    # An official file has no place for metadata: what sampling must know is said.
    if layout == "ours":
        save_checkpoint(destination, model, **model.metadata)
    elif layout == "official":
        write_atomically(destination, lambda temporary: torch.save(model.state_dict(), temporary))
        if "objective" in model.metadata:
            log_stderr(f"{destination} does not say that its objective is "
                       f"{model.metadata['objective']}: give --objective with it")
    else:
        write_pipeline(destination, model, Path(source))
    print(f"wrote {destination}")


# ------------------------------------------------------------------------------ the command line


def main(args):
    if args.command == "convert":
        if args.push and Path(args.destination).suffix in LAYOUTS:
            raise InputError(f"--push uploads a folder, not {args.destination}")
        convert(args.source, args.destination, args.objective)
        if args.push:
            push(args.destination, args.push)
    else:
        print_configs()


def parse_args(argv=None):
    what = "Print the paper's configurations, or convert weights."
    parser = argparse.ArgumentParser(description=what)
    commands = parser.add_subparsers(dest="command")
    add = commands.add_parser("convert", help="write weights in another layout").add_argument
    add("source", help="a run's folder, .safetensors, official .pt, diffusers folder or known name")
    add("destination", help="NAME.safetensors (ours), NAME.pt (official) or a folder (diffusers)")
    add("--objective", choices=("ddpm", "flow", "sit", "jit"),
        help="what the network was trained to predict, where its file does not say so: sit for "
             "SiT's own weights")
    add("--push", metavar="OWNER/NAME",
        help="upload the folder to the Hugging Face hub, as a private repository if it is new")
    return parser.parse_args(argv)


# ---------------------------------------------------------- machinery: skip it on a first reading

# -------------------------------------------------------------------------- the memory of training


def state_bytes(model):
    """Bytes of training without the images: weights, EMA, AdamW's two moments, gradients.

    All of them are float32; positions are in the weights and the EMA alone.
    """
    weights = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return 4 * (2 * weights + 3 * trained)


def kept_bytes(config):
    """Bytes that a forward pass in bfloat16 keeps for backward, per image.

    Returns two numbers: without and with gradient checkpointing. They are counted: on tensors
    without memory autograd shows each that it saves. float16 stands for bfloat16: it is as long,
    and has on a CPU the fused attention that GPUs have for both.
    """
    from torch._subclasses import FakeTensorMode

    # One block is enough, since all keep the same.
    with FakeTensorMode():
        model = DiT(**config | dict(depth=1)).train()
        block = model.blocks

        def kept_an_image():
            """What two images keep more than one, which leaves out the weights."""
            kept = []
            for images in (1, 2):
                storages = set()  # the same memory may be saved under several shapes
                note = lambda tensor, seen=storages: seen.add(tensor.untyped_storage()) or tensor
                x = torch.empty(images, model.in_channels, model.input_size, model.input_size)
                y = torch.zeros(images, dtype=torch.int64)
                hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
                with hooks, torch.autocast("cpu", torch.float16):
                    model(x, y, y)
                kept.append(sum(storage.nbytes() for storage in storages))
            return kept[1] - kept[0]

        # The ends of the network alone, then with a block.
        model.blocks = nn.ModuleList()
        ends = kept_an_image()
        model.blocks = block
        totals = []
        for model.gradient_checkpointing in (False, True):
            totals.append(ends + config["depth"] * (kept_an_image() - ends))
    return totals


# ----------------------------------------------------------------- files of weights, of all layouts

HEADS = {  # width -> heads, which no shape tells
    config["hidden_size"]: config["num_heads"] for config in (DIT_CONFIGS | DEMO_CONFIGS).values()}


def read_weights(path):
    """(config, official-layout state dict, metadata) of a file or folder, whatever its layout."""
    # A DiTPipeline's folder: its own VAE is the one that its transformer was trained with.
    if (path / "transformer").is_dir():
        config, state_dict, metadata = read_weights(path / "transformer")
        vae = path / "vae"
        if (vae / "config.json").is_file():
            metadata = metadata | dict(vae=str(vae.resolve()))
        return config, state_dict, metadata
    if is_diffusers(path):
        return read_diffusers(path, diffusers_files(path))

    # Else a file, or a run's checkpoint, of which the averaged weights are wanted.
    if path.is_dir():
        path = path / "ema.safetensors"
    if not path.is_file():
        raise InputError(f"no checkpoint at {path}: give a run's folder, a .safetensors file, an "
                         f"official .pt, a diffusers folder, or {' or '.join(HUB)}")
    return read_safe(path) if path.suffix == ".safetensors" else read_official(path)


def read_safe(path):
    """read_weights for a .safetensors file: its header says what it is, or else what lies by it."""
    header, tensors = read_safetensors(path)
    # Files of the first release have a checksum of another kind, which is not compared.
    stored = header.pop("fingerprint", None)
    if stored is not None and stored != fingerprint(header, tensors):
        raise InputError(f"{path} is damaged: its fingerprint does not match its contents")

    # Without a config: a file out of a diffusers folder; a run's own weights, of the same network
    # as the averaged ones beside them; or any.
    if "config" not in header:
        averaged = path.with_name("ema.safetensors")
        if is_diffusers(path.parent):
            return read_diffusers(path.parent, [path])
        if not averaged.is_file():
            return official_network(tensors, f"{path}, which has no config,")
        header = read_safetensors(averaged)[0]
    try:
        config = asdict(DiTConfig(**json.loads(header["config"])))
        return config, tensors, json.loads(header["metadata"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged: its header does not say what it is ({error!r})"
                         ) from error


def read_safetensors(path):
    """(header, tensors) of a .safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}, is it damaged? {error}") from error


def read_official(path):
    """read_weights for a .pt: a bare state dict, or one among other things (ema, model, args)."""
    saved = read_pickle(path)
    args = vars(saved["args"]) if isinstance(saved.get("args"), argparse.Namespace) else {}
    metadata = {key: args[key] for key in ("image_size", "vae") if key in args}
    return official_network(saved, path, args.get("num_classes"), metadata)


def official_network(saved, source, num_classes=None, metadata=None):
    """(config, state dict, metadata) of the one DiT in nested dicts of tensors.

    Wherever it is, and whatever stands before its names: `model`, `state_dict`, `module.` of DDP,
    `_orig_mod.` of torch.compile. Of several the one that is called EMA is taken.
    """
    # Where a network is, is seen from what stands before the name of its first weight.
    tensors, first = dict(named_tensors(saved)), "x_embedder.proj.weight"
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    averaged = [prefix for prefix in prefixes if "ema" in prefix.lower()]
    prefixes = averaged or prefixes or [""]
    if len(prefixes) > 1:
        raise InputError(f"{source} holds several networks, {', '.join(prefixes)}: keep one")
    prefix = prefixes[0]
    if prefix and not averaged:
        log_stderr(f"{source}: its weights {prefix[:-1]!r} are taken, it has no EMA weights")
    state_dict = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                  if name.startswith(prefix)}

    # Shapes tell everything but the number of heads.
    config = official_config(state_dict, source, num_classes)
    width = config["hidden_size"]
    if width not in HEADS:
        raise InputError(f"{source} has width {width}, and does not say how many heads; known are "
                         f"widths {', '.join(map(str, HEADS))}")
    return config | dict(num_heads=HEADS[width]), state_dict, metadata or {}


# What DDP and averaging, torch.compile, FSDP and checkpointing put into names.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def named_tensors(saved, parents=(), levels=4):
    """(name, tensor) of all tensors in nested dicts: dotted names, without WRAPPERS."""
    for name, value in saved.items():
        own = [part for part in str(name).split(".") if part not in WRAPPERS]
        if torch.is_tensor(value):
            yield ".".join([*parents, *own]), value
        elif isinstance(value, dict) and levels:  # a damaged file may nest without end
            yield from named_tensors(value, [*parents, *own], levels - 1)


def read_pickle(path):
    """The dict that torch.save wrote: tensors, plain containers, argparse.Namespace; no code."""
    try:
        # torch.load compares no checksums, and TorchScript in a zip is code.
        if zipped := zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                if name := file.testzip():
                    raise zipfile.BadZipFile(name)
                if any(name.endswith("/constants.pkl") for name in file.namelist()):
                    raise InputError(f"{path} is refused: it is TorchScript, code and not weights")
        # Mapped, so that the states of an optimiser stay on the disk.
        with torch.serialization.safe_globals([argparse.Namespace]):
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except Exception as error:  # a parser of arbitrary bytes may raise anything
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            message = f"{path} is refused: its pickle asks for {code[1]}, which could run code"
        else:
            message = f"cannot read {path} as torch.save's, is it damaged? {type(error).__name__}"
        raise InputError(message) from error
    if not isinstance(saved, dict):
        raise InputError(f"{path} holds a {type(saved).__name__}, not a dict of weights")
    return saved


def official_config(state_dict, source, num_classes=None):
    """A model's config, but for num_heads, from the shapes of its weights.

    Without num_classes the last row of the label table is taken for the null label, as it is in all
    official weights.
    """
    # The shapes of these five tensors say it all.
    needed = {"x_embedder.proj.weight": 4, "pos_embed": 3, "y_embedder.embedding_table.weight": 2,
              "blocks.0.mlp.fc1.weight": 2, "final_layer.linear.weight": 2}
    for name, dimensions in needed.items():
        if getattr(state_dict.get(name), "ndim", None) != dimensions:
            raise InputError(f"{source} does not hold a DiT's weights: {name} is missing or has "
                             "another shape")
    patches, positions, labels, fc1, last = (state_dict[name].shape for name in needed)
    width, channels, patch, _ = patches
    depth = len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")})
    has_null = labels[0] != num_classes
    return dict(input_size=math.isqrt(positions[1]) * patch, patch_size=patch, in_channels=channels,
                hidden_size=width, depth=depth, mlp_ratio=fc1[0] / width,
                class_dropout_prob=0.1 * has_null, num_classes=labels[0] - has_null,
                learn_sigma=last[0] == 2 * channels * patch * patch)


# diffusers' DiTTransformer2DModel has other names; q, k and v apart; the embedders repeated in
# every block; no positions. Its timestep embedding has other frequencies (downscale_freq_shift 1
# for 0): with the same weights its output differs.

DIFFUSERS_CONFIG = dict(  # ours -> theirs
    input_size="sample_size", patch_size="patch_size", in_channels="in_channels",
    depth="num_layers", num_heads="num_attention_heads", num_classes="num_embeds_ada_norm",
)
DIFFUSERS_FIXED = dict(  # what makes their transformer a DiT
    norm_type="ada_norm_zero", activation_fn="gelu-approximate", attention_bias=True,
    norm_elementwise_affine=False,
)


DIFFUSERS_LAYERS = {  # ours -> theirs; {i} is the number of a block
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2"],
    "y_embedder.embedding_table": [
        "transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table"],
    "blocks.{i}.adaLN_modulation.1": ["transformer_blocks.{i}.norm1.linear"],
    "blocks.{i}.attn.qkv": [f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv"],
    "blocks.{i}.attn.proj": ["transformer_blocks.{i}.attn1.to_out.0"],
    "blocks.{i}.mlp.fc1": ["transformer_blocks.{i}.ff.net.0.proj"],
    "blocks.{i}.mlp.fc2": ["transformer_blocks.{i}.ff.net.2"],
    "final_layer.adaLN_modulation.1": ["proj_out_1"],
    "final_layer.linear": ["proj_out_2"],
}


def diffusers_keys(depth):
    """Yield (official key, diffusers keys of its parts); embedders have a copy in each block."""
    for i in range(depth):
        for ours, theirs in DIFFUSERS_LAYERS.items():
            for kind in ("weight", "bias"):
                names = [f"{name}.{kind}".format(i=i) for name in theirs]
                yield f"{ours}.{kind}".format(i=i), names


def to_diffusers(state_dict, depth):
    """Official-layout weights under diffusers' names."""
    tensors = {}
    for key, names in diffusers_keys(depth):
        if key in state_dict:  # all but the bias of the embedding table
            parts = state_dict[key].chunk(len(names))
            for name, part in zip(names, parts, strict=True):
                tensors[name] = part.clone()  # safetensors writes no shared memory
    return tensors


def from_diffusers(tensors, config, source):
    """Official-layout weights; what has no place there keeps its name: load_weights names it."""
    side = config["input_size"] // config["patch_size"]
    state_dict = {"pos_embed": sincos_positions(config["hidden_size"], side)[None]}
    for key, names in diffusers_keys(config["depth"]):
        parts = [tensors.pop(name) for name in names if name in tensors]
        if parts:
            tensor = torch.cat(parts)
            if not torch.equal(state_dict.setdefault(key, tensor), tensor):
                raise InputError(f"{source} was trained on in diffusers: {key} differs between "
                                 "blocks, but a DiT has one")
    return state_dict | tensors


def is_diffusers(folder):
    """Whether a folder is a model of diffusers, by its names; a run's folder also has a config."""
    if any(folder.glob("diffusion_pytorch_model*")):
        return True
    try:
        return "_class_name" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def diffusers_files(folder):
    """One file of weights, or all its shards: NAME[.VARIANT][-00001-of-00002].safetensors or .bin.

    Of several sets diffusers' own name is preferred, then .safetensors, then no variant: float32.
    """
    sets = {}
    for file in sorted(folder.iterdir()):
        if re.fullmatch(r"\w*model(\.\w+)?(-\d+-of-\d+)?(\.\w+)?\.(safetensors|bin)", file.name):
            sets.setdefault(re.sub(r"-\d+-of-\d+", "", file.name), []).append(file)
    if not sets:
        raise InputError(f"{folder} has no weights: no diffusion_pytorch_model.safetensors")

    def rank(name):
        return not name.startswith("diffusion_"), name.endswith(".bin"), name.count("."), name

    return sets[min(sets, key=rank)]


def read_diffusers(folder, files):
    """read_weights for a transformer folder: its config.json, and these files of weights."""
    # Theirs in our words, and nothing that makes it another network.
    try:
        theirs = json.loads((folder / "config.json").read_text())
        config = {ours: theirs[key] for ours, key in DIFFUSERS_CONFIG.items()}
        config["hidden_size"] = theirs["num_attention_heads"] * theirs["attention_head_dim"]
        config["learn_sigma"] = theirs["out_channels"] == 2 * theirs["in_channels"]
        config = asdict(DiTConfig(**config))
        metadata = dict(theirs.get("_metadata", {}))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"by its config.json: {error!r}"
        raise InputError(f"{folder} is not a diffusers DiT, {reason}") from error
    for key, value in DIFFUSERS_FIXED.items():
        if theirs.get(key, value) != value:
            raise InputError(f"{folder} is not a diffusers DiT: its config.json has {key} "
                             f"{theirs[key]}")

    # Shards hold different tensors, else some are left over from another saving.
    tensors = {}
    for file in files:
        new = read_pickle(file) if file.suffix == ".bin" else read_safetensors(file)[1]
        if twice := sorted(tensors.keys() & new.keys()):
            raise InputError(f"{folder} has {twice[0]} in two files, one of them {file.name}: "
                             "remove the files that do not belong there")
        tensors |= new
    return config, from_diffusers(tensors, config, folder), metadata


def write_diffusers(folder, model):
    """A transformer folder that diffusers opens."""
    config = dict(_class_name="DiTTransformer2DModel")
    config |= DIFFUSERS_FIXED | {key: model.config[ours] for ours, key in DIFFUSERS_CONFIG.items()}
    config |= dict(attention_head_dim=model.hidden_size // model.num_heads,
                   out_channels=model.out_channels, norm_eps=1e-6)  # their default eps is 1e-5
    if model.metadata:
        config["_metadata"] = model.metadata  # diffusers passes over names with an underscore
    tensors = to_diffusers(model.state_dict(), model.depth)
    write_atomically(
        folder / "diffusion_pytorch_model.safetensors",
        lambda temporary: save_file(tensors, temporary, metadata=dict(format="pt")),
    )
    write_json(folder / "config.json", config)


# ------------------------------------------------- a whole pipeline of diffusers, with a model card

PIPELINE = ["transformer/", "vae/", "scheduler/", "model_index.json", "samples.png", "README.md"]
SCHEDULER = dict(  # DDPM's betas, DDIM's equal strides: the official "ddim50"
    _class_name="DDIMScheduler", num_train_timesteps=1000, beta_start=0.0001, beta_end=0.02,
    beta_schedule="linear", clip_sample=False, set_alpha_to_one=True, steps_offset=0,
)


def write_pipeline(folder, model, source):
    """A folder of diffusers: transformer/ and a card, and what else DiTPipeline needs to draw."""
    # The transformer is of use by itself, whatever else a pipeline lacks.
    write_diffusers(folder / "transformer", model)
    try:
        vae, kind, files = pipeline_vae(model)
    except InputError as error:
        print(f"{folder} has the transformer/ of a pipeline alone: {error}")
        write_card(folder, model, source, f"Not as a DiTPipeline: {error}.")
        return

    # A VAE that is here is copied; one that is not, the reader has to fetch.
    given = "" if files else f", vae=AutoencoderKL.from_pretrained({vae!r})"
    if given:
        log_stderr(f"{folder} has no vae/, as {vae} is not on this machine; "
                   f"DiTPipeline.from_pretrained({folder.name!r}{given}) gets it")
    for file in files:
        write_atomically(folder / "vae" / file.name, functools.partial(shutil.copyfile, file))
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    names = {str(y): str(name) for y, name in enumerate(model.metadata.get("class_names") or ())}
    write_json(folder / "model_index.json", dict(
        _class_name="DiTPipeline", scheduler=["diffusers", "DDIMScheduler"], id2label=names,
        transformer=["diffusers", "DiTTransformer2DModel"], vae=["diffusers", kind]))
    write_card(folder, model, source, IN_DIFFUSERS.format(folder.name, given))


def pipeline_vae(model):
    """(name, class, files) of a model's VAE, no files if only the hub has it.

    Raises InputError, which says why, when DiTPipeline cannot draw from the model.
    """
    from huggingface_hub import snapshot_download

    objective = model.metadata.get("objective", "ddpm")
    if objective != "ddpm":
        predicted = "the image" if objective == "jit" else "image - noise"
        raise InputError(f"its objective {objective} predicts {predicted}, and the schedulers of "
                         "diffusers want noise - image")
    # Meta's weights alone take latents and do not say whose.
    name = model.metadata.get("vae") or ("mse" if model.in_channels == 4 else "none")
    if name == "none":
        raise InputError("DiTPipeline draws through a VAE, and this model draws pixels")

    # A folder, or else a repository of the hub, of which a copy may be in its client's cache.
    found = Path(name)
    if not found.is_dir():
        name = f"stabilityai/sd-vae-ft-{name}" if name in ("ema", "mse") else name
        try:
            found = Path(snapshot_download(name, local_files_only=True))
        except (OSError, ValueError):
            return name, "AutoencoderKL", []
    config = read_json(found / "config.json", "mend the folder of the VAE")
    if config.get("shift_factor") or config.get("latents_mean"):
        raise InputError(f"DiTPipeline only multiplies latents, and the VAE {name} shifts them too")
    return name, config["_class_name"], [found / "config.json", *diffusers_files(found)]


IN_DIFFUSERS = """```python
from diffusers import AutoencoderKL, DiTPipeline

pipe = DiTPipeline.from_pretrained("{}"{})
for module in pipe.transformer.modules():
    if hasattr(module, "time_proj"):
        module.time_proj.downscale_freq_shift = 0
pipe([0], guidance_scale=1.0, num_inference_steps=50).images[0].save("sample.png")
```
A guidance_scale above 1 needs a model of 1000 classes: 1000 is the pipeline's null label."""
CARD = """---
license: other  # FILL IN, here and at the end
library_name: diffusers
pipeline_tag: unconditional-image-generation
---
# {name}
A class-conditional Diffusion Transformer ([DiT](https://arxiv.org/abs/2212.09748)), trained on
{data} for {step} steps. {grid}

## Sampling
`python sample_grid.py --ckpt {name}` or, in diffusers:
{in_diffusers}

The known difference: diffusers embeds timesteps with other frequencies than the official DiT, and
draws other pictures unless `downscale_freq_shift` is set to 0 in each `time_proj`.

## Metrics
| metric | value | 95 % interval |
| --- | --- | --- |
{rows}

## Training
`accelerate launch train_accelerate.py{flags}`
```json
{settings}
```

## Licence
Of the weights: FILL IN. Of the data that they were trained on: FILL IN.
"""


def write_card(folder, model, source, in_diffusers):
    """README.md, the model card of a folder, and samples.png, the newest grid of the run."""
    # Weights out of a run: its settings, its last evaluation and its newest grid.
    settings, metrics = {}, {}
    log = source / "metrics.jsonl"
    if log.is_file():
        settings = read_json(source / "config.json", "give the run's weights alone")
        lines = log.read_text(errors="replace").splitlines(keepends=True)
        evaluations = [line for line in lines if '"features"' in line and line.endswith("}\n")]
        metrics = json.loads(evaluations[-1]) if evaluations else {}
    grids = sorted((source / "samples").glob("*.png"))
    if grids:
        write_atomically(folder / "samples.png", functools.partial(shutil.copyfile, grids[-1]))

    # What a person chooses makes the command; a metric is a row, with its interval if it has one.
    chosen = ("data_path", "model", "vae", "image_size", "objective", "max_steps", "epochs",
              "global_batch_size", "lr", "global_seed")
    flags = [f" --{name.replace('_', '-')} {shlex.quote(str(settings[name]))}"
             for name in chosen if settings.get(name) is not None]
    rows = []
    for name, value in metrics.items():
        if not name.endswith(("_low", "_high")):
            shown = f"{value:.4g}" if isinstance(value, float) else value
            ends = [metrics[end] for end in (f"{name}_low", f"{name}_high") if end in metrics]
            interval = " to ".join(f"{end:.4g}" for end in ends)
            rows.append(f"| {name} | {shown} | {interval} |")
    rows = rows or [f"| none yet: `evaluate.py --ckpt {folder.name}` | | |"]
    stored = dict(model=model.config, metadata=model.metadata, settings=settings)
    text = CARD.format(
        name=folder.name, in_diffusers=in_diffusers, flags="".join(flags), rows="\n".join(rows),
        grid="![Samples](samples.png)" if grids else "", data=model.metadata.get("data", "?"),
        step=model.metadata.get("step", "?"),
        settings=json.dumps(stored, indent=1, ensure_ascii=False))
    write_atomically(folder / "README.md", lambda new: new.write_text(text, "utf-8"))


def push(folder, repository):
    """Upload a folder to the hub; a repository that is new is private until its owner opens it."""
    from huggingface_hub import HfApi, get_token

    try:
        if not get_token():
            raise PermissionError("you are not logged in, run `hf auth login`")
        if not reach_hub():
            raise ConnectionError("the hub does not answer, is there a network?")
        url = HfApi().create_repo(repository, private=True, exist_ok=True)
        HfApi().upload_folder(repo_id=repository, folder_path=folder, allow_patterns=PIPELINE)
    except Exception as error:  # whatever the hub's client and its HTTP library raise
        raise InputError(f"{folder} is written, but not uploaded: {error}; "
                         f"then `hf upload {repository} {folder}`") from error
    print(f"uploaded to {url}")


def download(name):
    """The transformer folder of a name in the hub's cache, downloaded if it is not there."""
    from huggingface_hub import snapshot_download

    reach_hub()
    repository = HUB[name]
    log_stderr(f"{name}: Meta's weights, huggingface.co/{repository}, licence CC BY-NC 4.0: "
               "not for commercial use")
    wanted = ["transformer/*.json", "transformer/*.safetensors"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted)) / "transformer"
        if not any(folder.glob("*.safetensors")):
            snapshot_download(repository, allow_patterns="transformer/*.bin")
    except Exception as error:  # whatever the hub's client and its HTTP library raise
        raise hub_error(name, error, "give --ckpt its file or folder") from error
    # The hub's cache names large files by their SHA-256.
    for weights in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        if fingerprint(weights) != weights.resolve().name:
            raise InputError(f"{weights} is damaged: delete {weights.resolve()} and run again")
    return folder


# ----------------------------------------------------------------------------------- house rules


class InputError(ValueError):
    """What the user gave cannot be used. Command lines print it as one line and exit with 2."""


class RankLocalError(InputError):
    """An InputError that only one rank may hit (a broken image, say), so every rank prints it."""

    def __init__(self, message):
        # A DataLoader's worker puts its traceback above the message, which alone is for the user.
        if message.startswith("Caught "):
            message = message.rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(message.strip())


def is_rank_0():
    """Whether this process is the first of several, or alone."""
    # A RANK that some other program left in the environment means nothing to a lone process.
    return alone() or os.environ.get("RANK", "0") == "0"


def log_stderr(text, everywhere=False):
    """Print one line on stderr, on rank 0 or, if only this rank may know, everywhere."""
    if everywhere or is_rank_0():
        print(" ".join(text.split()), file=sys.stderr)


warn_once = functools.cache(log_stderr)


def note(text):
    """Print what was understood, chosen or left out: one line on stdout, on rank 0."""
    if is_rank_0():
        print("note:", " ".join(text.split()), flush=True)


def run_command(main, args=None):
    """Run `main(args)` as a command line: an InputError is one line on stderr and exit status 2.

    Ctrl-C gives status 130, output that nobody reads any more (`| head`) 141, as of any program.
    Any other exception is a bug and keeps its traceback.
    """
    try:
        main(args)
        sys.stdout.flush()  # here, or the interpreter's end would be what meets a cut pipe
    except InputError as error:
        log_stderr(f"error: {error}", everywhere=isinstance(error, RankLocalError))
        leave(2)
    except KeyboardInterrupt:
        leave(130)
    except SystemExit as error:
        leave(error.code)
    # Of pipes only that of stdout may be cut; to anything else, such as a worker, it is a bug.
    except BrokenPipeError:
        if not stdout_is_cut():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(141)
    # Beside other processes the traceback is printed at once: the end may be a long wait for them.
    except Exception as error:
        if alone():
            raise
        # When a process dies, which has said why, the others notice in their next exchange.
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):
            log_stderr("error: another process of this run has ended, or cannot be reached",
                       everywhere=True)
        else:
            traceback.print_exc()
        leave(1)


def leave(status):
    """End with a status; one of several processes at once: Python's end may wait for the others."""
    if alone():
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def alone():
    """Whether this process is not one of several that work together."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def stdout_is_cut():
    """Whether writing to stdout raises BrokenPipeError."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


@functools.cache
def reach_hub(seconds=5):
    """Whether the Hugging Face hub answers; call it before anything that may ask the hub.

    If it does not answer within seconds, its client (in diffusers and datasets too) is told that it
    is offline: what the cache holds still loads, the rest fails at once and not after retries.
    """
    from huggingface_hub import constants, get_session, logging

    logging.set_verbosity_error()  # else a line for each attempt: an error says it once
    # Said by diffusers 0.42 about an argument that huggingface_hub no longer has.
    warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`")
    answers = []

    def ask():
        with contextlib.suppress(Exception):  # of whichever HTTP library the client uses
            answers.append(get_session().head(constants.ENDPOINT, timeout=seconds))

    # In a thread, since a name server that is silent knows no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    reached = bool(answers) and answers[0].status_code < 500
    if not reached:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for workers, and libraries that are imported later
    return reached


def hub_error(what, error, instead):
    """The InputError for what cannot be had from the hub; instead: what else the user may do."""
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname  # without a user's name and password
    reason = type(error).__name__ if reach_hub() else "offline"
    return InputError(f"cannot download {what} from {host} ({reason}): is there a network? Else "
                      f"{instead}")


def fingerprint(*parts):
    """SHA-256 in hex of what the parts hold: the identity of data, weights, settings and files.

    A Path stands for its file's bytes, a tensor for its type, shape and values, a dict for its
    sorted items, bytes for themselves; anything else for its repr. One file alone gives the usual
    SHA-256.
    """
    digest = hashlib.sha256()

    # Types go in with the values, or a float32 tensor could pass for an int32 one.
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

    # The parts one after another: their order is a part of what they mean.
    for part in parts:
        add(part)
    return digest.hexdigest()


@contextlib.contextmanager
def where_supported(warning=None):
    """What some file systems cannot do (locks, chmod, fsync of folders) is left out there.

    warning: what is said then, once.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM,
                               errno.EACCES, errno.ENOLCK):
            raise
        if warning:
            warn_once(f"warning: {warning}")


def sync_folder(folder):
    """Have the names in a folder reach the disk, as after a rename."""
    with where_supported(f"{folder} is on a file system that cannot sync folders: a power failure "
                         "may lose the newest files"):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path, write):
    """Call write(temporary_path), flush to disk, rename to path: a file is whole or not there.

    A link stays one, and the file that it leads to is written. What is not a file (a device, a
    FIFO) and our own stdout get the bytes. Raises RankLocalError naming path and reason when the
    system refuses (full disk, no permission).
    """
    # Only a file can be renamed to; anything else is written into.
    with writing(path):
        if is_written_through(path):
            write_through(path, write)
        else:
            replace_file(Path(os.path.realpath(path)), write)


@contextlib.contextmanager
def writing(path, kind=RankLocalError):
    """What the system refuses to write becomes an error of a kind that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise kind(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    # torch.save says no more than this when the disk is full.
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        reason = "torch.save could not finish, is the disk full?"
        raise kind(f"cannot write {path}: {reason}") from error


def is_written_through(path):
    """Whether a path is a device, a pipe or our own stdout, which are not replaced by a file."""
    return is_stdout(path) or (Path(path).exists() and not Path(path).is_file())


def is_stdout(path):
    """Whether a path, such as /dev/stdout, is where this process prints to."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(1))
    except OSError:
        return False


def write_through(path, write):
    """Copy what write(temporary_path) made into something that is there."""
    sys.stdout.flush()
    target = os.dup(1) if is_stdout(path) else path  # after what was printed, not over it
    with tempfile.TemporaryDirectory() as folder, open(target, "wb") as device:
        temporary = Path(folder) / f"new{Path(path).suffix}"
        write(temporary)
        device.write(temporary.read_bytes())


def replace_file(path, write):
    """Write beside path, sync, and rename to it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        with where_supported():
            os.chmod(temporary, mode)  # safetensors leaves a file that only its owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        if temporary.is_file():
            temporary.unlink()


def write_json(path, value):
    """Write a JSON file whole or not at all."""
    text = json.dumps(value, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def read_json(path, mend="delete it, and the same command makes it anew"):
    """The value in a JSON file; InputError, saying how to mend it, if it is damaged or missing."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): {mend}") from error


if __name__ == "__main__":
    run_command(main, parse_args())
