"""A wheel and an sdist that work, made of what git knows of this folder.

    python tests/release.py                   # only whether they do
    python tests/release.py dist              # and leave both in a folder
    python tests/release.py --build dist      # without trying the wheel

The wheel is built twice, of the sources and of the sdist. Both must hold the same files: every
module, and what the modules read. It is installed into an empty environment, with the
versions of constraints.txt, where release_use.py goes from a model to a page of heads.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent


def known_files(root: Path = ROOT) -> list[str]:
    """Return the files that git knows or would add, but for those whose path begins with a dot.

    Where there is no git, or no repository, all files that .gitignore does not name.
    """
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"]
    try:
        done = subprocess.run(
            [*command, "--exclude-standard"], cwd=root, check=True, capture_output=True, text=True
        )
        names = set(done.stdout.split("\0")) - {""}
    except (OSError, subprocess.CalledProcessError):
        names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
        ignored = (root / ".gitignore").read_text("utf-8").split()
        endings = tuple(line.strip("/*") for line in ignored)
        names = {n for n in names if not any(p.endswith(endings) for p in n.split("/")[:-1])}
    return sorted(name for name in names if name[0] != "." and (root / name).exists())


def package_files(known: list[str]) -> set[str]:
    """Return what of them a wheel must hold: all files of rooms, and the modules beside them."""
    rooms = {str(PurePosixPath(name).parent) for name in known if name.endswith("/__init__.py")}
    return {
        f"lorsa/{name}"
        for name in known
        if ("/" not in name and name.endswith((".py", ".pyi", "py.typed")))
        or (name.split("/")[0] in rooms and not name.endswith(".md"))
    }


def wheel_files(wheel: Path) -> set[str]:
    """Return the files of a wheel, but for those that say what it is."""
    names = zipfile.ZipFile(wheel).namelist()
    return {name for name in names if ".dist-info/" not in name}


def sdist_files(sdist: Path) -> set[str]:
    """Return the files of an sdist, relative to its folder."""
    with tarfile.open(sdist) as archive:
        members = [member.name for member in archive.getmembers() if member.isfile()]
    return {name.split("/", 1)[1] for name in members}


def metadata(wheel: Path) -> Message:
    """Return what a wheel says of itself."""
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return Parser().parsestr(archive.read(name).decode("utf-8"))


def same(what: str, found: set[str], expected: set[str]) -> None:
    """Stop with the names that are missing or too many."""
    if found != expected:
        missing, beyond = sorted(expected - found), sorted(found - expected)
        sys.exit(f"error: {what}: missing {missing}, too many {beyond}")


def build(source: Path, dist: Path, of_sources: Path) -> tuple[Path, Path]:
    """Build sdist and wheel, compare them with the sources, and return wheel and sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation"]
    for words in (["--outdir", dist], ["--wheel", "--outdir", of_sources]):
        run([*command, *words, source])
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    (direct,) = of_sources.glob("*.whl")
    known = known_files()
    same("the wheel of the sources", wheel_files(direct), package_files(known))
    same("the wheel of the sdist", wheel_files(wheel), package_files(known))
    same("the sdist", sdist_files(sdist) & set(known), set(known))
    return wheel, sdist


def check_metadata(wheel: Path) -> None:
    """Compare what a wheel says of itself with pyproject.toml and the changelog."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    facts = metadata(wheel)
    needs = [text for text in facts.get_all("Requires-Dist", []) if "extra ==" not in text]
    same(
        "its dependencies",
        {text.replace('"', "'").replace(" ", "") for text in needs},
        {text.replace(" ", "") for text in project["dependencies"]},
    )
    groups = set(project["optional-dependencies"])
    same("its extras", set(facts.get_all("Provides-Extra", [])), groups)
    for name in ("Summary", "License-Expression", "Requires-Python", "Description-Content-Type"):
        if not facts[name]:
            sys.exit(f"error: the wheel says nothing of {name}")
    if f"## [{facts['Version']}]" not in (ROOT / "CHANGELOG.md").read_text("utf-8"):
        sys.exit(f"error: CHANGELOG.md has no section of version {facts['Version']}")


def run(command: list[object], cwd: Path | None = None) -> None:
    """Run a command; its output is shown only if it fails."""
    left_out = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    env = {name: value for name, value in os.environ.items() if name not in left_out}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout)
        sys.exit(f"error: exit code {done.returncode} of {' '.join(str(w) for w in command)}")


def try_out(wheel: Path, folder: Path) -> None:
    """Install a wheel into an empty environment and use it from an empty folder."""
    run([sys.executable, "-m", "venv", folder / "venv"])
    python = folder / "venv/bin/python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile"]  # what is used will be
    run([*install, "--constraint", ROOT / "constraints.txt", wheel])
    run([python, "-m", "pip", "check"])
    empty = folder / "empty"
    empty.mkdir()
    run([python, ROOT / "tests/release_use.py"], cwd=empty)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, help="where to leave both")
    parser.add_argument("--build", action="store_true", help="do not try the wheel")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for file in known_files():  # nothing that lies about gets into the wheel
            copy = work / "source" / file
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, copy)
        wheel, sdist = build(work / "source", work / "dist", work / "of-sources")
        check_metadata(wheel)
        if not asked.build:
            try_out(wheel, work)
        for made in (wheel, sdist):
            print(f"{made.name}: {made.stat().st_size / 1e3:.0f} kB")
            if asked.folder is not None:
                asked.folder.mkdir(parents=True, exist_ok=True)
                shutil.copy2(made, asked.folder)


if __name__ == "__main__":
    main()
