// A context: the text around a token on which a head fired, the tokens it read shaded by what they
// contributed, and joined with it by arcs.
"use strict";

const MAX_ARCS = 10;
const GOES_ON = "\u207a"; // a superscript plus
const MIN_SHARE = 0.05; // of the largest contribution: smaller ones have no arc until pointed at

/** Make a list of contexts; `top` is the head's largest activation. */
function contextList(contexts, top) {
  return el("ol", { class: "contexts" }, ...contexts.map((context) => makeContext(context, top)));
}

function makeContext(context, top) {
  const { act, rest, quantile, seq, position, document: name, sources, source_acts: given } = context;
  const shown = new Set(context.parts.flatMap(([start, ids]) => ids.map((_, i) => start + i)));
  const outside = sources.map((source, i) => [source, given[i]]).filter(([source]) => !shown.has(source));
  const text = makeText(context, top);
  const meta = el(
    "div",
    { class: "meta" },
    el("span", { class: "act", title: "activation" }, num(act)),
    el("span", { class: "meter", vars: { w: `${Math.min(100, (100 * Math.abs(act)) / Math.max(1e-9, Math.abs(top ?? act)))}%` } }),
    quantile !== null && quantile < 1 ? el("span", {}, `above ${percent(quantile)} of its firings`) : null,
    el("span", { class: "where" }, el("span", { class: "document" }, name ?? "no document"), ` · sequence ${whole(seq)}, position ${whole(position)}`),
  );
  const notes = [];
  if (outside.length) {
    const sum = outside.reduce((total, [, x]) => total + x, 0);
    notes.push(`${outside.length} more ${outside.length === 1 ? "source" : "sources"} ${num(sum, true)}`);
  }
  if (rest) notes.push(`all other tokens ${num(rest, true)}`);
  if (notes.length) meta.append(el("span", { class: "rest" }, notes.join(" · ")));
  return el("li", { class: "context" }, text, meta);
}

/** Make the text with its tokens; arcs are drawn once it has its place. */
function makeText(context, top) {
  const { position, sources, source_acts: given, act } = context;
  const contribution = new Map(sources.map((source, i) => [source, given[i]]));
  const largest = Math.max(...given.map(Math.abs), 1e-9);
  const text = el("div", { class: "text" });
  const spelled = spellJoined(context);
  let end = 0;
  for (const [start, ids] of context.parts) {
    const gap = start - end;
    if (gap > 0) text.append(el("span", { class: "gap" }, `… ${whole(gap)} ${gap === 1 ? "token" : "tokens"} …`));
    ids.forEach((token, i) => {
      const words = spelled.get(start + i) ?? textOf(token);
      if (i > 0 && startsWithSpace(words)) text.append(" "); // unshaded, so that shades hug the words
      text.append(makeToken({ token, words, at: start + i, position, act, top, given: contribution.get(start + i), largest }));
    });
    end = start + ids.length;
  }
  text.addEventListener("keydown", moveAmongSources);
  text.prepend(svg("svg", { class: "arcs", "aria-hidden": "true" }));
  text.context = { ...context, contribution, largest };
  return text;
}

/** Return how tokens are shown that share characters: all of them at the first, then marks. */
function spellJoined({ joined = [], parts }) {
  const spelled = new Map();
  for (const [first, n, words] of joined) {
    for (let i = 0; i < n; i++) spelled.set(first + i, i === 0 ? words : GOES_ON);
    for (const [start] of parts) if (start > first && start < first + n) spelled.set(start, words); // cut there
  }
  return spelled;
}

function startsWithSpace(words) {
  return /^ \S/.test(words);
}

function makeToken({ token, words, at, position, act, top, given, largest }) {
  const fired = at === position;
  const node = el("span", { class: "tok", "data-at": at, "data-token": token }, visible(words.replace(/^ (?=\S)/, ""), { spaces: false }));
  if (given !== undefined) {
    node.classList.add("source", given < 0 ? "neg" : "pos");
    node.style.setProperty("--w", `${(8 + 44 * Math.sqrt(Math.abs(given) / largest)).toFixed(0)}%`);
  }
  if (fired) {
    node.classList.add("fired");
    node.style.setProperty("--a", `${Math.min(60, 15 + (45 * Math.abs(act)) / Math.max(1e-9, Math.abs(top ?? act))).toFixed(0)}%`);
  }
  if (fired || given !== undefined) {
    node.tabIndex = fired ? 0 : -1;
    node.setAttribute("role", "img");
    node.setAttribute("aria-label", tokenTip({ token, at, position, act, given }).map((l) => (Array.isArray(l) ? l.join(" ") : l)).join(", "));
  }
  return node;
}

function tokenTip({ token, at, position, act, given }) {
  const lines = [["token", `${visible(textOf(token))}  (${token})`]];
  const before = position - at;
  lines.push(["position", `${whole(at)}${before > 0 ? `, ${whole(before)} before` : before < 0 ? `, ${whole(-before)} after` : ""}`]);
  if (before === 0) lines.push(["fires with", num(act)]);
  if (given !== undefined) {
    lines.push(["contributes", num(given, true)]);
    if (act) lines.push(["share", percent(given / act)]);
  }
  return lines;
}

/** Left and right go to the source, or the firing token, before and after. */
function moveAmongSources(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by) return;
  event.preventDefault();
  const stops = [...event.currentTarget.querySelectorAll("[tabindex]")];
  const at = stops.indexOf(document.activeElement);
  stops[Math.max(0, Math.min(stops.length - 1, at + by))]?.focus();
}

/** Draw the arcs of all texts inside an element; places are measured first, then written. */
function drawArcs(root) {
  const drawn = [...root.querySelectorAll(".text")].map((text) => [text.querySelector(".arcs"), measureArcs(text)]);
  for (const [canvas, paths] of drawn) canvas.replaceChildren(...paths);
}

function measureArcs(text) {
  const { position, sources, source_acts: given, largest } = text.context;
  const box = text.getBoundingClientRect();
  const spot = (at) => {
    const rect = text.querySelector(`[data-at="${at}"]`)?.getClientRects()[0];
    return rect && { x: rect.left + rect.width / 2 - box.left, y: rect.top - box.top + 1 };
  };
  const to = spot(position);
  return sources.flatMap((source, i) => {
    const from = spot(source);
    if (!from || !to) return [];
    const small = i >= MAX_ARCS || Math.abs(given[i]) < MIN_SHARE * largest;
    return svg("path", {
      d: arcPath(from, to),
      class: `arc ${given[i] < 0 ? "neg" : "pos"}${small ? " small" : ""}`,
      "data-source": source,
      "stroke-width": (0.75 + (2.5 * Math.abs(given[i])) / largest).toFixed(2),
    });
  });
}

/** Return the path from a source to the firing token: an arc in the space above the line. */
function arcPath(from, to) {
  const f = (x) => x.toFixed(1);
  if (from.x === to.x && from.y === to.y) {
    return `M${f(to.x - 5)} ${f(to.y)}C${f(to.x - 9)} ${f(to.y - 13)} ${f(to.x + 9)} ${f(to.y - 13)} ${f(to.x + 5)} ${f(to.y)}`;
  }
  const up = Math.min(17, 7 + Math.abs(to.x - from.x) / 22);
  const bend = Math.min(26, Math.abs(to.x - from.x) / 3) * Math.sign(to.x - from.x);
  return `M${f(from.x)} ${f(from.y)}C${f(from.x + bend)} ${f(from.y - up)} ${f(to.x - bend)} ${f(to.y - up)} ${f(to.x)} ${f(to.y)}`;
}

/** Show values of the token under the pointer or in focus, and its arc alone. */
function watchTokens(root) {
  const enter = (event) => {
    const node = event.target.closest?.(".tok");
    if (!node) return;
    const text = node.closest(".text");
    const { position, act, contribution } = text.context;
    const at = Number(node.dataset.at);
    const rect = node.getBoundingClientRect();
    const lines = tokenTip({ token: Number(node.dataset.token), at, position, act, given: contribution.get(at) });
    showTip(rect.left, rect.top - 8, lines, { above: true }); // what it gave to lies mostly below
    const one = contribution.has(at) && at !== position;
    text.classList.toggle("one", one);
    text.classList.toggle("all", at === position);
    for (const arc of text.querySelectorAll(".arc")) arc.classList.toggle("on", Number(arc.dataset.source) === at);
  };
  const leave = (event) => {
    const text = event.target.closest?.(".text");
    if (!text) return;
    hideTip();
    text.classList.remove("one", "all");
  };
  root.addEventListener("pointerover", enter);
  root.addEventListener("pointerout", leave);
  root.addEventListener("focusin", enter);
  root.addEventListener("focusout", leave);
}
