"""What is silenced, what is not, and that loggers made meanwhile can be heard later."""

import logging
import os
import sys

import pytest

from keras_convnext.quiet import silenced

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
