"""BEiT's networks in plain PyTorch: the ViT backbone, its heads, weights in and out.

    python model.py export --weights=out/beit_base/checkpoint.pt --to=transformers OUT

Read `BEiT.forward` first, then `ViT.encode`. Parameter names are those of the official checkpoints
(github.com/microsoft/unilm, beit), which timm shares, so weights move both ways with no map.
Shapes: B images, N = h * w patches of a (h, w) grid, D channels, a [CLS] token before the patches.
"""

import argparse
import importlib
import json
import math
import os
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_gather
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from torch.utils.checkpoint import checkpoint

from masking import NORMS, BadInput, copy_to

# Layers / width / heads: base and large are table 12's, tiny and small DeiT's, nano is the demos',
# minutes on two CPU cores. LayerScale's init, of a variant that has it, is the official code's.
VIT_SIZES = {
    "nano": dict(dim=64, depth=6, heads=4, layer_scale=0.1),
    "tiny": dict(dim=192, depth=12, heads=3, layer_scale=0.1),
    "small": dict(dim=384, depth=12, heads=6, layer_scale=0.1),
    "base": dict(dim=768, depth=12, heads=12, layer_scale=0.1),
    "large": dict(dim=1024, depth=24, heads=16, layer_scale=1e-5),
}
# Why two variants? All of the paper's tables but 5 to 7 use the plain ViT, to compare with others'.
# LayerScale and relative positions then gave more: 83.22% top-1 instead of 82.86% (table 5), so
# nearly all checkpoints that the authors released have them.
VARIANTS = {
    "paper": dict(position="absolute", layer_scale=0.0),
    "released": dict(position="shared_relative"),
}


@dataclass
class ViTConfig:
    image_size: int = 224  # pixels per side
    patch_size: int = 16  # pixels per side
    dim: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    drop_path: float = 0.0  # stochastic depth of the last block; grows linearly from 0 at the first
    position: str = "absolute"  # or "relative" (a table per layer), "shared_relative" (one)
    layer_scale: float = 0.0  # initial gain of every residual branch; 0 = no such parameters

    def __post_init__(self):
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise BadInput(f"image_size={self.image_size} is no multiple of patch_size="
                           f"{self.patch_size}")
        if self.dim % self.heads:
            raise BadInput(f"dim={self.dim} is no multiple of heads={self.heads}")
        if not 0 <= self.drop_path < 1:
            raise BadInput(f"drop_path={self.drop_path} is not from 0 to below 1")

    @property
    def grid(self):
        return self.image_size // self.patch_size  # patches per side

    @classmethod
    def named(cls, size, variant="paper", **changes):
        """The config of a size and a variant, e.g. `ViTConfig.named("base", "released")`."""
        for name, table in ((size, VIT_SIZES), (variant, VARIANTS)):
            if name not in table:
                raise BadInput(f"{name!r} is none of {', '.join(table)}")
        return cls(**{**VIT_SIZES[size], **VARIANTS[variant], **changes})


class PatchEmbed(nn.Module):
    """Cut (B, 3, H, W) into patches and project each: (B, N, D)."""

    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)

    def forward(self, images):
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise BadInput(f"images of {height}x{width} pixels: the sides are to be multiples of "
                           f"patch_size={self.patch_size}")
        pixels = F.pixel_unshuffle(images, self.patch_size).flatten(2).transpose(1, 2)
        # this is self.proj(images) as one matrix product, which is faster
        return F.linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


def bias_table(config):
    """A table of relative position biases: a row for every offset between two patches, and three
    more for [CLS] to patch, patch to [CLS] and [CLS] to itself; a column per head."""
    return nn.Parameter(torch.zeros((2 * config.grid - 1) ** 2 + 3, config.heads))


def relative_position_index(height, width):
    """The table's row for each query and key: (1 + N, 1 + N and more) int64, N = height * width. It
    is padded to a multiple of 8: fused attention kernels copy a bias whose rows end elsewhere."""
    side = 2 * width - 1
    place = (side * torch.arange(height)[:, None] + torch.arange(width)).flatten()  # (N,)
    middle = (height - 1) * side + width - 1  # the row of offset (0, 0)
    index = F.pad(place[:, None] - place[None, :] + middle, (1, 0, 1, 0))
    last = (2 * height - 1) * side
    index[0, :], index[:, 0], index[0, 0] = last, last + 1, last + 2
    return F.pad(index, (0, -len(index) % 8))


class Attention(nn.Module):
    """Multi-head self-attention with biases on queries and values but none on keys."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.dim))
        self.v_bias = nn.Parameter(torch.zeros(config.dim))
        self.proj = nn.Linear(config.dim, config.dim)
        if config.position == "relative":
            self.relative_position_bias_table = bias_table(config)

    def queries_keys_values(self, x):
        """(B, 1 + N, D) -> three times (B, heads, 1 + N, D / heads)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        return qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x, bias=None):
        """(B, 1 + N, D) -> the same; `bias`, as from position_biases, is added to the logits."""
        q, k, v = self.queries_keys_values(x)
        bias = None if bias is None else bias.to(q.dtype)[None, :, :, : k.shape[2]]
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # (B, heads, 1 + N, D / heads)
        return self.proj(x.transpose(1, 2).flatten(2))

    def attention_probs(self, x, bias=None):
        """What `forward` applies but never stores: (B, heads, queries, keys), rows sum to 1."""
        q, k, _ = self.queries_keys_values(x)
        logits = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        return (logits if bias is None else logits + bias[..., : k.shape[2]]).softmax(dim=3)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.dim, int(config.dim * config.mlp_ratio))
        self.fc2 = nn.Linear(int(config.dim * config.mlp_ratio), config.dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm transformer block with LayerScale and stochastic depth, both optional."""

    def __init__(self, config, drop_path):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = MLP(config)
        self.gamma_1 = self.gamma_2 = None
        if config.layer_scale:
            self.gamma_1 = nn.Parameter(torch.full((config.dim,), config.layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((config.dim,), config.layer_scale))

    def forward(self, x, bias=None):
        """(B, 1 + N, D) -> the same; `bias` as in Attention."""
        x = x + self.scale(self.attn(self.norm1(x), bias), self.gamma_1)
        return x + self.scale(self.mlp(self.norm2(x)), self.gamma_2)

    def scale(self, x, gamma):
        """A residual branch (B, 1 + N, D) times gamma, and stochastic depth: training drops a share
        drop_path of the samples and makes the others larger, so that the mean stays."""
        x = x if gamma is None else gamma * x
        if not self.training or self.drop_path == 0:
            return x
        kept = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * kept / (1 - self.drop_path)


class ViT(nn.Module):
    """The backbone: patches, then blocks. Subclasses add a head under the official names. Image
    sides may be any multiples of the patch size: positions are interpolated."""

    resize = "bicubic"  # how positions are interpolated (F.interpolate's mode)
    checkpointing = False  # keep only what enters a block for the backward pass: a third slower

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.pos_embed = None
        if config.position == "absolute":
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + config.grid**2, config.dim))
        else:
            index = relative_position_index(config.grid, config.grid)
            self.register_buffer("relative_index", index, persistent=False)
        if config.position == "shared_relative":
            table = {"relative_position_bias_table": bias_table(config)}
            self.rel_pos_bias = nn.ParameterDict(table)
        last = max(1, config.depth - 1)
        rates = [config.drop_path * number / last for number in range(config.depth)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)

    @torch.no_grad()
    def init_weights(self):
        """The paper's init (sec. 2.5): a normal of std 0.02, cut at one std as in the official
        pre-training. The l-th block's output matrices are divided by sqrt(2l), which the paper
        found to stabilize training. Our reading: 2l branches are added to the residual stream by
        then, and its variance would otherwise grow with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1 and not name.endswith("relative_position_bias_table"):
                nn.init.trunc_normal_(parameter, std=0.02, a=-0.02, b=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        for number, block in enumerate(self.blocks, 1):
            block.attn.proj.weight.div_(math.sqrt(2 * number))
            block.mlp.fc2.weight.div_(math.sqrt(2 * number))

    def position_biases(self, grid):
        """For each block what is added to its attention logits: (heads, 1 + N, 1 + N, padded to a
        multiple of 8) or None; `grid` is (height, width) of the patches."""
        if self.config.position == "absolute":
            return [None] * len(self.blocks)
        if self.config.position == "relative":
            tables = [block.attn.relative_position_bias_table for block in self.blocks]
        else:
            tables = list(self.rel_pos_bias.values())
        index = self.relative_index
        if grid != (self.config.grid, self.config.grid):
            tables = [resize_positions(table, *grid, self.resize) for table in tables]
            index = copy_to(index.device, relative_position_index(*grid))
        # not table[index]: its backward adds up in any order, so a resumed run would differ
        biases = [F.embedding(index, table).permute(2, 0, 1).contiguous() for table in tables]
        return biases * (len(self.blocks) // len(biases))  # a shared one goes to every block

    def encode(self, patches, grid):
        """Patch embeddings (B, N, D) of a grid (height, width) -> the features that enter the first
        block and those that leave each block: a list of depth + 1 times (B, 1 + N, D)."""
        x = torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
        if self.pos_embed is not None:
            x = x + resize_positions(self.pos_embed, *grid, self.resize)
        layers = [x]
        for block, bias in zip(self.blocks, self.position_biases(grid)):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, bias)
            layers.append(x)
        return layers

    def grid_of(self, images):
        """(height, width) of the patches of images (B, 3, H, W)."""
        return tuple(side // self.config.patch_size for side in images.shape[2:])

    def layers(self, images):
        """Images (B, 3, H, W), normalized -> what `encode` gives."""
        return self.encode(self.patch_embed(images), self.grid_of(images))

    def features(self, images):
        """Images (B, 3, H, W), normalized -> features (B, 1 + N, D), before any final norm."""
        return self.layers(images)[-1]

    forward = features  # subclasses add a head

    def attention_probs(self, images):
        """What the last block attends to in images (B, 3, H, W), normalized: as in Attention."""
        last = self.blocks[-1]
        bias = self.position_biases(self.grid_of(images))[-1]
        return last.attn.attention_probs(last.norm1(self.layers(images)[-2]), bias)

    def mean_features(self, images):
        """Images (B, 3, H, W), normalized -> for each block the mean of its patches' features, for
        probes (app. D) and nearest neighbours: (depth, B, D). That they are normalized is ours."""
        means = torch.stack([x[:, 1:].mean(dim=1) for x in self.layers(images)[1:]])
        return F.layer_norm(means, means.shape[2:])


class BEiT(ViT):
    """Masked image modelling (sec. 2.3): predict the visual tokens of the masked patches. This is
    BERT's masked language modelling, where a patch is the word and a block of them the n-gram."""

    def __init__(self, config, vocab_size):
        super().__init__(config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.lm_head = nn.Linear(config.dim, vocab_size)
        self.init_weights()

    def forward(self, images, mask, positions=None):
        """Images (B, 3, H, W), normalized, and mask (B, h, w) bool, True = masked -> logits (sum of
        mask, vocab) of the masked patches, in the order of `tokens[mask]`. `positions` (K,) int64
        asks for other patches, by their numbers among all B * h * w."""
        if positions is None:
            positions = mask.flatten().nonzero().squeeze(1)
        return self.predict(self.masked_features(images, mask), positions)

    def masked_features(self, images, mask):
        """The features (B, 1 + N, D) of images whose masked patches are not seen."""
        patches = self.patch_embed(images)                                              # (B, N, D)
        patches = torch.where(mask.flatten(1).unsqueeze(2), self.mask_token, patches)   # (B, N, D)
        return self.encode(patches, tuple(mask.shape[1:]))[-1]

    def predict(self, features, positions):
        """Features (B, 1 + N, D) -> logits (K, vocab) of the patches at `positions` (K,)."""
        return self.lm_head(self.norm(features[:, 1:].flatten(0, 1)[positions]))


class Classifier(ViT):
    """Fine-tuning (sec. 2.6): the mean of the patches' features, a norm as in the official code and
    a linear layer."""

    def __init__(self, config, num_classes):
        super().__init__(config)
        self.fc_norm = nn.LayerNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, num_classes)
        self.init_weights()
        with torch.no_grad():  # near-zero logits: early gradients do not disturb the backbone
            self.head.weight.mul_(0.001)

    def forward(self, images):
        """Images (B, 3, H, W), normalized -> logits (B, classes)."""
        return self.head(self.fc_norm(self.features(images)[:, 1:].mean(dim=1)))


class LinearProbes(ViT):
    """Linear classifiers of a frozen network's mean features (app. D), one for each of `layers`,
    which count from 1. One pass of the network serves them all.

    Why are they weak, 56.7% on base's 9th layer to DINO's 78.2%? Nothing in BEiT's loss gathers an
    image in one vector, as DINO's does. Full fine-tuning eliminates the gap: 83.2% to 82.8%."""

    def __init__(self, config, num_classes, layers):
        super().__init__(config)
        self.requires_grad_(False)
        self.probed = layers
        self.probes = nn.ModuleList(nn.Linear(config.dim, num_classes) for _ in layers)

    def forward(self, images):
        """Images (B, 3, H, W), normalized -> logits (probes, B, classes)."""
        with torch.no_grad():
            means = self.mean_features(images)  # (depth, B, D)
        probes = zip(self.probes, self.probed, strict=True)
        return torch.stack([probe(means[layer - 1]) for probe, layer in probes])


class UpsamplingHead(nn.Module):
    """SETR's progressive upsampling: a LayerNorm, for each of `scales` a 3x3 convolution to 256
    channels, batch norm, ReLU and a bilinear upsampling by this scale, then a 1x1 convolution."""

    def __init__(self, dim, num_classes, scales):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        width = min(256, dim)  # else the head would be most of a small network's work
        layers = []
        for number, scale in enumerate(scales):
            layers += [nn.Conv2d(width if number else dim, width, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            layers += [nn.Upsample(scale_factor=scale, mode="bilinear")]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, num_classes, 1))

    def forward(self, x):
        """Patch features (B, h, w, D) -> logits (B, classes, h * product of scales, w * ...)."""
        return self.layers(self.norm(x).permute(0, 3, 1, 2).contiguous())


# Depth -> the layers, from 1, that auxiliary heads see in SETR (for 12, in its configs with DeiT)
AUXILIARY = {12: [5, 8, 10, 12], 24: [10, 15, 20, 24]}


class Segmenter(ViT):
    """SETR-PUP (arXiv 2012.15840) on BEiT: a class per pixel, from the last layer's patches.
    Auxiliary heads on four layers are used in training only."""

    resize = "bilinear"

    def __init__(self, config, num_classes):
        super().__init__(config)
        halvings = config.patch_size.bit_length() - 1
        if config.patch_size != 2**halvings or not halvings:
            raise BadInput(f"patch_size={config.patch_size}: to be segmented, a power of two")
        quarters = [round(config.depth * k / 4) for k in (1, 2, 3, 4)]
        self.auxiliary = AUXILIARY.get(config.depth, quarters)
        self.head = UpsamplingHead(config.dim, num_classes, [2] * halvings)
        scales = [min(4, config.patch_size)]
        heads = [UpsamplingHead(config.dim, num_classes, scales) for _ in self.auxiliary]
        self.aux_heads = nn.ModuleList(heads)
        self.init_weights()

    def forward(self, images):
        """Images (B, 3, H, W), normalized -> logits (B, classes, H, W); in training a list of them,
        the first of the head and the rest of the auxiliary heads."""
        grid = self.grid_of(images)
        maps = [x[:, 1:].unflatten(1, grid) for x in self.layers(images)]  # (B, h, w, D) each
        logits = self.head(maps[-1])
        if not self.training:
            return logits
        extra = [head(maps[layer]) for head, layer in zip(self.aux_heads, self.auxiliary)]
        return [logits] + [F.interpolate(x, size=images.shape[2:], mode="bilinear") for x in extra]


def param_groups(model, weight_decay, layer_decay=1.0):
    """An optimizer's groups of a network's trained parameters. `weight_decay` spares biases, norms,
    LayerScale and the embeddings but mask_token, as in the official code. `lr_scale`, a group's
    share of the learning rate, is layer_decay ** (depth + 1 - layer) (table 13): the embeddings,
    whose names have no dot, are layer 0, the l-th block is layer l and all above is layer depth +
    1. Groups with `matrix` hold 2-D weights, as linear layers have."""
    named = dict(model.named_parameters())
    layers = {name: int(name.split(".")[1]) + 1 for name in named if name.startswith("blocks.")}
    top = max(layers.values(), default=0) + 1
    groups = {}
    for name, parameter in named.items():
        is_embedding = "." not in name
        layer = layers.get(name, 0 if is_embedding or name.startswith("patch_embed.") else top)
        decays = parameter.dim() > 1 and (not is_embedding or name == "mask_token")
        matrix = parameter.dim() == 2 and name.endswith(".weight")
        if parameter.requires_grad:
            key = (layer_decay ** (top - layer), weight_decay if decays else 0.0, matrix)
            groups.setdefault(key, []).append(parameter)
    names = ("lr_scale", "weight_decay", "matrix")
    return [dict(zip(names, key), params=params) for key, params in groups.items()]


# ---- contrastive losses --------------------------------------------------------------------------
# They compare two views of the same images. App. E has DINO's, a self-distillation, beside MIM.


class ContrastiveLoss(nn.Module):
    """A loss between the outputs of two views of B images; `config` is the run's. Subclasses have

    make_head(dim, hidden)  a projector of features (B, dim), with `hidden` units in its hidden
                            layers: all that is trained, the loss itself has no parameters
    forward(student, other, progress)
                            outputs (B, D) of this process -> the loss, summed over B; `other` is
                            the teacher's or the student's of another view, progress from 0 to 1
    """

    has_teacher = False  # whether the other view is a teacher's, or the student's own
    # whether it compares the images of a batch, or its head has a batch norm: no micro-batches then
    needs_whole_batch = True
    sees_local_crops = False  # whether --local_crops has small views for it
    sums_pairs = False  # whether several pairs of views are added up, or averaged
    freezes_patches = False  # whether alone, without MIM, it keeps the patch projection at its init
    crop_area = (0.08, 1.0)  # (least, most) share of the image that a whole view shows
    projector_dim = 2048  # the method's own, where --projector_dim is 0
    teacher_momentum = 0.996  # the method's own, where --teacher_momentum is 0

    def __init__(self, config):
        super().__init__()

    def teacher_outputs(self, head, x):
        """What the teacher's `head` makes of features (B, dim)."""
        return head(x)

    def after_step(self):
        """Called when the weights have changed."""


class DINO(ContrastiveLoss):
    """Self-distillation (arXiv 2104.14294, eq. 3): cross entropy of the student's prototypes with
    the teacher's, whose running mean, the center, is taken out so that no prototype wins always."""

    has_teacher = True
    needs_whole_batch = False
    sees_local_crops = True

    def __init__(self, config):
        super().__init__(config)
        self.crop_area = (0.4 if config.local_crops else 0.14, 1.0)  # as their main_dino.py advises
        self.prototypes = config.prototypes
        self.temperature = config.teacher_temperature
        self.register_buffer("center", torch.zeros(config.prototypes))
        self.register_buffer("scores", torch.zeros(1 + config.prototypes), persistent=False)

    def make_head(self, dim, hidden):
        return DINOHead(dim, hidden, self.prototypes)

    def forward(self, student, other, progress):
        # the teacher's temperature rises for a tenth of the run (its authors' for 30 epochs)
        temperature = 0.04 + (self.temperature - 0.04) * min(1, progress / 0.1)
        self.scores[0] += len(other)
        self.scores[1:] += other.sum(dim=0)
        teacher_probs = ((other - self.center) / temperature).softmax(dim=1)
        student_log_probs = (student / 0.1).log_softmax(dim=1)
        return -(teacher_probs * student_log_probs).sum()

    def after_step(self):
        """The center follows the mean of the teacher's scores over the global batch (eq. 4)."""
        if dist.is_initialized():
            dist.all_reduce(self.scores)
        self.center.mul_(0.9).add_(0.1 * self.scores[1:] / self.scores[0])
        self.scores.zero_()


class MoCo(ContrastiveLoss):
    """MoCo v3 (arXiv 2104.02057): find the teacher's other view of an image in the global batch."""

    has_teacher = True
    freezes_patches = True  # else the training of a ViT is unstable (its sec. 4.2)
    sums_pairs = True
    projector_dim = 4096
    teacher_momentum = 0.99
    temperature = 0.2

    def make_head(self, dim, hidden):
        """A projector, and a predictor that only the student uses: (B, dim) -> (B, 256)."""
        return nn.Sequential(make_mlp(dim, hidden, hidden, 256, norm=True),
                             make_mlp(256, hidden, 256, norm=True))

    def teacher_outputs(self, head, x):
        return head[0](x)

    def forward(self, student, other, progress):
        queries = F.normalize(student, dim=1)
        keys = F.normalize(gather(other), dim=1)
        logits = queries @ keys.T / self.temperature  # (B, global batch)
        labels = own_rows(queries)
        return 2 * self.temperature * F.cross_entropy(logits, labels, reduction="sum")


class SimCLR(ContrastiveLoss):
    """SimCLR (arXiv 2002.05709, eq. 1): find an image's other view in the batch. No teacher."""

    temperature = 0.1

    def make_head(self, dim, hidden):
        return make_mlp(dim, hidden, 128, norm=False)

    def forward(self, student, other, progress):
        a = F.normalize(student, dim=1)
        b = F.normalize(other, dim=1)
        keys = torch.cat([gather(a), gather(b)])
        rows = own_rows(a)
        itself = torch.cat([rows, rows + len(keys) // 2])  # (2 * B,)
        logits = torch.cat([a, b]) @ keys.T / self.temperature  # (2 * B, 2 * global batch)
        logits = logits.scatter(1, itself[:, None], -math.inf)
        labels = itself.roll(len(rows))  # of the other view
        return F.cross_entropy(logits, labels, reduction="sum") / 2


def own_rows(x):
    """Where the rows of x (B, D) are among those of all processes: (B,) int64."""
    first = dist.get_rank() * len(x) if dist.is_initialized() else 0
    return first + torch.arange(len(x), device=x.device)


def gather(x):
    """The rows of x (B, D) of all processes, (B * processes, D). Gradients flow back to each."""
    return torch.cat(all_gather(x.contiguous())) if dist.is_initialized() else x


class GlobalBatchNorm(nn.BatchNorm1d):
    """SyncBatchNorm for any device: each process computes all rows, which is cheap for (B, D)."""

    def forward(self, x):
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        return super().forward(gather(x)).chunk(dist.get_world_size())[dist.get_rank()]


def make_mlp(*dims, norm, act=nn.ReLU):
    """Linear layers, with an activation between them and batch norm if asked."""
    layers = []
    for number, (before, after) in enumerate(zip(dims, dims[1:]), 2):
        last = number == len(dims)
        layers += [nn.Linear(before, after, bias=not norm)]
        layers += [GlobalBatchNorm(after, affine=not last)] if norm else []
        layers += [] if last else [act()]
    return nn.Sequential(*layers)


class DINOHead(nn.Module):
    """Scores (B, prototypes) of (B, dim): three layers down to 256 channels of length 1, and
    weight-normed prototypes whose gain stays 1 (DINO, arXiv 2104.14294)."""

    def __init__(self, dim, hidden, prototypes):
        super().__init__()
        self.mlp = make_mlp(dim, hidden, hidden, 256, norm=False, act=nn.GELU)
        self.prototypes = nn.Parameter(torch.empty(prototypes, 256))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)

    def forward(self, x):
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):  # too coarse for a temperature of 0.04
            return F.linear(F.normalize(x.float()), F.normalize(self.prototypes))


CONTRASTIVE_LOSSES = {"none": None, "dino": DINO, "moco": MoCo, "simclr": SimCLR}


# ---- loading and exporting weights ---------------------------------------------------------------

@contextmanager
def write_atomically(path, keep=None):
    """A binary file for a with statement: a temporary one, which is synced and renamed at the end,
    so that a kill leaves the old file or the new one. The old one moves to `keep`, if given."""
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f"{name[-40:]}.{os.getpid()}.tmp")  # names have a limit
    try:
        with open(temporary, "wb") as file:
            try:
                yield file
            except RuntimeError as error:  # torch.save's, which does not say that the disk is full
                raise error.__context__ or error
            file.flush()
            os.fsync(file.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


class Opaque:
    """What read_checkpoint makes of every object that is neither a tensor nor a plain value."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass


def read_checkpoint(path):
    """The dict that torch.save or safetensors wrote to `path`, on the CPU; {} if it is no dict. No
    code can run: all but tensors and plain values, such as callbacks, becomes empty objects."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file; give a checkpoint.pt or an official .pth file")
    safetensors = str(path).endswith(".safetensors") and optional("safetensors.torch", path)
    try:
        if safetensors:
            return safetensors.load_file(path)
        zipped = zipfile.is_zipfile(path)  # as torch has written them since 1.6
        names = get_unsafe_globals_in_checkpoint(path) if zipped else ["argparse.Namespace"]
        with safe_globals([(Opaque, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        with open(path, "rb") as file:
            start = file.read(24)
        raise BadInput(f"{path}: damaged, or no checkpoint of plain tensors "
                       f"({short_message(error)}); it begins with {start}: in place of a Git LFS "
                       "pointer, a web page or an archive bring the file itself") from error
    return content if isinstance(content, dict) else {}


def short_message(error):
    """The line of an error that says what went wrong: torch's begin with advice or a headline."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    telling = ("WeightsUnpickler error", "Unsupported operand", "Missing key", "Unexpected key",
               "size mismatch")
    return next((line for line in lines if line.startswith(telling)), lines[0])[:200]


# Our name, the name in transformers' files and, if it differs, in the memory of transformers 5. An
# entry with a dot in front stands for a part of a name, any other for the beginning of one.
HF_NAMES = [
    ("blocks.", "encoder.layer.", "layers."),
    ("rel_pos_bias.", "encoder.relative_position_bias.", "shared_position_bias."),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.q_bias", ".attention.attention.query.bias", ".attention.q_proj.bias"),
    (".attn.v_bias", ".attention.attention.value.bias", ".attention.v_proj.bias"),
    (".attn.q.", ".attention.attention.query.", ".attention.q_proj."),
    (".attn.k.", ".attention.attention.key.", ".attention.k_proj."),
    (".attn.v.", ".attention.attention.value.", ".attention.v_proj."),
    (".attn.rel", ".attention.attention.relative_position_bias.rel", ".relative_position_bias.rel"),
    (".attn.proj.", ".attention.output.dense.", ".attention.o_proj."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
    (".gamma_1", ".lambda_1"),
    (".gamma_2", ".lambda_2"),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("fc_norm.", "pooler.layernorm."),
    ("norm.", "layernorm."),
    ("head.", "classifier."),
]
HF_HEADS = ("layernorm.", "classifier.", "lm_head.")  # the rest is in the backbone, "beit."


def rename(name, pairs):
    for old, new in pairs:
        if name.startswith(old) or (old[0] == "." and old in name):
            name = name.replace(old, new, 1)
    return name


def from_transformers(state):
    """Names that are ours already stay as they are."""
    pairs = [(theirs, ours) for ours, *others in HF_NAMES for theirs in others]
    out = {rename(name, pairs): value for name, value in state.items()}
    for name in [name for name in out if name.endswith("attn.q.weight")]:
        parts = [out.pop(name.replace("q.weight", f"{part}.weight")) for part in "qkv"]
        out[name.replace("q.weight", "qkv.weight")] = torch.cat(parts)
    return out


def to_transformers(state):
    pairs = [(ours, theirs) for ours, theirs, *_ in HF_NAMES]
    for name in [name for name in state if name.endswith("qkv.weight")]:
        thirds = zip("qkv", state.pop(name).chunk(3), strict=True)
        state |= {name.replace("qkv", part): third for part, third in thirds}
    out = {}
    for name, value in state.items():
        name = rename(name, pairs)
        out[name if name.startswith(HF_HEADS) else f"beit.{name}"] = value.contiguous()
    return out


# What compilation, checkpointed activations, sharding and transformers add to parameters' names
WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|beit|"
                      r"data2vec_vision)\.")
# The official name or transformers' that shows where a BEiT is, and what may stand before it
ANCHOR = re.compile(r"(.*\.|)(patch_embed\.proj|embeddings\.patch_embeddings\.projection)\.weight")


def flatten(tree, prefix=""):
    """The tensors of nested dictionaries: {"a": {"b": tensor}} -> {"a.b": tensor}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        elif torch.is_tensor(value):
            flat[WRAPPERS.sub("", f"{prefix}{key}")] = value
    return flat


def find_network(checkpoint):
    """(state, part): the first BEiT in a checkpoint, under its official names, and what stands
    before its names there, such as "state_dict.backbone"; ({}, "") if there is none."""
    tensors = flatten(checkpoint)
    prefixes = [match[1] for match in map(ANCHOR.fullmatch, tensors) if match]
    if not prefixes:
        return {}, ""
    averages = {"ema", "teacher", "averaged"}  # over training: better than the last weights
    prefix = min(prefixes, key=lambda prefix: averages.isdisjoint(re.split(r"[._]", prefix)))
    # the official files hold the tables' index too, which follows from the grid
    state = from_transformers({
        name.removeprefix(prefix): value for name, value in tensors.items()
        if name.startswith(prefix) and not name.endswith("relative_position_index")
    })
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        # of a plain ViT, such as DINO's: its bias on keys changes no softmax over the keys
        query, _, value = state.pop(name).chunk(3)
        state |= {name.replace("qkv.", "q_"): query, name.replace("qkv.", "v_"): value}
    return state, prefix.rstrip(".")


def read_network(path):
    """(weights under the official names, their ViTConfig, a dict of what else is known) of the BEiT
    in a transformers folder or a file: one of our checkpoints, an official .pth, a state dict of
    timm or transformers, or what holds one of these. The number of heads that it does not say is
    that of the size with its width and depth, or each has 64 channels (table 12). The dict has the
    "part" of the file that was read, whether it has the "heads", and, if the file holds them,
    "config" (the run's options) and "classes" (their names)."""
    path = str(path)
    checkpoint = read_folder(path) if os.path.isdir(path) else read_checkpoint(path)
    arch = checkpoint.get("arch")
    known = {}
    if isinstance(arch, dict) and "heads" in arch:  # ours
        known = {name: checkpoint[name] for name in ("config", "classes") if name in checkpoint}
        checkpoint.pop("objective", None)  # the same network again, and a teacher
    else:
        arch = {}
    known["ours"] = "dim" in arch  # a transformers folder knows no more than the heads
    state, known["part"] = find_network(checkpoint)
    needed = {"cls_token", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"}
    if not needed <= state.keys() or state["patch_embed.proj.weight"].dim() != 4:
        names = ", ".join([str(name) for name in checkpoint][:3]) or "no names"
        raise BadInput(f"{path}: no weights of a BEiT; it holds {names}; give a checkpoint or a "
                       "model's state_dict()")
    # a block with all that a BEiT's can have: a ViT with more, such as biases on keys, is none
    block = Block(ViTConfig(16, 16, 1, 1, 1, position="relative", layer_scale=0.1), 0.0)
    names = [name.removeprefix("blocks.0.") for name in state if name.startswith("blocks.0.")]
    if strange := [name for name in names if name not in block.state_dict()]:
        raise BadInput(f"{path}: a ViT with {strange[0]}, no BEiT")
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    tables = [v for k, v in state.items() if k.endswith("relative_position_bias_table")]
    if "pos_embed" in state:
        position = "absolute"
        grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    else:
        shared = "rel_pos_bias.relative_position_bias_table" in state
        position = "shared_relative" if shared else "relative"
        grid = (math.isqrt(len(tables[0]) - 3) + 1) // 2 if tables else 14
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    heads = {(s["dim"], s["depth"]): s["heads"] for s in VIT_SIZES.values()}
    known["heads"] = bool(tables) or "heads" in arch
    found = dict(
        image_size=grid * patch, patch_size=patch, dim=dim, depth=depth, position=position,
        heads=tables[0].shape[1] if tables else heads.get((dim, depth), dim // 64 or 1),
        mlp_ratio=len(state["blocks.0.mlp.fc1.weight"]) / dim,
        layer_scale=0.1 if "blocks.0.gamma_1" in state else 0.0,
    )
    return state, ViTConfig(**{**found, **arch}), known


def read_folder(path):
    """A transformers folder in the form of our checkpoints."""
    files = {name: os.path.join(path, name) for name in os.listdir(path)}
    weights = files.get("model.safetensors") or files.get("pytorch_model.bin")
    if not weights or "config.json" not in files:
        raise BadInput(f"{path}: no transformers folder, which holds config.json and "
                       "model.safetensors or pytorch_model.bin; give such a folder or a file")
    hf_config = read_json(files["config.json"])
    if hf_config.get("model_type") not in ("beit", "data2vec-vision"):
        raise BadInput(f"{path}: model_type is {hf_config.get('model_type')!r}, not 'beit' or "
                       "'data2vec-vision'")
    checkpoint = read_checkpoint(weights)
    checkpoint["arch"] = {"heads": hf_config.get("num_attention_heads", 12)}
    if labels := hf_config.get("id2label"):
        checkpoint["classes"] = [labels[number] for number in sorted(labels, key=int)]
    if "preprocessor_config.json" in files:
        processor = read_json(files["preprocessor_config.json"])
        norm = "half" if processor.get("image_mean") == [0.5, 0.5, 0.5] else "imagenet"
        size = processor.get("size")
        edge = size.get("shortest_edge") if isinstance(size, dict) else None
        share = hf_config.get("image_size", 224) / edge if edge else 1.0
        checkpoint["config"] = {"norm": norm, "eval_crop": share}
    return checkpoint


def read_json(path):
    try:
        with open(path) as file:
            return json.load(file)
    except ValueError as error:
        raise BadInput(f"{path}: damaged, no JSON ({error}); remove or restore it") from error


def optional(module, purpose):
    """A module of a package that nothing else needs."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise BadInput(f"{purpose}: first pip install {module.partition('.')[0]}") from None


def load_weights(model, path, head=False):
    """Copy the weights in `path` (what read_network reads) into `model` by name. Positions for
    another image size are interpolated. A table that is shared by all layers is copied to layers
    with their own tables, and these become one by their mean. Heads and final norms keep their init
    if they are missing or have another size, unless `head` asks for them. Returns lines that say
    what was loaded, left out, newly initialized, assumed. Raises BadInput naming the first tensor
    that is missing, has another shape or has no place."""
    state, config, known = read_network(path)
    target = model.state_dict()
    table = "relative_position_bias_table"
    own = [f"blocks.{number}.attn.{table}" for number in range(config.depth)]
    if model.config.position == "relative" and config.position == "shared_relative":
        state |= dict.fromkeys(own, state.pop(f"rel_pos_bias.{table}"))
    if model.config.position == "shared_relative" and config.position == "relative":
        state[f"rel_pos_bias.{table}"] = torch.stack([state.pop(name) for name in own]).mean(dim=0)
    optional_names = OTHER_HEADS if head else HEAD_NAMES
    loaded = {}
    for name, tensor in target.items():
        value = state.get(name)
        if value is not None and name.endswith(("pos_embed", table)):
            value = resize_positions(value, model.config.grid, model.config.grid, model.resize)
        if value is not None and value.shape == tensor.shape:
            loaded[name] = value
        elif not name.startswith(optional_names):
            found = "is not in it" if value is None else f"is {tuple(value.shape)} there"
            raise BadInput(f"{path}: {name} {found} and {tuple(tensor.shape)} in the model; give "
                           "the --size, --variant, --patch_size and classes it was trained with")
    left_out = [name for name in state if name not in loaded]
    for name in left_out:
        ours = known["ours"] and not name.startswith(HEAD_NAMES)
        if ours or name.startswith(("blocks.", "pos_embed", "rel_pos_bias.")):
            raise BadInput(f"{path}: {name} has no place in the model; give the --size and "
                           "--variant it was trained with")
    model.load_state_dict(loaded, strict=False)
    new = [name for name in target if name not in loaded]
    part = f" ({known['part']})" if known["part"] else ""
    heads = "" if known["heads"] else f"\nassumed, as it does not say: {model.config.heads} heads"
    return (f"loaded {len(loaded)} tensors from {path}{part}\n"
            f"left out: {', '.join(left_out) or 'none'}\n"
            f"newly initialized: {', '.join(new) or 'none'}{heads}")


# The beginnings of names that a network may lack or leave out
OTHER_HEADS = ("norm.", "lm_head.", "mask_token", "probes.", "aux_heads.", "projector.")
HEAD_NAMES = ("head.", "fc_norm.", *OTHER_HEADS)


def resize_positions(value, height, width, mode):
    """Position embeddings (1, 1 + N, D), or a relative table (offsets + 3, heads), of a square grid
    for one of height x width patches. What belongs to [CLS] stays as it is."""
    is_table = value.dim() == 2
    if is_table:
        height = 2 * height - 1
        width = 2 * width - 1
        rows, extra = value.split([len(value) - 3, 3])
    else:
        extra, rows = value[0].split([1, value.shape[1] - 1])
    old = math.isqrt(len(rows))
    if (old, old) == (height, width) or old**2 != len(rows):
        return value
    rows = rows.T.reshape(1, -1, old, old).float()
    rows = F.interpolate(rows, size=(height, width), mode=mode, align_corners=False)
    rows = rows.reshape(-1, height * width).T.to(value.dtype)
    return torch.cat([rows, extra]) if is_table else torch.cat([extra, rows])[None]


def evaluation_view(config, known):
    """How evaluation prepares an image: (pixels of its shorter side before the middle is cropped;
    mean; standard deviation). By default as in the official code."""
    run = known.get("config", {})
    share = run.get("eval_crop", 0.875 if run or config.image_size < 384 else 1)
    return round(config.image_size / share), *NORMS[run.get("norm", "imagenet")]


def export_weights(path, to, out):
    """Write the weights in `path` (what read_network reads) for another library: with
    to="transformers" a folder `out`, with "timm" a file that the official code reads too, with
    "onnx" a file for any batch. Returns Python that loads them and prepares an image."""
    state, config, known = read_network(path)
    kind = next((kind for name, kind in HEADS.items() if name in state), "network without a head")
    export, kinds = EXPORTS[to]
    if kind not in kinds:
        raise BadInput(f"{path}: a {kind}; --to={to} takes a {' or a '.join(kinds)}")
    state = {k: v.float() for k, v in state.items() if not k.startswith("projector.")}
    return export(path, str(out), state, config, known)


def export_transformers(path, out, state, config, known):
    hf_config = dict(
        model_type="beit", image_size=config.image_size, patch_size=config.patch_size,
        hidden_size=config.dim, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        intermediate_size=int(config.dim * config.mlp_ratio), hidden_act="gelu", num_channels=3,
        layer_norm_eps=1e-6, layer_scale_init_value=config.layer_scale,
        drop_path_rate=config.drop_path, use_mask_token="mask_token" in state,
        use_absolute_position_embeddings=config.position == "absolute",
        use_relative_position_bias=config.position == "relative",
        use_shared_relative_position_bias=config.position == "shared_relative",
        use_mean_pooling=True,
    )
    if "lm_head.bias" in state:
        kind = "BeitForMaskedImageModeling"
        hf_config["vocab_size"] = len(state["lm_head.bias"])
    else:
        kind = "BeitForImageClassification"
        names = known.get("classes") or [f"LABEL_{n}" for n in range(len(state["head.bias"]))]
        hf_config["id2label"] = dict(enumerate(names))
        hf_config["label2id"] = {name: number for number, name in enumerate(names)}
    hf_config["architectures"] = [kind]
    edge, mean, std = evaluation_view(config, known)
    processor = dict(
        image_processor_type="CLIPImageProcessor",  # BEiT's own resizes no shorter side
        do_resize=True, size=dict(shortest_edge=edge), resample=3, do_center_crop=True,
        crop_size=dict(height=config.image_size, width=config.image_size), do_rescale=True,
        rescale_factor=1 / 255, do_normalize=True, image_mean=mean, image_std=std,
        do_convert_rgb=True,
    )
    save = optional("safetensors.torch", "--to=transformers").save
    files = {
        "model.safetensors": save(to_transformers(state), metadata={"format": "pt"}),
        "config.json": json.dumps(hf_config, indent=1).encode(),
        "preprocessor_config.json": json.dumps(processor, indent=1).encode(),
    }
    for name, content in files.items():
        with write_atomically(os.path.join(out, name)) as file:
            file.write(content)
    return (f"model = transformers.{kind}.from_pretrained({out!r})\n"
            f"transform = transformers.AutoImageProcessor.from_pretrained({out!r})")


def export_timm(path, out, state, config, known):
    state.pop("mask_token", None)
    masked = "lm_head.bias" in state
    if masked:  # timm's network has a class for each token then
        state["head.weight"] = state.pop("lm_head.weight")
        state["head.bias"] = state.pop("lm_head.bias")
    shared = state.pop("rel_pos_bias.relative_position_bias_table", None)
    if shared is not None:
        for number in range(config.depth):
            state[f"blocks.{number}.attn.relative_position_bias_table"] = shared
    with write_atomically(out) as file:
        classes = None if masked else known.get("classes")
        torch.save({"model": state, "classes": classes}, file)
    edge, mean, std = evaluation_view(config, known)
    model = dict(
        checkpoint_path=out, img_size=config.image_size, patch_size=config.patch_size,
        embed_dim=config.dim, depth=config.depth, num_heads=config.heads,
        mlp_ratio=config.mlp_ratio, num_classes=len(state["head.bias"]),
        use_abs_pos_emb=config.position == "absolute", init_values=config.layer_scale,
        use_rel_pos_bias=config.position != "absolute", global_pool="" if masked else "avg",
    )
    view = dict(
        input_size=config.image_size, interpolation="bicubic", mean=mean, std=std,
        crop_pct=config.image_size / (edge + 0.5),  # timm rounds the edge down
    )
    return (f"model = timm.create_model('beit_base_patch16_224', **{model}).eval()\n"
            f"transform = timm.data.create_transform(**{view})\n"
            f"classes = torch.load({out!r}, weights_only=True)['classes']")


def export_onnx(path, out, state, config, known):
    optional("onnxscript", "--to=onnx")
    edge, mean, std = evaluation_view(config, known)
    if "head.weight" in state:
        model = Classifier(config, len(state["head.bias"]))
    else:
        edge = config.image_size  # as in finetune_seg.py, whose windows are as large
        last = 4 * (config.patch_size.bit_length() - 1)  # what follows the head's upsamplings
        model = Segmenter(config, len(state[f"head.layers.{last}.bias"]))
    load_weights(model, path, head=True)
    images = torch.zeros(2, 3, config.image_size, config.image_size)
    with sdpa_kernel(SDPBackend.MATH):  # the exporter fails at the other kernels' strides
        program = torch.onnx.export(
            model.eval(), (images,), dynamo=True, input_names=["images"], output_names=["logits"],
            dynamic_shapes={"images": {0: torch.export.Dim("batch")}}, verbose=False,
        )
    about = dict(image_size=config.image_size, shorter_side=edge, mean=mean, std=std,
                 classes=known.get("classes"))
    for name, value in about.items():
        program.model.metadata_props[name] = json.dumps(value)
    with write_atomically(out) as file:
        file.write(program.model_proto.SerializeToString())
    return (f"session = onnxruntime.InferenceSession({out!r})\n"
            "about = session.get_modelmeta().custom_metadata_map  # how images are prepared\n"
            "logits = session.run(['logits'], {'images': images})[0]")


HEADS = {  # what tells them apart
    "lm_head.weight": "masked model",
    "head.weight": "classifier",
    "head.layers.0.weight": "segmenter",
}
EXPORTS = {  # and which of them each library has
    "transformers": (export_transformers, ("masked model", "classifier")),
    "timm": (export_timm, ("masked model", "classifier")),
    "onnx": (export_onnx, ("classifier", "segmenter")),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Take weights to other libraries.")
    parser.add_argument("command", choices=["export"])
    parser.add_argument("out", help="the folder (transformers) or file (timm, onnx) to write")
    parser.add_argument("--weights", required=True, help="one of our checkpoints, or official ones")
    parser.add_argument("--to", required=True, choices=EXPORTS)
    options = parser.parse_args(argv)
    try:
        python = export_weights(options.weights, options.to, options.out)
    except (BadInput, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"wrote {options.out}; in Python:\n{python}")


if __name__ == "__main__":
    main()
