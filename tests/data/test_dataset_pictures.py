"""Rows of data sets that anybody may have made name the pictures of their own set, and no others."""

import io
import json
import zipfile
from pathlib import Path

import pyarrow.parquet
import pytest
from huggingface_hub import HfApi, hf_hub_download
from PIL import Image

from hf_aegis.data import load_vqa
from hf_aegis.data.dataset_pictures import DatasetPictures


SMALL = Image.new("RGB", (7, 5), "red")
OUTSIDE = "which is outside of the data set"


@pytest.fixture(scope="module")
def datasets():
    import datasets

    datasets.disable_progress_bars()
    return datasets


@pytest.fixture
def secret(tmp_path):
    SMALL.save(tmp_path / "secret.png")
    with zipfile.ZipFile(tmp_path / "secret.zip", "w") as archive:
        archive.write(tmp_path / "secret.png", "a.png")
    return tmp_path / "secret.png"


def png():
    buffer = io.BytesIO()
    SMALL.save(buffer, "PNG")
    return buffer.getvalue()


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.png", content)
    return buffer.getvalue()


def refused(pictures, path, message=OUTSIDE):
    with pytest.raises(ValueError, match=message):
        pictures.open({"path": str(path), "bytes": None})


def size(pictures, path):
    return pictures.open({"path": str(path), "bytes": None}).size


def test_rows_of_a_data_set_name_no_files_elsewhere(datasets, secret, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    source = tmp_path / "set"
    source.mkdir()
    SMALL.save(source / "own.png")
    paths = [
        str(source / "own.png"),
        str(secret),
        f"{source}/../secret.png",
        "/etc/passwd",
        "http://127.0.0.1:1/a.png",
    ]
    paths += ["hf://datasets/somebody/else@main/a.png", "zip://a.png::hf://datasets/somebody/else@main/a.zip"]
    features = datasets.Features(
        {
            "image": datasets.Image(decode=False),
            "question": datasets.Value("string"),
            "answer": datasets.Value("string"),
        }
    )
    rows = [{"image": {"path": path, "bytes": None}, "question": "what?", "answer": "a"} for path in paths]
    rows += [{"image": None, "question": "what?", "answer": "a"}]
    # A BMP of 60,000 x 60,000 pixels, as it says.
    bomb = b"BM" + bytes(12) + b"\x28\0\0\0\x60\xea\0\0\x60\xea\0\0\x01\0\x18\0" + bytes(28)
    rows += [{"image": {"path": None, "bytes": bomb}, "question": "what?", "answer": "a"}]
    # Written by datasets itself, the files would be put in.
    pyarrow.parquet.write_table(
        datasets.Dataset.from_list(rows, features=features).data.table, source / "train.parquet"
    )
    whole = load_vqa(str(source))
    streamed = load_vqa(str(source), streaming=True, max_samples=len(rows))
    for samples in (whole, streamed):
        assert samples[0].image.size == (7, 5)
        for index in range(1, len(paths)):
            with pytest.raises(ValueError, match=rf"/train/{index}.* {OUTSIDE}"):
                samples[index]
        with pytest.raises(ValueError, match="the row holds no image"):
            samples[len(paths)]
        with pytest.raises(ValueError, match=r"the picture has .* expected at most 64 million"):
            samples[len(paths) + 1]


def test_links_and_archives_of_a_folder_lead_nowhere_else(secret, tmp_path):
    source = tmp_path / "set"
    (source / "deep").mkdir(parents=True)
    SMALL.save(source / "own.png")
    (source / "own.zip").write_bytes(zipped(a=png()))
    (source / "inner.png").symlink_to(source / "own.png")
    for name in ("secret.png", "secret.zip"):
        (source / name).symlink_to(tmp_path / name)
    (source / "circle.png").symlink_to(source / "circle.png")
    (source / "up").symlink_to(tmp_path)
    (tmp_path / "set_beside").mkdir()
    SMALL.save(tmp_path / "set_beside" / "a.png")
    (tmp_path / "another_name").symlink_to(source)
    for pictures in (DatasetPictures(str(source)), DatasetPictures(str(tmp_path / "another_name"))):
        for path in ("own.png", "inner.png", "deep/../own.png"):
            assert size(pictures, source / path) == (7, 5)
        assert size(pictures, tmp_path / "another_name" / "own.png") == (7, 5)
        assert size(pictures, f"zip://a.png::{source}/own.zip") == (7, 5)
        for path in ("secret.png", "up/secret.png", "deep/../../secret.png", "../set_beside/a.png"):
            refused(pictures, source / path)
        for path in ("secret.zip", "up/secret.zip", "../secret.zip"):
            refused(pictures, f"zip://a.png::{source / path}")
        # The first part of an address is what would be opened, whatever the last one is.
        for first in (secret, f"file://{secret}", "http://127.0.0.1:1/a.png", f"zip://a.png::{tmp_path}/secret.zip"):
            refused(pictures, f"{first}::{source}/own.zip")
        refused(pictures, source / "circle.png", "which is no path")
        refused(pictures, source / "a\0b", "which is no path")
        for path in (source / "none.png", source / "deep", f"zip://b.png::{source}/own.zip"):
            with pytest.raises(FileNotFoundError, match="there is no file"):
                size(pictures, path)


def test_a_damaged_archive_is_refused_by_name(tmp_path):
    sound = zipped(a=png())
    locked = bytearray(sound)
    # That the member is encrypted.
    locked[6] |= 1
    locked[sound.index(b"PK\x01\x02") + 8] |= 1
    for content in (b"no archive", sound[:-30], sound[:40] + b"\xff" * 20 + sound[60:], bytes(locked)):
        (tmp_path / "a.zip").write_bytes(content)
        refused(
            DatasetPictures(str(tmp_path)), f"zip://a.png::{tmp_path}/a.zip", r"the archive .*a.zip'.* cannot be read"
        )


def test_a_member_that_grows_without_end_is_not_unpacked(tmp_path, monkeypatch):
    for module in ("pictures", "dataset_pictures"):
        monkeypatch.setattr(f"hf_aegis.data.{module}.MAX_BYTES", 10_000)
    (tmp_path / "a.zip").write_bytes(zipped(a=png(), b=bytes(10**7)))
    pictures = DatasetPictures(str(tmp_path))
    assert size(pictures, f"zip://a.png::{tmp_path}/a.zip") == (7, 5)
    refused(pictures, f"zip://b.png::{tmp_path}/a.zip", "file has 10001 bytes, expected at most 10000")
    refused_bytes = {"bytes": bytes(20_000), "path": None}
    with pytest.raises(ValueError, match="file has 20000 bytes, expected at most 10000"):
        pictures.open(refused_bytes)


@pytest.fixture
def published(hub, tmp_path):
    """A set of two pictures on the Hub, one of them in an archive, and a set of somebody else's."""
    for name in ("org/name", "org/other"):
        HfApi().create_repo(name, repo_type="dataset")
        folder = tmp_path / name
        folder.mkdir(parents=True)
        SMALL.save(folder / "a.png")
        (folder / "a.zip").write_bytes(zipped(b=png()))
        row = {"file_name": "a.png", "question": "what?", "answer": "red"}
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "README.md").write_text(
            "---\nconfigs:\n- {config_name: default, data_files: [a.png, metadata.jsonl]}\n---\n"
        )
        HfApi().upload_folder(repo_id=name, folder_path=folder, repo_type="dataset")
    return hub


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_of_a_set_on_the_hub_are_found(datasets, published, streaming):
    options = {"streaming": True, "max_samples": 1} if streaming else {}
    (sample,) = load_vqa("org/name", "train", **options)
    assert (sample.image.size, sample.question) == ((7, 5), "what?")


def test_addresses_of_a_stream_lead_into_its_own_repository(datasets, published, secret):
    pictures, own = DatasetPictures("org/name"), "hf://datasets/org/name@main"
    commit = published.repo("org/name", "dataset").branches["main"]
    for address in (f"{own}/a.png", f"zip://b.png::{own}/a.zip", f"hf://datasets/org/name@{commit}/a.png"):
        assert size(pictures, address) == (7, 5)
    before = len(published.requests)
    for address in (
        f"{secret}::{own}/a.png",
        f"file://{secret}::{own}/a.png",
        f"{published.url}/datasets/org/other/resolve/main/a.png::{own}/a.png",
        f"{published.url}/datasets/org/other/resolve/main/a.png",
        f"hf://datasets/org/other@main/a.png::{own}/a.zip",
        "hf://datasets/org/other@main/a.png",
        "hf://datasets/org/name2@main/a.png",
        "zip://b.png::hf://datasets/org/other@main/a.zip",
        f"zip://b.png::zip://a.zip::{own}/a.zip",
        f"zip://a.png::{secret.parent}/secret.zip",
        f"zip://b.png::{own}/a.zip::{secret.parent}/secret.zip",
        f"simplecache::{own}/a.png",
        f"{own}/../../../org/other/resolve/main/a.png",
        f"{own}/%2e%2e/a.png",
        "hf://datasets/org/name@..%2Fother/a.png",
    ):
        refused(pictures, address)
    assert published.requests[before:] == []


def test_files_of_other_sets_in_the_cache_are_not_this_set_s(published, secret):
    own, other = (Path(hf_hub_download(name, "a.png", repo_type="dataset")) for name in ("org/name", "org/other"))
    archive = hf_hub_download("org/name", "a.zip", repo_type="dataset")
    pictures = DatasetPictures("org/name")
    assert own.is_symlink()
    assert size(pictures, own) == (7, 5)
    assert size(pictures, f"zip://b.png::{archive}") == (7, 5)
    refused(pictures, other)
    refused(pictures, f"{own.parents[3]}/datasets--org--other/snapshots/{other.parent.name}/a.png")
    (own.parent / "link.png").symlink_to(secret)
    refused(pictures, own.parent / "link.png")
