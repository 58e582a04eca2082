// Small charts, drawn as SVG or bars of CSS.
"use strict";

/** Draw how many heads fire how often, in bins of equal width of the logarithm. */
function frequencyHistogram(onPick) {
  const found = (index.columns.frequency ?? []).filter((f) => f > 0);
  if (found.length === 0) return el("p", { class: "missing" }, "No head fired.");
  const logs = found.map(Math.log10);
  const low = Math.floor(Math.min(...extent(logs)) * 4) / 4;
  const high = Math.max(low + 0.25, Math.ceil(Math.max(...extent(logs)) * 4) / 4);
  const n = Math.max(8, Math.min(48, Math.round((high - low) * 12)));
  const counts = new Array(n).fill(0);
  for (const log of logs) counts[Math.min(n - 1, Math.floor(((log - low) / (high - low)) * n))]++;
  const edge = (i) => low + ((high - low) * i) / n;
  return bars({
    label: "Histogram of firing frequencies",
    values: counts,
    tip: (i) => [
      `fires on ${percent(10 ** edge(i))} to ${percent(10 ** edge(i + 1))} of tokens`,
      ["heads", whole(counts[i])],
    ],
    ticks: decades(low, high).map((power) => [((power - low) / (high - low)) * n, percent(10 ** power)]),
    onPick: (i) => onPick(10 ** edge(i), 10 ** edge(i + 1)),
  });
}

function extent(values) {
  return values.reduce(([a, b], x) => [Math.min(a, x), Math.max(b, x)], [Infinity, -Infinity]);
}

/** Return the whole powers of ten in a range; the ends where there are too few. */
function decades(low, high) {
  const found = [];
  for (let power = Math.ceil(low); power <= high; power++) found.push(power);
  return found.length > 1 ? found : [low, high];
}

/** Draw bars side by side; `ticks` are [place in bars, text]. */
function bars({ label, values, tip, ticks, onPick = null, width = 430, height = 96 }) {
  const top = Math.max(...values) || 1;
  const step = width / values.length;
  const rects = values.map((x, i) => {
    const size = x > 0 ? Math.max(1.5, (x / top) * (height - 6)) : 0;
    return svg(
      "g",
      {
        class: onPick ? "bar pick" : "bar",
        on: {
          pointermove: (event) => showTip(event.clientX, event.clientY, tip(i)),
          pointerleave: hideTip,
          ...(onPick && x > 0 ? { click: () => onPick(i) } : {}),
        },
      },
      svg("rect", { class: "room", x: i * step, y: 0, width: step, height }),
      svg("rect", { class: "fill", x: i * step + 0.5, y: height - size, width: Math.max(1, step - 1), height: size }),
    );
  });
  const texts = ticks.map(([at, text]) =>
    svg("text", {
      x: Math.max(0, Math.min(width, at * step)),
      y: height + 15,
      "text-anchor": at * step < 12 ? "start" : at * step > width - 12 ? "end" : "middle",
    }, text),
  );
  return svg(
    "svg",
    { class: "bars", viewBox: `0 0 ${width} ${height + 20}`, role: "img", "aria-label": label },
    ...rects,
    svg("line", { x1: 0, x2: width, y1: height, y2: height }),
    ...texts,
  );
}

/** Draw what share is read in each bucket of distances. */
function distancePlot(shares) {
  const edges = index.distances;
  const names = edges.map((edge, i) => {
    const next = edges[i + 1];
    if (next === undefined) return `${edge} or more`;
    return next === edge + 1 ? String(edge) : `${edge} to ${next - 1}`;
  });
  return bars({
    label: `Reading by distance: ${names.map((name, i) => `${name}: ${percent(shares[i])}`).join(", ")}`,
    values: shares,
    tip: (i) => [i === 0 ? "the token itself" : `${names[i]} tokens before`, ["share", percent(shares[i])]],
    ticks: edges.map((edge, i) => [i + 0.5, edge >= 1024 ? "1k+" : String(edge)]),
    width: 350,
    height: 84,
  });
}

/** Draw a list of rows: name, one bar or two, numbers. Values are between 0 and 1. */
function scoreRows(rows) {
  return el(
    "div",
    { class: "scores" },
    ...rows.map(({ name, about, text, probe }) =>
      el(
        "div",
        { class: "kind", title: about },
        el("span", { class: "name" }, name),
        meter(text, "text"),
        el("span", { class: "n" }, fixed(text)),
        meter(probe, "probe"),
        el("span", { class: "n" }, fixed(probe)),
      ),
    ),
  );
}

function meter(x, kind) {
  return el("span", { class: `meter ${kind}`, vars: { w: `${100 * Math.max(0, Math.min(1, x ?? 0))}%` } });
}

/** Draw tokens with a value each, as bars that share a scale; what chance explains is grey. */
function tokenRows([tokens, values, z, beyond], spellValue, { tone = "pos", chance = "no better than random" } = {}) {
  const top = Math.max(...values.map(Math.abs), 1e-9);
  return el(
    "div",
    {},
    el(
      "ol",
      { class: `ranked ${tone}` },
      ...tokens.map((token, i) =>
        el(
          "li",
          { vars: { w: `${(100 * Math.abs(values[i])) / top}%` }, ...chanceMark(z, beyond, i, chance) },
          tokenLabel(token),
          el("span", { class: "n" }, spellValue(values[i])),
        ),
      ),
    ),
    chanceNote(beyond, chance),
  );
}

/** Return the class and the title of what is listed at a place: its z, and whether chance explains it. */
function chanceMark(z, beyond, i, chance = "no better than random") {
  if (!beyond) return { class: "chance", title: "not compared with chance" };
  return beyond[i] ? { title: `z ${num(z[i])}` } : { class: "chance", title: `${chance}: z ${num(z[i])}` };
}

/** Say what is grey in a list, and why. */
function chanceNote(beyond, chance = "no better than random") {
  if (beyond?.every((x) => x)) return null;
  if (!beyond) return el("p", { class: "note" }, "Not tested against chance: analyze again.");
  return el("p", { class: "note" }, beyond.some((x) => x) ? "Grey is " : "All is ", `${chance}.`);
}

/** Draw the quantiles of a head's activation on a line from 0 to its largest. */
function quantilePlot(quantiles, mean, max) {
  const top = Math.max(Math.abs(max), ...quantiles.map(Math.abs), 1e-9);
  const at = (x) => 8 + (334 * Math.abs(x)) / top;
  const mid = Math.floor(quantiles.length / 2);
  const names = index.quantiles.map((q, i) => `${percent(q)} below ${num(quantiles[i])}`);
  const tip = (event) =>
    showTip(event.clientX, event.clientY, [
      ...index.quantiles.map((q, i) => [`${percent(q)} are below`, num(quantiles[i])]),
      ["mean", num(mean)],
      ["largest", num(max)],
    ]);
  return svg(
    "svg",
    { class: "box", viewBox: "0 0 350 52", role: "img", "aria-label": `Activations: ${names.join(", ")}`, on: { pointermove: tip, pointerleave: hideTip } },
    svg("rect", { class: "room", x: 0, y: 0, width: 350, height: 52 }),
    svg("line", { x1: 8, x2: 342, y1: 16, y2: 16 }),
    svg("line", { class: "whisker", x1: at(quantiles[0]), x2: at(quantiles.at(-1)), y1: 16, y2: 16 }),
    svg("rect", { class: "fill", x: Math.min(at(quantiles[1]), at(quantiles.at(-2))), y: 8, width: Math.max(1, Math.abs(at(quantiles.at(-2)) - at(quantiles[1]))), height: 16 }),
    svg("line", { class: "median", x1: at(quantiles[mid]), x2: at(quantiles[mid]), y1: 6, y2: 26 }),
    svg("circle", { cx: at(max), cy: 16, r: 3.5 }),
    svg("text", { x: 8, y: 44 }, "0"),
    svg("text", { x: at(quantiles[mid]), y: 44, "text-anchor": "middle" }, `median ${num(quantiles[mid])}`),
    svg("text", { x: 342, y: 44, "text-anchor": "end" }, num(top)),
  );
}
