// Plots: hover and arrow keys read values, a click leads to the step, CSV downloads what is drawn.

let panels = {};

/** From a place in the drawing to x, and back. */
const xAt = (panel, px) => {
  const [left, , right] = panel.box;
  const [low, high] = panel.domain;
  return low + ((px - left) / (right - left)) * (high - low);
};
function place(value, low, high, start, end, log) {
  const scale = log ? Math.log10 : (v) => v;
  const share =
    (scale(Math.min(Math.max(value, low), high)) - scale(low)) / (scale(high) - scale(low));
  return start + share * (end - start);
}
const placeX = (panel, x) => place(x, panel.domain[0], panel.domain[1], panel.box[0], panel.box[2]);
const placeY = (panel, y) =>
  place(y, panel.domain[2], panel.domain[3], panel.box[3], panel.box[1], panel.log);

function nearest(values, x) {
  let best = 0;
  values.forEach((value, i) => {
    if (Math.abs(value - x) < Math.abs(values[best] - x)) best = i;
  });
  return best;
}

/** Where one is, in words. */
const placeName = (panel, at) => panel.names[Math.round(at)] ?? `${panel.x} ${short(at, 6)}`;

/** All x that the panel has, in order; a name stands for all that are around it. */
function allX(panel) {
  if (panel.names.length) return panel.names.map((_, i) => i);
  panel.all ??= [...new Set(panel.layers.flatMap((layer) => layer.x))].sort((a, b) => a - b);
  return panel.all;
}

/** Values at the x nearest to `x`: [layer, value, raw value where the line is a running mean]. */
function valuesAt(panel, x) {
  const at = allX(panel)[nearest(allX(panel), x)];
  const rows = [];
  for (const layer of panel.layers) {
    if (layer.weak || document.body.classList.contains(`off-${layer.tone}`)) continue;
    const i = nearest(layer.x, at);
    const reach = panel.names.length ? 0.5 : 1e-9 * Math.max(1, Math.abs(at));
    if (layer.y[i] == null || Math.abs(layer.x[i] - at) > reach) continue;
    const raw = panel.layers.find(
      (other) => other.weak && other.tone === layer.tone && other.label === layer.label,
    );
    rows.push({ layer, i, value: layer.y[i], raw: raw?.y[i] });
  }
  return { at, rows };
}

function showTip(svg, panel, x) {
  const { at, rows } = valuesAt(panel, x);
  clearTip(svg);
  const tip = svg.parentElement.querySelector(".tip");
  const px = placeX(panel, at);
  const [, top, , bottom] = panel.box;
  svg.append(makeSvg("path", { class: "cursor", d: `M${px} ${top}V${bottom}` }));
  for (const { layer, i, value } of panel.stacked ? [] : rows) {
    svg.append(
      makeSvg("circle", {
        class: `knob ${layer.tone}`,
        cx: placeX(panel, layer.x[i]),
        cy: placeY(panel, value),
        r: 3.5,
      }),
    );
  }
  tip.replaceChildren(
    make("b", {}, placeName(panel, at)),
    ...rows.map(({ layer, i, value, raw }) => {
      const extra =
        layer.low?.[i] != null ? ` (${short(layer.low[i])} to ${short(layer.high[i])})` : "";
      const own = raw == null ? "" : ` (this batch ${short(raw)})`;
      return make(
        "div",
        {},
        make("i", { class: layer.tone }, layer.label),
        make("span", {}, make("b", {}, short(value)), make("small", {}, extra + own)),
      );
    }),
  );
  tip.hidden = false;
  const scale = svg.clientWidth / svg.viewBox.baseVal.width;
  const width = tip.offsetWidth;
  const left = Math.min(Math.max(px * scale - width / 2, 0), Math.max(svg.clientWidth - width, 0));
  tip.style.left = `${left}px`;
  tip.style.top = `${-tip.offsetHeight - 4}px`;
  svg.dataset.at = at;
  return { at, rows };
}

function clearTip(svg) {
  svg.querySelectorAll(".cursor, .knob").forEach((element) => element.remove());
  svg.parentElement.querySelector(".tip").hidden = true;
}

function pointerX(svg, event) {
  const box = svg.getBoundingClientRect();
  return ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
}

function step(svg, panel, by) {
  const all = allX(panel);
  const now = "at" in svg.dataset ? nearest(all, Number(svg.dataset.at)) : by > 0 ? -1 : all.length;
  const next = Math.min(Math.max(now + by, 0), all.length - 1);
  const { at, rows } = showTip(svg, panel, all[next]);
  const words = rows.map(({ layer, value }) => `${layer.label} ${short(value)}`);
  say(`${placeName(panel, at)}: ${words.join(", ")}`);
}

/** The run whose line is nearest to the pointer; 0 if the panel's tones are no runs'. */
function runAt(panel, x, py) {
  let best = { run: panel.run ?? 0, distance: Infinity };
  for (const { layer, value } of valuesAt(panel, x).rows) {
    const distance = Math.abs(placeY(panel, value) - py);
    if (layer.tone.startsWith("run-") && distance < best.distance)
      best = { run: Number(layer.tone.slice(4)), distance };
  }
  return best.run;
}

function enliven(svg) {
  const panel = panels[svg.dataset.panel];
  svg.addEventListener("pointermove", (event) =>
    showTip(svg, panel, xAt(panel, pointerX(svg, event))),
  );
  svg.addEventListener("pointerleave", () => clearTip(svg));
  svg.addEventListener("blur", () => clearTip(svg));
  svg.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[
      event.key
    ];
    if (by) {
      step(svg, panel, by);
      event.preventDefault();
    }
    if (event.key === "Enter" && panel.steps && "at" in svg.dataset)
      openStep(panel.run ?? 0, Number(svg.dataset.at));
    if (event.key === "Escape") clearTip(svg);
  });
  if (!panel.steps || !byId("responses")) return;
  svg.setAttribute("data-steps", "");
  svg.addEventListener("click", (event) => {
    const px = pointerX(svg, event);
    const py =
      ((event.clientY - svg.getBoundingClientRect().top) / svg.clientHeight) *
      svg.viewBox.baseVal.height;
    openStep(runAt(panel, xAt(panel, px), py), xAt(panel, px));
  });
}

/** A row for each x, a column for each layer and each end of its interval. */
function csv(panel) {
  const columns = [];
  for (const layer of panel.layers) {
    const name = layer.weak ? `${layer.label} (each batch)` : layer.label;
    columns.push([name, layer.x, layer.y]);
    if (layer.low?.some((value) => value != null)) {
      columns.push([`${name} low`, layer.x, layer.low], [`${name} high`, layer.x, layer.high]);
    }
  }
  const quote = (text) => `"${String(text).replaceAll('"', '""')}"`;
  const lookups = columns.map(([, x, y]) => new Map(x.map((value, i) => [value, y[i]])));
  const head = [panel.x, ...columns.map(([name]) => name)].map(quote).join(",");
  const places = [...new Set(panel.layers.flatMap((layer) => layer.x))].sort((a, b) => a - b);
  const cell = (x) => (panel.names.length ? quote(panel.names[Math.round(x)]) : x);
  const rows = places.map((x) =>
    [cell(x), ...lookups.map((found) => found.get(x) ?? "")].join(","),
  );
  return [head, ...rows].join("\n") + "\n";
}

document.querySelectorAll(".data").forEach((button) =>
  button.addEventListener("click", () => {
    const panel = panels[button.dataset.panel];
    download(`${panel.name}.csv`, csv(panel), "text/csv");
  }),
);

document.querySelectorAll(".run[data-run]").forEach((button) =>
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    document.body.classList.toggle(`off-run-${button.dataset.run}`, !shown);
  }),
);

unpack("panels").then((found) => {
  panels = Object.fromEntries(found.map((panel) => [panel.name, panel]));
  document.querySelectorAll(".plot").forEach(enliven);
  document.documentElement.dataset.plots = "ready";
});
