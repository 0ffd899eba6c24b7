"""What is silenced, what is not, that loggers made meanwhile can be heard later, and the switches."""

import importlib
import io
import logging
import os
import re
import sys
import types

import pytest

from keras_convnext._terminal import Progress, markdown_table, say, silenced, table_lines

pytestmark = pytest.mark.once


def write_all(text):
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.write(f"{text} by Python\n")
        stream.flush()
        os.write(number, f"{text} by a library\n".encode())


@pytest.mark.parametrize("stdout", [False, True])
def test_only_what_is_asked_is_silent_and_only_meanwhile(capfd, stdout):
    with silenced(stdout=stdout):
        write_all("meanwhile")
    write_all("after")
    out, err = capfd.readouterr()
    assert err.splitlines() == ["after by Python", "after by a library"]
    assert ("meanwhile by Python" in out, "meanwhile by a library" in out) == (not stdout, not stdout)
    assert "after by Python" in out and "after by a library" in out


def test_a_logger_made_meanwhile_is_silent_then_and_heard_after(capfd):
    logger = logging.Logger("made meanwhile")
    with silenced():
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.warning("meanwhile")
        with silenced():  # and one in another
            logger.warning("deeper")
    logger.warning("after")
    assert capfd.readouterr().err == "after\n"


def test_exceptions_pass_and_end_the_silence(capfd):
    with pytest.raises(KeyError), silenced(stdout=True):
        raise KeyError("x")
    write_all("after")
    out, err = capfd.readouterr()
    assert "after by a library" in out and "after by a library" in err


# Progress and tables


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def loud(monkeypatch):
    monkeypatch.delenv(QUIET, raising=False)
    monkeypatch.setenv("COLUMNS", "100")


def run(stream, total, unit="images", seconds=1.0, count=20, step=10, **options):
    clock = Clock()
    with Progress("[a] title", total, unit, stream=stream, clock=clock, **options) as progress:
        for number in range(count):
            clock.now += seconds
            progress.show(step * (number + 1))
    return progress


def test_a_bar_shows_what_is_done_the_rate_and_the_time_left_and_is_removed(loud):
    stream = Terminal()
    assert run(stream, 400).rate == 10
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in re.split("[\r\n]+", stream.getvalue())]
    drawn = [line for line in lines if "title" in line]
    assert re.fullmatch(r"[━╸╺]{20} \[a\] title, 10/400 images\s*", drawn[0])
    assert re.fullmatch(r"[━╸╺]{20} \[a\] title, 200/400 images, 10 images/s, 0:00:20 left\s*", drawn[-1])
    assert max(map(len, drawn)) <= 100 and 20 <= len(drawn) <= 21
    assert lines[-1] == "" and stream.getvalue().endswith("\x1b[2K")  # the line is empty again
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l")  # and has a cursor


def test_a_killed_process_leaves_a_cursor(loud):
    stream = Terminal()
    progress = Progress("title", 10, stream=stream)
    progress.show(1)
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l")
    progress.close()


def test_the_rate_is_that_of_the_last_ten_seconds():
    clock = Clock()
    progress = Progress("title", None, is_wanted=False, clock=clock)
    clock.now += 60  # compilation
    for number in range(1, 31):
        progress.show(number if number <= 20 else 20 + 5 * (number - 20))
        assert progress.rate == (
            None if number == 1 else pytest.approx(1, rel=1e-6) if number <= 20 else progress.rate
        )
        clock.now += 1
    assert progress.rate == 5


def test_a_terminal_is_written_to_five_times_a_second(loud):
    stream = Terminal()
    run(stream, 10_000, seconds=0.001, count=10_000, step=1)
    assert 45 <= stream.getvalue().count("title") <= 52


def test_elsewhere_there_is_a_line_every_five_minutes_without_control_codes(loud):
    stream = io.StringIO()
    run(stream, 2_000_000_000, "MB", count=1000, step=1_000_000)
    assert stream.getvalue() == (
        "[a] title, 300/2,000 MB, 1.0 MB/s, 0:28:20 left\n"
        "[a] title, 600/2,000 MB, 1.0 MB/s, 0:23:20 left\n"
        "[a] title, 900/2,000 MB, 1.0 MB/s, 0:18:20 left\n"
    )
    stream = io.StringIO()
    run(stream, None, count=310)
    assert stream.getvalue() == "[a] title, 3,000 images, 10 images/s\n"


def test_a_notebook_gets_a_line_every_thirty_seconds(loud, monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    stream = io.StringIO()
    run(stream, 1000, count=100)
    assert [line.split(",")[1] for line in stream.getvalue().splitlines()] == [
        " 300/1",
        " 600/1",
        " 900/1",
    ]


def test_lines_that_stay_and_errors_stand_above_the_bar(loud, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Progress("title", 10) as progress:
        progress.show(1)
        print("a warning", file=sys.stderr)
        progress.say("stays")
    assert sys.stderr is stream
    lines = re.split("[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()))
    assert [line.strip() for line in lines if "a warning" in line or "stays" in line] == [
        "a warning",
        "stays",
    ]


class Gone(Terminal):
    """A terminal that was closed, a pipe without a reader, a log on a full disk."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_work_goes_on_where_its_progress_cannot_be_written(loud, monkeypatch, is_terminal):
    stream = Gone()
    monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    assert run(stream, 4000, count=400).rate == 10
    monkeypatch.setattr(sys, "stderr", stream)
    say("and so do lines")


@pytest.mark.parametrize("columns", ["0", "1", "-1", "x", "99999999"])
def test_odd_sizes_of_a_terminal_are_drawn_on(loud, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    stream = Terminal()
    run(stream, 10, count=3, step=100)  # more is done than there is
    assert len(stream.getvalue()) < 10_000 and "-1 day" not in stream.getvalue()


def test_a_process_without_a_console_works_in_silence(loud, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    assert run(None, 4000, count=400).rate == 10
    say("nowhere")
    with silenced(stdout=True):
        pass
    closed = os.dup(2)
    os.close(2)
    try:
        with silenced():
            pass
    finally:
        os.dup2(closed, 2)
        os.close(closed)


def test_standard_output_is_left_alone(loud, capsys):
    with Progress("title", 10, stream=Terminal()) as progress:
        progress.show(1)
        print("a result")
    assert capsys.readouterr().out == "a result\n"


def test_a_table_is_aligned_in_text_and_in_markdown():
    rows = [("convnext_tiny", 28_589_128), ("a|b", "-")]
    assert table_lines(("name", "parameters"), "<>", rows) == [
        "name           parameters",
        "convnext_tiny    28589128",
        "a|b                     -",
    ]
    assert markdown_table(("name", "parameters"), "<>", rows) == [
        "| name | parameters |",
        "| --- | ---: |",
        "| convnext_tiny | 28589128 |",
        "| a/b | - |",
    ]
    assert table_lines(("name", "size"), "<>", []) == ["name  size"]


# The switches in the environment, as each reader takes them.

QUIET = "KERAS_CONVNEXT_QUIET"
READERS = (
    "keras_convnext._terminal.Progress",
    "keras_convnext._terminal.say",
    "keras_convnext.training.logs.Progress",
    "keras_convnext.exporting.web_page._fetch",
    "keras_convnext.weights.download._append",
)


def is_silent(reader, tmp_path, monkeypatch):
    """Whether a reader is silent where somebody watches."""
    module = importlib.import_module(reader.rpartition(".")[0])
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    if reader == "keras_convnext._terminal.Progress":
        with module.Progress("title", 100) as progress:
            progress.show(50)
    elif reader == "keras_convnext._terminal.say":
        module.say("line")
    elif reader == "keras_convnext.training.logs.Progress":
        module.Progress(1, 1, 1).say("line")
    elif reader == "keras_convnext.weights.download._append":
        module._append(io.BytesIO(bytes(100)), tmp_path / "a.part", 0, 100, "https://example.org/a")
    else:
        monkeypatch.delenv("KERAS_CONVNEXT_OFFLINE", raising=False)
        monkeypatch.setattr(module.shutil, "which", lambda program: program)
        monkeypatch.setattr(module, "_pack", lambda *_: (_ for _ in ()).throw(OSError("no npm here")))
        with pytest.raises(OSError, match="no npm here"):
            module._fetch(tmp_path)
    return stream.getvalue() == ""


@pytest.mark.parametrize("value", [None, "", " ", "0", "false", "No", "OFF"])
@pytest.mark.parametrize("reader", READERS)
def test_readers_speak_where_quiet_is_off(reader, value, tmp_path, monkeypatch):
    monkeypatch.delenv(QUIET, raising=False) if value is None else monkeypatch.setenv(QUIET, value)
    assert not is_silent(reader, tmp_path, monkeypatch)


@pytest.mark.parametrize("value", ["1", "true", "YES", "2", "please"])
@pytest.mark.parametrize("reader", READERS)
def test_readers_are_silent_where_quiet_is_on(reader, value, tmp_path, monkeypatch):
    monkeypatch.setenv(QUIET, value)
    assert is_silent(reader, tmp_path, monkeypatch)


@pytest.mark.parametrize(("value", "is_on"), [("off", False), ("0", False), ("2", True), ("true", True)])
def test_offline_and_debug_are_read_as_quiet_is(value, is_on, tmp_path, monkeypatch, capsys):
    from keras_convnext.cli import main
    from keras_convnext.exporting import web_page
    from keras_convnext.weights import catalog, download

    monkeypatch.setenv("KERAS_CONVNEXT_OFFLINE", value)
    monkeypatch.setenv("KERAS_CONVNEXT_DEBUG", value)
    without_address = catalog.find_checkpoint("convnextv2_small.untrained")
    with pytest.raises(OSError, match="forbids downloading" if is_on else "have no published address"):
        download.fetch(without_address)
    monkeypatch.setattr(web_page.shutil, "which", lambda program: None)
    with pytest.raises(FileNotFoundError, match="OFFLINE forbids" if is_on else "npm was not found"):
        web_page._fetch(tmp_path)
    assert main.main(["info", "nothing"]) == 2
    assert ("Traceback" in capsys.readouterr().err) == is_on
