"""Image tokenizers: from pixels to the discrete visual tokens that BEiT predicts, and back (sec.
2.1.2).

`build_tokenizer("dalle")` is the paper's: DALL-E's dVAE. `build_tokenizer("dvae:FILE")` is one of
our own, trained by `pretrain.py --task=tokenizer` (appendix C). Both have

    vocab_size            how many different tokens there are
    downsample            pixels a side that one token stands for
    encode(images)        (B, 3, H, W) in [0, 1] -> int64 (B, H / downsample, W / downsample)
    decode(tokens)        the way back: (B, h, w) -> images (B, 3, h * downsample, w * downsample)
"""

import argparse
import math
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

DALLE_URL = "https://cdn.openai.com/dall-e/"  # + encoder.pkl, decoder.pkl


def build_tokenizer(spec, device="cpu"):
    """The tokenizer that `spec` names, frozen, on `device`.

    `dalle` (downloaded once to torch's hub cache), `dalle:DIR` (a folder with the official
    encoder.pkl and decoder.pkl) or `dvae:FILE` (a checkpoint of --task=tokenizer). Raises
    ValueError for an unknown spec or a file that is not what it should be.
    """
    kind, _, path = spec.partition(":")
    if kind not in TOKENIZERS or (kind != "dalle" and not path):
        known = ", ".join(f"{name}{form}" for name, (_, form) in TOKENIZERS.items())
        raise ValueError(f"--tokenizer={spec}: unknown; known are {known}")
    tokenizer = TOKENIZERS[kind][0](path, torch.device(device))
    return tokenizer.to(device).eval().requires_grad_(False)


# ---- DALL-E's dVAE -------------------------------------------------------------------------------


class DalleTokenizer(nn.Module):
    """DALL-E's dVAE from the `dall-e` package: 8192 tokens, one for 8x8 pixels (sec. 2.4)."""

    vocab_size, downsample = 8192, 8

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    @torch.no_grad()
    def encode(self, images):
        from dall_e import map_pixels

        with torch.autocast(images.device.type, enabled=False):  # it casts its own convolutions
            return self.encoder(map_pixels(images.float())).argmax(dim=1)

    @torch.no_grad()
    def decode(self, tokens):
        from dall_e import unmap_pixels

        codes = F.one_hot(tokens, self.vocab_size).permute(0, 3, 1, 2).float()
        with torch.autocast(tokens.device.type, enabled=False):
            # the last three of the six channels are the scales of the logit-Laplace likelihood
            return unmap_pixels(self.decoder(codes)[:, :3].float().sigmoid())


def load_dalle(folder, device):
    import dall_e

    encoder, decoder = dall_e.Encoder(device=device), dall_e.Decoder(device=device)
    if folder is not None:  # None: random weights, to measure with
        read_dalle_pickle(dalle_file(folder, "encoder.pkl"), encoder)
        read_dalle_pickle(dalle_file(folder, "decoder.pkl"), decoder)
    for module in [*encoder.modules(), *decoder.modules()]:
        if device.type == "cuda" and getattr(module, "use_float16", False):
            module.half()  # dall_e.Conv2d would cast its float32 weights to half at every call
    return DalleTokenizer(encoder, decoder)


def dalle_file(folder, name):
    """The path of a pickle in `folder`, or without one in torch's hub cache, downloaded if need
    be."""
    path = os.path.join(folder or os.path.join(torch.hub.get_dir(), "dall-e"), name)
    if not folder and not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                DALLE_URL + name, path
            )  # to a temporary file, then renamed
        except OSError as error:
            raise ValueError(
                f"{DALLE_URL}{name}: download failed ({error}); fetch encoder.pkl and decoder.pkl "
                "on another machine and give their folder as --tokenizer=dalle:DIR"
            ) from error
    if not os.path.exists(path):
        raise ValueError(
            f"{path}: no such file; --tokenizer=dalle:DIR needs DALL-E's {name} in DIR"
        )
    return path


def read_dalle_pickle(path, module):
    """Copy the weights of an official pickle into `module`, a fresh dall_e.Encoder or Decoder.

    The file is a pickle of whole modules. It is read by torch's restricted unpickler with only the
    classes allowed that such a module consists of, so a doctored file cannot run code. Only its
    weights are used: the old module objects lack attributes that today's torch reads
    (nn.Upsample's, in the decoder).
    """
    from dall_e import decoder, encoder, utils

    allowed = [
        encoder.Encoder,
        encoder.EncoderBlock,
        decoder.Decoder,
        decoder.DecoderBlock,
        utils.Conv2d,
    ]
    allowed += [nn.Sequential, nn.Identity, nn.ReLU, nn.MaxPool2d, nn.Upsample, torch.device, set]
    try:
        with torch.serialization.safe_globals(allowed):
            weights = torch.load(path, map_location="cpu", weights_only=True).state_dict()
        module.load_state_dict(weights)
    except Exception as error:  # the unpickler raises many types for a damaged or doctored file
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path}: damaged, or not DALL-E's {type(module).__name__} ({reason[:200]}); "
            "delete it and download it again"
        ) from error


# ---- our own dVAE --------------------------------------------------------------------------------


@dataclass
class DVAEConfig:
    vocab_size: int = 8192
    downsample: int = 8  # a power of two
    dim: int = 128  # channels everywhere

    def __post_init__(self):
        if self.downsample < 1 or self.downsample & (self.downsample - 1):
            raise ValueError(f"downsample={self.downsample} is no power of two")


class ResidualBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, 1)

    def forward(self, x):
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DVAE(nn.Module):
    """A discrete variational autoencoder: image -> a distribution over tokens at each place ->
    image.

    Training relaxes the choice of a token to a Gumbel-softmax (arXiv 1611.01144), whose temperature
    falls until it is nearly a choice, and pulls the distributions to the uniform prior (DALL-E,
    arXiv 2102.12092).
    """

    def __init__(self, config):
        super().__init__()
        self.config, dim = config, config.dim
        self.vocab_size, self.downsample = config.vocab_size, config.downsample
        levels = int(math.log2(config.downsample))
        down, up = [], []
        for level in range(levels):
            down += [nn.Conv2d(dim if level else 3, dim, 4, stride=2, padding=1), nn.ReLU()]
            up += [nn.ConvTranspose2d(dim, dim, 4, stride=2, padding=1), nn.ReLU()]
        first = down or [nn.Conv2d(3, dim, 3, padding=1)]
        self.encoder = nn.Sequential(
            *first, ResidualBlock(dim), ResidualBlock(dim), nn.Conv2d(dim, config.vocab_size, 1)
        )
        self.codebook = nn.Embedding(config.vocab_size, dim)
        last = [*up[:-2], nn.ConvTranspose2d(dim, 3, 4, 2, 1)] if up else [nn.Conv2d(dim, 3, 1)]
        self.decoder = nn.Sequential(ResidualBlock(dim), ResidualBlock(dim), *last)

    def logits(self, images):
        """Images (B, 3, H, W) in [0, 1] -> (B, vocab, h, w)."""
        if images.shape[2] % self.downsample or images.shape[3] % self.downsample:
            raise ValueError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels are no multiple of "
                f"downsample={self.downsample}"
            )
        return self.encoder(images * 2 - 1)

    @torch.no_grad()
    def encode(self, images):
        return self.logits(images).argmax(dim=1)

    @torch.no_grad()
    def decode(self, tokens):
        codes = self.codebook(tokens).permute(0, 3, 1, 2)  # (B, dim, h, w)
        return ((self.decoder(codes) + 1) / 2).clamp(0, 1)

    def loss(self, images, temperature, kl_weight):
        """Images (B, 3, H, W) in [0, 1] -> (loss, metrics): the squared error of the relaxed
        reconstruction, in units of normalised RGB ([-1, 1]), plus kl_weight * KL(q || uniform) a
        token."""
        logits = self.logits(images).float()
        log_q = logits.log_softmax(dim=1)
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp_min(1e-20)))  # Gumbel(0, 1)
        soft = ((logits + noise) / temperature).softmax(dim=1)  # (B, vocab, h, w)
        codes = torch.einsum("bvhw,vd->bdhw", soft, self.codebook.weight)
        output, target = self.decoder(codes).float(), images * 2 - 1
        error = F.mse_loss(output, target)
        kl = (log_q.exp() * log_q).sum(dim=1).mean() + math.log(self.vocab_size)
        return error + kl_weight * kl, {"error": error.detach(), "kl": kl.detach()}


def load_dvae(path, device):
    checkpoint = read_checkpoint(path)
    try:
        dvae = DVAE(DVAEConfig(**checkpoint["arch"]))
        dvae.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{path}: no checkpoint of --task=tokenizer; --tokenizer=dvae:FILE needs one"
        ) from error
    return dvae


def read_checkpoint(path):
    """The dict that torch.save wrote to `path`, on the CPU. Nothing in the file can run code: only
    tensors and plain values are unpickled, and argparse.Namespace, which the official checkpoints
    hold."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file; give a checkpoint.pt or an official .pth file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{path}: damaged, or no checkpoint of plain tensors ({reason[:200]})"
        ) from error


# kind -> how to build it from what follows the colon, and the form of that
TOKENIZERS = {"dalle": (load_dalle, "[:DIR]"), "dvae": (load_dvae, ":FILE")}
