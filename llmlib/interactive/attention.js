/* Attention on the plane: drag a query and the keys, and watch the weights.

   model  tokens [text], q and k [[x, y]] (one pair per token), query (which token looks, as text), temperature,
          mask ("none", "causal", "window"), sink (bool), sink_logit */

const softmaxRow = ({ q, k, temperature, mask, sink, sink_logit: sinkLogit }, i) => {
  const seen = (j) => mask === "none" || (j <= i && (mask === "causal" || i - j < 3));
  const scores = k.map((key, j) => (seen(j) ? (q[i][0] * key[0] + q[i][1] * key[1]) / Math.SQRT2 / temperature : -Infinity));
  if (sink) scores.push(sinkLogit / temperature);
  const top = Math.max(...scores), weights = scores.map((score) => Math.exp(score - top));
  const total = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / total);
};
const KEYS = ["tokens", "q", "k", "query", "temperature", "mask", "sink", "sink_logit"];

export default { render({ model, el }) {
  const ui = lm.panel(el, {
    title: "Queries meet keys",
    note: "Each token has a query and a key, here two numbers each, so that they fit on a plane. The score is their dot product over √2. "
      + "Drag the blue query or an orange key, or move it with the arrow keys; turn the temperature, hide the future, add a sink.",
  });
  const state = () => Object.fromEntries(KEYS.map((key) => [key, model.get(key)]));
  const tokens = model.get("tokens"), n = tokens.length, reach = 3;
  const looking = lm.segmented({ label: "the token that looks", options: tokens.map((token, i) => [String(i), token]) });
  const temperature = lm.slider({ label: "temperature", min: 0.1, max: 10, log: true, format: (v) => lm.num(v, 2) });
  const mask = lm.segmented({ label: "mask", options: [["none", "none"], ["causal", "causal"], ["window", "window of 3"]] });
  const sink = lm.toggle({ label: "a sink: one more logit, with no value" });
  const sinkLogit = lm.slider({ label: "sink logit", min: -4, max: 6, step: 0.1, format: (v) => lm.num(v, 2) });
  for (const [key, control] of Object.entries({ query: looking, temperature, mask, sink, sink_logit: sinkLogit })) lm.bind(model, key, control);
  ui.controls.append(looking.el, mask.el, temperature.el, lm.h("div", {}, sink.el, sinkLogit.el));

  const moved = (name, i, x, y) => {
    const at = (v) => Math.round(lm.clamp(v, -reach, reach) * 100) / 100;
    lm.put(model, { [name]: model.get(name).map((pair, j) => (j === i ? [at(x), at(y)] : pair)) });
  };
  const handle = (p, name, i, options) => {
    const [x, y] = model.get(name)[i];
    p.handle(`${name}${i}`, {
      x, y, ...options, text: `${lm.num(x, 2)}, ${lm.num(y, 2)}`, move: (u, v) => moved(name, i, u, v),
      nudge: (dx, dy, big) => moved(name, i, x + dx * (big ? 0.5 : 0.1), y + lm.clamp(dy, -1, 1) * (big ? 0.5 : 0.1)),
    });
  };
  const plane = lm.chart({
    label: () => `The query of ${tokens[+model.get("query")]} and the keys of all tokens on a plane`, height: 320,
    x: { domain: [-reach, reach], label: "first number" }, y: { domain: [-reach, reach], label: "second number" },
    draw(p) {
      const now = state(), i = +now.query, weights = softmaxRow(now, i), [x, y] = now.q[i];
      now.k.forEach((key, j) => p.line([[x, y], key], { color: "orange", width: 0.5 + 9 * weights[j], opacity: 0.15 + 0.6 * weights[j] }));
      p.line([[0, 0], [x, y]], { color: "blue", width: 1.5, dash: "4 4" });
      now.k.forEach((key, j) => {
        handle(p, "k", j, { label: `key of ${tokens[j]}`, color: "orange", r: 7 });
        p.text(key[0], key[1], tokens[j], { dx: 11, dy: 4 });
      });
      handle(p, "q", i, { label: `query of ${tokens[i]}`, color: "blue", r: 9 });
      p.text(x, y, `${tokens[i]} looks`, { dx: x > 0.8 ? -12 : 12, dy: -10, anchor: x > 0.8 ? "end" : "start", color: "blue", weight: 650 });
    },
  });
  const map = lm.chart({
    label: "Attention weights: one row for each query, one column for each key", height: 320, margin: { left: 58, bottom: 48 },
    x: () => ({ domain: [0, n + (model.get("sink") ? 1 : 0)], ticks: lm.range(0.5, n + 0.5, n + 1), format: (v) => tokens[v - 0.5] ?? "sink", grid: false, label: "key" }),
    y: () => ({ domain: [n, 0], ticks: lm.range(0.5, n - 0.5, n), format: (v) => tokens[v - 0.5], grid: false, label: "query" }),
    draw(p) {
      const now = state(), matrix = tokens.map((_, i) => softmaxRow(now, i)), chosen = +now.query;
      p.cells(matrix, {
        color: (weight, i, j) => lm.shade(weight * 0.75, j === n ? "violet" : "blue"),
        title: (i, j, weight) => `${tokens[i]} gives ${tokens[j] ?? "the sink"} ${(100 * weight).toFixed(1)} %`,
      });
      if (p.width / matrix[0].length > 30) {
        matrix.forEach((row, i) => row.forEach((weight, j) => p.text(j + 0.5, i + 0.5, weight < 0.005 ? "" : weight >= 0.995 ? "1" : weight.toFixed(2).slice(1), { anchor: "middle", dy: 4, size: 11, weight: i === chosen ? 700 : 400 })));
      }
      const right = matrix[0].length;
      p.line([[0, chosen], [right, chosen], [right, chosen + 1], [0, chosen + 1], [0, chosen]], { color: "ink", width: 2, free: true });
    },
  });
  ui.body.append(lm.row(plane.el, map.el));

  const table = lm.h("div", { class: "scroll" });
  const boxes = ["q", "k"].map((name) => tokens.map((token, i) => [0, 1].map((c) => {
    const box = lm.h("input", { type: "text", inputmode: "decimal", "aria-label": `${name === "q" ? "query" : "key"} of ${token}, number ${c + 1}`, style: "width:4.2em" });
    box.addEventListener("change", () => {
      const value = lm.parse(box.value), pair = model.get(name)[i].slice();
      if (Number.isFinite(value)) { pair[c] = value; moved(name, i, ...pair); }
      write();
    });
    return box;
  })));
  const write = () => ["q", "k"].forEach((name, a) => model.get(name).forEach((pair, i) => pair.forEach((v, c) => { boxes[a][i][c].value = lm.num(v, 3); })));
  table.append(lm.h("table", {}, lm.h("thead", {}, lm.h("tr", {}, ["token", "query", "", "key", ""].map((word) => (word || undefined) === undefined ? lm.h("td") : lm.h("th", { scope: "col" }, word)))),
    lm.h("tbody", {}, tokens.map((token, i) => lm.h("tr", {}, lm.h("th", { scope: "row" }, token), [0, 1].flatMap((a) => boxes[a][i].map((box) => lm.h("td", {}, box))))))));
  ui.foot.append(lm.fold("Q and K as numbers", table));

  return lm.live(model, ui, () => {
    const now = state(), i = +now.query, weights = softmaxRow(now, i), best = weights.indexOf(Math.max(...weights));
    const bits = -weights.reduce((sum, w) => sum + (w > 0 ? w * Math.log2(w) : 0), 0);
    sinkLogit.el.style.visibility = now.sink ? "visible" : "hidden";
    plane.redraw(); map.redraw(); write();
    ui.say(`“${tokens[i]}” gives most weight, ${(100 * weights[best]).toFixed(1)} %, to ${best === n ? "the sink" : `“${tokens[best]}”`}. Its weights have ${lm.num(bits, 3)} bits of entropy, as if it looked at ${lm.num(2 ** bits, 2)} keys equally.`);
  });
} };
