"""Trains an example network on its data set and writes its ONNX file, two image sets and results.json."""

import argparse
import gzip
import hashlib
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from networks import CLASSES, NETWORKS
from torch import Tensor, nn
from torch.nn import functional as F

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Example:
    """A data set that networks are trained on.

    Attributes:
        folder: what is made of it.
        data: its four IDX files, plain or gzipped.
        mirrored: share of the training images that are mirrored.
    """

    folder: Path
    data: Path
    mirrored: float


FASHION_MNIST = Example(HERE, Path("/usr/share/datasets/fashion-mnist"), mirrored=0.5)
DIGITS = Example(HERE.parent / "digits", HERE.parent / "digits" / "data", mirrored=0.0)
EXAMPLE_OF = {"residual": FASHION_MNIST, "inverted_residual": FASHION_MNIST, "plain": DIGITS}
DATA_FILES = {
    "train_images": "train-images-idx3-ubyte.gz",
    "train_labels": "train-labels-idx1-ubyte.gz",
    "test_images": "t10k-images-idx3-ubyte.gz",
    "test_labels": "t10k-labels-idx1-ubyte.gz",
}
CALIBRATION_IMAGES = 1024
EVALUATION_IMAGES = 2000
SETS_SEED = 2024  # apart from --seed, so that every net is measured on the same images
IMAGE_BORDER = 2
# The exporter also stores stack traces, which name files of this machine; these keys name modules only.
KEPT_METADATA = {"namespace", "pkg.torch.onnx.class_hierarchy", "pkg.torch.onnx.name_scopes"}


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of bytes, plain or gzipped."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if content[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path} is no IDX file of unsigned bytes: it begins with {content[:4].hex()}")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def data_file(folder: Path, part: str) -> Path:
    """One of the data set's files: the gzipped one, or else the plain one."""
    path = folder / DATA_FILES[part]
    found = path if path.is_file() else path.with_suffix("")
    if not found.is_file():
        raise SystemExit(f"{path} is missing, and no plain file is there: see the example's README.md, or set --data")
    return found


def read_split(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """One split's images as (N, 1, 28, 28) bytes, and its labels."""
    images = read_idx(data_file(folder, f"{split}_images"))
    return images[:, None], read_idx(data_file(folder, f"{split}_labels"))


def augmented(images: Tensor, mirrored_share: float, generator: torch.Generator) -> Tensor:
    """Pads each image, crops it back at a random place, mirrors some of them, and scales to [0, 1]."""
    count, _, height, width = images.shape
    padded = F.pad(images, (IMAGE_BORDER,) * 4)[:, 0]
    shifts = torch.randint(0, 2 * IMAGE_BORDER + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand((count, 1), generator=generator) < mirrored_share
    rows = shifts[0] + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = shifts[1] + torch.where(mirrored, columns.flip(1), columns)
    picked = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked[:, None].float() / 255


def train(network: nn.Module, images: Tensor, labels: Tensor, args: argparse.Namespace) -> float:
    """SGD with Nesterov momentum under a one-cycle schedule; returns the mean seconds of an epoch."""
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.SGD(
        network.parameters(), args.learning_rate, momentum=0.9, weight_decay=args.weight_decay, nesterov=True
    )
    steps = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.epochs * steps, pct_start=0.25
    )
    began = time.perf_counter()
    for epoch in range(args.epochs):
        network.train()
        order = torch.randperm(len(images), generator=generator)[: steps * args.batch_size]
        losses, right = 0.0, 0
        for batch in order.split(args.batch_size):
            x = augmented(images[batch], EXAMPLE_OF[args.network].mirrored, generator)
            x = x.contiguous(memory_format=torch.channels_last)
            logits = network(x)
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=args.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.item()
            right += int((logits.argmax(1) == labels[batch]).sum())
        print(
            f"epoch {epoch + 1}/{args.epochs}  loss {losses / steps:.4f}  "
            f"training accuracy {right / len(order):.4f}  {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    return (time.perf_counter() - began) / args.epochs


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    network.eval()
    right = 0
    for x, y in zip(images.split(1000), labels.split(1000), strict=True):
        right += int((network(x.float() / 255).argmax(1) == y).sum())
    return right / len(images)


def strip_metadata(model: onnx.ModelProto) -> None:
    """Drops what the exporter notes about the machine; names of nodes, tensors and modules stay."""
    graph = model.graph
    tensors = [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
    for part in [model, graph, *graph.node, *tensors]:
        kept = [entry for entry in part.metadata_props if entry.key in KEPT_METADATA]
        del part.metadata_props[:]
        part.metadata_props.extend(kept)
        part.doc_string = ""


def export(network: nn.Module, path: Path, samples: Tensor) -> None:
    """Writes one self-contained ONNX file with a free batch size, and compares its outputs with torch's."""
    network = network.eval().to(memory_format=torch.contiguous_format)
    program = torch.onnx.export(
        network,
        (samples[:2],),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    model = program.model_proto
    strip_metadata(model)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))
    with torch.no_grad():
        expected = network(samples).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": samples.numpy()})
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def write_image_sets(folder: Path, data: Path) -> dict[str, str]:
    """Writes calibration.npz (training images) and evaluation.npz (test images, every class alike)."""
    random = np.random.default_rng(SETS_SEED)
    train_images, train_labels = read_split(data, "train")
    test_images, test_labels = read_split(data, "test")
    calibration = random.choice(len(train_images), CALIBRATION_IMAGES, replace=False)
    per_class = EVALUATION_IMAGES // CLASSES
    classes = [np.flatnonzero(test_labels == c) for c in range(CLASSES)]
    evaluation = random.permutation(
        np.concatenate([random.choice(members, per_class, replace=False) for members in classes])
    )
    np.savez_compressed(
        folder / "calibration.npz",
        images=train_images[calibration],
        labels=train_labels[calibration].astype(np.int64),
    )
    np.savez_compressed(
        folder / "evaluation.npz",
        images=test_images[evaluation],
        labels=test_labels[evaluation].astype(np.int64),
    )
    return {name: digest(folder / name) for name in ("calibration.npz", "evaluation.npz")}


def digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def record(path: Path, network: str, result: dict, sets: dict[str, str], data: Path) -> None:
    """Replaces one network's entry in results.json and leaves the other's."""
    results = json.loads(path.read_text()) if path.exists() else {"networks": {}}
    results["data"] = {file.name: digest(file) for file in (data_file(data, part) for part in DATA_FILES)}
    results["image_sets"] = {"seed": SETS_SEED, **sets}
    results["networks"][network] = result
    path.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=sorted(NETWORKS), default="residual")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=0.2, help="the peak of the one-cycle schedule")
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", type=Path, help="folder of the data set's four IDX files, plain or gzipped")
    parser.add_argument("--out", type=Path, help="where to write; by default the example's folder")
    args = parser.parse_args()
    args.data = args.data or EXAMPLE_OF[args.network].data
    args.out = args.out or EXAMPLE_OF[args.network].folder
    return args


def main() -> None:
    args = parse_arguments()
    if args.epochs < 1:
        raise SystemExit(f"--epochs must be at least 1, got {args.epochs}")
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    # Filling memory that nothing reads before it is written would cost a tenth of the time.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    network = NETWORKS[args.network]().to(memory_format=torch.channels_last)
    images, labels = read_split(args.data, "train")
    seconds = train(network, torch.tensor(images), torch.tensor(labels).long(), args)

    images, labels = read_split(args.data, "test")
    test_images, test_labels = torch.tensor(images), torch.tensor(labels).long()
    top1 = accuracy(network, test_images, test_labels)
    print(f"test accuracy {top1:.4f}", flush=True)

    path = args.out / f"{args.network}.onnx"
    export(network, path, test_images[:200].float() / 255)
    sets = write_image_sets(args.out, args.data)
    settings = {k: v for k, v in vars(args).items() if k not in ("network", "data", "out")}
    result = {
        "test_accuracy": top1,
        "test_images": len(test_images),
        "evaluation_accuracy": accuracy_of_set(network, args.out / "evaluation.npz"),
        "parameters": sum(p.numel() for p in network.parameters()),
        "command": f"python examples/fashion_mnist/train.py --network {args.network} "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items()),
        "settings": settings,
        "seconds_per_epoch": round(seconds, 1),
        "file": path.name,
        "digest": digest(path),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
    record(args.out / "results.json", args.network, result, sets, args.data)
    print(json.dumps(result, indent=2))


def accuracy_of_set(network: nn.Module, path: Path) -> float:
    with np.load(path) as arrays:
        return accuracy(network, torch.tensor(arrays["images"]), torch.tensor(arrays["labels"]))


if __name__ == "__main__":
    main()
