"""Download one distribution file with pip, without building it: ``python _pip_fetch.py NAME FILE TARGET``.

``pip download`` asks a source package for its metadata, which runs its setup.py and needs its build tools: it
may fail on a package of 2008 and in an environment without setuptools. Only the file is wanted here, so pip's
own finder and session are used: the user's index, mirrors, proxies, certificates and find-links apply.

Runs in a process of its own, because importing pip changes logging and warning filters.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def with_finder(name: str, file: str, target: Path) -> None:
    """Stream `file` of project `name` to `target` through pip's finder and session."""
    from pip._internal.commands import create_command

    command = create_command("download")
    options, _ = command.parse_args(
        [name, "--no-deps", "--quiet", "--no-binary=:none:", "--only-binary=:none:"]
    )
    with command.main_context():
        session = command._build_session(options, retries=2)  # type: ignore[attr-defined]
        finder = command._build_package_finder(options, session)  # type: ignore[attr-defined]
        links = [c.link for c in finder.find_all_candidates(name) if c.link.filename == file]
        if not links:
            sys.exit(f"pip found no {file} in the package index")
        reply = session.get(
            links[0].url_without_fragment, stream=True, headers={"Accept-Encoding": "identity"}
        )
        reply.raise_for_status()
        with target.open("wb") as out:
            for chunk in reply.iter_content(1 << 18):
                out.write(chunk)


def with_command(name: str, file: str, target: Path) -> None:
    """The documented way, for a pip whose inside has changed; enough for wheels."""
    version = file.removesuffix(".tar.gz").split("-")[1]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*command, f"{name}=={version}"], check=True)
        (Path(folder) / file).replace(target)


if __name__ == "__main__":
    wanted = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    try:
        with_finder(*wanted)
    except (ImportError, AttributeError, TypeError) as changed:
        if "'pip'" in str(changed):
            sys.exit("pip is not installed in this environment (try: python -m ensurepip)")
        with_command(*wanted)
    except Exception as failed:  # pip's own errors: one line says more than its traceback
        sys.exit(f"{type(failed).__name__}: {failed}")
