// The overview: what was analysed, how good it is, what kinds of heads there are.
"use strict";

const TYPE_ABOUT = { mixed: "no kind is half of what it reads", silent: "never fired" };
const START_FIRED = 20; // a head is named as an example of its type if it fired so often

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
  const counts = index.types.map((type) => [type, index.columns.type.filter((t) => t === type).length]);
  const top = Math.max(1, ...counts.map(([, n]) => n));
  return [
    el("h2", {}, "What they read"),
    el(
      "ul",
      { class: "types" },
      ...counts
        .filter(([, n]) => n > 0)
        .map(([type, n]) =>
          el(
            "li",
            {},
            el(
              "a",
              { title: TYPE_ABOUT[type] ?? `at least half ${SCORE_ABOUT[type]}`, href: `#/heads?type=${type}&sort=${index.scores.includes(type) ? "-" + type : "-frequency"}` },
              typeMark(type),
              el("span", { class: "meter", vars: { w: `${(100 * n) / top}%`, hue: `var(--type-${type})` } }),
              el("span", { class: "n" }, whole(n)),
            ),
          ),
        ),
    ),
  ];
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
  const often = (head) => (value("n_fired", head) ?? 0) >= START_FIRED;
  const fired = [...Array(index.n_heads).keys()].filter((head) => (value("n_fired", head) ?? 0) > 0);
  const pool = fired.some(often) ? fired.filter(often) : fired;
  const cards = [...index.scores, "successor"]
    .filter((id) => known(id))
    .map((kind) => [kind, known(`probe_${kind}`) ? `probe_${kind}` : kind])
    .map(([kind, id]) => {
      const best = strongest(pool, id, 3);
      return el(
        "div",
        { class: "card" },
        el("h3", {}, el("a", { href: `#/heads?sort=-${id}`, title: columnOf(id).about }, words(kind))),
        el(
          "ol",
          {},
          ...best.map((head) =>
            el(
              "li",
              {},
              el("a", { href: `#/head/${head}` }, el("b", {}, String(head)), el("span", { class: "fires" }, ...tokensOf("fires", head)), el("span", { class: "n" }, fixed(value(id, head)))),
            ),
          ),
        ),
      );
    });
  const onProbe = index.probes.some((id) => known(id));
  return el(
    "section",
    {},
    el("h2", {}, "Where to start"),
    el("p", { class: "note" }, `The strongest heads of each kind, of those that fired ${START_FIRED} times or more, with the tokens on which they fire${onProbe ? "; by what they read on random tokens repeated once, where nothing matches by chance" : ""}. Below 0.5 a head is mainly something else.`),
    el("div", { class: "cards" }, ...cards),
  );
}

/** Return the heads with the largest values of a column, in one pass. */
function strongest(heads, id, n) {
  const found = [];
  for (const head of heads) {
    const x = value(id, head);
    if (x === null || (found.length === n && x <= value(id, found[n - 1]))) continue;
    found.push(head);
    found.sort((a, b) => value(id, b) - value(id, a));
    found.splice(n);
  }
  return found;
}

function tokensOf(column, head, hits = new Set()) {
  return (value(column, head) ?? []).map((token) => tokenLabel(token, hits.has(token) ? { class: "token hit" } : {}));
}
