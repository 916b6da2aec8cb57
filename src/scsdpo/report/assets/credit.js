// The credit map: a response's tokens in the color of a signal, and both sides' candidates.

const BINS = 10;
const SIGNALS = [
  // name, label, value of token i, signed, what it says
  [
    "credit",
    "credit",
    (t, i) => t.credit[i],
    true,
    "−∂loss/∂z of the sampled token: above zero, the step makes it more likely",
  ],
  [
    "ratio",
    "log T/S",
    (t, i) => t.ratio[i],
    true,
    "log T(y) − log S(y): above zero, the teacher finds the token likelier than the student, nats",
  ],
  [
    "magnitude",
    "pull",
    (t, i) => t.magnitude[i],
    false,
    "sum over the vocabulary of |∂loss/∂z|: how hard the step pulls here",
  ],
  [
    "jsd",
    "JSD",
    (t, i) => t.jsd[i],
    false,
    "Jensen-Shannon divergence of student and teacher, nats",
  ],
  ["reverse_kl", "reverse KL", (t, i) => t.reverse_kl[i], false, "KL(S || T), nats"],
  ["objective", "objective", (t, i) => t.objective[i], true, "the token's loss before any factor"],
  ["entropy", "H(S)", (t, i) => t.entropy[i], false, "entropy of the student, nats"],
  [
    "teacher_entropy",
    "H(T)",
    (t, i) => t.teacher_entropy[i],
    false,
    "entropy of the teacher, nats",
  ],
  [
    "gap",
    "gap",
    (t, i) => t.gap[i],
    true,
    "log S of the trainer − log S of the sampler, nats: zero but for rounding",
  ],
  ["importance", "importance", (t, i) => t.importance[i], false, "importance weight of the token"],
  ["token_weight", "token weight", (t, i) => t.token_weight[i], false, "weight of the token"],
];
const ADDED = ["credit", "magnitude"]; // parts of the step's gradient: a turn has their sum
let signal = "credit";
let map = null; // what is shown: { trace, spans, at, pinned }

function showResponse(question, response, trace) {
  const siblings = question.responses;
  const verdict = response.success ? "right" : "wrong";
  const facts = [
    ["answer", response.answer ?? "none"],
    ["gold", question.gold],
    ["reward", short(response.reward)],
    ["weight", here.split === "train" ? short(response.weight) : null],
    ["pass rate", `${short(question.pass_rate)} of ${question.samples} responses`],
    ["tokens", `${response.n_tokens}${!response.finished ? ", truncated" : ""}`],
    ["turns", response.turns.filter((t) => t.role === "assistant").length || null],
    ["ran out of", response.stopped],
    ["got credit", here.split === "train" ? (response.active ? "yes" : "no") : null],
  ];
  const read =
    response.teacher_prompt == null
      ? make(
          "p",
          { class: "note" },
          here.split === "train" ? "No teacher read anything before this response." : "",
        )
      : fold("What the teacher read before this response", response.teacher_prompt, Boolean(trace));
  map = null;
  byId("response").replaceChildren(
    make(
      "div",
      {},
      make(
        "h3",
        {},
        `${unit[0].toUpperCase()}${unit.slice(1)} ${here.batch}, response ${response.sample + 1} of ${question.samples}: `,
        make("span", { class: `verdict ${verdict}` }, verdict),
      ),
      make(
        "div",
        { class: "facts-row" },
        facts
          .filter(([, value]) => value !== null && value !== "")
          .map(([name, value]) => make("span", {}, `${name} `, make("b", {}, String(value)))),
      ),
      make(
        "div",
        { class: "pips", role: "group", "aria-label": "Siblings" },
        siblings.map((r) => pip(question, r)),
      ),
      make(
        "div",
        { class: "said" },
        question.messages.flatMap((m) => [make("small", {}, m.role), m.content]),
      ),
      response.error
        ? make("p", { class: "note" }, `The verifier failed: ${response.error}`)
        : null,
      response.feedback ? make("p", { class: "note" }, `Feedback: ${response.feedback}`) : null,
      ...(trace
        ? creditMap(trace, read, response.turns)
        : [
            response.turns.length
              ? make("div", { class: "plain" }, response.turns.map((one) => part(one)))
              : make("div", { class: "plain" }, response.response || "(empty)"),
            make(
              "p",
              { class: "note" },
              response.traced
                ? "Its tokens are not in this page: it was made to stay under 10 MB."
                : "Its tokens were not traced.",
            ),
          ]),
      trace ? null : read,
    ),
  );
  if (trace) paint();
}

const fold = (title, text, open) =>
  make("details", { open }, make("summary", {}, title), make("pre", {}, text));

/** What one side said in a turn of an episode, with who it was; more of it may follow. */
function part({ role, text, name, feedback, reward }, turn, children = [text]) {
  const world = role !== "assistant";
  const who = world ? `${role}${name ? ` ${name}` : ""}` : "policy";
  const beside = [reward && `reward of the turn ${short(reward)}`, feedback && `feedback: ${feedback}`];
  return make(
    "div",
    { class: world ? "part world" : "part" },
    make(
      "small",
      {},
      make("b", {}, who),
      beside.filter(Boolean).join(" · "),
      world ? null : make("output", { "data-turn": turn }),
    ),
    children,
  );
}

/** The parts of an episode, in which tokens stand for what the policy said. */
function playedOut(turns, trace, spans) {
  let turn = -1;
  return turns.map((one) => {
    if (one.role !== "assistant") return part(one, turn);
    turn += 1;
    return part(
      one,
      turn,
      spans.filter((_, i) => trace.turn[i] === turn),
    );
  });
}

const known = (trace, value) => trace.ids.some((_, i) => value(trace, i) != null);

function creditMap(trace, read, turns) {
  const chosen = SIGNALS.filter(([, , value]) => known(trace, value));
  if (!chosen.some(([name]) => name === signal)) signal = chosen[0]?.[0] ?? "credit";
  const spans = trace.text.map((text, i) => make("span", { "data-i": i }, visible(text)));
  const tokens = make(
    "div",
    {
      class: "tokens",
      tabindex: "0",
      role: "application",
      "aria-label": "Tokens; arrow keys move, n and N jump to the next large one, Enter pins",
    },
    trace.turn && turns.length ? playedOut(turns, trace, spans) : spans,
  );
  tokens.addEventListener(
    "pointerover",
    (event) => event.target.dataset.i && look(Number(event.target.dataset.i)),
  );
  tokens.addEventListener(
    "click",
    (event) => event.target.dataset.i && pin(Number(event.target.dataset.i)),
  );
  tokens.addEventListener("keydown", tokenKeys);
  map = { trace, spans, at: null, pinned: null };
  const buttons = chosen.map(([name, label, , , words]) =>
    make(
      "button",
      {
        type: "button",
        title: words,
        "data-signal": name,
        "aria-pressed": name === signal,
        onclick: () => ((signal = name), paint()),
      },
      label,
    ),
  );
  return [
    make("div", { class: "signals", role: "group", "aria-label": "Signal" }, buttons),
    make("div", { class: "scale", id: "scale" }),
    make(
      "div",
      { class: "desk" },
      make("div", {}, tokens, read),
      make("aside", { class: "inspector", id: "inspector", "aria-label": "Token" }),
    ),
  ];
}

/** What has no ink is shown by a sign. */
function visible(text) {
  if (text === "") return "";
  return text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t");
}

function paint() {
  const { trace, spans } = map;
  const [, label, value, signed, words] = SIGNALS.find(([name]) => name === signal);
  const values = trace.ids.map((_, i) => value(trace, i));
  const sizes = values
    .filter((v) => v != null)
    .map(Math.abs)
    .sort((a, b) => a - b);
  const top = sizes[Math.ceil(0.99 * sizes.length) - 1] || sizes.at(-1) || 0;
  map.values = values;
  map.large = 0.3 * top;
  spans.forEach((span, i) => {
    const share = top ? Math.max(-1, Math.min(1, (values[i] ?? 0) / top)) : 0;
    const bin = Math.round(BINS * share);
    const sign = signed && Math.abs(bin) >= 2 ? (bin > 0 ? " up" : " down") : "";
    const special = /^<\|.*\|>$/.test(trace.text[i]) ? " special" : "";
    const marks = `${i === map.at ? " at" : ""}${i === map.pinned ? " pinned" : ""}`;
    span.className = `${bin ? `t${bin}` : ""}${sign}${special}${marks}`.trim();
  });
  document
    .querySelectorAll(".signals button")
    .forEach((b) => b.setAttribute("aria-pressed", b.dataset.signal === signal));
  for (const output of document.querySelectorAll(".part output")) {
    const own = values.filter((v, i) => v != null && trace.turn[i] === Number(output.dataset.turn));
    const total = own.reduce((sum, v) => sum + v, 0);
    const said = ADDED.includes(signal) ? short(total) : `${short(total / own.length)} a token`;
    output.textContent = own.length ? `${label} ${said}` : "";
  }
  byId("scale").className = `scale${signed ? "" : " single"}`;
  byId("scale").replaceChildren(
    make("span", {}, signed ? short(-top) : "0"),
    make("i", {}),
    make("span", {}, short(top)),
    make("span", {}, words),
  );
  if (map.at == null) {
    const largest = values.reduce(
      (best, v, i) => (Math.abs(v ?? 0) > Math.abs(values[best] ?? 0) ? i : best),
      0,
    );
    look(largest);
  } else inspect(map.at);
}

function look(i) {
  if (map.pinned != null) return;
  map.spans[map.at]?.classList.remove("at");
  map.at = i;
  map.spans[i].classList.add("at");
  inspect(i);
}

function pin(i) {
  const same = map.pinned === i;
  map.spans[map.pinned]?.classList.remove("pinned");
  map.pinned = null;
  look(i);
  if (!same) {
    map.pinned = i;
    map.spans[i].classList.add("pinned");
  }
}

function tokenKeys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { values, large, spans, at } = map;
  const seek = (by) => {
    for (let i = (at ?? -by) + by; i >= 0 && i < spans.length; i += by)
      if (Math.abs(values[i] ?? 0) >= large) return i;
    return at;
  };
  const to =
    { ArrowRight: (at ?? -1) + 1, ArrowLeft: (at ?? 1) - 1, Home: 0, End: spans.length - 1 }[
      event.key
    ] ?? (event.key === "n" ? seek(1) : event.key === "N" ? seek(-1) : null);
  if (event.key === "Enter") pin(at);
  else if (event.key === "Escape" && map.pinned != null) pin(map.pinned);
  else if (to != null) {
    if (map.pinned != null) pin(map.pinned);
    look(Math.min(Math.max(to, 0), spans.length - 1));
    map.spans[map.at].scrollIntoView({ block: "nearest" });
  } else return;
  event.preventDefault();
  event.stopPropagation();
}

function inspect(i) {
  const { trace } = map;
  const rows = SIGNALS.map(([name, label, value]) => [name, label, value(trace, i)]).filter(
    ([, , v]) => v != null,
  );
  byId("inspector").replaceChildren(
    make(
      "h4",
      {},
      make("small", {}, `token ${i + 1} of ${trace.ids.length}`),
      shown(trace.text[i]),
    ),
    make(
      "dl",
      {},
      rows.flatMap(([name, label, v]) => [
        make("dt", {}, label),
        make("dd", { "data-value": name }, short(v)),
      ]),
    ),
    candidates(trace, i),
  );
}

const shown = (text) =>
  text === "" ? "∅" : text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");

/** The most likely tokens of both sides: probability under student and teacher, and credit. */
function candidates(trace, i) {
  const told = trace.top_teacher_probs[i]?.some((p) => p != null);
  const percent = (p, side) =>
    make(
      "td",
      {},
      bar(p, side),
      make("span", {}, p == null ? "–" : p < 1e-4 ? "<0.01%" : `${short(100 * p)}%`),
    );
  return make(
    "table",
    {},
    make(
      "thead",
      {},
      make(
        "tr",
        {},
        make("th", { scope: "col" }, "candidate"),
        make("th", { scope: "col" }, "student"),
        told ? make("th", { scope: "col" }, "teacher") : null,
        make("th", { scope: "col" }, "credit"),
      ),
    ),
    make(
      "tbody",
      {},
      trace.top[i].map((text, c) =>
        make(
          "tr",
          { class: trace.sampled[i] === c ? "sampled" : null },
          make("th", { scope: "row", title: text }, shown(text)),
          percent(trace.top_probs[i][c], "student"),
          told ? percent(trace.top_teacher_probs[i][c], "teacher") : null,
          make("td", {}, make("span", {}, short(trace.top_credit[i][c], 2))),
        ),
      ),
    ),
  );
}

function bar(p, side) {
  const element = make("span", { class: `bar ${side}` });
  element.style.width = `${100 * (p ?? 0)}%`;
  return element;
}
