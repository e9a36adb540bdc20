import io
import logging
import signal
import sys
import threading

import pytest
from rich.console import Console

from hone.launch.observe import live_display
from hone.launch.observe.display import Display, make_display
from hone.launch.observe.frame import Canvas, frame
from hone.launch.observe.live_display import LiveDisplay
from hone.launch.observe.plain_display import PlainDisplay
from hone.launch.observe.progress import FAILED, READY, Progress, RunInfo
from hone.launch.observe.summary import Summary
from tests.launch.observe.demo import step_metrics

HOSTILE = "[red]x[/red]\x1b[31m\x1b]8;;http://e\x1b\\\x1b]52;c;aGk=\x07\x00\x9b\u202e"
SHOWN = "[red]x[/red]\\x1b[31m\\x1b]8;;http://e\\x1b\\\\x1b]52;c;aGk=\\x07\\x00\\x9b\\u202e"
INFO = RunInfo(verb="ppo", model="tiny", data="arithmetic", directory="runs/ppo-x", total_steps=12)
SUMMARY = Summary(outcome="finished", elapsed_s=61.0, peak_memory_gb=3.25, model="runs/ppo-x/model", next_commands=("uv run launch grpo",))


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def an_ordinary_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")


def terminal(width=80, height=24):
    return Console(
        file=Terminal(), force_terminal=True, width=width, height=height, legacy_windows=False, color_system="truecolor", highlight=False
    )


def pipe():
    return Console(file=io.StringIO(), width=80, highlight=False)


def play(display, steps=12):
    for step in range(1, steps + 1):
        display.step(step_metrics(step, 12, 2.0))


def picture(progress, *, width=80, height=24, encoding="utf-8", info=INFO):
    return [line.plain for line in frame(info, progress.view(), Canvas(width=width, height=height, encoding=encoding))]


@pytest.fixture
def trained():
    progress = Progress(total_steps=12, clock=Clock())
    play(progress, steps=6)
    return progress


def test_the_display_is_chosen_by_where_it_goes(monkeypatch):
    monkeypatch.delenv("TERM", raising=False)
    assert isinstance(make_display(terminal(), INFO), LiveDisplay)
    assert isinstance(make_display(pipe(), INFO), PlainDisplay)
    # FORCE_COLOR makes Rich take a pipe for a terminal; the cursor must not be moved there.
    assert isinstance(make_display(Console(file=io.StringIO(), force_terminal=True), INFO), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(terminal(), INFO), PlainDisplay)


def test_both_are_displays():
    assert isinstance(make_display(terminal(), INFO), Display) and isinstance(make_display(pipe(), INFO), Display)


def test_before_the_first_step_it_shows_what_is_being_started_and_for_how_long():
    clock = Clock()
    progress = Progress(total_steps=12, clock=clock)
    progress.startup("learner", "loading weights")
    clock.now = 3.0
    progress.startup("learner", READY)
    progress.startup("engine", "importing vllm")
    clock.now = 7.0
    lines = picture(progress)
    assert any("learner" in line and "3.0 s" in line and READY in line and "\u2713" in line for line in lines)
    assert any("engine" in line and "4.0 s" in line and "importing vllm" in line for line in lines)
    progress.startup("engine", FAILED)
    assert any("\u2717" in line and FAILED in line for line in picture(progress))
    progress.phase("generation", None)
    clock.now = 9.0
    assert any("step 1" in line and "generation 2.0 s" in line for line in picture(progress))


def test_from_the_first_step_on_it_shows_how_it_goes(trained):
    text = "\n".join(picture(trained))
    for part in (
        "6/12",
        "12 s left",
        "\u2192",
        "mean 2.1e-06 nats",
        "KL",
        "entropy",
        "5.41 tokens",
        "truncated 0.4 %",
        "8,516 tok/s",
        "3.40 GB",
    ):
        assert part in text, part
    shares = {line.split()[0]: line for line in text.splitlines() if " % " in line and "\u2501" in line}
    assert list(shares) == ["generation", "make_experience", "ppo_train", "broadcast"]
    assert "46 %" in shares["generation"]
    assert shares["generation"].count("\u2501") == 11 * shares["broadcast"].count("\u2501") + 3


def test_a_value_outside_its_healthy_range_is_marked(trained):
    trained.step({"step": 7, "mismatch/logp_abs_diff_mean": 0.5, "train/kl": 0.01})
    text = "\n".join(picture(trained))
    assert "mean 0.500 nats !" in text and "KL 0.010 nats\n" in text + "\n"
    assert "worst step 0.500" in text


@pytest.mark.parametrize(("width", "height"), [(120, 40), (80, 24), (60, 16), (46, 12), (20, 5), (8, 2), (1, 1)])
def test_it_fits_every_terminal_and_keeps_what_matters(trained, width, height):
    lines = picture(trained, width=width, height=height)
    assert len(lines) <= max(height - 1, 1)
    assert all(len(line) <= width for line in lines)
    if width >= 20 and height >= 5:
        assert any("hone" in line for line in lines) and any("6/12" in line for line in lines) and any("reward" in line for line in lines)


def test_wide_characters_are_counted_as_two_cells():
    info = RunInfo(verb="ppo", model="\u4f60" * 100, data="d", directory="r", total_steps=1)
    lines = frame(info, Progress(total_steps=1, clock=Clock()).view(), Canvas(width=40, height=24, encoding="utf-8"))
    assert max(line.cell_len for line in lines) <= 40


def test_an_ascii_terminal_gets_ascii(trained):
    info = RunInfo(verb="ppo", model="\u4f60", data="d", directory="r", total_steps=12)
    text = "\n".join(picture(trained, encoding="ascii", info=info))
    assert text.isascii() and "\\u4f60" in text and "6/12" in text


def test_every_part_of_the_picture_is_inert():
    info = RunInfo(verb=HOSTILE, model=HOSTILE, data=HOSTILE, directory=HOSTILE, total_steps=12)
    progress = Progress(total_steps=12, clock=Clock())
    progress.startup(HOSTILE, HOSTILE)
    progress.phase(HOSTILE, None)
    starting = picture(progress, width=300, info=info)
    progress.step(step_metrics(1, 12, 2.0))
    for line in (*starting, *picture(progress, width=300, info=info)):
        assert not any(ord(character) < 32 or ord(character) in (0x9B, 0x202E) for character in line)
    assert sum(line.count(SHOWN) for line in starting) == 7  # verb, model, data, directory, role, its state, phase


@pytest.mark.parametrize("console", [terminal, pipe])
def test_foreign_text_reaches_no_terminal_raw(console, capsys):
    console = console(width=200, height=40) if console is terminal else console()
    info = RunInfo(verb="ppo", model=HOSTILE, data=HOSTILE, directory=HOSTILE, total_steps=12)
    with make_display(console, info, clock=Clock()) as display:
        display.startup(HOSTILE, HOSTILE)
        display.note(f"{HOSTILE}\nsecond line")
        print(HOSTILE)
        print(HOSTILE, file=sys.stderr)
        display.phase(HOSTILE, None)
        play(display, 1)
        display.done(Summary(outcome="failed", elapsed_s=1.0, peak_memory_gb=1.0, model=HOSTILE, error=HOSTILE, next_commands=(HOSTILE,)))
    text = console.file.getvalue()
    assert SHOWN in text and "second line" in text
    for raw in ("\x1b]", "\x00", "\x07", "\x9b", "\u202e", "\x1b[31mx", "]8;;http://e\x1b"):
        assert raw not in text
    assert capsys.readouterr() == ("", "")  # nothing went past the gate
    # Our own styles are SGR sequences and cursor moves, nothing else; HOSTILE's "red" came through as letters.
    assert text.count("[red]x[/red]\\x1b[31m") >= 5


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_cursor_and_the_streams_come_back_whatever_ends_the_run(error):
    console, before = terminal(), (sys.stdout, sys.stderr)
    with pytest.raises(error), make_display(console, INFO) as display:
        assert sys.stdout is not before[0]
        play(display, 2)
        raise error
    text = console.file.getvalue()
    assert (sys.stdout, sys.stderr) == before
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_a_start_that_fails_leaves_no_picture_behind(monkeypatch):
    def broken(show):
        raise OSError("planted")

    monkeypatch.setattr(live_display, "gated", broken)
    console = terminal()
    with pytest.raises(OSError, match="planted"), make_display(console, INFO):
        pass
    assert console.file.getvalue().rindex("\x1b[?25h") > console.file.getvalue().rindex("\x1b[?25l")
    assert all(type(thread).__name__ != "_RefreshThread" or thread.done.is_set() for thread in threading.enumerate())


def test_a_note_from_a_signal_handler_in_the_middle_of_a_print_does_not_hang():
    for console in (terminal(), pipe()):
        with make_display(console, INFO) as display:
            before, raised = signal.signal(signal.SIGUSR1, lambda *_: display.note("stopping")), console.file.write

            def write(text, raised=raised, file=console.file):
                file.write = raised
                signal.raise_signal(signal.SIGUSR1)
                return raised(text)

            console.file.write = write
            display.note("first")
            signal.signal(signal.SIGUSR1, before)
        assert "stopping" in console.file.getvalue() and "first" in console.file.getvalue()


def test_the_end_says_what_came_of_it_and_what_to_try_next():
    for console in (terminal(), pipe()):
        with make_display(console, INFO) as display:
            play(display)
            display.done(SUMMARY)
        tail = console.file.getvalue()[-1500:]
        for part in ("finished", "12 steps in 1m01s", "0.337", "0.893", "3.25 GB", "runs/ppo-x/model", "uv run launch grpo"):
            assert part in tail, part


def test_a_failure_ends_with_its_error():
    console = pipe()
    with make_display(console, INFO) as display:
        play(display, 3)
        display.done(Summary(outcome="failed", elapsed_s=5.0, peak_memory_gb=1.0, error="engine 0 died\nlook into logs/"))
    assert "failed  ppo, 3 of 12 steps in 5.0 s" in console.file.getvalue()
    assert "  engine 0 died\n  look into logs/\n" in console.file.getvalue()


def test_plain_is_one_tidy_line_a_step_without_escapes():
    console = pipe()
    with make_display(console, INFO, clock=Clock()) as display:
        display.startup("learner", "loading weights")
        display.startup("learner", READY)
        play(display, 2)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "hone ppo: model tiny, data arithmetic, 12 steps, run runs/ppo-x"
    assert lines[1:3] == ["starting learner: loading weights", "learner ready after 0 ms"]
    assert lines[4].startswith("step  2/12  reward 0.360  gap 2.1e-06  KL 0.004  entropy 1.20  length 5.32  truncated 0.4 %  8,438 tok/s")
    assert lines[4].endswith("2.0 s  20 s left") and len(lines) == 5
    assert "\x1b" not in console.file.getvalue()


def test_plain_gives_a_sign_of_life_after_two_seconds_and_then_seldom():
    clock = Clock()
    display = PlainDisplay(pipe(), INFO, clock=clock)
    display.startup("engine", "importing vllm")
    said = {}
    for clock.now in (1.9, 2.0, 5.0, 10.0, 29.0, 30.0, 60.0, 119.0, 120.0, 180.0):
        said[clock.now] = display.signs()
    assert [now for now, lines in said.items() if lines] == [2.0, 10.0, 30.0, 60.0, 120.0, 180.0]
    assert said[2.0] == ["  still starting engine: importing vllm (2.0 s)"]
    display.startup("engine", READY)
    clock.now = 900.0
    assert display.signs() == []


def test_plain_mentions_a_phase_only_when_it_takes_longer_than_it_used_to():
    clock = Clock()
    display = PlainDisplay(pipe(), INFO, clock=clock)
    display.phase("generation", None)
    clock.now = 3.0
    assert display.signs() == ["  step 1: generation still running (3.0 s)"]
    display.phase("generation", 5.0)
    display.phase("generation", None)
    clock.now += 9.9
    assert display.signs() == []
    clock.now += 0.1  # twice the usual 5 s
    assert display.signs() == ["  step 1: generation still running (10 s)"]


def test_after_the_first_step_a_restart_is_told_as_a_note():
    console = terminal()
    with make_display(console, INFO) as display:
        play(display, 1)
        display.startup("engine", "restarting")
    assert "engine: restarting" in console.file.getvalue()


def test_prints_and_late_handlers_pass_the_gate_and_a_child_gets_the_real_stream():
    console = terminal()
    with make_display(console, INFO):
        print("half", end="")
        print("progress 1\rprogress 2")
        handler = logging.StreamHandler(sys.stderr)
        assert sys.stderr.fileno() == sys.stderr.rich_proxied_file.fileno()
        assert sys.stderr.encoding == sys.stderr.rich_proxied_file.encoding
        print("unended", end="")
    text = console.file.getvalue()
    assert "progress 2" in text and "progress 1" not in text and "unended" in text
    handler.emit(logging.LogRecord("x", 30, "f", 1, "late", (), None))  # a handler that outlives the block still works
    assert "late" in console.file.getvalue()


def test_the_eta_is_the_mean_of_recent_steps_times_those_left(trained):
    assert trained.view().eta_s == pytest.approx(6 * 2.0)
    for step in range(7, 13):
        trained.step({"step": step, "timing/step_total": 4.0})
    assert trained.view().eta_s == 0.0


def test_the_largest_gap_is_nan_once_it_was_nan():
    progress = Progress(total_steps=3, clock=Clock())
    for step, gap in enumerate((0.1, float("nan"), 0.2), 1):
        progress.step({"step": step, "mismatch/logp_abs_diff_mean": gap})
    assert str(progress.view().largest_gap) == "nan"
