"""Many streams at once for minutes, none lost, none mixed, nothing leaked: python -m benchmarks.soak

The tiny pair, or models of your own, on a Ray of its own: behind the real HTTP server, or with ``--direct`` through the
coordinator's handle, which needs none of the server's packages. Requests of every kind. Each stream's text must be that
of the same request sent alone; some clients hang up on the way, and at the end all of them at once, and their cache
blocks must come back. Between the second minute and the end no process may grow by more than a tenth, nor what is taken
of a GPU by more than 64 MiB. Exit status 1 if anything of this fails.

On one GPU: python -m benchmarks.soak --direct --device cuda --colocate --streams 64 --seconds 300
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.soak_cases import LONG_PROMPT_TOKENS, LONG_TOKENS, PROMPTS, Case, make_cases
from benchmarks.soak_direct import DirectService
from benchmarks.soak_load import Tally, soak
from benchmarks.soak_memory import Memory, children_of
from pearl_ray import env
from pearl_ray.client import Client
from pearl_ray.cluster.ray_session import open_session
from pearl_ray.config import PearlConfig
from pearl_ray.deployment import deploy
from pearl_ray.model.loading import model_path
from pearl_ray.model.tokenizer import Tokenizer, load_tokenizer
from pearl_ray.running import stop_deployment
from tests.tiny import JSON_PIECES, tiny_pair

NAME = "soak"
MAX_MODEL_LEN = 1024
BLOCKS_PER_STREAM = 4  # less than a long prompt takes: now and then somebody waits, or makes room
GPU_SIZES = {"hidden_size": 576, "head_dim": 64, "intermediate_size": 768}  # heads as wide as the kernels take
FIGURES = ("num_rounds_total", "num_preemptions_total", "acceptance_rate", "prefix_cache_hits", "recoveries_total")


def config(options: argparse.Namespace, target: str, draft: str) -> PearlConfig:
    """Room for all streams at once; on a GPU, texts that don't depend on their batch."""
    on_gpu = options.device == "cuda"
    return PearlConfig(
        target_model=target,
        draft_model=draft,
        dtype=options.dtype or ("bfloat16" if on_gpu else "auto" if options.target_model else "float64"),
        device=options.device,
        colocate=options.colocate,
        deterministic=on_gpu,
        attention_backend="triton" if on_gpu else "torch",
        num_speculative_tokens=options.num_speculative_tokens,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=options.streams,
        max_num_batched_tokens=max(8 * options.streams, 512),
        kv_cache_blocks=max(options.streams * BLOCKS_PER_STREAM, 128),
        round_timeout_s=60.0,
    )


def models(options: argparse.Namespace, folder: Path) -> tuple[str, str]:
    """Those asked for, else the tiny pair, which can spell JSON."""
    if options.target_model:
        return options.target_model, options.draft_model
    sizes: dict[str, Any] = GPU_SIZES if options.device == "cuda" else {}
    target, draft = tiny_pair(folder, vocab_size=128, pieces=JSON_PIECES, **sizes)
    return str(target), str(draft)


def cases_for(tokenizer: Tokenizer, options: argparse.Namespace) -> list[Case]:
    """All kinds of requests that can be had here."""
    structured = importlib.util.find_spec("llguidance") is not None
    if not structured:
        print("no llguidance here: no structured output is asked for", flush=True)
    story = tokenizer.encode(" ".join(PROMPTS) + ". ")
    repeated = story * (LONG_PROMPT_TOKENS // len(story) + 2)
    long_prompts = [repeated[start : start + LONG_PROMPT_TOKENS] for start in (0, 7, 31)]
    assert LONG_PROMPT_TOKENS + LONG_TOKENS <= MAX_MODEL_LEN
    fixed = options.num_speculative_tokens != "auto"
    return make_cases(long_prompts, structured=structured, fixed_window=fixed)


def places(status: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """The processes of a deployment by role, this one too, and the GPUs it has."""
    pids = {"this process": os.getpid(), "coordinator": status["coordinator_pid"]}
    for shard in status["shards"]:
        pids[f"{shard['role']} shard {shard['rank']}"] = shard["pid"]
    return pids, sorted({shard["key"]["gpu"] for shard in status["shards"]} - {None})


async def soak_directly(client: Client, cases: Sequence[Case], memory: Memory, wishes: Mapping[str, Any]) -> Tally:
    """Through the coordinator's handle."""
    return await soak(DirectService(client.coordinator), cases, memory, **wishes)


async def soak_over_http(url: str, cases: Sequence[Case], memory: Memory, wishes: Mapping[str, Any]) -> Tally:
    """Through the server."""
    from benchmarks.soak_http import HttpService  # the server's packages aren't everywhere

    async with HttpService(url) as service:
        return await soak(service, cases, memory, **wishes)


def run(options: argparse.Namespace, client: Client, tokenizer: Tokenizer) -> Tally:
    """The soak of a deployment that is up."""
    status: dict[str, Any] = client.status()
    print(
        f"{status['device']}, {status['dtype']}, bridge {(status['bridge'] or {}).get('transport')}, "
        f"{status['kv_cache_blocks']} blocks per model, {'direct' if options.direct else 'over HTTP'}",
        flush=True,
    )
    pids, gpus = places(status)
    wishes = {name: getattr(options, name) for name in ("seconds", "hang_up", "seed")} | {
        "num_streams": options.streams
    }
    cases = cases_for(tokenizer, options)
    rays = children_of(os.getpid(), ("gcs_server", "raylet"))  # they keep a bounded record of every call
    if options.direct:
        tally = asyncio.run(soak_directly(client, cases, Memory(pids, gpus, rays), wishes))
    else:
        from benchmarks.soak_http import start_server

        url, pids["server"] = start_server(NAME, tokenizer)
        tally = asyncio.run(soak_over_http(url, cases, Memory(pids, gpus, rays), wishes))
    stats = client.stats()
    print("\n" + ", ".join(f"{name} {stats[name]}" for name in FIGURES), flush=True)
    return tally


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--hang-up", type=float, default=0.05, help="part of the streams that is hung up on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--colocate", action="store_true", help="draft and target on one GPU")
    parser.add_argument("--direct", action="store_true", help="no HTTP server: through the coordinator's handle")
    parser.add_argument("--target-model", help="instead of the tiny pair; with --draft-model")
    parser.add_argument("--draft-model")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float64 of the tiny pair on CPU")
    parser.add_argument(
        "--num-speculative-tokens", type=lambda text: text if text == "auto" else int(text), default=4, metavar="N|auto"
    )
    options = parser.parse_args(arguments)
    if (options.target_model is None) != (options.draft_model is None):
        parser.error("--target-model and --draft-model go together")
    return options


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        target, draft = models(options, Path(folder))
        session = open_session("local", num_cpus=4)
        try:
            client = deploy(config(options, target, draft), NAME, detached=True)
            try:
                tally = run(options, client, load_tokenizer(model_path("target", target, str(env.cache_dir()))))
            finally:
                stop_deployment(NAME, timeout_s=30.0)
        finally:
            session.close()
    kinds = Counter(failure.split(":")[0] for failure in tally.failures)
    for failure in tally.failures[:10]:
        print(f"FAILED {failure}")
    print("FAILED: " + ", ".join(f"{kind} ({n})" for kind, n in kinds.items()) if kinds else "nothing lost or mixed")
    sys.exit(bool(kinds))


if __name__ == "__main__":
    main()
