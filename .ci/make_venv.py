"""Makes .venv and installs pearl-ray into it, editable. A usable torch at hand is used, not replaced.

python3 .ci/make_venv.py DIRECTORY EXTRA[,EXTRA…]
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

MINIMUM_TORCH = (2, 9)
PROBE = "import torch; print(torch.__version__)"


def torch_version(python: str) -> str | None:
    """The version of the torch that ``python`` imports, if it is new enough; else None."""
    found = subprocess.run([python, "-c", PROBE], capture_output=True, text=True)
    version = found.stdout.strip()
    if found.returncode or not version:
        return None
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    return version if numbers >= MINIMUM_TORCH else None


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - an older one may well run this file
        sys.exit(
            f"pearl-ray needs Python 3.11 or 3.12, this is {sys.version.split()[0]}; use: make PYTHON=python3.12 …"
        )
    root = Path(__file__).resolve().parent.parent
    directory, extras = Path(sys.argv[1]).resolve(), sys.argv[2]
    has_pip = importlib.util.find_spec("ensurepip") is not None
    if not has_pip and importlib.util.find_spec("pip") is None:
        sys.exit("this Python has neither ensurepip nor pip; install them (Debian, Ubuntu: apt install python3-venv)")
    torch = torch_version(sys.executable)
    builder = venv.EnvBuilder(system_site_packages=torch is not None, clear=True, symlinks=True, with_pip=has_pip)
    builder.create(directory)
    python = str(directory / "bin" / "python")
    if torch is not None and torch_version(python) is None:  # we run in a virtual environment: look into that one too
        at = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        )
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (Path(at.strip()) / "outer_environment.pth").write_text("\n".join(sorted(paths)) + "\n", "utf-8")
        torch = torch_version(python)
    lines = (root / "constraints.txt").read_text("utf-8").splitlines()
    if torch is not None:
        lines = [f"torch=={torch}" if line.startswith("torch==") else line for line in lines]
        print(f"using the torch {torch} that is installed")
    constraints = directory / "constraints.txt"
    constraints.write_text("\n".join(lines) + "\n", "utf-8")
    pip = [python, "-m", "pip"] if has_pip else [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--disable-pip-version-check", "--no-input", "-q", "-c", str(constraints)]
    subprocess.run([*install, "-e", f"{root}[{extras}]"], check=True)
    if "dev" in extras.split(",") and not (directory / "bin" / "ruff").exists():
        # One that the outer environment has counts as installed, but its program can't be found from here.
        subprocess.run([*install, "--ignore-installed", "--no-deps", "ruff"], check=True)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as failed:
        sys.exit(failed.returncode)  # pip has said why
