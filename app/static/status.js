// Shows the state of the worker and tells Python when the model has become ready.
const box = element.querySelector(".model-status");
const names = {
  loading: "Loading the model",
  ready: "Ready",
  busy: "Answering",
  restarting: "Restarting the model",
  failed: "Out of order",
  closed: "Shutting down",
  offline: "No connection",
};
let last = "";
const show = (health) => {
  const { state, model, error } = health;
  box.dataset.state = state;
  box.querySelector(".state").textContent = names[state] || state;
  const detail = state === "failed" ? error : model ? `${model.name} · ${model.device}` : "";
  box.querySelector(".detail").textContent = detail;
  const usable = state === "ready" || state === "busy";
  if (usable && last !== "usable") trigger("ready");
  last = usable ? "usable" : state;
};
const look = async () => {
  let health = { state: "offline" };
  try {
    const reply = await fetch(new URL("health", document.baseURI), { cache: "no-store" });
    if (reply.ok) health = await reply.json();
  } catch {
    // The server is away: shown as offline, and asked again.
  }
  if (!element.isConnected) return;
  show(health);
  const pause = document.hidden ? 10000 : last === "usable" ? 3000 : 700;
  setTimeout(look, pause);
};
look();
