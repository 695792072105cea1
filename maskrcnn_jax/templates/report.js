// What an evaluation report counts and shows at the chosen score. The data is that of evaluation/report_data.py.

const SMALL_MATRIX = 20;  // classes; with more, the cells of the confusion matrix are too small for numbers
const LARGEST_MATRIX = 100;  // classes; a matrix of 1,000 would have a million cells, which stop a browser
const NUM_CONFUSIONS = 10;
const STEPS = 100;  // of the slider, from 0 to 1
const {runs, objects, kinds} = page;
const numClasses = page.classes.length, numObjects = objects.classes.length;
const MATCHED = new Set(["correct", "poor mask", "wrong class"].map(name => kinds.indexOf(name)));
const [CORRECT, IGNORED] = ["correct", "ignored"].map(name => kinds.indexOf(name));
const slider = document.getElementById("score");
let pair = null;  // [class of the object, class of the detection, run] of the clicked confusion; numClasses is none

for (const run of runs) {
  run.foundAt = new Float32Array(numObjects).fill(-1);  // score of the detection that each object is matched with
  for (let d = 0; d < run.scores.length; d++) {
    if (MATCHED.has(run.kinds[d])) run.foundAt[run.objects[d]] = run.scores[d];
  }
}

function chosenScore() {
  return Math.fround(slider.value);  // the scores are float32, too
}

function isMissed(run, object, score) {
  return !objects.crowds[object] && run.foundAt[object] < score;
}

// The number of detections of an image from a score on; they come first.
function numShown(run, row, score) {
  let end = run.offsets[row];
  while (end < run.offsets[row + 1] && run.scores[end] >= score) end++;
  return end - run.offsets[row];
}

// Precision and recall

function rate(hits, misses, count) {
  const precision = hits + misses ? hits / (hits + misses) : NaN, recall = count ? hits / count : NaN;
  return {precision, recall, f1: hits ? 2 * precision * recall / (precision + recall) : precision + recall ? 0 : NaN};
}

function rates(run, kind, score) {
  const hits = new Int32Array(numClasses), misses = new Int32Array(numClasses), verdicts = run.verdicts[kind];
  for (let d = 0; d < verdicts.length; d++) {
    if (run.scores[d] < score || verdicts[d] < 0) continue;
    (verdicts[d] ? hits : misses)[run.classes[d]]++;
  }
  const counts = run.counts[kind], sum = values => values.reduce((a, b) => a + b, 0);
  return [rate(sum(hits), sum(misses), sum(counts)), ...counts.map((count, c) => rate(hits[c], misses[c], count))];
}

// The place of the slider with the highest F1 of all classes together, and that F1.
function bestScore(run, kind) {
  const hits = new Int32Array(STEPS + 1), misses = new Int32Array(STEPS + 1), verdicts = run.verdicts[kind];
  for (let d = 0; d < verdicts.length; d++) {
    let step = Math.min(Math.floor(run.scores[d] * STEPS) + 1, STEPS);
    while (step > 0 && Math.fround(step / STEPS) > run.scores[d]) step--;
    if (verdicts[d] >= 0) (verdicts[d] ? hits : misses)[step]++;
  }
  const count = run.counts[kind].reduce((a, b) => a + b, 0);
  let best = {f1: 0, score: NaN}, numHits = 0, numMisses = 0;
  for (let step = STEPS; step >= Math.ceil(slider.min * STEPS); step--) {
    numHits += hits[step];
    numMisses += misses[step];
    const {f1} = rate(numHits, numMisses, count);
    if (f1 > best.f1) best = {f1, score: step / STEPS};
  }
  return best;
}

function decimals(value) {
  return Number.isNaN(value) ? "-" : value.toFixed(3);
}

function chosenKind() {
  return new FormData(document.getElementById("kinds")).get("kind");
}

function showRates(score) {
  const kind = chosenKind(), tables = runs.map(run => rates(run, kind, score));
  const counts = runs[0].counts[kind], total = counts.reduce((a, b) => a + b, 0);
  const line = (name, count, i) => html("tr", {}, html("td", {}, name), html("td", {class: "number"}, count),
    ...tables.flatMap(table => ["precision", "recall", "f1"].map(key =>
      html("td", {class: "number"}, decimals(table[i][key])))));
  document.querySelector("#rates tbody").replaceChildren(
    line("all", total, 0), ...counts.map((count, c) => line(chip(c), count, c + 1)));
  document.getElementById("headline").textContent = tables.map(([all], i) =>
    `${runs.length > 1 ? `${runs[i].name}: ` : ""}precision ${decimals(all.precision)}, ` +
    `recall ${decimals(all.recall)}, F1 ${decimals(all.f1)}`).join("; ");
}

function showBestScores() {
  const kind = chosenKind();
  document.getElementById("best-scores").replaceChildren(...runs.flatMap(run => {
    const {score, f1} = bestScore(run, kind);
    if (Number.isNaN(score)) return [];
    const button = html("button", {type: "button"}, `score ${score.toFixed(2)}`);
    button.addEventListener("click", () => {
      slider.value = score;
      update();
    });
    return [`${runs.length > 1 ? `${run.name}: b` : "B"}est F1 ${decimals(f1)} at `, button, " "];
  }));
}

// Confusion

// [numClasses + 1][numClasses + 1] row by row: the last column is missed objects, the last row false positives.
function confusion(run, score) {
  const side = numClasses + 1, counts = new Int32Array(side * side);
  for (let d = 0; d < run.scores.length; d++) {
    if (run.scores[d] < score || run.kinds[d] === IGNORED) continue;
    const row = MATCHED.has(run.kinds[d]) ? objects.classes[run.objects[d]] : numClasses;
    counts[row * side + run.classes[d]]++;
  }
  for (let o = 0; o < numObjects; o++) if (isMissed(run, o, score)) counts[objects.classes[o] * side + numClasses]++;
  return counts;
}

function told(truth, predicted) {
  if (truth === numClasses) return `false positives: ${className(predicted)}`;
  if (predicted === numClasses) return `missed: ${className(truth)}`;
  return `ground truth ${className(truth)}, predicted ${className(predicted)}`;
}

// The classes of the matrix, in the order of the page: all, or those with the most errors.
function matrixClasses(counts) {
  const side = numClasses + 1, errors = new Int32Array(numClasses);
  counts.forEach((count, i) => {
    const places = [Math.floor(i / side), i % side];
    if (count && places[0] !== places[1]) for (const c of places) if (c < numClasses) errors[c] += count;
  });
  const classes = Array.from(errors.keys()).sort((a, b) => errors[b] - errors[a]);
  return classes.slice(0, LARGEST_MATRIX).sort((a, b) => a - b);
}

function matrix(counts, index) {
  const side = numClasses + 1, small = numClasses > SMALL_MATRIX, classes = matrixClasses(counts);
  const names = last => [...classes.map(c => small ? named(c) : chip(c)), last], places = [...classes, numClasses];
  const lines = names("false positives").map((name, line) => {
    const truth = places[line];
    const row = counts.subarray(truth * side, (truth + 1) * side), total = row.reduce((a, b) => a + b, 0);
    const cells = places.map(predicted => {
      const count = row[predicted];
      if (truth === numClasses && predicted === numClasses) return html("td");
      const cell = html("td", {class: `cell number${count ? "" : " muted"}`}, small ? "" : count);
      if (!count) return cell;
      const share = Math.round(15 + 55 * count / total);
      const hue = truth === predicted ? "var(--accent)" : "var(--bad)";
      cell.style.background = `color-mix(in srgb, ${hue} ${share}%, transparent)`;
      fill(cell, {tabindex: 0, role: "button", title: `${told(truth, predicted)}: ${count}`,
                  "data-pair": JSON.stringify([truth, predicted, index])}, []);
      return cell;
    });
    return html("tr", {}, html("td", {}, name), ...cells);
  });
  const head = html("tr", {}, html("th"), ...names("missed").map(name => html("th", {class: "number"}, name)));
  return html("div", {class: "scroll"}, html("table", {class: small ? "small" : ""}, html("thead", {}, head),
    html("tbody", {}, ...lines)));
}

function frequentErrors(counts, index) {
  const side = numClasses + 1;
  const wrong = Array.from(counts.keys()).filter(i => counts[i] && i % (side + 1) && i % side !== numClasses && i < side * numClasses);
  wrong.sort((a, b) => counts[b] - counts[a]);
  if (!wrong.length) return html("p", {}, "No class is taken for another.");
  const name = i => i === numClasses ? "nothing" : chip(i);
  return html("div", {class: "scroll"}, html("table", {},
    html("thead", {}, html("tr", {}, html("th", {}, "ground truth"), html("th", {}, "predicted as"),
      html("th", {class: "number"}, "count"))),
    html("tbody", {}, ...wrong.slice(0, NUM_CONFUSIONS).map(i => {
      const place = [Math.floor(i / side), i % side];
      return html("tr", {}, html("td", {}, name(place[0])), html("td", {}, name(place[1])),
        html("td", {class: "number", tabindex: 0, role: "button", "data-pair": JSON.stringify([...place, index])},
          counts[i]));
    }))));
}

function showConfusion(score) {
  document.getElementById("matrices").replaceChildren(...runs.flatMap((run, index) => {
    const counts = confusion(run, score);
    const some = numClasses > LARGEST_MATRIX ? [`The ${LARGEST_MATRIX} classes with the most errors:`] : [];
    return [...(runs.length > 1 ? [html("h3", {}, run.name)] : []), ...some.map(text => html("p", {}, text)),
            matrix(counts, index), frequentErrors(counts, index)];
  }));
}

function choosePair(cell) {
  pair = JSON.parse(cell.dataset.pair);
  update();
  document.getElementById("images").scrollIntoView();
}

// Images

function itemFits(classes, size, filters) {
  return (filters.class === "" || classes.includes(Number(filters.class))) &&
    (filters.size === "" || size === Number(filters.size));
}

function detectionFits(run, d, filters) {
  const name = kinds[run.kinds[d]], matched = MATCHED.has(run.kinds[d]) ? [objects.classes[run.objects[d]]] : [];
  if (filters.kind === "any" ? name === "correct" || name === "ignored" : filters.kind && filters.kind !== name) return false;
  if (pair) {
    const truth = matched.length ? matched[0] : numClasses;
    if (name === "ignored" || truth !== pair[0] || run.classes[d] !== pair[1]) return false;
  }
  return itemFits([run.classes[d], ...matched], run.sizes[d], filters);
}

function objectFits(run, o, score, filters) {
  const missed = isMissed(run, o, score);
  if (filters.kind && (!missed || !["any", "missed"].includes(filters.kind))) return false;
  if (pair && (!missed || pair[1] !== numClasses || pair[0] !== objects.classes[o])) return false;
  return itemFits([objects.classes[o]], objects.sizes[o], filters);
}

function imageFits(row, score, filters) {
  if (!lowerNames[row].includes(filters.name)) return false;
  if (!pair && !filters.class && !filters.size && !filters.kind) return true;
  return runs.some((run, index) => {
    if ((filters.run && Number(filters.run) !== index) || (pair && pair[2] !== index)) return false;
    for (let o = objects.offsets[row]; o < objects.offsets[row + 1]; o++) {
      if (objectFits(run, o, score, filters)) return true;
    }
    const end = run.offsets[row] + numShown(run, row, score);
    for (let d = run.offsets[row]; d < end; d++) if (detectionFits(run, d, filters)) return true;
    return false;
  });
}

function count(run, row, score) {
  const counts = {correct: 0, missed: 0};
  for (let o = objects.offsets[row]; o < objects.offsets[row + 1]; o++) counts.missed += isMissed(run, o, score);
  const end = run.offsets[row] + numShown(run, row, score);
  for (let d = run.offsets[row]; d < end; d++) counts[kinds[run.kinds[d]]] = (counts[kinds[run.kinds[d]]] || 0) + 1;
  const {correct, ignored, ...wrong} = counts;
  counts.errors = Object.values(wrong).reduce((a, b) => a + b, 0);
  counts.share = correct + counts.errors ? correct / (correct + counts.errors) : 1;
  return counts;
}

function choose(filters) {
  const score = chosenScore(), rows = [];
  for (let row = 0; row < numImages; row++) if (imageFits(row, score, filters)) rows.push(row);
  if (filters.order === "file") return rows;
  if (filters.order === "name") {
    return rows.sort((a, b) => page.images.names[a] < page.images.names[b] ? -1 : 1);
  }
  const counts = rows.map(row => runs.map(run => count(run, row, score)));
  const value = {
    worst: ofRuns => -ofRuns.reduce((sum, {errors}) => sum + errors, 0),
    best: ofRuns => -ofRuns.reduce((sum, {share, correct}) => sum + share + correct / 1e6, 0),
    first: ([first, second]) => first.errors - second.errors,
    second: ([first, second]) => second.errors - first.errors,
  }[filters.order];
  const values = counts.map(value);
  return Array.from(rows.keys()).sort((a, b) => values[a] - values[b]).map(i => rows[i]);
}

function truthItems(run, row, score) {
  return placesOf(objects, row).map(o => ({
    instances: objects, index: o, kind: "truth", wrong: run && isMissed(run, o, score),
    label: `${shortName(objects.classes[o])}${objects.crowds[o] ? ", crowd" : ""}`,
  }));
}

function foundItems(run, row, score) {
  return placesOf(run, row).slice(0, numShown(run, row, score)).map(d => ({
    instances: run, index: d, kind: "found", wrong: run.kinds[d] !== CORRECT && run.kinds[d] !== IGNORED,
    label: `${shortName(run.classes[d])} ${run.scores[d].toFixed(2)}`,
  }));
}

function panels(row, filters) {
  const score = chosenScore();
  const found = runs.map(run => ({title: runs.length > 1 ? run.name : "predictions",
                                  items: filters.found ? foundItems(run, row, score) : []}));
  if (filters.beside) {
    const truth = {title: "ground truth", items: truthItems(runs.length > 1 ? null : runs[0], row, score)};
    return [...(filters.truth ? [truth] : []), ...(filters.found || !filters.truth ? found : [])];
  }
  return found.map(({title, items}, i) => ({
    title: runs.length > 1 ? title : "",
    items: [...items, ...(filters.truth ? truthItems(runs[i], row, score) : [])],
  }));
}

function caption(row) {
  return runs.map(run => {
    const {errors, share, ...counts} = count(run, row, chosenScore());
    const told = Object.entries(counts).filter(([name, number]) => number || name === "correct");
    return (runs.length > 1 ? `${run.name}: ` : "") + told.map(([name, number]) => `${number} ${name}`).join(", ");
  }).join("; ");
}

function details(row) {
  const score = chosenScore(), sizes = ["small", "medium", "large"];
  const lines = [["", "class", "score", "size", ...(runs.length > 1 ? ["run"] : []), "judged"]];
  const add = (what, instances, i, scoreText, run, judged) => lines.push(
    [what, chip(instances.classes[i]), scoreText, sizes[instances.sizes[i]], ...(runs.length > 1 ? [run] : []), judged]);
  for (const o of placesOf(objects, row)) {
    if (objects.crowds[o]) add("object", objects, o, "", "", "crowd");
    else for (const run of runs) add("object", objects, o, "", run.name, isMissed(run, o, score) ? "missed" : "found");
  }
  for (const run of runs) {
    for (const d of placesOf(run, row).slice(0, numShown(run, row, score))) {
      const name = kinds[run.kinds[d]];
      const nearest = name === "wrong class" || name === "duplicate" ? ` (${className(objects.classes[run.objects[d]])})` : "";
      add("detection", run, d, run.scores[d].toFixed(3), run.name, name + nearest);
    }
  }
  return lines;
}

// Controls

const gallery = new Gallery({choose, panels, caption, details});

function showPair() {
  const button = document.getElementById("pair");
  button.hidden = !pair;
  if (pair) button.textContent = `${told(pair[0], pair[1])}${runs.length > 1 ? `, ${runs[pair[2]].name}` : ""} \u00d7`;
}

function update() {
  const score = chosenScore();
  document.getElementById("score-value").textContent = Number(slider.value).toFixed(2);
  showRates(score);
  showConfusion(score);
  showPair();
  gallery.refresh();
}

let isWaiting = false;
slider.addEventListener("input", () => {
  if (isWaiting) return;
  isWaiting = true;
  requestAnimationFrame(() => {
    isWaiting = false;
    update();
  });
});
document.getElementById("score-bar").addEventListener("submit", event => event.preventDefault());
document.getElementById("kinds").addEventListener("change", () => {
  showRates(chosenScore());
  showBestScores();
});
document.getElementById("matrices").addEventListener("click", event => {
  const cell = event.target.closest("[data-pair]");
  if (cell) choosePair(cell);
});
document.getElementById("matrices").addEventListener("keydown", event => {
  if (!["Enter", " "].includes(event.key) || !event.target.dataset.pair) return;
  event.preventDefault();  // the space bar scrolls
  choosePair(event.target);
});
document.getElementById("pair").addEventListener("click", () => {
  pair = null;
  update();
});
document.getElementById("filters").addEventListener("reset", () => {
  pair = null;
  showPair();
});

const hasMasks = runs[0].counts.segm.some(count => count > 0);
document.querySelector(`#kinds [value=${hasMasks ? "segm" : "bbox"}]`).checked = true;
document.getElementById("pictures").classList.toggle("pairs", runs.length > 1);
showBestScores();
update();
