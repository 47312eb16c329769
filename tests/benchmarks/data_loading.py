"""
Samples per second of `LiberoDataset`, over those of h5py read naively: one open file, and both frames, state and
action chunk of an item taken by their paths, turned upright and decoded, but neither checked nor normalised.

Files are written for the measurement: released ones (raw frames in one block, bottom-up) and recorded ones (JPEG), of
random pictures. Items are read in a random order. All variants take turns in one process, so that the machine's drift
hits them alike; a ratio is the median over repetitions of the paired ratios. Without workers times are of the
processor, which other work on the machine disturbs less than wall-clock time; with workers, which are there before and
stack the items to batches, they are wall-clock times. Prints a Markdown table, which is put on the machine's page in
`tests/benchmarks/results/`.
"""

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from machine_results import MachineResults
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from hf_aegis.data import LiberoDataset
from hf_aegis.data.libero_format import CAMERAS, JPEG_SUFFIX, STATE_FEATURES, LiberoConvention
from hf_aegis.data.libero_writer import encode_jpeg


CHUNK = 50
TASK = {"language_instruction": "pick up the milk and place it in the basket"}


def write_file(path: Path, kind: str, arguments: argparse.Namespace) -> None:
    """A task's file of random demonstrations."""
    random = np.random.default_rng(0)
    size, length = arguments.image_size, arguments.steps
    # Smooth pictures, as photographs are: noise would make JPEG streams several times as long.
    small = random.integers(0, 255, (length, 8, 8, 3), dtype=np.uint8)
    frames = np.stack(
        [np.asarray(Image.fromarray(row).resize((size, size), Image.Resampling.BICUBIC)) for row in small]
    )
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"], data.attrs["macros_image_convention"] = json.dumps(TASK), "opengl"
        data.attrs["num_demos"], data.attrs["total"] = arguments.demonstrations, arguments.demonstrations * length
        if kind == "jpeg":
            convention = LiberoConvention("before_action", "top_left", "jpeg", size)
            data.attrs["hf_aegis_convention"] = convention.to_json()
        for number in range(arguments.demonstrations):
            group = data.create_group(f"demo_{number}")
            group.attrs["num_samples"] = length
            group["actions"] = random.uniform(-1, 1, (length, 7))
            observations = group.create_group("obs")
            for name, width in STATE_FEATURES.items():
                observations[name] = random.uniform(-1, 1, (length, width))
            for camera in CAMERAS:
                if kind == "raw":
                    observations[camera] = frames
                    continue
                streams = observations.create_dataset(camera + JPEG_SUFFIX, (length,), h5py.vlen_dtype(np.uint8))
                for step, frame in enumerate(frames):
                    streams[step] = encode_jpeg(frame, 90)


class NaiveDataset(Dataset):
    """What one writes first: an item's arrays by their paths, from a file that each process opens once."""

    def __init__(self, path: Path, kind: str):
        self.path, self.kind = path, kind
        self.file: h5py.File | None = None
        self.offset = 1 if kind == "raw" else 0
        with h5py.File(path) as file:
            lengths = {name: len(group["actions"]) - self.offset for name, group in file["data"].items()}
        names = sorted(lengths, key=lambda name: int(name.removeprefix("demo_")))
        self.items = [(name, step) for name in names for step in range(lengths[name])]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.file is None:
            self.file = h5py.File(self.path)
        name, step = self.items[index]
        group = self.file[f"data/{name}"]
        first = step + self.offset
        actions = group["actions"][first : first + CHUNK]
        missing = CHUNK - len(actions)
        return {
            "images": [self.frame(group["obs"], camera, step) for camera in CAMERAS],
            "state": np.concatenate([group["obs"][key][step] for key in STATE_FEATURES]).astype(np.float32),
            "actions": np.concatenate([actions, np.repeat(actions[-1:], missing, axis=0)]).astype(np.float32),
            "action_is_pad": np.arange(CHUNK) >= CHUNK - missing,
            "instruction": TASK["language_instruction"],
        }

    def frame(self, observations: h5py.Group, camera: str, step: int) -> np.ndarray:
        """One frame, upright."""
        if self.kind == "jpeg":
            return np.array(Image.open(io.BytesIO(observations[camera + JPEG_SUFFIX][step].tobytes())))
        return np.ascontiguousarray(observations[camera][step][::-1])


def stacked(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch, as what travels from a worker to the trainer."""
    batch = {key: torch.as_tensor(np.stack([item[key] for item in items])) for key in ("state", "actions")}
    batch["images"] = torch.as_tensor(np.stack([image for item in items for image in item["images"]]))
    return batch


class Reader:
    """
    Reads items in an order, in this process or in workers that stay from call to call.

    Args:
        dataset (`Dataset`): Of the items.
        order (`list[int]`): Which of them.
        workers (`int`): Processes that read; 0 for this one.
    """

    def __init__(self, dataset: Dataset, order: list[int], workers: int):
        self.dataset, self.order, self.workers = dataset, order, workers
        self.loader: DataLoader | None = None
        if workers:
            items = Subset(dataset, order)
            self.loader = DataLoader(
                items, batch_size=32, num_workers=workers, collate_fn=stacked, persistent_workers=True
            )

    def seconds(self) -> float:
        """Time to read all: of the processor in this process, of the clock on the wall with workers."""
        clock = time.perf_counter if self.workers else time.process_time
        start = clock()
        if self.loader is None:
            for index in self.order:
                self.dataset[index]
        else:
            for _ in self.loader:
                pass
        return clock() - start


def measure(kind: str, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Samples per second of both, and the median of the paired ratios, for each number of workers."""
    path = folder / f"{kind}_demo.hdf5"
    write_file(path, kind, arguments)
    datasets = {"naive": NaiveDataset(path, kind), "libero": LiberoDataset(path, chunk_size=CHUNK, normalize=True)}
    plain = LiberoDataset(path, chunk_size=CHUNK, normalize=False)
    for index in (0, len(plain) // 2, len(plain) - 1):
        # Two ways to read the same.
        mine, naive = plain[index], datasets["naive"][index]
        for key in ("state", "actions", "action_is_pad"):
            np.testing.assert_array_equal(mine[key], naive[key])
        np.testing.assert_array_equal(mine["images"], naive["images"])
    order = np.random.default_rng(1).permutation(len(plain))[: arguments.samples].tolist()
    rows = []
    for workers in arguments.workers:
        readers = {name: Reader(dataset, order, workers) for name, dataset in datasets.items()}
        times: dict[str, list[float]] = {name: [] for name in datasets}
        for repetition in range(arguments.repeats + 1):
            for name, reader in readers.items():
                seconds = reader.seconds()
                if repetition > 0:  # the first one opens files and starts workers
                    times[name].append(seconds)
        ratios = [naive / mine for naive, mine in zip(times["naive"], times["libero"], strict=True)]
        rates = {name: len(order) / statistics.median(values) for name, values in times.items()}
        rows.append({"frames": kind, "workers": workers, "rates": rates, "ratio": statistics.median(ratios)})
    return rows


def main() -> None:
    """Measures, prints a Markdown table and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demonstrations", type=int, default=20)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--image_size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--again", action="store_true", help="measure anew what was measured with these settings")
    arguments = parser.parse_args()
    settings = {name: value for name, value in vars(arguments).items() if name != "again"}
    settings["threads"] = torch.get_num_threads()
    results = MachineResults("cpu")
    section = results.section("Reading demonstrations", settings, arguments.again)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for kind in ("raw", "jpeg")
            for row in results.unit(section, kind, lambda kind=kind: measure(kind, arguments, Path(folder)))
        ]
    lines = [
        "",
        f"{arguments.demonstrations} demonstrations of {arguments.steps} steps, two cameras of {arguments.image_size} "
        f"pixels, {arguments.samples} items, h5py {h5py.__version__}, {arguments.repeats} rounds; "
        f"load average {os.getloadavg()[0]:.1f} when written.",
        "",
        "| frames | workers | naive, samples/s | LiberoDataset, samples/s | × naive |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        naive, libero = row["rates"]["naive"], row["rates"]["libero"]
        lines.append(f"| {row['frames']} | {row['workers']} | {naive:.0f} | {libero:.0f} | {row['ratio']:.2f} |")
    results.show(section, lines)
    print("\n".join(lines))
    print(f"\n{results.page}")


if __name__ == "__main__":
    main()
