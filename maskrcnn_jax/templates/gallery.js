"use strict";
// Images with boxes and masks that the reader searches, filters and pages through. The data is that of
// maskrcnn_jax/gallery.py, in the element "data"; the controls are those of gallery.html.j2.

const PER_PAGE = 24;
const LONGEST_LABEL = 24;  // letters of a class in a picture
const TYPES = {int8: Int8Array, uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array};

function unpack(value) {
  if (Array.isArray(value)) return typeof value[0] === "object" ? value.map(unpack) : value;
  if (value === null || typeof value !== "object") return value;
  if (!("base64" in value)) return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, unpack(part)]));
  return new TYPES[value.type](decode(value.base64).buffer);
}

function decode(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);  // browsers from 2025 on, in a tenth of the time
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const page = unpack(JSON.parse(document.getElementById("data").textContent));
const numImages = page.images.names.length;
const lowerNames = page.images.names.map(name => name.toLowerCase());

function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function className(index) {
  return index < page.classes.length ? page.classes[index].name : "not listed";
}

function colourOf(index) {
  return index < page.classes.length ? page.classes[index].colour : "#808080";
}

// Black or white, whichever can be read on the colour: the luma of BT.601, as in inference/draw.py.
function inkOn(colour) {
  const [red, green, blue] = [1, 3, 5].map(start => parseInt(colour.slice(start, start + 2), 16));
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
}

// For the picture: a longer name would leave it, and take the score along.
function shortName(index) {
  const letters = [...className(index)];
  return letters.length > LONGEST_LABEL ? `${letters.slice(0, LONGEST_LABEL - 1).join("")}\u2026` : letters.join("");
}

// The name of a class; what is too long for a table is cut off, and shown where the mouse rests.
function named(index, ...before) {
  return html("span", {class: "class", title: className(index)}, ...before, className(index));
}

function chip(index) {
  const mark = html("span", {class: "chip"});
  mark.style.background = colourOf(index);
  return named(index, mark);
}

// A path as a URL; none for names that are not Unicode.
function address(link) {
  try {
    return link.split("/").map(encodeURIComponent).join("/");
  } catch {
    return "";
  }
}

// Fills a picture with its image: first the thumbnail or the file, then the other if that cannot be shown.
function addImage(picture, row, large) {
  const sources = [page.images.thumbnails[row], address(page.images.links[row])];
  if (large) sources.reverse();
  const left = sources.filter(Boolean);
  const image = html("img", {alt: page.images.names[row], decoding: "async"});
  const tryNext = () => {
    if (left.length) image.src = left.shift();
    else {
      image.remove();
      picture.classList.add("unreadable");
    }
  };
  image.addEventListener("error", tryNext);
  picture.append(image);
  tryNext();
}

function outlinePath({offsets, points}, index) {
  let path = "";
  for (let start = offsets[index]; start < offsets[index + 1];) {
    const end = start + 1 + 2 * points[start];
    path += `M${points.subarray(start + 1, end).join(" ")}Z`;
    start = end;
  }
  return path;
}

// An item is {instances, index, label, kind: "truth" or "found", wrong: whether it is an error}.
function drawItem({instances, index, kind, wrong}, filters) {
  const colour = colourOf(instances.classes[index]);
  const group = svg("g", {class: `${kind}${wrong ? " wrong" : ""}`, fill: colour, stroke: colour});
  const [x, y, width, height] = instances.boxes.subarray(4 * index, 4 * index + 4);
  const outline = filters.masks ? outlinePath(instances.outlines, index) : "";
  if (outline) group.append(svg("path", {d: outline}));
  if (filters.boxes || !outline) {
    group.append(svg("rect", {x, y, width: Math.max(width, 0), height: Math.max(height, 0)}));
  }
  return group;
}

// Above the box of a detection and below that of an object, in the picture.
function drawLabel({instances, index, label, kind}, fontSize, pictureWidth, pictureHeight) {
  const colour = colourOf(instances.classes[index]);
  const [x, y, width, height] = instances.boxes.subarray(4 * index, 4 * index + 4);
  const wanted = kind === "truth" ? y + height + 1.1 * fontSize : y - 0.35 * fontSize;
  const place = {y: Math.min(Math.max(wanted, fontSize), pictureHeight - 0.35 * fontSize)};
  if (x < 0.8 * pictureWidth) place.x = Math.max(x, 0);
  else Object.assign(place, {x: Math.min(x + width, pictureWidth), "text-anchor": "end"});
  return svg("text", {...place, "font-size": fontSize, fill: inkOn(colour), stroke: colour}, label);
}

function drawPicture(row, items, filters, large) {
  const height = Math.max(page.images.sizes[2 * row], 1), width = Math.max(page.images.sizes[2 * row + 1], 1);
  const picture = html("div", {class: "picture"});
  picture.style.aspectRatio = `${width} / ${height}`;
  picture.style.setProperty("--aspect", width / height);
  addImage(picture, row, large);
  const shapes = items.map(item => drawItem(item, filters)).reverse();
  const fontSize = Math.max(width, height) / 50;
  const labels = large ? items.map(item => drawLabel(item, fontSize, width, height)).reverse() : [];
  picture.append(svg("svg", {viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none"}, ...shapes, ...labels));
  return picture;
}

// Reads "offsets" of instances: the places of those of an image.
function placesOf(instances, row) {
  return Array.from({length: instances.offsets[row + 1] - instances.offsets[row]}, (_, i) => instances.offsets[row] + i);
}

class Gallery {
  // choose(filters) returns rows of images; panels(row, filters) returns [{title, items}]; caption(row) returns text;
  // details(row, filters) returns rows of a table, the first being its head.
  constructor({choose, panels, caption, details}) {
    Object.assign(this, {choose, panels, caption, details, rows: [], first: 0, opened: -1});
    this.form = document.getElementById("filters");
    this.dialog = document.getElementById("large");
    this.form.addEventListener("input", () => this.refresh());
    this.form.addEventListener("submit", event => event.preventDefault());
    this.form.addEventListener("reset", () => setTimeout(() => this.refresh()));
    document.getElementById("previous-page").addEventListener("click", () => this.turn(-1));
    document.getElementById("next-page").addEventListener("click", () => this.turn(1));
    document.getElementById("previous-image").addEventListener("click", () => this.open(this.opened - 1));
    document.getElementById("next-image").addEventListener("click", () => this.open(this.opened + 1));
    document.getElementById("close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("keydown", event => {
      const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
      if (step) this.open(this.opened + step);
    });
    this.dialog.addEventListener("click", event => {
      if (event.target === this.dialog) this.dialog.close();
    });
  }

  get filters() {
    const filters = Object.fromEntries(new FormData(this.form));
    filters.name = filters.name.trim().toLowerCase();
    return filters;
  }

  refresh() {
    this.rows = this.choose(this.filters);
    this.first = 0;
    this.render();
  }

  turn(pages) {
    this.first = Math.max(0, Math.min(this.first + pages * PER_PAGE, this.rows.length - 1));
    this.first -= this.first % PER_PAGE;
    this.render();
    document.getElementById("filters").scrollIntoView({block: "start"});
  }

  render() {
    const filters = this.filters, shown = this.rows.slice(this.first, this.first + PER_PAGE);
    document.getElementById("pictures").replaceChildren(
      ...shown.map((row, i) => this.card(row, this.first + i, filters)));
    const count = `${this.rows.length.toLocaleString("en")} of ${numImages.toLocaleString("en")} images`;
    document.getElementById("count").textContent = this.rows.length ? count : `No image fits (${count}).`;
    const pages = Math.max(1, Math.ceil(this.rows.length / PER_PAGE)), at = this.first / PER_PAGE + 1;
    document.getElementById("place").textContent = `page ${at} of ${pages}`;
    document.getElementById("previous-page").disabled = at <= 1;
    document.getElementById("next-page").disabled = at >= pages;
  }

  card(row, place, filters) {
    const pictures = this.panels(row, filters).map(({items}) => drawPicture(row, items, filters, false));
    const button = html("button", {type: "button", class: "panels", title: "enlarge"}, ...pictures);
    button.addEventListener("click", () => this.open(place));
    const name = html("bdi", {}, page.images.names[row]);
    return html("figure", {"data-row": row}, button, html("figcaption", {}, name, `: ${this.caption(row)}`));
  }

  open(place) {
    if (place < 0 || place >= this.rows.length) return;
    this.opened = place;
    const row = this.rows[place], filters = this.filters;
    document.getElementById("image-name").textContent = page.images.names[row];
    document.getElementById("image-facts").textContent =
      `${page.images.sizes[2 * row + 1]} x ${page.images.sizes[2 * row]} pixels; ${place + 1} of ${this.rows.length}`;
    document.getElementById("panels").replaceChildren(...this.panels(row, filters).map(({title, items}) =>
      html("figure", {}, drawPicture(row, items, filters, true), html("figcaption", {}, title))));
    const [head, ...lines] = this.details(row, filters);
    const cells = (tag, line) => html("tr", {}, ...line.map(cell => html(tag, {}, cell)));
    document.getElementById("details").replaceChildren(
      html("thead", {}, cells("th", head)), html("tbody", {}, ...lines.map(line => cells("td", line))));
    document.getElementById("previous-image").disabled = place === 0;
    document.getElementById("next-image").disabled = place === this.rows.length - 1;
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.scrollTop = 0;
  }
}
