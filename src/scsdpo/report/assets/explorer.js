// Responses: step -> question -> response, with filters that the index answers without unpacking.

const SUCCESS = 1,
  FAILED = 2,
  LENGTH = 4,
  TRACED = 8;
const chunks = new Map();
const filters = byId("filters");
let index = null;
const unit = byId("responses")?.dataset.unit; // a batch of questions, or the step on it
const here = { run: 0, split: "train", batch: null, key: null, sample: null };
let questions = [];

/** A chunk's data; the last few are kept. */
async function chunk(kind, run, split, batch) {
  const id = `${kind}-${run}-${split}-${batch}`;
  if (!chunks.has(id)) {
    if (chunks.size > 24) chunks.delete(chunks.keys().next().value);
    chunks.set(id, unpack(id));
  }
  return chunks.get(id);
}

const wanted = () => Object.fromEntries(new FormData(filters));
const batches = () => index[here.run]?.[here.split] ?? [];
const entry = () => batches().find(({ batch }) => batch === here.batch);

function keepsQuestion([, category, rate], want) {
  if (want.category && category !== want.category) return false;
  return !want.rate || { none: rate === 0, all: rate === 1, some: rate > 0 && rate < 1 }[want.rate];
}

function keepsBits(bits, want) {
  if (want.traced && !(bits & TRACED)) return false;
  const verdicts = {
    right: bits & SUCCESS,
    wrong: !(bits & SUCCESS),
    error: bits & FAILED,
    length: bits & LENGTH,
  };
  return !want.verdict || Boolean(verdicts[want.verdict]);
}

/** Responses of a batch that pass the filters of the index. */
const matches = ({ questions: all }, want) =>
  all.filter((q) => keepsQuestion(q, want)).flatMap((q) => q[4].filter((b) => keepsBits(b, want)))
    .length;

function fillCategories() {
  const select = filters.elements.category;
  const kept = select.value;
  const names = [...new Set(batches().flatMap((b) => b.questions.map((q) => q[1])))]
    .filter(Boolean)
    .sort();
  select.replaceChildren(
    make("option", { value: "" }, "any"),
    ...names.map((n) => make("option", { value: n }, n)),
  );
  select.value = names.includes(kept) ? kept : "";
}

/** A bar for each step: its height the pass rate of the questions written, its color the filters. */
function drawStrip() {
  const strip = byId("strip");
  const all = batches(),
    want = wanted();
  strip.setAttribute("viewBox", `0 0 ${Math.max(all.length, 1) * 10} 46`);
  strip.replaceChildren(
    ...all.flatMap((b, i) => {
      const rate = b.questions.reduce((sum, q) => sum + q[2], 0) / b.questions.length;
      const height = 5 + 39 * rate;
      const kind = b.batch === here.batch ? "now" : matches(b, want) ? "match" : "";
      const bar = { x: i * 10 + 1, y: 46 - height, width: 8, height, class: kind };
      const traced = b.questions.some((q) => q[4].some((bits) => bits & TRACED));
      const hit = { x: i * 10, y: 0, width: 10, height: 46, class: "hit", "data-batch": b.batch };
      return [
        makeSvg("rect", bar),
        ...(traced
          ? [makeSvg("rect", { x: i * 10 + 1, y: 44, width: 8, height: 2, class: "traced" })]
          : []),
        makeSvg("rect", hit),
      ];
    }),
  );
  const shown = entry();
  byId("strip-first").textContent = all.length ? `${unit} ${all[0].batch}` : "";
  byId("strip-last").textContent = all.length > 1 ? `${unit} ${all.at(-1).batch}` : "";
  const found = shown ? matches(shown, want) : 0;
  const total = shown ? shown.questions.reduce((n, q) => n + q[4].length, 0) : 0;
  const words = shown
    ? `${unit} ${here.batch}: ${shown.questions.length} question${shown.questions.length === 1 ? "" : "s"}, ${found} of ${total} responses pass the filters`
    : "nothing was written of this run and split";
  byId("strip-now").textContent = words;
  strip.setAttribute("aria-valuemin", all[0]?.batch ?? 0);
  strip.setAttribute("aria-valuemax", all.at(-1)?.batch ?? 0);
  strip.setAttribute("aria-valuenow", here.batch ?? 0);
  strip.setAttribute("aria-valuetext", words);
}

function drawQuestions() {
  const want = wanted();
  const text = (want.text ?? "").toLowerCase();
  const holds = (words) => !text || words.toLowerCase().includes(text);
  const cards = questions.flatMap((question) => {
    const bits = entry().questions.find((q) => q[0] === question.key);
    if (!keepsQuestion(bits, want)) return [];
    const said = question.messages.at(-1)?.content ?? "";
    const passing = question.responses.map(
      (r, i) => keepsBits(bits[4][i], want) && holds(said + r.response),
    );
    if (!passing.some(Boolean)) return [];
    const weight = bits[3] == null ? "" : ` · weight ${short(bits[3])}`;
    return [
      make(
        "div",
        { class: `question${question.key === here.key ? " open" : ""}` },
        make(
          "div",
          { class: "facts" },
          make("span", {}, question.category || question.key),
          make(
            "span",
            {},
            `pass rate ${short(question.pass_rate)}${here.split === "train" ? weight : ""}`,
          ),
        ),
        make("p", { title: question.key }, said),
        make(
          "div",
          { class: "pips" },
          question.responses.map((r, i) => pip(question, r, passing[i])),
        ),
      ),
    ];
  });
  byId("questions").replaceChildren(
    ...(cards.length ? cards : [make("p", { class: "note" }, "Nothing here passes the filters.")]),
  );
}

function pip(question, response, passes = true) {
  const current = question.key === here.key && response.sample === here.sample;
  const verdict = response.success ? "right" : "wrong";
  const words = `response ${response.sample + 1}, ${verdict}${response.traced ? ", traced" : ""}`;
  return make(
    "button",
    {
      type: "button",
      class: `pip ${verdict}${response.traced ? " traced" : ""}${passes ? "" : " dim"}`,
      "aria-label": words,
      title: words,
      "aria-current": current ? "true" : null,
      "data-key": question.key,
      "data-sample": response.sample,
      onclick: () => openResponse(question.key, response.sample),
    },
    response.success ? "✓" : "×",
  );
}

async function openBatch(batch, key = null, sample = null) {
  here.batch = batch;
  questions = (batch == null ? null : await chunk("rollouts", here.run, here.split, batch)) ?? [];
  if (here.batch !== batch) return; // another was asked for meanwhile
  const chosen = key == null ? firstOf(questions) : { key, sample };
  drawStrip();
  await openResponse(chosen?.key ?? null, chosen?.sample ?? null);
}

/** What is opened by itself: a traced failure that passes the filters, else what passes them. */
function firstOf(all) {
  const want = wanted();
  const found = all.flatMap((question) => {
    const bits = entry().questions.find((q) => q[0] === question.key);
    const kept = question.responses.filter(
      (_, i) => keepsQuestion(bits, want) && keepsBits(bits[4][i], want),
    );
    return kept.map((response) => ({ key: question.key, sample: response.sample, response }));
  });
  const worth = ({ response }) => 2 * response.traced + !response.success;
  return found.sort((a, b) => worth(b) - worth(a))[0];
}

async function openResponse(key, sample) {
  Object.assign(here, { key, sample });
  drawQuestions();
  const question = questions.find((q) => q.key === key);
  const response = question?.responses.find((r) => r.sample === sample);
  if (!response) {
    byId("response").replaceChildren(
      make("p", { class: "note" }, "Choose a response on the left."),
    );
    return;
  }
  const traces = response.traced ? await chunk("tokens", here.run, here.split, here.batch) : null;
  if (here.key !== key || here.sample !== sample) return;
  showResponse(
    question,
    response,
    traces?.find((t) => t.key === key && t.sample === sample),
  );
  const place = [here.run, here.split, here.batch, sample, key].map(encodeURIComponent).join("/");
  history.replaceState(null, "", `#at/${place}`);
}

/** From a plot: the step next to x that the page has, with its traces if some are near. */
function openStep(run, x) {
  here.run = index[run]?.train.length ? run : 0;
  here.split = "train";
  filters.elements.run.value = here.run;
  filters.elements.split.value = "train";
  fillCategories();
  const all = batches().map(({ batch }) => batch);
  if (!all.length) return;
  const batch = all[nearest(all, x)];
  openBatch(batch);
  byId("responses").scrollIntoView({ behavior: "instant" });
  byId("strip").focus({ preventScroll: true });
  say(`${unit} ${batch}`);
}

function move(by) {
  const all = batches(),
    want = wanted();
  for (
    let i = all.findIndex((b) => b.batch === here.batch) + by;
    i >= 0 && i < all.length;
    i += by
  ) {
    if (matches(all[i], want)) return openBatch(all[i].batch);
  }
}

function moveResponse(by) {
  const pips = [...byId("questions").querySelectorAll(".pip:not(.dim)")];
  const now = pips.findIndex((p) => p.hasAttribute("aria-current"));
  const next = pips[now + by];
  if (next) openResponse(next.dataset.key, Number(next.dataset.sample));
}

function chooseSplit() {
  const want = wanted();
  Object.assign(here, { run: Number(want.run), split: want.split });
  fillCategories();
  const all = batches();
  const now = all.length
    ? all[
        nearest(
          all.map((b) => b.batch),
          here.batch ?? Infinity,
        )
      ]
    : null;
  openBatch(now?.batch ?? null);
}

function listen() {
  filters.addEventListener("input", (event) => {
    if (["run", "split"].includes(event.target.name)) return chooseSplit();
    drawStrip();
    drawQuestions();
  });
  filters.addEventListener("reset", () => setTimeout(chooseSplit));
  filters.addEventListener("submit", (event) => event.preventDefault());
  const strip = byId("strip");
  strip.addEventListener("click", (event) => {
    const batch = event.target.dataset.batch;
    if (batch) openBatch(Number(batch));
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea, .plot")) return;
    const arrows = event.target.closest("#strip");
    const by = {
      "]": 1,
      "[": -1,
      ...(arrows ? { ArrowRight: 1, ArrowLeft: -1, ArrowUp: 1, ArrowDown: -1 } : {}),
    }[event.key];
    if (by) move(by);
    else if (event.key === "j" || event.key === "k") moveResponse(event.key === "j" ? 1 : -1);
    else return;
    event.preventDefault();
  });
}

/** The last step with traces, of the first run that has any; or what the address names. */
function start() {
  const [, run, split, batch, sample, key] = location.hash.startsWith("#at/")
    ? location.hash.split("/").map(decodeURIComponent)
    : [];
  if (key != null && index[run]?.[split]?.some((b) => b.batch === Number(batch))) {
    Object.assign(here, { run: Number(run), split });
    filters.elements.run.value = run;
    filters.elements.split.value = split;
    fillCategories();
    return openBatch(Number(batch), key, Number(sample));
  }
  here.run = Math.max(
    0,
    index.findIndex((splits) => splits.train.length),
  );
  filters.elements.run.value = here.run;
  if (!batches().length) filters.elements.split.value = here.split = "val";
  fillCategories();
  const traced = batches().filter((b) =>
    b.questions.some((q) => q[4].some((bits) => bits & TRACED)),
  );
  return openBatch((traced.at(-1) ?? batches().at(-1))?.batch ?? null);
}

if (filters) {
  unpack("index").then(async (found) => {
    index = found;
    listen();
    await start();
    document.documentElement.dataset.responses = "ready";
  });
}
