// Which heads the table lists, and in which order: search, filters, sorting. The whole request stands in the
// page's address: #/heads?q=cat&type=induction&parent=3&frequency=0.001..0.01&sort=-induction
"use strict";

/** Promise the heads that a request asks for, in its order. */
async function findHeads(params) {
  const tests = [await searchTest(params.get("q") ?? ""), typeTest(params), ...rangeTests(params)];
  const heads = [];
  for (let head = 0; head < index.n_heads; head++) {
    if (tests.every((test) => test(head))) heads.push(head);
  }
  return sorted(heads, params.get("sort") ?? "");
}

function typeTest(params) {
  const types = (params.get("type") ?? "").split(",").filter(Boolean);
  return (head) => types.length === 0 || types.includes(value("type", head));
}

/** Read COLUMN=LOW..HIGH (either may lack) or COLUMN=VALUE of every number column. */
function rangesOf(params) {
  const found = [];
  for (const column of COLUMNS) {
    const text = params.get(column.id);
    if (!text || ["head", "type", "tokens"].includes(column.kind)) continue;
    const [low, high] = text.includes("..") ? text.split("..") : [text, text];
    found.push({
      column,
      text,
      low: low === "" || Number.isNaN(Number(low)) ? -Infinity : Number(low),
      high: high === "" || Number.isNaN(Number(high)) ? Infinity : Number(high),
    });
  }
  return found;
}

function rangeTests(params) {
  return rangesOf(params).map(({ column, low, high }) => (head) => {
    const x = value(column.id, head);
    return x !== null && x >= low && x <= high;
  });
}

/** Promise a test of a search: a head number, or a token that the head fires on, promotes or reads. */
async function searchTest(text) {
  const query = text.trim();
  if (query === "") return () => true;
  if (/^\d+$/.test(query)) return (head) => head === Number(query);
  const [, relation, rest] = query.match(/^(fires|promotes|reads):(.*)$/s) ?? [null, null, query];
  const tokens = matchingTokens(rest.trim());
  if (tokens === null) return () => true; // nothing asked yet
  const found = new Uint8Array(index.n_heads);
  const data = await load("search");
  for (const name of relation ? [relation] : ["fires", "promotes", "reads"]) {
    const { counts, tokens: listed } = data[name];
    let at = 0;
    counts.forEach((count, head) => {
      for (const end = at + count; at < end; at++) if (tokens.has(listed[at])) found[head] = 1;
    });
  }
  return (head) => found[head] === 1;
}

/** Return the ids of the tokens whose text holds a word, or is what stands in quotes. */
function matchingTokens(word) {
  if (word === "") return null;
  const exact = word.match(/^"(.+)"$/s)?.[1];
  const low = word.toLowerCase();
  const matches = (text) =>
    exact === undefined
      ? text.toLowerCase().includes(low) || visible(text).toLowerCase().includes(low)
      : text === exact || visible(text) === exact;
  const found = new Set();
  for (const token of texts.keys()) if (matches(textOf(token))) found.add(token);
  return found;
}

/** Order heads by a column; "-" is from large to small. Unknown values come last. */
function sorted(heads, order) {
  const falling = order.startsWith("-");
  const id = order.replace("-", "");
  const column = columnOf(id);
  if (!column || id === "head") return falling ? heads.reverse() : heads;
  const keys = new Map(heads.map((head) => [head, sortKey(column, head)]));
  const sign = falling ? -1 : 1;
  return heads.sort((a, b) => {
    const [x, y] = [keys.get(a), keys.get(b)];
    if (x === y) return a - b;
    if (x === null) return 1;
    if (y === null) return -1;
    return x < y ? -sign : sign;
  });
}

function sortKey(column, head) {
  const x = value(column.id, head);
  if (column.kind !== "tokens") return x;
  return x?.length ? x.map((token) => textOf(token).trim().toLowerCase()).join("\u0000") : null;
}
