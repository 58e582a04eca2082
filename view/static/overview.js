// The overview: what was analysed, how good it is, what kinds of heads there are.
"use strict";

const TYPE_ABOUT = {
  mixed: "of no kind is it sure that it is half of what the head reads",
  rare: "fired so seldom that its kind cannot be told",
  silent: "never fired",
};

const overview = {
  /** Show the overview; `params` may hold the axes of the scatter. */
  mount(main, params) {
    const axes = numberColumns().map((column) => column.id);
    const axis = (name, otherwise) => (axes.includes(params.get(name)) ? params.get(name) : otherwise);
    const state = { x: axis("x", "frequency"), y: axis("y", "distance"), hidden: new Set() };
    main.replaceChildren(
      introduction(),
      el(
        "div",
        { class: "columns" },
        el("div", {}, ...typePanel(), ...histogramPanel()),
        el("div", {}, ...scatterPanel.call(this, state, axes)),
      ),
      startPanel(),
    );
    document.title = `Lorsa heads: ${subject()}`;
  },
  unmount() {
    this.scatter?.stop();
  },
  redraw() {
    this.scatter?.draw();
  },
};

/** Name what the page is about. */
function subject() {
  const { layer, model } = index.facts;
  const name = String(model ?? "").split("/").filter(Boolean).at(-1)?.replace(/\.gguf$/, "");
  return [layer === undefined ? "" : `layer ${layer}`, name].filter(Boolean).join(" of ") || "a Lorsa";
}

function introduction() {
  const facts = index.facts;
  const silent = index.columns.type.filter((type) => type === "silent").length;
  const rows = [
    ["heads", whole(index.n_heads), facts.n_qk_heads ? `in ${whole(facts.n_qk_heads)} QK heads` : ""],
    ["L0", num(facts.l0), `fire per token${facts.top_k ? `, top_k ${facts.top_k}` : ""}`],
    ["FVU", num(facts.fvu), "of the layer's output, unexplained"],
    ["silent", whole(silent), `${percent(silent / Math.max(1, index.n_heads))} of heads never fired`],
    ["tokens read", whole(facts.n_tokens), facts.n_ctx ? `in sequences of ${whole(facts.n_ctx)}` : ""],
  ];
  return el(
    "section",
    { class: "intro" },
    el("h1", {}, `Heads of ${subject()}`),
    el(
      "p",
      {},
      `A Lorsa stands in for the attention of ${subject()}: ${whole(index.n_heads)} heads, each of which reads one ` +
        "direction of earlier tokens and writes one. The page shows where each of them fired, from which tokens it read, and what it did with that.",
    ),
    el(
      "dl",
      { class: "facts" },
      ...rows.map(([name, number, note]) => el("div", {}, el("dt", {}, name), el("dd", {}, number), el("dd", { class: "note" }, note))),
    ),
  );
}

function typePanel() {
  const heads = [...Array(index.n_heads).keys()];
  const counts = index.types.map((type) => {
    const mine = heads.filter((head) => value("type", head) === type);
    return { type, all: mine.length, sure: mine.filter(isSure).length };
  });
  const top = Math.max(1, ...counts.map(({ all }) => all));
  const unsure = counts.some(({ all, sure }) => sure < all);
  return [
    el("h2", {}, "What they read"),
    el("ul", { class: "types" }, ...counts.filter(({ all }) => all > 0).map((count) => typeRow(count, top))),
    unsure
      ? el("p", { class: "note" }, index.facts.with_model ? "Grey: text and probes do not both say so. Probes are random tokens repeated once, where nothing matches by chance." : "Grey: by text alone, where much matches by chance. Probes need the language model: lorsa analyze RUN --model MODEL.")
      : null,
  ].filter((part) => part !== null);
}

function typeRow({ type, all, sure }, top) {
  const isKind = index.scores.includes(type);
  const family = index.facts.families?.[type];
  const n = sure === all ? [whole(all)] : [whole(sure), el("span", {}, ` of ${whole(all)}`)];
  return el(
    "li",
    {},
    el(
      "a",
      { title: TYPE_ABOUT[type] ?? `at least half of its reading is ${SCORE_ABOUT[type]}, ${WHERE_OFFERED}`, href: `#/heads?type=${type}&sort=${isKind ? "-trust" : "-frequency"}` },
      el("span", {}, typeMark(type), verifiedMark(family)),
      el("span", { class: "meter", vars: { w: `${(100 * sure) / top}%`, all: `${(100 * all) / top}%`, hue: `var(--type-${type})` } }),
      el("span", { class: "n" }, ...n),
    ),
  );
}

/** Make the mark of a family whose heads do, all together, what their type says; else nothing. */
function verifiedMark(family) {
  if (!family?.verified) return null;
  const about =
    `Verified: without these ${whole(family.n_heads)} heads the model copies worse. On random tokens repeated once the loss of the second half rises by ` +
    `${num(family.effect)} nats (at least ${num(family.low)} more than without as many other heads that write as much: ${num(Math.max(...family.null))} at most, ${family.null.length} draws).`;
  return el("span", { class: "verified", title: about, "aria-label": about }, " ✓");
}

function histogramPanel() {
  return [
    el("h2", {}, "How often they fire"),
    frequencyHistogram((low, high) => go(`#/heads?frequency=${low.toPrecision(3)}..${high.toPrecision(3)}&sort=-frequency`)),
    el("p", { class: "note" }, "Share of tokens, logarithmic. A bar opens its heads."),
  ];
}

/** Make the scatter with its choices of axes; the axes go into the address. */
function scatterPanel(state, axes) {
  if (axes.length < 2 || !axes.includes(state.x) || !axes.includes(state.y)) {
    return [el("h2", {}, "Heads as points"), el("p", { class: "missing" }, "No head fired.")];
  }
  this.scatter = makeScatter(state, (head) => go(`#/head/${head}`));
  const choose = (name) =>
    el(
      "label",
      {},
      el("span", {}, name),
      el(
        "select",
        {
          on: {
            change: (event) => {
              state[name] = event.target.value;
              history.replaceState(null, "", `#/?x=${state.x}&y=${state.y}`);
              this.scatter.draw();
            },
          },
        },
        ...axes.map((id) => el("option", { value: id, selected: id === state[name] ? "" : null }, columnOf(id).label)),
      ),
    );
  const toggles = index.types
    .filter((type) => type !== "silent" && index.columns.type.includes(type))
    .map((type) =>
      el(
        "button",
        {
          type: "button",
          "aria-pressed": "true",
          on: {
            click: ({ currentTarget }) => {
              const shown = state.hidden.delete(type) || !state.hidden.add(type);
              currentTarget.setAttribute("aria-pressed", String(shown));
              this.scatter.draw();
            },
          },
        },
        typeMark(type),
      ),
    );
  return [
    el("div", { class: "title" }, el("h2", {}, "Heads as points"), el("div", { class: "axes" }, choose("x"), choose("y"))),
    this.scatter.frame,
    el("div", { class: "legend", role: "group", "aria-label": "Types shown" }, ...toggles),
  ];
}

function startPanel() {
  const on = index.facts.with_model ? "in text and on random tokens repeated once, whichever is smaller" : "in text alone (probes need the language model)";
  const none = index.starts.filter(({ heads, best }) => best !== null && heads.length === 0);
  return el(
    "section",
    {},
    el("h2", {}, "Where to start"),
    el("p", { class: "note" }, `The heads that are surest of their kind: by the share of their reading ${on}, by a lower bound. Below 0.5 a head is mainly something else.`),
    el("div", { class: "cards" }, ...index.starts.filter(({ heads }) => heads.length).map(startCard)),
    none.length ? el("p", { class: "note none-here" }, ...none.flatMap(noneHere)) : null,
  );
}

function startCard({ kind, heads, scores }) {
  const request = index.scores.includes(kind) ? `type=${kind}&sort=-trust` : `sort=-${kind}`;
  return el(
    "div",
    { class: "card" },
    el("h3", {}, el("a", { href: `#/heads?${request}`, title: columnOf(kind).about }, words(kind)), verifiedMark(index.facts.families?.[kind])),
    el(
      "ol",
      {},
      ...heads.map((head, i) =>
        el("li", {}, el("a", { href: `#/head/${head}`, title: sharesOf(kind, head) }, el("b", {}, String(head)), el("span", { class: "fires" }, ...tokensOf("fires", head)), el("span", { class: "n" }, fixed(scores[i])))),
      ),
    ),
  );
}

/** Spell the shares that a head is of a kind by. */
function sharesOf(kind, head) {
  const probe = value(`probe_${kind}`, head);
  return `${fixed(value(kind, head))} ${kind === "successor" ? "of the ordinal words it reads" : "in text"}${probe === null ? "" : `, ${fixed(probe)} on probes`}`;
}

/** Say that no head is of a kind: the best is not half of it, or has a nearer name, as induction is often long-range. */
function noneHere({ kind, best }, i) {
  return [i ? "; " : "None here: ", el("b", {}, words(kind)), best < 0.5 ? ` (best ${fixed(best)})` : " (those that are have a nearer name)"];
}

function tokensOf(column, head, hits = new Set()) {
  return (value(column, head) ?? []).map((token) => tokenLabel(token, hits.has(token) ? { class: "token hit" } : {}));
}
