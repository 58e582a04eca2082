// What is known of every head as a number: the columns of the table and the axes of the scatter.
"use strict";

const SCORE_ABOUT = {
  previous_token: "from the token before",
  same_token: "from the token itself",
  duplicate_token: "from earlier copies of the token",
  induction: "from tokens that come after an earlier copy of the token",
  first_token: "from the first token of the sequence, by tokens from the third on",
  local: "from 1 to 8 tokens back",
  long_range: "from 64 tokens back or more",
};
const WHERE_OFFERED = "counted at tokens that offer one, so shares need not add up to 1";
const BY_ABOUT = {
  both: "in text and on random tokens repeated once",
  text: "by text only: on random tokens repeated once it was not tried, or fired too seldom",
  probes: "by probes only: in text it fired too seldom, or saw too few such tokens",
  disputed: "by text only: on random tokens repeated once it is something else",
};

/** Return whether a head is of no type, or of one that text and probes both give. */
function isSure(head) {
  return [null, "both"].includes(value("type_by", head));
}

let COLUMNS = []; // {id, label, about, kind, width, log}

/** Lay out the columns; names of scores come with the data. */
function layOutColumns() {
  const score = (id, where) => ({
    id,
    label: (where ? "probe: " : "") + words(id),
    about: `share of its reading ${SCORE_ABOUT[id.replace(/^probe_/, "")] ?? ""}, ${where ? "on random tokens repeated once" : "in the stored text"}; ${WHERE_OFFERED}`,
    kind: "score",
    width: 92,
  });
  COLUMNS = [
    { id: "head", label: "head", about: "number of the OV head", kind: "head", width: 78 },
    { id: "match", label: "matches", about: "what the search found, the strongest first: which relation, the token, how strong", kind: "match", width: 330 },
    { id: "type", label: "type", about: "its strongest kind of reading; grey and with a question mark where text and probes do not both say so", kind: "type", width: 148 },
    { id: "trust", label: "sure", about: "how sure its type is: a lower bound of the share, of text and probes the smaller", kind: "score", width: 70 },
    { id: "fires", label: "fires on", about: "tokens on which it fires most in its top examples", kind: "tokens", width: 210 },
    { id: "promotes", label: "promotes", about: "tokens that it makes likelier than chance would: empty for most heads", kind: "tokens", width: 170 },
    { id: "frequency", label: "frequency", about: "share of tokens on which it fires", kind: "share", width: 96, log: true },
    { id: "max_act", label: "max act", about: "largest activation", kind: "number", width: 72 },
    { id: "distance", label: "distance", about: "mean distance of what it reads, in tokens", kind: "number", width: 76 },
    { id: "entropy", label: "entropy", about: "of what it reads, in nats; 0 is a single source", kind: "number", width: 72 },
    { id: "parent", label: "parent head", about: "likeliest head of the original layer", kind: "int", width: 64 },
    { id: "parent_ov", label: "parent OV", about: "how far w_V and w_O lie in its value space", kind: "score", width: 70 },
    { id: "parent_qk", label: "parent QK", about: "cosine of the forms W_Q W_Kᵀ", kind: "score", width: 70 },
    { id: "parent_pattern", label: "parent pattern", about: "overlap of attention patterns on text", kind: "score", width: 70 },
    ...index.scores.map((id) => score(id, false)),
    { id: "successor", label: "successor", about: "share of its reading of ordinal words (days, months, numbers, letters) that is of words whose next one it makes likeliest; known of heads that read 8 words of 3 classes", kind: "score", width: 84 },
    ...index.probes.map((id) => score(id, true)),
    { id: "promotes_z", label: "promotes: z", about: "z of what it makes likelier, against random lists; said from 4.25 on", kind: "number", width: 84 },
    { id: "successor_words", label: "words read", about: "days, months, numbers and letters that it reads; successor needs 8 of 3 classes", kind: "int", width: 64 },
    { id: "n_fired", label: "fired", about: "tokens on which it fired", kind: "int", width: 84, log: true },
    { id: "mean_act", label: "mean act", about: "mean activation where it fired", kind: "number", width: 72 },
    { id: "probe_fired", label: "probe: fired", about: "tokens of the probe on which it fired", kind: "int", width: 78, log: true },
    { id: "norm_o", label: "‖w_O‖", about: "an activation z writes a vector of norm |z| ‖w_O‖", kind: "number", width: 72 },
    { id: "norm_v", label: "‖w_V‖", about: "norm of what it reads with", kind: "number", width: 72 },
    { id: "qk_head", label: "QK head", about: "whose attention pattern it has", kind: "int", width: 64 },
  ];
}

function columnOf(id) {
  return COLUMNS.find((column) => column.id === id);
}

/** Return the columns that are numbers and known: for ranges and axes. */
function numberColumns() {
  return COLUMNS.filter((c) => !["head", "type", "tokens", "match"].includes(c.kind) && known(c.id));
}

/** Spell a cell. */
function spell(column, x) {
  if (x === null) return "–";
  if (column.kind === "share") return percent(x);
  if (column.kind === "score") return fixed(x);
  if (column.kind === "int" || column.kind === "head") return whole(x);
  if (column.kind === "type") return words(x);
  return num(x);
}
