"use strict";

const NUM_SHOWN = 5;
const NUM_SHARES = 20; // classes of a label map
const MOST_RATIO = 4; // longer side of a picture that a model sees whole, in shorter sides of its training
const ONE = 2 ** 22; // Pillow's coefficients are integers of 22 bits after the point
const SUPPORTS = { bicubic: 2, bilinear: 1 };
const STRIP_PIXELS = 2 ** 22; // of a picture that are on the canvas at a time; phones bound its area

class PageError extends Error {} // its message is for the reader of the page

const metadata = JSON.parse(document.getElementById("metadata").textContent);
const find = (id) => document.getElementById(id);
let session; // a promise
let newest = 0; // number of the latest picture: an older one that ends later is not shown

async function start() {
  const take = (file) => show(file, false);
  find("file").addEventListener("change", (event) => {
    if (event.target.files.length) take(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    find("drop").classList.add("over");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) find("drop").classList.remove("over");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    find("drop").classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  session = openSession();
  try {
    await session;
    if (newest === 0) say("Ready.");
  } catch (error) {
    if (newest === 0) complain(error);
  }
}

function say(text, isAlert = false) {
  find("status").textContent = text;
  find("status").classList.toggle("alert", isAlert);
}

function complain(error) {
  if (!(error instanceof PageError)) console.error(error);
  say(error instanceof PageError ? error.message : `The model could not be run: ${error.message}`, true);
  find("classes").replaceChildren();
}

/** Classifies a file and shows all that belongs to it; `upright` turns it as its EXIF data says. */
async function show(file, upright) {
  const number = ++newest;
  find("turn").hidden = true;
  try {
    if (!file) throw new PageError("Expected a picture file; what came is text or an address.");
    say("Looking …");
    const { bitmap, orientation } = await decode(file, upright);
    if (number !== newest) return;
    const settings = metadata.page;
    drawPreview(bitmap, settings, file.name);
    find("classes").replaceChildren();
    await new Promise((resolve) => setTimeout(resolve, 20)); // lets the browser draw
    const size = imageSize(bitmap, settings);
    const pixels = settings.palette ? resizeWhole(bitmap, size, settings.channels) : prepare(bitmap, settings);
    bitmap.close();
    const { outputs, dims, milliseconds } = await run(await session, pixels, size);
    if (number !== newest) return;
    if (settings.palette) showMap(labelMap(outputs, dims), dims, settings.palette, milliseconds);
    else showClasses(probabilities(outputs), milliseconds);
    if (orientation > 1) {
      find("turn").textContent = upright ? "Look at it as it is stored" : "Turn it as the camera was held";
      find("turn").onclick = () => show(file, !upright);
      find("turn").hidden = false;
    }
  } catch (error) {
    if (number === newest) complain(error);
  }
}

function drawPreview(bitmap, settings, name) {
  const canvas = find("preview");
  const zoom = Math.min(1, 960 / Math.max(bitmap.width, bitmap.height));
  canvas.width = Math.max(1, Math.round(bitmap.width * zoom));
  canvas.height = Math.max(1, Math.round(bitmap.height * zoom));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  if (!settings.palette) shadeOutside(context, bitmap, settings, zoom);
  canvas.setAttribute("aria-label", `Picture: ${name}`);
  canvas.hidden = false;
  find("invitation").hidden = true;
  find("hint").textContent = `${
    settings.palette ? "The colours are those of the classes." : "The model sees the bright part."
  } Drop, choose or paste another picture.`;
  find("hint").hidden = false;
}

/** Darkens what of the picture the model does not see. */
function shadeOutside(context, bitmap, settings, zoom) {
  const [rows, columns] = axes(bitmap, settings);
  const shade = new Path2D();
  shade.rect(0, 0, context.canvas.width, context.canvas.height);
  shade.rect(
    columns.first * columns.scale * zoom,
    rows.first * rows.scale * zoom,
    columns.count * columns.scale * zoom,
    rows.count * rows.scale * zoom,
  );
  context.fillStyle = "rgb(0 0 0 / 0.5)";
  context.fill(shade, "evenodd");
}

function showClasses(values, milliseconds) {
  const best = [...values.keys()].sort((a, b) => values[b] - values[a] || a - b).slice(0, NUM_SHOWN);
  const items = best.map((index) => {
    const item = classItem(index, values[index]);
    item.dataset.probability = values[index];
    return item;
  });
  find("classes").replaceChildren(...items);
  say(`${className(best[0])}, ${percentage(values[best[0]])}. ${took(milliseconds)}`);
}

/** Lays the colours of the classes over the picture, and lists the share of each class. */
function showMap(map, [, height, width, classes], palette, milliseconds) {
  const counts = new Array(classes).fill(0);
  const colours = new ImageData(width, height);
  map.forEach((index, place) => {
    counts[index] += 1;
    colours.data.set([...palette[index], 255], 4 * place);
  });
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(colours, 0, 0);
  const context = find("preview").getContext("2d");
  context.globalAlpha = 0.5;
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, 0, 0, context.canvas.width, context.canvas.height);
  context.globalAlpha = 1;
  const found = [...counts.keys()].filter((index) => counts[index]).sort((a, b) => counts[b] - counts[a] || a - b);
  const items = found.slice(0, NUM_SHARES).map((index) => {
    const share = counts[index] / map.length;
    const item = classItem(index, share);
    item.dataset.share = share;
    item.querySelector(".bar").style.background = `rgb(${palette[index].join(" ")})`;
    return item;
  });
  find("classes").setAttribute("aria-label", "Classes by their share of the picture");
  find("classes").replaceChildren(...items);
  say(`${className(found[0])}, ${percentage(counts[found[0]] / map.length)} of the picture. ${took(milliseconds)}`);
}

function took(milliseconds) {
  return `The model took ${milliseconds < 10 ? milliseconds.toFixed(1) : milliseconds.toFixed(0)} ms.`;
}

/** A line of the list: name, share or probability in words and as a bar. */
function classItem(index, value) {
  const item = document.createElement("li");
  item.dataset.index = index;
  for (const [kind, text] of [["name", className(index)], ["percentage", percentage(value)]]) {
    const span = document.createElement("span");
    span.className = kind;
    span.textContent = text;
    item.append(span);
  }
  const track = document.createElement("div");
  const bar = document.createElement("div");
  track.className = "track";
  bar.className = "bar";
  bar.style.width = `${100 * value}%`;
  track.append(bar);
  item.append(track);
  return item;
}

function className(index) {
  return metadata.labels ? metadata.labels[index] : `class ${index}`;
}

function percentage(value) {
  return `${(100 * value).toFixed(1)} %`;
}

// The model.

async function openSession() {
  const script = new Blob([await runtimePart("runtime-script")], { type: "text/javascript" });
  const address = URL.createObjectURL(script);
  const ort = await import(address);
  URL.revokeObjectURL(address);
  ort.env.wasm.numThreads = 1; // more need headers that a file on a disk does not have
  ort.env.wasm.wasmBinary = await runtimePart("runtime-wasm");
  const opened = await ort.InferenceSession.create(takePart("model"), { executionProviders: ["wasm"] });
  const runner = { ort, opened };
  const { height, width, channels, short_side: side } = metadata.page;
  const size = [height ?? side, width ?? side];
  await run(runner, new Float32Array(size[0] * size[1] * channels), size); // the first run is slower
  return runner;
}

async function run({ ort, opened }, pixels, [height, width]) {
  const { channels, classes, palette } = metadata.page;
  const images = new ort.Tensor("float32", pixels, [1, height, width, channels]);
  const begin = performance.now();
  const results = await opened.run({ [opened.inputNames[0]]: images });
  const milliseconds = performance.now() - begin;
  const { data: outputs, dims } = results[opened.outputNames[0]];
  if (palette ? dims.length !== 4 || dims[3] !== classes : outputs.length !== classes) {
    throw new PageError(`Expected a model of ${classes} classes; this one gives numbers of shape ${dims}.`);
  }
  if (!outputs.every(Number.isFinite)) {
    throw new PageError("The model gives numbers that are not finite, as after a training that diverged.");
  }
  return { outputs, dims, milliseconds };
}

/** The number of the largest logit of each pixel; logits (1, height, width, classes). */
function labelMap(logits, [, height, width, classes]) {
  const map = new Uint8Array(height * width);
  for (let place = 0, from = 0; place < map.length; place += 1, from += classes) {
    let best = 0;
    for (let index = 1; index < classes; index += 1) {
      if (logits[from + index] > logits[from + best]) best = index;
    }
    map[place] = best;
  }
  return map;
}

function probabilities(outputs) {
  if (!metadata.page.softmax) return Float64Array.from(outputs);
  const largest = outputs.reduce((a, b) => Math.max(a, b));
  const powers = Float64Array.from(outputs, (value) => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b);
  return powers.map((value) => value / sum);
}

/** The bytes of a part of this page, which is removed from it: a model is large. */
function takePart(name) {
  const elements = [...document.querySelectorAll(`script[data-part="${name}"]`)];
  const pieces = elements.map((element) => {
    const text = element.textContent;
    element.remove();
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const characters = atob(text);
    const bytes = new Uint8Array(characters.length);
    for (let place = 0; place < bytes.length; place += 1) bytes[place] = characters.charCodeAt(place);
    return bytes;
  });
  if (pieces.length === 1) return pieces[0];
  const whole = new Uint8Array(pieces.reduce((sum, piece) => sum + piece.length, 0));
  let start = 0;
  for (const piece of pieces) {
    whole.set(piece, start);
    start += piece.length;
  }
  return whole;
}

async function runtimePart(name) {
  if (!window.DecompressionStream) {
    throw new PageError("This browser is too old for the page: it needs one of 2023 or later.");
  }
  const stream = new Blob([takePart(name)]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// From a file to a bitmap, with the pixels as they are stored: no colour profile, no EXIF orientation.

async function decode(file, upright) {
  const stored = await withoutOrientation(file);
  try {
    const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
    const bitmap = await createImageBitmap(upright ? file : stored.blob, options);
    return { bitmap, orientation: stored.orientation };
  } catch {
    const name = file.name ? `“${file.name}”` : "This file";
    throw new PageError(`${name} is not a picture that this browser reads. Try a JPEG or a PNG file.`);
  }
}

/** The file with its EXIF data taken out of sight, because a browser cannot be told to leave it alone. */
async function withoutOrientation(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  const view = new DataView(bytes.buffer);
  const name = (at) => String.fromCharCode(...bytes.subarray(at, at + 4));
  let orientation = 1;
  const pieces = [];
  let kept = 0; // bytes up to here are in `pieces`
  try {
    if (view.getUint16(0) === 0xffd8) {
      for (let at = 2; view.getUint8(at) === 0xff && view.getUint8(at + 1) !== 0xda; ) {
        if (view.getUint8(at + 1) === 0xff) {
          at += 1; // a fill byte
          continue;
        }
        if (view.getUint8(at + 1) === 0xe1 && name(at + 4) === "Exif") {
          orientation = readOrientation(view, at + 10);
          bytes[at + 1] = 0xef; // an application's segment that nobody reads
        }
        at += 2 + view.getUint16(at + 2);
      }
    } else if (name(1) === "PNG\r") {
      for (let at = 8; at < bytes.length; at += 12 + view.getUint32(at)) {
        if (name(at + 4) !== "eXIf") continue;
        orientation = readOrientation(view, at + 8);
        pieces.push(bytes.subarray(kept, at));
        kept = at + 12 + view.getUint32(at);
      }
    } else if (name(0) === "RIFF" && name(8) === "WEBP") {
      for (let at = 12; at < bytes.length; at += 8 + 2 * Math.ceil(view.getUint32(at + 4, true) / 2)) {
        if (name(at) === "VP8X") bytes[at + 8] &= ~8; // the flag that says there is EXIF data
        if (name(at) === "EXIF") bytes[at] = 0x58; // XXIF; browsers that turn a WebP file are few: none is offered
      }
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // a damaged file: its decoder says so
  }
  pieces.push(bytes.subarray(kept));
  return { blob: new Blob(pieces, { type: file.type }), orientation };
}

/** The orientation, 1 to 8, that the EXIF data at a place holds; 1 when it holds none. */
function readOrientation(view, start) {
  const little = view.getUint16(start) === 0x4949;
  const directory = start + view.getUint32(start + 4, little);
  const count = view.getUint16(directory, little);
  for (let entry = directory + 2; entry < directory + 2 + 12 * count; entry += 12) {
    if (view.getUint16(entry, little) === 0x0112) return view.getUint16(entry + 8, little);
  }
  return 1;
}

/** RGB of a part of a bitmap, without regard to its transparency. */
function readPixels(bitmap, top, left, height, width) {
  const pixels = new Uint8Array(3 * height * width);
  const step = Math.max(1, Math.floor(STRIP_PIXELS / width));
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = Math.min(step, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  let fromTexture = null;
  for (let row = 0; row < height; row += step) {
    const rows = Math.min(step, height - row);
    let rgba;
    if (!fromTexture) {
      context.clearRect(0, 0, width, rows);
      context.drawImage(bitmap, left, top + row, width, rows, 0, 0, width, rows);
      rgba = context.getImageData(0, 0, width, rows).data;
      if (isTransparent(rgba)) fromTexture = textureReader(bitmap);
    }
    if (fromTexture) rgba = fromTexture(top + row, left, rows, width);
    for (let from = 0, to = 3 * row * width; from < rgba.length; from += 4, to += 3) {
      pixels[to] = rgba[from];
      pixels[to + 1] = rgba[from + 1];
      pixels[to + 2] = rgba[from + 2];
    }
  }
  return pixels;
}

function isTransparent(rgba) {
  for (let place = 3; place < rgba.length; place += 4) if (rgba[place] !== 255) return true;
  return false;
}

/** Reads through WebGL, as a canvas multiplies colours with their opacity and loses those of clear pixels. */
function textureReader(bitmap) {
  const gl = document.createElement("canvas").getContext("webgl");
  if (!gl || Math.max(bitmap.width, bitmap.height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) {
    throw new PageError(
      "This browser cannot read the colours of a transparent picture so large, or without WebGL. " +
        "Save the picture without transparency.",
    );
  }
  gl.pixelStorei(gl.UNPACK_PREMULTIPLY_ALPHA_WEBGL, false);
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  const texture = gl.createTexture();
  gl.bindTexture(gl.TEXTURE_2D, texture);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, texture, 0);
  return (top, left, height, width) => {
    const rgba = new Uint8Array(4 * height * width);
    gl.readPixels(left, top, width, height, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
    return rgba;
  };
}

// From a bitmap to what the model takes, as `preprocess.preprocess_image` and Pillow's resize do it.

/** [height, width] that the model takes: its own, or of a free size that which the training saw. */
function imageSize(bitmap, settings) {
  if (settings.height) return [settings.height, settings.width];
  const sides = [bitmap.height, bitmap.width];
  const short = settings.short_side;
  const scale = Math.min((MOST_RATIO * short) / Math.max(...sides), short / Math.min(...sides));
  return sides.map((side) => Math.max(32, Math.floor(side * scale + 0.5)));
}

/** The whole picture at a size, bilinear without antialias, as `data.segmentation.inference.prepared`. */
function resizeWhole(bitmap, size, channels) {
  const data = readPixels(bitmap, 0, 0, bitmap.height, bitmap.width);
  const [rows, columns] = [bitmap.height, bitmap.width].map((inputs, axis) => neighbours(inputs, size[axis]));
  const pixels = new Float32Array(size[0] * size[1] * channels);
  let to = 0;
  for (const row of rows) {
    const above = row.first * bitmap.width;
    const below = row.second * bitmap.width;
    for (const column of columns) {
      const colour = [0, 1, 2].map((channel) => {
        const at = (line, place) => data[3 * (line + place) + channel];
        const left = at(above, column.first) + row.share * (at(below, column.first) - at(above, column.first));
        const right = at(above, column.second) + row.share * (at(below, column.second) - at(above, column.second));
        return roundHalfEven(left + column.share * (right - left));
      });
      if (channels === 1) pixels[to] = (colour[0] * 19595 + colour[1] * 38470 + colour[2] * 7471 + 0x8000) >> 16;
      else pixels.set(colour, to);
      to += channels;
    }
  }
  return pixels;
}

/** For each output the two inputs that it lies between, and the share of the second. */
function neighbours(inputs, outputs) {
  return Array.from({ length: outputs }, (_, output) => {
    const place = Math.min(Math.max(((output + 0.5) * inputs) / outputs - 0.5, 0), inputs - 1);
    const first = Math.floor(place);
    return { first, second: Math.min(first + 1, inputs - 1), share: place - first };
  });
}

/** float32 (height, width, channels), 0 to 255. */
function prepare(bitmap, settings) {
  const [rows, columns] = axes(bitmap, settings);
  const { height, width, channels } = settings;
  const windows = [rows, columns].map((axis) => coefficients(axis, SUPPORTS[settings.interpolation]));
  const [top, left] = windows.map((window) => window.begin);
  let image = {
    height: windows[0].end - top,
    width: windows[1].end - left,
  };
  image.data = readPixels(bitmap, top, left, image.height, image.width);
  // Pillow 13 resizes rows first where that is less work; the first pass rounds, so the order matters.
  const fewer = [rows, columns].map((axis) => axis.inputs - axis.outputs);
  const rowsFirst = fewer[0] > 0 && fewer[0] > 2 * fewer[1];
  for (const axis of rowsFirst ? [0, 1] : [1, 0]) image = resample(image, axis, windows[axis]);
  const pixels = new Float32Array(height * width * channels); // black where the image does not reach
  for (let row = 0; row < image.height; row += 1) {
    for (let column = 0; column < image.width; column += 1) {
      const from = 3 * (row * image.width + column);
      const to = channels * ((row + rows.padding) * width + column + columns.padding);
      const [red, green, blue] = [image.data[from], image.data[from + 1], image.data[from + 2]];
      if (channels === 1) {
        pixels[to] = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16; // as Pillow's "L"
      } else {
        pixels[to] = red;
        pixels[to + 1] = green;
        pixels[to + 2] = blue;
      }
    }
  }
  return pixels;
}

/** For rows and columns: sizes before and after the resize, and which of the outputs the crop keeps. */
function axes(bitmap, settings) {
  const crop = [settings.height, settings.width];
  const inputs = [bitmap.height, bitmap.width];
  const outputs = resizedSize(inputs, scaleSize(crop, settings), settings.crop_mode);
  return crop.map((wanted, axis) => ({
    inputs: inputs[axis],
    outputs: outputs[axis],
    scale: inputs[axis] / outputs[axis],
    first: outputs[axis] > wanted ? roundHalfEven((outputs[axis] - wanted) / 2) : 0,
    count: Math.min(wanted, outputs[axis]),
    padding: Math.max(0, Math.floor((wanted - outputs[axis]) / 2)),
  }));
}

function scaleSize(crop, settings) {
  return crop.map((side) => settings.resize_size ?? Math.floor(side / settings.crop_fraction));
}

function resizedSize([height, width], scale, mode) {
  if (mode === "squash") return scale;
  if (scale[0] !== scale[1]) {
    const ratio = Math.min(height / scale[0], width / scale[1]);
    return [roundHalfEven(height / ratio), roundHalfEven(width / ratio)];
  }
  const short = scale[0];
  if (width <= height) return [Math.floor((short * height) / width), short];
  return [short, Math.floor((short * width) / height)];
}

function roundHalfEven(value) {
  const rounded = Math.round(value);
  return value % 1 === 0.5 && rounded % 2 === 1 ? rounded - 1 : rounded;
}

/** For each output that is kept: where its inputs begin and what they are multiplied with. */
function coefficients({ inputs, scale, first, count }, support) {
  const filterScale = Math.max(scale, 1);
  const reach = support * filterScale;
  const kernels = [];
  for (let output = first; output < first + count; output += 1) {
    const center = (output + 0.5) * scale;
    const begin = Math.max(Math.trunc(center - reach + 0.5), 0);
    const end = Math.min(Math.trunc(center + reach + 0.5), inputs);
    const weights = new Float64Array(end - begin);
    let sum = 0;
    for (let place = 0; place < weights.length; place += 1) {
      weights[place] = filter((place + begin - center + 0.5) * (1 / filterScale), support);
      sum += weights[place];
    }
    for (let place = 0; place < weights.length; place += 1) {
      const weight = (weights[place] / sum) * ONE;
      weights[place] = Math.trunc(weight + 0.5 * Math.sign(weight));
    }
    kernels.push({ begin, weights });
  }
  const ends = kernels.map(({ begin, weights }) => begin + weights.length);
  return {
    kernels,
    begin: kernels.reduce((least, { begin }) => Math.min(least, begin), inputs),
    end: ends.reduce((a, b) => Math.max(a, b)),
  };
}

function filter(x, support) {
  x = Math.abs(x);
  if (support === 1) return Math.max(1 - x, 0);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/** One pass of the resize, along rows (axis 0) or columns (1); the image begins where the window does. */
function resample({ data, height, width }, axis, { kernels, begin }) {
  const result = axis === 0 ? { height: kernels.length, width } : { height, width: kernels.length };
  result.data = new Uint8ClampedArray(3 * result.height * result.width);
  const step = axis === 0 ? 3 * width : 3;
  let to = 0;
  for (let row = 0; row < result.height; row += 1) {
    for (let column = 0; column < result.width; column += 1, to += 3) {
      const kernel = kernels[axis === 0 ? row : column];
      const along = kernel.begin - begin;
      let from = 3 * (axis === 0 ? along * width + column : row * width + along);
      let red = ONE / 2;
      let green = ONE / 2;
      let blue = ONE / 2;
      for (const weight of kernel.weights) {
        red += weight * data[from];
        green += weight * data[from + 1];
        blue += weight * data[from + 2];
        from += step;
      }
      result.data[to] = Math.floor(red / ONE);
      result.data[to + 1] = Math.floor(green / ONE);
      result.data[to + 2] = Math.floor(blue / ONE);
    }
  }
  return result;
}
