"""Pre-train BEiT (arXiv 2106.08254): hide blocks of image patches, predict their visual tokens.

No arguments is the paper's recipe (table 12): ViT-B, 800 epochs of ImageNet-1k, batch 2048,
DALL-E's tokens. The paper gives about five days on 16 V100-32GB for its 500,000 steps, and 83.2%
top-1 after fine-tuning; neither has been measured with this code. On 8 GPUs:
    torchrun --nproc_per_node=8 pretrain.py --data=/path/to/imagenet --out=out/beit_base
In five minutes on two CPU cores, on images that the script draws itself:
    python pretrain.py --preset=shapes
Other targets than DALL-E's tokens: --task=tokenizer trains a dVAE, --task=pca finds principal
components; --tokenizer=dvae or pca does that first. --contrast=dino, moco or simclr adds a loss.
See the plan of a run (steps, compute, memory, days) without data or GPU:
    python pretrain.py --dry_run
See what a trained model attends to:
    python pretrain.py --task=attention --weights=out/shapes/checkpoint.pt --data=picture.jpg
`--help` lists every option. Run a command again after it was killed, and it goes on where it was.

Read this file from the bottom: main, train, then the objectives. Everything random (crops, masks,
noise) is a function of the seed and of the step or the image, never of a generator's history.
"""

import argparse
import copy
import difflib
import functools
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
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import make_grid
from tqdm import tqdm

from masking import blockwise_mask, random_mask
from model import (
    BEiT, Block, DINOHead, MoCoHead, ViT, ViTConfig, gather, load_weights, mlp, param_groups,
    read_weights, write_atomically,
)
from tokenizer import (
    DVAE, PCA, VQGAN, DVAEConfig, PCAConfig, Pixels, build_tokenizer, load_dalle, read_checkpoint,
)

# ---- the options ---------------------------------------------------------------------------------
# The comment behind a field is its text in --help: why this value, or what goes wrong with another.


@dataclass
class RunConfig:
    """What the three scripts share."""

    data: str = "imagenet"  # folder of images, searched to the bottom; or shapes, cifar10, cifar100
    out: str = "out/run"  # one folder a run: checkpoint.pt, metrics.jsonl, config.json, pictures
    weights: str = "none"  # file or folder of weights to start from (README); none: random ones
    size: str = "base"  # nano (for demos), tiny, small, base or large; the paper has base and large
    variant: str = "paper"  # paper: its tables' model; released: its checkpoints' (model.py)
    image_size: int = 224  # pixels a side, a multiple of patch_size; twice is four times the work
    patch_size: int = 16  # pixels a side; half is four times the work
    epochs: float = 800  # passes over the data; 300 cost 0.3 points of ImageNet top-1 (table 4)
    steps: int = 0  # length of the run in steps instead; 0: as epochs says
    batch_size: int = 2048  # images a step over ALL processes; for 512 halve the lr (the authors)
    micro_batch: int = 128  # images a process computes at once; if memory runs out, lower this
    lr: float = 1.5e-3  # peak of the schedule; too high shows as a loss that jumps up early
    min_lr: float = 1e-5  # where the cosine ends
    warmup_epochs: float = 10  # linear warm-up; a ViT without one diverges at this lr
    warmup_steps: int = 0  # length of the warm-up in steps instead; 0: as warmup_epochs says
    weight_decay: float = 0.05  # of matrices only; biases, norms and embeddings have none
    clip_grad: float = 3.0  # largest gradient norm, 0 for none; the paper clips large at 1.0
    drop_path: float = 0.1  # stochastic depth of the last block; longer runs bear more
    seed: int = 0  # of the init, order, crops, masks and noise; rerun with others for error bars
    num_workers: int = 8  # processes that load images for each GPU; the batches do not depend on it
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # float16 on V100
    compile: bool = False  # torch.compile the blocks: a slow start, then faster steps on a GPU
    device: str = "auto"  # auto is this process's GPU if there is one; or cpu, cuda, mps
    resume: Literal["auto", "never"] = "auto"  # never starts over and replaces what is in --out
    log_every: int = 50  # steps between log lines; each of them waits for the GPU
    eval_every: int = 6250  # steps between evaluations with pictures, 0 for one at the end
    save_every: int = 1250  # steps between checkpoints: what a crash loses; SIGTERM loses nothing
    repeats: int = 1  # views of an image in one batch: repeated augmentation (arXiv 1902.05509)
    norm: Literal["imagenet", "half"] = "imagenet"  # pixel statistics; half: official 22k weights
    skip_bad_images: bool = False  # count and skip unreadable images; false stops at one
    tensorboard: bool = False  # also log for TensorBoard, which must be installed


@dataclass
class Config(RunConfig):
    task: Literal["mim", "tokenizer", "pca", "attention"] = "mim"  # see the top of the file
    tokenizer: str = "dalle"  # dalle[:DIR], dvae[:FILE], vqgan:FILE, pixel[:norm], pca[:FILE]
    mask: Literal["block", "random", "none"] = "block"  # random: -0.1 top-1, -1.7 mIoU (table 4)
    mask_ratio: float = 0.383  # 75 of 14x14 patches, the authors' rounding of the paper's 40%
    min_block: int = 16  # least patches of a block (algorithm 1); lower it on grids below 8x8
    predict: Literal["masked", "all"] = "masked"  # all patches: -0.3 top-1, -3.7 mIoU (table 4)
    crop_min: float = 0.08  # least area of MIM's crop; raise it where images are tiny
    jitter: float = 0.4  # of brightness, contrast and saturation; MIM's tokens see it too
    tokenizer_steps: int = 50_000  # of training our own dVAE when --tokenizer=dvae does that first
    tokenizer_lr: float = 1.5e-3  # peak of that; a small dVAE bears more than a ViT
    vocab_size: int = 8192  # tokens of our own dVAE; fewer are learnt faster and carry less detail
    downsample: int = 8  # pixels a side to a token of our own dVAE; a power of two
    val_images: int = 2048  # held-out images an evaluation reads; more is slower and less noisy
    dvae_dim: int = 128  # channels of our own dVAE; twice is four times the work
    kl_weight: float = 1e-2  # of the dVAE's pull to uniform tokens; raise it if few tokens are used
    components: int = 64  # of --task=pca; more are sharper, but the last ones are noise to predict
    contrast: str = "none"  # a second loss: dino, moco or simclr (README, "Beyond the paper")
    contrast_on: Literal["cls", "mean"] = "cls"  # where it looks: [CLS], or as probes do
    contrast_weight: float = 1.0  # of it; more makes features more alike within an image
    mim_weight: float = 1.0  # of masked image modelling; 0: plain DINO, MoCo v3 or SimCLR
    local_crops: int = 0  # small views for DINO, beside MIM as in app. E (8 there, 4.2x the cost)
    projector_dim: int = 2048  # hidden units of the contrastive head; fewer for small networks
    prototypes: int = 65_536  # outputs of DINO's head; fewer for small data
    teacher_momentum: float = 0.996  # at the start, then up to 1; less in runs of few steps
    teacher_temperature: float = 0.07  # of DINO's targets, from 0.04; runs of few steps stay there
    query: str = ""  # row,column of the patch that --task=attention asks; empty: the middle
    dry_run: bool = False  # print the plan of the run, without data, and stop
    processes: int = 0  # GPUs that the plan is for; 0: as many as run it
    images_per_s: float = 0.0  # of one process, for the plan's days; 0: measured now. V100: 148


# A preset is what differs from the recipe; a key like "size=large" holds what that option changes.
# The demos' tokenizer is our own dVAE, trained first.
DEMO = dict(size="nano", tokenizer="dvae", dvae_dim=64, downsample=4, batch_size=64, lr=3e-3)
DEMO |= dict(warmup_epochs=0.2, num_workers=2, log_every=25, projector_dim=512, prototypes=2048)
DEMO |= dict(tokenizer_lr=3e-3, teacher_momentum=0.99, teacher_temperature=0.04)
CIFAR = dict(DEMO, image_size=32, patch_size=4, crop_min=0.3, vocab_size=512)
CIFAR |= dict(epochs=10, tokenizer_steps=1000, eval_every=1000, save_every=500)
PRESETS = {
    "paper": {
        "size=large": dict(clip_grad=1.0, micro_batch=64),
        "contrast=moco": dict(projector_dim=4096, teacher_momentum=0.99),
    },
    "shapes": dict(DEMO, data="shapes", out="out/shapes", image_size=64, patch_size=8, crop_min=0.5)
    | dict(vocab_size=256, steps=250, tokenizer_steps=300, eval_every=125, save_every=125)
    | dict(val_images=512, lr=1e-3),
    "cifar10": dict(CIFAR, data="cifar10", out="out/cifar10"),
    "cifar100": dict(CIFAR, data="cifar100", out="out/cifar100"),
}

# ---- the run: command line, processes, schedule, checkpoint, log; all three scripts use it -------


class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line, once under torchrun, exit code 2."""
        for unknown in re.findall(r"unrecognized arguments: --(\w+)", message):
            known = [option[2:] for option in self._option_string_actions]
            close = difflib.get_close_matches(unknown, known, n=1)
            message += f"; did you mean --{close[0]}?" if close else "; --help lists what there is"
        sys.exit(2) if rank() else fail(message, 2)


def parse_args(config_class, presets, argv=None, doc=""):
    """The config of a command line: defaults, then the preset's values, then --FIELD=VALUE. The
    first preset is the default; a field whose type is a tuple takes the words without a name."""

    def boolean(text):
        if text.lower() not in ("true", "false"):
            raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
        return text.lower() == "true"

    style = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=doc, formatter_class=style, allow_abbrev=False)
    first = next(iter(presets))
    parser.add_argument("--preset", choices=presets, default=first, help="a set of the below")
    texts = field_texts(config_class)
    for f in fields(config_class):
        text = f"{texts[f.name]} (default: {f.default!r})".replace("%", "%%")
        name, kind = f"--{f.name}", dict(type=f.type)
        if f.type is tuple:
            name, kind = f.name, dict(nargs="*")
        elif get_args(f.type):
            kind = dict(choices=get_args(f.type))
        elif f.type is bool:
            kind = dict(type=boolean, nargs="?", const=True)  # --dry_run alone is --dry_run=true
        parser.add_argument(name, help=text, default=argparse.SUPPRESS, **kind)
    given = vars(parser.parse_args(argv))
    preset = presets[given.pop("preset")]
    values = {name: value for name, value in preset.items() if "=" not in name}
    chosen = asdict(config_class(**{**values, **given}))
    for name, changes in preset.items():
        field, _, value = name.partition("=")
        if value and chosen[field] == value:
            values |= changes
    return config_class(**{**values, **given})


def field_texts(config_class):
    """The comment behind each field, by the field's name."""
    source = "".join(inspect.getsource(c) for c in reversed(config_class.__mro__[:-1]))
    return dict(re.findall(r"^    (\w+): [^#\n]*# *(.*)$", source, flags=re.MULTILINE))


def fail(message, code):
    """Print one line and exit: code 2 for bad input, 1 for a run that went wrong."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    if multiprocessing.active_children():  # loader processes leave when they see this one gone;
        os._exit(code)  # sys.exit would send them SIGTERM, which they ignore, and wait for ever
    sys.exit(code)


def run(main):
    """Call main() and turn what the user can mend into one line without a traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        # a loader process's error comes wrapped in its traceback: the last line is the message
        last = (str(error).strip() or repr(error)).splitlines()[-1]
        fail(last.removeprefix("ValueError: "), 2)
    except FloatingPointError as error:
        fail(error, 1)
    except Exception as error:
        traceback.print_exc()
        fail(f"{type(error).__name__}, from a bug or a lack of memory: see above", 1)
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def all_sum(*numbers):
    """The sums of numbers over all processes, as floats (float64, on the CPU: no GPU waits)."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if world_size() > 1:
        dist.all_reduce(total)
    return total.tolist()


def one_first(make):
    """make(), in one process of a machine before the others: what it downloads, they find."""
    for turn in (True, False):
        if turn == (int(os.environ.get("LOCAL_RANK", 0)) == 0):
            made = make()
        all_sum(0)
    return made


def log(*words):
    """Print once, whatever the number of processes, and without tearing the progress bar."""
    if rank() == 0:
        tqdm.write(" ".join(map(str, words)))
        sys.stdout.flush()


def setup_device(config):
    """Join the processes that torchrun started, log what runs where, and return this process's
    (device, dtype of the network)."""
    name, dtype = config.device, config.dtype
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device={config.device}: not on this machine ({reason})") from None
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(device)
    if world_size() > 1 and not dist.is_initialized():
        # gradients go over nccl, the few numbers that the host needs over gloo
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    if dtype == "auto":
        ampere = cuda and torch.cuda.get_device_capability(device) >= (8, 0)
        dtype = "bfloat16" if ampere else "float16" if cuda else "float32"
    git = ["git", "-C", os.path.dirname(__file__) or ".", "describe", "--always", "--dirty"]
    commit = shutil.which("git") and subprocess.run(git, capture_output=True, text=True).stdout
    log(f"commit {(commit or 'unknown').strip()}, torch {torch.__version__}, python "
        f"{platform.python_version()}, {world_size()} x "
        f"{torch.cuda.get_device_name(device) if cuda else device}, {dtype}")
    return device, getattr(torch, dtype)


def stream(*key):
    """A 64-bit seed from a few integers such as (seed, epoch, index): the same everywhere."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def cosine(step, steps, warmup, peak, end):
    """Linear warm-up to `peak` over `warmup` steps, then a cosine to `end` at the last step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return end + (peak - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def run_length(config, count):
    """(steps of the run, steps an epoch, steps of warm-up) on `count` training images."""
    names = "batch_size micro_batch epochs lr image_size patch_size repeats"
    for name in names.split():
        if getattr(config, name) <= 0:
            raise ValueError(f"--{name}={getattr(config, name)}: give a number above 0")
    if not world_size() <= config.batch_size <= count:
        raise ValueError(f"--batch_size={config.batch_size}: must be from {world_size()}, an image "
                         f"a process, to {count}, the training images in --data={config.data}")
    per_epoch = count // config.batch_size
    steps = config.steps or round(config.epochs * per_epoch)
    warmup = config.warmup_steps or round(config.warmup_epochs * per_epoch)
    if warmup >= steps:
        raise ValueError(f"--warmup_epochs={config.warmup_epochs:g}: is {warmup} steps of a run of "
                         f"{steps}; lower it (or --warmup_steps), or train longer")
    return steps, per_epoch, warmup


# Fields with which a run may go on at other values: they do not change what it learns (micro_batch
# no more than the noise of stochastic depth and the statistics of batch norm)
FREE = "out device num_workers micro_batch compile resume log_every eval_every save_every"
FREE = f"{FREE} tensorboard skip_bad_images query dry_run processes images_per_s runs".split()


def claim_folder(config):
    """Write OUT/config.json; raise ValueError if a run of another config is there."""
    path = os.path.join(config.out, "config.json")
    saved = [os.path.join(config.out, name) for name in ("checkpoint.pt", "previous.pt")]
    started = os.path.exists(path) and any(map(os.path.exists, saved))
    if config.resume == "auto" and started:
        with open(path) as file:
            there = json.load(file)
        differ = [k for k, v in asdict(config).items() if k not in FREE and there.get(k) != v]
        if differ:
            changes = (f"{k}: {there.get(k)!r} there, {getattr(config, k)!r} now" for k in differ)
            raise ValueError(f"{config.out} holds a run of another config ({', '.join(changes)}); "
                             "give another --out, or --resume=never to replace it")
    if rank() == 0:
        for name in ("checkpoint.pt", "previous.pt") if config.resume == "never" else ():
            with suppress(FileNotFoundError):  # else a run killed early would go on from them
                os.remove(os.path.join(config.out, name))
        text = json.dumps(asdict(config), indent=1)
        write_atomically(path, lambda file: file.write(text.encode()))


def save_checkpoint(out, **state):
    """Write OUT/checkpoint.pt from the first process; the one before it stays as previous.pt."""
    if rank() == 0:
        path, keep = (os.path.join(out, name) for name in ("checkpoint.pt", "previous.pt"))
        write_atomically(path, lambda file: torch.save(state, file), keep)


def load_checkpoint(out):
    """What save_checkpoint wrote last, or before that if that is damaged; None if it never did."""
    paths = [os.path.join(out, name) for name in ("checkpoint.pt", "previous.pt")]
    paths = [path for path in paths if os.path.exists(path)]
    for path in paths:
        try:
            # torch.load does not look at the checksums, so a flipped bit would go unnoticed
            if bad := zipfile.ZipFile(path).testzip():
                raise ValueError(f"wrong checksum of {bad}")
            return read_checkpoint(path)
        except (ValueError, zipfile.BadZipFile) as error:
            log(f"{path}: damaged ({error}); trying the one before it")
    if paths:
        raise ValueError(f"{' and '.join(paths)}: damaged; --resume=never starts the run over")
    return None


def prepare(objective, config, device, dtype, layer_decay=1.0):
    """What a loop needs besides its data: (model, optimizer, scaler, save, start).

    `model` is the objective, synchronised if there are several processes; `start` the step to begin
    with, from OUT's checkpoint if there is one; save(step) writes that.
    """
    claim_folder(config)
    groups = param_groups(objective.model, config.lr, config.weight_decay, layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    start, state = 0, load_checkpoint(config.out) if config.resume == "auto" else None
    if state:
        objective.load_state_dict(state["objective"])
        optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty: the run had another --dtype until now
            scaler.load_state_dict(state["scaler"])
        start = state["step"]
    size = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    log(f"{size:,} parameters to train")
    if config.compile:
        for block in (module for module in objective.modules() if isinstance(module, Block)):
            block.attn.compile()
            block.mlp.compile()
    model = objective
    if world_size() > 1:  # without device_ids, which would move the masks to the GPU
        model = DistributedDataParallel(objective, broadcast_buffers=False)

    def save(step):
        state = dict(objective=objective.state_dict(), optimizer=optimizer.state_dict())
        state |= dict(scaler=scaler.state_dict(), step=step, config=asdict(config))
        # the network again under its official names, for load_weights; it shares the storage
        state |= dict(model=objective.model.state_dict(), arch=asdict(objective.model.config))
        save_checkpoint(config.out, **state)

    return model, optimizer, scaler, save, start


class Log:
    """What a run tells: a progress bar, OUT/metrics.jsonl with a JSON object a line, TensorBoard's
    files if asked for. `images` are those it trains on, of which it keeps what is there up to the
    step `start`: a resumed run writes the later lines again."""

    def __init__(self, config, images, start, steps, per_epoch):
        self.config, self.images, self.steps, self.per_epoch = config, images, steps, per_epoch
        self.done = self.since = start
        self.clock, self.stop, self.history, self.names = time.time(), False, [], []
        self.skipped_steps = self.bad_images = 0
        signal.signal(signal.SIGTERM, self.on_sigterm)
        self.bar = tqdm(total=steps, initial=start, disable=rank() > 0 or not sys.stderr.isatty())
        self.path, self.board = os.path.join(config.out, "metrics.jsonl"), None
        if rank() > 0:
            return
        kept = "".join(json.dumps(x) + "\n" for x in read_metrics(self.path) if x["step"] <= start)
        write_atomically(self.path, lambda file: file.write(kept.encode()))
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("--tensorboard: first pip install tensorboard") from None
            self.board = SummaryWriter(config.out, purge_step=start)

    def on_sigterm(self, *_):
        """A cluster's preemption: the loop ends before its next step."""
        self.stop = True

    def add(self, row, batch):
        """Note a step's loss, metrics and gradient norm by their names, this process's share of
        each, without waiting for the GPU. Returns whether to log, to evaluate and to save."""
        self.names = list(row)
        self.history.append(torch.stack(list(row.values())))
        self.bad_images += int(batch["skipped"].sum())
        self.done += 1
        self.bar.update()
        intervals = (self.config.log_every, self.config.eval_every, self.config.save_every)
        last = self.done == self.steps
        return [last or (every > 0 and self.done % every == 0) for every in intervals]

    def read(self, lr):
        """The last step as a dict. Here the host waits for the GPU. Raises FloatingPointError at
        the first loss since the last time that is not finite."""
        if not self.history:
            return {}
        rows = torch.stack(self.history).cpu()
        rows = np.array(all_sum(*rows.flatten().tolist())).reshape(rows.shape)
        for step, row in enumerate(rows, self.done - len(rows)):
            if not np.isfinite(row[0]):
                keys = batch_of_step(step, len(self.images), self.config)
                files = ", ".join(self.images.name(index) for _, index in keys)
                raise FloatingPointError(
                    f"the loss of step {step + 1} is {row[0]}; the last checkpoint is untouched. "
                    f"Lower --lr, or look at the images of its batch: {files}"
                )
        self.history.clear()
        self.skipped_steps += int((~np.isfinite(rows[:, -1])).sum())  # by float16's loss scaling
        line = {"step": self.done, "epoch": round(self.done / self.per_epoch, 4)}
        line |= dict(zip(self.names, rows[-1].tolist(), strict=True), lr=lr)
        seconds, self.clock = time.time() - self.clock, time.time()
        line["images_per_s"] = (self.done - self.since) * self.config.batch_size / seconds
        line |= {"skipped_steps": self.skipped_steps} if self.skipped_steps else {}
        bad = all_sum(self.bad_images)[0] if self.config.skip_bad_images else 0
        return line | ({"bad_images": bad} if bad else {})

    def write(self, line):
        log(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in line.items()))
        self.since, self.clock = self.done, time.time()
        if rank() > 0:
            return
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items() if self.board else ():
            self.board.add_scalar(name, value, line["step"])

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


# ---- images --------------------------------------------------------------------------------------


class Images:
    """A list of images: `read` makes an RGB image of each key, which is a path or a number."""

    def __init__(self, keys, read, source):
        self.keys, self.read, self.source = keys, read, source

    def __len__(self):
        return len(self.keys)

    def name(self, index):
        key = self.keys[index]
        return key if isinstance(key, str) else f"{self.source} image {key}"

    def load(self, index, skip_bad=False):
        """(image, its index): the one at `index`, or if asked the first readable one after it."""
        for found in (*range(index, len(self)), *range(index)):
            try:
                return self.read(self.keys[found]), found
            except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others
                if not skip_bad:
                    raise ValueError(f"{self.name(found)}: cannot be read as an image ({error}); "
                                     "remove it or give --skip_bad_images") from error
        raise ValueError(f"{self.source}: no image in it can be read")

    def split(self, count):
        """(`count` images taken evenly from the whole list, the rest)."""
        taken = set(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int).tolist())
        parts = [[], []]
        for index, key in enumerate(self.keys):
            parts[index not in taken].append(key)
        return [Images(keys, self.read, self.source) for keys in parts]


ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".gif")


def folder_images(folder):
    """All images in a folder and below it, in the order of their paths."""
    walk = os.walk(folder, followlinks=True)
    paths = (os.path.join(where, name) for where, _, names in walk for name in names)
    return Images(sorted(p for p in paths if p.lower().endswith(ENDINGS)), read_image, folder)


def read_image(path):
    """The picture in a file as 8-bit RGB, turned as its EXIF tag says."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits: Pillow's own conversion would clip them
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def open_cifar(dataset, train):
    """torchvision's CIFAR-10 or -100, downloaded once into torch's hub cache."""
    root = os.path.join(torch.hub.get_dir(), "cifar")
    try:
        return one_first(lambda: dataset(root, train=train, download=True))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{dataset.__name__}: download failed ({error}); put its archive into "
                         f"{root}, or give --data=FOLDER with the images as files") from error


def array_images(data, source):
    """The images of an array (N, H, W, 3) uint8."""
    return Images(range(len(data)), functools.partial(from_array, data), source)


def from_array(data, index):
    return Image.fromarray(data[index])


def polygon(angle, corners):
    """The outline of a regular polygon: its radius at each angle."""
    return 1 / np.cos(angle % (2 * np.pi / corners) - np.pi / corners)


def plus(angle, arm=0.33):
    """The outline of a plus sign whose arms are 2 * arm wide."""
    folded = np.abs((angle + np.pi / 4) % (np.pi / 2) - np.pi / 4)
    return np.where(np.tan(folded) <= arm, 1 / np.cos(folded), arm / np.sin(folded.clip(1e-9)))


# kind of shape -> its outline, as the radius at each angle; all are scaled to the same area
OUTLINES = {
    "disc": np.ones_like,
    "oval": lambda t: 1 / np.hypot(np.cos(t), 2 * np.sin(t)),
    "triangle": lambda t: polygon(t, 3),
    "square": lambda t: polygon(t, 4),
    "star": lambda t: 0.4 + 0.6 * np.abs(t * 5 / np.pi % 2 - 1),
    "plus": plus,
    "flower": lambda t: 1 + 0.35 * np.cos(5 * t),
    "gear": lambda t: 1 + 0.2 * np.sign(np.cos(8 * t)),
}
RADII = [outline(np.arange(1024) * (2 * np.pi / 1024)) for outline in OUTLINES.values()]
RADII = [(radius / np.sqrt((radius**2).mean())).astype(np.float32) for radius in RADII]


def draw_shapes(size, seed, index):
    """A large shape over a few small ones of any kind, on a textured ground.

    Returns the image (size, size, 3) uint8, its class, which is the kind of the large shape, and
    its label map (size, size) uint8, 0 the ground, kind + 1 a shape. Colours, textures, places,
    sizes and turns are drawn alike for all kinds, and all have the same area: only the outline
    tells them apart.
    """
    rng = np.random.default_rng([seed, index])
    kinds = shape_kinds(rng)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    ground = tone(rng.random(), rng)
    image, labels = texture(x / size, y / size, ground, rng), np.zeros((size, size), np.uint8)
    for left, kind in reversed(list(enumerate(kinds[::-1]))):
        radius = size * (rng.uniform(0.06, 0.12) if left else rng.uniform(0.25, 0.38))
        centre = size * (rng.random(2) if left else rng.uniform(0.35, 0.65, 2))
        first = np.maximum(centre - 1.6 * radius, 0).astype(int)  # no outline reaches beyond 1.56
        end = (centre + 1.6 * radius + 2).astype(int)
        box = (slice(first[0], end[0]), slice(first[1], end[1]))
        dy, dx = y[box] - centre[0], x[box] - centre[1]
        angle = (np.arctan2(dy, dx) * (512 / np.pi)).astype(int) + rng.integers(1024) & 1023
        inside = RADII[kind][angle] * radius - np.hypot(dy, dx)  # pixels to the outline
        paint = tone((ground.mean() + rng.uniform(0.35, 0.65)) % 1, rng)  # not as bright as that
        paint = texture(x[box] / size, y[box] / size, paint, rng)
        cover = (inside + 0.5).clip(0, 1)[..., None]  # soft over one pixel: no jagged edge
        image[box] += cover * (paint - image[box])
        labels[box][inside > 0] = kind + 1
    return (image * 255).astype(np.uint8), int(kinds[-1]), labels


def shape_kinds(rng):
    """The kinds of an image's shapes, the large one last."""
    return rng.integers(len(OUTLINES), size=rng.integers(3, 6))


def shapes_image(size, seed, index):
    return Image.fromarray(draw_shapes(size, seed, index)[0])


def open_shapes(size, train):
    """The 20,000 training images or the 2,000 held-out ones of --data=shapes."""
    read = functools.partial(shapes_image, size, int(train))
    return Images(range(20_000 if train else 2_000), read, "shapes")


def tone(brightness, rng):
    """A colour, (3,) in [0, 1]: a tinted grey, so that few tokens go to hues and many to edges."""
    return (0.1 + 0.8 * brightness + rng.uniform(-0.1, 0.1, 3)).clip(0, 1)


def texture(x, y, colour, rng):
    """A plain, striped, checked or shaded surface around a colour: (*x.shape, 3) in [0, 1]."""
    angle, other = rng.uniform(0, 2 * np.pi), (colour + rng.uniform(-0.12, 0.12)).clip(0, 1)
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    waves = 2 * np.pi * rng.uniform(3, 8)
    mix = (
        lambda: 0 * u,
        lambda: 0.5 + 0.5 * np.sin(waves * u),
        lambda: 0.5 + 0.5 * np.sign(np.sin(waves * u) * np.sin(waves * v)),
        lambda: (0.5 + 0.5 * u).clip(0, 1),
    )[rng.integers(4)]()
    return (colour + mix[..., None] * (other - colour)).astype(np.float32)


def open_images(config):
    """(training images, held-out images) of --data."""
    built_in = {
        "shapes": lambda train: open_shapes(config.image_size, train),
        "cifar10": lambda train: array_images(open_cifar(CIFAR10, train).data, "CIFAR10"),
        "cifar100": lambda train: array_images(open_cifar(CIFAR100, train).data, "CIFAR100"),
    }
    if config.data in built_in:
        train, val = built_in[config.data](True), built_in[config.data](False)
    elif not os.path.isdir(config.data):
        raise ValueError(f"--data={config.data}: no such folder, and none of {', '.join(built_in)}")
    elif os.path.isdir(os.path.join(config.data, "train")):
        train, val = (folder_images(os.path.join(config.data, p)) for p in ("train", "val"))
    else:
        train, val = folder_images(config.data), []
    if len(val):
        val = val.split(config.val_images)[0]
    else:  # no val/: hold out at most a tenth
        val, train = train.split(min(config.val_images, max(1, len(train) // 10)))
    if not len(train):
        raise ValueError(f"--data={config.data}: holds no two images ({' '.join(ENDINGS)})")
    return train, val


# name -> mask of a (grid, grid) image of which `count` patches are to be hidden
MASKS = {
    "block": lambda grid, count, least, rng: blockwise_mask(grid, grid, count, least, rng=rng),
    "random": lambda grid, count, least, rng: random_mask(grid, grid, count, rng),
    "none": lambda grid, count, least, rng: np.zeros((grid, grid), dtype=bool),
}


class Views(Dataset):
    """What a step sees of an image: the patch view, the token view and the mask (sec. 2.5).

    dataset[epoch, index] is a dict of `images` (3, image_size, image_size) and `token_images`
    (3, token_size, token_size), if that is another size, uint8 of one crop, flip and jitter, of
    `mask` (grid, grid) bool, True = hidden, and of `skipped`, whether it is the next one because
    the image is unreadable. All of it is a function of (seed, epoch, index). Held-out images are
    cropped in the middle, no more.
    For a contrastive loss there are `views` (1 or 2, 3, image_size, image_size) besides, each of a
    crop of its own, and `local_views` (local_crops, 3, side, side).
    """

    def __init__(self, images, config, token_size, train):
        self.images, self.config = images, config
        self.grid = config.image_size // config.patch_size
        self.count = round(config.mask_ratio * self.grid**2)
        # nothing is hidden where nothing is to be predicted
        self.mask = config.mask if config.task == "mim" and config.mim_weight else "none"
        mode = transforms.InterpolationMode
        self.aligned = {"images": self.transform(config.image_size, mode.BICUBIC, train)}
        if token_size != config.image_size:
            self.aligned["token_images"] = self.transform(token_size, mode.LANCZOS, train)
        self.others = {}  # name -> (how many, how each is made)
        if train and config.task == "mim" and config.contrast != "none":
            # DINO's small views have 5% to 40% of the area and 96 pixels a side for 224
            small = max(1, round(self.grid * 96 / 224)) * config.patch_size
            views, area = 2 if own_passes(config) else 1, CONTRASTS[config.contrast].area
            self.others["views"] = (views, strong_view(config.image_size, area))
            self.others["local_views"] = (config.local_crops, strong_view(small, (0.05, 0.4)))

    def transform(self, size, mode, train):
        if not train:
            resize = transforms.Resize(round(size * 8 / 7), mode)  # the usual 256 for 224
            return transforms.Compose([resize, transforms.CenterCrop(size)])
        # cropped first, so that flip and jitter work on fewer pixels than in the official code
        scale, jitter = (self.config.crop_min, 1.0), self.config.jitter
        crop = transforms.RandomResizedCrop(size, scale, interpolation=mode)
        flip = transforms.RandomHorizontalFlip()
        return transforms.Compose([crop, flip, transforms.ColorJitter(jitter, jitter, jitter)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        image, found = self.images.load(index, self.config.skip_bad_images)
        sample = {"skipped": found != index}
        for name, transform in self.aligned.items():
            # the same seed for both views: the transforms draw the same crop, flip and jitter
            torch.default_generator.manual_seed(stream(self.config.seed, epoch, index))
            sample[name] = pil_to_tensor(transform(image))
        for number, (name, (count, transform)) in enumerate(self.others.items(), 1):
            torch.default_generator.manual_seed(stream(self.config.seed, epoch, index, number))
            made = [pil_to_tensor(transform(image)) for _ in range(count)]
            sample |= {name: torch.stack(made)} if made else {}
        rng = np.random.default_rng([self.config.seed, epoch, index])
        mask = MASKS[self.mask](self.grid, self.count, self.config.min_block, rng)
        sample["mask"] = torch.from_numpy(mask)
        return sample


def strong_view(size, area):
    """What makes two views of an image hard to match by their colours alone (DINO, SimCLR)."""
    bicubic = transforms.InterpolationMode.BICUBIC
    blur = transforms.GaussianBlur(size // 20 * 2 + 1, (size / 2240, size / 112))  # SimCLR's, 10%
    return transforms.Compose([
        transforms.RandomResizedCrop(size, area, interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([blur], 0.5),
    ])


@functools.lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


def batch_of_step(step, count, config):
    """The (epoch, index) pairs of a step's whole batch: the next part of the epoch's permutation.
    The last, incomplete part of an epoch is left out, as in the official code. With --repeats an
    image comes that often in a batch, far apart, and each time its first number is another."""
    epoch, part = divmod(step, count // config.batch_size)
    images = -(-config.batch_size // config.repeats)
    order = permutation(count, config.seed, epoch)[part * images : (part + 1) * images]
    copies = [(epoch * config.repeats + copy, i) for copy in range(config.repeats) for i in order]
    return copies[: config.batch_size]


def share(items):
    """This process's part of a list: consecutive, and as even as it goes."""
    return items[rank() * len(items) // world_size() : (rank() + 1) * len(items) // world_size()]


def loader(dataset, batches, workers, device):
    """The batches of `dataset` that `batches` lists by their keys, in that order."""
    pin = device.type == "cuda"
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                      worker_init_fn=ignore_sigterm)


def ignore_sigterm(worker):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a cluster sends it to all; the loop handles it


def micro_batches(batch, size):
    """Split a batch, a dict of tensors with a row an image, into parts of at most `size` images."""
    for first in range(0, len(next(iter(batch.values()))), size):
        yield {name: value[first : first + size] for name, value in batch.items()}


def to_device(batch, device, progress):
    """The batch with its images on the device, and how far the run is. The mask stays on the CPU,
    where asking for its places makes no GPU wait."""
    moved = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    moved.setdefault("token_images", moved["images"])
    return {**moved, "mask": batch["mask"], "progress": progress}


# ---- objectives ----------------------------------------------------------------------------------
# What is trained on what loss: a class, and a line in OBJECTIVES. A new contrastive loss is a class
# and a line in CONTRASTS.


# (mean, standard deviation) of RGB in [0, 1]: ImageNet's; those of the authors' ImageNet-22k models
NORMS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def pixels(images):
    """uint8 -> float32 in [0, 1]."""
    return images.float() / 255


def normalise(images, norm):
    """uint8 (B, 3, H, W) -> what the ViT sees: mean and standard deviation of `norm` taken out."""
    channels = zip(pixels(images).unbind(1), *NORMS[norm])  # numbers, not tensors: no GPU waits
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], dim=1)


def vit_config(config, shared=True):
    """The ViTConfig of a run. Relative positions have one table, `shared` by all layers, in
    pre-training, and a table a layer in fine-tuning."""
    names = ("image_size", "patch_size", "drop_path")
    changes = {name: getattr(config, name) for name in names}
    if config.variant == "released" and not shared:
        changes["position"] = "relative"
    return ViTConfig.named(config.size, config.variant, **changes)


class Objective(nn.Module):
    """What the loop, the evaluation and the pictures ask for, besides

    model                   the network that is saved, under the official names
    token_size              pixels a side of the view that targets are made of
    counts(batch)           numbers of what its means are over, such as [hidden patches]
    forward(batch, totals)  (loss, metrics): this batch's share of the means over `totals`, which
                            are the sums of the counts over all micro-batches and processes
    measure(batch)          sums over a batch of held-out images
    means(sums, totals)     the metrics of an evaluation, of such sums over all of them
    pictures(batch)         columns of images (B, 3, H, W) in [0, 1], by their titles
    """

    def after_step(self, progress):
        """Called when the weights have changed; `progress` is the part of the run, from 0 to 1."""


class TokenizerTraining(Objective):
    """Our own dVAE (app. C): reconstruct images through Gumbel-softmax tokens."""

    def __init__(self, config, tokenizer):
        super().__init__()
        if config.weights != "none":
            raise ValueError("--task=tokenizer trains no ViT: leave --weights out")
        arch = DVAEConfig(config.vocab_size, config.downsample, config.dvae_dim)
        self.model, self.kl_weight = DVAE(arch), config.kl_weight
        self.token_size = config.image_size // config.patch_size * config.downsample

    def counts(self, batch):
        return [len(batch["images"])]

    def forward(self, batch, totals):
        images = pixels(batch["token_images"])
        # DALL-E's annealing, from 1 to 1/16, over the first three quarters of the run
        temperature = cosine(min(batch["progress"] / 0.75, 1), 1, 0, 1.0, 1 / 16)
        loss, metrics = self.model.loss(images, temperature, self.kl_weight)
        part = len(images) / totals[0]
        return part * loss, {name: part * value for name, value in metrics.items()}

    def measure(self, batch):
        loss, metrics = self.forward(batch, [1])
        images = pixels(batch["token_images"])
        tokens = self.model.encode(images)
        # mean absolute error of normalised RGB, in which appendix C reports 0.0880
        mae = 2 * (self.model.decode(tokens) - images).abs().mean() * len(images)
        used = self.model.statistics(tokens.flatten())["frequency"] / tokens[0].numel()
        return {"loss": loss, **metrics, "mae": mae, "frequency": used}

    def means(self, sums, totals):
        return self.model.baselines({name: value / totals[0] for name, value in sums.items()})

    @torch.no_grad()
    def pictures(self, batch):
        images = pixels(batch["token_images"])
        return {"image": images, "tokenizer": self.model.decode(self.model.encode(images))}


class MaskedImageModelling(Objective):
    """The paper's objective: cross entropy of the hidden patches' visual tokens (eq. 2), or the
    squared error of other targets."""

    def __init__(self, config, tokenizer, projector=None):
        super().__init__()
        self.__dict__["tokenizer"] = tokenizer  # frozen: no submodule, and in no checkpoint
        self.norm, self.predict = config.norm, config.predict
        self.model = BEiT(vit_config(config), tokenizer.outputs, projector)
        self.token_size = self.model.config.grid * tokenizer.downsample
        if config.weights != "none":
            log(load_weights(self.model, config.weights))

    def places(self, batch):
        """(B, h, w) bool, on the CPU: the patches whose targets are to be predicted."""
        return torch.ones_like(batch["mask"]) if self.predict == "all" else batch["mask"]

    def counts(self, batch):
        return [int(self.places(batch).sum())]

    def features(self, batch):
        return self.model.features(normalise(batch["images"], self.norm), batch["mask"])

    def compare(self, x, batch):
        """Features (B, 1 + N, D) -> (loss, metrics) of all places, summed, and their targets."""
        targets = self.tokenizer.encode(pixels(batch["token_images"]))  # (B, h, w, ...)
        places = self.places(batch)
        index = places.flatten().nonzero().squeeze(1).to(targets.device, non_blocking=True)
        targets = targets.flatten(0, 2)[index]  # (places, ...)
        return *self.tokenizer.target_loss(self.model.logits(x, places), targets), targets

    def forward(self, batch, totals):
        loss, metrics, _ = self.compare(self.features(batch), batch)
        return loss / totals[0], {name: value / totals[0] for name, value in metrics.items()}

    def measure(self, batch):
        loss, metrics, targets = self.compare(self.features(batch), batch)
        return {"loss": loss, **metrics, **self.tokenizer.statistics(targets)}

    def means(self, sums, totals):
        return self.tokenizer.baselines({name: value / totals[0] for name, value in sums.items()})

    @torch.no_grad()
    def pictures(self, batch):
        images, mask = pixels(batch["images"]), batch["mask"].to(batch["images"].device)
        tokens = self.tokenizer.encode(pixels(batch["token_images"]))
        logits = self.model.logits(self.features(batch), torch.ones_like(batch["mask"]))
        filled = self.tokenizer.best(logits).view_as(tokens)
        filled = torch.where(mask.view(*mask.shape, *[1] * (tokens.dim() - 3)), filled, tokens)
        hidden = F.interpolate(mask[:, None].float(), size=images.shape[2:])
        columns = {"image": images, "masked": images * (1 - hidden) + 0.5 * hidden}
        for title, shown in (("tokenizer", tokens), ("BEiT", filled)):
            columns[title] = F.interpolate(self.tokenizer.decode(shown), size=images.shape[2:])
        return columns


class Contrast(nn.Module):
    """A loss that compares views of images. Besides `head`, the student's projector, where all that
    is trained belongs, it has

    area                    (least, most) share of the image that its whole views show
    has_teacher             whether the other views are a teacher's, or the student's own
    needs_whole_batch       whether it compares images or its head has a batch norm, so that
                            gradients cannot accumulate and processes have equal shares
    forward(student, teacher, progress)
                            {view: (B, D) of this process} of both -> the loss, summed over B
    """

    area = (0.08, 1.0)

    def teach(self, head, x):
        """What the teacher's `head` makes of features (B, dim)."""
        return head(x)

    def after_step(self):
        """Called when the weights have changed."""


class DINO(Contrast):
    """Self-distillation (arXiv 2104.14294, eq. 3): cross entropy of the student's prototypes with
    the teacher's, whose running mean, the centre, is taken out so that no prototype wins always."""

    has_teacher, needs_whole_batch, area = True, False, (0.4, 1.0)

    def __init__(self, config, dim):
        super().__init__()
        self.head = DINOHead(dim, config.projector_dim, config.prototypes)
        self.temperature = config.teacher_temperature
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.register_buffer("scores", torch.zeros(1 + config.prototypes), persistent=False)

    def forward(self, student, teacher, progress):
        """The mean over all pairs of different views."""
        # the teacher's temperature rises over the first 30 of DINO's 300 epochs
        temperature = 0.04 + (self.temperature - 0.04) * min(1, progress / 0.1)
        for scores in teacher.values():
            self.scores[0] += len(scores)
            self.scores[1:] += scores.sum(dim=0)
        aims = {k: ((v - self.centre) / temperature).softmax(dim=1) for k, v in teacher.items()}
        guesses = {k: (v / 0.1).log_softmax(dim=1) for k, v in student.items()}
        losses = [-(aim * guess).sum() for a, aim in aims.items()
                  for b, guess in guesses.items() if a != b]
        return sum(losses) / len(losses)

    def after_step(self):
        """The centre follows the mean of the teacher's scores over the whole batch (eq. 4)."""
        if world_size() > 1:
            dist.all_reduce(self.scores)
        self.centre.mul_(0.9).add_(0.1 * self.scores[1:] / self.scores[0])
        self.scores.zero_()


class MoCo(Contrast):
    """MoCo v3 (arXiv 2104.02057): find the teacher's other view of an image in the whole batch."""

    has_teacher, needs_whole_batch, temperature = True, True, 0.2

    def __init__(self, config, dim):
        super().__init__()
        self.head = MoCoHead(dim, config.projector_dim)

    def teach(self, head, x):
        return head(x, predict=False)

    def forward(self, student, teacher, progress):
        """The sum over all pairs of different views."""
        return sum(info_nce(s, gather(t), self.temperature)
                   for a, t in teacher.items() for b, s in student.items() if a != b)


class SimCLR(Contrast):
    """SimCLR (arXiv 2002.05709): find an image's other view among all others of the batch, without
    a teacher."""

    has_teacher, needs_whole_batch, temperature = False, True, 0.1

    def __init__(self, config, dim):
        super().__init__()
        self.head = mlp(dim, config.projector_dim, 128, norm=False)

    def forward(self, student, teacher, progress):
        """NT-Xent (eq. 1) of two views."""
        a, b = (F.normalize(x, dim=1) for x in student.values())
        keys = torch.cat([gather(a), gather(b)])
        count = len(keys) // 2
        own = torch.arange(len(a), device=a.device) + rank() * len(a)
        total = 0
        for queries, self_at, other_at in ((a, own, own + count), (b, own + count, own)):
            logits = queries @ keys.T / self.temperature  # (B, 2 * whole batch)
            logits = logits.scatter(1, self_at[:, None], -math.inf)  # not itself
            total = total + F.cross_entropy(logits, other_at, reduction="sum") / 2
        return total


def info_nce(queries, keys, temperature):
    """MoCo v3's contrastive loss, summed over `queries` (B, D); `keys` are those of all processes,
    in their order."""
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    right = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    return 2 * temperature * F.cross_entropy(logits, right, reduction="sum")


CONTRASTS = {"dino": DINO, "moco": MoCo, "simclr": SimCLR}


def own_passes(config):
    """Whether the contrastive loss has passes of its own over two whole views (app. E), or shares
    the pass over the masked image with MIM."""
    return config.local_crops > 0 or config.mim_weight == 0


class Contrastive(MaskedImageModelling):
    """MIM and a contrastive loss, of which either may have the weight 0.

    In ONE pass: the student's features of the masked image serve both, and are compared with those
    of another whole view, of the teacher or of the student itself if there is none. Or as in
    appendix E, beside each other: the student sees two whole views and --local_crops small ones,
    the teacher the two. The teacher is the student's moving average.
    """

    def __init__(self, config, tokenizer):
        contrast = CONTRASTS[config.contrast](config, vit_config(config).dim)
        super().__init__(config, tokenizer, contrast.head)
        del contrast.head  # it is the model's now
        assert not list(contrast.parameters()), "parameters outside `head` would not be trained"
        self.contrast, self.of, self.own = contrast, config.contrast_on, own_passes(config)
        self.mim_weight, self.contrast_weight = config.mim_weight, config.contrast_weight
        self.teacher, self.momentum = None, config.teacher_momentum
        if contrast.has_teacher:
            self.teacher = copy.deepcopy(self.model).requires_grad_(False)
            self.teacher.lm_head = None
            for block in self.teacher.blocks:
                block.drop_path = 0.0
        if not config.mim_weight:
            self.model.lm_head.requires_grad_(False)
            self.model.mask_token.requires_grad_(False)

    def counts(self, batch):
        return [*super().counts(batch), len(batch["images"])]

    def project(self, model, head, views):
        """What a network and a head make of views, uint8 (B, 3, H, W) each: a list. The head sees
        one view at a time, as its batch norm is to be over one."""
        x = model.features(normalise(torch.cat(views), self.norm))
        return [head(part) for part in model.summary(x, self.of).chunk(len(views))]

    def forward(self, batch, totals):
        loss, metrics, student = 0, {}, {}
        if self.mim_weight:
            x = self.features(batch)
            loss, metrics, _ = self.compare(x, batch)
            loss, metrics = loss / totals[0], {k: v / totals[0] for k, v in metrics.items()}
            metrics["mim_loss"] = loss.detach()
        views = batch["views"].unbind(1)  # (B, 3, H, W) each: one, or two of the contrast's own
        own = functools.partial(self.project, self.model, self.model.projector)
        if self.own:
            student = dict(enumerate(own(views)))
            if "local_views" in batch:
                crops = batch["local_views"].unbind(1)  # (B, 3, h, w) each
                student |= dict(enumerate(own(crops), len(views)))
        else:
            student["masked"] = self.model.projector(self.model.summary(x, self.of))
            if self.teacher is None:
                student[0], = own(views)
        teacher = self.teach(views)
        with torch.autocast(views[0].device.type, enabled=False):  # temperatures need float32
            student, teacher = ({view: x.float() for view, x in outputs.items()}
                                for outputs in (student, teacher))
            contrast = self.contrast(student, teacher, batch["progress"]) / totals[1]
        metrics["contrast_loss"] = contrast.detach()
        return self.mim_weight * loss + self.contrast_weight * contrast, metrics

    @torch.no_grad()
    def teach(self, views):
        """{view: what the student is to find}."""
        if self.teacher is None:
            return {}
        head = functools.partial(self.contrast.teach, self.teacher.projector)
        return dict(enumerate(self.project(self.teacher, head, views)))

    @torch.no_grad()
    def after_step(self, progress):
        self.contrast.after_step()
        if self.teacher is not None:
            # the momentum rises to 1 on a cosine
            momentum = cosine(progress, 1, 0, self.momentum, 1.0)
            student = dict(self.model.named_parameters())
            pairs = [(t, student[name]) for name, t in self.teacher.named_parameters()]
            teacher, student = zip(*pairs)
            torch._foreach_lerp_(teacher, student, 1 - momentum)

    def measure(self, batch):
        z, = self.project(self.model, self.model.projector, [batch["images"]])
        z = F.normalize(z.float(), dim=1)
        spread = {"z": z.sum(dim=0), "square": z.square().sum(dim=0)}
        sums = super().measure(batch) if self.mim_weight else {}
        return sums | {f"spread_{name}": value for name, value in spread.items()}

    def means(self, sums, totals):
        """`spread` is the standard deviation of the head's outputs, normalised to length 1, times
        the root of their number: about 1 if they point everywhere, 0 if all have collapsed."""
        mean, square = (sums.pop(f"spread_{name}") / totals[1] for name in ("z", "square"))
        spread = np.sqrt((square - mean**2).clip(0)).mean() * math.sqrt(len(mean))
        return (super().means(sums, totals) if self.mim_weight else {}) | {"spread": spread}

    def pictures(self, batch):
        return super().pictures(batch) if self.mim_weight else {}


OBJECTIVES = {"mim": MaskedImageModelling, "contrast": Contrastive, "tokenizer": TokenizerTraining}


# ---- evaluation and pictures ---------------------------------------------------------------------


@torch.no_grad()
def evaluate(objective, dataset, config, device, dtype, progress):
    """Means over the held-out images, each counted once whatever the number of processes: val_*."""
    torch.manual_seed(stream(config.seed, rank()))  # for the noise in a dVAE's loss
    keys = share([(0, index) for index in range(len(dataset))])
    batches = [keys[i : i + config.micro_batch] for i in range(0, len(keys), config.micro_batch)]
    sums, totals = {}, 0
    for batch in loader(dataset, batches, config.num_workers, device):
        totals = totals + np.array(objective.counts(batch))
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            measured = objective.measure(to_device(batch, device, progress))
        for name, value in measured.items():
            sums[name] = sums.get(name, 0) + value.flatten().cpu().double()
    sums = {name: np.array(all_sum(*value.tolist())) for name, value in sums.items()}
    means = objective.means(sums, all_sum(*totals))
    return {f"val_{name}": float(np.squeeze(value)) for name, value in means.items()}


def first_batch(dataset, count, device):
    """The first `count` images of Views, or all if there are fewer, as a batch on the device."""
    keys = [(0, index) for index in range(min(count, len(dataset)))]
    return to_device(next(iter(loader(dataset, [keys], 0, device))), device, 1.0)


def save_columns(path, columns):
    """Write a PNG with a titled column for each entry of {title: images (B, 3, H, W) in [0, 1]}, if
    there are any."""
    if not columns:
        return
    images = torch.stack([column.float().cpu() for column in columns.values()], dim=1).flatten(0, 1)
    scale = max(1, 128 // images.shape[3])  # tiny images are shown larger
    images = F.interpolate(images.clamp(0, 1), scale_factor=scale)
    grid = make_grid(images, nrow=len(columns), padding=4, pad_value=1.0)
    picture = ImageOps.expand(to_pil_image(grid), border=(0, 14, 0, 0), fill="white")
    for number, title in enumerate(columns):
        place = (4 + number * (images.shape[3] + 4), 2)
        ImageDraw.Draw(picture).text(place, title, fill="black")
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def attention(config):
    """Draw section 3.4's maps: what each head of the last block looks at from one patch."""
    if config.weights == "none":
        raise ValueError("--task=attention: give --weights=FILE, a checkpoint.pt of --task=mim")
    device, _ = setup_device(config)
    model = ViT(read_weights(config.weights)[1])
    log(load_weights(model, config.weights))
    model.to(device).eval()
    size, patch, grid = model.config.image_size, model.config.patch_size, model.config.grid
    row, column = grid // 2, grid // 2
    if config.query:
        places = re.fullmatch(r"(\d+),(\d+)", config.query)
        row, column = map(int, places.groups()) if places else (grid, grid)
        if max(row, column) >= grid:
            raise ValueError(f"--query={config.query}: give row,column, each from 0 to {grid - 1}")
    config = replace(config, image_size=size, patch_size=patch, mask="none", val_images=8)
    if os.path.isfile(config.data):
        images = Images([config.data], read_image, config.data)
    else:
        images = open_images(config)[1]
    dataset = Views(images, config, size, train=False)
    glow = torch.tensor([1.0, 0.8, 0.2], device=device).view(3, 1, 1)
    frame = torch.zeros(size, size, dtype=torch.bool, device=device)
    frame[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch] = True
    inner = slice(row * patch + 1, (row + 1) * patch - 1)
    frame[inner, column * patch + 1 : (column + 1) * patch - 1] = False
    for index in range(len(dataset)):
        image = dataset[0, index]["images"][None].to(device)
        with torch.no_grad():
            weights = model.attention(normalise(image, config.norm))
        weights = weights[0, :, 1 + row * grid + column, 1:]
        heat = weights.view(-1, 1, grid, grid)  # (heads, 1, grid, grid)
        heat = F.interpolate(heat / heat.amax(dim=(2, 3), keepdim=True), size=size)
        shown = torch.cat([pixels(image), 0.35 * pixels(image) + 0.65 * heat * glow])
        shown[:, :, frame] = torch.tensor([1.0, 0.0, 0.0], device=device).view(3, 1)
        titles = ["query", *(f"head {number}" for number in range(len(heat)))]
        stem = re.sub(r"\W+", "_", os.path.splitext(os.path.basename(images.name(index)))[0])
        path = os.path.join(config.out, f"attention_{stem}.png")
        save_columns(path, {t: picture[None] for t, picture in zip(titles, shown, strict=True)})
        log("wrote", path)


# ---- training ------------------------------------------------------------------------------------


def check(config):
    """Raise ValueError for options that do not go together, before anything is trained."""
    if config.task != "mim":
        return
    vit_config(config)  # says so if there is no such network, before a tokenizer is trained
    if config.mask == "none" and config.predict == "masked" and config.mim_weight:
        raise ValueError("--mask=none hides nothing to predict: give --predict=all with it")
    if config.contrast == "none":
        if config.mim_weight != 1 or config.local_crops:
            raise ValueError("--mim_weight and --local_crops go with a contrastive loss: give "
                             f"--contrast={', '.join(CONTRASTS)}")
        return
    if config.contrast not in CONTRASTS:
        known = ", ".join(["none", *CONTRASTS])
        raise ValueError(f"--contrast={config.contrast}: known are {known}")
    bounds = dict(local_crops=0, projector_dim=1, prototypes=1, mim_weight=0, contrast_weight=0)
    for name, least in bounds.items():
        if getattr(config, name) < least:
            raise ValueError(f"--{name}={getattr(config, name)}: give {least} or more")
    if not 0 <= config.teacher_momentum <= 1:
        raise ValueError(f"--teacher_momentum={config.teacher_momentum}: give 0 to 1")
    if config.teacher_temperature <= 0:
        raise ValueError(f"--teacher_temperature={config.teacher_temperature}: give more than 0")
    if config.local_crops and config.contrast != "dino":
        raise ValueError("--local_crops: only --contrast=dino has them")
    if not config.mim_weight + config.contrast_weight:
        raise ValueError("--mim_weight=0 --contrast_weight=0: nothing is left to train on")
    if CONTRASTS[config.contrast].needs_whole_batch:
        processes = (config.processes if config.dry_run else 0) or world_size()
        need = -(-config.batch_size // processes)
        if config.micro_batch < need:
            more = "--processes" if config.dry_run else "processes"
            raise ValueError(f"--contrast={config.contrast}: compares all images of a batch, so "
                             f"gradients cannot accumulate; give --micro_batch={need}, a smaller "
                             f"--batch_size or more {more}")
        if config.batch_size < 2:
            raise ValueError(f"--batch_size={config.batch_size}: --contrast={config.contrast} has "
                             "nothing to compare an image with; give 2 or more")
        if config.repeats > 1:
            raise ValueError(f"--repeats={config.repeats}: --contrast={config.contrast} would push "
                             "an image away from its own copies in the batch; leave it out")
        if config.batch_size % processes:
            raise ValueError(f"--contrast={config.contrast}: --batch_size={config.batch_size} is "
                             f"to be a multiple of the {processes} processes")


def make_objective(config, device, tokenizer=None):
    """The objective of --task, on the device; build_tokenizer's `tokenizer` unless given."""
    name = "contrast" if config.task == "mim" and config.contrast != "none" else config.task
    # MIM's target; without MIM one that costs nothing
    spec = config.tokenizer if config.mim_weight else "pixel"
    if spec in FIRST:  # the one in OUT/tokenizer, which main makes first
        spec += ":" + os.path.join(config.out, "tokenizer", "checkpoint.pt")
    if config.task == "mim" and tokenizer is None:
        tokenizer = one_first(lambda: build_tokenizer(spec, device, config.patch_size))
    torch.manual_seed(config.seed)
    return OBJECTIVES[name](config, tokenizer).to(device)


def train(config):
    """One run of one objective, from its checkpoint if there is one. Returns whether it is done."""
    device, dtype = setup_device(config)
    train_images, val_images = open_images(config)
    steps, per_epoch, warmup = run_length(config, len(train_images))
    if len(val_images) < world_size():
        raise ValueError(f"--data={config.data}: {len(val_images)} held-out images are too few")

    objective = make_objective(config, device)
    dataset = Views(train_images, config, objective.token_size, train=True)
    val_dataset = Views(val_images, config, objective.token_size, train=False)
    model, optimizer, scaler, save, start = prepare(objective, config, device, dtype)
    log(f"{config.task} into {config.out}: step {start} of {steps}, {per_epoch} an epoch, warm-up "
        f"{warmup}; {len(dataset):,} images, {len(val_dataset):,} held out")
    if start == steps:
        return True

    batches = (share(batch_of_step(s, len(dataset), config)) for s in range(start, steps))
    batches = loader(dataset, batches, config.num_workers, device)
    output = Log(config, train_images, start, steps, per_epoch)

    for step, batch in enumerate(batches, start):
        *totals, stop = all_sum(*objective.counts(batch), output.stop)
        if stop:
            break
        lr = cosine(step, steps, warmup, config.lr, config.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        torch.manual_seed(stream(config.seed, step, rank()))  # for stochastic depth and noise
        row, parts = {}, list(micro_batches(batch, config.micro_batch))
        for number, part in enumerate(parts, 1):
            sync = number == len(parts) or world_size() == 1
            with nullcontext() if sync else model.no_sync():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, metrics = model(to_device(part, device, step / steps), totals)
                # DDP takes the mean over the processes, of which each loss is a share of the sum
                scaler.scale(loss * world_size()).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                row[name] = row.get(name, 0) + value
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        objective.after_step(step / steps)

        row["grad_norm"] = norm / world_size()
        to_log, to_evaluate, to_save = output.add(row, batch)
        if not (to_log or to_evaluate or to_save):
            continue
        line = output.read(lr)
        if to_evaluate:
            objective.eval()
            line |= evaluate(objective, val_dataset, config, device, dtype, output.done / steps)
            if rank() == 0:
                columns = objective.pictures(first_batch(val_dataset, 8, device))
                save_columns(os.path.join(config.out, "reconstruction.png"), columns)
            objective.train()
        output.write(line)
        if to_save:
            save(output.done)
    return output.close(save)


def fit_pca(config):
    """Find the principal components of the patches of (at most 5,000) training images, as they
    are seen in training. Returns True: unlike a training it takes minutes, and is never stopped."""
    device, _ = setup_device(config)
    images, val_images = open_images(config)
    pca = PCA(PCAConfig(config.patch_size, config.components))
    if config.micro_batch < 1 or len(images) < world_size():
        raise ValueError(f"--micro_batch={config.micro_batch}, {len(images)} images: give at least "
                         "one, and an image a process")
    claim_folder(config)
    if config.resume == "auto" and load_checkpoint(config.out):
        log(f"pca into {config.out}: done already")
        return True
    dataset = Views(images, config, config.image_size, train=True)
    keys = share([(0, i) for i in permutation(len(images), config.seed, 0)[:5_000]])
    parts = [keys[i : i + config.micro_batch] for i in range(0, len(keys), config.micro_batch)]
    batches = tqdm(loader(dataset, parts, config.num_workers, device), "principal components",
                   disable=rank() > 0 or not sys.stderr.isatty())
    moments = sum(pca.moments(pixels(batch["images"])) for batch in batches)
    pca.fit(torch.tensor(all_sum(*moments.tolist()), dtype=torch.float64))
    explained = (pca.variances.cumsum(0) / pca.variances.sum()).tolist()
    counts = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n < config.components]
    counts.append(config.components)
    log(f"{config.components} of {len(explained)} components hold "
        f"{100 * explained[config.components - 1]:.2f}% of the variance of a patch:")
    log("  ".join(f"{n}: {100 * explained[n - 1]:.1f}%" for n in counts))
    save_checkpoint(config.out, model=pca.state_dict(), arch=asdict(pca.config), step=0,
                    config=asdict(config))
    if rank() == 0:
        val = Views(val_images, config, config.image_size, train=False)
        shown = pixels(first_batch(val, 8, torch.device("cpu"))["images"])
        values = pca.encode(shown)
        columns = {f"{n} components": pca.decode(values[..., :n]) for n in counts[-5:]}
        save_columns(os.path.join(config.out, "reconstruction.png"), {"image": shown, **columns})
    return True


def plan(config):
    """Print what a run takes: steps, accumulation, parameters, compute, memory and days."""
    if config.task not in ("mim", "tokenizer"):
        raise ValueError(f"--dry_run: --task={config.task} takes minutes and has no plan")
    device, dtype = setup_device(config)
    count = {"shapes": 20_000, "cifar10": 50_000, "cifar100": 50_000}.get(config.data, 1_281_167)
    if os.path.isdir(config.data):
        count = len(open_images(config)[0])
    steps, per_epoch, warmup = run_length(config, count)
    kind, _, form = (config.tokenizer if config.mim_weight else "pixel").partition(":")
    untrained = {
        "dalle": lambda: load_dalle(None, device),
        "dvae": lambda: DVAE(DVAEConfig(config.vocab_size, config.downsample, config.dvae_dim)),
        "vqgan": lambda: VQGAN(1024),
        "pixel": lambda: Pixels(config.patch_size, form),
        "pca": lambda: PCA(PCAConfig(config.patch_size, config.components)),
    }
    read = functools.partial(build_tokenizer, config.tokenizer, device, config.patch_size)
    tokenizer = untrained.get(kind, read)().to(device).eval().requires_grad_(False)
    objective = make_objective(config, device, tokenizer)
    processes = config.processes or world_size()
    local = -(-config.batch_size // processes)  # images of a step in one process, rounded up
    micro = min(local, config.micro_batch)
    trial = micro if device.type == "cuda" else 2  # images to measure with
    images = Images(range(trial), functools.partial(shapes_image, config.image_size, 0), "shapes")
    dataset = Views(images, config, objective.token_size, train=True)
    batch = first_batch(dataset, trial, device)

    def step(images):
        """Forward and backward; returns the bytes that the forward pass keeps for the backward."""
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        part = {name: value if name == "progress" else value[:images]
                for name, value in batch.items()}
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            with saved_tensors_hooks(keep, lambda tensor: tensor):
                loss, _ = objective(part, objective.counts(part))
        loss.backward()
        loss.item()  # waits for the GPU
        return sum(kept.values())

    objective.eval()  # without stochastic depth, which saves 5%
    half = trial // 2 or 1
    activations = (step(trial) - step(half)) / (trial - half or 1)  # the rest is weights
    # not every device's fused attention is counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(half)
    speed, clock = config.images_per_s, time.time()
    if not speed:
        step(trial)
        speed = trial / (time.time() - clock)
    flops = counter.get_total_flops() / half
    trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    # gradient and AdamW's two moments besides the weight; a teacher has only that
    weights = 12 * trained + 4 * sum(p.numel() for p in objective.parameters())
    days = steps * config.batch_size / (speed * processes) / 86_400
    log(f"""images      {count:,} in {config.data}
steps       {steps:,} of {config.batch_size:,} images, {per_epoch:,} an epoch, {warmup:,} of warm-up
a step      {processes} processes x {-(-local // micro)} micro-batches x {micro} images
parameters  {trained:,}
compute     {flops / 1e9:,.1f} GFLOP an image with its tokens and the backward pass, \
{flops * config.batch_size / 1e12:,.1f} TFLOP a step
memory      {(weights + micro * activations) / 2**30:,.1f} GiB a process: \
{weights / 2**30:,.1f} of weights, gradients and AdamW, \
{activations / 2**20:,.0f} MiB an image of activations in {dtype}
speed       {speed:,.1f} images/s a process, {"given" if config.images_per_s else "measured now"}
time        {days:,.2f} days on {processes} processes""")


# What a run of MIM makes first, when --tokenizer names its kind and no file
FIRST = {"dvae": ("tokenizer", train), "pca": ("pca", fit_pca)}
# Fields that these do not read: at other values of them, what is there is still the right one
UNREAD = "size variant drop_path mask mask_ratio min_block predict contrast contrast_on"
UNREAD += " contrast_weight mim_weight local_crops projector_dim prototypes"
UNREAD = f"{UNREAD} teacher_momentum teacher_temperature".split()


def main(argv=None):
    config = parse_args(Config, PRESETS, argv, __doc__)
    check(config)
    if config.dry_run:
        return plan(config)
    if config.task == "attention":
        return attention(config)
    if config.task == "pca":
        return fit_pca(config)
    if config.task == "mim" and config.mim_weight and config.tokenizer in FIRST:
        task, make = FIRST[config.tokenizer]
        first = {name: getattr(Config, name) for name in UNREAD}  # their defaults
        first |= dict(task=task, out=os.path.join(config.out, "tokenizer"), weights="none",
                      steps=config.tokenizer_steps, lr=config.tokenizer_lr)
        if not make(replace(config, **first)):
            return None  # stopped by SIGTERM
        all_sum(0)  # other machines wait until the first has written it
    return train(config)


if __name__ == "__main__":
    run(main)
