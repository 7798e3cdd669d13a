"use strict";
// Values on pointing, touching and by arrow keys. Everything is read from the drawn elements; the page is whole without.
document.documentElement.classList.add("js");
const tip = document.getElementById("tip");
const shown = (value) => Number(value.toPrecision(4)).toString().replaceAll("-", "−");

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function showTip(title, rows, box) {
  tip.replaceChildren(element("b", title));
  for (const [label, value, colour] of rows) {
    const row = document.createElement("div");
    const name = element("span", "");
    if (colour) name.append(element("i", "", colour));
    name.append(label);
    row.append(name, element("span", value));
    tip.append(row);
  }
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(innerWidth - width - 8, box.left));
  const above = box.top - height - 8;
  tip.style.transform = `translate(${left}px, ${above >= 4 ? above : box.bottom + 8}px)`;
}

const charts = [...document.querySelectorAll(".chart svg")].map((svg) => {
  const series = [...svg.querySelectorAll(".series")].map((group) => {
    const raw = group.querySelector(".raw");
    const unit = 10 ** group.dataset.power;
    const points = (line) => new Map([...(line?.points ?? [])].map((point) => [point.x, point.y * unit]));
    const heldOut = group.querySelector(".held-out")?.getAttribute("d") ?? "";
    return {
      label: group.dataset.label,
      colour: group.classList[1],
      line: raw,
      raw: points(raw),
      smooth: points(group.querySelector(".smooth")),
      heldOut: new Map([...heldOut.matchAll(/M(\S+) (\S+)h0/g)].map((match) => [+match[1], match[2] * unit])),
    };
  });
  const steps = [...new Set(series.flatMap((one) => [...one.raw.keys(), ...one.heldOut.keys()]))].sort((a, b) => a - b);
  return { svg, series, steps, rule: svg.querySelector(".rule"), at: steps.length - 1 };
});

let again = null; // shows what is shown, where it is now

function clear() {
  tip.hidden = true;
  for (const chart of charts) chart.rule.style.visibility = "hidden";
  document.querySelector(".text .at")?.classList.remove("at");
}

// A finger leaves as soon as it is lifted; what it tapped stays until the next tap.
function leave(event) {
  if (event.pointerType === "mouse") clear();
}

// The step is marked in every chart, so that a spike in one can be looked for in the others.
function showStep(chart, index) {
  again = () => showStep(chart, index);
  chart.at = Math.max(0, Math.min(chart.steps.length - 1, index));
  const step = chart.steps[chart.at];
  for (const { rule, series, steps } of charts) {
    const { a, e } = series[0].line.transform.baseVal[0].matrix;
    const inside = steps[0] <= step && step <= steps[steps.length - 1];
    rule.style.visibility = inside ? "visible" : "hidden";
    rule.setAttribute("x1", a * step + e);
    rule.setAttribute("x2", a * step + e);
  }
  const rows = [];
  for (const { label, colour, raw, smooth, heldOut } of chart.series) {
    if (raw.has(step)) rows.push([label, shown(raw.get(step)), colour]);
    if (smooth.has(step)) rows.push(["smoothed", shown(smooth.get(step))]);
    if (heldOut.has(step)) rows.push(["held-out lists", shown(heldOut.get(step)), colour]);
  }
  const { left, top, bottom } = chart.rule.getBoundingClientRect();
  showTip(`step ${step}`, rows, { left: left + 12, top: top + 8, bottom });
}

const KEYS = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity };
for (const chart of charts) {
  chart.svg.tabIndex = 0;
  const point = (event) => {
    const inverse = chart.series[0].line.getScreenCTM().inverse();
    const step = inverse.a * event.clientX + inverse.e;
    const distance = (index) => Math.abs(chart.steps[index] - step);
    showStep(chart, chart.steps.reduce((best, _, index) => (distance(index) < distance(best) ? index : best), 0));
  };
  chart.svg.addEventListener("pointermove", point);
  chart.svg.addEventListener("pointerdown", point);
  chart.svg.addEventListener("pointerleave", leave);
  chart.svg.addEventListener("focus", () => chart.svg.matches(":focus-visible") && showStep(chart, chart.at));
  chart.svg.addEventListener("blur", clear);
  chart.svg.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS)) return;
    event.preventDefault();
    showStep(chart, chart.at + KEYS[event.key]);
  });
}

function showToken(token) {
  clear();
  again = () => showToken(token);
  token.classList.add("at");
  const { id, role, weight } = token.dataset;
  if (id) {
    const rows = [["token id", id], ["role", role]];
    if (weight) rows.push(["weight", weight]);
    showTip(`“${token.textContent}”`, rows, token.getClientRects()[0]);
    return;
  }
  const [reward, before, after, logprobBefore, logprobAfter] = token.dataset.v.split(" ");
  const change = (from, to) => `${shown(Number(from))} → ${shown(Number(to))}`;
  const rows = [["implicit reward", change(before, after)], ["log-prob", change(logprobBefore, logprobAfter)]];
  if (reward) rows.unshift(["token reward", shown(Number(reward))]);
  const found = before ? rows : [["read", "not learnt"]];
  showTip(`“${token.textContent}”`, found, token.getClientRects()[0]);
}

for (const text of document.querySelectorAll(".text")) {
  const tokens = [...text.children];
  let at = 0;
  text.tabIndex = 0;
  const point = (event) => event.target !== text && showToken(event.target);
  text.addEventListener("pointerover", point);
  text.addEventListener("pointerdown", point);
  text.addEventListener("pointerleave", leave);
  text.addEventListener("focus", () => text.matches(":focus-visible") && tokens.length && showToken(tokens[at]));
  text.addEventListener("blur", clear);
  text.addEventListener("keydown", (event) => {
    if (!(event.key in KEYS) || !tokens.length) return;
    event.preventDefault();
    at = Math.max(0, Math.min(tokens.length - 1, at + KEYS[event.key]));
    showToken(tokens[at]);
  });
}

addEventListener("keydown", (event) => event.key === "Escape" && clear());
addEventListener("pointerdown", clear, { capture: true });
addEventListener("scroll", () => (document.activeElement.matches("main :focus-visible") && !tip.hidden ? again() : clear()));
