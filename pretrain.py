"""Pre-train BEiT (arXiv 2106.08254): mask blocks of image patches, predict their visual tokens.

Without arguments it runs the paper's recipe (table 12): ViT-B, 800 epochs of ImageNet-1k, batch
2048, DALL-E's tokens. The paper gives about five days on 16 V100s for its 500,000 steps, and 83.2%
top-1 after fine-tuning; neither has been measured with this code.
    torchrun --nproc_per_node=8 pretrain.py --data=/path/to/imagenet --out=out/beit_base
    python pretrain.py --preset=shapes  # minutes on two CPU cores, with images that it draws itself
`--dry_run` prints the plan of a run (compute, memory, days) without data or GPU, `--bench` measures
its speed, `--help` lists every option. A killed run resumes when its command is run again.

Read from the top: options, the objective, the loop (`fit`, also of finetune_cls.py and
finetune_seg.py), evaluation, main. Helpers of the loop follow, then other objectives, then tools.
Data flow: masking.py (views, mask) -> tokenizer.py (targets) -> model.py (logits) -> the step here.
"""

import argparse
import copy
import difflib
import glob
import hashlib
import inspect
import json
import math
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Literal, TypeVar, get_args, get_type_hints

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import ImageDraw, ImageOps
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import make_grid
from tqdm import tqdm

from masking import (
    BICUBIC, DATASETS, MASKS, NORMS, STOP_SIGNALS, BadInput, Views, batch_of_step, batches_of_all,
    batches_of_steps, cores, denormalize, derive_seed, draw_mask, evenly, fit_size, local_shard,
    log, make_loader, micro_batches, network_inputs, normalize, open_images, open_pictures,
    permutation, rank, ssl_augment, world_size,
)
from model import (
    CONTRASTIVE_LOSSES, VARIANTS, VIT_SIZES, BEiT, Block, ViT, ViTConfig, load_weights, optional,
    param_groups, read_checkpoint, read_json, read_network, short_message, write_atomically,
)
from tokenizer import TOKENIZERS, build_tokenizer

# ---- options -------------------------------------------------------------------------------------
# The comment after a field is its text in --help: why this value, or what goes wrong with another.
# Free[int] is an int that may change when a run is resumed: what is learned stays (but micro_batch
# changes noise and batch norm). A tokenizer that a run trains first gets Free and Shared options.
T = TypeVar("T")
Free = Annotated[T, "free"]
Shared = Annotated[T, "shared"]


@dataclass
class RunConfig:
    """Options of all three scripts."""

    data: Free[str] = "imagenet"  # folder of images, searched recursively; no labels needed
    out: Free[str] = "out/run"  # a folder per run: checkpoint.pt, metrics.jsonl, pictures
    weights: str = "none"  # file or folder of weights to start from (README); none: random ones
    size: str = "base"  # the paper has base and large (--preset=large); nano is for the demos
    variant: str = "paper"  # paper: as in most of its tables; released: as in most checkpoints
    image_size: Shared[int] = 224  # pixels per side, a multiple of patch_size; twice costs 4 times
    patch_size: Shared[int] = 16  # pixels per side; half costs 4x the compute
    epochs: float = 800  # passes over the data; 300 cost 0.3 points of ImageNet top-1 (table 4)
    steps: int = 0  # length of the run in steps; overrides --epochs unless 0
    batch_size: Shared[int] = 2048  # images per step over ALL processes; for 512 halve the lr
    micro_batch: Free[int] = 128  # images a process computes at once; lower it if memory runs out
    repeats: int = 1  # views of an image per batch: repeated augmentation (arXiv 1902.05509)
    optimizer: str = "adamw"  # beta 0.9 and 0.999, epsilon 1e-8 in all of the paper's tables
    lr: float = 1.5e-3  # peak of the schedule; too high shows as a loss that jumps up early
    min_lr: float = 1e-5  # where the schedule ends
    schedule: str = "cosine"  # how the lr falls after the warm-up
    warmup_epochs: float = 10  # linear warm-up, at most a quarter of the run; a ViT needs it
    warmup_steps: int = 0  # the same in steps; overrides --warmup_epochs unless 0
    layer_decay: float = 1.0  # ratio of a layer's lr to the lr of the layer above; 1: all the same
    weight_decay: float = 0.05  # of matrices; biases, norms, [CLS] and absolute positions have none
    clip_grad: float = 3.0  # largest gradient norm, 0 for none; the paper clips large at 1.0
    sam_rho: float = 0.0  # radius of sharpness-aware minimization, such as 0.05; doubles the time
    drop_path: float = 0.1  # stochastic depth of the last block; longer runs tolerate more
    seed: Shared[int] = 0  # of init, order, crops, masks, noise; rerun with others for error bars
    num_workers: Free[int] = 8  # processes that load images for a GPU; batches don't depend on it
    threads: Free[int] = 0  # of the CPU; 0: torch's choice; more than 1 slow a tiny network down
    dtype: Free[Literal["auto", "float32", "float16", "bfloat16"]] = "auto"  # V100: float16
    compile: Free[bool] = False  # torch.compile: a minute's start, then 1.3 times as fast on a GPU
    checkpointing: Free[bool] = False  # compute activations twice: less memory, a third more time
    device: Free[str] = "auto"  # auto is this process's GPU if there is one; or cpu, cuda, mps
    resume: Free[Literal["auto", "never"]] = "auto"  # "never": start over, replacing --out
    log_every: Free[int] = 50  # steps between log lines; at each the CPU waits for the GPU
    eval_every: Free[int] = 6250  # steps between evaluations with pictures, 0 for one at the end
    save_every: Free[int] = 1250  # steps between checkpoints: a crash loses them, a signal none
    norm: str = "imagenet"  # pixel mean and deviation; "half" for the authors' ImageNet-22k weights
    skip_bad_images: Free[bool] = False  # count and skip unreadable images; false stops at one
    tensorboard: Free[bool] = False  # also log for TensorBoard, which must be installed
    bench: Free[bool] = False  # measure the speed of loading, tokenizer, model, all; and stop
    given = ()  # no option, but the names of those on the command line or in its preset


@dataclass
class Config(RunConfig):
    task: str = "mim"  # masked image modeling; tokenizer (a dVAE), pca: train a target; or README's
    tokenizer: str = "dalle"  # what is predicted; dvae and pca without a file are trained first
    mask: str = "block"  # random: -0.1 top-1, -1.7 mIoU (table 4)
    mask_ratio: float = 0.383  # 75 of 196 patches, "roughly 40%" (sec. 2.5)
    min_block: int = 16  # minimum patches of a block (algorithm 1); lower it on grids below 8x8
    predict: Literal["masked", "all"] = "masked"  # all patches: -0.3 top-1, -3.7 mIoU (table 4)
    crop_min: Shared[float] = 0.08  # minimum area of the crop; raise it where images are tiny
    eval_crop: Shared[float] = 0.875  # held-out share of the short side; 1 where crop_min is near 1
    jitter: Shared[float] = 0.4  # of brightness, contrast, saturation; the tokenizer sees it too
    val_images: Shared[int] = 2048  # held-out images per evaluation; more is slower, less noisy
    token_cache: Free[str] = "none"  # folder that --task=tokens wrote: its tokens are read instead
    cache_epochs: int = 0  # crops repeat after this many epochs, masks never; 0: crops neither
    tokenizer_steps: int = 50_000  # training steps of our dVAE, if --tokenizer=dvae trains it first
    tokenizer_lr: float = 1.5e-3  # peak lr of our dVAE; a small one tolerates more than a ViT
    tokenizer_warmup: int = 6250  # warm-up steps of our dVAE, at most a quarter of its steps
    vocab_size: Shared[int] = 8192  # tokens of our own dVAE; fewer are learned faster
    downsample: Shared[int] = 8  # pixels per side to a token of our own dVAE; a power of two
    dvae_dim: Shared[int] = 128  # channels of our own dVAE; twice costs four times the compute
    kl_weight: Shared[float] = 1e-2  # the dVAE's pull to uniform tokens; raise it if few are used
    components: Shared[int] = 64  # of --task=pca; more show more detail, the last ones noise
    contrast: str = "none"  # a second loss (README, "Beyond the paper")
    contrast_on: Literal["cls", "mean"] = "cls"  # the feature it compares: [CLS] or the mean patch
    contrast_weight: float = 1.0  # of the contrastive loss; a large one makes patches uniform
    mim_weight: float = 1.0  # of masked image modeling; 0: the contrastive loss alone
    local_crops: int = 0  # small views, DINO's own code has 8; with them BEiT costs 4.2x (app. E)
    projector_dim: int = 0  # hidden units of its head, fewer for small ViTs; 0: the method's own
    prototypes: int = 65_536  # outputs of DINO's head; fewer for small data
    teacher_momentum: float = 0.0  # at the start, rises to 1; less in short runs; 0: the method's
    teacher_temperature: float = 0.07  # DINO's last one, reached from 0.04; 0.04 in short runs
    dry_run: Free[bool] = False  # print the plan of the run, without data, and stop
    processes: Free[int] = 0  # number of GPUs to plan for; 0: the processes that run now
    images_per_s: Free[float] = 0.0  # of one GPU, for the plan; 0: measured now; paper: about 148


# Presets: what each changes in the recipe. The demos' tokenizer is our own dVAE, trained first.
SHAPES = dict(
    data="shapes", out="out/shapes", crop_min=1.0, eval_crop=1.0, jitter=0.0,
    size="nano", image_size=48, patch_size=8, min_block=5, drop_path=0.0, val_images=512,
    steps=3000, warmup_steps=100, batch_size=32, lr=2e-3, eval_every=1000, save_every=400,
    tokenizer="dvae", tokenizer_steps=1000, tokenizer_lr=6e-3, tokenizer_warmup=50, kl_weight=3e-3,
    vocab_size=256, downsample=4, dvae_dim=64, num_workers=2, threads=1, log_every=100,
    projector_dim=512, prototypes=2048, teacher_momentum=0.99, teacher_temperature=0.04,
)
CIFAR = SHAPES | dict(
    data="cifar10", out="out/cifar10", crop_min=0.3, jitter=0.4, val_images=2048,
    image_size=32, patch_size=4, min_block=16, epochs=10, steps=0, vocab_size=512,
)
PRESETS = {
    "paper": dict(),
    "large": dict(size="large", clip_grad=1.0, micro_batch=64),
    "shapes": SHAPES,
    "cifar10": CIFAR,
    "cifar100": CIFAR | dict(data="cifar100", out="out/cifar100"),
}

# ---- the objective -------------------------------------------------------------------------------

class Objective(nn.Module):
    """What `fit` trains: its parameters that require a gradient. All its state is saved. It has a
    `model`, the network, whose parameters have the official checkpoints' names; in pre-training a
    `token_size`, the pixels per side of the image that targets are made of; and

    forward(inputs, denominators, progress)
        (loss, metrics): sums over a micro-batch, divided by `denominators`. These count the global
        batch, so that adding up micro-batches and processes gives means. progress is 0 to 1.
    """

    norm = "imagenet"  # how pixels are normalized: a name in NORMS
    mask = "none"  # how its input is masked: a name in MASKS
    extra_views = {}  # views besides images and token_images: {name: (count, transform)}
    notes = {}  # further entries of its checkpoints
    picture_file = "reconstruction.png"  # where its `pictures` go
    one_by_one = False  # evaluates images one at a time, as their sizes differ

    def __init__(self, tokenizer=None):
        super().__init__()
        self.tokenizer = tokenizer  # frozen

    def inputs(self, batch, device):
        """What the network sees of a loaded batch, on the device."""
        return network_inputs(batch, device, self.norm)

    def denominators(self, batch):
        """Counts of a loaded batch, such as [masked patches]; `fit` adds up the processes'."""
        return [len(batch["images"])]

    def eval_sums(self, inputs, progress):
        """The sums over a batch of an evaluation."""
        loss, metrics = self.forward(inputs, [1], progress)
        return {"loss": loss, **metrics}

    def finish(self, sums, denominators):
        """{name: metric} from the sums over all held-out images. Arrays are not logged."""
        return divide(sums, denominators[0])

    def table(self, metrics):
        """Text to log after the last evaluation."""
        return ""

    def pictures(self, dataset, device, dtype):
        """{column's title: images (B, 3, H, W) in [0, 1]} of some held-out images."""
        return {}

    def after_step(self, progress):
        """Called when the weights have changed."""

    @staticmethod
    def check(config):
        """Raise BadInput for options that do not go together, before anything is trained."""

    @staticmethod
    def target(config):
        """The --tokenizer it needs, or None."""


class MaskedImageModeling(Objective):
    """BEiT: predict the visual tokens of the masked patches from the rest of the image (eq. 1).

    Why tokens, and why the most likely ones: see tokenizer.py. The loss is the mean over all
    patches to predict in the global batch: masks differ in size, so a mean of the processes' means,
    as in the official code, would weigh some more. K patches are to predict in a micro-batch."""

    def __init__(self, config, tokenizer):
        super().__init__(tokenizer)
        self.norm = config.norm
        self.mask = config.mask
        self.model = BEiT(vit_config(config), tokenizer.num_outputs)
        self.token_size = self.model.config.grid * tokenizer.downsample  # 14 * 8 = 112 pixels
        if config.weights != "none":
            log(load_weights(self.model, config.weights))

    def denominators(self, batch):
        return [int(batch["predict"].sum())]

    def forward(self, inputs, denominators, progress):
        logits = self.model(inputs["images"], inputs["mask"], inputs["positions"])  # (K, vocab)
        return self.mim_loss(logits, inputs, denominators)

    def mim_loss(self, logits, inputs, denominators):
        """(loss, metrics) of logits (K, vocab)."""
        loss, metrics = self.tokenizer.loss(logits, self.targets(inputs))  # summed cross entropy
        return loss / denominators[0], divide(metrics, denominators[0])

    def targets(self, inputs):
        """The tokens (K,) of the patches to predict."""
        if "tokens" in inputs:  # (B, h, w), from --token_cache
            return inputs["tokens"].flatten(0, 2)[inputs["positions"]]
        return self.tokenizer.encode_at(inputs["token_images"], inputs["positions"])

    def eval_sums(self, inputs, progress):
        logits = self.model(inputs["images"], inputs["mask"], inputs["positions"])
        tokens = self.targets(inputs)
        loss, metrics = self.tokenizer.loss(logits, tokens)
        return {"loss": loss, **metrics, **self.tokenizer.statistics(tokens)}

    def finish(self, sums, denominators):
        means = super().finish(sums, denominators)
        return means | self.tokenizer.baselines(means)

    def pictures(self, dataset, device, dtype):
        return self.reconstruct(self.inputs(sample_batch(dataset, 8), device))

    @torch.no_grad()
    def reconstruct(self, inputs):
        """Columns: what the network sees, what the tokenizer keeps, and what BEiT fills in."""
        mask = inputs["mask"]
        images = denormalize(inputs["images"], self.norm)
        size = images.shape[2:]
        masked = F.interpolate(mask[:, None].float(), size=size)  # (B, 1, H, W)
        columns = {"image": images, "masked": images * (1 - masked) + 0.5 * masked}
        if not hasattr(self.tokenizer, "decode"):
            return columns
        tokens = self.tokenizer.encode(inputs["token_images"])
        filled = tokens.clone()
        logits = self.model(inputs["images"], mask)  # (sum of mask, vocab)
        filled[mask] = self.tokenizer.most_likely(logits).to(tokens.dtype)
        for title, codes in {"tokenizer": tokens, "BEiT": filled}.items():
            columns[title] = F.interpolate(self.tokenizer.decode(codes), size=size)
        return columns

    @staticmethod
    def check(config):
        vit_config(config)  # raises BadInput if there is no such network
        if config.tokenizer.partition(":")[0] not in TOKENIZERS:
            build_tokenizer(config.tokenizer)  # raises BadInput with the known names
        if config.mask == "none" and config.predict == "masked":
            raise BadInput("--mask=none masks nothing to predict: give --predict=all with it")
        draw_mask(config.mask, config, np.random.default_rng(0), 0.0)  # raises BadInput

    @staticmethod
    def target(config):
        return config.tokenizer


# ---- the loop of all three scripts ---------------------------------------------------------------

def fit(objective, dataset, val_dataset, config, device, dtype):
    """Train, from the checkpoint in --out if any. Returns whether it is done: a signal stops it."""
    agree(f"--data={config.data}", dataset.images.fingerprint())
    steps, steps_per_epoch, warmup = run_length(config, len(dataset))
    if len(val_dataset) < world_size():
        raise BadInput(f"--data={config.data}: {len(val_dataset)} held-out images are too few")
    optimizer = make_optimizer(objective, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    parallel = parallelize(objective, config)  # its gradients are means over the processes
    if config.bench:
        return bench(objective, parallel, optimizer, dataset, config, device, dtype)
    claim_folder(config, dataset.images)
    start = load_run(config, objective, optimizer, scaler)
    log(f"{config.task} into {config.out}: step {start} of {steps}, {steps_per_epoch} per epoch, "
        f"warm-up {warmup}; {len(dataset):,} images, {len(val_dataset):,} held out")
    batches = batches_of_steps(start, steps, len(dataset), config.batch_size, config.seed,
                               config.repeats)
    loader = make_loader(dataset, batches, config.num_workers, device)
    logger = Logger(config, dataset.images, start, steps, steps_per_epoch)

    if logger.lost_evaluation():
        done = start / steps
        logger.write(evaluate_and_draw(objective, val_dataset, config, device, dtype, done))
    for step, batch in enumerate(loader, start):
        # between the CPUs of all processes: what to divide sums by, and whether one got a signal
        *denominators, stop = all_reduce_sum(*objective.denominators(batch), logger.stop)
        if stop:
            break
        lr = learning_rate(config, step, steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]

        def backward():  # a function, because sharpen_gradients calls it once more
            """Add up the gradients; returns this process's shares of the loss and the metrics."""
            torch.manual_seed(derive_seed(config.seed, step, rank()))  # for stochastic depth, noise
            shares = {}
            micros = micro_batches(batch, config.micro_batch)
            for number, micro in enumerate(micros, 1):
                parallel.require_backward_grad_sync = number == len(micros)  # DDP: exchange at last
                inputs = objective.inputs(micro, device)
                with autocast(device, dtype):
                    loss, parts = parallel(inputs, denominators, step / steps)
                # the losses are shares of a mean, to be added up; DDP averages, hence the factor
                scaler.scale(loss * world_size()).backward()
                for name, value in {"loss": loss.detach(), **parts}.items():
                    shares[name] = shares.get(name, 0) + value
            return shares

        metrics = backward()
        if config.sam_rho:
            sharpen_gradients(objective, config.sam_rho, backward)
        scaler.unscale_(optimizer)
        grad_norm = nn.utils.clip_grad_norm_(objective.parameters(), config.clip_grad or math.inf)
        scaler.step(optimizer)  # float16: not after an overflow, and then update() lowers the scale
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(step / steps)

        metrics["grad_norm"] = grad_norm / world_size()  # the logger adds up the processes' shares
        due = logger.add(metrics, batch)  # until something is due, the CPU does not wait for a GPU
        if due:
            record = logger.read(lr)
            if "checkpoint" in due:
                save_run(config, objective, optimizer, scaler, logger.done)
            if "evaluation" in due:  # after the save: a kill may cut it off
                record |= evaluate_and_draw(objective, val_dataset, config, device, dtype,
                                            logger.done / steps)
            logger.write(record)
    if logger.history:  # a signal came
        logger.read(0.0)  # raises if a loss is not finite, before anything is saved
    if "checkpoint" not in logger.due():
        save_run(config, objective, optimizer, scaler, logger.done)
    logger.close()
    return logger.done == steps


@torch.no_grad()
def evaluate(objective, dataset, config, device, dtype, progress=1.0):
    """The val_* metrics: means over the held-out images; exactly one process counts each image."""
    objective.eval()
    batches = batches_of_all(len(dataset), 1 if objective.one_by_one else config.micro_batch)
    loader = make_loader(dataset, batches, config.num_workers, device)
    torch.manual_seed(derive_seed(config.seed, rank()))  # for the noise in a dVAE's loss
    sums = {}
    denominators = 0
    for batch in tqdm(loader, "evaluating", len(batches), leave=False, disable=no_progress_bar()):
        denominators = denominators + np.array(objective.denominators(batch))
        inputs = objective.inputs(batch, device)
        with autocast(device, dtype):
            parts = objective.eval_sums(inputs, progress)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0) + value.cpu().double().numpy()
    for name, value in sums.items():
        sums[name] = np.reshape(all_reduce_sum(*np.ravel(value).tolist()), np.shape(value))
    metrics = objective.finish(sums, all_reduce_sum(*denominators))
    if progress == 1 and (table := objective.table(metrics)):
        log(table)
    return {f"val_{name}": float(value) for name, value in metrics.items() if np.ndim(value) == 0}


def train(config):
    """One run of the objective of --task. Returns whether it is done."""
    config = as_trained(config)
    device, dtype = setup_device(config)
    train_images, val_images = local_rank0_first(open_images, config.data, config.image_size,
                                                 config.val_images, config.out)
    objective = make_objective(config, device)
    tokens = None
    if config.token_cache != "none" and objective.tokenizer:
        tokens, _ = open_tokens(config.token_cache, config, train_images, objective.tokenizer, "r")
    dataset = Views(train_images, config, objective.token_size, train=True, mask=objective.mask,
                    extra_views=objective.extra_views, tokens=tokens)
    val_dataset = Views(val_images, config, objective.token_size, train=False, mask=objective.mask)
    return fit(objective, dataset, val_dataset, config, device, dtype)


def main(argv=None):
    tasks = {**OBJECTIVES, **OTHER_TASKS}
    config = parse_args(Config, PRESETS, {**CHOICES, "task": tasks}, argv, __doc__)
    if config.task in OTHER_TASKS:
        if config.dry_run:
            raise BadInput(f"--dry_run: plans training; --task={config.task} has no plan")
        return OTHER_TASKS[config.task](config)
    objective_class = find_objective(config)
    objective_class.check(config)
    if config.dry_run:
        return plan(config)
    target = objective_class.target(config)
    if target in PREREQUISITES and make_prerequisite(config, target) is False:
        return False  # stopped by a signal
    return train(config)


# ==== A first reading can stop here: above is all of BEiT's pre-training ==========================

# ---- the run: length, learning rate, optimizer ---------------------------------------------------

def run_length(config, count):
    """(steps, steps per epoch, steps of warm-up) of a run on `count` images."""
    if not world_size() <= config.batch_size <= count:
        raise BadInput(f"--batch_size={config.batch_size}: must be from {world_size()}, an image "
                       f"per process, to {count}, the training images in --data={config.data}")
    steps_per_epoch = count // config.batch_size
    steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
    warmup = config.warmup_steps or round(config.warmup_epochs * steps_per_epoch)
    return steps, steps_per_epoch, min(warmup, steps // 4)  # so that short runs also learn


def divide(sums, count):
    return {name: value / count for name, value in sums.items()}


def cosine(progress):
    return (1 + math.cos(math.pi * progress)) / 2


def linear(progress):
    return 1 - progress


# Progress after the warm-up, 0 to 1 -> how much of lr - min_lr is left
SCHEDULES = {"cosine": cosine, "linear": linear}


def learning_rate(config, step, steps, warmup):
    """Linear warm-up to --lr over `warmup` steps, then as --schedule says to --min_lr."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    left = SCHEDULES[config.schedule]((step - warmup) / (steps - warmup))
    return config.min_lr + (config.lr - config.min_lr) * left


def adamw(groups, config):
    return torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


# An optimizer is made of (parameter groups, config); model.param_groups says what a group holds
OPTIMIZERS = {"adamw": adamw}


def make_optimizer(objective, config):
    """The optimizer of all that requires a gradient, also what your own objective adds to it."""
    groups = param_groups(objective.model, config.weight_decay, config.layer_decay)
    grouped = {parameter for group in groups for parameter in group["params"]}
    for parameter in objective.parameters():
        if parameter.requires_grad and parameter not in grouped:
            groups.append(dict(params=[parameter], lr_scale=1.0, matrix=parameter.dim() == 2,
                               weight_decay=config.weight_decay * (parameter.dim() > 1)))
    size = sum(parameter.numel() for group in groups for parameter in group["params"])
    log(f"{size:,} parameters to train")
    return OPTIMIZERS[config.optimizer](groups, config)


@torch.no_grad()
def sharpen_gradients(objective, rho, backward):
    """Sharpness-aware minimization (arXiv 2010.01412): replace the gradients g at the weights w by
    the gradients at w + rho * g / |g| (eqs. 2, 3). If float16 overflowed, w is not moved."""
    trained = [parameter for parameter in objective.parameters() if parameter.grad is not None]
    before = [parameter.clone() for parameter in trained]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in trained])
    scale = torch.where(norm.isfinite(), rho / (norm + 1e-12), 0.0)
    for parameter in trained:
        parameter.add_(parameter.grad.nan_to_num(0.0, 0.0, 0.0) * scale)
    objective.zero_grad(set_to_none=True)
    with torch.enable_grad():
        backward()
    for parameter, value in zip(trained, before, strict=True):
        parameter.copy_(value)


def parallelize(objective, config):
    """The objective with --compile and --checkpointing, in DDP if torchrun started the run."""
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # it cuts a block's graph into two or three
        torch._dynamo.config.cache_size_limit = 64  # 8: as many as DINO with local crops has
    for module in objective.modules():
        if isinstance(module, ViT):
            module.checkpointing = config.checkpointing
        if isinstance(module, Block) and config.compile:
            module.compile()
    if not dist.is_initialized():
        return objective
    return DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)


# ---- processes and devices -----------------------------------------------------------------------

def all_reduce_sum(*numbers):
    """The sums of numbers over all processes, as floats (float64, on the CPU: no GPU waits)."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def barrier():
    """Wait for all processes. dist.barrier would go over nccl, which gives up after ten minutes."""
    all_reduce_sum(0)


def agree(where, found):
    """Stop all processes with one line unless they found the same there."""
    everywhere = [found] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(everywhere, found)
    if len(set(everywhere)) > 1:
        each = [f"{x} in process {everywhere.index(x)}" for x in dict.fromkeys(everywhere)]
        sys.exit(2) if rank() else leave(f"error: {where}: {', '.join(each)}; make it the same", 2)


def local_rank0_first(make, *arguments):
    """make(*arguments), on a machine's first process before the others: one download serves all."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if not first:
        barrier()
    made = make(*arguments)
    if first:
        barrier()
    return made


def autocast(device, dtype):
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def setup_device(config):
    """Join torchrun's processes, log what runs where, and return this one's (device, dtype)."""
    name = config.device
    if name in ("auto", "cuda"):
        cuda = name == "cuda" or torch.cuda.is_available()
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if cuda else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device={name}: not on this machine ({short_message(error)})") from None
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if "RANK" in os.environ and not dist.is_initialized():  # torchrun's, also if it has one process
        # gradients go over nccl, the few numbers that the host needs over gloo
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if config.threads:
        torch.set_num_threads(config.threads)
    dtype = config.dtype
    if dtype == "auto":
        ampere = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = "bfloat16" if ampere else "float16" if cuda else "float32"
    git = ["git", "-C", os.path.dirname(__file__) or ".", "describe", "--always", "--dirty"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
    where = torch.cuda.get_device_name(device) if cuda else device
    log(f"commit {(commit or 'unknown').strip()}, torch {torch.__version__}, "
        f"python {platform.python_version()}, {world_size()} x {where}, {dtype}, {cores()} cores")
    return device, getattr(torch, dtype)


# ---- checkpoints ---------------------------------------------------------------------------------

def saved_in(out):
    """The checkpoints in a folder, the newest first."""
    paths = [f"{out}/checkpoint.pt", f"{out}/previous.pt"]
    return [path for path in paths if os.path.exists(path)]


def claim_folder(config, images):
    """Write OUT/config.json; raise BadInput if a run of another config or images is there."""
    options = {**asdict(config), "images": images.fingerprint()}
    out = config.out
    path = f"{out}/config.json"
    if config.resume == "auto" and os.path.exists(path) and saved_in(out):
        there = read_json(path)
        free = marked(type(config), "free")
        changes = ", ".join(f"{name}: {there[name]!r} there, {value!r} now"
                            for name, value in options.items()
                            if name not in free and there.get(name, value) != value)
        if changes:
            raise BadInput(f"{out} holds a run of another config ({changes}); give another --out, "
                           "or --resume=never to replace it; to train longer, "
                           f"--weights={out}/checkpoint.pt and another --out")
    if rank() == 0:
        try:
            lock_folder(out)
            useless = glob.glob(f"{glob.escape(out)}/checkpoint.pt.*.tmp")  # of killed saves
            if config.resume == "never":  # else a run killed before its first save went on with it
                useless += saved_in(out)
            for checkpoint in useless:
                os.remove(checkpoint)
            write_json(path, options)
        except OSError as error:
            raise BadInput(f"--out={out}: cannot be written ({error})") from error
    barrier()  # the others read no checkpoint before the folder is this run's


def lock_folder(out):
    """Keep other runs out of OUT. The system drops the lock with this process, however it ends;
    only over NFS is that of a host that is gone believed for 90 seconds."""
    os.makedirs(out, exist_ok=True)
    file = os.open(f"{out}/.lock", os.O_CREAT | os.O_RDWR)  # open as long as this process
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise BadInput(f"--out={out}: another run is in it; give another --out, or stop that run. "
                       "Over NFS a host that is gone is believed for 90 seconds") from None
    except (ImportError, OSError):  # Windows, or a file system without locks
        log(f"{out}: cannot be locked, so a second run in it would go unnoticed")


def write_json(path, value):
    with write_atomically(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def save_run(config, objective, optimizer, scaler, step):
    """Write all that a run needs to go on with the same bits, on CPUs and with as many processes.
    Nothing else has a state: order, crops, masks and noise are functions of seed, step and rank."""
    everything = objective.state_dict()  # a teacher and the tokenizer too
    save_checkpoint(config, objective.model, step, objective=everything, **objective.notes,
                    optimizer=optimizer.state_dict(), scaler=scaler.state_dict())


def save_checkpoint(config, model, step, **state):
    """Write OUT/checkpoint.pt from the first process; the file before stays as previous.pt. For
    load_weights the network stands in it once more as `model`, which takes no more space."""
    state |= dict(config=asdict(config), step=step, model=model.state_dict(),
                  arch=asdict(model.config))
    if rank() == 0:
        out = config.out
        with write_atomically(f"{out}/checkpoint.pt", keep=f"{out}/previous.pt") as file:
            torch.save(state, file)
    barrier()  # torchrun stops all processes when the first one leaves


def load_run(config, objective, optimizer, scaler):
    """Restore what save_run wrote into OUT. Returns the step to begin with."""
    if config.resume == "never" or not (state := load_checkpoint(config.out)):
        return 0
    try:
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise BadInput(f"{config.out}: a run of another version of this code; to use its weights, "
                       f"--weights={config.out}/checkpoint.pt and another --out") from error
    if state["scaler"]:  # empty unless the run used float16
        scaler.load_state_dict(state["scaler"])
    return state["step"]


def load_checkpoint(out):
    """The newest undamaged checkpoint in a folder; None if there is none."""
    paths = saved_in(out)
    found = None
    for path in paths:
        try:
            # torch.load does not look at the checksums, so a flipped bit would go unnoticed
            if bad := zipfile.ZipFile(path).testzip():
                raise BadInput(f"wrong checksum of {bad}")
            found = read_checkpoint(path)
            break
        except (BadInput, zipfile.BadZipFile) as error:
            log(f"{path}: damaged ({error}); trying the one before it")
    if paths and not found:
        raise BadInput(f"{' and '.join(paths)}: damaged; --resume=never starts the run over")
    agree(f"--out={out}", f"step {found.get('step')}" if found else "no checkpoint")
    return found


# ---- the log, and pictures -----------------------------------------------------------------------

class Logger:
    """A run's progress bar, what is due when, and the records for SINKS."""

    stop = False

    def __init__(self, config, images, start, steps, steps_per_epoch):
        self.config = config
        self.images = images
        self.steps = steps
        self.steps_per_epoch = steps_per_epoch
        self.done = self.logged = start
        self.clock = time.time()
        self.history = []
        self.skipped_steps = self.bad_images = 0
        for number in STOP_SIGNALS:
            signal.signal(number, self.on_signal)
        self.bar = tqdm(total=steps, initial=start, disable=no_progress_bar())
        self.sinks = [make(config, start) for make in SINKS.values()] if rank() == 0 else []

    def on_signal(self, *_):
        Logger.stop = True  # `fit`, maybe of a run that follows, ends before its next step

    def add(self, metrics, batch):
        """Note this process's shares of a step's loss, metrics and gradient norm, without waiting
        for the GPU. Returns what is due."""
        self.history.append(metrics)
        self.bad_images += int(batch["skipped"].sum())
        self.done += 1
        self.bar.update()
        return self.due()

    def due(self):
        """What is due after the last step: a set of "log", "evaluation" and "checkpoint"."""
        due = {"log": self.config.log_every, "evaluation": self.config.eval_every,
               "checkpoint": self.config.save_every}
        last = self.done == self.steps
        return {name for name, every in due.items()
                if last or (every > 0 and self.done % every == 0)}

    def read(self, lr):
        """The last step's record; the CPU waits for the GPU. Raises FloatingPointError if a loss
        since the last call is not finite."""
        names = list(self.history[-1])  # the loss is the first, grad_norm the last
        rows = torch.stack([torch.stack(list(note.values())) for note in self.history]).cpu()
        rows = np.array(all_reduce_sum(*rows.flatten().tolist())).reshape(rows.shape)
        for step, row in enumerate(rows, self.done - len(rows)):
            if not np.isfinite(row[0]):
                config = self.config
                keys = batch_of_step(step, len(self.images), config.batch_size, config.seed,
                                     config.repeats)
                shown = ", ".join(self.images.name(index) for _, index in keys)
                raise FloatingPointError(f"the loss of step {step + 1} is {row[0]}; the last "
                                         "checkpoint is untouched. Lower --lr, with float16 try "
                                         f"--dtype=float32, or look at its batch's images: {shown}")
        self.history.clear()
        self.skipped_steps += int((~np.isfinite(rows[:, -1])).sum())  # by float16's loss scaling
        record = dict(zip(names, rows[-1].tolist(), strict=True), lr=lr)
        seconds = time.time() - self.clock
        record["images_per_s"] = (self.done - self.logged) * self.config.batch_size / seconds
        if self.skipped_steps:
            record["skipped_steps"] = self.skipped_steps
        if self.config.skip_bad_images and (bad := all_reduce_sum(self.bad_images)[0]):
            record["bad_images"] = bad
        return record

    def lost_evaluation(self):
        """Whether a kill cut off the evaluation after the step that the run goes on from."""
        lines = read_metrics(os.path.join(self.config.out, "metrics.jsonl"))
        known = any(line.get("step") == self.done and "val_" in str(line) for line in lines)
        return self.done and "evaluation" in self.due() and not all_reduce_sum(known)[0]

    def write(self, metrics):
        record = {"step": self.done, "epoch": round(self.done / self.steps_per_epoch, 4), **metrics}
        log(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record.items()))
        self.logged = self.done
        self.clock = time.time()
        for sink in filter(None, self.sinks):
            sink(record)

    def close(self):
        self.bar.close()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self.done < self.steps:
            log(f"stopped by a signal after step {self.done}; the same command goes on there")


def metrics_file(config, start):
    """OUT/metrics.jsonl, a JSON object per line. A resumed run keeps the lines up to `start`."""
    path = os.path.join(config.out, "metrics.jsonl")
    kept = [json.dumps(line) + "\n" for line in read_metrics(path) if line.get("step", 0) <= start]
    with write_atomically(path) as file:
        file.write("".join(kept).encode())

    def write(record):
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")

    return write


def read_metrics(path):
    """The lines of a metrics.jsonl as dicts, without those that a kill or a crash left torn."""
    records = []
    for line in open(path, errors="replace") if os.path.exists(path) else ():
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            pass
    return records


def tensorboard(config, start):
    if not config.tensorboard:
        return None
    optional("tensorboard", "--tensorboard")
    from torch.utils.tensorboard import SummaryWriter
    board = SummaryWriter(config.out, purge_step=start)

    def write(record):
        for name, value in record.items():
            board.add_scalar(name, value, record["step"])

    return write


# Where records go. (config, the step a run starts at) make a function of a record, or None if the
# config does not want this sink.
SINKS = {"metrics.jsonl": metrics_file, "tensorboard": tensorboard}


def no_progress_bar():
    return rank() > 0 or not sys.stderr.isatty()


@torch.compiler.set_stance("force_eager")  # for a few batches compiling takes longer
def evaluate_and_draw(objective, dataset, config, device, dtype, progress):
    """The metrics of an evaluation within a run, whose pictures go into OUT."""
    metrics = evaluate(objective, dataset, config, device, dtype, progress)
    if rank() == 0:
        columns = objective.pictures(dataset, device, dtype)
        save_columns(f"{config.out}/{objective.picture_file}", columns)
    objective.train()
    return metrics


def sample_batch(dataset, count):
    """`count` images of a data set, taken evenly from all of them, as a loaded batch."""
    keys = [(0, index, 1.0) for index in evenly(len(dataset), count)]
    return next(iter(make_loader(dataset, [keys], 0, torch.device("cpu"))))


def save_columns(path, columns):
    """Write a PNG with a column for each of {title: images (B, 3, H, W) in [0, 1]}, if any."""
    if not columns:
        return
    rows = torch.stack([column.float().cpu().clamp(0, 1) for column in columns.values()], dim=1)
    scale = math.ceil(128 / rows.shape[4])  # small images are shown larger
    images = F.interpolate(rows.flatten(0, 1), scale_factor=scale)
    grid = make_grid(images, nrow=len(columns), padding=4, pad_value=1.0)
    picture = ImageOps.expand(TF.to_pil_image(grid), border=(0, 14, 0, 0), fill="white")
    for number, title in enumerate(columns):
        place = (4 + number * (images.shape[3] + 4), 2)
        ImageDraw.Draw(picture).text(place, title, fill="black")
    with write_atomically(path) as file:
        picture.save(file, "PNG")


# ---- the command line ----------------------------------------------------------------------------

# Options whose value is a name in a table
RUN_CHOICES = {"size": VIT_SIZES, "variant": VARIANTS, "schedule": SCHEDULES, "norm": NORMS,
               "optimizer": OPTIMIZERS}
CHOICES = {**RUN_CHOICES, "mask": MASKS, "contrast": CONTRASTIVE_LOSSES}
PATHS = {"data", "out", "weights", "tokenizer", "token_cache"}  # options that may be one
OPEN_CHOICES = {"data": DATASETS, "tokenizer": TOKENIZERS}  # or another folder; or NAME:FILE


def marked(config_class, mark):
    """The names of the options with a mark."""
    return {f.name for f in fields(config_class) if mark in getattr(f.type, "__metadata__", ())}


NETWORK = ("size", "variant", *(f.name for f in fields(ViTConfig)))


def vit_config(config, shared=True):
    """The ViTConfig of a run. In pre-training all layers of the released variant share a table of
    relative positions, in fine-tuning each has its own."""
    given = {f.name: getattr(config, f.name) for f in fields(ViTConfig) if hasattr(config, f.name)}
    if config.variant == "released" and not shared:
        given["position"] = "relative"
    return ViTConfig.named(config.size, config.variant, **given)


def as_trained(config, *names):
    """`config` with the norm and the options `names` as in the run that wrote --weights, where they
    were not given: evaluation needs the weights alone (names: NETWORK), training keeps the norm."""
    if names:
        need_weights(config)
    known = read_network(config.weights)[2] if config.weights != "none" else {}
    trained = known.get("config", {})
    taken = {name: trained[name] for name in ("norm", *names) if name in trained
             and name not in config.given and getattr(config, name) != trained[name]}
    if taken:
        log("as it was trained:", *(f"{name} {value}" for name, value in taken.items()))
    return replace(config, **taken)


def need_weights(config):
    if config.weights == "none":
        raise BadInput(f"--task={config.task}: give --weights=FILE, what it is to look at")


def check_range(config, least, most, *names):
    """Raise BadInput if an option of these names, where there is one, is outside [least, most]."""
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
        sys.exit(2) if rank() else leave(f"error: {message}", 2)


def tidy(path):
    """A path, or NAME:PATH, with ~ as the home folder and without a / at its end."""
    return ":".join(os.path.normpath(os.path.expanduser(part)) if part else part
                    for part in path.split(":"))


def boolean(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def parse_args(config_class, presets, choices, argv=None, doc=""):
    """The config of a command line: defaults, then the preset's values, then --FIELD=VALUE. The
    first preset is the default; `choices` are tables with the names that a field may have; a field
    whose type is a tuple takes the words without a name."""
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=presets, default=[*presets][0], help="sets several")
    texts = field_texts(config_class)
    for name, kind in get_type_hints(config_class).items():
        text = texts[name]
        if name in OPEN_CHOICES:
            text += f"; known names: {', '.join(OPEN_CHOICES[name])}"
        text = f"{text} (default: {getattr(config_class, name)!r})".replace("%", "%%")
        names = get_args(kind) or choices.get(name)
        if kind is tuple:
            parser.add_argument(name, nargs="*", help=text)
        elif kind is bool:  # --dry_run alone is true
            parser.add_argument(f"--{name}", type=boolean, nargs="?", const=True, help=text)
        else:
            kind = tidy if name in PATHS else str if names else kind
            parser.add_argument(f"--{name}", type=kind, choices=names, help=text)
    given = vars(parser.parse_args(argv))
    recipe = presets[given.pop("preset")]
    for epochs, steps in (("epochs", "steps"), ("warmup_epochs", "warmup_steps")):
        if epochs in given:  # a preset's steps would override them
            recipe = {**recipe, steps: 0}
    config = config_class(**{**recipe, **given})
    config.given = {*recipe, *given}
    check_range(config, 1, math.inf, "image_size", "patch_size", "batch_size", "micro_batch",
                "repeats")
    check_range(config, 0, math.inf, "steps", "warmup_epochs", "warmup_steps", "min_lr", "sam_rho",
                "clip_grad", "weight_decay", "seed", "num_workers", "threads", "jitter",
                "val_images")
    check_range(config, 0.01, 1, "crop_min", "eval_crop")
    check_range(config, 1e-9, math.inf, "epochs", "lr", "layer_decay")
    return config


def field_texts(config_class):
    """The comment behind each field, by the field's name."""
    source = "".join(inspect.getsource(c) for c in reversed(config_class.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): [^#\n]*# *(.*)$", source, flags=re.MULTILINE))


# What a machine's error says -> what to do
REMEDIES = {
    "shared memory|file </torch_": "give --num_workers=0, or in Docker --shm-size=8g",
    "out of memory|can't allocate memory": "lower --micro_batch",
    "No space left on device|Disk quota exceeded|File too large":
        "make room and run it again; the last checkpoint is intact",
    "Permission denied|Read-only file system": "give another --out",
    "gloo/transport|ncclRemoteError": "another process stopped; its error stands before this",
}


def run(main):
    """Call main(). Bad input becomes one line and exit code 2, an error of the machine one line
    with its remedy and code 1; any other error keeps its traceback."""
    try:
        done = main()
    except Exception as error:
        # a loader process's message is the last line, after its traceback
        message = str(error).strip().rpartition("\n")[2].removeprefix("masking.BadInput: ")
        if isinstance(error, (BadInput, FloatingPointError)):  # the latter is Logger.read's
            leave(f"error: {message}", 2 if isinstance(error, BadInput) else 1)
        for symptoms, remedy in REMEDIES.items():
            if re.search(symptoms, message):
                leave(f"error: {message}; {remedy}", 1)
        leave(traceback.format_exc(), 1)
    if dist.is_initialized():
        dist.destroy_process_group()
    if done is False:
        sys.exit(128 + signal.SIGTERM)  # a signal stopped it: a shell's && does not go on


def leave(text, code):
    print(f"{text}\n", end="", file=sys.stderr, flush=True)  # one piece: others may print too
    # loader processes ignore sys.exit's SIGTERM, but leave when this process is gone
    os._exit(code) if multiprocessing.active_children() else sys.exit(code)


# ---- other objectives ----------------------------------------------------------------------------

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

    def forward(self, inputs, denominators, progress):
        images = inputs["token_images"]
        # from 1 to 1/16 as in DALL-E, over three quarters of a short run (DALL-E's: the first 5%)
        temperature = 1 / 16 + (1 - 1 / 16) * cosine(min(progress / 0.75, 1))
        loss, metrics = self.model.training_loss(images, temperature, self.kl_weight)
        parts = denominators[0] / len(images)  # of the global batch
        return loss / parts, divide(metrics, parts)

    def eval_sums(self, inputs, progress):
        images = inputs["token_images"]
        tokens = self.model.encode(images)
        # mean absolute error in RGB from -1 to 1, probably what app. C, 0.0880, calls "normalized"
        mae = 2 * (self.model.decode(tokens) - images).abs().mean() * len(images)
        frequency = self.model.statistics(tokens.flatten())["frequency"] / tokens[0].numel()
        return {**super().eval_sums(inputs, progress), "mae": mae, "frequency": frequency}

    def finish(self, sums, denominators):
        means = super().finish(sums, denominators)
        return means | self.model.baselines(means)

    @torch.no_grad()
    def pictures(self, dataset, device, dtype):
        images = self.inputs(sample_batch(dataset, 8), device)["token_images"]
        return {"image": images, "tokenizer": self.model.decode(self.model.encode(images))}


class Teacher(nn.Module):
    """A frozen copy of a network that follows it, after each step, as a moving average."""

    def __init__(self, student, momentum):
        super().__init__()
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.momentum = momentum
        for block in self.network.blocks:
            block.drop_path = 0.0

    @torch.no_grad()
    def follow(self, student, progress):
        momentum = 1 + (self.momentum - 1) * cosine(progress)  # rises to 1
        for mine, its in zip(self.network.parameters(), student.parameters(), strict=True):
            mine.lerp_(its, 1 - momentum)


class Contrast(Objective):
    """A contrastive loss between two whole views of an image: DINO, MoCo v3 or SimCLR.

    The student sees both views, and DINO's small ones; each of its outputs is compared with the
    outputs of other views: the teacher's, or the student's own (SimCLR has no teacher).
    MIMWithContrast gives its own `model`."""

    def __init__(self, config, tokenizer=None, model=None):
        super().__init__()
        self.norm = config.norm
        self.pooling = config.contrast_on
        self.weight = config.contrast_weight
        self.token_size = config.image_size  # there are no targets
        self.loss = CONTRASTIVE_LOSSES[config.contrast](config)
        self.model = model or ViT(vit_config(config))
        dim = self.model.config.dim
        if model is None:
            self.model.norm = nn.LayerNorm(dim, eps=1e-6)
            self.model.init_weights()
            self.model.patch_embed.requires_grad_(not self.loss.freezes_patches)
        self.model.projector = self.loss.make_head(
            dim, config.projector_dim or self.loss.projector_dim)
        if config.weights != "none":  # MIMWithContrast loads twice: the projector is new
            log(load_weights(self.model, config.weights))
        momentum = config.teacher_momentum or self.loss.teacher_momentum
        self.teacher = Teacher(self.model, momentum) if self.loss.has_teacher else None
        separate_passes = model is None or config.local_crops
        whole = ssl_augment(config.image_size, self.loss.crop_area)
        self.extra_views = {"views": (2 if separate_passes else 1, whole)}
        if config.local_crops:  # of 5% to 40% of the area, and 96 pixels for 224
            side = max(1, round(self.model.config.grid * 96 / 224)) * config.patch_size
            self.extra_views["local_views"] = config.local_crops, ssl_augment(side, (0.05, 0.4))

    def inputs(self, batch, device):
        inputs = super().inputs(batch, device)
        for name in inputs.keys() & self.extra_views.keys():  # (B, views, 3, H, W)
            inputs[name] = normalize(inputs[name] / 255, self.norm).unbind(1)
        return inputs

    def pool(self, model, x):
        """Features (B, 1 + N, D) -> (B, D): [CLS], or the mean patch."""
        x = model.norm(x)
        return x[:, 0] if self.pooling == "cls" else x[:, 1:].mean(dim=1)

    def outputs(self, views):
        """The student's outputs (B, D) of views (B, 3, H, W). One pass serves all, but the head
        gets one view at a time, so that batch norm never mixes views."""
        x = self.pool(self.model, self.model.features(torch.cat(views)))
        return [self.model.projector(view) for view in x.chunk(len(views))]

    def others(self, views):
        """What the student's outputs are compared with: the teacher's, or its own."""
        if not self.teacher:
            return self.outputs(views)
        network = self.teacher.network
        with torch.no_grad():
            x = self.pool(network, network.features(torch.cat(views)))
            return [self.loss.teacher_outputs(network.projector, v) for v in x.chunk(len(views))]

    def forward(self, inputs, denominators, progress):
        views = inputs["views"]
        student = self.outputs(views)
        if "local_views" in inputs:
            student += self.outputs(inputs["local_views"])
        pairs = [student]  # the two views, without a teacher
        if self.teacher:  # the student's first two views are the teacher's
            wanted = self.others(views)
            pairs = [(a, b) for i, a in enumerate(student) for j, b in enumerate(wanted) if i != j]
        return self.compare(pairs, denominators, progress)

    def compare(self, pairs, denominators, progress):
        """(loss, metrics) of pairs of outputs (B, D)."""
        with torch.autocast(pairs[0][0].device.type, enabled=False):  # temperatures: float32
            losses = [self.loss(a.float(), b.float(), progress) for a, b in pairs]
        loss = sum(losses) / denominators[0]
        if not self.loss.sums_pairs:
            loss = loss / len(pairs)
        return self.weight * loss, {"contrast_loss": loss.detach()}

    def after_step(self, progress):
        self.loss.after_step()
        if self.teacher:
            self.teacher.follow(self.model, progress)

    def eval_sums(self, inputs, progress):
        z = F.normalize(self.outputs([inputs["images"]])[0].float(), dim=1)
        return {"z": z.sum(dim=0), "z_square": z.square().sum(dim=0)}

    def finish(self, sums, denominators):
        """The deviation of the head's outputs, normalized to length 1, times sqrt(dimensions):
        about 1 if they are spread evenly, 0 if they collapsed."""
        means = divide(sums, denominators[0])
        variance = means["z_square"] - means["z"] ** 2
        return {"feature_std": np.sqrt(variance.clip(0)).mean() * math.sqrt(len(variance))}

    @staticmethod
    def check(config):
        vit_config(config)
        check_range(config, 0, math.inf, "local_crops", "projector_dim")
        check_range(config, 0, math.inf, "mim_weight", "contrast_weight")
        check_range(config, 1, math.inf, "prototypes")
        check_range(config, 0, 1, "teacher_momentum")
        check_range(config, 0.001, math.inf, "teacher_temperature")
        name = f"--contrast={config.contrast}"
        loss = CONTRASTIVE_LOSSES[config.contrast]
        if config.local_crops and not loss.sees_local_crops:
            raise BadInput(f"--local_crops={config.local_crops}: {name} has no small views")
        if not config.mim_weight + config.contrast_weight:
            raise BadInput("--mim_weight=0 --contrast_weight=0: nothing is left to train on")
        processes = config.processes if config.dry_run and config.processes else world_size()
        batch = config.batch_size
        need = math.ceil(batch / processes)
        if loss.needs_whole_batch and (config.micro_batch < need or batch < 2 or batch % processes):
            raise BadInput(f"{name}: compares all images of a batch, so gradients cannot "
                           f"accumulate; give --micro_batch={need} or more, and a --batch_size of "
                           f"2 or more that is a multiple of the {processes} processes")


class MIMWithContrast(MaskedImageModeling):
    """The weighted sum of masked image modeling and a contrastive loss, on one network.

    ONE pass over the masked image serves both losses; its output is compared with that of another,
    unmasked view. With --local_crops the passes are separate; app. E's cost suggests the same."""

    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self.contrast = Contrast(config, model=self.model)
        self.extra_views = self.contrast.extra_views
        self.mim_weight = config.mim_weight

    def inputs(self, batch, device):
        return self.contrast.inputs(batch, device)

    def denominators(self, batch):
        return [*super().denominators(batch), len(batch["images"])]

    def forward(self, inputs, denominators, progress):
        if "local_views" not in inputs:
            features = self.model.masked_features(inputs["images"], inputs["mask"])
            logits = self.model.predict(features, inputs["positions"])
            mim_loss, metrics = self.mim_loss(logits, inputs, denominators)
            output = self.model.projector(self.contrast.pool(self.model, features))
            pairs = [(output, self.contrast.others(inputs["views"])[0])]
            loss, more = self.contrast.compare(pairs, denominators[1:], progress)
        else:
            mim_loss, metrics = super().forward(inputs, denominators, progress)
            loss, more = self.contrast(inputs, denominators[1:], progress)
        metrics |= {"mim_loss": mim_loss.detach(), **more}
        return self.mim_weight * mim_loss + loss, metrics

    def after_step(self, progress):
        self.contrast.after_step(progress)

    def eval_sums(self, inputs, progress):
        sums = super().eval_sums(inputs, progress)
        return sums | self.contrast.eval_sums(inputs, progress)

    def finish(self, sums, denominators):
        metrics = super().finish(sums, denominators)
        return metrics | self.contrast.finish(sums, denominators[1:])

    @staticmethod
    def check(config):
        MaskedImageModeling.check(config)
        Contrast.check(config)


# ---- tools: targets that are made first, pictures, cached tokens, the plan, speed ----------------

def make_objective(config, device, tokenizer=None):
    """The objective of --task on the device; `tokenizer` replaces the one of --tokenizer."""
    objective_class = find_objective(config)
    spec = objective_class.target(config)
    if spec in PREREQUISITES:
        spec = f"{spec}:{config.out}/tokenizer/checkpoint.pt"  # which main makes first
    if spec and tokenizer is None:
        tokenizer = local_rank0_first(find_tokenizer, spec, config, device)
        if config.compile and not config.dry_run:
            tokenizer.encode = torch.compile(tokenizer.encode)
            tokenizer.loss = torch.compile(tokenizer.loss, dynamic=True)  # masks differ in size
    torch.manual_seed(config.seed)  # the same init in every process
    return objective_class(config, tokenizer).to(device)


def find_tokenizer(spec, config, device):
    """The frozen tokenizer of --tokenizer. Random weights will do for a plan, and if need be for
    --bench: speed does not depend on them."""
    try:
        if not config.dry_run:
            return build_tokenizer(spec, device, config.patch_size)
    except BadInput as error:
        if not config.bench:
            raise
        log(f"{error}\nmeasuring with random weights, which are as fast")
    tokenizer = TOKENIZERS[spec.partition(":")[0]].untrained(**asdict(config))
    return tokenizer.to(device).eval().requires_grad_(False)


def make_prerequisite(config, target):
    """Train a tokenizer into OUT/tokenizer. Returns False if a signal stopped it."""
    task, make = PREREQUISITES[target]
    names = marked(Config, "free") | marked(Config, "shared")
    options = {name: getattr(config, name) for name in names}
    check_range(config, 1, math.inf, "tokenizer_steps")
    options |= dict(task=task, out=f"{config.out}/tokenizer", token_cache="none", bench=False,
                    steps=config.tokenizer_steps, lr=config.tokenizer_lr, warmup_epochs=0,
                    warmup_steps=config.tokenizer_warmup)
    return make(Config(**options))


def fit_pca(config):
    """Find the principal components of the patches of (at most 5,000) training images, as they
    are seen in training. It takes only minutes and cannot be interrupted."""
    device, _ = setup_device(config)
    images, val_images = local_rank0_first(open_images, config.data, config.image_size,
                                           config.val_images, config.out)
    pca = TOKENIZERS["pca"].untrained(**asdict(config))
    if len(images) < world_size():
        raise BadInput(f"--data={config.data}: {len(images)} images are too few, one per process")
    claim_folder(config, images)
    if config.resume == "auto" and load_checkpoint(config.out):
        log(f"pca into {config.out}: done already")
        return
    dataset = Views(images, config, config.image_size, train=True)
    order = permutation(len(images), config.seed, 0)
    keys = local_shard([(0, index, 0.0) for index in order[:5_000]])
    batches = [keys[i : i + config.micro_batch] for i in range(0, len(keys), config.micro_batch)]
    loader = make_loader(dataset, batches, config.num_workers, device)
    moments = 0
    for batch in tqdm(loader, "principal components", disable=no_progress_bar()):
        moments += pca.moments(network_inputs(batch, device, config.norm)["token_images"])
    pca.fit(torch.tensor(all_reduce_sum(*moments.tolist()), dtype=torch.float64))

    shares = (pca.variances.cumsum(0) / pca.variances.sum()).tolist()
    save_checkpoint(config, pca, step=0)
    batch = sample_batch(Views(val_images, config, config.image_size, train=False), 8)
    images = network_inputs(batch, torch.device("cpu"), config.norm)["token_images"]
    columns = {"image": images}
    for n in sorted({math.ceil(config.components / 4**k) for k in range(4)}):
        log(f"{n} of {len(shares)} components hold {shares[n - 1]:.2%} of the variance of a patch")
        columns[f"{n} components"] = pca.decode(pca.encode(images)[..., :n])
    if rank() == 0:
        save_columns(f"{config.out}/reconstruction.png", columns)


def reconstruct(config):
    """OUT/reconstruction_NAME.png for a picture, or some of a folder or data set, at its own
    aspect: what the BEiT in --weights, a checkpoint.pt of this script, fills in."""
    need_weights(config)
    options = read_network(config.weights)[2].get("config", {})
    if options.get("task") != "mim" or not options.get("mim_weight"):
        raise BadInput(f"--weights={config.weights}: no checkpoint.pt of masked image modeling")
    device, dtype = setup_device(config)
    own = {"task", "weights", "seed", "contrast", "mim_weight", "local_crops"}
    config = as_trained(config, *sorted(options.keys() - own - marked(Config, "free")))
    # the run's tokenizer lies beside it, if it was trained first
    trained = replace(config, task="mim", out=os.path.dirname(config.weights) or ".")
    objective = make_objective(trained, device).eval()
    patch_sizes = {"images": config.patch_size, "token_images": objective.tokenizer.downsample}
    images = open_pictures(config.data, config.image_size, config.out)
    for index, stem in enumerate(images.stems()):
        picture = images.load(index, config.skip_bad_images)[0]
        height, width = fit_size(picture.shape[1:], config.image_size, config.patch_size)
        rng = np.random.default_rng([config.seed, index])
        mask = draw_mask(config.mask, config, rng, 1.0, (height, width))
        batch = dict.fromkeys(("mask", "predict"), torch.from_numpy(mask)[None])
        for name, patch in patch_sizes.items():
            sides = [height * patch, width * patch]
            batch[name] = TF.resize(picture, sides, BICUBIC, antialias=True)[None]
        with autocast(device, dtype):
            columns = objective.reconstruct(objective.inputs(batch, device))
        path = f"{config.out}/reconstruction_{stem}.png"
        save_columns(path, columns)
        log("wrote", path)


def open_tokens(folder, config, images, tokenizer, mode):
    """(tokens (epochs, images, h, w), what tokens.json says of them) in a folder, to read (mode
    "r") or to make and write them ("r+"). tokens.json holds what they depend on, and how many
    epochs are done. Raises BadInput if they are of another run, or to be read and not all done."""
    check_range(config, 1, math.inf, "cache_epochs")
    digest = hashlib.sha256()
    for value in tokenizer.state_dict().values():
        digest.update(value.half().cpu().numpy().tobytes())  # a GPU holds DALL-E's in float16
    names = ("seed", "image_size", "patch_size", "crop_min", "jitter", "cache_epochs")
    key = {name: getattr(config, name) for name in names}
    key |= {"images": images.fingerprint(), "tokenizer": digest.hexdigest()[:8]}
    path = f"{folder}/tokens.json"
    if mode == "r+" and rank() == 0 and not os.path.exists(path):
        os.makedirs(folder, exist_ok=True)
        grid = config.image_size // config.patch_size
        shape = (config.cache_epochs, len(images), grid, grid)
        np.lib.format.open_memmap(f"{folder}/tokens.npy", "w+", np.uint16, shape)
        write_json(path, {**key, "done": 0})
    barrier()
    if not os.path.exists(path):
        raise BadInput(f"--token_cache={folder}: holds no tokens.json; --task=tokens writes it")
    there = read_json(path)
    for name, value in key.items():
        if there.get(name) != value:
            raise BadInput(f"{folder}: tokens of another run: {name} is {there.get(name)} there, "
                           f"{value} here")
    if mode == "r" and there["done"] < config.cache_epochs:
        raise BadInput(f"--token_cache={folder}: {there['done']} of {config.cache_epochs} epochs "
                       "are done; run its --task=tokens again")
    return np.load(f"{folder}/tokens.npy", mmap_mode=mode), there


@torch.no_grad()
def write_tokens(config):
    """--task=tokens: write OUT/tokens.npy, (epochs, images, h, w) uint16, of --cache_epochs epochs,
    from the first that is not done. Its processes are to run on one machine."""
    config = replace(config, task="mim")  # whose objective has the tokenizer
    if config.tokenizer in PREREQUISITES:
        raise BadInput(f"--task=tokens: give a trained tokenizer, {config.tokenizer}:FILE")
    device, _ = setup_device(config)
    images, _ = local_rank0_first(open_images, config.data, config.image_size, config.val_images,
                                  config.out)
    objective = make_objective(config, device)
    if not hasattr(objective.tokenizer, "vocab_size"):
        raise BadInput(f"--task=tokens: --tokenizer={config.tokenizer} has no tokens")
    tokens, about = open_tokens(config.out, config, images, objective.tokenizer, "r+")
    dataset = Views(images, config, objective.token_size, train=True)
    for epoch in range(about["done"], config.cache_epochs):
        keys = batches_of_all(len(images), config.micro_batch, epoch)
        loader = make_loader(dataset, keys, config.num_workers, device)
        bar = tqdm(loader, f"tokens of epoch {epoch}", len(keys), disable=no_progress_bar())
        for batch_keys, batch in zip(keys, bar, strict=True):
            found = objective.tokenizer.encode(objective.inputs(batch, device)["token_images"])
            tokens[epoch, [index for _, index, _ in batch_keys]] = found.cpu().numpy()
        tokens.flush()
        barrier()  # all have written theirs
        if rank() == 0:
            write_json(f"{config.out}/tokens.json", {**about, "done": epoch + 1})
    log(f"wrote {config.out}/tokens.npy")


def seconds_of(call, *arguments, threads=None):
    """Mean seconds of four calls, after two that warm up."""
    threads = threads or torch.get_num_threads()
    return Timer("call(*arguments)", globals=locals(), num_threads=threads).timeit(4).mean


def flops_of(call, *arguments):
    # not every device's fused attention is counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops()


def plan(config):
    """Print what a run takes: steps, accumulation, parameters, compute, memory and days."""
    device, dtype = setup_device(config)
    source = f"in {config.data}"
    try:
        count = len(open_images(config.data, config.image_size, config.val_images, config.out)[0])
    except BadInput:
        count = 1_281_167
        source = f"assumed, as in ImageNet-1k: there is no --data={config.data} here"
    steps, steps_per_epoch, warmup = run_length(config, count)
    objective = make_objective(config, device).eval()  # batch norm of one image fails
    processes = config.processes or world_size()
    local_batch = math.ceil(config.batch_size / processes)
    micro_batch = min(local_batch, config.micro_batch)
    trial = micro_batch if device.type == "cuda" else 2  # images to measure with
    images = DATASETS["shapes"](True, config.image_size, "").subset(range(trial))
    batch = sample_batch(Views(images, config, objective.token_size, True, objective.mask,
                               objective.extra_views), trial)
    half = trial // 2 or 1
    few = {name: value[:half] for name, value in batch.items()}
    kept = {}  # by the forward pass for the backward pass: address and bytes

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def step(batch):
        """Forward and backward; returns the bytes that were kept between them."""
        kept.clear()
        inputs = objective.inputs(batch, device)
        with autocast(device, dtype), saved_tensors_hooks(keep, torch.Tensor.detach):
            loss, _ = objective(inputs, objective.denominators(batch), 1.0)
        loss.backward()
        return sum(kept.values())

    activations = (step(batch) - step(few)) / (trial - half or 1)  # the rest is weights
    flops = flops_of(step, few) / half
    cache = "none: its targets are no tokens"
    if hasattr(tokenizer := objective.tokenizer, "vocab_size"):
        net = objective.inputs(few, device)
        share = flops_of(tokenizer.encode_at, net["token_images"], net["positions"]) / half / flops
        cache = (f"{2 * count * objective.model.config.grid**2 / 1e9:,.3f} GB per epoch; saves "
                 f"{share:.0%} of the compute from the second run on, or if --cache_epochs is less")
    speed = config.images_per_s or trial / seconds_of(step, batch)
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    # gradient and AdamW's two moments besides the weight; frozen parameters have only the weight
    weights = 12 * trained + 4 * sum(p.numel() for p in objective.parameters())
    days = steps * config.batch_size / (speed * processes) / 86_400
    log(f"images      {count:,} {source}")
    log(f"steps       {steps:,} of {config.batch_size:,} images, {steps_per_epoch:,} per epoch, "
        f"{warmup:,} of warm-up")
    log(f"each step   {processes} processes x {math.ceil(local_batch / micro_batch)} micro-batches "
        f"x {micro_batch} images")
    log(f"parameters  {trained:,}")
    log(f"compute     {flops / 1e9:,.1f} GFLOP per image with its tokens and the backward pass, "
        f"{flops * config.batch_size / 1e12:,.1f} TFLOP per step")
    log(f"memory      {(weights + micro_batch * activations) / 2**30:,.1f} GiB per process: "
        f"{weights / 2**30:,.1f} of weights, gradients and AdamW, "
        f"{activations / 2**20:,.0f} MiB per image of activations in {dtype}")
    log("token cache", cache)
    source = "given" if config.images_per_s else "measured now"
    log(f"speed       {speed:,.1f} images/s per process, {source}")
    log(f"time        {days:,.2f} days on {processes} processes")


def bench(objective, parallel, optimizer, dataset, config, device, dtype):
    """--bench, in `fit`: print what one process does per second, loading images, making tokens,
    learning from them and all of it, as a table and, in the last line, as JSON."""
    size = min(config.micro_batch, config.batch_size // world_size())
    batches = batches_of_steps(0, 100, len(dataset), size * world_size(), config.seed)
    loader = iter(make_loader(dataset, batches, config.num_workers, device))
    batch = next(loader)
    has_tokenizer = objective.tokenizer is not None and "tokens" not in batch

    def load():
        return [dataset[0, index, 0.0] for index in range(size)]

    def encode(batch):
        inputs = objective.inputs(batch, device)
        if has_tokenizer:
            with autocast(device, dtype):
                inputs["tokens"] = objective.tokenizer.encode(inputs["token_images"])
        return inputs

    def learn(inputs, denominators):
        with autocast(device, dtype):
            loss, _ = parallel(inputs, denominators, 1.0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step():
        batch = next(loader)
        learn(objective.inputs(batch, device), objective.denominators(batch))

    few = micro_batches(batch, 2)[0]
    flops = flops_of(learn, encode(few), objective.denominators(few)) / len(few["images"])
    learning = seconds_of(learn, encode(batch), objective.denominators(batch))
    rates = {
        "load_images_per_s_per_core": size / seconds_of(load, threads=1),  # as loaders have
        "tokenizer_images_per_s": size / seconds_of(encode, batch) if has_tokenizer else None,
        "model_images_per_s": size / learning,
        "step_images_per_s": size / seconds_of(step),
    }
    try:
        import resource
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    except ImportError:  # Windows
        peak = math.nan
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    side = 8192 if device.type == "cuda" else 2048
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    most = 2 * side**3 / seconds_of(torch.matmul, matrix, matrix)
    rates |= {"peak_memory_gb": peak / 1e9, "utilisation": flops * size / learning / most}
    for name, value in rates.items():
        log(f"{name:27}{'none' if value is None else format(value, '.4g')}")
    steps = run_length(config, len(dataset))[0]
    days = steps * config.batch_size / (rates["step_images_per_s"] * world_size()) / 86_400
    log(f"{size} images a step of {flops / 1e9:.1f} GFLOP each; a matrix product does "
        f"{most / 1e12:.3g} TFLOP/s; the run takes {days:.3g} days on {world_size()} processes")
    log(json.dumps(rates))


# ---- tables --------------------------------------------------------------------------------------

OBJECTIVES = {"mim": MaskedImageModeling, "tokenizer": TokenizerTraining}
# tasks that need no loop
OTHER_TASKS = {"pca": fit_pca, "reconstruct": reconstruct, "tokens": write_tokens}
# kinds of --tokenizer that are made first if no file is given: (task, function)
PREREQUISITES = {"dvae": ("tokenizer", train), "pca": ("pca", fit_pca)}


def find_objective(config):
    if config.contrast != "none":
        if config.task != "mim":
            raise BadInput(f"--contrast={config.contrast}: goes with --task=mim")
        return MIMWithContrast if config.mim_weight else Contrast
    if config.mim_weight != 1 or config.local_crops:
        raise BadInput("--mim_weight and --local_crops go with a contrastive loss: give --contrast")
    return OBJECTIVES[config.task]


if __name__ == "__main__":
    run(main)
