// A changed number goes to Python, and what Python made of it comes back in the markup. The browser
// shows what was typed instead, so the controls are set from the markup each time.
const reset = () => {
  for (const control of element.querySelectorAll("[data-adjust]")) {
    const chosen = control.querySelector("option[selected]");
    control.value = chosen ? chosen.value : control.getAttribute("value");
  }
};
element.addEventListener("change", (event) => {
  const control = event.target.closest("[data-adjust]");
  if (!control) return;
  trigger("click", { adjust: `${control.dataset.adjust}:${control.value}` });
  reset();
});
watch("value", reset);
