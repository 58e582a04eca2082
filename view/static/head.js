// The page of one head.
"use strict";

const headView = {
  /** Show a head; `head` is its number. */
  async mount(main, head) {
    this.head = head;
    if (!(head >= 0 && head < index.n_heads)) {
      main.replaceChildren(el("p", { class: "missing" }, `Head ${head} is not there; heads are 0 to ${index.n_heads - 1}.`));
      return;
    }
    const found = await loadHead(head);
    if (this.head !== head) return; // another one was asked for meanwhile
    table.chosen = head;
    document.title = `Head ${head} of ${subject()}`;
    const contexts = el("div", { class: "main" }, ...contextPanels(head, found));
    main.replaceChildren(headTitle(head, found.explained), el("div", { class: "head" }, contexts, el("aside", {}, ...sidePanels(head, found))));
    window.scrollTo(0, 0);
    watchTokens(contexts);
    this.watch = new ResizeObserver(() => drawArcs(contexts));
    this.watch.observe(contexts);
  },
  unmount() {
    this.head = null;
    this.watch?.disconnect();
  },
};

function headTitle(head, explained) {
  const step = (by, mark, key) => {
    const next = table.neighbour(head, by);
    return el("a", next === null ? { class: "step", "aria-disabled": "true" } : { class: "step", href: `#/head/${next}`, title: `Head ${next} (${key})`, "aria-label": `${by < 0 ? "Previous" : "Next"} head, ${next}` }, mark);
  };
  const v = (column) => value(column, head);
  const every = v("frequency") ? `one token in ${whole(Math.round(1 / v("frequency")))}` : "never fired";
  const facts = [
    ["frequency", percent(v("frequency")), every],
    ["fired", whole(v("n_fired")), "times"],
    ["mean act", num(v("mean_act")), `largest ${num(v("max_act"))}`],
    ["distance", num(v("distance")), "tokens back, on average"],
    ["entropy", num(v("entropy")), "nats, of what it reads"],
    ["writes", num(v("norm_o")), "‖w_O‖"],
    ["reads", num(v("norm_v")), "‖w_V‖"],
  ];
  return el(
    "section",
    { class: "intro" },
    el(
      "div",
      { class: "title" },
      el("h1", {}, `Head ${head}`),
      headType(head),
      isSure(head) ? null : el("span", { class: "note by" }, BY_ABOUT[v("type_by")].split(":")[0]),
      el("a", { class: "quiet", href: `#/heads?qk_head=${v("qk_head")}` }, `QK head ${v("qk_head") ?? "–"}`),
      el("nav", { "aria-label": "Heads" }, step(-1, "←", "["), step(1, "→", "]")),
    ),
    ...(explained ? [explanation(explained)] : []),
    el("dl", { class: "facts" }, ...facts.map(([name, number, note]) => el("div", {}, el("dt", {}, name), el("dd", {}, number), el("dd", { class: "note" }, note)))),
  );
}

function explanation({ text, model, score, n_scored: n }) {
  const scored = score === null ? "not scored" : `score ${num(score)} on ${whole(n)} contexts, 0.5 is a guess`;
  return el("p", { class: "explained" }, text, el("span", { class: "note" }, ` – ${model}, ${scored}`));
}

function contextPanels(head, { top, sample }) {
  if (!value("n_fired", head)) {
    const read = index.facts.n_tokens ? ` on the ${whole(index.facts.n_tokens)} tokens that were read` : "";
    return [el("p", { class: "missing" }, `This head never fired${read}.`)];
  }
  const largest = value("max_act", head);
  const falling = [...sample].sort((a, b) => Math.abs(b.act) - Math.abs(a.act));
  const legend = el("p", { class: "note legend-line" },
    el("span", { class: "tok fired" }, "fires"), " here, having read ", el("span", { class: "tok source pos" }, "what adds"), " and ", el("span", { class: "tok source neg" }, "what takes away"), ". The arcs are as thick as the contributions.");
  const panels = [el("h2", {}, "Where it fires most"), legend, contextList(top, largest)];
  if (falling.length) {
    panels.push(el("h2", {}, "Samples of all its firings"), el("p", { class: "note" }, "From strong to weak."), contextList(falling, largest));
  }
  return panels;
}

function sidePanels(head, found) {
  const { by_distance: byDistance, act_quantiles: quantiles } = found;
  return [
    panel("What it reads, by kind", scorePanel(head, found.low ?? {})),
    panel("How far back", byDistance ? distancePlot(byDistance) : silence("It read nothing.")),
    panel("Heads of the model it comes from", parentPanel(found.parents)),
    panel("Makes likelier", found.promoted ? tokenRows(found.promoted, (x) => num(x, true)) : needsModel("The effect on the logits")),
    panel("Makes less likely", found.suppressed ? tokenRows(found.suppressed, (x) => num(x, true), { tone: "neg" }) : needsModel("The effect on the logits")),
    panel("Tokens it reads, in its examples", found.reads ? tokenRows(found.reads, percent, { chance: "what so few examples may read by chance" }) : silence("It read nothing.")),
    panel("Tokens whose embedding it reads", found.reads_embedding ? tokenRows(found.reads_embedding, (x) => num(x, true)) : needsModel("What it reads of embeddings")),
    panel("Activations", quantiles ? quantilePlot(quantiles, value("mean_act", head), value("max_act", head)) : silence("It never fired.")),
    panel("Heads that write alike", neighbours(found.similar_o)),
    panel("Heads that read alike", neighbours(found.similar_v)),
  ];
}

function panel(title, content) {
  return el("section", { class: "panel" }, el("h2", {}, title), content);
}

function silence(text) {
  return el("p", { class: "missing" }, text);
}

function scorePanel(head, low) {
  const least = (id) => (low[id] === undefined ? "cannot be told" : `at least ${fixed(low[id])}`);
  const rows = index.scores.map((id) => ({
    name: words(id),
    about: `Share of its reading ${SCORE_ABOUT[id]}, ${WHERE_OFFERED}. With 95 % certainty: in text ${least(id)}, on probes ${least(`probe_${id}`)}.`,
    text: value(id, head),
    probe: value(`probe_${id}`, head),
  }));
  if (known("successor")) rows.push({ name: "successor", about: columnOf("successor").about, text: value("successor", head), probe: null });
  const fired = value("probe_fired", head);
  return el(
    "div",
    {},
    el("p", { class: "note key" }, el("span", {}, el("i", { class: "swatch" }), "in the text"), el("span", {}, el("i", { class: "swatch probe" }), `on random tokens repeated once${fired === null ? "" : `, where it fired ${whole(fired)} times`}`)),
    scoreRows(rows),
    el("p", { class: "note" }, "Shares of the reading at tokens that offer such a source: they need not add up to 1."),
  );
}

function parentPanel(parents) {
  if (!parents || parents.head.length === 0) return silence("Not known: the layer's own heads were not compared.");
  const cell = (x) => el("td", { class: "n", vars: { w: `${100 * Math.max(0, Math.min(1, x ?? 0))}%` } }, fixed(x));
  return el(
    "table",
    { class: "parents" },
    el("thead", {}, el("tr", {}, ...[["head", ""], ["OV", "how far w_V and w_O lie in its value space"], ["QK", "cosine of the forms W_Q W_Kᵀ"], ["pattern", "overlap of attention patterns on text"]].map(([name, about]) => el("th", { scope: "col", title: about }, name)))),
    el("tbody", {}, ...parents.head.map((parent, i) => el("tr", {}, el("th", { scope: "row" }, el("a", { href: `#/heads?parent=${parent}`, title: "Heads that come from it" }, String(parent))), cell(parents.ov[i]), cell(parents.qk[i]), cell(parents.pattern[i])))),
  );
}

function neighbours(pairs) {
  if (!pairs || pairs[0].length === 0) return silence("None.");
  const [heads, cosines, z, beyond] = pairs;
  return el(
    "div",
    {},
    el(
      "ul",
      { class: "near" },
      ...heads.map((head, i) => el("li", chanceMark(z, beyond, i), el("a", { href: `#/head/${head}` }, el("b", {}, String(head)), el("span", { class: "fires" }, ...tokensOf("fires", head)), el("span", { class: "n" }, fixed(cosines[i]))))),
    ),
    chanceNote(beyond),
  );
}
