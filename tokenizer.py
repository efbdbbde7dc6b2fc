"""BEiT's prediction targets, and how to decode them (arXiv 2106.08254, sec. 2.1.2).

`dalle`, the paper's, and `dvae` and `vqgan` are discrete: a patch becomes one of vocab_size tokens.
`pixel` and `pca` are no tokenizers at all: a patch's target is its pixels (table 4), or its
principal components.

Why tokens and not pixels? A pixel loss spends the network's capacity on short-range dependencies
and high-frequency detail, says the paper; tokens keep what an image shows and drop the detail.
After 300 epochs tokens gave 82.86% top-1 on ImageNet, and pixels 81.04% (table 4), less than no
pre-training at all (DeiT-B: 81.8%): the tokens are BEiT's key ingredient (sec. 3.3).

Why argmax? BEiT is a variational autoencoder (sec. 2.4, eq. 2) of x, the image, given m, the same
image masked, with the tokens z in between:

    log p(x | m) >= E[log p(x | z)] - KL(q(z | x) || p(z | m)),    z drawn from q(z | x)

The tokenizer is q and its decoder p(x | z). They are trained first and frozen; then masked image
modelling learns the prior p(z | m). The paper simplifies q to one point, its most likely tokens,
so that the divergence becomes -log p(z | m), the cross entropy (eqs. 1 and 3).

A target is a class with one line in TOKENIZERS, at the end of the file. It has

    downsample            pixels per side that one target stands for
    num_outputs           how many numbers predict one target: vocab_size logits, or its values
    encode(images)        (B, 3, H, W) in [0, 1] -> int64 (B, H / downsample, W / downsample), or
                          float (B, H / downsample, W / downsample, num_outputs); autocast is off
    decode(targets)       optional: the inverse, to images (B, 3, H, W), for pictures
    needs_file            whether a file must follow its name in --tokenizer, as in dvae:FILE
    load(argument, device, patch_size)
                          class method: the target from what follows "name:" in --tokenizer, or ""
    untrained(**options)  class method: with random weights, to train or to measure with

and the loss and the trivial baselines, from `DiscreteTarget` or `ContinuousTarget`. A target
without weights needs neither class method if its __init__ takes patch_size.
"""

import math
import os
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.serialization import safe_globals

from masking import BadInput
from model import read_checkpoint, short_message

DALLE_URL = "https://cdn.openai.com/dall-e/"  # + encoder.pkl, decoder.pkl


def build_tokenizer(spec, device="cpu", patch_size=16):
    """The tokenizer that `spec` names, frozen, on `device`.

    `dalle` (downloaded once to torch's hub cache) or `dalle:DIR` (a folder with the official
    encoder.pkl and decoder.pkl), `dvae:FILE` (a checkpoint of --task=tokenizer, app. C),
    `vqgan:FILE` (a Lightning checkpoint of taming-transformers), `pca:FILE` (a checkpoint of
    --task=pca), `pixel` or `pixel:norm`, for which patch_size is needed. Raises BadInput, a
    ValueError, for an unknown spec or a file that is not what it should be.
    """
    kind, _, argument = spec.partition(":")
    if kind not in TOKENIZERS or (TOKENIZERS[kind].needs_file and not argument):
        known = [f"{name}:FILE" if t.needs_file else name for name, t in TOKENIZERS.items()]
        raise BadInput(f"--tokenizer={spec}: unknown; known are {', '.join(known)}")
    tokenizer = TOKENIZERS[kind].load(argument, torch.device(device), patch_size)
    return tokenizer.to(device).eval().requires_grad_(False)


class Target(nn.Module):
    """What all targets share: here a target without weights."""

    needs_file = False

    def train(self, mode=True):
        """Never in training mode, as targets are frozen; our own dVAE has no layer that cares."""
        return super().train(False)

    @classmethod
    def load(cls, argument, device, patch_size):
        return cls(patch_size)

    @classmethod
    def untrained(cls, patch_size, **options):
        return cls.load("", torch.device("cpu"), patch_size)

    def encode_at(self, images, positions):
        """The targets (K,) or (K, num_outputs) at `positions` (K,), numbers among all B * h * w."""
        return self.encode(images).flatten(0, 2)[positions]


class DiscreteTarget(Target):
    """Visual tokens. n targets have shape (n,) int64, and their predictions (n, vocab_size)."""

    @property
    def num_outputs(self):
        return self.vocab_size

    def loss(self, logits, tokens):
        """Sums over n targets: (cross entropy (eq. 1), {"accuracy": how many are correct})."""
        correct = (logits.argmax(dim=1) == tokens).float().sum()
        return F.cross_entropy(logits.float(), tokens, reduction="sum"), {"accuracy": correct}

    def most_likely(self, logits):
        return logits.argmax(dim=1)

    def statistics(self, tokens):
        """What `baselines` needs the mean of, summed over n targets."""
        return {"frequency": torch.bincount(tokens, minlength=self.vocab_size)}

    def baselines(self, means):
        """What knowing only how frequent each token is gives: the loss (their entropy, in nats)
        and the accuracy (always the most frequent one); and the share of the vocabulary in use."""
        frequency = means["frequency"]
        seen = frequency[frequency > 0]
        return {
            "unigram_entropy": (seen * np.log(1 / seen)).sum(),
            "most_frequent": seen.max(),
            "vocab_used": len(seen) / len(frequency),
        }


class ContinuousTarget(Target):
    """Values. n targets have shape (n, num_outputs), and so do their predictions."""

    def loss(self, values, targets):
        """Sums over n targets: (mean squared error, no metrics)."""
        return F.mse_loss(values.float(), targets, reduction="sum") / self.num_outputs, {}

    def most_likely(self, values):
        return values

    def statistics(self, targets):
        """What `baselines` needs the mean of, summed over n targets."""
        squares = targets.square().mean(dim=1).sum()
        return {"moments": torch.cat([targets.sum(dim=0), squares[None]])}

    def baselines(self, means):
        """The loss of always predicting the mean target, and the share of it that is saved."""
        *value, square = means["moments"]
        constant = square - np.square(value).mean()
        explained = 1 - means["loss"] / constant if constant > 0 else 0.0
        return {"constant_loss": constant, "explained": explained}


# ---- DALL-E's dVAE -------------------------------------------------------------------------------

class DalleTokenizer(DiscreteTarget):
    """DALL-E's dVAE from the `dall-e` package: 8192 tokens, one for 8x8 pixels (sec. 2.1.2)."""

    vocab_size = 8192
    downsample = 8

    def __init__(self, device):
        import dall_e

        super().__init__()
        self.encoder = dall_e.Encoder(device=device)
        self.decoder = dall_e.Decoder(device=device)
        self.to(memory_format=torch.channels_last)  # 1.2 times as fast

    @classmethod
    def load(cls, folder, device, patch_size):
        tokenizer = cls(device)
        read_dalle_pickle(dalle_file(folder, "encoder.pkl"), tokenizer.encoder)
        read_dalle_pickle(dalle_file(folder, "decoder.pkl"), tokenizer.decoder)
        for module in tokenizer.modules():
            if device.type == "cuda" and getattr(module, "use_float16", False):
                module.half()  # dall_e.Conv2d would cast its float32 weights at every call
        return tokenizer

    @classmethod
    def untrained(cls, **options):
        return cls(torch.device("cpu"))

    @torch.no_grad()
    def encode(self, images, positions=None):
        """All tokens, or as in encode_at: the last layer, an eighth of the work, only there."""
        from dall_e import map_pixels

        with torch.autocast(images.device.type, enabled=False):  # it casts its own convolutions
            # 0.8 x + 0.1 and no other normalization: its likelihood needs pixels inside (0, 1)
            x = map_pixels(images.float())
            *groups, output = self.encoder.blocks
            for group in groups:
                x = group(x)  # (B, 2048, h, w) at last
            if positions is None:
                return output(x).argmax(dim=1)
            x = x.permute(0, 2, 3, 1).flatten(0, 2)[positions]  # (K, 2048)
            return output(x.T[None, :, :, None]).argmax(dim=1).flatten()  # a 1x1 convolution

    def encode_at(self, images, positions):
        return self.encode(images, positions)

    @torch.no_grad()
    def decode(self, tokens):
        from dall_e import unmap_pixels

        codes = F.one_hot(tokens, self.vocab_size).permute(0, 3, 1, 2).float()
        with torch.autocast(tokens.device.type, enabled=False):
            # the last three of the six channels are the scales of the logit-Laplace likelihood
            return unmap_pixels(self.decoder(codes)[:, :3].float().sigmoid())


def dalle_file(folder, name):
    """The path of a pickle in `folder`, or else in torch's hub cache, downloaded if need be."""
    path = os.path.join(folder or os.path.join(torch.hub.get_dir(), "dall-e"), name)
    if not folder and not os.path.exists(path):
        try:  # to a temporary file, then renamed
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(DALLE_URL + name, path)
        except OSError as error:
            raise BadInput(f"{DALLE_URL}{name}: download failed ({error}); set TORCH_HOME to a "
                           "folder that you may write to, or fetch encoder.pkl and decoder.pkl "
                           "elsewhere and give --tokenizer=dalle:DIR") from error
    if not os.path.exists(path):
        raise BadInput(f"{path}: no such file; --tokenizer=dalle:DIR needs DALL-E's {name} in DIR")
    return path


def read_dalle_pickle(path, module):
    """Copy the weights of an official pickle into `module`, a fresh dall_e.Encoder or Decoder. The
    file is a pickle of whole modules. It is read by torch's restricted unpickler, which knows only
    the classes in such a module, so a doctored file cannot run code. Only its weights are used: the
    old modules lack attributes that today's torch reads (nn.Upsample's, in the decoder)."""
    from dall_e import decoder, encoder, utils

    allowed = [encoder.Encoder, encoder.EncoderBlock, decoder.Decoder, decoder.DecoderBlock,
               utils.Conv2d, nn.Sequential, nn.Identity, nn.ReLU, nn.MaxPool2d, nn.Upsample,
               torch.device, set]
    try:
        with safe_globals(allowed):
            weights = torch.load(path, map_location="cpu", weights_only=True).state_dict()
        module.load_state_dict(weights)
    except Exception as error:  # the unpickler raises many types for a damaged or doctored file
        raise BadInput(f"{path}: damaged, or not DALL-E's {type(module).__name__} "
                       f"({short_message(error)}); delete it and download it again") from error


# ---- our own dVAE --------------------------------------------------------------------------------

@dataclass
class DVAEConfig:
    vocab_size: int = 8192
    downsample: int = 8  # a power of two
    dim: int = 128  # channels everywhere

    def __post_init__(self):
        if self.downsample < 1 or self.downsample & (self.downsample - 1):
            raise BadInput(f"downsample={self.downsample} is no power of two")


class ResidualBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DVAE(DiscreteTarget):
    """A discrete variational autoencoder: image -> a distribution over tokens per place -> image.
    Training relaxes the choice of a token to a Gumbel-softmax (arXiv 1611.01144), whose temperature
    falls until it is nearly a choice, and pulls the distributions to the uniform prior (DALL-E,
    arXiv 2102.12092)."""

    needs_file = True

    def __init__(self, config):
        super().__init__()
        dim = config.dim
        self.config = config
        self.vocab_size = config.vocab_size
        self.downsample = config.downsample
        down = []
        up = []
        for level in range(int(math.log2(config.downsample))):
            down += [nn.Conv2d(dim if level else 3, dim, 4, stride=2, padding=1), nn.ReLU()]
            up += [nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1), nn.ReLU()]
        first = down or [nn.Conv2d(3, dim, 3, padding=1)]
        self.encoder = nn.Sequential(
            *first, ResidualBlock(dim), ResidualBlock(dim), nn.Conv2d(dim, config.vocab_size, 1)
        )
        self.codebook = nn.Embedding(config.vocab_size, dim)
        last = [*up[:-2], nn.ConvTranspose2d(dim, 3, 4, 2, 1)] if up else [nn.Conv2d(dim, 3, 1)]
        self.decoder = nn.Sequential(ResidualBlock(dim), ResidualBlock(dim), *last)

    @classmethod
    def load(cls, path, device, patch_size):
        return read_own(path, cls, DVAEConfig, "tokenizer")

    @classmethod
    def untrained(cls, vocab_size, downsample, dvae_dim, **options):
        return cls(DVAEConfig(vocab_size, downsample, dvae_dim))

    def logits(self, images):
        """Images (B, 3, H, W) in [0, 1] -> (B, vocab, h, w)."""
        check_sides(images, self.downsample)
        return self.encoder(images * 2 - 1)

    @torch.no_grad()
    def encode(self, images):
        with torch.autocast(images.device.type, enabled=False):
            return self.logits(images).argmax(dim=1)

    @torch.no_grad()
    def decode(self, tokens):
        codes = self.codebook(tokens).permute(0, 3, 1, 2)  # (B, dim, h, w)
        return ((self.decoder(codes) + 1) / 2).clamp(0, 1)

    def training_loss(self, images, temperature, kl_weight):
        """Images (B, 3, H, W) in [0, 1] -> (loss, metrics): the squared error of the relaxed
        reconstruction, in RGB from -1 to 1, plus kl_weight * KL(q || uniform) per token."""
        logits = self.logits(images).float()
        log_q = logits.log_softmax(dim=1)
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_min(1e-20)))  # Gumbel(0, 1)
        soft = ((logits + noise) / temperature).softmax(dim=1)  # (B, vocab, h, w)
        codes = torch.einsum("bvhw,vd->bdhw", soft, self.codebook.weight)
        error = F.mse_loss(self.decoder(codes).float(), images * 2 - 1)
        kl = (log_q.exp() * log_q).sum(dim=1).mean() + math.log(self.vocab_size)
        return error + kl_weight * kl, {"error": error.detach(), "kl": kl.detach()}


def check_sides(images, downsample):
    if images.shape[2] % downsample or images.shape[3] % downsample:
        raise BadInput(f"images of {images.shape[2]}x{images.shape[3]} pixels are no multiple of "
                       f"downsample={downsample}")


def read_own(path, network, config, task):
    """The network in a checkpoint.pt of pretrain.py."""
    checkpoint = read_checkpoint(path)
    try:
        made = network(config(**checkpoint["arch"]))
        made.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise BadInput(f"{path}: no checkpoint of --task={task}, which is needed here") from error
    return made


# ---- taming-transformers' VQ-GAN -----------------------------------------------------------------
# The f=16 model of ImageNet (arXiv 2012.09841): 224 px give 14x14 tokens. Parameters have the names
# of the original checkpoint.

CHANNELS = (128, 128, 256, 256, 512)  # of its five resolutions; the last has self-attention


def group_norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


class VQGANBlock(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.norm2 = group_norm(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class VQGANAttention(nn.Module):
    """Self-attention of one head over all places of a feature map (B, channels, h, w)."""

    def __init__(self, channels):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        x_norm = self.norm(x)
        q = self.q(x_norm).flatten(2).transpose(1, 2)  # (B, h * w, channels)
        k = self.k(x_norm).flatten(2).transpose(1, 2)
        v = self.v(x_norm).flatten(2).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v)  # (B, h * w, channels)
        return x + self.proj_out(out.transpose(1, 2).view_as(x))


class Resample(nn.Module):
    """Half the resolution, or twice."""

    def __init__(self, channels, down):
        super().__init__()
        self.down = down
        stride, padding = (2, 0) if down else (1, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding)

    def forward(self, x):
        # padded at the right and at the bottom alone, as in the original
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else F.interpolate(x, scale_factor=2))


class VQGANLevel(nn.Module):
    """The blocks of one resolution, and the way to the next one."""

    def __init__(self, channels, out, blocks, resample, down):
        super().__init__()
        self.block = nn.ModuleList(VQGANBlock(out if n else channels, out) for n in range(blocks))
        attends = out == CHANNELS[-1]
        self.attn = nn.ModuleList(VQGANAttention(out) for _ in range(blocks if attends else 0))
        if resample:
            setattr(self, "downsample" if down else "upsample", Resample(out, down))

    def forward(self, x):
        for number, block in enumerate(self.block):
            x = block(x)
            x = self.attn[number](x) if self.attn else x
        resample = getattr(self, "downsample", getattr(self, "upsample", None))
        return resample(x) if resample else x


def vqgan_middle(channels):
    first = VQGANBlock(channels, channels)
    last = VQGANBlock(channels, channels)
    return nn.Sequential(OrderedDict(block_1=first, attn_1=VQGANAttention(channels), block_2=last))


class VQGANEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, CHANNELS[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, out in enumerate(CHANNELS):
            channels = CHANNELS[max(0, level - 1)]
            self.down.append(VQGANLevel(channels, out, blocks=2, resample=level < 4, down=True))
        self.mid = vqgan_middle(CHANNELS[-1])
        self.norm_out = group_norm(CHANNELS[-1])
        self.conv_out = nn.Conv2d(CHANNELS[-1], 256, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class VQGANDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(256, CHANNELS[-1], 3, padding=1)
        self.mid = vqgan_middle(CHANNELS[-1])
        self.up = nn.ModuleList()
        for level, out in enumerate(CHANNELS):  # used from the last, the coarsest, to the first
            channels = CHANNELS[min(4, level + 1)]
            self.up.append(VQGANLevel(channels, out, blocks=3, resample=level > 0, down=False))
        self.norm_out = group_norm(CHANNELS[0])
        self.conv_out = nn.Conv2d(CHANNELS[0], 3, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VQGAN(DiscreteTarget):
    """Encoder, codebook and decoder, a token per 16x16 pixels; vocab_size is 1024 or 16384."""

    needs_file = True
    downsample = 16

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size = vocab_size
        self.encoder = VQGANEncoder()
        self.decoder = VQGANDecoder()
        self.quant_conv = nn.Conv2d(256, 256, 1)
        self.post_quant_conv = nn.Conv2d(256, 256, 1)
        self.quantize = nn.ModuleDict({"embedding": nn.Embedding(vocab_size, 256)})

    @classmethod
    def load(cls, path, device, patch_size):
        checkpoint = read_checkpoint(path)
        try:
            state = checkpoint.get("state_dict", checkpoint)
            vqgan = cls(len(state["quantize.embedding.weight"]))
            vqgan.load_state_dict({k: v for k, v in state.items() if not k.startswith("loss.")})
        except (AttributeError, KeyError, TypeError, RuntimeError) as error:
            raise BadInput(f"{path}: no checkpoint of taming-transformers' f=16 VQ-GAN "
                           f"({short_message(error)}); give its last.ckpt") from error
        return vqgan

    @classmethod
    def untrained(cls, **options):
        return cls(1024)

    @torch.no_grad()
    def encode(self, images):
        check_sides(images, self.downsample)
        codes = self.quantize["embedding"].weight
        with torch.autocast(images.device.type, enabled=False):
            features = self.quant_conv(self.encoder(images * 2 - 1))  # (B, 256, h, w)
            # the nearest code: |z - e|^2 without |z|^2, which is the same for all codes
            products = features.permute(0, 2, 3, 1) @ codes.T  # (B, h, w, vocab)
            return (codes.square().sum(dim=1) - 2 * products).argmin(dim=3)

    @torch.no_grad()
    def decode(self, tokens):
        codes = self.quantize["embedding"](tokens).permute(0, 3, 1, 2)  # (B, 256, h, w)
        return ((self.decoder(self.post_quant_conv(codes)) + 1) / 2).clamp(0, 1)


# ---- targets without a tokenizer -----------------------------------------------------------------

def patches_of(images, size):
    """(B, 3, H, W) -> (B, H / size, W / size, 3 * size * size)."""
    check_sides(images, size)
    return F.pixel_unshuffle(images, size).permute(0, 2, 3, 1)


def images_of(patches, size):
    """The inverse."""
    return F.pixel_shuffle(patches.permute(0, 3, 1, 2), size)


class Pixels(ContinuousTarget):
    """The pixels of a patch (table 4), less 0.5 and times 4, so that they spread by about one. With
    `norm` the patch's own mean is taken out, and it is divided by its own deviation (MAE, arXiv
    2111.06377): the network then predicts the structure of a patch, and not its brightness."""

    def __init__(self, patch_size, norm):
        super().__init__()
        self.downsample = patch_size
        self.num_outputs = 3 * patch_size**2
        self.norm = norm

    @classmethod
    def load(cls, argument, device, patch_size):
        if argument not in ("", "norm"):
            raise BadInput(f"--tokenizer=pixel:{argument}: give pixel or pixel:norm")
        return cls(patch_size, norm=argument == "norm")

    def encode(self, images):
        values = 4 * patches_of(images, self.downsample) - 2
        return F.layer_norm(values, values.shape[3:], eps=1e-6) if self.norm else values

    def decode(self, values):
        """With `norm` all patches are gray on average and of the same contrast."""
        return (images_of(values.float(), self.downsample) / 4 + 0.5).clamp(0, 1)


@dataclass
class PCAConfig:
    patch_size: int = 16
    components: int = 64

    def __post_init__(self):
        if not 0 < self.components <= 3 * self.patch_size**2:
            raise BadInput(f"components={self.components}: a patch of {self.patch_size}x"
                           f"{self.patch_size} pixels has 1 to {3 * self.patch_size**2}")


class PCA(ContinuousTarget):
    """The first principal components of a patch's pixels, each divided by its standard deviation
    (whitened): few numbers per patch, and all of them are as important to predict."""

    needs_file = True

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.downsample = config.patch_size
        self.num_outputs = config.components
        self.register_buffer("mean", torch.zeros(3 * config.patch_size**2))
        self.register_buffer("components", torch.zeros(config.components, len(self.mean)))
        self.register_buffer("variances", torch.ones(len(self.mean)))  # of all, the largest first

    @classmethod
    def load(cls, path, device, patch_size):
        return read_own(path, cls, PCAConfig, "pca")

    @classmethod
    def untrained(cls, patch_size, components, **options):
        return cls(PCAConfig(patch_size, components))

    def moments(self, images):
        """What `fit` needs the sum of: (1 + D + D * D,) float64 of (B, 3, H, W) in [0, 1]."""
        rows = patches_of(images, self.config.patch_size).flatten(0, 2).double()  # (patches, D)
        count = rows.new_full((1,), len(rows))
        return torch.cat([count, rows.sum(dim=0), (rows.T @ rows).flatten()])

    def fit(self, moments):
        """Set mean, components (k, D) and variances from the moments of all patches."""
        dim = len(self.mean)
        count, total, products = moments.split([1, dim, dim * dim])
        if count < 2:
            raise BadInput("principal components need two patches or more")
        mean = total / count
        covariance = products.view(dim, dim) / count - mean.outer(mean)
        variances, vectors = torch.linalg.eigh(covariance)  # the smallest first
        self.mean.copy_(mean)
        self.variances.copy_(variances.flip(0).clamp(min=0))
        self.components.copy_(vectors.flip(1).T[: len(self.components)])

    @property
    def deviations(self):
        """(k,); a component that does not vary counts for nothing: its noise is not amplified."""
        return self.variances[: len(self.components)].sqrt().clamp(min=1e-4)

    def encode(self, images):
        centered = patches_of(images, self.config.patch_size) - self.mean
        with torch.autocast(images.device.type, enabled=False):  # dividing amplifies its errors
            return centered @ self.components.T / self.deviations

    def decode(self, values):
        """`values` may hold the first components alone."""
        kept = values.shape[3]
        patches = (values.float() * self.deviations[:kept]) @ self.components[:kept] + self.mean
        return images_of(patches, self.config.patch_size).clamp(0, 1)


TOKENIZERS = {
    "dalle": DalleTokenizer,
    "dvae": DVAE,
    "vqgan": VQGAN,
    "pca": PCA,
    "pixel": Pixels,
}
