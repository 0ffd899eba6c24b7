"""What a run tells while it trains."""

import io
import math
import os
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from keras_convnext.training import curves, logs

pytestmark = pytest.mark.once


def rows_of(count, **added):
    return [
        {
            "epoch": epoch,
            "loss": 3.0 / epoch,
            "val_loss": 3.5 / epoch,
            "val_top1": 50.0 + epoch,
            "ema_val_top1": 49.0 + epoch,
            "learning_rate": 4e-3 / epoch,
            "images_per_second": 900.0,
            **added,
        }
        for epoch in range(1, count + 1)
    ]


def test_csv_reads_back_equal_with_every_digit(tmp_path):
    log = logs.CsvLog(tmp_path / "log.csv")
    log.write({"epoch": np.int64(1), "loss": 0.1 + 0.2, "note": 'a, "b"\nc'})
    log.write({"epoch": 2, "loss": math.nan, "val_top1": np.float32(1 / 3)})
    log.write({"epoch": 3, "loss": -math.inf, "val_top1": 5e-324})
    text = (tmp_path / "log.csv").read_text()
    assert text.splitlines()[0] == "epoch,loss,note,val_top1"
    assert "1,0.30000000000000004," in text and "\n2,nan,,0.3333333432674408\n3,-inf,,5e-324\n" in text
    first, second, third = logs.read_csv(tmp_path / "log.csv")
    assert first == {"epoch": 1, "loss": 0.1 + 0.2, "note": 'a, "b"\nc'}
    assert math.isnan(second.pop("loss")) and second == {"epoch": 2, "val_top1": float(np.float32(1 / 3))}
    assert third == {"epoch": 3, "loss": -math.inf, "val_top1": 5e-324}
    assert type(first["epoch"]) is int
    assert os.listdir(tmp_path) == ["log.csv"]


def test_an_interrupted_and_resumed_csv_equals_an_uninterrupted_one(tmp_path):
    whole, broken = logs.CsvLog(tmp_path / "whole.csv"), logs.CsvLog(tmp_path / "broken.csv")
    for row in rows_of(5):
        whole.write(row)
    for row in rows_of(4, images_per_second=1.0, extra="gone")[:4]:
        broken.write(row)
    assert (tmp_path / "whole.csv").read_bytes() != (tmp_path / "broken.csv").read_bytes()
    resumed = logs.CsvLog(tmp_path / "broken.csv")
    assert len(resumed.rows) == 4
    resumed.resume(before_epoch=3)
    assert [row["epoch"] for row in logs.read_csv(tmp_path / "broken.csv")] == [1, 2]
    resumed.resume(before_epoch=1)
    for row in rows_of(5):
        resumed.write(row)
    assert (tmp_path / "whole.csv").read_bytes() == (tmp_path / "broken.csv").read_bytes()


def test_a_csv_that_cannot_be_written_keeps_what_was_there(tmp_path, monkeypatch):
    log = logs.CsvLog(tmp_path / "log.csv")
    log.write({"epoch": 1, "loss": 2.0})
    before = (tmp_path / "log.csv").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            log.write({"epoch": 2, "loss": 1.0})
    assert (tmp_path / "log.csv").read_bytes() == before
    assert os.listdir(tmp_path) == ["log.csv"]
    log.write({"epoch": 2, "loss": 1.0})
    assert len(logs.read_csv(tmp_path / "log.csv")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"column 'epoch', received .*log.csv' with the columns \[\]. Move it away"),
        (b"a,b\n1,2\n", r"with the columns \['a', 'b'\]"),
        (b"epoch,loss\n1,2\n2\n", r"Expected 2 fields .* in row 3 of .*log.csv', received \['2'\]"),
        (b"epoch,loss\nx,2\n", r"whole number 'epoch' in row 2 .* received \['x', '2'\]"),
        (b"epoch\n\xff\n", "Expected the CSV of a run, received .*log.csv'"),
    ],
)
def test_a_file_that_is_no_log_is_refused(tmp_path, content, message):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        logs.CsvLog(tmp_path / "log.csv")
    assert (tmp_path / "log.csv").read_bytes() == content


def test_curves_show_what_the_rows_say(tmp_path):
    pictures = {}
    for name, rows in {
        "none": [],
        "one": rows_of(1),
        "six_hundred": rows_of(600),
        "other": rows_of(600, val_top1=10.0),
        "broken": [*rows_of(2), {"epoch": 3, "loss": math.nan, "val_loss": math.inf, "val_top1": "x"}],
    }.items():
        curves.draw_curves(rows, tmp_path / f"{name}.png", {"top1": "Top-1"}, title="a $title_1")
        image = Image.open(tmp_path / f"{name}.png")
        assert image.size == (1100, 720)
        pictures[name] = np.asarray(image.convert("RGB")).astype(int)
    orange = {name: (abs(picture - (0xD5, 0x5E, 0)).max(-1) < 40).sum() for name, picture in pictures.items()}
    assert orange["none"] == 0 and 20 < orange["one"] < orange["six_hundred"]
    # The panel of the accuracy differs when the accuracy does, the others do not.
    difference = abs(pictures["six_hundred"] - pictures["other"]).max(-1) > 0
    assert difference[:360, 580:].any() and not difference[360:].any() and not difference[:, :560].any()
    assert not list(tmp_path.glob("*.tmp"))


def events_of(folder):
    import tensorflow as tf

    return [
        event
        for path in sorted(pathlib.Path(folder).iterdir())
        for event in tf.compat.v1.train.summary_iterator(str(path))
    ]


def test_tensorboard_reads_every_scalar_of_a_killed_run_and_a_restart_purges(tmp_path):
    log = logs.TensorBoardLog(tmp_path)
    log.write(1, {"loss": 2.5, "learning_rate": np.float32(1e-3)})
    log.write(2, {"loss": math.nan})
    resumed = logs.TensorBoardLog(tmp_path, purge_step=2)  # the first was never closed
    resumed.write(2, {"loss": 2.25})
    resumed.close()
    resumed.close()
    events = events_of(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert [event.file_version for event in events if event.file_version] == ["brain.Event:2"] * 2
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars[:2] == [(1, "loss", 2.5), (1, "learning_rate", np.float32(1e-3))]
    assert math.isnan(scalars[2][2]) and scalars[3] == (2, "loss", 2.25)
    starts = [event.step for event in events if event.session_log.status == event.session_log.START]
    assert starts == [2]


@pytest.mark.parametrize("scores", [{}, {"box_ap": "Box AP", "mask_ap": "Mask AP"}])
def test_curves_have_a_panel_for_each_score_of_a_task(tmp_path, scores):
    rows = [row | {"val_box_ap": 10.0, "ema_val_mask_ap": 20.0} for row in rows_of(3)]
    curves.draw_curves(rows, tmp_path / "a.png", scores)
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    orange = (abs(picture - (0xD5, 0x5E, 0)).max(-1) < 40).sum()
    curves.draw_curves(rows_of(3), tmp_path / "b.png", scores)
    without = np.asarray(Image.open(tmp_path / "b.png").convert("RGB")).astype(int)
    assert (orange > (abs(without - (0xD5, 0x5E, 0)).max(-1) < 40).sum()) == bool(scores)


class Terminal(io.StringIO):
    """A stream that says it is a terminal; its width is COLUMNS."""

    def isatty(self):
        return True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Loss:
    """A scalar that counts how often it is read, which on an accelerator waits for the step."""

    reads = 0

    def __float__(self):
        self.reads += 1
        return 2.5


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.delenv("KERAS_CONVNEXT_QUIET", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    return Clock()


def plain(stream):
    """What was written, line by line, without colours and cursor movements."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    return [line.rstrip() for line in re.split("[\r\n]+", text) if line.strip()]


def run_epoch(progress, clock, epoch, loss=2.5, seconds=1.0, steps=100):
    for step in range(1, steps + 1):
        clock.now += seconds
        progress.show(epoch, step, loss)


def test_a_terminal_shows_speed_of_the_last_seconds_and_time_left(clock):
    stream = Terminal()
    progress = logs.Progress(3, 100, 32, stream=stream, clock=clock)
    clock.now += 60  # compilation, which is not in the speed
    run_epoch(progress, clock, 1, seconds=1.0, steps=50)
    assert progress.images_per_second == 32
    for step in range(51, 71):
        clock.now += 0.5
        progress.show(1, step, 2.5)
    assert progress.images_per_second == 64  # 10 s at the new speed; the mean from the start is 35
    # 30 steps at 0.5 s, then two epochs of 100
    assert re.fullmatch(
        r"[━╸╺]{20} epoch 1/3, step 70/100, loss 2\.5000, 64 images/s, run 0:01:55 left, epoch 0:00:15 left",
        plain(stream)[-1],
    )


def test_time_left_counts_validation(clock):
    stream = Terminal()
    progress = logs.Progress(3, 100, 32, stream=stream, clock=clock)
    run_epoch(progress, clock, 1)
    clock.now += 20
    progress.end_epoch(1, {"loss": 2.5, "val_top1": 71.23456})
    # Two epochs of 100 s and 20 s of validation
    assert plain(stream)[-1] == "epoch 1/3, loss 2.5, val_top1 71.235, 32 images/s, 0:04:00 left"
    run_epoch(progress, clock, 2, steps=50)
    assert "run 0:02:50 left, epoch 0:00:50 left" in plain(stream)[-1]
    run_epoch(progress, clock, 3)
    progress.end_epoch(3, {"loss": 2.0})
    progress.close()
    assert stream.getvalue().endswith("epoch 3/3, loss 2, 32 images/s\n")


def test_a_terminal_is_written_to_five_times_a_second_and_the_loss_is_read_no_more_often(clock):
    stream, loss = Terminal(), Loss()
    progress = logs.Progress(1, 10_000, 32, stream=stream, clock=clock)
    run_epoch(progress, clock, 1, loss=loss, seconds=0.001, steps=10_000)
    assert 45 <= loss.reads <= 51 and loss.reads <= stream.getvalue().count("step") <= loss.reads + 1


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (24, "epoch 1/300, step 20/10…"),
        (60, "epoch 1/300, step 20/10000, loss 2.5000, 4096 images/s, run…"),
        (80, "epoch 1/300, step 20/10000, loss 2.5000, 4096 images/s, run 34 d 17 h left, epo…"),
        (120, f"{20 * '━'} epoch 1/300, step 20/10000, loss 2.5000, 4096 images/s, run 34 d 17 h left, epoch "
              "2:46:20 left"),
    ],
)  # fmt: skip
def test_a_line_fits_the_terminal_and_keeps_what_says_most(clock, monkeypatch, columns, shown):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    progress = logs.Progress(300, 10_000, 4096, stream=stream, clock=clock)
    run_epoch(progress, clock, 1, steps=20)
    assert plain(stream)[-1].replace("╺", "━") == shown
    progress.status("validation")
    assert "epoch 1/300, validation" in plain(stream)[-1]
    assert max(map(len, plain(stream))) <= columns


def test_elsewhere_there_is_one_line_an_epoch_and_one_every_five_minutes(clock):
    stream, loss = io.StringIO(), Loss()
    progress = logs.Progress(2, 1000, 32, stream=stream, clock=clock)
    run_epoch(progress, clock, 1, loss=loss, seconds=0.2, steps=1000)  # 200 s
    progress.status("validation")
    progress.end_epoch(1, {"loss": 2.5})
    run_epoch(progress, clock, 2, loss=loss, seconds=1.0, steps=1000)
    progress.end_epoch(2, {"loss": 2.25})
    progress.close()
    lines = stream.getvalue().splitlines()
    assert [line.split(",")[:2] for line in lines] == [
        ["epoch 1/2", " loss 2.5"],
        ["epoch 2/2", " step 300/1000"],
        ["epoch 2/2", " step 600/1000"],
        ["epoch 2/2", " step 900/1000"],
        ["epoch 2/2", " loss 2.25"],
    ]
    assert (
        lines[1] == "epoch 2/2, step 300/1000, loss 2.5000, 32 images/s, run 0:11:40 left, epoch 0:11:40 left"
    )
    assert "\r" not in stream.getvalue() and "\033" not in stream.getvalue() and loss.reads == 3


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_quiet_prints_nothing_and_measures(clock, monkeypatch, by):
    if by == "environment":
        monkeypatch.setenv("KERAS_CONVNEXT_QUIET", "1")
    stream = Terminal()
    progress = logs.Progress(1, 100, 32, quiet=by == "argument", stream=stream, clock=clock)
    run_epoch(progress, clock, 1)
    assert progress.images_per_second == 32
    progress.status("validation")
    progress.say("a line")
    progress.end_epoch(1, {"loss": 1.0})
    progress.close()
    assert stream.getvalue() == ""


def test_a_line_that_stays_does_not_mix_with_the_one_that_is_rewritten(clock):
    stream = Terminal()
    progress = logs.Progress(1, 100, 32, stream=stream, clock=clock)
    progress.say("before")
    run_epoch(progress, clock, 1, steps=1)
    progress.say("between")
    clock.now += 1
    progress.show(1, 2, 2.5)
    progress.close()
    lines = [line for line in plain(stream) if set(line) != {"━"}]  # the bar as it begins
    assert [re.sub("[━╺]+ ", "", line) for line in lines] == [
        "before",
        *["epoch 1/1, step 1/100, loss 2.5000"] * 2,
        "between",
        *["epoch 1/1, step 2/100, loss 2.5000, 32 images/s, run 0:01:38 left, epoch 0:01:38 left"] * 2,
    ]


def test_a_step_in_an_epoch_of_its_own_has_no_speed_and_no_time_left(clock):
    stream = io.StringIO()
    progress = logs.Progress(2, 1, 32, stream=stream, clock=clock)
    run_epoch(progress, clock, 1, steps=1)
    progress.end_epoch(1, {"loss": math.nan})
    assert stream.getvalue() == "epoch 1/2, loss nan\n"
