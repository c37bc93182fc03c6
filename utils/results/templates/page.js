"use strict";
const entries = JSON.parse(document.getElementById("data").textContent);
entries.forEach((entry, position) => { entry.position = position; });
const PER_PAGE = 60;
const MOST_CROPS = 200;
const SVG = "http://www.w3.org/2000/svg";
const state = { page: 0, shown: [], open: -1 };
const byId = (id) => document.getElementById(id);

function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function threshold() { return Number(byId("threshold").value); }

function kinds() {
  const boxes = document.querySelectorAll("input[name=kind]");
  return boxes.length ? new Set([...boxes].filter((box) => box.checked).map((box) => box.value)) : null;
}

function isVisible(face, least, shown) {
  if (shown && !shown.has(face.kind)) return false;
  if (face.score !== undefined) return face.score >= least;
  // A labelled face is missed where the prediction that finds it, if any, is below the threshold.
  return face.found === undefined || face.found < least;
}

// The faces that pass the controls are computed once per change of the controls.
function filterFaces() {
  const least = threshold(), shown = kinds();
  for (const entry of entries) entry.visible = (entry.faces || []).filter((face) => isVisible(face, least, shown));
}

function height(face) { return face.box[3] - face.box[1]; }

const ORDERS = {
  position: (entry) => entry.position,
  faces: (entry) => -entry.visible.length,
  smallest: (entry) => Math.min(Infinity, ...entry.visible.map(height)),
  lowest: (entry) => Math.min(Infinity, ...entry.visible.map((face) => face.score ?? Infinity)),
  skipped: (entry) => (entry.skipped === undefined ? 1 : 0),
  mistakes: (entry) => -entry.visible.filter((face) => face.kind === "false" || face.kind === "missed").length,
};

function overlay(entry, faces) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${entry.width} ${entry.height}`);
  svg.setAttribute("aria-hidden", "true");
  for (const face of faces) {
    const [x1, y1, x2, y2] = face.box;
    const box = document.createElementNS(SVG, "rect");
    const values = { x: x1, y: y1, width: Math.max(0, x2 - x1), height: Math.max(0, y2 - y1) };
    for (const [name, value] of Object.entries(values)) box.setAttribute(name, value);
    box.setAttribute("class", face.kind || "face");
    svg.append(box);
    for (const [x, y] of face.landmarks || []) {
      const dot = document.createElementNS(SVG, "circle");
      dot.setAttribute("cx", x);
      dot.setAttribute("cy", y);
      dot.setAttribute("r", Math.max(0.5, (x2 - x1) / 28));
      dot.setAttribute("class", "landmark");
      svg.append(dot);
    }
  }
  return svg;
}

const KIND_WORDS = { hit: "found", false: "false", missed: "missed" };

function countFaces(faces) {
  if (!kinds()) return `${faces.length} ${faces.length === 1 ? "face" : "faces"}`;
  const counts = Object.entries(KIND_WORDS).map(([kind, word]) => [faces.filter((face) => face.kind === kind).length, word]);
  return counts.filter(([count]) => count).map(([count, word]) => `${count} ${word}`).join(", ") || "no faces";
}

function describe(entry, faces) {
  if (entry.skipped !== undefined) return "skipped";
  const words = [countFaces(faces), `${entry.width}x${entry.height}`];
  if (entry.seconds !== undefined) words.push(`${entry.seconds.toFixed(2)} s`);
  return words.join(", ");
}

function card(entry) {
  const faces = entry.visible;
  const frame = element("div", { className: "frame" });
  if (entry.skipped === undefined) {
    frame.append(element("img", { src: entry.thumbnail, alt: "", loading: "lazy", decoding: "async" }));
    frame.append(overlay(entry, faces));
  } else {
    frame.append(element("div", { className: "skipped", textContent: entry.skipped }));
  }
  const caption = element("div", { className: "caption" },
    element("b", { textContent: entry.name, title: entry.name }),
    element("span", { textContent: describe(entry, faces) }));
  const button = element("button", { type: "button", className: "card" }, frame, caption);
  button.addEventListener("click", () => open(state.shown.indexOf(entry)));
  return button;
}

function refresh({ keepPage = false } = {}) {
  const wanted = byId("search").value.toLowerCase();
  const order = ORDERS[byId("sort").value];
  byId("threshold-value").textContent = threshold().toFixed(2);
  filterFaces();
  state.shown = entries
    .filter((entry) => entry.name.toLowerCase().includes(wanted))
    .map((entry) => [order(entry), entry])
    .sort((a, b) => (a[0] === b[0] ? a[1].position - b[1].position : a[0] < b[0] ? -1 : 1))
    .map((pair) => pair[1]);
  const pages = Math.max(1, Math.ceil(state.shown.length / PER_PAGE));
  state.page = keepPage ? Math.min(state.page, pages - 1) : 0;
  draw(pages);
}

function draw(pages) {
  const first = state.page * PER_PAGE;
  const part = state.shown.slice(first, first + PER_PAGE);
  byId("grid").replaceChildren(...part.map(card));
  const faces = state.shown.flatMap((entry) => entry.visible);
  const range = part.length ? `${first + 1} to ${first + part.length} of ` : "";
  byId("count").textContent = `Images ${range}${state.shown.length}; in all of them ${countFaces(faces)}`;
  const near = [...Array(pages).keys()].filter((page) =>
    page === 0 || page === pages - 1 || Math.abs(page - state.page) <= 3);
  byId("pager").replaceChildren(...(pages > 1 ? near : []).map((page) => {
    const button = element("button", { type: "button", textContent: String(page + 1) });
    if (page === state.page) button.setAttribute("aria-current", "page");
    button.addEventListener("click", () => turn(page));
    return button;
  }));
}

function turn(page) {
  const pages = Math.max(1, Math.ceil(state.shown.length / PER_PAGE));
  state.page = Math.min(Math.max(0, page), pages - 1);
  draw(pages);
  window.scrollTo({ top: 0 });
}

function faceCard(face, image, index) {
  const [x1, y1, x2, y2] = face.box;
  const canvas = element("canvas", { width: 128, height: 128 });
  const side = Math.max(x2 - x1, y2 - y1, 1) * 1.3;
  const left = (x1 + x2 - side) / 2, top = (y1 + y2 - side) / 2;
  const scale = image.naturalWidth / Number(image.dataset.width);
  canvas.getContext("2d").drawImage(image, left * scale, top * scale, side * scale, side * scale, 0, 0, 128, 128);
  const size = `${Math.round(x2 - x1)}x${Math.round(y2 - y1)} px`;
  const score = face.score === undefined ? "missed" : face.score.toFixed(3);
  const images = element("div", {}, canvas);
  for (const [kind, url] of Object.entries(face.files || {})) {
    images.append(element("img", { src: url, alt: kind, title: kind, loading: "lazy" }));
  }
  const node = element("div", { className: "crop" }, images);
  node.append(element("span", { textContent: `${index + 1}: ${score}`, className: face.kind || "" }));
  if (face.track !== undefined) node.append(element("span", { textContent: `track ${face.track}` }));
  node.append(element("span", { textContent: size }));
  return node;
}

function open(index) {
  if (index < 0 || index >= state.shown.length) return;
  state.open = index;
  const entry = state.shown[index];
  byId("viewer-name").textContent = `${entry.name} (${describe(entry, entry.visible)})`;
  const stage = byId("viewer-stage"), list = byId("viewer-faces");
  stage.replaceChildren();
  list.replaceChildren();
  if (entry.skipped !== undefined) {
    stage.removeAttribute("style");
    stage.append(element("p", { className: "skipped", textContent: entry.skipped }));
  } else {
    const faces = entry.visible;
    stage.style.aspectRatio = `${entry.width} / ${entry.height}`;
    stage.style.width = `min(100%, ${(62 * entry.width) / entry.height}vh)`;
    const image = element("img", { alt: entry.name });
    image.dataset.width = entry.width;
    image.addEventListener("load", () => {
      if (state.open !== index) return;
      list.replaceChildren(...faces.slice(0, MOST_CROPS).map((face, i) => faceCard(face, image, i)));
      if (faces.length > MOST_CROPS) list.append(`and ${faces.length - MOST_CROPS} more`);
    });
    // The original may have been moved; the thumbnail lies beside this page.
    image.addEventListener("error", () => { image.src = entry.thumbnail; }, { once: true });
    image.src = entry.source;
    stage.append(image, overlay(entry, faces));
  }
  if (!byId("viewer").open) byId("viewer").showModal();
}

let isWaiting = false;
byId("threshold").addEventListener("input", () => {
  if (isWaiting) return; // a slider reports more changes than a screen shows
  isWaiting = true;
  requestAnimationFrame(() => { isWaiting = false; refresh({ keepPage: true }); });
});
for (const id of ["sort", "search"]) byId(id).addEventListener("input", () => refresh());
for (const box of document.querySelectorAll("input[name=kind]")) {
  box.addEventListener("input", () => refresh({ keepPage: true }));
}
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("previous").addEventListener("click", () => open(state.open - 1));
byId("next").addEventListener("click", () => open(state.open + 1));
byId("close").addEventListener("click", () => byId("viewer").close());
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input, select")) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  event.preventDefault();
  if (byId("viewer").open) open(state.open + step);
  else turn(state.page + step);
});
refresh();
