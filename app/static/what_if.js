// The form "What if": filled in for the strongest moment, and sent.
element.addEventListener("click", (event) => {
  const fill = event.target.closest(".fill");
  if (!fill) return;
  const form = fill.closest("form");
  form.elements.from.value = fill.dataset.from;
  form.elements.to.value = fill.dataset.to;
});
element.addEventListener("submit", (event) => {
  event.preventDefault();
  const form = event.target;
  trigger("again", {
    v2v: form.elements.v2v.checked,
    t2v: form.elements.t2v.checked,
    tokens: form.elements.tokens.value,
    from: form.elements.from.value,
    to: form.elements.to.value,
  });
});
