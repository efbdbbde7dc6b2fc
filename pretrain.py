"""Pre-train BEiT (arXiv 2106.08254): mask blocks of image patches, predict their visual tokens.

No arguments is the paper's recipe (table 12): ViT-B, 800 epochs of ImageNet-1k, batch 2048,
DALL-E's tokens. The paper gives about five days on 16 V100s for its 500,000 steps, and 83.2% top-1
after fine-tuning; neither has been measured with this code. On 8 GPUs:
    torchrun --nproc_per_node=8 pretrain.py --data=/path/to/imagenet --out=out/beit_base
In minutes on two CPU cores, on images that the script draws itself:
    python pretrain.py --preset=shapes
Other targets than DALL-E's tokens: --task=tokenizer trains a dVAE, --task=pca finds principal
components; --tokenizer=dvae or pca does that first. --contrast=dino, moco or simclr adds a loss.
`--dry_run` prints the plan of a run (compute, memory, days) without data or GPU, `--bench` measures
its speed, `--help` lists every option. Run a command again after it was killed: it goes on there.

Read from the top: options, the objective, the loop, evaluation, main; that is all of BEiT's
pre-training. Other objectives and the plumbing (command line, processes, checkpoints, log) follow.
Data flows masking.py (views and mask) -> tokenizer.py (targets) -> model.py (predictions) -> here.
"""

import argparse
import copy
import difflib
import functools
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections import ChainMap
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageDraw, ImageOps
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid
from tqdm import tqdm

from masking import (
    BICUBIC, DATASETS, MASKS, NORMS, BadInput, Views, batch_of_step, batches_of_all,
    batches_of_steps, denormalise, derive_seed, draw_mask, local_shard, make_loader,
    micro_batches, normalise, open_images, open_pictures, patch_grid, permutation, rank,
    sample_batch, to_device, world_size,
)
from model import (
    CONTRASTIVE_LOSSES, VARIANTS, VIT_SIZES, BEiT, Block, ViT, ViTConfig, load_weights,
    param_groups, read_network, write_atomically,
)
from tokenizer import TOKENIZERS, build_tokenizer, read_checkpoint

# ---- options -------------------------------------------------------------------------------------
# The comment behind a field is its text in --help: why this value, or what goes wrong with another.


@dataclass
class RunConfig:
    """What the three scripts share."""

    data: str = "imagenet"  # folder of images, searched recursively; no labels needed
    out: str = "out/run"  # one folder per run: checkpoint.pt, metrics.jsonl, config.json, pictures
    weights: str = "none"  # file or folder of weights to start from (README); none: random ones
    size: str = "base"  # the paper has base and large (--preset=large); nano is for the demos
    variant: str = "paper"  # paper: as in its tables; released: as in the authors' checkpoints
    image_size: int = 224  # pixels per side, a multiple of patch_size; twice costs four times
    patch_size: int = 16  # pixels per side; half costs four times the compute
    epochs: float = 800  # passes over the data; 300 cost 0.3 points of ImageNet top-1 (table 4)
    steps: int = 0  # length of the run in steps; overrides --epochs unless 0
    batch_size: int = 2048  # images per step over ALL processes; for 512 halve the lr (the authors)
    micro_batch: int = 128  # images a process computes at once; if memory runs out, lower this
    lr: float = 1.5e-3  # peak of the schedule; too high shows as a loss that jumps up early
    min_lr: float = 1e-5  # where the schedule ends
    schedule: str = "cosine"  # how the lr falls after the warm-up
    warmup_epochs: float = 10  # linear warm-up; a ViT without one diverges at this lr
    warmup_steps: int = 0  # length of the warm-up in steps; overrides --warmup_epochs unless 0
    weight_decay: float = 0.05  # of matrices; biases, norms, [CLS] and absolute positions have none
    clip_grad: float = 3.0  # largest gradient norm, 0 for none; the paper clips large at 1.0
    drop_path: float = 0.1  # stochastic depth of the last block; longer runs tolerate more
    seed: int = 0  # of the init, order, crops, masks and noise; rerun with others for error bars
    num_workers: int = 8  # processes that load images for each GPU; the batches do not depend on it
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # float16 on V100
    compile: bool = False  # torch.compile: a minute's start, then steps 1.3 times as fast on a GPU
    checkpointing: bool = False  # compute activations twice: far less memory, a third more time
    device: str = "auto"  # auto is this process's GPU if there is one; or cpu, cuda, mps
    resume: Literal["auto", "never"] = "auto"  # "never": start from scratch, overwriting --out
    log_every: int = 50  # steps between log lines; each of them waits for the GPU
    eval_every: int = 6250  # steps between evaluations with pictures, 0 for one at the end
    save_every: int = 1250  # steps between checkpoints: what a crash loses; SIGTERM loses nothing
    norm: str = "imagenet"  # pixel mean and deviation; half with the authors' ImageNet-22k weights
    skip_bad_images: bool = False  # count and skip unreadable images; false stops at one
    tensorboard: bool = False  # also log for TensorBoard, which must be installed
    bench: bool = False  # measure the speed of loading, tokenizer, model and all of it, and stop


@dataclass
class Config(RunConfig):
    task: str = "mim"  # masked image modelling; a target: tokenizer (a dVAE), pca; see README
    tokenizer: str = "dalle"  # what is predicted; dvae and pca without a file are trained first
    mask: str = "block"  # random: -0.1 top-1, -1.7 mIoU (table 4)
    mask_ratio: float = 0.383  # 75 of 14x14 patches, the authors' rounding of the paper's 40%
    min_block: int = 16  # minimum patches of a block (algorithm 1); lower it on grids below 8x8
    predict: Literal["masked", "all"] = "masked"  # all patches: -0.3 top-1, -3.7 mIoU (table 4)
    crop_min: float = 0.08  # minimum area of the crop; raise it where images are tiny
    jitter: float = 0.4  # of brightness, contrast and saturation; the tokenizer sees it too
    val_images: int = 2048  # held-out images per evaluation; more is slower and less noisy
    token_cache: str = "none"  # folder that --task=tokens wrote: no time for the tokenizer
    cache_epochs: int = 0  # the crops repeat after this many epochs, the masks never; 0: neither
    # training a target first
    tokenizer_steps: int = 50_000  # training steps of our dVAE, if --tokenizer=dvae trains it first
    tokenizer_lr: float = 1.5e-3  # peak lr of that; a small dVAE tolerates more than a ViT
    tokenizer_warmup: int = 6250  # steps of its linear warm-up, at most a quarter of them
    vocab_size: int = 8192  # tokens of our own dVAE; fewer are learnt faster and carry less detail
    downsample: int = 8  # pixels per side to a token of our own dVAE; a power of two
    dvae_dim: int = 128  # channels of our own dVAE; doubling them costs four times the compute
    kl_weight: float = 1e-2  # of the dVAE's pull to uniform tokens; raise it if few tokens are used
    components: int = 64  # of --task=pca; more are sharper, but the last ones are noise to predict
    # a contrastive loss beside it
    contrast: str = "none"  # a second loss (README, "Beyond the paper")
    contrast_on: Literal["cls", "mean"] = "cls"  # pooled feature it uses: [CLS], or the mean patch
    contrast_weight: float = 1.0  # of that loss; a large one makes patch features uniform
    mim_weight: float = 1.0  # of masked image modelling; 0: plain DINO, MoCo v3 or SimCLR
    local_crops: int = 0  # small views for DINO, as in app. E of the paper (8 there, 4.2x the cost)
    projector_dim: int = 0  # hidden units of its head, fewer for small ViTs; 0: the method's own
    prototypes: int = 65_536  # outputs of DINO's head; fewer for small data
    teacher_momentum: float = 0.0  # at the start, then up to 1; less in short runs; 0: the method's
    teacher_temperature: float = 0.07  # of DINO's targets, from 0.04; runs of few steps stay there
    dry_run: bool = False  # print the plan of the run, without data, and stop
    processes: int = 0  # number of GPUs to plan for; 0: those running now
    images_per_s: float = 0.0  # of one process, for the plan's days; 0: measured now. V100: 148


# What differs from the recipe. The demos' tokenizer is our own dVAE, trained first.
SHAPES = {
    "data": "shapes",
    "out": "out/shapes",
    "size": "nano",
    "image_size": 64,
    "patch_size": 8,
    "steps": 250,
    "batch_size": 64,
    "lr": 1e-3,
    "warmup_steps": 62,
    "crop_min": 0.5,
    "num_workers": 2,
    "log_every": 25,
    "eval_every": 125,
    "save_every": 125,
    "val_images": 512,
    "tokenizer": "dvae",
    "tokenizer_steps": 300,
    "tokenizer_lr": 3e-3,
    "tokenizer_warmup": 62,
    "vocab_size": 256,
    "downsample": 4,
    "dvae_dim": 64,
    "projector_dim": 512,
    "prototypes": 2048,
    "teacher_momentum": 0.99,
    "teacher_temperature": 0.04,
}
CIFAR = {
    **SHAPES,
    "data": "cifar10",
    "out": "out/cifar10",
    "image_size": 32,
    "patch_size": 4,
    "epochs": 10,
    "steps": 0,
    "warmup_epochs": 0.2,
    "warmup_steps": 0,
    "crop_min": 0.3,
    "eval_every": 1000,
    "save_every": 500,
    "val_images": 2048,
    "tokenizer_steps": 1000,
    "tokenizer_warmup": 156,
    "vocab_size": 512,
}
PRESETS = {
    "paper": {},
    "large": {"size": "large", "clip_grad": 1.0, "micro_batch": 64},
    "shapes": SHAPES,
    "cifar10": CIFAR,
    "cifar100": {**CIFAR, "data": "cifar100", "out": "out/cifar100"},
}

# ---- the objective -------------------------------------------------------------------------------


class Objective(nn.Module):
    """What is trained, on what loss. It is made of (config, tokenizer), loads --weights and has

    model        the network that is saved, under the official names
    token_size   pixels per side of the view that targets are made of
    forward(batch, denominators, progress)
                 (loss, metrics): the sums over this batch divided by `denominators`, which are of
                 the global batch, so that these shares add up to means; progress is 0 to 1
    """

    tokenizer = None
    mask = "none"  # how its input is masked: a name in MASKS
    extra_views = {}  # views it needs besides the paired ones: {name: (count, transform)}

    def denominators(self, batch):
        """What to divide by in this batch: counts such as [masked patches]."""
        return [len(batch["images"])]

    def eval_sums(self, batch, progress):
        """The sums over a batch of an evaluation."""
        loss, metrics = self.forward(batch, [1], progress)
        return {"loss": loss, **metrics}

    def finish(self, sums, denominators):
        """The metrics of an evaluation from the sums over all."""
        return {name: value / denominators[0] for name, value in sums.items()}

    def pictures(self, batch):
        """Columns of images (B, 3, H, W) in [0, 1], by their titles."""
        return {}

    @staticmethod
    def check(config):
        """Raise BadInput for options that do not go together, before anything is trained."""

    @staticmethod
    def target(config):
        """The tokenizer whose tokens it predicts, as in --tokenizer; None if it needs none."""

    def after_step(self, progress):
        """Called when the weights have changed."""


class MaskedImageModelling(Objective):
    """BEiT: predict the visual tokens of the masked patches from the rest of the image (eq. 2).

    Why tokens and not pixels: see tokenizer.py. The loss is the mean over all masked patches of the
    global batch: masks differ in size, so a mean of means would weigh some patches more.
    """

    def __init__(self, config, tokenizer):
        super().__init__()
        object.__setattr__(self, "tokenizer", tokenizer)  # frozen: kept out of checkpoints
        self.norm = config.norm
        self.mask = config.mask
        self.model = BEiT(vit_config(config), tokenizer.num_outputs)
        self.token_size = self.model.config.grid * tokenizer.downsample
        if config.weights != "none":
            log(load_weights(self.model, config.weights))

    def denominators(self, batch):
        return [int(batch["predict"].sum())]

    def forward(self, batch, denominators, progress):
        num_masked = denominators[0]  # masked patches in the global batch, K of them in this one
        positions = batch["positions"]  # (K,): where they are, among B * h * w
        logits = self.model(batch["images"], batch["mask"], positions)  # (K, vocab)
        if "tokens" not in batch:  # else they are from --token_cache
            batch["tokens"] = self.tokenizer.encode(batch["token_images"])  # (B, h, w)
        tokens = batch["tokens"].flatten(0, 2)[positions]               # (K,)
        loss, metrics = self.tokenizer.loss(logits, tokens)  # F.cross_entropy, summed over K
        return loss / num_masked, {name: value / num_masked for name, value in metrics.items()}

    def eval_sums(self, batch, progress):
        loss, metrics = MaskedImageModelling.forward(self, batch, [1], progress)
        tokens = batch["tokens"].flatten(0, 2)[batch["positions"]]
        return {"loss": loss, **metrics, **self.tokenizer.statistics(tokens)}

    def finish(self, sums, denominators):
        means = super().finish(sums, denominators)
        return means | self.tokenizer.baselines(means)

    @torch.no_grad()
    def pictures(self, batch):
        """What the network sees, what the tokenizer keeps, and what BEiT fills in."""
        mask = batch["mask"]
        everywhere = torch.arange(mask.numel(), device=mask.device)
        tokens = self.tokenizer.encode(batch["token_images"])
        logits = self.model(batch["images"], mask, everywhere)
        predicted = self.tokenizer.most_likely(logits).view_as(tokens)
        filled = tokens.clone()
        filled[mask] = predicted[mask].to(tokens.dtype)
        images = denormalise(batch["images"], self.norm)
        size = images.shape[2:]
        masked = F.interpolate(mask[:, None].float(), size=size)
        return {
            "image": images,
            "masked": images * (1 - masked) + 0.5 * masked,
            "tokenizer": F.interpolate(self.tokenizer.decode(tokens), size=size),
            "BEiT": F.interpolate(self.tokenizer.decode(filled), size=size),
        }

    @staticmethod
    def check(config):
        vit_config(config)  # raises BadInput if there is no such network
        if config.tokenizer.partition(":")[0] not in TOKENIZERS:
            build_tokenizer(config.tokenizer)  # which says what there is
        if config.mask == "none" and config.predict == "masked":
            raise BadInput("--mask=none masks nothing to predict: give --predict=all with it")
        draw_mask(config.mask, config, np.random.default_rng(0))  # raises BadInput

    @staticmethod
    def target(config):
        return config.tokenizer


# ---- the loop ------------------------------------------------------------------------------------


def train(config):
    """One run of one objective, from its checkpoint if there is one. Returns whether it is done."""
    device, dtype = setup_device(config)
    train_images, val_images = local_rank0_first(open_images, config.data, config.image_size,
                                                 config.val_images)
    steps, steps_per_epoch, warmup = run_length(config, len(train_images))
    if len(val_images) < world_size():
        raise BadInput(f"--data={config.data}: {len(val_images)} held-out images are too few")

    objective = make_objective(config, device)
    tokens = open_token_cache(config, train_images, objective.tokenizer)
    dataset = Views(train_images, config, objective.token_size, True, objective.mask,
                    objective.extra_views, tokens)
    val_dataset = Views(val_images, config, objective.token_size, False, objective.mask)
    model, optimizer, scaler, save, start = prepare(objective, train_images, config, device, dtype)
    log(f"{config.task} into {config.out}: step {start} of {steps}, {steps_per_epoch} per epoch, "
        f"warm-up {warmup}; {len(dataset):,} images, {len(val_dataset):,} held out")

    batches = batches_of_steps(range(start, steps), len(dataset), config.batch_size, config.seed)
    loader = make_loader(dataset, batches, config.num_workers, device)
    val_batches = batches_of_all(len(val_dataset), config.micro_batch)
    val_loader = make_loader(val_dataset, val_batches, config.num_workers, device)
    logger = Logger(config, train_images, start, steps, steps_per_epoch)

    for step, batch in enumerate(loader, start):
        # What every process has to know before it starts, in one exchange between the CPUs: what
        # the sums are divided by, and whether a process was asked to stop.
        *denominators, stop = all_reduce_sum(*objective.denominators(batch), logger.stop)
        if stop:
            break
        lr = learning_rate(config, step, steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        torch.manual_seed(derive_seed(config.seed, step, rank()))  # for stochastic depth and noise
        metrics = {}
        micros = micro_batches(batch, config.micro_batch)
        for number, micro in enumerate(micros, 1):
            model.require_backward_grad_sync = number == len(micros)  # DDP's switch
            micro = to_device(micro, device, config.norm)
            with autocast(device, dtype):
                loss, parts = model(micro, denominators, step / steps)
            # each loss is its share of the global mean, to be added up; DDP averages gradients over
            # the processes, so this undoes its division
            scaler.scale(loss * world_size()).backward()
            for name, value in {"loss": loss.detach(), **parts}.items():
                metrics[name] = metrics.get(name, 0) + value
        scaler.unscale_(optimizer)  # float16: where a gradient overflowed, step() changes nothing
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()  # and this lowers the scale
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(step / steps)

        # the logger adds up the processes' shares; this norm is the same in all of them
        metrics["grad_norm"] = grad_norm / world_size()
        to_log, to_evaluate, to_save = logger.add(metrics, batch)  # no GPU waits until one is due
        if not (to_log or to_evaluate or to_save):
            continue
        record = logger.read(lr)
        if to_evaluate:
            objective.eval()
            record |= evaluate(objective, val_loader, config, device, dtype, logger.done / steps)
            if rank() == 0:
                columns = objective.pictures(sample_batch(val_dataset, 8, device))
                save_columns(os.path.join(config.out, "reconstruction.png"), columns)
            objective.train()
        logger.write(record)
        if to_save:
            save(logger.done)
    return logger.close(save)


@torch.no_grad()
def evaluate(objective, loader, config, device, dtype, progress):
    """Means over the held-out images, each counted once whatever the number of processes: val_*."""
    torch.manual_seed(derive_seed(config.seed, rank()))  # for the noise in a dVAE's loss
    sums = {}
    denominators = 0
    for batch in loader:
        denominators = denominators + np.array(objective.denominators(batch))
        batch = to_device(batch, device, config.norm)
        with autocast(device, dtype):
            parts = objective.eval_sums(batch, progress)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.flatten().cpu().double()
    sums = {name: np.array(all_reduce_sum(*value.tolist())) for name, value in sums.items()}
    metrics = objective.finish(sums, all_reduce_sum(*denominators))
    # vectors, such as the tokens' frequencies, are no metrics
    return {f"val_{name}": float(np.squeeze(value)) for name, value in metrics.items()
            if np.size(value) == 1}


def make_objective(config, device, tokenizer=None):
    """The objective of --task on the device, with its `tokenizer` or a given one."""
    objective_class = find_objective(config)
    spec = objective_class.target(config)
    if spec in PREREQUISITES:
        spec = f"{spec}:{config.out}/tokenizer/checkpoint.pt"  # which main makes first
    if spec and tokenizer is None:
        tokenizer = local_rank0_first(build_tokenizer, spec, device, config.patch_size)
        if config.compile:
            tokenizer.encode = torch.compile(tokenizer.encode)
            tokenizer.loss = torch.compile(tokenizer.loss, dynamic=True)  # masks differ in size
    torch.manual_seed(config.seed)
    return objective_class(config, tokenizer).to(device)


def main(argv=None):
    config = parse_args(Config, PRESETS, CHOICES, argv, __doc__)
    if config.task in OTHER_TASKS:
        if config.dry_run:
            raise BadInput(f"--dry_run: --task={config.task} takes minutes and has no plan")
        return OTHER_TASKS[config.task](config)
    objective_class = find_objective(config)
    objective_class.check(config)
    if config.dry_run:
        return plan(config)
    target = objective_class.target(config)
    if target in PREREQUISITES and not make_prerequisite(config, target):
        return None  # stopped by SIGTERM
    return bench(config) if config.bench else train(config)


# ==== A first reading can stop here: above is all of BEiT's pre-training ==========================


# What a tokenizer's training shares with the run that needs it. No other option changes it.
TOKENIZER_OPTIONS = (
    "data", "image_size", "patch_size", "crop_min", "jitter", "val_images", "skip_bad_images",
    "batch_size", "micro_batch", "seed", "num_workers", "dtype", "compile", "device", "resume",
    "log_every", "eval_every", "save_every", "tensorboard", "vocab_size", "downsample",
    "dvae_dim", "kl_weight", "components",
)


def make_prerequisite(config, target):
    """Train a tokenizer into OUT/tokenizer. Returns whether it is done."""
    task, make = PREREQUISITES[target]
    options = {name: getattr(config, name) for name in TOKENIZER_OPTIONS}
    warmup = min(config.tokenizer_warmup, config.tokenizer_steps // 4)
    done = make(Config(task=task, out=f"{config.out}/tokenizer", steps=config.tokenizer_steps,
                       warmup_steps=warmup, warmup_epochs=0.0, lr=config.tokenizer_lr, **options))
    all_reduce_sum(0)  # other machines wait until the first has written it
    return done


class TokenizerTraining(Objective):
    """Our own dVAE (app. C): reconstruct images through Gumbel-softmax tokens."""

    def __init__(self, config, tokenizer):
        super().__init__()
        self.model = TOKENIZERS["dvae"].untrained(**asdict(config))
        self.kl_weight = config.kl_weight
        self.token_size = config.image_size // config.patch_size * config.downsample

    @staticmethod
    def check(config):
        if config.weights != "none":
            raise BadInput("--task=tokenizer trains no ViT: leave --weights out")

    def forward(self, batch, denominators, progress):
        images = batch["token_images"]
        # DALL-E's annealing, from 1 to 1/16, over the first three quarters of the run
        temperature = 1 / 16 + (1 - 1 / 16) * cosine(min(progress / 0.75, 1))
        loss, metrics = self.model.training_loss(images, temperature, self.kl_weight)
        share = len(images) / denominators[0]
        return share * loss, {name: share * value for name, value in metrics.items()}

    def eval_sums(self, batch, progress):
        images = batch["token_images"]
        tokens = self.model.encode(images)
        # mean absolute error of normalised RGB, in which appendix C reports 0.0880
        mae = 2 * (self.model.decode(tokens) - images).abs().mean() * len(images)
        used = self.model.statistics(tokens.flatten())["frequency"] / tokens[0].numel()
        return {**super().eval_sums(batch, progress), "mae": mae, "frequency": used}

    def finish(self, sums, denominators):
        means = super().finish(sums, denominators)
        return means | self.model.baselines(means)

    @torch.no_grad()
    def pictures(self, batch):
        images = batch["token_images"]
        return {"image": images, "tokenizer": self.model.decode(self.model.encode(images))}


def fit_pca(config):
    """Find the principal components of the patches of (at most 5,000) training images, as they
    are seen in training. Returns True: it takes only minutes and cannot be interrupted."""
    device, _ = setup_device(config)
    images, val_images = local_rank0_first(open_images, config.data, config.image_size,
                                           config.val_images)
    pca = TOKENIZERS["pca"].untrained(**asdict(config))
    if len(images) < world_size():
        raise BadInput(f"--data={config.data}: {len(images)} images are too few, one per process")
    claim_folder(config, images)
    if config.resume == "auto" and load_checkpoint(config.out):
        log(f"pca into {config.out}: done already")
        return True
    dataset = Views(images, config, config.image_size, train=True)
    keys = local_shard([(0, i) for i in permutation(len(images), config.seed, 0)[:5_000]])
    batches = [keys[i : i + config.micro_batch] for i in range(0, len(keys), config.micro_batch)]
    loader = make_loader(dataset, batches, config.num_workers, device)
    moments = 0
    for batch in tqdm(loader, "principal components", disable=no_progress_bar()):
        moments = moments + pca.moments(to_device(batch, device, config.norm)["token_images"])
    pca.fit(torch.tensor(all_reduce_sum(*moments.tolist()), dtype=torch.float64))

    explained = (100 * pca.variances.cumsum(0) / pca.variances.sum()).tolist()
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n < config.components]
    counts.append(config.components)
    log(f"{config.components} of {len(explained)} components hold "
        f"{explained[config.components - 1]:.2f}% of the variance of a patch:")
    log("  ".join(f"{n}: {explained[n - 1]:.1f}%" for n in counts))
    save_checkpoint(config.out, model=pca.state_dict(), arch=asdict(pca.config), step=0,
                    config=asdict(config))
    if rank() == 0:
        val = Views(val_images, config, config.image_size, train=False)
        images = sample_batch(val, 8, torch.device("cpu"))["token_images"]
        values = pca.encode(images)
        columns = {f"{n} components": pca.decode(values[..., :n]) for n in counts[-5:]}
        save_columns(os.path.join(config.out, "reconstruction.png"), {"image": images, **columns})
    return True


def reconstruct(config):
    """OUT/reconstruction_NAME.png for a picture, or some of a folder or data set, at its own
    aspect: what the BEiT in --weights, a checkpoint.pt of this script, fills in."""
    checkpoint = read_checkpoint(config.weights)
    options = checkpoint.get("config", {}) if isinstance(checkpoint, dict) else {}
    if options.get("task") != "mim" or not options.get("mim_weight"):
        raise BadInput(f"--weights={config.weights}: no checkpoint.pt of masked image modelling")
    device, dtype = setup_device(config)
    kept = options.keys() - {"weights", "contrast", "mim_weight", "local_crops",
                             *MAY_CHANGE_ON_RESUME}
    trained = replace(config, **{name: options[name] for name in kept})
    trained.out = os.path.dirname(config.weights)  # where its tokenizer is, if it was trained first
    objective = make_objective(trained, device).eval()
    patch_sizes = {"images": trained.patch_size, "token_images": objective.tokenizer.downsample}
    images = open_pictures(config.data, trained.image_size)
    for index in range(len(images)):
        picture = images.load(index, config.skip_bad_images)[0]
        height, width = patch_grid(picture.shape[1:], trained.image_size, trained.patch_size)
        batch = {}
        for name, patch in patch_sizes.items():
            sides = [height * patch, width * patch]
            batch[name] = TF.resize(picture, sides, BICUBIC, antialias=True)[None]
        rng = np.random.default_rng([config.seed, index])
        mask = draw_mask(trained.mask, trained, rng, (height, width))
        batch["mask"] = batch["predict"] = torch.from_numpy(mask)[None]
        batch = to_device(batch, device, trained.norm)
        with autocast(device, dtype):
            columns = objective.pictures(batch)
        path = os.path.join(config.out, f"reconstruction_{images.stem(index)}.png")
        save_columns(path, columns)
        log("wrote", path)


class MIMWithContrast(MaskedImageModelling):
    """MIM and a contrastive loss, of which either may have the weight 0.

    In ONE pass, the student's features of the masked image serve both; they are compared with those
    that the teacher, the student's moving average, has of another whole view (SimCLR: the student
    itself). With --local_crops or --mim_weight=0 the passes are separate, as in appendix E: the
    student sees two whole views and the small ones, the teacher the two.
    """

    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self.pooling = config.contrast_on
        self.mim_weight = config.mim_weight
        self.contrast_weight = config.contrast_weight
        self.separate_passes = config.local_crops > 0 or config.mim_weight == 0
        self.contrast = CONTRASTIVE_LOSSES[config.contrast](config)
        hidden = config.projector_dim or self.contrast.projector_dim
        self.model.projector = self.contrast.make_head(self.model.config.dim, hidden)
        if config.weights != "none":
            load_weights(self.model, config.weights)  # once more, for the projector
        self.extra_views = contrastive_views(config, self)
        self.teacher = None
        if self.contrast.has_teacher:
            self.momentum = config.teacher_momentum or self.contrast.teacher_momentum
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)
            self.teacher.lm_head = None
            for block in self.teacher.blocks:
                block.drop_path = 0.0
        if not config.mim_weight:
            self.mask = "none"
            self.model.lm_head.requires_grad_(False)
            self.model.mask_token.requires_grad_(False)

    def denominators(self, batch):
        return [*super().denominators(batch), len(batch["images"])]

    def pool(self, model, x):
        """Features (B, 1 + N, D) -> (B, D): [CLS], or the mean patch."""
        x = model.norm(x)
        return x[:, 0] if self.pooling == "cls" else x[:, 1:].mean(dim=1)

    def project(self, model, head, views):
        """What `head` makes of the network's features of views (B, 3, H, W), normalised: a list.
        It sees one view at a time, as its batch norm is to be over one."""
        x = self.pool(model, model.features(torch.cat(views)))
        return [head(part) for part in x.chunk(len(views))]

    @torch.no_grad()
    def teacher_outputs(self, views):
        head = functools.partial(self.contrast.teacher_outputs, self.teacher.projector)
        return self.project(self.teacher, head, views)

    def outputs(self, batch, masked_features):
        """Pairs of what is to be compared: the student's output of a view, and another view's."""
        views = [normalise(view / 255, self.norm) for view in batch["views"].unbind(1)]
        crops = batch["local_views"].unbind(1) if "local_views" in batch else ()
        crops = [normalise(crop / 255, self.norm) for crop in crops]
        project_student = functools.partial(self.project, self.model, self.model.projector)
        if self.separate_passes:
            student = project_student(views) + (project_student(crops) if crops else [])
        else:
            student = [self.model.projector(self.pool(self.model, masked_features))]
        if self.teacher is None:
            return [(student + project_student(views))[:2]]
        teacher = self.teacher_outputs(views)
        if not self.separate_passes:
            return [(student[0], teacher[0])]
        pairs = itertools.product(enumerate(student), enumerate(teacher))
        return [(output, other) for (i, output), (j, other) in pairs if i != j]

    def forward(self, batch, denominators, progress):
        loss = 0
        metrics = {}
        features = None
        if self.mim_weight:  # as in MaskedImageModelling, but the features are used twice
            positions = batch["positions"]
            logits, features = self.model(batch["images"], batch["mask"], positions, True)
            if "tokens" not in batch:
                batch["tokens"] = self.tokenizer.encode(batch["token_images"])
            loss, metrics = self.tokenizer.loss(logits, batch["tokens"].flatten(0, 2)[positions])
            loss = loss / denominators[0]
            metrics = {name: value / denominators[0] for name, value in metrics.items()}
            metrics["mim_loss"] = loss.detach()
        pairs = self.outputs(batch, features)
        with torch.autocast(batch["images"].device.type, enabled=False):  # temperatures: float32
            losses = [self.contrast(a.float(), b.float(), progress) for a, b in pairs]
        contrast_loss = sum(losses) / denominators[1]
        if not self.contrast.sums_pairs:
            contrast_loss = contrast_loss / len(pairs)
        metrics["contrast_loss"] = contrast_loss.detach()
        return self.mim_weight * loss + self.contrast_weight * contrast_loss, metrics

    @torch.no_grad()
    def after_step(self, progress):
        self.contrast.after_step()
        if self.teacher is not None:  # the momentum rises to 1 on a cosine
            momentum = 1 + (self.momentum - 1) * cosine(progress)
            student = dict(self.model.named_parameters())
            for name, parameter in self.teacher.named_parameters():
                parameter.lerp_(student[name], 1 - momentum)

    def eval_sums(self, batch, progress):
        z = self.project(self.model, self.model.projector, [batch["images"]])[0]
        z = F.normalize(z.float(), dim=1)
        sums = super().eval_sums(batch, progress) if self.mim_weight else {}
        return {**sums, "z": z.sum(dim=0), "z_square": z.square().sum(dim=0)}

    def finish(self, sums, denominators):
        """`feature_std` is the standard deviation of the head's outputs, normalised to length 1,
        times the root of their number: about 1 if they are spread evenly, 0 if they collapsed."""
        mean = sums["z"] / denominators[1]
        variance = sums["z_square"] / denominators[1] - mean**2
        feature_std = np.sqrt(variance.clip(0)).mean() * math.sqrt(len(mean))
        metrics = super().finish(sums, denominators) if self.mim_weight else {}
        return {**metrics, "feature_std": feature_std}

    def pictures(self, batch):
        return super().pictures(batch) if self.mim_weight else {}

    @staticmethod
    def target(config):
        return config.tokenizer if config.mim_weight else "pixel"  # one that costs nothing

    @staticmethod
    def check(config):
        vit_config(config)
        if config.mim_weight:
            MaskedImageModelling.check(config)
        loss = CONTRASTIVE_LOSSES[config.contrast]
        name = f"--contrast={config.contrast}"
        check_range(config, 0, math.inf, "local_crops", "projector_dim", "mim_weight",
                    "contrast_weight")
        check_range(config, 1, math.inf, "prototypes")
        check_range(config, 0, 1, "teacher_momentum")
        check_range(config, 0.001, math.inf, "teacher_temperature")
        if config.local_crops and not loss.sees_local_crops:
            raise BadInput(f"--local_crops={config.local_crops}: {name} has no small views")
        if not config.mim_weight + config.contrast_weight:
            raise BadInput("--mim_weight=0 --contrast_weight=0: nothing is left to train on")
        processes = config.processes if config.dry_run and config.processes else world_size()
        need = math.ceil(config.batch_size / processes)
        if loss.needs_whole_batch and config.micro_batch < need:
            raise BadInput(f"{name}: compares all images of a batch, so gradients cannot "
                           f"accumulate; give --micro_batch={need}, or a smaller --batch_size")
        if loss.needs_whole_batch and (config.batch_size < 2 or config.batch_size % processes):
            raise BadInput(f"--batch_size={config.batch_size}: {name} compares the images of a "
                           f"batch; give a multiple of the {processes} processes, 2 or more")


def contrastive_views(config, objective):
    """{name: (count, transform)}: one whole view besides MIM's, or two where the loss has passes of
    its own, and DINO's small ones, which have 5% to 40% of the area and 96 pixels for 224."""
    whole = ssl_augment(config.image_size, objective.contrast.crop_area)
    views = {"views": (2 if objective.separate_passes else 1, whole)}
    if config.local_crops:
        grid = config.image_size // config.patch_size
        side = max(1, round(grid * 96 / 224)) * config.patch_size
        views["local_views"] = (config.local_crops, ssl_augment(side, (0.05, 0.4)))
    return views


def ssl_augment(size, area):
    """What makes two views of an image hard to match by their colours alone (DINO, SimCLR)."""
    blur = transforms.GaussianBlur(size // 20 * 2 + 1, (size / 2240, size / 112))  # SimCLR's, 10%
    return transforms.Compose([
        transforms.RandomResizedCrop(size, area, interpolation=BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([blur], 0.5),
    ])


def save_columns(path, columns):
    """Write a PNG with a titled column for each entry of {title: images (B, 3, H, W) in [0, 1]}, if
    there are any."""
    if not columns:
        return
    images = torch.stack([column.float().cpu() for column in columns.values()], dim=1).flatten(0, 1)
    scale = math.ceil(128 / images.shape[3])  # small images are shown larger
    images = F.interpolate(images.clamp(0, 1), scale_factor=scale)
    grid = make_grid(images, nrow=len(columns), padding=4, pad_value=1.0)
    picture = ImageOps.expand(TF.to_pil_image(grid), border=(0, 14, 0, 0), fill="white")
    for number, title in enumerate(columns):
        place = (4 + number * (images.shape[3] + 4), 2)
        ImageDraw.Draw(picture).text(place, title, fill="black")
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def plan(config):
    """Print what a run takes: steps, accumulation, parameters, compute, memory and days."""
    device, dtype = setup_device(config)
    try:
        count = len(open_images(config.data, config.image_size, config.val_images)[0])
    except BadInput:
        count = 1_281_167  # ImageNet-1k's
    steps, steps_per_epoch, warmup = run_length(config, count)
    kind = (find_objective(config).target(config) or "pixel").partition(":")[0]
    tokenizer = TOKENIZERS[kind].untrained(**asdict(config)).to(device).requires_grad_(False)
    objective = make_objective(config, device, tokenizer).eval()  # no stochastic depth: saves 5%
    processes = config.processes or world_size()
    local_batch = math.ceil(config.batch_size / processes)
    micro_batch = min(local_batch, config.micro_batch)
    trial = micro_batch if device.type == "cuda" else 2  # images to measure with
    images = DATASETS["shapes"](True, config.image_size, "").subset(range(trial))
    dataset = Views(images, config, objective.token_size, True, objective.mask,
                    objective.extra_views)
    batch = next(iter(make_loader(dataset, [[(0, index) for index in range(trial)]], 0, device)))
    kept = {}

    def keep(tensor):
        """Note what the forward pass keeps for the backward pass: address and bytes."""
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step(images):
        """Forward and backward; returns the bytes that were kept between them."""
        kept.clear()
        part = micro_batches(batch, images)[0]
        micro = to_device(part, device, config.norm)
        with autocast(device, dtype), saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = objective(micro, objective.denominators(part), 1.0)
        loss.backward()
        loss.item()  # waits for the GPU
        return sum(kept.values())

    half = trial // 2 or 1
    activations = (step(trial) - step(half)) / (trial - half or 1)  # the rest is weights
    flops = count_flops(lambda: step(half)) / half
    cache = "none: its targets are no tokens"
    if hasattr(tokenizer, "vocab_size"):
        few = to_device(micro_batches(batch, half)[0], device, config.norm)["token_images"]
        share = count_flops(lambda: tokenizer.encode(few)) / half / flops
        cache = (f"{2 * count * objective.model.config.grid**2 / 1e9:,.3f} GB per epoch; saves "
                 f"{share:.0%} of the compute from the second run on, or with fewer --cache_epochs")
    speed = config.images_per_s or trial / median_seconds(lambda: step(trial), device)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    # gradient and AdamW's two moments besides the weight; a teacher has only that
    weights = 12 * trained + 4 * sum(p.numel() for p in objective.parameters())
    days = steps * config.batch_size / (speed * processes) / 86_400
    log(f"""images      {count:,} in {config.data}
steps       {steps:,} of {config.batch_size:,} images, {steps_per_epoch:,} per epoch, \
{warmup:,} of warm-up
each step   {processes} processes x {math.ceil(local_batch / micro_batch)} micro-batches x \
{micro_batch} images
parameters  {trained:,}
compute     {flops / 1e9:,.1f} GFLOP per image with its tokens and the backward pass, \
{flops * config.batch_size / 1e12:,.1f} TFLOP per step
memory      {(weights + micro_batch * activations) / 2**30:,.1f} GiB per process: \
{weights / 2**30:,.1f} of weights, gradients and AdamW, \
{activations / 2**20:,.0f} MiB per image of activations in {dtype}
token cache {cache}
speed       {speed:,.1f} images/s per process, {"given" if config.images_per_s else "measured now"}
time        {days:,.2f} days on {processes} processes""")


def token_cache_key(config, images, tokenizer):
    """What cached tokens depend on: the images, their views and the tokenizer."""
    names = ("seed", "image_size", "patch_size", "crop_min", "jitter", "cache_epochs")
    digest = hashlib.sha256()
    for value in tokenizer.state_dict().values():
        digest.update(value.cpu().numpy().tobytes())
    key = {name: getattr(config, name) for name in names}
    return {**key, "images": images.fingerprint(), "tokenizer": digest.hexdigest()[:8]}


def check_token_cache(folder, key):
    with open(f"{folder}/tokens.json") as file:
        there = json.load(file)
    for name, value in key.items():
        if there.get(name) != value:
            raise BadInput(f"{folder}: tokens of another run: {name} is {there.get(name)} there, "
                           f"{value} here")


def open_token_cache(config, images, tokenizer):
    """What --task=tokens wrote into --token_cache: for each of --cache_epochs epochs the tokens of
    all training images' views, (images, h, w) uint16. None without a cache; raises BadInput for
    that of another run."""
    folder = config.token_cache
    if folder == "none":
        return None
    check_range(config, 1, math.inf, "cache_epochs")
    paths = [f"{folder}/tokens_{epoch:04}.npy" for epoch in range(config.cache_epochs)]
    for path in (f"{folder}/tokens.json", *paths):
        if not os.path.exists(path):
            raise BadInput(f"--token_cache: {path} is not there; --task=tokens writes it, with the "
                           "options of this run")
    check_token_cache(folder, token_cache_key(config, images, tokenizer))
    return [np.load(path, mmap_mode="r") for path in paths]


@torch.no_grad()
def write_tokens(config):
    """--task=tokens: write OUT/tokens_EPOCH.npy for each of --cache_epochs epochs, but those that
    are there already. Its processes are to run on one machine."""
    config = replace(config, task="mim")
    check_range(config, 1, math.inf, "cache_epochs")
    if config.tokenizer in PREREQUISITES:
        raise BadInput(f"--task=tokens: give a trained tokenizer, {config.tokenizer}:FILE")
    device, _ = setup_device(config)
    images = local_rank0_first(open_images, config.data, config.image_size, config.val_images)[0]
    objective = make_objective(config, device)
    if not hasattr(objective.tokenizer, "vocab_size"):
        raise BadInput(f"--task=tokens: --tokenizer={config.tokenizer} has no tokens")
    key = token_cache_key(config, images, objective.tokenizer)
    path = f"{config.out}/tokens.json"
    if rank() == 0 and not os.path.exists(path):
        write_atomically(path, lambda file: file.write(json.dumps(key).encode()))
    all_reduce_sum(0)  # the others wait for it
    check_token_cache(config.out, key)
    dataset = Views(images, config, objective.token_size, train=True)
    grid = config.image_size // config.patch_size
    for epoch in range(config.cache_epochs):
        path = f"{config.out}/tokens_{epoch:04}.npy"
        if os.path.exists(path):
            continue
        if rank() == 0:
            shape = (len(images), grid, grid)
            np.lib.format.open_memmap(f"{path}.tmp", "w+", np.uint16, shape)
        all_reduce_sum(0)
        rows = np.lib.format.open_memmap(f"{path}.tmp", "r+")
        keys = batches_of_all(len(images), config.micro_batch, epoch)
        loader = make_loader(dataset, keys, config.num_workers, device)
        bar = tqdm(loader, f"tokens of epoch {epoch}", len(keys), disable=no_progress_bar())
        for batch_keys, batch in zip(keys, bar, strict=True):
            batch = to_device(batch, device, config.norm)
            tokens = objective.tokenizer.encode(batch["token_images"])
            rows[[index for _, index in batch_keys]] = tokens.cpu().numpy()
        rows.flush()
        all_reduce_sum(0)
        if rank() == 0:
            os.replace(f"{path}.tmp", path)
            log("wrote", path)


def bench(config):
    """--bench: how fast images are loaded, become tokens and are learnt from."""
    device, dtype = setup_device(config)
    images = local_rank0_first(open_images, config.data, config.image_size, config.val_images)[0]
    objective = make_objective(config, device)
    tokens = open_token_cache(config, images, objective.tokenizer)
    dataset = Views(images, config, objective.token_size, True, objective.mask,
                    objective.extra_views, tokens)

    def to_inputs(batch):  # counted on the CPU, where no GPU waits
        counts = objective.denominators(batch)
        return {**to_device(batch, device, config.norm), "denominators": counts}

    def loss_of(model, inputs):
        return model(inputs, inputs["denominators"], 1.0)[0]

    encode = objective.tokenizer.encode if objective.tokenizer and not tokens else None
    measure_speed(config, objective, dataset, device, dtype, to_inputs, loss_of, encode)


OBJECTIVES = {"mim": MaskedImageModelling, "tokenizer": TokenizerTraining}
# tasks that need no loop
OTHER_TASKS = {"pca": fit_pca, "reconstruct": reconstruct, "tokens": write_tokens}
# kinds of --tokenizer that are made first if no file is given: (task, function)
PREREQUISITES = {"dvae": ("tokenizer", train), "pca": ("pca", fit_pca)}


def find_objective(config):
    if config.contrast != "none":
        if config.task != "mim":
            raise BadInput(f"--contrast={config.contrast}: goes with --task=mim")
        return MIMWithContrast
    if config.mim_weight != 1 or config.local_crops:
        raise BadInput("--mim_weight and --local_crops go with a contrastive loss: give --contrast")
    return OBJECTIVES[config.task]


# ==== Plumbing, which all three scripts share =====================================================


def cosine(progress):
    return (1 + math.cos(math.pi * progress)) / 2


def linear(progress):
    return 1 - progress


# The share of the peak learning rate after a share, 0 to 1, of the steps that follow the warm-up
SCHEDULES = {"cosine": cosine, "linear": linear}


def learning_rate(config, step, steps, warmup):
    """Linear warm-up to --lr over `warmup` steps, then as --schedule says to --min_lr."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = SCHEDULES[config.schedule]((step - warmup) / (steps - warmup))
    return config.min_lr + (config.lr - config.min_lr) * left


def run_length(config, count):
    """(steps of the run, steps per epoch, steps of warm-up) on `count` training images."""
    if not world_size() <= config.batch_size <= count:
        raise BadInput(f"--batch_size={config.batch_size}: must be from {world_size()}, an image "
                       f"per process, to {count}, the training images in --data={config.data}")
    steps_per_epoch = count // config.batch_size
    steps = config.steps or round(config.epochs * steps_per_epoch)
    warmup = config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)
    if warmup >= steps:
        raise BadInput(f"--warmup_epochs={config.warmup_epochs:g}: is {warmup} steps of a run of "
                       f"{steps}; lower it (or --warmup_steps), or train longer")
    return steps, steps_per_epoch, warmup


# ---- speed ---------------------------------------------------------------------------------------


def median_seconds(run, device, calls=4):
    """Of several calls, after one that warms up."""
    times = []
    for _ in range(calls + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def count_flops(run):
    # not every device's fused attention is counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure_speed(config, objective, dataset, device, dtype, to_inputs, loss_of, encode=None):
    """Print what one process does per second, as a table and, in the last line, as JSON.
    `to_inputs` takes a loaded batch to the device, `encode` makes tokens of its token_images, and
    `loss_of` makes a loss of a model and all that."""
    steps = run_length(config, len(dataset))[0]
    size = min(config.micro_batch, config.batch_size // world_size())
    count = min(10, len(dataset) // (size * world_size()))
    batches = [*batches_of_steps(range(count), len(dataset), size * world_size(), config.seed)]
    batch = next(iter(make_loader(dataset, batches[:1], 0, device)))

    def with_tokens(batch):
        inputs = to_inputs(batch)
        if encode:
            with autocast(device, dtype):
                inputs["tokens"] = encode(inputs["token_images"])
        return inputs

    def backward(inputs):
        with autocast(device, dtype):
            loss = loss_of(model, inputs)
        loss.backward()

    def step(inputs):
        backward(inputs)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    model = objective
    for block in objective.modules():
        if isinstance(block, Block):
            block.drop_path = 0.0  # else the work of a step would vary
    few = with_tokens(micro_batches(batch, 2)[0])
    flops = count_flops(lambda: backward(few)) / len(few["images"])
    with tempfile.TemporaryDirectory() as out:
        private = replace(config, out=out)
        model, optimizer, *_ = prepare(objective, dataset.images, private, device, dtype)
    inputs = with_tokens(batch)
    rates = {"load_images_per_s_per_core": None, "tokenizer_images_per_s": None}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader's process
    keys = itertools.cycle(itertools.chain(*batches))
    load = median_seconds(lambda: [dataset[next(keys)] for _ in range(16)], device) / 16
    rates["load_images_per_s_per_core"] = 1 / load
    torch.set_num_threads(threads)
    if encode:
        tokenise = median_seconds(lambda: with_tokens(batch), device)
        rates["tokenizer_images_per_s"] = size / tokenise
    rates["model_images_per_s"] = size / median_seconds(lambda: step(inputs), device)
    loader = iter(make_loader(dataset, itertools.cycle(batches), config.num_workers, device))
    together = median_seconds(lambda: step(to_inputs(next(loader))), device, calls=8)
    rates["step_images_per_s"] = size / together
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    rates["peak_memory_gb"] = peak / 1e9
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    most = 2 * side**3 / median_seconds(lambda: matrix @ matrix, device)
    rates["utilisation"] = flops * rates["model_images_per_s"] / most
    days = steps * config.batch_size / 86_400
    days /= rates["step_images_per_s"] * world_size()
    for name, value in rates.items():
        log(f"{name:27}{'none' if value is None else format(value, '.4g')}")
    log(f"{size} images a step of {flops / 1e9:.1f} GFLOP each; a matrix product does "
        f"{most / 1e12:.3g} TFLOP/s; the run takes {days:.3g} days on {world_size()} processes")
    log(json.dumps(rates))


# ---- the command line ----------------------------------------------------------------------------

# options whose value is a name in a table
RUN_CHOICES = {"size": VIT_SIZES, "variant": VARIANTS, "schedule": SCHEDULES, "norm": NORMS}
CHOICES = {
    **RUN_CHOICES,
    "task": ChainMap(OTHER_TASKS, OBJECTIVES),
    "mask": MASKS,
    "contrast": CONTRASTIVE_LOSSES,
}
OPEN_CHOICES = {"data": DATASETS, "tokenizer": TOKENIZERS}  # or a folder; NAME:FILE


def check_range(config, least, most, *names):
    """Raise BadInput for an option of these names, if there is one, outside [least, most]."""
    for name in names:
        value = getattr(config, name, least)
        if not least <= value <= most:
            wanted = f"{least} or more" if most == math.inf else f"{least} to {most}"
            raise BadInput(f"--{name}={value}: give {wanted}")


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, once under torchrun, exit code 2."""
        for unknown in re.findall(r"unrecognized arguments: --(\w+)", message):
            known = [option[2:] for option in self._option_string_actions]
            close = difflib.get_close_matches(unknown, known, n=1)
            message += f"; did you mean --{close[0]}?" if close else "; --help lists what there is"
        sys.exit(2) if rank() else fail(message, 2)


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse_args(config_class, presets, choices, argv=None, doc=""):
    """The config of a command line: defaults, then the preset's values, then --FIELD=VALUE. The
    first preset is the default; `choices` are tables with the names that a field may have; a field
    whose type is a tuple takes the words without a name."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=doc, formatter_class=style, allow_abbrev=False)
    first = next(iter(presets))
    parser.add_argument("--preset", choices=presets, default=first, help="a set of the below")
    texts = field_texts(config_class)
    for f in fields(config_class):
        text = texts[f.name]
        if f.name in OPEN_CHOICES:
            text += f"; known names: {', '.join(OPEN_CHOICES[f.name])}"
        text = f"{text} (default: {f.default!r})".replace("%", "%%")
        name = f"--{f.name}"
        kind = {"type": f.type}
        if f.type is tuple:
            name = f.name
            kind = {"nargs": "*"}
        elif f.type is bool:
            kind = {"type": boolean, "nargs": "?", "const": True}  # --dry_run alone is true
        elif get_args(f.type) or f.name in choices:
            kind = {"choices": get_args(f.type) or list(choices[f.name])}
        parser.add_argument(name, help=text, default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    recipe = presets[given.pop("preset")]
    if "epochs" in given:  # a preset's steps would override them
        given.setdefault("steps", 0)
    if "warmup_epochs" in given:
        given.setdefault("warmup_steps", 0)
    config = config_class(**{**recipe, **given})
    if given.get("steps") and "warmup_steps" not in given:
        shorten_warmup(config, config_class(**recipe))
    check_range(config, 1, math.inf, "image_size", "patch_size", "batch_size", "micro_batch")
    check_range(config, 0, math.inf, "steps", "warmup_epochs", "warmup_steps", "min_lr",
                "clip_grad", "weight_decay", "seed", "num_workers", "jitter", "val_images")
    check_range(config, 0.01, 1, "crop_min")
    check_range(config, 1e-9, math.inf, "epochs", "lr")
    return config


def shorten_warmup(config, recipe):
    """Where --steps is less than in the recipe, its warm-up shrinks with them."""
    if recipe.steps:
        warmup = recipe.warmup_steps * min(1, config.steps / recipe.steps)
    else:
        warmup = recipe.warmup_epochs * config.steps / recipe.epochs
    config.warmup_steps = round(warmup)
    config.warmup_epochs = 0.0


def field_texts(config_class):
    """The comment behind each field, by the field's name."""
    source = "".join(inspect.getsource(c) for c in reversed(config_class.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): [^#\n]*# *(.*)$", source, flags=re.MULTILINE))


def fail(message, code):
    """Print one line and exit: code 2 for bad input, 1 for a run that went wrong."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    leave(code)


def leave(code):
    if multiprocessing.active_children():  # loader processes leave when they see this one gone;
        os._exit(code)  # sys.exit would send them SIGTERM, which they ignore, and wait for ever
    sys.exit(code)


DISK_IS_FULL = "make room and run it again; the last checkpoint is intact"
# What a machine's error says -> what to do
REMEDIES = {
    "shared memory": "give --num_workers=0, or more of it (Docker: --shm-size=8g)",
    "file </torch_": "give --num_workers=0, or more shared memory (Docker: --shm-size=8g)",
    "out of memory": "lower --micro_batch",
    "can't allocate memory": "lower --micro_batch",
    "No space left on device": DISK_IS_FULL,
    "Disk quota exceeded": DISK_IS_FULL,
    "File too large": DISK_IS_FULL,
    "Permission denied": "give another --out",
    "Read-only file system": "give another --out",
}


def last_line(error):
    """The message of an error; a loader process's comes behind its traceback."""
    return str(error).strip().rpartition("\n")[2]


def run(main):
    """Call main(). Bad input becomes one line; any other error keeps its traceback."""
    try:
        main()
    except BadInput as error:
        fail(last_line(error).removeprefix("masking.BadInput: "), 2)
    except FloatingPointError as error:  # Logger.read's
        fail(error, 1)
    except Exception as error:
        message = last_line(error)
        for symptom, remedy in REMEDIES.items():
            if symptom in message:
                fail(f"{message}; {remedy}", 1)
        traceback.print_exc()
        leave(1)
    if dist.is_initialized():
        dist.destroy_process_group()


# ---- processes and devices -----------------------------------------------------------------------


def all_reduce_sum(*numbers):
    """The sums of numbers over all processes, as floats (float64, on the CPU: no GPU waits)."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def local_rank0_first(make, *arguments):
    """make(*arguments), on a machine's first process before its others, so that what it downloads
    is downloaded once."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        all_reduce_sum(0)  # waits for the first
    made = make(*arguments)
    if first:
        all_reduce_sum(0)
    return made


def log(*words):
    """Print once, whatever the number of processes, and without tearing the progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def no_progress_bar():
    return rank() > 0 or not sys.stderr.isatty()


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def setup_device(config):
    """Join the processes that torchrun started, log what runs where, and return this process's
    (device, dtype of the network)."""
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device={config.device}: not on this machine ({reason})") from None
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if world_size() > 1 and not dist.is_initialized():
        # gradients go over nccl, the few numbers that the host needs over gloo
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    dtype = config.dtype
    if dtype == "auto":
        ampere = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = "bfloat16" if ampere else "float16" if cuda else "float32"
    git = ["git", "-C", os.path.dirname(__file__) or ".", "describe", "--always", "--dirty"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
    log(f"commit {(commit or 'unknown').strip()}, torch {torch.__version__}, python "
        f"{platform.python_version()}, {world_size()} x "
        f"{torch.cuda.get_device_name(device) if cuda else device}, {dtype}")
    return device, getattr(torch, dtype)


# ---- checkpoints, and what a loop needs ----------------------------------------------------------

# Options that may change on resume: they do not change what a run learns, except that micro_batch
# changes the draws of stochastic depth and the statistics of batch norm.
MAY_CHANGE_ON_RESUME = (
    "data", "out", "device", "num_workers", "micro_batch", "compile", "checkpointing", "resume",
    "log_every", "eval_every", "save_every", "tensorboard", "skip_bad_images", "query", "bench",
    "token_cache", "dry_run", "processes", "images_per_s", "runs",
)


def claim_folder(config, images):
    """Write OUT/config.json; raise BadInput if a run of another config or other training images is
    there. The same images may lie elsewhere."""
    options = {**asdict(config), "images": images.fingerprint()}
    path = os.path.join(config.out, "config.json")
    saved = [os.path.join(config.out, name) for name in ("checkpoint.pt", "previous.pt")]
    if config.resume == "auto" and os.path.exists(path) and any(map(os.path.exists, saved)):
        with open(path) as file:
            there = json.load(file)
        changes = []
        for name, value in options.items():
            if name not in MAY_CHANGE_ON_RESUME and there.get(name, value) != value:
                changes.append(f"{name}: {there[name]!r} there, {value!r} now")
        if changes:
            raise BadInput(f"{config.out} holds a run of another config ({', '.join(changes)}); "
                           "give another --out, or --resume=never to replace it; to train longer, "
                           f"--weights={config.out}/checkpoint.pt and another --out")
    if rank() == 0:
        if config.resume == "never":
            for checkpoint in saved:
                with suppress(FileNotFoundError):  # else a rerun after an early kill would use them
                    os.remove(checkpoint)
        text = json.dumps(options, indent=1)
        try:
            write_atomically(path, lambda file: file.write(text.encode()))
        except OSError as error:
            raise BadInput(f"--out={config.out}: cannot be written ({error})") from error


def save_checkpoint(out, **state):
    """Write OUT/checkpoint.pt from the first process; the one before it stays as previous.pt."""
    if rank() == 0:
        path = os.path.join(out, "checkpoint.pt")
        write_atomically(path, lambda file: torch.save(state, file), f"{out}/previous.pt")


def load_checkpoint(out):
    """The newest undamaged checkpoint that save_checkpoint wrote; None if there is none."""
    paths = [os.path.join(out, name) for name in ("checkpoint.pt", "previous.pt")]
    paths = [path for path in paths if os.path.exists(path)]
    for path in paths:
        try:
            # torch.load does not look at the checksums, so a flipped bit would go unnoticed
            if bad := zipfile.ZipFile(path).testzip():
                raise BadInput(f"wrong checksum of {bad}")
            return read_checkpoint(path)
        except (BadInput, zipfile.BadZipFile) as error:
            log(f"{path}: damaged ({error}); trying the one before it")
    if paths:
        raise BadInput(f"{' and '.join(paths)}: damaged; --resume=never starts the run over")
    return None


def vit_config(config, shared=True):
    """The ViTConfig of a run. Relative positions have one table, `shared` by all layers, in
    pre-training, and a table per layer in fine-tuning."""
    changes = {name: getattr(config, name) for name in ("image_size", "patch_size", "drop_path")}
    if config.variant == "released" and not shared:
        changes["position"] = "relative"
    return ViTConfig.named(config.size, config.variant, **changes)


def as_trained(config, *names):
    """`config` with what was left at its default as in the run that wrote --weights: the network,
    how it wants to see images, and `names`. So evaluation needs no more than the weights."""
    trained = read_network(config.weights)[2].get("config", {})
    taken = {name: trained[name]
             for name in ("size", "variant", "image_size", "patch_size", "norm", *names)
             if name in trained and trained[name] != getattr(type(config), name)
             and getattr(config, name) == getattr(type(config), name)}
    if taken:
        log("as it was trained:", *(f"{name} {value}" for name, value in taken.items()))
    return replace(config, **taken)


def prepare(objective, images, config, device, dtype, layer_decay=1.0):
    """What a loop needs besides its data: (model, optimizer, scaler, save, start).

    `model` is the objective, synchronised if there are several processes. A checkpoint in OUT,
    which save(step) writes, restores weights, optimizer, loss scale and `start`, the step to begin
    with. Nothing else has a state: order, crops, masks and noise are functions of seed, step and
    rank. So a run that was killed ends with the same bits, on CPUs and with as many processes.
    """
    claim_folder(config, images)
    groups = param_groups(objective.model, config.weight_decay, layer_decay)
    optimizer = torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    start = 0
    if config.resume == "auto" and (state := load_checkpoint(config.out)):
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty: the run had another --dtype until now
            scaler.load_state_dict(state["scaler"])
        start = state["step"]
    size = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    log(f"{size:,} parameters to train")
    for module in objective.modules():
        if isinstance(module, ViT):
            module.checkpointing = config.checkpointing
        if isinstance(module, Block) and config.compile:
            module.static_shapes = True
            module.compile()
    model = objective
    if world_size() > 1:
        model = DistributedDataParallel(objective, broadcast_buffers=False)

    def save(step):
        save_checkpoint(
            config.out,
            objective=objective.state_dict(),
            optimizer=optimizer.state_dict(),
            scaler=scaler.state_dict(),
            step=step,
            config=asdict(config),
            # the network again under its official names, for load_weights; it shares the storage
            model=objective.model.state_dict(),
            arch=asdict(objective.model.config),
            classes=getattr(objective, "classes", None),  # their names
        )

    return model, optimizer, scaler, save, start


# ---- the log -------------------------------------------------------------------------------------


class Logger:
    """The run's logger: a progress bar, OUT/metrics.jsonl with a JSON object per line, and
    TensorBoard's files if asked for. `images` are those it trains on. Lines up to the step `start`
    are kept: a resumed run writes the later ones again."""

    def __init__(self, config, images, start, steps, steps_per_epoch):
        self.config = config
        self.images = images
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.done = self.logged = start
        self.clock = time.time()
        self.stop = False
        self.history = []
        self.names = []
        self.skipped_steps = self.bad_images = 0
        signal.signal(signal.SIGTERM, self.on_sigterm)
        self.bar = tqdm(total=steps, initial=start, disable=no_progress_bar())
        self.path = os.path.join(config.out, "metrics.jsonl")
        self.board = None
        if rank() > 0:
            return
        kept = [json.dumps(line) for line in read_metrics(self.path) if line["step"] <= start]
        text = "".join(line + "\n" for line in kept)
        write_atomically(self.path, lambda file: file.write(text.encode()))
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise BadInput("--tensorboard: first pip install tensorboard") from None
            self.board = SummaryWriter(config.out, purge_step=start)

    def on_sigterm(self, *_):
        """A cluster's preemption: the loop ends before its next step."""
        self.stop = True

    def add(self, metrics, batch):
        """Note a step's loss, metrics and gradient norm by their names, this process's share of
        each, without waiting for the GPU. Returns whether to log, to evaluate and to save."""
        self.names = list(metrics)
        self.history.append(torch.stack(list(metrics.values())))
        self.bad_images += int(batch["skipped"].sum())
        self.done += 1
        self.bar.update()
        intervals = (self.config.log_every, self.config.eval_every, self.config.save_every)
        last = self.done == self.steps
        return [last or (every > 0 and self.done % every == 0) for every in intervals]

    def read(self, lr):
        """The last step as a dict. Here the host waits for the GPU. Raises FloatingPointError if
        a loss since the last call is not finite."""
        if not self.history:
            return {}
        rows = torch.stack(self.history).cpu()
        rows = np.array(all_reduce_sum(*rows.flatten().tolist())).reshape(rows.shape)
        for step, row in enumerate(rows, self.done - len(rows)):
            if not np.isfinite(row[0]):
                config = self.config
                keys = batch_of_step(step, len(self.images), config.batch_size, config.seed,
                                     getattr(config, "repeats", 1))
                files = ", ".join(self.images.name(index) for _, index in keys)
                raise FloatingPointError(
                    f"the loss of step {step + 1} is {row[0]}; the last checkpoint is untouched. "
                    f"Lower --lr, or look at the images of its batch: {files}"
                )
        self.history.clear()
        # gradients that are not finite: float16's loss scaling skips such a step
        self.skipped_steps += int((~np.isfinite(rows[:, -1])).sum())
        record = {"step": self.done, "epoch": round(self.done / self.steps_per_epoch, 4)}
        record |= dict(zip(self.names, rows[-1].tolist(), strict=True), lr=lr)
        seconds = time.time() - self.clock
        record["images_per_s"] = (self.done - self.logged) * self.config.batch_size / seconds
        if self.skipped_steps:
            record["skipped_steps"] = self.skipped_steps
        if self.config.skip_bad_images and (bad := all_reduce_sum(self.bad_images)[0]):
            record["bad_images"] = bad
        return record

    def write(self, record):
        log(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))
        self.logged = self.done
        self.clock = time.time()
        if rank() > 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.board:
            for name, value in record.items():
                self.board.add_scalar(name, value, record["step"])

    def close(self, save):
        """After the loop: save what SIGTERM cut short. Returns whether the run is complete."""
        self.bar.close()
        if self.done < self.steps:
            self.read(0.0)
            save(self.done)
            log(f"SIGTERM: saved step {self.done}; the same command goes on from there")
        return self.done == self.steps


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts, without a last one that a kill cut short."""
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file if line.endswith("}\n")]


if __name__ == "__main__":
    run(main)
