"""VQA sets by name: easy-VQA, anything that `datasets` loads, or a folder of images with questions in JSON lines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_aegis.data.dataset_pictures import DatasetPictures
from hf_aegis.data.pictures import read_picture
from hf_aegis.data.vqa import load_easy_vqa
from hf_aegis.data.vqa_columns import VQAColumns
from hf_aegis.data.vqa_samples import VQASample, VQASamples, choose
from hf_aegis.json_files import parse_json_object


EASY_VQA = "easy-vqa"


def load_vqa(
    source: str,
    split: str | None = None,
    max_samples: int | None = None,
    seed: int | None = None,
    *,
    revision: str | None = None,
    config: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    streaming: bool | None = None,
) -> Sequence[VQASample]:
    """
    Questions about images from a named source. Images are decoded when a sample is accessed, put upright and converted
    to RGB: PNG, JPEG, WebP, GIF and BMP of at most 64 million pixels.

    Args:
        source (`str`):
            `"easy-vqa"`; a folder with images and `<split>.jsonl`; or whatever `datasets.load_dataset` takes, such as
            `"lmms-lab/VQAv2"`, `"lmms-lab/OK-VQA"` or a folder of Parquet files. Each line of `<split>.jsonl` is an
            object with `image` (a path inside the folder), `question`, and `answer` or `answers` (of four annotators
            or more); `question_type`, `answer_type` and `question_id` are read where they are given.
        split (`str`, *optional*): which part; may be left out where there is only one.
        max_samples (`int`, *optional*): how many samples to keep; all of them by default.
        seed (`int`, *optional*): shuffles the samples before `max_samples` cuts them.
        revision (`str`, *optional*): of a dataset on the Hub.
        config (`str`, *optional*): which of the configurations of a dataset that `datasets.load_dataset` takes.
        columns (`Mapping[str, str]`, *optional*):
            the column of each field of [`VQASample`] whose name is not that of a common mirror of VQA v2 or OK-VQA
            (see [`~data.vqa_columns.CANDIDATES`]), e.g. `{"answers": "labels"}`; `None` for a column to be left out.
        streaming (`bool`, *optional*):
            read only as much of a dataset on the Hub as `max_samples` need, and keep them encoded in memory. Shuffled,
            they come from about the first `2 * max_samples` of shuffled shards rather than from the whole split. By
            default for a set on the Hub of which `max_samples` are asked.

    Returns:
        `Sequence[VQASample]`: the samples, in a fixed order.

    Raises:
        ValueError: if an argument does not fit the source, or the source's content is not usable; file and line, or
            row, and key are named. An image that cannot be decoded is named when it is accessed.
        FileNotFoundError: if a folder lacks the split, or an image.
    """
    if source == EASY_VQA:
        if revision is not None or config is not None or columns or streaming:
            raise ValueError("easy-VQA comes with its package: it takes no revision, config, columns or streaming.")
        return load_easy_vqa(str(split), max_samples, seed)
    folder = Path(source)
    if folder.is_dir() and any(folder.glob("*.jsonl")):
        if revision is not None or config is not None or streaming:
            raise ValueError(f"{source} is a folder with JSON lines: it takes no revision, config or streaming.")
        return _from_folder(folder, split, max_samples, seed, columns)
    if revision is not None and folder.exists():
        raise ValueError(f"{source} lies on this machine: it takes no revision.")
    options = {"name": config, "revision": revision}
    if streaming or (streaming is None and max_samples is not None and not folder.exists()):
        return _from_stream(source, split, max_samples, seed, options, columns)
    return _from_dataset(source, split, max_samples, seed, options, columns)


def _from_folder(
    folder: Path,
    split: str | None,
    max_samples: int | None,
    seed: int | None,
    columns: Mapping[str, str | None] | None,
) -> VQASamples:
    file = folder / f"{_only_split(sorted(path.stem for path in folder.glob('*.jsonl')), split, str(folder))}.jsonl"
    rows = [
        (number, parse_json_object(line, f"{file}, line {number}"))
        # Texts may hold characters that `str.splitlines` breaks lines at.
        for number, line in enumerate(file.read_bytes().split(b"\n"), start=1)
        if line.strip()
    ]
    if not rows:
        raise ValueError(f"{file}: found no questions.")
    found = VQAColumns.find(sorted({key for _, row in rows for key in row}), columns, str(file))
    annotations = [found.annotation(row, f"{file}, line {number}") for number, row in rows]
    paths = [_inside(folder, row.get(str(found.image)), f"{file}, line {number}", found) for number, row in rows]
    chosen = choose(len(rows), max_samples, seed, str(file))
    return VQASamples(chosen, annotations.__getitem__, lambda row: read_picture(paths[row]))


def _inside(folder: Path, value: Any, name: str, columns: VQAColumns) -> Path:
    if not isinstance(value, str):
        raise ValueError(f"{name}: key {columns.image!r} must hold a path inside {folder}; found {value!r}.")
    try:
        path = (folder / value).resolve()
        found = path.is_file()
    # Names that no file has: with a zero byte, too long, or of links in a circle.
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(f"{name}: key {columns.image!r} is no path: {value[:80]!r}: {error}") from error
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name}: key {columns.image!r} leads out of {folder}: {value!r}.")
    if not found:
        raise FileNotFoundError(f"{name}: key {columns.image!r}: there is no image {path}.")
    return path


def _from_dataset(
    source: str,
    split: str | None,
    max_samples: int | None,
    seed: int | None,
    options: Mapping[str, Any],
    columns: Mapping[str, str | None] | None,
) -> VQASamples:
    import datasets

    loaded: Any
    if any((Path(source) / file).is_file() for file in ("state.json", "dataset_dict.json")):
        if options["name"] is not None:
            raise ValueError(f"{source} was saved to disk: it takes no config.")
        loaded = datasets.load_from_disk(source)
    else:
        loaded = datasets.load_dataset(source, **options)
    if isinstance(loaded, datasets.DatasetDict):
        split = _only_split(sorted(map(str, loaded)), split, source)
        loaded = loaded[split]
    elif split is not None and split != str(loaded.split):
        raise ValueError(f"{source}: found the split {str(loaded.split)!r} alone, not {split!r}.")
    found = VQAColumns.find(loaded.column_names, columns, source)
    _check_images(loaded.features, found, source)
    images = loaded.select_columns([found.image]).cast_column(found.image, datasets.Image(decode=False))
    pictures = DatasetPictures(source)
    texts = loaded.select_columns(found.texts)
    return VQASamples(
        choose(len(loaded), max_samples, seed, f"{source}, split {split!r}"),
        lambda row: found.annotation(texts[row], f"{source}/{split}/{row}"),
        lambda row: pictures.open(images[row][found.image]),
    )


def _from_stream(
    source: str,
    split: str | None,
    max_samples: int | None,
    seed: int | None,
    options: Mapping[str, Any],
    columns: Mapping[str, str | None] | None,
) -> VQASamples:
    import datasets

    if max_samples is None or max_samples < 1:
        raise ValueError(f"{source}: streaming needs max_samples of at least 1, since samples are kept in memory.")
    loaded: Any = datasets.load_dataset(source, **options, streaming=True)
    split = _only_split(sorted(map(str, loaded)), split, source)
    stream = loaded[split]
    if stream.features is None:
        raise ValueError(f"{source}: the columns of the stream are not known before it is read; do without streaming.")
    found = VQAColumns.find(list(stream.features), columns, source)
    _check_images(stream.features, found, source)
    # Casting the column alone would leave the threads at work that datasets decodes folders of images in.
    stream = stream.decode(False)
    if seed is not None:
        # A larger buffer would download and hold that many more images before the first.
        stream = stream.shuffle(seed=seed, buffer_size=max_samples)
    rows = list(stream.take(max_samples))
    if len(rows) < max_samples:
        raise ValueError(f"{source}, split {split!r}: max_samples is {max_samples}; found {len(rows)} questions.")
    pictures = DatasetPictures(source)
    return VQASamples(
        range(len(rows)),
        lambda row: found.annotation(rows[row], f"{source}/{split}/{row} (streamed)"),
        lambda row: pictures.open(rows[row][found.image]),
    )


def _only_split(found: list[str], split: str | None, source: str) -> str:
    if split is None and len(found) == 1:
        return found[0]
    if split not in found:
        raise ValueError(f"{source} has the splits {found}; found split={split!r}.")
    return split


def _check_images(features: Mapping[str, Any], columns: VQAColumns, source: str) -> None:
    import datasets

    if not isinstance(feature := features[str(columns.image)], datasets.Image):
        raise ValueError(f"{source}: column {columns.image!r} must hold images; found {feature}.")
