// Which heads the table lists, and in which order: search, filters, sorting. The whole request stands in the
// page's address: #/heads?q=cat&type=induction&parent=3&frequency=0.001..0.01&sort=-induction
"use strict";

const RELATIONS = {
  fires: { label: "fires on", about: "share of its top examples", strength: percent, of: fired },
  reads: { label: "reads", about: "share of what its top examples read", strength: percent, of: (x) => x },
  embedding: { label: "reads embedding", about: "z, beyond chance", strength: (z) => `z ${num(z)}`, of: beyond },
  promotes: { label: "promotes", about: "z, beyond chance", strength: (z) => `z ${num(z)}`, of: beyond },
  explained: { label: "explanation", about: "score", strength: fixed, of: (x) => x ?? 0.5 },
};
const ASKED = { fires: ["fires"], reads: ["reads", "embedding"], promotes: ["promotes"], explained: ["explained"] };

/** Return how strong a claim of a share of a head's firings is: less where it fired a few times only. */
function fired(share, head) {
  const n = value("n_fired", head);
  return (share * n) / (n + 3);
}

/** Return how strong a claim of a z is, between 0 and 1. */
function beyond(z) {
  return z / (z + 6);
}

/** Promise the heads that a request asks for, in its order, and by what each matches its search. */
async function findHeads(params) {
  const found = await searchMatches(params.get("q") ?? "");
  const tests = [(head) => found === null || found.has(head), typeTest(params), ...rangeTests(params)];
  const heads = [];
  for (let head = 0; head < index.n_heads; head++) {
    if (tests.every((test) => test(head))) heads.push(head);
  }
  const matches = found ?? new Map();
  const order = params.get("sort") ?? (matches.size ? "-match" : "");
  return { heads: sorted(heads, order, matches), matches };
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
    if (!text || ["head", "type", "tokens", "match"].includes(column.kind)) continue;
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

/** Promise what a search finds: by head, its matches, the strongest first; null where nothing is asked.
 * A match is {relation, token or text, value, strength}: its strength is 0 to 1, less where a token only holds the word. */
async function searchMatches(text) {
  const query = text.trim();
  if (query === "") return null;
  if (/^\d+$/.test(query)) return Number(query) < index.n_heads ? new Map([[Number(query), []]]) : new Map();
  const [, relation, rest] = query.match(/^(fires|promotes|reads|explained):(.*)$/s) ?? [null, null, query];
  const word = rest.trim();
  if (word === "") return null;
  const data = await load("search");
  const found = new Map();
  const add = (head, match) => (found.has(head) ? found.get(head).push(match) : found.set(head, [match]));
  const tokens = matchingTokens(word);
  for (const name of relation ? ASKED[relation] : Object.keys(RELATIONS)) {
    if (name === "explained") addExplained(data.explained, word, add);
    else addTokens(name, data[name], tokens, add);
  }
  for (const matches of found.values()) matches.sort((a, b) => b.strength - a.strength);
  return found;
}

function addTokens(relation, { counts, tokens: listed, strengths }, tokens, add) {
  let at = 0;
  counts.forEach((count, head) => {
    for (const end = at + count; at < end; at++) {
      const near = tokens.get(listed[at]);
      if (near === undefined) continue;
      add(head, { relation, token: listed[at], value: strengths[at], strength: near * RELATIONS[relation].of(strengths[at], head) });
    }
  });
}

function addExplained(explained, word, add) {
  const low = (word.match(/^"(.+)"$/s)?.[1] ?? word).toLowerCase();
  for (const [head, text, score] of explained) {
    if (text.toLowerCase().includes(low)) add(head, { relation: "explained", text, value: score, strength: RELATIONS.explained.of(score) });
  }
}

/** Return the tokens whose text holds a word, or is what stands in quotes; by id, what part of it that is. */
function matchingTokens(word) {
  const exact = word.match(/^"(.+)"$/s)?.[1];
  const low = word.toLowerCase();
  const found = new Map();
  for (const token of texts.keys()) {
    const text = textOf(token);
    const forms = [text, visible(text)];
    if (exact !== undefined) {
      if (forms.includes(exact)) found.set(token, 1);
    } else if (forms.some((form) => form.toLowerCase().includes(low))) {
      found.set(token, Math.min(1, low.length / (text.trim().length || 1)));
    }
  }
  return found;
}

/** Order heads by a column; "-" is from large to small. Unknown values come last. */
function sorted(heads, order, matches) {
  const falling = order.startsWith("-");
  const id = order.replace("-", "");
  const column = columnOf(id);
  if (!column || id === "head") return falling ? heads.reverse() : heads;
  const strength = (head) => matches.get(head)?.[0]?.strength ?? null;
  const keys = new Map(heads.map((head) => [head, id === "match" ? strength(head) : sortKey(column, head)]));
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
