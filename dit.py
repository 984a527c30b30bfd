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

"""

import json
import math
import os
import sys
import zlib
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

DIT_CONFIGS = {  # table 1 of the paper, patch sizes 2, 4, 8
    f"DiT-{size}/{patch}": dict(depth=depth, hidden_size=width, patch_size=patch, num_heads=heads)
    for size, depth, width, heads in [("XL", 28, 1152, 16), ("L", 24, 1024, 16), ("B", 12, 768, 12), ("S", 12, 384, 6)]
    for patch in (2, 4, 8)
}
DEMO_CONFIGS = {"DiT-Ti/2": dict(depth=4, hidden_size=96, patch_size=2, num_heads=3)}  # ours, for the digits demo


class InputError(ValueError):
    """What the user gave cannot be used. The command lines show its text as one line and exit with status 2."""


def run_command(main, args=None):
    """Run `main(args)` as a command line: an InputError becomes one line on stderr (of rank 0) and exit status 2."""
    try:
        main(args)
    except InputError as error:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


# ------------------------------------------------------------------------------------------------ the network


def modulate(x, shift, scale):
    """(1 + scale) * x + shift, the same for all tokens: x (N, T, D), shift and scale (N, D)."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class PatchEmbed(nn.Module):
    """Cut x (N, C, H, W) into p x p patches and project each to a token: (N, T, D), T = H/p * W/p, row by row."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, D, H/p, W/p) -> (N, T, D)


class TimestepEmbedder(nn.Module):
    """t (N,) -> (N, D): sinusoids of 128 frequencies from 1 down to 1/10000, then a two-layer MLP."""

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
    """y (N,) -> (N, D). With label dropout the table has one row more, the null label `num_classes`, for guidance."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
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

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
    ):
        if input_size % patch_size or hidden_size % num_heads or hidden_size % 4:
            raise InputError(
                f"input size {input_size} must divide by patch size {patch_size}, and hidden size {hidden_size} "
                f"by 4 and by {num_heads} heads"
            )
        super().__init__()
        self.config = dict(
            input_size=input_size,
            patch_size=patch_size,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            class_dropout_prob=class_dropout_prob,
            num_classes=num_classes,
            learn_sigma=learn_sigma,
        )
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
        positions = sincos_positions(hidden_size, input_size // patch_size)
        self.pos_embed = nn.Parameter(positions.unsqueeze(0), requires_grad=False)  # (1, T, D), fixed
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for matrices, normal(0.02) for the embeddings, zero for biases, gates (adaLN-Zero) and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.weight.shape[0], -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (
            self.y_embedder.embedding_table.weight,
            self.t_embedder.mlp[0].weight,
            self.t_embedder.mlp[2].weight,
        ):
            nn.init.normal_(weight, std=0.02)
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
            raise InputError(
                f"this DiT takes (N, {self.in_channels}, {self.input_size}, {self.input_size}), "
                f"but x is {tuple(x.shape)}"
            )
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
            raise InputError(
                "guidance needs a model trained with label dropout: this one has no null label; use cfg scale 1"
            )
        null = torch.full_like(y, self.num_classes)
        cond, uncond = self(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        n = self.in_channels if cfg_channels is None else cfg_channels
        guided = uncond[:, :n] + cfg_scale * (cond[:, :n] - uncond[:, :n])
        return torch.cat([guided, cond[:, n:]], dim=1)


def sincos_positions(hidden_size, side):
    """Fixed 2-D position embeddings, (side * side, hidden_size): first half the column, second half the row."""
    quarter = hidden_size // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angles = torch.arange(side, dtype=torch.float64, device="cpu")[:, None] * omega  # (side, D/4)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    columns = one_axis.repeat(side, 1)
    rows = one_axis.repeat_interleave(side, dim=0)
    return torch.cat([columns, rows], dim=1).float()


def build_dit(name, **overrides):
    """The model of a name in DIT_CONFIGS (or DEMO_CONFIGS); overrides are arguments of DiT. InputError if unknown."""
    configs = DIT_CONFIGS | DEMO_CONFIGS
    if name not in configs:
        raise InputError(f"unknown model {name!r}: choose one of {', '.join(configs)}")
    return DiT(**(configs[name] | overrides))


# ------------------------------------------------------------------------------------------------ weights in and out


def _checksum(state_dict):
    """CRC-32 of all tensors' bytes in the order of their names: tells damaged weights from whole ones."""
    crc = 0
    for name in sorted(state_dict):
        crc = zlib.crc32(state_dict[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def write_atomically(path, write):
    """Call write(temporary_path), flush, then rename it to path: the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path, model, **metadata):
    """Write a model's weights, float32 as they are, to a .safetensors file that also carries its config and metadata.

    metadata: any JSON values (step, class_names, vae ...); load_checkpoint returns them as `model.metadata`.
    """
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    header = dict(config=json.dumps(model.config), metadata=json.dumps(metadata), crc32=_checksum(state_dict))
    write_atomically(path, lambda temporary: save_file(state_dict, temporary, metadata=header))


def load_checkpoint(path_or_name, device="cpu"):
    """A DiT in eval mode from a run's folder (newest EMA weights), one of our .safetensors files, an official .pt, ...

    Raises InputError when nothing is there, the file is damaged or the weights do not fit.
    """
    path = Path(path_or_name)
    if path.is_dir():
        found = sorted(path.glob("checkpoints/[0-9]*/ema.safetensors")) or sorted(path.glob("ema.safetensors"))
        if not found:
            raise InputError(f"no checkpoint in {path}: expected checkpoints/*/ema.safetensors")
        path = found[-1]
    if not path.is_file():
        raise InputError(f"no checkpoint at {path_or_name}: give a run's folder or a .safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if "config" not in header:
        raise InputError(f"{path} has no model config in its metadata: it was not written by save_checkpoint")
    if header.get("crc32") != _checksum(state_dict):
        raise InputError(f"{path} is damaged: its checksum does not match its tensors")
    model = DiT(**json.loads(header["config"]))
    model.load_state_dict(state_dict)
    model.metadata = json.loads(header["metadata"])
    return model.to(device).eval()
