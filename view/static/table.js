// The table of heads: only the rows in sight are in the document.
"use strict";

const ROW = 30; // pixels; the same in style.css
const SPARE = 8; // rows kept above and below those in sight

const table = {
  list: [], // heads in the table's order; the order of [ and ] too
  key: "", // the request they answer
  chosen: null, // head whose row is marked

  async mount(main, params) {
    this.layOut(false);
    this.count = el("p", { class: "count", role: "status" });
    this.chips = el("div", { class: "chips" });
    this.rows = el("div", { class: "rows", role: "rowgroup" });
    this.header = el("div", { class: "row header", role: "row" });
    this.grid = el(
      "div",
      {
        class: "grid", role: "grid", tabindex: "0", "aria-label": "Heads",
        on: { scroll: () => this.drawRows(), dblclick: hideTip },
      },
      el("div", { role: "rowgroup", class: "top" }, this.header),
      this.rows,
    );
    main.replaceChildren(el("section", { class: "heads" }, el("div", { class: "tools" }, filterTools(), this.count, this.chips), this.grid));
    this.watch = new ResizeObserver(() => this.drawRows());
    this.watch.observe(this.grid);
    document.title = `Heads of ${subject()}`;
    await this.update(params, { keep: true });
    if (document.activeElement !== search) this.grid.focus({ preventScroll: true });
  },

  /** Choose the columns: those that are known, and while a search is on what it matched. */
  layOut(searched) {
    this.columns = COLUMNS.filter((c) => c.id === "head" || known(c.id) || (c.id === "match" && searched));
    this.template = this.columns.map((column) => `${column.width}px`).join(" ");
  },

  unmount() {
    this.watch?.disconnect();
  },

  /** Show a request: search, filter or order. Unless asked to keep the marked row, begin at the top. */
  async update(params, { keep = false } = {}) {
    this.params = params;
    const key = params.toString();
    const { heads: list, matches } = await findHeads(params);
    if (this.params !== params) return; // asked anew meanwhile
    [this.list, this.key, this.matches] = [list, key, matches];
    const searched = list.some((head) => matches.get(head)?.length);
    this.order = params.get("sort") ?? (searched ? "-match" : "head");
    this.layOut(searched);
    this.grid.setAttribute("aria-colcount", this.columns.length);
    if (!keep || !list.includes(this.chosen)) this.chosen = list[0] ?? null;
    this.drawHeader();
    drawChips(this.chips, params);
    syncTools(params);
    const all = list.length === index.n_heads;
    this.count.replaceChildren(el("b", {}, whole(list.length)), all ? " heads" : ` of ${whole(index.n_heads)} heads`);
    this.grid.setAttribute("aria-rowcount", list.length + 1);
    this.rows.style.height = `${list.length * ROW}px`;
    this.drawRows();
    this.show(this.chosen);
    this.showSorted();
  },

  /** Scroll sideways to the column that the rows are sorted by. */
  showSorted() {
    const cell = this.header.querySelector("[aria-sort=ascending], [aria-sort=descending]");
    const right = cell ? cell.offsetLeft + cell.offsetWidth : 0;
    const seen = this.grid.scrollLeft + this.grid.clientWidth;
    const left = cell ? cell.offsetLeft - this.columns[0].width : 0; // beside the heads' numbers, which stay
    if (right > seen || left < this.grid.scrollLeft) this.grid.scrollLeft = Math.min(left, right - this.grid.clientWidth);
  },

  drawHeader() {
    const order = this.order;
    const focused = document.activeElement?.dataset.sort;
    this.header.style.gridTemplateColumns = this.template;
    this.header.replaceChildren(
      ...this.columns.map((column) => {
        const state = order === column.id ? "ascending" : order === `-${column.id}` ? "descending" : "none";
        const first = ["head", "type", "tokens", "int"].includes(column.kind) ? "" : "-";
        const next = state === "none" ? first : state === "ascending" ? "-" : "";
        return el(
          "div",
          { role: "columnheader", "aria-sort": state, class: `cell ${column.kind}` },
          el("button", { type: "button", title: column.about, "data-sort": column.id, on: { click: () => setParams({ sort: next + column.id }) } },
            column.label, el("i", { "aria-hidden": "true" }, { ascending: " ▲", descending: " ▼", none: "" }[state])),
        );
      }),
    );
    if (focused) this.header.querySelector(`[data-sort="${focused}"]`).focus({ preventScroll: true });
  },

  drawRows() {
    const first = Math.max(0, Math.floor(this.grid.scrollTop / ROW) - SPARE);
    const last = Math.min(this.list.length, Math.ceil((this.grid.scrollTop + this.grid.clientHeight) / ROW) + SPARE);
    const rows = [];
    for (let i = first; i < last; i++) rows.push(this.makeRow(i));
    if (this.list.length === 0) rows.push(el("p", { class: "none" }, "No head is like that."));
    this.rows.replaceChildren(...rows);
    const marked = this.rows.querySelector("[aria-selected=true]");
    if (marked) this.grid.setAttribute("aria-activedescendant", marked.id);
    else this.grid.removeAttribute("aria-activedescendant");
  },

  makeRow(i) {
    const head = this.list[i];
    const row = el("div", {
      class: "row", role: "row", id: `row-${head}`, "data-head": head,
      "aria-rowindex": i + 2, "aria-selected": String(head === this.chosen),
      on: { click: (event) => event.target.closest("a") || go(`#/head/${head}`) },
    });
    row.style.gridTemplateColumns = this.template;
    row.style.top = `${i * ROW}px`;
    row.append(...this.columns.map((column) => makeCell(column, head, this.matches.get(head) ?? [])));
    return row;
  },

  /** Mark the row `by` rows from the marked one. */
  move(by) {
    const at = this.list.indexOf(this.chosen);
    this.chosen = this.list[Math.max(0, Math.min(this.list.length - 1, at + by))] ?? null;
    this.show(this.chosen);
    this.drawRows();
  },

  /** Scroll to a head's row. */
  show(head) {
    const top = this.list.indexOf(head) * ROW;
    const room = this.grid.clientHeight - this.header.offsetHeight - ROW;
    if (top < this.grid.scrollTop) this.grid.scrollTop = Math.max(0, top);
    else if (top > this.grid.scrollTop + room) this.grid.scrollTop = top - room;
  },

  open() {
    if (this.chosen !== null) go(`#/head/${this.chosen}`);
  },

  /** Return the head before or after another one in the table's order. */
  neighbour(head, by) {
    const order = this.list.includes(head) ? this.list : null;
    const next = order ? order[order.indexOf(head) + by] : head + by;
    return next >= 0 && next < index.n_heads ? next : null;
  },
};

function makeCell(column, head, matches) {
  const cell = el("div", { role: "gridcell", class: `cell ${column.kind}` });
  if (column.kind === "head") cell.append(el("a", { href: `#/head/${head}`, tabindex: "-1" }, String(head)));
  else if (column.kind === "type") cell.append(headType(head));
  else if (column.kind === "match") cell.append(...matches.slice(0, 4).map(matchMark));
  else if (column.kind === "tokens") cell.append(...tokensOf(column.id, head, new Set(matches.map(({ token }) => token))));
  else {
    const x = value(column.id, head);
    cell.append(spell(column, x));
    if (column.kind === "score" && x !== null) cell.style.setProperty("--w", `${100 * Math.max(0, Math.min(1, x))}%`);
  }
  return cell;
}

/** Show by what a head matches a search: the relation, the token or the explanation, how strong it is. */
function matchMark({ relation, token, text, value: strength }) {
  const { label, about, strength: spelled } = RELATIONS[relation];
  return el(
    "span",
    { class: "match", title: text ?? `${label} ${visible(textOf(token))}: ${about}` },
    el("span", { class: "note" }, `${label} `),
    text === undefined ? tokenLabel(token, { class: "token hit" }) : el("span", {}, text),
    strength === null ? null : el("span", { class: "n" }, spelled(strength)),
  );
}

/** Make the choices above the table: type, parent, a range of any number. */
function filterTools() {
  const types = index.types.filter((type) => index.columns.type.includes(type));
  const parents = [...new Set(index.columns.parent)].filter((p) => p !== null).sort((a, b) => a - b);
  const choice = (id, label, options) =>
    el("label", {}, el("span", {}, label), el("select", { id, on: { change: ({ target }) => setParams({ [id.slice(7)]: target.value }) } }, el("option", { value: "" }, "any"), ...options));
  return el(
    "div",
    { class: "filters" },
    choice("filter-type", "type", types.map((type) => el("option", { value: type }, words(type)))),
    parents.length ? choice("filter-parent", "parent head", parents.map((p) => el("option", { value: p }, String(p)))) : null,
    rangeTool(),
  );
}

function rangeTool() {
  const select = el("select", { id: "range-column", "aria-label": "Column of the range" }, ...numberColumns().map((c) => el("option", { value: c.id }, c.label)));
  const low = el("input", { id: "range-low", inputmode: "decimal", placeholder: "from", "aria-label": "From", size: 5 });
  const high = el("input", { id: "range-high", inputmode: "decimal", placeholder: "to", "aria-label": "To", size: 5 });
  const add = (event) => {
    event.preventDefault();
    const ends = [low.value.trim(), high.value.trim()];
    const wrong = [low, high].filter((_, i) => ends[i] !== "" && Number.isNaN(Number(ends[i])));
    for (const input of [low, high]) input.setAttribute("aria-invalid", String(wrong.includes(input)));
    if (wrong.length || ends.every((end) => end === "")) return;
    low.value = high.value = "";
    setParams({ [select.value]: ends.join("..") });
  };
  return el("form", { class: "range", on: { submit: add } }, select, low, high, el("button", {}, "Add range"));
}

/** Show what is asked for, each part with a button that takes it away. */
function drawChips(chips, params) {
  const parts = [
    ...(params.get("q") ? [["q", `“${params.get("q")}”`]] : []),
    ...(params.get("type") ? [["type", words(params.get("type"))]] : []),
    ...rangesOf(params).map(({ column, text }) => [column.id, `${column.label} ${text.replace("..", " … ")}`]),
  ];
  chips.replaceChildren(
    ...parts.map(([name, text]) =>
      el("button", { type: "button", class: "chip", "aria-label": `Remove ${text}`, on: { click: () => setParams({ [name]: "" }) } }, text, el("i", { "aria-hidden": "true" }, " ×")),
    ),
  );
}

function syncTools(params) {
  for (const name of ["type", "parent"]) {
    const select = document.getElementById(`filter-${name}`);
    if (select) select.value = params.get(name) ?? "";
  }
}

/** Change the table's request; what is empty is taken out. */
function setParams(changes, { replace = false } = {}) {
  const params = new URLSearchParams(place().view === "heads" ? place().params : "");
  for (const [name, text] of Object.entries(changes)) {
    if (text === "") params.delete(name);
    else params.set(name, text);
  }
  const query = params.toString();
  go(query ? `#/heads?${query}` : "#/heads", { replace });
}
