// What docs/site/play.md computes and draws. tests/test_play.py compares the first part with the library.

const corrected = (momentum, passes) => -Math.expm1(Math.log1p(-momentum) / passes);
const effective = (momentum, passes) => -Math.expm1(Math.log1p(-momentum) * passes);
// How much of an old value is left after some batches, and how much each of the last batches counts, the newest first.
const left = (momentum, passes, batches) => Math.exp(Math.log1p(-momentum) * passes * batches);
const share = (momentum, passes, ago) => effective(momentum, passes) * left(momentum, passes, ago);
// The batches after which a tenth of an old value is left.
const memory = (momentum, passes) => Math.max(1, Math.log(0.1) / (Math.log1p(-momentum) * passes));

const WIDTH = 640;
const HEIGHT = 260;
const EDGE = { left: 64, right: 16, top: 12, bottom: 34 };
const BATCHES = 20;

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text) made.textContent = text;
  return made;
}

function axes(svg, highest, label) {
  svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  svg.replaceChildren();
  const x = (batch) => EDGE.left + ((WIDTH - EDGE.left - EDGE.right) * batch) / BATCHES;
  const y = (value) => HEIGHT - EDGE.bottom - (HEIGHT - EDGE.top - EDGE.bottom) * (value / highest);
  for (const part of [0, 0.25, 0.5, 0.75, 1]) {
    const height = y(part * highest);
    svg.append(element("line", { x1: x(0), x2: x(BATCHES), y1: height, y2: height, class: "grid" }));
    const text = (part * highest).toFixed(3);
    svg.append(element("text", { x: EDGE.left - 6, y: height + 4, "text-anchor": "end" }, text));
  }
  for (let batch = 0; batch <= BATCHES; batch += 5)
    svg.append(element("text", { x: x(batch), y: HEIGHT - 17, "text-anchor": "middle" }, String(batch)));
  svg.append(element("text", { x: (x(0) + x(BATCHES)) / 2, y: HEIGHT - 3, "text-anchor": "middle" }, label));
  return { x, y };
}

function draw(momentum, passes) {
  const runs = [
    ["right", momentum, 1],
    ["wrong", momentum, passes],
    ["corrected", corrected(momentum, passes), passes],
  ];
  const decay = document.getElementById("decay");
  const shares = document.getElementById("shares");
  let { x, y } = axes(decay, 1, "batches");
  for (const [kind, m, k] of runs) {
    const points = Array.from({ length: BATCHES + 1 }, (_, n) => [x(n), y(left(m, k, n))]);
    if (kind === "corrected")
      for (const [cx, cy] of points) decay.append(element("circle", { cx, cy, r: 4, class: kind }));
    else decay.append(element("polyline", { points: points.join(" "), class: kind }));
  }
  ({ x, y } = axes(shares, share(momentum, passes, 0), "batches ago"));
  const wide = (x(1) - x(0)) / 4;
  runs.forEach(([kind, m, k], place) => {
    for (let ago = 0; ago < BATCHES; ago += 1) {
      const top = y(share(m, k, ago));
      const bar = { x: x(ago) + place * wide, y: top, width: wide, height: y(0) - top, class: `bar ${kind}` };
      shares.append(element("rect", bar));
    }
  });
  for (const [kind, m, k] of runs) document.getElementById(`memory-${kind}`).textContent = memory(m, k).toFixed(1);
}

function show() {
  const momentum = Number(document.getElementById("momentum").value);
  const passes = Number(document.getElementById("passes").value);
  document.getElementById("momentum-is").textContent = momentum.toFixed(2);
  document.getElementById("passes-is").textContent = String(passes);
  document.getElementById("effective").textContent = effective(momentum, passes).toPrecision(6);
  document.getElementById("corrected").textContent = corrected(momentum, passes).toPrecision(6);
  draw(momentum, passes);
}

if (typeof document !== "undefined") {
  const asked = new URLSearchParams(location.hash.slice(1)); // play.html#momentum=0.03&passes=3
  for (const name of ["momentum", "passes"]) {
    const slider = document.getElementById(name);
    if (asked.has(name)) slider.value = asked.get(name);
    slider.addEventListener("input", show);
  }
  show();
} else module.exports = { corrected, effective, left, share, memory };
