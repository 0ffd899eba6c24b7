"""What is silenced, what is not, that loggers made meanwhile can be heard later, and the switches."""

import importlib
import io
import logging
import math
import os
import sys
import types

import pytest

from keras_convnext._terminal import silenced

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


# The switches in the environment, as each reader takes them.

QUIET = "KERAS_CONVNEXT_QUIET"
READERS = (
    "benchmarks.speed.cases.Progress",
    "keras_convnext.data.index.Progress",
    "keras_convnext.evaluation.forward.ImageProgress",
    "keras_convnext.training.logs.Progress",
    "keras_convnext.weights.download._say",
    "keras_convnext.weights.download._progress",
    "keras_convnext.exporting.web_page._fetch",
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def is_silent(reader, tmp_path, monkeypatch):
    """Whether a reader is silent where somebody watches."""
    module = reader.rpartition(".")[0]
    module = importlib.import_module(module)
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", Terminal())
    if reader == "benchmarks.speed.cases.Progress":
        module.Progress("title").show("case", 1, 2)
    elif reader == "keras_convnext.data.index.Progress":
        progress = module.Progress("title", 100)
        progress.shown = -math.inf
        progress.show(50, 1)
    elif reader == "keras_convnext.evaluation.forward.ImageProgress":
        progress = module.ImageProgress(100, True)
        progress.shown = -math.inf
        progress.show(50)
    elif reader == "keras_convnext.training.logs.Progress":
        module.Progress(1, 1, 1).say("line")
    elif reader == "keras_convnext.weights.download._say":
        module._say("line")
    elif reader == "keras_convnext.weights.download._progress":
        bar = types.SimpleNamespace(update=lambda received: sys.stderr.write("bar"))
        keras = types.SimpleNamespace(utils=types.SimpleNamespace(Progbar=lambda *_, **__: bar))
        monkeypatch.setitem(sys.modules, "keras", keras)
        module._progress(100)(50)
    else:
        monkeypatch.delenv("KERAS_CONVNEXT_OFFLINE", raising=False)
        monkeypatch.setattr(module.shutil, "which", lambda program: program)
        monkeypatch.setattr(module, "_pack", lambda *_: (_ for _ in ()).throw(OSError("no npm here")))
        with pytest.raises(OSError, match="no npm here"):
            module._fetch(tmp_path)
    return sys.stderr.getvalue() == ""


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
