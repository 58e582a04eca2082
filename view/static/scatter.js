// The scatter of heads: a point each, on a canvas, so that tens of thousands are drawn at once.
"use strict";

const MARGIN = { left: 52, right: 12, top: 10, bottom: 36 };

/** Make the scatter; `state` is {x, y, hidden: Set of types}, `onOpen` is called with the head clicked. */
function makeScatter(state, onOpen) {
  const canvas = el("canvas", { role: "img", tabindex: "-1" });
  const frame = el("div", { class: "scatter" }, canvas);
  let points = [];

  const draw = () => {
    const { clientWidth: width, clientHeight: height } = frame;
    if (width === 0) return;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    const [x, y] = [makeAxis(state.x, MARGIN.left, width - MARGIN.right), makeAxis(state.y, height - MARGIN.bottom, MARGIN.top)];
    canvas.setAttribute("aria-label", `Heads by ${x.column.label} and ${y.column.label}; the table of heads has the same numbers`);
    drawAxes(pen, x, y, width, height);
    points = placePoints(x, y, state.hidden);
    drawPoints(pen, points);
  };

  const nearest = (event) => {
    const box = canvas.getBoundingClientRect();
    return nearestPoint(points, event.clientX - box.left, event.clientY - box.top);
  };
  canvas.addEventListener("pointermove", (event) => {
    const point = nearest(event);
    canvas.classList.toggle("on", point !== null);
    if (point === null) return hideTip();
    showTip(event.clientX, event.clientY, [
      ...headTip(point.head),
      [columnOf(state.x).label, spell(columnOf(state.x), value(state.x, point.head))],
      [columnOf(state.y).label, spell(columnOf(state.y), value(state.y, point.head))],
    ]);
  });
  canvas.addEventListener("pointerleave", hideTip);
  canvas.addEventListener("click", (event) => {
    const point = nearest(event);
    if (point !== null) onOpen(point.head);
  });
  const watch = new ResizeObserver(draw);
  watch.observe(frame);
  return { frame, draw, stop: () => watch.disconnect() };
}

/** Return a scale of a column's known values onto pixels, with its ticks. */
function makeAxis(id, from, to) {
  const column = columnOf(id);
  const values = index.columns[id].filter((v) => v !== null && (!column.log || v > 0));
  const map = column.log ? Math.log10 : (v) => v;
  let [low, high] = values.length ? extent(values).map(map) : [0, 1];
  if (column.kind === "score") [low, high] = [Math.min(0, low), Math.max(1, high)];
  if (high === low) high = low + 1;
  const pad = (high - low) * 0.03;
  [low, high] = [low - pad, high + pad];
  const place = (v) => (column.log && !(v > 0) ? null : from + ((map(v) - low) / (high - low)) * (to - from));
  const ticks = column.log ? decades(low, high).map((p) => 10 ** p) : roundTicks(low, high);
  return { column, place, ticks };
}

function roundTicks(low, high) {
  const rough = (high - low) / 5;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((m) => m * power >= rough);
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high; v += step) found.push(Number(v.toPrecision(10)));
  return found;
}

function drawAxes(pen, x, y, width, height) {
  const style = getComputedStyle(document.documentElement);
  pen.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  pen.lineWidth = 1;
  pen.strokeStyle = style.getPropertyValue("--line");
  pen.fillStyle = style.getPropertyValue("--dim");
  const bottom = height - MARGIN.bottom;
  pen.textAlign = "center";
  for (const tick of x.ticks) {
    const at = Math.round(x.place(tick)) + 0.5;
    line(pen, at, MARGIN.top, at, bottom);
    pen.fillText(spellTick(x.column, tick), Math.min(at, width - 18), bottom + 14);
  }
  pen.textAlign = "right";
  for (const tick of y.ticks) {
    const at = Math.round(y.place(tick)) + 0.5;
    line(pen, MARGIN.left, at, width - MARGIN.right, at);
    pen.fillText(spellTick(y.column, tick), MARGIN.left - 6, at + 4);
  }
  pen.fillText(`${x.column.label} →`, width - MARGIN.right, height - 6);
  pen.textAlign = "left";
  pen.fillText(`↑ ${y.column.label}`, 4, height - 6);
}

function spellTick(column, tick) {
  return column.kind === "score" ? num(tick) : spell(column, tick);
}

function line(pen, x1, y1, x2, y2) {
  pen.beginPath();
  pen.moveTo(x1, y1);
  pen.lineTo(x2, y2);
  pen.stroke();
}

function placePoints(x, y, hidden) {
  const found = [];
  for (let head = 0; head < index.n_heads; head++) {
    const [a, b] = [value(x.column.id, head), value(y.column.id, head)];
    if (a === null || b === null || hidden.has(value("type", head))) continue;
    const [px, py] = [x.place(a), y.place(b)];
    if (px !== null && py !== null) found.push({ head, x: px, y: py });
  }
  return found;
}

/** Draw points type by type, the last types below; small and translucent where there are many. */
function drawPoints(pen, points) {
  const style = getComputedStyle(document.documentElement);
  const radius = points.length > 8000 ? 1.4 : points.length > 1500 ? 1.9 : 2.8;
  pen.globalAlpha = points.length > 8000 ? 0.45 : points.length > 1500 ? 0.6 : 0.8;
  for (const type of ["unsure", ...[...index.types].reverse()]) {
    pen.fillStyle = style.getPropertyValue(`--type-${type}`);
    pen.beginPath();
    for (const { head, x, y } of points) {
      if ((isSure(head) ? value("type", head) : "unsure") !== type) continue;
      pen.moveTo(x + radius, y);
      pen.arc(x, y, radius, 0, 7);
    }
    pen.fill();
  }
}

function nearestPoint(points, x, y) {
  let found = null;
  let best = 12 * 12;
  for (const point of points) {
    const far = (point.x - x) ** 2 + (point.y - y) ** 2;
    if (far < best) [best, found] = [far, point];
  }
  return found;
}
