"""The page of `make demo`: one HTML file with all pictures in it, from what `run.run` found."""

import base64
import html
import io
import os
import pathlib
import re
from typing import Any

import numpy as np
from PIL import Image

_WIDTH, _HEIGHT = 760, 270  # of the curves, in units of the drawing
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 150, 12, 36  # around them
_COLOURS = ("var(--best)", "var(--other)")
_FLOWERS_LICENCE = "https://creativecommons.org/licenses/by/2.0/"


def write_page(found: Any, path: str | os.PathLike[str], command: str = "") -> pathlib.Path:
    """Writes the page, which opens without a network.

    Args:
        found: `run.Findings`.
        path: the .html file; one that is there is replaced.
        command: what made it, for the foot of the page.

    Returns:
        The path.

    Raises:
        OSError: the file cannot be written.

    Example:
        write_page(run.run(settings), "out/demo/report.html")
    """
    path = pathlib.Path(path)
    pieces = {
        "summary": _summary(found),
        "problems": _problems(found),
        "weights": html.escape(found.weights),
        "photos": "\n".join(map(_photo, found.photos)),
        "fine_tuning": _fine_tuning(found),
        "curves": _curves(found.trainings),
        "looks": "\n".join(map(_look, found.looks)),
        "runners": _runners(found),
        "facts": _facts(found, command),
        "credits": _credits(found),
    }
    template = pathlib.Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: pieces[place[1]], template)
    path.write_text(page, encoding="utf-8")
    return path


def _summary(found):
    right = sum(photo.is_right for photo in found.photos)
    sentences = [f"The right class comes first for {right} of {len(found.photos)} photographs."]
    if len(found.trainings) == 2:
        pretrained, scratch = (_percent(each.held_out_accuracy[-1]) for each in found.trainings)
        sentences.append(
            f"Of {found.num_held_out} held-out photos of {html.escape(found.data_title)}, "
            f"{pretrained} are right after fine-tuning, {scratch} from scratch."
        )
    runners = {each.title: each for each in found.runners}
    if {"LiteRT float32", "LiteRT int8"} <= runners.keys():
        model, float32, int8 = runners["Keras"], runners["LiteRT float32"], runners["LiteRT int8"]
        sentences.append(
            f"The 8-bit file is {float32.num_bytes / int8.num_bytes:.1f} times smaller than in float32, and "
            f"answers {model.milliseconds / int8.milliseconds:.1f} times as fast as the Keras model."
        )
    return " ".join(sentences)


def _problems(found):
    if not found.problems:
        return ""
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in found.problems)
    return f'<section class="problem"><h2>What was left out</h2>{lines}</section>'


def _photo(photo):
    verdict = '<span class="right">right</span>' if photo.is_right else '<span class="wrong">not right</span>'
    wanted = "" if photo.is_right else f'<p class="quiet">Right would be: {_names(photo.right)}.</p>'
    return (
        f"<div>{_pair(photo)}<h3>{html.escape(photo.name)}: {verdict}</h3>{_bars(photo.best)}{wanted}</div>"
    )


def _names(names):
    return html.escape("; ".join(names)) if names else "not among these classes"


def _look(photo):
    name, probability = photo.best[0]
    kind = "right" if photo.is_right else "wrong"
    wanted = "" if photo.is_right else f", is {_names(photo.right)}"
    heading = f"{html.escape(name)} {_percent(probability)}{wanted}"
    return f'<div>{_pair(photo)}<h3 class="{kind}">{heading}</h3></div>'


def _pair(photo):
    alternatives = (photo.name, f"{photo.name} with a heat map")
    images = zip((photo.picture, photo.heat), alternatives, strict=True)
    return f'<div class="pair">{"".join(_image(*each) for each in images)}</div>'


def _image(pixels: np.ndarray, alternative: str) -> str:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "jpeg", quality=90)
    data = base64.b64encode(content.getvalue()).decode()
    return f'<img alt="{html.escape(alternative)}" src="data:image/jpeg;base64,{data}">'


def _bars(best):
    return f"<ol>{''.join(_bar(name, probability) for name, probability in best)}</ol>"


def _bar(name, probability):
    return (
        f'<li style="--share: {100 * probability:.1f}%"><span class="name">{html.escape(name)}</span>'
        f'<span class="value">{_percent(probability)}</span></li>'
    )


def _fine_tuning(found):
    kinds = ", ".join(html.escape(name) for name in found.classes[:12])
    more = " and others" if len(found.classes) > 12 else ""
    lines = [
        f"{found.num_training:,} photos of {len(found.classes)} kinds ({kinds}{more}) are learned, "
        f"{found.num_held_out:,} held out. Both trainings have the same epochs, seed, optimizer and compiled "
        "step; the time that it takes to compile is in the first's."
    ]
    lines += [
        f"<b>{each.title}</b>: {_percent(each.held_out_accuracy[-1])} of the held-out photos are right after "
        f"{len(each.accuracy)} epochs and {each.seconds:.0f} s, learning rate {each.learning_rate:g}."
        for each in found.trainings
    ]
    return f"<p>{'<br>'.join(lines)}</p>"


def _curves(trainings):
    """Accuracy by epoch: held-out photos drawn through, training photos dashed."""
    if not trainings:
        return ""
    epochs = max(len(each.accuracy) for each in trainings)
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM

    def x(epoch):
        return _LEFT + (right - _LEFT) * (epoch - 1) / max(epochs - 1, 1)

    def y(share):
        return bottom - (bottom - _TOP) * share

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="accuracy by epoch">']
    for percent in range(0, 101, 25):
        height = y(percent / 100)
        parts.append(
            f'<line x1="{_LEFT}" x2="{right}" y1="{height:.1f}" y2="{height:.1f}" stroke="#e4e2da"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{percent} %</text>')
    step = max(-(-epochs // 10), 1)
    for epoch in range(step, epochs + 1, step):
        parts.append(f'<text x="{x(epoch):.1f}" y="{bottom + 18}" text-anchor="middle">{epoch}</text>')
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 2}" text-anchor="middle">epoch</text>')
    ends = _apart([y(each.held_out_accuracy[-1]) for each in trainings])
    for each, colour, end in zip(trainings, _COLOURS, ends, strict=False):
        for values, style in (
            (each.accuracy, 'stroke-width="1.3" stroke-dasharray="4 4" opacity="0.65"'),
            (each.held_out_accuracy, 'stroke-width="2.6"'),
        ):
            points = " ".join(f"{x(n):.1f},{y(value):.1f}" for n, value in enumerate(values, 1))
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" {style}/>')
        last = (x(len(each.accuracy)), y(each.held_out_accuracy[-1]))
        parts.append(f'<circle cx="{last[0]:.1f}" cy="{last[1]:.1f}" r="3.5" fill="{colour}"/>')
        label = f"{each.title} {_percent(each.held_out_accuracy[-1])}"
        parts.append(f'<text x="{right + 10}" y="{end + 4:.1f}" style="fill: {colour}">{label}</text>')
    parts.append("</svg>")
    parts.append(
        '<p class="quiet">Share of photos that are right: held out (line), and learned (dashes; as they are '
        "shifted and mirrored, while the weights change).</p>"
    )
    return "".join(parts)


def _apart(heights, distance=17):
    """Heights of two labels, moved apart where they would cover each other."""
    if len(heights) != 2 or abs(heights[0] - heights[1]) >= distance:
        return heights
    middle, sign = sum(heights) / 2, 1 if heights[0] > heights[1] else -1
    return [middle + sign * distance / 2, middle - sign * distance / 2]


def _runners(found):
    if not found.runners:
        return ""
    model = found.runners[0]
    rows = "".join(
        f"<tr><td>{html.escape(each.title)}</td><td>{each.num_bytes / 1e6:.2f} MB</td>"
        f"<td>{_percent(each.accuracy)}</td><td>{_percent(each.agreement)}</td>"
        f"<td>{each.milliseconds:.2f} ms</td><td>{model.milliseconds / each.milliseconds:.1f}</td></tr>"
        for each in found.runners
    )
    heads = "".join(
        f"<th>{head}</th>"
        for head in ("", "file", "right", "same class as Keras", "a photo", "times as fast")
    )
    return (
        "<section><h2>Files for phones</h2><p>The fine-tuned model as LiteRT files: in float32, and with 8 "
        "bits for weights and activations, whose ranges were measured on training photos.</p>"
        f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="quiet">Right: of {found.num_held_out} held-out photos. A photo: median of '
        f"{found.timed_calls} calls with one photo, in turns, on this machine.</p></section>"
    )


def _facts(found, command):
    names = {"cpu": "processor", "load": "load before", "keras_convnext": "keras-convnext"}
    facts = {names.get(name, name): value for name, value in found.machine.items() if value}
    lines = [f'<dt>command</dt><dd class="long">{html.escape(command)}</dd>'] if command else []
    lines.append(f'<dt>seconds</dt><dd class="long">{html.escape(seconds_text(found.seconds))}</dd>')
    lines += [
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>" for name, value in facts.items()
    ]
    return "\n".join(lines)


def seconds_text(seconds: dict[str, float]) -> str:
    """The seconds of each part and of all, in one line."""
    parts = seconds | {"in all": sum(seconds.values())}
    return ", ".join(f"{part} {taken:.0f}" for part, taken in parts.items())


def _credits(found):
    parts = [
        "The three photographs come with the package: cat by Stéfan van der Walt and coffee by Rachel "
        "Michetti (CC0), rocket by SpaceX (public domain)."
    ]
    shown = [photo for photo in found.looks if photo.photographer]
    if shown:
        people = ", ".join(
            f'<a href="{html.escape(photo.address)}">{html.escape(photo.photographer)}</a>' for photo in shown
        )
        parts.append(
            f'Flowers, in order: {people}; <a href="{_FLOWERS_LICENCE}">CC BY 2.0</a>, cut to squares and '
            "scaled."
        )
    return "".join(f"<p>{part}</p>" for part in parts)


def _percent(share):
    return f"{100 * share:.1f} %"
