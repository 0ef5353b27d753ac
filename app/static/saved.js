// Copying the run card and its link. Listens on the document, because Gradio replaces the elements.
(() => {
  const copy = async (text) => {
    if (navigator.clipboard && window.isSecureContext) return navigator.clipboard.writeText(text);
    // Pages that are not on https or localhost have no clipboard of their own.
    const box = document.createElement("textarea");
    box.value = text;
    box.style.position = "fixed";
    box.style.opacity = "0";
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    if (!done) throw new Error("not copied");
  };
  const tell = (near, text) => {
    const place = near.parentElement.querySelector(".copied");
    if (!place) return;
    place.textContent = text;
    setTimeout(() => { if (place.textContent === text) place.textContent = ""; }, 4000);
  };

  document.addEventListener("click", async (event) => {
    const button = event.target.closest && event.target.closest("[data-copy], [data-copy-link]");
    if (!button) return;
    event.preventDefault();
    const link = button.matches("[data-copy-link]");
    const text = link
      ? new URL(button.getAttribute("href"), document.baseURI).href
      : document.getElementById(button.dataset.copy).textContent;
    try {
      await copy(text);
      tell(button, "Copied");
    } catch {
      tell(button, link ? text : "Copying is not allowed here; open the whole card instead");
    }
  });
})();
