// The page's data: scripts that call lorsaData(name, text), loaded when they are first needed.
// (A page opened from the disk may not fetch files, but it may load scripts.)
"use strict";

const DATA_FOLDER = document.currentScript.src.replace(/[^/]*$/, "");
const KEPT_FILES = 32; // files of contexts that stay in memory
const waiting = new Map(); // name -> what to do with its text
const loaded = new Map(); // name -> promise of its content

let index; // data-index.js: facts, columns, names of types and scores
const texts = new Map(); // token id -> text, null where no tokenizer was at hand

function lorsaData(name, text) {
  waiting.get(name)?.(text);
  waiting.delete(name);
}

/** Promise the content of data-NAME.js. */
function load(name) {
  if (!loaded.has(name)) {
    const promise = loadText(name).then(unpack);
    promise.catch(() => loaded.delete(name)); // so that it can be tried again
    loaded.set(name, promise);
  }
  return loaded.get(name);
}

function loadText(name) {
  return new Promise((resolve, reject) => {
    const script = document.createElement("script");
    waiting.set(name, resolve);
    script.src = `${DATA_FOLDER}data-${name}.js`;
    script.onload = () => script.remove();
    script.onerror = () => {
      script.remove();
      reject(new Error(`data-${name}.js cannot be read. If the page was built anew, reload it.`));
    };
    document.head.append(script);
  });
}

async function unpack(text) {
  const binary = atob(text);
  const bytes = new Uint8Array(binary.length);
  for (let i = 0; i < binary.length; i++) bytes[i] = binary.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

/** Load what every view needs. */
async function loadIndex() {
  const [found, tokens] = await Promise.all([load("index"), load("tokens")]);
  index = found;
  tokens.ids.forEach((id, i) => texts.set(id, tokens.texts[i]));
}

/** Promise what is known of a head besides the index: its contexts, parents, tokens. */
async function loadHead(head) {
  const name = `heads-${Math.floor(head / index.heads_per_file)}`;
  const heads = await load(name);
  for (const key of loaded.keys()) {
    if (loaded.size <= KEPT_FILES) break;
    if (key.startsWith("heads-") && key !== name) loaded.delete(key);
  }
  return heads[head % index.heads_per_file];
}

/** Return a token's text as it is. */
function textOf(token) {
  return texts.get(token) ?? `<${token}>`;
}

/** Return a number, type or list of a head from the index. */
function value(column, head) {
  return index.columns[column]?.[head] ?? null;
}

/** Return whether the analysis found a column at all; lists that are all empty hold nothing. */
function known(column) {
  return index.columns[column]?.some((x) => x !== null && x.length !== 0) ?? false;
}
