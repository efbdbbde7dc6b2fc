"""Fine-tune BEiT on image classification (arXiv 2106.08254, sections 2.6 and 3.1), and probe it.

No arguments is the recipe of table 13: ViT-B from out/run/checkpoint.pt, 100 epochs of ImageNet-1k
at 224 px, batch 1024. The paper reports 83.2% top-1 for it, 81.8% for DeiT-B from scratch; neither
has been measured with this code. `--data` holds train/CLASS/ and val/CLASS/. On 8 GPUs:
    torchrun --nproc_per_node=8 finetune_cls.py --data=/path/to/imagenet --out=out/imagenet
In minutes on two CPU cores, after `python pretrain.py --preset=shapes --steps=1200`:
    python finetune_cls.py --preset=shapes
What frozen features are worth (appendix D), a linear classifier a layer, or nearest neighbours:
    python finetune_cls.py --task=probe --data=/path/to/imagenet --out=out/imagenet_probe
    python finetune_cls.py --task=knn --data=/path/to/imagenet --labels_per_class=50
Evaluate, or draw the accuracy of several runs against their epochs:
    python finetune_cls.py --task=eval --weights=out/imagenet/checkpoint.pt --data=/path/to/imagenet
    python finetune_cls.py --task=curves out/imagenet out/scratch --out=out/curves
`--help` lists every option. Run a command again after it was killed, and it goes on where it was.

Read this file from the bottom: main, train, then the objective and the images. The command line,
the schedule, checkpoints and logs are pretrain.py's; the loop is written out here.
"""

import functools
import math
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import v2
from tqdm import tqdm

from model import Classifier, LinearProbes, ViT, load_weights, write_atomically
from pretrain import (
    NORMS, OUTLINES, Images, Log, RunConfig, all_sum, array_images, batch_of_step, cosine,
    folder_images, loader, log, micro_batches, open_cifar, open_shapes, parse_args, prepare, rank,
    read_metrics, run, run_length, setup_device, shape_kinds, share, stream, vit_config,
    world_size,
)

# ---- the options; the comment behind a field is its text in --help -------------------------------


@dataclass
class Config(RunConfig):
    data: str = "imagenet"  # folder with train/CLASS/ and val/CLASS/; or shapes, cifar10, cifar100
    out: str = "out/imagenet"  # one folder a run: checkpoint.pt, metrics.jsonl, config.json
    weights: str = "out/run/checkpoint.pt"  # what to start from (README); none: from scratch
    epochs: float = 100  # passes over the data; from scratch a ViT wants three times as many
    batch_size: int = 1024  # images a step over ALL processes; for half of it halve the lr
    lr: float = 4e-3  # peak for the head, less below it (layer_decay); the paper tries 2e-3 to 5e-3
    min_lr: float = 1e-6  # where the cosine ends
    warmup_epochs: float = 20  # linear warm-up; the new head would else upset the backbone
    clip_grad: float = 0.0  # largest gradient norm, 0 for none, as in table 13
    eval_every: int = 1251  # steps between evaluations, here an epoch of ImageNet; 0 for the end
    repeats: int = 3  # views of an image in one batch: repeated augmentation (arXiv 1902.05509)
    task: Literal["train", "eval", "probe", "knn", "curves"] = "train"  # see the top of the file
    layer_decay: float = 0.65  # a layer's lr over that above it; 1 lets fine-tuning forget more
    mixup: float = 0.8  # alpha of mixup (arXiv 1710.09412), 0 for none; for long runs only
    cutmix: float = 1.0  # alpha of cutmix (arXiv 1905.04899), 0 for none; each has half the batches
    smoothing: float = 0.1  # label smoothing; for noisy labels and against overconfidence
    randaug: float = 9.0  # RandAugment's magnitude of 10, 0 for none; less for tiny images
    randaug_noise: float = 0.5  # standard deviation of that magnitude from operation to operation
    erasing: float = 0.25  # probability that a rectangle of the image becomes noise
    crop_min: float = 0.08  # least area of a crop; raise it where images are tiny
    eval_crop: float = 0.875  # share of the side that evaluation sees; 1 at 384 px or tiny images
    labels_per_class: int = 0  # train on only so many images of each class, drawn by the seed
    probe_layer: int = 0  # layer that --task=probe and knn look at, from 1; 0: each of them
    neighbours: int = 20  # of --task=knn; more smooth over rare classes
    sam_rho: float = 0.0  # radius of sharpness-aware minimisation, 0.05 say; doubles the time
    runs: tuple = ()  # the folders that --task=curves draws


# What --task=probe (appendix D) and --size=large (table 13) change
PLAIN = dict(mixup=0.0, cutmix=0.0, smoothing=0.0, randaug=0.0, erasing=0.0, repeats=1)
PROBE = dict(PLAIN, epochs=50, lr=4e-3, weight_decay=1e-4, warmup_epochs=0, drop_path=0.0)
SIZES = {"size=large": dict(epochs=50, warmup_epochs=5, layer_decay=0.75, repeats=1)}
TINY = dict(size="nano", batch_size=64, lr=2e-3, layer_decay=0.75, eval_crop=1.0, num_workers=2)
TINY |= dict(PLAIN, smoothing=0.1, log_every=25, save_every=500)
PRESETS = {
    "imagenet": {**SIZES, "task=probe": dict(PROBE, out="out/imagenet_probe")},
    "imagenet384": dict(
        image_size=384, epochs=10, warmup_epochs=1, lr=4e-4, eval_crop=1.0, micro_batch=32,
        weights="out/imagenet/checkpoint.pt", out="out/imagenet384",
        **{"size=large": dict(layer_decay=0.75, repeats=1)},
    ),
    "cifar100": {
        **dict(data="cifar100", out="out/cifar100_cls", epochs=150, batch_size=512),
        **dict(weight_decay=0.3, erasing=0.0, eval_crop=1.0, eval_every=97),
        "task=probe": dict(PROBE, out="out/cifar100_probe", batch_size=1024),
    },
    "cifar10": {
        **dict(TINY, data="cifar10", weights="out/cifar10/checkpoint.pt", out="out/cifar10_cls"),
        **dict(image_size=32, patch_size=4, epochs=30, warmup_epochs=2, crop_min=0.4),
        **dict(eval_every=781),
        "task=probe": dict(PROBE, out="out/cifar10_probe", batch_size=256, epochs=10),
    },
    "shapes": {
        **dict(TINY, data="shapes", weights="out/shapes/checkpoint.pt", out="out/shapes_cls"),
        **dict(image_size=64, patch_size=8, labels_per_class=100, epochs=25, warmup_epochs=5),
        **dict(crop_min=0.5, eval_every=100),
        "task=probe": dict(PROBE, out="out/shapes_probe", batch_size=256, epochs=10)
        | dict(labels_per_class=0),
    },
}

# ---- labelled images -----------------------------------------------------------------------------


def open_labelled(config):
    """(training images, their labels, held-out images, their labels, names of the classes)."""
    cifar = {"cifar10": CIFAR10, "cifar100": CIFAR100}
    if config.data == "shapes":
        parts = [open_shapes(config.image_size, train) for train in (True, False)]
        labels = [[shape_kinds(np.random.default_rng([seed, i]))[-1] for i in range(len(part))]
                  for seed, part in zip((1, 0), parts)]
        classes = list(OUTLINES)
    elif config.data in cifar:
        sets = [open_cifar(cifar[config.data], train) for train in (True, False)]
        parts = [array_images(s.data, config.data) for s in sets]
        labels, classes = [s.targets for s in sets], sets[0].classes
    else:
        opened = [open_classes(config.data, part) for part in ("train", "val")]
        parts, labels, (classes, others) = zip(*opened)
        if classes != others:
            odd = sorted(set(classes) ^ set(others))
            raise ValueError(f"--data={config.data}: {len(classes)} classes in train/, "
                             f"{len(others)} in val/; {odd[0]} is in one only")
    (train, val), (train_labels, val_labels) = parts, map(np.asarray, labels)
    if len(val) < world_size():
        raise ValueError(f"--data={config.data}: {len(val)} held-out images are too few")
    if config.labels_per_class:
        kept = few_of_each(train_labels, config.labels_per_class, config.seed)
        train = Images([train.keys[i] for i in kept], train.read, train.source)
        train_labels = train_labels[kept]
    return train, train_labels, val, val_labels, classes


def open_classes(folder, part):
    """(images, labels, classes) of folder/part/CLASS/, in the order of the classes' names."""
    where = os.path.join(folder, part)
    if not os.path.isdir(where):
        raise ValueError(f"{where}: no such folder; --data holds train/CLASS/ and val/CLASS/")
    images = folder_images(where)
    names = [os.path.relpath(path, where).split(os.sep) for path in images.keys]
    loose = [path for path, name in zip(images.keys, names) if len(name) == 1]
    if loose or not names:
        found = f"{loose[0]} is in no class" if loose else "there are no images"
        raise ValueError(f"{where}: {found}; it should hold a folder of images for each class")
    classes = sorted({name[0] for name in names})
    numbers = {name: number for number, name in enumerate(classes)}
    return images, [numbers[name[0]] for name in names], classes


def few_of_each(labels, count, seed):
    """The places of `count` labels of each class, drawn by the seed, in order."""
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = [order[labels[order] == label][:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept)).tolist()


class LabelledViews(Dataset):
    """dataset[epoch, index] is a dict of `images` (3, H, W), normalised float32, of `labels`, the
    class's number, and of `skipped`, whether it is the next one because the image is unreadable.
    All of it is a function of (seed, epoch, index)."""

    def __init__(self, images, labels, config, train):
        for name in ("eval_crop", "crop_min"):
            if not 0 < getattr(config, name) <= 1:
                raise ValueError(f"--{name}={getattr(config, name)}: give a share, above 0 up to 1")
        self.images, self.labels, self.config = images, labels, config
        size, bicubic = config.image_size, v2.InterpolationMode.BICUBIC
        whole = round(size / config.eval_crop)
        views = [v2.Resize(whole, bicubic), v2.CenterCrop(size)]
        if config.eval_crop == 1:
            views = [v2.Resize((size, size), bicubic)]
        if train:
            crop = v2.RandomResizedCrop(size, (config.crop_min, 1.0), interpolation=bicubic)
            views = [crop, v2.RandomHorizontalFlip()]
            augment = functools.partial(rand_augment, config.randaug, config.randaug_noise)
            views += [augment] if config.randaug else []
        views += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        views += [v2.Normalize(*NORMS[config.norm])]
        if train and config.erasing:
            views += [v2.RandomErasing(config.erasing, (0.02, 1 / 3), value="random")]
        self.view = v2.Compose(views)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        image, found = self.images.load(index, self.config.skip_bad_images)
        torch.default_generator.manual_seed(stream(self.config.seed, epoch, index))
        label = int(self.labels[found])
        return {"images": self.view(image), "labels": label, "skipped": found != index}


def rand_augment(magnitude, noise, image):
    """RandAugment as table 13's runs had it (timm's rand-m9-mstd0.5): two operations, each left out
    half of the time, of a magnitude around 9 of 10. torchvision counts 31 steps, from 0 to 30."""
    bicubic, grey = v2.InterpolationMode.BICUBIC, [124, 116, 104]  # ImageNet's mean
    for _ in range(2):
        step = int((3 * torch.normal(magnitude, noise, ())).round().clamp(0, 30))
        if torch.rand(()) < 0.5:
            image = v2.RandAugment(1, step, interpolation=bicubic, fill=grey)(image)
    return image


def mix(images, labels, config, classes):
    """Mixup or cutmix of each image with the one before it: (images, soft labels (B, classes))."""
    kinds = [(v2.MixUp, config.mixup), (v2.CutMix, config.cutmix)]
    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha]
    return v2.RandomChoice(kinds)(images, labels) if kinds else (images, labels)


# ---- the objective -------------------------------------------------------------------------------


def build_model(config, classes):
    """The network of --task, with the weights of --weights; `classes` is their number."""
    arch = vit_config(config, shared=False)
    if not 0 <= config.probe_layer <= arch.depth:
        raise ValueError(f"--probe_layer={config.probe_layer}: give 1 to {arch.depth}, or 0")
    if config.weights == "none" and config.task != "train":
        raise ValueError(f"--task={config.task}: give --weights=FILE, what it is to look at")
    if config.task == "probe":
        model = LinearProbes(arch, classes, probed(config, arch))
    else:
        model = ViT(arch) if config.task == "knn" else Classifier(arch, classes)
    if config.weights != "none":
        log(load_weights(model, config.weights, head=config.task == "eval"))
    return model


def probed(config, arch):
    return [config.probe_layer] if config.probe_layer else list(range(1, arch.depth + 1))


class Classification(nn.Module):
    """Cross entropy with label smoothing, of the classifier or of the mean over all probes."""

    def __init__(self, config, classes):
        super().__init__()
        if not 0 <= config.smoothing < 1:
            raise ValueError(f"--smoothing={config.smoothing}: give 0 or more, below 1")
        self.model, self.smoothing = build_model(config, classes), config.smoothing

    def logits(self, images):
        """(outputs, B, classes): one output of a classifier, one for each probe."""
        logits = self.model(images).float()
        return logits if logits.dim() == 3 else logits[None]

    def forward(self, batch):
        """The loss of `images` (B, 3, H, W) and `labels`, (B,) int64 or (B, classes) soft."""
        losses = [F.cross_entropy(logits, batch["labels"], label_smoothing=self.smoothing)
                  for logits in self.logits(batch["images"])]
        return torch.stack(losses).mean()


@torch.no_grad()
def ascend(parameters, rho):
    """Sharpness-aware minimisation's first half (arXiv 2010.01412, eq. 2): move the weights w to
    w + rho * g / |g|, the worst place around them, and return them as they were. A gradient that
    float16 made infinite moves nothing."""
    before = [parameter.clone() for parameter in parameters]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    scale = torch.where(norm.isfinite(), rho / (norm + 1e-12), 0.0)
    for parameter in parameters:
        parameter.add_(parameter.grad.nan_to_num(0.0, 0.0, 0.0) * scale)
    return before


# ---- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(objective, dataset, config, device, dtype):
    """Loss, top-1 and top-5 accuracy over all held-out images, each counted once whatever the
    number of processes. Of several probes the best counts; each layer's is `val_top1_layer_N`."""
    objective.eval()
    keys = share([(0, index) for index in range(len(dataset))])
    batches = [keys[i : i + config.micro_batch] for i in range(0, len(keys), config.micro_batch)]
    sums = 0
    for batch in loader(dataset, batches, config.num_workers, device):
        labels = batch["labels"].to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = objective.logits(batch["images"].to(device))  # (outputs, B, classes)
        hits = logits.topk(min(5, logits.shape[2])).indices == labels[:, None]  # (outputs, B, 5)
        losses = [F.cross_entropy(output, labels, reduction="sum") for output in logits]
        counts = [torch.stack(losses), hits[..., 0].sum(dim=1), hits.sum(dim=(1, 2))]
        sums = sums + torch.stack([count.float() for count in counts]).cpu().double()
    objective.train()
    loss, top1, top5 = np.array(all_sum(*sums.flatten().tolist())).reshape(3, -1) / len(dataset)
    best = int(top1.argmax())
    line = {"val_loss": loss[best], "val_top1": top1[best], "val_top5": top5[best]}
    if config.task == "probe":
        layers = probed(config, objective.model.config)
        line |= {f"val_top1_layer_{number}": value for number, value in zip(layers, top1)}
    return {name: float(value) for name, value in line.items()}


def print_table(line):
    """A probe's accuracy a layer."""
    log("layer  top-1")
    for name, value in line.items():
        if name.startswith("val_top1_layer_"):
            log(f"{name.removeprefix('val_top1_layer_'):>5}  {100 * value:5.2f}%")


def vote(queries, keys, labels, count):
    """The class of each of `queries` (Q, D), by a vote of the `count` nearest of `keys` (K, D) with
    `labels` (K,): exp(cosine / 0.07) each, as in DINO (arXiv 2104.14294). All are of length 1."""
    close, index = (queries @ keys.T).topk(count)  # (Q, count)
    votes = queries.new_zeros(len(queries), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[index], (close / 0.07).exp()).argmax(dim=1)


@torch.no_grad()
def knn(config):
    """Accuracy of the vote of the nearest training images, by their mean patch features: no
    training, so that one can watch a pre-training improve."""
    if world_size() > 1:
        raise ValueError("--task=knn runs in one process: start it without torchrun")
    device, dtype = setup_device(config)
    train, train_labels, val, val_labels, classes = open_labelled(config)
    model = build_model(config, len(classes)).to(device).eval()

    def features(images, labels):
        """(layers, images, D), float16 of length 1."""
        dataset = LabelledViews(images, labels, config, train=False)
        keys = [(0, index) for index in range(len(dataset))]
        steps = range(0, len(keys), config.micro_batch)
        batches = [keys[i : i + config.micro_batch] for i in steps]
        out = []
        batches = loader(dataset, batches, config.num_workers, device)
        for batch in tqdm(batches, total=len(steps), disable=not sys.stderr.isatty()):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                means = model.mean_features(batch["images"].to(device))  # (depth, B, D)
            kept = means[[layer - 1 for layer in probed(config, model.config)]]
            out.append(F.normalize(kept.float(), dim=2).half().cpu())
        return torch.cat(out, dim=1)

    bank, queries = features(train, train_labels), features(val, val_labels)
    labels, truth = torch.tensor(train_labels, device=device), torch.tensor(val_labels)
    line, count = {}, min(config.neighbours, len(labels))
    for layer, keys, rows in zip(probed(config, model.config), bank, queries):
        keys = keys.to(device).float()
        found = [vote(part.to(device).float(), keys, labels, count) for part in rows.split(256)]
        right = (torch.cat(found).cpu() == truth).float().mean()
        line[f"val_top1_layer_{layer}"] = right.item()
    log(f"{count} nearest of {len(labels):,} training images, {len(truth):,} held out")
    print_table(line)
    return line


def curves(config):
    """OUT/curves.png: held-out accuracy against the epoch, a line for each run."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--task=curves: first pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not config.runs:
        raise ValueError("--task=curves: name the folders of the runs behind it")
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for folder in config.runs:
        lines = read_metrics(os.path.join(folder, "metrics.jsonl"))
        lines = [line for line in lines if "val_top1" in line]
        if not lines:
            raise ValueError(f"{folder}: no metrics.jsonl with val_top1 in it; give a run's --out")
        accuracy = [100 * line["val_top1"] for line in lines]
        axes.plot([line["epoch"] for line in lines], accuracy, marker=".", label=folder)
    axes.set(xlabel="epoch", ylabel="top-1 accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    path = os.path.join(config.out, "curves.png")
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))
    log("wrote", path)


# ---- training ------------------------------------------------------------------------------------


def train(config):
    """One run, from its checkpoint if there is one."""
    device, dtype = setup_device(config)
    train_images, train_labels, val_images, val_labels, classes = open_labelled(config)
    steps, per_epoch, warmup = run_length(config, len(train_images))
    torch.manual_seed(config.seed)
    objective = Classification(config, len(classes)).to(device)
    dataset = LabelledViews(train_images, train_labels, config, train=True)
    val_dataset = LabelledViews(val_images, val_labels, config, train=False)
    if config.task == "eval":
        line = evaluate(objective, val_dataset, config, device, dtype)
        log(f"{len(val_dataset):,} images", *(f"{k} {v:.6g}" for k, v in line.items()))
        return line
    made = prepare(objective, config, device, dtype, config.layer_decay)
    model, optimizer, scaler, save, start = made
    log(f"{config.task} into {config.out}: step {start} of {steps}, {per_epoch} an epoch, warm-up "
        f"{warmup}; {len(dataset):,} images of {len(classes)} classes, {len(val_dataset):,} held "
        "out")
    if start == steps:
        return None

    batches = (share(batch_of_step(s, len(dataset), config)) for s in range(start, steps))
    batches = loader(dataset, batches, config.num_workers, device)
    output = Log(config, train_images, start, steps, per_epoch)
    trained = [p for p in model.parameters() if p.requires_grad]

    def backward(parts, seed):
        """Add up the gradients of the global batch's mean loss; returns this process's share."""
        torch.manual_seed(seed)  # for stochastic depth
        total = 0
        for number, part in enumerate(parts, 1):
            part_share = len(part["images"]) / config.batch_size
            sync = number == len(parts) or world_size() == 1
            with nullcontext() if sync else model.no_sync():
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = model(part)
                # DDP takes the mean over the processes; the loss is the mean over the whole batch
                scaler.scale(loss * part_share * world_size()).backward()
            total = total + part_share * loss.detach()
        return total

    for step, batch in enumerate(batches, start):
        if all_sum(output.stop)[0]:
            break
        lr = cosine(step, steps, warmup, config.lr, config.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        seed = stream(config.seed, step, rank())
        torch.manual_seed(seed)  # for mixing
        images, labels = (batch[k].to(device, non_blocking=True) for k in ("images", "labels"))
        images, labels = mix(images, labels, config, len(classes))
        parts = list(micro_batches(dict(images=images, labels=labels), config.micro_batch))
        loss = backward(parts, seed)
        if config.sam_rho:
            before = ascend(trained, config.sam_rho)
            optimizer.zero_grad(set_to_none=True)
            backward(parts, seed)
            torch._foreach_copy_([parameter.detach() for parameter in trained], before)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(trained, config.clip_grad or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        row = {"loss": loss, "grad_norm": norm / world_size()}
        to_log, to_evaluate, to_save = output.add(row, batch)
        if not (to_log or to_evaluate or to_save):
            continue
        line = output.read(lr)
        if to_evaluate:
            line |= evaluate(objective, val_dataset, config, device, dtype)
        output.write(line)
        if to_save:
            save(output.done)
    if output.close(save) and config.task == "probe":
        print_table(line)


TASKS = {"train": train, "probe": train, "eval": train, "knn": knn, "curves": curves}


def main(argv=None):
    config = parse_args(Config, PRESETS, argv, __doc__)
    if config.runs and config.task != "curves":
        raise ValueError(f"{config.runs[0]}: what is this for? An option is --NAME=VALUE")
    return TASKS[config.task](config)


if __name__ == "__main__":
    run(main)
