"""``pearl-ray collect-env``: what a bug report needs. Reads versions, devices, the state of Ray; shows no secrets."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import click

import pearl_ray
from pearl_ray import env
from pearl_ray.commands.console import figures, output_console
from pearl_ray.commands.options import debug_option, option

PACKAGES = (
    "torch",
    "ray",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "numpy",
    "triton",
    "flash-attn",
    "msgspec",
    "pyzmq",
    "click",
    "rich",
    "fastapi",
    "uvicorn",
)
GIB = 2**30


@click.command("collect-env")
@option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@debug_option()
def collect_env(as_json: bool) -> None:
    """Print versions, devices, memory and the state of Ray, for a bug report. Shows no tokens, keys or host names."""
    found = collect()
    if as_json:
        click.echo(json.dumps(found))
    else:
        output_console().print(figures("pearl-ray environment", list(found.items())))


def collect() -> dict[str, str]:
    """Everything, in the order shown."""
    found = {
        "pearl-ray": pearl_ray.__version__,
        "python": f"{sys.version.split()[0]} ({platform.python_implementation()})",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    return found | _versions() | _devices() | _memory() | _ray() | _cache()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _devices() -> dict[str, str]:
    import torch

    found = {"torch CUDA": torch.version.cuda or "none (CPU build)", "torch threads": str(torch.get_num_threads())}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            found[f"GPU {i}"] = f"{device.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        found["GPUs"] = "none that torch can use"
    found["NVIDIA driver"] = _driver()
    found["CUDA_VISIBLE_DEVICES"] = env.cuda_visible_devices() or "not set"
    return found


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "nvidia-smi does not answer"
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else "nvidia-smi fails"


def _memory() -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    shared = Path("/dev/shm")
    found = {
        "CPUs": f"{psutil.cpu_count(logical=True)}, {len(psutil.Process().cpu_affinity())} usable",
        "memory": f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available",
    }
    if shared.is_dir():
        disk = shutil.disk_usage(shared)
        found["/dev/shm"] = f"{disk.free / GIB:.1f} of {disk.total / GIB:.1f} GiB free"
    return found


def _ray() -> dict[str, str]:
    """Whether a Ray runs here that ``serve`` would join; found without joining or starting one."""
    from ray._private.services import find_gcs_addresses

    running = sorted(find_gcs_addresses())
    return {
        "Ray on this host": f"{len(running)} running" if running else "not running",
        "RAY_ADDRESS": "set" if env.ray_address() else "not set",
        "RAY_AUTH_MODE": env.ray_auth_mode() or "not set",
        "Ray auth token": "present" if env.has_ray_auth_token() else "none",
    }


def _cache() -> dict[str, str]:
    where = env.cache_dir()
    if not where.is_dir():
        return {"cache": f"{where} (empty)"}
    size = sum(f.stat().st_size for f in where.rglob("*") if f.is_file())
    return {"cache": f"{where}, {size / 2**20:.0f} MiB"}
