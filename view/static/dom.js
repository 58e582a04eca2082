// Making elements, spelling numbers and tokens, the tooltip. Data become text nodes, never markup.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

/** Make an element: attributes, `on` for listeners, `vars` for CSS custom properties. */
function el(tag, props = {}, ...children) {
  return filled(document.createElement(tag), props, children);
}

function svg(tag, props = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

function filled(node, { on = {}, vars = {}, ...attributes }, children) {
  for (const [name, what] of Object.entries(attributes)) {
    if (what !== null && what !== undefined && what !== false) node.setAttribute(name, what);
  }
  for (const [name, what] of Object.entries(on)) node.addEventListener(name, what);
  for (const [name, what] of Object.entries(vars)) node.style.setProperty(`--${name}`, what);
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** Spell a number with three digits; a dash where it is unknown. */
function num(x, signed = false) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x);
  const sign = x < 0 ? "−" : signed && x > 0 ? "+" : "";
  if (size >= 1000) return sign + Math.round(size).toLocaleString("en");
  if (size !== 0 && size < 0.001) {
    const [digits, power] = size.toExponential(1).split("e");
    return `${sign}${digits}e${power.replace("-", "−")}`;
  }
  return sign + String(Number(size.toPrecision(3)));
}

function whole(x) {
  return x === null || x === undefined ? "–" : x.toLocaleString("en");
}

function fixed(x) {
  return x === null || x === undefined ? "–" : x.toFixed(2).replace("-", "−");
}

function percent(x) {
  if (x === null || x === undefined) return "–";
  const size = Math.abs(x) * 100;
  return `${x < 0 ? "−" : ""}${size >= 10 ? Math.round(size) : Number(size.toPrecision(2))} %`;
}

/** Spell a name of the analysis as the command line does: previous_token as "previous-token". */
function words(name) {
  return name.replace(/^probe_/, "").replaceAll("_", "-");
}

const MARKS = { " ": "·", "\n": "↵", "\r": "␍", "\t": "⇥", "\u00a0": "⍽" };

/** Make every character of a token visible: marks for white space, codes for what has no shape. */
function visible(text, { spaces = true } = {}) {
  const all = spaces || text.trim() === "";
  return text.replace(/[\s\p{Cc}\p{Cf}\p{Co}\p{Cn}\p{Cs}]/gu, (c) => {
    if (c === " " && !all) return " ";
    if (c in MARKS) return MARKS[c];
    return `‹${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}›`;
  });
}

/** Make the label of a token as it stands in lists. */
function tokenLabel(token, props = {}) {
  return el("span", { class: "token", title: `token ${token}`, ...props }, visible(textOf(token)));
}

/** Make the mark of a type; grey and with a question mark where it is not sure, for the reason given. */
function typeMark(type, { sure = true, about = null } = {}) {
  return el("span", { class: sure ? "type" : "type unsure", title: about, vars: { hue: `var(--type-${type})` } }, sure ? words(type) : `${words(type)}\u00a0?`);
}

/** Make the mark of a head's own type. */
function headType(head) {
  const about = BY_ABOUT[value("type_by", head)] ?? TYPE_ABOUT[value("type", head)];
  return typeMark(value("type", head) ?? "mixed", { sure: isSure(head), about });
}

/** Say that a part needs the language model, and how to get it. */
function needsModel(what) {
  const command = "lorsa analyze RUN --store STORE --model MODEL";
  return el("p", { class: "missing" }, `${what} needs the language model: `, el("code", {}, command));
}

/** Show a tooltip of lines, [name, value] or text, below a point of the window or, if asked, above. */
function showTip(x, y, lines, { above = false } = {}) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(
    ...lines.map((line) =>
      Array.isArray(line)
        ? el("div", {}, el("span", {}, line[0]), el("b", {}, line[1]))
        : el("div", {}, line),
    ),
  );
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(4, Math.min(x + 12, window.innerWidth - width - 4));
  const fits = above ? y - height - 12 > 0 : y + 16 + height < window.innerHeight;
  const top = above === fits ? y - height - 12 : y + 16;
  tip.style.left = `${left}px`;
  tip.style.top = `${Math.max(4, top)}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}

/** Make a tooltip of a head: what it is and what it does, in a few lines. */
function headTip(head) {
  const list = (column) => (value(column, head) ?? []).map((t) => visible(textOf(t))).join("  ");
  const lines = [
    ["head", String(head)],
    ["type", `${words(value("type", head) ?? "unknown")}${isSure(head) ? "" : " ?"}`],
    ["frequency", percent(value("frequency", head))],
    ["fires on", list("fires") || "–"],
  ];
  if (list("promotes")) lines.push(["promotes", list("promotes")]);
  return lines;
}
