"""What a training step sees of an image: the mask (BEiT, arXiv 2106.08254, algorithm 1), the two
views, and which images make up a batch. `python masking.py` prints three masks of each kind.

Everything random is a function of the seed, the epoch and the image, never of a generator's
history: so a batch is the same for any number of workers and processes, and after a restart.
"""

import functools
import hashlib
import io
import itertools
import math
import os
import re
import signal
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_start_method

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.io import decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

BICUBIC = InterpolationMode.BICUBIC
Image.MAX_IMAGE_PIXELS = None  # phones take more than Pillow opens by default
STOP_SIGNALS = (signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM))  # a run saves first


class BadInput(ValueError):
    """An error that the user can mend: printed as one line, without a traceback."""


# ---- masks ---------------------------------------------------------------------------------------

def blockwise_mask(height, width, num_masked, min_block=16, max_block=None, min_aspect=0.3,
                   rng=None, progress=0.0):
    """Algorithm 1: mask blocks of patches until `num_masked` are masked or no block fits.

    Why blocks? With pixels above all, they relieve "the suffering of short-distance dependency"
    (sec. 3.3): as we read it, a single patch could be copied from its neighbors, which teaches
    little. Random masks lower mIoU from 44.65 to 42.93 and top-1 from 82.86% to 82.77%, and with
    pixels as targets from 41.38 to 37.09 and from 81.04% to 80.50% (table 4).

    The number of patches in a block is drawn between min_block and max_block (None: the number that
    is still to be masked, even if that is smaller). As in the official code, and unlike algorithm
    1, the aspect ratio is log-uniform in [min_aspect, 1 / min_aspect], and a block that would mask
    too many is drawn again. A block is smaller than the grid in both directions. Returns a bool
    array (height, width), True = masked: at least one patch, at most `num_masked`. For the paper's
    75 of 14x14 (sec. 2.5) the mean is 74.5, because the last few patches often fit no block. `rng`
    is a numpy Generator. Raises BadInput, a ValueError, if the grid has no place for a block."""
    if not 0 < num_masked < height * width:
        raise BadInput(f"num_masked={num_masked} of a {height}x{width} grid: mask at least 1 patch "
                       f"and at most {height * width - 1}")
    if not 0 < min_block <= num_masked:
        raise BadInput(f"min_block={min_block} with num_masked={num_masked}: a block has at least "
                       "1 and at most num_masked patches; lower min_block or mask more")
    if max_block is not None and max_block < min_block:
        raise BadInput(f"max_block={max_block} is below min_block={min_block}; raise it")
    if not 0 < min_aspect <= 1:
        raise BadInput(f"min_aspect={min_aspect} is outside (0, 1]")
    uniform = (rng or np.random.default_rng()).random  # a third of the cost of rng.integers
    mask = np.zeros((height, width), dtype=bool)
    masked = tries = 0
    # Ten tries per block as in the official code, but 10,000 for the first: an empty mask would
    # make the loss 0 / 0. If they fail, the grid is too small for it.
    while masked < num_masked and tries < (10 if masked else 10_000):
        tries += 1
        remaining = num_masked - masked
        most = remaining if max_block is None else min(remaining, max_block)
        area = min_block + (most - min_block) * uniform()
        aspect = math.exp((2 * uniform() - 1) * math.log(min_aspect))
        h = round(math.sqrt(area * aspect))
        w = round(math.sqrt(area / aspect))
        if h >= height or w >= width:
            continue
        top = int(uniform() * (height - h + 1))
        left = int(uniform() * (width - w + 1))
        block = mask[top : top + h, left : left + w]
        new = h * w - int(np.count_nonzero(block))
        if 0 < new <= most:
            block[:] = True
            masked += new
            tries = 0
    if not masked:
        raise BadInput(f"no block of at least {min_block} patches fits a {height}x{width} grid "
                       f"when {num_masked} are to be masked; lower min_block")
    return mask


def random_mask(height, width, num_masked, rng=None, min_block=None, progress=0.0):
    """Mask exactly `num_masked` patches, each equally likely (table 4); `min_block` is ignored."""
    if not 0 < num_masked <= height * width:
        raise BadInput(f"num_masked={num_masked} of a {height}x{width} grid: mask at least 1 patch "
                       f"and at most {height * width}")
    mask = np.zeros(height * width, dtype=bool)
    mask[(rng or np.random.default_rng()).permutation(height * width)[:num_masked]] = True
    return mask.reshape(height, width)


def no_mask(height, width, num_masked, rng=None, min_block=None, progress=0.0):
    """Mask nothing (table 4, "- Masking")."""
    return np.zeros((height, width), dtype=bool)


# A mask is a function of (height, width, num_masked, rng=..., min_block=..., progress=...) with the
# result of blockwise_mask. num_masked follows from --mask_ratio; progress goes from 0 to 1.
MASKS = {"block": blockwise_mask, "random": random_mask, "none": no_mask}

# ---- views ---------------------------------------------------------------------------------------

class Views(Dataset):
    """What a step sees of an image: the patch view, the token view (sec. 2.1) and the mask.

    dataset[epoch, index, progress] is a dict, all of it a function of the seed and this key:
    images        (3, image_size, image_size) uint8, the patch view: ViT's input
    token_images  (3, token_size, token_size) uint8, if token_size is another one: the same crop and
                  flip for the tokenizer. DALL-E's makes a token of 8x8 pixels and the ViT a patch
                  of 16x16, so 224 px go with 112 px: 14x14 patches and 14x14 tokens
    mask          (grid, grid) bool, True = masked: these patches are replaced in the input
    predict       (grid, grid) bool, True = this patch's target is to be predicted
    skipped       whether it shows the next image because this one is unreadable
    and in training
    jitter        (3,) float32, factors of brightness, contrast and saturation: see network_inputs
    NAME          for each of `extra_views` {NAME: (count, transform)}, as (count, 3, side, side)
                  uint8, each with a crop of its own
    tokens        (grid, grid) int64 from `tokens`, an array (epochs, images, grid, grid)
    Images are augmented as in sec. 2.5. Both views are resized bicubically. The official code's
    token view is resized by Lanczos, which changes 0.9% of the tokens of a dVAE of ours (trained on
    photographs) and would make loading 1.7 times slower.
    With --cache_epochs=K an epoch repeats everything but the masks of K epochs before. Held-out
    images are resized, and the middle is cropped."""

    def __init__(self, images, config, token_size, train, mask="none", extra_views=None,
                 tokens=None):
        self.images = images
        self.config = config
        self.train = train
        self.mask = mask
        self.extra_views = extra_views or {}
        self.tokens = tokens
        self.sizes = {"images": config.image_size}
        if token_size != config.image_size and tokens is None:
            self.sizes["token_images"] = token_size

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index, progress = key
        config = self.config
        image, found = self.images.load(index, config.skip_bad_images)
        sample = {"skipped": found != index}
        rng = np.random.default_rng([config.seed, epoch, index])
        sample["mask"] = torch.from_numpy(draw_mask(self.mask, config, rng, progress))
        predict_all = config.predict == "all"
        sample["predict"] = torch.ones_like(sample["mask"]) if predict_all else sample["mask"]
        if not self.train:
            for name, size in self.sizes.items():
                side = round(size / config.eval_crop)  # the usual 256 for 224
                resized = TF.resize(image, [side], BICUBIC, antialias=True)
                sample[name] = TF.center_crop(resized, [size, size])
            return sample
        if config.cache_epochs:
            epoch %= config.cache_epochs
        rng = np.random.default_rng([config.seed, epoch, index, 1])
        rows, columns = draw_crop(*image.shape[1:], config.crop_min, rng)
        crop = image[None, :, rows, columns].contiguous(memory_format=torch.channels_last)
        flipped = rng.random() < 0.5
        for name, size in self.sizes.items():
            view = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
            sample[name] = view.flip(2) if flipped else view
        factors = rng.uniform(max(0, 1 - config.jitter), 1 + config.jitter, 3)
        sample["jitter"] = torch.from_numpy(factors.astype(np.float32))
        if self.tokens is not None:
            sample["tokens"] = torch.from_numpy(self.tokens[epoch, index].astype(np.int64))
        for number, (name, (count, transform)) in enumerate(self.extra_views.items(), 1):
            torch.default_generator.manual_seed(derive_seed(config.seed, epoch, index, number))
            sample[name] = torch.stack([transform(image) for _ in range(count)])
        return sample


def ssl_augment(size, area):
    """What makes two views of an image hard to match by their colors alone (DINO, SimCLR)."""
    blur = transforms.GaussianBlur(size // 20 * 2 + 1, (size / 2240, size / 112))  # SimCLR's, 10%
    return transforms.Compose([
        transforms.RandomResizedCrop(size, area, interpolation=BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([blur], 0.5),
    ])


def draw_crop(height, width, least, rng):
    """(rows, columns), two slices, of a random crop as torchvision's RandomResizedCrop has it: with
    `least` to all of the area, an aspect log-uniform in [3/4, 4/3]; the middle if no draw fits."""
    for _ in range(10):
        area = height * width * rng.uniform(least, 1)
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w = round(math.sqrt(area * aspect))
        h = round(math.sqrt(area / aspect))
        if 0 < h <= height and 0 < w <= width:
            top = rng.integers(height - h + 1)
            left = rng.integers(width - w + 1)
            break
    else:
        h = min(height, round(width * 4 / 3))
        w = min(width, round(height * 4 / 3))
        top = (height - h) // 2
        left = (width - w) // 2
    return slice(top, top + h), slice(left, left + w)


def draw_mask(name, config, rng, progress, grid=None):
    """A mask (height, width), True = masked, of at most --mask_ratio of the patches (sec. 2.5). The
    grid is (height, width), by default that of image_size."""
    side = config.image_size // config.patch_size
    height, width = grid or (side, side)
    num_masked = round(config.mask_ratio * height * width)
    return MASKS[name](height, width, num_masked, rng=rng, min_block=config.min_block,
                       progress=progress)


# The mean and standard deviation of RGB in [0, 1]
NORMS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # of the authors' ImageNet-22k models
}


def normalize(images, norm):
    """(..., 3, H, W) in [0, 1] -> what the ViT sees. Unlike torchvision's, it makes no GPU wait."""
    mean, std = copy_to(images.device, torch.tensor(NORMS[norm])[..., None, None])
    return (images - mean) / std


def denormalize(images, norm):
    """The inverse, clipped to [0, 1]."""
    mean, std = copy_to(images.device, torch.tensor(NORMS[norm])[..., None, None])
    return (images * std + mean).clamp(0, 1)


def network_inputs(batch, device, norm):
    """A loaded batch of Views -> what the networks see, on the device. Colors are jittered, images
    normalized, token_images in [0, 1]. `positions` (K,) int64 are the numbers of the patches
    to `predict` among all B * h * w, found on the CPU, which so waits for no GPU."""
    positions = batch["predict"].flatten().nonzero().squeeze(1)
    inputs = {name: copy_to(device, value) for name, value in batch.items()}
    for name in inputs.keys() & {"images", "token_images"}:
        inputs[name] = jitter_colors(inputs[name] / 255, inputs.get("jitter"))
    inputs.setdefault("token_images", inputs["images"])
    inputs["images"] = normalize(inputs["images"], norm)
    return {**inputs, "positions": copy_to(device, positions)}


def copy_to(device, tensor):
    """`tensor` on the device. From pinned memory the host need not wait for the copy."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def jitter_colors(images, factors):
    """Images (B, 3, H, W) in [0, 1], their brightness, contrast and saturation times the `factors`
    (B, 3), if any: torchvision's ColorJitter, whose changes commute where nothing is clipped. The
    official code jitters before it crops: its contrast is relative to the whole image's mean."""
    if factors is None:
        return images
    brightness, contrast, saturation = factors.view(-1, 3, 1, 1, 1).unbind(1)
    gray = TF.rgb_to_grayscale(images)
    images = torch.lerp(gray, images, saturation)
    images = torch.lerp(gray.mean(dim=(2, 3), keepdim=True), images, contrast)
    return (brightness * images).clamp(0, 1)


# ---- batches -------------------------------------------------------------------------------------

def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))  # processes that torchrun started


def log(*words):
    """Print once, whatever the number of processes, and without tearing the progress bar."""
    if rank() == 0:
        text = " ".join(map(str, words))
        tqdm.write(text.encode(errors="backslashreplace").decode())  # file names need not be UTF-8
        sys.stdout.flush()


def derive_seed(*key):
    """A 64-bit seed from a few integers such as (seed, epoch, index): the same everywhere."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


@functools.lru_cache(maxsize=2)
def permutation(count, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(count).tolist()


def batch_of_step(step, count, batch_size, seed, repeats=1):
    """The (epoch, index) pairs of a step's global batch: the next part of the epoch's permutation.
    The last, incomplete batch of an epoch is dropped, as in the official code. With repeats=3 an
    image comes three times, under three epoch numbers; an epoch shows a third of the images."""
    epoch, part = divmod(step, count // batch_size)
    images = math.ceil(batch_size / repeats)
    order = permutation(count, seed, epoch)[part * images : (part + 1) * images]
    copies = [(epoch * repeats + copy, index) for copy in range(repeats) for index in order]
    return copies[:batch_size]


def local_shard(items):
    """This process's part of a list: consecutive, and as even as possible."""
    start = rank() * len(items) // world_size()
    return items[start : (rank() + 1) * len(items) // world_size()]


def batches_of_steps(start, steps, count, batch_size, seed, repeats=1):
    """For each step from `start` to the run's last one the keys (epoch, index, progress) of this
    process's part of the batch; progress is the share of the run that is done."""
    for step in range(start, steps):
        keys = local_shard(batch_of_step(step, count, batch_size, seed, repeats))
        yield [(*key, step / steps) for key in keys]


def batches_of_all(count, size, epoch=0):
    """The keys of this process's part of `count` images, each once, in batches of `size`."""
    keys = local_shard([(epoch, index, 1.0) for index in range(count)])
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def make_loader(dataset, batches, workers, device):
    """A loader of the batches whose keys `batches` lists, in order."""
    pin = device.type == "cuda"
    workers = min(workers, cores())
    # forked loaders share a long list of files and cached tokens, others get a copy each
    forks = workers and sys.platform == "linux" and not get_start_method(allow_none=True)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=pin,
                      multiprocessing_context="fork" if forks else None,
                      persistent_workers=workers > 0, worker_init_fn=ignore_signals)


def cores():
    """The CPU cores that this process may use: Slurm and containers often give it a part."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ignore_signals(worker):
    for number in STOP_SIGNALS:  # a cluster sends them to all processes; the loop handles them
        signal.signal(number, signal.SIG_IGN)


def micro_batches(batch, size):
    """Split a batch, a dict of tensors with a row per image, into parts of at most `size`."""
    count = math.ceil(len(batch["images"]) / size)  # even ones: --compile has a graph per size
    parts = zip(*(value.tensor_split(count) for value in batch.values()))
    return [dict(zip(batch, part)) for part in parts]


def evenly(count, most):
    """At most `most` indices below `count`, evenly spaced: the first ones would be of one class."""
    return np.linspace(0, count - 1, min(count, most)).astype(int).tolist()


# ---- images --------------------------------------------------------------------------------------

@dataclass
class Images:
    """A list of images: their keys, and functions of a key."""

    keys: list  # paths or numbers; one array, as loaders would copy a list of strings
    read: Callable  # -> RGB image: Pillow's, or uint8 (height, width, 3) array or (3, ...) tensor
    source: str  # for messages
    read_label: Callable = None  # -> the number of one of `classes`; None: there are no labels
    classes: list = None  # names
    read_label_map: Callable = None  # -> int64 (height, width); None: there are no label maps

    def __post_init__(self):
        self.keys = np.asarray(self.keys)
        if self.classes is not None:
            self.classes = [str(name) for name in self.classes]

    def __len__(self):
        return len(self.keys)

    def name(self, index):
        key = self.keys[index]
        return key if isinstance(key, str) else f"{self.source} image {key}"

    def stems(self):
        """Names for files about the images: the paths below the source, with endings only where
        they tell images apart, and no longer than files allow."""
        paths = [str(key).removeprefix(self.source).lstrip("/\\") for key in self.keys]
        stems = [os.path.splitext(path)[0] for path in paths]
        counts = Counter(stems)
        names = [path if counts[stem] > 1 else stem for path, stem in zip(paths, stems)]
        return [os.sep.join(part[-200:] for part in name.split(os.sep)) for name in names]

    def load(self, index, skip_bad=False):
        """(image, its index): the image at `index` as uint8 (3, height, width). With `skip_bad` the
        first readable one after it takes the place of an unreadable one."""
        for found in itertools.chain(range(index, len(self)), range(index)):
            try:
                return TF.to_image(self.read(self.keys[found])).as_subclass(torch.Tensor), found
            except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError and others
                if not skip_bad:
                    raise BadInput(f"{self.name(found)}: cannot be read as an image ({error}); "
                                   "remove it or give --skip_bad_images") from error
        raise BadInput(f"{self.source}: no image in it can be read")

    def fingerprint(self):
        """What the images are, wherever they lie: their number and a hash of their names."""
        names = [str(key).removeprefix(self.source) for key in self.keys]
        kind = "" if isinstance(self.keys[0], str) else self.source
        # file names need not be UTF-8
        digest = hashlib.sha256("\n".join([kind, *names]).encode(errors="surrogateescape"))
        return f"{len(self)} images, names {digest.hexdigest()[:8]}"

    def subset(self, indices):
        return replace(self, keys=self.keys[np.asarray(indices, int)])

    def split(self, count):
        """(`count` images taken evenly from the whole list, the rest)."""
        taken = evenly(len(self), count)
        rest = np.setdiff1d(np.arange(len(self)), taken)
        return self.subset(taken), self.subset(rest.tolist())


ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".avif", ".tif", ".tiff",
           ".ppm", ".pgm", ".pnm", ".jp2", ".tga", ".gif")
# hidden files, and folders that macOS, storage servers, Windows and Linux make
HIDDEN = re.compile(r"(\.|__macosx$|[@#](eadir|recycle|snapshot|recently-snapshot)$|\$recycle|"
                    "system volume information|lost.found$)", re.IGNORECASE)
TRAIN = ("train", "training")
VAL = ("val", "valid", "validation", "test", "testing")


def open_parts(data, without=(), needs_training=True):
    """[training images, held-out ones] of a folder, or of tar files, with a folder for one or both
    of them, else [all images]: train/ beside other folders than these is a class."""
    tars = find_tars(data)
    if tars:
        archive = tar_images(data, tars)
        folders = {key[len(data) + 1 :].partition("/")[0] for key in archive.keys}
    elif os.path.isdir(data):
        folders = {entry.name for entry in os.scandir(data) if entry.is_dir()}
    else:
        raise BadInput(f"--data={data}: no such folder or tar, and none of {', '.join(DATASETS)}")
    known = {name.lower(): name for name in folders if not HIDDEN.match(name)}
    train, val = [os.path.join(data, next((known[name] for name in names if name in known),
                                          names[0])) for names in (TRAIN, VAL)]
    if not known or (known.keys().isdisjoint(VAL) and known.keys() - TRAIN):
        return [archive if tars else folder_images(data, without)]
    if tars:
        ends = [(f"{part}/", f"{part}0") for part in (train, val)]  # "0" follows "/"
        return [replace(archive, keys=archive.keys[slice(*np.searchsorted(archive.keys, pair))],
                        source=pair[0][:-1]) for pair in ends]
    held_out = folder_images(val, without)
    return [folder_images(train, [*held_out.keys, *without]) if needs_training else None, held_out]


def folder_images(folder, without=()):
    """All images in a folder and below it, or in tar files, in the order of their paths. A file
    counts once, even if several links lead to it, and not at all if a path in `without` leads to it
    or to its folder. Hidden files and folders are left out, and those of systems. Logs what was
    found."""
    if tars := find_tars(folder):
        return tar_images(folder, tars)
    held_out = {os.path.realpath(path) for path in without}
    if os.path.realpath(folder) in held_out:
        raise BadInput(f"{folder}: is --out too, whose pictures are no data; give another --out")
    found = {}  # real path -> path
    left_out = Counter()  # by reason
    visited = set(held_out)
    folders = [folder] if os.path.isdir(folder) else []
    links = []  # to folders, after the real ones: the real path of a file is preferred
    while folders or links:
        where = (folders or links).pop()
        real = os.path.realpath(where)
        if real in visited:  # a link may lead back to a folder above it
            continue
        visited.add(real)
        try:
            entries = sorted(os.scandir(where), key=lambda entry: entry.name)
        except OSError as error:
            raise BadInput(f"{where}: cannot be read ({error.strerror})") from error
        for entry in entries:
            is_link = entry.is_symlink()
            if HIDDEN.match(entry.name):
                left_out["hidden"] += 1
            elif entry.is_dir():
                (links if is_link else folders).append(entry.path)
            elif entry.name.lower().endswith(ENDINGS):
                file = os.path.realpath(entry.path) if is_link else os.path.join(real, entry.name)
                if file in found or file in held_out:
                    left_out["seen elsewhere"] += 1
                if not is_link or file not in found:
                    found[file] = entry.path
            else:
                left_out[os.path.splitext(entry.name)[1].lower() or "without ending"] += 1
    kept = sorted(path for file, path in found.items() if file not in held_out)
    log_found(folder, kept, left_out)
    return Images(kept, read_image, folder)


def log_found(source, paths, left_out):
    """What was found: images, how many in the first folders, and what was left out, by reason."""
    parts = (path[len(str(source)) :].lstrip(os.sep).partition(os.sep) for path in paths)
    inside = Counter(place for place, is_folder, _ in parts if is_folder)
    log(f"{source}: {len(paths):,} images; {len(inside)} folders, such as "
        f"{dict([*inside.items()][:10])}; left out: {dict(left_out)}")


# ---- tar files, read in place: an image's path is the tar's, and below it that in the tar --------

def find_tars(data):
    """The tar files that --data means: itself, or those in a folder, or in its train/ and val/, if
    these hold neither images nor other folders: a tar beside images is left out."""
    if os.path.isfile(data):
        return [data] if re.search(r"\.(tar(\.\w+)?|tgz)$", data) else []
    folders = [data, *(os.path.join(data, name) for name in TRAIN + VAL)]
    tars = []
    for folder in filter(os.path.isdir, folders):
        for entry in os.scandir(folder):
            name = entry.name.lower()
            is_other = entry.path not in folders and entry.is_dir() or name.endswith(ENDINGS)
            if is_other and not HIDDEN.match(name):
                return []
            tars += [entry.path] if name.endswith(".tar") else []
    return sorted(tars)


def tar_images(data, tars):
    """The images in tar files. Where they lie in them is found once and kept in torch's hub cache,
    as two arrays that all processes share: sorted paths, and rows of (tar, offset, length)."""
    state = [(os.path.abspath(tar), os.stat(tar).st_size, os.stat(tar).st_mtime) for tar in tars]
    digest = hashlib.sha256(repr((data, state)).encode(errors="surrogateescape")).hexdigest()[:16]
    index = [os.path.join(torch.hub.get_dir(), "tars", f"{digest}_{name}.npy")
             for name in ("paths", "places")]
    if not os.path.exists(index[1]):
        found = {}  # path -> its place
        left_out = Counter()
        for number, tar in enumerate(tars):
            inside = tar_places(tar, number, left_out)
            folder = os.path.splitext(tar[len(data) + 1 :])[0]
            named = os.path.basename(folder).lower() in TRAIN + VAL
            if not named and any("/" in name for name in inside):
                folder = os.path.dirname(folder)  # else its own name is that of a part or class
            found |= {os.path.join(data, folder, name): inside[name] for name in inside}
        paths = sorted(found)
        log_found(data, paths, left_out)
        try:
            os.makedirs(os.path.dirname(index[0]), exist_ok=True)
            for path, array in zip(index, (paths, [found[path] for path in paths])):
                np.save(f"{path}.{os.getpid()}.npy", array)
                os.replace(f"{path}.{os.getpid()}.npy", path)
        except OSError as error:
            raise BadInput(f"{data}: its index cannot be written ({error}); set TORCH_HOME to a "
                           "folder that you may write to") from error
    paths, places = [np.load(path, mmap_mode="r") for path in index]
    log(f"{data}: {len(paths):,} images in {len(tars)} tar files, index {index[0]}")
    return Images(paths, functools.partial(read_member, tars, paths, places), data)


def tar_places(tar, number, left_out):
    """{path in a tar: (number of the tar, offset, length)} of its images."""
    try:
        with open(tar, "rb") as file:
            members = tqdm(list_tar(file, left_out), tar, leave=False, disable=rank() > 0 or None)
            places = {path: (number, *place) for path, *place in members}
            file.seek(-512, os.SEEK_END)  # a whole tar ends with zeros
            if any(file.read()):
                raise EOFError("its end is missing")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise BadInput(f"{tar}: cannot be read as a tar without compression ({error}); copy it "
                       "again, or unpack it") from error
    return places


def list_tar(file, left_out):
    """(path, offset, length) of each image in an open tar. A tar in it, such as that of a class in
    ImageNet's, is a folder."""
    tar = tarfile.open(fileobj=file, mode="r:")
    for member in tar:
        name = os.path.normpath(member.name)
        stem, ending = os.path.splitext(name)
        if member.isdir():
            continue
        if not member.isfile() or any(map(HIDDEN.match, name.split("/"))):
            left_out["hidden"] += 1
        elif ending.lower() == ".tar":
            for path, offset, length in list_tar(tar.extractfile(member), left_out):
                yield os.path.join(stem, path), member.offset_data + offset, length
        elif ending.lower() in ENDINGS:
            yield name, member.offset_data, member.size
        else:
            left_out[ending.lower() or "without ending"] += 1


def read_member(tars, paths, places, path):
    """The picture at a path in a tar; `paths` and `places` are tar_images' arrays."""
    number, offset, length = places[np.searchsorted(paths, path)].tolist()
    return decode(np.fromfile(tars[number], np.uint8, length, offset=offset))


# ---- files of images -----------------------------------------------------------------------------

def read_image(path):
    """The picture in a file as uint8 RGB (3, height, width), turned as its EXIF tag says."""
    return decode(np.fromfile(path, np.uint8))


def decode(file):
    """The bytes of a picture's file, as a uint8 array -> what read_image gives."""
    channels = 0
    head = file.tobytes().partition(b"\xff\xdb")[0]  # what stands before a JPEG's tables
    # as Pillow's pixels, sooner; but it turns by EXIF in the first segment, not by others or XMP
    if head[:3] == b"\xff\xd8\xff" and head.count(b"\xff\xe1") <= (b"Exif\0" in head):
        image = decode_jpeg(torch.from_numpy(file), apply_exif_orientation=True)
        channels = len(image)
    if channels not in (1, 3):  # in CMYK too
        with Image.open(io.BytesIO(file)) as image:
            tags = getattr(image, "tag_v2", {})  # of a TIFF: its bits, its colors, its planes
            if max(tags.get(258, (8,))) > 8 and (tags.get(262) == 0 or tags.get(284) == 2):
                raise ValueError("over 8 bits, and white as 0 or planes; save it with 8 bits")
            deep = image.mode[0] not in "IF" and ";16" in str(image.tile)  # 8 of them are read
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":
                image = Image.fromarray(to_8_bits(np.asarray(image)))
            image = TF.pil_to_tensor(image.convert("RGB"))
        if deep and image.max() < 16:
            raise ValueError("12 of 16 bits, of which 8 would be read; save it with 8 bits")
    height, width = image.shape[1:]
    if max(height, width) > 100 * min(height, width):  # resizing its short side needs gigabytes
        raise ValueError(f"{width}x{height} pixels, a side over 100 times the other")
    return image.expand(3, -1, -1)


def to_8_bits(values):
    """Gray values of any kind -> uint8. The largest value tells their range: floats go up to 1,
    integers have 8 bits, a scanner's 12, or 16."""
    largest = values.max()
    ranges = [1, 255, 4095, 65535] if values.dtype.kind == "f" else [255, 4095, 65535]
    fitting = [top for top in ranges if largest <= top]
    if not fitting or not values.min() >= 0:  # so that nan is refused too
        raise ValueError(f"has values from {values.min()} to {largest}; save it with 8 or 16 bits")
    return np.round(values * (255 / fitting[0])).astype(np.uint8)


def open_images(data, image_size, val_images, *without):
    """(training images, at most `val_images` held-out ones) of --data: a name in DATASETS, or a
    folder, but for what lies in `without`. Up to a tenth is held out if the folder has no val/."""
    train, *val = named_images(data, image_size) or open_parts(data, without)
    if not len(train) and val:
        train, val = folder_images(data, without), ()
    if val and len(val := val[0]):
        val = val.split(val_images)[0]
    else:
        val, train = train.split(min(val_images, max(1, len(train) // 10)))
    if not len(train):
        raise BadInput(f"--data={data}: holds no two images ({' '.join(ENDINGS)})")
    return train, val


def open_pictures(data, image_size, *without):
    """Images to look at: that of a file, or 8 of a folder or of a data set's held-out ones."""
    if os.path.isfile(data) and not find_tars(data):
        return Images([data], read_image, os.path.dirname(data))
    if os.path.exists(data) and len(images := folder_images(data, without)):
        return images.split(8)[0]
    return open_images(data, image_size, 8)[1]


def fit_size(size, side, patch_size=1):
    """[height, width] in patches of a picture of `size` (height, width) whose short side is resized
    to `side` pixels, or its long one to four times that if it is longer."""
    scale = min(side / min(size), 4 * side / max(size))
    return [max(1, round(scale * length / patch_size)) for length in size]


# ---- data sets with a name -----------------------------------------------------------------------

def named_images(data, image_size):
    """[training images, held-out ones] where --data is a name in DATASETS; else None."""
    name, _, argument = data.partition(":")
    if name not in DATASETS:
        return None
    return [DATASETS[name](train, image_size, argument) for train in (True, False)]


def cifar(dataset, train, *_):
    """torchvision's CIFAR-10 or -100, downloaded once into torch's hub cache."""
    root = os.path.join(torch.hub.get_dir(), "cifar")
    try:
        data = dataset(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise BadInput(f"{dataset.__name__}: download failed ({error}); put its archive into "
                       f"{root}, set TORCH_HOME to a folder that you may write to, or give "
                       "--data=FOLDER with the images as files") from error
    return Images(range(len(data)), data.data.__getitem__, dataset.__name__,
                  data.targets.__getitem__, data.classes)


def shapes(train, image_size, argument):
    """20,000 training images, or N if --data=shapes:N, or 2,000 held-out ones, drawn when they are
    asked for. The class is the kind of the large shape; in the label map 0 is the ground and
    kind + 1 a shape."""
    if not (argument or "1").isdecimal():
        raise BadInput(f"--data=shapes:{argument}: give a number of training images")
    read, read_label, read_label_map = [functools.partial(part, image_size, int(train))
                                        for part in (shapes_image, shapes_label, shapes_label_map)]
    keys = range(int(argument or 20_000) if train else 2_000)
    return Images(keys, read, "shapes", read_label, list(OUTLINES), read_label_map)


def shapes_image(size, seed, index):
    return draw_shapes(size, seed, index)[0]


def shapes_label(size, seed, index):
    return int(draw_kinds(np.random.default_rng([seed, index]))[-1])


def shapes_label_map(size, seed, index):
    return draw_shapes(size, seed, index)[2].astype(np.int64)


# A data set is called with (train or held out, image_size, what follows "name:" in --data) and
# returns Images, or raises BadInput. If no images are held out, pre-training takes a tenth.
DATASETS = {
    "shapes": shapes,
    "cifar10": functools.partial(cifar, CIFAR10),
    "cifar100": functools.partial(cifar, CIFAR100),
}


# ---- shapes --------------------------------------------------------------------------------------

def polygon(angle, corners):
    """The outline of a regular polygon: its radius at each angle."""
    return 1 / np.cos(angle % (2 * np.pi / corners) - np.pi / corners)


def plus(angle, arm=0.33):
    """The outline of a plus sign whose arms are 2 * arm wide."""
    folded = np.abs((angle + np.pi / 4) % (np.pi / 2) - np.pi / 4)
    return np.where(np.tan(folded) <= arm, 1 / np.cos(folded), arm / np.sin(folded.clip(1e-9)))


def heart(angle):
    """The outline of a heart that stands on its tip."""
    x = 16 * np.sin(angle)**3
    y = 5 * np.cos(2 * angle) + 2 * np.cos(3 * angle) + np.cos(4 * angle) - 13 * np.cos(angle)
    return np.interp(angle, np.arctan2(y, x), np.hypot(x, y), period=2 * np.pi)


# kind of shape -> its outline: the radius at 1,024 angles, clockwise from the right
ANGLES = np.arange(1024) * (2 * np.pi / 1024)
OUTLINES = {
    "disc": np.ones(1024),
    "oval": 1 / np.hypot(np.cos(ANGLES), 1.8 * np.sin(ANGLES)),
    "triangle": polygon(ANGLES + np.pi / 2, 3),
    "square": polygon(ANGLES + np.pi / 4, 4),
    "star": 0.4 + 0.6 * np.abs((ANGLES + np.pi / 2) * 5 / np.pi % 2 - 1),
    "plus": plus(ANGLES),
    "heart": heart(ANGLES),
    "flower": 1 + 0.35 * np.cos(6 * ANGLES),
}
# all of the same area, so that size does not give the class away
RADII = [(r / np.sqrt((r**2).mean())).astype(np.float32) for r in OUTLINES.values()]
DARK = np.float32([[35, 40, 80], [80, 45, 30], [25, 70, 50], [75, 30, 80]])  # RGB
BRIGHT = np.float32([[255, 90, 80], [255, 165, 50], [255, 230, 80], [110, 220, 100],
                     [90, 190, 255], [255, 150, 205], [250, 250, 250]])


def draw_shapes(size, seed, index):
    """A large shape over a small one of any kind, bright on a dark ground: (image (size, size, 3)
    uint8; its class, the kind of the large shape; its label map (size, size) uint8, 0 the ground,
    kind + 1 a shape). Colors, places and sizes do not tell the kinds apart."""
    rng = np.random.default_rng([seed, index])
    kinds = draw_kinds(rng)
    image = np.full((size, size, 3), rng.choice(DARK))
    labels = np.zeros((size, size), np.uint8)
    y, x = np.mgrid[:size, :size].astype(np.float32)
    for kind, paint, is_large in zip(kinds, rng.permutation(BRIGHT), (False, True)):
        radius = size * (rng.uniform(0.28, 0.36) if is_large else rng.uniform(0.08, 0.12))
        center = size * (rng.uniform(0.46, 0.54, 2) if is_large else rng.random(2))
        dy, dx = y - center[0], x - center[1]
        tilt = rng.integers(-10, 11)  # up to 3.5 degrees
        angle = (np.arctan2(dy, dx) * (512 / np.pi)).astype(int) + tilt
        inside = RADII[kind][angle % 1024] * radius - np.hypot(dy, dx)  # pixels to the outline
        cover = (inside + 0.5).clip(0, 1)[..., None]  # soft over one pixel: no jagged edge
        image += cover * (paint - image)
        labels[inside > 0] = kind + 1
    return image.round().astype(np.uint8), int(kinds[-1]), labels


def draw_kinds(rng):
    """The kinds of an image's two shapes, the large one last."""
    return rng.integers(len(OUTLINES), size=2)


if __name__ == "__main__":
    for name, draw in MASKS.items():
        masks = [draw(14, 14, 75, rng=np.random.default_rng(seed)) for seed in range(3)]
        print(name)
        for row in np.where(np.concatenate(masks, axis=1), "##", ". "):
            print("  ".join("".join(part) for part in np.split(row, 3)))
