"""The inputs and weights of the golden figures in tests/data, which a formula gives."""

import math
import zlib

import numpy as np
import torch


def formula(name, shape, seed):
    """The golden weights and inputs: a hash of (seed, name, index), uniform, mean 0, variance 1."""
    mask = np.uint64(0xFFFFFFFF)
    h = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B1)
    h = (h + np.uint64(zlib.crc32(f"{seed}:{name}".encode()))) & mask
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h ^= h >> np.uint64(shift)
        h = h * np.uint64(factor) & mask
    u = ((h >> np.uint64(8)).astype(np.float64) + 0.5) / 2**24
    return torch.from_numpy(((u - 0.5) * 3.4641016151377544).astype(np.float32).reshape(shape))


def fill(model, seed, small=False):
    """Give every weight the golden value of its name; returns the model, ready to evaluate.

    Embeddings x 0.5, vectors x 0.1, matrices x 1 / sqrt(fan in). small: tokens near 1e-3, so that
    the epsilon of LayerNorm shows.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        shape = tuple(tensor.shape)
        if "table" in name:
            gain = 0.5
        elif len(shape) == 1:
            gain = 0.1
        else:
            gain = 1 / math.sqrt(math.prod(shape[1:]))
        if name == "pos_embed":
            state[name] = formula(name, shape, seed) if small else tensor
        else:
            state[name] = formula(name, shape, seed) * np.float32(gain)
        to_tokens = name.startswith(("pos_embed", "x_embedder"))
        if small and (to_tokens or ".attn.proj" in name or ".mlp.fc2" in name):
            state[name] = state[name] * np.float32(0.001)
    model.load_state_dict(state)
    return model.eval()
