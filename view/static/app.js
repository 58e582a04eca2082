// The address says what is shown: #/ the overview, #/heads?... the table, #/head/301 a head.
"use strict";

const main = document.getElementById("main");
const search = document.getElementById("search");
const keys = document.getElementById("keys");
const VIEWS = { overview, heads: table, head: headView };
let current = null; // the view that is mounted

/** Read the address: which view, of what. */
function place() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split(/\?(.*)/s);
  const params = new URLSearchParams(query);
  const head = path.match(/^head\/(\d+)$/);
  if (head) return { view: "head", of: Number(head[1]), params };
  return path === "heads" ? { view: "heads", of: params, params } : { view: "overview", of: params, params };
}

/** Go to an address. */
function go(hash, { replace = false } = {}) {
  if (replace) location.replace(hash);
  else location.hash = hash;
}

/** Show what the address says. */
async function route() {
  hideTip();
  const { view, of, params } = place();
  for (const link of document.querySelectorAll("nav [data-view]")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (document.activeElement !== search) search.value = view === "heads" ? (params.get("q") ?? "") : "";
  try {
    const next = VIEWS[view];
    if (current === next && next.update) return await next.update(of);
    current?.unmount();
    current = next;
    document.body.dataset.view = view;
    await next.mount(main, of);
    if (view !== "heads" && document.activeElement !== search) main.focus({ preventScroll: true });
    document.getElementById("said").textContent = document.title;
  } catch (error) {
    fail(error);
  }
}

function fail(error) {
  main.replaceChildren(el("p", { class: "missing", role: "alert" }, error.message));
}

function back() {
  const { view } = place();
  if (view === "head") go(table.key ? `#/heads?${table.key}` : "#/heads");
  else if (view === "heads") go("#/");
}

const KEYS = {
  "/": focusSearch,
  "?": () => keys.showModal(),
  t: switchTheme,
  Escape: back,
  "[": () => step(-1),
  "]": () => step(1),
  j: () => move(1),
  k: () => move(-1),
  ArrowDown: () => move(1),
  ArrowUp: () => move(-1),
  PageDown: () => move(20),
  PageUp: () => move(-20),
  Enter: () => place().view === "heads" && table.open(),
};

function focusSearch() {
  search.focus();
  search.select();
}

function step(by) {
  const { view, of } = place();
  const next = view === "head" ? table.neighbour(of, by) : null;
  if (next !== null) go(`#/head/${next}`);
}

/** Move the mark of the table; elsewhere the key keeps its use. */
function move(by) {
  if (place().view !== "heads") return "unused";
  table.move(by);
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
  const typing = event.target.closest("input, select, textarea");
  if (typing) {
    if (event.key === "Escape") leaveSearch();
    if (event.target === search && ["Enter", "ArrowDown"].includes(event.key)) leaveSearch(event.key === "Enter");
    return;
  }
  if (event.key === "Enter" && event.target.closest("a, button")) return;
  const action = KEYS[event.key];
  if (action && action() !== "unused") event.preventDefault();
}

/** From the search to the table; a single head found is opened. */
async function leaveSearch(opens = false) {
  runSearch();
  search.blur();
  if (place().view !== "heads") return;
  const { heads } = await findHeads(place().params);
  if (opens && heads.length === 1) go(`#/head/${heads[0]}`);
  else table.grid?.focus({ preventScroll: true });
}

let typed = 0;
function runSearch() {
  clearTimeout(typed);
  const inTable = place().view === "heads";
  if (search.value === (inTable ? (place().params.get("q") ?? "") : "")) return;
  setParams({ q: search.value }, { replace: inTable });
}

function switchTheme() {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try {
    localStorage.setItem("lorsa-theme", root.dataset.theme);
  } catch {} // a browser that stores nothing for pages from the disk
  current?.redraw?.();
}

function rememberTheme() {
  try {
    const theme = localStorage.getItem("lorsa-theme");
    if (theme) document.documentElement.dataset.theme = theme;
  } catch {}
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => current?.redraw?.());
}

async function start() {
  rememberTheme();
  document.addEventListener("keydown", onKey);
  document.getElementById("theme").addEventListener("click", switchTheme);
  document.getElementById("help").addEventListener("click", () => keys.showModal());
  search.addEventListener("input", () => {
    clearTimeout(typed);
    typed = setTimeout(runSearch, 120);
  });
  try {
    await loadIndex();
    layOutColumns();
    document.getElementById("subject").textContent = subject();
  } catch (error) {
    return fail(error);
  }
  window.addEventListener("hashchange", route);
  await route();
  document.documentElement.dataset.ready = "yes";
}

start();
