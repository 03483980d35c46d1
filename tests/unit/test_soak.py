"""What the soak judges: memory that grows, texts that are mixed or lost. No engine, no clock."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.soak_cases import PROMPTS, Case, make_cases
from benchmarks.soak_direct import params_of
from benchmarks.soak_load import Piece, alone, ask, is_right
from benchmarks.soak_memory import Memory, children_of, device_reader, growth_of
from pearl_ray.serving.schema import CompletionRequest

SECONDS = 300.0


def series(mib_at):
    return [(float(second), mib_at(second)) for second in range(int(SECONDS) + 1)]


def growth(mib_at, *, is_device=False):
    return growth_of("it", series(mib_at), SECONDS, is_device=is_device)


def test_what_fills_up_in_the_first_minute_and_stays_is_no_growth():
    assert not growth(lambda second: 100 + 5 * min(second, 50)).is_too_much


def test_a_process_that_leaks_a_little_every_second_is_told():
    found = growth(lambda second: 300 + 0.25 * second)
    assert (found.start, found.before, found.allowed) == (300, 322.5, 32.25)
    assert found.after == pytest.approx(373.1, abs=0.1)
    assert found.is_too_much


def test_a_process_may_grow_by_a_tenth():
    assert not growth(lambda second: 300 + (29 if second > 150 else 0)).is_too_much
    assert growth(lambda second: 300 + (31 if second > 150 else 0)).is_too_much


def test_a_device_may_grow_by_64_mib_however_much_it_holds():
    assert not growth(lambda second: 70_000 + (64 if second > 150 else 0), is_device=True).is_too_much
    assert growth(lambda second: 70_000 + (65 if second > 150 else 0), is_device=True).is_too_much


def test_a_peak_that_is_over_at_the_end_is_no_growth():
    assert not growth(lambda second: 900 if 150 < second < 160 else 300).is_too_much


def test_samples_that_are_far_apart_are_judged_too():
    found = growth_of("it", [(0.0, 1.0), (50.0, 2.0), (130.0, 3.0), (260.0, 9.0)], SECONDS, is_device=False)
    assert (found.before, found.after) == (3.0, 9.0)


@pytest.fixture
def growing():
    """A process that takes 64 MiB more whenever it reads a line."""
    code = "import sys\nkept = []\nprint(flush=True)\nfor _ in sys.stdin: kept.append(b'x' * 2**26); print(flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None and child.stdout is not None

        def grow():
            child.stdin.write(b"\n")
            child.stdin.flush()
            child.stdout.readline()

        child.stdout.readline()
        yield child.pid, grow
        child.stdin.close()


def test_a_real_process_that_keeps_what_it_takes_is_named_and_one_that_does_not_is_not(growing, capsys):
    pid, grow = growing
    memory = Memory({"leaking": pid, "level": os.getpid()})
    for second in range(0, 301, 10):
        if second == 200:
            grow()
        memory.sample(float(second))
    (told,) = memory.report(SECONDS)
    assert told.startswith("memory: leaking grew from ")
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]] == ["leaking", "level"]


def test_a_process_that_is_only_shown_is_not_judged(growing, capsys):
    pid, grow = growing
    memory = Memory({}, shown={"leaking": pid})
    for second in range(0, 301, 10):
        if second == 200:
            grow()
        memory.sample(float(second))
    assert memory.report(SECONDS) == []
    assert "leaking" in capsys.readouterr().out


def test_children_are_found_by_their_programs_name(growing):
    pid, _ = growing
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    assert name in children_of(os.getpid(), [name])
    assert children_of(pid, ["raylet"]) == {}


def test_a_short_run_is_printed_and_not_judged(growing, capsys):
    pid, grow = growing
    memory = Memory({"leaking": pid})
    for second in range(40):
        if second == 30:
            grow()
        memory.sample(float(second))
    assert memory.report(40.0) == []
    assert "not judged" in capsys.readouterr().out


def test_without_nvml_the_device_is_read_by_nvidia_smi(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$@" > "$0.asked"\necho " 1234"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert device_reader("3e0b")() == 1234.0
    asked = (tmp_path / "nvidia-smi.asked").read_text().split()
    assert asked == ["--id=GPU-3e0b", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]


def test_a_text_that_was_hung_up_on_must_be_the_beginning_of_the_right_one():
    assert is_right(["abc", "x"], ["abc", "x"], True)
    assert not is_right(["abc", ""], ["abc", "x"], True)
    assert is_right(["ab", ""], ["abc", "x"], False)
    assert not is_right(["ac", ""], ["abc", "x"], False)


class Scripted:
    """A service that answers from a list, an answer per request: its pieces, and after them perhaps an error."""

    errors = (ConnectionError,)

    def __init__(self, *answers):
        self.answers = list(answers)
        self.closed = 0

    async def stream(self, case):
        try:
            for piece in self.answers.pop(0):
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            self.closed += 1


GREETING = [Piece(0, "hel", 3), Piece(0, "lo", 2, "stop")]
CASE = Case(kind="greedy", prompt="say it")


def test_pieces_of_several_answers_are_put_together():
    service = Scripted([Piece(1, "b", 1), Piece(0, "a", 1, "length"), Piece(1, "c", 1, "stop")])
    case = Case(kind="two answers", prompt="say it", fields={"n": 2})
    assert asyncio.run(ask(service, case)) == (["a", "bc"], 3, True)


def test_hanging_up_closes_the_stream_behind_so_many_pieces():
    service = Scripted(GREETING)
    assert asyncio.run(ask(service, CASE, num_pieces=1)) == (["hel"], 3, False)
    assert service.closed == 1


@pytest.mark.parametrize(
    "pieces", [GREETING[:1], [Piece(0, "x", 1, "abort")], [*GREETING, Piece(0, "more", 1)]], ids=["cut", "abort", "on"]
)
def test_a_stream_that_is_cut_aborted_or_goes_on_is_lost(pieces):
    with pytest.raises(ValueError, match="end"):
        asyncio.run(ask(Scripted(pieces), CASE))


def test_requests_that_fail_or_do_not_repeat_their_text_are_told_and_left_out():
    rejection = Case(kind="rejection", prompt="c", is_repeatable=False)
    cases = [CASE, Case(kind="seeded", prompt="b"), rejection, Case(kind="stop", prompt="d")]
    other = [Piece(0, "something else", 5, "stop")]
    service = Scripted(GREETING, GREETING, GREETING, [ConnectionError("gone")], GREETING, other, other, GREETING)
    failures = []
    answers = asyncio.run(alone(service, cases, failures))
    assert {case.kind: texts for case, texts in answers.items()} == {"greedy": ["hello"], "rejection": ["hello"]}
    assert [failure.split(":")[0] for failure in failures] == ["alone (stop)", "alone (seeded)"]


def test_every_request_is_one_that_the_engine_and_the_server_take():
    cases = make_cases([[5, 6, 7]], structured=True, fixed_window=False)
    for case in cases:
        body = CompletionRequest.model_validate({"prompt": case.prompt, **case.fields})
        params = params_of(case.fields)
        assert (body.n, body.seed, body.logprobs) == (params.n, params.seed, params.logprobs)
    assert {case.kind for case in cases if not case.is_repeatable} == {"rejection"}
    assert all(case.fields.get("temperature", 1.0) == 0 or "seed" in case.fields for case in cases)
    assert sum(case.is_plain for case in cases) == 4 * len(PROMPTS)
