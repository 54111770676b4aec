// Small things that CSS can't do: long formulas on narrow screens, and folded parts and colours on paper.
const fitFormulas = () => {
  for (const formula of document.querySelectorAll("span.math mjx-container")) {
    const room = formula.closest("p, li, td, th, dd, figcaption, .box")?.clientWidth ?? innerWidth;
    const long = formula.firstElementChild.getBoundingClientRect().width > room;
    formula.classList.toggle("long", long);
  }
};
// What scrolls sideways must be reachable by keyboard.
const focusScrollers = () => {
  for (const part of document.querySelectorAll("article :is(mjx-container, div.math, pre, dt.sig, .output)")) {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
  }
};
const settle = () => window.MathJax?.startup?.promise?.then(() => { fitFormulas(); focusScrollers(); }) ?? focusScrollers();
addEventListener("load", settle);
addEventListener("resize", settle);

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("article details:not([open])")];
  for (const part of folded) part.open = true;
});
addEventListener("afterprint", () => {
  for (const part of folded) part.open = false;
});
