// The images of a dataset check. The data is that of checking/dataset_images.py.

const {objects, findings} = page;
// Kinds of findings of each image and of each object.
const ofImage = Array.from({length: numImages}, () => new Set());
const ofObject = new Map();
const errors = new Set(findings.filter(({isError}) => isError).map(({kind}) => kind));

for (const finding of findings) {
  for (const row of finding.images) ofImage[row].add(finding.kind);
  for (const o of finding.objects) ofObject.set(o, [...(ofObject.get(o) || []), finding.kind]);
}

function objectFits(o, filters) {
  return (filters.class === "" || objects.classes[o] === Number(filters.class)) &&
    (filters.size === "" || objects.sizes[o] === Number(filters.size));
}

function imageFits(row, filters) {
  if (!lowerNames[row].includes(filters.name)) return false;
  if (filters.split && page.splitOf[row] !== Number(filters.split)) return false;
  if (filters.finding === "any" ? !ofImage[row].size
    : filters.finding === "none" ? ofImage[row].size
    : filters.finding && !ofImage[row].has(filters.finding.slice("kind:".length))) return false;
  if (!filters.class && !filters.size) return true;
  for (let o = objects.offsets[row]; o < objects.offsets[row + 1]; o++) if (objectFits(o, filters)) return true;
  return false;
}

function numObjects(row) {
  return objects.offsets[row + 1] - objects.offsets[row];
}

function choose(filters) {
  const rows = [];
  for (let row = 0; row < numImages; row++) if (imageFits(row, filters)) rows.push(row);
  const {names} = page.images;
  // An error comes before any number of warnings.
  const weight = ofImage.map(kinds => Array.from(kinds).reduce((sum, kind) => sum + (errors.has(kind) ? 1000 : 1), 0));
  const compare = {
    findings: (a, b) => weight[b] - weight[a],
    objects: (a, b) => numObjects(b) - numObjects(a),
    name: (a, b) => names[a] < names[b] ? -1 : 1,
    file: (a, b) => a - b,
  }[filters.order];
  return rows.sort(compare);
}

function panels(row) {
  const items = placesOf(objects, row).map(o => ({
    instances: objects, index: o, kind: "found", wrong: ofObject.has(o),
    label: `${shortName(objects.classes[o])}${objects.crowds[o] ? ", crowd" : ""}`,
  }));
  return [{title: [...ofImage[row]].join("; "), items}];
}

function caption(row) {
  const number = numObjects(row);
  return [`${number} annotation${number === 1 ? "" : "s"}`, ...ofImage[row]].join("; ");
}

function details(row) {
  const sizes = ["small", "medium", "large"];
  return [["annotation", "class", "size", "box: x, y, width, height", "findings"], ...placesOf(objects, row).map(o => [
    objects.ids[o], chip(objects.classes[o]), sizes[objects.sizes[o]] + (objects.crowds[o] ? ", crowd" : ""),
    Array.from(objects.boxes.subarray(4 * o, 4 * o + 4), value => value.toFixed(1)).join(", "),
    (ofObject.get(o) || []).join("; "),
  ])];
}

function addFindings() {
  const counts = new Map();
  for (const kinds of ofImage) for (const kind of kinds) counts.set(kind, (counts.get(kind) || 0) + 1);
  document.querySelector("#filters [name=finding]").append(...Array.from(counts, ([kind, count]) =>
    html("option", {value: `kind:${kind}`}, `${errors.has(kind) ? "Error" : "Warning"}: ${kind} (${count})`)));
}

addFindings();
const gallery = new Gallery({choose, panels, caption, details});
gallery.refresh();
