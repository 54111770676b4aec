// Small things that CSS can't do: long formulas on narrow screens, and folded parts and colours on paper.
const fitFormulas = () => {
  for (const formula of document.querySelectorAll("span.math mjx-container")) {
    const room = formula.closest("p, li, td, th, dd, figcaption, .box")?.clientWidth ?? innerWidth;
    const long = formula.firstElementChild.getBoundingClientRect().width > room;
    formula.classList.toggle("long", long);
    if (long) formula.tabIndex = 0;
  }
};
const settle = () => window.MathJax?.startup?.promise?.then(fitFormulas);
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
